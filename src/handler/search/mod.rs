//! `search`: a Tantivy index of chosen events.
//!
//! A [`DocumentMapping`] says what a document of one event type is made of. A later event whose
//! id is the same takes its place as a whole, whichever type it is of: ids are one space for
//! all types of a handler. Event types without a mapping are done at once.
//!
//! Where values come from:
//!
//! * the **id** is a string, number or boolean, kept as it is written. An event without one is
//!   rejected: a dead letter names the pointer;
//! * **text** and **keyword** take strings, numbers and booleans, a **date** RFC 3339 text or
//!   whole milliseconds since 1970, a **number** what is one, also written as text; an array
//!   of these has several values;
//! * what is missing or `null` is left out. So is a value that does not fit its field (an
//!   object as text, `"soon"` as date), and the log says so once for each field.
//!
//! Every flush is one commit that carries the log position, so a crash repeats nothing and
//! loses nothing (G4): [`position`](EventHandler::position) is where the last commit was. What
//! is handled becomes visible to searches with that commit; the dispatcher asks for one at each
//! checkpoint, at most about [`SearchOptions::commit_interval`] later.
//!
//! An index that is damaged, or was built for other options, is removed and built anew from the
//! first event of the log; only another process that holds it, or the machine itself, keeps a
//! handler from opening.

pub(crate) mod doctor;
mod index;
mod mapping;
mod query;
mod rebuild;
mod sealed;
mod writer;

pub use query::{Hit, MAX_LIMIT, MAX_OFFSET, MAX_QUERY_BYTES, SearchPage, SearchQuery};

use std::{
    borrow::Cow,
    collections::BTreeMap,
    fmt, io,
    path::PathBuf,
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use async_trait::async_trait;
use tantivy::{Index, IndexReader, TantivyError};

use self::{mapping::Mapping, writer::Writer};
use super::{
    Batching, EventHandler, HandlerError, Outcome, Rebuildable, pointer::ParsePointerError,
};
use crate::event::{Position, StoredEvent};

/// The least memory an index writer works with, in bytes.
pub const MIN_WRITER_MEMORY: usize = 15_000_000;

/// Events in a batch: enough to keep the indexing thread busy while the next one is read.
const BATCH: usize = 1_000;

/// How the index is built.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SearchOptions {
    /// The folder the index lives in. It is made where it does not exist.
    pub path: PathBuf,
    /// What a document of each event type is made of.
    pub documents: BTreeMap<String, DocumentMapping>,
    /// A commit at the latest after this long. Default 1 s. The handler commits when it is
    /// flushed; this is for whoever decides when.
    pub commit_interval: Duration,
    /// Memory of the index writer, in bytes. Default 64 MiB, at least 15 MB. As much again
    /// may be kept for events that are not committed yet.
    pub writer_memory: usize,
    /// The stemmer: `english`, `german` …; `None` (default): words as they are.
    pub language: Option<String>,
}

impl SearchOptions {
    /// An index in this folder, with the defaults and no documents yet.
    #[must_use]
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            documents: BTreeMap::new(),
            commit_interval: Duration::from_secs(1),
            writer_memory: 64 << 20,
            language: None,
        }
    }
}

/// How an event of one type becomes a document. Values are JSON pointers into `data()`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DocumentMapping {
    /// The document's id: a later event with the same id takes its place.
    pub id: String,
    /// Event types that take the document out, by the same `id` pointer.
    pub delete: Vec<String>,
    /// Full-text fields.
    pub text: BTreeMap<String, String>,
    /// Fields matched as a whole.
    pub keyword: BTreeMap<String, String>,
    /// Dates: RFC 3339 text, or milliseconds since 1970.
    pub date: BTreeMap<String, String>,
    /// Numbers.
    pub number: BTreeMap<String, String>,
}

