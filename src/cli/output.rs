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

/// How wide a line of a table should be at most.
pub(super) const WIDTH: usize = 100;

/// Shortens the last cell of each row, so that lines are no longer than [`WIDTH`], unless the
/// other cells leave it too little: then it has this much.
pub(super) fn fit<const N: usize>(headings: [&str; N], rows: &mut [[String; N]]) {
    const LEAST: usize = 20;
    let width = |n: usize| {
        let cells = rows.iter().map(|row| row[n].chars().count());
        cells.chain([headings[n].chars().count()]).max().unwrap_or(0)
    };
    let before: usize = (0..N.saturating_sub(1)).map(|n| width(n) + 2).sum();
    let left = WIDTH.saturating_sub(before).max(LEAST);
    for row in rows {
        if let Some(last) = row.last_mut() {
            *last = shortened(last, left);
        }
    }
}

/// A span of time, as people say it.
pub(super) fn span(seconds: f64) -> String {
    let whole = std::time::Duration::try_from_secs_f64(seconds.max(0.0)).unwrap_or_default();
    match whole.as_secs() {
        0 if seconds > 0.0 => "<1s".to_owned(),
        s @ 0..=119 => format!("{s}s"),
        s @ 120..=7_199 => format!("{}m", s / 60),
        s @ 7_200..=172_799 => format!("{}h", s / 3_600),
        s => format!("{}d", s / 86_400),
    }
}

/// A moment as the API writes it, and how long ago that is.
pub(super) fn ago(at: &str) -> String {
    match seconds_since(at) {
        Some(seconds) if seconds >= 0.0 => format!("{at} ({} ago)", span(seconds)),
        Some(seconds) => format!("{at} (in {})", span(-seconds)),
        None => at.to_owned(),
    }
}

/// How long ago a moment is that the API wrote; negative where it is still to come.
pub(super) fn seconds_since(at: &str) -> Option<f64> {
    let at =
        time::OffsetDateTime::parse(at, &time::format_description::well_known::Rfc3339).ok()?;
    Some((time::OffsetDateTime::now_utc() - at).as_seconds_f64())
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
    fn spans_are_said_as_people_say_them() {
        for (seconds, said) in [
            (0.0, "0s"),
            (0.2, "<1s"),
            (119.9, "119s"),
            (120.0, "2m"),
            (7_200.0, "2h"),
            (172_800.0, "2d"),
            (-1.0, "0s"),
        ] {
            assert_eq!(span(seconds), said, "{seconds}");
        }
        assert_eq!(ago("no time"), "no time");
        assert!(ago("2020-01-01T00:00:00Z").ends_with("d ago)"));
        assert!(ago("2999-01-01T00:00:00Z").contains(" (in "));
    }

    #[test]
    fn a_table_is_no_wider_than_a_terminal() {
        let mut rows = [["name".to_owned(), "x".repeat(300)], ["n".to_owned(), "short".to_owned()]];
        fit(["NAME", "REASON"], &mut rows);
        let text = table(["NAME", "REASON"], &rows);
        assert_eq!(text.lines().map(|line| line.chars().count()).max(), Some(WIDTH));
        assert!(text.contains('…') && text.contains("short"), "{text}");
    }

    #[test]
    fn what_is_too_long_says_so() {
        assert_eq!(shortened("abc", 3), "abc");
        assert_eq!(shortened("abcd", 3), "ab…");
        assert_eq!(shortened("äöüß", 2), "ä…");
    }
}
