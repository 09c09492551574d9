//! `handlers list`.

use serde::Deserialize;
use serde_json::value::RawValue;

use super::{Failure, SettingsArgs, client::ClientArgs, events, output};

#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    /// Lists handlers: how far they are, and what holds them up
    List(ClientArgs),
}

#[derive(Debug, Deserialize)]
struct Answer {
    handlers: Vec<Box<RawValue>>,
}

#[derive(Debug, Deserialize)]
#[serde(default)]
#[derive(Default)]
struct Handler {
    name: String,
    kind: String,
    state: String,
    position: u64,
    lag: u64,
    in_flight: u64,
    retrying: u64,
    parked: u64,
    dead: u64,
    reason: Option<String>,
}

pub(super) async fn run(settings: &SettingsArgs, command: Command) -> Result<(), Failure> {
    let Command::List(args) = command;
    let client = args.client(settings)?;
    let answer: Answer = client.get(&["v1", "handlers"], &[]).await?;
    if args.json {
        output::print_json(answer.handlers.iter().map(|handler| &**handler))?;
        return Ok(());
    }
    let mut rows = Vec::new();
    for handler in &answer.handlers {
        let handler: Handler = events::parse(handler)?;
        rows.push([
            handler.name,
            handler.kind,
            handler.state,
            handler.position.to_string(),
            handler.lag.to_string(),
            handler.in_flight.to_string(),
            handler.retrying.to_string(),
            handler.parked.to_string(),
            handler.dead.to_string(),
            handler.reason.unwrap_or_default(),
        ]);
    }
    output::print(&output::table(
        [
            "NAME",
            "KIND",
            "STATE",
            "POSITION",
            "LAG",
            "IN FLIGHT",
            "RETRYING",
            "PARKED",
            "DEAD",
            "REASON",
        ],
        &rows,
    ))?;
    Ok(())
}
