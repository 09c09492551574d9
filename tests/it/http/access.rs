//! Who is served.

use pulsebus::{secret::Secret, store::memory::MemoryStore};
use reqwest::StatusCode;

use super::{Raw, Server, problem};
use crate::support::process::folder;

const GUARDED: [&str; 7] = [
    "/v1/events",
    "/v1/events/1",
    "/v1/events/stream",
    "/v1/sources",
    "/v1/handlers",
    "/v1/quarantine",
    "/metrics",
];

#[tokio::test]
async fn with_a_token_only_who_has_it_is_served() {
    let file = folder("token").join("token");
    std::fs::write(&file, "first\n").unwrap();
    let token = Secret::File(file.clone());
    let server = Server::with(MemoryStore::new(), |options| options.token = Some(token)).await;
    for path in GUARDED {
        for given in
            [None, Some("Bearer wrong"), Some("Bearer first2"), Some("Basic first"), Some("first")]
        {
            let mut request = server.get(path);
            if let Some(given) = given {
                request = request.header("authorization", given);
            }
            let answer = request.try_clone().unwrap().send().await.unwrap();
            assert_eq!(answer.headers()["www-authenticate"], "Bearer realm=\"pulsebus\"");
            assert_eq!(problem(request).await.0, StatusCode::UNAUTHORIZED, "{path} {given:?}");
        }
        let answer = server.get(path).bearer_auth("first").send().await.unwrap();
        assert_ne!(answer.status(), StatusCode::UNAUTHORIZED, "{path}");
    }
    let event = r#"{"id":"1","type":"T","data":1}"#;
    assert_eq!(problem(server.post(event)).await.0, StatusCode::UNAUTHORIZED);
    assert_eq!(server.bus.log().head().0, 0);
    let posted = server.post(event).bearer_auth("first").send().await.unwrap();
    assert_eq!(posted.status(), StatusCode::OK);
    // Health says nothing secret, and whoever asks has no token.
    for path in ["/healthz", "/readyz"] {
        assert_eq!(server.get(path).send().await.unwrap().status(), StatusCode::OK, "{path}");
    }

    // A new token counts from the next request on, the old one no more.
    std::fs::write(&file, "second\n").unwrap();
    let old = server.get("/v1/events").bearer_auth("first");
    assert_eq!(problem(old).await.0, StatusCode::UNAUTHORIZED);
    let new = server.get("/v1/events").bearer_auth("second").send().await.unwrap();
    assert_eq!(new.status(), StatusCode::OK);
    // An empty file is no token that anybody has.
    std::fs::write(&file, "").unwrap();
    for request in [server.get("/v1/events").bearer_auth(""), server.get("/v1/events")] {
        assert!(!request.send().await.unwrap().status().is_success());
    }
}

#[tokio::test]
async fn without_a_token_web_pages_are_kept_out() {
    let server = Server::start().await;
    let port = server.port;
    let ask = async |host: &str, origin: Option<&str>| {
        let mut raw = Raw::connect(&server).await;
        let origin = origin.map(|origin| format!("Origin: {origin}\r\n")).unwrap_or_default();
        raw.write(format!("GET /v1/events HTTP/1.1\r\nHost: {host}\r\n{origin}\r\n")).await;
        let (status, head, _) = raw.answer().await;
        let kind = if status == 200 { "application/json" } else { "application/problem+json" };
        assert!(head.to_ascii_lowercase().contains(&format!("content-type: {kind}\r\n")), "{head}");
        status
    };
    for host in ["localhost", "127.0.0.1", "[::1]"] {
        assert_eq!(ask(&format!("{host}:{port}"), None).await, 200, "{host}");
        assert_eq!(ask(host, Some(&format!("http://{host}:{port}"))).await, 200, "{host}");
    }
    for host in ["example.com", "127.0.0.1.example.com", "10.0.0.1", "localhost.example.com:80"] {
        assert_eq!(ask(host, None).await, 403, "{host}");
    }
    for origin in [
        "https://example.com",
        "null",
        "http://localhost.example.com",
        "http://127.0.0.1@example.com",
    ] {
        assert_eq!(ask(&format!("localhost:{port}"), Some(origin)).await, 403, "{origin}");
    }
    // Absolute form: the authority of the target counts, not the header.
    let mut raw = Raw::connect(&server).await;
    raw.write("GET http://example.com/v1/events HTTP/1.1\r\nHost: localhost\r\n\r\n").await;
    assert_eq!(raw.answer().await.0, 403);
    // No page may post, whatever it calls its content.
    let mut raw = Raw::connect(&server).await;
    raw.write(format!(
        "POST /v1/events HTTP/1.1\r\nHost: localhost:{port}\r\nOrigin: https://example.com\r\n\
         Content-Type: text/plain\r\nContent-Length: 2\r\n\r\n{{}}"
    ))
    .await;
    assert_eq!(raw.answer().await.0, 403);
    assert_eq!(server.bus.log().head().0, 0);
}
