//! What handlers have done, in Postgres.
//!
//! A handler's row in `cursors` is its lease and its fence. Whatever a runner and a redrive
//! change about what a handler has not finished locks that row first: a checkpoint to move the cursor, a redrive to keep
//! checkpoints away while it takes rows up. So they cannot lock each other.
//!
//! A write that was given up may reach the server later than its repetition, and than what
//! followed that. So writes are numbered, and one with a number below the last is not done.

use std::{
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::Duration,
};

use async_trait::async_trait;
use sqlx::{
    PgConnection, Postgres,
    postgres::{PgArguments, PgBindIterExt as _},
};
use time::OffsetDateTime;

use super::{PostgresStore, redrive, retain};
use crate::{
    event::Position,
    store::{
        StoreError,
        progress::{
            AuditEntry, Change, Checkpoint, Claim, Claimed, DeadLetter, DeadLetterFilter, Epoch,
            Failure, NewRedrive, ProgressStore, QuarantineFilter, Redrive, Redriven, RedrivenEntry,
            SettledEntry, Standing, Tenure, Unfinished,
            condition::{self, Dialect},
            row::{Failed, clean},
        },
        row,
    },
};

/// How many times a claim or a checkpoint begins again because another one came in between.
const TRIES: usize = 16;

/// Only a row that was inserted has never been locked: `xmax` is 0. What is being removed from the
/// log is waited for: a cursor is not before its beginning.
const CLAIM: &str = "
    WITH log AS (SELECT removed FROM log_head FOR SHARE)
    INSERT INTO cursors AS c (handler, position, updated_at, epoch, owner, expires_at)
    SELECT $1, greatest($2, log.removed), now(), nextval('epochs'), $3,
        clock_timestamp() + make_interval(secs => $4)
    FROM log
    ON CONFLICT (handler) DO UPDATE SET epoch = greatest(c.epoch + 1, excluded.epoch),
        write = 0, owner = excluded.owner, expires_at = excluded.expires_at
    WHERE c.owner IS NULL OR c.owner = excluded.owner
        OR coalesce(c.expires_at < clock_timestamp(), true)
    RETURNING c.epoch, c.position, c.paused, c.xmax = 0";

const HOLDER: &str = "
    SELECT owner, extract(epoch FROM expires_at - clock_timestamp())::float8 FROM cursors
    WHERE handler = $1 AND owner IS NOT NULL AND expires_at > clock_timestamp()";

const RENEW: &str = "
    UPDATE cursors SET expires_at = clock_timestamp() + make_interval(secs => $3)
    WHERE handler = $1 AND epoch = $2 RETURNING paused";

const RELEASE: &str =
    "UPDATE cursors SET owner = NULL, expires_at = NULL WHERE handler = $1 AND epoch = $2";

/// The fence (D2): no row, and the claim is not the last one, or the write not.
const MOVE: &str = "
    UPDATE cursors SET position = $3, updated_at = now(), write = $4
    WHERE handler = $1 AND epoch = $2 AND write < $4";

const HOLDS: &str = "SELECT EXISTS (SELECT FROM cursors WHERE handler = $1 AND epoch = $2)";

