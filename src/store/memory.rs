//! The log in memory: the reference for the contract, for tests and for embedding.
//!
//! G1 reaches as far as the process: what was acknowledged is gone when it ends. Memory grows
//! with the log.

mod progress;

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard},
};

use async_trait::async_trait;
use bytes::Bytes;

use super::{
    AttemptAppend, AttemptError, Batch, EventStore, Limit, QuarantineEntry, Query, StoreError,
    admit::{self, Plan},
    append_isolating, row,
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
    /// The event at position n is at index n - 1.
    events: Vec<Arc<StoredEvent>>,
    identities: HashMap<Arc<str>, HashMap<Box<str>, usize>>,
    quarantine: Vec<(QuarantineEntry, Bytes)>,
    marks: HashMap<Box<str>, Mark>,
    /// The number of the last quarantine entry, which may be gone.
    last_held: u64,
    progress: progress::Progress,
}

impl State {
    fn find(&self, source: &str, id: &str) -> Option<&Arc<StoredEvent>> {
        self.events.get(*self.identities.get(source)?.get(id)?)
    }

    fn head(&self) -> Position {
        Position(self.events.len() as u64)
    }

    fn from(&self, after: Position) -> &[Arc<StoredEvent>] {
        let after = usize::try_from(after.0).unwrap_or(usize::MAX).min(self.events.len());
        &self.events[after..]
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
        let plan = Plan::checked(&batch.entries, |_, event| {
            let stored = state.find(event.source(), event.id())?;
            Some((stored.position, &stored.event))
        });
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
        let fresh: Vec<_> = plan.fresh.into_iter().cloned().collect();
        state.last_held += held.len() as u64;
        state.quarantine.extend(held);
        for event in fresh {
            let index = state.events.len();
            let of_source = match state.identities.get_mut(event.source()) {
                Some(of_source) => of_source,
                None => state.identities.entry(event.source().into()).or_default(),
            };
            of_source.insert(event.id().into(), index);
            state.events.push(Arc::new(StoredEvent {
                position: Position(index as u64 + 1),
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

    async fn read(
        &self,
        after: Position,
        limit: Limit,
    ) -> Result<Vec<Arc<StoredEvent>>, StoreError> {
        Ok(page(self.state().from(after).iter(), limit))
    }

    async fn get(
        &self,
        positions: &[Position],
        bytes: usize,
    ) -> Result<Vec<Arc<StoredEvent>>, StoreError> {
        let state = self.state();
        let found = positions.iter().filter_map(|position| {
            state.events.get(usize::try_from(position.0.checked_sub(1)?).ok()?)
        });
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
            page(state.from(query.after).iter().filter(wanted), limit)
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
