//! Webhooks: the publishing half of the transport contract, and what receivers do.

use std::{
    path::Path,
    sync::{Arc, Mutex},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use pulsebus::{
    event::Headers,
    secret::Secret,
    tls::TlsOptions,
    transport::{
        Outbound, PublishError, Publisher, Transport as _,
        http::{WebhookOptions, WebhookTransport},
    },
};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{self, pki_types::pem::PemObject as _},
};

use crate::support::{
    PATIENCE, daemon, free_port, process,
    receiver::{Receiver, Reply, Seen},
    wait_until,
};

const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
const OTHER: &str = "whsec_AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=";

fn inline(text: &str) -> Secret {
    Secret::Inline(text.to_owned())
}

fn options(url: &str) -> WebhookOptions {
    WebhookOptions { timeout: Duration::from_secs(20), ..WebhookOptions::new(inline(url)) }
}

/// Gives up on an answer soon.
fn hasty(url: &str) -> WebhookOptions {
    WebhookOptions { timeout: Duration::from_secs(1), ..options(url) }
}

async fn publisher(options: WebhookOptions) -> Arc<dyn Publisher> {
    WebhookTransport::new(options).unwrap().publisher().await.unwrap().into()
}

fn message(id: &str) -> Outbound {
    Outbound {
        id: id.into(),
        address: "".into(),
        exchange: None,
        headers: Headers::new(),
        body: format!("{{\"id\": \"{id}\"}}").into(),
    }
}

fn to(id: &str, address: &str) -> Outbound {
    Outbound { address: address.into(), ..message(id) }
}

async fn publish(publisher: &dyn Publisher, id: &str) -> Result<(), PublishError> {
    let results = tokio::time::timeout(PATIENCE, publisher.publish(vec![message(id)])).await;
    let mut results = results.expect("an outcome within a bounded time");
    assert_eq!(results.len(), 1);
    results.remove(0)
}

fn ids(seen: &[Seen]) -> Vec<&str> {
    seen.iter().map(Seen::id).collect()
}

fn unavailable(result: Result<(), PublishError>) -> String {
    match result {
        Err(PublishError::Unavailable(reason)) => reason,
        other => panic!("not unavailable: {other:?}"),
    }
}

fn failed(result: Result<(), PublishError>) -> String {
    match result {
        Err(PublishError::Failed(reason)) => reason,
        other => panic!("not failed: {other:?}"),
    }
}

#[tokio::test]
async fn P1_what_is_confirmed_has_been_received_as_it_is() {
    let receiver = Receiver::start().await;
    let publisher = publisher(WebhookOptions {
        secret: Some(inline(SECRET)),
        token: Some(inline("a-token")),
        ..options(&receiver.url("/hooks?k=v"))
    })
    .await;
    let mut sent = to("EDUPULSE:7", "/lessons/LessonPublished");
    sent.body = "{ \"n\":1e400, \"s\" : \"é\" }".into();
    sent.headers.push("Content-Type", "application/cloudevents+json");
    sent.headers.push("Traceparent", "00-1-2-03");
    sent.headers.push("Authorization", "Bearer somebody-else's");
    sent.headers.push("Webhook-Signature", "v1,forged");
    sent.headers.push("Host", "evil.example");
    assert_eq!(publisher.publish(vec![sent]).await, [Ok(())]);
    let seen = receiver.seen().remove(0);
    assert_eq!(seen.path, "/hooks/lessons/LessonPublished?k=v");
    assert_eq!(seen.body, "{ \"n\":1e400, \"s\" : \"é\" }");
    assert_eq!(seen.id(), "EDUPULSE:7");
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    let at: u64 = seen.header("webhook-timestamp").unwrap().parse().unwrap();
    assert!(at.abs_diff(now) < 60, "{at}");
    assert!(seen.header("webhook-signature").unwrap().starts_with("v1,"));
    assert_ne!(seen.header("webhook-signature"), Some("v1,forged"));
    assert_eq!(seen.header("content-type"), Some("application/cloudevents+json"));
    assert_eq!(seen.header("authorization"), Some("Bearer a-token"));
    assert_eq!(seen.header("traceparent"), Some("00-1-2-03"));
    assert_eq!(seen.header("host"), Some(&*format!("127.0.0.1:{}", receiver.port())));
    let agent = concat!("pulsebus/", env!("CARGO_PKG_VERSION"));
    assert_eq!(seen.header("user-agent"), Some(agent));
}

