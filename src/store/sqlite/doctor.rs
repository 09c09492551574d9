//! Looks at a SQLite file for `doctor`, and changes nothing.
//!
//! The file is opened to be read only. Where it has no write-ahead log beside it nobody has it
//! open, and then it is opened as one that does not change (`immutable`), since SQLite would
//! make the log's files to read it otherwise.

use std::{
    fs::{self, File, Metadata},
    io::{self, ErrorKind, Read as _},
    os::unix::{ffi::OsStrExt as _, fs::MetadataExt as _},
    path::{Path, PathBuf},
    time::Duration,
};

use rustix::fs::Access;
use sqlx::{
    AssertSqlSafe, ConnectOptions as _, Connection as _, Row as _, SqliteConnection,
    sqlite::{SqliteConnectOptions, SqliteRow},
};

use super::migrate::{MIGRATIONS, check_version, migrator};
use crate::{
    finding::{Finding, STORE, Severity, size},
    store::{
        judge::{log, schema as schema_finding},
        schema::{self, Applied, Schema},
    },
};

/// How long each look may take.
const PATIENCE: Duration = Duration::from_secs(15);

/// Larger files are not read as a whole: doctor should take seconds.
const CHECKED: u64 = 256 << 20;

/// The write-ahead log is cut back to 64 MiB whenever it is written into the file; a much larger
/// one is not being written into it.
const LARGE_LOG: u64 = 256 << 20;

/// The first bytes of every SQLite file (sqlite.org, "Database File Format", 1.3), and where it
/// says that it is written by way of a log.
const MAGIC: &[u8; 16] = b"SQLite format 3\0";
const WRITE_VERSION: usize = 18;

/// Everything that is wrong with the file at this path.
pub(crate) async fn examine(path: &Path) -> Vec<Finding> {
    let shown = path.display();
    let metadata = match fs::metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == ErrorKind::NotFound => {
            let place = shown.to_string();
            let new = Schema::Behind { at: 0, of: 0 };
            return schema_finding("sqlite-schema", &place, &new).into_iter().collect();
        }
        Err(error) => return vec![unreadable(path, &error)],
    };
    let header = match header(path) {
        Ok(header) => header,
        Err(error) => return vec![unreadable(path, &error)],
    };
    let mut findings = Vec::new();
    if !metadata.is_file() || !(header.is_empty() || header.starts_with(MAGIC)) {
        findings.push(finding(
            Severity::Error,
            "sqlite-file",
            format!("{shown} is not a SQLite database"),
            "the daemon does not start, and leaves the file alone",
            "set store.url to another file, or move this one away if nobody needs it",
        ));
        return findings;
    }
    let beside = beside(path);
    findings.extend(access(path, &metadata, &beside));
    findings.extend(log_size(&beside));
    if header.get(WRITE_VERSION).is_some_and(|version| *version != 2) {
        findings.push(finding(
            Severity::Note,
            "sqlite-journal-mode",
            format!("{shown} is not in WAL mode"),
            "somebody has changed it; the daemon changes it back when it starts",
            "start the daemon; let no other program change the file",
        ));
    }
    let opened = tokio::time::timeout(PATIENCE, open(path, &beside)).await;
    let mut connection = match opened {
        Ok(Ok(connection)) => connection,
        Ok(Err(error)) => {
            findings.push(unusable(path, &error.to_string()));
            return findings;
        }
        Err(_) => {
            findings.push(unusable(path, "it cannot be opened in time"));
            return findings;
        }
    };
    match tokio::time::timeout(PATIENCE, look(&mut connection, path, &mut findings)).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => findings.push(unusable(path, &error.to_string())),
        Err(_) => findings.push(unusable(path, &format!("no answer within {PATIENCE:?}"))),
    }
    if metadata.len() <= CHECKED && !findings.iter().any(|f| f.check == "sqlite-damaged") {
        findings.extend(check(&mut connection, path).await);
    }
    let _ = connection.close().await;
    findings
}

fn header(path: &Path) -> io::Result<Vec<u8>> {
    let mut header = Vec::new();
    File::open(path)?.take(100).read_to_end(&mut header)?;
    Ok(header)
}

/// The write-ahead log and its index, where they are.
fn beside(path: &Path) -> Vec<(PathBuf, Metadata)> {
    ["-wal", "-shm"]
        .into_iter()
        .filter_map(|suffix| {
            let mut name = path.as_os_str().to_owned();
            name.push(suffix);
            let metadata = fs::metadata(&name).ok()?;
            Some((PathBuf::from(name), metadata))
        })
        .collect()
}

