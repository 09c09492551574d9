//! The log as the rest of the program sees it: one writer a process, a tail in memory.

/// Options of a [`Log`].
#[derive(Debug, Clone)]
pub struct LogOptions {}
/// What to append.
#[derive(Debug)]
pub struct Append {}
/// The log.
#[derive(Debug)]
pub struct Log {}
