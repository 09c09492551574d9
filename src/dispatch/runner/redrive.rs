//! Dead letters that a redrive has taken up.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use super::{Runner, beat::Call};
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
    /// Nothing is asked for before then: the store is away, or the cursor has not passed it.
    not_before: Option<Instant>,
    /// Redrives that have had as much as their rate lets them, and until when that counts.
    resting: Vec<(u64, Instant)>,
    pub(super) fetching: Option<Call<Result<Vec<Redriven>, StoreError>>>,
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
        // Whatever was waited for, this one need not be.
        self.not_before = None;
    }

    pub(super) const fn saved(&mut self) {
        self.unsaved = false;
    }

    /// When it may go on by itself.
    pub(super) fn next(&self) -> Option<Instant> {
        if !self.wanted {
            return None;
        }
        let rested = self.resting.iter().map(|(_, until)| *until).min();
        self.not_before.into_iter().chain(rested).max()
    }
}

impl Runner {
    /// Asks for what is to be redriven, where there may be something and there is room for it.
    pub(super) fn redrive(&mut self, now: Instant) {
        let Redriving { wanted, not_before, resting, fetching, unsaved } = &mut self.redriving;
        if !*wanted || fetching.is_some() || *unsaved || self.saving.is_some() {
            return;
        }
        resting.retain(|(_, until)| *until > now);
        if not_before.is_some_and(|at| at > now) {
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
        let except: Vec<u64> = resting.iter().map(|(redrive, _)| *redrive).collect();
        // Set again by whoever starts one from now on, which this may not find.
        *wanted = false;
        *fetching = Some(Call::new(now, async move {
            let found = log.store().redriven(&name, &except, BATCH).await?;
            if found.is_empty() {
                log.store().end_redrives().await?;
            }
            Ok(found)
        }));
    }

    /// Puts what was found back into its lanes, or takes it out.
    pub(super) fn redriven(&mut self, found: Result<Vec<Redriven>, StoreError>) {
        self.redriving.not_before = None;
        let found = match found {
            Ok(found) => found,
            Err(error) => {
                // The store being away is said elsewhere.
                let mut trouble = None;
                Trouble::again(&mut trouble, error.to_string());
                self.redriving.not_before = trouble.map(|trouble| trouble.until);
                self.redriving.wanted = true;
                return;
            }
        };
        let Some(first) = found.first() else {
            if !self.redriving.wanted && !self.redriving.resting.is_empty() {
                // Those that rest have more.
                self.redriving.wanted = true;
                self.redriving.not_before = self.redriving.next();
            }
            return;
        };
        self.redriving.wanted = true;
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
                    self.counters.retried.inc();
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
                    self.counters.discarded.inc();
                    self.progressed = true;
                    self.journal.finish(event.position);
                    self.lanes.remove(lane, event.position);
                }
            }
        }
        self.status.remove_dead(u64::from(taken));
        self.redriving.unsaved = true;
        if let Some(rate) = rate {
            let rest = f64::from(taken) / f64::from(rate.max(1));
            let until = Instant::now() + Duration::from_secs(1).mul_f64(rest);
            self.redriving.resting.push((redrive, until));
        }
    }

    /// A dead letter is to be tried again: at the front of its lane, unless something earlier
    /// is there.
    fn take_back(&mut self, lane: LaneId, position: Position) {
        let mut entry = Entry::stub(position, Turn::Now, 0);
        entry.track.replay = true;
        self.lanes.insert(lane, entry);
    }
}
