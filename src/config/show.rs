//! The effective configuration, as TOML.

use std::{collections::BTreeMap, fmt::Write as _, path::Path, time::Duration};

use toml::Value;
use url::Url;

use super::{
    settings::{
        HandlerKind, HandlerSettings, INGEST, Settings, SourceSettings, StoreSettings,
        TransportSettings,
    },
    text,
    tree::{Tree, bare, key_text},
};
use crate::{
    dispatch::{OnDead, Ordering, Start},
    event::Expr,
    secret::Secret,
    telemetry::LogFormat,
    tls::TlsOptions,
    transport::{amqp::AmqpSource, nats::NatsSource},
};

/// What stands in place of a secret.
const REDACTED: &str = "…";

pub(super) fn show(settings: &Settings, tree: &Tree) -> String {
    let mut page = Page { tree, settings, data_dir: &settings.data_dir, text: String::new() };
    page.line(&[], "data_dir", path(&settings.data_dir));
    page.line(&[], "shutdown_timeout", span(settings.shutdown_timeout));

    page.table(&["store"]);
    match &settings.store {
        StoreSettings::Sqlite { path } => {
            page.line(&["store"], "url", format!("sqlite:{}", page.in_data_dir(path)));
        }
        StoreSettings::Postgres { url, max_connections, tls } => {
            page.url(&["store"], url);
            page.line(&["store"], "max_connections", i64::from(*max_connections));
            page.tls(&["store", "tls"], tls.as_ref(), false);
        }
        StoreSettings::Memory => page.line(&["store"], "url", "memory:"),
    }
    if let Some(retain) = &settings.retain {
        let table = ["store", "retain"];
        page.table(&table);
        page.some(&table, "age", retain.age.map(span));
        page.some(&table, "size", retain.bytes.map(text::size));
        page.line(&table, "identities", retain.identities);
    }

    let http = &settings.http;
    page.table(&["http"]);
    page.line(&["http"], "enabled", http.enabled);
    page.line(&["http"], "listen", http.listen.to_string());
    page.secret(&["http"], "token", http.token.as_ref());
    page.line(&["http"], "max_body", size(http.max_body));
    page.line(&["http"], "timeout", span(http.timeout));
    page.line(&["http"], "max_connections", count(http.max_connections));

    if let Some(tls) = &http.tls {
        let table = ["http", "tls"];
        page.table(&table);
        page.line(&table, "cert_file", path(&tls.cert_file));
        page.line(&table, "key_file", path(&tls.key_file));
        page.some(&table, "client_ca_file", tls.client_ca_file.as_deref().map(path));
    }

    page.table(&["limits"]);
    page.line(&["limits"], "max_event_bytes", size(settings.limits.max_event_bytes));
    page.line(&["limits"], "ingest_bytes", size(settings.limits.ingest_bytes));
    page.line(&["limits"], "tail_bytes", size(settings.limits.tail_bytes));

    page.table(&["log"]);
    page.line(&["log"], "filter", settings.log.filter.as_str());
    let format = match settings.log.format {
        LogFormat::Auto => "auto",
        LogFormat::Text => "text",
        LogFormat::Json => "json",
        LogFormat::Journald => "journald",
    };
    page.line(&["log"], "format", format);

    if let Some(otlp) = &settings.otlp {
        let table = ["telemetry", "otlp"];
        page.table(&table);
        page.line(&table, "endpoint", otlp.endpoint.as_str());
        page.some(&table, "ca_file", otlp.ca_file.as_deref().map(path));
        page.secret(&table, "headers", otlp.headers.as_ref());
        page.line(&table, "sample_ratio", otlp.sample_ratio);
        page.line(&table, "timeout", span(otlp.timeout));
        page.line(&table, "queue", count(otlp.queue));
        page.line(&table, "service_name", otlp.service_name.as_str());
        if !otlp.resource.is_empty() {
            let resource: toml::Table = otlp
                .resource
                .iter()
                .map(|(key, value)| (key.clone(), Value::from(value.as_str())))
                .collect();
            page.line(&table, "resource", resource);
        }
    }

    for (name, transport) in &settings.transports {
        page.transport(name, transport);
    }
    for (name, source) in &settings.sources {
        page.source(name, source);
    }
    // Without this line, reading the page again would bring the default handler back.
    if settings.handlers.is_empty() {
        page.table(&["handlers"]);
    }
    for (name, handler) in &settings.handlers {
        page.handler(name, handler);
    }
    page.text
}

