//! The contract of `pulsebus::transport`, clause by clause, against any implementation.
//!
//! Implement [`Fixture`] for a transport and invoke [`transport_conformance!`](crate::transport_conformance)
//! with it: that makes one test for each function below. There are no capability flags: every
//! implementation satisfies every clause, each in its own way.

use std::{
    collections::{HashMap, HashSet},
    future::Future,
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use pulsebus::{
    event::{HeaderValue, Headers, Message, Position},
    transport::{
        Consumer, Deliveries, Mark, Outbound, PublishError, Publisher, Receipt, Reporter, Room,
        Settle, Settlement, SourceSpec, SourceState, Transport,
    },
};
use serde_json::Value;
use tokio::{
    task::JoinSet,
    time::{Instant, sleep, timeout},
};

/// How long a condition may take to come true, whatever the machine is busy with.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

/// How long "nothing more comes" is watched for; longer than [`Fixture`]'s redelivery time.
pub(crate) const QUIET: Duration = Duration::from_millis(2_500);

const ROOM: Room = Room { messages: 500, bytes: 16 << 20 };

/// A transport with a broker that can be broken. One for each test.
#[async_trait]
pub(crate) trait Fixture: Send + Sync + Sized + 'static {
    /// Starts a broker (or takes a corner of a shared one) and a transport towards it.
    async fn start() -> Self;

    /// The transport under test. Its connections can be broken by the functions below.
    fn transport(&self) -> &dyn Transport;

    /// A new, empty, durable subscription that nobody else uses. What is delivered from it and
    /// not settled is redelivered after at most 1 s where the broker knows such a time.
    async fn fresh_source(&self) -> Source;

    /// Publishes in order, confirmed, by a path that is neither the transport under test nor
    /// concerned by [`cut`](Self::cut) and [`away`](Self::away).
    async fn publish(&self, messages: &[Outbound]);

    /// Breaks every connection of the transport under test, with what is in flight. New ones
    /// are accepted at once.
    async fn cut(&self);

    /// Breaks every connection and keeps the broker out of reach, until [`back`](Self::back).
    async fn away(&self);

    /// Ends [`away`](Self::away).
    async fn back(&self);

    /// Deletes what the subscription of this source consists of at the broker (consumer,
    /// queue), and leaves it so.
    async fn break_subscription(&self, source: &Source);

    /// Does what a person would have to do after [`break_subscription`](Self::break_subscription),
    /// and nothing where the transport mends it by itself.
    async fn mend_subscription(&self, source: &Source);

    /// Delays each direction by this much.
    async fn delay(&self, by: Duration);

    /// Messages that can never be published, each for another reason.
    fn refused(&self, source: &Source) -> Vec<Outbound>;

    /// A message that is fine and that nobody subscribes to.
    fn unroutable(&self, source: &Source) -> Outbound;

    /// A value of every type of header that the broker carries, by names it leaves alone.
    fn headers(&self) -> Headers;
}

/// A subscription.
#[derive(Debug, Clone)]
pub(crate) struct Source {
    /// [`SourceSpec::params`].
    pub(crate) params: Value,
    /// Reaches the subscription, be it published by the transport or by [`Fixture::publish`].
    pub(crate) template: Outbound,
    /// What may be on its way at most when nothing is asked for (C7): prefetch, batch.
    pub(crate) in_flight: usize,
}

impl Source {
    /// A message with this id, which is its body too.
    #[expect(clippy::needless_pass_by_value, reason = "numbers and names alike")]
    pub(crate) fn message(&self, id: impl ToString) -> Outbound {
        let id = id.to_string();
        Outbound {
            id: id.as_str().into(),
            body: Bytes::from(format!("\"{id}\"")),
            ..self.template.clone()
        }
    }

    pub(crate) fn messages(&self, ids: impl IntoIterator<Item = usize>) -> Vec<Outbound> {
        ids.into_iter().map(|n| self.message(n)).collect()
    }

