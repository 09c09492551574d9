//! The `pulsebus` binary: parse, run the command, exit code.

#![cfg_attr(test, allow(non_snake_case, reason = "a test's name begins with its promise"))]

mod cli;

use std::process::ExitCode;

/// The daemon allocates many short-lived buffers on many threads; glibc's arenas keep the most
/// they ever needed, jemalloc gives it back (G7).
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    cli::main()
}
