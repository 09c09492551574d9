//! Dispatch against any schedule: what the handler saw, against what the log holds.
//!
//! A run is made of a seed: events over a few keys; a handler that fails, rejects, is
//! unavailable, hangs and panics as the dice say; a store whose calls fail before or after they
//! took effect; crashes, drains, replacements, pauses, rewinds, redrives and discards. Then
//! everything is mended, and everything must end.
//!
//! The audit is made of the ledger alone, which the handler writes, and of the log:
//!
//! * **G4** at the end every event has been done, or was discarded by a person; nothing is left
//!   in the store;
//! * **G5** an event is not begun before every earlier one of its key has been done, or was
//!   discarded; a key goes backwards only after a restart, a rewind or a batch that ended without
//!   outcomes, and then goes the whole way again;
//! * **G6** whenever there was a crash, everything up to the saved cursor has been done, was
//!   discarded, or has a row; and what retention has removed from the log, in every other run, has
//!   been done or was discarded.
//!
//! `MODEL_SEED` and `MODEL_RUNS` choose the runs; `tests/run --soak` makes many of them.
//!
//! # Broken on purpose
//!
//! That the audit can fail was checked by breaking the code, one thing at a time:
//!
//! | broken | how | what said so |
//! |---|---|---|
//! | the park step | `Lanes::push` gives an event of a blocked lane a lane of its own | seed 0 in memory: G5, begun before an earlier one was done |
//! | the same transaction | `MemoryStore::checkpoint` saves the cursor without its rows | seed 0 in memory: G6, neither done nor has a row |
//! | the fence | the Postgres checkpoint does not compare the epoch | seed 19 of two processes: a row that a sleeper wrote late is left behind |

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    },
    time::Duration,
};

use async_trait::async_trait;
use pulsebus::{
    bus::{EventBus, RetainOptions, RewindTo},
    dispatch::{HandlerOptions, OnDead},
    event::{NewEvent, Position, StoredEvent},
    handler::{Batching, EventHandler, HandlerError, Outcome},
    retry::RetryPolicy,
    secret::Secret,
    store::{
        EventStore,
        memory::MemoryStore,
        postgres::{PostgresOptions, PostgresStore},
        progress::{DeadLetterFilter, NewRedrive, RedriveAction, Selection},
        sqlite::{SqliteOptions, SqliteStore},
    },
};
use serde_json::json;
use tokio::time::timeout;

use crate::support::{
    faulty::{Fate, Faulty},
    postgres,
    random::Random,
};

const NAME: &str = "model";
const DEADLINE: Duration = Duration::from_secs(60);
const BY: &str = "model";

/// How long a claim holds.
const LEASE: Duration = Duration::from_millis(150);

/// What happened, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Fact {
    /// The handler was called.
    Begun(u64),
    /// It said that it was done.
    Done(u64),
    /// From here on keys may go backwards, once each: a restart, a rewind.
    Restart(&'static str),
}

#[derive(Default)]
struct Ledger {
    facts: Mutex<Vec<Fact>>,
    /// Calls of each event: the dice roll anew for each.
    calls: Mutex<HashMap<u64, u64>>,
    /// Everything is done from here on.
    mended: AtomicBool,
    seed: AtomicU64,
}

impl Ledger {
    fn write(&self, fact: Fact) {
        self.facts.lock().unwrap().push(fact);
    }
}

/// The handler under whose eyes it all happens.
#[derive(Clone)]
struct Witness {
    ledger: Arc<Ledger>,
    batching: Batching,
    /// A handler that a crash has killed writes nothing any more.
    dead: Arc<AtomicBool>,
    /// There are several buses, so a start is a restart for those who watch.
    many: bool,
}

#[async_trait]
impl EventHandler for Witness {
    fn name(&self) -> &str {
        NAME
    }

    fn has_side_effects(&self) -> bool {
        false
    }

    fn batching(&self) -> Batching {
        self.batching
    }

    async fn position(&self) -> Result<Option<Position>, HandlerError> {
        if self.many {
            // Asked when a runner starts: it may go back to what another one had begun.
            self.ledger.write(Fact::Restart("claim"));
        }
        Ok(None)
    }

