//! Checked settings: plain values that the bus is composed from.

use std::{
    collections::BTreeMap,
    fmt,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use crate::{
    dispatch::{OnDead, Ordering, Start},
    event::DecoderOptions,
    handler::{forward::ForwardFormat, search::SearchOptions},
    secret::Secret,
    telemetry::{LogSettings, OtlpSettings},
    tls::{ServerTlsOptions, TlsOptions},
    transport::{amqp::AmqpOptions, http::WebhookOptions, nats::NatsOptions},
};

/// The name of the built-in transport that takes events over HTTP. It is always there, needs no
/// `[transports.http]`, and serves one source.
pub const INGEST: &str = "http";

/// Where the HTTP server listens unless told otherwise.
pub const DEFAULT_LISTEN: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 8077);

/// Everything the daemon was told, checked. No secret shows in its `Debug` form.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Where SQLite and the search indexes live.
    pub data_dir: PathBuf,
    /// The event log.
    pub store: StoreSettings,
    /// How long events are kept; `None`: for ever.
    pub retain: Option<RetainSettings>,
    /// The HTTP server.
    pub http: HttpSettings,
    /// Bounds.
    pub limits: Limits,
    /// How long a drain may take. Default 25 s.
    pub shutdown_timeout: Duration,
    /// The daemon's own log.
    pub log: LogSettings,
    /// Where spans go. Default: nowhere.
    pub otlp: Option<OtlpSettings>,
    /// Brokers and webhooks by name; [`INGEST`] is not among them.
    pub transports: BTreeMap<Arc<str>, TransportSettings>,
    /// What is consumed, by name. Each one's transport is in `transports`, or is [`INGEST`].
    pub sources: BTreeMap<Arc<str>, SourceSettings>,
    /// What is done with the events, by name.
    pub handlers: BTreeMap<Arc<str>, HandlerSettings>,
}

/// Where the log is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StoreSettings {
    /// A SQLite file.
    Sqlite {
        /// The file. Default `events.db` in the data directory.
        path: PathBuf,
    },
    /// A Postgres database.
    Postgres {
        /// `postgres://user:password@host/database`.
        url: Secret,
        /// Connections at most. Default 10.
        max_connections: u32,
        /// Verified TLS, or no connection; `None`: as the URL's `sslmode` says.
        tls: Option<TlsOptions>,
    },
    /// In memory: gone at exit.
    Memory,
}

/// How long events are kept: at least one of `age` and `bytes` is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RetainSettings {
    /// Older ones go.
    pub age: Option<Duration>,
    /// While the log is larger, in bytes, its first ones go.
    pub bytes: Option<u64>,
    /// Whether copies of what is gone are recognised. Default true.
    pub identities: bool,
}

/// The HTTP server: API, health, metrics, ingest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HttpSettings {
    /// Whether there is one. Default true.
    pub enabled: bool,
    /// Address and port. Default [`DEFAULT_LISTEN`]; others than loopback have a `token`.
    pub listen: SocketAddr,
    /// What clients must present as `Authorization: Bearer`; `None`: nothing.
    pub token: Option<Secret>,
    /// Certificate and key for HTTPS; `None`: plain HTTP.
    pub tls: Option<ServerTlsOptions>,
    /// Largest request body, in bytes. Default 16 MiB.
    pub max_body: usize,
    /// How long a request may take to arrive and be answered, streams apart. Default 30 s.
    pub timeout: Duration,
    /// Connections at most; more wait to be accepted. Default 1,024.
    pub max_connections: usize,
}

/// Bounds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Largest body of an event, in bytes. Default 1 MiB.
    pub max_event_bytes: usize,
    /// Received and not committed yet, in bytes of body over all sources. Default 64 MiB.
    pub ingest_bytes: usize,
    /// Recent events kept in memory for the handlers, in bytes of body. Default 64 MiB.
    pub tail_bytes: usize,
}

/// One `[transports.NAME]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TransportSettings {
    /// NATS JetStream.
    Nats(NatsOptions),
    /// RabbitMQ.
    Amqp(AmqpOptions),
    /// A webhook: publishing only.
    Http(WebhookOptions),
    /// Within this process.
    Memory,
}

impl TransportSettings {
    /// `nats`, `amqp`, `http` or `memory`.
    #[must_use]
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::Nats(_) => "nats",
            Self::Amqp(_) => "amqp",
            Self::Http(_) => "http",
            Self::Memory => "memory",
        }
    }
}

/// One `[sources.NAME]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceSettings {
    /// The transport's name; [`INGEST`] for the HTTP endpoint.
    pub transport: Arc<str>,
    /// What the transport understands: a [`NatsSource`](crate::transport::nats::NatsSource) or
    /// an [`AmqpSource`](crate::transport::amqp::AmqpSource) as JSON; `null` for the others.
    pub params: serde_json::Value,
    /// Several daemons consume it at the same time. Default false.
    pub competing: bool,
    /// How its messages are read.
    pub decoder: DecoderOptions,
}

