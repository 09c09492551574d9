//! What a person can tell the daemon: dead letters and quarantine retried and discarded, handlers
//! paused and rewound; and what is written down of it.

use std::{sync::Arc, time::Duration};

use pulsebus::store::{EventStore, memory::MemoryStore};
use reqwest::{RequestBuilder, StatusCode};
use serde_json::{Value, json};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use super::{Server, answer, has_members, problem};
use crate::support::{picky::Picky, wait_until};

/// The dead letters that match, once there are so many, as (handler, position).
async fn letters(server: &Server, query: &str, count: usize) -> Vec<(String, u64)> {
    wait_until(&format!("{count} dead letters with {query}"), async || {
        let page = server.json(&format!("/v1/dead-letters?{query}")).await;
        let found: Vec<_> = page["dead_letters"].as_array().unwrap().iter().map(place).collect();
        (found.len() == count).then_some(found)
    })
    .await
}

fn place(letter: &Value) -> (String, u64) {
    (letter["handler"].as_str().unwrap().to_owned(), letter["position"].as_u64().unwrap())
}

/// Posts an event of type `A` for each of so many keys.
async fn fill_keys(server: &Server, count: usize) {
    let event = |n| json!({"id": format!("k{n}"), "type": "A", "key": format!("k{n}"), "data": n});
    let events: Vec<_> = (0..count).map(event).collect();
    assert_eq!(answer(server.post(json!(events).to_string())).await["stored"], count);
}

