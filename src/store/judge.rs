//! What is judged alike in every database: its tables, and the end of the log.

use super::schema::Schema;
use crate::finding::{Finding, STORE, Severity};

/// What the version of the tables means.
pub(crate) fn schema(check: &'static str, place: &str, schema: &Schema) -> Option<Finding> {
    let (severity, what, why, mend) = match schema {
        Schema::Current => return None,
        Schema::Behind { at: 0, .. } => (
            Severity::Note,
            format!("{place} has no tables yet"),
            "the daemon makes them at its first start",
            "start the daemon; nothing else is to be done",
        ),
        Schema::Behind { at, of } => (
            Severity::Note,
            format!("{place} has schema version {at}, and this program's is {of}"),
            "the daemon changes the tables at its next start; an older program does not run \
             with them then",
            "make a backup, then start the daemon",
        ),
        Schema::Newer(version) => (
            Severity::Error,
            format!("{place} has schema version {version}, which this program does not know"),
            "a newer pulsebus has changed the tables: this one does not start",
            "run the newer pulsebus, or restore the backup from before it ran",
        ),
        Schema::Other(version) => (
            Severity::Error,
            format!("{place} has a schema version {version} that is not this program's"),
            "the tables are those of a build that was never released, or of another program: \
             this one does not start",
            "choose another database, or run the program that made it",
        ),
        Schema::Halfway(version) => (
            Severity::Error,
            format!("{place} was changed to schema version {version} only in part"),
            "the daemon does not start",
            "restore the backup from before the upgrade, then start the daemon again",
        ),
    };
    Some(Finding::of(severity, STORE, check, what, why, mend))
}

/// What the end of the log means: its head, its last row, and the cursors beyond it.
pub(crate) fn log(head: i64, last: Option<i64>, beyond: Option<&str>) -> Vec<Finding> {
    let mut findings = Vec::new();
    if let Some(last) = last.filter(|last| *last != head) {
        findings.push(Finding::of(
            Severity::Error,
            STORE,
            "store-head",
            format!("log_head says that the log ends at {head}, and its last event is {last}"),
            "the next append fails, or leaves a gap that no handler reads past",
            "the tables were changed by hand or restored in part: restore all of them from one \
             backup",
        ));
    }
    if let Some(beyond) = beyond {
        findings.push(Finding::of(
            Severity::Error,
            STORE,
            "store-cursor",
            format!("the log ends at {head}, and cursors are beyond that: {beyond}"),
            "the log has lost its end, or is another one: these handlers do not run, since they \
             would skip what is written there next",
            format!(
                "restore what is missing; or accept the loss, with the daemon stopped: UPDATE \
                 cursors SET position = {head} WHERE position > {head}; and remove the index of a \
                 search handler that is among them"
            ),
        ));
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_log_must_fit() {
        assert_eq!(log(0, None, None), []);
        assert_eq!(log(7, Some(7), None), []);
        assert_eq!(log(7, None, None), [], "what is old may have been removed");
        assert_eq!(log(7, Some(8), None)[0].check, "store-head");
        assert_eq!(log(7, Some(6), None)[0].check, "store-head");
        assert_eq!(log(7, Some(7), Some("x (9)"))[0].check, "store-cursor");
    }
}
