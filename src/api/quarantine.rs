//! `/v1/quarantine`: what was no event, to be looked at, ingested again, discarded.

use axum::{
    Json,
    extract::{
        Path, Query, State as Extract,
        rejection::{JsonRejection, PathRejection, QueryRejection},
    },
    http::StatusCode,
};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use serde::{Deserialize, Serialize};

use super::{
    Problem, Shared,
    events::{page_size, params},
    redrives::{Order, Started, start},
    view::rfc3339,
};
use crate::{
    event::{Headers, Origin},
    store::{
        QuarantineEntry,
        progress::{QuarantineFilter, RedriveAction, Selection},
    },
};

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Params {
    after: Option<u64>,
    limit: Option<usize>,
}

/// An entry of `GET /v1/quarantine`.
#[derive(Debug, Serialize)]
pub(super) struct QuarantineView {
    number: u64,
    source: String,
    received_at: String,
    reason: String,
    origin: Origin,
    headers: Headers,
    size: u64,
    /// The bytes, where they are UTF-8; only when asked for one entry.
    #[serde(skip_serializing_if = "Option::is_none")]
    body: Option<String>,
    /// The bytes as base64, where they are not.
    #[serde(skip_serializing_if = "Option::is_none")]
    body_base64: Option<String>,
}

impl From<QuarantineEntry> for QuarantineView {
    fn from(entry: QuarantineEntry) -> Self {
        Self {
            number: entry.number,
            source: entry.origin.source.to_string(),
            received_at: rfc3339(entry.received_at),
            reason: entry.reason,
            headers: entry.headers,
            size: entry.size,
            origin: entry.origin,
            body: None,
            body_base64: None,
        }
    }
}

#[derive(Debug, Serialize)]
pub(super) struct QuarantinePage {
    quarantine: Vec<QuarantineView>,
    next: Option<u64>,
}

pub(super) async fn list(
    Extract(state): Shared,
    query: Result<Query<Params>, QueryRejection>,
) -> Result<Json<QuarantinePage>, Problem> {
    let params = params(query)?;
    let limit = page_size(params.limit)?;
    let entries = state.api.bus.store().quarantine(params.after.unwrap_or(0), limit).await?;
    let next = entries.last().map(|entry| entry.number).filter(|_| entries.len() == limit);
    let quarantine = entries.into_iter().map(QuarantineView::from).collect();
    Ok(Json(QuarantinePage { quarantine, next }))
}

pub(super) async fn one(
    Extract(state): Shared,
    number: Result<Path<u64>, PathRejection>,
) -> Result<Json<QuarantineView>, Problem> {
    let Path(number) = number.map_err(|error| Problem::bad_request(error.body_text()))?;
    let found = state.api.bus.store().quarantine_entry(number).await?;
    let Some((entry, bytes)) = found else {
        let missing = format!("there is no quarantine entry {number}");
        return Err(Problem::new(StatusCode::NOT_FOUND, missing));
    };
    let mut view = QuarantineView::from(entry);
    match std::str::from_utf8(&bytes) {
        Ok(text) => view.body = Some(text.to_owned()),
        Err(_) => view.body_base64 = Some(BASE64_STANDARD.encode(&bytes)),
    }
    Ok(Json(view))
}

pub(super) async fn retry(
    state: Shared,
    order: Result<Json<Order<QuarantineFilter>>, JsonRejection>,
) -> Result<(StatusCode, Json<Started>), Problem> {
    start(state, order, RedriveAction::Retry, Selection::Quarantine).await
}

pub(super) async fn discard(
    state: Shared,
    order: Result<Json<Order<QuarantineFilter>>, JsonRejection>,
) -> Result<(StatusCode, Json<Started>), Problem> {
    start(state, order, RedriveAction::Discard, Selection::Quarantine).await
}
