//! NATS JetStream: durable pull consumers and acknowledged publishes.
//!
//! * `connect`: one client for each connection, shared by the consumers; publishers have theirs.
//! * `api`: the JetStream requests that are needed, as JSON.
//! * `consumer`: opening, supervision (C9), and the order of what is handed over (C3).
//! * `pull`: one subscription's pull requests, and what is on its way for them (C7).
//! * `recovery`: reading missing messages from the stream by sequence (C3).
//! * `delivery`: a JetStream message as a [`Message`](crate::event::Message), and its settlement.
//! * `publisher`: pipelined publishes, each confirmed by the stream.
//! * `examine`: what `doctor` finds out.

mod api;
mod connect;
mod consumer;
mod delivery;
mod examine;
mod publisher;
mod pull;
mod recovery;

use std::{
    fmt,
    hash::{BuildHasher, Hasher, RandomState},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use serde::{Deserialize, Serialize};

use self::{connect::Link, consumer::NatsConsumer, publisher::NatsPublisher};
use super::{Consumer, Examination, Publisher, SourceSpec, Transport, TransportError};
use crate::{finding::Finding, secret::Secret};

/// How long the server waits for an ack before it delivers again, where nothing else is asked.
const ACK_WAIT: Duration = Duration::from_secs(30);

/// How many messages may be delivered and not acked, where nothing else is asked.
const MAX_ACK_PENDING: i64 = 20_000;

/// How many messages one pull asks for at most, where nothing else is asked.
const BATCH: usize = 2_000;

/// How to reach NATS.
#[derive(Clone, PartialEq, Eq)]
pub struct NatsOptions {
    /// One server, or several separated by commas: `nats://host:4222`, `tls://host:4222`.
    /// Default `nats://127.0.0.1:4222`. `user:password@` or `token@` before the host counts
    /// where none of the members below says otherwise. Read at each connection.
    pub url: Secret,
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
    /// TLS settings, and TLS it must be; `None`: the URL decides, and the server may insist.
    pub tls: Option<crate::tls::TlsOptions>,
    /// JetStream domain.
    pub domain: Option<String>,
    /// How long a connection attempt or a JetStream request may take. Default 5 s.
    pub timeout: Duration,
}

impl fmt::Debug for NatsOptions {
    /// Leaves the URL out: it may hold a password.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NatsOptions")
            .field("user", &self.user)
            .field("credentials_file", &self.credentials_file)
            .field("tls", &self.tls)
            .field("domain", &self.domain)
            .field("timeout", &self.timeout)
            .finish_non_exhaustive()
    }
}

impl Default for NatsOptions {
    /// A server on this machine, without authentication.
    fn default() -> Self {
        Self {
            url: Secret::Inline("nats://127.0.0.1:4222".to_owned()),
            credentials_file: None,
            nkey: None,
            token: None,
            user: None,
            password: None,
            tls: None,
            domain: None,
            timeout: Duration::from_secs(5),
        }
    }
}

/// What to consume from JetStream: the `params` of a [`SourceSpec`].
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

/// JetStream, reached over one connection for all consumers and one for each publisher.
///
/// Nothing is connected before the first consumer is opened or the first message published.
#[derive(Debug)]
pub struct NatsTransport {
    options: NatsOptions,
    consuming: Arc<Link>,
}

impl NatsTransport {
    /// A transport that will connect with these options. Secrets and files are read at each
    /// connection.
    #[must_use]
    pub fn new(options: NatsOptions) -> Self {
        Self { consuming: Link::new(options.clone(), "consumer"), options }
    }
}

