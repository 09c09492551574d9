//! The image and the compose file: whether they fit together, and whether what they configure runs.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use serde_json::Value;

use crate::support::{
    daemon::{BINARY, Daemon, http, pulsebus},
    free_port,
    nats::NatsServer,
    postgres,
    process::folder,
    rabbit::RabbitNode,
    wait_until,
};

const TOKEN: &str = "trial-token";

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap()
}

/// Replaces what must be there once.
fn replaced(text: &str, from: &str, to: &str) -> String {
    assert_eq!(text.matches(from).count(), 1, "{from:?} in:\n{text}");
    text.replace(from, to)
}

/// What does not fit, by `tests/clients/container.py`.
fn problems(folder: &Path) -> String {
    let python = std::env::var("TEST_PULSEBUS_PYTHON")
        .expect("TEST_PULSEBUS_PYTHON: run the tests by tests/run, which installs the parsers");
    let script = root().join("tests/clients/container.py");
    let output = Command::new(python).arg(script).arg(folder).stdin(Stdio::null()).output();
    let output = output.unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    let err = String::from_utf8_lossy(&output.stderr);
    assert!(err.is_empty(), "{err}");
    assert_eq!(output.status.success(), said.is_empty(), "{said}");
    said
}

/// A copy of what the check looks at.
fn copy() -> PathBuf {
    let copy = folder("container");
    fs::create_dir(copy.join("src")).unwrap();
    let files =
        ["Dockerfile", ".dockerignore", "docker-compose.yml", "Cargo.toml", "Cargo.lock", "config"];
    for file in files {
        let status = Command::new("cp").arg("-r").arg(root().join(file)).arg(&copy).status();
        assert!(status.unwrap().success(), "{file}");
    }
    copy
}

#[test]
fn image_and_compose_file_fit_together() {
    assert_eq!(problems(root()), "");
}

/// The check above is worth something: what is broken on purpose is found.
#[test]
fn what_does_not_fit_together_is_found() {
    let breakages = [
        ("Dockerfile", "USER 65532:65532", "USER root", "USER root"),
        ("Dockerfile", "--chown=65532:65532 ", "", "does not belong to"),
        ("Dockerfile", "/out/pulsebus /usr/local/bin", "/out/bus /usr/local/bin", "not make"),
        (
            "Dockerfile",
            "CMD [\"/usr/local/bin/pulsebus\", \"h",
            "CMD [\"curl\", \"h",
            "HEALTHCHECK",
        ),
        ("Dockerfile", "STOPSIGNAL SIGTERM", "STOPSIGNAL SIGKILL", "STOPSIGNAL"),
        ("Dockerfile", "FROM rust:1.95-bookworm", "FROM rust", "hadolint"),
        (".dockerignore", "!src\n", "", "keeps src out"),
        (".dockerignore", "!src", "!source", "not there"),
        ("docker-compose.yml", "nats:2.12-alpine", "nats:alpine", "not pinned"),
        ("docker-compose.yml", "\"127.0.0.1:4222:4222\"", "\"4222:4222\"", "open to others"),
        ("docker-compose.yml", "      - nats:/data", "      - nuts:/data", "nuts"),
        ("docker-compose.yml", "shm_size:", "shm_seize:", "shm_seize"),
        ("docker-compose.yml", "@postgres:5432", "@database:5432", "is no service"),
        ("docker-compose.yml", "./config/rabbitmq.conf", "./config/rabbit.conf", "not there"),
        ("docker-compose.yml", "stop_grace_period: 35s", "stop_grace_period: 5s", "killed while"),
        ("docker-compose.yml", "${POSTGRES_PASSWORD:-pulsebus}@", "${PGPASS}@", "no default"),
        ("config/docker.toml", "nats://nats:4222", "nats://localhost:4222", "is no service"),
        ("config/docker.toml", "0.0.0.0:8077", "0.0.0.0:8078", "not published"),
    ];
    let copy = copy();
    assert_eq!(problems(&copy), "");
    for (file, from, to, expected) in breakages {
        let path = copy.join(file);
        let text = fs::read_to_string(&path).unwrap();
        fs::write(&path, replaced(&text, from, to)).unwrap();
        let said = problems(&copy);
        assert!(said.contains(expected), "{file}: {to:?} in place of {from:?}: {said:?}");
        fs::write(&path, text).unwrap();
    }
}

/// `config/nats-server.conf` for a server on this machine, as arguments.
fn nats_arguments(folder: &Path) -> Vec<String> {
    // It is an argument that every private server has.
    let mut conf = replaced(&read("config/nats-server.conf"), "  store_dir: \"/data\"\n", "");
    let said = Command::new("nats-server").arg("--version").output().unwrap().stdout;
    let said = String::from_utf8(said).unwrap();
    let version = said.trim().rsplit_once('v').unwrap().1;
    let mut numbers = version.split('.').map(|part| part.parse::<u32>().unwrap());
    if (numbers.next().unwrap(), numbers.next().unwrap()) < (2, 10) {
        conf = replaced(&conf, "  sync_interval: always\n", "");
    }
    let path = folder.join("nats-server.conf");
    fs::write(&path, conf).unwrap();
    vec!["-c".into(), path.display().to_string(), "-m".into(), free_port().to_string()]
}

