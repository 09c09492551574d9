//! From checked settings to a running bus: the one place, next to the configuration, that names
//! concrete transports, stores and handlers.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, ErrorKind, Read as _, Write as _},
    path::Path,
    sync::{Arc, Mutex},
};

use super::{Component, EventBus, Health, RetainOptions, Searches, lock};
use crate::{
    config::{
        DeadLetterSettings, ForwardSettings, HandlerKind, HandlerSettings, INGEST, LogLevel,
        RetainSettings, Settings, SourceSettings, StoreSettings, TransportSettings,
    },
    dispatch::{Filter, HandlerOptions},
    handler::{
        EventHandler,
        dead_letter::{DeadLetterDestination, DeadLetterForward},
        forward::{ForwardHandler, ForwardOptions},
        log::LogHandler,
        search::{SearchError, SearchHandler, SearchOptions},
    },
    ingest::{IngestOptions, Source},
    retry::RetryPolicy,
    store::{
        EventStore, LogOptions, StoreError,
        memory::MemoryStore,
        postgres::{PostgresOptions, PostgresStore},
        sqlite::{SqliteOptions, SqliteStore},
    },
    transport::{
        Publisher, Transport, TransportError,
        amqp::AmqpTransport,
        http::{HttpIngress, HttpTransport, WebhookTransport},
        memory::{MemoryOptions, MemoryTransport},
        nats::NatsTransport,
    },
};

/// A bus as configured, with what the HTTP server shows beside it.
pub struct Composed {
    /// The bus: its sources consume and its handlers run.
    pub bus: EventBus,
    /// Where posted events go, if a source takes them.
    pub ingress: Option<HttpIngress>,
    /// The search indexes by handler name.
    pub searches: Searches,
    /// The transports by name, that of the endpoint among them.
    pub transports: BTreeMap<Arc<str>, Arc<dyn Transport>>,
}

/// Why a bus could not be composed.
#[derive(Debug, thiserror::Error)]
pub enum ComposeError {
    /// The store cannot be used.
    #[error("the event store: {0}")]
    Store(#[source] StoreError),
    /// A transport cannot be used as configured.
    #[error("transport `{name}`: {source}")]
    Transport {
        /// Its name.
        name: Arc<str>,
        /// Why.
        source: TransportError,
    },
    /// A handler cannot be used as configured.
    #[error("handler `{name}`: {reason}")]
    Handler {
        /// Its name.
        name: Arc<str>,
        /// Why, with its causes.
        reason: String,
    },
    /// Opening a handler ended without an answer: a fault in pulsebus.
    #[error("handler `{name}` was not opened: {reason}")]
    Cut {
        /// Its name.
        name: Arc<str>,
        /// Why.
        reason: String,
    },
}

impl ComposeError {
    /// Whether it is the configuration, or what it names, that a person has to change; starting
    /// again without that ends the same way.
    #[must_use]
    pub const fn is_misconfigured(&self) -> bool {
        matches!(
            self,
            Self::Store(StoreError::Misconfigured(_))
                | Self::Transport { source: TransportError::Misconfigured(_), .. }
                | Self::Handler { .. }
        )
    }
}

/// What composing a bus waits for, for whoever asks in the meantime. Clones are the same.
#[derive(Debug, Clone)]
pub struct Starting(Arc<Mutex<Component>>);

impl Default for Starting {
    fn default() -> Self {
        Self(Arc::new(Mutex::new(Component {
            component: "bus".to_owned(),
            health: Health::NotReady,
            state: "starting",
            since: crate::event::now(),
            reason: None,
        })))
    }
}

/// Composes and starts a bus, like [`Starting::compose`].
///
/// # Errors
/// See [`ComposeError`].
pub async fn compose(settings: &Settings) -> Result<Composed, ComposeError> {
    Starting::default().compose(settings).await
}

impl Starting {
    /// The part that is waited for, as `/readyz` shows it; never ready.
    #[must_use]
    pub fn component(&self) -> Component {
        lock(&self.0).clone()
    }

    pub(crate) fn waits_for(&self, component: &str, reason: String) {
        let (health, component) = (Health::NotReady, component.to_owned());
        let (state, mut now) = ("waiting", lock(&self.0));
        let same = now.component == component && now.state == state;
        let since = if same { now.since } else { crate::event::now() };
        *now = Component { component, health, state, since, reason: Some(reason) };
    }

