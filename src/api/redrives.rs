//! `/v1/redrives`: jobs that retry or discard dead letters and quarantine entries.

use axum::{
    Json,
    extract::{
        Path, Query, State as Extract,
        rejection::{JsonRejection, PathRejection, QueryRejection},
    },
    http::StatusCode,
};
use serde::{Deserialize, Serialize};

use super::{
    Problem, Shared,
    events::{page_size, params},
    handlers::problem,
    view::rfc3339,
};
use crate::{
    bus::HandlerAccessError,
    store::progress::{NewRedrive, Redrive, RedriveAction, RedriveState, Selection},
};

/// What is to be retried or discarded.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Order<F> {
    /// Which; `{}`: all. Given always, so that nobody means all by forgetting it.
    filter: F,
    /// Only counts what matches.
    #[serde(default)]
    dry_run: bool,
    /// So many a second at most.
    rate: Option<u32>,
    /// Who wants it, for the audit.
    by: Option<String>,
    /// Why; a discard needs one.
    reason: Option<String>,
}

/// What became of an order.
#[derive(Debug, Serialize)]
pub(super) struct Started {
    /// How many match, of a dry run.
    #[serde(skip_serializing_if = "Option::is_none")]
    matching: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    redrive: Option<RedriveView>,
}

/// A redrive of `GET /v1/redrives`.
#[derive(Debug, Serialize)]
pub(super) struct RedriveView {
    number: u64,
    /// `of` and `filter`.
    #[serde(flatten)]
    selection: Selection,
    action: RedriveAction,
    state: RedriveState,
    total: u64,
    /// How many have gone their way: retried, or discarded. Of a cancelled one that is not
    /// known, since it has given back what it had left.
    done: Option<u64>,
    left: u64,
    rate: Option<u32>,
    by: String,
    reason: Option<String>,
    started_at: String,
    ended_at: Option<String>,
}

impl From<Redrive> for RedriveView {
    fn from(redrive: Redrive) -> Self {
        let NewRedrive { selection, action, rate, by, reason } = redrive.what;
        let given_back = redrive.state == RedriveState::Cancelled && redrive.left == 0;
        Self {
            number: redrive.number,
            selection,
            action,
            state: redrive.state,
            total: redrive.total,
            done: (!given_back).then(|| redrive.total.saturating_sub(redrive.left)),
            left: redrive.left,
            rate,
            by,
            reason,
            started_at: rfc3339(redrive.started_at),
            ended_at: redrive.ended_at.map(rfc3339),
        }
    }
}

/// Who is said to have done what, where the client does not say.
pub(super) const SOMEBODY: &str = "http";

pub(super) async fn start<F>(
    Extract(state): Shared,
    order: Result<Json<Order<F>>, JsonRejection>,
    action: RedriveAction,
    select: impl FnOnce(F) -> Selection,
) -> Result<(StatusCode, Json<Started>), Problem> {
    let Json(order) = order.map_err(|error| Problem::bad_request(error.body_text()))?;
    let Order { filter, dry_run, rate, by, reason } = order;
    let bus = &state.api.bus;
    let selection = select(filter);
    if dry_run {
        let matching = match &selection {
            Selection::DeadLetters(filter) => bus.store().count_dead_letters(filter).await?,
            Selection::Quarantine(filter) => bus.store().count_quarantine(filter).await?,
        };
        return Ok((StatusCode::OK, Json(Started { matching: Some(matching), redrive: None })));
    }
    let by = by.unwrap_or_else(|| SOMEBODY.to_owned());
    let what = NewRedrive { selection, action, rate, by, reason };
    let redrive = bus.redrive(&what).await.map_err(problem)?;
    let started = Started { matching: None, redrive: Some(redrive.into()) };
    Ok((StatusCode::ACCEPTED, Json(started)))
}

/// Which page of them.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Params {
    after: Option<u64>,
    limit: Option<usize>,
}

#[derive(Debug, Serialize)]
pub(super) struct RedrivePage {
    redrives: Vec<RedriveView>,
    next: Option<u64>,
}

pub(super) async fn list(
    Extract(state): Shared,
    query: Result<Query<Params>, QueryRejection>,
) -> Result<Json<RedrivePage>, Problem> {
    let Params { after, limit } = params(query)?;
    let limit = page_size(limit)?;
    let found = state.api.bus.store().redrives(after.unwrap_or(0), limit).await?;
    let next = found.last().map(|redrive| redrive.number).filter(|_| found.len() == limit);
    let redrives = found.into_iter().map(RedriveView::from).collect();
    Ok(Json(RedrivePage { redrives, next }))
}

pub(super) async fn one(
    Extract(state): Shared,
    number: Result<Path<u64>, PathRejection>,
) -> Result<Json<RedriveView>, Problem> {
    let Path(number) = number.map_err(|error| Problem::bad_request(error.body_text()))?;
    let found = state.api.bus.store().redrive(number).await?;
    found.map(|redrive| Json(redrive.into())).ok_or_else(|| missing(number))
}

fn missing(number: u64) -> Problem {
    Problem::new(StatusCode::NOT_FOUND, format!("there is no redrive {number}"))
}

/// Who wants something, for the audit.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct By {
    by: Option<String>,
}

impl By {
    pub(super) fn name(query: Result<Query<Self>, QueryRejection>) -> Result<String, Problem> {
        Ok(params(query)?.by.unwrap_or_else(|| SOMEBODY.to_owned()))
    }
}

pub(super) async fn cancel(
    Extract(state): Shared,
    number: Result<Path<u64>, PathRejection>,
    by: Result<Query<By>, QueryRejection>,
) -> Result<Json<RedriveView>, Problem> {
    let Path(number) = number.map_err(|error| Problem::bad_request(error.body_text()))?;
    let by = By::name(by)?;
    if state.api.bus.store().redrive(number).await?.is_none() {
        return Err(missing(number));
    }
    match state.api.bus.cancel_redrive(number, &by).await {
        Ok(redrive) => Ok(Json(redrive.into())),
        Err(HandlerAccessError::Refused(reason)) => Err(Problem::new(StatusCode::CONFLICT, reason)),
        Err(error) => Err(problem(error)),
    }
}

/// Something that a person did.
#[derive(Debug, Serialize)]
struct AuditView {
    number: u64,
    at: String,
    by: String,
    action: String,
    subject: String,
    detail: serde_json::Value,
}

#[derive(Debug, Serialize)]
pub(super) struct AuditPage {
    audit: Vec<AuditView>,
    next: Option<u64>,
}

/// What persons did, newest first.
pub(super) async fn audit(
    Extract(state): Shared,
    query: Result<Query<Params>, QueryRejection>,
) -> Result<Json<AuditPage>, Problem> {
    let Params { after, limit } = params(query)?;
    let limit = page_size(limit)?;
    let found = state.api.bus.store().audits(after.unwrap_or(0), limit).await?;
    let next = found.last().map(|entry| entry.number).filter(|_| found.len() == limit);
    let audit = found
        .into_iter()
        .map(|entry| AuditView {
            number: entry.number,
            at: rfc3339(entry.at),
            by: entry.by,
            action: entry.action,
            subject: entry.subject,
            detail: serde_json::from_str(&entry.detail).unwrap_or_default(),
        })
        .collect();
    Ok(Json(AuditPage { audit, next }))
}
