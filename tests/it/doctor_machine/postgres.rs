//! Postgres servers set up wrong.

use std::fs;

use pulsebus::{
    secret::Secret,
    store::{
        EventStore as _, StoreError,
        postgres::{PostgresOptions, PostgresStore},
    },
};
use sqlx::{AssertSqlSafe, Connection as _, PgConnection, Row as _};

use super::{Said, Setup, doctor, lesson, post};
use crate::support::{
    daemon::Daemon,
    free_port,
    postgres::PostgresServer,
    process::{folder, is_root, spawn_as},
    wait_until,
};

fn store(url: &str) -> String {
    format!("[store]\nurl = \"{url}\"")
}

/// A server as it should be: what the tests' servers leave out for speed is on.
async fn right(more: &[&str]) -> PostgresServer {
    PostgresServer::start_set(&[&["fsync=on"], more].concat()).await
}

/// What a database holds: every relation outside of the system's schemas, every row of a table.
async fn contents(url: &str) -> Vec<String> {
    let mut connection = PgConnection::connect(url).await.unwrap();
    let relations = sqlx::query(
        "SELECT n.nspname || '.' || c.relname, c.relkind::text, c.relfilenode::text
         FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
         WHERE n.nspname NOT IN ('pg_catalog', 'information_schema', 'pg_toast') ORDER BY 1",
    )
    .fetch_all(&mut connection)
    .await
    .unwrap();
    let mut found = Vec::new();
    for relation in relations {
        let (name, kind): (String, String) = (relation.get(0), relation.get(1));
        found.push(format!("{name} {kind} {}", relation.get::<String, _>(2)));
        if kind == "r" {
            let rows = format!("SELECT t::text || xmin::text FROM {name} AS t ORDER BY 1");
            found.extend(
                sqlx::query_scalar::<_, String>(AssertSqlSafe(rows))
                    .fetch_all(&mut connection)
                    .await
                    .unwrap(),
            );
        }
    }
    connection.close().await.unwrap();
    found
}

async fn connect(url: &str) -> Result<PostgresStore, StoreError> {
    PostgresStore::connect(PostgresOptions::new(Secret::Inline(url.to_owned()))).await
}

#[tokio::test]
async fn a_right_server_has_no_findings_and_is_not_changed() {
    let server = right(&[]).await;
    let setup = Setup::new(&store(&server.url()));
    // Empty: the tables are to come, and doctor does not make them.
    let said = setup.doctor().await;
    assert_eq!(said.the("note", "postgres-schema").subject, "store");
    assert_eq!(said.checks(), ["postgres-schema", "daemon-absent"], "{said:#?}");
    assert_eq!(contents(&server.url()).await, [""; 0]);

    let daemon = Daemon::start(&format!("max_connections = 100\n{}", store(&server.url()))).await;
    daemon.ready().await;
    post(&daemon, lesson("1")).await;
    let config = daemon.folder.join("pulsebus.toml");
    let said = doctor(&config, &["--strict"]).await;
    assert_eq!(said.checks(), [""; 0], "{said:#?}");
    // A disk that is nearly full is this machine's, and no fault of the server.
    let warned = said.findings.iter().any(|finding| finding.severity != "note");
    assert_eq!(said.code, i32::from(warned), "{said:#?}");

    daemon.terminate().await;
    let before = contents(&server.url()).await;
    assert!(before.iter().any(|row| row.contains("Fractions")), "{before:?}");
    assert_eq!(doctor(&config, &[]).await.checks(), ["daemon-absent"]);
    assert_eq!(contents(&server.url()).await, before);
}

/// Sets something wrong, sees it found, does what the finding says, and sees that it helped.
async fn mended(
    server: &PostgresServer,
    setup: &Setup,
    wrong: &[&str],
    (severity, check): (&str, &str),
    mend: &[&str],
) {
    for sql in wrong {
        server.execute(sql).await;
    }
    let said = setup.doctor().await;
    let finding = said.the(severity, check);
    assert_eq!(finding.subject, "store");
    assert_eq!(said.code, i32::from(severity == "error"), "{said:#?}");
    for sql in mend {
        assert!(finding.mend.contains(sql), "{sql} in {finding:?}");
        server.execute(sql).await;
    }
    let said = setup.doctor().await;
    assert!(!said.has(check), "{check} after {mend:?}: {said:#?}");
}

