//! Private RabbitMQ nodes: one that the tests of this process share, each in a virtual host of
//! its own, and others that a test may kill, stop and starve.

use std::{
    fs,
    net::{SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command},
    sync::{
        Mutex, OnceLock,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use tokio::{sync::OnceCell, task::spawn_blocking};

use super::process::{self, folder, free_port, signal};

/// A node boots in 6 to 8 s on an idle machine.
const BOOT: Duration = Duration::from_secs(120);

/// A virtual host of the shared node, empty.
pub(crate) struct Vhost {
    pub(crate) name: String,
    pub(crate) uri: String,
    pub(crate) address: SocketAddr,
}

impl Vhost {
    /// The same by way of another port.
    pub(crate) fn uri_through(&self, port: u16) -> String {
        format!("amqp://guest:guest@127.0.0.1:{port}/{}", self.name)
    }
}

/// A fresh virtual host of the node that this process shares.
pub(crate) async fn vhost() -> Vhost {
    shared().await.vhost().await
}

/// The node that this process shares: not to be killed or stopped.
pub(crate) async fn shared() -> &'static RabbitNode {
    static SHARED: OnceCell<RabbitNode> = OnceCell::const_new();
    SHARED.get_or_init(RabbitNode::start).await
}

/// A node. Ends when it is dropped, and with this process.
pub(crate) struct RabbitNode {
    site: Site,
    process: Mutex<Child>,
}

impl RabbitNode {
    pub(crate) async fn start() -> Self {
        Self::start_with(String::new(), "").await
    }

    /// With further lines of `rabbitmq.conf`, and plugins (`a, b`).
    pub(crate) async fn start_with(conf: String, plugins: &'static str) -> Self {
        spawn_blocking(move || {
            let site = Site::new(&conf, plugins);
            let process = site.boot();
            Self { site, process: Mutex::new(process) }
        })
        .await
        .unwrap()
    }

    pub(crate) fn address(&self) -> SocketAddr {
        ([127, 0, 0, 1], self.site.port).into()
    }

    /// The default virtual host.
    pub(crate) fn uri(&self) -> String {
        format!("amqp://guest:guest@127.0.0.1:{}/%2f", self.site.port)
    }

    pub(crate) async fn vhost(&self) -> Vhost {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let name = format!("test-{}", COUNT.fetch_add(1, Ordering::Relaxed));
        // In one go: each rabbitmqctl boots a virtual machine.
        let made = self
            .ctl(&[
                "eval",
                &format!(
                    "V = <<\"{name}\">>, ok = rabbit_vhost:add(V, <<\"test\">>), \
                     ok = rabbit_auth_backend_internal:set_permissions(<<\"guest\">>, V, \
                     <<\".*\">>, <<\".*\">>, <<\".*\">>, <<\"test\">>)."
                ),
            ])
            .await;
        assert_eq!(made.trim(), "ok");
        let uri = format!("amqp://guest:guest@127.0.0.1:{}/{name}", self.site.port);
        Vhost { name, uri, address: self.address() }
    }

    /// Has it write its directory of quorum queues, which it does about twice a second: killed
    /// before that, RabbitMQ 3.10 does not find a new queue again.
    pub(crate) async fn sync(&self) {
        self.ctl(&["eval", "[dets:sync(Table) || Table <- dets:all()]."]).await;
    }

    /// `kill -9`.
    pub(crate) fn kill(&self) {
        let mut process = self.process.lock().unwrap();
        process.kill().unwrap();
        process.wait().unwrap();
    }

    /// Boots it again, on what it has on disk.
    pub(crate) async fn restart(&self) {
        let site = self.site.clone();
        let process = spawn_blocking(move || site.boot()).await.unwrap();
        *self.process.lock().unwrap() = process;
    }

    pub(crate) fn stop(&self) {
        signal(&self.process.lock().unwrap(), "STOP");
    }

    pub(crate) fn go_on(&self) {
        signal(&self.process.lock().unwrap(), "CONT");
    }

    /// Runs `rabbitmqctl` and gives back what it prints.
    pub(crate) async fn ctl(&self, args: &[&str]) -> String {
        let mut command = self.site.command("rabbitmqctl");
        command.arg("--quiet").args(args);
        let output = spawn_blocking(move || command.output()).await.unwrap().unwrap();
        let (out, err) =
            (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "rabbitmqctl {args:?}: {out}{err}");
        out.into_owned()
    }
}

impl Drop for RabbitNode {
    fn drop(&mut self) {
        let mut process = self.process.lock().unwrap();
        let _ = process.kill();
        let _ = process.wait();
        let _ = fs::remove_dir_all(&self.site.folder);
    }
}

/// Where a node lives.
#[derive(Clone)]
struct Site {
    folder: PathBuf,
    port: u16,
    distribution: u16,
    tools: (u16, u16),
    epmd: u16,
}

impl Site {
    fn new(conf: &str, plugins: &str) -> Self {
        let folder = folder("rabbit");
        let first = free_port().min(u16::MAX - 20);
        let site = Self {
            port: free_port(),
            distribution: free_port(),
            tools: (first, first + 20),
            epmd: epmd(),
            folder,
        };
        let write = |name: &str, text: String| fs::write(site.folder.join(name), text).unwrap();
        write(
            "rabbitmq.conf",
            format!(
                "listeners.tcp.1 = 127.0.0.1:{}\n\
                 log.file.level = warning\n\
                 disk_free_limit.absolute = 50MB\n\
                 max_message_size = 4194304\n\
                 {conf}",
                site.port
            ),
        );
        write("enabled_plugins", format!("[{plugins}].\n"));
        site
    }

    /// One of the package's own programs, which neither switch user nor read the machine's
    /// configuration.
    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(programs().join(program));
        self.surround(&mut command);
        command
    }

    fn surround(&self, command: &mut Command) {
        let at = |name: &str| self.folder.join(name);
        command
            .env("HOME", &self.folder)
            .env("RABBITMQ_NODENAME", format!("pulsebus-{}@localhost", self.port))
            .env("RABBITMQ_NODE_PORT", self.port.to_string())
            .env("RABBITMQ_DIST_PORT", self.distribution.to_string())
            .env("RABBITMQ_CTL_DIST_PORT_MIN", self.tools.0.to_string())
            .env("RABBITMQ_CTL_DIST_PORT_MAX", self.tools.1.to_string())
            .env("RABBITMQ_MNESIA_BASE", at("mnesia"))
            .env("RABBITMQ_LOG_BASE", at("log"))
            .env("RABBITMQ_CONFIG_FILE", at("rabbitmq.conf"))
            .env("RABBITMQ_ADVANCED_CONFIG_FILE", at("advanced.config"))
            .env("RABBITMQ_ENABLED_PLUGINS_FILE", at("enabled_plugins"))
            .env("RABBITMQ_CONF_ENV_FILE", "/dev/null")
            .env("RABBITMQ_PID_FILE", at("pid"))
            .env(
                "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS",
                "+S 1:1 -kernel inet_dist_use_interface {127,0,0,1}",
            )
            // The server script then becomes the virtual machine, in place of watching it.
            .env("RABBITMQ_ALLOW_INPUT", "true")
            .env("ERL_EPMD_PORT", self.epmd.to_string())
            .env("ERL_EPMD_ADDRESS", "127.0.0.1")
            .env("LC_ALL", "C.UTF-8");
    }

    fn boot(&self) -> Child {
        let printed = self.folder.join("printed");
        let file = fs::File::create(&printed).unwrap();
        let mut process = process::spawn(&programs().join("rabbitmq-server"), |command| {
            self.surround(command);
            command.arg("-noinput").stderr(file.try_clone().unwrap()).stdout(file);
        });
        let deadline = Instant::now() + BOOT;
        loop {
            let text = fs::read_to_string(&printed).unwrap();
            // The second where its log goes to the console as well, and tears the first apart.
            let up = ["Starting broker... completed", "Server startup complete"];
            if up.iter().any(|up| text.contains(up)) {
                return process;
            }
            if let Some(status) = process.try_wait().unwrap() {
                panic!("RabbitMQ ended with {status} at boot:\n{text}");
            }
            assert!(Instant::now() < deadline, "RabbitMQ does not come up:\n{text}");
            thread::sleep(Duration::from_millis(50));
        }
    }
}