    /// Opens a consumer, trying again while the broker is not there yet.
    pub(crate) async fn open(
        &self,
        transport: &dyn Transport,
        resume: Option<Mark>,
    ) -> (Box<dyn Consumer>, Reporter) {
        let reporter = Reporter::new("conformance");
        let deadline = Instant::now() + DEADLINE;
        loop {
            let spec = SourceSpec {
                name: "conformance".into(),
                params: self.params.clone(),
                competing: false,
                resume: resume.clone(),
                reporter: reporter.clone(),
            };
            match transport.consumer(spec).await {
                Ok(consumer) => return (consumer, reporter),
                Err(error) if Instant::now() > deadline => panic!("cannot open: {error}"),
                Err(_) => sleep(Duration::from_millis(50)).await,
            }
        }
    }
}

/// What a message says it is: the id that [`Source::message`] gave it.
pub(crate) fn id(message: &Message) -> String {
    std::str::from_utf8(&message.body).unwrap().trim_matches('"').to_owned()
}

fn ids(range: impl IntoIterator<Item = usize>) -> Vec<String> {
    range.into_iter().map(|n| n.to_string()).collect()
}

pub(crate) fn stored() -> Settlement {
    Settlement::Ack(Receipt::Stored(Position(1)))
}

pub(crate) async fn ack(settle: Box<dyn Settle>, messages: usize) {
    settle.settle(vec![stored(); messages]).await;
}

/// Awaits something that must happen.
pub(crate) async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    timeout(DEADLINE, future).await.unwrap_or_else(|_| panic!("in vain awaited: {what}"))
}

pub(crate) async fn until_state(
    reporter: &Reporter,
    what: &str,
    wanted: impl Fn(&SourceState) -> bool,
) {
    let mut states = reporter.watch();
    within(what, states.wait_for(wanted)).await.unwrap();
}

/// Stands in for the log: what arrived first, in order, and how far the source is.
#[derive(Debug, Default)]
pub(crate) struct Log {
    pub(crate) ids: Vec<String>,
    known: HashSet<String>,
    pub(crate) copies: usize,
    pub(crate) mark: Option<Mark>,
}

impl Log {
    /// Commits, then acks.
    pub(crate) async fn take(&mut self, deliveries: Deliveries) {
        let messages = deliveries.messages.len();
        self.commit(&deliveries);
        ack(deliveries.settle, messages).await;
    }

    pub(crate) fn commit(&mut self, deliveries: &Deliveries) {
        assert!(!deliveries.messages.is_empty(), "at least one message");
        for message in &deliveries.messages {
            if self.known.insert(id(message)) {
                self.ids.push(id(message));
            } else {
                self.copies += 1;
            }
        }
        if let Some(mark) = &deliveries.mark {
            if let Some(before) = &self.mark
                && before.incarnation == mark.incarnation
            {
                assert!(before.sequence <= mark.sequence, "the mark went back");
            }
            self.mark = Some(mark.clone());
        }
    }

    /// Consumes until this many different messages are in the log.
    pub(crate) async fn fill(&mut self, consumer: &mut dyn Consumer, until: usize) {
        let what = format!("{until} messages");
        within(&what, async {
            while self.ids.len() < until {
                let deliveries = consumer.next(ROOM).await.expect("the consumer ended");
                self.take(deliveries).await;
            }
        })
        .await;
    }

    /// Asserts that nothing comes that is not a copy.
    pub(crate) async fn quiet(&mut self, consumer: &mut dyn Consumer) {
        let before = self.ids.len();
        let end = Instant::now() + QUIET;
        while let Ok(next) = tokio::time::timeout_at(end, consumer.next(ROOM)).await {
            self.take(next.expect("the consumer ended")).await;
        }
        assert_eq!(self.ids[before..], [""; 0], "nothing more was published");
    }

    /// The order that C3 promises.
    #[track_caller]
    pub(crate) fn assert_order(&self, wanted: impl IntoIterator<Item = usize>) {
        let wanted = ids(wanted);
        if self.ids != wanted {
            let at = self.ids.iter().zip(&wanted).position(|(a, b)| a != b);
            panic!(
                "order lost at {at:?} of {}: {:?}",
                wanted.len(),
                at.map(|at| &self.ids[at.saturating_sub(2)..self.ids.len().min(at + 8)])
            );
        }
    }
}

/// Takes this many messages, or a few more where the transport hands over groups; settles none.
pub(crate) async fn hold(consumer: &mut dyn Consumer, wanted: usize) -> Vec<Deliveries> {
    let mut held: Vec<Deliveries> = Vec::new();
    within("messages to hold", async {
        let mut count = 0;
        while count < wanted {
            // No more than is wanted: what is left is for whoever asks next.
            let room = Room { messages: wanted - count, ..ROOM };
            held.push(consumer.next(room).await.expect("the consumer ended"));
            count = held.iter().map(|d| d.messages.len()).sum();
        }
    })
    .await;
    held
}

