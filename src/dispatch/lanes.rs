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
    /// It was handled before, and a person wants it again.
    pub(super) replay: bool,
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
#[derive(Debug, Clone)]
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

/// A lane that does not flow.
#[derive(Debug)]
pub(super) struct Blocked {
    /// Its front.
    pub(super) entry: Entry,
    /// How many events are behind that.
    pub(super) followers: u64,
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

    /// The lanes that do not flow, those with the earliest fronts first, up to so many. Looks at
    /// every lane: for a person who asks.
    pub(super) fn blocked(&self, most: usize) -> Vec<Blocked> {
        let blocked = self.lanes.values().filter(|lane| lane.block != Block::No);
        let mut fronts: Vec<_> =
            blocked.filter_map(|lane| Some((lane.queue.front()?.position, lane))).collect();
        if fronts.len() > most {
            fronts.select_nth_unstable_by_key(most, |(position, _)| *position);
            fronts.truncate(most);
        }
        fronts.sort_unstable_by_key(|(position, _)| *position);
        let shown = fronts.into_iter().filter_map(|(_, lane)| {
            Some(Blocked {
                entry: lane.queue.front()?.clone(),
                followers: lane.queue.len() as u64 - 1,
            })
        });
        shown.collect()
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
mod tests;
