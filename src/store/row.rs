//! Rows of the tables and the events they hold: what both databases share.

use bytes::Bytes;
use time::OffsetDateTime;

use super::{AttemptError, Entry, Extent, QuarantineEntry, Query, StoreError, admit::Held};
use crate::event::{
    Event, EventParts, Format, HeaderValue, Headers, Origin, Position, StoredEvent,
};

/// How deep tables and arrays in headers may be nested: what is written must be readable again,
/// and the JSON reader stops at 128 levels, two of which a header level takes.
const MAX_HEADER_DEPTH: usize = 48;

/// Many short texts in one allocation.
#[derive(Debug, Default)]
pub(super) struct Texts {
    text: String,
    ends: Vec<usize>,
}

impl Texts {
    /// The headers of these, as JSON.
    pub(super) fn headers<'a>(
        all: impl Iterator<Item = &'a Headers>,
    ) -> Result<Self, AttemptError> {
        Self::build(all, |headers, out| {
            if headers.is_empty() {
                out.extend_from_slice(b"{}");
                return Ok(());
            }
            if headers.iter().any(|(_, value)| !shallow(value, MAX_HEADER_DEPTH)) {
                return Err(AttemptError::Refused(format!(
                    "headers are nested deeper than {MAX_HEADER_DEPTH}"
                )));
            }
            write_json(headers, out)
        })
    }

    /// The origins of these, as JSON.
    pub(super) fn origins<'a>(all: impl Iterator<Item = &'a Origin>) -> Result<Self, AttemptError> {
        Self::build(all, write_json)
    }

    fn build<T>(
        all: impl Iterator<Item = T>,
        write: impl Fn(T, &mut Vec<u8>) -> Result<(), AttemptError>,
    ) -> Result<Self, AttemptError> {
        let mut text = Vec::with_capacity(all.size_hint().0 * 64);
        let mut ends = Vec::with_capacity(all.size_hint().0);
        for item in all {
            write(item, &mut text)?;
            ends.push(text.len());
        }
        let text = String::from_utf8(text).map_err(|e| AttemptError::Refused(e.to_string()))?;
        Ok(Self { text, ends })
    }

    /// How many bytes they have together.
    pub(super) const fn len(&self) -> usize {
        self.text.len()
    }

    pub(super) fn iter(&self) -> impl ExactSizeIterator<Item = &str> {
        let mut start = 0;
        self.ends.iter().map(move |&end| {
            let text = &self.text[start..end];
            start = end;
            text
        })
    }
}

fn shallow(value: &HeaderValue, left: usize) -> bool {
    match value {
        HeaderValue::Array(values) => left > 0 && values.iter().all(|v| shallow(v, left - 1)),
        HeaderValue::Table(table) => left > 0 && table.iter().all(|(_, v)| shallow(v, left - 1)),
        _ => true,
    }
}

/// Appends a value as JSON.
pub(super) fn write_json<T: serde::Serialize + ?Sized>(
    value: &T,
    out: &mut Vec<u8>,
) -> Result<(), AttemptError> {
    serde_json::to_writer(out, value).map_err(|e| AttemptError::Refused(e.to_string()))
}

/// The body as text; an event's body is UTF-8, but parts can be put together by anyone.
pub(super) fn body_text(event: &Event) -> Result<&str, AttemptError> {
    std::str::from_utf8(event.body())
        .map_err(|error| AttemptError::Refused(format!("the body is not UTF-8: {error}")))
}

/// The configured source of a quarantine entry, as its column has it.
pub(super) fn held_source(held: &Held<'_>) -> String {
    held.origin.source.replace('\0', "\u{fffd}")
}

/// A row of `events`, as the database gives it.
#[derive(Debug)]
pub(super) struct EventRow {
    pub(super) position: i64,
    pub(super) source: String,
    pub(super) id: String,
    pub(super) kind: String,
    pub(super) subject: Option<String>,
    pub(super) time: Option<OffsetDateTime>,
    pub(super) key: String,
    pub(super) body: String,
    pub(super) format: String,
    pub(super) headers: String,
    pub(super) origin: String,
    pub(super) recorded_at: OffsetDateTime,
}

