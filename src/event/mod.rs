//! The event: CloudEvents 1.0 attributes around a body that is kept byte for byte.
//!
//! * [`Message`] is what a broker or client handed over: bytes, headers, where it came from.
//! * [`Decoder`] turns a message into an [`Event`], or says why it is none ([`NotAnEvent`]).
//! * [`StoredEvent`] is an event with its place in the log.
//! * [`NewEvent`] is how a program makes one.
//!
//! The invariants: the body of an [`Event`] is UTF-8, is JSON, is nested at most
//! [`MAX_DEPTH`] deep and is never changed; an attribute never differs from what the body or
//! the headers say.

pub(crate) mod binary;
mod decode;
mod domain;
mod encode;
mod expr;
mod headers;
mod new;
mod reason;
mod rfc3339;
mod scan;
mod trace;

pub use decode::{Decoder, DecoderOptions};
pub use domain::{DomainEvent, UnixTimestamp};
pub use encode::{EncodeError, Encoded};
pub use expr::{Expr, ParseExprError};
pub use headers::{HeaderValue, Headers};
pub use new::{NewEvent, NewEventError};
pub use reason::{NotAnEvent, Reason};
pub use trace::{TRACEPARENT, TRACESTATE, TraceContext, tracestate};

use std::{fmt, str::FromStr, sync::Arc};

use bytes::Bytes;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use time::OffsetDateTime;

/// How deep a body may be nested: objects and arrays within each other.
pub const MAX_DEPTH: usize = 128;

/// A place in the log: 1, 2, 3 … without gaps (G3). Zero is "before the first".
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Position(pub u64);

impl Position {
    /// Before the first event.
    pub const START: Self = Self(0);

    /// The position after this one.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The form in which an event was published.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Format {
    /// CloudEvents 1.0 structured mode: attributes and data in one JSON object.
    CloudeventsStructured,
    /// CloudEvents 1.0 binary mode: attributes in headers, data in the body.
    CloudeventsBinary,
    /// `{"type": …, "data": …}`, as serde writes an adjacently tagged enum.
    Native,
    /// Any other JSON value.
    Raw,
}

impl Format {
    /// The name used in the log and in configuration.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::CloudeventsStructured => "cloudevents-structured",
            Self::CloudeventsBinary => "cloudevents-binary",
            Self::Native => "native",
            Self::Raw => "raw",
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Format {
    type Err = UnknownFormat;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        Ok(match s {
            "cloudevents-structured" => Self::CloudeventsStructured,
            "cloudevents-binary" => Self::CloudeventsBinary,
            "native" => Self::Native,
            "raw" => Self::Raw,
            _ => return Err(UnknownFormat(s.into())),
        })
    }
}

/// A format name that is none of [`Format`]'s.
#[derive(Debug, thiserror::Error)]
#[error("unknown format `{0}`: expected cloudevents-structured, cloudevents-binary, native or raw")]
pub struct UnknownFormat(Box<str>);

/// Where a message came from, as far as its transport can tell.
///
/// Stored with the event as JSON; empty fields are left out.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    /// The configured source that consumed it, e.g. `lessons`; `emit` for the library's own.
    pub source: Arc<str>,
    /// The kind of transport: `nats`, `amqp`, `http`, `memory`, or a custom one's name.
    pub transport: Arc<str>,
    /// The NATS subject, the AMQP routing key, or empty.
    #[serde(default, skip_serializing_if = "str::is_empty")]
    pub subject: Arc<str>,
    /// The JetStream stream or the AMQP queue.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub channel: Option<Arc<str>>,
    /// The AMQP exchange it was published to (empty: the default exchange).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exchange: Option<Arc<str>>,
    /// The sequence in `channel`, where it is stable across redelivery (JetStream).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sequence: Option<u64>,
}

impl Origin {
    /// `<stream>:<sequence>`, where both are known: the same for every delivery of a message.
    #[must_use]
    pub fn stable_id(&self) -> Option<String> {
        Some(format!("{}:{}", self.channel.as_deref()?, self.sequence?))
    }
}

/// What was handed over, before anybody has looked into it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Message {
    /// The payload.
    pub body: Bytes,
    /// Broker headers and properties, typed.
    pub headers: Headers,
    /// Where it came from.
    pub origin: Origin,
}

/// The parts of an [`Event`], for stores that read one back and for tests.
#[derive(Debug, Clone)]
pub struct EventParts {
    /// See [`Event::id`].
    pub id: Box<str>,
    /// See [`Event::source`].
    pub source: Arc<str>,
    /// See [`Event::kind`].
    pub kind: Arc<str>,
    /// See [`Event::subject`].
    pub subject: Option<Box<str>>,
    /// See [`Event::time`].
    pub time: Option<OffsetDateTime>,
    /// See [`Event::key`].
    pub key: Box<str>,
    /// See [`Event::format`].
    pub format: Format,
    /// See [`Event::headers`].
    pub headers: Headers,
    /// See [`Event::origin`].
    pub origin: Origin,
    /// See [`Event::body`].
    pub body: Bytes,
}

/// An immutable fact, as published.
#[derive(Debug, Clone)]
pub struct Event {
    pub(crate) id: Box<str>,
    pub(crate) source: Arc<str>,
    pub(crate) kind: Arc<str>,
    pub(crate) subject: Option<Box<str>>,
    pub(crate) time: Option<OffsetDateTime>,
    pub(crate) key: Box<str>,
    pub(crate) format: Format,
    pub(crate) headers: Headers,
    pub(crate) origin: Origin,
    pub(crate) body: Bytes,
}

