use proptest::prelude::*;
use serde_json::{Value, json};
use time::macros::datetime;

use super::*;
use crate::event::{DomainEvent, HeaderValue, Headers, Origin, Quarantined, UnixTimestamp};

#[path = "../../../tests/corpus/mod.rs"]
mod corpus;

use corpus::{Case, Verdict};

fn message(body: impl Into<Vec<u8>>) -> Message {
    Message { body: body.into().into(), ..Message::default() }
}

fn with(mut message: Message, headers: &[(&str, &str)]) -> Message {
    for (name, value) in headers {
        message.headers.push(*name, *value);
    }
    message
}

fn from(mut message: Message, transport: &str, subject: &str) -> Message {
    message.origin =
        Origin { transport: transport.into(), subject: subject.into(), ..Origin::default() };
    message
}

fn decode(message: Message) -> Event {
    Decoder::default().decode(message).unwrap()
}

fn reason(options: DecoderOptions, message: Message) -> Reason {
    let before = message.clone();
    let refused = Decoder::new(options).decode(message).unwrap_err();
    assert_eq!(*refused.message, before, "what is refused is untouched");
    refused.reason
}

fn pinned(format: Format) -> DecoderOptions {
    DecoderOptions { format: Some(format), ..DecoderOptions::default() }
}

const BINARY: [(&str, &str); 4] =
    [("ce-specversion", "1.0"), ("ce-id", "1"), ("ce-source", "/s"), ("ce-type", "T")];

/// Decodes a case and holds the outcome to its verdict.
fn judge(decoder: &mut Decoder, case: Case) {
    let Case { name, body, headers, verdict } = case;
    let mut message = message(body);
    for (header, value) in headers {
        message.headers.push(header, value);
    }
    let before = message.clone();
    match (decoder.decode(message), verdict) {
        (Ok(event), Verdict::Event) => {
            invariants(&event);
            assert_eq!(event.into_message(), before, "{name}");
        }
        (Err(refused), Verdict::Quarantined(part)) => {
            let kept = Quarantined::from(refused);
            assert!(kept.reason.contains(part), "{name}: {:?} lacks {part:?}", kept.reason);
            assert!(kept.reason.len() < 600, "{name}: {}", kept.reason);
            assert!(!kept.reason.contains(|c: char| c.is_control()), "{name}: {:?}", kept.reason);
            assert_eq!(kept.message, before, "{name}");
        }
        (outcome, verdict) => panic!("{name}: expected {verdict:?}, got {outcome:?}"),
    }
}

/// What holds for every event there is.
fn invariants(event: &Event) {
    assert!(!event.id().is_empty() && !event.source().is_empty());
    assert!(!event.kind().is_empty() && !event.key().is_empty());
    for text in [event.id(), event.source(), event.kind(), event.key()] {
        assert!(!text.bytes().any(|b| b.is_ascii_control()), "{text:?}");
    }
    assert_eq!(event.body_str().as_bytes(), &event.body()[..]);
    event.data_as::<Box<serde_json::value::RawValue>>().unwrap();
    let span = event.body().as_ptr_range();
    if event.data() != "null" {
        assert!(span.contains(&event.data().as_ptr()), "data() is a view into the body");
    }
    if let Some(time) = event.time() {
        assert_eq!(time, crate::event::to_micros(time));
    }
}

#[test]
fn G1_every_kind_of_odd_input_is_an_event_or_quarantined() {
    let all = corpus::corpus();
    assert!(all.len() >= 64);
    let mut names: Vec<_> = all.iter().map(|case| case.name).collect();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), all.len(), "names are unique");
    let carried = all.iter().filter(|case| case.headers_fit_everywhere() && !case.http_may_split());
    assert!(carried.count() >= 64, "enough cases fit through every way in");

    let mut decoder = Decoder::default();
    for case in all {
        judge(&mut decoder, case);
    }
}

#[test]
fn G7_large_bodies_are_refused_unread() {
    let mut decoder = Decoder::default();
    for case in corpus::large() {
        judge(&mut decoder, case);
    }
    // The size comes before everything else: nobody reads 64 MiB to say what is wrong in them.
    let options = DecoderOptions { max_event_bytes: 3, ..DecoderOptions::default() };
    assert_eq!(reason(options, message("\u{ff}\u{ff}")), Reason::TooLarge { size: 4, limit: 3 });
}

