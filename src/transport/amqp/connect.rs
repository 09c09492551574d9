//! One connection to the broker: made within a deadline, closed within one, never left behind.
//!
//! The driver's own recovery is off. Each connection here is a generation of its own; whoever
//! owns it builds the next one, with a [`Backoff`].

use std::{
    hash::{BuildHasher, RandomState},
    io,
    net::{Shutdown, TcpStream},
    os::fd::AsFd,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use lapin::{
    Connection, ConnectionProperties, ErrorKind,
    tcp::{AsyncTcpStream, RustlsConnector},
    uri::{AMQPScheme, AMQPUri, SASLMechanism},
};
use tokio_rustls::TlsConnector;
use url::Url;

use super::AmqpOptions;
use crate::{secret::Secret, tls, transport::TransportError};

/// Why a connection, or what is asked for on it, is not to be had.
#[derive(Debug, Clone)]
pub(super) enum Failure {
    /// The broker is away, or does not answer; trying again may help.
    Unavailable(String),
    /// What is configured does not fit what is there.
    Misconfigured(String),
}

impl Failure {
    pub(super) fn text(&self) -> &str {
        match self {
            Self::Unavailable(text) | Self::Misconfigured(text) => text,
        }
    }
}

impl From<Failure> for TransportError {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Unavailable(text) => Self::Unavailable(text),
            Failure::Misconfigured(text) => Self::Misconfigured(text),
        }
    }
}

/// What the broker or the driver says, without the driver's own words around it.
pub(super) fn text_of(error: &lapin::Error) -> String {
    match error.kind() {
        ErrorKind::ProtocolError(error) => error.get_message().to_string(),
        ErrorKind::IOError(error) => error.to_string(),
        _ => error.to_string(),
    }
}

/// The reply code of an error that the broker sent.
pub(super) fn code_of(error: &lapin::Error) -> Option<u16> {
    match error.kind() {
        ErrorKind::ProtocolError(error) => Some(error.get_id()),
        _ => None,
    }
}

/// Reply codes that matter here.
pub(super) mod code {
    pub(crate) const CONTENT_TOO_LARGE: u16 = 311;
    pub(crate) const ACCESS_REFUSED: u16 = 403;
    pub(crate) const NOT_FOUND: u16 = 404;
    pub(crate) const RESOURCE_LOCKED: u16 = 405;
    pub(crate) const PRECONDITION_FAILED: u16 = 406;
    pub(crate) const NOT_ALLOWED: u16 = 530;
    pub(crate) const NOT_IMPLEMENTED: u16 = 540;
}

/// Makes connections.
#[derive(Debug)]
pub(super) struct Connector {
    options: AmqpOptions,
}

impl Connector {
    pub(super) fn new(options: AmqpOptions) -> Self {
        Self { options }
    }

    pub(super) fn timeout(&self) -> Duration {
        self.options.timeout
    }

    pub(super) fn heartbeat(&self) -> Duration {
        self.options.heartbeat
    }

    /// The address, with the password read anew, so that a rotated one is picked up.
    pub(super) fn uri(&self) -> Result<AMQPUri, Failure> {
        let url =
            self.options.url.read().map_err(|error| Failure::Unavailable(error.to_string()))?;
        // The parser's own error may quote the URL, and with it the password.
        let wrong = || {
            Failure::Misconfigured(
                "the url is no AMQP address: expected amqp://user:password@host:5672/vhost, with \
                 special characters percent-encoded"
                    .to_owned(),
            )
        };
        let url = url.trim();
        let mut uri: AMQPUri = url.parse().map_err(|_| wrong())?;
        let url = Url::parse(url).map_err(|_| wrong())?;
        if let Some(url::Host::Ipv6(address)) = url.host() {
            // The parser takes only names, and would go to localhost.
            uri.authority.host = address.to_string();
        }
        let certificate = self.options.tls.as_ref().is_some_and(|tls| tls.cert_file.is_some());
        if certificate && url.username().is_empty() && uri.query.auth_mechanism.is_none() {
            // Nobody gives a certificate in order to be `guest`, whom a URL without a user means.
            uri.query.auth_mechanism = Some(SASLMechanism::External);
        }
        if let Some(password) = &self.options.password {
            uri.authority.userinfo.password =
                password.read().map_err(|error| Failure::Unavailable(error.to_string()))?;
        }
        if uri.query.heartbeat.is_none() {
            let seconds = self.options.heartbeat.as_secs().max(1);
            uri.query.heartbeat = Some(u16::try_from(seconds).unwrap_or(u16::MAX));
        }
        Ok(uri)
    }

