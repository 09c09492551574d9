//! RabbitMQ: AMQP 0-9-1 consumers with prefetch, and confirmed publishes.
//!
//! Consuming and publishing have connections of their own, since a broker short of memory or
//! disk stops reading from those that publish, acks included. Nothing is declared unless the
//! source says `create`.

mod connect;
mod consumer;
mod convert;
mod examine;
mod publisher;
mod settle;
mod topology;
mod window;

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use tokio_util::task::TaskTracker;

use self::{connect::Connector, consumer::AmqpConsumer, publisher::AmqpPublisher};
use super::{Consumer, Examination, Publisher, SourceSpec, Transport, TransportError};
use crate::{finding::Finding, secret::Secret};

/// RabbitMQ as a [`Transport`].
#[derive(Debug)]
pub struct AmqpTransport {
    connector: Arc<Connector>,
    /// The tasks that settle: each ends when its consumer and all it handed over are gone.
    settlers: TaskTracker,
}

impl AmqpTransport {
    /// RabbitMQ, reached with these options; connects when something is opened.
    ///
    /// # Errors
    /// [`TransportError::Misconfigured`] where the URL is none.
    pub fn new(options: AmqpOptions) -> Result<Self, TransportError> {
        let connector = Arc::new(Connector::new(options));
        match connector.uri() {
            // A password file may yet come.
            Ok(_) | Err(connect::Failure::Unavailable(_)) => {}
            Err(failure) => return Err(failure.into()),
        }
        Ok(Self { connector, settlers: TaskTracker::new() })
    }
}

#[async_trait]
impl Transport for AmqpTransport {
    fn kind(&self) -> &'static str {
        "amqp"
    }

    async fn consumer(&self, source: SourceSpec) -> Result<Box<dyn Consumer>, TransportError> {
        let connector = Arc::clone(&self.connector);
        let consumer = AmqpConsumer::open(connector, self.settlers.clone(), source).await?;
        Ok(Box::new(consumer))
    }

    async fn publisher(&self) -> Result<Box<dyn Publisher>, TransportError> {
        Ok(Box::new(AmqpPublisher::open(Arc::clone(&self.connector))))
    }

    async fn examine(&self, asked: Examination) -> Vec<Finding> {
        examine::examine(&self.connector, asked).await
    }
}

/// How to reach RabbitMQ.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AmqpOptions {
    /// `amqp://user:password@host:5672/vhost` or `amqps://…`, read at each connection. The
    /// scheme alone says whether there is TLS. With `?auth_mechanism=external`, or with a client
    /// certificate in `tls` and no user here, the certificate is the login (SASL EXTERNAL).
    pub url: Secret,
    /// Password, in place of the URL's.
    pub password: Option<Secret>,
    /// TLS settings for `amqps`.
    pub tls: Option<crate::tls::TlsOptions>,
    /// How long connecting, or an answer, may take. Default 10 s.
    pub timeout: Duration,
    /// Heartbeat interval. Default 10 s.
    pub heartbeat: Duration,
}

/// What to consume from RabbitMQ: the `params` of a [`SourceSpec`].
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AmqpSource {
    /// The queue.
    pub queue: String,
    /// How many messages may be delivered and not acked, 1 to 65,535. Default 1,000.
    #[serde(default)]
    pub prefetch: Option<u16>,
    /// Create the queue and its bindings where they do not exist; `None`: the queue must.
    #[serde(default)]
    pub create: Option<AmqpQueueCreate>,
}

/// A queue to create.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AmqpQueueCreate {
    /// `quorum` (default) or `classic`.
    #[serde(default, rename = "type")]
    pub kind: Option<String>,
    /// Its bindings.
    #[serde(default)]
    pub bind: Vec<AmqpBinding>,
    /// Further arguments, e.g. `x-delivery-limit = 50`.
    #[serde(default)]
    pub arguments: BTreeMap<String, serde_json::Value>,
}

/// A binding to create, and its exchange where that does not exist.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AmqpBinding {
    /// The exchange.
    pub exchange: String,
    /// The routing key; default empty.
    #[serde(default)]
    pub routing_key: String,
    /// The exchange's type where it is created: `topic` (default), `direct`, `fanout`, `headers`.
    #[serde(default)]
    pub exchange_type: Option<String>,
}
