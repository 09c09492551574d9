//! Message in, event out, or the reason why not.
//!
//! # Which format
//! A message with a `pulsebus-type` header is *raw*: `forward` says so of events that were. For
//! others the first that applies, unless [`DecoderOptions::format`] pins one:
//! 1. *cloudevents-structured*: content type `application/cloudevents+json` (with or without
//!    parameters), or a JSON object with a `specversion` member; where a header says
//!    `specversion` as well, only one with all of `id`, `source` and `type` and no content type.
//! 2. *cloudevents-binary*: a header for at least one of the attributes `specversion`, `id`,
//!    `source`, `type`, with the prefix `ce-`, `cloudEvents:` or `cloudEvents_`. The other
//!    extensions (`ce-traceparent` alone) make no CloudEvent.
//! 3. *native*: a JSON object with a string `type` and a `data` member. An object with a `type`
//!    and no `data` is raw: too much JSON has a `type`. A source whose format is pinned to
//!    native takes it, with `null` for data; so serde writes a variant without fields.
//! 4. *raw*: any other JSON value.
//!
//! # Where the attributes come from
//! | | structured | binary | native | raw |
//! |---|---|---|---|---|
//! | `id`, `source` | member, required, string | header, required | member: string or number | member: string or number |
//! | `type` | member, required, string | header, required | member, required, string | `pulsebus-type` header, `type_from`, the subject or routing key, `raw` |
//! | `subject` | member | header | member | none |
//! | `time` | member: RFC 3339 | header: RFC 3339 | member: RFC 3339 or milliseconds | member, where it is RFC 3339 |
//! | key | `partitionkey`, `key` | `partitionkey` header, body member `key` | member `key` | member `key` |
//!
//! * Control characters (U+0000 to U+001F, U+007F) in `id`, `source`, `type`, `subject` or the key
//!   are an error in every format: databases and broker headers refuse them.
//! * A number has the text it was written with: `"id": 1.0` and `"id": 1` differ. `null` and
//!   the empty string count as absent where the attribute is not required.
//! * A member of the wrong type (an `id` that is an object) is an error in CloudEvents and
//!   native events; raw events never promised anything, and there it counts as absent.
//!   So does a body member `key` of a binary event that could be no key: it is data there.
//! * Where no `id` is found so far: the `pulsebus-id` header (which `forward` sets where no other
//!   can hold the id), the `Nats-Msg-Id` header, the AMQP property `message_id`,
//!   the `webhook-id` header (which `forward` sets, and which is the same over a webhook's
//!   retries), [`Origin::stable_id`](super::Origin::stable_id), a fresh UUIDv7.
//! * Where no `source` is found so far: the `pulsebus-source` header,
//!   [`DecoderOptions::event_source`], `/`.
//! * Where no key is found so far: [`DecoderOptions::key`], `subject`, the id.
//! * The `pulsebus-…` headers are percent-encoded as CloudEvents attributes are: not in AMQP.
//! * Of a repeated member the last counts, of a repeated header the first.

use std::{borrow::Cow, hash::Hasher as _, sync::Arc};

use rustc_hash::FxHasher;
use time::OffsetDateTime;
use uuid::Uuid;

use super::{
    Event, Expr, Format, Message, NotAnEvent, Reason,
    binary::{self, Attribute, Attributes, MessageRef},
    reason::excerpt,
    rfc3339,
    scan::{self, Fault, Members, Scalar},
};

/// How a source's messages are read. The defaults suit any JSON.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DecoderOptions {
    /// Pins one format; `None` (default) recognises it.
    pub format: Option<Format>,
    /// The CloudEvents `source` of events that do not say theirs; `None` (default): `/`.
    pub event_source: Option<Arc<str>>,
    /// Where the key is, first that resolves. Default empty.
    pub key: Vec<Expr>,
    /// Where the type of raw events is, first that resolves; empty (default): the subject.
    pub type_from: Vec<Expr>,
    /// Quarantine what has no id, in place of giving it a random one. Default false.
    pub require_id: bool,
    /// Largest body, in bytes. Default 1 MiB.
    pub max_event_bytes: usize,
}

