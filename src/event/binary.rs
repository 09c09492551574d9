//! CloudEvents binary mode: attributes in headers.
//!
//! A header is an attribute where its name begins with `ce-` (HTTP, NATS), `cloudEvents:` or
//! `cloudEvents_` (AMQP), ASCII case ignored; all three count on every transport, since a
//! message keeps its headers on its way from one to the next.

use std::{borrow::Cow, fmt::Write as _};

use super::{Event, Format, HeaderValue, Message, Reason, reason::excerpt, rfc3339};

const FORMAT: Format = Format::CloudeventsBinary;

/// A header that is an attribute.
#[derive(Debug, Clone, Copy)]
pub(super) struct Attribute<'a> {
    value: &'a HeaderValue,
    encoded: bool,
}

/// The attributes that a decoder reads, in the headers of one message.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Attributes<'a> {
    pub(super) specversion: Option<Attribute<'a>>,
    pub(super) id: Option<Attribute<'a>>,
    pub(super) source: Option<Attribute<'a>>,
    pub(super) kind: Option<Attribute<'a>>,
    pub(super) subject: Option<Attribute<'a>>,
    pub(super) time: Option<Attribute<'a>>,
    pub(super) partitionkey: Option<Attribute<'a>>,
}

impl<'a> Attributes<'a> {
    /// Gathers them in one pass; of a repeated header the first counts.
    pub(super) fn of(message: &'a Message) -> Self {
        let mut found = Self::default();
        for (name, value) in message.headers.iter() {
            let Some((name, encoded)) = attribute_name(name) else { continue };
            for (known, slot) in [
                ("specversion", &mut found.specversion),
                ("id", &mut found.id),
                ("source", &mut found.source),
                ("type", &mut found.kind),
                ("subject", &mut found.subject),
                ("time", &mut found.time),
                ("partitionkey", &mut found.partitionkey),
            ] {
                if name.eq_ignore_ascii_case(known) {
                    let encoded = encoded && is_encoded(message);
                    slot.get_or_insert(Attribute { value, encoded });
                }
            }
        }
        found
    }

    /// Whether a required attribute is among them: extensions alone make no CloudEvent.
    pub(super) const fn is_event(&self) -> bool {
        self.specversion.is_some()
            || self.id.is_some()
            || self.source.is_some()
            || self.kind.is_some()
    }
}

impl<'a> Attribute<'a> {
    /// Its text, decoded.
    pub(super) fn text(self, name: &'static str) -> Result<Cow<'a, str>, Reason> {
        let Some(text) = self.value.to_text() else {
            return Err(Reason::WrongType {
                format: FORMAT,
                name,
                expected: "text",
                found: "a binary or nested header",
            });
        };
        if !self.encoded {
            return Ok(text);
        }
        match text {
            Cow::Borrowed(text) => {
                decode(text).ok_or_else(|| Reason::PercentEncoding { name, found: excerpt(text) })
            }
            number => Ok(number),
        }
    }

    /// Seconds since 1970, where the header is an AMQP timestamp.
    pub(super) const fn timestamp(self) -> Option<u64> {
        match self.value {
            HeaderValue::Timestamp(seconds) => Some(*seconds),
            _ => None,
        }
    }
}

/// The text of any attribute by its name. `None` where it is absent or no text.
pub(super) fn attribute(message: &MessageRef<'_>, name: &str) -> Option<String> {
    message.headers.iter().find_map(|(header, value)| {
        let (found, encoded) = attribute_name(header)?;
        if !found.eq_ignore_ascii_case(name) {
            return None;
        }
        let text = value.to_text()?;
        if encoded && message.transport != "amqp" {
            return decode(&text).map(Cow::into_owned);
        }
        Some(text.into_owned())
    })
}

/// All attributes among the headers of an event, decoded, in order; of a repeated one the first.
pub(super) fn attributes(event: &Event) -> Vec<(String, String)> {
    let mut found: Vec<(String, String)> = Vec::new();
    for (header, value) in event.headers().iter() {
        let Some((name, encoded)) = attribute_name(header) else { continue };
        let text = match (name, value) {
            (_, HeaderValue::Timestamp(seconds)) => timestamp_text(*seconds),
            (_, value) => value.to_text().and_then(|text| {
                let encoded = encoded && &*event.origin().transport != "amqp";
                if encoded { decode(&text).map(Cow::into_owned) } else { Some(text.into_owned()) }
            }),
        };
        if let Some(text) = text
            && !found.iter().any(|(known, _)| known.eq_ignore_ascii_case(name))
        {
            found.push((name.to_owned(), text));
        }
    }
    found
}

/// The text of a time that AMQP holds as seconds since 1970.
pub(crate) fn timestamp_text(seconds: u64) -> Option<String> {
    rfc3339::from_seconds(seconds)
}

/// The attribute that a header of this name holds, and whether that header's binding
/// percent-encodes its value.
pub(crate) fn attribute_in(header: &str) -> Option<(&str, bool)> {
    attribute_name(header).filter(|(name, _)| !name.is_empty())
}

/// A value as the HTTP and NATS bindings write it (CloudEvents HTTP binding, section 3.1.3.2):
/// blanks, quotes, percent signs and what is no visible ASCII are percent-encoded.
pub(crate) fn encode(text: &str) -> Cow<'_, str> {
    let plain = |b: u8| matches!(b, 0x21..=0x7e) && !matches!(b, b'"' | b'%');
    if text.bytes().all(plain) {
        return Cow::Borrowed(text);
    }
    let mut encoded = String::with_capacity(text.len() + 8);
    for byte in text.bytes() {
        if plain(byte) {
            encoded.push(char::from(byte));
        } else {
            // Writing to a string does not fail.
            let _ = write!(encoded, "%{byte:02X}");
        }
    }
    encoded.into()
}

