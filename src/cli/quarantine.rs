//! `quarantine list`.

use serde::Deserialize;
use serde_json::value::RawValue;

use super::{Failure, SettingsArgs, client::ClientArgs, events, output};

#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    /// Lists messages that were no events, oldest first, with the reason
    List(List),
}

#[derive(Debug, clap::Args)]
pub(super) struct List {
    #[command(flatten)]
    client: ClientArgs,
    /// Entries behind this number
    #[arg(long, value_name = "NUMBER", default_value_t = 0)]
    after: u64,
    /// How many at most
    #[arg(long, short = 'n', default_value_t = 50)]
    limit: usize,
}

#[derive(Debug, Deserialize)]
struct Answer {
    quarantine: Vec<Box<RawValue>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Entry {
    number: u64,
    source: String,
    received_at: String,
    size: u64,
    reason: String,
}

pub(super) async fn run(settings: &SettingsArgs, command: Command) -> Result<(), Failure> {
    let Command::List(args) = command;
    let client = args.client.client(settings)?;
    let query = [("after", args.after.to_string()), ("limit", args.limit.to_string())];
    let answer: Answer = client.get(&["v1", "quarantine"], &query).await?;
    if args.client.json {
        output::print_json(answer.quarantine.iter().map(|entry| &**entry))?;
        return Ok(());
    }
    let mut rows = Vec::new();
    for entry in &answer.quarantine {
        let entry: Entry = events::parse(entry)?;
        rows.push([
            entry.number.to_string(),
            entry.received_at,
            entry.source,
            entry.size.to_string(),
            entry.reason,
        ]);
    }
    if rows.is_empty() {
        output::print("nothing is in quarantine")?;
    } else {
        output::print(&output::table(["NUMBER", "RECEIVED", "SOURCE", "BYTES", "REASON"], &rows))?;
    }
    Ok(())
}
