//! The way in: what is posted to the ingest endpoint, as deliveries.
//!
//! A request is one delivery group: its answer is its settlement, so a `2xx` means committed
//! (G1). A client whose request ended otherwise still has its events and posts them again (C4),
//! recognised by their ids.

use std::sync::Arc;

use async_trait::async_trait;
use tokio::sync::{Mutex, OwnedMutexGuard, OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};

use crate::{
    event::Message,
    transport::{
        Consumer, Deliveries, Publisher, Receipt, Reporter, Room, Settle, Settlement, SourceSpec,
        SourceState, Transport, TransportError,
    },
};

/// Requests waiting to be taken, at most, and as many waiting for their turn to wait.
const MAX_WAITING: usize = 1_024;

/// The way in for HTTP: the API server posts through its [`HttpIngress`], a source consumes.
pub struct HttpTransport {
    ingress: HttpIngress,
    requests: Arc<Mutex<mpsc::Receiver<Request>>>,
}

/// Where the API server hands messages in. Cheap to clone.
#[derive(Clone)]
pub struct HttpIngress {
    requests: mpsc::Sender<Request>,
    /// Requests that have no bytes or no place in the channel yet.
    queue: Arc<Semaphore>,
    bytes: Arc<Semaphore>,
    max_bytes: usize,
    /// Whether the consumer has been closed; the next one opens it again.
    closed: watch::Sender<bool>,
}

struct Request {
    messages: Vec<Message>,
    reply: oneshot::Sender<Vec<Receipt>>,
    /// Gives the bytes back when the request has been answered.
    _bytes: OwnedSemaphorePermit,
}

/// Why messages were not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum IngressError {
    /// Too many requests are waiting already; try again later.
    #[error("too many requests are waiting for the event store")]
    Busy,
    /// The source that takes them is stopped, or stopped before they were committed.
    #[error("the daemon is stopping, or its event store has failed")]
    Closed,
}

impl HttpTransport {
    /// A way in that lets at most `max_bytes` of bodies wait at once.
    #[must_use]
    pub fn new(max_bytes: usize) -> Self {
        let (requests, incoming) = mpsc::channel(MAX_WAITING);
        let max_bytes = max_bytes.clamp(1, Semaphore::MAX_PERMITS);
        let bytes = Arc::new(Semaphore::new(max_bytes));
        let queue = Arc::new(Semaphore::new(MAX_WAITING));
        let closed = watch::Sender::new(false);
        Self {
            ingress: HttpIngress { requests, queue, bytes, max_bytes, closed },
            requests: Arc::new(Mutex::new(incoming)),
        }
    }

    /// Where messages are handed in.
    #[must_use]
    pub fn ingress(&self) -> HttpIngress {
        self.ingress.clone()
    }
}

impl HttpIngress {
    /// Hands messages in; resolves when they are committed, one receipt each, in order.
    ///
    /// Where others have taken all there is room for, this waits its turn, first come first
    /// served: a large request is not overtaken by small ones for ever. It waits for as long as
    /// the store is away; give it a timeout.
    ///
    /// *Cancel safe* in that nothing is acked: the messages may be committed or not.
    ///
    /// # Errors
    /// See [`IngressError`].
    pub async fn append(&self, messages: Vec<Message>) -> Result<Vec<Receipt>, IngressError> {
        let mut closed = self.closed.subscribe();
        let receipts = tokio::select! {
            biased;
            _ = closed.wait_for(|closed| *closed) => return Err(IngressError::Closed),
            submitted = self.submit(messages) => submitted?,
        };
        // What was handed in before the end is settled, or dropped by whoever ends it.
        receipts.await.map_err(|_| IngressError::Closed)
    }

    async fn submit(
        &self,
        messages: Vec<Message>,
    ) -> Result<oneshot::Receiver<Vec<Receipt>>, IngressError> {
        let _turn = self.queue.try_acquire().map_err(|_| IngressError::Busy)?;
        let size: usize = messages.iter().map(|message| message.body.len()).sum();
        // A single request larger than the bound takes all of it: it waits alone.
        let permits =
            u32::try_from(size.clamp(1, self.max_bytes)).map_err(|_| IngressError::Busy)?;
        let bytes = Arc::clone(&self.bytes)
            .acquire_many_owned(permits)
            .await
            .map_err(|_| IngressError::Closed)?;
        let place = self.requests.reserve().await.map_err(|_| IngressError::Closed)?;
        let (reply, receipts) = oneshot::channel();
        // Under its lock: a request is in the channel before the consumer empties it, or not
        // at all.
        let closed = self.closed.borrow();
        if *closed {
            return Err(IngressError::Closed);
        }
        place.send(Request { messages, reply, _bytes: bytes });
        Ok(receipts)
    }
}

