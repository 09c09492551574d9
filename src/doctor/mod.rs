//! What is set up in a way that would lose events, or stop them, told before it does.
//!
//! [`examine`] connects to everything a configuration names and compares what is there with what
//! is configured and with what pulsebus promises. It changes nothing: no table, stream, consumer,
//! queue or exchange is made, and what is tried for real (publishing, consuming) leaves nothing
//! behind.
//!
//! * `system`: this machine: descriptors, clock, disk, folders.
//! * `store`: the event log's database.
//! * `brokers`: sources and destinations, through the transports.
//! * `targets`: webhooks, search indexes, a running daemon.

mod brokers;
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
    /// Notes that a subject was looked at, and what was found.
    pub fn add(&mut self, subject: impl Into<String>, findings: Vec<Finding>) {
        let subject = subject.into();
        if !self.examined.contains(&subject) {
            self.examined.push(subject);
        }
        self.findings.extend(findings);
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
