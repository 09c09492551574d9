//! From what is written to what holds: every rule that looks at more than one value's type.

mod handlers;
mod server;
mod sources;
mod telemetry;
mod transports;

use std::{
    collections::BTreeMap,
    ops::RangeInclusive,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use super::{
    error::{ConfigError, did_you_mean, one_of},
    load::Inputs,
    raw::RawConfig,
    settings::Settings,
    text::{SecretText, Size, Span},
    tree::{Tree, key_text},
};
use crate::{secret::Secret, tls::TlsOptions};

/// Checks values and gathers what is wrong. Where something is, a stand-in goes on, so that the
/// rest is checked too; settings made with errors are never handed out.
pub(super) struct Check<'a> {
    pub(super) tree: &'a Tree,
    pub(super) inputs: &'a Inputs,
    /// Values that were taken out because they do not even fit their type.
    pub(super) broken: Vec<Vec<String>>,
    pub(super) errors: Vec<ConfigError>,
    /// What holds, and is perhaps not meant.
    pub(super) warnings: Vec<ConfigError>,
}

impl Check<'_> {
    /// The settings that a configuration means.
    pub(super) fn settings(&mut self, raw: &RawConfig) -> Settings {
        let data_dir = self.data_dir(raw);
        let limits = self.limits(raw.limits.as_ref());
        let http = self.http(raw.http.as_ref());
        let store = self.store(raw.store.as_ref(), &data_dir);
        let retain = self.retain(raw.store.as_ref().and_then(|store| store.retain.as_ref()));
        let log = self.log(raw.log.as_ref());
        let otlp = self.otlp(raw.telemetry.as_ref());
        let shutdown_timeout =
            self.span(&["shutdown_timeout"], raw.shutdown_timeout, Duration::from_secs(25));
        let transports = self.transports(raw.transports.as_ref());
        let sources = self.sources(raw, &transports, &http, limits);
        let handlers = self.handlers(raw.handlers.as_ref(), &transports, &data_dir);
        Settings {
            data_dir,
            store,
            retain,
            http,
            limits,
            shutdown_timeout,
            log,
            otlp,
            transports,
            sources,
            handlers,
        }
    }

    fn data_dir(&mut self, raw: &RawConfig) -> PathBuf {
        if let Some(dir) = &raw.data_dir {
            if dir.as_os_str().is_empty() {
                self.wrong(&["data_dir"], "is empty; name a folder");
            }
            return dir.clone();
        }
        // systemd joins several folders with colons; the first is the unit's main one.
        let state = self.inputs.variable("STATE_DIRECTORY").and_then(|dirs| dirs.split(':').next());
        PathBuf::from(state.unwrap_or("./pulsebus-data"))
    }

    /// Notes what is wrong with a key.
    fn wrong(&mut self, path: &[&str], problem: impl Into<String>) {
        self.errors.push(ConfigError {
            origin: self.tree.origin(path),
            key: key_text(path),
            problem: problem.into(),
        });
    }

    /// Notes what is perhaps not meant.
    fn doubt(&mut self, path: &[&str], problem: impl Into<String>) {
        self.warnings.push(ConfigError {
            origin: self.tree.origin(path),
            key: key_text(path),
            problem: problem.into(),
        });
    }

    /// Notes that a required key is missing, unless what was there has been found wrong already.
    fn missing(&mut self, path: &[&str], what_to_do: &str) {
        if !self.is_broken(path) {
            self.wrong(path, format!("missing; {what_to_do}"));
        }
    }

    fn is_broken(&self, path: &[&str]) -> bool {
        self.broken.iter().any(|broken| {
            broken.len() <= path.len() && broken.iter().zip(path).all(|(a, b)| a == b)
        })
    }

    /// Notes keys that mean nothing where they stand, though they do elsewhere.
    fn only(&mut self, path: &[&str], known: &[&[&str]], place: &str) {
        for key in self.tree.keys(path) {
            let fits = known.iter().any(|keys| keys.contains(&key.as_str()));
            let path: Vec<_> = path.iter().copied().chain([key.as_str()]).collect();
            if !fits && !self.is_broken(&path) {
                self.wrong(&path, format!("means nothing {place}; take it out"));
            }
        }
    }

    /// Names become file names, metric labels and part of URLs.
    fn name(&mut self, path: &[&str], name: &str) {
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        let starts = name.starts_with(|c: char| c.is_ascii_alphanumeric());
        if !starts || name.len() > 64 || !name.chars().all(plain) {
            self.wrong(
                path,
                "not a name: up to 64 letters, digits, `-` and `_`, the first a letter or digit",
            );
        }
    }

    /// A length of time greater than zero.
    fn span(&mut self, path: &[&str], value: Option<Span>, default: Duration) -> Duration {
        match value {
            Some(Span(Duration::ZERO)) => {
                self.wrong(path, "must be longer than nothing");
                default
            }
            Some(Span(span)) => span,
            None => default,
        }
    }

    fn size(
        &mut self,
        path: &[&str],
        value: Option<Size>,
        default: usize,
        range: RangeInclusive<usize>,
    ) -> usize {
        let Some(Size(bytes)) = value else { return default };
        match usize::try_from(bytes) {
            Ok(bytes) if range.contains(&bytes) => bytes,
            _ => {
                let text = |n: usize| super::text::size(n as u64);
                self.wrong(
                    path,
                    format!("must be from {} to {}", text(*range.start()), text(*range.end())),
                );
                default
            }
        }
    }

    fn number<T: PartialOrd + Copy + std::fmt::Display>(
        &mut self,
        path: &[&str],
        value: Option<T>,
        default: T,
        range: RangeInclusive<T>,
    ) -> T {
        match value {
            Some(n) if range.contains(&n) => n,
            Some(_) => {
                self.wrong(path, format!("must be from {} to {}", range.start(), range.end()));
                default
            }
            None => default,
        }
    }

    /// A secret: in place, in the file that the key with `_file` behind it names, or a
    /// credential of systemd's. Of the first two the later layer wins; a credential is taken
    /// when neither is given.
    fn secret(
        &mut self,
        table: &[&str],
        key: &str,
        inline: Option<&SecretText>,
        file: Option<&PathBuf>,
    ) -> Option<Secret> {
        let file_key = format!("{key}_file");
        let path: Vec<_> = table.iter().copied().chain([key]).collect();
        let file_path: Vec<_> = table.iter().copied().chain([file_key.as_str()]).collect();
        let (inline, file) = match (inline, file) {
            (Some(inline), Some(file)) => {
                match self.tree.layer(&path).cmp(&self.tree.layer(&file_path)) {
                    std::cmp::Ordering::Less => (None, Some(file)),
                    std::cmp::Ordering::Greater => (Some(inline), None),
                    std::cmp::Ordering::Equal => {
                        self.wrong(&path, format!("given beside `{file_key}`; keep one of them"));
                        (Some(inline), None)
                    }
                }
            }
            either => either,
        };
        let secret = match (inline, file) {
            (Some(SecretText(text)), _) => {
                if text.trim().is_empty() {
                    self.wrong(&path, "is empty; set it, or take the key out");
                }
                Secret::Inline(text.clone())
            }
            (None, Some(file)) => {
                let secret = Secret::File(file.clone());
                self.readable(&file_path, &secret);
                secret
            }
            (None, None) => {
                if self.is_broken(&path) || self.is_broken(&file_path) {
                    return Some(Secret::Inline(String::new()));
                }
                return self.credential(table, key);
            }
        };
        Some(secret)
    }

    /// `$CREDENTIALS_DIRECTORY/http.token`: the key's path is the credential's name.
    fn credential(&mut self, table: &[&str], key: &str) -> Option<Secret> {
        let dir = self.inputs.variable("CREDENTIALS_DIRECTORY")?;
        let name = format!("{}.{key}", table.join("."));
        let file = Path::new(dir).join(&name);
        if !file.exists() {
            return None;
        }
        let secret = Secret::File(file);
        let path: Vec<_> = table.iter().copied().chain([key]).collect();
        self.readable(&path, &secret);
        Some(secret)
    }

    fn readable(&mut self, path: &[&str], secret: &Secret) {
        match secret.read() {
            Ok(text) if text.trim().is_empty() => self.wrong(path, "the file is empty"),
            Ok(_) => {}
            Err(error) => self.wrong(
                path,
                format!("{error}; check the path, and that the daemon's user may read it"),
            ),
        }
    }

    /// A file that a driver will read by itself.
    fn existing_file(&mut self, path: &[&str], file: Option<&PathBuf>) -> Option<PathBuf> {
        let file = file?;
        if let Err(error) = std::fs::File::open(file) {
            self.wrong(path, format!("cannot read {}: {error}", file.display()));
        }
        Some(file.clone())
    }

    /// TLS as a client, of the table at `path`; the files are read, and must fit each other.
    fn client_tls(
        &mut self,
        path: &[&str],
        ca_file: Option<&PathBuf>,
        cert_file: Option<&PathBuf>,
        key_file: Option<&PathBuf>,
    ) -> TlsOptions {
        let before = self.errors.len();
        let mut file = |name: &str, file: Option<&PathBuf>| {
            let path: Vec<_> = path.iter().copied().chain([name]).collect();
            self.existing_file(&path, file)
        };
        let options = TlsOptions {
            ca_file: file("ca_file", ca_file),
            cert_file: file("cert_file", cert_file),
            key_file: file("key_file", key_file),
            first: false,
        };
        if cert_file.is_some() != key_file.is_some() {
            let lack = if cert_file.is_some() { "key_file" } else { "cert_file" };
            let path: Vec<_> = path.iter().copied().chain([lack]).collect();
            self.missing(&path, "a client certificate needs both cert_file and key_file");
        }
        if self.errors.len() == before
            && let Err(error) = crate::tls::client_config(&options)
        {
            self.wrong(path, error.to_string());
        }
        options
    }

    /// Whether a name is among those configured; says so where it is not.
    fn known<T>(
        &mut self,
        path: &[&str],
        name: &str,
        names: &BTreeMap<Arc<str>, T>,
        built_in: Option<&str>,
    ) {
        // A transport that is itself wrong has been reported; nothing is gained by saying that
        // those who name it cannot find it.
        if self.tree.get(&["transports", name]).is_some() {
            return;
        }
        let known: Vec<&str> = names.keys().map(|name| &**name).chain(built_in).collect();
        let hint = match did_you_mean(name, known.iter().copied()) {
            near if !near.is_empty() => near,
            _ if known.is_empty() => format!("; add a section [transports.{name}]"),
            _ => format!("; there is {}", one_of(known.iter().copied())),
        };
        self.wrong(path, format!("no transport is called `{name}`{hint}"));
    }
}

/// The name of a value in the configuration.
fn word<T: serde::Serialize>(value: T) -> Option<String> {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::String(word)) => Some(word),
        _ => None,
    }
}
