//! The contract of `ProgressStore`: a function for each clause, named after it. Clauses are those
//! of `src/store/progress.rs`.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use pulsebus::{
    event::Position,
    store::{
        Batch, EventStore, StoreError,
        progress::{
            AuditEntry, Change, Checkpoint, Claim, Claimed, DeadLetter, DeadLetterFilter, Epoch,
            Failure, NewRedrive, QuarantineFilter, Redrive, RedriveAction, RedriveState, Selection,
            SettledEntry, Standing, Tenure, Unfinished,
        },
    },
};
use time::{OffsetDateTime, macros::datetime};
use tokio::task::JoinSet;

use super::store::{Fixture, Random, bad, give_up_after};

const MINUTE: Duration = Duration::from_secs(60);
const ALL: usize = usize::MAX >> 1;
const T0: OffsetDateTime = datetime!(2026-05-04 03:02:01.000001 UTC);

fn at(seconds: u64) -> OffsetDateTime {
    T0 + Duration::from_secs(seconds)
}

fn wants<'a>(handler: &'a str, owner: &'a str) -> Claim<'a> {
    Claim { handler, owner, ttl: MINUTE, start: Position::START }
}

async fn take(store: &dyn EventStore, claim: Claim<'_>) -> Tenure {
    match store.claim(claim).await.unwrap() {
        Claimed::Taken(tenure) => tenure,
        held @ Claimed::Held { .. } => panic!("{held:?}"),
    }
}

/// Claims a handler as the one process that runs it.
async fn run(store: &dyn EventStore, handler: &str) -> Epoch {
    take(store, wants(handler, "one")).await.epoch
}

pub fn failure(error: &str, seconds: u64) -> Option<Failure> {
    Some(Failure {
        first_error: error.into(),
        last_error: error.into(),
        first_failed_at: at(seconds),
        last_failed_at: at(seconds),
    })
}

/// A dead letter of that position: of type `A` or `B`, and one of three keys, by its position.
pub fn dead(position: u64) -> Unfinished {
    Unfinished {
        position: Position(position),
        id: format!("id {position}").into(),
        kind: if position.is_multiple_of(2) { "A" } else { "B" }.into(),
        key: format!("key {}", position % 3).into(),
        standing: Standing::Dead { unpublished: false },
        attempts: 3,
        failure: failure(&format!("error {position}"), position),
    }
}

fn retrying(position: u64) -> Unfinished {
    let standing = Standing::Retrying { due_at: at(100 + position) };
    Unfinished { standing, attempts: 1, ..dead(position) }
}

fn parked(position: u64) -> Unfinished {
    Unfinished { standing: Standing::Parked, attempts: 0, failure: None, ..dead(position) }
}

fn bare(event: &Unfinished) -> Unfinished {
    Unfinished { failure: None, ..event.clone() }
}

pub fn done(position: u64) -> Change {
    Change::Finish(Position(position))
}

pub async fn save(
    store: &dyn EventStore,
    handler: &str,
    epoch: Epoch,
    cursor: u64,
    changes: impl IntoIterator<Item = Change>,
) -> Result<(), StoreError> {
    let changes = changes.into_iter().collect();
    let cursor = Position(cursor);
    store.checkpoint(&Checkpoint { handler: handler.into(), epoch, cursor, changes }).await
}

fn keep<const N: usize>(events: [Unfinished; N]) -> [Change; N] {
    events.map(Change::Keep)
}

async fn rows(store: &dyn EventStore, handler: &str) -> Vec<Unfinished> {
    store.unfinished(handler, Position::START, ALL).await.unwrap()
}

async fn positions(store: &dyn EventStore, handler: &str) -> Vec<u64> {
    rows(store, handler).await.iter().map(|row| row.position.0).collect()
}

async fn letters(store: &dyn EventStore, filter: &DeadLetterFilter) -> Vec<(String, u64)> {
    let found = store.dead_letters(filter, None, ALL).await.unwrap();
    let free = found.iter().filter(|letter| letter.redrive.is_none()).count() as u64;
    assert_eq!(store.count_dead_letters(filter).await.unwrap(), free, "{filter:?}");
    found.iter().map(|letter| (letter.handler.to_string(), letter.position.0)).collect()
}

async fn letter(store: &dyn EventStore, handler: &str, position: u64) -> DeadLetter {
    let filter = DeadLetterFilter {
        handler: Some(handler.to_owned()),
        positions: vec![position],
        ..DeadLetterFilter::default()
    };
    let mut found = store.dead_letters(&filter, None, ALL).await.unwrap();
    assert_eq!(found.len(), 1, "{handler} {position}");
    found.remove(0)
}

/// Everything there is to see of these handlers, and of redrives and audit.
async fn everything(store: &dyn EventStore, handlers: &[&str]) -> String {
    let mut all = String::new();
    for handler in handlers {
        let cursor = store.cursor(handler).await.unwrap();
        all += &format!("{handler} at {cursor:?}: {:?}\n", rows(store, handler).await);
    }
    let letters = store.dead_letters(&DeadLetterFilter::default(), None, ALL).await.unwrap();
    let redrives = store.redrives(0, ALL).await.unwrap();
    all + &format!("{letters:?} {redrives:?} {:?}", store.audits(0, ALL).await.unwrap())
}

#[track_caller]
fn fenced<T: std::fmt::Debug>(result: Result<T, StoreError>, handler: &str) {
    match result {
        Err(StoreError::Fenced(of)) => assert_eq!(&*of, handler),
        other => panic!("not fenced: {other:?}"),
    }
}

fn entry(action: &str) -> AuditEntry {
    let detail = serde_json::json!({ "why": "ü \"quoted\"" });
    AuditEntry::new("a person", action, "handler h".to_owned(), &detail)
}

fn redrive(filter: DeadLetterFilter, action: RedriveAction) -> NewRedrive {
    NewRedrive {
        selection: Selection::DeadLetters(filter),
        action,
        rate: Some(7),
        by: "a person".to_owned(),
        reason: (action == RedriveAction::Discard).then(|| "they are old".to_owned()),
    }
}

fn of(handler: &str) -> DeadLetterFilter {
    DeadLetterFilter { handler: Some(handler.to_owned()), ..DeadLetterFilter::default() }
}

/// What is left of redrives for a handler: position and redrive.
async fn redriven(store: &dyn EventStore, handler: &str) -> Vec<(u64, u64)> {
    let left = store.redriven(handler, &[], ALL).await.unwrap();
    left.iter().map(|one| (one.event.position.0, one.redrive)).collect()
}

async fn find(store: &dyn EventStore, number: u64) -> Redrive {
    let found = store.redrive(number).await.unwrap().expect("a redrive");
    let listed = store.redrives(number - 1, 1).await.unwrap();
    assert_eq!(listed, std::slice::from_ref(&found));
    found
}

