//! The files in `config/`, the schema and the code say the same.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use super::Given;
use crate::config::schema;

const EXAMPLE: &str = include_str!("../../../config/pulsebus.toml");
const COMPOSE: &str = include_str!("../../../docker-compose.yml");
const DOCKER: &str = include_str!("../../../config/docker.toml");

/// The example with every setting in force: `#key = value` and `#[table]` lose their `#`.
fn uncommented() -> String {
    let mut text = String::new();
    for line in EXAMPLE.lines() {
        let setting = line
            .strip_prefix('#')
            .filter(|rest| rest.starts_with(|c: char| c.is_ascii_lowercase() || c == '['));
        text.push_str(setting.unwrap_or(line));
        text.push('\n');
    }
    text
}

/// The parts of the schema by the table they describe: `http`, `sources.*`, `handlers.*.retry`.
fn tables(schema: &Value) -> BTreeMap<String, BTreeMap<String, Value>> {
    fn resolve<'a>(root: &'a Value, schema: &'a Value) -> &'a Value {
        match schema.get("$ref").and_then(Value::as_str) {
            Some(name) => root.pointer(name.trim_start_matches('#')).expect("a definition"),
            None => schema,
        }
    }
    fn visit(
        root: &Value,
        schema: &Value,
        path: &str,
        tables: &mut BTreeMap<String, BTreeMap<String, Value>>,
    ) {
        let schema = resolve(root, schema);
        let below = |name: &str| {
            if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") }
        };
        if let Some(Value::Object(properties)) = schema.get("properties") {
            let keys = tables.entry(path.to_owned()).or_default();
            keys.extend(properties.iter().map(|(key, value)| (key.clone(), value.clone())));
            for (key, value) in properties {
                visit(root, value, &below(key), tables);
            }
        }
        if let Some(values) = schema.get("additionalProperties").filter(|v| v.is_object()) {
            visit(root, values, &below("*"), tables);
        }
        if let Some(items) = schema.get("items") {
            visit(root, items, path, tables);
        }
    }
    let mut tables = BTreeMap::new();
    visit(schema, schema, "", &mut tables);
    tables
}

/// Each key of each kind of table in the example, with all values it has there.
fn mentioned(value: &toml::Value, path: &str, found: &mut BTreeMap<String, Vec<toml::Value>>) {
    match value {
        toml::Value::Table(table) => {
            for (key, value) in table {
                let named = matches!(path, "transports" | "sources" | "handlers")
                    || path.ends_with(".documents");
                let key = if named { "*" } else { key };
                let path = if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") };
                found.entry(path.clone()).or_default().push(value.clone());
                mentioned(value, &path, found);
            }
        }
        toml::Value::Array(list) => list.iter().for_each(|item| mentioned(item, path, found)),
        _ => {}
    }
}

#[test]
fn the_example_as_it_stands_is_the_defaults() {
    let example = Given::file(EXAMPLE).loaded();
    let nothing = Given::nothing().loaded();
    assert_eq!(format!("{:?}", example.settings), format!("{:?}", nothing.settings));
}

#[test]
fn the_example_has_every_key_with_its_default() {
    let example: toml::Value = toml::Value::Table(uncommented().parse().unwrap());
    let mut found = BTreeMap::new();
    mentioned(&example, "", &mut found);
    let mut missing = BTreeSet::new();
    let schema = schema();
    let mut keys = 0;
    for (table, properties) in tables(&schema) {
        for (key, property) in properties {
            keys += 1;
            let path = if table.is_empty() { key } else { format!("{table}.{key}") };
            let Some(values) = found.get(&path) else {
                missing.insert(path);
                continue;
            };
            assert!(property.get("description").is_some(), "{path} has no description");
            let Some(default) = property.get("default") else { continue };
            let has_default = values
                .iter()
                .any(|value| serde_json::to_value(value).is_ok_and(|value| value == *default));
            // The fields of a document are examples, of which the comment says the default.
            assert!(
                has_default || path.starts_with("handlers.*.documents.*."),
                "{path}: the default {default} is not in config/pulsebus.toml, only {values:?}"
            );
        }
    }
    assert!(missing.is_empty(), "not in config/pulsebus.toml: {missing:?}");
    assert!(keys > 90, "only {keys} keys were looked at");
}

#[test]
fn the_example_with_every_setting_in_force_has_only_the_errors_of_its_alternatives() {
    let errors = Given::file(&uncommented()).errors();
    for error in &errors {
        let alternative = error.contains("given beside")
            || error.contains("cannot read /etc/pulsebus/")
            || error.contains("several ways to log in")
            || (error.contains("cargo feature `otlp`") && cfg!(not(feature = "otlp")))
            || error.contains("means nothing without Postgres");
        assert!(alternative, "{error}");
    }
    assert!(!errors.is_empty());
}

