//! The log and its store.

use std::sync::atomic::AtomicU64;

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{
        counter::Counter,
        family::Family,
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets},
    },
    registry::{Registry, Unit},
};

use super::{HandlerLabels, work};

/// Where events were read from.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ReadLabels {
    /// `memory` (the tail of the log) or `store`.
    pub from: &'static str,
}

/// How a connection of the store's pools is.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ConnectionLabels {
    /// `idle` or `used`.
    pub state: &'static str,
}

/// The log and its store.
#[derive(Debug, Clone)]
pub struct LogMetrics {
    /// The last position.
    pub head: Gauge<u64, AtomicU64>,
    /// The first position that is in the log, where `store.retain` is set.
    pub first: Gauge<u64, AtomicU64>,
    /// How large the events in the log are, where `store.retain` is set.
    pub bytes: Gauge<u64, AtomicU64>,
    /// Events that `store.retain` has removed.
    pub removed: Counter,
    /// The handler that needs the first event of the log, though it is due to be removed: 1.
    pub retention_held: Family<HandlerLabels, Gauge>,
    /// Whether the store takes events: 1 or 0.
    pub up: Gauge,
    /// From being handed over to the commit being begun: one observation a commit, of what has
    /// waited longest.
    pub wait_seconds: Histogram,
    /// Seconds a commit takes.
    pub commit_seconds: Histogram,
    /// Entries a commit.
    pub commit_entries: Histogram,
    /// Commits that failed and were tried again.
    pub commit_failures: Counter,
    /// Reads of handlers: one a page.
    pub reads: Family<ReadLabels, Counter>,
    /// Entries that wait in quarantine.
    pub quarantine: Gauge,
    /// Connections to the store.
    pub connections: Family<ConnectionLabels, Gauge>,
    /// How many there may be.
    pub max_connections: Gauge,
}

impl Default for LogMetrics {
    fn default() -> Self {
        Self {
            head: Gauge::default(),
            first: Gauge::default(),
            bytes: Gauge::default(),
            removed: Counter::default(),
            retention_held: Family::default(),
            up: Gauge::default(),
            wait_seconds: work(),
            commit_seconds: work(),
            commit_entries: Histogram::new(exponential_buckets(1.0, 2.0, 13)),
            commit_failures: Counter::default(),
            reads: Family::default(),
            quarantine: Gauge::default(),
            connections: Family::default(),
            max_connections: Gauge::default(),
        }
    }
}

impl LogMetrics {
    pub(super) fn register(&self, registry: &mut Registry) {
        let r = registry.sub_registry_with_prefix("log");
        r.register("head_position", "Position of the last event in the log", self.head.clone());
        r.register("first_position", "Position of the first event in the log", self.first.clone());
        r.register("removed", "Events removed from the log by retention", self.removed.clone());
        r.register_with_unit(
            "append_wait",
            "Time from handing over an append to its commit being begun",
            Unit::Seconds,
            self.wait_seconds.clone(),
        );
        r.register_with_unit(
            "commit",
            "Time a commit takes",
            Unit::Seconds,
            self.commit_seconds.clone(),
        );
        r.register("commit_entries", "Entries of a commit", self.commit_entries.clone());
        r.register(
            "commit_failures",
            "Commits that failed and were tried again",
            self.commit_failures.clone(),
        );
        r.register("reads", "Pages of events read by handlers", self.reads.clone());
        let r = registry.sub_registry_with_prefix("store");
        r.register("up", "Whether the store takes events", self.up.clone());
        r.register(
            "connections",
            "Connections of this process to the database",
            self.connections.clone(),
        );
        r.register(
            "max_connections",
            "Connections to the database that this process may open",
            self.max_connections.clone(),
        );
        registry.register_with_unit(
            "log",
            "Size of the events in the log",
            Unit::Bytes,
            self.bytes.clone(),
        );
        registry.register(
            "retention_held",
            "1 for the handler that needs an event which is due to be removed",
            self.retention_held.clone(),
        );
        registry.register(
            "quarantine_entries",
            "Entries that wait in quarantine",
            self.quarantine.clone(),
        );
    }
}
