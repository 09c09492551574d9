//! Headers from one kind of transport to another, and back again without loss.
//!
//! NATS and HTTP have headers of text; AMQP has properties, and a table of typed values. The
//! whole table of what becomes what is in `docs/bridging.md`, and a property test holds this
//! file to it. In short:
//!
//! * Within a kind everything goes out as it came in.
//! * To text, a property has a header of its own (`Amqp-Priority`), a list of texts becomes a
//!   repeated header, and a number or boolean its digits. What a text cannot say (the type of a
//!   number, a nested table, bytes, a name with a blank) is in one more header,
//!   [`TYPED_HEADER`], as the JSON that the log keeps.
//! * To AMQP, all of that is undone.
//! * CloudEvents attributes go by the name of each binding: `ce-id`, percent-encoded, in NATS
//!   and HTTP; `cloudEvents:id`, as it is, in AMQP.
//!
//! What belongs to the hop a message came by, rather than to the event, stays behind.

use std::borrow::Cow;

use rustc_hash::FxHashMap;

use crate::{
    event::{
        HeaderValue, Headers,
        binary::{attribute_in, decode, encode},
    },
    handler::template::Place,
    transport::hop,
};

/// The header that says an event's id, where the message's own id cannot hold it.
pub const ID_HEADER: &str = "pulsebus-id";
/// The header that says an event's `source`, where the message itself does not.
pub const SOURCE_HEADER: &str = "pulsebus-source";
/// The header that says a message is raw, and of which type.
pub const TYPE_HEADER: &str = "pulsebus-type";
/// The header that holds what a text header cannot: JSON, as the log keeps headers.
pub const TYPED_HEADER: &str = "pulsebus-typed";
/// The header that keeps the message's own id where the event has another.
pub const MESSAGE_ID_HEADER: &str = "pulsebus-message-id";

/// An AMQP property, the text header that stands for it, and what kind of value it has.
struct Property {
    name: &'static str,
    text: &'static str,
    kind: Kind,
}

enum Kind {
    Text,
    Byte,
    Seconds,
}

/// Not `Content-Encoding`: a body here is JSON and never encoded, whatever a publisher says of it, and
/// an HTTP server would take it at its word.
const PROPERTIES: [Property; 9] = [
    Property { name: ":content_type", text: "Content-Type", kind: Kind::Text },
    Property { name: ":content_encoding", text: "Amqp-Content-Encoding", kind: Kind::Text },
    Property { name: ":priority", text: "Amqp-Priority", kind: Kind::Byte },
    Property { name: ":correlation_id", text: "Amqp-Correlation-Id", kind: Kind::Text },
    Property { name: ":reply_to", text: "Amqp-Reply-To", kind: Kind::Text },
    Property { name: ":timestamp", text: "Amqp-Timestamp", kind: Kind::Seconds },
    Property { name: ":type", text: "Amqp-Type", kind: Kind::Text },
    Property { name: ":app_id", text: "Amqp-App-Id", kind: Kind::Text },
    Property { name: ":cluster_id", text: "Amqp-Cluster-Id", kind: Kind::Text },
];

/// A number, written as it would be written again.
fn canonical<T: std::str::FromStr + ToString>(text: &str) -> Option<T> {
    text.parse::<T>().ok().filter(|number| number.to_string() == text)
}

/// A short string of AMQP, in bytes.
const SHORT: usize = 255;

impl Property {
    fn of(name: &str) -> Option<&'static Self> {
        PROPERTIES.iter().find(|property| property.name == name)
    }

    /// The one that a text header stands for.
    fn of_text(name: &str) -> Option<&'static Self> {
        PROPERTIES.iter().find(|property| property.text.eq_ignore_ascii_case(name))
    }

    /// The value that a text stands for; `None` where another text would come back.
    fn read(&self, text: &str) -> Option<HeaderValue> {
        match self.kind {
            Kind::Text => (text.len() <= SHORT).then(|| text.into()),
            Kind::Byte => canonical(text).map(HeaderValue::Uint8),
            Kind::Seconds => canonical(text).map(HeaderValue::Timestamp),
        }
    }

    /// Whether a table's entry that is called as the text of this property would be taken for
    /// the property.
    fn takes(&self, value: &HeaderValue) -> bool {
        match value {
            HeaderValue::Array(list) => list.iter().any(|value| self.takes(value)),
            HeaderValue::Text(text) => self.read(text).is_some(),
            _ => true,
        }
    }
}

