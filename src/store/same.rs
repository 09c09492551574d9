//! Whether two events are copies of each other (S4) or in conflict (S5).

use std::borrow::Cow;

use sha2::{Digest as _, Sha256};

use crate::event::{Event, Format};

/// What is left of an event's type and data when it is removed: for copies the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Fingerprint(pub(super) i64);

/// The fingerprint of an event: that of two events is the same where [`difference`] finds none.
pub(super) fn fingerprint(event: &Event) -> Fingerprint {
    let mut hash = Sha256::new();
    text(&mut hash, b'k', event.kind());
    let data = event.data();
    match Parser::document(data) {
        Some(value) => {
            value.hash(&mut hash);
            if value == Json::Null
                && let Some(binary) = binary_data(event)
            {
                text(&mut hash, b'b', &binary);
            }
        }
        None => text(&mut hash, b'?', data),
    }
    let digest: [u8; 32] = hash.finalize().into();
    let mut part = [0; 8];
    part.copy_from_slice(&digest[..8]);
    Fingerprint(i64::from_be_bytes(part))
}

/// With a letter for what it is, and its length, so that no two values are hashed alike.
fn text(hash: &mut Sha256, kind: u8, text: &str) {
    hash.update([kind]);
    hash.update((text.len() as u64).to_be_bytes());
    hash.update(text.as_bytes());
}

/// What the second of two events with the same source and id differs in; `None` for a copy.
pub(super) fn difference(first: &Event, second: &Event) -> Option<&'static str> {
    if first.kind() != second.kind() {
        Some("type")
    } else if same_data(first, second) {
        None
    } else {
        Some("data")
    }
}

/// Whether both carry the same data, as a JSON value: whitespace, the order of members, the way
/// a string is escaped and a number is written make no difference.
fn same_data(first: &Event, second: &Event) -> bool {
    if first.format() == second.format() && first.body() == second.body() {
        return true;
    }
    let (a, b) = (first.data(), second.data());
    same_json(a, b) && (a != "null" || binary_data(first) == binary_data(second))
}

/// CloudEvents 1.0 JSON format, section 3.1: data that is not JSON travels as `data_base64`.
fn binary_data(event: &Event) -> Option<Cow<'_, str>> {
    if event.format() != Format::CloudeventsStructured {
        return None;
    }
    let Some(Json::Object(members)) = Parser::document(event.body_str()) else { return None };
    members.into_iter().find_map(|(name, value)| match value {
        Json::Text(text) if name == "data_base64" => Some(text),
        _ => None,
    })
}

fn same_json(a: &str, b: &str) -> bool {
    if a == b {
        return true;
    }
    match (Parser::document(a), Parser::document(b)) {
        (Some(a), Some(b)) => a == b,
        // What cannot be compared as a value is the same only as text.
        _ => false,
    }
}

