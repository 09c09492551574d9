//! `pulsebus doctor`: set-ups that are wrong, made with real files and servers, are found, and
//! what each finding says to do helps; set-ups that are right have no findings, and nothing is
//! changed by looking.

mod postgres;
mod targets;

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use serde_json::Value;
use sqlx::{ConnectOptions as _, Connection as _, sqlite::SqliteConnectOptions};
use tokio::task::spawn_blocking;

use crate::support::{
    daemon::{BINARY, Daemon, http},
    free_port,
    process::{folder, is_root},
};

/// What doctor said.
#[derive(Debug)]
struct Said {
    code: i32,
    findings: Vec<Finding>,
    examined: Vec<String>,
    error: String,
}

#[derive(Debug, Clone, PartialEq, Eq, serde::Deserialize)]
struct Finding {
    severity: String,
    subject: String,
    check: String,
    what: String,
    why: String,
    mend: String,
}

/// Checks about the machine that the tests run on, and not about what they set up.
const OF_THIS_MACHINE: [&str; 4] =
    ["machine-root", "machine-disk", "machine-filesystem", "machine-memory"];

impl Said {
    /// The checks that found something in what a test has set up, in order.
    fn checks(&self) -> Vec<&str> {
        let checks = self.findings.iter().map(|finding| finding.check.as_str());
        checks.filter(|check| !OF_THIS_MACHINE.contains(check)).collect()
    }

    /// The finding of this check, which must be this bad and say everything there is to say.
    fn the(&self, severity: &str, check: &str) -> &Finding {
        let mut found = self.findings.iter().filter(|finding| finding.check == check);
        let finding = found.next().unwrap_or_else(|| panic!("no {check} in {self:#?}"));
        assert_eq!(found.next(), None, "{check} twice");
        assert_eq!(finding.severity, severity, "{finding:?}");
        for text in [&finding.subject, &finding.what, &finding.why, &finding.mend] {
            assert!(!text.is_empty(), "{finding:?}");
        }
        finding
    }

    fn has(&self, check: &str) -> bool {
        self.findings.iter().any(|finding| finding.check == check)
    }
}

/// A configuration file, which nobody listens for, and whose data nobody has made yet.
struct Setup {
    folder: PathBuf,
    config: PathBuf,
}

impl Setup {
    fn new(config: &str) -> Self {
        let folder = folder("doctor");
        let setup = Self { config: folder.join("pulsebus.toml"), folder };
        setup.write(config);
        setup
    }

    /// Writes the configuration, which begins in `[http]`.
    fn write(&self, config: &str) {
        let text = format!(
            "data_dir = \"{}\"\n[http]\nlisten = \"127.0.0.1:{}\"\nmax_connections = 100\n{config}",
            self.folder.join("data").display(),
            free_port()
        );
        fs::write(&self.config, text).unwrap();
    }

    async fn doctor(&self) -> Said {
        doctor(&self.config, &[]).await
    }
}

/// Runs doctor with this configuration.
async fn doctor(config: &Path, args: &[&str]) -> Said {
    doctor_under(&[], config, args).await
}

/// The same, as a child of another program: `prlimit`, `unshare`.
async fn doctor_under(under: &[&str], config: &Path, args: &[&str]) -> Said {
    let mut words: Vec<String> = under.iter().map(|&word| word.to_owned()).collect();
    words.extend([BINARY, "doctor", "--json", "--config"].map(str::to_owned));
    words.push(config.display().to_string());
    words.extend(args.iter().map(|&arg| arg.to_owned()));
    let mut command = Command::new(&words[0]);
    command
        .args(&words[1..])
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap_or_default())
        .stdin(Stdio::null());
    let output = spawn_blocking(move || command.output()).await.unwrap().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (out, error) = (text(&output.stdout), text(&output.stderr));
    let code = output.status.code().unwrap();
    let answer: Value = serde_json::from_str(&out).unwrap_or_default();
    if !answer.is_null() {
        assert_eq!(answer["ok"], code == 0, "{answer}");
    }
    let list = |name: &str| answer[name].as_array().cloned().unwrap_or_default();
    let findings = list("findings").into_iter().map(|f| serde_json::from_value(f).unwrap());
    let examined = list("examined").into_iter().map(|s| s.as_str().unwrap().to_owned());
    Said { code, findings: findings.collect(), examined: examined.collect(), error }
}

async fn post(daemon: &Daemon, event: Value) {
    let answer = http().post(daemon.url("/v1/events")).json(&event).send().await.unwrap();
    assert!(answer.status().is_success(), "{answer:?}");
}

/// Every file in a folder, and what is in it.
fn contents(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.insert(path.clone(), Vec::new());
            found.append(&mut contents(&path));
        } else {
            let bytes = fs::read(&path).unwrap();
            found.insert(path, bytes);
        }
    }
    found
}

