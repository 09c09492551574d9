//! JetStream against the contract, and against what servers and networks do.

use std::{
    marker::PhantomData,
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use async_nats::{HeaderMap, HeaderName, jetstream};
use async_trait::async_trait;
use bytes::Bytes;
use futures_util::StreamExt as _;
use pulsebus::{
    event::Headers,
    secret::Secret,
    transport::{
        Mark, Outbound, Reporter, Room, SourceSpec, SourceState, Transport, TransportError,
        nats::{NatsOptions, NatsSource, NatsStreamCreate, NatsTransport},
    },
};
use tokio::time::{Instant, sleep, timeout};

use crate::{
    conformance::transport::{
        DEADLINE, Fixture, Log, Source, ack, hold, id, stored, until_state, within,
    },
    support::{
        nats::NatsServer,
        proxy::{Mode, Proxy},
    },
};

const ROOM: Room = Room { messages: 500, bytes: 16 << 20 };

/// What kind of stream the suite runs on.
trait Kind: Send + Sync + 'static {
    const RETENTION: &'static str;
    /// Consume one subject of many, with others in between.
    const FILTER: bool;
}

struct Limits;
impl Kind for Limits {
    const RETENTION: &'static str = "limits";
    const FILTER: bool = false;
}

struct WorkQueue;
impl Kind for WorkQueue {
    const RETENTION: &'static str = "workqueue";
    const FILTER: bool = false;
}

struct Filtered;
impl Kind for Filtered {
    const RETENTION: &'static str = "limits";
    const FILTER: bool = true;
}

struct Nats<K> {
    _server: NatsServer,
    proxy: Proxy,
    transport: NatsTransport,
    jetstream: jetstream::Context,
    sources: AtomicUsize,
    kind: PhantomData<K>,
}

fn options(port: u16) -> NatsOptions {
    NatsOptions {
        url: Secret::Inline(format!("nats://127.0.0.1:{port}")),
        ..NatsOptions::default()
    }
}

fn source_of(params: &NatsSource, address: &str) -> Source {
    Source {
        params: serde_json::to_value(params).unwrap(),
        template: Outbound {
            id: "".into(),
            address: address.into(),
            exchange: None,
            headers: Headers::new(),
            body: Bytes::new(),
        },
        in_flight: params.batch.unwrap(),
    }
}

impl<K: Kind> Nats<K> {
    fn params(source: &Source) -> NatsSource {
        serde_json::from_value(source.params.clone()).unwrap()
    }
}

async fn publish(jetstream: &jetstream::Context, messages: &[Outbound]) {
    // The client lets so many go unconfirmed, and then waits.
    for part in messages.chunks(1_000) {
        publish_part(jetstream, part).await;
    }
}

async fn publish_part(jetstream: &jetstream::Context, messages: &[Outbound]) {
    let mut acks = Vec::new();
    for message in messages {
        let mut headers = HeaderMap::new();
        for (name, value) in message.headers.iter() {
            headers.append(name.parse::<HeaderName>().unwrap(), value.as_str().unwrap());
        }
        let address = message.address.to_string();
        let publish = jetstream.publish_with_headers(address, headers, message.body.clone());
        acks.push(publish.await.unwrap());
    }
    for ack in acks {
        ack.await.unwrap();
    }
}

#[async_trait]
impl<K: Kind> Fixture for Nats<K> {
    async fn start() -> Self {
        let server = NatsServer::start();
        let proxy = Proxy::to(server.port()).await;
        Self {
            transport: NatsTransport::new(options(proxy.port())),
            jetstream: server.jetstream().await,
            _server: server,
            proxy,
            sources: AtomicUsize::new(0),
            kind: PhantomData,
        }
    }

    fn transport(&self) -> &dyn Transport {
        &self.transport
    }

