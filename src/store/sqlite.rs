//! The log in a SQLite file: the embedded default.
//!
//! One connection writes, a pool of others reads. WAL mode with `synchronous = FULL`: a commit
//! is on the disk when it returns, as far as the disk tells the truth.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::TryStreamExt as _;
use sqlx::{
    AssertSqlSafe, ConnectOptions as _, FromRow as _, Row as _, SqlSafeStr as _, Sqlite,
    SqliteConnection, SqlitePool, Transaction,
    migrate::{MigrateError, Migration, MigrationType, Migrator},
    sqlite::{
        SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteRow, SqliteSynchronous,
    },
};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use super::{
    AttemptAppend, AttemptError, Batch, DeadLetter, EventStore, Limit, QuarantineEntry, Query,
    StoreError,
    admit::{self, Caution, Held, HeldBefore, Plan},
    append_isolating,
    row::{self, EventRow, Texts},
};
use crate::{
    event::{Event, Position, StoredEvent},
    transport::{Mark, Receipt},
};

/// The first version without the WAL-reset corruption of 3.7.0 to 3.51.2.
const OLDEST: (u32, u32, u32) = (3, 51, 3);

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
        match self.failure(error) {
            AttemptError::Store(error) => error,
            AttemptError::Refused(reason) => StoreError::unavailable(reason),
        }
    }

    async fn transact(&self, batch: &Batch, keep: bool) -> Result<Vec<Receipt>, AttemptError> {
        self.check()?;
        let mut tx =
            self.writer.begin_with("BEGIN IMMEDIATE").await.map_err(|e| self.failure(&e))?;
        let written = self.write(&mut tx, batch).await;
        let (receipts, changed) = match written {
            Ok(written) => written,
            Err(error) => {
                // What cannot be rolled back is not committed either; the connection is closed.
                let _ = tx.rollback().await;
                return Err(error);
            }
        };
        if !keep || !changed {
            tx.rollback().await.map_err(|e| self.failure(&e))?;
            return Ok(receipts);
        }
        let doubt = self.caution.doubt();
        tx.commit().await.map_err(|e| self.failure(&e))?;
        doubt.known();
        Ok(receipts)
    }

    /// Writes the batch; says whether there was anything to write.
    async fn write(
        &self,
        tx: &mut Transaction<'static, Sqlite>,
        batch: &Batch,
    ) -> Result<(Vec<Receipt>, bool), AttemptError> {
        let now = text_time(batch.recorded_at)?;
        let (head, quarantined): (i64, i64) =
            sqlx::query_as("SELECT position, quarantined FROM log_head")
                .fetch_one(&mut **tx)
                .await
                .map_err(|e| self.failure(&e))?;
        let (head, number) = (row::position(head)?, row::number(quarantined)?);

        let mut plan = if self.caution.is_raised() {
            self.check_copies(tx, batch, &now).await?
        } else {
            Plan::all_new(&batch.entries)
        };
        if let Err(error) = insert_events(tx, &plan.fresh, head, &now).await? {
            let unique = matches!(&error, sqlx::Error::Database(e) if e.is_unique_violation());
            if !unique {
                return Err(self.failure(&error));
            }
            self.caution.raise();
            plan = self.check_copies(tx, batch, &now).await?;
            if let Err(error) = insert_events(tx, &plan.fresh, head, &now).await? {
                if matches!(&error, sqlx::Error::Database(e) if e.is_unique_violation()) {
                    return Err(AttemptError::Store(StoreError::fatal(format_args!(
                        "`log_head` says the log ends at {head}, but there are events behind it: \
                         the file was changed by hand or restored in part"
                    ))));
                }
                return Err(self.failure(&error));
            }
        }
        insert_held(tx, &plan.held, head, number, &now).await?.map_err(|e| self.failure(&e))?;
        if !plan.is_empty() {
            sqlx::query("UPDATE log_head SET position = ?, quarantined = ?")
                .bind(row::signed(head.0 + plan.fresh.len() as u64))
                .bind(row::signed(number + plan.held.len() as u64))
                .execute(&mut **tx)
                .await
                .map_err(|e| self.failure(&e))?;
        }
        for (source, mark) in admit::fold_marks(&batch.marks) {
            sqlx::query(SAVE_MARK)
                .bind(source)
                .bind(&*mark.incarnation)
                .bind(row::signed(mark.sequence))
                .execute(&mut **tx)
                .await
                .map_err(|e| self.failure(&e))?;
        }
        Ok((plan.receipts(head, number), !plan.is_empty() || !batch.marks.is_empty()))
    }

    /// Plans the batch with copies looked up.
    async fn check_copies<'b>(
        &self,
        tx: &mut Transaction<'static, Sqlite>,
        batch: &'b Batch,
        now: &str,
    ) -> Result<Plan<'b>, AttemptError> {
        let identities = array(row::events(&batch.entries), |(_, event), out| {
            row::write_json(&[event.source(), event.id()], out)
        })?;
        let rows: Vec<(i64, i64, String, String, String)> = sqlx::query_as(FIND_COPIES)
            .bind(identities)
            .fetch_all(&mut **tx)
            .await
            .map_err(|e| self.failure(&e))?;
        let indexed: Vec<_> = row::events(&batch.entries).collect();
        let mut known: Vec<Option<(Position, Event)>> = Vec::new();
        known.resize_with(batch.entries.len(), || None);
        for (nth, position, kind, format, body) in rows {
            let Some(&(index, event)) = usize::try_from(nth).ok().and_then(|n| indexed.get(n))
            else {
                continue;
            };
            let first = row::known_event(event, kind, &format, body)?;
            known[index] = Some((row::position(position)?, first));
        }
        let mut plan = Plan::checked(&batch.entries, |index, _| {
            known[index].as_ref().map(|(position, event)| (*position, event))
        });
        if plan.met_copies() {
            self.caution.raise();
        } else {
            self.caution.relax();
        }
        if !plan.held.is_empty() {
            let rows: Vec<(i64, String, Vec<u8>)> = sqlx::query_as(FIND_HELD)
                .bind(now)
                .fetch_all(&mut **tx)
                .await
                .map_err(|e| self.failure(&e))?;
            let before = rows
                .into_iter()
                .map(|(number, reason, body)| {
                    Ok(HeldBefore { number: row::number(number)?, reason, body: body.into() })
                })
                .collect::<Result<_, StoreError>>()?;
            plan.forget_held(before);
        }
        Ok(plan)
    }

    /// Adds what is found until all of it has so many bytes; says whether that cut it short.
    async fn fetch(
        &self,
        query: sqlx::query::Query<'_, Sqlite, sqlx::sqlite::SqliteArguments>,
        bytes: usize,
        found: &mut Vec<Arc<StoredEvent>>,
    ) -> Result<bool, StoreError> {
        let mut rows = query.fetch(&self.readers);
        let mut sum: usize = found.iter().map(|event| event.body().len()).sum();
        while let Some(row) = rows.try_next().await.map_err(|e| self.read_failure(&e))? {
            let event = event_row(&row).map_err(|e| self.read_failure(&e))??.into_event()?;
            sum += event.body().len();
            if sum > bytes && !found.is_empty() {
                return Ok(true);
            }
            found.push(Arc::new(event));
        }
        Ok(false)
    }
}