impl Default for DecoderOptions {
    fn default() -> Self {
        Self {
            format: None,
            event_source: None,
            key: Vec::new(),
            type_from: Vec::new(),
            require_id: false,
            max_event_bytes: 1024 * 1024,
        }
    }
}

/// Turns the messages of one source into events.
#[derive(Debug, Clone)]
pub struct Decoder {
    options: DecoderOptions,
    default_source: Arc<str>,
    names: Names,
    ids_made: u64,
    /// The quarantine entry that is being decoded again.
    held_as: Option<u64>,
}

impl Default for Decoder {
    fn default() -> Self {
        Self::new(DecoderOptions::default())
    }
}

impl Decoder {
    /// A decoder with these options.
    #[must_use]
    pub fn new(options: DecoderOptions) -> Self {
        let default_source = options.event_source.clone().unwrap_or_else(|| "/".into());
        Self { options, default_source, names: Names::default(), ids_made: 0, held_as: None }
    }

    /// Decodes a message. The body is neither copied nor changed.
    ///
    /// # Errors
    /// Where it is no event: the message itself, with the reason.
    pub fn decode(&mut self, message: Message) -> Result<Event, NotAnEvent> {
        match self.read(&message) {
            Ok(read) => Ok(Event {
                id: read.id,
                source: read.source,
                kind: read.kind,
                subject: read.subject,
                time: read.time,
                key: read.key,
                format: read.format,
                headers: message.headers,
                origin: message.origin,
                body: message.body,
            }),
            Err(reason) => Err(NotAnEvent { message: Box::new(message), reason }),
        }
    }

    /// Decodes a message again that is in quarantine under this number. One that says no id of
    /// any kind gets one of that number, so that trying it twice does not make two events.
    ///
    /// # Errors
    /// What is wrong with it, with the message.
    pub fn decode_again(&mut self, message: Message, number: u64) -> Result<Event, NotAnEvent> {
        self.held_as = Some(number);
        let decoded = self.decode(message);
        self.held_as = None;
        decoded
    }

    /// How many events so far had no id of any kind and were given a random one. Copies of
    /// those cannot be recognised: worth a warning, once.
    #[must_use]
    pub const fn ids_made(&self) -> u64 {
        self.ids_made
    }

    fn read(&mut self, message: &Message) -> Result<Read, Reason> {
        let found = find(&self.options, message)?;
        let Message { headers, origin, .. } = message;
        let resolve = |list: &[Expr]| {
            list.iter().find_map(|expr| {
                expr.resolve(found.data, headers, &origin.subject).map(Cow::into_owned)
            })
        };

        let kind = match found.kind {
            Some(kind) => self.names.get(checked("type", &kind)?),
            None => match ours(message, "pulsebus-type")? {
                Some(kind) => self.names.get(checked("type", &kind)?),
                None => match resolve(&self.options.type_from) {
                    Some(kind) => self.names.get(checked("type", &kind)?),
                    None if origin.subject.is_empty() => self.names.get("raw"),
                    None => {
                        checked("type", &origin.subject)?;
                        Arc::clone(&origin.subject)
                    }
                },
            },
        };
        let source = match &found.source {
            Some(source) => self.names.get(checked("source", source)?),
            None => match ours(message, "pulsebus-source")? {
                Some(source) => self.names.get(checked("source", &source)?),
                None => Arc::clone(&self.default_source),
            },
        };
        let subject = found.subject.map(|s| boxed("subject", s)).transpose()?;
        let key = match found.key {
            Some(key) => Some(boxed("key", key)?),
            None => match resolve(&self.options.key) {
                Some(key) => Some(boxed("key", key.into())?),
                None => subject.clone(),
            },
        };
        // The id comes last: one is made only for what is an event in every other respect.
        let id = match found.id {
            Some(id) => boxed("id", id)?,
            None => match message_id(message)? {
                Some(id) => boxed("id", id)?,
                None => match origin.stable_id() {
                    Some(id) => boxed("id", id.into())?,
                    None if self.options.require_id => return Err(Reason::NoId),
                    None if let Some(number) = self.held_as => {
                        format!("quarantine:{number}").into()
                    }
                    None => {
                        self.ids_made += 1;
                        Uuid::now_v7().to_string().into()
                    }
                },
            },
        };
        let key = key.unwrap_or_else(|| id.clone());
        Ok(Read { format: found.format, id, source, kind, subject, time: found.time, key })
    }
}

