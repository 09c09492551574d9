//! Reading messages from the stream by sequence, where their deliveries went to nobody (C3).

use std::{collections::VecDeque, sync::Arc};

use futures_util::{FutureExt as _, StreamExt as _, future::BoxFuture, stream::FuturesOrdered};

use super::{
    api::{Api, Stored},
    connect::Fault,
    matches,
};
use crate::transport::Room;

/// Reads under way at the same time, at most.
const READS: u64 = 128;

/// Bytes that may be under way, going by the largest message seen lately.
const BYTES: u64 = 8 << 20;

/// A range of the stream being read in order. Cancel safe: everything read is kept here until
/// it is taken.
pub(super) struct Recovery {
    api: Api,
    stream: Arc<str>,
    filter: Option<Arc<str>>,
    /// The next to ask for.
    next: u64,
    /// The last of the range.
    end: u64,
    /// Asks for "the next one that matches" rather than for every sequence: one at a time, but
    /// it skips what does not matter.
    sparse: bool,
    reads: FuturesOrdered<BoxFuture<'static, Result<Read, Fault>>>,
    ready: VecDeque<Stored>,
    /// Everything up to here is in `ready` or was handed over.
    through: u64,
    largest: u64,
}

struct Read {
    /// Everything up to here has been looked at once this is taken.
    through: u64,
    message: Option<Stored>,
}

impl Recovery {
    /// Of the messages behind `after`, up to `end`, those that match.
    pub(super) fn new(
        api: Api,
        stream: Arc<str>,
        filter: Option<Arc<str>>,
        after: u64,
        end: u64,
        sparse: bool,
    ) -> Self {
        Self {
            api,
            stream,
            filter,
            next: after + 1,
            end,
            sparse,
            reads: FuturesOrdered::new(),
            ready: VecDeque::new(),
            through: after,
            largest: 1,
        }
    }

    pub(super) fn end(&self) -> u64 {
        self.end
    }

    /// Waits for the next messages and gives them with how far that is; none at the end.
    pub(super) async fn next(&mut self, room: Room) -> Result<(Vec<Stored>, u64), Fault> {
        while self.ready.is_empty() {
            self.ask(room);
            match self.reads.next().await {
                Some(read) => self.keep(read?),
                None => return Ok((Vec::new(), self.end)),
            }
        }
        while self.ready.len() < room.messages
            && let Some(Some(read)) = self.reads.next().now_or_never()
        {
            self.keep(read?);
            self.ask(room);
        }
        let (mut taken, mut bytes) = (Vec::new(), 0);
        while taken.len() < room.messages
            && bytes < room.bytes
            && let Some(message) = self.ready.pop_front()
        {
            bytes += message.body.len();
            taken.push(message);
        }
        let through = match (self.ready.is_empty(), taken.last()) {
            (false, Some(last)) => last.sequence,
            _ => self.through,
        };
        Ok((taken, through))
    }

    fn keep(&mut self, read: Read) {
        self.through = read.through.max(self.through);
        let Some(message) = read.message else { return };
        let size = message.body.len() as u64;
        self.largest = size.max(self.largest - self.largest / 8).max(1);
        if self.filter.as_deref().is_none_or(|filter| matches(filter, &message.subject)) {
            self.ready.push_back(message);
        }
    }

    fn ask(&mut self, room: Room) {
        let window = (BYTES / self.largest).clamp(4, READS).min(room.messages as u64).max(1);
        if self.sparse {
            if self.reads.is_empty() && self.through < self.end {
                let (api, stream) = (self.api.clone(), Arc::clone(&self.stream));
                let filter = self.filter.clone().unwrap_or_else(|| ">".into());
                let (from, end) = (self.through + 1, self.end);
                self.reads.push_back(Box::pin(async move {
                    let found = api.message(&stream, from, Some(&filter)).await?;
                    Ok(match found.filter(|message| message.sequence <= end) {
                        Some(message) => Read { through: message.sequence, message: Some(message) },
                        None => Read { through: end, message: None },
                    })
                }));
            }
            return;
        }
        while self.next <= self.end && (self.reads.len() as u64) < window {
            let (api, stream) = (self.api.clone(), Arc::clone(&self.stream));
            let sequence = self.next;
            self.next += 1;
            self.reads.push_back(Box::pin(async move {
                let message = api.message(&stream, sequence, None).await?;
                Ok(Read { through: sequence, message })
            }));
        }
    }
}
