//! Settlement on one channel: by one task, one frame after the other.
//!
//! RabbitMQ closes a channel on an ack it did not expect, and `multiple` acks everything up to
//! its tag. So all settlements of a generation go through the [`Settler`], which alone knows
//! what is open, and uses `multiple` only where nothing earlier is.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use async_trait::async_trait;
use lapin::{
    Channel,
    options::{BasicAckOptions, BasicNackOptions, BasicRejectOptions},
};
use tokio::{
    sync::{mpsc, oneshot},
    time::Instant,
};

use super::connect::Link;
use crate::transport::{Settle, Settlement};

/// What the settler is told. Its queue is unbounded and yet small: there are never more
/// commands than deliveries, which the prefetch bounds.
pub(super) enum Command {
    /// These tags are in a caller's hands.
    HandedOver { first: u64, last: u64 },
    /// Settle them, from the first tag on.
    Settle { first: u64, settlements: Vec<Settlement>, done: oneshot::Sender<()> },
    /// Keep the driver's consumer, so that it is not cancelled before the connection closes.
    Keep(lapin::Consumer),
    /// Close the connection now.
    End,
}

/// Settles what was handed over on one channel, for as long as anybody may.
pub(super) struct Settler {
    link: Link,
    channel: Channel,
    timeout: Duration,
    ledger: Ledger,
    /// The channel is no more: what is not settled comes again, and nothing can be done here.
    dead: bool,
}

impl Settler {
    pub(super) fn new(link: Link, channel: Channel, timeout: Duration) -> Self {
        Self { link, channel, timeout, ledger: Ledger::default(), dead: false }
    }

    /// Runs until told to end, or until the consumer and everything it handed over are gone;
    /// then closes the connection. Says whether the broker knows that it is closed.
    pub(super) async fn run(mut self, mut commands: mpsc::UnboundedReceiver<Command>) -> bool {
        let mut kept = None;
        loop {
            let due = self.ledger.next_due();
            tokio::select! {
                command = commands.recv() => match command {
                    None | Some(Command::End) => break,
                    Some(Command::HandedOver { first, last }) => {
                        self.ledger.handed_over(first, last);
                    }
                    Some(Command::Settle { first, settlements, done }) => {
                        for frame in self.ledger.settle(first, &settlements, Instant::now()) {
                            self.send(frame).await;
                        }
                        // The caller may have given up waiting.
                        let _ = done.send(());
                    }
                    Some(Command::Keep(stream)) => kept = Some(stream),
                },
                () = sleep_until(due) => {
                    for frame in self.ledger.take_due(Instant::now()) {
                        self.send(frame).await;
                    }
                }
            }
        }
        let known = self.link.close().await;
        drop((kept, self.channel));
        known
    }

    async fn send(&mut self, frame: Frame) {
        if self.dead {
            return;
        }
        let sent = async {
            match frame {
                Frame::Ack { tag, multiple } => {
                    self.channel.basic_ack(tag, BasicAckOptions { multiple }).await
                }
                Frame::Requeue { tag } => {
                    let options = BasicNackOptions { multiple: false, requeue: true };
                    self.channel.basic_nack(tag, options).await
                }
                Frame::Reject { tag } => {
                    self.channel.basic_reject(tag, BasicRejectOptions { requeue: false }).await
                }
            }
        };
        // No error to anybody: `next` sees the same failure, and the message comes again.
        self.dead = !matches!(tokio::time::timeout(self.timeout, sent).await, Ok(Ok(())));
    }
}

async fn sleep_until(due: Option<Instant>) {
    match due {
        Some(due) => tokio::time::sleep_until(due).await,
        None => std::future::pending().await,
    }
}

/// What goes to the broker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Frame {
    Ack { tag: u64, multiple: bool },
    Requeue { tag: u64 },
    Reject { tag: u64 },
}

/// What is open on the channel.
#[derive(Debug, Default)]
struct Ledger {
    /// Handed over and not settled: first tag, last tag.
    open: BTreeMap<u64, u64>,
    /// To be delivered again when they are due.
    held: BTreeSet<(Instant, u64)>,
    /// The tags of `held`.
    held_tags: BTreeSet<u64>,
}

