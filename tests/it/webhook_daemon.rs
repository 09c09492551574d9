//! Webhooks from the real daemon: what is posted to it reaches a receiver that is not there at
//! times, in order, and nobody reads the secrets.

use std::{
    collections::{BTreeMap, HashSet},
    time::Duration,
};

use crate::support::{
    daemon::{Daemon, http, pulsebus},
    free_port, process,
    receiver::{Receiver, Reply, Seen},
    wait_until,
};

const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";

/// A webhook to this port, with everything secret that it can have.
fn transport(port: u16) -> String {
    format!(
        r#"
[transports.crm]
kind = "http"
url = "http://127.0.0.1:{port}/services/T0-hidden?key=hidden-too"
secret = "{SECRET}"
token = "sEcReT-pa55"
timeout = "2s"
"#
    )
}

fn forward(more: &str) -> String {
    format!(
        r#"
[handlers.to-crm]
kind = "forward"
transport = "crm"
path = "/{{type}}"
timeout = "10s"
{more}
"#
    )
}

async fn post(daemon: &Daemon, events: &[serde_json::Value]) {
    let answer = http().post(daemon.url("/v1/events")).json(events).send().await.unwrap();
    assert!(answer.status().is_success(), "{answer:?}");
}

fn event(key: &str, n: usize) -> serde_json::Value {
    let id = format!("{key}-{n}");
    serde_json::json!({ "type": "LessonPublished", "id": id, "key": key, "data": { "n": n } })
}

/// The first arrivals of each key, in order.
fn arrivals(seen: &[Seen]) -> BTreeMap<String, Vec<usize>> {
    let mut known = HashSet::new();
    let mut keys: BTreeMap<String, Vec<usize>> = BTreeMap::new();
    for id in seen.iter().map(Seen::id).filter(|id| known.insert(id.to_string())) {
        let (key, n) = id.rsplit_once('-').unwrap();
        keys.entry(key.to_owned()).or_default().push(n.parse().unwrap());
    }
    keys
}

fn assert_no_secret(daemon: &Daemon) {
    let log = daemon.log();
    for secret in ["hidden", "sEcReT", "MfKQ9r8GKYqr"] {
        assert!(!log.contains(secret), "{secret} is in the log: {log}");
    }
}

