//! Transports: where deliveries come from and where forwarded events go.
//!
//! A [`Transport`] opens durable [`Consumer`]s, which hand over [`Deliveries`] with their
//! [`Settle`]ment, and [`Publisher`]s, whose publish resolves when the broker has confirmed it.
//! It takes the place of the in-process broadcast: nothing is dropped when a reader is slow,
//! and what was not settled comes again.
//!
//! # Contract
//!
//! Clauses are numbered; the conformance suite in `tests/conformance/transport.rs` has a test
//! for each, named after its number, and runs against every implementation.
//!
//! Consuming:
//!
//! * **C1** Every message that is in the subscription, or is published to it later, is
//!   delivered at least once until it is acked.
//! * **C2** Bodies and headers arrive byte for byte and typed (G9).
//! * **C3** Messages arrive in the order they were published, also after a reconnect, a crash
//!   or a lost delivery (G5). A copy of something delivered before may arrive at any time.
//!   `competing` gives this up.
//! * **C4** What was delivered and not settled when a consumer went away is delivered again.
//! * **C5** What was acked is not delivered again, save after a fault between the ack and the
//!   broker; then it is a copy.
//! * **C6** [`Settlement::Retry`] delivers again, not before the delay has passed;
//!   [`Settlement::Reject`] does not deliver again.
//! * **C7** [`Consumer::next`] with no room asks the broker for nothing new: it hands over only
//!   what is on its way already, and what that can be is bounded.
//! * **C8** A delivery held longer than the broker's patience stays ours as long as
//!   [`Settle::keep_alive`] is called every [`Settle::patience`].
//! * **C9** A lost connection, a deleted queue or consumer, a stalled subscription is mended
//!   from inside [`Consumer::next`], with jittered backoff, for as long as it takes, and
//!   reported through the [`Reporter`]; `next` never spins and never ends by itself.
//! * **C10** [`Consumer::next`] is cancel safe: dropping its future loses no delivery.
//! * **C11** [`Consumer::close`] stops taking; deliveries not settled yet may still be settled
//!   until their [`Settle`] is dropped.
//!
//! Publishing:
//!
//! * **P1** `Ok` means the broker has confirmed that it took the message and routed it.
//! * **P2** The messages of one call, and of calls one after the other, are published in order.
//! * **P3** One bad message fails alone, with a [`PublishError`] that says what to do.
//! * **P4** A call is pipelined: it costs a round trip, not one for each message. (Webhooks
//!   cannot: HTTP/1.1 answers one request before it takes the next. [`http`] sends one after
//!   the other.)
//! * **P5** When the outcome is unknown (connection lost in between) it is
//!   [`PublishError::Unavailable`]; the message may have arrived, and its id tells. (Of a webhook
//!   it is [`PublishError::Failed`], once the receiver has answered others since this message
//!   got no answer: then it is not the receiver that is down.)
//! * **P6** While the broker is away or blocks publishers, publishing fails with
//!   [`PublishError::Unavailable`] within a bounded time and works again by itself later.

pub mod amqp;
pub(crate) mod hop;
pub mod http;
pub mod memory;
pub mod nats;
mod report;

pub use report::{Reporter, SourceReport, SourceState};

use std::{fmt, sync::Arc, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{
    event::{Headers, Message, Position},
    finding::Finding,
};

/// Something that messages come through. See the [module](self) for the contract.
#[async_trait]
pub trait Transport: Send + Sync + 'static {
    /// Its kind: `nats`, `amqp`, `http`, `memory`, or a name of your own.
    fn kind(&self) -> &'static str;

    /// Opens a durable consumer.
    ///
    /// # Errors
    /// [`TransportError::Unavailable`] while the broker cannot be reached (try again), and
    /// [`TransportError::Misconfigured`] where what is asked for does not fit what is there.
    /// Once open, a consumer mends itself (C9).
    async fn consumer(&self, source: SourceSpec) -> Result<Box<dyn Consumer>, TransportError>;

    /// Opens a publisher. It need not be connected yet: publishing says so (P6).
    ///
    /// # Errors
    /// [`TransportError::Misconfigured`] where the transport cannot publish as configured.
    async fn publisher(&self) -> Result<Box<dyn Publisher>, TransportError>;

    /// Judges what is there against what is asked for, for `doctor`.
    ///
    /// *Contract*: it changes nothing that anybody could notice later: nothing is created, no
    /// message is taken, stored or settled. What cannot be reached, or not in time, is a finding;
    /// it ends within about [`EXAMINATION`]. The default finds nothing.
    async fn examine(&self, asked: Examination) -> Vec<Finding> {
        let _ = asked;
        Vec::new()
    }
}