    /// Composes and starts a bus. Waits for a store that is away and for an index that the
    /// machine does not let it open, and says so.
    ///
    /// *Cancel safe*: what was started ends when the future is dropped.
    ///
    /// # Errors
    /// See [`ComposeError`]; brokers that are away are no error, their sources wait for them.
    pub async fn compose(&self, settings: &Settings) -> Result<Composed, ComposeError> {
        compose_bus(settings, self).await
    }

    /// Tries until it works, or cannot.
    async fn patiently<T, F>(
        &self,
        component: &str,
        mut attempt: impl FnMut() -> F,
    ) -> Result<T, ComposeError>
    where
        F: Future<Output = Result<T, Trouble>>,
    {
        let mut delays = RetryPolicy::reconnect().start();
        let mut said = None;
        loop {
            let reason = match attempt().await {
                Ok(done) => {
                    *lock(&self.0) = Self::default().component();
                    return Ok(done);
                }
                Err(Trouble::Lasting(error)) => return Err(error),
                Err(Trouble::Passing(reason)) => reason,
            };
            self.waits_for(component, reason.clone());
            if said.as_ref() != Some(&reason) {
                tracing::warn!(%reason, "waiting for {component}");
                said = Some(reason);
            }
            tokio::time::sleep(delays.next_delay()).await;
        }
    }
}

/// Why something could not be opened.
pub(super) enum Trouble {
    /// It may work later.
    Passing(String),
    Lasting(ComposeError),
}

impl From<StoreError> for Trouble {
    fn from(error: StoreError) -> Self {
        match error {
            error @ StoreError::Fenced(_) => Self::Passing(error.to_string()),
            StoreError::Unavailable(reason) => Self::Passing(reason.to_string()),
            error @ (StoreError::Fatal(_) | StoreError::Misconfigured(_)) => {
                Self::Lasting(ComposeError::Store(error))
            }
        }
    }
}

async fn compose_bus(settings: &Settings, starting: &Starting) -> Result<Composed, ComposeError> {
    let store = starting.patiently("store", || open_store(settings)).await?;
    let (name, held) = match &settings.store {
        StoreSettings::Postgres { .. } => instance(&settings.data_dir),
        StoreSettings::Memory | StoreSettings::Sqlite { .. } => (new_instance(), None),
    };
    let held = held.map(Arc::new);
    let log = LogOptions { tail_bytes: settings.limits.tail_bytes, ..LogOptions::default() };
    let bus = starting
        .patiently("store", || async {
            let mut builder = EventBus::builder()
                .shared_store(Arc::clone(&store))
                .instance(name.clone())
                .instance_lock(held.clone())
                .log_options(log.clone())
                .max_event_bytes(settings.limits.max_event_bytes);
            if let Some(RetainSettings { age, bytes, identities }) = settings.retain {
                let retain = RetainOptions { age, bytes, identities, ..RetainOptions::default() };
                builder = builder.retain(retain);
            }
            Ok(builder.build().await?)
        })
        .await?;

    let http = HttpTransport::new(settings.limits.ingest_bytes);
    let ingress = http.ingress();
    let mut transports: BTreeMap<Arc<str>, Arc<dyn Transport>> = BTreeMap::new();
    transports.insert(INGEST.into(), Arc::new(http));
    for (name, transport) in &settings.transports {
        transports.insert(Arc::clone(name), open_transport(name, transport)?);
    }

    // Handlers before sources: what comes in finds them running.
    let mut searches = BTreeMap::new();
    for (name, handler) in &settings.handlers {
        let handle: Arc<dyn EventHandler> = match &handler.kind {
            HandlerKind::Search(options) => {
                let component = format!("handler:{name}");
                let search =
                    starting.patiently(&component, || open_search(name, options.clone())).await?;
                let search = Arc::new(search);
                searches.insert(Arc::clone(name), Arc::clone(&search));
                search
            }
            HandlerKind::Forward(forward) => {
                open_forward(name, forward, settings, &transports).await?
            }
            HandlerKind::Log { level } => log_handler(name, *level),
        };
        let options = open_options(name, handler, &transports).await?;
        // Nothing else registers handlers while composing, and the bus is not draining.
        if bus.register_handler_with(handle, options).await.is_err() {
            break;
        }
    }
    bus.start_worker_pool(DEFAULT_WORKERS);

    let mut takes_http = false;
    for (name, source) in &settings.sources {
        if let Some(transport) = transports.get(&source.transport) {
            takes_http |= *source.transport == *INGEST;
            bus.add_source(source_of(name, source, transport, settings));
        }
    }
    let ingress = takes_http.then_some(ingress);
    let shelf = Searches::default();
    shelf.set(searches);
    Ok(Composed { bus, ingress, searches: shelf, transports })
}

pub(super) fn log_handler(name: &str, level: LogLevel) -> Arc<dyn EventHandler> {
    Arc::new(LogHandler::new(name, level_of(level)))
}

/// How a handler is run, with where its dead letters go.
pub(super) async fn open_options(
    name: &Arc<str>,
    handler: &HandlerSettings,
    transports: &BTreeMap<Arc<str>, Arc<dyn Transport>>,
) -> Result<HandlerOptions, ComposeError> {
    let mut options = handler_options(name, handler)?;
    if let Some(to) = &handler.dead_letter {
        options.dead_letter = Some(open_dead_letter(name, to, transports).await?);
    }
    Ok(options)
}

/// What this daemon calls itself when it claims handlers: the same after a restart, so that it
/// need not wait for its own claims to end. Kept in the data folder, and held with a lock: a
/// second daemon that shares the folder gets another name, and so does one whose folder cannot
/// be written.
fn instance(data_dir: &Path) -> (String, Option<File>) {
    let kept = || -> io::Result<(String, File)> {
        fs::create_dir_all(data_dir)?;
        let path = data_dir.join("instance");
        let mut file =
            File::options().read(true).write(true).create(true).truncate(false).open(path)?;
        file.try_lock()?;
        let mut name = String::new();
        file.read_to_string(&mut name)?;
        if name.trim().is_empty() {
            name = new_instance();
            file.write_all(name.as_bytes())?;
            file.sync_all()?;
        }
        Ok((name.trim().to_owned(), file))
    };
    match kept() {
        Ok((name, file)) => (name, Some(file)),
        Err(_) => (new_instance(), None),
    }
}

fn new_instance() -> String {
    let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    format!("{}/{}", host.trim(), uuid::Uuid::now_v7())
}

const DEFAULT_WORKERS: usize = 4;

async fn open_store(settings: &Settings) -> Result<Arc<dyn EventStore>, Trouble> {
    Ok(match &settings.store {
        StoreSettings::Memory => Arc::new(MemoryStore::new()),
        StoreSettings::Sqlite { path } => {
            Arc::new(SqliteStore::open(SqliteOptions::new(path)).await?)
        }
        StoreSettings::Postgres { url, max_connections, tls } => {
            let options = PostgresOptions {
                max_connections: *max_connections,
                tls: tls.clone(),
                ..PostgresOptions::new(url.clone())
            };
            Arc::new(PostgresStore::connect(options).await?)
        }
    })
}

pub(super) async fn open_search(
    name: &Arc<str>,
    options: SearchOptions,
) -> Result<SearchHandler, Trouble> {
    let owned = name.to_string();
    // Opening reads the index as a whole.
    let opened = tokio::task::spawn_blocking(move || SearchHandler::open(owned, options)).await;
    match opened {
        Ok(Ok(search)) => Ok(search),
        Ok(Err(error)) if is_machine_fault(&error) => Err(Trouble::Passing(with_causes(&error))),
        Ok(Err(error)) => Err(Trouble::Lasting(handler_error(name, &error))),
        Err(error) => Err(Trouble::Lasting(ComposeError::Cut {
            name: Arc::clone(name),
            reason: error.to_string(),
        })),
    }
}

/// Whether opening an index may work later without a change to the configuration: a full disk,
/// an I/O error, no memory for a thread, a predecessor that is still draining (no two handlers
/// of a configuration share a folder).
fn is_machine_fault(error: &SearchError) -> bool {
    match error {
        SearchError::Open { .. } | SearchError::Thread { .. } | SearchError::Locked { .. } => true,
        SearchError::Folder { source, .. } => !matches!(
            source.kind(),
            ErrorKind::PermissionDenied
                | ErrorKind::ReadOnlyFilesystem
                | ErrorKind::NotADirectory
                | ErrorKind::AlreadyExists
                | ErrorKind::InvalidInput
                | ErrorKind::InvalidFilename
        ),
        _ => false,
    }
}

/// Opens a transport of the configuration.
///
/// # Errors
/// Where it cannot be used as configured. Nothing is connected yet.
pub fn open_transport(
    name: &Arc<str>,
    transport: &TransportSettings,
) -> Result<Arc<dyn Transport>, ComposeError> {
    let refuse = |source| ComposeError::Transport { name: Arc::clone(name), source };
    Ok(match transport {
        TransportSettings::Nats(options) => Arc::new(NatsTransport::new(options.clone())),
        TransportSettings::Amqp(options) => {
            Arc::new(AmqpTransport::new(options.clone()).map_err(refuse)?)
        }
        TransportSettings::Memory => Arc::new(MemoryTransport::new(MemoryOptions::default())),
        TransportSettings::Http(options) => {
            Arc::new(WebhookTransport::new(options.clone()).map_err(refuse)?)
        }
    })
}

pub(super) async fn open_forward(
    name: &Arc<str>,
    forward: &ForwardSettings,
    settings: &Settings,
    transports: &BTreeMap<Arc<str>, Arc<dyn Transport>>,
) -> Result<Arc<dyn EventHandler>, ComposeError> {
    let (transport, address) = (&forward.transport, &forward.address);
    let (publisher, mut options) =
        open_destination(name, transport, address, forward.exchange.clone(), transports).await?;
    let headers = forward.headers.iter().map(|(name, value)| (name.clone(), value.clone()));
    options = ForwardOptions { headers: headers.collect(), format: forward.format, ..options };
    if let Some(TransportSettings::Http(webhook)) = settings.transports.get(transport) {
        options.batch = webhook.batch;
    }
    let handler = ForwardHandler::new(&**name, publisher, options)
        .map_err(|error| handler_error(name, &error))?;
    Ok(Arc::new(handler))
}

async fn open_dead_letter(
    name: &Arc<str>,
    to: &DeadLetterSettings,
    transports: &BTreeMap<Arc<str>, Arc<dyn Transport>>,
) -> Result<Arc<dyn DeadLetterDestination>, ComposeError> {
    let (publisher, options) =
        open_destination(name, &to.transport, &to.address, to.exchange.clone(), transports).await?;
    let destination = DeadLetterForward::new(Arc::clone(name), publisher, options)
        .map_err(|error| handler_error(name, &error))?;
    Ok(Arc::new(destination))
}

async fn open_destination(
    name: &Arc<str>,
    transport: &Arc<str>,
    address: &str,
    exchange: Option<String>,
    transports: &BTreeMap<Arc<str>, Arc<dyn Transport>>,
) -> Result<(Arc<dyn Publisher>, ForwardOptions), ComposeError> {
    let opened = transports.get(transport).ok_or_else(|| ComposeError::Handler {
        name: Arc::clone(name),
        reason: format!("there is no transport `{transport}`"),
    })?;
    let publisher = opened
        .publisher()
        .await
        .map_err(|source| ComposeError::Transport { name: Arc::clone(transport), source })?;
    let options = ForwardOptions { exchange, ..ForwardOptions::new(opened.kind(), address) };
    Ok((publisher.into(), options))
}

fn handler_options(
    name: &Arc<str>,
    settings: &HandlerSettings,
) -> Result<HandlerOptions, ComposeError> {
    let retry = &settings.retry;
    let retry =
        RetryPolicy::new(retry.attempts, retry.initial, retry.max, retry.multiplier, retry.jitter)
            .map_err(|error| handler_error(name, &error))?;
    let mut checkpoint_interval = settings.checkpoint.interval;
    if let HandlerKind::Search(options) = &settings.kind {
        checkpoint_interval = checkpoint_interval.min(options.commit_interval);
    }
    Ok(HandlerOptions {
        events: Filter::new(&settings.events).map_err(|error| handler_error(name, &error))?,
        start: settings.start,
        workers: Some(settings.workers),
        ordering: settings.ordering,
        timeout: settings.timeout,
        retry,
        on_dead: Some(settings.on_dead),
        dead_letter: None,
        window: settings.window.events,
        window_bytes: settings.window.bytes,
        parked_per_key: settings.parked.per_key,
        parked_total: settings.parked.total,
        checkpoint_interval,
        checkpoint_events: settings.checkpoint.events as u64,
    })
}

/// What each source may hold, in bytes: the bound is over all of them; one event always fits.
pub(super) fn share(settings: &Settings) -> usize {
    (settings.limits.ingest_bytes / settings.sources.len().max(1))
        .max(settings.limits.max_event_bytes)
}

pub(super) fn source_of(
    name: &Arc<str>,
    source: &SourceSettings,
    transport: &Arc<dyn Transport>,
    settings: &Settings,
) -> Source {
    Source {
        name: Arc::clone(name),
        transport: Arc::clone(transport),
        params: source.params.clone(),
        competing: source.competing,
        decoder: source.decoder.clone(),
        options: IngestOptions { max_held_bytes: share(settings), ..IngestOptions::default() },
    }
}

fn handler_error(name: &Arc<str>, error: &dyn std::error::Error) -> ComposeError {
    ComposeError::Handler { name: Arc::clone(name), reason: with_causes(error) }
}

fn with_causes(error: &dyn std::error::Error) -> String {
    let mut reason = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        reason.push_str(": ");
        reason.push_str(&inner.to_string());
        cause = inner.source();
    }
    reason
}

