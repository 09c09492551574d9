//! What to publish, read piece by piece: a file may be larger than memory or a request.

use std::{
    fs::File,
    io::{self, BufRead, BufReader, Cursor, IsTerminal as _, Read as _},
    path::Path,
};

use anyhow::{Context as _, anyhow, bail};
use serde::de::IgnoredAny;
use tokio::sync::mpsc;

/// Lines in a part at most.
const LINES: usize = 1_000;
/// Bytes in a part of lines, about: a quarter of what the daemon takes in a request.
const BYTES: usize = 4 << 20;
/// Bytes of a single document at most.
const DOCUMENT: u64 = 256 << 20;

/// A piece of the input, checked to be JSON.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Part {
    /// One JSON value, perhaps over several lines; the only part.
    Document(String),
    /// JSON values, one a line.
    Lines(Vec<String>),
}

/// What the reading thread finds.
enum Piece {
    Document(String),
    Line(String),
}

/// The input. It is read on a thread of its own, so that a connection stays alive while a
/// person types; what is there when the last part has been sent is the next part, so a slow
/// producer's events are not held back.
pub(super) struct Input {
    pieces: mpsc::Receiver<anyhow::Result<Piece>>,
    failed: Option<anyhow::Error>,
}

pub(super) fn is_terminal() -> bool {
    io::stdin().is_terminal()
}

impl Input {
    pub(super) fn text(text: String) -> Self {
        Self::reading(Cursor::new(text))
    }

    pub(super) fn file(path: &Path) -> anyhow::Result<Self> {
        let file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
        Ok(Self::reading(BufReader::new(file)))
    }

    pub(super) fn standard_input() -> Self {
        Self::reading(BufReader::new(io::stdin()))
    }

    fn reading(reader: impl BufRead + Send + 'static) -> Self {
        let (sender, pieces) = mpsc::channel(LINES);
        // It ends with the input, or when nobody takes its pieces any more; one that waits for
        // a terminal ends with the process.
        std::thread::spawn(move || {
            let mut pieces = Pieces { reader, line: 0, first: true, second: None };
            while let Some(piece) = pieces.next().transpose() {
                let failed = piece.is_err();
                if sender.blocking_send(piece).is_err() || failed {
                    break;
                }
            }
        });
        Self { pieces, failed: None }
    }

    /// The next part; `None` at the end. Lines before a broken one are a part of their own.
    pub(super) async fn next(&mut self) -> anyhow::Result<Option<Part>> {
        if let Some(error) = self.failed.take() {
            return Err(error);
        }
        let mut lines = match self.pieces.recv().await.transpose()? {
            None => return Ok(None),
            Some(Piece::Document(text)) => return Ok(Some(Part::Document(text))),
            Some(Piece::Line(line)) => vec![line],
        };
        let mut bytes = lines[0].len();
        while lines.len() < LINES && bytes < BYTES {
            match self.pieces.try_recv() {
                Ok(Ok(Piece::Line(line) | Piece::Document(line))) => {
                    bytes += line.len();
                    lines.push(line);
                }
                Ok(Err(error)) => {
                    self.failed = Some(error);
                    break;
                }
                Err(_) => break,
            }
        }
        Ok(Some(Part::Lines(lines)))
    }
}

struct Pieces<R> {
    reader: R,
    line: u64,
    first: bool,
    second: Option<String>,
}

impl<R: BufRead> Pieces<R> {
    fn next(&mut self) -> anyhow::Result<Option<Piece>> {
        if let Some(line) = self.second.take() {
            return self.checked(line).map(Some);
        }
        let Some(line) = self.line()? else {
            if self.first {
                bail!("nothing to publish: the input is empty");
            }
            return Ok(None);
        };
        if !std::mem::take(&mut self.first) {
            return self.checked(line).map(Some);
        }
        if let Err(error) = is_json(&line) {
            return self.document(line, &error).map(Some);
        }
        // An array alone is a document with several events; above other lines it is a line.
        if line.trim_start().starts_with('[') {
            self.second = self.line()?;
            if self.second.is_none() {
                return Ok(Some(Piece::Document(line)));
            }
        }
        Ok(Some(Piece::Line(line)))
    }