const SAVE_MARK: &str = "INSERT INTO source_marks (source, incarnation, sequence) VALUES (?, ?, ?)
    ON CONFLICT (source) DO UPDATE SET
        sequence = CASE WHEN incarnation = excluded.incarnation
                        THEN max(sequence, excluded.sequence) ELSE excluded.sequence END,
        incarnation = excluded.incarnation";

const INSERT_EVENTS: &str = "INSERT INTO events (position, source, id, type, subject, time, key, \
    body, format, headers, origin, recorded_at)
    SELECT ?1 + j.key + 1, j.value ->> 0, j.value ->> 1, j.value ->> 2, j.value ->> 3, \
        j.value ->> 4, j.value ->> 5, j.value ->> 6, j.value ->> 7, j.value ->> 8, \
        j.value ->> 9, ?3
    FROM json_each(?2) AS j";

// The bytes travel as hexadecimal: they are whatever a broker handed over.
const INSERT_HELD: &str = "INSERT INTO quarantine (number, source, received_at, reason, origin, \
    headers, body)
    SELECT ?1 + j.key + 1, j.value ->> 0, ?3, j.value ->> 1, j.value ->> 2, j.value ->> 3, \
        unhex(j.value ->> 4)
    FROM json_each(?2) AS j";

const FIND_COPIES: &str = "SELECT j.key, e.position, e.type, e.format, e.body
    FROM json_each(?1) AS j CROSS JOIN events AS e
    ON e.source = j.value ->> 0 AND e.id = j.value ->> 1";

