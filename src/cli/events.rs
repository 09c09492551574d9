//! `events list`, `get`, `tail` and `export`.

mod export;

use std::{io::Write, time::Duration};

use anyhow::Context as _;
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::value::RawValue;

use super::{
    Failure, SettingsArgs,
    client::{Client, ClientArgs},
    output,
};

/// How long a tail waits before it asks again.
const POLL: Duration = Duration::from_millis(500);
/// How long at most while the daemon is away.
const POLL_AWAY: Duration = Duration::from_secs(5);
/// Events asked for at once.
const PAGE: usize = 500;

#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    /// Lists events
    List(List),
    /// Prints one event
    Get(Get),
    /// Prints the last events, then new ones as they come
    Tail(Tail),
    /// Writes events as lines of JSON, all there are or a range
    Export(export::Export),
}

#[derive(Debug, Default, clap::Args)]
pub(super) struct Filter {
    /// Only events of this type
    #[arg(long = "type", value_name = "TYPE")]
    kind: Option<String>,
    /// Only events of this key
    #[arg(long)]
    key: Option<String>,
}

impl Filter {
    fn query(&self) -> Vec<(&'static str, String)> {
        let some = |name, value: &Option<String>| value.clone().map(|value| (name, value));
        some("type", &self.kind).into_iter().chain(some("key", &self.key)).collect()
    }
}

#[derive(Debug, clap::Args)]
pub(super) struct List {
    #[command(flatten)]
    client: ClientArgs,
    #[command(flatten)]
    filter: Filter,
    /// From this position on
    #[arg(long, value_name = "POSITION")]
    from: Option<u64>,
    /// How many at most
    #[arg(long, short = 'n', default_value_t = 20)]
    limit: usize,
    /// Newest first
    #[arg(long, short)]
    reverse: bool,
}

#[derive(Debug, clap::Args)]
pub(super) struct Get {
    #[command(flatten)]
    client: ClientArgs,
    /// Its position in the log
    position: u64,
}

#[derive(Debug, clap::Args)]
pub(super) struct Tail {
    #[command(flatten)]
    client: ClientArgs,
    #[command(flatten)]
    filter: Filter,
    /// From this position on, in place of the last ones
    #[arg(long, value_name = "POSITION", conflicts_with = "lines")]
    from: Option<u64>,
    /// How many of the last ones
    #[arg(long, short = 'n', default_value_t = 10)]
    lines: usize,
}

#[derive(Debug, Deserialize)]
struct Answer {
    events: Vec<Box<RawValue>>,
}

/// What a person sees of an event. `--json` shows all of it, as the daemon sent it: parsing
/// and printing a body would change its numbers and drop duplicate keys.
#[derive(Debug, Deserialize)]
struct Event {
    position: u64,
    #[serde(default)]
    id: String,
    #[serde(rename = "type", default)]
    kind: String,
    #[serde(default)]
    key: String,
    #[serde(default)]
    recorded_at: String,
    body: Option<Box<RawValue>>,
}

pub(super) async fn run(settings: &SettingsArgs, command: Command) -> Result<(), Failure> {
    match command {
        Command::List(args) => {
            let client = args.client.client(settings)?;
            list(&client, &args, &mut std::io::stdout()).await
        }
        Command::Get(args) => {
            let client = args.client.client(settings)?;
            let position = args.position.to_string();
            let event: Box<RawValue> = client.get(&["v1", "events", &position], &[]).await?;
            output::print(event.get())?;
            Ok(())
        }
        Command::Tail(args) => {
            let client = args.client.client(settings)?;
            tail(&client, &args, &mut std::io::stdout()).await
        }
        Command::Export(args) => {
            let client = args.client.client(settings)?;
            export::export(&client, &args, &mut std::io::stdout()).await
        }
    }
}