/// Why an index could not be opened or searched.
#[derive(Debug, thiserror::Error)]
pub enum SearchError {
    /// Two mappings disagree about a field.
    #[error("field `{field}` is {one} in one mapping and {other} in another: rename one of them")]
    FieldKinds {
        /// The field.
        field: String,
        /// What it is in one mapping.
        one: &'static str,
        /// What it is in another.
        other: &'static str,
    },
    /// A field name that queries could not spell.
    #[error(
        "field name `{field}` must begin with a letter and go on with letters, digits, _ and -"
    )]
    FieldName {
        /// The name.
        field: String,
    },
    /// An event type that is mapped twice, or both mapped and listed in `delete`.
    #[error("event type `{event_type}` has two mappings: it may have one, or one `delete`")]
    TwoMappings {
        /// The event type.
        event_type: String,
    },
    /// A value's place is no JSON pointer.
    #[error("`{field}` of the mapping of `{event_type}`")]
    Pointer {
        /// The event type whose mapping it is.
        event_type: String,
        /// The field, or `id`.
        field: String,
        /// What is wrong with it.
        source: ParsePointerError,
    },
    /// There is no stemmer of that name.
    #[error(
        "no stemmer for `{language}`: there is arabic, danish, dutch, english, finnish, \
             french, german, greek, hungarian, italian, norwegian, portuguese, romanian, russian, \
             spanish, swedish, tamil and turkish"
    )]
    Language {
        /// The name.
        language: String,
    },
    /// The writer's memory is out of range.
    #[error("writer memory of {bytes} bytes is not between 15 MB and 4 GB")]
    WriterMemory {
        /// What was asked for.
        bytes: usize,
    },
    /// The fields make no schema.
    #[error("the fields make no schema: {0}")]
    Schema(String),
    /// Another process, or another handler, has the index open.
    #[error(
        "{} is in use by another process or another handler: stop it, or give this handler \
         a folder of its own", path.display()
    )]
    Locked {
        /// The handler's folder.
        path: PathBuf,
    },
    /// The handler's folder cannot be made or read.
    #[error("cannot use folder {}", path.display())]
    Folder {
        /// The folder.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The index cannot be opened or made, for a reason that lies outside of it.
    #[error("cannot open the index in {}", path.display())]
    Open {
        /// The handler's folder.
        path: PathBuf,
        /// Why.
        source: TantivyError,
    },
    /// The writing thread could not be started.
    #[error("cannot start the thread that writes the index")]
    Thread {
        /// Why.
        source: io::Error,
    },
    /// The query asks for more than a search gives.
    #[error("cannot answer this query: {0}")]
    Query(String),
    /// The index could not be read.
    #[error("cannot search the index")]
    Search(#[source] TantivyError),
    /// Searching ended without an answer; the index may be damaged.
    #[error("searching was cut short: {0}; if this stays, restart: the index is then checked")]
    Cut(String),
}

/// A search index that follows the log.
///
/// One thread of its own does all the writing, fed a batch at a time; searches run beside it on
/// what was committed last. Dropped, it waits for that thread and forgets what was not flushed.
pub struct SearchHandler {
    name: String,
    options: SearchOptions,
    mapping: Arc<Mapping>,
    shelf: RwLock<Shelf>,
    /// `None` only while one index takes the place of another.
    writer: RwLock<Option<Arc<Writer>>>,
}

/// What searches look at.
#[derive(Clone)]
struct Shelf {
    index: Index,
    reader: IndexReader,
}

impl fmt::Debug for SearchHandler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SearchHandler")
            .field("name", &self.name)
            .field("path", &self.options.path)
            .finish_non_exhaustive()
    }
}

impl SearchHandler {
    /// Opens the index, or makes it. An index that is there is read as a whole once, to find
    /// damage: *blocks* for as long as the disk needs for that.
    ///
    /// # Errors
    /// Where the options contradict themselves, another process holds the index, or the folder
    /// cannot be used. A damaged index is no error: it is built anew, and a warning says so.
    pub fn open(name: impl Into<String>, options: SearchOptions) -> Result<Self, SearchError> {
        Self::open_in(name.into(), options, &index::mmap)
    }

    fn open_in(
        name: String,
        options: SearchOptions,
        directory: &index::OpenDirectory,
    ) -> Result<Self, SearchError> {
        let mapping = Arc::new(check(&options)?);
        let (shelf, writer) = start(&name, &options, &mapping, directory)?;
        let (shelf, writer) = (RwLock::new(shelf), RwLock::new(Some(Arc::new(writer))));
        Ok(Self { name, options, mapping, shelf, writer })
    }