#[tokio::test]
async fn a_login_in_the_url_is_basic_authentication_and_without_a_secret_nothing_is_signed() {
    let receiver = Receiver::start().await;
    let url = format!("http://bus:p%40ss@127.0.0.1:{}/x", receiver.port());
    let publisher = publisher(options(&url)).await;
    assert_eq!(publish(&*publisher, "1").await, Ok(()));
    let seen = receiver.seen().remove(0);
    // bus:p@ss
    assert_eq!(seen.header("authorization"), Some("Basic YnVzOnBAc3M="));
    assert_eq!(seen.header("webhook-signature"), None);
    assert_eq!((seen.path.as_str(), seen.header("content-type")), ("/x", Some("application/json")));
}

#[tokio::test]
async fn P2_messages_are_sent_in_order_over_one_connection() {
    let receiver = Receiver::start().await;
    let publisher = publisher(options(&receiver.url("/"))).await;
    let names: Vec<String> = (0..200).map(|n| n.to_string()).collect();
    let together = names[..100].iter().map(|id| message(id)).collect();
    assert_eq!(publisher.publish(together).await, vec![Ok(()); 100]);
    for id in &names[100..] {
        assert_eq!(publish(&*publisher, id).await, Ok(()));
    }
    assert_eq!(ids(&receiver.seen()), names);
    assert_eq!(receiver.connections(), 1);
}

#[tokio::test]
async fn a_connection_is_used_again_after_an_answer_with_a_body() {
    let receiver = Receiver::ruled(|seen| match seen.id() {
        "bad" => Reply::with(422, "content-type: text/plain", &"no ".repeat(1_000)),
        _ => Reply::with(200, "content-type: text/plain", &"thanks ".repeat(1_000)),
    })
    .await;
    let publisher = publisher(options(&receiver.url("/"))).await;
    for n in 0..50 {
        assert_eq!(publish(&*publisher, &n.to_string()).await, Ok(()));
        assert!(matches!(publish(&*publisher, "bad").await, Err(PublishError::Refused(_))));
    }
    assert_eq!(receiver.connections(), 1);
}

#[tokio::test]
async fn P3_a_bad_message_fails_alone_with_what_the_receiver_said() {
    let receiver = Receiver::ruled(|seen| match seen.id() {
        "invalid" => Reply::with(
            422,
            "content-type: text/html",
            &format!(
                "<p>no\r\n\x1b[31m title: {} {}</p>{}",
                seen.path,
                "sEcReT-pa55",
                "x".repeat(5_000)
            ),
        ),
        "broken" => Reply::with(500, "x: y", "oops"),
        "unknown" => Reply::with(404, "x: y", &format!("Cannot POST {}", seen.path)),
        _ => Reply::status(200),
    })
    .await;
    let publisher = publisher(WebhookOptions {
        token: Some(inline("sEcReT-pa55")),
        ..options(&receiver.url("/services/T0-hidden"))
    })
    .await;
    let mut long_id = message("ok");
    long_id.headers.push("ce-x", "a\nb");
    let results = publisher
        .publish(vec![
            message("a"),
            message("invalid"),
            message("b"),
            message("broken"),
            message("unknown"),
            to("elsewhere", "/../admin"),
            to("query", "/a?b=c"),
            message(""),
            long_id,
            message("c"),
        ])
        .await;
    let said: Vec<String> = results
        .iter()
        .map(|result| match result {
            Ok(()) => "ok".to_owned(),
            Err(PublishError::Refused(why)) => format!("refused: {why}"),
            Err(PublishError::Failed(why)) => format!("failed: {why}"),
            other => panic!("{other:?}"),
        })
        .collect();
    let origin = receiver.url("");
    assert!(
        said[1].starts_with(&format!(
            "refused: {origin} answered 422 Unprocessable Entity: <p>no [31m title: … …</p>xxx"
        )),
        "{}",
        said[1]
    );
    assert!(said[1].ends_with('…') && said[1].len() < 450, "{}", said[1]);
    assert_eq!(said[3], format!("failed: {origin} answered 500 Internal Server Error: oops"));
    assert_eq!(said[4], format!("failed: {origin} answered 404 Not Found: Cannot POST …"));
    for refused in &said[5..9] {
        assert!(refused.starts_with("refused: "), "{refused}");
    }
    assert_eq!([&said[0], &said[2], &said[9]], ["ok"; 3]);
    assert_eq!(ids(&receiver.seen()), ["a", "invalid", "b", "broken", "unknown", "c"]);
    assert!(!format!("{said:?}").contains("hidden") && !format!("{said:?}").contains("pa55"));
}

