//! `search QUERY`.

use serde::Deserialize;
use serde_json::{Map, Value, value::RawValue};

use super::{Failure, SettingsArgs, client::ClientArgs, output};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    client: ClientArgs,
    /// What to look for: words, "a phrase", field:word, AND, OR, -not
    #[arg(required = true)]
    query: Vec<String>,
    /// The search handler whose index is asked
    #[arg(long, default_value = "search")]
    handler: String,
    /// How many hits at most
    #[arg(long, short = 'n', default_value_t = 10)]
    limit: usize,
}

#[derive(Debug, Deserialize)]
struct Answer {
    total: u64,
    hits: Vec<Box<RawValue>>,
}

#[derive(Debug, Deserialize)]
struct Hit {
    id: String,
    #[serde(rename = "type", default)]
    kind: String,
    #[serde(default)]
    position: u64,
    #[serde(default)]
    score: f64,
    #[serde(default)]
    fields: Map<String, Value>,
    #[serde(default)]
    snippets: Map<String, Value>,
}

pub(super) async fn run(settings: &SettingsArgs, args: Args) -> Result<(), Failure> {
    let client = args.client.client(settings)?;
    let query = [("q", args.query.join(" ")), ("limit", args.limit.to_string())];
    let answer: Answer = client.get(&["v1", "search", &args.handler], &query).await?;
    if args.client.json {
        output::print_json(answer.hits.iter().map(|hit| &**hit))?;
        return Ok(());
    }
    let mut rows = Vec::new();
    for hit in &answer.hits {
        let hit: Hit = super::events::parse(hit)?;
        let snippet = join(&hit.snippets);
        let text = if snippet.is_empty() { join(&hit.fields) } else { snippet };
        rows.push([
            format!("{:.2}", hit.score),
            hit.position.to_string(),
            hit.kind,
            hit.id,
            output::shortened(&text, 120),
        ]);
    }
    let shown = answer.hits.len();
    let total = answer.total;
    if rows.is_empty() {
        output::print("nothing found")?;
    } else {
        let table = output::table(["SCORE", "POSITION", "TYPE", "ID", "TEXT"], &rows);
        output::print(&format!("{table}\n{shown} of {total}"))?;
    }
    Ok(())
}

/// The texts of a hit, without the marks that highlight words for a browser.
fn join(values: &Map<String, Value>) -> String {
    let text = |value: &Value| match value {
        Value::String(text) => text.replace("<b>", "").replace("</b>", ""),
        other => other.to_string(),
    };
    let texts: Vec<_> =
        values.iter().map(|(field, value)| format!("{field}: {}", text(value))).collect();
    texts.join("; ")
}
