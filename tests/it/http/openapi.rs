//! `/openapi.json` and what is really answered, compared by a validator that is not ours.

use std::{collections::BTreeMap, time::Duration};

use serde_json::{Value, json};
use tokio::{process::Command, time::timeout};

use super::{Server, answer};
use crate::support::{PATIENCE, picky::Picky, wait_until};

fn get(path: &str, status: u16) -> Value {
    json!({"path": path, "status": status})
}

fn order(path: &str, body: &Value, status: u16) -> Value {
    json!({"path": path, "method": "POST", "body": body, "status": status})
}

#[tokio::test]
async fn the_api_answers_as_it_is_described() {
    let folder = tempfile::tempdir().unwrap();
    let server = Server::composed(folder.path()).await;
    Picky::register(&server.bus, "picky", true).await;
    let lesson = json!({"id": "l", "type": "LessonPublished", "time": "2026-01-01T00:00:00Z",
        "subject": "s", "data": {"lesson_id": "7", "title": "Fractions", "author_id": "a",
        "published_at": 1_767_225_600_000_u64}});
    let bad = json!({"specversion": "1.0"});
    let posted = answer(server.post(json!([lesson, lesson, bad]).to_string())).await;
    assert_eq!((&posted["stored"], &posted["duplicates"]), (&json!(1), &json!(1)), "{posted}");
    server.fill("A", "k", 3).await;
    wait_until("a dead letter, its followers, a hit", async || {
        let letters = server.json("/v1/dead-letters?handler=picky&position=2").await;
        let hits = server.json("/v1/search/search?q=fractions").await;
        (letters["dead_letters"][0]["followers"] == 2 && hits["total"] == 1).then_some(())
    })
    .await;

    let all = json!({"filter": {}, "dry_run": true});
    let some = json!({"filter": {"positions": [999]}, "by": "test", "rate": 5});
    let none = json!({"filter": {"numbers": [999]}, "by": "test", "reason": "no use"});
    let examples: BTreeMap<&str, Vec<Value>> = BTreeMap::from([
        (
            "/v1/events",
            vec![
                get("/v1/events?order=desc&limit=2", 200),
                get("/v1/events?limit=0", 400),
                order("/v1/events", &json!([{"id": "l2", "type": "X", "data": 1}, bad]), 200),
                order("/v1/events", &bad, 422),
            ],
        ),
        ("/v1/events/{position}", vec![get("/v1/events/1", 200), get("/v1/events/999", 404)]),
        ("/v1/sources", vec![get("/v1/sources", 200)]),
        ("/v1/handlers", vec![get("/v1/handlers", 200)]),
        (
            "/v1/handlers/{name}",
            vec![get("/v1/handlers/picky", 200), get("/v1/handlers/nobody", 404)],
        ),
        (
            "/v1/handlers/{name}/pause",
            vec![order("/v1/handlers/search/pause?by=test", &Value::Null, 200)],
        ),
        (
            "/v1/handlers/{name}/resume",
            vec![order("/v1/handlers/search/resume", &Value::Null, 200)],
        ),
        (
            "/v1/handlers/{name}/rewind",
            vec![
                order("/v1/handlers/search/rewind", &json!({"position": 1}), 200),
                order("/v1/handlers/search/rewind", &json!({}), 400),
            ],
        ),
        (
            "/v1/handlers/{name}/rebuild",
            vec![order("/v1/handlers/search/rebuild", &Value::Null, 202)],
        ),
        (
            "/v1/dead-letters",
            vec![get("/v1/dead-letters", 200), get("/v1/dead-letters?limit=1", 200)],
        ),
        (
            "/v1/dead-letters/{handler}/{position}",
            vec![get("/v1/dead-letters/picky/2", 200), get("/v1/dead-letters/picky/999", 404)],
        ),
        (
            "/v1/dead-letters/retry",
            vec![
                order("/v1/dead-letters/retry", &all, 200),
                order("/v1/dead-letters/retry", &some, 202),
            ],
        ),
        ("/v1/dead-letters/discard", vec![order("/v1/dead-letters/discard", &all, 200)]),
        ("/v1/quarantine", vec![get("/v1/quarantine", 200)]),
        (
            "/v1/quarantine/{number}",
            vec![get("/v1/quarantine/1", 200), get("/v1/quarantine/999", 404)],
        ),
        ("/v1/quarantine/retry", vec![order("/v1/quarantine/retry", &all, 200)]),
        ("/v1/quarantine/discard", vec![order("/v1/quarantine/discard", &none, 202)]),
        ("/v1/redrives", vec![get("/v1/redrives", 200)]),
        ("/v1/redrives/{number}", vec![get("/v1/redrives/1", 200), get("/v1/redrives/999", 404)]),
        ("/v1/audit", vec![get("/v1/audit", 200)]),
        (
            "/v1/search/{handler}",
            vec![get("/v1/search/search?q=fractions", 200), get("/v1/search/nobody?q=x", 404)],
        ),
        ("/healthz", vec![get("/healthz", 200)]),
        ("/readyz", vec![get("/readyz", 200)]),
        ("/openapi.json", vec![get("/openapi.json", 200)]),
    ]);
    let file = folder.path().join("examples.json");
    std::fs::write(&file, serde_json::to_string(&examples).unwrap()).unwrap();

    let python = std::env::var_os("TEST_PULSEBUS_PYTHON")
        .expect("TEST_PULSEBUS_PYTHON: run the tests by tests/run, which installs the validators");
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/clients/openapi.py");
    let mut check = Command::new(python);
    check.args([script, &server.url]).arg(&file).kill_on_drop(true);
    let limit = PATIENCE.max(Duration::from_secs(60));
    let output = timeout(limit, check.output()).await.unwrap().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
}
