//! Dead letters.

use sqlx::{Row as _, postgres::PgRow};
use time::OffsetDateTime;

use super::{
    super::{DeadLetter, StoreError, row},
    PostgresStore,
};

const BURY: &str = "INSERT INTO dead_letters AS d (handler, position, id, type, key, attempts, \
    first_error, last_error, first_failed_at, last_failed_at)
    SELECT * FROM UNNEST($1::text[], $2::bigint[], $3::text[], $4::text[], $5::text[], \
        $6::bigint[], $7::text[], $8::text[], $9::timestamptz[], $10::timestamptz[])
    ON CONFLICT (handler, position) DO UPDATE SET attempts = excluded.attempts, \
        first_error = excluded.first_error, last_error = excluded.last_error, \
        first_failed_at = excluded.first_failed_at, last_failed_at = excluded.last_failed_at";

const DEAD_LETTERS: &str = "SELECT number, handler, position, id, type, key, attempts, \
    first_error, last_error, first_failed_at, last_failed_at
    FROM dead_letters WHERE number > $1 AND ($2::text IS NULL OR handler = $2)
    ORDER BY number LIMIT $3";

impl PostgresStore {
    pub(super) async fn bury_letters(&self, letters: &[DeadLetter]) -> Result<(), StoreError> {
        if letters.is_empty() {
            return Ok(());
        }
        // No database keeps U+0000 in text; an error message that has one is kept without it.
        let texts = |of: fn(&DeadLetter) -> &str| -> Vec<String> {
            letters.iter().map(|letter| of(letter).replace('\0', "\u{fffd}")).collect()
        };
        let times = |of: fn(&DeadLetter) -> OffsetDateTime| -> Vec<OffsetDateTime> {
            letters.iter().map(of).collect()
        };
        let positions: Vec<i64> = letters.iter().map(|l| row::signed(l.position.0)).collect();
        let attempts: Vec<i64> = letters.iter().map(|l| i64::from(l.attempts)).collect();
        let query = sqlx::query(BURY)
            .bind(texts(|l| &l.handler))
            .bind(positions)
            .bind(texts(|l| &l.id))
            .bind(texts(|l| &l.kind))
            .bind(texts(|l| &l.key))
            .bind(attempts)
            .bind(texts(|l| &l.first_error))
            .bind(texts(|l| &l.last_error))
            .bind(times(|l| l.first_failed_at))
            .bind(times(|l| l.last_failed_at));
        self.reading(query.execute(&self.readers)).await.map(drop)
    }

    pub(super) async fn list_dead_letters(
        &self,
        handler: Option<&str>,
        after: u64,
        limit: usize,
    ) -> Result<Vec<DeadLetter>, StoreError> {
        let query = sqlx::query(DEAD_LETTERS)
            .bind(row::signed(after))
            .bind(handler)
            .bind(row::signed(limit as u64));
        let rows = self.reading(query.fetch_all(&self.readers)).await?;
        rows.iter().map(letter).collect()
    }
}

fn letter(row: &PgRow) -> Result<DeadLetter, StoreError> {
    let read = |error: sqlx::Error| StoreError::fatal(error);
    let attempts: i64 = row.try_get(6).map_err(read)?;
    Ok(DeadLetter {
        number: row::number(row.try_get(0).map_err(read)?)?,
        handler: row.try_get::<String, _>(1).map_err(read)?.into(),
        position: row::position(row.try_get(2).map_err(read)?)?,
        id: row.try_get(3).map_err(read)?,
        kind: row.try_get(4).map_err(read)?,
        key: row.try_get(5).map_err(read)?,
        attempts: u32::try_from(attempts).unwrap_or(u32::MAX),
        first_error: row.try_get(7).map_err(read)?,
        last_error: row.try_get(8).map_err(read)?,
        first_failed_at: row.try_get(9).map_err(read)?,
        last_failed_at: row.try_get(10).map_err(read)?,
    })
}
