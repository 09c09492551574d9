//! The version of SQLite, and that of the tables.

use std::path::Path;

use sqlx::{
    SqlSafeStr as _, SqliteConnection,
    migrate::{MigrateError, Migration, MigrationType, Migrator},
};

use super::error::opening;
use crate::store::StoreError;

/// The first version without the WAL-reset corruption of 3.7.0 to 3.51.2.
const OLDEST: (u32, u32, u32) = (3, 51, 3);

pub(super) fn check_version(version: &str) -> Result<(), StoreError> {
    let mut parts = version.split('.').map(|part| part.parse::<u32>().unwrap_or(0));
    let mut part = || parts.next().unwrap_or(0);
    if (part(), part(), part()) < OLDEST {
        let (major, minor, patch) = OLDEST;
        return Err(StoreError::misconfigured(format_args!(
            "this build is linked with SQLite {version}, which can corrupt a file in WAL mode: \
             build with SQLite {major}.{minor}.{patch} or newer"
        )));
    }
    Ok(())
}

/// The table that says which of [`migrator`]'s steps a file has.
pub(super) const MIGRATIONS: &str = "pulsebus_migrations";

pub(super) fn migrator() -> Migrator {
    let migration = |version, name: &'static str, sql: &'static str| {
        Migration::new(version, name.into(), MigrationType::Simple, sql.into_sql_str(), false)
    };
    let mut migrator = Migrator::with_migrations(vec![
        migration(1, "log", include_str!("../migrations/sqlite/0001_log.sql")),
        migration(2, "dead letters", include_str!("../migrations/sqlite/0002_dead_letters.sql")),
        migration(3, "progress", include_str!("../migrations/sqlite/0003_progress.sql")),
        migration(4, "retain", include_str!("../migrations/sqlite/0004_retain.sql")),
    ]);
    migrator.dangerous_set_table_name(MIGRATIONS);
    migrator
}

pub(super) async fn migrate(
    connection: &mut SqliteConnection,
    file: &Path,
) -> Result<(), StoreError> {
    let migrator = migrator();
    let mut tries = 0;
    loop {
        tries += 1;
        let error = match migrator.run_direct(None, connection, false).await {
            Ok(()) => return Ok(()),
            Err(error) => error,
        };
        let path = file.display();
        return Err(match error {
            MigrateError::VersionMissing(version) => StoreError::misconfigured(format_args!(
                "{path} has schema version {version}, which this pulsebus does not know: run the \
                 newer version that wrote it, or choose another file"
            )),
            MigrateError::VersionMismatch(version) => StoreError::misconfigured(format_args!(
                "{path} has a schema version {version} that is not this program's: choose \
                 another file"
            )),
            // Another process may be creating the tables at this moment; SQLite has no lock
            // that spans migrations.
            MigrateError::Execute(_) | MigrateError::ExecuteMigration(..) if tries < 3 => continue,
            MigrateError::Execute(error) => opening(&error, file),
            MigrateError::ExecuteMigration(sqlx::Error::Database(error), version)
                if error.code().as_deref() == Some("1") =>
            {
                StoreError::misconfigured(format_args!(
                    "cannot bring {path} to schema version {version}: {error}; is it another \
                     program's file?"
                ))
            }
            MigrateError::ExecuteMigration(error, _) => opening(&error, file),
            error => StoreError::misconfigured(format_args!("{path}: {error}")),
        });
    }
}
