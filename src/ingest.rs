//! Source to log: take, decode, append, and only then settle (G1).
//!
//! One task a source. It holds what it has taken until the log has committed it, in order, and
//! settles in that order. How much it may hold is bounded ([`IngestOptions`]); when the store is
//! away it asks its consumer for nothing new, keeps what it holds alive, and goes on when the
//! store is back. A message that is no event goes into quarantine within the same batch.

mod counters;

use std::{
    collections::VecDeque,
    sync::Arc,
    time::{Duration, Instant},
};

use serde_json::Value;
use time::OffsetDateTime;
use tokio::{sync::watch, time::MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use self::counters::Counters;
use crate::{
    event::{Decoder, DecoderOptions, Message, Position},
    retry::RetryPolicy,
    store::{Append, Entry, Log, LogHealth, StoreError, Ticket},
    telemetry::{self, Arrivals, Metrics, Pulse},
    transport::{
        Consumer, Deliveries, Receipt, Reporter, Room, Settle, Settlement, SourceSpec, SourceState,
        Transport, TransportError,
    },
};

/// How much a source may hold: taken, and not yet settled.
#[derive(Debug, Clone)]
pub struct IngestOptions {
    /// Messages held at most (what is on its way may come on top). Default 16,384.
    pub max_held: usize,
    /// Bytes of body held at most. Default 64 MiB.
    pub max_held_bytes: usize,
}

impl Default for IngestOptions {
    fn default() -> Self {
        Self { max_held: 16_384, max_held_bytes: 64 << 20 }
    }
}

/// A source to run.
#[derive(Clone)]
pub struct Source {
    /// Its configured name.
    pub name: Arc<str>,
    /// What it comes through.
    pub transport: Arc<dyn Transport>,
    /// The transport's own settings for it; see [`SourceSpec::params`].
    pub params: Value,
    /// See [`SourceSpec::competing`].
    pub competing: bool,
    /// How its messages are read.
    pub decoder: DecoderOptions,
    /// How much it may hold.
    pub options: IngestOptions,
}

impl std::fmt::Debug for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Source")
            .field("name", &self.name)
            .field("transport", &self.transport.kind())
            .finish_non_exhaustive()
    }
}

/// Runs a source until `stop` is cancelled, then settles what it holds as far as the log
/// commits it, and returns. It also returns when the log has failed for good: nothing more is
/// settled then. Cancelling the future instead leaves what is held unsettled; it comes again.
pub async fn run(
    source: Source,
    reporter: Reporter,
    log: Arc<Log>,
    metrics: Metrics,
    stop: CancellationToken,
) {
    let mut backoff = RetryPolicy::reconnect().start();
    let pulse = log.pulses().start(format!("source:{}", source.name));
    let consumer = loop {
        let opening = stop.run_until_cancelled(open(&source, &reporter, &log));
        match pulse.waiting(opening).await {
            Some(Ok(consumer)) => break consumer,
            Some(Err(state)) => reporter.report(state),
            None => {}
        }
        tokio::select! {
            () = pulse.waiting(tokio::time::sleep(backoff.next_delay())) => {}
            () = stop.cancelled() => {
                reporter.report(SourceState::Stopped);
                return;
            }
        }
    };
    let health = log.watch_health();
    let mut ingest = Ingest {
        decoder: Decoder::new(source.decoder),
        options: source.options,
        counters: Counters::new(&metrics, &source.name),
        name: source.name,
        consumer,
        held: VecDeque::new(),
        held_messages: 0,
        held_bytes: 0,
        health,
        reporter,
        log,
        warned: false,
        pulse,
    };
    ingest.consume(&stop).await;
    // What is still held goes with it.
    ingest.counters.holding(0, 0);
    ingest.reporter.held_since(None);
    ingest.reporter.report(SourceState::Stopped);
}

