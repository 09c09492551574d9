//! `POST /v1/events`: one event, an array of them, or lines; the CloudEvents HTTP binding.

use std::sync::Arc;

use axum::{
    Json,
    body::{Body, Bytes},
    extract::State as Extract,
    http::{HeaderMap, StatusCode, header},
};
use futures_util::StreamExt as _;
use serde::Serialize;
use serde_json::{json, value::RawValue};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::{ApiOptions, Problem, Shared};
use crate::{
    event::{HeaderValue, Headers, Message, Position},
    transport::{Receipt, http::IngressError},
};

/// What became of a request's events.
#[derive(Debug, Default, Serialize)]
pub(super) struct Answer {
    stored: usize,
    duplicates: usize,
    quarantined: Vec<QuarantinedItem>,
    /// Of the last one stored.
    position: Option<Position>,
}

#[derive(Debug, Serialize)]
struct QuarantinedItem {
    index: usize,
    reason: String,
    number: u64,
}

pub(super) async fn append(
    Extract(state): Shared,
    headers: HeaderMap,
    body: Body,
) -> Result<Json<Answer>, Problem> {
    let Some(ingress) = &state.api.ingress else {
        return Err(Problem::new(
            StatusCode::NOT_FOUND,
            "no source takes events over HTTP; configure [sources.http] transport = \"http\"",
        ));
    };
    let options = &state.api.options;
    let size = announced(&headers);
    if size.is_some_and(|size| size > options.max_body) && headers.contains_key(header::EXPECT) {
        // This client waits to be told before it sends.
        return Err(too_large(options.max_body));
    }
    let _room = room(&state.bodies, to_keep(size, options.max_body), options).await?;
    let body = read(body, size, options).await?;
    let messages = split(&headers, body)?;
    if messages.is_empty() {
        return Ok(Json(Answer::default()));
    }
    let committed = tokio::time::timeout(options.timeout, ingress.append(messages));
    let receipts = match committed.await {
        Ok(Ok(receipts)) => receipts,
        Ok(Err(error @ (IngressError::Busy | IngressError::Closed))) => {
            return Err(Problem::unavailable(format!(
                "{error}; nothing was acknowledged, post again later"
            )));
        }
        Err(_) => {
            return Err(Problem::unavailable(
                "the event store did not commit in time; post the same events again, with ids, \
                 and those that are there already count as duplicates",
            ));
        }
    };
    answer(receipts)
}

/// What of a body that is too large is still read, and thrown away: a client that has not sent
/// all of it does not read an answer, and the connection could not be used again.
const DISCARDED: usize = 256 << 20;

/// The size of the body, where the client says so.
fn announced(headers: &HeaderMap) -> Option<usize> {
    let length = headers.get(header::CONTENT_LENGTH)?.to_str().ok()?;
    // The server takes no other than digits; so many that they are no number are too many.
    Some(length.parse().unwrap_or(usize::MAX))
}

fn too_large(max: usize) -> Problem {
    Problem::new(
        StatusCode::PAYLOAD_TOO_LARGE,
        format!(
            "the request's body is larger than {max} bytes (http.max_body); post the events in \
             several requests"
        ),
    )
}

/// How much of a body is kept at most.
fn to_keep(announced: Option<usize>, max: usize) -> usize {
    match announced {
        None => max,
        Some(length) if length > max => 0,
        Some(length) => length,
    }
}

/// Room for a body among those that are held, taken before the body is read.
async fn room(
    bodies: &Arc<Semaphore>,
    size: usize,
    options: &ApiOptions,
) -> Result<OwnedSemaphorePermit, Problem> {
    // One larger than all there is takes all of it: it is read alone.
    let size = size.clamp(1, options.body_permits());
    let waiting = Arc::clone(bodies).acquire_many_owned(u32::try_from(size).unwrap_or(u32::MAX));
    match tokio::time::timeout(options.timeout, waiting).await {
        Ok(Ok(room)) => Ok(room),
        // Nobody closes the semaphore.
        Ok(Err(_)) | Err(_) => Err(Problem::unavailable(
            "the requests under way hold as much as they may (limits.ingest_bytes); nothing was \
             taken, post again later",
        )),
    }
}

