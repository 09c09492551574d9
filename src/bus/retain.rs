//! Removing old events: when, and what is said about it.
//!
//! What may go, and that nothing else does, is the store's to say ([`EventStore::remove`], S12 to
//! S15). Here it is asked again and again for one small step, with a rest after each that is as
//! long as the step was, so that at least half of the store's time is left to everybody else.
//! Any number of processes may do this with one store: of two that try the same step one does it.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use time::OffsetDateTime;
use tokio_util::sync::CancellationToken;

use super::{Registered, lock};
use crate::{
    event::now,
    retry::RetryPolicy,
    store::{EventStore, Extent, HeldBy, Hold, Log, Removal, StoreError},
    telemetry::{HandlerLabels, Metrics},
};

/// How long events are kept. With neither age nor size, for ever.
#[derive(Debug, Clone, Copy)]
pub struct RetainOptions {
    /// Older events go. `None`: none for their age.
    pub age: Option<Duration>,
    /// While the log has more bytes than this its first events go; counted as
    /// [`Extent::bytes`] is. `None`: none for its size.
    pub bytes: Option<u64>,
    /// Whether the identities of removed events are kept, so that copies of them are recognised
    /// (G2). Default true.
    pub identities: bool,
    /// How often it is looked for what may go. Default 2 s.
    pub interval: Duration,
}

impl Default for RetainOptions {
    fn default() -> Self {
        Self { age: None, bytes: None, identities: true, interval: Duration::from_secs(2) }
    }
}

/// How the removal of old events is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Retention {
    /// Since when it is held up, or is not.
    pub since: OffsetDateTime,
    /// The log, when it was last looked at.
    pub extent: Option<Extent>,
    /// Who needs the first event, though it would be due.
    pub held: Option<Hold>,
    /// Whether that handler is registered here.
    pub registered: bool,
    /// A handler that is registered and has no cursor yet: nothing is removed before it has.
    pub unstarted: Option<Arc<str>>,
    /// Why the last step failed; it is tried again.
    pub trouble: Option<Arc<str>>,
}

impl Default for Retention {
    /// Nothing has been looked at yet.
    fn default() -> Self {
        Self {
            since: now(),
            extent: None,
            held: None,
            registered: false,
            unstarted: None,
            trouble: None,
        }
    }
}

impl Retention {
    /// What holds it up, in words.
    #[must_use]
    pub fn reason(&self) -> Option<String> {
        if let Some(trouble) = &self.trouble {
            return Some(format!("old events cannot be removed: {trouble}"));
        }
        if let Some(name) = &self.unstarted {
            return Some(format!("handler `{name}` has not begun; nothing is removed before that"));
        }
        let Hold { handler, after, why } = self.held.as_ref()?;
        let first = after.next();
        Some(match (why, self.registered) {
            (HeldBy::Cursor, true) => {
                format!("handler `{handler}` has not handled position {first}, which is due to go")
            }
            (HeldBy::Unfinished, true) => format!(
                "position {first}, which is due to go, is a dead letter of handler `{handler}`, or \
                 waits for another attempt: retry it or discard it"
            ),
            (HeldBy::Cursor | HeldBy::Unfinished, false) => format!(
                "handler `{handler}`, which is not configured here, needs position {first}, which \
                 is due to go: if no other daemon has it either, `pulsebus handlers forget \
                 {handler}`"
            ),
        })
    }

    /// Whether a person has to do something before more can go.
    #[must_use]
    pub fn needs_a_person(&self) -> bool {
        self.held.as_ref().is_some_and(|held| !self.registered || held.why == HeldBy::Unfinished)
    }
}

/// The task that removes old events.
pub(super) struct Retaining {
    options: RetainOptions,
    log: Arc<Log>,
    handlers: Arc<Mutex<BTreeMap<Arc<str>, Registered>>>,
    metrics: Metrics,
    state: Arc<Mutex<Retention>>,
    /// How many are gone that the log has not been told of, and when it was told last.
    untold: u64,
    told: Option<Instant>,
}

/// So often the log is told how many events are gone, at most.
const TELL: Duration = Duration::from_secs(600);

impl Retaining {
    pub(super) fn new(
        options: RetainOptions,
        log: Arc<Log>,
        handlers: Arc<Mutex<BTreeMap<Arc<str>, Registered>>>,
        metrics: Metrics,
    ) -> Self {
        let state = Arc::default();
        Self { options, log, handlers, metrics, state, untold: 0, told: None }
    }

