//! Old events go, beside live traffic: with the real daemon, a broker and both databases; and what
//! a handler that comes late, a rewind and a rebuild make of a log that begins later.

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex},
    time::Duration,
};

use async_nats::jetstream::{
    consumer::{AckPolicy, pull},
    stream,
};
use futures_util::StreamExt as _;
use pulsebus::{
    bus::{EventBus, HandlerAccessError, RetainOptions, RewindTo},
    dispatch::HandlerOptions,
    event::{NewEvent, Position, StoredEvent},
    handler::{EventHandler, Outcome},
    store::{EventStore, memory::MemoryStore},
};
use reqwest::StatusCode;
use serde_json::{Value, json};

use crate::support::{
    daemon::{Daemon, http, pulsebus},
    nats::NatsServer,
    postgres, wait_until,
};

/// A log of so many bytes is kept.
const KEPT: u64 = 100 << 10;

/// The event whose forward the broker refuses, for its size.
const DEAD: u64 = 700;

struct World {
    nats: NatsServer,
    daemon: Daemon,
    published: u64,
}

impl World {
    async fn start(store: &str) -> Self {
        let nats = NatsServer::start();
        let js = nats.jetstream().await;
        for (name, subject, max_message_size) in
            [("IN", "in.>", -1), ("OUT", "out.>", 4_096), ("AGAIN", "again.>", -1)]
        {
            let config = stream::Config {
                name: name.to_owned(),
                subjects: vec![subject.to_owned()],
                max_message_size,
                duplicate_window: Duration::from_millis(100),
                ..stream::Config::default()
            };
            js.create_stream(config).await.unwrap();
        }
        let config = format!("{}{}", config(&nats, store), SLOW);
        let daemon = Daemon::start(&config).await;
        Self { nats, daemon, published: 0 }
    }

    /// The next events, to the broker: each of one of ten keys.
    async fn publish(&mut self, events: u64) {
        let js = self.nats.jetstream().await;
        let mut acks = Vec::new();
        for n in self.published + 1..=self.published + events {
            acks.push(js.publish(format!("in.{}", n % 10), body(n).into()).await.unwrap());
        }
        for ack in acks {
            ack.await.unwrap();
        }
        self.published += events;
    }

    async fn retention(&self) -> Option<Value> {
        let ready = self.daemon.json("/readyz").await?;
        let parts = ready["components"].as_array()?;
        parts.iter().find(|part| part["component"] == "retention").cloned()
    }

    /// Waits until retention gives a reason with these words.
    async fn held(&self, by: &str) -> Value {
        wait_until(&format!("retention waits for {by}"), async || {
            let retention = self.retention().await?;
            retention["reason"].as_str().is_some_and(|why| why.contains(by)).then_some(retention)
        })
        .await
    }

    async fn first(&self) -> u64 {
        wait_until("the log", async || {
            self.daemon.json("/v1/events?limit=1").await?["first"].as_u64()
        })
        .await
    }

    /// Every position that is listed.
    async fn positions(&self) -> Vec<u64> {
        let mut all = Vec::new();
        loop {
            let after = all.last().copied().unwrap_or(0);
            let page = self.daemon.json(&format!("/v1/events?limit=1000&after={after}")).await;
            let page = page.unwrap();
            let events = page["events"].as_array().unwrap();
            all.extend(events.iter().map(|event| event["position"].as_u64().unwrap()));
            if events.is_empty() {
                return all;
            }
        }
    }

    async fn post(&self, path: &str, body: Value) -> (StatusCode, Value) {
        let sent = http().post(self.daemon.url(path)).json(&body).send().await.unwrap();
        (sent.status(), sent.json().await.unwrap())
    }
}

fn body(n: u64) -> String {
    let filling = "x".repeat(if n == DEAD { 5_000 } else { 300 });
    json!({ "id": n.to_string(), "type": "t", "source": "/it", "data": { "n": n, "x": filling } })
        .to_string()
}