/// Reads a request's body, as a whole within the timeout.
async fn read(
    body: Body,
    announced: Option<usize>,
    options: &ApiOptions,
) -> Result<Bytes, Problem> {
    let ApiOptions { max_body: max, timeout, .. } = *options;
    let keep = to_keep(announced, max);
    let reading = async {
        let mut chunks = body.into_data_stream();
        // A chunk shares the connection's read buffer, which the events would keep in memory:
        // copied, also where it is the only one.
        let mut kept = Vec::with_capacity(announced.map_or(0, |_| keep));
        let mut size = 0_usize;
        while let Some(chunk) = chunks.next().await {
            let chunk = chunk.map_err(|error| {
                Problem::bad_request(format!("the request's body did not arrive: {error}"))
            })?;
            size = size.saturating_add(chunk.len());
            if size <= keep {
                kept.extend_from_slice(&chunk);
                continue;
            }
            kept = Vec::new();
            if size > max.saturating_add(DISCARDED) {
                break;
            }
        }
        if size > keep {
            return Err(too_large(max));
        }
        // Without what it grew too much.
        Ok(Bytes::from(kept.into_boxed_slice()))
    };
    tokio::time::timeout(timeout, reading).await.unwrap_or_else(|_| {
        Err(Problem::new(
            StatusCode::REQUEST_TIMEOUT,
            format!("the request's body did not arrive within {timeout:?} (http.timeout)"),
        ))
    })
}

fn answer(receipts: Vec<Receipt>) -> Result<Json<Answer>, Problem> {
    let mut answer = Answer::default();
    for (index, receipt) in receipts.into_iter().enumerate() {
        match receipt {
            Receipt::Stored(position) => {
                answer.stored += 1;
                answer.position = Some(position);
            }
            Receipt::Duplicate(_) => answer.duplicates += 1,
            Receipt::Quarantined { number, reason } => {
                answer.quarantined.push(QuarantinedItem {
                    index,
                    reason: reason.to_string(),
                    number,
                });
            }
        }
    }
    if answer.stored + answer.duplicates == 0 {
        let detail = match &*answer.quarantined {
            [only] => format!("not an event, kept in quarantine: {}", only.reason),
            all => format!("none of the {} is an event; all are kept in quarantine", all.len()),
        };
        return Err(Problem::new(StatusCode::UNPROCESSABLE_ENTITY, detail)
            .with("stored", json!(0))
            .with("duplicates", json!(0))
            .with("quarantined", json!(answer.quarantined))
            .with("position", json!(null)));
    }
    Ok(Json(answer))
}

/// The messages of a request, each with its bytes as they were.
fn split(headers: &HeaderMap, body: Bytes) -> Result<Vec<Message>, Problem> {
    let media = headers
        .get(header::CONTENT_TYPE)
        .and_then(|value| value.to_str().ok())
        .and_then(|value| value.split(';').next())
        .map(|media| media.trim().to_ascii_lowercase())
        .unwrap_or_default();
    let kept = kept(headers);
    let one = |body: Bytes| vec![Message { body, headers: kept.clone(), ..Message::default() }];
    match &*media {
        "application/x-ndjson" | "application/ndjson" | "application/jsonl" => {
            let each = each_headers(&kept, "application/json");
            Ok(body
                .split(|byte| *byte == b'\n')
                .map(|line| line.strip_suffix(b"\r").unwrap_or(line))
                .filter(|line| !line.iter().all(u8::is_ascii_whitespace))
                .map(|line| Message {
                    body: part(&body, line),
                    headers: each.clone(),
                    ..Message::default()
                })
                .collect())
        }
        "application/cloudevents-batch+json" => {
            let each = each_headers(&kept, "application/cloudevents+json");
            elements(&body, &each).ok_or_else(|| {
                Problem::bad_request("application/cloudevents-batch+json must be a JSON array")
            })
        }
        "application/cloudevents+json" => Ok(one(body)),
        // Binary mode: the data may be an array in itself.
        _ if kept.iter().any(|(name, _)| is_attribute(name)) => Ok(one(body)),
        _ => {
            let array = body.iter().find(|byte| !byte.is_ascii_whitespace()) == Some(&b'[');
            // An array that does not parse is one message that is no event.
            Ok(array
                .then(|| elements(&body, &each_headers(&kept, "application/json")))
                .flatten()
                .unwrap_or_else(|| one(body)))
        }
    }
}

