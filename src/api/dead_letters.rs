//! `/v1/dead-letters`: what handlers could not handle, to be looked at, retried, discarded.

use axum::{
    Json,
    extract::{
        Path, Query, State as Extract,
        rejection::{JsonRejection, PathRejection, QueryRejection},
    },
    http::StatusCode,
};
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;

use super::{
    Problem, Shared,
    events::{page_size, params},
    redrives::{Order, Started, start},
    view::rfc3339,
};
use crate::{
    event::Position,
    store::progress::{DeadLetter, DeadLetterFilter, RedriveAction, Selection},
};

/// Which ones, and which page of them.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Params {
    handler: Option<String>,
    #[serde(rename = "type")]
    kind: Option<String>,
    key: Option<String>,
    /// A text that the last error contains.
    error: Option<String>,
    #[serde(default, with = "time::serde::rfc3339::option")]
    since: Option<OffsetDateTime>,
    #[serde(default, with = "time::serde::rfc3339::option")]
    until: Option<OffsetDateTime>,
    /// Exactly these, separated by commas.
    position: Option<String>,
    /// What `next` of the last page said.
    after: Option<String>,
    limit: Option<usize>,
}

/// A dead letter of `GET /v1/dead-letters`.
#[derive(Debug, Serialize)]
pub(super) struct DeadLetterView {
    handler: String,
    position: Position,
    id: String,
    #[serde(rename = "type")]
    kind: String,
    key: String,
    attempts: u32,
    first_error: String,
    last_error: String,
    first_failed_at: String,
    last_failed_at: String,
    followers: u64,
    redrive: Option<u64>,
}

impl From<DeadLetter> for DeadLetterView {
    fn from(letter: DeadLetter) -> Self {
        Self {
            handler: letter.handler.to_string(),
            position: letter.position,
            id: letter.id.to_string(),
            kind: letter.kind.to_string(),
            key: letter.key.to_string(),
            attempts: letter.attempts,
            first_error: letter.failure.first_error.to_string(),
            last_error: letter.failure.last_error.to_string(),
            first_failed_at: rfc3339(letter.failure.first_failed_at),
            last_failed_at: rfc3339(letter.failure.last_failed_at),
            followers: letter.followers,
            redrive: letter.redrive,
        }
    }
}

#[derive(Debug, Serialize)]
pub(super) struct DeadLetterPage {
    dead_letters: Vec<DeadLetterView>,
    next: Option<String>,
}

pub(super) async fn list(
    Extract(state): Shared,
    query: Result<Query<Params>, QueryRejection>,
) -> Result<Json<DeadLetterPage>, Problem> {
    let Params { handler, kind, key, error, since, until, position, after, limit } = params(query)?;
    let limit = page_size(limit)?;
    let after = after.as_deref().map(parse_after).transpose()?;
    let positions = position.as_deref().map(parse_positions).transpose()?.unwrap_or_default();
    let filter = DeadLetterFilter {
        handler,
        handlers: Vec::new(),
        positions,
        kind,
        key,
        error,
        since,
        until,
    };
    let store = state.api.bus.store();
    let letters = store.dead_letters(&filter, after, limit).await?;
    let next = letters
        .last()
        .filter(|_| letters.len() == limit)
        .map(|letter| format!("{}:{}", letter.position, letter.handler));
    let dead_letters = letters.into_iter().map(DeadLetterView::from).collect();
    Ok(Json(DeadLetterPage { dead_letters, next }))
}

/// `POSITION,POSITION`. None at all would mean all of them, so that is an error.
fn parse_positions(positions: &str) -> Result<Vec<u64>, Problem> {
    let parsed: Result<_, _> = positions.split(',').map(str::parse).collect();
    parsed.map_err(|_| {
        Problem::bad_request(format!("position is `{positions}`; write it as in 7 or 7,9"))
    })
}

/// `POSITION:HANDLER`, as the last page gave it.
fn parse_after(after: &str) -> Result<(&str, Position), Problem> {
    let parsed = after.split_once(':').and_then(|(position, handler)| {
        position.parse().ok().map(|position| (handler, Position(position)))
    });
    parsed.ok_or_else(|| {
        Problem::bad_request(format!("after is `{after}`; give what `next` of the last page said"))
    })
}

pub(super) async fn one(
    Extract(state): Shared,
    path: Result<Path<(String, u64)>, PathRejection>,
) -> Result<Json<DeadLetterView>, Problem> {
    let Path((handler, position)) =
        path.map_err(|error| Problem::bad_request(error.body_text()))?;
    let filter = DeadLetterFilter {
        handler: Some(handler.clone()),
        positions: vec![position],
        ..DeadLetterFilter::default()
    };
    let letter = state.api.bus.store().dead_letters(&filter, None, 1).await?.pop();
    let missing = format!("handler `{handler}` has no dead letter at position {position}");
    letter
        .map(|letter| Json(letter.into()))
        .ok_or_else(|| Problem::new(StatusCode::NOT_FOUND, missing))
}

pub(super) async fn retry(
    state: Shared,
    order: Result<Json<Order<DeadLetterFilter>>, JsonRejection>,
) -> Result<(StatusCode, Json<Started>), Problem> {
    start(state, order, RedriveAction::Retry, Selection::DeadLetters).await
}

pub(super) async fn discard(
    state: Shared,
    order: Result<Json<Order<DeadLetterFilter>>, JsonRejection>,
) -> Result<(StatusCode, Json<Started>), Problem> {
    start(state, order, RedriveAction::Discard, Selection::DeadLetters).await
}
