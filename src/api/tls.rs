//! TLS for the listener: handshakes that hold up nobody else, certificates that can be renewed.

use std::{
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::Path,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll, ready},
    time::{Duration, Instant, SystemTime},
};

use rustls::ServerConfig;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    time::Sleep,
};
use tokio_rustls::{Accept, TlsAcceptor, server::TlsStream};

use crate::tls::{ServerTlsOptions, TlsError, explain, server_config};

/// How long a handshake may take.
const HANDSHAKE: Duration = Duration::from_secs(10);

/// How often the files are looked at, at most.
const LOOK: Duration = Duration::from_secs(2);

/// What new connections are to speak: TLS with these certificates, or plain HTTP. Clones are the
/// same.
#[derive(Clone, Default)]
pub(super) struct Tls(Arc<Mutex<Option<ServerTls>>>);

impl Tls {
    /// Counts from the next connection on.
    pub(super) fn set(&self, tls: Option<ServerTls>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = tls;
    }

    /// Begins a handshake where there is to be one; whoever reads or writes goes on with it.
    pub(super) fn stream(&self, stream: TcpStream) -> Stream {
        match &mut *self.0.lock().unwrap_or_else(PoisonError::into_inner) {
            None => Stream::Plain(stream),
            Some(tls) => tls.stream(stream),
        }
    }
}

/// A certificate and key that were read and fit each other. Renewed files are noticed.
pub struct ServerTls {
    options: ServerTlsOptions,
    config: Arc<ServerConfig>,
    stamps: Vec<Stamp>,
    looked: Instant,
}

/// What tells a renewed file from the old one; `None`: it is not there.
type Stamp = Option<(SystemTime, u64, u64)>;

impl std::fmt::Debug for ServerTls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ServerTls").field("options", &self.options).finish_non_exhaustive()
    }
}

impl ServerTls {
    /// Reads the files.
    ///
    /// # Errors
    /// Where they cannot be read, or do not fit each other.
    pub fn open(options: ServerTlsOptions) -> Result<Self, TlsError> {
        // Stamps first: what changes while it is read is read again.
        let stamps = stamps(&options);
        let config = Arc::new(server_config(&options)?);
        Ok(Self { options, config, stamps, looked: Instant::now() })
    }

    /// What new connections handshake with. Where renewed files cannot be used, what there was
    /// stays in use, and that is said once.
    fn current(&mut self) -> Arc<ServerConfig> {
        if self.looked.elapsed() >= LOOK {
            self.looked = Instant::now();
            let stamps = stamps(&self.options);
            if stamps != self.stamps {
                self.stamps = stamps;
                match server_config(&self.options) {
                    Ok(config) => {
                        self.config = Arc::new(config);
                        tracing::info!("the certificate of the HTTP server was renewed");
                    }
                    Err(error) => tracing::error!(
                        %error,
                        "the renewed certificate of the HTTP server cannot be used; the one \
                         before stays in use"
                    ),
                }
            }
        }
        Arc::clone(&self.config)
    }

    fn stream(&mut self, stream: TcpStream) -> Stream {
        let accept = TlsAcceptor::from(self.current()).accept(stream);
        Stream::Shaking(Handshake {
            accept: Box::new(accept),
            late: Box::pin(tokio::time::sleep(HANDSHAKE)),
        })
    }
}

fn stamps(options: &ServerTlsOptions) -> Vec<Stamp> {
    let stamp = |path: &Path| {
        let file = fs::metadata(path).ok()?;
        Some((file.modified().ok()?, file.ino(), file.len()))
    };
    let files = [&options.cert_file, &options.key_file].into_iter().chain(&options.client_ca_file);
    files.map(|path| stamp(path)).collect()
}

/// A connection, with TLS or without.
pub(super) enum Stream {
    Plain(TcpStream),
    Shaking(Handshake),
    Open(Box<TlsStream<TcpStream>>),
    Failed,
}

/// A handshake under way, and when it has taken too long.
pub(super) struct Handshake {
    accept: Box<Accept<TcpStream>>,
    late: Pin<Box<Sleep>>,
}

impl Stream {
    /// Goes on with the handshake, until there is something to read from and to write to.
    fn poll_open(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<&mut dyn Duplex>> {
        if let Self::Shaking(handshake) = self {
            let shaken = match Pin::new(&mut *handshake.accept).poll(cx) {
                Poll::Ready(shaken) => shaken,
                Poll::Pending => {
                    ready!(handshake.late.as_mut().poll(cx));
                    Err(io::ErrorKind::TimedOut.into())
                }
            };
            *self = match shaken {
                Ok(stream) => Self::Open(Box::new(stream)),
                Err(error) => {
                    let reason = explain(&error).unwrap_or_else(|| error.to_string());
                    tracing::debug!(reason, "a TLS handshake failed");
                    *self = Self::Failed;
                    return Poll::Ready(Err(error));
                }
            };
        }
        Poll::Ready(match self {
            Self::Plain(stream) => Ok(stream),
            Self::Open(stream) => Ok(&mut **stream),
            Self::Shaking(_) | Self::Failed => Err(io::ErrorKind::NotConnected.into()),
        })
    }
}

/// Both directions of a connection.
trait Duplex: AsyncRead + AsyncWrite + Unpin {}

impl<T: AsyncRead + AsyncWrite + Unpin> Duplex for T {}

impl AsyncRead for Stream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(ready!(self.poll_open(cx))?).poll_read(cx, buf)
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(ready!(self.poll_open(cx))?).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(ready!(self.poll_open(cx))?).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        // Both kinds of stream can.
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(ready!(self.poll_open(cx))?).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut *self {
            Self::Plain(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Open(stream) => Pin::new(&mut **stream).poll_shutdown(cx),
            Self::Shaking(_) | Self::Failed => Poll::Ready(Ok(())),
        }
    }
}
