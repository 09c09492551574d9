//! The reference of the configuration file for people: `docs/configuration.md`.
//!
//! Made from the schema, and so from the types that the file is read into: there is no key in one
//! that is not in the other.

use std::fmt::Write as _;

use serde_json::Value;

use super::schema;

/// What stands before the tables.
const HEAD: &str = "\
# Configuration

<!-- Written by `pulsebus config reference`; a test holds it against the code. -->

Every key may be left out. Values come from, the later the stronger: the defaults below; a TOML file
(`--config`, else `$PULSEBUS_CONFIG`, else `/etc/pulsebus/pulsebus.toml`); variables; flags (`--set
KEY=VALUE`, `--data-dir`, `--listen`, `--log`). Unknown keys are errors. `pulsebus check` finds all that is wrong
without connecting, `pulsebus config show` prints what is in effect and where each value came from, and
`pulsebus config schema` is the same as this page for editors. [pulsebus.toml](../config/pulsebus.toml)
has every key in place, with comments.

**Variables** are `PULSEBUS_` and the key, with `__` between its parts: `PULSEBUS_HTTP__LISTEN`. `NAME` in
them is the name of your transport, source or handler, in capitals, with `_` for `-`.

**Secrets** are given in place, or in a file by the key with `_file` behind it, or as a systemd credential of the
key's name (`http.token`, `transports.NAME.password`). Files are read again when the secret is needed.

**Types.** A *duration* is a number and its unit: `200ms`, `30s`, `5m`, `1h 30m`. A *size* is in bytes, or has
a unit: `64MiB`, `1GiB`, `500kB`. *Required* means required where the table is there.
";

/// The reference as Markdown: each table of the file, each key with type, default, variable and
/// meaning. What `config reference` prints.
#[must_use]
pub fn reference() -> String {
    let root = schema();
    let mut page = Page { root: &root, text: HEAD.to_owned() };
    page.table(&root, "", None);
    page.text
}

struct Page<'a> {
    root: &'a Value,
    text: String,
}

