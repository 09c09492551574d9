//! RabbitMQ against the contract, and what only RabbitMQ does.

use std::{
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use lapin::{
    BasicProperties, Connection, ConnectionProperties, ExchangeKind,
    options::{
        BasicPublishOptions, ConfirmSelectOptions, ExchangeDeclareOptions, QueueBindOptions,
        QueueDeclareOptions, QueueDeleteOptions,
    },
    types::{AMQPValue, DecimalValue, FieldTable},
};
use pulsebus::{
    event::{HeaderValue, Headers},
    secret::Secret,
    transport::{
        Consumer, Outbound, PublishError, Reporter, Room, Settlement, SourceSpec, SourceState,
        Transport, TransportError,
        amqp::{AmqpOptions, AmqpTransport},
    },
};
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

use crate::{
    conformance::transport::{Fixture, Log, Source, ack, hold, id, stored, until_state, within},
    support::{
        proxy::{Mode, Proxy},
        rabbit::{self, RabbitNode},
    },
};

const ROOM: Room = Room { messages: 500, bytes: 16 << 20 };

fn options(uri: &str) -> AmqpOptions {
    AmqpOptions {
        url: Secret::Inline(uri.to_owned()),
        password: None,
        tls: None,
        timeout: Duration::from_secs(10),
        heartbeat: Duration::from_secs(10),
    }
}

fn transport(uri: &str) -> AmqpTransport {
    AmqpTransport::new(options(uri)).unwrap()
}

/// A client of its own, for what the transport is not to do itself.
async fn client(uri: &str) -> (Connection, lapin::Channel) {
    let connection = Connection::connect(uri, ConnectionProperties::default()).await.unwrap();
    let channel = connection.create_channel().await.unwrap();
    channel.confirm_select(ConfirmSelectOptions::default()).await.unwrap();
    (connection, channel)
}

async fn declare(channel: &lapin::Channel, queue: &str, kind: &str) {
    let mut arguments = FieldTable::default();
    arguments.insert("x-queue-type".into(), AMQPValue::LongString(kind.into()));
    let durable = QueueDeclareOptions { durable: true, ..Default::default() };
    channel.queue_declare(queue.into(), durable, arguments).await.unwrap();
}

async fn delete(channel: &lapin::Channel, queue: &str) {
    channel.queue_delete(queue.into(), QueueDeleteOptions::default()).await.unwrap();
}

fn outbound(exchange: Option<&str>, address: &str) -> Outbound {
    Outbound {
        id: "".into(),
        address: address.into(),
        exchange: exchange.map(Into::into),
        headers: Headers::new(),
        body: Bytes::new(),
    }
}

/// A source on a queue that is reached through the default exchange.
fn source_of(queue: &str, params: Value) -> Source {
    Source { params, template: outbound(None, queue), in_flight: 1_000 }
}

fn spec(params: Value) -> SourceSpec {
    SourceSpec {
        name: "test".into(),
        params,
        competing: false,
        resume: None,
        reporter: Reporter::new("test"),
    }
}

async fn refused(transport: &AmqpTransport, params: Value) -> TransportError {
    match transport.consumer(spec(params)).await {
        Ok(_) => panic!("opened"),
        Err(error) => error,
    }
}

/// Properties, by the test's own reading of the specification.
fn properties(message: &Outbound) -> BasicProperties {
    let mut table = FieldTable::default();
    let mut properties =
        BasicProperties::default().with_message_id((&*message.id).into()).with_delivery_mode(2);
    for (name, value) in message.headers.iter() {
        let text = || lapin::types::ShortString::from(value.as_str().unwrap());
        properties = match name {
            ":content_type" => properties.with_content_type(text()),
            ":content_encoding" => properties.with_content_encoding(text()),
            ":correlation_id" => properties.with_correlation_id(text()),
            ":reply_to" => properties.with_reply_to(text()),
            ":expiration" => properties.with_expiration(text()),
            ":type" => properties.with_type(text()),
            ":user_id" => properties.with_user_id(text()),
            ":app_id" => properties.with_app_id(text()),
            ":cluster_id" => properties.with_cluster_id(text()),
            ":delivery_mode" => match value {
                HeaderValue::Uint8(v) => properties.with_delivery_mode(*v),
                _ => panic!("{value:?}"),
            },
            ":priority" => match value {
                HeaderValue::Uint8(v) => properties.with_priority(*v),
                _ => panic!("{value:?}"),
            },
            ":timestamp" => match value {
                HeaderValue::Timestamp(v) => properties.with_timestamp(*v),
                _ => panic!("{value:?}"),
            },
            _ => {
                let name = if name.starts_with("::") { &name[1..] } else { name };
                table.insert(name.into(), amqp(value));
                properties
            }
        };
    }
    properties.with_headers(table)
}

fn amqp(value: &HeaderValue) -> AMQPValue {
    match value {
        HeaderValue::Text(v) | HeaderValue::Short(v) => AMQPValue::LongString(v.as_str().into()),
        HeaderValue::Bool(v) => AMQPValue::Boolean(*v),
        HeaderValue::Int8(v) => AMQPValue::ShortShortInt(*v),
        HeaderValue::Uint8(v) => AMQPValue::ShortShortUInt(*v),
        HeaderValue::Int16(v) => AMQPValue::ShortInt(*v),
        HeaderValue::Uint16(v) => AMQPValue::ShortUInt(*v),
        HeaderValue::Int32(v) => AMQPValue::LongInt(*v),
        HeaderValue::Uint32(v) => AMQPValue::LongUInt(*v),
        HeaderValue::Int64(v) => AMQPValue::LongLongInt(*v),
        HeaderValue::Float32(v) => AMQPValue::Float(f32::from_bits(*v)),
        HeaderValue::Float64(v) => AMQPValue::Double(f64::from_bits(*v)),
        HeaderValue::Decimal(scale, value) => {
            AMQPValue::DecimalValue(DecimalValue { scale: *scale, value: *value })
        }
        HeaderValue::Timestamp(v) => AMQPValue::Timestamp(*v),
        HeaderValue::Bytes(v) => AMQPValue::ByteArray(v.as_slice().into()),
        HeaderValue::Binary(v) => AMQPValue::LongString(v.as_slice().into()),
        HeaderValue::Array(v) => {
            AMQPValue::FieldArray(v.iter().map(amqp).collect::<Vec<_>>().into())
        }
        HeaderValue::Table(v) => {
            let mut table = FieldTable::default();
            for (name, value) in v.iter() {
                table.insert(name.into(), amqp(value));
            }
            AMQPValue::FieldTable(table)
        }
        HeaderValue::Void => AMQPValue::Void,
    }
}

/// A header of each type that a RabbitMQ table carries.
fn typed_headers() -> Headers {
    let mut table = Headers::new();
    table.push(":inner", HeaderValue::Uint16(7));
    table.push("list", HeaderValue::Array(vec!["x".into(), HeaderValue::Void]));
    let values = [
        HeaderValue::from("text"),
        HeaderValue::Bool(true),
        HeaderValue::Int8(-1),
        HeaderValue::Uint8(200),
        HeaderValue::Int16(-300),
        HeaderValue::Uint16(60_000),
        HeaderValue::Int32(-70_000),
        HeaderValue::Uint32(4_000_000_000),
        HeaderValue::Int64(i64::MIN),
        HeaderValue::Float32(1.5_f32.to_bits()),
        HeaderValue::Float64(0.1_f64.to_bits()),
        HeaderValue::Decimal(2, 12_345),
        HeaderValue::Timestamp(1_700_000_000),
        HeaderValue::Bytes(vec![0, 255]),
        HeaderValue::Binary(vec![0xff, 0xfe]),
        HeaderValue::Array(vec![HeaderValue::Int32(1), "two".into()]),
        HeaderValue::Table(table),
        HeaderValue::Void,
    ];
    let mut headers = Headers::new();
    for (n, value) in values.into_iter().enumerate() {
        headers.push(format!("h{n:02}"), value);
    }
    headers.push("::type", "a table entry that looks like a property");
    headers.push(":content_type", "application/json");
    headers.push(":content_encoding", "identity");
    headers.push(":priority", HeaderValue::Uint8(3));
    headers.push(":correlation_id", "c-1");
    headers.push(":reply_to", "somewhere");
    headers.push(":timestamp", HeaderValue::Timestamp(1_700_000_001));
    headers.push(":type", "LessonPublished");
    headers.push(":app_id", "lessons");
    headers.push(":cluster_id", "old");
    headers
}

/// `CREATE`: a quorum queue behind an exchange, which the source creates where it is missing.
/// Otherwise: a classic queue that has to exist.
struct Rabbit<const CREATE: bool> {
    proxy: Proxy,
    transport: AmqpTransport,
    _connection: Connection,
    channel: lapin::Channel,
    sources: AtomicUsize,
}

impl<const CREATE: bool> Rabbit<CREATE> {
    fn queue(source: &Source) -> &str {
        source.params["queue"].as_str().unwrap()
    }

    async fn declare(&self, queue: &str) {
        declare(&self.channel, queue, if CREATE { "quorum" } else { "classic" }).await;
        if CREATE {
            let durable = ExchangeDeclareOptions { durable: true, ..Default::default() };
            let none = FieldTable::default();
            self.channel
                .exchange_declare("events".into(), ExchangeKind::Topic, durable, none.clone())
                .await
                .unwrap();
            let (key, bind) = (format!("{queue}.#"), QueueBindOptions::default());
            self.channel
                .queue_bind(queue.into(), "events".into(), key.into(), bind, none)
                .await
                .unwrap();
        }
    }
}

#[async_trait]
impl<const CREATE: bool> Fixture for Rabbit<CREATE> {
    async fn start() -> Self {
        let vhost = rabbit::vhost().await;
        let proxy = Proxy::to(vhost.address.port()).await;
        let transport = transport(&vhost.uri_through(proxy.port()));
        let (connection, channel) = client(&vhost.uri).await;
        Self { proxy, transport, _connection: connection, channel, sources: AtomicUsize::new(0) }
    }

    fn transport(&self) -> &dyn Transport {
        &self.transport
    }

    async fn fresh_source(&self) -> Source {
        let queue = format!("queue-{}", self.sources.fetch_add(1, Ordering::Relaxed));
        self.declare(&queue).await;
        let bind = json!([{"exchange": "events", "routing_key": format!("{queue}.#")}]);
        if CREATE {
            Source {
                params: json!({"queue": queue, "prefetch": 300, "create": {"bind": bind}}),
                template: outbound(Some("events"), &format!("{queue}.a.b")),
                in_flight: 300,
            }
        } else {
            let params = json!({"queue": queue, "prefetch": 200});
            Source { in_flight: 200, ..source_of(&queue, params) }
        }
    }

    async fn publish(&self, messages: &[Outbound]) {
        let mut confirms = Vec::new();
        for message in messages {
            let confirm = self
                .channel
                .basic_publish(
                    message.exchange.as_deref().unwrap_or("").into(),
                    (&*message.address).into(),
                    BasicPublishOptions::default(),
                    &message.body,
                    properties(message),
                )
                .await
                .unwrap();
            confirms.push(confirm);
        }
        for confirm in confirms {
            assert!(confirm.await.unwrap().is_ack());
        }
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
        delete(&self.channel, Self::queue(source)).await;
    }

    async fn mend_subscription(&self, source: &Source) {
        if !CREATE {
            self.declare(Self::queue(source)).await;
        }
    }

    async fn delay(&self, by: Duration) {
        self.proxy.delay(by);
    }

    fn refused(&self, source: &Source) -> Vec<Outbound> {
        let headed = |name: String, value: String| {
            let mut headers = Headers::new();
            headers.push(name, value);
            Outbound { headers, ..source.message("headed") }
        };
        vec![
            source.message("x".repeat(256)),
            Outbound { address: "x".repeat(256).into(), ..source.message("addressed") },
            headed("x".repeat(256), "1".to_owned()),
            headed("large".to_owned(), "x".repeat(200_000)),
            // Above the node's max_message_size, which it says by closing the channel.
            Outbound { body: vec![b'x'; 5 << 20].into(), ..source.message("large") },
        ]
    }

    fn unroutable(&self, source: &Source) -> Outbound {
        Outbound { address: "nowhere".into(), ..source.message("unroutable") }
    }

    fn headers(&self) -> Headers {
        let mut headers = typed_headers();
        headers.push(":delivery_mode", HeaderValue::Uint8(2));
        headers.push(":expiration", "600000");
        headers.push(":user_id", "guest");
        headers
    }
}

mod classic {
    crate::transport_conformance!(super::Rabbit<false>);
}

mod quorum {
    crate::transport_conformance!(super::Rabbit<true>);
}

async fn drain(consumer: &mut dyn Consumer, log: &mut Log, until: usize) {
    log.fill(consumer, until).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn G9_typed_headers_survive_publisher_and_broker() {
    let f = Rabbit::<true>::start().await;
    let source = f.fresh_source().await;
    let headers = typed_headers();
    let publisher = f.transport.publisher().await.unwrap();
    let message = Outbound { headers: headers.clone(), ..source.message("typed") };
    assert_eq!(publisher.publish(vec![message]).await, [Ok(())]);
    let (mut consumer, _) = source.open(&f.transport, None).await;
    let deliveries = within("the message", consumer.next(ROOM)).await.unwrap();
    let received = &deliveries.messages[0];
    let mut wanted = headers;
    wanted.push(":message_id", "typed");
    wanted.push(":delivery_mode", HeaderValue::Uint8(2));
    let sorted = |headers: &Headers| {
        let mut all: Vec<_> = headers.iter().map(|(n, v)| format!("{n}: {v:?}")).collect();
        all.sort();
        all
    };
    assert_eq!(sorted(&received.headers), sorted(&wanted));
    assert_eq!(received.origin.channel.as_deref(), Some("queue-0"));
    assert_eq!(received.origin.exchange.as_deref(), Some("events"));
    assert_eq!(&*received.origin.subject, "queue-0.a.b");
}

/// Every message has its own outcome, though the driver hands returns to whichever confirm.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn P1_returns_find_their_messages_under_load() {
    let f = Rabbit::<false>::start().await;
    let source = f.fresh_source().await;
    let publisher = f.transport.publisher().await.unwrap();
    let total = 6_000;
    let is_lost = |n: usize| n % 7 < 3 && !n.is_multiple_of(5);
    for round in 0..3 {
        let messages: Vec<_> = (0..total)
            .map(|n| {
                let message = source.message(format!("{round}-{n}"));
                match is_lost(n) {
                    true => Outbound { address: "nowhere".into(), ..message },
                    false => message,
                }
            })
            .collect();
        // Several calls at once, so that confirms of one meet returns of the other.
        let calls = messages.chunks(500).map(|part| publisher.publish(part.to_vec()));
        let results = futures_util::future::join_all(calls).await.concat();
        for (n, result) in results.iter().enumerate() {
            if is_lost(n) {
                let Err(PublishError::Failed(text)) = result else { panic!("{n}: {result:?}") };
                assert!(text.contains("unroutable") && text.contains("nowhere"), "{text}");
            } else {
                assert_eq!(*result, Ok(()), "{n}");
            }
        }
    }
    // The same id to two places: one is routed, the other is not.
    let same = source.message("same");
    let lost = Outbound { address: "nowhere".into(), ..same.clone() };
    let results = publisher.publish(vec![lost.clone(), same, lost]).await;
    assert!(matches!(
        results[..],
        [Err(PublishError::Failed(_)), Ok(()), Err(PublishError::Failed(_))]
    ));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn P3_a_missing_exchange_fails_its_own_messages() {
    let f = Rabbit::<true>::start().await;
    let source = f.fresh_source().await;
    let publisher = f.transport.publisher().await.unwrap();
    let messages: Vec<_> = (0..900)
        .map(|n| match n % 300 {
            150 => Outbound { exchange: Some("gone".into()), ..source.message(n) },
            _ => source.message(n),
        })
        .collect();
    let results = publisher.publish(messages).await;
    for (n, result) in results.iter().enumerate() {
        if n % 300 == 150 {
            let Err(PublishError::Failed(text)) = result else { panic!("{n}: {result:?}") };
            assert!(text.contains("no exchange 'gone'"), "{text}");
        } else {
            assert_eq!(*result, Ok(()), "{n}");
        }
    }
    let (mut consumer, _) = source.open(&f.transport, None).await;
    let mut log = Log::default();
    drain(&mut *consumer, &mut log, 897).await;
    log.assert_order((0..900).filter(|n| n % 300 != 150));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_missing_or_differs_is_said() {
    let vhost = rabbit::vhost().await;
    let transport = transport(&vhost.uri);
    let misconfigured = |error: TransportError| match error {
        TransportError::Misconfigured(text) => text,
        other @ TransportError::Unavailable(_) => panic!("{other:?}"),
    };
    let text = misconfigured(refused(&transport, json!({"queue": "none"})).await);
    assert!(text.contains("`none` does not exist"), "{text}");
    let text = misconfigured(refused(&transport, json!({"queue": "q", "prefetsch": 1})).await);
    assert!(text.contains("prefetsch"), "{text}");

    let (_connection, channel) = client(&vhost.uri).await;
    declare(&channel, "old", "classic").await;
    let create = json!({"queue": "old", "create": {}});
    let text = misconfigured(refused(&transport, create).await);
    assert!(text.contains("queue `old`"), "{text}");
    assert!(text.contains("x-queue-type is `classic`, expected `quorum`"), "{text}");

    // An exchange of another type, and one of the right type whose other settings are its own.
    let none = FieldTable::default;
    let durable = ExchangeDeclareOptions { durable: true, ..Default::default() };
    let direct = ExchangeKind::Direct;
    channel.exchange_declare("direct".into(), direct, durable, none()).await.unwrap();
    let mut arguments = none();
    arguments.insert("alternate-exchange".into(), AMQPValue::LongString("direct".into()));
    let topic = ExchangeKind::Topic;
    channel.exchange_declare("topic".into(), topic, durable, arguments).await.unwrap();
    let bound = |exchange: &str, kind: Option<&str>| {
        let bind = json!([{"exchange": exchange, "routing_key": "#", "exchange_type": kind}]);
        json!({"queue": "bound", "create": {"bind": bind}})
    };
    let text = misconfigured(refused(&transport, bound("direct", Some("topic"))).await);
    assert!(text.contains("exchange `direct`"), "{text}");
    assert!(text.contains("type is `direct`, expected `topic`"), "{text}");
    for (exchange, kind) in [("topic", Some("topic")), ("direct", None)] {
        drop(transport.consumer(spec(bound(exchange, kind))).await.unwrap());
    }

    // Created with everything that it needs.
    let create = json!({"queue": "new", "create": {
        "arguments": {"x-delivery-limit": 50},
        "bind": [{"exchange": "made", "routing_key": "a.*"}],
    }});
    let mut consumer = transport.consumer(spec(create.clone())).await.unwrap();
    let publisher = transport.publisher().await.unwrap();
    let message = Outbound { id: "1".into(), ..outbound(Some("made"), "a.b") };
    assert_eq!(publisher.publish(vec![message]).await, [Ok(())]);
    assert!(within("the message", consumer.next(ROOM)).await.is_some());
    drop(consumer);
    let mut other = create;
    other["create"]["arguments"]["x-delivery-limit"] = json!(51);
    let text = misconfigured(refused(&transport, other).await);
    assert!(text.contains("x-delivery-limit is `50`, expected `51`"), "{text}");

    let nowhere = AmqpTransport::new(options(&format!("{}-gone", vhost.uri))).unwrap();
    let text = misconfigured(refused(&nowhere, json!({"queue": "q"})).await);
    assert!(text.contains("-gone"), "{text}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_secret_is_printed() {
    let vhost = rabbit::vhost().await;
    let uri = vhost.uri.replace("guest:guest", "guest:hunter2");
    let transport = transport(&uri);
    let error = refused(&transport, json!({"queue": "q"})).await;
    assert!(matches!(&error, TransportError::Unavailable(text) if text.contains("credentials")));
    let publisher = transport.publisher().await.unwrap();
    let results = publisher.publish(vec![outbound(None, "q")]).await;
    assert!(matches!(results[..], [Err(PublishError::Unavailable(_))]), "{results:?}");
    let unparsable = AmqpTransport::new(options("amqp://guest:hunter2@[")).unwrap_err();
    for text in [
        format!("{error} {error:?}"),
        format!("{results:?}"),
        format!("{transport:?}"),
        format!("{unparsable} {unparsable:?}"),
    ] {
        assert!(!text.contains("hunter2"), "{text}");
    }
    // A password of its own takes the place of the URL's.
    let right = AmqpOptions { password: Some(Secret::Inline("guest".into())), ..options(&uri) };
    let publisher = AmqpTransport::new(right).unwrap().publisher().await.unwrap();
    let results = publisher.publish(vec![outbound(None, "q")]).await;
    assert!(matches!(results[..], [Err(PublishError::Failed(_))]), "{results:?}");
}

/// One delivery is tried again later; meanwhile the others flow, in and out of order.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn C6_a_held_delivery_holds_nobody_up() {
    let f = Rabbit::<true>::start().await;
    let source = f.fresh_source().await;
    f.publish(&source.messages(0..200)).await;
    let (mut consumer, _) = source.open(&f.transport, None).await;
    let mut log = Log::default();
    let mut batches = hold(&mut *consumer, 100).await;
    let mut first = Vec::new();
    for _ in 0..4 {
        let room = Room { messages: 10, ..ROOM };
        batches.push(within("a batch", consumer.next(room)).await.unwrap());
    }
    // The last batch first.
    for (n, deliveries) in batches.into_iter().rev().enumerate() {
        let mut settlements = vec![stored(); deliveries.messages.len()];
        settlements[0] = Settlement::Retry(Duration::from_millis(300 + 50 * n as u64));
        first.push(id(&deliveries.messages[0]));
        log.commit(&deliveries);
        deliveries.settle.settle(settlements).await;
    }
    drain(&mut *consumer, &mut log, 200).await;
    let mut again = log.copies;
    within("the held ones", async {
        while again < first.len() {
            let deliveries = consumer.next(ROOM).await.unwrap();
            again += deliveries.messages.len();
            assert!(deliveries.messages.iter().all(|m| first.contains(&id(m))));
            log.take(deliveries).await;
        }
    })
    .await;
    consumer.close().await;
    drop(consumer);
    let (mut consumer, _) = source.open(&f.transport, None).await;
    log.quiet(&mut *consumer).await;
    assert_eq!(log.copies, first.len(), "something acked came again, or something was lost");
}

/// FAULTS 5: killed with deliveries in flight; what is settled afterwards touches nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn C3_order_survives_a_killed_node_and_stale_acks() {
    let node = RabbitNode::start().await;
    let transport = transport(&node.uri());
    let (connection, channel) = client(&node.uri()).await;
    let mut sources = Vec::new();
    for kind in ["classic", "quorum"] {
        declare(&channel, kind, kind).await;
        let source = source_of(kind, json!({"queue": kind, "prefetch": 300}));
        let publisher = transport.publisher().await.unwrap();
        assert_eq!(publisher.publish(source.messages(0..1_000)).await, vec![Ok(()); 1_000]);
        publisher.close().await;
        let (mut consumer, reporter) = source.open(&transport, None).await;
        let held = hold(&mut *consumer, 200).await;
        sources.push((consumer, reporter, held));
    }
    node.sync().await;
    node.kill();
    drop((connection, channel));
    node.restart().await;
    for (mut consumer, reporter, held) in sources {
        let mut log = Log::default();
        // The first delivery of the new generation has tag 1, as the first of the old one had.
        let fresh = within("deliveries", async {
            loop {
                let deliveries = consumer.next(Room { messages: 100, ..ROOM }).await.unwrap();
                if id(&deliveries.messages[0]) == "0" {
                    break deliveries;
                }
            }
        })
        .await;
        for stale in held {
            let messages = stale.messages.len();
            ack(stale.settle, messages).await;
        }
        log.commit(&fresh);
        drop(fresh);
        consumer.close().await;
        assert_eq!(reporter.state(), SourceState::Stopped);
        drop(consumer);
    }
    within("that the stale acks took nothing", async {
        while messages_left(&node).await != (1_000, 1_000) {
            sleep(Duration::from_millis(100)).await;
        }
    })
    .await;
    for kind in ["classic", "quorum"] {
        let source = source_of(kind, json!({"queue": kind}));
        let (mut consumer, _) = source.open(&transport, None).await;
        let mut log = Log::default();
        drain(&mut *consumer, &mut log, 1_000).await;
        log.assert_order(0..1_000);
        log.quiet(&mut *consumer).await;
    }
}

/// How many messages the two queues have, by the broker's own count.
async fn messages_left(node: &RabbitNode) -> (usize, usize) {
    let listed = node.ctl(&["list_queues", "--no-table-headers", "name", "messages"]).await;
    let count = |queue: &str| {
        let line = listed.lines().find(|line| line.starts_with(queue));
        line.and_then(|line| line.split_whitespace().nth(1)?.parse().ok()).unwrap_or(0)
    };
    (count("classic"), count("quorum"))
}

/// FAULTS 6: a broker that is stopped for longer than its heartbeat.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn C9_a_frozen_node_is_noticed_and_order_kept() {
    let node = RabbitNode::start().await;
    let quick = AmqpOptions {
        heartbeat: Duration::from_secs(2),
        timeout: Duration::from_secs(2),
        ..options(&node.uri())
    };
    let transport = AmqpTransport::new(quick).unwrap();
    let (_connection, channel) = client(&node.uri()).await;
    declare(&channel, "q", "classic").await;
    let source = source_of("q", json!({"queue": "q", "prefetch": 100}));
    let publisher = transport.publisher().await.unwrap();
    assert_eq!(publisher.publish(source.messages(0..500)).await, vec![Ok(()); 500]);
    let (mut consumer, reporter) = source.open(&transport, None).await;
    let mut log = Log::default();
    drain(&mut *consumer, &mut log, 50).await;
    let held = hold(&mut *consumer, 50).await;
    let before = threads();

    node.stop();
    let noticed =
        until_state(&reporter, "reconnecting", |s| matches!(s, SourceState::Reconnecting(_)));
    tokio::select! {
        () = noticed => {}
        // What the driver held already.
        () = async { loop { drop(consumer.next(ROOM).await); } } => {}
    }
    let began = Instant::now();
    let results = publisher.publish(source.messages(500..510)).await;
    assert!(results.iter().all(|r| matches!(r, Err(PublishError::Unavailable(_)))), "{results:?}");
    assert!(began.elapsed() < Duration::from_secs(10), "said after {:?}", began.elapsed());
    // Attempts at a frozen broker leave nothing behind (G7).
    let _ = tokio::time::timeout(Duration::from_secs(12), consumer.next(ROOM)).await;
    let during = threads();
    assert!(during <= before + 4, "{before} threads have become {during}");

    node.go_on();
    drop(held);
    // What the frozen broker was sent may have reached it after all.
    let mut left = source.messages(500..510);
    within("that publishing works again", async {
        while !left.is_empty() {
            let results = publisher.publish(left.clone()).await;
            left =
                left.into_iter().zip(results).filter(|(_, r)| r.is_err()).map(|(m, _)| m).collect();
            sleep(Duration::from_millis(50)).await;
        }
    })
    .await;
    drain(&mut *consumer, &mut log, 510).await;
    log.assert_order(0..510);
}

/// The driver runs a thread for each connection.
fn threads() -> usize {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let names = tasks.flatten().map(|task| std::fs::read_to_string(task.path().join("comm")));
    names.filter(|name| name.as_ref().is_ok_and(|name| name.starts_with("lapin"))).count()
}

/// FAULTS 10: short of memory, the broker reads nothing more from those that publish.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn P6_a_blocked_connection_is_said_and_consuming_goes_on() {
    let node = RabbitNode::start().await;
    let transport = transport(&node.uri());
    let (_connection, channel) = client(&node.uri()).await;
    declare(&channel, "q", "quorum").await;
    let source = source_of("q", json!({"queue": "q", "prefetch": 100}));
    let publisher = transport.publisher().await.unwrap();
    assert_eq!(publisher.publish(source.messages(0..1_000)).await, vec![Ok(()); 1_000]);
    let (mut consumer, _) = source.open(&transport, None).await;
    let mut log = Log::default();
    drain(&mut *consumer, &mut log, 100).await;

    node.ctl(&["set_vm_memory_high_watermark", "0"]).await;
    for _ in 0..3 {
        let began = Instant::now();
        let results = publisher.publish(source.messages(1_000..1_010)).await;
        assert!(began.elapsed() < Duration::from_secs(15), "after {:?}", began.elapsed());
        for result in results {
            let Err(PublishError::Unavailable(text)) = result else { panic!("{result:?}") };
            assert!(text.contains("blocks publishers"), "{text}");
        }
    }
    drain(&mut *consumer, &mut log, 1_000).await;

    node.ctl(&["set_vm_memory_high_watermark", "0.6"]).await;
    let mut left = source.messages(1_000..1_100);
    within("that publishing works again", async {
        while !left.is_empty() {
            let results = publisher.publish(left.clone()).await;
            left =
                left.into_iter().zip(results).filter(|(_, r)| r.is_err()).map(|(m, _)| m).collect();
            sleep(Duration::from_millis(50)).await;
        }
    })
    .await;
    drain(&mut *consumer, &mut log, 1_100).await;
    log.assert_order(0..1_100);
}
