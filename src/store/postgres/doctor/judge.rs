//! What is wrong with what a server says about itself.

use time::{Date, Month};

use super::{Facts, finding};
use crate::{
    finding::{Finding, Severity, size},
    store::{StoreError, judge, postgres::PostgresOptions},
};

/// The oldest major version that has every statement's parts: covering indexes (`INCLUDE`).
const OLDEST: i32 = 11;

/// When a major version gets its last fixes (postgresql.org, "Versioning policy").
const LAST_FIXES: [(i32, i32, Month, u8); 8] = [
    (11, 2023, Month::November, 9),
    (12, 2024, Month::November, 21),
    (13, 2025, Month::November, 13),
    (14, 2026, Month::November, 12),
    (15, 2027, Month::November, 11),
    (16, 2028, Month::November, 9),
    (17, 2029, Month::November, 8),
    (18, 2030, Month::November, 14),
];

/// A timeout of the server's shorter than the store's own patience cuts off what would succeed.
const PATIENCE_MS: i64 = 30_000;

/// One row should take a page or two.
const HEAD_BYTES: i64 = 64 << 20;

/// Postgres stops writing at 2^31 less a margin.
const FROZEN_WARNING: i64 = 1_000_000_000;
const FROZEN_ERROR: i64 = 1_900_000_000;

/// No connection, for a reason in words.
pub(super) fn unreachable(error: &StoreError) -> Finding {
    let passing = matches!(error, StoreError::Unavailable(_));
    finding(
        Severity::Error,
        "postgres-connect",
        error.to_string(),
        "without its log the daemon takes nothing in: brokers keep their messages, HTTP \
         answers 503",
        if passing {
            "start the server, or correct host and port in store.url, and see that no firewall \
             is in between; what the reason above names comes first"
        } else {
            "correct what the reason above names, in store.url or on the server"
        },
    )
}

pub(super) fn unanswered(place: &str, reason: &str) -> Finding {
    finding(
        Severity::Error,
        "postgres-connect",
        format!("{place} takes a connection and does not answer as it should: {reason}"),
        "what it does to doctor it does to the daemon",
        "look into the server's log for what it says of the application pulsebus",
    )
}

/// No connection, because there are too many.
pub(super) fn exhausted(place: &str, reason: &str) -> Finding {
    finding(
        Severity::Error,
        "postgres-connections",
        format!("{place} has no connection left: {reason}"),
        "the daemon cannot connect either, at its start or after a loss",
        "find who holds them (SELECT application_name, count(*) FROM pg_stat_activity GROUP BY \
         1), end what is not needed, raise max_connections on the server (it restarts), or lower \
         store.max_connections",
    )
}

pub(super) fn pooler() -> Finding {
    finding(
        Severity::Error,
        "postgres-pooler",
        "between this machine and the server is a pooler that shares sessions between clients \
         (as PgBouncer does with pool_mode = transaction)",
        "prepared statements, LISTEN and the session's settings, synchronous_commit among them, \
         end with each transaction or reach other clients",
        "point store.url at the server itself, or at a pool with pool_mode = session: the daemon \
         has a pool of its own",
    )
}

/// Is it a server that may be used at all?
pub(super) fn server(facts: &Facts, today: Date) -> Vec<Finding> {
    let mut findings = Vec::new();
    let major = facts.version / 10_000;
    let version = &facts.version_text;
    if major < OLDEST {
        findings.push(finding(
            Severity::Error,
            "postgres-version",
            format!("the server is Postgres {version}"),
            format!("the tables need Postgres {OLDEST} or newer: making them fails"),
            "upgrade the server (pg_upgrade), best to the newest major version",
        ));
    } else if let Some((_, year, month, day)) = LAST_FIXES.iter().find(|row| row.0 == major)
        && let Ok(end) = Date::from_calendar_date(*year, *month, *day)
        && end < today
    {
        findings.push(finding(
            Severity::Warning,
            "postgres-version",
            format!("the server is Postgres {version}, whose last fixes came on {end}"),
            "faults that lose data or let others in are no longer mended",
            "upgrade the server (pg_upgrade) to a major version that gets fixes",
        ));
    }
    if facts.in_recovery {
        findings.push(finding(
            Severity::Error,
            "postgres-standby",
            "the server is a standby (pg_is_in_recovery)",
            "nothing can be appended to it, and what is read there lags behind",
            "point store.url at the primary; with several hosts in front of it, at the one that \
             follows the primary",
        ));
    }
    if facts.encoding != "UTF8" {
        findings.push(finding(
            Severity::Error,
            "postgres-encoding",
            format!("the database {} has the encoding {}", facts.database, facts.encoding),
            "events with characters that it does not have are refused and go to quarantine",
            "make a database with ENCODING 'UTF8' TEMPLATE template0, and name it in store.url",
        ));
    }
    findings
}

