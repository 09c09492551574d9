//! What is left after damage, a full disk, another mapping, another process.

use std::{
    fs,
    io::{self, Read as _, Seek as _, SeekFrom, Write as _},
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
    time::Instant,
};

use tantivy::directory::{
    Directory, FileHandle, MmapDirectory, WatchCallback, WatchHandle, WritePtr,
    error::{DeleteError, OpenReadError, OpenWriteError},
};

use super::*;

#[tokio::test]
async fn another_mapping_builds_the_index_anew() {
    let folder = tempfile::tempdir().unwrap();
    let handler = open(&folder);
    apply(&handler, &[lesson(1, "a", "Rust")]).await;
    handler.flush(Position(1)).await.unwrap();
    drop(handler);
    // Only where a value comes from has changed: the schema has not.
    let mut changed = options(folder.path());
    let mapping = changed.documents.get_mut("LessonPublished").unwrap();
    mapping.text.insert("title".into(), "/author_id".into());
    let handler = SearchHandler::open("search", changed.clone()).unwrap();
    assert_eq!(position(&handler).await, 0);
    apply(&handler, &[lesson(1, "a", "Rust")]).await;
    handler.flush(Position(1)).await.unwrap();
    drop(handler);
    // Memory is no reason.
    changed.writer_memory += 1;
    let handler = SearchHandler::open("search", changed.clone()).unwrap();
    assert_eq!((position(&handler).await, find(&handler, "a1").await), (1, vec!["a".to_owned()]));
    drop(handler);
    changed.language = Some("german".into());
    assert_eq!(position(&SearchHandler::open("search", changed).unwrap()).await, 0);
}

#[tokio::test]
async fn a_second_handler_is_told_that_the_index_is_in_use() {
    let folder = tempfile::tempdir().unwrap();
    let first = open(&folder);
    let error = SearchHandler::open("other", options(folder.path())).unwrap_err();
    assert!(matches!(error, SearchError::Locked { .. }), "{error}");
    drop(first);
    open(&folder);
}

/// A filled index, its files, and what is in it.
async fn filled(folder: &TempDir) -> Vec<std::path::PathBuf> {
    let handler = open(folder);
    for batch in 0..2_u64 {
        let events: Vec<_> = (1..=50)
            .map(|n| lesson(batch * 50 + n, &format!("l{}", (batch * 50 + n) % 70), "Rust"))
            .collect();
        apply(&handler, &events).await;
        handler.flush(Position(batch * 50 + 50)).await.unwrap();
    }
    apply(&handler, &[removed(101, "l1")]).await;
    handler.flush(Position(101)).await.unwrap();
    drop(handler);
    let mut files: Vec<_> = fs::read_dir(folder.path().join("index"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_none_or(|e| e != "lock"))
        .collect();
    files.sort();
    files
}

/// What must hold of an index that was damaged: it opens, and either nothing is missing or it
/// starts from the beginning.
async fn whole_or_anew(folder: &TempDir, what: &str) -> bool {
    let handler = SearchHandler::open("search", options(folder.path()))
        .unwrap_or_else(|error| panic!("{what}: {error}"));
    match position(&handler).await {
        0 => {
            assert_eq!(handler.documents(), 0, "{what}");
            true
        }
        101 => {
            let all = SearchQuery { limit: 1_000, ..SearchQuery::new("rust") };
            let page = handler.search(&all).await.unwrap();
            assert_eq!((page.total, page.hits.len()), (69, 69), "{what}");
            false
        }
        other => panic!("{what}: position {other}"),
    }
}

fn copy(from: &TempDir) -> TempDir {
    let to = tempfile::tempdir().unwrap();
    fs::create_dir(to.path().join("index")).unwrap();
    for entry in fs::read_dir(from.path().join("index")).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), to.path().join("index").join(entry.file_name())).unwrap();
    }
    to
}

#[tokio::test]
async fn a_missing_or_truncated_file_builds_the_index_anew() {
    let folder = tempfile::tempdir().unwrap();
    for path in filled(&folder).await {
        let name = path.file_name().unwrap().to_owned();
        for keep in [None, Some(0), Some(7)] {
            let copied = copy(&folder);
            let victim = copied.path().join("index").join(&name);
            match keep {
                None => fs::remove_file(&victim).unwrap(),
                Some(bytes) => {
                    fs::File::options().write(true).open(&victim).unwrap().set_len(bytes).unwrap();
                }
            }
            let what = format!("{} cut to {keep:?}", victim.display());
            let anew = whole_or_anew(&copied, &what).await;
            assert!(anew, "{what} was not noticed");
        }
    }
    let copied = copy(&folder);
    fs::remove_dir_all(copied.path().join("index")).unwrap();
    assert!(whole_or_anew(&copied, "the whole folder").await);
    let handler = open(&copied);
    apply(&handler, &[lesson(1, "a", "Rust")]).await;
    handler.flush(Position(1)).await.unwrap();
    assert_eq!(find(&handler, "rust").await, ["a"]);
}

#[tokio::test]
async fn a_flipped_byte_builds_the_index_anew_or_does_no_harm() {
    let folder = tempfile::tempdir().unwrap();
    let mut seed = 7_u64;
    for path in filled(&folder).await {
        let name = path.file_name().unwrap().to_owned();
        let length = fs::metadata(&path).unwrap().len();
        for _ in 0..2 {
            seed = seed
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            let at = (seed >> 33) % length.max(1);
            let copied = copy(&folder);
            let victim = copied.path().join("index").join(&name);
            let mut file = fs::File::options().read(true).write(true).open(&victim).unwrap();
            let mut byte = [0];
            file.seek(SeekFrom::Start(at)).unwrap();
            file.read_exact(&mut byte).unwrap();
            file.seek(SeekFrom::Start(at)).unwrap();
            file.write_all(&[byte[0] ^ (1 << (seed % 7))]).unwrap();
            drop(file);
            whole_or_anew(&copied, &format!("{} at {at}", victim.display())).await;
        }
    }
}

