//! Quarantine entries that a redrive has taken up: decoded and appended again, or given up.
//!
//! An entry leaves quarantine after its event is committed. A crash in between repeats it, and
//! then its event is a copy of itself: an entry whose message says no id has one of its number.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::{RunningSource, lock};
use crate::{
    event::{Decoder, DecoderOptions, Message, Quarantined},
    retry::RetryPolicy,
    store::{
        Append, Entry, Log, StoreError,
        progress::{RedriveAction, RedrivenEntry, SettledEntry},
    },
    transport::Receipt,
};

/// Entries taken at once.
const BATCH: usize = 200;

/// Bytes of bodies decoded at once.
const BATCH_BYTES: usize = 8 << 20;

/// How often a store that other processes use is asked for what they have started.
const POLL: Duration = Duration::from_secs(5);

/// What the task needs.
pub(super) struct Reingest {
    pub(super) log: Arc<Log>,
    /// How the messages of each source are read now.
    pub(super) sources: Arc<Mutex<BTreeMap<Arc<str>, RunningSource>>>,
    /// How those of sources that are gone are read.
    pub(super) default: DecoderOptions,
    /// A redrive has been started.
    pub(super) started: Arc<Notify>,
}

impl Reingest {
    /// Works until stopped.
    pub(super) async fn run(self, stop: CancellationToken) {
        let mut delays = RetryPolicy::reconnect().start();
        loop {
            let wait = match self.work(&stop).await {
                Ok(()) => {
                    delays.reset();
                    self.log.store().is_shared().then_some(POLL)
                }
                // That the store is away is said elsewhere.
                Err(_) => Some(delays.next_delay()),
            };
            let pause = async {
                match wait {
                    Some(wait) => tokio::time::sleep(wait).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = stop.cancelled() => return,
                () = self.started.notified() => {}
                () = pause => {}
            }
        }
    }

    /// Goes on until nothing is left.
    async fn work(&self, stop: &CancellationToken) -> Result<(), StoreError> {
        // Redrives that have had as much as their rate lets them, and until when that counts.
        let mut resting: Vec<(u64, Instant)> = Vec::new();
        while !stop.is_cancelled() {
            let now = Instant::now();
            resting.retain(|(_, until)| *until > now);
            let except: Vec<u64> = resting.iter().map(|(redrive, _)| *redrive).collect();
            let found = self.log.store().redriven_quarantine(&except, BATCH).await?;
            let Some(&RedrivenEntry { redrive, action, rate, .. }) = found.first() else {
                self.log.store().end_redrives().await?;
                let Some(rested) = resting.iter().map(|(_, until)| *until).min() else {
                    return Ok(());
                };
                let rested = tokio::time::sleep_until(rested.into());
                tokio::select! {
                    () = rested => {}
                    () = self.started.notified() => {}
                    () = stop.cancelled() => {}
                }
                continue;
            };
            // One redrive at a time, so that each keeps its own rate.
            let most = rate.map_or(BATCH, |rate| rate as usize).max(1);
            let numbers: Vec<u64> = found
                .iter()
                .filter(|entry| entry.redrive == redrive)
                .take(most)
                .map(|entry| entry.number)
                .collect();
            let taken = match action {
                RedriveAction::Discard => {
                    let gone: Vec<_> =
                        numbers.iter().map(|number| SettledEntry::Gone(*number)).collect();
                    self.log.store().settle_quarantine(&gone).await?;
                    gone.len()
                }
                RedriveAction::Retry => self.again(&numbers).await?,
            };
            if let Some(rate) = rate {
                #[expect(clippy::cast_precision_loss, reason = "a few hundred")]
                let rest = Duration::from_secs_f64(taken as f64 / f64::from(rate.max(1)));
                resting.push((redrive, now + rest));
            }
        }
        Ok(())
    }

    /// Decodes and appends entries; says how many of them, from the first on.
    async fn again(&self, numbers: &[u64]) -> Result<usize, StoreError> {
        let store = self.log.store();
        let mut settled = Vec::new();
        let mut appended = Vec::new();
        let mut entries = Vec::new();
        let mut bytes = 0;
        let mut taken = 0;
        for &number in numbers {
            if bytes > BATCH_BYTES {
                break;
            }
            taken += 1;
            let Some((entry, body)) = store.quarantine_entry(number).await? else { continue };
            bytes += body.len();
            let options = match lock(&self.sources).get(&entry.origin.source) {
                Some(source) => source.decoder.clone(),
                None => self.default.clone(),
            };
            let message = Message { body, headers: entry.headers, origin: entry.origin };
            match Decoder::new(options).decode_again(message, number) {
                Ok(event) => {
                    appended.push(number);
                    entries.push(Entry::Event(event));
                }
                Err(not_an_event) => {
                    let reason = Quarantined::from(not_an_event).reason;
                    settled.push(SettledEntry::Stays { number, reason });
                }
            }
        }
        if !entries.is_empty() {
            let ticket = self.log.submit(Append { entries, mark: None });
            let receipts =
                ticket.await.map_err(|_| StoreError::unavailable("the log is closed"))?;
            for (number, receipt) in appended.into_iter().zip(receipts) {
                match receipt {
                    Receipt::Stored(_) | Receipt::Duplicate(_) => {
                        settled.push(SettledEntry::Gone(number));
                    }
                    // A conflict, or refused by the store: the entry it has made says no more
                    // than this one.
                    Receipt::Quarantined { number: made, reason } => {
                        settled.push(SettledEntry::Gone(made));
                        settled.push(SettledEntry::Stays { number, reason: reason.to_string() });
                    }
                }
            }
        }
        store.settle_quarantine(&settled).await?;
        Ok(taken)
    }
}
