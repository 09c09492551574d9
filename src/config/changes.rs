//! What of a new configuration can hold while the daemon runs, and what only after a restart.

use std::{collections::BTreeMap, sync::Arc};

use super::settings::{
    HandlerKind, HandlerSettings, HttpSettings, INGEST, Limits, Settings, SourceSettings,
    StoreSettings, TransportSettings,
};
use crate::{handler::search::SearchOptions, telemetry::LogSettings};

/// A new configuration, as far as a running daemon can take it over.
#[derive(Debug, Clone)]
pub struct Reload {
    /// What holds from now on: new where it can change, as it was otherwise. No handler and no
    /// source of it is half new: where a part has to wait, it waits as a whole.
    pub settings: Settings,
    /// The keys whose new values take effect at the next restart.
    pub at_restart: Vec<String>,
}

impl Settings {
    /// What becomes of these settings, which a daemon runs with, when `new` ones are read.
    ///
    /// What can change: `log.filter`, `shutdown_timeout`, `http.token`, `http.tls`, transports,
    /// sources other than the HTTP endpoint's, handlers; of a search handler not its index.
    #[must_use]
    pub fn reload(&self, new: Self) -> Reload {
        let mut waiting = Waiting::default();
        let moved = self.data_dir != new.data_dir;
        waiting.when(moved, || "data_dir".to_owned());
        waiting.when(self.log.format != new.log.format, || "log.format".to_owned());
        waiting.store(&self.store, &new.store);
        waiting.when(self.otlp != new.otlp, || "telemetry.otlp".to_owned());
        waiting.when(self.retain != new.retain, || "store.retain".to_owned());
        let http = waiting.http(&self.http, new.http);
        waiting.limits(self.limits, new.limits);
        let sources = waiting.sources(self, new.sources);
        let handlers = waiting.handlers(&self.handlers, new.handlers, moved);
        let mut settings = Self {
            data_dir: self.data_dir.clone(),
            store: self.store.clone(),
            retain: self.retain,
            otlp: self.otlp.clone(),
            http,
            limits: self.limits,
            shutdown_timeout: new.shutdown_timeout,
            log: LogSettings { filter: new.log.filter, format: self.log.format },
            transports: new.transports,
            sources,
            handlers,
        };
        settings.keep_transports(&self.transports);
        Reload { settings, at_restart: waiting.0 }
    }

    /// What stays as it was needs the transports it names.
    fn keep_transports(&mut self, former: &BTreeMap<Arc<str>, TransportSettings>) {
        let of_sources = self.sources.values().map(|source| &source.transport);
        let of_handlers = self.handlers.values().flat_map(HandlerSettings::transports);
        for name in of_sources.chain(of_handlers) {
            if let Some(transport) = former.get(name) {
                self.transports.entry(Arc::clone(name)).or_insert_with(|| transport.clone());
            }
        }
    }
}

impl HandlerSettings {
    /// The transports it names.
    pub fn transports(&self) -> impl Iterator<Item = &Arc<str>> {
        let forward = match &self.kind {
            HandlerKind::Forward(forward) => Some(&forward.transport),
            HandlerKind::Search(_) | HandlerKind::Log { .. } => None,
        };
        forward.into_iter().chain(self.dead_letter.iter().map(|to| &to.transport))
    }

    /// The keys whose values differ from those of `other`.
    #[must_use]
    pub fn differences(&self, other: &Self) -> Vec<&'static str> {
        // All of them, so that a new one is thought of.
        let Self {
            kind,
            events,
            start,
            workers,
            ordering,
            timeout,
            retry,
            on_dead,
            dead_letter,
            window,
            parked,
            checkpoint,
        } = self;
        let mut keys = match (kind, &other.kind) {
            (HandlerKind::Search(one), HandlerKind::Search(other)) => of_the_index(one, other),
            (HandlerKind::Forward(one), HandlerKind::Forward(other)) => chosen([
                ("transport", one.transport != other.transport),
                ("exchange", one.exchange != other.exchange),
                ("address", one.address != other.address),
                ("headers", one.headers != other.headers),
                ("format", one.format != other.format),
            ]),
            (HandlerKind::Log { level }, HandlerKind::Log { level: other }) => {
                chosen([("level", level != other)])
            }
            _ => vec!["kind"],
        };
        keys.extend(chosen([
            ("events", *events != other.events),
            ("start", *start != other.start),
            ("workers", *workers != other.workers),
            ("ordering", *ordering != other.ordering),
            ("timeout", *timeout != other.timeout),
            ("retry", *retry != other.retry),
            ("on_dead", *on_dead != other.on_dead),
            ("dead_letter", *dead_letter != other.dead_letter),
            ("window", *window != other.window),
            ("parked", *parked != other.parked),
            ("checkpoint", *checkpoint != other.checkpoint),
        ]));
        keys
    }
}

/// What an index was opened with, and can only be opened with anew once it is closed.
fn of_the_index(one: &SearchOptions, other: &SearchOptions) -> Vec<&'static str> {
    let SearchOptions { path, documents, commit_interval, writer_memory, language } = one;
    chosen([
        ("path", *path != other.path),
        ("documents", *documents != other.documents),
        ("commit_interval", *commit_interval != other.commit_interval),
        ("writer_memory", *writer_memory != other.writer_memory),
        ("language", *language != other.language),
    ])
}

