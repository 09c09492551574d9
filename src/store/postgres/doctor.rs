//! Looks at a Postgres server for `doctor`, and changes nothing: every statement is a `SELECT` in
//! a transaction that is read-only.
//!
//! Statements go as simple queries, without preparing them, so that they get through a pooler.
//! [`judge`] says what is wrong with what they found.

mod judge;

use std::time::{Duration, SystemTime};

use sqlx::{
    AssertSqlSafe, Connection as _, Executor as _, PgConnection, Row as _,
    postgres::{PgConnectOptions, PgRow},
};
use time::OffsetDateTime;

use super::{MIGRATIONS, PostgresOptions, error, migrator};
use crate::{
    finding::{Finding, STORE, Severity, skew},
    store::{
        StoreError, judge as judged,
        schema::{self, Applied, Schema},
    },
};

/// How long all of it may take; a server that does not answer is a finding.
const PATIENCE: Duration = Duration::from_secs(30);

/// What a server says about itself, in a row. Of other roles' sessions much is hidden, their
/// kind among it; those with a role are clients, unless it says otherwise.
const FACTS: &str = "
    SELECT current_setting('server_version_num')::int4, current_setting('server_version'),
        current_setting('fsync'), current_setting('full_page_writes'),
        current_setting('synchronous_commit'), current_setting('synchronous_standby_names'),
        current_setting('default_transaction_read_only'), current_setting('autovacuum'),
        current_setting('track_counts'), current_setting('server_encoding'),
        (SELECT setting::int8 FROM pg_settings WHERE name = 'statement_timeout'),
        (SELECT setting::int8 FROM pg_settings WHERE name = 'transaction_timeout'),
        pg_is_in_recovery(), current_schema(), current_user::text, current_database()::text,
        coalesce(has_schema_privilege(current_schema(), 'CREATE'), false),
        (SELECT rolsuper FROM pg_roles WHERE rolname = current_user),
        (SELECT CASE WHEN rolconnlimit >= 0 THEN rolconnlimit::int8 END FROM pg_roles
         WHERE rolname = current_user),
        current_setting('max_connections')::int8,
        current_setting('superuser_reserved_connections')::int8
            + coalesce(current_setting('reserved_connections', true)::int8, 0),
        (SELECT count(*) FROM pg_stat_activity WHERE usesysid IS NOT NULL
             AND coalesce(backend_type, 'client backend') = 'client backend'),
        (SELECT count(*) FROM pg_stat_activity WHERE application_name = 'pulsebus'
             AND datname = current_database() AND pid <> pg_backend_pid()),
        (SELECT count(*) FROM pg_stat_replication),
        (SELECT string_agg(slot_name::text, ', ') FROM pg_replication_slots
         WHERE NOT active AND restart_lsn IS NOT NULL),
        (SELECT age(datfrozenxid)::int8 FROM pg_database WHERE datname = current_database()),
        (SELECT 'pid ' || pid || ' of ' || coalesce(nullif(application_name, ''), usename::text)
             || ', ' || coalesce(state, 'unknown')
         FROM pg_stat_activity WHERE backend_xmin IS NOT NULL AND pid <> pg_backend_pid()
             AND xact_start < now() - interval '1 hour' ORDER BY xact_start LIMIT 1),
        to_regclass('pulsebus_migrations') IS NOT NULL,
        coalesce(has_table_privilege(to_regclass('pulsebus_migrations'), 'SELECT'), false),
        (SELECT string_agg(name, ', ') FROM (VALUES ('events'), ('log_head'), ('quarantine'),
             ('source_marks'), ('cursors'), ('dead_letters'), ('unfinished'), ('redrives'),
             ('audit')) AS t(name) WHERE to_regclass(name) IS NOT NULL),
        pg_relation_size(to_regclass('log_head'))";

/// What the role may not, of what the store does. The tables are made by a role that owns them;
/// another one needs all of this.
const MISSING_PRIVILEGES: &str = "
    SELECT string_agg(privilege || ' on ' || name, ', ' ORDER BY name, privilege)
    FROM (
        SELECT name, unnest(string_to_array(privileges, ' ')) AS privilege
        FROM (VALUES ('pulsebus_migrations', 'SELECT INSERT UPDATE'),
            ('events', 'SELECT INSERT'), ('log_head', 'SELECT UPDATE'),
            ('quarantine', 'SELECT INSERT UPDATE DELETE'),
            ('source_marks', 'SELECT INSERT UPDATE'),
            ('cursors', 'SELECT INSERT UPDATE'),
            ('unfinished', 'SELECT INSERT UPDATE DELETE'), ('dead_letters', 'SELECT'),
            ('redrives', 'SELECT INSERT UPDATE'), ('audit', 'SELECT INSERT'))
            AS wanted(name, privileges)
    ) AS wanted
    WHERE NOT has_table_privilege(to_regclass(name), privilege)";

