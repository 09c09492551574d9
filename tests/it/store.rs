//! The stores: the conformance suite for each, and what only one of them can show.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    path::PathBuf,
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use async_trait::async_trait;
use pulsebus::{
    event::{Event, EventParts, Position},
    secret::Secret,
    store::{
        EventStore, StoreError,
        memory::MemoryStore,
        postgres::{PostgresOptions, PostgresStore},
        sqlite::{SqliteOptions, SqliteStore},
    },
    transport::Receipt,
};
use sqlx::{AssertSqlSafe, Connection as _, PgConnection, SqliteConnection};
use tokio::sync::Mutex;

use crate::{
    conformance::store::{self as suite, Fixture, Random},
    support::{postgres, process, wait_until},
};

/// A test for each of these functions of the suite, against this fixture.
macro_rules! conformance {
    ($store:ident, $fixture:expr, [$($clause:ident),* $(,)?]) => {
        mod $store {
            use super::*;
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $clause() {
                    suite::$clause(&$fixture.await).await;
                }
            )*
        }
    };
}

struct Memory(Arc<MemoryStore>);

impl Memory {
    async fn new() -> Self {
        Self(Arc::new(MemoryStore::refusing(|event| {
            event.id().starts_with("refuse").then(|| "this store was told to".to_owned())
        })))
    }
}

fn numbered(prefix: &str) -> String {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    format!("{prefix}{}", NEXT.fetch_add(1, Relaxed))
}

#[async_trait]
impl Fixture for Memory {
    async fn open(&self) -> Arc<dyn EventStore> {
        self.0.clone()
    }

    async fn refusable(&self) -> Event {
        suite::event(&numbered("refuse "))
    }

    fn durable(&self) -> bool {
        false
    }
}

conformance!(
    memory,
    Memory::new(),
    [
        S1_an_append_is_there_as_a_whole,
        S2_S3_positions_are_gapless_and_seen_in_order,
        S4_a_copy_is_stored_once,
        S5_a_conflict_is_quarantined,
        S4_S5_any_sequence_of_batches,
        S6_what_the_database_refuses_is_quarantined,
        S8_marks_only_move_forward,
        S9_a_cursor_is_what_was_last_saved,
        S10_an_unknown_outcome_is_appended_again,
        reads_keep_their_limits,
        lists_find_by_type_and_key_in_either_direction,
    ]
);

struct Sqlite(PathBuf);

impl Sqlite {
    async fn new() -> Self {
        let path = process::folder("sqlite").join("new folder").join("events.db");
        let sqlite = Self(path);
        sqlite.open().await.close().await;
        sqlite
            .execute(
                "CREATE TRIGGER refuse BEFORE INSERT ON events WHEN new.id LIKE 'refuse %'
                 BEGIN SELECT RAISE(ABORT, 'a trigger says no'); END",
            )
            .await;
        sqlite
    }

    async fn execute(&self, sql: &str) {
        let url = format!("sqlite:{}", self.0.display());
        let mut connection = SqliteConnection::connect(&url).await.unwrap();
        sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut connection).await.unwrap();
        connection.close().await.unwrap();
    }

    async fn try_open(&self) -> Result<SqliteStore, StoreError> {
        SqliteStore::open(SqliteOptions::new(&self.0)).await
    }
}

#[async_trait]
impl Fixture for Sqlite {
    async fn open(&self) -> Arc<dyn EventStore> {
        Arc::new(self.try_open().await.unwrap())
    }

    async fn refusable(&self) -> Event {
        suite::event(&numbered("refuse "))
    }
}

conformance!(
    sqlite,
    Sqlite::new(),
    [
        S1_an_append_is_there_as_a_whole,
        S2_S3_positions_are_gapless_and_seen_in_order,
        S4_a_copy_is_stored_once,
        S5_a_conflict_is_quarantined,
        S4_S5_any_sequence_of_batches,
        S6_what_the_database_refuses_is_quarantined,
        S7_everything_comes_back_as_it_went_in,
        S8_marks_only_move_forward,
        S9_a_cursor_is_what_was_last_saved,
        S10_an_unknown_outcome_is_appended_again,
        S11_what_was_committed_is_there_after_reopening,
        reads_keep_their_limits,
        lists_find_by_type_and_key_in_either_direction,
    ]
);

