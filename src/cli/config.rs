//! `config show`, `config schema` and `config reference`.

use anyhow::Context as _;
use pulsebus::config::{reference, schema};

use super::{Failure, SettingsArgs, output};

#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    /// Prints the configuration in effect as TOML, each value with its origin, without secrets
    Show {
        /// Prints it as JSON, without the origins
        #[arg(long)]
        json: bool,
    },
    /// Prints the JSON Schema of the configuration file
    Schema,
    /// Prints every key with type, default, variable and meaning, as Markdown: docs/configuration.md
    Reference,
}

pub(super) fn run(settings: &SettingsArgs, command: &Command) -> Result<(), Failure> {
    match command {
        Command::Show { json } => {
            let shown = settings.load()?.show();
            if *json {
                let value: serde_json::Value =
                    toml::from_str(&shown)
                        .map_err(anyhow::Error::new)
                        .context("failed to turn the configuration into JSON")?;
                output::print(&value.to_string())?;
            } else {
                output::print(shown.trim_end())?;
            }
        }
        Command::Reference => output::print(reference().trim_end())?,
        Command::Schema => output::print(&format!("{:#}", schema()))?,
    }
    Ok(())
}
