use std::{collections::BTreeMap, time::Duration};

use proptest::prelude::*;

use super::*;
use crate::event::{Event, EventParts, Format, Headers, Origin};

fn event(position: u64) -> Arc<StoredEvent> {
    let event = Event::from_parts(EventParts {
        id: position.to_string().into(),
        source: "/".into(),
        kind: "t".into(),
        subject: None,
        time: None,
        key: "k".into(),
        format: Format::Raw,
        headers: Headers::new(),
        origin: Origin::default(),
        body: "{}".into(),
    });
    let recorded_at = crate::event::now();
    Arc::new(StoredEvent { position: Position(position), recorded_at, event })
}

fn item(position: u64, key: &str) -> Item {
    Item::new(lane_of(key), event(position))
}

fn lanes(items: &[(u64, &str)]) -> Lanes {
    let mut lanes = Lanes::new(1_000);
    for (position, key) in items {
        lanes.push(item(*position, key));
    }
    lanes
}

fn positions(items: &[Item]) -> Vec<u64> {
    items.iter().map(|item| item.position().0).collect()
}

fn spill(lanes: &mut Lanes) -> Vec<u64> {
    let mut kept = Vec::new();
    lanes.spill(|_, entry| kept.push(entry.position.0));
    kept.sort_unstable();
    kept
}

fn load(lanes: &mut Lanes, max: usize) -> Vec<u64> {
    let wanted = lanes.wanted(max);
    lanes.loaded(&wanted, wanted.iter().map(|(position, _)| event(position.0)));
    wanted.iter().map(|(position, _)| position.0).collect()
}

const SOON: Duration = Duration::from_secs(60);

#[test]
fn G5_a_running_lane_gives_nothing_more() {
    let mut lanes = lanes(&[(1, "a"), (2, "a"), (3, "b"), (4, "a")]);
    let first = lanes.take(10, 1);
    assert_eq!(positions(&first), [1, 3]);
    assert!(!lanes.has_ready());
    lanes.push(item(5, "a"));
    assert!(!lanes.has_ready());
    lanes.finish(&first[0]);
    assert_eq!(positions(&lanes.take(10, 10)), [2, 4, 5]);
    assert_eq!((lanes.unfinished(), lanes.running()), (4, 4));
}

#[test]
fn G5_what_goes_again_goes_first_and_in_order() {
    let mut lanes = lanes(&[(1, "a"), (2, "a"), (3, "a"), (4, "a")]);
    let chunk = lanes.take(3, 3);
    lanes.finish(&chunk[0]);
    for again in chunk.into_iter().skip(1).rev() {
        assert!(!lanes.has_ready());
        lanes.again(again, Turn::Now);
    }
    assert_eq!(positions(&lanes.take(10, 10)), [2, 3, 4]);
}

#[test]
fn G5_a_lane_that_waits_is_spilled_and_goes_on_in_order() {
    let mut lanes = lanes(&[(1, "a"), (2, "b"), (3, "a")]);
    let failed = lanes.take(1, 1).remove(0);
    let now = Instant::now();
    lanes.again(failed, Turn::At(now + SOON));
    assert_eq!((lanes.waiting(), lanes.parked(), lanes.held()), (1, 1, 3));
    assert_eq!(spill(&mut lanes), [1, 3]);
    assert_eq!((lanes.stubs(), lanes.held(), lanes.bytes()), (2, 1, 2));
    // What comes in behind is spilled as well, once.
    lanes.push(item(4, "a"));
    assert_eq!((lanes.parked(), spill(&mut lanes)), (2, vec![4]));
    assert!(spill(&mut lanes).is_empty());
    assert_eq!(positions(&lanes.take(10, 10)), [2]);

    lanes.wake(now);
    assert!(!lanes.has_hungry());
    lanes.wake(now + SOON);
    assert_eq!((lanes.waiting(), lanes.parked()), (0, 0));
    assert_eq!(load(&mut lanes, 2), [1, 3]);
    let chunk = lanes.take(10, 10);
    assert_eq!(positions(&chunk), [1, 3]);
    assert!(chunk.iter().all(|item| item.track.kept));
    // Live events queue behind what is still in the store, and do not overtake it.
    lanes.push(item(5, "a"));
    chunk.iter().for_each(|item| lanes.finish(item));
    assert!(!lanes.has_ready());
    assert_eq!(load(&mut lanes, 10), [4]);
    assert_eq!(positions(&lanes.take(10, 10)), [4, 5]);
}

