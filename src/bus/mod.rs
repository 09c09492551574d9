//! The bus: a log, what flows into it, and what is done with it.
//!
//! [`EventBus`] is the library's front door; the daemon composes one from its configuration.
//! Nothing is dropped when somebody is slow: an emit resolves when its event is committed, and
//! every handler reads the log at its own pace.

mod blocked;
mod builder;
mod compose;
mod gauges;
mod handlers;
mod health;
mod lookout;
mod operate;
mod reasons;
mod rebuild;
mod reingest;
mod reload;
mod retain;
mod searches;
mod turns;

pub use builder::EventBusBuilder;
pub use compose::{ComposeError, Composed, Starting, compose, open_transport};
pub use health::{Component, Health, SourceSnapshot};
pub use operate::RewindTo;
pub use rebuild::Rebuilding;
pub use reload::{Prepared, Reloader};
pub use retain::{RetainOptions, Retention};
pub use searches::Searches;

use std::{
    collections::BTreeMap,
    fs::File,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::{sync::Notify, task::JoinHandle};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use self::{
    handlers::Registered, rebuild::Rebuild, reingest::Reingest, retain::Retaining, turns::Turns,
};
use crate::{
    dispatch::{HandlerOptions, HandlerStatus},
    event::{Decoder, DecoderOptions, Message, NewEvent, NewEventError, Origin, Position},
    handler::EventHandler,
    ingest::{self, Source},
    store::{Append, Entry, EventStore, Log, LogHealth, StoreError},
    telemetry::{Arrivals, Metrics, SourceLabels},
    transport::{Receipt, Reporter},
};

/// An event bus over a durable log. Cheap to clone; clones are the same bus.
///
/// ```
/// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
/// use pulsebus::{bus::EventBus, event::{DomainEvent, NewEvent}, store::memory::MemoryStore};
///
/// let bus = EventBus::builder().store(MemoryStore::new()).build().await?;
/// bus.start_worker_pool(4);
/// let receipt = bus.emit(NewEvent::new("LessonRemoved", &serde_json::json!({"lesson_id": 7}))?).await?;
/// assert_eq!(receipt.position.0, 1);
/// bus.drain(std::time::Duration::from_secs(5)).await?;
/// # Ok(()) }
/// # tokio::runtime::Runtime::new().unwrap().block_on(example()).unwrap();
/// ```
#[derive(Clone)]
pub struct EventBus {
    inner: Arc<Inner>,
}

struct Inner {
    log: Arc<Log>,
    metrics: Metrics,
    max_event_bytes: usize,
    /// Who claims handlers.
    instance: Arc<str>,
    /// Keeps other processes from calling themselves the same.
    _instance_lock: Option<Arc<File>>,
    lease: Duration,
    sources: Arc<Mutex<BTreeMap<Arc<str>, RunningSource>>>,
    /// How the last reload went, where there is something to say.
    config: Mutex<Option<Component>>,
    /// Read models that are being built anew, by the handler they are for.
    rebuilds: Mutex<BTreeMap<Arc<str>, Rebuild>>,
    /// Tells the task that takes quarantine entries up.
    redrive_started: Arc<Notify>,
    /// How the removal of old events is, where there is any.
    retention: Option<Arc<Mutex<Retention>>>,
    handlers: Arc<Mutex<BTreeMap<Arc<str>, Registered>>>,
    /// Workers a handler has by default, once the pool is started.
    pool: Mutex<Option<usize>>,
    /// One registration at a time, so that replacing a handler cannot race with itself.
    registering: tokio::sync::Mutex<()>,
    source_tasks: TaskTracker,
    handler_tasks: TaskTracker,
    log_tasks: TaskTracker,
    stop_sources: CancellationToken,
    stop_handlers: CancellationToken,
    stop_log: CancellationToken,
    /// Ends everything at once, when a drain's deadline has passed.
    abort: CancellationToken,
}

struct RunningSource {
    transport: &'static str,
    decoder: DecoderOptions,
    reporter: Reporter,
    stop: CancellationToken,
    task: JoinHandle<Option<()>>,
}

/// What an emitted event has become.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Emitted {
    /// Its position, or that of the event it is a copy of.
    pub position: Position,
    /// Whether it was in the log already.
    pub duplicate: bool,
}

