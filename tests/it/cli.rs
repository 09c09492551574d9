//! The commands, as a person runs them: the real binary against a real daemon.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{BufRead as _, BufReader, Write as _},
    path::Path,
    process::{Command, Output, Stdio},
};

use serde_json::{Value, value::RawValue};
use tokio::{sync::mpsc, task::spawn_blocking, time::timeout};

use crate::support::{
    PATIENCE,
    daemon::{BINARY, Daemon, http, pulsebus},
    free_port,
    process::{self, folder, signal},
    wait_until,
};

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// Exit code, standard output and standard error.
pub(crate) fn parts(output: &Output) -> (i32, String, String) {
    (output.status.code().unwrap(), text(&output.stdout), text(&output.stderr))
}

/// Runs a command that talks to a daemon.
async fn ask(daemon: &Daemon, args: &[&str]) -> (i32, String, String) {
    let url = daemon.url("").to_owned();
    let output = pulsebus(|command| {
        command.args(args).args(["--url", &url]);
    })
    .await;
    parts(&output)
}

/// The same, with something on standard input.
async fn tell(daemon: &Daemon, args: &[&str], input: &str) -> (i32, String, String) {
    let file = daemon.folder.join("input");
    fs::write(&file, input).unwrap();
    let url = daemon.url("").to_owned();
    let output = pulsebus(|command| {
        command.args(args).args(["--url", &url]).stdin(File::open(&file).unwrap());
    })
    .await;
    parts(&output)
}

/// JSON objects, one a line; a member that serde_json has no number for is null.
pub(crate) fn lines(text: &str) -> Vec<Value> {
    let object = |line: &str| -> Value {
        let members: BTreeMap<String, Box<RawValue>> = serde_json::from_str(line).unwrap();
        let value = |raw: &RawValue| serde_json::from_str::<Value>(raw.get()).unwrap_or_default();
        members.iter().map(|(name, raw)| (name.clone(), value(raw))).collect()
    };
    text.lines().map(object).collect()
}

#[tokio::test]
async fn check_says_everything_that_is_wrong() {
    let folder = folder("check");
    let file = folder.join("bad.toml");
    fs::write(
        &file,
        r#"
        data_dri = "x"
        [http]
        listen = "0.0.0.0:1"
        max_body = "lots"
        [transports.nats]
        kind = "nats"
        url = "http://nowhere"
        [sources.lessons]
        transport = "rabbit"
        queue = "q"
        [handlers.search]
        kind = "serach"
        "#,
    )
    .unwrap();
    let checked = pulsebus(|command| {
        command.arg("check").arg("--config").arg(&file);
    })
    .await;
    let (code, out, err) = parts(&checked);
    assert_eq!(code, 78, "{out}{err}");
    assert!(err.contains(file.to_str().unwrap()), "{err}");
    let found = [
        ("data_dri", "data_dir"),
        ("http.listen", "token"),
        ("http.max_body", "not a size"),
        ("transports.nats.url", "nats://"),
        ("sources.lessons.transport", "rabbit"),
        ("handlers.search.kind", "search"),
    ];
    for (key, hint) in found {
        let line = err.lines().find(|line| line.contains(key));
        assert!(line.is_some_and(|line| line.contains(hint)), "{key}: {hint} in\n{err}");
    }
    let checked = pulsebus(|command| {
        command.args(["check", "--json"]).arg("--config").arg(&file);
    })
    .await;
    let (code, out, err) = parts(&checked);
    assert_eq!((code, &*err), (78, ""));
    let answer: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(answer["ok"], false);
    assert!(answer["errors"].as_array().unwrap().len() >= found.len(), "{answer}");
    // The daemon ends the same way, before it does anything.
    let run = pulsebus(|command| {
        command.arg("run").arg("--config").arg(&file).arg("--data-dir").arg(folder.join("data"));
    })
    .await;
    assert_eq!(run.status.code(), Some(78));
    assert!(!folder.join("data").exists());

    let missing = pulsebus(|command| {
        command.args(["check", "--config", "/nowhere/pulsebus.toml"]);
    })
    .await;
    let (code, _, err) = parts(&missing);
    assert_eq!(code, 78);
    assert!(err.contains("/nowhere/pulsebus.toml") && err.contains("cannot be read"), "{err}");

    // A variable is named where it is what is wrong.
    let variable = pulsebus(|command| {
        command.arg("check").env("PULSEBUS_HTTP__MAX_BODY", "lots");
    })
    .await;
    let (code, _, err) = parts(&variable);
    assert_eq!(code, 78);
    assert!(err.contains("PULSEBUS_HTTP__MAX_BODY"), "{err}");

    let right = pulsebus(|command| {
        command.arg("check");
    })
    .await;
    assert_eq!(right.status.code(), Some(0), "{right:?}");
}

