//! Removing the beginning of the log.
//!
//! What goes is chosen and read outside of any transaction, since the events of a log do not
//! change. Its identities are kept first, in a transaction of their own; where the rest does not
//! come about they say nothing wrong. Then the head row is locked, as by an append, for as long
//! as it takes to say whether what was chosen still holds and to delete.
//!
//! So an append that finds `removed` in the head row as its own snapshot has it has seen all
//! identities of what is gone, and whatever goes later waits for it. Where it differs, the append
//! begins again. A claim and a rewind lock the head row against this too: they either come before
//! a step, which then sees their cursor, or see where the log begins after it.

use std::sync::atomic::Ordering::Relaxed;

use sqlx::{PgConnection, postgres::PgBindIterExt as _};

use super::PostgresStore;
use crate::{
    event::{Event, Position},
    store::{
        AttemptError, Extent, HeldBy, Hold, Limit, Removal, Removed, StoreError,
        admit::Known,
        progress::row::Failed,
        retain::{self, Bound},
        row,
        same::Fingerprint,
    },
};

const EXTENT: &str = "SELECT removed, position, bytes FROM log_head";

/// Each handler needs what is behind its cursor, and what has a row; one statement, so that both
/// are of one moment. Handlers are found by stepping from one to the next: there may be rows
/// without end.
const NEEDS: &str = "
    WITH RECURSIVE h(handler) AS (
        SELECT min(handler) FROM unfinished
        UNION ALL
        SELECT (SELECT min(handler) FROM unfinished AS u WHERE u.handler > h.handler)
        FROM h WHERE h.handler IS NOT NULL
    )
    SELECT handler, position, false AS unfinished FROM cursors
    WHERE handler NOT LIKE 'source:%'
    UNION ALL
    SELECT handler, (SELECT min(position) FROM unfinished AS u WHERE u.handler = h.handler) - 1,
        true
    FROM h WHERE handler IS NOT NULL
    ORDER BY 2, 3 LIMIT 1";

const KEEP_IDENTITIES: &str = "
    INSERT INTO removed_identities (identity, position, content)
    SELECT * FROM unnest($1::uuid[], $2::bigint[], $3::bigint[])
    ON CONFLICT (identity) DO NOTHING";

const REMOVE: &str = "
    WITH gone AS (
        DELETE FROM events WHERE position > $1 AND position <= $2
        RETURNING octet_length(source) + octet_length(id) + octet_length(type)
            + octet_length(coalesce(subject, '')) + octet_length(key) + octet_length(body::text)
            + octet_length(headers::text) + octet_length(origin::text) AS size
    )
    UPDATE log_head SET removed = $2,
        bytes = greatest(bytes - (SELECT coalesce(sum(size), 0) FROM gone), 0)
    WHERE one RETURNING removed, position, bytes";

const FIND_REMOVED: &str = "
    SELECT i.nth, r.position, r.content
    FROM unnest($1::uuid[]) WITH ORDINALITY AS i(identity, nth)
    JOIN removed_identities AS r ON r.identity = i.identity";

/// The last position that was removed, once nothing is being removed.
pub(super) const BEGINNING: &str = "SELECT removed FROM log_head FOR SHARE";

fn extent((removed, head, bytes): (i64, i64, i64)) -> Result<Extent, StoreError> {
    let (removed, head) = (row::position(removed)?, row::position(head)?);
    Ok(Extent { removed, head, bytes: row::number(bytes)? })
}

async fn bound(connection: &mut PgConnection, head: Position) -> Result<Bound, Failed> {
    let need: Option<(String, i64, bool)> =
        sqlx::query_as(NEEDS).fetch_optional(connection).await?;
    let Some((handler, after, unfinished)) = need else { return Ok((head, None)) };
    let after = row::position(after)?;
    let why = if unfinished { HeldBy::Unfinished } else { HeldBy::Cursor };
    Ok((after.min(head), Some(Hold { handler: handler.into(), after, why })))
}

impl PostgresStore {
    pub(super) async fn find_extent(&self) -> Result<Extent, StoreError> {
        let query = sqlx::query_as(EXTENT);
        let extent = extent(self.reading(query.fetch_one(&self.readers)).await?)?;
        self.removed.fetch_max(extent.removed.0, Relaxed);
        Ok(extent)
    }

