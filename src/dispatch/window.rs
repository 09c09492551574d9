//! Which positions are finished: the cursor is the end of the contiguous prefix.

use std::collections::VecDeque;

use crate::event::Position;

/// The positions between the cursor and the last one read.
#[derive(Debug)]
pub(super) struct Window {
    /// Everything up to here is finished.
    cursor: Position,
    /// The positions after the cursor: finished or not.
    finished: VecDeque<bool>,
}

impl Window {
    pub(super) const fn new(cursor: Position) -> Self {
        Self { cursor, finished: VecDeque::new() }
    }

    /// The end of the contiguous finished prefix.
    pub(super) const fn cursor(&self) -> Position {
        self.cursor
    }

    /// The last position read.
    pub(super) fn end(&self) -> Position {
        Position(self.cursor.0 + self.finished.len() as u64)
    }

    /// How many positions it spans.
    pub(super) fn span(&self) -> usize {
        self.finished.len()
    }

    /// Reads the next position; `finished` where it is filtered out.
    pub(super) fn push(&mut self, finished: bool) {
        if finished && self.finished.is_empty() {
            self.cursor = self.cursor.next();
        } else {
            self.finished.push_back(finished);
        }
    }

    /// A position is finished, filtered or dead; the cursor moves as far as it can.
    pub(super) fn finish(&mut self, position: Position) {
        let Some(offset) = position.0.checked_sub(self.cursor.0 + 1) else { return };
        if let Some(slot) = usize::try_from(offset).ok().and_then(|i| self.finished.get_mut(i)) {
            *slot = true;
        }
        while self.finished.front() == Some(&true) {
            self.finished.pop_front();
            self.cursor = self.cursor.next();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn G6_the_cursor_never_passes_unfinished_work(
            start in 0u64..1_000,
            filtered in proptest::collection::vec(any::<bool>(), 1..200),
            order in any::<u64>(),
        ) {
            let mut window = Window::new(Position(start));
            let mut open = BTreeSet::new();
            for (i, &filtered) in filtered.iter().enumerate() {
                window.push(filtered);
                if !filtered {
                    open.insert(start + 1 + i as u64);
                }
            }
            let end = start + filtered.len() as u64;
            prop_assert_eq!(window.end(), Position(end));
            let mut seed = order;
            while let Some(expected) = open.iter().next().map(|first| first - 1) {
                prop_assert_eq!(window.cursor(), Position(expected));
                seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                let pick = usize::try_from(seed >> 33).unwrap() % open.len();
                let position = *open.iter().nth(pick).unwrap();
                open.remove(&position);
                window.finish(Position(position));
                window.finish(Position(position));
            }
            prop_assert_eq!(window.cursor(), Position(end));
            prop_assert_eq!(window.span(), 0);
        }
    }
}