async fn open(
    source: &Source,
    reporter: &Reporter,
    log: &Log,
) -> Result<Box<dyn Consumer>, SourceState> {
    let resume = log.store().mark(&source.name).await.map_err(|error| match error {
        StoreError::Unavailable(reason) => SourceState::Paused(reason.to_string()),
        other => SourceState::Misconfigured(other.to_string()),
    })?;
    let spec = SourceSpec {
        name: Arc::clone(&source.name),
        params: source.params.clone(),
        competing: source.competing,
        resume,
        reporter: reporter.clone(),
    };
    source.transport.consumer(spec).await.map_err(|error| match error {
        TransportError::Unavailable(reason) => SourceState::Reconnecting(reason),
        TransportError::Misconfigured(reason) => SourceState::Misconfigured(reason),
    })
}

/// A source while it consumes.
struct Ingest {
    name: Arc<str>,
    consumer: Box<dyn Consumer>,
    decoder: Decoder,
    options: IngestOptions,
    /// Submitted to the log and not settled yet, oldest first.
    held: VecDeque<Held>,
    held_messages: usize,
    held_bytes: usize,
    health: watch::Receiver<LogHealth>,
    counters: Counters,
    reporter: Reporter,
    log: Arc<Log>,
    /// Whether it was said that some messages carry no identity.
    warned: bool,
    pulse: Pulse,
}

struct Held {
    ticket: Ticket,
    settle: Box<dyn Settle>,
    messages: usize,
    bytes: usize,
    keep_alive_at: Option<Instant>,
    taken_at: OffsetDateTime,
    /// The publisher's time of the first event that has one.
    published_at: Option<OffsetDateTime>,
    arrivals: Arrivals,
}

/// Messages taken in one go at most: what a commit takes.
const MAX_TAKEN: usize = 4_000;

/// How long a consumer may take to close; its broker may be gone.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);

/// How often the held are looked through for those the broker has to be told of.
const KEEP_ALIVE_TICK: Duration = Duration::from_millis(100);