async fn handled(daemon: &Daemon, events: u64) {
    wait_until("the handler has handled all", async || {
        (daemon.handler("to-crm").await >= events).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn G4_G5_what_is_posted_reaches_a_receiver_through_kills_of_both() {
    let port = free_port();
    let daemon = Daemon::start(&format!("{}{}", transport(port), forward("workers = 8"))).await;
    let keys = ["a", "b", "c", "d", "e"];
    let mut seen = Vec::new();
    let all: Vec<_> = (0..60).flat_map(|n| keys.map(|key| event(key, n))).collect();
    // Nobody listens yet.
    post(&daemon, &all[..100]).await;
    wait_until("it is said", async || {
        let handler = daemon.json("/v1/handlers/to-crm").await?;
        (handler["state"] == "unavailable").then_some(())
    })
    .await;
    assert_eq!(daemon.handler("to-crm").await, 0);
    let ready = daemon.get("/readyz").await.unwrap();
    assert!(ready.contains(&format!("cannot connect to http://127.0.0.1:{port}")), "{ready}");
    assert!(!ready.contains("hidden"), "{ready}");
    let receiver = Receiver::on(port, None, |_| Reply::status(204)).await;
    handled(&daemon, 100).await;
    // The receiver breaks while events flow; what it had half done comes again.
    let mut n = 0;
    receiver.rule(move |_| {
        n += 1;
        if n % 10 == 0 { Reply::Cut } else { Reply::status(204) }
    });
    post(&daemon, &all[100..200]).await;
    wait_until("some of it arrives", async || (receiver.seen().len() > 130).then_some(())).await;
    seen.extend(receiver.seen());
    drop(receiver);
    post(&daemon, &all[200..]).await;
    daemon.kill();
    let receiver = Receiver::on(port, None, |_| Reply::status(204)).await;
    daemon.restart().await;
    handled(&daemon, 300).await;
    seen.extend(receiver.seen());
    for (key, order) in arrivals(&seen) {
        assert_eq!(order, (0..60).collect::<Vec<_>>(), "G5: {key} is out of order");
    }
    assert_eq!(arrivals(&seen).len(), keys.len());
    let last = seen.last().unwrap();
    assert_eq!(last.path, "/services/T0-hidden/LessonPublished?key=hidden-too");
    assert!(last.header("webhook-signature").is_some());
    assert_eq!(last.header("authorization"), Some("Bearer sEcReT-pa55"));
    assert!(daemon.terminate().await.success(), "{}", daemon.log());
    assert_no_secret(&daemon);
}

#[tokio::test]
async fn a_receiver_that_asks_for_patience_gets_it() {
    // Others, of other workers, have success meanwhile.
    let mut first = true;
    let receiver = Receiver::ruled(move |seen| {
        if seen.id() == "a-0" && std::mem::take(&mut first) {
            return Reply::with(429, "Retry-After: 3", "T0-hidden sEcReT-pa55");
        }
        Reply::status(200)
    })
    .await;
    let config = format!("{}{}", transport(receiver.port()), forward("retry.attempts = 1"));
    let daemon = Daemon::start(&config).await;
    post(&daemon, &["a", "b", "c"].map(|key| event(key, 0))).await;
    handled(&daemon, 3).await;
    let seen = receiver.seen();
    let tries: Vec<_> = seen.iter().filter(|seen| seen.id() == "a-0").map(|seen| seen.at).collect();
    assert_eq!(tries.len(), 2);
    let gap = tries[1] - tries[0];
    assert!(gap >= Duration::from_secs(3), "tried again after {gap:?}");
    assert_no_secret(&daemon);
}

#[tokio::test]
async fn a_receiver_that_hangs_costs_no_event_its_attempts() {
    let receiver = Receiver::ruled(|_| Reply::Hang).await;
    let config = format!("{}{}", transport(receiver.port()), forward("retry.attempts = 1"));
    let daemon = Daemon::start(&config).await;
    post(&daemon, &[event("a", 0), event("b", 0), event("b", 1)]).await;
    wait_until("it is probed", async || (receiver.seen().len() > 3).then_some(())).await;
    receiver.rule(|_| Reply::status(200));
    handled(&daemon, 3).await;
    let handler = daemon.json("/v1/handlers/to-crm").await.unwrap();
    assert_eq!(handler["dead"], 0, "{handler}");
    assert_eq!(arrivals(&receiver.seen())["b"], [0, 1]);
}

#[tokio::test]
async fn what_a_receiver_refuses_is_a_dead_letter_and_goes_where_those_go() {
    let receiver = Receiver::ruled(|seen| match seen.id() {
        "a-0" if !seen.path.contains("/dead/") => Reply::with(422, "x: y", "no title"),
        _ => Reply::status(204),
    })
    .await;
    let dead = "dead_letter = { transport = \"crm\", path = \"/dead/{handler}\" }";
    let daemon = Daemon::start(&format!("{}{}", transport(receiver.port()), forward(dead))).await;
    post(&daemon, &[event("a", 0), event("b", 0)]).await;
    wait_until("the dead letter is published", async || {
        let seen = receiver.seen();
        let letter = seen.iter().find(|seen| seen.path.contains("/dead/"))?;
        assert_eq!(letter.path, "/services/T0-hidden/dead/to-crm?key=hidden-too");
        assert_eq!(letter.id(), "a-0");
        assert_eq!(letter.header("pulsebus-dead-reason"), Some("rejected"));
        assert!(letter.header("pulsebus-dead-error")?.contains("no title"));
        Some(())
    })
    .await;
    let letters = daemon.json("/v1/dead-letters").await.unwrap();
    assert_eq!(letters["dead_letters"][0]["attempts"], 1, "{letters}");
    assert_eq!(arrivals(&receiver.seen())["b"], [0]);
    assert_no_secret(&daemon);
}

#[tokio::test]
async fn a_person_can_post_to_a_webhook() {
    let receiver = Receiver::start().await;
    let config = process::folder("publish").join("pulsebus.toml");
    std::fs::write(&config, transport(receiver.port())).unwrap();
    let publish = async |arguments: &[&str]| {
        let output = pulsebus(|command| {
            command.arg("publish").arg("--config").arg(&config).args(["--transport", "crm"]);
            command.args(arguments);
        })
        .await;
        let text = [output.stdout, output.stderr].concat();
        (output.status.code(), String::from_utf8(text).unwrap())
    };
    let (code, text) = publish(&["--path", "/by-hand", r#"{"id": "1", "x": 1}"#]).await;
    assert_eq!((code, &*text), (Some(0), "confirmed 1\n"));
    let seen = receiver.seen().remove(0);
    assert_eq!(seen.path, "/services/T0-hidden/by-hand?key=hidden-too");
    assert_eq!((seen.id(), &*seen.body), ("1", r#"{"id": "1", "x": 1}"#));
    receiver.rule(|_| Reply::status(401));
    let (code, text) = publish(&["{}"]).await;
    assert!(code == Some(1) && text.contains("401 Unauthorized"), "{code:?} {text}");
    assert!(!text.contains("hidden"), "{text}");
    let (code, text) = publish(&["--subject", "x", "{}"]).await;
    assert!(code == Some(2) && text.contains("--path"), "{code:?} {text}");
}

#[tokio::test]
async fn one_event_that_makes_a_receiver_hang_does_not_hold_up_the_others() {
    let receiver = Receiver::ruled(|seen| match seen.id() {
        "a-0" => Reply::Hang,
        _ => Reply::status(200),
    })
    .await;
    // One worker: nothing else is under way while it hangs.
    let config =
        format!("{}{}", transport(receiver.port()), forward("workers = 1\nretry.attempts = 2"));
    let daemon = Daemon::start(&config).await;
    post(&daemon, &[event("a", 0)]).await;
    wait_until("it has hung", async || (!receiver.seen().is_empty()).then_some(())).await;
    let others: Vec<_> = (0..20).map(|n| event("b", n)).collect();
    post(&daemon, &others).await;
    wait_until("the others arrive", async || {
        (arrivals(&receiver.seen()).get("b")?.len() == 20).then_some(())
    })
    .await;
    wait_until("it is a dead letter", async || {
        let handler = daemon.json("/v1/handlers/to-crm").await?;
        (handler["dead"] == 1).then_some(())
    })
    .await;
    let letters = daemon.json("/v1/dead-letters").await.unwrap();
    let error = letters["dead_letters"][0]["last_error"].as_str().unwrap();
    assert!(error.contains("while it answers others"), "{letters}");
}

/// Two daemons, each the other's webhook: a bridge over HTTP, one way in arrays.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn G2_two_daemons_forward_to_each_other_and_nothing_loops() {
    let there = free_port();
    let config = |port: u16, handler: &str, batch: usize| {
        format!(
            "[transports.crm]\nkind = \"http\"\nurl = \"http://127.0.0.1:{port}/v1\"\n\
             timeout = \"2s\"\nbatch = {batch}\n[handlers.to-crm]\nkind = \"forward\"\n\
             transport = \"crm\"\npath = \"/events\"\ntimeout = \"10s\"\nworkers = 8\n{handler}"
        )
    };
    let first = Daemon::start(&config(there, "format = \"cloudevents-structured\"\n", 50)).await;
    let back = first.address().rsplit_once(':').unwrap().1.parse().unwrap();
    let second = Daemon::start_on(there, &config(back, "", 1)).await;
    let events: Vec<_> = (0..600)
        .map(|n| match n % 3 {
            0 => serde_json::json!({
                "type": "Native", "id": format!("n-{n}"), "key": format!("k{}", n % 7),
                "data": { "n": n, "é": [1.0, null] },
            }),
            1 => serde_json::json!({ "id": format!("r-{n}"), "plain": true, "type": 5 }),
            _ => serde_json::json!({
                "specversion": "1.0", "id": format!("s-{n}"), "source": "/s", "type": "S",
                "partitionkey": format!("k{}", n % 7), "data": n,
            }),
        })
        .collect();
    post(&first, &events).await;
    post(&second, &[event("other", 1)]).await;
    // Each has all, and has sent all: what comes back is known.
    for daemon in [&first, &second] {
        wait_until("all is forwarded", async || {
            (daemon.head().await == 601 && daemon.handler("to-crm").await == 601).then_some(())
        })
        .await;
    }
    let rows = async |daemon: &Daemon| {
        let page = daemon.json("/v1/events?limit=1000").await.unwrap();
        let mut rows: Vec<_> = page["events"]
            .as_array()
            .unwrap()
            .iter()
            .map(|e| format!("{} {} {} {}", e["source"], e["id"], e["type"], e["key"]))
            .collect();
        rows.sort();
        rows
    };
    assert_eq!(rows(&first).await, rows(&second).await);
    for daemon in [&first, &second] {
        assert_eq!(daemon.head().await, 601, "G2: nothing loops");
        let quarantined = daemon.json("/v1/quarantine").await.unwrap();
        assert_eq!(quarantined["quarantine"].as_array().unwrap().len(), 0, "{quarantined}");
    }
}
