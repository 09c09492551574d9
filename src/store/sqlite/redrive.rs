//! Lists of what is unfinished, and the jobs that take it up, in SQLite.

use sqlx::{
    AssertSqlSafe, FromRow, Row as _, Sqlite, SqliteConnection,
    sqlite::{SqliteArguments, SqliteRow},
};
use time::OffsetDateTime;

use super::{
    SqliteStore,
    error::unrefused,
    text::{array, numbers, parse_time, text_time},
};
use crate::{
    event::{Position, now},
    store::{
        StoreError,
        progress::{
            AuditEntry, DeadLetter, DeadLetterFilter, NewRedrive, Redrive, RedriveState, Redriven,
            RedrivenEntry, SettledEntry, Unfinished,
            condition::{self, Dialect, Filtered, Value},
            row::{
                self as rows, InRedrive, LetterRow, REDRIVES, RedriveRow, UNFINISHED,
                UnfinishedRow, clean,
            },
        },
        row,
    },
};

/// Ends those that have nothing left.
pub(super) const END: &str = "UPDATE redrives SET state = 'done', ended_at = ?
    WHERE state = 'running'
      AND NOT EXISTS (SELECT 1 FROM unfinished WHERE redrive = redrives.number)
      AND NOT EXISTS (SELECT 1 FROM quarantine WHERE redrive = redrives.number)";

pub(super) const DISCARD_ORPHANS: &str = "DELETE FROM unfinished
    WHERE redrive IN (SELECT number FROM redrives WHERE state = 'running' AND action = 'discard')
      AND handler NOT IN (SELECT value FROM json_each(?))";

// The index is named: the planner would walk all that a handler has not finished, and this is
// asked for every moment, when hardly ever anything is being redriven.
const REDRIVEN: &str = "SELECT u.position, u.id, u.type, u.key, u.attempts, u.state, u.due_at, \
    u.unpublished, r.number, r.action, r.rate
    FROM unfinished AS u INDEXED BY unfinished_redriven
    CROSS JOIN redrives AS r ON r.number = u.redrive
    WHERE u.handler = ?1 AND u.redrive IS NOT NULL AND r.state = 'running'
      AND u.redrive NOT IN (SELECT value FROM json_each(?3))
    ORDER BY u.position LIMIT ?2";

const REDRIVEN_QUARANTINE: &str = "SELECT q.number, r.number, r.action, r.rate
    FROM quarantine AS q INDEXED BY quarantine_redriven
    CROSS JOIN redrives AS r ON r.number = q.redrive
    WHERE q.redrive IS NOT NULL AND r.state = 'running'
      AND q.redrive NOT IN (SELECT value FROM json_each(?2))
    ORDER BY q.number LIMIT ?1";

const PUT_BACK: [&str; 2] = [
    "UPDATE unfinished SET redrive = NULL WHERE redrive = ?",
    "UPDATE quarantine SET redrive = NULL WHERE redrive = ?",
];

const GONE: &str = "DELETE FROM quarantine WHERE number IN (SELECT value FROM json_each(?))";

const STAYS: &str = "UPDATE quarantine SET redrive = NULL, reason = j.value ->> 1
    FROM json_each(?) AS j WHERE number = j.value ->> 0";

type Statement<'q> = sqlx::query::Query<'q, Sqlite, SqliteArguments>;

fn bind(mut query: Statement<'_>, values: Vec<Value>) -> Result<Statement<'_>, StoreError> {
    for value in values {
        query = match value {
            Value::Text(text) => query.bind(text),
            Value::Number(number) => query.bind(number),
            Value::Numbers(all) => query.bind(serde_json::json!(all).to_string()),
            Value::Texts(all) => query.bind(serde_json::json!(all).to_string()),
            Value::Time(at) => query.bind(text_time(at).map_err(unrefused)?),
        };
    }
    Ok(query)
}

/// The statement that writes down what a person did.
pub(super) fn audit(entry: &AuditEntry) -> Result<Statement<'static>, StoreError> {
    let AuditEntry { number: _, at, by, action, subject, detail } = entry;
    Ok(sqlx::query(
        "INSERT INTO audit (at, requested_by, action, subject, detail) VALUES (?, ?, ?, ?, ?)",
    )
    .bind(text_time(*at).map_err(unrefused)?)
    .bind(clean(by).into_owned())
    .bind(clean(action).into_owned())
    .bind(clean(subject).into_owned())
    .bind(clean(detail).into_owned()))
}

pub(super) async fn write_down(
    tx: &mut SqliteConnection,
    entry: &AuditEntry,
) -> Result<(), rows::Failed> {
    audit(entry)?.execute(tx).await?;
    Ok(())
}

