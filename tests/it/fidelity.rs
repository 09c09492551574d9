//! What comes out of a bridge is what went in (G9): generated messages through real servers and
//! a real log, read back by clients that are not ours.
//!
//! `docs/bridging.md` says what becomes of each header between two kinds of transport; the unit
//! tests of `handler/forward/carry.rs` hold the code to that table, and these hold servers,
//! drivers and stores to it.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, LazyLock},
    time::Duration,
};

use async_nats::{HeaderMap, HeaderName, jetstream};
use futures_util::StreamExt as _;
use lapin::{
    BasicProperties, Channel, Connection, ConnectionProperties,
    options::{BasicGetOptions, BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions},
    types::{AMQPValue, DecimalValue, FieldArray, FieldTable, ShortString},
};
use proptest::{collection, option, prelude::*, strategy::ValueTree as _, test_runner::TestRunner};
use pulsebus::{
    bus::EventBus,
    event::DecoderOptions,
    handler::forward::{ForwardHandler, ForwardOptions},
    ingest::{IngestOptions, Source},
    secret::Secret,
    store::sqlite::{SqliteOptions, SqliteStore},
    transport::{
        Transport,
        amqp::{AmqpOptions, AmqpTransport},
        http::{WebhookOptions, WebhookTransport},
        nats::{NatsOptions, NatsTransport},
    },
};
use serde_json::{Value, json};

use crate::support::{daemon::Daemon, nats::NatsServer, rabbit, wait_until};

/// Generated messages of each kind.
const MESSAGES: usize = 300;

/// A bus of its own, with one source and one `forward`: a copy is known by each log only.
struct Hop {
    bus: EventBus,
    _folder: tempfile::TempDir,
}

impl Hop {
    async fn new(
        from: (Arc<dyn Transport>, Value),
        to: (Arc<dyn Transport>, ForwardOptions),
    ) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store = SqliteStore::open(SqliteOptions::new(folder.path().join("events.db")));
        let bus = EventBus::builder().store(store.await.unwrap()).build().await.unwrap();
        let publisher = to.0.publisher().await.unwrap().into();
        bus.register_handler(ForwardHandler::new("forward", publisher, to.1).unwrap())
            .await
            .unwrap();
        bus.start_worker_pool(4);
        bus.add_source(Source {
            name: "in".into(),
            transport: from.0,
            params: from.1,
            competing: false,
            decoder: DecoderOptions::default(),
            options: IngestOptions::default(),
        });
        Self { bus, _folder: folder }
    }

    async fn end(self) {
        self.bus.drain(Duration::from_secs(20)).await.unwrap();
    }
}

fn bodies() -> impl Strategy<Value = String> {
    prop::sample::select(vec![
        r#"{"type":"T","data":1}"#,
        " {\"type\" : \"T\",\r\n\t\"data\":{\"n\":1e400,\"n\":1,\"s\":\"\\u00e9\\/\\ud800\"} } ",
        "[1.0, 1E+2, -0.0, \"žluť 🎉\"]",
        "null",
        r#"{"specversion":"1.0","id":"ID","source":"/s","type":"T","data":[]}"#,
    ])
    .prop_map(str::to_owned)
}

fn text() -> impl Strategy<Value = String> {
    prop_oneof![
        3 => "[a-zA-Z0-9 /._-]{0,12}",
        1 => "[\\PC]{0,12}",
        1 => "[ \r\n\ta%\"é]{0,6}",
    ]
}

// --- RabbitMQ -------------------------------------------------------------------------------

