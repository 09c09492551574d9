//! `handlers list`, `pause`, `resume`, `rewind`, `rebuild` and `forget`.

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
    position: u64,
    lag: u64,
    in_flight: u64,
    retrying: u64,
    parked: u64,
    dead: u64,
    reason: Option<String>,
    rebuild: Option<Building>,
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
            handler.position.to_string(),
            handler.lag.to_string(),
            handler.in_flight.to_string(),
            handler.retrying.to_string(),
            handler.parked.to_string(),
            handler.dead.to_string(),
            remarks.join("; "),
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