struct Page<'a> {
    tree: &'a Tree,
    settings: &'a Settings,
    data_dir: &'a Path,
    text: String,
}

impl Page<'_> {
    fn table(&mut self, path: &[&str]) {
        // Writing to a string does not fail.
        let _ = writeln!(self.text, "\n[{}]", key_text(path));
    }

    fn line(&mut self, table: &[&str], key: &str, value: impl Into<Value>) {
        let path: Vec<_> = table.iter().copied().chain([key]).collect();
        let origin = match self.tree.get(&path) {
            Some(_) => self.tree.origin(&path),
            None => None,
        };
        self.line_from(key, value, origin.as_deref().unwrap_or("default"));
    }

    fn line_from(&mut self, key: &str, value: impl Into<Value>, origin: &str) {
        let _ = writeln!(self.text, "{} = {} # {origin}", bare(key), value.into());
    }

    /// A path as it is written: relative to the data directory.
    fn in_data_dir(&self, file: &Path) -> String {
        path(file.strip_prefix(self.data_dir).unwrap_or(file))
    }

    fn some(&mut self, table: &[&str], key: &str, value: Option<impl Into<Value>>) {
        if let Some(value) = value {
            self.line(table, key, value);
        }
    }

    fn secret(&mut self, table: &[&str], key: &str, secret: Option<&Secret>) {
        match secret {
            None => {}
            Some(Secret::Inline(_)) => self.line(table, key, REDACTED),
            Some(Secret::File(file)) => self.secret_file(table, key, file),
        }
    }

    fn secret_file(&mut self, table: &[&str], key: &str, file: &Path) {
        let key = format!("{key}_file");
        let path: Vec<_> = table.iter().copied().chain([key.as_str()]).collect();
        let origin = self.tree.get(&path).and_then(|_| self.tree.origin(&path));
        self.line_from(
            &key,
            file.display().to_string(),
            origin.as_deref().unwrap_or("$CREDENTIALS_DIRECTORY"),
        );
    }

    fn url(&mut self, table: &[&str], url: &Secret) {
        match url {
            Secret::Inline(url) => self.line(table, "url", redact(url)),
            Secret::File(file) => self.secret_file(table, "url", file),
        }
    }

    fn tls(&mut self, table: &[&str], tls: Option<&TlsOptions>, nats: bool) {
        let Some(tls) = tls else { return };
        self.table(table);
        self.some(table, "ca_file", tls.ca_file.as_deref().map(path));
        self.some(table, "cert_file", tls.cert_file.as_deref().map(path));
        self.some(table, "key_file", tls.key_file.as_deref().map(path));
        if nats {
            self.line(table, "first", tls.first);
        }
    }

    fn transport(&mut self, name: &str, transport: &TransportSettings) {
        let table = ["transports", name];
        self.table(&table);
        self.line(&table, "kind", transport.kind());
        match transport {
            TransportSettings::Nats(nats) => {
                match &nats.url {
                    Secret::Inline(urls) => self.line(&table, "url", redact_servers(urls)),
                    Secret::File(file) => self.secret_file(&table, "url", file),
                }
                self.some(&table, "user", nats.user.as_deref());
                self.secret(&table, "password", nats.password.as_ref());
                self.secret(&table, "token", nats.token.as_ref());
                self.secret(&table, "nkey", nats.nkey.as_ref());
                if let Some(file) = &nats.credentials_file {
                    self.secret_file(&table, "credentials", file);
                }
                self.some(&table, "domain", nats.domain.as_deref());
                self.line(&table, "timeout", span(nats.timeout));
                self.tls(&["transports", name, "tls"], nats.tls.as_ref(), true);
            }
            TransportSettings::Amqp(amqp) => {
                self.url(&table, &amqp.url);
                self.secret(&table, "password", amqp.password.as_ref());
                self.line(&table, "timeout", span(amqp.timeout));
                self.line(&table, "heartbeat", span(amqp.heartbeat));
                self.tls(&["transports", name, "tls"], amqp.tls.as_ref(), false);
            }
            TransportSettings::Http(webhook) => {
                self.url(&table, &webhook.url);
                self.secret(&table, "secret", webhook.secret.as_ref());
                self.secret(&table, "token", webhook.token.as_ref());
                self.line(&table, "timeout", span(webhook.timeout));
                self.line(&table, "batch", count(webhook.batch));
                self.line(&table, "refuse_private", webhook.refuse_private);
                self.tls(&["transports", name, "tls"], webhook.tls.as_ref(), false);
            }
            TransportSettings::Memory => {}
        }
    }

    fn source(&mut self, name: &str, source: &SourceSettings) {
        let table = ["sources", name];
        self.table(&table);
        self.line(&table, "transport", &*source.transport);
        if &*source.transport != INGEST {
            self.line(&table, "competing", source.competing);
        }
        let decoder = &source.decoder;
        self.some(&table, "format", decoder.format.map(|format| format.as_str()));
        self.some(&table, "event_source", decoder.event_source.as_deref());
        self.line(&table, "key", exprs(&decoder.key));
        if !decoder.type_from.is_empty() {
            self.line(&table, "type_from", exprs(&decoder.type_from));
        }
        self.line(&table, "require_id", decoder.require_id);
        if let Ok(nats) = serde_json::from_value::<NatsSource>(source.params.clone()) {
            self.line(&table, "stream", nats.stream);
            self.some(&table, "subject", nats.subject);
            self.line(&table, "consumer", nats.consumer);
            self.some(&table, "ack_wait", nats.ack_wait.map(span));
            self.some(&table, "max_ack_pending", nats.max_ack_pending);
            self.some(&table, "batch", nats.batch.map(count));
            if let Some(create) = nats.create {
                let table = ["sources", name, "create"];
                self.table(&table);
                self.line(&table, "subjects", create.subjects);
                self.some(&table, "retention", create.retention);
                self.some(&table, "storage", create.storage);
                self.some(&table, "replicas", create.replicas.map(count));
            }
        } else if let Ok(amqp) = serde_json::from_value::<AmqpSource>(source.params.clone()) {
            self.line(&table, "queue", amqp.queue);
            self.some(&table, "prefetch", amqp.prefetch.map(i64::from));
            if let Some(create) = amqp.create {
                let table = ["sources", name, "create"];
                self.table(&table);
                self.some(&table, "type", create.kind);
                let bind: Vec<Value> = create
                    .bind
                    .into_iter()
                    .map(|bind| {
                        let mut entry = toml::Table::new();
                        entry.insert("exchange".to_owned(), bind.exchange.into());
                        entry.insert("routing_key".to_owned(), bind.routing_key.into());
                        if let Some(kind) = bind.exchange_type {
                            entry.insert("exchange_type".to_owned(), kind.into());
                        }
                        Value::Table(entry)
                    })
                    .collect();
                self.line(&table, "bind", bind);
                if let Ok(arguments) = Value::try_from(create.arguments) {
                    self.line(&table, "arguments", arguments);
                }
            }
        }
    }

    /// Where something is published: transport, address, exchange.
    fn destination(&mut self, table: &[&str], to: (&str, &str, Option<&str>)) {
        let (transport, address, exchange) = to;
        match (exchange, self.settings.transports.get(transport)) {
            (Some(exchange), _) => {
                self.line(table, "exchange", exchange);
                self.line(table, "routing_key", address);
            }
            (None, Some(TransportSettings::Http(_))) => {
                let path = Some(address).filter(|path| !path.is_empty());
                self.some(table, "path", path);
            }
            (None, _) => self.line(table, "subject", address),
        }
    }

    fn handler(&mut self, name: &str, handler: &HandlerSettings) {
        let table = ["handlers", name];
        self.table(&table);
        self.line(&table, "kind", handler.kind.name());
        if !handler.events.is_empty() {
            self.line(&table, "events", handler.events.clone());
        }
        let start = match handler.start {
            Start::Beginning => "beginning",
            Start::Now => "now",
        };
        self.line(&table, "start", start);
        self.line(&table, "workers", count(handler.workers));
        let ordering = match handler.ordering {
            Ordering::Key => "key",
            Ordering::None => "none",
        };
        self.line(&table, "ordering", ordering);
        self.line(&table, "timeout", span(handler.timeout));
        let on_dead = match handler.on_dead {
            OnDead::Park => "park",
            OnDead::Continue => "continue",
        };
        self.line(&table, "on_dead", on_dead);
        match &handler.kind {
            HandlerKind::Search(search) => {
                self.line(&table, "path", self.in_data_dir(&search.path));
                self.line(&table, "commit_interval", span(search.commit_interval));
                self.line(&table, "writer_memory", size(search.writer_memory));
                self.some(&table, "language", search.language.as_deref());
            }
            HandlerKind::Forward(forward) => {
                self.line(&table, "transport", &*forward.transport);
                let to = (&*forward.transport, &*forward.address, forward.exchange.as_deref());
                self.destination(&table, to);
                if !forward.headers.is_empty() {
                    let headers = forward.headers.iter();
                    let headers: toml::Table = headers
                        .map(|(name, value)| (name.clone(), Value::from(value.as_str())))
                        .collect();
                    self.line(&table, "headers", Value::Table(headers));
                }
                self.line(&table, "format", forward.format.as_str());
            }
            HandlerKind::Log { level } => self.line(&table, "level", level.as_str()),
        }
        if let Some(to) = &handler.dead_letter {
            let table = ["handlers", name, "dead_letter"];
            self.table(&table);
            self.line(&table, "transport", &*to.transport);
            self.destination(&table, (&*to.transport, &*to.address, to.exchange.as_deref()));
        }
        let retry = ["handlers", name, "retry"];
        self.table(&retry);
        self.line(&retry, "attempts", i64::from(handler.retry.attempts));
        self.line(&retry, "initial", span(handler.retry.initial));
        self.line(&retry, "max", span(handler.retry.max));
        self.line(&retry, "multiplier", handler.retry.multiplier);
        self.line(&retry, "jitter", handler.retry.jitter);
        let window = ["handlers", name, "window"];
        self.table(&window);
        self.line(&window, "events", count(handler.window.events));
        self.line(&window, "bytes", size(handler.window.bytes));
        let parked = ["handlers", name, "parked"];
        self.table(&parked);
        self.line(&parked, "per_key", count(handler.parked.per_key));
        self.line(&parked, "total", count(handler.parked.total));
        let checkpoint = ["handlers", name, "checkpoint"];
        self.table(&checkpoint);
        self.line(&checkpoint, "interval", span(handler.checkpoint.interval));
        self.line(&checkpoint, "events", count(handler.checkpoint.events));
        if let HandlerKind::Search(search) = &handler.kind {
            for (kind, document) in &search.documents {
                let table = ["handlers", name, "documents", kind];
                self.table(&table);
                self.line(&table, "id", document.id.as_str());
                self.line(&table, "delete", document.delete.clone());
                self.line(&table, "text", fields(&document.text));
                self.line(&table, "keyword", fields(&document.keyword));
                self.line(&table, "date", fields(&document.date));
                self.line(&table, "number", fields(&document.number));
            }
        }
    }
}

