//! What fails, and what must not follow from it: keys, targets, and a hundred thousand dead
//! letters.

use std::{
    collections::{BTreeMap, HashSet},
    path::PathBuf,
    sync::{
        Arc, Mutex, Weak,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

use async_trait::async_trait;
use pulsebus::{
    bus::EventBus,
    dispatch::{HandlerOptions, Snapshot},
    event::{Event, EventParts, Format, Headers, Message, NewEvent, Origin, Position, StoredEvent},
    handler::{EventHandler, HandlerError, Outcome},
    retry::RetryPolicy,
    secret::Secret,
    store::{
        Batch, Entry, EventStore,
        memory::MemoryStore,
        postgres::{PostgresOptions, PostgresStore},
        progress::{
            Change, Checkpoint, Claim, Claimed, DeadLetter, DeadLetterFilter, Failure, NewRedrive,
            Redrive, RedriveAction, RedriveState, Selection, Standing, Unfinished,
        },
        sqlite::{SqliteOptions, SqliteStore},
    },
};
use serde_json::json;
use time::OffsetDateTime;
use tokio::time::timeout;

use crate::support::{
    PATIENCE,
    faulty::{Fate, Faulty},
    postgres, process, wait_until,
};

const NAME: &str = "scripted";

/// How long the largest of them may take.
const LONG: Duration = Duration::from_secs(120);

/// Events read for the lanes beyond the window at most: one load from the store.
const LOAD: usize = 1_000;

type Answer = Box<dyn Fn(&StoredEvent) -> Outcome + Send + Sync>;

/// Answers as it is told, and writes down what it has done.
struct Scripted {
    answer: Answer,
    calls: Mutex<BTreeMap<u64, Vec<OffsetDateTime>>>,
    done: Mutex<Vec<(u64, String)>>,
    count: AtomicUsize,
    /// Calls wait while it is shut.
    shut: AtomicBool,
}

impl Scripted {
    fn new(answer: impl Fn(&StoredEvent) -> Outcome + Send + Sync + 'static) -> Arc<Self> {
        Arc::new(Self {
            answer: Box::new(answer),
            calls: Mutex::default(),
            done: Mutex::default(),
            count: AtomicUsize::new(0),
            shut: AtomicBool::new(false),
        })
    }

    /// When it was called for an event.
    fn calls(&self, position: Position) -> Vec<OffsetDateTime> {
        self.calls.lock().unwrap().get(&position.0).cloned().unwrap_or_default()
    }

    fn done(&self) -> usize {
        self.count.load(SeqCst)
    }

    /// Every event it has done it did once, those of a key in order.
    fn assert_once_in_order(&self) {
        let mut known = HashSet::new();
        let mut last: BTreeMap<&str, u64> = BTreeMap::new();
        let done = self.done.lock().unwrap();
        for (position, key) in done.iter() {
            assert!(known.insert(*position), "{position} was done twice");
            let before = last.insert(key, *position).unwrap_or(0);
            assert!(before < *position, "G5: {key}: {position} came after {before}");
        }
    }
}

#[async_trait]
impl EventHandler for Scripted {
    fn name(&self) -> &str {
        NAME
    }

    async fn handle(&self, event: &StoredEvent) -> Outcome {
        while self.shut.load(SeqCst) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let position = event.position.0;
        let now = OffsetDateTime::now_utc();
        self.calls.lock().unwrap().entry(position).or_default().push(now);
        let outcome = (self.answer)(event);
        if matches!(outcome, Outcome::Done) {
            self.done.lock().unwrap().push((position, event.key().to_owned()));
            self.count.fetch_add(1, SeqCst);
        }
        outcome
    }
}

/// A store that is opened again after a restart.
enum Kept {
    Memory(Arc<MemoryStore>),
    Sqlite(PathBuf),
    Postgres(String),
}

impl Kept {
    async fn all() -> [Self; 3] {
        [Self::Memory(Arc::new(MemoryStore::new())), Self::sqlite(), Self::postgres().await]
    }

    fn sqlite() -> Self {
        Self::Sqlite(process::folder("failing").join("events.db"))
    }

    async fn postgres() -> Self {
        Self::Postgres(postgres::database().await.url)
    }

    async fn open(&self) -> Arc<dyn EventStore> {
        match self {
            Self::Memory(store) => Arc::clone(store) as _,
            Self::Sqlite(path) => {
                Arc::new(SqliteStore::open(SqliteOptions::new(path)).await.unwrap())
            }
            Self::Postgres(url) => {
                let options = PostgresOptions::new(Secret::Inline(url.clone()));
                Arc::new(PostgresStore::connect(options).await.unwrap())
            }
        }
    }
}

async fn sit_down(
    store: Arc<dyn EventStore>,
    handler: &Arc<Scripted>,
    options: HandlerOptions,
) -> EventBus {
    // The same name each time, so that its own claims need not be waited for.
    let builder = EventBus::builder().shared_store(store).instance("one");
    let bus = builder.build().await.unwrap();
    bus.register_handler_with(Arc::clone(handler) as _, options).await.unwrap();
    bus.start_worker_pool(2);
    bus
}

fn options(attempts: u32) -> HandlerOptions {
    let ms = Duration::from_millis;
    HandlerOptions {
        workers: Some(4),
        timeout: LONG,
        retry: RetryPolicy::new(attempts, ms(1), ms(5), 1.5, 0.5).unwrap(),
        checkpoint_interval: ms(20),
        ..HandlerOptions::default()
    }
}

fn message(key: impl std::fmt::Display) -> Message {
    NewEvent::new("t", &json!({})).unwrap().key(key.to_string()).into_message()
}

async fn append(bus: &EventBus, mut messages: Vec<Message>) {
    while !messages.is_empty() {
        let rest = messages.split_off(messages.len().min(1_000));
        bus.append(std::mem::replace(&mut messages, rest)).await.unwrap();
    }
}

fn snapshot(bus: &EventBus) -> Snapshot {
    bus.status(NAME).unwrap().snapshot()
}

async fn handled(bus: &EventBus) {
    let head = bus.log().head();
    timeout(LONG, bus.handled(NAME, head)).await.expect("in time").unwrap();
}

async fn until(what: &str, limit: Duration, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + limit;
    while !holds() {
        assert!(Instant::now() < deadline, "not within {limit:?}: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

async fn letters(store: &dyn EventStore) -> Vec<DeadLetter> {
    store.dead_letters(&DeadLetterFilter::default(), None, 10_000).await.unwrap()
}

async fn unfinished(store: &dyn EventStore) -> Vec<Unfinished> {
    store.unfinished(NAME, Position::START, 10_000).await.unwrap()
}

/// Everything that is dead, once more.
fn all() -> NewRedrive {
    NewRedrive {
        selection: Selection::DeadLetters(DeadLetterFilter::default()),
        action: RedriveAction::Retry,
        rate: None,
        by: "ann".to_owned(),
        reason: None,
    }
}

async fn done(store: &dyn EventStore, number: u64) -> Redrive {
    let deadline = Instant::now() + LONG;
    loop {
        let redrive = store.redrive(number).await.unwrap().expect("it was started");
        if redrive.state == RedriveState::Done {
            return redrive;
        }
        assert!(Instant::now() < deadline, "it does not end: {redrive:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Counts events that somebody holds.
#[derive(Default)]
struct Held {
    read: Mutex<Vec<Weak<StoredEvent>>>,
    most: AtomicUsize,
}

impl Held {
    fn watch(self: &Arc<Self>, store: Arc<dyn EventStore>) -> Arc<dyn EventStore> {
        let held = Arc::clone(self);
        let watched = Faulty::new(store, |_| Fate::Pass).watched(move |events| {
            let mut read = held.read.lock().unwrap();
            read.extend(events.iter().map(Arc::downgrade));
            read.retain(|event| event.strong_count() > 0);
            held.most.fetch_max(read.len(), SeqCst);
        });
        Arc::new(watched)
    }

    /// So many were in memory at once, at most.
    fn most(&self) -> usize {
        self.most.load(SeqCst)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn G5_G7_one_key_that_fails_for_ever_holds_up_none_of_ten_thousand() {
    const KEYS: usize = 10_000;
    let mended = Arc::new(AtomicBool::new(false));
    let works = Arc::clone(&mended);
    let handler = Scripted::new(move |event| {
        if event.key() == "0" && !works.load(SeqCst) {
            return Outcome::retry("never yet");
        }
        Outcome::Done
    });
    let options = HandlerOptions { window: 512, ..options(u32::MAX) };
    let window = options.window;
    let bus = sit_down(Arc::new(MemoryStore::new()), &handler, options).await;
    // The key that fails has more than the window could hold.
    let keys = (0..3 * KEYS).flat_map(|n| {
        let failing = (n % 20 == 0).then_some(0);
        [Some(n % KEYS), failing].into_iter().flatten()
    });
    let keys: Vec<_> = keys.collect();
    let failing = keys.iter().filter(|key| **key == 0).count();
    assert!(failing > 2 * window);
    append(&bus, keys.iter().map(message).collect()).await;
    let (others, mut most) = (keys.len() - failing, 0);
    until("the other keys are done", PATIENCE, || {
        most = most.max(snapshot(&bus).in_flight);
        handler.done() == others
    })
    .await;
    let most = usize::try_from(most).unwrap();
    assert!(most <= failing + window + LOAD, "{most} in flight");
    handler.assert_once_in_order();
    assert!(handler.done.lock().unwrap().iter().all(|(_, key)| key != "0"));
    until("the cursor passes what waits, and nothing else does", PATIENCE, || {
        let now = snapshot(&bus);
        now.position == bus.log().head()
            && now.in_flight == failing as u64
            && (now.retrying, now.parked) == (1, failing as u64 - 1)
    })
    .await;
    assert_eq!(snapshot(&bus).dead, 0);

    mended.store(true, SeqCst);
    handled(&bus).await;
    assert_eq!(handler.done(), keys.len());
    handler.assert_once_in_order();
    bus.drain(PATIENCE).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn G5_G7_G8_a_hundred_thousand_events_outlast_a_target_that_is_down() {
    const EVENTS: usize = 100_000;
    let up = Arc::new(AtomicBool::new(false));
    let answers = Arc::clone(&up);
    let handler = Scripted::new(move |_| {
        if answers.load(SeqCst) {
            return Outcome::Done;
        }
        let after = Some(Duration::from_millis(20));
        Outcome::Unavailable { error: HandlerError::new("down"), after }
    });
    // One attempt each: one that was spent would be a dead letter.
    let options = HandlerOptions { window: 1_000, ..options(1) };
    let window = options.window as u64;
    let store = Kept::sqlite().open().await;
    let started = Instant::now();
    let bus = sit_down(Arc::clone(&store), &handler, options).await;
    for n in 0..EVENTS / 1_000 {
        let messages = (0..1_000).map(|m| message((n * 1_000 + m) % 777)).collect();
        append(&bus, messages).await;
        let now = snapshot(&bus);
        assert!(now.in_flight <= window, "{now:?}");
        assert_eq!((now.position, now.dead), (Position::START, 0), "{now:?}");
    }
    until("it says so", PATIENCE, || snapshot(&bus).state.as_str() == "unavailable").await;
    // What the workers had when it went down, and one event a probe.
    let tried = handler.calls.lock().unwrap().values().map(Vec::len).sum::<usize>() as u128;
    let most_tried = 4 * 16 + started.elapsed().as_millis() / 20;
    assert!(tried <= most_tried, "{tried} calls though the target was down");

    up.store(true, SeqCst);
    let mut most = 0;
    until("all of it is delivered", LONG, || {
        most = most.max(snapshot(&bus).in_flight);
        handler.done() == EVENTS
    })
    .await;
    assert!(most <= window, "{most} in flight");
    handled(&bus).await;
    assert_eq!(handler.done(), EVENTS);
    handler.assert_once_in_order();
    assert_eq!(letters(&*store).await, []);
    assert_eq!(unfinished(&*store).await, []);
    bus.drain(PATIENCE).await.unwrap();
}

/// `count` dead letters, each of a key of its own, and a parked follower of each of the first
/// ones; as a handler would have left them.
async fn fill(store: &dyn EventStore, count: u64, followers: u64) -> OffsetDateTime {
    let at = pulsebus::event::now();
    let event = |n: u64| {
        let (kind, key) = describe(n, count);
        Event::from_parts(EventParts {
            id: format!("e{n}").into(),
            source: "/".into(),
            kind: kind.into(),
            subject: None,
            time: None,
            key: key.into(),
            format: Format::Raw,
            headers: Headers::new(),
            origin: Origin::default(),
            body: "{}".into(),
        })
    };
    let unfinished = |n: u64| {
        let (kind, key) = describe(n, count);
        let dead = n <= count;
        let error = if n.is_multiple_of(1_000) { "a rare one" } else { "it said no" };
        Unfinished {
            position: Position(n),
            id: format!("e{n}").into(),
            kind: kind.into(),
            key: key.into(),
            standing: if dead { Standing::Dead { unpublished: false } } else { Standing::Parked },
            attempts: u32::from(dead),
            failure: dead.then(|| Failure {
                first_error: "it said no".into(),
                last_error: error.into(),
                first_failed_at: at,
                last_failed_at: at,
            }),
        }
    };
    let claim = Claim { handler: NAME, owner: "one", ttl: PATIENCE, start: Position::START };
    let Claimed::Taken(tenure) = store.claim(claim).await.unwrap() else { panic!("it is held") };
    let positions: Vec<u64> = (1..=count + followers).collect();
    for page in positions.chunks(5_000) {
        let entries = page.iter().map(|n| Entry::Event(event(*n))).collect();
        store.append(&Batch::new(entries)).await.unwrap();
        let checkpoint = Checkpoint {
            handler: NAME.into(),
            epoch: tenure.epoch,
            cursor: Position(page[page.len() - 1]),
            changes: page.iter().map(|n| Change::Keep(unfinished(*n))).collect(),
        };
        store.checkpoint(&checkpoint).await.unwrap();
    }
    store.release(NAME, tenure.epoch).await.unwrap();
    at
}

/// Type and key of what [`fill`] puts at a position.
fn describe(n: u64, count: u64) -> (&'static str, String) {
    let kind = if n.is_multiple_of(10) { "B" } else { "A" };
    (kind, if n > count { n - count } else { n }.to_string())
}

/// Lists, counts and redrives `count` dead letters.
async fn redrive_many(kept: Kept, count: u64) {
    let followers = count / 100;
    let store = kept.open().await;
    let mut took = Vec::new();
    let mut last = Instant::now();
    let mut step = |what: &'static str| {
        took.push((what, last.elapsed()));
        last = Instant::now();
    };
    let at = fill(&*store, count, followers).await;
    step("fill");

    let held = Arc::new(Held::default());
    let handler = Scripted::new(|_| Outcome::Done);
    handler.shut.store(true, SeqCst);
    let options = HandlerOptions { window: 2_000, workers: Some(2), ..options(3) };
    let window = options.window;
    let bus = sit_down(held.watch(Arc::clone(&store)), &handler, options).await;
    until("it has taken up its letters", LONG, || {
        let now = snapshot(&bus);
        now.dead == count && now.parked == followers
    })
    .await;
    step("start");

    let mut found = 0;
    let (mut after, mut behind) = (None, 0);
    loop {
        let after_this = after.map(|position| (NAME, position));
        let filter = DeadLetterFilter::default();
        let page = store.dead_letters(&filter, after_this, 1_000).await.unwrap();
        let Some(last) = page.last() else { break };
        after = Some(last.position);
        for letter in &page {
            found += 1;
            assert_eq!(letter.position, Position(found));
            behind += letter.followers;
        }
    }
    assert_eq!((found, behind), (count, followers));
    step("list all");
    for (filter, expected) in [
        (DeadLetterFilter::default(), count),
        (DeadLetterFilter { handler: Some("other".to_owned()), ..Default::default() }, 0),
        (DeadLetterFilter { kind: Some("B".to_owned()), ..Default::default() }, count / 10),
        (DeadLetterFilter { key: Some("7".to_owned()), ..Default::default() }, 1),
        (DeadLetterFilter { error: Some("rare".to_owned()), ..Default::default() }, count / 1_000),
        (DeadLetterFilter { positions: vec![1, 2, count + 1], ..Default::default() }, 2),
        (DeadLetterFilter { since: Some(at), ..Default::default() }, count),
        (DeadLetterFilter { until: Some(at), ..Default::default() }, 0),
    ] {
        assert_eq!(store.count_dead_letters(&filter).await.unwrap(), expected, "{filter:?}");
        let page = store.dead_letters(&filter, None, 1_000).await.unwrap();
        assert_eq!(page.len() as u64, expected.min(1_000), "{filter:?}");
    }
    step("filter and count");

    let redrive = bus.redrive(&all()).await.unwrap();
    assert_eq!((redrive.total, redrive.state), (count, RedriveState::Running));
    step("start the redrive");
    // While the handler is slow, no more is taken up than it may hold.
    let mut quiet = (Instant::now(), 0);
    until("it takes up no more", LONG, || {
        let dead = snapshot(&bus).dead;
        if dead != quiet.1 {
            quiet = (Instant::now(), dead);
        }
        quiet.0.elapsed() > Duration::from_millis(500)
    })
    .await;
    step("hold it up");
    let most = held.most();
    assert!(most <= window + LOAD, "{most} events were in memory at once");
    handler.shut.store(false, SeqCst);
    let redrive = done(&*store, redrive.number).await;
    assert_eq!((redrive.total, redrive.left), (count, 0));
    handled(&bus).await;
    step("redrive");
    eprintln!("{count} letters in {}: {took:.1?}", store.kind());

    let most = held.most();
    assert!(most <= window + LOAD, "{most} events were in memory at once");
    assert_eq!(handler.done() as u64, count + followers);
    handler.assert_once_in_order();
    assert_eq!(store.count_dead_letters(&DeadLetterFilter::default()).await.unwrap(), 0);
    assert_eq!(unfinished(&*store).await, []);
    until("it has nothing left", PATIENCE, || {
        let now = snapshot(&bus);
        (now.in_flight, now.dead, now.parked) == (0, 0, 0)
    })
    .await;
    bus.drain(PATIENCE).await.unwrap();
    store.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn G5_G7_many_dead_letters_are_listed_and_redriven_in_sqlite() {
    redrive_many(Kept::sqlite(), 20_000).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn G5_G7_many_dead_letters_are_listed_and_redriven_in_postgres() {
    redrive_many(Kept::postgres().await, 20_000).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "soak: the full size takes a minute"]
async fn G5_G7_soak_a_hundred_thousand_dead_letters_are_listed_and_redriven() {
    redrive_many(Kept::sqlite(), 100_000).await;
    redrive_many(Kept::postgres().await, 100_000).await;
}

/// Many keys fail, and all of them are due at once: no more of them are read than may be held.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn G7_what_is_due_at_once_is_not_held_at_once() {
    const EVENTS: usize = 20_000;
    let due = OffsetDateTime::now_utc() + Duration::from_secs(3600);
    let kept = Kept::sqlite();
    let store = kept.open().await;
    // In the store as a handler leaves it that was stopped while all of them waited.
    let claim = Claim { handler: NAME, owner: "one", ttl: PATIENCE, start: Position::START };
    let Claimed::Taken(tenure) = store.claim(claim).await.unwrap() else { panic!("it is held") };
    let bus = EventBus::builder().shared_store(Arc::clone(&store)).build().await.unwrap();
    append(&bus, (0..EVENTS).map(message).collect()).await;
    let changes = (1..=EVENTS as u64).map(|n| {
        let due_at = if n == 1 { due } else { OffsetDateTime::UNIX_EPOCH };
        Change::Keep(Unfinished {
            position: Position(n),
            id: n.to_string().into(),
            kind: "t".into(),
            key: (n - 1).to_string().into(),
            standing: Standing::Retrying { due_at: pulsebus::event::to_micros(due_at) },
            attempts: 1,
            failure: None,
        })
    });
    let checkpoint = Checkpoint {
        handler: NAME.into(),
        epoch: tenure.epoch,
        cursor: bus.log().head(),
        changes: changes.collect(),
    };
    store.checkpoint(&checkpoint).await.unwrap();
    bus.drain(PATIENCE).await.unwrap();

    let store = kept.open().await;
    let held = Arc::new(Held::default());
    let handler = Scripted::new(|_| Outcome::Done);
    handler.shut.store(true, SeqCst);
    let options = HandlerOptions { window: 1_000, workers: Some(2), ..options(3) };
    let window = options.window;
    let bus = sit_down(held.watch(Arc::clone(&store)), &handler, options).await;
    until("it holds as much as it may", PATIENCE, || held.most() >= window).await;
    let mut quiet = (Instant::now(), 0);
    until("it reads no more", PATIENCE, || {
        if held.most() != quiet.1 {
            quiet = (Instant::now(), held.most());
        }
        quiet.0.elapsed() > Duration::from_millis(500)
    })
    .await;
    handler.shut.store(false, SeqCst);
    until("what is due is done", PATIENCE, || handler.done() == EVENTS - 1).await;
    let most = held.most();
    assert!(most <= window + LOAD, "{most} events were in memory at once");
    handler.assert_once_in_order();
    assert!(handler.calls(Position(1)).is_empty(), "it is not due");
    bus.drain(PATIENCE).await.unwrap();
    store.close().await;
}

/// What `/v1/handlers` says of a handler that waits for a person.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn G6_the_cursor_that_is_shown_passes_what_is_parked() {
    let handler = Scripted::new(|event| match event.key() {
        "bad" => Outcome::reject("no"),
        _ => Outcome::Done,
    });
    let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
    // Long enough that the checkpoint is what comes last.
    let options = HandlerOptions { checkpoint_interval: Duration::from_millis(300), ..options(3) };
    let bus = sit_down(Arc::clone(&store), &handler, options).await;
    append(&bus, vec![message("good")]).await;
    handled(&bus).await;
    append(&bus, ["bad", "bad", "bad"].iter().map(message).collect()).await;
    let head = bus.log().head();
    wait_until("it is saved", async || {
        (store.cursor(NAME).await.unwrap() == Some(head)).then_some(())
    })
    .await;
    until("it is shown", Duration::from_secs(10), || snapshot(&bus).position == head).await;
    bus.drain(PATIENCE).await.unwrap();
}

/// An event failed three times; what a restart knows of that.
async fn retries_survive(kept: &Kept, crash: bool) {
    let fails = |process: &'static str| {
        let count = Arc::new(Mutex::new(BTreeMap::<u64, u32>::new()));
        Scripted::new(move |event| {
            let call = {
                let mut count = count.lock().unwrap();
                let call = count.entry(event.position.0).or_default();
                *call += 1;
                *call
            };
            let after = match (event.key(), call) {
                ("done", _) => return Outcome::Done,
                (_, 3) if event.key() == "long" => Some(Duration::from_secs(3_600)),
                (_, 3) => Some(Duration::from_secs(2)),
                _ => None,
            };
            let error = HandlerError::new(format!("{process}, call {call}"));
            Outcome::Retry { error, after }
        })
    };
    let store = kept.open().await;
    let handler = fails("first");
    let bus = sit_down(Arc::clone(&store), &handler, options(5)).await;
    let before = bus.log().head().0;
    let [long, short] = [Position(before + 1), Position(before + 2)];
    append(&bus, ["long", "short", "long", "done"].iter().map(message).collect()).await;
    let waiting = wait_until("both wait, in the store", async || {
        let rows = unfinished(&*store).await;
        let waiting = rows
            .iter()
            .filter(|row| row.attempts == 3 && matches!(row.standing, Standing::Retrying { .. }));
        (waiting.count() == 2 && rows.len() == 3).then_some(rows)
    })
    .await;
    until("the other one is done", PATIENCE, || handler.done() == 1).await;
    if crash {
        let _ = bus.drain(Duration::ZERO).await;
    } else {
        bus.drain(PATIENCE).await.unwrap();
    }
    drop((bus, store));

    let store = kept.open().await;
    let handler = fails("second");
    let bus = sit_down(Arc::clone(&store), &handler, options(5)).await;
    let letter = wait_until("the one that is due soon is dead", async || {
        letters(&*store).await.into_iter().find(|letter| letter.position == short)
    })
    .await;
    assert_eq!(letter.attempts, 5, "the policy's, over both processes");
    let Failure { first_error, last_error, first_failed_at, last_failed_at } = &letter.failure;
    assert_eq!((&**first_error, &**last_error), ("first, call 1", "second, call 2"));
    assert!(first_failed_at < last_failed_at);
    let calls = handler.calls(short);
    assert_eq!(calls.len(), 2, "attempts 4 and 5");
    let due = |rows: &[Unfinished], position| {
        let row = rows.iter().find(|row| row.position == position).expect("it has a row").clone();
        let Standing::Retrying { due_at } = row.standing else { panic!("{row:?}") };
        due_at
    };
    let due_at = due(&waiting, short);
    let early = due_at - calls[0];
    assert!(early < Duration::from_millis(2), "{early} before it was due");
    // The other one's time has not come, nor has it moved, nor has what waits behind it.
    assert!(handler.calls(long).is_empty());
    assert!(handler.calls(Position(long.0 + 2)).is_empty());
    let rows = unfinished(&*store).await;
    assert_eq!(due(&rows, long), due(&waiting, long));
    assert_eq!(rows.iter().find(|row| row.position == long).unwrap().attempts, 3);
    bus.drain(PATIENCE).await.unwrap();
    store.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn G6_attempts_and_due_times_survive_a_drain() {
    for kept in Kept::all().await {
        retries_survive(&kept, false).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn G6_attempts_and_due_times_survive_a_crash() {
    for kept in Kept::all().await {
        retries_survive(&kept, true).await;
    }
}

/// Two redrives of the same letters at once, while their keys get new events.
async fn redriven_twice(kept: Kept) {
    const KEYS: u64 = 200;
    let works = Arc::new(AtomicBool::new(false));
    let answers = Arc::clone(&works);
    let handler = Scripted::new(move |event| {
        // The first event of each key does not work.
        if event.position.0 <= KEYS && !answers.load(SeqCst) {
            return Outcome::reject("no");
        }
        Outcome::Done
    });
    let store = kept.open().await;
    let bus = sit_down(Arc::clone(&store), &handler, options(3)).await;
    append(&bus, (0..2 * KEYS).map(|n| message(n % KEYS)).collect()).await;
    wait_until("all keys are parked", async || {
        (letters(&*store).await.len() as u64 == KEYS && unfinished(&*store).await.len() > 300)
            .then_some(())
    })
    .await;

    works.store(true, SeqCst);
    let live = async {
        for n in 0..20 {
            append(&bus, (0..KEYS / 2).map(|m| message((n * 7 + m) % (KEYS + 20))).collect()).await;
        }
    };
    let what = NewRedrive { rate: Some(1_000), ..all() };
    let (one, other, third, ()) = tokio::join!(
        bus.redrive(&what),
        bus.redrive(&what),
        async {
            until("some of it has been redriven", PATIENCE, || handler.done() > 0).await;
            bus.redrive(&all()).await
        },
        live
    );
    let mut taken = 0;
    for redrive in [one, other, third] {
        taken += done(&*store, redrive.unwrap().number).await.total;
    }
    assert_eq!(taken, KEYS, "each letter belongs to one redrive");
    handled(&bus).await;
    handler.assert_once_in_order();
    assert_eq!(handler.done() as u64, bus.log().head().0);
    for position in 1..=bus.log().head().0 {
        let calls = handler.calls(Position(position)).len();
        let expected = if position <= KEYS { 2 } else { 1 };
        assert_eq!(calls, expected, "{position} in {}", store.kind());
    }
    assert_eq!(letters(&*store).await, []);
    bus.drain(PATIENCE).await.unwrap();
    store.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn G5_two_redrives_at_once_under_live_traffic_redrive_each_letter_once() {
    for kept in Kept::all().await {
        redriven_twice(kept).await;
    }
}