fn value() -> impl Strategy<Value = AMQPValue> {
    let leaf = prop_oneof![
        4 => text().prop_map(|v| AMQPValue::LongString(v.as_str().into())),
        1 => any::<bool>().prop_map(AMQPValue::Boolean),
        1 => any::<i8>().prop_map(AMQPValue::ShortShortInt),
        1 => any::<u8>().prop_map(AMQPValue::ShortShortUInt),
        1 => any::<i16>().prop_map(AMQPValue::ShortInt),
        1 => any::<u16>().prop_map(AMQPValue::ShortUInt),
        1 => any::<i32>().prop_map(AMQPValue::LongInt),
        1 => any::<u32>().prop_map(AMQPValue::LongUInt),
        1 => any::<i64>().prop_map(AMQPValue::LongLongInt),
        1 => any::<f32>().prop_filter("RabbitMQ reads no NaN", |v| v.is_finite()).prop_map(AMQPValue::Float),
        1 => any::<f64>().prop_filter("RabbitMQ reads no NaN", |v| v.is_finite()).prop_map(AMQPValue::Double),
        1 => any::<(u8, u32)>().prop_map(|(scale, value)| AMQPValue::DecimalValue(DecimalValue { scale, value })),
        1 => any::<u64>().prop_map(AMQPValue::Timestamp),
        1 => any::<Vec<u8>>().prop_map(|v| AMQPValue::ByteArray(v.as_slice().into())),
        1 => Just(AMQPValue::LongString([0xff, 0].as_slice().into())),
        1 => Just(AMQPValue::Void),
    ];
    leaf.prop_recursive(2, 12, 4, |inner| {
        prop_oneof![
            collection::vec(inner.clone(), 0..4)
                .prop_map(|v| AMQPValue::FieldArray(FieldArray::from(v))),
            collection::btree_map("[a-c:]{1,3}", inner, 0..4)
                .prop_map(|v| AMQPValue::FieldTable(table(v))),
        ]
    })
}

fn table(entries: BTreeMap<String, AMQPValue>) -> FieldTable {
    let mut table = FieldTable::default();
    for (name, value) in entries {
        table.insert(ShortString::from(name), value);
    }
    table
}

fn properties() -> impl Strategy<Value = BasicProperties> {
    let name = prop_oneof![
        4 => "[a-cA-C]{1,3}",
        1 => "[\\PC]{1,12}",
        1 => prop::sample::select(vec![
            ":type", "Content-Type", "content-type", "Amqp-Priority", "traceparent",
            "cloudEvents:ext", "cloudEvents_ext", "ce-ext", "Nats-Rollup", "authorization",
        ]).prop_map(str::to_owned),
    ];
    // By these RabbitMQ routes.
    let name = name.prop_filter("an order", |name| !matches!(&**name, "CC" | "BCC"));
    let short = || option::weighted(0.4, text().prop_map(ShortString::from));
    (
        collection::vec(short(), 7),
        option::of(any::<u8>()),
        option::of(any::<u64>()),
        collection::btree_map(name, value(), 0..6),
    )
        .prop_map(|(mut texts, priority, timestamp, headers)| {
            let mut next = || texts.pop().flatten();
            let mut all = BasicProperties::default().with_headers(table(headers));
            type Set = fn(BasicProperties, ShortString) -> BasicProperties;
            let setters: [Set; 7] = [
                // A content type of any text: JSON is recognised by its bytes.
                BasicProperties::with_content_type,
                BasicProperties::with_content_encoding,
                BasicProperties::with_correlation_id,
                BasicProperties::with_reply_to,
                BasicProperties::with_type,
                BasicProperties::with_app_id,
                BasicProperties::with_cluster_id,
            ];
            for set in setters {
                if let Some(text) = next() {
                    all = set(all, text);
                }
            }
            if let Some(priority) = priority {
                all = all.with_priority(priority);
            }
            if let Some(timestamp) = timestamp {
                all = all.with_timestamp(timestamp);
            }
            all
        })
}

struct Rabbit {
    uri: String,
    channel: Channel,
    transport: Arc<dyn Transport>,
    _connection: Connection,
}

impl Rabbit {
    async fn new() -> Self {
        let vhost = rabbit::vhost().await;
        let connection =
            Connection::connect(&vhost.uri, ConnectionProperties::default()).await.unwrap();
        let channel = connection.create_channel().await.unwrap();
        channel.confirm_select(ConfirmSelectOptions::default()).await.unwrap();
        let transport = AmqpTransport::new(AmqpOptions {
            url: Secret::Inline(vhost.uri.clone()),
            password: None,
            tls: None,
            timeout: Duration::from_secs(10),
            heartbeat: Duration::from_secs(10),
        });
        let transport = Arc::new(transport.unwrap());
        Self { uri: vhost.uri, channel, transport, _connection: connection }
    }

