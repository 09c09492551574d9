//! `handlers list`, `show`, `pause`, `resume`, `rewind`, `rebuild` and `forget`.

use reqwest::StatusCode;
use serde::Deserialize;
use serde_json::{json, value::RawValue};

use super::{
    Failure, SettingsArgs,
    client::{Client, ClientArgs, RequestError},
    events,
    moment::{Moment, moment},
    order::By,
    output,
    progress::{Look, WaitArgs, follow},
};

#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    /// Lists handlers: how far they are, and what holds them up
    List(ClientArgs),
    /// Shows a handler: how it is and since when, how far behind, which keys do not flow and why,
    /// and what to do
    Show(Shown),
    /// Lets a handler end what it is doing and take nothing new until resumed, also after a
    /// restart
    Pause(Named),
    /// Lets a paused handler go on
    Resume(Named),
    /// Moves a handler back: it gets the events from there on again
    Rewind(Rewind),
    /// Builds what a handler keeps (a search index) anew from the first event that is in the log; until that is
    /// done the old one answers
    Rebuild(Rebuild),
    /// Forgets a handler that is not configured any more: its cursor, its retries and its dead
    /// letters; old events are kept for it until then
    Forget(Named),
}

#[derive(Debug, clap::Args)]
pub(super) struct Named {
    #[command(flatten)]
    client: ClientArgs,
    #[command(flatten)]
    by: By,
    /// The handler
    name: String,
}

#[derive(Debug, clap::Args)]
pub(super) struct Shown {
    #[command(flatten)]
    client: ClientArgs,
    /// The handler
    name: String,
}

#[derive(Debug, clap::Args)]
pub(super) struct Rewind {
    #[command(flatten)]
    handler: Named,
    #[command(flatten)]
    to: To,
    /// Its effects outside of pulsebus (messages sent, calls made) may happen again
    #[arg(long)]
    allow_side_effects: bool,
    #[command(flatten)]
    wait: WaitArgs,
}

#[derive(Debug, clap::Args)]
#[group(required = true, multiple = false)]
pub(super) struct To {
    /// The event at this position is the next one it gets
    #[arg(long, value_name = "N")]
    position: Option<u64>,
    /// The first event recorded then or later is the next one it gets: a time (RFC 3339), or
    /// how long ago, as in 2h
    #[arg(long, value_name = "TIME", value_parser = moment)]
    time: Option<Moment>,
}

#[derive(Debug, clap::Args)]
pub(super) struct Rebuild {
    #[command(flatten)]
    handler: Named,
    /// Ends a rebuild that is under way; what serves goes on
    #[arg(long)]
    cancel: bool,
    #[command(flatten)]
    wait: WaitArgs,
}

#[derive(Debug, Deserialize)]
struct Answer {
    handlers: Vec<Box<RawValue>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Handler {
    name: String,
    kind: String,
    state: String,
    since: String,
    position: u64,
    lag: u64,
    lag_seconds: Option<f64>,
    in_flight: u64,
    oldest_in_flight: Option<Call>,
    retrying: u64,
    next_retry_at: Option<String>,
    parked: u64,
    blocked_keys: u64,
    dead: u64,
    last_error: Option<Error>,
    last_progress_at: Option<String>,
    reason: Option<String>,
    rebuild: Option<Building>,
    blocked: Vec<Blocked>,
}

/// What went wrong.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Error {
    pub(super) text: String,
    pub(super) at: String,
}

/// A call under way.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Call {
    position: u64,
    seconds: f64,
}

/// A key that does not flow.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Blocked {
    key: Option<String>,
    position: u64,
    state: String,
    attempts: u64,
    due_at: Option<String>,
    last_error: Option<Error>,
    followers: u64,
}

/// How far a rebuild is.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Building {
    position: u64,
    head: u64,
}

impl Handler {
    /// Why it does not go on, where it does not.
    fn held_up(&self) -> Option<String> {
        match (&*self.state, &self.reason) {
            ("running" | "starting", _) => None,
            (state, Some(reason)) => Some(format!("{state}: {reason}")),
            (state, None) => Some(state.to_owned()),
        }
    }
}

pub(super) async fn run(settings: &SettingsArgs, command: Command) -> Result<(), Failure> {
    match command {
        Command::List(args) => list(settings, &args).await,
        Command::Show(args) => show(settings, &args).await,
        Command::Pause(args) => tell(settings, &args, "pause", "is paused").await,
        Command::Resume(args) => tell(settings, &args, "resume", "goes on").await,
        Command::Rewind(args) => rewind(settings, &args).await,
        Command::Rebuild(args) => rebuild(settings, &args).await,
        Command::Forget(args) => tell(settings, &args, "forget", "is forgotten").await,
    }
}

