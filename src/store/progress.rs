//! What handlers have done, and what they have not: the dispatch state that is kept with the log.
//!
//! A handler's progress is its **cursor**, and a row for each event at or below it that is not
//! finished: *retrying* (it failed and is due again), *parked* (it waits behind one of its key)
//! or *dead* (a person decides). Both change together, in one transaction, so no crash can come
//! between a cursor and the work it has passed (G6).
//!
//! # Contract
//!
//! * **D1** [`claim`](ProgressStore::claim) gives the handler to one process; its epoch is
//!   higher than every one before. A handler nobody had gets the cursor that was asked for, or
//!   the beginning of the log where that is further.
//! * **D2** What is written under an epoch that is not the handler's last one is refused with
//!   [`StoreError::Fenced`], and changes nothing.
//! * **D3** A [`checkpoint`](ProgressStore::checkpoint) is atomic and durable when it returns:
//!   the cursor and all of its changes are there, or none is. When it fails with
//!   [`StoreError::Unavailable`] its outcome may be unknown; it may be repeated.
//! * **D4** A row is there once for each handler and position. Kept again, it is as last kept,
//!   but its first error and when that was stay; so does the last error where none is given.
//! * **D5** [`rewind`](ProgressStore::rewind) moves the cursor, and removes the rows above it,
//!   in one transaction.
//! * **D6** A redrive takes up the rows that match when it [starts](ProgressStore::start_redrive),
//!   and no later ones. A row that is kept again or finished leaves its redrive.
//! * **D7** What was asked for by a person is in the audit, with who and when, in the same
//!   transaction.
//! * **D8** [`adopt`](ProgressStore::adopt) gives a handler's place the progress of another,
//!   which is gone afterwards.

pub(super) mod condition;
pub(super) mod row;

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;

use super::StoreError;
use crate::event::Position;

/// What the name of a claim on a source begins with: it has a row as a handler has, but needs no
/// event of the log.
pub(crate) const SOURCE: &str = "source:";

/// The number of a claim on a handler: each is higher than the last (D1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Epoch(pub u64);

/// Who wants to run a handler.
#[derive(Debug, Clone, Copy)]
pub struct Claim<'a> {
    /// The handler.
    pub handler: &'a str,
    /// This process: the same after a restart of it, another for every other one.
    pub owner: &'a str,
    /// For how long, unless it is [renewed](ProgressStore::renew). Stores that one process
    /// uses at a time do not wait for an owner: there the last claim counts.
    pub ttl: Duration,
    /// The cursor of a handler that has none; that is not before the beginning of the log
    /// ([S13](super)).
    pub start: Position,
}

/// What a claim came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Claimed {
    /// The handler is this process's.
    Taken(Tenure),
    /// Another process has it.
    Held {
        /// Which.
        owner: String,
        /// For how long at least, unless it is renewed.
        left: Duration,
    },
}

/// What comes with a claim.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tenure {
    /// What the claim's writes carry.
    pub epoch: Epoch,
    /// Everything up to here is done, filtered out, or has a row.
    pub cursor: Position,
    /// Nobody had run it before.
    pub fresh: bool,
    /// Whether a person has paused it.
    pub paused: bool,
}

/// Where an unfinished event stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// It failed, and is due again then. UTC, microseconds, by the clock of whoever kept it.
    Retrying {
        /// When.
        due_at: OffsetDateTime,
    },
    /// It waits behind another one of its key.
    Parked,
    /// It will not be tried again before a person says so.
    Dead {
        /// Whether it is still to be published to the handler's dead-letter destination.
        unpublished: bool,
    },
}

impl Standing {
    /// The word in the column `state`.
    #[must_use]
    pub const fn as_str(&self) -> &'static str {
        match self {
            Self::Retrying { .. } => "retrying",
            Self::Parked => "parked",
            Self::Dead { .. } => "dead",
        }
    }
}

/// How an event failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// Why it failed the first time.
    pub first_error: Arc<str>,
    /// Why it failed the last time.
    pub last_error: Arc<str>,
    /// When it failed first. UTC, microseconds.
    pub first_failed_at: OffsetDateTime,
    /// When it failed last. UTC, microseconds.
    pub last_failed_at: OffsetDateTime,
}

/// An event that a handler has not finished.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unfinished {
    /// Its position.
    pub position: Position,
    /// Its id.
    pub id: Arc<str>,
    /// Its type.
    pub kind: Arc<str>,
    /// What the handler keeps in order: the event's key, or the document id for `search`.
    pub key: Arc<str>,
    /// Where it stands.
    pub standing: Standing,
    /// How often it was tried, since it was last redriven.
    pub attempts: u32,
    /// How it failed; `None` where it did not, or where the row has it already (D4).
    pub failure: Option<Failure>,
}

