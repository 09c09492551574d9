//! The main job, end to end: publishers that are not ours, real brokers, the real daemon, and an
//! audit of what the brokers confirmed against what the log, the index and the other broker hold.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    path::{Path, PathBuf},
    process::Child,
    sync::Mutex,
    time::{Duration, Instant},
};

use async_nats::jetstream::stream::{Config, RetentionPolicy};
use futures_util::StreamExt as _;
use lapin::{
    Connection, ConnectionProperties, ExchangeKind,
    options::{
        BasicConsumeOptions, BasicQosOptions, ExchangeDeclareOptions, QueueBindOptions,
        QueueDeclareOptions,
    },
    types::{AMQPValue, FieldTable},
};
use serde::Deserialize;
use sqlx::{
    ConnectOptions as _, Row as _, postgres::PgConnectOptions, sqlite::SqliteConnectOptions,
};

use crate::support::{
    daemon::Daemon, nats::NatsServer, postgres::PostgresServer, process, rabbit::RabbitNode,
};

/// Events of each broker.
const EACH: usize = 10_000;

/// How long everything may take to arrive after the last fault has healed.
const DEADLINE: Duration = Duration::from_secs(240);

enum Store {
    Sqlite,
    Postgres(PostgresServer),
}

/// Brokers, store and daemon of one run.
struct World {
    nats: Mutex<NatsServer>,
    nats_url: String,
    rabbit: RabbitNode,
    store: Store,
    daemon: Daemon,
    ledgers: PathBuf,
}

/// What a broker has confirmed.
#[derive(Debug, Deserialize)]
struct Confirmed {
    id: String,
    source: String,
    r#type: String,
    key: String,
    n: u64,
    form: String,
    body: String,
}

impl World {
    async fn new(store: Store, retention: RetentionPolicy, filter: &str) -> Self {
        let nats = NatsServer::start();
        nats.jetstream()
            .await
            .create_stream(Config {
                name: "EDUPULSE".to_owned(),
                subjects: vec!["edupulse.>".to_owned()],
                retention,
                // The second round must reach the daemon, not be dropped by the broker.
                duplicate_window: Duration::from_millis(100),
                ..Config::default()
            })
            .await
            .unwrap();
        let rabbit = RabbitNode::start().await;
        mirror(&rabbit).await;
        let url = match &store {
            Store::Sqlite => "sqlite:events.db".to_owned(),
            Store::Postgres(server) => server.url(),
        };
        let config = format!(
            r##"
[store]
url = "{url}"
[transports.nats]
kind = "nats"
url = "{nats_url}"
[transports.rabbit]
kind = "amqp"
url = "{rabbit_url}"
[sources.lessons]
transport = "nats"
stream = "EDUPULSE"
consumer = "pulsebus"
subject = "{filter}"
ack_wait = "5s"
key = ["/course"]
[sources.quizzes]
transport = "rabbit"
queue = "edupulse.quizzes"
create = {{ type = "quorum", bind = [{{ exchange = "edupulse", routing_key = "#" }}] }}
key = ["/course"]
[sources.http]
transport = "http"
[handlers.search]
kind = "search"
events = ["LessonPublished"]
[handlers.search.documents.LessonPublished]
id = "/lesson_id"
text = {{ title = "/title" }}
keyword = {{ course = "/course" }}
date = {{ published_at = "/published_at" }}
[handlers.to-rabbit]
kind = "forward"
transport = "rabbit"
exchange = "mirror"
routing_key = "lesson.{{key}}"
events = ["Lesson*"]
workers = 2
"##,
            nats_url = nats.url(),
            rabbit_url = rabbit.uri(),
        );
        let daemon = Daemon::start(&config).await;
        let world = Self {
            nats_url: nats.url(),
            nats: Mutex::new(nats),
            rabbit,
            store,
            daemon,
            ledgers: process::folder("ledgers"),
        };
        // The publishers need the exchange that the daemon declares.
        world
            .until("the sources consume", async || {
                let sources = world.daemon.json("/v1/sources").await?;
                let all = sources["sources"].as_array()?;
                all.iter().all(|source| source["state"] == "consuming").then_some(())
            })
            .await;
        world
    }