/// The folder of the server's own programs.
fn programs() -> &'static Path {
    static FOUND: OnceLock<PathBuf> = OnceLock::new();
    FOUND.get_or_init(|| {
        let in_folders = |folder: &str| {
            let versions = fs::read_dir(folder).into_iter().flatten().flatten();
            versions.map(|version| version.path().join("sbin")).collect::<Vec<_>>()
        };
        let mut places = vec![PathBuf::from("/usr/lib/rabbitmq/bin")];
        places.extend(std::env::var_os("RABBITMQ_HOME").map(|home| Path::new(&home).join("sbin")));
        places.extend(in_folders("/usr/lib/rabbitmq/lib"));
        places.extend(in_folders("/usr/local/lib/rabbitmq/lib"));
        places.push("/opt/rabbitmq/sbin".into());
        let found = places.iter().find(|place| place.join("rabbitmq-server").exists());
        found.unwrap_or_else(|| panic!("RabbitMQ is in none of {places:?}")).clone()
    })
}

/// The port of the name server of this process's nodes, started on first use.
#[expect(clippy::zombie_processes, reason = "it lives as long as this process")]
fn epmd() -> u16 {
    static PORT: OnceLock<u16> = OnceLock::new();
    *PORT.get_or_init(|| {
        let port = free_port();
        let number = port.to_string();
        let _ends_with_us = process::spawn(Path::new("epmd"), |command| {
            command.args(["-port", &number, "-address", "127.0.0.1"]);
        });
        let deadline = Instant::now() + Duration::from_secs(20);
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            assert!(Instant::now() < deadline, "epmd does not listen on {port}");
            thread::sleep(Duration::from_millis(10));
        }
        port
    })
}
