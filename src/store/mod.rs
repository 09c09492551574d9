//! The event store: an append-only log and the state that must commit with it.
//!
//! [`EventStore`] is the contract; [`memory`], [`sqlite`] and [`postgres`] keep it. [`Log`] is
//! what the rest of the program uses: one writer a process (group commit), a tail of recent
//! events in memory, and a signal when the log grows.
//!
//! # Contract
//!
//! Clauses are numbered; the conformance suite in `tests/conformance/store.rs` has a test for
//! each, named after its number, and runs against every implementation.
//!
//! * **S1** An append is atomic and durable when it returns: its events, quarantine entries
//!   and marks are all there, or none is (G1).
//! * **S2** Positions are 1, 2, 3 … in the order of the batch, without gaps, also with several
//!   writers, failed appends and duplicates (G3).
//! * **S3** A reader never sees position n before n-1 (G3).
//! * **S4** `(source, id)` is stored once; a copy gets [`Receipt::Duplicate`] with the position
//!   of the first, also within a batch (G2). A copy has the same type, and the same data as a
//!   JSON value.
//! * **S5** Another type or other data under the same `(source, id)` is a conflict: the first
//!   stays as it is, the second is quarantined.
//! * **S6** An event that the database itself refuses is quarantined with the database's
//!   reason; the rest of its batch is stored.
//! * **S7** Body, headers, origin and attributes come back as they went in, byte for byte (G9).
//! * **S8** Marks only move forward within an incarnation; a new incarnation replaces the old.
//! * **S9** Events are found by position, also those that lie apart from each other.
//! * **S10** When an append fails with [`StoreError::Unavailable`] its outcome may be unknown;
//!   appending the same batch again stores what is missing, once.
//! * **S11** What was committed is there after the store is closed, or killed, and opened again
//!   (not `memory`).
//! * **S12** Only the beginning of the log is ever removed, by [`remove`](EventStore::remove), in
//!   atomic steps that go through again after a crash. Positions stay as they are: what is left
//!   is as gapless as before, the head does not move, and appends go on behind it, also where
//!   nothing is left (G3). [`read`](EventStore::read) from before the beginning begins there; any
//!   other gap is an error.
//! * **S13** No step takes an event that a handler in the store may still be given: one that its
//!   cursor has not passed, or that has a row (retrying, parked, dead). A cursor is never before
//!   the beginning of the log: one that is set there, by a claim or a rewind, is set to it (G6).
//! * **S14** A copy of an event that was removed still gets [`Receipt::Duplicate`] with its
//!   position, and what conflicts with it is still quarantined, unless it was removed without
//!   keeping its identity (G2).
//! * **S15** What is due goes, oldest first, and no more than that: see [`Removal`]. Quarantine,
//!   marks, redrives and the audit stay.
//!
//! What handlers have done is kept beside the log: the clauses D1-D8 of [`progress`].

mod admit;
mod judge;
mod log;
pub mod memory;
pub mod postgres;
pub mod progress;
mod retain;
mod row;
mod same;
pub(crate) mod schema;
pub mod sqlite;
mod tail;

pub use log::{Append, Log, LogHealth, LogOptions, Ticket};
pub use progress::ProgressStore;
pub use retain::{Extent, HeldBy, Hold, Removal, Removed};

