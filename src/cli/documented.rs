//! Every command line in the documentation is one that this program takes.

use clap::Parser as _;

use super::Cli;

const PAGES: &[(&str, &str)] = &[
    ("README.md", include_str!("../../README.md")),
    ("docs/bridging.md", include_str!("../../docs/bridging.md")),
    ("docs/configuration.md", include_str!("../../docs/configuration.md")),
    ("docs/doctor.md", include_str!("../../docs/doctor.md")),
    ("docs/extending.md", include_str!("../../docs/extending.md")),
    ("docs/guarantees.md", include_str!("../../docs/guarantees.md")),
    ("docs/metrics.md", include_str!("../../docs/metrics.md")),
    ("docs/operating.md", include_str!("../../docs/operating.md")),
    ("docs/reload.md", include_str!("../../docs/reload.md")),
    ("docs/retention.md", include_str!("../../docs/retention.md")),
    ("docs/runbook.md", include_str!("../../docs/runbook.md")),
    ("docs/security.md", include_str!("../../docs/security.md")),
    ("docs/systemd.md", include_str!("../../docs/systemd.md")),
    ("docs/tracing.md", include_str!("../../docs/tracing.md")),
];

/// The words of a line as a shell takes them apart, up to a comment, pipe or redirection.
fn words(line: &str) -> Vec<String> {
    let (mut words, mut word, mut quote) = (Vec::new(), None::<String>, None);
    for c in line.chars() {
        match (quote, c) {
            (Some(open), c) if c == open => quote = None,
            (Some(_), c) => word.get_or_insert_default().push(c),
            (None, '\'' | '"') => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            (None, ' ') => words.extend(word.take()),
            (None, '#' | '|' | '>' | '<' | '&' | ';') if word.is_none() => break,
            (None, c) => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    words
}

/// The command lines of a page: those of its `sh` blocks, and those in code within text. Those
/// with `…` or `[` stand for several.
fn commands(page: &str) -> Vec<String> {
    let mut found = Vec::new();
    for (number, part) in page.split("```").enumerate() {
        if number % 2 == 1 {
            let Some(block) = part.strip_prefix("sh\n") else { continue };
            let block = block.replace("\\\n", " ");
            found.extend(
                block.lines().filter(|line| line.starts_with("pulsebus ")).map(str::to_owned),
            );
        } else {
            let inline = part.split('`').skip(1).step_by(2).map(|code| code.replace('\n', " "));
            found.extend(inline.filter(|code| code.starts_with("pulsebus ")));
        }
    }
    found.retain(|line| !line.contains(['…', '[']));
    found
}

#[test]
fn every_command_line_in_the_documentation_is_understood() {
    let mut tried = 0;
    for (page, text) in PAGES {
        for line in commands(text) {
            let words = words(&line);
            // `pulsebus healthcheck` and the like stand for the command; what it must be given
            // besides is in its help.
            let missing = |error: &clap::Error| {
                use clap::error::ErrorKind::{
                    DisplayHelpOnMissingArgumentOrSubcommand, MissingRequiredArgument,
                };
                words.len() <= 3
                    && matches!(
                        error.kind(),
                        MissingRequiredArgument | DisplayHelpOnMissingArgumentOrSubcommand
                    )
            };
            match Cli::try_parse_from(&words) {
                Ok(_) => {}
                Err(error) if missing(&error) => {}
                Err(error) => panic!("{page}: {line}\n{error}"),
            }
            tried += 1;
        }
    }
    assert!(tried > 40, "only {tried} command lines were looked at");
}

#[test]
fn lines_are_taken_apart_as_by_a_shell() {
    assert_eq!(words("a 'b c' --d=\"e f\"g  h # i"), ["a", "b c", "--d=e fg", "h"]);
    assert_eq!(words("a b > c"), ["a", "b"]);
    let page = "`pulsebus x`\n```sh\npulsebus y \\\n  z\nother\n```\n`pulsebus …`";
    assert_eq!(commands(page), ["pulsebus x", "pulsebus y    z"]);
    assert!(Cli::try_parse_from(["pulsebus", "quarantine", "retry", "7"]).is_err());
}
