//! The commands that change what a daemon does, against a server in this process.

use std::{
    fs::File,
    io::Read as _,
    process::{Child, Stdio},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
};

use axum::{
    Router,
    extract::Path,
    http::{StatusCode, Uri},
    routing::{get, post},
};
use pulsebus::store::progress::AuditEntry;
use serde_json::{Value, json};
use tokio::time::timeout;

use crate::{
    cli::{lines, parts},
    http::Server,
    support::{
        PATIENCE,
        daemon::{BINARY, pulsebus},
        picky::Picky,
        process::{self, folder, signal},
        wait_until,
    },
};

/// Runs a command that talks to the server.
async fn ask(server: &Server, args: &[&str]) -> (i32, String, String) {
    let asked = pulsebus(|command| {
        command.args(args).args(["--url", &server.url]).env("USER", "ann");
    });
    parts(&timeout(PATIENCE, asked).await.unwrap())
}

/// What it prints where it succeeds, without the last line break.
async fn said(server: &Server, args: &[&str]) -> String {
    let (code, out, err) = ask(server, args).await;
    assert_eq!((code, &*err), (0, ""), "{args:?}: {out}");
    out.trim_end().to_owned()
}

/// What it complains about, where it fails with this code.
async fn complains(server: &Server, code: i32, args: &[&str]) -> String {
    let (ended, out, err) = ask(server, args).await;
    assert_eq!((ended, &*out), (code, ""), "{args:?}: {err}");
    err
}

/// Waits until so many dead letters match.
async fn letters(server: &Server, query: &str, count: usize) {
    wait_until(&format!("{count} dead letters with {query}"), async || {
        let page = server.json(&format!("/v1/dead-letters?limit=1000&{query}")).await;
        (page["dead_letters"].as_array().unwrap().len() == count).then_some(())
    })
    .await;
}

