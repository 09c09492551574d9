//! "Why is it stuck?": for each cause, the answer names it, says since when, and what to do.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    time::Duration,
};

use async_trait::async_trait;
use pulsebus::{
    dispatch::HandlerOptions,
    event::StoredEvent,
    handler::{EventHandler, HandlerError, Outcome},
    retry::RetryPolicy,
    store::memory::MemoryStore,
};
use reqwest::StatusCode;
use serde_json::{Value, json};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use super::Server;
use crate::support::{
    faulty::{Fate, Faulty},
    wait_until,
};

/// Says of an event what is to become of it.
type Rule = fn(&StoredEvent) -> Outcome;

/// A handler that does as it is told.
struct Ruled {
    rule: Arc<Mutex<Rule>>,
    /// While set, calls do not return.
    hangs: Arc<AtomicBool>,
}

#[async_trait]
impl EventHandler for Ruled {
    fn name(&self) -> &str {
        "mail"
    }

    async fn handle(&self, event: &StoredEvent) -> Outcome {
        while self.hangs.load(SeqCst) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let rule = *self.rule.lock().unwrap();
        rule(event)
    }
}

/// A server with that handler.
struct Stuck {
    server: Server,
    rule: Arc<Mutex<Rule>>,
    hangs: Arc<AtomicBool>,
}

impl Stuck {
    async fn with(options: HandlerOptions, rule: Rule) -> Self {
        let server = Server::start().await;
        let (rule, hangs) = (Arc::new(Mutex::new(rule)), Arc::default());
        let handler = Ruled { rule: Arc::clone(&rule), hangs: Arc::clone(&hangs) };
        server.bus.register_handler_with(Arc::new(handler), options).await.unwrap();
        server.bus.start_worker_pool(2);
        Self { server, rule, hangs }
    }

    async fn handler(&self) -> Value {
        self.server.json("/v1/handlers/mail").await
    }

    async fn until(&self, what: &str, condition: impl Fn(&Value) -> bool) -> Value {
        wait_until(what, async || Some(self.handler().await).filter(&condition)).await
    }

    /// What `/readyz` says of the handler, and with which status.
    async fn component(&self) -> (StatusCode, Value) {
        readiness(&self.server, "handler:mail").await
    }
}

async fn readiness(server: &Server, name: &str) -> (StatusCode, Value) {
    let answer = server.get("/readyz").send().await.unwrap();
    let status = answer.status();
    let all: Value = answer.json().await.unwrap();
    let mut components = all["components"].as_array().unwrap().iter();
    let component = components.find(|component| component["component"] == name).unwrap().clone();
    assert!(age(&component["since"]) < 120.0, "{component}");
    (status, component)
}

fn age(at: &Value) -> f64 {
    let at = OffsetDateTime::parse(at.as_str().unwrap(), &Rfc3339).unwrap();
    let age = (OffsetDateTime::now_utc() - at).as_seconds_f64();
    assert!(age > -1.0, "{at} is to come");
    age
}

/// That a reason names the cause, and says what to do.
fn says(answer: &Value, words: &[&str]) {
    let reason = answer["reason"].as_str().unwrap_or_else(|| panic!("no reason in {answer}"));
    for word in words {
        assert!(reason.contains(word), "`{word}` is missing in: {reason}");
    }
}

fn bad(event: &StoredEvent) -> Outcome {
    match event.key() {
        "bad" => Outcome::retry(HandlerError::new("the mailbox is full")),
        _ => Outcome::Done,
    }
}

/// Long between attempts.
fn patient() -> HandlerOptions {
    let hour = Duration::from_secs(3_600);
    HandlerOptions {
        retry: RetryPolicy::new(8, hour, hour, 1.0, 0.0).unwrap(),
        checkpoint_interval: Duration::from_millis(20),
        ..HandlerOptions::default()
    }
}

