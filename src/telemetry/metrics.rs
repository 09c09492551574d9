//! What `/metrics` exports, in the OpenMetrics text format.
//!
//! Labels are names from the configuration only, so their number is bounded. Counters are moved
//! once a batch, never once an event.

use std::{fmt, sync::Arc, sync::atomic::AtomicU64};

use prometheus_client::{
    encoding::{EncodeLabelSet, text},
    metrics::{
        counter::Counter,
        family::Family,
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets},
    },
    registry::{Registry, Unit},
};

/// The source a metric is about.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct SourceLabels {
    /// Its configured name.
    pub source: Arc<str>,
}

/// The handler a metric is about.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct HandlerLabels {
    /// Its configured name.
    pub handler: Arc<str>,
}

/// A handler, and how an event ended in it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct OutcomeLabels {
    /// Its configured name.
    pub handler: Arc<str>,
    /// `done`, `filtered`, `retry`, `reject` or `unavailable`.
    pub outcome: &'static str,
}

/// Every metric of a bus. Cheap to clone: clones share their values.
#[derive(Clone)]
pub struct Metrics {
    registry: Arc<Registry>,
    /// Messages handed over by a source, copies and non-events included.
    pub received: Family<SourceLabels, Counter>,
    /// Of those, deliveries the broker had made before.
    pub redelivered: Family<SourceLabels, Counter>,
    /// Bytes of body received.
    pub received_bytes: Family<SourceLabels, Counter>,
    /// Events added to the log.
    pub stored: Family<SourceLabels, Counter>,
    /// Copies of events that were in the log already.
    pub duplicates: Family<SourceLabels, Counter>,
    /// Messages put into quarantine.
    pub quarantined: Family<SourceLabels, Counter>,
    /// Whether a source is consuming: 1 or 0.
    pub source_up: Family<SourceLabels, Gauge>,
    /// Entries a commit.
    pub commit_size: Histogram,
    /// Seconds a commit takes.
    pub commit_seconds: Histogram,
    /// Appends that failed and were tried again.
    pub commit_failures: Counter,
    /// The last position of the log.
    pub head: Gauge<u64, AtomicU64>,
    /// The first position that is in the log, where `store.retain` is set.
    pub first: Gauge<u64, AtomicU64>,
    /// How large the events in the log are, where `store.retain` is set.
    pub log_bytes: Gauge<u64, AtomicU64>,
    /// Events that `store.retain` has removed.
    pub events_removed: Counter,
    /// The handler that needs the first event of the log, though it is due to be removed: 1.
    pub retention_held: Family<HandlerLabels, Gauge>,
    /// Outcomes of events in handlers.
    pub handled: Family<OutcomeLabels, Counter>,
    /// Seconds from a handler being called to its outcome: one observation a call, which may
    /// be for several events.
    pub handler_seconds: Family<HandlerLabels, Histogram>,
    /// Events between a handler's cursor and the head of the log.
    pub lag: Family<HandlerLabels, Gauge>,
    /// Events a handler has in its window, unfinished.
    pub in_flight: Family<HandlerLabels, Gauge>,
    /// Events waiting for another attempt.
    pub retrying: Family<HandlerLabels, Gauge>,
    /// Events waiting behind a failed one of their key.
    pub parked: Family<HandlerLabels, Gauge>,
    /// Dead letters made.
    pub dead: Family<HandlerLabels, Counter>,
    /// Whether a handler is running: 1 or 0.
    pub handler_up: Family<HandlerLabels, Gauge>,
}

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Registry::with_prefix("pulsebus");
        let seconds = || Histogram::new(exponential_buckets(0.000_1, 2.5, 14));
        let mut metrics = Self {
            registry: Arc::default(),
            received: Family::default(),
            redelivered: Family::default(),
            received_bytes: Family::default(),
            stored: Family::default(),
            duplicates: Family::default(),
            quarantined: Family::default(),
            source_up: Family::default(),
            commit_size: Histogram::new(exponential_buckets(1.0, 2.0, 14)),
            commit_seconds: seconds(),
            commit_failures: Counter::default(),
            head: Gauge::default(),
            first: Gauge::default(),
            log_bytes: Gauge::default(),
            events_removed: Counter::default(),
            retention_held: Family::default(),
            handled: Family::default(),
            handler_seconds: Family::new_with_constructor(|| {
                Histogram::new(exponential_buckets(0.000_1, 2.5, 14))
            }),
            lag: Family::default(),
            in_flight: Family::default(),
            retrying: Family::default(),
            parked: Family::default(),
            dead: Family::default(),
            handler_up: Family::default(),
        };
        let r = &mut registry;
        r.register("received", "Messages handed over by a source", metrics.received.clone());
        r.register("redelivered", "Deliveries made before", metrics.redelivered.clone());
        r.register_with_unit(
            "received",
            "Body bytes received",
            Unit::Bytes,
            metrics.received_bytes.clone(),
        );
        r.register("stored", "Events added to the log", metrics.stored.clone());
        r.register("duplicates", "Copies of events in the log", metrics.duplicates.clone());
        r.register("quarantined", "Messages put into quarantine", metrics.quarantined.clone());
        r.register("source_up", "Whether the source is consuming", metrics.source_up.clone());
        r.register("commit_size", "Entries a commit", metrics.commit_size.clone());
        r.register_with_unit(
            "commit",
            "Time a commit takes",
            Unit::Seconds,
            metrics.commit_seconds.clone(),
        );
        r.register(
            "commit_failures",
            "Appends that failed and were tried again",
            metrics.commit_failures.clone(),
        );
        r.register("head_position", "Last position of the log", metrics.head.clone());
        r.register("first_position", "First position in the log", metrics.first.clone());
        r.register_with_unit(
            "log",
            "Size of the events in the log",
            Unit::Bytes,
            metrics.log_bytes.clone(),
        );
        r.register(
            "events_removed",
            "Events removed from the log by retention",
            metrics.events_removed.clone(),
        );
        r.register(
            "retention_held",
            "1 for the handler that needs an event which is due to be removed",
            metrics.retention_held.clone(),
        );
        r.register("handled", "Outcomes of events in handlers", metrics.handled.clone());
        r.register_with_unit(
            "handler",
            "Time a call of the handler takes",
            Unit::Seconds,
            metrics.handler_seconds.clone(),
        );
        r.register("handler_lag", "Events behind the head of the log", metrics.lag.clone());
        r.register("handler_in_flight", "Unfinished events held", metrics.in_flight.clone());
        r.register("handler_retrying", "Events waiting for a retry", metrics.retrying.clone());
        r.register(
            "handler_parked",
            "Events waiting behind a failed one of their key",
            metrics.parked.clone(),
        );
        r.register("dead_letters", "Dead letters made", metrics.dead.clone());
        r.register("handler_up", "Whether the handler is running", metrics.handler_up.clone());
        metrics.registry = Arc::new(registry);
        metrics
    }
}

impl Metrics {
    /// The OpenMetrics text; content type
    /// `application/openmetrics-text; version=1.0.0; charset=utf-8`.
    #[must_use]
    pub fn encode(&self) -> String {
        let mut text = String::new();
        if text::encode(&mut text, &self.registry).is_err() {
            // Writing to a String fails only if an encoder of ours does; half a page is worse
            // for a scraper than none.
            text.clear();
        }
        text
    }
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Metrics").finish_non_exhaustive()
    }
}