impl EventRow {
    /// The event.
    ///
    /// # Errors
    /// Fatal where the row holds what no append has written.
    pub(super) fn into_event(self) -> Result<StoredEvent, StoreError> {
        let damaged = |column: &str, error: &dyn std::fmt::Display| {
            StoreError::fatal(format_args!(
                "the row of `events` at position {} cannot be read, its {column} was changed or \
                 is damaged: {error}",
                self.position
            ))
        };
        let format: Format = self.format.parse().map_err(|e| damaged("format", &e))?;
        let headers = Headers::from_json(&self.headers).map_err(|e| damaged("headers", &e))?;
        let origin = serde_json::from_str(&self.origin).map_err(|e| damaged("origin", &e))?;
        Ok(StoredEvent {
            position: position(self.position)?,
            recorded_at: self.recorded_at,
            event: Event::from_parts(EventParts {
                id: self.id.into(),
                source: self.source.into(),
                kind: self.kind.into(),
                subject: self.subject.map(Into::into),
                time: self.time,
                key: self.key.into(),
                format,
                headers,
                origin,
                body: Bytes::from(self.body),
            }),
        })
    }
}

/// What is needed of a stored event to tell a copy from a conflict.
pub(super) fn known_event(
    like: &Event,
    kind: String,
    format: &str,
    body: String,
) -> Result<Event, StoreError> {
    let format = format
        .parse()
        .map_err(|e| StoreError::fatal(format_args!("a row of `events` is damaged: {e}")))?;
    Ok(Event::from_parts(EventParts {
        id: like.id().into(),
        source: like.source().into(),
        kind: kind.into(),
        subject: None,
        time: None,
        key: Box::default(),
        format,
        headers: Headers::new(),
        origin: Origin::default(),
        body: Bytes::from(body),
    }))
}

/// The events of a batch with their index in it.
pub(super) fn events(entries: &[Entry]) -> impl Iterator<Item = (usize, &Event)> {
    entries.iter().enumerate().filter_map(|(i, entry)| match entry {
        Entry::Event(event) => Some((i, event)),
        Entry::Quarantine(_) => None,
    })
}

/// A number the database keeps as a signed one.
pub(super) fn position(value: i64) -> Result<Position, StoreError> {
    number(value).map(Position)
}

/// A number the database keeps as a signed one.
pub(super) fn number(value: i64) -> Result<u64, StoreError> {
    u64::try_from(value).map_err(|_| {
        StoreError::fatal(format_args!("the database holds a negative number, {value}"))
    })
}

/// A number for the database.
pub(super) fn signed(value: u64) -> i64 {
    // Positions and sequences count events one by one and do not get near 2^63; what is asked
    // for beyond it (`after = u64::MAX`) is beyond everything that is there.
    i64::try_from(value).unwrap_or(i64::MAX)
}

/// Checks that what was read is the log without a gap (G3).
pub(super) fn contiguous(
    after: Position,
    events: &[std::sync::Arc<StoredEvent>],
) -> Result<(), StoreError> {
    let mut last = after;
    for event in events {
        let expected = last.next();
        if event.position != expected {
            return Err(StoreError::fatal(format_args!(
                "the log has a gap: position {expected} is missing, {} follows; rows were \
                 deleted, or the database was damaged",
                event.position
            )));
        }
        last = expected;
    }
    Ok(())
}

/// A row of `quarantine`.
///
/// # Errors
/// Fatal where the row holds what no append has written.
pub(super) fn quarantine_entry(
    number: i64,
    received_at: OffsetDateTime,
    reason: String,
    origin: &str,
    headers: &str,
    size: i64,
) -> Result<QuarantineEntry, StoreError> {
    let damaged = |column: &str, error: serde_json::Error| {
        StoreError::fatal(format_args!(
            "the row of `quarantine` with number {number} cannot be read, its {column} was \
             changed or is damaged: {error}"
        ))
    };
    Ok(QuarantineEntry {
        number: self::number(number)?,
        received_at,
        reason,
        origin: serde_json::from_str(origin).map_err(|e| damaged("origin", e))?,
        headers: Headers::from_json(headers).map_err(|e| damaged("headers", e))?,
        size: self::number(size)?,
    })
}