/// Posts so many messages that are no events.
async fn fill_quarantine(server: &Server, count: usize) {
    for _ in 0..count {
        let answer = server.post(r#"{"specversion":"1.0"}"#).send().await.unwrap();
        assert!(answer.status().is_client_error(), "{answer:?}");
    }
}

/// The redrive that an order has started.
async fn started(request: RequestBuilder) -> Value {
    let answer = request.send().await.unwrap();
    assert_eq!(answer.status(), StatusCode::ACCEPTED);
    let answer: Value = answer.json().await.unwrap();
    assert_eq!(answer["matching"], Value::Null);
    answer["redrive"].clone()
}

/// The redrive, once it is in this state.
async fn redrive(server: &Server, number: &Value, state: &str) -> Value {
    wait_until(&format!("redrive {number} is {state}"), async || {
        let redrive = server.json(&format!("/v1/redrives/{number}")).await;
        (redrive["state"] == state).then_some(redrive)
    })
    .await
}

fn at(time: &Value) -> OffsetDateTime {
    OffsetDateTime::parse(time.as_str().unwrap(), &Rfc3339).unwrap()
}

async fn no_redrives(server: &Server) {
    assert_eq!(server.json("/v1/redrives").await, json!({"redrives": [], "next": null}));
}

#[tokio::test]
async fn dead_letters_come_in_pages_and_by_filter() {
    let server = Server::start().await;
    Picky::register(&server.bus, "mail", true).await;
    Picky::register(&server.bus, "push", true).await;
    for (kind, key) in [("A", "k1"), ("A", "k2"), ("A", "k3"), ("B", "k4")] {
        server.fill(kind, key, 1).await;
    }
    let all = letters(&server, "", 8).await;
    let of = |handler: &str| (1..=4).map(|n| (handler.to_owned(), n)).collect::<Vec<_>>();
    assert_eq!(all, [of("mail"), of("push")].concat());
    for limit in [1, 3, 4, 8] {
        let mut paged = Vec::new();
        let mut after = String::new();
        loop {
            let page = server.json(&format!("/v1/dead-letters?limit={limit}{after}")).await;
            let found = page["dead_letters"].as_array().unwrap();
            assert!(found.len() <= limit && paged.len() <= 8, "{page}");
            paged.extend(found.iter().map(place));
            let Some(next) = page["next"].as_str() else { break };
            after = format!("&after={next}");
        }
        assert_eq!(paged, all, "{limit}");
    }
    for (query, positions) in [
        ("handler=mail", &[1, 2, 3, 4][..]),
        ("handler=nobody", &[]),
        ("type=A&handler=push", &[1, 2, 3]),
        ("key=k4&handler=mail", &[4]),
        ("error=B%20is%20not&handler=mail", &[4]),
        ("error=%25&handler=mail", &[]),
        ("position=2,4&handler=mail", &[2, 4]),
        ("since=2999-01-01T00:00:00Z", &[]),
        ("since=1999-01-01T00:00:00Z&handler=mail", &[1, 2, 3, 4]),
        ("until=1999-01-01T00:00:00Z", &[]),
        ("until=2999-01-01T00:00:00%2B01:00&handler=mail&key=k1", &[1]),
    ] {
        let found = letters(&server, query, positions.len()).await;
        let found: Vec<_> = found.into_iter().map(|(_, position)| position).collect();
        assert_eq!(found, positions, "{query}");
    }
    let one = server.json("/v1/dead-letters/push/4").await;
    assert_eq!(
        (&one["type"], &one["key"], &one["attempts"]),
        (&json!("B"), &json!("k4"), &json!(1))
    );
    assert_eq!(one["last_error"], "B is not wanted");
    has_members(&one, &["id", "first_error", "first_failed_at", "last_failed_at", "followers"]);
    assert_eq!(one["redrive"], Value::Null);
    for (path, status) in [
        ("/v1/dead-letters/push/9", StatusCode::NOT_FOUND),
        ("/v1/dead-letters/nobody/4", StatusCode::NOT_FOUND),
        ("/v1/dead-letters/push/x", StatusCode::BAD_REQUEST),
        ("/v1/dead-letters?after=x", StatusCode::BAD_REQUEST),
        ("/v1/dead-letters?position=", StatusCode::BAD_REQUEST),
        ("/v1/dead-letters?since=yesterday", StatusCode::BAD_REQUEST),
        ("/v1/dead-letters?handlers=push", StatusCode::BAD_REQUEST),
    ] {
        assert_eq!(problem(server.get(path)).await.0, status, "{path}");
    }
}

#[tokio::test]
async fn a_dry_run_counts_and_changes_nothing() {
    let server = Server::start().await;
    let handler = Picky::register(&server.bus, "mail", true).await;
    fill_keys(&server, 3).await;
    server.fill("B", "b", 1).await;
    letters(&server, "", 4).await;
    fill_quarantine(&server, 2).await;
    for (path, filter, matching) in [
        ("/v1/dead-letters/retry", json!({}), 4),
        ("/v1/dead-letters/retry", json!({"type": "A"}), 3),
        ("/v1/dead-letters/discard", json!({"positions": [2, 4, 9]}), 2),
        ("/v1/dead-letters/discard", json!({"handler": "nobody"}), 0),
        ("/v1/quarantine/retry", json!({}), 2),
        ("/v1/quarantine/discard", json!({"numbers": [1]}), 1),
        ("/v1/quarantine/discard", json!({"source": "http", "reason": "no `id`"}), 2),
        ("/v1/quarantine/discard", json!({"reason": "x y z"}), 0),
    ] {
        let counted = answer(server.order(path, &json!({"filter": filter, "dry_run": true}))).await;
        assert_eq!(counted, json!({"matching": matching}), "{path} {filter}");
    }
    no_redrives(&server).await;
    assert_eq!(server.json("/v1/audit").await, json!({"audit": [], "next": null}));
    letters(&server, "", 4).await;
    assert_eq!(handler.seen().len(), 4);
}

#[tokio::test]
async fn G5_retried_dead_letters_are_handled_before_what_waits_behind_them() {
    let server = Server::start().await;
    let handler = Picky::register(&server.bus, "mail", true).await;
    server.fill("A", "x", 3).await;
    letters(&server, "", 1).await;
    wait_until("the others are parked", async || {
        (server.json("/v1/dead-letters/mail/1").await["followers"] == 2).then_some(())
    })
    .await;
    handler.relent();
    let order = json!({"filter": {"handler": "mail"}, "by": "ann", "reason": "mended"});
    let begun = started(server.order("/v1/dead-letters/retry", &order)).await;
    assert_eq!((&begun["of"], &begun["filter"]), (&json!("dead-letters"), &order["filter"]));
    assert_eq!((&begun["action"], &begun["total"]), (&json!("retry"), &json!(1)));
    assert_eq!((&begun["by"], &begun["reason"]), (&json!("ann"), &json!("mended")));
    let done = redrive(&server, &begun["number"], "done").await;
    assert_eq!((&done["done"], &done["left"]), (&json!(1), &json!(0)));
    assert!(at(&done["ended_at"]) >= at(&done["started_at"]), "{done}");
    wait_until("all are handled", async || (handler.seen().len() == 4).then_some(())).await;
    assert_eq!(handler.seen(), [1, 1, 2, 3]);
    letters(&server, "", 0).await;
    let nothing = started(server.order("/v1/dead-letters/retry", &order)).await;
    assert_eq!((&nothing["state"], &nothing["total"]), (&json!("done"), &json!(0)));
}

#[tokio::test]
async fn discarded_dead_letters_are_gone_and_what_waits_behind_them_goes_on() {
    let server = Server::start().await;
    let handler = Picky::register(&server.bus, "mail", true).await;
    server.fill("A", "x", 2).await;
    server.fill("A", "y", 1).await;
    letters(&server, "", 2).await;
    handler.relent();
    let order = json!({"filter": {"key": "x"}, "reason": "sent by hand"});
    let begun = started(server.order("/v1/dead-letters/discard", &order)).await;
    redrive(&server, &begun["number"], "done").await;
    wait_until("the second is handled", async || handler.seen().contains(&2).then_some(())).await;
    assert_eq!(letters(&server, "", 1).await, [("mail".to_owned(), 3)]);
    assert_eq!(handler.seen(), [1, 3, 2]);
}

#[tokio::test]
async fn what_is_no_order_redrives_nothing() {
    let server = Server::start().await;
    Picky::register(&server.bus, "mail", true).await;
    fill_keys(&server, 1).await;
    letters(&server, "", 1).await;
    fill_quarantine(&server, 1).await;
    let bad = StatusCode::BAD_REQUEST;
    for (path, order, status, says) in [
        ("/v1/dead-letters/discard", json!({"filter": {}}), bad, "reason"),
        ("/v1/dead-letters/discard", json!({"filter": {}, "reason": ""}), bad, "reason"),
        ("/v1/quarantine/discard", json!({"filter": {}}), bad, "reason"),
        ("/v1/dead-letters/retry", json!({"filter": {"handlr": "mail"}}), bad, "handlr"),
        ("/v1/quarantine/retry", json!({"filter": {"handler": "mail"}}), bad, "handler"),
        ("/v1/dead-letters/retry", json!({"filter": {"since": "1h"}}), bad, "since"),
        ("/v1/dead-letters/retry", json!({"filter": {}, "dryrun": true}), bad, "dryrun"),
        ("/v1/dead-letters/retry", json!({}), bad, "filter"),
        ("/v1/dead-letters/retry", json!({"filter": {}, "rate": 0}), bad, "rate"),
        (
            "/v1/dead-letters/retry",
            json!({"filter": {"handler": "nobody"}}),
            StatusCode::NOT_FOUND,
            "nobody",
        ),
    ] {
        let (refused, problem) = problem(server.order(path, &order)).await;
        assert_eq!(refused, status, "{path} {order}");
        assert!(problem["detail"].as_str().unwrap().contains(says), "{says} in {problem}");
    }
    no_redrives(&server).await;
    letters(&server, "", 1).await;
    assert_eq!(server.json("/v1/quarantine").await["quarantine"][0]["number"], 1);
}

/// Slow enough to be still running whenever it is looked at.
const SLOW: u64 = 60;

#[tokio::test]
async fn a_redrive_takes_up_what_matched_when_it_began_until_it_is_cancelled() {
    let server = Server::start().await;
    let handler = Picky::register(&server.bus, "mail", true).await;
    let slow = usize::try_from(SLOW).unwrap();
    fill_keys(&server, slow).await;
    letters(&server, "", slow).await;
    let order = json!({"filter": {}, "rate": 1});
    let begun = started(server.order("/v1/dead-letters/retry", &order)).await;
    assert_eq!((&begun["total"], &begun["rate"]), (&json!(SLOW), &json!(1)));
    let number = &begun["number"];
    // What comes later, and what has failed again, is not part of it.
    server.fill("B", "late", 1).await;
    letters(&server, "key=late", 1).await;
    let some = wait_until("some are retried", async || {
        let redrive = server.json(&format!("/v1/redrives/{number}")).await;
        (redrive["done"].as_u64() >= Some(2)).then_some(redrive)
    })
    .await;
    assert_eq!((&some["state"], &some["total"]), (&json!("running"), &json!(SLOW)));
    let late = server.json("/v1/dead-letters?key=late").await["dead_letters"][0].clone();
    assert_eq!(late["redrive"], Value::Null);
    let last = server.json(&format!("/v1/dead-letters/mail/{SLOW}")).await;
    assert_eq!(&last["redrive"], number);
    // What one redrive has is passed over by the next.
    let other = started(server.order("/v1/dead-letters/retry", &json!({"filter": {"key": "k59"}})));
    assert_eq!(other.await["total"], 0);

    let cancel = format!("/v1/redrives/{number}/cancel?by=ann");
    let cancelled = answer(server.order(&cancel, &json!({}))).await;
    assert_eq!(cancelled["state"], "cancelled");
    assert_ne!(cancelled["done"], SLOW, "{cancelled}");
    assert_eq!(server.json(&format!("/v1/dead-letters/mail/{SLOW}")).await["redrive"], Value::Null);
    let (status, again) = problem(server.order(&cancel, &json!({}))).await;
    assert_eq!(status, StatusCode::CONFLICT);
    assert!(again["detail"].as_str().unwrap().contains("cancelled"), "{again}");
    let (status, _) = problem(server.order("/v1/redrives/99/cancel", &json!({}))).await;
    assert_eq!(status, StatusCode::NOT_FOUND);
    letters(&server, "limit=1000", slow + 1).await;
    assert_eq!(handler.seen().iter().filter(|position| **position == SLOW).count(), 1);
}

#[tokio::test]
async fn redrives_come_in_pages() {
    let server = Server::start().await;
    for _ in 0..5 {
        started(server.order("/v1/quarantine/retry", &json!({"filter": {}}))).await;
    }
    // Nobody is there who could try dead letters again.
    let nobody = server.order("/v1/dead-letters/retry", &json!({"filter": {}}));
    assert_eq!(problem(nobody).await.0, StatusCode::BAD_REQUEST);
    let mut numbers = Vec::new();
    let mut after = 0;
    loop {
        let page = server.json(&format!("/v1/redrives?limit=2&after={after}")).await;
        let found = page["redrives"].as_array().unwrap();
        numbers.extend(found.iter().map(|redrive| redrive["number"].as_u64().unwrap()));
        let Some(next) = page["next"].as_u64() else { break };
        after = next;
    }
    assert_eq!(numbers, [1, 2, 3, 4, 5]);
    assert_eq!(problem(server.get("/v1/redrives/9")).await.0, StatusCode::NOT_FOUND);
    assert_eq!(problem(server.get("/v1/redrives/x")).await.0, StatusCode::BAD_REQUEST);
}

#[tokio::test]
async fn a_redrive_of_quarantine_takes_up_what_matched_when_it_began_until_it_is_cancelled() {
    let server = Server::start().await;
    let slow = usize::try_from(SLOW).unwrap();
    fill_quarantine(&server, slow).await;
    let one = server.json("/v1/quarantine/1").await;
    assert_eq!((&one["body"], &one["number"]), (&json!(r#"{"specversion":"1.0"}"#), &json!(1)));
    let order = json!({"filter": {"source": "http"}, "rate": 1, "reason": "noise"});
    let begun = started(server.order("/v1/quarantine/discard", &order)).await;
    assert_eq!((&begun["of"], &begun["action"]), (&json!("quarantine"), &json!("discard")));
    assert_eq!((&begun["total"], &begun["state"]), (&json!(SLOW), &json!("running")));
    fill_quarantine(&server, 1).await;
    let now = server.json(&format!("/v1/redrives/{}", begun["number"])).await;
    assert_eq!(now["total"], SLOW);
    let cancel = format!("/v1/redrives/{}/cancel", begun["number"]);
    assert_eq!(answer(server.order(&cancel, &json!({}))).await["state"], "cancelled");
    let page = server.json("/v1/quarantine?limit=1000").await;
    let last = page["quarantine"].as_array().unwrap().last().unwrap();
    assert_eq!(last["number"], SLOW + 1);
    assert_eq!(problem(server.get("/v1/quarantine/999")).await.0, StatusCode::NOT_FOUND);
}

#[tokio::test]
async fn the_audit_says_who_did_what_newest_first() {
    let server = Server::start().await;
    Picky::register(&server.bus, "mail", false).await;
    fill_keys(&server, 2).await;
    server.bus.handled("mail", pulsebus::event::Position(2)).await.unwrap();
    answer(server.order("/v1/handlers/mail/pause?by=ann", &json!({}))).await;
    answer(server.order("/v1/handlers/mail/resume?by=bob", &json!({}))).await;
    let back = json!({"position": 1, "allow_side_effects": true, "by": "carla"});
    answer(server.order("/v1/handlers/mail/rewind", &back)).await;
    let order = json!({"filter": {}, "reason": "noise", "by": "dora"});
    started(server.order("/v1/dead-letters/discard", &order)).await;
    answer(server.order("/v1/handlers/mail/pause", &json!({}))).await;

    let page = server.json("/v1/audit").await;
    let audit = page["audit"].as_array().unwrap();
    let said: Vec<_> = audit
        .iter()
        .map(|entry| ["by", "action", "subject"].map(|member| entry[member].as_str().unwrap()))
        .collect();
    assert_eq!(
        said,
        [
            ["http", "pause", "handler mail"],
            ["dora", "discard", "redrive 1"],
            ["carla", "rewind", "handler mail"],
            ["bob", "resume", "handler mail"],
            ["ann", "pause", "handler mail"],
        ]
    );
    assert_eq!(audit[1]["detail"]["reason"], "noise", "{page}");
    assert_eq!(audit[2]["detail"], json!({"from": 2, "to": 0}));
    let times: Vec<_> = audit.iter().map(|entry| at(&entry["at"])).collect();
    assert!(times.is_sorted_by(|newer, older| newer >= older), "{times:?}");
    let first = server.json("/v1/audit?limit=2").await;
    let rest = server.json(&format!("/v1/audit?after={}", first["next"])).await;
    let parts: Vec<_> =
        [&first, &rest].iter().flat_map(|page| page["audit"].as_array().unwrap().clone()).collect();
    assert_eq!(&parts, audit);
    assert_eq!(rest["next"], Value::Null);
}

#[tokio::test]
async fn a_handler_paused_stays_so_over_a_restart_until_it_is_resumed() {
    let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
    let server = Server::over(Arc::clone(&store), |_| {}).await;
    Picky::register(&server.bus, "mail", false).await;
    let paused = async |server: &Server| {
        wait_until("it is paused", async || {
            let handler = server.json("/v1/handlers/mail").await;
            (handler["state"] == "paused").then_some(handler)
        })
        .await
    };
    fill_keys(&server, 1).await;
    server.bus.handled("mail", pulsebus::event::Position(1)).await.unwrap();
    answer(server.order("/v1/handlers/mail/pause?by=ann", &json!({}))).await;
    paused(&server).await;
    server.bus.drain(Duration::from_secs(10)).await.unwrap();
    drop(server);

    let server = Server::over(store, |_| {}).await;
    let handler = Picky::register(&server.bus, "mail", false).await;
    server.fill("B", "b", 1).await;
    assert_eq!(paused(&server).await["lag"], 1);
    assert!(handler.seen().is_empty());
    answer(server.order("/v1/handlers/mail/resume?by=ann", &json!({}))).await;
    server.bus.handled("mail", pulsebus::event::Position(2)).await.unwrap();
    assert_eq!(handler.seen(), [2]);
    for path in ["/v1/handlers/nobody/pause", "/v1/handlers/nobody/resume"] {
        let (status, problem) = problem(server.order(path, &json!({}))).await;
        assert_eq!(status, StatusCode::NOT_FOUND, "{problem}");
    }
}

#[tokio::test]
async fn a_rewind_asks_for_a_word_where_effects_would_happen_again() {
    let server = Server::start().await;
    let mail = Picky::register(&server.bus, "mail", false).await;
    let index = Picky::with(&server.bus, "index", false, false).await;
    for key in ["a", "b", "c"] {
        server.fill("A", key, 1).await;
    }
    for name in ["mail", "index"] {
        server.bus.handled(name, pulsebus::event::Position(3)).await.unwrap();
    }
    let (status, refused) =
        problem(server.order("/v1/handlers/mail/rewind", &json!({"position": 2}))).await;
    assert_eq!(status, StatusCode::CONFLICT);
    assert!(refused["detail"].as_str().unwrap().contains("allow_side_effects"), "{refused}");
    let order = json!({"position": 2, "allow_side_effects": true});
    let rewound = answer(server.order("/v1/handlers/mail/rewind", &order)).await;
    assert_eq!((&rewound["position"], &rewound["lag"]), (&json!(1), &json!(2)));
    wait_until("two come again", async || (mail.seen().len() == 5).then_some(())).await;
    assert_eq!(mail.seen(), [1, 2, 3, 2, 3]);

    // To the moment the second was recorded at.
    let time = server.json("/v1/events/2").await["recorded_at"].clone();
    answer(server.order("/v1/handlers/index/rewind", &json!({"time": time}))).await;
    wait_until("they come again", async || (index.seen().len() >= 5).then_some(())).await;
    assert!(index.seen()[3..].ends_with(&[2, 3]), "{:?}", index.seen());

    let bad = StatusCode::BAD_REQUEST;
    for (path, order, status) in [
        ("/v1/handlers/index/rewind", json!({}), bad),
        ("/v1/handlers/index/rewind", json!({"position": 1, "time": time}), bad),
        ("/v1/handlers/index/rewind", json!({"position": 99}), bad),
        ("/v1/handlers/index/rewind", json!({"positon": 1}), bad),
        ("/v1/handlers/nobody/rewind", json!({"position": 1}), StatusCode::NOT_FOUND),
    ] {
        assert_eq!(problem(server.order(path, &order)).await.0, status, "{path} {order}");
    }
}
