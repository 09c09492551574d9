-- The log may begin behind its first event: `removed` is the last position that is gone, and
-- `bytes` how large the events are that are left. Both move in the transaction that appends or
-- removes.
ALTER TABLE log_head ADD COLUMN removed INTEGER NOT NULL DEFAULT 0;
ALTER TABLE log_head ADD COLUMN bytes INTEGER NOT NULL DEFAULT 0;
UPDATE log_head SET bytes = (
    SELECT coalesce(sum(octet_length(source) + octet_length(id) + octet_length(type)
        + octet_length(coalesce(subject, '')) + octet_length(key) + octet_length(body)
        + octet_length(headers) + octet_length(origin)), 0)
    FROM events);

-- What is left of events that are gone, so that their copies are known.
CREATE TABLE removed_identities (
    identity    BLOB PRIMARY KEY,          -- the first half of SHA-256 of source and id
    position    INTEGER NOT NULL,          -- where it was
    content     INTEGER NOT NULL           -- eight bytes of SHA-256 of type and data
) STRICT, WITHOUT ROWID;
