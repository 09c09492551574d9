//! Connections to NATS: one client for each connection, and a new one after each loss.
//!
//! async-nats can reconnect by itself, and what was queued in a client then goes out on the new
//! connection, behind what has been published again in the meantime. So a client here lives as
//! long as its first connection: [`Live::down`] says when that has ended, and the next call of
//! [`Link::live`] makes a new client, with the secrets as they are then.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use async_nats::{
    Client, ConnectError, ConnectErrorKind, ConnectOptions, Event, ServerAddr, ServerError,
};
use tokio::{
    sync::{broadcast, watch},
    time::timeout,
};

use super::NatsOptions;
use crate::{
    secret::Secret,
    tls,
    transport::{SourceState, TransportError},
};

/// A peer that says nothing is given up after three of these.
const PING_INTERVAL: Duration = Duration::from_secs(2);

/// Nothing ever listens there: where a client is sent that must not connect again.
const NOWHERE: &str = "nats://127.0.0.1:0";

/// How a reason begins where the login was refused.
pub(super) const REFUSED: &str = "the server refused the credentials";

/// What stands in the way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Fault {
    /// It may pass by itself.
    Away(String),
    /// The same, and the connection is not to be trusted any more: it looks alive and says
    /// nothing.
    Silent(String),
    /// A person has to change something.
    Misconfigured(String),
}

impl Fault {
    pub(super) fn into_state(self) -> SourceState {
        match self {
            Self::Away(reason) | Self::Silent(reason) => SourceState::Reconnecting(reason),
            Self::Misconfigured(reason) => SourceState::Misconfigured(reason),
        }
    }
}

impl From<Fault> for TransportError {
    fn from(fault: Fault) -> Self {
        match fault {
            Fault::Away(reason) | Fault::Silent(reason) => Self::Unavailable(reason),
            Fault::Misconfigured(reason) => Self::Misconfigured(reason),
        }
    }
}

/// A client and its one connection.
#[derive(Debug, Clone)]
pub(super) struct Live {
    pub(super) client: Client,
    down: watch::Receiver<Option<Arc<str>>>,
    refused: broadcast::Sender<Arc<str>>,
    deaf: Arc<AtomicBool>,
}

impl Live {
    pub(super) fn is_down(&self) -> bool {
        // The sender is gone where the client's own task has ended, for whatever reason.
        self.down.has_changed().is_err() || self.down.borrow().is_some()
    }

    /// Waits until the connection is lost, and says why.
    pub(super) async fn down(&self) -> String {
        match self.down.clone().wait_for(Option::is_some).await {
            Ok(reason) => reason.as_deref().unwrap_or_default().to_owned(),
            Err(_) => "the connection to NATS ended".to_owned(),
        }
    }

    /// Whether the connection ended because answers may not come to us.
    pub(super) fn is_deaf(&self) -> bool {
        self.deaf.load(Ordering::Relaxed)
    }

    /// What the server does not let this user publish to, from now on.
    pub(super) fn refusals(&self) -> Refusals {
        Refusals(self.refused.subscribe())
    }
}

/// Subjects that the server refuses to take anything for. It does not answer such a message: it
/// says so apart, and names nothing but the subject.
#[derive(Debug)]
pub(super) struct Refusals(broadcast::Receiver<Arc<str>>);

impl Refusals {
    /// Remembered for who does not look at once.
    const MOST: usize = 1_024;

    /// The next one. *Cancel safe*.
    pub(super) async fn next(&mut self) -> Arc<str> {
        loop {
            match self.0.recv().await {
                Ok(subject) => return subject,
                Err(broadcast::error::RecvError::Lagged(_)) => {}
                // The end of the connection is told elsewhere.
                Err(broadcast::error::RecvError::Closed) => std::future::pending().await,
            }
        }
    }

    /// Waits until it is this subject.
    pub(super) async fn of(&mut self, subject: &str) {
        while *self.next().await != *subject {}
    }
}

/// Why a message was not taken, and what to do about it.
pub(super) fn denied(subject: &str) -> String {
    format!(
        "no permission to publish to `{subject}`: let the server's configuration allow it to \
         this user"
    )
}

/// What the server says it does not permit.
#[derive(Debug, PartialEq, Eq)]
enum Violation {
    Publish(String),
    Subscribe(String),
}

