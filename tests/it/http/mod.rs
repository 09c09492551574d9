//! The HTTP API (DESIGN section 10), with clients that are not ours.

mod access;
mod ingest;
mod openapi;
mod read;
mod redrive;
mod status;
mod stream;
mod stuck;

use std::{collections::BTreeMap, path::Path, sync::Arc, time::Duration};

use pulsebus::{
    api::{Api, ApiOptions, listen},
    bus::{Composed, EventBus, Searches, compose},
    config::{Flag, Inputs, load},
    event::DecoderOptions,
    ingest::{IngestOptions, Source},
    store::{EventStore, memory::MemoryStore},
    transport::http::HttpTransport,
};
use reqwest::{RequestBuilder, Response, StatusCode};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    task::JoinSet,
    time::timeout,
};
use tokio_util::sync::CancellationToken;

use crate::support::{PATIENCE, daemon::http, wait_until};

/// An API server over a bus of its own, in this process.
pub(crate) struct Server {
    pub(crate) url: String,
    port: u16,
    pub(crate) bus: EventBus,
    http: reqwest::Client,
    stop: CancellationToken,
    tasks: JoinSet<std::io::Result<()>>,
}

impl Server {
    /// Over an empty log in memory.
    pub(crate) async fn start() -> Self {
        Self::with(MemoryStore::new(), |_| {}).await
    }

    /// Over this store, with other bounds.
    async fn with(store: impl EventStore, tweak: impl FnOnce(&mut ApiOptions)) -> Self {
        Self::over(Arc::new(store), tweak).await
    }

    /// The same, over a store that outlives it.
    async fn over(store: Arc<dyn EventStore>, tweak: impl FnOnce(&mut ApiOptions)) -> Self {
        let bus = EventBus::builder().shared_store(store).build().await.unwrap();
        let transport = HttpTransport::new(64 << 20);
        let ingress = transport.ingress();
        bus.add_source(Source {
            name: "http".into(),
            transport: Arc::new(transport),
            params: json!({}),
            competing: false,
            decoder: DecoderOptions::default(),
            options: IngestOptions::default(),
        });
        let composed = Composed {
            bus,
            ingress: Some(ingress),
            searches: Searches::default(),
            transports: BTreeMap::new(),
        };
        Self::serve(composed, tweak).await
    }

    /// As composed without a configuration: SQLite and a search index.
    async fn composed(folder: &Path) -> Self {
        let data_dir = Flag {
            flag: "--data-dir".to_owned(),
            key: "data_dir".to_owned(),
            value: folder.display().to_string(),
        };
        // Found without looking at this machine's configuration.
        let file = folder.join("pulsebus.toml");
        std::fs::write(&file, "").unwrap();
        let inputs = Inputs { file: Some(file), variables: Vec::new(), flags: vec![data_dir] };
        let settings = load(&inputs).unwrap().settings;
        Self::serve(compose(&settings).await.unwrap(), |_| {}).await
    }

    async fn serve(composed: Composed, tweak: impl FnOnce(&mut ApiOptions)) -> Self {
        let listener = listen(([127, 0, 0, 1], 0).into()).await.unwrap();
        let address = listener.local_addr().unwrap();
        let mut options = ApiOptions {
            listen: address,
            token: None,
            tls: None,
            max_body: 16 << 20,
            body_bytes: 64 << 20,
            timeout: Duration::from_secs(30),
            max_connections: 1_024,
        };
        tweak(&mut options);
        let Composed { bus, ingress, searches, .. } = composed;
        let api = Api { bus: bus.clone(), ingress, searches, options };
        let stop = CancellationToken::new();
        let mut tasks = JoinSet::new();
        tasks.spawn(api.serve(listener, stop.clone()));
        let server = Self {
            url: format!("http://{address}"),
            port: address.port(),
            bus,
            http: http(),
            stop,
            tasks,
        };
        wait_until("every part is ready", async || {
            let answer = server.http.get(server.at("/readyz")).send().await.unwrap();
            answer.status().is_success().then_some(())
        })
        .await;
        server
    }

    fn at(&self, path: &str) -> String {
        format!("{}{path}", self.url)
    }

