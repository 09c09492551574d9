//! RabbitMQ, set up wrong.

use lapin::{
    BasicProperties, Channel, Connection, ConnectionProperties, ExchangeKind,
    options::{
        BasicConsumeOptions, BasicGetOptions, BasicPublishOptions, ConfirmSelectOptions,
        ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions, QueueDeleteOptions,
    },
    types::{AMQPValue, FieldTable},
};

use super::{Patient, Said};
use crate::support::{
    free_port,
    rabbit::{self, RabbitNode, Vhost},
};

/// A client that is not the one under test.
struct Admin {
    _connection: Connection,
    channel: Channel,
    vhost: Vhost,
    node: &'static RabbitNode,
}

/// An argument of a declaration.
#[derive(Clone, Copy)]
enum Arg {
    Text(&'static str),
    Number(i32),
    Yes,
}

/// A queue, its arguments, what its source says, what is found.
type Case<'a> = (&'a str, &'a [(&'a str, Arg)], String, &'a [&'a str]);

fn table(arguments: &[(&str, Arg)]) -> FieldTable {
    let mut table = FieldTable::default();
    for (name, value) in arguments {
        let value = match value {
            Arg::Text(text) => AMQPValue::LongString((*text).into()),
            Arg::Number(number) => AMQPValue::LongInt(*number),
            Arg::Yes => AMQPValue::Boolean(true),
        };
        table.insert((*name).into(), value);
    }
    table
}

const DURABLE: QueueDeclareOptions = QueueDeclareOptions {
    passive: false,
    durable: true,
    exclusive: false,
    auto_delete: false,
    nowait: false,
};

const EXCHANGE: ExchangeDeclareOptions = ExchangeDeclareOptions {
    passive: false,
    durable: true,
    auto_delete: false,
    internal: false,
    nowait: false,
};

impl Admin {
    async fn new() -> Self {
        let node = rabbit::shared().await;
        let vhost = node.vhost().await;
        let connection =
            Connection::connect(&vhost.uri, ConnectionProperties::default()).await.unwrap();
        let channel = connection.create_channel().await.unwrap();
        channel.confirm_select(ConfirmSelectOptions::default()).await.unwrap();
        Self { _connection: connection, channel, vhost, node }
    }

    /// Declares a queue and puts a message into it.
    async fn queue(&self, name: &str, options: QueueDeclareOptions, arguments: &[(&str, Arg)]) {
        self.channel.queue_declare(name.into(), options, table(arguments)).await.unwrap();
        self.publish("", name).await;
    }

    async fn quorum(&self, name: &str, arguments: &[(&str, Arg)]) {
        let mut arguments = arguments.to_vec();
        arguments.push(("x-queue-type", Arg::Text("quorum")));
        self.queue(name, DURABLE, &arguments).await;
    }

    async fn delete(&self, name: &str) {
        self.channel.queue_delete(name.into(), QueueDeleteOptions::default()).await.unwrap();
    }

    async fn publish(&self, exchange: &str, key: &str) {
        let options = BasicPublishOptions::default();
        let properties = BasicProperties::default().with_delivery_mode(2);
        let sent =
            self.channel.basic_publish(exchange.into(), key.into(), options, b"{}", properties);
        sent.await.unwrap().await.unwrap();
    }

    async fn exchange(
        &self,
        name: &str,
        kind: ExchangeKind,
        options: ExchangeDeclareOptions,
        arguments: &[(&str, Arg)],
    ) {
        let declared = self.channel.exchange_declare(name.into(), kind, options, table(arguments));
        declared.await.unwrap();
    }

    async fn bind(&self, queue: &str, exchange: &str, key: &str) {
        let (queue, exchange, key) = (queue.into(), exchange.into(), key.into());
        let options = QueueBindOptions::default();
        let bound = self.channel.queue_bind(queue, exchange, key, options, FieldTable::default());
        bound.await.unwrap();
    }