/// Is what is committed there after a crash?
pub(super) fn durability(facts: &Facts) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (name, on, why) in [
        (
            "postgres-fsync",
            facts.fsync,
            "after a power cut the whole database may be lost, with every event that was \
             acknowledged",
        ),
        (
            "postgres-full-page-writes",
            facts.full_page_writes,
            "a page half written at a power cut stays half written: the log is damaged, and \
             nothing tells",
        ),
    ] {
        if !on {
            let setting = name.trim_start_matches("postgres-").replace('-', "_");
            findings.push(finding(
                Severity::Error,
                name,
                format!("{setting} is off on the server"),
                why,
                format!(
                    "ALTER SYSTEM SET {setting} = on; SELECT pg_reload_conf(); and take it out of \
                     the server's command line if it stands there"
                ),
            ));
        }
    }
    let standbys = !facts.synchronous_standby_names.trim().is_empty();
    match &*facts.synchronous_commit {
        "off" => findings.push(finding(
            Severity::Note,
            "postgres-synchronous-commit",
            format!("synchronous_commit is off for the role {}", facts.role),
            "pulsebus switches it on for itself, so its acknowledgements hold; what other \
             clients of this role commit may be lost in a crash",
            mend_synchronous_commit(facts),
        )),
        mode @ ("local" | "remote_write") if standbys => findings.push(finding(
            Severity::Warning,
            "postgres-synchronous-commit",
            format!(
                "synchronous_commit is {mode} for the role {}, and synchronous_standby_names \
                 asks for standbys",
                facts.role
            ),
            "events are acknowledged before a standby has them on its disk: after a failover \
             they may be missing",
            mend_synchronous_commit(facts),
        )),
        _ => {}
    }
    let waits = !matches!(&*facts.synchronous_commit, "off" | "local");
    if standbys && waits && facts.standbys == 0 && !facts.in_recovery {
        findings.push(finding(
            Severity::Error,
            "postgres-sync-standby",
            "synchronous_standby_names asks for standbys, and none is connected",
            "every commit waits for one: nothing is stored and nothing acknowledged",
            "start the standby; or let the primary go on alone: ALTER SYSTEM RESET \
             synchronous_standby_names; SELECT pg_reload_conf();",
        ));
    } else if !standbys && facts.standbys > 0 {
        findings.push(finding(
            Severity::Note,
            "postgres-sync-standby",
            format!("{} standbys are connected, and none is waited for", facts.standbys),
            "after a failover the events of the last moments may be missing, though they were \
             acknowledged; handlers then stop with a cursor beyond the log",
            "name a standby in synchronous_standby_names, where that must not happen",
        ));
    }
    findings
}

fn mend_synchronous_commit(facts: &Facts) -> String {
    format!(
        "ALTER ROLE \"{}\" SET synchronous_commit = on; or correct it where it was set: \
         postgresql.conf, ALTER DATABASE",
        facts.role
    )
}

/// Would it refuse connections, or cut statements off?
pub(super) fn limits(facts: &Facts, options: &PostgresOptions) -> Vec<Finding> {
    let mut findings = Vec::new();
    // Besides the readers one writes and one listens.
    let needed = i64::from(options.max_connections.max(2)) + 2;
    let reserved = if facts.superuser { 0 } else { facts.reserved };
    // Our own will be gone, and those of a daemon that runs count for the one that will.
    let free = facts.max_connections - reserved - facts.connections + 1 + facts.ours;
    if free < needed {
        findings.push(finding(
            Severity::Warning,
            "postgres-connections",
            format!(
                "{} of the server's {} connections are free for pulsebus, which may need \
                 {needed} (store.max_connections and 2)",
                free.max(0),
                facts.max_connections
            ),
            "readers wait for each other, and after a loss of the connection the writer may get \
             none",
            "lower store.max_connections, end what holds connections (pg_stat_activity), or \
             raise max_connections on the server (it restarts)",
        ));
    }
    if let Some(limit) = facts.role_limit.filter(|limit| *limit < needed) {
        findings.push(finding(
            Severity::Warning,
            "postgres-connections",
            format!(
                "the role {} may have {limit} connections; pulsebus may need {needed} \
                 (store.max_connections and 2)",
                facts.role
            ),
            "readers wait for each other, and after a loss of the connection the writer may get \
             none",
            format!(
                "ALTER ROLE \"{}\" CONNECTION LIMIT {needed}; with several daemons, as many times \
                 that; or lower store.max_connections",
                facts.role
            ),
        ));
    }
    for (name, value) in [
        ("statement_timeout", facts.statement_timeout),
        ("transaction_timeout", facts.transaction_timeout),
    ] {
        if value > 0 && value < PATIENCE_MS {
            findings.push(finding(
                if value < 1_000 { Severity::Error } else { Severity::Warning },
                "postgres-timeout",
                format!("{name} is {value} ms for the role {}", facts.role),
                "an append of a large batch, a long list or making the tables is cut off by it, \
                 tried again, and cut off again: events stop coming in",
                format!(
                    "ALTER ROLE \"{}\" SET {name} = 0; pulsebus waits 30 s for an answer, and no \
                     longer",
                    facts.role
                ),
            ));
        }
    }
    findings
}

