//! From the log, and from rows, into the lanes.

use std::{
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Instant,
};

use super::{Loaded, Runner, beat::Call};
use crate::{
    dispatch::{
        Ordering,
        lanes::{Item, Track, lane_of},
        outage::Trouble,
    },
    event::StoredEvent,
    handler::HandlerError,
    store::{Limit, StoreError, progress::Standing},
};

/// Positions a window spans at most, finished ones included. A finished position costs a byte,
/// so one event that takes long holds up the cursor and not the others.
pub(super) const MAX_SPAN: usize = 1_000_000;

/// Lanes parked behind dead letters at most; beyond, the handler takes nothing more.
pub(super) const MAX_DEAD: usize = 250_000;

/// Events read by position at once, and the bytes of their bodies.
const LOAD: (usize, usize) = (1_000, 8 << 20);

impl Runner {
    /// Whether it holds as much as it may.
    pub(super) fn is_full(&self) -> bool {
        self.holds_enough() || self.window.span() >= MAX_SPAN
    }

    /// Whether it has as many events in memory as it may.
    fn holds_enough(&self) -> bool {
        self.lanes.held() >= self.options.window || self.lanes.bytes() >= self.options.window_bytes
    }

    /// Why it may not pass more work than it has passed already.
    pub(super) fn bound(&self) -> Option<String> {
        let waiting = self.lanes.stubs().saturating_sub(self.lanes.dead());
        if self.lanes.is_overlong() {
            let most = self.options.parked_per_key;
            Some(format!("more than {most} events wait behind a failed one of their key"))
        } else if waiting >= self.options.parked_total {
            Some(format!("{waiting} events wait for another attempt, or behind a failed one"))
        } else if self.lanes.dead() >= MAX_DEAD {
            Some(format!("{} keys wait behind dead letters", self.lanes.dead()))
        } else {
            None
        }
    }

    /// Starts to read the next page, where there is room and something to read.
    pub(super) fn read_ahead(&mut self, now: Instant) {
        let waiting = Trouble::waits(self.read_trouble.as_ref(), now);
        if waiting || self.reading.is_some() || self.rests(now) {
            return;
        }
        let after = self.window.end();
        if after >= *self.head.borrow() || self.is_full() || self.bound().is_some() {
            return;
        }
        let limit = Limit {
            events: (self.options.window - self.lanes.held())
                .min(MAX_SPAN - self.window.span())
                .min(2_000),
            bytes: (self.options.window_bytes - self.lanes.bytes()).min(8 << 20),
        };
        let log = Arc::clone(&self.log);
        self.reading = Some(Call::new(now, async move { log.read(after, limit).await }));
    }

    /// Queues a page that was read.
    pub(super) fn queue(&mut self, page: Result<Vec<Arc<StoredEvent>>, StoreError>) {
        let events = match page {
            Ok(events) => events,
            Err(error) => return self.cannot_read(format!("the log cannot be read: {error}")),
        };
        if events.is_empty() && self.window.end() < *self.head.borrow() {
            // Tried again with backoff, so that no store can make this spin.
            return self.cannot_read("the log gave nothing though there is more".to_owned());
        }
        let mut filtered = 0;
        for event in events {
            if event.position != self.window.end().next() {
                let reason = format!(
                    "the log is not contiguous: position {} came after {} (G3)",
                    event.position,
                    self.window.end()
                );
                return self.cannot_read(reason);
            }
            if let Some(row) = self.ahead.remove(&event.position) {
                self.window.push(true);
                if row.standing == Standing::Parked && self.filter.matches(&row.kind) {
                    let track = Track { kept: true, attempts: row.attempts, ..Track::default() };
                    let lane = self.lane_of_row(&row);
                    self.lanes.push(Item { lane, event, track });
                } else {
                    self.take_up(&row);
                }
                continue;
            }
            let wanted = self.filter.matches(event.kind());
            self.window.push(!wanted);
            if wanted {
                let lane = match self.options.ordering {
                    Ordering::Key => lane_of(&self.handler.lane(&event)),
                    Ordering::None => event.position.0,
                };
                let mut item = Item::new(lane, event);
                item.track.replay = item.position().0 <= self.replayed.load(Relaxed);
                self.lanes.push(item);
            } else {
                filtered += 1;
            }
        }
        self.counters.filtered.inc_by(filtered);
        self.progressed |= filtered > 0;
        self.read_trouble = None;
        self.status.set_position(self.window.cursor());
    }

    /// Starts to read what lanes cannot go on without.
    pub(super) fn load(&mut self, now: Instant) {
        let waiting = Trouble::waits(self.read_trouble.as_ref(), now);
        // While the target is down only the probe needs an event.
        let rests = self.rests(now) || (self.outage.is_some() && self.lanes.has_ready());
        if waiting || rests || self.loading.is_some() || !self.lanes.has_hungry() {
            return;
        }
        // What can go on goes first: a hundred thousand events may be due at once, or redriven.
        // Where nothing of what it holds can, that waits for what is read here.
        let flows = self.lanes.has_ready() || self.lanes.running() > 0;
        if flows && self.holds_enough() {
            return;
        }
        let wanted = self.lanes.wanted(LOAD.0);
        if wanted.is_empty() {
            return;
        }
        let log = Arc::clone(&self.log);
        self.loading = Some(Call::new(now, async move {
            let positions: Vec<_> = wanted.iter().map(|(position, _)| *position).collect();
            let events = log.get(&positions, LOAD.1).await;
            (wanted, events)
        }));
    }

    /// Gives the lanes what was read for them.
    pub(super) fn loaded(&mut self, (wanted, events): Loaded) {
        let events = match events {
            Ok(events) if events.is_empty() => {
                let (position, _) = wanted.first().copied().unwrap_or_default();
                self.cannot_read(format!("the log has no event at position {position} any more"));
                events
            }
            Ok(events) => {
                self.read_trouble = None;
                events
            }
            Err(error) => {
                self.cannot_read(format!("the log cannot be read: {error}"));
                Vec::new()
            }
        };
        self.lanes.loaded(&wanted, events);
    }

    pub(super) fn cannot_read(&mut self, reason: String) {
        self.went_wrong(HandlerError::new(reason.as_str()));
        Trouble::again(&mut self.read_trouble, reason);
    }
}
