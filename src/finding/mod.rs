//! What `doctor` says: a finding, and a list of them about one thing.
//!
//! Below `transport`, whose implementations judge their own brokers, and below `doctor`, which
//! puts everything together.

mod common;

use std::sync::Arc;

use serde::Serialize;

pub(crate) use self::common::{STORE, SYSTEM, is_local, size, skew};

/// How bad a [`Finding`] is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// Worth knowing.
    Note,
    /// Events could be lost or held up when something else fails too.
    Warning,
    /// Events are lost or held up, or will be.
    Error,
}

impl Severity {
    /// The word that is shown.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Note => "note",
            Self::Warning => "warning",
            Self::Error => "error",
        }
    }
}

/// Something that is not as it should be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// What it is about: `system`, `store`, `transport:NAME`, `source:NAME`, `handler:NAME`,
    /// `daemon`.
    pub subject: String,
    /// Which check found it, for scripts: `nats-ack-policy`. Does not change between versions.
    pub check: &'static str,
    /// What is so.
    pub what: String,
    /// What comes of it.
    pub why: String,
    /// What to do about it.
    pub mend: String,
}

impl Finding {
    /// A finding, in the order in which it reads.
    pub(crate) fn of(
        severity: Severity,
        subject: &str,
        check: &'static str,
        what: impl Into<String>,
        why: impl Into<String>,
        mend: impl Into<String>,
    ) -> Self {
        Self {
            severity,
            subject: subject.to_owned(),
            check,
            what: what.into(),
            why: why.into(),
            mend: mend.into(),
        }
    }
}

/// What was found about one subject.
#[derive(Debug, Clone)]
pub(crate) struct Findings {
    subject: Arc<str>,
    list: Vec<Finding>,
}

impl Findings {
    /// Nothing yet.
    pub(crate) fn about(subject: impl Into<Arc<str>>) -> Self {
        Self { subject: subject.into(), list: Vec::new() }
    }

    pub(crate) fn error(
        &mut self,
        check: &'static str,
        what: impl Into<String>,
        why: impl Into<String>,
        mend: impl Into<String>,
    ) {
        self.add(Severity::Error, check, what, why, mend);
    }

    pub(crate) fn warning(
        &mut self,
        check: &'static str,
        what: impl Into<String>,
        why: impl Into<String>,
        mend: impl Into<String>,
    ) {
        self.add(Severity::Warning, check, what, why, mend);
    }

    pub(crate) fn note(
        &mut self,
        check: &'static str,
        what: impl Into<String>,
        why: impl Into<String>,
        mend: impl Into<String>,
    ) {
        self.add(Severity::Note, check, what, why, mend);
    }

    /// For a check whose severity depends on what is found.
    pub(crate) fn add(
        &mut self,
        severity: Severity,
        check: &'static str,
        what: impl Into<String>,
        why: impl Into<String>,
        mend: impl Into<String>,
    ) {
        self.list.push(Finding {
            severity,
            subject: self.subject.to_string(),
            check,
            what: what.into(),
            why: why.into(),
            mend: mend.into(),
        });
    }

    /// All of them, in the order they were found.
    pub(crate) fn into_vec(self) -> Vec<Finding> {
        self.list
    }
}
