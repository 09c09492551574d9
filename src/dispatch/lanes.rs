//! Keyed lanes: events of one lane run one after the other, lanes run side by side.
//!
//! A lane exists while it has unfinished events, which are in it in log order. Its front says
//! how it is: *ready* (a worker may have it), *hungry* (it is only in the store and has to be
//! read first) or *blocked* (it waits for its next attempt, or is dead and parks the lane).
//! Only ready lanes are in the queue that workers are fed from, so a lane that waits costs
//! nobody else anything.
//!
//! Events of a blocked lane do not stay in memory: a checkpoint [spills](Lanes::spill) them,
//! which leaves their positions here and the rest in rows of the store. So does what comes in
//! behind such events, until the lane has caught up.

use std::{
    cmp::Reverse,
    collections::{BinaryHeap, VecDeque},
    hash::BuildHasher as _,
    sync::Arc,
    time::Instant,
};

use rustc_hash::{FxBuildHasher, FxHashMap, FxHashSet};

use crate::{
    event::{Position, StoredEvent},
    store::progress::Failure,
};

/// A lane: the hash of a key. Two keys that share a hash share a lane, which keeps more order
/// than was asked for and never less.
pub(super) type LaneId = u64;

/// The lane of a key.
pub(super) fn lane_of(key: &str) -> LaneId {
    FxBuildHasher.hash_one(key)
}

/// What a handler's runner knows of an event, apart from the event.
#[derive(Debug, Clone, Default)]
pub(super) struct Track {
    /// How often it was tried.
    pub(super) attempts: u32,
    /// It has a row in the store, or will have one with the checkpoint under way.
    pub(super) kept: bool,
    /// It was in a batch that failed as a whole: it is tried on its own.
    pub(super) alone: bool,
    /// How it failed since it was last kept.
    pub(super) failure: Option<Box<Failure>>,
}

/// An event on its way through a handler.
#[derive(Debug, Clone)]
pub(super) struct Item {
    pub(super) lane: LaneId,
    pub(super) event: Arc<StoredEvent>,
    pub(super) track: Track,
}

impl Item {
    pub(super) fn new(lane: LaneId, event: Arc<StoredEvent>) -> Self {
        Self { lane, event, track: Track::default() }
    }

    pub(super) fn position(&self) -> Position {
        self.event.position
    }
}

/// When an event may run, once it is at the front of its lane.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Turn {
    /// At once.
    Now,
    /// Not before then.
    At(Instant),
    /// Not before a person says so.
    Dead,
}

/// An event in its lane.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) position: Position,
    /// `None`: it is only in the store.
    pub(super) event: Option<Arc<StoredEvent>>,
    pub(super) turn: Turn,
    pub(super) track: Track,
}

impl Entry {
    /// One that has a row, and is only in the store.
    pub(super) fn stub(position: Position, turn: Turn, attempts: u32) -> Self {
        let track = Track { attempts, kept: true, ..Track::default() };
        Self { position, event: None, turn, track }
    }

    fn of(item: Item, turn: Turn) -> Self {
        Self { position: item.position(), event: Some(item.event), turn, track: item.track }
    }

    const fn is_runnable(&self) -> bool {
        self.event.is_some() && matches!(self.turn, Turn::Now)
    }

    fn size(&self) -> usize {
        self.event.as_ref().map_or(0, |event| event.body().len())
    }
}

/// Which queue a lane is in.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Listed {
    #[default]
    Nowhere,
    Ready,
    Hungry,
    /// Some of its events are being read.
    Loading,
}

/// What keeps a lane from going on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Block {
    #[default]
    No,
    /// Its front waits for its next attempt.
    Waiting,
    /// Its front is a dead letter.
    Dead,
}

#[derive(Debug, Default)]
struct Lane {
    queue: VecDeque<Entry>,
    running: usize,
    /// How many in the queue are only in the store.
    stubs: usize,
    listed: Listed,
    /// Whether its front waits, or is dead.
    block: Block,
    /// The last timer that was set for it.
    timer: Option<Instant>,
}

