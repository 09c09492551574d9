//! SIGHUP to the real daemon: what can change changes, what cannot is named, a bad file changes
//! nothing, and no event is lost or overtaken meanwhile.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    os::unix::net::UnixDatagram,
    sync::{Arc, Mutex},
    time::Instant,
};

use serde_json::{Value, json};

use crate::{
    support::{
        PATIENCE,
        daemon::{Daemon, http},
        free_port,
        nats::NatsServer,
        pki::Pki,
        process,
        receiver::{Receiver, Reply, Seen},
        wait_until,
    },
    tls::https,
};

const TAKEN: &str = "the new configuration is in use";
const REFUSED: &str = "the new configuration was refused; nothing has changed";

fn count(daemon: &Daemon, line: &str) -> usize {
    daemon.log().matches(line).count()
}

/// Writes this configuration, sends SIGHUP, and waits for the line that says what came of it.
async fn reload(daemon: &Daemon, config: &str, line: &str) {
    let before = count(daemon, line);
    daemon.configure(config);
    daemon.signal("HUP");
    wait_until(line, async || (count(daemon, line) > before).then_some(())).await;
}

/// What `/readyz` says of the configuration.
async fn config_component(daemon: &Daemon) -> Option<Value> {
    let ready = daemon.json("/readyz").await?;
    let components = ready["components"].as_array()?.clone();
    components.into_iter().find(|component| component["component"] == "config")
}

async fn post(daemon: &Daemon, events: &[Value]) {
    let answer = http().post(daemon.url("/v1/events")).json(events).send().await.unwrap();
    assert!(answer.status().is_success(), "{answer:?}");
}

fn event(key: &str, n: usize) -> Value {
    let id = format!("{key}-{n}");
    json!({ "type": "LessonPublished", "id": id, "key": key, "data": { "n": n } })
}

async fn handled(daemon: &Daemon, handler: &str, events: u64) {
    wait_until("the handler has handled all", async || {
        (daemon.handler(handler).await >= events).then_some(())
    })
    .await;
}

/// The ids in the log, in its order.
async fn ids(daemon: &Daemon) -> Vec<String> {
    let mut ids = Vec::new();
    let mut from = 1;
    loop {
        let page = daemon.json(&format!("/v1/events?from={from}&limit=500")).await.unwrap();
        let events = page["events"].as_array().unwrap();
        let Some(last) = events.last() else { return ids };
        from = last["position"].as_u64().unwrap() + 1;
        ids.extend(events.iter().map(|event| event["id"].as_str().unwrap().to_owned()));
    }
}

/// A webhook to this receiver, and a handler that forwards to it.
fn to_crm(receiver: &Receiver, path: &str, more: &str) -> String {
    format!(
        r#"
[transports.crm]
kind = "http"
url = "{}"
timeout = "2s"
[handlers.to-crm]
kind = "forward"
transport = "crm"
path = "{path}"
timeout = "10s"
{more}
"#,
        receiver.url("")
    )
}

#[tokio::test]
async fn the_log_is_as_loud_as_the_last_reload_says() {
    let log = |filter| {
        format!("[log]\nfilter = \"{filter}\"\n[handlers.log]\nkind = \"log\"\nlevel = \"debug\"\n")
    };
    let daemon = Daemon::start(&log("info")).await;
    let lines = || daemon.log().lines().filter(|line| line.contains("\"id\":\"a-")).count();
    post(&daemon, &[event("a", 0)]).await;
    handled(&daemon, "log", 1).await;
    assert_eq!(lines(), 0);
    reload(&daemon, &log("debug"), TAKEN).await;
    post(&daemon, &[event("a", 1)]).await;
    wait_until("the line is there", async || (lines() == 1).then_some(())).await;
    reload(&daemon, &log("info"), TAKEN).await;
    post(&daemon, &[event("a", 2)]).await;
    handled(&daemon, "log", 3).await;
    assert_eq!(lines(), 1);
    // Neither was the handler replaced, nor anything else.
    assert!(!daemon.log().contains("reload: "), "{}", daemon.log());
}

