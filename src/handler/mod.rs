//! Handlers: what is done with the events in the log.
//!
//! Implement [`EventHandler`], register it with the bus under a name, and it gets every event
//! its filter lets through, at least once (G4), in log order per key (G5), from its own durable
//! cursor.
//!
//! # Contract
//!
//! * **H1** The outcome is one of four words ([`Outcome`]); nothing else counts as success.
//! * **H2** Events of one key are handled one after the other in log order, also across retries
//!   and restarts; events of other keys run at the same time, on up to `workers` tasks.
//! * **H3** An event may come twice (after a crash between the effect and the checkpoint); its
//!   [`id`](crate::event::Event::id) is the same.
//! * **H4** A panic, or running longer than `timeout`, is a failed attempt.
//! * **H5** Before a cursor is saved, [`flush`](EventHandler::flush) is awaited; what it fails
//!   on is not checkpointed.
//! * **H6** A handler that keeps its own [`position`](EventHandler::position) resumes there
//!   where that is before the store's cursor: what it has lost is done again.

pub mod dead_letter;
pub mod forward;
pub mod log;
mod pointer;
pub mod search;
pub mod template;

pub use pointer::ParsePointerError;

use std::{borrow::Cow, error::Error, fmt, sync::Arc, time::Duration};

use async_trait::async_trait;

use crate::event::{Position, StoredEvent};

/// Something that handles events. See the [module](self) for the contract.
#[async_trait]
pub trait EventHandler: Send + Sync + 'static {
    /// The name its cursor is kept under. Another name is another handler, with a cursor of
    /// its own.
    fn name(&self) -> &str;

    /// What kind of handler it is, for `/v1/handlers`. Default: `custom`.
    fn kind(&self) -> &'static str {
        "custom"
    }

    /// What must stay in order (H2): events of one lane are handled one after the other.
    /// Default: the event's key.
    fn lane<'a>(&self, event: &'a StoredEvent) -> Cow<'a, str> {
        Cow::Borrowed(event.event.key())
    }

    /// Whether handling an event again does something outside that it would not do if it were
    /// handled once: a message sent, a payment made. Then a rewind needs to be told that this
    /// may happen. Default: yes, since nobody else can know.
    fn has_side_effects(&self) -> bool {
        true
    }

    /// What it keeps can be built anew beside itself: how. Default: it keeps nothing.
    fn rebuildable(&self) -> Option<&dyn Rebuildable> {
        None
    }

    /// Handles one event (H1-H4).
    ///
    /// *Cancel safety*: the future is dropped when `timeout` has passed or a drain's deadline
    /// has; the event comes again.
    async fn handle(&self, event: &StoredEvent) -> Outcome;

    /// Whether and how it takes several events at once. Default: one at a time.
    fn batching(&self) -> Batching {
        Batching::None
    }

    /// Handles several events, one outcome each, in order. Called instead of
    /// [`handle`](Self::handle) when [`batching`](Self::batching) says so. Fewer outcomes than
    /// events is a failed attempt of those without one.
    ///
    /// Default: [`handle`](Self::handle) for each, passing over those behind a failed one of
    /// their lane.
    async fn handle_batch(&self, events: &[Arc<StoredEvent>]) -> Vec<Outcome> {
        let mut outcomes = Vec::with_capacity(events.len());
        let mut failed: Vec<Cow<'_, str>> = Vec::new();
        for event in events {
            let lane = self.lane(event);
            if failed.contains(&lane) {
                outcomes.push(Outcome::retry("an earlier event of its lane failed"));
                continue;
            }
            let outcome = self.handle(event).await;
            if !matches!(outcome, Outcome::Done) {
                failed.push(lane);
            }
            outcomes.push(outcome);
        }
        outcomes
    }

    /// The position it has kept itself, where it can (H6): the last event whose effect is
    /// durable, with all before it that it could handle. Asked once, when it starts. Default:
    /// `None`, the store's cursor counts.
    ///
    /// # Errors
    /// Where it cannot say; the handler does not start, and is tried again.
    async fn position(&self) -> Result<Option<Position>, HandlerError> {
        Ok(None)
    }

    /// Makes durable what was handled so far, everything up to `upto` (H5). Default: nothing.
    ///
    /// # Errors
    /// Where it cannot; the cursor stays, and it is tried again.
    async fn flush(&self, upto: Position) -> Result<(), HandlerError> {
        let _ = upto;
        Ok(())
    }
}

