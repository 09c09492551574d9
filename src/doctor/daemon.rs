//! A running daemon, judged by its answers.
//!
//! Asking is left to the caller, who has the address and the token; the command `doctor` asks
//! the daemon that the configuration means.

use serde_json::Value;

use super::{Finding, Severity};
use crate::{
    config::{HandlerKind, Settings},
    handler::search,
};

/// The subject of what the daemon as a whole is like.
pub const DAEMON: &str = "daemon";

/// How many quarantine entries [`Answers::quarantine`] should be asked for.
pub const QUARANTINE_LIMIT: usize = 100;

/// A handler further behind than this is worth a note.
const LARGE_LAG: u64 = 100_000;

/// What the daemon said.
#[derive(Debug, Clone)]
pub enum Daemon {
    /// Nobody answers where it should be, for this reason.
    Absent(String),
    /// There is no TLS with it, for this reason.
    Untrusted(String),
    /// It does not let us ask, for this reason.
    Refused(String),
    /// Somebody answers, and not as pulsebus does.
    Strange(String),
    /// Its answers.
    Answered(Answers),
}

/// The bodies of a daemon's answers; [`Value::Null`] where there was none.
#[derive(Debug, Clone, Default)]
pub struct Answers {
    /// Of `GET /readyz`.
    pub readiness: Value,
    /// Of `GET /v1/handlers`.
    pub handlers: Value,
    /// Of `GET /v1/quarantine`, with [`QUARANTINE_LIMIT`].
    pub quarantine: Value,
}

/// Everything that is wrong with the daemon.
#[must_use]
pub fn judge(settings: &Settings, daemon: &Daemon) -> Vec<Finding> {
    let listen = settings.http.listen;
    match daemon {
        Daemon::Absent(reason) => {
            let mut findings = vec![Finding::of(
                Severity::Note,
                DAEMON,
                "daemon-absent",
                format!("no daemon answers at {listen}: {reason}"),
                "what only a running daemon knows (states, dead letters, quarantine) was not \
                 looked at",
                "start it (pulsebus run) where it should be running",
            )];
            findings.extend(held_indexes(settings));
            findings
        }
        Daemon::Untrusted(reason) => vec![Finding::of(
            Severity::Note,
            DAEMON,
            "daemon-tls",
            format!("the daemon at {listen} could not be asked: {reason}"),
            "what only a running daemon knows (states, dead letters, quarantine) was not looked at",
            "name its authority with --ca-file, and where it wants one a client certificate with \
             --cert-file and --key-file",
        )],
        Daemon::Refused(reason) => vec![Finding::of(
            Severity::Warning,
            DAEMON,
            "daemon-refused",
            format!("the daemon at {listen} does not answer doctor: {reason}"),
            "it was started with another token or certificate than the configuration names now, \
             and what it knows was not looked at",
            "restart the daemon, or run doctor with its configuration, as a user who may read \
             its token",
        )],
        Daemon::Strange(reason) => vec![Finding::of(
            Severity::Error,
            DAEMON,
            "daemon-strange",
            format!("what answers at {listen} is not pulsebus: {reason}"),
            "the daemon cannot listen there, and ends at its start",
            "set http.listen to a free port, or end the other program",
        )],
        Daemon::Answered(answers) => answered(answers),
    }
}

/// Indexes that somebody has open, though no daemon answers.
fn held_indexes(settings: &Settings) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (name, handler) in &settings.handlers {
        let HandlerKind::Search(options) = &handler.kind else { continue };
        if search::doctor::is_open(options) {
            findings.push(Finding::of(
                Severity::Warning,
                &format!("handler:{name}"),
                "search-locked",
                format!("another process has the index in {} open", options.path.display()),
                "no daemon answers at http.listen, and one that starts waits for this index",
                "end the other process (fuser on the file named lock there), or give this \
                 handler a path of its own",
            ));
        }
    }
    findings
}

fn answered(answers: &Answers) -> Vec<Finding> {
    let mut findings = Vec::new();
    let components = answers.readiness["components"].as_array();
    for component in components.into_iter().flatten() {
        findings.extend(self::component(component));
    }
    if let Some(version) = answers.readiness["version"].as_str()
        && version != env!("CARGO_PKG_VERSION")
    {
        findings.push(Finding::of(
            Severity::Note,
            DAEMON,
            "daemon-version",
            format!("the daemon is version {version}, doctor is {}", env!("CARGO_PKG_VERSION")),
            "it was not restarted after an upgrade, or another program than the daemon's was \
             asked",
            "restart the daemon",
        ));
    }
    for handler in answers.handlers["handlers"].as_array().into_iter().flatten() {
        findings.extend(self::handler(handler));
    }
    let held = answers.quarantine["quarantine"].as_array().map_or(0, Vec::len);
    if held > 0 {
        let more = if answers.quarantine["next"].is_null() { "" } else { " or more" };
        findings.push(Finding::of(
            Severity::Warning,
            DAEMON,
            "daemon-quarantine",
            format!("{held}{more} messages are in quarantine"),
            "they were acknowledged and are not in the log: no handler gets them",
            "pulsebus quarantine list says why; when that is mended, pulsebus quarantine retry, \
             else discard",
        ));
    }
    findings
}

