-- Events a handler could not handle, until a person retries or discards them.
CREATE TABLE dead_letters (
    number          INTEGER PRIMARY KEY AUTOINCREMENT,
    handler         TEXT NOT NULL,
    position        INTEGER NOT NULL,
    id              TEXT NOT NULL,
    type            TEXT NOT NULL,
    key             TEXT NOT NULL,      -- what the handler keeps in order
    attempts        INTEGER NOT NULL,
    first_error     TEXT NOT NULL,
    last_error      TEXT NOT NULL,
    first_failed_at TEXT NOT NULL,
    last_failed_at  TEXT NOT NULL,
    UNIQUE (handler, position)
) STRICT;
