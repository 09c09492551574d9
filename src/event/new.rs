//! Events made by a program.
use super::Message;

/// An event to emit.
#[derive(Debug, Clone)]
pub struct NewEvent {
    pub(crate) message: Message,
}
