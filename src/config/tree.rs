//! The layers of values, merged: what is set, and by whom.

use std::{collections::HashMap, fmt, path::Path};

use figment::{
    Figment, Metadata, Profile, Provider, Source,
    value::{Dict, Map, Num, Value},
};
use toml::de::{DeTable, DeValue};

use super::error::ConfigError;

/// The prefix of the variables that hold values.
const PREFIX: &str = "PULSEBUS_";

/// Variables of that prefix which are for the command line and hold no value of the file.
const RESERVED: &[&str] = &[
    "PULSEBUS_CONFIG",
    "PULSEBUS_URL",
    "PULSEBUS_TOKEN_FILE",
    "PULSEBUS_CA_FILE",
    "PULSEBUS_CERT_FILE",
    "PULSEBUS_KEY_FILE",
];

/// Which layer a value came from; later ones win.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Layer {
    File,
    Environment,
    Flag,
}

/// The merged values with their origins. Secrets are among them.
pub(super) struct Tree {
    figment: Figment,
    pub(super) root: Dict,
    /// Where in the file each key stands.
    lines: HashMap<Vec<String>, usize>,
}

impl fmt::Debug for Tree {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tree").finish_non_exhaustive()
    }
}

impl Tree {
    pub(super) fn new() -> Self {
        Self { figment: Figment::new(), root: Dict::new(), lines: HashMap::new() }
    }

    /// Adds a TOML file. Errors name line and column and show nothing of the text, which may
    /// be a secret.
    pub(super) fn add_file(&mut self, path: &Path, text: &str, errors: &mut Vec<ConfigError>) {
        let (table, wrong) = DeTable::parse_recoverable(text);
        for error in &wrong {
            let place = error.span().map(|span| {
                let before = text.get(..span.start).unwrap_or(text);
                let column = before.chars().rev().take_while(|c| *c != '\n').count() + 1;
                (line_of(text, span.start), column)
            });
            errors.push(ConfigError {
                origin: Some(place.map_or_else(
                    || path.display().to_string(),
                    |(line, column)| format!("{}:{line}:{column}", path.display()),
                )),
                key: String::new(),
                problem: format!("not TOML: {}", error.message()),
            });
        }
        let mut at = Vec::new();
        let dict = convert(table.get_ref(), text, &mut at, &mut self.lines);
        let metadata = Metadata::named("file").source(Source::File(path.to_owned()));
        self.add(metadata, dict);
    }

    /// Adds the variables that hold values, one by one, so that each error names its own.
    pub(super) fn add_variables(&mut self, variables: &[(String, String)]) {
        for (name, text) in variables {
            if RESERVED.contains(&name.as_str()) || is_service_link(name, text) {
                continue;
            }
            let Some(rest) = name.strip_prefix(PREFIX).filter(|rest| !rest.is_empty()) else {
                continue;
            };
            let path = self.existing_path(rest.split("__"));
            let metadata =
                Metadata::named(name.clone()).source(Source::Custom("environment".to_owned()));
            self.add(metadata, nested(&path, from_text(text)));
        }
    }

    /// Adds a flag's value.
    pub(super) fn add_flag(&mut self, flag: &str, key: &str, text: &str) {
        let path: Vec<_> = key.split('.').map(str::to_owned).collect();
        let metadata = Metadata::named(flag.to_owned()).source(Source::Custom("flag".to_owned()));
        self.add(metadata, nested(&path, from_text(text)));
    }

    fn add(&mut self, metadata: Metadata, dict: Dict) {
        let figment = std::mem::take(&mut self.figment);
        self.figment = figment.merge(Values { metadata, dict });
        // `Values` never fails, so neither does this.
        if let Ok(Value::Dict(_, root)) = self.figment.find_value("") {
            self.root = root;
        }
    }

