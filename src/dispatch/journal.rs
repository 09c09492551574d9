//! What has changed in a handler's rows since they were last saved.

use std::collections::{BTreeMap, BTreeSet, btree_map::Entry};

use crate::{
    event::Position,
    store::progress::{Change, Failure, Standing, Unfinished},
};

/// Changes for the next checkpoint, one for each position: the newest.
#[derive(Debug, Default)]
pub(super) struct Journal {
    changes: BTreeMap<Position, Change>,
    /// What has a row and is not dead.
    open: BTreeSet<Position>,
}

impl Journal {
    pub(super) fn len(&self) -> usize {
        self.changes.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.changes.is_empty()
    }

    /// The event had a row before this journal began.
    pub(super) fn found(&mut self, event: &Unfinished) {
        if !matches!(event.standing, Standing::Dead { .. }) {
            self.open.insert(event.position);
        }
    }

    /// Everything up to there is done, filtered out or dead, where that is before the cursor.
    pub(super) fn settled(&self, cursor: Position) -> Position {
        match self.open.first() {
            Some(first) => cursor.min(Position(first.0.saturating_sub(1))),
            None => cursor,
        }
    }

    /// The event has a row, which says this.
    pub(super) fn keep(&mut self, event: Unfinished) {
        if matches!(event.standing, Standing::Dead { .. }) {
            self.open.remove(&event.position);
        } else {
            self.open.insert(event.position);
        }
        self.add(Change::Keep(event));
    }

    /// The event's row goes.
    pub(super) fn finish(&mut self, position: Position) {
        self.open.remove(&position);
        self.add(Change::Finish(position));
    }

    fn add(&mut self, mut newer: Change) {
        let position = newer.position();
        match self.changes.entry(position) {
            Entry::Vacant(vacant) => {
                vacant.insert(newer);
            }
            Entry::Occupied(mut occupied) => {
                take_over(&mut newer, occupied.get_mut());
                occupied.insert(newer);
            }
        }
    }

    /// Takes everything out, to be saved.
    pub(super) fn take(&mut self) -> Vec<Change> {
        std::mem::take(&mut self.changes).into_values().collect()
    }

    /// Puts back what was not saved, or may not have been; what came since is newer.
    pub(super) fn restore(&mut self, unsaved: Vec<Change>) {
        for mut older in unsaved {
            match self.changes.entry(older.position()) {
                Entry::Vacant(vacant) => {
                    vacant.insert(older);
                }
                Entry::Occupied(mut occupied) => take_over(occupied.get_mut(), &mut older),
            }
        }
    }
}

/// A newer change goes on from the failure of an older one that was not saved.
fn take_over(newer: &mut Change, older: &mut Change) {
    let (Change::Keep(newer), Change::Keep(older)) = (newer, older) else { return };
    newer.failure = match (newer.failure.take(), older.failure.take()) {
        (Some(newer), Some(older)) => Some(continued(newer, &older)),
        (newer, older) => newer.or(older),
    };
}

/// A failure that goes on from an earlier one.
pub(super) fn continued(newer: Failure, older: &Failure) -> Failure {
    Failure {
        first_error: older.first_error.clone(),
        first_failed_at: older.first_failed_at,
        ..newer
    }
}

#[cfg(test)]
mod tests {
    use time::OffsetDateTime;

    use super::*;
    use crate::store::progress::Standing;

    fn kept(attempts: u32, error: Option<&str>) -> Unfinished {
        Unfinished {
            position: Position(1),
            id: "a".into(),
            kind: "t".into(),
            key: "k".into(),
            standing: Standing::Parked,
            attempts,
            failure: error.map(|error| Failure {
                first_error: error.into(),
                last_error: error.into(),
                first_failed_at: OffsetDateTime::UNIX_EPOCH,
                last_failed_at: OffsetDateTime::UNIX_EPOCH,
            }),
        }
    }

    #[test]
    fn the_newest_change_counts_and_the_first_failure_stays() {
        let mut journal = Journal::default();
        journal.keep(kept(1, Some("one")));
        let unsaved = journal.take();
        assert!(journal.is_empty());
        journal.keep(kept(2, Some("two")));
        journal.restore(unsaved);
        let Some(Change::Keep(event)) = journal.take().pop() else { panic!("it was kept") };
        let failure = event.failure.unwrap();
        assert_eq!(event.attempts, 2);
        assert_eq!((&*failure.first_error, &*failure.last_error), ("one", "two"));

        journal.finish(Position(1));
        journal.restore(vec![Change::Keep(kept(1, None))]);
        assert_eq!(journal.take(), [Change::Finish(Position(1))]);

        journal.keep(kept(3, None));
        journal.restore(vec![Change::Keep(kept(2, Some("two")))]);
        let Some(Change::Keep(event)) = journal.take().pop() else { panic!("it was kept") };
        assert_eq!(&*event.failure.unwrap().last_error, "two");
    }
}
