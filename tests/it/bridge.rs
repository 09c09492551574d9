//! The bridge: what is published to NATS arrives in RabbitMQ, what is published to RabbitMQ
//! arrives in NATS, nothing is lost or changed on the way, and nothing goes round in circles.

mod publish;

use std::{
    collections::HashMap,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use async_nats::jetstream::{
    consumer::pull::OrderedConfig,
    stream::{Config, Stream},
};
use futures_util::StreamExt as _;
use lapin::{
    Connection, ConnectionProperties, ExchangeKind,
    options::{
        BasicAckOptions, BasicConsumeOptions, BasicQosOptions, ExchangeDeclareOptions,
        QueueBindOptions, QueueDeclareOptions,
    },
    types::{AMQPValue, FieldTable},
};
use sqlx::{ConnectOptions as _, Row as _, sqlite::SqliteConnectOptions};
use tokio::task::JoinSet;

use self::publish::{Event, Pace, Side, publish};
use crate::support::{daemon::Daemon, nats::NatsServer, rabbit::RabbitNode};

/// How long nothing may go on before the run counts as stuck.
const STUCK: Duration = Duration::from_secs(180);

/// Two polls so far apart that show the same: nothing is under way any more.
const QUIET: Duration = Duration::from_secs(3);

const HANDLERS: [&str; 2] = ["to-rabbit", "to-nats"];

/// Both brokers and the daemon between them. What either handler forwards, the source at the
/// other end consumes again.
struct World {
    nats: NatsServer,
    rabbit: RabbitNode,
    daemon: Daemon,
}

/// Everything that would move if anything still went round.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Still {
    head: u64,
    handled: Vec<(u64, u64)>,
    unfinished: u64,
    streams: Vec<u64>,
    unread: u64,
    queues: String,
}

impl World {
    async fn new() -> Self {
        let nats = NatsServer::start();
        let jetstream = nats.jetstream().await;
        // Two, since a stream drops copies of what it has: they are to reach the daemon.
        for (name, subject) in [("LESSONS", "lessons.*"), ("MIRROR", "mirror.*")] {
            let config = Config {
                name: name.to_owned(),
                subjects: vec![subject.to_owned()],
                duplicate_window: Duration::from_millis(100),
                ..Config::default()
            };
            jetstream.create_stream(config).await.unwrap();
        }
        let rabbit = RabbitNode::start().await;
        declare(&rabbit).await;
        let config = format!(
            r##"
[transports.nats]
kind = "nats"
url = "{nats}"
[transports.rabbit]
kind = "amqp"
url = "{rabbit}"
[sources.from-nats]
transport = "nats"
stream = "LESSONS"
consumer = "pulsebus"
ack_wait = "5s"
event_source = "/from-nats"
key = ["/course"]
[sources.back-from-nats]
transport = "nats"
stream = "MIRROR"
consumer = "pulsebus"
ack_wait = "5s"
event_source = "/back-from-nats"
key = ["/course"]
[sources.from-rabbit]
transport = "rabbit"
queue = "intake"
event_source = "/from-rabbit"
key = ["/course"]
[handlers.to-rabbit]
kind = "forward"
transport = "rabbit"
exchange = "bridge"
routing_key = "mirror.{{key}}"
workers = 2
[handlers.to-nats]
kind = "forward"
transport = "nats"
subject = "mirror.{{key}}"
workers = 2
"##,
            nats = nats.url(),
            rabbit = rabbit.uri(),
        );
        let daemon = Daemon::start(&config).await;
        rabbit.sync().await;
        Self { nats, rabbit, daemon }
    }

    /// How many events every handler has handled.
    async fn handled(&self) -> u64 {
        let mut least = u64::MAX;
        for handler in HANDLERS {
            least = least.min(self.daemon.handler(handler).await);
        }
        least
    }

