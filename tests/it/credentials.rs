//! Logging in to NATS in each of its ways, and secrets that nobody may read.

use std::path::{Path, PathBuf};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD as BASE64};
use nkeys::KeyPair;
use pulsebus::{
    secret::Secret,
    store::{
        EventStore as _,
        postgres::{PostgresOptions, PostgresStore},
    },
    transport::{
        PublishError, Room, SourceState, Transport as _,
        amqp::{AmqpOptions, AmqpTransport},
        nats::{NatsOptions, NatsTransport},
    },
};
use serde_json::{Value, json};

use crate::{
    conformance::transport::until_state,
    support::{
        daemon::{BINARY, Daemon, pulsebus},
        free_port,
        nats::NatsServer,
        postgres::PostgresServer,
        process, rabbit, wait_until,
    },
    tls::{nats, nats_source, there_and_back},
};

fn options(server: &NatsServer) -> NatsOptions {
    NatsOptions { url: Secret::Inline(server.url()), ..NatsOptions::default() }
}

pub(crate) fn configured(folder: &Path, text: &str) -> NatsServer {
    let file = folder.join("nats.conf");
    std::fs::write(&file, text).unwrap();
    NatsServer::start_with(&["-c", file.to_str().unwrap()])
}

async fn refused(options: NatsOptions, words: &[&str]) {
    let error = nats(options).await.unwrap_err().to_string();
    for word in words {
        assert!(error.contains(word), "{word}: {error}");
    }
}

/// A token as NATS signs them: `ed25519-nkey`.
fn jwt(issuer: &KeyPair, subject: &KeyPair, nats: &Value) -> String {
    let part = |value: &Value| BASE64.encode(value.to_string());
    let claims = json!({
        "jti": "test", "iat": 1_700_000_000, "name": "test",
        "iss": issuer.public_key(), "sub": subject.public_key(), "nats": nats,
    });
    let signed =
        format!("{}.{}", part(&json!({"typ": "JWT", "alg": "ed25519-nkey"})), part(&claims));
    let signature = issuer.sign(signed.as_bytes()).unwrap();
    format!("{signed}.{}", BASE64.encode(signature))
}

