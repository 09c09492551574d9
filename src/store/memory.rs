//! The log in memory: the reference for the contract, for tests and for embedding.
//!
//! G1 reaches as far as the process: what was acknowledged is gone when it ends. Memory grows
//! with the log.

mod progress;

use std::{
    collections::{HashMap, VecDeque},
    fmt,
    sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard},
};

use async_trait::async_trait;
use bytes::Bytes;
use uuid::Uuid;

use super::{
    AttemptAppend, AttemptError, Batch, EventStore, Extent, HeldBy, Hold, Limit, QuarantineEntry,
    Query, Removal, Removed, StoreError,
    admit::{self, Known, Plan},
    append_isolating, retain, row,
    same::Fingerprint,
};
use crate::{
    event::{Event, Position, StoredEvent},
    transport::{Mark, Receipt},
};

/// An [`EventStore`] that keeps everything in memory.
///
/// *Concurrency*: appends are one after the other under a lock, so S2 and S3 hold for any
/// number of writers.
#[derive(Default)]
pub struct MemoryStore {
    state: RwLock<State>,
    refuses: Option<Predicate>,
}

type Predicate = Box<dyn Fn(&Event) -> Option<String> + Send + Sync>;

#[derive(Debug, Default)]
struct State {
    /// The event at position n is at index n - 1, less what was removed.
    events: VecDeque<Arc<StoredEvent>>,
    identities: HashMap<Arc<str>, HashMap<Box<str>, Position>>,
    /// How many events were removed, and what is left of them.
    removed: u64,
    left: HashMap<Uuid, (Position, Fingerprint)>,
    /// [`Extent::bytes`].
    bytes: u64,
    quarantine: Vec<(QuarantineEntry, Bytes)>,
    marks: HashMap<Box<str>, Mark>,
    /// The number of the last quarantine entry, which may be gone.
    last_held: u64,
    progress: progress::Progress,
}

impl State {
    fn find(&self, source: &str, id: &str) -> Option<&Arc<StoredEvent>> {
        self.at(*self.identities.get(source)?.get(id)?)
    }

    fn at(&self, position: Position) -> Option<&Arc<StoredEvent>> {
        self.events.get(usize::try_from(position.0.checked_sub(self.removed + 1)?).ok()?)
    }

    fn known(&self, event: &Event) -> Option<Known<'_>> {
        if let Some(stored) = self.find(event.source(), event.id()) {
            return Some(Known::Event(stored.position, &stored.event));
        }
        if self.left.is_empty() {
            return None;
        }
        let (position, content) = self.left.get(&retain::identity(event))?;
        Some(Known::Removed(*position, *content))
    }

    fn head(&self) -> Position {
        Position(self.removed + self.events.len() as u64)
    }

    fn extent(&self) -> Extent {
        Extent { removed: Position(self.removed), head: self.head(), bytes: self.bytes }
    }

    fn from(&self, after: Position) -> impl Iterator<Item = &Arc<StoredEvent>> {
        let skip = usize::try_from(after.0.saturating_sub(self.removed)).unwrap_or(usize::MAX);
        self.events.range(skip.min(self.events.len())..)
    }

    /// The last position that nobody needs, and who needs the next one.
    fn bound(&self) -> retain::Bound {
        let needs = self.progress.needs().map(|(handler, after, why)| Hold {
            handler: Arc::clone(handler),
            after,
            why,
        });
        let hold = needs.min_by_key(|hold| (hold.after, hold.why == HeldBy::Unfinished));
        (hold.as_ref().map_or(self.head(), |hold| hold.after), hold)
    }
}

/// The first of these, as many as the limit lets through.
fn page<'a>(
    events: impl Iterator<Item = &'a Arc<StoredEvent>>,
    limit: Limit,
) -> Vec<Arc<StoredEvent>> {
    let mut bytes = 0;
    events
        .take(limit.events)
        .take_while(|event| {
            let first = bytes == 0;
            bytes += event.body().len().max(1);
            first || bytes <= limit.bytes
        })
        .cloned()
        .collect()
}

impl MemoryStore {
    /// An empty store.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// An empty store that refuses the events for which `refuses` has a reason, as a database
    /// may (S6): for tests.
    #[must_use]
    pub fn refusing(refuses: impl Fn(&Event) -> Option<String> + Send + Sync + 'static) -> Self {
        Self { refuses: Some(Box::new(refuses)), ..Self::default() }
    }

    // No user code runs under the lock and nothing in it can be seen half done.
    fn state(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn state_mut(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn refused(&self, batch: &Batch) -> Result<(), AttemptError> {
        let Some(refuses) = &self.refuses else { return Ok(()) };
        match row::events(&batch.entries).find_map(|(_, event)| refuses(event)) {
            Some(reason) => Err(AttemptError::Refused(reason)),
            None => Ok(()),
        }
    }
}

impl fmt::Debug for MemoryStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryStore").field("head", &self.state().head()).finish_non_exhaustive()
    }
}

