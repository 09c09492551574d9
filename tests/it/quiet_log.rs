//! What the daemon says at `info`: each change of state once, and nothing for each event.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::support::{
    daemon::{Daemon, http},
    receiver::{Receiver, Reply},
    wait_until,
};

const EVENTS: u64 = 1_000;

#[tokio::test]
async fn G8_each_change_of_state_is_logged_once_and_nothing_for_each_event() {
    let receiver = Receiver::start().await;
    let mut calls = 0;
    receiver.rule(move |_| {
        calls += 1;
        Reply::status(match calls {
            // A failed attempt, which is tried again; and an outage of several probes.
            100 => 500,
            200..=204 => 503,
            _ => 204,
        })
    });
    let daemon = Daemon::start(&format!(
        r#"
[transports.hook]
kind = "http"
url = "{}"
[handlers.mail]
kind = "forward"
transport = "hook"
workers = 1
retry = {{ initial = "10ms", max = "100ms" }}
"#,
        receiver.url("/")
    ))
    .await;
    daemon.ready().await;
    let batch: Vec<_> =
        (0..EVENTS).map(|n| json!({"id": n.to_string(), "type": "T", "data": n})).collect();
    let answer = http().post(daemon.url("/v1/events")).json(&batch).send().await.unwrap();
    assert!(answer.status().is_success());
    wait_until("all events are through", async || {
        (daemon.handler("mail").await == EVENTS).then_some(())
    })
    .await;
    assert!(receiver.seen().len() as u64 >= EVENTS + 6, "a retry and an outage");
    assert!(daemon.terminate().await.success());

    let log = daemon.log();
    let mut said: BTreeMap<String, usize> = BTreeMap::new();
    for line in log.lines().filter(|line| line.starts_with('{')) {
        let line: Value = serde_json::from_str(line).unwrap();
        let level = line["level"].as_str().unwrap();
        *said.entry(format!("{level} {}", line["message"].as_str().unwrap())).or_default() += 1;
    }
    let expected = LINES.map(|(line, times)| (line.to_owned(), times));
    assert_eq!(said, BTreeMap::from(expected), "{log}");
}

/// Every line of such a daemon's life, and how often it is said.
const LINES: [(&str, usize); 9] = [
    ("INFO starting", 1),
    ("INFO HTTP is up", 1),
    ("INFO the bus is up", 1),
    ("INFO ready", 1),
    // Consuming, and stopped.
    ("INFO source changed state", 2),
    // Running, running again after the outage, and stopped.
    ("INFO handler changed state", 3),
    ("WARN handler waits", 1),
    ("INFO draining; a second signal ends at once", 1),
    ("INFO drained", 1),
];
