//! `/v1/handlers`: how they are; pause, resume, rewind, rebuild, forget.

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
    events::segment,
    redrives::{By, SOMEBODY},
};
use crate::{
    bus::{EventBus, HandlerAccessError, Rebuilding, RewindTo},
    dispatch::Snapshot,
    event::Position,
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
    /// How far its rebuild is.
    rebuild: Option<RebuildView>,
}

#[derive(Debug, Serialize)]
struct RebuildView {
    position: Position,
    head: Position,
}

impl HandlerView {
    fn of(bus: &EventBus, snapshot: &Snapshot) -> Self {
        let head = bus.log().head();
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
            rebuild: bus
                .rebuilding(&snapshot.name)
                .map(|Rebuilding { position, head }| RebuildView { position, head }),
        }
    }
}

#[derive(Debug, Serialize)]
pub(super) struct HandlerList {
    handlers: Vec<HandlerView>,
}

pub(super) async fn list(Extract(state): Shared) -> Json<HandlerList> {
    let bus = &state.api.bus;
    let handlers =
        bus.handlers().into_iter().map(|handler| HandlerView::of(bus, &handler)).collect();
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
    Ok(Json(HandlerView::of(bus, &snapshot)))
}

pub(super) async fn rebuild(
    Extract(state): Shared,
    name: Result<Path<String>, PathRejection>,
    by: Result<Query<By>, QueryRejection>,
) -> Result<(StatusCode, Json<HandlerView>), Problem> {
    let (name, by) = (segment(name)?, By::name(by)?);
    let bus = &state.api.bus;
    bus.rebuild(&name, &by).await.map_err(conflict)?;
    Ok((StatusCode::ACCEPTED, view(bus, &name)?))
}

pub(super) async fn cancel_rebuild(
    Extract(state): Shared,
    name: Result<Path<String>, PathRejection>,
    by: Result<Query<By>, QueryRejection>,
) -> Result<Json<HandlerView>, Problem> {
    let (name, by) = (segment(name)?, By::name(by)?);
    let bus = &state.api.bus;
    bus.cancel_rebuild(&name, &by).await.map_err(conflict)?;
    view(bus, &name)
}

/// What was forgotten.
#[derive(Debug, Serialize)]
pub(super) struct Forgotten {
    forgotten: String,
}

pub(super) async fn forget(
    Extract(state): Shared,
    name: Result<Path<String>, PathRejection>,
    by: Result<Query<By>, QueryRejection>,
) -> Result<Json<Forgotten>, Problem> {
    let (name, by) = (segment(name)?, By::name(by)?);
    state.api.bus.forget(&name, &by).await.map_err(conflict)?;
    Ok(Json(Forgotten { forgotten: name }))
}

/// What is refused because of how things are, not because of how it was asked for.
fn conflict(error: HandlerAccessError) -> Problem {
    match error {
        HandlerAccessError::Refused(reason) => Problem::new(StatusCode::CONFLICT, reason),
        error => problem(error),
    }
}

pub(super) async fn pause(
    Extract(state): Shared,
    name: Result<Path<String>, PathRejection>,
    by: Result<Query<By>, QueryRejection>,
) -> Result<Json<HandlerView>, Problem> {
    let (name, by) = (segment(name)?, By::name(by)?);
    state.api.bus.pause(&name, &by).await.map_err(problem)?;
    view(&state.api.bus, &name)
}

pub(super) async fn resume(
    Extract(state): Shared,
    name: Result<Path<String>, PathRejection>,
    by: Result<Query<By>, QueryRejection>,
) -> Result<Json<HandlerView>, Problem> {
    let (name, by) = (segment(name)?, By::name(by)?);
    state.api.bus.resume(&name, &by).await.map_err(problem)?;
    view(&state.api.bus, &name)
}

/// Where a cursor is to be moved.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RewindOrder {
    /// The event there is the next one.
    position: Option<u64>,
    /// The first event recorded then or later is the next one.
    #[serde(default, with = "time::serde::rfc3339::option")]
    time: Option<OffsetDateTime>,
    /// Effects outside of pulsebus may happen again.
    #[serde(default)]
    allow_side_effects: bool,
    by: Option<String>,
}

pub(super) async fn rewind(
    Extract(state): Shared,
    name: Result<Path<String>, PathRejection>,
    order: Result<Json<RewindOrder>, JsonRejection>,
) -> Result<Json<HandlerView>, Problem> {
    let name = segment(name)?;
    let Json(order) = order.map_err(|error| Problem::bad_request(error.body_text()))?;
    let RewindOrder { position, time, allow_side_effects, by } = order;
    let to = match (position, time) {
        (Some(position), None) => RewindTo::Position(Position(position)),
        (None, Some(time)) => RewindTo::Time(time),
        _ => return Err(Problem::bad_request("give either a position or a time")),
    };
    let by = by.as_deref().unwrap_or(SOMEBODY);
    let bus = &state.api.bus;
    let cursor = bus.rewind(&name, to, allow_side_effects, by).await.map_err(problem)?;
    let Json(mut view) = view(bus, &name)?;
    // Where it goes on from, whether or not its runner has begun there yet.
    (view.position, view.lag) = (cursor, bus.log().head().0.saturating_sub(cursor.0));
    Ok(Json(view))
}

#[expect(clippy::needless_pass_by_value, reason = "for map_err")]
pub(super) fn problem(error: HandlerAccessError) -> Problem {
    let text = error.to_string();
    match error {
        HandlerAccessError::Unknown(_) => Problem::new(StatusCode::NOT_FOUND, text),
        HandlerAccessError::Refused(_) => Problem::bad_request(text),
        HandlerAccessError::SideEffects(_) => Problem::new(StatusCode::CONFLICT, text),
        HandlerAccessError::Closed
        | HandlerAccessError::NotStarted(_)
        | HandlerAccessError::Elsewhere(_)
        | HandlerAccessError::Store(_) => Problem::unavailable(text),
    }
}
