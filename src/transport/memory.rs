//! The reference transport: everything in this process, for tests and embedding.
//!
//! Named queues, bounded in messages and bytes; a full queue holds its publishers up, it never
//! drops. One lock around the lot: this is the reading of the contract to compare others with,
//! and the numbers of its clauses stand where they are kept.

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use tokio::{
    sync::Notify,
    time::{Instant, sleep_until},
};

use super::{
    Consumer, Deliveries, Outbound, PublishError, Publisher, Reporter, Room, Settle, Settlement,
    SourceSpec, SourceState, Transport, TransportError,
};
use crate::event::{Message, Origin};

/// Bounds of the queues.
#[derive(Debug, Clone)]
pub struct MemoryOptions {
    /// Messages in one queue, delivered and unsettled ones included. Default 10,000.
    pub capacity: usize,
    /// Bytes of body in one queue; one message more than this fits. Default 64 MiB.
    pub capacity_bytes: usize,
    /// The largest body that is taken. Default 8 MiB.
    pub max_message_bytes: usize,
    /// How long a publish waits for room. Default 5 s.
    pub publish_timeout: Duration,
}

impl Default for MemoryOptions {
    fn default() -> Self {
        Self {
            capacity: 10_000,
            capacity_bytes: 64 << 20,
            max_message_bytes: 8 << 20,
            publish_timeout: Duration::from_secs(5),
        }
    }
}

/// What to consume from memory: the `params` of a [`SourceSpec`].
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemorySource {
    /// The queue; opening a consumer makes it where it does not exist.
    pub queue: String,
}

/// Queues in this process. Clones share them.
#[derive(Debug, Clone)]
pub struct MemoryTransport(Arc<Shared>);

impl Default for MemoryTransport {
    fn default() -> Self {
        Self::new(MemoryOptions::default())
    }
}

impl MemoryTransport {
    /// A transport without queues.
    #[must_use]
    pub fn new(options: MemoryOptions) -> Self {
        Self(Arc::new(Shared {
            options,
            broker: Mutex::new(Broker::default()),
            changed: Notify::new(),
        }))
    }

    /// Makes a queue, so that it can be published to before it is consumed.
    pub fn declare(&self, queue: &str) {
        self.0.lock().declare(queue);
        self.0.changed.notify_waiters();
    }

    /// Deletes a queue and what is in it. A consumer of it makes it again, and says so.
    pub fn delete(&self, queue: &str) {
        self.0.lock().queues.remove(queue);
        self.0.changed.notify_waiters();
    }

    /// How many messages a queue holds, delivered and unsettled ones included.
    #[must_use]
    pub fn depth(&self, queue: &str) -> Option<usize> {
        self.0.lock().queues.get(queue).map(Queue::len)
    }

    /// Behaves as if the broker were away: consumers wait, publishing is unavailable, and what
    /// was delivered and not settled goes back to its place.
    pub fn disconnect(&self) {
        let mut broker = self.0.lock();
        if broker.link == Link::Up {
            broker.link = Link::Down;
        }
        broker.generation += 1;
        for queue in broker.queues.values_mut() {
            queue.ready.append(&mut queue.held);
        }
        drop(broker);
        self.0.changed.notify_waiters();
    }

    /// Ends [`disconnect`](Self::disconnect).
    pub fn reconnect(&self) {
        let mut broker = self.0.lock();
        if broker.link == Link::Down {
            broker.link = Link::Up;
        }
        drop(broker);
        self.0.changed.notify_waiters();
    }

    /// Ends the transport: [`Consumer::next`] gives `None`, publishing is unavailable.
    pub fn shut_down(&self) {
        self.0.lock().link = Link::ShutDown;
        self.0.changed.notify_waiters();
    }
}

#[async_trait]
impl Transport for MemoryTransport {
    fn kind(&self) -> &'static str {
        "memory"
    }

    async fn consumer(&self, source: SourceSpec) -> Result<Box<dyn Consumer>, TransportError> {
        let params: MemorySource = serde_json::from_value(source.params)
            .map_err(|error| TransportError::Misconfigured(format!("memory source: {error}")))?;
        let mut broker = self.0.lock();
        if broker.link != Link::Up {
            return Err(TransportError::Unavailable("the memory transport is disconnected".into()));
        }
        broker.declare(&params.queue);
        drop(broker);
        source.reporter.report(SourceState::Consuming);
        Ok(Box::new(MemoryConsumer {
            shared: Arc::clone(&self.0),
            name: source.name,
            kind: "memory".into(),
            queue: params.queue.into(),
            reporter: source.reporter,
            closed: false,
        }))
    }

    async fn publisher(&self) -> Result<Box<dyn Publisher>, TransportError> {
        Ok(Box::new(MemoryPublisher {
            shared: Arc::clone(&self.0),
            turn: tokio::sync::Mutex::new(true),
        }))
    }
}

struct Shared {
    options: MemoryOptions,
    broker: Mutex<Broker>,
    /// Anything changed: messages, room, link, queues.
    changed: Notify,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Broker> {
        // Nothing below panics with the lock held half way through a change.
        self.broker.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryTransport").field("options", &self.options).finish_non_exhaustive()
    }
}

