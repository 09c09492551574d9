//! What the errors of SQLite mean.

use std::path::Path;

use crate::store::{AttemptError, StoreError};

/// What a database error means for an append.
pub(super) fn classify(error: &sqlx::Error) -> AttemptError {
    let sqlx::Error::Database(database) = error else {
        return AttemptError::Store(match error {
            sqlx::Error::PoolTimedOut => {
                StoreError::unavailable("the file is busy: no connection became free")
            }
            error => StoreError::unavailable(error),
        });
    };
    let code: i32 = database.code().and_then(|code| code.parse().ok()).unwrap_or_default();
    match (code & 0xff, code) {
        // TOOBIG, CONSTRAINT, MISMATCH: about the data.
        (18..=20, _) => AttemptError::Refused(database.message().to_owned()),
        // CORRUPT, NOTADB; IOERR at an fsync (of file or folder), IOERR_CORRUPTFS, IOERR_DATA.
        // After a failed fsync the system may have dropped the pages and say nothing next time.
        (11 | 26, _) | (_, 1034 | 1290 | 8458 | 8202) => {
            AttemptError::Store(StoreError::fatal(format_args!("{database}")))
        }
        // FULL
        (13, _) => AttemptError::Store(StoreError::unavailable(format_args!(
            "{database}: free space on the disk"
        ))),
        // READONLY, AUTH, PERM
        (3 | 8 | 23, _) => AttemptError::Store(StoreError::unavailable(format_args!(
            "{database}: the file and its folder must be writable"
        ))),
        // BUSY, LOCKED, NOMEM, INTERRUPT, the rest of IOERR, CANTOPEN, PROTOCOL …
        _ => AttemptError::Store(StoreError::unavailable(format_args!("{database}"))),
    }
}

/// The same while opening, when the file itself may be the wrong one.
pub(super) fn opening(error: &sqlx::Error, path: &Path) -> StoreError {
    let path = path.display();
    match (error, classify(error)) {
        (sqlx::Error::Database(e), _) if e.code().as_deref() == Some("26") => {
            StoreError::misconfigured(format_args!("{path} is not a SQLite database"))
        }
        (_, AttemptError::Store(StoreError::Fatal(reason))) => {
            StoreError::fatal(format_args!("{path}: {reason}"))
        }
        (_, AttemptError::Store(StoreError::Unavailable(reason))) => {
            StoreError::unavailable(format_args!("cannot open {path}: {reason}"))
        }
        (_, AttemptError::Store(error)) => error,
        (_, AttemptError::Refused(reason)) => {
            StoreError::misconfigured(format_args!("cannot open {path}: {reason}"))
        }
    }
}

/// The same where nothing can be refused: what the database does not take now, because of a
/// trigger or a limit, it may take when that is mended.
pub(super) fn unrefused(error: AttemptError) -> StoreError {
    match error {
        AttemptError::Store(error) => error,
        AttemptError::Refused(reason) => StoreError::unavailable(reason),
    }
}
