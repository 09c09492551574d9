//! A new configuration for a bus that runs.
//!
//! Two steps, so that a configuration that cannot hold changes nothing: everything that is new is
//! opened beside what runs ([`Reloader::prepare`]), which may fail; then it takes the place of
//! what runs ([`Reloader::apply`]), which may not. What is replaced ends as in a drain: a source
//! settles what it holds, a handler finishes what it is doing and saves its cursor, and only then
//! does its successor start, from there (G1, G5). What does not end in time is cut off, as by a
//! crash: it comes again.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use futures_util::future::join_all;

use super::{
    Component, ComposeError, Composed, EventBus, HandlerAccessError, Health, Searches,
    compose::{
        Trouble, log_handler, open_forward, open_options, open_search, open_transport, share,
        source_of,
    },
    handlers::Registered,
    lock,
};
use crate::{
    config::{HandlerKind, HandlerSettings, INGEST, Settings, SourceSettings},
    dispatch::{HandlerOptions, HandlerState},
    handler::{EventHandler, search::SearchHandler},
    ingest::Source,
    telemetry::{HandlerLabels, SourceLabels},
    transport::{SourceState, Transport},
};

/// How long a source may take to settle what it holds; then it is cut off, and that comes again.
const TO_SETTLE: Duration = Duration::from_secs(10);

/// What is said of a refused configuration in one reason, at most; the log has all of it.
const MAX_ERRORS: usize = 8;

type Transports = BTreeMap<Arc<str>, Arc<dyn Transport>>;

/// Changes a composed bus to other settings while it runs.
pub struct Reloader {
    bus: EventBus,
    settings: Settings,
    transports: Transports,
    searches: Searches,
}

/// What is to run, opened and not started.
pub struct Prepared {
    settings: Settings,
    transports: Transports,
    searches: BTreeMap<Arc<str>, Arc<SearchHandler>>,
    /// New ones, and those that take the place of one that runs.
    handlers: Vec<(Arc<dyn EventHandler>, HandlerOptions)>,
    gone_handlers: Vec<Arc<str>>,
    sources: Vec<Source>,
    /// Those that are replaced among them.
    ended_sources: Vec<Arc<str>>,
    changes: Vec<Change>,
}

/// What is different, for the log.
struct Change {
    part: String,
    what: String,
}

impl Reloader {
    /// For a bus that was composed from these settings.
    #[must_use]
    pub fn new(composed: &Composed, settings: Settings) -> Self {
        Self {
            bus: composed.bus.clone(),
            settings,
            transports: composed.transports.clone(),
            searches: composed.searches.clone(),
        }
    }

    /// What the bus runs with.
    #[must_use]
    pub const fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Opens what differs from what runs. Touches nothing that runs, and connects to nothing:
    /// publishers and sources do when they are used.
    ///
    /// `settings` are those of [`Settings::reload`].
    ///
    /// # Errors
    /// Everything that cannot be opened as configured, or cannot be opened now.
    pub async fn prepare(&self, settings: Settings) -> Result<Prepared, Vec<ComposeError>> {
        let mut errors = Vec::new();
        let mut changes = Changes::default();
        let (transports, fresh) = self.transports(&settings, &mut changes, &mut errors);
        let mut prepared = Prepared {
            transports,
            searches: BTreeMap::new(),
            handlers: Vec::new(),
            gone_handlers: Vec::new(),
            sources: Vec::new(),
            ended_sources: Vec::new(),
            changes: Vec::new(),
            settings,
        };
        self.sources(&mut prepared, &fresh, &mut changes);
        self.handlers(&mut prepared, &fresh, &mut changes, &mut errors).await;
        prepared.changes = changes.0;
        if errors.is_empty() { Ok(prepared) } else { Err(errors) }
    }

    /// The transports there are to be, and the names of those that are new or others than before.
    fn transports(
        &self,
        settings: &Settings,
        changes: &mut Changes,
        errors: &mut Vec<ComposeError>,
    ) -> (Transports, BTreeSet<Arc<str>>) {
        let mut transports = Transports::new();
        let mut fresh = BTreeSet::new();
        if let Some(ingest) = self.transports.get(INGEST) {
            transports.insert(INGEST.into(), Arc::clone(ingest));
        }
        for (name, transport) in &settings.transports {
            let old = self.settings.transports.get(name);
            if old == Some(transport)
                && let Some(open) = self.transports.get(name)
            {
                transports.insert(Arc::clone(name), Arc::clone(open));
                continue;
            }
            changes.add("transport", name, if old.is_some() { "changed" } else { "added" });
            fresh.insert(Arc::clone(name));
            match open_transport(name, transport) {
                Ok(open) => {
                    transports.insert(Arc::clone(name), open);
                }
                Err(error) => errors.push(error),
            }
        }
        for name in self.settings.transports.keys() {
            if !settings.transports.contains_key(name) {
                changes.add("transport", name, "removed");
            }
        }
        (transports, fresh)
    }

