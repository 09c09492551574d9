//! The spans of the calls of a handler: one an event and attempt.
//!
//! Each is a part of the trace that the event came with, however long ago that was and in
//! whichever process. What is handled again because a person wanted it (rewind, rebuild, retry of
//! a dead letter) begins a trace of its own, linked to the first.

use super::lanes::Item;
use crate::{
    event::Position,
    handler::{EventHandler, Outcome},
    telemetry::{Kind, Span, are_exported},
};

/// The spans of a call that is about to be made for these; only of those that are sampled.
pub(super) fn begin(handler: &dyn EventHandler, items: &[Item]) -> Vec<(Position, Span)> {
    if !are_exported() {
        return Vec::new();
    }
    let span = |item: &Item| {
        let name = || format!("handle {}", handler.name());
        let event = &item.event.event;
        let mut span = if item.track.replay {
            Span::linked(event, Kind::Consumer, name)
        } else {
            Span::of(event, Kind::Consumer, name)
        };
        if !span.is_some() {
            return None;
        }
        span.describe(event);
        span.set("messaging.operation.name", "handle");
        span.set("messaging.operation.type", "process");
        span.set("messaging.consumer.group.name", handler.name());
        span.set("pulsebus.handler", handler.name());
        span.set("pulsebus.handler.kind", handler.kind());
        span.set("pulsebus.position", item.position().0);
        span.set("pulsebus.attempt", u64::from(item.track.attempts) + 1);
        span.set("pulsebus.replay", item.track.replay);
        if items.len() > 1 {
            span.set("messaging.batch.message_count", items.len() as u64);
        }
        Some((item.position(), span))
    };
    items.iter().filter_map(span).collect()
}

/// The call has had these outcomes.
pub(super) fn end<'a>(
    spans: Vec<(Position, Span)>,
    outcomes: &(impl Iterator<Item = (Position, &'a Outcome)> + Clone),
) {
    for (position, mut span) in spans {
        let outcome = outcomes.clone().find(|(at, _)| *at == position);
        let (word, error) = match outcome.map(|(_, outcome)| outcome) {
            Some(Outcome::Done) => ("done", None),
            Some(Outcome::Retry { error, .. }) => ("retry", Some(error)),
            Some(Outcome::Reject { error }) => ("reject", Some(error)),
            Some(Outcome::Unavailable { error, .. }) => ("unavailable", Some(error)),
            // It is called again: alone, or after an earlier one of its lane.
            None => ("not begun", None),
        };
        span.set("pulsebus.outcome", word);
        if let Some(error) = error {
            span.set("error.type", word);
            span.fail(error.as_str());
        }
        span.end();
    }
}
