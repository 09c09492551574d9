//! Sources that are consumed by one process at a time, where several share a store.
//!
//! A source is claimed as a handler is, by a row in `cursors` under the name `source:NAME`. A
//! process that finds it claimed stands by, and takes over within seconds when the other ends.
//! While the store is away nobody can claim anything, so what is being consumed goes on being
//! held: letting it go would spend the broker's delivery attempts on our own outage.

use std::{sync::Arc, time::Duration};

use tokio_util::sync::CancellationToken;

use crate::{
    event::Position,
    ingest::{self, Source},
    retry::RetryPolicy,
    store::{
        Log, StoreError,
        progress::{Claim, Claimed, Epoch, SOURCE},
    },
    telemetry::{ComponentLabels, Metrics},
    transport::{Reporter, SourceState},
};

/// What consuming a source in turns needs.
pub(super) struct Turns {
    pub(super) source: Source,
    pub(super) reporter: Reporter,
    pub(super) log: Arc<Log>,
    pub(super) metrics: Metrics,
    pub(super) owner: Arc<str>,
    pub(super) lease: Duration,
}

impl Turns {
    /// Consumes the source whenever it is this process's turn, until stopped.
    pub(super) async fn run(self, stop: CancellationToken) {
        let name = format!("{SOURCE}{}", self.source.name);
        let component = ComponentLabels { component: name.as_str().into() };
        let lease = &self.metrics.lease;
        lease.lost(&component);
        let mut elsewhere = false;
        let mut delays = RetryPolicy::reconnect().start();
        while !stop.is_cancelled() {
            let wait = match self.claim(&name).await {
                Ok(Claimed::Taken(tenure)) => {
                    delays.reset();
                    lease.taken(&component, tenure.epoch.0, std::mem::take(&mut elsewhere));
                    let again = self.consume(&name, tenure.epoch, &stop).await;
                    lease.lost(&component);
                    if !again {
                        return;
                    }
                    continue;
                }
                Ok(Claimed::Held { owner, left }) => {
                    elsewhere = true;
                    let reason = format!("{owner} consumes it; this one takes over when that ends");
                    self.reporter.report(SourceState::Standby(reason));
                    left.min(self.lease / 5)
                }
                Err(error) => {
                    self.reporter.report(SourceState::Paused(error.to_string()));
                    delays.next_delay()
                }
            };
            stop.run_until_cancelled(tokio::time::sleep(wait)).await;
        }
        self.reporter.report(SourceState::Stopped);
    }

    async fn claim(&self, name: &str) -> Result<Claimed, StoreError> {
        let claim =
            Claim { handler: name, owner: &self.owner, ttl: self.lease, start: Position::START };
        self.log.store().claim(claim).await
    }

    /// One turn; `false` when it was the last one.
    async fn consume(&self, name: &str, epoch: Epoch, stop: &CancellationToken) -> bool {
        let turn = stop.child_token();
        let consuming = ingest::run(
            self.source.clone(),
            self.reporter.clone(),
            Arc::clone(&self.log),
            self.metrics.clone(),
            turn.clone(),
        );
        let mut consuming = std::pin::pin!(consuming);
        tokio::select! {
            // Drained, or the log has failed.
            () = &mut consuming => {}
            () = self.lost(name, epoch) => {
                tracing::warn!(source = &*self.source.name, "another process consumes it now");
                turn.cancel();
                consuming.await;
                return true;
            }
        }
        // So that nobody has to wait for the end of the claim; it ends by itself otherwise.
        let _ = tokio::time::timeout(self.lease, self.log.store().release(name, epoch)).await;
        false
    }

    /// Renews the claim; resolves when somebody else has it.
    async fn lost(&self, name: &str, epoch: Epoch) {
        loop {
            tokio::time::sleep(self.lease / 3).await;
            let renewed = self.log.store().renew(name, epoch, self.lease).await;
            if matches!(renewed, Err(StoreError::Fenced(_))) {
                return;
            }
        }
    }
}
