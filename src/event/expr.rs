//! Where in a message a value is found.

use std::{borrow::Cow, fmt, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use super::{
    Headers,
    scan::{self, Scalar},
};

/// An entry of `key` and `type_from`: a JSON pointer into `data()`, `header:NAME`, `token:N` of
/// the subject or routing key (from 1), or `subject` (the whole of it).
///
/// An AMQP property is a header with a leading colon: `header::type`. As JSON and TOML: the
/// same text.
///
/// ```
/// use pulsebus::event::{Expr, Headers};
///
/// let key: Expr = "/lesson/id".parse()?;
/// let (data, headers) = (r#"{"lesson": {"id": 7}}"#, Headers::new());
/// assert_eq!(key.resolve(data, &headers, "edu.lessons").as_deref(), Some("7"));
/// assert_eq!("token:2".parse::<Expr>()?.to_string(), "token:2");
/// # Ok::<(), pulsebus::event::ParseExprError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Expr {
    /// RFC 6901 pointer into `data()`.
    Pointer(Box<str>),
    /// A header, ASCII case ignored.
    Header(Box<str>),
    /// The Nth dot-separated token, from 1.
    Token(usize),
    /// The whole NATS subject or AMQP routing key.
    Subject,
}

/// Why a text is no [`Expr`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is neither a JSON pointer (/a/b), header:NAME, token:N (from 1) nor subject")]
pub struct ParseExprError(String);

impl Expr {
    /// The value, as text. `None` where there is none, where it is empty, `null`, an object or an
    /// array, or where it is no text (half of a surrogate pair, an AMQP table).
    ///
    /// Numbers and booleans have the text they were written with: `1.0` and `1` differ.
    #[must_use]
    pub fn resolve<'a>(
        &self,
        data: &'a str,
        headers: &'a Headers,
        subject: &'a str,
    ) -> Option<Cow<'a, str>> {
        match self {
            Self::Pointer(path) => Scalar::of(scan::pointer(data, path)?).into_text(),
            Self::Header(name) => headers.get(name)?.to_text(),
            Self::Token(n) => subject.split('.').nth(n.checked_sub(1)?).map(Cow::Borrowed),
            Self::Subject => Some(Cow::Borrowed(subject)),
        }
        .filter(|text| !text.is_empty())
    }
}

impl FromStr for Expr {
    type Err = ParseExprError;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        let parsed = if s.starts_with('/') {
            is_pointer(s).then(|| Self::Pointer(s.into()))
        } else if let Some(name) = s.strip_prefix("header:") {
            (!name.is_empty()).then(|| Self::Header(name.into()))
        } else if let Some(n) = s.strip_prefix("token:") {
            n.parse().ok().filter(|n| *n > 0).map(Self::Token)
        } else {
            (s == "subject").then_some(Self::Subject)
        };
        parsed.ok_or_else(|| ParseExprError(s.to_owned()))
    }
}

/// RFC 6901 section 3: a tilde stands before 0 or 1 only.
fn is_pointer(s: &str) -> bool {
    s.split('~').skip(1).all(|rest| rest.starts_with(['0', '1']))
}

impl fmt::Display for Expr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pointer(path) => f.write_str(path),
            Self::Header(name) => write!(f, "header:{name}"),
            Self::Token(n) => write!(f, "token:{n}"),
            Self::Subject => f.write_str("subject"),
        }
    }
}

impl Serialize for Expr {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Expr {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Cow::<'de, str>::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

impl schemars::JsonSchema for Expr {
    fn schema_name() -> Cow<'static, str> {
        "Expr".into()
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({
            "type": "string",
            "description": "A JSON pointer (/a/b) into the data, header:NAME, token:N of the subject or routing key (from 1), or subject.",
            "pattern": "^(/([^~]|~[01])*|header:.+|token:[1-9][0-9]*|subject)$",
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::event::HeaderValue;

    fn any_expr() -> impl Strategy<Value = Expr> {
        prop_oneof![
            "(/([^~]|~[01]){0,8}){1,4}".prop_map(|s| Expr::Pointer(s.into())),
            ".{1,20}".prop_map(|s| Expr::Header(s.into())),
            (1..usize::MAX).prop_map(Expr::Token),
            Just(Expr::Subject),
        ]
    }

    proptest! {
        #[test]
        fn what_is_displayed_parses_back(expr in any_expr()) {
            prop_assert_eq!(&expr.to_string().parse::<Expr>().unwrap(), &expr);
            let json = serde_json::to_string(&expr).unwrap();
            prop_assert_eq!(serde_json::from_str::<Expr>(&json).unwrap(), expr);
        }

        #[test]
        fn what_parses_is_displayed_as_it_was(text in "(/|header:|token:|subject)?.{0,8}") {
            if let Ok(expr) = text.parse::<Expr>() {
                prop_assert_eq!(expr.to_string().parse::<Expr>().unwrap(), expr);
            }
        }

        #[test]
        fn nothing_panics(expr in any_expr(), data in ".{0,40}", subject in ".{0,20}") {
            let _ = expr.resolve(&data, &Headers::new(), &subject);
        }
    }

    #[test]
    fn nonsense_is_refused() {
        for text in ["", "a", "/a~", "/a~2", "header:", "token:0", "token:", "token:-1", "Subject"]
        {
            let error = text.parse::<Expr>().unwrap_err();
            assert!(error.to_string().contains(&format!("`{text}`")));
        }
    }

    #[test]
    fn values_are_found() {
        let mut headers = Headers::new();
        headers.push("Tenant", "t1");
        headers.push(":priority", HeaderValue::Uint8(3));
        headers.push("table", HeaderValue::Table(Headers::new()));
        let data = r#"{"a":{"b":["x", 1e400]},"n":null,"o":{},"e":"","t":true,"h":"\ud800"}"#;
        for (expr, expected) in [
            ("/a/b/0", Some("x")),
            ("/a/b/1", Some("1e400")),
            ("/t", Some("true")),
            ("/n", None),
            ("/o", None),
            ("/e", None),
            ("/h", None),
            ("/missing", None),
            ("header:tenant", Some("t1")),
            ("header::priority", Some("3")),
            ("header:table", None),
            ("header:missing", None),
            ("token:1", Some("edu")),
            ("token:3", Some("42")),
            ("token:4", None),
            ("subject", Some("edu.lessons.42")),
        ] {
            let found = expr.parse::<Expr>().unwrap();
            let found = found.resolve(data, &headers, "edu.lessons.42");
            assert_eq!(found.as_deref(), expected, "{expr}");
        }
        assert_eq!(Expr::Subject.resolve("{}", &headers, ""), None);
        assert_eq!(Expr::Token(0).resolve("{}", &headers, "a"), None);
    }
}