pub(crate) async fn C1_everything_is_delivered<F: Fixture>() {
    let f = F::start().await;
    let source = f.fresh_source().await;
    f.publish(&source.messages(0..300)).await;
    let (mut consumer, _) = source.open(f.transport(), None).await;
    f.publish(&source.messages(300..600)).await;
    let mut log = Log::default();
    log.fill(&mut *consumer, 600).await;
    log.assert_order(0..600);
}

pub(crate) async fn C2_bytes_and_headers_are_kept<F: Fixture>() {
    let f = F::start().await;
    let source = f.fresh_source().await;
    let bodies = [
        Bytes::new(),
        Bytes::from_static(b"{ \"a\" : 1.0e400,\r\n\t\"a\":\"\\u0000\" }"),
        Bytes::from((0..=255).collect::<Vec<u8>>()),
        Bytes::from(vec![b'x'; 300_000]),
    ];
    let headers = f.headers();
    let messages: Vec<_> = bodies
        .iter()
        .map(|body| Outbound {
            body: body.clone(),
            headers: headers.clone(),
            ..source.message("same")
        })
        .enumerate()
        .map(|(n, m)| Outbound { id: format!("c2-{n}").into(), ..m })
        .collect();
    f.publish(&messages).await;
    let (mut consumer, _) = source.open(f.transport(), None).await;
    let held = hold(&mut *consumer, bodies.len()).await;
    let received: Vec<_> = held.iter().flat_map(|deliveries| &deliveries.messages).collect();
    let named = |all: &Headers| -> Vec<(String, HeaderValue)> {
        let ours: HashSet<_> = headers.iter().map(|(name, _)| name).collect();
        let mut all: Vec<_> = all
            .iter()
            .filter(|(name, _)| ours.contains(name))
            .map(|(name, value)| (name.to_owned(), value.clone()))
            .collect();
        // Brokers keep tables, not lists: the order within one name is what must hold.
        all.sort_by(|a, b| a.0.cmp(&b.0));
        all
    };
    for (message, body) in received.iter().zip(&bodies) {
        assert_eq!(message.body, body);
        assert_eq!(named(&message.headers), named(&headers));
        assert_eq!(&*message.origin.source, "conformance");
        assert_eq!(&*message.origin.transport, f.transport().kind());
        assert_eq!(&*message.origin.subject, &*source.template.address);
    }
}

/// A crash with 200 of 1,000 delivered, nothing of them in the log.
pub(crate) async fn C3_order_survives_a_crash<F: Fixture>() {
    let f = F::start().await;
    let source = f.fresh_source().await;
    f.publish(&source.messages(0..1_000)).await;
    let (mut consumer, _) = source.open(f.transport(), None).await;
    drop(hold(&mut *consumer, 200).await);
    drop(consumer);

    let (mut consumer, _) = source.open(f.transport(), None).await;
    let mut log = Log::default();
    log.fill(&mut *consumer, 1_000).await;
    log.assert_order(0..1_000);
    log.quiet(&mut *consumer).await;
}

/// A crash between the commit and the ack, again and again, while more is published.
pub(crate) async fn C3_order_survives_crashes_after_the_commit<F: Fixture>() {
    let f = F::start().await;
    let source = f.fresh_source().await;
    let mut log = Log::default();
    let mut published = 0;
    for round in 0..6 {
        f.publish(&source.messages(published..published + 200)).await;
        published += 200;
        let (mut consumer, _) = source.open(f.transport(), log.mark.clone()).await;
        let before = log.ids.len();
        let mut held = Vec::new();
        within("a part of the messages", async {
            while log.ids.len() < before + 60 {
                let room = Room { messages: 25, ..ROOM };
                let deliveries = consumer.next(room).await.expect("the consumer ended");
                if round % 2 == 0 {
                    log.commit(&deliveries);
                    held.push(deliveries);
                } else {
                    log.take(deliveries).await;
                }
            }
        })
        .await;
        // Delivered, perhaps, and never looked at.
        drop(timeout(Duration::from_millis(50), consumer.next(ROOM)).await);
    }
    let (mut consumer, _) = source.open(f.transport(), log.mark.clone()).await;
    log.fill(&mut *consumer, published).await;
    log.assert_order(0..published);
    log.quiet(&mut *consumer).await;
}

