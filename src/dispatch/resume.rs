//! Where a handler goes on after a start.

use std::{sync::Arc, time::Duration};

use super::{HandlerOptions, HandlerState, Start};
use crate::{
    event::Position,
    handler::EventHandler,
    store::{
        Log, StoreError,
        progress::{Claim, Claimed, Epoch},
    },
};

/// How long a handler may take to say its position or to flush.
pub(super) const FLUSH_TIMEOUT: Duration = Duration::from_secs(300);

/// Where a handler goes on.
pub(super) struct Resumed {
    pub(super) epoch: Epoch,
    pub(super) cursor: Position,
    pub(super) paused: bool,
}

impl Resumed {
    /// Claims the handler, and asks it and the store how far it is.
    ///
    /// # Errors
    /// What to say while that cannot be known, or cannot be.
    pub(super) async fn find(
        name: &Arc<str>,
        handler: &dyn EventHandler,
        options: &HandlerOptions,
        log: &Log,
        owner: &str,
        lease: Duration,
    ) -> Result<Self, HandlerState> {
        let waiting = |error: String| HandlerState::Waiting(error);
        let unread = |error: StoreError| waiting(error.to_string());
        let own = tokio::time::timeout(FLUSH_TIMEOUT, handler.position())
            .await
            .map_err(|_| waiting(format!("its position took longer than {FLUSH_TIMEOUT:?}")))?
            .map_err(|error| waiting(error.to_string()))?;
        let store = log.store();
        let start = match options.start {
            Start::Beginning => Position::START,
            Start::Now => {
                let head = store.head().await.map_err(unread)?;
                // Kept by the handler itself before the store says so: the other way round, a
                // crash in between would look like an index that has been lost.
                let new = store.cursor(name).await.map_err(unread)?.is_none();
                if new && own.is_none_or(|own| own == Position::START) {
                    handler.flush(head).await.map_err(|error| waiting(error.to_string()))?;
                }
                head
            }
        };
        let claim = Claim { handler: name, owner, ttl: lease, start };
        let tenure = match store.claim(claim).await.map_err(unread)? {
            Claimed::Taken(tenure) => tenure,
            Claimed::Held { owner, left } => {
                return Err(HandlerState::Standby(format!(
                    "{owner} runs it; its claim ends in {left:.1?} unless it is renewed"
                )));
            }
        };
        // Asked after the claim: another process may have moved both on meanwhile.
        let head = store.head().await.map_err(unread)?;
        log.advance(head);
        let furthest = tenure.cursor.max(own.unwrap_or_default());
        if furthest > head {
            return Err(HandlerState::Failed(format!(
                "its cursor {furthest} is beyond the head of the log {head}: the log has lost its \
                 tail (an older backup, another data_dir?); restore the log, or remove this \
                 handler's cursor or index to start it anew"
            )));
        }
        let mut cursor = tenure.cursor;
        if let Some(own) = own
            && own < cursor
            && !tenure.fresh
        {
            // What it had done behind its own position is lost (the index was damaged, or
            // removed): that is done again, failures included.
            cursor = store.rewind(name, tenure.epoch, own, None).await.map_err(unread)?;
            if cursor > own {
                say_removed(name, cursor, "what it had of them is lost and cannot be done again");
            }
        } else if tenure.fresh && start < cursor {
            say_removed(name, cursor, "it is new and begins behind them");
        }
        Ok(Self { epoch: tenure.epoch, cursor, paused: tenure.paused })
    }
}

/// Says that a handler does not get all that it was to get.
fn say_removed(handler: &str, cursor: Position, what: &str) {
    tracing::warn!(
        handler,
        first = cursor.next().0,
        "the events before the first have been removed from the log (store.retain): {what}"
    );
}