fn config(nats: &NatsServer, store: &str) -> String {
    format!(
        r#"
[store]
{store}
retain = {{ size = {KEPT} }}
[limits]
tail_bytes = "1MiB"
[transports.nats]
kind = "nats"
url = "{}"
[sources.in]
transport = "nats"
stream = "IN"
consumer = "pulsebus"
key = ["token:2"]
[sources.again]
transport = "nats"
stream = "AGAIN"
consumer = "pulsebus"
[handlers.out]
kind = "forward"
transport = "nats"
subject = "out.{{key}}"
checkpoint = {{ interval = "100ms" }}
on_dead = "continue"
"#,
        nats.url()
    )
}

const SLOW: &str = r#"
[handlers.slow]
kind = "log"
level = "trace"
"#;

/// A handler lags and one has a dead letter: what they need stays, through kills, while events
/// come in; the rest goes. Copies of what is gone are known all the same.
async fn beside_live_traffic(store: &str) {
    let mut world = World::start(store).await;
    world.daemon.ready().await;
    let (paused, _) = world.post("/v1/handlers/slow/pause", json!(null)).await;
    assert_eq!(paused, StatusCode::OK);
    world.publish(500).await;
    let held = world.held("`slow`").await;
    assert_eq!(held["health"], "ready", "a handler that is behind is its own trouble: {held}");
    let needed = world.daemon.handler("slow").await;
    assert!(world.first().await <= needed + 1);

    // Kills, with more coming in.
    for _ in 0..3 {
        world.publish(300).await;
        world.daemon.kill();
        world.publish(100).await;
        world.daemon.restart().await;
    }
    let all = world.published;
    wait_until("everything is in the log", async || {
        (world.daemon.head().await == all).then_some(())
    })
    .await;
    world.held("`slow`").await;
    let first = world.first().await;
    assert!(first <= needed + 1, "{first} of what `slow` needs from {needed} on");
    assert_eq!(world.positions().await, (first..=all).collect::<Vec<_>>());

    // It goes on: what it has done may go, up to the dead letter.
    world.post("/v1/handlers/slow/resume", json!(null)).await;
    let held = world.held("`out`").await;
    assert_eq!(held["health"], "degraded", "{held}");
    let letters = world.daemon.json("/v1/dead-letters").await.unwrap();
    let dead = letters["dead_letters"][0]["position"].as_u64().unwrap();
    assert_eq!(letters["dead_letters"][0]["id"], DEAD.to_string());
    assert!(held["reason"].as_str().unwrap().contains(&format!("position {dead}")), "{held}");
    wait_until("what is before it goes", async || (world.first().await == dead).then_some(()))
        .await;
    assert_eq!(world.positions().await, (dead..=all).collect::<Vec<_>>());
    let event = world.daemon.json(&format!("/v1/events/{dead}")).await.unwrap();
    assert_eq!(event["id"], DEAD.to_string());

    // What is asked for that is gone.
    let client = http();
    let gone = client.get(world.daemon.url("/v1/events/1")).send().await.unwrap();
    assert_eq!(gone.status(), StatusCode::GONE);
    let gone: Value = gone.json().await.unwrap();
    assert_eq!(gone["first"], dead, "{gone}");
    let page = world.daemon.json("/v1/events?from=1&limit=1").await.unwrap();
    assert_eq!((&page["events"][0]["position"], &page["first"]), (&json!(dead), &json!(dead)));
    let rewound = world.post("/v1/handlers/slow/rewind", json!({ "position": 1 })).await;
    assert_eq!(rewound.0, StatusCode::BAD_REQUEST);
    assert!(rewound.1["detail"].as_str().unwrap().contains(&format!("is {dead}")), "{rewound:?}");
    let mut stream = client.get(world.daemon.url("/v1/events/stream?from=1")).send().await.unwrap();
    let mut text = String::new();
    wait_until("the stream begins", async || {
        text.push_str(std::str::from_utf8(&stream.chunk().await.unwrap()?).unwrap());
        text.contains("event: event").then_some(())
    })
    .await;
    assert!(text.contains("event: removed"), "{text}");
    assert!(text.contains(&format!("\"first\":{dead}")), "{text}");

    // Killed while it removes: nothing but the beginning is missing, and it goes on.
    let discard = json!({ "filter": {}, "reason": "too large", "by": "ann" });
    assert!(world.post("/v1/dead-letters/discard", discard).await.0.is_success());
    for _ in 0..3 {
        let before = world.first().await;
        world.publish(200).await;
        wait_until("more goes", async || (world.first().await > before).then_some(())).await;
        world.daemon.kill();
        world.daemon.restart().await;
        let (first, positions) = (world.first().await, world.positions().await);
        assert!(positions[0] >= first && first > before);
        let expected: Vec<u64> = (positions[0]..positions[0] + positions.len() as u64).collect();
        assert_eq!(positions, expected);
    }
    let all = world.published;
    wait_until("everything is in the log", async || {
        (world.daemon.head().await == all).then_some(())
    })
    .await;
    wait_until("no more is kept than is to be", async || {
        let text = world.daemon.get("/metrics").await?;
        let bytes = text.lines().find_map(|line| line.strip_prefix("pulsebus_log_bytes "))?;
        let bytes: u64 = bytes.parse().unwrap();
        (bytes <= KEPT && bytes > KEPT / 2).then_some(())
    })
    .await;
    let metrics = world.daemon.get("/metrics").await.unwrap();
    assert!(metrics.contains("pulsebus_log_removed_total"), "{metrics}");
    assert!(metrics.contains("pulsebus_log_first_position"), "{metrics}");

    // Copies, through another stream: of what is gone, and of what is there.
    let js = world.nats.jetstream().await;
    for n in (1..=all).step_by(37) {
        js.publish("again.x", body(n).into()).await.unwrap().await.unwrap();
    }
    js.publish("again.x", body(all + 1).into()).await.unwrap().await.unwrap();
    wait_until("the last one is in the log", async || {
        (world.daemon.head().await == all + 1).then_some(())
    })
    .await;
    let quarantine = world.daemon.json("/v1/quarantine").await.unwrap();
    assert_eq!(quarantine["quarantine"], json!([]));

    // Nothing was forwarded too seldom.
    wait_until("all is forwarded", async || {
        (world.daemon.handler("out").await > all).then_some(())
    })
    .await;
    let out = js.get_stream("OUT").await.unwrap();
    let pull = pull::Config { ack_policy: AckPolicy::None, ..pull::Config::default() };
    let messages = out.create_consumer(pull).await.unwrap();
    let pending = messages.cached_info().num_pending;
    let forwarded: BTreeSet<u64> = messages
        .messages()
        .await
        .unwrap()
        .take(usize::try_from(pending).unwrap())
        .map(|message| {
            let event: Value = serde_json::from_slice(&message.unwrap().payload).unwrap();
            event["id"].as_str().unwrap().parse::<u64>().unwrap()
        })
        .collect()
        .await;
    let expected: BTreeSet<u64> = (1..=all + 1).filter(|n| *n != DEAD).collect();
    assert_eq!(forwarded, expected);

    // A handler that is taken out of the configuration holds it up, until it is forgotten.
    assert!(world.daemon.terminate().await.success());
    let file = world.daemon.folder.join("pulsebus.toml");
    let without = std::fs::read_to_string(&file).unwrap().replace(SLOW, "");
    std::fs::write(&file, without).unwrap();
    world.daemon.restart().await;
    world.publish(600).await;
    let held = world.held("handlers forget slow").await;
    assert_eq!(held["health"], "degraded", "{held}");
    wait_until("the log says so", async || {
        let log = world.daemon.log();
        (log.contains("retention waits") && log.contains("forget slow")).then_some(())
    })
    .await;
    let before = world.first().await;
    let forget = async |name: &str| {
        let url = world.daemon.url("");
        pulsebus(|command| {
            command.args(["handlers", "forget", name, "--by", "ann", "--url", &url]);
        })
        .await
    };
    let refused = forget("out").await;
    assert!(!refused.status.success(), "{refused:?}");
    assert!(String::from_utf8_lossy(&refused.stderr).contains("configuration"), "{refused:?}");
    let done = forget("slow").await;
    assert!(done.status.success(), "{done:?}");
    wait_until("it goes on", async || (world.first().await > before).then_some(())).await;
    let audit = world.daemon.json("/v1/audit?limit=1").await.unwrap();
    assert_eq!(audit["audit"][0]["action"], "forget", "{audit}");
    assert!(!forget("slow").await.status.success(), "twice");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sqlite_G6_nothing_unfinished_goes_beside_live_traffic() {
    beside_live_traffic("").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn postgres_G6_nothing_unfinished_goes_beside_live_traffic() {
    let database = postgres::database().await;
    beside_live_traffic(&format!("url = \"{}\"", database.url)).await;
}

/// What it was given.
#[derive(Clone)]
struct Witness(&'static str, Arc<Mutex<Vec<u64>>>);

impl Witness {
    fn new(name: &'static str) -> Self {
        Self(name, Arc::default())
    }

    fn seen(&self) -> Vec<u64> {
        self.1.lock().unwrap().clone()
    }
}

#[async_trait::async_trait]
impl EventHandler for Witness {
    fn name(&self) -> &str {
        self.0
    }

    async fn handle(&self, event: &StoredEvent) -> Outcome {
        self.1.lock().unwrap().push(event.position.0);
        Outcome::Done
    }
}

async fn emit(bus: &EventBus, events: u64) {
    for _ in 0..events {
        bus.emit(NewEvent::new("T", &json!({})).unwrap()).await.unwrap();
    }
}

fn quick() -> HandlerOptions {
    HandlerOptions { checkpoint_interval: Duration::from_millis(20), ..HandlerOptions::default() }
}

async fn first(bus: &EventBus) -> u64 {
    bus.store().extent().await.unwrap().first().0
}

#[tokio::test]
async fn nothing_goes_before_a_registered_handler_has_begun_and_a_late_one_begins_at_the_first() {
    let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
    let interval = Duration::from_millis(10);
    let retain = RetainOptions { bytes: Some(0), interval, ..RetainOptions::default() };
    let bus = EventBus::builder().shared_store(store).retain(retain).build().await.unwrap();
    let early = Witness::new("early");
    bus.register_handler_with(Arc::new(early.clone()), quick()).await.unwrap();
    emit(&bus, 10).await;
    wait_until("it is seen that one has not begun", async || {
        bus.retention()?.unstarted.is_some_and(|name| &*name == "early").then_some(())
    })
    .await;
    assert_eq!(first(&bus).await, 1);

    bus.start_worker_pool(1);
    wait_until("everything goes", async || (first(&bus).await == 11).then_some(())).await;
    assert_eq!(early.seen(), (1..=10).collect::<Vec<_>>());

    // Paused: its events stay, and a late handler begins with the first of these.
    bus.pause("early", "ann").await.unwrap();
    emit(&bus, 5).await;
    wait_until("it is held", async || bus.retention()?.held.map(drop)).await;
    let late = Witness::new("late");
    bus.register_handler_with(Arc::new(late.clone()), quick()).await.unwrap();
    bus.handled("late", Position(15)).await.unwrap();
    assert_eq!(late.seen(), (11..=15).collect::<Vec<_>>());
    assert_eq!(first(&bus).await, 11);

    // Back to what is gone is refused, and to a time before it is as far as there is something.
    let far = bus.rewind("late", RewindTo::Position(Position(10)), true, "ann").await.unwrap_err();
    assert!(matches!(&far, HandlerAccessError::Refused(why) if why.contains("is 11")), "{far}");
    let ancient = RewindTo::Time(time::OffsetDateTime::UNIX_EPOCH);
    assert_eq!(bus.rewind("late", ancient, true, "ann").await.unwrap().0, 10);
    wait_until("it has them again", async || (late.seen().len() == 10).then_some(())).await;
    bus.resume("early", "ann").await.unwrap();
    wait_until("everything goes", async || (first(&bus).await == 16).then_some(())).await;
    bus.drain(Duration::from_secs(5)).await.unwrap();
}
