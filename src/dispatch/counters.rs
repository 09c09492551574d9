//! A handler's series.

use std::sync::Arc;

use prometheus_client::metrics::{counter::Counter, histogram::Histogram};

use crate::telemetry::{HandlerLabels, Metrics, OutcomeLabels};

/// A handler's series, looked up once.
pub(super) struct Counters {
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
        let outcome = |outcome| {
            let handler = Arc::clone(handler);
            metrics.handled.get_or_create_owned(&OutcomeLabels { handler, outcome })
        };
        let labels = HandlerLabels { handler: Arc::clone(handler) };
        Self {
            done: outcome("done"),
            filtered: outcome("filtered"),
            retry: outcome("retry"),
            reject: outcome("reject"),
            unavailable: outcome("unavailable"),
            dead: metrics.dead.get_or_create_owned(&labels),
            seconds: metrics.handler_seconds.get_or_create_owned(&labels),
        }
    }
}
