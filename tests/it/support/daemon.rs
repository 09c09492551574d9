//! The real binary, as a child that a test may kill.

use std::{
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Output, Stdio},
    sync::Mutex,
    time::{Duration, Instant},
};

use serde_json::Value;

use super::{PATIENCE, process, wait_until};

/// The binary.
pub(crate) const BINARY: &str = env!("CARGO_BIN_EXE_pulsebus");

/// An HTTP client that is not ours.
pub(crate) fn http() -> reqwest::Client {
    // As `main` does; the second test of a process finds it installed.
    let _ = rustls::crypto::ring::default_provider().install_default();
    reqwest::Client::builder().no_proxy().timeout(PATIENCE).build().unwrap()
}

/// Runs a command of the binary to its end.
pub(crate) async fn pulsebus(build: impl FnOnce(&mut Command)) -> Output {
    let mut command = Command::new(BINARY);
    clean(&mut command);
    command.stdin(Stdio::null());
    build(&mut command);
    tokio::task::spawn_blocking(move || command.output()).await.unwrap().unwrap()
}

/// Without what the environment of whoever runs the tests says.
fn clean(command: &mut Command) {
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("PULSEBUS_") {
            command.env_remove(name);
        }
    }
    command.env_remove("STATE_DIRECTORY").env_remove("CREDENTIALS_DIRECTORY");
}

/// A running `pulsebus run`; killed when dropped.
pub(crate) struct Daemon {
    pub(crate) folder: PathBuf,
    port: u16,
    child: Mutex<Option<Child>>,
    client: reqwest::Client,
}

impl Daemon {
    /// Starts it with this configuration, to which `data_dir` and `http.listen` are added, and
    /// waits until it answers.
    pub(crate) async fn start(config: &str) -> Self {
        Self::start_on(process::free_port(), config).await
    }

    /// The same, on a port that somebody knows already.
    pub(crate) async fn start_on(port: u16, config: &str) -> Self {
        let daemon = Self::not_started(port, config);
        daemon.restart().await;
        daemon
    }

    /// Configured and not started, for a test that puts something into its folder first.
    pub(crate) fn stopped(config: &str) -> Self {
        Self::not_started(process::free_port(), config)
    }

    /// Everything it needs, and nobody has started it.
    pub(crate) fn not_started(port: u16, config: &str) -> Self {
        let folder = process::folder("daemon");
        let daemon = Self { folder, port, child: Mutex::new(None), client: http() };
        daemon.configure(config);
        daemon
    }

    /// Writes another configuration, to which the same is added.
    pub(crate) fn configure(&self, config: &str) {
        let config = format!(
            "data_dir = \"{}\"\n[http]\nlisten = \"127.0.0.1:{}\"\n{config}",
            self.folder.join("data").display(),
            self.port
        );
        std::fs::write(self.folder.join("pulsebus.toml"), config).unwrap();
    }

    /// Starts it again, with the same configuration and data.
    pub(crate) async fn restart(&self) {
        self.launch(|_| {});
        self.up().await;
    }

    /// Starts it and does not wait.
    pub(crate) fn launch(&self, build: impl FnOnce(&mut Command)) {
        let log = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.folder.join("log"))
            .unwrap();
        let child = process::spawn(Path::new(BINARY), |command| {
            clean(command);
            command
                .arg("--config")
                .arg(self.folder.join("pulsebus.toml"))
                .env("RUST_BACKTRACE", "0")
                .stdout(log.try_clone().unwrap())
                .stderr(log);
            build(command);
        });
        *self.child.lock().unwrap() = Some(child);
    }

    /// Waits until it answers.
    pub(crate) async fn up(&self) {
        let deadline = Instant::now() + Duration::from_secs(60);
        // Before its bus is up it answers for its health only; 401: it is up, and wants a token.
        let up = |answer: &Value| !answer["sources"].is_null() || answer["status"] == 401;
        while !self.json("/v1/sources").await.is_some_and(|answer| up(&answer)) {
            let ended = self.child.lock().unwrap().as_mut().unwrap().try_wait().unwrap();
            assert!(ended.is_none(), "it ended with {ended:?}: {}", self.log());
            assert!(Instant::now() < deadline, "it is not up: {}", self.log());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// `kill -9`.
    pub(crate) fn kill(&self) {
        if let Some(mut child) = self.child.lock().unwrap().take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Sends it a signal by name.
    pub(crate) fn signal(&self, name: &str) {
        process::signal(self.child.lock().unwrap().as_ref().unwrap(), name);
    }

    /// Whether it has not ended.
    pub(crate) fn lives(&self) -> bool {
        self.child.lock().unwrap().as_mut().unwrap().try_wait().unwrap().is_none()
    }

    /// SIGTERM, and waits for its end.
    pub(crate) async fn terminate(&self) -> ExitStatus {
        let mut child = self.child.lock().unwrap().take().unwrap();
        process::signal(&child, "TERM");
        tokio::task::spawn_blocking(move || child.wait().unwrap()).await.unwrap()
    }

    pub(crate) fn url(&self, path: &str) -> String {
        format!("http://127.0.0.1:{}{path}", self.port)
    }

    /// The answer's body, whatever its status; `None` while nobody answers.
    pub(crate) async fn get(&self, path: &str) -> Option<String> {
        self.client.get(self.url(path)).send().await.ok()?.text().await.ok()
    }

    pub(crate) async fn json(&self, path: &str) -> Option<Value> {
        serde_json::from_str(&self.get(path).await?).ok()
    }

    /// The last position in the log; 0 while it is empty or nobody answers.
    pub(crate) async fn head(&self) -> u64 {
        /// Only what is asked for: not every body is a value that serde can hold (`1e400`).
        #[derive(serde::Deserialize)]
        struct Page {
            events: Vec<Row>,
        }
        #[derive(serde::Deserialize)]
        struct Row {
            position: u64,
        }
        let Some(text) = self.get("/v1/events?order=desc&limit=1").await else { return 0 };
        let page: Option<Page> = serde_json::from_str(&text).ok();
        page.and_then(|page| page.events.first().map(|row| row.position)).unwrap_or(0)
    }

    /// The position of a handler; 0 while nobody answers.
    pub(crate) async fn handler(&self, name: &str) -> u64 {
        let handler = self.json(&format!("/v1/handlers/{name}")).await;
        handler.and_then(|handler| handler["position"].as_u64()).unwrap_or(0)
    }

    /// Waits until every part of it is ready.
    pub(crate) async fn ready(&self) {
        wait_until("the daemon is ready", async || {
            let answer = self.client.get(self.url("/readyz")).send().await.ok()?;
            answer.status().is_success().then_some(())
        })
        .await;
    }

    /// `127.0.0.1:PORT`.
    pub(crate) fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// The SQLite file, where the configuration names no other store.
    pub(crate) fn database(&self) -> PathBuf {
        self.folder.join("data/events.db")
    }

    /// Resident memory, in bytes.
    pub(crate) fn resident(&self) -> u64 {
        let pid = self.child.lock().unwrap().as_ref().unwrap().id();
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().trim_end_matches(" kB").trim().parse::<u64>().unwrap() * 1024
    }

    /// Its log so far.
    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.folder.join("log")).unwrap_or_default()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.kill();
    }
}
