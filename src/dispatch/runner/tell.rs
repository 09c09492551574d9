//! How it is, for whoever looks.

use std::time::{Duration, Instant};

use super::{Runner, reading::MAX_SPAN};
use crate::dispatch::HandlerState;

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
            let lanes = &self.lanes;
            self.status.set_work(lanes.unfinished(), lanes.waiting(), lanes.parked());
        }
        self.status.set_state(state);
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
