//! The notify protocol (sd_notify(3)), spoken with the real binary over a real socket.

use std::{
    fs,
    os::unix::process::ExitStatusExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use serde_json::json;
use tokio::{net::UnixDatagram, time::timeout};

use crate::support::{
    PATIENCE,
    daemon::{BINARY, http},
    free_port,
    nats::NatsServer,
    process::{self, signal},
    wait_until,
};

/// What a loop may stand still, and systemd waits for a word.
const WATCHDOG: Duration = Duration::from_secs(4);

/// A daemon whose systemd is the test; killed when dropped.
struct Unit {
    child: Child,
    socket: UnixDatagram,
    port: u16,
    folder: PathBuf,
    /// Every assignment so far, with when it came.
    said: Vec<(Instant, String)>,
    client: reqwest::Client,
}

impl Unit {
    fn start(config: &str) -> Self {
        Self::start_with(config, |_, command| {
            command.stdout(Stdio::null()).stderr(Stdio::null());
        })
    }

    fn start_with(config: &str, build: impl FnOnce(&Path, &mut Command)) -> Self {
        let (folder, port) = (process::folder("unit"), free_port());
        let config = format!(
            "data_dir = \"{}\"\n{config}\n[http]\nlisten = \"127.0.0.1:{port}\"\n",
            folder.join("data").display()
        );
        fs::write(folder.join("pulsebus.toml"), config).unwrap();
        let socket = UnixDatagram::bind(folder.join("notify")).unwrap();
        let child = process::spawn(Path::new(BINARY), |command| {
            command
                .arg("--config")
                .arg(folder.join("pulsebus.toml"))
                .env("NOTIFY_SOCKET", folder.join("notify"))
                .env("WATCHDOG_USEC", WATCHDOG.as_micros().to_string());
            build(&folder, command);
        });
        Self { child, socket, port, folder, said: Vec::new(), client: http() }
    }

    /// The next datagram: assignments, one a line.
    async fn hear(&mut self) -> Vec<String> {
        let mut buffer = [0; 4096];
        let length = timeout(PATIENCE, self.socket.recv(&mut buffer)).await.unwrap().unwrap();
        let text = String::from_utf8(buffer[..length].to_vec()).unwrap();
        let lines: Vec<String> = text.lines().map(str::to_owned).collect();
        let now = Instant::now();
        self.said.extend(lines.iter().map(|line| (now, line.clone())));
        lines
    }

    /// Hears until an assignment passes.
    async fn hears(&mut self, what: &str, pass: impl Fn(&str) -> bool) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            assert!(Instant::now() < deadline, "{what} was not said: {:?}", self.said);
            if let Some(line) = self.hear().await.into_iter().find(|line| pass(line)) {
                return line;
            }
        }
    }

    /// Hears so much for so long.
    async fn listen(&mut self, time: Duration) -> Vec<String> {
        let (mut heard, until) = (Vec::new(), tokio::time::Instant::now() + time);
        while let Ok(lines) = tokio::time::timeout_at(until, self.hear()).await {
            heard.extend(lines);
        }
        heard
    }

    /// How often something was said.
    fn count(&self, line: &str) -> usize {
        self.said.iter().filter(|(_, said)| said == line).count()
    }

    /// The longest time between two words for the watchdog.
    fn longest_silence(&self) -> Duration {
        let fed = |(at, line): &(Instant, String)| (line == "WATCHDOG=1").then_some(*at);
        let fed: Vec<Instant> = self.said.iter().filter_map(fed).collect();
        fed.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap_or_default()
    }

    fn url(&self, path: &str) -> String {
        format!("http://127.0.0.1:{}{path}", self.port)
    }

    /// Posts so many events of the type `T`, each with its own key.
    async fn post(&self, from: usize, count: usize) -> reqwest::Result<reqwest::Response> {
        let events: Vec<_> = (from..from + count)
            .map(
                |n| json!({"id": format!("e{n}"), "key": format!("k{n}"), "type": "T", "data": {}}),
            )
            .collect();
        let post = self.client.post(self.url("/v1/events")).json(&events);
        post.send().await?.error_for_status()
    }

    async fn ends(mut self) -> ExitStatus {
        wait_until("it ends", async || self.child.try_wait().unwrap()).await
    }
}

