use serde_json::{Value, json};

use super::*;
use crate::event::{Decoder, Headers, Message, Origin};

fn event(transport: &str, headers: &[(&str, &str)], body: &str) -> Event {
    let mut all = Headers::new();
    for (name, value) in headers {
        all.push(*name, *value);
    }
    let origin = Origin { transport: transport.into(), subject: "s".into(), ..Origin::default() };
    let body = Bytes::from(body.to_owned());
    Decoder::default().decode(Message { body, headers: all, origin }).unwrap()
}

fn value(encoded: &Encoded) -> Value {
    serde_json::from_slice(&encoded.body).unwrap()
}

#[test]
fn what_is_in_the_format_stays_byte_for_byte() {
    let structured =
        r#" {"specversion" : "1.0","id":"1","source":"/s","type":"T","data" : 1e400} "#;
    let kept = event("nats", &[], structured).encode(Format::CloudeventsStructured).unwrap();
    assert_eq!(kept.body, structured.as_bytes());
    assert_eq!(kept.content_type, "application/cloudevents+json");
    let native = r#" {"type":"T", "id" : 1, "source":"/s", "data":1} "#;
    let kept = event("nats", &[], native).encode(Format::Native).unwrap();
    assert_eq!((&*kept.body, &*kept.content_type), (native.as_bytes(), "application/json"));
}

#[test]
fn a_native_event_becomes_a_cloudevent_with_all_it_has() {
    let body = r#"{"type":"T","id":7,"source":"/s","subject":"a","key":"k","time":1000,
        "tenant":"t","deep":{},"Upper":1,"flag":true,"data":{"n": 1.0}}"#;
    let native = event("nats", &[("traceparent", "00-1")], body);
    let found = value(&native.encode(Format::CloudeventsStructured).unwrap());
    assert_eq!(
        found,
        json!({
            "specversion": "1.0", "id": "7", "source": "/s", "type": "T", "subject": "a",
            "time": "1970-01-01T00:00:01Z", "datacontenttype": "application/json",
            "partitionkey": "k", "tenant": "t", "flag": true, "traceparent": "00-1",
            "data": {"n": 1.0},
        })
    );
    let binary = native.encode(Format::CloudeventsBinary).unwrap();
    // The data as they were written.
    assert_eq!(binary.body, br#"{"n": 1.0}"#.as_slice());
    let attributes: Vec<_> = binary.attributes.iter().map(|(n, v)| (&**n, &**v)).collect();
    assert_eq!(
        attributes,
        [
            ("specversion", "1.0"),
            ("id", "7"),
            ("source", "/s"),
            ("type", "T"),
            ("subject", "a"),
            ("time", "1970-01-01T00:00:01Z"),
            ("partitionkey", "k"),
            ("tenant", "t"),
            ("flag", "true"),
            ("traceparent", "00-1"),
        ]
    );
}

#[test]
fn a_native_event_without_an_id_gets_members_for_it() {
    let body = r#"{"type":"T","id":null,"more":[1],"data":2}"#;
    let native = event("nats", &[("Nats-Msg-Id", "m"), ("pulsebus-source", "/x")], body);
    let found = value(&native.encode(Format::Native).unwrap());
    assert_eq!(found, json!({"type": "T", "id": "m", "source": "/x", "more": [1], "data": 2}));
}

#[test]
fn a_raw_event_is_all_data() {
    let raw = event("nats", &[("Nats-Msg-Id", "m"), ("content-type", "text/plain")], "[1, 2]");
    let found = value(&raw.encode(Format::CloudeventsStructured).unwrap());
    // Its body is JSON, whatever its content type says.
    assert_eq!(
        found,
        json!({"specversion": "1.0", "id": "m", "source": "/", "type": "s",
            "datacontenttype": "application/json", "data": [1, 2]})
    );
    let found = value(&raw.encode(Format::Native).unwrap());
    assert_eq!(found, json!({"type": "s", "id": "m", "source": "/", "data": [1, 2]}));
    assert_eq!(raw.encode(Format::Raw), Err(EncodeError::Raw));
}

#[test]
fn data_that_are_no_json_are_bytes_in_binary_mode() {
    let with = |rest: &str| {
        let body = format!(r#"{{"specversion":"1.0","id":"1","source":"/s","type":"T",{rest}}}"#);
        event("nats", &[], &body)
    };
    let text = with(r#""datacontenttype":"text/xml","data":"<a>\u00e9</a>""#);
    let binary = text.encode(Format::CloudeventsBinary).unwrap();
    assert_eq!((&*binary.body, &*binary.content_type), ("<a>é</a>".as_bytes(), "text/xml"));
    let bytes = with(r#""datacontenttype":"image/png","data_base64":"/wA=""#);
    let binary = bytes.encode(Format::CloudeventsBinary).unwrap();
    assert_eq!((&*binary.body, &*binary.content_type), ([0xff, 0].as_slice(), "image/png"));
    assert!(matches!(bytes.encode(Format::Native), Err(EncodeError::Binary { .. })));
    let broken = with(r#""data_base64":"?""#);
    assert!(matches!(broken.encode(Format::CloudeventsBinary), Err(EncodeError::Base64 { .. })));
}

#[test]
fn a_binary_event_keeps_its_extensions() {
    let headers = [
        ("ce-specversion", "1.0"),
        ("ce-id", "a%20b"),
        ("ce-source", "/s"),
        ("ce-type", "T"),
        ("ce-time", "2024-01-02T03:04:05.123456789+02:00"),
        ("ce-Tenant", "%C3%A9"),
        ("ce-dataschema", "https://x/y"),
        ("content-type", "application/problem+json"),
    ];
    let found =
        value(&event("http", &headers, "{}").encode(Format::CloudeventsStructured).unwrap());
    assert_eq!(
        found,
        json!({
            "specversion": "1.0", "id": "a b", "source": "/s", "type": "T",
            "time": "2024-01-02T03:04:05.123456789+02:00",
            "datacontenttype": "application/problem+json", "dataschema": "https://x/y",
            "tenant": "é", "data": {},
        })
    );
}
