//! What can be read: events, quarantine, sources, handlers, search; and every error.

use pulsebus::store::memory::MemoryStore;
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use super::{Server, answer, has_members, problem};
use crate::support::{process::folder, wait_until};

fn positions(page: &Value) -> Vec<u64> {
    page["events"]
        .as_array()
        .unwrap()
        .iter()
        .map(|event| event["position"].as_u64().unwrap())
        .collect()
}

/// Every page from the first to the one without a next.
async fn pages(server: &Server, query: &str) -> Vec<Vec<u64>> {
    let mut pages = Vec::new();
    let mut page = server.json(&format!("/v1/events?{query}")).await;
    loop {
        pages.push(positions(&page));
        assert!(pages.len() < 100, "it does not end: {pages:?}");
        let Some(next) = page["next"].as_u64() else { return pages };
        page = server.json(&format!("/v1/events?{query}&after={next}")).await;
    }
}

#[tokio::test]
async fn events_come_in_pages_either_way() {
    let server = Server::start().await;
    let nothing = server.json("/v1/events").await;
    assert_eq!(nothing, json!({"events": [], "next": null, "first": 1}));
    server.fill("A", "x", 7).await;
    server.fill("B", "x", 5).await;
    server.fill("A", "y", 8).await;
    let all: Vec<u64> = (1..=20).collect();
    let back: Vec<u64> = (1..=20).rev().collect();
    for limit in [1, 3, 20, 1_000] {
        let pages = |query: String| {
            let server = &server;
            async move {
                let pages = pages(server, &query).await;
                assert!(pages.iter().all(|page| page.len() <= limit), "{query}: {pages:?}");
                pages.concat()
            }
        };
        assert_eq!(pages(format!("limit={limit}")).await, all);
        assert_eq!(pages(format!("limit={limit}&order=desc")).await, back);
        let of_b: Vec<u64> = (8..=12).collect();
        assert_eq!(pages(format!("limit={limit}&type=B")).await, of_b);
        let of_y: Vec<u64> = (13..=20).rev().collect();
        assert_eq!(pages(format!("limit={limit}&key=y&order=desc")).await, of_y);
        let both: Vec<u64> = (1..=7).collect();
        assert_eq!(pages(format!("limit={limit}&key=x&type=A")).await, both);
    }
    assert_eq!(positions(&server.json("/v1/events?from=19").await), [19, 20]);
    assert_eq!(positions(&server.json("/v1/events?from=2&order=desc").await), [2, 1]);
    assert_eq!(positions(&server.json("/v1/events?from=3&type=A&limit=2").await), [3, 4]);
    assert!(positions(&server.json("/v1/events?from=21").await).is_empty());
    assert!(positions(&server.json("/v1/events?type=C").await).is_empty());
}

#[tokio::test]
async fn G7_a_page_of_large_events_is_cut_by_size() {
    let server = Server::start().await;
    for n in 0..24 {
        let large = "x".repeat(1_000_000);
        let body = json!({"id": n, "type": "Large", "key": "k", "data": large}).to_string();
        assert_eq!(answer(server.post(body)).await["stored"], 1);
    }
    for query in ["limit=1000", "limit=1000&type=Large", "limit=1000&order=desc&key=k"] {
        let text = server.get(&format!("/v1/events?{query}")).send().await.unwrap();
        let size = text.bytes().await.unwrap().len();
        assert!(size < 45_000_000, "{query}: {size} bytes");
        let mut all = pages(&server, query).await.concat();
        all.sort_unstable();
        assert_eq!(all, (1..=24).collect::<Vec<u64>>(), "{query}");
    }
}

#[tokio::test]
async fn lists_have_the_members_scripts_rely_on() {
    let folder = folder("api");
    let server = Server::composed(&folder).await;
    let lesson = r#"{"id":"l","type":"LessonPublished","key":"7","data":
        {"lesson_id":"7","title":"Photosynthesis for beginners","author_id":"a","published_at":1}}"#;
    assert_eq!(answer(server.post(lesson)).await["stored"], 1);
    let bad = server.post("{").header("x-trace", "t");
    assert_eq!(problem(bad).await.0, StatusCode::UNPROCESSABLE_ENTITY);

    let event = [
        "position",
        "id",
        "source",
        "type",
        "subject",
        "time",
        "key",
        "recorded_at",
        "format",
        "headers",
        "body",
    ];
    let events = server.json("/v1/events").await;
    has_members(&events["events"][0], &event);
    has_members(&events, &["next"]);
    has_members(&server.json("/v1/events/1").await, &event);

    let sources = server.json("/v1/sources").await;
    let source = &sources["sources"][0];
    has_members(source, &["name", "transport", "state", "received", "reason"]);
    assert_eq!((&source["name"], &source["state"]), (&json!("http"), &json!("consuming")));
    assert_eq!(source["received"], 2);

    let handled = "/v1/handlers/search";
    wait_until("the lesson is handled", async || {
        (server.json(handled).await["lag"] == 0).then_some(())
    })
    .await;
    let handlers = server.json("/v1/handlers").await;
    let handler = &handlers["handlers"][0];
    let wanted = [
        "name",
        "kind",
        "state",
        "position",
        "lag",
        "in_flight",
        "retrying",
        "parked",
        "dead",
        "reason",
    ];
    has_members(handler, &wanted);
    assert_eq!(handler["name"], "search");
    assert_eq!(handler["kind"], "search");
    assert_eq!(handler["state"], "running");

    let quarantine = server.json("/v1/quarantine").await;
    has_members(&quarantine, &["next"]);
    let entry = &quarantine["quarantine"][0];
    has_members(entry, &["number", "source", "received_at", "reason", "headers", "size"]);
    assert_eq!(entry["source"], "http");
    assert_eq!(entry["size"], 1);
    assert_eq!(entry["headers"]["x-trace"], "t");

    let dead = server.json("/v1/dead-letters").await;
    assert_eq!(dead, json!({"dead_letters": [], "next": null}));

    let found = wait_until("the lesson is found", async || {
        let found = server.json("/v1/search/search?q=photosynthesis").await;
        (found["total"] == 1).then_some(found)
    })
    .await;
    let hit = &found["hits"][0];
    has_members(hit, &["id", "type", "position", "score", "fields", "snippets"]);
    assert_eq!((&hit["id"], &hit["position"]), (&json!("7"), &json!(1)));
    assert!(hit["snippets"]["title"].as_str().unwrap().contains("<b>Photosynthesis</b>"), "{hit}");
}

