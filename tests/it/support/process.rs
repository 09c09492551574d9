//! Processes and folders that end with the test process, however that ends.

use std::{
    fs, io,
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        OnceLock,
        atomic::{AtomicUsize, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

type Order = (Command, mpsc::Sender<io::Result<Child>>);

/// Starts a process that the kernel kills when this one ends. `command` must become the server
/// itself (`exec`), since a child of a child would be spared.
pub(crate) fn spawn(program: &Path, build: impl FnOnce(&mut Command)) -> Child {
    spawn_as(None, program, build)
}

/// The same, as another user: some servers refuse to be root.
pub(crate) fn spawn_as(
    user: Option<&str>,
    program: &Path,
    build: impl FnOnce(&mut Command),
) -> Child {
    // The kernel sends the signal when the *thread* ends that started the process, and a test's
    // thread ends with its test.
    static SPAWNER: OnceLock<mpsc::Sender<Order>> = OnceLock::new();
    let spawner = SPAWNER.get_or_init(|| {
        let (orders, received) = mpsc::channel::<Order>();
        thread::spawn(move || {
            for (mut command, answer) in received {
                answer.send(command.spawn()).unwrap();
            }
        });
        orders
    });
    let mut command = Command::new("setpriv");
    if let Some(user) = user {
        // Its group is `nogroup` on some systems.
        let group = if user == "nobody" { "65534" } else { user };
        command.args(["--reuid", user, "--regid", group, "--init-groups"]);
    }
    command.args(["--pdeathsig", "KILL", "--"]).arg(program).stdin(Stdio::null());
    build(&mut command);
    let (answer, answered) = mpsc::channel();
    spawner.send((command, answer)).unwrap();
    answered.recv().unwrap().unwrap_or_else(|error| panic!("{}: {error}", program.display()))
}

/// A folder that is removed when this process ends, however it does.
#[expect(clippy::zombie_processes, reason = "it outlives this process, and waits for it")]
pub(crate) fn folder(name: &str) -> PathBuf {
    static COUNT: AtomicUsize = AtomicUsize::new(0);
    let base = std::env::var_os("TEST_PULSEBUS_DIR").map_or_else(std::env::temp_dir, PathBuf::from);
    let number = COUNT.fetch_add(1, Ordering::Relaxed);
    let path = base.join(format!("pulsebus-{name}-{}-{number}", std::process::id()));
    fs::create_dir_all(&path).unwrap();
    // Reads until our end of the pipe closes. Out of our process group, so that an interrupt
    // from the terminal spares it; a server that is being killed may still write for a moment.
    let script = "read _; for _ in 1 2 3 4 5 6 7 8 9; do rm -rf \"$1\"; sleep 0.3; \
                  test -e \"$1\" || exit 0; done";
    let mut reaper = Command::new("setsid")
        .args(["sh", "-c", script, "reaper"])
        .arg(&path)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    // Open for as long as this process lives.
    std::mem::forget(reaper.stdin.take());
    path
}

/// A port of the loopback interface that was free a moment ago.
pub(crate) fn free_port() -> u16 {
    TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port()
}

/// Sends a signal by name.
pub(crate) fn signal(child: &Child, name: &str) {
    let status = Command::new("kill").args(["-s", name, &child.id().to_string()]).status();
    assert!(status.unwrap().success(), "kill -s {name} {}", child.id());
    // The kernel stops its threads one after the other.
    let deadline = Instant::now() + Duration::from_secs(10);
    while name == "STOP" && !is_stopped(child.id()) {
        assert!(Instant::now() < deadline, "{} does not stop", child.id());
        thread::sleep(Duration::from_millis(1));
    }
}

/// Whether every thread of a process stands still (`T` in proc(5)).
fn is_stopped(pid: u32) -> bool {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    threads.flatten().all(|thread| {
        let stat = fs::read_to_string(thread.path().join("stat")).unwrap_or_default();
        stat.rsplit_once(") ").is_none_or(|(_, state)| state.starts_with('T'))
    })
}

/// Whether this process runs as root.
pub(crate) fn is_root() -> bool {
    static ROOT: OnceLock<bool> = OnceLock::new();
    *ROOT.get_or_init(|| {
        Command::new("id").arg("-u").output().is_ok_and(|out| out.stdout.trim_ascii() == b"0")
    })
}
