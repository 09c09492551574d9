//! Private Postgres servers.
//!
//! [`database`] gives a database of its own on a server that the whole test process shares;
//! [`PostgresServer::start`] a server to kill.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

use sqlx::{AssertSqlSafe, Connection as _, PgConnection};
use tokio::sync::OnceCell;

use super::{PATIENCE, free_port, pki::Pair, process, wait_until};

/// A database of a test's own, on the shared server.
#[derive(Debug)]
pub struct Database {
    pub url: String,
}

/// A new, empty database.
pub async fn database() -> Database {
    static SHARED: OnceCell<PostgresServer> = OnceCell::const_new();
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let server = SHARED.get_or_init(PostgresServer::start).await;
    let name = format!("test_{}", NEXT.fetch_add(1, Ordering::Relaxed));
    server.execute(&format!("CREATE DATABASE {name}")).await;
    Database { url: server.database_url(&name) }
}

/// A server of a test's own.
#[derive(Debug)]
pub struct PostgresServer {
    folder: PathBuf,
    port: u16,
    child: Option<Child>,
    /// Further settings, `name=value`.
    settings: Vec<String>,
}

impl PostgresServer {
    /// Starts one.
    pub async fn start() -> Self {
        Self::start_with(|_| Vec::new()).await
    }

    /// One that speaks TLS with this certificate, and lets the role `pulse` in only by a client
    /// certificate of this authority and of that name.
    pub async fn start_tls(pair: &Pair, ca: &Path) -> Self {
        use std::os::unix::fs::PermissionsExt as _;
        let server = Self::start_with(|folder| {
            let copy = |from: &Path, name: &str| {
                let to = folder.join(name);
                fs::copy(from, &to).unwrap();
                fs::set_permissions(&to, fs::Permissions::from_mode(0o600)).unwrap();
                to.display().to_string()
            };
            let hba = folder.join("hba");
            fs::write(
                &hba,
                "hostssl all pulse 127.0.0.1/32 trust clientcert=verify-full\n\
                 host all postgres 127.0.0.1/32 trust\n",
            )
            .unwrap();
            vec![
                "ssl=on".to_owned(),
                format!("ssl_cert_file={}", copy(&pair.cert, "server.pem")),
                format!("ssl_key_file={}", copy(&pair.key, "server.key")),
                format!("ssl_ca_file={}", copy(ca, "ca.pem")),
                format!("hba_file={}", hba.display()),
            ]
        })
        .await;
        server.execute("CREATE ROLE pulse LOGIN SUPERUSER").await;
        server
    }

    /// One that lets the role `pulse` in by password only.
    pub async fn start_with_passwords() -> Self {
        let server = Self::start_with(|folder| {
            let hba = folder.join("hba");
            fs::write(
                &hba,
                "host all pulse 127.0.0.1/32 scram-sha-256\nhost all postgres 127.0.0.1/32 trust\n",
            )
            .unwrap();
            vec![format!("hba_file={}", hba.display())]
        })
        .await;
        server.execute("CREATE ROLE pulse LOGIN SUPERUSER PASSWORD 'one'").await;
        server
    }

    /// One with further settings, `name=value`, on its command line.
    pub async fn start_set(settings: &[&str]) -> Self {
        Self::start_with(|_| settings.iter().map(|&setting| setting.to_owned()).collect()).await
    }

    async fn start_with(prepare: impl FnOnce(&Path) -> Vec<String>) -> Self {
        let template = template().await;
        let folder = process::folder("postgres");
        let copy = folder.join("data");
        let status = Command::new("cp").arg("-a").args([template, &copy]).status().expect("cp");
        assert!(status.success(), "cannot copy the Postgres cluster");
        let settings = prepare(&folder);
        give(&folder);
        let mut server = Self { folder, port: free_port(), child: None, settings };
        server.launch().await;
        server
    }

    /// Of its database `postgres`.
    pub fn url(&self) -> String {
        self.database_url("postgres")
    }

    /// The same for a role.
    pub fn url_of(&self, role: &str) -> String {
        format!("postgres://{role}@127.0.0.1:{}/postgres", self.port)
    }

    fn database_url(&self, name: &str) -> String {
        format!("postgres://postgres@127.0.0.1:{}/{name}", self.port)
    }

    /// SIGKILL: no checkpoint, no goodbye to its clients.
    pub fn kill(&mut self) {
        let mut child = self.child.take().expect("it is running");
        child.kill().expect("SIGKILL");
        child.wait().expect("its end");
    }

    /// Starts it again after a [`kill`](Self::kill), on the same port; it recovers.
    pub async fn restart(&mut self) {
        assert!(self.child.is_none(), "it is running");
        self.launch().await;
    }

