//! The configuration as it is written: every key optional, unknown keys refused.
//!
//! `[transports.*]`, `[sources.*]` and `[handlers.*]` hold the keys of all kinds; which of them
//! fit the kind is checked where the kind is known ([`validate`](super::validate)), so the error
//! can say so. Doc comments are the descriptions in the schema.

use std::{collections::BTreeMap, path::PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::text::{Ratio, SecretText, Size, Span};
use crate::event::Format;

/// The configuration of pulsebus. Every key is optional.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "Config")]
pub(super) struct RawConfig {
    /// Where SQLite and the search indexes live. Default: `$STATE_DIRECTORY` (set by systemd),
    /// else `./pulsebus-data`.
    #[schemars(extend("default" = "./pulsebus-data"))]
    pub(super) data_dir: Option<PathBuf>,
    /// How long stopping may take: finish or release what is held, save cursors, close.
    #[schemars(extend("default" = "25s"))]
    pub(super) shutdown_timeout: Option<Span>,
    /// The event log.
    pub(super) store: Option<RawStore>,
    /// The HTTP server: API, health, metrics, ingest.
    pub(super) http: Option<RawHttp>,
    /// Bounds.
    pub(super) limits: Option<RawLimits>,
    /// The daemon's own log, on standard error.
    pub(super) log: Option<RawLog>,
    /// Where traces go. Default: nowhere.
    pub(super) telemetry: Option<RawTelemetry>,
    /// Brokers and webhooks, by a name of your own. `http` is built in: the ingest endpoint.
    pub(super) transports: Option<BTreeMap<String, RawTransport>>,
    /// What is consumed, by a name of your own. `http` is there unless switched off.
    pub(super) sources: Option<BTreeMap<String, RawSource>>,
    /// What is done with the events, by a name of your own; the cursor is kept under it.
    /// Without this section there is a handler `search` for the lessons of EduPulse.
    pub(super) handlers: Option<BTreeMap<String, RawHandler>>,
}

/// The event log.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "Store")]
pub(super) struct RawStore {
    /// `sqlite:FILE` (relative to `data_dir`), `postgres://user:password@host/database`, or
    /// `memory:` (gone at exit).
    #[schemars(extend("default" = "sqlite:events.db"))]
    pub(super) url: Option<SecretText>,
    /// A file that holds the URL. Credential: `store.url`.
    pub(super) url_file: Option<PathBuf>,
    /// Postgres: connections at most.
    #[schemars(extend("default" = 10))]
    pub(super) max_connections: Option<u32>,
    /// Postgres: TLS with the server's certificate verified (`sslmode=verify-full`), or nothing.
    pub(super) tls: Option<RawStoreTls>,
    /// How long events are kept. Without it, for ever.
    pub(super) retain: Option<RawRetain>,
}

/// How long events are kept: until they are older than `age`, or the log is larger than `size`,
/// and never before every handler has done with them.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "Retain")]
pub(super) struct RawRetain {
    /// Older events are removed.
    pub(super) age: Option<Span>,
    /// While the events in the log are larger than this together, the first are removed.
    pub(super) size: Option<Size>,
    /// Whether copies of removed events are recognised. It costs about 40 bytes an event in SQLite
    /// and 100 in Postgres.
    #[schemars(extend("default" = true))]
    pub(super) identities: Option<bool>,
}

/// TLS towards Postgres.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "StoreTls")]
pub(super) struct RawStoreTls {
    /// A private certificate authority (PEM), in addition to the system's.
    pub(super) ca_file: Option<PathBuf>,
    /// A client certificate (PEM), with `key_file`.
    pub(super) cert_file: Option<PathBuf>,
    /// Its private key (PEM).
    pub(super) key_file: Option<PathBuf>,
}

/// The HTTP server.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "Http")]
pub(super) struct RawHttp {
    /// Whether there is one. Without it there is no ingest by HTTP and no command reaches the
    /// daemon.
    #[schemars(extend("default" = true))]
    pub(super) enabled: Option<bool>,
    /// Address and port. Other than loopback needs a token.
    #[schemars(extend("default" = "127.0.0.1:8077"))]
    pub(super) listen: Option<String>,
    /// What clients present as `Authorization: Bearer …`.
    pub(super) token: Option<SecretText>,
    /// A file that holds the token. Credential: `http.token`.
    pub(super) token_file: Option<PathBuf>,
    /// Largest request body.
    #[schemars(extend("default" = "16MiB"))]
    pub(super) max_body: Option<Size>,
    /// How long a request may take to arrive and be answered; streams are exempt.
    #[schemars(extend("default" = "30s"))]
    pub(super) timeout: Option<Span>,
    /// Connections at most; further ones wait.
    #[schemars(extend("default" = 1024))]
    pub(super) max_connections: Option<usize>,
    /// HTTPS in place of HTTP. Renewed files are picked up.
    pub(super) tls: Option<RawHttpTls>,
}

/// TLS of the HTTP server.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "HttpTls")]
pub(super) struct RawHttpTls {
    /// The certificate, and those between it and its authority (PEM). Required.
    pub(super) cert_file: Option<PathBuf>,
    /// Its private key (PEM). Required.
    pub(super) key_file: Option<PathBuf>,
    /// Clients must show a certificate that this authority has signed (PEM).
    pub(super) client_ca_file: Option<PathBuf>,
}

/// Bounds.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "Limits")]
pub(super) struct RawLimits {
    /// Largest body of an event; larger ones go to quarantine.
    #[schemars(extend("default" = "1MiB"))]
    pub(super) max_event_bytes: Option<Size>,
    /// Received and not committed yet, over all sources.
    #[schemars(extend("default" = "64MiB"))]
    pub(super) ingest_bytes: Option<Size>,
    /// Recent events kept in memory for the handlers.
    #[schemars(extend("default" = "64MiB"))]
    pub(super) tail_bytes: Option<Size>,
}

/// The daemon's own log.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "Log")]
pub(super) struct RawLog {
    /// A level (`error`, `warn`, `info`, `debug`, `trace`), or directives such as
    /// `info,pulsebus::dispatch=debug`.
    #[schemars(extend("default" = "info"))]
    pub(super) filter: Option<String>,
    /// `auto` is text on a terminal, the journal's own fields where standard error is the
    /// journal's, and JSON otherwise.
    #[schemars(extend("default" = "auto"))]
    pub(super) format: Option<RawLogFormat>,
}

/// How log lines look.
#[derive(Debug, Clone, Copy, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[schemars(rename = "LogFormat")]
pub(super) enum RawLogFormat {
    Auto,
    Text,
    Json,
    Journald,
}

/// Where traces go.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "Telemetry")]
pub(super) struct RawTelemetry {
    /// An OpenTelemetry collector. Needs a binary with the cargo feature `otlp`.
    pub(super) otlp: Option<RawOtlp>,
}

/// An OpenTelemetry collector, by OTLP over HTTP in protobuf.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "Otlp")]
pub(super) struct RawOtlp {
    /// Where spans are posted to, path and all: `http://host:4318/v1/traces`. Required.
    pub(super) endpoint: Option<String>,
    /// A private certificate authority (PEM), in addition to the system's.
    pub(super) ca_file: Option<PathBuf>,
    /// Headers of each request: `name=value,…`, as in `OTEL_EXPORTER_OTLP_HEADERS`.
    pub(super) headers: Option<SecretText>,
    /// A file that holds them. Credential: `telemetry.otlp.headers`.
    pub(super) headers_file: Option<PathBuf>,
    /// The share of traces that is sampled among those that begin here, 0 to 1. An event that
    /// comes with a trace is sampled where its `traceparent` says so.
    #[schemars(extend("default" = 1.0))]
    pub(super) sample_ratio: Option<Ratio>,
    /// How long a request may take.
    #[schemars(extend("default" = "10s"))]
    pub(super) timeout: Option<Span>,
    /// Spans that may wait to be exported; further ones are dropped.
    #[schemars(extend("default" = 8192))]
    pub(super) queue: Option<usize>,
    /// The resource's `service.name`.
    #[schemars(extend("default" = "pulsebus"))]
    pub(super) service_name: Option<String>,
    /// Further attributes of the resource, by name.
    pub(super) resource: Option<BTreeMap<String, String>>,
}

/// A broker or webhook.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "Transport")]
pub(super) struct RawTransport {
    /// What it is: `nats` (JetStream), `amqp` (RabbitMQ), `http` (a webhook, for forwarding
    /// only) or `memory` (within the process, for trying things out). Required.
    pub(super) kind: Option<RawTransportKind>,
    /// Where it is: `nats://host:4222` or `tls://…` (several with commas), `amqp://user:password@
    /// host:5672/vhost` or `amqps://…`, `https://host/path`. Required, except for `memory`.
    pub(super) url: Option<SecretText>,
    /// A file that holds the URL. Credential: `transports.NAME.url`.
    pub(super) url_file: Option<PathBuf>,
    /// nats: user name.
    pub(super) user: Option<String>,
    /// nats, amqp: password, in place of one in the URL.
    pub(super) password: Option<SecretText>,
    /// A file that holds the password. Credential: `transports.NAME.password`.
    pub(super) password_file: Option<PathBuf>,
    /// nats: token; http: what is presented as `Authorization: Bearer`.
    pub(super) token: Option<SecretText>,
    /// A file that holds the token. Credential: `transports.NAME.token`.
    pub(super) token_file: Option<PathBuf>,
    /// nats: the seed of an NKey, `SU…`.
    pub(super) nkey: Option<SecretText>,
    /// A file that holds the seed. Credential: `transports.NAME.nkey`.
    pub(super) nkey_file: Option<PathBuf>,
    /// nats: user credentials (`.creds`). Credential: `transports.NAME.credentials`.
    pub(super) credentials_file: Option<PathBuf>,
    /// nats: JetStream domain.
    pub(super) domain: Option<String>,
    /// TLS; the URL's scheme switches it on.
    pub(super) tls: Option<RawTls>,
    /// How long connecting, a request or an answer may take. Default: nats `5s`, amqp `10s`,
    /// http `10s`.
    #[schemars(extend("default" = "10s"))]
    pub(super) timeout: Option<Span>,
    /// amqp: heartbeat interval.
    #[schemars(extend("default" = "10s"))]
    pub(super) heartbeat: Option<Span>,
    /// http: signs the requests (Standard Webhooks): `whsec_` and the base64 of 24 to 64 random
    /// bytes. While it is being changed, several with blanks or line breaks between them: each
    /// signs.
    pub(super) secret: Option<SecretText>,
    /// A file that holds the signing secret. Credential: `transports.NAME.secret`.
    pub(super) secret_file: Option<PathBuf>,
    /// http: how many events a request holds at most, up to 1,000. With 1 each is a request of
    /// its own; with more, a request is a JSON array of them, also where it holds only one.
    #[schemars(extend("default" = 1))]
    pub(super) batch: Option<usize>,
    /// http: nothing but public addresses is connected to: no loopback, private or link-local
    /// ones, whatever the host's name is resolved to. Proxies of the environment are not used.
    #[schemars(extend("default" = false))]
    pub(super) refuse_private: Option<bool>,
}

/// The kinds of transport.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[schemars(rename = "TransportKind")]
pub(super) enum RawTransportKind {
    Nats,
    Amqp,
    Http,
    Memory,
}

/// TLS towards a broker or webhook.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "Tls")]
pub(super) struct RawTls {
    /// A private certificate authority (PEM), in addition to the system's.
    pub(super) ca_file: Option<PathBuf>,
    /// A client certificate (PEM), with `key_file`.
    pub(super) cert_file: Option<PathBuf>,
    /// Its private key (PEM).
    pub(super) key_file: Option<PathBuf>,
    /// nats: TLS handshake before the server speaks, as its `handshake_first` wants.
    #[schemars(extend("default" = false))]
    pub(super) first: Option<bool>,
}

/// Something to consume.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "Source")]
pub(super) struct RawSource {
    /// `false` switches it off; it is still checked.
    #[schemars(extend("default" = true))]
    pub(super) enabled: Option<bool>,
    /// A name of `[transports]`, or `http`. Required.
    pub(super) transport: Option<String>,
    /// nats: the stream. Required. It must exist, unless `create` is given.
    pub(super) stream: Option<String>,
    /// nats: a filter; default: every subject of the stream.
    pub(super) subject: Option<String>,
    /// nats: name of the durable consumer.
    #[schemars(extend("default" = "pulsebus"))]
    pub(super) consumer: Option<String>,
    /// nats: how long the server waits for an ack before it delivers again.
    #[schemars(extend("default" = "30s"))]
    pub(super) ack_wait: Option<Span>,
    /// nats: how many messages may be delivered and not acked.
    #[schemars(extend("default" = 20_000))]
    pub(super) max_ack_pending: Option<i64>,
    /// nats: how many messages one pull asks for at most.
    #[schemars(extend("default" = 2_000))]
    pub(super) batch: Option<usize>,
    /// amqp: the queue. Required. It must exist, unless `create` is given.
    pub(super) queue: Option<String>,
    /// amqp: how many messages may be delivered and not acked, 1 to 65,535.
    #[schemars(extend("default" = 1_000))]
    pub(super) prefetch: Option<u16>,
    /// Creates the stream or the queue where it does not exist; what exists is never changed.
    pub(super) create: Option<RawCreate>,
    /// Several daemons consume it at the same time, so order cannot be kept.
    #[schemars(extend("default" = false))]
    pub(super) competing: Option<bool>,
    /// Pins the format; default: each message's own is recognised.
    pub(super) format: Option<Format>,
    /// The CloudEvents `source` of events that do not say theirs.
    #[schemars(extend("default" = "/"))]
    pub(super) event_source: Option<String>,
    /// Where the ordering key is, first that resolves: a JSON pointer into the data,
    /// `header:NAME`, `token:N` of the subject or routing key, `subject`. Default: the event's
    /// own `partitionkey`, `key` or `subject`, else no order.
    #[schemars(extend("default" = []))]
    pub(super) key: Option<Vec<String>>,
    /// Where the type of raw events is, as for `key`.
    #[schemars(extend("default" = ["subject"]))]
    pub(super) type_from: Option<Vec<String>>,
    /// Messages without an id of their own go to quarantine, in place of getting a random one
    /// that cannot tell copies.
    #[schemars(extend("default" = false))]
    pub(super) require_id: Option<bool>,
}

/// A stream or queue to create.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "Create")]
pub(super) struct RawCreate {
    /// nats: the stream's subjects. Required.
    pub(super) subjects: Option<Vec<String>>,
    /// nats: when the server may delete messages.
    #[schemars(extend("default" = "limits"))]
    pub(super) retention: Option<RawRetention>,
    /// nats: where the stream is kept.
    #[schemars(extend("default" = "file"))]
    pub(super) storage: Option<RawStorage>,
    /// nats: copies in the cluster.
    #[schemars(extend("default" = 1))]
    pub(super) replicas: Option<usize>,
    /// amqp: the queue's type.
    #[serde(rename = "type")]
    #[schemars(extend("default" = "quorum"))]
    pub(super) kind: Option<RawQueueType>,
    /// amqp: the queue's bindings.
    #[schemars(extend("default" = []))]
    pub(super) bind: Option<Vec<RawBinding>>,
    /// amqp: further arguments of the queue, such as `x-delivery-limit`.
    #[schemars(extend("default" = {}))]
    pub(super) arguments: Option<BTreeMap<String, serde_json::Value>>,
}

/// When a stream's messages go.
#[derive(Debug, Clone, Copy, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[schemars(rename = "Retention")]
pub(super) enum RawRetention {
    Limits,
    Interest,
    Workqueue,
}

/// Where a stream is kept.
#[derive(Debug, Clone, Copy, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[schemars(rename = "Storage")]
pub(super) enum RawStorage {
    File,
    Memory,
}

/// Types of queue.
#[derive(Debug, Clone, Copy, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[schemars(rename = "QueueType")]
pub(super) enum RawQueueType {
    Quorum,
    Classic,
}

/// A binding.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "Binding")]
pub(super) struct RawBinding {
    /// The exchange; it is created where it does not exist. Required.
    pub(super) exchange: Option<String>,
    /// The routing key, or pattern.
    #[schemars(extend("default" = ""))]
    pub(super) routing_key: Option<String>,
    /// The exchange's type, where it is created.
    #[schemars(extend("default" = "topic"))]
    pub(super) exchange_type: Option<RawExchangeType>,
}

/// Types of exchange.
#[derive(Debug, Clone, Copy, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[schemars(rename = "ExchangeType")]
pub(super) enum RawExchangeType {
    Topic,
    Direct,
    Fanout,
    Headers,
}

/// Something to do with events.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "Handler")]
pub(super) struct RawHandler {
    /// What it does: `search`, `forward` or `log`. Required.
    pub(super) kind: Option<RawHandlerKind>,
    /// `false` switches it off; it is still checked, and its cursor is kept.
    #[schemars(extend("default" = true))]
    pub(super) enabled: Option<bool>,
    /// Globs over event types. Default: every event; search: the types it has documents for.
    #[schemars(extend("default" = ["*"]))]
    pub(super) events: Option<Vec<String>>,
    /// Where it starts when it has no cursor yet: `beginning` of the log, or `now`.
    #[schemars(extend("default" = "beginning"))]
    pub(super) start: Option<RawStart>,
    /// Events worked on at the same time, each of another key.
    #[schemars(extend("default" = 4))]
    pub(super) workers: Option<usize>,
    /// What must stay in order: the events of one `key`, or `none`.
    #[schemars(extend("default" = "key"))]
    pub(super) ordering: Option<RawOrdering>,
    /// How long one attempt may take.
    #[schemars(extend("default" = "30s"))]
    pub(super) timeout: Option<Span>,
    /// When a failed event is tried again.
    pub(super) retry: Option<RawRetry>,
    /// Behind a dead letter its key's followers `park` until a person decides, or `continue`.
    /// Default: `park`; with `ordering = "none"`: `continue`.
    #[schemars(extend("default" = "park"))]
    pub(super) on_dead: Option<RawOnDead>,
    /// Where dead letters are also published, with headers that say why.
    pub(super) dead_letter: Option<RawDeadLetter>,
    /// How far it reads ahead of its cursor.
    pub(super) window: Option<RawWindow>,
    /// How many events may wait because of failed ones; at the bound it reads no further.
    pub(super) parked: Option<RawParked>,
    /// When its cursor is saved, whichever comes first.
    pub(super) checkpoint: Option<RawCheckpoint>,

    /// search: what a document of each event type is made of. Required.
    pub(super) documents: Option<BTreeMap<String, RawDocument>>,
    /// search: the index's folder. Default: `search/NAME` in `data_dir`. forward to http: the path
    /// behind the webhook's URL, a template. Default: the URL as it is.
    #[schemars(extend("default" = "search/NAME"))]
    pub(super) path: Option<PathBuf>,
    /// search: new documents can be found this soon.
    #[schemars(extend("default" = "1s"))]
    pub(super) commit_interval: Option<Span>,
    /// search: memory of the index writer, at least 15 MB.
    #[schemars(extend("default" = "64MiB"))]
    pub(super) writer_memory: Option<Size>,
    /// search: the language whose endings are cut off, as in `english`. Default: words as they
    /// are.
    pub(super) language: Option<RawLanguage>,

    /// forward: a name of `[transports]`. Required.
    pub(super) transport: Option<String>,
    /// forward to nats: the subject, a template of `{type}`, `{key}`, `{source}`, `{subject}`,
    /// `{id}`, `{handler}` and JSON pointers into the data such as `{/author_id}`. An event
    /// without such a value is a dead letter. Required there.
    pub(super) subject: Option<String>,
    /// forward to amqp: the exchange, a template; `""` is the default exchange. Required there.
    pub(super) exchange: Option<String>,
    /// forward to amqp: the routing key, a template.
    #[schemars(extend("default" = "{type}"))]
    pub(super) routing_key: Option<String>,
    /// forward: further headers by name, templates as well; each takes the place of one the event
    /// has. For amqp also properties, as `":priority"`.
    #[schemars(extend("default" = {}))]
    pub(super) headers: Option<BTreeMap<String, String>>,
    /// forward: what the message looks like: `verbatim`, body and headers as they were published,
    /// `cloudevents-structured`, `cloudevents-binary` or `native`.
    #[schemars(extend("default" = "verbatim"))]
    pub(super) format: Option<RawForwardFormat>,

    /// log: the level events are written at.
    #[schemars(extend("default" = "info"))]
    pub(super) level: Option<RawLogLevel>,
}

/// The kinds of handler.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[schemars(rename = "HandlerKind")]
pub(super) enum RawHandlerKind {
    Search,
    Forward,
    Log,
}

/// Where a new handler starts.
#[derive(Debug, Clone, Copy, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[schemars(rename = "Start")]
pub(super) enum RawStart {
    Beginning,
    Now,
}

/// What must stay in order.
#[derive(Debug, Clone, Copy, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[schemars(rename = "Ordering")]
pub(super) enum RawOrdering {
    Key,
    None,
}

/// What happens behind a dead letter.
#[derive(Debug, Clone, Copy, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[schemars(rename = "OnDead")]
pub(super) enum RawOnDead {
    Park,
    Continue,
}

/// When a failed event is tried again: after `initial`, then `multiplier` times later each time.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "Retry")]
pub(super) struct RawRetry {
    /// Attempts in all, the first included.
    #[schemars(extend("default" = 8))]
    pub(super) attempts: Option<u32>,
    /// The wait before the second attempt.
    #[schemars(extend("default" = "200ms"))]
    pub(super) initial: Option<Span>,
    /// The longest wait.
    #[schemars(extend("default" = "5m"))]
    pub(super) max: Option<Span>,
    /// How much longer each wait is than the one before, at least 1.
    #[schemars(extend("default" = 2.0))]
    pub(super) multiplier: Option<Ratio>,
    /// Each wait is longer or shorter by up to this share of it, 0 to 1.
    #[schemars(extend("default" = 0.2))]
    pub(super) jitter: Option<Ratio>,
}

/// Where dead letters are also published.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "DeadLetter")]
pub(super) struct RawDeadLetter {
    /// A name of `[transports]`. Required.
    pub(super) transport: Option<String>,
    /// nats: the subject, a template.
    pub(super) subject: Option<String>,
    /// amqp: the exchange, a template.
    pub(super) exchange: Option<String>,
    /// amqp: the routing key, a template.
    pub(super) routing_key: Option<String>,
    /// http: the path behind the webhook's URL, a template.
    pub(super) path: Option<String>,
}

/// How far a handler reads ahead.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "Window")]
pub(super) struct RawWindow {
    /// Events at most.
    #[schemars(extend("default" = 8_192))]
    pub(super) events: Option<usize>,
    /// Bytes of body at most.
    #[schemars(extend("default" = "32MiB"))]
    pub(super) bytes: Option<Size>,
}

/// How many events may wait because of failed ones.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "Parked")]
pub(super) struct RawParked {
    /// Behind a failed event of their key, at most.
    #[schemars(extend("default" = 10_000))]
    pub(super) per_key: Option<usize>,
    /// For another attempt or behind a failed event, over all keys, at most.
    #[schemars(extend("default" = 100_000))]
    pub(super) total: Option<usize>,
}

/// When a cursor is saved.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "Checkpoint")]
pub(super) struct RawCheckpoint {
    /// This long after the last time.
    #[schemars(extend("default" = "1s"))]
    pub(super) interval: Option<Span>,
    /// After this many finished events.
    #[schemars(extend("default" = 50_000))]
    pub(super) events: Option<usize>,
}

/// A document of the index. Values are JSON pointers into the event's data.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "Document")]
pub(super) struct RawDocument {
    /// Where the document's id is; a later event with the same id replaces it. Required.
    pub(super) id: Option<String>,
    /// Event types that take the document out, by the same `id`.
    #[schemars(extend("default" = []))]
    pub(super) delete: Option<Vec<String>>,
    /// Full-text fields.
    #[schemars(extend("default" = {}))]
    pub(super) text: Option<BTreeMap<String, String>>,
    /// Fields matched as a whole.
    #[schemars(extend("default" = {}))]
    pub(super) keyword: Option<BTreeMap<String, String>>,
    /// Dates: RFC 3339 text, or milliseconds since 1970.
    #[schemars(extend("default" = {}))]
    pub(super) date: Option<BTreeMap<String, String>>,
    /// Numbers.
    #[schemars(extend("default" = {}))]
    pub(super) number: Option<BTreeMap<String, String>>,
}

/// Languages the index knows the endings of.
#[derive(Debug, Clone, Copy, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[schemars(rename = "Language")]
pub(super) enum RawLanguage {
    Arabic,
    Danish,
    Dutch,
    English,
    Finnish,
    French,
    German,
    Greek,
    Hungarian,
    Italian,
    Norwegian,
    Portuguese,
    Romanian,
    Russian,
    Spanish,
    Swedish,
    Tamil,
    Turkish,
}

/// What a forwarded message looks like.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
#[schemars(rename = "ForwardFormat")]
pub(super) enum RawForwardFormat {
    Verbatim,
    CloudeventsStructured,
    CloudeventsBinary,
    Native,
}

/// Severity.
#[derive(Debug, Clone, Copy, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[schemars(rename = "LogLevel")]
pub(super) enum RawLogLevel {
    Error,
    Warn,
    Info,
    Debug,
    Trace,
}
