//! `POST /v1/events`.

use std::time::Duration;

use pulsebus::store::memory::MemoryStore;
use reqwest::StatusCode;
use serde_json::{Value, json};

use super::{Raw, Server, answer, members, problem};

const EVENT: &str = r#"{"id":"1","type":"T","data":1}"#;
const STRUCTURED: &str = "application/cloudevents+json";

fn cloudevent(id: &str) -> String {
    format!(r#"{{"specversion":"1.0","id":"{id}","source":"/s","type":"C","data":[1.0]}}"#)
}

#[tokio::test]
async fn G1_an_answer_says_what_was_committed() {
    let server = Server::start().await;
    let first = answer(server.post(EVENT)).await;
    assert_eq!(first, json!({"stored": 1, "duplicates": 0, "quarantined": [], "position": 1}));
    let again = answer(server.post(EVENT)).await;
    assert_eq!(again, json!({"stored": 0, "duplicates": 1, "quarantined": [], "position": null}));
    // Two new ones, a copy, and one that is none: its index is that in the request.
    let mixed = r#"[{"id":"2","type":"T","data":1},{"id":"1","type":"T","data":1},
        {"specversion":"1.0","id":"x"},{"id":"3","type":"T","data":1}]"#;
    let mixed = answer(server.post(mixed)).await;
    assert_eq!(mixed["stored"], 2);
    assert_eq!(mixed["duplicates"], 1);
    assert_eq!(mixed["position"], 3);
    let [quarantined] = mixed["quarantined"].as_array().unwrap().as_slice() else {
        panic!("{mixed}")
    };
    assert_eq!(members(quarantined), ["index", "number", "reason"]);
    assert_eq!(quarantined["index"], 2);
    assert!(quarantined["reason"].as_str().unwrap().contains("no `source`"), "{mixed}");
    assert_eq!(server.bus.log().head().0, 3);
}

#[tokio::test]
async fn every_form_of_several_events_is_taken_apart() {
    let server = Server::start().await;
    let lines = "{\"id\":\"1\",\"type\":\"T\",\"data\":1}\r\n\n  \n{\"id\":\"2\",\"type\":\"T\",\"data\":2}\nno json\n";
    for (kind, first) in [
        ("application/x-ndjson", true),
        ("application/jsonl; charset=utf-8", false),
        ("Application/NDJSON", false),
    ] {
        let answer = answer(server.post(lines).header("content-type", kind)).await;
        let counted = if first { "stored" } else { "duplicates" };
        assert_eq!(answer[counted], 2, "{answer}");
        assert_eq!(answer["quarantined"][0]["index"], 2, "{answer}");
    }
    let batch = format!("[{}, {}]", cloudevent("b1"), cloudevent("b2"));
    let kind = "application/cloudevents-batch+json; charset=utf-8";
    let batch = answer(server.post(batch).header("content-type", kind)).await;
    assert_eq!((&batch["stored"], &batch["position"]), (&json!(2), &json!(4)));
    let one = answer(server.post(cloudevent("s")).header("content-type", STRUCTURED)).await;
    assert_eq!(one["position"], 5);
    // Without a content type too, `specversion` tells.
    assert_eq!(answer(server.post(cloudevent("t"))).await["position"], 6);
    let events = server.json("/v1/events").await;
    let formats: Vec<_> = events["events"]
        .as_array()
        .unwrap()
        .iter()
        .map(|e| e["format"].as_str().unwrap())
        .collect();
    let structured = "cloudevents-structured";
    assert_eq!(formats, ["native", "native", structured, structured, structured, structured]);

    // Nothing to do is no error.
    for (kind, body) in [
        ("application/json", "[]"),
        ("application/x-ndjson", "\n"),
        ("application/cloudevents-batch+json", "[]"),
    ] {
        let nothing = answer(server.post(body).header("content-type", kind)).await;
        let zero = json!({"stored": 0, "duplicates": 0, "quarantined": [], "position": null});
        assert_eq!(nothing, zero, "{kind}");
    }
}

#[tokio::test]
async fn binary_cloudevents_keep_their_attributes() {
    let server = Server::start().await;
    let binary = server
        .post("[1, 2.50]")
        .header("ce-specversion", "1.0")
        .header("ce-id", "b")
        .header("ce-source", "/s")
        .header("ce-type", "Bin")
        .header("ce-subject", "caf%C3%A9")
        .header("ce-time", "2024-01-02T03:04:05Z")
        .header("content-type", "application/json")
        .header("authorization", "Bearer not-for-the-log");
    assert_eq!(answer(binary).await["stored"], 1);
    let event = server.json("/v1/events/1").await;
    assert_eq!(event["format"], "cloudevents-binary");
    assert_eq!(event["id"], "b");
    assert_eq!(event["source"], "/s");
    assert_eq!(event["type"], "Bin");
    assert_eq!(event["subject"], "café");
    assert_eq!(event["time"], "2024-01-02T03:04:05Z");
    assert_eq!(event["headers"]["ce-id"], "b");
    assert!(event["headers"].get("authorization").is_none(), "{event}");
}

