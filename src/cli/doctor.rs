//! `doctor`: would the brokers, the store and the targets, as they are, lose or hold up events?

use std::process::ExitCode;

use pulsebus::doctor::{self, Report, Severity};

use super::{FAILED, Failure, SettingsArgs, output};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Prints `{"ok": …, "examined": […], "findings": [{"severity", "subject", "check", "what",
    /// "why", "mend"}]}`
    #[arg(long)]
    json: bool,
    /// Fails on warnings too, not only on errors
    #[arg(long)]
    strict: bool,
}

pub(super) async fn run(settings: &SettingsArgs, args: &Args) -> Result<ExitCode, Failure> {
    let loaded = settings.load()?;
    let report = doctor::examine(&loaded.settings).await;
    let limit = if args.strict { Severity::Warning } else { Severity::Error };
    let ok = report.worst().is_none_or(|worst| worst < limit);
    if args.json {
        let answer = serde_json::json!({
            "ok": ok,
            "examined": report.examined,
            "findings": report.findings,
        });
        output::print(&answer.to_string())?;
    } else {
        output::print(&text(&report))?;
    }
    Ok(if ok { ExitCode::SUCCESS } else { ExitCode::from(FAILED) })
}

fn text(report: &Report) -> String {
    let mut text = String::new();
    for finding in &report.findings {
        text.push_str(&format!(
            "{}: {}: {}\n  why:  {}\n  mend: {}\n\n",
            finding.severity.as_str(),
            output::harmless(&finding.subject),
            output::harmless(&finding.what),
            output::harmless(&finding.why),
            output::harmless(&finding.mend),
        ));
    }
    let count = |severity| {
        let count = report.findings.iter().filter(|finding| finding.severity == severity).count();
        format!("{count} {}{}", severity.as_str(), if count == 1 { "" } else { "s" })
    };
    text.push_str(&format!(
        "looked at {}: {}, {}, {}",
        report.examined.join(", "),
        count(Severity::Error),
        count(Severity::Warning),
        count(Severity::Note),
    ));
    text
}

#[cfg(test)]
mod tests {
    use pulsebus::doctor::Finding;

    use super::*;

    #[test]
    fn a_finding_says_what_why_and_how_to_mend_it() {
        let mut report = Report::default();
        report.add("system", Vec::new());
        let finding = Finding {
            severity: Severity::Error,
            subject: "source:x".to_owned(),
            check: "x",
            what: "the queue is transient".to_owned(),
            why: "it is gone after a restart".to_owned(),
            mend: "declare it durable\u{1b}[2J".to_owned(),
        };
        report.add("source:x", vec![finding]);
        assert_eq!(
            text(&report),
            "error: source:x: the queue is transient\n  why:  it is gone after a restart\n  \
             mend: declare it durable\u{fffd}[2J\n\nlooked at system, source:x: 1 error, \
             0 warnings, 0 notes"
        );
    }
}
