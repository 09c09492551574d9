//! What a person can tell a running bus: pause, resume, rewind, forget, redrive.
//!
//! Each of these is written down in the audit with who wanted it, in the transaction that does
//! it, or before.

use std::sync::Arc;

use serde_json::json;
use time::OffsetDateTime;
use tokio::sync::oneshot;

use super::{EventBus, HandlerAccessError, Registered, lock};
use crate::{
    dispatch::{Command, HandlerState},
    event::Position,
    store::{
        EventStore, StoreError,
        progress::{
            AuditEntry, Claim, Claimed, NewRedrive, Redrive, RedriveAction, RedriveState, SOURCE,
            Selection,
        },
    },
};

/// Where a cursor is moved back to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RewindTo {
    /// The event at this position is the next one it gets.
    Position(Position),
    /// The first event recorded at this time or later is the next one it gets.
    Time(OffsetDateTime),
}

impl EventBus {
    /// Lets a handler end what it is doing and take nothing new, also after a restart.
    ///
    /// # Errors
    /// [`HandlerAccessError::Unknown`], [`HandlerAccessError::NotStarted`],
    /// [`HandlerAccessError::Store`].
    pub async fn pause(&self, name: &str, by: &str) -> Result<(), HandlerAccessError> {
        self.set_paused(name, true, by).await
    }

    /// Lets a paused handler go on.
    ///
    /// # Errors
    /// As for [`pause`](Self::pause).
    pub async fn resume(&self, name: &str, by: &str) -> Result<(), HandlerAccessError> {
        self.set_paused(name, false, by).await
    }

    async fn set_paused(
        &self,
        name: &str,
        paused: bool,
        by: &str,
    ) -> Result<(), HandlerAccessError> {
        self.registered(name, |_| ())?;
        let action = if paused { "pause" } else { "resume" };
        let audit = AuditEntry::new(by, action, format!("handler {name}"), &json!({}));
        if !self.store().set_paused(name, paused, &audit).await? {
            return Err(HandlerAccessError::NotStarted(name.into()));
        }
        // Where it runs in another process, that one sees it when it renews its claim.
        self.registered(name, |registered| {
            if registered.tell(Command::Pause(paused)) {
                registered.status().expect_paused(paused);
            }
        })?;
        Ok(())
    }

    /// Moves a handler's cursor back: it gets the events behind it again, in order, and what it
    /// had not finished of these (retries, dead letters) starts over.
    ///
    /// # Errors
    /// [`HandlerAccessError::SideEffects`] where handling an event again does something outside
    /// and `allow_side_effects` does not say that it may; [`HandlerAccessError::Refused`] where
    /// the place is not behind the cursor, or its event has been removed from the log. A time
    /// before the first event that is left means that event.
    pub async fn rewind(
        &self,
        name: &str,
        to: RewindTo,
        allow_side_effects: bool,
        by: &str,
    ) -> Result<Position, HandlerAccessError> {
        let effects =
            self.registered(name, |registered| registered.handler().has_side_effects())?;
        if effects && !allow_side_effects {
            return Err(HandlerAccessError::SideEffects(name.into()));
        }
        let next = match to {
            RewindTo::Position(position) => position,
            RewindTo::Time(at) => first_since(&**self.store(), at).await?,
        };
        let cursor = Position(next.0.saturating_sub(1));
        let extent = self.store().extent().await?;
        if cursor < extent.removed {
            return Err(HandlerAccessError::Refused(format!(
                "the event at position {next} has been removed from the log (store.retain): the \
                 first that is left, and can be given again, is {}",
                extent.first()
            )));
        }
        let now = self.store().cursor(name).await?;
        let now = now.ok_or_else(|| HandlerAccessError::NotStarted(name.into()))?;
        if cursor > now {
            return Err(HandlerAccessError::Refused(format!(
                "handler `{name}` is at position {now}: a rewind goes back, and {next} is ahead \
                 of it"
            )));
        }
        if matches!(self.status(name)?.snapshot().state, HandlerState::Standby(_)) {
            return Err(HandlerAccessError::Elsewhere(name.into()));
        }
        let detail = json!({ "from": now, "to": cursor });
        let audit = AuditEntry::new(by, "rewind", format!("handler {name}"), &detail);
        let (done, answer) = oneshot::channel();
        let told = self.registered(name, |registered| {
            registered.tell(Command::Rewind { to: cursor, audit, done })
        })?;
        if !told {
            return Err(HandlerAccessError::NotStarted(name.into()));
        }
        match answer.await {
            // Further on where what was asked for has just been removed.
            Ok(Ok(cursor)) => Ok(cursor),
            Ok(Err(reason)) => Err(HandlerAccessError::Store(StoreError::unavailable(reason))),
            // It drains, or has been replaced.
            Err(_) => Err(HandlerAccessError::Closed),
        }
    }

