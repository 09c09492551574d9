//! "Why is it stuck?", asked of real daemons: a broker that is away, a source that does not fit, a
//! daemon that stands by, and what the commands print.

use serde_json::{Value, json};

use crate::support::{
    daemon::{BINARY, Daemon, http, pulsebus},
    nats::NatsServer,
    postgres,
    receiver::{Receiver, Reply},
    wait_until,
};

async fn source(daemon: &Daemon, name: &str) -> Option<Value> {
    let answer = daemon.json("/v1/sources").await?;
    answer["sources"].as_array()?.iter().find(|source| source["name"] == name).cloned()
}

async fn component(daemon: &Daemon, name: &str) -> Option<Value> {
    let answer = daemon.json("/readyz").await?;
    let all = answer["components"].as_array()?;
    all.iter().find(|component| component["component"] == name).cloned()
}

fn says(answer: &Value, words: &[&str]) {
    let reason = answer["reason"].as_str().unwrap_or_else(|| panic!("no reason in {answer}"));
    for word in words {
        assert!(reason.contains(word), "`{word}` is missing in: {reason}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broker_that_is_away_and_a_source_that_does_not_fit_are_named() {
    let mut nats = NatsServer::start();
    let daemon = Daemon::start(&format!(
        r#"
[transports.nats]
kind = "nats"
url = "{}"
[sources.lessons]
transport = "nats"
stream = "EDUPULSE"
create = {{ subjects = ["edupulse.>"] }}
[sources.other]
transport = "nats"
stream = "NOBODY_MADE_THIS"
"#,
        nats.url()
    ))
    .await;
    let other = wait_until("one does not fit", async || {
        source(&daemon, "other").await.filter(|source| source["state"] == "misconfigured")
    })
    .await;
    says(&other, &["NOBODY_MADE_THIS", "the configuration or the broker has to change"]);
    assert_eq!(component(&daemon, "source:other").await.unwrap()["health"], "not_ready");
    wait_until("the other one consumes", async || {
        source(&daemon, "lessons").await.filter(|source| source["state"] == "consuming")
    })
    .await;
    let jetstream = nats.jetstream().await;
    for n in 0..3 {
        let body = json!({"type": "T", "id": n.to_string(), "data": n}).to_string();
        jetstream.publish("edupulse.t", body.into()).await.unwrap().await.unwrap();
    }
    let lessons = wait_until("they are settled", async || {
        let lessons = source(&daemon, "lessons").await?;
        (lessons["stored"] == 3 && lessons["last_settled_at"].is_string()).then_some(lessons)
    })
    .await;
    // The broker has said that nothing waits behind the last one.
    assert_eq!((&lessons["pending"], &lessons["held"]), (&0.into(), &0.into()), "{lessons}");
    let (since, lost) = (lessons["since"].clone(), lessons["reconnects"].as_u64().unwrap());
    nats.kill();
    let lessons = wait_until("the broker is missed", async || {
        source(&daemon, "lessons").await.filter(|source| source["state"] == "reconnecting")
    })
    .await;
    says(&lessons, &["check that the broker runs"]);
    assert!(lessons["since"] != since && lessons["reconnects"] == lost + 1, "{lessons}");
    says(&component(&daemon, "source:lessons").await.unwrap(), &["check that the broker runs"]);
    nats.restart();
    let lessons = wait_until("it is back", async || {
        source(&daemon, "lessons").await.filter(|source| source["state"] == "consuming")
    })
    .await;
    // What it was is still known.
    assert!(lessons["last_error"]["text"].is_string() && lessons["reason"].is_null(), "{lessons}");
    assert!(lessons["reconnects"] == lost + 1, "{lessons}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_daemon_that_stands_by_says_who_runs_it_and_how_far_that_is() {
    let config = format!(
        "[store]\nurl = \"{}\"\n[sources.http]\ntransport = \"http\"\n[handlers.log]\n\
         kind = \"log\"\nlevel = \"debug\"\n",
        postgres::database().await.url
    );
    let first = Daemon::start(&config).await;
    first.ready().await;
    let second = Daemon::start(&config).await;
    let waiting = wait_until("the second stands by", async || {
        let handler = second.json("/v1/handlers/log").await?;
        (handler["state"] == "standby").then_some(handler)
    })
    .await;
    says(&waiting, &["runs it"]);
    let events: Vec<_> =
        (0..5).map(|n| json!({"type": "T", "id": format!("{n}"), "data": n})).collect();
    let posted = http().post(first.url("/v1/events")).body(json!(events).to_string());
    assert!(posted.send().await.unwrap().status().is_success());
    // From the store: this process handles nothing.
    let waiting = wait_until("the second knows how far the first is", async || {
        let handler = second.json("/v1/handlers/log").await?;
        (handler["position"] == 5 && handler["lag"] == 0).then_some(handler)
    })
    .await;
    assert_eq!(waiting["lag_seconds"], 0.0, "{waiting}");
    let held = async |daemon: &Daemon| {
        let metrics = daemon.get("/metrics").await?;
        let name = "pulsebus_lease_held{component=\"handler:log\"} ";
        metrics.lines().find_map(|line| line.strip_prefix(name)).map(str::to_owned)
    };
    assert_eq!(held(&first).await.as_deref(), Some("1"));
    assert_eq!(held(&second).await.as_deref(), Some("0"));
    first.kill();
    wait_until("the second takes over, and counts that", async || {
        let metrics = second.get("/metrics").await?;
        let over = "pulsebus_lease_takeovers_total{component=\"handler:log\"} 1";
        (held(&second).await.as_deref() == Some("1") && metrics.contains(over)).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_commands_show_what_is_stuck_on_a_terminal() {
    let receiver =
        Receiver::ruled(|seen| Reply::status(if seen.body.contains("bad") { 500 } else { 200 }))
            .await;
    let daemon = Daemon::start(&format!(
        r#"
[limits]
tail_bytes = "100B"
[transports.crm]
kind = "http"
url = "{}"
[sources.http]
transport = "http"
[handlers.crm]
kind = "forward"
transport = "crm"
retry = {{ attempts = 8, initial = "1h", max = "1h" }}
[handlers.asleep]
kind = "log"
"#,
        receiver.url("/")
    ))
    .await;
    daemon.ready().await;
    let ask = async |arguments: &[&str]| {
        let url = daemon.url("");
        let output = pulsebus(|command| {
            command.args(arguments).args(["--url", &url]);
        })
        .await;
        assert!(output.status.success(), "{BINARY} {arguments:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    ask(&["handlers", "pause", "asleep"]).await;
    let events: Vec<_> = (0..9)
        .map(|n| {
            json!({"type": "T", "id": format!("{n}"), "key": if n < 3 { "bad" } else { "good" },
            "data": if n < 3 { "bad" } else { "good" }})
        })
        .collect();
    let posted = http().post(daemon.url("/v1/events")).body(json!(events).to_string());
    assert!(posted.send().await.unwrap().status().is_success());
    wait_until("one key is blocked, two events behind it", async || {
        let handler = daemon.json("/v1/handlers/crm").await?;
        (handler["parked"] == 2 && handler["lag"] == 0).then_some(())
    })
    .await;
    // The event behind this cursor is not in memory any more: it is looked up.
    wait_until("the age of what it has not passed is known", async || {
        let handler = daemon.json("/v1/handlers/asleep").await?;
        (handler["lag"] == 9 && handler["lag_seconds"].as_f64()? > 0.0).then_some(())
    })
    .await;

    let list = ask(&["handlers", "list"]).await;
    assert!(list.lines().all(|line| line.chars().count() <= 100), "{list}");
    let head: Vec<_> = list.lines().next().unwrap().split_whitespace().collect();
    assert_eq!(
        head,
        ["NAME", "KIND", "STATE", "FOR", "LAG", "BEHIND", "RETRYING", "PARKED", "DEAD", "REASON"]
    );
    let row = |name: &str| list.lines().find(|line| line.starts_with(name)).unwrap();
    assert!(row("asleep").contains("paused") && row("asleep").contains("a person"), "{list}");
    assert!(row("crm").contains("1 keys wait"), "{list}");

    let shown = ask(&["handlers", "show", "crm"]).await;
    for words in [
        "running for",
        "1 keys wait for another attempt",
        "last error",
        "500",
        "next retry",
        "keys that do not flow",
        "bad",
        "retrying",
    ] {
        assert!(shown.contains(words), "`{words}` is missing in:\n{shown}");
    }
    let json: Value =
        serde_json::from_str(&ask(&["handlers", "show", "crm", "--json"]).await).unwrap();
    assert_eq!(json["blocked"][0]["key"], "bad", "{json}");
    let shown = ask(&["handlers", "show", "asleep"]).await;
    assert!(shown.contains("pulsebus handlers resume asleep"), "{shown}");
    assert!(shown.contains("9 events; the oldest is"), "{shown}");

    let sources = ask(&["sources", "list"]).await;
    assert!(sources.lines().all(|line| line.chars().count() <= 100), "{sources}");
    assert!(sources.contains("PENDING") && sources.contains("http"), "{sources}");
}
