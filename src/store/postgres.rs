//! The log in Postgres.
//!
//! The head of the log is a row that every append updates in its own transaction. That row's
//! lock is held until the append is committed and visible, so appends commit in the order of
//! their positions, and one that fails gives its positions back: no gaps, and no reader that
//! sees n before n-1, with any number of writers (G3). An append is one statement and one round
//! trip.
//!
//! Read and write the primary only. Durability is the server's: `synchronous_commit` is switched
//! on where it is off, but only synchronous replication survives the loss of the primary.

pub(crate) mod doctor;
mod error;
mod progress;
mod redrive;
mod retain;
mod sql;

use std::{
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use sqlx::{
    AssertSqlSafe, ConnectOptions as _, Connection as _, PgConnection, PgPool, Postgres, Row as _,
    SqlSafeStr as _,
    migrate::{MigrateError, Migration, MigrationType, Migrator},
    postgres::{PgBindIterExt as _, PgConnectOptions, PgListener, PgPoolOptions, PgRow, PgSslMode},
};
use time::OffsetDateTime;
use tokio::sync::Mutex;

use super::{
    AttemptAppend, AttemptError, Batch, Connections, EventStore, Extent, Limit, QuarantineEntry,
    Query, Removal, Removed, StoreError,
    admit::{self, Caution, HeldBefore, Known, Plan},
    append_isolating,
    progress::row::Failed,
    retain::{identity, sizes},
    row::{self, EventRow, Texts},
};
use crate::{
    event::{Event, Position, StoredEvent},
    secret::Secret,
    store::admit::Held,
    tls::TlsOptions,
    transport::{Mark, Receipt},
};
use error::{Class, class};

/// How many times an append looks for copies again because another writer was faster.
const TRIES: usize = 16;

/// How often the head is looked at while notifications may be getting lost.
const POLL: Duration = Duration::from_secs(1);

/// How a [`PostgresStore`] connects.
#[derive(Debug, Clone)]
pub struct PostgresOptions {
    /// `postgres://user:password@host:port/database?sslmode=…`.
    pub url: Secret,
    /// Verified TLS, or no connection: `sslmode=verify-full`, whatever the URL says. `None`
    /// (default): as the URL says.
    pub tls: Option<TlsOptions>,
    /// Connections for reading; one more writes. Default 8, at least 2.
    pub max_connections: u32,
    /// How long to wait for a connection. Default 10 s.
    pub connect_timeout: Duration,
    /// How long to wait for an answer before the connection counts as lost. Default 30 s.
    pub timeout: Duration,
}

impl PostgresOptions {
    /// The database at this URL, with the defaults.
    #[must_use]
    pub const fn new(url: Secret) -> Self {
        Self {
            url,
            tls: None,
            max_connections: 8,
            connect_timeout: Duration::from_secs(10),
            timeout: Duration::from_secs(30),
        }
    }

    fn parse(&self) -> Result<PgConnectOptions, StoreError> {
        let url = self.url.read().map_err(|error| {
            StoreError::misconfigured(format_args!("the URL of the store: {error}"))
        })?;
        let url = url.trim();
        if !(url.starts_with("postgres://") || url.starts_with("postgresql://")) {
            return Err(StoreError::misconfigured(
                "the URL of the store must begin with postgres:// or postgresql://",
            ));
        }
        // The error says what is wrong with a part; it never contains the whole.
        let options: PgConnectOptions = url.parse().map_err(|_| {
            StoreError::misconfigured(
                "the URL of the store cannot be read: expected \
                 postgres://user:password@host:port/database, with characters such as @ or / in \
                 the password percent-encoded",
            )
        })?;
        let mut options = options.application_name("pulsebus").disable_statement_logging();
        if let Some(tls) = &self.tls {
            options = options.ssl_mode(PgSslMode::VerifyFull);
            if let Some(ca) = &tls.ca_file {
                options = options.ssl_root_cert(ca);
            }
            if let (Some(certificate), Some(key)) = (&tls.cert_file, &tls.key_file) {
                options = options.ssl_client_cert(certificate).ssl_client_key(key);
            }
        }
        Ok(options)
    }
}

/// An [`EventStore`] in a Postgres database.
///
/// *Concurrency*: any number of processes may append to one database; each has one connection
/// for it, and the head row puts them in order.
#[derive(Debug)]
pub struct PostgresStore {
    options: PostgresOptions,
    /// Where the server is, for error texts: never the password.
    place: String,
    readers: PgPool,
    /// Taken out while it is used: what is dropped or fails in between is closed with it, and
    /// with it whatever the server was doing for it.
    writer: Mutex<Option<PgConnection>>,
    listener: Mutex<Option<PgListener>>,
    caution: Caution,
    failed: OnceLock<StoreError>,
    /// The furthest the log has been seen.
    seen: AtomicU64,
    /// The last position that is known to be removed: where there is one, appends look for copies
    /// of what was.
    removed: AtomicU64,
    /// How many events a read asks for, so that a log of large bodies is not read in vain.
    page: AtomicUsize,
}

impl PostgresStore {
    /// Connects, and brings the tables up to date.
    ///
    /// # Errors
    /// [`StoreError::Misconfigured`] where the URL, the login, the database or its schema is
    /// not right, and [`StoreError::Unavailable`] where the server cannot be reached.
    pub async fn connect(options: PostgresOptions) -> Result<Self, StoreError> {
        let parsed = options.parse()?;
        let readers = PgPoolOptions::new()
            .max_connections(options.max_connections.max(2))
            .acquire_timeout(options.connect_timeout)
            .after_connect(|connection, _| Box::pin(prepare_session(connection)))
            .connect_lazy_with(parsed.clone());
        let store = Self {
            place: error::place(&parsed),
            options,
            readers,
            writer: Mutex::new(None),
            listener: Mutex::new(None),
            caution: Caution::default(),
            failed: OnceLock::new(),
            seen: AtomicU64::new(0),
            removed: AtomicU64::new(0),
            page: AtomicUsize::new(usize::MAX),
        };
        let mut connection = store.open_connection().await?;
        migrate(&mut connection, &store.place).await?;
        *store.writer.lock().await = Some(connection);
        store.head().await?;
        store.find_extent().await?;
        Ok(store)
    }

    async fn open_connection(&self) -> Result<PgConnection, StoreError> {
        // Read anew, so that a rotated password is picked up.
        let options = self.options.parse()?;
        let opening = async {
            let mut connection = PgConnection::connect_with(&options).await?;
            prepare_session(&mut connection).await?;
            Ok::<_, sqlx::Error>(connection)
        };
        match tokio::time::timeout(self.options.connect_timeout, opening).await {
            Ok(Ok(connection)) => {
                self.readers.set_connect_options(options);
                Ok(connection)
            }
            Ok(Err(error)) => Err(error::opening(&error, &self.place, self.options.tls.as_ref())),
            Err(_) => Err(StoreError::unavailable(format_args!(
                "no connection to {} within {:?}",
                self.place, self.options.connect_timeout
            ))),
        }
    }

    /// Has the connections that are made from now on use the URL as it is now.
    fn refresh(&self) {
        if let Ok(options) = self.options.parse() {
            self.readers.set_connect_options(options);
        }
    }

    /// Keeps what cannot be taken back.
    fn fatal(&self, error: StoreError) -> StoreError {
        if matches!(error, StoreError::Fatal(_)) {
            let _ = self.failed.set(error.clone());
        }
        error
    }

    fn check(&self) -> Result<(), StoreError> {
        self.failed.get().map_or(Ok(()), |error| Err(error.clone()))
    }

    /// Fails where the log has become shorter than it was.
    fn check_head(&self, before: u64, head: Position) -> Result<(), StoreError> {
        if head.0 < before {
            return Err(self.fatal(StoreError::fatal(format_args!(
                "the log ended at position {before} and now ends at {head}: the primary has lost \
                 its tail, or is another one; restore what is missing before going on"
            ))));
        }
        Ok(())
    }

    /// Waits for a read, but not for ever.
    async fn reading<T>(
        &self,
        query: impl Future<Output = Result<T, sqlx::Error>> + Send,
    ) -> Result<T, StoreError> {
        self.transacting(async { Ok(query.await?) }).await
    }

    /// The same for what may also fail for a reason of ours.
    async fn transacting<T>(
        &self,
        work: impl Future<Output = Result<T, Failed>> + Send,
    ) -> Result<T, StoreError> {
        self.check()?;
        let patience = self.options.connect_timeout + self.options.timeout;
        match tokio::time::timeout(patience, work).await {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(Failed::Store(error))) => Err(error),
            Ok(Err(Failed::Database(error))) => match class(&error) {
                Class::Store(error) => {
                    self.refresh();
                    Err(self.fatal(error))
                }
                Class::Refused(reason) => Err(StoreError::unavailable(reason)),
            },
            Err(_) => {
                self.refresh();
                Err(self.silent(patience))
            }
        }
    }

    fn silent(&self, patience: Duration) -> StoreError {
        StoreError::unavailable(format_args!("no answer from {} within {patience:?}", self.place))
    }

    async fn append_once(&self, batch: &Batch, keep: bool) -> Result<Vec<Receipt>, AttemptError> {
        self.check()?;
        let mut writer = self.writer.lock().await;
        let mut connection = match writer.take() {
            Some(connection) => connection,
            None => self.open_connection().await.map_err(|error| match error {
                // It was right once; a person who mends it should not have to restart as well.
                StoreError::Misconfigured(reason) => StoreError::Unavailable(reason),
                error => error,
            })?,
        };
        let doubt = self.caution.doubt();
        let patience = self.options.timeout;
        let writing = self.write(&mut connection, batch, keep);
        let written = match tokio::time::timeout(patience, writing).await {
            Ok(written) => written,
            Err(_) => return Err(AttemptError::Store(self.silent(patience))),
        };
        match &written {
            Ok(_) | Err(AttemptError::Refused(_)) => {
                // The outcome is known, and the connection is as good as before.
                doubt.known();
                *writer = Some(connection);
            }
            Err(AttemptError::Store(_)) => {}
        }
        written
    }

    fn failure(&self, error: &sqlx::Error) -> AttemptError {
        match class(error) {
            Class::Refused(reason) => AttemptError::Refused(reason),
            Class::Store(error) => AttemptError::Store(self.fatal(error)),
        }
    }

    async fn write(
        &self,
        connection: &mut PgConnection,
        batch: &Batch,
        keep: bool,
    ) -> Result<Vec<Receipt>, AttemptError> {
        let before = self.seen.load(Relaxed);
        for _ in 0..TRIES {
            let written = if keep {
                self.try_write(connection, batch, before).await?
            } else {
                let mut probe = connection.begin().await.map_err(|e| self.failure(&e))?;
                let written = self.try_write(&mut probe, batch, before).await;
                // After a refusal the transaction is aborted; rolling back mends that.
                probe.rollback().await.map_err(|e| self.failure(&e))?;
                written?
            };
            if let Some((receipts, head)) = written {
                if keep {
                    self.seen.fetch_max(head.0, Relaxed);
                }
                return Ok(receipts);
            }
        }
        Err(AttemptError::Store(StoreError::unavailable(
            "other writers keep storing the same events",
        )))
    }

    /// Appends, and says where the log ends now; `None` where somebody else has stored some of
    /// these in the meantime and nothing was written.
    async fn try_write(
        &self,
        connection: &mut PgConnection,
        batch: &Batch,
        before: u64,
    ) -> Result<Option<(Vec<Receipt>, Position)>, AttemptError> {
        let plan = if self.caution.is_raised() {
            self.check_copies(connection, batch).await?
        } else {
            Plan::all_new(&batch.entries)
        };
        if plan.is_empty() && batch.marks.is_empty() {
            return Ok(Some((plan.receipts(Position::START, 0), Position::START)));
        }
        let looks = self.removed.load(Relaxed) > 0;
        let error = match insert(connection, &plan, batch, looks).await? {
            Ok(None) => {
                self.look_at_beginning(connection).await?;
                return Ok(None);
            }
            Ok(Some((head, number))) => {
                let (head, number) = (row::position(head)?, row::number(number)?);
                self.check_head(before, head)?;
                let end = Position(head.0 + plan.fresh.len() as u64);
                return Ok(Some((plan.receipts(head, number), end)));
            }
            Err(error) => error,
        };
        match error::conflict(&error) {
            Some("events_source_id_key") => {
                self.caution.raise();
                Ok(None)
            }
            Some("events_pkey" | "quarantine_pkey") => {
                Err(AttemptError::Store(self.fatal(StoreError::fatal(format_args!(
                    "`log_head` says where the log and quarantine end, but there are rows behind \
                     it: the database was changed by hand or restored in part ({error})"
                )))))
            }
            _ => Err(self.failure(&error)),
        }
    }

    /// Plans the batch with copies looked up.
    ///
    /// What is found stays: rows of the log are never changed, and of what is removed the identity
    /// stays. What another writer adds in the meantime makes the insert fail, and so does what is
    /// removed meanwhile; then this is done again.
    async fn check_copies<'b>(
        &self,
        connection: &mut PgConnection,
        batch: &'b Batch,
    ) -> Result<Plan<'b>, AttemptError> {
        let indexed: Vec<_> = row::events(&batch.entries).collect();
        let rows = sqlx::query(sql::FIND_COPIES)
            .bind(indexed.iter().map(|(_, event)| event.source()).bind_iter())
            .bind(indexed.iter().map(|(_, event)| event.id()).bind_iter())
            .fetch_all(&mut *connection)
            .await
            .map_err(|e| self.failure(&e))?;
        let mut known: Vec<Option<(Position, Event)>> = Vec::new();
        known.resize_with(batch.entries.len(), || None);
        for row in rows {
            let (nth, position, kind, format, body) =
                known_row(&row).map_err(|e| self.failure(&e))?;
            let place = usize::try_from(nth - 1).ok().and_then(|n| indexed.get(n));
            let Some(&(index, event)) = place else { continue };
            let first = row::known_event(event, kind, &format, body)?;
            known[index] = Some((row::position(position)?, first));
        }
        let mut gone: Vec<Option<Known<'static>>> = vec![None; batch.entries.len()];
        if self.removed.load(Relaxed) > 0 {
            for (index, left) in self.find_removed(connection, &indexed).await? {
                gone[index] = Some(left);
            }
        }
        let mut plan = Plan::checked(&batch.entries, |index, _| match &known[index] {
            Some((position, event)) => Some(Known::Event(*position, event)),
            None => gone[index],
        });
        if plan.met_copies() {
            self.caution.raise();
        } else {
            self.caution.relax();
        }
        if !plan.held.is_empty() {
            // An append that was given up may still be at work; it holds this row until it has
            // either stored its quarantine entries or not.
            sqlx::query("SELECT FROM log_head FOR UPDATE")
                .execute(&mut *connection)
                .await
                .map_err(|e| self.failure(&e))?;
            let rows: Vec<(i64, String, Vec<u8>)> = sqlx::query_as(sql::FIND_HELD)
                .bind(batch.recorded_at)
                .fetch_all(&mut *connection)
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

    /// The events behind a position, as far as they are in a page of positions.
    async fn read_page(
        &self,
        after: Position,
        limit: Limit,
    ) -> Result<Vec<Arc<StoredEvent>>, StoreError> {
        let page = self.page.load(Relaxed).clamp(1, limit.events.max(1));
        let last = after.0.saturating_add(page as u64);
        let query = sqlx::query(sql::READ)
            .bind(row::signed(after.0))
            .bind(row::signed(last))
            .bind(row::signed(limit.bytes as u64));
        let events = self.events(query).await?;
        if !events.is_empty() {
            let bytes: usize = events.iter().map(|event| event.body().len()).sum();
            let fit = limit.bytes / (bytes / events.len()).max(1);
            self.page.store(fit.saturating_add(fit / 4).max(16), Relaxed);
        }
        Ok(events)
    }

    async fn events(
        &self,
        query: sqlx::query::Query<'_, Postgres, sqlx::postgres::PgArguments>,
    ) -> Result<Vec<Arc<StoredEvent>>, StoreError> {
        let rows = self.reading(query.fetch_all(&self.readers)).await?;
        let mut events = Vec::with_capacity(rows.len());
        for row in rows {
            let row = event_row(&row).map_err(|error| {
                StoreError::fatal(format_args!("a row of `events` cannot be read: {error}"))
            })?;
            events.push(Arc::new(row.into_event()?));
        }
        Ok(events)
    }

    /// The next notification's position; zero when some may have been lost.
    async fn notified(&self) -> Result<u64, sqlx::Error> {
        let mut slot = self.listener.lock().await;
        let Some(listener) = slot.as_mut() else {
            // Read anew, so that a rotated password is picked up.
            self.refresh();
            let mut listener = PgListener::connect_with(&self.readers).await?;
            listener.listen(sql::CHANNEL).await?;
            *slot = Some(listener);
            // What came before was not heard.
            return Ok(0);
        };
        // `recv` would hide a lost connection, and with it lost notifications.
        match listener.try_recv().await {
            Ok(heard) => Ok(heard.and_then(|n| n.payload().parse().ok()).unwrap_or(0)),
            Err(error) => {
                *slot = None;
                Err(error)
            }
        }
    }
}

