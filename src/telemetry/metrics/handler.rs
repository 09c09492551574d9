//! What becomes of events in handlers.

use std::sync::{Arc, atomic::AtomicU64};

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::{Registry, Unit},
};

use super::{Float, Histograms, age, work};

/// The handler a metric is about.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct HandlerLabels {
    /// Its configured name.
    pub handler: Arc<str>,
}

/// A handler and a state it can be in.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct HandlerStateLabels {
    /// Its configured name.
    pub handler: Arc<str>,
    /// A word of [`HandlerState`](crate::dispatch::HandlerState).
    pub state: &'static str,
}

/// A handler, and how an event ended in it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct OutcomeLabels {
    /// Its configured name.
    pub handler: Arc<str>,
    /// `done`, `filtered`, `retry`, `reject` or `unavailable`.
    pub outcome: &'static str,
}

/// A handler, and what a person has decided on dead letters of it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct RedrivenLabels {
    /// Its configured name.
    pub handler: Arc<str>,
    /// `retry` or `discard`.
    pub action: &'static str,
}

/// What becomes of events in handlers.
#[derive(Debug, Clone)]
pub struct HandlerMetrics {
    /// Whether it is running: 1 or 0.
    pub up: Family<HandlerLabels, Gauge>,
    /// 1 for the state it is in, 0 for the others.
    pub state: Family<HandlerStateLabels, Gauge>,
    /// Its cursor.
    pub position: Family<HandlerLabels, Gauge<u64, AtomicU64>>,
    /// Events between its cursor and the head of the log.
    pub lag_events: Family<HandlerLabels, Gauge>,
    /// Age of the event behind its cursor; 0 where there is none.
    pub lag_seconds: Family<HandlerLabels, Float>,
    /// Events it has read and not finished.
    pub in_flight: Family<HandlerLabels, Gauge>,
    /// How long its longest call has been under way; 0 where there is none.
    pub oldest_call: Family<HandlerLabels, Float>,
    /// Keys whose first event waits for another attempt.
    pub retrying: Family<HandlerLabels, Gauge>,
    /// Events waiting behind a failed or dead one of their key.
    pub parked: Family<HandlerLabels, Gauge>,
    /// Keys that do not flow: retrying, or behind a dead letter.
    pub blocked_keys: Family<HandlerLabels, Gauge>,
    /// Dead letters that wait for a person.
    pub dead_letters: Family<HandlerLabels, Gauge>,
    /// Dead letters made.
    pub dead_letters_made: Family<HandlerLabels, Counter>,
    /// Dead letters taken up by redrives.
    pub redriven: Family<RedrivenLabels, Counter>,
    /// Outcomes of events.
    pub outcomes: Family<OutcomeLabels, Counter>,
    /// A call: one observation a call, or a run of calls that answered at once.
    pub call: Histograms<HandlerLabels>,
    /// From an event's commit to its end: one observation a report of a worker, of the first event
    /// in it that was done.
    pub latency: Histograms<HandlerLabels>,
    /// A checkpoint: the handler's flush and the store's write.
    pub checkpoint: Histograms<HandlerLabels>,
    /// Checkpoints that failed and were tried again.
    pub checkpoint_failures: Family<HandlerLabels, Counter>,
    /// When an event ended last.
    pub last_progress: Family<HandlerLabels, Float>,
}

impl Default for HandlerMetrics {
    fn default() -> Self {
        Self {
            up: Family::default(),
            state: Family::default(),
            position: Family::default(),
            lag_events: Family::default(),
            lag_seconds: Family::default(),
            in_flight: Family::default(),
            oldest_call: Family::default(),
            retrying: Family::default(),
            parked: Family::default(),
            blocked_keys: Family::default(),
            dead_letters: Family::default(),
            dead_letters_made: Family::default(),
            redriven: Family::default(),
            outcomes: Family::default(),
            call: Histograms::new_with_constructor(work),
            latency: Histograms::new_with_constructor(age),
            checkpoint: Histograms::new_with_constructor(work),
            checkpoint_failures: Family::default(),
            last_progress: Family::default(),
        }
    }
}

impl HandlerMetrics {
    /// Takes away the gauges of a handler that is gone; what has been counted stays.
    pub(crate) fn forget(&self, labels: &HandlerLabels, states: &[&'static str]) {
        for gauge in [
            &self.up,
            &self.lag_events,
            &self.in_flight,
            &self.retrying,
            &self.parked,
            &self.blocked_keys,
            &self.dead_letters,
        ] {
            gauge.remove(labels);
        }
        for gauge in [&self.lag_seconds, &self.oldest_call, &self.last_progress] {
            gauge.remove(labels);
        }
        self.position.remove(labels);
        for state in states {
            self.state.remove(&HandlerStateLabels { handler: Arc::clone(&labels.handler), state });
        }
    }

    pub(super) fn register(&self, registry: &mut Registry) {
        let r = registry.sub_registry_with_prefix("handler");
        r.register("up", "Whether the handler is running", self.up.clone());
        r.register("state", "1 for the state the handler is in", self.state.clone());
        r.register("position", "Cursor of the handler", self.position.clone());
        r.register(
            "lag_events",
            "Events between the handler's cursor and the head of the log",
            self.lag_events.clone(),
        );
        r.register_with_unit(
            "lag",
            "Age of the event behind the handler's cursor",
            Unit::Seconds,
            self.lag_seconds.clone(),
        );
        r.register("in_flight", "Events read and not finished", self.in_flight.clone());
        r.register_with_unit(
            "oldest_call",
            "How long the longest call under way has taken so far",
            Unit::Seconds,
            self.oldest_call.clone(),
        );
        r.register(
            "retrying",
            "Keys whose first event waits for another attempt",
            self.retrying.clone(),
        );
        r.register(
            "parked",
            "Events waiting behind a failed or dead one of their key",
            self.parked.clone(),
        );
        r.register(
            "blocked_keys",
            "Keys that wait for another attempt or behind a dead letter",
            self.blocked_keys.clone(),
        );
        r.register(
            "dead_letters",
            "Dead letters that wait for a person",
            self.dead_letters.clone(),
        );
        r.register("dead_letters_made", "Dead letters made", self.dead_letters_made.clone());
        r.register("redriven", "Dead letters taken up by redrives", self.redriven.clone());
        r.register("outcomes", "Outcomes of events in the handler", self.outcomes.clone());
        r.register_with_unit(
            "call",
            "Time a call of the handler takes",
            Unit::Seconds,
            self.call.clone(),
        );
        r.register_with_unit(
            "latency",
            "Time from an event's commit to its being handled",
            Unit::Seconds,
            self.latency.clone(),
        );
        r.register_with_unit(
            "checkpoint",
            "Time it takes to flush the handler and save its progress",
            Unit::Seconds,
            self.checkpoint.clone(),
        );
        r.register(
            "checkpoint_failures",
            "Checkpoints that failed and were tried again",
            self.checkpoint_failures.clone(),
        );
        r.register_with_unit(
            "last_progress_timestamp",
            "When an event ended in the handler last, in Unix time",
            Unit::Seconds,
            self.last_progress.clone(),
        );
    }
}