/// Why an event was not emitted.
#[derive(Debug, thiserror::Error)]
pub enum EmitError {
    /// It cannot be written as JSON.
    #[error("the event has no JSON form")]
    Unwritable(#[from] NewEventError),
    /// It is no event, or conflicts with one; it is in quarantine under this number.
    #[error("not an event, in quarantine as number {number}: {reason}")]
    Quarantined {
        /// Its number in quarantine.
        number: u64,
        /// Why.
        reason: Arc<str>,
    },
    /// The bus is draining, or its store has failed. The event may be committed or not: emit
    /// it again, with the same id, to the bus that takes over.
    #[error("the bus is closed")]
    Closed,
}

impl From<std::convert::Infallible> for EmitError {
    fn from(never: std::convert::Infallible) -> Self {
        match never {}
    }
}

/// Why a handler was not registered, or not told what to do.
#[derive(Debug, thiserror::Error)]
pub enum HandlerAccessError {
    /// No handler of that name.
    #[error("no handler is called `{0}`")]
    Unknown(Box<str>),
    /// It has never run, so there is nothing to pause or rewind yet.
    #[error("handler `{0}` has not run yet: start the worker pool, or wait for the store")]
    NotStarted(Box<str>),
    /// Another process runs it.
    #[error("handler `{0}` is run by another process: ask that one")]
    Elsewhere(Box<str>),
    /// It has effects outside that would happen again.
    #[error(
        "handler `{0}` has effects outside of pulsebus, which would happen again; say that they \
         may (allow_side_effects)"
    )]
    SideEffects(Box<str>),
    /// It makes no sense.
    #[error("{0}")]
    Refused(String),
    /// The store did not take it.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The bus is draining.
    #[error("the bus is closed")]
    Closed,
}

/// A drain that did not end in time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not everything ended within {0:?}; what was cut off comes again")]
pub struct DrainDeadline(pub Duration);

impl EventBus {
    /// Starts to build a bus.
    #[must_use]
    pub fn builder() -> EventBusBuilder {
        EventBusBuilder::default()
    }

    async fn open(builder: EventBusBuilder) -> Result<Self, StoreError> {
        let EventBusBuilder {
            store,
            log,
            metrics,
            max_event_bytes,
            instance,
            instance_lock,
            lease,
            retain,
        } = builder;
        let store: Arc<dyn EventStore> = match store {
            Some(store) => store,
            None => Arc::new(crate::store::memory::MemoryStore::new()),
        };
        let log_tasks = TaskTracker::new();
        let stop_log = CancellationToken::new();
        let log = Log::open(store, log, metrics.clone(), &log_tasks, stop_log.clone()).await?;
        let (source_tasks, stop_sources) = (TaskTracker::new(), CancellationToken::new());
        let abort = CancellationToken::new();
        let (sources, redrive_started) = (Arc::default(), Arc::new(Notify::new()));
        let reingest = Reingest {
            log: Arc::clone(&log),
            sources: Arc::clone(&sources),
            default: DecoderOptions { max_event_bytes, ..DecoderOptions::default() },
            started: Arc::clone(&redrive_started),
        };
        // It takes in, as a source does, and ends with them.
        let (cut, reingest) = (abort.clone(), reingest.run(stop_sources.clone()));
        source_tasks.spawn(async move { cut.run_until_cancelled(reingest).await });
        let handlers: Arc<Mutex<BTreeMap<_, _>>> = Arc::default();
        let retention = retain.map(|options| {
            let retaining =
                Retaining::new(options, Arc::clone(&log), Arc::clone(&handlers), metrics.clone());
            let retention = retaining.state();
            // It ends before the log does: a step is a write.
            let (cut, run) = (abort.clone(), retaining.run(stop_sources.clone()));
            source_tasks.spawn(async move { cut.run_until_cancelled(run).await });
            retention
        });
        let bus = Self {
            inner: Arc::new(Inner {
                log,
                metrics,
                max_event_bytes,
                instance: instance.into(),
                _instance_lock: instance_lock,
                lease,
                sources,
                config: Mutex::default(),
                redrive_started,
                retention,
                rebuilds: Mutex::default(),
                handlers,
                pool: Mutex::default(),
                registering: tokio::sync::Mutex::default(),
                source_tasks,
                handler_tasks: TaskTracker::new(),
                log_tasks,
                stop_sources,
                stop_handlers: CancellationToken::new(),
                stop_log,
                abort,
            }),
        };
        let inner = &bus.inner;
        inner.log_tasks.spawn(lookout::run(Arc::downgrade(inner), inner.stop_log.clone()));
        Ok(bus)
    }