use std::{borrow::Cow, sync::Arc, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::{Stream, stream};
use serde::de::DeserializeOwned;
use time::OffsetDateTime;

use crate::{
    event::{Event, Headers, Origin, Position, Quarantined, StoredEvent},
    transport::{Mark, Receipt},
};

/// One thing to append.
#[derive(Debug, Clone)]
pub enum Entry {
    /// An event, for the log.
    Event(Event),
    /// What is none, for quarantine.
    Quarantine(Quarantined),
}

/// What is appended in one go.
#[derive(Debug, Clone)]
pub struct Batch {
    /// In log order.
    pub entries: Vec<Entry>,
    /// How far sources are once this is committed: source name and mark.
    pub marks: Vec<(Arc<str>, Mark)>,
    /// The `recorded_at` of every entry. UTC, whole microseconds.
    pub recorded_at: OffsetDateTime,
}

impl Batch {
    /// A batch of these entries, recorded now, that moves no mark.
    #[must_use]
    pub fn new(entries: Vec<Entry>) -> Self {
        Self { entries, marks: Vec::new(), recorded_at: crate::event::now() }
    }
}

/// How many events to read at once.
#[derive(Debug, Clone, Copy)]
pub struct Limit {
    /// At most this many events.
    pub events: usize,
    /// Stop once bodies add up to this many bytes; one event is always read.
    pub bytes: usize,
}

impl Default for Limit {
    /// 1,000 events, 8 MiB.
    fn default() -> Self {
        Self { events: 1_000, bytes: 8 << 20 }
    }
}

/// Which events to list. All conditions must hold.
#[derive(Debug, Clone)]
pub struct Query {
    /// Ascending: events after this one. Descending: events before it, if it is not zero.
    pub after: Position,
    /// Of exactly this type.
    pub kind: Option<String>,
    /// Of exactly this key.
    pub key: Option<String>,
    /// Newest first.
    pub descending: bool,
    /// At most this many.
    pub limit: usize,
    /// Stop once bodies add up to this many bytes; one event is always listed.
    pub bytes: usize,
}

impl Default for Query {
    /// Every event from the first on, with the default [`Limit`].
    fn default() -> Self {
        let Limit { events: limit, bytes } = Limit::default();
        Self { after: Position::START, kind: None, key: None, descending: false, limit, bytes }
    }
}

/// A row of quarantine, without the bytes.
#[derive(Debug, Clone, PartialEq)]
pub struct QuarantineEntry {
    /// Its number: 1, 2, 3 …; numbers may be missing.
    pub number: u64,
    /// When it was committed. UTC, microseconds.
    pub received_at: OffsetDateTime,
    /// Why it is here.
    pub reason: String,
    /// Where it came from.
    pub origin: Origin,
    /// Its headers, typed.
    pub headers: Headers,
    /// How many bytes it has; [`EventStore::quarantine_entry`] has them.
    pub size: u64,
}

/// The connections of a store to its database.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Connections {
    /// Open, and in use.
    pub used: u32,
    /// Open, and free.
    pub idle: u32,
    /// That may be open.
    pub max: u32,
}

impl Connections {
    /// Those of a pool that has so many open, of which so many are free: counted one after the
    /// other, so these may not fit.
    pub(crate) fn of(open: u32, idle: usize, max: u32) -> Self {
        let idle = u32::try_from(idle).unwrap_or(open).min(open);
        Self { used: open - idle, idle, max }
    }
}

/// The log and the state that commits with it. See the [module](self) for the contract.
///
/// *Concurrency*: every method may be called from many tasks at once. *Cancel safe*: a dropped
/// append may or may not have happened (S10); a dropped read changes nothing.
#[async_trait]
pub trait EventStore: ProgressStore {
    /// `memory`, `sqlite`, `postgres`, or a name of your own.
    fn kind(&self) -> &'static str;

    /// How long a call may take while nothing is wrong with this process, its own timeouts
    /// included; one that takes longer does not end any more, and the watchdog may act. Default
    /// 30 s.
    fn patience(&self) -> Duration {
        Duration::from_secs(30)
    }

    /// Appends (S1-S6, S8); one receipt per entry, in order. An empty batch may carry marks.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`]: try the same batch again (S10). [`StoreError::Fatal`]: the
    /// store can no longer be trusted; stop.
    async fn append(&self, batch: &Batch) -> Result<Vec<Receipt>, StoreError>;

    /// The last position; [`Position::START`] when the log is empty.
    async fn head(&self) -> Result<Position, StoreError>;

    /// From where to where the log goes.
    async fn extent(&self) -> Result<Extent, StoreError>;

    /// Removes the first events of the log, as far as they are due and nobody needs them: one
    /// step (S12-S15). Where that removes none, there is nothing to do for now.
    ///
    /// *Concurrency*: of several that remove at once one does a step, the others nothing.
    async fn remove(&self, removal: &Removal) -> Result<Removed, StoreError>;

    /// The events after `after`, in order, contiguous. Empty at the head. Where the first of them
    /// have been removed, those from the beginning of the log on (S12).
    async fn read(
        &self,
        after: Position,
        limit: Limit,
    ) -> Result<Vec<Arc<StoredEvent>>, StoreError>;

    /// The events at these positions, which are in order, as far as they are (still) there and their
    /// bodies add up to no more than so many bytes; the first of them is always given (S9).
    async fn get(
        &self,
        positions: &[Position],
        bytes: usize,
    ) -> Result<Vec<Arc<StoredEvent>>, StoreError>;

    /// Lists events by type or key, in either direction.
    async fn list(&self, query: &Query) -> Result<Vec<Arc<StoredEvent>>, StoreError>;