    /// The path a variable means: a shell can write neither `-` nor, by custom, lower case, so
    /// a name that is there already is found in spite of both.
    fn existing_path<'a>(&self, segments: impl Iterator<Item = &'a str>) -> Vec<String> {
        let plain = |name: &str| name.to_ascii_lowercase().replace('-', "_");
        let mut here = Some(&self.root);
        let mut path = Vec::new();
        for segment in segments {
            let wanted = plain(segment);
            let found = here.and_then(|dict| dict.iter().find(|(name, _)| plain(name) == wanted));
            path.push(found.map_or(wanted, |(name, _)| name.clone()));
            here = found.and_then(|(_, value)| value.as_dict());
        }
        path
    }

    /// The value at a path.
    pub(super) fn get(&self, path: &[&str]) -> Option<&Value> {
        let (first, rest) = path.split_first()?;
        rest.iter().try_fold(self.root.get(*first)?, |value, key| child(value, key))
    }

    /// The keys of the table at a path.
    pub(super) fn keys(&self, path: &[&str]) -> Vec<String> {
        self.get(path)
            .and_then(Value::as_dict)
            .map(|dict| dict.keys().cloned().collect())
            .unwrap_or_default()
    }

    /// Which layer set the value at a path.
    pub(super) fn layer(&self, path: &[&str]) -> Option<Layer> {
        let metadata = self.figment.get_metadata(self.get(path)?.tag())?;
        Some(match &metadata.source {
            Some(Source::File(_)) => Layer::File,
            Some(Source::Custom(kind)) if kind == "flag" => Layer::Flag,
            _ => Layer::Environment,
        })
    }

    /// Who set the value at a path, or the nearest table around it: `FILE:LINE`, a variable's
    /// or a flag's name.
    pub(super) fn origin(&self, path: &[&str]) -> Option<String> {
        let (depth, value) =
            (1..=path.len()).rev().find_map(|depth| Some((depth, self.get(&path[..depth])?)))?;
        let metadata = self.figment.get_metadata(value.tag())?;
        Some(match &metadata.source {
            Some(Source::File(file)) => self.place(file, &path[..depth]),
            _ => metadata.name.to_string(),
        })
    }

    fn place(&self, file: &Path, path: &[&str]) -> String {
        let line = (1..=path.len()).rev().find_map(|depth| {
            let key: Vec<_> = path[..depth].iter().map(|&key| key.to_owned()).collect();
            self.lines.get(&key)
        });
        line.map_or_else(|| file.display().to_string(), |line| format!("{}:{line}", file.display()))
    }

    /// Takes the value at a path out. False where there is none.
    pub(super) fn remove(root: &mut Dict, path: &[String]) -> bool {
        let Some((last, parents)) = path.split_last() else { return false };
        let Some((first, rest)) = parents.split_first() else {
            return root.remove(last).is_some();
        };
        let mut value = root.get_mut(first);
        for key in rest {
            value = value.and_then(|value| match value {
                Value::Dict(_, dict) => dict.get_mut(key),
                Value::Array(_, list) => list.get_mut(key.parse::<usize>().ok()?),
                _ => None,
            });
        }
        match value {
            Some(Value::Dict(_, dict)) => dict.remove(last).is_some(),
            Some(Value::Array(_, list)) => match last.parse::<usize>() {
                Ok(i) if i < list.len() => {
                    list.remove(i);
                    true
                }
                _ => false,
            },
            _ => false,
        }
    }
}

fn child<'a>(value: &'a Value, key: &str) -> Option<&'a Value> {
    match value {
        Value::Dict(_, dict) => dict.get(key),
        Value::Array(_, list) => list.get(key.parse::<usize>().ok()?),
        _ => None,
    }
}

/// A path as it is written in an error: `transports.nats.url`, `create.bind[0].exchange`.
pub(super) fn key_text(path: &[impl AsRef<str>]) -> String {
    let mut text = String::new();
    for part in path {
        let part = part.as_ref();
        if !text.is_empty() && !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit()) {
            text.push('[');
            text.push_str(part);
            text.push(']');
            continue;
        }
        if !text.is_empty() {
            text.push('.');
        }
        text.push_str(&bare(part));
    }
    text
}

/// A key as TOML writes it: in quotes where it must be.
pub(super) fn bare(key: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    if !key.is_empty() && key.chars().all(plain) {
        key.to_owned()
    } else {
        toml::Value::String(key.to_owned()).to_string()
    }
}