struct Postgres(postgres::Database);

impl Postgres {
    async fn new() -> Self {
        Self(postgres::database().await)
    }

    async fn execute(&self, sql: &str) {
        let mut connection = PgConnection::connect(&self.0.url).await.unwrap();
        sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut connection).await.unwrap();
        connection.close().await.unwrap();
    }
}

async fn connect(url: &str) -> Result<PostgresStore, StoreError> {
    let options = PostgresOptions::new(Secret::Inline(url.to_owned()));
    PostgresStore::connect(PostgresOptions { max_connections: 3, ..options }).await
}

/// Too long for an index entry, and random, so that compressing it does not help.
fn long_id() -> Event {
    let mut random = Random(numbered("").parse().unwrap());
    let id: String = (0..3000).map(|_| char::from(b'!' + random.below(90) as u8)).collect();
    suite::event(&id)
}

#[async_trait]
impl Fixture for Postgres {
    async fn open(&self) -> Arc<dyn EventStore> {
        Arc::new(connect(&self.0.url).await.unwrap())
    }

    async fn refusable(&self) -> Event {
        long_id()
    }
}

conformance!(
    postgres_,
    Postgres::new(),
    [
        S1_an_append_is_there_as_a_whole,
        S2_S3_positions_are_gapless_and_seen_in_order,
        S4_a_copy_is_stored_once,
        S5_a_conflict_is_quarantined,
        S4_S5_any_sequence_of_batches,
        S6_what_the_database_refuses_is_quarantined,
        S7_everything_comes_back_as_it_went_in,
        S8_marks_only_move_forward,
        S9_a_cursor_is_what_was_last_saved,
        S10_an_unknown_outcome_is_appended_again,
        S11_what_was_committed_is_there_after_reopening,
        reads_keep_their_limits,
        lists_find_by_type_and_key_in_either_direction,
    ]
);

/// A server of its own, to kill.
struct Mortal(Mutex<postgres::PostgresServer>);

#[async_trait]
impl Fixture for Mortal {
    async fn open(&self) -> Arc<dyn EventStore> {
        Arc::new(connect(&self.0.lock().await.url()).await.unwrap())
    }

    async fn refusable(&self) -> Event {
        long_id()
    }

