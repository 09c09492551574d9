//! Spans: what is done with an event, as part of the event's trace.
//!
//! There are spans only for events whose trace is sampled, and only while something exports
//! them; else a [`Span`] is nothing, and no call on it does anything. In a binary without the
//! feature `otlp` that is so from the start, and the compiler knows.

use std::{
    future::Future,
    sync::{
        OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    time::SystemTime,
};

use tokio::sync::mpsc;
use uuid::Uuid;

use crate::event::{Position, StoredEvent, TraceContext, tracestate};

/// What a span is to those on its other side: OpenTelemetry's span kinds, by their numbers in
/// OTLP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Neither.
    Internal = 1,
    /// Asks another system, and waits for its answer.
    Client = 3,
    /// Sends a message.
    Producer = 4,
    /// Takes a message.
    Consumer = 5,
}

/// The value of an attribute.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Value {
    Text(Box<str>),
    Int(i64),
    Bool(bool),
}

impl From<&str> for Value {
    fn from(text: &str) -> Self {
        Self::Text(text.into())
    }
}

impl From<u64> for Value {
    fn from(number: u64) -> Self {
        Self::Int(i64::try_from(number).unwrap_or(i64::MAX))
    }
}

impl From<bool> for Value {
    fn from(value: bool) -> Self {
        Self::Bool(value)
    }
}

/// A span that has ended, as it is exported.
#[derive(Debug, Clone)]
#[cfg_attr(not(feature = "otlp"), expect(dead_code, reason = "nothing exports it"))]
pub(crate) struct Record {
    pub(crate) context: TraceContext,
    pub(crate) parent: Option<u64>,
    pub(crate) state: Option<Box<str>>,
    pub(crate) kind: Kind,
    pub(crate) name: String,
    pub(crate) begun: SystemTime,
    pub(crate) ended: SystemTime,
    pub(crate) attributes: Vec<(&'static str, Value)>,
    pub(crate) link: Option<TraceContext>,
    pub(crate) error: Option<Box<str>>,
}

/// Where spans go when they have ended: a bounded queue to whoever exports them. A full one
/// drops, and counts.
#[derive(Debug)]
pub(crate) struct Recorder {
    queue: mpsc::Sender<Record>,
    dropped: AtomicU64,
    /// A trace begun here is sampled where the last 56 bits of its id, which are random, are below
    /// this.
    sampled_below: u64,
}

/// One a process, as for the lines of its log: an event has no bus.
static RECORDER: OnceLock<Recorder> = OnceLock::new();

impl Recorder {
    /// Of traces begun here this share is sampled, 0 to 1; `spans` may wait to be exported.
    #[cfg_attr(not(feature = "otlp"), expect(dead_code, reason = "nothing exports"))]
    pub(crate) fn new(sample_ratio: f64, spans: usize) -> (Self, mpsc::Receiver<Record>) {
        let (queue, ended) = mpsc::channel(spans.max(1));
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            clippy::cast_precision_loss,
            reason = "a share of 2^56, not negative; a few bits more or less are no matter"
        )]
        let sampled_below = (sample_ratio.clamp(0.0, 1.0) * (1_u64 << 56) as f64) as u64;
        (Self { queue, dropped: AtomicU64::new(0), sampled_below }, ended)
    }

    /// Makes it the one of this process; whether there was none yet.
    #[cfg_attr(not(feature = "otlp"), expect(dead_code, reason = "nothing exports"))]
    pub(crate) fn install(self) -> bool {
        RECORDER.set(self).is_ok()
    }

    /// How many have been dropped so far.
    #[cfg_attr(not(feature = "otlp"), expect(dead_code, reason = "nothing exports"))]
    pub(crate) fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }

    fn record(&self, record: Record) {
        if self.queue.try_send(record).is_err() {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    const fn samples(&self, trace: u128) -> bool {
        #[expect(clippy::cast_possible_truncation, reason = "the last 56 bits")]
        let low = trace as u64 & (u64::MAX >> 8);
        low < self.sampled_below
    }
}

/// Where ended spans go, if anywhere.
pub(crate) fn recorder() -> Option<&'static Recorder> {
    if cfg!(feature = "otlp") { RECORDER.get() } else { None }
}

