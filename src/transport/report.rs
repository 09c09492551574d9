//! How a source is, and where its consumer says so.

use std::sync::{
    Arc, Mutex, PoisonError,
    atomic::{AtomicI64, AtomicU64, Ordering::Relaxed},
};

use prometheus_client::metrics::counter::Counter;
use time::OffsetDateTime;
use tokio::sync::watch;

/// How a source is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum SourceState {
    /// Not open yet.
    #[default]
    Starting,
    /// Catching up on what was delivered and not committed (C3).
    Recovering,
    /// Open, and taking what comes.
    Consuming,
    /// Another process consumes it; this one takes over when that ends.
    Standby(String),
    /// Waiting for the store; nothing is taken.
    Paused(String),
    /// Away; it comes back by itself.
    Reconnecting(String),
    /// A person has to change something; it tries again all the same.
    Misconfigured(String),
    /// Closed by a drain.
    Stopped,
}

impl SourceState {
    /// Every word of [`as_str`](Self::as_str).
    pub const WORDS: [&'static str; 8] = [
        "starting",
        "recovering",
        "consuming",
        "standby",
        "paused",
        "reconnecting",
        "misconfigured",
        "stopped",
    ];

    /// The one word of `/v1/sources`.
    #[must_use]
    pub const fn as_str(&self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Recovering => "recovering",
            Self::Consuming => "consuming",
            Self::Standby(_) => "standby",
            Self::Paused(_) => "paused",
            Self::Reconnecting(_) => "reconnecting",
            Self::Misconfigured(_) => "misconfigured",
            Self::Stopped => "stopped",
        }
    }

    /// Why, where there is a reason.
    #[must_use]
    pub fn reason(&self) -> Option<&str> {
        match self {
            Self::Standby(r) | Self::Paused(r) | Self::Reconnecting(r) | Self::Misconfigured(r) => {
                Some(r)
            }
            Self::Starting | Self::Recovering | Self::Consuming | Self::Stopped => None,
        }
    }
}

/// What a source has told of itself, apart from its state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceReport {
    /// How it is.
    pub state: SourceState,
    /// Since when it is in that state, whatever the reasons were.
    pub since: OffsetDateTime,
    /// How often it lost its broker, or was refused by it, since the start.
    pub reconnects: u64,
    /// Why it was last not consuming, and when that was said.
    pub last_error: Option<(Arc<str>, OffsetDateTime)>,
    /// Messages that wait in the broker and have been delivered to nobody, as the broker said
    /// last; `None` where it does not say.
    pub pending: Option<u64>,
    /// Since when the oldest delivery is held that is not settled; `None` where none is held.
    pub held_since: Option<OffsetDateTime>,
}

/// Where a consumer says how it is. Each change is logged once.
#[derive(Debug, Clone)]
pub struct Reporter {
    source: Arc<str>,
    state: watch::Sender<SourceState>,
    told: Arc<Told>,
    reconnects: Counter,
}

#[derive(Debug)]
struct Told {
    history: Mutex<History>,
    /// [`UNKNOWN`] before a broker has said so.
    pending: AtomicU64,
    /// In microseconds of Unix time; 0 where nothing is held.
    held_since: AtomicI64,
}

#[derive(Debug)]
struct History {
    since: OffsetDateTime,
    last_error: Option<(Arc<str>, OffsetDateTime)>,
}

const UNKNOWN: u64 = u64::MAX;

impl Reporter {
    /// A reporter for the source of that name, in state [`SourceState::Starting`].
    #[must_use]
    pub fn new(source: impl Into<Arc<str>>) -> Self {
        let history = History { since: crate::event::now(), last_error: None };
        let told = Told {
            history: Mutex::new(history),
            pending: AtomicU64::new(UNKNOWN),
            held_since: AtomicI64::new(0),
        };
        Self {
            source: source.into(),
            state: watch::Sender::default(),
            told: Arc::new(told),
            reconnects: Counter::default(),
        }
    }

    /// Counts with this counter how often the source lost its broker.
    #[must_use]
    pub(crate) fn counting(self, reconnects: Counter) -> Self {
        Self { reconnects, ..self }
    }