    async fn crash(&self) -> bool {
        let mut server = self.0.lock().await;
        server.kill();
        server.restart().await;
        true
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn postgres_S10_S11_a_crash_amid_appends() {
    let server = postgres::PostgresServer::start().await;
    suite::S10_S11_a_crash_amid_appends(&Mortal(Mutex::new(server))).await;
}

/// Run by the test below, in a process of its own that does not end by itself.
#[tokio::test]
#[ignore = "the child of sqlite_S11_a_killed_process_loses_nothing_committed"]
async fn sqlite_child_appends_until_killed() {
    let Some(path) = std::env::var_os("TEST_PULSEBUS_SQLITE") else { return };
    let store = SqliteStore::open(SqliteOptions::new(path)).await.unwrap();
    let mut nth = store.mark("run").await.unwrap().map_or(0, |mark| mark.sequence);
    loop {
        nth += 1;
        store.append(&suite::whole("run", nth)).await.unwrap();
        println!("committed {nth}");
        std::io::stdout().flush().unwrap();
    }
}

#[tokio::test]
async fn sqlite_S11_a_killed_process_loses_nothing_committed() {
    let path = process::folder("sqlite").join("events.db");
    let mut committed = 0;
    for _ in 0..3 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args([
                "--ignored",
                "--exact",
                "--nocapture",
                "store::sqlite_child_appends_until_killed",
            ])
            .env("TEST_PULSEBUS_SQLITE", &path)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let said = BufReader::new(child.stdout.take().unwrap());
        let mut count = 0;
        for line in said.lines().map_while(Result::ok) {
            if let Some((_, nth)) = line.split_once("committed ") {
                committed = nth.parse().unwrap();
                count += 1;
                if count == 50 {
                    child.kill().unwrap();
                }
            }
        }
        child.wait().unwrap();
        assert!(count >= 50, "the child ended by itself after {count}");
        let store = SqliteStore::open(SqliteOptions::new(&path)).await.unwrap();
        let there = store.mark("run").await.unwrap().unwrap().sequence;
        assert!(there == committed || there == committed + 1, "{there} of {committed}");
        suite::audit_whole(&store, "run", there).await;
        store.close().await;
    }
}

#[tokio::test]
async fn sqlite_locked_by_another_is_unavailable_and_then_works() {
    let sqlite = Sqlite::new().await;
    let options = SqliteOptions::new(&sqlite.0);
    let options = SqliteOptions { busy_timeout: Duration::from_millis(50), ..options };
    let store = SqliteStore::open(options).await.unwrap();
    let url = format!("sqlite:{}", sqlite.0.display());
    let mut other = SqliteConnection::connect(&url).await.unwrap();
    sqlx::raw_sql("BEGIN IMMEDIATE").execute(&mut other).await.unwrap();
    let batch = suite::whole("run", 1);
    let error = store.append(&batch).await.unwrap_err();
    assert!(matches!(error, StoreError::Unavailable(_)), "{error}");
    assert_eq!(store.head().await.unwrap(), Position::START);
    sqlx::raw_sql("ROLLBACK").execute(&mut other).await.unwrap();
    store.append(&batch).await.unwrap();
    suite::audit_whole(&store, "run", 1).await;
}

#[tokio::test]
async fn sqlite_text_it_would_cut_is_refused() {
    let store = Sqlite::new().await.open().await;
    let event = Event::from_parts(EventParts { key: "a\0b".into(), ..suite::parts("x") });
    let receipts = store.append(&suite::batch([suite::event("a"), event])).await.unwrap();
    assert_eq!(receipts[0], Receipt::Stored(Position(1)));
    assert!(
        matches!(&receipts[1], Receipt::Quarantined { reason, .. } if reason.contains("U+0000"))
    );
}

#[tokio::test]
async fn sqlite_says_why_it_cannot_be_opened() {
    let sqlite = Sqlite::new().await;
    sqlite
        .execute(
            "INSERT INTO pulsebus_migrations (version, description, success, checksum, \
             execution_time) VALUES (99, 'later', true, x'00', 0)",
        )
        .await;
    let error = sqlite.try_open().await.unwrap_err();
    assert!(matches!(error, StoreError::Misconfigured(_)), "{error}");
    assert!(error.to_string().contains("schema version 99"), "{error}");

    let path = process::folder("sqlite").join("text");
    std::fs::write(&path, "not a database at all, but long enough to be read as one".repeat(99))
        .unwrap();
    let error = SqliteStore::open(SqliteOptions::new(&path)).await.unwrap_err();
    assert!(matches!(error, StoreError::Misconfigured(_)), "{error}");
    assert!(error.to_string().contains("is not a SQLite database"), "{error}");
}

#[tokio::test]
async fn postgres_text_it_cannot_keep_is_refused() {
    let store = Postgres::new().await.open().await;
    let event = Event::from_parts(EventParts { key: "a\0b".into(), ..suite::parts("x") });
    let receipts = store.append(&suite::batch([suite::event("a"), event])).await.unwrap();
    assert_eq!(receipts[0], Receipt::Stored(Position(1)));
    assert!(matches!(receipts[1], Receipt::Quarantined { .. }));
}

#[tokio::test]
async fn postgres_says_why_it_cannot_be_used_and_never_the_password() {
    let database = Postgres::new().await;
    database.open().await.close().await;
    let misconfigured = |error: StoreError, part: &str| {
        assert!(matches!(error, StoreError::Misconfigured(_)), "{error:?}");
        assert!(error.to_string().contains(part), "{error}");
        assert!(!format!("{error} {error:?}").contains("hunter2"), "{error:?}");
    };
    let url = database.0.url.replace("postgres@", "postgres:hunter2@");
    let absent = format!("{url}_absent");
    misconfigured(connect(&absent).await.unwrap_err(), "createdb");
    misconfigured(connect(&url.replace("//postgres:", "//nobody:")).await.unwrap_err(), "login");
    misconfigured(connect("postgres://u:hunter2@host:port/x").await.unwrap_err(), "cannot be read");
    misconfigured(connect("mysql://u:hunter2@host/x").await.unwrap_err(), "postgres://");
    let error = connect(&url.replace("127.0.0.1:", "127.0.0.1:1")).await.unwrap_err();
    assert!(!format!("{error} {error:?}").contains("hunter2"), "{error:?}");
    let store = connect(&url).await.unwrap();
    assert!(!format!("{store:?}").contains("hunter2"), "{store:?}");
    store.close().await;

    database
        .execute(
            "INSERT INTO pulsebus_migrations (version, description, success, checksum, \
             execution_time) VALUES (99, 'later', true, '', 0)",
        )
        .await;
    misconfigured(connect(&url).await.unwrap_err(), "schema version 99");
}

#[tokio::test]
async fn postgres_a_log_that_went_back_is_fatal() {
    let database = Postgres::new().await;
    let store = database.open().await;
    store.append(&suite::whole("run", 1)).await.unwrap();
    database.execute("DELETE FROM events; UPDATE log_head SET position = 3").await;
    for error in [
        store.head().await.unwrap_err(),
        store.append(&suite::whole("run", 2)).await.unwrap_err(),
        store.read(Position::START, suite::EVERYTHING).await.unwrap_err(),
    ] {
        assert!(matches!(error, StoreError::Fatal(_)), "{error}");
    }
}

#[tokio::test]
async fn postgres_a_gap_is_fatal() {
    let database = Postgres::new().await;
    let store = database.open().await;
    store.append(&suite::whole("run", 1)).await.unwrap();
    database.execute("DELETE FROM events WHERE position = 3").await;
    let error = store.read(Position::START, suite::EVERYTHING).await.unwrap_err();
    assert!(matches!(&error, StoreError::Fatal(why) if why.contains("position 3")), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn postgres_another_writers_append_is_noticed() {
    let database = Postgres::new().await;
    let (here, there) = (database.open().await, database.open().await);
    // Nothing is appended: nothing is noticed, however long the listener takes to start.
    let quiet =
        tokio::time::timeout(Duration::from_millis(1500), here.appended_elsewhere(Position::START));
    assert!(quiet.await.is_err());
    for nth in 1..=3 {
        let seen = here.head().await.unwrap();
        let noticed = {
            let here = here.clone();
            tokio::time::timeout(Duration::from_secs(30), async move {
                here.appended_elsewhere(seen).await;
            })
        };
        let append = async { there.append(&suite::whole("run", nth)).await.unwrap() };
        let (noticed, _) = tokio::join!(noticed, append);
        noticed.expect("noticed");
        assert_eq!(here.head().await.unwrap(), Position(nth * suite::SIZE));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn postgres_a_killed_server_is_unavailable_and_then_works() {
    let mut server = postgres::PostgresServer::start().await;
    let store = connect(&server.url()).await.unwrap();
    store.append(&suite::whole("run", 1)).await.unwrap();
    server.kill();
    let batch = suite::whole("run", 2);
    let error = store.append(&batch).await.unwrap_err();
    assert!(matches!(error, StoreError::Unavailable(_)), "{error}");
    server.restart().await;
    suite::append_patiently(&store, &batch).await;
    wait_until("reads work again", async || store.head().await.ok()).await;
    suite::audit_whole(&store, "run", 2).await;
}
