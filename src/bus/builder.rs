//! Building a bus.

use std::sync::Arc;

use super::EventBus;
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
}

impl Default for EventBusBuilder {
    fn default() -> Self {
        Self {
            store: None,
            log: LogOptions::default(),
            metrics: Metrics::default(),
            max_event_bytes: 1 << 20,
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