/// A header that `forward` sets; where its values are percent-encoded, decoded.
fn ours<'a>(message: &'a Message, name: &'static str) -> Result<Option<Cow<'a, str>>, Reason> {
    let Some(text) = message.headers.get_str(name).filter(|text| !text.is_empty()) else {
        return Ok(None);
    };
    if &*message.origin.transport == "amqp" {
        return Ok(Some(Cow::Borrowed(text)));
    }
    let decoded = binary::decode(text);
    decoded.map(Some).ok_or_else(|| Reason::PercentEncoding { name, found: excerpt(text) })
}

/// The id that the message has, rather than the event in it.
fn message_id(message: &Message) -> Result<Option<Cow<'_, str>>, Reason> {
    if let Some(id) = ours(message, "pulsebus-id")? {
        return Ok(Some(id));
    }
    let text = |name| message.headers.get_str(name).filter(|id| !id.is_empty());
    Ok(["nats-msg-id", ":message_id", "webhook-id"].into_iter().find_map(text).map(Cow::Borrowed))
}

/// The attributes, owned.
struct Read {
    format: Format,
    id: Box<str>,
    source: Arc<str>,
    kind: Arc<str>,
    subject: Option<Box<str>>,
    time: Option<OffsetDateTime>,
    key: Box<str>,
}

/// What body and headers say in their format; never an empty text.
struct Found<'a> {
    format: Format,
    id: Option<Cow<'a, str>>,
    source: Option<Cow<'a, str>>,
    kind: Option<Cow<'a, str>>,
    subject: Option<Cow<'a, str>>,
    time: Option<OffsetDateTime>,
    key: Option<Cow<'a, str>>,
    data: &'a str,
}

/// Checks the body, settles the format and reads it.
fn find<'a>(options: &DecoderOptions, message: &'a Message) -> Result<Found<'a>, Reason> {
    let body = &message.body;
    if body.is_empty() {
        return Err(Reason::Empty);
    }
    if body.len() > options.max_event_bytes {
        return Err(Reason::TooLarge { size: body.len(), limit: options.max_event_bytes });
    }
    let declared = match options.format {
        None | Some(Format::CloudeventsStructured) => declared_structured(message)?,
        Some(_) => false,
    };
    let (json, members) = parse(body)?;
    if let Some(format) = options.format {
        return match format {
            Format::CloudeventsStructured => structured(&members),
            Format::CloudeventsBinary => binary(json, &members, Attributes::of(message)),
            Format::Native => native(&members),
            Format::Raw => Ok(raw(json, &members)?),
        }
        .map_err(|why| Reason::Pinned { format, why: Box::new(why) });
    }
    if message.headers.get_str("pulsebus-type").is_some_and(|kind| !kind.is_empty()) {
        return raw(json, &members);
    }
    if declared {
        return structured(&members);
    }
    let attributes = Attributes::of(message);
    if members.specversion.is_some() {
        // Data in binary mode may have a `specversion` of their own.
        let complete = members.id.is_some() && members.source.is_some() && members.kind.is_some();
        let typed = message.headers.content_type().is_some();
        if attributes.specversion.is_none() || (complete && !typed) {
            return structured(&members);
        }
    }
    if attributes.is_event() {
        return binary(json, &members, attributes);
    }
    let typed = members.kind.is_some_and(|kind| kind.starts_with('"'));
    if typed && members.data.is_some() { native(&members) } else { raw(json, &members) }
}