/// Kubernetes and Docker give every container `NAME_PORT`, `NAME_SERVICE_HOST` … for each
/// service near it; for one called `pulsebus` they look like ours and are not. The value tells
/// them from somebody who means to set a port.
fn is_service_link(name: &str, text: &str) -> bool {
    let Some(name) = name.strip_prefix("PULSEBUS").filter(|name| !name.contains("__")) else {
        return false;
    };
    let of_a_port = |rest: &str| match rest.strip_prefix('_') {
        Some(rest) => rest.starts_with(|c: char| c.is_ascii_digit()),
        None => rest.is_empty() && text.contains("://"),
    };
    name.ends_with("_SERVICE_HOST")
        || name.contains("_SERVICE_PORT")
        || name.rfind("_PORT").is_some_and(|at| of_a_port(&name[at + "_PORT".len()..]))
}

/// A variable's or flag's text: a list, a table or a quoted string where it is one in TOML,
/// else the text as it is. Numbers and booleans are recognised where one is expected, and
/// nowhere else: a password of digits stays as it was written.
fn from_text(text: &str) -> Value {
    if text.trim_start().starts_with(['[', '{', '"']) {
        let line = format!("value = {}", text.trim());
        if let Ok(table) = DeTable::parse(&line) {
            let mut dict = convert(table.get_ref(), &line, &mut Vec::new(), &mut HashMap::new());
            if let (Some(value), true) = (dict.remove("value"), dict.is_empty()) {
                return value;
            }
        }
    }
    Value::from(text)
}

fn nested(path: &[String], value: Value) -> Dict {
    let mut value = value;
    let mut dict = Dict::new();
    for key in path.iter().rev() {
        dict = Dict::new();
        dict.insert(key.clone(), value);
        value = Value::from(dict.clone());
    }
    dict
}

fn line_of(text: &str, at: usize) -> usize {
    text.as_bytes().iter().take(at).filter(|byte| **byte == b'\n').count() + 1
}

fn convert(
    table: &DeTable<'_>,
    text: &str,
    at: &mut Vec<String>,
    lines: &mut HashMap<Vec<String>, usize>,
) -> Dict {
    let mut dict = Dict::new();
    for (key, value) in table {
        at.push(key.get_ref().to_string());
        lines.insert(at.clone(), line_of(text, key.span().start));
        dict.insert(key.get_ref().to_string(), convert_value(value.get_ref(), text, at, lines));
        at.pop();
    }
    dict
}

fn convert_value(
    value: &DeValue<'_>,
    text: &str,
    at: &mut Vec<String>,
    lines: &mut HashMap<Vec<String>, usize>,
) -> Value {
    match value {
        DeValue::String(string) => Value::from(string.to_string()),
        DeValue::Integer(number) => i64::from_str_radix(number.as_str(), number.radix())
            .map_or_else(|_| Value::from(number.to_string()), |n| Value::from(Num::I64(n))),
        DeValue::Float(number) => number
            .as_str()
            .parse::<f64>()
            .map_or_else(|_| Value::from(number.to_string()), |n| Value::from(Num::F64(n))),
        DeValue::Boolean(value) => Value::from(*value),
        DeValue::Datetime(at) => Value::from(at.to_string()),
        DeValue::Array(list) => {
            let mut values = Vec::with_capacity(list.len());
            for (i, item) in list.iter().enumerate() {
                at.push(i.to_string());
                lines.insert(at.clone(), line_of(text, item.span().start));
                values.push(convert_value(item.get_ref(), text, at, lines));
                at.pop();
            }
            Value::from(values)
        }
        DeValue::Table(table) => Value::from(convert(table, text, at, lines)),
    }
}

/// A layer, as figment takes it.
struct Values {
    metadata: Metadata,
    dict: Dict,
}

impl Provider for Values {
    fn metadata(&self) -> Metadata {
        self.metadata.clone()
    }

    fn data(&self) -> Result<Map<Profile, Dict>, figment::Error> {
        Ok(Profile::Default.collect(self.dict.clone()))
    }
}

/// Values that are merged already, to be deserialised.
pub(super) struct Merged<'a>(pub(super) &'a Dict);

impl Provider for Merged<'_> {
    fn metadata(&self) -> Metadata {
        Metadata::named("merged")
    }

    fn data(&self) -> Result<Map<Profile, Dict>, figment::Error> {
        Ok(Profile::Default.collect(self.0.clone()))
    }
}
