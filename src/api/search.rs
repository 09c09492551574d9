//! `GET /v1/search/{handler}?q=`.

use axum::{
    Json,
    extract::{
        Path, Query, State as Extract,
        rejection::{PathRejection, QueryRejection},
    },
    http::StatusCode,
};
use serde::Deserialize;
use serde_json::json;

use super::{
    Problem, Shared,
    events::{params, segment},
};
use crate::handler::search::{SearchError, SearchPage, SearchQuery};

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Params {
    /// What to look for; empty finds everything.
    #[serde(default)]
    q: String,
    /// Hits at most; default 10.
    limit: Option<usize>,
    /// Of the best ones, leave out so many.
    offset: Option<usize>,
    /// Documents of these event types only, separated by commas.
    #[serde(rename = "type")]
    kind: Option<String>,
}

pub(super) async fn search(
    Extract(state): Shared,
    handler: Result<Path<String>, PathRejection>,
    query: Result<Query<Params>, QueryRejection>,
) -> Result<Json<SearchPage>, Problem> {
    let handler = segment(handler)?;
    let params = params(query)?;
    let Some(search) = state.api.searches.get(&handler) else {
        let names = state.api.searches.names();
        return Err(Problem::new(
            StatusCode::NOT_FOUND,
            format!("no search handler is called `{handler}`"),
        )
        .with("handlers", json!(names)));
    };
    let mut query = SearchQuery::new(params.q);
    query.limit = params.limit.unwrap_or(query.limit);
    query.offset = params.offset.unwrap_or(query.offset);
    query.types = params
        .kind
        .iter()
        .flat_map(|kinds| kinds.split(','))
        .filter(|kind| !kind.is_empty())
        .map(str::to_owned)
        .collect();
    search.search(&query).await.map(Json).map_err(|error| match error {
        SearchError::Query(_) => Problem::bad_request(error.to_string()),
        other => Problem::unavailable(other.to_string()),
    })
}