    /// The store under the log: read it back, typed, with
    /// [`stream_all`](../store/trait.EventStore.html#method.stream_all).
    #[must_use]
    pub fn store(&self) -> &Arc<dyn EventStore> {
        self.inner.log.store()
    }

    /// The log.
    #[must_use]
    pub fn log(&self) -> &Arc<Log> {
        &self.inner.log
    }

    /// The bus's metrics.
    #[must_use]
    pub fn metrics(&self) -> &Metrics {
        &self.inner.metrics
    }

    /// Emits an event: resolves when it is committed (G1), or known to be a copy (G2).
    ///
    /// While the store is away this waits; give it a timeout if you would rather try again
    /// later, with the same [`NewEvent`], whose id makes a second copy a duplicate.
    ///
    /// # Errors
    /// [`EmitError::Unwritable`] where it has no JSON, [`EmitError::Quarantined`] where that is
    /// no event; [`EmitError::Closed`].
    pub async fn emit<E>(&self, event: E) -> Result<Emitted, EmitError>
    where
        E: TryInto<NewEvent, Error: Into<EmitError>>,
    {
        let mut message = event.try_into().map_err(Into::into)?.into_message();
        message.origin =
            Origin { source: "emit".into(), transport: "memory".into(), ..Origin::default() };
        let receipts = self.append(vec![message]).await?;
        match receipts.into_iter().next() {
            Some(Receipt::Stored(position)) => Ok(Emitted { position, duplicate: false }),
            Some(Receipt::Duplicate(position)) => Ok(Emitted { position, duplicate: true }),
            Some(Receipt::Quarantined { number, reason }) => {
                Err(EmitError::Quarantined { number, reason })
            }
            None => Err(EmitError::Closed),
        }
    }

    /// Appends messages as they would come from a source; one receipt each, in order.
    ///
    /// # Errors
    /// [`EmitError::Closed`].
    pub async fn append(&self, messages: Vec<Message>) -> Result<Vec<Receipt>, EmitError> {
        let mut decoder = Decoder::new(DecoderOptions {
            max_event_bytes: self.inner.max_event_bytes,
            ..DecoderOptions::default()
        });
        let mut arrivals = Arrivals::begin();
        let entries = messages
            .into_iter()
            .enumerate()
            .map(|(at, message)| match decoder.decode(message) {
                Ok(mut event) => {
                    arrivals.add(at, &mut event);
                    Entry::Event(event)
                }
                Err(not_an_event) => Entry::Quarantine(not_an_event.into()),
            })
            .collect();
        arrivals.appending();
        let ticket = self.inner.log.submit(Append { entries, mark: None });
        let receipts = ticket.await.map_err(|_| EmitError::Closed)?;
        arrivals.appended(|at| ingest::position_of(receipts.get(at))).end();
        Ok(receipts)
    }

