//! NATS, set up wrong.

use async_nats::jetstream;
use serde_json::{Value, json};

use super::{Patient, Said};
use crate::{
    credentials::configured,
    support::{
        free_port,
        nats::NatsServer,
        process,
        proxy::{Mode, Proxy},
    },
};

/// A client that is not the one under test.
struct Admin(jetstream::Context);

impl Admin {
    async fn of(server: &NatsServer) -> Self {
        Self(server.jetstream().await)
    }

    async fn ask(&self, subject: &str, request: Value) -> Value {
        self.0.request(subject.to_owned(), &request).await.unwrap()
    }

    async fn done(&self, subject: &str, request: Value) {
        let answer = self.ask(subject, request).await;
        assert!(answer["error"].is_null(), "{subject}: {answer}");
    }

    /// A stream `name` of `name.>`, with these settings besides.
    async fn stream(&self, name: &str, more: &Value) {
        let mut config = json!({
            "name": name, "subjects": [format!("{name}.>")], "storage": "file",
            "retention": "limits", "discard": "old", "num_replicas": 1,
        });
        merge(&mut config, more);
        self.done(&format!("STREAM.CREATE.{name}"), config).await;
    }

    async fn edit_stream(&self, name: &str, more: &Value) {
        let info = self.ask(&format!("STREAM.INFO.{name}"), json!({})).await;
        let mut config = info["config"].clone();
        merge(&mut config, more);
        self.done(&format!("STREAM.UPDATE.{name}"), config).await;
    }

    /// The consumer that pulsebus makes, with these settings besides.
    async fn consumer(&self, stream: &str, more: &Value) {
        let mut config = json!({
            "durable_name": "pulsebus", "ack_policy": "explicit", "max_deliver": -1,
            "ack_wait": 30_000_000_000_u64, "max_ack_pending": 20_000, "deliver_policy": "all",
        });
        merge(&mut config, more);
        let name = config["durable_name"].as_str().unwrap().to_owned();
        let subject = format!("CONSUMER.DURABLE.CREATE.{stream}.{name}");
        self.done(&subject, json!({"stream_name": stream, "config": config})).await;
    }

    async fn delete_consumer(&self, stream: &str) {
        self.done(&format!("CONSUMER.DELETE.{stream}.pulsebus"), json!({})).await;
    }

    async fn publish(&self, subject: &str, count: usize) {
        for n in 0..count {
            let body = format!("{{\"type\":\"T\",\"data\":{n}}}");
            self.0.publish(subject.to_owned(), body.into()).await.unwrap().await.unwrap();
        }
    }

    /// Everything that could tell that somebody was here: streams and what they hold, consumers
    /// and how far they are, redeliveries and pulls that wait included.
    async fn whole(&self) -> Value {
        let mut all = self.ask("STREAM.LIST", json!({})).await;
        for stream in all["streams"].as_array_mut().into_iter().flatten() {
            let name = stream["config"]["name"].as_str().unwrap().to_owned();
            let consumers = self.ask(&format!("CONSUMER.LIST.{name}"), json!({})).await;
            stream["consumers"] = consumers["consumers"].clone();
        }
        all
    }
}

fn merge(into: &mut Value, more: &Value) {
    for (key, value) in more.as_object().unwrap() {
        into[key] = value.clone();
    }
}

/// Sources and handlers on one transport called `nats`.
struct Config(String);

impl Config {
    fn of(url: &str) -> Self {
        Self(format!("[transports.nats]\nkind = \"nats\"\nurl = \"{url}\"\n"))
    }

    /// A source of this stream, called like it.
    fn source(&mut self, stream: &str, more: &str) {
        self.0 +=
            &format!("[sources.{stream}]\ntransport = \"nats\"\nstream = \"{stream}\"\n{more}\n");
    }

    fn forward(&mut self, name: &str, subject: &str) {
        self.0 += &format!(
            "[handlers.{name}]\nkind = \"forward\"\ntransport = \"nats\"\nsubject = \"{subject}\"\n"
        );
    }
}

