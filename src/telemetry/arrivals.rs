//! The spans of events on their way into the log.
//!
//! An event's `ingest` span is a part of the trace it came with, or the first of one that begins
//! here; from its decoding until it is settled. The `append` span below it lasts from its
//! submission to the log until the commit that it is in. A commit is for events of many traces,
//! so each of them has a span of its own there, rather than all of them one in a trace of nobody.

use super::spans::{Kind, Span, are_exported};
use crate::event::{Event, Position, TRACEPARENT, TraceContext};

/// The spans of messages that were taken together: only of those that are sampled.
#[derive(Debug, Default)]
pub(crate) struct Arrivals(Vec<Arrival>);

#[derive(Debug)]
struct Arrival {
    /// Its place among the messages.
    at: usize,
    ingest: Span,
    append: Span,
}

impl Arrivals {
    /// None yet.
    pub(crate) const fn begin() -> Self {
        Self(Vec::new())
    }

    /// An event has been decoded. Where it says nothing of a trace one begins here, if chance
    /// wants it; the event then has it as its header `traceparent`, so that whoever handles it
    /// later goes on with it.
    pub(crate) fn add(&mut self, at: usize, event: &mut Event) {
        if !are_exported() {
            return;
        }
        let name = |event: &Event| {
            let origin = event.origin();
            format!("ingest {}", origin.channel.as_deref().unwrap_or(&origin.source))
        };
        let mut ingest = if TraceContext::is_said_by(event) {
            Span::of(event, Kind::Consumer, || name(event))
        } else {
            let first = Span::first(Kind::Consumer, || name(event));
            if let Some(context) = first.context() {
                event.headers.push(TRACEPARENT, context.to_string());
            }
            first
        };
        if !ingest.is_some() {
            return;
        }
        ingest.describe(event);
        ingest.set("messaging.operation.name", "ingest");
        ingest.set("messaging.operation.type", "receive");
        ingest.set("pulsebus.source", &*event.origin().source);
        self.0.push(Arrival { at, ingest, append: Span::NONE });
    }

    /// They are given to the log now.
    pub(crate) fn appending(&mut self) {
        for arrival in &mut self.0 {
            arrival.append = arrival.ingest.child(Kind::Internal, || "append".to_owned());
        }
    }

    /// The log has committed them: each one's position, and whether that is of a copy that was
    /// there before. What has none is in quarantine.
    pub(crate) fn appended(mut self, place: impl Fn(usize) -> Option<(Position, bool)>) -> Self {
        for Arrival { at, ingest, append } in &mut self.0 {
            let place = place(*at);
            for span in [&mut *ingest, &mut *append] {
                match place {
                    Some((position, duplicate)) => {
                        span.set("pulsebus.position", position.0);
                        span.set("pulsebus.duplicate", duplicate);
                    }
                    None => span.fail("the log did not take it: it is in quarantine"),
                }
            }
            std::mem::take(append).end();
        }
        self
    }

    /// They are settled.
    pub(crate) fn end(self) {
        for arrival in self.0 {
            arrival.ingest.end();
        }
    }
}
