//! `check`: is the configuration right?

use std::process::ExitCode;

use pulsebus::config::ConfigError;
use serde_json::json;

use super::{BAD_CONFIG, Failure, SettingsArgs, output};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Prints `{"ok": …, "errors": [{"origin", "key", "problem"}], "warnings": […]}`
    #[arg(long)]
    json: bool,
}

pub(super) fn check(settings: &SettingsArgs, args: &Args) -> Result<ExitCode, Failure> {
    let loaded = match settings.load() {
        Ok(loaded) => loaded,
        Err(errors) if args.json => {
            let errors: Vec<_> = errors.iter().map(entry).collect();
            output::print(&json!({ "ok": false, "errors": errors }).to_string())?;
            return Ok(ExitCode::from(BAD_CONFIG));
        }
        Err(errors) => return Err(errors.into()),
    };
    if args.json {
        let warnings: Vec<_> = loaded.warnings.iter().map(entry).collect();
        let answer = json!({ "ok": true, "errors": [], "warnings": warnings });
        output::print(&answer.to_string())?;
    } else {
        for warning in &loaded.warnings {
            output::complain(&format!("warning: {warning}"));
        }
        let settings = &loaded.settings;
        let names = |names: &mut dyn Iterator<Item = &std::sync::Arc<str>>| {
            let names: Vec<&str> = names.map(|name| &**name).collect();
            if names.is_empty() { "none".to_owned() } else { names.join(", ") }
        };
        output::print(&format!(
            "the configuration is right ({})\nsources: {}\nhandlers: {}",
            loaded
                .file
                .as_ref()
                .map_or_else(|| "no file, defaults".to_owned(), |file| file.display().to_string()),
            names(&mut settings.sources.keys()),
            names(&mut settings.handlers.keys()),
        ))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn entry(found: &ConfigError) -> serde_json::Value {
    json!({ "origin": found.origin, "key": found.key, "problem": found.problem })
}
