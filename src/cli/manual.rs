//! `manual --out DIR`: the manual pages, from the same words as `--help`.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use anyhow::Context as _;
use clap::CommandFactory as _;

use super::{Cli, Failure, output};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Where to: pulsebus.1 and a page for each command. Without it pulsebus(1) is printed, for
    /// `man -l -`
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

pub(super) fn run(args: &Args) -> Result<(), Failure> {
    let command = command();
    match &args.out {
        Some(folder) => {
            fs::create_dir_all(folder)
                .with_context(|| format!("failed to make {}", folder.display()))?;
            write(&command, folder)
                .with_context(|| format!("failed to write to {}", folder.display()))?;
        }
        None => output::print(String::from_utf8_lossy(&page(&command)?).trim_end())?,
    }
    Ok(())
}

/// The commands, each with its full name: `pulsebus handlers list`.
fn command() -> clap::Command {
    let mut command = Cli::command().disable_help_subcommand(true).term_width(0);
    command.build();
    command
}

/// A page, and those of the commands below it.
fn write(command: &clap::Command, folder: &Path) -> io::Result<()> {
    let name = command.get_display_name().unwrap_or_else(|| command.get_name());
    fs::write(folder.join(format!("{name}.1")), page(command)?)?;
    command
        .get_subcommands()
        .filter(|command| !command.is_hide_set())
        .try_for_each(|c| write(c, folder))
}

fn page(command: &clap::Command) -> io::Result<Vec<u8>> {
    let mut page = Vec::new();
    clap_mangen::Man::new(command.clone()).manual("pulsebus").render(&mut page)?;
    Ok(page)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_has_its_page() {
        let folder = tempfile::tempdir().unwrap();
        write(&command(), folder.path()).unwrap();
        let page = |name: &str| fs::read_to_string(folder.path().join(name)).unwrap();
        assert!(
            page("pulsebus.1").contains("pulsebus\\-handlers\\-rewind(1)")
                || page("pulsebus.1").contains("pulsebus\\-handlers(1)")
        );
        assert!(page("pulsebus-handlers-rewind.1").contains("\\-\\-position"));
        assert!(page("pulsebus-run.1").contains("Runs the daemon"));
        assert!(!folder.path().join("pulsebus-manual.1").exists());
        assert!(!page("pulsebus.1").contains("manual\\-"));
    }
}
