//! What handlers have done, in SQLite.

use std::time::Duration;

use async_trait::async_trait;
use sqlx::{Sqlite, SqliteConnection, sqlite::SqliteArguments};
use time::OffsetDateTime;

use super::{
    SqliteStore,
    error::unrefused,
    redrive,
    text::{array, numbers, text_time},
};
use crate::{
    event::{Position, now},
    store::{
        StoreError,
        progress::{
            AuditEntry, Change, Checkpoint, Claim, Claimed, DeadLetter, DeadLetterFilter, Epoch,
            NewRedrive, ProgressStore, QuarantineFilter, Redrive, Redriven, RedrivenEntry,
            SettledEntry, Standing, Tenure, Unfinished,
            condition::{self, Dialect},
            row::{Failed, clean},
        },
        row,
    },
};

/// The fence (D2): no row, and the claim is not the last one.
const MOVE: &str =
    "UPDATE cursors SET position = ?3, updated_at = ?4 WHERE handler = ?1 AND epoch = ?2";

// WHERE true: without it the grammar takes ON for a join's.
const KEEP: &str = "INSERT INTO unfinished AS was (handler, position, state, id, type, key, \
    attempts, due_at, first_error, last_error, first_failed_at, last_failed_at, unpublished)
    SELECT ?1, value ->> 0, value ->> 1, value ->> 2, value ->> 3, value ->> 4, value ->> 5, \
        value ->> 6, value ->> 7, value ->> 8, value ->> 9, value ->> 10, value ->> 11
    FROM json_each(?2) WHERE true
    ON CONFLICT (handler, position) DO UPDATE SET state = excluded.state, id = excluded.id, \
        type = excluded.type, key = excluded.key, attempts = excluded.attempts, \
        due_at = excluded.due_at, \
        first_error = coalesce(was.first_error, excluded.first_error), \
        last_error = coalesce(excluded.last_error, was.last_error), \
        first_failed_at = coalesce(was.first_failed_at, excluded.first_failed_at), \
        last_failed_at = coalesce(excluded.last_failed_at, was.last_failed_at), \
        unpublished = excluded.unpublished, redrive = NULL";

const FINISH: &str = "DELETE FROM unfinished
    WHERE handler = ?1 AND position IN (SELECT value FROM json_each(?2))";

type Statement<'q> = sqlx::query::Query<'q, Sqlite, SqliteArguments>;

fn move_cursor<'q>(
    handler: &'q str,
    epoch: Epoch,
    to: Position,
) -> Result<Statement<'q>, StoreError> {
    let now = text_time(now()).map_err(unrefused)?;
    let query = sqlx::query(MOVE).bind(handler).bind(row::signed(epoch.0));
    Ok(query.bind(row::signed(to.0)).bind(now))
}

/// The rows of a checkpoint, as JSON.
fn kept(changes: &[Change]) -> Result<String, StoreError> {
    let kept = changes.iter().filter_map(|change| match change {
        Change::Keep(unfinished) => Some(unfinished),
        Change::Finish(_) => None,
    });
    let json = array(kept, |event, out| {
        let (due_at, unpublished) = match event.standing {
            Standing::Retrying { due_at } => (Some(text_time(due_at)?), false),
            Standing::Parked => (None, false),
            Standing::Dead { unpublished } => (None, unpublished),
        };
        let failure = event.failure.as_ref();
        let time = |at| text_time(at);
        row::write_json(
            &(
                row::signed(event.position.0),
                event.standing.as_str(),
                clean(&event.id),
                clean(&event.kind),
                clean(&event.key),
                event.attempts,
                due_at,
                failure.map(|f| clean(&f.first_error)),
                failure.map(|f| clean(&f.last_error)),
                failure.map(|f| time(f.first_failed_at)).transpose()?,
                failure.map(|f| time(f.last_failed_at)).transpose()?,
                unpublished,
            ),
            out,
        )
    });
    json.map_err(unrefused)
}

/// Fails where the claim is not the handler's last one.
async fn check_epoch(
    tx: &mut SqliteConnection,
    (handler, epoch): (&str, Epoch),
) -> Result<Position, Failed> {
    let position: Option<i64> =
        sqlx::query_scalar("SELECT position FROM cursors WHERE handler = ? AND epoch = ?")
            .bind(handler)
            .bind(row::signed(epoch.0))
            .fetch_optional(tx)
            .await?;
    match position {
        Some(position) => Ok(row::position(position)?),
        None => Err(StoreError::fenced(handler).into()),
    }
}

