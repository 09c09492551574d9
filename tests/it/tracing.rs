//! Traces, as an OTLP receiver that is not ours gets them, and as OpenTelemetry's own SDK begins
//! and continues them.

use std::{
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Child, ChildStdout, Stdio},
};

use serde_json::{Value, json};

use crate::support::{
    daemon::{Daemon, http},
    free_port,
    nats::NatsServer,
    process, rabbit,
    receiver::{Receiver, Reply},
    wait_until,
};

/// OTLP's numbers of span kinds.
const INTERNAL: u64 = 1;
const CLIENT: u64 = 3;
const PRODUCER: u64 = 4;
const CONSUMER: u64 = 5;

fn python(script: &str, build: impl FnOnce(&mut std::process::Command)) -> Child {
    let python = std::env::var("TEST_PULSEBUS_PYTHON")
        .expect("TEST_PULSEBUS_PYTHON: run the tests by tests/run, which installs the clients");
    let clients = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients");
    process::spawn(Path::new(&python), |command| {
        command.arg(clients.join(script)).stdout(Stdio::piped());
        build(command);
    })
}

/// oteltest's receiver.
struct Sink {
    child: Child,
    port: u16,
    file: PathBuf,
}

impl Sink {
    async fn start() -> Self {
        Self::on(free_port()).await
    }

    async fn on(port: u16) -> Self {
        let file = process::folder("otlp").join("spans");
        let child = python("otlp_sink.py", |command| {
            command.arg(port.to_string()).arg(&file).stderr(Stdio::null());
        });
        wait_until("the receiver listens", async || {
            std::net::TcpStream::connect(("127.0.0.1", port)).ok()
        })
        .await;
        Self { child, port, file }
    }

    fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}/v1/traces", self.port)
    }

    /// The section of a configuration that exports to it.
    fn config(&self, further: &str) -> String {
        format!("[telemetry.otlp]\nendpoint = \"{}\"\n{further}\n", self.endpoint())
    }

    fn spans(&self) -> Vec<Value> {
        let text = std::fs::read_to_string(&self.file).unwrap_or_default();
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        whole.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// Waits for as many spans as these conditions want.
    async fn until(&self, what: &str, enough: impl Fn(&[Value]) -> bool) -> Vec<Value> {
        wait_until(what, async || {
            let spans = self.spans();
            enough(&spans).then_some(spans)
        })
        .await
    }
}

impl Drop for Sink {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn named<'a>(spans: &'a [Value], name: &str) -> Vec<&'a Value> {
    spans.iter().filter(|span| span["name"] == name).collect()
}

fn one<'a>(spans: &'a [Value], name: &str) -> &'a Value {
    let found = named(spans, name);
    assert_eq!(found.len(), 1, "{name}: {spans:#?}");
    found[0]
}

async fn line(lines: &mut BufReader<ChildStdout>) -> String {
    // A child that does not answer is killed by its own time limit, or with this process.
    tokio::task::block_in_place(|| {
        let mut line = String::new();
        lines.read_line(&mut line).unwrap();
        line.trim().to_owned()
    })
}