#[tokio::test]
async fn doctor_finds_what_is_wrong_with_streams_and_leaves_no_trace() {
    let server = NatsServer::start();
    let admin = Admin::of(&server).await;
    let hour = 3_600_000_000_000_u64;
    let mut config = Config::of(&server.url());
    // A stream of this name with these settings; what its source says; what is found.
    let cases: &[(&str, Value, &str, &[&str])] = &[
        ("right", json!({}), "", &[]),
        ("created", json!({}), "create = { subjects = [\"created.>\"] }", &[]),
        (
            "roomy",
            json!({"max_age": 200 * hour, "max_msgs": 1_000, "max_bytes": 1_000_000}),
            "",
            &[],
        ),
        ("memory", json!({"storage": "memory"}), "", &["error nats-stream-memory"]),
        (
            "differs",
            json!({}),
            "create = { subjects = [\"elsewhere.>\"] }",
            &["error nats-stream-differs"],
        ),
        ("latest", json!({"max_msgs_per_subject": 1}), "", &["error nats-stream-per-subject"]),
        ("young", json!({"max_age": hour}), "", &["warning nats-stream-age"]),
        ("mute", json!({"no_ack": true}), "", &["warning nats-stream-no-ack"]),
        ("rollup", json!({"allow_rollup_hdrs": true}), "", &["note nats-stream-rollup"]),
        ("large", json!({"max_msg_size": 3_000_000}), "", &["warning nats-message-size"]),
    ];
    for (name, settings, source, _) in cases {
        admin.stream(name, settings).await;
        admin.consumer(name, &json!({})).await;
        config.source(name, source);
    }
    // Those that one line does not make.
    config.source("missing", "");
    config.source("absent", "create = { subjects = [\"absent.>\"] }");
    config.source("taken", "create = { subjects = [\"right.x\"] }");
    admin.stream("deaf", &json!({})).await;
    config.source("deaf", "subject = \"other.>\"");
    admin.stream("wide", &json!({"subjects": ["wide.a.>"]})).await;
    config.source("wide", "subject = \"wide.>\"");
    admin.stream("fleeting", &json!({"retention": "interest"})).await;
    config.source("fleeting", "");
    admin.stream("queue", &json!({"retention": "workqueue"})).await;
    admin.consumer("queue", &json!({"durable_name": "other"})).await;
    config.source("queue", "");
    admin.stream("sealed", &json!({})).await;
    admin.consumer("sealed", &json!({})).await;
    admin.edit_stream("sealed", &json!({"sealed": true})).await;
    config.source("sealed", "");
    for name in ["roomy", "full", "overrun"] {
        if name != "roomy" {
            admin.stream(name, &json!({"max_msgs": 10})).await;
            admin.consumer(name, &json!({})).await;
            config.source(name, "");
        }
        admin.publish(&format!("{name}.a"), 9).await;
    }
    let mut overrun = pull(&admin, "overrun", 1).await;
    overrun.pop().unwrap().ack().await.unwrap();
    admin.publish("overrun.a", 20).await;

    let patient = Patient::new(&config.0);
    let before = admin.whole().await;
    let said = patient.examine().await;
    assert_eq!(admin.whole().await, before, "doctor left a trace");

    said.expect("transport:nats", &[]);
    for (name, _, _, expected) in cases {
        said.expect(&format!("source:{name}"), expected);
    }
    said.expect("source:missing", &["error nats-stream-missing"]);
    said.expect("source:absent", &["note nats-stream-missing"]);
    said.expect("source:taken", &["error nats-subject-taken", "note nats-stream-missing"]);
    said.expect("source:deaf", &["error nats-stream-subjects", "note nats-consumer-missing"]);
    said.expect("source:wide", &["error nats-stream-subjects", "note nats-consumer-missing"]);
    said.expect("source:fleeting", &["error nats-consumer-missing"]);
    said.expect("source:queue", &["error nats-workqueue-taken", "note nats-consumer-missing"]);
    said.expect("source:sealed", &["warning nats-stream-sealed"]);
    said.expect("source:full", &["error nats-stream-limits"]);
    said.expect("source:overrun", &["error nats-events-removed", "error nats-stream-limits"]);
    let removed = said.text("nats-events-removed", "what");
    assert!(removed.contains("messages 2 to 19 of stream `overrun`"), "{removed}");

    // What mends them, where it can be told by a machine.
    admin.stream("missing", &json!({})).await;
    admin.edit_stream("latest", &json!({"max_msgs_per_subject": -1})).await;
    admin.edit_stream("young", &json!({"max_age": 7 * 24 * hour})).await;
    admin.edit_stream("mute", &json!({"no_ack": false})).await;
    admin.edit_stream("large", &json!({"max_msg_size": 1 << 20})).await;
    admin.edit_stream("deaf", &json!({"subjects": ["deaf.>", "other.>"]})).await;
    admin.edit_stream("full", &json!({"max_msgs": 1_000})).await;
    admin.done("CONSUMER.DELETE.queue.other", json!({})).await;
    let said = patient.examine().await;
    for name in ["latest", "young", "mute", "large", "full"] {
        said.expect(&format!("source:{name}"), &[]);
    }
    for name in ["missing", "deaf", "queue"] {
        // The daemon makes it.
        said.expect(&format!("source:{name}"), &["note nats-consumer-missing"]);
    }
}