#[test]
fn the_schema_says_the_defaults_the_code_has() {
    // Everything the schema has a default for, said explicitly, changes nothing.
    let schema = schema();
    let mut text = String::new();
    for (table, properties) in tables(&schema) {
        // Where there is a `tls` table, there is TLS, which has no default; nor have traces.
        if table.contains('*') || table.ends_with(".tls") || table.starts_with("telemetry") {
            continue;
        }
        if !table.is_empty() {
            text.push_str(&format!("[{table}]\n"));
        }
        for (key, property) in properties {
            // Only with Postgres.
            if let Some(default) =
                property.get("default").filter(|_| key != "max_connections" || table != "store")
            {
                let value = toml::Value::try_from(default).unwrap();
                text.push_str(&format!("{key} = {value}\n"));
            }
        }
    }
    let explicit = Given::file(&text).loaded();
    let nothing = Given::nothing().loaded();
    assert_eq!(format!("{:?}", explicit.settings), format!("{:?}", nothing.settings));

    let tables = tables(&schema);
    let mut handler = "[handlers.l]\nkind = \"log\"\n".to_owned();
    let general =
        ["enabled", "events", "start", "workers", "ordering", "timeout", "on_dead", "level"];
    for key in general {
        let default = toml::Value::try_from(&tables["handlers.*"][key]["default"]).unwrap();
        handler.push_str(&format!("{key} = {default}\n"));
    }
    for part in ["retry", "window", "parked", "checkpoint"] {
        handler.push_str(&format!("[handlers.l.{part}]\n"));
        for (key, property) in &tables[&format!("handlers.*.{part}")] {
            let default = toml::Value::try_from(&property["default"]).unwrap();
            handler.push_str(&format!("{key} = {default}\n"));
        }
    }
    let explicit = Given::file(&handler).loaded();
    let plain = Given::file("handlers.l = { kind = \"log\", events = [\"*\"] }").loaded();
    assert_eq!(format!("{:?}", explicit.settings), format!("{:?}", plain.settings));
}

#[test]
fn what_is_shown_can_be_read_again_and_means_the_same() {
    let text = r##"
        data_dir = "x/y"
        [store.retain]
        age = "30d"
        size = "10GiB"
        identities = false
        [transports.nats]
        kind = "nats"
        url = "nats://127.0.0.1:4222"
        [transports.rabbit]
        kind = "amqp"
        url = "amqp://127.0.0.1:5672/%2f"
        [sources.lessons]
        transport = "nats"
        stream = "EDUPULSE"
        ack_wait = "45s"
        create = { subjects = ["edupulse.>"], replicas = 3 }
        key = ["/lesson_id", "header:key", "token:2", "subject"]
        [sources.quizzes]
        transport = "rabbit"
        queue = "q"
        create = { bind = [{ exchange = "e", routing_key = "#" }], arguments = { x-delivery-limit = 5 } }
        [handlers.to-rabbit]
        kind = "forward"
        transport = "rabbit"
        exchange = "e"
        retry = { attempts = 3, jitter = 0.25 }
        [transports.crm]
        kind = "http"
        url_file = "URL"
        timeout = "7s"
        refuse_private = true
        [handlers.to-crm]
        kind = "forward"
        transport = "crm"
        path = "/hooks/{type}"
        dead_letter = { transport = "crm", path = "/dead/{handler}" }
        [handlers.to-root]
        kind = "forward"
        transport = "crm"
        [handlers.s]
        kind = "search"
        [handlers.s.documents."Lesson.Published"]
        id = "/id"
        text = { title = "/title" }
    "##;
    let folder = tempfile::tempdir().unwrap();
    let url = folder.path().join("url");
    std::fs::write(&url, "https://crm.example/hooks\n").unwrap();
    let given = Given::file(&text.replace("URL", &url.display().to_string()));
    let first = given.loaded();
    let again = Given::file(&first.show()).loaded();
    assert_eq!(format!("{:#?}", first.settings), format!("{:#?}", again.settings));
    assert!(first.show().contains("attempts = 3 # "), "{}", first.show());
    assert!(first.show().contains("# default"), "{}", first.show());
}

#[test]
fn the_compose_file_has_a_configuration_that_holds() {
    let given = Given::file(DOCKER)
        .variable("PULSEBUS_STORE__URL", "postgres://pulsebus:pulsebus@postgres/pulsebus")
        .variable("PULSEBUS_HTTP__TOKEN", "token");
    for name in ["PULSEBUS_STORE__URL", "PULSEBUS_HTTP__TOKEN"] {
        assert!(COMPOSE.contains(&format!("{name}: ")), "docker-compose.yml does not set {name}");
    }
    let settings = given.loaded().settings;
    assert_eq!(settings.sources.len(), 3);
    assert_eq!(settings.handlers.len(), 3);
}
