//! `[store]`, `[http]`, `[limits]`, `[log]`.

use std::{
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    time::Duration,
};

use url::Url;

use super::Check;
use crate::{
    config::{
        raw::{RawHttp, RawHttpTls, RawLimits, RawLog, RawLogFormat, RawRetain, RawStore},
        settings::{DEFAULT_LISTEN, HttpSettings, Limits, RetainSettings, StoreSettings},
        text::{Size, Span},
    },
    secret::Secret,
    telemetry::{LogFormat, LogSettings, filter as filter_of_log},
    tls::{ServerTlsOptions, TlsOptions, server_config},
};

const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;
const GIB: usize = 1 << 30;

/// Nobody means to remove what has just come in.
const MIN_AGE: Duration = Duration::from_secs(1);

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
        let mut tls = None;
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
                tls = self.store_tls(raw, &parsed);
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
        StoreSettings::Postgres { url: secret, max_connections, tls }
    }

    pub(super) fn retain(&mut self, raw: Option<&RawRetain>) -> Option<RetainSettings> {
        let RawRetain { age, size, identities } = raw?;
        if age.is_none() && size.is_none() {
            // Nothing is removed for neither reason.
            return None;
        }
        if age.is_some_and(|Span(age)| age < MIN_AGE) {
            self.wrong(&["store", "retain", "age"], "must be at least 1s");
        }
        if size.is_some_and(|Size(bytes)| bytes == 0) {
            self.wrong(&["store", "retain", "size"], "must be more than 0");
        }
        Some(RetainSettings {
            age: age.map(|Span(age)| age),
            bytes: size.map(|Size(bytes)| bytes),
            identities: identities.unwrap_or(true),
        })
    }

    /// TLS towards Postgres, of which the URL may say less than is good.
    fn store_tls(&mut self, raw: &RawStore, url: &Url) -> Option<TlsOptions> {
        let value = |names: &[&str]| {
            let mut pairs = url.query_pairs();
            pairs.find(|(key, _)| names.contains(&&**key)).map(|(_, value)| value.into_owned())
        };
        let mode = value(&["sslmode", "ssl-mode"]);
        let Some(tls) = &raw.tls else {
            let host = value(&["host", "hostaddr"])
                .or_else(|| url.host_str().map(str::to_owned))
                .unwrap_or_default();
            let environment = self.inputs.variable("PGSSLMODE").is_some();
            if mode.is_none() && !environment && !is_here(&host) {
                self.doubt(
                    &["store", "url"],
                    "has no sslmode: the connection is encrypted only where the server offers \
                     it, and with whoever answers; add ?sslmode=verify-full or set store.tls, or \
                     sslmode=disable where the network may be trusted",
                );
            }
            return None;
        };
        if let Some(mode) = mode.filter(|mode| mode != "verify-full") {
            self.wrong(
                &["store", "tls"],
                format!(
                    "means sslmode=verify-full, and the URL says {}; take sslmode out of it",
                    // Anything may stand there, a secret in the wrong place too.
                    match mode.as_str() {
                        known @ ("disable" | "allow" | "prefer" | "require" | "verify-ca") => known,
                        _ => "something else",
                    }
                ),
            );
        }
        let path = ["store", "tls"];
        let files = (tls.ca_file.as_ref(), tls.cert_file.as_ref(), tls.key_file.as_ref());
        Some(self.client_tls(&path, files.0, files.1, files.2))
    }

    fn without_connections(&mut self, raw: &RawStore, store: StoreSettings) -> StoreSettings {
        if raw.max_connections.is_some() {
            self.wrong(
                &["store", "max_connections"],
                "means nothing without Postgres; take it out",
            );
        }
        if raw.tls.is_some() {
            self.wrong(&["store", "tls"], "means nothing without Postgres; take it out");
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
            tls: raw.tls.as_ref().map(|tls| self.http_tls(tls)),
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

    fn http_tls(&mut self, raw: &RawHttpTls) -> ServerTlsOptions {
        let before = self.errors.len();
        for (key, file) in [("cert_file", &raw.cert_file), ("key_file", &raw.key_file)] {
            if file.is_none() {
                self.missing(&["http", "tls", key], "HTTPS needs both cert_file and key_file");
            }
        }
        let mut file = |key: &str, file: &Option<PathBuf>| {
            self.existing_file(&["http", "tls", key], file.as_ref())
        };
        let options = ServerTlsOptions {
            cert_file: file("cert_file", &raw.cert_file).unwrap_or_default(),
            key_file: file("key_file", &raw.key_file).unwrap_or_default(),
            client_ca_file: file("client_ca_file", &raw.client_ca_file),
        };
        if self.errors.len() == before
            && let Err(error) = server_config(&options)
        {
            self.wrong(&["http", "tls"], error.to_string());
        }
        options
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
        // As logging will read it: what it could not take must not be found out in a daemon that runs.
        if filter_of_log(&filter).is_err() {
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
                Some(RawLogFormat::Journald) => LogFormat::Journald,
            },
        }
    }
}

/// Whether a host of Postgres is this machine: a folder of sockets, loopback, or the default.
fn is_here(host: &str) -> bool {
    let name = host.trim_start_matches('[').trim_end_matches(']');
    name.is_empty()
        || name.starts_with('/')
        || name.to_ascii_lowercase().starts_with("%2f")
        || name.eq_ignore_ascii_case("localhost")
        || name.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// Where the index of a search handler is, unless told otherwise.
pub(super) fn index_path(data_dir: &Path, handler: &str, path: Option<&PathBuf>) -> PathBuf {
    data_dir.join(path.map_or_else(|| Path::new("search").join(handler), Clone::clone))
}