async fn pull(admin: &Admin, stream: &str, count: usize) -> Vec<jetstream::Message> {
    use futures_util::TryStreamExt as _;
    let stream = admin.0.get_stream(stream).await.unwrap();
    let consumer: jetstream::consumer::PullConsumer =
        stream.get_consumer("pulsebus").await.unwrap();
    consumer.fetch().max_messages(count).messages().await.unwrap().try_collect().await.unwrap()
}

#[tokio::test]
async fn doctor_finds_what_is_wrong_with_consumers_and_leaves_no_trace() {
    let server = NatsServer::start();
    let admin = Admin::of(&server).await;
    let second = 1_000_000_000_u64;
    let mut config = Config::of(&server.url());
    // Its consumer's settings, what its source says, what is found, and whether to delete it, or
    // to change these settings, mends it.
    let cases: &[(&str, Value, &str, &str, Option<Value>)] = &[
        ("acks", json!({"ack_policy": "none"}), "", "error nats-ack-policy", None),
        ("push", json!({"deliver_subject": "there.push"}), "", "error nats-consumer-push", None),
        ("filter", json!({"filter_subject": "filter.b"}), "", "error nats-filter-subject", None),
        ("bare", json!({"headers_only": true}), "", "error nats-headers-only", None),
        ("last", json!({"deliver_policy": "last"}), "", "error nats-deliver-policy", None),
        ("slow", json!({"replay_policy": "original"}), "", "error nats-replay-policy", None),
        (
            "hasty",
            json!({"ack_wait": second}),
            "",
            "warning nats-ack-wait",
            Some(json!({"ack_wait": 30 * second})),
        ),
        (
            "wait",
            json!({}),
            "ack_wait = \"1m\"",
            "error nats-ack-wait",
            Some(json!({"ack_wait": 60 * second})),
        ),
        (
            "spent",
            json!({"max_deliver": 3}),
            "",
            "warning nats-max-deliver",
            Some(json!({"max_deliver": -1})),
        ),
        (
            "several",
            json!({"max_deliver": 3}),
            "competing = true",
            "error nats-max-deliver",
            Some(json!({"max_deliver": -1})),
        ),
        (
            "narrow",
            json!({"max_ack_pending": 10}),
            "",
            "warning nats-max-ack-pending",
            Some(json!({"max_ack_pending": 20_000})),
        ),
        (
            "other",
            json!({}),
            "max_ack_pending = 5_000",
            "error nats-max-ack-pending",
            Some(json!({"max_ack_pending": 5_000})),
        ),
        ("crowded", json!({"max_waiting": 1}), "", "warning nats-max-waiting", None),
        (
            "fading",
            json!({"inactive_threshold": 600 * second}),
            "",
            "warning nats-inactive-threshold",
            None,
        ),
        ("light", json!({"mem_storage": true}), "", "warning nats-consumer-memory", None),
    ];
    for (name, settings, source, ..) in cases {
        admin.stream(name, &json!({})).await;
        let mut settings = settings.clone();
        settings["filter_subject"] =
            settings.get("filter_subject").cloned().unwrap_or(json!(format!("{name}.a")));
        admin.consumer(name, &settings).await;
        admin.publish(&format!("{name}.a"), 2).await;
        config.source(name, &format!("subject = \"{name}.a\"\n{source}"));
    }
    // One that a daemon holds a message of.
    let held = pull(&admin, "spent", 1).await;

    let patient = Patient::new(&config.0);
    let before = admin.whole().await;
    let said = patient.examine().await;
    assert_eq!(admin.whole().await, before, "doctor left a trace");
    drop(held);
    for (name, _, _, expected, _) in cases {
        said.expect(&format!("source:{name}"), &[expected]);
    }

    for (name, settings, _, _, mend) in cases {
        match mend {
            None => admin.delete_consumer(name).await,
            Some(mend) => {
                let mut settings = settings.clone();
                settings["filter_subject"] = json!(format!("{name}.a"));
                merge(&mut settings, mend);
                admin.consumer(name, &settings).await;
            }
        }
    }
    let said = patient.examine().await;
    for (name, _, _, _, mend) in cases {
        let gone: &[&str] = &["note nats-consumer-missing"];
        said.expect(&format!("source:{name}"), if mend.is_some() { &[] } else { gone });
    }
}

