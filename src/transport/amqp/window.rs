//! What is being published, in order: who waits for it, and when its outcome is certain.
//!
//! The broker sends a message's return before its confirm, but the driver hands a return to
//! whichever confirm comes next: an acked message may yet turn out to be returned. It cannot
//! once everything has been confirmed that was on its way at the time of its own confirm.
//! (Returns that wait in the driver are never more than the returned messages still unconfirmed,
//! and each confirm takes the oldest.) That moment is an entry's *horizon*. Waiting for it costs
//! latency under load, and no throughput.

use std::collections::VecDeque;

use tokio::sync::oneshot;

use crate::transport::{Outbound, PublishError};

/// Published and not confirmed, at most.
const UNCONFIRMED: usize = 1_500;

/// Entries beyond which no call is taken in.
const ENTRIES: usize = 2 * UNCONFIRMED;

/// One call of `publish`.
pub(super) struct Job {
    pub(super) messages: Vec<Outbound>,
    pub(super) reply: oneshot::Sender<Vec<Result<(), PublishError>>>,
}

/// A call, and the outcomes so far, in order.
struct Call {
    reply: oneshot::Sender<Vec<Result<(), PublishError>>>,
    count: usize,
    results: Vec<Result<(), PublishError>>,
}

struct Entry {
    message: Outbound,
    published: bool,
    /// The sequence of the last message published when this one was confirmed.
    horizon: Option<u64>,
    failure: Option<PublishError>,
}

impl Entry {
    fn is_pending(&self) -> bool {
        self.published && self.horizon.is_none()
    }
}

#[derive(Default)]
pub(super) struct Window {
    /// The sequence of the first entry.
    base: u64,
    entries: VecDeque<Entry>,
    /// How many entries have been published or need not be; the next one is to be.
    fed: usize,
    /// Published, not confirmed, still in `entries`.
    pending: usize,
    /// Published, not confirmed, no longer in `entries`: failed before the broker answered.
    stale: usize,
    /// No entry before this one is pending.
    settled: usize,
    calls: VecDeque<Call>,
}

impl Window {
    pub(super) fn is_empty(&self) -> bool {
        self.calls.is_empty()
    }

    pub(super) fn has_room(&self) -> bool {
        self.entries.len() < ENTRIES
    }

    /// Published and not confirmed.
    pub(super) fn unconfirmed(&self) -> usize {
        self.pending + self.stale
    }

    pub(super) fn push(&mut self, job: Job) {
        let count = job.messages.len();
        self.calls.push_back(Call { reply: job.reply, count, results: Vec::with_capacity(count) });
        self.entries.extend(job.messages.into_iter().map(|message| Entry {
            message,
            published: false,
            horizon: None,
            failure: None,
        }));
    }

    /// The next message to publish, where there is room on its way.
    pub(super) fn next_to_publish(&mut self) -> Option<(u64, &Outbound)> {
        if self.unconfirmed() >= UNCONFIRMED {
            return None;
        }
        while self.entries.get(self.fed).is_some_and(|entry| entry.failure.is_some()) {
            self.fed += 1;
        }
        let entry = self.entries.get(self.fed)?;
        Some((self.base + self.fed as u64, &entry.message))
    }

    /// The broker has been asked to take it.
    pub(super) fn published(&mut self, sequence: u64) {
        if let Some(entry) = self.entry(sequence) {
            entry.published = true;
            self.pending += 1;
            self.fed += 1;
        }
    }

    /// Whatever else may be heard of it: this is its outcome.
    pub(super) fn refuse(&mut self, sequence: u64, error: PublishError) {
        if let Some(entry) = self.entry(sequence) {
            entry.failure.get_or_insert(error);
        }
    }

    /// The broker has answered.
    pub(super) fn confirmed(&mut self, sequence: u64) {
        let horizon = (self.base + self.fed as u64).saturating_sub(1);
        match self.entry(sequence) {
            Some(entry) if entry.is_pending() => {
                entry.horizon = Some(horizon);
                self.pending -= 1;
            }
            Some(_) => {}
            None => self.stale = self.stale.saturating_sub(1),
        }
    }

    /// The broker has returned a message. Two on their way to the same place under the same id
    /// cannot be told apart: neither counts as routed.
    pub(super) fn returned(
        &mut self,
        id: &str,
        exchange: &str,
        key: &str,
        error: impl Fn() -> PublishError,
    ) {
        for entry in self.entries.iter_mut().filter(|entry| entry.published) {
            let message = &entry.message;
            if *message.id == *id
                && *message.address == *key
                && message.exchange.as_deref().unwrap_or("") == exchange
            {
                entry.failure.get_or_insert_with(&error);
            }
        }
    }

    /// Fails those published and unconfirmed that the predicate names; whether there are any.
    pub(super) fn blame(
        &mut self,
        guilty: impl Fn(&Outbound) -> bool,
        error: impl Fn() -> PublishError,
    ) -> bool {
        let mut any = false;
        for entry in self.entries.iter_mut().filter(|entry| entry.is_pending()) {
            if guilty(&entry.message) {
                any = true;
                entry.failure.get_or_insert_with(&error);
            }
        }
        any
    }

    /// On a new channel: everything that has not failed, from the first on. What was confirmed
    /// and has not reached its horizon is published again too: its return may have gone down
    /// with the old channel.
    pub(super) fn publish_again(&mut self) {
        for entry in &mut self.entries {
            entry.published = false;
            entry.horizon = None;
        }
        (self.fed, self.pending, self.stale, self.settled) = (0, 0, 0, 0);
    }