/// Whether a name may be a property that a message is given by hand.
pub(super) fn is_property(name: &str) -> bool {
    Property::of(name).is_some()
}

/// The headers as they go on from a transport of this kind to a place of that.
pub(super) fn carry(headers: &Headers, from: &str, to: Place) -> Headers {
    let kept = headers.iter().filter(|(name, _)| !stays_behind(name, from, to));
    match (to, from) {
        (Place::Plain, _)
        | (Place::Amqp, "amqp")
        | (Place::NatsSubject, "nats")
        | (Place::UrlPath, "http") => {
            kept.map(|(name, value)| (name.into(), value.clone())).collect()
        }
        (Place::Amqp, _) => to_amqp(kept, from == "http"),
        // By way of what both can say.
        (_, "nats" | "http") => {
            to_text(to_amqp(kept, from == "http").iter(), true, to == Place::UrlPath)
        }
        (_, _) => to_text(kept, from == "amqp", to == Place::UrlPath),
    }
}

/// What belongs to the hop an event came by, not to the event.
fn stays_behind(name: &str, from: &str, to: Place) -> bool {
    /// Set anew for the next hop.
    const OURS: [&str; 3] = [ID_HEADER, SOURCE_HEADER, TYPE_HEADER];
    /// Bookkeeping of the broker, or about the hop alone.
    const AMQP: [&str; 9] = [
        ":message_id",
        ":user_id",
        ":expiration",
        ":delivery_mode",
        "x-death",
        "x-delivery-count",
        "x-acquired-count",
        "x-received-from",
        "x-stream-offset",
    ];
    /// About a connection that is over, or for its other end only.
    const HTTP: [&str; 9] = [
        "authorization",
        "proxy-authorization",
        "cookie",
        "host",
        "connection",
        "content-length",
        "transfer-encoding",
        "te",
        "upgrade",
    ];
    let begins = |prefix: &str| {
        name.get(..prefix.len()).is_some_and(|start| start.eq_ignore_ascii_case(prefix))
    };
    let is = |names: &[&str]| names.iter().any(|known| name.eq_ignore_ascii_case(known));
    is(&OURS)
        // RabbitMQ would route the message to what is in them, or close the channel.
        || (to == Place::Amqp && matches!(name, "CC" | "BCC"))
        // A webhook is somebody else's.
        || (to == Place::UrlPath && hop::is_secret(name))
        || match from {
            "amqp" => {
                is(&AMQP)
                    || begins("x-first-death-")
                    || begins("x-last-death-")
                    || matches!(name, "CC" | "BCC")
            }
            // `Nats-Expected-…`, `Nats-Rollup`, `Nats-TTL` are orders to the server.
            "nats" => begins("nats-"),
            "http" => is(&HTTP) || begins("webhook-"),
            _ => is(&AMQP) || is(&HTTP) || begins("nats-") || begins("webhook-"),
        }
}

/// The headers of a message by name, names in the order of their first value.
fn by_name<'a>(
    headers: impl Iterator<Item = (&'a str, &'a HeaderValue)>,
) -> Vec<(&'a str, Vec<&'a HeaderValue>)> {
    // By hash, since nothing bounds how many headers a publisher sends.
    let mut places = FxHashMap::default();
    let mut names: Vec<(&str, Vec<&HeaderValue>)> = Vec::new();
    for (name, value) in headers {
        let place = *places.entry(name).or_insert_with(|| {
            names.push((name, Vec::with_capacity(1)));
            names.len() - 1
        });
        names[place].1.push(value);
    }
    names
}

