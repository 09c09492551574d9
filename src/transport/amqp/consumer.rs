//! A queue consumed: one connection per source and generation, mended from inside `next`.
//!
//! ```text
//!            ┌──────── failure ────────┐
//!            ▼                         │
//!  Waiting ──────▶ Building ──────▶ Open(Session)      Closed
//!  (backoff)  due     │    ready
//!            ◀────────┘ failure
//! ```
//!
//! Invariants:
//! * A delivery tag means something on its own channel only. Tags travel to the session's own
//!   `Settler` and nowhere else, so that a settlement of an earlier
//!   generation cannot touch the next one's deliveries.
//! * The next generation is not built before the last one's connection is closed, and, where
//!   nobody can say whether it is, before the broker no longer counts its consumer: only then
//!   has it put back what was not settled, and only then is the order right (C3).
//! * The driver's consumer is not cancelled before its connection closes, for the same reason.

use std::{
    collections::HashMap,
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, Waker},
    time::{Duration, Instant},
};

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::{Stream as _, StreamExt as _};
use lapin::{
    Consumer as Stream, ErrorKind,
    message::Delivery,
    options::{BasicConsumeOptions, BasicQosOptions},
    types::FieldTable,
};
use tokio::sync::{mpsc, watch};
use tokio_util::task::TaskTracker;

use super::{
    AmqpSource,
    connect::{Backoff, Connector, Failure, code, text_of},
    convert,
    settle::{AmqpSettle, Command, Settler},
    topology::{self, step},
};
use crate::{
    event::{Message, Origin},
    transport::{Consumer, Deliveries, Reporter, Room, SourceSpec, SourceState},
};

/// Deliveries on their way where `prefetch` says nothing.
pub(super) const PREFETCH: u16 = 1_000;

/// How long a first opening waits for an earlier consumer of the queue to go: one that was
/// killed a moment ago.
const EARLIER_CONSUMER: Duration = Duration::from_secs(2);

/// Longest delays between attempts: while the broker is away, and while a person has to act.
const AWAY: Duration = Duration::from_secs(5);
const WRONG: Duration = Duration::from_secs(30);

/// A session that lived this long was sound; the next failure begins with a short delay again.
const SOUND: Duration = Duration::from_secs(10);

/// What every generation needs.
struct Plan {
    connector: Arc<Connector>,
    tracker: TaskTracker,
    source: AmqpSource,
    name: Arc<str>,
    competing: bool,
    reporter: Reporter,
}

type Build = Pin<Box<dyn Future<Output = Result<Session, Failure>> + Send>>;

enum State {
    Open(Box<Session>),
    // Kept here, and not in `next`, so that a caller who gives up waiting does not start the
    // attempt over (C10).
    Building(Build),
    Waiting(Pin<Box<tokio::time::Sleep>>),
    Closed,
}

pub(super) struct AmqpConsumer {
    plan: Arc<Plan>,
    state: State,
    backoff: Backoff,
    /// The end of the last generation: whether the broker knows of it.
    ended: Option<watch::Receiver<Option<bool>>>,
    names: Names,
}

impl AmqpConsumer {
    /// Opens a consumer, connected.
    pub(super) async fn open(
        connector: Arc<Connector>,
        tracker: TaskTracker,
        spec: SourceSpec,
    ) -> Result<Self, Failure> {
        let source: AmqpSource = serde_json::from_value(spec.params)
            .map_err(|error| Failure::Misconfigured(error.to_string()))?;
        topology::check(&source)?;
        let names = Names::new(&spec.name, &source.queue);
        let plan = Arc::new(Plan {
            connector,
            tracker,
            source,
            name: spec.name,
            competing: spec.competing,
            reporter: spec.reporter,
        });
        let session = build(Arc::clone(&plan), Earlier::Unknown).await?;
        plan.reporter.report(SourceState::Consuming);
        Ok(Self {
            plan,
            state: State::Open(Box::new(session)),
            backoff: Backoff::new(),
            ended: None,
            names,
        })
    }

    fn failed(&mut self, failure: Failure) {
        let most = match &failure {
            Failure::Unavailable(_) => AWAY,
            Failure::Misconfigured(_) => WRONG,
        };
        let delay = self.backoff.delay(most);
        self.plan.reporter.report(match failure {
            Failure::Unavailable(text) => SourceState::Reconnecting(text),
            Failure::Misconfigured(text) => SourceState::Misconfigured(text),
        });
        self.state = State::Waiting(Box::pin(tokio::time::sleep(delay)));
    }
}

