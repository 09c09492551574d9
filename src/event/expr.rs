//! Where in a message a value is found.
use std::str::FromStr;

/// An entry of `key` and `type_from`: a JSON pointer into `data()`, `header:NAME`, `token:N` of
/// the subject or routing key (from 1), or `subject` (the whole of it).
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
#[error("`{0}` is neither a JSON pointer (/a/b), header:NAME, token:N nor subject")]
pub struct ParseExprError(String);

impl FromStr for Expr {
    type Err = ParseExprError;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        Err(ParseExprError(s.to_owned()))
    }
}