#[tokio::test]
async fn dead_letters_are_listed_shown_retried_and_discarded() {
    let server = Server::start().await;
    let mail = Picky::register(&server.bus, "mail", true).await;
    assert_eq!(said(&server, &["dead-letters", "list"]).await, "no dead letters");
    server.fill("A", "x", 1).await;
    server.fill("A", "y", 2).await;
    server.fill("B", "z", 1).await;
    letters(&server, "", 3).await;

    let listed = said(&server, &["dead-letters", "list"]).await;
    assert!(listed.starts_with("HANDLER") && listed.lines().count() == 4, "{listed}");
    assert!(listed.contains("B is not wanted"), "{listed}");
    for (filter, positions) in [
        (&["--type", "A"][..], &[1, 2][..]),
        (&["--key", "z"], &[4]),
        (&["--error", "B is"], &[4]),
        (&["--handler", "push"], &[]),
        (&["--position", "1", "--position", "4"], &[1, 4]),
        (&["--since", "1h"], &[1, 2, 4]),
        (&["--until", "1h"], &[]),
        (&["--until", "2999-01-01T00:00:00Z", "--type", "B"], &[4]),
        (&["-n", "2"], &[1, 2]),
    ] {
        let args = [&["dead-letters", "list", "--json"], filter].concat();
        let found: Vec<_> = lines(&said(&server, &args).await)
            .iter()
            .map(|letter| letter["position"].as_u64().unwrap())
            .collect();
        assert_eq!(found, positions, "{filter:?}");
    }

    let shown = said(&server, &["dead-letters", "show", "mail", "4"]).await;
    for line in ["key           z", "attempts      1", "last error    B is not wanted"] {
        assert!(shown.lines().any(|shown| shown == line), "{line} in\n{shown}");
    }
    assert!(shown.ends_with(r#""data":0}"#) || shown.ends_with('}'), "{shown}");
    let shown = said(&server, &["dead-letters", "show", "mail", "4", "--json"]).await;
    let shown: Value = serde_json::from_str(&shown).unwrap();
    assert_eq!(shown["dead_letter"]["key"], "z");
    assert_eq!(shown["event"]["body"]["type"], "B");
    let missing = complains(&server, 1, &["dead-letters", "show", "mail", "3"]).await;
    assert!(missing.contains("no dead letter at position 3"), "{missing}");

    // All of them only where that is said, and not by a filter that is forgotten.
    let usage = complains(&server, 2, &["dead-letters", "retry"]).await;
    assert!(usage.contains("--all"), "{usage}");
    let usage = complains(&server, 2, &["dead-letters", "retry", "--all", "--key", "x"]).await;
    assert!(usage.contains("not both"), "{usage}");
    let usage = complains(&server, 2, &["dead-letters", "discard", "--all"]).await;
    assert!(usage.contains("--reason"), "{usage}");
    complains(&server, 2, &["dead-letters", "retry", "--since", "yesterday"]).await;
    complains(&server, 2, &["dead-letters", "retry", "--all", "--rate", "0"]).await;
    let unknown = complains(&server, 1, &["dead-letters", "retry", "--handler", "push"]).await;
    assert!(unknown.contains("no handler is called `push`"), "{unknown}");
    let dry = ["dead-letters", "discard", "--type", "A", "--dry-run"];
    assert_eq!(said(&server, &dry).await, "2 match; nothing was done");
    let dry = [&dry[..], &["--json"]].concat();
    assert_eq!(said(&server, &dry).await, r#"{"matching":2}"#);
    assert_eq!(said(&server, &["redrives", "list"]).await, "no redrives");
    assert_eq!(said(&server, &["audit", "list"]).await, "nobody has done anything yet");

    mail.relent();
    let discard = ["dead-letters", "discard", "--key", "x", "--reason", "sent", "--wait"];
    assert_eq!(said(&server, &discard).await, "redrive 1 is done: 1 of 1 dead letters discarded");
    let retry = ["dead-letters", "retry", "--all", "--wait", "--json", "--by", "bob"];
    let retried = said(&server, &retry).await;
    let retried = &lines(&retried)[0];
    assert_eq!((&retried["state"], &retried["done"]), (&json!("done"), &json!(2)));
    letters(&server, "", 0).await;
    wait_until("the parked one is handled", async || mail.seen().contains(&3).then_some(())).await;
    assert_eq!(
        said(&server, &["dead-letters", "retry", "--since", "1h"]).await,
        "redrive 3 is done: no dead letters matched, or another redrive has them"
    );

    let audit = said(&server, &["audit", "list", "--json"]).await;
    let audit: Vec<_> =
        lines(&audit).iter().map(|e| (e["by"].clone(), e["action"].clone())).collect();
    let who = [("ann", "retry"), ("bob", "retry"), ("ann", "discard")];
    assert_eq!(audit, who.map(|(by, action)| (json!(by), json!(action))));
    let older = said(&server, &["audit", "list", "--after", "2"]).await;
    assert!(older.starts_with("NUMBER") && older.lines().count() == 2, "{older}");
    assert!(older.contains("redrive 1") && older.contains("sent"), "{older}");
}

/// Whether a process has a handler for SIGINT by now.
fn catches_interrupts(child: &Child) -> Option<()> {
    let status = std::fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap();
    let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:"))?.trim();
    (u64::from_str_radix(caught, 16).unwrap() & 0b10 != 0).then_some(())
}

#[tokio::test]
async fn redrives_are_listed_shown_waited_for_and_cancelled() {
    const MANY: usize = 60;
    let server = Server::start().await;
    Picky::register(&server.bus, "mail", true).await;
    for n in 0..MANY {
        server.fill("A", &n.to_string(), 1).await;
    }
    letters(&server, "", MANY).await;
    // Not on a terminal it does not wait unless told to.
    let started = said(&server, &["dead-letters", "retry", "--all", "--rate", "1"]).await;
    assert!(started.starts_with("redrive 1 is running: "), "{started}");
    let listed = said(&server, &["redrives", "list"]).await;
    assert!(listed.starts_with("NUMBER") && listed.contains("dead-letters"), "{listed}");
    let shown = said(&server, &["redrives", "show", "1"]).await;
    assert!(shown.contains("rate     1 a second") && shown.contains("by       ann"), "{shown}");
    let missing = complains(&server, 1, &["redrives", "show", "9"]).await;
    assert!(missing.contains("no redrive 9"), "{missing}");

    // One that waits is interrupted, and the redrive goes on.
    let folder = folder("waits");
    let waits = |name: &'static str| {
        process::spawn(BINARY.as_ref(), |command| {
            command
                .args(["redrives", "wait", "1", "--url", &server.url])
                .stdout(File::create(folder.join(name)).unwrap())
                .stderr(Stdio::piped());
        })
    };
    let mut interrupted = waits("interrupted");
    wait_until("it listens for the signal", async || catches_interrupts(&interrupted)).await;
    signal(&interrupted, "INT");
    let status = wait_until("it ends", async || interrupted.try_wait().unwrap()).await;
    assert_eq!(status.code(), Some(1));
    let mut err = String::new();
    interrupted.stderr.take().unwrap().read_to_string(&mut err).unwrap();
    assert!(err.contains("redrive 1 goes on in the daemon"), "{err}");
    assert_eq!(server.json("/v1/redrives/1").await["state"], "running");

    let mut waiting = waits("waiting");
    let cancelled = said(&server, &["redrives", "cancel", "1", "--by", "bob"]).await;
    assert!(cancelled.starts_with("redrive 1 is cancelled"), "{cancelled}");
    let status = wait_until("the wait ends", async || waiting.try_wait().unwrap()).await;
    assert_eq!(status.code(), Some(1));
    let out = std::fs::read_to_string(folder.join("waiting")).unwrap();
    assert_eq!(out.trim_end(), cancelled);
    let again = complains(&server, 1, &["redrives", "cancel", "1"]).await;
    assert!(again.contains("it is cancelled"), "{again}");
    let audit = said(&server, &["audit", "list", "--json", "-n", "1"]).await;
    assert_eq!(
        (&lines(&audit)[0]["by"], &lines(&audit)[0]["action"]),
        (&json!("bob"), &json!("cancel"))
    );
}

#[tokio::test]
async fn handlers_are_paused_resumed_and_rewound() {
    let server = Server::start().await;
    let mail = Picky::register(&server.bus, "mail", false).await;
    server.fill("A", "x", 3).await;
    server.bus.handled("mail", pulsebus::event::Position(3)).await.unwrap();
    assert_eq!(said(&server, &["handlers", "pause", "mail"]).await, "handler mail is paused");
    wait_until("it is paused", async || {
        (server.json("/v1/handlers/mail").await["state"] == "paused").then_some(())
    })
    .await;
    assert_eq!(said(&server, &["handlers", "resume", "mail"]).await, "handler mail goes on");
    let unknown = complains(&server, 1, &["handlers", "pause", "push"]).await;
    assert!(unknown.contains("no handler is called `push`"), "{unknown}");

    let rewind = ["handlers", "rewind", "mail"];
    complains(&server, 2, &rewind).await;
    complains(&server, 2, &[&rewind[..], &["--position", "1", "--time", "1h"]].concat()).await;
    let back = [&rewind[..], &["--position", "2"]].concat();
    let refused = complains(&server, 1, &back).await;
    assert!(refused.contains("--allow-side-effects"), "{refused}");
    let back = [&back[..], &["--allow-side-effects"]].concat();
    assert_eq!(said(&server, &back).await, "handler mail goes on from position 2");
    wait_until("two come again", async || (mail.seen() == [1, 2, 3, 2, 3]).then_some(())).await;
    let back = [&rewind[..], &["--time", "1h", "--allow-side-effects", "--wait"]].concat();
    let caught_up = said(&server, &back).await;
    assert_eq!(caught_up, "handler mail went on from position 1 and has caught up");
    wait_until("all come again", async || (mail.seen().len() == 8).then_some(())).await;
    let ahead = [&rewind[..], &["--position", "9", "--allow-side-effects"]].concat();
    let refused = complains(&server, 1, &ahead).await;
    assert!(refused.contains("a rewind goes back"), "{refused}");
    let audit = lines(&said(&server, &["audit", "list", "--json"]).await);
    let actions: Vec<_> = audit.iter().map(|entry| entry["action"].as_str().unwrap()).collect();
    assert_eq!(actions, ["rewind", "rewind", "resume", "pause"]);
    assert!(audit.iter().all(|entry| entry["by"] == "ann"), "{audit:?}");
}

#[tokio::test]
async fn quarantine_is_shown_and_redriven() {
    let server = Server::start().await;
    let (_, _, err) = ask(&server, &["publish", r#"{"specversion":"1.0"}"#]).await;
    assert!(err.contains("quarantine"), "{err}");
    let shown = said(&server, &["quarantine", "show", "1"]).await;
    assert!(shown.contains("source    http") && shown.contains("no `id`"), "{shown}");
    assert!(shown.ends_with("\n\n{\"specversion\":\"1.0\"}"), "{shown}");
    let missing = complains(&server, 1, &["quarantine", "show", "9"]).await;
    assert!(missing.contains("no quarantine entry 9"), "{missing}");
    let usage = complains(&server, 2, &["quarantine", "discard", "--reason", "noise"]).await;
    assert!(usage.contains("--all"), "{usage}");
    let usage = complains(&server, 2, &["quarantine", "discard", "--all"]).await;
    assert!(usage.contains("--reason"), "{usage}");
    for (filter, count) in [
        (&["--all"][..], 1),
        (&["--source", "http", "--since", "1h", "--number", "1"], 1),
        (&["--number", "2", "--number", "3"], 0),
        (&["--reason-contains", "no `id`"], 1),
        (&["--reason-contains", "no `type`"], 0),
        (&["--until", "1h"], 0),
    ] {
        let args = [&["quarantine", "retry", "--dry-run"], filter].concat();
        let counted = format!("{count} match; nothing was done");
        assert_eq!(said(&server, &args).await, counted, "{filter:?}");
    }
    let discard = ["quarantine", "discard", "--all", "--reason", "noise", "--json", "--no-wait"];
    let started = &lines(&said(&server, &discard).await)[0];
    assert_eq!((&started["of"], &started["total"]), (&json!("quarantine"), &json!(1)));
    assert_eq!((&started["reason"], &started["by"]), (&json!("noise"), &json!("ann")));
}

/// The daemon gives a thousand at once; behind them comes a number, or a handler and a position.
#[tokio::test]
async fn lists_go_on_over_the_daemons_pages() {
    const MANY: u64 = 1_100;
    let server = Server::start().await;
    Picky::register(&server.bus, "mail", true).await;
    for n in 1..=MANY {
        server.fill("A", &n.to_string(), 1).await;
        let entry = AuditEntry::new("ann", "pause", format!("handler {n}"), &json!({}));
        server.bus.store().audit(&entry).await.unwrap();
    }
    server.bus.handled("mail", pulsebus::event::Position(MANY)).await.unwrap();
    let numbers = async |args: &[&str], member: &str| -> Vec<u64> {
        let listed = lines(&said(&server, args).await);
        listed.iter().map(|entry| entry[member].as_u64().unwrap()).collect()
    };
    let list = ["dead-letters", "list", "--json", "-n", "5000"];
    assert_eq!(numbers(&list, "position").await, (1..=MANY).collect::<Vec<_>>());
    let list = ["audit", "list", "--json", "-n", "1050"];
    assert_eq!(numbers(&list, "number").await, (51..=MANY).rev().collect::<Vec<_>>());
}

/// A daemon whose handler `search` is rebuilt in three looks, away for one of them, and whose
/// handler `mail` cannot be rebuilt.
#[tokio::test]
async fn a_rebuild_is_followed_to_its_end() {
    let looks = Arc::new(AtomicUsize::new(0));
    let looked = Arc::clone(&looks);
    let search = |rebuild: Value| json!({"name": "search", "rebuild": rebuild}).to_string();
    let look = move || async move {
        match looked.fetch_add(1, SeqCst) {
            0 => (StatusCode::OK, search(json!({"position": 1, "head": 3}))),
            1 => (StatusCode::SERVICE_UNAVAILABLE, String::new()),
            2 => (StatusCode::OK, search(json!({"position": 2, "head": 3}))),
            _ => (StatusCode::OK, search(Value::Null)),
        }
    };
    let begin = async |Path(name): Path<String>, uri: Uri| {
        assert_eq!(uri.query(), Some("by=ann"));
        match &*name {
            "search" => (StatusCode::ACCEPTED, r#"{"name":"search"}"#),
            _ => (StatusCode::CONFLICT, r#"{"detail":"handler `mail` keeps nothing to rebuild"}"#),
        }
    };
    let app = Router::new()
        .route("/v1/handlers/{name}/rebuild", post(begin))
        .route("/v1/handlers/{name}/rebuild/cancel", post(async || r#"{"name":"search"}"#))
        .route("/v1/handlers/search", get(look));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let served = tokio::task::JoinSet::from_iter([async { axum::serve(listener, app).await }]);
    let rebuild = async |args: &[&str]| {
        let asked = pulsebus(|command| {
            command.args(["handlers", "rebuild"]).args(args).args(["--url", &url]);
            command.env("USER", "ann");
        });
        parts(&timeout(PATIENCE, asked).await.unwrap())
    };
    let (code, out, err) = rebuild(&["search"]).await;
    assert_eq!((code, &*err), (0, ""));
    assert!(out.starts_with("handler search is being rebuilt"), "{out}");
    assert_eq!(looks.load(SeqCst), 0);
    let (code, out, err) = rebuild(&["search", "--wait"]).await;
    assert_eq!((code, out.trim_end()), (0, "handler search has been rebuilt"), "{err}");
    assert!(err.contains("503") && err.contains("waiting for it"), "{err}");
    assert_eq!(looks.load(SeqCst), 4);
    let (code, out, err) = rebuild(&["search", "--cancel"]).await;
    assert_eq!((code, &*err), (0, ""));
    assert!(out.contains("not being rebuilt any more"), "{out}");
    let (code, _, err) = rebuild(&["mail", "--wait"]).await;
    assert_eq!(code, 1);
    assert!(err.contains("keeps nothing to rebuild"), "{err}");
    drop(served);
}
