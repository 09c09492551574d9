//! NATS JetStream: durable pull consumers and acknowledged publishes.

use std::{path::PathBuf, time::Duration};

use serde::{Deserialize, Serialize};

use crate::secret::Secret;

/// How to reach NATS.
#[derive(Debug, Clone)]
pub struct NatsOptions {
    /// One server, or several separated by commas: `nats://host:4222`, `tls://host:4222`.
    pub url: String,
    /// User credentials file (`.creds`).
    pub credentials_file: Option<PathBuf>,
    /// NKey seed.
    pub nkey: Option<Secret>,
    /// Token.
    pub token: Option<Secret>,
    /// User name, with `password`.
    pub user: Option<String>,
    /// Password.
    pub password: Option<Secret>,
    /// TLS settings; `None` where the URL decides.
    pub tls: Option<super::TlsOptions>,
    /// JetStream domain.
    pub domain: Option<String>,
    /// How long a connection attempt or a JetStream request may take. Default 5 s.
    pub timeout: Duration,
}

/// What to consume from JetStream: the `params` of a [`SourceSpec`](super::SourceSpec).
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NatsSource {
    /// The stream.
    pub stream: String,
    /// Filter; `None` takes every subject of the stream.
    #[serde(default)]
    pub subject: Option<String>,
    /// The durable consumer's name.
    pub consumer: String,
    /// Create the stream with these settings where it does not exist; `None`: it must.
    #[serde(default)]
    pub create: Option<NatsStreamCreate>,
    /// How long the server waits for an ack. Default 30 s.
    #[serde(default)]
    pub ack_wait: Option<Duration>,
    /// How many messages may be delivered and not acked. Default 20,000.
    #[serde(default)]
    pub max_ack_pending: Option<i64>,
    /// How many messages one pull asks for at most. Default 2,000.
    #[serde(default)]
    pub batch: Option<usize>,
}

/// A stream to create.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NatsStreamCreate {
    /// Its subjects.
    pub subjects: Vec<String>,
    /// `limits` (default), `interest` or `workqueue`.
    #[serde(default)]
    pub retention: Option<String>,
    /// `file` (default) or `memory`.
    #[serde(default)]
    pub storage: Option<String>,
    /// Replicas; default 1.
    #[serde(default)]
    pub replicas: Option<usize>,
}