#[derive(Default, Clone, Copy, PartialEq, Eq)]
enum Link {
    #[default]
    Up,
    Down,
    ShutDown,
}

#[derive(Default)]
struct Broker {
    queues: HashMap<Box<str>, Queue>,
    link: Link,
    /// Counts disconnections: a settlement from before one settles nothing.
    generation: u64,
    made: u64,
}

impl Broker {
    fn declare(&mut self, name: &str) -> &mut Queue {
        let made = &mut self.made;
        self.queues.entry(name.into()).or_insert_with(|| {
            *made += 1;
            Queue { id: *made, ..Queue::default() }
        })
    }
}

/// One queue. Messages keep the number they were published under, so that one that goes back
/// goes back to its place (C3).
#[derive(Default)]
struct Queue {
    id: u64,
    last: u64,
    bytes: usize,
    ready: BTreeMap<u64, Entry>,
    held: BTreeMap<u64, Entry>,
    delayed: BTreeMap<(Instant, u64), Entry>,
}

struct Entry {
    address: Arc<str>,
    message: Outbound,
    delivered: bool,
}

impl Queue {
    fn len(&self) -> usize {
        self.ready.len() + self.held.len() + self.delayed.len()
    }

    /// Makes ready what is due; says when the next one will be.
    fn ripen(&mut self, now: Instant) -> Option<Instant> {
        while let Some(entry) = self.delayed.first_entry() {
            let (due, number) = *entry.key();
            if due > now {
                return Some(due);
            }
            self.ready.insert(number, entry.remove());
        }
        None
    }

    fn settle(&mut self, number: u64, settlement: &Settlement) {
        let Some(entry) = self.held.remove(&number) else { return };
        match settlement {
            Settlement::Ack(_) | Settlement::Reject => {
                self.bytes -= entry.message.body.len();
            }
            Settlement::Retry(delay) => {
                self.delayed.insert((Instant::now() + *delay, number), entry);
            }
        }
    }
}

struct MemoryConsumer {
    shared: Arc<Shared>,
    name: Arc<str>,
    kind: Arc<str>,
    queue: Arc<str>,
    reporter: Reporter,
    closed: bool,
}

enum Taken {
    These(Deliveries),
    Nothing { until: Option<Instant> },
    Ended,
}

impl MemoryConsumer {
    /// Takes what there is room for. Nothing is awaited, so nothing can be lost half way (C10).
    fn take(&self, room: Room) -> Taken {
        let mut broker = self.shared.lock();
        match broker.link {
            Link::ShutDown => return Taken::Ended,
            Link::Down => {
                let reason = "the memory transport is disconnected".to_owned();
                self.reporter.report(SourceState::Reconnecting(reason));
                return Taken::Nothing { until: None };
            }
            Link::Up => {}
        }
        if !broker.queues.contains_key(&*self.queue) {
            let reason = format!("queue `{}` was deleted; it is made again", self.queue);
            self.reporter.report(SourceState::Reconnecting(reason));
        }
        let generation = broker.generation;
        let queue = broker.declare(&self.queue);
        self.reporter.report(SourceState::Consuming);
        let until = queue.ripen(Instant::now());
        if room.is_none() {
            return Taken::Nothing { until: None };
        }
        let (mut messages, mut numbers) = (Vec::new(), Vec::new());
        let (mut bytes, mut redelivered) = (0, 0);
        while messages.len() < room.messages && bytes < room.bytes {
            let Some((number, mut entry)) = queue.ready.pop_first() else { break };
            bytes += entry.message.body.len();
            redelivered += usize::from(entry.delivered);
            entry.delivered = true;
            messages.push(self.message(&entry));
            numbers.push(number);
            queue.held.insert(number, entry);
        }
        if messages.is_empty() {
            return Taken::Nothing { until };
        }
        let settle = MemorySettle {
            shared: Arc::clone(&self.shared),
            queue: Arc::clone(&self.queue),
            queue_id: queue.id,
            generation,
            numbers,
        };
        Taken::These(Deliveries { messages, mark: None, redelivered, settle: Box::new(settle) })
    }

    fn message(&self, entry: &Entry) -> Message {
        let mut headers = entry.message.headers.clone();
        if !entry.message.id.is_empty() && headers.get(":message_id").is_none() {
            headers.push(":message_id", &*entry.message.id);
        }
        Message {
            body: entry.message.body.clone(),
            headers,
            origin: Origin {
                source: Arc::clone(&self.name),
                transport: Arc::clone(&self.kind),
                subject: Arc::clone(&entry.address),
                channel: Some(Arc::clone(&self.queue)),
                exchange: entry.message.exchange.clone(),
                // The numbers begin anew with the process: no identity to give away.
                sequence: None,
            },
        }
    }
}