/// To NATS or HTTP.
fn to_text<'a>(
    headers: impl Iterator<Item = (&'a str, &'a HeaderValue)>,
    amqp: bool,
    http: bool,
) -> Headers {
    let names = by_name(headers);
    let mut out = Headers::new();
    let mut typed = Headers::new();
    let text_of = |value: &HeaderValue| {
        value.to_text().map(Cow::into_owned).filter(|text| is_text(text, http))
    };
    // A table may have an entry that is called as the text of a property is; where it says the
    // same in another spelling, the one header stands for both.
    let doubles = |property: &Property, value: &HeaderValue| {
        !http
            && names.iter().any(|(name, values)| {
                property.text.eq_ignore_ascii_case(name)
                    && *name != property.text
                    && says_the_same(value, values)
            })
    };
    for (name, values) in &names {
        if let Some(property) = Property::of(name) {
            match values.as_slice() {
                [value] if amqp && doubles(property, value) => {}
                [value] => match text_of(value) {
                    Some(text) => out.push(property.text, text),
                    None => typed.push(*name, (*value).clone()),
                },
                many => many.iter().for_each(|value| typed.push(*name, (*value).clone())),
            }
            continue;
        }
        // What a request says of itself is not the message's word.
        let plain =
            is_name(name, http) && !(http && !is_content_type(name) && hop::is_of_a_request(name));
        if amqp {
            if let Some((attribute, _)) = attribute_in(name) {
                let header = format!("ce-{}", attribute.to_ascii_lowercase());
                let text = values.first().and_then(|value| attribute_text(value));
                let first = out.get(&header).is_none() && is_name(&header, http);
                if let Some(text) = text.filter(|_| first) {
                    out.push(header, encode(&text).into_owned());
                    let spelled = |(name, _): &&(&str, _)| {
                        attribute_in(name).is_some_and(|(a, _)| a.eq_ignore_ascii_case(attribute))
                    };
                    if matches!(values[0], HeaderValue::Text(_))
                        && name.strip_prefix(AMQP_PREFIX).is_some_and(is_lower)
                        && names.iter().filter(spelled).count() == 1
                    {
                        continue;
                    }
                }
                values.iter().for_each(|value| typed.push(*name, (*value).clone()));
                continue;
            }
            let property = Property::of_text(name);
            let said = property.is_some_and(|p| {
                *name != p.text
                    && !http
                    && names
                        .iter()
                        .any(|(n, v)| *n == p.name && v.len() == 1 && says_the_same(v[0], values))
            });
            let taken = property.is_some_and(|p| values.iter().any(|value| p.takes(value)));
            let reserved = (taken && !said)
                || name.eq_ignore_ascii_case(TYPED_HEADER)
                || name.get(..5).is_some_and(|start| start.eq_ignore_ascii_case("nats-"));
            if reserved {
                values.iter().for_each(|value| typed.push(*name, (*value).clone()));
                continue;
            }
        }
        let repeated: Option<Vec<String>> = match values.as_slice() {
            [HeaderValue::Array(list)] if amqp && list.len() > 1 => texts(list.iter(), http),
            [_] => None,
            many => texts(many.iter().copied(), http),
        };
        match (plain, values.as_slice(), repeated) {
            (true, _, Some(list)) => {
                for text in list {
                    out.push(*name, text);
                }
            }
            (true, [HeaderValue::Text(text)], None) if is_text(text, http) => {
                out.push(*name, text.clone());
            }
            (true, [value], None) => {
                if let Some(text) = text_of(value).filter(|_| value.as_str().is_none()) {
                    out.push(*name, text);
                }
                typed.push(*name, (*value).clone());
            }
            _ => values.iter().for_each(|value| typed.push(*name, (*value).clone())),
        }
    }
    if !typed.is_empty() {
        out.push(TYPED_HEADER, ascii(&typed.to_json()));
    }
    out
}

/// Whether an entry of the table is the text of this property's value.
fn says_the_same(property: &HeaderValue, entry: &[&HeaderValue]) -> bool {
    match entry {
        [HeaderValue::Text(text)] => property.to_text().is_some_and(|said| said == *text),
        _ => false,
    }
}

fn is_content_type(name: &str) -> bool {
    name.eq_ignore_ascii_case("content-type")
}

/// Texts that can be the values of a repeated header, if they all are.
fn texts<'a>(list: impl Iterator<Item = &'a HeaderValue>, http: bool) -> Option<Vec<String>> {
    list.map(|value| match value {
        HeaderValue::Text(text) if is_text(text, http) => Some(text.clone()),
        _ => None,
    })
    .collect()
}