/// Whether spans are exported.
#[inline]
pub(crate) fn are_exported() -> bool {
    recorder().is_some()
}

/// Something that is being done with an event, if anybody wants to know.
#[derive(Debug, Default)]
#[must_use]
pub(crate) struct Span(Option<Box<Record>>);

impl Span {
    /// Nothing.
    pub(crate) const NONE: Self = Self(None);

    /// A part of the trace the event is in.
    pub(crate) fn of(event: &crate::event::Event, kind: Kind, name: impl Fn() -> String) -> Self {
        if !are_exported() {
            return Self::NONE;
        }
        match TraceContext::of(event).filter(TraceContext::is_sampled) {
            Some(parent) => {
                let state = tracestate(event).map(Into::into);
                Self::start(
                    parent.with_span(fresh_span()),
                    Some(parent.span_id()),
                    state,
                    kind,
                    name(),
                )
            }
            None => Self::NONE,
        }
    }

    /// The first of a new trace, where the event's own trace is sampled; it is linked to that.
    pub(crate) fn linked(
        event: &crate::event::Event,
        kind: Kind,
        name: impl Fn() -> String,
    ) -> Self {
        if !are_exported() {
            return Self::NONE;
        }
        let old = TraceContext::of(event).filter(TraceContext::is_sampled);
        let Some((old, new)) = old.and_then(|old| Some((old, fresh_trace(true)?))) else {
            return Self::NONE;
        };
        let mut span = Self::start(new, None, None, kind, name());
        if let Some(record) = &mut span.0 {
            record.link = Some(old);
        }
        span
    }

    /// The first of a new trace, where chance wants it sampled.
    pub(crate) fn first(kind: Kind, name: impl Fn() -> String) -> Self {
        let Some(recorder) = recorder() else { return Self::NONE };
        match fresh_trace(true) {
            Some(context) if recorder.samples(context.trace_id()) => {
                Self::start(context, None, None, kind, name())
            }
            _ => Self::NONE,
        }
    }

    /// A part of this one.
    pub(crate) fn child(&self, kind: Kind, name: impl Fn() -> String) -> Self {
        match &self.0 {
            Some(record) => {
                let (context, state) = (record.context, record.state.clone());
                let own = context.with_span(fresh_span());
                Self::start(own, Some(context.span_id()), state, kind, name())
            }
            None => Self::NONE,
        }
    }

    fn start(
        context: TraceContext,
        parent: Option<u64>,
        state: Option<Box<str>>,
        kind: Kind,
        name: String,
    ) -> Self {
        let now = SystemTime::now();
        Self(Some(Box::new(Record {
            context,
            parent,
            state,
            kind,
            name,
            begun: now,
            ended: now,
            attributes: Vec::new(),
            link: None,
            error: None,
        })))
    }

    /// Whether anybody wants to know.
    pub(crate) const fn is_some(&self) -> bool {
        self.0.is_some()
    }

    /// What continues it says this.
    pub(crate) fn context(&self) -> Option<TraceContext> {
        self.0.as_ref().map(|record| record.context)
    }

    /// Says more about it.
    pub(crate) fn set(&mut self, name: &'static str, value: impl Into<Value>) {
        if let Some(record) = &mut self.0 {
            record.attributes.push((name, value.into()));
        }
    }

    /// It did not work, for this reason.
    pub(crate) fn fail(&mut self, reason: &str) {
        if let Some(record) = &mut self.0 {
            record.error = Some(reason.into());
        }
    }

    /// It has ended, now.
    pub(crate) fn end(self) {
        if let (Some(mut record), Some(recorder)) = (self.0, recorder()) {
            record.ended = SystemTime::now();
            recorder.record(*record);
        }
    }