pub async fn D1_a_claim_has_a_higher_epoch_than_every_one_before(fixture: &dyn Fixture) {
    let store = fixture.open().await;
    assert_eq!(store.cursor("h").await.unwrap(), None);
    let start = Claim { start: Position(7), ..wants("h", "one") };
    let first = take(&*store, start).await;
    assert!(first.fresh && !first.paused);
    assert_eq!(first.cursor, Position(7));
    assert_eq!(store.cursor("h").await.unwrap(), Some(Position(7)));
    save(&*store, "h", first.epoch, 9, keep([dead(8)])).await.unwrap();

    // After a restart of the process, and through another handle.
    let second = take(&*fixture.open().await, start).await;
    assert!(second.epoch > first.epoch);
    assert_eq!((second.cursor, second.fresh), (Position(9), false));
    assert!(!store.renew("h", second.epoch, MINUTE).await.unwrap());
    assert_eq!(positions(&*store, "h").await, [8]);

    // Forgotten, it is as if nobody had run it; but who ran it then cannot write now.
    store.forget("h", second.epoch).await.unwrap();
    assert_eq!(store.cursor("h").await.unwrap(), None);
    assert!(positions(&*store, "h").await.is_empty());
    fenced(store.renew("h", second.epoch, MINUTE).await, "h");
    let third = take(&*store, start).await;
    assert!(third.epoch > second.epoch);
    assert_eq!((third.cursor, third.fresh), (Position(7), true));
    fenced(save(&*store, "h", second.epoch, 1, []).await, "h");
}

pub async fn D1_one_of_many_claims_at_once_is_the_last(fixture: &dyn Fixture) {
    let mut claims = JoinSet::new();
    for _ in 0..4 {
        let store = fixture.open().await;
        claims.spawn(async move {
            let mut taken = Vec::new();
            for _ in 0..10 {
                taken.push(take(&*store, wants("h", "one")).await);
            }
            assert!(taken.windows(2).all(|two| two[0].epoch < two[1].epoch), "{taken:?}");
            taken
        });
    }
    let mut taken: Vec<Tenure> = claims.join_all().await.concat();
    taken.sort_by_key(|tenure| tenure.epoch);
    assert!(taken.windows(2).all(|two| two[0].epoch < two[1].epoch), "given twice: {taken:?}");
    assert_eq!(taken.iter().filter(|tenure| tenure.fresh).count(), 1);
    let last = taken.pop().expect("forty of them");
    let store = fixture.open().await;
    for tenure in taken {
        fenced(save(&*store, "h", tenure.epoch, 1, keep([dead(1)])).await, "h");
    }
    save(&*store, "h", last.epoch, 2, []).await.unwrap();
    assert_eq!(store.cursor("h").await.unwrap(), Some(Position(2)));
    assert!(positions(&*store, "h").await.is_empty());
}

pub async fn D1_a_lease_keeps_others_away(fixture: &dyn Fixture) {
    let store = fixture.open().await;
    let one = take(&*store, wants("h", "one")).await;
    if !fixture.leases() {
        // There, the last claim counts.
        let two = take(&*store, wants("h", "two")).await;
        assert!(two.epoch > one.epoch);
        fenced(store.renew("h", one.epoch, MINUTE).await, "h");
        // The end of a claim that is not the last one any more is the end of nothing.
        store.release("h", one.epoch).await.unwrap();
        assert!(!store.renew("h", two.epoch, MINUTE).await.unwrap());
        return;
    }
    let held = async |owner: &str| match store.claim(wants("h", owner)).await.unwrap() {
        Claimed::Held { owner, left } => Some((owner, left)),
        Claimed::Taken(_) => None,
    };
    let (owner, left) = held("two").await.expect("it is held");
    assert_eq!(owner, "one");
    assert!(left > MINUTE / 2 && left <= MINUTE, "{left:?}");
    save(&*store, "h", one.epoch, 1, []).await.unwrap();

    // Renewed for longer, and for hardly any time: then another one may have it.
    store.renew("h", one.epoch, 2 * MINUTE).await.unwrap();
    let (_, left) = held("two").await.expect("it is held");
    assert!(left > MINUTE, "{left:?}");
    store.renew("h", one.epoch, Duration::from_millis(100)).await.unwrap();
    let deadline = tokio::time::Instant::now() + MINUTE;
    let two = loop {
        match store.claim(wants("h", "two")).await.unwrap() {
            Claimed::Taken(tenure) => break tenure,
            Claimed::Held { owner, left } => {
                assert_eq!(owner, "one");
                assert!(left <= Duration::from_millis(100), "{left:?}");
                assert!(tokio::time::Instant::now() < deadline, "it never ends");
                tokio::time::sleep(left).await;
            }
        }
    };
    assert!(two.epoch > one.epoch && !two.fresh);
    assert_eq!(two.cursor, Position(1));
    fenced(store.renew("h", one.epoch, MINUTE).await, "h");
    fenced(save(&*store, "h", one.epoch, 5, []).await, "h");
    assert_eq!(held("one").await.expect("it is held").0, "two");

    // Given up by the one that had it, nothing happens; by the one that has it, it is free.
    store.release("h", one.epoch).await.unwrap();
    assert_eq!(held("three").await.expect("it is held").0, "two");
    store.release("h", two.epoch).await.unwrap();
    let three = take(&*store, wants("h", "three")).await;
    assert!(three.epoch > two.epoch);

    // Of several at once that nobody had, one has it.
    let mut claims = JoinSet::new();
    for nth in 0..6 {
        let store = fixture.open().await;
        claims.spawn(async move { store.claim(wants("new", &format!("owner {nth}"))).await });
    }
    let claimed = claims.join_all().await;
    let taken = claimed.iter().filter(|c| matches!(c, Ok(Claimed::Taken(t)) if t.fresh)).count();
    let held = claimed.iter().filter(|c| matches!(c, Ok(Claimed::Held { .. }))).count();
    assert_eq!((taken, held), (1, 5), "{claimed:?}");
}

pub async fn D2_what_is_written_under_an_old_epoch_changes_nothing(fixture: &dyn Fixture) {
    let store = fixture.open().await;
    let old = run(&*store, "h").await;
    save(&*store, "h", old, 10, keep([dead(3), retrying(5), parked(6)])).await.unwrap();
    let other = run(&*store, "other").await;
    save(&*store, "other", other, 4, keep([dead(2)])).await.unwrap();
    let new = run(&*fixture.open().await, "h").await;
    let before = everything(&*store, &["h", "other", "nobody"]).await;

    let changes = || vec![Change::Keep(dead(7)), Change::Finish(Position(3))];
    for epoch in [old, Epoch(new.0 + 1), Epoch(0)] {
        fenced(save(&*store, "h", epoch, 20, changes()).await, "h");
        fenced(save(&*store, "h", epoch, 20, []).await, "h");
        fenced(store.rewind("h", epoch, Position(1), Some(&entry("rewind"))).await, "h");
        fenced(store.adopt(("other", other), ("h", epoch)).await, "h");
        fenced(store.adopt(("h", epoch), ("other", other)).await, "h");
        fenced(store.forget("h", epoch).await, "h");
        fenced(store.renew("h", epoch, MINUTE).await, "h");
        store.release("h", epoch).await.unwrap();
    }
    fenced(save(&*store, "nobody", new, 1, changes()).await, "nobody");
    fenced(store.renew("nobody", new, MINUTE).await, "nobody");
    assert_eq!(everything(&*store, &["h", "other", "nobody"]).await, before);
    save(&*store, "h", new, 20, changes()).await.unwrap();
    assert_eq!(positions(&*store, "h").await, [5, 6, 7]);
}