#[async_trait]
impl Transport for NatsTransport {
    fn kind(&self) -> &'static str {
        KIND
    }

    async fn consumer(&self, source: SourceSpec) -> Result<Box<dyn Consumer>, TransportError> {
        let params: NatsSource = serde_json::from_value(source.params.clone())
            .map_err(|error| TransportError::Misconfigured(format!("nats source: {error}")))?;
        params.check().map_err(TransportError::Misconfigured)?;
        Ok(Box::new(NatsConsumer::open(Arc::clone(&self.consuming), params, source).await?))
    }

    async fn publisher(&self) -> Result<Box<dyn Publisher>, TransportError> {
        Ok(Box::new(NatsPublisher::new(Link::new(self.options.clone(), "publisher"))))
    }

    async fn examine(&self, asked: Examination) -> Vec<Finding> {
        examine::examine(&self.options, asked).await
    }
}

const KIND: &str = "nats";

impl NatsSource {
    /// Says what cannot work whatever the server says.
    fn check(&self) -> Result<(), String> {
        for (field, name) in [("stream", &self.stream), ("consumer", &self.consumer)] {
            let bad = |c: char| c.is_whitespace() || c.is_control() || ".*>/\\".contains(c);
            if name.is_empty() || name.contains(bad) {
                return Err(format!("{field} `{name}` is no name: no spaces, `.`, `*`, `>`, `/`"));
            }
        }
        if let Some(subject) = &self.subject
            && !is_subject(subject, true)
        {
            return Err(format!("subject `{subject}` is none"));
        }
        if self.batch == Some(0) {
            return Err("batch must be at least 1".to_owned());
        }
        if self.ack_wait.is_some_and(|wait| wait < Duration::from_millis(100)) {
            return Err("ack_wait must be at least 100ms".to_owned());
        }
        if self.max_ack_pending == Some(0) {
            return Err("max_ack_pending must be at least 1, or -1 for no limit".to_owned());
        }
        Ok(())
    }
}

/// Tokens separated by points, none empty, nothing that breaks a protocol line; wildcards where
/// they are `allowed`.
fn is_subject(subject: &str, allowed: bool) -> bool {
    let mut tokens = subject.split('.').peekable();
    while let Some(token) = tokens.next() {
        let wildcard = match token {
            "" => return false,
            "*" => true,
            ">" if tokens.peek().is_none() => true,
            ">" => return false,
            token => {
                if token.contains(|c: char| c.is_whitespace() || c.is_control()) {
                    return false;
                }
                false
            }
        };
        if wildcard && !allowed {
            return false;
        }
    }
    true
}

/// Whether a subject falls under a filter.
fn matches(filter: &str, subject: &str) -> bool {
    let mut subject = subject.split('.');
    let mut filter = filter.split('.');
    loop {
        match (filter.next(), subject.next()) {
            (Some(">"), Some(_)) | (None, None) => return true,
            // Not for every one of what `>` stands for.
            (Some("*"), Some(token)) if token != ">" => {}
            (Some(wanted), Some(token)) if wanted == token => {}
            _ => return false,
        }
    }
}

/// For jitter, nothing else.
fn random() -> u64 {
    RandomState::new().build_hasher().finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_match_as_the_server_matches() {
        for (filter, subject, wanted) in [
            (">", "a", true),
            ("a.>", "a", false),
            ("a.>", "a.b.c", true),
            ("a.*", "a.b", true),
            ("a.*", "a.b.c", false),
            ("a.*.c", "a.b.c", true),
            ("a.*", "a.>", false),
            ("a.>", "a.>", true),
            ("a.b", "a.b", true),
            ("a.b", "a", false),
        ] {
            assert_eq!(matches(filter, subject), wanted, "{filter} {subject}");
        }
    }

    #[test]
    fn subjects_are_checked() {
        for good in ["a", "a.b-c.ä", "$x._y"] {
            assert!(is_subject(good, false), "{good}");
        }
        for bad in ["", ".", "a.", ".a", "a b", "a\r\nPUB", "a..b", "a.*", ">"] {
            assert!(!is_subject(bad, false), "{bad:?}");
        }
        assert!(is_subject("a.*.>", true));
        assert!(!is_subject("a.>.b", true));
    }
}