/// Whether the content type says that this is a structured CloudEvent.
fn declared_structured(message: &Message) -> Result<bool, Reason> {
    const FAMILY: &str = "application/cloudevents";
    let Some(content_type) = message.headers.content_type() else { return Ok(false) };
    let media_type = content_type.split(';').next().unwrap_or_default().trim();
    let Some(family) = media_type.get(..FAMILY.len()) else { return Ok(false) };
    if !family.eq_ignore_ascii_case(FAMILY) {
        return Ok(false);
    }
    match media_type[FAMILY.len()..].to_ascii_lowercase().as_str() {
        "+json" => Ok(true),
        "-batch+json" => Err(Reason::Batch),
        // Without a suffix it names no event format; the body shows what it is.
        "" => Ok(false),
        _ => Err(Reason::EventFormat { content_type: excerpt(media_type) }),
    }
}

/// The body as text and its top-level members.
fn parse(body: &[u8]) -> Result<(&str, Members<'_>), Reason> {
    let json = match std::str::from_utf8(body) {
        Ok(json) => json,
        Err(error) => {
            return Err(match body {
                [0x1f, 0x8b, ..] => Reason::Compressed { how: "gzip" },
                [0x28, 0xb5, 0x2f, 0xfd, ..] => Reason::Compressed { how: "zstd" },
                [0xff, 0xfe, ..] | [0xfe, 0xff, ..] => Reason::Utf16,
                _ => Reason::NotUtf8 { at: error.valid_up_to() },
            });
        }
    };
    match scan::members(json) {
        Ok(members) => Ok((json, members)),
        Err(Fault::Depth) => Err(Reason::TooDeep),
        Err(Fault::Syntax { what, at }) => Err(match body {
            [0xef, 0xbb, 0xbf, ..] => Reason::ByteOrderMark,
            // ASCII characters in UTF-16 without a byte order mark: every other byte is zero.
            [0, 1..=127, 0, 1..=127, ..] | [1..=127, 0, 1..=127, 0, ..] => Reason::Utf16,
            _ => {
                let before = json.get(..at).unwrap_or(json);
                let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
                Reason::NotJson {
                    what,
                    line: before.bytes().filter(|b| *b == b'\n').count() + 1,
                    column: before[line_start..].chars().count() + 1,
                }
            }
        }),
    }
}

fn structured<'a>(members: &Members<'a>) -> Result<Found<'a>, Reason> {
    let format = Format::CloudeventsStructured;
    let member = |name, raw| Member { format, name, raw };
    if !members.object {
        return Err(Reason::NotAnObject { format });
    }
    let version = member("specversion", members.specversion);
    match version.required()? {
        v if v == "1.0" => {}
        v => return Err(Reason::SpecVersion { found: format!("\"{}\"", excerpt(&v)) }),
    }
    let key = match member("partitionkey", members.partitionkey).scalar()? {
        Some(key) => Some(key),
        None => member("key", members.key).scalar()?,
    };
    Ok(Found {
        format,
        id: Some(member("id", members.id).required()?),
        source: Some(member("source", members.source).required()?),
        kind: Some(member("type", members.kind).required()?),
        subject: member("subject", members.subject).string()?,
        time: member("time", members.time).string()?.map(|time| timestamp(&time)).transpose()?,
        key,
        data: members.data.unwrap_or("null"),
    })
}

