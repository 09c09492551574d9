//! A store that fails when it is told to.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;
use pulsebus::{
    event::{Position, StoredEvent},
    store::{
        Batch, Connections, EventStore, Extent, Limit, ProgressStore, QuarantineEntry, Query,
        Removal, Removed, StoreError,
        progress::{
            AuditEntry, Checkpoint, Claim, Claimed, DeadLetter, DeadLetterFilter, Epoch,
            NewRedrive, QuarantineFilter, Redrive, Redriven, RedrivenEntry, SettledEntry,
            Unfinished,
        },
    },
    transport::{Mark, Receipt},
};
use time::OffsetDateTime;

/// What becomes of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// It is passed on.
    Pass,
    /// It fails, and nothing has happened.
    Before,
    /// It has happened, and fails all the same: an answer that got lost.
    After,
    /// It is passed on after so long: the process was asleep.
    Late(Duration),
}

/// Sees what is read.
type Watch = Box<dyn Fn(&[Arc<StoredEvent>]) + Send + Sync>;

/// Passes calls on to a store, or fails them.
pub struct Faulty {
    store: Arc<dyn EventStore>,
    fate: Box<dyn Fn(&'static str) -> Fate + Send + Sync>,
    watch: Watch,
}

impl Faulty {
    /// `fate` decides by the name of the method.
    pub fn new(
        store: Arc<dyn EventStore>,
        fate: impl Fn(&'static str) -> Fate + Send + Sync + 'static,
    ) -> Self {
        Self { store, fate: Box::new(fate), watch: Box::new(|_| {}) }
    }

    /// Lets somebody see the events that are read.
    pub fn watched(mut self, watch: impl Fn(&[Arc<StoredEvent>]) + Send + Sync + 'static) -> Self {
        self.watch = Box::new(watch);
        self
    }

    async fn call<T>(
        &self,
        method: &'static str,
        call: impl Future<Output = Result<T, StoreError>> + Send,
    ) -> Result<T, StoreError> {
        let fate = (self.fate)(method);
        if let Fate::Late(by) = fate {
            tokio::time::sleep(by).await;
        }
        if fate == Fate::Before {
            return Err(StoreError::unavailable("the database has been unplugged"));
        }
        let result = call.await;
        if fate == Fate::After && result.is_ok() {
            return Err(StoreError::unavailable("the answer of the database got lost"));
        }
        result
    }
}

#[async_trait]
impl EventStore for Faulty {
    fn kind(&self) -> &'static str {
        self.store.kind()
    }

    fn patience(&self) -> Duration {
        self.store.patience()
    }

    async fn append(&self, batch: &Batch) -> Result<Vec<Receipt>, StoreError> {
        self.call("append", self.store.append(batch)).await
    }

    async fn head(&self) -> Result<Position, StoreError> {
        self.call("head", self.store.head()).await
    }

    async fn extent(&self) -> Result<Extent, StoreError> {
        self.call("extent", self.store.extent()).await
    }

    async fn remove(&self, removal: &Removal) -> Result<Removed, StoreError> {
        self.call("remove", self.store.remove(removal)).await
    }

    async fn read(
        &self,
        after: Position,
        limit: Limit,
    ) -> Result<Vec<Arc<StoredEvent>>, StoreError> {
        self.call("read", self.store.read(after, limit)).await.inspect(|read| (self.watch)(read))
    }

    async fn get(
        &self,
        positions: &[Position],
        bytes: usize,
    ) -> Result<Vec<Arc<StoredEvent>>, StoreError> {
        self.call("get", self.store.get(positions, bytes)).await.inspect(|got| (self.watch)(got))
    }

    async fn list(&self, query: &Query) -> Result<Vec<Arc<StoredEvent>>, StoreError> {
        self.call("list", self.store.list(query)).await
    }

    async fn find(&self, source: &str, id: &str) -> Result<Option<Arc<StoredEvent>>, StoreError> {
        self.call("find", self.store.find(source, id)).await
    }

    async fn mark(&self, source: &str) -> Result<Option<Mark>, StoreError> {
        self.call("mark", self.store.mark(source)).await
    }

    async fn quarantine(
        &self,
        after: u64,
        limit: usize,
    ) -> Result<Vec<QuarantineEntry>, StoreError> {
        self.call("quarantine", self.store.quarantine(after, limit)).await
    }

    async fn quarantine_entry(
        &self,
        number: u64,
    ) -> Result<Option<(QuarantineEntry, Bytes)>, StoreError> {
        self.call("quarantine_entry", self.store.quarantine_entry(number)).await
    }

    async fn quarantine_len(&self) -> Result<u64, StoreError> {
        self.call("quarantine_len", self.store.quarantine_len()).await
    }

    async fn appended_elsewhere(&self, seen: Position) {
        self.store.appended_elsewhere(seen).await;
    }

    fn connections(&self) -> Option<Connections> {
        self.store.connections()
    }

    // The store goes on without this one.
    async fn close(&self) {}
}

#[async_trait]
impl ProgressStore for Faulty {
    fn is_shared(&self) -> bool {
        self.store.is_shared()
    }

    async fn claim(&self, claim: Claim<'_>) -> Result<Claimed, StoreError> {
        self.call("claim", self.store.claim(claim)).await
    }