    fn shelf(&self) -> Shelf {
        self.shelf.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn writer(&self) -> Result<Arc<Writer>, HandlerError> {
        let writer = self.writer.read().unwrap_or_else(PoisonError::into_inner);
        writer.clone().ok_or_else(|| HandlerError::new("the search index is being exchanged"))
    }

    /// How often it wants to be flushed while there is something to flush.
    #[must_use]
    pub const fn commit_interval(&self) -> Duration {
        self.options.commit_interval
    }

    /// How many documents there are, as of the last commit.
    #[must_use]
    pub fn documents(&self) -> u64 {
        self.shelf().reader.searcher().num_docs()
    }

    /// Searches what was committed last, on a thread for blocking work.
    ///
    /// *Cancel safe*: a search that nobody waits for any more ends by itself.
    ///
    /// # Errors
    /// [`SearchError::Query`] where the query asks for too much, and otherwise where the index
    /// cannot be read. No query is a syntax error.
    pub async fn search(&self, query: &SearchQuery) -> Result<SearchPage, SearchError> {
        let Shelf { index, reader } = self.shelf();
        let searcher = reader.searcher();
        let (mapping, query) = (Arc::clone(&self.mapping), query.clone());
        tokio::task::spawn_blocking(move || query::run(&index, &searcher, &mapping, &query))
            .await
            .unwrap_or_else(|error| Err(SearchError::Cut(error.to_string())))
    }
}

/// Opens the index, and starts the thread that writes to it.
fn start(
    name: &str,
    options: &SearchOptions,
    mapping: &Arc<Mapping>,
    directory: &index::OpenDirectory,
) -> Result<(Shelf, Writer), SearchError> {
    let opened = index::open(name, &options.path, mapping, directory)?;
    let shelf = Shelf { index: opened.index.clone(), reader: opened.reader.clone() };
    let writer = Writer::start(name, opened, Arc::clone(mapping), options.writer_memory)?;
    Ok((shelf, writer))
}

/// Finds what is wrong with the options without touching the disk.
fn check(options: &SearchOptions) -> Result<Mapping, SearchError> {
    let bytes = options.writer_memory;
    if !(MIN_WRITER_MEMORY..4_000_000_000).contains(&bytes) {
        return Err(SearchError::WriterMemory { bytes });
    }
    Mapping::compile(&options.documents, options.language.as_deref())
}

impl SearchOptions {
    /// Finds what is wrong with them without touching the disk, for `pulsebus check`.
    ///
    /// # Errors
    /// What [`SearchHandler::open`] would refuse.
    pub fn validate(&self) -> Result<(), SearchError> {
        check(self).map(|_| ())
    }
}

#[async_trait]
impl EventHandler for SearchHandler {
    fn name(&self) -> &str {
        &self.name
    }

    fn kind(&self) -> &'static str {
        "search"
    }

    fn has_side_effects(&self) -> bool {
        false
    }

    fn batching(&self) -> Batching {
        Batching::InOrder(BATCH)
    }

    /// The document's id: what one document is made of stays in log order, also where the
    /// events about it have different keys.
    fn lane<'a>(&self, event: &'a StoredEvent) -> Cow<'a, str> {
        self.mapping.document(event).unwrap_or_else(|| Cow::Borrowed(event.id()))
    }

    async fn handle(&self, event: &StoredEvent) -> Outcome {
        let outcome = self.handle_batch(&[Arc::new(event.clone())]).await.pop();
        outcome.unwrap_or_else(|| Outcome::retry("the search index gave no answer"))
    }

    async fn handle_batch(&self, events: &[Arc<StoredEvent>]) -> Vec<Outcome> {
        match self.writer() {
            Ok(writer) => writer.apply(events.to_vec()).await,
            Err(error) => events.iter().map(|_| Outcome::unavailable(error.clone())).collect(),
        }
    }

    /// The payload of the last commit; [`Position::START`] for an index that is new or is
    /// being built anew, so that it is filled from the log whatever the store's cursor says.
    async fn position(&self) -> Result<Option<Position>, HandlerError> {
        Ok(Some(self.writer()?.committed()))
    }

    async fn flush(&self, upto: Position) -> Result<(), HandlerError> {
        self.writer()?.flush(upto).await
    }

    fn rebuildable(&self) -> Option<&dyn Rebuildable> {
        Some(self)
    }
}

#[cfg(test)]
mod tests;