#[async_trait]
impl Consumer for MemoryConsumer {
    async fn next(&mut self, room: Room) -> Option<Deliveries> {
        loop {
            if self.closed {
                return None;
            }
            let changed = self.shared.changed.notified();
            tokio::pin!(changed);
            // Registered before looking: what happens after the look wakes it.
            changed.as_mut().enable();
            match self.take(room) {
                Taken::These(deliveries) => return Some(deliveries),
                Taken::Ended => return None,
                Taken::Nothing { until: None } => changed.await,
                Taken::Nothing { until: Some(due) } => {
                    tokio::select! {
                        () = changed => {}
                        () = sleep_until(due) => {}
                    }
                }
            }
        }
    }

    async fn close(&mut self) {
        self.closed = true;
        self.reporter.report(SourceState::Stopped);
    }
}

/// Holds the numbers of what was handed over; what is left of them when it is dropped goes back
/// to its place (C4).
struct MemorySettle {
    shared: Arc<Shared>,
    queue: Arc<str>,
    queue_id: u64,
    generation: u64,
    numbers: Vec<u64>,
}

impl MemorySettle {
    /// Runs `change` on the queue, where it still is the one these came from.
    fn on_queue(&self, change: impl FnOnce(&mut Queue)) {
        let mut broker = self.shared.lock();
        if broker.generation == self.generation
            && let Some(queue) = broker.queues.get_mut(&*self.queue)
            && queue.id == self.queue_id
        {
            change(queue);
        }
        drop(broker);
        self.shared.changed.notify_waiters();
    }
}

#[async_trait]
impl Settle for MemorySettle {
    async fn settle(mut self: Box<Self>, settlements: Vec<Settlement>) {
        let settled = settlements.len().min(self.numbers.len());
        let numbers: Vec<u64> = self.numbers.drain(..settled).collect();
        self.on_queue(|queue| {
            for (number, settlement) in numbers.iter().zip(&settlements) {
                queue.settle(*number, settlement);
            }
        });
    }
}

impl Drop for MemorySettle {
    fn drop(&mut self) {
        if self.numbers.is_empty() {
            return;
        }
        self.on_queue(|queue| {
            for number in &self.numbers {
                if let Some(entry) = queue.held.remove(number) {
                    queue.ready.insert(*number, entry);
                }
            }
        });
    }
}

struct MemoryPublisher {
    shared: Arc<Shared>,
    /// One call after the other, so that a call that waits for room keeps its place (P2).
    /// Holds whether the publisher is open.
    turn: tokio::sync::Mutex<bool>,
}

enum Put {
    Done(Result<(), PublishError>),
    Full(Outbound),
}

impl MemoryPublisher {
    fn put(&self, message: Outbound) -> Put {
        let options = &self.shared.options;
        let size = message.body.len();
        if size > options.max_message_bytes {
            return Put::Done(Err(PublishError::Refused(format!(
                "the body has {size} bytes, more than the {} that are taken",
                options.max_message_bytes
            ))));
        }
        let mut broker = self.shared.lock();
        if broker.link != Link::Up {
            return Put::Done(Err(PublishError::Unavailable(
                "the memory transport is disconnected".into(),
            )));
        }
        let Some(queue) = broker.queues.get_mut(&*message.address) else {
            return Put::Done(Err(PublishError::Failed(format!(
                "there is no queue `{}`",
                message.address
            ))));
        };
        if queue.len() >= options.capacity || queue.bytes >= options.capacity_bytes {
            return Put::Full(message);
        }
        queue.last += 1;
        queue.bytes += size;
        let entry = Entry { address: (*message.address).into(), message, delivered: false };
        queue.ready.insert(queue.last, entry);
        drop(broker);
        self.shared.changed.notify_waiters();
        Put::Done(Ok(()))
    }

    async fn put_before(
        &self,
        mut message: Outbound,
        deadline: Instant,
    ) -> Result<(), PublishError> {
        loop {
            let changed = self.shared.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            match self.put(message) {
                Put::Done(result) => return result,
                Put::Full(back) => message = back,
            }
            tokio::select! {
                () = changed => {}
                () = sleep_until(deadline) => {
                    return Err(PublishError::Unavailable(format!(
                        "queue `{}` is full",
                        message.address
                    )));
                }
            }
        }
    }
}

#[async_trait]
impl Publisher for MemoryPublisher {
    async fn publish(&self, messages: Vec<Outbound>) -> Vec<Result<(), PublishError>> {
        let open = self.turn.lock().await;
        let deadline = Instant::now() + self.shared.options.publish_timeout;
        let mut results = Vec::with_capacity(messages.len());
        let mut away =
            (!*open).then(|| PublishError::Unavailable("the publisher is closed".into()));
        for message in messages {
            let result = match &away {
                // What follows one that may be published again later must not overtake it (P2).
                Some(error) => Err(error.clone()),
                None => self.put_before(message, deadline).await,
            };
            if let Err(error @ PublishError::Unavailable(_)) = &result {
                away = Some(error.clone());
            }
            results.push(result);
        }
        drop(open);
        results
    }

    async fn close(&self) {
        *self.turn.lock().await = false;
    }
}
