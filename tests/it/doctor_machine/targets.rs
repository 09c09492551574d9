//! Webhooks, search indexes and the daemon itself, set up wrong or in trouble.

use std::{
    fs::{self, File},
    sync::Arc,
};

use serde_json::json;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
};
use tokio_rustls::TlsAcceptor;

use super::{Said, Setup, contents, doctor, lesson, post};
use crate::support::{
    daemon::{Daemon, http},
    free_port,
    pki::{Pair, Pki},
    receiver::{Receiver, Reply},
    wait_until,
};

const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";

/// A handler that posts to this URL.
fn webhook(url: &str, more: &str) -> String {
    format!(
        "[transports.crm]\nkind = \"http\"\nurl = \"{url}\"\ntimeout = \"2s\"\n{more}\n\
         [handlers.to-crm]\nkind = \"forward\"\ntransport = \"crm\"\n\
         retry = {{ attempts = 1 }}\n"
    )
}

async fn found(setup: &Setup, config: &str, severity: &str, check: &str, part: &str) -> Said {
    setup.write(config);
    let said = setup.doctor().await;
    let finding = said.the(severity, check);
    assert_eq!(finding.subject, "transport:crm");
    assert!(finding.what.contains(part), "{part} in {finding:?}");
    assert_eq!(said.code, i32::from(severity == "error"), "{said:#?}");
    said
}

fn checks_of(said: &Said) -> Vec<&str> {
    let of_it = said.findings.iter().filter(|finding| finding.subject == "transport:crm");
    of_it.map(|finding| finding.check.as_str()).collect()
}

#[tokio::test]
async fn a_receiver_is_asked_without_an_event_and_one_that_is_well_has_no_findings() {
    let receiver = Receiver::ruled(|_| Reply::status(405)).await;
    let secret = format!("secret = \"{SECRET}\"\ntoken = \"sEcReT\"");
    let setup = Setup::new(&webhook(&receiver.url("/hooks?key=hidden-key"), &secret));
    let said = setup.doctor().await;
    assert_eq!(checks_of(&said), [""; 0], "{said:#?}");
    assert!(said.examined.contains(&"transport:crm".to_owned()));
    let seen = receiver.seen();
    let asked: Vec<_> = seen.iter().map(|seen| (&*seen.method, &*seen.path)).collect();
    assert_eq!(asked, [("HEAD", "/hooks?key=hidden-key")]);
    assert_eq!(seen[0].header("authorization"), Some("Bearer sEcReT"));

    for (status, severity) in [(401, "warning"), (404, "note"), (410, "warning"), (500, "warning")]
    {
        receiver.rule(move |_| Reply::status(status));
        let said = setup.doctor().await;
        let finding = said.the(severity, "webhook-answer");
        assert!(finding.what.contains(&status.to_string()), "{finding:?}");
        assert_eq!(said.code, 0);
        assert!(!format!("{said:?}").contains("hidden-key"), "{said:?}");
    }
    receiver.rule(|_| Reply::with(301, "location: https://elsewhere.example/", ""));
    setup.doctor().await.the("warning", "webhook-answer");
    // Its clock stopped in 2024.
    receiver.rule(|_| Reply::with(204, "date: Mon, 01 Jan 2024 00:00:00 GMT", ""));
    let said = setup.doctor().await;
    let finding = said.the("warning", "machine-clock");
    assert!(finding.what.contains("ahead of"), "{finding:?}");
}