    /// Everything that could tell that somebody was here: queues and their settings, exchanges,
    /// bindings, and how many messages each queue holds.
    async fn whole(&self, queues: &[&str]) -> String {
        let name = &self.vhost.name;
        let said = self
            .node
            .ctl(&[
                "eval",
                &format!(
                    "V = <<\"{name}\">>, {{lists:sort(rabbit_amqqueue:info_all(V, [name, durable, \
                     auto_delete, arguments, consumers])), lists:sort(rabbit_exchange:list(V)), \
                     lists:sort(rabbit_binding:list(V))}}."
                ),
            ])
            .await;
        let mut counts = Vec::new();
        for name in queues {
            let passive = QueueDeclareOptions { passive: true, ..DURABLE };
            let asked = self.channel.queue_declare((*name).into(), passive, FieldTable::default());
            counts.push((*name, asked.await.unwrap().message_count()));
        }
        format!("{said} {counts:?}")
    }

    /// That nobody has been given the message of this queue before.
    async fn untouched(&self, queue: &str) {
        let got = self.channel.basic_get(queue.into(), BasicGetOptions { no_ack: false }).await;
        let got = got.unwrap().unwrap();
        assert!(!got.delivery.redelivered, "{queue}");
        let headers = got.delivery.properties.headers().clone().unwrap_or_default();
        let count = headers.inner().get("x-delivery-count");
        assert!(count.is_none_or(|count| *count == AMQPValue::LongLongInt(0)), "{headers:?}");
    }
}

struct Config(String);

impl Config {
    fn of(uri: &str) -> Self {
        Self(format!("[transports.rabbit]\nkind = \"amqp\"\nurl = \"{uri}\"\n"))
    }

    /// A source of this queue, called like it.
    fn source(&mut self, queue: &str, more: &str) {
        self.0 +=
            &format!("[sources.{queue}]\ntransport = \"rabbit\"\nqueue = \"{queue}\"\n{more}\n");
    }

