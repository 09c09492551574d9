//! JetStream to Postgres with one handler that does nothing, beside the two bare limits of the
//! same machine, measured in the same run:
//!
//! * **B**: consume and ack, nothing else (the client library's own pull consumer);
//! * **S**: insert batches of 1,000 into a table like ours, nothing else, through the same driver;
//! * **P**: pulsebus, from the first pull to the handler having seen the last event.
//!
//! One after the other, B and S would reach `1/(1/B + 1/S)`; the ratio of P to that is what is
//! reported, since machines differ and are noisy.
//!
//! ```text
//! tests/run --bench                      # or: cargo bench --bench throughput
//! BENCH_EVENTS=500000 BENCH_ROUNDS=5 cargo bench --bench throughput
//! ```

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a benchmark may stop and prints"
)]
#![expect(dead_code, unreachable_pub, reason = "servers are shared with the tests")]

#[path = "../tests/it/support/mod.rs"]
mod support;

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use async_nats::jetstream::{
    self, AckKind,
    consumer::{AckPolicy, pull},
    message::PublishMessage,
};
use async_trait::async_trait;
use futures_util::StreamExt as _;
use pulsebus::{
    bus::EventBus,
    dispatch::HandlerOptions,
    event::{DecoderOptions, Position, StoredEvent},
    handler::{EventHandler, Outcome},
    ingest::{IngestOptions, Source},
    secret::Secret,
    store::postgres::{PostgresOptions, PostgresStore},
    transport::nats::{NatsOptions, NatsTransport},
};
use sqlx::{Connection as _, PgConnection};

use self::support::{nats::NatsServer, postgres};

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|value| value.parse().ok()).unwrap_or(default)
}

fn main() {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    runtime.block_on(run(setting("BENCH_EVENTS", 200_000), setting("BENCH_ROUNDS", 3)));
}

async fn run(events: u64, rounds: u64) {
    println!("{events} events of 512 bytes, {rounds} rounds, {} cores", cores());
    let nats = NatsServer::start();
    let context = nats.jetstream().await;
    context
        .create_stream(jetstream::stream::Config {
            name: "BENCH".to_owned(),
            subjects: vec!["bench.>".to_owned()],
            ..jetstream::stream::Config::default()
        })
        .await
        .unwrap();
    fill(&context, events).await;
    let mut ratios = Vec::new();
    for round in 1..=rounds {
        let bare = consume(&context, events, round).await;
        let insert = insert(events).await;
        let whole = pulsebus(&nats.url(), events, round).await;
        let limit = 1.0 / (1.0 / bare + 1.0 / insert);
        ratios.push(whole / limit);
        println!(
            "round {round}: B {bare:.0}/s  S {insert:.0}/s  P {whole:.0}/s  \
             1/(1/B+1/S) {limit:.0}/s  P is {:.0}% of it",
            100.0 * whole / limit
        );
    }
    ratios.sort_by(f64::total_cmp);
    println!("median: {:.0}%", 100.0 * ratios[ratios.len() / 2]);
}

fn cores() -> usize {
    std::thread::available_parallelism().map_or(0, usize::from)
}

/// 512 bytes, native form, a key among 1,000.
fn body(n: u64) -> String {
    let head = format!(
        "{{\"id\":\"{n:020}\",\"type\":\"LessonPublished\",\"key\":\"course-{}\",\
         \"data\":{{\"lesson_id\":\"{n}\",\"title\":\"",
        n % 1_000
    );
    let tail = "\",\"published_at\":1700000000000}}";
    let pad = 512 - head.len() - tail.len();
    format!("{head}{}{tail}", "x".repeat(pad))
}

async fn fill(context: &jetstream::Context, events: u64) {
    let mut acks = Vec::new();
    for n in 0..events {
        let message = PublishMessage::build().payload(body(n).into());
        acks.push(context.send_publish(format!("bench.{}", n % 1_000), message).await.unwrap());
        if acks.len() == 2_000 || n + 1 == events {
            for ack in acks.drain(..) {
                ack.await.unwrap();
            }
        }
    }
}