/// All lanes of a handler that have unfinished events.
#[derive(Debug)]
pub(super) struct Lanes {
    lanes: FxHashMap<LaneId, Lane>,
    ready: VecDeque<LaneId>,
    hungry: VecDeque<LaneId>,
    timers: BinaryHeap<Reverse<(Instant, LaneId)>>,
    /// Lanes that may have something for [`spill`](Self::spill).
    spillable: FxHashSet<LaneId>,
    /// Emptied queues, kept for their memory.
    spare: Vec<VecDeque<Entry>>,
    /// In queues, with their events.
    loaded: usize,
    running: usize,
    /// In queues, without.
    stubs: usize,
    /// Bytes of the bodies of what is loaded or running.
    bytes: usize,
    /// Lanes whose fronts wait; lanes whose fronts are dead; what is behind both.
    waiting: usize,
    dead: usize,
    parked: usize,
    /// Lanes that do not flow and have more than `max_per_lane`.
    overlong: FxHashSet<LaneId>,
    max_per_lane: usize,
}

const SPARE: usize = 1_024;

/// Events of a lane read at once.
const LOAD_PER_LANE: usize = 64;

impl Lanes {
    /// No lanes yet. More than `max_per_lane` events in one that does not flow are
    /// [too many](Self::is_overlong).
    pub(super) fn new(max_per_lane: usize) -> Self {
        Self {
            lanes: FxHashMap::default(),
            ready: VecDeque::new(),
            hungry: VecDeque::new(),
            timers: BinaryHeap::new(),
            spillable: FxHashSet::default(),
            spare: Vec::new(),
            loaded: 0,
            running: 0,
            stubs: 0,
            bytes: 0,
            waiting: 0,
            dead: 0,
            parked: 0,
            overlong: FxHashSet::default(),
            max_per_lane,
        }
    }

    /// Events held in memory: queued with their bodies, or running.
    pub(super) const fn held(&self) -> usize {
        self.loaded + self.running
    }

    /// Events not finished: held, or only in the store.
    pub(super) const fn unfinished(&self) -> usize {
        self.held() + self.stubs
    }

    /// Events with workers.
    pub(super) const fn running(&self) -> usize {
        self.running
    }

    /// Events that are only in the store.
    pub(super) const fn stubs(&self) -> usize {
        self.stubs
    }

    /// Bytes of the bodies of the events held.
    pub(super) const fn bytes(&self) -> usize {
        self.bytes
    }

    /// Lanes whose front waits for its next attempt.
    pub(super) const fn waiting(&self) -> usize {
        self.waiting
    }

    /// Lanes parked behind a dead letter.
    pub(super) const fn dead(&self) -> usize {
        self.dead
    }

    /// Events behind the fronts of both.
    pub(super) const fn parked(&self) -> usize {
        self.parked
    }

    /// Whether a lane that does not flow has too many events.
    pub(super) fn is_overlong(&self) -> bool {
        !self.overlong.is_empty()
    }

    /// Whether a worker could be given something.
    pub(super) fn has_ready(&self) -> bool {
        !self.ready.is_empty()
    }

    /// Whether something has to be read first.
    pub(super) fn has_hungry(&self) -> bool {
        !self.hungry.is_empty()
    }

    /// Whether a checkpoint may have something to [spill](Self::spill).
    pub(super) fn has_spillable(&self) -> bool {
        !self.spillable.is_empty()
    }

    /// When the next lane is due.
    pub(super) fn next_due(&self) -> Option<Instant> {
        self.timers.peek().map(|Reverse((at, _))| *at)
    }

    fn lane(&mut self, id: LaneId) -> &mut Lane {
        let spare = &mut self.spare;
        self.lanes
            .entry(id)
            .or_insert_with(|| Lane { queue: spare.pop().unwrap_or_default(), ..Lane::default() })
    }