async fn list(client: &Client, args: &List, out: &mut dyn Write) -> Result<(), Failure> {
    let mut from = args.from;
    let mut left = args.limit;
    let mut first = true;
    while left > 0 {
        let asked = left.min(PAGE);
        let page = page(client, &args.filter, from, asked, args.reverse).await?;
        let Some(last) = page.last() else { break };
        let last = parse::<Event>(last)?.position;
        show(out, &page, args.client.json, first)?;
        first = false;
        left -= page.len().min(left);
        from = match if args.reverse { last.checked_sub(1) } else { last.checked_add(1) } {
            // There is nothing before the first.
            Some(0) | None => break,
            next => next,
        };
    }
    if first && !args.client.json {
        output::print_to(out, "no events")?;
    }
    Ok(())
}

async fn tail(client: &Client, args: &Tail, out: &mut dyn Write) -> Result<(), Failure> {
    let mut first = true;
    let mut next = match args.from {
        Some(from) => from.max(1),
        None => {
            let mut page =
                page(client, &args.filter, None, args.lines.clamp(1, PAGE), true).await?;
            page.reverse();
            let next = match page.last() {
                Some(last) => parse::<Event>(last)?.position.saturating_add(1),
                None => 1,
            };
            if args.lines > 0 && !page.is_empty() {
                show(out, &page, args.client.json, first)?;
                first = false;
            }
            next
        }
    };
    let mut wait = POLL;
    loop {
        match page_or_error(client, &args.filter, Some(next), PAGE, false).await {
            Ok(page) => {
                wait = POLL;
                if let Some(last) = page.last() {
                    next = parse::<Event>(last)?.position.saturating_add(1);
                    show(out, &page, args.client.json, first)?;
                    first = false;
                    if page.len() == PAGE {
                        continue;
                    }
                }
            }
            Err(error) if error.is_passing() => {
                // Said once; it goes on from the same place when the daemon is back.
                if wait == POLL {
                    output::complain(&format!("pulsebus: {error}; waiting for it"));
                }
                wait = (wait * 2).min(POLL_AWAY);
            }
            Err(error) => return Err(error.into()),
        }
        tokio::time::sleep(wait).await;
    }
}

async fn page(
    client: &Client,
    filter: &Filter,
    from: Option<u64>,
    limit: usize,
    reverse: bool,
) -> Result<Vec<Box<RawValue>>, Failure> {
    Ok(page_or_error(client, filter, from, limit, reverse).await?)
}

async fn page_or_error(
    client: &Client,
    filter: &Filter,
    from: Option<u64>,
    limit: usize,
    reverse: bool,
) -> Result<Vec<Box<RawValue>>, super::client::RequestError> {
    let mut query = filter.query();
    query.extend(from.map(|from| ("from", from.to_string())));
    query.push(("limit", limit.to_string()));
    query.push(("order", if reverse { "desc" } else { "asc" }.to_owned()));
    Ok(client.get::<Answer>(&["v1", "events"], &query).await?.events)
}

fn show(
    out: &mut dyn Write,
    events: &[Box<RawValue>],
    json: bool,
    headings: bool,
) -> Result<(), Failure> {
    if json {
        output::print_json_to(out, events.iter().map(|event| &**event))?;
        return Ok(());
    }
    let mut rows = Vec::with_capacity(events.len());
    for event in events {
        let event: Event = parse(event)?;
        let body = event.body.map(|body| output::one_line(body.get())).unwrap_or_default();
        rows.push([
            event.position.to_string(),
            event.recorded_at,
            event.kind,
            event.key,
            event.id,
            output::shortened(&body, 120),
        ]);
    }
    let table = output::table(["POSITION", "RECORDED", "TYPE", "KEY", "ID", "BODY"], &rows);
    let text = match table.split_once('\n') {
        Some((_, rows)) if !headings => rows,
        _ => &table,
    };
    output::print_to(out, text)?;
    Ok(())
}

/// An entry of a list, as far as a person sees it.
pub(super) fn parse<T: DeserializeOwned>(value: &RawValue) -> Result<T, Failure> {
    serde_json::from_str(value.get())
        .context("the daemon's answer is not understood; is it of another version?")
        .map_err(Failure::from)
}

#[cfg(test)]
mod tests;