    /// Adds a source and starts consuming it. A source of the same name must not be running.
    ///
    /// Where several processes share the store, one of them consumes it at a time, unless it is
    /// [`competing`](Source::competing) or its transport is `http` or `memory`, of which each
    /// process has its own.
    pub fn add_source(&self, source: Source) -> Reporter {
        let inner = &self.inner;
        let name = Arc::clone(&source.name);
        let labels = SourceLabels { source: Arc::clone(&name) };
        let reconnects = inner.metrics.source.reconnects.get_or_create_owned(&labels);
        let reporter = Reporter::new(Arc::clone(&name)).counting(reconnects);
        let (transport, decoder) = (source.transport.kind(), source.decoder.clone());
        let (log, metrics) = (Arc::clone(&inner.log), inner.metrics.clone());
        let (stop, abort) = (inner.stop_sources.child_token(), inner.abort.clone());
        let ends = stop.clone();
        let own = source.competing || matches!(source.transport.kind(), "http" | "memory");
        let task = if own || !log.store().is_shared() {
            let run = ingest::run(source, reporter.clone(), log, metrics, stop);
            inner.source_tasks.spawn(async move { abort.run_until_cancelled(run).await })
        } else {
            let (owner, lease) = (Arc::clone(&inner.instance), inner.lease);
            let turns = Turns { source, reporter: reporter.clone(), log, metrics, owner, lease };
            inner
                .source_tasks
                .spawn(async move { abort.run_until_cancelled(turns.run(stop)).await })
        };
        let running =
            RunningSource { transport, decoder, reporter: reporter.clone(), stop: ends, task };
        lock(&inner.sources).insert(name, running);
        reporter
    }

    /// Registers a handler with the default options; see
    /// [`register_handler_with`](Self::register_handler_with).
    ///
    /// # Errors
    /// [`HandlerAccessError::Closed`].
    pub async fn register_handler(
        &self,
        handler: impl EventHandler,
    ) -> Result<Arc<HandlerStatus>, HandlerAccessError> {
        self.register_handler_with(Arc::new(handler), HandlerOptions::default()).await
    }

    /// Registers a handler under its name. A handler of that name is replaced: what it is doing
    /// ends, its cursor is saved, and the new one goes on from there.
    ///
    /// It runs once the worker pool is started.
    ///
    /// # Errors
    /// [`HandlerAccessError::Closed`].
    pub async fn register_handler_with(
        &self,
        handler: Arc<dyn EventHandler>,
        options: HandlerOptions,
    ) -> Result<Arc<HandlerStatus>, HandlerAccessError> {
        // On a task of its own: a caller that goes away half way must not leave the name without
        // a handler, or with two.
        let bus = self.clone();
        let replace = async move { bus.replace(handler, options).await };
        self.inner.handler_tasks.spawn(replace).await.unwrap_or(Err(HandlerAccessError::Closed))
    }

    async fn replace(
        &self,
        handler: Arc<dyn EventHandler>,
        options: HandlerOptions,
    ) -> Result<Arc<HandlerStatus>, HandlerAccessError> {
        let inner = &self.inner;
        let _one_at_a_time = inner.registering.lock().await;
        if inner.stop_handlers.is_cancelled() {
            return Err(HandlerAccessError::Closed);
        }
        let name: Arc<str> = handler.name().into();
        let former = lock(&inner.handlers).get_mut(&name).and_then(Registered::take_running);
        if let Some(former) = former {
            former.stop().await;
        }
        let rebuild = lock(&inner.rebuilds).remove(&name);
        if let Some(rebuild) = rebuild {
            rebuild.stop().await;
        }
        self.resume_rebuild(&name, &handler, &options).await;
        // Under one lock with the pool, so that a pool that starts now launches it or sees it.
        let mut handlers = lock(&inner.handlers);
        let mut registered = Registered::new(Arc::clone(&name), handler, options);
        let status = Arc::clone(registered.status());
        if let Some(workers) = *lock(&inner.pool) {
            registered.launch(workers, inner);
        }
        handlers.insert(name, registered);
        Ok(status)
    }

    /// Starts the handlers that are registered, and those that will be, with `workers`
    /// concurrent calls each unless their options say otherwise. A second call changes the
    /// default for handlers registered later.
    pub fn start_worker_pool(&self, workers: usize) {
        let mut handlers = lock(&self.inner.handlers);
        let first = lock(&self.inner.pool).replace(workers).is_none();
        if first {
            for registered in handlers.values_mut() {
                registered.launch(workers, &self.inner);
            }
        }
    }