/// What became of an event, for a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// It has a row now (D4).
    Keep(Unfinished),
    /// Its row goes, if it has one: it is done, or was discarded.
    Finish(Position),
}

impl Change {
    /// Which event's.
    #[must_use]
    pub const fn position(&self) -> Position {
        match self {
            Self::Keep(unfinished) => unfinished.position,
            Self::Finish(position) => *position,
        }
    }
}

/// A cursor and what goes with it (D3).
#[derive(Debug, Clone)]
pub struct Checkpoint {
    /// The handler.
    pub handler: Arc<str>,
    /// The claim it is written under (D2).
    pub epoch: Epoch,
    /// The cursor.
    pub cursor: Position,
    /// At most one for each position.
    pub changes: Vec<Change>,
}

/// An event that a handler could not handle: it rejected it, or its last attempt failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeadLetter {
    /// The handler.
    pub handler: Arc<str>,
    /// The event's position.
    pub position: Position,
    /// The event's id.
    pub id: Arc<str>,
    /// The event's type.
    pub kind: Arc<str>,
    /// What the handler keeps in order: the event's key, or the document id for `search`.
    pub key: Arc<str>,
    /// How often it was tried.
    pub attempts: u32,
    /// How it failed.
    pub failure: Failure,
    /// How many events of its key wait behind it.
    pub followers: u64,
    /// The redrive that has taken it up.
    pub redrive: Option<u64>,
}

/// Which dead letters. All conditions must hold; none: all.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DeadLetterFilter {
    /// Of this handler.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub handler: Option<String>,
    /// Of one of these handlers.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub handlers: Vec<String>,
    /// At exactly these positions.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub positions: Vec<u64>,
    /// Of exactly this type.
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    pub kind: Option<String>,
    /// Of exactly this key.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    /// With this text in the last error.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Last failed at or after this.
    #[serde(skip_serializing_if = "Option::is_none", with = "time::serde::rfc3339::option")]
    pub since: Option<OffsetDateTime>,
    /// Last failed before this.
    #[serde(skip_serializing_if = "Option::is_none", with = "time::serde::rfc3339::option")]
    pub until: Option<OffsetDateTime>,
}

/// Which quarantine entries. All conditions must hold; none: all.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct QuarantineFilter {
    /// With exactly these numbers.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub numbers: Vec<u64>,
    /// Of this source.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// With this text in the reason.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Received at or after this.
    #[serde(skip_serializing_if = "Option::is_none", with = "time::serde::rfc3339::option")]
    pub since: Option<OffsetDateTime>,
    /// Received before this.
    #[serde(skip_serializing_if = "Option::is_none", with = "time::serde::rfc3339::option")]
    pub until: Option<OffsetDateTime>,
}

/// What a redrive is about.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "of", content = "filter", rename_all = "kebab-case")]
pub enum Selection {
    /// Dead letters.
    DeadLetters(DeadLetterFilter),
    /// Quarantine entries.
    Quarantine(QuarantineFilter),
}

/// What a redrive does with what it has taken up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RedriveAction {
    /// Dead letters are tried again, with all their attempts; quarantine entries are decoded
    /// and appended again.
    Retry,
    /// They are given up.
    Discard,
}

impl RedriveAction {
    /// The word in the column `action`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Retry => "retry",
            Self::Discard => "discard",
        }
    }
}

/// A redrive to be started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewRedrive {
    /// What is taken up.
    pub selection: Selection,
    /// What is done with it.
    pub action: RedriveAction,
    /// So many a second at most; `None`: as fast as it goes.
    pub rate: Option<u32>,
    /// Who wants it.
    pub by: String,
    /// Why; given for every discard.
    pub reason: Option<String>,
}

/// How a redrive is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RedriveState {
    /// It has something left.
    Running,
    /// All that it had taken up has gone its way.
    Done,
    /// A person has ended it; what was left is as it was before.
    Cancelled,
}

impl RedriveState {
    /// The word in the column `state`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Done => "done",
            Self::Cancelled => "cancelled",
        }
    }
}

/// A job that takes up dead letters or quarantine entries (D6).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Redrive {
    /// Its number: 1, 2, 3 …; numbers may be missing.
    pub number: u64,
    /// What it was started with.
    pub what: NewRedrive,
    /// How it is.
    pub state: RedriveState,
    /// How many it has taken up.
    pub total: u64,
    /// How many of these are left; of one that was cancelled, how many were.
    pub left: u64,
    /// When it was started. UTC, microseconds.
    pub started_at: OffsetDateTime,
    /// When it ended. UTC, microseconds.
    pub ended_at: Option<OffsetDateTime>,
}

