//! `audit list`.

use serde::Deserialize;
use serde_json::value::RawValue;

use super::{
    Failure, SettingsArgs,
    client::ClientArgs,
    events, output,
    pages::{self, Part},
};

#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    /// Lists what persons did, newest first
    List(List),
}

#[derive(Debug, clap::Args)]
pub(super) struct List {
    #[command(flatten)]
    client: ClientArgs,
    #[command(flatten)]
    part: Part,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Entry {
    number: u64,
    at: String,
    by: String,
    action: String,
    subject: String,
    detail: Option<Box<RawValue>>,
}

pub(super) async fn run(settings: &SettingsArgs, command: Command) -> Result<(), Failure> {
    let Command::List(args) = command;
    let client = args.client.client(settings)?;
    let found = pages::list(&client, &["v1", "audit"], "audit", &[], &args.part).await?;
    if args.client.json {
        output::print_json(found.iter().map(|entry| &**entry))?;
        return Ok(());
    }
    let mut rows = Vec::new();
    for entry in &found {
        let entry: Entry = events::parse(entry)?;
        let detail = entry.detail.map(|detail| output::one_line(detail.get())).unwrap_or_default();
        let detail = if detail == "{}" { String::new() } else { detail };
        rows.push([
            entry.number.to_string(),
            entry.at,
            entry.by,
            entry.action,
            entry.subject,
            output::shortened(&detail, 160),
        ]);
    }
    if rows.is_empty() {
        output::print("nobody has done anything yet")?;
    } else {
        let headings = ["NUMBER", "AT", "BY", "ACTION", "SUBJECT", "DETAIL"];
        output::print(&output::table(headings, &rows))?;
    }
    Ok(())
}
