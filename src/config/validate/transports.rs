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
        let (_, url) = self.url(name, raw, "nats://127.0.0.1:4222");
        let servers = self.nats_servers(name, url.as_deref().unwrap_or_default());
        let mut options = NatsOptions {
            url: servers.url,
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
        // What stands in the URL gives way to the keys: that is how a secret is moved out.
        if options.user.is_none() && options.token.is_none() {
            match servers.login {
                Some((user, Some(password))) => {
                    options.user = Some(user);
                    options.password.get_or_insert(Secret::Inline(password));
                }
                Some((user, None)) if options.password.is_some() => options.user = Some(user),
                Some((token, None)) => options.token = Some(Secret::Inline(token)),
                None => {}
            }
        }
        let ways = [
            ("credentials_file", options.credentials_file.is_some()),
            ("nkey", options.nkey.is_some()),
            ("token", options.token.is_some()),
            ("user", options.user.is_some()),
        ];
        let given: Vec<_> = ways.iter().filter(|way| way.1).map(|way| way.0).collect();
        if given.len() > 1 {
            self.wrong(
                &table,
                format!("several ways to log in ({}); keep one of them", given.join(", ")),
            );
        }
        if options.user.is_some() != options.password.is_some() {
            let (have, lack) =
                if options.user.is_some() { ("user", "password") } else { ("password", "user") };
            self.missing(&["transports", name, lack], &format!("`{have}` is given without it"));
        }
        options
    }

    /// Takes the login out of the URLs, so that what is kept as text holds no secret.
    fn nats_servers(&mut self, name: &str, text: &str) -> Servers {
        let path = ["transports", name, "url"];
        let mut login = None;
        let mut urls = Vec::new();
        for (i, server) in text.split(',').map(str::trim).filter(|s| !s.is_empty()).enumerate() {
            let server =
                if server.contains("://") { server.to_owned() } else { format!("nats://{server}") };
            let parsed = Url::parse(&server).ok().filter(|url| {
                matches!(url.scheme(), "nats" | "tls")
                    && url.host_str().is_some_and(|h| !h.is_empty())
            });
            let Some(mut url) = parsed else {
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
                .then(|| (decoded(url.username()), url.password().map(decoded)));
            if i > 0 && mine.is_some() && mine != login {
                self.wrong(&path, "the servers have different logins; give one for all of them");
            }
            login = login.or(mine);
            // Neither fails for a URL that has a host.
            let _ = url.set_username("");
            let _ = url.set_password(None);
            urls.push(url.to_string());
        }
        Servers { url: urls.join(","), login }
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
        let key = |key| ["transports", name, "tls", key];
        if let Some(place) = elsewhere {
            self.only(&table, &[&["ca_file", "cert_file", "key_file"]], place);
        }
        if raw.cert_file.is_some() != raw.key_file.is_some() {
            let lack = if raw.cert_file.is_some() { "key_file" } else { "cert_file" };
            self.missing(&key(lack), "a client certificate needs both cert_file and key_file");
        }
        Some(TlsOptions {
            ca_file: self.existing_file(&key("ca_file"), raw.ca_file.as_ref()),
            cert_file: self.existing_file(&key("cert_file"), raw.cert_file.as_ref()),
            key_file: self.existing_file(&key("key_file"), raw.key_file.as_ref()),
            first: raw.first.unwrap_or(false),
        })
    }
}

/// The servers of a NATS URL, and the login that stood in it: a user with a password, or a
/// token.
struct Servers {
    url: String,
    login: Option<(String, Option<String>)>,
}

/// Percent-decoding, for logins in URLs.
fn decoded(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, tail)) = rest.split_first() {
        let hex = |at: usize| tail.get(at).and_then(|b| char::from(*b).to_digit(16));
        match (byte, hex(0), hex(1)) {
            (b'%', Some(high), Some(low)) => {
                // Two hex digits are at most 255.
                bytes.push(u8::try_from(high * 16 + low).unwrap_or(byte));
                rest = &tail[2..];
            }
            _ => {
                bytes.push(byte);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}