/// One event's bytes. They stay in memory for as long as the event is among the recent ones, and
/// a slice would keep all of the request there with it.
fn part(body: &Bytes, part: &[u8]) -> Bytes {
    if part.len() < body.len() / 2 { Bytes::copy_from_slice(part) } else { body.slice_ref(part) }
}

/// The elements of a JSON array, byte for byte.
fn elements(body: &Bytes, headers: &Headers) -> Option<Vec<Message>> {
    let elements: Vec<&RawValue> = serde_json::from_slice(body).ok()?;
    Some(
        elements
            .into_iter()
            .map(|element| Message {
                body: part(body, element.get().as_bytes()),
                headers: headers.clone(),
                ..Message::default()
            })
            .collect(),
    )
}

fn is_attribute(name: &str) -> bool {
    name.get(..3).is_some_and(|prefix| prefix.eq_ignore_ascii_case("ce-"))
}

/// The headers that are about the event rather than about the connection or the client.
fn kept(headers: &HeaderMap) -> Headers {
    const NOT_KEPT: &[&str] = &[
        "accept",
        "accept-encoding",
        "accept-language",
        "authorization",
        "connection",
        "content-encoding",
        "content-length",
        "cookie",
        "expect",
        "host",
        "keep-alive",
        "origin",
        "proxy-authorization",
        "referer",
        "te",
        "transfer-encoding",
        "upgrade",
        "user-agent",
    ];
    headers
        .iter()
        .filter(|(name, _)| {
            !NOT_KEPT.contains(&name.as_str()) && !name.as_str().starts_with("sec-")
        })
        .map(|(name, value)| {
            let value = match std::str::from_utf8(value.as_bytes()) {
                Ok(text) => HeaderValue::Text(text.to_owned()),
                Err(_) => HeaderValue::Binary(value.as_bytes().to_vec()),
            };
            (name.as_str().into(), value)
        })
        .collect()
}

/// The headers each of several events gets: the request's, less what can only be about one.
fn each_headers(kept: &Headers, content_type: &str) -> Headers {
    let mut headers: Headers = kept
        .iter()
        .filter(|(name, _)| {
            !is_attribute(name)
                && !name.eq_ignore_ascii_case("content-type")
                && !name.eq_ignore_ascii_case("nats-msg-id")
        })
        .map(|(name, value)| (name.into(), value.clone()))
        .collect();
    headers.push("content-type", content_type);
    headers
}

#[cfg(test)]
mod tests {
    use axum::response::IntoResponse as _;

    use super::*;

    fn bodies(content_type: &str, body: &'static str) -> Vec<String> {
        let mut headers = HeaderMap::new();
        headers.insert(header::CONTENT_TYPE, content_type.parse().unwrap());
        split(&headers, Bytes::from_static(body.as_bytes()))
            .unwrap()
            .iter()
            .map(|message| String::from_utf8(message.body.to_vec()).unwrap())
            .collect()
    }

    #[test]
    fn G9_events_are_taken_apart_byte_for_byte() {
        assert_eq!(bodies("application/json", "{ \"a\":1e400 }"), ["{ \"a\":1e400 }"]);
        assert_eq!(
            bodies("application/json; charset=utf-8", " [ {\"a\" :1} , 2.50,[3] ]"),
            ["{\"a\" :1}", "2.50", "[3]"]
        );
        assert_eq!(
            bodies("application/x-ndjson", "{\"a\":1}\r\n\n{\"b\" : 2}"),
            ["{\"a\":1}", "{\"b\" : 2}"]
        );
        assert_eq!(bodies("application/cloudevents+json", "[1]"), ["[1]"]);
        assert_eq!(bodies("application/json", "[1"), ["[1"]);
        assert_eq!(bodies("application/json", ""), [""]);
        assert!(bodies("application/json", "[]").is_empty());
    }

