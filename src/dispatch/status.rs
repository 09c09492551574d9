//! How a handler is: what `/v1/handlers`, `/readyz` and the metrics show.

use std::sync::{
    Arc, Mutex, PoisonError,
    atomic::{AtomicU64, Ordering::Relaxed},
};

use time::OffsetDateTime;
use tokio::sync::watch;

use crate::{event::Position, handler::HandlerError};

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
    /// Every word of [`as_str`](Self::as_str).
    pub const WORDS: [&'static str; 9] = [
        "starting",
        "running",
        "paused",
        "standby",
        "unavailable",
        "stalled",
        "waiting",
        "failed",
        "stopped",
    ];

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
    state: Mutex<Lasting>,
    position: AtomicU64,
    settled: watch::Sender<Position>,
    work: Mutex<Work>,
    dead: AtomicU64,
    /// An event that was behind the cursor, and when it was recorded.
    behind: Mutex<Option<(Position, OffsetDateTime)>>,
}

/// A state, and since when it lasts.
#[derive(Debug)]
struct Lasting {
    state: HandlerState,
    since: OffsetDateTime,
}

/// What a runner tells every now and then, never once an event; see [`Snapshot`].
#[derive(Debug, Clone, Default)]
pub(super) struct Work {
    pub(super) in_flight: u64,
    pub(super) retrying: u64,
    pub(super) parked: u64,
    pub(super) blocked_keys: u64,
    pub(super) next_retry: Option<OffsetDateTime>,
    pub(super) oldest_call: Option<(Position, OffsetDateTime)>,
    pub(super) last_error: Option<(HandlerError, OffsetDateTime)>,
    pub(super) last_progress: Option<OffsetDateTime>,
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
    /// Since when it is in that state, whatever the reasons were.
    pub since: OffsetDateTime,
    /// Its cursor: everything up to here is done, filtered out, or has a row in the store that
    /// says what it waits for.
    pub position: Position,
    /// Events read and unfinished; includes those retrying and parked.
    pub in_flight: u64,
    /// Keys whose first event waits for another attempt.
    pub retrying: u64,
    /// Events waiting behind a failed or dead one of their key.
    pub parked: u64,
    /// Keys that wait for another attempt, or behind a dead letter.
    pub blocked_keys: u64,
    /// When the next event that waits for another attempt is due.
    pub next_retry: Option<OffsetDateTime>,
    /// The call that has been under way for longest: the position of its (first) event, and when
    /// it was begun.
    pub oldest_call: Option<(Position, OffsetDateTime)>,
    /// What went wrong last, and when: a failed attempt, a target that is down, a checkpoint.
    pub last_error: Option<(HandlerError, OffsetDateTime)>,
    /// When an event last ended, or was passed over.
    pub last_progress: Option<OffsetDateTime>,
    /// Dead letters not retried or discarded yet.
    pub dead: u64,
}

impl HandlerStatus {
    pub(crate) fn new(name: Arc<str>, kind: &'static str) -> Arc<Self> {
        Arc::new(Self {
            name,
            kind,
            state: Mutex::new(Lasting {
                state: HandlerState::default(),
                since: crate::event::now(),
            }),
            position: AtomicU64::default(),
            settled: watch::Sender::default(),
            work: Mutex::default(),
            dead: AtomicU64::default(),
            behind: Mutex::default(),
        })
    }

    /// How it is now.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        let (state, since) = {
            let lasting = lock(&self.state);
            (lasting.state.clone(), lasting.since)
        };
        let Work {
            in_flight,
            retrying,
            parked,
            blocked_keys,
            next_retry,
            oldest_call,
            last_error,
            last_progress,
        } = lock(&self.work).clone();
        Snapshot {
            name: Arc::clone(&self.name),
            kind: self.kind,
            state,
            since,
            position: Position(self.position.load(Relaxed)),
            in_flight,
            retrying,
            parked,
            blocked_keys,
            next_retry,
            oldest_call,
            last_error,
            last_progress,
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
        let mut lasting = lock(&self.state);
        let Lasting { state: current, since } = &mut *lasting;
        if *current == state {
            return;
        }
        if current.as_str() != state.as_str() {
            *since = crate::event::now();
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
        let state = lock(&self.state).state.clone();
        match (state, paused) {
            (HandlerState::Running, true) => self.set_state(HandlerState::Paused),
            (HandlerState::Paused, false) => self.set_state(HandlerState::Running),
            _ => {}
        }
    }

    /// An event that is behind the cursor, and when it was recorded, as last looked up.
    pub(crate) fn behind(&self) -> Option<(Position, OffsetDateTime)> {
        *lock(&self.behind)
    }

    /// Has been looked up: an event behind the cursor, and when it was recorded.
    pub(crate) fn set_behind(&self, event: Option<(Position, OffsetDateTime)>) {
        *lock(&self.behind) = event;
    }

    /// The cursor that the process has saved which runs it; passed over unless another one does.
    pub(crate) fn set_standby_position(&self, position: Position) {
        let lasting = lock(&self.state);
        if matches!(lasting.state, HandlerState::Standby(_)) {
            self.position.store(position.0, Relaxed);
        }
    }

    pub(super) fn set_position(&self, position: Position) {
        self.position.store(position.0, Relaxed);
    }

    pub(super) fn set_settled(&self, position: Position) {
        self.settled.send_replace(position);
    }

    pub(super) fn set_work(&self, work: Work) {
        *lock(&self.work) = work;
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

/// Nothing panics while holding one of these locks; if it did, what they hold would still be
/// whole.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_state_has_its_word() {
        let text = String::new;
        let states = [
            HandlerState::Starting,
            HandlerState::Running,
            HandlerState::Paused,
            HandlerState::Standby(text()),
            HandlerState::Unavailable(text()),
            HandlerState::Stalled(text()),
            HandlerState::Waiting(text()),
            HandlerState::Failed(text()),
            HandlerState::Stopped,
        ];
        assert_eq!(states.map(|state| state.as_str()), HandlerState::WORDS);
    }

    #[test]
    fn a_state_lasts_while_its_reasons_change() {
        let status = HandlerStatus::new("h".into(), "custom");
        status.set_state(HandlerState::Waiting("one".to_owned()));
        let before = status.snapshot();
        status.set_state(HandlerState::Waiting("two".to_owned()));
        let after = status.snapshot();
        assert_eq!((after.since, after.state.reason()), (before.since, Some("two")));
        status.set_state(HandlerState::Running);
        assert!(status.snapshot().since >= before.since);
    }

    #[test]
    fn only_a_standby_is_moved_from_outside() {
        let status = HandlerStatus::new("h".into(), "custom");
        status.set_state(HandlerState::Running);
        status.set_standby_position(Position(7));
        assert_eq!(status.snapshot().position, Position::START);
        status.set_state(HandlerState::Standby("another".to_owned()));
        status.set_standby_position(Position(7));
        assert_eq!(status.snapshot().position, Position(7));
    }
}