    /// What CloudEvents and OpenTelemetry's conventions for messages call an event's attributes.
    pub(crate) fn describe(&mut self, event: &crate::event::Event) {
        if self.0.is_none() {
            return;
        }
        let origin = event.origin();
        let system = match &*origin.transport {
            "amqp" => "rabbitmq",
            other => other,
        };
        self.set("messaging.system", system);
        let destination = origin.channel.as_deref().unwrap_or(&origin.source);
        self.set("messaging.destination.name", destination);
        self.set("messaging.message.id", event.id());
        self.set("messaging.message.body.size", event.body().len() as u64);
        self.set("cloudevents.event_id", event.id());
        self.set("cloudevents.event_source", event.source());
        self.set("cloudevents.event_type", event.kind());
        if let Some(subject) = event.subject() {
            self.set("cloudevents.event_subject", subject);
        }
    }
}

/// A span's id, made at random; of 64 bits two are fixed, so that it is never zero.
fn fresh_span() -> u64 {
    Uuid::new_v4().as_u64_pair().1
}

/// A trace's and its first span's. The last seven bytes of the trace id are random, as level 2
/// of the recommendation wants it of those that say they are.
fn fresh_trace(sampled: bool) -> Option<TraceContext> {
    TraceContext::new(Uuid::new_v4().as_u128(), fresh_span(), sampled)
}

tokio::task_local! {
    /// The spans of the call of a handler that is under way, by position.
    static HANDLING: Vec<(Position, TraceContext)>;
}

/// Calls a handler within the spans of the events it is called for.
pub(crate) async fn within<F: Future>(spans: &[(Position, Span)], call: F) -> F::Output {
    let contexts: Vec<_> =
        spans.iter().filter_map(|(position, span)| Some((*position, span.context()?))).collect();
    if contexts.is_empty() { call.await } else { HANDLING.scope(contexts, call).await }
}

/// What a handler that sends something on for an event says there as `traceparent`, so that the
/// trace goes on: the call of it that is under way, where spans are exported and the event's
/// trace is sampled; else the event's own, if it has one.
///
/// *Concurrency*: asked from within [`handle`](crate::handler::EventHandler::handle) or
/// [`handle_batch`](crate::handler::EventHandler::handle_batch), not from a task they start.
#[must_use]
pub fn trace_of(event: &StoredEvent) -> Option<TraceContext> {
    handling(event.position).or_else(|| TraceContext::of(event))
}

/// The span of the call that is under way for this event.
fn handling(position: Position) -> Option<TraceContext> {
    if !are_exported() {
        return None;
    }
    let find = |all: &Vec<(Position, TraceContext)>| {
        all.iter().find(|(at, _)| *at == position).map(|(_, context)| *context)
    };
    HANDLING.try_with(find).ok().flatten()
}

/// A part of the call of a handler that is under way for this event.
pub(crate) fn within_call(event: &StoredEvent, kind: Kind, name: impl Fn() -> String) -> Span {
    match handling(event.position) {
        Some(call) => {
            // What other systems say of a trace is not true of one that begins anew.
            let goes_on =
                TraceContext::of(event).is_some_and(|own| own.trace_id() == call.trace_id());
            let state = tracestate(event).filter(|_| goes_on).map(Into::into);
            Span::start(call.with_span(fresh_span()), Some(call.span_id()), state, kind, name())
        }
        None => Span::NONE,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_many_traces_are_sampled_as_was_asked_for() {
        for (ratio, expected) in [(0.0, 0..=0), (0.25, 2_200..=2_800), (1.0, 10_000..=10_000)] {
            let (recorder, _ended) = Recorder::new(ratio, 1);
            let sampled = (0..10_000)
                .filter(|_| recorder.samples(fresh_trace(true).unwrap().trace_id()))
                .count();
            assert!(expected.contains(&sampled), "{ratio}: {sampled}");
        }
    }

    #[test]
    fn G7_a_full_queue_drops_and_counts() {
        let (recorder, _ended) = Recorder::new(1.0, 2);
        for _ in 0..5 {
            let context = fresh_trace(true).unwrap();
            let span = Span::start(context, None, None, Kind::Internal, "x".to_owned());
            recorder.record(*span.0.unwrap());
        }
        assert_eq!(recorder.dropped(), 3);
    }
}