/// A time that may be missing.
fn time(row: &SqliteRow, column: usize) -> Result<Option<OffsetDateTime>, rows::Failed> {
    let text: Option<String> = row.try_get(column)?;
    Ok(text.as_deref().map(parse_time).transpose()?)
}

fn unfinished(row: &SqliteRow) -> Result<Unfinished, rows::Failed> {
    let row = UnfinishedRow {
        position: row.try_get(0)?,
        id: row.try_get(1)?,
        kind: row.try_get(2)?,
        key: row.try_get(3)?,
        attempts: row.try_get(4)?,
        state: row.try_get(5)?,
        due_at: time(row, 6)?,
        unpublished: row.try_get(7)?,
    };
    Ok(row.into_unfinished()?)
}

fn letter(row: &SqliteRow) -> Result<DeadLetter, rows::Failed> {
    let row = LetterRow {
        handler: row.try_get(0)?,
        position: row.try_get(1)?,
        id: row.try_get(2)?,
        kind: row.try_get(3)?,
        key: row.try_get(4)?,
        attempts: row.try_get(5)?,
        errors: [row.try_get(6)?, row.try_get(7)?],
        times: [time(row, 8)?, time(row, 9)?],
        redrive: row.try_get(10)?,
        followers: row.try_get(11)?,
    };
    Ok(row.into_letter()?)
}

fn redrive(row: &SqliteRow) -> Result<Redrive, rows::Failed> {
    let started_at: String = row.try_get(9)?;
    let row = RedriveRow {
        number: row.try_get(0)?,
        subject: row.try_get(1)?,
        action: row.try_get(2)?,
        filter: row.try_get(3)?,
        rate: row.try_get(4)?,
        by: row.try_get(5)?,
        reason: row.try_get(6)?,
        state: row.try_get(7)?,
        total: row.try_get(8)?,
        started_at: parse_time(&started_at)?,
        ended_at: time(row, 10)?,
        left: row.try_get(11)?,
    };
    Ok(row.into_redrive()?)
}

impl SqliteStore {
    /// Reads rows, each by this.
    async fn rows<T>(
        &self,
        query: Statement<'_>,
        read: fn(&SqliteRow) -> Result<T, rows::Failed>,
    ) -> Result<Vec<T>, StoreError> {
        let rows = query.fetch_all(&self.readers).await.map_err(|e| self.read_failure(&e))?;
        rows.iter()
            .map(|row| {
                read(row).map_err(|failed| match failed {
                    rows::Failed::Database(error) => self.read_failure(&error),
                    rows::Failed::Store(error) => error,
                })
            })
            .collect()
    }

