//! `events export`: a part of the log as a file.

use std::{
    fs::File,
    io::{self, BufRead as _, BufReader, BufWriter, Seek as _, Write},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, anyhow};

use super::{Client, Event, Failure, Filter, PAGE, output, page, parse};
use crate::cli::client::ClientArgs;

#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Export {
    #[command(flatten)]
    pub(super) client: ClientArgs,
    #[command(flatten)]
    filter: Filter,
    /// From this position on
    #[arg(long, value_name = "POSITION", default_value_t = 1)]
    from: u64,
    /// Up to this position [default: the last one when it begins]
    #[arg(long, value_name = "POSITION")]
    to: Option<u64>,
    /// Where to write to [default: standard output]; it must not exist
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Goes on where an export to this file was cut off
    #[arg(long, requires = "output")]
    resume: bool,
}

/// Writes events as lines of JSON, each as `GET /v1/events` shows it. Memory is that of a page.
///
/// Whatever cuts it off, the file holds whole lines up to some position, and perhaps a part of
/// one more, which `--resume` takes off before it goes on.
pub(super) async fn export(
    client: &Client,
    args: &Export,
    stdout: &mut dyn Write,
) -> Result<(), Failure> {
    let to = match args.to {
        Some(to) => to,
        None => last_position(client).await?,
    };
    let Some(path) = &args.output else {
        lines(client, args, args.from.max(1), to, stdout).await?;
        return Ok(());
    };
    let (file, from) = open(path, args)?;
    let mut out = BufWriter::new(file);
    let written = lines(client, args, from, to, &mut out).await?;
    let file = out.into_inner().map_err(io::IntoInnerError::into_error)?;
    file.sync_all().with_context(|| format!("failed to write {}", path.display()))?;
    output::complain(&format!("pulsebus: {written} events written to {}", path.display()));
    Ok(())
}

async fn last_position(client: &Client) -> Result<u64, Failure> {
    let newest = page(client, &Filter::default(), None, 1, true).await?;
    newest.first().map_or(Ok(0), |event| Ok(parse::<Event>(event)?.position))
}

async fn lines(
    client: &Client,
    args: &Export,
    mut from: u64,
    to: u64,
    out: &mut dyn Write,
) -> Result<u64, Failure> {
    let mut written = 0;
    while from <= to {
        let mut page = page(client, &args.filter, Some(from), PAGE, false).await?;
        // A page may be short for its size; only an empty one is the end.
        let Some(last) = page.last() else { break };
        let last = parse::<Event>(last)?.position;
        if last > to {
            let mut within = 0;
            for event in &page {
                within += usize::from(parse::<Event>(event)?.position <= to);
            }
            page.truncate(within);
        }
        output::print_json_to(out, page.iter().map(|event| &**event))?;
        written += page.len() as u64;
        let Some(next) = last.checked_add(1) else { break };
        from = next;
    }
    Ok(written)
}

/// The file to write to, and the position to go on from.
fn open(path: &Path, args: &Export) -> Result<(File, u64), Failure> {
    if !args.resume {
        let file = File::create_new(path).map_err(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => Failure::Usage(format!(
                "{} exists: name another file, or go on with it by --resume",
                path.display()
            )),
            _ => Failure::from(
                anyhow::Error::new(error).context(format!("failed to create {}", path.display())),
            ),
        })?;
        return Ok((file, args.from.max(1)));
    }
    let mut file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .with_context(|| format!("failed to open {}", path.display()))?;
    let (whole, last) = whole_lines(&file)
        .with_context(|| format!("{} is not what an export has written", path.display()))?;
    file.set_len(whole)
        .and_then(|()| file.seek(io::SeekFrom::End(0)))
        .with_context(|| format!("failed to take the unfinished line off {}", path.display()))?;
    Ok((file, last.map_or(args.from, |last| last.saturating_add(1)).max(1)))
}

