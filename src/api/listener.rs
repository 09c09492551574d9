//! A listener that holds a bounded number of connections, each for as long as it is of use;
//! more wait to be accepted.

use std::{
    io,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use axum::serve::Listener;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpListener,
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, Sleep},
};

use super::tls::{Stream, Tls};

pub(super) struct Limited {
    listener: TcpListener,
    places: Arc<Semaphore>,
    patience: Duration,
    tls: Tls,
}

impl Limited {
    /// At most `max` connections, those that handshake included; see [`Connection`] for
    /// `patience`.
    pub(super) fn new(listener: TcpListener, max: usize, patience: Duration, tls: Tls) -> Self {
        let max = max.clamp(1, Semaphore::MAX_PERMITS);
        Self { listener, places: Arc::new(Semaphore::new(max)), patience, tls }
    }
}

impl Listener for Limited {
    type Io = Connection<Stream>;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, SocketAddr) {
        let Ok(place) = Arc::clone(&self.places).acquire_owned().await else {
            // Nobody closes the semaphore.
            return std::future::pending().await;
        };
        let (stream, address) = Listener::accept(&mut self.listener).await;
        // An answer is written in one go; waiting for more to send only delays it.
        let _ = stream.set_nodelay(true);
        (Connection::new(self.tls.stream(stream), self.patience, Some(place)), address)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

/// A connection, and its place among those allowed.
///
/// It fails with [`io::ErrorKind::TimedOut`] once nothing has been written for as long as
/// `patience`, counted from the first byte of a request where one has begun since. So neither a
/// client that has gone nor one that sends a header byte a minute keeps its place; an event
/// stream keeps it by what is written to it.
pub(super) struct Connection<S> {
    stream: S,
    patience: Duration,
    deadline: Pin<Box<Sleep>>,
    /// Whether something was written, or nothing read yet: the next byte begins a request.
    between_requests: bool,
    _place: Option<OwnedSemaphorePermit>,
}

impl<S> Connection<S> {
    fn new(stream: S, patience: Duration, place: Option<OwnedSemaphorePermit>) -> Self {
        let deadline = Box::pin(tokio::time::sleep(patience));
        Self { stream, patience, deadline, between_requests: true, _place: place }
    }

    fn wait_anew(&mut self) {
        self.deadline.as_mut().reset(Instant::now() + self.patience);
    }

    /// For when the stream itself has to wait.
    fn poll_deadline(&mut self, cx: &mut Context<'_>) -> Poll<io::Error> {
        ready!(self.deadline.as_mut().poll(cx));
        Poll::Ready(io::ErrorKind::TimedOut.into())
    }

    fn written(
        &mut self,
        cx: &mut Context<'_>,
        written: Poll<io::Result<usize>>,
    ) -> Poll<io::Result<usize>> {
        if written.is_pending() {
            return self.poll_deadline(cx).map(Err);
        }
        self.between_requests = true;
        self.wait_anew();
        written
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Connection<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let read = Pin::new(&mut self.stream).poll_read(cx, buf);
        if self.between_requests && read.is_ready() {
            self.between_requests = false;
            self.wait_anew();
        }
        // Also while bytes trickle in.
        match self.poll_deadline(cx) {
            Poll::Ready(error) => Poll::Ready(Err(error)),
            Poll::Pending => read,
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Connection<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.written(cx, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        self.written(cx, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    const MINUTE: Duration = Duration::from_secs(60);

    async fn soon<T>(what: impl Future<Output = T>) -> T {
        tokio::time::timeout(2 * MINUTE, what).await.expect("in time")
    }

    #[tokio::test(start_paused = true)]
    async fn G7_a_silent_connection_gives_its_place_back() {
        let (_client, server) = tokio::io::duplex(64);
        let mut connection = Connection::new(server, MINUTE, None);
        let started = Instant::now();
        let error = soon(connection.read(&mut [0; 8])).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert!(started.elapsed() >= MINUTE);
    }

    #[tokio::test(start_paused = true)]
    async fn G7_bytes_that_trickle_in_do_not_keep_a_place() {
        let (mut client, server) = tokio::io::duplex(64);
        let mut connection = Connection::new(server, MINUTE, None);
        let read = async {
            loop {
                if let Err(error) = connection.read(&mut [0; 8]).await {
                    return error;
                }
            }
        };
        let trickle = async {
            loop {
                client.write_all(b"x").await.unwrap();
                tokio::time::sleep(MINUTE / 4).await;
            }
        };
        let error = soon(async {
            tokio::select! { error = read => error, () = trickle => unreachable!() }
        });
        assert_eq!(error.await.kind(), io::ErrorKind::TimedOut);
    }

    #[tokio::test(start_paused = true)]
    async fn G7_a_client_that_does_not_read_gives_its_place_back() {
        let (_client, server) = tokio::io::duplex(4);
        let mut connection = Connection::new(server, MINUTE, None);
        let error = soon(connection.write_all(b"more than fits")).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_written_keeps_a_connection() {
        let (mut client, server) = tokio::io::duplex(64);
        let mut connection = Connection::new(server, MINUTE, None);
        for _ in 0..5 {
            tokio::time::sleep(MINUTE * 3 / 4).await;
            connection.write_all(b":\n").await.unwrap();
            client.read_exact(&mut [0; 2]).await.unwrap();
        }
        // A request that begins late has all of the time.
        tokio::time::sleep(MINUTE * 3 / 4).await;
        client.write_all(b"GET").await.unwrap();
        connection.read_exact(&mut [0; 3]).await.unwrap();
        tokio::time::sleep(MINUTE * 3 / 4).await;
        client.write_all(b" / ").await.unwrap();
        connection.read_exact(&mut [0; 3]).await.unwrap();
    }
}
