//! A handler that rejects everything for as long as it is told to.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    time::Duration,
};

use async_trait::async_trait;
use pulsebus::{
    bus::EventBus,
    dispatch::HandlerOptions,
    event::StoredEvent,
    handler::{EventHandler, Outcome},
};

/// Writes down what it is given; a dead letter's error is `T is not wanted`, of type `T`.
pub(crate) struct Picky {
    name: &'static str,
    picky: AtomicBool,
    effects: bool,
    seen: Mutex<Vec<u64>>,
}

#[async_trait]
impl EventHandler for Picky {
    fn name(&self) -> &str {
        self.name
    }

    fn has_side_effects(&self) -> bool {
        self.effects
    }

    async fn handle(&self, event: &StoredEvent) -> Outcome {
        self.seen.lock().unwrap().push(event.position.0);
        if self.picky.load(SeqCst) {
            let error = format!("{} is not wanted", event.kind());
            return Outcome::reject(pulsebus::handler::HandlerError::new(error));
        }
        Outcome::Done
    }
}

impl Picky {
    /// Registers one with a bus, and starts it.
    pub(crate) async fn register(bus: &EventBus, name: &'static str, picky: bool) -> Arc<Self> {
        Self::with(bus, name, picky, true).await
    }

    /// One that says whether it has effects outside.
    pub(crate) async fn with(
        bus: &EventBus,
        name: &'static str,
        picky: bool,
        effects: bool,
    ) -> Arc<Self> {
        let handler = Arc::new(Self { name, picky: picky.into(), effects, seen: Mutex::default() });
        let options = HandlerOptions {
            checkpoint_interval: Duration::from_millis(20),
            ..HandlerOptions::default()
        };
        let handled: Arc<dyn EventHandler> = Arc::clone(&handler) as _;
        bus.register_handler_with(handled, options).await.unwrap();
        bus.start_worker_pool(1);
        handler
    }

    /// Lets it take everything from now on.
    pub(crate) fn relent(&self) {
        self.picky.store(false, SeqCst);
    }

    /// The positions it was given so far.
    pub(crate) fn seen(&self) -> Vec<u64> {
        self.seen.lock().unwrap().clone()
    }
}
