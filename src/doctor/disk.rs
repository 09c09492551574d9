//! The file systems that data lies on: what they are, and what is free.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::{ffi::OsStrExt as _, fs::MetadataExt as _},
    path::{Path, PathBuf},
};

use super::{Finding, Severity};
use crate::config::{HandlerKind, Settings, StoreSettings};
use crate::finding::{SYSTEM, size};

/// Free bytes below which writing is as good as over: a WAL file and a merge of an index need
/// that much at once.
const FREE_ERROR: u64 = 100 << 20;

/// Free bytes below which somebody should look.
const FREE_WARNING: u64 = 1 << 30;

/// The same as a part of the file system, in percent. Does not apply where more is free than
/// [`FREE_PLENTY`].
const FREE_PERCENT: u64 = 10;

/// A tenth of a large disk is no emergency: with more than this free, nothing is said.
const FREE_PLENTY: u64 = 20 << 30;

/// What is kept in a folder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Kept {
    Events,
    Index,
    Other,
}

/// Looks at each file system that something is kept on, once.
pub(super) fn examine(settings: &Settings) -> Vec<Finding> {
    let mut places: Vec<(PathBuf, Kept)> = vec![(settings.data_dir.clone(), Kept::Other)];
    if let StoreSettings::Sqlite { path } = &settings.store {
        places.push((parent(path), Kept::Events));
    }
    for handler in settings.handlers.values() {
        if let HandlerKind::Search(options) = &handler.kind {
            places.push((options.path.clone(), Kept::Index));
        }
    }
    // By device; the most precious thing on each stands for all of them.
    let mut devices: BTreeMap<u64, (PathBuf, Kept)> = BTreeMap::new();
    for (path, kept) in places {
        let Some((existing, device)) = existing(&path) else { continue };
        let place = devices.entry(device).or_insert_with(|| (existing.clone(), kept));
        if kept < place.1 {
            *place = (existing, kept);
        }
    }
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let mut findings = Vec::new();
    for (path, kept) in devices.into_values() {
        if let Some(kind) = kind(&mounts, &path) {
            findings.extend(judge_kind(&path, kept, &kind));
        }
        if let Ok(stat) = rustix::fs::statvfs(&path) {
            let unit = stat.f_frsize;
            let (free, all) =
                (stat.f_bavail.saturating_mul(unit), stat.f_blocks.saturating_mul(unit));
            findings.extend(judge_space(&path, free, all));
            findings.extend(judge_inodes(&path, stat.f_favail, stat.f_files));
        }
    }
    findings
}

fn parent(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    }
}

/// The path, or the nearest folder above it that exists, with its device.
pub(super) fn existing(path: &Path) -> Option<(PathBuf, u64)> {
    let absolute = std::path::absolute(path).ok()?;
    absolute.ancestors().find_map(|path| {
        let metadata = fs::metadata(path).ok()?;
        let path = fs::canonicalize(path).ok()?;
        Some((path, metadata.dev()))
    })
}

/// The file system that a path is on, by its mount point in `/proc/self/mountinfo` (proc(5)).
fn kind(mounts: &str, path: &Path) -> Option<String> {
    let mut found: Option<(usize, &str)> = None;
    for line in mounts.lines() {
        let Some((before, after)) = line.split_once(" - ") else { continue };
        let (Some(point), Some(kind)) = (before.split(' ').nth(4), after.split(' ').next()) else {
            continue;
        };
        let point = unescaped(point);
        let point = Path::new(std::ffi::OsStr::from_bytes(&point));
        let length = point.as_os_str().len();
        // The later of two on one point is the one that is seen.
        if path.starts_with(point) && found.is_none_or(|(longest, _)| length >= longest) {
            found = Some((length, kind));
        }
    }
    found.map(|(_, kind)| kind.to_owned())
}

/// Blanks and the like are written in octal, as `\040`.
fn unescaped(point: &str) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(point.len());
    let mut rest = point.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        let octal = after.get(..3).filter(|_| first == b'\\');
        let value = octal
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match value {
            Some(value) => {
                bytes.push(value);
                rest = &after[3..];
            }
            None => {
                bytes.push(first);
                rest = after;
            }
        }
    }
    bytes
}

