//! `[handlers.*]`.

use std::{
    collections::{BTreeMap, HashMap},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use super::{Check, server::index_path, word};
use crate::{
    config::{
        raw::{
            RawDeadLetter, RawDocument, RawForwardFormat, RawHandler, RawHandlerKind, RawLogLevel,
            RawOnDead, RawOrdering, RawRetry, RawStart,
        },
        settings::{
            CheckpointSettings, DeadLetterSettings, ForwardSettings, HandlerKind, HandlerSettings,
            INGEST, LogLevel, ParkedSettings, RetrySettings, TransportSettings, WindowSettings,
        },
        text::Span,
    },
    dispatch::{OnDead, Ordering, Start},
    handler::{
        forward::{ForwardFormat, ForwardOptions},
        search::{DocumentMapping, SearchOptions},
        template::{Place, Template},
    },
    transport::http::WebhookOptions,
};

const ANY: &[&str] = &[
    "kind",
    "enabled",
    "events",
    "start",
    "workers",
    "ordering",
    "timeout",
    "retry",
    "on_dead",
    "dead_letter",
    "window",
    "parked",
    "checkpoint",
];
const SEARCH: &[&str] = &["documents", "path", "commit_interval", "writer_memory", "language"];
const FORWARD: &[&str] =
    &["transport", "subject", "exchange", "routing_key", "path", "headers", "format"];
const LOG: &[&str] = &["level"];

impl Check<'_> {
    pub(super) fn handlers(
        &mut self,
        raw: Option<&BTreeMap<String, RawHandler>>,
        transports: &BTreeMap<Arc<str>, TransportSettings>,
        data_dir: &Path,
    ) -> BTreeMap<Arc<str>, HandlerSettings> {
        let Some(raw) = raw else {
            if self.tree.get(&["handlers"]).is_some() {
                return BTreeMap::new();
            }
            let search = default_search();
            return self
                .handler("search", &search, transports, data_dir)
                .map(|handler| (Arc::from("search"), handler))
                .into_iter()
                .collect();
        };
        let mut handlers = BTreeMap::new();
        let mut folders: HashMap<PathBuf, &str> = HashMap::new();
        for (name, raw) in raw {
            self.name(&["handlers", name], name);
            // Checked even when it is switched off, so that switching it on holds no surprise.
            let Some(handler) = self.handler(name, raw, transports, data_dir) else { continue };
            if !raw.enabled.unwrap_or(true) {
                continue;
            }
            if let HandlerKind::Search(options) = &handler.kind
                && let Some(other) = folders.insert(options.path.clone(), name)
            {
                self.wrong(
                    &["handlers", name, "path"],
                    format!("handlers.{other} keeps its index there; choose another folder"),
                );
            }
            handlers.insert(Arc::from(name.as_str()), handler);
        }
        handlers
    }

    fn handler(
        &mut self,
        name: &str,
        raw: &RawHandler,
        transports: &BTreeMap<Arc<str>, TransportSettings>,
        data_dir: &Path,
    ) -> Option<HandlerSettings> {
        let table = ["handlers", name];
        let key = |key| ["handlers", name, key];
        let mut events = raw.events.clone().unwrap_or_default();
        if raw.events.as_ref().is_some_and(Vec::is_empty) {
            self.wrong(&key("events"), "is empty, so nothing would match; take it out for all");
        }
        for (i, glob) in events.iter().enumerate() {
            if let Err(error) = globset::Glob::new(glob) {
                self.wrong(&["handlers", name, "events", &i.to_string()], error.to_string());
            }
        }
        let ordering = match raw.ordering {
            None | Some(RawOrdering::Key) => Ordering::Key,
            Some(RawOrdering::None) => Ordering::None,
        };
        let dead_letter = raw
            .dead_letter
            .as_ref()
            .and_then(|dead_letter| self.dead_letter(name, dead_letter, transports));
        let timeout = self.span(&key("timeout"), raw.timeout, Duration::from_secs(30));
        let retry = self.retry(name, raw.retry.as_ref());
        let window = self.window(name, raw);
        let parked = self.parked(name, raw);
        let checkpoint = self.checkpoint(name, raw);
        let workers = self.number(&key("workers"), raw.workers, 4, 1..=1_024);
        let Some(kind) = raw.kind else {
            self.missing(&key("kind"), "set it to `search`, `forward` or `log`");
            return None;
        };
        let kind = match kind {
            RawHandlerKind::Search => {
                self.only(&table, &[ANY, SEARCH], "for a search handler");
                let options = self.search(name, raw, data_dir);
                self.search_events(name, &mut events, &options.documents);
                HandlerKind::Search(options)
            }
            RawHandlerKind::Forward => {
                self.only(&table, &[ANY, FORWARD], "for a forward handler");
                HandlerKind::Forward(self.forward(name, raw, timeout, transports)?)
            }
            RawHandlerKind::Log => {
                self.only(&table, &[ANY, LOG], "for a log handler");
                HandlerKind::Log {
                    level: match raw.level {
                        Some(RawLogLevel::Error) => LogLevel::Error,
                        Some(RawLogLevel::Warn) => LogLevel::Warn,
                        None | Some(RawLogLevel::Info) => LogLevel::Info,
                        Some(RawLogLevel::Debug) => LogLevel::Debug,
                        Some(RawLogLevel::Trace) => LogLevel::Trace,
                    },
                }
            }
        };
        Some(HandlerSettings {
            kind,
            events,
            start: match raw.start {
                None | Some(RawStart::Beginning) => Start::Beginning,
                Some(RawStart::Now) => Start::Now,
            },
            workers,
            ordering,
            timeout,
            retry,
            on_dead: match (raw.on_dead, ordering) {
                (Some(RawOnDead::Park), _) | (None, Ordering::Key) => OnDead::Park,
                (Some(RawOnDead::Continue), _) | (None, Ordering::None) => OnDead::Continue,
            },
            dead_letter,
            window,
            parked,
            checkpoint,
        })
    }

    fn retry(&mut self, name: &str, raw: Option<&RawRetry>) -> RetrySettings {
        let default = RetrySettings::default();
        let Some(raw) = raw else { return default };
        let key = |key| ["handlers", name, "retry", key];
        let ratio = |ratio: Option<crate::config::text::Ratio>| ratio.map(|ratio| ratio.0);
        let retry = RetrySettings {
            attempts: self.number(&key("attempts"), raw.attempts, default.attempts, 1..=10_000),
            initial: self.span(&key("initial"), raw.initial, default.initial),
            max: self.span(&key("max"), raw.max, default.max),
            multiplier: self.number(
                &key("multiplier"),
                ratio(raw.multiplier),
                default.multiplier,
                1.0..=100.0,
            ),
            jitter: self.number(&key("jitter"), ratio(raw.jitter), default.jitter, 0.0..=1.0),
        };
        if retry.max < retry.initial {
            self.wrong(&key("max"), "shorter than `initial`; make it at least as long");
        }
        retry
    }

    fn window(&mut self, name: &str, raw: &RawHandler) -> WindowSettings {
        let default = WindowSettings::default();
        let Some(raw) = &raw.window else { return default };
        let key = |key| ["handlers", name, "window", key];
        WindowSettings {
            events: self.number(&key("events"), raw.events, default.events, 1..=1_000_000),
            bytes: self.size(&key("bytes"), raw.bytes, default.bytes, 1 << 20..=64 << 30),
        }
    }

    fn parked(&mut self, name: &str, raw: &RawHandler) -> ParkedSettings {
        let default = ParkedSettings::default();
        let Some(raw) = &raw.parked else { return default };
        let key = |key| ["handlers", name, "parked", key];
        ParkedSettings {
            per_key: self.number(&key("per_key"), raw.per_key, default.per_key, 1..=10_000_000),
            total: self.number(&key("total"), raw.total, default.total, 1..=10_000_000),
        }
    }

    fn checkpoint(&mut self, name: &str, raw: &RawHandler) -> CheckpointSettings {
        let default = CheckpointSettings::default();
        let Some(raw) = &raw.checkpoint else { return default };
        let key = |key| ["handlers", name, "checkpoint", key];
        CheckpointSettings {
            interval: self.span(&key("interval"), raw.interval, default.interval),
            events: self.number(&key("events"), raw.events, default.events, 1..=1_000_000),
        }
    }

    fn search(&mut self, name: &str, raw: &RawHandler, data_dir: &Path) -> SearchOptions {
        let key = |key| ["handlers", name, key];
        let mut documents = BTreeMap::new();
        for (kind, raw) in raw.documents.iter().flatten() {
            documents.insert(kind.clone(), self.document(name, kind, raw));
        }
        if documents.is_empty() {
            self.missing(
                &key("documents"),
                &format!(
                    "say what to index, as in [handlers.{name}.documents.LessonPublished] with \
                     id = \"/lesson_id\" and text = {{ title = \"/title\" }}"
                ),
            );
        }
        SearchOptions {
            path: index_path(data_dir, name, raw.path.as_ref()),
            documents,
            commit_interval: self.span(
                &key("commit_interval"),
                raw.commit_interval,
                Duration::from_secs(1),
            ),
            // 15 MB is Tantivy's own least; 4 GiB is its most.
            writer_memory: self.size(
                &key("writer_memory"),
                raw.writer_memory,
                64 << 20,
                15 << 20..=4_000 << 20,
            ),
            language: raw.language.and_then(word),
        }
    }

    fn document(&mut self, name: &str, kind: &str, raw: &RawDocument) -> DocumentMapping {
        let table = ["handlers", name, "documents", kind];
        let id = raw.id.clone().unwrap_or_default();
        if raw.id.is_none() {
            self.missing(
                &["handlers", name, "documents", kind, "id"],
                "say where the document's id is, as in \"/lesson_id\"",
            );
        } else {
            self.pointer(&["handlers", name, "documents", kind, "id"], &id);
        }
        let groups = [
            ("text", &raw.text),
            ("keyword", &raw.keyword),
            ("date", &raw.date),
            ("number", &raw.number),
        ];
        let mut seen: HashMap<&str, &str> = HashMap::new();
        for (group, fields) in groups {
            for (field, pointer) in fields.iter().flatten() {
                let path = ["handlers", name, "documents", kind, group, field];
                self.name(&path, field);
                self.pointer(&path, pointer);
                if let Some(other) = seen.insert(field, group) {
                    self.wrong(&path, format!("is a field of `{other}` already; rename one"));
                }
            }
        }
        if seen.is_empty() {
            self.wrong(&table, "has no fields, so nothing could be found; add `text` or `keyword`");
        }
        let fields = |fields: &Option<BTreeMap<String, String>>| fields.clone().unwrap_or_default();
        DocumentMapping {
            id,
            delete: raw.delete.clone().unwrap_or_default(),
            text: fields(&raw.text),
            keyword: fields(&raw.keyword),
            date: fields(&raw.date),
            number: fields(&raw.number),
        }
    }

    /// A search handler sees the types it has documents for; a document that its own filter
    /// keeps out would never be made.
    fn search_events(
        &mut self,
        name: &str,
        events: &mut Vec<String>,
        documents: &BTreeMap<String, DocumentMapping>,
    ) {
        let types = documents
            .iter()
            .flat_map(|(kind, document)| std::iter::once(kind).chain(&document.delete));
        if events.is_empty() {
            *events = types.map(|kind| globset::escape(kind)).collect();
            events.sort();
            events.dedup();
            return;
        }
        let globs: Vec<_> = events
            .iter()
            .filter_map(|glob| globset::Glob::new(glob).ok())
            .map(|glob| glob.compile_matcher())
            .collect();
        for kind in types {
            if !globs.iter().any(|glob| glob.is_match(kind)) {
                self.wrong(
                    &["handlers", name, "events"],
                    format!(
                        "keeps out `{kind}`, which `documents` is about; add it, or take `events` \
                         out"
                    ),
                );
            }
        }
    }

    fn pointer(&mut self, path: &[&str], pointer: &str) {
        if !pointer.starts_with('/') {
            self.wrong(path, "not a JSON pointer: it starts with `/`, as in \"/lesson_id\"");
        }
    }

    fn forward(
        &mut self,
        name: &str,
        raw: &RawHandler,
        timeout: Duration,
        transports: &BTreeMap<Arc<str>, TransportSettings>,
    ) -> Option<ForwardSettings> {
        let table = ["handlers", name];
        let key = |key| ["handlers", name, key];
        let Some(transport) = raw.transport.as_deref() else {
            self.missing(&key("transport"), "name one of [transports] to publish to");
            return None;
        };
        let to = To {
            subject: raw.subject.as_deref(),
            exchange: raw.exchange.as_deref(),
            routing_key: raw.routing_key.as_deref(),
            path: raw.path.as_deref().and_then(Path::to_str),
        };
        let beside = [ANY, &["transport", "headers", "format"]].concat();
        let (address, exchange) = self.destination(&table, transport, to, &beside, transports)?;
        let headers = raw.headers.clone().unwrap_or_default();
        if let Some(settings) = transports.get(transport) {
            for (header, value) in &headers {
                let one = ForwardOptions {
                    headers: vec![(header.clone(), value.clone())],
                    ..ForwardOptions::new(settings.kind(), "x")
                };
                if let Err(error) = one.validate() {
                    self.wrong(&["handlers", name, "headers", header], error.to_string());
                }
            }
        }
        if let Some(TransportSettings::Http(webhook)) = transports.get(transport) {
            self.webhook_fits(name, webhook, raw, timeout);
        }
        Some(ForwardSettings {
            transport: Arc::from(transport),
            address,
            exchange,
            headers,
            format: match raw.format {
                None | Some(RawForwardFormat::Verbatim) => ForwardFormat::Verbatim,
                Some(RawForwardFormat::CloudeventsStructured) => {
                    ForwardFormat::CloudeventsStructured
                }
                Some(RawForwardFormat::CloudeventsBinary) => ForwardFormat::CloudeventsBinary,
                Some(RawForwardFormat::Native) => ForwardFormat::Native,
            },
        })
    }

    fn dead_letter(
        &mut self,
        name: &str,
        raw: &RawDeadLetter,
        transports: &BTreeMap<Arc<str>, TransportSettings>,
    ) -> Option<DeadLetterSettings> {
        let table = ["handlers", name, "dead_letter"];
        let Some(transport) = raw.transport.as_deref() else {
            let path = ["handlers", name, "dead_letter", "transport"];
            self.missing(&path, "name one of [transports] to publish dead letters to");
            return None;
        };
        let to = To {
            subject: raw.subject.as_deref(),
            exchange: raw.exchange.as_deref(),
            routing_key: raw.routing_key.as_deref(),
            path: raw.path.as_deref(),
        };
        let (address, exchange) =
            self.destination(&table, transport, to, &["transport"], transports)?;
        if let Some(TransportSettings::Http(webhook)) = transports.get(transport)
            && webhook.batch > 1
        {
            self.wrong(
                &["handlers", name, "dead_letter", "transport"],
                format!(
                    "`{transport}` puts several events into one request, where the headers that \
                     say why they are dead have no place; name a transport whose batch is 1"
                ),
            );
        }
        Some(DeadLetterSettings { transport: Arc::from(transport), address, exchange })
    }

    /// Where something is published: the address, and the exchange where there is one. `beside`
    /// are the keys of the table that say something else.
    fn destination(
        &mut self,
        table: &[&str],
        transport: &str,
        to: To<'_>,
        beside: &[&str],
        transports: &BTreeMap<Arc<str>, TransportSettings>,
    ) -> Option<(String, Option<String>)> {
        let key = |key| [table, &[key]].concat();
        match transports.get(transport) {
            Some(TransportSettings::Nats(_)) => {
                self.only(table, &[beside, &["subject"]], "when forwarding to NATS");
                let place = Place::NatsSubject;
                Some((self.subject_template(&key("subject"), to.subject, place), None))
            }
            Some(TransportSettings::Memory) => {
                self.only(table, &[beside, &["subject"]], "when forwarding within the process");
                let place = Place::Plain;
                Some((self.subject_template(&key("subject"), to.subject, place), None))
            }
            Some(TransportSettings::Amqp(_)) => {
                let known: &[&str] = &["exchange", "routing_key"];
                self.only(table, &[beside, known], "when forwarding to RabbitMQ");
                if to.exchange.is_none() {
                    self.missing(
                        &key("exchange"),
                        "name the exchange; \"\" is the default exchange, whose routing keys are \
                         queue names",
                    );
                }
                let exchange = to.exchange.unwrap_or_default().to_owned();
                let routing_key = to.routing_key.unwrap_or("{type}").to_owned();
                self.template(&key("exchange"), &exchange, Place::Amqp);
                self.template(&key("routing_key"), &routing_key, Place::Amqp);
                Some((routing_key, Some(exchange)))
            }
            Some(TransportSettings::Http(_)) => {
                self.only(table, &[beside, &["path"]], "when forwarding to a webhook");
                let path = to.path.unwrap_or_default().to_owned();
                self.template(&key("path"), &path, Place::UrlPath);
                Some((path, None))
            }
            None if transport == INGEST => {
                self.wrong(
                    &key("transport"),
                    "`http` is where events come in; forward to one of [transports]",
                );
                None
            }
            None => {
                self.known(&key("transport"), transport, transports, None);
                None
            }
        }
    }

    fn subject_template(&mut self, path: &[&str], given: Option<&str>, place: Place) -> String {
        match given {
            None | Some("") => {
                self.missing(path, "name the subject, as in \"mirror.{type}\"");
                String::new()
            }
            Some(subject) => {
                self.template(path, subject, place);
                subject.to_owned()
            }
        }
    }

    /// What has to fit between a forward handler and its webhook.
    fn webhook_fits(
        &mut self,
        name: &str,
        webhook: &WebhookOptions,
        raw: &RawHandler,
        timeout: Duration,
    ) {
        if timeout <= webhook.timeout {
            self.wrong(
                &["handlers", name, "timeout"],
                format!(
                    "not longer than the {} a request to its transport may take, so a receiver \
                     that hangs would cost its events their attempts; make it longer, or the \
                     transport's `timeout` shorter",
                    crate::config::text::span(webhook.timeout)
                ),
            );
        }
        let carries_itself = match raw.format.unwrap_or(RawForwardFormat::Verbatim) {
            RawForwardFormat::CloudeventsStructured | RawForwardFormat::Native => true,
            RawForwardFormat::Verbatim | RawForwardFormat::CloudeventsBinary => false,
        };
        if webhook.batch > 1 && !carries_itself {
            self.wrong(
                &["handlers", name, "format"],
                "its transport puts several events into one request (`batch`), where headers \
                 have no place, so the ids and types of events that have them there would be \
                 lost; set \"cloudevents-structured\" or \"native\", or the transport's batch to 1",
            );
        }
        if webhook.batch > 1 && raw.headers.as_ref().is_some_and(|headers| !headers.is_empty()) {
            self.wrong(
                &["handlers", name, "headers"],
                "its transport puts several events into one request (`batch`), which has one set \
                 of headers; take them out, or set the transport's batch to 1",
            );
        }
    }

    fn template(&mut self, path: &[&str], template: &str, place: Place) {
        if let Err(error) = Template::parse(template).and_then(|parsed| parsed.check(place)) {
            self.wrong(path, error.to_string());
        }
    }
}

/// What an address is made of.
#[derive(Clone, Copy)]
struct To<'a> {
    subject: Option<&'a str>,
    exchange: Option<&'a str>,
    routing_key: Option<&'a str>,
    path: Option<&'a str>,
}

/// What runs when no handler is configured: EduPulse's lessons. Its quizzes are not in it:
/// their data holds no id of its own, and one made of `quiz_id` or `student_id` would let a
/// submission replace another.
fn default_search() -> RawHandler {
    let field =
        |name: &str, pointer: &str| Some(BTreeMap::from([(name.to_owned(), pointer.to_owned())]));
    let lesson = RawDocument {
        id: Some("/lesson_id".to_owned()),
        delete: None,
        text: field("title", "/title"),
        keyword: field("author_id", "/author_id"),
        date: field("published_at", "/published_at"),
        number: None,
    };
    RawHandler {
        kind: Some(RawHandlerKind::Search),
        documents: Some(BTreeMap::from([("LessonPublished".to_owned(), lesson)])),
        commit_interval: None::<Span>,
        ..RawHandler::default()
    }
}