    async fn handle(&self, event: &StoredEvent) -> Outcome {
        if self.dead.load(SeqCst) {
            return std::future::pending().await;
        }
        let position = event.position.0;
        let ledger = &self.ledger;
        ledger.write(Fact::Begun(position));
        let call = {
            let mut calls = ledger.calls.lock().unwrap();
            let call = calls.entry(position).or_default();
            *call += 1;
            *call
        };
        let mut dice = Random(ledger.seed.load(SeqCst) ^ (position << 20) ^ call);
        let down = || HandlerError::new("the target is down");
        let soon = Some(Duration::from_millis(1));
        let roll = if ledger.mended.load(SeqCst) { 100 } else { dice.below(100) };
        match roll {
            0..8 => Outcome::retry("now and then"),
            8..12 => {
                if self.batching != Batching::None {
                    // A batch that ends without outcomes is done again as a whole.
                    ledger.write(Fact::Restart("batch"));
                }
                if roll < 10 {
                    // As a panic, without the noise.
                    std::panic::resume_unwind(Box::new("on purpose"));
                }
                std::future::pending().await
            }
            12..15 => Outcome::Unavailable { error: down(), after: soon },
            15..18 => Outcome::reject("never"),
            18..24 => {
                tokio::task::yield_now().await;
                self.done(position)
            }
            _ => self.done(position),
        }
    }
}

impl Witness {
    fn done(&self, position: u64) -> Outcome {
        if !self.dead.load(SeqCst) {
            self.ledger.write(Fact::Done(position));
        }
        Outcome::Done
    }
}

/// The options of a run.
fn options(dice: &mut Random) -> (HandlerOptions, Batching) {
    let batching = match dice.below(3) {
        0 => Batching::None,
        1 => Batching::DistinctKeys(4),
        _ => Batching::InOrder(8),
    };
    let ms = Duration::from_millis;
    let options = HandlerOptions {
        workers: Some(1 + dice.below(4) as usize),
        timeout: ms(15),
        retry: RetryPolicy::new(3, ms(1), ms(4), 2.0, 0.5).unwrap(),
        on_dead: Some(OnDead::Park),
        window: 1 + dice.below(40) as usize,
        parked_per_key: 1 + dice.below(30) as usize,
        parked_total: 20 + dice.below(100) as usize,
        checkpoint_interval: ms(1 + dice.below(10)),
        checkpoint_events: 1 + dice.below(50),
        ..HandlerOptions::default()
    };
    (options, batching)
}

struct Run {
    seed: u64,
    dice: Random,
    store: Arc<dyn EventStore>,
    /// How many buses there are at once.
    buses: usize,
    ledger: Arc<Ledger>,
    keys: BTreeMap<u64, u64>,
    options: HandlerOptions,
    batching: Batching,
    /// Events that a person has discarded, or may have.
    discarded: BTreeSet<u64>,
    sittings: Vec<Sitting>,
    steps: Vec<String>,
}

/// A bus, until it crashes.
struct Sitting {
    bus: EventBus,
    dead: Arc<AtomicBool>,
    /// How many of a hundred calls of the store fail.
    faults: Arc<AtomicU64>,
    /// It sleeps: its claims end, and its checkpoints come afterwards.
    asleep: Arc<AtomicBool>,
}

impl Run {
    fn new(seed: u64, store: Arc<dyn EventStore>, buses: usize) -> Self {
        let mut dice = Random(seed);
        let (options, batching) = options(&mut dice);
        let ledger = Arc::new(Ledger::default());
        ledger.seed.store(seed.wrapping_mul(0x9e37_79b9), SeqCst);
        Self {
            seed,
            dice,
            store,
            buses,
            ledger,
            keys: BTreeMap::new(),
            options,
            batching,
            discarded: BTreeSet::new(),
            sittings: Vec::new(),
            steps: Vec::new(),
        }
    }

    fn witness(&self, dead: &Arc<AtomicBool>) -> Arc<dyn EventHandler> {
        Arc::new(Witness {
            ledger: Arc::clone(&self.ledger),
            batching: self.batching,
            dead: Arc::clone(dead),
            many: self.buses > 1,
        })
    }

