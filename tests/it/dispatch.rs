//! Dispatch: what a handler sees, against what the log holds.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use async_trait::async_trait;
use pulsebus::{
    bus::EventBus,
    dispatch::{Filter, HandlerOptions, HandlerState, OnDead, Ordering, Start},
    event::{NewEvent, Position, StoredEvent},
    handler::{Batching, EventHandler, HandlerError, Outcome},
    retry::RetryPolicy,
    store::{
        EventStore,
        memory::MemoryStore,
        progress::{Claim, Claimed, DeadLetter, DeadLetterFilter},
    },
};
use serde_json::json;
use tokio::time::timeout;

const DEADLINE: Duration = Duration::from_secs(60);

type Answer = Box<dyn Fn(&StoredEvent, usize) -> Outcome + Send + Sync>;

/// Writes down every call, and answers as it is told.
struct Recorder {
    name: String,
    calls: Mutex<Vec<(u64, String)>>,
    done: Mutex<Vec<(u64, String)>>,
    attempts: Mutex<HashMap<u64, usize>>,
    answer: Answer,
    pause: Duration,
    batching: Batching,
    running: AtomicUsize,
    most: AtomicUsize,
}

impl Recorder {
    fn new(answer: impl Fn(&StoredEvent, usize) -> Outcome + Send + Sync + 'static) -> Self {
        Self {
            name: "recorder".to_owned(),
            calls: Mutex::default(),
            done: Mutex::default(),
            attempts: Mutex::default(),
            answer: Box::new(answer),
            pause: Duration::ZERO,
            batching: Batching::None,
            running: AtomicUsize::default(),
            most: AtomicUsize::default(),
        }
    }

    fn call(&self, event: &StoredEvent) -> Outcome {
        let position = event.position.0;
        self.calls.lock().unwrap().push((position, event.key().to_owned()));
        let attempt = {
            let mut attempts = self.attempts.lock().unwrap();
            let attempt = attempts.entry(position).or_default();
            *attempt += 1;
            *attempt
        };
        let outcome = (self.answer)(event, attempt);
        if matches!(outcome, Outcome::Done) {
            self.done.lock().unwrap().push((position, event.key().to_owned()));
        }
        outcome
    }

    /// Positions of each key, in the order they were done.
    fn done_by_key(&self) -> BTreeMap<String, Vec<u64>> {
        let mut keys: BTreeMap<String, Vec<u64>> = BTreeMap::new();
        for (position, key) in self.done.lock().unwrap().iter() {
            keys.entry(key.clone()).or_default().push(*position);
        }
        keys
    }
}

/// A handle on a recorder that stays readable after it was registered.
#[derive(Clone)]
struct Shared(Arc<Recorder>);

#[async_trait]
impl EventHandler for Shared {
    fn name(&self) -> &str {
        &self.0.name
    }

    fn batching(&self) -> Batching {
        self.0.batching
    }

    async fn handle(&self, event: &StoredEvent) -> Outcome {
        let running = self.0.running.fetch_add(1, SeqCst) + 1;
        self.0.most.fetch_max(running, SeqCst);
        if !self.0.pause.is_zero() {
            tokio::time::sleep(self.0.pause).await;
        }
        self.0.running.fetch_sub(1, SeqCst);
        self.0.call(event)
    }
}

fn quick() -> HandlerOptions {
    HandlerOptions {
        workers: Some(4),
        retry: RetryPolicy::new(50, Duration::from_millis(1), Duration::from_millis(5), 1.5, 0.5)
            .unwrap(),
        checkpoint_interval: Duration::from_millis(20),
        ..HandlerOptions::default()
    }
}

async fn bus_over(store: Arc<dyn EventStore>) -> EventBus {
    EventBus::builder().shared_store(store).build().await.unwrap()
}

async fn emit(bus: &EventBus, kind: &str, key: &str, n: usize) -> Position {
    let event = NewEvent::new(kind, &json!({ "n": n })).unwrap().key(key);
    bus.emit(event).await.unwrap().position
}

