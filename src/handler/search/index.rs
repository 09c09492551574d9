//! The index on disk: opening it, judging whether it can be carried on, building it anew.
//!
//! The index is a copy of the log and never worth refusing to start for: what is damaged, or
//! was built for another mapping, is removed and read again from the log. What stops us is the
//! machine (permissions, descriptors, a disk that does not answer) and another process.

use std::{
    fs::{self, File, TryLockError},
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
};

use serde::{Deserialize, Serialize};
use tantivy::{
    Index, IndexReader, IndexSettings, ReloadPolicy, SegmentReader, TantivyError,
    directory::{
        Directory, MmapDirectory,
        error::{OpenDirectoryError, OpenReadError, OpenWriteError},
    },
};

use super::{SearchError, mapping::Mapping, sealed::Sealed};
use crate::event::Position;

/// The index proper, within the handler's folder.
pub(super) const INDEX: &str = "index";
/// What is being removed; left behind by a crash, the next start removes it.
pub(super) const STALE: &str = "stale";
/// Held by whoever has the index open.
pub(super) const LOCK: &str = "lock";

/// Turns a folder into a directory; tests put faults in between.
pub(super) type OpenDirectory = dyn Fn(&Path) -> Result<Box<dyn Directory>, OpenDirectoryError>;

pub(super) fn mmap(path: &Path) -> Result<Box<dyn Directory>, OpenDirectoryError> {
    Ok(Box::new(MmapDirectory::open(path)?))
}

/// An index that is whole, fits the mapping, and is ours alone.
pub(super) struct Opened {
    pub(super) index: Index,
    pub(super) reader: IndexReader,
    pub(super) committed: Position,
    /// Held as long as the index is open; the kernel lets go of it when the process dies.
    pub(super) lock: File,
}

/// What a commit says about itself.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Payload {
    /// The last event in the index, with all before it.
    pub(super) position: Position,
    /// The fingerprint of the mapping it was built for.
    mapping: String,
}

impl Payload {
    pub(super) fn new(position: Position, mapping: &Mapping) -> Self {
        Self { position, mapping: mapping.fingerprint.clone() }
    }

    pub(super) fn to_json(&self) -> Result<String, TantivyError> {
        serde_json::to_string(self)
            .map_err(|error| TantivyError::InternalError(format!("commit payload: {error}")))
    }

    pub(super) fn from_json(json: &str) -> Option<Self> {
        serde_json::from_str(json).ok()
    }

    /// Whether it was built for this mapping.
    pub(super) fn fits(&self, mapping: &Mapping) -> bool {
        self.mapping == mapping.fingerprint
    }
}

/// Why an index cannot be carried on.
enum Unfit {
    /// It can be built anew.
    Rebuild(String),
    /// The machine is in the way; what is there is left alone.
    Machine(TantivyError),
}

impl From<TantivyError> for Unfit {
    fn from(error: TantivyError) -> Self {
        if is_machine(&error) { Self::Machine(error) } else { Self::Rebuild(error.to_string()) }
    }
}

/// Opens the index in this folder, or makes it. Reads all of it once, to find flipped bytes.
pub(super) fn open(
    name: &str,
    path: &Path,
    mapping: &Mapping,
    directory: &OpenDirectory,
) -> Result<Opened, SearchError> {
    let io = |source| SearchError::Folder { path: path.to_owned(), source };
    fs::create_dir_all(path).map_err(io)?;
    let lock = File::options()
        .create(true)
        .write(true)
        .truncate(false)
        .open(path.join(LOCK))
        .map_err(io)?;
    lock.try_lock().map_err(|error| match error {
        TryLockError::WouldBlock => SearchError::Locked { path: path.to_owned() },
        TryLockError::Error(source) => io(source),
    })?;
    let (current, stale) = (path.join(INDEX), path.join(STALE));
    remove(&stale).map_err(io)?;
    if current.exists() {
        match inspect(&current, mapping, directory) {
            Ok((index, reader, committed)) => return Ok(Opened { index, reader, committed, lock }),
            Err(Unfit::Machine(source)) => {
                return Err(SearchError::Open { path: path.to_owned(), source });
            }
            Err(Unfit::Rebuild(reason)) => tracing::warn!(
                handler = name,
                path = %current.display(),
                reason,
                "search index is rebuilt from the first event of the log; \
                 until it has caught up, searches find only part of the documents"
            ),
        }
        fs::rename(&current, &stale).map_err(io)?;
        remove(&stale).map_err(io)?;
    }
    fs::create_dir_all(&current).map_err(io)?;
    let (index, reader) = create(&current, mapping, directory)
        .map_err(|source| SearchError::Open { path: path.to_owned(), source })?;
    Ok(Opened { index, reader, committed: Position::START, lock })
}