#[tokio::test]
async fn P3_a_redirect_is_not_followed() {
    let other = Receiver::start().await;
    let location = format!("location: {}", other.url("/services/T0-hidden"));
    let receiver = Receiver::ruled(move |_| Reply::with(308, &location, "")).await;
    let publisher = publisher(options(&receiver.url("/"))).await;
    let why = failed(publish(&*publisher, "1").await);
    assert!(
        why.contains("308") && why.contains(&other.url("")) && why.contains("set the"),
        "{why}"
    );
    assert!(!why.contains("hidden"), "{why}");
    receiver.rule(|_| Reply::with(302, "location: /elsewhere", ""));
    let why = failed(publish(&*publisher, "1").await);
    assert!(why.contains("another path of the same host"), "{why}");
    assert_eq!((receiver.seen().len(), other.connections()), (2, 0));
}

#[tokio::test]
async fn a_receiver_that_asks_for_patience_or_has_gone_is_left_alone() {
    let receiver = Receiver::ruled(|_| Reply::with(429, "Retry-After: 7", "too many")).await;
    let url = process::folder("url").join("url");
    let moved = async |path: &str| std::fs::write(&url, receiver.url(path)).unwrap();
    moved("/a").await;
    let options = WebhookOptions::new(Secret::File(url.clone()));
    let publisher = publisher(options).await;
    let results = publisher.publish(vec![message("1"), message("2")]).await;
    let after = |result: &Result<(), PublishError>| match result {
        Err(PublishError::Later { reason, after }) => (reason.clone(), after.as_secs()),
        other => panic!("{other:?}"),
    };
    let (reason, seconds) = after(&results[0]);
    assert!(reason.contains("429 Too Many Requests: too many") && seconds == 7, "{results:?}");
    assert_eq!(results[0], results[1]);
    assert_eq!(receiver.seen().len(), 1, "what comes behind is not sent");
    receiver.rule(|_| Reply::with(503, "Retry-After: soon", ""));
    assert!(after(&publish(&*publisher, "1").await).1 < 7);
    assert_eq!(receiver.seen().len(), 1, "nor is anything else before the time");
    let said = wait_until("the time is over", async || {
        let result = publish(&*publisher, "1").await;
        (!matches!(result, Err(PublishError::Later { .. }))).then_some(result)
    })
    .await;
    unavailable(said);
    let seen = receiver.seen();
    assert!(seen[1].at - seen[0].at >= Duration::from_secs(7));
    receiver.rule(|_| Reply::status(410));
    let (reason, seconds) = after(&publish(&*publisher, "1").await);
    assert!(reason.contains("does not want") && seconds == 3_600, "{reason}");
    // Whom it concerns has given another URL.
    receiver.rule(|_| Reply::status(200));
    moved("/b").await;
    wait_until("it is sent there", async || publish(&*publisher, "1").await.ok()).await;
    assert_eq!(receiver.seen().last().unwrap().path, "/b");
}

#[tokio::test]
async fn P5_a_connection_that_ends_before_an_answer_leaves_the_outcome_unknown() {
    let receiver = Receiver::ruled(|_| Reply::Cut).await;
    let publisher = publisher(options(&receiver.url("/"))).await;
    let results = publisher.publish(vec![message("1"), message("2")]).await;
    let reason = unavailable(results[0].clone());
    assert!(reason.contains("before an answer came"), "{reason}");
    assert_eq!(results[0], results[1]);
    receiver.rule(|_| Reply::status(200));
    assert_eq!(publish(&*publisher, "1").await, Ok(()));
    assert_eq!(ids(&receiver.seen()), ["1", "1"], "the same id tells");
}

