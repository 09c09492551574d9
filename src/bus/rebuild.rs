//! Building a handler's read model anew, beside the one that serves.
//!
//! What is built is a handler of its own, under the name `NAME~rebuild`, with a cursor, retries
//! and dead letters of its own. When it has caught up, both are stopped, its progress becomes
//! that of the handler ([`ProgressStore::adopt`](crate::store::ProgressStore::adopt)), the read
//! model takes its place, and the handler goes on.
//!
//! # Crashes
//!
//! The row of `NAME~rebuild` in the store says that a rebuild is under way: where a handler is
//! registered and the row is there, it goes on. It goes in the transaction that adopts its
//! progress. So where something was built and there is no row, it was adopted, and all that is
//! left is to put it into its place; until then the old model is carried on from the new
//! progress, which does nothing wrong: it repeats what that has not done.

use std::{sync::Arc, time::Duration};

use serde_json::json;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::{EventBus, HandlerAccessError, Inner, Registered, lock};
use crate::{
    dispatch::{HandlerOptions, HandlerState, HandlerStatus, Snapshot, Start},
    event::Position,
    handler::{EventHandler, HandlerError},
    retry::RetryPolicy,
    store::{
        StoreError,
        progress::{AuditEntry, Claim, Claimed, Epoch},
    },
};

/// How often it is looked whether it has caught up.
const LOOK: Duration = Duration::from_millis(100);

/// So far behind the head it may be and still count as having caught up: what is left is done
/// in a moment, by the handler itself.
const CAUGHT_UP: u64 = 1_000;

/// What the name of a handler that is being built ends with.
pub(super) const SUFFIX: &str = "~rebuild";

/// The name of the handler that is being built for this one.
fn name_of(handler: &str) -> Arc<str> {
    format!("{handler}{SUFFIX}").into()
}

/// How far a rebuild is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rebuilding {
    /// Everything up to here is built.
    pub position: Position,
    /// Where the log ends.
    pub head: Position,
}

/// A rebuild under way.
pub(super) struct Rebuild {
    status: Arc<HandlerStatus>,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl Rebuild {
    /// Ends it as it is: it goes on where it was when its handler is registered again.
    pub(super) async fn stop(self) {
        self.stop.cancel();
        // It only fails by a panic, and then it has ended too.
        let _ = self.task.await;
    }
}

/// Why a step of a rebuild did not work; all of them are tried again.
#[derive(Debug, thiserror::Error)]
enum Hindrance {
    #[error("{0}")]
    Store(#[from] StoreError),
    #[error("{0}")]
    Handler(HandlerError),
    #[error("handler `{0}` is run by {1}")]
    Held(String, String),
}

impl From<HandlerError> for Hindrance {
    fn from(error: HandlerError) -> Self {
        Self::Handler(error)
    }
}

impl EventBus {
    /// Builds what a handler keeps anew, from the first event that is in the log, beside what serves; it
    /// is put into place when it has caught up. Goes on by itself, also after a restart.
    ///
    /// # Errors
    /// [`HandlerAccessError::Refused`] where the handler keeps nothing that could be built anew,
    /// or it is being built already; [`HandlerAccessError::Store`].
    pub async fn rebuild(&self, name: &str, by: &str) -> Result<(), HandlerAccessError> {
        // One at a time with registrations, so that the handler stays the same meanwhile.
        let _one_at_a_time = self.inner.registering.lock().await;
        let (handler, options) = self.registered(name, |registered| {
            (Arc::clone(registered.handler()), registered.options().clone())
        })?;
        if handler.rebuildable().is_none() {
            return Err(HandlerAccessError::Refused(format!(
                "handler `{name}` keeps nothing that could be rebuilt"
            )));
        }
        if matches!(self.status(name)?.snapshot().state, HandlerState::Standby(_)) {
            return Err(HandlerAccessError::Elsewhere(name.into()));
        }
        if lock(&self.inner.rebuilds).contains_key(name) {
            return Err(HandlerAccessError::Refused(format!(
                "handler `{name}` is being rebuilt already"
            )));
        }
        // Its row in the store is what a restart goes on from.
        // Written down first: a rebuild that nobody has asked for must not come of a failure.
        let subject = format!("handler {name}");
        let first = self.store().extent().await?.first();
        let detail = json!({ "first": first });
        self.store().audit(&AuditEntry::new(by, "rebuild", subject, &detail)).await?;
        if first > Position::START.next() {
            tracing::warn!(
                handler = name,
                first = first.0,
                "what is built anew begins with the first event that is in the log: those before \
                 it have been removed (store.retain)"
            );
        }
        let next = name_of(name);
        claim(&self.inner, &next).await.map_err(access)?;
        self.begin_rebuild(name.into(), handler, options);
        Ok(())
    }