/// How long examining a transport may take, in all.
pub const EXAMINATION: Duration = Duration::from_secs(30);

/// What [`Transport::examine`] is to look at.
#[derive(Debug, Clone)]
pub struct Examination {
    /// What findings about the transport as a whole are about: `transport:NAME`.
    pub subject: Arc<str>,
    /// What is consumed from it.
    pub sources: Vec<ExaminedSource>,
    /// Where is published to through it.
    pub destinations: Vec<ExaminedDestination>,
    /// The largest event that is taken, in bytes (`limits.max_event_bytes`).
    pub max_event_bytes: usize,
}

/// A source to look at.
#[derive(Debug, Clone)]
pub struct ExaminedSource {
    /// What findings are about: `source:NAME`.
    pub subject: Arc<str>,
    /// As in [`SourceSpec::params`].
    pub params: Value,
    /// As in [`SourceSpec::competing`].
    pub competing: bool,
}

/// A destination to look at.
#[derive(Debug, Clone)]
pub struct ExaminedDestination {
    /// What findings are about: `handler:NAME`.
    pub subject: Arc<str>,
    /// What is published there, in words: `events`, `dead letters`.
    pub carries: &'static str,
    /// As [`Outbound::address`].
    pub address: Address,
    /// As [`Outbound::exchange`].
    pub exchange: Option<Address>,
}

/// Where to publish, as far as it is the same for every event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address(Vec<Option<String>>);

impl Address {
    /// From its pieces in order; `None` stands for a value of the event.
    #[must_use]
    pub fn new(pieces: Vec<Option<String>>) -> Self {
        Self(pieces)
    }

    /// The address, where it is the same for every event.
    #[must_use]
    pub fn fixed(&self) -> Option<String> {
        self.0.iter().cloned().collect()
    }

    /// The address, with this in place of each value of the event.
    #[must_use]
    pub fn with(&self, value: &str) -> String {
        self.0.iter().map(|piece| piece.as_deref().unwrap_or(value)).collect()
    }
}

/// What to consume.
#[derive(Debug, Clone)]
pub struct SourceSpec {
    /// The configured name of the source; becomes [`Origin::source`](crate::event::Origin).
    pub name: Arc<str>,
    /// What only the transport understands: stream and subject, queue and prefetch … Each
    /// implementation documents its own type and refuses members it does not know.
    pub params: Value,
    /// Several daemons consume this at the same time, so order cannot be kept (C3).
    pub competing: bool,
    /// How far the log has this source (see [`Mark`]), at the time of opening.
    pub resume: Option<Mark>,
    /// Where the consumer says how it is.
    pub reporter: Reporter,
}

/// How far a source's messages are in the log, where its transport can read them again by
/// sequence (JetStream). Committed together with the events (DESIGN, "Order across a crash").
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mark {
    /// Which stream the sequence belongs to: changes when a stream is deleted and made anew.
    pub incarnation: Arc<str>,
    /// Every message of the subscription up to this sequence is in the log or in quarantine.
    pub sequence: u64,
}

/// How much a caller can take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Room {
    /// Messages; zero asks for nothing new (C7).
    pub messages: usize,
    /// Bytes of body; one message more than this may come.
    pub bytes: usize,
}

impl Room {
    /// None: only what is on its way already.
    pub const NONE: Self = Self { messages: 0, bytes: 0 };

    /// Whether nothing new may be asked for.
    #[must_use]
    pub const fn is_none(self) -> bool {
        self.messages == 0 || self.bytes == 0
    }
}

/// A durable subscription, open.
#[async_trait]
pub trait Consumer: Send {
    /// Waits for at least one delivery and hands over those that are there.
    ///
    /// `None` only after the transport itself has been shut down.
    ///
    /// *Cancel safe* (C10). *Ordering*: C3; settle in the order handed over, which some brokers
    /// turn into a single ack.
    async fn next(&mut self, room: Room) -> Option<Deliveries>;