/// One statement, so one round trip and one transaction; no row is touched before the fence
/// holds.
///
/// The statement sees what was committed when it began. Where it had to wait for the fence, as
/// for an earlier try at the same checkpoint that was given up and is still at work, it would
/// not see the rows that came meanwhile, and finish none of them. So the fence only holds where
/// the last write is the one that the statement has seen; else it begins again.
const CHECKPOINT: &str = "
    WITH fence AS (
        UPDATE cursors SET position = $3, updated_at = now(), write = $4
        WHERE handler = $1 AND epoch = $2 AND write < $4
            AND write = (SELECT seen.write FROM cursors AS seen WHERE seen.handler = $1)
        RETURNING handler
    ), kept AS (
        INSERT INTO unfinished AS was (handler, position, state, id, type, key, attempts, due_at,
            first_error, last_error, first_failed_at, last_failed_at, unpublished)
        SELECT fence.handler, r.*
        FROM fence, unnest($5::bigint[], $6::text[], $7::text[], $8::text[], $9::text[],
            $10::bigint[], $11::timestamptz[], $12::text[], $13::text[], $14::timestamptz[],
            $15::timestamptz[], $16::boolean[]) AS r
        ON CONFLICT (handler, position) DO UPDATE SET
            state = excluded.state, id = excluded.id, type = excluded.type, key = excluded.key,
            attempts = excluded.attempts, due_at = excluded.due_at,
            first_error = coalesce(was.first_error, excluded.first_error),
            last_error = coalesce(excluded.last_error, was.last_error),
            first_failed_at = coalesce(was.first_failed_at, excluded.first_failed_at),
            last_failed_at = coalesce(excluded.last_failed_at, was.last_failed_at),
            unpublished = excluded.unpublished, redrive = NULL
    ), finished AS (
        DELETE FROM unfinished
        WHERE handler = $1 AND position = ANY($17) AND EXISTS (SELECT FROM fence)
    )
    SELECT EXISTS (SELECT FROM fence),
        EXISTS (SELECT FROM cursors WHERE handler = $1 AND epoch = $2)";

type Statement<'q> = sqlx::query::Query<'q, Postgres, PgArguments>;

/// The number of a write: higher than that of every write before, for every handle in this
/// process. Another process has another epoch, under which writes are numbered anew.
fn next_write() -> i64 {
    static LAST: AtomicU64 = AtomicU64::new(0);
    row::signed(LAST.fetch_add(1, Relaxed) + 1)
}

fn move_cursor(handler: &str, epoch: Epoch, to: Position) -> Statement<'_> {
    let query = sqlx::query(MOVE).bind(handler).bind(row::signed(epoch.0));
    query.bind(row::signed(to.0)).bind(next_write())
}

fn kept(changes: &[Change]) -> impl Iterator<Item = &Unfinished> {
    changes.iter().filter_map(|change| match change {
        Change::Keep(unfinished) => Some(unfinished),
        Change::Finish(_) => None,
    })
}

/// The failures of these, column by column.
fn failures(changes: &[Change]) -> impl Iterator<Item = Option<&Failure>> {
    kept(changes).map(|event| event.failure.as_ref())
}

fn due_at(event: &Unfinished) -> Option<OffsetDateTime> {
    match event.standing {
        Standing::Retrying { due_at } => Some(due_at),
        Standing::Parked | Standing::Dead { .. } => None,
    }
}

fn unpublished(event: &Unfinished) -> bool {
    event.standing == (Standing::Dead { unpublished: true })
}

fn checkpoint_query(
    checkpoint: &Checkpoint,
) -> sqlx::query::QueryAs<'_, Postgres, (bool, bool), PgArguments> {
    let Checkpoint { handler, epoch, cursor, changes } = checkpoint;
    let finished: Vec<i64> = changes
        .iter()
        .filter_map(|change| match change {
            Change::Keep(_) => None,
            Change::Finish(position) => Some(row::signed(position.0)),
        })
        .collect();
    sqlx::query_as(CHECKPOINT)
        .bind(&**handler)
        .bind(row::signed(epoch.0))
        .bind(row::signed(cursor.0))
        .bind(next_write())
        .bind(kept(changes).map(|event| row::signed(event.position.0)).bind_iter())
        .bind(kept(changes).map(|event| event.standing.as_str()).bind_iter())
        .bind(kept(changes).map(|event| clean(&event.id).into_owned()).bind_iter())
        .bind(kept(changes).map(|event| clean(&event.kind).into_owned()).bind_iter())
        .bind(kept(changes).map(|event| clean(&event.key).into_owned()).bind_iter())
        .bind(kept(changes).map(|event| i64::from(event.attempts)).bind_iter())
        .bind(kept(changes).map(due_at).bind_iter())
        .bind(failures(changes).map(|f| Some(clean(&f?.first_error).into_owned())).bind_iter())
        .bind(failures(changes).map(|f| Some(clean(&f?.last_error).into_owned())).bind_iter())
        .bind(failures(changes).map(|f| Some(f?.first_failed_at)).bind_iter())
        .bind(failures(changes).map(|f| Some(f?.last_failed_at)).bind_iter())
        .bind(kept(changes).map(unpublished).bind_iter())
        .bind(finished)
}