/// Connections break in the middle of it, with deliveries and acks under way.
pub(crate) async fn C3_order_survives_lost_connections<F: Fixture>() {
    let f = F::start().await;
    let source = f.fresh_source().await;
    let total = 3_000;
    let (mut consumer, _) = source.open(f.transport(), None).await;
    // So that something is under way whenever a connection is cut.
    f.delay(Duration::from_millis(10)).await;
    let mut log = Log::default();
    let publishing = async {
        for from in (0..total).step_by(100) {
            f.publish(&source.messages(from..from + 100)).await;
            sleep(Duration::from_millis(20)).await;
        }
    };
    let cutting = async {
        for _ in 0..4 {
            sleep(Duration::from_millis(130)).await;
            f.cut().await;
        }
    };
    let consuming = async {
        within("all messages", async {
            while log.ids.len() < total {
                let room = Room { messages: 40, ..ROOM };
                let deliveries = consumer.next(room).await.expect("the consumer ended");
                log.take(deliveries).await;
                tokio::task::yield_now().await;
            }
        })
        .await;
    };
    tokio::join!(publishing, cutting, consuming);
    log.assert_order(0..total);
    log.quiet(&mut *consumer).await;
}

pub(crate) async fn C4_the_unsettled_come_again<F: Fixture>() {
    let f = F::start().await;
    let source = f.fresh_source().await;
    f.publish(&source.messages(0..50)).await;
    let (mut consumer, _) = source.open(f.transport(), None).await;
    let mut log = Log::default();
    // Ten are settled, the others are not.
    while log.ids.len() < 10 {
        let room = Room { messages: 10 - log.ids.len(), ..ROOM };
        let deliveries = within("the first ten", consumer.next(room)).await.unwrap();
        log.take(deliveries).await;
    }
    let held = hold(&mut *consumer, 20).await;
    consumer.close().await;
    drop(held);
    drop(consumer);
    let (mut consumer, _) = source.open(f.transport(), log.mark.clone()).await;
    log.fill(&mut *consumer, 50).await;
    log.assert_order(0..50);
}

pub(crate) async fn C5_the_acked_do_not_come_again<F: Fixture>() {
    let f = F::start().await;
    let source = f.fresh_source().await;
    f.publish(&source.messages(0..100)).await;
    let (mut consumer, _) = source.open(f.transport(), None).await;
    let mut log = Log::default();
    log.fill(&mut *consumer, 100).await;
    log.quiet(&mut *consumer).await;
    assert_eq!(log.copies, 0);
    consumer.close().await;
    drop(consumer);
    // Opened with nothing to go by but what the broker knows.
    let (mut consumer, _) = source.open(f.transport(), None).await;
    f.publish(&[source.message(100)]).await;
    log.fill(&mut *consumer, 101).await;
    log.quiet(&mut *consumer).await;
    assert_eq!(log.copies, 0, "acked messages came again");
}

pub(crate) async fn C6_retry_waits_and_reject_ends<F: Fixture>() {
    let f = F::start().await;
    let source = f.fresh_source().await;
    let (mut consumer, _) = source.open(f.transport(), None).await;
    f.publish(&source.messages(0..3)).await;
    let delay = Duration::from_millis(1_500);
    let mut retried_at = None;
    let mut seen: HashMap<String, usize> = HashMap::new();
    let mut redelivered = 0;
    let end = Instant::now() + DEADLINE;
    let mut quiet_until = end;
    while Instant::now() < quiet_until {
        let next = tokio::time::timeout_at(quiet_until, consumer.next(ROOM)).await;
        let Ok(deliveries) = next else { break };
        let deliveries = deliveries.expect("the consumer ended");
        redelivered += deliveries.redelivered;
        let mut settlements = Vec::new();
        for message in &deliveries.messages {
            let count = seen.entry(id(message)).or_default();
            *count += 1;
            settlements.push(match (&*id(message), *count) {
                ("0", _) => stored(),
                ("1", 1) => {
                    retried_at = Some(Instant::now());
                    Settlement::Retry(delay)
                }
                ("1", _) => {
                    let after = retried_at.unwrap().elapsed();
                    assert!(after >= delay, "came again after {after:?}");
                    quiet_until = Instant::now() + QUIET;
                    stored()
                }
                _ => Settlement::Reject,
            });
        }
        deliveries.settle.settle(settlements).await;
    }
    assert_eq!((seen["0"], seen["1"], seen["2"]), (1, 2, 1));
    assert_eq!(redelivered, 1, "the redelivered are counted");
}