    /// Stops taking (C11). What was handed over can still be settled.
    async fn close(&mut self);
}

/// Messages handed over together, in order, settled together.
pub struct Deliveries {
    /// At least one.
    pub messages: Vec<Message>,
    /// How far the source is once these are in the log.
    pub mark: Option<Mark>,
    /// How many of them the broker has delivered before.
    pub redelivered: usize,
    /// Settles them. Dropped unused, they stay unsettled and come again (C4).
    pub settle: Box<dyn Settle>,
}

impl fmt::Debug for Deliveries {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Deliveries")
            .field("messages", &self.messages.len())
            .field("mark", &self.mark)
            .finish_non_exhaustive()
    }
}

/// What became of a message in the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Receipt {
    /// A new event at this position.
    Stored(Position),
    /// A copy of the event at this position (G2).
    Duplicate(Position),
    /// No event, or a conflict: kept in quarantine, with the reason.
    Quarantined {
        /// Its number in quarantine.
        number: u64,
        /// Why, in words for a person.
        reason: Arc<str>,
    },
}

/// How a delivery ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Settlement {
    /// It is committed: the broker may forget it (G1).
    Ack(Receipt),
    /// Deliver it again, not before this delay. Spends a delivery attempt.
    Retry(Duration),
    /// Never deliver it again.
    Reject,
}

/// The settlement of one [`Deliveries`].
#[async_trait]
pub trait Settle: Send {
    /// Settles, one entry per message, in order.
    ///
    /// An ack that the broker may not have received is no error: the message comes again and
    /// is recognised as a copy. *Not cancel safe*: dropped half way, the rest stays unsettled.
    async fn settle(self: Box<Self>, settlements: Vec<Settlement>);

    /// How often [`keep_alive`](Self::keep_alive) must be called while this is held; `None`
    /// where the broker waits as long as the connection lives.
    fn patience(&self) -> Option<Duration> {
        None
    }

    /// Tells the broker that these are still being worked on (C8).
    async fn keep_alive(&mut self) {}
}

/// Something to publish.
#[derive(Debug, Clone, PartialEq)]
pub struct Outbound {
    /// The event id: `Nats-Msg-Id`, AMQP `message_id`, `webhook-id`.
    pub id: Box<str>,
    /// NATS subject, AMQP routing key, or URL path.
    pub address: Box<str>,
    /// AMQP exchange; other transports ignore it.
    pub exchange: Option<Arc<str>>,
    /// Headers and properties, by the names of the transport they go to (AMQP: properties as
    /// `:content_type`). What it has no place for is left out.
    pub headers: Headers,
    /// The payload.
    pub body: Bytes,
}

/// A place to publish to.
#[async_trait]
pub trait Publisher: Send + Sync {
    /// Publishes in order (P2), pipelined (P4); one result per message.
    ///
    /// *Concurrency*: concurrent calls are served one after the other or interleaved; each
    /// keeps its own order. *Cancel safe* in that a dropped call leaves the publisher usable;
    /// what it had sent may have arrived (P5).
    async fn publish(&self, messages: Vec<Outbound>) -> Vec<Result<(), PublishError>>;

    /// Waits until what is under way has ended, then closes.
    async fn close(&self);
}

/// Why a message was not published.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PublishError {
    /// This message can never be published: too large, a bad address or header.
    #[error("{0}")]
    Refused(String),
    /// The broker did not take this message now: unroutable, nacked.
    #[error("{0}")]
    Failed(String),
    /// The broker is away, blocks publishers, or the outcome is unknown (P5).
    #[error("{0}")]
    Unavailable(String),
    /// The same, and it says for how long it wants to be left alone (`Retry-After`).
    #[error("{reason}")]
    Later {
        /// Why.
        reason: String,
        /// When to try again.
        after: Duration,
    },
}

/// Why a transport could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// The broker cannot be reached now, or not with these credentials; trying again may help.
    #[error("{0}")]
    Unavailable(String),
    /// What is configured does not fit what is there; a person has to change one of them.
    #[error("{0}")]
    Misconfigured(String),
}
