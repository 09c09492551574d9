-- A handler's row is its lease and its fence: one process has it until `expires_at`, by the clock
-- of the database, and what it has done is written under the epoch of the last claim only.
ALTER TABLE cursors
    ADD COLUMN epoch bigint NOT NULL DEFAULT 0,
    ADD COLUMN write bigint NOT NULL DEFAULT 0,         -- the last one under the epoch
    ADD COLUMN owner text,                              -- the process that has it
    ADD COLUMN expires_at timestamptz,
    ADD COLUMN paused boolean NOT NULL DEFAULT false;   -- a person has stopped it

-- Each epoch is given once, also when a handler is forgotten and comes back.
CREATE SEQUENCE epochs;

-- Events at or below a handler's cursor that it has not finished.
CREATE TABLE unfinished (
    handler         text NOT NULL,
    position        bigint NOT NULL,
    state           text NOT NULL CHECK (state IN ('retrying', 'parked', 'dead')),
    id              text NOT NULL,
    type            text NOT NULL,
    key             text NOT NULL,      -- what the handler keeps in order
    attempts        bigint NOT NULL,
    due_at          timestamptz,        -- of those that are retrying
    first_error     text,
    last_error      text,
    first_failed_at timestamptz,
    last_failed_at  timestamptz,
    unpublished     boolean NOT NULL DEFAULT false,  -- to its dead-letter destination
    redrive         bigint,             -- the redrive that has taken it up
    PRIMARY KEY (handler, position)
);

-- What waits behind a key, and its dead letters. Keys and types may be longer than an index
-- entry: the beginning of them is enough to find them.
CREATE INDEX unfinished_key ON unfinished (handler, left(key, 200), state, position);
CREATE INDEX unfinished_dead ON unfinished (handler, position) INCLUDE (redrive)
    WHERE state = 'dead';
CREATE INDEX unfinished_dead_type ON unfinished (handler, left(type, 200), position)
    WHERE state = 'dead';
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
    number          bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    subject         text NOT NULL CHECK (subject IN ('dead-letters', 'quarantine')),
    action          text NOT NULL CHECK (action IN ('retry', 'discard')),
    filter          json NOT NULL,
    rate            bigint,             -- so many a second at most
    requested_by    text NOT NULL,
    reason          text,
    state           text NOT NULL CHECK (state IN ('running', 'done', 'cancelled')),
    total           bigint NOT NULL,    -- how many it has taken up
    left_over       bigint NOT NULL DEFAULT 0,  -- of these, when it was cancelled
    started_at      timestamptz NOT NULL,
    ended_at        timestamptz
);
CREATE INDEX redrives_running ON redrives (number) WHERE state = 'running';

-- What persons did.
CREATE TABLE audit (
    number          bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at              timestamptz NOT NULL,
    requested_by    text NOT NULL,
    action          text NOT NULL,
    subject         text NOT NULL,
    detail          json NOT NULL
);

ALTER TABLE quarantine ADD COLUMN redrive bigint;   -- the redrive that has taken it up
CREATE INDEX quarantine_redrive ON quarantine (redrive, number) WHERE redrive IS NOT NULL;
CREATE INDEX quarantine_redriven ON quarantine (number, redrive) WHERE redrive IS NOT NULL;
