//! `doctor`: would the brokers, the store and the targets, as they are, lose or hold up events?

use std::{
    io::{self, IsTerminal as _},
    path::PathBuf,
    process::ExitCode,
    time::Duration,
};

use pulsebus::{
    config::Settings,
    doctor::{
        self, Report, Severity,
        daemon::{self, Answers, Daemon},
    },
    tls::TlsOptions,
};
use reqwest::StatusCode;

use super::{
    FAILED, Failure, SettingsArgs,
    client::{Client, RequestError},
    output,
};

/// How long the daemon may take to answer all of it.
const PATIENCE: Duration = Duration::from_secs(15);

/// Columns where nobody says how many there are.
const WIDTH: usize = 80;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Prints `{"ok": …, "examined": […], "findings": [{"severity", "subject", "check", "what",
    /// "why", "mend"}]}`
    #[arg(long)]
    json: bool,
    /// Fails on warnings too, not only on errors
    #[arg(long)]
    strict: bool,
    /// The certificate of the authority that signed the daemon's, for https, where it is none of
    /// the system's
    #[arg(long, value_name = "FILE", env = "PULSEBUS_CA_FILE")]
    ca_file: Option<PathBuf>,
    /// A client certificate, where the daemon wants one (http.tls.client_ca_file)
    #[arg(long, value_name = "FILE", env = "PULSEBUS_CERT_FILE", requires = "key_file")]
    cert_file: Option<PathBuf>,
    /// Its private key
    #[arg(long, value_name = "FILE", env = "PULSEBUS_KEY_FILE", requires = "cert_file")]
    key_file: Option<PathBuf>,
}

pub(super) async fn run(settings: &SettingsArgs, args: &Args) -> Result<ExitCode, Failure> {
    let loaded = settings.load()?;
    let settings = &loaded.settings;
    let tls = TlsOptions {
        ca_file: args.ca_file.clone(),
        cert_file: args.cert_file.clone(),
        key_file: args.key_file.clone(),
        first: false,
    };
    let (mut report, daemon) = tokio::join!(doctor::examine(settings), ask(settings, &tls));
    if let Some(daemon) = daemon {
        report.add(daemon::DAEMON, daemon::judge(settings, &daemon));
    }
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
        output::print(&text(&report, Style::of_stdout()))?;
    }
    Ok(if ok { ExitCode::SUCCESS } else { ExitCode::from(FAILED) })
}

/// Asks the daemon of this configuration how it is; `None` where it has no HTTP server.
async fn ask(settings: &Settings, tls: &TlsOptions) -> Option<Daemon> {
    if !settings.http.enabled {
        return None;
    }
    Some(match tokio::time::timeout(PATIENCE, answers(settings, tls)).await {
        Ok(Ok(answers)) => Daemon::Answered(answers),
        Ok(Err(daemon)) => daemon,
        Err(_) => Daemon::Strange(format!("no answer within {PATIENCE:?}")),
    })
}

async fn answers(settings: &Settings, tls: &TlsOptions) -> Result<Answers, Daemon> {
    let client =
        Client::of(settings, tls).map_err(|error| Daemon::Refused(format!("{error:#}")))?;
    let get = async |path: &[&str], query: &[(&str, String)]| {
        client.answer(path, query).await.map_err(|error| match &error {
            RequestError::Away { reason, reached: true, .. } => Daemon::Strange(reason.clone()),
            RequestError::Away { reason, .. } => Daemon::Absent(reason.clone()),
            RequestError::Tls { reason, .. } => Daemon::Untrusted(reason.clone()),
            RequestError::Refused { .. } => Daemon::Refused(error.to_string()),
            RequestError::Strange { error, .. } => Daemon::Strange(error.to_string()),
        })
    };
    let (_, readiness) = get(&["readyz"], &[]).await?;
    if !readiness["ready"].is_boolean() {
        return Err(Daemon::Strange("it has no /readyz as pulsebus has".to_owned()));
    }
    let (status, handlers) = get(&["v1", "handlers"], &[]).await?;
    if matches!(status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) {
        let detail = handlers["detail"].as_str().or(handlers["title"].as_str());
        return Err(Daemon::Refused(detail.unwrap_or("it wants another token").to_owned()));
    }
    let limit = [("limit", daemon::QUARANTINE_LIMIT.to_string())];
    let (_, quarantine) = get(&["v1", "quarantine"], &limit).await?;
    Ok(Answers { readiness, handlers, quarantine })
}

/// How the report is laid out.
#[derive(Debug, Clone, Copy)]
struct Style {
    colour: bool,
    /// Lines break here; `None`: nowhere, as whoever reads from a pipe wants it.
    width: Option<usize>,
}