    async fn launch(&mut self) {
        let log = self.folder.join("log");
        let settings = self.settings.clone();
        let launch = |folder: &Path, port: u16| {
            let output = fs::File::options().create(true).append(true).open(&log).unwrap();
            process::spawn_as(user(), &binary("postgres"), |command| {
                command.arg("-D").arg(folder.join("data")).arg("-p").arg(port.to_string());
                for setting in [
                    "listen_addresses=127.0.0.1",
                    // No socket file: its path may be too long for one.
                    "unix_socket_directories=",
                    fsync(),
                    "max_connections=200",
                    "shared_buffers=32MB",
                    "logging_collector=off",
                ] {
                    command.arg("-c").arg(setting);
                }
                for setting in &settings {
                    command.arg("-c").arg(setting);
                }
                command.stdout(output.try_clone().unwrap()).stderr(output);
            })
        };
        // After a kill the old backends may hold on for a moment; the server then refuses to
        // start, and a new try is all it takes.
        let deadline = Instant::now() + PATIENCE;
        loop {
            let ended = match &mut self.child {
                Some(child) => child.try_wait().expect("its state").is_some(),
                None => true,
            };
            if ended {
                self.child = Some(launch(&self.folder, self.port));
            }
            if let Ok(connection) = PgConnection::connect(&self.url()).await {
                return connection.close().await.expect("a connection closes");
            }
            if Instant::now() > deadline {
                let said = fs::read_to_string(&log).unwrap_or_default();
                panic!("Postgres does not start within {PATIENCE:?}: {said}");
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// What it has said so far.
    pub fn log(&self) -> String {
        fs::read_to_string(self.folder.join("log")).expect("a log")
    }

    /// Runs a statement.
    pub async fn execute(&self, sql: &str) {
        let mut connection = PgConnection::connect(&self.url()).await.expect("a connection");
        sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut connection).await.expect(sql);
        connection.close().await.expect("a connection closes");
    }
}

impl Drop for PostgresServer {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// A cluster that others are copies of: making one takes seconds, copying it does not.
async fn template() -> &'static Path {
    static TEMPLATE: OnceCell<PathBuf> = OnceCell::const_new();
    TEMPLATE
        .get_or_init(|| async {
            let folder = process::folder("postgres-template");
            give(&folder);
            let data = folder.join("data");
            let log = folder.join("log");
            let output = fs::File::create(&log).unwrap();
            let mut child = process::spawn_as(user(), &binary("initdb"), |command| {
                command.args(["-A", "trust", "-U", "postgres", "-E", "UTF8", "--locale", "C"]);
                command.args(["--no-sync", "-D"]).arg(&data);
                command.stdout(output.try_clone().unwrap()).stderr(output);
            });
            let status =
                wait_until("initdb is done", async || child.try_wait().expect("its state")).await;
            let said = fs::read_to_string(&log).unwrap_or_default();
            assert!(status.success(), "initdb failed: {said}");
            data
        })
        .await
}

/// A killed process loses nothing that the kernel has; only a power cut would. The benchmark
/// wants the real cost.
fn fsync() -> &'static str {
    match std::env::var("TEST_PULSEBUS_FSYNC") {
        Ok(on) if on == "on" => "fsync=on",
        _ => "fsync=off",
    }
}

/// Postgres refuses to run as root.
fn user() -> Option<&'static str> {
    process::is_root().then(|| if has_user("postgres") { "postgres" } else { "nobody" })
}

fn has_user(name: &str) -> bool {
    let id = Command::new("id").arg(name).stdout(Stdio::null()).stderr(Stdio::null()).status();
    id.is_ok_and(|status| status.success())
}

/// Gives a folder, and what is in it, to the user the server runs as.
fn give(folder: &Path) {
    if let Some(user) = user() {
        let status = Command::new("chown").arg("-R").arg(user).arg(folder).status().expect("chown");
        assert!(status.success(), "cannot give {} to {user}", folder.display());
    }
}

/// A program of the server, which distributions keep out of `PATH`.
fn binary(name: &str) -> PathBuf {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut folders: Vec<PathBuf> = std::env::split_paths(&path).collect();
    if let Ok(versions) = fs::read_dir("/usr/lib/postgresql") {
        let mut versions: Vec<_> = versions.flatten().map(|v| v.path().join("bin")).collect();
        versions.sort();
        folders.extend(versions.into_iter().rev());
    }
    folders
        .into_iter()
        .map(|folder| folder.join(name))
        .find(|path| path.is_file())
        .unwrap_or_else(|| panic!("{name} is neither in PATH nor in /usr/lib/postgresql/*/bin"))
}