/// What an append has come to: where the log and quarantine ended before; `None` where it was not
/// done, because it does not know what was removed, or knows of what it has that it was. The inner
/// error is the database's.
type Inserted = Result<Result<Option<(i64, i64)>, sqlx::Error>, AttemptError>;

/// Runs the append; whether it looks for copies of what was removed.
async fn insert(
    connection: &mut PgConnection,
    plan: &Plan<'_>,
    batch: &Batch,
    looks: bool,
) -> Inserted {
    let Plan { fresh, held, .. } = plan;
    for event in fresh {
        row::body_text(event)?;
    }
    let headers = Texts::headers(fresh.iter().map(|e| e.headers()))?;
    let origins = Texts::origins(fresh.iter().map(|e| e.origin()))?;
    let held_headers = Texts::headers(held.iter().map(|h| h.headers))?;
    let held_origins = Texts::origins(held.iter().map(|h| h.origin))?;
    let marks = admit::fold_marks(&batch.marks);
    let looked_for = if looks { &fresh[..] } else { &[] };
    // Each array goes straight from the events into the message to the server.
    Ok(sqlx::query_as::<_, (i64, i64)>(sql::APPEND)
        .bind(row::signed(fresh.len() as u64))
        .bind(row::signed(held.len() as u64))
        .bind(batch.recorded_at)
        .bind(fresh.iter().map(|e| e.source()).bind_iter())
        .bind(fresh.iter().map(|e| e.id()).bind_iter())
        .bind(fresh.iter().map(|e| e.kind()).bind_iter())
        .bind(fresh.iter().map(|e| e.subject()).bind_iter())
        .bind(fresh.iter().map(|e| e.time()).bind_iter())
        .bind(fresh.iter().map(|e| e.key()).bind_iter())
        .bind(fresh.iter().map(|e| e.body_str()).bind_iter())
        .bind(fresh.iter().map(|e| e.format().as_str()).bind_iter())
        .bind(headers.iter().bind_iter())
        .bind(origins.iter().bind_iter())
        .bind(held.iter().map(row::held_source).bind_iter())
        .bind(held.iter().map(Held::template).map(std::borrow::Cow::into_owned).bind_iter())
        .bind(held.iter().map(|h| h.beside.map(|k| row::signed(k as u64 + 1))).bind_iter())
        .bind(held_origins.iter().bind_iter())
        .bind(held_headers.iter().bind_iter())
        .bind(held.iter().map(|h| &h.body[..]).bind_iter())
        .bind(marks.iter().map(|(source, _)| *source).bind_iter())
        .bind(marks.iter().map(|(_, mark)| &*mark.incarnation).bind_iter())
        .bind(marks.iter().map(|(_, mark)| row::signed(mark.sequence)).bind_iter())
        .bind(row::signed(sizes(fresh, &headers, &origins)))
        .bind(looks)
        .bind(looked_for.iter().map(|event| identity(event)).bind_iter())
        .fetch_optional(connection)
        .await)
}

