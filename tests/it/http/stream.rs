//! `GET /v1/events/stream`.

use std::collections::VecDeque;

use reqwest::{RequestBuilder, Response, StatusCode};
use serde_json::{Value, value::RawValue};
use tokio::time::timeout;

use super::{Server, answer, content_type, problem};
use crate::support::{PATIENCE, wait_until};

/// One event as the protocol has it.
#[derive(Debug)]
struct Sent {
    id: String,
    name: String,
    data: String,
}

/// Reads server-sent events, as their specification says.
struct Stream {
    answer: Response,
    text: String,
    ready: VecDeque<Sent>,
}

impl Stream {
    async fn open(request: RequestBuilder) -> Self {
        let answer = request.send().await.unwrap();
        assert_eq!(answer.status(), StatusCode::OK);
        assert_eq!(content_type(&answer), "text/event-stream");
        Self { answer, text: String::new(), ready: VecDeque::new() }
    }

    /// The next event; `None` when the server has ended the stream.
    async fn next(&mut self) -> Option<Sent> {
        loop {
            if let Some(sent) = self.ready.pop_front() {
                return Some(sent);
            }
            let chunk = timeout(PATIENCE, self.answer.chunk()).await.unwrap().unwrap()?;
            // A line may end with either or both.
            let chunk = std::str::from_utf8(&chunk).unwrap();
            self.text.push_str(&chunk.replace("\r\n", "\n").replace('\r', "\n"));
            while let Some((block, rest)) = self.text.split_once("\n\n") {
                let field = |name: &str| -> Vec<&str> {
                    let fields = block.lines().filter_map(|line| line.split_once(':'));
                    let fields = fields.filter(|(field, _)| *field == name);
                    fields.map(|(_, value)| value.strip_prefix(' ').unwrap_or(value)).collect()
                };
                let sent = Sent {
                    id: field("id").concat(),
                    name: field("event").concat(),
                    data: field("data").join("\n"),
                };
                if !sent.data.is_empty() {
                    self.ready.push_back(sent);
                }
                self.text = rest.to_owned();
            }
        }
    }

    async fn positions(&mut self, count: usize) -> Vec<u64> {
        let mut positions = Vec::new();
        for _ in 0..count {
            let sent = self.next().await.unwrap();
            let event: Value = serde_json::from_str(&sent.data).unwrap();
            assert_eq!(event["position"].to_string(), sent.id);
            assert_eq!(sent.name, "event");
            positions.push(event["position"].as_u64().unwrap());
        }
        positions
    }
}

#[tokio::test]
async fn a_stream_begins_where_it_is_asked_to_and_goes_on_live() {
    let server = Server::start().await;
    server.fill("A", "x", 3).await;
    let mut all = Stream::open(server.get("/v1/events/stream?from=1")).await;
    let mut tail = Stream::open(server.get("/v1/events/stream?from=3")).await;
    let mut live = Stream::open(server.get("/v1/events/stream")).await;
    let mut filtered = Stream::open(server.get("/v1/events/stream?from=0&type=B&key=y")).await;
    assert_eq!(all.positions(3).await, [1, 2, 3]);
    assert_eq!(tail.positions(1).await, [3]);
    server.fill("B", "x", 1).await;
    server.fill("B", "y", 2).await;
    assert_eq!(all.positions(3).await, [4, 5, 6]);
    assert_eq!(tail.positions(3).await, [4, 5, 6]);
    assert_eq!(live.positions(3).await, [4, 5, 6]);
    assert_eq!(filtered.positions(2).await, [5, 6]);
    // More than is read from the log at once.
    server.fill("A", "z", 250).await;
    assert_eq!(live.positions(250).await, (7..=256).collect::<Vec<u64>>());
}

#[tokio::test]
async fn a_stream_resumes_behind_the_last_one_seen() {
    let server = Server::start().await;
    server.fill("A", "x", 5).await;
    let resume = |at: &str| server.get("/v1/events/stream?from=1").header("last-event-id", at);
    // What the client has seen wins over where it once began.
    assert_eq!(Stream::open(resume("2")).await.positions(3).await, [3, 4, 5]);
    let mut head = Stream::open(resume("5")).await;
    server.fill("B", "x", 1).await;
    assert_eq!(head.positions(1).await, [6]);
    for wrong in ["x", "-1", "1.5"] {
        assert_eq!(problem(resume(wrong)).await.0, StatusCode::BAD_REQUEST);
    }
}

#[tokio::test]
async fn G9_a_stream_carries_bodies_as_they_were_published() {
    let server = Server::start().await;
    let bodies = [
        r#"{"id":"1","type":"T","data":[1e400,0.10,"\ud800"],"a":1,"a":2}"#,
        "{\"id\":\"2\",\n\n \"type\":\"T\",\n\"data\":\"\u{2028}\"}",
        "{\"id\":\"3\",\"type\":\"T\",\n\"data\":[1,\n\n\n2]}\n",
        "{\"id\":\"4\",\"type\":\"T\",\r\n\t\"data\":\r 1}",
    ];
    for body in bodies {
        assert_eq!(answer(server.post(body)).await["stored"], 1);
    }
    let mut stream = Stream::open(server.get("/v1/events/stream?from=1")).await;
    for body in bodies {
        let sent = stream.next().await.unwrap();
        // Line breaks between tokens are the protocol's; everything else is as it was.
        let without_breaks = |text: &str| text.trim().replace(['\r', '\n'], "");
        let wanted = format!("\"body\":{}}}", without_breaks(body));
        assert!(without_breaks(&sent.data).ends_with(&wanted), "{body:?} in {:?}", sent.data);
        serde_json::from_str::<&RawValue>(&sent.data).unwrap_or_else(|e| panic!("{e}: {sent:?}"));
    }
}

#[tokio::test]
async fn streams_end_when_the_daemon_drains() {
    let mut server = Server::start().await;
    server.fill("A", "x", 1).await;
    let mut stream = Stream::open(server.get("/v1/events/stream?from=1")).await;
    assert_eq!(stream.positions(1).await, [1]);
    server.stop.cancel();
    assert!(stream.next().await.is_none());
    let ended = timeout(PATIENCE, server.tasks.join_next()).await.unwrap();
    ended.unwrap().unwrap().unwrap();
}

#[tokio::test]
async fn G7_streams_are_bounded_and_their_places_come_back() {
    let server = Server::start().await;
    let mut streams = Vec::new();
    for _ in 0..64 {
        streams.push(Stream::open(server.get("/v1/events/stream")).await);
    }
    let (status, full) = problem(server.get("/v1/events/stream")).await;
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE, "{full}");
    streams.clear();
    wait_until("a place is free again", async || {
        let answer = server.get("/v1/events/stream").send().await.unwrap();
        answer.status().is_success().then_some(())
    })
    .await;
}