/// A handler that keeps a read model, which can be built anew from the log while the old one
/// serves.
#[async_trait]
pub trait Rebuildable: Send + Sync {
    /// Opens the one that is being built: a handler by this name, empty, or as far as it had
    /// got. No other of them is open.
    ///
    /// # Errors
    /// Where it cannot be opened now; tried again.
    async fn next(&self, name: &str) -> Result<Arc<dyn EventHandler>, HandlerError>;

    /// Puts what was built into the place of what serves, and removes that. Nothing is being
    /// handled meanwhile by either, and [`next`](Self::next) has been dropped. Where nothing was
    /// built, or it is in its place already, nothing happens.
    ///
    /// # Errors
    /// Where it cannot now; what serves can still be read, and it is tried again.
    async fn swap(&self) -> Result<(), HandlerError>;

    /// Removes what was built.
    ///
    /// # Errors
    /// Where it cannot now.
    async fn give_up(&self) -> Result<(), HandlerError>;
}

/// How a handler takes several events at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Batching {
    /// One at a time.
    None,
    /// Up to this many, at most one of each key: they may be worked on at the same time.
    DistinctKeys(usize),
    /// Up to this many in log order, also several of one key: they are worked on one after the
    /// other. When one fails, later ones of its key in the batch must not be done: give them
    /// the same outcome.
    InOrder(usize),
}

/// What became of an event in a handler: a closed vocabulary.
#[derive(Debug)]
#[must_use]
pub enum Outcome {
    /// It is done; it does not come again.
    Done,
    /// It failed now. It comes again after a backoff, or after the delay given; the events of
    /// its key wait. Spends an attempt.
    Retry {
        /// Why.
        error: HandlerError,
        /// When to try again; `None`: as the retry policy says.
        after: Option<Duration>,
    },
    /// It will never work: a dead letter, for a person.
    Reject {
        /// Why.
        error: HandlerError,
    },
    /// The target is down, whichever event it is. No attempt is spent; the handler pauses and
    /// probes.
    Unavailable {
        /// Why.
        error: HandlerError,
        /// When to try again; `None`: as the retry policy says.
        after: Option<Duration>,
    },
}

impl Outcome {
    /// It failed now; try again as the retry policy says.
    pub fn retry(error: impl Into<HandlerError>) -> Self {
        Self::Retry { error: error.into(), after: None }
    }

    /// It will never work.
    pub fn reject(error: impl Into<HandlerError>) -> Self {
        Self::Reject { error: error.into() }
    }

    /// The target is down.
    pub fn unavailable(error: impl Into<HandlerError>) -> Self {
        Self::Unavailable { error: error.into(), after: None }
    }
}

/// `Ok` is done, an error is a retry.
impl<E: Into<HandlerError>> From<Result<(), E>> for Outcome {
    fn from(result: Result<(), E>) -> Self {
        match result {
            Ok(()) => Self::Done,
            Err(error) => Self::retry(error),
        }
    }
}

/// What a handler says went wrong: a text, with its causes joined.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HandlerError(Arc<str>);

impl HandlerError {
    /// An error of this text.
    pub fn new(text: impl Into<Arc<str>>) -> Self {
        Self(text.into())
    }

    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for HandlerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl<E: Into<Box<dyn Error + Send + Sync>>> From<E> for HandlerError {
    fn from(error: E) -> Self {
        let error: Box<dyn Error + Send + Sync> = error.into();
        let mut text = error.to_string();
        let mut cause = error.source();
        while let Some(inner) = cause {
            text.push_str(": ");
            text.push_str(&inner.to_string());
            cause = inner.source();
        }
        Self(text.into())
    }
}
