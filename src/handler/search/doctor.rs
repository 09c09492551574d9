//! Looks at an index for `doctor`, and changes nothing: neither its folder nor its lock is made,
//! and its files are only read.

use std::{
    fs::{File, TryLockError},
    io::ErrorKind,
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
};

use tantivy::Index;

use super::{
    SearchOptions, check,
    index::{INDEX, LOCK, Payload, mmap},
    mapping::Mapping,
    sealed::Sealed,
};
use crate::finding::{Finding, Severity};

/// Everything that is wrong with the index of this handler. `subject` is what findings are
/// about. *Blocks* while the disk is read; the index is not read as a whole.
pub(crate) fn examine(subject: &str, options: &SearchOptions) -> Vec<Finding> {
    let Ok(mapping) = check(options) else { return Vec::new() };
    let current = options.path.join(INDEX);
    match current.try_exists() {
        Ok(true) => {}
        // It is made at the first start.
        Ok(false) => return Vec::new(),
        Err(error) => {
            return vec![Finding::of(
                Severity::Error,
                subject,
                "search-folder",
                format!("the index in {} cannot be looked at: {error}", options.path.display()),
                "the daemon does not start with this handler, if it runs as this user",
                "let the user pulsebus runs as into the folder; if that is another than doctor's, \
                 run doctor as that one",
            )];
        }
    }
    let mut findings = Vec::new();
    findings.extend(writable(subject, &options.path, &current));
    let looked = catch_unwind(AssertUnwindSafe(|| look(&current, &mapping)));
    let reason = match looked {
        Ok(Ok(fit)) => fit,
        Ok(Err(error)) => Some(("search-damaged", error)),
        // Tantivy panics on some kinds of damage.
        Err(_) => Some(("search-damaged", "reading it panicked".to_owned())),
    };
    if let Some((check, reason)) = reason {
        findings.push(Finding::of(
            Severity::Warning,
            subject,
            check,
            format!("the index in {} will be built anew: {reason}", options.path.display()),
            "at the next start it is removed and filled again from the first event of the log; \
             until that is done, searches find only part of the documents",
            "start the daemon when that may be, or put the handler's documents and language back; \
             to have the old index serve until the new one is filled, give the new mapping to a \
             handler of another name first",
        ));
    }
    findings
}

/// Whether somebody has the index open, a daemon most likely.
pub(crate) fn is_open(options: &SearchOptions) -> bool {
    let Ok(file) = File::open(options.path.join(LOCK)) else { return false };
    // Shared: a second doctor is no daemon.
    matches!(file.try_lock_shared(), Err(TryLockError::WouldBlock))
}

fn writable(subject: &str, path: &Path, current: &Path) -> Option<Finding> {
    let read_only = [path, current].into_iter().find(|folder| {
        rustix::fs::access(*folder, rustix::fs::Access::WRITE_OK)
            .is_err_and(|error| std::io::Error::from(error).kind() != ErrorKind::NotFound)
    })?;
    Some(Finding::of(
        Severity::Error,
        subject,
        "search-folder",
        format!("the folder of the index, {}, is not writable for this user", read_only.display()),
        "the handler cannot commit: it stops at its cursor",
        "chown the folder and what is in it to the user pulsebus runs as; if that is another than \
         doctor's, run doctor as that one",
    ))
}

/// Why it would be built anew, and which check that is; an error: it cannot be read.
fn look(current: &Path, mapping: &Mapping) -> Result<Option<(&'static str, String)>, String> {
    let directory = Sealed(mmap(current).map_err(|error| error.to_string())?);
    let index = Index::open(directory).map_err(|error| error.to_string())?;
    let metas = index.load_metas().map_err(|error| error.to_string())?;
    let Some(payload) = metas.payload.as_deref().and_then(Payload::from_json) else {
        return Err("it does not say how far it is".to_owned());
    };
    let fits = payload.fits(mapping) && metas.schema == mapping.schema;
    Ok((!fits).then(|| {
        ("search-mapping", "the configured documents or their language have changed".to_owned())
    }))
}
