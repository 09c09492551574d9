//! `redrives list`, `show`, `cancel` and `wait`.

use serde::Deserialize;
use serde_json::value::RawValue;

use super::{
    FAILED, Failure, SettingsArgs,
    client::{Client, ClientArgs},
    events,
    order::By,
    output,
    pages::{self, Part},
    progress::{Look, follow},
};

#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    /// Lists redrives, oldest first: what is being retried or discarded, and what was
    List(List),
    /// Prints one redrive
    Show(One),
    /// Ends a redrive that is running; what is left of it stays as it was before
    Cancel(Cancel),
    /// Waits until a redrive has ended, with a progress bar on a terminal; fails where it was
    /// cancelled
    Wait(One),
}

#[derive(Debug, clap::Args)]
pub(super) struct List {
    #[command(flatten)]
    client: ClientArgs,
    #[command(flatten)]
    part: Part,
}

#[derive(Debug, clap::Args)]
pub(super) struct One {
    #[command(flatten)]
    client: ClientArgs,
    /// Its number
    number: u64,
}

#[derive(Debug, clap::Args)]
pub(super) struct Cancel {
    #[command(flatten)]
    client: ClientArgs,
    #[command(flatten)]
    by: By,
    /// Its number
    number: u64,
}

/// What a person sees of a redrive.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Redrive {
    pub(super) number: u64,
    of: String,
    filter: Option<Box<RawValue>>,
    action: String,
    state: String,
    total: u64,
    /// Of a cancelled one it may be unknown.
    done: Option<u64>,
    left: u64,
    rate: Option<u32>,
    by: String,
    reason: Option<String>,
    started_at: String,
    ended_at: Option<String>,
}

impl Redrive {
    fn is_running(&self) -> bool {
        self.state == "running"
    }

    /// In one line.
    pub(super) fn summary(&self) -> String {
        let Self { number, total, state, .. } = self;
        let verb = match &*self.action {
            "retry" => "retried",
            "discard" => "discarded",
            other => other,
        };
        let of = match &*self.of {
            "dead-letters" => "dead letters",
            "quarantine" => "quarantine entries",
            other => other,
        };
        match self.done {
            _ if *total == 0 => {
                format!("redrive {number} is {state}: no {of} matched, or another redrive has them")
            }
            Some(done) => format!("redrive {number} is {state}: {done} of {total} {of} {verb}"),
            None => format!("redrive {number} is {state}; it had taken up {total} {of}"),
        }
    }

    fn filter(&self) -> String {
        self.filter.as_ref().map(|filter| output::one_line(filter.get())).unwrap_or_default()
    }
}

pub(super) async fn run(settings: &SettingsArgs, command: Command) -> Result<(), Failure> {
    match command {
        Command::List(args) => list(settings, &args).await,
        Command::Show(args) => {
            let client = args.client.client(settings)?;
            show(&get(&client, args.number).await?, args.client.json)
        }
        Command::Cancel(args) => {
            let client = args.client.client(settings)?;
            let number = args.number.to_string();
            let path = ["v1", "redrives", &number, "cancel"];
            let answer: Box<RawValue> = client.tell(&path, &args.by.query(), None).await?;
            print(&answer, args.client.json)?;
            Ok(())
        }
        Command::Wait(args) => {
            let client = args.client.client(settings)?;
            wait(&client, args.number, args.client.json).await
        }
    }
}

