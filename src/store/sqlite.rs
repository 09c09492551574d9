//! The log in a SQLite file: the embedded default.
//!
//! One connection writes, a pool of others reads. WAL mode with `synchronous = FULL`: a commit
//! is on the disk when it returns, as far as the disk tells the truth.

mod append;
pub(crate) mod doctor;
mod error;
mod migrate;
mod progress;
mod read;
mod redrive;
mod retain;
mod text;

use std::{
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use sqlx::{
    AssertSqlSafe, ConnectOptions as _, FromRow as _, Row as _, Sqlite, SqlitePool, Transaction,
    sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous},
};

use self::{
    error::{classify, opening, unrefused},
    migrate::{check_version, migrate},
    read::{COLUMNS, HeldRow, held_row},
};
use super::{
    AttemptError, Batch, Connections, EventStore, Extent, Limit, QuarantineEntry, Query, Removal,
    Removed, StoreError, admit::Caution, append_isolating, progress::row::Failed, row,
};
use crate::{
    event::{Position, StoredEvent},
    transport::{Mark, Receipt},
};

/// How a [`SqliteStore`] is opened.
#[derive(Debug, Clone)]
pub struct SqliteOptions {
    /// The file; it and its folder are created where they are missing. A relative path starts
    /// at the working folder.
    pub path: PathBuf,
    /// How long to wait for another process's lock before saying
    /// [`StoreError::Unavailable`]. Default 5 s.
    pub busy_timeout: Duration,
    /// How many connections read at the same time. Default 4.
    pub readers: u32,
}

impl SqliteOptions {
    /// The file at this path, with the defaults.
    #[must_use]
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), busy_timeout: Duration::from_secs(5), readers: 4 }
    }
}

/// An [`EventStore`] in a SQLite file.
///
/// *Concurrency*: appends are one after the other, also those of other processes with the same
/// file (`BEGIN IMMEDIATE`); readers never wait for them. The file must be on a local disk and
/// must not be written by SQLite older than 3.51.3.
#[derive(Debug)]
pub struct SqliteStore {
    writer: SqlitePool,
    readers: SqlitePool,
    caution: Caution,
    failed: OnceLock<StoreError>,
    patience: Duration,
}

impl SqliteStore {
    /// Opens the file, creates it where it is missing, and brings its tables up to date.
    ///
    /// # Errors
    /// [`StoreError::Misconfigured`] where the file is no database or one of a newer version,
    /// [`StoreError::Unavailable`] where it cannot be opened or is locked, and
    /// [`StoreError::Fatal`] where it is damaged.
    pub async fn open(options: SqliteOptions) -> Result<Self, StoreError> {
        let SqliteOptions { path, busy_timeout, readers } = options;
        if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
            tokio::fs::create_dir_all(folder).await.map_err(|error| {
                StoreError::unavailable(format_args!(
                    "cannot create the folder {}: {error}",
                    folder.display()
                ))
            })?;
        }
        let connect = SqliteConnectOptions::new()
            .filename(&path)
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Full)
            .busy_timeout(busy_timeout)
            // A reader that stays long lets the write-ahead log grow; it is cut back to this.
            .pragma("journal_size_limit", "67108864")
            .disable_statement_logging();
        let pool = |max| {
            SqlitePoolOptions::new()
                .max_connections(max)
                .acquire_timeout(busy_timeout + Duration::from_secs(5))
                .idle_timeout(None)
                .max_lifetime(None)
                .test_before_acquire(false)
        };
        let writer = pool(1).connect_lazy_with(connect.clone());
        let store = Self {
            readers: pool(readers.max(1)).connect_lazy_with(connect.pragma("query_only", "on")),
            writer,
            caution: Caution::default(),
            failed: OnceLock::new(),
            // Another process's lock, twice (for a connection, and on it), and a slow disk.
            patience: 2 * busy_timeout + Duration::from_secs(10),
        };
        match store.prepare(&path).await {
            Ok(()) => Ok(store),
            Err(error) => {
                store.close().await;
                Err(error)
            }
        }
    }

    async fn prepare(&self, path: &Path) -> Result<(), StoreError> {
        let mut connection = self.writer.acquire().await.map_err(|e| opening(&e, path))?;
        let version: String = sqlx::query_scalar("SELECT sqlite_version()")
            .fetch_one(&mut *connection)
            .await
            .map_err(|e| opening(&e, path))?;
        check_version(&version)?;
        migrate(&mut connection, path).await
    }

    /// Keeps what cannot be taken back: after a failed fsync nobody knows what is on the disk,
    /// so no later append may succeed.
    fn check(&self) -> Result<(), StoreError> {
        self.failed.get().map_or(Ok(()), |error| Err(error.clone()))
    }

    fn failure(&self, error: &sqlx::Error) -> AttemptError {
        let error = classify(error);
        if let AttemptError::Store(fatal @ StoreError::Fatal(_)) = &error {
            let _ = self.failed.set(fatal.clone());
        }
        error
    }

    fn read_failure(&self, error: &sqlx::Error) -> StoreError {
        unrefused(self.failure(error))
    }

    async fn begin(&self) -> Result<Transaction<'static, Sqlite>, StoreError> {
        self.check()?;
        let begun = self.writer.begin_with("BEGIN IMMEDIATE").await;
        begun.map_err(|e| self.read_failure(&e))
    }

    /// Commits what went well, and rolls back what did not.
    async fn end<T>(
        &self,
        tx: Transaction<'static, Sqlite>,
        done: Result<T, Failed>,
    ) -> Result<T, StoreError> {
        let failed = match done {
            Ok(value) => {
                return tx.commit().await.map(|()| value).map_err(|e| self.read_failure(&e));
            }
            Err(failed) => failed,
        };
        // What cannot be rolled back is not committed either; the connection is closed.
        let _ = tx.rollback().await;
        Err(match failed {
            Failed::Database(error) => self.read_failure(&error),
            Failed::Store(error) => error,
        })
    }
}

