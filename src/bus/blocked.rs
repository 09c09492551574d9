//! Which keys of a handler do not flow, and why: for a person who asks.

use std::time::Duration;

use tokio::{sync::oneshot, time::timeout};

use super::{EventBus, HandlerAccessError};
use crate::{
    dispatch::{BlockedKey, Cause, Command},
    store::progress::{DeadLetter, DeadLetterFilter},
};

/// How long a runner, or the store, is waited for.
const PATIENCE: Duration = Duration::from_secs(2);

impl EventBus {
    /// The keys of a handler that do not flow, the earliest first, up to so many. A handler that
    /// another process runs, or that has not started, has its dead letters only: what it tries
    /// again is known where it runs. What the store does not say in time is left out.
    ///
    /// # Errors
    /// [`HandlerAccessError::Unknown`].
    pub async fn blocked(
        &self,
        name: &str,
        most: usize,
    ) -> Result<Vec<BlockedKey>, HandlerAccessError> {
        let (answer, answered) = oneshot::channel();
        let asked =
            self.registered(name, |handler| handler.tell(Command::Blocked { most, answer }))?;
        let told = if asked {
            timeout(PATIENCE, answered).await
        } else {
            return self.dead(name, most).await;
        };
        let Ok(Ok(mut blocked)) = told else { return self.dead(name, most).await };

        // Of those that are in the store only, the runner does not know what their rows say.
        let unknown = |key: &&mut BlockedKey| key.key.is_none() || key.failure.is_none();
        let positions: Vec<_> =
            blocked.iter_mut().filter(unknown).map(|key| key.position).collect();
        if positions.is_empty() {
            return Ok(blocked);
        }
        let rows = timeout(PATIENCE, self.store().unfinished_at(name, &positions)).await;
        for DeadLetter { position, key, failure, .. } in
            rows.unwrap_or(Ok(Vec::new())).unwrap_or_default()
        {
            if let Some(known) = blocked.iter_mut().find(|known| known.position == position) {
                known.key.get_or_insert(key);
                if !failure.last_error.is_empty() {
                    known.failure.get_or_insert(failure);
                }
            }
        }
        Ok(blocked)
    }

    /// What the store has of them.
    async fn dead(&self, name: &str, most: usize) -> Result<Vec<BlockedKey>, HandlerAccessError> {
        let filter =
            DeadLetterFilter { handler: Some(name.to_owned()), ..DeadLetterFilter::default() };
        let letters = timeout(PATIENCE, self.store().dead_letters(&filter, None, most)).await;
        let letters = letters.unwrap_or(Ok(Vec::new())).unwrap_or_default();
        let key = |letter: DeadLetter| BlockedKey {
            key: Some(letter.key),
            position: letter.position,
            attempts: letter.attempts,
            cause: Cause::Dead,
            failure: Some(letter.failure),
            followers: letter.followers,
        };
        Ok(letters.into_iter().map(key).collect())
    }
}
