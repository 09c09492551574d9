//! The contract of `EventStore`: a function for each clause, named after it. Clauses are those
//! of `src/store/mod.rs`.

use std::{
    collections::{BTreeSet, HashMap},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    task::Poll,
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use pulsebus::{
    event::{
        Event, EventParts, Format, HeaderValue, Headers, Message, Origin, Position, Quarantined,
        StoredEvent,
    },
    store::{Batch, Entry, EventStore, Limit, QuarantineEntry, Query, StoreError},
    transport::{Mark, Receipt},
};
use time::macros::datetime;
use tokio::task::JoinSet;

pub use crate::support::random::Random;

/// A log, and the ways to get at it that are not part of the contract.
#[async_trait]
pub trait Fixture: Send + Sync {
    /// A handle on this fixture's log: the first, or another one.
    async fn open(&self) -> Arc<dyn EventStore>;

    /// An event that the database refuses; each time another one.
    async fn refusable(&self) -> Event;

    /// Makes the database refuse rows of `unfinished` whose key is `refused`; `false` where that
    /// is not possible.
    async fn refuse_rows(&self) -> bool {
        false
    }

    /// Whether several processes may use the database at once, so that a claim lasts for a time.
    fn leases(&self) -> bool {
        false
    }

    /// Kills the database and brings it back; `false` where that is not possible.
    async fn crash(&self) -> bool {
        false
    }

    /// Whether the log outlives its handles.
    fn durable(&self) -> bool {
        true
    }
}

pub fn parts(id: &str) -> EventParts {
    EventParts {
        id: id.into(),
        source: "/tests".into(),
        kind: "LessonPublished".into(),
        subject: None,
        time: None,
        key: format!("key of {id}").into(),
        format: Format::Raw,
        headers: Headers::new(),
        origin: Origin { source: "tests".into(), transport: "memory".into(), ..Origin::default() },
        body: Bytes::from(format!("{{\"id\":\"{id}\"}}")),
    }
}

pub fn event(id: &str) -> Event {
    Event::from_parts(parts(id))
}

fn with_body(id: &str, body: &str) -> Event {
    Event::from_parts(EventParts { body: Bytes::from(body.to_owned()), ..parts(id) })
}

fn of_type(id: &str, kind: &str) -> Event {
    Event::from_parts(EventParts { kind: kind.into(), ..parts(id) })
}

pub fn bad(body: &[u8], reason: &str) -> Entry {
    Entry::Quarantine(Quarantined {
        message: Message {
            body: Bytes::copy_from_slice(body),
            headers: Headers::new(),
            origin: Origin { source: "tests".into(), ..Origin::default() },
        },
        reason: reason.to_owned(),
    })
}

pub fn batch(events: impl IntoIterator<Item = Event>) -> Batch {
    Batch::new(events.into_iter().map(Entry::Event).collect())
}

pub fn mark(incarnation: &str, sequence: u64) -> Mark {
    Mark { incarnation: incarnation.into(), sequence }
}

pub const EVERYTHING: Limit = Limit { events: usize::MAX >> 1, bytes: usize::MAX >> 1 };

/// The whole log; checks G3 on the way.
pub async fn log(store: &dyn EventStore) -> Vec<Arc<StoredEvent>> {
    let mut all: Vec<Arc<StoredEvent>> = Vec::new();
    loop {
        let after = Position(all.len() as u64);
        let page = store.read(after, Limit::default()).await.expect("a read");
        if page.is_empty() {
            return all;
        }
        for event in page {
            assert_eq!(event.position.0, all.len() as u64 + 1, "S2: a gap");
            all.push(event);
        }
    }
}

async fn ids(store: &dyn EventStore) -> Vec<String> {
    log(store).await.iter().map(|event| event.id().to_owned()).collect()
}

fn stored(position: u64) -> Receipt {
    Receipt::Stored(Position(position))
}

fn duplicate(position: u64) -> Receipt {
    Receipt::Duplicate(Position(position))
}

/// The bytes of a quarantine entry, which is the same by itself as in a list.
async fn body_of(store: &dyn EventStore, listed: &QuarantineEntry) -> Bytes {
    let (entry, body) = store.quarantine_entry(listed.number).await.unwrap().expect("an entry");
    assert_eq!(entry, *listed);
    body
}

#[track_caller]
fn quarantined(receipt: &Receipt) -> (u64, &str) {
    match receipt {
        Receipt::Quarantined { number, reason } => (*number, reason),
        other => panic!("not in quarantine: {other:?}"),
    }
}

/// Drops a future that is not ready after so many wake-ups: at any of its awaits.
pub async fn give_up_after<T>(wakes: u64, future: impl Future<Output = T>) -> Option<T> {
    let mut future = std::pin::pin!(future);
    let mut polls = 0;
    std::future::poll_fn(|context| match future.as_mut().poll(context) {
        Poll::Ready(done) => Poll::Ready(Some(done)),
        Poll::Pending if polls == wakes => Poll::Ready(None),
        Poll::Pending => {
            polls += 1;
            Poll::Pending
        }
    })
    .await
}

/// Appends until it works: what a caller does with `Unavailable`.
pub async fn append_patiently(store: &dyn EventStore, batch: &Batch) -> Vec<Receipt> {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(60);
    loop {
        match store.append(batch).await {
            Ok(receipts) => return receipts,
            Err(StoreError::Unavailable(reason)) => {
                assert!(tokio::time::Instant::now() < deadline, "never available: {reason}");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            Err(error) => panic!("{error}"),
        }
    }
}

pub async fn S1_an_append_is_there_as_a_whole(fixture: &dyn Fixture) {
    let store = fixture.open().await;
    let mut first = Batch::new(vec![
        Entry::Event(event("a")),
        bad(b"\xff\0no JSON", "not UTF-8"),
        Entry::Event(event("b")),
    ]);
    first.marks = vec![("s".into(), mark("one", 7))];
    let receipts = store.append(&first).await.expect("an append");
    assert_eq!(receipts[0], stored(1));
    assert_eq!(quarantined(&receipts[1]).1, "not UTF-8");
    assert_eq!(receipts[2], stored(2));

    for store in [store.clone(), fixture.open().await] {
        assert_eq!(ids(&*store).await, ["a", "b"]);
        assert_eq!(store.head().await.unwrap(), Position(2));
        assert_eq!(store.mark("s").await.unwrap(), Some(mark("one", 7)));
        let held = store.quarantine(0, 10).await.unwrap();
        assert_eq!(held.len(), 1);
        assert_eq!(&body_of(&*store, &held[0]).await[..], b"\xff\0no JSON");
        assert_eq!(held[0].received_at, first.recorded_at);
        assert_eq!(held[0].number, quarantined(&receipts[1]).0);
        assert_eq!(store.quarantine_len().await.unwrap(), 1);
    }

    // Nothing at all, and marks alone.
    assert_eq!(store.append(&Batch::new(Vec::new())).await.unwrap(), []);
    let mut marks = Batch::new(Vec::new());
    marks.marks = vec![("s".into(), mark("one", 8)), ("t".into(), mark("x", 1))];
    assert_eq!(store.append(&marks).await.unwrap(), []);
    assert_eq!(store.mark("s").await.unwrap(), Some(mark("one", 8)));
    assert_eq!(store.mark("t").await.unwrap(), Some(mark("x", 1)));
    assert_eq!(store.head().await.unwrap(), Position(2));
}

/// What one writer appended, and what it was told.
type Ledger = Vec<(Batch, Vec<Receipt>)>;

const WRITERS: u64 = 4;
const BATCHES: u64 = 40;
/// Events that every writer appends, so that writers meet copies of each other's.
const COMMON: u64 = 300;

/// Several writers, each with its own handle, appending new events, copies of each other's,
/// copies within a batch, events the database refuses, messages that are no events; and giving
/// up appends half way. Readers look on.
async fn storm(fixture: &dyn Fixture) -> (Ledger, Arc<dyn EventStore>) {
    let over = Arc::new(AtomicBool::new(false));
    let mut readers = JoinSet::new();
    for way in 0..3 {
        let (store, over) = (fixture.open().await, over.clone());
        readers.spawn(async move {
            let mut last = Position::START;
            let mut looks = 0_u64;
            loop {
                let ended = over.load(Relaxed);
                if way == 0 {
                    // From where it is, as a handler reads.
                    let limit = Limit { events: 37, bytes: 1 << 20 };
                    for event in store.read(last, limit).await.expect("a read") {
                        assert_eq!(event.position, last.next(), "S3: not contiguous");
                        last = event.position;
                    }
                } else {
                    // The end of the log at one moment: n is there, so is n-1.
                    let query = Query { descending: true, limit: 50, ..Query::default() };
                    let page = store.list(&query).await.expect("a list");
                    let positions: Vec<u64> = page.iter().map(|e| e.position.0).collect();
                    assert!(positions.windows(2).all(|w| w[0] == w[1] + 1), "S3: {positions:?}");
                    let end = positions.first().copied().unwrap_or(0);
                    assert!(end >= last.0, "the log went back from {last} to {end}");
                    assert!(end < 50 || positions.len() == 50, "S3: the list ends early");
                    // And what a list has shown, a read has too.
                    if end > 0 {
                        let limit = Limit { events: 1, bytes: 1 };
                        let read = store.read(Position(end - 1), limit).await.expect("a read");
                        assert_eq!(read.len(), 1, "S3: {end} was there and is not");
                    }
                    last = Position(end);
                }
                looks += 1;
                // The store in memory never waits by itself.
                tokio::task::yield_now().await;
                if ended && store.head().await.expect("the head") == last {
                    return looks;
                }
            }
        });
    }

    let mut writers = JoinSet::new();
    for writer in 0..WRITERS {
        let store = fixture.open().await;
        let mut refusable = Vec::new();
        for _ in 0..BATCHES / 10 {
            refusable.push(fixture.refusable().await);
        }
        writers.spawn(async move {
            let mut random = Random(writer);
            let mut ledger = Ledger::new();
            for nth in 0..BATCHES {
                let mut entries = Vec::new();
                for k in 0..1 + random.below(60) {
                    entries.push(match random.below(20) {
                        0 => bad(format!("{writer} {nth} {k}").as_bytes(), "no JSON"),
                        1..=4 => Entry::Event(event(&format!("common {}", random.below(COMMON)))),
                        _ => Entry::Event(event(&format!("{writer} {nth} {k}"))),
                    });
                }
                if nth % 10 == 5 {
                    let at = random.below(entries.len() as u64) as usize;
                    entries.insert(at, Entry::Event(refusable.pop().expect("enough of them")));
                }
                let batch = Batch::new(entries);
                // Given up, whether it happened nobody knows (S10).
                let wakes = if nth % 7 == 3 { random.below(8) } else { u64::MAX };
                let receipts = match give_up_after(wakes, store.append(&batch)).await {
                    Some(Ok(receipts)) => receipts,
                    Some(Err(StoreError::Unavailable(_))) | None => {
                        append_patiently(&*store, &batch).await
                    }
                    Some(Err(error)) => panic!("{error}"),
                };
                ledger.push((batch, receipts));
            }
            ledger
        });
    }
    let mut ledger = Ledger::new();
    while let Some(of_one) = writers.join_next().await {
        ledger.extend(of_one.expect("a writer"));
    }
    over.store(true, Relaxed);
    let looked = tokio::time::timeout(Duration::from_secs(60), readers.join_all()).await;
    for looks in looked.expect("the readers reach the head") {
        assert!(looks > 1, "the readers saw nothing of it");
    }
    (ledger, fixture.open().await)
}

pub async fn S2_S3_positions_are_gapless_and_seen_in_order(fixture: &dyn Fixture) {
    let (ledger, store) = storm(fixture).await;
    let log = log(&*store).await;
    let head = store.head().await.unwrap();
    assert_eq!(head.0, log.len() as u64);
    assert!(log.len() > 2000, "only {} events", log.len());

    let mut told = BTreeSet::new();
    let mut held = 0;
    for (batch, receipts) in &ledger {
        assert_eq!(batch.entries.len(), receipts.len());
        let mut last = 0;
        for (entry, receipt) in batch.entries.iter().zip(receipts) {
            let at = match receipt {
                Receipt::Stored(position) => {
                    assert!(position.0 > last, "S2: not in the order of the batch");
                    assert!(told.insert(position.0), "S2: {position} was given twice");
                    last = position.0;
                    *position
                }
                Receipt::Duplicate(position) => *position,
                Receipt::Quarantined { .. } => {
                    held += 1;
                    continue;
                }
            };
            let Entry::Event(event) = entry else { panic!("no event was stored as one") };
            assert_eq!(log[at.0 as usize - 1].id(), event.id(), "S4: another event is there");
        }
    }
    let distinct: BTreeSet<_> = log.iter().map(|event| event.id()).collect();
    assert_eq!(distinct.len(), log.len(), "S4: stored twice");
    // Every event of every batch is there, and nothing else.
    let expected: BTreeSet<_> = ledger
        .iter()
        .flat_map(|(batch, receipts)| batch.entries.iter().zip(receipts))
        .filter(|(_, receipt)| !matches!(receipt, Receipt::Quarantined { .. }))
        .map(|(entry, _)| match entry {
            Entry::Event(event) => event.id(),
            Entry::Quarantine(_) => panic!("checked above"),
        })
        .collect();
    assert_eq!(distinct, expected);
    assert_eq!(store.quarantine_len().await.unwrap(), held, "S10: quarantined once");
}

pub async fn S4_a_copy_is_stored_once(fixture: &dyn Fixture) {
    let store = fixture.open().await;
    let receipts = store.append(&batch(["a", "b", "a", "c", "b"].map(event))).await.unwrap();
    assert_eq!(receipts, [stored(1), stored(2), duplicate(1), stored(3), duplicate(2)]);
    let receipts = store.append(&batch(["c", "d", "d", "a"].map(event))).await.unwrap();
    assert_eq!(receipts, [duplicate(3), stored(4), duplicate(4), duplicate(1)]);
    // Through another handle, and in another form: the data is the same.
    let other = fixture.open().await;
    let copy = Event::from_parts(EventParts {
        format: Format::Native,
        body: Bytes::from_static(
            b"{ \"type\":\"LessonPublished\", \"data\" : {\"id\" : \"\\u0061\"} }",
        ),
        key: "another".into(),
        ..parts("a")
    });
    let elsewhere = Event::from_parts(EventParts { source: "/other".into(), ..parts("a") });
    let receipts = other.append(&batch([copy, elsewhere])).await.unwrap();
    assert_eq!(receipts, [duplicate(1), stored(5)]);
    assert_eq!(ids(&*store).await, ["a", "b", "c", "d", "a"]);
    assert_eq!(store.quarantine_len().await.unwrap(), 0);
}

pub async fn S5_a_conflict_is_quarantined(fixture: &dyn Fixture) {
    let store = fixture.open().await;
    store.append(&batch([event("a")])).await.unwrap();
    let receipts = store
        .append(&batch([
            event("b"),
            with_body("a", "{\"id\":\"other\"}"),
            of_type("a", "LessonRemoved"),
            of_type("b", "LessonRemoved"),
            event("c"),
            event("a"),
        ]))
        .await
        .unwrap();
    assert_eq!(receipts[0], stored(2));
    assert_eq!(
        quarantined(&receipts[1]).1,
        "conflicts with the event at position 1: same source and id, other data"
    );
    assert_eq!(
        quarantined(&receipts[2]).1,
        "conflicts with the event at position 1: same source and id, other type"
    );
    assert_eq!(
        quarantined(&receipts[3]).1,
        "conflicts with the event at position 2: same source and id, other type"
    );
    assert_eq!(receipts[4..], [stored(3), duplicate(1)]);
    let log = log(&*store).await;
    assert_eq!(log.len(), 3);
    assert_eq!(log[0].body(), event("a").body());
    assert_eq!(log[0].kind(), "LessonPublished");
    let held = store.quarantine(0, 10).await.unwrap();
    assert_eq!(&body_of(&*store, &held[0]).await[..], b"{\"id\":\"other\"}");
    for (held, receipt) in held.iter().zip(&receipts[1..4]) {
        assert_eq!((held.number, &*held.reason), quarantined(receipt));
    }
}

/// Random batches from few identities, against a model that is a map.
pub async fn S4_S5_any_sequence_of_batches(fixture: &dyn Fixture) {
    let store = fixture.open().await;
    let mut model: HashMap<(String, String), (u64, usize)> = HashMap::new();
    let bodies = ["{\"n\":1}", "{\"n\":2}", "{\"n\":1.0,\"n\":1}"];
    let spaced = [" { \"n\" : 1e0 } ", "{\"n\":2.00}", "{\"n\":1 , \"n\":10e-1}"];
    let mut random = Random(4);
    let mut conflicts = 0;
    for _ in 0..60 {
        let mut events = Vec::new();
        let mut expected = Vec::new();
        for _ in 0..random.below(12) {
            let (source, id) = (format!("/{}", random.below(2)), random.below(40).to_string());
            let variant = if random.below(4) == 0 { 1 + random.below(2) as usize } else { 0 };
            let body = if random.below(3) == 0 { spaced[variant] } else { bodies[variant] };
            events.push(Event::from_parts(EventParts {
                source: source.as_str().into(),
                body: Bytes::from_static(body.as_bytes()),
                ..parts(&id)
            }));
            let next = model.len() as u64 + 1;
            expected.push(match model.get(&(source.clone(), id.clone())) {
                None => {
                    model.insert((source, id), (next, variant));
                    Some(stored(next))
                }
                Some((position, first)) if *first == variant => Some(duplicate(*position)),
                Some(_) => None,
            });
        }
        let receipts = store.append(&batch(events)).await.unwrap();
        assert_eq!(receipts.len(), expected.len());
        for (receipt, expected) in receipts.iter().zip(expected) {
            match expected {
                Some(expected) => assert_eq!(*receipt, expected),
                None => {
                    conflicts += 1;
                    assert!(quarantined(receipt).1.contains("conflicts with the event at"));
                }
            }
        }
    }
    assert!(conflicts > 0);
    assert_eq!(log(&*store).await.len(), model.len());
    assert_eq!(store.quarantine_len().await.unwrap(), conflicts);
}

pub async fn S6_what_the_database_refuses_is_quarantined(fixture: &dyn Fixture) {
    let store = fixture.open().await;
    let refused = fixture.refusable().await;
    let mut first = batch([event("a"), refused.clone(), event("b")]);
    first.marks = vec![("s".into(), mark("one", 3))];
    let receipts = store.append(&first).await.unwrap();
    assert_eq!((&receipts[0], &receipts[2]), (&stored(1), &stored(2)));
    let reason = quarantined(&receipts[1]).1;
    assert!(reason.starts_with("refused by the store: "), "{reason}");
    assert!(reason.len() > "refused by the store: ".len() + 5, "whose reason? {reason}");
    let held = store.quarantine(0, 10).await.unwrap();
    assert_eq!(held.len(), 1);
    assert_eq!((held[0].number, &*held[0].reason), quarantined(&receipts[1]));
    assert_eq!(&body_of(&*store, &held[0]).await, refused.body());
    assert_eq!(&held[0].origin, refused.origin());
    assert_eq!(store.mark("s").await.unwrap(), Some(mark("one", 3)));

    // Alone, several, at both ends, beside copies and what is no event.
    let receipts = store.append(&batch([fixture.refusable().await])).await.unwrap();
    quarantined(&receipts[0]);
    let mut entries = vec![Entry::Event(fixture.refusable().await)];
    entries.extend((0..100).map(|n| Entry::Event(event(&format!("n{n}")))));
    entries.insert(50, Entry::Event(fixture.refusable().await));
    entries.insert(51, bad(b"x", "no JSON"));
    entries.insert(52, Entry::Event(event("a")));
    entries.push(Entry::Event(fixture.refusable().await));
    let receipts = store.append(&Batch::new(entries)).await.unwrap();
    assert_eq!(receipts.len(), 105);
    let mut next = 3;
    for (index, receipt) in receipts.iter().enumerate() {
        match index {
            0 | 50 | 51 | 104 => {
                quarantined(receipt);
            }
            52 => assert_eq!(*receipt, duplicate(1)),
            _ => {
                assert_eq!(*receipt, stored(next));
                next += 1;
            }
        }
    }
    assert_eq!(store.head().await.unwrap(), Position(102));
    assert_eq!(store.quarantine_len().await.unwrap(), 6);
}

/// Events with everything in them that is odd and valid.
fn odd_events() -> Vec<Event> {
    let mut table = Headers::new();
    table.push("deep", HeaderValue::Array(vec!["x".into(), HeaderValue::Void]));
    let mut headers = Headers::new();
    headers.push(":priority", HeaderValue::Uint8(3));
    headers.push("Nats-Msg-Id", "ü \"quoted\" \\ 😀 \u{1}");
    headers.push("a\0b", "c\0d");
    headers.push("n", HeaderValue::Float64(f64::NAN.to_bits()));
    headers.push("big", HeaderValue::Int64(i64::MIN));
    headers.push("bytes", HeaderValue::Bytes(vec![0, 255, 7]));
    headers.push("t", HeaderValue::Table(table));
    let full = Event::from_parts(EventParts {
        id: "ïd '\"\\; DROP TABLE events;--".into(),
        source: "/ünï/😀".into(),
        kind: "com.example.テスト".into(),
        subject: Some("sub\nject\t\u{7f}\u{2028}".into()),
        time: Some(datetime!(1969-07-20 20:17:40.123456 UTC)),
        key: "".into(),
        format: Format::CloudeventsBinary,
        headers,
        origin: Origin {
            source: "s".into(),
            transport: "amqp".into(),
            subject: "rk.\"a\"".into(),
            channel: Some("q".into()),
            exchange: Some("".into()),
            sequence: Some(u64::MAX >> 1),
        },
        body: Bytes::from_static(b"null"),
    });
    let deep = "[".repeat(128) + &"]".repeat(128);
    let large = format!("\"{}\"", "0123456789abcdef\\u0000\u{e9}".repeat(40_000));
    let mut all = vec![full];
    for (n, body) in [
        " \r\n\t{ \"a\" :\t1 , \"a\":2 }\n ",
        "\"\\u0000 \\ud83d\\ude00 \\/ \\u00e9 é\"",
        "1e400",
        "-0.0",
        "123456789012345678901234567890.12345678901234567890",
        "\"\\ud800\"",
        "{\"\":{\"\\u0000\":[]}}",
        "\"{position}\"",
        &deep,
        &large,
    ]
    .into_iter()
    .enumerate()
    {
        all.push(Event::from_parts(EventParts {
            body: Bytes::from(body.to_owned()),
            subject: Some("".into()),
            time: Some(datetime!(9999-12-31 23:59:59.999999 UTC)),
            ..parts(&format!("odd {n}"))
        }));
    }
    all
}

#[track_caller]
fn assert_same(a: &Event, b: &Event) {
    assert_eq!(a.id(), b.id());
    assert_eq!(a.source(), b.source());
    assert_eq!(a.kind(), b.kind());
    assert_eq!(a.subject(), b.subject());
    assert_eq!(a.time(), b.time());
    assert_eq!(a.key(), b.key());
    assert_eq!(a.format(), b.format());
    assert_eq!(a.headers(), b.headers());
    assert_eq!(a.origin(), b.origin());
    assert_eq!(a.body(), b.body());
}

pub async fn S7_everything_comes_back_as_it_went_in(fixture: &dyn Fixture) {
    let store = fixture.open().await;
    let events = odd_events();
    let sent = batch(events.clone());
    let receipts = store.append(&sent).await.unwrap();
    assert!(receipts.iter().all(|r| matches!(r, Receipt::Stored(_))), "{receipts:?}");
    // Again: each is known as a copy of itself.
    let again = store.append(&sent).await.unwrap();
    assert!(again.iter().all(|r| matches!(r, Receipt::Duplicate(_))), "{again:?}");
    for store in [store.clone(), fixture.open().await] {
        let read = store.read(Position::START, EVERYTHING).await.unwrap();
        let listed = store.list(&Query { limit: 1000, ..Query::default() }).await.unwrap();
        assert_eq!((read.len(), listed.len()), (events.len(), events.len()));
        for ((event, read), listed) in events.iter().zip(&read).zip(&listed) {
            assert_same(event, read);
            assert_same(event, listed);
            assert_eq!(read.recorded_at, sent.recorded_at);
            assert_eq!(read.recorded_at.offset(), time::UtcOffset::UTC);
            let found = store.find(event.source(), event.id()).await.unwrap().expect("found");
            assert_same(event, &found);
        }
    }
    assert!(store.find("/tests", "nobody").await.unwrap().is_none());

    // Quarantine keeps what came as well, whatever the bytes and however deep the headers.
    let mut deep = HeaderValue::Void;
    for _ in 0..500 {
        deep = HeaderValue::Array(vec![deep]);
    }
    let mut too_deep = Headers::new();
    too_deep.push("deep", deep);
    let message = Message {
        body: Bytes::from_iter(0..=255),
        headers: events[0].headers().clone(),
        origin: events[0].origin().clone(),
    };
    let held = |message: &Message, reason: &str| {
        Entry::Quarantine(Quarantined { message: message.clone(), reason: reason.to_owned() })
    };
    let deep_message = Message { headers: too_deep, ..message.clone() };
    let receipts = store
        .append(&Batch::new(vec![held(&message, "é \"why\""), held(&deep_message, "deep")]))
        .await
        .unwrap();
    let (first, _) = quarantined(&receipts[0]);
    let back = store.quarantine(first - 1, 2).await.unwrap();
    assert_eq!(back[0].reason, "é \"why\"");
    assert_eq!(back[0].headers, message.headers);
    assert_eq!(back[0].origin, message.origin);
    assert_eq!(back[0].size, message.body.len() as u64);
    assert!(back[1].reason.starts_with("deep"));
    assert_eq!(body_of(&*store, &back[0]).await, message.body);
    assert_eq!(body_of(&*store, &back[1]).await, message.body);
    assert_eq!(store.quarantine_entry(back[1].number + 1).await.unwrap(), None);
    assert_eq!(store.quarantine(back[1].number, 9).await.unwrap(), []);
}

pub async fn S8_marks_only_move_forward(fixture: &dyn Fixture) {
    let store = fixture.open().await;
    assert_eq!(store.mark("s").await.unwrap(), None);
    for (given, expected) in [
        (vec![mark("one", 5)], mark("one", 5)),
        (vec![mark("one", 3)], mark("one", 5)),
        (vec![mark("one", 9), mark("one", 7)], mark("one", 9)),
        (vec![mark("two", 1)], mark("two", 1)),
        (vec![mark("two", 4), mark("three", 2), mark("three", 1)], mark("three", 2)),
    ] {
        let mut batch = Batch::new(Vec::new());
        batch.marks = given.into_iter().map(|mark| ("s".into(), mark)).collect();
        store.append(&batch).await.unwrap();
        assert_eq!(store.mark("s").await.unwrap(), Some(expected));
    }
    assert_eq!(store.mark("t").await.unwrap(), None);
}

pub async fn S9_events_are_found_by_position(fixture: &dyn Fixture) {
    let store = fixture.open().await;
    let body = |size: usize| format!("\"{}\"", "x".repeat(size - 2));
    let sizes = [100, 100, 1000, 100, 100, 100];
    let events = sizes.iter().enumerate().map(|(n, size)| with_body(&n.to_string(), &body(*size)));
    let events: Vec<_> = events.collect();
    store.append(&batch(events.clone())).await.unwrap();
    let all = usize::MAX >> 1;
    for (wanted, bytes, expected) in [
        (vec![], all, vec![]),
        (vec![4], all, vec![4]),
        (vec![1, 3, 6], all, vec![1, 3, 6]),
        (vec![1, 2, 3, 4, 5, 6], all, vec![1, 2, 3, 4, 5, 6]),
        // What is not there is left out.
        (vec![0, 2, 7, u64::MAX], all, vec![2]),
        (vec![7, 8], all, vec![]),
        // The first is always given, and none behind one that does not fit.
        (vec![3, 4], 1, vec![3]),
        (vec![3, 4], 1099, vec![3]),
        (vec![3, 4], 1100, vec![3, 4]),
        (vec![1, 3, 4], 200, vec![1]),
        (vec![1, 2, 4, 6], 299, vec![1, 2]),
        (vec![1, 2, 4, 6], 300, vec![1, 2, 4]),
        (vec![0, 3, 5], 0, vec![3]),
    ] {
        let positions: Vec<_> = wanted.iter().copied().map(Position).collect();
        let found = store.get(&positions, bytes).await.unwrap();
        let there: Vec<_> = found.iter().map(|event| event.position.0).collect();
        assert_eq!(there, expected, "{wanted:?}, {bytes} bytes");
        for event in &found {
            assert_same(&event.event, &events[event.position.0 as usize - 1]);
        }
    }
}

/// Batches of `SIZE` events and one quarantine entry, with a mark: each is there whole or not
/// at all.
pub const SIZE: u64 = 20;

pub fn whole(run: &str, nth: u64) -> Batch {
    let mut entries: Vec<_> =
        (0..SIZE).map(|k| Entry::Event(event(&format!("{run} {nth} {k}")))).collect();
    entries.insert(3, bad(format!("{run} {nth}").as_bytes(), "no JSON"));
    let mut batch = Batch::new(entries);
    batch.marks = vec![(run.into(), mark("i", nth))];
    batch
}

/// Audits batches of [`whole`] up to this number: each once, in order.
pub async fn audit_whole(store: &dyn EventStore, run: &str, batches: u64) {
    let ids = ids(store).await;
    let expected: Vec<_> = (1..=batches).flat_map(|n| (0..SIZE).map(move |k| (n, k))).collect();
    assert_eq!(ids.len(), expected.len());
    for (id, (n, k)) in ids.iter().zip(expected) {
        assert_eq!(*id, format!("{run} {n} {k}"));
    }
    assert_eq!(store.mark(run).await.unwrap().map(|m| m.sequence), Some(batches));
    let held = store.quarantine(0, usize::MAX >> 1).await.unwrap();
    let mut bodies = Vec::new();
    for entry in &held {
        bodies.push(body_of(store, entry).await);
    }
    let expected: Vec<_> = (1..=batches).map(|n| Bytes::from(format!("{run} {n}"))).collect();
    assert_eq!(bodies, expected, "S10: each quarantine entry once");
}

pub async fn S10_an_unknown_outcome_is_appended_again(fixture: &dyn Fixture) {
    let store = fixture.open().await;
    let mut random = Random(10);
    let mut given_up = 0;
    let mut batches = 0;
    // The reference never waits, so it cannot be caught in between. How often the others are
    // depends on the machine: it goes on until that has happened often enough.
    while batches < 150 || (given_up < 20 && store.kind() != "memory") {
        batches += 1;
        assert!(batches < 5_000, "{given_up} appends given up");
        let batch = whole("run", batches);
        if random.below(3) > 0 {
            if let Some(appended) = give_up_after(random.below(8), store.append(&batch)).await {
                appended.expect("an append");
                continue;
            }
            given_up += 1;
        }
        append_patiently(&*store, &batch).await;
    }
    audit_whole(&*store, "run", batches).await;
}

pub async fn S10_S11_a_crash_amid_appends(fixture: &dyn Fixture) {
    let store = fixture.open().await;
    let stop = Arc::new(AtomicBool::new(false));
    let mut writer = JoinSet::new();
    {
        let (store, stop) = (store.clone(), stop.clone());
        writer.spawn(async move {
            let mut nth = 0;
            while !stop.load(Relaxed) {
                nth += 1;
                append_patiently(&*store, &whole("run", nth)).await;
            }
            nth
        });
    }
    let mut heads = vec![store.head().await.unwrap()];
    for _ in 0..4 {
        // Not before appends go on after the last crash.
        let seen = heads[heads.len() - 1];
        let deadline = tokio::time::Instant::now() + Duration::from_secs(60);
        loop {
            match store.head().await {
                Ok(head) if head.0 >= seen.0 + 10 * SIZE => break heads.push(head),
                Ok(_) | Err(StoreError::Unavailable(_)) => {}
                Err(error) => panic!("{error}"),
            }
            assert!(tokio::time::Instant::now() < deadline, "appends do not go on");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert!(fixture.crash().await, "this fixture can crash");
    }
    stop.store(true, Relaxed);
    let batches = writer.join_next().await.expect("a writer").expect("its end");
    audit_whole(&*fixture.open().await, "run", batches).await;
}

pub async fn S11_what_was_committed_is_there_after_reopening(fixture: &dyn Fixture) {
    assert!(fixture.durable());
    for nth in 1..=3 {
        let store = fixture.open().await;
        store.append(&whole("run", nth)).await.unwrap();
        if nth < 3 {
            store.close().await;
        }
        // The third is dropped without a goodbye.
    }
    let store = fixture.open().await;
    audit_whole(&*store, "run", 3).await;
    let receipts = store.append(&batch([event("after")])).await.unwrap();
    assert_eq!(receipts, [stored(3 * SIZE + 1)]);
}

/// Not a clause of its own: what the doc comments of `read`, `list` and `quarantine` say.
pub async fn reads_keep_their_limits(fixture: &dyn Fixture) {
    let store = fixture.open().await;
    assert_eq!(store.head().await.unwrap(), Position::START);
    assert!(store.read(Position::START, Limit::default()).await.unwrap().is_empty());
    let body = |size: usize| format!("\"{}\"", "x".repeat(size - 2));
    let events = [100, 100, 1000, 100, 100].iter().enumerate();
    let events = events.map(|(n, size)| with_body(&n.to_string(), &body(*size)));
    store.append(&batch(events)).await.unwrap();
    for (after, events, bytes, expected) in [
        (0, 10, 1 << 20, vec![1, 2, 3, 4, 5]),
        (0, 2, 1 << 20, vec![1, 2]),
        (3, 10, 1 << 20, vec![4, 5]),
        (5, 10, 1 << 20, vec![]),
        (9, 10, 1 << 20, vec![]),
        (u64::MAX, 10, 1 << 20, vec![]),
        (0, 10, 200, vec![1, 2]),
        (0, 10, 199, vec![1]),
        (0, 10, 1, vec![1]),
        (2, 10, 1, vec![3]),
        (2, 10, 1100, vec![3, 4]),
    ] {
        let read = store.read(Position(after), Limit { events, bytes }).await.unwrap();
        let read: Vec<_> = read.iter().map(|event| event.position.0).collect();
        assert_eq!(read, expected, "after {after}, {events} events, {bytes} bytes");
        if after != u64::MAX {
            let query = Query { after: Position(after), limit: events, bytes, ..Query::default() };
            let listed = store.list(&query).await.unwrap();
            let listed: Vec<_> = listed.iter().map(|event| event.position.0).collect();
            assert_eq!(listed, expected, "{query:?}");
        }
    }
    for (bytes, expected) in [(200, vec![5, 4]), (199, vec![5]), (1200, vec![5, 4, 3])] {
        let kind = Some(with_body("0", "1").kind().to_owned());
        for kind in [None, kind] {
            let query = Query { kind, descending: true, bytes, ..Query::default() };
            let listed = store.list(&query).await.unwrap();
            let listed: Vec<_> = listed.iter().map(|event| event.position.0).collect();
            assert_eq!(listed, expected, "{query:?}");
        }
    }
}

pub async fn lists_find_by_type_and_key_in_either_direction(fixture: &dyn Fixture) {
    let store = fixture.open().await;
    let events = (1..=9).map(|n| {
        Event::from_parts(EventParts {
            kind: if n % 3 == 0 { "Three" } else { "Other" }.into(),
            key: if n % 2 == 0 { "even" } else { "odd" }.into(),
            ..parts(&n.to_string())
        })
    });
    store.append(&batch(events)).await.unwrap();
    for (after, kind, key, descending, limit, expected) in [
        (0, None, None, false, 99, vec![1, 2, 3, 4, 5, 6, 7, 8, 9]),
        (4, None, None, false, 2, vec![5, 6]),
        (0, Some("Three"), None, false, 99, vec![3, 6, 9]),
        (3, Some("Three"), None, false, 99, vec![6, 9]),
        (0, None, Some("even"), false, 2, vec![2, 4]),
        (0, Some("Three"), Some("odd"), false, 99, vec![3, 9]),
        (0, Some("three"), None, false, 99, vec![]),
        (0, Some("Th%"), None, false, 99, vec![]),
        (0, None, None, true, 3, vec![9, 8, 7]),
        (7, None, None, true, 3, vec![6, 5, 4]),
        (9, Some("Three"), None, true, 99, vec![6, 3]),
        (0, Some("Three"), Some("odd"), true, 1, vec![9]),
        (1, None, None, true, 99, vec![]),
        (50, None, None, true, 1, vec![9]),
        (50, None, None, false, 1, vec![]),
        (0, None, None, false, 0, vec![]),
    ] {
        let query = Query {
            after: Position(after),
            kind: kind.map(str::to_owned),
            key: key.map(str::to_owned),
            descending,
            limit,
            ..Query::default()
        };
        let found = store.list(&query).await.unwrap();
        let found: Vec<_> = found.iter().map(|event| event.position.0).collect();
        assert_eq!(found, expected, "{query:?}");
    }
}
