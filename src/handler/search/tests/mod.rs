//! What documents are made of events, and how they are found.

mod faults;

use std::{path::Path, time::Instant};

use bytes::Bytes;
use proptest::prelude::*;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::*;
use crate::event::{Event, EventParts, Format, Headers, Origin};

fn event_of(position: u64, kind: &str, key: &str, data: &str) -> Arc<StoredEvent> {
    Arc::new(StoredEvent {
        position: Position(position),
        recorded_at: crate::event::now(),
        event: Event::from_parts(EventParts {
            id: format!("e{position}").into(),
            source: "/test".into(),
            kind: kind.into(),
            subject: None,
            time: None,
            key: key.into(),
            format: Format::Native,
            headers: Headers::new(),
            origin: Origin::default(),
            body: Bytes::from(format!(r#"{{"type":"{kind}","data":{data}}}"#)),
        }),
    })
}

fn lesson(position: u64, id: &str, title: &str) -> Arc<StoredEvent> {
    let data = json!({"lesson_id": id, "title": title, "author_id": "a1",
        "published_at": 1_700_000_000_000_i64 + i64::try_from(position).unwrap(), "score": position});
    event_of(position, "LessonPublished", id, &data.to_string())
}

fn removed(position: u64, id: &str) -> Arc<StoredEvent> {
    event_of(position, "LessonRemoved", id, &json!({ "lesson_id": id }).to_string())
}

fn lessons() -> DocumentMapping {
    let one = |name: &str| BTreeMap::from([(name.to_owned(), format!("/{name}"))]);
    DocumentMapping {
        id: "/lesson_id".into(),
        delete: vec!["LessonRemoved".into()],
        text: one("title"),
        keyword: one("author_id"),
        date: one("published_at"),
        number: one("score"),
    }
}

fn options(path: &Path) -> SearchOptions {
    let documents = BTreeMap::from([("LessonPublished".to_owned(), lessons())]);
    SearchOptions { documents, writer_memory: MIN_WRITER_MEMORY, ..SearchOptions::new(path) }
}

fn open(folder: &TempDir) -> SearchHandler {
    SearchHandler::open("search", options(folder.path())).unwrap()
}

async fn apply(handler: &SearchHandler, events: &[Arc<StoredEvent>]) {
    let outcomes = handler.handle_batch(events).await;
    assert_eq!(outcomes.len(), events.len());
    for outcome in outcomes {
        assert!(matches!(outcome, Outcome::Done), "{outcome:?}");
    }
}

async fn find(handler: &SearchHandler, q: &str) -> Vec<String> {
    let page = handler.search(&SearchQuery::new(q)).await.unwrap();
    let mut ids: Vec<_> = page.hits.into_iter().map(|hit| hit.id).collect();
    ids.sort();
    ids
}

async fn position(handler: &SearchHandler) -> u64 {
    handler.position().await.unwrap().unwrap().0
}

#[tokio::test]
async fn a_later_event_takes_the_place_of_an_earlier_one() {
    let folder = tempfile::tempdir().unwrap();
    let handler = open(&folder);
    assert_eq!(position(&handler).await, 0);
    apply(&handler, &[lesson(1, "a", "Intro to Rust"), lesson(2, "b", "Rust macros")]).await;
    assert!(find(&handler, "rust").await.is_empty(), "visible before it is durable");
    handler.flush(Position(2)).await.unwrap();
    assert_eq!(find(&handler, "rust").await, ["a", "b"]);
    // In one batch: replaced, replaced again; removed, and back again.
    let again = [
        lesson(3, "a", "Intro to Go"),
        lesson(4, "a", "Intro to Zig"),
        removed(5, "b"),
        lesson(6, "c", "Zig comptime"),
        removed(7, "c"),
        lesson(8, "c", "Zig for beginners"),
    ];
    apply(&handler, &again).await;
    handler.flush(Position(8)).await.unwrap();
    assert!(find(&handler, "rust go comptime macros").await.is_empty());
    assert_eq!(find(&handler, "zig").await, ["a", "c"]);
    assert_eq!(handler.documents(), 2);
    apply(&handler, &[removed(9, "a"), removed(10, "never there")]).await;
    handler.flush(Position(10)).await.unwrap();
    assert_eq!(find(&handler, "").await, ["c"]);
    assert_eq!(position(&handler).await, 10);
}

#[tokio::test]
async fn G4_a_crash_leaves_what_the_payload_says() {
    let folder = tempfile::tempdir().unwrap();
    let handler = open(&folder);
    apply(&handler, &[lesson(1, "a", "Rust"), lesson(2, "b", "Rust")]).await;
    handler.flush(Position(2)).await.unwrap();
    apply(&handler, &[lesson(3, "c", "Rust"), removed(4, "a")]).await;
    drop(handler);
    let handler = open(&folder);
    assert_eq!(position(&handler).await, 2);
    assert_eq!(find(&handler, "rust").await, ["a", "b"]);
    // It comes again, some of it twice.
    for _ in 0..2 {
        apply(&handler, &[lesson(2, "b", "Rust"), lesson(3, "c", "Rust"), removed(4, "a")]).await;
        handler.flush(Position(4)).await.unwrap();
        assert_eq!(find(&handler, "rust").await, ["b", "c"]);
        assert_eq!(handler.documents(), 2);
    }
}

#[tokio::test]
async fn the_position_moves_on_without_documents() {
    let folder = tempfile::tempdir().unwrap();
    let handler = open(&folder);
    apply(&handler, &[event_of(1, "SomethingElse", "k", "[]")]).await;
    handler.flush(Position(1)).await.unwrap();
    handler.flush(Position(9)).await.unwrap();
    // A late checkpoint of an earlier position does not move it back.
    handler.flush(Position(5)).await.unwrap();
    apply(&handler, &[lesson(10, "a", "Rust")]).await;
    handler.flush(Position(5)).await.unwrap();
    assert_eq!(find(&handler, "rust").await, ["a"]);
    drop(handler);
    assert_eq!(position(&open(&folder)).await, 9);
}

#[tokio::test]
async fn an_event_without_a_document_id_is_rejected_alone() {
    let folder = tempfile::tempdir().unwrap();
    let handler = open(&folder);
    let bad = |position, key: &str, data: &str| event_of(position, "LessonPublished", key, data);
    let batch = [
        lesson(1, "a", "Rust"),
        bad(2, "k", r#"{"title": "Rust"}"#),
        bad(3, "k", r#"{"lesson_id": "same key", "title": "Rust"}"#),
        bad(4, "l", r#"{"lesson_id": {"deep": 1}}"#),
        bad(5, "m", r#"{"lesson_id": ""}"#),
        bad(6, "n", &format!(r#"{{"lesson_id": "{}"}}"#, "x".repeat(5_000))),
        bad(7, "o", "null"),
        lesson(8, "b", "Rust"),
    ];
    let outcomes = handler.handle_batch(&batch).await;
    for (index, outcome) in outcomes.iter().enumerate() {
        match outcome {
            // Another event of the rejected one's key is about another document.
            Outcome::Done => assert!([0, 2, 7].contains(&index), "{index}"),
            Outcome::Reject { error } => assert!(error.as_str().contains("/lesson_id"), "{error}"),
            other => panic!("{index}: {other:?}"),
        }
    }
    let Outcome::Reject { error } = &outcomes[1] else { panic!() };
    assert!(error.as_str().contains("event 2 (LessonPublished, id e2)"), "{error}");
    handler.flush(Position(8)).await.unwrap();
    assert_eq!(find(&handler, "rust").await, ["a", "b", "same key"]);
}

#[tokio::test]
async fn ids_keep_every_digit() {
    let folder = tempfile::tempdir().unwrap();
    let handler = open(&folder);
    let with = |position, id: &str| {
        event_of(position, "LessonPublished", id, &format!(r#"{{"lesson_id": {id}}}"#))
    };
    let ids = ["12345678901234567890123", "12345678901234567890124", "1.0", "1", "true"];
    let events: Vec<_> = ids.iter().zip(1..).map(|(id, n)| with(n, id)).collect();
    apply(&handler, &events).await;
    handler.flush(Position(5)).await.unwrap();
    let mut expected = ids.map(str::to_owned);
    expected.sort();
    assert_eq!(find(&handler, "").await, expected);
}

#[tokio::test]
async fn values_are_read_as_people_expect() {
    let folder = tempfile::tempdir().unwrap();
    let handler = open(&folder);
    let data = r#"{"lesson_id": 7, "title": ["Größe & Maß", 42, {"no": 1}, null, "日本語"],
        "author_id": ["a", "b"], "published_at": "2026-01-02T03:04:05.678+01:00", "score": "90"}"#;
    let odd = r#"{"lesson_id": 8, "title": {"no": 1}, "author_id": true,
        "published_at": "soon", "score": 1e400}"#;
    apply(
        &handler,
        &[event_of(1, "LessonPublished", "7", data), event_of(2, "LessonPublished", "8", odd)],
    )
    .await;
    handler.flush(Position(2)).await.unwrap();
    let page = handler.search(&SearchQuery::new("grösse größe")).await.unwrap();
    assert_eq!(page.total, 1);
    assert_eq!(
        Value::Object(page.hits[0].fields.clone()),
        json!({"title": ["Größe & Maß", "42", "日本語"], "author_id": ["a", "b"],
            "published_at": "2026-01-02T02:04:05.678Z", "score": 90})
    );
    assert_eq!(page.hits[0].snippets["title"], "<b>Größe</b> &amp; Maß 42 日本語");
    for q in [
        "日本語",
        "42",
        "author_id:b",
        "author_id:* +published_at:*",
        "score:[80 TO 100]",
        "published_at:[2026-01-01T00:00:00Z TO 2026-01-03T00:00:00Z]",
        "_id:7",
        "_position:1",
    ] {
        assert_eq!(find(&handler, q).await, ["7"], "{q}");
    }
    assert_eq!(find(&handler, "author_id:true").await, ["8"]);
    let page = handler.search(&SearchQuery::new("_id:8")).await.unwrap();
    assert_eq!(Value::Object(page.hits[0].fields.clone()), json!({"author_id": "true"}));
}

#[tokio::test]
async fn the_answer_has_the_shape_of_the_api() {
    let folder = tempfile::tempdir().unwrap();
    let handler = open(&folder);
    apply(&handler, &[lesson(1, "a", r#"<script>alert("x")</script> & Rust"#)]).await;
    handler.flush(Position(1)).await.unwrap();
    let page = handler.search(&SearchQuery::new("script")).await.unwrap();
    let mut answer = serde_json::to_value(&page).unwrap();
    let score = answer["hits"][0]["score"].take();
    assert!(score.as_f64().unwrap() > 0.0);
    assert_eq!(
        answer,
        json!({"total": 1, "hits": [{
            "id": "a", "type": "LessonPublished", "position": 1, "score": null,
            "fields": {"title": "<script>alert(\"x\")</script> & Rust", "author_id": "a1",
                "published_at": "2023-11-14T22:13:20.001Z", "score": 1},
            "snippets": {"title":
                "&lt;<b>script</b>&gt;alert(&quot;x&quot;)&lt;/<b>script</b>&gt; &amp; Rust"},
        }]})
    );
}

#[tokio::test]
async fn pages_types_and_bounds() {
    let folder = tempfile::tempdir().unwrap();
    let mut options = options(folder.path());
    options
        .documents
        .insert("LessonUpdated".into(), DocumentMapping { delete: vec![], ..lessons() });
    let handler = SearchHandler::open("search", options).unwrap();
    let mut events: Vec<_> = (1..=30).map(|n| lesson(n, &format!("l{n}"), "Rust")).collect();
    events.push(event_of(31, "LessonUpdated", "u", r#"{"lesson_id": "u", "title": "Rust"}"#));
    apply(&handler, &events).await;
    handler.flush(Position(31)).await.unwrap();
    let mut query = SearchQuery { limit: 20, ..SearchQuery::new("rust") };
    let first = handler.search(&query).await.unwrap();
    query.offset = 20;
    let second = handler.search(&query).await.unwrap();
    assert_eq!((first.total, first.hits.len(), second.hits.len()), (31, 20, 11));
    let ids: std::collections::BTreeSet<_> =
        first.hits.iter().chain(&second.hits).map(|hit| &hit.id).collect();
    assert_eq!(ids.len(), 31);
    query.limit = 0;
    let counted = handler.search(&query).await.unwrap();
    assert_eq!((counted.total, counted.hits.len()), (31, 0));
    let types = vec!["LessonUpdated".to_owned(), "Unknown".to_owned()];
    let typed = SearchQuery { types, ..SearchQuery::new("rust") };
    let page = handler.search(&typed).await.unwrap();
    assert_eq!((page.total, &*page.hits[0].kind), (1, "LessonUpdated"));
    assert!(page.hits[0].score > 0.0);
    for refused in [
        SearchQuery { limit: MAX_LIMIT + 1, ..SearchQuery::new("") },
        SearchQuery { offset: MAX_OFFSET + 1, ..SearchQuery::new("") },
        SearchQuery::new("x".repeat(MAX_QUERY_BYTES + 1)),
    ] {
        assert!(matches!(handler.search(&refused).await, Err(SearchError::Query(_))));
    }
}

#[tokio::test]
async fn a_stemmer_finds_other_forms_of_a_word() {
    let folder = tempfile::tempdir().unwrap();
    let options = SearchOptions { language: Some("english".into()), ..options(folder.path()) };
    let handler = SearchHandler::open("search", options).unwrap();
    apply(&handler, &[lesson(1, "a", "Running programs")]).await;
    handler.flush(Position(1)).await.unwrap();
    let page = handler.search(&SearchQuery::new("run program")).await.unwrap();
    assert_eq!(page.hits[0].snippets["title"], "<b>Running</b> <b>programs</b>");
}

#[tokio::test]
async fn no_query_is_an_error_or_takes_long() {
    let folder = tempfile::tempdir().unwrap();
    let handler = open(&folder);
    apply(&handler, &[lesson(1, "a", "Rust in anger"), lesson(2, "b", "C")]).await;
    handler.flush(Position(2)).await.unwrap();
    let most = MAX_QUERY_BYTES;
    let mut odd: Vec<String> = [
        "",
        " ",
        "\"",
        "(",
        ")",
        "*",
        "\\",
        ":",
        "title:",
        "nope:rust",
        "[",
        "{",
        "title:[a TO",
        "\"rust",
        "rust)",
        "AND",
        "OR",
        "NOT",
        "+",
        "-",
        "--",
        "^",
        "rust^",
        "rust^1e99",
        "~",
        "\"rust anger\"~99999999999",
        "title:*",
        "*:*",
        "score:abc",
        "published_at:soon",
        "title:/r.*/",
        "/(a+)+$/",
        "title:IN [a b",
        "_id:",
        "\u{0}",
        "'",
        "''",
        "`",
        "日本語\"",
        "a:b:c:d",
        "-rust",
        "NOT rust",
        "((rust) OR (anger",
        "<b>rust</b>",
    ]
    .map(str::to_owned)
    .into();
    for unit in [
        "(", ")", "()", "(+", "-(", "NOT ", "+", "-", "\"", "a:(", "[", "a:[", "\\", "*", "^",
        "a ", "a AND ", "(a OR ", "a:IN [", "'", "~", "a^2", ":", "a:b ", "\"a\"~1 ", "é",
    ] {
        odd.push(unit.repeat(most / unit.len()));
        odd.push(unit.repeat(16));
        let closed = format!("{}rust{}", unit.repeat(16), ")".repeat(16));
        odd.push(closed);
    }
    for q in odd {
        let begun = Instant::now();
        let page = handler.search(&SearchQuery::new(&q)).await;
        match page {
            Ok(_) => {}
            // Asks whether a field is there that keeps no column to tell by.
            Err(SearchError::Query(why)) if q == "title:*" => assert!(why.contains("title")),
            Err(error) => panic!("{q:?}: {error:?}"),
        }
        let took = begun.elapsed();
        assert!(took < Duration::from_secs(5), "{q:?} took {took:?}");
    }
    assert_eq!(find(&handler, "").await, ["a", "b"]);
    assert_eq!(find(&handler, "\"rust in\"").await, ["a"]);
    assert_eq!(find(&handler, "rust)").await, ["a"]);
    assert_eq!(find(&handler, "(rust").await, ["a"]);
    assert_eq!(find(&handler, "\"rust").await, ["a"]);
    assert_eq!(find(&handler, &format!("{}rust{}", "(".repeat(99), ")".repeat(99))).await, ["a"]);
}

#[tokio::test]
async fn G7_what_waits_for_a_commit_is_bounded() {
    let folder = tempfile::tempdir().unwrap();
    let handler = open(&folder);
    let filler = "x ".repeat(500_000);
    for n in 1..=40 {
        let data = json!({"lesson_id": n.to_string(), "title": "Rust", "rest": filler});
        apply(&handler, &[event_of(n, "LessonPublished", "k", &data.to_string())]).await;
    }
    // Some were committed to make room, without saying that anything was checkpointed.
    assert!(handler.documents() > 0);
    assert_eq!(position(&handler).await, 0);
    handler.flush(Position(40)).await.unwrap();
    assert_eq!(handler.documents(), 40);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn searches_go_on_while_it_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let handler = open(&folder);
    let writing = async {
        for batch in 0..20_u64 {
            let events: Vec<_> =
                (1..=50).map(|n| lesson(batch * 50 + n, &format!("l{n}"), "Rust")).collect();
            apply(&handler, &events).await;
            handler.flush(Position(batch * 50 + 50)).await.unwrap();
        }
    };
    let searching = async {
        while handler.writer().unwrap().committed() < Position(1_000) {
            let page = handler.search(&SearchQuery::new("rust")).await.unwrap();
            // Each commit replaces all fifty: never some of the old and some of the new.
            assert!(page.total == 0 || page.total == 50, "{}", page.total);
            tokio::task::yield_now().await;
        }
    };
    tokio::join!(writing, searching);
}

fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        ".{0,12}".prop_map(Value::from),
        Just(Value::from("2026-01-01T00:00:00Z")),
    ];
    leaf.prop_recursive(4, 24, 6, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
            prop::collection::hash_map(
                prop_oneof![
                    Just("lesson_id".to_owned()),
                    Just("title".to_owned()),
                    Just("author_id".to_owned()),
                    Just("published_at".to_owned()),
                    Just("score".to_owned()),
                    ".{0,6}",
                ],
                inner,
                0..6,
            )
            .prop_map(|members| Value::Object(members.into_iter().collect())),
        ]
    })
}

#[test]
fn any_data_is_indexed_or_rejected() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let handler = open(&folder);
    let next = std::cell::Cell::new(0_u64);
    proptest!(ProptestConfig::with_cases(64), |(data in prop::collection::vec(any_json(), 1..8))| {
        let events: Vec<_> = data.iter().map(|data| {
            next.set(next.get() + 1);
            event_of(next.get(), "LessonPublished", &next.get().to_string(), &data.to_string())
        }).collect();
        let outcomes = runtime.block_on(handler.handle_batch(&events));
        for outcome in &outcomes {
            prop_assert!(matches!(outcome, Outcome::Done | Outcome::Reject { .. }), "{outcome:?}");
        }
        if next.get().is_multiple_of(16) {
            prop_assert!(runtime.block_on(handler.flush(Position(next.get()))).is_ok());
        }
    });
    runtime.block_on(handler.flush(Position(next.get()))).unwrap();
    let all = SearchQuery { limit: MAX_LIMIT, ..SearchQuery::new("") };
    runtime.block_on(handler.search(&all)).unwrap();
}