fn binary<'a>(
    json: &'a str,
    members: &Members<'a>,
    attributes: Attributes<'a>,
) -> Result<Found<'a>, Reason> {
    let format = Format::CloudeventsBinary;
    let optional = |name, attribute: Option<Attribute<'a>>| {
        let text = attribute.map(|attribute| attribute.text(name)).transpose()?;
        Ok(text.filter(|text| !text.is_empty()))
    };
    let required = |name, attribute: Option<Attribute<'a>>| match attribute {
        None => Err(Reason::Missing { format, name }),
        Some(_) => optional(name, attribute)?.ok_or(Reason::Blank { format, name }),
    };
    match required("specversion", attributes.specversion)? {
        v if v == "1.0" => {}
        v => return Err(Reason::SpecVersion { found: format!("\"{}\"", excerpt(&v)) }),
    }
    let time = match attributes.time.and_then(Attribute::timestamp) {
        Some(seconds) => {
            let at = i64::try_from(seconds).ok().map(OffsetDateTime::from_unix_timestamp);
            let no_time = || Reason::NotATime { found: seconds.to_string() };
            Some(at.and_then(Result::ok).ok_or_else(no_time)?)
        }
        None => optional("time", attributes.time)?.map(|time| timestamp(&time)).transpose()?,
    };
    let key = match optional("partitionkey", attributes.partitionkey)? {
        Some(key) => Some(key),
        // The body is data of any shape: what is no key there is no mistake.
        None => members
            .key
            .and_then(|raw| match Scalar::of(raw) {
                Scalar::Bool(_) => None,
                other => other.into_text(),
            })
            .filter(|key| !key.is_empty() && checked("key", key).is_ok()),
    };
    Ok(Found {
        format,
        id: Some(required("id", attributes.id)?),
        source: Some(required("source", attributes.source)?),
        kind: Some(required("type", attributes.kind)?),
        subject: optional("subject", attributes.subject)?,
        time,
        key,
        data: json,
    })
}

fn native<'a>(members: &Members<'a>) -> Result<Found<'a>, Reason> {
    let format = Format::Native;
    let member = |name, raw| Member { format, name, raw };
    if !members.object {
        return Err(Reason::NotAnObject { format });
    }
    let time = match members.time.map(|raw| (raw, Scalar::of(raw))) {
        Some((raw, Scalar::Number(number))) => {
            let at = number.parse().ok().and_then(rfc3339::from_millis);
            Some(at.ok_or_else(|| Reason::NotATime { found: excerpt(raw) })?)
        }
        _ => member("time", members.time).string()?.map(|time| timestamp(&time)).transpose()?,
    };
    Ok(Found {
        format,
        id: member("id", members.id).scalar()?,
        source: member("source", members.source).scalar()?,
        kind: Some(member("type", members.kind).required()?),
        subject: member("subject", members.subject).scalar()?,
        time,
        key: member("key", members.key).scalar()?,
        data: members.data.unwrap_or("null"),
    })
}

fn raw<'a>(json: &'a str, members: &Members<'a>) -> Result<Found<'a>, Reason> {
    let format = Format::Raw;
    let member = |name, raw| Member { format, name, raw };
    let time = match members.time.map(Scalar::of) {
        Some(Scalar::Text(time)) => rfc3339::parse(&time),
        _ => None,
    };
    Ok(Found {
        format,
        id: member("id", members.id).lenient()?,
        source: member("source", members.source).lenient()?,
        kind: None,
        subject: None,
        time,
        key: member("key", members.key).lenient()?,
        data: json,
    })
}

fn timestamp(text: &str) -> Result<OffsetDateTime, Reason> {
    rfc3339::parse(text).ok_or_else(|| Reason::NotATime { found: excerpt(text) })
}

/// A top-level member on its way to becoming an attribute.
#[derive(Clone, Copy)]
struct Member<'a> {
    format: Format,
    name: &'static str,
    raw: Option<&'a str>,
}