fn judge_kind(path: &Path, kept: Kept, kind: &str) -> Option<Finding> {
    let path = path.display();
    let network = ["nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "glusterfs"]
        .contains(&kind)
        || ["fuse.sshfs", "fuse.glusterfs", "fuse.s3fs", "fuse.rclone", "fuse.ceph"]
            .contains(&kind);
    let (severity, what, why, mend) = match (kind, kept) {
        (_, Kept::Events) if network => (
            Severity::Error,
            format!("{path}, where the events are kept, is on a network file system ({kind})"),
            "SQLite's write-ahead log needs shared memory and locks that work between processes; \
             over a network the file is corrupted or locked for good",
            "keep store.url's file on a local disk, or use Postgres",
        ),
        (_, Kept::Index) if network => (
            Severity::Warning,
            format!("{path}, where a search index is kept, is on a network file system ({kind})"),
            "the index is mapped into memory and its folder is locked: both are slow or \
             unreliable over a network",
            "give the search handler a path on a local disk; the index is rebuilt from the log",
        ),
        ("tmpfs" | "ramfs", Kept::Events) => (
            Severity::Error,
            format!("{path}, where the events are kept, is in memory ({kind})"),
            "every event that was acknowledged is lost when the machine starts again",
            "set data_dir to a folder on a disk; in a container mount a volume there",
        ),
        ("tmpfs" | "ramfs", _) => (
            Severity::Warning,
            format!("{path} is in memory ({kind})"),
            "what is in it, and what it takes of the machine's memory, is gone with the next \
             start: a search index is then built anew from the first event",
            "set data_dir to a folder on a disk; in a container mount a volume there",
        ),
        ("overlay" | "aufs", Kept::Events) => (
            Severity::Error,
            format!("{path}, where the events are kept, is the container's own layer ({kind})"),
            "it is removed with the container, and every event in it",
            "mount a volume at data_dir",
        ),
        _ => return None,
    };
    Some(Finding::of(severity, SYSTEM, "machine-filesystem", what, why, mend))
}

fn judge_space(path: &Path, free: u64, all: u64) -> Option<Finding> {
    // Pseudo file systems have no size.
    if all == 0 {
        return None;
    }
    let low = free < FREE_WARNING
        || (free < FREE_PLENTY && free.saturating_mul(100) < all.saturating_mul(FREE_PERCENT));
    let severity = if free < FREE_ERROR {
        Severity::Error
    } else if low {
        Severity::Warning
    } else {
        return None;
    };
    Some(Finding::of(
        severity,
        SYSTEM,
        "machine-disk",
        format!(
            "{} of {} are free on the file system of {}",
            size(free),
            size(all),
            path.display()
        ),
        "a full disk stops the log: nothing is acknowledged until there is space again, and a \
         search index cannot commit",
        "free space, enlarge the disk, or move data_dir; the log grows with every event",
    ))
}

fn judge_inodes(path: &Path, free: u64, all: u64) -> Option<Finding> {
    // Some file systems make them as needed, and say 0.
    (all > 0 && free < 1_000).then(|| {
        Finding::of(
            if free < 50 { Severity::Error } else { Severity::Warning },
            SYSTEM,
            "machine-disk",
            format!("{free} inodes are free on the file system of {}", path.display()),
            "no file can be made there any more, whatever space is free: neither SQLite's log \
             nor a segment of an index",
            "remove files that nobody needs, or make the file system anew with more inodes",
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTS: &str = "\
22 1 254:0 / / rw - ext4 /dev/vda rw
23 22 0:5 / /proc rw - proc proc rw
30 22 0:40 / /srv rw,relatime shared:1 - nfs4 server:/export rw
31 30 254:1 / /srv/local rw - xfs /dev/vdb rw
32 22 0:41 / /mnt/a\\040b rw - tmpfs tmpfs rw
33 22 254:2 / /twice rw - ext4 /dev/vdc rw
34 22 0:42 / /twice rw - overlay overlay rw
broken line
";

    #[test]
    fn the_nearest_mount_point_says_what_a_path_is_on() {
        for (path, expected) in [
            ("/var/lib/pulsebus", "ext4"),
            ("/srv", "nfs4"),
            ("/srv/x", "nfs4"),
            ("/srvx", "ext4"),
            ("/srv/local/x", "xfs"),
            ("/mnt/a b/c", "tmpfs"),
            ("/twice/x", "overlay"),
        ] {
            assert_eq!(kind(MOUNTS, Path::new(path)).as_deref(), Some(expected), "{path}");
        }
        assert_eq!(kind("", Path::new("/")), None);
    }

    #[test]
    fn events_on_a_network_or_in_memory_are_an_error_and_on_a_disk_they_are_not() {
        let judge =
            |kind, kept| judge_kind(Path::new("/x"), kept, kind).map(|finding| finding.severity);
        for kind in ["nfs", "nfs4", "cifs", "9p", "fuse.sshfs", "tmpfs", "overlay"] {
            assert_eq!(judge(kind, Kept::Events), Some(Severity::Error), "{kind}");
        }
        assert_eq!(judge("nfs4", Kept::Index), Some(Severity::Warning));
        assert_eq!(judge("tmpfs", Kept::Other), Some(Severity::Warning));
        for kind in ["ext4", "xfs", "btrfs", "zfs", "fuse"] {
            assert_eq!(judge(kind, Kept::Events), None, "{kind}");
        }
    }

    #[test]
    fn what_is_free_is_judged_in_bytes_and_as_a_part() {
        let judge = |free: u64, all: u64| {
            judge_space(Path::new("/x"), free, all).map(|finding| finding.severity)
        };
        let (mib, gib) = (1 << 20, 1 << 30);
        assert_eq!(judge(99 * mib, 10 * gib), Some(Severity::Error));
        assert_eq!(judge(100 * mib, 10 * gib), Some(Severity::Warning));
        assert_eq!(judge(1023 * mib, 2 * gib), Some(Severity::Warning));
        assert_eq!(judge(2 * gib, 10 * gib), None);
        assert_eq!(judge(9 * gib, 100 * gib), Some(Severity::Warning));
        assert_eq!(judge(21 * gib, 1_000 * gib), None, "a tenth of a large disk");
        assert_eq!(judge(0, 0), None);
        assert!(judge_inodes(Path::new("/x"), 49, 100_000).is_some());
        assert!(judge_inodes(Path::new("/x"), 0, 0).is_none());
    }

    #[test]
    fn a_path_that_does_not_exist_is_judged_by_what_is_above_it() {
        let folder = tempfile::tempdir().unwrap();
        let (found, _) = existing(&folder.path().join("a/b/c")).unwrap();
        assert_eq!(found, fs::canonicalize(folder.path()).unwrap());
    }
}