#[tokio::test]
async fn P5_one_message_that_gets_no_answer_is_told_from_a_receiver_that_hangs() {
    let receiver = Receiver::ruled(|_| Reply::Hang).await;
    let publisher = publisher(hasty(&receiver.url("/"))).await;
    // An outage: however long it takes, no message is to blame.
    for id in ["poison", "a", "poison", "b", "poison"] {
        let reason = unavailable(publish(&*publisher, id).await);
        assert!(reason.contains("did not answer within 1s"), "{reason}");
    }
    receiver.rule(|seen| if seen.id() == "poison" { Reply::Hang } else { Reply::status(200) });
    assert_eq!(publish(&*publisher, "a").await, Ok(()));
    let why = failed(publish(&*publisher, "poison").await);
    assert!(why.contains("while it answers others"), "{why}");
    // Others have success while it waits.
    let poison = publish(&*publisher, "poison");
    tokio::pin!(poison);
    let mut n = 0;
    let result = loop {
        n += 1;
        let name = n.to_string();
        tokio::select! {
            result = &mut poison => break result,
            result = publish(&*publisher, &name) => assert_eq!(result, Ok(())),
        }
    };
    failed(result);
}

#[tokio::test]
async fn P6_nobody_listens_is_said_at_once_and_it_works_again_by_itself() {
    let port = free_port();
    let publisher = publisher(options(&format!("http://127.0.0.1:{port}/x/hidden"))).await;
    let began = Instant::now();
    let reason = unavailable(publish(&*publisher, "1").await);
    assert!(began.elapsed() < Duration::from_secs(10));
    assert!(
        reason.contains(&format!("cannot connect to http://127.0.0.1:{port}: Connection refused")),
        "{reason}"
    );
    assert!(!reason.contains("hidden"), "{reason}");
    let receiver = Receiver::on(port, None, |_| Reply::status(200)).await;
    assert_eq!(publish(&*publisher, "1").await, Ok(()));
    drop(receiver);
    unavailable(publish(&*publisher, "2").await);
    let _receiver = Receiver::on(port, None, |_| Reply::status(200)).await;
    assert_eq!(publish(&*publisher, "2").await, Ok(()));
    publisher.close().await;
    assert!(unavailable(publish(&*publisher, "3").await).contains("closed"));
}

#[tokio::test]
async fn P6_a_host_without_an_address_is_unavailable() {
    let publisher = publisher(options("https://pulsebus.invalid/hidden")).await;
    let reason = unavailable(publish(&*publisher, "1").await);
    assert!(reason.contains("cannot connect to https://pulsebus.invalid: "), "{reason}");
    assert!(!reason.contains("hidden"), "{reason}");
}

#[tokio::test]
async fn an_answer_without_an_end_holds_nothing_up_and_fills_no_memory() {
    let receiver = Receiver::ruled(|seen| match seen.id() {
        "taken" => Reply::Endless(200),
        "broken" => Reply::Endless(500),
        _ => Reply::Dribble,
    })
    .await;
    let publisher = publisher(hasty(&receiver.url("/"))).await;
    assert_eq!(publish(&*publisher, "taken").await, Ok(()));
    let why = failed(publish(&*publisher, "broken").await);
    assert!(why.contains("moremoremore") && why.len() < 500, "{why}");
    // A head of more lines than a client reads, or that takes too long: no answer.
    let began = Instant::now();
    let results = publisher.publish(vec![message("dribble")]).await;
    assert!(matches!(results[0], Err(PublishError::Unavailable(_) | PublishError::Failed(_))));
    assert!(began.elapsed() < Duration::from_secs(10));
}

#[tokio::test]
async fn private_addresses_are_refused_when_dialling() {
    let receiver = Receiver::start().await;
    let port = receiver.port();
    for host in ["127.0.0.1", "localhost", "2130706433", "[::ffff:127.0.0.1]", "user:pw@127.1"] {
        let publisher = publisher(WebhookOptions {
            refuse_private: true,
            ..options(&format!("http://{host}:{port}/hidden"))
        })
        .await;
        let reason = unavailable(publish(&*publisher, "1").await);
        assert!(
            reason.contains("loopback") && reason.contains("refuse_private"),
            "{host}: {reason}"
        );
        assert!(!reason.contains("hidden") && !reason.contains("pw"), "{reason}");
    }
    assert_eq!(receiver.connections(), 0);
    let allowed = publisher(options(&format!("http://localhost:{port}/"))).await;
    assert_eq!(publish(&*allowed, "1").await, Ok(()));
}

