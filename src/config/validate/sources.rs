//! `[sources.*]`.

use std::{
    collections::{BTreeMap, HashMap},
    str::FromStr as _,
    sync::Arc,
};

use serde_json::Value;

use super::{Check, word};
use crate::{
    config::{
        raw::{RawConfig, RawCreate, RawSource},
        settings::{HttpSettings, INGEST, Limits, SourceSettings, TransportSettings},
    },
    event::{DecoderOptions, Expr},
    transport::{
        amqp::{AmqpBinding, AmqpQueueCreate, AmqpSource},
        nats::{NatsSource, NatsStreamCreate},
    },
};

const ANY: &[&str] = &[
    "enabled",
    "transport",
    "competing",
    "format",
    "event_source",
    "key",
    "type_from",
    "require_id",
];
const NATS: &[&str] =
    &["stream", "subject", "consumer", "ack_wait", "max_ack_pending", "batch", "create"];
const AMQP: &[&str] = &["queue", "prefetch", "create"];
const NATS_CREATE: &[&str] = &["subjects", "retention", "storage", "replicas"];
const AMQP_CREATE: &[&str] = &["type", "bind", "arguments"];

impl Check<'_> {
    pub(super) fn sources(
        &mut self,
        raw: &RawConfig,
        transports: &BTreeMap<Arc<str>, TransportSettings>,
        http: &HttpSettings,
        limits: Limits,
    ) -> BTreeMap<Arc<str>, SourceSettings> {
        let mut sources = BTreeMap::new();
        for (name, raw) in raw.sources.iter().flatten() {
            self.name(&["sources", name], name);
            // Checked even when it is switched off, so that switching it on holds no surprise.
            let Some(source) = self.source(name, raw, transports, limits) else { continue };
            let ingest = &*source.transport == INGEST;
            if ingest && name != INGEST {
                self.wrong(
                    &["sources", name, "transport"],
                    "there is one HTTP endpoint, and its source is called `http`; configure \
                     [sources.http]",
                );
            }
            if raw.enabled.unwrap_or(true) && (!ingest || http.enabled) {
                sources.insert(Arc::from(name.as_str()), source);
            }
        }
        let mentioned = raw.sources.as_ref().is_some_and(|sources| sources.contains_key(INGEST))
            || self.tree.get(&["sources", INGEST]).is_some();
        if http.enabled && !mentioned {
            let decoder = self.decoder(INGEST, &RawSource::default(), limits);
            sources.insert(
                Arc::from(INGEST),
                SourceSettings {
                    transport: Arc::from(INGEST),
                    params: Value::Null,
                    competing: false,
                    decoder,
                },
            );
        }
        self.shared(&sources);
        sources
    }

    fn source(
        &mut self,
        name: &str,
        raw: &RawSource,
        transports: &BTreeMap<Arc<str>, TransportSettings>,
        limits: Limits,
    ) -> Option<SourceSettings> {
        let table = ["sources", name];
        let path = ["sources", name, "transport"];
        let decoder = self.decoder(name, raw, limits);
        let transport = match &raw.transport {
            Some(transport) => transport.as_str(),
            // `[sources.http]` can only mean one thing.
            None if name == INGEST => INGEST,
            None => {
                self.missing(&path, "name one of [transports], or `http`");
                return None;
            }
        };
        let params = if transport == INGEST {
            self.only(&table, &[ANY], "for the HTTP endpoint");
            Value::Null
        } else {
            match transports.get(transport) {
                Some(TransportSettings::Nats(_)) => {
                    self.only(&table, &[ANY, NATS], "for NATS");
                    self.nats_source(name, raw)
                }
                Some(TransportSettings::Amqp(_)) => {
                    self.only(&table, &[ANY, AMQP], "for RabbitMQ");
                    self.amqp_source(name, raw)
                }
                Some(TransportSettings::Http(_)) => {
                    self.wrong(
                        &path,
                        format!(
                            "`{transport}` is a webhook, which can only be sent to; events come in \
                             through `http`, nats or amqp"
                        ),
                    );
                    return None;
                }
                Some(TransportSettings::Memory) => {
                    self.only(&table, &[ANY], "within the process");
                    Value::Null
                }
                None => {
                    self.known(&path, transport, transports, Some(INGEST));
                    return None;
                }
            }
        };
        Some(SourceSettings {
            transport: Arc::from(transport),
            params,
            competing: raw.competing.unwrap_or(false),
            decoder,
        })
    }

    fn decoder(&mut self, name: &str, raw: &RawSource, limits: Limits) -> DecoderOptions {
        DecoderOptions {
            format: raw.format,
            event_source: raw.event_source.as_deref().map(Arc::from),
            key: self.exprs(name, "key", raw.key.as_deref()),
            type_from: self.exprs(name, "type_from", raw.type_from.as_deref()),
            require_id: raw.require_id.unwrap_or(false),
            max_event_bytes: limits.max_event_bytes,
        }
    }

    fn exprs(&mut self, name: &str, key: &str, texts: Option<&[String]>) -> Vec<Expr> {
        let mut exprs = Vec::new();
        for (i, text) in texts.into_iter().flatten().enumerate() {
            match Expr::from_str(text) {
                Ok(expr) => exprs.push(expr),
                Err(error) => {
                    self.wrong(&["sources", name, key, &i.to_string()], error.to_string());
                }
            }
        }
        exprs
    }

    fn nats_source(&mut self, name: &str, raw: &RawSource) -> Value {
        let key = |key| ["sources", name, key];
        let stream = raw.stream.clone().unwrap_or_default();
        if raw.stream.is_none() {
            self.missing(&key("stream"), "name the JetStream stream");
        } else {
            self.jetstream_name(&key("stream"), &stream);
        }
        let consumer = raw.consumer.clone().unwrap_or_else(|| "pulsebus".to_owned());
        self.jetstream_name(&key("consumer"), &consumer);
        if let Some(subject) = &raw.subject {
            self.subject(&key("subject"), subject);
        }
        let ack_wait = raw.ack_wait.map(|span| span.0);
        if ack_wait.is_some_and(|wait| wait < std::time::Duration::from_secs(1)) {
            self.wrong(&key("ack_wait"), "must be 1s or longer: acks take a round trip");
        }
        if raw.max_ack_pending.is_some() {
            self.number(&key("max_ack_pending"), raw.max_ack_pending, 0, 1..=10_000_000);
        }
        if raw.batch.is_some() {
            self.number(&key("batch"), raw.batch, 0, 1..=50_000);
        }
        if let (Some(batch), Some(pending)) = (raw.batch, raw.max_ack_pending)
            && i64::try_from(batch).is_ok_and(|batch| batch > pending)
        {
            self.wrong(
                &key("batch"),
                "larger than max_ack_pending, so a batch could never be full; lower it",
            );
        }
        let create = raw.create.as_ref().map(|create| self.stream_create(name, create));
        let source = NatsSource {
            stream,
            subject: raw.subject.clone(),
            consumer,
            create,
            ack_wait,
            max_ack_pending: raw.max_ack_pending,
            batch: raw.batch,
        };
        self.params(name, &source)
    }

    fn stream_create(&mut self, name: &str, raw: &RawCreate) -> NatsStreamCreate {
        let table = ["sources", name, "create"];
        self.only(&table, &[NATS_CREATE], "for NATS");
        let subjects = raw.subjects.clone().unwrap_or_default();
        if subjects.is_empty() {
            self.missing(
                &["sources", name, "create", "subjects"],
                "list the stream's subjects, as in [\"edupulse.>\"]",
            );
        }
        for (i, subject) in subjects.iter().enumerate() {
            self.subject(&["sources", name, "create", "subjects", &i.to_string()], subject);
        }
        if raw.replicas.is_some() {
            self.number(&["sources", name, "create", "replicas"], raw.replicas, 1, 1..=5);
        }
        NatsStreamCreate {
            subjects,
            retention: raw.retention.and_then(word),
            storage: raw.storage.and_then(word),
            replicas: raw.replicas,
        }
    }

    fn amqp_source(&mut self, name: &str, raw: &RawSource) -> Value {
        let queue = raw.queue.clone().unwrap_or_default();
        if queue.is_empty() {
            self.missing(&["sources", name, "queue"], "name the RabbitMQ queue");
        }
        self.short_string(&["sources", name, "queue"], &queue);
        if raw.prefetch == Some(0) {
            self.wrong(
                &["sources", name, "prefetch"],
                "must be from 1 to 65535: zero would be without bound",
            );
        }
        let create = raw.create.as_ref().map(|create| self.queue_create(name, create));
        let source = AmqpSource { queue, prefetch: raw.prefetch, create };
        self.params(name, &source)
    }

    fn queue_create(&mut self, name: &str, raw: &RawCreate) -> AmqpQueueCreate {
        self.only(&["sources", name, "create"], &[AMQP_CREATE], "for RabbitMQ");
        let mut bind = Vec::new();
        for (i, binding) in raw.bind.iter().flatten().enumerate() {
            let i = i.to_string();
            let key = |key| ["sources", name, "create", "bind", &i, key];
            let exchange = binding.exchange.clone().unwrap_or_default();
            if exchange.is_empty() {
                self.missing(&key("exchange"), "name the exchange to bind the queue to");
            }
            let routing_key = binding.routing_key.clone().unwrap_or_default();
            self.short_string(&key("exchange"), &exchange);
            self.short_string(&key("routing_key"), &routing_key);
            let exchange_type = binding.exchange_type.and_then(word);
            bind.push(AmqpBinding { exchange, routing_key, exchange_type });
        }
        AmqpQueueCreate {
            kind: raw.kind.and_then(word),
            bind,
            arguments: raw.arguments.clone().unwrap_or_default(),
        }
    }

    fn params<T: serde::Serialize>(&mut self, name: &str, source: &T) -> Value {
        serde_json::to_value(source).unwrap_or_else(|error| {
            self.wrong(&["sources", name], error.to_string());
            Value::Null
        })
    }

    /// Names of streams and consumers are part of subjects.
    fn jetstream_name(&mut self, path: &[&str], name: &str) {
        let bad = |c: char| c.is_whitespace() || c.is_control() || ".*>/\\".contains(c);
        if name.is_empty() || name.len() > 255 || name.contains(bad) {
            self.wrong(path, "not a JetStream name: no spaces and none of . * > / \\");
        }
    }

    /// A subject, with wildcards.
    fn subject(&mut self, path: &[&str], subject: &str) {
        let tokens: Vec<_> = subject.split('.').collect();
        let fits = tokens.iter().enumerate().all(|(i, token)| {
            !token.is_empty()
                && !token.contains(char::is_whitespace)
                && (*token == "*" || !token.contains('*'))
                && (!token.contains('>') || (*token == ">" && i + 1 == tokens.len()))
        });
        if !fits {
            self.wrong(
                path,
                "not a subject: tokens with dots between them, `*` for one token, `>` for the rest \
                 at the end",
            );
        }
    }

    fn short_string(&mut self, path: &[&str], text: &str) {
        if text.len() > 255 {
            self.wrong(path, "longer than the 255 bytes that AMQP allows");
        }
    }

    /// Two sources on one consumer or queue would take messages from each other, which breaks
    /// the order of both.
    fn shared(&mut self, sources: &BTreeMap<Arc<str>, SourceSettings>) {
        let mut seen: HashMap<String, &str> = HashMap::new();
        for (name, source) in sources.iter().filter(|(_, source)| !source.competing) {
            let text = |key: &str| source.params.get(key).and_then(Value::as_str);
            let (what, key) = match (text("stream"), text("consumer"), text("queue")) {
                (Some(stream), Some(consumer), _) => {
                    (format!("consumer `{consumer}` of stream `{stream}`"), "consumer")
                }
                (_, _, Some(queue)) => (format!("queue `{queue}`"), "queue"),
                _ => continue,
            };
            let what = format!("{what} on transport `{}`", source.transport);
            if let Some(other) = seen.insert(what.clone(), name) {
                self.wrong(
                    &["sources", name, key],
                    format!(
                        "{what} is taken by sources.{other}, and they would take messages from \
                         each other; give this source a {key} of its own"
                    ),
                );
            }
        }
    }
}