pub(crate) async fn C7_no_room_asks_for_nothing_new<F: Fixture>() {
    let f = F::start().await;
    let source = f.fresh_source().await;
    let total = source.in_flight * 3 + 2 * ROOM.messages;
    f.publish(&source.messages(0..total)).await;
    let (mut consumer, _) = source.open(f.transport(), None).await;
    let mut log = Log::default();
    log.take(within("the first", consumer.next(ROOM)).await.unwrap()).await;
    let taken = log.ids.len();
    let mut came = Vec::new();
    let end = Instant::now() + QUIET;
    while let Ok(next) = tokio::time::timeout_at(end, consumer.next(Room::NONE)).await {
        came.push(next.expect("the consumer ended"));
    }
    let held: usize = came.iter().map(|d| d.messages.len()).sum();
    assert!(held <= source.in_flight, "{held} messages came without being asked for");
    for deliveries in came {
        log.take(deliveries).await;
    }
    assert!(taken + held < total);
    log.fill(&mut *consumer, total).await;
    log.assert_order(0..total);
}

/// [`Room`] is a bound on what is handed over, too.
pub(crate) async fn C7_room_is_kept<F: Fixture>() {
    let f = F::start().await;
    let source = f.fresh_source().await;
    let body = Bytes::from(vec![b'x'; 10_000]);
    let large: Vec<_> =
        source.messages(0..50).into_iter().map(|m| Outbound { body: body.clone(), ..m }).collect();
    f.publish(&large).await;
    let (mut consumer, _) = source.open(f.transport(), None).await;
    let mut seen = 0;
    while seen < 50 {
        let room = if seen < 25 {
            Room { messages: 3, bytes: usize::MAX }
        } else {
            Room { messages: usize::MAX, bytes: 25_000 }
        };
        let deliveries = within("messages", consumer.next(room)).await.unwrap();
        assert!((1..=3).contains(&deliveries.messages.len()), "{}", deliveries.messages.len());
        seen += deliveries.messages.len();
        ack(deliveries.settle, deliveries.messages.len()).await;
    }
}

pub(crate) async fn C8_kept_alive_is_kept<F: Fixture>() {
    let f = F::start().await;
    let source = f.fresh_source().await;
    f.publish(&source.messages(0..20)).await;
    let (mut consumer, _) = source.open(f.transport(), None).await;
    let mut held = hold(&mut *consumer, 20).await;
    let end = Instant::now() + Duration::from_secs(5);
    while Instant::now() < end {
        let mut patience = end - Instant::now();
        for deliveries in &mut held {
            if let Some(each) = deliveries.settle.patience() {
                deliveries.settle.keep_alive().await;
                patience = patience.min(each);
            }
        }
        if let Ok(again) = timeout(patience, consumer.next(ROOM)).await {
            panic!("{:?} came while it was held", again.map(|d| id(&d.messages[0])));
        }
    }
    for deliveries in held {
        let messages = deliveries.messages.len();
        ack(deliveries.settle, messages).await;
    }
    assert!(timeout(QUIET, consumer.next(ROOM)).await.is_err(), "came although acked in time");
}

pub(crate) async fn C9_it_comes_back_when_the_broker_does<F: Fixture>() {
    let f = F::start().await;
    let source = f.fresh_source().await;
    let (mut consumer, reporter) = source.open(f.transport(), None).await;
    let mut log = Log::default();
    f.publish(&source.messages(0..10)).await;
    log.fill(&mut *consumer, 10).await;
    until_state(&reporter, "consuming", |s| *s == SourceState::Consuming).await;

    f.away().await;
    let away =
        until_state(&reporter, "reconnecting", |s| matches!(s, SourceState::Reconnecting(_)));
    tokio::select! {
        () = away => {}
        next = consumer.next(ROOM) => panic!("{next:?} from a broker that is away"),
    }
    // Away for a while: attempts fail, `next` neither ends nor spins.
    let polls = count_polls(consumer.next(ROOM), Duration::from_secs(2)).await;
    assert!(polls < 1_000, "polled {polls} times in 2 s while the broker was away");

    f.back().await;
    f.publish(&source.messages(10..20)).await;
    log.fill(&mut *consumer, 20).await;
    log.assert_order(0..20);
    until_state(&reporter, "consuming", |s| *s == SourceState::Consuming).await;
}

