//! Loops that are really wedged, and loops that only wait.

use std::{
    future::pending,
    sync::{Arc, Condvar, Mutex},
    thread,
    time::{Duration, Instant},
};

use async_trait::async_trait;
use pulsebus::{
    bus::EventBus,
    dispatch::HandlerOptions,
    event::{DecoderOptions, NewEvent, StoredEvent},
    handler::{EventHandler, Outcome},
    ingest::{IngestOptions, Source},
    store::{EventStore, memory::MemoryStore},
    telemetry::{INTERVAL, Watch},
    transport::{Consumer, Deliveries, Publisher, Room, SourceSpec, Transport, TransportError},
};
use serde_json::{Value, json};

use crate::support::{
    PATIENCE,
    faulty::{Fate, Faulty},
};

const LIMIT: Duration = Duration::from_secs(3);

/// A gate that blocks threads.
#[derive(Default)]
struct Gate(Mutex<bool>, Condvar);

impl Gate {
    fn pass(&self) {
        let mut open = self.0.lock().unwrap();
        while !*open {
            open = self.1.wait(open).unwrap();
        }
    }

    fn open(&self) {
        *self.0.lock().unwrap() = true;
        self.1.notify_all();
    }
}

/// Opened also when a test fails: a runtime waits for its threads.
struct Opens(Arc<Gate>);

impl Drop for Opens {
    fn drop(&mut self) {
        self.0.open();
    }
}

/// The names of those stuck now.
fn stuck(watch: &mut Watch) -> Vec<String> {
    watch.stuck().iter().map(|stuck| stuck.name.to_string()).collect()
}

/// Looks once a second, until these are stuck: the others may be too, since a thread that blocks
/// can keep the runtime's timers from everybody. So this is looked at from a thread of the test's
/// own, without the runtime.
fn until_stuck(watch: &mut Watch, names: &[&str]) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let found = stuck(watch);
        if names.iter().all(|name| found.iter().any(|found| found == name)) {
            return;
        }
        assert!(Instant::now() < deadline, "stuck: {found:?}, not {names:?}");
        thread::sleep(INTERVAL);
    }
}

/// The same, until nothing is stuck.
fn until_well(watch: &mut Watch) {
    let deadline = Instant::now() + PATIENCE;
    while let found = stuck(watch)
        && !found.is_empty()
    {
        assert!(Instant::now() < deadline, "stuck: {found:?}");
        thread::sleep(INTERVAL);
    }
}

/// Looks for so long; nothing may be stuck.
fn gets_on(watch: &mut Watch, time: Duration) {
    let until = Instant::now() + time;
    while Instant::now() < until {
        assert_eq!(stuck(watch), [""; 0]);
        thread::sleep(INTERVAL);
    }
}

/// Blocks its thread, as no handler should.
struct Blocks(Arc<Gate>);

#[async_trait]
impl EventHandler for Blocks {
    fn name(&self) -> &str {
        "blocks"
    }

    async fn handle(&self, event: &StoredEvent) -> Outcome {
        if event.event.kind() == "Wait" {
            // For longer than the limit, as one may.
            tokio::time::sleep(Duration::from_secs(8)).await;
        } else {
            // The rest of the runtime goes on: its timers are not what is tried here.
            tokio::task::block_in_place(|| self.0.pass());
        }
        Outcome::Done
    }
}

