//! Exports spans by OTLP/HTTP, in batches, beside everything else.
//!
//! The queue is bounded and nobody waits for room in it: spans that do not fit are dropped and
//! counted. A collector that is away is tried again with backoff; that it is away is said once,
//! and that it is back, with how many spans that cost.

use std::{
    collections::BTreeMap,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use prost::Message as _;
use reqwest::{Client, StatusCode, header};
use tokio::{
    sync::mpsc,
    task::JoinHandle,
    time::{Instant, timeout, timeout_at},
};
use tokio_util::sync::CancellationToken;
use url::Url;

use super::{
    OtlpSettings,
    otlp_wire::{
        AnyOf, AnyValue, ExportTraceServiceRequest, InstrumentationScope, KeyValue, Link, Resource,
        ResourceSpans, ScopeSpans, Span, Status,
    },
    spans::{Record, Recorder, Value, recorder},
};
use crate::{
    retry::RetryPolicy,
    secret::Secret,
    tls::{TlsOptions, client_config},
};

/// Spans a request at most.
const BATCH: usize = 512;

/// How long a span waits for others to travel with.
const LINGER: Duration = Duration::from_secs(1);

/// `Span.flags`: the one that it says whether the parent is in another process is left out.
const FLAGS: u32 = 0xff;

/// How spans cannot be exported at all.
#[derive(Debug, thiserror::Error)]
pub enum OtlpError {
    /// No client can be made for the endpoint.
    #[error("telemetry.otlp: no HTTP client for the endpoint can be made: {0}")]
    Client(String),
    /// This process exports already.
    #[error("telemetry.otlp: this process exports spans already")]
    Twice,
}

/// The task that exports spans. Dropped, it goes on; see [`close`](Self::close).
#[derive(Debug)]
pub struct Exporter {
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl Exporter {
    /// Sends what has ended until now, for as long as `limit`, and ends.
    pub async fn close(self, limit: Duration) {
        self.stop.cancel();
        if timeout(limit, self.task).await.is_err() {
            tracing::debug!("spans were left when the time to stop was up");
        }
    }
}

/// Begins to export the spans of this process. Nothing is waited for: not the collector, and not
/// later for anything it does.
///
/// # Errors
/// [`OtlpError`].
pub fn export_spans(settings: &OtlpSettings) -> Result<Exporter, OtlpError> {
    let mut client = Client::builder()
        .redirect(reqwest::redirect::Policy::none())
        .user_agent(concat!("pulsebus/", env!("CARGO_PKG_VERSION")))
        .timeout(settings.timeout);
    if settings.endpoint.scheme() == "https" {
        let tls = TlsOptions { ca_file: settings.ca_file.clone(), ..TlsOptions::default() };
        let config = client_config(&tls).map_err(|error| OtlpError::Client(error.to_string()))?;
        client = client.tls_backend_preconfigured(config);
    }
    let client = client.build().map_err(|error| OtlpError::Client(error.to_string()))?;
    let (recorder, ended) = Recorder::new(settings.sample_ratio, settings.queue);
    if !recorder.install() {
        return Err(OtlpError::Twice);
    }
    let stop = CancellationToken::new();
    let export = Export {
        client,
        endpoint: settings.endpoint.clone(),
        headers: settings.headers.clone(),
        resource: resource(&settings.service_name, &settings.resource),
        ended,
        away: false,
        flooded: false,
        lost: 0,
        dropped: 0,
        stop: stop.clone(),
    };
    tracing::info!(endpoint = %settings.endpoint, "exporting spans");
    #[expect(clippy::disallowed_methods, reason = "`Exporter` holds it and waits for it")]
    let task = tokio::spawn(export.run());
    Ok(Exporter { stop, task })
}

/// `OTEL_EXPORTER_OTLP_HEADERS`' form: `name=value` pairs with commas, values percent-encoded
/// where they need it.
///
/// # Errors
/// What is wrong with it; nothing of the text is in there.
pub(crate) fn parse_headers(text: &str) -> Result<Vec<(String, String)>, &'static str> {
    let pairs = text.split(',').map(str::trim).filter(|pair| !pair.is_empty());
    pairs
        .map(|pair| {
            let (name, value) = pair.split_once('=').ok_or("not of the form name=value,…")?;
            let (name, value) = (name.trim(), decoded(value.trim()));
            header::HeaderName::try_from(name).map_err(|_| "one of the names is no HTTP header")?;
            let value = value.ok_or("one of the values is no text")?;
            header::HeaderValue::try_from(&value).map_err(|_| "one of the values is no header")?;
            Ok((name.to_owned(), value))
        })
        .collect()
}

/// With percent-encoded bytes undone.
fn decoded(text: &str) -> Option<String> {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [byte, after @ ..] = rest {
        let digits = after.get(..2).and_then(|two| std::str::from_utf8(two).ok());
        let code = digits.and_then(|two| u8::from_str_radix(two, 16).ok());
        match code.filter(|_| *byte == b'%') {
            Some(code) => {
                out.push(code);
                rest = after.get(2..).unwrap_or_default();
            }
            None => {
                out.push(*byte);
                rest = after;
            }
        }
    }
    String::from_utf8(out).ok()
}

struct Export {
    client: Client,
    endpoint: Url,
    headers: Option<Secret>,
    resource: Resource,
    ended: mpsc::Receiver<Record>,
    /// Whether it was said that the collector does not take spans.
    away: bool,
    /// Whether it was said that more spans end than can be exported.
    flooded: bool,
    /// Spans given up since a batch was last taken.
    lost: u64,
    /// Spans the queue had dropped when this was last asked.
    dropped: u64,
    stop: CancellationToken,
}

/// Why a batch was not taken.
enum Refusal {
    /// It may be later.
    Now(String, Option<Duration>),
    /// It never will be.
    Ever(String),
}

impl Export {
    async fn run(mut self) {
        let stop = self.stop.clone();
        loop {
            let mut batch = Vec::with_capacity(BATCH);
            let first = tokio::select! {
                biased;
                record = self.ended.recv() => record,
                () = stop.cancelled() => None,
            };
            let Some(first) = first else { return };
            batch.push(first);
            let deadline = Instant::now() + LINGER;
            while batch.len() < BATCH {
                let room = BATCH - batch.len();
                let more = timeout_at(deadline, self.ended.recv_many(&mut batch, room));
                match stop.run_until_cancelled(more).await {
                    Some(Ok(1..)) => {}
                    Some(Ok(0) | Err(_)) => break,
                    None => {
                        while batch.len() < BATCH
                            && let Ok(record) = self.ended.try_recv()
                        {
                            batch.push(record);
                        }
                        break;
                    }
                }
            }
            self.send(batch).await;
        }
    }

    /// Sends a batch, for as long as the collector may come back; while it is away the queue
    /// fills, and then drops.
    async fn send(&mut self, batch: Vec<Record>) {
        let spans = batch.len() as u64;
        let body: bytes::Bytes = self.encode(batch).into();
        let mut delays = RetryPolicy::reconnect().start();
        let told = |export: &mut Self, reason: &str| {
            if !std::mem::replace(&mut export.away, true) {
                tracing::warn!(
                    endpoint = %export.endpoint,
                    reason,
                    "spans are not exported; events go on, and spans beyond the queue are dropped"
                );
            }
        };
        loop {
            match self.post(body.clone()).await {
                Ok(()) => {
                    let dropped = recorder().map_or(0, Recorder::dropped);
                    let lost = self.lost + dropped - self.dropped;
                    if std::mem::take(&mut self.away) {
                        tracing::info!(lost, "spans are exported again");
                    } else if lost > 0 && !std::mem::replace(&mut self.flooded, true) {
                        tracing::warn!(
                            lost,
                            "more spans end than can be exported: they are dropped; lower \
                             sample_ratio, or raise queue"
                        );
                    }
                    (self.lost, self.dropped) = (0, dropped);
                    return;
                }
                Err(Refusal::Ever(reason)) => {
                    told(self, &reason);
                    self.lost += spans;
                    return;
                }
                Err(Refusal::Now(reason, after)) => {
                    told(self, &reason);
                    let delay = after.unwrap_or_else(|| delays.next_delay());
                    let pause = tokio::time::sleep(delay.min(Duration::from_secs(60)));
                    if self.stop.run_until_cancelled(pause).await.is_none() {
                        return;
                    }
                }
            }
        }
    }

    /// OTLP/HTTP, "OTLP/HTTP Response": what may be sent again is 429, 502, 503 and 504.
    async fn post(&self, body: bytes::Bytes) -> Result<(), Refusal> {
        let mut request = self
            .client
            .post(self.endpoint.clone())
            .header(header::CONTENT_TYPE, "application/x-protobuf")
            .body(body);
        if let Some(secret) = &self.headers {
            let text = secret.read().map_err(|error| Refusal::Now(error.to_string(), None))?;
            let headers = parse_headers(&text)
                .map_err(|problem| Refusal::Now(format!("headers: {problem}"), None))?;
            for (name, value) in headers {
                request = request.header(name, value);
            }
        }
        let answer = request
            .send()
            .await
            .map_err(|error| Refusal::Now(reason(&error.without_url()), None))?;
        let status = answer.status();
        if status.is_success() {
            return Ok(());
        }
        let again = [
            StatusCode::TOO_MANY_REQUESTS,
            StatusCode::BAD_GATEWAY,
            StatusCode::SERVICE_UNAVAILABLE,
            StatusCode::GATEWAY_TIMEOUT,
        ];
        let text = format!("the collector answers {status}");
        if again.contains(&status) {
            let after = answer
                .headers()
                .get(header::RETRY_AFTER)
                .and_then(|value| value.to_str().ok()?.trim().parse().ok())
                .map(Duration::from_secs);
            return Err(Refusal::Now(text, after));
        }
        Err(Refusal::Ever(text))
    }

    fn encode(&self, batch: Vec<Record>) -> Vec<u8> {
        let scope = InstrumentationScope {
            name: "pulsebus".to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
        };
        let spans = batch.into_iter().map(span).collect();
        ExportTraceServiceRequest {
            resource_spans: vec![ResourceSpans {
                resource: Some(self.resource.clone()),
                scope_spans: vec![ScopeSpans { scope: Some(scope), spans }],
            }],
        }
        .encode_to_vec()
    }
}

/// An error with its causes.
fn reason(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        text.push_str(": ");
        text.push_str(&inner.to_string());
        cause = inner.source();
    }
    text
}