async fn count_polls<T>(future: impl Future<Output = T>, during: Duration) -> usize {
    let mut polls = 0;
    let mut future = std::pin::pin!(future);
    let counted = std::future::poll_fn(|cx| {
        polls += 1;
        future.as_mut().poll(cx).map(|_| ())
    });
    assert!(timeout(during, counted).await.is_err(), "nothing can have come");
    polls
}

pub(crate) async fn C9_a_deleted_subscription_is_mended<F: Fixture>() {
    let f = F::start().await;
    let source = f.fresh_source().await;
    let (mut consumer, reporter) = source.open(f.transport(), None).await;
    let mut log = Log::default();
    f.publish(&source.messages(0..10)).await;
    log.fill(&mut *consumer, 10).await;

    let mut states = reporter.watch();
    states.mark_unchanged();
    f.break_subscription(&source).await;
    let said = within("that it is said", async {
        tokio::select! {
            changed = states.changed() => changed.unwrap(),
            next = consumer.next(ROOM) => panic!("{next:?} from a deleted subscription"),
        }
    });
    said.await;
    f.mend_subscription(&source).await;
    // What is published before the subscription is there again may be lost to it.
    let again = until_state(&reporter, "consuming", |s| *s == SourceState::Consuming);
    tokio::select! {
        () = again => {}
        next = consumer.next(ROOM) => panic!("{next:?} although nothing was published"),
    }
    f.publish(&source.messages(10..30)).await;
    log.fill(&mut *consumer, 30).await;
    log.assert_order(0..30);
}

pub(crate) async fn C10_next_is_cancel_safe<F: Fixture>() {
    let f = F::start().await;
    let source = f.fresh_source().await;
    let total = 2_000;
    let (mut consumer, _) = source.open(f.transport(), None).await;
    let mut log = Log::default();
    let publishing = async {
        for from in (0..total).step_by(100) {
            f.publish(&source.messages(from..from + 100)).await;
        }
    };
    let consuming = within("all messages", async {
        let mut patience = 0;
        while log.ids.len() < total {
            // From "dropped at its first await" to "long enough", over and over.
            patience = (patience + 37) % 3_000;
            let room = Room { messages: 50, ..ROOM };
            let next = timeout(Duration::from_micros(patience), consumer.next(room)).await;
            if let Ok(deliveries) = next {
                log.take(deliveries.expect("the consumer ended")).await;
            }
        }
    });
    tokio::join!(publishing, consuming);
    log.assert_order(0..total);
    assert_eq!(log.copies, 0, "what a dropped call had taken had to be redelivered");
}

pub(crate) async fn C11_settling_works_after_close<F: Fixture>() {
    let f = F::start().await;
    let source = f.fresh_source().await;
    f.publish(&source.messages(0..40)).await;
    let (mut consumer, reporter) = source.open(f.transport(), None).await;
    let held = hold(&mut *consumer, 10).await;
    let mut log = Log::default();
    consumer.close().await;
    assert_eq!(reporter.state(), SourceState::Stopped);
    for deliveries in held {
        log.take(deliveries).await;
    }
    let first = log.ids.len();
    drop(consumer);
    let (mut consumer, _) = source.open(f.transport(), log.mark.clone()).await;
    log.fill(&mut *consumer, 40).await;
    log.assert_order(0..40);
    log.quiet(&mut *consumer).await;
    assert_eq!(log.copies, 0, "the {first} settled after close came again");
}

pub(crate) async fn P1_ok_means_it_is_there<F: Fixture>() {
    let f = F::start().await;
    let source = f.fresh_source().await;
    let (mut consumer, _) = source.open(f.transport(), None).await;
    let publisher = f.transport().publisher().await.unwrap();
    let results = publisher.publish(source.messages(0..10)).await;
    assert_eq!(results, vec![Ok(()); 10]);
    let mut log = Log::default();
    log.fill(&mut *consumer, 10).await;
    let results = publisher.publish(vec![f.unroutable(&source)]).await;
    assert!(matches!(results[..], [Err(PublishError::Failed(_))]), "unroutable: {results:?}");
    publisher.close().await;
}

