//! Lists that the daemon gives in pages.

use std::collections::BTreeMap;

use serde::de::Error as _;
use serde_json::value::RawValue;

use super::client::{Client, RequestError};

/// The most that the daemon gives at once.
const PAGE: usize = 1_000;

/// Which part of a list.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct Part {
    /// Goes on behind this one: the number last seen
    #[arg(long, value_name = "NUMBER")]
    pub(super) after: Option<u64>,
    #[command(flatten)]
    pub(super) most: Most,
}

/// How much of a list.
#[derive(Debug, Clone, Copy, clap::Args)]
pub(super) struct Most {
    /// How many at most
    #[arg(long, short = 'n', default_value_t = 50)]
    pub(super) limit: usize,
}

/// The entries of a list, called `member` in the daemon's answers, as far as they are asked for.
pub(super) async fn list(
    client: &Client,
    path: &[&str],
    member: &str,
    filter: &[(&'static str, String)],
    part: &Part,
) -> Result<Vec<Box<RawValue>>, RequestError> {
    let mut found: Vec<Box<RawValue>> = Vec::new();
    let mut after = part.after.map(|after| after.to_string());
    while found.len() < part.most.limit {
        let asked = (part.most.limit - found.len()).min(PAGE);
        let mut query = filter.to_vec();
        query.push(("limit", asked.to_string()));
        query.extend(after.take().map(|after| ("after", after)));
        let answer: BTreeMap<String, Box<RawValue>> = client.get(path, &query).await?;
        let entries = match answer.get(member) {
            Some(entries) => serde_json::from_str::<Vec<Box<RawValue>>>(entries.get()),
            None => Err(serde_json::Error::custom(format_args!("no `{member}`"))),
        };
        found.extend(entries.map_err(|error| client.strange(error))?);
        let next = answer.get("next").map_or("null", |next| next.get());
        if next == "null" {
            break;
        }
        // A number, or a text.
        after = Some(serde_json::from_str(next).unwrap_or_else(|_| next.to_owned()));
    }
    Ok(found)
}