impl Style {
    const PLAIN: Self = Self { colour: false, width: None };

    fn of_stdout() -> Self {
        if !io::stdout().is_terminal() {
            return Self::PLAIN;
        }
        // no-color.org: set and not empty.
        let colour = std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        let columns = std::env::var("COLUMNS").ok().and_then(|columns| columns.parse().ok());
        Self { colour, width: Some(columns.unwrap_or(WIDTH).max(40)) }
    }

    fn severity(self, severity: Severity) -> String {
        let code = match severity {
            Severity::Error => "1;31",
            Severity::Warning => "1;33",
            Severity::Note => "1;36",
        };
        let word = severity.as_str();
        if self.colour { format!("\u{1b}[{code}m{word}\u{1b}[0m") } else { word.to_owned() }
    }

    /// Adds text behind what is `used` of the line already; further lines begin with `indent`
    /// blanks.
    fn wrap(self, into: &mut String, text: &str, used: usize, indent: usize) {
        let text = output::harmless(text);
        let Some(width) = self.width else {
            into.push_str(&text);
            return;
        };
        let mut column = used;
        for (nth, word) in text.split(' ').enumerate() {
            let length = word.chars().count();
            if nth > 0 {
                if column + 1 + length > width {
                    into.push('\n');
                    into.extend(std::iter::repeat_n(' ', indent));
                    column = indent;
                } else {
                    into.push(' ');
                    column += 1;
                }
            }
            into.push_str(word);
            column += length;
        }
    }
}

fn text(report: &Report, style: Style) -> String {
    let mut text = String::new();
    for finding in &report.findings {
        let head =
            format!("{}: {} [{}]: ", finding.severity.as_str(), finding.subject, finding.check);
        text.push_str(&style.severity(finding.severity));
        text.push_str(&output::harmless(&head[finding.severity.as_str().len()..]));
        style.wrap(&mut text, &finding.what, head.chars().count(), 2);
        for (name, said) in [("why:  ", &finding.why), ("mend: ", &finding.mend)] {
            text.push_str("\n  ");
            text.push_str(name);
            style.wrap(&mut text, said, 8, 8);
        }
        text.push_str("\n\n");
    }
    let count = |severity| {
        let count = report.findings.iter().filter(|finding| finding.severity == severity).count();
        format!("{count} {}{}", severity.as_str(), if count == 1 { "" } else { "s" })
    };
    let summary = format!(
        "looked at {}: {}, {}, {}",
        report.examined.join(", "),
        count(Severity::Error),
        count(Severity::Warning),
        count(Severity::Note),
    );
    style.wrap(&mut text, &summary, 0, 0);
    text
}

#[cfg(test)]
mod tests {
    use pulsebus::doctor::Finding;

    use super::*;

    fn report() -> Report {
        let mut report = Report::default();
        report.add("system", Vec::new());
        let finding = Finding {
            severity: Severity::Error,
            subject: "source:x".to_owned(),
            check: "x-durable",
            what: "the queue is transient".to_owned(),
            why: "it is gone after a restart".to_owned(),
            mend: "declare it durable\u{1b}[2J".to_owned(),
        };
        report.add("source:x", vec![finding]);
        report
    }

    #[test]
    fn a_finding_says_what_why_and_how_to_mend_it() {
        assert_eq!(
            text(&report(), Style::PLAIN),
            "error: source:x [x-durable]: the queue is transient\n  why:  it is gone after a \
             restart\n  mend: declare it durable\u{fffd}[2J\n\nlooked at system, source:x: 1 \
             error, 0 warnings, 0 notes"
        );
    }

    #[test]
    fn on_a_terminal_it_has_colour_and_fits() {
        let shown = text(&report(), Style { colour: true, width: Some(40) });
        assert_eq!(
            shown,
            "\u{1b}[1;31merror\u{1b}[0m: source:x [x-durable]: the queue\n  is transient\n  \
             why:  it is gone after a restart\n  mend: declare it durable\u{fffd}[2J\n\nlooked at \
             system, source:x: 1 error, 0\nwarnings, 0 notes"
        );
    }

    #[test]
    fn the_worst_comes_first() {
        let mut report = report();
        let note = Finding { severity: Severity::Note, ..report.findings[0].clone() };
        let warning = Finding { severity: Severity::Warning, ..note.clone() };
        report.add("a", vec![note, warning]);
        let order: Vec<_> = report.findings.iter().map(|finding| finding.severity).collect();
        assert_eq!(order, [Severity::Error, Severity::Warning, Severity::Note]);
    }
}
