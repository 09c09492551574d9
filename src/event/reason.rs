//! Why a message is no event.

use super::{Format, MAX_DEPTH, Message, Quarantined};

/// A message that is no event.
#[derive(Debug)]
pub struct NotAnEvent {
    /// The message, untouched.
    pub message: Box<Message>,
    /// Why.
    pub reason: Reason,
}

impl From<NotAnEvent> for Quarantined {
    fn from(refused: NotAnEvent) -> Self {
        Self { reason: refused.reason.to_string(), message: *refused.message }
    }
}

/// Why a message is no event: one variant a cause. The text is what quarantine shows; it is
/// short whatever the message holds, and free of control characters.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Reason {
    /// No bytes.
    #[error(
        "the body is empty: an event needs a JSON value (`null` where there is nothing to say)"
    )]
    Empty,
    /// More bytes than `max_event_bytes`.
    #[error(
        "the body has {size} bytes and the limit is {limit}: publish a smaller event, or raise limits.max_event_bytes"
    )]
    TooLarge {
        /// Its bytes.
        size: usize,
        /// How many are allowed.
        limit: usize,
    },
    /// Compressed bytes.
    #[error("the body is {how}-compressed: publish it uncompressed")]
    Compressed {
        /// `gzip` or `zstd`.
        how: &'static str,
    },
    /// UTF-16, with or without a byte order mark.
    #[error("the body is UTF-16: publish it as UTF-8")]
    Utf16,
    /// Bytes that are no UTF-8.
    #[error("the body is not UTF-8: byte {at} (from 0) is part of no character")]
    NotUtf8 {
        /// The first such byte, from 0.
        at: usize,
    },
    /// JSON behind a byte order mark, which RFC 8259 section 8.1 forbids.
    #[error("the body is not JSON: it begins with a byte order mark (U+FEFF)")]
    ByteOrderMark,
    /// Text that is no JSON.
    #[error("the body is not JSON: {what}, at line {line}, column {column}")]
    NotJson {
        /// What is wrong.
        what: &'static str,
        /// The line, from 1.
        line: usize,
        /// The column in characters, from 1.
        column: usize,
    },
    /// Nested deeper than [`MAX_DEPTH`].
    #[error("the body is nested deeper than {MAX_DEPTH} objects and arrays")]
    TooDeep,
    /// A CloudEvents batch in one broker message.
    #[error(
        "a CloudEvents batch (application/cloudevents-batch+json) in one broker message is not supported: publish each event by itself, or send the batch to POST /v1/events"
    )]
    Batch,
    /// A CloudEvents event format other than JSON.
    #[error(
        "the CloudEvents format `{content_type}` is not supported: only application/cloudevents+json is"
    )]
    EventFormat {
        /// The content type.
        content_type: String,
    },
    /// A JSON value other than an object where the format needs one.
    #[error("a {format} event must be a JSON object")]
    NotAnObject {
        /// The format.
        format: Format,
    },
    /// A `specversion` that is not `1.0`.
    #[error(
        "the CloudEvents `specversion` is {found}: only \"1.0\" is supported (format = \"raw\" on the source takes such messages as they are)"
    )]
    SpecVersion {
        /// The value as written, shortened.
        found: String,
    },
    /// A required attribute is not there.
    #[error("the {format} event has no `{name}`")]
    Missing {
        /// The format.
        format: Format,
        /// The attribute.
        name: &'static str,
    },
    /// A required attribute is an empty string.
    #[error("the `{name}` of the {format} event is empty")]
    Blank {
        /// The format.
        format: Format,
        /// The attribute.
        name: &'static str,
    },
    /// An attribute of the wrong type.
    #[error("the `{name}` of the {format} event must be {expected}, and is {found}")]
    WrongType {
        /// The format.
        format: Format,
        /// The attribute.
        name: &'static str,
        /// What it may be.
        expected: &'static str,
        /// What it is.
        found: &'static str,
    },
    /// A NUL or another character below U+0020, or U+007F, in an attribute.
    #[error("`{name}` contains the control character U+{code:04X}, which attributes may not")]
    ControlCharacter {
        /// The attribute.
        name: &'static str,
        /// The character.
        code: u32,
    },
    /// Half of a surrogate pair in an attribute.
    #[error("`{name}` is no Unicode text: it contains half of a surrogate pair")]
    NotUnicode {
        /// The attribute.
        name: &'static str,
    },
    /// A header whose percent-encoding does not decode to UTF-8.
    #[error("the `ce-{name}` header is not percent-encoded UTF-8: `{found}`")]
    PercentEncoding {
        /// The attribute.
        name: &'static str,
        /// The value, shortened.
        found: String,
    },
    /// A `time` that is none.
    #[error(
        "`time` is neither an RFC 3339 time nor, in native events, a whole number of milliseconds since 1970: `{found}`"
    )]
    NotATime {
        /// The value, shortened.
        found: String,
    },
    /// No id of any kind, where the source requires one.
    #[error(
        "the event has no id, and the source sets require_id: without one, copies cannot be recognised"
    )]
    NoId,
    /// Does not fit the format its source pins.
    #[error("the source's format is pinned to {format}, which does not fit: {why}")]
    Pinned {
        /// The pinned format.
        format: Format,
        /// What does not fit.
        why: Box<Reason>,
    },
}

/// The beginning of a value, for a person: at most 60 characters, control characters escaped.
pub(super) fn excerpt(text: &str) -> String {
    let mut short: String = text.chars().take(60).flat_map(char::escape_debug).collect();
    if text.chars().nth(60).is_some() {
        short.push('…');
    }
    short
}
