//! This machine: descriptors, memory, the user; and with `disk` and `files` what is on it.

use std::{
    fs,
    path::{Path, PathBuf},
};

use super::{Finding, Report, Severity, disk, files};
use crate::config::{HandlerKind, Settings, StoreSettings, TransportSettings};
use crate::finding::{SYSTEM, size};

/// Descriptors of the process itself: the runtime, the log, libraries, the lock files, and the
/// files that TLS settings are read from.
const BASE_FILES: u64 = 64;

/// Descriptors of a SQLite connection: the file, its log, its shared memory.
const FILES_PER_SQLITE: u64 = 3;

/// The SQLite store's connections: one writes, four read.
const SQLITE_CONNECTIONS: u64 = 5;

/// Descriptors of a search index at once: segments being written and merged.
const FILES_PER_INDEX: u64 = 128;

/// Connections of a broker's transport for a source or a handler.
const FILES_PER_PEER: u64 = 4;

/// Memory that no limit names: code, threads, buffers of drivers.
const BASE_MEMORY: u64 = 64 << 20;

pub(super) async fn examine(settings: &Settings) -> Report {
    let mut findings = files::data_dir(&settings.data_dir);
    findings.extend(files::secrets(settings));
    findings.extend(disk::examine(settings));
    let limits = fs::read_to_string("/proc/self/limits").unwrap_or_default();
    findings.extend(soft_limit(&limits).and_then(|limit| judge_files(limit, settings)));
    findings.extend(memory().and_then(|limit| judge_memory(limit, settings)));
    if files::user() == 0 {
        findings.push(Finding::of(
            Severity::Note,
            SYSTEM,
            "machine-root",
            "doctor runs as root",
            "root may read and write everything, so what the daemon's own user may not was not \
             noticed; and a daemon that runs as root makes every fault in it one of the machine",
            "run the daemon as a user of its own, as systemd/pulsebus.service does, and doctor as \
             that user",
        ));
    }
    let mut report = Report::default();
    report.add(SYSTEM, findings);
    report
}

/// The soft limit of open files in `/proc/self/limits` (proc(5)); `None` where there is none.
fn soft_limit(limits: &str) -> Option<u64> {
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files"))?;
    line.split_whitespace().next()?.parse().ok()
}

/// Descriptors that the configuration may need at once, without clients of the HTTP server.
fn own_files(settings: &Settings) -> u64 {
    let store = match &settings.store {
        StoreSettings::Memory => 0,
        StoreSettings::Sqlite { .. } => SQLITE_CONNECTIONS * FILES_PER_SQLITE,
        // One writes, one listens.
        StoreSettings::Postgres { max_connections, .. } => u64::from(*max_connections) + 2,
    };
    let sources = settings.sources.len() as u64 * FILES_PER_PEER;
    let handlers: u64 = settings
        .handlers
        .values()
        .map(|handler| match &handler.kind {
            HandlerKind::Search(_) => FILES_PER_INDEX,
            HandlerKind::Log { .. } => 0,
            HandlerKind::Forward(forward) => match settings.transports.get(&forward.transport) {
                // A connection for each request that is under way.
                Some(TransportSettings::Http(_)) => handler.workers as u64 + FILES_PER_PEER,
                _ => FILES_PER_PEER,
            },
        })
        .sum();
    BASE_FILES + store + sources + handlers
}

fn judge_files(limit: u64, settings: &Settings) -> Option<Finding> {
    let own = own_files(settings);
    let clients = if settings.http.enabled { settings.http.max_connections as u64 } else { 0 };
    let needed = own + clients;
    let severity = if limit < own {
        Severity::Error
    } else if limit < needed {
        Severity::Warning
    } else {
        return None;
    };
    Some(Finding::of(
        severity,
        SYSTEM,
        "machine-files",
        format!(
            "this process may have {limit} files open; this configuration may need {needed}: \
             {own} of its own and {clients} for HTTP clients (http.max_connections)"
        ),
        "when they are used up, nothing can be opened any more: no connection to a broker or the \
         database, no segment of an index",
        format!(
            "raise the soft limit where the daemon is started: LimitNOFILE={} in the systemd \
             unit, ulimit -n in a shell; or lower http.max_connections",
            needed.next_power_of_two().max(65_536)
        ),
    ))
}

/// What this process may use of memory, in bytes: the least of its control groups' limits and
/// the machine's memory.
fn memory() -> Option<u64> {
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let limits = limit_files(&groups)
        .into_iter()
        .filter_map(|path| fs::read_to_string(path).ok()?.trim().parse().ok());
    let machine = fs::read_to_string("/proc/meminfo").ok().and_then(|text| total(&text));
    limits.chain(machine).min()
}

