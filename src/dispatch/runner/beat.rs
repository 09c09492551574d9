//! Whether what has to end does: what the runner's pulse says beside its turns.
//!
//! A call of the handler has its timeout, a call of the store its own; neither ends a call that
//! blocks its thread. Such a call is not the target's fault, and it does not get better by
//! waiting: the pulse stops, and the watchdog may act (see [`telemetry`](crate::telemetry)).

use std::{
    pin::Pin,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use futures_util::future::BoxFuture;

use super::Runner;
use crate::{dispatch::resume::FLUSH_TIMEOUT, store::Log};

/// How much longer than its timeout a call of the handler may take: a busy machine.
const CUT_OFF: Duration = Duration::from_secs(10);

/// How long it may take to find where a handler goes on: its own position, and some calls of
/// the store.
pub(super) fn finding(log: &Log) -> Duration {
    2 * FLUSH_TIMEOUT + 4 * log.store().patience()
}

/// A call of the store under way.
pub(super) struct Call<T> {
    since: Instant,
    future: BoxFuture<'static, T>,
}

impl<T> Call<T> {
    pub(super) fn new(now: Instant, call: impl Future<Output = T> + Send + 'static) -> Self {
        Self { since: now, future: Box::pin(call) }
    }
}

impl<T> Future for Call<T> {
    type Output = T;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<T> {
        self.future.as_mut().poll(cx)
    }
}

impl Runner {
    /// Beats, unless something that has to end does not.
    pub(super) fn beat(&mut self, now: Instant) {
        match self.endless(now) {
            None => {
                self.pulse.beat();
                self.overdue = false;
            }
            Some(what) if !self.overdue => {
                self.overdue = true;
                tracing::error!(handler = &*self.name, "{what}");
            }
            Some(_) => {}
        }
    }

    /// What does not end, in words.
    fn endless(&self, now: Instant) -> Option<&'static str> {
        let longer = |since: Instant, than: Duration| now.saturating_duration_since(since) > than;
        let call = self.options.timeout + CUT_OFF;
        if self.calls.iter().flatten().any(|(_, since)| longer(*since, call)) {
            return Some("a call of the handler does not end at its timeout: it blocks its thread");
        }
        let store = self.log.store().patience();
        let (reading, loading) = (self.reading.as_ref(), self.loading.as_ref());
        let calls = [
            reading.map(|call| (call.since, store)),
            loading.map(|call| (call.since, store)),
            self.redriving.fetching.as_ref().map(|call| (call.since, store)),
            self.lease.as_ref().and_then(|lease| Some((lease.renewing.as_ref()?.since, store))),
            self.saving.as_ref().map(|saving| (saving.done.since, FLUSH_TIMEOUT + store)),
        ];
        let endless = calls.into_iter().flatten().any(|(since, limit)| longer(since, limit));
        endless.then_some("a call of the store, or a flush of the handler, does not end")
    }
}