/// What the store relies on, whatever the server's or the role's defaults are.
async fn prepare_session(connection: &mut PgConnection) -> Result<(), sqlx::Error> {
    sqlx::raw_sql(sql::SESSION).execute(connection).await.map(drop)
}

/// The table that says which of [`migrator`]'s steps a database has.
const MIGRATIONS: &str = "pulsebus_migrations";

fn migrator() -> Migrator {
    let migration = |version, name: &'static str, sql: &'static str| {
        Migration::new(version, name.into(), MigrationType::Simple, sql.into_sql_str(), false)
    };
    let mut migrator = Migrator::with_migrations(vec![
        migration(1, "log", include_str!("migrations/postgres/0001_log.sql")),
        migration(2, "dead letters", include_str!("migrations/postgres/0002_dead_letters.sql")),
        migration(3, "progress", include_str!("migrations/postgres/0003_progress.sql")),
        migration(4, "retain", include_str!("migrations/postgres/0004_retain.sql")),
    ]);
    migrator.dangerous_set_table_name(MIGRATIONS);
    migrator
}

async fn migrate(connection: &mut PgConnection, place: &str) -> Result<(), StoreError> {
    migrator().run_direct(None, connection, false).await.map_err(|error| match error {
        MigrateError::VersionMissing(version) => StoreError::misconfigured(format_args!(
            "{place} has schema version {version}, which this pulsebus does not know: run the \
             newer version that made it, or choose another database"
        )),
        MigrateError::VersionMismatch(version) => StoreError::misconfigured(format_args!(
            "{place} has a schema version {version} that is not this program's: choose another \
             database"
        )),
        MigrateError::Execute(error) | MigrateError::ExecuteMigration(error, _) => {
            error::migrating(&error, place)
        }
        error => StoreError::misconfigured(format_args!("{place}: {error}")),
    })
}

