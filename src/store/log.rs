//! The log as the rest of the program sees it: one writer a process, a tail in memory.
//!
//! Whatever is waiting when a commit returns is the next batch (group commit), so a lone event
//! is committed at once and a flood in large batches, without a timer.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use prometheus_client::metrics::counter::Counter;
use time::OffsetDateTime;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{Batch, Entry, EventStore, Limit, StoreError, tail::Tail};
use crate::{
    event::{Position, StoredEvent},
    retry::RetryPolicy,
    telemetry::{Metrics, Pulse, Pulses, ReadLabels},
    transport::{Mark, Receipt},
};

/// Bounds of a [`Log`].
#[derive(Debug, Clone)]
pub struct LogOptions {
    /// Entries a commit at most. Default 4,000.
    pub batch_events: usize,
    /// Bytes of body a commit at most (one entry more may make it larger). Default 8 MiB.
    pub batch_bytes: usize,
    /// Events kept in memory behind the head. Default 16,384.
    pub tail_events: usize,
    /// Bytes of body kept in memory behind the head. Default 32 MiB.
    pub tail_bytes: usize,
}

impl Default for LogOptions {
    fn default() -> Self {
        Self {
            batch_events: 4_000,
            batch_bytes: 8 << 20,
            tail_events: 16_384,
            tail_bytes: 32 << 20,
        }
    }
}

/// What one caller appends in one go.
#[derive(Debug, Default)]
pub struct Append {
    /// In the order they are to have in the log.
    pub entries: Vec<Entry>,
    /// How far a source is once they are in: its name and mark.
    pub mark: Option<(Arc<str>, Mark)>,
}

/// How the writer is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LogHealth {
    /// Appends are committed.
    Writing,
    /// The store is away; the same batch is tried again until it is back.
    Waiting(Arc<str>),
    /// The store can no longer be trusted; nothing more is appended. The process should end.
    Failed(Arc<str>),
}

/// An append under way. Resolves when it is committed.
pub type Ticket = oneshot::Receiver<Vec<Receipt>>;

/// The event log: appends in groups, reads through a tail in memory.
///
/// *Concurrency*: shared by everything that appends or reads; nothing is locked for longer than
/// it takes to copy pointers.
pub struct Log {
    store: Arc<dyn EventStore>,
    tail: Tail,
    head: watch::Sender<Position>,
    health: watch::Sender<LogHealth>,
    /// Since when it is writing, waiting or failed.
    health_since: Mutex<OffsetDateTime>,
    requests: mpsc::UnboundedSender<Request>,
    reads: Reads,
    pulses: Pulses,
}

/// Where pages of events came from.
struct Reads {
    memory: Counter,
    store: Counter,
}

struct Request {
    append: Append,
    submitted: Instant,
    reply: oneshot::Sender<Vec<Receipt>>,
}

impl std::fmt::Debug for Log {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Log")
            .field("store", &self.store.kind())
            .field("head", &*self.head.borrow())
            .field("health", &*self.health.borrow())
            .finish_non_exhaustive()
    }
}

impl Log {
    /// Opens the log over a store and starts its writer on `tasks`.
    ///
    /// When `stop` is cancelled the writer commits what was submitted before, as far as the
    /// store takes it at once, and ends; what it has not committed is dropped, its tickets with
    /// it, so nobody acks it.
    ///
    /// # Errors
    /// Where the head of the log cannot be read.
    pub async fn open(
        store: Arc<dyn EventStore>,
        options: LogOptions,
        metrics: Metrics,
        tasks: &TaskTracker,
        stop: CancellationToken,
    ) -> Result<Arc<Self>, StoreError> {
        let head = store.head().await?;
        metrics.log.head.set(head.0);
        let reads = |from| metrics.log.reads.get_or_create_owned(&ReadLabels { from });
        let reads = Reads { memory: reads("memory"), store: reads("store") };
        let (requests, incoming) = mpsc::unbounded_channel();
        let log = Arc::new(Self {
            tail: Tail::new(options.tail_events, options.tail_bytes),
            head: watch::Sender::new(head),
            health: watch::Sender::new(LogHealth::Writing),
            health_since: Mutex::new(crate::event::now()),
            requests,
            reads,
            store,
            pulses: Pulses::default(),
        });
        let writer = Writer {
            log: Arc::clone(&log),
            options,
            metrics,
            incoming,
            left_over: None,
            stop: stop.clone(),
            pulse: log.pulses.start("log"),
        };
        tasks.spawn(writer.run());
        tasks.spawn(Arc::clone(&log).follow(stop));
        Ok(log)
    }

    /// The store under it.
    #[must_use]
    pub fn store(&self) -> &Arc<dyn EventStore> {
        &self.store
    }

    /// The pulses of the loops that write to it and read from it; its writer's is `log`.
    #[must_use]
    pub const fn pulses(&self) -> &Pulses {
        &self.pulses
    }