/// One `[handlers.NAME]`.
#[derive(Debug, Clone, PartialEq)]
pub struct HandlerSettings {
    /// What it does.
    pub kind: HandlerKind,
    /// Globs over event types; an event that matches none is passed by. Empty: every event.
    pub events: Vec<String>,
    /// Where it starts when it has no cursor yet. Default: the first event in the log.
    pub start: Start,
    /// Tasks at most. Default 4.
    pub workers: usize,
    /// What must stay in order. Default: the events of one key.
    pub ordering: Ordering,
    /// How long one attempt may take. Default 30 s.
    pub timeout: Duration,
    /// When a failed event is tried again.
    pub retry: RetrySettings,
    /// What happens behind a dead letter.
    pub on_dead: OnDead,
    /// Where dead letters are also published.
    pub dead_letter: Option<DeadLetterSettings>,
    /// How far it reads ahead.
    pub window: WindowSettings,
    /// How many events may wait because of failed ones.
    pub parked: ParkedSettings,
    /// When its cursor is saved.
    pub checkpoint: CheckpointSettings,
}

/// What a handler does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HandlerKind {
    /// Indexes events.
    Search(SearchOptions),
    /// Publishes events to a transport.
    Forward(ForwardSettings),
    /// Writes events to the daemon's log.
    Log {
        /// At which level. Default `info`.
        level: LogLevel,
    },
}

impl HandlerKind {
    /// `search`, `forward` or `log`.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Search(_) => "search",
            Self::Forward(_) => "forward",
            Self::Log { .. } => "log",
        }
    }
}

/// Where the dead letters of a handler are also published.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeadLetterSettings {
    /// A name among [`Settings::transports`].
    pub transport: Arc<str>,
    /// A template: the NATS subject, the AMQP routing key, the path behind a webhook's URL.
    pub address: String,
    /// AMQP: a template for the exchange; empty names the default exchange. `None` otherwise.
    pub exchange: Option<String>,
}

/// Where a `forward` handler publishes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ForwardSettings {
    /// A name among [`Settings::transports`].
    pub transport: Arc<str>,
    /// A template: the NATS subject, the AMQP routing key, the path behind a webhook's URL.
    pub address: String,
    /// AMQP: a template for the exchange; empty names the default exchange. `None` otherwise.
    pub exchange: Option<String>,
    /// Further headers, by name: templates.
    pub headers: BTreeMap<String, String>,
    /// What the message looks like.
    pub format: ForwardFormat,
}

/// When a failed event is tried again: after `initial`, then `multiplier` times longer each
/// time, at most `max`, each plus or minus `jitter` of itself.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RetrySettings {
    /// Attempts in all, the first included; at least 1. Default 8.
    pub attempts: u32,
    /// Before the second attempt. Default 200 ms.
    pub initial: Duration,
    /// At most. Default 5 min.
    pub max: Duration,
    /// At least 1. Default 2.
    pub multiplier: f64,
    /// From 0 to 1. Default 0.2.
    pub jitter: f64,
}

impl Default for RetrySettings {
    fn default() -> Self {
        Self {
            attempts: 8,
            initial: Duration::from_millis(200),
            max: Duration::from_secs(300),
            multiplier: 2.0,
            jitter: 0.2,
        }
    }
}

/// How far a handler reads ahead of its cursor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WindowSettings {
    /// Events at most. Default 8,192.
    pub events: usize,
    /// Bytes of body at most. Default 32 MiB.
    pub bytes: usize,
}

impl Default for WindowSettings {
    fn default() -> Self {
        Self { events: 8_192, bytes: 32 << 20 }
    }
}

/// How many events may wait because of failed ones; at the bound a handler reads no further.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ParkedSettings {
    /// Behind a failed event of their key, at most. Default 10,000.
    pub per_key: usize,
    /// For another attempt or behind a failed event, over all keys, at most. Default 100,000.
    pub total: usize,
}

impl Default for ParkedSettings {
    fn default() -> Self {
        Self { per_key: 10_000, total: 100_000 }
    }
}

/// When a handler's cursor is saved, whichever comes first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CheckpointSettings {
    /// This long after the last time. Default 1 s.
    pub interval: Duration,
    /// After this many finished events. Default 50,000.
    pub events: usize,
}

impl Default for CheckpointSettings {
    fn default() -> Self {
        Self { interval: Duration::from_secs(1), events: 50_000 }
    }
}

/// Severity of a log line.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum LogLevel {
    /// Something failed.
    Error,
    /// Something is odd.
    Warn,
    /// Something happened.
    #[default]
    Info,
    /// For whoever looks closer.
    Debug,
    /// Everything.
    Trace,
}

impl LogLevel {
    /// The name in the configuration.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warn => "warn",
            Self::Info => "info",
            Self::Debug => "debug",
            Self::Trace => "trace",
        }
    }
}

impl fmt::Display for LogLevel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
