//! The gauges of `/metrics`, set when somebody asks: a scrape asks the store for nothing.

use std::sync::Arc;

use time::OffsetDateTime;

use super::EventBus;
use crate::{
    dispatch::{HandlerState, Snapshot},
    store::{Connections, LogHealth},
    telemetry::{
        ConnectionLabels, HandlerLabels, HandlerStateLabels, SourceLabels, SourceStateLabels,
        TextFormat,
    },
    transport::SourceState,
};

impl EventBus {
    /// Brings the gauges up to date and returns `/metrics` in this format.
    #[must_use]
    pub fn metrics_text(&self, format: TextFormat) -> String {
        self.log_gauges();
        self.source_gauges();
        for handler in self.handlers() {
            self.handler_gauges(&handler);
        }
        self.inner.metrics.encode(format)
    }

    fn log_gauges(&self) {
        let log = &self.inner.log;
        let metrics = &self.inner.metrics.log;
        metrics.head.set(log.head().0);
        metrics.up.set(i64::from(log.health() == LogHealth::Writing));
        if let Some(Connections { used, idle, max }) = log.store().connections() {
            for (state, many) in [("used", used), ("idle", idle)] {
                metrics.connections.get_or_create(&ConnectionLabels { state }).set(many.into());
            }
            metrics.max_connections.set(max.into());
        }
    }

    fn source_gauges(&self) {
        let metrics = &self.inner.metrics.source;
        for source in self.sources() {
            let state = source.state.as_str();
            for word in SourceState::WORDS {
                let labels = SourceStateLabels { source: Arc::clone(&source.name), state: word };
                metrics.state.get_or_create(&labels).set(i64::from(word == state));
            }
            let labels = SourceLabels { source: source.name };
            let up = i64::from(source.state == SourceState::Consuming);
            metrics.up.get_or_create(&labels).set(up);
            metrics.oldest_held.get_or_create(&labels).set(age(source.held_since));
            if let Some(pending) = source.pending {
                metrics.pending.get_or_create(&labels).set(signed(pending));
            }
        }
    }

    fn handler_gauges(&self, handler: &Snapshot) {
        let metrics = &self.inner.metrics.handler;
        let state = handler.state.as_str();
        for word in HandlerState::WORDS {
            let labels = HandlerStateLabels { handler: Arc::clone(&handler.name), state: word };
            metrics.state.get_or_create(&labels).set(i64::from(word == state));
        }
        let labels = HandlerLabels { handler: Arc::clone(&handler.name) };
        let up = i64::from(handler.state == HandlerState::Running);
        metrics.up.get_or_create(&labels).set(up);
        metrics.position.get_or_create(&labels).set(handler.position.0);
        let lag = self.inner.log.head().0.saturating_sub(handler.position.0);
        metrics.lag_events.get_or_create(&labels).set(signed(lag));
        let oldest = self.oldest_unfinished(handler);
        // Where it is not known yet, what was said before is nearer than nothing.
        if oldest.is_some() || lag == 0 {
            metrics.lag_seconds.get_or_create(&labels).set(age(oldest));
        }
        metrics.in_flight.get_or_create(&labels).set(signed(handler.in_flight));
        let begun = handler.oldest_call.map(|(_, begun)| begun);
        metrics.oldest_call.get_or_create(&labels).set(age(begun));
        metrics.retrying.get_or_create(&labels).set(signed(handler.retrying));
        metrics.parked.get_or_create(&labels).set(signed(handler.parked));
        metrics.blocked_keys.get_or_create(&labels).set(signed(handler.blocked_keys));
        metrics.dead_letters.get_or_create(&labels).set(signed(handler.dead));
        if let Some(at) = handler.last_progress {
            let unix = (at - OffsetDateTime::UNIX_EPOCH).as_seconds_f64();
            metrics.last_progress.get_or_create(&labels).set(unix);
        }
    }
}

fn signed(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

/// How long ago that was, in seconds; 0 where it has not been.
fn age(since: Option<OffsetDateTime>) -> f64 {
    since.map_or(0.0, |since| (OffsetDateTime::now_utc() - since).as_seconds_f64().max(0.0))
}