    async fn queue(&self, name: &str) {
        let durable = QueueDeclareOptions { durable: true, ..Default::default() };
        self.channel.queue_declare(name.into(), durable, FieldTable::default()).await.unwrap();
    }

    fn source(&self, queue: &str) -> (Arc<dyn Transport>, Value) {
        (Arc::clone(&self.transport), json!({ "queue": queue }))
    }

    /// To a queue, through the default exchange.
    fn sink(&self, queue: &str) -> (Arc<dyn Transport>, ForwardOptions) {
        let exchange = Some(String::new());
        let options = ForwardOptions { exchange, ..ForwardOptions::new("amqp", queue) };
        (Arc::clone(&self.transport), options)
    }

    async fn publish(&self, queue: &str, messages: &[(BasicProperties, String)]) {
        let options = BasicPublishOptions { mandatory: true, ..Default::default() };
        for (properties, body) in messages {
            self.channel
                .basic_publish(
                    "".into(),
                    queue.into(),
                    options,
                    body.as_bytes(),
                    properties.clone(),
                )
                .await
                .unwrap()
                .await
                .unwrap();
        }
    }

    /// All messages of a queue by their id, as a client prints them.
    async fn take(&self, queue: &str, count: usize) -> BTreeMap<String, (String, Vec<u8>)> {
        let mut taken = BTreeMap::new();
        wait_until(&format!("{count} messages are in {queue}"), async || {
            let ack = BasicGetOptions { no_ack: true };
            while let Some(got) = self.channel.basic_get(queue.into(), ack).await.unwrap() {
                let properties = got.delivery.properties.clone();
                let id = properties.message_id().as_ref().unwrap().to_string();
                let twice = taken.insert(id.clone(), (shown(&properties), got.delivery.data));
                assert!(twice.is_none(), "{id} came twice");
            }
            (taken.len() == count).then_some(())
        })
        .await;
        taken
    }
}

/// The properties as their driver prints them, less what `forward` adds.
fn shown(properties: &BasicProperties) -> String {
    let mut table = FieldTable::default();
    for (name, value) in properties.headers().iter().flatten() {
        if !name.as_str().starts_with("pulsebus-") {
            table.insert(name.clone(), value.clone());
        }
    }
    format!("{:?}", properties.clone().with_headers(table))
}

/// Messages with ids that are those of their events; what they are published as, and what a
/// client is to see in the end.
fn amqp_messages() -> Vec<(BasicProperties, String)> {
    let mut runner = TestRunner::deterministic();
    let messages = (properties(), bodies());
    (0..MESSAGES)
        .map(|n| {
            let (properties, body) = messages.new_tree(&mut runner).unwrap().current();
            let id = format!("m-{n}");
            let body = body.replace("\"ID\"", &format!("\"{id}\""));
            (properties.with_message_id(id.into()).with_delivery_mode(2), body)
        })
        .collect()
}

fn assert_same(
    published: &[(BasicProperties, String)],
    taken: &BTreeMap<String, (String, Vec<u8>)>,
) {
    for (properties, body) in published {
        let id = properties.message_id().as_ref().unwrap().as_str();
        let (found, bytes) = &taken[id];
        assert_eq!(bytes, body.as_bytes(), "{id}");
        assert_eq!(*found, shown(properties), "{id}");
    }
}

// --- NATS -----------------------------------------------------------------------------------

/// Names and values, sorted by name.
type Lines = Vec<(String, String)>;

struct Nats {
    context: jetstream::Context,
    transport: Arc<dyn Transport>,
    _server: NatsServer,
}

impl Nats {
    async fn new() -> Self {
        let server = NatsServer::start();
        let options = NatsOptions { url: Secret::Inline(server.url()), ..NatsOptions::default() };
        let context = server.jetstream().await;
        Self { context, transport: Arc::new(NatsTransport::new(options)), _server: server }
    }