    fn sources(&self, prepared: &mut Prepared, fresh: &BTreeSet<Arc<str>>, changes: &mut Changes) {
        let settings = &prepared.settings;
        let other_share = share(settings) != share(&self.settings);
        let mut stays = |name: &Arc<str>, source: &SourceSettings| {
            let Some(old) = self.settings.sources.get(name) else {
                changes.add("source", name, "added");
                return false;
            };
            if *source.transport == *INGEST {
                return true;
            }
            if old != source {
                changes.add("source", name, "changed");
            } else if fresh.contains(&source.transport) {
                changes.add("source", name, "starts anew, with its transport");
            } else if other_share {
                changes.add("source", name, "starts anew, with another share of ingest_bytes");
            } else {
                return true;
            }
            false
        };
        for (name, source) in &settings.sources {
            if stays(name, source) {
                continue;
            }
            // One that could not be opened is an error already.
            if let Some(transport) = prepared.transports.get(&source.transport) {
                prepared.sources.push(source_of(name, source, transport, settings));
            }
            if self.settings.sources.contains_key(name) {
                prepared.ended_sources.push(Arc::clone(name));
            }
        }
        for name in self.settings.sources.keys() {
            if !settings.sources.contains_key(name) {
                changes.add("source", name, "removed");
                prepared.ended_sources.push(Arc::clone(name));
            }
        }
    }

    async fn handlers(
        &self,
        prepared: &mut Prepared,
        fresh: &BTreeSet<Arc<str>>,
        changes: &mut Changes,
        errors: &mut Vec<ComposeError>,
    ) {
        for (name, handler) in &prepared.settings.handlers {
            let index = self.index(name, handler);
            let old = self.settings.handlers.get(name);
            let differences = old.map(|old| old.differences(handler));
            let of_transport = handler.transports().any(|transport| fresh.contains(transport));
            match differences.as_deref() {
                None => changes.add("handler", name, "added"),
                Some([]) if of_transport => {
                    changes.add("handler", name, "starts anew, with its transport");
                }
                Some([]) => {
                    prepared.searches.extend(index.map(|index| (Arc::clone(name), index)));
                    continue;
                }
                Some(keys) => {
                    changes.add("handler", name, &format!("changed: {}", keys.join(", ")));
                }
            }
            match open(name, handler, index, &prepared.settings, &prepared.transports).await {
                Ok(Open { handler, options, index }) => {
                    prepared.searches.extend(index.map(|index| (Arc::clone(name), index)));
                    prepared.handlers.push((handler, options));
                }
                Err(error) => errors.push(error),
            }
        }
        for name in self.settings.handlers.keys() {
            if !prepared.settings.handlers.contains_key(name) {
                changes.add("handler", name, "removed");
                prepared.gone_handlers.push(Arc::clone(name));
            }
        }
    }

    /// The index that is open already: it cannot be opened twice, and need not be.
    fn index(&self, name: &str, handler: &HandlerSettings) -> Option<Arc<SearchHandler>> {
        match (&handler.kind, self.settings.handlers.get(name).map(|old| &old.kind)) {
            (HandlerKind::Search(_), Some(HandlerKind::Search(_))) => self.searches.get(name),
            _ => None,
        }
    }

    /// Puts what was prepared into the place of what runs. Where the bus drains meanwhile, the
    /// rest is left as it is.
    ///
    /// Waits for what is replaced to end: for each handler its timeout and a little more at
    /// most, for sources some seconds. Everything else runs on.
    pub async fn apply(&mut self, prepared: Prepared) {
        let Prepared {
            settings,
            transports,
            searches,
            handlers,
            gone_handlers,
            sources,
            ended_sources,
            changes,
        } = prepared;
        for Change { part, what } in changes {
            tracing::info!("reload: {part}: {what}");
        }
        join_all(ended_sources.iter().map(|name| self.bus.end_source(name))).await;
        for name in &gone_handlers {
            if self.bus.remove_handler(name).await.is_err() {
                return;
            }
        }
        // Handlers before sources: what comes in finds them running.
        for (handler, options) in handlers {
            if self.bus.register_handler_with(handler, options).await.is_err() {
                return;
            }
        }
        let shelf = self.searches.clone();
        // An index that nobody has any more waits for its thread.
        let _ = tokio::task::spawn_blocking(move || shelf.set(searches)).await;
        for source in sources {
            self.bus.add_source(source);
        }
        (self.settings, self.transports) = (settings, transports);
    }

    /// Has `/readyz` say that a configuration was refused, and why, until another one is taken.
    pub fn refused(&self, errors: &[String]) {
        let mut reason = "the new configuration is not in use: ".to_owned();
        let said = errors.len().min(MAX_ERRORS);
        reason.push_str(&errors[..said].join("; "));
        if errors.len() > said {
            reason.push_str(&format!("; and {} more, see the log", errors.len() - said));
        }
        self.note(Some((Health::Degraded, "refused", reason)));
    }