// Only what an earlier attempt at the same batch can have written: that was not long ago.
const FIND_HELD: &str = "SELECT number, reason, body FROM quarantine
    WHERE number > (SELECT quarantined FROM log_head) - 10000 AND received_at = ?
    ORDER BY number";

const BURY: &str = "INSERT INTO dead_letters (handler, position, id, type, key, attempts, \
    first_error, last_error, first_failed_at, last_failed_at)
    SELECT value ->> '$[0][0]', value ->> '$[0][1]', value ->> '$[1][0]', value ->> '$[1][1]', \
        value ->> '$[1][2]', value ->> '$[1][3]', value ->> '$[2][0]', value ->> '$[2][1]', \
        value ->> '$[3][0]', value ->> '$[3][1]'
    FROM json_each(?1) WHERE true ORDER BY json_each.key
    ON CONFLICT (handler, position) DO UPDATE SET attempts = excluded.attempts, \
        first_error = excluded.first_error, last_error = excluded.last_error, \
        first_failed_at = excluded.first_failed_at, last_failed_at = excluded.last_failed_at";

/// What an insert came to: the inner error is the database's and leaves the transaction open.
type Inserted = Result<Result<(), sqlx::Error>, AttemptError>;

async fn insert_events(
    tx: &mut Transaction<'static, Sqlite>,
    events: &[&Event],
    head: Position,
    now: &str,
) -> Inserted {
    if events.is_empty() {
        return Ok(Ok(()));
    }
    let headers = Texts::headers(events.iter().map(|e| e.headers()))?;
    let origins = Texts::origins(events.iter().map(|e| e.origin()))?;
    let rows = events.iter().zip(headers.iter().zip(origins.iter()));
    let json = array(rows, |(event, (headers, origin)), out| {
        let time = event.time().map(text_time).transpose()?;
        let body = row::body_text(event)?;
        for text in [event.source(), event.id(), event.kind(), event.key()] {
            no_nul(text)?;
        }
        event.subject().map_or(Ok(()), no_nul)?;
        row::write_json(
            &(
                event.source(),
                event.id(),
                event.kind(),
                event.subject(),
                time,
                event.key(),
                body,
                event.format().as_str(),
                headers,
                origin,
            ),
            out,
        )
    })?;
    let insert = sqlx::query(INSERT_EVENTS).bind(row::signed(head.0)).bind(json).bind(now);
    Ok(insert.execute(&mut **tx).await.map(drop))
}

