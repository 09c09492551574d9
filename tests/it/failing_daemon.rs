//! What fails, and the real daemon: a target that is down, `kill -9` in the midst of a redrive
//! and of a rebuild.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    time::Duration,
};

use async_nats::jetstream::{
    consumer::{AckPolicy, pull},
    stream,
};
use futures_util::StreamExt as _;
use pulsebus::{
    event::Position,
    store::{
        EventStore as _, Limit, ProgressStore as _,
        sqlite::{SqliteOptions, SqliteStore},
    },
};
use serde_json::{Value, json};

use crate::support::{
    daemon::{Daemon, http},
    nats::NatsServer,
    wait_until,
};

/// A daemon that forwards what is posted to a stream.
struct Bridge {
    nats: NatsServer,
    daemon: Daemon,
    /// How many events each key has, which are numbered.
    posted: BTreeMap<u64, u64>,
    stream: stream::Config,
    kills: Vec<Kill>,
}

/// What the store said after a kill.
struct Kill {
    /// The last message of the stream then.
    last: u64,
    /// What was forwarded, and saved.
    finished: HashSet<String>,
}

impl Bridge {
    async fn start(max_message_size: i32) -> Self {
        let nats = NatsServer::start();
        let stream = stream::Config {
            name: "OUT".to_owned(),
            subjects: vec!["out.>".to_owned()],
            max_message_size,
            // What is sent again is to be seen, not dropped.
            duplicate_window: Duration::from_millis(100),
            ..stream::Config::default()
        };
        nats.jetstream().await.create_stream(stream.clone()).await.unwrap();
        let config = format!(
            r#"
[limits]
tail_bytes = "2MiB"
[transports.nats]
kind = "nats"
url = "{}"
[sources.http]
transport = "http"
[handlers.out]
kind = "forward"
transport = "nats"
subject = "out.{{key}}"
window = {{ bytes = "4MiB" }}
checkpoint = {{ interval = "100ms" }}
"#,
            nats.url()
        );
        let daemon = Daemon::start(&config).await;
        Self { nats, daemon, posted: BTreeMap::new(), stream, kills: Vec::new() }
    }

    /// The next event of each of these keys, with so large a text.
    async fn post(&mut self, keys: impl IntoIterator<Item = u64>, size: usize) {
        let events = keys.into_iter().map(|key| {
            let n = self.posted.entry(key).or_default();
            *n += 1;
            let data = json!({ "n": n, "text": "x".repeat(size) });
            json!({ "id": format!("{key}-{n}"), "type": "t", "key": key.to_string(), "data": data })
        });
        post(&self.daemon, events.collect()).await;
    }

    fn events(&self) -> u64 {
        self.posted.values().sum()
    }

    async fn handler(&self) -> Value {
        wait_until("the handler's state", async || self.daemon.json("/v1/handlers/out").await).await
    }

    /// Nothing is left to be done.
    async fn settled(&self) {
        wait_until("everything is forwarded", async || {
            let handler = self.daemon.json("/v1/handlers/out").await?;
            let ended = handler["position"] == self.events() && handler["in_flight"] == 0;
            ended.then_some(())
        })
        .await;
    }

    /// `kill -9`, and a look at what has been saved.
    async fn kill(&mut self) {
        self.daemon.kill();
        let mut stream = self.nats.jetstream().await.get_stream("OUT").await.unwrap();
        let last = stream.info().await.unwrap().state.last_sequence;
        let store = SqliteStore::open(SqliteOptions::new(self.daemon.database())).await.unwrap();
        let cursor = store.cursor("out").await.unwrap().unwrap();
        let rows = store.unfinished("out", Position::START, 100_000).await.unwrap();
        let rows: HashSet<_> = rows.into_iter().map(|row| row.position).collect();
        let (mut finished, mut after) = (HashSet::new(), Position::START);
        while after < cursor {
            for event in store.read(after, Limit::default()).await.unwrap() {
                after = event.position;
                if after <= cursor && !rows.contains(&after) {
                    finished.insert(event.id().to_owned());
                }
            }
        }
        store.close().await;
        self.kills.push(Kill { last, finished });
    }