/// A credentials file of a user.
fn credentials(folder: &Path, name: &str, account: &KeyPair, user: &KeyPair) -> PathBuf {
    let claims = json!({
        "pub": {}, "sub": {}, "subs": -1, "data": -1, "payload": -1, "type": "user", "version": 2,
    });
    let file = folder.join(name);
    let text = format!(
        "-----BEGIN NATS USER JWT-----\n{}\n------END NATS USER JWT------\n\n\
         -----BEGIN USER NKEY SEED-----\n{}\n------END USER NKEY SEED------\n",
        jwt(account, user, &claims),
        user.seed().unwrap()
    );
    std::fs::write(&file, text).unwrap();
    file
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nats_with_a_credentials_file() {
    let folder = process::folder("creds");
    let operator = KeyPair::new_operator();
    let (account, system) = (KeyPair::new_account(), KeyPair::new_account());
    let claims = |storage: i64| {
        let limits = json!({
            "subs": -1, "data": -1, "payload": -1, "imports": -1, "exports": -1,
            "wildcards": true, "conn": -1, "leaf": -1, "mem_storage": storage,
            "disk_storage": storage, "streams": storage, "consumer": storage,
        });
        json!({
            "limits": limits, "default_permissions": {"pub": {}, "sub": {}}, "type": "account",
            "version": 2,
        })
    };
    let operator_jwt = jwt(&operator, &operator, &json!({"type": "operator", "version": 2}));
    let server = configured(
        &folder,
        &format!(
            "operator: {operator_jwt}\nsystem_account: {}\nresolver: MEMORY\n\
             resolver_preload: {{ {}: {}, {}: {} }}\n",
            system.public_key(),
            account.public_key(),
            jwt(&operator, &account, &claims(-1)),
            system.public_key(),
            // It may not have JetStream.
            jwt(&operator, &system, &claims(0))
        ),
    );
    let file = credentials(&folder, "user.creds", &account, &KeyPair::new_user());
    let with =
        |file: &Path| NatsOptions { credentials_file: Some(file.to_owned()), ..options(&server) };
    nats(with(&file)).await.unwrap();
    // Of an account that the server does not know.
    let foreign =
        credentials(&folder, "foreign.creds", &KeyPair::new_account(), &KeyPair::new_user());
    refused(with(&foreign), &["refused the credentials", "foreign.creds"]).await;
    // Put in order again, the same options work: the file is read at each connection.
    std::fs::copy(&file, &foreign).unwrap();
    nats(with(&foreign)).await.unwrap();
    refused(with(&folder.join("none.creds")), &["none.creds"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nats_with_an_nkey() {
    let folder = process::folder("nkey");
    let user = KeyPair::new_user();
    let server = configured(
        &folder,
        &format!("authorization {{ users = [ {{ nkey: {} }} ] }}\n", user.public_key()),
    );
    let seed = folder.join("seed");
    std::fs::write(&seed, format!("{}\n", user.seed().unwrap())).unwrap();
    let with = |nkey| NatsOptions { nkey: Some(nkey), ..options(&server) };
    nats(with(Secret::File(seed))).await.unwrap();
    let other = KeyPair::new_user().seed().unwrap();
    let error = nats(with(Secret::Inline(other.clone()))).await.unwrap_err().to_string();
    assert!(error.contains("refused the credentials") && !error.contains(&other), "{error}");
    refused(options(&server), &["refused"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nats_with_a_token() {
    let server = NatsServer::start_with(&["--auth", "t0ken"]);
    let with = |token: &str| NatsOptions {
        token: Some(Secret::Inline(token.to_owned())),
        ..options(&server)
    };
    nats(with("t0ken")).await.unwrap();
    let error = nats(with("wr0ng")).await.unwrap_err().to_string();
    assert!(error.contains("refused the credentials") && !error.contains("wr0ng"), "{error}");
    // In the URL, in a file that changes.
    let file = process::folder("url").join("url");
    let url = |token: &str| format!("nats://{token}@127.0.0.1:{}\n", server.port());
    std::fs::write(&file, url("wr0ng")).unwrap();
    let by_file = NatsOptions { url: Secret::File(file.clone()), ..NatsOptions::default() };
    refused(by_file.clone(), &["refused the credentials"]).await;
    std::fs::write(&file, url("t0ken")).unwrap();
    nats(by_file).await.unwrap();
}

/// A source that is open finds the server with another password, and then the file.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn G8_a_nats_source_comes_back_with_a_rotated_url() {
    let folder = process::folder("rotated");
    let users = |password: &str| format!("authorization {{ user: pulse, password: {password} }}\n");
    let mut server = configured(&folder, &users("one"));
    let file = folder.join("url");
    let url = |port: u16, password: &str| format!("nats://pulse:{password}@127.0.0.1:{port}\n");
    std::fs::write(&file, url(server.port(), "one")).unwrap();
    let by_file = NatsOptions { url: Secret::File(file.clone()), ..NatsOptions::default() };
    let mut spec = nats_source("S");
    let reporter = spec.reporter.clone();
    spec.name = "rotated".into();
    let mut consumer = NatsTransport::new(by_file).consumer(spec).await.unwrap();
    let rotating = async {
        until_state(&reporter, "open", |state| *state == SourceState::Consuming).await;
        std::fs::write(folder.join("nats.conf"), users("two")).unwrap();
        server.restart();
        until_state(&reporter, "refused", |state| {
            state.reason().is_some_and(|text| text.contains("refused the credentials"))
        })
        .await;
        std::fs::write(&file, url(server.port(), "two")).unwrap();
        until_state(&reporter, "back", |state| *state == SourceState::Consuming).await;
    };
    tokio::select! {
        () = rotating => {}
        deliveries = consumer.next(Room { messages: 1, bytes: 1 }) => panic!("{deliveries:?}"),
    }
}

/// A password is changed in the database and then in the file, while the store is in use.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn G8_a_rotated_password_of_postgres_is_picked_up() {
    let server = PostgresServer::start_with_passwords().await;
    let file = process::folder("rotated").join("url");
    let url = |password: &str| server.url_of(&format!("pulse:{password}"));
    std::fs::write(&file, format!("{}\n", url("one"))).unwrap();
    let options = PostgresOptions::new(Secret::File(file.clone()));
    let store = PostgresStore::connect(options).await.unwrap();
    store.head().await.unwrap();
    server.execute("ALTER ROLE pulse PASSWORD 'two'").await;
    let ends = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'pulse'";
    server.execute(ends).await;
    wait_until("the old password is refused", async || store.head().await.err()).await;
    std::fs::write(&file, url("two")).unwrap();
    wait_until("the new one is used", async || store.head().await.ok()).await;
    store.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn G8_a_rotated_password_of_rabbitmq_is_picked_up() {
    let vhost = rabbit::vhost().await;
    let file = process::folder("rotated").join("password");
    std::fs::write(&file, "wr0ng\n").unwrap();
    let url = vhost.uri.replace("guest:guest", "guest");
    let options = AmqpOptions {
        password: Some(Secret::File(file.clone())),
        ..crate::tls::amqp_options(url, None)
    };
    let transport = AmqpTransport::new(options).unwrap();
    let source = || crate::tls::amqp_source("rotated");
    let message = || crate::tls::outbound("rotated", Some(""));
    let error = there_and_back(&transport, source(), message()).await.unwrap_err().to_string();
    assert!(error.contains("password") && !error.contains("wr0ng"), "{error}");
    // A publisher that was opened with the wrong one goes on by itself with the right one.
    let publisher = transport.publisher().await.unwrap();
    let refused = publisher.publish(vec![message()]).await;
    assert!(matches!(refused[..], [Err(PublishError::Unavailable(_))]), "{refused:?}");
    std::fs::write(&file, "guest\n").unwrap();
    there_and_back(&transport, source(), message()).await.unwrap();
    wait_until("the publisher is back", async || {
        publisher.publish(vec![message()]).await[0].is_ok().then_some(())
    })
    .await;
    publisher.close().await;
}

/// The store's URL, where the database refuses it and where there is none.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_secret_of_the_store_is_shown_where_it_refuses_or_is_away() {
    let server = PostgresServer::start_with_passwords().await;
    let refusing = server.url_of("pulse:CANARY-store");
    let away = format!("postgres://pulse:CANARY-store@127.0.0.1:{}/d", free_port());
    for url in [refusing.clone(), format!("{refusing}?sslmode=verify-full"), away] {
        let (folder, port) = (process::folder("store"), free_port());
        let file = folder.join("pulsebus.toml");
        let config = format!(
            "data_dir = \"{}\"\n[http]\nlisten = \"127.0.0.1:{port}\"\n\
             [log]\nfilter = \"trace,sqlx=trace\"\n[store]\nurl = \"{url}\"\n",
            folder.join("data").display()
        );
        std::fs::write(&file, config).unwrap();
        let log = std::fs::File::create(folder.join("log")).unwrap();
        let mut child = process::spawn(Path::new(BINARY), |command| {
            command.arg("--config").arg(&file).stdout(log.try_clone().unwrap()).stderr(log);
        });
        let client = crate::support::daemon::http();
        let ready = format!("http://127.0.0.1:{port}/readyz");
        let mut shown = wait_until("it says why", async || {
            if child.try_wait().unwrap().is_some() {
                // A refused login is for a person to mend: it has ended, and its log says so.
                return Some(String::new());
            }
            let said = client.get(&ready).send().await.ok()?.text().await.ok()?;
            said.contains("at 127.0.0.1:").then_some(said)
        })
        .await;
        let _ = child.kill();
        let _ = child.wait();
        shown.push_str(&std::fs::read_to_string(folder.join("log")).unwrap());
        let output = pulsebus(|run| {
            run.args(["config", "show", "--config"]).arg(&file);
        })
        .await;
        shown.push_str(&String::from_utf8(output.stdout).unwrap());
        assert!(shown.contains("127.0.0.1") && !shown.contains("CANARY"), "{shown}");
        assert!(!shown.contains("67, 65, 78, 65, 82, 89"), "{shown}");
    }
}

/// Every secret a daemon can have, all of them wrong or of no use, with everything logged: each
/// driver is off or quiet unless the filter names it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_secret_is_shown_anywhere() {
    let nats = NatsServer::start_with(&["--user", "pulse", "--pass", "right"]);
    let rabbit = rabbit::vhost().await;
    let away = free_port();
    let seed = KeyPair::new_user().seed().unwrap();
    let config = format!(
        r#"
token = "CANARY-http-token"
[log]
filter = "trace,lapin=trace,async_nats=trace,sqlx=trace,hyper=trace,rustls=trace,h2=trace,tantivy=trace"
[transports.by-url]
kind = "nats"
url = "nats://pulse:CANARY-nats-url@127.0.0.1:{nats}"
[transports.by-password]
kind = "nats"
url = "nats://127.0.0.1:{nats}"
user = "pulse"
password = "CANARY-nats-password"
[transports.by-token]
kind = "nats"
url = "nats://127.0.0.1:{nats}"
token = "CANARY-nats-token"
[transports.by-nkey]
kind = "nats"
url = "nats://127.0.0.1:{nats}"
nkey = "{seed}"
[transports.rabbit]
kind = "amqp"
url = "amqp://pulse:CANARY-amqp-url@{rabbit}/%2f"
[transports.rabbit-away]
kind = "amqp"
url = "amqp://pulse@127.0.0.1:{away}/%2f"
password = "CANARY-amqp-password"
[transports.crm]
kind = "http"
url = "http://me:CANARY-webhook-login@127.0.0.1:{away}/CANARY-webhook-path?k=CANARY-webhook-query"
secret = "whsec_Q0FOQVJZLXdlYmhvb2stc2VjcmV0LXNlY3JldA=="
[transports.erp]
kind = "http"
url = "http://127.0.0.1:{away}/CANARY-webhook-path?k=CANARY-webhook-query"
token = "CANARY-webhook-token"
[sources.a]
transport = "by-url"
stream = "S"
[sources.b]
transport = "by-password"
stream = "S"
[sources.c]
transport = "by-token"
stream = "S"
[sources.d]
transport = "by-nkey"
stream = "S"
[sources.e]
transport = "rabbit"
queue = "q"
[sources.f]
transport = "rabbit-away"
queue = "q"
[handlers.crm]
kind = "forward"
transport = "crm"
path = "/{{type}}"
[handlers.erp]
kind = "forward"
transport = "erp"
[handlers.to-nats]
kind = "forward"
transport = "by-url"
subject = "s"
[handlers.to-rabbit]
kind = "forward"
transport = "rabbit"
exchange = ""
"#,
        nats = nats.port(),
        rabbit = rabbit.address,
    );
    let daemon = Daemon::start(&config).await;
    let client = crate::support::daemon::http();
    let get = async |path: &str| {
        let request = client.get(daemon.url(path)).bearer_auth("CANARY-http-token");
        request.send().await.unwrap().text().await.unwrap()
    };
    let event = json!({"id": "1", "type": "T", "data": 1});
    // A daemon asks for its token before its bus is up, and then answers 503 to those who have it.
    wait_until("an event is taken", async || {
        let posting = client.post(daemon.url("/v1/events")).bearer_auth("CANARY-http-token");
        posting.json(&event).send().await.ok()?.status().is_success().then_some(())
    })
    .await;
    // Everything that can fail has failed, and says so.
    wait_until("all of it has failed", async || {
        let ready: Value = serde_json::from_str(&get("/readyz").await).ok()?;
        let sources: Value = serde_json::from_str(&get("/v1/sources").await).ok()?;
        let handlers: Value = serde_json::from_str(&get("/v1/handlers").await).ok()?;
        let reasons = |of: &Value, list: &str| {
            of[list].as_array().unwrap().iter().filter(|x| x["reason"].is_string()).count()
        };
        let (s, h) = (reasons(&sources, "sources"), reasons(&handlers, "handlers"));
        (ready.is_object() && s >= 6 && h >= 4).then_some(())
    })
    .await;
    let mut shown = String::new();
    for path in ["/readyz", "/healthz", "/metrics", "/v1/sources", "/v1/handlers", "/v1/events"] {
        shown.push_str(&get(path).await);
    }
    let file = daemon.folder.join("pulsebus.toml");
    for command in [&["config", "show"][..], &["check"], &["config", "show", "--json"]] {
        let output = pulsebus(|run| {
            run.args(command).arg("--config").arg(&file);
        })
        .await;
        shown.push_str(&String::from_utf8(output.stdout).unwrap());
        shown.push_str(&String::from_utf8(output.stderr).unwrap());
    }
    // A file with mistakes, so that errors speak of what stands beside the secrets.
    let text = std::fs::read_to_string(&file).unwrap();
    let wrong = daemon.folder.join("wrong.toml");
    let text = text.replace("kind = \"amqp\"\nurl = \"amqp:", "kind = \"amqp\"\nurl = \"ampq:");
    std::fs::write(&wrong, format!("{text}\nunknown = 1\n")).unwrap();
    let output = pulsebus(|run| {
        run.arg("check").arg("--config").arg(&wrong);
    })
    .await;
    assert!(!output.status.success());
    shown.push_str(&String::from_utf8(output.stderr).unwrap());
    shown.push_str(&daemon.log());
    // As bytes, too: so lapin writes a login.
    for secret in ["CANARY", &*seed, "Q0FOQVJZ", "67, 65, 78, 65, 82, 89"] {
        let at = shown.find(secret);
        let around = at.map(|at| {
            let from = shown.floor_char_boundary(at.saturating_sub(300));
            &shown[from..shown.ceil_char_boundary(at + 80)]
        });
        assert_eq!(around, None, "{secret} is shown");
    }
}
