//! What becomes of each entry of a batch: the part of an append that all stores share.

use std::{
    borrow::Cow,
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering::Relaxed},
    },
};

use bytes::Bytes;

use super::{
    Entry,
    same::{self, Fingerprint},
};
use crate::{
    event::{Event, Headers, Origin, Position},
    transport::{Mark, Receipt},
};

/// What to write, and what to say about it once it is written.
#[derive(Debug)]
pub(super) struct Plan<'a> {
    /// The events to insert: the first gets the position after the head, and so on.
    pub(super) fresh: Vec<&'a Event>,
    /// The quarantine entries to insert, numbered in the same way.
    pub(super) held: Vec<Held<'a>>,
    outcomes: Vec<Outcome>,
}

/// Something for quarantine.
#[derive(Debug)]
pub(super) struct Held<'a> {
    pub(super) body: &'a Bytes,
    pub(super) headers: &'a Headers,
    pub(super) origin: &'a Origin,
    /// With [`Self::BESIDE`] for a position, if `beside` is set.
    reason: Cow<'a, str>,
    /// In conflict with this one of [`Plan::fresh`], whose position is not known yet.
    pub(super) beside: Option<usize>,
}

impl Held<'_> {
    /// Stands for the position of the event it is in conflict with, where that is in the same
    /// batch.
    pub(super) const BESIDE: &'static str = "{position}";

    /// The reason, as far as it is known before the head is.
    pub(super) fn template(&self) -> Cow<'_, str> {
        // No database keeps U+0000 in text, and what is refused must not be refused again.
        if self.reason.contains('\0') {
            Cow::Owned(self.reason.replace('\0', "\u{fffd}"))
        } else {
            Cow::Borrowed(&self.reason)
        }
    }

    /// The reason, once the head before the append is known.
    pub(super) fn reason(&self, head: Position) -> Cow<'_, str> {
        match self.beside {
            Some(k) => Cow::Owned(self.template().replace(Self::BESIDE, &nth(head, k).to_string())),
            None => self.template(),
        }
    }
}

/// A quarantine entry that is there already, written by an attempt at the same batch whose
/// outcome was unknown (S10).
#[derive(Debug)]
pub(super) struct HeldBefore {
    pub(super) number: u64,
    pub(super) reason: String,
    pub(super) body: Bytes,
}

/// What is known of an identity that was stored before.
#[derive(Debug, Clone, Copy)]
pub(super) enum Known<'k> {
    /// The event itself.
    Event(Position, &'k Event),
    /// It has been removed since; this is left of it (S14).
    Removed(Position, Fingerprint),
}

#[derive(Debug)]
enum Outcome {
    Fresh(usize),
    CopyOfFresh(usize),
    Copy(Position),
    Held(usize),
    HeldBefore { number: u64, reason: Arc<str> },
}

impl<'a> Plan<'a> {
    /// Takes every event for a new one; whether that holds, the database's unique index says.
    pub(super) fn all_new(entries: &'a [Entry]) -> Self {
        let mut plan = Self::with_capacity(entries.len());
        for entry in entries {
            match entry {
                Entry::Event(event) => plan.fresh(event),
                Entry::Quarantine(_) => plan.hold(entry),
            }
        }
        plan
    }