/// Locks a handler's row; fails where the claim is not its last one.
async fn lock(tx: &mut PgConnection, (handler, epoch): (&str, Epoch)) -> Result<Position, Failed> {
    let position: Option<i64> = sqlx::query_scalar(
        "SELECT position FROM cursors WHERE handler = $1 AND epoch = $2 FOR UPDATE",
    )
    .bind(handler)
    .bind(row::signed(epoch.0))
    .fetch_optional(tx)
    .await?;
    match position {
        Some(position) => Ok(row::position(position)?),
        None => Err(StoreError::fenced(handler).into()),
    }
}

fn busy(handler: &str) -> StoreError {
    StoreError::unavailable(format_args!("others keep changing the progress of `{handler}`"))
}

#[async_trait]
impl ProgressStore for PostgresStore {
    async fn claim(&self, claim: Claim<'_>) -> Result<Claimed, StoreError> {
        for _ in 0..TRIES {
            let query = sqlx::query_as(CLAIM)
                .bind(claim.handler)
                .bind(row::signed(claim.start.0))
                .bind(clean(claim.owner))
                .bind(claim.ttl.as_secs_f64());
            let taken: Option<(i64, i64, bool, bool)> =
                self.reading(query.fetch_optional(&self.readers)).await?;
            if let Some((epoch, cursor, paused, fresh)) = taken {
                return Ok(Claimed::Taken(Tenure {
                    epoch: Epoch(row::number(epoch)?),
                    cursor: row::position(cursor)?,
                    fresh,
                    paused,
                }));
            }
            let query = sqlx::query_as(HOLDER).bind(claim.handler);
            let held: Option<(String, f64)> =
                self.reading(query.fetch_optional(&self.readers)).await?;
            // None where it has been given up since.
            if let Some((owner, left)) = held {
                let left = Duration::try_from_secs_f64(left).unwrap_or_default();
                return Ok(Claimed::Held { owner, left });
            }
        }
        Err(busy(claim.handler))
    }

    async fn renew(&self, handler: &str, epoch: Epoch, ttl: Duration) -> Result<bool, StoreError> {
        let query = sqlx::query_scalar(RENEW)
            .bind(handler)
            .bind(row::signed(epoch.0))
            .bind(ttl.as_secs_f64());
        let paused = self.reading(query.fetch_optional(&self.readers)).await?;
        paused.ok_or_else(|| StoreError::fenced(handler))
    }

    async fn release(&self, handler: &str, epoch: Epoch) -> Result<(), StoreError> {
        let query = sqlx::query(RELEASE).bind(handler).bind(row::signed(epoch.0));
        self.reading(query.execute(&self.readers)).await.map(drop)
    }

    async fn cursor(&self, handler: &str) -> Result<Option<Position>, StoreError> {
        let query = sqlx::query_scalar("SELECT position FROM cursors WHERE handler = $1");
        let position: Option<i64> =
            self.reading(query.bind(handler).fetch_optional(&self.readers)).await?;
        position.map(row::position).transpose()
    }

    async fn checkpoint(&self, checkpoint: &Checkpoint) -> Result<(), StoreError> {
        let Checkpoint { handler, epoch, cursor, changes } = checkpoint;
        for _ in 0..TRIES {
            let (done, holds) = if changes.is_empty() {
                let query = move_cursor(handler, *epoch, *cursor);
                match self.reading(query.execute(&self.readers)).await?.rows_affected() {
                    0 => (false, self.holds(handler, *epoch).await?),
                    _ => (true, true),
                }
            } else {
                self.reading(checkpoint_query(checkpoint).fetch_one(&self.readers)).await?
            };
            match (done, holds) {
                (true, _) => return Ok(()),
                (false, false) => return Err(StoreError::fenced(handler)),
                (false, true) => {}
            }
        }
        Err(busy(handler))
    }