async fn list(settings: &SettingsArgs, args: &ClientArgs) -> Result<(), Failure> {
    let client = args.client(settings)?;
    let answer: Answer = client.get(&["v1", "handlers"], &[]).await?;
    if args.json {
        output::print_json(answer.handlers.iter().map(|handler| &**handler))?;
        return Ok(());
    }
    let mut rows = Vec::new();
    for handler in &answer.handlers {
        let handler: Handler = events::parse(handler)?;
        let rebuild = handler
            .rebuild
            .map(|building| format!("rebuilt up to {} of {}", building.position, building.head));
        let remarks: Vec<_> = [rebuild, handler.reason].into_iter().flatten().collect();
        rows.push([
            handler.name,
            handler.kind,
            handler.state,
            output::seconds_since(&handler.since).map(output::span).unwrap_or_default(),
            handler.lag.to_string(),
            handler.lag_seconds.map(output::span).unwrap_or_default(),
            handler.retrying.to_string(),
            handler.parked.to_string(),
            handler.dead.to_string(),
            remarks.join("; "),
        ]);
    }
    let headings =
        ["NAME", "KIND", "STATE", "FOR", "LAG", "BEHIND", "RETRYING", "PARKED", "DEAD", "REASON"];
    output::fit(headings, &mut rows);
    output::print(&output::table(headings, &rows))?;
    Ok(())
}

async fn show(settings: &SettingsArgs, args: &Shown) -> Result<(), Failure> {
    let client = args.client.client(settings)?;
    let (answer, handler) = get(&client, &args.name).await?;
    if args.client.json {
        output::print_json([&*answer])?;
        return Ok(());
    }
    output::print(&shown(handler))?;
    Ok(())
}

fn shown(handler: Handler) -> String {
    let since = output::seconds_since(&handler.since).map(output::span);
    let state = match since {
        Some(since) => format!("{} for {since} (since {})", handler.state, handler.since),
        None => handler.state,
    };
    let lag = match handler.lag_seconds {
        Some(seconds) if handler.lag > 0 => {
            format!("{} events; the oldest is {} old", handler.lag, output::span(seconds))
        }
        _ => format!("{} events", handler.lag),
    };
    let ago = |at: Option<String>| at.map(|at| output::ago(&at)).unwrap_or_default();
    let some = |n: u64, text: &str| if n > 0 { format!("{n} {text}") } else { String::new() };
    let mut text = output::fields(&[
        ("name", handler.name),
        ("kind", handler.kind),
        ("state", state),
        ("reason", handler.reason.unwrap_or_default()),
        ("position", handler.position.to_string()),
        ("lag", lag),
        ("in flight", some(handler.in_flight, "events")),
        (
            "oldest call",
            handler
                .oldest_in_flight
                .map(|call| {
                    format!("position {}, for {}", call.position, output::span(call.seconds))
                })
                .unwrap_or_default(),
        ),
        ("blocked", some(handler.blocked_keys, "keys")),
        ("retrying", some(handler.retrying, "keys")),
        ("next retry", ago(handler.next_retry_at)),
        ("parked", some(handler.parked, "events behind failed or dead ones of their key")),
        ("dead", some(handler.dead, "dead letters")),
        ("last error", handler.last_error.as_ref().map(|e| e.text.clone()).unwrap_or_default()),
        ("", ago(handler.last_error.map(|error| error.at))),
        ("last progress", ago(handler.last_progress_at)),
        (
            "rebuild",
            handler
                .rebuild
                .map(|building| format!("up to {} of {}", building.position, building.head))
                .unwrap_or_default(),
        ),
    ]);
    if handler.blocked.is_empty() {
        return text;
    }
    let many = handler.blocked.len();
    let mut rows: Vec<_> = handler
        .blocked
        .into_iter()
        .map(|key| {
            let due = key.due_at.as_deref().and_then(output::seconds_since);
            [
                output::shortened(&key.key.unwrap_or_default(), 30),
                key.position.to_string(),
                key.state,
                key.attempts.to_string(),
                due.map(|ago| output::span(-ago)).unwrap_or_default(),
                key.followers.to_string(),
                key.last_error.map(|error| error.text).unwrap_or_default(),
            ]
        })
        .collect();
    let headings = ["KEY", "POSITION", "STATE", "ATTEMPTS", "DUE IN", "BEHIND IT", "LAST ERROR"];
    output::fit(headings, &mut rows);
    text.push_str("\n\nkeys that do not flow:\n");
    text.push_str(&output::table(headings, &rows));
    if (many as u64) < handler.blocked_keys {
        text.push_str(&format!("\n… and {} more", handler.blocked_keys - many as u64));
    }
    text
}

