//! The statements.

use crate::store::Query;

/// Where appends are announced, with the position the log then ends at. Measured: a
/// notification in each append costs less than can be told from noise.
pub(super) const CHANNEL: &str = "pulsebus_log";

/// An append waits for the head row no longer than this, and one whose process was stopped in
/// the middle of a transaction holds it no longer. Positions rely on READ COMMITTED: an update
/// that has waited for the head row goes on from its newest version.
pub(super) const SESSION: &str = "
    SET default_transaction_isolation = 'read committed';
    SET lock_timeout = '15s';
    SET idle_in_transaction_session_timeout = '15s';
    SELECT set_config('synchronous_commit', 'on', false)
    WHERE current_setting('synchronous_commit') = 'off'";

/// One statement, so one round trip and one transaction. Everything is selected from `h`: no
/// row is touched before the head row is locked, so appends cannot lock each other.
///
/// Of what was removed no index of `events` knows. So where something was, these identities are
/// looked for. The statement sees those that were there when it began; where `removed` is not what
/// it was then, once the row is locked, more may have been removed since, and nothing is done.
pub(super) const APPEND: &str = "
    WITH h AS (
        UPDATE log_head SET position = position + $1, quarantined = quarantined + $2,
            bytes = bytes + $23
        WHERE one AND (removed = 0 OR $24
                AND removed = (SELECT seen.removed FROM log_head AS seen)
                AND NOT EXISTS (SELECT FROM unnest($25::uuid[]) AS i(identity)
                    JOIN removed_identities AS r ON r.identity = i.identity))
        RETURNING position - $1 AS head, quarantined - $2 AS number
    ), e AS (
        INSERT INTO events (position, source, id, type, subject, time, key, body, format,
            headers, origin, recorded_at)
        SELECT h.head + r.nth, r.source, r.id, r.type, r.subject, r.time, r.key, r.body::json,
            r.format, r.headers::json, r.origin::json, $3
        FROM h, unnest($4::text[], $5::text[], $6::text[], $7::text[], $8::timestamptz[],
            $9::text[], $10::text[], $11::text[], $12::text[], $13::text[]) WITH ORDINALITY
            AS r(source, id, type, subject, time, key, body, format, headers, origin, nth)
    ), q AS (
        INSERT INTO quarantine (number, source, received_at, reason, origin, headers, body)
        SELECT h.number + r.nth, r.source, $3,
            CASE WHEN r.beside IS NULL THEN r.reason
                 ELSE replace(r.reason, '{position}', (h.head + r.beside)::text) END,
            r.origin::json, r.headers::json, r.body
        FROM h, unnest($14::text[], $15::text[], $16::bigint[], $17::text[], $18::text[],
            $19::bytea[]) WITH ORDINALITY
            AS r(source, reason, beside, origin, headers, body, nth)
    ), m AS (
        INSERT INTO source_marks AS old (source, incarnation, sequence)
        SELECT r.source, r.incarnation, r.sequence
        FROM h, unnest($20::text[], $21::text[], $22::bigint[])
            AS r(source, incarnation, sequence)
        ON CONFLICT (source) DO UPDATE SET
            incarnation = excluded.incarnation,
            sequence = CASE WHEN old.incarnation = excluded.incarnation
                            THEN greatest(old.sequence, excluded.sequence)
                            ELSE excluded.sequence END
    )
    SELECT h.head, h.number,
        CASE WHEN $1 > 0 THEN pg_notify('pulsebus_log', (h.head + $1)::text) END
    FROM h";

pub(super) const FIND_COPIES: &str = "
    SELECT r.nth, e.position, e.type, e.format, e.body
    FROM unnest($1::text[], $2::text[]) WITH ORDINALITY AS r(source, id, nth)
    JOIN events AS e ON e.source = r.source AND e.id = r.id";

/// Only what an earlier attempt at the same batch can have written: that was not long ago.
pub(super) const FIND_HELD: &str = "
    SELECT number, reason, body FROM quarantine
    WHERE number > (SELECT quarantined FROM log_head) - 10000 AND received_at = $1
    ORDER BY number";

macro_rules! columns {
    () => {
        "position, source, id, type, subject, time, key, body, format, headers, origin, \
         recorded_at"
    };
}

/// Bodies are summed up where they are: what is over the limit does not travel.
pub(super) const READ: &str = concat!(
    "SELECT ",
    columns!(),
    " FROM (SELECT *, sum(octet_length(body::text)) OVER (ORDER BY position) AS total
            FROM events WHERE position > $1 AND position <= $2) AS page
      WHERE total <= $3 OR position - 1 = $1 ORDER BY position"
);

pub(super) const FIND: &str =
    concat!("SELECT ", columns!(), " FROM events WHERE source = $1 AND id = $2");

/// With a text for each set of conditions, so that an index someone has added is used. Bodies
/// are summed up as for [`READ`]; what is over the limit travels once at most, and says that the
/// list ends there.
pub(super) fn list(query: &Query) -> String {
    let order = if query.descending { "ORDER BY position DESC" } else { "ORDER BY position" };
    let mut conditions = String::new();
    let mut next = 5;
    for (column, wanted) in [("type", &query.kind), ("key", &query.key)] {
        if wanted.is_some() {
            conditions.push_str(&format!(" AND {column} = ${next}"));
            next += 1;
        }
    }
    format!(
        "SELECT {columns}
         FROM (SELECT *, octet_length(body::text) AS size,
                   sum(octet_length(body::text)) OVER ({order}) AS total
               FROM (SELECT * FROM events WHERE position > $1 AND position <= $2{conditions}
                     {order} LIMIT $3) AS found) AS page
         WHERE total - size <= $4 {order}",
        columns = columns!()
    )
}

/// As [`READ`], for positions that may lie apart.
pub(super) const GET: &str = concat!(
    "SELECT ",
    columns!(),
    " FROM (SELECT *, octet_length(body::text) AS size,
                   sum(octet_length(body::text)) OVER (ORDER BY position) AS total
            FROM events WHERE position = ANY($1)) AS page
      WHERE total <= $2 OR total = size ORDER BY position"
);

/// The length of a value is known without reading it.
pub(super) const QUARANTINE: &str = "
    SELECT number, received_at, reason, origin, headers, octet_length(body)::bigint
    FROM quarantine WHERE number > $1 ORDER BY number LIMIT $2";

pub(super) const QUARANTINE_ENTRY: &str = "
    SELECT number, received_at, reason, origin, headers, octet_length(body)::bigint, body
    FROM quarantine WHERE number = $1";
