//! TLS with real servers: the right authority passes, and whatever is wrong is said.

use std::{
    path::{Path, PathBuf},
    process::Child,
    time::Duration,
};

use bytes::Bytes;
use pulsebus::{
    event::Headers,
    secret::Secret,
    store::{
        EventStore as _, StoreError,
        postgres::{PostgresOptions, PostgresStore},
    },
    tls::TlsOptions,
    transport::{
        Outbound, Reporter, SourceSpec, Transport, TransportError,
        amqp::{AmqpOptions, AmqpQueueCreate, AmqpSource, AmqpTransport},
        nats::{NatsOptions, NatsSource, NatsStreamCreate, NatsTransport},
    },
};

use crate::{
    conformance::transport::{hold, within},
    support::{
        PATIENCE,
        daemon::{BINARY, Daemon, pulsebus},
        nats::NatsServer,
        pki::{self, Pair, Pki},
        postgres::PostgresServer,
        process::{self, free_port},
        rabbit::RabbitNode,
        wait_until,
    },
};

const UNKNOWN: &str = "unknown authority";
const NAME: &str = "for another name";
const EXPIRED: &str = "has expired";
const PLAIN: &str = "does not speak TLS";
const CLIENT: &str = "client certificate";

/// Trusts this authority.
pub(crate) fn trusting(ca: &Path) -> TlsOptions {
    TlsOptions { ca_file: Some(ca.to_owned()), ..TlsOptions::default() }
}

/// And is this client.
fn being(client: &Pair, ca: &Path) -> TlsOptions {
    TlsOptions {
        cert_file: Some(client.cert.clone()),
        key_file: Some(client.key.clone()),
        ..trusting(ca)
    }
}

/// What is wrong on the way to a server: each with the word that must be said.
struct Cases {
    ca: Pki,
    other: Pki,
}

impl Cases {
    fn new() -> Self {
        Self { ca: Pki::new(), other: Pki::new() }
    }

