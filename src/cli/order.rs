//! What retrying and discarding have in common, be it dead letters or quarantine.

use clap::builder::NonEmptyStringValueParser;
use serde::Deserialize;
use serde_json::{Map, Value, json, value::RawValue};

use super::{
    Failure, SettingsArgs, client::ClientArgs, events, moment::Moment, output, progress::WaitArgs,
    redrives,
};

/// Who wants something, for the audit.
#[derive(Debug, clap::Args)]
pub(super) struct By {
    /// Who wants it, for the audit
    #[arg(long, value_name = "NAME", env = "USER", hide_env_values = true, default_value = "cli")]
    by: String,
}

impl By {
    pub(super) fn name(&self) -> &str {
        if self.by.is_empty() { "cli" } else { &self.by }
    }

    pub(super) fn query(&self) -> [(&'static str, String); 1] {
        [("by", self.name().to_owned())]
    }
}

/// How something is retried or discarded.
#[derive(Debug, clap::Args)]
pub(super) struct Order {
    #[command(flatten)]
    client: ClientArgs,
    /// All there are; needed where no filter says which
    #[arg(long)]
    all: bool,
    /// Only says how many there are
    #[arg(long)]
    dry_run: bool,
    /// So many a second at most [default: as fast as it goes]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    rate: Option<u32>,
    #[command(flatten)]
    by: By,
    #[command(flatten)]
    wait: WaitArgs,
}

/// Why something is retried.
#[derive(Debug, clap::Args)]
pub(super) struct Retry<F: clap::Args> {
    #[command(flatten)]
    pub(super) order: Order,
    /// Why, for the audit
    #[arg(long, value_name = "TEXT", value_parser = NonEmptyStringValueParser::new())]
    pub(super) reason: Option<String>,
    // Last: its heading is for what follows, too.
    #[command(flatten)]
    pub(super) filter: F,
}

/// Why something is discarded.
#[derive(Debug, clap::Args)]
pub(super) struct Discard<F: clap::Args> {
    #[command(flatten)]
    pub(super) order: Order,
    /// Why, for those who look for it later
    #[arg(long, value_name = "TEXT", value_parser = NonEmptyStringValueParser::new())]
    #[arg(required_unless_present = "dry_run")]
    pub(super) reason: Option<String>,
    // Last: its heading is for what follows, too.
    #[command(flatten)]
    pub(super) filter: F,
}

/// The conditions of a filter that are given.
#[derive(Debug, Default)]
pub(super) struct Conditions(Map<String, Value>);

impl Conditions {
    pub(super) fn text(mut self, name: &str, value: Option<&String>) -> Self {
        self.0.extend(value.map(|value| (name.to_owned(), json!(value))));
        self
    }

    pub(super) fn moment(mut self, name: &str, value: Option<&Moment>) -> Self {
        self.0.extend(value.map(|value| (name.to_owned(), value.to_json())));
        self
    }

    pub(super) fn numbers(mut self, name: &str, values: &[u64]) -> Self {
        if !values.is_empty() {
            self.0.insert(name.to_owned(), json!(values));
        }
        self
    }
}

/// What became of an order.
#[derive(Debug, Deserialize)]
struct Answer {
    matching: Option<u64>,
    redrive: Option<Box<RawValue>>,
}

/// Orders that all be retried or discarded for which these conditions hold: `what`, `dead-letters`
/// or `quarantine`, and `action` are as in the API's path.
pub(super) async fn give(
    settings: &SettingsArgs,
    (what, action): (&str, &str),
    Conditions(filter): Conditions,
    order: &Order,
    reason: Option<&str>,
) -> Result<(), Failure> {
    match (filter.is_empty(), order.all) {
        (true, false) => {
            return Err(Failure::Usage(format!(
                "no filter is given: say --all to {action} all there are, or which ones (see \
                 `{what} {action} --help`)"
            )));
        }
        (false, true) => {
            return Err(Failure::Usage("give filters or --all, not both".to_owned()));
        }
        _ => {}
    }
    let Order { client: args, dry_run, rate, by, wait, .. } = order;
    let client = args.client(settings)?;
    let body = json!({
        "filter": filter,
        "dry_run": dry_run,
        "rate": rate,
        "by": by.name(),
        "reason": reason,
    });
    let answer: Box<RawValue> = client.tell(&["v1", what, action], &[], Some(&body)).await?;
    let Answer { matching, redrive } = events::parse(&answer)?;
    match (matching, redrive) {
        (Some(matching), _) if args.json => {
            output::print(&json!({ "matching": matching }).to_string())?;
        }
        (Some(matching), _) => output::print(&format!("{matching} match; nothing was done"))?,
        (None, Some(redrive)) if wait.wanted() => {
            let number = events::parse::<redrives::Redrive>(&redrive)?.number;
            redrives::wait(&client, number, args.json).await?;
        }
        (None, Some(redrive)) => redrives::print(&redrive, args.json)?,
        (None, None) => {
            let error = serde::de::Error::custom("neither a count nor a redrive");
            return Err(client.strange(error).into());
        }
    }
    Ok(())
}
