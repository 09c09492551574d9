//! From file, environment and flags to [`Settings`].

use std::{
    fmt, fs, io,
    path::{Path, PathBuf},
};

use figment::{Figment, error::Actual, error::Kind};

use super::{
    error::{ConfigError, ConfigErrors, did_you_mean, one_of},
    raw::RawConfig,
    settings::Settings,
    show,
    tree::{Merged, Tree, key_text},
    validate,
};

/// The file that is read when none is named and it exists.
pub const DEFAULT_FILE: &str = "/etc/pulsebus/pulsebus.toml";

/// Where values come from, the later the stronger: the file, variables, flags.
#[derive(Clone, Default)]
pub struct Inputs {
    /// `--config`; `None`: `$PULSEBUS_CONFIG`, else [`DEFAULT_FILE`] where it exists.
    pub file: Option<PathBuf>,
    /// The environment: `PULSEBUS_` and the key, nested with `__`; also `STATE_DIRECTORY` and
    /// `CREDENTIALS_DIRECTORY`.
    pub variables: Vec<(String, String)>,
    /// Flags that set a key.
    pub flags: Vec<Flag>,
}

impl fmt::Debug for Inputs {
    /// Without the variables: they hold secrets, of others too.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Inputs")
            .field("file", &self.file)
            .field("flags", &self.flags)
            .finish_non_exhaustive()
    }
}

/// A flag that sets a key.
#[derive(Clone)]
pub struct Flag {
    /// The flag, for errors: `--listen`.
    pub flag: String,
    /// The key: `http.listen`.
    pub key: String,
    /// The value, as text.
    pub value: String,
}

impl fmt::Debug for Flag {
    /// Without the value, which may be a secret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}=…", self.flag, self.key)
    }
}

impl Inputs {
    /// With this process's environment.
    #[must_use]
    pub fn from_process(file: Option<PathBuf>, flags: Vec<Flag>) -> Self {
        let variables = std::env::vars_os()
            .map(|(name, value)| {
                (name.to_string_lossy().into_owned(), value.to_string_lossy().into_owned())
            })
            .collect();
        Self { file, variables, flags }
    }

    pub(super) fn variable(&self, name: &str) -> Option<&str> {
        let (_, value) = self.variables.iter().find(|(other, _)| other == name)?;
        Some(value.as_str()).filter(|value| !value.is_empty())
    }
}

/// A configuration that holds.
#[derive(Debug)]
pub struct Loaded {
    /// What it says.
    pub settings: Settings,
    /// The file that was read; `None` where there was none.
    pub file: Option<PathBuf>,
    /// What holds, and is perhaps not meant.
    pub warnings: Vec<ConfigError>,
    pub(super) tree: Tree,
}

impl Loaded {
    /// The effective configuration as TOML, defaults included, each value with its origin;
    /// secrets are left out.
    #[must_use]
    pub fn show(&self) -> String {
        show::show(&self.settings, &self.tree)
    }
}

/// Reads and checks a configuration, without connecting to anything.
///
/// # Errors
/// Everything that is wrong with it, together.
pub fn load(inputs: &Inputs) -> Result<Loaded, ConfigErrors> {
    let mut errors = Vec::new();
    let mut tree = Tree::new();

    let file = file(inputs);
    let mut file_read = None;
    if let Some((path, named)) = file {
        match fs::read_to_string(&path) {
            Ok(text) => {
                tree.add_file(&path, &text, &mut errors);
                file_read = Some(path);
            }
            Err(error) if !named && error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => errors.push(ConfigError {
                origin: Some(path.display().to_string()),
                key: String::new(),
                problem: format!("cannot be read: {error}; name another with --config"),
            }),
        }
    }
    if !errors.is_empty() {
        // Whatever else is missing may stand in the part that could not be read.
        return Err(ConfigErrors(errors));
    }
    tree.add_variables(&inputs.variables);
    for Flag { flag, key, value } in &inputs.flags {
        tree.add_flag(flag, key, value);
    }

    let mut broken = Vec::new();
    let raw = deserialize(&tree, &mut errors, &mut broken);
    let mut check = validate::Check { tree: &tree, inputs, broken, errors, warnings: Vec::new() };
    let settings = check.settings(&raw);
    if check.errors.is_empty() {
        let warnings = check.warnings;
        Ok(Loaded { settings, file: file_read, warnings, tree })
    } else {
        Err(ConfigErrors(check.errors))
    }
}