/// Does it stay quick?
pub(super) fn upkeep(facts: &Facts) -> Vec<Finding> {
    let mut findings = Vec::new();
    if !(facts.autovacuum && facts.track_counts) {
        let off = if facts.autovacuum { "track_counts" } else { "autovacuum" };
        findings.push(finding(
            Severity::Warning,
            "postgres-autovacuum",
            format!("{off} is off on the server"),
            "each append and each checkpoint leaves old row versions behind; unremoved, they slow \
             down every append, and in the end the server stops writing",
            format!("ALTER SYSTEM SET {off} = on; SELECT pg_reload_conf();"),
        ));
    }
    if let Some(slots) = &facts.idle_slots {
        findings.push(finding(
            Severity::Warning,
            "postgres-slot",
            format!("replication slots that nobody uses hold back the server's log: {slots}"),
            "its disk fills with WAL until nothing can be written any more",
            "start what reads them again, or drop them: SELECT pg_drop_replication_slot('NAME');",
        ));
    }
    if let Some(session) = &facts.oldest_transaction {
        findings.push(finding(
            Severity::Warning,
            "postgres-long-transaction",
            format!("a transaction has been open for more than an hour: {session}"),
            "old versions of log_head's row and of cursors cannot be removed while it is open: \
             each append gets slower",
            "end it, best in its program; else SELECT pg_terminate_backend(PID);",
        ));
    }
    if let Some(bytes) = facts.head_bytes.filter(|bytes| *bytes > HEAD_BYTES) {
        findings.push(finding(
            Severity::Warning,
            "postgres-bloat",
            format!("log_head, a table of one row, takes {}", size(bytes.unsigned_abs())),
            "each append looks through old versions of that row",
            "find what kept them (a long transaction, autovacuum off), then with the daemon \
             stopped: VACUUM FULL log_head;",
        ));
    }
    if facts.frozen_age > FROZEN_WARNING {
        findings.push(finding(
            if facts.frozen_age > FROZEN_ERROR { Severity::Error } else { Severity::Warning },
            "postgres-wraparound",
            format!(
                "the oldest transaction id of the database {} is {} transactions old",
                facts.database, facts.frozen_age
            ),
            "near 2,100,000,000 the server refuses every write",
            "let vacuum get through: end long transactions, drop idle replication slots, then \
             VACUUM (FREEZE);",
        ));
    }
    findings
}

/// May the role do what it must?
pub(super) fn role(facts: &Facts) -> Vec<Finding> {
    let mut findings = Vec::new();
    if facts.read_only && !facts.in_recovery {
        findings.push(finding(
            Severity::Error,
            "postgres-read-only",
            format!("default_transaction_read_only is on for the role {}", facts.role),
            "nothing can be appended: nothing is acknowledged",
            format!("ALTER ROLE \"{}\" SET default_transaction_read_only = off;", facts.role),
        ));
    }
    match &facts.schema {
        None => findings.push(finding(
            Severity::Error,
            "postgres-privileges",
            format!("the role {} has no schema: its search_path names none there is", facts.role),
            "the tables can neither be made nor found",
            format!(
                "CREATE SCHEMA pulsebus AUTHORIZATION \"{0}\"; ALTER ROLE \"{0}\" SET search_path \
                 = pulsebus;",
                facts.role
            ),
        )),
        Some(schema) if !facts.may_create => findings.push(finding(
            Severity::Error,
            "postgres-privileges",
            format!("the role {} may not create tables in the schema {schema}", facts.role),
            "the daemon does not start: it brings its tables up to date at each start",
            format!("GRANT CREATE, USAGE ON SCHEMA \"{schema}\" TO \"{}\";", facts.role),
        )),
        Some(_) => {}
    }
    findings
}

/// It has none of ours.
pub(super) fn no_tables(facts: &Facts) -> Option<Finding> {
    match &facts.tables {
        Some(tables) => Some(finding(
            Severity::Error,
            "postgres-schema",
            format!("the database {} has tables of another program: {tables}", facts.database),
            "pulsebus needs these names for its own tables, and does not start",
            "give it a database of its own (createdb), or a schema of its own (search_path)",
        )),
        None => judge::schema(
            "postgres-schema",
            &format!("database {}", facts.database),
            &crate::store::schema::Schema::Behind { at: 0, of: 0 },
        ),
    }
}

