//! Publishing to a daemon that is played by a small HTTP server.

use std::sync::{Arc, Mutex};

use axum::{
    Json, Router,
    body::Bytes,
    extract::State,
    http::{HeaderMap, StatusCode},
    response::IntoResponse,
    routing::post,
};
use clap::Parser as _;
use serde_json::Value;

use super::*;
use crate::cli::{Cli, Command, dispatch};

/// Content type, token and body of each request.
type Requests = Arc<Mutex<Vec<(String, String, String)>>>;

async fn take(
    State(requests): State<Requests>,
    headers: HeaderMap,
    body: Bytes,
) -> impl IntoResponse {
    let header =
        |name: &str| headers.get(name).map(|v| v.to_str().unwrap().to_owned()).unwrap_or_default();
    let body = String::from_utf8(body.to_vec()).unwrap();
    if body.contains("refuse") {
        let problem = serde_json::json!({ "title": "nothing was an event", "detail": "all bad" });
        return (StatusCode::BAD_REQUEST, Json(problem)).into_response();
    }
    let mut requests = requests.lock().unwrap();
    requests.push((header("content-type"), header("authorization"), body));
    let position = requests.len();
    Json(serde_json::json!({
        "stored": 1,
        "duplicates": 2,
        "quarantined": [{ "index": 0, "reason": "a reason" }],
        "position": position,
        "a field of later versions": true,
    }))
    .into_response()
}

/// Runs a test against a daemon at the URL it is given.
async fn with_daemon<T>(test: impl AsyncFnOnce(String, Requests) -> T) -> T {
    let requests = Requests::default();
    let app = Router::new().route("/v1/events", post(take)).with_state(Arc::clone(&requests));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::select! {
        served = axum::serve(listener, app) => panic!("the server ended: {served:?}"),
        result = test(url, requests) => result,
    }
}

fn client(url: &str) -> Client {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let cli = Cli::parse_from(["pulsebus", "publish", "--url", url]);
    let Some(Command::Publish(args)) = &cli.command else { panic!() };
    args.client.client(&cli.settings).unwrap()
}

#[tokio::test]
async fn parts_are_sent_in_order_and_their_answers_added_up() {
    with_daemon(async |url, requests| {
        let text: String = (0..1_500).map(|n| format!("{{\"n\":{n}}}\n")).collect();
        let mut totals = Totals::default();
        over_http(&client(&url), Input::text(text), &mut totals).await.unwrap();
        let requests = requests.lock().unwrap();
        let n = requests.len() as u64;
        assert!(n >= 2, "a part has at most 1,000 lines");
        assert_eq!((totals.stored, totals.duplicates), (n, 2 * n));
        assert_eq!(totals.position, Some(n));
        // Each request's first event went to quarantine; its number counts from the beginning.
        let mut before = 0;
        let mut expected = Vec::new();
        let mut sent = Vec::new();
        for (_, _, body) in requests.iter() {
            expected.push(before);
            before += body.lines().count() as u64;
            sent.extend(body.lines().map(str::to_owned));
        }
        assert_eq!(totals.quarantined.iter().map(|q| q.0).collect::<Vec<_>>(), expected);
        assert_eq!(sent, (0..1_500).map(|n| format!("{{\"n\":{n}}}")).collect::<Vec<_>>());
    })
    .await;
}

#[tokio::test]
async fn a_document_is_sent_byte_for_byte_with_the_token() {
    with_daemon(async |url, requests| {
        let dir = tempfile::tempdir().unwrap();
        let token = dir.path().join("token");
        std::fs::write(&token, "tok\n").unwrap();
        let body = "{\"type\": \"A\",\n  \"data\": 1.10 }";
        let code = run_in_thread(&[
            "publish",
            "--url",
            &url,
            "--token-file",
            token.to_str().unwrap(),
            "--json",
            body,
        ])
        .await;
        // One event went to quarantine.
        assert_eq!(code.unwrap(), ExitCode::from(FAILED));
        let requests = requests.lock().unwrap();
        let (kind, authorization, sent) = &requests[0];
        assert_eq!((kind.as_str(), authorization.as_str()), ("application/json", "Bearer tok"));
        assert_eq!(sent, body);
    })
    .await;
}

#[tokio::test]
async fn a_made_event_keeps_its_data_and_has_an_id() {
    with_daemon(async |url, requests| {
        let args = ["publish", "--url", &url, "--type", "T", "--key", "k", "--data", "{\"a\":1.0}"];
        run_in_thread(&args).await.unwrap();
        let requests = requests.lock().unwrap();
        let sent = &requests[0].2;
        assert!(sent.contains("\"data\":{\"a\":1.0}"), "{sent}");
        let event: Value = serde_json::from_str(sent).unwrap();
        assert_eq!((&event["type"], &event["key"]), (&Value::from("T"), &Value::from("k")));
        assert!(event["id"].as_str().unwrap().parse::<Uuid>().is_ok());
    })
    .await;
}

#[tokio::test]
async fn what_goes_wrong_says_why_and_what_to_do() {
    let failed = |result: Result<ExitCode, Failure>| match result {
        Err(Failure::Failed(error)) => format!("{error:#}"),
        other => panic!("{other:?}"),
    };
    with_daemon(async |url, _| {
        let refused = failed(run_in_thread(&["publish", "--url", &url, "\"refuse\""]).await);
        assert!(refused.contains("nothing was an event: all bad"), "{refused}");
    })
    .await;
    // Nobody listens on the port of a listener that is gone.
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let url = format!("http://127.0.0.1:{port}");
    let away = failed(run_in_thread(&["publish", "--url", &url, "{}"]).await);
    assert!(away.contains("is the daemon running?") && away.contains(&url), "{away}");
    let away = failed(run_in_thread(&["events", "list", "--url", &url]).await);
    assert!(away.contains("pulsebus run"), "{away}");

    let usage = run_in_thread(&["publish", "--url", &url, "--type", "T", "--data", "{a}"]).await;
    assert!(matches!(&usage, Err(Failure::Usage(text)) if text.contains("--data")), "{usage:?}");
    let broken = failed(run_in_thread(&["publish", "--url", &url, "{a}"]).await);
    assert!(broken.contains("not JSON"), "{broken}");
}

/// Runs a whole command beside the test's own runtime.
async fn run_in_thread(args: &[&str]) -> Result<ExitCode, Failure> {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let args: Vec<String> =
        std::iter::once("pulsebus").chain(args.iter().copied()).map(str::to_owned).collect();
    tokio::task::spawn_blocking(move || dispatch(Cli::parse_from(args))).await.unwrap()
}