    async fn until<T>(&self, what: &str, mut holds: impl AsyncFnMut() -> Option<T>) -> T {
        let deadline = Instant::now() + DEADLINE;
        loop {
            if let Some(value) = holds().await {
                return value;
            }
            if Instant::now() > deadline {
                let ready = self.daemon.get("/readyz").await;
                let handlers = self.daemon.get("/v1/handlers").await;
                let newest = self.daemon.get("/v1/events?order=desc&limit=1").await;
                let log = self.daemon.log();
                let tail = &log[log.len().saturating_sub(6_000)..];
                panic!("not in time: {what}\n{ready:?}\n{handlers:?}\n{newest:?}\n{tail}");
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Starts a publisher; its ledger has what the broker confirmed.
    fn publish(&self, broker: &str, kind: &str, count: usize, ledger: &str) -> Publisher {
        let scripts = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients");
        let python = std::env::var_os("TEST_PULSEBUS_PYTHON").expect(
            "TEST_PULSEBUS_PYTHON: a python with nats-py and aio-pika; tests/run sets it up",
        );
        let ledger = self.ledgers.join(ledger);
        let log = std::fs::File::create(ledger.with_extension("log")).unwrap();
        let child = process::spawn(Path::new(&python), |command| {
            command.arg(scripts.join(format!("publish_{broker}.py")));
            match broker {
                "nats" => command.arg(&self.nats_url).arg("edupulse.lessons"),
                _ => command.arg(self.rabbit.uri()).arg("edupulse").arg("quiz"),
            };
            command
                .arg(kind)
                .arg(count.to_string())
                .arg(&ledger)
                .env("PYTHONDONTWRITEBYTECODE", "1")
                .stdout(log.try_clone().unwrap())
                .stderr(log);
        });
        Publisher { child, ledger }
    }

    /// Both publishers, with everything they have.
    fn publish_all(&self, round: &str) -> [Publisher; 2] {
        [
            self.publish("nats", "LessonPublished", EACH, &format!("nats-{round}")),
            self.publish("amqp", "QuizSubmitted", EACH, &format!("amqp-{round}")),
        ]
    }

    async fn head_reaches(&self, position: u64) {
        self.until(&format!("position {position}"), async || {
            (self.daemon.head().await >= position).then_some(())
        })
        .await;
    }

    /// Everything is stored, and handled.
    async fn settled(&self, events: u64) {
        self.head_reaches(events).await;
        for handler in ["search", "to-rabbit"] {
            self.until(&format!("{handler} has handled all"), async || {
                (self.daemon.handler(handler).await >= events).then_some(())
            })
            .await;
        }
    }

    /// `(position, source, id, type, key, format, body)` of every event, by SQL.
    async fn rows(&self) -> Vec<(i64, String, String, String, String, String, String)> {
        let sql = "SELECT position, source, id, type, key, format, CAST(body AS TEXT) \
                   FROM events ORDER BY position";
        macro_rules! read {
            ($connection:expr) => {
                sqlx::query(sql)
                    .fetch_all($connection)
                    .await
                    .unwrap()
                    .iter()
                    .map(|r| (r.get(0), r.get(1), r.get(2), r.get(3), r.get(4), r.get(5), r.get(6)))
                    .collect()
            };
        }
        match &self.store {
            Store::Sqlite => {
                let path = self.daemon.folder.join("data/events.db");
                let options = SqliteConnectOptions::new().filename(path).read_only(true);
                read!(&mut options.connect().await.unwrap())
            }
            Store::Postgres(server) => {
                let options: PgConnectOptions = server.url().parse().unwrap();
                read!(&mut options.connect().await.unwrap())
            }
        }
    }

    /// The ledger against the log.
    async fn audit_log(&self, ledger: &[Confirmed]) {
        let rows = self.rows().await;
        let positions: Vec<i64> = rows.iter().map(|row| row.0).collect();
        let expected: Vec<i64> = (1..=i64::try_from(rows.len()).unwrap()).collect();
        assert_eq!(positions, expected, "G3: positions are 1 … n");
        let mut stored = HashMap::new();
        for (position, source, id, kind, key, format, body) in &rows {
            let former = stored.insert((source, id), (position, kind, key, format, body));
            assert!(former.is_none(), "G2: {source} {id} is stored twice");
        }
        assert_eq!(rows.len(), ledger.len(), "what was confirmed, and nothing else");
        let mut keys: BTreeMap<(&str, &str), Vec<(i64, u64)>> = BTreeMap::new();
        for confirmed in ledger {
            let Some((position, kind, key, format, body)) =
                stored.get(&(&confirmed.source, &confirmed.id))
            else {
                panic!("G1: {} of {} is lost", confirmed.id, confirmed.source);
            };
            assert_eq!(**body, confirmed.body, "G9: byte for byte");
            assert_eq!((&***kind, &***key), (&*confirmed.r#type, &*confirmed.key));
            let form = match &*confirmed.form {
                "structured" => "cloudevents-structured",
                "binary" => "cloudevents-binary",
                form => form,
            };
            assert_eq!(**format, form);
            keys.entry((kind, key)).or_default().push((**position, confirmed.n));
        }
        for (key, mut events) in keys {
            events.sort_unstable();
            let order: Vec<u64> = events.iter().map(|(_, n)| *n).collect();
            let expected: Vec<u64> = (0..order.len() as u64).collect();
            assert_eq!(order, expected, "G5: {key:?} is out of order");
        }
    }

    /// Every lesson is one document of the index.
    async fn audit_index(&self, lessons: usize) {
        // A handler's position is ahead of what its index has committed: by a second, or longer
        // where the machine is busy.
        self.until("every lesson is found", async || {
            let all = self.daemon.json("/v1/search/search?q=photosynthesis&limit=1").await?;
            (all["total"] == lessons).then_some(())
        })
        .await;
        let mut ids = HashSet::new();
        for offset in (0..lessons).step_by(1_000) {
            let path = format!("/v1/search/search?q=photosynthesis&limit=1000&offset={offset}");
            let page = self.daemon.json(&path).await.unwrap();
            for hit in page["hits"].as_array().unwrap() {
                ids.insert(hit["id"].as_str().unwrap().to_owned());
            }
        }
        assert_eq!(ids.len(), lessons);
    }

    /// Every lesson is in the other broker's queue, as it was published, first arrivals in key
    /// order; says how many came more than once.
    async fn audit_mirror(&self, ledger: &[Confirmed]) -> usize {
        let mut missing: HashMap<&str, &Confirmed> = ledger
            .iter()
            .filter(|event| event.r#type == "LessonPublished")
            .map(|event| (&*event.id, event))
            .collect();
        let known: HashSet<String> = missing.keys().map(|id| (*id).to_owned()).collect();
        let connection =
            Connection::connect(&self.rabbit.uri(), ConnectionProperties::default()).await.unwrap();
        let channel = connection.create_channel().await.unwrap();
        channel.basic_qos(1_000, BasicQosOptions::default()).await.unwrap();
        let mut deliveries = channel
            .basic_consume(
                "mirror".into(),
                "audit".into(),
                BasicConsumeOptions { no_ack: true, ..BasicConsumeOptions::default() },
                FieldTable::default(),
            )
            .await
            .unwrap();
        let mut next: HashMap<String, u64> = HashMap::new();
        let mut again = 0;
        while !missing.is_empty() {
            let delivery = tokio::time::timeout(Duration::from_secs(30), deliveries.next())
                .await
                .unwrap_or_else(|_| panic!("{} lessons did not arrive", missing.len()))
                .unwrap()
                .unwrap();
            let id = delivery.properties.message_id().as_ref().unwrap().as_str().to_owned();
            let Some(event) = missing.remove(&*id) else {
                assert!(known.contains(&id), "{id} was never published");
                again += 1;
                continue;
            };
            assert_eq!(delivery.data, event.body.as_bytes(), "G9: byte for byte");
            let next = next.entry(event.key.clone()).or_default();
            assert_eq!(event.n, *next, "G5: {} is out of order", event.key);
            *next += 1;
        }
        connection.close(200, "done".into()).await.unwrap();
        again
    }

    /// The first round is in; everything is as it was published. Then it is published again,
    /// and some of it through the other broker, and nothing changes.
    async fn audit(&self, publishers: [Publisher; 2]) {
        let mut ledger = Vec::new();
        for publisher in publishers {
            ledger.extend(publisher.confirmed());
        }
        assert_eq!(ledger.len(), 2 * EACH);
        let events = ledger.len() as u64;
        self.settled(events).await;
        self.audit_log(&ledger).await;
        self.audit_index(EACH).await;

        let again = self.publish_all("again");
        let crossed = self.publish("amqp", "LessonPublished", 500, "crossed");
        for publisher in again.into_iter().chain([crossed]) {
            publisher.confirmed();
        }
        // A last event through each broker shows that the copies before it have been consumed.
        self.until("the copies are consumed", async || {
            let received = received(&self.daemon.get("/metrics").await?)?;
            (received >= 2 * EACH as u64 + 500).then_some(())
        })
        .await;
        assert_eq!(self.daemon.head().await, events, "G2: copies add nothing");
        let quarantined = self.daemon.json("/v1/quarantine").await.unwrap();
        assert_eq!(quarantined["quarantine"].as_array().unwrap().len(), 0, "{quarantined}");

        assert!(self.daemon.terminate().await.success(), "{}", self.daemon.log());
        self.audit_log(&ledger).await;
        let more_than_once = self.audit_mirror(&ledger).await;
        // At least once (G4): a kill between a confirm and a checkpoint sends again.
        eprintln!("forwarded more than once: {more_than_once} of {EACH}");
    }
}

/// Messages received by the lessons and quizzes sources since the daemon was started, as far
/// as both have series.
fn received(metrics: &str) -> Option<u64> {
    ["lessons", "quizzes"]
        .iter()
        .map(|source| {
            let name = format!("pulsebus_source_duplicates_total{{source=\"{source}\"}} ");
            metrics.lines().find_map(|line| line.strip_prefix(&name))?.trim().parse::<u64>().ok()
        })
        .sum()
}

/// A queue that gets what is forwarded.
async fn mirror(rabbit: &RabbitNode) {
    let connection =
        Connection::connect(&rabbit.uri(), ConnectionProperties::default()).await.unwrap();
    let channel = connection.create_channel().await.unwrap();
    let durable = ExchangeDeclareOptions { durable: true, ..ExchangeDeclareOptions::default() };
    channel
        .exchange_declare("mirror".into(), ExchangeKind::Topic, durable, FieldTable::default())
        .await
        .unwrap();
    let durable = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
    let mut arguments = FieldTable::default();
    arguments.insert("x-queue-type".into(), AMQPValue::LongString("quorum".into()));
    channel.queue_declare("mirror".into(), durable, arguments).await.unwrap();
    channel
        .queue_bind(
            "mirror".into(),
            "mirror".into(),
            "lesson.#".into(),
            QueueBindOptions::default(),
            FieldTable::default(),
        )
        .await
        .unwrap();
    connection.close(200, "done".into()).await.unwrap();
}

struct Publisher {
    child: Child,
    ledger: PathBuf,
}

impl Publisher {
    /// Waits for its end and reads what was confirmed.
    fn confirmed(mut self) -> Vec<Confirmed> {
        let deadline = Instant::now() + DEADLINE;
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(Instant::now() < deadline, "the publisher does not end: {:?}", self.ledger);
            std::thread::sleep(Duration::from_millis(50));
        };
        let log = std::fs::read_to_string(self.ledger.with_extension("log")).unwrap();
        assert!(status.success(), "the publisher failed: {log}");
        std::fs::read_to_string(&self.ledger)
            .unwrap()
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    }
}

impl Drop for Publisher {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Kills the daemon five times while events flow, and starts it again.
async fn kills(world: &World) {
    for part in 1..=5 {
        world.head_reaches(part * 2 * EACH as u64 / 7).await;
        world.daemon.kill();
        world.daemon.restart().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn G1_to_G9_from_both_brokers_into_sqlite() {
    let world = World::new(Store::Sqlite, RetentionPolicy::Limits, "edupulse.lessons.>").await;
    let publishers = world.publish_all("first");
    world.audit(publishers).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn G1_to_G9_from_both_brokers_into_postgres() {
    let postgres = PostgresServer::start().await;
    let world =
        World::new(Store::Postgres(postgres), RetentionPolicy::Limits, "edupulse.lessons.>").await;
    let publishers = world.publish_all("first");
    world.audit(publishers).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn G1_to_G9_through_five_kills_of_the_daemon() {
    let world = World::new(Store::Sqlite, RetentionPolicy::Limits, "edupulse.lessons.>").await;
    let publishers = world.publish_all("first");
    kills(&world).await;
    world.audit(publishers).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn G1_to_G9_on_a_work_queue_through_restarts_of_everything() {
    let postgres = PostgresServer::start().await;
    let mut world =
        World::new(Store::Postgres(postgres), RetentionPolicy::WorkQueue, "edupulse.lessons.>")
            .await;
    let publishers = world.publish_all("first");
    let events = 2 * EACH as u64;
    world.head_reaches(events / 8).await;
    world.nats.lock().unwrap().restart();
    world.head_reaches(events / 4).await;
    world.rabbit.kill();
    world.rabbit.restart().await;
    world.head_reaches(events / 2).await;
    if let Store::Postgres(postgres) = &mut world.store {
        postgres.kill();
        postgres.restart().await;
    }
    kills(&world).await;
    world.audit(publishers).await;
}

/// Fault 3 of the fault table: two hundred `kill -9` and more at random moments, on both stores.
/// Prints its seed; `TEST_PULSEBUS_SEED` repeats a schedule as far as the machine lets it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes an hour: tests/run --soak"]
async fn soak_G1_to_G6_through_hundreds_of_kills() {
    let seed = std::env::var("TEST_PULSEBUS_SEED").ok().and_then(|seed| seed.parse().ok());
    let mut random = seed.unwrap_or_else(|| u64::from(std::process::id()));
    eprintln!("TEST_PULSEBUS_SEED={random}");
    let mut below = |n: u64| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (random >> 33) % n
    };
    let mut killed = 0;
    let mut round = 0;
    while killed < 200 {
        round += 1;
        let (store, retention) = if round % 2 == 0 {
            (Store::Sqlite, RetentionPolicy::WorkQueue)
        } else {
            (Store::Postgres(PostgresServer::start().await), RetentionPolicy::Limits)
        };
        let world = World::new(store, retention, "edupulse.lessons.>").await;
        let publishers = world.publish_all("first");
        let events = 2 * EACH as u64;
        while world.daemon.head().await < events && killed < 1_000 {
            tokio::time::sleep(Duration::from_millis(50 + below(1_500))).await;
            world.daemon.kill();
            killed += 1;
            world.daemon.restart().await;
        }
        eprintln!("round {round}: {killed} kills so far");
        world.audit(publishers).await;
    }
}
