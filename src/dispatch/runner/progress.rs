//! Checkpoints, and the claim they are made under.

use std::{panic::AssertUnwindSafe, sync::Arc, time::Instant};

use futures_util::FutureExt as _;

use super::{Runner, beat::Call};
use crate::{
    dispatch::{
        Ordering,
        lanes::{Lanes, Turn},
        outage::Trouble,
        resume::FLUSH_TIMEOUT,
    },
    event::{Position, StoredEvent},
    handler::HandlerError,
    store::{
        StoreError,
        progress::{Change, Checkpoint, Standing, Unfinished},
    },
};

/// Changes held at most while the store does not take them: then nothing more is begun.
pub(super) const MAX_UNSAVED: usize = 20_000;

/// A checkpoint under way.
pub(super) struct Saving {
    cursor: Position,
    settled: Position,
    /// It has what was redriven last.
    redriven: bool,
    begun: Instant,
    pub(super) done: Call<Result<(), NotSaved>>,
}

/// A checkpoint that did not happen, or may not have.
pub(super) struct NotSaved {
    reason: String,
    fenced: bool,
    changes: Vec<Change>,
}

impl Runner {
    /// Whether there is something to save.
    pub(super) fn dirty(&self) -> bool {
        self.window.cursor() > self.saved || !self.journal.is_empty() || self.lanes.has_spillable()
    }

    /// Starts a checkpoint when one is due.
    pub(super) fn checkpoint(&mut self, now: Instant) {
        if self.saving.is_some() || self.fenced || !self.dirty() {
            return;
        }
        let due = self.draining
            || self.rewind.is_some()
            || self.redriving.unsaved
            || self.window.cursor().0 - self.saved.0 >= self.options.checkpoint_events
            || self.journal.len() >= MAX_UNSAVED / 2
            || (self.is_full() && self.lanes.has_spillable())
            || self.saved_at.is_none_or(|at| at + self.options.checkpoint_interval <= now);
        let ending = self.draining || self.rewind.is_some();
        let not_yet = ending && (self.lanes.running() > 0 || self.save_trouble.is_some());
        if !due || not_yet || Trouble::waits(self.save_trouble.as_ref(), now) {
            return;
        }
        self.spill();
        let cursor = self.window.cursor();
        let settled = self.journal.settled(cursor);
        let checkpoint = Checkpoint {
            handler: Arc::clone(&self.name),
            epoch: self.epoch,
            cursor,
            changes: self.journal.take(),
        };
        let handler = Arc::clone(&self.handler);
        let log = Arc::clone(&self.log);
        let done = Call::new(now, async move {
            let steps = async {
                tokio::time::timeout(FLUSH_TIMEOUT, handler.flush(cursor))
                    .await
                    .map_err(|_| (format!("flush took longer than {FLUSH_TIMEOUT:?}"), false))?
                    .map_err(|error| (format!("flush failed: {error}"), false))?;
                log.store()
                    .checkpoint(&checkpoint)
                    .await
                    .map_err(|error| (error.to_string(), matches!(error, StoreError::Fenced(_))))
            };
            let (reason, fenced) = match AssertUnwindSafe(steps).catch_unwind().await {
                Ok(Ok(())) => return Ok(()),
                Ok(Err(failed)) => failed,
                Err(_) => ("flush panicked".to_owned(), false),
            };
            Err(NotSaved { reason, fenced, changes: checkpoint.changes })
        });
        let redriven = self.redriving.unsaved;
        self.saving = Some(Saving { cursor, settled, redriven, begun: now, done });
    }

    /// Turns what waits in blocked lanes into rows, so that the cursor can pass it.
    fn spill(&mut self) {
        if !self.lanes.has_spillable() {
            return;
        }
        let (now, utc, dead) = (Instant::now(), crate::event::now(), self.dead());
        // Out and in again: what the rows say is asked of the rest of the runner.
        let mut lanes = std::mem::replace(&mut self.lanes, Lanes::new(0));
        lanes.spill(|event, entry| {
            let standing = match entry.turn {
                Turn::Now => Standing::Parked,
                Turn::At(at) => Standing::Retrying {
                    due_at: crate::event::to_micros(utc + at.saturating_duration_since(now)),
                },
                Turn::Dead => dead,
            };
            self.journal.keep(Unfinished {
                position: entry.position,
                id: event.id().into(),
                kind: event.kind().into(),
                key: self.key_of(event),
                standing,
                attempts: entry.track.attempts,
                failure: entry.track.failure.take().map(|failure| *failure),
            });
            self.window.finish(entry.position);
        });
        self.lanes = lanes;
        self.status.set_position(self.window.cursor());
    }

    /// Where a dead letter stands, when it has just become one.
    pub(super) const fn dead(&self) -> Standing {
        Standing::Dead { unpublished: self.buried.is_some() }
    }

    /// What the handler keeps in order, as rows have it.
    pub(super) fn key_of(&self, event: &StoredEvent) -> Arc<str> {
        match self.options.ordering {
            Ordering::Key => self.handler.lane(event).into(),
            Ordering::None => event.key().into(),
        }
    }

    pub(super) fn checkpointed(&mut self, result: Result<(), NotSaved>) {
        let Some(saving) = self.saving.take() else { return };
        self.saved_at = Some(Instant::now());
        self.counters.checkpoint.observe(saving.begun.elapsed().as_secs_f64());
        match result {
            Ok(()) => {
                self.saved = saving.cursor;
                self.status.set_settled(saving.settled);
                self.save_trouble = None;
                if saving.redriven {
                    self.redriving.saved();
                }
                if let Some(buried) = &self.buried {
                    buried.notify_one();
                }
            }
            Err(NotSaved { reason, fenced, changes }) => {
                self.fenced |= fenced;
                self.journal.restore(changes);
                self.counters.checkpoint_failures.inc();
                let reason = format!("the checkpoint failed: {reason}");
                self.went_wrong(HandlerError::new(reason.as_str()));
                Trouble::again(&mut self.save_trouble, reason);
            }
        }
    }

    /// Renews the claim when it is time.
    pub(super) fn renew(&mut self, now: Instant) {
        let Some(lease) = &mut self.lease else { return };
        if lease.next > now || lease.renewing.is_some() {
            return;
        }
        let length = lease.length;
        lease.next = now + length / 3;
        let (log, name, epoch) = (Arc::clone(&self.log), Arc::clone(&self.name), self.epoch);
        lease.renewing = Some(Call::new(now, async move {
            let renewed = log.store().renew(&name, epoch, length).await;
            // Counted from when it was asked for: the store's clock began no earlier.
            (now, renewed)
        }));
        // What another process has started is seen here at the latest.
        self.redriving.look();
    }

    pub(super) fn renewed(&mut self, (asked, renewed): (Instant, Result<bool, StoreError>)) {
        let Some(lease) = &mut self.lease else { return };
        lease.renewing = None;
        match renewed {
            Ok(paused) => {
                lease.until = asked + lease.length;
                // Unless it was told something since the store was asked.
                if self.paused_at.is_none_or(|at| at < asked) {
                    self.paused = paused;
                }
            }
            Err(StoreError::Fenced(_)) => self.fenced = true,
            // Tried again soon; nothing is begun once the claim may have ended.
            Err(_) => lease.next = asked + lease.length / 10,
        }
    }
}
