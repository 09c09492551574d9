//! Event out: the same event in another of the formats.
//!
//! Whatever the format, id, source, type and data are the event's own, so that a reader of the
//! result finds the same identity, and a copy that comes back is known as one.
//!
//! | what the event has besides | structured | binary | native |
//! |---|---|---|---|
//! | `subject`, `time`, `dataschema` | member | header | member |
//! | its key, where it is neither subject nor id | `partitionkey` | `ce-partitionkey` | `key` |
//! | extension attributes | members | headers | members |
//! | `traceparent`, `tracestate` headers | members too | `ce-…` headers too | stay headers |
//! | members of a native event that it does not define | members, where their name and value fit an attribute | headers, likewise | members |
//! | the content type of the data | `datacontenttype` | content type | |
//!
//! An event that is in the format already stays as it is, byte for byte; a native one that does
//! not say its id or source gets members for them.

use std::borrow::Cow;

use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use bytes::Bytes;
use time::format_description::well_known::Rfc3339;

use super::{
    Event, Format, binary,
    scan::{self, Scalar},
};

/// An event in one of the formats.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Encoded {
    /// The payload.
    pub body: Bytes,
    /// Its media type.
    pub content_type: Cow<'static, str>,
    /// The attributes that travel as headers, in binary mode: names without a prefix, values as
    /// they are, not percent-encoded.
    pub attributes: Vec<(String, String)>,
}

/// Why an event has no form in a format.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EncodeError {
    /// Data that is not JSON, where the format has a place for JSON only.
    #[error(
        "event {id} has data_base64, which the native format has no place for; forward it as \
         cloudevents-structured, or verbatim"
    )]
    Binary {
        /// The event's id.
        id: String,
    },
    /// Base64 that is none.
    #[error("data_base64 of event {id} is no base64")]
    Base64 {
        /// The event's id.
        id: String,
    },
    /// Raw has no place for what an event is.
    #[error("no event can be made raw: id, source and type would be lost")]
    Raw,
}

const JSON: &str = "application/json";
const STRUCTURED: &str = "application/cloudevents+json";

/// The event in this format.
pub(super) fn encode(event: &Event, format: Format) -> Result<Encoded, EncodeError> {
    match format {
        Format::CloudeventsStructured => Ok(structured(event)),
        Format::CloudeventsBinary => binary_mode(event),
        Format::Native => native(event),
        Format::Raw => Err(EncodeError::Raw),
    }
}

fn structured(event: &Event) -> Encoded {
    let content_type = Cow::Borrowed(STRUCTURED);
    if event.format() == Format::CloudeventsStructured {
        return Encoded { body: event.body().clone(), content_type, attributes: Vec::new() };
    }
    let context = Context::of(event);
    let mut object = Object::new(event.data().len() + 256);
    object.text("specversion", "1.0");
    object.text("id", event.id());
    object.text("source", event.source());
    object.text("type", event.kind());
    object.maybe("subject", event.subject());
    object.maybe("time", context.time.as_deref());
    object.text("datacontenttype", &context.content_type);
    object.maybe("dataschema", context.schema.as_deref());
    object.maybe("partitionkey", context.key);
    for (name, value) in &context.extensions {
        object.raw(name, value.json());
    }
    object.raw("data", event.data());
    Encoded { body: object.finish(), content_type, attributes: Vec::new() }
}

fn binary_mode(event: &Event) -> Result<Encoded, EncodeError> {
    let context = Context::of(event);
    let mut attributes = Vec::with_capacity(8);
    let mut push = |name: &str, value: &str| attributes.push((name.to_owned(), value.to_owned()));
    push("specversion", "1.0");
    push("id", event.id());
    push("source", event.source());
    push("type", event.kind());
    for (name, value) in [
        ("subject", event.subject()),
        ("time", context.time.as_deref()),
        ("dataschema", context.schema.as_deref()),
        ("partitionkey", context.key),
    ] {
        if let Some(value) = value {
            push(name, value);
        }
    }
    for (name, value) in &context.extensions {
        push(name, &value.text());
    }
    let mut content_type = context.content_type;
    let body = match event.format() {
        Format::CloudeventsStructured => {
            // JSON format, section 3.1: what is not JSON is in a string, or in base64.
            let declared = member_text(event, "datacontenttype").filter(|t| !is_json(t));
            let base64 = scan::member(event.body_str(), "data_base64").map(Scalar::of);
            match (base64, declared, Scalar::of(event.data())) {
                (Some(Scalar::Text(text)), declared, Scalar::Null) => {
                    content_type = declared.unwrap_or_else(|| "application/octet-stream".into());
                    let bytes = BASE64.decode(text.as_bytes());
                    bytes.map_err(|_| EncodeError::Base64 { id: event.id().to_owned() })?.into()
                }
                (_, Some(declared), Scalar::Text(text)) => {
                    content_type = declared;
                    Bytes::from(text.into_owned())
                }
                _ => part(event, event.data()),
            }
        }
        _ => part(event, event.data()),
    };
    Ok(Encoded { body, content_type: content_type.into(), attributes })
}

