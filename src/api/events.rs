//! `GET /v1/events` and `/v1/events/{position}`.

use std::sync::Arc;

use axum::{
    Json,
    extract::{
        Path, Query as QueryString, State as Extract,
        rejection::{PathRejection, QueryRejection},
    },
    http::StatusCode,
    response::{IntoResponse, Response},
};
use serde::Deserialize;
use serde_json::json;

use super::{Problem, Shared, view::EventView};
use crate::{
    event::{Position, StoredEvent},
    store::{Extent, Limit, Query},
};

/// What to list.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Params {
    /// From this position on, itself included.
    from: Option<u64>,
    /// Behind this position, in the order asked for: what `next` of the last page said.
    after: Option<u64>,
    /// At most this many: 1 to 1,000, default 100.
    limit: Option<usize>,
    #[serde(rename = "type")]
    kind: Option<String>,
    key: Option<String>,
    /// `asc` (default) or `desc`.
    order: Option<String>,
}

/// The largest page.
pub(super) const MAX_PAGE: usize = 1_000;

pub(super) fn page_size(limit: Option<usize>) -> Result<usize, Problem> {
    match limit.unwrap_or(100) {
        limit @ 1..=MAX_PAGE => Ok(limit),
        limit => Err(Problem::bad_request(format!("limit is {limit}; it can be 1 to {MAX_PAGE}"))),
    }
}

/// What stands in a path; refused where that is not UTF-8.
pub(super) fn segment(path: Result<Path<String>, PathRejection>) -> Result<String, Problem> {
    path.map(|Path(segment)| segment).map_err(|error| Problem::bad_request(error.body_text()))
}

pub(super) fn params<T>(query: Result<QueryString<T>, QueryRejection>) -> Result<T, Problem> {
    query.map(|QueryString(params)| params).map_err(|error| Problem::bad_request(error.body_text()))
}

pub(super) async fn list(
    Extract(state): Shared,
    query: Result<QueryString<Params>, QueryRejection>,
) -> Result<Response, Problem> {
    let params = params(query)?;
    let limit = page_size(params.limit)?;
    let descending = match params.order.as_deref() {
        None | Some("asc") => false,
        Some("desc") => true,
        Some(other) => {
            return Err(Problem::bad_request(format!("order is `{other}`; it can be asc or desc")));
        }
    };
    let after = match (params.from, params.after) {
        (None, None) => 0,
        (None, Some(after)) => after,
        (Some(from), None) if descending => from.saturating_add(1),
        (Some(from), None) => from.saturating_sub(1),
        (Some(_), Some(_)) => {
            return Err(Problem::bad_request("give from or after, not both"));
        }
    };
    let after = Position(after);
    let log = state.api.bus.log();
    let events = if params.kind.is_none() && params.key.is_none() && !descending {
        log.read(after, Limit { events: limit, ..Limit::default() }).await?
    } else {
        let (kind, key) = (params.kind, params.key);
        let query = Query { after, kind, key, descending, limit, ..Query::default() };
        log.store().list(&query).await?
    };
    let first = log.store().extent().await?.first();
    // A short page may have been cut by size; only an empty one is last.
    let next = events
        .last()
        .map(|event| event.position.0)
        .filter(|&last| if descending { last > first.0 } else { last < log.head().0 });
    page(&events, next, first)
}

fn page(
    events: &[Arc<StoredEvent>],
    next: Option<u64>,
    first: Position,
) -> Result<Response, Problem> {
    let events: Vec<_> = events
        .iter()
        .map(|event| EventView::of(event))
        .collect::<Result<_, _>>()
        .map_err(|error| unreadable(&error))?;
    Ok(Json(json_page(&events, next, first).map_err(|error| unreadable(&error))?).into_response())
}

/// Serialised by hand of serde_json's raw value, so that bodies stay as they are.
fn json_page(
    events: &[EventView<'_>],
    next: Option<u64>,
    first: Position,
) -> Result<Box<serde_json::value::RawValue>, serde_json::Error> {
    #[derive(serde::Serialize)]
    struct Page<'a> {
        events: &'a [EventView<'a>],
        next: Option<u64>,
        /// The first position that is in the log: those before it have been removed.
        first: Position,
    }
    serde_json::value::to_raw_value(&Page { events, next, first })
}

fn unreadable(error: &serde_json::Error) -> Problem {
    Problem::new(
        StatusCode::INTERNAL_SERVER_ERROR,
        format!("an event in the log is not JSON ({error}): was it changed in the database?"),
    )
}

fn missing(position: u64, log: Extent) -> Problem {
    let (status, detail) = if (1..=log.removed.0).contains(&position) {
        let gone = "has been removed from the log (store.retain)";
        (StatusCode::GONE, format!("the event at position {position} {gone}"))
    } else {
        (StatusCode::NOT_FOUND, format!("there is no event at position {position}"))
    };
    Problem::new(status, detail).with("first", json!(log.first())).with("head", json!(log.head))
}

pub(super) async fn one(
    Extract(state): Shared,
    position: Result<Path<String>, PathRejection>,
) -> Result<Response, Problem> {
    let position = segment(position)?;
    let position: u64 = position
        .parse()
        .map_err(|_| Problem::bad_request(format!("`{position}` is no position: 1, 2, 3 …")))?;
    let log = state.api.bus.log();
    let limit = Limit { events: 1, ..Limit::default() };
    let events = match position.checked_sub(1) {
        Some(before) => log.read(Position(before), limit).await?,
        None => Vec::new(),
    };
    let Some(event) = events.first().filter(|event| event.position.0 == position) else {
        return Err(missing(position, log.store().extent().await?));
    };
    let view = EventView::of(event).map_err(|error| unreadable(&error))?;
    let raw = serde_json::value::to_raw_value(&view).map_err(|error| unreadable(&error))?;
    Ok(Json(raw).into_response())
}