/// How many bytes of whole lines there are, and the position of the last one.
fn whole_lines(file: &File) -> anyhow::Result<(u64, Option<u64>)> {
    let mut reader = BufReader::with_capacity(1 << 16, file);
    let (mut line, mut whole, mut last) = (Vec::new(), 0, Vec::new());
    loop {
        line.clear();
        let read = reader.read_until(b'\n', &mut line)?;
        if line.last() != Some(&b'\n') {
            break;
        }
        whole += read as u64;
        std::mem::swap(&mut line, &mut last);
    }
    if whole == 0 {
        return Ok((0, None));
    }
    let event: Event = serde_json::from_slice(&last)
        .map_err(|error| anyhow!("its last line is no event: {error}"))?;
    Ok((whole, Some(event.position)))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::cli::events::tests::{parsed, with_log};

    async fn exported(url: &str, args: &[&str]) -> Result<String, Failure> {
        let (client, command) = parsed(url, &[&["export"], args].concat());
        let crate::cli::events::Command::Export(args) = command else { panic!() };
        let mut out = Vec::new();
        export(&client, &args, &mut out).await?;
        Ok(String::from_utf8(out).unwrap())
    }

    fn positions(text: &str) -> Vec<u64> {
        let position = |line: &str| serde_json::from_str::<Event>(line).unwrap().position;
        text.lines().map(position).collect()
    }

    #[tokio::test]
    async fn an_export_holds_each_event_of_the_range_once() {
        with_log(1_300, u64::MAX, async |url, log| {
            let all = exported(&url, &[]).await.unwrap();
            assert_eq!(positions(&all), (1..=1_300).collect::<Vec<_>>());
            let part = exported(&url, &["--from", "450", "--to", "1100"]).await.unwrap();
            assert_eq!(positions(&part), (450..=1_100).collect::<Vec<_>>());
            let beyond = exported(&url, &["--from", "1299", "--to", "9000"]).await.unwrap();
            assert_eq!(positions(&beyond), [1_299, 1_300]);
            log.head.store(0, std::sync::atomic::Ordering::SeqCst);
            assert_eq!(exported(&url, &[]).await.unwrap(), "");
        })
        .await;
    }

    #[tokio::test]
    async fn an_export_that_was_cut_off_goes_on_where_it_was() {
        with_log(1_300, u64::MAX, async |url, _| {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("log.ndjson");
            let file = path.to_str().unwrap();
            exported(&url, &["--output", file]).await.unwrap();
            let whole = fs::read_to_string(&path).unwrap();
            assert_eq!(positions(&whole), (1..=1_300).collect::<Vec<_>>());

            // Written over by nothing but --resume.
            let refused = exported(&url, &["--output", file]).await;
            assert!(matches!(refused, Err(Failure::Usage(_))), "{refused:?}");
            let cuts = [0, 1, whole.len() / 2, whole.len() - 1, whole.len()];
            for cut in cuts {
                fs::write(&path, &whole[..cut]).unwrap();
                exported(&url, &["--output", file, "--resume"]).await.unwrap();
                assert_eq!(fs::read_to_string(&path).unwrap(), whole, "cut at {cut}");
            }

            fs::write(&path, "my notes\n").unwrap();
            let refused = exported(&url, &["--output", file, "--resume"]).await;
            assert!(matches!(refused, Err(Failure::Failed(_))), "{refused:?}");
            assert_eq!(fs::read_to_string(&path).unwrap(), "my notes\n");
        })
        .await;
    }

    #[tokio::test]
    async fn a_daemon_that_goes_away_fails_the_export_and_leaves_whole_lines() {
        with_log(1_300, 3, async |url, _| {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("log.ndjson");
            let file = path.to_str().unwrap();
            let mut runs = 0;
            while exported(&url, &["--output", file, "--resume"]).await.is_err() {
                runs += 1;
                assert!(runs < 10);
            }
            assert!(runs > 0);
            let whole = fs::read_to_string(&path).unwrap();
            assert_eq!(positions(&whole), (1..=1_300).collect::<Vec<_>>());
        })
        .await;
    }
}
