//! JSON pointers (RFC 6901) into JSON text, without building a tree.
//!
//! Values are found as the text they were published as: an id of 30 digits stays 30 digits.

use std::{borrow::Cow, fmt, str::FromStr};

use serde::{
    Deserializer,
    de::{DeserializeSeed, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor},
};
use serde_json::value::RawValue;

/// A parsed JSON pointer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Pointer {
    text: Box<str>,
    tokens: Box<[Box<str>]>,
}

/// Why a text is no JSON pointer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no JSON pointer: expected something like /lesson_id or /author/name")]
pub struct ParsePointerError(Box<str>);

impl FromStr for Pointer {
    type Err = ParsePointerError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = || ParsePointerError(text.into());
        let tokens = match text.strip_prefix('/') {
            Some(rest) => rest.split('/').map(unescape).collect::<Option<_>>().ok_or_else(error)?,
            None if text.is_empty() => Box::default(),
            None => return Err(error()),
        };
        Ok(Self { text: text.into(), tokens })
    }
}

impl fmt::Display for Pointer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl Pointer {
    /// To a member of the top-level object.
    pub(crate) fn member(name: &str) -> Self {
        let text = format!("/{}", name.replace('~', "~0").replace('/', "~1")).into();
        Self { text, tokens: Box::new([name.into()]) }
    }

    /// The text of the value it points at; `None` where there is none. Where a member repeats,
    /// the last one counts, as for every other reader of JSON.
    pub(crate) fn find<'a>(&self, json: &'a str) -> Option<&'a str> {
        let mut value = json;
        for token in &self.tokens {
            value = step(value, token)?;
        }
        Some(value.trim())
    }
}

/// One reference token, `~1` and `~0` undone; `None` for any other `~`.
fn unescape(token: &str) -> Option<Box<str>> {
    let mut plain = String::with_capacity(token.len());
    let mut rest = token.chars();
    while let Some(c) = rest.next() {
        plain.push(match c {
            '~' => match rest.next()? {
                '0' => '~',
                '1' => '/',
                _ => return None,
            },
            other => other,
        });
    }
    Some(plain.into())
}

fn step<'a>(json: &'a str, token: &str) -> Option<&'a str> {
    let mut reader = serde_json::Deserializer::from_str(json);
    let found = match json.trim_start().as_bytes().first()? {
        b'{' => reader.deserialize_map(Member(token)),
        b'[' => reader.deserialize_seq(Element(index(token)?)),
        _ => return None,
    };
    found.ok().flatten().map(RawValue::get)
}

/// An array index as RFC 6901 spells it: no sign, no leading zero.
fn index(token: &str) -> Option<usize> {
    let canonical = token == "0" || !token.starts_with('0');
    (canonical && token.bytes().all(|b| b.is_ascii_digit())).then(|| token.parse().ok())?
}

struct Member<'t>(&'t str);

impl<'de> Visitor<'de> for Member<'_> {
    type Value = Option<&'de RawValue>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut found = None;
        while let Some(wanted) = map.next_key_seed(Is(self.0))? {
            if wanted {
                found = Some(map.next_value()?);
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        Ok(found)
    }
}

/// Whether a member's name is this one; compared as it is read, nothing is copied.
struct Is<'t>(&'t str);

impl<'de> DeserializeSeed<'de> for Is<'_> {
    type Value = bool;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<bool, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for Is<'_> {
    type Value = bool;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a member name")
    }

    fn visit_str<E: serde::de::Error>(self, name: &str) -> Result<bool, E> {
        Ok(name == self.0)
    }
}

struct Element(usize);

impl<'de> Visitor<'de> for Element {
    type Value = Option<&'de RawValue>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an array")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
        for _ in 0..self.0 {
            if seq.next_element::<IgnoredAny>()?.is_none() {
                return Ok(None);
            }
        }
        let found = seq.next_element()?;
        while seq.next_element::<IgnoredAny>()?.is_some() {}
        Ok(found)
    }
}

/// A string's content, or a number or boolean as it is written; `None` for `null`, objects,
/// arrays, and strings that no Unicode text can hold (`"\ud800"`).
pub(crate) fn scalar(json: &str) -> Option<Cow<'_, str>> {
    match json.as_bytes().first()? {
        b'"' => string(json).ok(),
        b'{' | b'[' | b'n' => None,
        _ => Some(Cow::Borrowed(json)),
    }
}

