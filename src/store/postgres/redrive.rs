//! Lists of what is unfinished, and the jobs that take it up, in Postgres.

use sqlx::{
    AssertSqlSafe, FromRow, PgConnection, Postgres, Row as _,
    postgres::{PgArguments, PgBindIterExt as _, PgRow},
};

use super::{PostgresStore, text};
use crate::{
    event::{Position, now},
    store::{
        StoreError,
        progress::{
            AuditEntry, DeadLetter, DeadLetterFilter, NewRedrive, Redrive, RedriveState, Redriven,
            RedrivenEntry, Selection, SettledEntry, Unfinished,
            condition::{self, Dialect, Filtered, Value},
            row::{
                self as rows, Failed, InRedrive, LetterRow, REDRIVES, RedriveRow, UNFINISHED,
                UnfinishedRow, clean,
            },
        },
        row,
    },
};

/// Ends those that have nothing left.
pub(super) const END: &str = "
    UPDATE redrives SET state = 'done', ended_at = $1
    WHERE state = 'running'
      AND NOT EXISTS (SELECT FROM unfinished WHERE redrive = redrives.number)
      AND NOT EXISTS (SELECT FROM quarantine WHERE redrive = redrives.number)";

pub(super) const DISCARD_ORPHANS: &str = "
    DELETE FROM unfinished AS u
    WHERE redrive IN (SELECT number FROM redrives WHERE state = 'running' AND action = 'discard')
      AND handler <> ALL($1)
      AND NOT EXISTS (SELECT FROM cursors AS c WHERE c.handler = u.handler
          AND c.owner IS NOT NULL AND c.expires_at > clock_timestamp())";

const REDRIVEN: &str = "
    SELECT u.position, u.id, u.type, u.key, u.attempts, u.state, u.due_at, u.unpublished,
        r.number, r.action, r.rate
    FROM unfinished AS u JOIN redrives AS r ON r.number = u.redrive
    WHERE u.handler = $1 AND u.redrive IS NOT NULL AND r.state = 'running'
        AND u.redrive <> ALL($3)
    ORDER BY u.position LIMIT $2";

const REDRIVEN_QUARANTINE: &str = "
    SELECT q.number, r.number, r.action, r.rate
    FROM quarantine AS q JOIN redrives AS r ON r.number = q.redrive
    WHERE q.redrive IS NOT NULL AND r.state = 'running' AND q.redrive <> ALL($2)
    ORDER BY q.number LIMIT $1";

/// Keeps checkpoints away until the transaction ends: see [`super::progress`].
const LOCK_ALL: &str = "SELECT FROM cursors ORDER BY handler FOR UPDATE";

type Statement<'q> = sqlx::query::Query<'q, Postgres, PgArguments>;

fn bind(mut query: Statement<'_>, values: Vec<Value>) -> Statement<'_> {
    for value in values {
        query = match value {
            Value::Text(text) => query.bind(text),
            Value::Number(number) => query.bind(number),
            Value::Numbers(all) => query.bind(all),
            Value::Texts(all) => query.bind(all),
            Value::Time(at) => query.bind(at),
        };
    }
    query
}

/// The statement that writes down what a person did.
pub(super) fn audit(entry: &AuditEntry) -> Statement<'static> {
    let AuditEntry { number: _, at, by, action, subject, detail } = entry;
    sqlx::query(
        "INSERT INTO audit (at, requested_by, action, subject, detail)
         VALUES ($1, $2, $3, $4, $5::json)",
    )
    .bind(*at)
    .bind(clean(by).into_owned())
    .bind(clean(action).into_owned())
    .bind(clean(subject).into_owned())
    .bind(clean(detail).into_owned())
}

fn unfinished(row: &PgRow) -> Result<Unfinished, Failed> {
    let row = UnfinishedRow {
        position: row.try_get(0)?,
        id: row.try_get(1)?,
        kind: row.try_get(2)?,
        key: row.try_get(3)?,
        attempts: row.try_get(4)?,
        state: row.try_get(5)?,
        due_at: row.try_get(6)?,
        unpublished: row.try_get(7)?,
    };
    Ok(row.into_unfinished()?)
}

fn letter(row: &PgRow) -> Result<DeadLetter, Failed> {
    let row = LetterRow {
        handler: row.try_get(0)?,
        position: row.try_get(1)?,
        id: row.try_get(2)?,
        kind: row.try_get(3)?,
        key: row.try_get(4)?,
        attempts: row.try_get(5)?,
        errors: [row.try_get(6)?, row.try_get(7)?],
        times: [row.try_get(8)?, row.try_get(9)?],
        redrive: row.try_get(10)?,
        followers: row.try_get(11)?,
    };
    Ok(row.into_letter()?)
}

fn redrive(row: &PgRow) -> Result<Redrive, Failed> {
    let row = RedriveRow {
        number: row.try_get(0)?,
        subject: row.try_get(1)?,
        action: row.try_get(2)?,
        filter: text(row, 3)?,
        rate: row.try_get(4)?,
        by: row.try_get(5)?,
        reason: row.try_get(6)?,
        state: row.try_get(7)?,
        total: row.try_get(8)?,
        started_at: row.try_get(9)?,
        ended_at: row.try_get(10)?,
        left: row.try_get(11)?,
    };
    Ok(row.into_redrive()?)
}

