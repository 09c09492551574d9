use std::sync::Mutex;

use bytes::Bytes;

use super::*;
use crate::event::{Event, EventParts, HeaderValue, Origin, Position};

/// Takes what it is told to take, and remembers it.
#[derive(Default)]
struct Broker {
    taken: Mutex<Vec<Outbound>>,
    calls: Mutex<usize>,
    /// What to answer, by message id; anything else is confirmed.
    answers: Vec<(&'static str, PublishError)>,
    /// Answer at most this many of a call.
    silent_after: Option<usize>,
}

#[async_trait]
impl Publisher for Broker {
    async fn publish(&self, messages: Vec<Outbound>) -> Vec<Result<(), PublishError>> {
        *self.calls.lock().unwrap() += 1;
        let answer =
            |message: Outbound| match self.answers.iter().find(|(id, _)| *id == &*message.id) {
                Some((_, error)) => Err(error.clone()),
                None => {
                    self.taken.lock().unwrap().push(message);
                    Ok(())
                }
            };
        messages.into_iter().take(self.silent_after.unwrap_or(usize::MAX)).map(answer).collect()
    }

    async fn close(&self) {}
}

fn parts(id: &str, format: Format, body: &str) -> EventParts {
    EventParts {
        id: id.into(),
        source: "/lms".into(),
        kind: "LessonPublished".into(),
        subject: None,
        time: None,
        key: id.into(),
        format,
        headers: Headers::new(),
        origin: Origin::default(),
        body: Bytes::from(body.to_owned()),
    }
}

fn stored(parts: EventParts) -> Arc<StoredEvent> {
    Arc::new(StoredEvent {
        position: Position(1),
        recorded_at: crate::event::now(),
        event: Event::from_parts(parts),
    })
}

fn handler(broker: &Arc<Broker>, kind: &str, address: &str) -> ForwardHandler {
    let publisher: Arc<dyn Publisher> = Arc::<Broker>::clone(broker);
    ForwardHandler::new("mirror", publisher, ForwardOptions::new(kind, address)).unwrap()
}

async fn forward(kind: &str, event: EventParts) -> Outbound {
    let broker = Arc::new(Broker::default());
    let outcome = handler(&broker, kind, "x.{type}").handle(&stored(event)).await;
    assert!(matches!(outcome, Outcome::Done), "{outcome:?}");
    broker.taken.lock().unwrap().pop().unwrap()
}

/// As a consumer of that transport hands it over.
fn by(transport: &str, parts: EventParts) -> EventParts {
    EventParts { origin: Origin { transport: transport.into(), ..Origin::default() }, ..parts }
}

fn names(headers: &Headers) -> Vec<&str> {
    headers.iter().map(|(name, _)| name).collect()
}

#[tokio::test]
async fn G9_the_body_goes_out_byte_for_byte() {
    let body =
        "{ \"type\":\"LessonPublished\",\n\"data\" : {\"n\":1e400,\"n\":1, \"s\":\"\\u00e9\"} }";
    let sent = forward("nats", parts("e1", Format::Native, body)).await;
    assert_eq!(
        (&*sent.id, &*sent.address, &*sent.body),
        ("e1", "x.LessonPublished", body.as_bytes())
    );
}

#[tokio::test]
async fn every_answer_becomes_its_outcome() {
    let refused = || PublishError::Refused("too large".into());
    let broker = Arc::new(Broker {
        answers: vec![
            ("refused", refused()),
            ("failed", PublishError::Failed("unroutable".into())),
            ("away", PublishError::Unavailable("blocked".into())),
        ],
        ..Broker::default()
    });
    let handler = handler(&broker, "nats", "x.{subject}");
    assert_eq!(handler.batching(), Batching::DistinctKeys(256));
    let ids = ["one", "refused", "no subject", "failed", "two", "away"];
    let events = ids.map(|id| {
        let subject = (id != "no subject").then(|| "s".into());
        stored(EventParts { subject, ..parts(id, Format::Native, "{}") })
    });
    let outcomes = handler.handle_batch(&events).await;
    let said: Vec<_> = outcomes
        .iter()
        .map(|outcome| match outcome {
            Outcome::Done => "done".to_owned(),
            Outcome::Retry { error, .. } => format!("retry: {error}"),
            Outcome::Reject { error } => format!("reject: {error}"),
            Outcome::Unavailable { error, .. } => format!("unavailable: {error}"),
        })
        .collect();
    assert_eq!(
        said,
        [
            "done",
            "reject: too large",
            "reject: {subject} has no value in event no subject, so no message can be made of it",
            "retry: unroutable",
            "done",
            "unavailable: blocked",
        ]
    );
    assert_eq!(*broker.calls.lock().unwrap(), 1, "a batch is one call");
    for (id, event) in ids.iter().zip(&events) {
        let alone = handler.handle(event).await;
        let done = matches!(alone, Outcome::Done);
        assert_eq!(done, matches!(*id, "one" | "two"), "{id}: {alone:?}");
    }
}

#[tokio::test]
async fn what_is_not_confirmed_is_not_done() {
    let broker = Arc::new(Broker { silent_after: Some(1), ..Broker::default() });
    let handler = handler(&broker, "nats", "x");
    let events = ["a", "b", "c"].map(|id| stored(parts(id, Format::Native, "{}")));
    let outcomes = handler.handle_batch(&events).await;
    assert!(matches!(
        outcomes[..],
        [Outcome::Done, Outcome::Unavailable { .. }, Outcome::Unavailable { .. }]
    ));
    let nothing = stored(parts("z", Format::Native, "{}"));
    let broker = Arc::new(Broker { silent_after: Some(0), ..Broker::default() });
    let outcome = self::handler(&broker, "nats", "x").handle(&nothing).await;
    assert!(matches!(outcome, Outcome::Unavailable { .. }));
}

#[tokio::test]
async fn a_batch_without_an_address_publishes_nothing() {
    let broker = Arc::new(Broker::default());
    let handler = handler(&broker, "amqp", "{subject}");
    let outcomes = handler.handle_batch(&[stored(parts("a", Format::Native, "{}"))]).await;
    assert!(matches!(outcomes[..], [Outcome::Reject { .. }]));
    assert_eq!(*broker.calls.lock().unwrap(), 0);
}

#[tokio::test]
async fn an_exchange_is_a_template_too() {
    for (exchange, expected) in [("edupulse", "edupulse"), ("by-{type}", "by-LessonPublished")] {
        let broker = Arc::new(Broker::default());
        let publisher: Arc<dyn Publisher> = Arc::<Broker>::clone(&broker);
        let options = ForwardOptions {
            exchange: Some(exchange.into()),
            ..ForwardOptions::new("amqp", "lesson.{type}")
        };
        let handler = ForwardHandler::new("mirror", publisher, options).unwrap();
        let _ = handler.handle(&stored(parts("a", Format::Native, "{}"))).await;
        let sent = broker.taken.lock().unwrap().pop().unwrap();
        assert_eq!(sent.exchange.as_deref(), Some(expected));
    }
    for options in [
        ForwardOptions::new("nats", "a..b"),
        ForwardOptions::new("nats", "{nope}"),
        ForwardOptions { exchange: Some("{".into()), ..ForwardOptions::new("amqp", "") },
    ] {
        options.validate().unwrap_err();
        let publisher: Arc<dyn Publisher> = Arc::new(Broker::default());
        ForwardHandler::new("mirror", publisher, options).unwrap_err();
    }
}

#[tokio::test]
async fn what_belongs_to_the_hop_stays_behind() {
    let gone = |names: &[&'static str]| {
        let mut headers = Headers::new();
        for name in names {
            headers.push(*name, "gone");
        }
        headers
    };
    let mut amqp = gone(&[
        ":message_id",
        ":user_id",
        ":expiration",
        "x-death",
        "X-First-Death-Queue",
        "x-last-death-reason",
        "x-delivery-count",
        "pulsebus-type",
        "pulsebus-source",
    ]);
    amqp.push("CC", HeaderValue::Array(vec!["elsewhere".into()]));
    let nats =
        gone(&["Nats-Msg-Id", "nats-expected-last-sequence", "Nats-Rollup", "pulsebus-type"]);
    let http = gone(&["authorization", "cookie", "webhook-signature", "webhook-timestamp"]);
    for (from, mut headers, id) in
        [("amqp", amqp, true), ("nats", nats, true), ("http", http, false)]
    {
        headers.push("traceparent", "00-1");
        headers.push("x-tenant", "a");
        headers.push("x-tenant", "b");
        let event = EventParts { headers, ..parts("e1", Format::Native, "{}") };
        let sent = forward("amqp", by(from, event)).await.headers;
        let mut expected = vec!["traceparent", "x-tenant", "x-tenant"];
        if id {
            // The message's own id, which the event does not have.
            expected.push(MESSAGE_ID_HEADER);
            assert_eq!(sent.get_str(MESSAGE_ID_HEADER), Some("gone"));
        }
        expected.push(SOURCE_HEADER);
        assert_eq!(names(&sent), expected, "{from}");
    }
}

// What the four formats need so that a copy that comes back is known, by the Decoder's rules for
// id, source, type and data (see the table at the head of the module). In each case everything
// that those rules look at is either in the body, which is unchanged, or asserted here.

#[tokio::test]
async fn G2_a_structured_event_comes_back_as_a_copy() {
    let body =
        r#"{"specversion":"1.0","id":"e1","source":"/lms","type":"LessonPublished","data":1}"#;
    let mut headers = Headers::new();
    headers.push("content-type", "application/cloudevents+json");
    let event = EventParts { headers, ..parts("e1", Format::CloudeventsStructured, body) };
    let sent = forward("amqp", by("http", event)).await;
    // All four are in the body; the format is told by `specversion` and by the content type.
    assert_eq!(names(&sent.headers), [":content_type"]);
    assert_eq!(sent.body, body.as_bytes());
    // A source that no header can hold is no obstacle: the body says it.
    let body = r#"{"specversion":"1.0","id":"e1","source":"/a\nb","type":"T"}"#;
    let odd =
        EventParts { source: "/a\nb".into(), ..parts("e1", Format::CloudeventsStructured, body) };
    assert!(forward("nats", odd).await.headers.is_empty());
}

#[tokio::test]
async fn G2_a_binary_event_comes_back_as_a_copy() {
    for prefix in ["ce-", "cloudEvents:", "cloudEvents_"] {
        let mut headers = Headers::new();
        for (name, value) in
            [("specversion", "1.0"), ("id", "e 1"), ("source", "/lms"), ("type", "LessonPublished")]
        {
            headers.push(format!("{prefix}{name}"), value);
        }
        headers.push(format!("{prefix}time"), HeaderValue::Timestamp(1_700_000_000));
        let event = || {
            let body = r#"{"type":"x","data":1}"#;
            let parts = parts("e 1", Format::CloudeventsBinary, body);
            by("amqp", EventParts { headers: headers.clone(), ..parts })
        };
        // AMQP keeps the names: other consumers there know them by the CloudEvents AMQP binding.
        assert_eq!(forward("amqp", event()).await.headers, headers);
        // NATS and HTTP know `ce-` only, percent-encoded.
        for kind in ["nats", "http"] {
            let sent = forward(kind, event()).await.headers;
            assert_eq!(
                names(&sent)[..5],
                ["ce-specversion", "ce-id", "ce-source", "ce-type", "ce-time"],
                "{prefix} {kind}"
            );
            assert_eq!(sent.get_str("ce-id"), Some("e%201"));
            assert_eq!(sent.get_str("ce-time"), Some("2023-11-14T22:13:20Z"));
        }
    }
    // The other way they get the names of the AMQP binding, and their text as it is.
    let mut headers = Headers::new();
    for (name, value) in [("id", "e%201"), ("specversion", "1.0"), ("source", "/l"), ("type", "T")]
    {
        headers.push(format!("ce-{name}"), value);
    }
    let event = EventParts { headers, ..parts("e 1", Format::CloudeventsBinary, "1") };
    let sent = forward("amqp", by("nats", event)).await.headers;
    assert_eq!(sent.get_str("cloudEvents:id"), Some("e 1"));
    assert_eq!(sent.len(), 4);
}

#[tokio::test]
async fn G2_a_native_event_comes_back_as_a_copy() {
    // Type and data are in the body. Id: the message id, unless the body has one, which is then
    // the event's id. Source: the header, unless the body has one.
    let plain = parts("stream:7", Format::Native, r#"{"type":"LessonPublished","data":{}}"#);
    let sent = forward("amqp", plain).await;
    assert_eq!(&*sent.id, "stream:7");
    assert_eq!(names(&sent.headers), [SOURCE_HEADER]);
    assert_eq!(sent.headers.get_str(SOURCE_HEADER), Some("/lms"));
    let body = r#"{"type":"LessonPublished","source":"/lms","id":"e1","data":{}}"#;
    assert!(forward("amqp", parts("e1", Format::Native, body)).await.headers.is_empty());
    // On its second hop the header is there once, and says the same.
    let mut headers = Headers::new();
    headers.push("Pulsebus-Source", "/lms");
    let again = EventParts { headers, ..parts("e1", Format::Native, "{}") };
    assert_eq!(names(&forward("nats", again).await.headers), [SOURCE_HEADER]);
}

#[tokio::test]
async fn G2_a_raw_event_comes_back_as_a_copy() {
    // Its type came from a subject that the other side does not have, and its body may look
    // native where the source it came from pins `raw`.
    for body in [r#"{"title":"x"}"#, r#"{"type":"Other","source":"/lms","data":{}}"#, "[1]", "null"]
    {
        let raw =
            EventParts { kind: "edupulse.lessons.new".into(), ..parts("S:7", Format::Raw, body) };
        let sent = forward("amqp", raw).await;
        assert_eq!(names(&sent.headers), [SOURCE_HEADER, TYPE_HEADER]);
        assert_eq!(sent.headers.get_str(TYPE_HEADER), Some("edupulse.lessons.new"));
        assert_eq!((&*sent.id, &*sent.body), ("S:7", body.as_bytes()));
    }
}

#[tokio::test]
async fn a_header_of_ones_own_is_a_template() {
    let sent = |kind: &'static str, name: &'static str, template: &'static str, event| async move {
        let broker = Arc::new(Broker::default());
        let publisher: Arc<dyn Publisher> = Arc::<Broker>::clone(&broker);
        let options = ForwardOptions {
            headers: vec![(name.into(), template.into())],
            ..ForwardOptions::new(kind, "x")
        };
        let handler = ForwardHandler::new("mirror", publisher, options).unwrap();
        let outcome = handler.handle(&stored(event)).await;
        let sent = broker.taken.lock().unwrap().pop();
        (outcome, sent.map(|sent| sent.headers))
    };
    let event = || {
        let mut headers = Headers::new();
        headers.push("x-title", "old");
        let body = r#"{"type":"T","data":{"title":"100 % é\nb"}}"#;
        EventParts { headers, ..parts("e1", Format::Native, body) }
    };
    for (kind, expected) in
        [("nats", "a 100 %25 é%0Ab"), ("http", "a 100 %25 %C3%A9%0Ab"), ("amqp", "a 100 % é\nb")]
    {
        let (_, headers) = sent(kind, "X-Title", "a {/title}", event()).await;
        let headers = headers.unwrap();
        assert_eq!(headers.get_str("x-title"), Some(expected), "{kind}");
        assert_eq!(names(&headers), [SOURCE_HEADER, "X-Title"], "the event's own gives way");
    }
    let (outcome, headers) = sent("nats", "a", "{subject}", event()).await;
    assert!(matches!(outcome, Outcome::Reject { .. }) && headers.is_none(), "{outcome:?}");
    for (kind, name) in [
        ("nats", "a b"),
        ("nats", "Nats-Rollup"),
        ("nats", ""),
        ("http", "webhook-id"),
        ("http", "Authorization"),
        ("http", "é"),
        ("amqp", ":user_id"),
        ("amqp", "CC"),
        ("amqp", "Content-Type"),
        ("amqp", "Pulsebus-Source"),
    ] {
        let headers = vec![(name.into(), "v".into())];
        let options = ForwardOptions { headers, ..ForwardOptions::new(kind, "x") };
        assert!(options.validate().is_err(), "{kind} {name}");
    }
}

#[tokio::test]
async fn a_header_of_ones_own_leaves_no_other_form_of_the_old_one() {
    let mut headers = Headers::new();
    headers.push("x-count", HeaderValue::Int32(7));
    headers.push("x-other", HeaderValue::Int32(8));
    let event = by("amqp", EventParts { headers, ..parts("e1", Format::Native, "{}") });
    let broker = Arc::new(Broker::default());
    let publisher: Arc<dyn Publisher> = Arc::<Broker>::clone(&broker);
    let own = vec![("X-Count".into(), "9".into())];
    let options = ForwardOptions { headers: own, ..ForwardOptions::new("nats", "x") };
    let handler = ForwardHandler::new("mirror", publisher, options).unwrap();
    assert!(matches!(handler.handle(&stored(event)).await, Outcome::Done));
    let sent = broker.taken.lock().unwrap().pop().unwrap().headers;
    assert_eq!(sent.get_str("x-count"), Some("9"));
    assert_eq!(sent.get_str(TYPED_HEADER), Some(r#"{"x-other":{"int32":8}}"#));
}

/// Whatever comes in by one transport and goes out by another, in whichever format, is known as
/// the same event where it comes back.
mod loops {
    use proptest::prelude::*;

    use super::*;
    use crate::event::{Decoder, Message};

    fn text() -> impl Strategy<Value = String> {
        prop_oneof![
            "[a-z/.]{1,8}",
            "[a-z%\" 0-9é€\\\\]{1,8}",
            Just("a%41b".to_owned()),
            Just("\"q\"".to_owned()),
        ]
    }

    fn json() -> impl Strategy<Value = String> {
        prop_oneof![
            Just("null".to_owned()),
            Just(r#"{ "a" : [1.0, 1e400, "\ud83d\ude00"] }"#.to_owned()),
            Just(r#"{"type":"Inner","data":1,"id":"inner","source":"/in"}"#.to_owned()),
            Just(r#"{"specversion":"1.0"}"#.to_owned()),
            Just(r#"{"id":{},"key":"k","type":5}"#.to_owned()),
            text().prop_map(|text| serde_json::Value::from(text).to_string()),
        ]
    }

    /// Messages as publishers send them.
    fn message() -> impl Strategy<Value = (Message, Option<Format>)> {
        let parts = (text(), text(), text(), json(), any::<[bool; 4]>());
        (parts, 0..5, prop::sample::select(vec!["nats", "amqp", "http"])).prop_map(
            |((id, source, kind, data, some), form, transport)| {
                let quote = |text: &str| serde_json::Value::from(text).to_string();
                let (i, s, k) = (quote(&id), quote(&source), quote(&kind));
                let mut headers = Headers::new();
                let mut pinned = None;
                let body = match form {
                    0 => format!(
                        r#"{{"specversion":"1.0","id":{i},"source":{s},"type":{k},"ext":"e","data":{data}}}"#
                    ),
                    1 => {
                        for (name, value) in
                            [("specversion", "1.0"), ("id", &*id), ("source", &source), ("type", &kind)]
                        {
                            if transport == "amqp" {
                                headers.push(format!("cloudEvents:{name}"), value);
                            } else {
                                headers.push(format!("ce-{name}"), &*binary::encode(value));
                            }
                        }
                        data
                    }
                    2 => {
                        let own = if some[0] { format!(r#","id":{i}"#) } else { String::new() };
                        let from = if some[1] { format!(r#","source":{s}"#) } else { String::new() };
                        format!(r#"{{"type":{k}{own}{from},"more":[1],"data":{data}}}"#)
                    }
                    3 => {
                        // Raw by its source's word, whatever it looks like.
                        pinned = Some(Format::Raw);
                        data
                    }
                    _ => format!("[{data}]"),
                };
                let name = match transport {
                    "nats" => "Nats-Msg-Id",
                    "amqp" => ":message_id",
                    _ => "webhook-id",
                };
                if some[2] {
                    headers.push(name, format!("m-{}", id.trim()));
                }
                let origin = Origin {
                    transport: transport.into(),
                    subject: kind.into(),
                    ..Origin::default()
                };
                (Message { body: body.into(), headers, origin }, pinned)
            },
        )
    }

    /// As the destination's consumer hands it over.
    fn back(sent: Outbound, kind: &str) -> Message {
        let mut headers = Headers::new();
        for (name, value) in sent.headers.iter() {
            if kind == "amqp" {
                headers.push(name, value.clone());
            } else {
                let HeaderValue::Text(text) = value else { panic!("{name}: {value:?}") };
                let name = if kind == "http" { name.to_ascii_lowercase() } else { name.into() };
                headers.push(name, text.trim());
            }
        }
        let (name, id) = match kind {
            "nats" => ("Nats-Msg-Id", sent.id.trim()),
            "amqp" => (":message_id", &*sent.id),
            _ => ("webhook-id", "whatever the publisher makes of it"),
        };
        let plain = kind != "http" || carry::is_text(&sent.id, true);
        headers.push(name, if plain && kind == "http" { &sent.id } else { id });
        let origin =
            Origin { transport: kind.into(), subject: "elsewhere".into(), ..Origin::default() };
        Message { body: sent.body, headers, origin }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(3_000))]

        #[test]
        fn G2_a_forwarded_event_that_comes_back_is_a_copy(
            (message, pinned) in message(),
            hops in prop::collection::vec(
                (
                    prop::sample::select(vec!["nats", "amqp", "http"]),
                    prop::sample::select(vec![
                        ForwardFormat::Verbatim,
                        ForwardFormat::Native,
                        ForwardFormat::CloudeventsStructured,
                        ForwardFormat::CloudeventsBinary,
                    ]),
                ),
                1..4,
            ),
        ) {
            let options = crate::event::DecoderOptions { format: pinned, ..Default::default() };
            let Ok(first) = Decoder::new(options).decode(message) else {
                // What is no event is not forwarded.
                return Ok(());
            };
            let mut event = first.clone();
            for (kind, format) in hops {
                let publisher: Arc<dyn Publisher> = Arc::new(Broker::default());
                let options = ForwardOptions { format, ..ForwardOptions::new(kind, "x") };
                let handler = ForwardHandler::new("mirror", publisher, options).unwrap();
                let stored = StoredEvent {
                    position: Position(1),
                    recorded_at: crate::event::now(),
                    event,
                };
                let sent = handler.outbound(&stored).unwrap();
                let returned = back(sent, kind);
                event = Decoder::default().decode(returned.clone()).map_err(|error| {
                    TestCaseError::fail(format!("{kind} {format:?} {returned:?}: {:?}", error.reason))
                })?;
                prop_assert_eq!(event.id(), first.id(), "{} {:?} {:?}", kind, format, &returned);
                prop_assert_eq!(event.source(), first.source(), "{} {:?} {:?}", kind, format, &returned);
                prop_assert_eq!(event.kind(), first.kind(), "{} {:?} {:?}", kind, format, &returned);
                prop_assert_eq!(event.data().trim(), first.data().trim(), "{} {:?} {:?}", kind, format, &returned);
            }
        }
    }
}
