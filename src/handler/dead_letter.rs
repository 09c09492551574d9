//! Where dead letters are also published: for those who look at a queue rather than at pulsebus.
//!
//! The message is the event as `forward` would publish it, byte for byte with its headers and its
//! id, and with these headers in addition:
//!
//! | header | |
//! |---|---|
//! | `pulsebus-dead-handler` | whose dead letter it is |
//! | `pulsebus-dead-position` | the event's position in the log |
//! | `pulsebus-dead-reason` | `rejected`, or `attempts exhausted` |
//! | `pulsebus-dead-error`, `pulsebus-dead-first-error` | why it failed the last time, and the first |
//! | `pulsebus-dead-attempts` | how often it was tried |
//! | `pulsebus-dead-at`, `pulsebus-dead-first-at` | when it failed last, and first: RFC 3339, UTC |
//!
//! In JetStream, publish them to a stream of their own: within the duplicate window a stream that
//! has the event itself takes its dead letter, which has the same id, for a copy of it.

use std::{fmt, sync::Arc};

use async_trait::async_trait;
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use super::{
    Outcome,
    forward::{ForwardHandler, ForwardOptions},
    template::ParseTemplateError,
};
use crate::{event::StoredEvent, transport::Publisher};

/// A dead letter, as its destination is told of it.
#[derive(Debug, Clone)]
pub struct DeadEvent {
    /// The event.
    pub event: Arc<StoredEvent>,
    /// Whether the handler has rejected it, rather than spent its attempts.
    pub rejected: bool,
    /// How often it was tried.
    pub attempts: u32,
    /// Why it failed the first time.
    pub first_error: Arc<str>,
    /// Why it failed the last time.
    pub last_error: Arc<str>,
    /// When it failed first.
    pub first_failed_at: OffsetDateTime,
    /// When it failed last.
    pub last_failed_at: OffsetDateTime,
}

/// Where dead letters are also published.
#[async_trait]
pub trait DeadLetterDestination: Send + Sync + fmt::Debug {
    /// Publishes dead letters, one outcome each, in order: done only where the destination has
    /// confirmed it, and rejected where it never will.
    async fn publish(&self, letters: &[DeadEvent]) -> Vec<Outcome>;
}

/// Publishes dead letters to a transport.
#[derive(Debug)]
pub struct DeadLetterForward {
    forward: ForwardHandler,
    handler: Arc<str>,
}

impl DeadLetterForward {
    /// Publishes those of this handler with this publisher; the templates of the options may
    /// hold `{handler}` as well. The publisher is closed by whoever opened it.
    ///
    /// # Errors
    /// Where a template is wrong, or can give nothing that fits its place.
    pub fn new(
        handler: impl Into<Arc<str>>,
        publisher: Arc<dyn Publisher>,
        options: ForwardOptions,
    ) -> Result<Self, ParseTemplateError> {
        let handler = handler.into();
        let forward = ForwardHandler::new(&*handler, publisher, options)?;
        Ok(Self { forward, handler })
    }
}

#[async_trait]
impl DeadLetterDestination for DeadLetterForward {
    async fn publish(&self, letters: &[DeadEvent]) -> Vec<Outcome> {
        let messages = letters.iter().map(|letter| {
            let mut message = self.forward.outbound(&letter.event)?;
            for (name, value) in headers(&self.handler, letter) {
                message.headers.push(name, value);
            }
            Ok(message)
        });
        self.forward.publish_all(messages.collect()).await
    }
}

/// The longest error a header holds, in bytes: brokers bound headers.
const MAX_ERROR: usize = 1_000;

fn headers(handler: &str, letter: &DeadEvent) -> [(&'static str, String); 8] {
    let reason = if letter.rejected { "rejected" } else { "attempts exhausted" };
    [
        ("pulsebus-dead-handler", handler.to_owned()),
        ("pulsebus-dead-position", letter.event.position.to_string()),
        ("pulsebus-dead-reason", reason.to_owned()),
        ("pulsebus-dead-error", one_line(&letter.last_error)),
        ("pulsebus-dead-first-error", one_line(&letter.first_error)),
        ("pulsebus-dead-attempts", letter.attempts.to_string()),
        ("pulsebus-dead-at", rfc3339(letter.last_failed_at)),
        ("pulsebus-dead-first-at", rfc3339(letter.first_failed_at)),
    ]
}

/// Text that any broker takes as a header: on one line, and not too long.
fn one_line(text: &str) -> String {
    let mut line: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    if line.len() > MAX_ERROR {
        let end = (0..=MAX_ERROR).rev().find(|at| line.is_char_boundary(*at)).unwrap_or(0);
        line.truncate(end);
        line.push('…');
    }
    line
}

fn rfc3339(at: OffsetDateTime) -> String {
    // Fails only for years beyond 9999, which have no RFC 3339.
    at.format(&Rfc3339).unwrap_or_else(|_| at.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_of_any_kind_fits_a_header() {
        assert_eq!(one_line("a\r\nb\0"), "a  b ");
        let long = one_line(&"ä".repeat(1_000));
        assert!(long.len() <= MAX_ERROR + 3 && long.ends_with('…'));
    }
}