impl Ledger {
    fn handed_over(&mut self, first: u64, last: u64) {
        self.open.insert(first, last);
    }

    /// Whether nothing before this tag is open.
    fn is_first(&self, tag: u64) -> bool {
        self.open.first_key_value().is_none_or(|(first, _)| *first > tag)
            && self.held_tags.first().is_none_or(|held| *held > tag)
    }

    fn settle(&mut self, first: u64, settlements: &[Settlement], now: Instant) -> Vec<Frame> {
        let Some(last) = self.open.remove(&first) else { return Vec::new() };
        let mut frames = Vec::new();
        // Acks not yet in `frames`.
        let mut run = first..first;
        for (tag, settlement) in (first..=last).zip(settlements) {
            match settlement {
                Settlement::Ack(_) => run.end = tag + 1,
                Settlement::Retry(delay) => {
                    self.ack(run, &mut frames);
                    run = tag + 1..tag + 1;
                    if delay.is_zero() {
                        frames.push(Frame::Requeue { tag });
                    } else {
                        self.held.insert((now + *delay, tag));
                        self.held_tags.insert(tag);
                    }
                }
                Settlement::Reject => {
                    self.ack(run, &mut frames);
                    run = tag + 1..tag + 1;
                    frames.push(Frame::Reject { tag });
                }
            }
        }
        // Fewer settlements than messages leave the rest open.
        let settled = first + u64::try_from(settlements.len()).unwrap_or(u64::MAX);
        self.ack(run, &mut frames);
        if settled <= last {
            self.open.insert(settled, last);
        }
        frames
    }

    fn ack(&self, tags: std::ops::Range<u64>, frames: &mut Vec<Frame>) {
        if tags.is_empty() {
            return;
        }
        if self.is_first(tags.start) {
            frames.push(Frame::Ack { tag: tags.end - 1, multiple: true });
        } else {
            frames.extend(tags.map(|tag| Frame::Ack { tag, multiple: false }));
        }
    }

    fn next_due(&self) -> Option<Instant> {
        self.held.first().map(|(due, _)| *due)
    }

    fn take_due(&mut self, now: Instant) -> Vec<Frame> {
        let mut tags = Vec::new();
        while let Some(&(due, tag)) = self.held.first()
            && due <= now
        {
            self.held.pop_first();
            self.held_tags.remove(&tag);
            tags.push(tag);
        }
        // Put back in the order in which they were published.
        tags.sort_unstable();
        tags.into_iter().map(|tag| Frame::Requeue { tag }).collect()
    }
}

/// The settlement of what one call of `next` handed over.
///
/// Dropped unused it leaves everything as it is: the broker keeps the deliveries back, and
/// counts them against the prefetch, until the connection closes.
pub(super) struct AmqpSettle {
    commands: mpsc::UnboundedSender<Command>,
    first: u64,
}

impl AmqpSettle {
    pub(super) fn new(commands: mpsc::UnboundedSender<Command>, first: u64) -> Self {
        Self { commands, first }
    }
}

