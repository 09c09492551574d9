//! Appending: one `INSERT` a batch, from JSON.

use async_trait::async_trait;
use sqlx::{Sqlite, Transaction};

use super::{
    SqliteStore,
    text::{array, text_time},
};
use crate::{
    event::{Event, Position},
    store::{
        AttemptAppend, AttemptError, Batch, StoreError,
        admit::{self, Held, HeldBefore, Known, Plan},
        retain,
        row::{self, Texts},
    },
    transport::Receipt,
};

const SAVE_MARK: &str = "INSERT INTO source_marks (source, incarnation, sequence) VALUES (?, ?, ?)
    ON CONFLICT (source) DO UPDATE SET
        sequence = CASE WHEN incarnation = excluded.incarnation
                        THEN max(sequence, excluded.sequence) ELSE excluded.sequence END,
        incarnation = excluded.incarnation";

const INSERT_EVENTS: &str = "INSERT INTO events (position, source, id, type, subject, time, key, \
    body, format, headers, origin, recorded_at)
    SELECT ?1 + j.key + 1, j.value ->> 0, j.value ->> 1, j.value ->> 2, j.value ->> 3, \
        j.value ->> 4, j.value ->> 5, j.value ->> 6, j.value ->> 7, j.value ->> 8, \
        j.value ->> 9, ?3
    FROM json_each(?2) AS j";

// The bytes travel as hexadecimal: they are whatever a broker handed over.
const INSERT_HELD: &str = "INSERT INTO quarantine (number, source, received_at, reason, origin, \
    headers, body)
    SELECT ?1 + j.key + 1, j.value ->> 0, ?3, j.value ->> 1, j.value ->> 2, j.value ->> 3, \
        unhex(j.value ->> 4)
    FROM json_each(?2) AS j";

const FIND_COPIES: &str = "SELECT j.key, e.position, e.type, e.format, e.body
    FROM json_each(?1) AS j CROSS JOIN events AS e
    ON e.source = j.value ->> 0 AND e.id = j.value ->> 1";

// Only what an earlier attempt at the same batch can have written: that was not long ago.
const FIND_HELD: &str = "SELECT number, reason, body FROM quarantine
    WHERE number > (SELECT quarantined FROM log_head) - 10000 AND received_at = ?
    ORDER BY number";

#[async_trait]
impl AttemptAppend for SqliteStore {
    async fn attempt(&self, batch: &Batch) -> Result<Vec<Receipt>, AttemptError> {
        self.transact(batch, true).await
    }

    async fn probe(&self, batch: &Batch) -> Result<(), AttemptError> {
        self.transact(batch, false).await.map(drop)
    }
}

impl SqliteStore {
    async fn transact(&self, batch: &Batch, keep: bool) -> Result<Vec<Receipt>, AttemptError> {
        self.check()?;
        let mut tx =
            self.writer.begin_with("BEGIN IMMEDIATE").await.map_err(|e| self.failure(&e))?;
        let written = self.write(&mut tx, batch).await;
        let (receipts, changed) = match written {
            Ok(written) => written,
            Err(error) => {
                // What cannot be rolled back is not committed either; the connection is closed.
                let _ = tx.rollback().await;
                return Err(error);
            }
        };
        if !keep || !changed {
            tx.rollback().await.map_err(|e| self.failure(&e))?;
            return Ok(receipts);
        }
        let doubt = self.caution.doubt();
        tx.commit().await.map_err(|e| self.failure(&e))?;
        doubt.known();
        Ok(receipts)
    }