    /// Ends a rebuild and removes what was built; what serves goes on.
    ///
    /// # Errors
    /// [`HandlerAccessError::Refused`] where none is under way; [`HandlerAccessError::Store`].
    pub async fn cancel_rebuild(&self, name: &str, by: &str) -> Result<(), HandlerAccessError> {
        let _one_at_a_time = self.inner.registering.lock().await;
        let handler = self.registered(name, |registered| Arc::clone(registered.handler()))?;
        let rebuild = lock(&self.inner.rebuilds).remove(name);
        match rebuild {
            Some(rebuild) => rebuild.stop().await,
            // Cancelled before, as far as that went.
            None if self.store().cursor(&name_of(name)).await?.is_some() => {}
            None => {
                return Err(HandlerAccessError::Refused(format!(
                    "handler `{name}` is not being rebuilt"
                )));
            }
        }
        let given_up = async {
            if let Some(rebuildable) = handler.rebuildable() {
                rebuildable.give_up().await?;
            }
            let next = name_of(name);
            let epoch = claim(&self.inner, &next).await?;
            self.store().forget(&next, epoch).await?;
            let subject = format!("handler {name}");
            let entry = AuditEntry::new(by, "cancel", subject, &json!({ "what": "rebuild" }));
            Ok::<_, Hindrance>(self.store().audit(&entry).await?)
        };
        given_up.await.map_err(access)
    }

    /// How far the rebuild of a handler is; `None` where there is none.
    #[must_use]
    pub fn rebuilding(&self, name: &str) -> Option<Rebuilding> {
        let position = lock(&self.inner.rebuilds).get(name)?.status.snapshot().position;
        Some(Rebuilding { position, head: self.log().head() })
    }

    /// Every rebuild under way: how the handler that is being built is.
    #[must_use]
    pub fn rebuilds(&self) -> Vec<Snapshot> {
        lock(&self.inner.rebuilds).values().map(|rebuild| rebuild.status.snapshot()).collect()
    }

    /// Before a handler runs: goes on with its rebuild, or ends what a crash has cut off.
    pub(super) async fn resume_rebuild(
        &self,
        name: &Arc<str>,
        handler: &Arc<dyn EventHandler>,
        options: &HandlerOptions,
    ) {
        let Some(rebuildable) = handler.rebuildable() else { return };
        let inner = &self.inner;
        let mut delays = RetryPolicy::reconnect().start();
        loop {
            let step = async {
                if inner.log.store().cursor(&name_of(name)).await?.is_some() {
                    return Ok::<_, Hindrance>(true);
                }
                rebuildable.swap().await?;
                Ok(false)
            };
            match step.await {
                Ok(true) => {
                    return self.begin_rebuild(
                        Arc::clone(name),
                        Arc::clone(handler),
                        options.clone(),
                    );
                }
                Ok(false) => return,
                Err(error) => {
                    tracing::warn!(handler = &**name, %error, "cannot look for a rebuild yet");
                }
            }
            let pause = tokio::time::sleep(delays.next_delay());
            if inner.stop_handlers.run_until_cancelled(pause).await.is_none() {
                return;
            }
        }
    }

    fn begin_rebuild(
        &self,
        name: Arc<str>,
        handler: Arc<dyn EventHandler>,
        options: HandlerOptions,
    ) {
        let inner = &self.inner;
        let stop = inner.stop_handlers.child_token();
        let status = HandlerStatus::new(name_of(&name), handler.kind());
        let task = Task {
            bus: self.clone(),
            name: Arc::clone(&name),
            handler,
            options: HandlerOptions { start: Start::Beginning, ..options },
            status: Arc::clone(&status),
        };
        let (ended, abort) = (stop.clone(), inner.abort.clone());
        let task = inner.handler_tasks.spawn(async move {
            abort.run_until_cancelled(task.run(ended)).await;
        });
        lock(&inner.rebuilds).insert(name, Rebuild { status, stop, task });
    }
}

/// What a rebuild works with.
struct Task {
    bus: EventBus,
    name: Arc<str>,
    handler: Arc<dyn EventHandler>,
    options: HandlerOptions,
    status: Arc<HandlerStatus>,
}

impl Task {
    async fn run(self, stop: CancellationToken) {
        let Some(rebuildable) = self.handler.rebuildable() else { return };
        let handler = &*self.name;
        tracing::info!(handler, "rebuild is under way");
        let mut delays = RetryPolicy::reconnect().start();
        while !stop.is_cancelled() {
            if self.elsewhere() {
                // It is for the process that runs the handler.
                stop.run_until_cancelled(tokio::time::sleep(LOOK)).await;
                continue;
            }
            let step = async {
                let store = self.bus.inner.log.store();
                // Without its row it has been built and adopted, and is to be put into place.
                if store.cursor(&name_of(handler)).await?.is_some() {
                    let next = rebuildable.next(&name_of(handler)).await?;
                    if !self.build(next, &stop).await {
                        return Ok(());
                    }
                }
                self.exchange(&stop).await
            };
            match step.await {
                Ok(()) => return,
                Err(error) => tracing::warn!(handler, %error, "rebuild waits"),
            }
            stop.run_until_cancelled(tokio::time::sleep(delays.next_delay())).await;
        }
    }