impl Violation {
    /// Reads `Permissions Violation for Publish to "a.b"` and its like; the subject is quoted as
    /// Go quotes, which for a subject is as JSON does.
    fn parse(error: &ServerError) -> Option<Self> {
        let ServerError::Other(text) = error else { return None };
        let (head, _) = text.split_once('"')?;
        let quoted = text.get(head.len()..)?;
        let subject =
            serde_json::Deserializer::from_str(quoted).into_iter::<String>().next()?.ok()?;
        match head.trim_end().to_ascii_lowercase().as_str() {
            "permissions violation for publish to" => Some(Self::Publish(subject)),
            "permissions violation for subscription to" => Some(Self::Subscribe(subject)),
            _ => None,
        }
    }
}

/// Makes connections, one at a time, and keeps the last for everybody who shares it.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) options: NatsOptions,
    purpose: &'static str,
    current: watch::Sender<Option<Live>>,
    connecting: tokio::sync::Mutex<()>,
}

impl Link {
    pub(super) fn new(options: NatsOptions, purpose: &'static str) -> Arc<Self> {
        Arc::new(Self {
            options,
            purpose,
            current: watch::Sender::new(None),
            connecting: tokio::sync::Mutex::default(),
        })
    }

    /// The connection there is, if it still is.
    pub(super) fn latest(&self) -> Option<Live> {
        self.current.borrow().as_ref().filter(|live| !live.is_down()).cloned()
    }

    /// The connection there is, or a new one.
    pub(super) async fn live(&self) -> Result<Live, Fault> {
        let _turn = self.connecting.lock().await;
        if let Some(live) = self.latest() {
            return Ok(live);
        }
        let live = self.connect().await?;
        self.current.send_replace(Some(live.clone()));
        Ok(live)
    }

    /// Gives up a connection that looks alive and does not answer.
    pub(super) fn discard(&self, live: &Live) {
        self.current.send_if_modified(|current| {
            let same = current.as_ref().is_some_and(|c| c.down.same_channel(&live.down));
            if same {
                *current = None;
            }
            same
        });
    }

    async fn connect(&self) -> Result<Live, Fault> {
        // Read anew, so that a rotated one is picked up.
        let url = self.options.url.read().map_err(|error| Fault::Away(error.to_string()))?;
        let mut servers = servers(&url)?;
        let first = (super::random() % servers.len() as u64) as usize;
        servers.rotate_left(first);
        let mut last = String::new();
        for server in servers {
            // Twice: a name may resolve to several addresses, and looking it up takes time too.
            let patience = self.options.timeout * 2;
            match timeout(patience, self.connect_to(&server)).await {
                Ok(Ok(live)) => return Ok(live),
                Ok(Err(Fault::Away(reason) | Fault::Silent(reason))) => {
                    last = format!("{}: {reason}", server.shown);
                }
                Ok(Err(fault @ Fault::Misconfigured(_))) => return Err(fault),
                Err(_) => last = format!("{}: no answer within {patience:?}", server.shown),
            }
        }
        Err(Fault::Away(format!("cannot connect to {last}")))
    }

    async fn connect_to(&self, server: &Server) -> Result<Live, Fault> {
        let (sender, down) = watch::channel(None::<Arc<str>>);
        let refused = broadcast::Sender::new(Refusals::MOST);
        let deaf = Arc::new(AtomicBool::new(false));
        let (told, warned, without_ears) = (refused.clone(), AtomicBool::new(false), deaf.clone());
        let options = self.client_options(server).await?.event_callback(move |event| {
            let reason: Option<Arc<str>> = match event {
                Event::Disconnected => Some("the connection to NATS was lost".into()),
                Event::Closed => Some("the connection to NATS was closed".into()),
                Event::ServerError(error) => {
                    let violation = Violation::parse(&error);
                    // One for each message that it refuses may come.
                    if violation.is_none() || !warned.swap(true, Ordering::Relaxed) {
                        tracing::warn!(%error, "nats-server reports an error");
                    }
                    match violation {
                        Some(Violation::Publish(subject)) => {
                            // Nobody waits where everybody has gone.
                            let _ = told.send(subject.into());
                            None
                        }
                        // Only inboxes are subscribed to, and no answer will come.
                        Some(Violation::Subscribe(subject)) => {
                            without_ears.store(true, Ordering::Relaxed);
                            let reason = format!(
                                "no permission to subscribe to `{subject}`, where answers come: \
                                 let the server's configuration allow `_INBOX.>` to this user"
                            );
                            Some(reason.into())
                        }
                        None => None,
                    }
                }
                Event::SlowConsumer(_) => {
                    // A delivery was dropped: the consumer sees the gap and reads it again.
                    tracing::warn!("a NATS subscription overflowed");
                    None
                }
                _ => None,
            };
            if reason.is_some() {
                sender.send_replace(reason);
            }
            std::future::ready(())
        });
        let client = options
            .connect(server.address.clone())
            .await
            .map_err(|error| Fault::Away(self.options.reason(server, &error)))?;
        let nowhere: ServerAddr =
            NOWHERE.parse().map_err(|_| Fault::Away("no address to retire to".to_owned()))?;
        client
            .set_server_pool(nowhere)
            .await
            .map_err(|error| Fault::Away(format!("the connection was lost at once: {error}")))?;
        Ok(Live { client, down, refused, deaf })
    }