#[async_trait]
impl Consumer for AmqpConsumer {
    async fn next(&mut self, room: Room) -> Option<Deliveries> {
        loop {
            match &mut self.state {
                State::Closed => return None,
                State::Open(session) => match session.take(room, &mut self.names).await {
                    Ok(deliveries) => return Some(deliveries),
                    Err(failure) => {
                        if session.opened.elapsed() > SOUND {
                            self.backoff.reset();
                        }
                        self.ended = Some(session.end());
                        self.failed(failure);
                    }
                },
                State::Waiting(due) => {
                    due.await;
                    let earlier = match &self.ended {
                        Some(ended) => Earlier::Ours(ended.clone()),
                        None => Earlier::Unknown,
                    };
                    self.state = State::Building(Box::pin(build(Arc::clone(&self.plan), earlier)));
                }
                State::Building(building) => match building.await {
                    Ok(session) => {
                        self.state = State::Open(Box::new(session));
                        self.plan.reporter.report(SourceState::Consuming);
                    }
                    Err(failure) => self.failed(failure),
                },
            }
        }
    }

    async fn close(&mut self) {
        // What was handed over can still be settled: the session's settler lives until the last
        // of it is. What was not handed over goes back to its place when the connection closes.
        self.state = State::Closed;
        self.plan.reporter.report(SourceState::Stopped);
    }
}

/// What is known of the consumer before this one.
enum Earlier {
    /// There may have been one, in another process.
    Unknown,
    /// Our own, ending.
    Ours(watch::Receiver<Option<bool>>),
}