/// The text of a `json` column, which the driver would not give as text unasked.
fn text(row: &PgRow, column: usize) -> Result<String, sqlx::Error> {
    row.try_get_unchecked(column)
}

fn event_row(row: &PgRow) -> Result<EventRow, sqlx::Error> {
    Ok(EventRow {
        position: row.try_get(0)?,
        source: row.try_get(1)?,
        id: row.try_get(2)?,
        kind: row.try_get(3)?,
        subject: row.try_get(4)?,
        time: row.try_get(5)?,
        key: row.try_get(6)?,
        body: text(row, 7)?,
        format: row.try_get(8)?,
        headers: text(row, 9)?,
        origin: text(row, 10)?,
        recorded_at: row.try_get(11)?,
    })
}

fn held_row(row: &PgRow) -> Result<QuarantineEntry, StoreError> {
    let columns = || -> Result<_, sqlx::Error> {
        let (number, received_at, reason) =
            (row.try_get(0)?, row.try_get::<OffsetDateTime, _>(1)?, row.try_get(2)?);
        Ok((number, received_at, reason, text(row, 3)?, text(row, 4)?, row.try_get(5)?))
    };
    let (number, received_at, reason, origin, headers, size) =
        columns().map_err(unreadable_held)?;
    row::quarantine_entry(number, received_at, reason, &origin, &headers, size)
}