fn path(path: &Path) -> String {
    path.display().to_string()
}

fn span(duration: Duration) -> String {
    text::span(duration)
}

fn size(bytes: usize) -> String {
    text::size(bytes as u64)
}

fn count(n: usize) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

fn fields(fields: &BTreeMap<String, String>) -> Value {
    Value::Table(fields.iter().map(|(k, v)| (k.clone(), Value::from(v.as_str()))).collect())
}

fn exprs(exprs: &[Expr]) -> Vec<String> {
    exprs
        .iter()
        .map(|expr| match expr {
            Expr::Pointer(pointer) => pointer.to_string(),
            Expr::Header(name) => format!("header:{name}"),
            Expr::Token(n) => format!("token:{n}"),
            Expr::Subject => "subject".to_owned(),
        })
        .collect()
}

/// The same for the servers of NATS, which may stand without a scheme.
fn redact_servers(urls: &str) -> String {
    let one = |url: &str| match url.trim() {
        url if url.contains("://") => redact(url),
        url => redact(&format!("nats://{url}")),
    };
    urls.split(',').map(one).collect::<Vec<_>>().join(",")
}

/// A URL without what may be secret in it: the password, the query, and for the web the path,
/// which in many webhooks is the secret. What is not understood is left out altogether.
fn redact(url: &str) -> String {
    let Ok(mut url) = Url::parse(url.trim()) else { return REDACTED.to_owned() };
    // NATS: what stands alone before the host is a token.
    if matches!(url.scheme(), "nats" | "tls")
        && url.password().is_none()
        && !url.username().is_empty()
        && url.set_username(REDACTED).is_err()
    {
        return REDACTED.to_owned();
    }
    if url.password().is_some() && url.set_password(Some(REDACTED)).is_err() {
        return REDACTED.to_owned();
    }
    if matches!(url.scheme(), "http" | "https") {
        url.set_path(REDACTED);
        let _ = url.set_username("");
    }
    if url.query().is_some() {
        url.set_query(Some(REDACTED));
    }
    url.set_fragment(None);
    // `…` comes out percent-encoded.
    url.to_string().replace("%E2%80%A6", REDACTED)
}
