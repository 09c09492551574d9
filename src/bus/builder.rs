//! Building a bus.

use std::{fs::File, sync::Arc, time::Duration};

use super::{EventBus, RetainOptions};
use crate::{
    store::{EventStore, LogOptions, StoreError},
    telemetry::Metrics,
};

/// Builds an [`EventBus`].
pub struct EventBusBuilder {
    pub(super) store: Option<Arc<dyn EventStore>>,
    pub(super) log: LogOptions,
    pub(super) metrics: Metrics,
    pub(super) max_event_bytes: usize,
    pub(super) instance: String,
    pub(super) instance_lock: Option<Arc<File>>,
    pub(super) lease: Duration,
    pub(super) retain: Option<RetainOptions>,
}

impl Default for EventBusBuilder {
    fn default() -> Self {
        Self {
            store: None,
            log: LogOptions::default(),
            metrics: Metrics::default(),
            max_event_bytes: 1 << 20,
            instance: uuid::Uuid::now_v7().to_string(),
            instance_lock: None,
            lease: Duration::from_secs(10),
            retain: None,
        }
    }
}

impl EventBusBuilder {
    /// Where the log is kept. Default: in memory, gone with the process.
    #[must_use]
    pub fn store(self, store: impl EventStore) -> Self {
        self.shared_store(Arc::new(store))
    }

    /// The same, for a store that is shared already.
    #[must_use]
    pub fn shared_store(mut self, store: Arc<dyn EventStore>) -> Self {
        self.store = Some(store);
        self
    }

    /// Bounds of the log's writer and tail.
    #[must_use]
    pub fn log_options(mut self, options: LogOptions) -> Self {
        self.log = options;
        self
    }

    /// Metrics to count into. Default: new ones.
    #[must_use]
    pub fn metrics(mut self, metrics: Metrics) -> Self {
        self.metrics = metrics;
        self
    }

    /// Largest body of an emitted event, in bytes. Default 1 MiB.
    #[must_use]
    pub const fn max_event_bytes(mut self, bytes: usize) -> Self {
        self.max_event_bytes = bytes;
        self
    }

    /// What this process calls itself when it claims handlers in a store that others use too.
    /// One that keeps its name over a restart need not wait for its own claims to end. Default:
    /// a new name each time. No two processes may share one.
    #[must_use]
    pub fn instance(mut self, name: impl Into<String>) -> Self {
        self.instance = name.into();
        self
    }

    /// A locked file that keeps other processes from calling themselves the same; held for as
    /// long as the bus is.
    pub(super) fn instance_lock(mut self, lock: Option<Arc<File>>) -> Self {
        self.instance_lock = lock;
        self
    }

    /// How long a handler stays with this process when it is silent, in a store that others use
    /// too: so soon another one takes over after a crash. Default 10 s.
    #[must_use]
    pub const fn lease(mut self, lease: Duration) -> Self {
        self.lease = lease;
        self
    }

    /// How long events are kept. Default: for ever.
    #[must_use]
    pub const fn retain(mut self, options: RetainOptions) -> Self {
        self.retain = Some(options);
        self
    }

    /// Opens the log and starts its writer.
    ///
    /// # Errors
    /// Where the store cannot be read.
    pub async fn build(self) -> Result<EventBus, StoreError> {
        EventBus::open(self).await
    }
}

impl std::fmt::Debug for EventBusBuilder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EventBusBuilder")
            .field("store", &self.store.as_ref().map(|store| store.kind()))
            .field("log", &self.log)
            .field("max_event_bytes", &self.max_event_bytes)
            .finish_non_exhaustive()
    }
}