    pub(super) fn state(&self) -> Arc<Mutex<Retention>> {
        Arc::clone(&self.state)
    }

    /// Works until stopped: what is under way is ended first, which is one step.
    pub(super) async fn run(mut self, stop: CancellationToken) {
        let mut delays = RetryPolicy::reconnect().start();
        let mut said = None;
        while !stop.is_cancelled() {
            let pause = match self.pass(&stop).await {
                Ok(()) => {
                    delays.reset();
                    self.options.interval
                }
                Err(error) => {
                    let mut state = lock(&self.state);
                    if state.reason().is_none() {
                        state.since = now();
                    }
                    state.trouble = Some(error.to_string().into());
                    drop(state);
                    delays.next_delay()
                }
            };
            let reason = lock(&self.state).reason();
            if reason != said {
                match &reason {
                    // A handler that is a little behind is no news.
                    Some(reason) if self.is_news() => tracing::warn!(%reason, "retention waits"),
                    Some(_) | None => {}
                }
                said = reason;
            }
            stop.run_until_cancelled(tokio::time::sleep(pause)).await;
        }
    }

    fn is_news(&self) -> bool {
        let state = lock(&self.state);
        state.trouble.is_some() || state.needs_a_person()
    }

    /// Removes what may go.
    async fn pass(&mut self, stop: &CancellationToken) -> Result<(), StoreError> {
        let store = Arc::clone(self.log.store());
        let store = &*store;
        if let Some(name) = self.unstarted(store).await? {
            let extent = Some(store.extent().await?);
            let waits = Retention { extent, unstarted: Some(name), ..Retention::default() };
            self.show(waits);
            return Ok(());
        }
        while !stop.is_cancelled() {
            let started = Instant::now();
            let removed = store.remove(&self.removal()).await?;
            self.untold += removed.events;
            self.metrics.log.removed.inc_by(removed.events);
            let held = removed.held;
            let registered =
                held.as_ref().is_some_and(|held| lock(&self.handlers).contains_key(&held.handler));
            let extent = Some(removed.extent);
            self.show(Retention { extent, held, registered, ..Retention::default() });
            if removed.events == 0 {
                break;
            }
            // At the first of its own steps a small machine must not be behind with appends.
            stop.run_until_cancelled(tokio::time::sleep(started.elapsed())).await;
        }
        if self.untold > 0 && self.told.is_none_or(|told| told.elapsed() >= TELL) {
            let first = lock(&self.state).extent.map(|extent| extent.first().0);
            let events = std::mem::take(&mut self.untold);
            tracing::info!(events, first, "old events were removed from the log");
            self.told = Some(Instant::now());
        }
        Ok(())
    }

    fn removal(&self) -> Removal {
        let RetainOptions { age, bytes, identities, .. } = self.options;
        Removal {
            before: age.and_then(|age| now().checked_sub(age.try_into().ok()?)),
            bytes,
            step: Removal::STEP,
            identities,
        }
    }

    /// A handler that the store does not know yet: it may want what is there, from the first on.
    async fn unstarted(&self, store: &dyn EventStore) -> Result<Option<Arc<str>>, StoreError> {
        let names: Vec<_> = lock(&self.handlers).keys().cloned().collect();
        for name in names {
            if store.cursor(&name).await?.is_none() {
                return Ok(Some(name));
            }
        }
        Ok(None)
    }

    fn show(&self, mut now: Retention) {
        let metrics = &self.metrics.log;
        if let Some(extent) = now.extent {
            metrics.first.set(extent.first().0);
            metrics.bytes.set(extent.bytes);
        }
        let holder = now.held.as_ref().map(|held| &held.handler);
        let mut state = lock(&self.state);
        let former = state.held.as_ref().map(|held| &held.handler);
        if former != holder {
            if let Some(handler) = former.cloned() {
                metrics.retention_held.remove(&HandlerLabels { handler });
            }
            if let Some(handler) = holder.cloned() {
                metrics.retention_held.get_or_create(&HandlerLabels { handler }).set(1);
            }
        }
        if state.reason().is_some() == now.reason().is_some() {
            now.since = state.since;
        }
        *state = now;
    }
}
