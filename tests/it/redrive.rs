//! What a person takes up again: quarantine entries, dead letters and where they are published.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use async_nats::jetstream;
use async_trait::async_trait;
use bytes::Bytes;
use pulsebus::{
    bus::EventBus,
    dispatch::HandlerOptions,
    event::{Message, NewEvent, Origin, Position, StoredEvent},
    handler::{
        EventHandler, Outcome,
        dead_letter::{DeadEvent, DeadLetterDestination},
    },
    store::{
        EventStore,
        memory::MemoryStore,
        progress::{
            DeadLetterFilter, NewRedrive, QuarantineFilter, Redrive, RedriveAction, RedriveState,
            Selection,
        },
    },
    transport::Receipt,
};
use serde_json::json;

use crate::support::{
    PATIENCE,
    daemon::{Daemon, http},
    nats::NatsServer,
    wait_until,
};

fn message(body: &str) -> Message {
    let origin = Origin { transport: "memory".into(), ..Origin::default() };
    Message { body: Bytes::from(body.to_owned()), origin, ..Message::default() }
}

async fn bus_over(store: &Arc<dyn EventStore>, max_event_bytes: usize) -> EventBus {
    let builder = EventBus::builder().shared_store(Arc::clone(store));
    builder.max_event_bytes(max_event_bytes).build().await.unwrap()
}

fn order(selection: Selection, action: RedriveAction) -> NewRedrive {
    let reason = (action == RedriveAction::Discard).then(|| "not wanted".to_owned());
    NewRedrive { selection, action, rate: None, by: "ann".to_owned(), reason }
}