    async fn rewind(
        &self,
        handler: &str,
        epoch: Epoch,
        to: Position,
        audit: Option<&AuditEntry>,
    ) -> Result<Position, StoreError> {
        self.transacting(async {
            let mut tx = self.readers.begin().await?;
            let removed: i64 = sqlx::query_scalar(retain::BEGINNING).fetch_one(&mut *tx).await?;
            let to = to.max(row::position(removed)?);
            lock(&mut tx, (handler, epoch)).await?;
            // Numbered when nobody else can write: a transaction that was given up is not
            // committed later.
            move_cursor(handler, epoch, to).execute(&mut *tx).await?;
            sqlx::query("DELETE FROM unfinished WHERE handler = $1 AND position > $2")
                .bind(handler)
                .bind(row::signed(to.0))
                .execute(&mut *tx)
                .await?;
            if let Some(entry) = audit {
                redrive::audit(entry).execute(&mut *tx).await?;
            }
            tx.commit().await?;
            Ok(to)
        })
        .await
    }

    async fn adopt(&self, from: (&str, Epoch), to: (&str, Epoch)) -> Result<(), StoreError> {
        self.transacting(async {
            let mut tx = self.readers.begin().await?;
            lock(&mut tx, to).await?;
            let cursor = lock(&mut tx, from).await?;
            for (sql, handler) in [
                ("DELETE FROM unfinished WHERE handler = $1", to.0),
                ("DELETE FROM cursors WHERE handler = $1", from.0),
            ] {
                sqlx::query(sql).bind(handler).execute(&mut *tx).await?;
            }
            sqlx::query("UPDATE unfinished SET handler = $2 WHERE handler = $1")
                .bind(from.0)
                .bind(to.0)
                .execute(&mut *tx)
                .await?;
            move_cursor(to.0, to.1, cursor).execute(&mut *tx).await?;
            Ok(tx.commit().await?)
        })
        .await
    }

    async fn forget(&self, handler: &str, epoch: Epoch) -> Result<(), StoreError> {
        self.transacting(async {
            let mut tx = self.readers.begin().await?;
            lock(&mut tx, (handler, epoch)).await?;
            for sql in [
                "DELETE FROM unfinished WHERE handler = $1",
                "DELETE FROM cursors WHERE handler = $1",
            ] {
                sqlx::query(sql).bind(handler).execute(&mut *tx).await?;
            }
            Ok(tx.commit().await?)
        })
        .await
    }

    async fn set_paused(
        &self,
        handler: &str,
        paused: bool,
        audit: &AuditEntry,
    ) -> Result<bool, StoreError> {
        self.transacting(async {
            let mut tx = self.readers.begin().await?;
            let set = sqlx::query("UPDATE cursors SET paused = $2 WHERE handler = $1")
                .bind(handler)
                .bind(paused)
                .execute(&mut *tx)
                .await?;
            if set.rows_affected() == 0 {
                return Ok(false);
            }
            redrive::audit(audit).execute(&mut *tx).await?;
            tx.commit().await?;
            Ok(true)
        })
        .await
    }

    async fn unfinished(
        &self,
        handler: &str,
        after: Position,
        limit: usize,
    ) -> Result<Vec<Unfinished>, StoreError> {
        self.list_unfinished(handler, after, limit).await
    }

    async fn dead_letters(
        &self,
        filter: &DeadLetterFilter,
        after: Option<(&str, Position)>,
        limit: usize,
    ) -> Result<Vec<DeadLetter>, StoreError> {
        self.list_letters(filter, after, limit).await
    }