    async fn sit_down(&mut self) {
        self.ledger.write(Fact::Restart("start"));
        let dead = Arc::new(AtomicBool::new(false));
        let faults = Arc::new(AtomicU64::new(0));
        let asleep = Arc::new(AtomicBool::new(false));
        let (killed, rate, sleeps) = (Arc::clone(&dead), Arc::clone(&faults), Arc::clone(&asleep));
        let dice = Mutex::new(Random(self.dice.below(u64::MAX)));
        let store = Faulty::new(Arc::clone(&self.store), move |method| {
            if killed.load(SeqCst) {
                return Fate::Before;
            }
            if sleeps.load(SeqCst) {
                match method {
                    "append" => {}
                    "checkpoint" => return Fate::Late(LEASE * 2),
                    _ => return Fate::Before,
                }
            }
            let mut dice = dice.lock().unwrap();
            if dice.below(100) >= rate.load(SeqCst) || method == "append" {
                Fate::Pass
            } else if dice.below(2) == 0 {
                Fate::Before
            } else {
                Fate::After
            }
        });
        let mut builder = EventBus::builder().store(store).lease(LEASE);
        if self.removes() {
            // Everything is due at once: what stays is what somebody needs.
            let (bytes, interval) = (Some(0), Duration::from_millis(3));
            builder = builder.retain(RetainOptions { bytes, interval, ..RetainOptions::default() });
        }
        let bus = builder.build().await.expect("a store that works");
        let witness = self.witness(&dead);
        bus.register_handler_with(witness, self.options.clone()).await.unwrap();
        bus.start_worker_pool(2);
        self.sittings.push(Sitting { bus, dead, faults, asleep });
    }

    /// Whether what is finished is removed from the log meanwhile: in every other run.
    const fn removes(&self) -> bool {
        self.seed % 2 == 1
    }

    fn sitting(&self) -> &Sitting {
        self.sittings.last().expect("somebody sits there")
    }

    fn bus(&self) -> &EventBus {
        &self.sitting().bus
    }

    /// As by `kill -9`: nothing of it does anything any more.
    async fn crash(&mut self) {
        let Sitting { bus, dead, .. } = self.sittings.pop().expect("somebody sits there");
        dead.store(true, SeqCst);
        // A deadline of nothing: everything is cut off where it is.
        let _ = bus.drain(Duration::ZERO).await;
        drop(bus);
        self.audit_cursor().await;
    }