#[tokio::test]
async fn quarantine_comes_in_pages() {
    let server = Server::start().await;
    for n in 0..5 {
        let (status, _) = problem(server.post(format!("bad {n}"))).await;
        assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY);
    }
    let mut sizes = Vec::new();
    let mut numbers = Vec::new();
    let mut path = "/v1/quarantine?limit=2".to_owned();
    loop {
        let page = server.json(&path).await;
        let entries = page["quarantine"].as_array().unwrap();
        sizes.push(entries.len());
        numbers.extend(entries.iter().map(|entry| entry["number"].as_u64().unwrap()));
        let Some(next) = page["next"].as_u64() else { break };
        path = format!("/v1/quarantine?limit=2&after={next}");
    }
    assert_eq!(sizes, [2, 2, 1]);
    assert!(numbers.is_sorted() && numbers.len() == 5, "{numbers:?}");
}

#[tokio::test]
async fn handlers_are_paused_and_resumed() {
    let folder = folder("api");
    let server = Server::composed(&folder).await;
    let state = async |wanted: &str| {
        wait_until(wanted, async || {
            let handler = server.json("/v1/handlers/search").await;
            (handler["state"] == wanted).then_some(())
        })
        .await;
    };
    for (what, wanted) in [("pause", "paused"), ("resume", "running")] {
        let path = server.at(&format!("/v1/handlers/search/{what}"));
        let answer = answer(server.http.post(path)).await;
        has_members(&answer, &["name", "state", "position"]);
        state(wanted).await;
    }
}

#[tokio::test]
async fn every_error_is_a_problem() {
    let folder = folder("api");
    let server = Server::composed(&folder).await;
    server.fill("A", "x", 2).await;
    for (path, status) in [
        ("/", 404),
        ("/v1", 404),
        ("/v1/nothing", 404),
        ("/v1/events/3", 404),
        ("/v1/events/0", 404),
        ("/v1/events/18446744073709551615", 404),
        ("/v1/events/x", 400),
        ("/v1/events/-1", 400),
        ("/v1/events/18446744073709551616", 400),
        ("/v1/events/%ff", 400),
        ("/v1/events?limit=0", 400),
        ("/v1/events?limit=1001", 400),
        ("/v1/events?limit=x", 400),
        ("/v1/events?order=up", 400),
        ("/v1/events?from=1&after=1", 400),
        ("/v1/events?typo=A", 400),
        ("/v1/quarantine?limit=0", 400),
        ("/v1/quarantine?typo=1", 400),
        ("/v1/dead-letters?limit=9999", 400),
        ("/v1/handlers/nobody", 404),
        ("/v1/handlers/%ff", 400),
        ("/v1/search/nobody?q=x", 404),
        ("/v1/search/%ff?q=x", 400),
        ("/v1/search/search?limit=x", 400),
        ("/v1/events/stream?from=x", 400),
    ] {
        let (answered, problem) = problem(server.get(path)).await;
        assert_eq!(answered.as_u16(), status, "{path}: {problem}");
    }
    let (_, missing) = problem(server.get("/v1/events/3")).await;
    assert_eq!(missing["head"], 2, "{missing}");
    for (method, path) in [
        (Method::DELETE, "/v1/events"),
        (Method::POST, "/v1/events/1"),
        (Method::PUT, "/v1/handlers"),
        (Method::GET, "/v1/handlers/search/pause"),
        (Method::POST, "/metrics"),
        (Method::POST, "/readyz"),
    ] {
        let (status, problem) = problem(server.http.request(method.clone(), server.at(path))).await;
        assert_eq!(status, StatusCode::METHOD_NOT_ALLOWED, "{method} {path}: {problem}");
    }
    for what in ["pause", "resume"] {
        let path = server.at(&format!("/v1/handlers/nobody/{what}"));
        assert_eq!(problem(server.http.post(path)).await.0, StatusCode::NOT_FOUND);
    }
    let last_seen = server.get("/v1/events/stream").header("last-event-id", "x");
    assert_eq!(problem(last_seen).await.0, StatusCode::BAD_REQUEST);
}

#[tokio::test]
async fn S6_what_the_store_refuses_is_answered_with_its_reason() {
    let store = MemoryStore::refusing(|event| {
        (event.kind() == "Refused").then(|| "the database says no".to_owned())
    });
    let server = Server::with(store, |_| {}).await;
    let mixed = r#"[{"id":"1","type":"T","data":1},{"id":"2","type":"Refused","data":1},
        {"id":"3","type":"T","data":1}]"#;
    let mixed = answer(server.post(mixed)).await;
    assert_eq!((&mixed["stored"], &mixed["position"]), (&json!(2), &json!(2)));
    assert_eq!(mixed["quarantined"][0]["index"], 1);
    let reason = mixed["quarantined"][0]["reason"].as_str().unwrap();
    assert!(reason.contains("refused by the store: the database says no"), "{reason}");
    let (status, _) = problem(server.post(r#"{"id":"2","type":"Refused","data":1}"#)).await;
    assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY);
}