    /// What to handshake with; files are read anew, so that renewed ones are picked up.
    fn tls(&self, scheme: &AMQPScheme) -> Result<Option<RustlsConnector>, Failure> {
        match scheme {
            AMQPScheme::AMQP => Ok(None),
            AMQPScheme::AMQPS => {
                let options = self.options.tls.clone().unwrap_or_default();
                // Files in the middle of a rotation may not fit; the next attempt reads them again.
                let config = tls::client_config(&options)
                    .map_err(|error| Failure::Unavailable(error.to_string()))?;
                Ok(Some(config.into()))
            }
        }
    }

    /// Connects, within the configured time.
    ///
    /// *Cancel safe*: dropped, it takes the half-made connection and the driver's thread with it.
    pub(super) async fn connect(&self, name: &str) -> Result<Link, Failure> {
        let uri = self.uri()?;
        let connector = self.tls(&uri.scheme)?;
        let shown = uri.clone();
        let timeout = self.options.timeout;
        let runtime = lapin::runtime::default_runtime()
            .map_err(|error| Failure::Unavailable(text_of(&error)))?;
        let properties = ConnectionProperties::default()
            .with_connection_name(format!("pulsebus {name}").into_bytes().into());

        let socket = Socket::default();
        let cut = CutOnDrop(Some(socket.clone()));
        let dialled = socket.clone();
        // In place, where the driver's signature tells the types of its runtime.
        let connecting = Connection::connector(
            uri,
            runtime,
            async move |uri: AMQPUri, runtime| {
                let address = (uri.authority.host.clone(), uri.authority.port);
                let addresses = tokio::net::lookup_host(address).await?.collect::<Vec<_>>();
                let connecting = AsyncTcpStream::connect(&runtime, addresses);
                let stream = tokio::time::timeout(timeout, connecting)
                    .await
                    .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
                if let AsyncTcpStream::Plain(plain) = &stream {
                    dialled.set(plain.get_ref().as_fd().try_clone_to_owned()?.into())?;
                }
                match &connector {
                    None => Ok(stream),
                    Some(connector) => {
                        Ok(stream.into_rustls(connector, &uri.authority.host).await?)
                    }
                }
            },
            properties,
        );
        let started = Instant::now();
        let place = format!("{}:{}", shown.authority.host, shown.authority.port);
        let failure = match tokio::time::timeout(timeout, connecting).await {
            Ok(Ok(connection)) => {
                cut.disarm();
                return Ok(Link { connection, socket, timeout });
            }
            Ok(Err(error)) if code_of(&error).is_some() => {
                return Err(self.refused(&error, &place, &shown));
            }
            Ok(Err(error)) => self.broken(&error, &place, &shown.scheme),
            Err(_) => format!("RabbitMQ at {place} did not answer within {timeout:?}"),
        };
        Err(Failure::Unavailable(match shown.scheme {
            AMQPScheme::AMQP if speaks_tls(&shown, started + timeout).await => {
                format!("{place} speaks TLS; write amqps:// in the url")
            }
            AMQPScheme::AMQP | AMQPScheme::AMQPS => failure,
        }))
    }

    /// Why there is no connection where the broker has not said so.
    fn broken(&self, error: &lapin::Error, place: &str, scheme: &AMQPScheme) -> String {
        if let Some(reason) = tls::explain(error) {
            return format!("no TLS with RabbitMQ at {place}: {reason}");
        }
        let text = text_of(error);
        let options = self.options.tls.clone().unwrap_or_default();
        match tls::hung_up(error, &options).filter(|_| *scheme == AMQPScheme::AMQPS) {
            Some(hint) => format!("cannot connect to RabbitMQ at {place}: {text}; {hint}"),
            None => format!("cannot connect to RabbitMQ at {place}: {text}"),
        }
    }

    fn refused(&self, error: &lapin::Error, place: &str, uri: &AMQPUri) -> Failure {
        let text = text_of(error);
        match code_of(error) {
            Some(code::NOT_ALLOWED) => Failure::Misconfigured(format!(
                "RabbitMQ at {place} does not let us into virtual host `{}`: {text}",
                uri.vhost
            )),
            Some(code::ACCESS_REFUSED)
                if uri.query.auth_mechanism == Some(SASLMechanism::External) =>
            {
                Failure::Unavailable(format!(
                    "RabbitMQ at {place} refuses the login by client certificate (EXTERNAL); \
                     check that it has rabbitmq_auth_mechanism_ssl and a user of the \
                     certificate's name: {text}"
                ))
            }
            Some(code::ACCESS_REFUSED) => Failure::Unavailable(format!(
                "RabbitMQ at {place} refuses these credentials; check user {} and {}: {text}",
                uri.authority.userinfo.username,
                match &self.options.password {
                    Some(Secret::File(path)) => format!("the password in {}", path.display()),
                    Some(Secret::Inline(_)) => "its password".to_owned(),
                    None => "the password in the url".to_owned(),
                }
            )),
            _ => Failure::Unavailable(format!("cannot connect to RabbitMQ at {place}: {text}")),
        }
    }
}

