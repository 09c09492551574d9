//! How a handler is: what `/v1/handlers`, `/readyz` and the metrics show.

use std::sync::{
    Arc, Mutex, PoisonError,
    atomic::{AtomicU64, Ordering::Relaxed},
};

use tokio::sync::watch;

use crate::event::Position;

/// The state of a handler.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum HandlerState {
    /// Registered; the worker pool has not been started, or its cursor is being read.
    #[default]
    Starting,
    /// Handling what comes.
    Running,
    /// Paused by a person.
    Paused,
    /// Another process runs it; this one takes over when that ends.
    Standby(String),
    /// Its target is down; it probes.
    Unavailable(String),
    /// It has as much unfinished work as it may hold; it reads on when some of it ends.
    Stalled(String),
    /// The store is away, or its own state cannot be read or saved; it tries again.
    Waiting(String),
    /// It cannot go on until a person has changed something.
    Failed(String),
    /// Drained, or replaced.
    Stopped,
}

impl HandlerState {
    /// The one word of `/v1/handlers`.
    #[must_use]
    pub const fn as_str(&self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Standby(_) => "standby",
            Self::Unavailable(_) => "unavailable",
            Self::Stalled(_) => "stalled",
            Self::Waiting(_) => "waiting",
            Self::Failed(_) => "failed",
            Self::Stopped => "stopped",
        }
    }

    /// Why, where there is a reason.
    #[must_use]
    pub fn reason(&self) -> Option<&str> {
        match self {
            Self::Standby(r)
            | Self::Unavailable(r)
            | Self::Stalled(r)
            | Self::Waiting(r)
            | Self::Failed(r) => Some(r),
            Self::Starting | Self::Running | Self::Paused | Self::Stopped => None,
        }
    }
}

/// A handler's state and numbers, shared between its runner and those who look.
#[derive(Debug)]
pub struct HandlerStatus {
    name: Arc<str>,
    kind: &'static str,
    state: Mutex<HandlerState>,
    position: AtomicU64,
    settled: watch::Sender<Position>,
    in_flight: AtomicU64,
    retrying: AtomicU64,
    parked: AtomicU64,
    dead: AtomicU64,
}

/// [`HandlerStatus`] at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// Its name.
    pub name: Arc<str>,
    /// Its kind: `search`, `forward`, `log`, `custom`.
    pub kind: &'static str,
    /// How it is.
    pub state: HandlerState,
    /// Its cursor: everything up to here is done, filtered out, or has a row in the store that
    /// says what it waits for.
    pub position: Position,
    /// Events read and unfinished; includes those retrying and parked.
    pub in_flight: u64,
    /// Events waiting for another attempt.
    pub retrying: u64,
    /// Events waiting behind a failed or dead one of their key.
    pub parked: u64,
    /// Dead letters not retried or discarded yet.
    pub dead: u64,
}

impl HandlerStatus {
    pub(crate) fn new(name: Arc<str>, kind: &'static str) -> Arc<Self> {
        Arc::new(Self {
            name,
            kind,
            state: Mutex::default(),
            position: AtomicU64::default(),
            settled: watch::Sender::default(),
            in_flight: AtomicU64::default(),
            retrying: AtomicU64::default(),
            parked: AtomicU64::default(),
            dead: AtomicU64::default(),
        })
    }

    /// How it is now.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        Snapshot {
            name: Arc::clone(&self.name),
            kind: self.kind,
            state: self.state.lock().unwrap_or_else(PoisonError::into_inner).clone(),
            position: Position(self.position.load(Relaxed)),
            in_flight: self.in_flight.load(Relaxed),
            retrying: self.retrying.load(Relaxed),
            parked: self.parked.load(Relaxed),
            dead: self.dead.load(Relaxed),
        }
    }

    /// Watches how far it has settled: everything up to here is done, filtered out or a dead
    /// letter, flushed, saved, and not done again after a crash. The cursor may be further: it
    /// passes events that wait for another attempt, or behind a failed one.
    #[must_use]
    pub fn watch_settled(&self) -> watch::Receiver<Position> {
        self.settled.subscribe()
    }

    /// Each change is logged once.
    pub(crate) fn set_state(&self, state: HandlerState) {
        let mut current = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if *current == state {
            return;
        }
        let handler = &*self.name;
        match &state {
            HandlerState::Failed(reason) => {
                tracing::error!(handler, reason, "handler cannot go on");
            }
            HandlerState::Unavailable(reason)
            | HandlerState::Stalled(reason)
            | HandlerState::Waiting(reason) => {
                // A reason that changes while the state stays is not said again.
                if current.as_str() != state.as_str() {
                    tracing::warn!(handler, reason, state = state.as_str(), "handler waits");
                }
            }
            HandlerState::Starting
            | HandlerState::Running
            | HandlerState::Paused
            | HandlerState::Standby(_)
            | HandlerState::Stopped => {
                if current.as_str() == state.as_str() {
                    *current = state;
                    return;
                }
                tracing::info!(handler, state = state.as_str(), "handler changed state");
            }
        }
        *current = state;
    }

    /// It has been told to pause, or to go on: said at once, the runner says more as soon as it
    /// has heard it.
    pub(crate) fn expect_paused(&self, paused: bool) {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner).clone();
        match (state, paused) {
            (HandlerState::Running, true) => self.set_state(HandlerState::Paused),
            (HandlerState::Paused, false) => self.set_state(HandlerState::Running),
            _ => {}
        }
    }

    pub(super) fn set_position(&self, position: Position) {
        self.position.store(position.0, Relaxed);
    }

    pub(super) fn set_settled(&self, position: Position) {
        self.settled.send_replace(position);
    }

    pub(super) fn set_work(&self, in_flight: usize, retrying: usize, parked: usize) {
        self.in_flight.store(in_flight as u64, Relaxed);
        self.retrying.store(retrying as u64, Relaxed);
        self.parked.store(parked as u64, Relaxed);
    }

    pub(super) fn set_dead(&self, dead: u64) {
        self.dead.store(dead, Relaxed);
    }

    pub(super) fn add_dead(&self, dead: u64) {
        self.dead.fetch_add(dead, Relaxed);
    }

    pub(super) fn remove_dead(&self, dead: u64) {
        // Only the runner writes it.
        self.dead.store(self.dead.load(Relaxed).saturating_sub(dead), Relaxed);
    }
}
