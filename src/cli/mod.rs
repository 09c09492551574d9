//! The command line: what can be said, and how it ends.
//!
//! Exit codes: 0 done, 1 failed, 2 the command line is wrong, 75 the drain's deadline passed,
//! 78 the configuration is wrong.

mod audit;
mod check;
mod client;
mod completions;
mod config;
mod dead_letters;
mod doctor;
#[cfg(test)]
mod documented;
mod events;
mod handlers;
mod healthcheck;
mod manual;
mod moment;
mod order;
mod output;
mod pages;
mod progress;
mod publish;
mod quarantine;
mod redrives;
mod reload;
mod run;
mod search;
mod sources;

use std::{path::PathBuf, process::ExitCode};

use clap::{Args, Parser, Subcommand};
use pulsebus::config::{ConfigErrors, Flag, Inputs, Loaded, load};

/// It did not work.
const FAILED: u8 = 1;
/// The command line is wrong (`clap` ends with the same).
const USAGE: u8 = 2;
/// The drain did not end in time (`EX_TEMPFAIL` of sysexits.h).
const DRAIN_DEADLINE: u8 = 75;
/// The configuration is wrong (`EX_CONFIG` of sysexits.h).
const BAD_CONFIG: u8 = 78;

/// Durable, ordered, searchable and deliverable JSON events beside NATS JetStream and RabbitMQ.
///
/// Without a command it runs the daemon.
#[derive(Debug, Parser)]
#[command(name = "pulsebus", version, max_term_width = 100)]
#[command(after_help = "Exit codes: 0 done, 1 failed, 2 usage, 75 drain deadline passed, \
                        78 bad configuration")]
struct Cli {
    #[command(flatten)]
    settings: SettingsArgs,
    #[command(subcommand)]
    command: Option<Command>,
}

/// What changes the configuration.
#[derive(Debug, Args)]
struct SettingsArgs {
    /// The configuration file [default: $PULSEBUS_CONFIG, else /etc/pulsebus/pulsebus.toml where
    /// it exists]
    #[arg(long, short, value_name = "FILE", global = true)]
    config: Option<PathBuf>,
    /// Sets a key of the configuration, as in --set http.listen=127.0.0.1:9000
    #[arg(long, value_name = "KEY=VALUE", value_parser = key_value, global = true)]
    set: Vec<(String, String)>,
    /// Sets data_dir: where SQLite and the search indexes live
    #[arg(long, value_name = "DIR", global = true)]
    data_dir: Option<String>,
    /// Sets http.listen: address and port of the HTTP server
    #[arg(long, value_name = "ADDRESS", global = true)]
    listen: Option<String>,
    /// Sets log.filter: a level, or directives such as info,pulsebus::dispatch=debug
    #[arg(long, value_name = "FILTER", global = true)]
    log: Option<String>,
}

impl SettingsArgs {
    fn load(&self) -> Result<Loaded, ConfigErrors> {
        load(&self.inputs())
    }

    /// What the configuration is read from.
    fn inputs(&self) -> Inputs {
        let flag = |flag: &str, key: &str, value: &str| Flag {
            flag: flag.to_owned(),
            key: key.to_owned(),
            value: value.to_owned(),
        };
        let named = [
            ("--data-dir", "data_dir", &self.data_dir),
            ("--listen", "http.listen", &self.listen),
            ("--log", "log.filter", &self.log),
        ];
        let set = self.set.iter().map(|(key, value)| flag("--set", key, value));
        let named = named
            .into_iter()
            .filter_map(|(name, key, value)| Some(flag(name, key, value.as_deref()?)));
        Inputs::from_process(self.config.clone(), set.chain(named).collect())
    }
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Runs the daemon
    Run,
    /// Checks the configuration and says everything that is wrong, without connecting
    Check(check::Args),
    /// Connects to everything and says what would lose events or hold them up
    Doctor(doctor::Args),
    /// Publishes events
    Publish(publish::Args),
    /// Looks at the event log
    #[command(subcommand)]
    Events(events::Command),
    /// Looks at the sources
    #[command(subcommand)]
    Sources(sources::Command),
    /// Looks at the handlers; pauses, resumes, rewinds and rebuilds them
    #[command(subcommand)]
    Handlers(handlers::Command),
    /// Looks at what handlers could not handle; retries or discards it
    #[command(subcommand)]
    DeadLetters(dead_letters::Command),
    /// Looks at what was no event; takes it in again or discards it
    #[command(subcommand)]
    Quarantine(quarantine::Command),
    /// Looks at what is being retried or discarded; cancels it, or waits for its end
    #[command(subcommand)]
    Redrives(redrives::Command),
    /// Looks at who has paused, rewound, retried or discarded what
    #[command(subcommand)]
    Audit(audit::Command),
    /// Searches an index
    Search(search::Args),
    /// Shows the configuration
    #[command(subcommand)]
    Config(config::Command),
    /// Asks the daemon whether it is alive; for container health checks
    Healthcheck(healthcheck::Args),
    /// Prints completions for a shell
    Completions(completions::Args),
    /// Writes the manual pages; for packages
    #[command(hide = true)]
    Manual(manual::Args),
}

