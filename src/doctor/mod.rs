//! What is set up in a way that would lose events, or stop them, told before it does.
//!
//! [`examine`] connects to everything a configuration names and compares what is there with what
//! is configured and with what pulsebus promises. It changes nothing: no table, stream, consumer,
//! queue or exchange is made, and what is tried for real (publishing, consuming) leaves nothing
//! behind.
//!
//! * `system`: this machine: descriptors, memory, clock; `disk`: file systems; `files`: folders
//!   and secrets.
//! * `store`: the event log's database.
//! * `brokers`: sources and destinations, through the transports.
//! * `targets`: webhooks, search indexes.
//! * [`daemon`]: a running daemon, from its answers: whoever asks [`examine`] for the rest may
//!   have asked it.

mod brokers;
pub mod daemon;
mod disk;
mod files;
mod store;
mod system;
mod targets;

use serde::Serialize;

pub use crate::finding::{Finding, Severity};

use crate::config::Settings;

/// What [`examine`] found.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    /// What was looked at, in order: the subjects of findings, those without any included.
    pub examined: Vec<String>,
    /// The worst first.
    pub findings: Vec<Finding>,
}

impl Report {
    /// Notes that a subject was looked at, and what was found; the worst stays first.
    pub fn add(&mut self, subject: impl Into<String>, findings: Vec<Finding>) {
        let subject = subject.into();
        if !self.examined.contains(&subject) {
            self.examined.push(subject);
        }
        self.findings.extend(findings);
        self.findings.sort_by_key(|finding| std::cmp::Reverse(finding.severity));
    }

    /// The worst there is; `None` where nothing was found.
    #[must_use]
    pub fn worst(&self) -> Option<Severity> {
        self.findings.iter().map(|finding| finding.severity).max()
    }
}

/// Looks at everything these settings name.
///
/// *Errors*: none; what cannot be reached is a finding.
pub async fn examine(settings: &Settings) -> Report {
    let mut report = Report::default();
    // The parts wait for different peers; none for another's time-out.
    let parts = tokio::join!(
        system::examine(settings),
        store::examine(settings),
        brokers::examine(settings),
        targets::examine(settings),
    );
    for part in [parts.0, parts.1, parts.2, parts.3] {
        for subject in part.examined {
            report.add(subject, Vec::new());
        }
        report.findings.extend(part.findings);
    }
    report.findings.sort_by_key(|finding| std::cmp::Reverse(finding.severity));
    report
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    /// The files whose checks stand in `docs/doctor.md` under "Machine, stores and targets".
    const SOURCES: [&str; 10] = [
        include_str!("daemon.rs"),
        include_str!("disk.rs"),
        include_str!("files.rs"),
        include_str!("../finding/common.rs"),
        include_str!("store.rs"),
        include_str!("../store/judge.rs"),
        include_str!("system.rs"),
        include_str!("targets.rs"),
        include_str!("../handler/search/doctor.rs"),
        include_str!("../transport/http/doctor.rs"),
    ];
    const STORES: [&str; 3] = [
        include_str!("../store/sqlite/doctor.rs"),
        include_str!("../store/postgres/doctor.rs"),
        include_str!("../store/postgres/doctor/judge.rs"),
    ];
    const KINDS: [&str; 7] =
        ["machine-", "store-", "postgres-", "sqlite-", "webhook-", "search-", "daemon-"];

    fn is_check(text: &str) -> bool {
        KINDS.iter().any(|kind| text.strip_prefix(kind).is_some_and(|rest| !rest.is_empty()))
            && text.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'-')
    }

    #[test]
    fn every_check_is_documented_and_no_other() {
        let sources = SOURCES.iter().chain(&STORES);
        let found: BTreeSet<&str> =
            sources.flat_map(|source| source.split('"')).filter(|text| is_check(text)).collect();
        assert!(found.len() > 30, "{found:?}");
        let page = include_str!("../../docs/doctor.md");
        let (_, section) = page.split_once("\n## Machine, stores and targets\n").unwrap();
        let section = section.split("\n## ").next().unwrap();
        let documented: BTreeSet<&str> = section
            .lines()
            .filter_map(|line| line.strip_prefix("| `")?.split('`').next())
            .collect();
        assert_eq!(documented, found);
    }
}
