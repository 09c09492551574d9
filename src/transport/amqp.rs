//! RabbitMQ: AMQP 0-9-1 consumers with prefetch, and confirmed publishes.

use std::{collections::BTreeMap, time::Duration};

use serde::{Deserialize, Serialize};

use crate::secret::Secret;

/// How to reach RabbitMQ.
#[derive(Debug, Clone)]
pub struct AmqpOptions {
    /// `amqp://user:password@host:5672/vhost` or `amqps://…`.
    pub url: Secret,
    /// Password, in place of the URL's.
    pub password: Option<Secret>,
    /// TLS settings for `amqps`.
    pub tls: Option<super::TlsOptions>,
    /// How long connecting, or an answer, may take. Default 10 s.
    pub timeout: Duration,
    /// Heartbeat interval. Default 10 s.
    pub heartbeat: Duration,
}

/// What to consume from RabbitMQ: the `params` of a [`SourceSpec`](super::SourceSpec).
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