fn event(kind: &str) -> NewEvent {
    NewEvent::new(kind, &json!({})).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn G8_a_handler_that_blocks_its_thread_is_stuck_and_one_that_takes_its_time_is_not() {
    let bus = EventBus::builder().build().await.unwrap();
    let gate = Arc::new(Gate::default());
    let _opens = Opens(Arc::clone(&gate));
    let options = HandlerOptions { timeout: Duration::from_secs(10), ..HandlerOptions::default() };
    bus.register_handler_with(Arc::new(Blocks(Arc::clone(&gate))), options).await.unwrap();
    bus.start_worker_pool(1);
    let mut watch = bus.log().pulses().watch(LIMIT);
    bus.emit(event("Wait")).await.unwrap();
    gets_on(&mut watch, Duration::from_secs(7));
    let last = bus.emit(event("Block")).await.unwrap().position;
    until_stuck(&mut watch, &["handler:blocks"]);
    assert_eq!(stuck(&mut watch), ["handler:blocks"]);
    gate.open();
    until_well(&mut watch);
    bus.handled("blocks", last).await.unwrap();
    bus.drain(PATIENCE).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn G8_a_store_that_is_away_is_waited_for_and_one_that_never_answers_is_not() {
    let fate = Arc::new(Mutex::new(Fate::Before));
    let told = Arc::clone(&fate);
    let memory: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
    let faulty = Faulty::new(memory, move |method| match method {
        "append" => *told.lock().unwrap(),
        _ => Fate::Pass,
    });
    let bus = EventBus::builder().store(faulty).build().await.unwrap();
    let mut watch = bus.log().pulses().watch(LIMIT);
    let mut tasks = tokio::task::JoinSet::new();
    let emitting = bus.clone();
    tasks.spawn(async move { emitting.emit(event("T")).await });
    gets_on(&mut watch, 4 * LIMIT);
    // Memory's patience is the default's 30 s.
    *fate.lock().unwrap() = Fate::Late(Duration::from_secs(50));
    until_stuck(&mut watch, &["log"]);
    *fate.lock().unwrap() = Fate::Pass;
    until_well(&mut watch);
    assert!(tasks.join_next().await.unwrap().unwrap().is_ok());
    bus.drain(PATIENCE).await.unwrap();
}

/// What a consumer, or the opening of one, does.
#[derive(Clone)]
enum Does {
    /// Its broker is never reached.
    Opens,
    /// Nothing ever comes.
    Waits,
    /// It blocks its thread.
    Blocks(Arc<Gate>),
    /// A fault in its code.
    Panics,
}

#[async_trait]
impl Transport for Does {
    fn kind(&self) -> &'static str {
        "test"
    }

    async fn consumer(&self, _: SourceSpec) -> Result<Box<dyn Consumer>, TransportError> {
        if matches!(self, Self::Opens) {
            pending::<()>().await;
        }
        Ok(Box::new(self.clone()))
    }

    async fn publisher(&self) -> Result<Box<dyn Publisher>, TransportError> {
        Err(TransportError::Misconfigured("it only consumes".into()))
    }
}

#[async_trait]
impl Consumer for Does {
    async fn next(&mut self, _: Room) -> Option<Deliveries> {
        match self {
            Self::Opens | Self::Waits => pending().await,
            Self::Blocks(gate) => {
                gate.pass();
                None
            }
            Self::Panics => panic!("on purpose"),
        }
    }

    async fn close(&mut self) {}
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn G8_a_source_that_blocks_or_panics_is_stuck_and_one_whose_broker_is_away_is_not() {
    let bus = EventBus::builder().build().await.unwrap();
    let source = |name: &str, transport: Does| Source {
        name: name.into(),
        transport: Arc::new(transport),
        params: Value::Null,
        competing: false,
        decoder: DecoderOptions::default(),
        options: IngestOptions::default(),
    };
    let mut watch = bus.log().pulses().watch(LIMIT);
    bus.add_source(source("away", Does::Opens));
    bus.add_source(source("idle", Does::Waits));
    gets_on(&mut watch, 3 * LIMIT);
    let gate = Arc::new(Gate::default());
    let _opens = Opens(Arc::clone(&gate));
    bus.add_source(source("blocked", Does::Blocks(Arc::clone(&gate))));
    until_stuck(&mut watch, &["source:blocked"]);
    gate.open();
    until_well(&mut watch);
    bus.add_source(source("lost", Does::Panics));
    until_stuck(&mut watch, &["source:lost"]);
    thread::sleep(3 * INTERVAL);
    // A source that is gone does not come back by itself.
    assert_eq!(stuck(&mut watch), ["source:lost"]);
}