const fn level_of(level: LogLevel) -> tracing::Level {
    match level {
        LogLevel::Error => tracing::Level::ERROR,
        LogLevel::Warn => tracing::Level::WARN,
        LogLevel::Info => tracing::Level::INFO,
        LogLevel::Debug => tracing::Level::DEBUG,
        LogLevel::Trace => tracing::Level::TRACE,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_daemon_keeps_its_name_and_nobody_else_has_it_meanwhile() {
        let folder = tempfile::tempdir().unwrap();
        let (first, held) = instance(folder.path());
        let (second, not_held) = instance(folder.path());
        assert_ne!(first, second);
        assert!(held.is_some() && not_held.is_none());
        drop(held);
        assert_eq!(instance(folder.path()).0, first);
    }

    #[tokio::test(start_paused = true)]
    async fn G8_a_start_waits_out_what_passes_and_says_what_it_waits_for() {
        let starting = Starting::default();
        let mut tries = 0;
        let opened = starting.patiently("handler:search", || {
            tries += 1;
            let full = tries < 4;
            let shown = starting.component();
            assert_eq!(shown.health, Health::NotReady);
            assert_eq!(shown.reason.is_some(), tries > 1, "{shown:?}");
            async move {
                if full { Err(Trouble::Passing("no space left".to_owned())) } else { Ok("open") }
            }
        });
        assert_eq!(opened.await.unwrap(), "open");
        assert_eq!(tries, 4);
        assert_eq!(starting.component().reason, None);
    }

    #[test]
    fn a_fault_of_the_machine_is_no_misconfiguration() {
        let folder = |kind: ErrorKind| SearchError::Folder {
            path: "index".into(),
            source: io::Error::from(kind),
        };
        assert!(is_machine_fault(&folder(ErrorKind::StorageFull)));
        assert!(is_machine_fault(&folder(ErrorKind::Other)));
        assert!(is_machine_fault(&SearchError::Open {
            path: "index".into(),
            source: io::Error::from(ErrorKind::StorageFull).into(),
        }));
        assert!(!is_machine_fault(&folder(ErrorKind::PermissionDenied)));
        assert!(!is_machine_fault(&SearchError::WriterMemory { bytes: 1 }));
        assert!(!ComposeError::Store(StoreError::fatal("damaged")).is_misconfigured());
        assert!(ComposeError::Store(StoreError::misconfigured("no database")).is_misconfigured());
        let away = TransportError::Unavailable("away".to_owned());
        assert!(!ComposeError::Transport { name: "x".into(), source: away }.is_misconfigured());
    }
}
