//! What the errors of Postgres mean.

use sqlx::postgres::{PgConnectOptions, PgDatabaseError};

use crate::{
    store::StoreError,
    tls::{TlsOptions, explain_with, hung_up},
};

/// How the certificate of a private authority is given.
const CA: &str = "store.tls.ca_file, or as sslrootcert in the store's URL";

/// What an error says about an append.
#[derive(Debug)]
pub(super) enum Class {
    /// It is about the data.
    Refused(String),
    /// It is about the database.
    Store(StoreError),
}

/// Sorts an error by its SQLSTATE.
pub(super) fn class(error: &sqlx::Error) -> Class {
    let database = match error {
        sqlx::Error::Database(database) => database,
        sqlx::Error::Encode(error) => return Class::Refused(error.to_string()),
        sqlx::Error::ColumnDecode { .. } | sqlx::Error::Decode(_) => {
            return Class::Store(StoreError::fatal(format_args!(
                "the database answers with what no pulsebus has written: {error}"
            )));
        }
        sqlx::Error::PoolTimedOut => {
            return Class::Store(StoreError::unavailable("no connection became free in time"));
        }
        error => {
            return Class::Store(match explain_with(error, CA) {
                Some(reason) => StoreError::unavailable(reason),
                None => StoreError::unavailable(error),
            });
        }
    };
    let code = database.code().unwrap_or_default();
    let message = database.message();
    match &*code {
        // Stored as it should be, and read as something else.
        "XX001" | "XX002" => {
            Class::Store(StoreError::fatal(format_args!("{message} (SQLSTATE {code})")))
        }
        "42P01" | "42703" | "3F000" => Class::Store(StoreError::fatal(format_args!(
            "the tables are not as they were when this program started: {message}"
        ))),
        "25006" => Class::Store(StoreError::unavailable(format_args!(
            "{message}: this server is a standby or read-only, the log needs the primary"
        ))),
        "53100" => Class::Store(StoreError::unavailable(format_args!(
            "{message}: free space on the database's disk"
        ))),
        "42501" => Class::Store(StoreError::unavailable(format_args!(
            "{message}: grant it to the role in the store's URL"
        ))),
        // A constraint or trigger that somebody has added, and limits that a value exceeds.
        "42846" | "42804" | "P0001" => Class::Refused(message.to_owned()),
        code if ["22", "23", "54"].iter().any(|class| code.starts_with(class)) => {
            Class::Refused(message.to_owned())
        }
        // Connections (08), resources (53), shutdown (57P), serialisation and deadlock (40),
        // lock timeout (55P03), idle in transaction (25P03), the system (58) …
        code => Class::Store(StoreError::unavailable(format_args!("{message} (SQLSTATE {code})"))),
    }
}

/// The unique constraint that an insert has met.
pub(super) fn conflict(error: &sqlx::Error) -> Option<&str> {
    let sqlx::Error::Database(database) = error else { return None };
    let database = database.try_downcast_ref::<PgDatabaseError>()?;
    (database.code() == "23505").then(|| database.constraint()).flatten()
}

/// Where a database is, without secrets.
pub(super) fn place(options: &PgConnectOptions) -> String {
    let database = options.get_database().unwrap_or_else(|| options.get_username());
    match options.get_socket() {
        Some(socket) => format!("database {database} at {}", socket.display()),
        None => format!("database {database} at {}:{}", options.get_host(), options.get_port()),
    }
}

/// What an error means that came while connecting.
pub(super) fn opening(error: &sqlx::Error, place: &str, tls: Option<&TlsOptions>) -> StoreError {
    if let Some(reason) = explain_with(error, CA) {
        return StoreError::unavailable(format_args!("no TLS with {place}: {reason}"));
    }
    if let sqlx::Error::Database(database) = error {
        let message = database.message();
        let code = database.code().unwrap_or_default();
        if code.starts_with("28") {
            return StoreError::misconfigured(format_args!(
                "{place} refuses the login: {message}; check user and password in the store's \
                 URL, and the server's pg_hba.conf"
            ));
        }
        if code == "3D000" {
            return StoreError::misconfigured(format_args!(
                "{place}: {message}; create it with createdb, or correct the store's URL"
            ));
        }
    }
    match error {
        sqlx::Error::Configuration(error) => {
            StoreError::misconfigured(format_args!("cannot connect to {place}: {error}"))
        }
        sqlx::Error::Tls(error) if error.to_string().contains("does not support TLS") => {
            StoreError::unavailable(format_args!(
                "no TLS with {place}: the server does not speak TLS; switch it on there (ssl = on)"
            ))
        }
        sqlx::Error::Tls(error) => StoreError::unavailable(format_args!(
            "no TLS with {place}: {error}; check sslmode and sslrootcert in the store's URL"
        )),
        error => match class(error) {
            Class::Store(StoreError::Unavailable(reason) | StoreError::Misconfigured(reason)) => {
                match tls.and_then(|tls| hung_up(error, tls)) {
                    Some(hint) => StoreError::unavailable(format_args!(
                        "cannot connect to {place}: {reason}; {hint}"
                    )),
                    None => {
                        StoreError::unavailable(format_args!("cannot connect to {place}: {reason}"))
                    }
                }
            }
            Class::Store(error @ (StoreError::Fatal(_) | StoreError::Fenced(_))) => error,
            Class::Refused(reason) => {
                StoreError::misconfigured(format_args!("cannot connect to {place}: {reason}"))
            }
        },
    }
}

/// What an error means that came while bringing the schema up to date.
pub(super) fn migrating(error: &sqlx::Error, place: &str) -> StoreError {
    if let sqlx::Error::Database(database) = error {
        // Privileges, names that are taken: class 42. A standby: 25006.
        let code = database.code().unwrap_or_default();
        if code.starts_with("42") || code == "25006" {
            return StoreError::misconfigured(format_args!(
                "cannot set up the tables in {place}: {}; use a database of pulsebus's own on the \
                 primary, and a role that may create tables in it",
                database.message()
            ));
        }
    }
    opening(error, place, None)
}
