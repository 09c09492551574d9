//! What several parts judge in the same way: clocks, hosts, sizes.

use std::time::{Duration, SystemTime};

use time::OffsetDateTime;

use super::{Finding, Severity};

/// The subject of what this machine is like.
pub(crate) const SYSTEM: &str = "system";

/// The subject of what the event log's database is like.
pub(crate) const STORE: &str = "store";

/// Clocks that differ by more are a finding: receivers of signed webhooks allow five minutes at
/// most, some only seconds, and leases are ten seconds long.
const MAX_SKEW: Duration = Duration::from_secs(5);

/// Compares the clock of `whose` with ours, which was read before and after `theirs` was.
///
/// `resolution` is how coarse theirs is: a `Date` header has whole seconds.
pub(crate) fn skew(
    whose: &str,
    theirs: OffsetDateTime,
    (before, after): (SystemTime, SystemTime),
    resolution: Duration,
) -> Option<Finding> {
    let theirs = SystemTime::from(theirs);
    let (by, direction) = if let Ok(by) = before.duration_since(theirs + resolution) {
        (by, "ahead of")
    } else if let Ok(by) = theirs.duration_since(after) {
        (by, "behind")
    } else {
        return None;
    };
    (by > MAX_SKEW).then(|| {
        Finding::of(
            Severity::Warning,
            SYSTEM,
            "machine-clock",
            format!("this machine's clock is {} s {direction} that of {whose}", by.as_secs()),
            "receivers refuse webhooks whose timestamp is off, certificates seem expired or not \
             valid yet, and the times in the log are wrong",
            "let both machines follow a time server (timedatectl set-ntp true, chrony), and look \
             which of the two is wrong",
        )
    })
}

/// Whether a host is this machine, as far as its name says.
pub(crate) fn is_local(host: &str) -> bool {
    let address = host.trim_start_matches('[').trim_end_matches(']');
    host.eq_ignore_ascii_case("localhost")
        || address.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// Bytes, as people read them.
pub(crate) fn size(bytes: u64) -> String {
    match bytes {
        0..1_024 => format!("{bytes} B"),
        1_024..1_048_576 => format!("{} KiB", bytes >> 10),
        1_048_576..10_737_418_240 => format!("{} MiB", bytes >> 20),
        _ => format!("{} GiB", bytes >> 30),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clocks_may_differ_by_what_reading_them_takes_and_no_more() {
        let base = SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000);
        let at = |seconds: u64| base + Duration::from_secs(seconds);
        let judge = |theirs: u64, before: u64, after: u64| {
            let found =
                skew("x", at(theirs).into(), (at(before), at(after)), Duration::from_secs(1));
            found.map(|finding| finding.what)
        };
        assert_eq!(judge(100, 100, 100), None);
        assert_eq!(judge(100, 90, 110), None, "a slow answer");
        assert_eq!(judge(94, 100, 100), None, "their second is not over");
        assert_eq!(judge(105, 100, 100), None);
        assert_eq!(judge(93, 100, 100).unwrap(), "this machine's clock is 6 s ahead of that of x");
        assert_eq!(judge(106, 99, 100).unwrap(), "this machine's clock is 6 s behind that of x");
    }

    #[test]
    fn this_machine_is_known_by_its_names() {
        for local in ["localhost", "127.0.0.1", "127.9.9.9", "::1", "[::1]", "LOCALHOST"] {
            assert!(is_local(local), "{local}");
        }
        for other in ["db", "10.0.0.1", "localhost.example", "::2"] {
            assert!(!is_local(other), "{other}");
        }
    }
}