#[tokio::test]
async fn usage_errors_end_with_2() {
    let usage: [&[&str]; 4] = [
        &["nonsense"],
        &["publish", "--data", "1"],
        &["events", "get", "x"],
        &["publish", "--type", "T", "--data", "{a}"],
    ];
    for args in usage {
        let output = pulsebus(|command| {
            command.args(args);
        })
        .await;
        let (code, _, err) = parts(&output);
        assert_eq!(code, 2, "{args:?}: {err}");
        assert!(!err.is_empty());
    }
}

/// Without a configuration: SQLite, ingest and the search index under the data folder, and what
/// is printed to try works as printed.
#[tokio::test]
async fn without_a_configuration_it_is_a_working_bus() {
    let folder = folder("defaults");
    let listen = format!("127.0.0.1:{}", free_port());
    let out = folder.join("out");
    let mut child = process::spawn(Path::new(BINARY), |command| {
        command
            .env_clear()
            .env("PULSEBUS_HTTP__LISTEN", &listen)
            .current_dir(&folder)
            .stdout(File::create(&out).unwrap())
            .stderr(File::create(folder.join("log")).unwrap());
    });
    let printed = wait_until("it says what to try", async || {
        assert!(
            child.try_wait().unwrap().is_none(),
            "{:?}",
            fs::read_to_string(folder.join("log"))
        );
        let printed = fs::read_to_string(&out).unwrap();
        printed.contains("Ctrl-C drains").then_some(printed)
    })
    .await;
    assert!(folder.join("pulsebus-data/events.db").exists());
    let curls: Vec<_> = printed.lines().filter(|line| line.trim().starts_with("curl ")).collect();
    assert_eq!(curls.len(), 2, "{printed}");
    let curl = async |line: &str| {
        let line = line.to_owned();
        let run = move || Command::new("sh").args(["-c", &line]).output().unwrap();
        text(&spawn_blocking(run).await.unwrap().stdout)
    };
    let stored: Value = serde_json::from_str(&curl(curls[0]).await).unwrap();
    assert_eq!((&stored["stored"], &stored["position"]), (&1.into(), &1.into()));
    wait_until("the lesson is found", async || {
        curl(curls[1]).await.contains("<b>Photosynthesis</b>").then_some(())
    })
    .await;
    signal(&child, "INT");
    let status = wait_until("it ends", async || child.try_wait().unwrap()).await;
    assert_eq!(status.code(), Some(0));
}