/// The files that may hold a limit: of each group in `/proc/self/cgroup` (cgroups(7)) and those
/// above it, in version 2 and version 1.
fn limit_files(groups: &str) -> Vec<PathBuf> {
    let mut paths = Vec::new();
    for line in groups.lines() {
        let mut parts = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(group)) = (parts.next(), parts.next(), parts.next())
        else {
            continue;
        };
        let (root, name) = match controllers {
            "" => ("/sys/fs/cgroup", "memory.max"),
            _ if controllers.split(',').any(|c| c == "memory") => {
                ("/sys/fs/cgroup/memory", "memory.limit_in_bytes")
            }
            _ => continue,
        };
        let group = Path::new(group.trim_start_matches('/'));
        paths.extend(group.ancestors().map(|group| Path::new(root).join(group).join(name)));
    }
    paths
}

fn total(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1_024)
}

/// What the configured bounds allow at once, in bytes.
fn bounds(settings: &Settings) -> u64 {
    let handlers: u64 = settings
        .handlers
        .values()
        .map(|handler| {
            let index = match &handler.kind {
                // As much again for events that are not committed yet.
                HandlerKind::Search(options) => options.writer_memory as u64 * 2,
                HandlerKind::Forward(_) | HandlerKind::Log { .. } => 0,
            };
            handler.window.bytes as u64 + index
        })
        .sum();
    let limits = &settings.limits;
    BASE_MEMORY + limits.ingest_bytes as u64 + limits.tail_bytes as u64 + handlers
}

fn judge_memory(limit: u64, settings: &Settings) -> Option<Finding> {
    let bounds = bounds(settings);
    (bounds > limit).then(|| {
        Finding::of(
            Severity::Warning,
            SYSTEM,
            "machine-memory",
            format!(
                "this process may use {} of memory; the configured bounds allow {}",
                size(limit),
                size(bounds)
            ),
            "under load the kernel ends the daemon, again and again: nothing is lost, but \
             nothing gets on either",
            "lower limits.ingest_bytes, limits.tail_bytes, the handlers' window.bytes or a \
             search handler's writer_memory; or raise the limit (MemoryMax of the unit, the \
             container's memory)",
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Flag, Inputs, load};

    fn settings(keys: &[(&str, &str)]) -> Settings {
        let flags = keys.iter().map(|(key, value)| Flag {
            flag: "--set".to_owned(),
            key: (*key).to_owned(),
            value: (*value).to_owned(),
        });
        let empty = tempfile::NamedTempFile::new().unwrap();
        let file = Some(empty.path().to_owned());
        load(&Inputs { file, flags: flags.collect(), variables: Vec::new() }).unwrap().settings
    }

    #[test]
    fn the_limit_of_open_files_is_read_as_the_kernel_writes_it() {
        let text = "Limit                     Soft Limit           Hard Limit           Units\n\
                    Max processes             96416                96416                processes\n\
                    Max open files            1024                 524288               files\n";
        assert_eq!(soft_limit(text), Some(1_024));
        assert_eq!(soft_limit("Max open files            unlimited   unlimited files"), None);
        assert_eq!(soft_limit(""), None);
    }

    #[test]
    fn what_is_needed_of_open_files_comes_from_the_configuration() {
        let settings = settings(&[("http.max_connections", "100")]);
        let own = own_files(&settings);
        assert_eq!(judge_files(own + 100, &settings), None);
        let judge = |limit| judge_files(limit, &settings).unwrap().severity;
        assert_eq!(judge(own + 99), Severity::Warning);
        assert_eq!(judge(own - 1), Severity::Error);
    }

    #[test]
    fn limits_of_memory_are_looked_for_in_every_group() {
        let found = limit_files("0::/a.slice/b.service\n5:cpu,memory:/c\n4:pids:/d\nodd\n");
        let expected = [
            "/sys/fs/cgroup/a.slice/b.service/memory.max",
            "/sys/fs/cgroup/a.slice/memory.max",
            "/sys/fs/cgroup/memory.max",
            "/sys/fs/cgroup/memory/c/memory.limit_in_bytes",
            "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        ];
        assert_eq!(found, expected.map(PathBuf::from));
        assert_eq!(total("MemTotal:       24684084 kB\n"), Some(24_684_084 * 1_024));
    }

    #[test]
    fn bounds_that_do_not_fit_are_told() {
        let defaults = settings(&[]);
        let bounds = bounds(&defaults);
        assert_eq!(judge_memory(bounds, &defaults), None);
        let finding = judge_memory(bounds - 1, &defaults).unwrap();
        assert_eq!(finding.check, "machine-memory");
        let less = settings(&[("limits.tail_bytes", "1MiB")]);
        assert_eq!(judge_memory(bounds - 1, &less), None, "what it says to do helps");
    }
}