#[expect(clippy::needless_pass_by_value, reason = "for map_err")]
fn unreadable_held(error: sqlx::Error) -> StoreError {
    StoreError::fatal(format_args!("a row of `quarantine` cannot be read: {error}"))
}

fn known_row(row: &PgRow) -> Result<(i64, i64, String, String, String), sqlx::Error> {
    Ok((row.try_get(0)?, row.try_get(1)?, row.try_get(2)?, row.try_get(3)?, text(row, 4)?))
}

#[async_trait]
impl AttemptAppend for PostgresStore {
    async fn attempt(&self, batch: &Batch) -> Result<Vec<Receipt>, AttemptError> {
        self.append_once(batch, true).await
    }

    async fn probe(&self, batch: &Batch) -> Result<(), AttemptError> {
        self.append_once(batch, false).await.map(drop)
    }
}

#[async_trait]
impl EventStore for PostgresStore {
    fn kind(&self) -> &'static str {
        "postgres"
    }

    fn patience(&self) -> Duration {
        // An append waits for a connection and for an answer, and perhaps for one before it.
        2 * (self.options.connect_timeout + self.options.timeout)
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
        let before = self.seen.load(Relaxed);
        let query = sqlx::query_scalar("SELECT position FROM log_head");
        let head: i64 = self.reading(query.fetch_one(&self.readers)).await?;
        let head = row::position(head)?;
        self.check_head(before, head)?;
        self.seen.fetch_max(head.0, Relaxed);
        Ok(head)
    }

    async fn read(
        &self,
        after: Position,
        limit: Limit,
    ) -> Result<Vec<Arc<StoredEvent>>, StoreError> {
        let mut after = after;
        loop {
            let events = self.read_page(after, limit).await?;
            if events.first().is_none_or(|event| event.position != after.next()) {
                // They may have been removed, also since this was asked a moment ago.
                let removed = self.find_extent().await?.removed;
                if after < removed {
                    after = removed;
                    continue;
                }
            }
            row::contiguous(after, &events)?;
            return Ok(events);
        }
    }

    async fn get(
        &self,
        positions: &[Position],
        bytes: usize,
    ) -> Result<Vec<Arc<StoredEvent>>, StoreError> {
        if positions.is_empty() {
            return Ok(Vec::new());
        }
        let query = sqlx::query(sql::GET)
            .bind(positions.iter().map(|position| row::signed(position.0)).bind_iter())
            .bind(row::signed(bytes as u64));
        self.events(query).await
    }

    async fn list(&self, query: &Query) -> Result<Vec<Arc<StoredEvent>>, StoreError> {
        let sql = sql::list(query);
        let mut events: Vec<Arc<StoredEvent>> = Vec::new();
        let mut left = query.bytes;
        let mut ranges = row::Ranges::new(query, &self.find_extent().await?);
        while let Some((low, high)) = ranges.next().filter(|_| events.len() < query.limit) {
            let mut statement = sqlx::query(AssertSqlSafe(sql.as_str()))
                .bind(row::signed(low))
                .bind(row::signed(high))
                .bind(row::signed((query.limit - events.len()) as u64))
                .bind(row::signed(left as u64));
            for value in [&query.kind, &query.key].into_iter().flatten() {
                statement = statement.bind(value.as_str());
            }
            for event in self.events(statement).await? {
                let size = event.body().len();
                if size > left && !events.is_empty() {
                    return Ok(events);
                }
                left = left.saturating_sub(size);
                events.push(event);
            }
        }
        Ok(events)
    }

    async fn find(&self, source: &str, id: &str) -> Result<Option<Arc<StoredEvent>>, StoreError> {
        if [source, id].iter().any(|text| text.contains('\0')) {
            return Ok(None);
        }
        let query = sqlx::query(sql::FIND).bind(source).bind(id);
        Ok(self.events(query).await?.pop())
    }

    async fn mark(&self, source: &str) -> Result<Option<Mark>, StoreError> {
        let query =
            sqlx::query_as("SELECT incarnation, sequence FROM source_marks WHERE source = $1");
        let row: Option<(String, i64)> =
            self.reading(query.bind(source).fetch_optional(&self.readers)).await?;
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
        let query =
            sqlx::query(sql::QUARANTINE).bind(row::signed(after)).bind(row::signed(limit as u64));
        let rows = self.reading(query.fetch_all(&self.readers)).await?;
        rows.iter().map(held_row).collect()
    }

    async fn quarantine_entry(
        &self,
        number: u64,
    ) -> Result<Option<(QuarantineEntry, Bytes)>, StoreError> {
        let query = sqlx::query(sql::QUARANTINE_ENTRY).bind(row::signed(number));
        let Some(row) = self.reading(query.fetch_optional(&self.readers)).await? else {
            return Ok(None);
        };
        let body: Vec<u8> = row.try_get(6).map_err(unreadable_held)?;
        Ok(Some((held_row(&row)?, body.into())))
    }

    async fn quarantine_len(&self) -> Result<u64, StoreError> {
        let query = sqlx::query_scalar("SELECT count(*) FROM quarantine");
        row::number(self.reading(query.fetch_one(&self.readers)).await?)
    }

    async fn appended_elsewhere(&self, seen: Position) {
        loop {
            match tokio::time::timeout(POLL, self.notified()).await {
                Ok(Ok(position)) if position > seen.0 => return,
                // One of our own, or an old one.
                Ok(Ok(position)) if position > 0 => continue,
                Ok(Ok(_)) | Err(_) => {}
                Ok(Err(_)) => tokio::time::sleep(POLL).await,
            }
            match self.head().await {
                Ok(head) if head > seen => return,
                Ok(_) | Err(StoreError::Unavailable(_)) => {}
                // Whoever reads next is told.
                Err(
                    StoreError::Fatal(_) | StoreError::Misconfigured(_) | StoreError::Fenced(_),
                ) => return,
            }
        }
    }

    /// Beside these it has one that appends, and one that listens.
    fn connections(&self) -> Option<Connections> {
        let pool = &self.readers;
        Some(Connections::of(pool.size(), pool.num_idle(), pool.options().get_max_connections()))
    }

    async fn close(&self) {
        self.listener.lock().await.take();
        self.readers.close().await;
        if let Some(connection) = self.writer.lock().await.take() {
            let _ = tokio::time::timeout(self.options.connect_timeout, connection.close()).await;
        }
    }
}