    /// Every event is in the stream, first arrivals in key order, and none again after that was
    /// saved; says how many came again.
    async fn audit(&self) -> u64 {
        let mut stream = self.nats.jetstream().await.get_stream("OUT").await.unwrap();
        let messages = stream.info().await.unwrap().state.messages;
        let consumer = pull::Config { ack_policy: AckPolicy::None, ..pull::Config::default() };
        let consumer = stream.create_consumer(consumer).await.unwrap();
        let messages = usize::try_from(messages).unwrap();
        let mut received = consumer.messages().await.unwrap().take(messages);
        let (mut last, mut again) = (HashMap::<u64, u64>::new(), 0);
        while let Some(message) = received.next().await {
            let message = message.unwrap();
            let id = message.headers.as_ref().unwrap().get("Nats-Msg-Id").unwrap().as_str();
            let number = message.info().unwrap().stream_sequence;
            for (n, kill) in self.kills.iter().enumerate().filter(|(_, kill)| kill.last < number) {
                assert!(!kill.finished.contains(id), "{id} was done before kill {n}, and again");
            }
            let (key, n) = id.split_once('-').unwrap();
            let (key, n): (u64, u64) = (key.parse().unwrap(), n.parse().unwrap());
            let last = last.entry(key).or_default();
            if n <= *last {
                again += 1;
                continue;
            }
            assert_eq!(n, *last + 1, "G5: {id} came after {last}");
            *last = n;
        }
        let last: BTreeMap<_, _> = last.into_iter().collect();
        assert!(last == self.posted, "not everything has arrived: {last:?}");
        again
    }
}

async fn post(daemon: &Daemon, events: Vec<Value>) {
    let events = json!(events).to_string();
    let request = http().post(daemon.url("/v1/events")).body(events);
    let answer = request.header("content-type", "application/json").send().await.unwrap();
    assert!(answer.status().is_success(), "{}", answer.text().await.unwrap());
}