#[test]
fn G5_a_dead_letter_holds_its_lane_until_it_is_taken_back_or_out() {
    for retried in [true, false] {
        let mut lanes = lanes(&[(1, "a"), (2, "a")]);
        let dead = lanes.take(1, 1).remove(0);
        lanes.again(dead, Turn::Dead);
        spill(&mut lanes);
        assert_eq!((lanes.dead(), lanes.parked(), lanes.stubs()), (1, 1, 2));
        lanes.wake(Instant::now() + SOON);
        assert!(!lanes.has_hungry());
        let lane = lane_of("a");
        if retried {
            lanes.insert(lane, Entry::stub(Position(1), Turn::Now, 0));
            assert_eq!(load(&mut lanes, 10), [1, 2]);
        } else {
            assert!(lanes.remove(lane, Position(1)));
            assert!(!lanes.remove(lane, Position(1)));
            assert_eq!(load(&mut lanes, 10), [2]);
        }
        assert_eq!((lanes.dead(), lanes.parked(), lanes.stubs()), (0, 0, 0));
    }
}

#[test]
fn G5_what_is_taken_back_before_a_running_one_goes_first_and_hides_nothing() {
    let mut lanes = lanes(&[(5, "a"), (10, "a")]);
    let five = lanes.take(1, 1).remove(0);
    // Dead, and its lane goes on behind it.
    lanes.finish(&five);
    let ten = lanes.take(1, 1).remove(0);
    lanes.insert(lane_of("a"), Entry::stub(Position(5), Turn::Now, 0));
    let now = Instant::now();
    lanes.again(ten, Turn::At(now));
    assert_eq!(load(&mut lanes, 10), [5]);
    let five = lanes.take(1, 1).remove(0);
    lanes.finish(&five);
    spill(&mut lanes);
    lanes.wake(now);
    assert_eq!(load(&mut lanes, 10), [10]);
    assert_eq!(positions(&lanes.take(1, 1)), [10]);
}

#[test]
fn what_is_to_be_tried_alone_is_taken_alone() {
    let mut lanes = Lanes::new(1_000);
    for (position, key) in [(1, "a"), (2, "b"), (3, "b"), (4, "c")] {
        let track = Track { alone: position == 2, ..Track::default() };
        lanes.push(Item { track, ..item(position, key) });
    }
    assert_eq!(positions(&lanes.take(10, 10)), [1]);
    let alone = lanes.take(10, 10);
    assert_eq!(positions(&alone), [2]);
    lanes.finish(&alone[0]);
    assert_eq!(positions(&lanes.take(10, 10)), [4, 3]);
}

#[test]
fn G7_too_many_behind_a_failed_one_is_said_until_they_are_fewer() {
    let mut lanes = Lanes::new(3);
    lanes.push(item(1, "a"));
    let failed = lanes.take(1, 1).remove(0);
    let now = Instant::now();
    lanes.again(failed, Turn::At(now));
    for position in 2..=4 {
        assert!(!lanes.is_overlong());
        lanes.push(item(position, "a"));
    }
    assert!(lanes.is_overlong());
    spill(&mut lanes);
    assert!(lanes.is_overlong());
    lanes.wake(now);
    load(&mut lanes, 10);
    lanes.take(1, 1);
    assert!(!lanes.is_overlong());
}

#[test]
fn G7_finished_lanes_leave_nothing_behind() {
    let mut lanes = Lanes::new(1_000);
    for position in 0..10_000 {
        lanes.push(item(position, &position.to_string()));
        for done in lanes.take(10, 10) {
            lanes.finish(&done);
        }
    }
    assert!(lanes.lanes.is_empty());
    assert_eq!(lanes.unfinished(), 0);
    assert!(lanes.spare.len() <= SPARE);
}