    /// Hands over an append. Never waits: what may be under way at once is bounded by the
    /// callers, each of which holds its deliveries until the ticket resolves (G7).
    ///
    /// A ticket that fails means the log has closed or failed and nothing was acked.
    pub fn submit(&self, append: Append) -> Ticket {
        let (reply, ticket) = oneshot::channel();
        // A closed channel drops the reply, which fails the ticket.
        let _ = self.requests.send(Request { append, submitted: Instant::now(), reply });
        ticket
    }

    /// The last position known to be committed.
    #[must_use]
    pub fn head(&self) -> Position {
        *self.head.borrow()
    }

    /// Watches the head.
    #[must_use]
    pub fn watch_head(&self) -> watch::Receiver<Position> {
        self.head.subscribe()
    }

    /// How the writer is.
    #[must_use]
    pub fn health(&self) -> LogHealth {
        self.health.borrow().clone()
    }

    /// Since when it is so, whatever the reasons were.
    #[must_use]
    pub fn health_since(&self) -> OffsetDateTime {
        *self.health_since.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Watches how the writer is.
    #[must_use]
    pub fn watch_health(&self) -> watch::Receiver<LogHealth> {
        self.health.subscribe()
    }

    /// The events after `after`: from memory where they are recent, else from the store.
    ///
    /// # Errors
    /// The store's.
    pub async fn read(
        &self,
        after: Position,
        limit: Limit,
    ) -> Result<Vec<Arc<StoredEvent>>, StoreError> {
        if after >= self.head() {
            return Ok(Vec::new());
        }
        if let Some(events) = self.tail.read(after, limit) {
            self.reads.memory.inc();
            return Ok(events);
        }
        self.reads.store.inc();
        self.store.read(after, limit).await
    }

    /// The events at these positions, which are in order: from memory where all of them are
    /// recent, else from the store. Bounded as in [`EventStore::get`].
    ///
    /// # Errors
    /// The store's.
    pub async fn get(
        &self,
        positions: &[Position],
        bytes: usize,
    ) -> Result<Vec<Arc<StoredEvent>>, StoreError> {
        if let Some(events) = self.tail.get(positions, bytes) {
            self.reads.memory.inc();
            return Ok(events);
        }
        self.reads.store.inc();
        self.store.get(positions, bytes).await
    }

    /// When an event was recorded, where it is recent enough to be in memory.
    pub(crate) fn recorded_lately(&self, position: Position) -> Option<OffsetDateTime> {
        let found = self.tail.get(&[position], 0)?;
        found.first().map(|event| event.recorded_at)
    }

    /// Something is known to be committed up to here.
    pub(crate) fn advance(&self, to: Position) {
        self.head.send_if_modified(|head| {
            let further = to > *head;
            if further {
                *head = to;
            }
            further
        });
    }

    /// Follows what other processes append to the same store.
    async fn follow(self: Arc<Self>, stop: CancellationToken) {
        let watch = async {
            loop {
                self.store.appended_elsewhere(self.head()).await;
                match self.store.head().await {
                    Ok(head) => self.advance(head),
                    Err(StoreError::Fatal(reason)) => return self.fail(&reason),
                    // The writer reports a store that is away; here it is only asked again.
                    Err(
                        StoreError::Unavailable(_)
                        | StoreError::Misconfigured(_)
                        | StoreError::Fenced(_),
                    ) => {
                        tokio::time::sleep(Duration::from_secs(1)).await;
                    }
                }
            }
        };
        stop.run_until_cancelled(watch).await;
    }

    fn fail(&self, reason: &Arc<str>) {
        if self.set_health(LogHealth::Failed(Arc::clone(reason))) {
            tracing::error!(store = self.store.kind(), %reason, "the event store failed");
        }
    }

    /// Says how the writer is; whether that changed it. A failed store stays failed: what it
    /// says afterwards is not to be trusted.
    fn set_health(&self, health: LogHealth) -> bool {
        self.health.send_if_modified(|current| {
            let changes = *current != health && !matches!(current, LogHealth::Failed(_));
            if changes {
                if std::mem::discriminant(current) != std::mem::discriminant(&health) {
                    let since = self.health_since.lock();
                    *since.unwrap_or_else(PoisonError::into_inner) = crate::event::now();
                }
                *current = health;
            }
            changes
        })
    }
}

/// The one writer of this process.
struct Writer {
    log: Arc<Log>,
    options: LogOptions,
    metrics: Metrics,
    incoming: mpsc::UnboundedReceiver<Request>,
    /// A request that did not fit the last batch.
    left_over: Option<Request>,
    stop: CancellationToken,
    pulse: Pulse,
}

impl Writer {
    async fn run(mut self) {
        while let Some((batch, replies)) = self.next_batch().await {
            let Some(receipts) = self.commit(&batch).await else { break };
            if matches!(self.log.health(), LogHealth::Failed(_)) {
                // Found failed while this was under way: nothing is acked any more.
                break;
            }
            self.publish(batch, receipts, replies);
        }
        self.incoming.close();
    }

