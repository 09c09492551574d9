//! A JetStream message as a [`Message`], and its settlement by its ack subject.

use std::{
    collections::HashSet,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use async_nats::{HeaderMap, Subject};
use async_trait::async_trait;
use bytes::Bytes;
use rustc_hash::FxBuildHasher;

use super::{
    KIND, NatsSource,
    api::Stored,
    connect::{Link, Live},
};
use crate::{
    event::{HeaderValue, Headers, Message, Origin},
    transport::{Settle, Settlement},
};

/// More different subjects than this are not remembered together.
const SUBJECTS: usize = 1_024;

/// What the ack subject says of a delivery.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Token {
    /// How often it has been delivered, this time included.
    pub(super) deliveries: u64,
    pub(super) stream_seq: u64,
    pub(super) consumer_seq: u64,
    /// How many messages wait behind it.
    pub(super) pending: u64,
}

impl Token {
    /// Reads `$JS.ACK.<stream>.<consumer>.<deliveries>.<stream seq>.<consumer seq>.<time>.<pending>`,
    /// or the longer form with domain and account before the stream and something random behind.
    pub(super) fn parse(reply: &str) -> Option<Self> {
        let mut tokens = [""; 13];
        let mut count = 0;
        for token in reply.strip_prefix("$JS.ACK.")?.split('.') {
            *tokens.get_mut(count)? = token;
            count += 1;
        }
        let at = match count {
            7 => 2,
            9.. => 4,
            _ => return None,
        };
        Some(Self {
            deliveries: tokens[at].parse().ok()?,
            stream_seq: tokens[at + 1].parse().ok()?,
            consumer_seq: tokens[at + 2].parse().ok()?,
            pending: tokens[at + 4].parse().ok()?,
        })
    }
}

/// Whether an ack to this subject is for a delivery of this consumer.
pub(super) fn is_ack_of(subject: &str, stream: &str, consumer: &str) -> bool {
    let Some(tokens) = subject.strip_prefix("$JS.ACK.") else { return false };
    let tokens: Vec<_> = tokens.split('.').collect();
    let at = if tokens.len() > 7 { 2 } else { 0 };
    tokens.get(at..at + 2) == Some(&[stream, consumer])
}

/// Turns what the server sends into messages; repeated subjects share one string.
#[derive(Debug)]
pub(super) struct Intake {
    source: Arc<str>,
    transport: Arc<str>,
    stream: Arc<str>,
    consumer: Arc<str>,
    subjects: HashSet<Arc<str>, FxBuildHasher>,
}

impl Intake {
    pub(super) fn new(name: Arc<str>, source: &NatsSource) -> Self {
        Self {
            source: name,
            transport: KIND.into(),
            stream: source.stream.as_str().into(),
            consumer: source.consumer.as_str().into(),
            subjects: HashSet::default(),
        }
    }

    pub(super) fn delivered(&mut self, message: async_nats::Message, token: Token) -> Message {
        Message {
            origin: self.origin(&message.subject, token.stream_seq),
            headers: message.headers.as_ref().map(headers).unwrap_or_default(),
            body: message.payload,
        }
    }

    pub(super) fn stored(&mut self, message: Stored) -> Message {
        Message {
            origin: self.origin(&message.subject, message.sequence),
            headers: message.headers,
            body: message.body,
        }
    }

    /// The ack subject of a message that was delivered, but not to us. The server finds the
    /// delivery by its stream sequence; the consumer sequence must only be one it has used.
    pub(super) fn ack_subject(&self, stream_seq: u64, consumer_seq: u64) -> Subject {
        ack_subject(&self.stream, &self.consumer, stream_seq, consumer_seq)
    }

    fn origin(&mut self, subject: &str, sequence: u64) -> Origin {
        let subject = match self.subjects.get(subject) {
            Some(known) => Arc::clone(known),
            None => {
                if self.subjects.len() >= SUBJECTS {
                    self.subjects.clear();
                }
                let subject: Arc<str> = subject.into();
                self.subjects.insert(Arc::clone(&subject));
                subject
            }
        };
        Origin {
            source: Arc::clone(&self.source),
            transport: Arc::clone(&self.transport),
            subject,
            channel: Some(Arc::clone(&self.stream)),
            exchange: None,
            sequence: Some(sequence),
        }
    }
}