impl Drop for Unit {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn is_status(line: &str, text: &str) -> bool {
    line.strip_prefix("STATUS=").is_some_and(|status| status.contains(text))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn G8_ready_once_and_only_when_consuming_and_fed_while_brokers_and_targets_are_away() {
    let mut broker = NatsServer::start();
    broker.kill();
    let mut unit = Unit::start(&format!(
        r#"
[transports.nats]
kind = "nats"
url = "{}"
[transports.gone]
kind = "http"
url = "http://127.0.0.1:{}/"
secret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
[sources.lessons]
transport = "nats"
stream = "S"
create = {{ subjects = ["s.>"] }}
consumer = "c"
[handlers.to-gone]
kind = "forward"
transport = "gone"
"#,
        broker.url(),
        free_port()
    ));
    unit.hears("what it waits for", |line| is_status(line, "waiting for source:lessons")).await;
    unit.post(0, 1).await.unwrap();
    // Not ready, more time asked for, and in good health; for longer than the watchdog waits.
    let heard = unit.listen(2 * WATCHDOG).await;
    let said = |line: &str| heard.iter().any(|heard| heard == line);
    assert!(said("EXTEND_TIMEOUT_USEC=30000000") && said("WATCHDOG=1"), "{heard:?}");
    assert_eq!(unit.count("READY=1"), 0, "{:?}", unit.said);
    assert!(!unit.said.iter().any(|(_, line)| line == "STATUS=consuming"), "{:?}", unit.said);

    broker.restart();
    unit.hears("readiness", |line| line == "READY=1").await;
    let extended = unit.count("EXTEND_TIMEOUT_USEC=30000000");
    // The target is away: it works, and says what waits.
    unit.hears("the target", |line| {
        is_status(line, "handler:to-gone unavailable") && !is_status(line, "source:lessons")
    })
    .await;

    broker.kill();
    unit.hears("that it is away", |line| is_status(line, "source:lessons reconnecting")).await;
    let heard = unit.listen(3 * WATCHDOG).await;
    assert!(!heard.iter().any(|line| is_status(line, "stuck")), "{heard:?}");
    broker.restart();
    unit.hears("that it is back", |line| {
        is_status(line, "handler:to-gone") && !is_status(line, "source:lessons")
    })
    .await;
    assert_eq!(unit.count("READY=1"), 1);
    assert_eq!(unit.count("EXTEND_TIMEOUT_USEC=30000000"), extended, "more time after it was up");
    assert!(unit.longest_silence() < WATCHDOG / 2, "{:?}", unit.longest_silence());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn SIGTERM_drains_within_its_time_and_says_so() {
    let mut unit = Unit::start("shutdown_timeout = \"10s\"\n[handlers.log]\nkind = \"log\"\n");
    unit.hears("readiness", |line| line == "READY=1").await;
    unit.hears("that nothing is waited for", |line| line == "STATUS=consuming").await;
    unit.post(0, 1_000).await.unwrap();
    wait_until("they are handled", async || {
        let handler = unit.client.get(unit.url("/v1/handlers/log")).send().await.ok()?;
        let handler: serde_json::Value = handler.json().await.ok()?;
        (handler["position"] == 1_000).then_some(())
    })
    .await;
    let told = Instant::now();
    signal(&unit.child, "TERM");
    unit.hears("that it stops", |line| line == "STOPPING=1").await;
    assert!(unit.said.iter().any(|(_, line)| line == "STATUS=draining"), "{:?}", unit.said);
    let database = unit.folder.join("data/events.db");
    let status = unit.ends().await;
    assert_eq!((status.code(), status.signal()), (Some(0), None));
    assert!(told.elapsed() < Duration::from_secs(10), "{:?}", told.elapsed());
    // What was handled since the last checkpoint is in a last one.
    assert_eq!(cursor(&database).await, 1_000);
}

/// The cursor of the handler `log`, read from the file of a daemon that has ended.
async fn cursor(database: &Path) -> u64 {
    use pulsebus::store::{
        EventStore as _, ProgressStore as _,
        sqlite::{SqliteOptions, SqliteStore},
    };
    let store = SqliteStore::open(SqliteOptions::new(database)).await.unwrap();
    let cursor = store.cursor("log").await.unwrap();
    store.close().await;
    cursor.unwrap_or_default().0
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_signal_ends_at_once() {
    // A target that takes connections and never answers: the call runs until its timeout.
    let silent = std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let mut unit = Unit::start(&format!(
        r#"
[transports.silent]
kind = "http"
url = "http://{}/"
secret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
[handlers.slow]
kind = "forward"
transport = "silent"
timeout = "50s"
"#,
        silent.local_addr().unwrap()
    ));
    unit.hears("readiness", |line| line == "READY=1").await;
    unit.post(0, 1).await.unwrap();
    tokio::task::spawn_blocking(move || silent.accept().map(std::mem::forget))
        .await
        .unwrap()
        .unwrap();
    signal(&unit.child, "TERM");
    unit.hears("that it stops", |line| line == "STOPPING=1").await;
    // It drains: the call is under way.
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(unit.child.try_wait().unwrap().is_none(), "the first signal did not wait for the call");
    let told = Instant::now();
    signal(&unit.child, "TERM");
    assert_eq!(unit.ends().await.code(), Some(75));
    assert!(told.elapsed() < Duration::from_secs(5), "{:?}", told.elapsed());
}

/// A library that makes every sync of a file hang while another file is there.
fn hanging_sync(folder: &Path) -> PathBuf {
    let (source, library) = (folder.join("hang.c"), folder.join("hang.so"));
    let text = r#"
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>
static void hang(void) {
    const char *file = getenv("HANG_WHILE");
    while (file && access(file, F_OK) == 0) usleep(10000);
}
int fsync(int fd) { hang(); return syscall(SYS_fsync, fd); }
int fdatasync(int fd) { hang(); return syscall(SYS_fdatasync, fd); }
"#;
    fs::write(&source, text).unwrap();
    let built =
        Command::new("cc").args(["-shared", "-fPIC", "-o"]).args([&library, &source]).status();
    assert!(built.unwrap().success());
    library
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn G8_the_watchdog_is_not_fed_while_the_log_writer_is_wedged() {
    let mut unit = Unit::start_with("", |folder, command| {
        command
            .env("LD_PRELOAD", hanging_sync(folder))
            .env("HANG_WHILE", folder.join("hang"))
            .stdout(Stdio::null())
            .stderr(Stdio::null());
    });
    unit.hears("that it consumes", |line| line == "STATUS=consuming").await;
    unit.post(0, 1).await.unwrap();

    // A disk that does not answer.
    fs::write(unit.folder.join("hang"), "").unwrap();
    let post = unit.client.post(unit.url("/v1/events")).json(&json!({"id": "x", "type": "T"}));
    let mut posts = tokio::task::JoinSet::new();
    posts.spawn(async move { post.timeout(Duration::from_secs(50)).send().await });
    unit.hears("what is stuck", |line| is_status(line, "stuck: log")).await;
    let heard = unit.listen(2 * WATCHDOG).await;
    assert!(!heard.iter().any(|line| line == "WATCHDOG=1"), "{heard:?}");
    assert!(unit.longest_silence() < WATCHDOG / 2, "{:?}", unit.longest_silence());

    // It answers: nothing was lost by that, and all is well.
    fs::remove_file(unit.folder.join("hang")).unwrap();
    unit.hears("that all is well", |line| line == "STATUS=consuming").await;
    unit.hears("that it gets on", |line| line == "WATCHDOG=1").await;
    // Its HTTP timeout had passed; its copy finds it committed.
    let _ = posts.join_next().await;
    let again = unit.client.post(unit.url("/v1/events")).json(&json!({"id": "x", "type": "T"}));
    let answer: serde_json::Value = again.send().await.unwrap().json().await.unwrap();
    assert_eq!((&answer["stored"], &answer["duplicates"]), (&json!(0), &json!(1)), "{answer}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn G8_the_watchdog_is_not_fed_while_a_handler_blocks_in_a_pipe_that_nobody_reads() {
    let (mut log, writer) = std::io::pipe().unwrap();
    let config = "[handlers.log]\nkind = \"log\"\ntimeout = \"1s\"\n";
    let mut unit = Unit::start_with(config, |_, command| {
        command.stdout(writer.try_clone().unwrap()).stderr(writer);
    });
    unit.hears("that it consumes", |line| line == "STATUS=consuming").await;
    // A line of the log each: more than a pipe holds.
    for from in (0..4_000).step_by(1_000) {
        let _ = timeout(Duration::from_secs(2), unit.post(from, 1_000)).await;
    }
    let deadline = Instant::now() + PATIENCE;
    while unit.listen(2 * WATCHDOG).await.iter().any(|line| line == "WATCHDOG=1") {
        assert!(Instant::now() < deadline, "it is fed for ever: {:?}", unit.said);
    }
    // Read, it gets on.
    std::thread::spawn(move || std::io::copy(&mut log, &mut std::io::sink()));
    unit.hears("that it gets on", |line| line == "WATCHDOG=1").await;
}
