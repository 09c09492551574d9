//! The event log's database. What is particular to a database is judged beside its store.

use super::{Finding, Report, Severity};
use crate::{
    config::{Settings, StoreSettings},
    finding::STORE,
    store::{
        postgres::{self, PostgresOptions},
        sqlite,
    },
};

pub(super) async fn examine(settings: &Settings) -> Report {
    let findings = match &settings.store {
        StoreSettings::Memory => vec![Finding::of(
            Severity::Warning,
            STORE,
            "store-memory",
            "the log is in memory (store.url = \"memory:\")",
            "every event that was acknowledged, and every cursor, is gone when the daemon ends",
            "set store.url to \"sqlite:events.db\" or to a Postgres database",
        )],
        StoreSettings::Sqlite { path } => sqlite::doctor::examine(path).await,
        StoreSettings::Postgres { url, max_connections, tls } => {
            postgres::doctor::examine(&PostgresOptions {
                max_connections: *max_connections,
                tls: tls.clone(),
                ..PostgresOptions::new(url.clone())
            })
            .await
        }
    };
    let mut report = Report::default();
    report.add(STORE, findings);
    report
}