/// Where the log ends, by its head and by its rows, and which cursors are beyond: of one
/// moment.
const LOG: &str = "
    SELECT h.position, (SELECT max(position) FROM events),
        (SELECT string_agg(handler || ' (' || c.position || ')', ', ') FROM cursors AS c
         WHERE c.position > h.position)
    FROM log_head AS h";

/// What was found out; the names are those of Postgres where it has one.
#[derive(Debug, Clone)]
struct Facts {
    version: i32,
    version_text: String,
    fsync: bool,
    full_page_writes: bool,
    synchronous_commit: String,
    synchronous_standby_names: String,
    read_only: bool,
    autovacuum: bool,
    track_counts: bool,
    encoding: String,
    /// In milliseconds; 0: none.
    statement_timeout: i64,
    transaction_timeout: i64,
    in_recovery: bool,
    schema: Option<String>,
    role: String,
    database: String,
    may_create: bool,
    superuser: bool,
    role_limit: Option<i64>,
    max_connections: i64,
    reserved: i64,
    connections: i64,
    /// Those of running daemons, which a restart gives back.
    ours: i64,
    standbys: i64,
    idle_slots: Option<String>,
    frozen_age: i64,
    oldest_transaction: Option<String>,
    has_migrations: bool,
    sees_migrations: bool,
    tables: Option<String>,
    head_bytes: Option<i64>,
}

impl Facts {
    fn of(row: &PgRow) -> Result<Self, sqlx::Error> {
        let on = |column: usize| Ok::<_, sqlx::Error>(row.try_get::<String, _>(column)? == "on");
        Ok(Self {
            version: row.try_get(0)?,
            version_text: row.try_get(1)?,
            fsync: on(2)?,
            full_page_writes: on(3)?,
            synchronous_commit: row.try_get(4)?,
            synchronous_standby_names: row.try_get(5)?,
            read_only: on(6)?,
            autovacuum: on(7)?,
            track_counts: on(8)?,
            encoding: row.try_get(9)?,
            statement_timeout: row.try_get::<Option<i64>, _>(10)?.unwrap_or(0),
            transaction_timeout: row.try_get::<Option<i64>, _>(11)?.unwrap_or(0),
            in_recovery: row.try_get(12)?,
            schema: row.try_get_unchecked(13)?,
            role: row.try_get(14)?,
            database: row.try_get(15)?,
            may_create: row.try_get(16)?,
            superuser: row.try_get(17)?,
            role_limit: row.try_get(18)?,
            max_connections: row.try_get(19)?,
            reserved: row.try_get(20)?,
            connections: row.try_get(21)?,
            ours: row.try_get(22)?,
            standbys: row.try_get(23)?,
            idle_slots: row.try_get(24)?,
            frozen_age: row.try_get(25)?,
            oldest_transaction: row.try_get(26)?,
            has_migrations: row.try_get(27)?,
            sees_migrations: row.try_get(28)?,
            tables: row.try_get(29)?,
            head_bytes: row.try_get(30)?,
        })
    }
}

/// Everything that is wrong with this server, this database and this role, for this store.
pub(crate) async fn examine(options: &PostgresOptions) -> Vec<Finding> {
    let parsed = match options.parse() {
        Ok(parsed) => parsed,
        Err(error) => return vec![judge::unreachable(&error)],
    };
    let mut findings = Vec::new();
    let looking = look(options, &parsed, &mut findings);
    let place = error::place(&parsed);
    match tokio::time::timeout(PATIENCE, looking).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => findings.push(judge::unanswered(&place, &error.to_string())),
        Err(_) => {
            findings.push(judge::unanswered(&place, &format!("no answer within {PATIENCE:?}")));
        }
    }
    findings
}

async fn look(
    options: &PostgresOptions,
    parsed: &PgConnectOptions,
    findings: &mut Vec<Finding>,
) -> Result<(), sqlx::Error> {
    let mut connection = match connect(options, parsed).await {
        Ok(connection) => connection,
        Err(finding) => {
            findings.push(finding);
            return Ok(());
        }
    };
    findings.extend(clock(&mut connection, &error::place(parsed)).await?);
    let row = one(&mut connection, FACTS).await?;
    let facts = Facts::of(&row)?;
    findings.extend(judge::server(&facts, OffsetDateTime::now_utc().date()));
    findings.extend(judge::durability(&facts));
    findings.extend(judge::limits(&facts, options));
    findings.extend(judge::upkeep(&facts));
    findings.extend(judge::role(&facts));
    if pooled(&mut connection, parsed).await? {
        findings.push(judge::pooler());
    }
    tables(&mut connection, &facts, findings).await?;
    connection.close().await
}