impl<'a> Member<'a> {
    /// A string that is there and not empty.
    fn required(self) -> Result<Cow<'a, str>, Reason> {
        let Self { format, name, .. } = self;
        match self.raw.map(Scalar::of) {
            None | Some(Scalar::Null) => Err(Reason::Missing { format, name }),
            Some(Scalar::Text(text)) if text.is_empty() => Err(Reason::Blank { format, name }),
            Some(Scalar::Text(text)) => Ok(text),
            Some(other) => Err(self.wrong(&other, "a string")),
        }
    }

    /// A string, if any.
    fn string(self) -> Result<Option<Cow<'a, str>>, Reason> {
        match self.raw.map(Scalar::of) {
            None | Some(Scalar::Null) => Ok(None),
            Some(Scalar::Text(text)) => Ok(Some(text).filter(|text| !text.is_empty())),
            Some(other) => Err(self.wrong(&other, "a string")),
        }
    }

    /// A string or number, if any.
    fn scalar(self) -> Result<Option<Cow<'a, str>>, Reason> {
        match self.raw.map(Scalar::of) {
            Some(Scalar::Number(number)) => Ok(Some(Cow::Borrowed(number))),
            Some(other @ Scalar::Bool(_)) => Err(self.wrong(&other, "a string or a number")),
            Some(other @ Scalar::Nested) => Err(self.wrong(&other, "a string or a number")),
            _ => self.string(),
        }
    }

    /// A string or number, if any; what is neither is nobody's mistake.
    fn lenient(self) -> Result<Option<Cow<'a, str>>, Reason> {
        match self.raw.map(Scalar::of) {
            Some(Scalar::Bool(_) | Scalar::Nested) => Ok(None),
            _ => self.scalar(),
        }
    }

    fn wrong(self, found: &Scalar<'_>, expected: &'static str) -> Reason {
        let Self { format, name, .. } = self;
        let found = match found {
            Scalar::NotUnicode => return Reason::NotUnicode { name },
            Scalar::Text(_) => "a string",
            Scalar::Number(_) => "a number",
            Scalar::Bool(_) => "a boolean",
            Scalar::Null => "null",
            Scalar::Nested => "an object or array",
        };
        Reason::WrongType { format, name, expected, found }
    }
}

/// Refuses control characters: databases and broker headers do.
fn checked<'a>(name: &'static str, text: &'a str) -> Result<&'a str, Reason> {
    match text.bytes().find(u8::is_ascii_control) {
        Some(byte) => Err(Reason::ControlCharacter { name, code: byte.into() }),
        None => Ok(text),
    }
}

fn boxed(name: &'static str, text: Cow<'_, str>) -> Result<Box<str>, Reason> {
    checked(name, &text)?;
    Ok(text.into())
}

/// Names seen lately, so that a repeated type or source is not allocated each time. Bounded: a
/// new name takes the place of the one whose hash it shares.
#[derive(Debug, Clone)]
struct Names(Box<[Option<Arc<str>>]>);

impl Default for Names {
    fn default() -> Self {
        Self(vec![None; Self::SLOTS].into())
    }
}

impl Names {
    const SLOTS: usize = 64;
    /// Longer ones, in bytes, are not kept.
    const LONGEST: usize = 256;

    fn get(&mut self, name: &str) -> Arc<str> {
        if name.len() > Self::LONGEST {
            return name.into();
        }
        let mut hasher = FxHasher::default();
        hasher.write(name.as_bytes());
        let index = usize::try_from(hasher.finish() % 64).unwrap_or_default();
        let Some(slot) = self.0.get_mut(index) else { return name.into() };
        match slot {
            Some(known) if **known == *name => Arc::clone(known),
            _ => Arc::clone(slot.insert(name.into())),
        }
    }
}

pub(super) fn attribute(event: &Event, name: &str) -> Option<String> {
    let message = MessageRef { headers: &event.headers, transport: &event.origin.transport };
    let own = match event.format {
        Format::CloudeventsStructured if matches!(name, "data" | "data_base64") => None,
        Format::CloudeventsStructured => scan::member(event.body_str(), name)
            .and_then(|raw| Scalar::of(raw).into_text())
            .map(Cow::into_owned),
        Format::CloudeventsBinary => binary::attribute(&message, name),
        Format::Native | Format::Raw => None,
    };
    own.or_else(|| match (name, event.format) {
        // In binary mode the content type is that of the data; raw events are all data.
        ("datacontenttype", Format::CloudeventsBinary | Format::Raw) => {
            event.headers.content_type().map(str::to_owned)
        }
        ("traceparent" | "tracestate", _) => event.headers.get_str(name).map(str::to_owned),
        _ => None,
    })
}

#[cfg(test)]
mod tests;