    /// Answers the calls whose outcomes are certain.
    pub(super) fn resolve(&mut self) {
        while self.settled < self.fed
            && self.entries.get(self.settled).is_some_and(|entry| !entry.is_pending())
        {
            self.settled += 1;
        }
        while self.settled > 0
            && let Some(entry) = self.entries.front()
        {
            let heard_all = self.stale == 0
                && entry.horizon.is_none_or(|horizon| horizon < self.base + self.settled as u64);
            if entry.failure.is_none() && !heard_all {
                break;
            }
            let result = entry.failure.clone().map_or(Ok(()), Err);
            self.answer(result);
            self.entries.pop_front();
            self.base += 1;
            self.settled -= 1;
            self.fed -= 1;
        }
    }

    /// Fails everything. The broker may yet answer for what was published.
    pub(super) fn fail_all(&mut self, error: impl Fn() -> PublishError) {
        self.stale += self.pending;
        self.base += self.entries.len() as u64;
        for entry in std::mem::take(&mut self.entries) {
            self.answer(Err(entry.failure.unwrap_or_else(&error)));
        }
        (self.fed, self.pending, self.settled) = (0, 0, 0);
    }

    fn entry(&mut self, sequence: u64) -> Option<&mut Entry> {
        let index = usize::try_from(sequence.checked_sub(self.base)?).ok()?;
        self.entries.get_mut(index)
    }

    fn answer(&mut self, result: Result<(), PublishError>) {
        let Some(call) = self.calls.front_mut() else { return };
        call.results.push(result);
        if call.results.len() == call.count
            && let Some(call) = self.calls.pop_front()
        {
            // The caller may have gone (it is cancel safe in that much).
            let _ = call.reply.send(call.results);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, VecDeque};

    use bytes::Bytes;
    use proptest::{collection, prelude::*, sample::Index};

    use super::*;
    use crate::event::Headers;

    fn job(from: usize, lost: &[bool]) -> (Job, oneshot::Receiver<Vec<Result<(), PublishError>>>) {
        let message = |(n, lost): (usize, &bool)| Outbound {
            id: (from + n).to_string().into(),
            address: if *lost { "lost" } else { "found" }.into(),
            exchange: None,
            headers: Headers::new(),
            body: Bytes::new(),
        };
        let (reply, replied) = oneshot::channel();
        (Job { messages: lost.iter().enumerate().map(message).collect(), reply }, replied)
    }

    fn failed() -> PublishError {
        PublishError::Failed("unroutable".to_owned())
    }

    proptest! {
        /// Confirms in any order, each with the oldest return that waits, as the driver does it:
        /// every message has its own outcome.
        #[test]
        fn P1_a_return_fails_its_own_message(
            calls in collection::vec(collection::vec(any::<bool>(), 1..12), 1..8),
            order in collection::vec(any::<Index>(), 100),
        ) {
            let mut window = Window::default();
            let mut replies = Vec::new();
            let (mut flying, mut returns) = (BTreeMap::new(), VecDeque::new());
            let mut order = order.into_iter().cycle();
            let mut from = 0;
            let mut calls = calls.into_iter();
            loop {
                // Calls come while earlier ones are on their way.
                let next = calls.next();
                if let Some(lost) = &next {
                    let (job, replied) = job(from, lost);
                    from += lost.len();
                    window.push(job);
                    replies.push((replied, lost.clone()));
                    while let Some((sequence, message)) = window.next_to_publish() {
                        let message = message.clone();
                        // The broker returns at once, and confirms when it likes.
                        if &*message.address == "lost" {
                            returns.push_back(message.id.clone());
                        }
                        flying.insert(sequence, ());
                        window.published(sequence);
                    }
                } else if flying.is_empty() {
                    break;
                }
                let confirms = if next.is_some() { flying.len() / 2 } else { flying.len() };
                for _ in 0..confirms {
                    let at = order.next().unwrap().index(flying.len());
                    let sequence = *flying.keys().nth(at).unwrap();
                    flying.remove(&sequence);
                    window.confirmed(sequence);
                    if let Some(id) = returns.pop_front() {
                        window.returned(&id, "", "lost", failed);
                    }
                    window.resolve();
                }
            }
            prop_assert!(window.is_empty());
            for (mut replied, lost) in replies {
                let results = replied.try_recv().unwrap();
                for (result, lost) in results.iter().zip(&lost) {
                    prop_assert_eq!(result.is_err(), *lost);
                }
                prop_assert_eq!(results.len(), lost.len());
            }
        }
    }

    #[test]
    fn P5_what_was_failed_early_is_not_confirmed_into_the_next() {
        let mut window = Window::default();
        let (first, mut replied) = job(0, &[false]);
        window.push(first);
        window.published(0);
        window.fail_all(|| PublishError::Unavailable("blocked".to_owned()));
        assert!(matches!(replied.try_recv().unwrap()[..], [Err(PublishError::Unavailable(_))]));
        let (second, mut replied) = job(1, &[false]);
        window.push(second);
        let (sequence, _) = window.next_to_publish().unwrap();
        window.published(sequence);
        // The late answer to the first message is not one to the second.
        window.confirmed(0);
        window.resolve();
        assert!(replied.try_recv().is_err());
        window.confirmed(sequence);
        window.resolve();
        assert_eq!(replied.try_recv().unwrap(), [Ok(())]);
    }
}
