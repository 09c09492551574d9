//! What one key that fails for ever costs the others: the same log, handled with and without it
//! by turns.
//!
//! 10,000 keys, one handler that does nothing, and a key that is tried again every few
//! milliseconds. Reported is the rate of the other keys, with the failing key by without it, for
//! each round: 1.00 means that it costs nothing.
//!
//! ```text
//! tests/run --bench                      # or: cargo bench --bench failing_key
//! BENCH_EVENTS=1000000 BENCH_ROUNDS=11 cargo bench --bench failing_key
//! ```

#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "a benchmark may stop and prints")]

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use async_trait::async_trait;
use pulsebus::{
    bus::EventBus,
    dispatch::HandlerOptions,
    event::{NewEvent, StoredEvent},
    handler::{EventHandler, Outcome},
    retry::RetryPolicy,
    store::{
        EventStore,
        memory::MemoryStore,
        sqlite::{SqliteOptions, SqliteStore},
    },
};
use serde_json::json;
use tokio::sync::Notify;

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

const KEYS: u64 = 10_000;

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|value| value.parse().ok()).unwrap_or(default)
}

fn main() {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let (events, rounds) = (setting("BENCH_EVENTS", 400_000), setting("BENCH_ROUNDS", 7));
        println!("{events} events of {KEYS} keys, one of which fails for ever, {rounds} rounds");
        compare("memory", Arc::new(MemoryStore::new()), events, rounds).await;
        let folder = tempfile::tempdir().unwrap();
        let options = SqliteOptions::new(folder.path().join("events.db"));
        let store = Arc::new(SqliteStore::open(options).await.unwrap());
        compare("sqlite", Arc::clone(&store) as _, events, rounds).await;
        store.close().await;
    });
}

async fn compare(name: &str, store: Arc<dyn EventStore>, events: u64, rounds: u64) {
    let bus = EventBus::builder().shared_store(store).build().await.unwrap();
    let numbers: Vec<u64> = (0..events).collect();
    for page in numbers.chunks(1_000) {
        let event = |n: &u64| NewEvent::new("t", &json!({ "n": n })).unwrap();
        let messages =
            page.iter().map(|n| event(n).key((n % KEYS).to_string()).into_message()).collect();
        bus.append(messages).await.unwrap();
    }
    bus.start_worker_pool(4);
    // The first one warms up.
    handle(&bus, events, 0, false).await;
    let mut ratios = Vec::new();
    for round in 1..=rounds {
        // By turns, and each of them first as often.
        let failing_first = round % 2 == 0;
        let first = handle(&bus, events, 2 * round, failing_first).await;
        let second = handle(&bus, events, 2 * round + 1, !failing_first).await;
        let (with, without) = if failing_first { (first, second) } else { (second, first) };
        ratios.push(with / without);
        println!(
            "{name}, round {round}: without {without:.0}/s, with {with:.0}/s: {:.2}",
            with / without
        );
    }
    ratios.sort_by(f64::total_cmp);
    println!("{name}, median: {:.2}", ratios[ratios.len() / 2]);
    bus.drain(Duration::from_secs(30)).await.unwrap();
}

/// Does nothing, for ever with one key.
struct Nothing {
    name: String,
    failing: bool,
    left: AtomicU64,
    done: Notify,
}

#[async_trait]
impl EventHandler for Nothing {
    fn name(&self) -> &str {
        &self.name
    }

    async fn handle(&self, event: &StoredEvent) -> Outcome {
        if event.key() == "0" {
            return if self.failing { Outcome::retry("never") } else { Outcome::Done };
        }
        if self.left.fetch_sub(1, Ordering::Relaxed) == 1 {
            self.done.notify_one();
        }
        Outcome::Done
    }
}

/// Handles the whole log with a new handler; the rate of the keys that do not fail.
async fn handle(bus: &EventBus, events: u64, number: u64, failing: bool) -> f64 {
    let others = events - events.div_ceil(KEYS);
    let handler = Arc::new(Nothing {
        name: format!("nothing-{number}"),
        failing,
        left: AtomicU64::new(others),
        done: Notify::new(),
    });
    let (initial, max) = (Duration::from_millis(5), Duration::from_millis(50));
    let options = HandlerOptions {
        retry: RetryPolicy::new(u32::MAX, initial, max, 2.0, 0.2).unwrap(),
        ..HandlerOptions::default()
    };
    let started = Instant::now();
    bus.register_handler_with(Arc::clone(&handler) as _, options).await.unwrap();
    handler.done.notified().await;
    let took = started.elapsed();
    // Leaves the machine to the next one.
    bus.pause(&handler.name, "bench").await.unwrap();
    #[expect(clippy::cast_precision_loss, reason = "a rate")]
    let others = others as f64;
    others / took.as_secs_f64()
}
