//! `sources list`.

use serde::Deserialize;
use serde_json::value::RawValue;

use super::{Failure, SettingsArgs, client::ClientArgs, events, output};

#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    /// Lists sources: whether they consume, and why not
    List(ClientArgs),
}

#[derive(Debug, Deserialize)]
struct Answer {
    sources: Vec<Box<RawValue>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Source {
    name: String,
    transport: String,
    state: String,
    since: String,
    received: u64,
    held: u64,
    oldest_held_seconds: Option<f64>,
    pending: Option<u64>,
    last_received_at: Option<String>,
    reconnects: u64,
    reason: Option<String>,
}

pub(super) async fn run(settings: &SettingsArgs, command: Command) -> Result<(), Failure> {
    let Command::List(args) = command;
    let client = args.client(settings)?;
    let answer: Answer = client.get(&["v1", "sources"], &[]).await?;
    if args.json {
        output::print_json(answer.sources.iter().map(|source| &**source))?;
        return Ok(());
    }
    let mut rows = Vec::new();
    for source in &answer.sources {
        let source: Source = events::parse(source)?;
        rows.push([
            source.name,
            source.transport,
            source.state,
            output::seconds_since(&source.since).map(output::span).unwrap_or_default(),
            source.received.to_string(),
            source
                .last_received_at
                .and_then(|at| output::seconds_since(&at))
                .map(|ago| format!("{} ago", output::span(ago)))
                .unwrap_or_default(),
            match source.oldest_held_seconds {
                Some(seconds) => format!("{} for {}", source.held, output::span(seconds)),
                None => source.held.to_string(),
            },
            source.pending.map(|pending| pending.to_string()).unwrap_or_default(),
            source.reconnects.to_string(),
            source.reason.unwrap_or_default(),
        ]);
    }
    let headings = [
        "NAME",
        "TRANSPORT",
        "STATE",
        "FOR",
        "RECEIVED",
        "LAST",
        "HELD",
        "PENDING",
        "LOST",
        "REASON",
    ];
    output::fit(headings, &mut rows);
    output::print(&output::table(headings, &rows))?;
    Ok(())
}
