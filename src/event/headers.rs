//! Broker headers and properties, typed, in order, repeatable.

use std::{borrow::Cow, collections::BTreeMap, fmt};

use base64::engine::general_purpose::STANDARD as BASE64;
use rustc_hash::FxHashMap;
use serde::{
    Deserialize, Deserializer, Serialize, Serializer,
    de::{MapAccess, Visitor},
    ser::SerializeMap,
};

/// One header value. The variants are those of an AMQP 0-9-1 field table; NATS and HTTP use
/// [`Text`](Self::Text) only.
///
/// As JSON, text is a string and everything else an object whose one member names the type,
/// `{"int32": 5}`, so that a value comes out as the type it came in as (G9).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HeaderValue {
    /// AMQP long string holding UTF-8, or a NATS or HTTP header value. JSON: a bare string.
    #[serde(skip)]
    Text(String),
    /// AMQP short string.
    Short(String),
    /// AMQP boolean.
    Bool(bool),
    /// AMQP short-short-int.
    Int8(i8),
    /// AMQP short-short-uint.
    Uint8(u8),
    /// AMQP short-int.
    Int16(i16),
    /// AMQP short-uint.
    Uint16(u16),
    /// AMQP long-int.
    Int32(i32),
    /// AMQP long-uint.
    Uint32(u32),
    /// AMQP long-long-int.
    Int64(i64),
    /// AMQP float, as its bits: NaN and infinity have no JSON.
    Float32(u32),
    /// AMQP double, as its bits.
    Float64(u64),
    /// AMQP decimal: digits after the point, and the unscaled value.
    Decimal(u8, u32),
    /// AMQP timestamp, seconds since 1970.
    Timestamp(u64),
    /// AMQP byte array. JSON: base64.
    Bytes(#[serde(with = "base64_bytes")] Vec<u8>),
    /// AMQP long string that is not UTF-8. JSON: base64.
    Binary(#[serde(with = "base64_bytes")] Vec<u8>),
    /// AMQP array.
    Array(#[serde(with = "values")] Vec<HeaderValue>),
    /// AMQP field table.
    Table(Headers),
    /// AMQP void.
    Void,
}

impl HeaderValue {
    /// The value as text, where it is a string of some kind.
    #[must_use]
    pub fn as_str(&self) -> Option<&str> {
        match self {
            Self::Text(s) | Self::Short(s) => Some(s),
            _ => None,
        }
    }

    /// The value as text, where it has an obvious one: strings, integers and booleans.
    #[must_use]
    pub fn to_text(&self) -> Option<Cow<'_, str>> {
        Some(match self {
            Self::Text(s) | Self::Short(s) => Cow::Borrowed(s),
            Self::Bool(v) => v.to_string().into(),
            Self::Int8(v) => v.to_string().into(),
            Self::Uint8(v) => v.to_string().into(),
            Self::Int16(v) => v.to_string().into(),
            Self::Uint16(v) => v.to_string().into(),
            Self::Int32(v) => v.to_string().into(),
            Self::Uint32(v) => v.to_string().into(),
            Self::Int64(v) => v.to_string().into(),
            Self::Timestamp(v) => v.to_string().into(),
            Self::Float32(v) => f32::from_bits(*v).to_string().into(),
            Self::Float64(v) => f64::from_bits(*v).to_string().into(),
            Self::Decimal(..)
            | Self::Bytes(_)
            | Self::Binary(_)
            | Self::Array(_)
            | Self::Table(_)
            | Self::Void => return None,
        })
    }
}

impl From<&str> for HeaderValue {
    fn from(value: &str) -> Self {
        Self::Text(value.to_owned())
    }
}

impl From<String> for HeaderValue {
    fn from(value: String) -> Self {
        Self::Text(value)
    }
}

/// Headers in the order received; a name may repeat and keeps its case.
///
/// AMQP's fourteen properties are kept here too, their names marked by a leading colon
/// (`:content_type`, `:priority` …). A table entry whose own name begins with a colon gets a
/// second one, so the two never meet.
///
/// As JSON: an object; a repeated name has an object `{"many": [ … ]}`.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Headers(Vec<(Box<str>, HeaderValue)>);

impl Headers {
    /// No headers; allocates nothing.
    #[must_use]
    pub const fn new() -> Self {
        Self(Vec::new())
    }

    /// Whether there are none.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// How many values there are, repeated names counted each time.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.0.len()
    }

    /// Adds a value behind those that are there.
    pub fn push(&mut self, name: impl Into<Box<str>>, value: impl Into<HeaderValue>) {
        self.0.push((name.into(), value.into()));
    }

    /// Sets a value, in place of every one of that name.
    pub fn set(&mut self, name: &str, value: impl Into<HeaderValue>) {
        self.0.retain(|(n, _)| !n.eq_ignore_ascii_case(name));
        self.push(name, value);
    }

    /// The first value of that name, ASCII case ignored.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&HeaderValue> {
        self.0.iter().find(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, v)| v)
    }

    /// The first value of that name as text.
    #[must_use]
    pub fn get_str(&self, name: &str) -> Option<&str> {
        self.get(name)?.as_str()
    }

    /// All of them, in order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &HeaderValue)> {
        self.0.iter().map(|(n, v)| (&**n, v))
    }

    /// About how many bytes they take: names and text; other values count for 16 each.
    #[must_use]
    pub fn weight(&self) -> usize {
        self.0.iter().map(|(name, value)| name.len() + value.as_str().map_or(16, str::len)).sum()
    }

    /// `Content-Type` (NATS, HTTP) or the `content_type` property (AMQP).
    #[must_use]
    pub fn content_type(&self) -> Option<&str> {
        self.get_str(":content_type").or_else(|| self.get_str("content-type"))
    }

    /// The JSON the log keeps.
    #[must_use]
    pub fn to_json(&self) -> Cow<'static, str> {
        if self.is_empty() {
            return Cow::Borrowed("{}");
        }
        serde_json::to_string(self).map_or(Cow::Borrowed("{}"), Cow::Owned)
    }

    /// Reads what [`to_json`](Self::to_json) wrote.
    ///
    /// # Errors
    /// Where the text is not such JSON.
    pub fn from_json(json: &str) -> Result<Self, serde_json::Error> {
        if json == "{}" { Ok(Self::new()) } else { serde_json::from_str(json) }
    }
}

