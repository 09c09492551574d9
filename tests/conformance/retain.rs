//! The clauses of `EventStore` about removing the beginning of the log, S12 to S15 of
//! `src/store/mod.rs`: a function for each, named after it.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use bytes::Bytes;
use futures_util::StreamExt as _;
use pulsebus::{
    event::{Event, EventParts, HeaderValue, Headers, Position},
    store::{
        Batch, EventStore, Extent, HeldBy, Hold, Limit, Query, Removal, Removed, StoreError,
        progress::{Change, Checkpoint, Claim, Claimed, Epoch, Standing, Tenure, Unfinished},
    },
    transport::Receipt,
};
use time::{OffsetDateTime, macros::datetime};
use tokio::task::JoinSet;

use super::{
    progress::dead,
    store::{EVERYTHING, Fixture, Random, append_patiently, batch, event, parts},
};

const T0: OffsetDateTime = datetime!(2026-05-04 03:02:01.000001 UTC);

fn at(seconds: u64) -> OffsetDateTime {
    T0 + Duration::from_secs(seconds)
}

/// Everything may go that nobody needs.
fn all() -> Removal {
    before(datetime!(9000-01-01 00:00 UTC))
}

fn before(time: OffsetDateTime) -> Removal {
    Removal { before: Some(time), bytes: None, step: Removal::STEP, identities: true }
}

fn down_to(bytes: u64) -> Removal {
    Removal { bytes: Some(bytes), before: None, ..all() }
}

fn steps_of(events: usize, removal: Removal) -> Removal {
    Removal { step: Limit { events, ..Removal::STEP }, ..removal }
}

/// Event `n`, for each of these numbers, in one batch of that second.
fn recorded(seconds: u64, numbers: impl IntoIterator<Item = u64>) -> Batch {
    let events = numbers.into_iter().map(|n| event(&n.to_string()));
    Batch { recorded_at: at(seconds), ..batch(events) }
}

async fn append(store: &dyn EventStore, batch: &Batch) -> Vec<Receipt> {
    store.append(batch).await.unwrap()
}

async fn ends(store: &dyn EventStore) -> (u64, u64) {
    let Extent { removed, head, .. } = store.extent().await.unwrap();
    assert_eq!(store.head().await.unwrap(), head);
    (removed.0, head.0)
}

async fn positions_after(store: &dyn EventStore, after: u64) -> Vec<u64> {
    let events = store.read(Position(after), EVERYTHING).await.unwrap();
    events.iter().map(|event| event.position.0).collect()
}

/// Removes until nothing more goes; says what the last step said.
async fn remove(store: &dyn EventStore, removal: Removal) -> (u64, Removed) {
    let mut gone = 0;
    loop {
        let removed = store.remove(&removal).await.unwrap();
        gone += removed.events;
        if removed.events == 0 {
            return (gone, removed);
        }
    }
}

async fn claim(store: &dyn EventStore, handler: &str, start: u64) -> Tenure {
    let ttl = Duration::from_secs(60);
    let claim = Claim { handler, owner: "one", ttl, start: Position(start) };
    match store.claim(claim).await.unwrap() {
        Claimed::Taken(tenure) => tenure,
        held @ Claimed::Held { .. } => panic!("{held:?}"),
    }
}

async fn save(store: &dyn EventStore, of: (&str, Epoch), cursor: u64, changes: Vec<Change>) {
    let (handler, cursor) = (of.0.into(), Position(cursor));
    store.checkpoint(&Checkpoint { handler, epoch: of.1, cursor, changes }).await.unwrap();
}

fn hold(handler: &str, after: u64, why: HeldBy) -> Option<Hold> {
    Some(Hold { handler: handler.into(), after: Position(after), why })
}

