//! One subscription's pull requests, and what is on its way for them (C7).
//!
//! Requests overlap, so that the server always has one to serve. Each is counted until its
//! messages have come or the server has said how many will not.

use std::{
    collections::VecDeque,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use async_nats::{Message, StatusCode, Subject, Subscriber};
use futures_util::Stream as _;
use serde_json::json;
use tokio::time::Instant;

use super::{
    api::{Api, ConsumerConfig},
    connect::Fault,
    delivery::Token,
};
use crate::transport::Room;

/// How long a request stays with the server.
const EXPIRES: Duration = Duration::from_secs(20);

/// How often the server says that it still has the request.
const HEARTBEAT: Duration = Duration::from_secs(2);

/// Silence after which the server has forgotten us.
const SILENCE: Duration = Duration::from_secs(7);

/// Silence after which a request that was limited in bytes may have ended without a word.
const USED_UP: Duration = Duration::from_millis(250);

/// What one request may bring in bytes, at most and at least.
const MAX_BYTES: usize = 16 << 20;
const MIN_BYTES: usize = 64 << 10;

pub(super) struct Pull {
    api: Api,
    subject: String,
    inbox: Subject,
    subscriber: Subscriber,
    batch: usize,
    max_bytes: usize,
    expires: Duration,
    /// Messages asked for that have not come.
    outstanding: usize,
    /// The end of the last request, with some grace.
    expired: Instant,
    /// Bytes asked for and come since nothing was outstanding.
    asked_bytes: usize,
    come_bytes: usize,
    /// The next message is larger than what was asked for in bytes.
    oversize: bool,
    heard: Instant,
    /// What the last delivery said was waiting behind it.
    pending: u64,
    /// Deliveries, in order, not taken yet.
    pub(super) arrived: VecDeque<(Message, Token)>,
}

impl Pull {
    pub(super) fn new(
        api: Api,
        subject: String,
        inbox: Subject,
        subscriber: Subscriber,
        batch: usize,
        limits: &ConsumerConfig,
    ) -> Self {
        let limit = |limit: usize| if limit == 0 { usize::MAX } else { limit };
        let now = Instant::now();
        Self {
            api,
            subject,
            inbox,
            subscriber,
            batch: batch.min(limit(limits.max_batch)),
            max_bytes: MAX_BYTES.min(limit(limits.max_bytes)),
            expires: limits.max_expires().map_or(EXPIRES, |max| max.min(EXPIRES)),
            outstanding: 0,
            expired: now,
            asked_bytes: 0,
            come_bytes: 0,
            oversize: false,
            heard: now,
            pending: 0,
            arrived: VecDeque::new(),
        }
    }

    /// Where the requests go.
    pub(super) fn subject(&self) -> &str {
        &self.subject
    }

    /// Whether the server has a request that it could serve.
    pub(super) fn is_asking(&self) -> bool {
        self.outstanding > 0
    }

    /// Asks for as much as there is room for, where half of that is not on its way yet.
    ///
    /// Cancel safe: a request is counted in the same step that sends it.
    pub(super) async fn ask(&mut self, room: Room) -> Result<(), Fault> {
        let free = room.messages.saturating_sub(self.arrived.len());
        if room.is_none() || free == 0 {
            return Ok(());
        }
        let target = free.min(self.batch);
        let missing = target.saturating_sub(self.outstanding);
        if missing == 0 || (self.outstanding > 0 && missing * 2 < target) {
            return Ok(());
        }
        let heartbeat = HEARTBEAT.min(self.expires / 3);
        let mut request = json!({
            "batch": missing,
            "expires": u64::try_from(self.expires.as_nanos()).unwrap_or(u64::MAX),
            "idle_heartbeat": u64::try_from(heartbeat.as_nanos()).unwrap_or(u64::MAX),
        });
        let (mut asked, mut asked_bytes) =
            (missing, room.bytes.clamp(MIN_BYTES, self.max_bytes.max(MIN_BYTES)));
        if self.oversize {
            // One message, whatever its size: the server would wait for ever otherwise.
            (asked, asked_bytes) = (1, usize::MAX / 8);
            request["batch"] = json!(1);
        } else {
            // In proportion, so that overlapping requests stay within the bound together.
            asked_bytes = (asked_bytes / target * missing).max(MIN_BYTES);
            request["max_bytes"] = json!(asked_bytes);
        }
        self.api
            .live
            .client
            .publish_with_reply(
                self.subject.clone(),
                self.inbox.clone(),
                request.to_string().into(),
            )
            .await
            .map_err(|_| Fault::Away("the connection to NATS was lost".to_owned()))?;
        let now = Instant::now();
        if self.outstanding == 0 {
            (self.asked_bytes, self.come_bytes) = (0, 0);
            self.heard = now;
        }
        self.oversize = false;
        self.outstanding += asked;
        self.asked_bytes += asked_bytes;
        self.expired = now + self.expires + Duration::from_secs(1);
        Ok(())
    }

    /// Moves what has come into `arrived`, without waiting. Says whether anything came.
    pub(super) fn poll_arrivals(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Fault>> {
        let mut came = false;
        loop {
            match Pin::new(&mut self.subscriber).poll_next(cx) {
                Poll::Ready(Some(message)) => {
                    came = true;
                    self.take(message)?;
                }
                Poll::Ready(None) => {
                    return Poll::Ready(Err(Fault::Away(
                        "the connection to NATS ended".to_owned(),
                    )));
                }
                Poll::Pending if came => return Poll::Ready(Ok(())),
                Poll::Pending => return Poll::Pending,
            }
        }
    }

    fn take(&mut self, message: Message) -> Result<(), Fault> {
        self.heard = Instant::now();
        // A publisher can set a status, too: only an ack subject makes a delivery.
        if let Some(token) = message.reply.as_deref().and_then(Token::parse) {
            self.outstanding = self.outstanding.saturating_sub(1);
            self.come_bytes += message.length;
            self.pending = token.pending;
            self.arrived.push_back((message, token));
            return Ok(());
        }
        let Some(status) = message.status else { return Ok(()) };
        let description = message.description.as_deref().unwrap_or_default();
        if status == StatusCode::IDLE_HEARTBEAT {
            return Ok(());
        }
        if status == StatusCode::NO_RESPONDERS {
            return Err(Fault::Away("the consumer or its stream is gone".to_owned()));
        }
        // 404 no messages, 408 expired, 409 several, some of which end the consumer.
        let lower = description.to_ascii_lowercase();
        for end in ["deleted", "shutdown", "leadership", "push based"] {
            if lower.contains(end) {
                return Err(Fault::Away(format!("the server ended the pull: {description}")));
            }
        }
        let header = message.headers.as_ref().and_then(|h| h.get("Nats-Pending-Messages"));
        let left = header.and_then(|value| value.as_str().parse::<usize>().ok());
        self.outstanding = left.map_or(0, |left| self.outstanding.saturating_sub(left));
        if lower.contains("maxbytes") && !lower.contains("maxrequest") {
            self.oversize = self.outstanding == 0;
        } else if status.as_u16() != 404 && status.as_u16() != 408 {
            return Err(Fault::Away(format!("the server refuses to deliver: {description}")));
        }
        Ok(())
    }

    /// What silence means by now, and when to look again.
    pub(super) fn check(&mut self) -> Result<Instant, Fault> {
        let now = Instant::now();
        if self.outstanding == 0 {
            return Ok(now + SILENCE);
        }
        if now >= self.expired {
            self.outstanding = 0;
            return Ok(now);
        }
        if now >= self.heard + SILENCE {
            return Err(Fault::Silent(format!("nothing heard from the consumer for {SILENCE:?}")));
        }
        // A request whose bytes fit exactly ends without a status.
        if self.pending > 0 && self.come_bytes * 2 >= self.asked_bytes {
            if now >= self.heard + USED_UP {
                self.outstanding = 0;
                return Ok(now);
            }
            return Ok(self.heard + USED_UP);
        }
        Ok(self.expired.min(self.heard + SILENCE))
    }
}