impl Ingest {
    async fn consume(&mut self, stop: &CancellationToken) {
        let mut tick = tokio::time::interval(KEEP_ALIVE_TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut beat = tokio::time::interval(telemetry::INTERVAL);
        beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut stopping = false;
        loop {
            self.pulse.beat();
            // With the store away, what is held is released: it comes again (C4).
            if stopping && (self.held.is_empty() || *self.health.borrow() != LogHealth::Writing) {
                return;
            }
            let room = self.room();
            tokio::select! {
                biased;
                () = stop.cancelled(), if !stopping => {
                    stopping = true;
                    let close = tokio::time::timeout(CLOSE_TIMEOUT, self.consumer.close());
                    let _ = self.pulse.waiting(close).await;
                }
                receipts = first_ticket(&mut self.held) => {
                    let Some(held) = self.held.pop_front() else { continue };
                    self.held_messages -= held.messages;
                    self.held_bytes -= held.bytes;
                    match receipts {
                        Ok(receipts) => self.settle(held, receipts).await,
                        // The log has closed or failed. Nothing is acked; what is held comes
                        // again to whoever consumes next.
                        Err(_) => return,
                    }
                }
                changed = self.health.changed() => {
                    if changed.is_err() {
                        return;
                    }
                }
                _ = beat.tick() => {}
                _ = tick.tick(), if !self.held.is_empty() => self.keep_alive().await,
                deliveries = self.consumer.next(room), if !stopping => {
                    match deliveries {
                        Some(deliveries) => self.take(deliveries),
                        None => stopping = true,
                    }
                }
            }
        }
    }

    /// What may be asked for: nothing while the store is away.
    fn room(&self) -> Room {
        if *self.health.borrow() != LogHealth::Writing {
            return Room::NONE;
        }
        Room {
            messages: self.options.max_held.saturating_sub(self.held_messages).min(MAX_TAKEN),
            bytes: self.options.max_held_bytes.saturating_sub(self.held_bytes),
        }
    }

    fn take(&mut self, deliveries: Deliveries) {
        let Deliveries { messages, mark, redelivered, settle } = deliveries;
        let count = messages.len();
        let bytes = messages.iter().map(|m| m.body.len() + m.headers.weight()).sum();
        let mut arrivals = Arrivals::begin();
        let entries: Vec<Entry> = messages
            .into_iter()
            .enumerate()
            .map(|(at, message)| self.decode(at, message, &mut arrivals))
            .collect();
        let taken_at = crate::event::now();
        let published_at = entries.iter().find_map(|entry| match entry {
            Entry::Event(event) => event.time(),
            Entry::Quarantine(_) => None,
        });
        self.counters.taken(count, bytes, redelivered, taken_at);
        let mark = mark.map(|mark| (Arc::clone(&self.name), mark));
        arrivals.appending();
        let ticket = self.log.submit(Append { entries, mark });
        self.held_messages += count;
        self.held_bytes += bytes;
        let keep_alive_at = settle.patience().map(|patience| Instant::now() + patience);
        self.held.push_back(Held {
            ticket,
            settle,
            messages: count,
            bytes,
            keep_alive_at,
            taken_at,
            published_at,
            arrivals,
        });
        self.say_what_is_held();
    }

    fn say_what_is_held(&self) {
        self.counters.holding(self.held_messages, self.held_bytes);
        self.reporter.held_since(self.held.front().map(|oldest| oldest.taken_at));
    }

    fn decode(&mut self, at: usize, message: Message, arrivals: &mut Arrivals) -> Entry {
        match self.decoder.decode(message) {
            Ok(mut event) => {
                arrivals.add(at, &mut event);
                Entry::Event(event)
            }
            Err(not_an_event) => Entry::Quarantine(not_an_event.into()),
        }
    }

    async fn settle(&mut self, held: Held, receipts: Vec<Receipt>) {
        let committed_at = crate::event::now();
        let appended = held.arrivals.appended(|at| position_of(receipts.get(at)));
        self.counters.committed(&self.name, &receipts);
        self.counters.took(held.taken_at, held.published_at, committed_at);
        self.say_what_is_held();
        if !self.warned && self.decoder.ids_made() > 0 {
            self.warned = true;
            tracing::warn!(
                source = &*self.name,
                "messages without an id: they get a random one, so copies cannot be recognised; \
                 publish with an id, or set require_id = true to quarantine them"
            );
        }
        let settle = held.settle.settle(receipts.into_iter().map(Settlement::Ack).collect());
        // A broker may hold it up: one that is away, or takes nothing for now.
        self.pulse.waiting(settle).await;
        self.counters.settled(committed_at);
        appended.end();
    }

    async fn keep_alive(&mut self) {
        let now = Instant::now();
        for held in &mut self.held {
            if held.keep_alive_at.is_some_and(|at| at <= now) {
                self.pulse.waiting(held.settle.keep_alive()).await;
                held.keep_alive_at = held.settle.patience().map(|patience| now + patience);
            }
        }
    }
}

/// What a span says of where an event is now: its position, and whether it was there before.
pub(crate) fn position_of(receipt: Option<&Receipt>) -> Option<(Position, bool)> {
    match receipt {
        Some(Receipt::Stored(position)) => Some((*position, false)),
        Some(Receipt::Duplicate(position)) => Some((*position, true)),
        Some(Receipt::Quarantined { .. }) | None => None,
    }
}

/// The oldest ticket; never resolves when nothing is held. Cancel safe: a receiver is only
/// borrowed.
async fn first_ticket(
    held: &mut VecDeque<Held>,
) -> Result<Vec<Receipt>, tokio::sync::oneshot::error::RecvError> {
    match held.front_mut() {
        Some(first) => (&mut first.ticket).await,
        None => std::future::pending().await,
    }
}
