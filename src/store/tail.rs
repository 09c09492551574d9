//! The newest events, in memory: a handler at the head of the log does not read the database.

use std::{
    collections::VecDeque,
    sync::{Arc, PoisonError, RwLock},
};

use super::Limit;
use crate::event::{Position, StoredEvent};

/// A bounded, contiguous run of the newest events.
pub(super) struct Tail {
    run: RwLock<Run>,
    max_events: usize,
    max_bytes: usize,
}

#[derive(Default)]
struct Run {
    events: VecDeque<Arc<StoredEvent>>,
    bytes: usize,
}

impl Tail {
    pub(super) fn new(max_events: usize, max_bytes: usize) -> Self {
        Self { run: RwLock::default(), max_events, max_bytes }
    }

    /// Adds what was just committed: contiguous in itself. Where another process has written in
    /// between, the run starts anew, so it never has a gap.
    pub(super) fn push(&self, events: impl IntoIterator<Item = Arc<StoredEvent>>) {
        // A panic while the lock is held can only come from allocation; the run stays valid.
        let mut run = self.run.write().unwrap_or_else(PoisonError::into_inner);
        for event in events {
            if run.events.back().is_some_and(|last| last.position.next() != event.position) {
                run.events.clear();
                run.bytes = 0;
            }
            run.bytes += event.body().len();
            run.events.push_back(event);
        }
        while run.events.len() > self.max_events || run.bytes > self.max_bytes {
            let Some(oldest) = run.events.pop_front() else { break };
            run.bytes -= oldest.body().len();
        }
    }

    /// The events after `after`; `None` where the run does not reach back that far, and also
    /// where it has nothing behind `after`: then only the store can tell.
    pub(super) fn read(&self, after: Position, limit: Limit) -> Option<Vec<Arc<StoredEvent>>> {
        let run = self.run.read().unwrap_or_else(PoisonError::into_inner);
        let first = run.events.front()?.position;
        if after.next() < first {
            return None;
        }
        let skip = usize::try_from(after.next().0 - first.0).ok()?;
        if skip >= run.events.len() {
            return None;
        }
        let mut bytes = 0;
        Some(
            run.events
                .iter()
                .skip(skip)
                .take(limit.events)
                .take_while(|event| {
                    let fits = bytes == 0 || bytes + event.body().len() <= limit.bytes;
                    bytes += event.body().len();
                    fits
                })
                .cloned()
                .collect(),
        )
    }
}

impl Tail {
    /// The events at these positions, which are in order; `None` where the run does not have
    /// all of them.
    pub(super) fn get(
        &self,
        positions: &[Position],
        bytes: usize,
    ) -> Option<Vec<Arc<StoredEvent>>> {
        let run = self.run.read().unwrap_or_else(PoisonError::into_inner);
        let first = run.events.front()?.position;
        let mut sum = 0;
        let mut found: Vec<Arc<StoredEvent>> = Vec::with_capacity(positions.len());
        for position in positions {
            let at = usize::try_from(position.0.checked_sub(first.0)?).ok()?;
            let event = run.events.get(at)?;
            sum += event.body().len();
            if sum > bytes && !found.is_empty() {
                break;
            }
            found.push(Arc::clone(event));
        }
        Some(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::{Event, EventParts, Format, Headers, Origin};

    fn event(position: u64) -> Arc<StoredEvent> {
        Arc::new(StoredEvent {
            position: Position(position),
            recorded_at: crate::event::now(),
            event: Event::from_parts(EventParts {
                id: "1".into(),
                source: "/".into(),
                kind: "t".into(),
                subject: None,
                time: None,
                key: "k".into(),
                format: Format::Raw,
                headers: Headers::new(),
                origin: Origin::default(),
                body: "0123456789".into(),
            }),
        })
    }

    fn positions(events: &[Arc<StoredEvent>]) -> Vec<u64> {
        events.iter().map(|e| e.position.0).collect()
    }

    #[test]
    fn G7_the_tail_is_bounded_by_count_and_bytes() {
        let tail = Tail::new(5, 1_000);
        tail.push((1..=20).map(event));
        assert_eq!(
            positions(&tail.read(Position(15), Limit::default()).unwrap()),
            [16, 17, 18, 19, 20]
        );
        assert!(tail.read(Position(14), Limit::default()).is_none());
        let tail = Tail::new(100, 35);
        tail.push((1..=20).map(event));
        assert!(tail.read(Position(16), Limit::default()).is_none());
        assert_eq!(positions(&tail.read(Position(17), Limit::default()).unwrap()), [18, 19, 20]);
    }

    #[test]
    fn G3_a_gap_starts_the_tail_anew() {
        let tail = Tail::new(100, 1_000);
        tail.push((1..=5).map(event));
        tail.push((8..=9).map(event));
        assert!(tail.read(Position(4), Limit::default()).is_none());
        assert_eq!(positions(&tail.read(Position(7), Limit::default()).unwrap()), [8, 9]);
        // Another process may have appended more: the store knows, the tail does not.
        assert!(tail.read(Position(9), Limit::default()).is_none());
    }

    #[test]
    fn events_are_got_by_position_where_all_of_them_are_here() {
        let tail = Tail::new(5, 1_000);
        tail.push((1..=20).map(event));
        let get = |at: &[u64], bytes| {
            let at: Vec<_> = at.iter().map(|at| Position(*at)).collect();
            tail.get(&at, bytes).map(|found| positions(&found))
        };
        assert_eq!(get(&[16, 18, 20], 1_000).unwrap(), [16, 18, 20]);
        assert_eq!(get(&[16, 18, 20], 20).unwrap(), [16, 18]);
        assert_eq!(get(&[16, 18, 20], 1).unwrap(), [16]);
        assert!(get(&[15, 18], 1_000).is_none());
        assert!(get(&[18, 21], 1_000).is_none());
    }

    #[test]
    fn a_read_takes_one_event_however_large() {
        let tail = Tail::new(100, 1_000);
        tail.push((1..=5).map(event));
        let limit = Limit { events: 10, bytes: 1 };
        assert_eq!(positions(&tail.read(Position(0), limit).unwrap()), [1]);
        let limit = Limit { events: 2, bytes: 1_000 };
        assert_eq!(positions(&tail.read(Position(1), limit).unwrap()), [2, 3]);
    }
}
