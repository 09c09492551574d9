//! What becomes of an event when its worker reports.

use std::time::{Duration, Instant};

use super::Runner;
use crate::{
    dispatch::{
        journal,
        lanes::{Item, Turn},
        outage::Outage,
        worker::{Pace, Report},
    },
    handler::{HandlerError, Outcome},
    store::progress::{Failure, Unfinished},
};

/// Events a chunk holds at most, for handlers that take one at a time.
const MAX_CHUNK: usize = 256;

/// The longest a handler can ask to be left alone for.
pub(super) const MAX_DELAY: Duration = Duration::from_secs(24 * 3_600);

impl Runner {
    /// Takes what a worker reports.
    pub(super) fn take(&mut self, report: Report) {
        let Report { worker, results, unstarted, idle, pace, took } = report;
        if idle {
            self.idle.push(worker);
            if let Some(busy) = self.busy.get_mut(worker) {
                *busy = None;
            }
        }
        match pace {
            Pace::Instant => self.chunk = (self.chunk * 2).min(MAX_CHUNK),
            Pace::Slow => self.chunk = (self.chunk / 4).max(1),
        }
        if let Some(took) = took {
            self.counters.seconds.observe(took.as_secs_f64());
        }
        let probed = self.outage.as_ref().is_some_and(|o| o.probe == Some(worker)) && idle;
        if probed && let Some(outage) = &mut self.outage {
            outage.probe = None;
        }
        let mut again = Vec::new();
        let mut done = 0;
        let mut answered = false;
        let mut suspended = false;
        for (item, outcome) in results {
            match outcome {
                Outcome::Done => {
                    done += 1;
                    answered = true;
                    self.finish(&item);
                }
                Outcome::Retry { error, after } => {
                    self.counters.retry.inc();
                    again.extend(self.failed(item, &error, after));
                }
                Outcome::Reject { error } => {
                    answered = true;
                    self.counters.reject.inc();
                    again.extend(self.bury(item, &error));
                }
                Outcome::Unavailable { error, after } => {
                    self.counters.unavailable.inc();
                    if !suspended {
                        suspended = true;
                        self.suspend(error, after, probed);
                    }
                    again.push((item, Turn::Now));
                }
            }
        }
        self.counters.done.inc_by(done);
        if answered && !suspended {
            self.outage = None;
        } else if probed && !suspended {
            // A panic, a timeout or a failure of this event says nothing of the target: probe
            // again, at the same pace.
            if let Some(outage) = &mut self.outage {
                outage.postpone(None);
            }
        }
        // Back to the front of their lanes, last one first, so that they keep their order.
        let unstarted = unstarted.into_iter().map(|item| (item, Turn::Now));
        for (item, turn) in again.into_iter().chain(unstarted).rev() {
            self.lanes.again(item, turn);
        }
        self.status.set_position(self.window.cursor());
    }

    /// It is done with: the lane goes on, and so may the cursor.
    fn finish(&mut self, item: &Item) {
        self.window.finish(item.position());
        if item.track.kept {
            self.journal.finish(item.position());
        }
        self.lanes.finish(item);
    }

    /// A failed attempt: the event waits, with its lane, or is dead after the last one.
    fn failed(
        &mut self,
        mut item: Item,
        error: &HandlerError,
        after: Option<Duration>,
    ) -> Option<(Item, Turn)> {
        let attempts = item.track.attempts + 1;
        if attempts >= self.options.retry.attempts() {
            return self.bury(item, error);
        }
        note(&mut item, error);
        let delay = after
            .map_or_else(|| self.options.retry.delay_after(attempts), |after| after.min(MAX_DELAY));
        tracing::debug!(
            handler = &*self.name,
            position = item.position().0,
            id = item.event.id(),
            key = item.event.key(),
            attempts,
            %error,
            ?delay,
            "attempt failed"
        );
        Some((item, Turn::At(Instant::now() + delay)))
    }

    /// The event will not work: a dead letter, which stays at the front of its lane if it parks
    /// it.
    fn bury(&mut self, mut item: Item, error: &HandlerError) -> Option<(Item, Turn)> {
        note(&mut item, error);
        let event = &item.event;
        tracing::warn!(
            handler = &*self.name,
            position = event.position.0,
            id = event.id(),
            kind = event.kind(),
            key = event.key(),
            attempts = item.track.attempts,
            %error,
            "dead letter"
        );
        self.counters.dead.inc();
        self.status.add_dead(1);
        if self.parks(item.lane, item.event.id()) {
            return Some((item, Turn::Dead));
        }
        let failure = item.track.failure.take().map(|failure| *failure);
        let row = Unfinished {
            position: item.position(),
            id: item.event.id().into(),
            kind: item.event.kind().into(),
            key: self.key_of(&item.event),
            standing: self.dead(),
            attempts: item.track.attempts,
            failure,
        };
        self.journal.keep(row);
        self.window.finish(item.position());
        self.lanes.finish(&item);
        None
    }

    /// The target is down: nothing new is begun until a probe gets through. What was begun
    /// before comes back with the same news: one outage, one step of its backoff a probe.
    fn suspend(&mut self, reason: HandlerError, after: Option<Duration>, probed: bool) {
        let first = self.outage.is_none();
        let outage = self.outage.get_or_insert_with(|| Outage::new(reason.clone()));
        outage.reason = reason;
        if first || probed {
            outage.postpone(after.map(|after| after.min(MAX_DELAY)));
        }
    }
}

/// Counts a failed attempt, and writes down why.
fn note(item: &mut Item, error: &HandlerError) {
    let now = crate::event::now();
    let failure = Failure {
        first_error: error.as_str().into(),
        last_error: error.as_str().into(),
        first_failed_at: now,
        last_failed_at: now,
    };
    let track = &mut item.track;
    track.attempts += 1;
    track.failure = Some(Box::new(match track.failure.take() {
        Some(before) => journal::continued(failure, &before),
        None => failure,
    }));
}