    /// Writes the batch; says whether there was anything to write.
    async fn write(
        &self,
        tx: &mut Transaction<'static, Sqlite>,
        batch: &Batch,
    ) -> Result<(Vec<Receipt>, bool), AttemptError> {
        let now = text_time(batch.recorded_at)?;
        let (head, quarantined, removed): (i64, i64, i64) =
            sqlx::query_as("SELECT position, quarantined, removed FROM log_head")
                .fetch_one(&mut **tx)
                .await
                .map_err(|e| self.failure(&e))?;
        let (head, number) = (row::position(head)?, row::number(quarantined)?);
        let indexed: Vec<_> = row::events(&batch.entries).collect();
        // No index of the log knows these, so they are looked for each time.
        let removed = match removed {
            0 => Vec::new(),
            _ => self.find_removed(tx, &indexed).await?,
        };
        if !removed.is_empty() {
            self.caution.raise();
        }

        let mut plan = if self.caution.is_raised() {
            self.check_copies(tx, batch, &indexed, &removed, &now).await?
        } else {
            Plan::all_new(&batch.entries)
        };
        let mut bytes = 0;
        if let Err(error) = insert_events(tx, &plan.fresh, head, &now, &mut bytes).await? {
            let unique = matches!(&error, sqlx::Error::Database(e) if e.is_unique_violation());
            if !unique {
                return Err(self.failure(&error));
            }
            self.caution.raise();
            plan = self.check_copies(tx, batch, &indexed, &removed, &now).await?;
            if let Err(error) = insert_events(tx, &plan.fresh, head, &now, &mut bytes).await? {
                if matches!(&error, sqlx::Error::Database(e) if e.is_unique_violation()) {
                    return Err(AttemptError::Store(StoreError::fatal(format_args!(
                        "`log_head` says the log ends at {head}, but there are events behind it: \
                         the file was changed by hand or restored in part"
                    ))));
                }
                return Err(self.failure(&error));
            }
        }
        insert_held(tx, &plan.held, head, number, &now).await?.map_err(|e| self.failure(&e))?;
        if !plan.is_empty() {
            sqlx::query("UPDATE log_head SET position = ?, quarantined = ?, bytes = bytes + ?")
                .bind(row::signed(head.0 + plan.fresh.len() as u64))
                .bind(row::signed(number + plan.held.len() as u64))
                .bind(row::signed(bytes))
                .execute(&mut **tx)
                .await
                .map_err(|e| self.failure(&e))?;
        }
        for (source, mark) in admit::fold_marks(&batch.marks) {
            sqlx::query(SAVE_MARK)
                .bind(source)
                .bind(&*mark.incarnation)
                .bind(row::signed(mark.sequence))
                .execute(&mut **tx)
                .await
                .map_err(|e| self.failure(&e))?;
        }
        Ok((plan.receipts(head, number), !plan.is_empty() || !batch.marks.is_empty()))
    }

    /// Plans the batch with copies looked up.
    async fn check_copies<'b>(
        &self,
        tx: &mut Transaction<'static, Sqlite>,
        batch: &'b Batch,
        indexed: &[(usize, &Event)],
        removed: &[(usize, Known<'static>)],
        now: &str,
    ) -> Result<Plan<'b>, AttemptError> {
        let identities = array(indexed.iter(), |(_, event), out| {
            row::write_json(&[event.source(), event.id()], out)
        })?;
        let rows: Vec<(i64, i64, String, String, String)> = sqlx::query_as(FIND_COPIES)
            .bind(identities)
            .fetch_all(&mut **tx)
            .await
            .map_err(|e| self.failure(&e))?;
        let mut known: Vec<Option<(Position, Event)>> = Vec::new();
        known.resize_with(batch.entries.len(), || None);
        for (nth, position, kind, format, body) in rows {
            let Some(&(index, event)) = usize::try_from(nth).ok().and_then(|n| indexed.get(n))
            else {
                continue;
            };
            let first = row::known_event(event, kind, &format, body)?;
            known[index] = Some((row::position(position)?, first));
        }
        let mut gone: Vec<Option<Known<'static>>> = vec![None; batch.entries.len()];
        for (index, left) in removed {
            gone[*index] = Some(*left);
        }
        let mut plan = Plan::checked(&batch.entries, |index, _| match &known[index] {
            Some((position, event)) => Some(Known::Event(*position, event)),
            None => gone[index],
        });
        if plan.met_copies() {
            self.caution.raise();
        } else {
            self.caution.relax();
        }
        if !plan.held.is_empty() {
            let rows: Vec<(i64, String, Vec<u8>)> = sqlx::query_as(FIND_HELD)
                .bind(now)
                .fetch_all(&mut **tx)
                .await
                .map_err(|e| self.failure(&e))?;
            let before = rows
                .into_iter()
                .map(|(number, reason, body)| {
                    Ok(HeldBefore { number: row::number(number)?, reason, body: body.into() })
                })
                .collect::<Result<_, StoreError>>()?;
            plan.forget_held(before);
        }
        Ok(plan)
    }
}