    /// Puts an event from the log behind the others of its lane.
    pub(super) fn push(&mut self, item: Item) {
        let id = item.lane;
        self.bytes += item.event.body().len();
        self.loaded += 1;
        let lane = self.lane(id);
        lane.queue.push_back(Entry::of(item, Turn::Now));
        let length = lane.queue.len();
        if lane.block == Block::No && lane.stubs == 0 {
            if length == 1 && lane.running == 0 {
                self.release(id);
            }
            return;
        }
        self.parked += usize::from(lane.block != Block::No);
        self.spillable.insert(id);
        if length > self.max_per_lane {
            self.overlong.insert(id);
        }
    }

    /// Puts an event that has a row into its lane, where its position belongs. One that is
    /// there already is replaced.
    pub(super) fn insert(&mut self, id: LaneId, entry: Entry) {
        let lane = self.lane(id);
        let (blocked, stub) = (lane.block != Block::No, entry.event.is_none());
        let before = match lane.queue.binary_search_by_key(&entry.position, |e| e.position) {
            Ok(at) => Some(std::mem::replace(&mut lane.queue[at], entry)),
            Err(at) => {
                lane.queue.insert(at, entry);
                None
            }
        };
        lane.stubs += usize::from(stub);
        let length = lane.queue.len();
        self.stubs += usize::from(stub);
        match before {
            Some(old) => self.forget(id, &old),
            None => self.parked += usize::from(blocked),
        }
        if length > self.max_per_lane {
            self.overlong.insert(id);
        }
        self.release(id);
    }

    /// Takes an event out of its lane, whatever it waits for; `false` where it is not there.
    pub(super) fn remove(&mut self, id: LaneId, position: Position) -> bool {
        let Some(lane) = self.lanes.get_mut(&id) else { return false };
        let Ok(at) = lane.queue.binary_search_by_key(&position, |entry| entry.position) else {
            return false;
        };
        let Some(entry) = lane.queue.remove(at) else { return false };
        let parked = lane.block != Block::No && !lane.queue.is_empty();
        self.parked -= usize::from(parked);
        self.forget(id, &entry);
        self.shortened(id);
        self.release(id);
        true
    }

    fn shortened(&mut self, id: LaneId) {
        if !self.overlong.is_empty()
            && self.lanes.get(&id).is_none_or(|lane| lane.queue.len() <= self.max_per_lane)
        {
            self.overlong.remove(&id);
        }
    }

    /// Keeps count of an entry that is no longer in its queue.
    fn forget(&mut self, id: LaneId, entry: &Entry) {
        if entry.event.is_some() {
            self.loaded -= 1;
            self.bytes -= entry.size();
        } else {
            self.stubs -= 1;
            if let Some(lane) = self.lanes.get_mut(&id) {
                lane.stubs -= 1;
            }
        }
    }

    /// Takes up to `max` events of ready lanes, up to `per_lane` in order from each; their
    /// lanes are running until they have come back, each [done](Self::finish) or to go
    /// [again](Self::again). One that is to be tried
    /// [alone](Track::alone) is taken by itself.
    pub(super) fn take(&mut self, max: usize, per_lane: usize) -> Vec<Item> {
        let mut chunk = Vec::with_capacity(max.min(self.loaded));
        while chunk.len() < max {
            let Some(id) = self.ready.pop_front() else { break };
            let Some(lane) = self.lanes.get_mut(&id) else { continue };
            if lane.running > 0 {
                // Listed before it was emptied and begun anew.
                continue;
            }
            lane.listed = Listed::Nowhere;
            let most = per_lane.min(max - chunk.len());
            let runnable = lane.queue.iter().take(most).take_while(|entry| entry.is_runnable());
            let together = runnable.take_while(|entry| !entry.track.alone).count();
            let first_alone =
                lane.queue.front().is_some_and(|front| front.is_runnable() && front.track.alone);
            let n = if together > 0 {
                together
            } else if !first_alone {
                // Something has been put in front of it meanwhile.
                self.release(id);
                continue;
            } else if chunk.is_empty() {
                1
            } else {
                lane.listed = Listed::Ready;
                self.ready.push_front(id);
                break;
            };
            for entry in lane.queue.drain(..n) {
                if let Some(event) = entry.event {
                    chunk.push(Item { lane: id, event, track: entry.track });
                }
            }
            lane.running += n;
            self.running += n;
            self.loaded -= n;
            self.shortened(id);
            if first_alone {
                break;
            }
        }
        chunk
    }