/// What a key's value is.
enum Kind<'a> {
    /// A table with keys of its own.
    Table(&'a Value),
    /// Tables by a name of the user's own.
    Named(&'a Value),
    /// A list of tables.
    List(&'a Value),
    /// Anything else, in words.
    Plain(String),
}

impl<'a> Page<'a> {
    fn table(&mut self, schema: &'a Value, path: &str, about: Option<String>) {
        let Some(Value::Object(properties)) = schema.get("properties") else { return };
        let title = if path.is_empty() { "At the top".to_owned() } else { format!("`[{path}]`") };
        // Writing to a string does not fail.
        let _ = writeln!(self.text, "\n## {title}\n");
        if let Some(text) = about {
            let _ = writeln!(self.text, "{text}\n");
        }
        let (mut plain, mut below) = (Vec::new(), Vec::new());
        for (key, property) in properties {
            let inner = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
            match self.kind(property) {
                Kind::Plain(kind) => plain.push((key, property, kind)),
                Kind::Table(table) => below.push((inner, table, property)),
                Kind::Named(table) => below.push((format!("{inner}.NAME"), table, property)),
                Kind::List(table) => {
                    plain.push((key, property, "list of tables, see below".to_owned()));
                    below.push((inner, table, property));
                }
            }
        }
        if !plain.is_empty() {
            self.text
                .push_str("| key | type | default | variable | meaning |\n|---|---|---|---|---|\n");
        }
        for (key, property, kind) in plain {
            let meaning = description(property).unwrap_or_default();
            let default = match property.get("default") {
                Some(default) => format!("`{}`", toml_text(default)),
                None if meaning.contains("Required.") || meaning.contains("Required,") => {
                    "required".to_owned()
                }
                None => "none".to_owned(),
            };
            let variable = variable(path, key, &kind);
            let _ = writeln!(
                self.text,
                "| `{key}` | {} | {} | {variable} | {} |",
                cell(&kind),
                cell(&default),
                cell(&meaning)
            );
        }
        for (inner, table, property) in below {
            // What the key means says more than what its type is in general.
            self.table(table, &inner, description(property).or_else(|| description(table)));
        }
    }

    fn kind(&self, property: &'a Value) -> Kind<'a> {
        let schema = self.resolved(property);
        if schema.get("properties").is_some() {
            return Kind::Table(schema);
        }
        if let Some(values) = schema.get("additionalProperties").filter(|v| v.is_object()) {
            let values = self.resolved(values);
            return if values.get("properties").is_some() {
                Kind::Named(values)
            } else {
                Kind::Plain("table of text".to_owned())
            };
        }
        if let Some(items) = schema.get("items") {
            let items = self.resolved(items);
            return if items.get("properties").is_some() {
                Kind::List(items)
            } else {
                Kind::Plain("list of text".to_owned())
            };
        }
        Kind::Plain(words(property, schema))
    }

    fn resolved(&self, schema: &'a Value) -> &'a Value {
        let name = schema.get("$ref").and_then(Value::as_str);
        name.and_then(|name| self.root.pointer(name.trim_start_matches('#'))).unwrap_or(schema)
    }
}

/// The type of a plain value, in words.
fn words(property: &Value, schema: &Value) -> String {
    let named = property.get("$ref").and_then(Value::as_str).unwrap_or_default();
    if let Some(Value::Array(choices)) = schema.get("enum") {
        return choices
            .iter()
            .map(|choice| format!("`{}`", bare(choice)))
            .collect::<Vec<_>>()
            .join(", ");
    }
    if let Some(Value::Array(choices)) = schema.get("oneOf") {
        let choices = choices.iter().filter_map(|choice| choice.get("const"));
        return choices.map(|choice| format!("`{}`", bare(choice))).collect::<Vec<_>>().join(", ");
    }
    match named.rsplit('/').next() {
        Some("Duration") => return "duration".to_owned(),
        Some("Size") => return "size".to_owned(),
        Some("Secret") => return "secret".to_owned(),
        _ => {}
    }
    match schema.get("type").and_then(Value::as_str) {
        Some("boolean") => "`true`, `false`",
        Some("integer") => "whole number",
        Some("number") => "number",
        Some("object") => "table",
        _ => "text",
    }
    .to_owned()
}

/// The variable that sets a key. A list or a table is set in the file.
fn variable(table: &str, key: &str, kind: &str) -> String {
    let listed = table.split('.').any(|part| part == "bind");
    if listed || kind.starts_with("list") || kind.starts_with("table") {
        return String::new();
    }
    let path = if table.is_empty() { key.to_owned() } else { format!("{table}.{key}") };
    format!("`PULSEBUS_{}`", path.to_uppercase().replace('.', "__"))
}

fn description(schema: &Value) -> Option<String> {
    schema.get("description").and_then(Value::as_str).map(|text| text.replace('\n', " "))
}

fn bare(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

/// A value as it is written in the file.
fn toml_text(value: &Value) -> String {
    match value {
        Value::Object(table) if table.is_empty() => "{}".to_owned(),
        Value::Number(number) if number.as_f64().is_some_and(|n| n.fract() == 0.0) => {
            number.as_f64().map_or_else(|| number.to_string(), |n| format!("{n}"))
        }
        other => other.to_string(),
    }
}

/// Text that fits a cell.
fn cell(text: &str) -> String {
    text.replace('|', "\\|")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_in_docs_is_the_reference() {
        let page = include_str!("../../docs/configuration.md");
        assert!(
            page == reference(),
            "docs/configuration.md is not what the code says: write it again with \
             `cargo run -- config reference > docs/configuration.md`"
        );
    }

    #[test]
    fn every_key_of_the_schema_has_a_line_and_a_meaning() {
        fn keys(value: &Value, found: &mut usize) {
            if let Value::Object(object) = value {
                if let Some(Value::Object(properties)) = object.get("properties") {
                    *found += properties.len();
                }
                object.values().for_each(|value| keys(value, found));
            }
        }
        let page = reference();
        let mut found = 0;
        keys(&schema(), &mut found);
        let lines = page.lines().filter(|line| line.starts_with("| `")).count();
        let tables = page.lines().filter(|line| line.starts_with("## `[")).count();
        // The tables of TLS are of two kinds for brokers and Postgres; each definition has one place
        // in the file but for none.
        assert!(
            found > 90 && lines + tables >= found,
            "{found} keys, {lines} lines, {tables} tables"
        );
        for line in page.lines().filter(|line| line.starts_with("| `")) {
            assert!(!line.ends_with("|  |"), "no meaning: {line}");
        }
        for expected in [
            "| `token_file` | text | none | `PULSEBUS_HTTP__TOKEN_FILE` |",
            "| `prefetch` | whole number | `1000` | `PULSEBUS_SOURCES__NAME__PREFETCH` |",
            "| `ack_wait` | duration | `\"30s\"` |",
            "## `[handlers.NAME.documents.NAME]`",
            "## `[sources.NAME.create.bind]`",
        ] {
            assert!(page.contains(expected), "{expected}");
        }
    }
}
