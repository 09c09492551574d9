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
    received: u64,
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
            source.received.to_string(),
            source.reason.unwrap_or_default(),
        ]);
    }
    output::print(&output::table(["NAME", "TRANSPORT", "STATE", "RECEIVED", "REASON"], &rows))?;
    Ok(())
}
