//! `completions SHELL`.

use clap::CommandFactory as _;

use super::{Cli, Failure, output};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The shell
    shell: clap_complete::Shell,
}

pub(super) fn run(args: &Args) -> Result<(), Failure> {
    // Into memory first: the generator panics when it cannot write.
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "pulsebus", &mut script);
    output::print(String::from_utf8_lossy(&script).trim_end())?;
    Ok(())
}
