//! An index that is built anew beside the one that serves.
//!
//! It lives in a folder within the handler's, [`NEXT`], as a handler of its own, and is moved
//! into place when it has caught up. Searches look at the old one until the new one is open.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, PoisonError},
};

use async_trait::async_trait;

use super::{
    Mapping, SearchError, SearchHandler, SearchOptions, Shelf, Writer,
    index::{self, INDEX, STALE, remove},
    start,
};
use crate::handler::{EventHandler, HandlerError, Rebuildable};

/// The folder of the handler that is being built, within that of the one that serves.
const NEXT: &str = "next";

#[async_trait]
impl Rebuildable for SearchHandler {
    async fn next(&self, name: &str) -> Result<Arc<dyn EventHandler>, HandlerError> {
        let options = SearchOptions { path: self.options.path.join(NEXT), ..self.options.clone() };
        let name = name.to_owned();
        let opened = blocking(move || SearchHandler::open(name, options)).await??;
        Ok(Arc::new(opened))
    }

    async fn swap(&self) -> Result<(), HandlerError> {
        let next = self.options.path.join(NEXT);
        let there = blocking({
            let next = next.clone();
            move || next.join(INDEX).exists()
        });
        if !there.await? {
            // In its place already; what is left of its folder may go, and a start that was cut
            // off half way is made up for.
            self.reopen(None).await?;
            return blocking(move || remove(&next)).await?.map_err(HandlerError::from);
        }
        self.reopen(Some(next)).await
    }

    async fn give_up(&self) -> Result<(), HandlerError> {
        let next = self.options.path.join(NEXT);
        blocking(move || remove(&next)).await?.map_err(HandlerError::from)
    }
}

impl SearchHandler {
    /// Lets go of the index that serves, but for searches; moves the new one into its place;
    /// opens it, and lets searches look at it. With nothing to move it only opens what is
    /// closed.
    async fn reopen(&self, next: Option<PathBuf>) -> Result<(), HandlerError> {
        if next.is_none() && self.writer().is_ok() {
            return Ok(());
        }
        let old = self.writer.write().unwrap_or_else(PoisonError::into_inner).take();
        let (name, options, mapping) =
            (self.name.clone(), self.options.clone(), Arc::clone(&self.mapping));
        let opened = blocking(move || open_moved(&name, &options, &mapping, next.as_deref(), old));
        let (shelf, writer) = opened.await??;
        *self.shelf.write().unwrap_or_else(PoisonError::into_inner) = shelf;
        *self.writer.write().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(writer));
        Ok(())
    }
}

fn open_moved(
    name: &str,
    options: &SearchOptions,
    mapping: &Arc<Mapping>,
    next: Option<&Path>,
    old: Option<Arc<Writer>>,
) -> Result<(Shelf, Writer), SearchError> {
    // Waits for its thread, which holds the folder's lock.
    drop(old);
    if let Some(next) = next {
        move_into_place(&options.path, next)
            .map_err(|source| SearchError::Folder { path: options.path.clone(), source })?;
    }
    start(name, options, mapping, &index::mmap)
}

/// A crash at any point leaves the new index in one of the two places, whole.
fn move_into_place(path: &Path, next: &Path) -> io::Result<()> {
    let (current, stale) = (path.join(INDEX), path.join(STALE));
    remove(&stale)?;
    match fs::rename(&current, &stale) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    fs::rename(next.join(INDEX), &current)?;
    fs::File::open(path)?.sync_all()?;
    remove(next)?;
    // What searches still look at is open, and stays readable until they let go of it.
    remove(&stale)
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, HandlerError> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| HandlerError::new(format!("it was cut short: {error}")))
}
