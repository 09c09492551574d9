//! Dead letters are published, where the handler has a destination for them.
//!
//! A row stays marked until its destination has confirmed it, so a crash or an outage publishes
//! it later, or twice, and never not at all.

use std::{collections::BTreeSet, sync::Arc};

use time::OffsetDateTime;
use tokio::sync::Notify;

use crate::{
    event::Position,
    handler::{
        Outcome,
        dead_letter::{DeadEvent, DeadLetterDestination},
    },
    retry::RetryPolicy,
    store::{Log, StoreError, progress::DeadLetter},
};

/// Dead letters published in one go, and the bytes of their bodies.
const BATCH: (usize, usize) = (100, 8 << 20);

/// Dead letters remembered that their destination will never take.
const MAX_REFUSED: usize = 1_000;

/// Publishes the dead letters of a handler.
pub(super) struct Burial {
    pub(super) name: Arc<str>,
    pub(super) log: Arc<Log>,
    pub(super) destination: Arc<dyn DeadLetterDestination>,
    /// How many attempts an event has: fewer, and it was rejected.
    pub(super) attempts: u32,
    /// There are new ones.
    pub(super) buried: Arc<Notify>,
}

impl Burial {
    /// Works until dropped.
    pub(super) async fn run(self) {
        let mut delays = RetryPolicy::reconnect().start();
        let mut refused = BTreeSet::new();
        let mut said = false;
        loop {
            match self.publish(&mut refused).await {
                Ok(true) => {
                    delays.reset();
                    said = false;
                    continue;
                }
                Ok(false) => {
                    delays.reset();
                    self.buried.notified().await;
                    continue;
                }
                // Said once; the rows stay marked.
                Err(reason) if !said => {
                    tracing::warn!(
                        handler = &*self.name,
                        reason,
                        "dead letters cannot be published; tried again until they are"
                    );
                    said = true;
                }
                Err(_) => {}
            }
            tokio::time::sleep(delays.next_delay()).await;
        }
    }

    /// Publishes the next ones; whether there may be more.
    async fn publish(
        &self,
        refused: &mut BTreeSet<(Position, OffsetDateTime)>,
    ) -> Result<bool, String> {
        let text = |error: StoreError| error.to_string();
        let store = self.log.store();
        let found = store.unpublished(&self.name, BATCH.0 + refused.len()).await.map_err(text)?;
        let known = |letter: &DeadLetter| {
            refused.contains(&(letter.position, letter.failure.last_failed_at))
        };
        let letters: Vec<_> =
            found.into_iter().filter(|letter| !known(letter)).take(BATCH.0).collect();
        if letters.is_empty() {
            return Ok(false);
        }
        let positions: Vec<_> = letters.iter().map(|letter| letter.position).collect();
        let events = self.log.get(&positions, BATCH.1).await.map_err(text)?;
        // As many as fit, from the first on.
        let dead: Vec<_> = letters
            .into_iter()
            .zip(events)
            .filter(|(letter, event)| letter.position == event.position)
            .map(|(letter, event)| DeadEvent {
                event,
                rejected: letter.attempts < self.attempts,
                attempts: letter.attempts,
                first_error: letter.failure.first_error,
                last_error: letter.failure.last_error,
                first_failed_at: letter.failure.first_failed_at,
                last_failed_at: letter.failure.last_failed_at,
            })
            .collect();
        if dead.is_empty() {
            return Err(format!("the log has no event at position {} any more", positions[0]));
        }
        let outcomes = self.destination.publish(&dead).await;
        let mut published = Vec::new();
        let mut trouble = None;
        for (letter, outcome) in dead.iter().zip(outcomes) {
            match outcome {
                Outcome::Done => published.push((letter.event.position, letter.last_failed_at)),
                Outcome::Reject { error } => {
                    tracing::error!(
                        handler = &*self.name,
                        position = letter.event.position.0,
                        id = letter.event.id(),
                        %error,
                        "a dead letter cannot be published; it stays in the store"
                    );
                    if refused.len() < MAX_REFUSED {
                        refused.insert((letter.event.position, letter.last_failed_at));
                    } else {
                        // It will be asked for again: not at once.
                        trouble = Some(error);
                    }
                }
                Outcome::Retry { error, .. } | Outcome::Unavailable { error, .. } => {
                    trouble = Some(error);
                }
            }
        }
        if !published.is_empty() {
            store.mark_published(&self.name, &published).await.map_err(text)?;
        }
        trouble.map_or(Ok(true), |error| Err(error.to_string()))
    }
}
