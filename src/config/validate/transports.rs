//! `[transports.*]`.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use url::Url;

use super::Check;
use crate::{
    config::{
        raw::{RawTls, RawTransport, RawTransportKind},
        settings::{INGEST, TransportSettings},
    },
    secret::Secret,
    tls::TlsOptions,
    transport::{
        amqp::AmqpOptions,
        http::{WebhookOptions, check_host, check_secret},
        nats::NatsOptions,
    },
};

const ANY: &[&str] = &["kind"];
const NATS: &[&str] = &[
    "url",
    "url_file",
    "user",
    "password",
    "password_file",
    "token",
    "token_file",
    "nkey",
    "nkey_file",
    "credentials_file",
    "domain",
    "tls",
    "timeout",
];
const AMQP: &[&str] =
    &["url", "url_file", "password", "password_file", "tls", "timeout", "heartbeat"];
const HTTP: &[&str] = &[
    "url",
    "url_file",
    "secret",
    "secret_file",
    "token",
    "token_file",
    "tls",
    "timeout",
    "batch",
    "refuse_private",
];

impl Check<'_> {
    pub(super) fn transports(
        &mut self,
        raw: Option<&BTreeMap<String, RawTransport>>,
    ) -> BTreeMap<Arc<str>, TransportSettings> {
        let mut transports = BTreeMap::new();
        for (name, raw) in raw.into_iter().flatten() {
            let table = ["transports", name.as_str()];
            self.name(&table, name);
            if name == INGEST {
                self.wrong(&table, "`http` is the built-in ingest endpoint; choose another name");
                continue;
            }
            let Some(kind) = raw.kind else {
                self.missing(
                    &["transports", name, "kind"],
                    "set it to `nats`, `amqp`, `http` or `memory`",
                );
                continue;
            };
            let transport = match kind {
                RawTransportKind::Nats => {
                    self.only(&table, &[ANY, NATS], "for NATS");
                    TransportSettings::Nats(self.nats(name, raw))
                }
                RawTransportKind::Amqp => {
                    self.only(&table, &[ANY, AMQP], "for RabbitMQ");
                    TransportSettings::Amqp(self.amqp(name, raw))
                }
                RawTransportKind::Http => {
                    self.only(&table, &[ANY, HTTP], "for a webhook");
                    TransportSettings::Http(self.webhook(name, raw))
                }
                RawTransportKind::Memory => {
                    self.only(&table, &[ANY], "within the process");
                    TransportSettings::Memory
                }
            };
            transports.insert(Arc::from(name.as_str()), transport);
        }
        transports
    }

    /// The URL as a secret, and as text where it could be read.
    fn url(&mut self, name: &str, raw: &RawTransport, example: &str) -> (Secret, Option<String>) {
        let table = ["transports", name];
        let Some(url) = self.secret(&table, "url", raw.url.as_ref(), raw.url_file.as_ref()) else {
            self.missing(&["transports", name, "url"], &format!("set it, as in {example}"));
            return (Secret::Inline(String::new()), None);
        };
        let text = url.read().ok().map(|text| text.trim().to_owned());
        (url, text.filter(|text| !text.is_empty()))
    }

    fn nats(&mut self, name: &str, raw: &RawTransport) -> NatsOptions {
        let table = ["transports", name];
        let (url, text) = self.url(name, raw, "nats://127.0.0.1:4222");
        let login = self.nats_servers(name, text.as_deref().unwrap_or_default());
        let mut options = NatsOptions {
            url,
            credentials_file: None,
            nkey: self.secret(&table, "nkey", raw.nkey.as_ref(), raw.nkey_file.as_ref()),
            token: self.secret(&table, "token", raw.token.as_ref(), raw.token_file.as_ref()),
            user: raw.user.clone(),
            password: self.secret(
                &table,
                "password",
                raw.password.as_ref(),
                raw.password_file.as_ref(),
            ),
            tls: self.tls(name, raw.tls.as_ref(), None),
            domain: raw.domain.clone(),
            timeout: self.span(
                &["transports", name, "timeout"],
                raw.timeout,
                Duration::from_secs(5),
            ),
        };
        options.credentials_file = self
            .existing_file(&["transports", name, "credentials_file"], raw.credentials_file.as_ref())
            .or_else(|| match self.credential(&table, "credentials") {
                Some(Secret::File(path)) => Some(path),
                _ => None,
            });
        // What stands in the URL gives way to a user or token beside it, and its password to
        // that: so a secret is moved out.
        let in_url = login.filter(|_| options.user.is_none() && options.token.is_none());
        let as_user = in_url.as_ref().is_some_and(|login| login.has_password)
            || in_url.is_some() && options.password.is_some();
        let ways = [
            ("credentials_file", options.credentials_file.is_some()),
            ("nkey", options.nkey.is_some()),
            ("token", options.token.is_some() || in_url.is_some() && !as_user),
            ("user", options.user.is_some() || as_user),
        ];
        let given: Vec<_> = ways.iter().filter(|way| way.1).map(|way| way.0).collect();
        if given.len() > 1 {
            self.wrong(
                &table,
                format!("several ways to log in ({}); keep one of them", given.join(", ")),
            );
        }
        if !as_user && options.user.is_some() != options.password.is_some() {
            let (have, lack) =
                if options.user.is_some() { ("user", "password") } else { ("password", "user") };
            self.missing(&["transports", name, lack], &format!("`{have}` is given without it"));
        }
        options
    }

    /// Checks the servers of a list, and gives back how the first login in it is.
    fn nats_servers(&mut self, name: &str, text: &str) -> Option<Login> {
        let path = ["transports", name, "url"];
        let mut login: Option<(String, Option<String>)> = None;
        for (i, server) in text.split(',').map(str::trim).filter(|s| !s.is_empty()).enumerate() {
            let server =
                if server.contains("://") { server.to_owned() } else { format!("nats://{server}") };
            let parsed = Url::parse(&server).ok().filter(|url| {
                matches!(url.scheme(), "nats" | "tls")
                    && url.host_str().is_some_and(|h| !h.is_empty())
            });
            let Some(url) = parsed else {
                self.wrong(
                    &path,
                    format!(
                        "server {} of the list is not understood: write nats://host:4222 or \
                         tls://host:4222",
                        i + 1
                    ),
                );
                continue;
            };
            let mine = (!url.username().is_empty())
                .then(|| (url.username().to_owned(), url.password().map(str::to_owned)));
            if i > 0 && mine.is_some() && mine != login {
                self.wrong(&path, "the servers have different logins; give one for all of them");
            }
            login = login.or(mine);
        }
        login.map(|(_, password)| Login { has_password: password.is_some() })
    }

    fn amqp(&mut self, name: &str, raw: &RawTransport) -> AmqpOptions {
        let table = ["transports", name];
        let path = ["transports", name, "url"];
        let (url, text) = self.url(name, raw, "amqp://user:password@127.0.0.1:5672/%2f");
        if let Some(text) = text {
            let fits = Url::parse(&text).is_ok_and(|url| {
                matches!(url.scheme(), "amqp" | "amqps")
                    && url.host_str().is_some_and(|host| !host.is_empty())
            });
            if !fits {
                self.wrong(
                    &path,
                    "not a RabbitMQ URL: write amqp://user:password@host:5672/vhost or amqps://…, \
                     with special characters percent-encoded (the vhost `/` is %2f)",
                );
            } else if raw.tls.is_some() && !text.starts_with("amqps:") {
                self.wrong(
                    &["transports", name, "tls"],
                    "the URL says amqp, which is without TLS; write amqps://, or take this out",
                );
            } else if Url::parse(&text).is_ok_and(|url| {
                url.query_pairs().any(|(key, value)| {
                    key == "auth_mechanism" && value.eq_ignore_ascii_case("external")
                })
            }) && raw.tls.as_ref().is_none_or(|tls| tls.cert_file.is_none())
            {
                self.wrong(
                    &path,
                    "auth_mechanism=external logs in by a client certificate: set tls.cert_file \
                     and tls.key_file",
                );
            }
        }
        AmqpOptions {
            url,
            password: self.secret(
                &table,
                "password",
                raw.password.as_ref(),
                raw.password_file.as_ref(),
            ),
            tls: self.tls(name, raw.tls.as_ref(), Some("for RabbitMQ")),
            timeout: self.span(
                &["transports", name, "timeout"],
                raw.timeout,
                Duration::from_secs(10),
            ),
            heartbeat: self.span(
                &["transports", name, "heartbeat"],
                raw.heartbeat,
                Duration::from_secs(10),
            ),
        }
    }

    fn webhook(&mut self, name: &str, raw: &RawTransport) -> WebhookOptions {
        let table = ["transports", name];
        let key = |key| ["transports", name, key];
        let (url, text) = self.url(name, raw, "https://crm.example/hooks");
        let token = self.secret(&table, "token", raw.token.as_ref(), raw.token_file.as_ref());
        if let Some(text) = text {
            match Url::parse(&text).ok().filter(|url| matches!(url.scheme(), "http" | "https")) {
                None => self.wrong(
                    &key("url"),
                    "not a web address: write it as in https://crm.example/hooks",
                ),
                Some(parsed) => {
                    if raw.tls.is_some() && parsed.scheme() == "http" {
                        self.wrong(
                            &key("tls"),
                            "the URL says http, which is without TLS; write https://, or take \
                             this out",
                        );
                    }
                    if raw.refuse_private == Some(true)
                        && let Err(error) = check_host(&parsed)
                    {
                        self.wrong(&key("url"), error.to_string());
                    }
                    let login = !parsed.username().is_empty() || parsed.password().is_some();
                    if login && token.is_some() {
                        self.wrong(
                            &key("token"),
                            "given beside a login in the URL; a request has one of them",
                        );
                    }
                }
            }
        }
        if let Some(token) = &token
            && token.read().is_ok_and(|text| text.trim().contains(char::is_control))
        {
            self.wrong(&key("token"), "has a line break or control character; write it anew");
        }
        let secret = self.secret(&table, "secret", raw.secret.as_ref(), raw.secret_file.as_ref());
        if let Some(secret) = &secret
            && let Ok(text) = secret.read()
            && !text.trim().is_empty()
            && let Err(error) = check_secret(&text)
        {
            let given = if raw.secret_file.is_some() { "secret_file" } else { "secret" };
            self.wrong(&key(given), error.to_string());
        }
        WebhookOptions {
            secret,
            token,
            tls: self.tls(name, raw.tls.as_ref(), Some("for a webhook")),
            timeout: self.span(&key("timeout"), raw.timeout, Duration::from_secs(10)),
            batch: self.number(&key("batch"), raw.batch, 1, 1..=1_000),
            refuse_private: raw.refuse_private.unwrap_or(false),
            ..WebhookOptions::new(url)
        }
    }

    /// `elsewhere` is what it is for, where it is not NATS, which alone knows `first`.
    fn tls(
        &mut self,
        name: &str,
        raw: Option<&RawTls>,
        elsewhere: Option<&str>,
    ) -> Option<TlsOptions> {
        let raw = raw?;
        let table = ["transports", name, "tls"];
        if let Some(place) = elsewhere {
            self.only(&table, &[&["ca_file", "cert_file", "key_file"]], place);
        }
        let files = (raw.ca_file.as_ref(), raw.cert_file.as_ref(), raw.key_file.as_ref());
        let options = self.client_tls(&table, files.0, files.1, files.2);
        Some(TlsOptions { first: raw.first.unwrap_or(false), ..options })
    }
}

/// The login that stands in a NATS URL: a user with a password, or a token.
struct Login {
    has_password: bool,
}