    async fn step(&mut self) {
        let last = self.buses - 1;
        let other = self.dice.below(self.buses as u64) as usize;
        self.sittings.swap(other, last);
        let roll = self.dice.below(if last == 0 { 100 } else { 130 });
        let name = match roll {
            0..35 => {
                let n = 1 + self.dice.below(30);
                let keys = 1 + self.dice.below(6);
                let messages: Vec<_> = (0..n)
                    .map(|_| {
                        let key = self.dice.below(keys);
                        let event = NewEvent::new("t", &json!({})).unwrap().key(key.to_string());
                        (key, event.into_message())
                    })
                    .collect();
                let (keys, messages): (Vec<_>, Vec<_>) = messages.into_iter().unzip();
                let receipts = self.bus().append(messages).await.unwrap();
                let head = self.keys.len() as u64;
                self.keys.extend((head + 1..).zip(keys));
                format!("{} events", receipts.len())
            }
            35..55 => {
                let ms = self.dice.below(12);
                tokio::time::sleep(Duration::from_millis(ms)).await;
                format!("{ms} ms")
            }
            55..67 => {
                self.crash().await;
                self.sit_down().await;
                "crash".to_owned()
            }
            67..72 => {
                let sitting = self.sittings.pop().expect("somebody sits there");
                sitting.faults.store(0, SeqCst);
                sitting.asleep.store(false, SeqCst);
                sitting.bus.drain(DEADLINE).await.expect("in time");
                self.audit_cursor().await;
                self.sit_down().await;
                "drain".to_owned()
            }
            72..76 => {
                self.ledger.write(Fact::Restart("replace"));
                let witness = self.witness(&self.sitting().dead);
                let options = self.options.clone();
                self.bus().register_handler_with(witness, options).await.unwrap();
                "replace".to_owned()
            }
            76..81 => {
                let (pause, ms) = (self.dice.below(2) == 0, self.dice.below(5));
                let done = if pause {
                    self.bus().pause(NAME, BY).await.is_ok()
                } else {
                    self.bus().resume(NAME, BY).await.is_ok()
                };
                tokio::time::sleep(Duration::from_millis(ms)).await;
                format!("{} ({done})", if pause { "pause" } else { "resume" })
            }
            81..85 => {
                let cursor = self.store.cursor(NAME).await.unwrap().unwrap_or_default();
                let to = 1 + self.dice.below(cursor.0 + 1);
                self.ledger.write(Fact::Restart("rewind"));
                let to = RewindTo::Position(Position(to));
                let rewound = timeout(DEADLINE, self.bus().rewind(NAME, to, false, BY));
                let rewound = rewound.await.expect("in time").is_ok();
                format!("{to:?} ({rewound})")
            }
            85..95 => {
                let discard = self.dice.below(4) == 0;
                let key = (self.dice.below(2) == 0).then(|| self.dice.below(6).to_string());
                let rate = (self.dice.below(3) == 0).then_some(500);
                let mut what = redrive(discard, key, rate);
                if discard {
                    // By position, so that it is known what may be gone.
                    let Selection::DeadLetters(filter) = &mut what.selection else {
                        unreachable!()
                    };
                    let letters = self.store.dead_letters(filter, None, 10_000).await.unwrap();
                    filter.positions.extend(letters.iter().map(|letter| letter.position.0));
                    filter.positions.push(0);
                    self.discarded.extend(&filter.positions);
                }
                let started = self.bus().redrive(&what).await;
                let number = started.as_ref().map(|redrive| redrive.number);
                if self.dice.below(4) == 0
                    && let Ok(number) = number
                {
                    let _ = self.bus().cancel_redrive(number, BY).await;
                }
                format!("redrive, discard: {discard}: {number:?}")
            }
            100.. => {
                let asleep = self.dice.below(2) == 0;
                self.sitting().asleep.store(asleep, SeqCst);
                tokio::time::sleep(Duration::from_millis(self.dice.below(100))).await;
                format!("asleep: {asleep}")
            }
            _ => {
                let rate = if self.dice.below(2) == 0 { 0 } else { self.dice.below(60) };
                self.sitting().faults.store(rate, SeqCst);
                format!("{rate}% of the store's calls fail")
            }
        };
        self.steps.push(name);
    }