    /// The event of that identity.
    async fn find(&self, source: &str, id: &str) -> Result<Option<Arc<StoredEvent>>, StoreError>;

    /// The mark of a source (S8).
    async fn mark(&self, source: &str) -> Result<Option<Mark>, StoreError>;

    /// Quarantine entries with a number greater than `after`, in order. Bodies are not read:
    /// what is here may be as large as a broker takes.
    async fn quarantine(
        &self,
        after: u64,
        limit: usize,
    ) -> Result<Vec<QuarantineEntry>, StoreError>;

    /// The quarantine entry of that number, and its bytes.
    async fn quarantine_entry(
        &self,
        number: u64,
    ) -> Result<Option<(QuarantineEntry, Bytes)>, StoreError>;

    /// How many entries are in quarantine.
    async fn quarantine_len(&self) -> Result<u64, StoreError>;

    /// Returns when another process may have appended after `seen`, or after a while at the
    /// latest; never for a store only this process can write to.
    async fn appended_elsewhere(&self, seen: Position) {
        let _ = seen;
        std::future::pending::<()>().await;
    }

    /// How many connections to a database it has; `None` where it has none of that kind.
    fn connections(&self) -> Option<Connections> {
        None
    }

    /// Closes connections and files; nothing may be called afterwards.
    async fn close(&self);
}

impl dyn EventStore {
    /// Every event from the first that has not been removed to the head at the time it is reached, typed by
    /// [`Event::decode`]. Events that do not fit `E` are errors in the stream, with their
    /// position; the stream goes on behind them. A store error ends it.
    pub fn stream_all<E: DeserializeOwned + Send>(
        &self,
    ) -> impl Stream<Item = Result<(Position, E), StreamError>> + Send + '_ {
        let pages = stream::unfold(Some(Position::START), move |after| async move {
            let after = after?;
            match self.read(after, Limit::default()).await {
                Ok(events) => {
                    let last = events.last()?.position;
                    let items: Vec<_> = events
                        .iter()
                        .map(|event| {
                            event.decode::<E>().map(|typed| (event.position, typed)).map_err(
                                |source| StreamError::Decode { position: event.position, source },
                            )
                        })
                        .collect();
                    Some((stream::iter(items), Some(last)))
                }
                Err(error) => Some((stream::iter(vec![Err(StreamError::Store(error))]), None)),
            }
        });
        futures_util::StreamExt::flatten(pages)
    }
}

/// Why an item of [`stream_all`](trait.EventStore.html#method.stream_all) is missing.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// The event is there and is not such an `E`.
    #[error("event at position {position} does not decode")]
    Decode {
        /// Which one.
        position: Position,
        /// Why.
        source: serde_json::Error,
    },
    /// The store could not be read.
    #[error("failed to read the log")]
    Store(#[source] StoreError),
}

/// What went wrong with a store.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StoreError {
    /// It is away, locked, full or overloaded; the same call may work later.
    #[error("store unavailable: {0}")]
    Unavailable(Arc<str>),
    /// It can no longer be trusted (an fsync failed, the file is damaged, the log went back):
    /// stop, and say so.
    #[error("store failed: {0}")]
    Fatal(Arc<str>),
    /// It cannot be used as configured: no such database, an older or newer schema.
    #[error("{0}")]
    Misconfigured(Arc<str>),
    /// Another process, or a successor in this one, runs the handler now.
    #[error("handler `{0}` has been claimed by another runner since")]
    Fenced(Arc<str>),
}

impl StoreError {
    /// Unavailable, with this reason.
    pub fn unavailable(reason: impl std::fmt::Display) -> Self {
        Self::Unavailable(reason.to_string().into())
    }

    /// Fatal, with this reason.
    pub fn fatal(reason: impl std::fmt::Display) -> Self {
        Self::Fatal(reason.to_string().into())
    }

    /// Fenced: this handler has been claimed by somebody else.
    pub fn fenced(handler: &str) -> Self {
        Self::Fenced(handler.into())
    }

    /// Misconfigured, with this reason.
    pub fn misconfigured(reason: impl std::fmt::Display) -> Self {
        Self::Misconfigured(reason.to_string().into())
    }
}

/// One try at an append: what a database adds to [`append_isolating`].
#[async_trait]
pub trait AttemptAppend: Send + Sync {
    /// Appends the batch in one transaction, or leaves nothing behind.
    async fn attempt(&self, batch: &Batch) -> Result<Vec<Receipt>, AttemptError>;