fn native(event: &Event) -> Result<Encoded, EncodeError> {
    let (content_type, attributes) = (Cow::Borrowed(JSON), Vec::new());
    let json = event.body_str();
    let says = |name, value: &str| {
        scan::member(json, name).and_then(|raw| Scalar::of(raw).into_text()).as_deref()
            == Some(value)
    };
    let own = event.format() == Format::Native;
    if own && says("id", event.id()) && says("source", event.source()) {
        return Ok(Encoded { body: event.body().clone(), content_type, attributes });
    }
    let structured = event.format() == Format::CloudeventsStructured;
    if structured
        && event.data() == "null"
        && scan::member(json, "data_base64").is_some_and(|raw| raw != "null")
    {
        return Err(EncodeError::Binary { id: event.id().to_owned() });
    }
    let context = Context::of(event);
    let mut object = Object::new(event.data().len() + 256);
    object.text("type", event.kind());
    object.text("id", event.id());
    object.text("source", event.source());
    object.maybe("subject", event.subject());
    object.maybe("time", context.time.as_deref());
    object.maybe("dataschema", context.schema.as_deref());
    let key = scan::member(json, "key").filter(|_| own);
    match (key, context.key) {
        (Some(key), _) => object.raw("key", key),
        (None, key) => object.maybe("key", key),
    }
    if own {
        for (name, value) in scan::all_members(json) {
            if !NATIVE.contains(&&*name) {
                object.raw(&name, value);
            }
        }
    } else {
        for (name, value) in &context.extensions {
            // What is a header of every message anyway is not put into the body as well.
            if !NATIVE.contains(&&**name) && !TRACE.contains(&&**name) {
                object.raw(name, value.json());
            }
        }
    }
    object.raw("data", event.data());
    Ok(Encoded { body: object.finish(), content_type, attributes })
}

/// Members that the native format defines.
const NATIVE: [&str; 7] = ["type", "id", "source", "subject", "time", "key", "data"];

/// Attributes that CloudEvents defines, and what takes their place.
const CLOUDEVENTS: [&str; 11] = [
    "specversion",
    "id",
    "source",
    "type",
    "subject",
    "time",
    "datacontenttype",
    "dataschema",
    "partitionkey",
    "data",
    "data_base64",
];

const TRACE: [&str; 2] = ["traceparent", "tracestate"];

/// What an event has besides id, source, type, subject and data.
struct Context<'a> {
    time: Option<Cow<'a, str>>,
    content_type: String,
    schema: Option<String>,
    /// Its key, where a reader would not find it otherwise.
    key: Option<&'a str>,
    extensions: Vec<(String, Value)>,
}

/// The value of an extension attribute: JSON of a string, a number or a boolean.
struct Value(String);

impl Value {
    fn of_text(text: &str) -> Self {
        Self(quoted(text))
    }

    fn json(&self) -> &str {
        &self.0
    }

    fn text(&self) -> Cow<'_, str> {
        Scalar::of(&self.0).into_text().unwrap_or(Cow::Borrowed(&self.0))
    }
}