    /// What is waiting now, or the first that comes; `None` when stopped and nothing is left.
    async fn next_batch(&mut self) -> Option<(Batch, Vec<Waiting>)> {
        let first = match self.left_over.take() {
            Some(request) => request,
            None => {
                let stop = self.stop.clone();
                let incoming = &mut self.incoming;
                let request = async {
                    tokio::select! {
                        biased;
                        () = stop.cancelled() => {
                            // What was submitted before is still committed, nothing after it.
                            incoming.close();
                            incoming.recv().await
                        }
                        request = incoming.recv() => request,
                    }
                };
                self.pulse.waiting(request).await?
            }
        };
        let mut batch = Batch::new(Vec::new());
        let mut replies = Vec::new();
        let mut bytes = 0;
        let waits_since = first.submitted;
        let mut next = Some(first);
        while let Some(request) = next {
            let entries = &request.append.entries;
            let size: usize = entries.iter().map(body_len).sum();
            let full = batch.entries.len() + entries.len() > self.options.batch_events
                || bytes + size > self.options.batch_bytes;
            if full && !batch.entries.is_empty() {
                self.left_over = Some(request);
                break;
            }
            bytes += size;
            replies.push(Waiting { entries: entries.len(), reply: request.reply });
            let Append { entries, mark } = request.append;
            if batch.entries.is_empty() {
                batch.entries = entries;
            } else {
                batch.entries.extend(entries);
            }
            batch.marks.extend(mark);
            next = self.incoming.try_recv().ok();
        }
        self.metrics.log.wait_seconds.observe(waits_since.elapsed().as_secs_f64());
        Some((batch, replies))
    }

    /// Commits, for as long as it takes; `None` when the store failed for good, or when
    /// stopped while it was away.
    async fn commit(&self, batch: &Batch) -> Option<Vec<Receipt>> {
        let mut backoff = RetryPolicy::reconnect().start();
        loop {
            let started = Instant::now();
            let append = self.log.store.append(batch);
            match self.pulse.within(self.log.store.patience(), append).await {
                Ok(receipts) if receipts.len() == batch.entries.len() => {
                    self.metrics.log.commit_seconds.observe(started.elapsed().as_secs_f64());
                    #[expect(clippy::cast_precision_loss, reason = "a batch is a few thousand")]
                    self.metrics.log.commit_entries.observe(batch.entries.len() as f64);
                    if self.log.set_health(LogHealth::Writing) {
                        tracing::info!(store = self.log.store.kind(), "the event store is back");
                    }
                    return Some(receipts);
                }
                Ok(receipts) => {
                    let reason = format!(
                        "{} receipts for {} entries: a fault in the store's code",
                        receipts.len(),
                        batch.entries.len()
                    );
                    self.log.fail(&reason.into());
                    return None;
                }
                // No append is made under a claim, so none is fenced.
                Err(
                    StoreError::Unavailable(reason)
                    | StoreError::Misconfigured(reason)
                    | StoreError::Fenced(reason),
                ) => {
                    self.metrics.log.commit_failures.inc();
                    let first = self.log.health() == LogHealth::Writing;
                    self.log.set_health(LogHealth::Waiting(Arc::clone(&reason)));
                    if first {
                        tracing::warn!(
                            store = self.log.store.kind(),
                            %reason,
                            "the event store does not take events; nothing is acked until it does"
                        );
                    }
                    let stopped = self.stop.cancelled();
                    let pause = self.pulse.waiting(tokio::time::sleep(backoff.next_delay()));
                    tokio::select! {
                        () = pause => {}
                        () = stopped => return None,
                    }
                }
                Err(StoreError::Fatal(reason)) => {
                    self.log.fail(&reason);
                    return None;
                }
            }
        }
    }

    fn publish(&self, batch: Batch, receipts: Vec<Receipt>, replies: Vec<Waiting>) {
        let mut stored = Vec::with_capacity(batch.entries.len());
        let mut last = Position::START;
        for (entry, receipt) in batch.entries.into_iter().zip(&receipts) {
            match (entry, receipt) {
                (Entry::Event(event), &Receipt::Stored(position)) => {
                    last = last.max(position);
                    stored.push(Arc::new(StoredEvent {
                        position,
                        recorded_at: batch.recorded_at,
                        event,
                    }));
                }
                // Perhaps of an attempt whose answer was lost: then they are new to the readers
                // (S10), and nobody else says so.
                (_, &Receipt::Duplicate(position)) => last = last.max(position),
                (_, Receipt::Stored(_) | Receipt::Quarantined { .. }) => {}
            }
        }
        if !stored.is_empty() {
            self.log.tail.push(stored);
        }
        if last > Position::START {
            self.log.advance(last);
            self.metrics.log.head.set(self.log.head().0);
        }
        let mut receipts = receipts.into_iter();
        for Waiting { entries, reply } in replies {
            // A caller that has gone does not ack; its deliveries come again as copies.
            let _ = reply.send(receipts.by_ref().take(entries).collect());
        }
    }
}

struct Waiting {
    entries: usize,
    reply: oneshot::Sender<Vec<Receipt>>,
}

fn body_len(entry: &Entry) -> usize {
    match entry {
        Entry::Event(event) => event.body().len(),
        Entry::Quarantine(quarantined) => quarantined.message.body.len(),
    }
}