fn span(record: Record) -> Span {
    let Record { context, parent, state, kind, name, begun, ended, attributes, link, error } =
        record;
    Span {
        trace_id: context.trace_id().to_be_bytes().to_vec(),
        span_id: context.span_id().to_be_bytes().to_vec(),
        trace_state: state.map(Into::into).unwrap_or_default(),
        parent_span_id: parent.map(|id| id.to_be_bytes().to_vec()).unwrap_or_default(),
        name,
        kind: kind as i32,
        start_time_unix_nano: nanos(begun),
        // A clock that was set back in between must not make a span end before it began.
        end_time_unix_nano: nanos(ended.max(begun)),
        attributes: attributes.into_iter().map(|(key, value)| pair(key, value)).collect(),
        links: link
            .map(|old| Link {
                trace_id: old.trace_id().to_be_bytes().to_vec(),
                span_id: old.span_id().to_be_bytes().to_vec(),
                flags: u32::from(old.flags()) & FLAGS,
            })
            .into_iter()
            .collect(),
        status: error.map(|message| Status { message: message.into(), code: 2 }),
        flags: u32::from(context.flags()) & FLAGS,
    }
}

fn nanos(at: SystemTime) -> u64 {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

fn pair(key: impl Into<String>, value: Value) -> KeyValue {
    let value = match value {
        Value::Text(text) => AnyOf::Text(text.into()),
        Value::Int(number) => AnyOf::Int(number),
        Value::Bool(value) => AnyOf::Bool(value),
    };
    KeyValue { key: key.into(), value: Some(AnyValue { value: Some(value) }) }
}

/// Who the spans are from.
fn resource(service: &str, further: &BTreeMap<String, String>) -> Resource {
    let text = |key: &str, value: &str| pair(key, Value::from(value));
    let mut attributes = vec![
        text("service.name", service),
        text("service.version", env!("CARGO_PKG_VERSION")),
        text("service.instance.id", &uuid::Uuid::new_v4().to_string()),
        text("telemetry.sdk.name", "pulsebus"),
        text("telemetry.sdk.language", "rust"),
        text("telemetry.sdk.version", env!("CARGO_PKG_VERSION")),
    ];
    attributes.retain(|own| !further.contains_key(&own.key));
    attributes.extend(further.iter().map(|(key, value)| text(key, value)));
    Resource { attributes }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_written_as_opentelemetry_writes_them() {
        let parsed = parse_headers("api-key=a%20b, X-Other = c=d,").unwrap();
        let expected = [("api-key", "a b"), ("X-Other", "c=d")];
        assert_eq!(parsed, expected.map(|(name, value)| (name.to_owned(), value.to_owned())));
        for wrong in ["key", "a b=c", "k=%0a", "k=%ff"] {
            let problem = parse_headers(wrong).unwrap_err();
            assert!(!problem.contains(wrong), "{problem}");
        }
    }
}