#[tokio::test]
async fn doctor_finds_what_is_wrong_with_destinations_and_publishes_nothing() {
    let server = NatsServer::start();
    let admin = Admin::of(&server).await;
    admin.stream("sound", &json!({})).await;
    admin.consumer("sound", &json!({"filter_subject": "sound.in"})).await;
    admin.stream("part", &json!({"subjects": ["part.LessonPublished"]})).await;
    admin.stream("mute", &json!({"no_ack": true})).await;
    admin.stream("brief", &json!({"duplicate_window": 1_000_000_000})).await;
    admin.stream("small", &json!({"max_msg_size": 1_000})).await;
    admin.stream("full", &json!({"discard": "new", "max_msgs": 5})).await;
    admin.publish("full.a", 5).await;
    admin.stream("volatile", &json!({"storage": "memory"})).await;
    admin.stream("sealed", &json!({})).await;
    admin.edit_stream("sealed", &json!({"sealed": true})).await;

    let mut config = Config::of(&server.url());
    config.source("sound", "subject = \"sound.in\"");
    config.forward("fine", "sound.{type}.x");
    config.forward("nowhere", "unheard.{type}");
    config.forward("part", "part.{type}");
    config.forward("mute", "mute.a");
    config.forward("brief", "brief.a");
    config.forward("small", "small.a");
    config.forward("full", "full.a");
    config.forward("volatile", "volatile.a");
    config.forward("sealed", "sealed.a");
    config.forward("circle", "sound.in");
    config.forward("buried", "sound.b");
    config.0 += "dead_letter = { transport = \"nats\", subject = \"dead.{handler}\" }\n";

    let patient = Patient::new(&config.0);
    let before = admin.whole().await;
    let said = patient.examine().await;
    assert_eq!(admin.whole().await, before, "doctor left a trace");
    for (name, expected) in [
        ("fine", &[][..]),
        ("nowhere", &["error nats-no-stream"]),
        ("part", &["warning nats-part-stream"]),
        ("mute", &["error nats-stream-no-ack"]),
        ("brief", &["warning nats-duplicate-window"]),
        ("small", &["warning nats-message-size"]),
        ("full", &["error nats-stream-full"]),
        ("volatile", &["error nats-stream-memory"]),
        ("sealed", &["error nats-stream-sealed"]),
        ("circle", &["note nats-comes-back"]),
        ("buried", &["error nats-no-stream"]),
    ] {
        said.expect(&format!("handler:{name}"), expected);
    }
    let dead = said.findings.iter().find(|finding| finding["subject"] == "handler:buried").unwrap();
    assert!(
        dead["what"].as_str().unwrap().contains("`dead.buried`, where dead letters go"),
        "{dead}"
    );

    admin.stream("rest", &json!({"subjects": ["unheard.*", "dead.>"]})).await;
    admin.edit_stream("part", &json!({"subjects": ["part.*"]})).await;
    admin.edit_stream("mute", &json!({"no_ack": false})).await;
    admin.edit_stream("brief", &json!({"duplicate_window": 120_000_000_000_u64})).await;
    admin.edit_stream("small", &json!({"max_msg_size": -1})).await;
    admin.edit_stream("full", &json!({"max_msgs": 500})).await;
    let said = patient.examine().await;
    for name in ["nowhere", "part", "mute", "brief", "small", "full", "buried"] {
        said.expect(&format!("handler:{name}"), &[]);
    }
}

/// Users: `all` may do all, `narrow` what a source needs and publishing to `out.a`, `reader` not
/// even that, `deaf` hears no answer; `plain` has no JetStream.
const USERS: &str = r#"
accounts {
  A {
    jetstream { max_file: 20MB, max_mem: 0 }
    users [
      { user: all, password: p }
      { user: narrow, password: p, permissions {
          publish { allow: [
            "$JS.API.INFO", "$JS.API.STREAM.INFO.in", "$JS.API.CONSUMER.INFO.in.pulsebus",
            "$JS.API.CONSUMER.MSG.NEXT.in.pulsebus", "$JS.API.STREAM.MSG.GET.in",
            "$JS.ACK.in.pulsebus.>", "$JS.API.STREAM.NAMES", "$JS.API.STREAM.INFO.out", "out.a"
          ] }
          subscribe { allow: ["_INBOX.>"] }
      } }
      { user: reader, password: p, permissions {
          publish { allow: [
            "$JS.API.INFO", "$JS.API.STREAM.INFO.in", "$JS.API.CONSUMER.INFO.in.pulsebus",
            "$JS.API.STREAM.NAMES"
          ] }
          subscribe { allow: ["_INBOX.>"] }
      } }
      { user: deaf, password: p, permissions { subscribe { deny: [">"] } } }
    ]
  }
  B { users [ { user: plain, password: p } ] }
}
"#;

