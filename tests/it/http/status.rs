//! `/healthz`, `/readyz`, `/metrics`.

use std::sync::{
    Arc, Mutex,
    atomic::{AtomicBool, Ordering::SeqCst},
};

use async_trait::async_trait;
use pulsebus::{
    dispatch::HandlerOptions,
    event::{Position, StoredEvent},
    handler::{EventHandler, Outcome},
    store::memory::MemoryStore,
};
use reqwest::StatusCode;
use serde_json::Value;

use super::{Server, answer, content_type, problem};
use crate::support::{
    faulty::{Fate, Faulty},
    wait_until,
};

/// A store that can be away.
fn unplugged(away: &Arc<AtomicBool>) -> Faulty {
    let away = Arc::clone(away);
    let fate = move |_: &str| if away.load(SeqCst) { Fate::Before } else { Fate::Pass };
    Faulty::new(Arc::new(MemoryStore::new()), fate)
}

/// A handler that answers as it is told.
struct Told(Arc<Mutex<fn() -> Outcome>>);

#[async_trait]
impl EventHandler for Told {
    fn name(&self) -> &str {
        "told"
    }

    async fn handle(&self, _event: &StoredEvent) -> Outcome {
        let answer = *self.0.lock().unwrap();
        answer()
    }
}

async fn readiness(server: &Server) -> (StatusCode, Value) {
    let answer = server.get("/readyz").send().await.unwrap();
    let status = answer.status();
    let readiness: Value = answer.json().await.unwrap();
    assert_eq!(readiness["ready"], status.is_success(), "{readiness}");
    (status, readiness)
}

fn component<'a>(readiness: &'a Value, name: &str) -> &'a Value {
    let components = readiness["components"].as_array().unwrap();
    components.iter().find(|component| component["component"] == name).unwrap()
}

#[tokio::test]
async fn G8_a_store_that_is_away_is_said_and_comes_back() {
    let away = Arc::new(AtomicBool::new(false));
    let store = unplugged(&away);
    let server = Server::with(store, |_| {}).await;
    away.store(true, SeqCst);
    let (http, url) = (server.http.clone(), server.at("/v1/events"));
    let body = r#"{"id":"1","type":"T","data":1}"#;
    // Waits for its commit, all the while.
    let posting = tokio::task::JoinSet::from_iter([async move {
        http.post(url).body(body).send().await.unwrap().json::<Value>().await.unwrap()
    }]);
    let readiness_while_away = wait_until("not ready", async || {
        let (status, readiness) = readiness(&server).await;
        (status == StatusCode::SERVICE_UNAVAILABLE).then_some(readiness)
    })
    .await;
    let store = component(&readiness_while_away, "store");
    assert_eq!((&store["health"], &store["state"]), (&"not_ready".into(), &"waiting".into()));
    assert!(store["reason"].as_str().unwrap().contains("unplugged"), "{store}");
    wait_until("the source is paused", async || {
        let sources = server.json("/v1/sources").await;
        (sources["sources"][0]["state"] == "paused").then_some(())
    })
    .await;
    // The process itself is well, and what needs the store says that it is away.
    assert_eq!(server.get("/healthz").send().await.unwrap().status(), StatusCode::OK);
    for path in ["/v1/quarantine", "/v1/dead-letters", "/v1/events?type=T"] {
        let (status, _) = problem(server.get(path)).await;
        assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE, "{path}");
    }
    away.store(false, SeqCst);
    let posted = posting.join_all().await.remove(0);
    assert_eq!(posted["position"], 1, "{posted}");
    wait_until("ready again", async || {
        (readiness(&server).await.0 == StatusCode::OK).then_some(())
    })
    .await;
}

#[tokio::test]
async fn G1_a_commit_that_takes_too_long_is_not_acknowledged() {
    let away = Arc::new(AtomicBool::new(false));
    let store = unplugged(&away);
    let timeout = std::time::Duration::from_millis(300);
    let server = Server::with(store, |options| options.timeout = timeout).await;
    away.store(true, SeqCst);
    let event = r#"{"id":"1","type":"T","data":1}"#;
    let answer = server.post(event).send().await.unwrap();
    assert_eq!(answer.status(), StatusCode::SERVICE_UNAVAILABLE);
    assert!(answer.headers().contains_key("retry-after"));
    away.store(false, SeqCst);
    // Posted again it is there once, whatever became of the first.
    wait_until("it is committed", async || {
        let answer = server.post(event).send().await.unwrap();
        answer.status().is_success().then_some(())
    })
    .await;
    assert_eq!(server.bus.log().head().0, 1);
}