#[tokio::test]
async fn the_store_is_away() {
    let away = Arc::new(AtomicBool::new(false));
    let fate = {
        let away = Arc::clone(&away);
        move |_: &str| if away.load(SeqCst) { Fate::Before } else { Fate::Pass }
    };
    let server = Server::with(Faulty::new(Arc::new(MemoryStore::new()), fate), |_| {}).await;
    away.store(true, SeqCst);
    let posting = server.post(r#"{"id":"1","type":"T","data":1}"#).send();
    let _posting = tokio::task::JoinSet::from_iter([posting]);
    let source = wait_until("the source is paused", async || {
        let source = server.json("/v1/sources").await["sources"][0].clone();
        (source["state"] == "paused").then_some(source)
    })
    .await;
    says(&source, &["unplugged", "when the store is back"]);
    assert_eq!(source["held"], 1, "taken and not committed: {source}");
    assert!(source["oldest_held_seconds"].as_f64().unwrap() >= 0.0, "{source}");
    assert!(age(&source["last_received_at"]) < 60.0 && source["last_settled_at"].is_null());
    let (status, store) = readiness(&server, "store").await;
    assert_eq!((status, &store["state"]), (StatusCode::SERVICE_UNAVAILABLE, &"waiting".into()));
    says(&store, &["unplugged", "nothing is acknowledged", "check the database"]);
    let since = store["since"].clone();
    let (_, again) = readiness(&server, "store").await;
    assert_eq!(again["since"], since, "one outage");
    away.store(false, SeqCst);
    wait_until("the source goes on", async || {
        let source = server.json("/v1/sources").await["sources"][0].clone();
        (source["state"] == "consuming" && source["held"] == 0).then_some(())
    })
    .await;
    let (_, store) = readiness(&server, "store").await;
    assert!(store["since"] != since && store["reason"].is_null(), "{store}");
}

#[tokio::test]
async fn the_target_is_down() {
    let stuck = Stuck::with(HandlerOptions::default(), |_| {
        Outcome::unavailable(HandlerError::new("no route to mail.example"))
    })
    .await;
    stuck.server.fill("A", "x", 3).await;
    let handler = stuck.until("it is unavailable", |h| h["state"] == "unavailable").await;
    says(&handler, &["its target is down", "no route to mail.example", "check the target"]);
    let handler = stuck.until("an error is told", |h| !h["last_error"].is_null()).await;
    assert_eq!(handler["last_error"]["text"], "no route to mail.example");
    assert!(age(&handler["last_error"]["at"]) < 60.0 && handler["lag"] == 3, "{handler}");
    let lag = handler["lag_seconds"].as_f64().unwrap();
    let handler = stuck.until("it grows", |h| h["lag_seconds"].as_f64().unwrap() > lag).await;
    assert!(handler["lag_seconds"].as_f64().unwrap() <= age(&handler["since"]) + 60.0);
    let (status, component) = stuck.component().await;
    assert_eq!((status, &component["health"]), (StatusCode::OK, &"degraded".into()));
    says(&component, &["no route to mail.example"]);
    *stuck.rule.lock().unwrap() = |_| Outcome::Done;
    let handler = stuck.until("it has caught up", |h| h["lag"] == 0).await;
    assert_eq!(handler["lag_seconds"], 0.0);
    let handler = stuck.until("it says so", |h| !h["last_progress_at"].is_null()).await;
    assert!(age(&handler["last_progress_at"]) < 60.0 && handler["reason"].is_null(), "{handler}");
}

#[tokio::test]
async fn one_key_fails_and_its_followers_wait() {
    let stuck = Stuck::with(patient(), bad).await;
    stuck.server.fill("A", "bad", 3).await;
    stuck.server.fill("A", "good", 5).await;
    let wanted = |h: &Value| h["lag"] == 0 && h["retrying"] == 1 && h["parked"] == 2;
    let handler = stuck.until("the cursor has passed it", wanted).await;
    assert_eq!((&handler["state"], &handler["blocked_keys"]), (&"running".into(), &1.into()));
    says(&handler, &["1 keys wait for another attempt", "2 events wait behind", "mailbox is full"]);
    assert!(handler["next_retry_at"].is_string(), "{handler}");
    // The event is only in the store now, and so are its key and its error.
    let blocked = handler["blocked"].as_array().unwrap();
    assert_eq!(blocked.len(), 1, "{handler}");
    let key = &blocked[0];
    assert_eq!((&key["key"], &key["position"]), (&"bad".into(), &1.into()), "{key}");
    assert_eq!((&key["state"], &key["attempts"]), (&"retrying".into(), &1.into()), "{key}");
    assert_eq!(
        (&key["followers"], &key["last_error"]["text"]),
        (&2.into(), &"the mailbox is full".into())
    );
    let due = OffsetDateTime::parse(key["due_at"].as_str().unwrap(), &Rfc3339).unwrap();
    let wait = (due - OffsetDateTime::now_utc()).whole_seconds();
    assert!((3_000..3_601).contains(&wait), "due in {wait} s");
}

#[tokio::test]
async fn all_keys_fail_until_no_more_may_wait() {
    let options = HandlerOptions { parked_total: 10, ..patient() };
    let stuck = Stuck::with(options, |_| Outcome::retry(HandlerError::new("nothing works"))).await;
    for key in 0..40 {
        stuck.server.fill("A", &format!("k{key}"), 1).await;
    }
    let handler = stuck.until("it is stalled", |h| h["state"] == "stalled").await;
    says(&handler, &["events wait for another attempt", "nothing more is read", "nothing works"]);
    let (status, component) = stuck.component().await;
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
    says(&component, &["nothing more is read"]);
    let all = |h: &Value| h["blocked_keys"] == h["blocked"].as_array().unwrap().len();
    let handler = stuck.until("all of them are told", all).await;
    let blocked = handler["blocked"].as_array().unwrap();
    assert!(blocked.len() >= 10, "{handler}");
    assert!(blocked.iter().all(|key| key["last_error"]["text"] == "nothing works"), "{handler}");
    let positions: Vec<_> = blocked.iter().map(|key| key["position"].as_u64().unwrap()).collect();
    assert!(positions.is_sorted() && positions[0] == 1, "{positions:?}");
}

#[tokio::test]
async fn a_person_has_paused_it() {
    let stuck = Stuck::with(HandlerOptions::default(), |_| Outcome::Done).await;
    stuck.until("it runs", |h| h["state"] == "running").await;
    let (path, order) = ("/v1/handlers/mail/pause", json!({}));
    assert!(stuck.server.order(path, &order).send().await.unwrap().status().is_success());
    stuck.server.fill("A", "x", 2).await;
    let handler = stuck.until("it is paused", |h| h["state"] == "paused").await;
    says(&handler, &["a person has paused it", "pulsebus handlers resume mail"]);
    let (_, component) = stuck.component().await;
    says(&component, &["pulsebus handlers resume mail"]);
}

#[tokio::test]
async fn a_dead_letter_parks_its_key() {
    let stuck = Stuck::with(patient(), |event| match event.key() {
        "bad" => Outcome::reject(HandlerError::new("no such pupil")),
        _ => Outcome::Done,
    })
    .await;
    stuck.server.fill("A", "bad", 4).await;
    let handler = stuck.until("it is saved", |h| h["lag"] == 0 && h["parked"] == 3).await;
    assert_eq!((&handler["state"], &handler["dead"]), (&"running".into(), &1.into()));
    says(&handler, &["1 dead letters wait for a person", "3 events", "pulsebus dead-letters list"]);
    let key = &handler["blocked"][0];
    assert_eq!((&key["state"], &key["key"]), (&"dead".into(), &"bad".into()), "{key}");
    assert_eq!(
        (&key["followers"], &key["last_error"]["text"]),
        (&3.into(), &"no such pupil".into())
    );
    let (status, component) = stuck.component().await;
    assert_eq!((status, &component["health"]), (StatusCode::OK, &"degraded".into()));
}

#[tokio::test]
async fn a_call_does_not_return() {
    let stuck = Stuck::with(HandlerOptions::default(), |_| Outcome::Done).await;
    stuck.server.fill("A", "x", 1).await;
    stuck.until("the first is done", |h| h["position"] == 1).await;
    stuck.hangs.store(true, SeqCst);
    stuck.server.fill("B", "x", 2).await;
    let hangs = |h: &Value| h["oldest_in_flight"]["seconds"].as_f64().is_some_and(|s| s > 0.3);
    let handler = stuck.until("a call takes long", hangs).await;
    assert_eq!(handler["oldest_in_flight"]["position"], 2, "{handler}");
    assert!(age(&handler["oldest_in_flight"]["since"]) > 0.2, "{handler}");
    stuck.hangs.store(false, SeqCst);
    let handler = stuck.until("it is over", |h| h["oldest_in_flight"].is_null()).await;
    assert_eq!(handler["lag"], 0, "{handler}");
}