#[tokio::test]
async fn a_batch_is_one_request_and_a_bad_one_in_it_fails_alone() {
    let receiver = Receiver::ruled(|seen| {
        let bad = seen.body.contains("bad");
        Reply::status(if bad { 400 } else { 200 })
    })
    .await;
    let url = receiver.url("/in");
    let publisher = publisher(WebhookOptions { batch: 3, ..options(&url) }).await;
    let all = |names: &[&str]| names.iter().map(|id| message(id)).collect::<Vec<_>>();
    let results = publisher.publish(all(&["1", "2", "3", "4"])).await;
    assert_eq!(results, vec![Ok(()); 4]);
    let results = publisher.publish(all(&["5", "bad", "6"])).await;
    assert!(matches!(&results[..], [Ok(()), Err(PublishError::Refused(_)), Ok(())]), "{results:?}");
    let seen = receiver.seen();
    let bodies: Vec<&str> = seen.iter().map(|seen| &*seen.body).collect();
    assert_eq!(
        bodies,
        [
            r#"[{"id": "1"},{"id": "2"},{"id": "3"}]"#,
            r#"[{"id": "4"}]"#,
            r#"[{"id": "5"},{"id": "bad"},{"id": "6"}]"#,
            r#"[{"id": "5"}]"#,
            r#"[{"id": "bad"}]"#,
            r#"[{"id": "6"}]"#,
        ]
    );
    assert!(seen.iter().all(|seen| seen.id().starts_with("batch_")));
    assert_eq!(publisher.publish(all(&["1", "2", "3"])).await, vec![Ok(()); 3]);
    assert_eq!(receiver.seen()[6].id(), seen[0].id(), "the same events have the same id");

    // One that breaks the receiver does not cost its neighbours an attempt, and a receiver that
    // is broken is not asked for each.
    receiver.rule(|seen| Reply::status(if seen.body.contains("bad") { 500 } else { 200 }));
    let results = publisher.publish(all(&["7", "bad", "8"])).await;
    assert!(matches!(&results[..], [Ok(()), Err(PublishError::Failed(_)), Ok(())]), "{results:?}");
    receiver.rule(|_| Reply::status(500));
    let before = receiver.seen().len();
    let wide = WebhookOptions { batch: 100, ..options(&url) };
    let wide = WebhookTransport::new(wide).unwrap().publisher().await.unwrap();
    let results = wide.publish((0..100).map(|n| message(&n.to_string())).collect()).await;
    assert!(results.iter().all(|result| matches!(result, Err(PublishError::Failed(_)))));
    assert_eq!((results.len(), receiver.seen().len() - before), (100, 4));
}

#[tokio::test]
async fn rotated_files_are_picked_up() {
    let receiver = Receiver::start().await;
    let (first, second) = (receiver.url("/first"), receiver.url("/second"));
    let folder = process::folder("rotated");
    let write = |name: &str, text: &str| {
        std::fs::write(folder.join(name), text).unwrap();
    };
    write("url", &first);
    write("secret", SECRET);
    write("token", "old\n");
    let file = |name: &str| Secret::File(folder.join(name));
    let publisher = publisher(WebhookOptions {
        secret: Some(file("secret")),
        token: Some(file("token")),
        ..WebhookOptions::new(file("url"))
    })
    .await;
    assert_eq!(publish(&*publisher, "1").await, Ok(()));
    let signatures = |seen: &Seen| seen.header("webhook-signature").unwrap().split(' ').count();
    let seen = receiver.seen().remove(0);
    assert_eq!((&*seen.path, seen.header("authorization")), ("/first", Some("Bearer old")));
    assert_eq!(signatures(&seen), 1);
    write("url", &second);
    write("secret", &format!("{OTHER}\n{SECRET}\n"));
    write("token", "new\n");
    wait_until("what is in the files is used", async || {
        assert_eq!(publish(&*publisher, "2").await, Ok(()));
        let seen = receiver.seen().pop().unwrap();
        let new = seen.path == "/second" && seen.header("authorization") == Some("Bearer new");
        (new && signatures(&seen) == 2).then_some(())
    })
    .await;
    write("secret", "whsec_hunter2");
    let reason = wait_until("a secret that is none is said", async || {
        publish(&*publisher, "3").await.err().map(|error| unavailable(Err(error)))
    })
    .await;
    assert!(reason.contains("the signing secret") && !reason.contains("hunter2"), "{reason}");
    std::fs::remove_file(folder.join("secret")).unwrap();
    wait_until("a file that is gone is named", async || {
        let reason = unavailable(publish(&*publisher, "3").await);
        reason.contains(&*folder.join("secret").display().to_string()).then_some(())
    })
    .await;
    write("secret", OTHER);
    wait_until("it works again by itself", async || publish(&*publisher, "3").await.ok()).await;
}