/// A dead letter that a redrive has taken up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Redriven {
    /// The redrive.
    pub redrive: u64,
    /// What it does.
    pub action: RedriveAction,
    /// So many a second at most.
    pub rate: Option<u32>,
    /// The event. Its standing is dead, and its failure left out.
    pub event: Unfinished,
}

/// Something that a person did (D7).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AuditEntry {
    /// Its number: 1, 2, 3 …; numbers may be missing. 0 before it is written.
    pub number: u64,
    /// When. UTC, microseconds.
    pub at: OffsetDateTime,
    /// Who.
    pub by: String,
    /// What: `pause`, `resume`, `rewind`, `rebuild`, `forget`, `retry`, `discard`, `cancel`.
    pub action: String,
    /// Of what: `handler search`, `redrive 7`.
    pub subject: String,
    /// More about it, as JSON.
    pub detail: String,
}

impl AuditEntry {
    /// An entry of now.
    #[must_use]
    pub fn new(by: &str, action: &str, subject: String, detail: &serde_json::Value) -> Self {
        Self {
            number: 0,
            at: crate::event::now(),
            by: by.to_owned(),
            action: action.to_owned(),
            subject,
            detail: detail.to_string(),
        }
    }
}

/// The progress of handlers, kept with the log. See the [module](self) for the contract.
///
/// *Concurrency*: every method may be called from many tasks at once. *Cancel safety*: a dropped
/// write may or may not have happened (D3); a dropped read changes nothing.
#[async_trait]
pub trait ProgressStore: Send + Sync + 'static {
    /// Whether several processes may use the store at once. Then a claim ends unless it is
    /// renewed; otherwise the last one counts, however long ago it was.
    fn is_shared(&self) -> bool {
        true
    }

    /// Claims a handler (D1). Claimed again by the owner that has it, it gets a new epoch.
    async fn claim(&self, claim: Claim<'_>) -> Result<Claimed, StoreError>;

    /// Keeps a claim for another while; says whether a person has paused the handler.
    ///
    /// # Errors
    /// [`StoreError::Fenced`] where somebody else has claimed it.
    async fn renew(&self, handler: &str, epoch: Epoch, ttl: Duration) -> Result<bool, StoreError>;

    /// Gives a claim up, so that another process need not wait for its end. Nothing happens
    /// where it is not the last one.
    async fn release(&self, handler: &str, epoch: Epoch) -> Result<(), StoreError>;

    /// The cursor of a handler, as last saved.
    async fn cursor(&self, handler: &str) -> Result<Option<Position>, StoreError>;

    /// Saves a cursor with its changes (D2-D4).
    ///
    /// # Errors
    /// [`StoreError::Fenced`] where somebody else has claimed the handler.
    async fn checkpoint(&self, checkpoint: &Checkpoint) -> Result<(), StoreError>;

    /// Moves a cursor back, or forth, by hand (D2, D5). Says where it is then: not before the
    /// beginning of the log ([S13](super)).
    ///
    /// # Errors
    /// [`StoreError::Fenced`] where somebody else has claimed the handler.
    async fn rewind(
        &self,
        handler: &str,
        epoch: Epoch,
        to: Position,
        audit: Option<&AuditEntry>,
    ) -> Result<Position, StoreError>;

    /// Gives `to` the cursor and rows of `from`, whose own are gone afterwards (D2, D8). Both
    /// epochs are checked.
    async fn adopt(&self, from: (&str, Epoch), to: (&str, Epoch)) -> Result<(), StoreError>;

    /// Forgets a handler: its cursor, and its rows (D2).
    async fn forget(&self, handler: &str, epoch: Epoch) -> Result<(), StoreError>;

    /// Pauses or resumes a handler, for whichever process runs it (D7); `false` where nobody
    /// has ever claimed it, and then nothing happens.
    async fn set_paused(
        &self,
        handler: &str,
        paused: bool,
        audit: &AuditEntry,
    ) -> Result<bool, StoreError>;

    /// The rows of a handler behind a position, in order, without their failures.
    async fn unfinished(
        &self,
        handler: &str,
        after: Position,
        limit: usize,
    ) -> Result<Vec<Unfinished>, StoreError>;

    /// Dead letters, by handler and position, behind `after`.
    async fn dead_letters(
        &self,
        filter: &DeadLetterFilter,
        after: Option<(&str, Position)>,
        limit: usize,
    ) -> Result<Vec<DeadLetter>, StoreError>;

    /// The rows of a handler at these positions, in order, whatever their state, as a dead letter
    /// would be shown: with their keys and failures, and what waits behind each. One that was
    /// kept without a failure has an empty one.
    async fn unfinished_at(
        &self,
        handler: &str,
        positions: &[Position],
    ) -> Result<Vec<DeadLetter>, StoreError>;

    /// How many dead letters match that no redrive has taken up.
    async fn count_dead_letters(&self, filter: &DeadLetterFilter) -> Result<u64, StoreError>;

    /// How many quarantine entries match that no redrive has taken up.
    async fn count_quarantine(&self, filter: &QuarantineFilter) -> Result<u64, StoreError>;

    /// Dead letters that are still to be published, in order.
    async fn unpublished(&self, handler: &str, limit: usize)
    -> Result<Vec<DeadLetter>, StoreError>;

    /// These dead letters of a handler have been published, and the broker has confirmed it; each
    /// with when it last failed, since one that has died again meanwhile has not been.
    async fn mark_published(
        &self,
        handler: &str,
        letters: &[(Position, OffsetDateTime)],
    ) -> Result<(), StoreError>;

    /// Starts a redrive (D6, D7). One that finds nothing is done at once. What another redrive
    /// has taken up is passed over.
    async fn start_redrive(&self, what: &NewRedrive) -> Result<Redrive, StoreError>;

    /// Redrives with a number greater than `after`, in order.
    async fn redrives(&self, after: u64, limit: usize) -> Result<Vec<Redrive>, StoreError>;

    /// The redrive of that number.
    async fn redrive(&self, number: u64) -> Result<Option<Redrive>, StoreError>;

    /// Ends a redrive that is running (D7): what is left of it is as it was before. Gives it as
    /// it is afterwards.
    async fn cancel_redrive(
        &self,
        number: u64,
        audit: &AuditEntry,
    ) -> Result<Option<Redrive>, StoreError>;

    /// What running redrives have left for a handler, by position; those of `except` are passed
    /// over.
    async fn redriven(
        &self,
        handler: &str,
        except: &[u64],
        limit: usize,
    ) -> Result<Vec<Redriven>, StoreError>;

    /// The numbers of what running redrives have left in quarantine, in order, with the redrive
    /// and what it does; those of `except` are passed over.
    async fn redriven_quarantine(
        &self,
        except: &[u64],
        limit: usize,
    ) -> Result<Vec<RedrivenEntry>, StoreError>;

    /// These quarantine entries leave their redrive: discarded they are gone, else they stay,
    /// with another reason where one is given.
    async fn settle_quarantine(&self, settled: &[SettledEntry]) -> Result<(), StoreError>;

    /// Gives up what running redrives have taken up to discard, of handlers that are not among
    /// these and that no other process has.
    async fn discard_orphans(&self, registered: &[String]) -> Result<(), StoreError>;

    /// Ends the running redrives that have nothing left.
    async fn end_redrives(&self) -> Result<(), StoreError>;

    /// Writes down what a person did (D7).
    async fn audit(&self, entry: &AuditEntry) -> Result<(), StoreError>;

    /// What persons did, newest first, before that number where it is not 0.
    async fn audits(&self, before: u64, limit: usize) -> Result<Vec<AuditEntry>, StoreError>;
}

/// A quarantine entry that a redrive has taken up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RedrivenEntry {
    /// The entry.
    pub number: u64,
    /// The redrive.
    pub redrive: u64,
    /// What it does.
    pub action: RedriveAction,
    /// So many a second at most.
    pub rate: Option<u32>,
}

/// What became of a quarantine entry in a redrive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SettledEntry {
    /// It is in the log now, or was given up: it goes.
    Gone(u64),
    /// It is still no event.
    Stays {
        /// Which.
        number: u64,
        /// Why.
        reason: String,
    },
}

impl Redrive {
    /// What the audit says of its start.
    pub(super) fn audit(&self) -> AuditEntry {
        let NewRedrive { selection, action, rate, by, reason } = &self.what;
        let mut detail = serde_json::to_value(selection).unwrap_or_default();
        if let Some(detail) = detail.as_object_mut() {
            detail.insert("rate".to_owned(), (*rate).into());
            detail.insert("reason".to_owned(), reason.clone().into());
            detail.insert("total".to_owned(), self.total.into());
        }
        let subject = format!("redrive {}", self.number);
        AuditEntry { at: self.started_at, ..AuditEntry::new(by, action.as_str(), subject, &detail) }
    }
}
