//! Dead letters that a redrive has taken up.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::future::BoxFuture;

use super::Runner;
use crate::{
    dispatch::{
        lanes::{Entry, LaneId, Turn},
        outage::Trouble,
    },
    event::Position,
    store::{
        StoreError,
        progress::{RedriveAction, Redriven, Standing, Unfinished},
    },
};

/// Dead letters taken at once: as many as a checkpoint saves without effort.
const BATCH: usize = 1_000;

/// How long to wait for the cursor to pass what is to be redriven.
const AHEAD: Duration = Duration::from_millis(100);

/// How a handler's part of the running redrives goes on.
#[derive(Default)]
pub(super) struct Redriving {
    /// There may be something.
    wanted: bool,
    /// Not before then: the rate, or a store that is away.
    not_before: Option<Instant>,
    pub(super) fetching: Option<BoxFuture<'static, Result<Vec<Redriven>, StoreError>>>,
    /// What was taken up last is in no checkpoint yet; asked again, the store would give it
    /// again.
    pub(super) unsaved: bool,
}

impl Redriving {
    /// A redrive may have been under way when the last runner ended.
    pub(super) fn begun() -> Self {
        Self { wanted: true, ..Self::default() }
    }

    pub(super) const fn look(&mut self) {
        self.wanted = true;
    }

    pub(super) const fn saved(&mut self) {
        self.unsaved = false;
    }

    pub(super) fn next(&self) -> Option<Instant> {
        self.not_before.filter(|_| self.wanted)
    }
}

impl Runner {
    /// Asks for what is to be redriven, where there may be something and there is room for it.
    pub(super) fn redrive(&mut self, now: Instant) {
        let Redriving { wanted, not_before, fetching, unsaved } = &self.redriving;
        let early = not_before.is_some_and(|at| at > now);
        if !wanted || early || fetching.is_some() || *unsaved || self.saving.is_some() {
            return;
        }
        // What parks keys may be what keeps the handler from reading on, so that does not count;
        // but what has been taken back is to get somewhere before more is.
        let lanes = &self.lanes;
        let flowing = lanes.stubs().saturating_sub(lanes.dead() + lanes.parked());
        if self.draining || self.fenced || self.rewind.is_some() || flowing >= 10 * BATCH {
            return;
        }
        let (log, name) = (Arc::clone(&self.log), Arc::clone(&self.name));
        self.redriving.fetching = Some(Box::pin(async move {
            let found = log.store().redriven(&name, BATCH).await?;
            if found.is_empty() {
                log.store().end_redrives().await?;
            }
            Ok(found)
        }));
    }

    /// Puts what was found back into its lanes, or takes it out.
    pub(super) fn redriven(&mut self, found: Result<Vec<Redriven>, StoreError>) {
        let found = match found {
            Ok(found) => found,
            Err(error) => {
                // The store being away is said elsewhere.
                let mut trouble = None;
                Trouble::again(&mut trouble, error.to_string());
                self.redriving.not_before = trouble.map(|trouble| trouble.until);
                return;
            }
        };
        let Some(first) = found.first() else {
            self.redriving.wanted = false;
            self.redriving.not_before = None;
            return;
        };
        // What the cursor has not passed yet would come again after a crash, whatever was
        // decided here: it has to wait. (Positions come in order.)
        let cursor = self.window.cursor();
        if first.event.position > cursor {
            self.redriving.not_before = Some(Instant::now() + AHEAD);
            return;
        }
        // One redrive at a time, so that each keeps its own rate.
        let (redrive, rate) = (first.redrive, first.rate);
        let most = rate.map_or(BATCH, |rate| rate as usize).max(1);
        let mut taken = 0u32;
        let passed = |found: &Redriven| found.redrive == redrive && found.event.position <= cursor;
        for Redriven { action, event, .. } in found.into_iter().filter(passed).take(most) {
            taken += 1;
            let lane = self.lane_of_row(&event);
            match action {
                RedriveAction::Retry => {
                    let position = event.position;
                    self.journal.keep(Unfinished {
                        standing: Standing::Retrying { due_at: crate::event::now() },
                        attempts: 0,
                        failure: None,
                        ..event
                    });
                    self.take_back(lane, position);
                }
                RedriveAction::Discard => {
                    self.journal.finish(event.position);
                    self.lanes.remove(lane, event.position);
                }
            }
        }
        self.status.remove_dead(u64::from(taken));
        self.redriving.unsaved = true;
        self.redriving.not_before = rate.map(|rate| {
            Instant::now()
                + Duration::from_secs(1).mul_f64(f64::from(taken) / f64::from(rate.max(1)))
        });
    }

    /// A dead letter is to be tried again: at the front of its lane, unless something earlier
    /// is there.
    fn take_back(&mut self, lane: LaneId, position: Position) {
        self.lanes.insert(lane, Entry::stub(position, Turn::Now, 0));
    }
}
