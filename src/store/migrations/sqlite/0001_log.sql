-- The tables are a public interface: people query them. Times are RFC 3339, UTC, microseconds.

-- There is no index on type or key: they cost appends a third of their rate (see the
-- Postgres schema for numbers), and the log is read by position. Whoever asks often may add one.
CREATE TABLE events (
    position    INTEGER PRIMARY KEY,   -- 1, 2, 3 … without gaps
    source      TEXT NOT NULL,
    id          TEXT NOT NULL,
    type        TEXT NOT NULL,
    subject     TEXT,
    time        TEXT,
    key         TEXT NOT NULL,
    body        TEXT NOT NULL,         -- the JSON as published, byte for byte
    format      TEXT NOT NULL,
    headers     TEXT NOT NULL,         -- JSON
    origin      TEXT NOT NULL,         -- JSON
    recorded_at TEXT NOT NULL,
    UNIQUE (source, id)
) STRICT;

-- One row: where the log and quarantine end. Every append moves it in its own transaction.
CREATE TABLE log_head (
    one         INTEGER PRIMARY KEY CHECK (one = 1),
    position    INTEGER NOT NULL,
    quarantined INTEGER NOT NULL
) STRICT;
INSERT INTO log_head (one, position, quarantined) VALUES (1, 0, 0);

CREATE TABLE quarantine (
    number      INTEGER PRIMARY KEY,
    source      TEXT NOT NULL,         -- the configured source it came from
    received_at TEXT NOT NULL,
    reason      TEXT NOT NULL,
    origin      TEXT NOT NULL,         -- JSON
    headers     TEXT NOT NULL,         -- JSON
    body        BLOB NOT NULL
) STRICT;

-- How far each source is, where its broker can be read again by sequence.
CREATE TABLE source_marks (
    source      TEXT PRIMARY KEY,
    incarnation TEXT NOT NULL,
    sequence    INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

-- How far each handler is.
CREATE TABLE cursors (
    handler     TEXT PRIMARY KEY,
    position    INTEGER NOT NULL,
    updated_at  TEXT NOT NULL
) STRICT, WITHOUT ROWID;