async fn ended(store: &dyn EventStore, redrive: &Redrive) -> Redrive {
    wait_until("the redrive has ended", async || {
        let now = store.redrive(redrive.number).await.unwrap().unwrap();
        (now.state == RedriveState::Done).then_some(now)
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn quarantine_is_ingested_again_after_a_limit_was_changed() {
    let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
    let bus = bus_over(&store, 60).await;
    let long = r#"{"type":"T","data":"longer than what this bus takes for an event, by far"}"#;
    let known = r#"{"type":"T","id":"1","data":"longer than what this bus takes for an event"}"#;
    let messages = vec![message("no JSON"), message(long), message(known), message("nor this")];
    for receipt in bus.append(messages).await.unwrap() {
        assert!(matches!(receipt, Receipt::Quarantined { .. }), "{receipt:?}");
    }
    // An event of that identity, with other data: what is in quarantine conflicts with it.
    let other = r#"{"type":"T","id":"1","data":"other"}"#;
    assert_eq!(bus.append(vec![message(other)]).await.unwrap(), [Receipt::Stored(Position(1))]);
    bus.drain(PATIENCE).await.unwrap();

    let bus = bus_over(&store, 1 << 20).await;
    let all = || Selection::Quarantine(QuarantineFilter::default());
    let redrive = bus.redrive(&order(all(), RedriveAction::Retry)).await.unwrap();
    assert_eq!(redrive.total, 4);
    let redrive = ended(&*store, &redrive).await;
    assert_eq!((redrive.left, redrive.total), (0, 4));
    // What can be an event is one now; the rest stays, under its number, with its reason.
    let events = bus.log().read(Position(1), pulsebus::store::Limit::default()).await.unwrap();
    assert_eq!(events.len(), 1);
    assert_eq!((events[0].id(), events[0].body_str()), ("quarantine:2", long));
    let held = store.quarantine(0, 10).await.unwrap();
    let numbers: Vec<_> = held.iter().map(|entry| entry.number).collect();
    assert_eq!(numbers, [1, 3, 4]);
    assert!(held[1].reason.contains("conflicts with the event at position 1"), "{held:?}");

    let some = QuarantineFilter { numbers: vec![1, 4], ..QuarantineFilter::default() };
    let what = order(Selection::Quarantine(some), RedriveAction::Discard);
    let redrive = bus.redrive(&what).await.unwrap();
    ended(&*store, &redrive).await;
    assert_eq!(store.quarantine_len().await.unwrap(), 1);
    bus.drain(PATIENCE).await.unwrap();
}

/// Rejects everything until it is mended.
struct Picky(Arc<AtomicBool>, Arc<Mutex<Vec<u64>>>);

#[async_trait]
impl EventHandler for Picky {
    fn name(&self) -> &str {
        "picky"
    }

    async fn handle(&self, event: &StoredEvent) -> Outcome {
        if !self.0.load(SeqCst) {
            return Outcome::reject(format!("not {}\nat all", event.key()));
        }
        self.1.lock().unwrap().push(event.position.0);
        Outcome::Done
    }
}

/// Another handler, without dead letters.
struct Plain;

#[async_trait]
impl EventHandler for Plain {
    fn name(&self) -> &str {
        "plain"
    }

    async fn handle(&self, _: &StoredEvent) -> Outcome {
        Outcome::Done
    }
}

/// A destination that is away until it is not.
#[derive(Debug, Default)]
struct Destination {
    up: AtomicBool,
    asked: AtomicUsize,
    taken: Mutex<Vec<DeadEvent>>,
}

#[async_trait]
impl DeadLetterDestination for Destination {
    async fn publish(&self, letters: &[DeadEvent]) -> Vec<Outcome> {
        self.asked.fetch_add(1, SeqCst);
        if !self.up.load(SeqCst) {
            return letters.iter().map(|_| Outcome::unavailable("no destination")).collect();
        }
        let mut taken = self.taken.lock().unwrap();
        letters
            .iter()
            .map(|letter| {
                // One it will never take, which must not hold up the others.
                if letter.event.position.0 == 2 {
                    return Outcome::reject("too large");
                }
                taken.push(letter.clone());
                Outcome::Done
            })
            .collect()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn G6_a_dead_letter_counts_as_published_when_its_destination_has_it() {
    let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
    let destination = Arc::new(Destination::default());
    let mended = Arc::new(AtomicBool::new(false));
    let done = Arc::new(Mutex::new(Vec::new()));
    let options = HandlerOptions {
        dead_letter: Some(Arc::clone(&destination) as _),
        checkpoint_interval: Duration::from_millis(10),
        ..HandlerOptions::default()
    };
    let sit_down = async || {
        let bus = bus_over(&store, 1 << 20).await;
        let picky = Picky(Arc::clone(&mended), Arc::clone(&done));
        bus.register_handler_with(Arc::new(picky), options.clone()).await.unwrap();
        bus.start_worker_pool(2);
        bus
    };
    let bus = sit_down().await;
    for key in ["a", "b", "c"] {
        bus.emit(NewEvent::new("T", &json!({})).unwrap().key(key)).await.unwrap();
    }
    wait_until("it was asked", async || (destination.asked.load(SeqCst) > 1).then_some(())).await;
    assert_eq!(store.unpublished("picky", 10).await.unwrap().len(), 3);
    bus.drain(PATIENCE).await.unwrap();

    // Nobody forgets over a restart what has not been confirmed.
    destination.up.store(true, SeqCst);
    let bus = sit_down().await;
    wait_until("two are published", async || {
        (store.unpublished("picky", 10).await.unwrap().len() == 1).then_some(())
    })
    .await;
    let taken = std::mem::take(&mut *destination.taken.lock().unwrap());
    let positions: Vec<_> = taken.iter().map(|letter| letter.event.position.0).collect();
    assert_eq!(positions, [1, 3]);
    assert!(taken[0].rejected && taken[0].attempts == 1);
    assert_eq!(&*taken[0].last_error, "not a\nat all");

    // They can be tried again all the same, and are gone then.
    mended.store(true, SeqCst);
    let all = Selection::DeadLetters(DeadLetterFilter::default());
    let redrive = bus.redrive(&order(all, RedriveAction::Retry)).await.unwrap();
    ended(&*store, &redrive).await;
    bus.handled("picky", Position(3)).await.unwrap();
    assert_eq!(store.unpublished("picky", 10).await.unwrap(), []);
    let mut positions = done.lock().unwrap().clone();
    positions.sort_unstable();
    assert_eq!(positions, [1, 2, 3]);
    assert!(destination.taken.lock().unwrap().is_empty());
    bus.drain(PATIENCE).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_redrive_goes_on_after_a_restart_and_leaves_what_nobody_runs() {
    let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
    let mended = Arc::new(AtomicBool::new(false));
    let done = Arc::new(Mutex::new(Vec::new()));
    let sit_down = async || {
        let bus = bus_over(&store, 1 << 20).await;
        let picky = Picky(Arc::clone(&mended), Arc::clone(&done));
        bus.register_handler(picky).await.unwrap();
        bus.start_worker_pool(2);
        bus
    };
    let bus = sit_down().await;
    for n in 0..10 {
        let event = NewEvent::new("T", &json!({})).unwrap().key(format!("k{n}"));
        bus.emit(event).await.unwrap();
    }
    bus.handled("picky", Position(10)).await.unwrap();
    mended.store(true, SeqCst);
    // So slow that it is cut off for sure.
    let all = Selection::DeadLetters(DeadLetterFilter::default());
    let slow = NewRedrive { rate: Some(2), ..order(all.clone(), RedriveAction::Retry) };
    let redrive = bus.redrive(&slow).await.unwrap();
    wait_until("it has begun", async || {
        let now = store.redrive(redrive.number).await.unwrap().unwrap();
        (now.left < 10).then_some(())
    })
    .await;
    bus.drain(PATIENCE).await.unwrap();
    let left = store.redrive(redrive.number).await.unwrap().unwrap().left;
    assert!((1..10).contains(&left), "{left}");

    let bus = sit_down().await;
    ended(&*store, &redrive).await;
    bus.handled("picky", Position(10)).await.unwrap();
    let mut positions = done.lock().unwrap().clone();
    positions.sort_unstable();
    assert_eq!(positions, (1..=10).collect::<Vec<_>>(), "each once");
    bus.drain(PATIENCE).await.unwrap();

    // Dead letters of a handler that is gone are not tried again; discarding takes them as well.
    mended.store(false, SeqCst);
    let bus = sit_down().await;
    bus.emit(NewEvent::new("T", &json!({})).unwrap().key("k")).await.unwrap();
    bus.handled("picky", Position(11)).await.unwrap();
    bus.drain(PATIENCE).await.unwrap();
    let bus = bus_over(&store, 1 << 20).await;
    let retried = bus.redrive(&order(all.clone(), RedriveAction::Retry)).await.unwrap_err();
    assert!(retried.to_string().contains("no handler is registered"), "{retried}");
    bus.register_handler(Plain).await.unwrap();
    let retried = bus.redrive(&order(all.clone(), RedriveAction::Retry)).await.unwrap();
    assert_eq!((retried.total, retried.state), (0, RedriveState::Done));
    let discarded = bus.redrive(&order(all, RedriveAction::Discard)).await.unwrap();
    assert_eq!((discarded.total, discarded.left), (1, 0));
    bus.drain(PATIENCE).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_redrive_holds_up_no_other() {
    let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
    let bus = bus_over(&store, 150).await;
    let mended = Arc::new(AtomicBool::new(false));
    let done = Arc::new(Mutex::new(Vec::new()));
    bus.register_handler(Picky(Arc::clone(&mended), Arc::clone(&done))).await.unwrap();
    bus.start_worker_pool(2);
    for n in 0..40 {
        bus.emit(NewEvent::new("T", &json!({})).unwrap().key(format!("k{n}"))).await.unwrap();
        let too_long = format!(r#"{{"id":"{n}","data":"{}"}}"#, "long ".repeat(40));
        bus.append(vec![message(&too_long)]).await.unwrap();
    }
    bus.handled("picky", Position(40)).await.unwrap();
    mended.store(true, SeqCst);
    let few = |positions: std::ops::RangeInclusive<u64>| {
        let positions = positions.collect();
        Selection::DeadLetters(DeadLetterFilter { positions, ..DeadLetterFilter::default() })
    };
    let held = |numbers: std::ops::RangeInclusive<u64>| {
        let numbers = numbers.collect();
        Selection::Quarantine(QuarantineFilter { numbers, ..QuarantineFilter::default() })
    };
    for [slow, quick] in [[few(1..=30), few(31..=40)], [held(1..=30), held(31..=40)]] {
        let slow = NewRedrive { rate: Some(1), ..order(slow, RedriveAction::Discard) };
        let slow = bus.redrive(&slow).await.unwrap();
        let quick = bus.redrive(&order(quick, RedriveAction::Discard)).await.unwrap();
        ended(&*store, &quick).await;
        let slow = store.redrive(slow.number).await.unwrap().unwrap();
        assert_eq!(slow.state, RedriveState::Running, "{slow:?}");
        assert!(slow.left > 15, "{slow:?}");
    }
    bus.drain(PATIENCE).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn G6_G9_a_dead_letter_reaches_a_broker_with_its_reason_and_its_bytes() {
    let nats = NatsServer::start();
    let jetstream = nats.jetstream().await;
    let dead = jetstream::stream::Config {
        name: "DEAD".to_owned(),
        subjects: vec!["dead.>".to_owned()],
        ..Default::default()
    };
    let mut stream = jetstream.create_stream(dead).await.unwrap();
    let config = format!(
        r#"
[transports.nats]
kind = "nats"
url = "{}"
[handlers.mirror]
kind = "forward"
transport = "nats"
subject = "mirror.{{subject}}"
dead_letter = {{ transport = "nats", subject = "dead.{{handler}}.{{type}}" }}
"#,
        nats.url()
    );
    let daemon = Daemon::start(&config).await;
    daemon.ready().await;
    // Without a subject there is nowhere to send it: no attempt can change that.
    let body = r#"{ "type" : "T", "id":"7", "data" : 1e400 }"#;
    let posted = http().post(daemon.url("/v1/events")).header("x-trace", "abc").body(body);
    assert!(posted.send().await.unwrap().status().is_success());
    wait_until("it is published", async || {
        (stream.info().await.unwrap().state.messages == 1).then_some(())
    })
    .await;
    let message = stream.get_raw_message(1).await.unwrap();
    assert_eq!(message.subject.as_str(), "dead.mirror.T");
    assert_eq!(&*message.payload, body.as_bytes());
    let header = |name: &str| message.headers.get(name).map(|value| value.as_str().to_owned());
    assert_eq!(header("Nats-Msg-Id").as_deref(), Some("7"));
    assert_eq!(header("pulsebus-dead-handler").as_deref(), Some("mirror"));
    assert_eq!(header("pulsebus-dead-position").as_deref(), Some("1"));
    assert_eq!(header("pulsebus-dead-reason").as_deref(), Some("rejected"));
    assert_eq!(header("pulsebus-dead-attempts").as_deref(), Some("1"));
    assert!(header("pulsebus-dead-error").unwrap().contains("subject"));
    // It stays a dead letter of the store.
    let letters = daemon.json("/v1/dead-letters").await.unwrap();
    assert_eq!(letters["dead_letters"][0]["id"], "7");
}
