//! What is promised about configurations.

mod example;
mod secrets;
mod values;

use std::path::PathBuf;

use tempfile::TempDir;

use super::{ConfigErrors, Flag, Inputs, Loaded, load};

/// A configuration to load: a file's text, variables, flags.
#[derive(Default)]
struct Given {
    dir: Option<TempDir>,
    inputs: Inputs,
}

impl Given {
    /// With a file of this text. Without one, the file named is an empty one, so that nothing
    /// of the machine's own is read.
    fn file(text: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("pulsebus.toml");
        std::fs::write(&file, text).unwrap();
        let inputs = Inputs { file: Some(file), ..Inputs::default() };
        Self { dir: Some(dir), inputs }
    }

    fn nothing() -> Self {
        Self::file("")
    }

    fn variable(mut self, name: &str, value: &str) -> Self {
        self.inputs.variables.push((name.to_owned(), value.to_owned()));
        self
    }

    fn flag(mut self, flag: &str, key: &str, value: &str) -> Self {
        let [flag, key, value] = [flag, key, value].map(str::to_owned);
        self.inputs.flags.push(Flag { flag, key, value });
        self
    }

    /// Writes a file beside the configuration.
    fn beside(&self, name: &str, text: &str) -> PathBuf {
        let path = self.dir.as_ref().unwrap().path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    }

    fn load(&self) -> Result<Loaded, ConfigErrors> {
        load(&self.inputs)
    }

    fn loaded(&self) -> Loaded {
        self.load().unwrap_or_else(|errors| panic!("{errors}"))
    }

    /// The errors as text, with the folder's name taken out.
    fn errors(&self) -> Vec<String> {
        let dir = self.dir.as_ref().unwrap().path().display().to_string() + "/";
        let errors = self.load().expect_err("this configuration must be refused");
        errors.iter().map(|error| error.to_string().replace(&dir, "")).collect()
    }
}

const BROKERS: &str = r#"
[transports.nats]
kind = "nats"
url = "nats://127.0.0.1:4222"
[transports.rabbit]
kind = "amqp"
url = "amqp://guest:guest@127.0.0.1:5672/%2f"
"#;

fn with_brokers(text: &str) -> Given {
    Given::file(&format!("{BROKERS}{text}"))
}