    /// Waits until a handler has finished everything up to a position: done, filtered out, or a
    /// dead letter; flushed, and saved. Events parked behind a dead letter are not finished.
    ///
    /// # Errors
    /// [`HandlerAccessError::Unknown`], and [`HandlerAccessError::Closed`] when the bus drains
    /// before that.
    pub async fn handled(&self, name: &str, position: Position) -> Result<(), HandlerAccessError> {
        let reached = async {
            loop {
                let mut settled = self.status(name)?.watch_settled();
                let reached = settled.wait_for(|settled| *settled >= position);
                if let Ok(Ok(_)) = tokio::time::timeout(LOOK_AGAIN, reached).await {
                    return Ok(());
                }
                // Replaced, perhaps: its successor goes on from the same cursor.
            }
        };
        let reached = self.inner.stop_handlers.run_until_cancelled(reached).await;
        reached.unwrap_or(Err(HandlerAccessError::Closed))
    }

    /// A handler's state and numbers.
    ///
    /// # Errors
    /// [`HandlerAccessError::Unknown`].
    pub fn status(&self, name: &str) -> Result<Arc<HandlerStatus>, HandlerAccessError> {
        lock(&self.inner.handlers)
            .get(name)
            .map(|registered| Arc::clone(registered.status()))
            .ok_or_else(|| HandlerAccessError::Unknown(name.into()))
    }

    /// Resolves when the store has failed for good, with the reason; the process should end.
    pub async fn failed(&self) -> Arc<str> {
        let mut health = self.inner.log.watch_health();
        match health.wait_for(|health| matches!(health, LogHealth::Failed(_))).await.as_deref() {
            Ok(LogHealth::Failed(reason)) => Arc::clone(reason),
            // The sender lives as long as the log, which this bus holds.
            _ => std::future::pending().await,
        }
    }

    /// Drains: sources stop taking and settle what they hold; handlers end what they are doing
    /// and checkpoint; the log commits what it was given; the store is closed.
    ///
    /// # Errors
    /// [`DrainDeadline`] when that took longer than `deadline`: the rest is cut off. Nothing is
    /// lost by that: it was not acked, or its cursor has not moved.
    pub async fn drain(&self, deadline: Duration) -> Result<(), DrainDeadline> {
        let inner = &self.inner;
        let drained = async {
            inner.stop_sources.cancel();
            inner.source_tasks.close();
            // A source that hangs must not cost the handlers their last checkpoint.
            let sources = tokio::time::timeout(deadline / 2, inner.source_tasks.wait()).await;
            inner.stop_handlers.cancel();
            inner.handler_tasks.close();
            inner.handler_tasks.wait().await;
            inner.stop_log.cancel();
            inner.log_tasks.close();
            inner.log_tasks.wait().await;
            sources
        };
        let result = tokio::time::timeout(deadline, drained).await.and_then(|sources| sources);
        if result.is_err() {
            inner.stop_sources.cancel();
            inner.stop_handlers.cancel();
            inner.stop_log.cancel();
            inner.abort.cancel();
        }
        let close = tokio::time::timeout(Duration::from_secs(2), inner.log.store().close()).await;
        match (result, close) {
            (Ok(()), Ok(())) => Ok(()),
            (Err(_), _) | (_, Err(_)) => Err(DrainDeadline(deadline)),
        }
    }
}

/// A bus that is dropped without a drain ends at once, as by a crash: nothing is lost, and what
/// was not acked or checkpointed comes again.
impl Drop for Inner {
    fn drop(&mut self) {
        self.abort.cancel();
        self.stop_sources.cancel();
        self.stop_handlers.cancel();
        self.stop_log.cancel();
    }
}

impl std::fmt::Debug for EventBus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EventBus").field("log", &self.inner.log).finish_non_exhaustive()
    }
}

/// How long a handler is watched before it is looked whether it is still the same.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// Nothing panics while holding one of these locks; if it did, the maps would still be whole.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