/// How long to look for TLS where plaintext found nothing, at least.
const PROBE: Duration = Duration::from_secs(1);

/// Whether a server answers to a TLS handshake: a reason why it does not to plaintext.
async fn speaks_tls(uri: &AMQPUri, deadline: Instant) -> bool {
    let Ok(config) = tls::client_config(&tls::TlsOptions::default()) else { return false };
    let Ok(name) = uri.authority.host.clone().try_into() else { return false };
    let address = (uri.authority.host.as_str(), uri.authority.port);
    let shaking = async {
        let stream = tokio::net::TcpStream::connect(address).await.ok()?;
        match TlsConnector::from(Arc::new(config)).connect(name, stream).await {
            Ok(_) => Some(()),
            // Whatever is wrong with a certificate, one was shown.
            Err(error) => match error.get_ref()?.downcast_ref::<rustls::Error>()? {
                rustls::Error::InvalidMessage(_) => None,
                _ => Some(()),
            },
        }
    };
    let patience = deadline.saturating_duration_since(Instant::now()).max(PROBE);
    matches!(tokio::time::timeout(patience, shaking).await, Ok(Some(())))
}

/// A connection, open.
pub(super) struct Link {
    pub(super) connection: Connection,
    socket: Socket,
    timeout: Duration,
}

impl Link {
    /// Closes it; cuts the line where the broker does not answer in time. Says whether the
    /// broker knows that it is closed: only then has it put back what was not settled.
    pub(super) async fn close(self) -> bool {
        if !self.connection.status().connected() {
            // A broker that closed it, or crashed, has let go; after a missed heartbeat or a
            // reset nobody knows.
            self.socket.cut();
            return false;
        }
        let closing = self.connection.close(200, "pulsebus closes".into());
        let closed = tokio::time::timeout(self.timeout, closing).await;
        self.socket.cut();
        matches!(closed, Ok(Ok(())))
    }
}

impl Link {
    /// Ends it without a word: a blocked connection writes nothing, not even that it closes.
    pub(super) fn cut(self) {
        self.socket.cut();
    }
}

/// A second hold on a connection's socket. The driver runs each connection on a thread of its
/// own, which ends when its socket does; it has no other way to be stopped half way.
#[derive(Debug, Clone, Default)]
struct Socket(Arc<Mutex<SocketState>>);

#[derive(Debug, Default)]
enum SocketState {
    #[default]
    Dialling,
    Open(TcpStream),
    Cut,
}

impl Socket {
    fn set(&self, stream: TcpStream) -> io::Result<()> {
        // Acks and small publishes are not to wait for the next segment's acknowledgement.
        stream.set_nodelay(true)?;
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if matches!(*state, SocketState::Cut) {
            return Err(io::ErrorKind::ConnectionAborted.into());
        }
        *state = SocketState::Open(stream);
        Ok(())
    }

    fn cut(&self) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let SocketState::Open(stream) = &*state {
            // Fails where the other side was faster, which is as well.
            let _ = stream.shutdown(Shutdown::Both);
        }
        *state = SocketState::Cut;
    }
}

struct CutOnDrop(Option<Socket>);

impl CutOnDrop {
    fn disarm(mut self) {
        self.0 = None;
    }
}

impl Drop for CutOnDrop {
    fn drop(&mut self) {
        if let Some(socket) = &self.0 {
            socket.cut();
        }
    }
}

/// Delays between attempts: doubling, the last half of each at random.
#[derive(Debug)]
pub(super) struct Backoff {
    next: Duration,
}

impl Backoff {
    const FIRST: Duration = Duration::from_millis(200);

    pub(super) const fn new() -> Self {
        Self { next: Self::FIRST }
    }

    pub(super) fn reset(&mut self) {
        self.next = Self::FIRST;
    }

    /// The next delay, `most` at most.
    pub(super) fn delay(&mut self, most: Duration) -> Duration {
        let delay = self.next.min(most);
        self.next = (self.next * 2).min(Duration::from_secs(60));
        let random = u32::try_from(RandomState::new().hash_one(0_u8) >> 33).unwrap_or(0);
        let fraction = f64::from(random) / f64::from(1_u32 << 31);
        delay.mul_f64(0.5 + fraction.clamp(0.0, 1.0) / 2.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_delay_doubles_within_its_bounds() {
        let mut backoff = Backoff::new();
        let most = Duration::from_secs(5);
        for step in 0..20_u32 {
            let whole = (Backoff::FIRST * 2_u32.pow(step.min(10))).min(most);
            let delay = backoff.delay(most);
            assert!(delay >= whole / 2 && delay <= whole, "{step}: {delay:?}");
        }
    }
}