/// A certificate authority, and the PEM of it.
fn authority() -> (rcgen::Issuer<'static, rcgen::KeyPair>, String) {
    let key = rcgen::KeyPair::generate().unwrap();
    let mut parameters = rcgen::CertificateParams::new(Vec::new()).unwrap();
    parameters.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let pem = parameters.self_signed(&key).unwrap().pem();
    (rcgen::Issuer::new(parameters, key), pem)
}

#[tokio::test]
async fn https_wants_a_certificate_of_a_known_authority_and_certificates_are_read_again() {
    let (issuer, ca) = authority();
    let (_, unrelated) = authority();
    let key = rcgen::KeyPair::generate().unwrap();
    let certificate = rcgen::CertificateParams::new(vec!["localhost".to_owned()])
        .unwrap()
        .signed_by(&key, &issuer)
        .unwrap();
    let private = rustls::pki_types::PrivateKeyDer::try_from(key.serialize_der()).unwrap();
    let server = rustls::ServerConfig::builder_with_provider(pulsebus::tls::provider())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate.der().clone()], private)
        .unwrap();
    let tls = TlsAcceptor::from(Arc::new(server));
    let receiver = Receiver::on(0, Some(tls), |_| Reply::status(200)).await;
    let url = format!("https://localhost:{}/hidden", receiver.port());

    let plain = publisher(options(&url)).await;
    let reason = unavailable(publish(&*plain, "1").await);
    assert!(reason.contains("tls.ca_file") && !reason.contains("hidden"), "{reason}");

    let file = process::folder("tls").join("ca.pem");
    std::fs::write(&file, &unrelated).unwrap();
    let tls = Some(TlsOptions { ca_file: Some(file.clone()), ..TlsOptions::default() });
    let private = publisher(WebhookOptions { tls: tls.clone(), ..options(&url) }).await;
    unavailable(publish(&*private, "1").await);
    std::fs::write(&file, format!("{unrelated}{ca}")).unwrap();
    wait_until("the new certificate counts", async || publish(&*private, "1").await.ok()).await;

    // Another name than the certificate's, and a server without TLS.
    let address = url.replace("localhost", "127.0.0.1");
    let other = publisher(WebhookOptions { tls: tls.clone(), ..options(&address) }).await;
    assert!(unavailable(publish(&*other, "1").await).contains("another name"));
    let open = Receiver::start().await;
    let url = format!("https://127.0.0.1:{}/", open.port());
    let other = publisher(WebhookOptions { tls, ..hasty(&url) }).await;
    unavailable(publish(&*other, "1").await);
    assert_eq!(open.seen().len(), 0, "https never becomes http");
}

#[tokio::test]
async fn a_client_certificate_is_presented_and_its_lack_is_explained() {
    let (issuer, ca) = authority();
    let signed = |name: &str| {
        let key = rcgen::KeyPair::generate().unwrap();
        let parameters = rcgen::CertificateParams::new(vec![name.to_owned()]).unwrap();
        (parameters.signed_by(&key, &issuer).unwrap(), key)
    };
    let (certificate, key) = signed("localhost");
    let mut roots = rustls::RootCertStore::empty();
    for root in rustls::pki_types::CertificateDer::pem_slice_iter(ca.as_bytes()) {
        roots.add(root.unwrap()).unwrap();
    }
    let clients = rustls::server::WebPkiClientVerifier::builder_with_provider(
        Arc::new(roots),
        pulsebus::tls::provider(),
    )
    .build()
    .unwrap();
    let private = rustls::pki_types::PrivateKeyDer::try_from(key.serialize_der()).unwrap();
    let server = rustls::ServerConfig::builder_with_provider(pulsebus::tls::provider())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_client_cert_verifier(clients)
        .with_single_cert(vec![certificate.der().clone()], private)
        .unwrap();
    let tls = TlsAcceptor::from(Arc::new(server));
    let receiver = Receiver::on(0, Some(tls), |_| Reply::status(200)).await;
    let url = format!("https://localhost:{}/", receiver.port());
    let folder = process::folder("mtls");
    let (client, client_key) = signed("pulsebus");
    let write = |name: &str, text: String| {
        let path = folder.join(name);
        std::fs::write(&path, text).unwrap();
        Some(path)
    };
    let mut tls = TlsOptions { ca_file: write("ca.pem", ca.clone()), ..TlsOptions::default() };
    let without = publisher(WebhookOptions { tls: Some(tls.clone()), ..options(&url) }).await;
    let reason = unavailable(publish(&*without, "1").await);
    assert!(reason.contains("client certificate"), "{reason}");
    tls.cert_file = write("client.pem", client.pem());
    tls.key_file = write("client.key", client_key.serialize_pem());
    let with = publisher(WebhookOptions { tls: Some(tls), ..options(&url) }).await;
    assert_eq!(publish(&*with, "1").await, Ok(()));
}