    pub(super) async fn list_unfinished(
        &self,
        handler: &str,
        after: Position,
        limit: usize,
    ) -> Result<Vec<Unfinished>, StoreError> {
        let sql = format!(
            "SELECT {UNFINISHED} FROM unfinished WHERE handler = ? AND position > ?
             ORDER BY position LIMIT ?"
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
        let (sql, values) = condition::list_letters(filter, after, Dialect::Sqlite);
        let query = sqlx::query(AssertSqlSafe(sql)).bind(row::signed(limit as u64));
        self.rows(bind(query, values)?, letter).await
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
        let query = sqlx::query(AssertSqlSafe(condition::list_at(Dialect::Sqlite)))
            .bind(row::signed(positions.len() as u64));
        self.rows(bind(query, values)?, letter).await
    }

    /// Counts what a filter asks for.
    pub(super) async fn count(&self, (sql, values): Filtered) -> Result<u64, StoreError> {
        let query = bind(sqlx::query(AssertSqlSafe(sql)), values)?;
        let counted = async { query.fetch_one(&self.readers).await?.try_get(0) }.await;
        row::number(counted.map_err(|e| self.read_failure(&e))?)
    }

    pub(super) async fn list_unpublished(
        &self,
        handler: &str,
        limit: usize,
    ) -> Result<Vec<DeadLetter>, StoreError> {
        let sql = condition::list_unpublished(Dialect::Sqlite);
        let query = sqlx::query(AssertSqlSafe(sql)).bind(row::signed(limit as u64)).bind(handler);
        self.rows(query, letter).await
    }

    /// Starts a redrive.
    pub(super) async fn take_up(&self, what: &NewRedrive) -> Result<Redrive, StoreError> {
        let NewRedrive { selection, action, rate, by, reason } = what;
        let (subject, filter) = rows::selection(selection)?;
        let (sql, values) = condition::take_up(selection, Dialect::Sqlite);
        let started_at = now();
        let at = text_time(started_at).map_err(unrefused)?;

        let mut tx = self.begin().await?;
        let started = async {
            let number: i64 = sqlx::query_scalar(
                "INSERT INTO redrives (subject, action, filter, rate, requested_by, reason, \
                 state, total, started_at) VALUES (?, ?, ?, ?, ?, ?, 'running', 0, ?) \
                 RETURNING number",
            )
            .bind(subject)
            .bind(action.as_str())
            .bind(filter)
            .bind(*rate)
            .bind(clean(by))
            .bind(reason.as_deref().map(clean))
            .bind(&at)
            .fetch_one(&mut *tx)
            .await?;
            let taken = bind(sqlx::query(AssertSqlSafe(sql)).bind(number), values)?;
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
            sqlx::query("UPDATE redrives SET state = ?, total = ?, ended_at = ? WHERE number = ?")
                .bind(redrive.state.as_str())
                .bind(row::signed(total))
                .bind((total == 0).then_some(at))
                .bind(number)
                .execute(&mut *tx)
                .await?;
            write_down(&mut tx, &redrive.audit()).await?;
            Ok(redrive)
        }
        .await;
        self.end(tx, started).await
    }

    pub(super) async fn list_redrives(
        &self,
        after: u64,
        limit: usize,
    ) -> Result<Vec<Redrive>, StoreError> {
        let sql = format!("{REDRIVES} WHERE number > ? ORDER BY number LIMIT ?");
        let query = sqlx::query(AssertSqlSafe(sql))
            .bind(row::signed(after))
            .bind(row::signed(limit as u64));
        self.rows(query, redrive).await
    }

    pub(super) async fn find_redrive(&self, number: u64) -> Result<Option<Redrive>, StoreError> {
        let sql = format!("{REDRIVES} WHERE number = ?");
        let query = sqlx::query(AssertSqlSafe(sql)).bind(row::signed(number));
        Ok(self.rows(query, redrive).await?.pop())
    }

    /// Cancels a redrive that is running.
    pub(super) async fn put_back(&self, number: u64, audit: &AuditEntry) -> Result<(), StoreError> {
        let at = text_time(now()).map_err(unrefused)?;
        let number = row::signed(number);
        let mut tx = self.begin().await?;
        let done = async {
            let cancelled = sqlx::query(
                "UPDATE redrives SET state = 'cancelled', ended_at = ?, left_over =
                     (SELECT count(*) FROM unfinished WHERE redrive = redrives.number) +
                     (SELECT count(*) FROM quarantine WHERE redrive = redrives.number)
                 WHERE number = ? AND state = 'running'",
            )
            .bind(at)
            .bind(number)
            .execute(&mut *tx)
            .await?;
            if cancelled.rows_affected() == 1 {
                for sql in PUT_BACK {
                    sqlx::query(sql).bind(number).execute(&mut *tx).await?;
                }
                write_down(&mut tx, audit).await?;
            }
            Ok(())
        }
        .await;
        self.end(tx, done).await
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
            .bind(numbers(except.iter().copied()));
        self.rows(query, |row| {
            let redrive = InRedrive(row.try_get(8)?, row.try_get(9)?, row.try_get(10)?);
            Ok(redrive.letter(unfinished(row)?)?)
        })
        .await
    }

    pub(super) async fn list_redriven_quarantine(
        &self,
        except: &[u64],
        limit: usize,
    ) -> Result<Vec<RedrivenEntry>, StoreError> {
        let query = sqlx::query(REDRIVEN_QUARANTINE)
            .bind(row::signed(limit as u64))
            .bind(numbers(except.iter().copied()));
        self.rows(query, |row| {
            let redrive = InRedrive(row.try_get(1)?, row.try_get(2)?, row.try_get(3)?);
            Ok(redrive.entry(row.try_get(0)?)?)
        })
        .await
    }

    pub(super) async fn settle_entries(&self, settled: &[SettledEntry]) -> Result<(), StoreError> {
        let gone = numbers(settled.iter().filter_map(|entry| match entry {
            SettledEntry::Gone(number) => Some(*number),
            SettledEntry::Stays { .. } => None,
        }));
        let stays = settled.iter().filter_map(|entry| match entry {
            SettledEntry::Gone(_) => None,
            SettledEntry::Stays { number, reason } => Some((row::signed(*number), clean(reason))),
        });
        let stays = array(stays, |entry, out| row::write_json(&entry, out)).map_err(unrefused)?;
        let mut tx = self.begin().await?;
        let done = async {
            for (sql, entries) in [(GONE, gone), (STAYS, stays)] {
                if entries != "[]" {
                    sqlx::query(sql).bind(entries).execute(&mut *tx).await?;
                }
            }
            Ok(())
        }
        .await;
        self.end(tx, done).await
    }

    pub(super) async fn list_audits(
        &self,
        before: u64,
        limit: usize,
    ) -> Result<Vec<AuditEntry>, StoreError> {
        let before = if before == 0 { u64::MAX } else { before };
        let query = sqlx::query(
            "SELECT number, requested_by, action, subject, detail, at FROM audit
             WHERE number < ? ORDER BY number DESC LIMIT ?",
        )
        .bind(row::signed(before))
        .bind(row::signed(limit as u64));
        self.rows(query, |row| {
            let at: String = row.try_get(5)?;
            Ok(rows::audit_entry(FromRow::from_row(row)?, parse_time(&at)?)?)
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{
        progress::{QuarantineFilter, Selection},
        sqlite::SqliteOptions,
    };

    async fn plan(store: &SqliteStore, sql: &str) -> String {
        let sql = format!("EXPLAIN QUERY PLAN {sql}");
        let rows = sqlx::query(AssertSqlSafe(sql)).fetch_all(&store.readers).await.unwrap();
        let lines: Vec<String> = rows.iter().map(|row| row.try_get(3).unwrap()).collect();
        lines.join("; ")
    }

    /// Without statistics the plan does not depend on what is in the tables.
    #[tokio::test]
    async fn what_is_unfinished_is_found_through_indexes() {
        let folder = tempfile::tempdir().unwrap();
        let store = SqliteStore::open(SqliteOptions::new(folder.path().join("db"))).await.unwrap();
        let of = DeadLetterFilter { handler: Some("h".to_owned()), ..DeadLetterFilter::default() };
        let text = || Some("text".to_owned());
        for (filter, index) in [
            (DeadLetterFilter::default(), "INDEX unfinished_dead"),
            (of.clone(), "INDEX unfinished_dead (handler=?"),
            (
                DeadLetterFilter { kind: text(), ..of.clone() },
                "INDEX unfinished_dead_type (handler=? AND type=?",
            ),
            (
                DeadLetterFilter { key: text(), kind: text(), ..of.clone() },
                "INDEX unfinished_key (handler=? AND key=? AND state=?",
            ),
            (
                DeadLetterFilter { positions: vec![1, 2], ..of.clone() },
                "(handler=? AND position=?)",
            ),
            (DeadLetterFilter { error: text(), ..of }, "INDEX unfinished_dead (handler=?"),
        ] {
            let selection = Selection::DeadLetters(filter.clone());
            for (sql, _) in [
                condition::list_letters(&filter, None, Dialect::Sqlite),
                condition::list_letters(&filter, Some(("h", Position(5))), Dialect::Sqlite),
                condition::count_letters(&filter, Dialect::Sqlite),
                condition::take_up(&selection, Dialect::Sqlite),
            ] {
                let plan = plan(&store, &sql).await;
                assert!(plan.contains(index), "{sql}: {plan}");
                // Pages come in the order of the index: none is sorted to find its beginning.
                assert!(!plan.contains("ORDER BY"), "{sql}: {plan}");
                let behind = "behind USING COVERING INDEX unfinished_key (handler=? AND key=? \
                              AND state=? AND position>?)";
                assert_eq!(plan.contains(behind), sql.contains("behind"), "{sql}: {plan}");
            }
        }
        let some =
            Selection::Quarantine(QuarantineFilter { numbers: vec![1], ..Default::default() });
        for (sql, index) in [
            (condition::take_up(&some, Dialect::Sqlite).0, "PRIMARY KEY (rowid=?)"),
            (
                condition::list_unpublished(Dialect::Sqlite),
                "INDEX unfinished_unpublished (handler=?)",
            ),
            (condition::list_at(Dialect::Sqlite), "PRIMARY KEY (handler=? AND position=?)"),
            (REDRIVEN.to_owned(), "u USING INDEX unfinished_redriven (handler=?)"),
            (REDRIVEN_QUARANTINE.to_owned(), "q USING COVERING INDEX quarantine_redriven"),
            (format!("{REDRIVES} WHERE number = ?"), "COVERING INDEX unfinished_redrive"),
            (format!("{REDRIVES} WHERE number = ?"), "COVERING INDEX quarantine_redrive"),
            (END.to_owned(), "INDEX redrives_running"),
            (END.to_owned(), "COVERING INDEX unfinished_redrive (redrive=?)"),
            (END.to_owned(), "COVERING INDEX quarantine_redrive (redrive=?)"),
            (DISCARD_ORPHANS.to_owned(), "INDEX unfinished_redrive (redrive=?)"),
            (PUT_BACK[0].to_owned(), "INDEX unfinished_redrive (redrive=?)"),
            (PUT_BACK[1].to_owned(), "INDEX quarantine_redrive (redrive=?)"),
            (GONE.to_owned(), "quarantine USING INTEGER PRIMARY KEY"),
            (STAYS.to_owned(), "quarantine USING INTEGER PRIMARY KEY"),
        ] {
            let plan = plan(&store, &sql).await;
            assert!(plan.contains(index), "{sql}: {plan}");
            assert!(!plan.contains("ORDER BY"), "{sql}: {plan}");
        }
    }
}