/// What [`attribute`] looks at.
pub(super) struct MessageRef<'a> {
    pub(super) headers: &'a super::Headers,
    pub(super) transport: &'a str,
}

/// The HTTP and NATS bindings percent-encode attribute values; the AMQP binding does not.
fn is_encoded(message: &Message) -> bool {
    &*message.origin.transport != "amqp"
}

/// The attribute's name in a header's name, and whether that header's binding percent-encodes.
fn attribute_name(header: &str) -> Option<(&str, bool)> {
    for (prefix, encoded) in [("ce-", true), ("cloudEvents:", false), ("cloudEvents_", false)] {
        if header.get(..prefix.len()).is_some_and(|start| start.eq_ignore_ascii_case(prefix)) {
            return Some((&header[prefix.len()..], encoded));
        }
    }
    None
}

/// Decodes a header value after the CloudEvents HTTP binding, section 3.1.3.2: first a quoted
/// string, then one round of percent-decoding. `None` where that gives no UTF-8. A percent sign
/// that no two hexadecimal digits follow stands for itself.
pub(crate) fn decode(text: &str) -> Option<Cow<'_, str>> {
    let quoted = text.len() >= 2 && text.starts_with('"') && text.ends_with('"');
    if !quoted && !text.contains('%') {
        return Some(Cow::Borrowed(text));
    }
    let unquoted = if quoted { unquote(&text[1..text.len() - 1]) } else { text.to_owned() };
    let mut decoded = Vec::with_capacity(unquoted.len());
    let mut rest = unquoted.as_bytes();
    while let [byte, tail @ ..] = rest {
        rest = tail;
        if let (b'%', [high, low, tail @ ..]) = (byte, tail)
            && let (Some(high), Some(low)) = (hex(*high), hex(*low))
        {
            decoded.push(high << 4 | low);
            rest = tail;
        } else {
            decoded.push(*byte);
        }
    }
    String::from_utf8(decoded).ok().map(Cow::Owned)
}

/// RFC 7230 section 3.2.6: a backslash makes the next character stand for itself.
fn unquote(text: &str) -> String {
    let mut chars = text.chars();
    let mut plain = String::with_capacity(text.len());
    while let Some(c) = chars.next() {
        plain.push(if c == '\\' { chars.next().unwrap_or(c) } else { c });
    }
    plain
}

fn hex(digit: u8) -> Option<u8> {
    char::from(digit).to_digit(16).and_then(|d| u8::try_from(d).ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_values_are_decoded_after_the_http_binding() {
        for (text, expected) in [
            ("plain", Some("plain")),
            ("Euro%20%E2%82%AC%20%F0%9F%98%80", Some("Euro € 😀")),
            ("%e2%82%ac", Some("€")),
            ("%2525", Some("%25")),
            ("100%", Some("100%")),
            ("%zz%4", Some("%zz%4")),
            ("\"a \\\"b\\\" %41\"", Some("a \"b\" A")),
            ("\"", Some("\"")),
            ("\"\"", Some("")),
            ("%C0%A0", None),
            ("%ff", None),
            ("é", Some("é")),
        ] {
            assert_eq!(decode(text).as_deref(), expected, "{text}");
        }
    }

    #[test]
    fn attributes_are_told_from_other_headers() {
        assert_eq!(attribute_name("CE-Id"), Some(("Id", true)));
        assert_eq!(attribute_name("cloudEvents:id"), Some(("id", false)));
        assert_eq!(attribute_name("cloudevents_id"), Some(("id", false)));
        for other in ["", "ce", "cé-id", "cloudEvents-id", "::cloudEvents:id", "Nats-Msg-Id"] {
            assert_eq!(attribute_name(other), None, "{other}");
        }
    }
}