pub async fn D3_a_checkpoint_is_there_as_a_whole(fixture: &dyn Fixture) {
    let store = fixture.open().await;
    let epoch = run(&*store, "h").await;
    run(&*store, "other").await;
    save(&*store, "h", epoch, 9, keep([retrying(2), parked(5), dead(7)])).await.unwrap();
    for store in [store.clone(), fixture.open().await] {
        assert_eq!(store.cursor("h").await.unwrap(), Some(Position(9)));
        let expected = [bare(&retrying(2)), parked(5), bare(&dead(7))];
        assert_eq!(rows(&*store, "h").await, expected);
        assert_eq!(store.unfinished("h", Position(2), 1).await.unwrap(), expected[1..2]);
        assert_eq!(store.unfinished("h", Position(7), 9).await.unwrap(), []);
        assert_eq!(rows(&*store, "other").await, []);
        assert_eq!(store.cursor("other").await.unwrap(), Some(Position::START));
    }
    // Twice the same, and what is gone is gone again.
    for _ in 0..2 {
        let changes = [
            Change::Finish(Position(2)),
            Change::Keep(retrying(5)),
            Change::Keep(parked(11)),
            Change::Finish(Position(4)),
        ];
        save(&*store, "h", epoch, 12, changes).await.unwrap();
        assert_eq!(positions(&*store, "h").await, [5, 7, 11]);
        assert_eq!(store.cursor("h").await.unwrap(), Some(Position(12)));
    }
    // Only a cursor, only what is kept, only what is finished.
    save(&*store, "h", epoch, 13, []).await.unwrap();
    save(&*store, "h", epoch, 13, [Change::Finish(Position(11))]).await.unwrap();
    assert_eq!(positions(&*store, "h").await, [5, 7]);

    if fixture.refuse_rows().await {
        let before = everything(&*store, &["h"]).await;
        let refused = Unfinished { key: "refused".into(), ..dead(15) };
        let changes = [Change::Finish(Position(5)), Change::Keep(dead(14)), Change::Keep(refused)];
        let error = save(&*store, "h", epoch, 20, changes.clone()).await.unwrap_err();
        assert!(matches!(error, StoreError::Unavailable(_)), "{error}");
        assert_eq!(everything(&*store, &["h"]).await, before);
        save(&*store, "h", epoch, 20, changes[..2].to_vec()).await.unwrap();
        assert_eq!(positions(&*store, "h").await, [7, 14]);
    }
}

/// What a row should be after it is kept (D4).
fn merge(rows: &mut BTreeMap<u64, Unfinished>, new: &Unfinished) {
    let before = rows.get(&new.position.0).and_then(|row| row.failure.clone());
    let failure = match (before, new.failure.clone()) {
        (Some(before), Some(new)) => Some(Failure {
            first_error: before.first_error,
            first_failed_at: before.first_failed_at,
            ..new
        }),
        (before, new) => new.or(before),
    };
    rows.insert(new.position.0, Unfinished { failure, ..new.clone() });
}

/// Random checkpoints against a model that is a map; some are given up half way and repeated.
pub async fn D3_D4_any_sequence_of_checkpoints_also_given_up(fixture: &dyn Fixture) {
    let store = fixture.open().await;
    let epoch = run(&*store, "h").await;
    let mut model: BTreeMap<u64, Unfinished> = BTreeMap::new();
    let mut random = Random(34);
    let mut given_up = 0;
    for cursor in 1..=200 {
        let mut changes = BTreeMap::new();
        for _ in 0..random.below(6) {
            let position = 1 + random.below(40);
            let change = match random.below(5) {
                0 => Change::Finish(Position(position)),
                1 => Change::Keep(parked(position)),
                2 => Change::Keep(dead(position)),
                3 => Change::Keep(bare(&dead(position))),
                _ => Change::Keep(Unfinished {
                    failure: failure(&format!("at {cursor}"), cursor),
                    ..retrying(position)
                }),
            };
            changes.insert(position, change);
        }
        let checkpoint = Checkpoint {
            handler: "h".into(),
            epoch,
            cursor: Position(cursor),
            changes: changes.values().cloned().collect(),
        };
        let wakes = if random.below(2) == 0 { random.below(6) } else { u64::MAX };
        match give_up_after(wakes, store.checkpoint(&checkpoint)).await {
            Some(done) => done.unwrap(),
            None => {
                given_up += 1;
                store.checkpoint(&checkpoint).await.unwrap();
            }
        }
        for (position, change) in changes {
            match change {
                Change::Keep(event) => merge(&mut model, &event),
                Change::Finish(_) => {
                    model.remove(&position);
                }
            }
        }
        assert_eq!(store.cursor("h").await.unwrap(), Some(Position(cursor)));
        let expected: Vec<_> = model.values().map(bare).collect();
        assert_eq!(rows(&*store, "h").await, expected);
    }
    assert!(given_up > 0 || store.kind() == "memory");
    for row in model.values().filter(|row| matches!(row.standing, Standing::Dead { .. })) {
        let found = letter(&*store, "h", row.position.0).await;
        if let Some(failure) = &row.failure {
            assert_eq!(found.failure, *failure);
        }
    }
}

pub async fn D3_what_was_saved_is_there_after_reopening(fixture: &dyn Fixture) {
    assert!(fixture.durable());
    let store = fixture.open().await;
    let epoch = run(&*store, "h").await;
    save(&*store, "h", epoch, 9, keep([retrying(2), parked(5), dead(7), dead(8)])).await.unwrap();
    store.set_paused("h", true, &entry("pause")).await.unwrap();
    let filter = DeadLetterFilter { positions: vec![8], ..DeadLetterFilter::default() };
    store.start_redrive(&redrive(filter, RedriveAction::Retry)).await.unwrap();
    let before = everything(&*store, &["h"]).await;
    store.close().await;
    let store = fixture.open().await;
    assert_eq!(everything(&*store, &["h"]).await, before);
    assert_eq!(redriven(&*store, "h").await.len(), 1);
    // The claim as well: it goes on where it was.
    assert!(store.renew("h", epoch, MINUTE).await.unwrap());
    let tenure = take(&*store, wants("h", "one")).await;
    assert!(tenure.epoch > epoch && tenure.paused && !tenure.fresh);
    assert_eq!(tenure.cursor, Position(9));
}

