//! A receiver of webhooks that answers as it is told, and breaks as receivers break.

use std::{
    io,
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::{
    io::{
        AsyncBufReadExt as _, AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _,
        BufReader,
    },
    net::TcpListener,
    task::JoinSet,
};
use tokio_rustls::TlsAcceptor;

/// What came in.
#[derive(Debug, Clone)]
pub(crate) struct Seen {
    pub(crate) at: Instant,
    pub(crate) method: String,
    pub(crate) path: String,
    headers: Vec<(String, String)>,
    pub(crate) body: String,
}

impl Seen {
    /// The value of a header; panics where there are several.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        let mut values = self.headers.iter().filter(|(n, _)| n.eq_ignore_ascii_case(name));
        let value = values.next().map(|(_, value)| &**value);
        assert!(values.next().is_none(), "{name} twice: {:?}", self.headers);
        value
    }

    pub(crate) fn id(&self) -> &str {
        self.header("webhook-id").unwrap()
    }
}

/// What is done with a request.
#[derive(Debug, Clone)]
pub(crate) enum Reply {
    /// Answers with this status, these further lines of header, and this body.
    Say(u16, String, String),
    /// Ends the connection.
    Cut,
    /// Says nothing, and keeps the connection.
    Hang,
    /// A body without an end.
    Endless(u16),
    /// A head without an end, a line now and then.
    Dribble,
}

impl Reply {
    pub(crate) fn status(status: u16) -> Self {
        Self::Say(status, String::new(), String::new())
    }

    pub(crate) fn with(status: u16, header: &str, body: &str) -> Self {
        Self::Say(status, format!("{header}\r\n"), body.to_owned())
    }
}

type Rule = Box<dyn FnMut(&Seen) -> Reply + Send>;

struct Shared {
    seen: Mutex<Vec<Seen>>,
    connections: AtomicUsize,
    rule: Mutex<Rule>,
}

/// Listens on the loopback interface; everything ends when it is dropped.
pub(crate) struct Receiver {
    port: u16,
    shared: Arc<Shared>,
    _tasks: JoinSet<()>,
}

impl Receiver {
    /// Says 204 to everything.
    pub(crate) async fn start() -> Self {
        Self::ruled(|_| Reply::status(204)).await
    }

    pub(crate) async fn ruled(rule: impl FnMut(&Seen) -> Reply + Send + 'static) -> Self {
        Self::on(0, None, rule).await
    }

    /// On a port of its own where it is 0.
    pub(crate) async fn on(
        port: u16,
        tls: Option<TlsAcceptor>,
        rule: impl FnMut(&Seen) -> Reply + Send + 'static,
    ) -> Self {
        let address = SocketAddr::from(([127, 0, 0, 1], port));
        let listener =
            super::wait_until("the port is free", async || TcpListener::bind(address).await.ok())
                .await;
        let port = listener.local_addr().unwrap().port();
        let shared = Arc::new(Shared {
            seen: Mutex::default(),
            connections: AtomicUsize::new(0),
            rule: Mutex::new(Box::new(rule)),
        });
        let mut tasks = JoinSet::new();
        tasks.spawn(accept(listener, tls, Arc::clone(&shared)));
        Self { port, shared, _tasks: tasks }
    }

    /// From now on.
    pub(crate) fn rule(&self, rule: impl FnMut(&Seen) -> Reply + Send + 'static) {
        *self.shared.rule.lock().unwrap() = Box::new(rule);
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    pub(crate) fn url(&self, path: &str) -> String {
        format!("http://127.0.0.1:{}{path}", self.port)
    }

    /// Every request so far.
    pub(crate) fn seen(&self) -> Vec<Seen> {
        self.shared.seen.lock().unwrap().clone()
    }

    pub(crate) fn connections(&self) -> usize {
        self.shared.connections.load(Ordering::Relaxed)
    }
}

async fn accept(listener: TcpListener, tls: Option<TlsAcceptor>, shared: Arc<Shared>) {
    let mut connections = JoinSet::new();
    loop {
        let Ok((stream, _)) = listener.accept().await else { continue };
        shared.connections.fetch_add(1, Ordering::Relaxed);
        let _ = stream.set_nodelay(true);
        let shared = Arc::clone(&shared);
        match tls.clone() {
            None => connections.spawn(async move {
                let _ = serve(stream, &shared).await;
            }),
            Some(tls) => connections.spawn(async move {
                if let Ok(stream) = tls.accept(stream).await {
                    let _ = serve(stream, &shared).await;
                }
            }),
        };
    }
}

async fn serve(stream: impl AsyncRead + AsyncWrite + Unpin, shared: &Shared) -> io::Result<()> {
    let mut stream = BufReader::new(stream);
    while let Some(seen) = request(&mut stream).await? {
        let reply = {
            let mut rule = shared.rule.lock().unwrap();
            let reply = rule(&seen);
            shared.seen.lock().unwrap().push(seen);
            reply
        };
        match reply {
            Reply::Say(status, headers, body) => {
                let length = match status {
                    204 | 304 => String::new(),
                    _ => format!("content-length: {}\r\n", body.len()),
                };
                let answer = format!("HTTP/1.1 {status} x\r\n{headers}{length}\r\n{body}");
                stream.write_all(answer.as_bytes()).await?;
                stream.flush().await?;
            }
            Reply::Cut => return Ok(()),
            Reply::Hang => std::future::pending().await,
            Reply::Endless(status) => {
                let head = format!("HTTP/1.1 {status} x\r\ntransfer-encoding: chunked\r\n\r\n");
                stream.write_all(head.as_bytes()).await?;
                loop {
                    stream.write_all(b"4\r\nmore\r\n").await?;
                    stream.flush().await?;
                }
            }
            Reply::Dribble => {
                stream.write_all(b"HTTP/1.1 200 x\r\n").await?;
                loop {
                    stream.write_all(b"x-more: y\r\n").await?;
                    stream.flush().await?;
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            }
        }
    }
    Ok(())
}

async fn request(
    stream: &mut BufReader<impl AsyncRead + AsyncWrite + Unpin>,
) -> io::Result<Option<Seen>> {
    let mut head = Vec::new();
    loop {
        let mut line = String::new();
        if stream.read_line(&mut line).await? == 0 {
            return Ok(None);
        }
        match line.trim_end() {
            "" => break,
            line => head.push(line.to_owned()),
        }
    }
    let mut words = head[0].split(' ');
    let method = words.next().unwrap().to_owned();
    assert!(["POST", "HEAD"].contains(&&*method), "{method}");
    let path = words.next().unwrap().to_owned();
    let headers: Vec<(String, String)> = head[1..]
        .iter()
        .map(|line| line.split_once(": ").unwrap())
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect();
    let mut seen = Seen { at: Instant::now(), method, path, headers, body: String::new() };
    if seen.method == "HEAD" {
        return Ok(Some(seen));
    }
    let length = seen.header("content-length").unwrap().parse().unwrap();
    let mut body = vec![0; length];
    stream.read_exact(&mut body).await?;
    seen.body = String::from_utf8(body).unwrap();
    Ok(Some(seen))
}