/// What an insert came to: the inner error is the database's and leaves the transaction open.
type Inserted = Result<Result<(), sqlx::Error>, AttemptError>;

async fn insert_events(
    tx: &mut Transaction<'static, Sqlite>,
    events: &[&Event],
    head: Position,
    now: &str,
    bytes: &mut u64,
) -> Inserted {
    *bytes = 0;
    if events.is_empty() {
        return Ok(Ok(()));
    }
    let headers = Texts::headers(events.iter().map(|e| e.headers()))?;
    let origins = Texts::origins(events.iter().map(|e| e.origin()))?;
    *bytes = retain::sizes(events, &headers, &origins);
    let rows = events.iter().zip(headers.iter().zip(origins.iter()));
    let json = array(rows, |(event, (headers, origin)), out| {
        let time = event.time().map(text_time).transpose()?;
        let body = row::body_text(event)?;
        for text in [event.source(), event.id(), event.kind(), event.key()] {
            no_nul(text)?;
        }
        event.subject().map_or(Ok(()), no_nul)?;
        row::write_json(
            &(
                event.source(),
                event.id(),
                event.kind(),
                event.subject(),
                time,
                event.key(),
                body,
                event.format().as_str(),
                headers,
                origin,
            ),
            out,
        )
    })?;
    let insert = sqlx::query(INSERT_EVENTS).bind(row::signed(head.0)).bind(json).bind(now);
    Ok(insert.execute(&mut **tx).await.map(drop))
}

async fn insert_held(
    tx: &mut Transaction<'static, Sqlite>,
    held: &[Held<'_>],
    head: Position,
    number: u64,
    now: &str,
) -> Inserted {
    if held.is_empty() {
        return Ok(Ok(()));
    }
    let headers = Texts::headers(held.iter().map(|h| h.headers))?;
    let origins = Texts::origins(held.iter().map(|h| h.origin))?;
    let rows = held.iter().zip(headers.iter().zip(origins.iter()));
    let json = array(rows, |(held, (headers, origin)), out| {
        let (source, reason) = (row::held_source(held), held.reason(head));
        row::write_json(&(source, reason, origin, headers, Hex(held.body)), out)
    })?;
    let insert = sqlx::query(INSERT_HELD).bind(row::signed(number)).bind(json).bind(now);
    Ok(insert.execute(&mut **tx).await.map(drop))
}

/// Bytes as hexadecimal.
struct Hex<'a>(&'a [u8]);

impl serde::Serialize for Hex<'_> {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        const DIGITS: &[u8; 16] = b"0123456789abcdef";
        let mut text = String::with_capacity(self.0.len() * 2);
        for byte in self.0 {
            text.push(char::from(DIGITS[usize::from(byte >> 4)]));
            text.push(char::from(DIGITS[usize::from(byte & 15)]));
        }
        serializer.serialize_str(&text)
    }
}

/// SQLite's JSON functions cut a text at U+0000, which must not change an event unnoticed (G9).
fn no_nul(text: &str) -> Result<(), AttemptError> {
    if text.contains('\0') {
        return Err(AttemptError::Refused(
            "an attribute contains U+0000, which the database cannot keep".to_owned(),
        ));
    }
    Ok(())
}
