//! `search`: a Tantivy index of chosen events.

use std::{collections::BTreeMap, path::PathBuf, time::Duration};

/// How the index is built.
#[derive(Debug, Clone)]
pub struct SearchOptions {
    /// The folder the index lives in.
    pub path: PathBuf,
    /// What a document of each event type is made of.
    pub documents: BTreeMap<String, DocumentMapping>,
    /// A commit at the latest after this long. Default 1 s.
    pub commit_interval: Duration,
    /// Memory of the index writer, in bytes. Default 64 MiB, at least 15 MB.
    pub writer_memory: usize,
    /// The stemmer, `english` …; `None`: words as they are.
    pub language: Option<String>,
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
