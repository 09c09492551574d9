-- A handler's row is its lease and its fence: what it has done is written under the epoch of its
-- last claim, and only then. One process uses the file at a time, so a claim here has no end.
ALTER TABLE cursors ADD COLUMN epoch INTEGER NOT NULL DEFAULT 0;
ALTER TABLE cursors ADD COLUMN owner TEXT;                           -- the process that has it
ALTER TABLE cursors ADD COLUMN expires_at TEXT;                      -- always NULL in SQLite
ALTER TABLE cursors ADD COLUMN paused INTEGER NOT NULL DEFAULT 0;    -- a person has stopped it

-- One row: the last epoch of any handler. Each is given once, also when a handler is forgotten
-- and comes back.
CREATE TABLE epochs (
    one         INTEGER PRIMARY KEY CHECK (one = 1),
    last        INTEGER NOT NULL
) STRICT;
INSERT INTO epochs (one, last) VALUES (1, 0);

-- Events at or below a handler's cursor that it has not finished.
CREATE TABLE unfinished (
    handler         TEXT NOT NULL,
    position        INTEGER NOT NULL,
    state           TEXT NOT NULL CHECK (state IN ('retrying', 'parked', 'dead')),
    id              TEXT NOT NULL,
    type            TEXT NOT NULL,
    key             TEXT NOT NULL,      -- what the handler keeps in order
    attempts        INTEGER NOT NULL,
    due_at          TEXT,               -- of those that are retrying
    first_error     TEXT,
    last_error      TEXT,
    first_failed_at TEXT,
    last_failed_at  TEXT,
    unpublished     INTEGER NOT NULL DEFAULT 0,  -- to its dead-letter destination
    redrive         INTEGER,            -- the redrive that has taken it up
    PRIMARY KEY (handler, position)
) STRICT, WITHOUT ROWID;

-- What waits behind a key, and its dead letters.
CREATE INDEX unfinished_key ON unfinished (handler, key, state, position);
CREATE INDEX unfinished_dead ON unfinished (handler, position) WHERE state = 'dead';
CREATE INDEX unfinished_dead_type ON unfinished (handler, type, position) WHERE state = 'dead';
CREATE INDEX unfinished_unpublished ON unfinished (handler, position) WHERE unpublished;
-- What redrives have left, for each redrive and for each handler.
CREATE INDEX unfinished_redrive ON unfinished (redrive, handler, position)
    WHERE redrive IS NOT NULL;
CREATE INDEX unfinished_redriven ON unfinished (handler, position) WHERE redrive IS NOT NULL;

-- What earlier versions called a dead letter is one still, under its old name as well.
INSERT INTO unfinished (handler, position, state, id, type, key, attempts, first_error,
    last_error, first_failed_at, last_failed_at)
SELECT handler, position, 'dead', id, type, key, attempts, first_error, last_error,
    first_failed_at, last_failed_at
FROM dead_letters;
DROP TABLE dead_letters;
CREATE VIEW dead_letters AS
SELECT handler, position, id, type, key, attempts, first_error, last_error, first_failed_at,
    last_failed_at
FROM unfinished WHERE state = 'dead';

-- Jobs that take up dead letters or quarantine entries.
CREATE TABLE redrives (
    number          INTEGER PRIMARY KEY AUTOINCREMENT,
    subject         TEXT NOT NULL CHECK (subject IN ('dead-letters', 'quarantine')),
    action          TEXT NOT NULL CHECK (action IN ('retry', 'discard')),
    filter          TEXT NOT NULL,      -- JSON
    rate            INTEGER,            -- so many a second at most
    requested_by    TEXT NOT NULL,
    reason          TEXT,
    state           TEXT NOT NULL CHECK (state IN ('running', 'done', 'cancelled')),
    total           INTEGER NOT NULL,   -- how many it has taken up
    left_over       INTEGER NOT NULL DEFAULT 0,  -- of these, when it was cancelled
    started_at      TEXT NOT NULL,
    ended_at        TEXT
) STRICT;
CREATE INDEX redrives_running ON redrives (number) WHERE state = 'running';

-- What persons did.
CREATE TABLE audit (
    number          INTEGER PRIMARY KEY AUTOINCREMENT,
    at              TEXT NOT NULL,
    requested_by    TEXT NOT NULL,
    action          TEXT NOT NULL,
    subject         TEXT NOT NULL,
    detail          TEXT NOT NULL       -- JSON
) STRICT;

ALTER TABLE quarantine ADD COLUMN redrive INTEGER;  -- the redrive that has taken it up
CREATE INDEX quarantine_redrive ON quarantine (redrive, number) WHERE redrive IS NOT NULL;
-- The entries themselves are large: this has all that is asked of it.
CREATE INDEX quarantine_redriven ON quarantine (number, redrive) WHERE redrive IS NOT NULL;