#[tokio::test]
async fn events_are_published_from_anywhere() {
    let daemon = Daemon::start("").await;
    let odd = r#"{"id":"odd","type":"T",  "data":[1e400,0.10],"a":1,"a":2}"#;
    let (code, out, err) = ask(&daemon, &["publish", odd]).await;
    assert_eq!((code, out.trim()), (0, "stored 1, duplicates 0, last position 1"), "{err}");
    let (code, out, _) = ask(&daemon, &["publish", odd]).await;
    assert_eq!((code, out.trim()), (0, "stored 0, duplicates 1"));

    let made = ["publish", "--type", "LessonPublished", "--id", "l", "--key", "7", "--data"];
    let data = r#"{"lesson_id":"7","title":"Fractions for all","author_id":"a","published_at":1}"#;
    let (code, _, err) = ask(&daemon, &[&made[..], &[data]].concat()).await;
    assert_eq!(code, 0, "{err}");

    // A file of lines, more than one request takes.
    let file = daemon.folder.join("events.ndjson");
    let mut events = File::create(&file).unwrap();
    for n in 0..2_500 {
        writeln!(events, r#"{{"id":"f{n}","type":"F","key":"f","data":{n}}}"#).unwrap();
    }
    let (code, out, err) =
        ask(&daemon, &["publish", "--json", "--file", file.to_str().unwrap()]).await;
    assert_eq!(code, 0, "{err}");
    assert_eq!(lines(&out)[0]["stored"], 2_500);
    assert_eq!(daemon.head().await, 2_502);

    // Standard input: an array over several lines; lines; a document.
    let (code, out, _) =
        tell(&daemon, &["publish"], "[\n{\"id\":\"i1\",\"type\":\"I\",\"data\":1},\n7\n]").await;
    assert_eq!((code, out.trim()), (0, "stored 2, duplicates 0, last position 2504"));
    let (code, out, _) = tell(&daemon, &["publish", "-"], "{\"id\":\"i2\",\n\"data\":1}\n").await;
    assert_eq!((code, out.trim()), (0, "stored 1, duplicates 0, last position 2505"));

    // What goes to quarantine is said, with its number, and is not success.
    let mixed = "{\"id\":\"m\",\"type\":\"M\",\"data\":1}\n{\"specversion\":\"1.0\"}\n";
    let (code, out, err) = tell(&daemon, &["publish"], mixed).await;
    assert_eq!((code, out.trim()), (1, "stored 1, duplicates 0, last position 2506"));
    assert!(err.contains("event 2 went to quarantine") && err.contains("no `id`"), "{err}");
    let (code, _, err) = ask(&daemon, &["publish", r#"{"specversion":"1.0"}"#]).await;
    assert_eq!(code, 1);
    assert!(err.contains("no `id`") && err.contains("quarantine"), "{err}");
    let (code, _, err) = ask(&daemon, &["publish", "{a}"]).await;
    assert_eq!(code, 1);
    assert!(err.contains("not JSON"), "{err}");
    let (code, _, err) = ask(&daemon, &["publish", "--file", "/nowhere/x"]).await;
    assert_eq!(code, 1);
    assert!(err.contains("/nowhere/x"), "{err}");

    // What was published is listed as it was.
    let (code, out, _) = ask(&daemon, &["events", "list", "--json", "-n", "3000"]).await;
    assert_eq!(code, 0);
    let positions: Vec<_> = lines(&out).iter().map(|e| e["position"].as_u64().unwrap()).collect();
    assert_eq!(positions, (1..=2_506).collect::<Vec<u64>>());
    assert!(out.lines().next().unwrap().contains(&format!("\"body\":{odd}")), "{out}");
    let newest = ["events", "list", "--json", "--reverse", "-n", "2", "--type", "F"];
    let (_, out, _) = ask(&daemon, &newest).await;
    let ids: Vec<_> = lines(&out).iter().map(|event| event["id"].clone()).collect();
    assert_eq!(ids, ["f2499", "f2498"]);
    let (_, out, _) = ask(&daemon, &["events", "list", "--from", "2505", "-n", "1"]).await;
    assert!(out.starts_with("POSITION") && out.contains("2505"), "{out}");
    let (_, out, _) = ask(&daemon, &["events", "get", "1"]).await;
    assert!(out.contains(&format!("\"body\":{odd}")), "{out}");
    let (code, _, err) = ask(&daemon, &["events", "get", "9999"]).await;
    assert_eq!(code, 1);
    assert!(err.contains("no event at position 9999"), "{err}");

    let (code, out, _) = ask(&daemon, &["quarantine", "list", "--json"]).await;
    assert_eq!((code, lines(&out).len()), (0, 2));
    let (code, out, _) = ask(&daemon, &["quarantine", "list"]).await;
    assert!(code == 0 && out.starts_with("NUMBER") && out.contains("no `id`"), "{out}");

    wait_until("the lesson is found", async || {
        let (code, out, err) = ask(&daemon, &["search", "fractions"]).await;
        assert_eq!(code, 0, "{err}");
        (out.contains("1 of 1") && out.contains("Fractions for all")).then_some(())
    })
    .await;
    let (_, out, _) = ask(&daemon, &["search", "--json", "fractions"]).await;
    assert_eq!((&lines(&out)[0]["id"], &lines(&out)[0]["position"]), (&"7".into(), &2.into()));
    let (code, _, err) = ask(&daemon, &["search", "--handler", "nobody", "x"]).await;
    assert_eq!(code, 1);
    assert!(err.contains("no search handler is called `nobody`"), "{err}");

    let (code, out, _) = ask(&daemon, &["handlers", "list"]).await;
    assert!(code == 0 && out.starts_with("NAME") && out.contains("search"), "{out}");
    let (_, out, _) = ask(&daemon, &["handlers", "list", "--json"]).await;
    assert_eq!(lines(&out)[0]["name"], "search");
    let (_, out, _) = ask(&daemon, &["sources", "list", "--json"]).await;
    assert_eq!(lines(&out)[0]["state"], "consuming");
    assert_eq!(ask(&daemon, &["healthcheck", "--ready"]).await.0, 0);

    assert_eq!(daemon.terminate().await.code(), Some(0));
    let (code, _, err) = ask(&daemon, &["events", "list"]).await;
    assert_eq!(code, 1);
    assert!(err.contains("is the daemon running?"), "{err}");
    assert_eq!(ask(&daemon, &["healthcheck"]).await.0, 1);
}

#[tokio::test]
async fn a_tail_follows_the_log() {
    let daemon = Daemon::start("").await;
    for n in 0..3 {
        let event = format!(r#"{{"id":"{n}","type":"T","data":{n}}}"#);
        assert_eq!(ask(&daemon, &["publish", &event]).await.0, 0);
    }
    let mut tail = process::spawn(Path::new(BINARY), |command| {
        command
            .args(["events", "tail", "--json", "-n", "2", "--url", &daemon.url("")])
            .stdout(Stdio::piped())
            .stderr(File::create(daemon.folder.join("tail")).unwrap());
    });
    let printed = BufReader::new(tail.stdout.take().unwrap());
    let (sender, mut ids) = mpsc::unbounded_channel();
    let reading = spawn_blocking(move || {
        for line in printed.lines() {
            let event: Value = serde_json::from_str(&line.unwrap()).unwrap();
            let _ = sender.send(event["id"].as_str().unwrap().to_owned());
        }
    });
    let mut next = async || timeout(PATIENCE, ids.recv()).await.unwrap().unwrap();
    assert_eq!([next().await, next().await], ["1", "2"]);
    for n in 3..6 {
        let event = format!(r#"{{"id":"{n}","type":"T","data":{n}}}"#);
        assert_eq!(ask(&daemon, &["publish", &event]).await.0, 0);
        assert_eq!(next().await, n.to_string());
    }
    assert!(tail.try_wait().unwrap().is_none());
    tail.kill().unwrap();
    tail.wait().unwrap();
    reading.await.unwrap();
}

#[tokio::test]
async fn a_token_is_asked_for_and_given() {
    let secret = folder("token").join("token");
    fs::write(&secret, "s3cret\n").unwrap();
    let token = secret.to_str().unwrap();
    let daemon = Daemon::start(&format!("token_file = \"{token}\"")).await;
    // It asks for the token before its bus is up, and answers 503 to those who have it.
    daemon.ready().await;
    let event = r#"{"id":"1","type":"T","data":1}"#;
    let (code, _, err) = ask(&daemon, &["publish", event]).await;
    assert_eq!(code, 1);
    assert!(err.contains("--token-file"), "{err}");
    let (code, _, err) = ask(&daemon, &["publish", event, "--token-file", token]).await;
    assert_eq!(code, 0, "{err}");
    // The daemon's own configuration names the token, too.
    let config = daemon.folder.join("pulsebus.toml");
    let shown = pulsebus(|command| {
        command.args(["events", "list", "--config"]).arg(&config);
    })
    .await;
    let (code, out, err) = parts(&shown);
    assert!(code == 0 && out.contains("POSITION"), "{err}");
    let shown = pulsebus(|command| {
        command.args(["config", "show", "--config"]).arg(&config);
    })
    .await;
    assert!(!text(&shown.stdout).contains("s3cret"));
    assert!(!daemon.log().contains("s3cret"));
}

#[tokio::test]
async fn a_second_daemon_on_the_port_says_so_and_touches_nothing() {
    let first = Daemon::start("").await;
    let listen = first.address();
    let folder = folder("second");
    let second = pulsebus(|command| {
        command
            .args(["run", "--listen", &listen, "--data-dir"])
            .arg(folder.join("data"))
            .args(["--set", "log.format=text"]);
    })
    .await;
    let (code, _, err) = parts(&second);
    assert_eq!(code, 1, "{err}");
    assert!(err.contains(&listen) && err.contains("another pulsebus"), "{err}");
    assert!(!folder.join("data").exists());
    first.ready().await;
    assert_eq!(first.terminate().await.code(), Some(0));
}

/// Events published up to the last moment are there after the restart.
#[tokio::test]
async fn G1_a_drain_keeps_what_was_answered() {
    let daemon = Daemon::start("").await;
    let (url, http) = (daemon.url("/v1/events"), http());
    let publishing = tokio::task::JoinSet::from_iter((0..4).map(|client| {
        let (http, url) = (http.clone(), url.clone());
        async move {
            let mut answered = Vec::new();
            for n in 0.. {
                let id = format!("{client}-{n}");
                let body = format!(r#"{{"id":"{id}","type":"T","data":{n}}}"#);
                match http.post(&url).body(body).send().await {
                    Ok(answer) if answer.status().is_success() => answered.push(id),
                    // It is going away: refused, or not accepted any more.
                    Ok(answer) if answer.status() == 503 => break,
                    Ok(answer) => panic!("{answer:?}"),
                    Err(_) => break,
                }
            }
            answered
        }
    }));
    wait_until("the log grows", async || (daemon.head().await >= 200).then_some(())).await;
    assert_eq!(daemon.terminate().await.code(), Some(0), "{}", daemon.log());
    let answered = publishing.join_all().await.concat();
    assert!(answered.len() >= 200, "{}", answered.len());

    daemon.restart().await;
    let (code, out, err) = ask(&daemon, &["events", "list", "--json", "-n", "1000000"]).await;
    assert_eq!(code, 0, "{err}");
    let kept: std::collections::BTreeSet<_> =
        lines(&out).iter().map(|event| event["id"].as_str().unwrap().to_owned()).collect();
    let lost: Vec<_> = answered.iter().filter(|id| !kept.contains(*id)).collect();
    assert!(lost.is_empty(), "{lost:?}");
}