impl Event {
    /// An event of parts that a [`Decoder`] has made before, e.g. read back from a store.
    /// Nothing is checked.
    #[must_use]
    pub fn from_parts(parts: EventParts) -> Self {
        let EventParts { id, source, kind, subject, time, key, format, headers, origin, body } =
            parts;
        Self { id, source, kind, subject, time, key, format, headers, origin, body }
    }

    /// The message it was decoded from.
    #[must_use]
    pub fn into_message(self) -> Message {
        Message { body: self.body, headers: self.headers, origin: self.origin }
    }

    /// CloudEvents `id`: with [`source`](Self::source) the event's identity (G2).
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// CloudEvents `source`; `/` where nothing says otherwise.
    #[must_use]
    pub fn source(&self) -> &str {
        &self.source
    }

    /// CloudEvents `type`, e.g. `LessonPublished`.
    #[must_use]
    pub fn kind(&self) -> &str {
        &self.kind
    }

    /// CloudEvents `subject`.
    #[must_use]
    pub fn subject(&self) -> Option<&str> {
        self.subject.as_deref()
    }

    /// CloudEvents `time`: when it happened, by the publisher's clock. UTC, microseconds.
    #[must_use]
    pub const fn time(&self) -> Option<OffsetDateTime> {
        self.time
    }

    /// The ordering key (G5): events of one key reach a handler in log order.
    #[must_use]
    pub fn key(&self) -> &str {
        &self.key
    }

    /// The form in which it was published.
    #[must_use]
    pub const fn format(&self) -> Format {
        self.format
    }

    /// Broker headers and properties as received, typed (G9).
    #[must_use]
    pub const fn headers(&self) -> &Headers {
        &self.headers
    }

    /// Where it came from.
    #[must_use]
    pub const fn origin(&self) -> &Origin {
        &self.origin
    }

    /// The payload, byte for byte as published (G9): UTF-8, JSON.
    #[must_use]
    pub const fn body(&self) -> &Bytes {
        &self.body
    }

    /// The payload as text.
    #[must_use]
    pub fn body_str(&self) -> &str {
        // Checked when the event was decoded; an empty string would be refused by every reader.
        std::str::from_utf8(&self.body).unwrap_or_default()
    }

    /// The event's data as JSON text, a view into [`body`](Self::body): the `data` member of
    /// native and structured events, the whole body of binary and raw ones. `null` where a
    /// native or structured event has no `data` member.
    #[must_use]
    pub fn data(&self) -> &str {
        match self.format {
            Format::Native | Format::CloudeventsStructured => {
                scan::member(self.body_str(), "data").unwrap_or("null")
            }
            Format::CloudeventsBinary | Format::Raw => self.body_str(),
        }
    }

    /// Deserialises [`data`](Self::data).
    ///
    /// # Errors
    /// Where the data does not fit `T`.
    pub fn data_as<T: DeserializeOwned>(&self) -> Result<T, serde_json::Error> {
        serde_json::from_str(self.data())
    }

    /// The typed view: deserialises `{"type": …, "data": …}`, the form serde gives an
    /// adjacently tagged enum such as [`DomainEvent`], whatever format it was published in.
    ///
    /// # Errors
    /// Where type or data do not fit `T`; an unknown type is an error here and an ordinary
    /// event everywhere else.
    pub fn decode<T: DeserializeOwned>(&self) -> Result<T, serde_json::Error> {
        let rebuilt = || {
            let kind = serde_json::to_string(&*self.kind)?;
            serde_json::from_str(&format!("{{\"type\":{kind},\"data\":{}}}", self.data()))
        };
        if self.format == Format::Native {
            // Serde refuses a member that repeats, where the last one counts for us.
            let direct = serde_json::from_str(self.body_str());
            return direct.or_else(|error| rebuilt().map_err(|_| error));
        }
        rebuilt()
    }

    /// The event in this format: as it is where it is in it already, otherwise written anew with
    /// its id, source, type and data. See the table at the head of `event/encode.rs`.
    ///
    /// # Errors
    /// Where the format has no place for the event: any for [`Format::Raw`], data that is not
    /// JSON for [`Format::Native`].
    pub fn encode(&self, format: Format) -> Result<Encoded, EncodeError> {
        encode::encode(self, format)
    }

    /// A CloudEvents attribute that is not a column of the log, as text: `datacontenttype`,
    /// `dataschema`, or an extension such as `traceparent`. `None` where it is absent.
    #[must_use]
    pub fn attribute(&self, name: &str) -> Option<String> {
        decode::attribute(self, name)
    }
}

/// An event with its place in the log.
#[derive(Debug, Clone)]
pub struct StoredEvent {
    /// Its place in the log.
    pub position: Position,
    /// When it was committed, by the daemon's clock. UTC, microseconds.
    pub recorded_at: OffsetDateTime,
    /// The event itself.
    pub event: Event,
}

impl std::ops::Deref for StoredEvent {
    type Target = Event;

    fn deref(&self) -> &Event {
        &self.event
    }
}

/// A message that is no event, with the reason: what quarantine keeps.
#[derive(Debug, Clone, PartialEq)]
pub struct Quarantined {
    /// The bytes, headers and origin as received.
    pub message: Message,
    /// Why, in words for a person.
    pub reason: String,
}

/// The current time as the log keeps it: UTC, whole microseconds.
#[must_use]
pub fn now() -> OffsetDateTime {
    to_micros(OffsetDateTime::now_utc())
}

/// Truncates to whole microseconds, which is what every store can keep.
#[must_use]
pub fn to_micros(at: OffsetDateTime) -> OffsetDateTime {
    // Only within a day of the years -9999 and 9999 is there no such time in UTC.
    let at = at.checked_to_offset(time::UtcOffset::UTC).unwrap_or(at);
    at.replace_nanosecond(at.nanosecond() / 1000 * 1000).unwrap_or(at)
}
