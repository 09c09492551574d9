//! Through JetStream.

use std::{collections::BTreeSet, fs, path::PathBuf};

use async_nats::{
    HeaderMap, HeaderName, HeaderValue,
    jetstream::{self, consumer, stream},
};
use pulsebus::{
    secret::Secret,
    store::{
        EventStore,
        postgres::{PostgresOptions, PostgresStore},
    },
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use super::{CONFLICT, Expected, Marked, audit, audit_sqlite, cases, neighbour, only_odd_headers};
use crate::{
    corpus::{Case, Verdict},
    support::{daemon::Daemon, nats::NatsServer, postgres, process::folder, wait_until},
};

const MIB: u64 = 1 << 20;

/// What fits into the 64 KiB of headers that JetStream takes.
const HEADERS: usize = 4_000;

/// A server that takes bodies of more than 64 MiB, and a stream in it.
struct Broker {
    server: NatsServer,
    jetstream: jetstream::Context,
    _config: PathBuf,
}

impl Broker {
    async fn start() -> Self {
        let config = folder("nats-config").join("nats.conf");
        fs::write(&config, "max_payload: 80MB\nmax_pending: 512MB\n").unwrap();
        let server = NatsServer::start_with(&["-c", config.to_str().unwrap()]);
        let jetstream = server.jetstream().await;
        let stream = stream::Config {
            name: "BAD".to_owned(),
            subjects: vec!["bad.>".to_owned()],
            // Its files cannot be read back where a record is larger than 32 MiB.
            storage: stream::StorageType::Memory,
            ..stream::Config::default()
        };
        jetstream.create_stream(stream).await.unwrap();
        Self { server, jetstream, _config: config }
    }

    async fn daemon(&self, store: &str) -> Daemon {
        Daemon::start(&format!(
            r#"
            {store}
            [transports.nats]
            kind = "nats"
            url = "{}"
            [sources.bad]
            transport = "nats"
            stream = "BAD"
            consumer = "pulsebus"
            [handlers.log]
            kind = "log"
            level = "debug"
            "#,
            self.server.url()
        ))
        .await
    }

    async fn publish(&self, headers: HeaderMap, body: Vec<u8>) {
        let ack = self.jetstream.publish_with_headers("bad.in", headers, body.into()).await;
        ack.unwrap().await.unwrap();
    }

    /// What the server says of the daemon's consumer; `None` before the daemon has made it.
    async fn consumer(&self) -> Option<consumer::Info> {
        let mut consumer: consumer::PullConsumer =
            self.jetstream.get_consumer_from_stream("pulsebus", "BAD").await.ok()?;
        Some(consumer.info().await.ok()?.clone())
    }

    /// Waits until everything in the stream has been delivered and acked.
    async fn consumed(&self) -> consumer::Info {
        let stream = self.jetstream.get_stream("BAD").await.unwrap();
        let last = stream.get_info().await.unwrap().state.last_sequence;
        wait_until("all is acked", async || {
            let info = self.consumer().await?;
            let all = info.ack_floor.stream_sequence == last
                && info.num_pending == 0
                && info.num_ack_pending == 0;
            all.then_some(info)
        })
        .await
    }
}

/// The case's headers, or `Err` where the client refuses one.
fn headers(marked: &Marked) -> Result<HeaderMap, String> {
    let mut map = HeaderMap::new();
    for (name, value) in marked.headers() {
        let header = name.parse::<HeaderName>().map_err(|error| format!("{name:?}: {error}"));
        let value = value.parse::<HeaderValue>().map_err(|error| format!("{value:?}: {error}"));
        map.append(header?, value?);
    }
    Ok(map)
}

/// Publishes every case, a neighbour behind each; the names of those the client refuses.
async fn publish_all(broker: &Broker, cases: &[Marked]) -> Vec<String> {
    let mut refused = Vec::new();
    // The one that others are in conflict with.
    broker.publish(HeaderMap::new(), neighbour(0)).await;
    for (n, marked) in cases.iter().enumerate() {
        match headers(marked) {
            Ok(headers) => broker.publish(headers, marked.case.body.clone()).await,
            Err(_) => refused.push(marked.mark.clone()),
        }
        broker.publish(HeaderMap::new(), neighbour(n + 1)).await;
    }
    refused
}

async fn corpus_through(store: &str, audit: impl AsyncFnOnce(&Daemon, &Expected)) {
    let broker = Broker::start().await;
    let daemon = broker.daemon(store).await;
    let mut cases = cases();
    let neighbours = cases.len() + 1;
    for marked in cases.iter_mut().filter(|marked| marked.case.headers.len() > HEADERS) {
        // The server holds more of them back, and says so to who publishes.
        let answer =
            broker.jetstream.publish_with_headers("bad.in", headers(marked).unwrap(), "".into());
        let refusal = answer.await.unwrap().await.unwrap_err().to_string();
        assert!(refusal.contains("header size exceeds"), "{refusal}");
        marked.case.headers.truncate(HEADERS);
    }

    let refused = publish_all(&broker, &cases).await;
    let first = broker.consumed().await;
    let head = daemon.head().await;

    // The client itself holds these back: its parser could not read them either.
    only_odd_headers(&cases, &refused);
    let names: BTreeSet<_> = cases
        .iter()
        .filter(|marked| refused.contains(&marked.mark))
        .map(|marked| (marked.case.name, marked.case.headers[0].0.clone()))
        .collect();
    let wanted = [
        ("CR and LF in a header", "x-inject"),
        ("CR and LF in the id header", "Nats-Msg-Id"),
        ("odd header names", ":x"),
        ("odd header names", "a b"),
        ("odd header names", "c\u{e9}-"),
        ("odd header names", "é😀"),
    ];
    assert_eq!(names, wanted.map(|(case, header)| (case, header.to_owned())).into());
    cases.retain(|marked| !refused.contains(&marked.mark));

    // The same again adds no event: ids are known.
    publish_all(&broker, &cases).await;
    let second = broker.consumed().await;
    assert_eq!(daemon.head().await, head);
    for (info, what) in [(first, "first"), (second, "second")] {
        assert_eq!(info.num_redelivered, 0, "{what}");
        assert_eq!(info.delivered.consumer_sequence, info.delivered.stream_sequence, "{what}");
    }
    let sources = daemon.json("/v1/sources").await.unwrap();
    let source = sources["sources"].as_array().unwrap().iter().find(|s| s["name"] == "bad");
    assert_eq!(source.unwrap()["state"], "consuming", "{sources}");
    daemon.ready().await;

    assert!(daemon.terminate().await.success(), "{}", daemon.log());
    assert!(!daemon.log().contains("panicked"), "{}", daemon.log());
    audit(&daemon, &Expected { cases, neighbours, quarantined: 2 }).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn G6_bad_input_into_postgres_ends_somewhere_and_harms_nobody() {
    let database = postgres::database().await;
    let store = format!("[store]\nurl = \"{}\"", database.url);
    corpus_through(&store, async |_, expected| {
        let url = Secret::Inline(database.url.clone());
        let store = PostgresStore::connect(PostgresOptions::new(url)).await.unwrap();
        audit(&store, expected).await;
        store.close().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn G6_bad_input_through_nats_ends_somewhere_and_harms_nobody() {
    corpus_through("", async |daemon, expected| audit_sqlite(daemon, expected).await).await;
}

/// Publishes a message with a header block that no client library writes, and waits for the
/// server to have it.
async fn publish_raw(broker: &Broker, block: &[u8], body: &[u8]) {
    let mut stream = TcpStream::connect(("127.0.0.1", broker.server.port())).await.unwrap();
    let mut wire =
        b"CONNECT {\"verbose\":false,\"headers\":true,\"lang\":\"x\",\"version\":\"1\"}\r\n"
            .to_vec();
    let (head, total) = (block.len(), block.len() + body.len());
    wire.extend(format!("HPUB bad.in {head} {total}\r\n").into_bytes());
    wire.extend(block);
    wire.extend(body);
    wire.extend(b"\r\nPING\r\n");
    stream.write_all(&wire).await.unwrap();
    let mut answered = Vec::new();
    while !answered.windows(6).any(|window| window == b"PONG\r\n") {
        let mut buffer = [0; 4096];
        let read = stream.read(&mut buffer).await.unwrap();
        assert!(read > 0, "{}", String::from_utf8_lossy(&answered));
        answered.extend(&buffer[..read]);
    }
    assert!(!answered.windows(4).any(|window| window == b"-ERR"), "{answered:?}");
}

/// Header blocks that break the parser of the client we use: the connection goes down with each,
/// and the message has to be read from the stream.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn G8_headers_that_break_the_client_do_not_stop_the_flow() {
    let blocks: [&[u8]; 8] = [
        b"NATS/1.0\r\nno colon\r\n\r\n",
        b"NATS/1.0\r\na b: v\r\n\r\n",
        b"NATS/1.0\r\nx: \xff\xfe\r\n\r\n",
        b"NATS/1.0\r\n\xc3\xa9: v\r\n\r\n",
        b"NATS/1.0\r\nx\0y: \0\r\n\r\n",
        b"NATS/1.0 503\r\n\r\n",
        b"NATS/2.0\r\nx: v\r\n\r\n",
        b"\r\n\r\n",
    ];
    let broker = Broker::start().await;
    let daemon = broker.daemon("").await;
    broker.publish(HeaderMap::new(), neighbour(0)).await;
    for (n, block) in blocks.iter().enumerate() {
        let body = format!(r#"{{"id":"raw-{n}","type":"Raw","data":{n}}}"#);
        publish_raw(&broker, block, body.as_bytes()).await;
        broker.publish(HeaderMap::new(), neighbour(n + 1)).await;
    }
    broker.consumed().await;
    assert!(daemon.terminate().await.success(), "{}", daemon.log());

    let store = super::open(&daemon).await;
    let events = super::events(&*store).await;
    let ids: Vec<_> = events.iter().map(|event| event.id().to_owned()).collect();
    let mut wanted = vec!["good-0".to_owned()];
    for n in 0..blocks.len() {
        wanted.extend([format!("raw-{n}"), format!("good-{}", n + 1)]);
    }
    assert_eq!(ids, wanted, "each is there, once, in order");
    store.close().await;
}

/// Thousands of bad messages, some hundred megabytes of them: the daemon needs no more memory
/// behind them than it did after the first few.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn G7_memory_stays_flat_under_bad_input() {
    const BOUND: u64 = 96 * MIB;
    let broker = Broker::start().await;
    let daemon = broker.daemon("").await;
    let bad: Vec<Case> = cases()
        .into_iter()
        .map(|marked| marked.case)
        .filter(|case| matches!(case.verdict, Verdict::Quarantined(_)))
        .filter(|case| case.verdict != CONFLICT && case.body.len() <= 3 << 20)
        .filter(|case| case.headers.is_empty())
        .collect();
    let mut published = 0;
    let mut round = async |bytes: u64| {
        let (mut sent, mut acks) = (0, Vec::new());
        while sent < bytes {
            // Most are small; every tenth is large.
            let case = &bad[published % bad.len()];
            let mut body = case.body.clone();
            if published % 10 == 0 {
                body.resize(1_500_000, b'[');
            }
            published += 1;
            sent += body.len() as u64;
            acks.push(broker.jetstream.publish("bad.in", body.into()).await.unwrap());
            if acks.len() == 64 {
                for ack in acks.drain(..) {
                    ack.await.unwrap();
                }
            }
        }
        for ack in acks {
            ack.await.unwrap();
        }
        broker.consumed().await;
        daemon.resident()
    };
    // It may fill its buffers: of the connection, the source, the log, the database.
    let mut warm = 0;
    for _ in 0..5 {
        warm = warm.max(round(32 * MIB).await);
    }
    let mut most = warm;
    for _ in 0..10 {
        most = most.max(round(32 * MIB).await);
    }
    assert!(published >= 2_000, "{published}");
    let grown = most.saturating_sub(warm);
    assert!(grown < BOUND, "from {} MiB to {} MiB", warm / MIB, most / MIB);
    assert_eq!(daemon.head().await, 0);
    // It is in quarantine, and a list of it costs no more than its rows.
    let page = daemon.json("/v1/quarantine?limit=1000").await.unwrap();
    assert_eq!(page["quarantine"].as_array().unwrap().len(), 1_000);
    let listed = daemon.resident();
    assert!(listed.saturating_sub(warm) < BOUND, "{} MiB after a list", listed / MIB);
    assert!(daemon.terminate().await.success());
}
