-- Events a handler could not handle, until a person retries or discards them.
CREATE TABLE dead_letters (
    number          bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    handler         text NOT NULL,
    position        bigint NOT NULL,
    id              text NOT NULL,
    type            text NOT NULL,
    key             text NOT NULL,      -- what the handler keeps in order
    attempts        bigint NOT NULL,
    first_error     text NOT NULL,
    last_error      text NOT NULL,
    first_failed_at timestamptz NOT NULL,
    last_failed_at  timestamptz NOT NULL,
    UNIQUE (handler, position)
);