async fn sqlite(path: &Path, sql: &'static str) {
    let mut connection = SqliteConnectOptions::new().filename(path).connect().await.unwrap();
    sqlx::raw_sql(sql).execute(&mut connection).await.unwrap();
    connection.close().await.unwrap();
}

fn lesson(id: &str) -> Value {
    serde_json::json!({ "type": "LessonPublished", "id": id, "data": {
        "lesson_id": id, "title": "Fractions", "author_id": "a", "published_at": 1 } })
}

#[tokio::test]
async fn the_default_setup_has_no_findings_running_and_stopped_and_is_not_changed() {
    let daemon = Daemon::start("max_connections = 100").await;
    daemon.ready().await;
    post(&daemon, lesson("1")).await;
    let config = daemon.folder.join("pulsebus.toml");
    let said = doctor(&config, &["--strict"]).await;
    assert_eq!(said.checks(), [""; 0], "{said:#?}");
    assert_eq!(said.examined, ["system", "store", "handler:search", "daemon"]);
    assert_eq!(said.has("machine-root"), is_root());

    assert_eq!(daemon.terminate().await.code(), Some(0));
    let before = contents(&daemon.folder);
    let said = doctor(&config, &[]).await;
    assert_eq!(said.checks(), ["daemon-absent"], "{said:#?}");
    assert_eq!(said.code, 0);
    assert!(contents(&daemon.folder) == before, "doctor has changed a file");
}

#[tokio::test]
async fn before_the_first_start_there_are_notes_and_doctor_makes_nothing() {
    let setup = Setup::new("");
    let said = setup.doctor().await;
    assert_eq!(said.code, 0);
    assert_eq!(said.the("note", "sqlite-schema").subject, "store");
    assert_eq!(said.checks(), ["sqlite-schema", "daemon-absent"]);
    assert!(!setup.folder.join("data").exists());
}

#[tokio::test]
async fn exit_codes_tell_errors_warnings_and_a_bad_configuration_apart() {
    let setup = Setup::new("[store]\nurl = \"memory:\"");
    let said = setup.doctor().await;
    assert_eq!(said.the("warning", "store-memory").subject, "store");
    assert_eq!(said.code, 0);
    assert_eq!(doctor(&setup.config, &["--strict"]).await.code, 1);
    let bad = doctor(&setup.config, &["--set", "http.listn=1"]).await;
    assert_eq!(bad.code, 78);
    assert!(bad.error.contains("http.listn"), "{}", bad.error);
    // Errors come first, and fail without --strict.
    fs::create_dir(setup.folder.join("data")).unwrap();
    setup.write("[store]\nurl = \"sqlite:events.db\"");
    fs::write(setup.folder.join("data/events.db"), "this is no database at all").unwrap();
    let said = setup.doctor().await;
    said.the("error", "sqlite-file");
    assert_eq!((said.code, &*said.findings[0].check), (1, "sqlite-file"));
}

#[tokio::test]
async fn a_newer_schema_and_a_cursor_beyond_the_log_are_errors() {
    let daemon = Daemon::start("max_connections = 100").await;
    daemon.ready().await;
    post(&daemon, lesson("1")).await;
    daemon.terminate().await;
    let config = daemon.folder.join("pulsebus.toml");
    sqlite(
        &daemon.database(),
        "INSERT INTO cursors (handler, position, updated_at) VALUES ('mine', 9, 0)",
    )
    .await;
    let said = doctor(&config, &[]).await;
    let finding = said.the("error", "store-cursor");
    assert!(finding.what.contains("mine (9)"), "{finding:?}");
    assert_eq!(said.code, 1);
    sqlite(&daemon.database(), "DELETE FROM cursors WHERE handler = 'mine'").await;
    assert!(!doctor(&config, &[]).await.has("store-cursor"));

    sqlite(
        &daemon.database(),
        "INSERT INTO pulsebus_migrations (version, description, success, checksum, execution_time)
         VALUES (99, 'later', true, x'00', 0)",
    )
    .await;
    let said = doctor(&config, &[]).await;
    let finding = said.the("error", "sqlite-schema");
    assert!(finding.what.contains("99"), "{finding:?}");
    assert_eq!(said.code, 1);
}

#[tokio::test]
async fn a_secret_that_everybody_can_read_is_a_warning_until_it_is_mended() {
    let setup = Setup::new("");
    let token = setup.folder.join("token");
    fs::write(&token, "s3cret").unwrap();
    let mode = |mode| fs::set_permissions(&token, fs::Permissions::from_mode(mode)).unwrap();
    setup.write(&format!("token_file = \"{}\"", token.display()));
    mode(0o644);
    let said = setup.doctor().await;
    let finding = said.the("warning", "machine-secret").clone();
    assert!(finding.what.contains(token.to_str().unwrap()), "{finding:?}");
    assert!(!format!("{said:?}").contains("s3cret"));
    let mend = format!("chmod o= {}", token.display());
    assert!(finding.mend.contains(&mend), "{finding:?}");
    assert!(Command::new("sh").args(["-c", &mend]).status().unwrap().success());
    assert!(!setup.doctor().await.has("machine-secret"));
}