#[async_trait]
impl AttemptAppend for MemoryStore {
    async fn attempt(&self, batch: &Batch) -> Result<Vec<Receipt>, AttemptError> {
        self.refused(batch)?;
        let mut state = self.state_mut();
        let state = &mut *state;
        let plan = Plan::checked(&batch.entries, |_, event| state.known(event));
        let head = state.head();
        let number = state.last_held;
        let receipts = plan.receipts(head, number);
        let held: Vec<_> = plan
            .held
            .iter()
            .zip(number + 1..)
            .map(|(held, number)| {
                let entry = QuarantineEntry {
                    number,
                    received_at: batch.recorded_at,
                    reason: held.reason(head).into_owned(),
                    origin: held.origin.clone(),
                    headers: held.headers.clone(),
                    size: held.body.len() as u64,
                };
                (entry, held.body.clone())
            })
            .collect();
        let headers = row::Texts::headers(plan.fresh.iter().map(|event| event.headers()))?;
        let origins = row::Texts::origins(plan.fresh.iter().map(|event| event.origin()))?;
        let bytes = retain::sizes(&plan.fresh, &headers, &origins);
        let fresh: Vec<_> = plan.fresh.into_iter().cloned().collect();
        state.bytes += bytes;
        state.last_held += held.len() as u64;
        state.quarantine.extend(held);
        for event in fresh {
            let position = state.head().next();
            let of_source = match state.identities.get_mut(event.source()) {
                Some(of_source) => of_source,
                None => state.identities.entry(event.source().into()).or_default(),
            };
            of_source.insert(event.id().into(), position);
            state.events.push_back(Arc::new(StoredEvent {
                position,
                recorded_at: batch.recorded_at,
                event,
            }));
        }
        for (source, mark) in admit::fold_marks(&batch.marks) {
            match state.marks.get_mut(source) {
                Some(old) => admit::advance(old, &mark),
                None => {
                    state.marks.insert(source.into(), mark);
                }
            }
        }
        Ok(receipts)
    }

    async fn probe(&self, batch: &Batch) -> Result<(), AttemptError> {
        self.refused(batch)
    }
}

#[async_trait]
impl EventStore for MemoryStore {
    fn kind(&self) -> &'static str {
        "memory"
    }

    async fn append(&self, batch: &Batch) -> Result<Vec<Receipt>, StoreError> {
        append_isolating(self, batch).await
    }

    async fn head(&self) -> Result<Position, StoreError> {
        Ok(self.state().head())
    }

    async fn extent(&self) -> Result<Extent, StoreError> {
        Ok(self.state().extent())
    }

    async fn remove(&self, removal: &Removal) -> Result<Removed, StoreError> {
        let mut state = self.state_mut();
        let (extent, bound) = (state.extent(), state.bound());
        let first = page(state.events.iter(), retain::reach(&extent, &bound, removal));
        let chosen = retain::choose(&extent, bound, removal, &first)?;
        for event in first.iter().take_while(|event| event.position <= chosen.to) {
            state.bytes = state.bytes.saturating_sub(retain::size(&event.event)?);
            state.events.pop_front();
            state.removed += 1;
            if let Some(of_source) = state.identities.get_mut(event.source()) {
                of_source.remove(event.id());
                if of_source.is_empty() {
                    state.identities.remove(event.source());
                }
            }
        }
        let left = chosen.left.iter().map(|left| (left.identity, (left.position, left.content)));
        state.left.extend(left);
        let events = chosen.to.0 - chosen.from.0;
        Ok(Removed { events, extent: state.extent(), held: chosen.held })
    }

    async fn read(
        &self,
        after: Position,
        limit: Limit,
    ) -> Result<Vec<Arc<StoredEvent>>, StoreError> {
        Ok(page(self.state().from(after), limit))
    }

    async fn get(
        &self,
        positions: &[Position],
        bytes: usize,
    ) -> Result<Vec<Arc<StoredEvent>>, StoreError> {
        let state = self.state();
        let found = positions.iter().filter_map(|position| state.at(*position));
        Ok(page(found, Limit { events: usize::MAX, bytes }))
    }

    async fn list(&self, query: &Query) -> Result<Vec<Arc<StoredEvent>>, StoreError> {
        let state = self.state();
        let wanted = |event: &&Arc<StoredEvent>| {
            query.kind.as_deref().is_none_or(|kind| kind == event.kind())
                && query.key.as_deref().is_none_or(|key| key == event.key())
        };
        let limit = Limit { events: query.limit, bytes: query.bytes };
        Ok(if query.descending {
            let before = query.after;
            let older = state
                .events
                .iter()
                .rev()
                .filter(|event| before == Position::START || event.position < before);
            page(older.filter(wanted), limit)
        } else {
            page(state.from(query.after).filter(wanted), limit)
        })
    }

    async fn find(&self, source: &str, id: &str) -> Result<Option<Arc<StoredEvent>>, StoreError> {
        Ok(self.state().find(source, id).cloned())
    }

    async fn mark(&self, source: &str) -> Result<Option<Mark>, StoreError> {
        Ok(self.state().marks.get(source).cloned())
    }

    async fn quarantine(
        &self,
        after: u64,
        limit: usize,
    ) -> Result<Vec<QuarantineEntry>, StoreError> {
        let state = self.state();
        let entries = state.quarantine.iter().map(|(entry, _)| entry);
        Ok(entries.filter(|entry| entry.number > after).take(limit).cloned().collect())
    }

    async fn quarantine_entry(
        &self,
        number: u64,
    ) -> Result<Option<(QuarantineEntry, Bytes)>, StoreError> {
        let state = self.state();
        Ok(state.quarantine.iter().find(|(entry, _)| entry.number == number).cloned())
    }

    async fn quarantine_len(&self) -> Result<u64, StoreError> {
        Ok(self.state().quarantine.len() as u64)
    }

    async fn close(&self) {}
}