#[async_trait]
impl Transport for HttpTransport {
    fn kind(&self) -> &'static str {
        "http"
    }

    async fn consumer(&self, source: SourceSpec) -> Result<Box<dyn Consumer>, TransportError> {
        let requests = Arc::clone(&self.requests).try_lock_owned().map_err(|_| {
            TransportError::Misconfigured(
                "the HTTP ingest endpoint feeds one source; remove the other".to_owned(),
            )
        })?;
        let closed = self.ingress.closed.clone();
        closed.send_replace(false);
        source.reporter.report(SourceState::Consuming);
        Ok(Box::new(HttpConsumer {
            requests,
            name: source.name,
            reporter: source.reporter,
            left_over: None,
            closed,
        }))
    }

    async fn publisher(&self) -> Result<Box<dyn Publisher>, TransportError> {
        Err(TransportError::Misconfigured(
            "the ingest endpoint is where events come in; forward to a webhook of [transports]"
                .to_owned(),
        ))
    }
}

struct HttpConsumer {
    requests: OwnedMutexGuard<mpsc::Receiver<Request>>,
    name: Arc<str>,
    reporter: Reporter,
    /// A request that did not fit the last group.
    left_over: Option<Request>,
    closed: watch::Sender<bool>,
}

#[async_trait]
impl Consumer for HttpConsumer {
    async fn next(&mut self, room: Room) -> Option<Deliveries> {
        if *self.closed.borrow() || room.is_none() {
            // Nothing is on its way: requests wait, and their clients with them.
            return std::future::pending().await;
        }
        let first = match self.left_over.take() {
            Some(request) => request,
            None => self.requests.recv().await?,
        };
        let mut messages = Vec::new();
        let mut replies = Vec::new();
        let mut bytes = 0;
        let mut next = Some(first);
        while let Some(mut request) = next {
            let count = request.messages.len();
            let size: usize = request.messages.iter().map(|message| message.body.len()).sum();
            let full = messages.len() + count > room.messages || bytes + size > room.bytes;
            if full && !replies.is_empty() {
                self.left_over = Some(request);
                break;
            }
            bytes += size;
            for message in &mut request.messages {
                message.origin.source = Arc::clone(&self.name);
                message.origin.transport = "http".into();
            }
            messages.append(&mut request.messages);
            replies.push((count, request));
            next = self.requests.try_recv().ok();
        }
        Some(Deliveries {
            messages,
            mark: None,
            redelivered: 0,
            settle: Box::new(Answers(replies)),
        })
    }

    async fn close(&mut self) {
        // Those waiting, and those still coming, are told at once, and post again elsewhere or
        // later.
        self.closed.send_replace(true);
        self.left_over = None;
        while self.requests.try_recv().is_ok() {}
        self.reporter.report(SourceState::Stopped);
    }
}

/// The requests of a group, with how many messages each had.
struct Answers(Vec<(usize, Request)>);

