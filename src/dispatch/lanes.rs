//! Keyed lanes: events of one lane run one after the other, lanes run side by side.
//!
//! A lane exists while it has unfinished events. It is *ready* (queued and free), *running*
//! (some of its events are with a worker) or *held* (waiting for a retry, or parked behind a
//! dead letter). Only ready lanes are in the queue that workers are fed from, so a lane that
//! waits costs nobody else anything.

use std::{collections::VecDeque, hash::BuildHasher as _, sync::Arc};

use rustc_hash::{FxBuildHasher, FxHashMap};

use crate::event::{Position, StoredEvent};

/// A lane: the hash of a key. Two keys that share a hash share a lane, which keeps more order
/// than was asked for and never less.
pub(super) type LaneId = u64;

/// The lane of a key.
pub(super) fn lane_of(key: &str) -> LaneId {
    FxBuildHasher.hash_one(key)
}

/// An event on its way through a handler.
#[derive(Debug, Clone)]
pub(super) struct Item {
    pub(super) lane: LaneId,
    pub(super) event: Arc<StoredEvent>,
    /// It was in a batch that failed as a whole: it is tried on its own.
    pub(super) alone: bool,
}

impl Item {
    pub(super) fn position(&self) -> Position {
        self.event.position
    }
}

#[derive(Debug, Default)]
struct Lane {
    queue: VecDeque<Item>,
    running: usize,
    held: bool,
}

/// All lanes of a handler that have unfinished events.
#[derive(Debug, Default)]
pub(super) struct Lanes {
    lanes: FxHashMap<LaneId, Lane>,
    ready: VecDeque<LaneId>,
    /// Emptied queues, kept for their memory.
    spare: Vec<VecDeque<Item>>,
    queued: usize,
    running: usize,
}

const SPARE: usize = 1_024;

impl Lanes {
    /// Events not finished: queued, held or running.
    pub(super) const fn unfinished(&self) -> usize {
        self.queued + self.running
    }

    /// Events with workers.
    pub(super) const fn running(&self) -> usize {
        self.running
    }

    /// Whether a worker could be given something.
    pub(super) fn has_ready(&self) -> bool {
        !self.ready.is_empty()
    }

    /// Puts an event behind the others of its lane.
    pub(super) fn push(&mut self, item: Item) {
        let id = item.lane;
        let lane = self.lanes.entry(id).or_insert_with(|| Lane {
            queue: self.spare.pop().unwrap_or_default(),
            ..Lane::default()
        });
        if lane.queue.is_empty() && lane.running == 0 && !lane.held {
            self.ready.push_back(id);
        }
        lane.queue.push_back(item);
        self.queued += 1;
    }

    /// Takes up to `max` events of ready lanes, up to `per_lane` in order from each; their
    /// lanes are running until [`settle`](Self::settle). One that is to be tried
    /// [alone](Item::alone) is taken by itself.
    pub(super) fn take(&mut self, max: usize, per_lane: usize) -> Vec<Item> {
        let mut chunk = Vec::with_capacity(max.min(self.queued));
        while chunk.len() < max {
            let Some(id) = self.ready.pop_front() else { break };
            let Some(lane) = self.lanes.get_mut(&id) else { continue };
            let together = lane.queue.iter().take(per_lane).take_while(|item| !item.alone).count();
            let n = match together {
                0 if chunk.is_empty() => 1,
                0 => {
                    self.ready.push_front(id);
                    break;
                }
                n => n.min(per_lane).min(max - chunk.len()),
            };
            let last = together == 0;
            chunk.extend(lane.queue.drain(..n));
            lane.running += n;
            self.running += n;
            self.queued -= n;
            if last {
                break;
            }
        }
        chunk
    }

    /// An event came back from its worker; `again` puts it back to the front of its lane.
    ///
    /// Where several of a lane come back, those that go again must come last one first.
    pub(super) fn settle(&mut self, id: LaneId, again: Option<Item>) {
        let Some(lane) = self.lanes.get_mut(&id) else { return };
        lane.running -= 1;
        self.running -= 1;
        if let Some(item) = again {
            lane.queue.push_front(item);
            self.queued += 1;
        }
        self.release_if_free(id);
    }

    /// Holds a lane: its events wait until [`resume`](Self::resume). Call while it is running.
    pub(super) fn hold(&mut self, id: LaneId) {
        self.lanes.entry(id).or_default().held = true;
    }