    fn give_up(&self, why: &str) -> ! {
        let log = self.daemon.log();
        panic!("{why}\n{}", &log[log.len().saturating_sub(6_000)..]);
    }

    /// Waits until so many events are handled; whatever takes long must go on meanwhile.
    async fn reaches(&self, events: u64, pace: &Pace) {
        let (mut last, mut moved) = (0, Instant::now());
        loop {
            let now = self.handled().await;
            pace.handled.fetch_max(now, Ordering::Relaxed);
            if now >= events {
                return;
            }
            if now != last {
                (last, moved) = (now, Instant::now());
            }
            if moved.elapsed() > STUCK {
                let ready = self.daemon.get("/readyz").await;
                let handlers = self.daemon.get("/v1/handlers").await;
                self.give_up(&format!("stuck at {now} of {events}: {ready:?} {handlers:?}"));
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Waits until a source has noticed that its broker is gone.
    async fn noticed(&self, source: &str) {
        let deadline = Instant::now() + STUCK;
        while Instant::now() < deadline {
            let sources = self.daemon.json("/v1/sources").await.unwrap_or_default();
            let all = sources["sources"].as_array().cloned().unwrap_or_default();
            if all.iter().any(|s| s["name"] == source && s["state"] == "reconnecting") {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        self.give_up(&format!("{source} does not notice that its broker is gone"));
    }

    async fn still(&self, streams: &[Stream]) -> Option<Still> {
        let handlers = self.daemon.json("/v1/handlers").await?;
        let number = |handler: &str, field: &str| {
            let all = handlers["handlers"].as_array()?;
            all.iter().find(|h| h["name"] == handler)?[field].as_u64()
        };
        let mut handled = Vec::new();
        let mut unfinished = 0;
        for name in HANDLERS {
            handled.push((number(name, "position")?, number(name, "lag")?));
            for field in ["in_flight", "retrying", "parked", "dead"] {
                unfinished += number(name, field)?;
            }
        }
        let (mut stored, mut unread) = (Vec::new(), 0);
        for stream in streams {
            stored.push(stream.get_info().await.ok()?.state.last_sequence);
            let consumer = stream.consumer_info("pulsebus").await.ok()?;
            unread += consumer.num_pending + consumer.num_ack_pending as u64;
        }
        Some(Still {
            head: self.daemon.head().await,
            handled,
            unfinished,
            streams: stored,
            unread,
            queues: self
                .rabbit
                .ctl(&["list_queues", "--no-table-headers", "name", "messages"])
                .await,
        })
    }

    /// Waits until all is handled, all that was forwarded has been consumed again, and two polls
    /// show the same.
    async fn settles(&self, events: u64) -> Still {
        let jetstream = self.nats.jetstream().await;
        let mut streams = Vec::new();
        for stream in ["LESSONS", "MIRROR"] {
            streams.push(jetstream.get_stream(stream).await.unwrap());
        }
        let deadline = Instant::now() + 2 * STUCK;
        let mut last = None;
        loop {
            let now = self.still(&streams).await;
            if let Some(state) = &now
                && now == last
                && state.head == events
                && state.handled.iter().all(|handled| *handled == (events, 0))
                && (state.unfinished, state.unread) == (0, 0)
                && state
                    .queues
                    .lines()
                    .any(|line| line.split_whitespace().collect::<Vec<_>>() == ["intake", "0"])
            {
                return now.unwrap();
            }
            if Instant::now() > deadline {
                self.give_up(&format!("it does not settle at {events}: {now:?}"));
            }
            last = now;
            tokio::time::sleep(QUIET).await;
        }
    }

    /// Every event is in the log once, as it was published, in the order of its key.
    async fn audit_log(&self, ledger: &HashMap<String, Event>) {
        let options = SqliteConnectOptions::new().filename(self.daemon.database()).read_only(true);
        let rows = sqlx::query(
            "SELECT position, source, id, type, key, format, CAST(body AS TEXT) \
             FROM events ORDER BY position",
        )
        .fetch_all(&mut options.connect().await.unwrap())
        .await
        .unwrap();
        assert_eq!(rows.len(), ledger.len(), "each event once, and nothing else");
        let mut next: HashMap<&str, u64> = HashMap::new();
        for (n, row) in rows.iter().enumerate() {
            assert_eq!(row.get::<i64, _>(0), n as i64 + 1, "G3: positions are 1 … n");
            let id: String = row.get(2);
            let event = ledger.get(&id).unwrap_or_else(|| panic!("{id} was never published"));
            let read: [&str; 4] = [1, 3, 4, 5].map(|column| row.get(column));
            assert_eq!(read, [event.source, &*event.kind, &event.key, event.form], "{id}");
            assert_eq!(row.get::<&str, _>(6).as_bytes(), event.body, "G9: {id} has changed");
            let next = next.entry(&event.key).or_default();
            assert_eq!(event.n, *next, "G5: {} is out of order", event.key);
            *next += 1;
        }
    }

    async fn audit_rabbit(&self, ledger: &HashMap<String, Event>) {
        let properties = ConnectionProperties::default();
        let connection = Connection::connect(&self.rabbit.uri(), properties).await.unwrap();
        let channel = connection.create_channel().await.unwrap();
        channel.basic_qos(2_000, BasicQosOptions::default()).await.unwrap();
        let passive = QueueDeclareOptions { passive: true, ..Default::default() };
        let none = FieldTable::default;
        let queue = channel.queue_declare("mirror".into(), passive, none()).await.unwrap();
        let consume = BasicConsumeOptions::default();
        let mut deliveries =
            channel.basic_consume("mirror".into(), "audit".into(), consume, none()).await.unwrap();
        let mut mirror = Mirror::new("RabbitMQ", ledger);
        for n in 1..=queue.message_count() {
            let delivery = deliveries.next().await.unwrap().unwrap();
            let id = delivery.properties.message_id().as_ref().unwrap().as_str();
            mirror.arrived(id, &delivery.data);
            if n % 1_000 == 0 || n == queue.message_count() {
                let all = BasicAckOptions { multiple: true };
                channel.basic_ack(delivery.delivery_tag, all).await.unwrap();
            }
        }
        connection.close(200, "done".into()).await.unwrap();
        mirror.complete();
    }

    async fn audit_nats(&self, ledger: &HashMap<String, Event>) {
        let jetstream = self.nats.jetstream().await;
        let stream = jetstream.get_stream("MIRROR").await.unwrap();
        let consumer = stream.create_consumer(OrderedConfig::default()).await.unwrap();
        let mut messages = consumer.messages().await.unwrap();
        let mut mirror = Mirror::new("NATS", ledger);
        loop {
            let message = messages.next().await.unwrap().unwrap();
            let id = message.headers.as_ref().unwrap().get("Nats-Msg-Id").unwrap().to_string();
            mirror.arrived(&id, &message.payload);
            if message.info().unwrap().pending == 0 {
                break;
            }
        }
        mirror.complete();
    }
}

/// What has arrived on one side.
struct Mirror<'a> {
    side: &'static str,
    ledger: &'a HashMap<String, Event>,
    /// How often each has arrived.
    arrived: HashMap<&'a str, u32>,
    next: HashMap<&'a str, u64>,
}

impl<'a> Mirror<'a> {
    fn new(side: &'static str, ledger: &'a HashMap<String, Event>) -> Self {
        Self { side, ledger, arrived: HashMap::new(), next: HashMap::new() }
    }

    fn arrived(&mut self, id: &str, body: &[u8]) {
        let Some(event) = self.ledger.get(id) else {
            panic!("{id} arrived in {} and was never published", self.side)
        };
        assert_eq!(body, event.body, "G9: {id} has changed on its way to {}", self.side);
        let times = self.arrived.entry(&event.id).or_default();
        *times += 1;
        if *times == 1 {
            let next = self.next.entry(&event.key).or_default();
            assert_eq!(event.n, *next, "G5: {} is out of order in {}", event.key, self.side);
            *next += 1;
        }
    }

    /// Everything has arrived; how much of it more than once is printed: at least once (G4).
    fn complete(self) {
        for event in self.ledger.values() {
            assert!(self.arrived.contains_key(&*event.id), "{event:?} is not in {}", self.side);
        }
        let again: u32 = self.arrived.values().map(|times| times - 1).sum();
        eprintln!("{}: all {} arrived, and {again} copies", self.side, self.arrived.len());
    }
}

/// The exchange that everything goes through, the source's queue, which gets it all, and the
/// queue that keeps what is forwarded.
async fn declare(rabbit: &RabbitNode) {
    let properties = ConnectionProperties::default();
    let connection = Connection::connect(&rabbit.uri(), properties).await.unwrap();
    let channel = connection.create_channel().await.unwrap();
    let durable = ExchangeDeclareOptions { durable: true, ..Default::default() };
    let none = FieldTable::default;
    channel.exchange_declare("bridge".into(), ExchangeKind::Topic, durable, none()).await.unwrap();
    for (queue, key) in [("intake", "#"), ("mirror", "mirror.#")] {
        let durable = QueueDeclareOptions { durable: true, ..Default::default() };
        let mut arguments = none();
        arguments.insert("x-queue-type".into(), AMQPValue::LongString("quorum".into()));
        channel.queue_declare(queue.into(), durable, arguments).await.unwrap();
        let bind = QueueBindOptions::default();
        channel.queue_bind(queue.into(), "bridge".into(), key.into(), bind, none()).await.unwrap();
    }
    connection.close(200, "done".into()).await.unwrap();
}

/// So many events each way, through two kills of each broker and one of the daemon.
async fn bridge(each: u64) {
    let began = Instant::now();
    let mut world = World::new().await;
    let events = 2 * each;
    let pace = Arc::new(Pace { handled: 0.into(), ahead: (each / 10).max(500) });
    let mut publishers = JoinSet::new();
    for (side, url) in [(Side::Nats, world.nats.url()), (Side::Rabbit, world.rabbit.uri())] {
        publishers.spawn(publish(side, url, each, Arc::clone(&pace)));
    }
    for fault in 1..=5 {
        world.reaches(fault * events / 7, &pace).await;
        match fault {
            1 | 4 => {
                world.nats.kill();
                world.noticed("from-nats").await;
                world.nats.restart();
            }
            2 | 5 => {
                world.rabbit.kill();
                world.noticed("from-rabbit").await;
                world.rabbit.restart().await;
            }
            _ => {
                world.daemon.kill();
                world.daemon.restart().await;
            }
        }
    }
    world.reaches(events, &pace).await;
    let mut ledger = HashMap::new();
    while let Some(confirmed) = publishers.join_next().await {
        ledger.extend(confirmed.unwrap());
    }
    assert_eq!(ledger.len() as u64, events);
    eprintln!("{events} events are through after {:?}", began.elapsed());
    let still = world.settles(events).await;
    eprintln!("it is still after {:?}: {still:?}", began.elapsed());
    let quarantined = world.daemon.json("/v1/quarantine").await.unwrap();
    assert_eq!(quarantined["quarantine"].as_array().unwrap().len(), 0, "{quarantined}");
    assert!(world.daemon.terminate().await.success(), "{}", world.daemon.log());
    world.audit_log(&ledger).await;
    world.audit_rabbit(&ledger).await;
    world.audit_nats(&ledger).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn G1_to_G9_a_two_way_bridge_loses_and_repeats_nothing_through_kills() {
    bridge(5_000).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes many minutes: tests/run --soak"]
async fn soak_G1_to_G9_a_two_way_bridge_with_100_000_each_way() {
    bridge(100_000).await;
}
