//! Removing the beginning of the log.
//!
//! What goes is chosen and read outside of any transaction, since the events of a log do not
//! change. Only then is the writer taken, for as long as it takes to say whether that still holds
//! and to delete: appends wait for that, and no longer.

use sqlx::SqliteConnection;

use super::{SqliteStore, error::unrefused, text::array};
use crate::{
    event::{Event, Position},
    store::{
        AttemptError, Extent, HeldBy, Hold, Limit, Removal, Removed, StoreError,
        admit::Known,
        progress::row::Failed,
        retain::{self, Bound, Left},
        row,
        same::Fingerprint,
    },
};

const EXTENT: &str = "SELECT removed, position, bytes FROM log_head";

/// Each handler needs what is behind its cursor, and what has a row. Handlers are found by
/// stepping from one to the next: there may be rows without end.
const NEEDS: &str = "
    WITH RECURSIVE h(handler) AS (
        SELECT min(handler) FROM unfinished
        UNION ALL
        SELECT (SELECT min(handler) FROM unfinished AS u WHERE u.handler > h.handler)
        FROM h WHERE h.handler IS NOT NULL
    )
    SELECT handler, position, 0 AS unfinished FROM cursors WHERE handler NOT LIKE 'source:%'
    UNION ALL
    SELECT handler, (SELECT min(position) FROM unfinished AS u WHERE u.handler = h.handler) - 1, 1
    FROM h WHERE handler IS NOT NULL
    ORDER BY 2, 3 LIMIT 1";

const KEEP_IDENTITIES: &str = "
    INSERT INTO removed_identities (identity, position, content)
    SELECT unhex(value ->> 0), value ->> 1, value ->> 2 FROM json_each(?) WHERE true
    ON CONFLICT (identity) DO NOTHING";

const SIZE: &str = "
    SELECT coalesce(sum(octet_length(source) + octet_length(id) + octet_length(type)
        + octet_length(coalesce(subject, '')) + octet_length(key) + octet_length(body)
        + octet_length(headers) + octet_length(origin)), 0)
    FROM events WHERE position <= ?";

const FIND_REMOVED: &str = "
    SELECT j.key, r.position, r.content
    FROM json_each(?) AS j CROSS JOIN removed_identities AS r ON r.identity = unhex(j.value)";

fn extent((removed, head, bytes): (i64, i64, i64)) -> Result<Extent, StoreError> {
    let (removed, head) = (row::position(removed)?, row::position(head)?);
    Ok(Extent { removed, head, bytes: row::number(bytes)? })
}

async fn bound(connection: &mut SqliteConnection, head: Position) -> Result<Bound, Failed> {
    let need: Option<(String, i64, bool)> =
        sqlx::query_as(NEEDS).fetch_optional(connection).await?;
    let Some((handler, after, unfinished)) = need else { return Ok((head, None)) };
    let after = row::position(after)?;
    let why = if unfinished { HeldBy::Unfinished } else { HeldBy::Cursor };
    Ok((after.min(head), Some(Hold { handler: handler.into(), after, why })))
}

fn identities(left: &[Left]) -> Result<String, AttemptError> {
    array(left.iter(), |left, out| {
        let Left { identity, position, content: Fingerprint(content) } = left;
        row::write_json(&(identity.simple().to_string(), row::signed(position.0), content), out)
    })
}

impl SqliteStore {
    pub(super) async fn find_extent(&self) -> Result<Extent, StoreError> {
        let row = sqlx::query_as(EXTENT).fetch_one(&self.readers).await;
        extent(row.map_err(|e| self.read_failure(&e))?)
    }

    pub(super) async fn remove_step(&self, removal: &Removal) -> Result<Removed, StoreError> {
        self.check()?;
        let before = self.find_extent().await?;
        // Mostly nothing is due, and then no more than one event is read.
        let peek = self.read_page(before.removed, Limit { events: 1, bytes: 1 }).await?;
        if !peek.first().is_some_and(|first| retain::is_due(&before, removal, first)) {
            return Ok(Removed { events: 0, extent: before, held: None });
        }
        let bound = {
            let mut reader = self.readers.acquire().await.map_err(|e| self.read_failure(&e))?;
            self.told(bound(&mut reader, before.head).await)?
        };
        let first = self.read_page(before.removed, retain::reach(&before, &bound, removal)).await?;
        let chosen = retain::choose(&before, bound, removal, &first)?;
        if chosen.to == chosen.from {
            return Ok(Removed { events: 0, extent: before, held: chosen.held });
        }
        if first.first().is_some_and(|event| event.position != before.first()) {
            // Somebody else has done this step, or what readers will say is missing is missing.
            return Ok(Removed { events: 0, extent: self.find_extent().await?, held: None });
        }
        let mut tx = self.begin().await?;
        let done = async {
            let now = extent(sqlx::query_as(EXTENT).fetch_one(&mut *tx).await?)?;
            let (last, hold) = self::bound(&mut tx, now.head).await?;
            if now.removed != chosen.from {
                // Somebody else has done this step.
                return Ok(Removed { events: 0, extent: now, held: None });
            }
            // A handler may have come, or gone back, since that was chosen.
            let (to, held) = if last < chosen.to {
                (last.max(now.removed), hold)
            } else {
                (chosen.to, chosen.held)
            };
            let events = to.0 - now.removed.0;
            if events == 0 {
                return Ok(Removed { events, extent: now, held });
            }
            let kept = chosen.left.partition_point(|left| left.position <= to);
            if kept > 0 {
                let json = identities(&chosen.left[..kept]).map_err(unrefused)?;
                sqlx::query(KEEP_IDENTITIES).bind(json).execute(&mut *tx).await?;
            }
            let gone: i64 =
                sqlx::query_scalar(SIZE).bind(row::signed(to.0)).fetch_one(&mut *tx).await?;
            sqlx::query("DELETE FROM events WHERE position <= ?")
                .bind(row::signed(to.0))
                .execute(&mut *tx)
                .await?;
            let bytes = now.bytes.saturating_sub(row::number(gone)?);
            sqlx::query("UPDATE log_head SET removed = ?, bytes = ?")
                .bind(row::signed(to.0))
                .bind(row::signed(bytes))
                .execute(&mut *tx)
                .await?;
            Ok(Removed { events, extent: Extent { removed: to, bytes, ..now }, held })
        }
        .await;
        self.end(tx, done).await
    }

    /// What is left of those of these that have been removed, with their place among them.
    pub(super) async fn find_removed(
        &self,
        connection: &mut SqliteConnection,
        events: &[(usize, &Event)],
    ) -> Result<Vec<(usize, Known<'static>)>, AttemptError> {
        let identities = array(events.iter(), |(_, event), out| {
            row::write_json(&retain::identity(event).simple().to_string(), out)
        })?;
        let rows: Vec<(i64, i64, i64)> = sqlx::query_as(FIND_REMOVED)
            .bind(identities)
            .fetch_all(connection)
            .await
            .map_err(|e| self.failure(&e))?;
        let mut found = Vec::with_capacity(rows.len());
        for (nth, position, content) in rows {
            let at = usize::try_from(nth).ok().and_then(|n| events.get(n));
            if let Some((index, _)) = at {
                found
                    .push((*index, Known::Removed(row::position(position)?, Fingerprint(content))));
            }
        }
        Ok(found)
    }

    fn told<T>(&self, done: Result<T, Failed>) -> Result<T, StoreError> {
        done.map_err(|failed| match failed {
            Failed::Database(error) => self.read_failure(&error),
            Failed::Store(error) => error,
        })
    }
}
