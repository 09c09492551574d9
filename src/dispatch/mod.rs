//! Log to handlers: every handler at its own pace, from its own durable cursor.
//!
//! One `runner` task a handler owns all of its state, so nothing is locked: it reads ahead from
//! the cursor into a bounded `window`, drops what the filter excludes, queues the rest into keyed
//! `lanes`, hands chunks of ready events to its `worker` tasks, keeps a `journal` of what has
//! failed and what waits, and checkpoints cursor and journal together, after the handler's
//! `flush`.
//!
//! # The states of a (handler, event)
//!
//! ```text
//!              filtered out
//!   in the log ─────────────▶ FINISHED ◀───────────────────────────────────── done ─┐
//!       │                                                                           │
//!       └─read─▶ queued ───────────── its lane is free, a worker idle ─────────▶ running
//!                  ▲  │                                                          │ │ │
//!                  │  └─ a failed one of its key is before it ─▶ PARKED ─┐       │ │ │
//!                  ├── its turn: read again ◀────────────────────────────┘       │ │ │
//!                  ├── due: read again ◀── RETRYING ◀── retry, panic, timeout ───┘ │ │
//!                  ├── probe ◀─ suspended ◀────────────────── unavailable ─────────┘ │
//!                  └── retried by a person ◀── DEAD ◀── reject, the last attempt ────┘
//!                                               └── discarded by a person ──▶ FINISHED
//! ```
//!
//! Those in capitals are durable, as rows of the store
//! ([`Unfinished`](crate::store::progress::Unfinished)) or by the cursor.
//!
//! * *queued*: in its lane, behind the earlier events of its key. A lane gives nothing while one
//!   of its events is running, retrying, or dead and parking it (G5).
//! * *retrying*: it failed; it is at the front of its lane until it is due, and only that lane
//!   waits. Attempts, due time, first and last error are in its row.
//! * *parked*: behind a failed one of its key. It goes on when those before it have ended, and
//!   no new event of the key can overtake it: that one queues behind it.
//! * *suspended*: the target is down. No attempt is spent; it is at the front of its lane, and
//!   the whole handler begins nothing until one event, the probe, is done or rejected.
//! * *dead*: a dead letter. With [`OnDead::Park`] it stays at the front of its lane until a
//!   person retries or discards it; with [`OnDead::Continue`] the lane goes on.
//!
//! A failure that is over before the next checkpoint writes no row. One that is not is spilled:
//! the checkpoint writes rows for the failed event and for all behind it, moves the cursor past
//! them in the same transaction (G6), and lets their bodies go. When their turn comes they are
//! read again from the log. What is above the cursor, and not in a row, is handled again after a
//! crash, what was finished included (G4).
//!
//! What waits is bounded ([`HandlerOptions::parked_per_key`], [`HandlerOptions::parked_total`]);
//! at the bound a handler reads no further, and says so; it never drops (G7).

mod blocked;
mod burial;
mod counters;
mod filter;
mod journal;
mod lanes;
mod outage;
mod resume;
mod runner;
mod spans;
mod status;
mod window;
mod worker;

pub use blocked::{BlockedKey, Cause};
pub use filter::{Filter, FilterError};
pub(crate) use runner::{Command, Setup, run};
use status::Work;
pub use status::{HandlerState, HandlerStatus, Snapshot};

use std::{sync::Arc, time::Duration};

use crate::{handler::dead_letter::DeadLetterDestination, retry::RetryPolicy};

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
    /// Where dead letters are also published. Default: nowhere.
    pub dead_letter: Option<Arc<dyn DeadLetterDestination>>,
    /// Events held in memory at most. Default 8,192.
    pub window: usize,
    /// Bytes of their bodies at most. Default 32 MiB.
    pub window_bytes: usize,
    /// Events that may wait behind a failed one of their key. At the bound the handler reads
    /// no further. Default 10,000.
    pub parked_per_key: usize,
    /// Events that may wait for another attempt, or behind a failed one, over all keys. At the
    /// bound the handler reads no further. Default 100,000.
    pub parked_total: usize,
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
            dead_letter: None,
            window: 8_192,
            window_bytes: 32 << 20,
            parked_per_key: 10_000,
            parked_total: 100_000,
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