    /// Whether another process runs the handler, or may do so.
    fn elsewhere(&self) -> bool {
        let state = self.bus.status(&self.name).map(|status| status.snapshot().state);
        let waits = matches!(state, Ok(HandlerState::Standby(_) | HandlerState::Starting));
        waits && self.bus.store().is_shared()
    }

    /// Runs what is being built until it has caught up; `false` where it was stopped before.
    async fn build(&self, next: Arc<dyn EventHandler>, stop: &CancellationToken) -> bool {
        let inner = &self.bus.inner;
        let mut building = Registered::with_status(
            name_of(&self.name),
            next,
            self.options.clone(),
            Arc::clone(&self.status),
        );
        let workers = (*lock(&inner.pool)).unwrap_or(1);
        building.launch(workers, inner);
        let caught_up = async {
            loop {
                tokio::time::sleep(LOOK).await;
                let (built, head) = (self.status.snapshot(), inner.log.head());
                let ready = matches!(built.state, HandlerState::Running);
                if ready && built.position.0 + CAUGHT_UP >= head.0 {
                    return;
                }
            }
        };
        let caught_up = stop.run_until_cancelled(caught_up).await.is_some();
        if let Some(running) = building.take_running() {
            running.stop().await;
        }
        caught_up
    }

    /// Puts what was built into its place. Tried again, it goes on where it was cut off.
    async fn exchange(&self, stop: &CancellationToken) -> Result<(), Hindrance> {
        let inner = &self.bus.inner;
        let (name, next) = (&*self.name, name_of(&self.name));
        let Some(rebuildable) = self.handler.rebuildable() else { return Ok(()) };
        // Not while somebody registers a handler; whoever replaces this one ends this first.
        let Some(_one_at_a_time) = stop.run_until_cancelled(inner.registering.lock()).await else {
            return Ok(());
        };
        let running = lock(&inner.handlers).get_mut(name).and_then(Registered::take_running);
        if let Some(running) = running {
            running.stop().await;
        }
        let exchanged = async {
            let store = inner.log.store();
            if store.cursor(&next).await?.is_some() {
                let (from, to) = (claim(inner, &next).await?, claim(inner, name).await?);
                store.adopt((&next, from), (name, to)).await?;
            }
            rebuildable.swap().await?;
            Ok(())
        };
        let exchanged = exchanged.await;
        if exchanged.is_ok() {
            lock(&inner.rebuilds).remove(name);
            tracing::info!(handler = name, "rebuild has taken its place");
        }
        // Whatever came of it, the handler goes on.
        let workers = *lock(&inner.pool);
        if let Some(registered) = lock(&inner.handlers).get_mut(name)
            && let Some(workers) = workers
        {
            registered.launch(workers, inner);
        }
        exchanged
    }
}

async fn claim(inner: &Inner, name: &str) -> Result<Epoch, Hindrance> {
    let claim =
        Claim { handler: name, owner: &inner.instance, ttl: inner.lease, start: Position::START };
    match inner.log.store().claim(claim).await? {
        Claimed::Taken(tenure) => Ok(tenure.epoch),
        Claimed::Held { owner, .. } => Err(Hindrance::Held(name.to_owned(), owner)),
    }
}

fn access(hindrance: Hindrance) -> HandlerAccessError {
    match hindrance {
        Hindrance::Store(error) => HandlerAccessError::Store(error),
        Hindrance::Held(name, _) => HandlerAccessError::Elsewhere(name.into()),
        Hindrance::Handler(error) => HandlerAccessError::Refused(error.to_string()),
    }
}