/// A part of it that is not ready.
fn component(component: &Value) -> Option<Finding> {
    let name = component["component"].as_str()?;
    let state = component["state"].as_str().unwrap_or("unknown");
    let severity = match component["health"].as_str()? {
        "not_ready" => Severity::Error,
        // Dead letters are told as such, and a rebuild is what somebody asked for.
        "degraded" if matches!(state, "running" | "rebuilding") => return None,
        "degraded" => Severity::Warning,
        _ => return None,
    };
    let reason = component["reason"].as_str().unwrap_or("no reason is given");
    let mend = match state {
        "paused" if name.starts_with("handler:") => {
            format!("pulsebus handlers resume {}", name.trim_start_matches("handler:"))
        }
        "starting" => "wait a moment and look again; the daemon's log says what it does".to_owned(),
        _ => "see to what the reason names; it goes on by itself, unless it says otherwise"
            .to_owned(),
    };
    Some(Finding::of(
        severity,
        name,
        "daemon-component",
        format!("in the running daemon it is {state}: {reason}"),
        if severity == Severity::Error {
            "events do not come in, or do not get on, and /readyz answers 503"
        } else {
            "its events wait; the rest of the daemon works"
        },
        mend,
    ))
}

fn handler(handler: &Value) -> Vec<Finding> {
    let mut findings = Vec::new();
    let Some(name) = handler["name"].as_str() else { return findings };
    let subject = format!("handler:{name}");
    let number = |member: &str| handler[member].as_u64().unwrap_or(0);
    let (dead, parked, lag) = (number("dead"), number("parked"), number("lag"));
    if dead > 0 {
        findings.push(Finding::of(
            Severity::Warning,
            &subject,
            "daemon-dead-letters",
            format!("{dead} dead letters, and {parked} events that wait behind failed ones"),
            "these events have not been handled and will not be until a person decides",
            format!(
                "pulsebus dead-letters list --handler {name} says why; when that is mended, \
                 pulsebus dead-letters retry --handler {name}, else discard"
            ),
        ));
    }
    if lag > LARGE_LAG {
        findings.push(Finding::of(
            Severity::Note,
            &subject,
            "daemon-lag",
            format!("it is {lag} events behind the log"),
            "it is catching up, or too slow for what comes in",
            "look again in a minute (pulsebus handlers list); if it grows, raise workers, or see \
             what its target takes so long for",
        ));
    }
    findings
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn judged(answers: &Answers) -> Vec<(String, &'static str, Severity)> {
        let found = answered(answers).into_iter();
        found.map(|finding| (finding.subject, finding.check, finding.severity)).collect()
    }

    #[test]
    fn a_daemon_that_is_well_has_no_findings() {
        let answers = Answers {
            readiness: json!({ "ready": true, "version": env!("CARGO_PKG_VERSION"), "components": [
                { "component": "store", "health": "ready", "state": "writing" },
            ] }),
            handlers: json!({ "handlers": [{ "name": "x", "dead": 0, "parked": 0, "lag": 9 }] }),
            quarantine: json!({ "quarantine": [], "next": null }),
        };
        assert_eq!(judged(&answers), []);
        // One that says nothing is no reason to say anything.
        assert_eq!(judged(&Answers::default()), []);
    }

    #[test]
    fn each_part_that_is_not_well_is_told_once() {
        let answers = Answers {
            readiness: json!({ "ready": false, "version": "0.0.1", "components": [
                { "component": "store", "health": "not_ready", "state": "waiting", "reason": "x" },
                { "component": "handler:a", "health": "degraded", "state": "paused" },
                { "component": "handler:b", "health": "degraded", "state": "running",
                  "reason": "3 dead letters" },
            ] }),
            handlers: json!({ "handlers": [
                { "name": "b", "dead": 3, "parked": 1, "lag": 200_000 },
            ] }),
            quarantine: json!({ "quarantine": [{}, {}], "next": "2" }),
        };
        let expected = [
            ("store", "daemon-component", Severity::Error),
            ("handler:a", "daemon-component", Severity::Warning),
            ("daemon", "daemon-version", Severity::Note),
            ("handler:b", "daemon-dead-letters", Severity::Warning),
            ("handler:b", "daemon-lag", Severity::Note),
            ("daemon", "daemon-quarantine", Severity::Warning),
        ];
        let expected = expected.map(|(subject, check, bad)| (subject.to_owned(), check, bad));
        assert_eq!(judged(&answers), expected);
    }
}