/// The ranges of positions a list goes through, in its direction: each without the first and
/// with the second number.
///
/// Without a filter that is the whole log, and the limit ends the scan. With one, nobody knows
/// how far the next match is: ranges begin small and double, so that near matches come fast,
/// and a query that is given up does not keep the database scanning a whole log.
#[derive(Debug)]
pub(super) struct Ranges {
    low: u64,
    high: u64,
    step: u64,
    descending: bool,
}

impl Ranges {
    const FIRST: u64 = 1 << 14;
    const LAST: u64 = 1 << 20;

    pub(super) fn new(query: &Query, log: &Extent) -> Self {
        let Extent { removed, head, .. } = log;
        let filtered = query.kind.is_some() || query.key.is_some();
        let (low, high) = match (query.descending, query.after.0) {
            (false, after) => (after.max(removed.0), head.0),
            (true, before) if before == 0 || before > head.0 => (removed.0, head.0),
            (true, before) => (removed.0, before - 1),
        };
        let step = if filtered { Self::FIRST } else { u64::MAX };
        Self { low, high, step, descending: query.descending }
    }
}

impl Iterator for Ranges {
    type Item = (u64, u64);

    fn next(&mut self) -> Option<(u64, u64)> {
        if self.low >= self.high {
            return None;
        }
        let step = self.step.min(self.high - self.low);
        if self.step < Self::LAST {
            self.step *= 2;
        }
        Some(if self.descending {
            let range = (self.high - step, self.high);
            self.high -= step;
            range
        } else {
            let range = (self.low, self.low + step);
            self.low += step;
            range
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ranges(after: u64, descending: bool, head: u64) -> Vec<(u64, u64)> {
        behind(0, after, descending, head)
    }

    fn behind(removed: u64, after: u64, descending: bool, head: u64) -> Vec<(u64, u64)> {
        let query = Query {
            after: Position(after),
            descending,
            kind: Some("a".into()),
            ..Query::default()
        };
        let log = Extent { removed: Position(removed), head: Position(head), bytes: 0 };
        Ranges::new(&query, &log).collect()
    }

    #[test]
    fn ranges_begin_where_the_log_does() {
        assert_eq!(behind(1 << 40, 7, false, (1 << 40) + 2), [(1 << 40, (1 << 40) + 2)]);
        assert_eq!(behind(5, 6, false, 7), [(6, 7)]);
        assert_eq!(behind(5, 0, true, 7), [(5, 7)]);
        assert_eq!(behind(5, 4, true, 7), []);
        assert_eq!(behind(7, 0, false, 7), []);
    }

    #[test]
    fn ranges_cover_the_log_once() {
        assert_eq!(ranges(0, false, 0), []);
        assert_eq!(ranges(7, false, 7), []);
        assert_eq!(ranges(9, false, 7), []);
        assert_eq!(ranges(2, false, 7), [(2, 7)]);
        assert_eq!(ranges(0, true, 7), [(0, 7)]);
        assert_eq!(ranges(7, true, 7), [(0, 6)]);
        assert_eq!(ranges(1, true, 7), []);
        assert_eq!(ranges(9, true, 7), [(0, 7)]);
        let up = ranges(5, false, 10_000_000);
        assert_eq!((up[0].0, up[up.len() - 1].1), (5, 10_000_000));
        assert!(up.windows(2).all(|w| w[0].1 == w[1].0));
        let down = ranges(0, true, 10_000_000);
        assert_eq!((down[0].1, down[down.len() - 1].0), (10_000_000, 0));
        assert!(down.windows(2).all(|w| w[0].0 == w[1].1));
    }
}
