//! Printing: to people in tables, to programs as JSON lines.

use std::io::{self, Write as _};

use serde_json::value::RawValue;

/// Prints text, with a line break behind it.
pub(super) fn print(text: &str) -> io::Result<()> {
    print_to(&mut io::stdout(), text)
}

/// Prints text somewhere, with a line break behind it.
pub(super) fn print_to(out: &mut dyn io::Write, text: &str) -> io::Result<()> {
    writeln!(out, "{text}")?;
    out.flush()
}

/// Says what went wrong. Nobody can be told when even that fails.
pub(super) fn complain(text: &str) {
    let _ = writeln!(io::stderr().lock(), "{text}");
}

/// Prints JSON values, one a line, as they were received.
pub(super) fn print_json<'a>(values: impl IntoIterator<Item = &'a RawValue>) -> io::Result<()> {
    print_json_to(&mut io::stdout(), values)
}

/// Prints JSON values somewhere, one a line, as they were received.
pub(super) fn print_json_to<'a>(
    out: &mut dyn io::Write,
    values: impl IntoIterator<Item = &'a RawValue>,
) -> io::Result<()> {
    let mut out = io::BufWriter::new(out);
    for value in values {
        writeln!(out, "{}", one_line(value.get()))?;
    }
    out.flush()
}

/// JSON on one line: line breaks between tokens mean nothing, and inside strings there are none.
pub(super) fn one_line(json: &str) -> String {
    json.replace(['\n', '\r'], " ")
}

/// A table with headings; the last column may be as wide as it likes.
pub(super) fn table<const N: usize>(headings: [&str; N], rows: &[[String; N]]) -> String {
    let rows: Vec<[String; N]> =
        rows.iter().map(|row| row.each_ref().map(|cell| harmless(cell))).collect();
    let mut widths = headings.map(|heading| heading.chars().count());
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = String::new();
    let headings = headings.map(str::to_owned);
    for row in std::iter::once(&headings).chain(&rows) {
        let mut line = String::new();
        for (i, (cell, width)) in row.iter().zip(widths).enumerate() {
            if i > 0 {
                line.push_str("  ");
            }
            line.push_str(cell);
            line.extend(std::iter::repeat_n(' ', width - cell.chars().count()));
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text.pop();
    text
}

/// Names and values, one a line, the values beneath each other; what is empty is left out.
pub(super) fn fields(fields: &[(&str, String)]) -> String {
    let shown = || fields.iter().filter(|(_, value)| !value.is_empty());
    let width = shown().map(|(name, _)| name.chars().count()).max().unwrap_or(0);
    let lines: Vec<_> =
        shown().map(|(name, value)| format!("{name:width$}  {}", harmless(value))).collect();
    lines.join("\n")
}

/// Text of others that may have several lines.
pub(super) fn harmless_lines(text: &str) -> String {
    let line = |line: &str| harmless(&line.replace('\t', "    "));
    text.lines().map(line).collect::<Vec<_>>().join("\n")
}

/// Text of others on our terminal: an escape sequence in an event must not run there.
pub(super) fn harmless(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

/// At most so many characters, with `…` where more was there.
pub(super) fn shortened(text: &str, most: usize) -> String {
    if text.chars().count() <= most {
        return text.to_owned();
    }
    text.chars().take(most.saturating_sub(1)).chain(['…']).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_lines_up_and_runs_no_escape_sequences() {
        let rows = [
            ["1".to_owned(), "Größe".to_owned(), "a".to_owned()],
            ["200".to_owned(), "\u{1b}[2J".to_owned(), String::new()],
        ];
        let text = table(["N", "TYPE", "X"], &rows);
        assert_eq!(text, "N    TYPE   X\n1    Größe  a\n200  \u{fffd}[2J");
    }

    #[test]
    fn fields_line_up_and_run_no_escape_sequences() {
        let shown = [("a", "1".to_owned()), ("none", String::new()), ("key", "\u{1b}x".to_owned())];
        assert_eq!(fields(&shown), "a    1\nkey  \u{fffd}x");
        assert_eq!(harmless_lines("{\r\n\t\"a\": \u{9b}1\n}"), "{\n    \"a\": \u{fffd}1\n}");
    }

    #[test]
    fn what_is_too_long_says_so() {
        assert_eq!(shortened("abc", 3), "abc");
        assert_eq!(shortened("abcd", 3), "ab…");
        assert_eq!(shortened("äöüß", 2), "ä…");
    }
}