    /// An event came back from its worker and is finished in this lane.
    pub(super) fn finish(&mut self, item: &Item) {
        self.bytes -= item.event.body().len();
        self.running -= 1;
        if let Some(lane) = self.lanes.get_mut(&item.lane) {
            lane.running -= 1;
        }
        self.release(item.lane);
    }

    /// An event came back from its worker and goes into its lane again, where its position
    /// belongs: at the front, unless an earlier one has been taken back meanwhile.
    pub(super) fn again(&mut self, item: Item, turn: Turn) {
        let id = item.lane;
        self.running -= 1;
        self.loaded += 1;
        if let Some(lane) = self.lanes.get_mut(&id) {
            lane.running -= 1;
            let at = lane.queue.partition_point(|entry| entry.position < item.position());
            lane.queue.insert(at, Entry::of(item, turn));
        }
        if turn != Turn::Now {
            self.spillable.insert(id);
        }
        self.release(id);
    }

    /// Lets lanes go on whose fronts are due.
    pub(super) fn wake(&mut self, now: Instant) {
        while let Some(&Reverse((at, id))) = self.timers.peek() {
            if at > now {
                break;
            }
            self.timers.pop();
            let Some(lane) = self.lanes.get_mut(&id) else { continue };
            if lane.timer == Some(at) {
                lane.timer = None;
            }
            if lane.running > 0 {
                // Looked at again when it is released.
                continue;
            }
            if let Some(front) = lane.queue.front_mut()
                && matches!(front.turn, Turn::At(at) if at <= now)
            {
                front.turn = Turn::Now;
                self.release(id);
            }
        }
    }

    /// Lists a lane where its front belongs, or drops it when it is empty.
    fn release(&mut self, id: LaneId) {
        let Some(lane) = self.lanes.get_mut(&id) else { return };
        if lane.running > 0 {
            return;
        }
        let Some(front) = lane.queue.front() else {
            self.block(id, Block::No);
            if let Some(lane) = self.lanes.remove(&id)
                && self.spare.len() < SPARE
                && lane.queue.capacity() <= 64
            {
                self.spare.push(lane.queue);
            }
            self.spillable.remove(&id);
            return;
        };
        let (turn, loaded) = (front.turn, front.event.is_some());
        let listed = lane.listed;
        match turn {
            Turn::Dead => self.block(id, Block::Dead),
            Turn::At(at) => {
                if lane.timer != Some(at) {
                    lane.timer = Some(at);
                    self.timers.push(Reverse((at, id)));
                }
                self.block(id, Block::Waiting);
            }
            Turn::Now => {
                // What is being read is listed when it has come.
                if listed == Listed::Nowhere {
                    let (to, queue) = if loaded {
                        (Listed::Ready, &mut self.ready)
                    } else {
                        (Listed::Hungry, &mut self.hungry)
                    };
                    lane.listed = to;
                    queue.push_back(id);
                }
                self.block(id, Block::No);
            }
        }
    }