    fn checked(&self, line: String) -> anyhow::Result<Piece> {
        match is_json(&line) {
            Ok(()) => Ok(Piece::Line(line)),
            Err(error) => bail!("line {} is not JSON: {error}", self.line),
        }
    }

    /// The next line with something in it, without its end.
    fn line(&mut self) -> anyhow::Result<Option<String>> {
        loop {
            let mut line = String::new();
            let read = self.reader.by_ref().take(DOCUMENT).read_line(&mut line);
            let read = read.with_context(|| format!("cannot read line {}", self.line + 1))?;
            if read == 0 {
                return Ok(None);
            }
            self.line += 1;
            if !line.trim().is_empty() {
                line.truncate(line.trim_end_matches(['\n', '\r']).len());
                return Ok(Some(line));
            }
        }
    }

    fn document(&mut self, first: String, error: &serde_json::Error) -> anyhow::Result<Piece> {
        let mut text = first;
        text.push('\n');
        let rest = self.reader.by_ref().take(DOCUMENT).read_to_string(&mut text);
        if rest.context("cannot read the input")? as u64 == DOCUMENT {
            bail!("the document is larger than 256 MiB; write the events one a line");
        }
        // Where the first line is broken, and not just unfinished, say what is wrong with it.
        is_json(&text).map_err(|whole| {
            let error = if error.is_eof() { &whole } else { error };
            anyhow!("the input is not JSON: {error}")
        })?;
        text.truncate(text.trim_end_matches(['\n', '\r']).len());
        Ok(Piece::Document(text))
    }
}

fn is_json(text: &str) -> Result<(), serde_json::Error> {
    serde_json::from_str::<IgnoredAny>(text).map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn parts(text: &str) -> anyhow::Result<Vec<Part>> {
        let mut input = Input::text(text.to_owned());
        let mut parts = Vec::new();
        while let Some(part) = input.next().await? {
            parts.push(part);
        }
        Ok(parts)
    }

    #[tokio::test]
    async fn one_value_stays_as_it_is_byte_for_byte() {
        for text in ["{\n  \"a\": [1,\n 2]\n}", "[{},  {}]", "[\n1\n]"] {
            for text in [text.to_owned(), format!("\n{text}\r\n\n")] {
                let document = text.trim().to_owned();
                assert_eq!(parts(&text).await.unwrap(), [Part::Document(document)]);
            }
        }
        let text = "{\"a\": 1e400,  \"a\":2}";
        assert_eq!(parts(text).await.unwrap(), [Part::Lines(vec![text.to_owned()])]);
    }

    #[tokio::test]
    async fn several_values_are_lines_in_bounded_parts_in_order() {
        let text: String = (0..2_500).map(|n| format!("{{\"n\":{n}}}\n\n")).collect();
        let mut lines = Vec::new();
        for part in parts(&text).await.unwrap() {
            let Part::Lines(some) = part else { panic!("{part:?}") };
            assert!(some.len() <= LINES);
            lines.extend(some);
        }
        assert_eq!(lines, (0..2_500).map(|n| format!("{{\"n\":{n}}}")).collect::<Vec<_>>());
        let mixed = parts("[1]\n[2]\n").await.unwrap();
        assert!(mixed.iter().all(|part| matches!(part, Part::Lines(_))), "{mixed:?}");
    }

    #[tokio::test]
    async fn what_is_not_json_is_refused_with_its_line() {
        for (text, hint) in [
            ("", "empty"),
            (" \n\n", "empty"),
            ("{\"a\": 1", "EOF"),
            ("{a: 1}", "key must be a string"),
            ("{}\n{}\n{a}", "line 3"),
            ("[]\n{a}", "line 2"),
        ] {
            let error = parts(text).await.unwrap_err().to_string();
            assert!(error.contains(hint), "{text:?}: {error}");
        }
    }
}