/// A JSON value in a form in which equal values are equal.
#[derive(Debug, PartialEq)]
enum Json<'a> {
    Null,
    Bool(bool),
    Number(Number<'a>),
    Text(Cow<'a, str>),
    /// A string that is no Unicode text (a lone surrogate), as it was written.
    Unpaired(&'a str),
    Array(Vec<Json<'a>>),
    /// Sorted by name. Repeated names are kept, in their order: what such an object means is
    /// undefined (RFC 8259, section 4), so nothing is assumed about it.
    Object(Vec<(Cow<'a, str>, Json<'a>)>),
}

impl Json<'_> {
    fn hash(&self, hash: &mut Sha256) {
        match self {
            Self::Null => hash.update(b"n"),
            Self::Bool(false) => hash.update(b"f"),
            Self::Bool(true) => hash.update(b"t"),
            Self::Number(Number::Zero) => hash.update(b"0"),
            Self::Number(Number::Decimal { negative, digits, exponent }) => {
                text(hash, if *negative { b'-' } else { b'+' }, digits);
                hash.update(exponent.to_be_bytes());
            }
            Self::Number(Number::Verbatim(number)) => text(hash, b'v', number),
            Self::Text(string) => text(hash, b's', string),
            Self::Unpaired(string) => text(hash, b'u', string),
            Self::Array(items) => {
                hash.update(b"[");
                hash.update((items.len() as u64).to_be_bytes());
                for item in items {
                    item.hash(hash);
                }
            }
            Self::Object(members) => {
                hash.update(b"{");
                hash.update((members.len() as u64).to_be_bytes());
                for (name, value) in members {
                    text(hash, b'm', name);
                    value.hash(hash);
                }
            }
        }
    }
}

/// A number as exact decimal: `0.digits × 10^exponent`. `f64` would make 2^53 and 2^53+1 the
/// same, and has no 1e400.
#[derive(Debug, PartialEq)]
enum Number<'a> {
    Zero,
    Decimal {
        negative: bool,
        digits: Cow<'a, str>,
        exponent: i64,
    },
    /// Its exponent is beyond all reason; as it was written.
    Verbatim(&'a str),
}

impl<'a> Number<'a> {
    fn parse(text: &'a str) -> Self {
        let (negative, rest) = match text.strip_prefix('-') {
            Some(rest) => (true, rest),
            None => (false, text),
        };
        let (mantissa, exponent) = match rest.split_once(['e', 'E']) {
            Some((mantissa, exponent)) => {
                match exponent.strip_prefix('+').unwrap_or(exponent).parse::<i64>() {
                    Ok(exponent) => (mantissa, exponent),
                    Err(_) if mantissa.bytes().all(|b| matches!(b, b'0' | b'.')) => (mantissa, 0),
                    Err(_) => return Self::Verbatim(text),
                }
            }
            None => (rest, 0),
        };
        let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
        let all: Cow<'a, str> = if fraction.is_empty() {
            Cow::Borrowed(whole)
        } else {
            Cow::Owned([whole, fraction].concat())
        };
        let leading = all.bytes().take_while(|b| *b == b'0').count();
        if leading == all.len() {
            return Self::Zero;
        }
        let end = all.trim_end_matches('0').len();
        let digits = match all {
            Cow::Borrowed(text) => Cow::Borrowed(&text[leading..end]),
            Cow::Owned(text) => Cow::Owned(text[leading..end].to_owned()),
        };
        let point = i64::try_from(whole.len()).ok().zip(i64::try_from(leading).ok());
        match point.and_then(|(whole, leading)| exponent.checked_add(whole - leading)) {
            Some(exponent) => Self::Decimal { negative, digits, exponent },
            None => Self::Verbatim(text),
        }
    }
}

/// Deeper than any event may be ([`MAX_DEPTH`](crate::event::MAX_DEPTH)).
const MAX_DEPTH: usize = 256;

/// Reads JSON that has been checked before; of anything else it says `None`.
struct Parser<'a> {
    text: &'a str,
    at: usize,
}