/// The file to read, and whether somebody asked for it.
fn file(inputs: &Inputs) -> Option<(PathBuf, bool)> {
    if let Some(path) = &inputs.file {
        return Some((path.clone(), true));
    }
    if let Some(path) = inputs.variable("PULSEBUS_CONFIG") {
        return Some((PathBuf::from(path), true));
    }
    Some((Path::new(DEFAULT_FILE).to_owned(), false))
}

/// Serde stops at the first error. Every key is optional, so the value it stopped at can be
/// noted, taken out, and the rest tried again, until nothing is wrong any more.
fn deserialize(
    tree: &Tree,
    errors: &mut Vec<ConfigError>,
    broken: &mut Vec<Vec<String>>,
) -> RawConfig {
    let mut root = tree.root.clone();
    loop {
        let error = match Figment::from(Merged(&root)).extract_lossy::<RawConfig>() {
            Ok(raw) => return raw,
            Err(error) => error,
        };
        let mut progress = false;
        for error in error {
            let mut path = error.path.clone();
            if let Kind::UnknownField(field, _) = &error.kind
                && path.last() != Some(field)
            {
                path.push(field.clone());
            }
            let borrowed: Vec<_> = path.iter().map(String::as_str).collect();
            errors.push(ConfigError {
                origin: tree.origin(&borrowed),
                key: key_text(&path),
                problem: problem(&error.kind),
            });
            progress |= Tree::remove(&mut root, &path);
            broken.push(path);
        }
        if !progress {
            return RawConfig::default();
        }
    }
}

/// What is wrong, in our words. Values are not repeated: any of them may be a secret in the
/// wrong place.
fn problem(kind: &Kind) -> String {
    match kind {
        Kind::UnknownField(field, known) => {
            let near = did_you_mean(field, known.iter().copied());
            if near.is_empty() {
                format!("unknown key; known here: {}", known.join(", "))
            } else {
                format!("unknown key{near}")
            }
        }
        Kind::UnknownVariant(_, known) => {
            format!("must be {}", one_of(known.iter().copied()))
        }
        Kind::InvalidType(found, expected) => {
            format!("expected {}, found {}", expectation(expected), type_of(found))
        }
        Kind::InvalidValue(_, expected) => format!("out of range: {}", expectation(expected)),
        Kind::InvalidLength(length, expected) => {
            format!("expected {}, found {length} of them", expectation(expected))
        }
        Kind::Message(message) => message.clone(),
        Kind::MissingField(field) => format!("missing key `{field}`"),
        Kind::DuplicateField(field) => format!("key `{field}` given twice"),
        Kind::ISizeOutOfRange(_) | Kind::USizeOutOfRange(_) => "number out of range".to_owned(),
        Kind::Unsupported(found) | Kind::UnsupportedKey(found, _) => {
            format!("{} cannot stand here", type_of(found))
        }
    }
}

fn expectation(expected: &str) -> String {
    match expected {
        "a string" | "path string" | "string or map" => "text in quotes".to_owned(),
        "a boolean" => "true or false".to_owned(),
        "a sequence" => "a list in [ ]".to_owned(),
        "a map" => "a table".to_owned(),
        "usize" | "u64" | "u32" => "a whole number, 0 or more".to_owned(),
        "u16" => "a whole number, 0 to 65,535".to_owned(),
        "i64" => "a whole number".to_owned(),
        other if other.starts_with("struct Raw") => "a table".to_owned(),
        other if other.starts_with("enum ") || other.contains("variant") => {
            "text in quotes".to_owned()
        }
        other => other.to_owned(),
    }
}

const fn type_of(found: &Actual) -> &'static str {
    match found {
        Actual::Bool(_) => "true or false",
        Actual::Unsigned(_) | Actual::Signed(_) => "a whole number",
        Actual::Float(_) => "a number",
        Actual::Char(_) | Actual::Str(_) | Actual::Bytes(_) => "text",
        Actual::Seq => "a list",
        Actual::Map | Actual::StructVariant => "a table",
        Actual::Unit
        | Actual::Option
        | Actual::NewtypeStruct
        | Actual::Enum
        | Actual::UnitVariant
        | Actual::NewtypeVariant
        | Actual::TupleVariant
        | Actual::Other(_) => "something else",
    }
}