pub(crate) async fn P2_order_is_kept<F: Fixture>() {
    let f = F::start().await;
    let source = f.fresh_source().await;
    let publisher = f.transport().publisher().await.unwrap();
    for from in [0, 300, 301, 600] {
        let to = if from == 0 {
            300
        } else if from == 300 {
            301
        } else {
            from + 299
        };
        let to = if from == 600 { 900 } else { to };
        let results = publisher.publish(source.messages(from..to)).await;
        assert_eq!(results, vec![Ok(()); to - from]);
    }
    let (mut consumer, _) = source.open(f.transport(), None).await;
    let mut log = Log::default();
    log.fill(&mut *consumer, 900).await;
    log.assert_order(0..900);
}

/// Concurrent calls may be interleaved; each keeps its own order.
pub(crate) async fn P2_each_call_keeps_its_order<F: Fixture>() {
    let f = F::start().await;
    let source = f.fresh_source().await;
    let publisher: std::sync::Arc<dyn Publisher> = f.transport().publisher().await.unwrap().into();
    let mut calls = JoinSet::new();
    for call in 0..4 {
        let publisher = std::sync::Arc::clone(&publisher);
        let messages: Vec<_> = (0..200).map(|n| source.message(format!("{call}-{n}"))).collect();
        calls.spawn(async move { publisher.publish(messages).await });
    }
    while let Some(results) = calls.join_next().await {
        assert_eq!(results.unwrap(), vec![Ok(()); 200]);
    }
    let (mut consumer, _) = source.open(f.transport(), None).await;
    let mut log = Log::default();
    log.fill(&mut *consumer, 800).await;
    for call in 0..4 {
        let prefix = format!("{call}-");
        let of_call: Vec<_> = log.ids.iter().filter_map(|id| id.strip_prefix(&prefix)).collect();
        assert_eq!(of_call, ids(0..200));
    }
}

pub(crate) async fn P3_a_bad_message_fails_alone<F: Fixture>() {
    let f = F::start().await;
    let source = f.fresh_source().await;
    let publisher = f.transport().publisher().await.unwrap();
    let mut messages = Vec::new();
    let mut wanted = Vec::new();
    for bad in f.refused(&source) {
        messages.push(source.message(wanted.len()));
        wanted.push(messages[messages.len() - 1].id.clone());
        messages.push(bad);
    }
    let last = source.message("last");
    wanted.push(last.id.clone());
    messages.push(last);
    let results = publisher.publish(messages).await;
    for (n, result) in results.iter().enumerate() {
        if n % 2 == 0 {
            assert_eq!(*result, Ok(()), "the neighbour {n}");
        } else {
            assert!(matches!(result, Err(PublishError::Refused(_))), "{n}: {result:?}");
        }
    }
    let (mut consumer, _) = source.open(f.transport(), None).await;
    let mut log = Log::default();
    log.fill(&mut *consumer, wanted.len()).await;
    assert!(log.ids.iter().zip(&wanted).all(|(a, b)| **a == **b), "{:?}", log.ids);
}

pub(crate) async fn P4_a_call_costs_a_round_trip<F: Fixture>() {
    let f = F::start().await;
    let source = f.fresh_source().await;
    let publisher = f.transport().publisher().await.unwrap();
    assert_eq!(publisher.publish(vec![source.message("first")]).await, [Ok(())]);
    let one_way = Duration::from_millis(25);
    f.delay(one_way).await;
    let began = Instant::now();
    let results = publisher.publish(source.messages(0..500)).await;
    let took = began.elapsed();
    assert_eq!(results, vec![Ok(()); 500]);
    // One by one it would be 25 s.
    assert!(took < Duration::from_secs(6), "500 messages took {took:?}");
}