async fn emit_many(bus: &EventBus, keys: usize, each: usize) -> Position {
    let mut messages = Vec::new();
    for n in 0..each {
        for key in 0..keys {
            let event = NewEvent::new("t", &json!({ "n": n })).unwrap().key(format!("k{key}"));
            messages.push(event.into_message());
        }
    }
    bus.append(messages).await.unwrap();
    bus.log().head()
}

async fn handled(bus: &EventBus, position: Position) {
    timeout(DEADLINE, bus.handled("recorder", position)).await.expect("in time").unwrap();
}

async fn register(bus: &EventBus, recorder: Recorder, options: HandlerOptions) -> Shared {
    let shared = Shared(Arc::new(recorder));
    bus.register_handler_with(Arc::new(shared.clone()), options).await.unwrap();
    shared
}

async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let awaited = async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(DEADLINE, awaited).await.unwrap_or_else(|_| panic!("not in time: {what}"));
}

async fn letters(store: &dyn EventStore) -> Vec<DeadLetter> {
    store.dead_letters(&DeadLetterFilter::default(), None, 1_000).await.unwrap()
}

fn assert_sorted(keys: &BTreeMap<String, Vec<u64>>) {
    for (key, positions) in keys {
        assert!(positions.is_sorted(), "{key}: {positions:?}");
    }
}

