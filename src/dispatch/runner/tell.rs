//! How it is, for whoever looks.

use std::time::{Duration, Instant};

use super::{Runner, reading::MAX_SPAN};
use crate::{
    dispatch::{BlockedKey, HandlerState, Work, blocked::to_utc, lanes::Blocked},
    handler::HandlerError,
};

/// How often the numbers of a handler are brought up to date.
pub(super) const INTERVAL: Duration = Duration::from_millis(100);

impl Runner {
    /// Says how it is: a change of state at once, the numbers otherwise not more often than
    /// [`INTERVAL`].
    pub(super) fn tell(&mut self, now: Instant) {
        let state = self.state(now);
        let changed = self.told_state != state.as_str();
        self.untold = !changed && now < self.told_at + INTERVAL;
        if !self.untold {
            self.told_at = now;
            self.told_state = state.as_str();
            if std::mem::take(&mut self.progressed) {
                self.last_progress = Some(crate::event::now());
            }
            self.status.set_work(self.at_work());
        }
        self.status.set_state(state);
    }

    fn at_work(&self) -> Work {
        let lanes = &self.lanes;
        let oldest = self.calls.iter().flatten().min_by_key(|(_, begun)| *begun);
        Work {
            in_flight: lanes.unfinished() as u64,
            retrying: lanes.waiting() as u64,
            parked: lanes.parked() as u64,
            blocked_keys: (lanes.waiting() + lanes.dead()) as u64,
            next_retry: lanes.next_due().filter(|_| lanes.waiting() > 0).map(to_utc),
            oldest_call: oldest.map(|(position, begun)| (*position, to_utc(*begun))),
            last_error: self.last_error.clone(),
            last_progress: self.last_progress,
        }
    }

    /// Keeps what went wrong last, for whoever asks.
    pub(super) fn went_wrong(&mut self, error: HandlerError) {
        self.last_error = Some((error, crate::event::now()));
    }

    /// The keys that do not flow, the earliest first, up to so many.
    pub(super) fn blocked(&self, most: usize) -> Vec<BlockedKey> {
        let keyed = |lane: Blocked| {
            let key = lane.entry.event.as_ref().map(|event| self.key_of(event));
            BlockedKey::of(lane, key)
        };
        self.lanes.blocked(most).into_iter().map(keyed).collect()
    }

    fn state(&self, now: Instant) -> HandlerState {
        if self.paused {
            return HandlerState::Paused;
        }
        if let Some(outage) = &self.outage {
            return HandlerState::Unavailable(outage.reason.to_string());
        }
        if let Some(trouble) = self.save_trouble.as_ref().or(self.read_trouble.as_ref()) {
            return HandlerState::Waiting(trouble.reason.clone());
        }
        if self.lease.as_ref().is_some_and(|lease| lease.until <= now) {
            let reason = "its claim could not be renewed; another process may have it by now";
            return HandlerState::Waiting(reason.to_owned());
        }
        if let Some(bound) = self.bound() {
            let letters = self.lanes.dead();
            let advice = if letters > 0 {
                format!(
                    "; {letters} of these keys are parked by dead letters: retry or discard them"
                )
            } else {
                String::new()
            };
            return HandlerState::Stalled(format!(
                "{bound}: nothing more is read until some of them end{advice}"
            ));
        }
        if self.window.span() >= MAX_SPAN {
            return HandlerState::Stalled(format!(
                "the event at position {} has not ended, and {} behind it have: nothing more is \
                 read until it does",
                self.window.cursor().next(),
                self.window.span() - 1
            ));
        }
        HandlerState::Running
    }
}