fn chosen<const N: usize>(keys: [(&'static str, bool); N]) -> Vec<&'static str> {
    keys.into_iter().filter(|(_, differs)| *differs).map(|(key, _)| key).collect()
}

fn is_ingest(source: &SourceSettings) -> bool {
    *source.transport == *INGEST
}

/// The keys that have to wait.
#[derive(Default)]
struct Waiting(Vec<String>);

impl Waiting {
    fn when(&mut self, differs: bool, key: impl FnOnce() -> String) {
        if differs {
            self.0.push(key());
        }
    }

    fn keys<const N: usize>(&mut self, table: &str, keys: [(&'static str, bool); N]) {
        self.0.extend(chosen(keys).into_iter().map(|key| format!("{table}.{key}")));
    }

    fn store(&mut self, old: &StoreSettings, new: &StoreSettings) {
        use StoreSettings::Postgres;
        let before = self.0.len();
        if let (
            Postgres { url, max_connections, tls, .. },
            Postgres { url: new_url, max_connections: new_max, tls: new_tls, .. },
        ) = (old, new)
        {
            self.keys(
                "store",
                [
                    ("url", url != new_url),
                    ("max_connections", max_connections != new_max),
                    ("tls", tls != new_tls),
                ],
            );
        }
        self.when(old != new && self.0.len() == before, || "store.url".to_owned());
    }

    fn http(&mut self, old: &HttpSettings, new: HttpSettings) -> HttpSettings {
        // The listener is where it was, and what was said of the new address says nothing of it:
        // one that others reach must not lose its token.
        let bare = old.enabled && new.token.is_none() && !old.listen.ip().is_loopback();
        self.keys(
            "http",
            [
                ("enabled", old.enabled != new.enabled),
                ("listen", old.listen != new.listen),
                ("token", bare && old.token.is_some()),
                ("max_body", old.max_body != new.max_body),
                ("timeout", old.timeout != new.timeout),
                ("max_connections", old.max_connections != new.max_connections),
            ],
        );
        let token = if bare { old.token.clone() } else { new.token };
        HttpSettings { token, tls: new.tls, ..old.clone() }
    }

    fn limits(&mut self, old: Limits, new: Limits) {
        let Limits { max_event_bytes, ingest_bytes, tail_bytes } = old;
        self.keys(
            "limits",
            [
                ("max_event_bytes", max_event_bytes != new.max_event_bytes),
                ("ingest_bytes", ingest_bytes != new.ingest_bytes),
                ("tail_bytes", tail_bytes != new.tail_bytes),
            ],
        );
    }

    fn sources(
        &mut self,
        running: &Settings,
        new: BTreeMap<Arc<str>, SourceSettings>,
    ) -> BTreeMap<Arc<str>, SourceSettings> {
        let mut sources = BTreeMap::new();
        for (name, mut source) in new {
            // A limit that waits, waits here too.
            source.decoder.max_event_bytes = running.limits.max_event_bytes;
            let old = running.sources.get(&name);
            if !is_ingest(&source) && !old.is_some_and(is_ingest) {
                sources.insert(name, source);
                continue;
            }
            // The endpoint stays as it is: requests under way would be turned away.
            self.when(old != Some(&source), || format!("sources.{name}"));
            if let Some(old) = old {
                sources.insert(name, old.clone());
            }
        }
        for (name, old) in running.sources.iter().filter(|(_, source)| is_ingest(source)) {
            self.when(!sources.contains_key(name), || format!("sources.{name}"));
            sources.entry(Arc::clone(name)).or_insert_with(|| old.clone());
        }
        sources
    }

    /// `moved`: whether the folder that indexes are in by default is another one now.
    fn handlers(
        &mut self,
        running: &BTreeMap<Arc<str>, HandlerSettings>,
        new: BTreeMap<Arc<str>, HandlerSettings>,
        moved: bool,
    ) -> BTreeMap<Arc<str>, HandlerSettings> {
        let mut handlers = BTreeMap::new();
        for (name, handler) in new {
            let old = running.get(&name);
            let waits = match (old.map(|old| &old.kind), &handler.kind) {
                (Some(HandlerKind::Search(old)), HandlerKind::Search(new)) => old != new,
                // Its index would be made in a folder that is not ours yet.
                (_, HandlerKind::Search(_)) => moved,
                _ => false,
            };
            if !waits {
                handlers.insert(name, handler);
                continue;
            }
            match old {
                None => self.0.push(format!("handlers.{name}")),
                Some(old) => {
                    let keys = old.differences(&handler);
                    self.0.extend(keys.iter().map(|key| format!("handlers.{name}.{key}")));
                    handlers.insert(name, old.clone());
                }
            }
        }
        handlers
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Inputs, load};

    fn settings(text: &str) -> Settings {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("pulsebus.toml");
        std::fs::write(&file, text).unwrap();
        let inputs = Inputs { file: Some(file), variables: Vec::new(), flags: Vec::new() };
        load(&inputs).unwrap().settings
    }

    const BASE: &str = r#"
        data_dir = "/data"
        [http]
        listen = "0.0.0.0:8077"
        token = "one"
        [transports.nats]
        kind = "nats"
        url = "nats://127.0.0.1:4222"
        password = "old"
        user = "me"
        [sources.lessons]
        transport = "nats"
        stream = "EDUPULSE"
        consumer = "pulsebus"
        [handlers.out]
        kind = "forward"
        transport = "nats"
        subject = "mirror.{type}"
        [handlers.search]
        kind = "search"
        dead_letter = { transport = "nats", subject = "dead" }
        [handlers.search.documents.LessonPublished]
        id = "/lesson_id"
        text = { title = "/title" }
    "#;

    fn changed(replace: &[(&str, &str)]) -> Reload {
        let mut text = BASE.to_owned();
        for (from, to) in replace {
            assert!(text.contains(from), "{from}");
            text = text.replace(from, to);
        }
        settings(BASE).reload(settings(&text))
    }

    #[test]
    fn the_same_configuration_changes_nothing() {
        let running = settings(BASE);
        let Reload { settings, at_restart } = running.reload(settings(BASE));
        assert_eq!(at_restart, [""; 0]);
        assert_eq!(settings.transports, running.transports);
        assert_eq!(settings.sources, running.sources);
        assert_eq!(settings.handlers, running.handlers);
        assert_eq!(settings.http, running.http);
    }

    #[test]
    fn what_needs_a_restart_is_named_and_stays_as_it_was() {
        let reload = changed(&[
            ("data_dir = \"/data\"", "data_dir = \"/new\"\nlog = { format = \"json\" }"),
            ("listen = \"0.0.0.0:8077\"", "listen = \"0.0.0.0:8078\"\ntimeout = \"9s\""),
            (
                "[transports.nats]",
                "[store]\nurl = \"memory:\"\n[limits]\nmax_event_bytes = \"2MiB\"\n\
                 [sources.http]\ntransport = \"http\"\nevent_source = \"/x\"\n[transports.nats]",
            ),
        ]);
        let names = reload.at_restart.join(" ");
        assert_eq!(
            names,
            "data_dir log.format store.url http.listen http.timeout limits.max_event_bytes \
             sources.http handlers.search.path"
        );
        let running = settings(BASE);
        assert_eq!(reload.settings.data_dir, running.data_dir);
        assert_eq!(reload.settings.store, running.store);
        assert_eq!(reload.settings.http, running.http);
        assert_eq!(reload.settings.limits, running.limits);
        assert_eq!(reload.settings.sources, running.sources);
        assert_eq!(reload.settings.handlers, running.handlers);
    }

    #[test]
    fn a_secret_in_the_file_counts_as_changed() {
        let reload =
            changed(&[("password = \"old\"", "password = \"new\""), ("\"one\"", "\"two\"")]);
        assert_eq!(reload.at_restart, [""; 0]);
        let running = settings(BASE);
        assert_ne!(reload.settings.transports, running.transports);
        assert_ne!(reload.settings.http.token, running.http.token);
        assert!(!format!("{reload:?}").contains("two"));
    }

    #[test]
    fn an_index_and_all_of_its_handler_wait() {
        let reload = changed(&[
            ("text = { title = \"/title\" }", "keyword = { title = \"/title\" }"),
            ("kind = \"search\"", "kind = \"search\"\nworkers = 2"),
            ("subject = \"mirror.{type}\"", "subject = \"other.{type}\"\nworkers = 2"),
        ]);
        assert_eq!(reload.at_restart, ["handlers.search.documents", "handlers.search.workers"]);
        let running = settings(BASE);
        assert_eq!(reload.settings.handlers["search"], running.handlers["search"]);
        let out = &reload.settings.handlers["out"];
        assert_eq!(running.handlers["out"].differences(out), ["address", "workers"]);
    }

    #[test]
    fn what_stays_keeps_the_transport_it_names() {
        let without = BASE.split("[transports.nats]").next().unwrap();
        let kept = "[handlers.search]\nkind = \"search\"\n\
                    [handlers.search.documents.LessonPublished]\nid = \"/other\"\n\
                    text = { title = \"/title\" }";
        let reload = settings(BASE).reload(settings(&format!("{without}{kept}")));
        assert_eq!(reload.at_restart, ["handlers.search.documents", "handlers.search.dead_letter"]);
        assert!(reload.settings.transports.contains_key("nats"));
        assert!(!reload.settings.sources.contains_key("lessons"));
        assert!(!reload.settings.handlers.contains_key("out"));
    }

    #[test]
    fn a_listener_that_others_reach_keeps_its_token() {
        let to = ("listen = \"0.0.0.0:8077\"\n        token = \"one\"", "listen = \"127.0.0.1:1\"");
        let reload = changed(&[to]);
        assert_eq!(reload.at_restart, ["http.listen", "http.token"]);
        assert!(reload.settings.http.token.is_some());
    }
}