    /// Certificates that a server may have, and what a client that trusts `ca` says.
    fn bad(&self) -> Vec<(Pair, &'static str)> {
        vec![
            (self.other.server(), UNKNOWN),
            (self.ca.elsewhere(), NAME),
            (self.ca.expired(), EXPIRED),
        ]
    }
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

// NATS ----------------------------------------------------------------------------------------

/// A stream with a subject of its own.
pub(crate) fn nats_source(stream: &str) -> SourceSpec {
    let params = NatsSource {
        stream: stream.to_owned(),
        subject: None,
        consumer: "pulsebus".to_owned(),
        create: Some(NatsStreamCreate {
            subjects: vec![format!("{stream}.>")],
            retention: None,
            storage: None,
            replicas: None,
        }),
        ack_wait: None,
        max_ack_pending: None,
        batch: None,
    };
    spec(serde_json::to_value(params).unwrap())
}

pub(crate) fn spec(params: serde_json::Value) -> SourceSpec {
    SourceSpec {
        name: "test".into(),
        params,
        competing: false,
        resume: None,
        reporter: Reporter::new("test"),
    }
}

pub(crate) fn outbound(address: &str, exchange: Option<&str>) -> Outbound {
    Outbound {
        id: "one".into(),
        address: address.into(),
        exchange: exchange.map(Into::into),
        headers: Headers::new(),
        body: Bytes::from_static(b"{\"type\":\"T\"}"),
    }
}

/// Publishes one message and consumes it.
pub(crate) async fn there_and_back(
    transport: &dyn Transport,
    source: SourceSpec,
    message: Outbound,
) -> Result<(), TransportError> {
    let mut consumer = transport.consumer(source).await?;
    let publisher = transport.publisher().await?;
    for result in within("the publish", publisher.publish(vec![message])).await {
        result.unwrap();
    }
    hold(&mut *consumer, 1).await;
    consumer.close().await;
    publisher.close().await;
    Ok(())
}

pub(crate) async fn nats(options: NatsOptions) -> Result<(), TransportError> {
    let transport = NatsTransport::new(options);
    there_and_back(&transport, nats_source("S"), outbound("S.x", None)).await
}

fn nats_options(scheme: &str, port: u16, tls: Option<TlsOptions>) -> NatsOptions {
    NatsOptions {
        url: Secret::Inline(format!("{scheme}://127.0.0.1:{port}")),
        tls,
        timeout: Duration::from_secs(5),
        ..NatsOptions::default()
    }
}

async fn refused(options: NatsOptions, word: &str) {
    let error = nats(options).await.unwrap_err().to_string();
    assert!(error.contains(word), "{word}: {error}");
}

fn nats_server(pair: &Pair, more: &[&str]) -> NatsServer {
    let mut args = vec!["--tls", "--tlscert", path(&pair.cert), "--tlskey", path(&pair.key)];
    args.extend(more);
    NatsServer::start_with(&args)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nats_with_tls() {
    let cases = Cases::new();
    let server = nats_server(&cases.ca.server(), &[]);
    let ca = || Some(trusting(&cases.ca.ca));
    nats(nats_options("tls", server.port(), ca())).await.unwrap();
    nats(nats_options("nats", server.port(), ca())).await.unwrap();
    // A server that insists gets TLS and is verified, whatever the scheme.
    refused(nats_options("nats", server.port(), None), UNKNOWN).await;
    refused(nats_options("tls", server.port(), None), UNKNOWN).await;
    refused(nats_options("tls", server.port(), Some(trusting(&cases.other.ca))), UNKNOWN).await;
    for (pair, word) in cases.bad() {
        let server = nats_server(&pair, &[]);
        refused(nats_options("tls", server.port(), ca()), word).await;
    }
    let (before, after) = (Pki::named("reborn"), Pki::named("reborn"));
    let reborn = nats_server(&after.server(), &[]);
    let error = "another authority of the same name";
    refused(nats_options("tls", reborn.port(), Some(trusting(&before.ca))), error).await;
    let missing =
        TlsOptions { ca_file: Some("/nonexistent/ca.pem".into()), ..TlsOptions::default() };
    refused(nats_options("tls", server.port(), Some(missing)), "/nonexistent/ca.pem").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nats_is_never_plaintext_where_tls_is_asked_for() {
    let cases = Cases::new();
    let server = NatsServer::start();
    refused(nats_options("tls", server.port(), None), PLAIN).await;
    refused(nats_options("tls", server.port(), Some(trusting(&cases.ca.ca))), PLAIN).await;
    refused(nats_options("nats", server.port(), Some(TlsOptions::default())), PLAIN).await;
    let first = TlsOptions { first: true, ..TlsOptions::default() };
    refused(nats_options("nats", server.port(), Some(first)), "tls.first").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nats_with_a_client_certificate() {
    let cases = Cases::new();
    let pki = &cases.ca;
    let server = nats_server(&pki.server(), &["--tlsverify", "--tlscacert", path(&pki.ca)]);
    let client = pki.client("pulse");
    nats(nats_options("tls", server.port(), Some(being(&client, &pki.ca)))).await.unwrap();
    refused(nats_options("tls", server.port(), Some(trusting(&pki.ca))), CLIENT).await;
    let stranger = cases.other.client("pulse");
    refused(nats_options("tls", server.port(), Some(being(&stranger, &pki.ca))), CLIENT).await;
    let mixed = Pair { cert: client.cert.clone(), key: stranger.key };
    refused(nats_options("tls", server.port(), Some(being(&mixed, &pki.ca))), "do not fit").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nats_with_tls_before_the_server_speaks() {
    let cases = Cases::new();
    let server = NatsServer::start();
    let port = pki::terminator(&cases.ca.server(), server.port()).await;
    let first = |ca: &Path| Some(TlsOptions { first: true, ..trusting(ca) });
    nats(nats_options("tls", port, first(&cases.ca.ca))).await.unwrap();
    refused(nats_options("tls", port, first(&cases.other.ca)), UNKNOWN).await;
    let patient = nats_options("tls", port, Some(trusting(&cases.ca.ca)));
    refused(NatsOptions { timeout: Duration::from_secs(1), ..patient }, "tls.first").await;
}

// RabbitMQ ------------------------------------------------------------------------------------

pub(crate) fn amqp_source(queue: &str) -> SourceSpec {
    let params = AmqpSource {
        queue: queue.to_owned(),
        prefetch: None,
        create: Some(AmqpQueueCreate {
            kind: Some("classic".to_owned()),
            bind: Vec::new(),
            arguments: Default::default(),
        }),
    };
    spec(serde_json::to_value(params).unwrap())
}

pub(crate) fn amqp_options(url: String, tls: Option<TlsOptions>) -> AmqpOptions {
    AmqpOptions {
        url: Secret::Inline(url),
        password: None,
        tls,
        timeout: Duration::from_secs(5),
        heartbeat: Duration::from_secs(10),
    }
}

async fn amqp(url: String, tls: Option<TlsOptions>) -> Result<(), TransportError> {
    let transport = AmqpTransport::new(amqp_options(url, tls))?;
    there_and_back(&transport, amqp_source("q"), outbound("q", Some(""))).await
}

async fn amqp_refused(url: String, tls: Option<TlsOptions>, word: &str) {
    let error = amqp(url, tls).await.unwrap_err().to_string();
    assert!(error.contains(word), "{word}: {error}");
    assert!(!error.contains("s3cret"), "{error}");
}

/// Makes user and virtual host where they are not there, and lets one into the other.
async fn amqp_allow(node: &RabbitNode, user: &str, password: &str, vhost: &str) {
    let made = node
        .ctl(&[
            "eval",
            &format!(
                "U = <<\"{user}\">>, V = <<\"{vhost}\">>, \
                 case rabbit_vhost:exists(V) of true -> ok; \
                 false -> ok = rabbit_vhost:add(V, <<\"test\">>) end, \
                 case rabbit_auth_backend_internal:exists(U) of true -> ok; \
                 false -> ok = rabbit_auth_backend_internal:add_user(U, <<\"{password}\">>, \
                 <<\"test\">>) end, \
                 ok = rabbit_auth_backend_internal:set_permissions(U, V, <<\".*\">>, <<\".*\">>, \
                 <<\".*\">>, <<\"test\">>)."
            ),
        ])
        .await;
    assert_eq!(made.trim(), "ok");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rabbitmq_with_tls_and_client_certificates() {
    let cases = Cases::new();
    let pki = &cases.ca;
    let (port, pair) = (free_port(), pki.server());
    let conf = format!(
        "listeners.ssl.1 = 127.0.0.1:{port}\n\
         ssl_options.cacertfile = {}\n\
         ssl_options.certfile = {}\n\
         ssl_options.keyfile = {}\n\
         ssl_options.verify = verify_peer\n\
         ssl_options.fail_if_no_peer_cert = true\n\
         auth_mechanisms.1 = PLAIN\n\
         auth_mechanisms.2 = EXTERNAL\n\
         ssl_cert_login_from = common_name\n",
        path(&pki.ca),
        path(&pair.cert),
        path(&pair.key)
    );
    let node = RabbitNode::start_with(conf, "rabbitmq_auth_mechanism_ssl").await;
    amqp_allow(&node, "pulse", "s3cret", "a/b c").await;
    amqp_allow(&node, "guest", "guest", "a/b c").await;
    let plain = node.address().port();
    let client = || Some(being(&pki.client("pulse"), &pki.ca));
    let ca = || Some(trusting(&pki.ca));
    let vhost = "a%2Fb%20c";

    // By password; a client certificate is shown, and somebody else logs in.
    amqp(format!("amqps://guest:guest@127.0.0.1:{port}/{vhost}"), client()).await.unwrap();
    // By certificate: where the URL has no user, or says so.
    amqp(format!("amqps://127.0.0.1:{port}/{vhost}"), client()).await.unwrap();
    let external = format!("amqps://x:s3cret@localhost:{port}/{vhost}?auth_mechanism=external");
    amqp(external, client()).await.unwrap();
    let stranger = Some(being(&pki.client("nobody"), &pki.ca));
    amqp_refused(format!("amqps://127.0.0.1:{port}/{vhost}"), stranger, "EXTERNAL").await;
    amqp_refused(format!("amqps://127.0.0.1:{port}/none"), client(), "virtual host `none`").await;
    amqp_refused(
        format!("amqps://pulse:s3cretx@127.0.0.1:{port}/{vhost}"),
        client(),
        "check user pulse and the password in the url",
    )
    .await;

    let url = || format!("amqps://pulse:s3cret@127.0.0.1:{port}/{vhost}");
    amqp_refused(url(), ca(), CLIENT).await;
    amqp_refused(url(), Some(being(&cases.other.client("pulse"), &pki.ca)), CLIENT).await;
    amqp_refused(url(), None, UNKNOWN).await;
    amqp_refused(url(), Some(trusting(&cases.other.ca)), UNKNOWN).await;

    // Without a client certificate, through what ends TLS before it.
    let via = |port: u16| format!("amqps://pulse:s3cret@127.0.0.1:{port}/{vhost}");
    let good = pki::terminator(&pki.server(), plain).await;
    amqp(via(good), ca()).await.unwrap();
    for (pair, word) in cases.bad() {
        amqp_refused(via(pki::terminator(&pair, plain).await), ca(), word).await;
    }

    // Neither becomes the other.
    amqp_refused(via(plain), ca(), PLAIN).await;
    let plaintext = format!("amqp://pulse:s3cret@127.0.0.1:{port}/{vhost}");
    amqp_refused(plaintext, None, "write amqps://").await;
}

// Postgres ------------------------------------------------------------------------------------

async fn postgres(url: &str, tls: Option<TlsOptions>) -> Result<(), StoreError> {
    let options = PostgresOptions { tls, ..PostgresOptions::new(Secret::Inline(url.to_owned())) };
    let store = PostgresStore::connect(options).await?;
    store.head().await?;
    store.close().await;
    Ok(())
}

async fn postgres_refused(url: &str, tls: Option<TlsOptions>, word: &str) {
    let error = postgres(url, tls).await.unwrap_err().to_string();
    assert!(error.contains(word), "{word}: {error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn postgres_with_tls() {
    let cases = Cases::new();
    let pki = &cases.ca;
    let server = PostgresServer::start_tls(&pki.server(), &pki.ca).await;
    let url = server.url();
    let ca = || Some(trusting(&pki.ca));
    postgres(&url, ca()).await.unwrap();
    // The same by what stands in the URL.
    let by_url = |ca: &Path| format!("{url}?sslmode=verify-full&sslrootcert={}", path(ca));
    postgres(&by_url(&pki.ca), None).await.unwrap();
    postgres_refused(&by_url(&cases.other.ca), None, UNKNOWN).await;
    postgres_refused(&url, Some(TlsOptions::default()), UNKNOWN).await;
    postgres_refused(&url, Some(trusting(&cases.other.ca)), UNKNOWN).await;
    // A client certificate, where a role wants one.
    let role = server.url_of("pulse");
    postgres(&role, Some(being(&pki.client("pulse"), &pki.ca))).await.unwrap();
    let error = postgres(&role, ca()).await.unwrap_err().to_string();
    assert!(error.contains("certificate"), "{error}");
    for (pair, word) in cases.bad() {
        let server = PostgresServer::start_tls(&pair, &pki.ca).await;
        postgres_refused(&server.url(), ca(), word).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn postgres_is_never_plaintext_where_tls_is_asked_for() {
    let cases = Cases::new();
    let server = PostgresServer::start().await;
    postgres_refused(&server.url(), Some(trusting(&cases.ca.ca)), PLAIN).await;
    let by_url = format!("{}?sslmode=verify-full&sslrootcert={}", server.url(), path(&cases.ca.ca));
    postgres_refused(&by_url, None, PLAIN).await;
}

// The HTTP server -----------------------------------------------------------------------------

/// A daemon that serves HTTPS; ends when it is dropped.
struct Https {
    port: u16,
    folder: PathBuf,
    config: PathBuf,
    child: Child,
}

impl Https {
    /// `more` stands in `[http]`.
    fn start(pair: &Pair, client_ca: Option<&Path>, more: &str) -> Self {
        let (port, folder) = (free_port(), process::folder("https"));
        let config = folder.join("pulsebus.toml");
        let client_ca =
            client_ca.map(|ca| format!("client_ca_file = \"{}\"\n", path(ca))).unwrap_or_default();
        std::fs::write(
            &config,
            format!(
                "data_dir = \"{}\"\n[http]\nlisten = \"127.0.0.1:{port}\"\n{more}\n[http.tls]\n\
                 cert_file = \"{}\"\nkey_file = \"{}\"\n{client_ca}",
                folder.join("data").display(),
                path(&pair.cert),
                path(&pair.key)
            ),
        )
        .unwrap();
        let log = std::fs::File::create(folder.join("log")).unwrap();
        let child = process::spawn(Path::new(BINARY), |command| {
            command.arg("--config").arg(&config).stdout(log.try_clone().unwrap()).stderr(log);
        });
        Self { port, folder, config, child }
    }

    /// Its own command, which finds it by its configuration.
    async fn healthcheck(&self, ca: &Path) -> bool {
        let output = pulsebus(|command| {
            command
                .arg("healthcheck")
                .arg("--ready")
                .arg("--config")
                .arg(&self.config)
                .arg("--ca-file")
                .arg(ca);
        })
        .await;
        output.status.success()
    }

    async fn up(&self, ca: &Path) {
        wait_until("it is up", async || self.healthcheck(ca).await.then_some(())).await;
    }
}

impl Drop for Https {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A client that trusts this authority.
pub(crate) fn https(ca: &Path, client: Option<&Pair>) -> reqwest::Client {
    let options = match client {
        None => trusting(ca),
        Some(client) => being(client, ca),
    };
    reqwest::Client::builder()
        .no_proxy()
        .timeout(Duration::from_secs(10))
        // Each request by a connection of its own.
        .pool_max_idle_per_host(0)
        .tls_backend_preconfigured(pulsebus::tls::client_config(&options).unwrap())
        .build()
        .unwrap()
}

async fn handlers(port: u16, scheme: &str, ca: Option<&Path>) -> Result<String, String> {
    let output = pulsebus(|command| {
        command.args(["handlers", "list", "--json", "--url"]);
        command.arg(format!("{scheme}://127.0.0.1:{port}"));
        if let Some(ca) = ca {
            command.arg("--ca-file").arg(ca);
        }
    })
    .await;
    if output.status.success() {
        Ok(String::from_utf8(output.stdout).unwrap())
    } else {
        Err(String::from_utf8(output.stderr).unwrap())
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_http_server_with_tls() {
    let cases = Cases::new();
    let pki = &cases.ca;
    let folder = process::folder("https");
    let pair = pki.server().copy(&folder);
    let daemon = Https::start(&pair, None, "");
    daemon.up(&pki.ca).await;
    let port = daemon.port;
    let event = "{\"id\":\"1\",\"type\":\"T\",\"data\":1}";
    let posted = https(&pki.ca, None)
        .post(format!("https://localhost:{port}/v1/events"))
        .header("content-type", "application/json")
        .body(event)
        .send()
        .await
        .unwrap();
    assert!(posted.status().is_success());
    let ca = Some(&*pki.ca);
    assert!(handlers(port, "https", ca).await.unwrap().contains("search"));
    let said =
        async |scheme: &str, ca: Option<&Path>| handlers(port, scheme, ca).await.unwrap_err();
    assert!(said("https", None).await.contains(UNKNOWN));
    assert!(said("https", Some(&cases.other.ca)).await.contains(UNKNOWN));
    let plain = said("http", None).await;
    assert!(plain.contains("https"), "{plain}");

    // Renewed files count from the next connection on; ones that cannot be used do not.
    for (renewed, word) in cases.bad() {
        pair.replace_with(&renewed);
        wait_until(word, async || {
            handlers(port, "https", ca).await.err().filter(|said| said.contains(word))
        })
        .await;
        pair.replace_with(&pki.server());
        wait_until("renewed", async || handlers(port, "https", ca).await.ok()).await;
    }
    std::fs::write(&pair.cert, "nothing").unwrap();
    wait_until("it is said", async || {
        let log = std::fs::read_to_string(daemon.folder.join("log")).unwrap();
        // Looked at when somebody connects.
        assert!(handlers(port, "https", ca).await.is_ok());
        log.contains("stays in use").then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_without_certificate_and_a_server_without_tls_are_told_so() {
    let cases = Cases::new();
    let daemon = Daemon::start("").await;
    let port = daemon.address().rsplit_once(':').unwrap().1.parse().unwrap();
    let error = handlers(port, "https", Some(&cases.ca.ca)).await.unwrap_err();
    assert!(error.contains(PLAIN), "{error}");

    let pki = &cases.ca;
    let daemon = Https::start(&pki.server(), Some(&pki.ca), "");
    let port = daemon.port;
    let known = https(&pki.ca, Some(&pki.client("me")));
    let url = format!("https://127.0.0.1:{port}/healthz");
    wait_until("it is up", async || {
        known.get(&url).send().await.ok().filter(|answer| answer.status().is_success())
    })
    .await;
    assert!(https(&pki.ca, None).get(&url).send().await.is_err());
    let error = handlers(port, "https", Some(&pki.ca)).await.unwrap_err();
    assert!(error.contains(CLIENT), "{error}");
}

/// Handshakes count among the connections, hold up nobody else, and do not last.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn G7_a_handshake_that_does_not_go_on_gives_its_place_back() {
    let pki = Pki::new();
    let daemon = Https::start(&pki.server(), None, "max_connections = 2");
    daemon.up(&pki.ca).await;
    let silent = async || tokio::net::TcpStream::connect(("127.0.0.1", daemon.port)).await.unwrap();
    let mut first = silent().await;
    assert!(daemon.healthcheck(&pki.ca).await, "one that says nothing holds up another");
    let _second = silent().await;
    // There is no place now; the daemon hangs up on those that say nothing, and there is again.
    wait_until("a place", async || daemon.healthcheck(&pki.ca).await.then_some(())).await;
    let mut said = [0; 16];
    let ended = tokio::io::AsyncReadExt::read(&mut first, &mut said);
    let ended = tokio::time::timeout(PATIENCE, ended).await.expect("it was hung up on");
    assert!(matches!(ended, Ok(0) | Err(_)), "{ended:?}");
}