async fn connect(
    options: &PostgresOptions,
    parsed: &PgConnectOptions,
) -> Result<PgConnection, Finding> {
    let place = error::place(parsed);
    let connecting = PgConnection::connect_with(parsed);
    match tokio::time::timeout(options.connect_timeout, connecting).await {
        Ok(Ok(connection)) => Ok(connection),
        Ok(Err(error)) => Err(match &error {
            sqlx::Error::Database(said) if said.code().as_deref() == Some("53300") => {
                judge::exhausted(&place, said.message())
            }
            // A pooler that refuses what a session begins with is no server.
            sqlx::Error::Database(said) if said.message().contains("startup parameter") => {
                judge::pooler()
            }
            error => judge::unreachable(&error::opening(error, &place, options.tls.as_ref())),
        }),
        Err(_) => Err(judge::unreachable(&StoreError::unavailable(format_args!(
            "no connection to {place} within {:?}",
            options.connect_timeout
        )))),
    }
}

/// One row of a statement that changes nothing, and cannot.
async fn one(connection: &mut PgConnection, sql: &str) -> Result<PgRow, sqlx::Error> {
    let mut transaction = connection.begin_with("BEGIN READ ONLY").await?;
    let row = transaction.fetch_one(sqlx::raw_sql(AssertSqlSafe(sql))).await?;
    transaction.rollback().await?;
    Ok(row)
}

async fn clock(connection: &mut PgConnection, place: &str) -> Result<Option<Finding>, sqlx::Error> {
    let before = SystemTime::now();
    let sql = "SELECT (extract(epoch FROM clock_timestamp()) * 1000)::int8";
    let row = one(connection, sql).await?;
    let after = SystemTime::now();
    let nanos = i128::from(row.try_get::<i64, _>(0)?) * 1_000_000;
    let theirs = OffsetDateTime::from_unix_timestamp_nanos(nanos).ok();
    Ok(theirs.and_then(|at| skew(place, at, (before, after), Duration::from_millis(1))))
}

/// Whether something between us and the server hands one session out to several clients: then
/// two connections of ours have the same server process, or one has another one than before.
async fn pooled(
    connection: &mut PgConnection,
    parsed: &PgConnectOptions,
) -> Result<bool, sqlx::Error> {
    const PID: &str = "SELECT pg_backend_pid()";
    let first: i32 = one(connection, PID).await?.try_get(0)?;
    // Where no further connection is free, that has been noticed by other means.
    let Ok(mut second) = PgConnection::connect_with(parsed).await else { return Ok(false) };
    let mut held = second.begin_with("BEGIN READ ONLY").await?;
    let other: i32 = held.fetch_one(sqlx::raw_sql(PID)).await?.try_get(0)?;
    let again: i32 = one(connection, PID).await?.try_get(0)?;
    held.rollback().await?;
    second.close().await?;
    Ok(first == other || first != again)
}

async fn tables(
    connection: &mut PgConnection,
    facts: &Facts,
    findings: &mut Vec<Finding>,
) -> Result<(), sqlx::Error> {
    if !facts.has_migrations {
        findings.extend(judge::no_tables(facts));
        return Ok(());
    }
    let missing: Option<String> = one(connection, MISSING_PRIVILEGES).await?.try_get(0)?;
    if let Some(missing) = &missing {
        findings.push(judge::privileges(facts, missing));
    }
    if !facts.sees_migrations {
        return Ok(());
    }
    let sql = format!("SELECT version, success, checksum FROM {MIGRATIONS} ORDER BY version");
    let mut transaction = connection.begin_with("BEGIN READ ONLY").await?;
    let rows = transaction.fetch_all(sqlx::raw_sql(AssertSqlSafe(sql))).await?;
    transaction.rollback().await?;
    let step = |row: &PgRow| {
        let (version, success) = (row.try_get(0)?, row.try_get(1)?);
        Ok::<_, sqlx::Error>(Applied { version, success, checksum: row.try_get(2)? })
    };
    let applied = rows.iter().map(step).collect::<Result<Vec<_>, _>>()?;
    let schema = schema::judge(&migrator(), &applied);
    findings.extend(judged::schema(
        "postgres-schema",
        &format!("database {}", facts.database),
        &schema,
    ));
    if missing.is_some() || !matches!(schema, Schema::Current) {
        return Ok(());
    }
    let row = one(connection, LOG).await?;
    let (head, last): (i64, Option<i64>) = (row.try_get(0)?, row.try_get(1)?);
    let beyond: Option<String> = row.try_get(2)?;
    findings.extend(judged::log(head, last, beyond.as_deref()));
    Ok(())
}

fn finding(
    severity: Severity,
    check: &'static str,
    what: impl Into<String>,
    why: impl Into<String>,
    mend: impl Into<String>,
) -> Finding {
    Finding::of(severity, STORE, check, what, why, mend)
}