#[tokio::test]
async fn too_few_descriptors_are_told() {
    let setup = Setup::new("");
    let limited = async |limit: u32| {
        doctor_under(&["prlimit", &format!("--nofile={limit}:{limit}")], &setup.config, &[]).await
    };
    // 64 of its own, 15 of SQLite, 4 of the source, 128 of the index; 100 clients.
    let said = limited(200).await;
    assert_eq!((said.the("error", "machine-files").subject.as_str(), said.code), ("system", 1));
    let said = limited(300).await;
    assert!(said.the("warning", "machine-files").what.contains("300"));
    assert!(!limited(400).await.has("machine-files"));
}

#[tokio::test]
async fn bounds_that_do_not_fit_into_memory_are_told() {
    let setup = Setup::new("");
    let most = ["--set", "limits.tail_bytes=64GiB", "--set", "limits.ingest_bytes=64GiB"];
    let said = doctor(&setup.config, &most).await;
    let text = fs::read_to_string("/proc/meminfo").unwrap();
    let total: u64 = text.split_whitespace().nth(1).unwrap().parse().unwrap();
    if total >= 128 << 20 {
        return eprintln!("this machine has more memory than can be asked for: not tried");
    }
    said.the("warning", "machine-memory");
    assert_eq!(said.code, 0);
}

#[tokio::test]
async fn a_data_folder_that_cannot_be_used_is_an_error() {
    let setup = Setup::new("");
    fs::write(setup.folder.join("data"), "a file").unwrap();
    assert!(setup.doctor().await.the("error", "machine-data-dir").what.contains("no folder"));
    fs::remove_file(setup.folder.join("data")).unwrap();
    if !is_root() {
        return eprintln!("not root: another user's folder is not tried");
    }
    // As somebody who may not write there.
    let nobody = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"];
    let said = doctor_under(&nobody, &setup.config, &[]).await;
    assert_eq!(said.the("error", "machine-data-dir").subject, "system");
    assert!(!said.has("machine-root"));
    fs::create_dir(setup.folder.join("data")).unwrap();
    let finding = doctor_under(&nobody, &setup.config, &[]).await;
    assert!(finding.the("error", "machine-data-dir").what.contains("not writable"));
    let data = setup.folder.join("data");
    assert!(Command::new("chown").arg("65534").arg(data).status().unwrap().success());
    assert!(!doctor_under(&nobody, &setup.config, &[]).await.has("machine-data-dir"));
}

/// A file that root has left beside the database, as after `sudo sqlite3 events.db`.
#[tokio::test]
async fn a_log_file_of_another_user_is_an_error() {
    if !is_root() {
        return eprintln!("not root: files of other users cannot be made");
    }
    let daemon = Daemon::start("max_connections = 100").await;
    daemon.ready().await;
    daemon.kill();
    let mut wal = daemon.database().into_os_string();
    wal.push("-wal");
    assert!(Command::new("chown").arg("65534").arg(&wal).status().unwrap().success());
    let said = doctor(&daemon.folder.join("pulsebus.toml"), &[]).await;
    assert!(said.the("error", "sqlite-owner").mend.contains("chown"), "{said:?}");
}

/// On a file system of its own, small and in memory, which only doctor sees.
#[tokio::test]
async fn a_small_disk_in_memory_is_an_error() {
    let setup = Setup::new("");
    let data = setup.folder.join("data");
    fs::create_dir(&data).unwrap();
    let script = format!("mount -t tmpfs -o size=64m tmpfs '{}' && exec \"$@\"", data.display());
    let may = Command::new("unshare")
        .args(["-rm", "sh", "-c", &script, "sh", "true"])
        .stderr(Stdio::null())
        .status();
    if !may.is_ok_and(|status| status.success()) {
        return eprintln!("no file system can be mounted here: a full disk is not tried");
    }
    let under = ["unshare", "-rm", "sh", "-c", &script, "sh"];
    let said = doctor_under(&under, &setup.config, &[]).await;
    let errors: Vec<_> = said
        .findings
        .iter()
        .filter(|f| f.severity == "error")
        .map(|f| (f.check.as_str(), f.what.contains(data.to_str().unwrap())))
        .collect();
    assert_eq!(errors, [("machine-filesystem", true), ("machine-disk", true)], "{said:#?}");
    assert_eq!(said.code, 1);
}
