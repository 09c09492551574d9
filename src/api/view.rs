//! What an event looks like in an answer.

use serde::Serialize;
use serde_json::value::RawValue;
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use crate::event::{Format, Headers, Origin, Position, StoredEvent};

/// An event of `GET /v1/events`.
#[derive(Debug, Serialize)]
pub(super) struct EventView<'a> {
    position: Position,
    id: &'a str,
    source: &'a str,
    #[serde(rename = "type")]
    kind: &'a str,
    subject: Option<&'a str>,
    time: Option<String>,
    key: &'a str,
    recorded_at: String,
    format: Format,
    headers: &'a Headers,
    origin: &'a Origin,
    /// The JSON as published.
    body: &'a RawValue,
}

impl<'a> EventView<'a> {
    pub(super) fn of(event: &'a StoredEvent) -> Result<Self, serde_json::Error> {
        Ok(Self {
            position: event.position,
            id: event.id(),
            source: event.source(),
            kind: event.kind(),
            subject: event.subject(),
            time: event.time().map(rfc3339),
            key: event.key(),
            recorded_at: rfc3339(event.recorded_at),
            format: event.format(),
            headers: event.headers(),
            origin: event.origin(),
            body: serde_json::from_str(event.body_str().trim())?,
        })
    }
}

/// RFC 3339, in UTC.
pub(super) fn rfc3339(at: OffsetDateTime) -> String {
    // Fails only for years beyond 9999, which have no RFC 3339.
    at.format(&Rfc3339).unwrap_or_else(|_| at.to_string())
}