#[tokio::test]
async fn G6_a_refusal_says_that_nothing_was_an_event() {
    let server = Server::start().await;
    let (status, one) = problem(server.post("{\"type\":")).await;
    assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY);
    assert_eq!(one["quarantined"][0]["index"], 0);
    assert!(one["detail"].as_str().unwrap().contains("not JSON"), "{one}");
    let (status, two) =
        problem(server.post("x\ny\n").header("content-type", "application/x-ndjson")).await;
    assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY);
    assert_eq!(two["quarantined"].as_array().unwrap().len(), 2);
    assert_eq!((&two["stored"], &two["duplicates"]), (&json!(0), &json!(0)));
    // An empty body is a message that is no event, too.
    let (status, empty) = problem(server.post("")).await;
    assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY);
    assert!(empty["detail"].as_str().unwrap().contains("empty"), "{empty}");
    let kind = "application/cloudevents-batch+json";
    let (status, _) = problem(server.post("{}").header("content-type", kind)).await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
    // One that is an event is enough.
    let kind = "application/x-ndjson";
    let both = format!("x\n{EVENT}\n");
    let mixed = answer(server.post(both).header("content-type", kind)).await;
    assert_eq!(mixed["stored"], 1);
    assert_eq!(server.bus.log().head().0, 1);
}

#[tokio::test]
async fn G6_depth_is_judged_by_the_element() {
    let server = Server::start().await;
    let deep = format!("{}1{}", "[".repeat(100_000), "]".repeat(100_000));
    // Alone it is an array of one element, which is too deep.
    let (status, alone) = problem(server.post(deep.clone())).await;
    assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY);
    assert!(alone["detail"].as_str().unwrap().contains("nested deeper than 128"), "{alone}");
    let beside = answer(server.post(format!("[{deep},{EVENT}]"))).await;
    assert_eq!((&beside["stored"], &beside["quarantined"][0]["index"]), (&json!(1), &json!(0)));
    for (number, expected) in [(1, &deep.as_bytes()[1..deep.len() - 1]), (2, deep.as_bytes())] {
        let (_, body) = server.bus.store().quarantine_entry(number).await.unwrap().unwrap();
        assert_eq!(body, expected);
    }
}

