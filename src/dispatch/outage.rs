//! What is waited out: a target that is down, a store that is away.

use std::time::{Duration, Instant};

use crate::{
    handler::HandlerError,
    retry::{Delays, RetryPolicy},
};

/// A target that is down.
pub(super) struct Outage {
    pub(super) reason: HandlerError,
    delays: Delays,
    pub(super) until: Instant,
    /// The worker that probes.
    pub(super) probe: Option<usize>,
}

impl Outage {
    pub(super) fn new(reason: HandlerError) -> Self {
        let delays = RetryPolicy::reconnect().start();
        Self { reason, delays, until: Instant::now(), probe: None }
    }

    /// The next probe comes after this long, or after the next delay.
    pub(super) fn postpone(&mut self, after: Option<Duration>) {
        self.until = Instant::now() + after.unwrap_or_else(|| self.delays.next_delay());
    }
}

/// Something that fails and is tried again.
pub(super) struct Trouble {
    delays: Delays,
    pub(super) until: Instant,
    pub(super) reason: String,
}

impl Trouble {
    /// It failed, again perhaps: the next try comes later.
    pub(super) fn again(slot: &mut Option<Self>, reason: String) {
        let trouble = slot.get_or_insert_with(|| Self {
            delays: RetryPolicy::reconnect().start(),
            until: Instant::now(),
            reason: String::new(),
        });
        trouble.reason = reason;
        trouble.until = Instant::now() + trouble.delays.next_delay();
    }

    /// Whether it is too early for the next try.
    pub(super) fn waits(slot: Option<&Self>, now: Instant) -> bool {
        slot.is_some_and(|trouble| trouble.until > now)
    }
}
