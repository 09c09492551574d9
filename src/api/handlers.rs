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
    status::{ErrorView, age},
};
use crate::{
    bus::{EventBus, HandlerAccessError, Rebuilding, RewindTo},
    dispatch::{BlockedKey, Cause, Snapshot},
    event::Position,
};

/// A handler of `GET /v1/handlers`.
#[derive(Debug, Serialize)]
pub(super) struct HandlerView {
    name: String,
    kind: &'static str,
    state: &'static str,
    #[serde(with = "time::serde::rfc3339")]
    since: OffsetDateTime,
    /// Everything up to here is finished, or has a row that says what it waits for.
    position: Position,
    /// Events between that and the head of the log.
    lag: u64,
    /// How old the first of these is; absent until it has been looked up.
    lag_seconds: Option<f64>,
    in_flight: u64,
    /// The call that has been under way for longest.
    oldest_in_flight: Option<CallView>,
    retrying: u64,
    #[serde(with = "time::serde::rfc3339::option")]
    next_retry_at: Option<OffsetDateTime>,
    parked: u64,
    /// Keys that are retrying, or behind a dead letter.
    blocked_keys: u64,
    dead: u64,
    last_error: Option<ErrorView>,
    #[serde(with = "time::serde::rfc3339::option")]
    last_progress_at: Option<OffsetDateTime>,
    reason: Option<String>,
    /// How far its rebuild is.
    rebuild: Option<RebuildView>,
    /// The keys that do not flow, the earliest first; of a single handler only.
    #[serde(skip_serializing_if = "Option::is_none")]
    blocked: Option<Vec<BlockedView>>,
}

/// Keys shown that do not flow.
const BLOCKED: usize = 50;

#[derive(Debug, Serialize)]
struct CallView {
    /// Of its first event.
    position: Position,
    #[serde(with = "time::serde::rfc3339")]
    since: OffsetDateTime,
    seconds: f64,
}

#[derive(Debug, Serialize)]
struct BlockedView {
    key: Option<String>,
    position: Position,
    /// `retrying` or `dead`.
    state: &'static str,
    attempts: u32,
    #[serde(with = "time::serde::rfc3339::option")]
    due_at: Option<OffsetDateTime>,
    last_error: Option<ErrorView>,
    followers: u64,
}

impl From<BlockedKey> for BlockedView {
    fn from(blocked: BlockedKey) -> Self {
        let (state, due_at) = match blocked.cause {
            Cause::Retrying { due_at } => ("retrying", Some(due_at)),
            Cause::Dead => ("dead", None),
        };
        Self {
            key: blocked.key.map(|key| key.to_string()),
            position: blocked.position,
            state,
            attempts: blocked.attempts,
            due_at,
            last_error: ErrorView::of(
                blocked.failure.map(|failure| (failure.last_error, failure.last_failed_at)),
            ),
            followers: blocked.followers,
        }
    }
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
            lag_seconds: match bus.oldest_unfinished(snapshot) {
                Some(oldest) => Some(age(oldest)),
                None if snapshot.position >= head => Some(0.0),
                None => None,
            },
            name: snapshot.name.to_string(),
            kind: snapshot.kind,
            state: snapshot.state.as_str(),
            since: snapshot.since,
            position: snapshot.position,
            in_flight: snapshot.in_flight,
            oldest_in_flight: snapshot.oldest_call.map(|(position, since)| CallView {
                position,
                since,
                seconds: age(since),
            }),
            retrying: snapshot.retrying,
            next_retry_at: snapshot.next_retry,
            parked: snapshot.parked,
            blocked_keys: snapshot.blocked_keys,
            dead: snapshot.dead,
            last_error: ErrorView::of(snapshot.last_error.clone()),
            last_progress_at: snapshot.last_progress,
            reason: bus.reason(snapshot),
            rebuild: bus
                .rebuilding(&snapshot.name)
                .map(|Rebuilding { position, head }| RebuildView { position, head }),
            blocked: None,
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
    let (bus, name) = (&state.api.bus, segment(name)?);
    let Json(mut view) = view(bus, &name)?;
    let blocked = bus.blocked(&name, BLOCKED).await.map_err(problem)?;
    view.blocked = Some(blocked.into_iter().map(BlockedView::from).collect());
    Ok(Json(view))
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