#[tokio::test]
async fn receivers_that_cannot_be_sent_to_are_errors() {
    let setup = Setup::new("");
    let port = free_port();
    let down = webhook(&format!("http://127.0.0.1:{port}/hidden-path"), "");
    let said = found(&setup, &down, "error", "webhook-connect", "127.0.0.1").await;
    assert!(!format!("{said:?}").contains("hidden-path"), "{said:?}");
    let silent = Receiver::ruled(|_| Reply::Hang).await;
    let silent = webhook(&silent.url("/"), "");
    found(&setup, &silent, "error", "webhook-connect", "no answer within 2s").await;
    let unknown = webhook("https://no-such-host.invalid/", "");
    found(&setup, &unknown, "error", "webhook-connect", "no-such-host").await;

    let receiver = Receiver::start().await;
    // An address in the url is a bad configuration; a name is looked up.
    let named = format!("http://localhost:{}/", receiver.port());
    let named = webhook(&named, "refuse_private = true");
    found(&setup, &named, "error", "webhook-private", "loopback").await;
    assert_eq!(receiver.connections(), 0);

    // Nobody is there (RFC 5737); that it would go in the clear and unsigned is told as well.
    let open = webhook("http://192.0.2.1/", "").replace("\"2s\"", "\"500ms\"");
    let said = found(&setup, &open, "error", "webhook-connect", "192.0.2.1").await;
    assert_eq!(said.the("warning", "webhook-plaintext").subject, "transport:crm");
    assert_eq!(said.the("warning", "webhook-unsigned").subject, "transport:crm");
}

async fn https(pair: &Pair) -> Receiver {
    let config = rustls::ServerConfig::builder_with_provider(pulsebus::tls::provider())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(
            pulsebus::tls::certificates("a certificate", &pair.cert).unwrap(),
            pulsebus::tls::private_key(&pair.key).unwrap(),
        )
        .unwrap();
    let tls = TlsAcceptor::from(Arc::new(config));
    Receiver::on(0, Some(tls), |_| Reply::status(204)).await
}

#[tokio::test]
async fn certificates_that_do_not_hold_are_errors() {
    let pki = Pki::new();
    let setup = Setup::new("");
    let to = |receiver: &Receiver, more: &str| {
        webhook(&format!("https://localhost:{}/", receiver.port()), more)
    };
    let ca = format!("tls = {{ ca_file = \"{}\" }}", pki.ca.display());
    let right = https(&pki.server()).await;
    let unknown = to(&right, "");
    let said = found(&setup, &unknown, "error", "webhook-tls", "unknown authority").await;
    assert!(said.the("error", "webhook-tls").mend.contains("tls.ca_file"));
    // What it says to do helps.
    setup.write(&to(&right, &ca));
    assert_eq!(checks_of(&setup.doctor().await), [""; 0]);
    let server = https(&pki.elsewhere()).await;
    found(&setup, &to(&server, &ca), "error", "webhook-tls", "another name").await;
    let server = https(&pki.expired()).await;
    found(&setup, &to(&server, &ca), "error", "webhook-tls", "expired").await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let plain = webhook(&format!("https://localhost:{port}/"), &ca);
    tokio::select! {
        _ = found(&setup, &plain, "error", "webhook-tls", "does not speak TLS") => {}
        () = says(&listener, "HTTP/1.1 400 Bad Request\r\n\r\n") => unreachable!(),
    }
}

fn search(field: &str) -> String {
    format!(
        "[handlers.search]\nkind = \"search\"\n[handlers.search.documents.LessonPublished]\n\
         id = \"/lesson_id\"\ntext = {{ {field} = \"/title\" }}\n"
    )
}