    /// Lets a held lane go on.
    pub(super) fn resume(&mut self, id: LaneId) {
        if let Some(lane) = self.lanes.get_mut(&id) {
            if !lane.held {
                return;
            }
            lane.held = false;
            self.release_if_free(id);
        }
    }

    /// How many events a lane has queued.
    pub(super) fn queued_in(&self, id: LaneId) -> usize {
        self.lanes.get(&id).map_or(0, |lane| lane.queue.len())
    }

    fn release_if_free(&mut self, id: LaneId) {
        let Some(lane) = self.lanes.get_mut(&id) else { return };
        if lane.running > 0 || lane.held {
            return;
        }
        if lane.queue.is_empty() {
            if let Some(lane) = self.lanes.remove(&id)
                && self.spare.len() < SPARE
                && lane.queue.capacity() <= 64
            {
                self.spare.push(lane.queue);
            }
        } else {
            self.ready.push_back(id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::{Event, EventParts, Format, Headers, Origin};

    pub(crate) fn item(position: u64, key: &str) -> Item {
        let event = Event::from_parts(EventParts {
            id: position.to_string().into(),
            source: "/".into(),
            kind: "t".into(),
            subject: None,
            time: None,
            key: key.into(),
            format: Format::Raw,
            headers: Headers::new(),
            origin: Origin::default(),
            body: "{}".into(),
        });
        Item {
            lane: lane_of(key),
            alone: false,
            event: Arc::new(StoredEvent {
                position: Position(position),
                recorded_at: crate::event::now(),
                event,
            }),
        }
    }

    fn positions(items: &[Item]) -> Vec<u64> {
        items.iter().map(|item| item.position().0).collect()
    }

    #[test]
    fn G5_a_running_lane_gives_nothing_more() {
        let mut lanes = Lanes::default();
        for (position, key) in [(1, "a"), (2, "a"), (3, "b"), (4, "a")] {
            lanes.push(item(position, key));
        }
        assert_eq!(positions(&lanes.take(10, 1)), [1, 3]);
        assert!(!lanes.has_ready());
        lanes.push(item(5, "a"));
        assert!(!lanes.has_ready());
        lanes.settle(lane_of("a"), None);
        assert_eq!(positions(&lanes.take(10, 10)), [2, 4, 5]);
        assert_eq!((lanes.unfinished(), lanes.running()), (4, 4));
    }

    #[test]
    fn G5_what_goes_again_goes_first_and_in_order() {
        let mut lanes = Lanes::default();
        for position in 1..=4 {
            lanes.push(item(position, "a"));
        }
        let chunk = lanes.take(3, 3);
        lanes.settle(chunk[0].lane, None);
        for again in chunk.into_iter().skip(1).rev() {
            assert!(!lanes.has_ready());
            lanes.settle(again.lane, Some(again));
        }
        assert_eq!(positions(&lanes.take(10, 10)), [2, 3, 4]);
    }

    #[test]
    fn G5_a_held_lane_waits_and_the_others_do_not() {
        let mut lanes = Lanes::default();
        lanes.push(item(1, "a"));
        lanes.push(item(2, "b"));
        let failed = lanes.take(1, 1).remove(0);
        lanes.hold(failed.lane);
        let lane = failed.lane;
        lanes.settle(lane, Some(failed));
        lanes.push(item(3, "a"));
        assert_eq!(positions(&lanes.take(10, 10)), [2]);
        lanes.resume(lane);
        lanes.resume(lane);
        assert_eq!(positions(&lanes.take(10, 10)), [1, 3]);
    }

    #[test]
    fn what_is_to_be_tried_alone_is_taken_alone() {
        let mut lanes = Lanes::default();
        for (position, key) in [(1, "a"), (2, "b"), (3, "b"), (4, "c")] {
            let alone = position == 2;
            lanes.push(Item { alone, ..item(position, key) });
        }
        assert_eq!(positions(&lanes.take(10, 10)), [1]);
        assert_eq!(positions(&lanes.take(10, 10)), [2]);
        lanes.settle(lane_of("b"), None);
        assert_eq!(positions(&lanes.take(10, 10)), [4, 3]);
    }

    #[test]
    fn G7_finished_lanes_leave_nothing_behind() {
        let mut lanes = Lanes::default();
        for position in 0..10_000 {
            lanes.push(item(position, &position.to_string()));
            for done in lanes.take(10, 10) {
                lanes.settle(done.lane, None);
            }
        }
        assert!(lanes.lanes.is_empty());
        assert_eq!(lanes.unfinished(), 0);
        assert!(lanes.spare.len() <= SPARE);
    }
}