/// Everything that is written carries an epoch or belongs to a person; nobody waits for a lease:
/// one process at a time has the file.
#[async_trait]
impl ProgressStore for SqliteStore {
    fn is_shared(&self) -> bool {
        false
    }

    async fn claim(&self, claim: Claim<'_>) -> Result<Claimed, StoreError> {
        let now = text_time(now()).map_err(unrefused)?;
        let mut tx = self.begin().await?;
        let claimed = async {
            let fresh = sqlx::query(
                "INSERT INTO cursors (handler, position, updated_at)
                 SELECT ?, max(?, removed), ? FROM log_head WHERE true
                 ON CONFLICT (handler) DO NOTHING",
            )
            .bind(claim.handler)
            .bind(row::signed(claim.start.0))
            .bind(now)
            .execute(&mut *tx)
            .await?;
            sqlx::query("UPDATE epochs SET last = last + 1").execute(&mut *tx).await?;
            let (epoch, cursor, paused): (i64, i64, bool) = sqlx::query_as(
                "UPDATE cursors SET epoch = (SELECT last FROM epochs), owner = ?2
                 WHERE handler = ?1 RETURNING epoch, position, paused",
            )
            .bind(claim.handler)
            .bind(clean(claim.owner))
            .fetch_one(&mut *tx)
            .await?;
            Ok(Claimed::Taken(Tenure {
                epoch: Epoch(row::number(epoch)?),
                cursor: row::position(cursor)?,
                fresh: fresh.rows_affected() == 1,
                paused,
            }))
        }
        .await;
        self.end(tx, claimed).await
    }

    /// Only looks: nothing has to be renewed.
    async fn renew(&self, handler: &str, epoch: Epoch, _: Duration) -> Result<bool, StoreError> {
        self.check()?;
        let paused: Option<bool> =
            sqlx::query_scalar("SELECT paused FROM cursors WHERE handler = ? AND epoch = ?")
                .bind(handler)
                .bind(row::signed(epoch.0))
                .fetch_optional(&self.readers)
                .await
                .map_err(|e| self.read_failure(&e))?;
        paused.ok_or_else(|| StoreError::fenced(handler))
    }

    async fn release(&self, handler: &str, epoch: Epoch) -> Result<(), StoreError> {
        self.run(
            sqlx::query("UPDATE cursors SET owner = NULL WHERE handler = ? AND epoch = ?")
                .bind(handler)
                .bind(row::signed(epoch.0)),
        )
        .await
        .map(drop)
    }

    async fn cursor(&self, handler: &str) -> Result<Option<Position>, StoreError> {
        let position: Option<i64> =
            sqlx::query_scalar("SELECT position FROM cursors WHERE handler = ?")
                .bind(handler)
                .fetch_optional(&self.readers)
                .await
                .map_err(|e| self.read_failure(&e))?;
        position.map(row::position).transpose()
    }

    async fn checkpoint(&self, checkpoint: &Checkpoint) -> Result<(), StoreError> {
        let Checkpoint { handler, epoch, cursor, changes } = checkpoint;
        let fence = move_cursor(handler, *epoch, *cursor)?;
        if changes.is_empty() {
            return match self.run(fence).await? {
                0 => Err(StoreError::fenced(handler)),
                _ => Ok(()),
            };
        }
        let kept = kept(changes)?;
        let finished = numbers(changes.iter().filter_map(|change| match change {
            Change::Keep(_) => None,
            Change::Finish(position) => Some(position.0),
        }));
        let mut tx = self.begin().await?;
        let done = async {
            if fence.execute(&mut *tx).await?.rows_affected() == 0 {
                return Err(StoreError::fenced(handler).into());
            }
            for (sql, rows) in [(KEEP, kept), (FINISH, finished)] {
                if rows != "[]" {
                    sqlx::query(sql).bind(&**handler).bind(rows).execute(&mut *tx).await?;
                }
            }
            Ok(())
        }
        .await;
        self.end(tx, done).await
    }

