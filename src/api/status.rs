//! `/healthz`, `/readyz`, `/metrics`, `/v1/sources`.

use std::time::Instant;

use axum::{
    Json,
    extract::{MatchedPath, Request, State as Extract},
    http::{HeaderMap, StatusCode, Uri, header},
    middleware::Next,
    response::{IntoResponse, Response},
};
use serde::Serialize;
use time::OffsetDateTime;

use super::{Shared, access};
use crate::{
    bus::{Component, Health, SourceSnapshot},
    telemetry::TextFormat,
};

/// The process runs. Says nothing about brokers or the store.
pub(super) async fn healthz() -> &'static str {
    "ok\n"
}

#[derive(Debug, Serialize)]
pub(super) struct Readiness {
    ready: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    version: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    components: Option<Vec<Component>>,
}

/// 200 while events can come in and nothing needs a person; 503 otherwise. How each part is and
/// why, with names and addresses in it, only those learn who may ask for the rest as well.
pub(super) async fn readyz(
    Extract(state): Shared,
    headers: HeaderMap,
    uri: Uri,
) -> (StatusCode, Json<Readiness>) {
    let allowed = access::allowed(&state.token, &headers, &uri).is_ok();
    readiness(state.api.bus.components(), allowed)
}

pub(super) fn readiness(
    components: Vec<Component>,
    in_detail: bool,
) -> (StatusCode, Json<Readiness>) {
    let ready = components.iter().all(|component| component.health != Health::NotReady);
    let status = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let version = in_detail.then_some(env!("CARGO_PKG_VERSION"));
    (status, Json(Readiness { ready, version, components: in_detail.then_some(components) }))
}

/// In the format that is asked for: OpenMetrics where both would do.
pub(super) async fn metrics(Extract(state): Shared, headers: HeaderMap) -> impl IntoResponse {
    let accepted: Vec<_> =
        headers.get_all(header::ACCEPT).iter().filter_map(|value| value.to_str().ok()).collect();
    let format = TextFormat::preferred(&accepted.join(","));
    let told = [(header::CONTENT_TYPE, format.content_type()), (header::VARY, "accept")];
    (told, state.api.bus.metrics_text(format))
}

/// Counts a request by its route, whose parameters have names and not values, and by how it
/// ended.
pub(super) async fn count(Extract(state): Shared, request: Request, next: Next) -> Response {
    let begun = Instant::now();
    let route = request.extensions().get::<MatchedPath>().cloned();
    let answer = next.run(request).await;
    let route = route.as_ref().map_or("other", MatchedPath::as_str);
    let http = &state.api.bus.metrics().http;
    http.answered(route, answer.status().as_u16(), begun.elapsed());
    answer
}

/// Something that went wrong.
#[derive(Debug, Serialize)]
pub(super) struct ErrorView {
    text: String,
    #[serde(with = "time::serde::rfc3339")]
    at: OffsetDateTime,
}

impl ErrorView {
    pub(super) fn of(error: Option<(impl std::fmt::Display, OffsetDateTime)>) -> Option<Self> {
        error.map(|(text, at)| Self { text: text.to_string(), at })
    }
}

/// How long ago that was, in seconds.
pub(super) fn age(since: OffsetDateTime) -> f64 {
    let age = (OffsetDateTime::now_utc() - since).as_seconds_f64().max(0.0);
    (age * 1_000.0).round() / 1_000.0
}

#[derive(Debug, Serialize)]
struct SourceView {
    name: String,
    transport: &'static str,
    state: &'static str,
    #[serde(with = "time::serde::rfc3339")]
    since: OffsetDateTime,
    received: u64,
    redelivered: u64,
    stored: u64,
    duplicates: u64,
    quarantined: u64,
    /// Taken and not settled.
    held: u64,
    /// How long the oldest of them has been held.
    oldest_held_seconds: Option<f64>,
    /// What waits in the broker, as it said last.
    pending: Option<u64>,
    reconnects: u64,
    #[serde(with = "time::serde::rfc3339::option")]
    last_received_at: Option<OffsetDateTime>,
    #[serde(with = "time::serde::rfc3339::option")]
    last_settled_at: Option<OffsetDateTime>,
    last_error: Option<ErrorView>,
    reason: Option<String>,
}

impl From<SourceSnapshot> for SourceView {
    fn from(source: SourceSnapshot) -> Self {
        Self {
            name: source.name.to_string(),
            transport: source.transport,
            state: source.state.as_str(),
            since: source.since,
            received: source.received,
            redelivered: source.redelivered,
            stored: source.stored,
            duplicates: source.duplicates,
            quarantined: source.quarantined,
            held: source.held,
            oldest_held_seconds: source.held_since.map(age),
            pending: source.pending,
            reconnects: source.reconnects,
            last_received_at: source.last_received,
            last_settled_at: source.last_settled,
            last_error: ErrorView::of(source.last_error),
            reason: source.reason,
        }
    }
}

#[derive(Debug, Serialize)]
pub(super) struct SourceList {
    sources: Vec<SourceView>,
}

pub(super) async fn sources(Extract(state): Shared) -> Json<SourceList> {
    let sources = state.api.bus.sources().into_iter().map(SourceView::from).collect();
    Json(SourceList { sources })
}