    async fn fresh_source(&self) -> Source {
        let n = self.sources.fetch_add(1, Ordering::Relaxed);
        self.jetstream
            .create_stream(jetstream::stream::Config {
                name: format!("S{n}"),
                subjects: vec![format!("s{n}.>")],
                retention: match K::RETENTION {
                    "workqueue" => jetstream::stream::RetentionPolicy::WorkQueue,
                    _ => jetstream::stream::RetentionPolicy::Limits,
                },
                ..Default::default()
            })
            .await
            .unwrap();
        let params = NatsSource {
            stream: format!("S{n}"),
            subject: K::FILTER.then(|| format!("s{n}.wanted.*")),
            consumer: "pulsebus".into(),
            create: None,
            ack_wait: Some(Duration::from_secs(1)),
            max_ack_pending: None,
            batch: Some(200),
        };
        source_of(&params, &format!("s{n}.wanted.x"))
    }

    async fn publish(&self, messages: &[Outbound]) {
        if !K::FILTER {
            return publish(&self.jetstream, messages).await;
        }
        let mut all = Vec::new();
        for message in messages {
            let (stream, _) = message.address.split_once('.').unwrap();
            let noise = format!("{stream}.other.{}", all.len() % 3).into();
            all.push(Outbound { address: noise, ..message.clone() });
            all.push(message.clone());
        }
        publish(&self.jetstream, &all).await;
    }

    async fn cut(&self) {
        self.proxy.cut();
    }

    async fn away(&self) {
        self.proxy.set(Mode::Refuse);
        self.proxy.cut();
    }

    async fn back(&self) {
        self.proxy.set(Mode::Forward);
    }

    async fn break_subscription(&self, source: &Source) {
        let params = Self::params(source);
        let stream = self.jetstream.get_stream_no_info(&params.stream).await.unwrap();
        stream.delete_consumer(&params.consumer).await.unwrap();
    }

    async fn mend_subscription(&self, _source: &Source) {}

    async fn delay(&self, by: Duration) {
        self.proxy.delay(by);
    }

    fn refused(&self, source: &Source) -> Vec<Outbound> {
        let message = source.message("refused");
        let with = |name: &str, value: &str| {
            let mut headers = Headers::new();
            headers.push(name, value);
            Outbound { headers, ..message.clone() }
        };
        vec![
            Outbound { body: vec![b'x'; (1 << 20) + 1].into(), ..message.clone() },
            Outbound { address: "two words".into(), ..message.clone() },
            Outbound { address: "".into(), ..message.clone() },
            Outbound { address: "a.*".into(), ..message.clone() },
            Outbound { address: "a\r\nPING\r\n".into(), ..message.clone() },
            Outbound { id: "a\r\nb".into(), ..message.clone() },
            with("name", "va\r\nlue"),
            with("na:me", "value"),
            with("", "value"),
            with("na\r\nme", "value"),
        ]
    }

    fn unroutable(&self, source: &Source) -> Outbound {
        Outbound { address: "nowhere.at.all".into(), ..source.message("unroutable") }
    }

    fn headers(&self) -> Headers {
        let mut headers = Headers::new();
        headers.push("Trace-Id", "a");
        headers.push("trace-id", "b");
        headers.push("Trace-Id", "c");
        headers.push("ce-type", "Ünïcode: yes, \"quoted\"");
        headers
    }
}

mod limits {
    crate::transport_conformance!(super::Nats<super::Limits>);
}

mod work_queue {
    crate::transport_conformance!(super::Nats<super::WorkQueue>);
}

mod filtered {
    crate::transport_conformance!(super::Nats<super::Filtered>);
}

/// A stream `T` with subjects `t.>`, and a source of all of it.
async fn plain(server: &NatsServer) -> (jetstream::Context, NatsSource) {
    let jetstream = server.jetstream().await;
    jetstream
        .create_stream(jetstream::stream::Config {
            name: "T".into(),
            subjects: vec!["t.>".into()],
            ..Default::default()
        })
        .await
        .unwrap();
    (jetstream, params("T"))
}

fn params(stream: &str) -> NatsSource {
    NatsSource {
        stream: stream.into(),
        subject: None,
        consumer: "pulsebus".into(),
        create: None,
        ack_wait: Some(Duration::from_secs(1)),
        max_ack_pending: None,
        batch: Some(200),
    }
}