proptest! {
    /// Whatever happens to lanes: each gives its events one after the other, in order, and
    /// the counts are those of what is in them.
    #[test]
    fn G5_any_history_keeps_each_lane_in_order(
        steps in proptest::collection::vec((0u8..10, 0u64..4, 1usize..6), 1..400),
    ) {
        let mut lanes = Lanes::new(10);
        let mut next = 1;
        let now = Instant::now();
        let mut clock = now;
        let mut out: Vec<Item> = Vec::new();
        // What each lane still has to give, dead ones apart.
        let mut model: BTreeMap<LaneId, Vec<u64>> = BTreeMap::new();
        let mut dead: BTreeMap<LaneId, u64> = BTreeMap::new();
        // Dead ones that their lanes have passed.
        let mut passed: Vec<(LaneId, u64)> = Vec::new();
        for (step, key, n) in steps {
            match step {
                0..=2 => {
                    let item = item(next, &key.to_string());
                    model.entry(item.lane).or_default().push(next);
                    lanes.push(item);
                    next += 1;
                }
                3 => for item in lanes.take(n, n) {
                    let runs = |p: &u64| out.iter().any(|item| item.position().0 == *p);
                    let next = model[&item.lane].iter().find(|p| !runs(p));
                    prop_assert_eq!(next, Some(&item.position().0));
                    out.push(item);
                },
                4 if !out.is_empty() => {
                    // The first of its lane ends; the others of it go back, in order.
                    let first = out.remove(0);
                    let lane = first.lane;
                    let (back, stay): (Vec<_>, Vec<_>) =
                        std::mem::take(&mut out).into_iter().partition(|i| i.lane == lane);
                    out = stay;
                    match n {
                        1 => {
                            let position = first.position().0;
                            model.get_mut(&lane).unwrap().retain(|p| *p != position);
                            passed.push((lane, position));
                            lanes.finish(&first);
                            back.into_iter().rev().for_each(|i| lanes.again(i, Turn::Now));
                        }
                        2 if model[&lane][0] == first.position().0 => {
                            dead.insert(lane, first.position().0);
                            back.into_iter().rev().for_each(|i| lanes.again(i, Turn::Now));
                            lanes.again(first, Turn::Dead);
                        }
                        _ => {
                            back.into_iter().rev().for_each(|i| lanes.again(i, Turn::Now));
                            let after = Duration::from_millis(n as u64);
                            lanes.again(first, Turn::At(clock + after));
                        }
                    }
                }
                5 => {
                    clock += Duration::from_millis(n as u64);
                    lanes.wake(clock);
                }
                6 => { spill(&mut lanes); }
                7 => { load(&mut lanes, n); }
                9 => if let Some((lane, position)) = passed.pop() {
                    // Taken back, whatever its lane is doing. A dead front would not be one
                    // any more.
                    if !dead.contains_key(&lane) {
                        let all = model.entry(lane).or_default();
                        all.push(position);
                        all.sort_unstable();
                        let entry = Entry::stub(Position(position), Turn::Now, 0);
                        lanes.insert(lane, entry);
                    }
                },
                8 => {
                    let lane = lane_of(&key.to_string());
                    if let Some(position) = dead.remove(&lane) {
                        if n > 2 {
                            let entry = Entry::stub(Position(position), Turn::Now, 0);
                            lanes.insert(lane, entry);
                        } else {
                            prop_assert!(lanes.remove(lane, Position(position)));
                            let left = model.get_mut(&lane).unwrap();
                            left.retain(|p| *p != position);
                        }
                    }
                }
                _ => {}
            }
            let left: usize = model.values().map(Vec::len).sum();
            prop_assert_eq!(lanes.unfinished(), left);
            prop_assert_eq!(lanes.running(), out.len());
            prop_assert_eq!(lanes.bytes(), lanes.held() * 2);
            let blocked = |lane: &&Lane| lane.block != Block::No;
            let behind: usize =
                lanes.lanes.values().filter(blocked).map(|lane| lane.queue.len() - 1).sum();
            prop_assert_eq!(lanes.parked(), behind);
            prop_assert_eq!(lanes.dead(), dead.len());
        }
        // Left to itself, everything comes out.
        for (lane, position) in dead {
            lanes.insert(lane, Entry::stub(Position(position), Turn::Now, 0));
        }
        clock += SOON;
        while lanes.unfinished() > 0 {
            out.drain(..).for_each(|item| {
                let all = model.get_mut(&item.lane).unwrap();
                all.retain(|p| *p != item.position().0);
                lanes.finish(&item);
            });
            lanes.wake(clock);
            load(&mut lanes, 100);
            out = lanes.take(100, 100);
            prop_assert!(!out.is_empty() || lanes.unfinished() == 0);
        }
        prop_assert!(lanes.lanes.is_empty());
    }
}