pub async fn S12_only_the_beginning_is_removed(fixture: &dyn Fixture) {
    let store = fixture.open().await;
    append(&*store, &recorded(0, 1..=10)).await;
    append(&*store, &recorded(60, 11..=20)).await;
    let first = store.extent().await.unwrap();
    assert_eq!((first.removed.0, first.head.0), (0, 20));

    let removal = steps_of(4, before(at(60)));
    let mut steps = Vec::new();
    loop {
        let removed = store.remove(&removal).await.unwrap();
        assert_eq!(removed.extent, store.extent().await.unwrap());
        assert_eq!(removed.held, None);
        steps.push(removed.events);
        if removed.events == 0 {
            break;
        }
        // What is left begins there, from wherever it is read.
        let (removed, _) = ends(&*store).await;
        for after in 0..=20 {
            let expected: Vec<u64> = (after.max(removed) + 1..=20).collect();
            assert_eq!(positions_after(&*store, after).await, expected);
        }
    }
    assert_eq!(steps, [4, 4, 2, 0]);
    assert_eq!(ends(&*store).await, (10, 20));

    let some: Vec<_> = [1, 10, 11, 20, 21].map(Position).into();
    let got = store.get(&some, usize::MAX >> 1).await.unwrap();
    assert_eq!(got.iter().map(|event| event.position.0).collect::<Vec<_>>(), [11, 20]);
    assert!(store.find("/tests", "10").await.unwrap().is_none());
    assert_eq!(store.find("/tests", "11").await.unwrap().unwrap().position.0, 11);
    for (descending, kind) in [(false, false), (true, false), (false, true), (true, true)] {
        let kind = kind.then(|| "LessonPublished".to_owned());
        let query = Query { descending, kind, limit: 100, ..Query::default() };
        let found = store.list(&query).await.unwrap();
        let mut listed: Vec<u64> = found.iter().map(|event| event.position.0).collect();
        if descending {
            listed.reverse();
        }
        assert_eq!(listed, (11..=20).collect::<Vec<_>>());
    }
    let limited = Limit { events: 1, bytes: 1 };
    let one = store.read(Position::START, limited).await.unwrap();
    assert_eq!((one.len(), one[0].position.0), (1, 11));
    let typed: Vec<_> = store.stream_all::<serde_json::Value>().collect().await;
    assert_eq!(typed.len(), 10);

    // All of it, and it goes on where it was.
    let (gone, last) = remove(&*store, all()).await;
    assert_eq!(
        (gone, last.extent),
        (10, Extent { removed: Position(20), head: Position(20), bytes: 0 })
    );
    assert_eq!(positions_after(&*store, 0).await, [] as [u64; 0]);
    assert_eq!(positions_after(&*store, 20).await, [] as [u64; 0]);
    assert!(store.list(&Query { descending: true, ..Query::default() }).await.unwrap().is_empty());
    assert_eq!(append(&*store, &recorded(61, [21])).await, [Receipt::Stored(Position(21))]);
    assert_eq!(positions_after(&*store, 0).await, [21]);

    let again = fixture.open().await;
    assert_eq!(ends(&*again).await, (20, 21));
    assert_eq!(positions_after(&*again, 3).await, [21]);
}

/// Steps of several at once, amid appends and readers: each event goes once, no reader sees a gap.
pub async fn S12_several_remove_at_once(fixture: &dyn Fixture) {
    const EVENTS: u64 = 3_000;
    let over = Arc::new(AtomicBool::new(false));
    let mut removers = JoinSet::new();
    for _ in 0..2 {
        let (store, over) = (fixture.open().await, over.clone());
        removers.spawn(async move {
            let mut gone = 0;
            loop {
                let ended = over.load(Relaxed);
                match store.remove(&steps_of(13, all())).await {
                    Ok(removed) if removed.events == 0 && ended => return gone,
                    Ok(removed) => gone += removed.events,
                    Err(error) => panic!("{error}"),
                }
                tokio::task::yield_now().await;
            }
        });
    }
    let mut readers = JoinSet::new();
    for _ in 0..2 {
        let (store, over) = (fixture.open().await, over.clone());
        readers.spawn(async move {
            let mut jumps = 0;
            let mut last = 0;
            while !over.load(Relaxed) {
                // An error would say that there is a gap.
                let limit = Limit { events: 50, bytes: 1 << 20 };
                for event in store.read(Position(last), limit).await.expect("a read") {
                    jumps += u64::from(event.position.0 != last + 1);
                    last = event.position.0;
                }
                tokio::task::yield_now().await;
            }
            jumps
        });
    }
    let store = fixture.open().await;
    for from in (0..EVENTS).step_by(30) {
        append(&*store, &recorded(0, from..from + 30)).await;
    }
    over.store(true, Relaxed);
    let _jumps: u64 = readers.join_all().await.into_iter().sum();
    let gone: u64 = removers.join_all().await.into_iter().sum();
    assert_eq!(gone, EVENTS);
    assert_eq!(
        store.extent().await.unwrap(),
        Extent { removed: Position(EVENTS), head: Position(EVENTS), bytes: 0 }
    );
}

