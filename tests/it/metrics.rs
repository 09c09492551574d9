//! What a busy daemon exports, held against docs/metrics.md, the alert rules and the dashboard,
//! with the parsers of Prometheus's own clients.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::Write as _,
    path::Path,
    process::{Command, Stdio},
};

use serde_json::{Value, json};

use crate::support::{
    daemon::{Daemon, http},
    nats::NatsServer,
    receiver::{Receiver, Reply},
    wait_until,
};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// What a parser says, line by line; fails where it cannot read what it is given.
fn parsed(arguments: &[&str], input: &str) -> Vec<Value> {
    let python = std::env::var_os("TEST_PULSEBUS_PYTHON")
        .expect("TEST_PULSEBUS_PYTHON: a python with prometheus_client; tests/run sets it up");
    let mut child = Command::new(python)
        .arg(Path::new(ROOT).join("tests/clients/prometheus.py"))
        .args(arguments)
        .current_dir(ROOT)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let input = input.to_owned();
    let writing = std::thread::spawn(move || stdin.write_all(input.as_bytes()));
    let output = child.wait_with_output().unwrap();
    writing.join().unwrap().unwrap();
    assert!(output.status.success(), "{arguments:?} was not understood; see above");
    let text = String::from_utf8(output.stdout).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// A daemon in which everything that can happen has happened: messages and copies from NATS, what
/// is no event, a handler that is done, one that fails, dead letters, a redrive.
struct Busy {
    daemon: Daemon,
    _nats: NatsServer,
    _receiver: Receiver,
}

impl Busy {
    async fn start() -> Self {
        let nats = NatsServer::start();
        let receiver = Receiver::ruled(|_| Reply::status(500)).await;
        let config = format!(
            r#"
[store]
retain = {{ size = 1 }}
[transports.nats]
kind = "nats"
url = "{}"
[transports.broken]
kind = "http"
url = "{}"
[sources.lessons]
transport = "nats"
stream = "EDUPULSE"
create = {{ subjects = ["edupulse.>"] }}
[sources.http]
transport = "http"
[handlers.log]
kind = "log"
level = "debug"
[handlers.broken]
kind = "forward"
transport = "broken"
retry = {{ attempts = 2, initial = "10ms", max = "20ms" }}
"#,
            nats.url(),
            receiver.url("/")
        );
        let daemon = Daemon::start(&config).await;
        daemon.ready().await;
        let jetstream = nats.jetstream().await;
        for n in 0..200 {
            let body = json!({"type": "T", "id": n.to_string(), "key": (n % 7).to_string(),
                "time": "2026-01-01T00:00:00Z", "data": n});
            let sent = jetstream.publish("edupulse.t", body.to_string().into()).await.unwrap();
            sent.await.unwrap();
        }
        let posted = json!([{"specversion": "1.0"}, {"type": "T", "id": "posted", "data": 1}]);
        let client = http();
        let posted = client.post(daemon.url("/v1/events")).body(posted.to_string());
        assert!(posted.send().await.unwrap().status().is_success());
        wait_until("some have died and are saved, and the log has all", async || {
            let letters = daemon.json("/v1/dead-letters").await?;
            let all = daemon.handler("log").await == 201;
            (letters["dead_letters"].as_array()?.len() >= 7 && all).then_some(())
        })
        .await;
        let again = client.post(daemon.url("/v1/dead-letters/retry"));
        let again = again.json(&json!({"filter": {"handler": "broken"}})).send().await.unwrap();
        assert!(again.status().is_success(), "{}", again.text().await.unwrap());
        Self { daemon, _nats: nats, _receiver: receiver }
    }

    async fn metrics(&self, accept: &str) -> String {
        let request = http().get(self.daemon.url("/metrics")).header("accept", accept);
        request.send().await.unwrap().text().await.unwrap()
    }

    async fn families(&self) -> Vec<Family> {
        let text = wait_until(
            "dead letters taken up again, quarantine counted, the log held up",
            async || {
                let text = self.metrics("application/openmetrics-text").await;
                let taken = text.lines().any(|line| {
                    line.starts_with("pulsebus_handler_redriven_total{")
                        && line.contains("retry")
                        && !line.ends_with(" 0")
                });
                let held = text.contains("pulsebus_retention_held{");
                (taken && held && text.contains("pulsebus_quarantine_entries 1\n")).then_some(text)
            },
        )
        .await;
        parsed(&["openmetrics"], &text).iter().map(Family::of).collect()
    }
}

/// A family of series, as a parser sees it.
struct Family {
    /// As one asks for it: a counter with `_total`.
    name: String,
    kind: String,
    unit: String,
    help: String,
    labels: BTreeSet<String>,
    /// The values of each label.
    values: BTreeMap<String, BTreeSet<String>>,
    samples: BTreeSet<String>,
}

impl Family {
    fn of(family: &Value) -> Self {
        let text = |name: &str| family[name].as_str().unwrap().to_owned();
        let kind = text("type");
        let name = match &*kind {
            "counter" => text("name") + "_total",
            "info" => text("name") + "_info",
            _ => text("name"),
        };
        let mut values: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        let mut samples = BTreeSet::new();
        for sample in family["samples"].as_array().unwrap() {
            samples.insert(sample["name"].as_str().unwrap().to_owned());
            for (label, value) in sample["labels"].as_object().unwrap() {
                let value = value.as_str().unwrap().to_owned();
                values.entry(label.clone()).or_default().insert(value);
            }
        }
        let labels = values.keys().filter(|label| *label != "le").cloned().collect();
        let (unit, help) = (text("unit"), text("help"));
        Self { name, kind, unit, help, labels, values, samples }
    }
}

/// A row of a table in docs/metrics.md: type, unit, labels, and what it says.
fn documented() -> BTreeMap<String, (String, String, BTreeSet<String>, String)> {
    let text = std::fs::read_to_string(Path::new(ROOT).join("docs/metrics.md")).unwrap();
    let mut rows = BTreeMap::new();
    let series = |line: &&str| line.starts_with("| `pulsebus_") || line.starts_with("| `process_");
    for line in text.lines().filter(series) {
        let cells: Vec<_> = line.trim_matches('|').split('|').map(str::trim).collect();
        let [name, kind, unit, labels, meaning] = cells[..] else { panic!("{line}") };
        let labels = labels.split(',').map(|label| label.trim().trim_matches('`'));
        let labels = labels.filter(|label| !label.is_empty()).map(str::to_owned).collect();
        let row = (kind.to_owned(), unit.to_owned(), labels, meaning.to_owned());
        let name = name.trim_matches('`').to_owned();
        assert!(rows.insert(name, row).is_none(), "twice: {line}");
    }
    rows
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_docs_say_what_a_busy_daemon_exports_and_nothing_else() {
    let busy = Busy::start().await;
    let exported = busy.families().await;
    let mut documented = documented();
    for family in &exported {
        let Family { name, kind, unit, help, labels, samples, .. } = family;
        assert!(!samples.is_empty(), "{name} has no sample in a busy daemon");
        assert!(help.len() > 15 && help.ends_with('.') && !help.ends_with(".."), "{name}: {help}");
        let row = documented.remove(name);
        let (its_kind, its_unit, its_labels, meaning) =
            row.unwrap_or_else(|| panic!("docs/metrics.md does not say what {name} is"));
        assert_eq!((&its_kind, &its_unit), (kind, unit), "{name}");
        assert_eq!(&its_labels, labels, "the labels of {name}");
        assert!(
            kind != "histogram" || meaning.contains("ne observation") || meaning.contains("commit"),
            "docs/metrics.md: what is one observation of {name}?"
        );
    }
    let gone: Vec<_> = documented.keys().collect();
    assert!(gone.is_empty(), "docs/metrics.md has what no daemon exports: {gone:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_older_text_format_has_the_same_samples() {
    let busy = Busy::start().await;
    busy.families().await;
    let plain = busy.metrics("text/plain;version=0.0.4").await;
    let plain = parsed(&["text"], &plain);
    let open = busy.metrics("*/*").await;
    let open = parsed(&["openmetrics"], &open);
    let samples = |families: &[Value]| -> BTreeSet<String> {
        let mut all = BTreeSet::new();
        for family in families {
            // The older format has no such type.
            let kind = family["type"].as_str().unwrap().replace("info", "gauge");
            for sample in family["samples"].as_array().unwrap() {
                // Only the values may differ.
                let name = sample["name"].as_str().unwrap();
                all.insert(format!("{kind} {name}{}", sample["labels"]));
            }
        }
        all
    };
    let (plain, open) = (samples(&plain), samples(&open));
    assert_eq!(plain.symmetric_difference(&open).collect::<Vec<_>>(), Vec::<&String>::new());
    assert!(plain.len() > 200, "{}", plain.len());
}

/// Fails where an expression asks for what no busy daemon exports.
fn check(file: &str, exported: &[Family]) -> BTreeSet<String> {
    let mut asked = BTreeSet::new();
    let always = ["job", "instance"];
    for expression in parsed(&["expressions", file], "") {
        let place = format!("{file}: {}: {}", expression["where"], expression["expr"]);
        let mut labels: BTreeSet<&str> = always.into();
        for selector in expression["selectors"].as_array().unwrap() {
            let name = selector["name"].as_str().unwrap();
            if name == "up" {
                // Prometheus's own.
                continue;
            }
            let family = exported.iter().find(|family| family.samples.contains(name));
            let family = family.unwrap_or_else(|| panic!("{place}: nothing exports {name}"));
            asked.insert(family.name.clone());
            labels.extend(family.values.keys().map(String::as_str));
            for matcher in selector["matchers"].as_array().unwrap() {
                let label = matcher["name"].as_str().unwrap();
                let values = family.values.get(label);
                assert!(
                    values.is_some() || always.contains(&label),
                    "{place}: {name} has no label {label}"
                );
                let value = matcher["value"].as_str().unwrap();
                if let Some(values) = values
                    && !value.starts_with('$')
                {
                    for word in value.split('|') {
                        assert!(values.contains(word), "{place}: {name} has no {label} {word}");
                    }
                }
            }
        }
        for label in expression["labels"].as_array().unwrap() {
            let label = label.as_str().unwrap();
            assert!(labels.contains(label), "{place}: nothing it asks for has a label {label}");
        }
    }
    asked
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn alerts_and_dashboard_ask_for_nothing_that_no_daemon_exports() {
    let busy = Busy::start().await;
    let exported = busy.families().await;
    let alerts = check("config/prometheus/alerts.yml", &exported);
    let shown = check("config/grafana/dashboards/pulsebus.json", &exported);
    assert!(alerts.len() >= 15, "{alerts:?}");
    // Whoever looks at the dashboard sees everything there is.
    let all: BTreeSet<_> = exported.into_iter().map(|family| family.name).collect();
    assert_eq!(all.difference(&shown).collect::<Vec<_>>(), Vec::<&String>::new());
}