impl<'a> Context<'a> {
    fn of(event: &'a Event) -> Self {
        let json = event.body_str();
        let mut extensions: Vec<(String, Value)> = Vec::new();
        match event.format() {
            Format::CloudeventsStructured | Format::Native => {
                let known: &[&str] =
                    if event.format() == Format::Native { &NATIVE } else { &CLOUDEVENTS };
                for (name, value) in scan::all_members(json) {
                    let fits = !known.contains(&&*name) && !CLOUDEVENTS.contains(&&*name);
                    if fits && is_attribute_name(&name) && is_attribute_value(value) {
                        extensions.push((name.into_owned(), Value(value.to_owned())));
                    }
                }
            }
            Format::CloudeventsBinary => {
                for (name, text) in binary::attributes(event) {
                    let name = name.to_ascii_lowercase();
                    if !CLOUDEVENTS.contains(&&*name) && is_attribute_name(&name) {
                        extensions.push((name, Value::of_text(&text)));
                    }
                }
            }
            Format::Raw => {}
        }
        for name in TRACE {
            if let Some(text) = event.headers().get_str(name)
                && !extensions.iter().any(|(known, _)| known == name)
            {
                extensions.push((name.to_owned(), Value::of_text(text)));
            }
        }
        // Of a repeated member the last counts.
        let mut at = 0;
        while at < extensions.len() {
            let (_, behind) = extensions.split_at(at + 1);
            if behind.iter().any(|(name, _)| *name == extensions[at].0) {
                extensions.remove(at);
            } else {
                at += 1;
            }
        }
        let declared = event.attribute("datacontenttype").filter(|text| is_json(text));
        let time = match event.format() {
            Format::CloudeventsStructured | Format::CloudeventsBinary => {
                event.attribute("time").filter(|text| super::rfc3339::parse(text).is_some())
            }
            Format::Native | Format::Raw => None,
        };
        // A time beyond the years of RFC 3339 cannot be said.
        let time = time.or_else(|| event.time()?.format(&Rfc3339).ok());
        let default = event.subject().unwrap_or(event.id());
        Self {
            time: time.map(Cow::Owned),
            content_type: declared.unwrap_or_else(|| JSON.to_owned()),
            schema: event.attribute("dataschema").filter(|text| !text.is_empty()),
            key: Some(event.key()).filter(|key| *key != default),
            extensions,
        }
    }
}

fn member_text(event: &Event, name: &str) -> Option<String> {
    scan::member(event.body_str(), name)
        .and_then(|raw| Scalar::of(raw).into_text())
        .map(Cow::into_owned)
}

/// `application/json`, `application/problem+json`, `text/json; charset=utf-8` …
fn is_json(content_type: &str) -> bool {
    let media_type = content_type.split(';').next().unwrap_or_default().trim();
    let Some((_, subtype)) = media_type.split_once('/') else { return false };
    let subtype = subtype.to_ascii_lowercase();
    (subtype == "json" || subtype.ends_with("+json"))
        && !content_type.bytes().any(|byte| byte.is_ascii_control())
}

/// CloudEvents 1.0, "Naming conventions": small letters and digits. Longer names than the 20
/// characters that it recommends are as good.
fn is_attribute_name(name: &str) -> bool {
    !name.is_empty() && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit())
}

/// "Type system": a string without control characters, a 32-bit integer or a boolean.
fn is_attribute_value(json: &str) -> bool {
    match Scalar::of(json) {
        Scalar::Text(text) => !text.is_empty() && !text.chars().any(char::is_control),
        Scalar::Number(number) => number.parse::<i32>().is_ok(),
        Scalar::Bool(_) => true,
        Scalar::Null | Scalar::Nested | Scalar::NotUnicode => false,
    }
}

/// A piece of the event's body, without copying it.
fn part(event: &Event, text: &str) -> Bytes {
    let body = event.body();
    let (start, length) = (text.as_ptr() as usize, text.len());
    let begin = body.as_ptr() as usize;
    if start >= begin && start + length <= begin + body.len() {
        body.slice(start - begin..start - begin + length)
    } else {
        // `null`, where there are no data.
        Bytes::copy_from_slice(text.as_bytes())
    }
}

/// A JSON object, being written.
struct Object(String);

impl Object {
    fn new(size: usize) -> Self {
        let mut text = String::with_capacity(size);
        text.push('{');
        Self(text)
    }

    fn raw(&mut self, name: &str, value: &str) {
        if self.0.len() > 1 {
            self.0.push(',');
        }
        self.0.push_str(&quoted(name));
        self.0.push(':');
        self.0.push_str(value);
    }

    fn text(&mut self, name: &str, value: &str) {
        self.raw(name, &quoted(value));
    }

    fn maybe(&mut self, name: &str, value: Option<&str>) {
        if let Some(value) = value {
            self.text(name, value);
        }
    }

    fn finish(mut self) -> Bytes {
        self.0.push('}');
        self.0.into()
    }
}

fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

#[cfg(test)]
mod tests;