#[tokio::test]
async fn settings_that_lose_or_stall_are_found_and_what_is_said_mends_them() {
    // Not on its command line, where it would win.
    let server = right(&[]).await;
    drop(connect(&server.url()).await.unwrap());
    let setup = Setup::new(&store(&server.url()));
    assert_eq!(setup.doctor().await.checks(), ["daemon-absent"]);
    let reload = "SELECT pg_reload_conf();";
    for (setting, check, severity) in [
        ("full_page_writes", "postgres-full-page-writes", "error"),
        ("autovacuum", "postgres-autovacuum", "warning"),
        ("track_counts", "postgres-autovacuum", "warning"),
    ] {
        let wrong = format!("ALTER SYSTEM SET {setting} = off");
        let mend = format!("ALTER SYSTEM SET {setting} = on;");
        let found = (severity, check);
        mended(&server, &setup, &[&wrong, reload], found, &[&mend, reload]).await;
    }
    mended(
        &server,
        &setup,
        &["ALTER SYSTEM SET synchronous_standby_names = 'nobody'", reload],
        ("error", "postgres-sync-standby"),
        &["ALTER SYSTEM RESET synchronous_standby_names;", reload],
    )
    .await;
    let role = |setting: &str| format!("ALTER ROLE \"postgres\" SET {setting};");
    for (wrong, found, mend) in [
        ("statement_timeout = '500ms'", ("error", "postgres-timeout"), "statement_timeout = 0"),
        ("statement_timeout = '5s'", ("warning", "postgres-timeout"), "statement_timeout = 0"),
        (
            "synchronous_commit = off",
            ("note", "postgres-synchronous-commit"),
            "synchronous_commit = on",
        ),
    ] {
        mended(&server, &setup, &[&role(wrong)], found, &[&role(mend)]).await;
    }
    server.execute("SELECT pg_create_physical_replication_slot('left', true)").await;
    let said = setup.doctor().await;
    let finding = said.the("warning", "postgres-slot");
    assert!(finding.what.contains("left"), "{finding:?}");
    let drop_it = "SELECT pg_drop_replication_slot('NAME');";
    assert!(finding.mend.contains(drop_it), "{finding:?}");
    server.execute(&drop_it.replace("NAME", "left")).await;
    assert_eq!(setup.doctor().await.checks(), ["daemon-absent"]);
}

#[tokio::test]
async fn fsync_off_is_an_error() {
    // The tests' servers run so.
    let server = PostgresServer::start_set(&["fsync=off"]).await;
    let setup = Setup::new(&store(&server.url()));
    let said = setup.doctor().await;
    assert!(said.the("error", "postgres-fsync").mend.contains("fsync = on"));
    assert_eq!((said.code, said.checks()[0]), (1, "postgres-fsync"));
}

#[tokio::test]
async fn a_role_that_may_not_is_found_and_what_is_said_mends_it() {
    let server = right(&[]).await;
    server.execute("CREATE ROLE pulse LOGIN").await;
    let url = server.url_of("pulse");
    let setup = Setup::new(&store(&url));
    // It is right: the daemon does not start either.
    assert!(matches!(connect(&url).await, Err(StoreError::Misconfigured(_))));
    let create = "GRANT CREATE, USAGE ON SCHEMA \"public\" TO \"pulse\";";
    mended(&server, &setup, &[], ("error", "postgres-privileges"), &[create]).await;

    drop(connect(&server.url()).await.unwrap());
    let tables = "GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA \"public\" TO \
                  \"pulse\";";
    let sequences = "GRANT USAGE ON ALL SEQUENCES IN SCHEMA \"public\" TO \"pulse\";";
    let said = setup.doctor().await;
    let finding = said.the("error", "postgres-privileges");
    assert!(finding.what.contains("INSERT on events"), "{finding:?}");
    assert!(connect(&url).await.is_err());
    mended(&server, &setup, &[], ("error", "postgres-privileges"), &[tables, sequences]).await;
    connect(&url).await.unwrap().head().await.unwrap();

    mended(
        &server,
        &setup,
        &["ALTER ROLE pulse SET default_transaction_read_only = on"],
        ("error", "postgres-read-only"),
        &["ALTER ROLE \"pulse\" SET default_transaction_read_only = off;"],
    )
    .await;
    mended(
        &server,
        &setup,
        &["ALTER ROLE pulse CONNECTION LIMIT 5"],
        ("warning", "postgres-connections"),
        &["ALTER ROLE \"pulse\" CONNECTION LIMIT 12;"],
    )
    .await;
    mended(
        &server,
        &setup,
        &["ALTER ROLE pulse SET search_path = nowhere"],
        ("error", "postgres-privileges"),
        &[
            "CREATE SCHEMA pulsebus AUTHORIZATION \"pulse\";",
            "ALTER ROLE \"pulse\" SET search_path = pulsebus;",
        ],
    )
    .await;
}