    async fn unfinished_at(
        &self,
        handler: &str,
        positions: &[Position],
    ) -> Result<Vec<DeadLetter>, StoreError> {
        self.list_at(handler, positions).await
    }

    async fn count_dead_letters(&self, filter: &DeadLetterFilter) -> Result<u64, StoreError> {
        self.count(condition::count_letters(filter, Dialect::Postgres)).await
    }

    async fn count_quarantine(&self, filter: &QuarantineFilter) -> Result<u64, StoreError> {
        self.count(condition::count_quarantine(filter, Dialect::Postgres)).await
    }

    async fn unpublished(
        &self,
        handler: &str,
        limit: usize,
    ) -> Result<Vec<DeadLetter>, StoreError> {
        self.list_unpublished(handler, limit).await
    }

    async fn mark_published(
        &self,
        handler: &str,
        letters: &[(Position, OffsetDateTime)],
    ) -> Result<(), StoreError> {
        let query = sqlx::query(
            "UPDATE unfinished AS u SET unpublished = false
             FROM unnest($2::bigint[], $3::timestamptz[]) AS r(position, failed_at)
             WHERE u.handler = $1 AND u.position = r.position AND u.unpublished
               AND u.last_failed_at = r.failed_at",
        )
        .bind(handler)
        .bind(letters.iter().map(|(position, _)| row::signed(position.0)).bind_iter())
        .bind(letters.iter().map(|(_, failed_at)| *failed_at).bind_iter());
        self.reading(query.execute(&self.readers)).await.map(drop)
    }

    async fn start_redrive(&self, what: &NewRedrive) -> Result<Redrive, StoreError> {
        self.take_up(what).await
    }

    async fn redrives(&self, after: u64, limit: usize) -> Result<Vec<Redrive>, StoreError> {
        self.list_redrives(after, limit).await
    }

    async fn redrive(&self, number: u64) -> Result<Option<Redrive>, StoreError> {
        self.find_redrive(number).await
    }

    async fn cancel_redrive(
        &self,
        number: u64,
        audit: &AuditEntry,
    ) -> Result<Option<Redrive>, StoreError> {
        self.put_back(number, audit).await?;
        self.find_redrive(number).await
    }

    async fn redriven(
        &self,
        handler: &str,
        except: &[u64],
        limit: usize,
    ) -> Result<Vec<Redriven>, StoreError> {
        self.list_redriven(handler, except, limit).await
    }

    async fn redriven_quarantine(
        &self,
        except: &[u64],
        limit: usize,
    ) -> Result<Vec<RedrivenEntry>, StoreError> {
        self.list_redriven_quarantine(except, limit).await
    }

    async fn settle_quarantine(&self, settled: &[SettledEntry]) -> Result<(), StoreError> {
        self.settle_entries(settled).await
    }

    async fn discard_orphans(&self, registered: &[String]) -> Result<(), StoreError> {
        let query = sqlx::query(redrive::DISCARD_ORPHANS).bind(registered);
        self.reading(query.execute(&self.readers)).await.map(drop)
    }

    async fn end_redrives(&self) -> Result<(), StoreError> {
        let query = sqlx::query(redrive::END).bind(crate::event::now());
        self.reading(query.execute(&self.readers)).await.map(drop)
    }

    async fn audit(&self, entry: &AuditEntry) -> Result<(), StoreError> {
        self.reading(redrive::audit(entry).execute(&self.readers)).await.map(drop)
    }

    async fn audits(&self, before: u64, limit: usize) -> Result<Vec<AuditEntry>, StoreError> {
        self.list_audits(before, limit).await
    }
}

impl PostgresStore {
    /// Whether a claim is the handler's last one.
    async fn holds(&self, handler: &str, epoch: Epoch) -> Result<bool, StoreError> {
        let query = sqlx::query_scalar(HOLDS).bind(handler).bind(row::signed(epoch.0));
        self.reading(query.fetch_one(&self.readers)).await
    }
}