pub(super) fn privileges(facts: &Facts, missing: &str) -> Finding {
    finding(
        Severity::Error,
        "postgres-privileges",
        format!("the role {} lacks {missing}", facts.role),
        "what needs it fails each time: appends, checkpoints or retries wait for ever",
        format!(
            "let the role that made the tables be the one in store.url, or GRANT SELECT, INSERT, \
             UPDATE, DELETE ON ALL TABLES IN SCHEMA \"{0}\" TO \"{1}\"; GRANT USAGE ON ALL \
             SEQUENCES IN SCHEMA \"{0}\" TO \"{1}\";",
            facts.schema.as_deref().unwrap_or("public"),
            facts.role
        ),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::secret::Secret;

    fn right() -> Facts {
        Facts {
            version: 170_002,
            version_text: "17.2".to_owned(),
            fsync: true,
            full_page_writes: true,
            synchronous_commit: "on".to_owned(),
            synchronous_standby_names: String::new(),
            read_only: false,
            autovacuum: true,
            track_counts: true,
            encoding: "UTF8".to_owned(),
            statement_timeout: 0,
            transaction_timeout: 0,
            in_recovery: false,
            schema: Some("public".to_owned()),
            role: "pulse".to_owned(),
            database: "pulse".to_owned(),
            may_create: true,
            superuser: false,
            role_limit: None,
            max_connections: 100,
            reserved: 3,
            connections: 5,
            ours: 0,
            standbys: 0,
            idle_slots: None,
            frozen_age: 1_000,
            oldest_transaction: None,
            has_migrations: true,
            sees_migrations: true,
            tables: None,
            head_bytes: Some(8_192),
        }
    }

    fn judged(facts: &Facts) -> Vec<(&'static str, Severity)> {
        let options = PostgresOptions::new(Secret::Inline(String::new()));
        let today = Date::from_calendar_date(2026, Month::November, 25).unwrap();
        [
            server(facts, today),
            durability(facts),
            limits(facts, &options),
            upkeep(facts),
            role(facts),
        ]
        .concat()
        .into_iter()
        .map(|finding| (finding.check, finding.severity))
        .collect()
    }

    #[test]
    fn a_server_as_it_should_be_has_no_findings() {
        assert_eq!(judged(&right()), []);
    }

    /// What the tests against real servers do not set up: it takes a pooler, a standby, an hour
    /// or two thousand million transactions.
    #[test]
    fn each_thing_that_is_wrong_is_found() {
        use Severity::{Error, Note, Warning};
        type Break = fn(&mut Facts);
        let broken: [(Break, &str, Severity); 18] = [
            (|f| f.version = 100_023, "postgres-version", Error),
            (|f| f.version = 140_010, "postgres-version", Warning),
            (|f| f.in_recovery = true, "postgres-standby", Error),
            (|f| f.encoding = "SQL_ASCII".to_owned(), "postgres-encoding", Error),
            (|f| f.full_page_writes = false, "postgres-full-page-writes", Error),
            (
                |f| {
                    f.synchronous_standby_names = "one".to_owned();
                    f.standbys = 1;
                    f.synchronous_commit = "local".to_owned();
                },
                "postgres-synchronous-commit",
                Warning,
            ),
            (|f| f.synchronous_standby_names = "one".to_owned(), "postgres-sync-standby", Error),
            (|f| f.standbys = 2, "postgres-sync-standby", Note),
            (|f| f.connections = 90, "postgres-connections", Warning),
            (|f| f.role_limit = Some(5), "postgres-connections", Warning),
            (|f| f.statement_timeout = 5_000, "postgres-timeout", Warning),
            (|f| f.transaction_timeout = 500, "postgres-timeout", Error),
            (|f| f.track_counts = false, "postgres-autovacuum", Warning),
            (|f| f.oldest_transaction = Some("x".to_owned()), "postgres-long-transaction", Warning),
            (|f| f.head_bytes = Some(65 << 20), "postgres-bloat", Warning),
            (|f| f.frozen_age = 1_500_000_000, "postgres-wraparound", Warning),
            (|f| f.frozen_age = 2_000_000_000, "postgres-wraparound", Error),
            (|f| f.schema = None, "postgres-privileges", Error),
        ];
        for (break_it, check, severity) in broken {
            let mut facts = right();
            break_it(&mut facts);
            assert_eq!(judged(&facts), [(check, severity)]);
        }
    }

    #[test]
    fn a_running_daemons_connections_count_for_it() {
        let mut facts = Facts { connections: 92, ..right() };
        assert_eq!(judged(&facts).len(), 1);
        facts.ours = 8;
        assert_eq!(judged(&facts), []);
        // Reserved ones are free for a superuser.
        let facts = Facts { connections: 90, superuser: true, ..right() };
        assert_eq!(judged(&facts), []);
    }
}