    /// Does the same and then rolls back: would these be refused?
    async fn probe(&self, batch: &Batch) -> Result<(), AttemptError>;
}

/// Appends a batch of which the database refuses some events: how [`EventStore`]
/// implementations keep S6.
///
/// The common case is one [`attempt`](AttemptAppend::attempt) and no copy. When that is refused,
/// halves of the batch are [probed](AttemptAppend::probe) until the refused entries stand alone;
/// those become quarantine entries, and the whole batch is attempted again, so that it is still
/// appended in one transaction (S1). Only a batch that is refused as a whole, while none of its
/// entries is (it is too large in sum), is appended in two halves; marks go with the second, so
/// a crash in between claims nothing that is not there.
///
/// # Errors
/// Whatever an attempt fails with otherwise.
pub async fn append_isolating<A: AttemptAppend + ?Sized>(
    store: &A,
    batch: &Batch,
) -> Result<Vec<Receipt>, StoreError> {
    let mut receipts = Vec::with_capacity(batch.entries.len());
    let mut parts = vec![Cow::Borrowed(batch)];
    while let Some(part) = parts.pop() {
        let reason = match store.attempt(&part).await {
            Ok(done) => {
                receipts.extend(done);
                continue;
            }
            Err(AttemptError::Store(error)) => return Err(error),
            Err(AttemptError::Refused(reason)) => reason,
        };
        let mut part = part.into_owned();
        let refused = find_refused(store, &part).await?;
        if !refused.is_empty() {
            for (index, reason) in refused {
                let entry = &mut part.entries[index];
                *entry = Entry::Quarantine(refused_entry(entry, &reason)?);
            }
            parts.push(Cow::Owned(part));
        } else if part.entries.len() > 1 {
            let rest = part.entries.split_off(part.entries.len() / 2);
            let marks = std::mem::take(&mut part.marks);
            let second = Batch { entries: rest, marks, recorded_at: part.recorded_at };
            parts.push(Cow::Owned(second));
            parts.push(Cow::Owned(part));
        } else {
            return Err(StoreError::fatal(format_args!("the database refuses a mark: {reason}")));
        }
    }
    Ok(receipts)
}

/// The entries that are refused on their own, with the reason. Marks are left out.
async fn find_refused<A: AttemptAppend + ?Sized>(
    store: &A,
    batch: &Batch,
) -> Result<Vec<(usize, String)>, StoreError> {
    let mut refused = Vec::new();
    let mut ranges: Vec<_> = std::iter::once(0..batch.entries.len()).collect();
    while let Some(range) = ranges.pop() {
        if range.is_empty() {
            continue;
        }
        let part = Batch {
            entries: batch.entries[range.clone()].to_vec(),
            marks: Vec::new(),
            recorded_at: batch.recorded_at,
        };
        match store.probe(&part).await {
            Ok(()) => {}
            Err(AttemptError::Store(error)) => return Err(error),
            Err(AttemptError::Refused(reason)) if range.len() == 1 => {
                refused.push((range.start, reason));
            }
            Err(AttemptError::Refused(_)) => {
                let middle = range.start + range.len() / 2;
                ranges.push(middle..range.end);
                ranges.push(range.start..middle);
            }
        }
    }
    Ok(refused)
}

/// What goes into quarantine in place of an entry that is refused.
fn refused_entry(entry: &Entry, reason: &str) -> Result<Quarantined, StoreError> {
    match entry {
        Entry::Event(event) => Ok(Quarantined {
            reason: format!("refused by the store: {reason}"),
            message: event.clone().into_message(),
        }),
        // Even as quarantine it is refused. Bytes and reason always fit; headers may not.
        Entry::Quarantine(held) if !held.message.headers.is_empty() => Ok(Quarantined {
            reason: format!(
                "{}; its headers are left out, as the store refuses them: {reason}",
                held.reason
            ),
            message: crate::event::Message {
                headers: Headers::new(),
                body: held.message.body.clone(),
                origin: held.message.origin.clone(),
            },
        }),
        Entry::Quarantine(_) => Err(StoreError::fatal(format_args!(
            "the database refuses a quarantine entry: {reason}"
        ))),
    }
}

/// How one attempt at an append failed; see [`append_isolating`].
#[derive(Debug)]
pub enum AttemptError {
    /// The database refuses some of the data; nothing was stored.
    Refused(String),
    /// Anything else.
    Store(StoreError),
}

impl From<StoreError> for AttemptError {
    fn from(error: StoreError) -> Self {
        Self::Store(error)
    }
}