    pub(super) async fn remove_step(&self, removal: &Removal) -> Result<Removed, StoreError> {
        let before = self.find_extent().await?;
        // Mostly nothing is due, and then no more than one event is read.
        let peek = self.read_page(before.removed, Limit { events: 1, bytes: 1 }).await?;
        if !peek.first().is_some_and(|first| retain::is_due(&before, removal, first)) {
            return Ok(Removed { events: 0, extent: before, held: None });
        }
        let bound = self
            .transacting(async {
                let mut reader = self.readers.acquire().await?;
                self::bound(&mut reader, before.head).await
            })
            .await?;
        let first = self.read_page(before.removed, retain::reach(&before, &bound, removal)).await?;
        let chosen = retain::choose(&before, bound, removal, &first)?;
        if chosen.to == chosen.from {
            return Ok(Removed { events: 0, extent: before, held: chosen.held });
        }
        if first.first().is_some_and(|event| event.position != before.first()) {
            // Somebody else has done this step, or what readers will say is missing is missing.
            return Ok(Removed { events: 0, extent: self.find_extent().await?, held: None });
        }
        if !chosen.left.is_empty() {
            let left = &chosen.left;
            let query = sqlx::query(KEEP_IDENTITIES)
                .bind(left.iter().map(|left| left.identity).bind_iter())
                .bind(left.iter().map(|left| row::signed(left.position.0)).bind_iter())
                .bind(left.iter().map(|left| left.content.0).bind_iter());
            self.reading(query.execute(&self.readers)).await?;
        }
        let removed = self
            .transacting(async {
                let mut tx = self.readers.begin().await?;
                let locked: i64 = sqlx::query_scalar("SELECT removed FROM log_head FOR UPDATE")
                    .fetch_one(&mut *tx)
                    .await?;
                // Statements see what was committed when they begin: from here on that is
                // everything that was, and nobody adds to it what matters here.
                let now = extent(sqlx::query_as(EXTENT).fetch_one(&mut *tx).await?)?;
                let (last, hold) = self::bound(&mut tx, now.head).await?;
                if row::position(locked)? != chosen.from {
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
                let query =
                    sqlx::query_as(REMOVE).bind(row::signed(chosen.from.0)).bind(row::signed(to.0));
                let extent = extent(query.fetch_one(&mut *tx).await?)?;
                tx.commit().await?;
                Ok(Removed { events, extent, held })
            })
            .await?;
        self.removed.fetch_max(removed.extent.removed.0, Relaxed);
        Ok(removed)
    }

    /// What is left of those of these that have been removed, with their place among them.
    pub(super) async fn find_removed(
        &self,
        connection: &mut PgConnection,
        events: &[(usize, &Event)],
    ) -> Result<Vec<(usize, Known<'static>)>, AttemptError> {
        let rows: Vec<(i64, i64, i64)> = sqlx::query_as(FIND_REMOVED)
            .bind(events.iter().map(|(_, event)| retain::identity(event)).bind_iter())
            .fetch_all(connection)
            .await
            .map_err(|e| self.failure(&e))?;
        let mut found = Vec::with_capacity(rows.len());
        for (nth, position, content) in rows {
            let at = usize::try_from(nth - 1).ok().and_then(|n| events.get(n));
            if let Some((index, _)) = at {
                found
                    .push((*index, Known::Removed(row::position(position)?, Fingerprint(content))));
            }
        }
        Ok(found)
    }

    /// Why an append wrote nothing: what it thought of the beginning of the log is not so any
    /// more, or it has copies of what was removed.
    pub(super) async fn look_at_beginning(
        &self,
        connection: &mut PgConnection,
    ) -> Result<(), AttemptError> {
        let removed: i64 = sqlx::query_scalar("SELECT removed FROM log_head")
            .fetch_one(connection)
            .await
            .map_err(|e| self.failure(&e))?;
        let removed = row::number(removed)?;
        if self.removed.fetch_max(removed, Relaxed) >= removed {
            self.caution.raise();
        }
        Ok(())
    }
}