    async fn client_options(&self, server: &Server) -> Result<ConnectOptions, Fault> {
        let unreadable = |error: std::io::Error| Fault::Away(error.to_string());
        let mut options = ConnectOptions::new()
            .name(format!("pulsebus {}", self.purpose))
            .connection_timeout(self.options.timeout)
            .request_timeout(Some(self.options.timeout))
            .ping_interval(PING_INTERVAL)
            .max_reconnects(1)
            .ignore_discovered_servers()
            .skip_subject_validation(true);
        let tls = self.options.tls.clone().unwrap_or_default();
        // Where a server insists on TLS that nobody asked for, the driver holds it to the system's
        // authorities, and reads them only then: that takes long.
        if self.options.tls.is_some() || self.options.wants_tls(server) {
            // Files in the middle of a rotation may not fit; the next attempt reads them again.
            let config =
                tls::client_config(&tls).map_err(|error| Fault::Away(error.to_string()))?;
            options = options.tls_client_config(config);
        }
        if self.options.wants_tls(server) {
            options = options.require_tls(true);
        }
        if tls.first {
            options = options.tls_first();
        }
        if let Some(path) = &self.options.credentials_file {
            let creds = tokio::fs::read_to_string(path)
                .await
                .map_err(|error| Fault::Away(format!("cannot read {}: {error}", path.display())))?;
            return options.credentials(&creds).map_err(|_| {
                Fault::Misconfigured(format!("{} is no credentials file", path.display()))
            });
        }
        if let Some(seed) = &self.options.nkey {
            return Ok(options.nkey(seed.read().map_err(unreadable)?.trim().to_owned()));
        }
        if let Some(token) = &self.options.token {
            return Ok(options.token(token.read().map_err(unreadable)?));
        }
        if let Some(user) = &self.options.user {
            let password = match &self.options.password {
                Some(password) => password.read().map_err(unreadable)?,
                None => String::new(),
            };
            return Ok(options.user_and_password(user.clone(), password));
        }
        Ok(match &server.login {
            Some((user, in_url)) => match (&self.options.password, in_url) {
                (Some(password), _) => {
                    options.user_and_password(user.clone(), password.read().map_err(unreadable)?)
                }
                (None, Some(password)) => options.user_and_password(user.clone(), password.clone()),
                (None, None) => options.token(user.clone()),
            },
            None => options,
        })
    }
}

impl NatsOptions {
    /// Whether nothing may be said in plaintext.
    fn wants_tls(&self, server: &Server) -> bool {
        self.tls.is_some() || server.address.tls_required()
    }

    /// Why there is no connection, in words for whoever set it up.
    fn reason(&self, server: &Server, error: &ConnectError) -> String {
        let first = self.tls.as_ref().is_some_and(|tls| tls.first);
        match error.kind() {
            ConnectErrorKind::AuthorizationViolation => {
                format!("{REFUSED}: {}", self.login(server))
            }
            ConnectErrorKind::Authentication => {
                format!("cannot log in with {}: it is no seed of a key (SU…)", self.login(server))
            }
            ConnectErrorKind::TimedOut if !first => "no answer in time; a server with \
                 handshake_first waits for tls.first = true"
                .to_owned(),
            ConnectErrorKind::TimedOut => "no answer in time".to_owned(),
            _ => match tls::explain(error) {
                Some(reason) if first => format!("{reason} (tls.first is set)"),
                Some(reason) => reason,
                None if self.wants_tls(server) => {
                    let options = self.tls.clone().unwrap_or_default();
                    match tls::hung_up(error, &options) {
                        Some(hint) => format!("{error}; {hint}"),
                        None => error.to_string(),
                    }
                }
                None => error.to_string(),
            },
        }
    }