#[tokio::test]
async fn a_handler_whose_target_is_down_is_said() {
    let server = Server::start().await;
    let told: Arc<Mutex<fn() -> Outcome>> =
        Arc::new(Mutex::new(|| Outcome::unavailable(pulsebus::handler::HandlerError::new("gone"))));
    let options = HandlerOptions::default();
    server.bus.register_handler_with(Arc::new(Told(Arc::clone(&told))), options).await.unwrap();
    server.bus.start_worker_pool(2);
    server.fill("A", "x", 1).await;
    let shown = wait_until("the handler is unavailable", async || {
        let handler = server.json("/v1/handlers/told").await;
        (handler["state"] == "unavailable").then_some(handler)
    })
    .await;
    assert!(shown["reason"].as_str().unwrap().contains("gone"), "{shown}");
    // It comes back by itself, and events come in all the while.
    let (status, readiness_while_down) = readiness(&server).await;
    assert_eq!(status, StatusCode::OK);
    assert_eq!(component(&readiness_while_down, "handler:told")["health"], "degraded");
    *told.lock().unwrap() = || Outcome::Done;
    wait_until("it has caught up", async || {
        (server.json("/v1/handlers/told").await["lag"] == 0).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_handler_that_needs_a_person_makes_it_unready() {
    /// Cannot say where it is: it does not start.
    struct Broken;
    #[async_trait]
    impl EventHandler for Broken {
        fn name(&self) -> &str {
            "broken"
        }

        async fn handle(&self, _event: &StoredEvent) -> Outcome {
            Outcome::Done
        }

        async fn position(&self) -> Result<Option<Position>, pulsebus::handler::HandlerError> {
            Err(pulsebus::handler::HandlerError::new("its index is torn"))
        }
    }
    let server = Server::start().await;
    server.bus.register_handler(Broken).await.unwrap();
    server.bus.start_worker_pool(1);
    let readiness = wait_until("not ready, with the reason", async || {
        let (status, readiness) = readiness(&server).await;
        let reason = component(&readiness, "handler:broken")["reason"].as_str()?;
        (status == StatusCode::SERVICE_UNAVAILABLE && reason.contains("torn"))
            .then_some(readiness.clone())
    })
    .await;
    assert_eq!(component(&readiness, "store")["health"], "ready");
}

/// The samples of an OpenMetrics text by their names and labels; fails on what is none.
fn samples(text: &str) -> std::collections::BTreeMap<String, f64> {
    let body = text.strip_suffix("# EOF\n").expect("it ends with # EOF");
    let mut types = std::collections::BTreeSet::new();
    let mut samples = std::collections::BTreeMap::new();
    for line in body.lines() {
        if let Some(comment) = line.strip_prefix("# ") {
            let mut words = comment.split(' ');
            let (what, name) = (words.next().unwrap(), words.next().unwrap());
            assert!(["HELP", "TYPE", "UNIT"].contains(&what), "{line}");
            if what == "TYPE" {
                assert!(types.insert(name.to_owned()), "{name} has two types");
            }
            continue;
        }
        let (series, value) = line.rsplit_once(' ').unwrap_or_else(|| panic!("{line}"));
        let name = series.split('{').next().unwrap();
        let family = ["_total", "_bucket", "_sum", "_count", "_info"]
            .iter()
            .find_map(|suffix| name.strip_suffix(suffix).filter(|name| types.contains(*name)))
            .unwrap_or(name);
        assert!(types.contains(family), "{name} has no type");
        let value = value.parse().unwrap_or_else(|_| panic!("{line}"));
        assert!(samples.insert(series.to_owned(), value).is_none(), "{series} is there twice");
    }
    samples
}

#[tokio::test]
async fn metrics_are_openmetrics_and_count() {
    let server = Server::start().await;
    let told: Arc<Mutex<fn() -> Outcome>> = Arc::new(Mutex::new(|| Outcome::Done));
    server.bus.register_handler(Told(told)).await.unwrap();
    server.bus.start_worker_pool(2);
    server.fill("A", "x", 3).await;
    let again = r#"[{"id":"A-x-0","type":"A","key":"x","data":0},{"id":"n","type":"A","data":0},
        {"specversion":"1.0"}]"#;
    let again = answer(server.post(again)).await;
    assert_eq!((&again["stored"], &again["duplicates"]), (&1.into(), &1.into()));
    let text = wait_until("all is handled", async || {
        let answer = server.get("/metrics").send().await.unwrap();
        assert_eq!(
            content_type(&answer),
            "application/openmetrics-text; version=1.0.0; charset=utf-8"
        );
        let text = answer.text().await.unwrap();
        let lag = samples(&text).get("pulsebus_handler_lag_events{handler=\"told\"}") == Some(&0.0);
        lag.then_some(text)
    })
    .await;
    let samples = samples(&text);
    for (series, wanted) in [
        ("pulsebus_source_received_total{source=\"http\"}", 6.0),
        ("pulsebus_source_stored_total{source=\"http\"}", 4.0),
        ("pulsebus_source_duplicates_total{source=\"http\"}", 1.0),
        ("pulsebus_source_quarantined_total{source=\"http\"}", 1.0),
        ("pulsebus_source_redelivered_total{source=\"http\"}", 0.0),
        ("pulsebus_source_up{source=\"http\"}", 1.0),
        ("pulsebus_log_head_position", 4.0),
        ("pulsebus_handler_outcomes_total{handler=\"told\",outcome=\"done\"}", 4.0),
        ("pulsebus_handler_up{handler=\"told\"}", 1.0),
        ("pulsebus_log_commit_failures_total", 0.0),
    ] {
        assert_eq!(samples.get(series), Some(&wanted), "{series} in\n{text}");
    }
    assert!(samples["pulsebus_log_commit_seconds_count"] >= 2.0, "{text}");
    assert!(samples["pulsebus_source_received_bytes_total{source=\"http\"}"] > 100.0, "{text}");
}