#[tokio::test]
async fn a_bad_configuration_changes_nothing_and_says_why() {
    let receiver = Receiver::start().await;
    let good = to_crm(&receiver, "/good", "");
    let daemon = Daemon::start(&good).await;
    daemon.ready().await;
    let other = to_crm(&receiver, "/other", "");
    // Each with what is said of it; all of them would also change where events go.
    let bad = [
        (format!("{other}\n[[[sEcReT"), "not TOML"),
        (format!("{other}\nworkerz = 3"), "handlers.to-crm.workerz"),
        (format!("token_file = \"/nowhere/sEcReT-not\"\n{other}"), "/nowhere/sEcReT-not"),
        (
            // It is found only when it is opened, after all that was only read.
            format!(
                "{other}\n[handlers.find]\nkind = \"search\"\npath = \"/dev/null/index\"\n\
                 [handlers.find.documents.X]\nid = \"/id\"\ntext = {{ t = \"/t\" }}"
            ),
            "handler `find`",
        ),
    ];
    for (n, (bad, said)) in bad.iter().enumerate() {
        let bad = bad.replace("kind = \"http\"", "kind = \"http\"\ntoken = \"sEcReT-t0ken\"");
        reload(&daemon, &bad, REFUSED).await;
        assert!(daemon.log().contains(said), "{said}: {}", daemon.log());
        let config = config_component(&daemon).await.unwrap();
        assert_eq!(config["health"], "degraded");
        assert!(config["reason"].as_str().unwrap().contains(said), "{said}: {config}");
        // What runs, runs as before.
        daemon.ready().await;
        post(&daemon, &[event("a", n)]).await;
        handled(&daemon, "to-crm", n as u64 + 1).await;
        let seen = receiver.seen();
        assert_eq!(seen.len(), n + 1);
        assert_eq!(seen[n].path, "/good");
        assert_eq!(seen[n].header("authorization"), None);
    }
    assert_eq!(count(&daemon, TAKEN), 0);
    // The name of a file is no secret.
    assert!(
        !daemon.log().replace("/nowhere/sEcReT-not", "").contains("sEcReT"),
        "{}",
        daemon.log()
    );
    reload(&daemon, &other, TAKEN).await;
    assert_eq!(config_component(&daemon).await, None);
    post(&daemon, &[event("a", 9)]).await;
    handled(&daemon, "to-crm", 5).await;
    assert_eq!(receiver.seen().last().unwrap().path, "/other");
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn G4_G5_a_handler_changes_under_load_and_loses_and_overtakes_nothing() {
    // Every seventh request fails, so that there are always attempts under way.
    let accepted = Arc::new(Mutex::new(Vec::new()));
    let (mut n, ledger) = (0, Arc::clone(&accepted));
    let receiver = Receiver::ruled(move |seen| {
        n += 1;
        if n % 7 == 0 {
            return Reply::status(500);
        }
        ledger.lock().unwrap().push(seen.clone());
        Reply::status(204)
    })
    .await;
    let settings = |round: usize| {
        let workers = 1 + round * 3 % 8;
        let retry = 10 + round;
        to_crm(
            &receiver,
            &format!("/round-{round}"),
            &format!(
                "workers = {workers}\nretry = {{ attempts = {retry}, initial = \"20ms\", \
                 max = \"100ms\" }}"
            ),
        )
    };
    let daemon = Daemon::start(&settings(0)).await;
    let keys = ["a", "b", "c", "d", "e"];
    const ROUNDS: usize = 6;
    const EACH: usize = 40;
    for round in 1..=ROUNDS {
        let from = (round - 1) * EACH;
        let events: Vec<_> =
            (from..from + EACH).flat_map(|n| keys.map(|key| event(key, n))).collect();
        post(&daemon, &events).await;
        // While they are under way.
        let before = receiver.seen().len();
        wait_until("some arrive", async || (receiver.seen().len() > before + 20).then_some(()))
            .await;
        reload(&daemon, &settings(round), TAKEN).await;
    }
    let all = (ROUNDS * EACH * keys.len()) as u64;
    handled(&daemon, "to-crm", all).await;
    // Its cursor passes what is being tried again.
    wait_until("everything is accepted", async || {
        let accepted = accepted.lock().unwrap();
        let ids: HashSet<_> = accepted.iter().map(Seen::id).collect();
        (ids.len() as u64 == all).then_some(())
    })
    .await;
    // What has failed does not count: nobody may overtake it.
    let seen = accepted.lock().unwrap().clone();
    for (key, order) in arrivals(&seen) {
        assert_eq!(order, (0..ROUNDS * EACH).collect::<Vec<_>>(), "G5: {key} is out of order");
    }
    let arrived: BTreeSet<_> = seen.iter().map(|seen| seen.id().to_owned()).collect();
    let stored: BTreeSet<_> = ids(&daemon).await.into_iter().collect();
    assert_eq!(stored.len() as u64, all);
    assert_eq!(arrived, stored, "G4");
    let dead = daemon.json("/v1/dead-letters").await.unwrap();
    assert_eq!(dead["dead_letters"], json!([]));
    // Each of them was in use for a while.
    let paths: BTreeSet<_> = seen.iter().map(|seen| seen.path.clone()).collect();
    assert!(paths.len() >= 3, "{paths:?}");
    post(&daemon, &[event("z", 0)]).await;
    handled(&daemon, "to-crm", all + 1).await;
    let last = receiver.seen().into_iter().rfind(|seen| seen.id() == "z-0").unwrap();
    assert_eq!(last.path, format!("/round-{ROUNDS}"));
}

#[tokio::test]
async fn other_attempts_count_for_what_is_being_tried_already() {
    let receiver = Receiver::ruled(|_| Reply::status(500)).await;
    let settings = |attempts: u32, workers: u32| {
        to_crm(
            &receiver,
            "",
            &format!(
                "workers = {workers}\nretry = {{ attempts = {attempts}, initial = \"50ms\", \
                 max = \"50ms\" }}"
            ),
        )
    };
    let daemon = Daemon::start(&settings(1_000, 1)).await;
    post(&daemon, &[event("a", 0)]).await;
    wait_until("it is tried", async || (receiver.seen().len() > 3).then_some(())).await;
    reload(&daemon, &settings(2, 1), TAKEN).await;
    // Its attempts were kept, and they are more than there are to be.
    let dead = wait_until("it is dead", async || {
        let page = daemon.json("/v1/dead-letters").await?;
        page["dead_letters"].as_array()?.first().cloned()
    })
    .await;
    assert!(dead["attempts"].as_u64().unwrap() > 3, "{dead}");
    // It holds up its key still, whatever else changes.
    reload(&daemon, &settings(2, 4), TAKEN).await;
    let before = receiver.seen().len();
    post(&daemon, &[event("a", 1), event("b", 0)]).await;
    wait_until("the other key goes on", async || {
        receiver.seen()[before..].iter().any(|seen| seen.id() == "b-0").then_some(())
    })
    .await;
    assert!(receiver.seen().iter().all(|seen| seen.id() != "a-1"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn G1_G3_a_source_starts_anew_with_its_transport_and_keeps_its_place() {
    let server = NatsServer::start_with(&["--user", "me", "--pass", "n3w-sEcReT"]);
    let settings = |password: &str, timeout: u32, more: &str| {
        format!(
            r#"
[transports.nats]
kind = "nats"
url = "{}"
user = "me"
password = "{password}"
timeout = "{timeout}s"
[sources.lessons]
transport = "nats"
stream = "S"
subject = "s.>"
consumer = "c"
create = {{ subjects = ["s.>"] }}
{more}
"#,
            server.url()
        )
    };
    let daemon = Daemon::start(&settings("0ld-sEcReT", 5, "")).await;
    wait_until("it is refused", async || {
        let sources = daemon.json("/v1/sources").await?;
        let lessons = sources["sources"].as_array()?.iter().find(|s| s["name"] == "lessons")?;
        lessons["reason"].is_string().then_some(())
    })
    .await;
    reload(&daemon, &settings("n3w-sEcReT", 5, ""), TAKEN).await;
    daemon.ready().await;

    let client =
        async_nats::ConnectOptions::with_user_and_password("me".into(), "n3w-sEcReT".into())
            .connect(server.url())
            .await
            .unwrap();
    let jetstream = async_nats::jetstream::new(client);
    const ALL: usize = 3_000;
    let publish = async {
        for n in 0..ALL {
            let body = event("a", n).to_string();
            jetstream.publish("s.a", body.into()).await.unwrap().await.unwrap();
        }
    };
    let change = async {
        for round in 1..=4_u32 {
            let head = daemon.head().await;
            wait_until("some come in", async || (daemon.head().await > head + 50).then_some(()))
                .await;
            reload(&daemon, &settings("n3w-sEcReT", 5 + round, ""), TAKEN).await;
        }
        // One that has come and gone: the others' share of the bytes is another one meanwhile.
        let twin = "[sources.twin]\ntransport = \"nats\"\nstream = \"S\"\nsubject = \"s.none\"\n\
                    consumer = \"twin\"\n";
        reload(&daemon, &settings("n3w-sEcReT", 9, twin), TAKEN).await;
        daemon.ready().await;
        let metrics = daemon.get("/metrics").await.unwrap();
        assert!(metrics.contains("pulsebus_source_up{source=\"twin\"} 1"), "{metrics}");
        reload(&daemon, &settings("n3w-sEcReT", 9, ""), TAKEN).await;
    };
    tokio::join!(publish, change);
    wait_until("all are stored", async || (daemon.head().await >= ALL as u64).then_some(())).await;
    let expected: Vec<_> = (0..ALL).map(|n| format!("a-{n}")).collect();
    assert_eq!(ids(&daemon).await, expected, "as published, each once");
    assert!(!daemon.log().contains("sEcReT"), "{}", daemon.log());
    let sources = daemon.json("/v1/sources").await.unwrap();
    assert!(!sources.to_string().contains("twin"), "{sources}");
    let metrics = daemon.get("/metrics").await.unwrap();
    assert!(!metrics.contains("pulsebus_source_up{source=\"twin\"}"));
    assert!(metrics.contains("pulsebus_source_up{source=\"lessons\"} 1"), "{metrics}");
}

#[tokio::test]
async fn handlers_come_and_go_and_keep_their_cursor() {
    let receiver = Receiver::start().await;
    let index = "[handlers.find]\nkind = \"search\"\n[handlers.find.documents.LessonPublished]\n\
                 id = \"/n\"\ntext = { title = \"/title\" }\n";
    let lesson = |n: usize| {
        json!({ "type": "LessonPublished", "id": format!("l-{n}"), "key": "k",
                "data": { "n": n, "title": "photosynthesis" } })
    };
    let none = "[handlers]\n";
    let both = format!("{}{index}", to_crm(&receiver, "", ""));
    let daemon = Daemon::start(none).await;
    post(&daemon, &[lesson(0), lesson(1)]).await;
    reload(&daemon, &both, TAKEN).await;
    handled(&daemon, "to-crm", 2).await;
    let found = async |total: u64| {
        wait_until("it is found", async || {
            let page = daemon.json("/v1/search/find?q=photosynthesis").await?;
            (page["total"] == total).then_some(())
        })
        .await;
    };
    found(2).await;
    let up = "pulsebus_handler_up{handler=\"to-crm\"} 1";
    let metrics = daemon.get("/metrics").await.unwrap();
    assert!(metrics.contains(up), "{metrics}");
    reload(&daemon, none, TAKEN).await;
    assert_eq!(daemon.json("/v1/handlers").await.unwrap()["handlers"], json!([]));
    assert_eq!(daemon.json("/v1/search/find?q=x").await.unwrap()["status"], 404);
    let metrics = daemon.get("/metrics").await.unwrap();
    assert!(!metrics.contains("pulsebus_handler_up{"), "{metrics}");
    post(&daemon, &[lesson(2)]).await;
    // The index is closed, so it can be opened again; cursors are where they were.
    reload(&daemon, &both, TAKEN).await;
    handled(&daemon, "to-crm", 3).await;
    found(3).await;
    let seen: Vec<_> = receiver.seen().iter().map(|seen| seen.id().to_owned()).collect();
    assert_eq!(seen, ["l-0", "l-1", "l-2"]);
    // How it is run can change while its index stays open.
    reload(&daemon, &both.replace("\"search\"", "\"search\"\ntimeout = \"9s\""), TAKEN).await;
    assert!(daemon.log().contains("handler `find`: changed: timeout"), "{}", daemon.log());
    post(&daemon, &[lesson(3)]).await;
    found(4).await;
}

#[tokio::test]
async fn a_token_and_a_certificate_are_exchanged_at_once() {
    let daemon = Daemon::start("token = \"0ld-sEcReT\"\n").await;
    let status = async |token: &str| {
        let request = http().get(daemon.url("/v1/handlers")).bearer_auth(token);
        request.send().await.unwrap().status().as_u16()
    };
    wait_until("it is up", async || (status("0ld-sEcReT").await == 200).then_some(())).await;
    reload(&daemon, "token = \"n3w-sEcReT\"\n", TAKEN).await;
    assert_eq!((status("0ld-sEcReT").await, status("n3w-sEcReT").await), (401, 200));
    let (one, other) = (Pki::new(), Pki::new());
    let tls = |pki: &Pki| {
        let pair = pki.server();
        format!(
            "token = \"n3w-sEcReT\"\n[http.tls]\ncert_file = \"{}\"\nkey_file = \"{}\"\n",
            pair.cert.display(),
            pair.key.display()
        )
    };
    let url = daemon.url("/healthz").replace("http:", "https:");
    let trusted = async |pki: &Pki| https(&pki.ca, None).get(&url).send().await.is_ok();
    assert!(!trusted(&one).await);
    reload(&daemon, &tls(&one), TAKEN).await;
    assert_eq!((trusted(&one).await, trusted(&other).await), (true, false));
    reload(&daemon, &tls(&other), TAKEN).await;
    assert_eq!((trusted(&one).await, trusted(&other).await), (false, true));
    // A certificate that does not fit its key is refused, and the one before stays.
    let mixed = tls(&one).replace("key_file", "#").replace(
        "[http.tls]",
        &format!("[http.tls]\nkey_file = \"{}\"", other.server().key.display()),
    );
    reload(&daemon, &mixed, REFUSED).await;
    assert_eq!((trusted(&one).await, trusted(&other).await), (false, true));
    assert!(!daemon.log().contains("sEcReT"), "{}", daemon.log());
}

#[tokio::test]
async fn what_needs_a_restart_is_named_until_the_restart() {
    let daemon = Daemon::start("[handlers]\n").await;
    assert_eq!(config_component(&daemon).await, None);
    let new = "max_body = \"1MiB\"\n[store]\nurl = \"sqlite:sEcReT.db\"\n[limits]\n\
               tail_bytes = \"1MiB\"\n[log]\nformat = \"text\"\n[handlers.log]\nkind = \"log\"\n";
    reload(&daemon, new, TAKEN).await;
    let names = "takes effect at the next restart: log.format, store.url, http.max_body, \
                 limits.tail_bytes";
    assert!(daemon.log().contains(names), "{}", daemon.log());
    let config = config_component(&daemon).await.unwrap();
    assert_eq!(config["reason"], names);
    assert_eq!(config["health"], "ready");
    assert!(!daemon.log().contains("sEcReT"), "{}", daemon.log());
    // The rest of it holds.
    post(&daemon, &[event("a", 0)]).await;
    handled(&daemon, "log", 1).await;
    assert!(daemon.terminate().await.success(), "{}", daemon.log());
    daemon.restart().await;
    assert_eq!(config_component(&daemon).await, None);
    assert!(daemon.folder.join("data/sEcReT.db").exists());
}

#[tokio::test]
async fn a_signal_during_the_start_is_kept_and_one_during_the_drain_is_not_the_end() {
    let receiver = Receiver::ruled(|_| Reply::Hang).await;
    let index = "[handlers.find]\nkind = \"search\"\n[handlers.find.documents.X]\nid = \"/n\"\n\
                 text = { title = \"/title\" }\n";
    let daemon = Daemon::not_started(free_port(), index);
    // Somebody else has the index, so the start waits.
    let folder = daemon.folder.join("data/search/find");
    std::fs::create_dir_all(&folder).unwrap();
    let held = std::fs::File::create(folder.join("lock")).unwrap();
    held.lock().unwrap();
    daemon.launch(|_| {});
    wait_until("it waits", async || {
        daemon.log().contains("waiting for handler:find").then_some(())
    })
    .await;
    daemon.configure(&format!("{index}{}", to_crm(&receiver, "", "")));
    for _ in 0..3 {
        daemon.signal("HUP");
    }
    assert!(daemon.lives(), "{}", daemon.log());
    drop(held);
    daemon.up().await;
    wait_until("it is reloaded", async || (count(&daemon, TAKEN) > 0).then_some(())).await;
    post(&daemon, &[event("a", 0)]).await;
    wait_until("it is under way", async || (!receiver.seen().is_empty()).then_some(())).await;
    let taken = count(&daemon, TAKEN);
    daemon.signal("TERM");
    wait_until("it drains", async || daemon.log().contains("draining").then_some(())).await;
    daemon.signal("HUP");
    wait_until("it has ended", async || (!daemon.lives()).then_some(())).await;
    assert!(daemon.log().contains("\"drained\""), "{}", daemon.log());
    assert_eq!(count(&daemon, TAKEN), taken);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn G5_a_flood_of_signals_ends_with_the_last_configuration() {
    let receiver = Receiver::start().await;
    let daemon = Daemon::start(&to_crm(&receiver, "/0", "")).await;
    for n in 1..=100 {
        daemon.configure(&to_crm(&receiver, &format!("/{n}"), ""));
        daemon.signal("HUP");
        if n % 10 == 0 {
            post(&daemon, &[event("a", n / 10)]).await;
        }
    }
    let mut n = 10;
    wait_until("the last one is in use", async || {
        n += 1;
        post(&daemon, &[event("a", n)]).await;
        handled(&daemon, "to-crm", n as u64).await;
        (receiver.seen().last()?.path == "/100").then_some(())
    })
    .await;
    let expected: Vec<_> = (1..=n).collect();
    assert_eq!(arrivals(&receiver.seen())["a"], expected);
    assert_eq!(count(&daemon, "refused"), 0, "{}", daemon.log());
}

#[tokio::test]
async fn systemd_is_told_when_a_reload_begins_and_ends() {
    let folder = process::folder("notify");
    let path = folder.join("socket");
    let socket = UnixDatagram::bind(&path).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let daemon = Daemon::not_started(free_port(), "[handlers]\n");
    daemon.launch(|command| {
        command.env("NOTIFY_SOCKET", &path);
    });
    // The next message that is one of these; what is said once a second apart.
    let next = || {
        let mut message = [0; 4_096];
        let deadline = Instant::now() + PATIENCE;
        loop {
            // It is not silent meanwhile.
            assert!(Instant::now() < deadline, "systemd is not told: {}", daemon.log());
            let length = socket.recv(&mut message).unwrap();
            let text = String::from_utf8(message[..length].to_vec()).unwrap();
            if text.contains("READY=1") || text.contains("RELOADING=1") {
                return text;
            }
        }
    };
    assert!(next().contains("READY=1"));
    daemon.up().await;
    // Told just now; the flag follows within the same step of the main loop.
    for (config, line) in [("[handlers]\n", TAKEN), ("[nonsense]\n", REFUSED)] {
        let before = count(&daemon, line);
        daemon.configure(config);
        daemon.signal("HUP");
        let begun = next();
        assert!(begun.contains("RELOADING=1"), "{begun}");
        let at = begun.lines().find_map(|line| line.strip_prefix("MONOTONIC_USEC=")).unwrap();
        assert!(at.parse::<u64>().unwrap() > 0);
        assert!(next().contains("READY=1"));
        assert_eq!(count(&daemon, line), before + 1);
    }
}
