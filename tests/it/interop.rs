//! CloudEvents as others read and write them: the SDK for Python.

use std::{
    io::Write as _,
    process::{Command, Stdio},
    sync::{Arc, Mutex},
};

use async_trait::async_trait;
use pulsebus::{
    event::{Decoder, Event, Headers, Message, Origin, Position, StoredEvent},
    handler::{
        EventHandler as _, Outcome,
        forward::{ForwardFormat, ForwardHandler, ForwardOptions},
    },
    transport::{Outbound, PublishError, Publisher},
};
use serde_json::{Value, json};

/// Runs the SDK; what it prints, line by line.
fn sdk(mode: &str, input: &str) -> Vec<Value> {
    let python = std::env::var("TEST_PULSEBUS_PYTHON")
        .expect("TEST_PULSEBUS_PYTHON: run the tests by tests/run, which installs the SDK");
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/clients/cloudevents_sdk.py");
    let mut child = Command::new(python)
        .args([script, mode])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "the SDK failed; see above");
    let text = String::from_utf8(output.stdout).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[derive(Default)]
struct Taken(Mutex<Vec<Outbound>>);

#[async_trait]
impl Publisher for Taken {
    async fn publish(&self, messages: Vec<Outbound>) -> Vec<Result<(), PublishError>> {
        let results = vec![Ok(()); messages.len()];
        self.0.lock().unwrap().extend(messages);
        results
    }

    async fn close(&self) {}
}

fn decoded(headers: &[(&str, &str)], body: &str) -> Event {
    let mut all = Headers::new();
    for (name, value) in headers {
        all.push(*name, *value);
    }
    let origin = Origin { transport: "nats".into(), subject: "s.t".into(), ..Origin::default() };
    let message = Message { body: body.to_owned().into(), headers: all, origin };
    Decoder::default().decode(message).unwrap()
}

#[tokio::test]
async fn the_cloudevents_sdk_parses_what_forward_emits() {
    let events = [
        decoded(
            &[("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")],
            r#"{"type":"LessonPublished","id":"n1","source":"/lms","subject":"x","key":"k",
                "time":1700000000123,"tenant":"t","data":{"title":"é 😀","n":1.5}}"#,
        ),
        decoded(&[("Nats-Msg-Id", "r1")], "[1, {\"a\": null}]"),
        decoded(
            &[],
            r#"{"specversion":"1.0","id":"s1","source":"/s","type":"T","ext":5,"data":"text"}"#,
        ),
        decoded(
            &[
                ("ce-specversion", "1.0"),
                ("ce-id", "b1"),
                ("ce-source", "/b"),
                ("ce-type", "T"),
                ("ce-ext", "e"),
                ("content-type", "application/json"),
            ],
            r#"{"n": 1}"#,
        ),
    ];
    let mut expected = Vec::new();
    let mut input = String::new();
    for format in [ForwardFormat::CloudeventsStructured, ForwardFormat::CloudeventsBinary] {
        let taken = Arc::new(Taken::default());
        let publisher: Arc<dyn Publisher> = Arc::<Taken>::clone(&taken);
        let options = ForwardOptions { format, ..ForwardOptions::new("http", "") };
        let handler = ForwardHandler::new("forward", publisher, options).unwrap();
        for event in &events {
            let stored = StoredEvent {
                position: Position(1),
                recorded_at: pulsebus::event::now(),
                event: event.clone(),
            };
            assert!(matches!(handler.handle(&stored).await, Outcome::Done));
            let sent = taken.0.lock().unwrap().pop().unwrap();
            let headers: Vec<_> =
                sent.headers.iter().map(|(n, v)| (n, v.as_str().unwrap())).collect();
            let body = std::str::from_utf8(&sent.body).unwrap();
            input.push_str(&json!({ "headers": headers, "body": body }).to_string());
            input.push('\n');
            expected.push(event.clone());
        }
    }
    let found = sdk("parse", &input);
    assert_eq!(found.len(), expected.len());
    for (event, found) in expected.iter().zip(&found) {
        let attributes = &found["attributes"];
        assert_eq!(attributes["specversion"], "1.0");
        assert_eq!(attributes["id"], event.id());
        assert_eq!(attributes["source"], event.source());
        assert_eq!(attributes["type"], event.kind());
        assert_eq!(attributes["subject"].as_str(), event.subject());
        let time = attributes["time"].as_str();
        let same = |text: &str| {
            let format = &time::format_description::well_known::Rfc3339;
            time::OffsetDateTime::parse(text, format).ok()
        };
        // To an event without a time the SDK gives the present one.
        if event.time().is_some() {
            assert_eq!(time.and_then(same), event.time(), "{found}");
        }
        assert_eq!(found["data"], serde_json::from_str::<Value>(event.data()).unwrap());
        for name in ["traceparent", "dataschema"] {
            assert_eq!(
                attributes[name].as_str(),
                event.attribute(name).as_deref(),
                "{name}: {found}"
            );
        }
    }
    let extension = |n: usize, name: &str| found[n]["attributes"][name].clone();
    assert_eq!((extension(0, "partitionkey"), extension(0, "tenant")), ("k".into(), "t".into()));
    assert_eq!((extension(4, "partitionkey"), extension(4, "tenant")), ("k".into(), "t".into()));
    assert_eq!((extension(2, "ext"), extension(6, "ext")), (5.into(), "5".into()));
    assert_eq!((extension(3, "ext"), extension(7, "ext")), ("e".into(), "e".into()));
}

#[test]
fn what_the_cloudevents_sdk_emits_is_read() {
    let requests = sdk("emit", "");
    assert_eq!(requests.len(), 8);
    for request in requests {
        let headers = request["headers"].as_array().unwrap();
        let headers: Vec<_> = headers
            .iter()
            .map(|pair| (pair[0].as_str().unwrap(), pair[1].as_str().unwrap()))
            .collect();
        let event = decoded(&headers, request["body"].as_str().unwrap());
        let attributes = &request["attributes"];
        assert_eq!(event.id(), attributes["id"], "{request}");
        assert_eq!(event.source(), attributes["source"]);
        assert_eq!(event.kind(), attributes["type"]);
        assert_eq!(event.subject(), attributes["subject"].as_str());
        assert_eq!(
            event.key(),
            attributes["partitionkey"].as_str().or(event.subject()).unwrap_or(event.id())
        );
        assert!(event.time().is_some(), "the SDK always says a time");
        for name in ["traceparent", "dataschema"] {
            assert_eq!(event.attribute(name).as_deref(), attributes[name].as_str(), "{name}");
        }
        assert_eq!(serde_json::from_str::<Value>(event.data()).unwrap(), request["data"]);
    }
}