pub async fn S13_nothing_goes_that_a_handler_needs(fixture: &dyn Fixture) {
    let store = fixture.open().await;
    append(&*store, &recorded(0, 1..=20)).await;
    // A source has a row as well, and needs nothing.
    claim(&*store, "source:lessons", 0).await;
    let a = ("a", claim(&*store, "a", 0).await.epoch);
    let b = ("b", claim(&*store, "b", 0).await.epoch);

    let (gone, last) = remove(&*store, all()).await;
    assert_eq!((gone, last.held), (0, hold("a", 0, HeldBy::Cursor)));

    save(&*store, a, 5, vec![]).await;
    let retrying = Standing::Retrying { due_at: at(1_000) };
    let rows = vec![
        Change::Keep(dead(3)),
        Change::Keep(Unfinished { standing: Standing::Parked, failure: None, ..dead(6) }),
        Change::Keep(Unfinished { standing: retrying, ..dead(8) }),
    ];
    save(&*store, b, 9, rows).await;
    let (gone, last) = remove(&*store, all()).await;
    assert_eq!((gone, last.held), (2, hold("b", 2, HeldBy::Unfinished)));
    // Also where the next step would end in the middle of it, and where it is only just due.
    let (gone, last) = remove(&*store, steps_of(1, down_to(0))).await;
    assert_eq!((gone, last.held), (0, hold("b", 2, HeldBy::Unfinished)));

    save(&*store, b, 9, vec![Change::Finish(Position(3))]).await;
    let (gone, last) = remove(&*store, all()).await;
    assert_eq!((gone, last.held), (3, hold("a", 5, HeldBy::Cursor)));

    // Paused it needs it as before; and a redrive leaves its rows as they are.
    let audit = pulsebus::store::progress::AuditEntry::new("ann", "pause", "a".into(), &"".into());
    assert!(store.set_paused("a", true, &audit).await.unwrap());
    assert_eq!(remove(&*store, all()).await.0, 0);
    save(&*store, a, 20, vec![]).await;
    let (gone, last) = remove(&*store, all()).await;
    assert_eq!((gone, last.held), (0, hold("b", 5, HeldBy::Unfinished)));
    let (one, two) = (Change::Finish(Position(6)), Change::Finish(Position(8)));
    save(&*store, b, 9, vec![one]).await;
    assert_eq!(remove(&*store, all()).await.0, 2);
    save(&*store, b, 12, vec![two]).await;
    let (gone, last) = remove(&*store, all()).await;
    assert_eq!((gone, last.held), (5, hold("b", 12, HeldBy::Cursor)));
    assert_eq!(positions_after(&*store, 12).await, (13..=20).collect::<Vec<_>>());

    // A handler that is gone needs nothing.
    store.forget("b", b.1).await.unwrap();
    assert_eq!(remove(&*store, all()).await.0, 8);
}

pub async fn S13_a_cursor_is_never_before_the_beginning(fixture: &dyn Fixture) {
    let store = fixture.open().await;
    append(&*store, &recorded(0, 1..=10)).await;
    remove(&*store, all()).await;
    append(&*store, &recorded(0, 11..=20)).await;

    let new = claim(&*store, "h", 0).await;
    assert!(new.fresh);
    assert_eq!(new.cursor.0, 10);
    assert_eq!(store.cursor("h").await.unwrap(), Some(Position(10)));
    assert_eq!(claim(&*store, "later", 15).await.cursor.0, 15);

    let h = ("h", new.epoch);
    save(&*store, h, 20, vec![Change::Keep(dead(12))]).await;
    assert_eq!(store.rewind("h", h.1, Position(15), None).await.unwrap().0, 15);
    assert_eq!(store.rewind("h", h.1, Position(3), None).await.unwrap().0, 10);
    assert_eq!(store.cursor("h").await.unwrap(), Some(Position(10)));
    assert!(store.unfinished("h", Position::START, 10).await.unwrap().is_empty());
}