#[test]
fn what_is_wrong_is_said_with_line_and_column() {
    let body = "{\n  \"title\": \"é\", x";
    let expected =
        Reason::NotJson { what: "expected a name in double quotes", line: 2, column: 17 };
    assert_eq!(reason(DecoderOptions::default(), message(body)), expected);
}

#[test]
fn formats_are_recognised() {
    use Format::{CloudeventsBinary, CloudeventsStructured, Native, Raw};
    let whole = r#"{"specversion":"1.0","id":"1","source":"/s","type":"T","data":{"a":1}}"#;
    let native = r#"{"type":"T","data":{"a":1}}"#;
    for (message, format, data) in [
        (message(whole), CloudeventsStructured, r#"{"a":1}"#),
        (with(message(whole), &BINARY), CloudeventsStructured, r#"{"a":1}"#),
        (
            with(message(whole), &[("Content-Type", "application/json")]),
            CloudeventsStructured,
            r#"{"a":1}"#,
        ),
        (
            with(message(whole), &[(":content_type", "application/cloudevents+json")]),
            CloudeventsStructured,
            r#"{"a":1}"#,
        ),
        (with(message(native), &BINARY), CloudeventsBinary, native),
        (with(message("[]"), &[("ce-traceparent", "x")]), Raw, "[]"),
        (message(native), Native, r#"{"a":1}"#),
        (message(r#"{"type":"T","data":null}"#), Native, "null"),
        (message(r#"{"type":"T"}"#), Raw, r#"{"type":"T"}"#),
        (message(r#"{"type":1,"data":2}"#), Raw, r#"{"type":1,"data":2}"#),
        (message(r#"{"data":2}"#), Raw, r#"{"data":2}"#),
        (message(" 5\n"), Raw, " 5\n"),
    ] {
        let event = decode(message.clone());
        assert_eq!((event.format(), event.data()), (format, data), "{message:?}");
        invariants(&event);
    }
}

#[test]
fn binary_attributes_come_under_each_bindings_prefix() {
    for prefix in ["ce-", "CE-", "cloudEvents:", "cloudEvents_"] {
        let mut sent = message(r#"{"a":1}"#);
        for (name, value) in [
            ("specversion", "1.0"),
            ("id", "i"),
            ("source", "/s"),
            ("type", "T"),
            ("subject", "about"),
            ("time", "2024-01-01T00:00:00+01:00"),
            ("partitionkey", "p"),
            ("myextension", "x"),
        ] {
            sent.headers.push(format!("{prefix}{name}"), value);
        }
        let event = decode(sent);
        assert_eq!((event.id(), event.source(), event.kind()), ("i", "/s", "T"));
        assert_eq!((event.subject(), event.key()), (Some("about"), "p"));
        assert_eq!(event.time(), Some(datetime!(2023-12-31 23:00 UTC)));
        assert_eq!(event.attribute("myextension").as_deref(), Some("x"));
        assert_eq!(event.attribute("absent"), None);
    }
}

#[test]
fn percent_encoding_is_that_of_http_and_nats() {
    let sent = with(message("1"), &BINARY);
    let sent = with(sent, &[("ce-subject", "Euro%20%E2%82%AC"), ("ce-x", "%41")]);
    for (transport, subject, x) in
        [("nats", "Euro €", "A"), ("http", "Euro €", "A"), ("amqp", "Euro%20%E2%82%AC", "%41")]
    {
        let event = decode(from(sent.clone(), transport, ""));
        assert_eq!(event.subject(), Some(subject), "{transport}");
        assert_eq!(event.attribute("x").as_deref(), Some(x), "{transport}");
    }
    let overlong = with(with(message("1"), &[("ce-id", "%C0%A0")]), &BINARY);
    assert_eq!(
        reason(DecoderOptions::default(), overlong),
        Reason::PercentEncoding { name: "id", found: "%C0%A0".into() }
    );
}

#[test]
fn amqp_headers_may_be_typed() {
    let mut sent = with(message("1"), &BINARY);
    sent.headers.push("cloudEvents:time", HeaderValue::Timestamp(1_700_000_000));
    sent.headers.push("cloudEvents:partitionkey", HeaderValue::Int64(7));
    let event = decode(from(sent.clone(), "amqp", ""));
    assert_eq!(event.time(), Some(datetime!(2023-11-14 22:13:20 UTC)));
    assert_eq!(event.key(), "7");

    sent.headers.set("cloudEvents:time", HeaderValue::Timestamp(u64::MAX));
    let found = u64::MAX.to_string();
    assert_eq!(reason(DecoderOptions::default(), sent.clone()), Reason::NotATime { found });
    sent.headers.set("cloudEvents:time", HeaderValue::Table(Headers::new()));
    let refused = reason(DecoderOptions::default(), sent);
    assert!(matches!(refused, Reason::WrongType { name: "time", .. }), "{refused}");
}

#[test]
fn G2_the_id_is_the_first_that_applies() {
    let body = r#"{"id":"body","type":"T","data":1}"#;
    let bare = r#"{"type":"T","data":1}"#;
    let headers = [("webhook-id", "hook"), (":message_id", "amqp"), ("nats-msg-id", "nats")];
    assert_eq!(decode(with(message(body), &headers)).id(), "body");
    assert_eq!(decode(with(message(bare), &headers)).id(), "nats");
    assert_eq!(decode(with(message(bare), &headers[..2])).id(), "amqp");
    assert_eq!(decode(with(message(bare), &headers[..1])).id(), "hook");
    assert_eq!(decode(with(message(r#"{"id":7.0}"#), &headers)).id(), "7.0");
    assert_eq!(decode(with(message(r#"{"id":"raw"}"#), &headers)).id(), "raw");
    assert_eq!(decode(with(message(body), &BINARY)).id(), "1", "a CloudEvent's own comes first");
    for absent in [r#"{"id":"","type":"T","data":1}"#, r#"{"id":null}"#, r#"{"id":[1]}"#, "[1]"] {
        assert_eq!(decode(with(message(absent), &headers)).id(), "nats", "{absent}");
    }

    let mut placed = message(bare);
    placed.origin.channel = Some("EDUPULSE".into());
    placed.origin.sequence = Some(42);
    let mut decoder = Decoder::default();
    assert_eq!(decoder.decode(placed.clone()).unwrap().id(), "EDUPULSE:42");
    assert_eq!(decoder.ids_made(), 0);

    let id = decoder.decode(message(bare)).unwrap().id().to_owned();
    assert_eq!(Uuid::parse_str(&id).unwrap().get_version_num(), 7);
    assert_eq!(decoder.ids_made(), 1);

    let strict = DecoderOptions { require_id: true, ..DecoderOptions::default() };
    assert_eq!(reason(strict.clone(), message(bare)), Reason::NoId);
    assert_eq!(Decoder::new(strict).decode(placed).unwrap().id(), "EDUPULSE:42");
}

#[test]
fn G2_the_source_is_the_first_that_applies() {
    let bare = r#"{"type":"T","data":1}"#;
    let sent = with(message(bare), &[("Pulsebus-Source", "/header")]);
    let body = r#"{"source":"/body","type":"T","data":1}"#;
    assert_eq!(decode(with(message(body), &[("pulsebus-source", "/header")])).source(), "/body");
    assert_eq!(decode(sent.clone()).source(), "/header");
    assert_eq!(decode(message(bare)).source(), "/");
    assert_eq!(decode(message(r#"{"source":5}"#)).source(), "5");
    let options =
        DecoderOptions { event_source: Some("/mine".into()), ..DecoderOptions::default() };
    let mut decoder = Decoder::new(options);
    assert_eq!(decoder.decode(message(bare)).unwrap().source(), "/mine");
    assert_eq!(decoder.decode(sent).unwrap().source(), "/header");
}

#[test]
fn G5_the_key_is_the_first_that_applies() {
    let options = DecoderOptions {
        key: ["/lesson_id", "header:tenant", "token:2"].map(|e| e.parse().unwrap()).into(),
        ..DecoderOptions::default()
    };
    let key = |message| Decoder::new(options.clone()).decode(message).unwrap().key().to_owned();
    let full = r#"{"id":"i","key":"k","subject":"s","type":"T","data":{"lesson_id":7}}"#;
    let some = r#"{"id":"i","subject":"s","type":"T","data":{"lesson_id":7}}"#;
    let none = r#"{"id":"i","subject":"s","type":"T","data":{"lesson_id":null}}"#;
    assert_eq!(key(message(full)), "k");
    assert_eq!(key(message(some)), "7", "pointers look into data()");
    assert_eq!(key(with(message(none), &[("Tenant", "t")])), "t");
    assert_eq!(key(from(message(none), "nats", "edu.lessons")), "lessons");
    assert_eq!(key(from(message(none), "nats", "edu")), "s");
    assert_eq!(decode(message(full.replace("subject", "other"))).key(), "k");
    assert_eq!(decode(message(r#"{"id":"i","type":"T","data":1}"#)).key(), "i");
    assert_eq!(key(message(r#"{"id":"i","lesson_id":8}"#)), "8", "raw: the body is the data");

    let structured = r#"{"specversion":"1.0","id":"i","source":"/s","type":"T","key":"k","partitionkey":5,"data":{"lesson_id":7}}"#;
    assert_eq!(key(message(structured)), "5");
    assert_eq!(key(message(structured.replace("partitionkey", "x"))), "k");
    assert_eq!(key(with(message(r#"{"key":"k","lesson_id":9}"#), &BINARY)), "k");
    for no_key in [r#"{}"#, "true", r#""""#, r#""\u0000""#, r#""\ud800""#] {
        let data = format!(r#"{{"key":{no_key},"lesson_id":9}}"#);
        assert_eq!(key(with(message(data), &BINARY)), "9", "{no_key}");
    }

    let zero = message(r#"{"id":"i","lesson_id":"a\u0000"}"#);
    assert_eq!(reason(options.clone(), zero), Reason::ControlCharacter { name: "key", code: 0 });
}

#[test]
fn the_type_of_raw_events_is_the_first_that_applies() {
    let options = DecoderOptions {
        type_from: ["/type", "token:1"].map(|e| e.parse().unwrap()).into(),
        ..DecoderOptions::default()
    };
    let mut decoder = Decoder::new(options);
    let mut kind = |message| decoder.decode(message).unwrap().kind().to_owned();
    let sent = from(message(r#"{"type":"Typed"}"#), "nats", "edu.lessons");
    assert_eq!(kind(sent.clone()), "Typed");
    assert_eq!(kind(from(message("1"), "nats", "edu.lessons")), "edu");
    assert_eq!(kind(with(sent.clone(), &[("pulsebus-type", "Forwarded")])), "Forwarded");
    // It says that the message is raw, whatever it looks like.
    assert_eq!(kind(with(message(r#"{"type":"T","data":1}"#), &[("pulsebus-type", "x")])), "x");
    assert_eq!(decode(sent).kind(), "edu.lessons");
    assert_eq!(decode(message("1")).kind(), "raw");
    let odd = from(message("1"), "amqp", "a\nb");
    let expected = Reason::ControlCharacter { name: "type", code: 10 };
    assert_eq!(reason(DecoderOptions::default(), odd), expected);
}

#[test]
fn times_are_read_where_they_are_meant() {
    let second = datetime!(2023-11-14 22:13:20 UTC);
    let native = |time: &str| decode(message(format!(r#"{{"type":"T","data":1,"time":{time}}}"#)));
    assert_eq!(native("1700000000000").time(), Some(second));
    assert_eq!(native("\"2023-11-14t23:13:20+01:00\"").time(), Some(second));
    assert_eq!(native("null").time(), None);
    assert_eq!(decode(message(r#"{"time":"2023-11-14T22:13:20Z"}"#)).time(), Some(second));
    for not_meant in [r#"{"time":"10:30"}"#, r#"{"time":1700000000000}"#, r#"{"time":{}}"#] {
        assert_eq!(decode(message(not_meant)).time(), None, "{not_meant}");
    }
}

#[test]
fn a_pinned_format_is_not_guessed() {
    let native = r#"{"type":"T","data":1}"#;
    let event = Decoder::new(pinned(Format::Raw)).decode(message(native)).unwrap();
    assert_eq!((event.format(), event.kind(), event.data()), (Format::Raw, "raw", native));
    let lone = message(r#"{"type":"Ping"}"#);
    let event = Decoder::new(pinned(Format::Native)).decode(lone).unwrap();
    assert_eq!((event.kind(), event.data()), ("Ping", "null"));
    let batch = with(message("[1]"), &[("content-type", "application/cloudevents-batch+json")]);
    assert!(Decoder::new(pinned(Format::Raw)).decode(batch).is_ok());

    for (format, body, part) in [
        (Format::CloudeventsStructured, native, "no `specversion`"),
        (Format::CloudeventsStructured, "1", "must be a JSON object"),
        (Format::CloudeventsBinary, native, "no `specversion`"),
        (Format::Native, r#"{"type":5,"data":1}"#, "must be a string, and is a number"),
        (Format::Native, r#"{"data":1}"#, "no `type`"),
        (Format::Native, "[]", "must be a JSON object"),
    ] {
        let text = reason(pinned(format), message(body)).to_string();
        assert!(text.contains(&format!("pinned to {format}")) && text.contains(part), "{text}");
    }
}

#[test]
fn attributes_that_are_no_columns() {
    let structured = r#"{"specversion":"1.0","id":"1","source":"/s","type":"T","data":{"a":1},
        "datacontenttype":"application/json","dataschema":"urn:x","tr\u0061ceparent":"00-1",
        "count":3,"flag":true,"none":null}"#;
    let event = decode(with(message(structured), &[("tracestate", "s"), ("x", "y")]));
    for (name, expected) in [
        ("datacontenttype", Some("application/json")),
        ("dataschema", Some("urn:x")),
        ("traceparent", Some("00-1")),
        ("tracestate", Some("s")),
        ("count", Some("3")),
        ("flag", Some("true")),
        ("none", None),
        ("data", None),
        ("x", None),
    ] {
        assert_eq!(event.attribute(name).as_deref(), expected, "{name}");
    }
    let headers = [("Content-Type", "text/json"), ("traceparent", "00-2")];
    let binary = decode(with(with(message("1"), &BINARY), &headers));
    assert_eq!(binary.attribute("datacontenttype").as_deref(), Some("text/json"));
    assert_eq!(binary.attribute("traceparent").as_deref(), Some("00-2"));
    let raw = decode(with(message("1"), &headers));
    assert_eq!(raw.attribute("datacontenttype").as_deref(), Some("text/json"));
    let native = decode(with(message(r#"{"type":"T","data":1,"x":2}"#), &headers));
    assert_eq!(native.attribute("datacontenttype"), None, "that of the envelope, not the data");
    assert_eq!(native.attribute("x"), None);
    assert_eq!(native.attribute("traceparent").as_deref(), Some("00-2"));
}

#[test]
fn typed_views_agree_with_the_columns() {
    #[derive(Debug, PartialEq, serde::Serialize, serde::Deserialize)]
    #[serde(tag = "type", content = "data")]
    enum Mine {
        Ping,
        Score(u32),
    }
    let event = decode(message(r#"{"type":"Ping","data":9,"data":5,"type":"Score"}"#));
    assert_eq!((event.kind(), event.data()), ("Score", "5"));
    assert_eq!(event.decode::<Mine>().unwrap(), Mine::Score(5));
    let ping = decode(crate::event::NewEvent::tagged(&Mine::Ping).unwrap().into_message());
    assert_eq!(ping.decode::<Mine>().unwrap(), Mine::Ping);
    let ping = Decoder::new(pinned(Format::Native)).decode(message(r#"{"type":"Ping"}"#)).unwrap();
    assert_eq!(ping.decode::<Mine>().unwrap(), Mine::Ping);
    assert!(decode(message(r#"{"type":"Pong","data":1}"#)).decode::<Mine>().is_err());
}

#[test]
fn typed_views_are_the_same_in_every_format() {
    let event = DomainEvent::LessonPublished {
        lesson_id: Uuid::from_u128(1),
        title: "Brüche".into(),
        author_id: Uuid::from_u128(2),
        published_at: UnixTimestamp(3),
    };
    let native = serde_json::to_value(&event).unwrap();
    let mut structured = native.clone();
    for (name, value) in [("specversion", "1.0"), ("id", "1"), ("source", "/s")] {
        structured[name] = value.into();
    }
    let binary = with(message(native["data"].to_string()), &BINARY[..3]);
    let binary = with(binary, &[("ce-type", "LessonPublished")]);
    let raw = from(message(native["data"].to_string()), "nats", "LessonPublished");
    for sent in [message(native.to_string()), message(structured.to_string()), binary, raw] {
        let format = decode(sent.clone()).format();
        assert_eq!(decode(sent).decode::<DomainEvent>().unwrap(), event, "{format}");
    }
}

#[test]
fn repeated_names_are_shared_and_bounded() {
    let mut decoder = Decoder::default();
    let mut kind = |name: &str| {
        let body = json!({"type": name, "data": 1}).to_string();
        decoder.decode(message(body)).unwrap().kind
    };
    assert!(Arc::ptr_eq(&kind("LessonPublished"), &kind("LessonPublished")));
    for n in 0..1000 {
        assert_eq!(&*kind(&format!("T{n}")), format!("T{n}"));
    }
    let long = "x".repeat(5000);
    assert!(!Arc::ptr_eq(&kind(&long), &kind(&long)));
    assert_eq!(decoder.names.0.len(), 64);
}

fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        ".{0,12}".prop_map(Value::from),
    ];
    leaf.prop_recursive(5, 40, 6, |inner| {
        let name = prop_oneof![
            "[a-z]{0,3}",
            Just("data".to_owned()),
            Just("type".to_owned()),
            Just("id".to_owned()),
            ".{0,4}"
        ];
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
            prop::collection::vec((name, inner), 0..6)
                .prop_map(|all| Value::Object(all.into_iter().collect())),
        ]
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    #[test]
    fn G9_any_json_survives_in_every_format(value in any_json(), pretty: bool) {
        let data = if pretty { serde_json::to_string_pretty(&value) } else { serde_json::to_string(&value) }.unwrap();
        let structured = format!("{{ \"specversion\":\"1.0\",\"data\" : {data} ,\"id\":\"1\",\"source\":\"/s\",\"type\":\"T\"}}");
        let native = format!("{{\"data\":{data}\t,\n\"type\":\"T\"}}");
        for (format, sent) in [
            (Format::CloudeventsStructured, message(structured)),
            (Format::CloudeventsBinary, with(message(data.clone()), &BINARY)),
            (Format::Native, message(native)),
            (Format::Raw, message(data.clone())),
        ] {
            let outcome = Decoder::new(pinned(format)).decode(sent.clone());
            let event = match outcome {
                Ok(event) => event,
                // The value's own `id`, `source` or `key` may make no attribute.
                Err(NotAnEvent { reason: Reason::ControlCharacter { .. }, .. })
                    if format == Format::Raw =>
                {
                    continue;
                }
                Err(refused) => return Err(TestCaseError::fail(refused.reason.to_string())),
            };
            prop_assert_eq!(event.format(), format);
            prop_assert_eq!(event.data(), &data);
            prop_assert_eq!(event.data_as::<Value>().unwrap(), serde_json::from_str::<Value>(&data).unwrap());
            invariants(&event);
            if format != Format::Raw {
                prop_assert_eq!(decode(sent.clone()).format(), format, "recognised");
            }
            prop_assert_eq!(event.into_message(), sent);
        }
    }

    #[test]
    fn G1_any_bytes_are_an_event_or_not_and_never_a_panic(
        body in prop_oneof![
            prop::collection::vec(any::<u8>(), 0..64),
            ".{0,64}".prop_map(String::into_bytes),
            "[{}\\[\\]\",:\\\\a-e0-9 ]{0,48}".prop_map(String::into_bytes),
        ],
        headers in prop::collection::vec(("(ce-|cloudEvents:|)(id|type|source|specversion|time|subject|.{0,4})", ".{0,12}"), 0..6),
        format in prop::sample::select(vec![None, Some(Format::Raw), Some(Format::Native), Some(Format::CloudeventsBinary), Some(Format::CloudeventsStructured)]),
    ) {
        let mut sent = message(body);
        for (name, value) in headers {
            sent.headers.push(name, value);
        }
        let options = DecoderOptions { format, ..DecoderOptions::default() };
        match Decoder::new(options).decode(sent.clone()) {
            Ok(event) => {
                invariants(&event);
                prop_assert_eq!(event.into_message(), sent);
            }
            Err(refused) => {
                let kept = Quarantined::from(refused);
                prop_assert_eq!(kept.message, sent);
                prop_assert!(!kept.reason.contains(|c: char| c.is_control()), "{:?}", kept.reason);
            }
        }
    }

    #[test]
    fn G1_events_with_bytes_changed_are_events_or_not(at in 0..80_usize, byte: u8, cut in 0..90_usize) {
        let mut body = br#"{"specversion":"1.0","id":"1","source":"/s","type":"T","key":"k","data":{"a":1}}"#.to_vec();
        if let Some(place) = body.get_mut(at) {
            *place = byte;
        }
        body.truncate(cut);
        if let Ok(event) = Decoder::default().decode(message(body)) {
            invariants(&event);
        }
    }
}