/// A small deterministic generator: failures depend on the event and the attempt only.
fn dice(position: u64, attempt: usize) -> u64 {
    let mut x = position.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ (attempt as u64) << 32;
    x ^= x >> 29;
    x = x.wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x ^ (x >> 32)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn G4_every_event_reaches_the_handler_once_in_key_order() {
    let bus = bus_over(Arc::new(MemoryStore::new())).await;
    let seen = register(&bus, Recorder::new(|_, _| Outcome::Done), quick()).await;
    bus.start_worker_pool(2);
    let last = emit_many(&bus, 40, 250).await;
    handled(&bus, last).await;
    let keys = seen.0.done_by_key();
    assert_eq!(keys.len(), 40);
    assert_eq!(seen.0.done.lock().unwrap().len(), 10_000);
    assert_sorted(&keys);
    bus.drain(DEADLINE).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn G5_order_survives_failures_panics_and_unavailability() {
    for batching in [Batching::None, Batching::DistinctKeys(16), Batching::InOrder(32)] {
        let bus = bus_over(Arc::new(MemoryStore::new())).await;
        let mut recorder =
            Recorder::new(|event, attempt| match dice(event.position.0, attempt) % 20 {
                0 => Outcome::retry("now and then"),
                1 => panic!("now and then"),
                2 => Outcome::Unavailable {
                    error: HandlerError::new("down"),
                    after: Some(Duration::from_millis(1)),
                },
                _ => Outcome::Done,
            });
        recorder.batching = batching;
        let seen = register(&bus, recorder, quick()).await;
        bus.start_worker_pool(4);
        let last = emit_many(&bus, 25, 40).await;
        handled(&bus, last).await;
        let keys = seen.0.done_by_key();
        for positions in keys.values() {
            let mut firsts = positions.clone();
            // A batch that panics half way is done again, so only first times count.
            let mut known = std::collections::HashSet::new();
            firsts.retain(|position| known.insert(*position));
            assert!(firsts.is_sorted(), "{batching:?}: {firsts:?}");
            assert_eq!(firsts.len(), 40, "{batching:?}");
        }
        assert_eq!(keys.len(), 25);
        bus.drain(DEADLINE).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn G5_only_the_failing_key_waits() {
    let bus = bus_over(Arc::new(MemoryStore::new())).await;
    let mend = Arc::new(AtomicBool::new(false));
    let mended = Arc::clone(&mend);
    let recorder = Recorder::new(move |event, _| {
        if event.key() == "k0" && !mended.load(SeqCst) {
            Outcome::Retry {
                error: HandlerError::new("not yet"),
                after: Some(Duration::from_millis(20)),
            }
        } else {
            Outcome::Done
        }
    });
    let options = HandlerOptions {
        retry: RetryPolicy::new(
            u32::MAX,
            Duration::from_millis(1),
            Duration::from_millis(2),
            1.0,
            0.0,
        )
        .unwrap(),
        ..quick()
    };
    let seen = register(&bus, recorder, options).await;
    bus.start_worker_pool(4);
    let last = emit_many(&bus, 20, 50).await;
    until("the other keys are done", || seen.0.done.lock().unwrap().len() == 19 * 50).await;
    assert!(seen.0.done_by_key().keys().all(|key| key != "k0"));
    // The cursor passes what has a row in the store (G6), and nobody takes that for handled.
    until("the cursor moves on", || bus.status("recorder").unwrap().snapshot().position == last)
        .await;
    let early = timeout(Duration::from_millis(50), bus.handled("recorder", last)).await;
    assert!(early.is_err(), "what waits is not handled");
    until("it says so", || {
        let snapshot = bus.status("recorder").unwrap().snapshot();
        snapshot.retrying <= 1 && snapshot.parked >= 48
    })
    .await;
    mend.store(true, SeqCst);
    handled(&bus, last).await;
    assert_sorted(&seen.0.done_by_key());
    bus.drain(DEADLINE).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn H2_different_keys_run_at_the_same_time_and_one_key_does_not() {
    let bus = bus_over(Arc::new(MemoryStore::new())).await;
    let mut recorder = Recorder::new(|_, _| Outcome::Done);
    recorder.pause = Duration::from_millis(20);
    let seen = register(&bus, recorder, HandlerOptions { workers: Some(8), ..quick() }).await;
    bus.start_worker_pool(1);
    let last = emit_many(&bus, 8, 4).await;
    handled(&bus, last).await;
    assert_eq!(seen.0.most.load(SeqCst), 8);
    bus.drain(DEADLINE).await.unwrap();

    let bus = bus_over(Arc::new(MemoryStore::new())).await;
    let mut recorder = Recorder::new(|_, _| Outcome::Done);
    recorder.pause = Duration::from_millis(2);
    let seen = register(&bus, recorder, HandlerOptions { workers: Some(8), ..quick() }).await;
    bus.start_worker_pool(1);
    let last = emit_many(&bus, 1, 20).await;
    handled(&bus, last).await;
    assert_eq!(seen.0.most.load(SeqCst), 1);
    bus.drain(DEADLINE).await.unwrap();

    let bus = bus_over(Arc::new(MemoryStore::new())).await;
    let mut recorder = Recorder::new(|_, _| Outcome::Done);
    recorder.pause = Duration::from_millis(20);
    let options = HandlerOptions { workers: Some(8), ordering: Ordering::None, ..quick() };
    let seen = register(&bus, recorder, options).await;
    bus.start_worker_pool(1);
    let last = emit_many(&bus, 1, 16).await;
    handled(&bus, last).await;
    assert_eq!(seen.0.most.load(SeqCst), 8);
    bus.drain(DEADLINE).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn H4_a_call_that_hangs_is_a_failed_attempt() {
    struct Hangs(AtomicUsize);
    #[async_trait]
    impl EventHandler for Hangs {
        fn name(&self) -> &str {
            "recorder"
        }
        async fn handle(&self, _: &StoredEvent) -> Outcome {
            if self.0.fetch_add(1, SeqCst) < 2 {
                std::future::pending::<()>().await;
            }
            Outcome::Done
        }
    }
    let bus = bus_over(Arc::new(MemoryStore::new())).await;
    let options = HandlerOptions { timeout: Duration::from_millis(50), ..quick() };
    bus.register_handler_with(Arc::new(Hangs(AtomicUsize::new(0))), options).await.unwrap();
    bus.start_worker_pool(1);
    let last = emit(&bus, "t", "k", 0).await;
    handled(&bus, last).await;
    bus.drain(DEADLINE).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn G6_a_dead_letter_parks_its_key_also_over_a_restart() {
    let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
    let bus = bus_over(Arc::clone(&store)).await;
    let answer = |event: &StoredEvent, _| {
        if event.position.0 == 3 { Outcome::reject("never") } else { Outcome::Done }
    };
    let seen = register(&bus, Recorder::new(answer), quick()).await;
    bus.start_worker_pool(2);
    // Positions 1 and 3 and 5 are key k0, 2 and 4 and 6 key k1.
    emit_many(&bus, 2, 3).await;
    until("what can be done is done", || seen.0.done.lock().unwrap().len() == 4).await;
    timeout(DEADLINE, bus.handled("recorder", Position(4))).await.expect("in time").unwrap();
    let letters = letters(&*store).await;
    assert_eq!(letters.len(), 1);
    assert_eq!(
        (letters[0].position, &*letters[0].key, letters[0].attempts),
        (Position(3), "k0", 1)
    );
    let failure = &letters[0].failure;
    assert_eq!((&*failure.first_error, &*failure.last_error), ("never", "never"));
    assert_eq!(seen.0.done_by_key()["k0"], [1]);
    until("it says so", || bus.status("recorder").unwrap().snapshot().parked == 1).await;
    // The bus is drained without its store being closed: the next one takes it over.
    bus.drain(DEADLINE).await.unwrap();

    let bus = bus_over(Arc::clone(&store)).await;
    let seen = register(&bus, Recorder::new(answer), quick()).await;
    bus.start_worker_pool(2);
    emit(&bus, "t", "k0", 9).await;
    let free = emit(&bus, "t", "k1", 9).await;
    until("the other key goes on", || {
        seen.0.done.lock().unwrap().iter().any(|(position, _)| *position == free.0)
    })
    .await;
    assert!(!seen.0.done_by_key().contains_key("k0"), "parked over a restart");
    bus.drain(DEADLINE).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn G6_the_last_attempt_makes_a_dead_letter_and_continue_goes_on() {
    let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
    let bus = bus_over(Arc::clone(&store)).await;
    let recorder = Recorder::new(|event, attempt| {
        if event.position.0 == 1 {
            Outcome::retry(HandlerError::new(format!("attempt {attempt}")))
        } else {
            Outcome::Done
        }
    });
    let options = HandlerOptions {
        on_dead: Some(OnDead::Continue),
        retry: RetryPolicy::new(3, Duration::from_millis(1), Duration::from_millis(2), 1.0, 0.0)
            .unwrap(),
        ..quick()
    };
    let seen = register(&bus, recorder, options).await;
    bus.start_worker_pool(2);
    let last = emit_many(&bus, 1, 3).await;
    handled(&bus, last).await;
    assert_eq!(seen.0.done_by_key()["k0"], [2, 3]);
    let letter = letters(&*store).await.remove(0);
    assert_eq!(letter.attempts, 3);
    let failure = &letter.failure;
    assert_eq!((&*failure.first_error, &*failure.last_error), ("attempt 1", "attempt 3"));
    bus.drain(DEADLINE).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn G8_an_unavailable_target_spends_no_attempt() {
    let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
    let bus = bus_over(Arc::clone(&store)).await;
    let up = Arc::new(AtomicBool::new(false));
    let target = Arc::clone(&up);
    let recorder = Recorder::new(move |_, _| {
        if target.load(SeqCst) {
            Outcome::Done
        } else {
            Outcome::Unavailable {
                error: HandlerError::new("down"),
                after: Some(Duration::from_millis(2)),
            }
        }
    });
    let options = HandlerOptions {
        retry: RetryPolicy::new(1, Duration::from_millis(1), Duration::from_millis(1), 1.0, 0.0)
            .unwrap(),
        ..quick()
    };
    let seen = register(&bus, recorder, options).await;
    bus.start_worker_pool(2);
    let last = emit_many(&bus, 10, 100).await;
    until("it is probed", || seen.0.calls.lock().unwrap().len() > 30).await;
    let state = bus.status("recorder").unwrap().snapshot().state;
    assert_eq!((state.as_str(), state.reason()), ("unavailable", Some("down")));
    up.store(true, SeqCst);
    handled(&bus, last).await;
    assert_sorted(&seen.0.done_by_key());
    assert_eq!(seen.0.done.lock().unwrap().len(), 1_000);
    assert!(letters(&*store).await.is_empty());
    bus.drain(DEADLINE).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn G7_what_waits_is_bounded_and_it_says_when_it_is_too_much() {
    let bus = bus_over(Arc::new(MemoryStore::new())).await;
    let never = |event: &StoredEvent, _| match event.key() {
        "k0" if event.position.0 == 1 => Outcome::reject("never"),
        _ => Outcome::Done,
    };
    let options = HandlerOptions { window: 100, parked_per_key: 300, ..quick() };
    let seen = register(&bus, Recorder::new(never), options).await;
    bus.start_worker_pool(2);
    emit_many(&bus, 1, 1_000).await;
    let snapshot = || bus.status("recorder").unwrap().snapshot();
    until("it stalls", || snapshot().state.as_str() == "stalled").await;
    let HandlerState::Stalled(reason) = snapshot().state else { panic!("it stalls") };
    assert!(reason.contains("300") && reason.contains("dead letters"), "{reason}");
    // A page more than the bound at most.
    until("the rest is parked", || (300..500).contains(&snapshot().parked)).await;
    assert!(snapshot().position < Position(500), "{:?}", snapshot());
    assert!(seen.0.done.lock().unwrap().is_empty());
    bus.drain(DEADLINE).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn filters_starts_and_replacement_keep_the_cursor() {
    let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
    let bus = bus_over(Arc::clone(&store)).await;
    for n in 0..10 {
        emit(&bus, if n % 2 == 0 { "LessonPublished" } else { "Other" }, "k", n).await;
    }
    let lessons = || HandlerOptions { events: Filter::new(&["Lesson*"]).unwrap(), ..quick() };
    let first = register(&bus, Recorder::new(|_, _| Outcome::Done), lessons()).await;
    bus.start_worker_pool(1);
    handled(&bus, Position(10)).await;
    assert_eq!(first.0.done_by_key()["k"], [1, 3, 5, 7, 9]);

    // Replaced by name: it goes on where the first one was.
    let second = register(&bus, Recorder::new(|_, _| Outcome::Done), lessons()).await;
    emit(&bus, "LessonPublished", "k", 11).await;
    handled(&bus, Position(11)).await;
    assert_eq!(second.0.done_by_key()["k"], [11]);
    assert_eq!(first.0.done.lock().unwrap().len(), 5);

    // A handler that starts now sees nothing older, also if it is stopped before its first event.
    let mut late = Recorder::new(|_, _| Outcome::Done);
    late.name = "late".to_owned();
    let late = register(&bus, late, HandlerOptions { start: Start::Now, ..quick() }).await;
    until("it has its cursor", || bus.status("late").unwrap().snapshot().position == Position(11))
        .await;
    let last = emit(&bus, "Other", "k", 12).await;
    timeout(DEADLINE, bus.handled("late", last)).await.expect("in time").unwrap();
    assert_eq!(late.0.done_by_key()["k"], [12]);
    bus.drain(DEADLINE).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn G4_a_handler_that_is_cut_off_gets_its_events_again() {
    let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
    let bus = bus_over(Arc::clone(&store)).await;
    let mut recorder = Recorder::new(|_, _| Outcome::Done);
    recorder.pause = Duration::from_secs(3_600);
    register(&bus, recorder, HandlerOptions { timeout: Duration::from_secs(7_200), ..quick() })
        .await;
    bus.start_worker_pool(1);
    let last = emit_many(&bus, 3, 3).await;
    until("it runs", || bus.status("recorder").unwrap().snapshot().in_flight > 0).await;
    assert!(bus.drain(Duration::from_millis(100)).await.is_err());

    let bus = bus_over(store).await;
    let seen = register(&bus, Recorder::new(|_, _| Outcome::Done), quick()).await;
    bus.start_worker_pool(1);
    handled(&bus, last).await;
    assert_eq!(seen.0.done.lock().unwrap().len(), 9);
    bus.drain(DEADLINE).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cursor_beyond_the_head_is_refused_with_the_reason() {
    let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
    let start = Position(7);
    let claim = Claim { handler: "recorder", owner: "before", ttl: DEADLINE, start };
    assert!(matches!(store.claim(claim).await.unwrap(), Claimed::Taken(_)));
    let bus = bus_over(store).await;
    register(&bus, Recorder::new(|_, _| Outcome::Done), quick()).await;
    bus.start_worker_pool(1);
    until("it refuses", || bus.status("recorder").unwrap().snapshot().state.as_str() == "failed")
        .await;
    let state = bus.status("recorder").unwrap().snapshot().state;
    let reason = state.reason().unwrap();
    assert!(reason.contains('7') && reason.contains("beyond the head"), "{reason}");
    bus.drain(DEADLINE).await.unwrap();
}