#[async_trait]
impl Settle for Answers {
    async fn settle(self: Box<Self>, settlements: Vec<Settlement>) {
        let mut settlements = settlements.into_iter();
        for (count, request) in self.0 {
            let receipts: Option<Vec<Receipt>> = settlements
                .by_ref()
                .take(count)
                .map(|settlement| match settlement {
                    Settlement::Ack(receipt) => Some(receipt),
                    // The client is told that it was not taken, and decides.
                    Settlement::Retry(_) | Settlement::Reject => None,
                })
                .collect();
            if let Some(receipts) = receipts {
                // A client that has gone does not learn; it posts again, which is a copy.
                let _ = request.reply.send(receipts);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::Position;

    fn spec() -> SourceSpec {
        SourceSpec {
            name: "http".into(),
            params: serde_json::Value::Null,
            competing: false,
            resume: None,
            reporter: Reporter::new("http"),
        }
    }

    fn message(body: &'static str) -> Message {
        Message { body: body.into(), ..Message::default() }
    }

    const ROOM: Room = Room { messages: 10, bytes: 1_000 };

    #[tokio::test]
    async fn C1_requests_are_grouped_and_each_gets_its_own_receipts() {
        let http = HttpTransport::new(1_000);
        let mut consumer = http.consumer(spec()).await.unwrap();
        let ingress = http.ingress();
        let post = |bodies: &[&'static str]| {
            let ingress = ingress.clone();
            let messages = bodies.iter().map(|body| message(body)).collect();
            async move { ingress.append(messages).await }
        };
        let take = async {
            let deliveries = consumer.next(ROOM).await.unwrap();
            let receipts = (1..=deliveries.messages.len() as u64)
                .map(|n| Settlement::Ack(Receipt::Stored(Position(n))))
                .collect();
            deliveries.settle.settle(receipts).await;
        };
        let (one, two, ()) = tokio::join!(post(&["1", "2"]), post(&["3"]), take);
        assert_eq!(one.unwrap(), [Receipt::Stored(Position(1)), Receipt::Stored(Position(2))]);
        assert_eq!(two.unwrap(), [Receipt::Stored(Position(3))]);
    }

    #[tokio::test]
    async fn C4_a_request_that_is_not_settled_fails() {
        let http = HttpTransport::new(1_000);
        let mut consumer = http.consumer(spec()).await.unwrap();
        let ingress = http.ingress();
        let (answer, ()) = tokio::join!(ingress.append(vec![message("1")]), async {
            drop(consumer.next(ROOM).await);
        });
        assert_eq!(answer, Err(IngressError::Closed));
    }

    #[tokio::test]
    async fn G7_what_waits_is_bounded() {
        let http = HttpTransport::new(10);
        let ingress = http.ingress();
        let first = ingress.append(vec![message("12345678")]);
        let mut waiting: Vec<_> =
            (0..MAX_WAITING).map(|_| Box::pin(ingress.append(vec![message("123")]))).collect();
        tokio::pin!(first);
        assert!(futures_util::poll!(first.as_mut()).is_pending());
        for waiting in &mut waiting {
            assert!(futures_util::poll!(waiting).is_pending());
        }
        assert_eq!(http.requests.lock().await.len(), 1, "8 of 10 bytes are taken");
        assert_eq!(ingress.append(vec![message("1")]).await, Err(IngressError::Busy));
        waiting.truncate(1);
        let mut consumer = http.consumer(spec()).await.unwrap();
        consumer.close().await;
        assert_eq!(first.await, Err(IngressError::Closed));
        assert_eq!(waiting.remove(0).await, Err(IngressError::Closed));
    }

    #[tokio::test]
    async fn C11_after_a_drain_requests_fail_at_once_until_the_next_consumer() {
        let http = HttpTransport::new(10);
        let ingress = http.ingress();
        let mut consumer = http.consumer(spec()).await.unwrap();
        let taken = ingress.append(vec![message("1")]);
        tokio::pin!(taken);
        assert!(futures_util::poll!(taken.as_mut()).is_pending());
        let deliveries = consumer.next(ROOM).await.unwrap();
        consumer.close().await;
        assert_eq!(ingress.append(vec![message("2")]).await, Err(IngressError::Closed));
        // What was taken before is settled still.
        let receipt = Receipt::Stored(Position(1));
        deliveries.settle.settle(vec![Settlement::Ack(receipt.clone())]).await;
        assert_eq!(taken.await, Ok(vec![receipt]));
        assert!(http.consumer(spec()).await.is_err());
        drop(consumer);
        let mut consumer = http.consumer(spec()).await.unwrap();
        let (answer, ()) = tokio::join!(ingress.append(vec![message("3")]), async {
            let deliveries = consumer.next(ROOM).await.unwrap();
            deliveries.settle.settle(vec![Settlement::Ack(Receipt::Stored(Position(2)))]).await;
        });
        assert_eq!(answer, Ok(vec![Receipt::Stored(Position(2))]));
    }

    #[tokio::test]
    async fn a_large_request_has_its_turn_among_small_ones() {
        let http = HttpTransport::new(10);
        let ingress = http.ingress();
        let mut consumer = http.consumer(spec()).await.unwrap();
        let post = |body| Box::pin(ingress.append(vec![message(body)]));
        let (mut small, mut large) = (post("1"), post("1234567890"));
        assert!(futures_util::poll!(&mut small).is_pending());
        assert!(futures_util::poll!(&mut large).is_pending());
        // Always one small request under way, as under steady traffic.
        for _ in 0..3 {
            let mut next = post("2");
            assert!(futures_util::poll!(&mut next).is_pending());
            let deliveries = consumer.next(ROOM).await.unwrap();
            let body = deliveries.messages[0].body.clone();
            let receipt = Receipt::Stored(Position(1));
            deliveries.settle.settle(vec![Settlement::Ack(receipt.clone())]).await;
            if body.len() == 10 {
                assert_eq!(large.await, Ok(vec![receipt]));
                return;
            }
            assert!(small.await.is_ok());
            assert!(futures_util::poll!(&mut large).is_pending());
            small = next;
        }
        panic!("small requests overtook the large one");
    }
}