    async fn rewind(
        &self,
        handler: &str,
        epoch: Epoch,
        to: Position,
        audit: Option<&AuditEntry>,
    ) -> Result<Position, StoreError> {
        let mut tx = self.begin().await?;
        let done = async {
            let removed: i64 =
                sqlx::query_scalar("SELECT removed FROM log_head").fetch_one(&mut *tx).await?;
            let to = to.max(row::position(removed)?);
            let fence = move_cursor(handler, epoch, to)?;
            if fence.execute(&mut *tx).await?.rows_affected() == 0 {
                return Err(StoreError::fenced(handler).into());
            }
            sqlx::query("DELETE FROM unfinished WHERE handler = ? AND position > ?")
                .bind(handler)
                .bind(row::signed(to.0))
                .execute(&mut *tx)
                .await?;
            if let Some(entry) = audit {
                redrive::write_down(&mut tx, entry).await?;
            }
            Ok(to)
        }
        .await;
        self.end(tx, done).await
    }

    async fn adopt(&self, from: (&str, Epoch), to: (&str, Epoch)) -> Result<(), StoreError> {
        let mut tx = self.begin().await?;
        let done = async {
            check_epoch(&mut tx, to).await?;
            let cursor = check_epoch(&mut tx, from).await?;
            for sql in [
                "DELETE FROM unfinished WHERE handler = ?2",
                "UPDATE unfinished SET handler = ?2 WHERE handler = ?1",
                "DELETE FROM cursors WHERE handler = ?1",
            ] {
                sqlx::query(sql).bind(from.0).bind(to.0).execute(&mut *tx).await?;
            }
            move_cursor(to.0, to.1, cursor)?.execute(&mut *tx).await?;
            Ok(())
        }
        .await;
        self.end(tx, done).await
    }

    async fn forget(&self, handler: &str, epoch: Epoch) -> Result<(), StoreError> {
        let mut tx = self.begin().await?;
        let done = async {
            check_epoch(&mut tx, (handler, epoch)).await?;
            for sql in [
                "DELETE FROM unfinished WHERE handler = ?",
                "DELETE FROM cursors WHERE handler = ?",
            ] {
                sqlx::query(sql).bind(handler).execute(&mut *tx).await?;
            }
            Ok(())
        }
        .await;
        self.end(tx, done).await
    }

    async fn set_paused(
        &self,
        handler: &str,
        paused: bool,
        audit: &AuditEntry,
    ) -> Result<bool, StoreError> {
        let mut tx = self.begin().await?;
        let done = async {
            let set = sqlx::query("UPDATE cursors SET paused = ? WHERE handler = ?")
                .bind(paused)
                .bind(handler)
                .execute(&mut *tx)
                .await?;
            if set.rows_affected() == 0 {
                return Ok(false);
            }
            redrive::write_down(&mut tx, audit).await?;
            Ok(true)
        }
        .await;
        self.end(tx, done).await
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
        self.count(condition::count_letters(filter, Dialect::Sqlite)).await
    }

    async fn count_quarantine(&self, filter: &QuarantineFilter) -> Result<u64, StoreError> {
        self.count(condition::count_quarantine(filter, Dialect::Sqlite)).await
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
        let letters = array(letters.iter(), |(position, failed_at), out| {
            row::write_json(&(row::signed(position.0), text_time(*failed_at)?), out)
        });
        self.run(
            sqlx::query(
                "UPDATE unfinished SET unpublished = 0 FROM json_each(?2) AS j
                 WHERE handler = ?1 AND unpublished AND position = j.value ->> 0
                   AND last_failed_at = j.value ->> 1",
            )
            .bind(handler)
            .bind(letters.map_err(unrefused)?),
        )
        .await
        .map(drop)
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
        let registered = serde_json::json!(registered).to_string();
        self.run(sqlx::query(redrive::DISCARD_ORPHANS).bind(registered)).await.map(drop)
    }

    async fn end_redrives(&self) -> Result<(), StoreError> {
        let now = text_time(now()).map_err(unrefused)?;
        self.run(sqlx::query(redrive::END).bind(now)).await.map(drop)
    }

    async fn audit(&self, entry: &AuditEntry) -> Result<(), StoreError> {
        self.run(redrive::audit(entry)?).await.map(drop)
    }

    async fn audits(&self, before: u64, limit: usize) -> Result<Vec<AuditEntry>, StoreError> {
        self.list_audits(before, limit).await
    }
}

impl SqliteStore {
    /// Runs one statement that writes; says how many rows that were.
    pub(super) async fn run(&self, query: Statement<'_>) -> Result<u64, StoreError> {
        self.check()?;
        let done = query.execute(&self.writer).await.map_err(|e| self.read_failure(&e))?;
        Ok(done.rows_affected())
    }
}