    /// Everything works now, so everything must end.
    async fn mend(&mut self) {
        self.ledger.mended.store(true, SeqCst);
        for sitting in &self.sittings {
            sitting.faults.store(0, SeqCst);
            sitting.asleep.store(false, SeqCst);
        }
        let buses: Vec<_> = self.sittings.iter().map(|sitting| sitting.bus.clone()).collect();
        let bus = buses[0].clone();
        let ended = async {
            while bus.resume(NAME, BY).await.is_err() {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
            loop {
                // Dead letters park their keys: they are retried until there are none.
                bus.redrive(&redrive(false, None, None)).await.unwrap();
                let head = Position(self.keys.len() as u64);
                let anywhere = buses.iter().map(|bus| Box::pin(bus.handled(NAME, head)));
                let handled = futures_util::future::select_ok(anywhere);
                let handled = timeout(Duration::from_millis(200), handled).await;
                let all = DeadLetterFilter::default();
                let left = self.store.dead_letters(&all, None, 1).await.unwrap();
                if handled.is_ok() && left.is_empty() {
                    break;
                }
            }
        };
        if timeout(DEADLINE, ended).await.is_err() {
            let rows = self.store.unfinished(NAME, Position::START, 100).await.unwrap();
            panic!(
                "seed {}: it does not end: {:?}\n{rows:?}\n{:#?}",
                self.seed,
                self.sittings
                    .iter()
                    .map(|sitting| sitting.bus.status(NAME).unwrap().snapshot())
                    .collect::<Vec<_>>(),
                self.steps,
            );
        }
        for sitting in self.sittings.drain(..) {
            sitting.bus.drain(DEADLINE).await.expect("in time");
        }
        // Nothing is left, and a start finds nothing to do again.
        let rows = self.store.unfinished(NAME, Position::START, 100).await.unwrap();
        assert!(rows.is_empty(), "seed {}: left behind: {rows:?}\n{:#?}", self.seed, self.steps);
        let cursor = self.store.cursor(NAME).await.unwrap();
        assert_eq!(cursor, Some(Position(self.keys.len() as u64)), "seed {}", self.seed);
        self.audit_cursor().await;
    }

    fn done(&self) -> BTreeSet<u64> {
        let facts = self.ledger.facts.lock().unwrap();
        facts.iter().filter_map(|f| if let Fact::Done(p) = f { Some(*p) } else { None }).collect()
    }

    /// G6, of the store as a crash has left it.
    async fn audit_cursor(&self) {
        let cursor = self.store.cursor(NAME).await.unwrap().unwrap_or_default();
        let rows = self.store.unfinished(NAME, Position::START, 100_000).await.unwrap();
        let rows: BTreeSet<u64> = rows.iter().map(|row| row.position.0).collect();
        let done = self.done();
        let removed = self.store.extent().await.unwrap().removed;
        assert!(removed <= cursor, "seed {}: removed up to {removed}, cursor {cursor}", self.seed);
        for position in 1..=removed.0 {
            assert!(
                !rows.contains(&position)
                    && (done.contains(&position) || self.discarded.contains(&position)),
                "seed {}: S13: {position} is removed and was not finished\n{:#?}",
                self.seed,
                self.steps,
            );
        }
        for position in 1..=cursor.0 {
            assert!(
                done.contains(&position)
                    || rows.contains(&position)
                    || self.discarded.contains(&position),
                "seed {}: G6: the cursor is at {cursor}, and {position} is neither done nor has \
                 a row\n{:#?}",
                self.seed,
                self.steps,
            );
        }
    }

    /// G4 and G5, of the ledger.
    fn audit(&self) {
        let context = |key: u64| {
            let facts = self.ledger.facts.lock().unwrap();
            let of_key = facts.iter().filter(|fact| match fact {
                Fact::Begun(p) | Fact::Done(p) => self.keys[p] == key,
                Fact::Restart(_) => true,
            });
            let told: Vec<_> = of_key.map(|fact| format!("{fact:?}")).collect();
            format!("seed {}\n{:#?}\n{}", self.seed, self.steps, told.join(" "))
        };
        let done = self.done();
        for position in self.keys.keys() {
            assert!(
                done.contains(position) || self.discarded.contains(position),
                "G4: {position} was never done: {}",
                context(self.keys[position])
            );
        }
        let facts = self.ledger.facts.lock().unwrap().clone();
        let mut finished: BTreeSet<u64> = BTreeSet::new();
        // How far each key is, how often it may still go backwards, and how far it had been
        // when it did.
        let mut at: BTreeMap<u64, u64> = BTreeMap::new();
        let mut jumps: BTreeMap<(u64, u64), u64> = BTreeMap::new();
        let mut owed: BTreeMap<u64, BTreeSet<u64>> = BTreeMap::new();
        let (mut seen, mut most) = (0, 0);
        for fact in facts.iter() {
            match fact {
                Fact::Restart(what) => {
                    seen += 1;
                    // These are written down before they take effect, so what came before them
                    // may still have to come to effect as well.
                    most = match *what {
                        "rewind" | "replace" => 2,
                        "batch" => most,
                        _ => 1,
                    };
                }
                Fact::Begun(position) => {
                    let key = self.keys[position];
                    for (earlier, _) in self.keys.range(..position).filter(|(_, of)| **of == key) {
                        assert!(
                            finished.contains(earlier) || self.discarded.contains(earlier),
                            "G5: {position} of key {key} was begun before {earlier} was done: {}",
                            context(key)
                        );
                    }
                    let last = at.insert(key, *position).unwrap_or(0);
                    if *position < last {
                        let jumps = jumps.entry((key, seen)).or_default();
                        *jumps += 1;
                        assert!(
                            *jumps <= most,
                            "G5: key {key} went from {last} back to {position} by itself: {}",
                            context(key)
                        );
                        let again = finished.iter().filter(|p| {
                            **p > *position && self.keys[*p] == key && !self.discarded.contains(p)
                        });
                        owed.entry(key).or_default().extend(again);
                    }
                }
                Fact::Done(position) => {
                    finished.insert(*position);
                    if let Some(owed) = owed.get_mut(&self.keys[position]) {
                        owed.remove(position);
                    }
                }
            }
        }
        for (key, owed) in owed {
            assert!(
                owed.is_empty(),
                "G5: key {key} went backwards, and {owed:?} were not done again: {}",
                context(key)
            );
        }
    }
}

fn redrive(discard: bool, key: Option<String>, rate: Option<u32>) -> NewRedrive {
    NewRedrive {
        selection: Selection::DeadLetters(DeadLetterFilter {
            handler: Some(NAME.to_owned()),
            key,
            ..DeadLetterFilter::default()
        }),
        action: if discard { RedriveAction::Discard } else { RedriveAction::Retry },
        rate,
        by: BY.to_owned(),
        reason: discard.then(|| "the model said so".to_owned()),
    }
}

async fn run(seed: u64, store: Arc<dyn EventStore>, buses: usize) {
    let mut run = Run::new(seed, store, buses);
    for _ in 0..buses {
        run.sit_down().await;
    }
    for _ in 0..8 + run.dice.below(30) {
        run.step().await;
    }
    run.mend().await;
    run.audit();
}

/// The seeds of a test: so many from 0 on, or what `MODEL_SEED` and `MODEL_RUNS` say.
fn seeds(runs: u64) -> std::ops::Range<u64> {
    let given = |name| std::env::var(name).ok().and_then(|n| n.parse().ok());
    let first = given("MODEL_SEED").unwrap_or(0);
    first..first + given("MODEL_RUNS").unwrap_or(runs)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn G4_G5_G6_hold_in_any_schedule_in_memory() {
    for seed in seeds(200) {
        run(seed, Arc::new(MemoryStore::new()), 1).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn G4_G5_G6_hold_in_any_schedule_in_sqlite() {
    // In memory, where there is such a thing: this is not about what a disk keeps.
    let shared = std::path::Path::new("/dev/shm");
    let base = if shared.is_dir() { shared.to_owned() } else { std::env::temp_dir() };
    let folder = tempfile::tempdir_in(base).unwrap();
    for seed in seeds(40) {
        let options = SqliteOptions::new(folder.path().join(format!("{seed}.db")));
        let store = Arc::new(SqliteStore::open(options).await.unwrap());
        run(seed, Arc::clone(&store) as _, 1).await;
        store.close().await;
    }
}

async fn postgres_store() -> Arc<PostgresStore> {
    let url = Secret::Inline(postgres::database().await.url);
    Arc::new(PostgresStore::connect(PostgresOptions::new(url)).await.unwrap())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn G4_G5_G6_hold_in_any_schedule_in_postgres() {
    for seed in seeds(25) {
        let store = postgres_store().await;
        run(seed, Arc::clone(&store) as _, 1).await;
        store.close().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn G4_G5_G6_hold_while_two_processes_take_turns() {
    for seed in seeds(20) {
        let store = postgres_store().await;
        run(seed, Arc::clone(&store) as _, 2).await;
        store.close().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes half an hour; tests/run --soak runs it"]
async fn soak_G4_G5_G6_hold_in_thousands_of_schedules() {
    for seed in seeds(4_000) {
        run(1_000 + seed, Arc::new(MemoryStore::new()), 1).await;
        let every = |n| seed % n == 0;
        if every(4) {
            let store = postgres_store().await;
            let buses = if every(8) { 2 } else { 1 };
            run(1_000 + seed, Arc::clone(&store) as _, buses).await;
            store.close().await;
        }
    }
}
