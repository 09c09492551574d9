//! HTTP ingest as a transport, against the clauses of the contract that are about consuming and
//! have a broker's side in HTTP.
//!
//! There is no broker here: what is not settled is still its client's, who posts it again (C4),
//! and a client that wants order (C3) posts one request at a time, as the one below does. A
//! request is taken whole, however large the room (C7), and the next one is posted only after it
//! (for C4 see the unit tests of the transport); when to retry is the client's to say (C6);
//! and there is no connection of ours to keep or to lose (C8, C9).

use async_trait::async_trait;
use bytes::Bytes;
use pulsebus::{
    event::{Headers, Message, Origin},
    transport::{Outbound, Transport, http::HttpTransport},
};
use serde_json::Value;
use tokio::{sync::mpsc, task::JoinSet};

use crate::{
    conformance::transport::{Fixture, Source},
    transport_conformance,
};

struct Http {
    transport: HttpTransport,
    /// What the client has still to post.
    requests: mpsc::UnboundedSender<Vec<Message>>,
    _client: JoinSet<()>,
}

#[async_trait]
impl Fixture for Http {
    async fn start() -> Self {
        let transport = HttpTransport::new(64 << 20);
        let ingress = transport.ingress();
        let (requests, mut waiting) = mpsc::unbounded_channel::<Vec<Message>>();
        let mut client = JoinSet::new();
        client.spawn(async move {
            while let Some(request) = waiting.recv().await {
                while ingress.append(request.clone()).await.is_err() {
                    tokio::task::yield_now().await;
                }
            }
        });
        Self { transport, requests, _client: client }
    }

    fn transport(&self) -> &dyn Transport {
        &self.transport
    }

    async fn fresh_source(&self) -> Source {
        let template = Outbound {
            id: "".into(),
            address: "".into(),
            exchange: None,
            headers: Headers::new(),
            body: Bytes::new(),
        };
        Source { params: Value::Null, template, in_flight: 0 }
    }

    /// One request, posted again until it is answered.
    async fn publish(&self, messages: &[Outbound]) {
        let request = messages
            .iter()
            .map(|message| Message {
                body: message.body.clone(),
                headers: message.headers.clone(),
                origin: Origin::default(),
            })
            .collect();
        self.requests.send(request).unwrap();
    }

    async fn cut(&self) {}

    async fn away(&self) {}

    async fn back(&self) {}

    async fn break_subscription(&self, _source: &Source) {}

    async fn mend_subscription(&self, _source: &Source) {}

    async fn delay(&self, _by: std::time::Duration) {}

    fn refused(&self, _source: &Source) -> Vec<Outbound> {
        Vec::new()
    }

    fn unroutable(&self, source: &Source) -> Outbound {
        source.message("unroutable")
    }

    fn headers(&self) -> Headers {
        let mut headers = Headers::new();
        headers.push("traceparent", "00-1");
        headers.push("x-many", "a");
        headers.push("x-many", "b");
        headers
    }
}

transport_conformance!(
    Http;
    C1_everything_is_delivered,
    C2_bytes_and_headers_are_kept,
    C3_order_survives_a_crash,
    C3_order_survives_crashes_after_the_commit,
    C5_the_acked_do_not_come_again,
    C10_next_is_cancel_safe,
    C11_settling_works_after_close,
);
