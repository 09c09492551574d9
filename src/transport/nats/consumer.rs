//! A durable pull consumer that supervises itself (C9) and keeps the order (C3).
//!
//! JetStream delivers what went to nobody (a client that crashed, a connection that broke) again
//! only after `ack_wait`, behind everything newer. So each *generation*, one subscription on one
//! connection, begins by reading from the stream what the consumer has delivered behind our
//! cursor, and reads a range again whenever the *consumer* sequence shows that a delivery is
//! missing. What is read that way is acked like any delivery, by an ack subject made for it;
//! that also ends messages which no client can receive (headers that break its parser). Acks that
//! were lost with a connection are sent again with the next: otherwise such a message would come
//! again after each `ack_wait`, and break the connection each time.
//!
//! ```text
//!            ┌────────────── backoff ◀──────────────┐
//!            ▼                                      │ fault
//!   Waiting ─▶ Opening ─▶ Open: recovering ─▶ Open: pulling
//!                              ▲     a delivery is │
//!                              └──────── missing ──┘
//! ```

use std::{
    future::poll_fn,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::Poll,
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::future::{BoxFuture, OptionFuture};
use tokio::{
    task::unconstrained,
    time::{Instant, sleep_until},
};

use super::{
    BATCH, NatsSource,
    api::{Api, ConsumerInfo, StreamInfo},
    connect::{Fault, Link, Live, Refusals, denied},
    delivery::{IN_PROGRESS, Intake, NatsSettle, ack_subject, answer, is_ack_of},
    pull::Pull,
    random,
    recovery::Recovery,
};
use crate::{
    event::Message,
    transport::{
        Consumer, Deliveries, Mark, Reporter, Room, SourceSpec, SourceState, TransportError,
    },
};

/// How long nothing may be delivered before the server is asked whether that can be.
const WATCHDOG: Duration = Duration::from_secs(30);

/// The first and the longest wait between two attempts to open.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(10));

/// A generation that lasted this long was a success; the next fault begins the backoff anew.
const SETTLED: Duration = Duration::from_secs(10);

/// Acks sent again with a connection, at most; the server passes over those it has. The first one
/// that is missing is always among them.
const ACKS: u64 = 65_536;

pub(super) struct NatsConsumer {
    flow: Flow,
    state: State,
    /// Faults since something was delivered last.
    failures: u32,
    closed: bool,
}

/// What outlives a generation.
struct Flow {
    link: Arc<Link>,
    source: Arc<NatsSource>,
    filter: Option<Arc<str>>,
    competing: bool,
    reporter: Reporter,
    intake: Intake,
    /// How far the messages have been handed over, and of which stream. `None`: unknown, the
    /// consumer's ack floor counts.
    cursor: Option<Mark>,
    /// How far the log has them, in the cursor's incarnation; settled in order, as `Consumer::next`
    /// asks for.
    committed: Arc<AtomicU64>,
}

enum State {
    Waiting { until: Instant },
    Opening(BoxFuture<'static, Result<Opened, Fault>>),
    Open(Box<Generation>),
}

struct Opened {
    generation: Generation,
    cursor: Mark,
}

/// One subscription on one connection.
struct Generation {
    live: Live,
    /// Requests and acks that the server does not take from us.
    refusals: Refusals,
    api: Api,
    pull: Pull,
    recovery: Option<Recovery>,
    /// The consumer sequence of the last delivery seen here, or before.
    consumer_seq: u64,
    /// A delivery is missing, and what it was has not been read yet.
    gap: bool,
    patience: Duration,
    max_ack_pending: i64,
    opened: Instant,
    /// When something was delivered last, or the server said that nothing can be.
    progress: Instant,
    kept_alive: Instant,
    probe: OptionFuture<BoxFuture<'static, Result<Option<ConsumerInfo>, Fault>>>,
    probing: bool,
}

impl NatsConsumer {
    pub(super) async fn open(
        link: Arc<Link>,
        source: NatsSource,
        spec: SourceSpec,
    ) -> Result<Self, TransportError> {
        let flow = Flow {
            link,
            filter: source.subject.as_deref().map(Arc::from),
            intake: Intake::new(spec.name, &source),
            source: Arc::new(source),
            competing: spec.competing,
            reporter: spec.reporter,
            committed: Arc::new(AtomicU64::new(spec.resume.as_ref().map_or(0, |m| m.sequence))),
            cursor: spec.resume,
        };
        let opened = flow.opening().await?;
        let state = State::Waiting { until: Instant::now() };
        let mut consumer = Self { flow, state, failures: 0, closed: false };
        consumer.begin(opened);
        Ok(consumer)
    }

    fn begin(&mut self, opened: Opened) {
        self.flow.reporter.report(match opened.generation.recovery {
            Some(_) => SourceState::Recovering,
            None => SourceState::Consuming,
        });
        let incarnation = self.flow.cursor.as_ref().map(|cursor| &cursor.incarnation);
        if incarnation.is_some_and(|incarnation| *incarnation != opened.cursor.incarnation) {
            // What is still to be settled is of the former one.
            self.flow.committed = Arc::default();
        }
        self.flow.cursor = Some(opened.cursor);
        self.state = State::Open(Box::new(opened.generation));
    }

    fn fail(&mut self, fault: Fault) {
        if let State::Open(generation) = &self.state {
            if generation.opened.elapsed() >= SETTLED {
                self.failures = 0;
            }
            if matches!(fault, Fault::Silent(_)) {
                self.flow.link.discard(&generation.live);
            }
        }
        self.flow.reporter.report(fault.into_state());
        let (first, longest) = BACKOFF;
        let full = first.saturating_mul(1 << self.failures.min(16)).min(longest);
        // Between half and all of it.
        let wait = full.mul_f64(0.5 + (random() % 1_000) as f64 / 2_000.0);
        self.failures = self.failures.saturating_add(1);
        self.state = State::Waiting { until: Instant::now() + wait };
    }
}

impl Flow {
    fn opening(&self) -> BoxFuture<'static, Result<Opened, Fault>> {
        let (link, source) = (Arc::clone(&self.link), Arc::clone(&self.source));
        let (filter, competing) = (self.filter.clone(), self.competing);
        let (cursor, committed) = (self.cursor.clone(), Arc::clone(&self.committed));
        Box::pin(async move {
            let live = link.live().await?;
            let opened =
                open(&link, live.clone(), &source, filter, cursor, &committed, competing).await;
            if matches!(opened, Err(Fault::Silent(_))) {
                link.discard(&live);
            }
            opened
        })
    }

    /// Goes on until there is something to hand over. Cancel safe: between two awaits, all that
    /// is known is in `self` or in `generation`.
    async fn step(&mut self, generation: &mut Generation, room: Room) -> Result<Deliveries, Fault> {
        loop {
            if generation.live.is_down() {
                return Err(Fault::Away(generation.live.down().await));
            }
            if let Some(recovery) = &mut generation.recovery {
                if room.is_none() {
                    // Reading is asking (C7).
                    return Err(Fault::Away(generation.live.down().await));
                }
                let (stored, through) = tokio::select! {
                    read = recovery.next(room) => read?,
                    reason = generation.live.down() => return Err(Fault::Away(reason)),
                };
                advance(&mut self.cursor, through);
                if stored.is_empty() {
                    advance(&mut self.cursor, recovery.end());
                    generation.recovery = None;
                    self.reporter.report(SourceState::Consuming);
                    continue;
                }
                let mut acks = Vec::with_capacity(stored.len());
                let mut messages = Vec::with_capacity(stored.len());
                for message in stored {
                    let sequence = message.sequence;
                    acks.push(self.intake.ack_subject(sequence, generation.consumer_seq));
                    messages.push(self.intake.stored(message));
                }
                let redelivered = messages.len();
                return Ok(self.hand_over(generation, messages, acks, redelivered));
            }

            // Without the scheduler's budget: what is here is handed over whole.
            let pull = &mut generation.pull;
            unconstrained(poll_fn(|cx| match pull.poll_arrivals(cx) {
                Poll::Ready(result) => Poll::Ready(result),
                Poll::Pending => Poll::Ready(Ok(())),
            }))
            .await?;
            self.keep_alive(generation).await;
            tokio::select! {
                asked = generation.pull.ask(room) => asked?,
                reason = generation.live.down() => return Err(Fault::Away(reason)),
            }
            if let Some(deliveries) = self.take(generation, room) {
                return Ok(deliveries);
            }
            if generation.recovery.is_none() {
                self.wait(generation).await?;
            }
        }
    }

    /// What has arrived, in order, as far as there is room; or the recovery that must come first.
    fn take(&mut self, generation: &mut Generation, room: Room) -> Option<Deliveries> {
        let room =
            if room.is_none() { Room { messages: usize::MAX, bytes: usize::MAX } } else { room };
        let expected = room.messages.min(generation.pull.arrived.len());
        let mut messages: Vec<Message> = Vec::with_capacity(expected);
        let mut acks = Vec::with_capacity(expected);
        let (mut bytes, mut redelivered, mut pending) = (0, 0, None);
        while messages.len() < room.messages
            && bytes < room.bytes
            && let Some((_, token)) = generation.pull.arrived.front()
        {
            let token = *token;
            let cursor = self.cursor.as_ref().map_or(0, |cursor| cursor.sequence);
            if !self.competing {
                generation.gap |= token.consumer_seq != generation.consumer_seq + 1;
                // Of a message that was delivered before and is new here, the others around it
                // may have been lost as well.
                let doubtful = generation.gap || token.deliveries > 1;
                if doubtful && token.stream_seq > cursor + 1 {
                    if !messages.is_empty() {
                        break;
                    }
                    generation.recovery =
                        Some(self.recover(generation, cursor, token.stream_seq - 1));
                    self.reporter.report(SourceState::Recovering);
                    return None;
                }
                if token.stream_seq > cursor {
                    advance(&mut self.cursor, token.stream_seq);
                    // First deliveries come in stream order: all before this one are known.
                    generation.gap &= token.deliveries > 1;
                }
            }
            generation.consumer_seq = generation.consumer_seq.max(token.consumer_seq);
            let Some((message, token)) = generation.pull.arrived.pop_front() else { break };
            if let Some(reply) = &message.reply {
                acks.push(reply.clone());
            }
            redelivered += usize::from(token.deliveries > 1);
            pending = Some(token.pending);
            bytes += message.payload.len();
            messages.push(self.intake.delivered(message, token));
        }
        if messages.is_empty() {
            return None;
        }
        generation.progress = Instant::now();
        if let Some(pending) = pending {
            // What has arrived here already has been delivered.
            self.reporter.pending(pending);
        }
        Some(self.hand_over(generation, messages, acks, redelivered))
    }

    fn recover(&self, generation: &Generation, after: u64, end: u64) -> Recovery {
        tracing::info!(
            stream = self.source.stream,
            after,
            end,
            "deliveries were lost; reading them from the stream"
        );
        let sparse = self.filter.is_some() && end - after > 1_000;
        Recovery::new(
            generation.api.clone(),
            self.source.stream.as_str().into(),
            self.filter.clone(),
            after,
            end,
            sparse,
        )
    }

    fn hand_over(
        &self,
        generation: &Generation,
        messages: Vec<Message>,
        acks: Vec<async_nats::Subject>,
        redelivered: usize,
    ) -> Deliveries {
        Deliveries {
            messages,
            mark: if self.competing { None } else { self.cursor.clone() },
            redelivered,
            settle: Box::new(NatsSettle {
                live: generation.live.clone(),
                link: Arc::clone(&self.link),
                acks,
                through: self.cursor.as_ref().map_or(0, |cursor| cursor.sequence),
                committed: Arc::clone(&self.committed),
                patience: generation.patience,
            }),
        }
    }

    /// Waits until something has arrived, or silence has to be looked into.
    async fn wait(&self, generation: &mut Generation) -> Result<(), Fault> {
        let look = generation.pull.check()?;
        let now = Instant::now();
        let idle = generation.progress + WATCHDOG;
        if !generation.probing && generation.pull.is_asking() && now >= idle {
            let (api, source) = (generation.api.clone(), Arc::clone(&self.source));
            let probe: BoxFuture<'static, _> = Box::pin(async move { api.consumer(&source).await });
            generation.probe = Some(probe).into();
            generation.probing = true;
        }
        let alarm = if generation.probing || now >= idle { look } else { look.min(idle) };
        let pull = &mut generation.pull;
        tokio::select! {
            arrived = poll_fn(|cx| pull.poll_arrivals(cx)) => arrived,
            subject = generation.refusals.next() => {
                let source = &self.source;
                let ours = *subject == *generation.pull.subject()
                    || is_ack_of(&subject, &source.stream, &source.consumer);
                if ours { Err(Fault::Misconfigured(denied(&subject))) } else { Ok(()) }
            }
            reason = generation.live.down() => Err(Fault::Away(reason)),
            Some(info) = &mut generation.probe, if generation.probing => {
                generation.probing = false;
                generation.probe = None.into();
                generation.progress = Instant::now();
                let Some(info) = info? else {
                    return Err(Fault::Away("the consumer was deleted".to_owned()));
                };
                self.reporter.pending(info.num_pending);
                let max = generation.max_ack_pending;
                let full = max > 0 && info.num_ack_pending >= max.unsigned_abs();
                if info.num_pending > 0 && !full {
                    return Err(Fault::Away(format!(
                        "{} messages wait and nothing was delivered for {WATCHDOG:?}",
                        info.num_pending
                    )));
                }
                Ok(())
            }
            () = sleep_until(alarm) => Ok(()),
        }
    }

    /// What has arrived and is not handed over yet is ours as well (C8).
    async fn keep_alive(&self, generation: &mut Generation) {
        if generation.pull.arrived.is_empty()
            || generation.kept_alive.elapsed() < generation.patience
        {
            return;
        }
        generation.kept_alive = Instant::now();
        let waiting: Vec<_> = generation
            .pull
            .arrived
            .iter()
            .filter_map(|(message, _)| message.reply.clone())
            .collect();
        answer(&generation.live, waiting.into_iter().map(|ack| (ack, IN_PROGRESS))).await;
    }
}

fn advance(cursor: &mut Option<Mark>, sequence: u64) {
    if let Some(cursor) = cursor {
        cursor.sequence = cursor.sequence.max(sequence);
    }
}

#[async_trait]
impl Consumer for NatsConsumer {
    async fn next(&mut self, room: Room) -> Option<Deliveries> {
        loop {
            if self.closed {
                return None;
            }
            match &mut self.state {
                State::Waiting { until } => {
                    sleep_until(*until).await;
                    self.state = State::Opening(self.flow.opening());
                }
                State::Opening(opening) => match opening.await {
                    Ok(opened) => self.begin(opened),
                    Err(fault) => self.fail(fault),
                },
                State::Open(generation) => match self.flow.step(generation, room).await {
                    Ok(deliveries) => {
                        self.failures = 0;
                        return Some(deliveries);
                    }
                    Err(fault) => self.fail(fault),
                },
            }
        }
    }

    async fn close(&mut self) {
        self.closed = true;
        // Unsubscribes; the connection lives on for what is still to be settled.
        self.state = State::Waiting { until: Instant::now() };
        self.flow.reporter.report(SourceState::Stopped);
    }
}

/// Connects what the server has with what is configured and with where we are.
async fn open(
    link: &Link,
    live: Live,
    source: &NatsSource,
    filter: Option<Arc<str>>,
    cursor: Option<Mark>,
    committed: &AtomicU64,
    competing: bool,
) -> Result<Opened, Fault> {
    let api = Api::new(live.clone(), link.options.domain.as_deref(), link.options.timeout);
    let stream = match (api.stream(&source.stream).await?, &source.create) {
        (Some(stream), Some(create)) => match stream.config.difference(create) {
            None => stream,
            Some(difference) => {
                return Err(Fault::Misconfigured(format!(
                    "stream `{}` exists and is not as `create` asks for: {difference}; change \
                     one of the two, or take `create` out",
                    source.stream
                )));
            }
        },
        (Some(stream), None) => stream,
        (None, Some(create)) => {
            tracing::info!(stream = source.stream, "creating the stream");
            api.create_stream(&source.stream, create).await?
        }
        (None, None) => {
            return Err(Fault::Misconfigured(format!(
                "stream `{}` does not exist: create it, or configure `create`",
                source.stream
            )));
        }
    };
    let (incarnation, known) = locate(cursor, &stream, &source.stream);

    let info = match api.consumer(source).await? {
        Some(info) => info,
        None => {
            tracing::info!(
                stream = source.stream,
                consumer = source.consumer,
                after = known,
                "creating the consumer"
            );
            // A work queue takes no other consumers than those that start at its beginning.
            let whole = competing || stream.config.retention == "workqueue";
            let after = known.filter(|after| *after > 0 && !whole);
            api.create_consumer(source, after).await?
        }
    };
    if let Some(difference) = info.config.difference(source, competing) {
        return Err(Fault::Misconfigured(format!(
            "consumer `{}` of stream `{}` is not as configured: {difference}; change one of them",
            source.consumer, source.stream
        )));
    }
    if info.config.max_deliver > 0 {
        tracing::warn!(
            consumer = source.consumer,
            max_deliver = info.config.max_deliver,
            "the server gives messages up after so many deliveries; nothing is lost only with -1"
        );
    }

    let gone = stream.state.first_seq.saturating_sub(1);
    let after = known.unwrap_or(info.ack_floor.stream_seq).max(gone);
    let delivered = info.delivered.stream_seq;
    let recovery = (!competing && delivered > after).then(|| {
        let range = delivered - after;
        let all = (stream.state.last_seq - gone).max(1);
        let thin = filter.is_some() || stream.state.messages < all / 2;
        let sparse = thin && range > 4 * info.num_ack_pending + 1_000;
        tracing::info!(
            stream = source.stream,
            after,
            delivered,
            "reading what was delivered and is not in the log yet"
        );
        let stream = source.stream.as_str().into();
        Recovery::new(api.clone(), stream, filter, after, delivered, sparse)
    });

    let refusals = live.refusals();
    let committed = committed.load(Ordering::Relaxed).min(known.unwrap_or(0));
    let unacked = info.ack_floor.stream_seq + 1..=committed.min(info.ack_floor.stream_seq + ACKS);
    if !competing && info.num_ack_pending > 0 {
        let acks = unacked.map(|sequence| {
            let last = info.delivered.consumer_seq;
            let subject = ack_subject(&source.stream, &source.consumer, sequence, last);
            (subject, Bytes::from_static(b"+ACK"))
        });
        answer(&live, acks).await;
    }

    let inbox = live.client.new_inbox();
    let subscriber = live
        .client
        .subscribe(inbox.clone())
        .await
        .map_err(|_| Fault::Away("the connection to NATS was lost".to_owned()))?;
    let batch = source.batch.unwrap_or(BATCH);
    let pull = api.pull_subject(source);
    let now = Instant::now();
    Ok(Opened {
        cursor: Mark { incarnation, sequence: after },
        generation: Generation {
            pull: Pull::new(api.clone(), pull, inbox.into(), subscriber, batch, &info.config),
            live,
            refusals,
            api,
            recovery,
            consumer_seq: info.delivered.consumer_seq,
            gap: false,
            patience: info.config.ack_wait() / 3,
            max_ack_pending: info.config.max_ack_pending,
            opened: now,
            progress: now,
            kept_alive: now,
            probe: None.into(),
            probing: false,
        },
    })
}

/// Where we are in this stream: its incarnation, and the last sequence we know of, if any.
///
/// An incarnation is the time the stream was made, and a counter where it has lost its end since:
/// then sequences are used again, and the mark has to go back.
fn locate(cursor: Option<Mark>, stream: &StreamInfo, name: &str) -> (Arc<str>, Option<u64>) {
    let created: Arc<str> = stream.created.as_str().into();
    let Some(mark) = cursor else { return (created, None) };
    let (base, losses) = match mark.incarnation.split_once('+') {
        Some((base, losses)) => (base, losses.parse().unwrap_or(0_u64)),
        None => (&*mark.incarnation, 0),
    };
    if base != &*created {
        tracing::warn!(
            stream = name,
            "the stream was deleted and made anew; starting from its beginning"
        );
        return (created, Some(0));
    }
    let last = stream.state.last_seq;
    if mark.sequence > last {
        tracing::warn!(
            stream = name,
            mark = mark.sequence,
            last,
            "the stream has lost its end; starting from its beginning"
        );
        return (format!("{created}+{}", losses + 1).into(), Some(0));
    }
    (mark.incarnation, Some(mark.sequence))
}