    fn forward(&mut self, name: &str, exchange: &str, key: &str) {
        self.0 += &format!(
            "[handlers.{name}]\nkind = \"forward\"\ntransport = \"rabbit\"\n\
             exchange = \"{exchange}\"\nrouting_key = \"{key}\"\n"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn doctor_finds_what_is_wrong_with_queues_and_leaves_no_trace() {
    use Arg::{Number, Text, Yes};
    let admin = Admin::new().await;
    admin.exchange("events", ExchangeKind::Topic, EXCHANGE, &[]).await;
    admin.exchange("dead", ExchangeKind::Fanout, EXCHANGE, &[]).await;
    let dead = ("x-dead-letter-exchange", Text("dead"));
    let create = |bind: &str, more: &str| {
        format!(
            "create = {{ bind = [{{ exchange = \"{bind}\", routing_key = \"a.#\", \
             exchange_type = \"topic\" }}]{more} }}"
        )
    };
    let mut config = Config::of(&admin.vhost.uri);
    // A quorum queue of this name with these arguments; what its source says; what is found.
    let cases: &[Case<'_>] = &[
        ("right", &[], String::new(), &[]),
        ("created", &[], create("events", ""), &[]),
        (
            "limited",
            &[("x-delivery-limit", Number(50)), dead],
            create(
                "events",
                ", arguments = { x-delivery-limit = 50, x-dead-letter-exchange = \"dead\" }",
            ),
            &[],
        ),
        ("ttl", &[("x-message-ttl", Number(9_000_000))], String::new(), &["error amqp-queue-ttl"]),
        (
            "ttl-dead",
            &[("x-message-ttl", Number(9_000_000)), dead],
            String::new(),
            &["warning amqp-queue-ttl"],
        ),
        (
            "expires",
            &[("x-expires", Number(9_000_000))],
            String::new(),
            &["error amqp-queue-expires"],
        ),
        ("short", &[("x-max-length", Number(10))], String::new(), &["error amqp-queue-max-length"]),
        (
            "full",
            &[("x-max-length", Number(10)), ("x-overflow", Text("reject-publish"))],
            String::new(),
            &["note amqp-queue-max-length"],
        ),
        (
            "spent",
            &[("x-delivery-limit", Number(5))],
            String::new(),
            &["warning amqp-delivery-limit"],
        ),
        (
            "lost",
            &[("x-delivery-limit", Number(5)), ("x-dead-letter-exchange", Text("nowhere"))],
            String::new(),
            &["error amqp-dead-letter-exchange"],
        ),
        (
            "single",
            &[("x-single-active-consumer", Yes)],
            "competing = true".to_owned(),
            &["warning amqp-single-active-consumer"],
        ),
        ("greedy", &[], "prefetch = 3000".to_owned(), &["warning amqp-prefetch"]),
        (
            "differs",
            &[("x-delivery-limit", Number(5)), dead],
            create("events", ""),
            &["error amqp-queue-differs"],
        ),
        ("fan", &[], create("dead", ""), &["error amqp-exchange-type"]),
    ];
    for (name, arguments, source, _) in cases {
        admin.quorum(name, arguments).await;
        config.source(name, source);
    }
    admin.queue("transient", QueueDeclareOptions { durable: false, ..DURABLE }, &[]).await;
    admin.queue("brief", QueueDeclareOptions { auto_delete: true, ..DURABLE }, &[]).await;
    admin.queue("ranked", DURABLE, &[("x-max-priority", Number(5))]).await;
    admin.queue("stream", DURABLE, &[("x-queue-type", Text("stream"))]).await;
    admin.queue("mine", QueueDeclareOptions { exclusive: true, ..DURABLE }, &[]).await;
    admin.quorum("crowd", &[]).await;
    // Cancelled when they are dropped.
    let mut others = Vec::new();
    for _ in 0..2 {
        let options = BasicConsumeOptions { no_ack: true, ..BasicConsumeOptions::default() };
        let queue = "crowd".into();
        let consuming =
            admin.channel.basic_consume(queue, "".into(), options, FieldTable::default());
        others.push(consuming.await.unwrap());
    }
    for name in ["transient", "brief", "ranked", "stream", "mine", "crowd", "missing"] {
        config.source(name, "");
    }
    config.source("absent", &create("events", ""));

    let names: Vec<&str> = cases.iter().map(|case| case.0).collect();
    let names: Vec<&str> =
        names.into_iter().chain(["transient", "brief", "ranked", "crowd"]).collect();
    let patient = Patient::new(&config.0);
    let before = admin.whole(&names).await;
    let said = patient.examine().await;
    assert_eq!(admin.whole(&names).await, before, "doctor left a trace");
    said.expect("transport:rabbit", &[]);
    for (name, _, _, expected) in cases {
        said.expect(&format!("source:{name}"), expected);
    }
    for (name, expected) in [
        ("transient", &["error amqp-queue-transient"][..]),
        ("brief", &["error amqp-queue-auto-delete", "note amqp-queue-classic"]),
        ("ranked", &["warning amqp-queue-priority", "note amqp-queue-classic"]),
        ("stream", &["error amqp-queue-stream"]),
        ("mine", &["error amqp-queue-exclusive"]),
        ("crowd", &["warning amqp-consumers"]),
        ("missing", &["error amqp-queue-missing"]),
        ("absent", &["note amqp-queue-missing"]),
    ] {
        said.expect(&format!("source:{name}"), expected);
    }
    let differs = said.text("amqp-queue-differs", "what");
    for part in [
        "x-delivery-limit is `5`, expected not set",
        "x-dead-letter-exchange is `dead`, expected not set",
    ] {
        assert!(differs.contains(part), "{differs}");
    }
    for name in ["right", "created", "spent"] {
        admin.untouched(name).await;
    }
    drop(others);

    // Declared anew as the findings say.
    for name in ["ttl", "expires", "short", "spent", "differs", "transient", "brief", "ranked"] {
        admin.delete(name).await;
        admin.quorum(name, &[]).await;
    }
    admin.exchange("nowhere", ExchangeKind::Topic, EXCHANGE, &[]).await;
    admin.quorum("missing", &[]).await;
    let said = patient.examine().await;
    for name in [
        "ttl",
        "expires",
        "short",
        "spent",
        "differs",
        "transient",
        "brief",
        "ranked",
        "lost",
        "missing",
    ] {
        said.expect(&format!("source:{name}"), &[]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn doctor_finds_what_is_wrong_with_exchanges_and_publishes_nothing() {
    let admin = Admin::new().await;
    let topic = ExchangeKind::Topic;
    admin.quorum("q", &[]).await;
    admin.exchange("fan", ExchangeKind::Fanout, EXCHANGE, &[]).await;
    admin.bind("q", "fan", "").await;
    let transient = ExchangeDeclareOptions { durable: false, ..EXCHANGE };
    admin.exchange("transient", topic.clone(), transient, &[]).await;
    let brief = ExchangeDeclareOptions { auto_delete: true, ..EXCHANGE };
    admin.exchange("brief", ExchangeKind::Direct, brief, &[]).await;
    let inner = ExchangeDeclareOptions { internal: true, ..EXCHANGE };
    admin.exchange("inner", ExchangeKind::Headers, inner, &[]).await;
    let alternate = [("alternate-exchange", Arg::Text("fan"))];
    admin.exchange("spare", topic.clone(), EXCHANGE, &alternate).await;

    let mut config = Config::of(&admin.vhost.uri);
    config.forward("fine", "fan", "lesson.{type}");
    config.forward("by-name", "", "q");
    config.forward("no-queue", "", "nothing.of.that.name");
    config.forward("any-queue", "", "q.{type}");
    config.forward("missing", "none", "a");
    config.forward("transient", "transient", "a");
    config.forward("brief", "brief", "a");
    config.forward("inner", "inner", "a");
    config.forward("spare", "spare", "a");
    config.forward("buried", "fan", "a");
    config.0 += "dead_letter = { transport = \"rabbit\", exchange = \"grave\", \
                 routing_key = \"{handler}\" }\n";

    let patient = Patient::new(&config.0);
    let before = admin.whole(&["q"]).await;
    let said = patient.examine().await;
    assert_eq!(admin.whole(&["q"]).await, before, "doctor left a trace");
    for (name, expected) in [
        ("fine", &[][..]),
        ("by-name", &[]),
        ("no-queue", &["error amqp-destination-queue"]),
        ("any-queue", &[]),
        ("missing", &["error amqp-exchange-missing"]),
        ("transient", &["warning amqp-exchange-transient"]),
        ("brief", &["warning amqp-exchange-auto-delete"]),
        ("inner", &["error amqp-exchange-internal"]),
        ("spare", &["note amqp-alternate-exchange"]),
        ("buried", &["error amqp-exchange-missing"]),
    ] {
        said.expect(&format!("handler:{name}"), expected);
    }
    admin.exchange("none", topic.clone(), EXCHANGE, &[]).await;
    admin.exchange("grave", topic, EXCHANGE, &[]).await;
    let said = patient.examine().await;
    said.expect("handler:missing", &[]);
    said.expect("handler:buried", &[]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn doctor_tries_what_each_rabbit_user_may_do() {
    let admin = Admin::new().await;
    let vhost = &admin.vhost.name;
    admin.quorum("q", &[]).await;
    admin.exchange("out", ExchangeKind::Fanout, EXCHANGE, &[]).await;
    admin.bind("q", "out", "").await;
    // In one go: each rabbitmqctl boots a virtual machine.
    let user = |name: &str, configure: &str, write: &str, read: &str| {
        format!(
            "U{name} = <<\"{vhost}-{name}\">>, \
             ok = rabbit_auth_backend_internal:add_user(U{name}, <<\"p\">>, <<\"test\">>), \
             ok = rabbit_auth_backend_internal:set_permissions(U{name}, <<\"{vhost}\">>, \
             <<\"{configure}\">>, <<\"{write}\">>, <<\"{read}\">>, <<\"test\">>), "
        )
    };
    let made = admin
        .node
        .ctl(&[
            "eval",
            &format!(
                "{}{}{}ok.",
                user("narrow", "^$", "^out$", "^q$"),
                user("blind", "^q$", "^$", "^$"),
                user("keeper", ".*", "^out$", "^(q|out)$"),
            ),
        ])
        .await;
    assert_eq!(made.trim(), "ok");
    let as_user = async |user: &str, password: &str, create: &str| -> Said {
        let address = admin.vhost.address;
        let mut config = Config::of(&format!("amqp://{vhost}-{user}:{password}@{address}/{vhost}"));
        config.source("q", create);
        config.forward("out", "out", "a");
        config.forward("by-name", "", "q");
        Patient::new(&config.0).examine().await
    };
    let create = "create = { bind = [{ exchange = \"out\" }] }";
    let before = admin.whole(&["q"]).await;

    let said = as_user("narrow", "p", "").await;
    said.expect("transport:rabbit", &[]);
    said.expect("source:q", &["note amqp-queue-unseen"]);
    said.expect("handler:out", &[]);
    said.expect("handler:by-name", &["error amqp-publish-denied"]);
    let said = as_user("narrow", "p", create).await;
    // It may neither declare the queue nor bind it.
    said.expect("source:q", &["error amqp-denied", "error amqp-denied"]);
    let said = as_user("keeper", "p", create).await;
    // Binding writes to the queue.
    said.expect("source:q", &["error amqp-denied"]);
    assert!(said.text("amqp-denied", "what").contains("to bind"), "{}", said.whole);
    let said = as_user("blind", "p", "").await;
    said.expect("source:q", &["error amqp-denied"]);
    assert!(said.text("amqp-denied", "what").contains("`read`"), "{}", said.whole);
    said.expect("handler:out", &["error amqp-publish-denied"]);
    let said = as_user("narrow", "wrong", "").await;
    said.expect("transport:rabbit", &["error amqp-login"]);
    assert!(!said.whole.contains("wrong"), "{}", said.whole);

    assert_eq!(admin.whole(&["q"]).await, before, "doctor left a trace");
    admin.untouched("q").await;

    // What the findings say mends them.
    let allow = format!(
        "ok = rabbit_auth_backend_internal:set_permissions(<<\"{vhost}-keeper\">>, \
         <<\"{vhost}\">>, <<\".*\">>, <<\"^(q|out|amq\\.default)$\">>, <<\"^(q|out)$\">>, \
         <<\"test\">>)."
    );
    admin.node.ctl(&["eval", &allow]).await;
    let said = as_user("keeper", "p", create).await;
    assert_eq!(said.findings, Vec::<serde_json::Value>::new());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broker_that_is_away_or_lets_us_nowhere_is_told_apart() {
    let admin = Admin::new().await;
    admin.quorum("q", &[]).await;
    let mut config = Config::of(&admin.vhost.uri);
    config.source("q", "");
    let (address, away) = (admin.vhost.address, free_port());
    for (name, url) in [
        ("nowhere", format!("amqp://guest:guest@{address}/no-such-vhost")),
        ("away", format!("amqp://guest:guest@127.0.0.1:{away}/%2f")),
    ] {
        config.0 += &format!(
            "[transports.{name}]\nkind = \"amqp\"\nurl = \"{url}\"\n\
             [sources.{name}]\ntransport = \"{name}\"\nqueue = \"q\"\n"
        );
    }
    let said = Patient::new(&config.0).examine().await;
    said.expect("source:q", &[]);
    said.expect("transport:nowhere", &["error amqp-vhost"]);
    said.expect("transport:away", &["error amqp-unreachable"]);
}