    async fn renew(&self, handler: &str, epoch: Epoch, ttl: Duration) -> Result<bool, StoreError> {
        self.call("renew", self.store.renew(handler, epoch, ttl)).await
    }

    async fn release(&self, handler: &str, epoch: Epoch) -> Result<(), StoreError> {
        self.call("release", self.store.release(handler, epoch)).await
    }

    async fn cursor(&self, handler: &str) -> Result<Option<Position>, StoreError> {
        self.call("cursor", self.store.cursor(handler)).await
    }

    async fn checkpoint(&self, checkpoint: &Checkpoint) -> Result<(), StoreError> {
        self.call("checkpoint", self.store.checkpoint(checkpoint)).await
    }

    async fn rewind(
        &self,
        handler: &str,
        epoch: Epoch,
        to: Position,
        audit: Option<&AuditEntry>,
    ) -> Result<Position, StoreError> {
        self.call("rewind", self.store.rewind(handler, epoch, to, audit)).await
    }

    async fn adopt(&self, from: (&str, Epoch), to: (&str, Epoch)) -> Result<(), StoreError> {
        self.call("adopt", self.store.adopt(from, to)).await
    }

    async fn forget(&self, handler: &str, epoch: Epoch) -> Result<(), StoreError> {
        self.call("forget", self.store.forget(handler, epoch)).await
    }

    async fn set_paused(
        &self,
        handler: &str,
        paused: bool,
        audit: &AuditEntry,
    ) -> Result<bool, StoreError> {
        self.call("set_paused", self.store.set_paused(handler, paused, audit)).await
    }

    async fn unfinished(
        &self,
        handler: &str,
        after: Position,
        limit: usize,
    ) -> Result<Vec<Unfinished>, StoreError> {
        self.call("unfinished", self.store.unfinished(handler, after, limit)).await
    }

    async fn dead_letters(
        &self,
        filter: &DeadLetterFilter,
        after: Option<(&str, Position)>,
        limit: usize,
    ) -> Result<Vec<DeadLetter>, StoreError> {
        self.call("dead_letters", self.store.dead_letters(filter, after, limit)).await
    }

    async fn unfinished_at(
        &self,
        handler: &str,
        positions: &[Position],
    ) -> Result<Vec<DeadLetter>, StoreError> {
        self.call("unfinished_at", self.store.unfinished_at(handler, positions)).await
    }

    async fn count_dead_letters(&self, filter: &DeadLetterFilter) -> Result<u64, StoreError> {
        self.call("count_dead_letters", self.store.count_dead_letters(filter)).await
    }

    async fn count_quarantine(&self, filter: &QuarantineFilter) -> Result<u64, StoreError> {
        self.call("count_quarantine", self.store.count_quarantine(filter)).await
    }

    async fn unpublished(
        &self,
        handler: &str,
        limit: usize,
    ) -> Result<Vec<DeadLetter>, StoreError> {
        self.call("unpublished", self.store.unpublished(handler, limit)).await
    }

    async fn mark_published(
        &self,
        handler: &str,
        letters: &[(Position, OffsetDateTime)],
    ) -> Result<(), StoreError> {
        self.call("mark_published", self.store.mark_published(handler, letters)).await
    }

    async fn start_redrive(&self, what: &NewRedrive) -> Result<Redrive, StoreError> {
        self.call("start_redrive", self.store.start_redrive(what)).await
    }

    async fn redrives(&self, after: u64, limit: usize) -> Result<Vec<Redrive>, StoreError> {
        self.call("redrives", self.store.redrives(after, limit)).await
    }

    async fn redrive(&self, number: u64) -> Result<Option<Redrive>, StoreError> {
        self.call("redrive", self.store.redrive(number)).await
    }

    async fn cancel_redrive(
        &self,
        number: u64,
        audit: &AuditEntry,
    ) -> Result<Option<Redrive>, StoreError> {
        self.call("cancel_redrive", self.store.cancel_redrive(number, audit)).await
    }

    async fn redriven(
        &self,
        handler: &str,
        except: &[u64],
        limit: usize,
    ) -> Result<Vec<Redriven>, StoreError> {
        self.call("redriven", self.store.redriven(handler, except, limit)).await
    }

    async fn redriven_quarantine(
        &self,
        except: &[u64],
        limit: usize,
    ) -> Result<Vec<RedrivenEntry>, StoreError> {
        self.call("redriven_quarantine", self.store.redriven_quarantine(except, limit)).await
    }

    async fn settle_quarantine(&self, settled: &[SettledEntry]) -> Result<(), StoreError> {
        self.call("settle_quarantine", self.store.settle_quarantine(settled)).await
    }

    async fn discard_orphans(&self, registered: &[String]) -> Result<(), StoreError> {
        self.call("discard_orphans", self.store.discard_orphans(registered)).await
    }

    async fn end_redrives(&self) -> Result<(), StoreError> {
        self.call("end_redrives", self.store.end_redrives()).await
    }

    async fn audit(&self, entry: &AuditEntry) -> Result<(), StoreError> {
        self.call("audit", self.store.audit(entry)).await
    }

    async fn audits(&self, before: u64, limit: usize) -> Result<Vec<AuditEntry>, StoreError> {
        self.call("audits", self.store.audits(before, limit)).await
    }
}