fn create(
    path: &Path,
    mapping: &Mapping,
    directory: &OpenDirectory,
) -> Result<(Index, IndexReader), TantivyError> {
    let index =
        Index::create(Sealed(directory(path)?), mapping.schema.clone(), IndexSettings::default())?;
    // From now on the index says which mapping it is for, also before its first event.
    let mut writer = writer(&index, super::MIN_WRITER_MEMORY)?;
    let mut commit = writer.prepare_commit()?;
    commit.set_payload(&Payload::new(Position::START, mapping).to_json()?);
    commit.commit()?;
    let reader = reader(&index, mapping)?;
    Ok((index, reader))
}

pub(super) fn writer(index: &Index, memory: usize) -> Result<tantivy::IndexWriter, TantivyError> {
    let options = tantivy::indexer::IndexWriterOptions::builder()
        .num_worker_threads(1)
        .num_merge_threads(1)
        .memory_budget_per_thread(memory)
        .build();
    index.writer_with_options(options)
}

fn reader(index: &Index, mapping: &Mapping) -> Result<IndexReader, TantivyError> {
    mapping.register_tokenizer(index.tokenizers());
    index.reader_builder().reload_policy(ReloadPolicy::Manual).try_into()
}

/// Whether the index is whole and was built for this mapping. Tantivy panics on some kinds of
/// damage, so a panic here is damage too.
fn inspect(
    path: &Path,
    mapping: &Mapping,
    directory: &OpenDirectory,
) -> Result<(Index, IndexReader, Position), Unfit> {
    let looked = catch_unwind(AssertUnwindSafe(|| look(path, mapping, directory)));
    looked.unwrap_or_else(|_| Err(Unfit::Rebuild("reading it panicked: it is damaged".into())))
}

fn look(
    path: &Path,
    mapping: &Mapping,
    directory: &OpenDirectory,
) -> Result<(Index, IndexReader, Position), Unfit> {
    let rebuild = |reason: String| Err(Unfit::Rebuild(reason));
    let index = Index::open(Sealed(directory(path).map_err(TantivyError::from)?))?;
    let metas = index.load_metas()?;
    let Some(payload) = metas.payload.as_deref().and_then(Payload::from_json) else {
        return rebuild("it does not say how far it is".into());
    };
    if !payload.fits(mapping) || metas.schema != mapping.schema {
        return rebuild("the configured documents or their language have changed".into());
    }
    let written = index.directory().list_managed_files();
    if !written.contains(Path::new("meta.json")) {
        return rebuild("its list of files is missing".into());
    }
    // Tantivy takes some missing files for empty ones, so each that was written must be there.
    for file in metas.list_segment_files().intersection(&written) {
        if !index.directory().validate_checksum(file).map_err(TantivyError::from)? {
            return rebuild(format!("{} is damaged", file.display()));
        }
    }
    for segment in index.searchable_segments()? {
        // Opened here, so that a file that is missing is noticed before anybody searches.
        let meta = segment.meta();
        let held = SegmentReader::open(&segment)?;
        let rows = held.fast_fields().u64("_position")?.num_docs();
        if rows != meta.max_doc() || held.num_docs() != meta.num_docs() {
            return rebuild(format!("segment {} holds another number of documents", meta.id()));
        }
    }
    let reader = reader(&index, mapping)?;
    Ok((index, reader, payload.position))
}

/// Whether an error tells of the machine rather than of the index: the operating system said so,
/// and it was not that a file is missing.
pub(super) fn is_machine(error: &TantivyError) -> bool {
    let cause = match error {
        TantivyError::IoError(io_error)
        | TantivyError::OpenReadError(OpenReadError::IoError { io_error, .. })
        | TantivyError::OpenWriteError(OpenWriteError::IoError { io_error, .. })
        | TantivyError::OpenDirectoryError(OpenDirectoryError::IoError { io_error, .. }) => {
            io_error
        }
        _ => return false,
    };
    match cause.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => false,
        // Some errors come wrapped, and their number is not to be had.
        io::ErrorKind::StorageFull
        | io::ErrorKind::QuotaExceeded
        | io::ErrorKind::ReadOnlyFilesystem
        | io::ErrorKind::PermissionDenied
        | io::ErrorKind::OutOfMemory => true,
        _ => cause.raw_os_error().is_some(),
    }
}

pub(super) fn remove(path: &Path) -> io::Result<()> {
    let removed = match fs::symlink_metadata(path) {
        Ok(found) if found.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match removed {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}
