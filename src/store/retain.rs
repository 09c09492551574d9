//! Removing the beginning of the log (S12-S15): what all stores share.
//!
//! An event that is removed leaves its *identity* behind: a hash of its source and id, and one of
//! its type and data. So a copy of it is still a copy, and another event under its name still a
//! conflict, for ever (G2), at about a tenth of what a small event takes. Both hashes are parts of
//! SHA-256: whoever publishes can choose ids, and must not be able to choose two that collide.

use std::sync::Arc;

use sha2::{Digest as _, Sha256};
use time::OffsetDateTime;
use uuid::Uuid;

use super::{
    Limit, StoreError,
    row::Texts,
    same::{self, Fingerprint},
};
use crate::event::{Event, Position, StoredEvent};

/// From where to where the log goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// The last position that was removed; [`Position::START`] where none was.
    pub removed: Position,
    /// The last position.
    pub head: Position,
    /// How large the events are that are there: the bytes of their bodies, attributes, headers
    /// and origins as text. What a database adds to that (indexes, pages that are not full) is not
    /// counted, nor what it saves by compression.
    pub bytes: u64,
}

impl Extent {
    /// The first position that is there, or will be.
    #[must_use]
    pub const fn first(&self) -> Position {
        self.removed.next()
    }
}

/// What may go. An event is due when it is older than `before`, or when the log is larger than
/// `bytes`; with neither, none is.
#[derive(Debug, Clone, Copy)]
pub struct Removal {
    /// Recorded before this.
    pub before: Option<OffsetDateTime>,
    /// As many bytes as the log may have, as [`Extent::bytes`] counts them.
    pub bytes: Option<u64>,
    /// How much goes in one step: events, and bytes of their bodies.
    pub step: Limit,
    /// Whether identities are kept, so that copies of what is removed are recognised. Without
    /// them a copy is an event as any other (S14).
    pub identities: bool,
}

impl Removal {
    /// A step: 500 events, 4 MiB. It takes a store about as long as an append of as many.
    pub const STEP: Limit = Limit { events: 500, bytes: 4 << 20 };
}

/// What a step has come to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Removed {
    /// How many events are gone.
    pub events: u64,
    /// The log afterwards.
    pub extent: Extent,
    /// Who needs an event that would be due.
    pub held: Option<Hold>,
}

/// Who needs the events behind a position.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hold {
    /// The handler.
    pub handler: Arc<str>,
    /// It needs what is behind this.
    pub after: Position,
    /// Why.
    pub why: HeldBy,
}

/// Why a handler needs an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HeldBy {
    /// Its cursor has not passed it.
    Cursor,
    /// It is being retried, parked, or a dead letter.
    Unfinished,
}

/// The identity of an event: what is left of it in place of its source and id.
pub(super) fn identity(event: &Event) -> Uuid {
    let source = event.source().as_bytes();
    let mut hash = Sha256::new();
    // Its length, so that no part of the one can stand for a part of the other.
    hash.update((source.len() as u64).to_be_bytes());
    hash.update(source);
    hash.update(event.id().as_bytes());
    let digest: [u8; 32] = hash.finalize().into();
    let mut half = [0; 16];
    half.copy_from_slice(&digest[..16]);
    Uuid::from_bytes(half)
}

/// What is kept of an event that goes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Left {
    pub(super) identity: Uuid,
    pub(super) position: Position,
    pub(super) content: Fingerprint,
}

/// What goes in a step, as far as can be said before it is certain that nobody needs it.
#[derive(Debug)]
pub(super) struct Chosen {
    /// From here on, not included.
    pub(super) from: Position,
    /// Up to here.
    pub(super) to: Position,
    /// What is kept of each, in order.
    pub(super) left: Vec<Left>,
    /// Who needs the next one, which would be due.
    pub(super) held: Option<Hold>,
}

/// The last position that may go, and who needs the one behind it.
pub(super) type Bound = (Position, Option<Hold>);

/// Whether an event is due: the first of the log, which has this extent then.
pub(super) fn is_due(extent: &Extent, removal: &Removal, first: &StoredEvent) -> bool {
    removal.before.is_some_and(|before| first.recorded_at < before)
        || removal.bytes.is_some_and(|most| extent.bytes > most)
}

/// How far a step has to read: past what may go by one, to see whether that would be due.
pub(super) fn reach(extent: &Extent, bound: &Bound, removal: &Removal) -> Limit {
    let free = bound.0.0.saturating_sub(extent.removed.0).saturating_add(1);
    let free = usize::try_from(free).unwrap_or(usize::MAX);
    Limit { events: removal.step.events.max(1).min(free), bytes: removal.step.bytes }
}

/// Chooses among the first events of the log.
pub(super) fn choose(
    extent: &Extent,
    bound: Bound,
    removal: &Removal,
    first: &[Arc<StoredEvent>],
) -> Result<Chosen, StoreError> {
    let (last, hold) = bound;
    let mut chosen =
        Chosen { from: extent.removed, to: extent.removed, left: Vec::new(), held: None };
    let mut extent = *extent;
    for event in first {
        if !is_due(&extent, removal, event) {
            break;
        }
        if event.position > last {
            chosen.held = hold;
            break;
        }
        extent.bytes = extent.bytes.saturating_sub(size(&event.event)?);
        chosen.to = event.position;
        if removal.identities {
            chosen.left.push(Left {
                identity: identity(&event.event),
                position: event.position,
                content: same::fingerprint(&event.event),
            });
        }
    }
    Ok(chosen)
}

/// How large an event is by itself, as [`sizes`] counts it.
pub(super) fn size(event: &Event) -> Result<u64, StoreError> {
    let texts = |texts: Result<Texts, super::AttemptError>| match texts {
        Ok(texts) => Ok(texts),
        Err(super::AttemptError::Refused(reason)) => Err(StoreError::fatal(reason)),
        Err(super::AttemptError::Store(error)) => Err(error),
    };
    let headers = texts(Texts::headers(std::iter::once(event.headers())))?;
    let origins = texts(Texts::origins(std::iter::once(event.origin())))?;
    Ok(sizes(&[event], &headers, &origins))
}

/// How large these events are ([`Extent::bytes`]).
pub(super) fn sizes(events: &[&Event], headers: &Texts, origins: &Texts) -> u64 {
    let own: usize = events
        .iter()
        .map(|event| {
            let attributes = [
                event.source(),
                event.id(),
                event.kind(),
                event.key(),
                event.subject().unwrap_or(""),
            ];
            event.body().len() + attributes.iter().map(|text| text.len()).sum::<usize>()
        })
        .sum();
    (own + headers.len() + origins.len()) as u64
}