    async fn stream(&self, name: &str) {
        let subjects = vec![format!("{name}.>")];
        let config = jetstream::stream::Config {
            name: name.to_owned(),
            subjects,
            ..jetstream::stream::Config::default()
        };
        self.context.create_stream(config).await.unwrap();
    }

    fn source(&self, stream: &str) -> (Arc<dyn Transport>, Value) {
        (Arc::clone(&self.transport), json!({ "stream": stream, "consumer": "bridge" }))
    }

    fn sink(&self, stream: &str) -> (Arc<dyn Transport>, ForwardOptions) {
        let options = ForwardOptions::new("nats", format!("{stream}.copy"));
        (Arc::clone(&self.transport), options)
    }

    async fn publish(&self, stream: &str, messages: &[(Lines, String)]) {
        for (n, (headers, body)) in messages.iter().enumerate() {
            let mut map = HeaderMap::new();
            map.insert("Nats-Msg-Id", format!("m-{n}").as_str());
            for (name, value) in headers {
                let name: HeaderName = name.parse().unwrap();
                map.append(name, value.as_str());
            }
            let body = body.replace("\"ID\"", &format!("\"m-{n}\""));
            self.context
                .publish_with_headers(format!("{stream}.first"), map, body.into())
                .await
                .unwrap()
                .await
                .unwrap();
        }
    }

    /// All messages of a stream by their id: headers less those of the server and of `forward`.
    async fn take(&self, stream: &str, count: usize) -> BTreeMap<String, (Lines, Vec<u8>)> {
        let mut stream = self.context.get_stream(stream).await.unwrap();
        wait_until(&format!("{count} messages are in the stream"), async || {
            let state = &stream.info().await.unwrap().state;
            (state.messages >= count as u64).then_some(())
        })
        .await;
        let last = stream.info().await.unwrap().state.last_sequence;
        // Not by sequence: that client keeps one value of a repeated header only.
        let config = jetstream::consumer::pull::OrderedConfig::default();
        let consumer = stream.create_consumer(config).await.unwrap();
        let mut messages = consumer.messages().await.unwrap();
        let mut taken = BTreeMap::new();
        for _ in 1..=last {
            let message = messages.next().await.unwrap().unwrap();
            let all = message.headers.clone().unwrap();
            let id = all.get("Nats-Msg-Id").unwrap().as_str().to_owned();
            let mut headers: Vec<_> = all
                .iter()
                .map(|(name, values)| (name.to_string(), values))
                .filter(|(name, _)| {
                    let name = name.to_ascii_lowercase();
                    !name.starts_with("nats-") && !name.starts_with("pulsebus-")
                })
                .flat_map(|(name, values)| {
                    values.iter().map(move |v| (name.clone(), v.as_str().to_owned()))
                })
                .collect();
            headers.sort_by(|(a, _), (b, _)| a.cmp(b));
            let twice = taken.insert(id.clone(), (headers, message.payload.to_vec()));
            assert!(twice.is_none(), "{id} came twice");
        }
        assert_eq!(taken.len(), count);
        taken
    }
}

fn nats_messages() -> Vec<(Lines, String)> {
    static PROPERTIES: LazyLock<BTreeSet<&str>> =
        LazyLock::new(|| BTreeSet::from(["content-type", "amqp-priority"]));
    let name = prop_oneof![
        4 => "[a-cA-C]{1,3}",
        1 => "[!-9;-~]{1,12}",
        1 => prop::sample::select(vec![
            "Content-Type", "content-type", "Amqp-Priority", "traceparent", "ce-ext", "x-tenant",
            "X-Tenant",
        ]).prop_map(str::to_owned),
    ];
    let name = name.prop_filter("the server's own", |name| {
        !name.get(..5).is_some_and(|start| start.eq_ignore_ascii_case("nats-"))
            && !matches!(&**name, "CC" | "BCC")
    });
    // Clients take the blanks around a value off.
    let line = prop_oneof![3 => "[a-zA-Z0-9/._-]{0,12}", 1 => "[\\PC]{0,12}"]
        .prop_map(|text| text.trim().to_owned());
    let messages = (collection::vec((name, line), 0..6), bodies());
    let mut runner = TestRunner::deterministic();
    (0..MESSAGES)
        .map(|_| {
            let (mut headers, body) = messages.new_tree(&mut runner).unwrap().current();
            // A property has one value.
            let mut seen = BTreeSet::new();
            headers.retain(|(name, _)| {
                let small = name.to_ascii_lowercase();
                !PROPERTIES.contains(&*small) || seen.insert(small)
            });
            headers.sort_by(|(a, _), (b, _)| a.cmp(b));
            (headers, body)
        })
        .collect()
}