    /// Notes what keeps a lane from going on.
    fn block(&mut self, id: LaneId, new: Block) {
        let Some(lane) = self.lanes.get_mut(&id) else { return };
        let old = std::mem::replace(&mut lane.block, new);
        let behind = lane.queue.len().saturating_sub(1);
        match old {
            Block::No => {}
            Block::Waiting => self.waiting -= 1,
            Block::Dead => self.dead -= 1,
        }
        match new {
            Block::No => {}
            Block::Waiting => self.waiting += 1,
            Block::Dead => self.dead += 1,
        }
        match (old == Block::No, new == Block::No) {
            (true, false) => self.parked += behind,
            (false, true) => self.parked -= behind,
            (true, true) | (false, false) => {}
        }
    }

    /// Positions to be read for lanes that cannot go on without, in order, each with its lane;
    /// up to `max`. Until [`loaded`](Self::loaded) these lanes wait.
    pub(super) fn wanted(&mut self, max: usize) -> Vec<(Position, LaneId)> {
        let mut wanted = Vec::new();
        while wanted.len() < max {
            let Some(id) = self.hungry.pop_front() else { break };
            let Some(lane) = self.lanes.get_mut(&id) else { continue };
            if lane.running > 0 || lane.listed == Listed::Loading {
                continue;
            }
            lane.listed = Listed::Nowhere;
            let front = lane.queue.front();
            if !front.is_some_and(|front| front.event.is_none() && front.turn == Turn::Now) {
                self.release(id);
                continue;
            }
            lane.listed = Listed::Loading;
            let most = LOAD_PER_LANE.min(max - wanted.len());
            let stubs = lane
                .queue
                .iter()
                .take(most)
                .take_while(|entry| entry.event.is_none() && entry.turn == Turn::Now);
            wanted.extend(stubs.map(|entry| (entry.position, id)));
        }
        wanted.sort_unstable_by_key(|(position, _)| *position);
        wanted
    }

    /// What was read, in order; lanes of which nothing came are hungry again.
    pub(super) fn loaded(
        &mut self,
        wanted: &[(Position, LaneId)],
        events: impl IntoIterator<Item = Arc<StoredEvent>>,
    ) {
        for event in events {
            let position = event.position;
            let Ok(at) = wanted.binary_search_by_key(&position, |(position, _)| *position) else {
                continue;
            };
            let Some(lane) = self.lanes.get_mut(&wanted[at].1) else { continue };
            let Ok(at) = lane.queue.binary_search_by_key(&position, |entry| entry.position) else {
                continue;
            };
            let entry = &mut lane.queue[at];
            if entry.event.is_none() {
                self.bytes += event.body().len();
                entry.event = Some(event);
                lane.stubs -= 1;
                self.stubs -= 1;
                self.loaded += 1;
            }
        }
        for (_, id) in wanted {
            if let Some(lane) = self.lanes.get_mut(id)
                && lane.listed == Listed::Loading
            {
                lane.listed = Listed::Nowhere;
                self.release(*id);
            }
        }
    }

    /// Lets go the events of lanes that do not flow: for each, `keep` is told what its row must
    /// say, unless it has one that says it already. Only their positions stay here.
    pub(super) fn spill(&mut self, mut keep: impl FnMut(&StoredEvent, &mut Entry)) {
        for id in std::mem::take(&mut self.spillable) {
            let Some(lane) = self.lanes.get_mut(&id) else { continue };
            // Of a lane that flows, what runs next stays.
            let from = if lane.block != Block::No && lane.running == 0 {
                0
            } else {
                match lane.queue.iter().position(|entry| entry.event.is_none()) {
                    Some(first) if lane.stubs > 0 => first,
                    _ => continue,
                }
            };
            for entry in lane.queue.range_mut(from..) {
                let Some(event) = entry.event.take() else { continue };
                if !entry.track.kept || entry.track.failure.is_some() {
                    keep(&event, entry);
                    entry.track.kept = true;
                    entry.track.failure = None;
                }
                entry.track.alone = false;
                lane.stubs += 1;
                self.stubs += 1;
                self.loaded -= 1;
                self.bytes -= event.body().len();
            }
        }
    }
}

#[cfg(test)]
mod tests {
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
}