/// The elements of an array, as text; `None` where it is none.
pub(crate) fn elements(json: &str) -> Option<Vec<&str>> {
    if !json.starts_with('[') {
        return None;
    }
    let elements: Vec<&RawValue> = serde_json::from_str(json).ok()?;
    Some(elements.into_iter().map(RawValue::get).collect())
}

fn string(json: &str) -> Result<Cow<'_, str>, serde_json::Error> {
    struct Text;
    impl<'de> Visitor<'de> for Text {
        type Value = Cow<'de, str>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a string")
        }

        fn visit_borrowed_str<E: serde::de::Error>(self, v: &'de str) -> Result<Self::Value, E> {
            Ok(Cow::Borrowed(v))
        }

        fn visit_str<E: serde::de::Error>(self, v: &str) -> Result<Self::Value, E> {
            Ok(Cow::Owned(v.to_owned()))
        }
    }
    let mut reader = serde_json::Deserializer::from_str(json);
    let text = reader.deserialize_str(Text)?;
    reader.end().map_err(serde_json::Error::custom)?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn find<'a>(pointer: &str, json: &'a str) -> Option<&'a str> {
        pointer.parse::<Pointer>().unwrap().find(json)
    }

    #[test]
    fn finds_what_rfc_6901_says() {
        let json = r#" {"foo": ["bar", "baz"], "": 0, "a/b": 1, "m~n": 8, "k\u0022l": 6, "o": {"p": 1e400}} "#;
        assert_eq!(find("/foo", json), Some(r#"["bar", "baz"]"#));
        assert_eq!(find("/foo/0", json), Some(r#""bar""#));
        assert_eq!(find("/foo/1", json), Some(r#""baz""#));
        assert_eq!(find("/", json), Some("0"));
        assert_eq!(find("/a~1b", json), Some("1"));
        assert_eq!(find("/m~0n", json), Some("8"));
        assert_eq!(find("/k\"l", json), Some("6"));
        assert_eq!(find("/o/p", json), Some("1e400"));
        assert_eq!(find("", json), Some(json.trim()));
        for missing in ["/foo/2", "/foo/01", "/foo/+1", "/foo/-", "/nope", "/o/p/q", "/foo/0/x"] {
            assert_eq!(find(missing, json), None, "{missing}");
        }
    }

    #[test]
    fn a_member_is_found_whatever_its_name() {
        for name in ["a", "", "a/b", "m~n", "~1"] {
            let pointer = Pointer::member(name);
            assert_eq!(pointer.to_string().parse(), Ok(pointer.clone()));
            let json = serde_json::json!({ name: 1 }).to_string();
            assert_eq!(pointer.find(&json), Some("1"));
        }
    }

    #[test]
    fn the_last_of_a_repeated_member_counts() {
        assert_eq!(find("/a", r#"{"a": 1, "a": 2}"#), Some("2"));
    }

    #[test]
    fn refuses_what_is_no_pointer() {
        for text in ["a", "a/b", "/~", "/~2", " /a"] {
            assert!(text.parse::<Pointer>().is_err(), "{text}");
        }
    }

    #[test]
    fn scalars_keep_their_spelling() {
        assert_eq!(scalar("12345678901234567890123").as_deref(), Some("12345678901234567890123"));
        assert_eq!(scalar("1.0").as_deref(), Some("1.0"));
        assert_eq!(scalar("true").as_deref(), Some("true"));
        assert_eq!(scalar(r#""a\n\u00e9""#).as_deref(), Some("a\né"));
        for none in ["null", "{}", "[1]", r#""\ud800""#] {
            assert_eq!(scalar(none), None, "{none}");
        }
    }

    proptest! {
        #[test]
        fn no_text_and_no_pointer_panics(pointer in "(/[a-z0-9~]{0,4}){0,4}", json in ".{0,60}") {
            if let Ok(pointer) = pointer.parse::<Pointer>() {
                let _ = pointer.find(&json).map(|raw| (scalar(raw).is_some(), elements(raw)));
            }
        }
    }
}