/// The Standard Webhooks library verifies what is sent; a process of its own.
struct Verifier {
    child: Mutex<std::process::Child>,
    url: String,
}

impl Verifier {
    async fn start(secrets: &[&str]) -> Self {
        let python = std::env::var_os("TEST_PULSEBUS_PYTHON")
            .expect("TEST_PULSEBUS_PYTHON: a python with standardwebhooks; tests/run sets it up");
        let script =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients/receive_webhooks.py");
        let port = free_port();
        let child = process::spawn(Path::new(&python), |command| {
            command.arg(script).arg(port.to_string()).args(secrets);
            command.env("PYTHONDONTWRITEBYTECODE", "1");
        });
        wait_until("the verifier listens", async || {
            tokio::net::TcpStream::connect(("127.0.0.1", port)).await.ok()
        })
        .await;
        Self { child: Mutex::new(child), url: format!("http://127.0.0.1:{port}/in") }
    }
}

impl Drop for Verifier {
    fn drop(&mut self) {
        let child = self.child.get_mut().unwrap();
        let _ = child.kill();
        let _ = child.wait();
    }
}

#[tokio::test]
async fn signatures_are_verified_by_the_standard_webhooks_library() {
    let verifier = Verifier::start(&[SECRET, OTHER]).await;
    let both = Some(inline(&format!("{SECRET} {OTHER}")));
    let signed = |secret| WebhookOptions { secret, ..options(&verifier.url) };
    let bodies = [
        "{}",
        "{ \"title\": \"Brüche – ½ 🎓\", \"n\":1e400 }",
        "\"\\u00e9\"",
        "[1,\t2]",
        "  {\"padded\": true}\n",
    ];
    let messages: Vec<Outbound> = bodies
        .iter()
        .zip(["EDUPULSE:1", "a.b.c", "with blanks ü%", "019a-uuid", "{}"])
        .map(|(body, id)| Outbound { body: (*body).into(), ..to(id, "/lessons/{x}") })
        .collect();
    let single = publisher(signed(both.clone())).await;
    assert_eq!(single.publish(messages.clone()).await, vec![Ok(()); 5]);
    let batch = publisher(WebhookOptions { batch: 10, ..signed(both) }).await;
    assert_eq!(batch.publish(messages).await, vec![Ok(()); 5]);

    // The library does refuse: one secret of two, none, and a body that was changed on its way.
    for secret in [None, Some(inline(SECRET))] {
        let other = publisher(signed(secret)).await;
        assert!(failed(publish(&*other, "1").await).contains("401"));
    }
    let witness = Receiver::start().await;
    let both = Some(inline(&format!("{SECRET} {OTHER}")));
    let recorded = publisher(WebhookOptions { secret: both, ..options(&witness.url("/")) }).await;
    assert_eq!(publish(&*recorded, "1").await, Ok(()));
    let seen = witness.seen().remove(0);
    let replay = async |body: String| {
        let mut request = daemon::http().post(&verifier.url).body(body);
        for name in ["webhook-id", "webhook-timestamp", "webhook-signature"] {
            request = request.header(name, seen.header(name).unwrap());
        }
        request.send().await.unwrap().status().as_u16()
    };
    assert_eq!(replay(seen.body.clone()).await, 204);
    assert_eq!(replay(seen.body.replace('1', "2")).await, 401);
}
