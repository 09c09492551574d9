//! The reference transport against the contract.

use std::{
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use pulsebus::{
    event::{HeaderValue, Headers},
    transport::{
        Outbound, PublishError, Publisher, Transport,
        memory::{MemoryOptions, MemoryTransport},
    },
};
use serde_json::json;

use crate::{
    conformance::transport::{Fixture, Log, Source, within},
    transport_conformance,
};

struct Memory {
    transport: MemoryTransport,
    sources: AtomicUsize,
}

fn outbound(address: &str) -> Outbound {
    Outbound {
        id: "".into(),
        address: address.into(),
        exchange: None,
        headers: Headers::new(),
        body: Bytes::new(),
    }
}

#[async_trait]
impl Fixture for Memory {
    async fn start() -> Self {
        Self { transport: MemoryTransport::default(), sources: AtomicUsize::new(0) }
    }

    fn transport(&self) -> &dyn Transport {
        &self.transport
    }

    async fn fresh_source(&self) -> Source {
        let queue = format!("queue-{}", self.sources.fetch_add(1, Ordering::Relaxed));
        self.transport.declare(&queue);
        Source { params: json!({"queue": queue}), template: outbound(&queue), in_flight: 0 }
    }

    /// The queues have one door: while they are out of reach, this waits for them.
    async fn publish(&self, messages: &[Outbound]) {
        let publisher = self.transport.publisher().await.unwrap();
        for message in messages {
            while let Err(error) = publisher.publish(vec![message.clone()]).await.remove(0) {
                assert!(matches!(error, PublishError::Unavailable(_)), "{error}");
                tokio::task::yield_now().await;
            }
        }
    }

    async fn cut(&self) {
        self.transport.disconnect();
        tokio::task::yield_now().await;
        self.transport.reconnect();
    }

    async fn away(&self) {
        self.transport.disconnect();
    }

    async fn back(&self) {
        self.transport.reconnect();
    }

    async fn break_subscription(&self, source: &Source) {
        self.transport.delete(&source.template.address);
    }

    async fn mend_subscription(&self, _source: &Source) {}

    async fn delay(&self, _by: Duration) {}

    fn refused(&self, source: &Source) -> Vec<Outbound> {
        let body = vec![b'x'; MemoryOptions::default().max_message_bytes + 1].into();
        vec![Outbound { body, ..source.message("too-large") }]
    }

    fn unroutable(&self, source: &Source) -> Outbound {
        Outbound { address: "nowhere".into(), ..source.message("unroutable") }
    }

    fn headers(&self) -> Headers {
        let mut headers = Headers::new();
        headers.push("Trace-Id", "a");
        headers.push("trace-id", "b");
        headers.push("Trace-Id", "c");
        headers.push("count", HeaderValue::Int32(-5));
        headers.push("raw", HeaderValue::Binary(vec![0, 255]));
        headers
    }
}

transport_conformance!(Memory);

#[tokio::test]
async fn P6_a_full_queue_holds_publishers_up_and_drops_nothing() {
    let options = MemoryOptions {
        capacity: 10,
        publish_timeout: Duration::from_millis(200),
        ..MemoryOptions::default()
    };
    let transport = MemoryTransport::new(options);
    transport.declare("small");
    let source =
        Source { params: json!({"queue": "small"}), template: outbound("small"), in_flight: 0 };
    let publisher = transport.publisher().await.unwrap();
    let results = publisher.publish(source.messages(0..15)).await;
    assert_eq!(results[..10], vec![Ok(()); 10]);
    assert!(results[10..].iter().all(|r| matches!(r, Err(PublishError::Unavailable(_)))));
    assert_eq!(transport.depth("small"), Some(10));

    let (mut consumer, _) = source.open(&transport, None).await;
    let mut log = Log::default();
    let publishing = publish_all(&*publisher, source.messages(10..500));
    tokio::join!(publishing, log.fill(&mut *consumer, 500));
    log.assert_order(0..500);
    assert_eq!(transport.depth("small"), Some(0));
}

async fn publish_all(publisher: &dyn Publisher, mut left: Vec<Outbound>) {
    within("room", async {
        while !left.is_empty() {
            let results = publisher.publish(left.clone()).await;
            left.drain(..results.iter().take_while(|r| r.is_ok()).count());
        }
    })
    .await;
}

#[tokio::test]
async fn a_shut_down_transport_ends_its_consumers() {
    let transport = MemoryTransport::default();
    let source = Source { params: json!({"queue": "q"}), template: outbound("q"), in_flight: 0 };
    let (mut consumer, _) = source.open(&transport, None).await;
    transport.shut_down();
    let next = within("the end", consumer.next(pulsebus::transport::Room::NONE)).await;
    assert!(next.is_none());
}
