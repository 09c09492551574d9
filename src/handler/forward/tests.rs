use std::sync::Mutex;

use bytes::Bytes;

use super::*;
use crate::event::{Event, EventParts, Origin, Position};

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
            "reject: {subject} has no value in event no subject, so there is no address to \
             publish it to",
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
    let mut headers = Headers::new();
    for name in [
        "Nats-Msg-Id",
        "nats-expected-last-sequence",
        "Nats-Rollup",
        ":message_id",
        ":user_id",
        ":expiration",
        "x-death",
        "X-First-Death-Queue",
        "x-last-death-reason",
        "x-delivery-count",
        "Authorization",
        "Cookie",
        "pulsebus-type",
    ] {
        headers.push(name, "gone");
    }
    headers.push("CC", HeaderValue::Array(vec!["elsewhere".into()]));
    headers.push("traceparent", "00-1");
    headers.push("x-tenant", "a");
    headers.push("x-tenant", "b");
    headers.push(":priority", HeaderValue::Uint8(3));
    headers.push(":correlation_id", HeaderValue::Short("c".into()));
    headers.push("n", HeaderValue::Int32(5));
    let kept: Vec<_> = headers.iter().skip(14).map(|(n, v)| (n.to_owned(), v.clone())).collect();
    let event = EventParts { headers, ..parts("e1", Format::Native, "{}") };
    let sent = forward("amqp", event).await;
    let mut expected = kept;
    expected.push((SOURCE_HEADER.into(), "/lms".into()));
    let found: Vec<_> = sent.headers.iter().map(|(n, v)| (n.to_owned(), v.clone())).collect();
    assert_eq!(found, expected);
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
    let sent =
        forward("amqp", EventParts { headers, ..parts("e1", Format::CloudeventsStructured, body) })
            .await;
    // All four are in the body; the format is told by `specversion` and by the content type.
    assert_eq!(names(&sent.headers), ["content-type"]);
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
            [("specversion", "1.0"), ("id", "e1"), ("source", "/lms"), ("type", "LessonPublished")]
        {
            headers.push(format!("{prefix}{name}"), value);
        }
        headers.push(format!("{prefix}time"), HeaderValue::Timestamp(1_700_000_000));
        let event = || EventParts {
            headers: headers.clone(),
            ..parts("e1", Format::CloudeventsBinary, r#"{"type":"x","data":1}"#)
        };
        // AMQP keeps the names: other consumers there know them by the CloudEvents AMQP binding.
        assert_eq!(forward("amqp", event()).await.headers, headers);
        // NATS and HTTP know `ce-` only, and have no name with a colon.
        for kind in ["nats", "http"] {
            let sent = forward(kind, event()).await.headers;
            assert_eq!(
                names(&sent),
                ["ce-specversion", "ce-id", "ce-source", "ce-type", "ce-time"],
                "{prefix} {kind}"
            );
            assert_eq!(sent.get_str("ce-type"), Some("LessonPublished"));
            if prefix != "ce-" {
                assert_eq!(sent.get_str("ce-time"), Some("2023-11-14T22:13:20Z"));
            }
        }
    }
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