fn in_redrive(row: &PgRow, first: usize) -> Result<InRedrive, sqlx::Error> {
    Ok(InRedrive(row.try_get(first)?, row.try_get(first + 1)?, row.try_get(first + 2)?))
}

async fn insert_redrive(
    tx: &mut PgConnection,
    what: &NewRedrive,
    at: time::OffsetDateTime,
) -> Result<i64, Failed> {
    let NewRedrive { selection, action, rate, by, reason } = what;
    let (subject, filter) = rows::selection(selection)?;
    let number = sqlx::query_scalar(
        "INSERT INTO redrives (subject, action, filter, rate, requested_by, reason, state, total,
             started_at)
         VALUES ($1, $2, $3::json, $4, $5, $6, 'running', 0, $7) RETURNING number",
    )
    .bind(subject)
    .bind(action.as_str())
    .bind(filter)
    .bind(rate.map(i64::from))
    .bind(clean(by))
    .bind(reason.as_deref().map(clean))
    .bind(at);
    Ok(number.fetch_one(tx).await?)
}

impl PostgresStore {
    /// Reads rows, each by this.
    async fn rows<T: Send>(
        &self,
        query: Statement<'_>,
        read: fn(&PgRow) -> Result<T, Failed>,
    ) -> Result<Vec<T>, StoreError> {
        self.transacting(async { query.fetch_all(&self.readers).await?.iter().map(read).collect() })
            .await
    }

    pub(super) async fn list_unfinished(
        &self,
        handler: &str,
        after: Position,
        limit: usize,
    ) -> Result<Vec<Unfinished>, StoreError> {
        let sql = format!(
            "SELECT {UNFINISHED} FROM unfinished WHERE handler = $1 AND position > $2
             ORDER BY position LIMIT $3"
        );
        let query = sqlx::query(AssertSqlSafe(sql))
            .bind(handler)
            .bind(row::signed(after.0))
            .bind(row::signed(limit as u64));
        self.rows(query, unfinished).await
    }

    pub(super) async fn list_letters(
        &self,
        filter: &DeadLetterFilter,
        after: Option<(&str, Position)>,
        limit: usize,
    ) -> Result<Vec<DeadLetter>, StoreError> {
        let (sql, values) = condition::list_letters(filter, after, Dialect::Postgres);
        let query = sqlx::query(AssertSqlSafe(sql)).bind(row::signed(limit as u64));
        self.rows(bind(query, values), letter).await
    }

    pub(super) async fn list_at(
        &self,
        handler: &str,
        positions: &[Position],
    ) -> Result<Vec<DeadLetter>, StoreError> {
        let values = vec![
            Value::Text(clean(handler).into_owned()),
            Value::Numbers(positions.iter().map(|position| row::signed(position.0)).collect()),
        ];
        let query = sqlx::query(AssertSqlSafe(condition::list_at(Dialect::Postgres)))
            .bind(row::signed(positions.len() as u64));
        self.rows(bind(query, values), letter).await
    }

    /// Counts what a filter asks for.
    pub(super) async fn count(&self, (sql, values): Filtered) -> Result<u64, StoreError> {
        let query = bind(sqlx::query(AssertSqlSafe(sql)), values);
        let counted = async { query.fetch_one(&self.readers).await?.try_get(0) };
        row::number(self.reading(counted).await?)
    }

    pub(super) async fn list_unpublished(
        &self,
        handler: &str,
        limit: usize,
    ) -> Result<Vec<DeadLetter>, StoreError> {
        let sql = condition::list_unpublished(Dialect::Postgres);
        let query = sqlx::query(AssertSqlSafe(sql)).bind(row::signed(limit as u64)).bind(handler);
        self.rows(query, letter).await
    }

    /// Starts a redrive.
    pub(super) async fn take_up(&self, what: &NewRedrive) -> Result<Redrive, StoreError> {
        let (sql, values) = condition::take_up(&what.selection, Dialect::Postgres);
        let started_at = now();
        self.transacting(async {
            let mut tx = self.readers.begin().await?;
            if matches!(what.selection, Selection::DeadLetters(_)) {
                sqlx::query(LOCK_ALL).execute(&mut *tx).await?;
            }
            let number = insert_redrive(&mut tx, what, started_at).await?;
            let taken = bind(sqlx::query(AssertSqlSafe(sql)).bind(number), values);
            let total = taken.execute(&mut *tx).await?.rows_affected();
            let redrive = Redrive {
                number: row::number(number)?,
                what: what.clone(),
                state: if total == 0 { RedriveState::Done } else { RedriveState::Running },
                total,
                left: total,
                started_at,
                ended_at: (total == 0).then_some(started_at),
            };
            sqlx::query(
                "UPDATE redrives SET state = $2, total = $3, ended_at = $4 WHERE number = $1",
            )
            .bind(number)
            .bind(redrive.state.as_str())
            .bind(row::signed(total))
            .bind(redrive.ended_at)
            .execute(&mut *tx)
            .await?;
            audit(&redrive.audit()).execute(&mut *tx).await?;
            tx.commit().await?;
            Ok(redrive)
        })
        .await
    }