async fn post(daemon: &Daemon, headers: &[(&str, &str)], body: &Value) {
    let mut request = http().post(daemon.url("/v1/events")).json(body);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let answer = request.send().await.unwrap();
    assert!(answer.status().is_success(), "{}", answer.text().await.unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_trace_runs_unbroken_from_a_nats_publisher_through_the_log_to_an_amqp_consumer() {
    let sink = Sink::start().await;
    let nats = NatsServer::start();
    let vhost = rabbit::vhost().await;
    let mut consumer = python("tracing.py", |command| {
        command.args(["consume", &sink.endpoint(), &vhost.uri, "traced"]);
    });
    let mut consumed = BufReader::new(consumer.stdout.take().unwrap());
    assert_eq!(line(&mut consumed).await, "ready");
    let config = format!(
        r#"
[transports.nats]
kind = "nats"
url = "{nats}"
[transports.rabbit]
kind = "amqp"
url = "{rabbit}"
[sources.lessons]
transport = "nats"
stream = "LESSONS"
create = {{ subjects = ["lessons.>"] }}
[handlers.bridge]
kind = "forward"
transport = "rabbit"
exchange = ""
routing_key = "traced"
{otlp}
"#,
        nats = nats.url(),
        rabbit = vhost.uri,
        otlp =
            sink.config("headers = \"api-key=se%20cret\"\nresource = { \"host.name\" = \"here\" }"),
    );
    let daemon = Daemon::start(&config).await;
    daemon.ready().await;
    let mut publisher = python("tracing.py", |command| {
        command.args(["publish", &sink.endpoint(), &nats.url(), "lessons.new", "lesson-1"]);
    });
    let mut published = BufReader::new(publisher.stdout.take().unwrap());
    let published = line(&mut published).await;
    let (trace, root) = published.split_once(' ').unwrap();
    let headers: Value = serde_json::from_str(&line(&mut consumed).await).unwrap();
    assert!(publisher.wait().unwrap().success() && consumer.wait().unwrap().success());
    let spans = sink
        .until("all six spans of the trace", |spans| {
            spans.iter().filter(|span| span["trace"] == trace).count() >= 6
        })
        .await;
    let spans: Vec<_> = spans.into_iter().filter(|span| span["trace"] == trace).collect();

    // One tree: publish ─▶ ingest ─▶ append, publish ─▶ handle ─▶ publish ─▶ process.
    let (publish, ingest) = (one(&spans, "publish lessons.new"), one(&spans, "ingest LESSONS"));
    let (append, handle) = (one(&spans, "append"), one(&spans, "handle bridge"));
    let (forward, process) = (one(&spans, "publish bridge"), one(&spans, "process traced"));
    assert_eq!(spans.len(), 6, "{spans:#?}");
    assert_eq!((&publish["span"], &publish["parent"]), (&json!(root), &json!("")));
    for (span, parent) in [
        (ingest, publish),
        (append, ingest),
        (handle, publish),
        (forward, handle),
        (process, forward),
    ] {
        assert_eq!(span["parent"], parent["span"], "{span} is no child of {parent}");
    }
    for (span, kind) in [
        (publish, PRODUCER),
        (ingest, CONSUMER),
        (append, INTERNAL),
        (handle, CONSUMER),
        (forward, PRODUCER),
        (process, CONSUMER),
    ] {
        assert_eq!(span["kind"], kind, "{span}");
        assert!(span["begun"].as_u64() <= span["ended"].as_u64(), "{span}");
        assert_eq!(span["status"][0], 0, "{span}");
    }
    let said = format!("00-{trace}-{}-", forward["span"].as_str().unwrap());
    let traceparent = headers["traceparent"].as_str().unwrap();
    assert!(traceparent.starts_with(&said) && traceparent.len() == 55, "{traceparent}");
    for span in [ingest, append, handle, forward] {
        assert_eq!(span["service"], "pulsebus");
        assert_eq!(span["resource"]["host.name"], "here");
        assert_eq!(span["key"], "se cret", "the collector's key");
        assert_eq!(span["attributes"]["pulsebus.position"], 1, "{span}");
    }
    let says = |span: &Value, name: &str, value: Value| {
        assert_eq!(span["attributes"][name], value, "{name}: {span}");
    };
    says(ingest, "messaging.system", json!("nats"));
    says(ingest, "messaging.destination.name", json!("LESSONS"));
    says(ingest, "messaging.operation.type", json!("receive"));
    says(ingest, "messaging.message.id", json!("lesson-1"));
    says(ingest, "cloudevents.event_type", json!("LessonPublished"));
    says(ingest, "pulsebus.duplicate", json!(false));
    says(handle, "messaging.operation.type", json!("process"));
    says(handle, "pulsebus.attempt", json!(1));
    says(handle, "pulsebus.outcome", json!("done"));
    says(handle, "pulsebus.replay", json!(false));
    says(forward, "messaging.system", json!("rabbitmq"));
    says(forward, "messaging.operation.type", json!("send"));
    says(forward, "messaging.rabbitmq.destination.routing_key", json!("traced"));
    // G9: what came in stays in the log as it came.
    let event = daemon.json("/v1/events/1").await.unwrap();
    let kept = event["headers"].to_string();
    assert!(kept.contains(&format!("00-{trace}-{root}-")), "{kept}");
}

#[tokio::test(flavor = "multi_thread")]
async fn each_attempt_has_a_span_and_a_replay_a_trace_of_its_own_linked_to_the_first() {
    let sink = Sink::start().await;
    let receiver = Receiver::start().await;
    let mut before = 0;
    receiver.rule(move |_| {
        before += 1;
        // One attempt fails, the second is refused for good; what a person wants again works.
        Reply::status(match before {
            1 => 500,
            2 => 400,
            _ => 204,
        })
    });
    let config = format!(
        r#"
[transports.hook]
kind = "http"
url = "{hook}"
[handlers.mail]
kind = "forward"
transport = "hook"
retry = {{ initial = "10ms", jitter = 0.0 }}
{otlp}
"#,
        hook = receiver.url("/"),
        otlp = sink.config(""),
    );
    let daemon = Daemon::start(&config).await;
    // No traceparent: its trace begins here.
    post(&daemon, &[], &json!({"id": "e1", "type": "T", "data": 1})).await;
    let attempts = |spans: &[Value]| named(spans, "handle mail").len();
    let spans = sink.until("two attempts", |spans| attempts(spans) >= 2).await;
    let ingest = one(&spans, "ingest http");
    assert_eq!((&ingest["parent"], &ingest["kind"]), (&json!(""), &json!(CONSUMER)));
    let trace = ingest["trace"].as_str().unwrap();
    for (at, handle) in named(&spans, "handle mail").into_iter().enumerate() {
        assert_eq!((&handle["trace"], &handle["parent"]), (&ingest["trace"], &ingest["span"]));
        assert_eq!(handle["attributes"]["pulsebus.attempt"], at as u64 + 1);
        assert_eq!(handle["status"][0], 2, "an error: {handle}");
        assert_eq!(handle["attributes"]["pulsebus.outcome"], ["retry", "reject"][at]);
    }
    assert!(named(&spans, "publish mail").iter().all(|span| span["kind"] == CLIENT));
    // Whoever reads the log finds the trace of what died.
    wait_until("the dead letter is in the daemon's log", async || {
        let log = daemon.log();
        let line = log.lines().find(|line| line.contains("dead letter"))?;
        assert!(line.contains(&format!("\"trace_id\":\"{trace}\"")), "{line}");
        Some(())
    })
    .await;

    wait_until("the dead letter is in the store", async || {
        let letters = daemon.json("/v1/dead-letters").await?;
        (letters["dead_letters"].as_array()?.len() == 1).then_some(())
    })
    .await;
    let told = http()
        .post(daemon.url("/v1/dead-letters/retry"))
        .json(&json!({"filter": {"handler": "mail"}}))
        .send()
        .await
        .unwrap();
    assert!(told.status().is_success(), "{}", told.text().await.unwrap());
    let spans = sink.until("the redrive", |spans| attempts(spans) >= 3).await;
    let redriven = named(&spans, "handle mail")[2];
    linked(redriven, ingest);

    wait_until("the cursor is there", async || (daemon.handler("mail").await == 1).then_some(()))
        .await;
    let told = http()
        .post(daemon.url("/v1/handlers/mail/rewind"))
        .json(&json!({"position": 1, "allow_side_effects": true}))
        .send()
        .await
        .unwrap();
    assert!(told.status().is_success(), "{}", told.text().await.unwrap());
    // What is new is no replay.
    post(&daemon, &[], &json!({"id": "e2", "type": "T", "data": 1})).await;
    let spans = sink.until("the rewind", |spans| attempts(spans) >= 5).await;
    let (again, new): (Vec<_>, Vec<_>) = named(&spans, "handle mail")[3..]
        .iter()
        .copied()
        .partition(|span| span["attributes"]["pulsebus.position"] == 1);
    linked(again[0], ingest);
    assert_ne!(again[0]["trace"], redriven["trace"]);
    let first = named(&spans, "ingest http")[1];
    assert_eq!((&new[0]["trace"], &new[0]["parent"]), (&first["trace"], &first["span"]));
    assert_eq!(new[0]["attributes"]["pulsebus.replay"], false);
    // The receiver is told the trace of each delivery.
    let seen = receiver.seen();
    let redelivered = seen[2].header("traceparent").unwrap();
    assert!(redelivered.contains(redriven["trace"].as_str().unwrap()), "{redelivered}");
}

/// A trace of its own, linked to that of the span.
fn linked(replay: &Value, first: &Value) {
    assert_ne!(replay["trace"], first["trace"]);
    assert_eq!(replay["parent"], "");
    assert_eq!(replay["links"], json!([[first["trace"], first["span"]]]));
    assert_eq!(replay["attributes"]["pulsebus.replay"], true);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_sampled_or_not_valid_is_exported_nowhere_and_kept_as_it_is() {
    const UNSAMPLED: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00";
    const SAMPLED: &str = "00-11111111111111111111111111111111-2222222222222222-01";
    let sink = Sink::start().await;
    let receiver = Receiver::start().await;
    let config = format!(
        r#"
[transports.hook]
kind = "http"
url = "{hook}"
[handlers.mail]
kind = "forward"
transport = "hook"
{otlp}
"#,
        hook = receiver.url("/"),
        otlp = sink.config("sample_ratio = 0.0"),
    );
    let daemon = Daemon::start(&config).await;
    let event = |id: &str| json!({"id": id, "type": "T", "key": "k", "data": 1});
    post(&daemon, &[("traceparent", UNSAMPLED), ("tracestate", "a=1")], &event("unsampled")).await;
    post(&daemon, &[], &event("untraced")).await;
    post(&daemon, &[("traceparent", "00-1")], &event("odd")).await;
    post(&daemon, &[("traceparent", SAMPLED), ("tracestate", "a=1, b=2")], &event("sampled")).await;
    // In order of the key, so the last one is the last.
    let spans =
        sink.until("the sampled one", |spans| !named(spans, "publish mail").is_empty()).await;
    assert_eq!(spans.len(), 4, "{spans:#?}");
    for span in &spans {
        assert_eq!(span["trace"], "1".repeat(32), "{span}");
        assert_eq!(span["state"], "a=1,b=2", "{span}");
    }
    let seen = receiver.seen();
    let told: Vec<_> = seen.iter().map(|seen| seen.header("traceparent")).collect();
    assert_eq!(told[..3], [Some(UNSAMPLED), None, Some("00-1")]);
    assert_eq!(seen[0].header("tracestate"), Some("a=1"));
    let publish = one(&spans, "publish mail")["span"].as_str().unwrap();
    assert_eq!(told[3], Some(&*format!("00-{}-{publish}-01", "1".repeat(32))));
    assert_eq!(seen[3].header("tracestate"), Some("a=1, b=2"));
}

#[tokio::test(flavor = "multi_thread")]
async fn G7_a_collector_that_is_away_costs_spans_and_no_events() {
    let port = free_port();
    let receiver = Receiver::start().await;
    let config = format!(
        r#"
[transports.hook]
kind = "http"
url = "{hook}"
[handlers.mail]
kind = "forward"
transport = "hook"
workers = 8
[telemetry.otlp]
endpoint = "http://127.0.0.1:{port}/v1/traces"
queue = 1000
"#,
        hook = receiver.url("/"),
    );
    let daemon = Daemon::start(&config).await;
    const EVENTS: u64 = 2_000;
    let batch: Vec<_> =
        (0..EVENTS).map(|n| json!({"id": n.to_string(), "type": "T", "data": n})).collect();
    post(&daemon, &[], &Value::from(batch)).await;
    wait_until("all events are through", async || {
        (daemon.handler("mail").await == EVENTS).then_some(())
    })
    .await;
    assert_eq!(receiver.seen().len() as u64, EVENTS);
    let lines = |word: &str| daemon.log().lines().filter(|line| line.contains(word)).count();
    wait_until("it is said", async || (lines("spans are not exported") > 0).then_some(())).await;
    // Four spans an event: most of them did not fit.
    let sink = Sink::on(port).await;
    wait_until("it is back", async || (lines("spans are exported again") > 0).then_some(())).await;
    let log = daemon.log();
    let back = log.lines().find(|line| line.contains("exported again")).unwrap();
    let lost = serde_json::from_str::<Value>(back).unwrap()["lost"].as_u64().unwrap();
    let kept =
        sink.until("what was in the queue", |spans| spans.len() as u64 + lost >= 4 * EVENTS).await;
    assert_eq!(kept.len() as u64 + lost, 4 * EVENTS, "every span is exported or counted");
    assert_eq!(lines("spans are not exported"), 1, "{log}");
    // The queue, and the batch that was under way.
    assert!(kept.len() <= 1_000 + 512, "{}", kept.len());
    // What is in the queue goes out at the end.
    post(&daemon, &[], &json!({"id": "last", "type": "T", "data": 1})).await;
    wait_until("it is handled", async || {
        (daemon.handler("mail").await == EVENTS + 1).then_some(())
    })
    .await;
    assert!(daemon.terminate().await.success());
    let last = |span: &Value| span["attributes"]["cloudevents.event_id"] == "last";
    sink.until("the last ones", |spans| spans.iter().any(last)).await;
}
