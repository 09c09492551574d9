//! A nats-server of one's own, to kill and to stop.

use std::{
    io::Read,
    net::TcpStream,
    path::{Path, PathBuf},
    process::Child,
    thread,
    time::{Duration, Instant},
};

use async_nats::jetstream;

use super::process;

/// A private nats-server with JetStream; killed when dropped.
pub(crate) struct NatsServer {
    port: u16,
    dir: PathBuf,
    args: Vec<String>,
    child: Option<Child>,
}

impl NatsServer {
    pub(crate) fn start() -> Self {
        Self::start_with(&[])
    }

    /// With further arguments, e.g. `--user`, `--pass`.
    pub(crate) fn start_with(args: &[&str]) -> Self {
        let args = args.iter().map(|arg| (*arg).to_owned()).collect();
        let dir = process::folder("nats");
        let mut server = Self { port: 0, dir, args, child: None };
        // The port may be taken by somebody else in between.
        for _ in 0..5 {
            server.port = process::free_port();
            if server.try_run() {
                return server;
            }
        }
        panic!("nats-server does not start: {}", server.output());
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    pub(crate) fn url(&self) -> String {
        format!("nats://127.0.0.1:{}", self.port)
    }

    /// A client and JetStream context that are not those under test.
    pub(crate) async fn jetstream(&self) -> jetstream::Context {
        let client = async_nats::ConnectOptions::new()
            .retry_on_initial_connect()
            .connect(self.url())
            .await
            .unwrap();
        jetstream::new(client)
    }

    /// `kill -9`; what it stored stays.
    pub(crate) fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Starts it again on the same port with the same store.
    pub(crate) fn restart(&mut self) {
        self.kill();
        assert!(self.try_run(), "nats-server does not start again: {}", self.output());
    }

    /// SIGSTOP: connections stay, nothing is answered.
    pub(crate) fn stop(&self) {
        process::signal(self.child.as_ref().unwrap(), "STOP");
    }

    /// Ends [`stop`](Self::stop).
    pub(crate) fn cont(&self) {
        process::signal(self.child.as_ref().unwrap(), "CONT");
    }

    fn output(&self) -> String {
        std::fs::read_to_string(self.dir.join("log")).unwrap_or_default()
    }

    fn try_run(&mut self) -> bool {
        let log = std::fs::File::create(self.dir.join("log")).unwrap();
        let port = self.port.to_string();
        let mut child = process::spawn(Path::new("nats-server"), |command| {
            command
                .args(["-js", "-a", "127.0.0.1", "-p", &port, "-sd"])
                .arg(self.dir.join("store"))
                .args(&self.args)
                .stdout(log.try_clone().unwrap())
                .stderr(log);
        });
        let deadline = Instant::now() + Duration::from_secs(20);
        while Instant::now() < deadline {
            if child.try_wait().unwrap().is_some() {
                return false;
            }
            let mut hello = [0; 4];
            if let Ok(mut stream) = TcpStream::connect(("127.0.0.1", self.port))
                && stream.read_exact(&mut hello).is_ok()
                && hello == *b"INFO"
            {
                self.child = Some(child);
                return true;
            }
            thread::sleep(Duration::from_millis(10));
        }
        let _ = child.kill();
        let _ = child.wait();
        false
    }
}

impl Drop for NatsServer {
    fn drop(&mut self) {
        self.kill();
    }
}