fn assert_same_lines(
    published: &[(Lines, String)],
    taken: &BTreeMap<String, (Lines, Vec<u8>)>,
    across: bool,
) {
    for (n, (headers, body)) in published.iter().enumerate() {
        let id = format!("m-{n}");
        let (found, bytes) = &taken[&id];
        let body = body.replace("\"ID\"", &format!("\"{id}\""));
        assert_eq!(bytes, body.as_bytes(), "{id}");
        // A CloudEvents attribute is decoded on its way to AMQP, and encoded on its way back.
        let plain = |all: &[(String, String)]| -> Lines {
            let kept = all.iter().filter(|(name, _)| !across || !name.starts_with("ce-"));
            kept.cloned().collect()
        };
        assert_eq!(plain(found), plain(headers), "{id}");
    }
}

// --- the tests ------------------------------------------------------------------------------

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn G9_amqp_to_amqp_through_the_log_is_identical_in_type() {
    let rabbit = Rabbit::new().await;
    for queue in ["first", "last"] {
        rabbit.queue(queue).await;
    }
    let hop = Hop::new(rabbit.source("first"), rabbit.sink("last")).await;
    let messages = amqp_messages();
    rabbit.publish("first", &messages).await;
    assert_same(&messages, &rabbit.take("last", MESSAGES).await);
    hop.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn G9_amqp_to_nats_to_amqp_is_identical_in_type() {
    let (rabbit, nats) = (Rabbit::new().await, Nats::new().await);
    for queue in ["first", "last"] {
        rabbit.queue(queue).await;
    }
    nats.stream("middle").await;
    let there = Hop::new(rabbit.source("first"), nats.sink("middle")).await;
    let back = Hop::new(nats.source("middle"), rabbit.sink("last")).await;
    let messages = amqp_messages();
    rabbit.publish("first", &messages).await;
    assert_same(&messages, &rabbit.take("last", MESSAGES).await);
    there.end().await;
    back.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn G9_nats_to_nats_through_the_log_is_identical() {
    let nats = Nats::new().await;
    for stream in ["first", "last"] {
        nats.stream(stream).await;
    }
    let hop = Hop::new(nats.source("first"), nats.sink("last")).await;
    let messages = nats_messages();
    nats.publish("first", &messages).await;
    assert_same_lines(&messages, &nats.take("last", MESSAGES).await, false);
    hop.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn G9_nats_to_amqp_to_nats_is_identical() {
    let (rabbit, nats) = (Rabbit::new().await, Nats::new().await);
    for stream in ["first", "last"] {
        nats.stream(stream).await;
    }
    rabbit.queue("middle").await;
    let there = Hop::new(nats.source("first"), rabbit.sink("middle")).await;
    let back = Hop::new(rabbit.source("middle"), nats.sink("last")).await;
    let messages = nats_messages();
    nats.publish("first", &messages).await;
    assert_same_lines(&messages, &nats.take("last", MESSAGES).await, true);
    there.end().await;
    back.end().await;
}

/// By a webhook to a daemon, which takes it in over HTTP and forwards it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn G9_amqp_to_http_to_amqp_is_identical_in_type() {
    let rabbit = Rabbit::new().await;
    for queue in ["first", "last"] {
        rabbit.queue(queue).await;
    }
    let daemon = Daemon::start(&format!(
        "[transports.rabbit]\nkind = \"amqp\"\nurl = \"{}\"\n[handlers.on]\nkind = \"forward\"\n\
         transport = \"rabbit\"\nexchange = \"\"\nrouting_key = \"last\"\n",
        rabbit.uri
    ))
    .await;
    daemon.ready().await;
    let url = Secret::Inline(daemon.url("/v1"));
    let webhook: Arc<dyn Transport> =
        Arc::new(WebhookTransport::new(WebhookOptions::new(url)).unwrap());
    let sink = (webhook, ForwardOptions::new("http", "/events"));
    let hop = Hop::new(rabbit.source("first"), sink).await;
    // Names in small letters, as HTTP has them, and each once that way.
    let messages: Vec<_> = amqp_messages()
        .into_iter()
        .map(|(properties, body)| {
            let mut table = FieldTable::default();
            for (name, value) in properties.headers().iter().flatten() {
                let small = name.as_str().to_ascii_lowercase();
                // An HTTP hop takes this one away.
                if small != "authorization" {
                    let small = small.replace("cloudevents", "cloudEvents");
                    table.insert(ShortString::from(small), value.clone());
                }
            }
            // An array of JSON is several events over HTTP.
            let body = if body.starts_with('[') { "null".to_owned() } else { body };
            // A request always says what its body is.
            let typed = properties.content_type().clone().unwrap_or("application/json".into());
            (properties.with_headers(table).with_content_type(typed), body)
        })
        .collect();
    rabbit.publish("first", &messages).await;
    assert_same(&messages, &rabbit.take("last", MESSAGES).await);
    hop.end().await;
}

/// What GitHub really sends, each as it might be written, from NATS to RabbitMQ to NATS.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn G9_real_webhook_payloads_there_and_back_are_identical() {
    let examples = std::env::var("TEST_PULSEBUS_WEBHOOKS").expect(
        "TEST_PULSEBUS_WEBHOOKS: run the tests by tests/run, which fetches @octokit/webhooks-examples",
    );
    let file = std::path::Path::new(&examples).join("api.github.com/index.json");
    let events: Vec<Value> = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
    let mut messages: Vec<(Lines, String)> = Vec::new();
    let mut expected = BTreeMap::new();
    for event in &events {
        let kind = event["name"].as_str().unwrap();
        for example in event["examples"].as_array().unwrap() {
            let bodies = [
                example.to_string(),
                serde_json::to_string_pretty(example).unwrap(),
                // As others escape it, with white space around.
                format!(" {}\r\n", example.to_string().replace('/', "\\/")),
            ];
            for body in bodies {
                // A body's own id is the event's, and a second one of it would be a copy.
                let id = match example["id"].as_u64() {
                    Some(id) => id.to_string(),
                    None => format!("m-{}", messages.len()),
                };
                if expected.contains_key(&id) {
                    continue;
                }
                let headers = [
                    ("Content-Type", "application/json"),
                    ("X-GitHub-Delivery", "0b989ba4-242f-11e5-81e1-c7b6966d2516"),
                    ("X-GitHub-Event", kind),
                    ("X-Hub-Signature-256", "sha256=d57c68ca6f92289e6987922ff26938930f6e66a2"),
                ];
                let headers: Lines = headers.map(|(n, v)| (n.into(), v.into())).to_vec();
                expected.insert(id, (headers.clone(), body.clone().into_bytes()));
                messages.push((headers, body));
            }
        }
    }
    let count = messages.len();
    assert!(count > 900, "only {count}");
    let (rabbit, nats) = (Rabbit::new().await, Nats::new().await);
    for stream in ["first", "last"] {
        nats.stream(stream).await;
    }
    rabbit.queue("middle").await;
    let there = Hop::new(nats.source("first"), rabbit.sink("middle")).await;
    let back = Hop::new(rabbit.source("middle"), nats.sink("last")).await;
    nats.publish("first", &messages).await;
    let taken = nats.take("last", count).await;
    for (id, message) in &expected {
        assert_eq!(taken.get(id), Some(message), "{id}");
    }
    there.end().await;
    back.end().await;
}
