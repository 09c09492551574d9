//! How far the tables of a database are, compared with what this program knows. For `doctor`.

use sqlx::migrate::Migrator;

/// A step that a database says it has taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Applied {
    pub(crate) version: i64,
    pub(crate) success: bool,
    pub(crate) checksum: Vec<u8>,
}

/// What the steps taken mean.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Schema {
    /// They are this program's.
    Current,
    /// Some are to come; `run` takes them at its start.
    Behind { at: i64, of: i64 },
    /// A newer program has taken one that this one does not know.
    Newer(i64),
    /// One of that number was another one.
    Other(i64),
    /// One was begun and not finished.
    Halfway(i64),
}

pub(crate) fn judge(migrator: &Migrator, applied: &[Applied]) -> Schema {
    if let Some(step) = applied.iter().find(|step| !step.success) {
        return Schema::Halfway(step.version);
    }
    for step in applied {
        match migrator.iter().find(|known| known.version == step.version) {
            None => return Schema::Newer(step.version),
            Some(known) if *known.checksum != *step.checksum => return Schema::Other(step.version),
            Some(_) => {}
        }
    }
    let of = migrator.iter().map(|known| known.version).max().unwrap_or(0);
    let at = applied.iter().map(|step| step.version).max().unwrap_or(0);
    if at < of { Schema::Behind { at, of } } else { Schema::Current }
}

#[cfg(test)]
mod tests {
    use sqlx::{
        SqlSafeStr as _,
        migrate::{Migration, MigrationType},
    };

    use super::*;

    #[test]
    fn steps_are_compared_with_those_that_are_known() {
        let migration = |version, sql: &'static str| {
            Migration::new(version, "x".into(), MigrationType::Simple, sql.into_sql_str(), false)
        };
        let known = Migrator::with_migrations(vec![migration(1, "one"), migration(2, "two")]);
        let step = |version, sql: &'static str| Applied {
            version,
            success: true,
            checksum: migration(version, sql).checksum.into_owned(),
        };
        let judge = |steps: &[Applied]| judge(&known, steps);
        assert_eq!(judge(&[]), Schema::Behind { at: 0, of: 2 });
        assert_eq!(judge(&[step(1, "one")]), Schema::Behind { at: 1, of: 2 });
        assert_eq!(judge(&[step(1, "one"), step(2, "two")]), Schema::Current);
        assert_eq!(judge(&[step(1, "one"), step(2, "2")]), Schema::Other(2));
        assert_eq!(judge(&[step(1, "one"), step(2, "two"), step(3, "x")]), Schema::Newer(3));
        let halfway = Applied { success: false, ..step(2, "two") };
        assert_eq!(judge(&[step(1, "one"), halfway]), Schema::Halfway(2));
    }
}