    /// Starts to redrive dead letters, or to discard them: those that match now, the head of
    /// each key first, then its followers. It goes on by itself, also after a restart.
    ///
    /// # Errors
    /// [`HandlerAccessError::Unknown`] where it names a handler that is not registered and is
    /// not to discard; [`HandlerAccessError::Refused`] where a discard gives no reason.
    pub async fn redrive(&self, what: &NewRedrive) -> Result<Redrive, HandlerAccessError> {
        if what.action == RedriveAction::Discard && what.reason.as_deref().is_none_or(str::is_empty)
        {
            let missing = "a discard needs a reason, for those who look for the event later";
            return Err(HandlerAccessError::Refused(missing.to_owned()));
        }
        if what.rate == Some(0) {
            return Err(HandlerAccessError::Refused("a rate must be at least 1".to_owned()));
        }
        let mut what = what.clone();
        let registered: Vec<String> =
            lock(&self.inner.handlers).keys().map(|name| name.to_string()).collect();
        if let Selection::DeadLetters(filter) = &mut what.selection
            && what.action == RedriveAction::Retry
        {
            match &filter.handler {
                Some(name) if !registered.contains(name) => {
                    return Err(HandlerAccessError::Unknown(name.as_str().into()));
                }
                None if registered.is_empty() => {
                    let nobody = "no handler is registered that could try them again";
                    return Err(HandlerAccessError::Refused(nobody.to_owned()));
                }
                // Of a handler that nobody runs, nothing can be tried again.
                None if filter.handlers.is_empty() => filter.handlers.clone_from(&registered),
                _ => {}
            }
        }
        let redrive = self.store().start_redrive(&what).await?;
        if what.action == RedriveAction::Discard {
            self.store().discard_orphans(&registered).await?;
        }
        self.look_for_redrives();
        Ok(self.store().redrive(redrive.number).await?.unwrap_or(redrive))
    }

    /// Ends a redrive that is running: what is left of it is as it was before. What a handler has
    /// been given of it already, a thousand at most, goes its way.
    ///
    /// # Errors
    /// [`HandlerAccessError::Refused`] where there is none of that number, or it has ended.
    pub async fn cancel_redrive(
        &self,
        number: u64,
        by: &str,
    ) -> Result<Redrive, HandlerAccessError> {
        let store = self.store();
        let before = store.redrive(number).await?;
        match before.map(|redrive| redrive.state) {
            Some(RedriveState::Running) => {}
            Some(state) => {
                return Err(HandlerAccessError::Refused(format!(
                    "redrive {number} has ended: it is {}",
                    state.as_str()
                )));
            }
            None => {
                return Err(HandlerAccessError::Refused(format!("there is no redrive {number}")));
            }
        }
        let audit = AuditEntry::new(by, "cancel", format!("redrive {number}"), &json!({}));
        let after = store.cancel_redrive(number, &audit).await?;
        after.ok_or_else(|| HandlerAccessError::Refused(format!("there is no redrive {number}")))
    }

    /// Forgets a handler that is not configured any more, here or in any process that runs: its
    /// cursor, and what it had not finished, dead letters included. Retention waits for such a
    /// handler as for any other. Should it come back it is new.
    ///
    /// # Errors
    /// [`HandlerAccessError::Refused`] where it is registered here, [`HandlerAccessError::Elsewhere`]
    /// where another process runs it; [`HandlerAccessError::Unknown`] where nobody has ever run it.
    pub async fn forget(&self, name: &str, by: &str) -> Result<(), HandlerAccessError> {
        // No source, and not while it is being registered.
        let _one_at_a_time = self.inner.registering.lock().await;
        let built_for = name.strip_suffix(super::rebuild::SUFFIX);
        let runs = |name: &str| lock(&self.inner.handlers).contains_key(name);
        if runs(name) {
            return Err(HandlerAccessError::Refused(format!(
                "handler `{name}` is registered: take it out of the configuration first, and \
                 restart"
            )));
        }
        if let Some(of) = built_for.filter(|of| runs(of)) {
            return Err(HandlerAccessError::Refused(format!(
                "`{name}` is a rebuild of handler `{of}`, which is registered: cancel the rebuild"
            )));
        }
        let cursor = self.store().cursor(name).await?;
        let Some(cursor) = cursor.filter(|_| !name.starts_with(SOURCE)) else {
            return Err(HandlerAccessError::Unknown(name.into()));
        };
        let claim = Claim {
            handler: name,
            owner: &self.inner.instance,
            ttl: self.inner.lease,
            start: cursor,
        };
        let Claimed::Taken(tenure) = self.store().claim(claim).await? else {
            return Err(HandlerAccessError::Elsewhere(name.into()));
        };
        // Written down first: what is gone cannot be explained later.
        let detail = json!({ "cursor": cursor });
        let subject = format!("handler {name}");
        self.store().audit(&AuditEntry::new(by, "forget", subject, &detail)).await?;
        Ok(self.store().forget(name, tenure.epoch).await?)
    }

    fn look_for_redrives(&self) {
        self.inner.redrive_started.notify_one();
        for registered in lock(&self.inner.handlers).values() {
            registered.tell(Command::Redrive);
        }
    }

    pub(super) fn registered<T>(
        &self,
        name: &str,
        look: impl FnOnce(&Registered) -> T,
    ) -> Result<T, HandlerAccessError> {
        lock(&self.inner.handlers)
            .get(name)
            .map(look)
            .ok_or_else(|| HandlerAccessError::Unknown(name.into()))
    }
}

/// The position of the first event left that was recorded at this time or later; the one behind
/// the head where there is none. Events are recorded in the order of their positions, as far as the
/// clock went forward.
async fn first_since(store: &dyn EventStore, at: OffsetDateTime) -> Result<Position, StoreError> {
    let extent = store.extent().await?;
    let (mut low, mut high) = (extent.first().0, extent.head.0 + 1);
    while low < high {
        let middle = low + (high - low) / 2;
        let found: Vec<Arc<_>> = store.get(&[Position(middle)], usize::MAX).await?;
        match found.first() {
            Some(event) if event.recorded_at < at => low = middle + 1,
            Some(_) => high = middle,
            // Removed meanwhile.
            None => low = middle + 1,
        }
    }
    Ok(Position(low))
}