/// From NATS or HTTP to AMQP.
fn to_amqp<'a>(headers: impl Iterator<Item = (&'a str, &'a HeaderValue)>, http: bool) -> Headers {
    let headers: Vec<_> = headers.collect();
    let mut typed = Headers::new();
    let mut told = vec![false; headers.len()];
    for (at, (name, value)) in headers.iter().enumerate() {
        if name.eq_ignore_ascii_case(TYPED_HEADER)
            && let Some(said) = value.as_str().and_then(|json| Headers::from_json(json).ok())
        {
            told[at] = true;
            for (name, value) in
                said.iter().filter(|(name, _)| !stays_behind(name, "amqp", Place::Amqp))
            {
                typed.push(name, value.clone());
            }
        }
    }
    // The text headers that stand for what is told with its type.
    let mut replaced: Vec<Cow<'_, str>> = typed
        .iter()
        .filter_map(|(name, _)| match attribute_in(name) {
            Some((attribute, _)) => Some(format!("ce-{attribute}").into()),
            // A property that no text can say, and an entry that is called as the text of one:
            // neither has a header of its own.
            None if Property::of(name).or_else(|| Property::of_text(name)).is_some() => None,
            None => Some(name.into()),
        })
        .collect();
    replaced.sort_unstable();
    let is_replaced = |name: &str| {
        replaced.binary_search_by(|known| (**known).cmp(name)).is_ok()
            || (http || attribute_in(name).is_some())
                && replaced.iter().any(|known| known.eq_ignore_ascii_case(name))
    };
    let mut out = Headers::new();
    for ((name, value), _) in headers.iter().zip(&told).filter(|(_, told)| !**told) {
        if is_replaced(name) {
            continue;
        }
        if let Some(property) = Property::of_text(name)
            && let Some(read) = value.as_str().and_then(|text| property.read(text))
            && out.get(property.name).is_none()
        {
            out.push(property.name, read);
            if http || *name == property.text {
                continue;
            }
        } else if let Some((attribute, true)) = attribute_in(name)
            && let Some(text) = value.as_str().and_then(decode)
        {
            let header = format!("{AMQP_PREFIX}{}", attribute.to_ascii_lowercase());
            if out.get(&header).is_none() {
                out.push(header, text.into_owned());
            }
            continue;
        }
        out.push(*name, (*value).clone());
    }
    for (name, value) in typed.iter() {
        out.push(name, value.clone());
    }
    out
}

/// CloudEvents AMQP binding, section 3.1.3: the prefix of an attribute.
pub(super) const AMQP_PREFIX: &str = "cloudEvents:";

fn is_lower(name: &str) -> bool {
    !name.bytes().any(|b| b.is_ascii_uppercase())
}

/// An attribute as CloudEvents spells it in a text header.
fn attribute_text(value: &HeaderValue) -> Option<String> {
    match value {
        HeaderValue::Timestamp(seconds) => crate::event::binary::timestamp_text(*seconds),
        other => other.to_text().map(Cow::into_owned),
    }
}

/// Whether a header can be called so, in NATS or HTTP.
pub(super) fn is_name(name: &str, http: bool) -> bool {
    /// RFC 9110, section 5.6.2, "tchar", besides letters and digits.
    const MARKS: &[u8] = b"!#$%&'*+-.^_`|~";
    !name.is_empty()
        && name.bytes().all(|b| {
            if http {
                b.is_ascii_alphanumeric() || MARKS.contains(&b)
            } else {
                b.is_ascii_graphic() && b != b':'
            }
        })
}

/// Whether a text arrives as it is: on one line, with no blanks around it that a reader takes
/// off, and in HTTP, in ASCII.
pub(super) fn is_text(text: &str, http: bool) -> bool {
    text.trim() == text && !text.chars().any(char::is_control) && (!http || text.is_ascii())
}

/// JSON in ASCII, which any header takes.
fn ascii(json: &str) -> String {
    if json.is_ascii() && !json.contains('\u{7f}') {
        return json.to_owned();
    }
    let mut out = String::with_capacity(json.len() + 16);
    for c in json.chars() {
        if c.is_ascii() && c != '\u{7f}' {
            out.push(c);
        } else {
            let mut units = [0; 2];
            for unit in c.encode_utf16(&mut units) {
                out.push_str(&format!("\\u{unit:04x}"));
            }
        }
    }
    out
}

#[cfg(test)]
mod tests;