#[async_trait]
impl Settle for AmqpSettle {
    async fn settle(self: Box<Self>, settlements: Vec<Settlement>) {
        let (done, settled) = oneshot::channel();
        let command = Command::Settle { first: self.first, settlements, done };
        // A settler that has ended belongs to an earlier connection: those deliveries come again.
        if self.commands.send(command).is_ok() {
            let _ = settled.await;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::{collection, prelude::*, sample::Index};

    use super::*;
    use crate::{event::Position, transport::Receipt};

    fn ack() -> Settlement {
        Settlement::Ack(Receipt::Stored(Position(1)))
    }

    #[test]
    fn acks_in_order_are_one_frame() {
        let mut ledger = Ledger::default();
        let now = Instant::now();
        ledger.handed_over(1, 3);
        ledger.handed_over(4, 5);
        let all = ledger.settle(1, &[ack(), ack(), ack()], now);
        assert_eq!(all, [Frame::Ack { tag: 3, multiple: true }]);
        let all = ledger.settle(4, &[ack(), ack()], now);
        assert_eq!(all, [Frame::Ack { tag: 5, multiple: true }]);
    }

    #[test]
    fn acks_out_of_order_spare_what_is_open() {
        let mut ledger = Ledger::default();
        let now = Instant::now();
        ledger.handed_over(1, 1);
        ledger.handed_over(2, 3);
        let all = ledger.settle(2, &[ack(), ack()], now);
        assert_eq!(all, [2, 3].map(|tag| Frame::Ack { tag, multiple: false }));
        assert_eq!(ledger.settle(1, &[ack()], now), [Frame::Ack { tag: 1, multiple: true }]);
    }

    #[test]
    fn C6_a_held_delivery_is_not_acked_by_those_behind_it() {
        let mut ledger = Ledger::default();
        let now = Instant::now();
        ledger.handed_over(1, 3);
        ledger.handed_over(4, 4);
        let delay = Duration::from_secs(5);
        let all = ledger.settle(1, &[ack(), Settlement::Retry(delay), ack()], now);
        let (one, three) =
            (Frame::Ack { tag: 1, multiple: true }, Frame::Ack { tag: 3, multiple: false });
        assert_eq!(all, [one, three]);
        assert_eq!(ledger.settle(4, &[ack()], now), [Frame::Ack { tag: 4, multiple: false }]);
        assert_eq!(ledger.take_due(now + delay / 2), []);
        assert_eq!(ledger.take_due(now + delay), [Frame::Requeue { tag: 2 }]);
        assert_eq!(ledger.next_due(), None);
    }

    /// What the broker does with a frame: `Err` where it would close the channel.
    fn apply(unsettled: &mut BTreeMap<u64, bool>, frame: Frame, acked: &mut BTreeSet<u64>) -> bool {
        match frame {
            Frame::Ack { tag, multiple: true } => {
                let tags: Vec<_> = unsettled.range(..=tag).map(|(tag, _)| *tag).collect();
                if !tags.contains(&tag) {
                    return false;
                }
                for tag in tags {
                    unsettled.remove(&tag);
                    acked.insert(tag);
                }
                true
            }
            Frame::Ack { tag, multiple: false } => {
                acked.insert(tag);
                unsettled.remove(&tag).is_some()
            }
            Frame::Requeue { tag } | Frame::Reject { tag } => unsettled.remove(&tag).is_some(),
        }
    }

    proptest! {
        /// Whatever is settled in whatever order: the broker sees no tag twice, and acks
        /// exactly what was to be acked.
        #[test]
        fn G1_only_what_was_acked_is_acked(
            batches in collection::vec(collection::vec(0..4_u8, 1..6), 1..8),
            order in collection::vec(any::<Index>(), 8),
        ) {
            let now = Instant::now();
            let mut ledger = Ledger::default();
            let (mut unsettled, mut acked, mut wanted) =
                (BTreeMap::new(), BTreeSet::new(), BTreeSet::new());
            let mut waiting = Vec::new();
            let mut tag = 1;
            for batch in batches {
                let first = tag;
                let mut settlements = Vec::new();
                for kind in batch {
                    settlements.push(match kind {
                        0 => Settlement::Reject,
                        1 => Settlement::Retry(Duration::from_millis(u64::from(kind))),
                        _ => {
                            wanted.insert(tag);
                            ack()
                        }
                    });
                    unsettled.insert(tag, true);
                    tag += 1;
                }
                ledger.handed_over(first, tag - 1);
                waiting.push((first, settlements));
            }
            for index in order {
                if waiting.is_empty() {
                    break;
                }
                let (first, settlements) = waiting.remove(index.index(waiting.len()));
                for frame in ledger.settle(first, &settlements, now) {
                    prop_assert!(apply(&mut unsettled, frame, &mut acked), "{frame:?}");
                }
            }
            for frame in ledger.take_due(now + Duration::from_secs(1)) {
                prop_assert!(apply(&mut unsettled, frame, &mut acked), "{frame:?}");
            }
            prop_assert!(acked == wanted);
            prop_assert!(unsettled.is_empty());
        }
    }
}