#[tokio::test]
async fn an_index_that_would_be_built_anew_is_told_and_left_alone() {
    let daemon = Daemon::start(&format!("max_connections = 100\n{}", search("title"))).await;
    daemon.ready().await;
    post(&daemon, lesson("1")).await;
    wait_until("the lesson is indexed", async || {
        (daemon.handler("search").await >= 1).then_some(())
    })
    .await;
    daemon.terminate().await;
    let config = daemon.folder.join("pulsebus.toml");
    let before = contents(&daemon.folder.join("data"));
    let index = before.keys().find(|path| path.ends_with("index/meta.json")).unwrap().clone();
    assert_eq!(doctor(&config, &[]).await.checks(), ["daemon-absent"]);

    let other = ["--set", "handlers.search.language=english"];
    let said = doctor(&config, &other).await;
    assert_eq!(said.the("warning", "search-mapping").subject, "handler:search");
    assert_eq!(said.code, 0);
    assert!(contents(&daemon.folder.join("data")) == before, "doctor has changed a file");

    let lock = File::open(index.parent().unwrap().with_file_name("lock")).unwrap();
    lock.try_lock().unwrap();
    let said = doctor(&config, &[]).await;
    assert_eq!(said.the("warning", "search-locked").subject, "handler:search");
    drop(lock);
    assert!(!doctor(&config, &[]).await.has("search-locked"));

    let mut meta = before[&index].clone();
    let middle = meta.len() / 2;
    meta[middle] ^= 1;
    fs::write(&index, meta).unwrap();
    assert_eq!(
        doctor(&config, &[]).await.the("warning", "search-damaged").subject,
        "handler:search"
    );
}

#[tokio::test]
async fn what_a_running_daemon_waits_for_is_told() {
    let receiver = Receiver::ruled(|_| Reply::status(422)).await;
    let config = format!("max_connections = 100\n{}", webhook(&receiver.url("/"), ""));
    let daemon = Daemon::start(&config).await;
    daemon.ready().await;
    let config = daemon.folder.join("pulsebus.toml");
    // One that the receiver refuses, and one that is no event.
    post(&daemon, lesson("1")).await;
    let answer = http().post(daemon.url("/v1/events")).body(r#"{"specversion":"1.0"}"#);
    answer.send().await.unwrap();
    let said = wait_until("both are told", async || {
        let said = doctor(&config, &[]).await;
        (said.has("daemon-dead-letters") && said.has("daemon-quarantine")).then_some(said)
    })
    .await;
    let dead = said.the("warning", "daemon-dead-letters");
    assert_eq!(dead.subject, "handler:to-crm");
    assert!(dead.mend.contains("pulsebus dead-letters retry --handler to-crm"), "{dead:?}");
    assert_eq!(said.the("warning", "daemon-quarantine").subject, "daemon");
    assert_eq!(said.code, 0);
    assert_eq!(doctor(&config, &["--strict"]).await.code, 1);

    // The receiver goes away: the handler waits, and says so.
    receiver.rule(|_| Reply::Cut);
    post(&daemon, json!({ "type": "T", "id": "2", "data": 1 })).await;
    let said = wait_until("the handler is told", async || {
        let said = doctor(&config, &[]).await;
        said.has("daemon-component").then_some(said)
    })
    .await;
    let finding = said.the("warning", "daemon-component");
    assert_eq!(finding.subject, "handler:to-crm");
    assert!(finding.what.contains("unavailable"), "{finding:?}");
    said.the("error", "webhook-connect");
}

#[tokio::test]
async fn a_daemon_that_refuses_us_and_one_that_is_none_are_told() {
    let daemon = Daemon::start("max_connections = 100\ntoken = \"one\"").await;
    let config = daemon.folder.join("pulsebus.toml");
    daemon.ready().await;
    assert_eq!(doctor(&config, &[]).await.checks(), [""; 0]);
    let said = doctor(&config, &["--set", "http.token=two"]).await;
    assert_eq!(said.the("warning", "daemon-refused").subject, "daemon");
    daemon.kill();

    let other = TcpListener::bind(daemon.address()).await.unwrap();
    let hi = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nhi";
    for said in [hi, "220 mail.example ESMTP\r\n"] {
        let found = tokio::select! {
            found = doctor(&config, &[]) => found,
            () = says(&other, said) => unreachable!(),
        };
        assert_eq!(found.the("error", "daemon-strange").subject, "daemon");
        assert_eq!(found.code, 1);
    }
}

/// Says this to whoever has said something.
async fn says(listener: &TcpListener, text: &str) {
    loop {
        let (mut stream, _) = listener.accept().await.unwrap();
        let _ = stream.read(&mut [0; 4_096]).await;
        let _ = stream.write_all(text.as_bytes()).await;
    }
}
