-- The tables are a public interface: people query them.

-- There is no index on type or key. Measured on two cores, batches of 1,000 events of 512 bytes,
-- durable commits: (key, position) costs 29% of the append rate, a hash index on key 18%,
-- (type, position) 12%, both of the ordered ones 34%. The log is read by position; listing by type
-- or key scans it in bounded ranges. Whoever asks often may CREATE INDEX CONCURRENTLY: the
-- queries use it.
CREATE TABLE events (
    position    bigint PRIMARY KEY,    -- 1, 2, 3 … without gaps
    source      text NOT NULL,
    id          text NOT NULL,
    type        text NOT NULL,
    subject     text,
    time        timestamptz,
    key         text NOT NULL,
    body        json NOT NULL,         -- as published, byte for byte: json keeps text, jsonb does not
    format      text NOT NULL,
    headers     json NOT NULL,
    origin      json NOT NULL,
    recorded_at timestamptz NOT NULL,
    UNIQUE (source, id)
);

-- One row: where the log and quarantine end. Every append updates it in its own transaction; the
-- row lock is what makes positions gapless and commit-ordered. It is rewritten by every append, so
-- its page is left room for the row's next versions.
CREATE TABLE log_head (
    one         boolean PRIMARY KEY DEFAULT true CHECK (one),
    position    bigint NOT NULL,
    quarantined bigint NOT NULL
) WITH (fillfactor = 10);
INSERT INTO log_head (position, quarantined) VALUES (0, 0);

CREATE TABLE quarantine (
    number      bigint PRIMARY KEY,
    source      text NOT NULL,         -- the configured source it came from
    received_at timestamptz NOT NULL,
    reason      text NOT NULL,
    origin      json NOT NULL,
    headers     json NOT NULL,
    body        bytea NOT NULL
);

-- How far each source is, where its broker can be read again by sequence.
CREATE TABLE source_marks (
    source      text PRIMARY KEY,
    incarnation text NOT NULL,
    sequence    bigint NOT NULL
) WITH (fillfactor = 50);

-- How far each handler is.
CREATE TABLE cursors (
    handler     text PRIMARY KEY,
    position    bigint NOT NULL,
    updated_at  timestamptz NOT NULL
) WITH (fillfactor = 50);