/// How a command ends that did not do what it was asked.
#[derive(Debug)]
enum Failure {
    /// It failed; said in one line.
    Failed(anyhow::Error),
    /// What was asked makes no sense.
    Usage(String),
    /// The configuration is wrong.
    Config(ConfigErrors),
    /// Said already.
    Silent(ExitCode),
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        // A reader that has seen enough (`| head`) is no failure.
        let closed = error.chain().any(|cause| {
            cause
                .downcast_ref::<std::io::Error>()
                .is_some_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe)
        });
        if closed { Self::Silent(ExitCode::SUCCESS) } else { Self::Failed(error) }
    }
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        anyhow::Error::new(error).context("failed to write the output").into()
    }
}

impl From<ConfigErrors> for Failure {
    fn from(errors: ConfigErrors) -> Self {
        Self::Config(errors)
    }
}

/// Parses, runs, and turns the end into an exit code.
pub(crate) fn main() -> ExitCode {
    // One provider for every TLS connection. Fails only where one is installed already, and
    // then that one is used.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let cli = Cli::parse();
    match dispatch(cli) {
        Ok(code) => code,
        Err(Failure::Failed(error)) => {
            output::complain(&format!("pulsebus: {error:#}"));
            ExitCode::from(FAILED)
        }
        Err(Failure::Usage(problem)) => {
            output::complain(&format!("pulsebus: {problem}"));
            ExitCode::from(USAGE)
        }
        Err(Failure::Config(errors)) => {
            output::complain(&format!("pulsebus: the configuration is wrong\n{errors}"));
            ExitCode::from(BAD_CONFIG)
        }
        Err(Failure::Silent(code)) => code,
    }
}

fn dispatch(cli: Cli) -> Result<ExitCode, Failure> {
    let settings = cli.settings;
    match cli.command {
        None | Some(Command::Run) => {
            let inputs = settings.inputs();
            return Ok(run::run(load(&inputs)?, inputs));
        }
        Some(Command::Check(args)) => return check::check(&settings, &args),
        Some(Command::Doctor(args)) => return block_on(doctor::run(&settings, &args)),
        Some(Command::Config(command)) => config::run(&settings, &command)?,
        Some(Command::Completions(args)) => completions::run(&args)?,
        Some(Command::Manual(args)) => manual::run(&args)?,
        Some(Command::Publish(args)) => return block_on(publish::run(&settings, args)),
        Some(Command::Events(command)) => block_on(events::run(&settings, command))?,
        Some(Command::Sources(command)) => block_on(sources::run(&settings, command))?,
        Some(Command::Handlers(command)) => block_on(handlers::run(&settings, command))?,
        Some(Command::DeadLetters(command)) => block_on(dead_letters::run(&settings, command))?,
        Some(Command::Quarantine(command)) => block_on(quarantine::run(&settings, command))?,
        Some(Command::Redrives(command)) => block_on(redrives::run(&settings, command))?,
        Some(Command::Audit(command)) => block_on(audit::run(&settings, command))?,
        Some(Command::Search(args)) => block_on(search::run(&settings, args))?,
        Some(Command::Healthcheck(args)) => block_on(healthcheck::run(&settings, args))?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Runs a command that talks to a daemon or a broker.
fn block_on<T>(command: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| anyhow::Error::new(error).context("failed to start"))?;
    runtime.block_on(command)
}

fn key_value(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.trim().is_empty() => {
            Ok((key.trim().to_owned(), value.to_owned()))
        }
        _ => Err("write it as KEY=VALUE".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_makes_sense() {
        Cli::command().debug_assert();
    }

    #[test]
    fn no_command_runs_the_daemon_and_settings_stand_anywhere() {
        let cli = Cli::parse_from(["pulsebus", "--listen", "127.0.0.1:1"]);
        assert!(cli.command.is_none());
        let cli = Cli::parse_from(["pulsebus", "check", "--set", "log.format=json", "-c", "x"]);
        assert_eq!(cli.settings.set, [("log.format".to_owned(), "json".to_owned())]);
        assert_eq!(cli.settings.config, Some("x".into()));
    }

    #[test]
    fn a_closed_pipe_is_no_failure() {
        let error = std::io::Error::from(std::io::ErrorKind::BrokenPipe);
        assert!(matches!(Failure::from(error), Failure::Silent(_)));
        let error = std::io::Error::from(std::io::ErrorKind::StorageFull);
        assert!(matches!(Failure::from(error), Failure::Failed(_)));
    }
}
