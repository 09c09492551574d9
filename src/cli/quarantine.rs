//! `quarantine list`, `show`, `retry` and `discard`.

use serde::Deserialize;
use serde_json::value::RawValue;

use super::{
    Failure, SettingsArgs,
    client::ClientArgs,
    events,
    moment::{Moment, moment},
    order::{self, Conditions, Discard, Retry},
    output,
    pages::{self, Part},
};

#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    /// Lists messages that were no events, oldest first, with the reason
    List(List),
    /// Prints one of them in full, with its bytes
    Show(Show),
    /// Takes them in again, as the configuration is now; what is still no event stays
    Retry(Retry<Filter>),
    /// Gives them up
    Discard(Discard<Filter>),
}

/// Which entries: those for which everything holds that is given.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Filters")]
pub(super) struct Filter {
    /// Only those of this source
    #[arg(long, value_name = "NAME")]
    source: Option<String>,
    /// Only those with this text in the reason they are there for
    #[arg(long, value_name = "TEXT")]
    reason_contains: Option<String>,
    /// Only those received then or later: a time (RFC 3339), or how long ago, as in 2h
    #[arg(long, value_name = "TIME", value_parser = moment)]
    since: Option<Moment>,
    /// Only those received before then
    #[arg(long, value_name = "TIME", value_parser = moment)]
    until: Option<Moment>,
    /// Only the one of this number; may be given several times
    #[arg(long = "number", value_name = "N")]
    numbers: Vec<u64>,
}

impl Filter {
    fn conditions(&self) -> Conditions {
        let Self { source, reason_contains, since, until, numbers } = self;
        Conditions::default()
            .text("source", source.as_ref())
            .text("reason", reason_contains.as_ref())
            .moment("since", since.as_ref())
            .moment("until", until.as_ref())
            .numbers("numbers", numbers)
    }
}

#[derive(Debug, clap::Args)]
pub(super) struct List {
    #[command(flatten)]
    client: ClientArgs,
    #[command(flatten)]
    part: Part,
}

#[derive(Debug, clap::Args)]
pub(super) struct Show {
    #[command(flatten)]
    client: ClientArgs,
    /// Its number
    number: u64,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Entry {
    number: u64,
    source: String,
    received_at: String,
    size: u64,
    reason: String,
    origin: Option<Box<RawValue>>,
    headers: Option<Box<RawValue>>,
    body: Option<String>,
    body_base64: Option<String>,
}

pub(super) async fn run(settings: &SettingsArgs, command: Command) -> Result<(), Failure> {
    match command {
        Command::List(args) => list(settings, &args).await,
        Command::Show(args) => show(settings, &args).await,
        Command::Retry(Retry { filter, order, reason }) => {
            let what = ("quarantine", "retry");
            order::give(settings, what, filter.conditions(), &order, reason.as_deref()).await
        }
        Command::Discard(Discard { filter, order, reason }) => {
            let what = ("quarantine", "discard");
            order::give(settings, what, filter.conditions(), &order, reason.as_deref()).await
        }
    }
}

async fn list(settings: &SettingsArgs, args: &List) -> Result<(), Failure> {
    let client = args.client.client(settings)?;
    let found = pages::list(&client, &["v1", "quarantine"], "quarantine", &[], &args.part).await?;
    if args.client.json {
        output::print_json(found.iter().map(|entry| &**entry))?;
        return Ok(());
    }
    let mut rows = Vec::new();
    for entry in &found {
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

async fn show(settings: &SettingsArgs, args: &Show) -> Result<(), Failure> {
    let client = args.client.client(settings)?;
    let path = ["v1", "quarantine", &args.number.to_string()];
    let entry: Box<RawValue> = client.get(&path, &[]).await?;
    if args.client.json {
        output::print_json([&*entry])?;
        return Ok(());
    }
    let entry: Entry = events::parse(&entry)?;
    let json = |value: Option<Box<RawValue>>| {
        let value = value.map(|value| output::one_line(value.get())).unwrap_or_default();
        if value == "{}" || value == "[]" { String::new() } else { value }
    };
    let fields = [
        ("number", entry.number.to_string()),
        ("source", entry.source),
        ("received", entry.received_at),
        ("reason", entry.reason),
        ("origin", json(entry.origin)),
        ("headers", json(entry.headers)),
        ("bytes", entry.size.to_string()),
    ];
    let body = match (entry.body, entry.body_base64) {
        (Some(text), _) => output::harmless_lines(&text),
        (None, Some(base64)) => format!("(no text; in base64)\n{base64}"),
        (None, None) => String::new(),
    };
    output::print(&format!("{}\n\n{body}", output::fields(&fields)))?;
    Ok(())
}