    /// Says how it is; the same again says nothing.
    pub fn report(&self, state: SourceState) {
        self.state.send_if_modified(|current| {
            if *current == state {
                return false;
            }
            let source = &*self.source;
            match &state {
                SourceState::Misconfigured(reason) => {
                    tracing::error!(source, reason, "source cannot consume as configured");
                }
                SourceState::Reconnecting(reason) | SourceState::Paused(reason) => {
                    tracing::warn!(
                        source,
                        reason,
                        state = state.as_str(),
                        "source is not consuming"
                    );
                }
                SourceState::Starting
                | SourceState::Recovering
                | SourceState::Consuming
                | SourceState::Standby(_)
                | SourceState::Stopped => {
                    tracing::info!(source, state = state.as_str(), "source changed state");
                }
            }
            self.told.history().note(current, &state);
            self.reconnects.inc_by(u64::from(is_away(&state) && !is_away(current)));
            *current = state;
            true
        });
    }

    /// Says how many messages wait in the broker that have been delivered to nobody: once a
    /// batch, where that costs nothing.
    pub fn pending(&self, messages: u64) {
        self.told.pending.store(messages, Relaxed);
    }

    /// Says since when the oldest delivery is held.
    pub(crate) fn held_since(&self, since: Option<OffsetDateTime>) {
        let micros = since.map_or(0, |since| since.unix_timestamp_nanos() / 1_000);
        self.told.held_since.store(i64::try_from(micros).unwrap_or(0), Relaxed);
    }

    /// How it is now.
    #[must_use]
    pub fn state(&self) -> SourceState {
        self.state.borrow().clone()
    }

    /// How it is now, since when, and what went wrong last.
    #[must_use]
    pub fn told(&self) -> SourceReport {
        // Under one lock with the state, so that they fit.
        let state = self.state.borrow();
        let history = self.told.history();
        let pending = self.told.pending.load(Relaxed);
        let held = i128::from(self.told.held_since.load(Relaxed));
        let held_since = OffsetDateTime::from_unix_timestamp_nanos(held * 1_000).ok();
        SourceReport {
            state: state.clone(),
            since: history.since,
            reconnects: self.reconnects.get(),
            last_error: history.last_error.clone(),
            pending: (pending != UNKNOWN).then_some(pending),
            held_since: held_since.filter(|_| held != 0),
        }
    }

    /// Watches how it is.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<SourceState> {
        self.state.subscribe()
    }
}

impl Told {
    fn history(&self) -> std::sync::MutexGuard<'_, History> {
        self.history.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl History {
    fn note(&mut self, old: &SourceState, new: &SourceState) {
        let now = crate::event::now();
        if old.as_str() != new.as_str() {
            self.since = now;
        }
        if let SourceState::Reconnecting(reason)
        | SourceState::Misconfigured(reason)
        | SourceState::Paused(reason) = new
        {
            self.last_error = Some((reason.as_str().into(), now));
        }
    }
}

/// Whether it lost its broker, or is refused by it.
fn is_away(state: &SourceState) -> bool {
    matches!(state, SourceState::Reconnecting(_) | SourceState::Misconfigured(_))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_went_wrong_is_known_after_it_is_over() {
        let reporter = Reporter::new("lessons");
        assert_eq!(reporter.told().pending, None);
        reporter.report(SourceState::Consuming);
        reporter.report(SourceState::Reconnecting("gone".to_owned()));
        let away = reporter.told();
        reporter.report(SourceState::Reconnecting("still gone".to_owned()));
        assert_eq!(reporter.told().since, away.since, "one outage, whatever its reasons");
        reporter.report(SourceState::Consuming);
        reporter.pending(7);
        let told = reporter.told();
        assert_eq!((told.state, told.reconnects), (SourceState::Consuming, 1));
        assert_eq!(&*told.last_error.unwrap().0, "still gone");
        assert!(told.since >= away.since);
        assert_eq!(told.pending, Some(7));
    }

    #[test]
    fn every_state_has_its_word() {
        let text = String::new;
        let states = [
            SourceState::Starting,
            SourceState::Recovering,
            SourceState::Consuming,
            SourceState::Standby(text()),
            SourceState::Paused(text()),
            SourceState::Reconnecting(text()),
            SourceState::Misconfigured(text()),
            SourceState::Stopped,
        ];
        assert_eq!(states.map(|state| state.as_str()), SourceState::WORDS);
    }
}