/// See [`Intake::ack_subject`].
pub(super) fn ack_subject(
    stream: &str,
    consumer: &str,
    stream_seq: u64,
    consumer_seq: u64,
) -> Subject {
    format!("$JS.ACK.{stream}.{consumer}.1.{stream_seq}.{consumer_seq}.0.0").into()
}

/// The client keeps headers in a map, so only the order within a name is known; names are
/// sorted to make the same message the same each time.
fn headers(map: &HeaderMap) -> Headers {
    let mut all: Vec<(Box<str>, HeaderValue)> = Vec::with_capacity(map.len());
    for (name, values) in map.iter() {
        for value in values {
            let name: &str = name.as_ref();
            all.push((name.into(), HeaderValue::Text(value.as_str().to_owned())));
        }
    }
    all.sort_by(|(a, _), (b, _)| a.cmp(b));
    all.into_iter().collect()
}

/// Settles by publishing to the ack subjects: over the connection the messages came by, or over
/// what there is by then, since an ack belongs to the consumer's state, not to a connection.
pub(super) struct NatsSettle {
    pub(super) live: Live,
    pub(super) link: Arc<Link>,
    pub(super) acks: Vec<Subject>,
    /// How far the log is once these are acked, and who wants to know.
    pub(super) through: u64,
    pub(super) committed: Arc<AtomicU64>,
    pub(super) patience: Duration,
}

impl NatsSettle {
    /// Queues the answers; gives up when the connection does. What the server has not heard
    /// comes again and is recognised as a copy.
    async fn answer(&self, answers: impl Iterator<Item = (Subject, Bytes)>) {
        if !self.live.is_down() {
            answer(&self.live, answers).await;
        } else if let Some(live) = self.link.latest() {
            answer(&live, answers).await;
        }
    }
}

/// Queues answers until the connection is lost.
pub(super) async fn answer(live: &Live, answers: impl Iterator<Item = (Subject, Bytes)>) {
    let sending = async {
        for (subject, payload) in answers {
            if live.client.publish(subject, payload).await.is_err() {
                return;
            }
        }
    };
    tokio::select! {
        () = sending => {}
        _ = live.down() => {}
    }
}

pub(super) const IN_PROGRESS: Bytes = Bytes::from_static(b"+WPI");

#[async_trait]
impl Settle for NatsSettle {
    async fn settle(mut self: Box<Self>, settlements: Vec<Settlement>) {
        if settlements.iter().all(|settlement| matches!(settlement, Settlement::Ack(_))) {
            self.committed.fetch_max(self.through, Ordering::Relaxed);
        }
        let acks = std::mem::take(&mut self.acks);
        let answers = acks.into_iter().zip(settlements).map(|(ack, settlement)| {
            let payload = match settlement {
                Settlement::Ack(_) => Bytes::from_static(b"+ACK"),
                Settlement::Reject => Bytes::from_static(b"+TERM"),
                Settlement::Retry(delay) => {
                    // Zero would mean "at once, by the consumer's own backoff".
                    let nanos = delay.as_nanos().max(1);
                    Bytes::from(format!("-NAK {{\"delay\":{nanos}}}"))
                }
            };
            (ack, payload)
        });
        self.answer(answers).await;
    }

    fn patience(&self) -> Option<Duration> {
        Some(self.patience)
    }

    async fn keep_alive(&mut self) {
        self.answer(self.acks.iter().map(|ack| (ack.clone(), IN_PROGRESS))).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ack_subjects_are_read_in_all_their_forms() {
        let token = Token { deliveries: 2, stream_seq: 17, consumer_seq: 19, pending: 5 };
        for reply in [
            "$JS.ACK.S.C.2.17.19.1669000000.5",
            "$JS.ACK.dom.hash.S.C.2.17.19.1669000000.5",
            "$JS.ACK._.hash.S.C.2.17.19.1669000000.5.rnd",
        ] {
            assert_eq!(Token::parse(reply), Some(token), "{reply}");
            assert!(is_ack_of(reply, "S", "C") && !is_ack_of(reply, "S", "D"), "{reply}");
        }
        for reply in ["", "_INBOX.x", "$JS.ACK.S.C.2.17.19.5", "$JS.ACK.S.C.x.17.19.1.5"] {
            assert_eq!(Token::parse(reply), None, "{reply}");
        }
    }
}
