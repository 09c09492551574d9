//! Two daemons with one configuration and one Postgres: each source and handler runs in one of
//! them at a time, and moves when that one dies.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::support::{daemon::Daemon, nats::NatsServer, postgres, wait_until};

const EVENTS: u64 = 4_000;

async fn state(daemon: &Daemon, list: &str, name: &str) -> Option<String> {
    let answer = daemon.json(&format!("/v1/{list}")).await?;
    let all = answer[list].as_array()?;
    let one = all.iter().find(|one| one["name"] == name)?;
    Some(one["state"].as_str()?.to_owned())
}

/// Publishes these, in order of each of ten keys.
async fn publish(nats: &NatsServer, numbers: std::ops::Range<u64>) {
    let jetstream = nats.jetstream().await;
    let mut acks = Vec::new();
    for n in numbers {
        let body = format!(r#"{{"type":"T","id":"{n}","data":{{"n":{n}}}}}"#);
        let subject = format!("edupulse.k{}", n % 10);
        acks.push(jetstream.publish(subject, body.into()).await.unwrap());
    }
    for ack in acks {
        ack.await.unwrap();
    }
}

async fn log(daemon: &Daemon) -> Vec<Value> {
    let mut all = Vec::new();
    loop {
        let path = format!("/v1/events?limit=1000&after={}", all.len());
        let page = daemon.json(&path).await.unwrap();
        let events = page["events"].as_array().unwrap().clone();
        if events.is_empty() {
            return all;
        }
        all.extend(events);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn G5_a_source_and_a_handler_move_when_their_daemon_dies() {
    let nats = NatsServer::start();
    let config = format!(
        r#"
[store]
url = "{}"
[transports.nats]
kind = "nats"
url = "{}"
[sources.lessons]
transport = "nats"
stream = "EDUPULSE"
create = {{ subjects = ["edupulse.>"] }}
key = ["token:2"]
[handlers.log]
kind = "log"
level = "debug"
"#,
        postgres::database().await.url,
        nats.url(),
    );
    let first = Daemon::start(&config).await;
    wait_until("the first has both", async || {
        let source = state(&first, "sources", "lessons").await? == "consuming";
        let handler = state(&first, "handlers", "log").await? == "running";
        (source && handler).then_some(())
    })
    .await;
    let second = Daemon::start(&config).await;
    wait_until("the second stands by", async || {
        let source = state(&second, "sources", "lessons").await? == "standby";
        let handler = state(&second, "handlers", "log").await? == "standby";
        (source && handler).then_some(())
    })
    .await;
    // Standing by is how it should be.
    second.ready().await;

    publish(&nats, 0..EVENTS / 2).await;
    wait_until("some are stored", async || (first.head().await > 0).then_some(())).await;
    first.kill();
    publish(&nats, EVENTS / 2..EVENTS).await;
    wait_until("the second goes on", async || {
        let source = state(&second, "sources", "lessons").await? == "consuming";
        let done = second.handler("log").await == EVENTS;
        (source && done).then_some(())
    })
    .await;

    let all = log(&second).await;
    assert_eq!(all.len() as u64, EVENTS, "each once");
    let mut keys: BTreeMap<String, Vec<u64>> = BTreeMap::new();
    for event in &all {
        let n = event["body"]["data"]["n"].as_u64().unwrap();
        keys.entry(event["key"].to_string()).or_default().push(n);
    }
    assert_eq!(keys.len(), 10);
    for (key, numbers) in keys {
        assert!(numbers.is_sorted(), "{key} is out of order");
    }

    // The first comes back, and finds it taken.
    first.restart().await;
    wait_until("it stands by", async || {
        (state(&first, "handlers", "log").await? == "standby").then_some(())
    })
    .await;
    // Drained, the second gives everything up at once.
    second.terminate().await;
    wait_until("the first has both again", async || {
        let source = state(&first, "sources", "lessons").await? == "consuming";
        let handler = state(&first, "handlers", "log").await? == "running";
        (source && handler).then_some(())
    })
    .await;
}