async fn tell(
    settings: &SettingsArgs,
    args: &Named,
    action: &str,
    outcome: &str,
) -> Result<(), Failure> {
    let client = args.client.client(settings)?;
    let path = ["v1", "handlers", &args.name, action];
    let answer: Box<RawValue> = client.tell(&path, &args.by.query(), None).await?;
    say(&answer, args, outcome)
}

fn say(answer: &RawValue, args: &Named, outcome: &str) -> Result<(), Failure> {
    if args.client.json {
        output::print_json([answer])?;
    } else {
        output::print(&format!("handler {} {outcome}", output::harmless(&args.name)))?;
    }
    Ok(())
}

async fn get(client: &Client, name: &str) -> Result<(Box<RawValue>, Handler), RequestError> {
    let answer: Box<RawValue> = client.get(&["v1", "handlers", name], &[]).await?;
    let handler = serde_json::from_str(answer.get()).map_err(|error| client.strange(error))?;
    Ok((answer, handler))
}

async fn rewind(settings: &SettingsArgs, args: &Rewind) -> Result<(), Failure> {
    let Rewind { handler: named, to, allow_side_effects, wait } = args;
    let client = named.client.client(settings)?;
    let name = &*named.name;
    let order = json!({
        "position": to.position,
        "time": to.time.as_ref().map(Moment::to_json),
        "allow_side_effects": allow_side_effects,
        "by": named.by.name(),
    });
    let path = ["v1", "handlers", name, "rewind"];
    let told: Result<Box<RawValue>, _> = client.tell(&path, &[], Some(&order)).await;
    let answer = told.map_err(|error| match error {
        RequestError::Refused { status: StatusCode::CONFLICT, .. } if !allow_side_effects => {
            let advice = "with --allow-side-effects it is done all the same";
            Failure::Failed(anyhow::anyhow!("{error}; {advice}"))
        }
        error => error.into(),
    })?;
    let start = events::parse::<Handler>(&answer)?.position;
    let next = start.saturating_add(1);
    if !wait.wanted() {
        return say(&answer, named, &format!("goes on from position {next}"));
    }
    let what = format!("handler {name}");
    let goes_on = format!("handler {name} goes on; `handlers list` says how far it is");
    let answer = follow(&what, &goes_on, async || {
        let (answer, handler) = get(&client, name).await?;
        let done = handler.position.saturating_sub(start);
        Ok(if handler.lag == 0 {
            Look::Ended(answer)
        } else {
            let total = (handler.position + handler.lag).saturating_sub(start);
            Look::Underway { done, total, held_up: handler.held_up() }
        })
    });
    say(&answer.await?, named, &format!("went on from position {next} and has caught up"))
}

async fn rebuild(settings: &SettingsArgs, args: &Rebuild) -> Result<(), Failure> {
    let Rebuild { handler: named, cancel, wait } = args;
    let client = named.client.client(settings)?;
    let name = &*named.name;
    if *cancel {
        let path = ["v1", "handlers", name, "rebuild", "cancel"];
        let answer: Box<RawValue> = client.tell(&path, &named.by.query(), None).await?;
        return say(&answer, named, "is not being rebuilt any more; what serves goes on");
    }
    let path = ["v1", "handlers", name, "rebuild"];
    let answer: Box<RawValue> = client.tell(&path, &named.by.query(), None).await?;
    if !wait.wanted() {
        return say(&answer, named, "is being rebuilt; `handlers list` says how far that is");
    }
    let what = format!("rebuilding {name}");
    let goes_on = format!("rebuilding {name} goes on; `handlers list` says how far it is");
    let answer = follow(&what, &goes_on, async || {
        let (answer, handler) = get(&client, name).await?;
        Ok(match handler.rebuild {
            None => Look::Ended(answer),
            Some(Building { position, head }) => {
                Look::Underway { done: position, total: head, held_up: None }
            }
        })
    });
    say(&answer.await?, named, "has been rebuilt")
}