/// Tells the daemon to do something.
async fn tell(daemon: &Daemon, path: &str, body: &Value) -> Value {
    let request = http().post(daemon.url(path)).body(body.to_string());
    let answer = request.header("content-type", "application/json").send().await.unwrap();
    let status = answer.status();
    let text = answer.text().await.unwrap();
    assert!(status.is_success(), "{path}: {text}");
    serde_json::from_str(&text).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn G5_G7_G8_twenty_thousand_events_outlast_a_broker_that_is_down() {
    let mut bridge = Bridge::start(-1).await;
    bridge.post(0..1_000, 4_000).await;
    bridge.settled().await;
    let before = bridge.daemon.resident();

    bridge.nats.kill();
    let (mut most, mut half) = (0, 0);
    for n in 0..20 {
        bridge.post((0..1_000).map(|m| (n * 1_000 + m) % 1_234), 4_000).await;
        most = most.max(bridge.daemon.resident());
        if n == 9 {
            half = most;
        }
    }
    wait_until("it says so", async || {
        (bridge.handler().await["state"] == "unavailable").then_some(())
    })
    .await;

    bridge.nats.restart();
    wait_until("everything is forwarded", async || {
        most = most.max(bridge.daemon.resident());
        let handler = bridge.handler().await;
        (handler["position"] == bridge.events() && handler["in_flight"] == 0).then_some(())
    })
    .await;
    let [grown, later] = [before, half].map(|from| most.saturating_sub(from) >> 20);
    eprintln!("{} MiB, {grown} MiB more at most, {later} MiB in the second half", before >> 20);
    assert!(grown < 64, "it grew by {grown} MiB, of 80 MiB that were posted");
    assert!(later < 16, "it grew by {later} MiB after half of it");
    bridge.settled().await;
    let letters = bridge.daemon.json("/v1/dead-letters").await.unwrap();
    assert_eq!(letters["dead_letters"], json!([]));
    let again = bridge.audit().await;
    eprintln!("forwarded more than once: {again}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn G4_G5_G6_a_redrive_goes_on_through_kills_under_live_traffic() {
    const KEYS: u64 = 400;
    const KILLS: u64 = 5;
    // The first event of each key is larger than the stream takes.
    let mut bridge = Bridge::start(2_000).await;
    bridge.post(0..KEYS, 4_000).await;
    for _ in 0..4 {
        bridge.post(0..KEYS, 10).await;
    }
    wait_until("every key is parked", async || {
        let handler = bridge.handler().await;
        (handler["dead"] == KEYS && handler["parked"] == 4 * KEYS).then_some(())
    })
    .await;
    let wider = stream::Config { max_message_size: -1, ..bridge.stream.clone() };
    bridge.nats.jetstream().await.update_stream(wider).await.unwrap();

    let order = json!({ "filter": {}, "rate": 40, "by": "ann" });
    let started = tell(&bridge.daemon, "/v1/dead-letters/retry", &order).await;
    assert_eq!(started["redrive"]["total"], KEYS, "{started}");
    let path = format!("/v1/redrives/{}", started["redrive"]["number"]);
    let mut left = KEYS;
    for _ in 0..KILLS {
        bridge.post(0..KEYS + 50, 10).await;
        // Further than it was: it goes on by itself.
        left = wait_until("it gets on", async || {
            let redrive = bridge.daemon.json(&path).await?;
            let now = redrive["left"].as_u64()?;
            (now + 20 <= left).then_some(now)
        })
        .await;
        assert!(left > 0, "it ended before it was killed often enough");
        bridge.kill().await;
        bridge.daemon.restart().await;
    }
    let redrive = wait_until("it ends", async || {
        let redrive = bridge.daemon.json(&path).await?;
        (redrive["state"] == "done").then_some(redrive)
    })
    .await;
    assert_eq!((&redrive["total"], &redrive["left"]), (&json!(KEYS), &json!(0)));
    bridge.settled().await;
    let letters = bridge.daemon.json("/v1/dead-letters").await.unwrap();
    assert_eq!(letters["dead_letters"], json!([]));
    // At least once (G4): a kill between a confirm and a checkpoint sends again what was done
    // since the last checkpoint, and nothing else.
    let again = bridge.audit().await;
    eprintln!("forwarded more than once: {again} of {}", bridge.events());
    assert!(bridge.kills.iter().any(|kill| !kill.finished.is_empty()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn G6_a_rebuild_goes_on_through_kills_until_it_is_whole() {
    const DOCUMENTS: usize = 10_000;
    const KILLS: usize = 5;
    let config = r#"
[sources.http]
transport = "http"
[handlers.lessons]
kind = "search"
window = { events = 200 }
[handlers.lessons.documents.Lesson]
id = "/id"
text = { title = "/title" }
"#;
    let daemon = Daemon::start(config).await;
    let handler = async || daemon.json("/v1/handlers/lessons").await;
    let total = async || {
        let found = daemon.json("/v1/search/lessons?q=photosynthesis&limit=0").await?;
        found["total"].as_u64()
    };
    let lesson = |n: usize| {
        let data = json!({ "id": n, "title": format!("photosynthesis {n}") });
        json!({ "id": format!("e{n}"), "type": "Lesson", "key": n.to_string(), "data": data })
    };
    for first in (0..DOCUMENTS).step_by(1_000) {
        post(&daemon, (first..first + 1_000).map(lesson).collect()).await;
    }
    wait_until("all are indexed", async || (total().await? == DOCUMENTS as u64).then_some(()))
        .await;

    let (mut resumed, mut kills, mut documents) = (0, 0, DOCUMENTS);
    while kills < KILLS {
        let under_way = handler().await.unwrap()["rebuild"].clone();
        if under_way.is_null() {
            tell(&daemon, "/v1/handlers/lessons/rebuild", &json!({})).await;
        }
        let from = under_way["position"].as_u64().unwrap_or(0);
        wait_until("it gets on", async || {
            let rebuild = &handler().await?["rebuild"];
            let ended = rebuild.is_null();
            (ended || rebuild["position"].as_u64()? > from).then_some(())
        })
        .await;
        post(&daemon, vec![lesson(documents)]).await;
        documents += 1;
        daemon.kill();
        kills += 1;
        daemon.restart().await;
        resumed += usize::from(!handler().await.unwrap()["rebuild"].is_null());
        // The old one serves until the new one is whole; what came last may not be in it yet.
        let found = usize::try_from(total().await.unwrap()).unwrap();
        assert!(found >= DOCUMENTS, "searches find only {found}");
    }
    eprintln!("resumed {resumed} times after {kills} kills");
    assert!(resumed > 0, "no kill came in the midst of a rebuild");
    wait_until("it ends", async || handler().await?["rebuild"].is_null().then_some(())).await;
    wait_until("all are found", async || (total().await? == documents as u64).then_some(())).await;
    let mut ids = BTreeSet::new();
    for offset in (0..documents).step_by(1_000) {
        let path = format!("/v1/search/lessons?q=photosynthesis&limit=1000&offset={offset}");
        for hit in daemon.json(&path).await.unwrap()["hits"].as_array().unwrap() {
            ids.insert(hit["id"].as_str().unwrap().parse::<usize>().unwrap());
        }
    }
    assert_eq!(ids, (0..documents).collect());
    assert!(daemon.terminate().await.success());
}