#[tokio::test]
async fn a_flipped_byte_that_would_undo_deletes_or_move_the_position_is_noticed() {
    let folder = tempfile::tempdir().unwrap();
    filled(&folder).await;
    for (from, to) in
        [("\"deletes\"", "\"deletez\""), ("\\\"position\\\":101", "\\\"position\\\":901")]
    {
        let copied = copy(&folder);
        let victim = copied.path().join("index/meta.json");
        let before = fs::read_to_string(&victim).unwrap();
        let after = before.replacen(from, to, 1);
        assert_ne!(before, after, "{from} is not in {before}");
        fs::write(&victim, after).unwrap();
        assert!(whole_or_anew(&copied, from).await);
    }
}

/// A directory whose disk is full while `full` is set.
#[derive(Clone, Debug)]
struct Faulty {
    inner: Box<dyn Directory>,
    full: Arc<AtomicBool>,
    rename_only: Arc<AtomicBool>,
}

impl Faulty {
    fn check(&self) -> io::Result<()> {
        if self.full.load(Ordering::SeqCst) {
            Err(io::ErrorKind::StorageFull.into())
        } else {
            Ok(())
        }
    }
}

impl Directory for Faulty {
    fn get_file_handle(&self, path: &Path) -> Result<Arc<dyn FileHandle>, OpenReadError> {
        self.inner.get_file_handle(path)
    }
    fn delete(&self, path: &Path) -> Result<(), DeleteError> {
        self.inner.delete(path)
    }
    fn exists(&self, path: &Path) -> Result<bool, OpenReadError> {
        self.inner.exists(path)
    }
    fn open_write(&self, path: &Path) -> Result<WritePtr, OpenWriteError> {
        let failed = |error| OpenWriteError::wrap_io_error(error, path.to_owned());
        if !self.rename_only.load(Ordering::SeqCst) {
            self.check().map_err(failed)?;
        }
        self.inner.open_write(path)
    }
    fn atomic_read(&self, path: &Path) -> Result<Vec<u8>, OpenReadError> {
        self.inner.atomic_read(path)
    }
    fn atomic_write(&self, path: &Path, data: &[u8]) -> io::Result<()> {
        if !self.rename_only.load(Ordering::SeqCst) || path == Path::new("meta.json") {
            self.check()?;
        }
        self.inner.atomic_write(path, data)
    }
    fn sync_directory(&self) -> io::Result<()> {
        self.inner.sync_directory()
    }
    fn watch(&self, callback: WatchCallback) -> tantivy::Result<WatchHandle> {
        self.inner.watch(callback)
    }
    fn acquire_lock(
        &self,
        lock: &tantivy::directory::Lock,
    ) -> Result<tantivy::directory::DirectoryLock, tantivy::directory::error::LockError> {
        self.inner.acquire_lock(lock)
    }
}

#[tokio::test]
async fn G4_a_full_disk_loses_nothing_and_recovers() {
    for only_the_last_step in [false, true] {
        let folder = tempfile::tempdir().unwrap();
        let full = Arc::new(AtomicBool::new(false));
        let rename_only = Arc::new(AtomicBool::new(only_the_last_step));
        let handler = {
            let (full, rename_only) = (Arc::clone(&full), Arc::clone(&rename_only));
            let directory = move |path: &Path| {
                let inner: Box<dyn Directory> = Box::new(MmapDirectory::open(path)?);
                let (full, rename_only) = (Arc::clone(&full), Arc::clone(&rename_only));
                Ok(Box::new(Faulty { inner, full, rename_only }) as Box<dyn Directory>)
            };
            SearchHandler::open_in("search".into(), options(folder.path()), &directory).unwrap()
        };
        apply(&handler, &[lesson(1, "a", "Rust"), lesson(2, "b", "Rust")]).await;
        handler.flush(Position(2)).await.unwrap();
        apply(&handler, &[lesson(3, "c", "Rust"), removed(4, "a")]).await;
        full.store(true, Ordering::SeqCst);
        for _ in 0..3 {
            handler.flush(Position(4)).await.unwrap_err();
            assert_eq!(position(&handler).await, 2);
            assert_eq!(find(&handler, "rust").await, ["a", "b"]);
        }
        // What comes meanwhile is taken or refused as a whole, and never half done.
        let meanwhile = [lesson(5, "d", "Rust"), lesson(6, "b", "Go")];
        let outcomes = handler.handle_batch(&meanwhile).await;
        let taken = outcomes.iter().all(|o| matches!(o, Outcome::Done));
        let refused = outcomes.iter().all(|o| matches!(o, Outcome::Unavailable { .. }));
        assert!(taken || refused, "{outcomes:?}");
        full.store(false, Ordering::SeqCst);
        if refused {
            apply(&handler, &meanwhile).await;
        }
        // The first flush may still find an indexing thread that died while the disk was full.
        let deadline = Instant::now() + Duration::from_secs(10);
        while let Err(error) = handler.flush(Position(6)).await {
            assert!(Instant::now() < deadline, "{error}");
        }
        assert_eq!(find(&handler, "rust").await, ["c", "d"]);
        assert_eq!(find(&handler, "go").await, ["b"]);
        drop(handler);
        let handler = open(&folder);
        assert_eq!(position(&handler).await, 6);
        assert_eq!(find(&handler, "rust").await, ["c", "d"]);
    }
}
