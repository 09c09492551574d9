//! Following something that takes long: a bar on a terminal, elsewhere nothing until its end.

use std::{
    io::{self, IsTerminal as _},
    process::ExitCode,
    time::Duration,
};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::{FAILED, Failure, client::RequestError, output};

/// How often the daemon is asked.
const POLL: Duration = Duration::from_millis(250);
/// How seldom at most, while it is away.
const POLL_AWAY: Duration = Duration::from_secs(5);

/// Whether to wait for the end.
#[derive(Debug, Clone, Copy, clap::Args)]
pub(super) struct WaitArgs {
    /// Waits for the end, with a progress bar on a terminal [default: on a terminal]
    #[arg(long, overrides_with = "no_wait")]
    wait: bool,
    /// Does not wait for the end
    #[arg(long, overrides_with = "wait")]
    no_wait: bool,
}

impl WaitArgs {
    pub(super) fn wanted(self) -> bool {
        self.wait || (!self.no_wait && io::stderr().is_terminal())
    }
}

/// How far something is.
#[derive(Debug)]
pub(super) enum Look<T> {
    /// It goes on.
    Underway {
        /// How much of it is done.
        done: u64,
        /// How much there is; may change.
        total: u64,
        /// What holds it up, if something does.
        held_up: Option<String>,
    },
    /// It has ended.
    Ended(T),
}

/// Looks again and again until what is followed has ended. Interrupted (Ctrl-C) it ends at once
/// and says `goes_on`, since what the daemon does is not interrupted by that.
pub(super) async fn follow<T>(
    what: &str,
    goes_on: &str,
    mut look: impl AsyncFnMut() -> Result<Look<T>, RequestError>,
) -> Result<T, Failure> {
    let bar = Bar::new(what);
    let interrupt = tokio::signal::ctrl_c();
    tokio::pin!(interrupt);
    let mut wait = POLL;
    loop {
        let looked = tokio::select! {
            looked = look() => looked,
            _ = &mut interrupt => return Err(interrupted(&bar, goes_on)),
        };
        match looked {
            Ok(Look::Ended(end)) => {
                bar.clear();
                return Ok(end);
            }
            Ok(Look::Underway { done, total, held_up }) => {
                wait = POLL;
                bar.set(done, total, held_up.as_deref());
            }
            Err(error) if error.is_passing() => {
                if wait == POLL {
                    bar.say(&format!("pulsebus: {error}; waiting for it"));
                }
                wait = (wait * 2).min(POLL_AWAY);
            }
            Err(error) => {
                bar.clear();
                return Err(error.into());
            }
        }
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            _ = &mut interrupt => return Err(interrupted(&bar, goes_on)),
        }
    }
}

fn interrupted(bar: &Bar, goes_on: &str) -> Failure {
    bar.say(&format!("pulsebus: {goes_on}"));
    bar.clear();
    Failure::Silent(ExitCode::from(FAILED))
}

/// A bar on standard error; not drawn where that is no terminal.
struct Bar {
    bar: ProgressBar,
    what: String,
}

impl Bar {
    fn new(what: &str) -> Self {
        let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr());
        let template = "{msg} [{bar:30}] {pos} of {len} ({percent}%), {eta} left";
        // The template is right, and the default would do.
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style.progress_chars("=> "));
        }
        Self { bar, what: output::harmless(what) }
    }

    fn set(&self, done: u64, total: u64, held_up: Option<&str>) {
        let message = match held_up {
            Some(reason) => {
                format!("{} ({})", self.what, output::harmless(&output::shortened(reason, 40)))
            }
            None => self.what.clone(),
        };
        self.bar.set_message(message);
        self.bar.set_length(total);
        self.bar.set_position(done.min(total));
    }

    fn say(&self, text: &str) {
        self.bar.suspend(|| output::complain(text));
    }

    fn clear(&self) {
        self.bar.finish_and_clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_template_of_the_bar_is_understood() {
        let bar = Bar::new("a");
        bar.set(7, 5, Some("held\nup"));
        assert_eq!((bar.bar.position(), bar.bar.length()), (5, Some(5)));
        assert_eq!(bar.bar.message(), "a (held\u{fffd}up)");
    }

    #[tokio::test]
    async fn it_is_followed_to_its_end() {
        let mut done = 0;
        let followed = follow("x", "", async || {
            done += 1;
            Ok(if done == 3 {
                Look::Ended("end")
            } else {
                Look::Underway { done, total: 3, held_up: None }
            })
        });
        assert!(matches!(followed.await, Ok("end")));
        assert_eq!(done, 3);
    }
}
