//! The settings of docker-compose.yml: the same files, against local servers.

use std::path::Path;

use super::examine;
use crate::{
    credentials::configured,
    support::{daemon::Daemon, process, rabbit::RabbitNode},
};

fn file(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("config").join(name);
    std::fs::read_to_string(path).unwrap()
}

/// Without the settings of these names: they are the container's, or newer than the server here.
fn without(text: &str, names: &[&str]) -> String {
    let is = |line: &&str| {
        !names.iter().any(|name| {
            line.trim_start()
                .strip_prefix(name)
                .is_some_and(|rest| rest.trim_start().starts_with([':', '=']))
        })
    };
    text.lines().filter(is).flat_map(|line| [line, "\n"]).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn our_compose_settings_have_no_findings() {
    let folder = process::folder("compose");
    // Before 2.10 the server does not know when to sync; where it keeps things is an argument.
    let conf = without(
        &file("nats-server.conf"),
        &["sync_interval", "store_dir", "http_port", "port", "server_name"],
    );
    let nats = configured(&folder, &conf);
    std::fs::write(folder.join("definitions.json"), file("definitions.json")).unwrap();
    let mut conf = without(
        &file("rabbitmq.conf"),
        &["listeners.tcp.default", "load_definitions", "log.console", "log.console.level"],
    );
    conf += &format!("load_definitions = {}/definitions.json\n", folder.display());
    let rabbit = RabbitNode::start_with(conf, "").await;

    let rabbit_at = rabbit.address().to_string();
    let config = without(&file("docker.toml"), &["data_dir", "listen"])
        .replace("[http]\n", "")
        .replace("nats://nats:4222", &nats.url())
        .replace("rabbitmq:5672", &rabbit_at);
    assert!(config.contains(&rabbit_at) && config.contains(&nats.url()), "{config}");
    let daemon = Daemon::start(&config).await;
    daemon.ready().await;
    let running = examine(&daemon.folder.join("pulsebus.toml")).await;
    assert_eq!(running.findings, Vec::<serde_json::Value>::new(), "while it runs");
    for subject in [
        "transport:nats",
        "transport:rabbit",
        "source:lessons",
        "source:quizzes",
        "handler:to-nats",
    ] {
        running.expect(subject, &[]);
    }
    daemon.terminate().await;
    let ended = examine(&daemon.folder.join("pulsebus.toml")).await;
    assert_eq!(ended.findings, Vec::<serde_json::Value>::new(), "after it ran");

    // Short of memory, the broker stops whoever publishes.
    rabbit.ctl(&["set_vm_memory_high_watermark", "0"]).await;
    let blocked = examine(&daemon.folder.join("pulsebus.toml")).await;
    blocked.expect("transport:rabbit", &["error amqp-blocked"]);
    blocked.expect("source:quizzes", &[]);
    rabbit.ctl(&["set_vm_memory_high_watermark", "0.6"]).await;
    let mended = examine(&daemon.folder.join("pulsebus.toml")).await;
    assert_eq!(mended.findings, Vec::<serde_json::Value>::new(), "mended");
}