    pub(super) async fn list_redrives(
        &self,
        after: u64,
        limit: usize,
    ) -> Result<Vec<Redrive>, StoreError> {
        let sql = format!("{REDRIVES} WHERE number > $1 ORDER BY number LIMIT $2");
        let query = sqlx::query(AssertSqlSafe(sql))
            .bind(row::signed(after))
            .bind(row::signed(limit as u64));
        self.rows(query, redrive).await
    }

    pub(super) async fn find_redrive(&self, number: u64) -> Result<Option<Redrive>, StoreError> {
        let sql = format!("{REDRIVES} WHERE number = $1");
        let query = sqlx::query(AssertSqlSafe(sql)).bind(row::signed(number));
        Ok(self.rows(query, redrive).await?.pop())
    }

    /// Cancels a redrive that is running.
    pub(super) async fn put_back(&self, number: u64, entry: &AuditEntry) -> Result<(), StoreError> {
        let number = row::signed(number);
        self.transacting(async {
            let mut tx = self.readers.begin().await?;
            sqlx::query(LOCK_ALL).execute(&mut *tx).await?;
            let cancelled = sqlx::query(
                "UPDATE redrives SET state = 'cancelled', ended_at = $2, left_over =
                     (SELECT count(*) FROM unfinished WHERE redrive = $1) +
                     (SELECT count(*) FROM quarantine WHERE redrive = $1)
                 WHERE number = $1 AND state = 'running'",
            )
            .bind(number)
            .bind(now())
            .execute(&mut *tx)
            .await?;
            if cancelled.rows_affected() == 1 {
                for sql in [
                    "UPDATE unfinished SET redrive = NULL WHERE redrive = $1",
                    "UPDATE quarantine SET redrive = NULL WHERE redrive = $1",
                ] {
                    sqlx::query(sql).bind(number).execute(&mut *tx).await?;
                }
                audit(entry).execute(&mut *tx).await?;
            }
            Ok(tx.commit().await?)
        })
        .await
    }

    pub(super) async fn list_redriven(
        &self,
        handler: &str,
        except: &[u64],
        limit: usize,
    ) -> Result<Vec<Redriven>, StoreError> {
        let query = sqlx::query(REDRIVEN)
            .bind(handler)
            .bind(row::signed(limit as u64))
            .bind(except.iter().map(|number| row::signed(*number)).bind_iter());
        self.rows(query, |row| Ok(in_redrive(row, 8)?.letter(unfinished(row)?)?)).await
    }

    pub(super) async fn list_redriven_quarantine(
        &self,
        except: &[u64],
        limit: usize,
    ) -> Result<Vec<RedrivenEntry>, StoreError> {
        let query = sqlx::query(REDRIVEN_QUARANTINE)
            .bind(row::signed(limit as u64))
            .bind(except.iter().map(|number| row::signed(*number)).bind_iter());
        self.rows(query, |row| Ok(in_redrive(row, 1)?.entry(row.try_get(0)?)?)).await
    }

    pub(super) async fn settle_entries(&self, settled: &[SettledEntry]) -> Result<(), StoreError> {
        let mut gone = Vec::new();
        let mut stays = Vec::new();
        for entry in settled {
            match entry {
                SettledEntry::Gone(number) => gone.push(row::signed(*number)),
                SettledEntry::Stays { number, reason } => {
                    stays.push((row::signed(*number), clean(reason).into_owned()));
                }
            }
        }
        // One statement; an entry is settled once.
        let query = sqlx::query(
            "WITH gone AS (DELETE FROM quarantine WHERE number = ANY($1))
             UPDATE quarantine AS q SET redrive = NULL, reason = r.reason
             FROM unnest($2::bigint[], $3::text[]) AS r(number, reason)
             WHERE q.number = r.number",
        )
        .bind(gone)
        .bind(stays.iter().map(|(number, _)| *number).bind_iter())
        .bind(stays.iter().map(|(_, reason)| reason.as_str()).bind_iter());
        self.reading(query.execute(&self.readers)).await.map(drop)
    }

    pub(super) async fn list_audits(
        &self,
        before: u64,
        limit: usize,
    ) -> Result<Vec<AuditEntry>, StoreError> {
        let before = if before == 0 { u64::MAX } else { before };
        let query = sqlx::query(
            "SELECT number, requested_by, action, subject, detail::text, at FROM audit
             WHERE number < $1 ORDER BY number DESC LIMIT $2",
        )
        .bind(row::signed(before))
        .bind(row::signed(limit as u64));
        self.rows(query, |row| Ok(rows::audit_entry(FromRow::from_row(row)?, row.try_get(5)?)?))
            .await
    }
}
