//! Rows of the tables and what they say: what both databases share.

use std::borrow::Cow;

use serde::de::DeserializeOwned;
use serde_json::json;
use time::OffsetDateTime;

use super::{
    AuditEntry, DeadLetter, Failure, NewRedrive, Redrive, Redriven, RedrivenEntry, Selection,
    Standing, Unfinished,
};
use crate::store::{
    StoreError,
    row::{number, position},
};

/// A text as a database keeps it: none keeps U+0000.
pub(in crate::store) fn clean(text: &str) -> Cow<'_, str> {
    if text.contains('\0') { text.replace('\0', "\u{fffd}").into() } else { text.into() }
}

/// The words and the JSON that a selection is kept as.
///
/// # Errors
/// What it contains is no JSON, which does not happen.
pub(in crate::store) fn selection(
    selection: &Selection,
) -> Result<(&'static str, String), StoreError> {
    let (subject, filter) = match selection {
        Selection::DeadLetters(filter) => ("dead-letters", serde_json::to_string(filter)),
        Selection::Quarantine(filter) => ("quarantine", serde_json::to_string(filter)),
    };
    Ok((subject, filter.map_err(StoreError::unavailable)?))
}

/// A word of a closed vocabulary.
fn word<T: DeserializeOwned>(table: &str, text: &str) -> Result<T, StoreError> {
    serde_json::from_value(text.into()).map_err(|error| damaged(table, &error))
}

fn damaged(table: &str, error: &dyn std::fmt::Display) -> StoreError {
    StoreError::fatal(format_args!(
        "a row of `{table}` cannot be read, it was changed or is damaged: {error}"
    ))
}

fn small(value: i64) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}

/// The columns of `unfinished` that a runner needs, in this order.
pub(in crate::store) const UNFINISHED: &str =
    "position, id, type, key, attempts, state, due_at, unpublished";

/// A row of these.
#[derive(Debug)]
pub(in crate::store) struct UnfinishedRow {
    pub(in crate::store) position: i64,
    pub(in crate::store) id: String,
    pub(in crate::store) kind: String,
    pub(in crate::store) key: String,
    pub(in crate::store) attempts: i64,
    pub(in crate::store) state: String,
    pub(in crate::store) due_at: Option<OffsetDateTime>,
    pub(in crate::store) unpublished: bool,
}

impl UnfinishedRow {
    pub(in crate::store) fn into_unfinished(self) -> Result<Unfinished, StoreError> {
        let standing = match (&*self.state, self.due_at) {
            ("retrying", Some(due_at)) => Standing::Retrying { due_at },
            ("parked", _) => Standing::Parked,
            ("dead", _) => Standing::Dead { unpublished: self.unpublished },
            (state, _) => {
                return Err(damaged("unfinished", &format_args!("the state is `{state}`")));
            }
        };
        Ok(Unfinished {
            position: position(self.position)?,
            id: self.id.into(),
            kind: self.kind.into(),
            key: self.key.into(),
            standing,
            attempts: small(self.attempts),
            failure: None,
        })
    }
}

/// A row of [`list_letters`](super::condition::list_letters).
#[derive(Debug)]
pub(in crate::store) struct LetterRow {
    pub(in crate::store) handler: String,
    pub(in crate::store) position: i64,
    pub(in crate::store) id: String,
    pub(in crate::store) kind: String,
    pub(in crate::store) key: String,
    pub(in crate::store) attempts: i64,
    pub(in crate::store) errors: [Option<String>; 2],
    pub(in crate::store) times: [Option<OffsetDateTime>; 2],
    pub(in crate::store) redrive: Option<i64>,
    pub(in crate::store) followers: i64,
}

impl LetterRow {
    pub(in crate::store) fn into_letter(self) -> Result<DeadLetter, StoreError> {
        // A dead letter has failed; one kept without saying how says nothing.
        let [first_error, last_error] = self.errors.map(|e| e.unwrap_or_default().into());
        let [first_failed_at, last_failed_at] =
            self.times.map(|at| at.unwrap_or(OffsetDateTime::UNIX_EPOCH));
        Ok(DeadLetter {
            handler: self.handler.into(),
            position: position(self.position)?,
            id: self.id.into(),
            kind: self.kind.into(),
            key: self.key.into(),
            attempts: small(self.attempts),
            failure: Failure { first_error, last_error, first_failed_at, last_failed_at },
            followers: number(self.followers)?,
            redrive: self.redrive.map(number).transpose()?,
        })
    }
}

