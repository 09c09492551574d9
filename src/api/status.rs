//! `/healthz`, `/readyz`, `/metrics`, `/v1/sources`.

use axum::{
    Json,
    extract::State as Extract,
    http::{HeaderMap, StatusCode, Uri, header},
    response::IntoResponse,
};
use serde::Serialize;

use super::{Shared, access};
use crate::bus::{Component, Health};

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
    let allowed = access::allowed(&state.api.options, &headers, &uri).is_ok();
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

pub(super) async fn metrics(Extract(state): Shared) -> impl IntoResponse {
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(header::CONTENT_TYPE, kind)], state.api.bus.metrics_text())
}

#[derive(Debug, Serialize)]
struct SourceView {
    name: String,
    transport: &'static str,
    state: &'static str,
    received: u64,
    reason: Option<String>,
}

#[derive(Debug, Serialize)]
pub(super) struct SourceList {
    sources: Vec<SourceView>,
}

pub(super) async fn sources(Extract(state): Shared) -> Json<SourceList> {
    let sources = state
        .api
        .bus
        .sources()
        .into_iter()
        .map(|source| SourceView {
            name: source.name.to_string(),
            transport: source.transport,
            state: source.state.as_str(),
            received: source.received,
            reason: source.state.reason().map(str::to_owned),
        })
        .collect();
    Json(SourceList { sources })
}
