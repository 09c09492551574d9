//! What sources do.

use std::sync::Arc;

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::{Registry, Unit},
};

use super::{Float, Histograms, age, work};

/// The source a metric is about.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct SourceLabels {
    /// Its configured name.
    pub source: Arc<str>,
}

/// A source and a state it can be in.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct SourceStateLabels {
    /// Its configured name.
    pub source: Arc<str>,
    /// A word of [`SourceState`](crate::transport::SourceState).
    pub state: &'static str,
}

/// What sources do.
#[derive(Debug, Clone)]
pub struct SourceMetrics {
    /// Whether it is consuming: 1 or 0.
    pub up: Family<SourceLabels, Gauge>,
    /// 1 for the state it is in, 0 for the others.
    pub state: Family<SourceStateLabels, Gauge>,
    /// Messages handed over, copies and non-events included.
    pub received: Family<SourceLabels, Counter>,
    /// Bytes of body and headers received.
    pub received_bytes: Family<SourceLabels, Counter>,
    /// Of the messages, deliveries the broker had made before.
    pub redelivered: Family<SourceLabels, Counter>,
    /// Events added to the log.
    pub stored: Family<SourceLabels, Counter>,
    /// Copies of events that were in the log already.
    pub duplicates: Family<SourceLabels, Counter>,
    /// Messages put into quarantine.
    pub quarantined: Family<SourceLabels, Counter>,
    /// How often it went away from its broker, or its broker from it.
    pub reconnects: Family<SourceLabels, Counter>,
    /// Messages taken and not settled.
    pub held: Family<SourceLabels, Gauge>,
    /// Bytes of their bodies and headers.
    pub held_bytes: Family<SourceLabels, Gauge>,
    /// Messages the broker has and has not delivered, where it says so.
    pub pending: Family<SourceLabels, Gauge>,
    /// When a delivery came last.
    pub last_received: Family<SourceLabels, Float>,
    /// How long the oldest delivery has been held; 0 where none is.
    pub oldest_held: Family<SourceLabels, Float>,
    /// When the broker was last told what became of a delivery.
    pub last_settled: Family<SourceLabels, Float>,
    /// From an event's `time` to its commit: one observation a delivery, of its first event that
    /// has a time.
    pub publish_to_commit: Histograms<SourceLabels>,
    /// From being taken to being committed: one observation a delivery.
    pub hold: Histograms<SourceLabels>,
    /// Telling the broker: one observation a delivery.
    pub settle: Histograms<SourceLabels>,
}

impl Default for SourceMetrics {
    fn default() -> Self {
        Self {
            up: Family::default(),
            state: Family::default(),
            received: Family::default(),
            received_bytes: Family::default(),
            redelivered: Family::default(),
            stored: Family::default(),
            duplicates: Family::default(),
            quarantined: Family::default(),
            reconnects: Family::default(),
            held: Family::default(),
            held_bytes: Family::default(),
            pending: Family::default(),
            last_received: Family::default(),
            oldest_held: Family::default(),
            last_settled: Family::default(),
            publish_to_commit: Histograms::new_with_constructor(age),
            hold: Histograms::new_with_constructor(work),
            settle: Histograms::new_with_constructor(work),
        }
    }
}

impl SourceMetrics {
    /// Takes away the gauges of a source that is gone; what has been counted stays.
    pub(crate) fn forget(&self, labels: &SourceLabels, states: &[&'static str]) {
        for gauge in [&self.up, &self.held, &self.held_bytes, &self.pending] {
            gauge.remove(labels);
        }
        for gauge in [&self.last_received, &self.oldest_held, &self.last_settled] {
            gauge.remove(labels);
        }
        for state in states {
            self.state.remove(&SourceStateLabels { source: Arc::clone(&labels.source), state });
        }
    }

    pub(super) fn register(&self, registry: &mut Registry) {
        let r = registry.sub_registry_with_prefix("source");
        r.register("up", "Whether the source is consuming", self.up.clone());
        r.register("state", "1 for the state the source is in", self.state.clone());
        r.register("received", "Messages handed over by the source", self.received.clone());
        r.register_with_unit(
            "received",
            "Bytes of the bodies and headers received",
            Unit::Bytes,
            self.received_bytes.clone(),
        );
        r.register(
            "redelivered",
            "Messages received that the broker had delivered before",
            self.redelivered.clone(),
        );
        r.register("stored", "Events added to the log", self.stored.clone());
        r.register(
            "duplicates",
            "Copies received of events that were in the log already",
            self.duplicates.clone(),
        );
        r.register("quarantined", "Messages put into quarantine", self.quarantined.clone());
        r.register(
            "reconnects",
            "How often the source lost its broker, or was refused by it",
            self.reconnects.clone(),
        );
        r.register("held", "Messages taken and not settled", self.held.clone());
        r.register_with_unit(
            "held",
            "Bytes of the messages taken and not settled",
            Unit::Bytes,
            self.held_bytes.clone(),
        );
        r.register(
            "pending",
            "Messages that wait in the broker, as it said with its last delivery",
            self.pending.clone(),
        );
        r.register_with_unit(
            "last_received_timestamp",
            "When the source received something last, in Unix time",
            Unit::Seconds,
            self.last_received.clone(),
        );
        r.register_with_unit(
            "last_settled_timestamp",
            "When the source told its broker what became of a delivery last, in Unix time",
            Unit::Seconds,
            self.last_settled.clone(),
        );
        r.register_with_unit(
            "oldest_held",
            "How long the oldest delivery taken and not settled has been held",
            Unit::Seconds,
            self.oldest_held.clone(),
        );
        r.register_with_unit(
            "publish_to_commit",
            "Time from the publisher's time of an event to its commit",
            Unit::Seconds,
            self.publish_to_commit.clone(),
        );
        r.register_with_unit(
            "hold",
            "Time from taking a delivery to its commit",
            Unit::Seconds,
            self.hold.clone(),
        );
        r.register_with_unit(
            "settle",
            "Time it takes to tell the broker what became of a delivery",
            Unit::Seconds,
            self.settle.clone(),
        );
    }
}
