//! A handler's series.

use std::sync::Arc;

use prometheus_client::metrics::{counter::Counter, histogram::Histogram};

use crate::telemetry::{HandlerLabels, Metrics, OutcomeLabels, RedrivenLabels};

/// A handler's series, looked up once.
pub(super) struct Counters {
    pub(super) latency: Histogram,
    pub(super) checkpoint: Histogram,
    pub(super) checkpoint_failures: Counter,
    pub(super) retried: Counter,
    pub(super) discarded: Counter,
    pub(super) done: Counter,
    pub(super) filtered: Counter,
    pub(super) retry: Counter,
    pub(super) reject: Counter,
    pub(super) unavailable: Counter,
    pub(super) dead: Counter,
    pub(super) seconds: Histogram,
}

impl Counters {
    pub(super) fn new(metrics: &Metrics, handler: &Arc<str>) -> Self {
        let metrics = &metrics.handler;
        let outcome = |outcome| {
            let handler = Arc::clone(handler);
            metrics.outcomes.get_or_create_owned(&OutcomeLabels { handler, outcome })
        };
        let redriven = |action| {
            let handler = Arc::clone(handler);
            metrics.redriven.get_or_create_owned(&RedrivenLabels { handler, action })
        };
        let labels = HandlerLabels { handler: Arc::clone(handler) };
        Self {
            done: outcome("done"),
            filtered: outcome("filtered"),
            retry: outcome("retry"),
            reject: outcome("reject"),
            unavailable: outcome("unavailable"),
            dead: metrics.dead_letters_made.get_or_create_owned(&labels),
            seconds: metrics.call.get_or_create_owned(&labels),
            latency: metrics.latency.get_or_create_owned(&labels),
            checkpoint: metrics.checkpoint.get_or_create_owned(&labels),
            checkpoint_failures: metrics.checkpoint_failures.get_or_create_owned(&labels),
            retried: redriven("retry"),
            discarded: redriven("discard"),
        }
    }
}