async fn build(plan: Arc<Plan>, earlier: Earlier) -> Result<Session, Failure> {
    let timeout = plan.connector.timeout();
    let patience = match earlier {
        Earlier::Unknown => EARLIER_CONSUMER,
        Earlier::Ours(mut ended) => {
            // The settler ends within the time of a close, whatever the broker does.
            let known =
                ended.wait_for(Option::is_some).await.is_ok_and(|ended| *ended == Some(true));
            // A broker that has not heard of the end counts a client dead after two heartbeats.
            if known { Duration::ZERO } else { plan.connector.heartbeat() * 5 / 2 }
        }
    };
    let link = plan.connector.connect(&plan.name).await?;
    let since = Instant::now();
    loop {
        let consumers = topology::prepare(&link.connection, &plan.source, timeout).await?;
        if plan.competing || consumers == 0 {
            break;
        }
        if since.elapsed() >= patience {
            tracing::warn!(
                source = &*plan.name,
                queue = plan.source.queue,
                consumers,
                "the queue has other consumers, so order cannot be kept; \
                 say competing = true if that is meant"
            );
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }

    let channel = step(timeout, link.connection.create_channel()).await?;
    let prefetch = plan.source.prefetch.unwrap_or(PREFETCH);
    step(timeout, channel.basic_qos(prefetch, BasicQosOptions { global: false })).await?;
    let queue = convert::short("queue", &plan.source.queue).map_err(Failure::Misconfigured)?;
    let tag = convert::short("consumer tag", "").map_err(Failure::Misconfigured)?;
    let consuming =
        channel.basic_consume(queue, tag, BasicConsumeOptions::default(), FieldTable::default());
    let stream = step(timeout, consuming).await.map_err(|refusal| match refusal.code {
        Some(code) if code < 500 || code == code::NOT_ALLOWED || code == code::NOT_IMPLEMENTED => {
            Failure::Misconfigured(refusal.text)
        }
        _ => Failure::Unavailable(refusal.text),
    })?;

    let (commands, received) = mpsc::unbounded_channel();
    let (say_ended, ended) = watch::channel(None);
    let settler = Settler::new(link, channel, timeout);
    plan.tracker.spawn(async move {
        let known = settler.run(received).await;
        // Nobody waits for the end of a consumer that is gone.
        let _ = say_ended.send(Some(known));
    });
    Ok(Session {
        stream: Some(stream),
        expected: 1,
        failed: None,
        commands,
        ended,
        opened: Instant::now(),
    })
}

/// One generation: a connection, a channel, a consumer.
struct Session {
    /// `None` once it has been given to the settler, which keeps it until the connection closes.
    stream: Option<Stream>,
    /// The tag of the next delivery.
    expected: u64,
    /// What ended it, found behind deliveries that were handed over first.
    failed: Option<Failure>,
    commands: mpsc::UnboundedSender<Command>,
    ended: watch::Receiver<Option<bool>>,
    opened: Instant,
}

impl Session {
    /// Waits for one delivery and takes what the driver holds besides.
    ///
    /// *Cancel safe*: nothing is awaited once a delivery has been taken.
    async fn take(&mut self, room: Room, names: &mut Names) -> Result<Deliveries, Failure> {
        if let Some(failure) = self.failed.take() {
            return Err(failure);
        }
        let Some(stream) = self.stream.as_mut() else {
            return Err(Failure::Unavailable("the session has ended".to_owned()));
        };
        let mut delivery = delivered(stream.next().await, self.expected)?;

        // With no room (C7) there is nothing to ask for or not to: what is on its way is bounded
        // by the prefetch, and here already for the most part.
        let (most, most_bytes) = match room.is_none() {
            true => (usize::MAX, usize::MAX),
            false => (room.messages, room.bytes),
        };
        let first = self.expected;
        let mut messages = Vec::new();
        let mut redelivered = 0;
        let mut bytes = 0;
        let mut at_once = Context::from_waker(Waker::noop());
        loop {
            self.expected += 1;
            redelivered += usize::from(delivery.redelivered);
            bytes += delivery.data.len();
            messages.push(names.message(delivery));
            if messages.len() >= most || bytes >= most_bytes {
                break;
            }
            let Poll::Ready(next) = Pin::new(&mut *stream).poll_next(&mut at_once) else { break };
            match delivered(next, self.expected) {
                Ok(next) => delivery = next,
                Err(failure) => {
                    self.failed = Some(failure);
                    break;
                }
            }
        }
        let last = self.expected - 1;
        // Where the settler has ended the tags are worth nothing any more; they come again.
        let _ = self.commands.send(Command::HandedOver { first, last });
        let settle = Box::new(AmqpSettle::new(self.commands.clone(), first));
        Ok(Deliveries { messages, mark: None, redelivered, settle })
    }

    /// Has the connection closed now, whatever is not settled yet.
    fn end(&mut self) -> watch::Receiver<Option<bool>> {
        let _ = self.commands.send(Command::End);
        self.ended.clone()
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        if let Some(stream) = self.stream.take() {
            let _ = self.commands.send(Command::Keep(stream));
        }
    }
}

fn delivered(next: Option<lapin::Result<Delivery>>, expected: u64) -> Result<Delivery, Failure> {
    match next {
        Some(Ok(delivery)) if delivery.delivery_tag == expected => Ok(delivery),
        Some(Ok(delivery)) => Err(Failure::Unavailable(format!(
            "delivery {} came where {expected} was expected",
            delivery.delivery_tag
        ))),
        Some(Err(error)) => Err(match error.kind() {
            // The driver cannot read such a message, and with it nothing that follows.
            ErrorKind::ParsingError(_) => Failure::Misconfigured(
                "the queue holds a message whose routing key, property or header name is not \
                 UTF-8; take it out of the queue by hand"
                    .to_owned(),
            ),
            _ => Failure::Unavailable(text_of(&error)),
        }),
        None => Err(Failure::Unavailable(
            "RabbitMQ cancelled the consumer: the queue was deleted, or moved".to_owned(),
        )),
    }
}

/// What repeats from delivery to delivery, allocated once.
struct Names {
    source: Arc<str>,
    transport: Arc<str>,
    queue: Arc<str>,
    seen: HashMap<Box<str>, Arc<str>>,
}

impl Names {
    /// Routing keys may carry ids; so many are remembered, then it begins anew.
    const MOST: usize = 4_096;

    fn new(source: &Arc<str>, queue: &str) -> Self {
        Self {
            source: Arc::clone(source),
            transport: "amqp".into(),
            queue: queue.into(),
            seen: HashMap::new(),
        }
    }

    fn intern(&mut self, name: &str) -> Arc<str> {
        if let Some(known) = self.seen.get(name) {
            return Arc::clone(known);
        }
        if self.seen.len() >= Self::MOST {
            self.seen.clear();
        }
        let new: Arc<str> = name.into();
        self.seen.insert(name.into(), Arc::clone(&new));
        new
    }

    fn message(&mut self, delivery: Delivery) -> Message {
        Message {
            headers: convert::headers_in(&delivery.properties),
            origin: Origin {
                source: Arc::clone(&self.source),
                transport: Arc::clone(&self.transport),
                subject: self.intern(delivery.routing_key.as_str()),
                channel: Some(Arc::clone(&self.queue)),
                exchange: Some(self.intern(delivery.exchange.as_str())),
                sequence: None,
            },
            body: Bytes::from(delivery.data),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn G7_remembered_names_are_bounded() {
        let mut names = Names::new(&"s".into(), "q");
        let first = names.intern("a");
        assert!(Arc::ptr_eq(&first, &names.intern("a")));
        for n in 0..3 * Names::MOST {
            let _ = names.intern(&n.to_string());
        }
        assert!(names.seen.len() <= Names::MOST);
    }
}