    /// Sorts out copies and conflicts, those within the batch included.
    ///
    /// `known` has what is stored of the same source and id as the event at that index.
    pub(super) fn checked<'k>(
        entries: &'a [Entry],
        known: impl Fn(usize, &Event) -> Option<Known<'k>>,
    ) -> Self {
        let mut plan = Self::with_capacity(entries.len());
        let mut here: HashMap<(&str, &str), usize> = HashMap::with_capacity(entries.len());
        for (index, entry) in entries.iter().enumerate() {
            let Entry::Event(event) = entry else {
                plan.hold(entry);
                continue;
            };
            let identity = (event.source(), event.id());
            if let Some(known) = known(index, event) {
                let (position, difference) = match known {
                    Known::Event(position, first) => (position, same::difference(first, event)),
                    Known::Removed(position, content) => {
                        let other = same::fingerprint(event) != content;
                        (position, other.then_some("type or data, and the first has been removed"))
                    }
                };
                match difference {
                    None => plan.outcomes.push(Outcome::Copy(position)),
                    Some(what) => plan.conflict(event, &position.to_string(), what, None),
                }
            } else if let Some(&k) = here.get(&identity) {
                match same::difference(plan.fresh[k], event) {
                    None => plan.outcomes.push(Outcome::CopyOfFresh(k)),
                    Some(what) => plan.conflict(event, Held::BESIDE, what, Some(k)),
                }
            } else {
                here.insert(identity, plan.fresh.len());
                plan.fresh(event);
            }
        }
        plan
    }

    fn with_capacity(n: usize) -> Self {
        Self { fresh: Vec::with_capacity(n), held: Vec::new(), outcomes: Vec::with_capacity(n) }
    }

    fn fresh(&mut self, event: &'a Event) {
        self.outcomes.push(Outcome::Fresh(self.fresh.len()));
        self.fresh.push(event);
    }

    fn hold(&mut self, entry: &'a Entry) {
        if let Entry::Quarantine(quarantined) = entry {
            self.outcomes.push(Outcome::Held(self.held.len()));
            self.held.push(Held {
                body: &quarantined.message.body,
                headers: &quarantined.message.headers,
                origin: &quarantined.message.origin,
                reason: Cow::Borrowed(&quarantined.reason),
                beside: None,
            });
        }
    }

    fn conflict(&mut self, event: &'a Event, position: &str, what: &str, beside: Option<usize>) {
        self.outcomes.push(Outcome::Held(self.held.len()));
        self.held.push(Held {
            body: event.body(),
            headers: event.headers(),
            origin: event.origin(),
            reason: Cow::Owned(format!(
                "conflicts with the event at position {position}: same source and id, other {what}"
            )),
            beside,
        });
    }

    /// Takes out what is in quarantine already.
    pub(super) fn forget_held(&mut self, mut before: Vec<HeldBefore>) {
        if before.is_empty() {
            return;
        }
        let held = std::mem::take(&mut self.held);
        let mut kept = Vec::with_capacity(held.len());
        let mut places = Vec::with_capacity(held.len());
        for held in held {
            let reason = held.template();
            let same = before.iter().position(|b| *b.reason == *reason && b.body == *held.body);
            places.push(if let Some(i) = same {
                let HeldBefore { number, reason, .. } = before.swap_remove(i);
                Outcome::HeldBefore { number, reason: reason.into() }
            } else {
                drop(reason);
                kept.push(held);
                Outcome::Held(kept.len() - 1)
            });
        }
        self.held = kept;
        let mut places = places.into_iter();
        for outcome in &mut self.outcomes {
            if matches!(outcome, Outcome::Held(_))
                && let Some(place) = places.next()
            {
                *outcome = place;
            }
        }
    }

    /// Whether nothing is to be written.
    pub(super) const fn is_empty(&self) -> bool {
        self.fresh.is_empty() && self.held.is_empty()
    }

    /// Whether any entry is a copy.
    pub(super) fn met_copies(&self) -> bool {
        self.outcomes.iter().any(|outcome| match outcome {
            Outcome::Copy(_) | Outcome::CopyOfFresh(_) | Outcome::HeldBefore { .. } => true,
            Outcome::Fresh(_) | Outcome::Held(_) => false,
        })
    }

    /// The receipts, given the head and the last quarantine number before the append.
    pub(super) fn receipts(&self, head: Position, number: u64) -> Vec<Receipt> {
        self.outcomes
            .iter()
            .map(|outcome| match outcome {
                Outcome::Fresh(k) => Receipt::Stored(nth(head, *k)),
                Outcome::CopyOfFresh(k) => Receipt::Duplicate(nth(head, *k)),
                Outcome::Copy(position) => Receipt::Duplicate(*position),
                Outcome::Held(k) => Receipt::Quarantined {
                    number: number + *k as u64 + 1,
                    reason: self.held[*k].reason(head).into(),
                },
                Outcome::HeldBefore { number, reason } => {
                    Receipt::Quarantined { number: *number, reason: reason.clone() }
                }
            })
            .collect()
    }
}

/// The position of the k-th of the events behind this head, from 0.
const fn nth(head: Position, k: usize) -> Position {
    Position(head.0 + k as u64 + 1)
}

/// One mark a source: within an incarnation the furthest, else the last (S8).
pub(super) fn fold_marks(marks: &[(Arc<str>, Mark)]) -> Vec<(&str, Mark)> {
    let mut folded: Vec<(&str, Mark)> = Vec::with_capacity(marks.len());
    for (source, mark) in marks {
        match folded.iter_mut().find(|(s, _)| *s == &**source) {
            Some((_, old)) => advance(old, mark),
            None => folded.push((source, mark.clone())),
        }
    }
    folded
}

/// Moves a mark (S8).
pub(super) fn advance(old: &mut Mark, new: &Mark) {
    if old.incarnation != new.incarnation || old.sequence < new.sequence {
        *old = new.clone();
    }
}

/// Whether to look for copies before an append, or to trust that there are none.
///
/// Looking costs a query, and copies come in bursts: after a reconnect, a crash, an append
/// whose outcome was unknown. So an append trusts, the database's unique index keeps it from
/// being wrong, and after a copy or in doubt the next appends look first.
#[derive(Debug, Default)]
pub(super) struct Caution(AtomicU32);

impl Caution {
    /// For how many appends it lasts.
    const APPENDS: u32 = 64;

    pub(super) fn is_raised(&self) -> bool {
        self.0.load(Relaxed) > 0
    }

    pub(super) fn raise(&self) {
        self.0.store(Self::APPENDS, Relaxed);
    }

    /// An append has looked and met no copy.
    pub(super) fn relax(&self) {
        let _ = self.0.fetch_update(Relaxed, Relaxed, |n| n.checked_sub(1));
    }

    /// Raised when the guard is dropped before the outcome is [known](Doubt::known): the
    /// append failed, or its future was dropped.
    pub(super) const fn doubt(&self) -> Doubt<'_> {
        Doubt(Some(self))
    }
}

/// See [`Caution::doubt`].
#[derive(Debug)]
pub(super) struct Doubt<'a>(Option<&'a Caution>);

impl Doubt<'_> {
    pub(super) fn known(mut self) {
        self.0 = None;
    }
}

impl Drop for Doubt<'_> {
    fn drop(&mut self) {
        if let Some(caution) = self.0 {
            caution.raise();
        }
    }
}