    /// Has `/readyz` say what of the configuration has to wait for a restart, where there is
    /// something.
    pub fn taken(&self, at_restart: &[String]) {
        let reason = format!("takes effect at the next restart: {}", at_restart.join(", "));
        let waits = (Health::Ready, "waits for a restart", reason);
        self.note((!at_restart.is_empty()).then_some(waits));
    }

    fn note(&self, note: Option<(Health, &'static str, String)>) {
        *lock(&self.bus.inner.config) = note.map(|(health, state, reason)| Component {
            component: "config".to_owned(),
            health,
            state,
            since: crate::event::now(),
            reason: Some(reason),
        });
    }
}

#[derive(Default)]
struct Changes(Vec<Change>);

impl Changes {
    fn add(&mut self, kind: &str, name: &str, what: &str) {
        self.0.push(Change { part: format!("{kind} `{name}`"), what: what.to_owned() });
    }
}

/// A handler, how it is run, and its index where it has one.
struct Open {
    handler: Arc<dyn EventHandler>,
    options: HandlerOptions,
    index: Option<Arc<SearchHandler>>,
}

async fn open(
    name: &Arc<str>,
    handler: &HandlerSettings,
    index: Option<Arc<SearchHandler>>,
    settings: &Settings,
    transports: &Transports,
) -> Result<Open, ComposeError> {
    let options = open_options(name, handler, transports).await?;
    let handle: Arc<dyn EventHandler> = match (&handler.kind, index) {
        (HandlerKind::Search(_), Some(index)) => {
            return Ok(Open { handler: Arc::clone(&index) as _, options, index: Some(index) });
        }
        (HandlerKind::Search(search), None) => {
            let opened =
                open_search(name, search.clone()).await.map_err(|trouble| match trouble {
                    Trouble::Lasting(error) => error,
                    // Whoever asks for a reload can ask again.
                    Trouble::Passing(reason) => {
                        ComposeError::Handler { name: Arc::clone(name), reason }
                    }
                })?;
            let index = Arc::new(opened);
            return Ok(Open { handler: Arc::clone(&index) as _, options, index: Some(index) });
        }
        (HandlerKind::Forward(forward), _) => {
            open_forward(name, forward, settings, transports).await?
        }
        (HandlerKind::Log { level }, _) => log_handler(name, *level),
    };
    Ok(Open { handler: handle, options, index: None })
}

impl EventBus {
    /// Ends a source: it takes nothing more and settles what it holds. What the log has of it
    /// stays, and so does its place: a source of the same name goes on from there.
    ///
    /// Returns when it has ended; after some seconds it is cut off, and what it held comes again.
    pub async fn end_source(&self, name: &str) {
        let Some(mut source) = lock(&self.inner.sources).remove(name) else { return };
        source.stop.cancel();
        if tokio::time::timeout(TO_SETTLE, &mut source.task).await.is_err() {
            tracing::warn!(source = name, "cut off: it did not settle what it held in time");
            source.task.abort();
            // Aborted at its next await; a successor must not start before that.
            let _ = source.task.await;
        }
        let labels = SourceLabels { source: name.into() };
        self.inner.metrics.source.forget(&labels, &SourceState::WORDS);
    }

    /// Ends a handler and forgets it: what it is doing ends, and its cursor is saved. Cursor,
    /// retries and dead letters stay in the store: a handler of the same name goes on from there.
    ///
    /// # Errors
    /// [`HandlerAccessError::Unknown`]; [`HandlerAccessError::Closed`].
    pub async fn remove_handler(&self, name: &str) -> Result<(), HandlerAccessError> {
        // On a task of its own, as when one is replaced.
        let (bus, name): (_, Arc<str>) = (self.clone(), name.into());
        let remove = async move { bus.remove(&name).await };
        self.inner.handler_tasks.spawn(remove).await.unwrap_or(Err(HandlerAccessError::Closed))
    }

    async fn remove(&self, name: &Arc<str>) -> Result<(), HandlerAccessError> {
        let inner = &self.inner;
        let _one_at_a_time = inner.registering.lock().await;
        if inner.stop_handlers.is_cancelled() {
            return Err(HandlerAccessError::Closed);
        }
        let running = match lock(&inner.handlers).get_mut(name) {
            Some(registered) => Registered::take_running(registered),
            None => return Err(HandlerAccessError::Unknown((&**name).into())),
        };
        if let Some(running) = running {
            running.stop().await;
        }
        let rebuild = lock(&inner.rebuilds).remove(name);
        if let Some(rebuild) = rebuild {
            rebuild.stop().await;
        }
        let removed = lock(&inner.handlers).remove(name);
        drop(removed);
        let labels = HandlerLabels { handler: Arc::clone(name) };
        inner.metrics.handler.forget(&labels, &HandlerState::WORDS);
        Ok(())
    }
}

impl std::fmt::Debug for Reloader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reloader").field("bus", &self.bus).finish_non_exhaustive()
    }
}

impl std::fmt::Debug for Prepared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Prepared").finish_non_exhaustive()
    }
}