    #[test]
    fn G7_a_small_event_does_not_keep_its_request_in_memory() {
        let large = "x".repeat(1_000);
        let json = Bytes::from(format!("[1,\"{large}\"]"));
        let lines = Bytes::from(format!("1\n\"{large}\"\n"));
        for (media, body) in [("application/json", json), ("application/x-ndjson", lines)] {
            let mut headers = HeaderMap::new();
            headers.insert(header::CONTENT_TYPE, media.parse().unwrap());
            let within = body.as_ptr_range();
            let messages = split(&headers, body.clone()).unwrap();
            let shares = |n: usize| within.contains(&messages[n].body.as_ptr());
            assert!(!shares(0), "{media}: a copy");
            assert!(shares(1), "{media}: most of it anyway");
        }
    }

    fn options(max_body: usize, body_bytes: usize) -> ApiOptions {
        ApiOptions {
            listen: ([127, 0, 0, 1], 0).into(),
            token: None,
            tls: None,
            max_body,
            body_bytes,
            timeout: std::time::Duration::from_secs(30),
            max_connections: 1,
        }
    }

    #[tokio::test(start_paused = true)]
    async fn G7_bodies_are_read_only_while_there_is_room_for_them() {
        let options = options(100, 10);
        let bytes = Arc::new(Semaphore::new(options.body_permits()));
        let first = room(&bytes, 8, &options).await.unwrap();
        let full = room(&bytes, 3, &options).await.unwrap_err().into_response();
        assert_eq!(full.status(), StatusCode::SERVICE_UNAVAILABLE);
        assert!(full.headers().contains_key(header::RETRY_AFTER));
        drop(first);
        // One of unknown size, or larger than all there is, waits to be alone.
        let alone = room(&bytes, 100, &options).await.unwrap();
        assert_eq!(bytes.available_permits(), 0);
        drop(alone);
        assert_eq!(bytes.available_permits(), 10);
    }

    #[tokio::test(start_paused = true)]
    async fn G7_a_body_is_read_up_to_its_limit_in_size_and_time() {
        let options = options(4, 10);
        let frames = |frames: &[&'static str]| {
            let frames: Vec<_> = frames.iter().map(|frame| Ok::<_, String>(*frame)).collect();
            Body::from_stream(futures_util::stream::iter(frames))
        };
        assert_eq!(read(frames(&["12", "34"]), None, &options).await.unwrap(), "1234");
        assert_eq!(read(frames(&["12", "3"]), Some(3), &options).await.unwrap(), "123");
        let refused = read(frames(&["12", "345"]), Some(5), &options).await.unwrap_err();
        assert_eq!(refused.into_response().status(), StatusCode::PAYLOAD_TOO_LARGE);
        let status =
            async |body| read(body, None, &options).await.unwrap_err().into_response().status();
        assert_eq!(status(frames(&["12", "345"])).await, StatusCode::PAYLOAD_TOO_LARGE);
        let broken = futures_util::stream::iter([Ok("1"), Err("reset")]);
        assert_eq!(status(Body::from_stream(broken)).await, StatusCode::BAD_REQUEST);
        // A byte now and then is not enough.
        let pause = options.timeout / 3;
        let trickle = futures_util::stream::unfold((), move |()| async move {
            tokio::time::sleep(pause).await;
            Some((Ok::<_, String>("1"), ()))
        });
        assert_eq!(status(Body::from_stream(trickle)).await, StatusCode::REQUEST_TIMEOUT);
    }

    #[test]
    fn headers_of_the_connection_are_not_kept() {
        let mut headers = HeaderMap::new();
        for (name, value) in [
            ("authorization", "Bearer x"),
            ("cookie", "x"),
            ("ce-id", "1"),
            ("traceparent", "00-1"),
        ] {
            headers.insert(name, value.parse().unwrap());
        }
        let kept = kept(&headers);
        assert_eq!(kept.len(), 2);
        assert_eq!(each_headers(&kept, "application/json").len(), 2);
    }
}
