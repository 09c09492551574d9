//! `/v1/handlers`: how they are, pause, resume; `/v1/dead-letters`.

use axum::{
    Json,
    extract::{
        Path, Query, State as Extract,
        rejection::{PathRejection, QueryRejection},
    },
    http::StatusCode,
};
use serde::{Deserialize, Serialize};

use super::{
    Problem, Shared,
    events::{page_size, params, segment},
    view::rfc3339,
};
use crate::{
    bus::{EventBus, HandlerAccessError},
    dispatch::Snapshot,
    event::Position,
    store::DeadLetter,
};

/// A handler of `GET /v1/handlers`.
#[derive(Debug, Serialize)]
pub(super) struct HandlerView {
    name: String,
    kind: &'static str,
    state: &'static str,
    /// Everything up to here is finished.
    position: Position,
    /// Events between that and the head of the log.
    lag: u64,
    in_flight: u64,
    retrying: u64,
    parked: u64,
    dead: u64,
    reason: Option<String>,
}

impl HandlerView {
    fn of(snapshot: &Snapshot, head: Position) -> Self {
        Self {
            lag: head.0.saturating_sub(snapshot.position.0),
            name: snapshot.name.to_string(),
            kind: snapshot.kind,
            state: snapshot.state.as_str(),
            position: snapshot.position,
            in_flight: snapshot.in_flight,
            retrying: snapshot.retrying,
            parked: snapshot.parked,
            dead: snapshot.dead,
            reason: snapshot.state.reason().map(str::to_owned),
        }
    }
}

#[derive(Debug, Serialize)]
pub(super) struct HandlerList {
    handlers: Vec<HandlerView>,
}

pub(super) async fn list(Extract(state): Shared) -> Json<HandlerList> {
    let bus = &state.api.bus;
    let head = bus.log().head();
    let handlers =
        bus.handlers().into_iter().map(|handler| HandlerView::of(&handler, head)).collect();
    Json(HandlerList { handlers })
}

pub(super) async fn one(
    Extract(state): Shared,
    name: Result<Path<String>, PathRejection>,
) -> Result<Json<HandlerView>, Problem> {
    view(&state.api.bus, &segment(name)?)
}

fn view(bus: &EventBus, name: &str) -> Result<Json<HandlerView>, Problem> {
    let snapshot = bus.status(name).map_err(problem)?.snapshot();
    Ok(Json(HandlerView::of(&snapshot, bus.log().head())))
}

pub(super) async fn pause(
    Extract(state): Shared,
    name: Result<Path<String>, PathRejection>,
) -> Result<Json<HandlerView>, Problem> {
    let name = segment(name)?;
    state.api.bus.pause(&name).map_err(problem)?;
    view(&state.api.bus, &name)
}

pub(super) async fn resume(
    Extract(state): Shared,
    name: Result<Path<String>, PathRejection>,
) -> Result<Json<HandlerView>, Problem> {
    let name = segment(name)?;
    state.api.bus.resume(&name).map_err(problem)?;
    view(&state.api.bus, &name)
}

#[expect(clippy::needless_pass_by_value, reason = "for map_err")]
fn problem(error: HandlerAccessError) -> Problem {
    match error {
        HandlerAccessError::Unknown(_) => Problem::new(StatusCode::NOT_FOUND, error.to_string()),
        HandlerAccessError::Closed => Problem::unavailable(error.to_string()),
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Params {
    handler: Option<String>,
    after: Option<u64>,
    limit: Option<usize>,
}

#[derive(Debug, Serialize)]
pub(super) struct DeadLetterView {
    number: u64,
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
}

impl From<DeadLetter> for DeadLetterView {
    fn from(letter: DeadLetter) -> Self {
        Self {
            number: letter.number,
            handler: letter.handler.to_string(),
            position: letter.position,
            id: letter.id,
            kind: letter.kind,
            key: letter.key,
            attempts: letter.attempts,
            first_error: letter.first_error,
            last_error: letter.last_error,
            first_failed_at: rfc3339(letter.first_failed_at),
            last_failed_at: rfc3339(letter.last_failed_at),
        }
    }
}

#[derive(Debug, Serialize)]
pub(super) struct DeadLetterPage {
    dead_letters: Vec<DeadLetterView>,
    next: Option<u64>,
}

pub(super) async fn dead_letters(
    Extract(state): Shared,
    query: Result<Query<Params>, QueryRejection>,
) -> Result<Json<DeadLetterPage>, Problem> {
    let params = params(query)?;
    let limit = page_size(params.limit)?;
    let store = state.api.bus.store();
    let letters =
        store.dead_letters(params.handler.as_deref(), params.after.unwrap_or(0), limit).await?;
    let next = letters.last().map(|letter| letter.number).filter(|_| letters.len() == limit);
    Ok(Json(DeadLetterPage {
        dead_letters: letters.into_iter().map(DeadLetterView::from).collect(),
        next,
    }))
}