#[tokio::test]
async fn G2_the_same_id_with_other_content_changes_nothing() {
    let server = Server::start().await;
    assert_eq!(answer(server.post(EVENT)).await["stored"], 1);
    let (status, conflict) = problem(server.post(r#"{"id":"1","type":"T","data":2}"#)).await;
    assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY);
    let detail = conflict["detail"].as_str().unwrap();
    assert!(detail.contains("conflicts with the event at position 1"), "{detail}");
    // The same written differently is a copy.
    let copy = answer(server.post(r#"{ "data" : 1, "type":"T", "id":"1" }"#)).await;
    assert_eq!(copy["duplicates"], 1);
    assert_eq!(server.json("/v1/events/1").await["body"]["data"], 1);
}

#[tokio::test]
async fn G9_bodies_come_back_as_they_were_published() {
    let server = Server::start().await;
    let bodies = [
        r#"{"id":"1","type":"T","data":[1e400,-1E-400,0.10,-0, 12345678901234567890123]}"#,
        r#"{"id":"2","type":"T","data":{"a":1,"a":2},  "x" : 1, "x":2}"#,
        r#"{"id":"3","type":"T","data":["\ud800","\udc00\ud800","\u0000","\/"]}"#,
        "{\"id\":\"4\",\n\t\"type\":\"T\",\r\n\"data\":\"\u{2028}😀\u{7f}\"}",
        r#"{"id":"5","type":"T","data":"</script><!--"}"#,
    ];
    for body in bodies {
        let (status, text) = {
            let answer = server.post(body).send().await.unwrap();
            (answer.status(), answer.text().await.unwrap())
        };
        assert_eq!(status, StatusCode::OK, "{text}");
    }
    let list = server.get("/v1/events").send().await.unwrap().text().await.unwrap();
    let reverse = server.get("/v1/events?order=desc").send().await.unwrap().text().await.unwrap();
    for (n, body) in bodies.iter().enumerate() {
        let wanted = format!("\"body\":{body}");
        assert!(list.contains(&wanted), "{body} in {list}");
        assert!(reverse.contains(&wanted), "{body} in {reverse}");
        let path = format!("/v1/events/{}", n + 1);
        let one = server.get(&path).send().await.unwrap().text().await.unwrap();
        assert!(one.contains(&wanted), "{body} in {one}");
    }
    // Those of an array as well, each as it stands there.
    let array = r#"[ {"id":"a1","type":"T","data":1.0} ,{"id":"a2","type":"T",  "data":1e1}]"#;
    assert_eq!(answer(server.post(array)).await["stored"], 2);
    let one = server.get("/v1/events/7").send().await.unwrap().text().await.unwrap();
    assert!(one.contains(r#""body":{"id":"a2","type":"T",  "data":1e1}"#), "{one}");
}

fn request(head: &str, body: &[u8]) -> Vec<u8> {
    let mut bytes = format!(
        "POST /v1/events HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\n{head}\r\n",
        body.len()
    )
    .into_bytes();
    bytes.extend(body);
    bytes
}

#[tokio::test]
async fn G7_a_body_that_is_too_large_is_refused_and_the_connection_lives_on() {
    let server = Server::with(MemoryStore::new(), |options| options.max_body = 1 << 20).await;
    let mut raw = Raw::connect(&server).await;
    let exactly = {
        let mut body = br#"{"id":"fits","type":"T","data":""#.to_vec();
        body.resize((1 << 20) - 2, b'x');
        body.extend(b"\"}");
        body
    };
    raw.write(request("", &exactly)).await;
    let (status, _, body) = raw.answer().await;
    assert_eq!(status, 200, "{body}");
    for size in [(1 << 20) + 1, 2 << 20, 64 << 20] {
        raw.write(request("", &vec![b' '; size])).await;
        let (status, head, body) = raw.answer().await;
        assert_eq!(status, 413, "{head}{body}");
        assert!(head.to_ascii_lowercase().contains("content-type: application/problem+json"));
        let problem: Value = serde_json::from_str(&body).unwrap();
        assert!(problem["detail"].as_str().unwrap().contains("1048576"), "{problem}");
        raw.write(request("", EVENT.as_bytes())).await;
        assert_eq!(raw.answer().await.0, 200);
    }
    // Without a length, in chunks.
    raw.write("POST /v1/events HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
        .await;
    for _ in 0..24 {
        let mut chunk = b"10000\r\n".to_vec();
        chunk.resize(7 + 0x10000, b' ');
        chunk.extend(b"\r\n");
        raw.write(chunk).await;
    }
    raw.write("0\r\n\r\n").await;
    assert_eq!(raw.answer().await.0, 413);
    raw.write(request("", EVENT.as_bytes())).await;
    assert_eq!(raw.answer().await.0, 200);
    // Who asks before sending is told at once.
    let head = "POST /v1/events HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\n\
                Content-Length: 67108864\r\n\r\n";
    raw.write(head).await;
    assert_eq!(raw.answer().await.0, 413);
    assert_eq!(server.bus.store().quarantine_len().await.unwrap(), 0);
}

#[tokio::test]
async fn G7_a_body_that_does_not_arrive_is_given_up() {
    let timeout = Duration::from_millis(200);
    let server = Server::with(MemoryStore::new(), |options| options.timeout = timeout).await;
    // Nothing at all, and a little now and then.
    let mut silent = Raw::connect(&server).await;
    silent
        .write("POST /v1/events HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
        .await;
    let (status, head, body) = silent.answer().await;
    assert_eq!(status, 408, "{head}{body}");
    let problem: Value = serde_json::from_str(&body).unwrap();
    assert!(problem["detail"].as_str().unwrap().contains("did not arrive within"), "{problem}");

    let mut dripping = Raw::connect(&server).await;
    dripping
        .write("POST /v1/events HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\n")
        .await;
    let drip = async {
        loop {
            dripping.write(" ").await;
            tokio::time::sleep(timeout / 10).await;
            if let Ok(read) = dripping.stream.try_read_buf(&mut dripping.read) {
                assert!(read > 0, "closed without an answer");
                break;
            }
        }
    };
    tokio::time::timeout(crate::support::PATIENCE, drip).await.unwrap();
    assert_eq!(dripping.answer().await.0, 408);
    // Others are served all the while.
    assert_eq!(answer(server.post(EVENT)).await["stored"], 1);
}

#[tokio::test]
async fn requests_that_are_none_harm_nobody() {
    let server = Server::start().await;
    for (bytes, status) in [
        ("GARBAGE\r\n\r\n".to_owned(), 400),
        ("POST /v1/events HTTP/1.1\r\nHost: localhost\r\nno colon\r\n\r\n".to_owned(), 400),
        (
            format!(
                "GET /healthz HTTP/1.1\r\nHost: localhost\r\n{}\r\n",
                "x: y\r\n".repeat(10_000)
            ),
            431,
        ),
    ] {
        let mut raw = Raw::connect(&server).await;
        raw.write(bytes).await;
        assert_eq!(raw.answer().await.0, status);
    }
    // A client that goes away in the middle.
    let mut raw = Raw::connect(&server).await;
    raw.write("POST /v1/events HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{\"ty")
        .await;
    drop(raw);
    assert_eq!(answer(server.post(EVENT)).await["position"], 1);
    assert_eq!(server.bus.store().quarantine_len().await.unwrap(), 0);
}
