//! `publish`: over HTTP to a running daemon, or straight to a broker.

mod broker;
mod input;

use std::process::ExitCode;

use anyhow::Context as _;
use serde::{Deserialize, Serialize};
use serde_json::{json, value::RawValue};
use uuid::Uuid;

use self::input::{Input, Part};
use super::{
    FAILED, Failure, SettingsArgs,
    client::{Client, ClientArgs},
    output,
};

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    pulsebus publish --type LessonPublished --data '{\"lesson_id\": \"7\", \"title\": \"Fractions\"}'\n  \
    pulsebus publish --file events.ndjson\n  \
    pulsebus publish --transport nats --subject edupulse.lessons.new < event.json")]
pub(super) struct Args {
    #[command(flatten)]
    client: ClientArgs,
    /// The event: JSON, an array of events, or several lines with one each; `-` reads them from
    /// standard input, which is also the default
    body: Option<String>,
    /// Reads the events from a file
    #[arg(long, short, value_name = "FILE", conflicts_with = "body")]
    file: Option<std::path::PathBuf>,
    /// Makes an event of this type, of --data, --id and --key
    #[arg(long = "type", value_name = "TYPE", conflicts_with_all = ["body", "file"])]
    kind: Option<String>,
    /// Its data: JSON [default: null]
    #[arg(long, value_name = "JSON", requires = "kind")]
    data: Option<String>,
    /// Its id: publishing it again with the same one changes nothing [default: a new UUID]
    #[arg(long, requires = "kind")]
    id: Option<String>,
    /// Its ordering key
    #[arg(long, requires = "kind")]
    key: Option<String>,
    /// Publishes to a configured transport, in place of the daemon
    #[arg(long, value_name = "NAME")]
    transport: Option<String>,
    /// NATS: the subject
    #[arg(long, requires = "transport")]
    subject: Option<String>,
    /// RabbitMQ: the exchange [default: the default exchange]
    #[arg(long, requires = "transport")]
    exchange: Option<String>,
    /// RabbitMQ: the routing key
    #[arg(long, requires = "transport")]
    routing_key: Option<String>,
    /// Webhook: a path behind its URL [default: the URL as it is]
    #[arg(long, requires = "transport")]
    path: Option<String>,
}

/// What became of everything that was published.
#[derive(Debug, Default)]
struct Totals {
    stored: u64,
    duplicates: u64,
    quarantined: Vec<(u64, String)>,
    position: Option<u64>,
}

/// The daemon's answer to one request.
#[derive(Debug, Deserialize)]
struct Answer {
    #[serde(default)]
    stored: u64,
    #[serde(default)]
    duplicates: u64,
    #[serde(default)]
    quarantined: Vec<Quarantined>,
    #[serde(default)]
    position: Option<u64>,
}

#[derive(Debug, Deserialize)]
struct Quarantined {
    index: u64,
    reason: String,
}

pub(super) async fn run(settings: &SettingsArgs, args: Args) -> Result<ExitCode, Failure> {
    let input = input(&args)?;
    if let Some(name) = &args.transport {
        let destination = broker::Destination {
            subject: args.subject.as_deref(),
            exchange: args.exchange.as_deref(),
            routing_key: args.routing_key.as_deref(),
            path: args.path.as_deref(),
        };
        return broker::publish(settings, name, destination, input, args.client.json).await;
    }
    let client = args.client.client(settings)?;
    let mut totals = Totals::default();
    let result = over_http(&client, input, &mut totals).await;
    // What was stored before something failed is stored, and worth saying.
    if result.is_ok() || totals.stored + totals.duplicates > 0 {
        report(&totals, args.client.json)?;
    }
    result?;
    Ok(if totals.quarantined.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(FAILED) })
}

/// Sends part after part, each committed before the next: so events stay in order.
async fn over_http(client: &Client, mut input: Input, totals: &mut Totals) -> Result<(), Failure> {
    let mut before = 0;
    while let Some(part) = input.next().await? {
        let (content_type, body, events) = match part {
            Part::Document(text) => {
                let events = elements(&text)?.map_or(1, |elements| elements.len());
                ("application/json", text.into_bytes(), events)
            }
            Part::Lines(lines) if lines.len() == 1 => {
                ("application/json", lines.concat().into_bytes(), 1)
            }
            Part::Lines(lines) => {
                ("application/x-ndjson", lines.join("\n").into_bytes(), lines.len())
            }
        };
        let answer: Answer = client.post(&["v1", "events"], content_type, body).await?;
        totals.stored += answer.stored;
        totals.duplicates += answer.duplicates;
        totals.position = answer.position.or(totals.position);
        totals
            .quarantined
            .extend(answer.quarantined.into_iter().map(|q| (before + q.index, q.reason)));
        before += events as u64;
    }
    Ok(())
}

fn report(totals: &Totals, json: bool) -> Result<(), Failure> {
    let Totals { stored, duplicates, quarantined, position } = totals;
    if json {
        let quarantined: Vec<_> = quarantined
            .iter()
            .map(|(index, reason)| json!({ "index": index, "reason": reason }))
            .collect();
        let answer = json!({
            "stored": stored,
            "duplicates": duplicates,
            "quarantined": quarantined,
            "position": position,
        });
        output::print(&answer.to_string())?;
        return Ok(());
    }
    let mut text = format!("stored {stored}, duplicates {duplicates}");
    if let Some(position) = position {
        text.push_str(&format!(", last position {position}"));
    }
    output::print(&text)?;
    for (index, reason) in quarantined {
        output::complain(&format!(
            "event {} went to quarantine: {}",
            index + 1,
            output::harmless(reason)
        ));
    }
    Ok(())
}

fn input(args: &Args) -> Result<Input, Failure> {
    if let Some(kind) = &args.kind {
        return Ok(Input::text(made(args, kind)?));
    }
    if let Some(file) = &args.file {
        return Ok(Input::file(file)?);
    }
    match args.body.as_deref() {
        Some(body) if body != "-" => Ok(Input::text(body.to_owned())),
        Some(_) => Ok(Input::standard_input()),
        None if input::is_terminal() => Err(Failure::Usage(
            "nothing to publish: give the event as an argument, with --type and --data, with \
             --file, or on standard input (`-` types it in)"
                .to_owned(),
        )),
        None => Ok(Input::standard_input()),
    }
}

/// The native form of an event; the data stay as they were typed.
fn made(args: &Args, kind: &str) -> Result<String, Failure> {
    #[derive(Serialize)]
    struct Native<'a> {
        r#type: &'a str,
        id: &'a str,
        #[serde(skip_serializing_if = "Option::is_none")]
        key: Option<&'a str>,
        data: &'a RawValue,
    }
    let data = args.data.as_deref().unwrap_or("null");
    let data: &RawValue = serde_json::from_str(data).map_err(|error| {
        Failure::Usage(format!(
            "--data is not JSON ({error}); quote it for the shell, as in --data '{{\"title\": \
             \"Fractions\"}}'"
        ))
    })?;
    let new = Uuid::now_v7().to_string();
    let id = args.id.as_deref().unwrap_or(&new);
    let event = Native { r#type: kind, id, key: args.key.as_deref(), data };
    Ok(serde_json::to_string(&event).context("failed to write the event")?)
}

/// The elements of a JSON array, as they are written; `None` for anything else.
fn elements(text: &str) -> Result<Option<Vec<&RawValue>>, Failure> {
    if !text.trim_start().starts_with('[') {
        return Ok(None);
    }
    Ok(Some(serde_json::from_str(text).context("failed to read the array of events")?))
}

#[cfg(test)]
mod tests;
