//! `dead-letters list`, `show`, `retry` and `discard`.

use serde::Deserialize;
use serde_json::value::RawValue;

use super::{
    Failure, SettingsArgs,
    client::ClientArgs,
    events,
    moment::{Moment, moment},
    order::{self, Conditions, Discard, Retry},
    output,
    pages::{self, Most, Part},
};

#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    /// Lists dead letters by handler and position, with the reason
    List(List),
    /// Prints one dead letter in full, and its event
    Show(Show),
    /// Lets handlers try dead letters again, each before what waits behind it; what fails again
    /// is a dead letter again
    Retry(Retry<Filter>),
    /// Gives dead letters up; what waits behind them goes on
    Discard(Discard<Filter>),
}

/// Which dead letters: those for which everything holds that is given.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Filters")]
pub(super) struct Filter {
    /// Only those of this handler
    #[arg(long, value_name = "NAME")]
    handler: Option<String>,
    /// Only events of this type
    #[arg(long = "type", value_name = "TYPE")]
    kind: Option<String>,
    /// Only events of this key
    #[arg(long)]
    key: Option<String>,
    /// Only those with this text in the last error
    #[arg(long, value_name = "TEXT")]
    error: Option<String>,
    /// Only those that failed last then or later: a time (RFC 3339), or how long ago, as in 2h
    #[arg(long, value_name = "TIME", value_parser = moment)]
    since: Option<Moment>,
    /// Only those that failed last before then
    #[arg(long, value_name = "TIME", value_parser = moment)]
    until: Option<Moment>,
    /// Only the one at this position; may be given several times
    #[arg(long = "position", value_name = "N")]
    positions: Vec<u64>,
}

impl Filter {
    fn conditions(&self) -> Conditions {
        let Self { handler, kind, key, error, since, until, positions } = self;
        Conditions::default()
            .text("handler", handler.as_ref())
            .text("type", kind.as_ref())
            .text("key", key.as_ref())
            .text("error", error.as_ref())
            .moment("since", since.as_ref())
            .moment("until", until.as_ref())
            .numbers("positions", positions)
    }

    /// The same, as the list wants it.
    fn query(&self) -> Vec<(&'static str, String)> {
        let Self { handler, kind, key, error, since, until, positions } = self;
        let moment = |moment: &Option<Moment>| moment.as_ref().map(|at| at.as_str().to_owned());
        let positions: Vec<_> = positions.iter().map(u64::to_string).collect();
        let positions = Some(positions.join(",")).filter(|positions| !positions.is_empty());
        [
            ("handler", handler.clone()),
            ("type", kind.clone()),
            ("key", key.clone()),
            ("error", error.clone()),
            ("since", moment(since)),
            ("until", moment(until)),
            ("position", positions),
        ]
        .into_iter()
        .filter_map(|(name, value)| Some((name, value?)))
        .collect()
    }
}

#[derive(Debug, clap::Args)]
pub(super) struct List {
    #[command(flatten)]
    client: ClientArgs,
    #[command(flatten)]
    most: Most,
    #[command(flatten)]
    filter: Filter,
}

#[derive(Debug, clap::Args)]
pub(super) struct Show {
    #[command(flatten)]
    client: ClientArgs,
    /// The handler's name
    handler: String,
    /// The event's position
    position: u64,
}

/// What a person sees of a dead letter.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Letter {
    handler: String,
    position: u64,
    id: String,
    #[serde(rename = "type")]
    kind: String,
    key: String,
    attempts: u32,
    first_error: String,
    last_error: String,
    first_failed_at: String,
    last_failed_at: String,
    followers: u64,
    redrive: Option<u64>,
}

/// What a person sees of its event.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Event {
    source: String,
    subject: Option<String>,
    recorded_at: String,
    body: Option<Box<RawValue>>,
}

pub(super) async fn run(settings: &SettingsArgs, command: Command) -> Result<(), Failure> {
    match command {
        Command::List(args) => list(settings, args).await,
        Command::Show(args) => show(settings, &args).await,
        Command::Retry(Retry { filter, order, reason }) => {
            let what = ("dead-letters", "retry");
            order::give(settings, what, filter.conditions(), &order, reason.as_deref()).await
        }
        Command::Discard(Discard { filter, order, reason }) => {
            let what = ("dead-letters", "discard");
            order::give(settings, what, filter.conditions(), &order, reason.as_deref()).await
        }
    }
}

async fn list(settings: &SettingsArgs, args: List) -> Result<(), Failure> {
    let client = args.client.client(settings)?;
    let part = Part { after: None, most: args.most };
    let path = ["v1", "dead-letters"];
    let found = pages::list(&client, &path, "dead_letters", &args.filter.query(), &part).await?;
    if args.client.json {
        output::print_json(found.iter().map(|letter| &**letter))?;
        return Ok(());
    }
    let mut rows = Vec::new();
    for letter in &found {
        let letter: Letter = events::parse(letter)?;
        rows.push([
            letter.handler,
            letter.position.to_string(),
            letter.kind,
            letter.key,
            letter.attempts.to_string(),
            letter.followers.to_string(),
            letter.last_failed_at,
            letter.redrive.map(|redrive| redrive.to_string()).unwrap_or_default(),
            output::shortened(&letter.last_error, 120),
        ]);
    }
    if rows.is_empty() {
        output::print("no dead letters")?;
    } else {
        let headings = [
            "HANDLER", "POSITION", "TYPE", "KEY", "ATTEMPTS", "BEHIND", "FAILED", "REDRIVE",
            "ERROR",
        ];
        output::print(&output::table(headings, &rows))?;
    }
    Ok(())
}

async fn show(settings: &SettingsArgs, args: &Show) -> Result<(), Failure> {
    let client = args.client.client(settings)?;
    let position = args.position.to_string();
    let path = ["v1", "dead-letters", &args.handler, &position];
    let letter: Box<RawValue> = client.get(&path, &[]).await?;
    let event: Box<RawValue> = client.get(&["v1", "events", &position], &[]).await?;
    if args.client.json {
        let (letter, event) = (output::one_line(letter.get()), output::one_line(event.get()));
        output::print(&format!(r#"{{"dead_letter":{letter},"event":{event}}}"#))?;
        return Ok(());
    }
    let letter: Letter = events::parse(&letter)?;
    let event: Event = events::parse(&event)?;
    let fields = [
        ("handler", letter.handler),
        ("position", position),
        ("type", letter.kind),
        ("key", letter.key),
        ("id", letter.id),
        ("source", event.source),
        ("subject", event.subject.unwrap_or_default()),
        ("recorded", event.recorded_at),
        ("attempts", letter.attempts.to_string()),
        ("behind it", letter.followers.to_string()),
        ("first failed", letter.first_failed_at),
        ("first error", letter.first_error),
        ("last failed", letter.last_failed_at),
        ("last error", letter.last_error),
        ("in redrive", letter.redrive.map(|redrive| redrive.to_string()).unwrap_or_default()),
    ];
    let body = event.body.map(|body| output::harmless_lines(body.get())).unwrap_or_default();
    output::print(&format!("{}\n\n{body}", output::fields(&fields)))?;
    Ok(())
}
