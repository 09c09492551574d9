//! Through `POST /v1/events`.

use std::collections::BTreeSet;

use reqwest::{
    StatusCode,
    header::{HeaderMap, HeaderName, HeaderValue},
};
use serde_json::Value;

use super::{Expected, Marked, audit_sqlite, cases, neighbour, only_odd_headers};
use crate::{
    corpus::Verdict,
    support::daemon::{Daemon, http},
};

/// What the endpoint takes apart into several events, or none; checked by the tests of the API.
const TAKEN_APART: [&str; 4] =
    ["empty array", "array of events", "CloudEvents batch", "depth 100,000 of arrays"];

/// Larger than any request may be here.
const TOO_LARGE: &str = "64 MiB";

/// More headers than a request can have.
const TOO_MANY: &str = "10,000 headers";

fn headers(marked: &Marked) -> Result<HeaderMap, String> {
    let mut map = HeaderMap::new();
    for (name, value) in marked.headers() {
        let header = HeaderName::from_bytes(name.as_bytes()).map_err(|_| format!("{name:?}"))?;
        let value = HeaderValue::from_bytes(value.as_bytes()).map_err(|_| format!("{value:?}"))?;
        map.append(header, value);
    }
    Ok(map)
}

struct Client {
    http: reqwest::Client,
    url: String,
}

impl Client {
    async fn post(&self, headers: HeaderMap, body: Vec<u8>) -> (StatusCode, String, Value) {
        let answer = self.http.post(&self.url).headers(headers).body(body).send().await.unwrap();
        let status = answer.status();
        let kind =
            answer.headers().get("content-type").map(|kind| kind.to_str().unwrap().to_owned());
        let text = answer.text().await.unwrap();
        let json = serde_json::from_str(&text).unwrap_or(Value::Null);
        (status, kind.unwrap_or_default(), json)
    }

    /// Publishes every case, a neighbour behind each, and holds each answer against the verdict;
    /// the names of those the client refuses.
    async fn publish_all(&self, cases: &[Marked], counted_as: &str) -> Vec<String> {
        let mut refused = Vec::new();
        self.good(0, counted_as).await;
        for (n, marked) in cases.iter().enumerate() {
            let case = &marked.case;
            match headers(marked) {
                Ok(headers) => {
                    let (status, kind, answer) = self.post(headers, case.body.clone()).await;
                    let right = match case.verdict {
                        _ if case.name == TOO_LARGE => {
                            status == StatusCode::PAYLOAD_TOO_LARGE
                                && kind == "application/problem+json"
                        }
                        // Refused before there is a request to answer.
                        _ if case.name == TOO_MANY => {
                            status == StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE
                        }
                        Verdict::Event => status == StatusCode::OK && answer[counted_as] == 1,
                        Verdict::Quarantined(words) => {
                            status == StatusCode::UNPROCESSABLE_ENTITY
                                && kind == "application/problem+json"
                                && answer["quarantined"][0]["index"] == 0
                                && answer["quarantined"][0]["reason"]
                                    .as_str()
                                    .is_some_and(|reason| reason.contains(words))
                        }
                    };
                    assert!(right, "{}: {status} {kind} {answer}", case.name);
                }
                Err(_) => refused.push(marked.mark.clone()),
            }
            self.good(n + 1, counted_as).await;
        }
        refused
    }

    async fn good(&self, n: usize, counted_as: &str) {
        let (status, _, answer) = self.post(HeaderMap::new(), neighbour(n)).await;
        assert_eq!(status, StatusCode::OK, "{answer}");
        assert_eq!(answer[counted_as], 1, "{answer}");
    }
}

async fn corpus_through(store: &str, audit: impl AsyncFnOnce(&Daemon, &Expected)) {
    let config = format!("{store}\n[handlers.log]\nkind = \"log\"\nlevel = \"debug\"\n");
    let daemon = Daemon::start(&config).await;
    let client = Client { http: http(), url: format!("{}/v1/events", daemon.url("")) };
    let mut cases = cases();
    cases.retain(|Marked { case, .. }| {
        let apart = TAKEN_APART.contains(&case.name);
        assert!(!apart || case.http_may_split(), "{}", case.name);
        !apart
    });
    let neighbours = cases.len() + 1;

    let refused = client.publish_all(&cases, "stored").await;
    let head = daemon.head().await;
    only_odd_headers(&cases, &refused);
    let names: BTreeSet<_> = cases
        .iter()
        .filter(|marked| refused.contains(&marked.mark))
        .map(|marked| (marked.case.name, &*marked.case.headers[0].0))
        .collect();
    let wanted = [
        ("CR and LF in a header", "x-inject"),
        ("CR and LF in the id header", "Nats-Msg-Id"),
        ("a zero character in a header", "x-zero"),
        ("odd header names", ""),
        ("odd header names", ":x"),
        ("odd header names", "a b"),
        ("odd header names", "c\u{e9}-"),
        ("odd header names", "é😀"),
    ];
    assert_eq!(names, wanted.into());
    cases.retain(|marked| !refused.contains(&marked.mark));

    client.publish_all(&cases, "duplicates").await;
    assert_eq!(daemon.head().await, head, "the same again adds no event");
    daemon.ready().await;

    assert!(daemon.terminate().await.success(), "{}", daemon.log());
    assert!(!daemon.log().contains("panicked"), "{}", daemon.log());
    cases.retain(|marked| ![TOO_LARGE, TOO_MANY].contains(&marked.case.name));
    audit(&daemon, &Expected { cases, neighbours, quarantined: 2 }).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn G6_bad_input_through_http_ends_somewhere_and_harms_nobody() {
    corpus_through("", async |daemon, expected| audit_sqlite(daemon, expected).await).await;
}
