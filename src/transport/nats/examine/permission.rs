//! What this user may not publish, found out by publishing what nobody acts upon.
//!
//! The server says nothing of what it takes, and says of what it refuses that it does. So what is
//! tried asks for no answer and is no valid request: a pull, a read or a creation that JetStream
//! cannot read, an ack of no delivery, a message for a stream that cannot be.

use std::time::Duration;

use async_nats::HeaderMap;
use bytes::Bytes;
use serde_json::Value;
use tokio::time::timeout;

use super::super::{NatsSource, api::Api, connect::Fault};

/// The server has spoken by then: it answers a later request after an earlier refusal. The driver
/// tells of it from another task.
const TOLD: Duration = Duration::from_millis(300);

/// Something to try.
pub(super) struct Try {
    subject: String,
    headers: Option<HeaderMap>,
    payload: &'static str,
}

impl Try {
    /// A request that JetStream cannot read, and so does not carry out.
    fn request(api: &Api, request: &str) -> Self {
        Self { subject: api.subject(request), headers: None, payload: "-" }
    }

    /// A pull that cannot be read takes no message.
    pub(super) fn pull(api: &Api, source: &NatsSource) -> Self {
        Self { subject: api.pull_subject(source), headers: None, payload: "-" }
    }

    /// Sequences begin with 1, so this says of no delivery that it is being worked on.
    pub(super) fn ack(source: &NatsSource) -> Self {
        let subject = format!("$JS.ACK.{}.{}.1.0.0.0.0", source.stream, source.consumer);
        Self { subject, headers: None, payload: "+WPI" }
    }

    pub(super) fn read(api: &Api, source: &NatsSource) -> Self {
        Self::request(api, &format!("STREAM.MSG.GET.{}", source.stream))
    }

    pub(super) fn create_stream(api: &Api, source: &NatsSource) -> Self {
        Self::request(api, &format!("STREAM.CREATE.{}", source.stream))
    }

    pub(super) fn create_consumer(api: &Api, source: &NatsSource) -> Self {
        let consumer = &source.consumer;
        Self::request(api, &format!("CONSUMER.DURABLE.CREATE.{}.{consumer}", source.stream))
    }

    /// JetStream refuses to store it: no stream has a point in its name.
    pub(super) fn publish(subject: String) -> Self {
        let mut headers = HeaderMap::new();
        headers.insert("Nats-Expected-Stream", "pulsebus.doctor");
        Self { subject, headers: Some(headers), payload: "" }
    }
}

/// The subjects that this user may not publish to.
pub(super) async fn refused(api: &Api, tries: Vec<Try>) -> Result<Vec<String>, Fault> {
    let lost = || Fault::Away("the connection to NATS was lost".to_owned());
    let mut refusals = api.live.refusals();
    let mut subjects = Vec::with_capacity(tries.len());
    for Try { subject, headers, payload } in tries {
        let (to, payload) = (subject.clone(), Bytes::from_static(payload.as_bytes()));
        subjects.push(subject);
        let client = &api.live.client;
        match headers {
            Some(headers) => client.publish_with_headers(to, headers, payload).await,
            None => client.publish(to, payload).await,
        }
        .map_err(|_| lost())?;
    }
    // Whatever is said to it, the server has dealt with those before.
    match api.ask::<Value>("INFO", &Value::Null).await {
        Ok(_) | Err(Fault::Misconfigured(_)) => {}
        Err(fault) => return Err(fault),
    }
    let mut refused = Vec::new();
    while let Ok(subject) = timeout(TOLD, refusals.next()).await {
        // Others look at the same connection.
        let subject = subject.to_string();
        if subjects.contains(&subject) && !refused.contains(&subject) {
            refused.push(subject);
        }
    }
    Ok(refused)
}
