//! The one thread that writes to the index, and what it keeps until a commit has succeeded.
//!
//! Tantivy forgets what was added when a commit fails: its indexing thread has ended with the
//! error, and a second commit would succeed without those documents. So every event since the
//! last commit is kept here; after a failure the writer is thrown away, and the next request
//! opens a new one and applies the kept events again. Applying them twice changes nothing:
//! each puts a document in the place of the one with its id, or takes it out.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
};

use tantivy::{Index, IndexReader, IndexWriter, TantivyError};
use tokio::sync::{mpsc, oneshot};

use super::{
    SearchError,
    index::{self, Opened, Payload},
    mapping::{Mapping, Operation},
};
use crate::{
    event::{Position, StoredEvent},
    handler::{HandlerError, Outcome},
};

/// Requests that may wait for the thread. More would only make batches wait unseen.
const QUEUE: usize = 4;

/// What an event costs to keep, apart from its body. Bytes, roughly.
const EVENT_OVERHEAD: usize = 512;

enum Request {
    Apply { events: Vec<Arc<StoredEvent>>, reply: oneshot::Sender<Vec<Outcome>> },
    Flush { upto: Position, reply: oneshot::Sender<Result<(), HandlerError>> },
}

/// A handle on the writing thread. Dropped, it waits for the thread to end; what was not
/// flushed is forgotten.
pub(super) struct Writer {
    requests: Option<mpsc::Sender<Request>>,
    committed: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl Writer {
    pub(super) fn start(
        name: &str,
        opened: Opened,
        mapping: Arc<Mapping>,
        memory: usize,
    ) -> Result<Self, SearchError> {
        let (requests, mut inbox) = mpsc::channel(QUEUE);
        let committed = Arc::new(AtomicU64::new(opened.committed.0));
        let Opened { index, reader, lock, .. } = opened;
        let mut state = State {
            name: name.to_owned(),
            index,
            reader,
            mapping,
            memory,
            writer: None,
            pending: Vec::new(),
            pending_bytes: 0,
            committed: Arc::clone(&committed),
            reload: false,
        };
        let run = move || {
            while let Some(request) = inbox.blocking_recv() {
                state.serve(request);
            }
            // The lock is the last to go: whoever gets it finds the index closed.
            drop(state);
            drop(lock);
        };
        let thread = thread::Builder::new()
            .name(format!("search {name}"))
            .spawn(run)
            .map_err(|source| SearchError::Thread { source })?;
        Ok(Self { requests: Some(requests), committed, thread: Some(thread) })
    }

    /// The position of the last commit.
    pub(super) fn committed(&self) -> Position {
        Position(self.committed.load(Ordering::Acquire))
    }

    /// Applies events in order. Cancelled, they may be applied all the same; requests are
    /// served in order, so a second attempt comes after the first.
    pub(super) async fn apply(&self, events: Vec<Arc<StoredEvent>>) -> Vec<Outcome> {
        let count = events.len();
        match self.ask(|reply| Request::Apply { events, reply }).await {
            Some(outcomes) => outcomes,
            None => all(count, || Outcome::unavailable(gone())),
        }
    }

    /// Commits what was applied, as being everything up to this position.
    pub(super) async fn flush(&self, upto: Position) -> Result<(), HandlerError> {
        self.ask(|reply| Request::Flush { upto, reply }).await.unwrap_or_else(|| Err(gone()))
    }

    async fn ask<T>(&self, request: impl FnOnce(oneshot::Sender<T>) -> Request) -> Option<T> {
        let (reply, answer) = oneshot::channel();
        self.requests.as_ref()?.send(request(reply)).await.ok()?;
        answer.await.ok()
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.requests = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn gone() -> HandlerError {
    HandlerError::new("the thread that writes the search index has ended")
}

fn all(count: usize, outcome: impl Fn() -> Outcome) -> Vec<Outcome> {
    (0..count).map(|_| outcome()).collect()
}

struct State {
    name: String,
    index: Index,
    reader: IndexReader,
    mapping: Arc<Mapping>,
    memory: usize,
    /// `None` before the first event, and after a failure.
    writer: Option<IndexWriter>,
    /// Applied and not committed.
    pending: Vec<Arc<StoredEvent>>,
    pending_bytes: usize,
    committed: Arc<AtomicU64>,
    /// A commit is not visible to searches yet.
    reload: bool,
}

impl State {
    fn serve(&mut self, request: Request) {
        match request {
            Request::Apply { events, reply } => {
                let outcomes = self.guarded(|state| state.apply(&events)).unwrap_or_else(|error| {
                    all(events.len(), || Outcome::unavailable(error.clone()))
                });
                let _ = reply.send(outcomes);
            }
            Request::Flush { upto, reply } => {
                let _ = reply.send(self.guarded(|state| state.flush(upto)));
            }
        }
    }

    /// Runs it; after an error, or a panic inside Tantivy, the writer is thrown away.
    fn guarded<T>(
        &mut self,
        run: impl FnOnce(&mut Self) -> Result<T, TantivyError>,
    ) -> Result<T, HandlerError> {
        let error = match catch_unwind(AssertUnwindSafe(|| run(self))) {
            Ok(Ok(value)) => return Ok(value),
            Ok(Err(error)) if index::is_machine(&error) => HandlerError::from(error),
            Ok(Err(TantivyError::ErrorInThread(_))) => HandlerError::new(
                "an indexing thread has failed, most likely because the disk is full; what is \
                 not committed is kept and indexed again",
            ),
            Ok(Err(error)) => HandlerError::new(format!(
                "{error}; if this stays, the index may be damaged: restart, it is then checked \
                 and rebuilt from the log where needed"
            )),
            Err(_) => HandlerError::new(
                "writing the search index panicked: it may be damaged; restart, it is then \
                 checked and rebuilt from the log where needed",
            ),
        };
        let writer = self.writer.take();
        // Dropping joins Tantivy's threads; what they died of must not end this one.
        let _ = catch_unwind(AssertUnwindSafe(|| drop(writer)));
        Err(error)
    }

    fn apply(&mut self, events: &[Arc<StoredEvent>]) -> Result<Vec<Outcome>, TantivyError> {
        if self.pending_bytes > self.memory {
            // Bounded also when nobody flushes: make room, and leave the position where it is.
            // Events after it are then applied again after a crash, which changes nothing.
            self.commit(self.position())?;
        }
        let mut outcomes = Vec::with_capacity(events.len());
        let mut applied = Vec::with_capacity(events.len());
        for event in events {
            match self.mapping.operation(event) {
                Ok(Operation::None) => {}
                Ok(operation) => {
                    run(self.writer()?, operation)?;
                    applied.push(event);
                }
                Err(error) => {
                    outcomes.push(Outcome::reject(error));
                    continue;
                }
            }
            outcomes.push(Outcome::Done);
        }
        for event in applied {
            self.pending_bytes += event.body().len() + EVENT_OVERHEAD;
            self.pending.push(Arc::clone(event));
        }
        Ok(outcomes)
    }

    fn flush(&mut self, upto: Position) -> Result<(), TantivyError> {
        if upto > self.position() || !self.pending.is_empty() {
            self.commit(upto.max(self.position()))?;
        }
        if self.reload {
            self.reload();
        }
        Ok(())
    }

    fn commit(&mut self, position: Position) -> Result<(), TantivyError> {
        let payload = Payload::new(position, &self.mapping).to_json()?;
        let mut commit = self.writer()?.prepare_commit()?;
        commit.set_payload(&payload);
        commit.commit()?;
        self.pending.clear();
        self.pending_bytes = 0;
        self.committed.store(position.0, Ordering::Release);
        self.reload();
        Ok(())
    }

    /// Lets searches see the last commit. It is durable already, so a failure (too many open
    /// files) is no reason to commit again: the next flush tries again.
    fn reload(&mut self) {
        let failed = self.reader.reload().err();
        if let Some(error) = &failed {
            tracing::warn!(
                handler = self.name,
                error = %error,
                "search index is committed but searches do not see it yet; tried again shortly"
            );
        }
        self.reload = failed.is_some();
    }

    fn position(&self) -> Position {
        Position(self.committed.load(Ordering::Acquire))
    }

    /// The writer; a new one begins with what is pending.
    fn writer(&mut self) -> Result<&mut IndexWriter, TantivyError> {
        let writer = match self.writer.take() {
            Some(writer) => writer,
            None => {
                let writer = index::writer(&self.index, self.memory)?;
                for event in &self.pending {
                    if let Ok(operation) = self.mapping.operation(event) {
                        run(&writer, operation)?;
                    }
                }
                writer
            }
        };
        Ok(self.writer.insert(writer))
    }
}

fn run(writer: &IndexWriter, operation: Operation) -> Result<(), TantivyError> {
    match operation {
        Operation::None => {}
        Operation::Delete(id) => {
            writer.delete_term(id);
        }
        Operation::Upsert(id, document) => {
            writer.delete_term(id);
            writer.add_document(document)?;
        }
    }
    Ok(())
}