async fn try_open(transport: &dyn Transport, params: &NatsSource) -> Result<(), TransportError> {
    let spec = SourceSpec {
        name: "test".into(),
        params: serde_json::to_value(params).unwrap(),
        competing: false,
        resume: None,
        reporter: Reporter::new("test"),
    };
    transport.consumer(spec).await.map(|_| ())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn C3_order_survives_a_killed_server() {
    let mut server = NatsServer::start();
    let (jetstream, params) = plain(&server).await;
    let source = source_of(&params, "t.x");
    let transport = NatsTransport::new(options(server.port()));
    let (mut consumer, reporter) = source.open(&transport, None).await;
    let mut log = Log::default();
    for round in 0..3 {
        publish(&jetstream, &source.messages(round * 500..(round + 1) * 500)).await;
        log.fill(&mut *consumer, round * 500 + 100).await;
        // Delivered and not settled when the server dies.
        let mut held = hold(&mut *consumer, 50).await;
        server.kill();
        until_state(&reporter, "open", |s| *s == SourceState::Consuming).await;
        let lost = until_state(&reporter, "away", |s| matches!(s, SourceState::Reconnecting(_)));
        tokio::select! {
            () = lost => {}
            () = async {
                // What had arrived may still be handed over, behind what is held.
                while let Some(deliveries) = consumer.next(ROOM).await {
                    held.push(deliveries);
                }
            } => {}
        }
        server.restart();
        for deliveries in held {
            log.take(deliveries).await;
        }
        log.fill(&mut *consumer, (round + 1) * 500).await;
    }
    let mut sorted = log.ids.clone();
    sorted.sort_by_key(|id| id.parse::<usize>().unwrap());
    let wanted: Vec<_> = (0..1_500).map(|n| n.to_string()).collect();
    assert_eq!(sorted, wanted);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn C9_a_server_that_stands_still_is_noticed_and_its_return_too() {
    let server = NatsServer::start();
    let (jetstream, params) = plain(&server).await;
    let source = source_of(&params, "t.x");
    let transport = NatsTransport::new(options(server.port()));
    let (mut consumer, reporter) = source.open(&transport, None).await;
    let mut log = Log::default();
    publish(&jetstream, &source.messages(0..100)).await;
    log.fill(&mut *consumer, 100).await;
    server.stop();
    let began = Instant::now();
    tokio::select! {
        () = until_state(&reporter, "noticed", |s| matches!(s, SourceState::Reconnecting(_))) => {}
        _ = consumer.next(ROOM) => panic!("a delivery from a stopped server"),
    }
    assert!(began.elapsed() < Duration::from_secs(15), "noticed after {:?}", began.elapsed());
    server.cont();
    publish(&server.jetstream().await, &source.messages(100..200)).await;
    log.fill(&mut *consumer, 200).await;
    log.assert_order(0..200);
}

/// Half-open: the connection stands, nothing goes through it in either direction.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn C9_a_connection_that_swallows_is_rebuilt_once() {
    let server = NatsServer::start();
    let proxy = Proxy::to(server.port()).await;
    let (jetstream, params) = plain(&server).await;
    let source = source_of(&params, "t.x");
    let transport = NatsTransport::new(options(proxy.port()));
    let (mut consumer, reporter) = source.open(&transport, None).await;
    let mut log = Log::default();
    publish(&jetstream, &source.messages(0..100)).await;
    log.fill(&mut *consumer, 100).await;
    let before = proxy.accepted();
    for (round, mode) in [Mode::Swallow, Mode::Stall].into_iter().enumerate() {
        let from = 100 + round * 300;
        // A request is with the server; what it delivers for it goes to nobody.
        assert!(timeout(Duration::from_millis(300), consumer.next(ROOM)).await.is_err());
        proxy.set(mode);
        publish(&jetstream, &source.messages(from..from + 150)).await;
        let noticed =
            until_state(&reporter, "noticed", |s| matches!(s, SourceState::Reconnecting(_)));
        tokio::select! {
            () = noticed => {}
            _ = consumer.next(ROOM) => panic!("a delivery through {mode:?}"),
        }
        proxy.cut();
        proxy.set(Mode::Forward);
        publish(&jetstream, &source.messages(from + 150..from + 300)).await;
        log.fill(&mut *consumer, from + 300).await;
    }
    log.assert_order(0..700);
    assert!(proxy.accepted() - before < 8, "{} connections", proxy.accepted() - before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn C9_a_deleted_stream_needs_a_person_and_a_new_one_is_read_from_its_beginning() {
    let server = NatsServer::start();
    let (jetstream, params) = plain(&server).await;
    let source = source_of(&params, "t.x");
    let transport = NatsTransport::new(options(server.port()));
    let (mut consumer, reporter) = source.open(&transport, None).await;
    let mut log = Log::default();
    publish(&jetstream, &source.messages(0..50)).await;
    log.fill(&mut *consumer, 50).await;
    let old = log.mark.clone().unwrap();
    assert_eq!(old.sequence, 50);
    jetstream.delete_stream("T").await.unwrap();
    tokio::select! {
        () = until_state(&reporter, "said", |s| matches!(s, SourceState::Misconfigured(_))) => {}
        _ = consumer.next(ROOM) => panic!("a delivery from a deleted stream"),
    }
    assert!(reporter.state().reason().unwrap().contains("`T` does not exist"));
    let (jetstream, _) = plain(&server).await;
    publish(&jetstream, &source.messages(50..80)).await;
    log.fill(&mut *consumer, 80).await;
    log.assert_order(0..80);
    let new = log.mark.clone().unwrap();
    assert_ne!(new.incarnation, old.incarnation);
    assert_eq!(new.sequence, 30);

    // A log that knows the old stream opens the new one.
    drop(consumer);
    let (mut consumer, _) = source.open(&transport, Some(old)).await;
    let mut late = Log::default();
    publish(&jetstream, &source.messages(80..81)).await;
    late.fill(&mut *consumer, 31).await;
    late.assert_order(50..81);
}

/// The same stream, shorter than the log remembers: sequences are used a second time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn C3_a_stream_that_lost_its_end_is_read_from_its_beginning() {
    let server = NatsServer::start();
    let (jetstream, params) = plain(&server).await;
    let source = source_of(&params, "t.x");
    let transport = NatsTransport::new(options(server.port()));
    publish(&jetstream, &source.messages(0..20)).await;
    let (mut consumer, _) = source.open(&transport, None).await;
    let mut log = Log::default();
    log.fill(&mut *consumer, 20).await;
    drop(consumer);
    let mark = log.mark.unwrap();
    let ahead = Mark { sequence: 1_000, ..mark.clone() };
    let (mut consumer, _) = source.open(&transport, Some(ahead)).await;
    let mut log = Log::default();
    log.fill(&mut *consumer, 20).await;
    log.assert_order(0..20);
    let after = log.mark.unwrap();
    assert_ne!(after.incarnation, mark.incarnation, "the mark has to be free to go back");
    drop(consumer);
    // And from there it goes on as ever.
    publish(&jetstream, &source.messages(20..25)).await;
    let (mut consumer, _) = source.open(&transport, Some(after.clone())).await;
    let mut log = Log::default();
    log.fill(&mut *consumer, 5).await;
    log.assert_order(20..25);
    assert_eq!(log.mark.unwrap().incarnation, after.incarnation);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn C1_fewer_may_be_pending_than_a_batch_asks_for() {
    let server = NatsServer::start();
    let (jetstream, params) = plain(&server).await;
    let params = NatsSource { max_ack_pending: Some(7), ..params };
    let source = source_of(&params, "t.x");
    let transport = NatsTransport::new(options(server.port()));
    publish(&jetstream, &source.messages(0..300)).await;
    let (mut consumer, _) = source.open(&transport, None).await;
    let mut log = Log::default();
    log.fill(&mut *consumer, 300).await;
    log.assert_order(0..300);
}

/// An ack that comes after `ack_wait`, again and again: everything is redelivered all the time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn C3_a_redelivery_storm_loses_no_order() {
    let server = NatsServer::start();
    let (jetstream, params) = plain(&server).await;
    let params = NatsSource { ack_wait: Some(Duration::from_millis(200)), ..params };
    let source = source_of(&params, "t.x");
    let transport = NatsTransport::new(options(server.port()));
    publish(&jetstream, &source.messages(0..600)).await;
    let (mut consumer, _) = source.open(&transport, None).await;
    let mut log = Log::default();
    let mut rounds = 0;
    while log.ids.len() < 600 {
        rounds += 1;
        assert!(rounds < 200, "{} of 600 in {rounds} rounds", log.ids.len());
        let room = Room { messages: 100, ..ROOM };
        let deliveries = within("messages", consumer.next(room)).await.unwrap();
        sleep(Duration::from_millis(300)).await;
        log.take(deliveries).await;
    }
    log.assert_order(0..600);
    assert!(log.copies > 0, "there was no storm");
}

/// A filter that takes one message in fifty, and more behind the cursor than is worth reading one
/// by one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn C3_order_survives_a_crash_under_a_sparse_filter() {
    let server = NatsServer::start();
    let (jetstream, params) = plain(&server).await;
    let params = NatsSource { subject: Some("t.rare".into()), ..params };
    let source = source_of(&params, "t.rare");
    let transport = NatsTransport::new(options(server.port()));
    for n in 0..100 {
        let mut messages = vec![source.message(n)];
        messages.resize(50, Outbound { address: "t.noise".into(), ..source.message("noise") });
        publish(&jetstream, &messages).await;
    }
    let (mut consumer, _) = source.open(&transport, None).await;
    drop(hold(&mut *consumer, 80).await);
    drop(consumer);
    let (mut consumer, _) = source.open(&transport, None).await;
    let mut log = Log::default();
    log.fill(&mut *consumer, 100).await;
    log.assert_order(0..100);
    log.quiet(&mut *consumer).await;
    assert_eq!(log.copies, 0, "what was read from the stream was not acked");
}

/// Headers that break a client's parser break its connection, at every delivery. They are read
/// by sequence instead, kept, and acked, so that they do it only once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn C1_headers_that_no_client_can_read_do_not_stop_the_flow() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let server = NatsServer::start();
    let proxy = Proxy::to(server.port()).await;
    let (jetstream, params) = plain(&server).await;
    let source = source_of(&params, "t.x");
    let transport = NatsTransport::new(options(proxy.port()));
    publish(&jetstream, &source.messages(0..10)).await;
    let mut raw = tokio::net::TcpStream::connect(("127.0.0.1", server.port())).await.unwrap();
    raw.write_all(b"CONNECT {\"verbose\":true,\"headers\":true}\r\n").await.unwrap();
    for (n, bad) in [
        &b"NATS/1.0\r\nno colon\r\n\r\n"[..],
        b"NATS/1.0\r\nx: \xff\r\n\r\n",
        b"NATS/1.0\r\nx: a\rb\r\n\r\n",
        b"NATS/1.0 oops\r\n\r\n",
        b"NATS/1.0\r\n: x\r\n\r\n",
    ]
    .into_iter()
    .enumerate()
    {
        let body = format!("\"{}\"", 10 + n);
        let head = format!("HPUB t.x {} {}\r\n", bad.len(), bad.len() + body.len());
        raw.write_all(&[head.as_bytes(), bad, body.as_bytes(), b"\r\n"].concat()).await.unwrap();
    }
    raw.write_all(b"PING\r\n").await.unwrap();
    let mut said = Vec::new();
    within("the answer", async {
        while !said.ends_with(b"PONG\r\n") {
            said.push(raw.read_u8().await.unwrap());
        }
    })
    .await;
    assert!(!String::from_utf8_lossy(&said).contains("-ERR"));
    publish(&jetstream, &source.messages(15..40)).await;

    let (mut consumer, _) = source.open(&transport, None).await;
    let mut log = Log::default();
    log.fill(&mut *consumer, 40).await;
    log.assert_order(0..40);
    // Settled like any other: nothing breaks the connection again.
    log.quiet(&mut *consumer).await;
    let connections = proxy.accepted();
    log.quiet(&mut *consumer).await;
    assert_eq!(proxy.accepted(), connections, "they come again and again");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn C1_bodies_larger_than_the_room_come_one_at_a_time() {
    let server = NatsServer::start();
    let (jetstream, params) = plain(&server).await;
    let source = source_of(&params, "t.x");
    let transport = NatsTransport::new(options(server.port()));
    let large: Vec<_> = (0..12)
        .map(|n| {
            let size = if n % 3 == 0 { 10 } else { 900_000 };
            Outbound { body: vec![b'x'; size].into(), ..source.message(n) }
        })
        .collect();
    publish(&jetstream, &large).await;
    let (mut consumer, _) = source.open(&transport, None).await;
    let began = Instant::now();
    let mut seen = Vec::new();
    while seen.len() < large.len() {
        let room = Room { messages: 100, bytes: 1_000 };
        let deliveries = within("a large one", consumer.next(room)).await.unwrap();
        seen.extend(deliveries.messages.iter().map(|m| m.body.len()));
        ack(deliveries.settle, deliveries.messages.len()).await;
    }
    assert_eq!(seen, large.iter().map(|m| m.body.len()).collect::<Vec<_>>());
    assert!(began.elapsed() < Duration::from_secs(15), "took {:?}", began.elapsed());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_consumer_that_differs_is_refused_by_field_and_left_alone() {
    let server = NatsServer::start();
    let (jetstream, params) = plain(&server).await;
    let transport = NatsTransport::new(options(server.port()));
    try_open(&transport, &params).await.unwrap();
    let stream = jetstream.get_stream("T").await.unwrap();
    let cases: [(&str, NatsSource); 3] = [
        ("filter_subject", NatsSource { subject: Some("t.other".into()), ..params.clone() }),
        ("ack_wait", NatsSource { ack_wait: Some(Duration::from_secs(9)), ..params.clone() }),
        ("max_ack_pending", NatsSource { max_ack_pending: Some(5), ..params.clone() }),
    ];
    for (field, different) in cases {
        let error = try_open(&transport, &different).await.unwrap_err();
        assert!(matches!(error, TransportError::Misconfigured(_)), "{error:?}");
        assert!(error.to_string().contains(field), "{error}");
    }
    for (name, config) in [
        (
            "ack_policy",
            jetstream::consumer::Config {
                durable_name: Some("none".into()),
                ack_policy: jetstream::consumer::AckPolicy::None,
                ..Default::default()
            },
        ),
        (
            "deliver_subject",
            jetstream::consumer::Config {
                durable_name: Some("push".into()),
                deliver_subject: Some("elsewhere".into()),
                ack_policy: jetstream::consumer::AckPolicy::Explicit,
                ..Default::default()
            },
        ),
        (
            "deliver_policy is `last`, expected `all`",
            jetstream::consumer::Config {
                durable_name: Some("last".into()),
                deliver_policy: jetstream::consumer::DeliverPolicy::Last,
                ..Default::default()
            },
        ),
        (
            "replay_policy is `original`, expected `instant`",
            jetstream::consumer::Config {
                durable_name: Some("slow".into()),
                replay_policy: jetstream::consumer::ReplayPolicy::Original,
                ..Default::default()
            },
        ),
    ] {
        let consumer = config.durable_name.clone().unwrap();
        stream.create_consumer(config).await.unwrap();
        let error = try_open(&transport, &NatsSource { consumer, ..params.clone() }).await;
        let error = error.unwrap_err().to_string();
        assert!(error.contains(name), "{error}");
    }
    let info = stream.consumer_info("pulsebus").await.unwrap();
    assert_eq!(info.config.ack_wait, Duration::from_secs(1));
    assert_eq!(info.config.filter_subject, "");

    // What the server gives up is read from the stream, unless several daemons share it.
    let finite = jetstream::consumer::Config {
        durable_name: Some("finite".into()),
        ack_wait: Duration::from_secs(1),
        max_deliver: 3,
        ..Default::default()
    };
    stream.create_consumer(finite).await.unwrap();
    let finite = NatsSource { consumer: "finite".into(), ..params };
    try_open(&transport, &finite).await.unwrap();
    let spec = SourceSpec {
        name: "test".into(),
        params: serde_json::to_value(finite).unwrap(),
        competing: true,
        resume: None,
        reporter: Reporter::new("test"),
    };
    let Err(error) = transport.consumer(spec).await else { panic!("it was opened") };
    assert!(error.to_string().contains("max_deliver is `3`, expected `-1`"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_missing_stream_is_said_and_made_only_where_configured() {
    let server = NatsServer::start();
    let transport = NatsTransport::new(options(server.port()));
    let missing = params("NEW");
    let error = try_open(&transport, &missing).await.unwrap_err();
    assert!(matches!(error, TransportError::Misconfigured(_)), "{error:?}");
    let create = NatsStreamCreate {
        subjects: vec!["new.>".into()],
        retention: Some("workqueue".into()),
        storage: Some("memory".into()),
        replicas: None,
    };
    let created = NatsSource { create: Some(create.clone()), ..missing.clone() };
    try_open(&transport, &created).await.unwrap();
    let jetstream = server.jetstream().await;
    let info = jetstream.get_stream("NEW").await.unwrap().cached_info().config.clone();
    assert_eq!(info.subjects, ["new.>"]);
    assert_eq!(info.retention, jetstream::stream::RetentionPolicy::WorkQueue);
    assert_eq!(info.storage, jetstream::stream::StorageType::Memory);

    // One that is there is never changed, and what differs is named.
    let differing = [
        ("subjects", NatsStreamCreate { subjects: vec!["other.>".into()], ..create.clone() }),
        ("retention", NatsStreamCreate { retention: Some("limits".into()), ..create.clone() }),
        ("storage", NatsStreamCreate { storage: Some("file".into()), ..create.clone() }),
        ("replicas", NatsStreamCreate { replicas: Some(3), ..create.clone() }),
    ];
    for (field, create) in differing {
        let asked = NatsSource { create: Some(create), ..missing.clone() };
        let error = try_open(&transport, &asked).await.unwrap_err();
        assert!(matches!(error, TransportError::Misconfigured(_)), "{error:?}");
        assert!(error.to_string().contains(&format!("asks for: {field}")), "{field}: {error}");
    }
    let narrower = NatsStreamCreate { subjects: vec!["new.a".into()], ..create.clone() };
    let narrower = NatsStreamCreate { retention: None, storage: None, ..narrower };
    try_open(&transport, &NatsSource { create: Some(narrower), ..missing.clone() }).await.unwrap();
    assert_eq!(jetstream.get_stream("NEW").await.unwrap().cached_info().config, info);

    let clash = NatsSource { create: Some(create), ..params("CLASH") };
    let error = try_open(&transport, &clash).await.unwrap_err();
    assert!(matches!(error, TransportError::Misconfigured(_)), "{error:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn credentials_are_read_anew_and_never_shown() {
    let server = NatsServer::start_with(&["--user", "pulse", "--pass", "s3cret"]);
    let dir = crate::support::process::folder("password");
    let file = dir.join("password");
    std::fs::write(&file, "wr0ng\n").unwrap();
    let transport = NatsTransport::new(NatsOptions {
        user: Some("pulse".into()),
        password: Some(Secret::File(file.clone())),
        ..options(server.port())
    });
    let create = NatsStreamCreate {
        subjects: vec!["auth.>".into()],
        retention: None,
        storage: None,
        replicas: None,
    };
    let params = NatsSource { create: Some(create), ..params("AUTH") };
    let error = try_open(&transport, &params).await.unwrap_err();
    assert!(matches!(error, TransportError::Unavailable(_)), "{error:?}");
    assert!(error.to_string().contains("refused the credentials"), "{error}");
    assert!(!error.to_string().contains("wr0ng"));
    std::fs::write(&file, "s3cret\n").unwrap();
    try_open(&transport, &params).await.unwrap();

    let url = format!("nats://pulse:s3cret@127.0.0.1:{}", server.port());
    let by_url =
        NatsTransport::new(NatsOptions { url: Secret::Inline(url), ..NatsOptions::default() });
    try_open(&by_url, &params).await.unwrap();
    assert!(!format!("{by_url:?}").contains("s3cret"));

    let gone = NatsTransport::new(NatsOptions {
        url: Secret::Inline("nats://pulse:s3cret@127.0.0.1:1".into()),
        ..NatsOptions::default()
    });
    let error = try_open(&gone, &params).await.unwrap_err();
    assert!(matches!(error, TransportError::Unavailable(_)), "{error:?}");
    assert!(!error.to_string().contains("s3cret"), "{error}");
}

/// Two consumers of one durable name: every message comes to one of them, and no order is kept.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn C1_competing_consumers_share_the_work() {
    let server = NatsServer::start();
    let (jetstream, params) = plain(&server).await;
    let source = source_of(&params, "t.x");
    let transport = NatsTransport::new(options(server.port()));
    let open = || async {
        let spec = SourceSpec {
            name: "competing".into(),
            params: source.params.clone(),
            competing: true,
            resume: None,
            reporter: Reporter::new("competing"),
        };
        transport.consumer(spec).await.unwrap()
    };
    let (mut one, mut two) = (open().await, open().await);
    publish(&jetstream, &source.messages(0..1_000)).await;
    let (mut seen, mut of_two) = (Vec::new(), 0);
    within("all of them", async {
        while seen.len() < 1_000 {
            let room = Room { messages: 20, ..ROOM };
            let (deliveries, second) = tokio::select! {
                next = one.next(room) => (next.unwrap(), false),
                next = two.next(room) => (next.unwrap(), true),
            };
            assert_eq!(deliveries.mark, None);
            seen.extend(deliveries.messages.iter().map(id));
            of_two += if second { deliveries.messages.len() } else { 0 };
            ack(deliveries.settle, deliveries.messages.len()).await;
        }
    })
    .await;
    seen.sort();
    seen.dedup();
    assert_eq!(seen.len(), 1_000, "a message came twice");
    assert!(of_two > 0 && of_two < 1_000, "{of_two} of 1,000 to the second");
}

/// Not a measurement, a floor: one round trip, task or flush for each message would be below it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bare_loop_is_pipelined() {
    let server = NatsServer::start();
    let proxy = Proxy::to(server.port()).await;
    let (jetstream, params) = plain(&server).await;
    let params = NatsSource { ack_wait: None, batch: Some(2_000), ..params };
    let source = source_of(&params, "t.x");
    let transport = NatsTransport::new(options(proxy.port()));
    publish(&jetstream, &source.messages(0..20_000)).await;
    let (mut consumer, _) = source.open(&transport, None).await;
    proxy.delay(Duration::from_millis(10));
    let began = Instant::now();
    let mut seen = 0;
    while seen < 20_000 {
        let room = Room { messages: 10_000, bytes: 64 << 20 };
        let deliveries = within("messages", consumer.next(room)).await.unwrap();
        seen += deliveries.messages.len();
        deliveries.settle.settle(vec![stored(); deliveries.messages.len()]).await;
    }
    let took = began.elapsed();
    assert!(took < DEADLINE / 6, "20,000 messages at 20 ms a round trip took {took:?}");
}

/// Deliveries of this consumer that go to somebody else, who never settles them: to us they are
/// lost in the middle, and only the consumer sequence shows it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn C3_deliveries_lost_in_the_middle_are_read_first() {
    let server = NatsServer::start();
    let (jetstream, params) = plain(&server).await;
    let source = source_of(&params, "t.x");
    let transport = NatsTransport::new(options(server.port()));
    let (mut consumer, _) = source.open(&transport, None).await;
    let stream = jetstream.get_stream("T").await.unwrap();
    let thief: jetstream::consumer::PullConsumer = stream.get_consumer("pulsebus").await.unwrap();
    let mut log = Log::default();
    for round in 0..3 {
        publish(&jetstream, &source.messages(round * 100..round * 100 + 60)).await;
        let mut stolen = thief.fetch().max_messages(30).messages().await.unwrap();
        while let Some(message) = stolen.next().await {
            drop(message.unwrap());
        }
        publish(&jetstream, &source.messages(round * 100 + 60..round * 100 + 100)).await;
        log.fill(&mut *consumer, round * 100 + 100).await;
    }
    log.assert_order(0..300);
    log.quiet(&mut *consumer).await;
}