pub(crate) async fn P5_an_unknown_outcome_is_said<F: Fixture>() {
    let f = F::start().await;
    let source = f.fresh_source().await;
    let (mut consumer, _) = source.open(f.transport(), None).await;
    let publisher = f.transport().publisher().await.unwrap();
    let mut log = Log::default();
    let publishing = async {
        let mut confirmed = Vec::new();
        for round in 0..8 {
            let messages = source.messages(round * 250..(round + 1) * 250);
            let mut left = messages;
            while !left.is_empty() {
                let call = within("an outcome", publisher.publish(left.clone()));
                let cut = async {
                    if round % 2 == 1 {
                        sleep(Duration::from_millis(2)).await;
                        f.cut().await;
                    }
                };
                let (results, ()) = tokio::join!(call, cut);
                assert_eq!(results.len(), left.len());
                let mut again = Vec::new();
                for (message, result) in left.into_iter().zip(results) {
                    match result {
                        Ok(()) => confirmed.push(message.id.to_string()),
                        Err(PublishError::Unavailable(_)) => again.push(message),
                        Err(error) => panic!("a lost connection is no {error:?}"),
                    }
                }
                left = again;
                if !left.is_empty() {
                    // What a caller does: the same ids again, a little later.
                    sleep(Duration::from_millis(100)).await;
                    let results = within("an outcome", publisher.publish(left.clone())).await;
                    left = left
                        .into_iter()
                        .zip(results)
                        .filter_map(|(m, r)| match r {
                            Ok(()) => {
                                confirmed.push(m.id.to_string());
                                None
                            }
                            Err(_) => Some(m),
                        })
                        .collect();
                }
            }
        }
        confirmed
    };
    let confirmed = within("that all is confirmed", publishing).await;
    log.fill(&mut *consumer, 2_000).await;
    let arrived: HashSet<_> = log.ids.iter().collect();
    let missing: Vec<_> = confirmed.iter().filter(|id| !arrived.contains(id)).collect();
    assert!(missing.is_empty(), "confirmed and not there: {missing:?}");
}

pub(crate) async fn P6_away_is_said_in_time<F: Fixture>() {
    let f = F::start().await;
    let source = f.fresh_source().await;
    let (mut consumer, _) = source.open(f.transport(), None).await;
    let publisher = f.transport().publisher().await.unwrap();
    assert_eq!(publisher.publish(source.messages(0..5)).await, vec![Ok(()); 5]);
    f.away().await;
    let began = Instant::now();
    let results = within("an answer", publisher.publish(source.messages(5..10))).await;
    let took = began.elapsed();
    assert!(took < Duration::from_secs(20), "said after {took:?}");
    assert!(
        results.iter().all(|r| matches!(r, Err(PublishError::Unavailable(_)))),
        "{results:?} from a broker that is away"
    );
    f.back().await;
    let mut left = source.messages(5..10);
    within("that publishing works again", async {
        while !left.is_empty() {
            let results = publisher.publish(left.clone()).await;
            left =
                left.into_iter().zip(results).filter(|(_, r)| r.is_err()).map(|(m, _)| m).collect();
            sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    let mut log = Log::default();
    log.fill(&mut *consumer, 10).await;
    log.assert_order(0..10);
    publisher.close().await;
}

/// One test for each clause, against one implementation.
#[macro_export]
macro_rules! transport_conformance {
    ($fixture:ty) => {
        $crate::transport_conformance!(
            $fixture;
            C1_everything_is_delivered,
            C2_bytes_and_headers_are_kept,
            C3_order_survives_a_crash,
            C3_order_survives_crashes_after_the_commit,
            C3_order_survives_lost_connections,
            C4_the_unsettled_come_again,
            C5_the_acked_do_not_come_again,
            C6_retry_waits_and_reject_ends,
            C7_no_room_asks_for_nothing_new,
            C7_room_is_kept,
            C8_kept_alive_is_kept,
            C9_it_comes_back_when_the_broker_does,
            C9_a_deleted_subscription_is_mended,
            C10_next_is_cancel_safe,
            C11_settling_works_after_close,
            P1_ok_means_it_is_there,
            P2_order_is_kept,
            P2_each_call_keeps_its_order,
            P3_a_bad_message_fails_alone,
            P4_a_call_costs_a_round_trip,
            P5_an_unknown_outcome_is_said,
            P6_away_is_said_in_time,
        );
    };
    ($fixture:ty; $($clause:ident),* $(,)?) => {
        $(
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $clause() {
                $crate::conformance::transport::$clause::<$fixture>().await;
            }
        )*
    };
}
