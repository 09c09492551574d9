//! Log to handlers: every handler at its own pace, from its own durable cursor.
//!
//! One `runner` task a handler owns all of its state, so nothing is locked: it reads ahead from
//! the cursor into a bounded `window`, drops what the filter excludes, queues the rest into keyed
//! `lanes`, hands chunks of ready events to its `worker` tasks, and checkpoints the contiguous
//! finished prefix after the handler's `flush`.
//!
//! # The states of a (handler, event)
//!
//! ```text
//!              filtered out
//!   in the log ─────────────▶ FINISHED ◀──────────────────── done ─┐
//!       │                                                          │
//!       └─read─▶ queued ──────── its lane is free, a worker idle ─▶ running
//!                  ▲                                                │ │ │
//!                  ├── due ◀─── waiting ◀── retry, panic, timeout ──┘ │ │
//!                  └── probe ◀─ suspended ◀──────────── unavailable ──┘ │
//!                                 DEAD ◀── reject, the last attempt ────┘
//! ```
//!
//! * *queued*: in its lane, behind the earlier events of its key. A lane gives nothing while one
//!   of its events is running, waiting, or dead and parking it (G5).
//! * *waiting*: it failed; it is at the front of its lane, and only that lane waits.
//! * *suspended*: the target is down. No attempt is spent; it is at the front of its lane, and
//!   the whole handler begins nothing until one event, the probe, has got any other answer.
//! * *dead*: a dead letter. With [`OnDead::Park`] its lane is held, also after a restart: those
//!   behind it stay queued.
//!
//! The cursor is the end of the contiguous prefix of finished and dead events. It is saved
//! after the handler's `flush` and after the dead letters below it, never before either (G6).
//! What is above the cursor is handled again after a crash, what was finished included (G4).
//!
//! Only cursors and dead letters are durable. That an event waits, and how often it was tried,
//! is in memory: a restart counts its attempts anew, and while it waits, or is parked, the
//! cursor stays below it. The window spans a bounded number of positions, so a handler whose
//! oldest unfinished event stays unfinished stalls in the end, and says so; it never drops (G7).

mod counters;
mod filter;
mod lanes;
mod resume;
mod runner;
mod status;
mod window;
mod worker;

pub use filter::{Filter, FilterError};
pub(crate) use runner::{Setup, run};
pub use status::{HandlerState, HandlerStatus, Snapshot};

use std::time::Duration;

use crate::retry::RetryPolicy;

/// Where a handler without a cursor starts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Start {
    /// With the first event ever stored.
    #[default]
    Beginning,
    /// With the first event stored after it first ran.
    Now,
}

/// What must stay in order.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Ordering {
    /// The events of one key (G5).
    #[default]
    Key,
    /// Nothing: every event is on its own.
    None,
}

/// What happens to the events behind a dead letter of their key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnDead {
    /// They wait until a person has retried or discarded it.
    Park,
    /// They go on.
    Continue,
}

/// How a handler is run.
#[derive(Debug, Clone)]
pub struct HandlerOptions {
    /// Which event types it gets. Default: all.
    pub events: Filter,
    /// Where it starts when it has no cursor. Default: the beginning.
    pub start: Start,
    /// Concurrent calls at most; `None`: the bus's default.
    pub workers: Option<usize>,
    /// What must stay in order. Default: the events of a key.
    pub ordering: Ordering,
    /// How long one call may take. Default 30 s.
    pub timeout: Duration,
    /// How failed events are tried again.
    pub retry: RetryPolicy,
    /// What follows a dead letter. `None`: park when ordered, continue when not.
    pub on_dead: Option<OnDead>,
    /// Unfinished events held at most. Default 8,192.
    pub window: usize,
    /// Bytes of unfinished bodies held at most. Default 32 MiB.
    pub window_bytes: usize,
    /// How often the cursor is saved, while it moves. Default 1 s.
    pub checkpoint_interval: Duration,
    /// Finished events that bring a checkpoint about before its time. Default 50,000.
    pub checkpoint_events: u64,
}

impl Default for HandlerOptions {
    fn default() -> Self {
        Self {
            events: Filter::all(),
            start: Start::default(),
            workers: None,
            ordering: Ordering::default(),
            timeout: Duration::from_secs(30),
            retry: RetryPolicy::default(),
            on_dead: None,
            window: 8_192,
            window_bytes: 32 << 20,
            checkpoint_interval: Duration::from_secs(1),
            checkpoint_events: 50_000,
        }
    }
}

impl HandlerOptions {
    /// What follows a dead letter, the default resolved.
    #[must_use]
    pub fn on_dead(&self) -> OnDead {
        self.on_dead.unwrap_or(match self.ordering {
            Ordering::Key => OnDead::Park,
            Ordering::None => OnDead::Continue,
        })
    }
}
