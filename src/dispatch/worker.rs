//! The tasks that call a handler: panics and timeouts stay in here (H4).
//!
//! A worker is given a chunk of events whose lanes it has to itself. A handler that answers at
//! once is called for one after the other, without a task or a message an event. As soon as a
//! call has to wait, the worker gives the rest of its chunk back, so no event waits behind
//! another lane's slow one.

use std::{
    panic::AssertUnwindSafe,
    sync::Arc,
    task::Poll,
    time::{Duration, Instant},
};

use futures_util::FutureExt as _;
use tokio::sync::mpsc;

use super::{
    lanes::{Item, LaneId, Track},
    spans,
};
use crate::{
    event::Position,
    handler::{Batching, EventHandler, HandlerError, Outcome},
    telemetry,
};

/// How long a worker goes on with a chunk before it reports, when no call has to wait.
const SLICE: Duration = Duration::from_millis(10);

/// What a worker reports.
pub(super) struct Report {
    pub(super) worker: usize,
    /// Events with their outcomes, in order.
    pub(super) results: Vec<(Item, Outcome)>,
    /// Events that were not begun, in order.
    pub(super) unstarted: Vec<Item>,
    /// The event it still has; `None` where it can take another chunk.
    pub(super) running: Option<Position>,
    /// Whether chunks of this size suit the handler.
    pub(super) pace: Pace,
    /// How long the calls took; `None` while one of them still runs.
    pub(super) took: Option<Duration>,
}

/// What a report says about the size of chunks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pace {
    /// Every call answered at once: larger chunks save messages.
    Instant,
    /// A call had to wait, or the slice was up: smaller chunks.
    Slow,
}

pub(super) struct Worker {
    pub(super) number: usize,
    pub(super) handler: Arc<dyn EventHandler>,
    pub(super) batching: Batching,
    pub(super) timeout: Duration,
    pub(super) chunks: mpsc::Receiver<Vec<Item>>,
    pub(super) reports: mpsc::UnboundedSender<Report>,
}

impl Worker {
    /// Works until the runner drops its end.
    pub(super) async fn run(mut self) {
        while let Some(chunk) = self.chunks.recv().await {
            let report = match self.batching {
                Batching::None => self.one_by_one(chunk).await,
                Batching::DistinctKeys(_) | Batching::InOrder(_) => self.together(chunk).await,
            };
            if self.reports.send(report).is_err() {
                return;
            }
        }
    }

    async fn one_by_one(&self, chunk: Vec<Item>) -> Report {
        let started = Instant::now();
        let mut results = Vec::with_capacity(chunk.len());
        let mut pace = Pace::Instant;
        let mut items = chunk.into_iter();
        while let Some(item) = items.next() {
            let spans = spans::begin(&*self.handler, std::slice::from_ref(&item));
            let outcome = {
                let call = async { self.handler.handle(&item.event).await };
                let call = telemetry::within(&spans, call);
                let mut call = std::pin::pin!(AssertUnwindSafe(call).catch_unwind());
                match futures_util::poll!(call.as_mut()) {
                    Poll::Ready(outcome) => outcome.unwrap_or_else(panicked),
                    Poll::Pending => {
                        pace = Pace::Slow;
                        if items.len() > 0 || !results.is_empty() {
                            let _ = self.reports.send(Report {
                                worker: self.number,
                                results: std::mem::take(&mut results),
                                unstarted: items.by_ref().collect(),
                                running: Some(item.position()),
                                pace,
                                took: None,
                            });
                        }
                        match tokio::time::timeout(self.timeout, call).await {
                            Ok(outcome) => outcome.unwrap_or_else(panicked),
                            Err(_) => timed_out(self.timeout),
                        }
                    }
                }
            };
            spans::end(spans, &std::iter::once((item.position(), &outcome)));
            let failed = !matches!(outcome, Outcome::Done);
            results.push((item, outcome));
            if started.elapsed() > SLICE {
                pace = Pace::Slow;
            }
            if failed || pace == Pace::Slow {
                break;
            }
        }
        Report {
            worker: self.number,
            results,
            unstarted: items.collect(),
            running: None,
            pace,
            took: Some(started.elapsed()),
        }
    }

    async fn together(&self, chunk: Vec<Item>) -> Report {
        let started = Instant::now();
        let events: Vec<_> = chunk.iter().map(|item| Arc::clone(&item.event)).collect();
        let spans = spans::begin(&*self.handler, &chunk);
        let call = async { self.handler.handle_batch(&events).await };
        let call = AssertUnwindSafe(telemetry::within(&spans, call));
        let outcomes = match tokio::time::timeout(self.timeout, call.catch_unwind()).await {
            Ok(Ok(outcomes)) => outcomes,
            whole => {
                let report = |results, unstarted| Report {
                    worker: self.number,
                    results,
                    unstarted,
                    running: None,
                    pace: Pace::Slow,
                    took: Some(started.elapsed()),
                };
                if chunk.len() > 1 {
                    spans::end(spans, &std::iter::empty());
                    // One of them may be to blame; which, they show on their own.
                    let alone = |item: Item| {
                        let track = Track { alone: true, ..item.track };
                        Item { track, ..item }
                    };
                    return report(Vec::new(), chunk.into_iter().map(alone).collect());
                }
                let outcome = match whole {
                    Ok(Err(panic)) => panicked(panic),
                    Ok(Ok(_)) | Err(_) => timed_out(self.timeout),
                };
                spans::end(spans, &chunk.iter().map(Item::position).zip(std::iter::once(&outcome)));
                return report(
                    chunk.into_iter().zip(std::iter::once(outcome)).collect(),
                    Vec::new(),
                );
            }
        };
        let (given, wanted) = (outcomes.len(), chunk.len());
        let mut outcomes = outcomes.into_iter();
        let mut results: Vec<(Item, Outcome)> = Vec::with_capacity(wanted);
        let mut unstarted = Vec::new();
        let mut failed: Vec<LaneId> = Vec::new();
        for item in chunk {
            let outcome = outcomes.next().unwrap_or_else(|| {
                Outcome::retry(HandlerError::new(format!(
                    "the handler gave {given} outcomes for {wanted} events"
                )))
            });
            if matches!(outcome, Outcome::Done) {
                results.push((item, outcome));
            } else if failed.contains(&item.lane) {
                // Behind a failed one of its lane, it was not done and spends no attempt.
                unstarted.push(item);
            } else {
                failed.push(item.lane);
                results.push((item, outcome));
            }
        }
        spans::end(spans, &results.iter().map(|(item, outcome)| (item.position(), outcome)));
        Report {
            worker: self.number,
            results,
            unstarted,
            running: None,
            pace: Pace::Instant,
            took: Some(started.elapsed()),
        }
    }
}

#[expect(clippy::needless_pass_by_value, reason = "what catch_unwind gives")]
fn panicked(panic: Box<dyn std::any::Any + Send>) -> Outcome {
    let text = panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message");
    Outcome::retry(HandlerError::new(format!("the handler panicked: {text}")))
}

fn timed_out(timeout: Duration) -> Outcome {
    Outcome::retry(HandlerError::new(format!(
        "the handler took longer than its timeout of {timeout:?}"
    )))
}