/// Handlers come, go back and go, amid steps and appends: each finds the event behind its cursor.
pub async fn S13_a_handler_that_comes_amid_steps_misses_nothing(fixture: &dyn Fixture) {
    let over = Arc::new(AtomicBool::new(false));
    let mut busy = JoinSet::new();
    let (remover, stop) = (fixture.open().await, over.clone());
    busy.spawn(async move {
        while !stop.load(Relaxed) {
            remover.remove(&steps_of(3, all())).await.expect("a step");
            tokio::task::yield_now().await;
        }
    });
    let (writer, stop) = (fixture.open().await, over.clone());
    busy.spawn(async move {
        let mut next = 1;
        while !stop.load(Relaxed) {
            writer.append(&recorded(0, next..next + 5)).await.expect("an append");
            next += 5;
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    });
    let mut handlers = JoinSet::new();
    for nth in 0..2 {
        let store = fixture.open().await;
        handlers.spawn(async move {
            let name = format!("h{nth}");
            let next = async |cursor: Position, what: &str| {
                let limit = Limit { events: 1, bytes: 1 };
                let page = store.read(cursor, limit).await.expect("a read");
                if let Some(event) = page.first() {
                    assert_eq!(event.position, cursor.next(), "{what}");
                }
            };
            for round in 0..60 {
                let tenure = claim(&*store, &name, 0).await;
                next(tenure.cursor, "the first event behind a new cursor").await;
                tokio::time::sleep(Duration::from_millis(2)).await;
                next(tenure.cursor, "it is kept").await;
                let ahead = store.head().await.expect("the head");
                save(&*store, (&name, tenure.epoch), ahead.0, vec![]).await;
                if round % 2 == 0 {
                    let back = Position(ahead.0.saturating_sub(40));
                    let back =
                        store.rewind(&name, tenure.epoch, back, None).await.expect("a rewind");
                    next(back, "the first event behind a cursor that went back").await;
                    tokio::time::sleep(Duration::from_millis(2)).await;
                    next(back, "it is kept as well").await;
                }
                store.forget(&name, tenure.epoch).await.expect("forgotten");
            }
        });
    }
    while let Some(done) = handlers.join_next().await {
        done.expect("a handler");
    }
    over.store(true, Relaxed);
    busy.join_all().await;
}

fn with_body(id: &str, body: &str) -> Event {
    Event::from_parts(EventParts { body: Bytes::from(body.to_owned()), ..parts(id) })
}

pub async fn S14_copies_of_what_was_removed_are_known(fixture: &dyn Fixture) {
    let store = fixture.open().await;
    // Opened before anything was removed, and another one after.
    let other = fixture.open().await;
    let first = [
        with_body("1", r#"{"a": 1.50, "b": ["x", null]}"#),
        with_body("2", "2"),
        with_body("3", "3"),
        event("4"),
    ];
    append(&*store, &batch(first)).await;
    remove(&*store, steps_of(3, down_to(store.extent().await.unwrap().bytes / 3))).await;
    let (removed, head) = ends(&*store).await;
    assert!((1..4).contains(&removed), "{removed}");
    remove(&*store, steps_of(1, all())).await;
    assert_eq!(ends(&*store).await, (4, head));
    append(&*store, &batch([event("5")])).await;

    let of_kind = |kind: &str| {
        Event::from_parts(EventParts { kind: kind.into(), body: "2".into(), ..parts("2") })
    };
    for (round, store) in [&other, &store, &fixture.open().await].into_iter().enumerate() {
        let fresh = format!("fresh {round}");
        let copies = batch([
            // The same value, written otherwise.
            with_body("1", r#"{"b":["\u0078",null],"a":1.5}"#),
            with_body("2", "2"),
            with_body("2", "2"),
            with_body("3", "4"),
            of_kind("Other"),
            event("5"),
            event(&fresh),
            event(&fresh),
        ]);
        let receipts = append(&**store, &copies).await;
        let stored = Position(6 + round as u64);
        let (known, expected): (Vec<_>, Vec<_>) = (
            [0, 1, 2, 5, 6, 7].map(|at: usize| receipts[at].clone()).into(),
            [
                Receipt::Duplicate(Position(1)),
                Receipt::Duplicate(Position(2)),
                Receipt::Duplicate(Position(2)),
                Receipt::Duplicate(Position(5)),
                Receipt::Stored(stored),
                Receipt::Duplicate(stored),
            ]
            .into(),
        );
        assert_eq!(known, expected);
        for conflict in [&receipts[3], &receipts[4]] {
            let Receipt::Quarantined { reason, .. } = conflict else { panic!("{conflict:?}") };
            assert!(reason.contains("has been removed"), "{reason}");
        }
    }
    // Without copies nothing is looked for in vain, and nothing is mistaken for one.
    assert_eq!(append(&*other, &batch([event("9")])).await, [Receipt::Stored(Position(9))]);
    // A batch of copies only.
    let again = append(&*store, &batch([with_body("2", "2")])).await;
    assert_eq!(again, [Receipt::Duplicate(Position(2))]);
}

pub async fn S14_without_identities_a_copy_is_stored_again(fixture: &dyn Fixture) {
    let store = fixture.open().await;
    append(&*store, &recorded(0, 1..=2)).await;
    remove(&*store, Removal { identities: false, ..all() }).await;
    let copies = append(&*store, &recorded(0, 1..=2)).await;
    assert_eq!(copies, [Receipt::Stored(Position(3)), Receipt::Stored(Position(4))]);
}

/// Several append the same events over and over while they are being removed: each is stored once.
pub async fn S14_each_is_stored_once_amid_steps(fixture: &dyn Fixture) {
    const COMMON: u64 = 400;
    let mut writers = JoinSet::new();
    for writer in 0..3 {
        let store = fixture.open().await;
        writers.spawn(async move {
            let mut random = Random(writer + 1);
            let (mut stored, mut gone) = (Vec::new(), 0);
            for _ in 0..150 {
                if random.below(2) == 0 {
                    gone += store.remove(&steps_of(5, all())).await.expect("a step").events;
                }
                let ids: BTreeSet<u64> = (0..8).map(|_| random.below(COMMON)).collect();
                let copies = recorded(0, ids.iter().copied());
                let receipts = append_patiently(&*store, &copies).await;
                for (id, receipt) in ids.into_iter().zip(receipts) {
                    stored.push((id, receipt));
                }
            }
            (stored, gone)
        });
    }
    let mut places: BTreeMap<u64, BTreeSet<Position>> = BTreeMap::new();
    let mut fresh: BTreeMap<u64, u64> = BTreeMap::new();
    let mut removed = 0;
    while let Some(of_one) = writers.join_next().await {
        let (stored, gone) = of_one.expect("a writer");
        removed += gone;
        for (id, receipt) in stored {
            match receipt {
                Receipt::Stored(position) => {
                    *fresh.entry(id).or_default() += 1;
                    places.entry(id).or_default().insert(position);
                }
                Receipt::Duplicate(position) => {
                    places.entry(id).or_default().insert(position);
                }
                Receipt::Quarantined { .. } => panic!("{id}: {receipt:?}"),
            }
        }
    }
    assert!(removed > COMMON / 2, "hardly anything was removed meanwhile: {removed}");
    for (id, places) in &places {
        assert_eq!((fresh.get(id), places.len()), (Some(&1), 1), "event {id}: {places:?}");
    }
    let store = fixture.open().await;
    assert_eq!(store.head().await.unwrap().0, places.len() as u64);
}

pub async fn S15_what_is_due_goes_and_no_more(fixture: &dyn Fixture) {
    let store = fixture.open().await;
    let mut random = Random(7);
    let mut sizes = Vec::new();
    let mut last = 0;
    for n in 0..40_u64 {
        let mut headers = Headers::new();
        headers.push("x-nth", HeaderValue::from("ü".repeat(random.below(9) as usize)));
        let id = format!("é {n}");
        let body = format!("\"{}\"", "ö".repeat(random.below(300) as usize)).into();
        let subject = n.is_multiple_of(3).then(|| "süß".into());
        let one = Event::from_parts(EventParts { headers, body, subject, ..parts(&id) });
        append(&*store, &Batch { recorded_at: at(n / 4), ..batch([one]) }).await;
        let bytes = store.extent().await.unwrap().bytes;
        assert!(bytes > last);
        sizes.push(bytes - last);
        last = bytes;
    }
    let none = Removal { before: None, ..all() };
    assert_eq!(remove(&*store, none).await.0, 0);
    assert_eq!(remove(&*store, down_to(last)).await.0, 0);
    assert_eq!(remove(&*store, before(at(0))).await.0, 0);

    // Of the size that was added each time exactly that goes.
    let target = last - sizes[0] - sizes[1];
    assert_eq!(remove(&*store, down_to(target)).await.0, 2);
    assert_eq!(store.extent().await.unwrap().bytes, target);
    assert_eq!(remove(&*store, steps_of(7, down_to(target - 1))).await.0, 1);
    assert_eq!(remove(&*store, before(at(2))).await.0, 8 - 3);
    let left: u64 = sizes[8..].iter().sum();
    assert_eq!(store.extent().await.unwrap().bytes, left);

    // The one or the other: by age the first 12, by size those up to a half.
    let half = left / 2;
    let both = Removal { before: Some(at(3)), bytes: Some(half), ..all() };
    remove(&*store, steps_of(3, both)).await;
    let extent = store.extent().await.unwrap();
    let (removed, bytes) = (extent.removed.0 as usize, extent.bytes);
    assert!(removed >= 12 && bytes <= half && bytes + sizes[removed - 1] > half, "{extent:?}");
    assert_eq!(bytes, sizes[removed..].iter().sum::<u64>());

    // Nobody holds up what is not due; a step ends at its bytes, but takes one at least.
    claim(&*store, "h", 0).await;
    let (gone, nothing) = remove(&*store, down_to(bytes)).await;
    assert_eq!((gone, nothing.held), (0, None));
    let (gone, nothing) = remove(&*store, down_to(bytes - 1)).await;
    assert_eq!((gone, nothing.held), (0, hold("h", removed as u64, HeldBy::Cursor)));
    let epoch = claim(&*store, "h", 0).await.epoch;
    save(&*store, ("h", epoch), 40, vec![]).await;
    let tiny = Removal { step: Limit { events: 100, bytes: 1 }, ..all() };
    assert_eq!(store.remove(&tiny).await.unwrap().events, 1);
    remove(&*store, all()).await;
    assert_eq!(store.extent().await.unwrap().bytes, 0);
}

/// Killed amid steps and appends: whatever is there is whole, and goes on.
pub async fn S12_S14_a_crash_amid_steps(fixture: &dyn Fixture) {
    let store = fixture.open().await;
    let over = Arc::new(AtomicBool::new(false));
    let (remover, stop) = (fixture.open().await, over.clone());
    let mut busy = JoinSet::new();
    busy.spawn(async move {
        let mut gone = 0;
        while !stop.load(Relaxed) {
            match remover.remove(&steps_of(50, all())).await {
                Ok(removed) => gone += removed.events,
                Err(StoreError::Unavailable(_)) => {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                Err(error) => panic!("{error}"),
            }
        }
        gone
    });
    let (writer, stop) = (fixture.open().await, over.clone());
    busy.spawn(async move {
        let mut next = 1;
        while !stop.load(Relaxed) {
            append_patiently(&*writer, &recorded(0, next..next + 20)).await;
            next += 20;
        }
        next - 1
    });
    let mut seen = 0;
    for _ in 0..4 {
        let deadline = tokio::time::Instant::now() + Duration::from_secs(60);
        loop {
            match store.extent().await {
                Ok(extent) if extent.removed.0 >= seen + 500 => break seen = extent.removed.0,
                Ok(_) | Err(StoreError::Unavailable(_)) => {}
                Err(error) => panic!("{error}"),
            }
            assert!(tokio::time::Instant::now() < deadline, "steps do not go on");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert!(fixture.crash().await, "this fixture can crash");
    }
    over.store(true, Relaxed);
    let events = busy.join_all().await.into_iter().max().unwrap_or(0);
    let store = fixture.open().await;
    let (removed, head) = ends(&*store).await;
    // Each event once, whatever became of the answers: appends were repeated, and none twice.
    assert_eq!(head, events);
    assert_eq!(positions_after(&*store, 0).await, (removed + 1..=head).collect::<Vec<_>>());
    let copies: Vec<u64> = (1..=events).step_by(97).collect();
    let receipts = append(&*store, &recorded(0, copies.iter().copied())).await;
    let expected: Vec<_> = copies.iter().map(|n| Receipt::Duplicate(Position(*n))).collect();
    assert_eq!(receipts, expected);
    remove(&*store, all()).await;
    assert_eq!(store.extent().await.unwrap().bytes, 0);
}
