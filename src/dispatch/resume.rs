//! Where a handler goes on after a start.

use std::{sync::Arc, time::Duration};

use super::{HandlerOptions, HandlerState, Start};
use crate::{
    event::Position,
    handler::EventHandler,
    store::{DeadLetter, Log, StoreError},
};

/// How long a handler may take to say its position or to flush.
pub(super) const FLUSH_TIMEOUT: Duration = Duration::from_secs(300);

/// Where a handler goes on.
pub(super) struct Resumed {
    pub(super) cursor: Position,
    /// Its dead letters, which park their keys.
    pub(super) letters: Vec<DeadLetter>,
}

impl Resumed {
    /// Asks the handler and the store.
    ///
    /// # Errors
    /// What to say while it cannot be known, or cannot be.
    pub(super) async fn find(
        name: &Arc<str>,
        handler: &dyn EventHandler,
        options: &HandlerOptions,
        log: &Log,
    ) -> Result<Self, HandlerState> {
        let waiting = |error: String| HandlerState::Waiting(error);
        let own = tokio::time::timeout(FLUSH_TIMEOUT, handler.position())
            .await
            .map_err(|_| waiting(format!("its position took longer than {FLUSH_TIMEOUT:?}")))?
            .map_err(|error| waiting(error.to_string()))?;
        let store = log.store();
        let unread = |error: StoreError| waiting(error.to_string());
        let saved = store.cursor(name).await.map_err(unread)?;
        // Asked after the cursor: another process may have moved both on meanwhile.
        let head = store.head().await.map_err(unread)?;
        log.advance(head);
        // A handler that keeps its own position and has none yet is either new, or is to be
        // filled again from the log; the store's cursor tells which.
        let own = own.filter(|own| *own > Position::START || saved.is_some());
        let cursor = match (own, saved, options.start) {
            (Some(own), _, _) => own,
            (None, Some(saved), _) => saved,
            (None, None, Start::Beginning) => Position::START,
            (None, None, Start::Now) => {
                // Saved at once, so that what is stored from here on is not skipped by a
                // restart before the first checkpoint, and kept by the handler itself too.
                handler.flush(head).await.map_err(|error| waiting(error.to_string()))?;
                store.save_cursors(&[(Arc::clone(name), head)]).await.map_err(unread)?;
                head
            }
        };
        if cursor > head {
            return Err(HandlerState::Failed(format!(
                "its cursor {cursor} is beyond the head of the log {head}: the log has lost its \
                 tail (an older backup, another data_dir?); restore the log, or remove this \
                 handler's cursor or index to start it anew"
            )));
        }
        let letters = store.dead_letters(Some(name), 0, usize::MAX).await.map_err(unread)?;
        Ok(Self { cursor, letters })
    }
}
