//! Backups taken beside a running daemon, by the commands of docs/operating.md, restored into another.

use std::{path::Path, process::Command, time::Duration};

use async_nats::jetstream::stream::Config;
use serde_json::Value;

use crate::support::{daemon::Daemon, nats::NatsServer, postgres, process::folder, wait_until};

/// Events before the backup is asked for, and after it is there.
const BEFORE: u64 = 300;
const ALL: u64 = 600;

fn config(nats: &NatsServer, store: &str) -> String {
    format!(
        r#"
[store]
url = "{store}"
[transports.nats]
kind = "nats"
url = "{}"
[sources.lessons]
transport = "nats"
stream = "EDUPULSE"
key = ["/lesson_id"]
ack_wait = "2s"
[handlers.search]
kind = "search"
[handlers.search.documents.LessonPublished]
id = "/lesson_id"
text = {{ title = "/title" }}
[handlers.copy]
kind = "forward"
transport = "nats"
subject = "copy.{{type}}"
"#,
        nats.url()
    )
}

async fn broker() -> NatsServer {
    let nats = NatsServer::start();
    let jetstream = nats.jetstream().await;
    for (name, subjects) in [("EDUPULSE", "edupulse.>"), ("COPY", "copy.>")] {
        let config = Config {
            name: name.to_owned(),
            subjects: vec![subjects.to_owned()],
            // The copies of the second daemon must be seen, not dropped by the broker.
            duplicate_window: Duration::from_millis(100),
            ..Config::default()
        };
        jetstream.create_stream(config).await.unwrap();
    }
    nats
}

async fn publish(nats: &NatsServer, numbers: std::ops::Range<u64>) {
    let jetstream = nats.jetstream().await;
    for n in numbers {
        let event = format!(
            r#"{{"id":"e{n}","type":"LessonPublished","data":{{"lesson_id":"{n}","title":"number {n}"}}}}"#
        );
        jetstream.publish("edupulse.lessons", event.into()).await.unwrap().await.unwrap();
    }
}

/// Position and id of every event.
async fn log(daemon: &Daemon) -> Vec<(u64, String)> {
    let page = daemon.json("/v1/events?limit=1000").await.unwrap();
    let row =
        |row: &Value| (row["position"].as_u64().unwrap(), row["id"].as_str().unwrap().to_owned());
    page["events"].as_array().unwrap().iter().map(row).collect()
}

async fn until_all(daemon: &Daemon) {
    wait_until("everything is in the log and handled", async || {
        let done = daemon.head().await >= ALL
            && daemon.handler("search").await >= ALL
            && daemon.handler("copy").await >= ALL;
        done.then_some(())
    })
    .await;
}

/// The command lines of a block of docs/operating.md, with the words that stand for the reader's
/// own replaced.
fn documented(begins: &str, replace: &[(&str, &str)]) -> String {
    let page =
        std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/operating.md"))
            .unwrap();
    let mut block = page
        .split("```sh\n")
        .skip(1)
        .map(|rest| rest.split("```").next().unwrap())
        .find(|block| block.starts_with(begins))
        .unwrap_or_else(|| panic!("no block of docs/operating.md begins with {begins:?}"))
        .to_owned();
    for (from, to) in replace {
        assert!(block.contains(from), "{from:?} is not in {block}");
        block = block.replace(from, to);
    }
    block
}

async fn shell(script: String) {
    let output = tokio::task::spawn_blocking(move || {
        Command::new("sh").args(["-ec", &script]).output().unwrap()
    })
    .await
    .unwrap();
    let err = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}{err}", String::from_utf8_lossy(&output.stdout));
}

/// The whole story: a backup under traffic, the loss of everything but the broker, a restore.
async fn restored(
    nats: NatsServer,
    first: Daemon,
    backup: impl Future<Output = ()>,
    second: impl AsyncFnOnce() -> (Daemon, u64),
) {
    publish(&nats, 0..BEFORE).await;
    wait_until("the first half is in the log", async || {
        (first.head().await >= BEFORE).then_some(())
    })
    .await;
    // The backup is taken while more comes.
    tokio::join!(backup, publish(&nats, BEFORE..ALL));
    until_all(&first).await;
    let whole = log(&first).await;
    assert_eq!(whole.len() as u64, ALL);
    first.kill();

    let (second, held) = second().await;
    assert!((BEFORE..=ALL).contains(&held), "the backup held {held}");
    // What was acknowledged after the backup is not delivered again; the mark that was restored
    // says that the log lacks it, and the stream has it.
    until_all(&second).await;
    assert_eq!(log(&second).await, whole, "the same log again");
    second.ready().await;
    // The index was not in the backup: it is filled again, also below the cursor.
    wait_until("the index is whole", async || {
        let found = second.json("/v1/search/search?q=number").await?;
        (found["total"] == ALL).then_some(())
    })
    .await;
    let dead = second.json("/v1/dead-letters").await.unwrap();
    assert_eq!(dead["dead_letters"].as_array().unwrap().len(), 0, "{dead}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_of_sqlite_beside_traffic_is_restored() {
    let nats = broker().await;
    let config = config(&nats, "sqlite:events.db");
    let first = Daemon::start(&config).await;
    let kept = folder("backup");
    let file = kept.join("events.db");
    let script = documented(
        "sqlite3 ",
        &[
            ("/var/lib/pulsebus/events.db", &first.database().display().to_string()),
            ("/backup/events.db", &file.display().to_string()),
        ],
    );
    restored(nats, first, shell(script), async || {
        // Into an empty folder: no index of the old machine, whose positions it may not have.
        let second = Daemon::stopped(&config);
        std::fs::create_dir_all(second.database().parent().unwrap()).unwrap();
        std::fs::copy(&file, second.database()).unwrap();
        let said = Command::new("sqlite3")
            .arg(&file)
            .arg(
                "PRAGMA integrity_check; SELECT count(*), min(position), max(position) FROM events",
            )
            .output()
            .unwrap();
        let said = String::from_utf8(said.stdout).unwrap();
        let counts = said.strip_prefix("ok\n").unwrap_or_else(|| panic!("{said}"));
        let counts: Vec<u64> = counts.trim().split('|').map(|n| n.parse().unwrap()).collect();
        assert_eq!((counts[0], counts[1]), (counts[2], 1), "a prefix of the log, without gaps");
        second.restart().await;
        (second, counts[0])
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_of_postgres_beside_traffic_is_restored() {
    let nats = broker().await;
    let (old, new) = (postgres::database().await, postgres::database().await);
    let first = Daemon::start(&config(&nats, &old.url)).await;
    let config = config(&nats, &new.url);
    let kept = folder("backup").join("pulsebus.dump").display().to_string();
    let dump = documented(
        "pg_dump ",
        &[("postgres://pulsebus@db/pulsebus", &old.url), ("/backup/pulsebus.dump", &kept)],
    );
    restored(nats, first, shell(dump), async || {
        let restore = documented(
            "pg_restore ",
            &[("postgres://pulsebus@db/pulsebus", &new.url), ("/backup/pulsebus.dump", &kept)],
        );
        shell(restore).await;
        let counts = format!(
            "test \"$(psql -Atc 'SELECT count(*) = max(position) FROM events' '{0}')\" = t\n\
             psql -Atc 'SELECT count(*) FROM events' '{0}' > '{kept}.count'",
            new.url
        );
        shell(counts).await;
        let held = std::fs::read_to_string(format!("{kept}.count")).unwrap();
        let daemon = Daemon::start(&config).await;
        (daemon, held.trim().parse().unwrap())
    })
    .await;
}