async fn list(settings: &SettingsArgs, args: &List) -> Result<(), Failure> {
    let client = args.client.client(settings)?;
    let found = pages::list(&client, &["v1", "redrives"], "redrives", &[], &args.part).await?;
    if args.client.json {
        output::print_json(found.iter().map(|redrive| &**redrive))?;
        return Ok(());
    }
    let mut rows = Vec::new();
    for redrive in &found {
        let redrive: Redrive = events::parse(redrive)?;
        let filter = redrive.filter();
        rows.push([
            redrive.number.to_string(),
            redrive.state,
            redrive.action,
            redrive.of,
            match redrive.done {
                Some(done) => format!("{done}/{}", redrive.total),
                None => format!("?/{}", redrive.total),
            },
            redrive.by,
            redrive.started_at,
            filter,
        ]);
    }
    if rows.is_empty() {
        output::print("no redrives")?;
    } else {
        let headings = ["NUMBER", "STATE", "ACTION", "OF", "DONE", "BY", "STARTED", "FILTER"];
        output::print(&output::table(headings, &rows))?;
    }
    Ok(())
}

fn show(redrive: &RawValue, json: bool) -> Result<(), Failure> {
    if json {
        output::print_json([redrive])?;
        return Ok(());
    }
    let redrive: Redrive = events::parse(redrive)?;
    let filter = redrive.filter();
    let fields = [
        ("number", redrive.number.to_string()),
        ("state", redrive.state),
        ("action", redrive.action),
        ("of", redrive.of),
        ("filter", filter),
        ("done", redrive.done.map(|done| done.to_string()).unwrap_or_default()),
        ("left", redrive.left.to_string()),
        ("total", redrive.total.to_string()),
        ("rate", redrive.rate.map(|rate| format!("{rate} a second")).unwrap_or_default()),
        ("by", redrive.by),
        ("reason", redrive.reason.unwrap_or_default()),
        ("started", redrive.started_at),
        ("ended", redrive.ended_at.unwrap_or_default()),
    ];
    output::print(&output::fields(&fields))?;
    Ok(())
}

/// Prints a redrive as the outcome of a command.
pub(super) fn print(redrive: &RawValue, json: bool) -> Result<(), Failure> {
    if json {
        output::print_json([redrive])?;
    } else {
        output::print(&output::harmless(&events::parse::<Redrive>(redrive)?.summary()))?;
    }
    Ok(())
}

async fn get(client: &Client, number: u64) -> Result<Box<RawValue>, super::client::RequestError> {
    client.get(&["v1", "redrives", &number.to_string()], &[]).await
}

/// Waits until a redrive has ended, and prints how.
pub(super) async fn wait(client: &Client, number: u64, json: bool) -> Result<(), Failure> {
    let goes_on = format!(
        "redrive {number} goes on in the daemon; `redrives wait {number}` follows it, `redrives \
         cancel {number}` ends it"
    );
    let look = async || {
        let answer = get(client, number).await?;
        let redrive: Redrive =
            serde_json::from_str(answer.get()).map_err(|error| client.strange(error))?;
        let Redrive { done, total, .. } = redrive;
        Ok(if redrive.is_running() {
            Look::Underway { done: done.unwrap_or_default(), total, held_up: None }
        } else {
            Look::Ended((answer, redrive))
        })
    };
    let (answer, redrive) = follow(&format!("redrive {number}"), &goes_on, look).await?;
    print(&answer, json)?;
    if redrive.state == "done" { Ok(()) } else { Err(Failure::Silent(FAILED.into())) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_redrive_is_summed_up() {
        let summary = |text: &str| serde_json::from_str::<Redrive>(text).unwrap().summary();
        assert_eq!(
            summary(
                r#"{"number": 3, "of": "dead-letters", "filter": {}, "action": "retry",
                    "state": "running", "total": 9, "done": 2, "left": 7}"#
            ),
            "redrive 3 is running: 2 of 9 dead letters retried"
        );
        assert_eq!(
            summary(r#"{"number": 4, "of": "quarantine", "action": "discard", "state": "done"}"#),
            "redrive 4 is done: no quarantine entries matched, or another redrive has them"
        );
        assert_eq!(
            summary(r#"{"number": 5, "of": "dead-letters", "state": "cancelled", "total": 7}"#),
            "redrive 5 is cancelled; it had taken up 7 dead letters"
        );
    }
}