#[async_trait]
impl EventStore for SqliteStore {
    fn kind(&self) -> &'static str {
        "sqlite"
    }

    fn patience(&self) -> Duration {
        self.patience
    }

    async fn append(&self, batch: &Batch) -> Result<Vec<Receipt>, StoreError> {
        append_isolating(self, batch).await
    }

    async fn extent(&self) -> Result<Extent, StoreError> {
        self.find_extent().await
    }

    async fn remove(&self, removal: &Removal) -> Result<Removed, StoreError> {
        self.remove_step(removal).await
    }

    async fn head(&self) -> Result<Position, StoreError> {
        let head: i64 = sqlx::query_scalar("SELECT position FROM log_head")
            .fetch_one(&self.readers)
            .await
            .map_err(|e| self.read_failure(&e))?;
        row::position(head)
    }

    async fn read(
        &self,
        after: Position,
        limit: Limit,
    ) -> Result<Vec<Arc<StoredEvent>>, StoreError> {
        let events = self.read_page(after, limit).await?;
        let Some(first) = events.first() else { return Ok(events) };
        let mut before = Position(first.position.0.saturating_sub(1));
        if before != after && self.find_extent().await?.removed < before {
            // What is missing is more than what was removed.
            before = after;
        }
        row::contiguous(before, &events)?;
        Ok(events)
    }

    async fn get(
        &self,
        positions: &[Position],
        bytes: usize,
    ) -> Result<Vec<Arc<StoredEvent>>, StoreError> {
        if positions.is_empty() {
            return Ok(Vec::new());
        }
        // In order without sorting, so that no body is read before it is wanted.
        let sql = format!(
            "SELECT {COLUMNS} FROM events
             WHERE position IN (SELECT value FROM json_each(?)) ORDER BY position"
        );
        let query =
            sqlx::query(AssertSqlSafe(sql)).bind(text::numbers(positions.iter().map(|p| p.0)));
        let mut events = Vec::new();
        self.fetch(query, bytes, &mut events).await?;
        Ok(events)
    }

    async fn list(&self, query: &Query) -> Result<Vec<Arc<StoredEvent>>, StoreError> {
        let order = if query.descending { "DESC" } else { "ASC" };
        // `?3 IS NULL OR …` and not another text for each: a statement is prepared once, and an
        // index someone added is of no use to a scan that is bounded by position anyway.
        let sql = format!(
            "SELECT {COLUMNS} FROM events WHERE position > ?1 AND position <= ?2
               AND (?3 IS NULL OR type = ?3) AND (?4 IS NULL OR key = ?4)
             ORDER BY position {order} LIMIT ?5"
        );
        let mut events = Vec::new();
        let mut ranges = row::Ranges::new(query, &self.find_extent().await?);
        while let Some((low, high)) = ranges.next().filter(|_| events.len() < query.limit) {
            let statement = sqlx::query(AssertSqlSafe(sql.as_str()))
                .bind(row::signed(low))
                .bind(row::signed(high))
                .bind(query.kind.as_deref())
                .bind(query.key.as_deref())
                .bind(row::signed((query.limit - events.len()) as u64));
            if self.fetch(statement, query.bytes, &mut events).await? {
                break;
            }
        }
        Ok(events)
    }

    async fn find(&self, source: &str, id: &str) -> Result<Option<Arc<StoredEvent>>, StoreError> {
        let sql = format!("SELECT {COLUMNS} FROM events WHERE source = ? AND id = ?");
        let query = sqlx::query(AssertSqlSafe(sql)).bind(source).bind(id);
        let mut events = Vec::new();
        self.fetch(query, usize::MAX, &mut events).await?;
        Ok(events.pop())
    }

    async fn mark(&self, source: &str) -> Result<Option<Mark>, StoreError> {
        let row: Option<(String, i64)> =
            sqlx::query_as("SELECT incarnation, sequence FROM source_marks WHERE source = ?")
                .bind(source)
                .fetch_optional(&self.readers)
                .await
                .map_err(|e| self.read_failure(&e))?;
        row.map(|(incarnation, sequence)| {
            Ok(Mark { incarnation: incarnation.into(), sequence: row::number(sequence)? })
        })
        .transpose()
    }

    async fn quarantine(
        &self,
        after: u64,
        limit: usize,
    ) -> Result<Vec<QuarantineEntry>, StoreError> {
        let rows: Vec<HeldRow> = sqlx::query_as(
            "SELECT number, received_at, reason, origin, headers, length(body) FROM quarantine
             WHERE number > ? ORDER BY number LIMIT ?",
        )
        .bind(row::signed(after))
        .bind(row::signed(limit as u64))
        .fetch_all(&self.readers)
        .await
        .map_err(|e| self.read_failure(&e))?;
        rows.into_iter().map(held_row).collect()
    }

    async fn quarantine_entry(
        &self,
        number: u64,
    ) -> Result<Option<(QuarantineEntry, Bytes)>, StoreError> {
        let row = sqlx::query(
            "SELECT number, received_at, reason, origin, headers, length(body), body
             FROM quarantine WHERE number = ?",
        )
        .bind(row::signed(number))
        .fetch_optional(&self.readers)
        .await
        .map_err(|e| self.read_failure(&e))?;
        let Some(row) = row else { return Ok(None) };
        let read = |e: sqlx::Error| self.read_failure(&e);
        let body: Vec<u8> = row.try_get(6).map_err(read)?;
        let entry = held_row(HeldRow::from_row(&row).map_err(read)?)?;
        Ok(Some((entry, body.into())))
    }

    async fn quarantine_len(&self) -> Result<u64, StoreError> {
        let count: i64 = sqlx::query_scalar("SELECT count(*) FROM quarantine")
            .fetch_one(&self.readers)
            .await
            .map_err(|e| self.read_failure(&e))?;
        row::number(count)
    }

    fn connections(&self) -> Option<Connections> {
        let of = |pool: &SqlitePool| {
            let max = pool.options().get_max_connections();
            Connections::of(pool.size(), pool.num_idle(), max)
        };
        let (readers, writer) = (of(&self.readers), of(&self.writer));
        Some(Connections {
            used: readers.used + writer.used,
            idle: readers.idle + writer.idle,
            max: readers.max + writer.max,
        })
    }

    async fn close(&self) {
        self.readers.close().await;
        self.writer.close().await;
    }
}
