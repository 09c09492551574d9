//! `[store]`, `[http]`, `[limits]`, `[log]`.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use tracing_subscriber::EnvFilter;
use url::Url;

use super::Check;
use crate::{
    config::{
        raw::{RawHttp, RawLimits, RawLog, RawLogFormat, RawStore},
        settings::{DEFAULT_LISTEN, HttpSettings, Limits, StoreSettings},
    },
    secret::Secret,
    telemetry::{LogFormat, LogSettings},
};

const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;
const GIB: usize = 1 << 30;

impl Check<'_> {
    pub(super) fn store(&mut self, raw: Option<&RawStore>, data_dir: &Path) -> StoreSettings {
        let default = RawStore::default();
        let raw = raw.unwrap_or(&default);
        let in_data_dir = |file: &str| StoreSettings::Sqlite { path: data_dir.join(file) };
        let Some(secret) = self.secret(&["store"], "url", raw.url.as_ref(), raw.url_file.as_ref())
        else {
            return self.without_connections(raw, in_data_dir("events.db"));
        };
        // A file that cannot be read has been reported.
        let Ok(url) = secret.read() else { return in_data_dir("events.db") };
        let path = ["store", "url"];
        let url = url.trim();
        if url == "memory:" {
            return self.without_connections(raw, StoreSettings::Memory);
        }
        if let Some(file) = url.strip_prefix("sqlite:") {
            let file = file.strip_prefix("//").unwrap_or(file);
            if file.is_empty() || file.starts_with(':') || file.contains('?') {
                self.wrong(
                    &path,
                    "not a SQLite file: write `sqlite:FILE`, as in sqlite:events.db; for a store \
                     in memory `memory:`",
                );
            }
            return self.without_connections(raw, in_data_dir(file));
        }
        if url.is_empty() {
            // Said already.
            return in_data_dir("events.db");
        }
        match Url::parse(url) {
            Ok(parsed) if matches!(parsed.scheme(), "postgres" | "postgresql") => {
                if parsed.path().trim_start_matches('/').is_empty()
                    && !parsed.query_pairs().any(|(key, _)| key == "dbname")
                {
                    self.wrong(
                        &path,
                        "names no database: write postgres://user:password@host/database",
                    );
                }
            }
            _ => self.wrong(
                &path,
                "not a store: write sqlite:FILE, postgres://user:password@host/database or memory:",
            ),
        }
        let max_connections = self.number(
            &["store", "max_connections"],
            raw.max_connections,
            10,
            // The lease, the listener, the writer and one reader.
            4..=1_000,
        );
        StoreSettings::Postgres { url: secret, max_connections }
    }

    fn without_connections(&mut self, raw: &RawStore, store: StoreSettings) -> StoreSettings {
        if raw.max_connections.is_some() {
            self.wrong(
                &["store", "max_connections"],
                "means nothing without Postgres; take it out",
            );
        }
        store
    }

    pub(super) fn http(&mut self, raw: Option<&RawHttp>) -> HttpSettings {
        let default = RawHttp::default();
        let raw = raw.unwrap_or(&default);
        let enabled = raw.enabled.unwrap_or(true);
        let listen = raw.listen.as_deref().map_or(DEFAULT_LISTEN, |text| self.listen(text));
        let token = self.secret(&["http"], "token", raw.token.as_ref(), raw.token_file.as_ref());
        if let Some(Ok(text)) = token.as_ref().map(Secret::read)
            && text.contains(|c: char| !c.is_ascii_graphic())
        {
            self.wrong(
                &["http", "token"],
                "holds characters that cannot stand in a header: use letters, digits and \
                     punctuation, on one line without spaces",
            );
        }
        if enabled && token.is_none() && !listen.ip().is_loopback() {
            self.wrong(
                &["http", "listen"],
                format!(
                    "{listen} can be reached by others and there is no token; set http.token_file, \
                     or listen on 127.0.0.1"
                ),
            );
        }
        HttpSettings {
            enabled,
            listen,
            token,
            max_body: self.size(&["http", "max_body"], raw.max_body, 16 * MIB, KIB..=GIB),
            timeout: self.span(&["http", "timeout"], raw.timeout, Duration::from_secs(30)),
            max_connections: self.number(
                &["http", "max_connections"],
                raw.max_connections,
                1_024,
                1..=1_000_000,
            ),
        }
    }

    fn listen(&mut self, text: &str) -> SocketAddr {
        // The only name that means the same everywhere; others would need a resolver to check.
        let address = text
            .strip_prefix("localhost:")
            .map_or_else(|| text.to_owned(), |port| format!("127.0.0.1:{port}"));
        address.parse().unwrap_or_else(|_| {
            self.wrong(
                &["http", "listen"],
                "not an address and port: write it as in 127.0.0.1:8077 or [::1]:8077",
            );
            DEFAULT_LISTEN
        })
    }

    pub(super) fn limits(&mut self, raw: Option<&RawLimits>) -> Limits {
        let default = RawLimits::default();
        let raw = raw.unwrap_or(&default);
        let max_event_bytes =
            self.size(&["limits", "max_event_bytes"], raw.max_event_bytes, MIB, KIB..=512 * MIB);
        let limits = Limits {
            max_event_bytes,
            ingest_bytes: self.size(
                &["limits", "ingest_bytes"],
                raw.ingest_bytes,
                (64 * MIB).max(max_event_bytes),
                MIB..=64 * GIB,
            ),
            tail_bytes: self.size(
                &["limits", "tail_bytes"],
                raw.tail_bytes,
                64 * MIB,
                0..=64 * GIB,
            ),
        };
        if limits.ingest_bytes < limits.max_event_bytes {
            self.wrong(
                &["limits", "ingest_bytes"],
                "smaller than limits.max_event_bytes, so the largest event would never fit; raise \
                 it or lower the other",
            );
        }
        limits
    }

    pub(super) fn log(&mut self, raw: Option<&RawLog>) -> LogSettings {
        let default = RawLog::default();
        let raw = raw.unwrap_or(&default);
        let filter = raw.filter.clone().unwrap_or_else(|| "info".to_owned());
        if EnvFilter::builder().parse(&filter).is_err() {
            self.wrong(
                &["log", "filter"],
                "not understood: write a level (error, warn, info, debug, trace), or directives \
                 such as info,pulsebus=debug",
            );
        }
        LogSettings {
            filter,
            format: match raw.format {
                None | Some(RawLogFormat::Auto) => LogFormat::Auto,
                Some(RawLogFormat::Text) => LogFormat::Text,
                Some(RawLogFormat::Json) => LogFormat::Json,
            },
        }
    }
}

/// Where the index of a search handler is, unless told otherwise.
pub(super) fn index_path(data_dir: &Path, handler: &str, path: Option<&PathBuf>) -> PathBuf {
    data_dir.join(path.map_or_else(|| Path::new("search").join(handler), Clone::clone))
}
