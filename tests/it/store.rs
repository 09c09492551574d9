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
        progress::{
            AuditEntry, Change, Claim, Claimed, DeadLetterFilter, NewRedrive, ProgressStore as _,
            RedriveAction, Selection,
        },
        sqlite::{SqliteOptions, SqliteStore},
    },
    transport::Receipt,
};
use sqlx::{AssertSqlSafe, Connection as _, PgConnection, SqliteConnection};
use time::macros::datetime;
use tokio::{sync::Mutex, task::JoinSet};

use crate::{
    conformance::{
        progress, retain,
        store::{self as suite, Fixture, Random},
    },
    support::{postgres, process, wait_until},
};

/// A test for each of these functions of the suite, against this fixture.
macro_rules! conformance {
    ($store:ident, $suite:ident, $fixture:expr, [$($clause:ident),* $(,)?]) => {
        mod $store {
            use super::*;
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $clause() {
                    $suite::$clause(&$fixture.await).await;
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
    suite,
    Memory::new(),
    [
        S1_an_append_is_there_as_a_whole,
        S2_S3_positions_are_gapless_and_seen_in_order,
        S4_a_copy_is_stored_once,
        S5_a_conflict_is_quarantined,
        S4_S5_any_sequence_of_batches,
        S6_what_the_database_refuses_is_quarantined,
        S8_marks_only_move_forward,
        S9_events_are_found_by_position,
        S10_an_unknown_outcome_is_appended_again,
        reads_keep_their_limits,
        lists_find_by_type_and_key_in_either_direction,
    ]
);

conformance!(
    memory_progress,
    progress,
    Memory::new(),
    [
        D1_a_claim_has_a_higher_epoch_than_every_one_before,
        D1_one_of_many_claims_at_once_is_the_last,
        D1_a_lease_keeps_others_away,
        D2_what_is_written_under_an_old_epoch_changes_nothing,
        D3_a_checkpoint_is_there_as_a_whole,
        D3_D4_any_sequence_of_checkpoints_also_given_up,
        D4_a_row_keeps_how_it_first_failed,
        D4_rows_are_found_by_position_whatever_their_state,
        D5_a_rewind_removes_the_rows_above,
        D6_a_redrive_takes_up_what_matches_at_its_start,
        D6_a_cancelled_redrive_puts_back_what_it_has_left,
        D6_a_discard_of_a_handler_that_nobody_runs,
        D6_quarantine_is_taken_up_and_settled,
        D7_what_persons_did_is_in_the_audit,
        D8_a_handler_adopts_the_progress_of_another,
        dead_letters_are_found_page_by_page,
        dead_letters_are_published_once,
        texts_are_kept_as_far_as_the_database_can,
    ]
);

conformance!(
    memory_retain,
    retain,
    Memory::new(),
    [
        S12_only_the_beginning_is_removed,
        S12_several_remove_at_once,
        S13_nothing_goes_that_a_handler_needs,
        S13_a_cursor_is_never_before_the_beginning,
        S13_a_handler_that_comes_amid_steps_misses_nothing,
        S14_copies_of_what_was_removed_are_known,
        S14_without_identities_a_copy_is_stored_again,
        S14_each_is_stored_once_amid_steps,
        S15_what_is_due_goes_and_no_more,
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

    async fn refuse_rows(&self) -> bool {
        self.execute(
            "CREATE TRIGGER refuse_rows BEFORE INSERT ON unfinished WHEN new.key = 'refused'
             BEGIN SELECT RAISE(ABORT, 'a trigger says no'); END",
        )
        .await;
        true
    }
}

conformance!(
    sqlite,
    suite,
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
        S9_events_are_found_by_position,
        S10_an_unknown_outcome_is_appended_again,
        S11_what_was_committed_is_there_after_reopening,
        reads_keep_their_limits,
        lists_find_by_type_and_key_in_either_direction,
    ]
);

conformance!(
    sqlite_progress,
    progress,
    Sqlite::new(),
    [
        D1_a_claim_has_a_higher_epoch_than_every_one_before,
        D1_one_of_many_claims_at_once_is_the_last,
        D1_a_lease_keeps_others_away,
        D2_what_is_written_under_an_old_epoch_changes_nothing,
        D3_a_checkpoint_is_there_as_a_whole,
        D3_D4_any_sequence_of_checkpoints_also_given_up,
        D4_a_row_keeps_how_it_first_failed,
        D4_rows_are_found_by_position_whatever_their_state,
        D5_a_rewind_removes_the_rows_above,
        D6_a_redrive_takes_up_what_matches_at_its_start,
        D6_a_cancelled_redrive_puts_back_what_it_has_left,
        D6_a_discard_of_a_handler_that_nobody_runs,
        D6_quarantine_is_taken_up_and_settled,
        D7_what_persons_did_is_in_the_audit,
        D8_a_handler_adopts_the_progress_of_another,
        dead_letters_are_found_page_by_page,
        dead_letters_are_published_once,
        texts_are_kept_as_far_as_the_database_can,
        D3_what_was_saved_is_there_after_reopening,
    ]
);

conformance!(
    sqlite_retain,
    retain,
    Sqlite::new(),
    [
        S12_only_the_beginning_is_removed,
        S12_several_remove_at_once,
        S13_nothing_goes_that_a_handler_needs,
        S13_a_cursor_is_never_before_the_beginning,
        S13_a_handler_that_comes_amid_steps_misses_nothing,
        S14_copies_of_what_was_removed_are_known,
        S14_without_identities_a_copy_is_stored_again,
        S14_each_is_stored_once_amid_steps,
        S15_what_is_due_goes_and_no_more,
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

    async fn refuse_rows(&self) -> bool {
        self.execute("ALTER TABLE unfinished ADD CHECK (key <> 'refused')").await;
        true
    }

    fn leases(&self) -> bool {
        true
    }
}

conformance!(
    postgres_,
    suite,
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
        S9_events_are_found_by_position,
        S10_an_unknown_outcome_is_appended_again,
        S11_what_was_committed_is_there_after_reopening,
        reads_keep_their_limits,
        lists_find_by_type_and_key_in_either_direction,
    ]
);

conformance!(
    postgres_progress,
    progress,
    Postgres::new(),
    [
        D1_a_claim_has_a_higher_epoch_than_every_one_before,
        D1_one_of_many_claims_at_once_is_the_last,
        D1_a_lease_keeps_others_away,
        D2_what_is_written_under_an_old_epoch_changes_nothing,
        D3_a_checkpoint_is_there_as_a_whole,
        D3_D4_any_sequence_of_checkpoints_also_given_up,
        D4_a_row_keeps_how_it_first_failed,
        D4_rows_are_found_by_position_whatever_their_state,
        D5_a_rewind_removes_the_rows_above,
        D6_a_redrive_takes_up_what_matches_at_its_start,
        D6_a_cancelled_redrive_puts_back_what_it_has_left,
        D6_a_discard_of_a_handler_that_nobody_runs,
        D6_quarantine_is_taken_up_and_settled,
        D7_what_persons_did_is_in_the_audit,
        D8_a_handler_adopts_the_progress_of_another,
        dead_letters_are_found_page_by_page,
        dead_letters_are_published_once,
        texts_are_kept_as_far_as_the_database_can,
        D3_what_was_saved_is_there_after_reopening,
    ]
);

conformance!(
    postgres_retain,
    retain,
    Postgres::new(),
    [
        S12_only_the_beginning_is_removed,
        S12_several_remove_at_once,
        S13_nothing_goes_that_a_handler_needs,
        S13_a_cursor_is_never_before_the_beginning,
        S13_a_handler_that_comes_amid_steps_misses_nothing,
        S14_copies_of_what_was_removed_are_known,
        S14_without_identities_a_copy_is_stored_again,
        S14_each_is_stored_once_amid_steps,
        S15_what_is_due_goes_and_no_more,
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

/// What a step does, by hand, in a transaction that has the head row while an append waits for it:
/// the append has begun before, and sees neither the event nor what is left of it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn postgres_S14_an_append_that_has_waited_for_a_step_sees_what_is_left() {
    const STEP: &str = "
        INSERT INTO removed_identities (identity, position, content)
        SELECT encode(substring(sha256(int8send(octet_length(source)) || convert_to(source, 'UTF8')
            || convert_to(id, 'UTF8')) FROM 1 FOR 16), 'hex')::uuid, position, 0
        FROM events WHERE position <= $1 ON CONFLICT DO NOTHING";
    let postgres = Postgres::new().await;
    let store = postgres.open().await;
    let events = (1..=3).map(|n| suite::event(&n.to_string()));
    store.append(&suite::batch(events)).await.unwrap();
    let mut by_hand = PgConnection::connect(&postgres.0.url).await.unwrap();
    // What a transaction sees of others' activity stays as it first was.
    let mut look = PgConnection::connect(&postgres.0.url).await.unwrap();
    // Nothing was removed before, and something was.
    for position in [1_i64, 2] {
        // A new one each time, which looks for no copies beforehand.
        let store = postgres.open().await;
        let mut tx = by_hand.begin().await.unwrap();
        sqlx::query("SELECT FROM log_head FOR UPDATE").execute(&mut *tx).await.unwrap();
        let copy = suite::batch([suite::event(&position.to_string())]);
        let (appending, batch) = (Arc::clone(&store), copy.clone());
        let mut waiting = JoinSet::new();
        waiting.spawn(async move { appending.append(&batch).await });
        wait_until("the append waits for the head row", async || {
            let waits: bool = sqlx::query_scalar(
                "SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted AND pid IN
                    (SELECT pid FROM pg_stat_activity WHERE datname = current_database()))",
            )
            .fetch_one(&mut look)
            .await
            .unwrap();
            waits.then_some(())
        })
        .await;
        sqlx::query(STEP).bind(position).execute(&mut *tx).await.unwrap();
        for sql in ["DELETE FROM events WHERE position <= $1", "UPDATE log_head SET removed = $1"] {
            sqlx::query(sql).bind(position).execute(&mut *tx).await.unwrap();
        }
        tx.commit().await.unwrap();
        let receipts = waiting.join_next().await.unwrap().unwrap().unwrap();
        // By hand no content was kept, so that it is no copy; and it is not new.
        let Receipt::Quarantined { reason, .. } = &receipts[0] else { panic!("{receipts:?}") };
        assert!(reason.contains("has been removed"), "{reason}");
    }
    assert_eq!(store.head().await.unwrap(), Position(3));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn postgres_S12_S14_a_crash_amid_steps() {
    let server = postgres::PostgresServer::start().await;
    retain::S12_S14_a_crash_amid_steps(&Mortal(Mutex::new(server))).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn postgres_D3_a_crash_amid_checkpoints() {
    let server = postgres::PostgresServer::start().await;
    progress::D3_a_crash_amid_checkpoints(&Mortal(Mutex::new(server))).await;
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
    // The server's process for this connection may live on for a moment, and does its work.
    let mut nth = 1;
    let batch = wait_until("it is unavailable", async || {
        nth += 1;
        let batch = suite::whole("run", nth);
        match store.append(&batch).await {
            Ok(_) => None,
            Err(StoreError::Unavailable(_)) => Some(batch),
            Err(error) => panic!("{error}"),
        }
    })
    .await;
    server.restart().await;
    suite::append_patiently(&store, &batch).await;
    wait_until("reads work again", async || store.head().await.ok()).await;
    suite::audit_whole(&store, "run", nth).await;
}

/// The tables as version 2 of the schema left them, with a dead letter and a cursor.
const VERSION_2: &str = "
    INSERT INTO dead_letters (handler, position, id, type, key, attempts, first_error, last_error,
        first_failed_at, last_failed_at)
    VALUES ('search', 7, 'an id', 'A', 'a key', 3, 'first', 'last',
        '2026-01-02T03:04:05.000006Z', '2026-01-02T03:04:06.000000Z');
    INSERT INTO cursors (handler, position, updated_at)
    VALUES ('search', 9, '2026-01-02T03:04:05.000006Z');";

/// Version 3, undone.
const BACK_TO_2: &str = "
    DROP VIEW dead_letters;
    DROP TABLE unfinished; DROP TABLE redrives; DROP TABLE audit;
    DROP INDEX quarantine_redrive; DROP INDEX quarantine_redriven;
    ALTER TABLE quarantine DROP COLUMN redrive;
    ALTER TABLE cursors DROP COLUMN epoch; ALTER TABLE cursors DROP COLUMN owner;
    ALTER TABLE cursors DROP COLUMN expires_at; ALTER TABLE cursors DROP COLUMN paused;
    DELETE FROM pulsebus_migrations WHERE version = 3;";

async fn upgraded(store: &dyn EventStore) {
    let letters = store.dead_letters(&DeadLetterFilter::default(), None, 9).await.unwrap();
    assert_eq!(letters.len(), 1);
    let letter = &letters[0];
    assert_eq!((&*letter.handler, letter.position), ("search", Position(7)));
    assert_eq!((&*letter.id, &*letter.kind, &*letter.key), ("an id", "A", "a key"));
    assert_eq!((letter.attempts, letter.followers, letter.redrive), (3, 0, None));
    assert_eq!((&*letter.failure.first_error, &*letter.failure.last_error), ("first", "last"));
    assert_eq!(letter.failure.first_failed_at, datetime!(2026-01-02 03:04:05.000006 UTC));
    assert_eq!(letter.failure.last_failed_at, datetime!(2026-01-02 03:04:06 UTC));
    let claim = Claim {
        handler: "search",
        owner: "one",
        ttl: Duration::from_secs(60),
        start: Position::START,
    };
    let Claimed::Taken(tenure) = store.claim(claim).await.unwrap() else { panic!("held") };
    assert_eq!((tenure.cursor, tenure.fresh, tenure.paused), (Position(9), false, false));
    assert!(tenure.epoch.0 > 0);
}

#[tokio::test]
async fn sqlite_dead_letters_of_version_2_are_kept() {
    let sqlite = Sqlite(process::folder("sqlite").join("events.db"));
    sqlite.open().await.close().await;
    let back = format!(
        "{BACK_TO_2} DROP TABLE epochs; {}; {VERSION_2}",
        include_str!("../../src/store/migrations/sqlite/0002_dead_letters.sql")
    );
    sqlite.execute(&back).await;
    upgraded(&*sqlite.open().await).await;
    let url = format!("sqlite:{}", sqlite.0.display());
    let mut connection = SqliteConnection::connect(&url).await.unwrap();
    let row: (String, i64, String, String) =
        sqlx::query_as("SELECT handler, position, last_error, first_failed_at FROM dead_letters")
            .fetch_one(&mut connection)
            .await
            .unwrap();
    let expected = ("search", 7, "last", "2026-01-02T03:04:05.000006Z");
    assert_eq!((&*row.0, row.1, &*row.2, &*row.3), expected);
}

#[tokio::test]
async fn postgres_dead_letters_of_version_2_are_kept() {
    let database = Postgres::new().await;
    database.open().await.close().await;
    let back = format!(
        "{BACK_TO_2} DROP SEQUENCE epochs; ALTER TABLE cursors DROP COLUMN write; {}; {VERSION_2}",
        include_str!("../../src/store/migrations/postgres/0002_dead_letters.sql")
    );
    database.execute(&back).await;
    upgraded(&*database.open().await).await;
    let mut connection = PgConnection::connect(&database.0.url).await.unwrap();
    let row: (String, i64, String) =
        sqlx::query_as("SELECT handler, position, last_error FROM dead_letters")
            .fetch_one(&mut connection)
            .await
            .unwrap();
    assert_eq!((&*row.0, row.1, &*row.2), ("search", 7, "last"));
}

async fn something_waits(looking: &mut PgConnection) {
    wait_until("something waits for a lock", async || {
        let waiting: i64 = sqlx::query_scalar(
            "SELECT count(*) FROM pg_stat_activity
             WHERE datname = current_database() AND wait_event_type = 'Lock'",
        )
        .fetch_one(&mut *looking)
        .await
        .unwrap();
        (waiting > 0).then_some(())
    })
    .await;
}

/// A checkpoint that was given up may still be at work when it is repeated with more that is
/// done by now: what it adds while the other one waits for it is finished all the same.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn postgres_D3_a_checkpoint_waits_for_one_that_was_given_up() {
    let database = Postgres::new().await;
    let store = database.open().await;
    let claim =
        Claim { handler: "h", owner: "one", ttl: Duration::from_secs(60), start: Position::START };
    let Claimed::Taken(tenure) = store.claim(claim).await.unwrap() else { panic!("held") };
    let mut given_up = PgConnection::connect(&database.0.url).await.unwrap();
    sqlx::raw_sql(
        "BEGIN; UPDATE cursors SET position = 5, write = write + 1 WHERE handler = 'h';
         INSERT INTO unfinished (handler, position, state, id, type, key, attempts)
         VALUES ('h', 3, 'parked', 'id', 'A', 'k', 0)",
    )
    .execute(&mut given_up)
    .await
    .unwrap();
    let mut repeated = JoinSet::new();
    repeated.spawn({
        let store = store.clone();
        async move {
            let finish = [progress::done(3)];
            progress::save(&*store, "h", tenure.epoch, 6, finish).await
        }
    });
    let mut looking = PgConnection::connect(&database.0.url).await.unwrap();
    something_waits(&mut looking).await;
    sqlx::raw_sql("COMMIT").execute(&mut given_up).await.unwrap();
    repeated.join_next().await.unwrap().unwrap().unwrap();
    assert_eq!(store.cursor("h").await.unwrap(), Some(Position(6)));
    assert!(store.unfinished("h", Position::START, 9).await.unwrap().is_empty());

    // The same, when it is a claim that it waited for: then it changes nothing.
    sqlx::raw_sql("BEGIN; UPDATE cursors SET epoch = epoch + 1 WHERE handler = 'h'")
        .execute(&mut given_up)
        .await
        .unwrap();
    let mut fenced = JoinSet::new();
    fenced.spawn({
        let store = store.clone();
        async move {
            let keep = [Change::Keep(progress::dead(7))];
            progress::save(&*store, "h", tenure.epoch, 7, keep).await
        }
    });
    something_waits(&mut looking).await;
    sqlx::raw_sql("COMMIT").execute(&mut given_up).await.unwrap();
    let error = fenced.join_next().await.unwrap().unwrap().unwrap_err();
    assert!(matches!(error, StoreError::Fenced(_)), "{error}");
    assert_eq!(store.cursor("h").await.unwrap(), Some(Position(6)));
    assert!(store.unfinished("h", Position::START, 9).await.unwrap().is_empty());
}

/// A checkpoint that was given up may reach the server when what followed it is long done: then
/// it changes nothing, neither what it moves nor what it keeps.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn postgres_D3_a_checkpoint_that_comes_late_changes_nothing() {
    let database = Postgres::new().await;
    let store = database.open().await;
    let claim =
        Claim { handler: "h", owner: "one", ttl: Duration::from_secs(60), start: Position::START };
    let Claimed::Taken(tenure) = store.claim(claim).await.unwrap() else { panic!("held") };
    // Prepared on each connection, so that a checkpoint is on the server as a whole when it waits.
    for _ in 0..8 {
        progress::save(&*store, "h", tenure.epoch, 1, []).await.unwrap();
        progress::save(&*store, "h", tenure.epoch, 1, [progress::done(9)]).await.unwrap();
    }
    for changes in [vec![], vec![Change::Keep(progress::dead(3))]] {
        let mut lock = PgConnection::connect(&database.0.url).await.unwrap();
        sqlx::raw_sql("BEGIN; LOCK TABLE cursors").execute(&mut lock).await.unwrap();
        // It waits when it is given up, and begins when the lock is gone. What followed it is
        // written by hand, in the transaction that it waits for.
        let mut late = JoinSet::new();
        late.spawn({
            let store = store.clone();
            async move { progress::save(&*store, "h", tenure.epoch, 5, changes).await }
        });
        let mut looking = PgConnection::connect(&database.0.url).await.unwrap();
        something_waits(&mut looking).await;
        late.shutdown().await;
        sqlx::raw_sql("UPDATE cursors SET position = 6, write = 1000000000; COMMIT")
            .execute(&mut lock)
            .await
            .unwrap();
        wait_until("it is no longer at work", async || {
            let busy: i64 = sqlx::query_scalar(
                "SELECT count(*) FROM pg_stat_activity
                 WHERE datname = current_database() AND state = 'active'
                     AND pid <> pg_backend_pid()",
            )
            .fetch_one(&mut looking)
            .await
            .unwrap();
            (busy == 0).then_some(())
        })
        .await;
        assert_eq!(store.cursor("h").await.unwrap(), Some(Position(6)));
        assert!(store.unfinished("h", Position::START, 9).await.unwrap().is_empty());
        sqlx::raw_sql("UPDATE cursors SET write = 0").execute(&mut looking).await.unwrap();
    }
    progress::save(&*store, "h", tenure.epoch, 7, []).await.unwrap();
}

/// The plans of everything that is done with 100,000 dead letters, as the server chose them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn postgres_many_dead_letters_are_found_through_indexes() {
    let server = postgres::PostgresServer::start().await;
    connect(&server.url()).await.unwrap().close().await;
    for sql in [
        "INSERT INTO unfinished (handler, position, state, id, type, key, attempts, due_at,
             last_error, last_failed_at, unpublished)
         SELECT handler, n, state, n, 'T' || n % 10, 'k' || n % 1000, 1, now(), 'error ' || n,
             now(), state = 'dead' AND n % 1000 = 7
         FROM (VALUES ('h', 'dead', 100000), ('other', 'parked', 50000),
             ('another', 'retrying', 50000)) AS rows(handler, state, many),
             generate_series(1, many) AS n",
        "VACUUM ANALYZE unfinished",
        "ALTER DATABASE postgres SET session_preload_libraries = 'auto_explain'",
        "ALTER DATABASE postgres SET auto_explain.log_min_duration = 0",
    ] {
        server.execute(sql).await;
    }
    let store = connect(&server.url()).await.unwrap();
    let claim = Claim {
        handler: "h",
        owner: "one",
        ttl: Duration::from_secs(60),
        start: Position(100_000),
    };
    let Claimed::Taken(tenure) = store.claim(claim).await.unwrap() else { panic!("held") };
    let mut read = server.log().len();
    // Each plan is in the log before its statement is answered.
    let mut expect = |what: &str, index: &str| {
        let log = server.log();
        let plans = &log[read..];
        assert!(plans.contains(index), "{what}, not through {index}: {plans}");
        assert!(!plans.contains("Seq Scan on unfinished"), "{what}: {plans}");
        read = log.len();
    };
    let of = DeadLetterFilter { handler: Some("h".to_owned()), ..DeadLetterFilter::default() };
    let text = |text: &str| Some(text.to_owned());
    let filters = [
        (
            DeadLetterFilter { positions: vec![7, 9], ..of.clone() },
            "(\"position\" = ANY ('{7,9}'::bigint[]))",
        ),
        (DeadLetterFilter { key: text("k1"), ..of.clone() }, "(\"left\"(key, 200) = 'k1'::text)"),
        (DeadLetterFilter { kind: text("T1"), ..of.clone() }, "unfinished_dead_type"),
        (DeadLetterFilter { error: text("77"), ..of.clone() }, "unfinished_dead"),
        (of, "unfinished_dead"),
        (DeadLetterFilter::default(), "unfinished_dead"),
    ];
    for (filter, index) in &filters {
        let what = format!("{filter:?}");
        store.dead_letters(filter, None, 100).await.unwrap();
        expect(&what, index);
        store.dead_letters(filter, Some(("h", Position(50_000))), 100).await.unwrap();
        expect(&what, "unfinished_key");
        store.count_dead_letters(filter).await.unwrap();
        expect(&what, index);
    }
    // From few to many: a redrive leaves what the one before it has taken up. The last filter
    // takes half of the table, and may as well read all of it.
    for (filter, index) in filters.into_iter().take(5) {
        let what = format!("{filter:?}");
        let started = store
            .start_redrive(&NewRedrive {
                selection: Selection::DeadLetters(filter),
                action: RedriveAction::Discard,
                rate: None,
                by: "a person".to_owned(),
                reason: text("they are many"),
            })
            .await
            .unwrap();
        expect(&what, index);
        store.redriven("h", &[], 100).await.unwrap();
        expect("redriven", "unfinished_redriven");
        store.redrive(started.number).await.unwrap();
        expect("one redrive", "unfinished_redrive");
    }
    store.unpublished("h", 100).await.unwrap();
    expect("unpublished", "unfinished_unpublished");
    store.unfinished("h", Position(5_000), 100).await.unwrap();
    expect("unfinished", "unfinished_pkey");
    let changes = (1..=500)
        .map(progress::done)
        .chain((1000..1500).map(|position| Change::Keep(progress::dead(position))));
    progress::save(&store, "h", tenure.epoch, 100_001, changes).await.unwrap();
    expect("a checkpoint", "unfinished_pkey");
    let audit = AuditEntry::new("a person", "cancel", String::new(), &serde_json::json!({}));
    store.cancel_redrive(1, &audit).await.unwrap();
    expect("a cancelled redrive", "unfinished_redrive");
    store.end_redrives().await.unwrap();
    expect("redrives that end", "unfinished_redrive");
    store.discard_orphans(&[]).await.unwrap();
    expect("a discard", "unfinished_redrive");
}
