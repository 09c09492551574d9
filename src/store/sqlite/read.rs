//! Reading rows.

use std::sync::Arc;

use futures_util::TryStreamExt as _;
use sqlx::{AssertSqlSafe, Row as _, Sqlite, sqlite::SqliteRow};

use super::{SqliteStore, text::parse_time};
use crate::{
    event::{Position, StoredEvent},
    store::{
        Limit, QuarantineEntry, StoreError,
        row::{self, EventRow},
    },
};

impl SqliteStore {
    /// The events behind a position, whatever is missing between.
    pub(super) async fn read_page(
        &self,
        after: Position,
        limit: Limit,
    ) -> Result<Vec<Arc<StoredEvent>>, StoreError> {
        let sql =
            format!("SELECT {COLUMNS} FROM events WHERE position > ? ORDER BY position LIMIT ?");
        let query = sqlx::query(AssertSqlSafe(sql))
            .bind(row::signed(after.0))
            .bind(row::signed(limit.events as u64));
        let mut events = Vec::new();
        self.fetch(query, limit.bytes, &mut events).await?;
        Ok(events)
    }

    /// Adds what is found until all of it has so many bytes; says whether that cut it short.
    pub(super) async fn fetch(
        &self,
        query: sqlx::query::Query<'_, Sqlite, sqlx::sqlite::SqliteArguments>,
        bytes: usize,
        found: &mut Vec<Arc<StoredEvent>>,
    ) -> Result<bool, StoreError> {
        let mut rows = query.fetch(&self.readers);
        let mut sum: usize = found.iter().map(|event| event.body().len()).sum();
        while let Some(row) = rows.try_next().await.map_err(|e| self.read_failure(&e))? {
            let event = event_row(&row).map_err(|e| self.read_failure(&e))??.into_event()?;
            sum += event.body().len();
            if sum > bytes && !found.is_empty() {
                return Ok(true);
            }
            found.push(Arc::new(event));
        }
        Ok(false)
    }
}

pub(super) const COLUMNS: &str = "position, source, id, type, subject, time, key, body, format, headers, \
    origin, recorded_at";

fn event_row(row: &SqliteRow) -> Result<Result<EventRow, StoreError>, sqlx::Error> {
    let time: Option<String> = row.try_get(5)?;
    let recorded_at: String = row.try_get(11)?;
    let times = time
        .map(|time| parse_time(&time))
        .transpose()
        .and_then(|time| Ok((time, parse_time(&recorded_at)?)));
    let (time, recorded_at) = match times {
        Ok(times) => times,
        Err(error) => return Ok(Err(error)),
    };
    Ok(Ok(EventRow {
        position: row.try_get(0)?,
        source: row.try_get(1)?,
        id: row.try_get(2)?,
        kind: row.try_get(3)?,
        subject: row.try_get(4)?,
        time,
        key: row.try_get(6)?,
        body: row.try_get(7)?,
        format: row.try_get(8)?,
        headers: row.try_get(9)?,
        origin: row.try_get(10)?,
        recorded_at,
    }))
}

/// Number, time, reason, origin, headers and size.
pub(super) type HeldRow = (i64, String, String, String, String, i64);

pub(super) fn held_row(
    (number, received_at, reason, origin, headers, size): HeldRow,
) -> Result<QuarantineEntry, StoreError> {
    row::quarantine_entry(number, parse_time(&received_at)?, reason, &origin, &headers, size)
}