/// Can it be written, and do the three files belong to one user?
fn access(path: &Path, file: &Metadata, beside: &[(PathBuf, Metadata)]) -> Option<Finding> {
    let why = "the daemon cannot append: nothing is acknowledged";
    if let Some((other, metadata)) = beside.iter().find(|(_, m)| m.uid() != file.uid()) {
        return Some(finding(
            Severity::Error,
            "sqlite-owner",
            format!(
                "{} belongs to user {}, and {} beside it to user {}",
                path.display(),
                file.uid(),
                other.display(),
                metadata.uid()
            ),
            "somebody else, often root, has opened the database; the daemon's user cannot write \
             the log any more",
            format!(
                "stop the daemon, chown {0} {1} {1}-*, and start it",
                file.uid(),
                path.display()
            ),
        ));
    }
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    let writable = rustix::fs::access(path, Access::WRITE_OK).is_ok()
        && rustix::fs::access(folder.unwrap_or(Path::new(".")), Access::WRITE_OK).is_ok();
    (!writable).then(|| {
        finding(
            Severity::Error,
            "sqlite-owner",
            format!(
                "{}, or its folder, is not writable for this user (owner {})",
                path.display(),
                file.uid()
            ),
            why,
            "chown both to the user pulsebus runs as; if that is another than doctor's, run \
             doctor as that one",
        )
    })
}

fn log_size(beside: &[(PathBuf, Metadata)]) -> Option<Finding> {
    let (path, metadata) =
        beside.iter().find(|(path, _)| path.as_os_str().as_bytes().ends_with(b"-wal"))?;
    (metadata.len() > LARGE_LOG).then(|| {
        finding(
            Severity::Warning,
            "sqlite-wal-size",
            format!("{} has grown to {}", path.display(), size(metadata.len())),
            "a reader that never ends keeps it from being written into the database: the disk \
             fills, and reading gets slower",
            "end programs that hold the file open (fuser, lsof), else restart the daemon",
        )
    })
}

async fn open(
    path: &Path,
    beside: &[(PathBuf, Metadata)],
) -> Result<SqliteConnection, sqlx::Error> {
    SqliteConnectOptions::new()
        .filename(path)
        .read_only(true)
        .immutable(beside.is_empty())
        .busy_timeout(Duration::from_secs(5))
        .disable_statement_logging()
        .connect()
        .await
}

async fn look(
    connection: &mut SqliteConnection,
    path: &Path,
    findings: &mut Vec<Finding>,
) -> Result<(), sqlx::Error> {
    let shown = path.display().to_string();
    let version: String =
        sqlx::query_scalar("SELECT sqlite_version()").fetch_one(&mut *connection).await?;
    if let Err(error) = check_version(&version) {
        findings.push(finding(
            Severity::Error,
            "sqlite-version",
            error.to_string(),
            "a fault in these versions damages the database when a log is reset at a bad moment",
            "build pulsebus with the SQLite that comes with it (the default)",
        ));
    }
    let tables: Vec<String> =
        sqlx::query_scalar("SELECT name FROM sqlite_schema WHERE type IN ('table', 'view')")
            .fetch_all(&mut *connection)
            .await?;
    if !tables.iter().any(|name| name == MIGRATIONS) {
        let ours = ["events", "log_head", "quarantine", "source_marks", "cursors", "dead_letters"];
        let taken: Vec<&str> =
            tables.iter().map(String::as_str).filter(|name| ours.contains(name)).collect();
        if taken.is_empty() {
            findings.extend(schema_finding(
                "sqlite-schema",
                &shown,
                &Schema::Behind { at: 0, of: 0 },
            ));
        } else {
            findings.push(finding(
                Severity::Error,
                "sqlite-schema",
                format!("{shown} has tables of another program: {}", taken.join(", ")),
                "pulsebus needs these names for its own tables, and does not start",
                "set store.url to a file of its own",
            ));
        }
        return Ok(());
    }
    let sql = format!("SELECT version, success, checksum FROM {MIGRATIONS} ORDER BY version");
    let rows = sqlx::query(AssertSqlSafe(sql)).fetch_all(&mut *connection).await?;
    let step = |row: &SqliteRow| {
        let (version, success) = (row.try_get(0)?, row.try_get(1)?);
        Ok::<_, sqlx::Error>(Applied { version, success, checksum: row.try_get(2)? })
    };
    let applied = rows.iter().map(step).collect::<Result<Vec<_>, _>>()?;
    let judged = schema::judge(&migrator(), &applied);
    findings.extend(schema_finding("sqlite-schema", &shown, &judged));
    if !matches!(judged, Schema::Current) {
        return Ok(());
    }
    let (head, last, beyond): (i64, Option<i64>, Option<String>) = sqlx::query_as(
        "SELECT h.position, (SELECT max(position) FROM events),
             (SELECT group_concat(c.handler || ' (' || c.position || ')', ', ')
              FROM cursors AS c WHERE c.position > h.position)
         FROM log_head AS h",
    )
    .fetch_one(&mut *connection)
    .await?;
    findings.extend(log(head, last, beyond.as_deref()));
    Ok(())
}