async fn as_user(server: &NatsServer, user: &str, password: &str) -> Said {
    let mut config = Config::of(&server.url());
    config.0 += &format!("user = \"{user}\"\npassword = \"{password}\"\n");
    config.source("in", "");
    config.forward("out", "out.a");
    config.forward("elsewhere", "out.b");
    Patient::new(&config.0).examine().await
}

#[tokio::test]
async fn doctor_tries_what_each_nats_user_may_do() {
    let folder = process::folder("users");
    let server = configured(&folder, USERS);
    let options = async_nats::ConnectOptions::with_user_and_password("all".into(), "p".into());
    let admin = Admin(jetstream::new(options.connect(server.url()).await.unwrap()));
    admin.stream("in", &json!({})).await;
    admin.consumer("in", &json!({})).await;
    admin.stream("out", &json!({})).await;
    admin.publish("in.a", 3).await;
    let before = admin.whole().await;

    let said = as_user(&server, "all", "p").await;
    assert_eq!(said.findings, Vec::<Value>::new());
    let said = as_user(&server, "narrow", "p").await;
    said.expect("transport:nats", &[]);
    said.expect("source:in", &[]);
    said.expect("handler:out", &[]);
    said.expect("handler:elsewhere", &["error nats-publish-denied"]);
    let said = as_user(&server, "reader", "p").await;
    said.expect("source:in", &["error nats-denied"]);
    let what = said.text("nats-denied", "what");
    for subject in ["CONSUMER.MSG.NEXT.in.pulsebus", "STREAM.MSG.GET.in", "$JS.ACK.in.pulsebus"] {
        assert!(what.contains(subject), "{subject}: {what}");
    }
    said.expect("handler:out", &["error nats-publish-denied"]);
    let said = as_user(&server, "all", "wrong").await;
    said.expect("transport:nats", &["error nats-login"]);
    assert!(!said.whole.contains("wrong"), "{}", said.whole);
    as_user(&server, "deaf", "p").await.expect("transport:nats", &["error nats-inbox"]);
    as_user(&server, "plain", "p").await.expect("transport:nats", &["error nats-no-jetstream"]);
    assert_eq!(admin.whole().await, before, "doctor left a trace");

    // Nearly all of what the account may store.
    admin.stream("heap", &json!({})).await;
    for size in [[1 << 20; 19].as_slice(), &[500_000]].concat() {
        let body = vec![b'x'; size - 64];
        admin.0.publish("heap.a", body.into()).await.unwrap().await.unwrap();
    }
    let said = as_user(&server, "all", "p").await;
    said.expect("transport:nats", &["error nats-account-storage"]);
    admin.done("STREAM.DELETE.heap", json!({})).await;
    as_user(&server, "all", "p").await.expect("transport:nats", &[]);
}

#[tokio::test]
async fn a_server_that_is_away_or_silent_holds_up_no_other() {
    let server = NatsServer::start();
    let admin = Admin::of(&server).await;
    admin.stream("in", &json!({})).await;
    admin.consumer("in", &json!({})).await;
    let proxy = Proxy::to(server.port()).await;
    proxy.set(Mode::Stall);
    let mut config = Config::of(&server.url());
    config.source("in", "");
    for (name, port) in [("away", free_port()), ("silent", proxy.port())] {
        config.0 += &format!(
            "[transports.{name}]\nkind = \"nats\"\nurl = \"nats://127.0.0.1:{port}\"\n\
             [sources.{name}]\ntransport = \"{name}\"\nstream = \"in\"\n"
        );
    }
    let patient = Patient::new(&config.0);
    let started = std::time::Instant::now();
    let said = patient.examine().await;
    assert!(started.elapsed() < std::time::Duration::from_secs(25), "{:?}", started.elapsed());
    said.expect("source:in", &[]);
    for name in ["away", "silent"] {
        said.expect(&format!("transport:{name}"), &["error nats-unreachable"]);
    }
}