impl<'a> Parser<'a> {
    fn document(text: &'a str) -> Option<Json<'a>> {
        let mut parser = Self { text, at: 0 };
        let value = parser.value(0)?;
        parser.space();
        (parser.at == text.len()).then_some(value)
    }

    fn peek(&self) -> Option<u8> {
        self.text.as_bytes().get(self.at).copied()
    }

    fn space(&mut self) {
        while let Some(b' ' | b'\t' | b'\r' | b'\n') = self.peek() {
            self.at += 1;
        }
    }

    fn eat(&mut self, byte: u8) -> Option<()> {
        self.space();
        (self.peek()? == byte).then(|| self.at += 1)
    }

    fn word(&mut self, word: &str, value: Json<'a>) -> Option<Json<'a>> {
        self.text.get(self.at..)?.starts_with(word).then(|| {
            self.at += word.len();
            value
        })
    }

    fn value(&mut self, depth: usize) -> Option<Json<'a>> {
        if depth > MAX_DEPTH {
            return None;
        }
        self.space();
        match self.peek()? {
            b'n' => self.word("null", Json::Null),
            b't' => self.word("true", Json::Bool(true)),
            b'f' => self.word("false", Json::Bool(false)),
            b'"' => self.string(),
            b'[' => {
                self.at += 1;
                let mut items = Vec::new();
                if self.eat(b']').is_some() {
                    return Some(Json::Array(items));
                }
                loop {
                    items.push(self.value(depth + 1)?);
                    if self.eat(b',').is_none() {
                        self.eat(b']')?;
                        return Some(Json::Array(items));
                    }
                }
            }
            b'{' => {
                self.at += 1;
                let mut members = Vec::new();
                if self.eat(b'}').is_some() {
                    return Some(Json::Object(members));
                }
                loop {
                    self.space();
                    let name = match self.string()? {
                        Json::Text(name) => name,
                        Json::Unpaired(name) => Cow::Borrowed(name),
                        _ => return None,
                    };
                    self.eat(b':')?;
                    members.push((name, self.value(depth + 1)?));
                    if self.eat(b',').is_none() {
                        self.eat(b'}')?;
                        members.sort_by(|a, b| a.0.cmp(&b.0));
                        return Some(Json::Object(members));
                    }
                }
            }
            b'-' | b'0'..=b'9' => {
                let start = self.at;
                while let Some(b'-' | b'+' | b'.' | b'e' | b'E' | b'0'..=b'9') = self.peek() {
                    self.at += 1;
                }
                Some(Json::Number(Number::parse(&self.text[start..self.at])))
            }
            _ => None,
        }
    }

    fn string(&mut self) -> Option<Json<'a>> {
        let start = self.at;
        self.eat(b'"')?;
        let mut escaped = false;
        loop {
            match self.peek()? {
                b'"' => break,
                b'\\' => {
                    escaped = true;
                    self.at += 2;
                }
                _ => self.at += 1,
            }
        }
        self.at += 1;
        let raw = self.text.get(start..self.at)?;
        Some(if escaped {
            serde_json::from_str::<String>(raw)
                .map_or(Json::Unpaired(raw), |text| Json::Text(text.into()))
        } else {
            Json::Text(Cow::Borrowed(&raw[1..raw.len() - 1]))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::{EventParts, Headers, Origin};
    use proptest::prelude::*;
    use serde_json::Value;

    #[test]
    fn S4_the_same_value_written_otherwise_is_the_same() {
        for (a, b) in [
            ("{\"a\":1,\"b\":[true,null]}", " { \"b\" : [ true , null ] ,\n\"a\":1 } "),
            ("\"caf\\u00e9\"", "\"café\""),
            ("\"\\ud83d\\ude00\"", "\"😀\""),
            ("100", "1e2"),
            ("1.0", "1"),
            ("-0.0", "0"),
            ("0e99999999999999999999", "0"),
            ("1e400", "10E+399"),
            ("0.00120", "12e-4"),
            ("123456789012345678901234567890", "123456789012345678901234567890.0"),
            ("[\"\\ud800\"]", "[ \"\\ud800\" ]"),
        ] {
            assert!(same_json(a, b), "{a} and {b}");
            assert_eq!(of(a), of(b), "{a} and {b}");
        }
    }

    #[test]
    fn S5_another_value_is_another() {
        for (a, b) in [
            ("1", "2"),
            ("1", "-1"),
            ("1", "\"1\""),
            ("9007199254740992", "9007199254740993"),
            ("1e400", "1e401"),
            ("1e99999999999999999999", "1e99999999999999999998"),
            ("{\"a\":1,\"a\":2}", "{\"a\":2}"),
            ("{\"a\":1,\"a\":2}", "{\"a\":2,\"a\":1}"),
            ("[1,2]", "[2,1]"),
            ("null", "{}"),
            ("[]", "{}"),
            ("\"\\ud800\"", "\"\\udc00\""),
            ("\"\\u0000\"", "\"\""),
        ] {
            assert!(!same_json(a, b), "{a} and {b}");
            assert_ne!(of(a), of(b), "{a} and {b}");
        }
    }

    /// The fingerprint of an event with this body.
    fn of(body: &str) -> Fingerprint {
        fingerprint(&raw("t", body))
    }

    fn raw(kind: &str, body: &str) -> Event {
        Event::from_parts(EventParts {
            id: "1".into(),
            source: "/".into(),
            kind: kind.into(),
            subject: None,
            time: None,
            key: "k".into(),
            format: Format::Raw,
            headers: Headers::new(),
            origin: Origin::default(),
            body: body.to_owned().into(),
        })
    }

    #[test]
    fn S14_a_fingerprint_is_of_type_and_data_and_the_same_in_every_version() {
        assert_ne!(fingerprint(&raw("a", "1")), fingerprint(&raw("b", "1")));
        // Kept in databases: it must never change.
        let value = "{\"a\":[1.50,null,true,\"x\"]}";
        assert_eq!(of(value), Fingerprint(-1_016_001_350_411_516_968));
    }

    fn json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<String>().prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 32, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::btree_map(any::<String>(), inner, 0..4)
                    .prop_map(|map| Value::Object(map.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn S4_spacing_never_matters(value in json()) {
            let tight = serde_json::to_string(&value).unwrap();
            let wide = serde_json::to_string_pretty(&value).unwrap();
            prop_assert!(same_json(&tight, &wide));
            prop_assert_eq!(of(&tight), of(&wide));
        }

        #[test]
        fn S5_values_are_compared_as_serde_compares_them(a in json(), b in json()) {
            prop_assert_eq!(same_json(&a.to_string(), &b.to_string()), a == b);
            prop_assert_eq!(of(&a.to_string()) == of(&b.to_string()), a == b);
        }

        #[test]
        fn any_text_at_all_is_no_panic(a: String, b in "[\\[\\]{}\",:\\\\0-9eE.+-]{0,40}") {
            let _ = same_json(&a, &b);
            prop_assert!(same_json(&b, &b));
        }
    }
}