/// A redrive and what it has left, without its condition and order. What has ended has nothing.
pub(in crate::store) const REDRIVES: &str = "SELECT number, subject, action, filter, rate, \
    requested_by, reason, state, total, started_at, ended_at, \
    CASE WHEN state = 'running' THEN \
        (SELECT count(*) FROM unfinished WHERE redrive = redrives.number) + \
        (SELECT count(*) FROM quarantine WHERE redrive = redrives.number) \
    ELSE left_over END FROM redrives";

/// A row of these.
#[derive(Debug)]
pub(in crate::store) struct RedriveRow {
    pub(in crate::store) number: i64,
    pub(in crate::store) subject: String,
    pub(in crate::store) action: String,
    pub(in crate::store) filter: String,
    pub(in crate::store) rate: Option<i64>,
    pub(in crate::store) by: String,
    pub(in crate::store) reason: Option<String>,
    pub(in crate::store) state: String,
    pub(in crate::store) total: i64,
    pub(in crate::store) started_at: OffsetDateTime,
    pub(in crate::store) ended_at: Option<OffsetDateTime>,
    pub(in crate::store) left: i64,
}

impl RedriveRow {
    pub(in crate::store) fn into_redrive(self) -> Result<Redrive, StoreError> {
        let damaged = |error| damaged("redrives", &error);
        let filter: serde_json::Value = serde_json::from_str(&self.filter).map_err(damaged)?;
        let selection = json!({ "of": self.subject, "filter": filter });
        Ok(Redrive {
            number: number(self.number)?,
            what: NewRedrive {
                selection: serde_json::from_value(selection).map_err(damaged)?,
                action: word("redrives", &self.action)?,
                rate: self.rate.map(small),
                by: self.by,
                reason: self.reason,
            },
            state: word("redrives", &self.state)?,
            total: number(self.total)?,
            left: number(self.left)?,
            started_at: self.started_at,
            ended_at: self.ended_at,
        })
    }
}

/// The redrive that something is in: number, action, rate.
#[derive(Debug)]
pub(in crate::store) struct InRedrive(
    pub(in crate::store) i64,
    pub(in crate::store) String,
    pub(in crate::store) Option<i64>,
);

impl InRedrive {
    pub(in crate::store) fn letter(self, event: Unfinished) -> Result<Redriven, StoreError> {
        let Self(redrive, action, rate) = self;
        Ok(Redriven {
            redrive: number(redrive)?,
            action: word("redrives", &action)?,
            rate: rate.map(small),
            event,
        })
    }

    pub(in crate::store) fn entry(self, entry: i64) -> Result<RedrivenEntry, StoreError> {
        let Self(redrive, action, rate) = self;
        Ok(RedrivenEntry {
            number: number(entry)?,
            redrive: number(redrive)?,
            action: word("redrives", &action)?,
            rate: rate.map(small),
        })
    }
}

/// Number, by, action, subject and detail of what a person did, and when.
pub(in crate::store) fn audit_entry(
    (entry, by, action, subject, detail): (i64, String, String, String, String),
    at: OffsetDateTime,
) -> Result<AuditEntry, StoreError> {
    Ok(AuditEntry { number: number(entry)?, at, by, action, subject, detail })
}

/// How a transaction failed.
#[derive(Debug)]
pub(in crate::store) enum Failed {
    /// The database says so.
    Database(sqlx::Error),
    /// We do.
    Store(StoreError),
}

impl From<sqlx::Error> for Failed {
    fn from(error: sqlx::Error) -> Self {
        Self::Database(error)
    }
}

impl From<StoreError> for Failed {
    fn from(error: StoreError) -> Self {
        Self::Store(error)
    }
}
