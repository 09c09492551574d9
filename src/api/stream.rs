//! `GET /v1/events/stream`: the log as server-sent events, resumable by `Last-Event-ID`.

use std::{collections::VecDeque, convert::Infallible, sync::Arc, time::Duration};

use axum::{
    extract::{Query, State as Extract, rejection::QueryRejection},
    http::HeaderMap,
    response::sse::{Event, KeepAlive, Sse},
};
use futures_util::{Stream, stream};
use serde::Deserialize;

use super::{Problem, Shared, events::params, view::EventView};
use crate::{
    event::{Position, StoredEvent},
    store::Limit,
};

/// What to follow.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Params {
    /// From this position on, itself included; default: what comes from now on.
    from: Option<u64>,
    #[serde(rename = "type")]
    kind: Option<String>,
    key: Option<String>,
}

pub(super) async fn stream(
    Extract(state): Shared,
    headers: HeaderMap,
    query: Result<Query<Params>, QueryRejection>,
) -> Result<Sse<impl Stream<Item = Result<Event, Infallible>>>, Problem> {
    let params = params(query)?;
    let last_seen = match headers.get("last-event-id") {
        None => None,
        Some(value) => Some(
            value
                .to_str()
                .ok()
                .and_then(|text| text.parse::<u64>().ok())
                .ok_or_else(|| Problem::bad_request("Last-Event-ID is no position"))?,
        ),
    };
    let place = Arc::clone(&state.streams).try_acquire_owned().map_err(|_| {
        Problem::unavailable("too many event streams are open; close one, or poll GET /v1/events")
    })?;
    let log = Arc::clone(state.api.bus.log());
    let after = last_seen
        .or(params.from.map(|from| from.saturating_sub(1)))
        .map_or_else(|| log.head(), Position);
    let mut head = log.watch_head();
    head.mark_changed();
    let stop = state.stop.clone();
    let pages = stream::unfold((after, VecDeque::new(), place), move |(after, queue, place)| {
        let (log, mut head, stop) = (Arc::clone(&log), head.clone(), stop.clone());
        let params = (params.kind.clone(), params.key.clone());
        async move {
            let (mut after, mut queue): (Position, VecDeque<Arc<StoredEvent>>) = (after, queue);
            loop {
                if let Some(event) = queue.pop_front() {
                    if event.position > after.next() {
                        // The log has no gap but at its beginning: these have been removed.
                        let sent = removed(after.next(), event.position);
                        after = Position(event.position.0.saturating_sub(1));
                        queue.push_front(event);
                        if let Some(sent) = sent {
                            return Some((Ok(sent), (after, queue, place)));
                        }
                        continue;
                    }
                    after = event.position;
                    let (kind, key) = &params;
                    if kind.as_deref().is_some_and(|kind| kind != event.kind())
                        || key.as_deref().is_some_and(|key| key != event.key())
                    {
                        continue;
                    }
                    let Some(sent) = sse(&event) else { continue };
                    return Some((Ok(sent), (after, queue, place)));
                }
                let more = async {
                    let grown = head.wait_for(|head| *head > after).await.is_ok();
                    if !grown {
                        return None;
                    }
                    let limit = Limit { events: 100, ..Limit::default() };
                    match log.read(after, limit).await {
                        Ok(events) => Some(events),
                        Err(_) => {
                            tokio::time::sleep(Duration::from_secs(1)).await;
                            Some(Vec::new())
                        }
                    }
                };
                // The client resumes elsewhere, or later, from the last id it saw.
                queue.extend(stop.run_until_cancelled(more).await??);
            }
        }
    });
    Ok(Sse::new(pages).keep_alive(KeepAlive::new().interval(Duration::from_secs(15))))
}

/// Says that events are missing because they have been removed. It carries the id of the last of
/// them, so that a client that resumes is not told again.
fn removed(from: Position, first: Position) -> Option<Event> {
    let id = first.0.saturating_sub(1).to_string();
    let data = serde_json::json!({ "from": from, "first": first });
    Event::default().id(id).event("removed").json_data(data).ok()
}

fn sse(event: &StoredEvent) -> Option<Event> {
    let view = EventView::of(event).ok()?;
    let event_id = event.position.to_string();
    // A line break in a body is white space between JSON tokens; the protocol sends it as
    // several data lines, which a client joins again.
    Event::default().id(event_id).event("event").json_data(view).ok()
}