    fn get(&self, path: &str) -> RequestBuilder {
        self.http.get(self.at(path))
    }

    fn post(&self, body: impl Into<reqwest::Body>) -> RequestBuilder {
        self.http.post(self.at("/v1/events")).body(body)
    }

    /// Tells it to do something.
    fn order(&self, path: &str, order: &Value) -> RequestBuilder {
        self.http.post(self.at(path)).json(order)
    }

    /// JSON of a path.
    pub(crate) async fn json(&self, path: &str) -> Value {
        let answer = self.get(path).send().await.unwrap();
        assert_eq!(answer.status(), StatusCode::OK, "{path}");
        assert_eq!(content_type(&answer), "application/json", "{path}");
        answer.json().await.unwrap()
    }

    /// Posts events of this type and key, ids made of both and a number.
    pub(crate) async fn fill(&self, kind: &str, key: &str, count: usize) {
        let events: Vec<_> = (0..count)
            .map(
                |n| json!({"id": format!("{kind}-{key}-{n}"), "type": kind, "key": key, "data": n}),
            )
            .collect();
        let answer = answer(self.post(json!(events).to_string())).await;
        assert_eq!(answer["stored"], count, "{answer}");
    }
}

/// The answer to a request that is expected to succeed.
async fn answer(request: RequestBuilder) -> Value {
    let answer = request.send().await.unwrap();
    let status = answer.status();
    let text = answer.text().await.unwrap();
    assert!(status.is_success(), "{status}: {text}");
    serde_json::from_str(&text).unwrap()
}

/// The problem a request is answered with: its status, as RFC 9457 has it.
async fn problem(request: RequestBuilder) -> (StatusCode, Value) {
    let answer = request.send().await.unwrap();
    let status = answer.status();
    assert!(!status.is_success(), "{status}");
    assert_eq!(content_type(&answer), "application/problem+json");
    let problem: Value = answer.json().await.unwrap();
    assert_eq!(problem["status"], status.as_u16(), "{problem}");
    for member in ["type", "title", "detail"] {
        assert!(problem[member].as_str().is_some_and(|text| !text.is_empty()), "{problem}");
    }
    (status, problem)
}

fn content_type(answer: &Response) -> &str {
    answer.headers().get("content-type").map_or("", |kind| kind.to_str().unwrap())
}

/// The names of an object's members, sorted.
fn members(value: &Value) -> Vec<&str> {
    value.as_object().unwrap_or_else(|| panic!("{value}")).keys().map(String::as_str).collect()
}

/// That an object has these members, and perhaps others.
fn has_members(value: &Value, wanted: &[&str]) {
    let missing: Vec<_> = wanted.iter().filter(|name| value.get(name).is_none()).collect();
    assert!(missing.is_empty(), "{missing:?} missing in {value}");
}

/// A connection whose bytes the test writes itself.
struct Raw {
    stream: TcpStream,
    read: Vec<u8>,
}

impl Raw {
    async fn connect(server: &Server) -> Self {
        let stream = TcpStream::connect(("127.0.0.1", server.port)).await.unwrap();
        Self { stream, read: Vec::new() }
    }

    async fn write(&mut self, bytes: impl AsRef<[u8]>) {
        timeout(PATIENCE, self.stream.write_all(bytes.as_ref())).await.unwrap().unwrap();
    }

    /// Status, head and body of the next answer.
    async fn answer(&mut self) -> (u16, String, String) {
        let head = loop {
            if let Some(at) = self.read.windows(4).position(|window| window == b"\r\n\r\n") {
                break String::from_utf8(self.read.drain(..at + 4).collect()).unwrap();
            }
            self.more().await;
        };
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        let length = head
            .lines()
            .find_map(|line| {
                line.to_ascii_lowercase().strip_prefix("content-length: ")?.parse().ok()
            })
            .unwrap_or(0);
        while self.read.len() < length {
            self.more().await;
        }
        let body = String::from_utf8(self.read.drain(..length).collect()).unwrap();
        (status, head, body)
    }

    async fn more(&mut self) {
        let read = timeout(PATIENCE, self.stream.read_buf(&mut self.read)).await.unwrap().unwrap();
        assert!(read > 0, "the connection was closed; before: {:?}", self.read);
    }
}