/// Each checkpoint moves the cursor to n, keeps n, and finishes what is ten before it.
pub async fn D3_a_crash_amid_checkpoints(fixture: &dyn Fixture) {
    let store = fixture.open().await;
    let epoch = run(&*store, "h").await;
    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let mut writer = JoinSet::new();
    {
        let (store, stop) = (store.clone(), stop.clone());
        writer.spawn(async move {
            let mut nth = 0;
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                nth += 1;
                let deadline = tokio::time::Instant::now() + MINUTE;
                let changes =
                    || [Change::Keep(dead(nth)), Change::Finish(Position(nth.saturating_sub(10)))];
                while let Err(error) = save(&*store, "h", epoch, nth, changes()).await {
                    assert!(matches!(error, StoreError::Unavailable(_)), "{error}");
                    assert!(tokio::time::Instant::now() < deadline, "never available: {error}");
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            }
            nth
        });
    }
    let mut seen = 0;
    for _ in 0..3 {
        let deadline = tokio::time::Instant::now() + MINUTE;
        loop {
            match store.cursor("h").await {
                Ok(Some(cursor)) if cursor.0 >= seen + 30 => break seen = cursor.0,
                Ok(_) | Err(StoreError::Unavailable(_)) => {}
                Err(error) => panic!("{error}"),
            }
            assert!(tokio::time::Instant::now() < deadline, "checkpoints do not go on");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert!(fixture.crash().await, "this fixture can crash");
        // Whatever is there, is there as a whole.
        let store = fixture.open().await;
        let cursor = store.cursor("h").await.unwrap().expect("a cursor").0;
        assert!(cursor >= seen, "{seen} was saved, and it is {cursor}");
        let there = positions(&*store, "h").await;
        let last = *there.last().expect("rows");
        // It goes on meanwhile; what is read later may be newer.
        assert!(last >= cursor, "{cursor}: {there:?}");
        assert_eq!(there, (last - 9..=last).collect::<Vec<_>>());
    }
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    let last = writer.join_next().await.expect("a writer").expect("its end");
    let store = fixture.open().await;
    assert_eq!(store.cursor("h").await.unwrap(), Some(Position(last)));
    assert_eq!(positions(&*store, "h").await, (last - 9..=last).collect::<Vec<_>>());
}

pub async fn D4_a_row_keeps_how_it_first_failed(fixture: &dyn Fixture) {
    let store = fixture.open().await;
    let epoch = run(&*store, "h").await;
    let steps = [
        Unfinished { failure: None, ..parked(4) },
        Unfinished { failure: failure("first", 1), attempts: 1, ..retrying(4) },
        Unfinished { failure: failure("second", 2), attempts: 2, ..retrying(4) },
        Unfinished { failure: None, attempts: 2, ..retrying(4) },
        Unfinished { failure: failure("third", 3), attempts: 3, ..dead(4) },
    ];
    for step in &steps {
        save(&*store, "h", epoch, 9, [Change::Keep(step.clone())]).await.unwrap();
        assert_eq!(rows(&*store, "h").await, [bare(step)]);
    }
    let found = letter(&*store, "h", 4).await;
    assert_eq!(found.attempts, 3);
    assert_eq!((&*found.failure.first_error, found.failure.first_failed_at), ("first", at(1)));
    assert_eq!((&*found.failure.last_error, found.failure.last_failed_at), ("third", at(3)));
    assert_eq!(found.failure.last_failed_at.offset(), time::UtcOffset::UTC);

    // As last kept in everything else.
    let kept = Unfinished { failure: None, key: "another".into(), attempts: 0, ..dead(4) };
    save(&*store, "h", epoch, 9, [Change::Keep(kept.clone())]).await.unwrap();
    assert_eq!(rows(&*store, "h").await, [kept]);
    assert_eq!(letter(&*store, "h", 4).await.failure, found.failure);

    // Finished and kept again, it is another row; without a failure it says nothing.
    save(&*store, "h", epoch, 9, [Change::Finish(Position(4))]).await.unwrap();
    save(&*store, "h", epoch, 9, [Change::Keep(bare(&dead(4)))]).await.unwrap();
    assert_eq!(&*letter(&*store, "h", 4).await.failure.first_error, "");
}

pub async fn D4_rows_are_found_by_position_whatever_their_state(fixture: &dyn Fixture) {
    let store = fixture.open().await;
    let (epoch, other) = (run(&*store, "h").await, run(&*store, "other").await);
    let failed = Unfinished { failure: failure("full", 1), key: "k".into(), ..retrying(3) };
    let behind = Unfinished { key: "k".into(), ..parked(5) };
    let rows = keep([failed, behind, dead(7), dead(8)]);
    save(&*store, "h", epoch, 9, rows).await.unwrap();
    save(&*store, "other", other, 9, keep([dead(3)])).await.unwrap();
    let at = [3, 4, 5, 8].map(Position);
    let found = store.unfinished_at("h", &at).await.unwrap();
    let positions: Vec<_> = found.iter().map(|row| row.position.0).collect();
    assert_eq!(positions, [3, 5, 8]);
    assert!(found.iter().all(|row| &*row.handler == "h"));
    assert_eq!((&*found[0].key, &*found[0].failure.last_error), ("k", "full"));
    assert_eq!((found[0].followers, found[1].followers), (1, 0));
    assert_eq!(&*found[1].failure.last_error, "", "it has not failed");
    assert!(store.unfinished_at("h", &[]).await.unwrap().is_empty());
    assert!(store.unfinished_at("nobody", &at).await.unwrap().is_empty());
}

pub async fn D5_a_rewind_removes_the_rows_above(fixture: &dyn Fixture) {
    let store = fixture.open().await;
    let epoch = run(&*store, "h").await;
    let other = run(&*store, "other").await;
    save(&*store, "h", epoch, 9, keep([dead(3), retrying(5), parked(6), dead(9)])).await.unwrap();
    save(&*store, "other", other, 9, keep([dead(9)])).await.unwrap();
    store.rewind("h", epoch, Position(5), Some(&entry("rewind"))).await.unwrap();
    assert_eq!(store.cursor("h").await.unwrap(), Some(Position(5)));
    assert_eq!(positions(&*store, "h").await, [3, 5]);
    assert_eq!(positions(&*store, "other").await, [9]);
    let audits = store.audits(0, ALL).await.unwrap();
    assert_eq!(audits.len(), 1);
    assert_eq!(audits[0].action, "rewind");
    // Forth, and by nobody.
    store.rewind("h", epoch, Position(50), None).await.unwrap();
    assert_eq!(store.cursor("h").await.unwrap(), Some(Position(50)));
    assert_eq!(positions(&*store, "h").await, [3, 5]);
    store.rewind("h", epoch, Position::START, None).await.unwrap();
    assert!(positions(&*store, "h").await.is_empty());
    assert_eq!(store.audits(0, ALL).await.unwrap().len(), 1);
    // The epoch goes on.
    save(&*store, "h", epoch, 1, []).await.unwrap();
}

pub async fn D6_a_redrive_takes_up_what_matches_at_its_start(fixture: &dyn Fixture) {
    let store = fixture.open().await;
    let epoch = run(&*store, "h").await;
    let other = run(&*store, "other").await;
    let kept = [dead(1), dead(2), retrying(3), dead(4), parked(5), dead(6)];
    save(&*store, "h", epoch, 9, keep(kept)).await.unwrap();
    save(&*store, "other", other, 9, keep([dead(2)])).await.unwrap();
    let kind = |kind: &str| DeadLetterFilter { kind: Some(kind.to_owned()), ..of("h") };

    let what = redrive(kind("A"), RedriveAction::Retry);
    let first = store.start_redrive(&what).await.unwrap();
    assert_eq!((first.state, first.total, first.left), (RedriveState::Running, 3, 3));
    assert_eq!((&first.what, first.ended_at), (&what, None));
    assert_eq!(find(&*store, first.number).await, first);
    let numbered = |positions: &[u64], number| -> Vec<(u64, u64)> {
        positions.iter().map(|position| (*position, number)).collect()
    };
    assert_eq!(redriven(&*store, "h").await, numbered(&[2, 4, 6], first.number));
    assert_eq!(redriven(&*store, "other").await, []);
    let left = store.redriven("h", &[], 1).await.unwrap();
    assert_eq!(left.len(), 1);
    assert_eq!((left[0].action, left[0].rate), (RedriveAction::Retry, Some(7)));
    assert_eq!(left[0].event, bare(&dead(2)));
    assert_eq!(letter(&*store, "h", 2).await.redrive, Some(first.number));
    assert_eq!(letter(&*store, "h", 1).await.redrive, None);
    assert_eq!(letter(&*store, "other", 2).await.redrive, None);

    // What comes later is not its, and what it has is not another one's.
    save(&*store, "h", epoch, 9, keep([dead(8)])).await.unwrap();
    assert_eq!(redriven(&*store, "h").await, numbered(&[2, 4, 6], first.number));
    let what = redrive(of("h"), RedriveAction::Discard);
    let second = store.start_redrive(&what).await.unwrap();
    assert!(second.number > first.number);
    assert_eq!(second.total, 2);
    let mut expected = numbered(&[2, 4, 6], first.number);
    expected.extend(numbered(&[1, 8], second.number));
    expected.sort_unstable();
    assert_eq!(redriven(&*store, "h").await, expected);
    let others = store.redriven("h", &[first.number], ALL).await.unwrap();
    assert!(!others.is_empty() && others.iter().all(|left| left.redrive != first.number));

    // One that finds nothing is over.
    let third = store.start_redrive(&what).await.unwrap();
    assert_eq!((third.state, third.total, third.left), (RedriveState::Done, 0, 0));
    assert_eq!(third.ended_at, Some(third.started_at));
    assert_eq!(find(&*store, third.number).await, third);

    // Kept again or finished, a row leaves; with the last of them the redrive ends.
    save(&*store, "h", epoch, 9, keep([dead(4), retrying(6)])).await.unwrap();
    assert_eq!(find(&*store, first.number).await.left, 1);
    store.end_redrives().await.unwrap();
    assert_eq!(find(&*store, first.number).await.state, RedriveState::Running);
    save(&*store, "h", epoch, 9, [Change::Finish(Position(2))]).await.unwrap();
    assert_eq!(redriven(&*store, "h").await, numbered(&[1, 8], second.number));
    assert_eq!(letter(&*store, "h", 4).await.redrive, None);
    store.end_redrives().await.unwrap();
    let ended = find(&*store, first.number).await;
    assert_eq!((ended.state, ended.total, ended.left), (RedriveState::Done, 3, 0));
    assert!(ended.ended_at.is_some_and(|at| at >= ended.started_at));
    assert_eq!(find(&*store, second.number).await.state, RedriveState::Running);
    store.end_redrives().await.unwrap();
    assert_eq!(find(&*store, first.number).await, ended);

    // Rows that a rewind removes leave as well.
    store.rewind("h", epoch, Position::START, None).await.unwrap();
    store.end_redrives().await.unwrap();
    assert_eq!(find(&*store, second.number).await.state, RedriveState::Done);
    let numbers: Vec<_> =
        store.redrives(0, ALL).await.unwrap().iter().map(|redrive| redrive.number).collect();
    assert_eq!(numbers, [first.number, second.number, third.number]);
    assert_eq!(store.redrives(third.number, ALL).await.unwrap(), []);
    assert_eq!(store.redrive(third.number + 1).await.unwrap(), None);
}

pub async fn D6_a_cancelled_redrive_puts_back_what_it_has_left(fixture: &dyn Fixture) {
    let store = fixture.open().await;
    let epoch = run(&*store, "h").await;
    save(&*store, "h", epoch, 9, keep([dead(1), dead(2), dead(3), dead(4)])).await.unwrap();
    let before = letter(&*store, "h", 3).await;
    let some = DeadLetterFilter { positions: vec![1, 2, 3], ..DeadLetterFilter::default() };
    let cancelled = store.start_redrive(&redrive(some, RedriveAction::Retry)).await.unwrap();
    let kept = store.start_redrive(&redrive(of("h"), RedriveAction::Retry)).await.unwrap();
    save(&*store, "h", epoch, 9, [Change::Finish(Position(1))]).await.unwrap();

    let after = store.cancel_redrive(cancelled.number, &entry("cancel")).await.unwrap().unwrap();
    assert_eq!((after.state, after.total, after.left), (RedriveState::Cancelled, 3, 2));
    assert!(after.ended_at.is_some());
    assert_eq!(find(&*store, cancelled.number).await, after);
    assert_eq!(letter(&*store, "h", 3).await, before);
    assert_eq!(redriven(&*store, "h").await, [(4, kept.number)]);
    assert_eq!(store.audits(0, ALL).await.unwrap()[0].action, "cancel");

    // Again, nothing happens; nor to one that is done, or that does not exist.
    let audits = store.audits(0, ALL).await.unwrap().len();
    let again = store.cancel_redrive(cancelled.number, &entry("cancel")).await.unwrap();
    assert_eq!(again, Some(after.clone()));
    save(&*store, "h", epoch, 9, [Change::Finish(Position(4))]).await.unwrap();
    store.end_redrives().await.unwrap();
    let done = find(&*store, kept.number).await;
    let again = store.cancel_redrive(kept.number, &entry("cancel")).await.unwrap();
    assert_eq!(again, Some(done));
    assert_eq!(store.cancel_redrive(99, &entry("cancel")).await.unwrap(), None);
    assert_eq!(store.audits(0, ALL).await.unwrap().len(), audits);
    // What was put back is there for the next one.
    let next = store.start_redrive(&redrive(of("h"), RedriveAction::Retry)).await.unwrap();
    assert_eq!(next.total, 2);
}

pub async fn D6_a_discard_of_a_handler_that_nobody_runs(fixture: &dyn Fixture) {
    let store = fixture.open().await;
    for handler in ["gone", "other"] {
        let epoch = run(&*store, handler).await;
        let kept = [dead(1), dead(2), parked(3), dead(4), dead(5)];
        save(&*store, handler, epoch, 9, keep(kept)).await.unwrap();
        // Whoever ran it has ended.
        store.release(handler, epoch).await.unwrap();
    }
    let at = |positions: &[u64]| DeadLetterFilter {
        positions: positions.to_vec(),
        ..DeadLetterFilter::default()
    };
    store.start_redrive(&redrive(at(&[1]), RedriveAction::Retry)).await.unwrap();
    let discard = store.start_redrive(&redrive(at(&[2, 4]), RedriveAction::Discard)).await.unwrap();
    assert_eq!(discard.total, 4);
    let others = ["other".to_owned(), "nobody".to_owned()];
    store.discard_orphans(&others).await.unwrap();
    assert_eq!(positions(&*store, "gone").await, [1, 3, 5]);
    assert_eq!(positions(&*store, "other").await, [1, 2, 3, 4, 5]);
    assert_eq!(find(&*store, discard.number).await.left, 2);
    // One that was cancelled discards nothing.
    store.cancel_redrive(discard.number, &entry("cancel")).await.unwrap();
    store.discard_orphans(&[]).await.unwrap();
    assert_eq!(positions(&*store, "other").await, [1, 2, 3, 4, 5]);

    // What another process runs is not an orphan, where there can be other processes.
    if store.is_shared() {
        let epoch = run(&*store, "other").await;
        store.start_redrive(&redrive(of("other"), RedriveAction::Discard)).await.unwrap();
        store.discard_orphans(&[]).await.unwrap();
        assert_eq!(positions(&*store, "other").await, [1, 2, 3, 4, 5]);
        store.release("other", epoch).await.unwrap();
        store.discard_orphans(&[]).await.unwrap();
        // The first redrive has taken 1 up, to be tried again.
        assert_eq!(positions(&*store, "other").await, [1, 3]);
    }
}

pub async fn D6_quarantine_is_taken_up_and_settled(fixture: &dyn Fixture) {
    let store = fixture.open().await;
    let reasons = ["not UTF-8", "50% of it", "no JSON", "no JSON", "50x of it"];
    let mut entries: Vec<_> = reasons.iter().map(|reason| bad(b"body", reason)).collect();
    if let pulsebus::store::Entry::Quarantine(held) = &mut entries[3] {
        held.message.origin.source = "elsewhere".into();
    }
    let batch = Batch { recorded_at: at(5), ..Batch::new(entries) };
    store.append(&batch).await.unwrap();
    let later = Batch { recorded_at: at(9), ..Batch::new(vec![bad(b"late", "no JSON")]) };
    store.append(&later).await.unwrap();
    let numbers: Vec<_> =
        store.quarantine(0, ALL).await.unwrap().iter().map(|entry| entry.number).collect();
    assert_eq!(numbers.len(), 6);

    // Each filter by itself: started, looked at, and cancelled again.
    let none = QuarantineFilter::default;
    for (filter, expected) in [
        (none(), vec![0, 1, 2, 3, 4, 5]),
        (QuarantineFilter { numbers: vec![numbers[1], numbers[3], 99], ..none() }, vec![1, 3]),
        (QuarantineFilter { source: Some("elsewhere".to_owned()), ..none() }, vec![3]),
        (QuarantineFilter { reason: Some("JSON".to_owned()), ..none() }, vec![2, 3, 5]),
        (QuarantineFilter { reason: Some("json".to_owned()), ..none() }, vec![]),
        (QuarantineFilter { reason: Some("50%".to_owned()), ..none() }, vec![1]),
        (QuarantineFilter { since: Some(at(9)), ..none() }, vec![5]),
        (QuarantineFilter { until: Some(at(9)), ..none() }, vec![0, 1, 2, 3, 4]),
        (QuarantineFilter { since: Some(at(5)), until: Some(at(5)), ..none() }, vec![]),
    ] {
        let what = NewRedrive {
            selection: Selection::Quarantine(filter.clone()),
            action: RedriveAction::Retry,
            rate: None,
            by: "a person".to_owned(),
            reason: None,
        };
        let started = store.start_redrive(&what).await.unwrap();
        assert_eq!(find(&*store, started.number).await, started);
        let left = store.redriven_quarantine(&[], ALL).await.unwrap();
        let there: Vec<_> = left.iter().map(|entry| entry.number).collect();
        let expected: Vec<_> = expected.iter().map(|&nth: &usize| numbers[nth]).collect();
        assert_eq!(there, expected, "{filter:?}");
        assert_eq!(started.total, expected.len() as u64);
        assert!(left.iter().all(|entry| entry.redrive == started.number && entry.rate.is_none()));
        store.cancel_redrive(started.number, &entry("cancel")).await.unwrap();
        assert_eq!(store.redriven_quarantine(&[], ALL).await.unwrap(), []);
    }

    let what = NewRedrive {
        selection: Selection::Quarantine(none()),
        action: RedriveAction::Discard,
        rate: Some(3),
        by: "a person".to_owned(),
        reason: Some("of no use".to_owned()),
    };
    let started = store.start_redrive(&what).await.unwrap();
    let left = store.redriven_quarantine(&[], 2).await.unwrap();
    assert_eq!(left.iter().map(|entry| entry.number).collect::<Vec<_>>(), numbers[..2]);
    assert_eq!((left[0].action, left[0].rate), (RedriveAction::Discard, Some(3)));
    store.settle_quarantine(&[]).await.unwrap();
    let stays = |nth: usize, reason: &str| SettledEntry::Stays {
        number: numbers[nth],
        reason: reason.to_owned(),
    };
    store
        .settle_quarantine(&[
            SettledEntry::Gone(numbers[0]),
            stays(1, "still no JSON \"at all\" ü"),
            SettledEntry::Gone(numbers[2]),
            stays(3, "nor this"),
        ])
        .await
        .unwrap();
    assert_eq!(find(&*store, started.number).await.left, 2);
    assert_eq!(store.quarantine_len().await.unwrap(), 4);
    let there: Vec<_> = store
        .quarantine(0, ALL)
        .await
        .unwrap()
        .into_iter()
        .map(|entry| (entry.number, entry.reason))
        .collect();
    assert_eq!(
        there,
        [
            (numbers[1], "still no JSON \"at all\" ü".to_owned()),
            (numbers[3], "nor this".to_owned()),
            (numbers[4], "50x of it".to_owned()),
            (numbers[5], "no JSON".to_owned()),
        ]
    );
    let (_, body) = store.quarantine_entry(numbers[1]).await.unwrap().unwrap();
    assert_eq!(&body[..], b"body");
    store.end_redrives().await.unwrap();
    assert_eq!(find(&*store, started.number).await.state, RedriveState::Running);
    let gone = [SettledEntry::Gone(numbers[4]), SettledEntry::Gone(numbers[5])];
    store.settle_quarantine(&gone).await.unwrap();
    store.settle_quarantine(&gone).await.unwrap();
    store.end_redrives().await.unwrap();
    assert_eq!(find(&*store, started.number).await.state, RedriveState::Done);
    // A number that is gone is not given again.
    store.append(&later).await.unwrap();
    let last = store.quarantine(0, ALL).await.unwrap().pop().unwrap();
    assert_eq!(last.number, numbers[5] + 1);
}

pub async fn D7_what_persons_did_is_in_the_audit(fixture: &dyn Fixture) {
    let store = fixture.open().await;
    assert_eq!(store.audits(0, ALL).await.unwrap(), []);
    let nobody = store.set_paused("h", true, &entry("pause")).await.unwrap();
    assert!(!nobody);
    assert_eq!(store.audits(0, ALL).await.unwrap(), []);
    let epoch = run(&*store, "h").await;
    let paused = entry("pause");
    assert!(store.set_paused("h", true, &paused).await.unwrap());
    assert!(store.renew("h", epoch, MINUTE).await.unwrap());
    let epoch = take(&*store, wants("h", "one")).await;
    assert!(epoch.paused);
    assert!(store.set_paused("h", false, &entry("resume")).await.unwrap());
    assert!(!store.renew("h", epoch.epoch, MINUTE).await.unwrap());

    save(&*store, "h", epoch.epoch, 9, keep([dead(1)])).await.unwrap();
    let started = store.start_redrive(&redrive(of("h"), RedriveAction::Discard)).await.unwrap();
    store.audit(&entry("rebuild")).await.unwrap();
    for store in [store.clone(), fixture.open().await] {
        let all = store.audits(0, ALL).await.unwrap();
        let actions: Vec<_> = all.iter().map(|entry| &*entry.action).collect();
        assert_eq!(actions, ["rebuild", "discard", "resume", "pause"]);
        assert!(all.windows(2).all(|two| two[0].number > two[1].number));
        assert!(all[3].number > 0);
        let last = AuditEntry { number: all[3].number, ..paused.clone() };
        assert_eq!(all[3], last);
        assert_eq!(all[1].by, "a person");
        assert_eq!(all[1].subject, format!("redrive {}", started.number));
        assert_eq!(all[1].at, started.started_at);
        let detail: serde_json::Value = serde_json::from_str(&all[1].detail).unwrap();
        assert_eq!(detail["filter"]["handler"], "h");
        assert_eq!(detail["reason"], "they are old");
        assert_eq!(detail["total"], 1);
        assert_eq!(store.audits(all[1].number, 1).await.unwrap(), all[2..3]);
        assert_eq!(store.audits(all[3].number, ALL).await.unwrap(), []);
    }
}

pub async fn D8_a_handler_adopts_the_progress_of_another(fixture: &dyn Fixture) {
    let store = fixture.open().await;
    let to = run(&*store, "h").await;
    let from = run(&*store, "h rebuilt").await;
    save(&*store, "h", to, 9, keep([dead(1), dead(2)])).await.unwrap();
    save(&*store, "h rebuilt", from, 7, keep([dead(2), parked(5)])).await.unwrap();
    let letter_before = letter(&*store, "h rebuilt", 2).await;
    store.adopt(("h rebuilt", from), ("h", to)).await.unwrap();
    for store in [store.clone(), fixture.open().await] {
        assert_eq!(store.cursor("h").await.unwrap(), Some(Position(7)));
        assert_eq!(rows(&*store, "h").await, [bare(&dead(2)), parked(5)]);
        assert_eq!(letter(&*store, "h", 2).await.failure, letter_before.failure);
        assert_eq!(store.cursor("h rebuilt").await.unwrap(), None);
        assert!(positions(&*store, "h rebuilt").await.is_empty());
    }
    fenced(store.renew("h rebuilt", from, MINUTE).await, "h rebuilt");
    save(&*store, "h", to, 8, []).await.unwrap();
}

/// Not a clause of its own: what the doc comments of the lists say.
pub async fn dead_letters_are_found_page_by_page(fixture: &dyn Fixture) {
    let store = fixture.open().await;
    for handler in ["a", "b", "c"] {
        let epoch = run(&*store, handler).await;
        let mut changes: Vec<_> = (1..=6).map(|n| Change::Keep(dead(n))).collect();
        changes.push(Change::Keep(retrying(7)));
        changes.extend((8..=12).map(|n| Change::Keep(parked(n))));
        changes.push(Change::Keep(dead(10 + u64::from(handler == "b") * 10)));
        let mut by_position = BTreeMap::new();
        for change in changes {
            by_position.insert(change.position(), change);
        }
        save(&*store, handler, epoch, 30, by_position.into_values()).await.unwrap();
    }
    let all: Vec<_> = ["a", "b", "c"]
        .iter()
        .flat_map(|handler| {
            let last = if *handler == "b" { 20 } else { 10 };
            [1, 2, 3, 4, 5, 6, last].map(|position| ((*handler).to_owned(), position))
        })
        .collect();
    let none = DeadLetterFilter::default();
    assert_eq!(letters(&*store, &none).await, all);

    for limit in [1, 2, 3, 7, 20] {
        for filter in [none.clone(), of("b")] {
            let expected: Vec<_> = all
                .iter()
                .filter(|(handler, _)| filter.handler.as_ref().is_none_or(|of| of == handler))
                .cloned()
                .collect();
            let mut found: Vec<(String, u64)> = Vec::new();
            loop {
                let after = found.last().cloned();
                let after = after.as_ref().map(|(h, position)| (&**h, Position(*position)));
                let page = store.dead_letters(&filter, after, limit).await.unwrap();
                assert!(page.len() <= limit);
                if page.is_empty() {
                    break;
                }
                found.extend(page.iter().map(|l| (l.handler.to_string(), l.position.0)));
            }
            assert_eq!(found, expected, "pages of {limit}");
        }
    }
    // Behind one that is not there, also of another handler.
    let after = store.dead_letters(&none, Some(("b", Position(7))), 2).await.unwrap();
    let after: Vec<_> = after.iter().map(|l| (&*l.handler, l.position.0)).collect();
    assert_eq!(after, [("b", 20), ("c", 1)]);
    let after = store.dead_letters(&of("b"), Some(("a", Position(99))), 1).await.unwrap();
    assert_eq!((&*after[0].handler, after[0].position.0), ("b", 1));
    assert!(store.dead_letters(&of("b"), Some(("c", Position(0))), 9).await.unwrap().is_empty());

    let text = |text: &str| Some(text.to_owned());
    for (filter, expected) in [
        (of("nobody"), vec![]),
        (DeadLetterFilter { kind: text("B"), ..of("a") }, vec![1, 3, 5]),
        (DeadLetterFilter { kind: text("b"), ..of("a") }, vec![]),
        (DeadLetterFilter { key: text("key 1"), ..of("a") }, vec![1, 4, 10]),
        (DeadLetterFilter { key: text("key _"), ..of("a") }, vec![]),
        (DeadLetterFilter { positions: vec![2, 6, 7, 99], ..of("a") }, vec![2, 6]),
        (DeadLetterFilter { error: text("error 1"), ..of("a") }, vec![1, 10]),
        (DeadLetterFilter { error: text("r 1"), ..of("a") }, vec![1, 10]),
        (DeadLetterFilter { error: text("Error"), ..of("a") }, vec![]),
        (DeadLetterFilter { error: text("%"), ..of("a") }, vec![]),
        (DeadLetterFilter { error: text("error _"), ..of("a") }, vec![]),
        (DeadLetterFilter { error: text(""), ..of("a") }, vec![1, 2, 3, 4, 5, 6, 10]),
        (DeadLetterFilter { since: Some(at(5)), ..of("a") }, vec![5, 6, 10]),
        (DeadLetterFilter { until: Some(at(5)), ..of("a") }, vec![1, 2, 3, 4]),
        (
            DeadLetterFilter {
                kind: text("A"),
                since: Some(at(2)),
                until: Some(at(10)),
                key: text("key 1"),
                ..of("a")
            },
            vec![4],
        ),
    ] {
        let found = letters(&*store, &filter).await;
        assert!(found.iter().all(|(handler, _)| handler == "a"), "{filter:?}");
        let found: Vec<_> = found.into_iter().map(|(_, position)| position).collect();
        assert_eq!(found, expected, "{filter:?}");
        // A redrive takes up the same, and hands them back.
        let started = store.start_redrive(&redrive(filter, RedriveAction::Retry)).await.unwrap();
        let taken: Vec<_> =
            redriven(&*store, "a").await.into_iter().map(|(position, _)| position).collect();
        assert_eq!(taken, expected);
        store.cancel_redrive(started.number, &entry("cancel")).await.unwrap();
    }
    let both = DeadLetterFilter { positions: vec![3], ..none.clone() };
    assert_eq!(letters(&*store, &both).await.len(), 3);
    let keyed = DeadLetterFilter { key: text("key 2"), kind: text("A"), ..none };
    assert_eq!(letters(&*store, &keyed).await.len(), 4, "2 of each, and 20");

    // The letter as it is, and what waits behind it: 8 and 11 have its key, and are parked.
    let found = letter(&*store, "a", 2).await;
    let event = dead(2);
    assert_eq!(
        found,
        DeadLetter {
            handler: "a".into(),
            position: Position(2),
            id: event.id,
            kind: event.kind,
            key: event.key,
            attempts: 3,
            failure: event.failure.unwrap(),
            followers: 2,
            redrive: None,
        }
    );
    assert_eq!(letter(&*store, "a", 10).await.followers, 0);
    assert_eq!(letter(&*store, "a", 1).await.followers, 0, "10 is dead, and 7 is retrying");
    assert_eq!(letter(&*store, "b", 1).await.followers, 1);
}

pub async fn dead_letters_are_published_once(fixture: &dyn Fixture) {
    let store = fixture.open().await;
    let epoch = run(&*store, "h").await;
    let other = run(&*store, "other").await;
    let waiting =
        |position| Unfinished { standing: Standing::Dead { unpublished: true }, ..dead(position) };
    let kept = [dead(1), waiting(2), waiting(4), parked(5), waiting(6)];
    save(&*store, "h", epoch, 9, keep(kept)).await.unwrap();
    save(&*store, "other", other, 9, keep([waiting(2)])).await.unwrap();
    let unpublished = async |limit| -> Vec<u64> {
        let found = store.unpublished("h", limit).await.unwrap();
        found.iter().map(|letter| letter.position.0).collect()
    };
    assert_eq!(unpublished(ALL).await, [2, 4, 6]);
    assert_eq!(unpublished(2).await, [2, 4]);
    assert_eq!(store.unpublished("h", 1).await.unwrap(), [letter(&*store, "h", 2).await]);
    store.mark_published("h", &[]).await.unwrap();
    let failed_at = async |position| {
        (Position(position), letter(&*store, "h", position).await.failure.last_failed_at)
    };
    // One that has failed again since is not the one that was published.
    let (four, at) = failed_at(4).await;
    store.mark_published("h", &[(four, at - time::Duration::SECOND)]).await.unwrap();
    assert_eq!(unpublished(ALL).await, [2, 4, 6]);
    let (one, two, six) = (failed_at(1).await, failed_at(2).await, failed_at(6).await);
    let published = [one, two, (Position(5), at), six, (Position(99), at)];
    store.mark_published("h", &published).await.unwrap();
    assert_eq!(unpublished(ALL).await, [4]);
    assert_eq!(store.unpublished("other", ALL).await.unwrap().len(), 1);
    let standings: Vec<_> = rows(&*store, "h").await.iter().map(|row| row.standing).collect();
    let done = Standing::Dead { unpublished: false };
    assert_eq!(
        standings,
        [done, done, Standing::Dead { unpublished: true }, Standing::Parked, done]
    );
    // Tried again, it need not be published any more; dead again, it must.
    save(&*store, "h", epoch, 9, keep([retrying(4), waiting(2)])).await.unwrap();
    assert_eq!(unpublished(ALL).await, [2]);
}

pub async fn texts_are_kept_as_far_as_the_database_can(fixture: &dyn Fixture) {
    let store = fixture.open().await;
    let epoch = run(&*store, "ünï 'h'").await;
    let long = "😀 long ".repeat(20_000);
    let odd = Unfinished {
        key: long.as_str().into(),
        kind: long.as_str().into(),
        failure: failure("ü \"quoted\" \\ '; DROP TABLE unfinished;--\n", 1),
        ..dead(1)
    };
    let nul = Unfinished { key: "a\0b".into(), failure: failure("c\0d", 1), ..dead(2) };
    save(&*store, "ünï 'h'", epoch, 9, keep([odd.clone(), nul.clone()])).await.unwrap();
    let found = letter(&*store, "ünï 'h'", 1).await;
    assert_eq!((&found.key, &found.kind), (&odd.key, &odd.kind));
    assert_eq!(Some(found.failure), odd.failure);
    let by_key = DeadLetterFilter { key: Some(long), ..of("ünï 'h'") };
    assert_eq!(letters(&*store, &by_key).await.len(), 1);

    // U+0000 is not what any database keeps; such a row must not keep a handler from going on.
    let found = letter(&*store, "ünï 'h'", 2).await;
    if store.kind() == "memory" {
        assert_eq!(found.key, nul.key);
    } else {
        assert_eq!(&*found.key, "a\u{fffd}b");
        assert_eq!(&*found.failure.last_error, "c\u{fffd}d");
    }
    let by_key = DeadLetterFilter { key: Some("a\0b".to_owned()), ..of("ünï 'h'") };
    assert_eq!(letters(&*store, &by_key).await.len(), 1);
    store.start_redrive(&redrive(by_key, RedriveAction::Retry)).await.unwrap();
    let mut by = entry("pause");
    by.by = "a\0person".to_owned();
    store.audit(&by).await.unwrap();
    assert_eq!(store.audits(0, 1).await.unwrap().len(), 1);
}