impl FromIterator<(Box<str>, HeaderValue)> for Headers {
    fn from_iter<I: IntoIterator<Item = (Box<str>, HeaderValue)>>(iter: I) -> Self {
        Self(iter.into_iter().collect())
    }
}

impl Serialize for Headers {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        // Values by name, names in the order of their first value. By hash, since nothing bounds
        // how many headers a publisher sends.
        let mut places = FxHashMap::default();
        let mut names: Vec<(&str, Vec<ValueRef<'_>>)> = Vec::with_capacity(self.0.len());
        for (name, value) in &self.0 {
            let place = *places.entry(&**name).or_insert_with(|| {
                names.push((name, Vec::with_capacity(1)));
                names.len() - 1
            });
            names[place].1.push(ValueRef(value));
        }
        let mut map = serializer.serialize_map(Some(names.len()))?;
        for (name, values) in names {
            match values.as_slice() {
                [value] => map.serialize_entry(name, value)?,
                many => map.serialize_entry(name, &BTreeMap::from([("many", many)]))?,
            }
        }
        map.end()
    }
}

impl<'de> Deserialize<'de> for Headers {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Headers;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of headers")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Headers, A::Error> {
                let mut headers = Headers::new();
                while let Some(name) = map.next_key::<Box<str>>()? {
                    match map.next_value::<OneOrMany>()? {
                        OneOrMany::Many { many } => {
                            for value in many {
                                headers.push(name.clone(), HeaderValue::from(value));
                            }
                        }
                        OneOrMany::One(value) => headers.push(name, HeaderValue::from(value)),
                    }
                }
                Ok(headers)
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    Many { many: Vec<Value> },
    One(Value),
}

/// A value in its JSON form, being written: text bare, the rest tagged.
struct ValueRef<'a>(&'a HeaderValue);

impl Serialize for ValueRef<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.0 {
            HeaderValue::Text(text) => serializer.serialize_str(text),
            // Left to serde it would be the bare string "void", which is a text.
            HeaderValue::Void => {
                let mut map = serializer.serialize_map(Some(1))?;
                map.serialize_entry("void", &())?;
                map.end()
            }
            other => other.serialize(serializer),
        }
    }
}

/// The same, being read.
#[derive(Deserialize)]
#[serde(untagged)]
enum Value {
    Text(String),
    Tagged(HeaderValue),
}

impl From<Value> for HeaderValue {
    fn from(value: Value) -> Self {
        match value {
            Value::Text(text) => Self::Text(text),
            Value::Tagged(value) => value,
        }
    }
}

mod values {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    use super::{HeaderValue, Value, ValueRef};

    pub(super) fn serialize<S: Serializer>(v: &[HeaderValue], s: S) -> Result<S::Ok, S::Error> {
        v.iter().map(ValueRef).collect::<Vec<_>>().serialize(s)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        d: D,
    ) -> Result<Vec<HeaderValue>, D::Error> {
        Ok(Vec::<Value>::deserialize(d)?.into_iter().map(HeaderValue::from).collect())
    }
}

mod base64_bytes {
    use base64::Engine as _;
    use serde::{Deserialize, Deserializer, Serializer, de};

    use super::BASE64;

    pub(super) fn serialize<S: Serializer>(v: &[u8], s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(&BASE64.encode(v))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Vec<u8>, D::Error> {
        BASE64.decode(String::deserialize(d)?).map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn G9_every_type_survives_json() {
        let mut table = Headers::new();
        table.push("deep", HeaderValue::Array(vec!["x".into(), HeaderValue::Void]));
        let mut headers = Headers::new();
        headers.push(":priority", HeaderValue::Uint8(3));
        headers.push("Trace", "a");
        headers.push("n", HeaderValue::Float64(f64::NAN.to_bits()));
        headers.push("Trace", "b");
        headers.push("d", HeaderValue::Decimal(2, 100));
        headers.push("b", HeaderValue::Bytes(vec![0, 255]));
        headers.push("t", HeaderValue::Table(table));
        headers.push("s", HeaderValue::Short("s".into()));
        let json = headers.to_json();
        let back = Headers::from_json(&json).unwrap();
        let sorted = |h: &Headers| {
            let mut all: Vec<_> = h.iter().map(|(n, v)| (n.to_owned(), v.clone())).collect();
            all.sort_by(|a, b| a.0.cmp(&b.0));
            all
        };
        assert_eq!(sorted(&back), sorted(&headers), "{json}");
    }

    #[test]
    fn the_json_of_one_value_is_the_value() {
        let mut headers = Headers::new();
        headers.push("a", "b");
        headers.push("many", "c");
        headers.push("void", HeaderValue::Void);
        assert_eq!(headers.to_json(), r#"{"a":"b","many":"c","void":{"void":null}}"#);
        assert_eq!(Headers::from_json(&headers.to_json()).unwrap(), headers);
    }

    #[test]
    fn names_are_found_whatever_their_case() {
        let mut headers = Headers::new();
        headers.push("Nats-Msg-Id", "1");
        assert_eq!(headers.get_str("nats-msg-id"), Some("1"));
        headers.set("NATS-MSG-ID", "2");
        assert_eq!(headers.len(), 1);
    }
}