/// Reads the whole file, as far as time allows.
async fn check(connection: &mut SqliteConnection, path: &Path) -> Option<Finding> {
    let checking = sqlx::query_scalar("PRAGMA quick_check(1)").fetch_one(connection);
    let said: Result<String, _> = tokio::time::timeout(PATIENCE, checking).await.ok()?;
    match said {
        Ok(said) if said == "ok" => None,
        Ok(said) => Some(unusable(path, &said)),
        Err(error) => Some(unusable(path, &error.to_string())),
    }
}

fn unreadable(path: &Path, error: &io::Error) -> Finding {
    finding(
        Severity::Error,
        "sqlite-file",
        format!("{} cannot be read: {error}", path.display()),
        "the daemon cannot read it either, if it runs as this user",
        "chown it and its folder to the user pulsebus runs as; if that is another than doctor's, \
         run doctor as that one",
    )
}

fn unusable(path: &Path, reason: &str) -> Finding {
    finding(
        Severity::Error,
        "sqlite-damaged",
        format!("{} cannot be used: {reason}", path.display()),
        "events may be lost; the daemon refuses to append to a damaged file",
        "stop the daemon, keep a copy of the file with those named -wal and -shm beside it, and \
         restore a backup; if the file is only locked by another program, end that",
    )
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{
        EventStore as _,
        sqlite::{SqliteOptions, SqliteStore},
    };

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    async fn checks(path: &Path) -> Vec<(&'static str, Severity)> {
        examine(path).await.into_iter().map(|f| (f.check, f.severity)).collect()
    }

    /// Runs a statement, as a person with another program would.
    async fn execute(path: &Path, sql: &'static str) {
        let options = SqliteConnectOptions::new().filename(path).create_if_missing(true);
        let mut connection = options.connect().await.unwrap();
        sqlx::raw_sql(sql).execute(&mut connection).await.unwrap();
        connection.close().await.unwrap();
    }

    #[tokio::test]
    async fn a_store_has_no_findings_open_or_closed_and_is_not_touched() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("events.db");
        assert_eq!(checks(&path).await, [("sqlite-schema", Severity::Note)]);
        assert_eq!(names(folder.path()), Vec::<String>::new(), "no file is made");

        let store = SqliteStore::open(SqliteOptions::new(&path)).await.unwrap();
        assert_eq!(checks(&path).await, []);
        store.close().await;
        let before = (names(folder.path()), fs::read(&path).unwrap());
        assert_eq!(before.0, ["events.db"]);
        assert_eq!(checks(&path).await, []);
        assert_eq!((names(folder.path()), fs::read(&path).unwrap()), before);
    }

    #[tokio::test]
    async fn what_is_no_store_of_ours_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("events.db");
        fs::write(&path, "no database, but long enough to be one").unwrap();
        assert_eq!(checks(&path).await, [("sqlite-file", Severity::Error)]);
        fs::remove_file(&path).unwrap();
        execute(&path.with_extension("other"), "CREATE TABLE x (y)").await;
        let other = path.with_extension("other");
        assert!(checks(&other).await.contains(&("sqlite-schema", Severity::Note)));
        execute(&other, "CREATE TABLE events (y)").await;
        assert!(checks(&other).await.contains(&("sqlite-schema", Severity::Error)));
    }

    #[tokio::test]
    async fn a_log_that_lost_its_end_and_a_damaged_file_are_told() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("events.db");
        SqliteStore::open(SqliteOptions::new(&path)).await.unwrap().close().await;
        execute(&path, "INSERT INTO cursors (handler, position, updated_at) VALUES ('x', 9, 0)")
            .await;
        assert_eq!(checks(&path).await, [("store-cursor", Severity::Error)]);
        execute(&path, "UPDATE log_head SET position = 9").await;
        assert_eq!(checks(&path).await, []);
        // All but the first page.
        let mut bytes = fs::read(&path).unwrap();
        bytes[4_096..].fill(0xa5);
        fs::write(&path, bytes).unwrap();
        assert!(checks(&path).await.contains(&("sqlite-damaged", Severity::Error)));
    }

    #[test]
    fn a_log_that_is_not_cut_back_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("events.db");
        let wal = folder.path().join("events.db-wal");
        // Sparse: it takes no space.
        File::create(&wal).unwrap().set_len(LARGE_LOG).unwrap();
        assert_eq!(log_size(&beside(&path)), None);
        File::create(&wal).unwrap().set_len(LARGE_LOG + 1).unwrap();
        assert_eq!(log_size(&beside(&path)).unwrap().check, "sqlite-wal-size");
    }
}