/// `config/rabbitmq.conf` and its definitions for a node on this machine.
async fn rabbit(folder: &Path) -> RabbitNode {
    let definitions = folder.join("definitions.json");
    fs::write(&definitions, read("config/definitions.json")).unwrap();
    let conf = read("config/rabbitmq.conf");
    let conf = replaced(&conf, "listeners.tcp.default = 5672\n", "");
    let definitions = definitions.display().to_string();
    let conf = replaced(&conf, "/etc/rabbitmq/definitions.json", &definitions);
    RabbitNode::start_with(conf, "").await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_compose_configuration_runs_and_its_lines_work() {
    let folder = folder("compose");
    let arguments = nats_arguments(&folder);
    let arguments: Vec<&str> = arguments.iter().map(|argument| &**argument).collect();
    let nats = NatsServer::start_with(&arguments);
    let rabbit = rabbit(&folder).await;
    let database = postgres::database().await;

    let config = read("config/docker.toml");
    let config = replaced(&config, "data_dir = \"/var/lib/pulsebus\"\n", "");
    let config = replaced(&config, "[http]\n", "");
    let config = replaced(&config, "listen = \"0.0.0.0:8077\"\n", "");
    let config = replaced(&config, "nats://nats:4222", &nats.url());
    let config = replaced(&config, "@rabbitmq:5672", &format!("@{}", rabbit.address()));
    // The variables of docker-compose.yml.
    let config = format!("token = \"{TOKEN}\"\n[store]\nurl = \"{}\"\n{config}", database.url);
    let daemon = Daemon::start(&config).await;
    daemon.ready().await;

    let client = http();
    let get = async |path: &str| -> Option<Value> {
        let answer = client.get(daemon.url(path)).bearer_auth(TOKEN).send().await.ok()?;
        serde_json::from_str(&answer.text().await.ok()?).ok()
    };

    // The lines at the head of docker-compose.yml, as they stand.
    let compose = read("docker-compose.yml");
    let lines: Vec<&str> = compose
        .lines()
        .filter_map(|line| line.strip_prefix("#   ")?.strip_prefix("curl "))
        .collect();
    assert_eq!(lines.len(), 2);
    let curl = async |line: &str| -> Value {
        let line = format!("curl {}", replaced(line, "127.0.0.1:8077", &daemon.address()));
        let mut command = Command::new("sh");
        command.args(["-c", &line]).env_remove("http_proxy");
        let output = tokio::task::spawn_blocking(move || command.output()).await.unwrap().unwrap();
        serde_json::from_slice(&output.stdout).unwrap_or(Value::Null)
    };
    let posted = curl(lines[0]).await;
    assert_eq!((&posted["stored"], &posted["position"]), (&1.into(), &1.into()), "{posted}");
    let found = wait_until("the index has it", async || {
        let found = curl(lines[1]).await;
        (found["total"] == 1).then_some(found)
    })
    .await;
    assert_eq!(found["hits"][0]["fields"]["title"], "Fractions");

    // A lesson by NATS goes to RabbitMQ, a quiz by RabbitMQ to NATS.
    let file = daemon.folder.join("pulsebus.toml");
    let publish = async |arguments: &[&str], body: &str| {
        let output = pulsebus(|command| {
            command.args(["publish", "-c"]).arg(&file).args(arguments).arg(body);
        })
        .await;
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    };
    let lesson = r#"{"id":"l1","type":"LessonPublished","data":{"lesson_id":"8","title":"Roots"}}"#;
    publish(&["--transport", "nats", "--subject", "edupulse.lessons.new"], lesson).await;
    let quiz = r#"{"id":"q1","type":"QuizSubmitted","data":{"quiz_id":"3","score":7}}"#;
    let to = ["--transport", "rabbit", "--exchange", "edupulse", "--routing-key", "quiz.submitted"];
    publish(&to, quiz).await;
    wait_until("both are in the log and forwarded", async || {
        let events = get("/v1/events").await?;
        let handlers = get("/v1/handlers").await?;
        let done = handlers["handlers"].as_array()?.iter().all(|handler| {
            handler["position"] == 3 && handler["dead"] == 0 && handler["in_flight"] == 0
        });
        (events["events"].as_array()?.len() == 3 && done).then_some(())
    })
    .await;
    // A quorum queue counts what it holds only now and then.
    wait_until("RabbitMQ holds both lessons", async || {
        let waiting = rabbit.ctl(&["list_queues", "name", "messages"]).await;
        waiting.lines().any(|line| line == "edupulse.lessons\t2").then_some(())
    })
    .await;
    let mut stream = nats.jetstream().await.get_stream("EDUPULSE").await.unwrap();
    let mirrored = stream.get_last_raw_message_by_subject("edupulse.mirror.QuizSubmitted").await;
    assert_eq!(&*mirrored.unwrap().payload, quiz.as_bytes());
    assert!(!stream.info().await.unwrap().config.subjects.is_empty());

    // The healthcheck of the compose file, by the binary itself.
    let url = format!("http://{}", daemon.address());
    let check = async |token: &str| {
        pulsebus(|command| {
            command.args(["healthcheck", "--ready", "--url", &url]);
            command.env("PULSEBUS_HTTP__TOKEN", token);
        })
        .await
        .status
    };
    assert!(check(TOKEN).await.success(), "{BINARY}");
    assert_eq!(daemon.terminate().await.code(), Some(0), "{}", daemon.log());
    assert!(!check(TOKEN).await.success());
}
