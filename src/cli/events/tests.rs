//! Listing from a daemon that is played by a small HTTP server.

use std::{
    collections::HashMap,
    fmt::Write as _,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use axum::{Router, extract::Query, http::StatusCode, response::IntoResponse, routing::get};
use clap::Parser as _;

use super::*;
use crate::cli::{Cli, Command as Any};

/// A log of so many events; it is away for one request after each `away` of them.
#[derive(Clone)]
pub(super) struct Log {
    pub(super) head: Arc<AtomicU64>,
    asked: Arc<AtomicU64>,
    away: u64,
}

/// As it was published, and as no parser would print it again.
const BODY: &str = r#"{"n": 1.50, "n":1e400,  "t":"a\u0062"}"#;

fn answer(log: &Log, query: &HashMap<String, String>) -> axum::response::Response {
    if (log.asked.fetch_add(1, Ordering::SeqCst) + 1).is_multiple_of(log.away) {
        return StatusCode::SERVICE_UNAVAILABLE.into_response();
    }
    let number = |name: &str| query.get(name).map(|n| n.parse::<u64>().unwrap());
    let head = log.head.load(Ordering::SeqCst);
    // Pages are smaller than what may be asked for.
    let limit = number("limit").unwrap().min(400) as usize;
    let positions: Vec<u64> = match query["order"].as_str() {
        "asc" => (number("from").unwrap_or(1)..=head).take(limit).collect(),
        _ => (1..=number("from").unwrap_or(head).min(head)).rev().take(limit).collect(),
    };
    let mut json = String::from("{\"events\": [");
    for (i, position) in positions.iter().enumerate() {
        let comma = if i > 0 { "," } else { "" };
        write!(json, "{comma}{{\"position\":{position},\"type\":\"T\",\"body\":{BODY}}}").unwrap();
    }
    json.push_str("], \"next\": null}");
    json.into_response()
}

pub(super) async fn with_log<T>(
    head: u64,
    away: u64,
    test: impl AsyncFnOnce(String, Log) -> T,
) -> T {
    let log = Log { head: Arc::new(head.into()), asked: Arc::default(), away };
    let served = log.clone();
    let app = Router::new().route(
        "/v1/events",
        get(async move |Query(query): Query<HashMap<String, String>>| answer(&served, &query)),
    );
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::select! {
        served = axum::serve(listener, app) => panic!("the server ended: {served:?}"),
        result = test(url, log) => result,
    }
}

pub(super) fn parsed(url: &str, args: &[&str]) -> (Client, Command) {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let args = [&["pulsebus", "events"], args, &["--url", url]].concat();
    let cli = Cli::parse_from(args);
    let Some(Any::Events(command)) = cli.command else { panic!() };
    let (Command::List(List { client, .. })
    | Command::Tail(Tail { client, .. })
    | Command::Export(export::Export { client, .. })
    | Command::Get(Get { client, .. })) = &command;
    (client.client(&cli.settings).unwrap(), command)
}

async fn listed(url: &str, args: &[&str]) -> Vec<String> {
    let (client, command) = parsed(url, args);
    let Command::List(list) = command else { panic!() };
    let mut out = Vec::new();
    super::list(&client, &list, &mut out).await.unwrap();
    String::from_utf8(out).unwrap().lines().map(str::to_owned).collect()
}

fn positions(lines: &[String]) -> Vec<u64> {
    let position = |line: &String| serde_json::from_str::<Event>(line).unwrap().position;
    lines.iter().map(position).collect()
}

#[tokio::test]
async fn a_list_goes_on_over_pages_in_both_directions() {
    with_log(1_200, u64::MAX, async |url, _| {
        let lines = listed(&url, &["list", "--json", "-n", "1100"]).await;
        assert_eq!(positions(&lines), (1..=1_100).collect::<Vec<_>>());
        let lines = listed(&url, &["list", "--json", "--from", "1190", "-n", "100"]).await;
        assert_eq!(positions(&lines), (1_190..=1_200).collect::<Vec<_>>());
        let lines = listed(&url, &["list", "--json", "--reverse", "-n", "5000"]).await;
        assert_eq!(positions(&lines), (1..=1_200).rev().collect::<Vec<_>>());
        let lines = listed(&url, &["list", "--from", "5000"]).await;
        assert_eq!(lines, ["no events"]);
    })
    .await;
}

#[tokio::test]
async fn G9_a_body_is_printed_as_it_was_published() {
    with_log(2, u64::MAX, async |url, _| {
        let lines = listed(&url, &["list", "--json"]).await;
        assert!(lines[0].contains(BODY), "{lines:?}");
        let lines = listed(&url, &["list"]).await;
        assert!(lines[0].starts_with("POSITION") && lines[1].contains(BODY), "{lines:?}");
    })
    .await;
}

#[tokio::test]
async fn a_tail_misses_nothing_and_repeats_nothing_while_the_daemon_comes_and_goes() {
    with_log(30, 3, async |url, log| {
        let (client, command) = parsed(&url, &["tail", "--json", "-n", "5"]);
        let Command::Tail(tail) = command else { panic!() };
        // Reads what is printed while it is printed, and appends more when it has seen that.
        let (mut reader, writer) = std::io::pipe().unwrap();
        let head = Arc::clone(&log.head);
        let watch = tokio::task::spawn_blocking(move || {
            let mut lines = std::io::BufRead::lines(std::io::BufReader::new(&mut reader));
            let mut seen = Vec::new();
            while seen.last() != Some(&1_700) {
                seen.extend(positions(&[lines.next().unwrap().unwrap()]));
                if seen.last() == Some(&30) {
                    head.store(40, Ordering::SeqCst);
                }
                if seen.last() == Some(&40) {
                    head.store(1_700, Ordering::SeqCst);
                }
            }
            seen
        });
        let mut writer = writer;
        let seen = tokio::select! {
            ended = super::tail(&client, &tail, &mut writer) => panic!("it ended: {ended:?}"),
            seen = watch => seen.unwrap(),
        };
        assert_eq!(seen, (26..=1_700).collect::<Vec<_>>());
    })
    .await;
}
