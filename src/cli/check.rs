//! `check`: is the configuration right?

use std::process::ExitCode;

use serde_json::json;

use super::{BAD_CONFIG, Failure, SettingsArgs, output};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Prints `{"ok": …, "errors": [{"origin", "key", "problem"}]}`
    #[arg(long)]
    json: bool,
}

pub(super) fn check(settings: &SettingsArgs, args: &Args) -> Result<ExitCode, Failure> {
    let loaded = match settings.load() {
        Ok(loaded) => loaded,
        Err(errors) if args.json => {
            let errors: Vec<_> = errors
                .iter()
                .map(|error| {
                    json!({ "origin": error.origin, "key": error.key, "problem": error.problem })
                })
                .collect();
            output::print(&json!({ "ok": false, "errors": errors }).to_string())?;
            return Ok(ExitCode::from(BAD_CONFIG));
        }
        Err(errors) => return Err(errors.into()),
    };
    if args.json {
        output::print(&json!({ "ok": true, "errors": [] }).to_string())?;
    } else {
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