#[tokio::test]
async fn tables_of_another_version_are_errors() {
    let server = right(&[]).await;
    drop(connect(&server.url()).await.unwrap());
    let setup = Setup::new(&store(&server.url()));
    let found = async |check: &str, part: &str| {
        let said: Said = setup.doctor().await;
        let finding = said.the("error", check);
        assert!(finding.what.contains(part), "{finding:?}");
        assert_eq!(said.code, 1);
    };
    server
        .execute("INSERT INTO cursors (handler, position, updated_at) VALUES ('mine', 9, now())")
        .await;
    found("store-cursor", "mine (9)").await;
    let mend = "UPDATE cursors SET position = 0 WHERE position > 0;";
    mended(&server, &setup, &[], ("error", "store-cursor"), &[mend]).await;
    server.execute("UPDATE log_head SET position = 3").await;
    server
        .execute(
            "INSERT INTO events VALUES (2, 's', 'i', 't', NULL, NULL, 'k', '{}', 'raw', '{}', \
             '{}', now())",
        )
        .await;
    found("store-head", "at 3").await;
    server
        .execute(
            "INSERT INTO pulsebus_migrations (version, description, success, checksum,
                 execution_time) VALUES (99, 'later', true, '\\x00', 0)",
        )
        .await;
    found("postgres-schema", "99").await;
    assert!(matches!(connect(&server.url()).await, Err(StoreError::Misconfigured(_))));

    server.execute("CREATE DATABASE other").await;
    let other = format!("{}/other", server.url().trim_end_matches("/postgres"));
    let mut connection = PgConnection::connect(&other).await.unwrap();
    sqlx::raw_sql("CREATE TABLE events (x int)").execute(&mut connection).await.unwrap();
    connection.close().await.unwrap();
    setup.write(&store(&other));
    found("postgres-schema", "another program").await;

    server
        .execute("CREATE DATABASE ascii ENCODING 'SQL_ASCII' LOCALE 'C' TEMPLATE template0")
        .await;
    setup.write(&store(&other.replace("/other", "/ascii")));
    found("postgres-encoding", "SQL_ASCII").await;
}

#[tokio::test]
async fn connections_that_are_used_up_are_told_before_and_when_they_are() {
    let server = right(&["max_connections=14", "superuser_reserved_connections=1"]).await;
    server.execute("CREATE ROLE pulse LOGIN; GRANT CREATE ON SCHEMA public TO pulse").await;
    let url = server.url_of("pulse");
    let setup = Setup::new(&store(&url));
    assert!(!setup.doctor().await.has("postgres-connections"));
    let mut held = Vec::new();
    // Of another role: not everything about them is to be seen.
    while held.len() < 5 {
        held.push(PgConnection::connect(&server.url()).await.unwrap());
    }
    let said = setup.doctor().await;
    assert_eq!(said.the("warning", "postgres-connections").subject, "store");
    assert_eq!(said.code, 0);
    // What it says to do helps.
    assert!(
        !doctor(&setup.config, &["--set", "store.max_connections=5"])
            .await
            .has("postgres-connections")
    );
    while let Ok(connection) = PgConnection::connect(&url).await {
        held.push(connection);
    }
    let said = setup.doctor().await;
    said.the("error", "postgres-connections");
    assert_eq!(said.code, 1);
}

#[tokio::test]
async fn a_server_that_does_not_answer_or_refuses_the_login_is_an_error() {
    let setup = Setup::new(&store(&format!("postgres://pulse@127.0.0.1:{}/x", free_port())));
    let said = setup.doctor().await;
    assert_eq!(said.the("error", "postgres-connect").subject, "store");
    assert_eq!(said.code, 1);
    let server = PostgresServer::start_with_passwords().await;
    let url = server.url_of("pulse").replace("pulse@", "pulse:two@");
    setup.write(&store(&url));
    let said = setup.doctor().await;
    assert!(said.the("error", "postgres-connect").what.contains("refuses the login"), "{said:?}");
    assert!(!format!("{said:?}").contains("two@"), "{said:?}");
    setup.write(&store(&url.replace("two", "one")));
    assert!(!setup.doctor().await.has("postgres-connect"));
}

/// Where the machine has no PgBouncer, this is not tried.
#[tokio::test]
async fn a_pooler_that_shares_sessions_is_an_error_and_one_that_does_not_is_none() {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let programs = std::env::split_paths(&path).chain(["/usr/sbin".into()]);
    let Some(program) = programs.map(|f| f.join("pgbouncer")).find(|path| path.is_file()) else {
        return eprintln!("there is no pgbouncer: a pooler is not tried");
    };
    let server = right(&[]).await;
    let address = server.url();
    let server_port = address.rsplit_once(':').unwrap().1.split('/').next().unwrap();
    for (mode, expected) in [("transaction", true), ("session", false)] {
        let (folder, port) = (folder("pgbouncer"), free_port());
        let config = folder.join("pgbouncer.ini");
        let text = format!(
            "[databases]\npostgres = host=127.0.0.1 port={server_port} user=postgres\n\
             [pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\n\
             auth_type = any\npool_mode = {mode}\nignore_startup_parameters = extra_float_digits\n"
        );
        fs::write(&config, text).unwrap();
        let log = fs::File::create(folder.join("log")).unwrap();
        let mut pooler = spawn_as(is_root().then_some("nobody"), &program, |command| {
            command.arg(&config).stdout(log.try_clone().unwrap()).stderr(log);
        });
        let url = format!("postgres://postgres@127.0.0.1:{port}/postgres");
        wait_until("the pooler answers", async || {
            let ended = pooler.try_wait().unwrap();
            assert!(ended.is_none(), "{:?}", fs::read_to_string(folder.join("log")));
            PgConnection::connect(&url).await.ok()?.close().await.ok()
        })
        .await;
        let said = Setup::new(&store(&url)).doctor().await;
        assert_eq!(said.has("postgres-pooler"), expected, "{mode}: {said:#?}");
        if expected {
            assert_eq!(said.the("error", "postgres-pooler").subject, "store");
        }
        pooler.kill().unwrap();
        pooler.wait().unwrap();
    }
}
