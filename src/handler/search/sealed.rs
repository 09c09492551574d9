//! A checksum for the files that Tantivy keeps without one: its lists of segments and of files.
//!
//! A flipped byte there need not make the list unreadable: renaming the member that names the
//! deleted documents brings them all back. So a line with a checksum is added when such a file
//! is written, and checked and taken away when it is read.

use std::{io, path::Path, sync::Arc};

use tantivy::directory::{
    Directory, DirectoryLock, FileHandle, Lock, WatchCallback, WatchHandle, WritePtr,
    error::{DeleteError, LockError, OpenReadError, OpenWriteError},
};

use super::mapping::fnv_1a;

#[derive(Debug, Clone)]
pub(super) struct Sealed(pub(super) Box<dyn Directory>);

/// The last line: `#`, the checksum in hex, a line break.
fn seal(content: &[u8]) -> String {
    format!("#{:016x}\n", fnv_1a(content))
}

impl Directory for Sealed {
    fn atomic_read(&self, path: &Path) -> Result<Vec<u8>, OpenReadError> {
        let mut content = self.0.atomic_read(path)?;
        let length = content.len().saturating_sub(seal(&[]).len());
        let found = content.split_off(length);
        if found == seal(&content).as_bytes() {
            return Ok(content);
        }
        let error = io::Error::new(io::ErrorKind::InvalidData, "its checksum does not fit");
        Err(OpenReadError::wrap_io_error(error, path.to_owned()))
    }

    fn atomic_write(&self, path: &Path, content: &[u8]) -> io::Result<()> {
        let mut sealed = content.to_vec();
        sealed.extend_from_slice(seal(content).as_bytes());
        self.0.atomic_write(path, &sealed)
    }

    fn get_file_handle(&self, path: &Path) -> Result<Arc<dyn FileHandle>, OpenReadError> {
        self.0.get_file_handle(path)
    }

    fn delete(&self, path: &Path) -> Result<(), DeleteError> {
        self.0.delete(path)
    }

    fn exists(&self, path: &Path) -> Result<bool, OpenReadError> {
        self.0.exists(path)
    }

    fn open_write(&self, path: &Path) -> Result<WritePtr, OpenWriteError> {
        self.0.open_write(path)
    }

    fn sync_directory(&self) -> io::Result<()> {
        self.0.sync_directory()
    }

    fn watch(&self, callback: WatchCallback) -> tantivy::Result<WatchHandle> {
        self.0.watch(callback)
    }

    fn acquire_lock(&self, lock: &Lock) -> Result<DirectoryLock, LockError> {
        self.0.acquire_lock(lock)
    }
}