async fn insert_held(
    tx: &mut Transaction<'static, Sqlite>,
    held: &[Held<'_>],
    head: Position,
    number: u64,
    now: &str,
) -> Inserted {
    if held.is_empty() {
        return Ok(Ok(()));
    }
    let headers = Texts::headers(held.iter().map(|h| h.headers))?;
    let origins = Texts::origins(held.iter().map(|h| h.origin))?;
    let rows = held.iter().zip(headers.iter().zip(origins.iter()));
    let json = array(rows, |(held, (headers, origin)), out| {
        let (source, reason) = (row::held_source(held), held.reason(head));
        row::write_json(&(source, reason, origin, headers, Hex(held.body)), out)
    })?;
    let insert = sqlx::query(INSERT_HELD).bind(row::signed(number)).bind(json).bind(now);
    Ok(insert.execute(&mut **tx).await.map(drop))
}

/// A JSON array of these.
fn array<T>(
    items: impl Iterator<Item = T>,
    write: impl Fn(T, &mut Vec<u8>) -> Result<(), AttemptError>,
) -> Result<String, AttemptError> {
    let mut out = vec![b'['];
    for item in items {
        if out.len() > 1 {
            out.push(b',');
        }
        write(item, &mut out)?;
    }
    out.push(b']');
    String::from_utf8(out).map_err(|error| AttemptError::Refused(error.to_string()))
}

/// Bytes as hexadecimal.
struct Hex<'a>(&'a [u8]);

impl serde::Serialize for Hex<'_> {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        const DIGITS: &[u8; 16] = b"0123456789abcdef";
        let mut text = String::with_capacity(self.0.len() * 2);
        for byte in self.0 {
            text.push(char::from(DIGITS[usize::from(byte >> 4)]));
            text.push(char::from(DIGITS[usize::from(byte & 15)]));
        }
        serializer.serialize_str(&text)
    }
}

/// SQLite's JSON functions cut a text at U+0000, which must not change an event unnoticed (G9).
fn no_nul(text: &str) -> Result<(), AttemptError> {
    if text.contains('\0') {
        return Err(AttemptError::Refused(
            "an attribute contains U+0000, which the database cannot keep".to_owned(),
        ));
    }
    Ok(())
}

/// RFC 3339, UTC, always six digits: the text sorts as the times do.
fn text_time(at: OffsetDateTime) -> Result<String, AttemptError> {
    let at = at.to_offset(time::UtcOffset::UTC);
    if !(0..=9999).contains(&at.year()) {
        return Err(AttemptError::Refused(format!("the year {} is out of range", at.year())));
    }
    let (date, time) = (at.date(), at.time());
    Ok(format!(
        "{:04}-{:02}-{:02}T{:02}:{:02}:{:02}.{:06}Z",
        date.year(),
        u8::from(date.month()),
        date.day(),
        time.hour(),
        time.minute(),
        time.second(),
        time.microsecond(),
    ))
}

fn parse_time(text: &str) -> Result<OffsetDateTime, StoreError> {
    OffsetDateTime::parse(text, &Rfc3339).map_err(|error| {
        StoreError::fatal(format_args!("`{text}` in the database is no time: {error}"))
    })
}

const COLUMNS: &str = "position, source, id, type, subject, time, key, body, format, headers, \
    origin, recorded_at";

fn event_row(row: &SqliteRow) -> Result<Result<EventRow, StoreError>, sqlx::Error> {
    let time: Option<String> = row.try_get(5)?;
    let recorded_at: String = row.try_get(11)?;
    let times = time
        .map(|time| parse_time(&time))
        .transpose()
        .and_then(|time| Ok((time, parse_time(&recorded_at)?)));
    let (time, recorded_at) = match times {
        Ok(times) => times,
        Err(error) => return Ok(Err(error)),
    };
    Ok(Ok(EventRow {
        position: row.try_get(0)?,
        source: row.try_get(1)?,
        id: row.try_get(2)?,
        kind: row.try_get(3)?,
        subject: row.try_get(4)?,
        time,
        key: row.try_get(6)?,
        body: row.try_get(7)?,
        format: row.try_get(8)?,
        headers: row.try_get(9)?,
        origin: row.try_get(10)?,
        recorded_at,
    }))
}

/// Number, time, reason, origin, headers and size.
type HeldRow = (i64, String, String, String, String, i64);

fn held_row(
    (number, received_at, reason, origin, headers, size): HeldRow,
) -> Result<QuarantineEntry, StoreError> {
    row::quarantine_entry(number, parse_time(&received_at)?, reason, &origin, &headers, size)
}

