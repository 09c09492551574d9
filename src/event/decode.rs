//! Message in, event out, or the reason why not.
use super::{Event, Expr, Format, Message};
use std::sync::Arc;

/// How a source's messages are read. The defaults suit any JSON.
#[derive(Debug, Clone)]
pub struct DecoderOptions {
    /// Pins one format; `None` recognises it.
    pub format: Option<Format>,
    /// The CloudEvents `source` of events that do not say theirs; `None`: `/`.
    pub event_source: Option<Arc<str>>,
    /// Where the key is, first that resolves.
    pub key: Vec<Expr>,
    /// Where the type of raw events is, first that resolves; empty: the subject.
    pub type_from: Vec<Expr>,
    /// Quarantine what has no id, in place of giving it a random one.
    pub require_id: bool,
    /// Largest body, in bytes. Default 1 MiB.
    pub max_event_bytes: usize,
}

/// Turns messages into events.
#[derive(Debug, Clone)]
pub struct Decoder {
    _options: DecoderOptions,
}

impl Decoder {
    /// A decoder with these options.
    #[must_use]
    pub fn new(options: DecoderOptions) -> Self {
        Self { _options: options }
    }

    /// Decodes a message.
    ///
    /// # Errors
    /// Where it is no event: the message itself, with the reason.
    pub fn decode(&self, message: Message) -> Result<Event, NotAnEvent> {
        Err(NotAnEvent { message: Box::new(message), reason: Reason::Empty })
    }
}

/// A message that is no event.
#[derive(Debug)]
pub struct NotAnEvent {
    /// The message, untouched.
    pub message: Box<Message>,
    /// Why.
    pub reason: Reason,
}

/// Why a message is no event.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Reason {
    /// No bytes.
    #[error("the body is empty")]
    Empty,
}

pub(super) fn attribute(_event: &Event, _name: &str) -> Option<String> {
    None
}