    /// Who is logged in, and where the secret stands; never the secret.
    fn login(&self, server: &Server) -> String {
        let at = |secret: &Secret| match secret {
            Secret::Inline(_) => "in the configuration".to_owned(),
            Secret::File(path) => format!("in {}", path.display()),
        };
        if let Some(path) = &self.credentials_file {
            return format!("the user credentials in {}", path.display());
        }
        if let Some(seed) = &self.nkey {
            return format!("the nkey {}", at(seed));
        }
        if let Some(token) = &self.token {
            return format!("the token {}", at(token));
        }
        let user = self.user.as_ref().or(server.login.as_ref().map(|(user, _)| user));
        match (user, &self.password, &server.login) {
            (Some(user), Some(password), _) => {
                format!("user {user}, the password {}", at(password))
            }
            (_, None, Some((user, Some(_)))) => format!("user {user}, the password in the url"),
            (_, None, Some((_, None))) => "the token in the url".to_owned(),
            _ if self.tls.as_ref().is_some_and(|tls| tls.cert_file.is_some()) => {
                "the client certificate, and no login besides".to_owned()
            }
            _ => "none are configured; set credentials_file, nkey, token, or user and password"
                .to_owned(),
        }
    }
}

/// One address of the URL list, its userinfo taken out so that no log can show it.
struct Server {
    address: ServerAddr,
    shown: String,
    login: Option<(String, Option<String>)>,
}

fn servers(urls: &str) -> Result<Vec<Server>, Fault> {
    let mut servers = Vec::new();
    for (n, url) in urls.split(',').map(str::trim).filter(|url| !url.is_empty()).enumerate() {
        let (scheme, rest) = url.split_once("://").unwrap_or(("nats", url));
        let (login, host) = match rest.rsplit_once('@') {
            None => (None, rest),
            Some((login, host)) => (
                Some(match login.split_once(':') {
                    Some((user, password)) => (unescape(user), Some(unescape(password))),
                    None => (unescape(login), None),
                }),
                host,
            ),
        };
        let shown = format!("{scheme}://{host}");
        let wrong = || {
            Fault::Misconfigured(format!(
                "address {} in the NATS url is none: expected nats://host:4222 or tls://host:4222",
                n + 1
            ))
        };
        if !matches!(scheme, "nats" | "tls") {
            return Err(wrong());
        }
        let address = shown.parse().map_err(|_| wrong())?;
        servers.push(Server { address, shown, login });
    }
    if servers.is_empty() {
        return Err(Fault::Misconfigured("the NATS url is empty".to_owned()));
    }
    Ok(servers)
}

/// Percent-decoding; what is no escape stays as it is.
fn unescape(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let escape = (bytes[at] == b'%')
            .then(|| text.get(at + 1..at + 3))
            .flatten()
            .and_then(|hex| u8::from_str_radix(hex, 16).ok());
        match escape {
            Some(byte) => {
                out.push(byte);
                at += 3;
            }
            None => {
                out.push(bytes[at]);
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn userinfo_is_used_and_not_shown() {
        let all = servers("nats://us%65r:p%40ss@a:4222, tls://token@b:1,c").unwrap();
        assert_eq!(all[0].login, Some(("user".into(), Some("p@ss".into()))));
        assert_eq!(all[0].shown, "nats://a:4222");
        assert_eq!(all[1].login, Some(("token".into(), None)));
        assert_eq!(all[1].shown, "tls://b:1");
        assert!(all[1].address.tls_required());
        assert_eq!(all[2].shown, "nats://c");
    }

    #[test]
    fn a_violation_is_read_with_its_subject() {
        let read = |text: &str| Violation::parse(&ServerError::Other(text.to_owned()));
        let publish = |subject: &str| Some(Violation::Publish(subject.to_owned()));
        assert_eq!(read(r#"Permissions Violation for Publish to "a.b""#), publish("a.b"));
        assert_eq!(
            read(r#"Permissions Violation for Publish to "a\"\\\u00fc""#),
            publish("a\"\\ü")
        );
        assert_eq!(
            read(r#"Permissions Violation for Subscription to "_INBOX.x.*" using queue "q""#),
            Some(Violation::Subscribe("_INBOX.x.*".to_owned()))
        );
        for other in ["Stale Connection", "Permissions Violation for Publish to \"a", "", "\""] {
            assert_eq!(read(other), None, "{other}");
        }
    }

    #[test]
    fn a_bad_address_is_named_without_its_secret() {
        for url in ["", "http://x", "nats://user:hunter2@[::"] {
            match servers(url) {
                Err(Fault::Misconfigured(reason)) => assert!(!reason.contains("hunter2")),
                _ => panic!("{url} was taken"),
            }
        }
    }
}