#[async_trait]
impl AttemptAppend for SqliteStore {
    async fn attempt(&self, batch: &Batch) -> Result<Vec<Receipt>, AttemptError> {
        self.transact(batch, true).await
    }

    async fn probe(&self, batch: &Batch) -> Result<(), AttemptError> {
        self.transact(batch, false).await.map(drop)
    }
}

#[async_trait]
impl EventStore for SqliteStore {
    fn kind(&self) -> &'static str {
        "sqlite"
    }

    async fn append(&self, batch: &Batch) -> Result<Vec<Receipt>, StoreError> {
        append_isolating(self, batch).await
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
        let sql =
            format!("SELECT {COLUMNS} FROM events WHERE position > ? ORDER BY position LIMIT ?");
        let query = sqlx::query(AssertSqlSafe(sql))
            .bind(row::signed(after.0))
            .bind(row::signed(limit.events as u64));
        let mut events = Vec::new();
        self.fetch(query, limit.bytes, &mut events).await?;
        row::contiguous(after, &events)?;
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
        let mut ranges = row::Ranges::new(query, self.head().await?);
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

    async fn cursor(&self, handler: &str) -> Result<Option<Position>, StoreError> {
        let position: Option<i64> =
            sqlx::query_scalar("SELECT position FROM cursors WHERE handler = ?")
                .bind(handler)
                .fetch_optional(&self.readers)
                .await
                .map_err(|e| self.read_failure(&e))?;
        position.map(row::position).transpose()
    }

    async fn save_cursors(&self, cursors: &[(Arc<str>, Position)]) -> Result<(), StoreError> {
        if cursors.is_empty() {
            return Ok(());
        }
        self.check()?;
        let json = array(cursors.iter(), |(handler, position), out| {
            row::write_json(&(&**handler, row::signed(position.0)), out)
        });
        let now = text_time(crate::event::now());
        let (Ok(json), Ok(now)) = (json, now) else {
            return Err(StoreError::unavailable("cursors cannot be written as JSON"));
        };
        // WHERE true: without it the grammar takes ON for a join's.
        sqlx::query(
            "INSERT INTO cursors (handler, position, updated_at)
             SELECT value ->> 0, value ->> 1, ?2 FROM json_each(?1) WHERE true ORDER BY key
             ON CONFLICT (handler) DO UPDATE
             SET position = excluded.position, updated_at = excluded.updated_at",
        )
        .bind(json)
        .bind(now)
        .execute(&self.writer)
        .await
        .map_err(|e| self.read_failure(&e))?;
        Ok(())
    }

    async fn bury(&self, letters: &[DeadLetter]) -> Result<(), StoreError> {
        if letters.is_empty() {
            return Ok(());
        }
        self.check()?;
        let json = array(letters.iter(), |letter, out| {
            let row = (
                (&*letter.handler, row::signed(letter.position.0)),
                (&letter.id, &letter.kind, &letter.key, letter.attempts),
                (&letter.first_error, &letter.last_error),
                (text_time(letter.first_failed_at)?, text_time(letter.last_failed_at)?),
            );
            row::write_json(&row, out)
        });
        let json = json.map_err(|error| match error {
            AttemptError::Store(error) => error,
            AttemptError::Refused(reason) => StoreError::unavailable(reason),
        })?;
        sqlx::query(BURY)
            .bind(json)
            .execute(&self.writer)
            .await
            .map_err(|e| self.read_failure(&e))?;
        Ok(())
    }

    async fn dead_letters(
        &self,
        handler: Option<&str>,
        after: u64,
        limit: usize,
    ) -> Result<Vec<DeadLetter>, StoreError> {
        let rows = sqlx::query(
            "SELECT number, handler, position, id, type, key, attempts, first_error, last_error,
                    first_failed_at, last_failed_at
             FROM dead_letters WHERE number > ?1 AND (?2 IS NULL OR handler = ?2)
             ORDER BY number LIMIT ?3",
        )
        .bind(row::signed(after))
        .bind(handler)
        .bind(row::signed(limit as u64))
        .fetch_all(&self.readers)
        .await
        .map_err(|e| self.read_failure(&e))?;
        rows.iter()
            .map(|row| {
                let read = |e: sqlx::Error| self.read_failure(&e);
                Ok(DeadLetter {
                    number: row::number(row.try_get(0).map_err(read)?)?,
                    handler: row.try_get::<String, _>(1).map_err(read)?.into(),
                    position: row::position(row.try_get(2).map_err(read)?)?,
                    id: row.try_get(3).map_err(read)?,
                    kind: row.try_get(4).map_err(read)?,
                    key: row.try_get(5).map_err(read)?,
                    attempts: row.try_get(6).map_err(read)?,
                    first_error: row.try_get(7).map_err(read)?,
                    last_error: row.try_get(8).map_err(read)?,
                    first_failed_at: parse_time(row.try_get(9).map_err(read)?)?,
                    last_failed_at: parse_time(row.try_get(10).map_err(read)?)?,
                })
            })
            .collect()
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

    async fn close(&self) {
        self.readers.close().await;
        self.writer.close().await;
    }
}

/// What a database error means for an append.
fn classify(error: &sqlx::Error) -> AttemptError {
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
fn opening(error: &sqlx::Error, path: &Path) -> StoreError {
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

fn check_version(version: &str) -> Result<(), StoreError> {
    let mut parts = version.split('.').map(|part| part.parse::<u32>().unwrap_or(0));
    let mut part = || parts.next().unwrap_or(0);
    if (part(), part(), part()) < OLDEST {
        let (major, minor, patch) = OLDEST;
        return Err(StoreError::misconfigured(format_args!(
            "this build is linked with SQLite {version}, which can corrupt a file in WAL mode: \
             build with SQLite {major}.{minor}.{patch} or newer"
        )));
    }
    Ok(())
}

async fn migrate(connection: &mut SqliteConnection, file: &Path) -> Result<(), StoreError> {
    let migration = |version, name: &'static str, sql: &'static str| {
        Migration::new(version, name.into(), MigrationType::Simple, sql.into_sql_str(), false)
    };
    let mut migrator = Migrator::with_migrations(vec![
        migration(1, "log", include_str!("migrations/sqlite/0001_log.sql")),
        migration(2, "dead letters", include_str!("migrations/sqlite/0002_dead_letters.sql")),
    ]);
    migrator.dangerous_set_table_name("pulsebus_migrations");
    let mut tries = 0;
    loop {
        tries += 1;
        let error = match migrator.run_direct(None, connection, false).await {
            Ok(()) => return Ok(()),
            Err(error) => error,
        };
        let path = file.display();
        return Err(match error {
            MigrateError::VersionMissing(version) => StoreError::misconfigured(format_args!(
                "{path} has schema version {version}, which this pulsebus does not know: run the \
                 newer version that wrote it, or choose another file"
            )),
            MigrateError::VersionMismatch(version) => StoreError::misconfigured(format_args!(
                "{path} has a schema version {version} that is not this program's: choose \
                 another file"
            )),
            // Another process may be creating the tables at this moment; SQLite has no lock
            // that spans migrations.
            MigrateError::Execute(_) | MigrateError::ExecuteMigration(..) if tries < 3 => continue,
            MigrateError::Execute(error) => opening(&error, file),
            MigrateError::ExecuteMigration(sqlx::Error::Database(error), version)
                if error.code().as_deref() == Some("1") =>
            {
                StoreError::misconfigured(format_args!(
                    "cannot bring {path} to schema version {version}: {error}; is it another \
                     program's file?"
                ))
            }
            MigrateError::ExecuteMigration(error, _) => opening(&error, file),
            error => StoreError::misconfigured(format_args!("{path}: {error}")),
        });
    }
}
