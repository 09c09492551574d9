//! A source's series.

use std::sync::Arc;

use prometheus_client::metrics::{counter::Counter, gauge::Gauge, histogram::Histogram};
use time::OffsetDateTime;

use crate::{
    telemetry::{Float, Metrics, SourceLabels},
    transport::Receipt,
};

/// A source's series, looked up once.
pub(super) struct Counters {
    received: Counter,
    received_bytes: Counter,
    redelivered: Counter,
    stored: Counter,
    duplicates: Counter,
    quarantined: Counter,
    held: Gauge,
    held_bytes: Gauge,
    last_received: Float,
    last_settled: Float,
    publish_to_commit: Histogram,
    hold: Histogram,
    settle: Histogram,
}

impl Counters {
    pub(super) fn new(metrics: &Metrics, source: &Arc<str>) -> Self {
        let labels = SourceLabels { source: Arc::clone(source) };
        let metrics = &metrics.source;
        Self {
            received: metrics.received.get_or_create_owned(&labels),
            received_bytes: metrics.received_bytes.get_or_create_owned(&labels),
            redelivered: metrics.redelivered.get_or_create_owned(&labels),
            stored: metrics.stored.get_or_create_owned(&labels),
            duplicates: metrics.duplicates.get_or_create_owned(&labels),
            quarantined: metrics.quarantined.get_or_create_owned(&labels),
            held: metrics.held.get_or_create_owned(&labels),
            held_bytes: metrics.held_bytes.get_or_create_owned(&labels),
            last_received: metrics.last_received.get_or_create_owned(&labels),
            last_settled: metrics.last_settled.get_or_create_owned(&labels),
            publish_to_commit: metrics.publish_to_commit.get_or_create_owned(&labels),
            hold: metrics.hold.get_or_create_owned(&labels),
            settle: metrics.settle.get_or_create_owned(&labels),
        }
    }

    /// A delivery has come.
    pub(super) fn taken(
        &self,
        messages: usize,
        bytes: usize,
        redelivered: usize,
        at: OffsetDateTime,
    ) {
        self.received.inc_by(messages as u64);
        self.received_bytes.inc_by(bytes as u64);
        self.redelivered.inc_by(redelivered as u64);
        self.last_received.set(unix(at));
    }

    /// So much is taken and not settled.
    pub(super) fn holding(&self, messages: usize, bytes: usize) {
        let signed = |n: usize| i64::try_from(n).unwrap_or(i64::MAX);
        self.held.set(signed(messages));
        self.held_bytes.set(signed(bytes));
    }

    /// A delivery has been committed.
    pub(super) fn committed(&self, source: &str, receipts: &[Receipt]) {
        let (mut stored, mut duplicates, mut quarantined) = (0, 0, 0);
        for receipt in receipts {
            match receipt {
                Receipt::Stored(_) => stored += 1,
                Receipt::Duplicate(_) => duplicates += 1,
                Receipt::Quarantined { number, reason } => {
                    quarantined += 1;
                    tracing::debug!(source, number, %reason, "message put into quarantine");
                }
            }
        }
        self.stored.inc_by(stored);
        self.duplicates.inc_by(duplicates);
        self.quarantined.inc_by(quarantined);
        if quarantined > 0 {
            tracing::warn!(source, quarantined, "messages put into quarantine");
        }
    }

    /// How long that took, and how long ago its publisher says that it was.
    pub(super) fn took(
        &self,
        taken: OffsetDateTime,
        published: Option<OffsetDateTime>,
        committed: OffsetDateTime,
    ) {
        self.hold.observe(seconds(committed - taken));
        if let Some(published) = published {
            self.publish_to_commit.observe(seconds(committed - published));
        }
    }

    /// The broker has been told, which was begun then.
    pub(super) fn settled(&self, begun: OffsetDateTime) {
        let now = crate::event::now();
        self.settle.observe(seconds(now - begun));
        self.last_settled.set(unix(now));
    }
}

/// Never negative: another machine's clock may be ahead, and this one's may be set back.
fn seconds(duration: time::Duration) -> f64 {
    duration.as_seconds_f64().max(0.0)
}

fn unix(at: OffsetDateTime) -> f64 {
    (at - OffsetDateTime::UNIX_EPOCH).as_seconds_f64()
}