/// B: what the client library does when nothing is done with the messages.
async fn consume(context: &jetstream::Context, events: u64, round: u64) -> f64 {
    let stream = context.get_stream("BENCH").await.unwrap();
    let consumer = stream
        .create_consumer(pull::Config {
            durable_name: Some(format!("bare-{round}")),
            ack_policy: AckPolicy::Explicit,
            max_ack_pending: 20_000,
            ..pull::Config::default()
        })
        .await
        .unwrap();
    let started = Instant::now();
    let mut messages = consumer.stream().max_messages_per_batch(2_000).messages().await.unwrap();
    for _ in 0..events {
        let message = messages.next().await.unwrap().unwrap();
        message.ack_with(AckKind::Ack).await.unwrap();
    }
    rate(events, started.elapsed())
}

/// S: what the database does when rows come from nowhere.
async fn insert(events: u64) -> f64 {
    let database = postgres::database().await;
    let mut connection = PgConnection::connect(&database.url).await.unwrap();
    for statement in [
        "CREATE TABLE bare (position bigint PRIMARY KEY, source text NOT NULL, id text NOT NULL, \
         type text NOT NULL, key text NOT NULL, body json NOT NULL, \
         recorded_at timestamptz NOT NULL, UNIQUE (source, id))",
        "CREATE TABLE head (position bigint NOT NULL)",
        "INSERT INTO head VALUES (0)",
    ] {
        sqlx::query(statement).execute(&mut connection).await.unwrap();
    }
    let bodies: Vec<String> = (0..events).map(body).collect();
    let started = Instant::now();
    for (batch, bodies) in bodies.chunks(1_000).enumerate() {
        let ids: Vec<String> =
            (0..bodies.len()).map(|n| format!("{:020}", batch * 1_000 + n)).collect();
        let keys: Vec<String> = (0..bodies.len()).map(|n| format!("course-{n}")).collect();
        sqlx::query(
            "WITH h AS (UPDATE head SET position = position + $1 RETURNING position - $1 AS base)
             INSERT INTO bare SELECT h.base + ord, '/', id, 'LessonPublished', key, body::json, now()
             FROM h, UNNEST($2::text[], $3::text[], $4::text[]) WITH ORDINALITY AS t (id, key, body, ord)",
        )
        .bind(i64::try_from(bodies.len()).unwrap())
        .bind(&ids)
        .bind(&keys)
        .bind(bodies)
        .execute(&mut connection)
        .await
        .unwrap();
    }
    rate(events, started.elapsed())
}

struct Nothing(AtomicU64);

#[async_trait]
impl EventHandler for Nothing {
    fn name(&self) -> &str {
        "nothing"
    }

    async fn handle(&self, event: &StoredEvent) -> Outcome {
        self.0.fetch_max(event.position.0, Ordering::Relaxed);
        Outcome::Done
    }
}

/// P: JetStream to Postgres, and one handler.
async fn pulsebus(nats: &str, events: u64, round: u64) -> f64 {
    let database = postgres::database().await;
    let options = PostgresOptions::new(Secret::Inline(database.url.clone()));
    let store = PostgresStore::connect(options).await.unwrap();
    let bus = EventBus::builder().store(store).build().await.unwrap();
    let handler = Arc::new(Nothing(AtomicU64::new(0)));
    let registered =
        bus.register_handler_with(Arc::clone(&handler) as _, HandlerOptions::default());
    registered.await.unwrap();
    bus.start_worker_pool(2);
    let transport = NatsTransport::new(NatsOptions {
        url: pulsebus::secret::Secret::Inline(nats.to_owned()),
        ..NatsOptions::default()
    });
    let started = Instant::now();
    bus.add_source(Source {
        name: "bench".into(),
        transport: Arc::new(transport),
        params: serde_json::json!({"stream": "BENCH", "consumer": format!("pulsebus-{round}")}),
        competing: false,
        decoder: DecoderOptions::default(),
        options: IngestOptions::default(),
    });
    bus.handled("nothing", Position(events)).await.unwrap();
    let elapsed = started.elapsed();
    assert_eq!(handler.0.load(Ordering::Relaxed), events);
    bus.drain(Duration::from_secs(30)).await.unwrap();
    rate(events, elapsed)
}

fn rate(events: u64, took: Duration) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "a rate")]
    let events = events as f64;
    events / took.as_secs_f64()
}
