//! Defaults, precedence, and what is refused.

use std::{collections::BTreeMap, path::Path, time::Duration};

use proptest::prelude::*;

use super::{Given, with_brokers};
use crate::config::{
    CheckpointSettings, ForwardSettings, HandlerKind, INGEST, OnDead, Ordering, RetrySettings,
    Start, StoreSettings, TransportSettings, WindowSettings,
};
use crate::handler::forward::ForwardFormat;

#[test]
fn with_nothing_configured_there_is_sqlite_http_and_the_lesson_index() {
    let settings = Given::nothing().loaded().settings;
    assert_eq!(settings.data_dir, Path::new("./pulsebus-data"));
    assert!(matches!(&settings.store, StoreSettings::Sqlite { path }
        if path == Path::new("./pulsebus-data/events.db")));
    assert!(settings.http.enabled && settings.http.token.is_none());
    assert_eq!(settings.http.listen.to_string(), "127.0.0.1:8077");
    assert_eq!(settings.shutdown_timeout, Duration::from_secs(25));
    assert_eq!(settings.limits.max_event_bytes, 1 << 20);
    assert!(settings.transports.is_empty());
    assert_eq!(settings.sources.keys().map(|name| &**name).collect::<Vec<_>>(), ["http"]);
    assert_eq!(&*settings.sources[INGEST].transport, INGEST);
    assert_eq!(settings.handlers.keys().map(|name| &**name).collect::<Vec<_>>(), ["search"]);
    let search = &settings.handlers["search"];
    assert_eq!(search.events, ["LessonPublished"]);
    assert_eq!(search.start, Start::Beginning);
    assert_eq!((search.workers, search.ordering, search.on_dead), (4, Ordering::Key, OnDead::Park));
    assert_eq!(search.timeout, Duration::from_secs(30));
    assert_eq!(search.retry, RetrySettings::default());
    assert_eq!(search.window, WindowSettings::default());
    assert_eq!(search.checkpoint, CheckpointSettings::default());
    let HandlerKind::Search(options) = &search.kind else { panic!("{:?}", search.kind) };
    assert_eq!(options.path, Path::new("./pulsebus-data/search/search"));
    assert_eq!(options.documents["LessonPublished"].id, "/lesson_id");
}

#[test]
fn the_state_directory_of_systemd_is_the_data_dir_unless_one_is_configured() {
    let given = Given::nothing().variable("STATE_DIRECTORY", "/var/lib/pulsebus:/var/lib/other");
    assert_eq!(given.loaded().settings.data_dir, Path::new("/var/lib/pulsebus"));
    let given = given.variable("PULSEBUS_DATA_DIR", "/elsewhere");
    assert_eq!(given.loaded().settings.data_dir, Path::new("/elsewhere"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn flags_win_over_the_environment_over_the_file_over_defaults(
        file in proptest::option::of(1_u16..),
        variable in proptest::option::of(1_u16..),
        flag in proptest::option::of(1_u16..),
    ) {
        let address = |port| format!("127.0.0.1:{port}");
        let mut given = match file {
            Some(port) => Given::file(&format!("[http]\nlisten = \"{}\"", address(port))),
            None => Given::nothing(),
        };
        if let Some(port) = variable {
            given = given.variable("PULSEBUS_HTTP__LISTEN", &address(port));
        }
        if let Some(port) = flag {
            given = given.flag("--listen", "http.listen", &address(port));
        }
        let expected = flag.or(variable).or(file).unwrap_or(8077);
        let loaded = given.loaded();
        prop_assert_eq!(loaded.settings.http.listen.port(), expected);
        let shown = loaded.show();
        let line = shown.lines().find(|line| line.starts_with("listen = ")).unwrap().to_owned();
        let origin = match (flag, variable, file) {
            (Some(_), _, _) => "--listen",
            (_, Some(_), _) => "PULSEBUS_HTTP__LISTEN",
            (_, _, Some(_)) => "pulsebus.toml:2",
            _ => "default",
        };
        prop_assert!(line.ends_with(origin), "{line}");
    }

    #[test]
    fn any_text_as_a_file_is_settings_or_errors(text: String) {
        let given = Given::file(&text);
        if let Err(errors) = given.load() {
            prop_assert!(errors.iter().all(|error| error.origin.is_some()));
        }
    }

    #[test]
    fn any_text_in_a_variable_is_settings_or_errors_that_name_it(
        key in proptest::sample::select(vec![
            "HTTP__LISTEN", "HTTP", "STORE__URL", "LIMITS__MAX_EVENT_BYTES", "SOURCES__X__CREATE",
            "HANDLERS__SEARCH__WORKERS", "LOG__FILTER", "SHUTDOWN_TIMEOUT", "TRANSPORTS__N__KIND",
        ]),
        text in "[^\0]*",
    ) {
        let name = format!("PULSEBUS_{key}");
        let given = Given::nothing().variable(&name, &text);
        if let Err(errors) = given.load() {
            for error in errors.iter() {
                prop_assert_eq!(error.origin.as_deref(), Some(name.as_str()), "{}", error);
            }
        }
    }
}

#[test]
fn the_environment_reaches_names_with_dashes_and_values_of_every_type() {
    let given = with_brokers(
        r#"
        [handlers.to-rabbit]
        kind = "forward"
        transport = "rabbit"
        exchange = "edupulse"
        "#,
    )
    .variable("PULSEBUS_HANDLERS__TO_RABBIT__WORKERS", "16")
    .variable("PULSEBUS_HANDLERS__TO_RABBIT__EVENTS", r#"["Lesson*", "Quiz*"]"#)
    .variable("PULSEBUS_HANDLERS__TO_RABBIT__RETRY__JITTER", "0.2")
    .variable("PULSEBUS_HANDLERS__TO_RABBIT__TIMEOUT", "5s")
    .variable("PULSEBUS_HTTP__ENABLED", "false")
    .variable("PULSEBUS_LIMITS__MAX_EVENT_BYTES", "2097152");
    let settings = given.loaded().settings;
    let handler = &settings.handlers["to-rabbit"];
    assert_eq!(handler.workers, 16);
    assert_eq!(handler.events, ["Lesson*", "Quiz*"]);
    assert!((handler.retry.jitter - 0.2).abs() < f64::EPSILON);
    assert_eq!(handler.timeout, Duration::from_secs(5));
    assert_eq!(settings.limits.max_event_bytes, 2 << 20);
    assert!(!settings.http.enabled);
    assert!(settings.sources.is_empty(), "without a server there is no ingest");
    let HandlerKind::Forward(forward) = &handler.kind else { panic!("{:?}", handler.kind) };
    let expected = ForwardSettings {
        transport: "rabbit".into(),
        address: "{type}".into(),
        exchange: Some("edupulse".into()),
        headers: BTreeMap::new(),
        format: ForwardFormat::Verbatim,
    };
    assert_eq!(*forward, expected);
}

#[test]
fn variables_that_are_not_configuration_are_left_alone() {
    let given = Given::nothing()
        .variable("PULSEBUS_CONFIG", "/nonexistent")
        .variable("PULSEBUS_URL", "http://127.0.0.1:1")
        .variable("PULSEBUS_TOKEN_FILE", "/nonexistent")
        // A Kubernetes service called `pulsebus`.
        .variable("PULSEBUS_SERVICE_HOST", "10.0.0.1")
        .variable("PULSEBUS_SERVICE_PORT_HTTP", "8077")
        .variable("PULSEBUS_PORT", "tcp://10.0.0.1:8077")
        .variable("PULSEBUS_PORT_8077_TCP_ADDR", "10.0.0.1")
        .variable("PULSEBUS", "x")
        .variable("OTHER_HTTP__LISTEN", "x");
    given.loaded();
    let errors = Given::nothing().variable("PULSEBUS_PORT", "9000").errors();
    assert!(errors[0].starts_with("PULSEBUS_PORT: port: unknown key"), "{errors:?}");
}

#[test]
fn a_file_that_was_asked_for_must_be_there() {
    for (given, name) in [
        (Given::nothing(), "--config"),
        (Given::nothing().variable("PULSEBUS_CONFIG", "/nonexistent/p.toml"), "variable"),
    ] {
        let mut given = given;
        given.inputs.file = (name == "--config").then(|| "/nonexistent/p.toml".into());
        let errors = given.errors();
        assert!(errors[0].starts_with("/nonexistent/p.toml: cannot be read"), "{errors:?}");
    }
}

#[test]
fn all_errors_are_found_at_once_each_with_its_origin_and_key() {
    let given = with_brokers(
        r#"
        surplus = 1
        [http]
        lisen = "127.0.0.1:1"
        enabled = "perhaps"
        [limits]
        max_event_bytes = "many"
        [sources.lessons]
        transport = "nat"
        prefetch = 70000
        [handlers.h]
        kind = "serch"
        [handlers.h.retry]
        attempts = 0
        "#,
    )
    .variable("PULSEBUS_HTTP__TIMEOUT", "30")
    .flag("--set", "log.format", "xml");
    let errors = given.errors().join("\n");
    for (origin, key, hint) in [
        ("pulsebus.toml:9", "transports.rabbit.surplus", "unknown key"),
        ("pulsebus.toml:11", "http.lisen", "did you mean `listen`?"),
        ("pulsebus.toml:12", "http.enabled", "expected true or false, found text"),
        ("pulsebus.toml:14", "limits.max_event_bytes", "MiB"),
        ("pulsebus.toml:16", "sources.lessons.transport", "did you mean `nats`?"),
        ("pulsebus.toml:17", "sources.lessons.prefetch", "65,535"),
        ("pulsebus.toml:19", "handlers.h.kind", "must be `search`, `forward` or `log`"),
        ("pulsebus.toml:21", "handlers.h.retry.attempts", "from 1 to 10000"),
        ("PULSEBUS_HTTP__TIMEOUT", "http.timeout", "unit"),
        ("--set", "log.format", "must be `auto`, `text`, `json` or `journald`"),
    ] {
        let start = format!("{origin}: {key}: ");
        let line = errors.lines().find(|line| line.starts_with(&start));
        let line = line.unwrap_or_else(|| panic!("nothing starts with {start:?} in\n{errors}"));
        assert!(line.contains(hint), "{line} does not say {hint:?}");
    }
    assert_eq!(errors.lines().count(), 10, "{errors}");
}

/// Each of these is refused once, for its key, with a hint at what to do.
#[test]
fn each_rule_names_the_key_and_what_to_do() {
    let table = [
        ("data_dir = \"\"", "data_dir", "name a folder"),
        ("shutdown_timeout = \"0s\"", "shutdown_timeout", "longer"),
        ("store.url = \"mysql://x\"", "store.url", "postgres://"),
        ("store.url = \"postgres://host\"", "store.url", "database"),
        ("store.url = \"sqlite::memory:\"", "store.url", "memory:"),
        ("store.max_connections = 5", "store.max_connections", "Postgres"),
        (
            "store.url = \"postgres://h/d\"\nstore.max_connections = 1",
            "store.max_connections",
            "from 4",
        ),
        ("store.retain.age = \"10ms\"", "store.retain.age", "1s"),
        ("store.retain.size = 0", "store.retain.size", "more than 0"),
        ("store.retain.age = 30", "store.retain.age", "unit"),
        ("http.listen = \"0.0.0.0:8077\"", "http.listen", "http.token_file"),
        ("http.listen = \"[::]:8077\"", "http.listen", "http.token_file"),
        ("http.listen = \"8077\"", "http.listen", "127.0.0.1:8077"),
        ("http.token = \"two words\"", "http.token", "header"),
        ("http.token = \"\"", "http.token", "empty"),
        ("http.token_file = \"/nonexistent/t\"", "http.token_file", "/nonexistent/t"),
        ("http.max_body = 1", "http.max_body", "1KiB"),
        (
            "limits.ingest_bytes = \"1MiB\"\nlimits.max_event_bytes = \"2MiB\"",
            "limits.ingest_bytes",
            "raise",
        ),
        ("log.filter = \"pulsebus=loud\"", "log.filter", "level"),
        ("transports.http.kind = \"nats\"", "transports.http", "built-in"),
        ("transports.\"a b\".kind = \"memory\"", "transports.\"a b\"", "name"),
        ("transports.t.url = \"nats://h\"", "transports.t.kind", "`nats`"),
        ("transports.t.kind = \"nats\"", "transports.t.url", "nats://"),
        ("transports.t = { kind = \"nats\", url = \"http://h\" }", "transports.t.url", "nats://"),
        (
            "transports.t = { kind = \"nats\", url = \"h\", heartbeat = \"1s\" }",
            "transports.t.heartbeat",
            "for NATS",
        ),
        (
            "transports.t = { kind = \"nats\", url = \"h\", user = \"u\" }",
            "transports.t.password",
            "`user`",
        ),
        (
            "transports.t = { kind = \"nats\", url = \"h\", user = \"u\", password = \"p\", token = \"t\" }",
            "transports.t",
            "keep one",
        ),
        (
            "transports.t = { kind = \"nats\", url = \"nats://a:b@h,nats://c:d@i\" }",
            "transports.t.url",
            "logins",
        ),
        (
            "transports.t = { kind = \"nats\", url = \"h\", tls.cert_file = \"/dev/null\" }",
            "transports.t.tls.key_file",
            "both",
        ),
        (
            "transports.t = { kind = \"nats\", url = \"h\", tls.ca_file = \"/nonexistent\" }",
            "transports.t.tls.ca_file",
            "/nonexistent",
        ),
        ("transports.t = { kind = \"amqp\", url = \"nats://h\" }", "transports.t.url", "amqp://"),
        (
            "transports.t = { kind = \"amqp\", url = \"amqp://h\", tls = {} }",
            "transports.t.tls",
            "amqps://",
        ),
        (
            "transports.t = { kind = \"amqp\", url = \"amqps://h\", tls.first = true }",
            "transports.t.tls.first",
            "RabbitMQ",
        ),
        (
            "transports.t = { kind = \"amqp\", url = \"amqps://h?auth_mechanism=external\" }",
            "transports.t.url",
            "tls.cert_file",
        ),
        ("transports.t = { kind = \"http\", url = \"ftp://h\" }", "transports.t.url", "https://"),
        (
            "transports.t = { kind = \"http\", url = \"http://10.0.0.1/\", refuse_private = true }",
            "transports.t.url",
            "private (RFC 1918)",
        ),
        (
            "transports.t = { kind = \"http\", url = \"https://h\", secret = \"hunter2\" }",
            "transports.t.secret",
            "begin with whsec_",
        ),
        (
            "transports.t = { kind = \"http\", url = \"https://h\", secret = \"whsec_AAAA\" }",
            "transports.t.secret",
            "3 bytes long",
        ),
        (
            "transports.t = { kind = \"http\", url = \"https://h\", secret = \"whsec_*\" }",
            "transports.t.secret",
            "not base64",
        ),
        (
            "transports.t = { kind = \"http\", url = \"https://h\", secret = \"whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw whsec_AAAA\" }",
            "transports.t.secret",
            "secret 2",
        ),
        (
            "transports.t = { kind = \"http\", url = \"https://u:p@h\", token = \"x\" }",
            "transports.t.token",
            "login in the URL",
        ),
        (
            "transports.t = { kind = \"http\", url = \"https://h\", token = \"a\\nb\" }",
            "transports.t.token",
            "line break",
        ),
        (
            "transports.t = { kind = \"http\", url = \"http://h\", tls = {} }",
            "transports.t.tls",
            "https://",
        ),
        (
            "transports.t = { kind = \"http\", url = \"https://h\", tls.first = true }",
            "transports.t.tls.first",
            "webhook",
        ),
        (
            "transports.t = { kind = \"http\", url = \"https://h\", batch = 0 }",
            "transports.t.batch",
            "from 1 to 1000",
        ),
        (
            "transports.t = { kind = \"nats\", url = \"h\", refuse_private = true }",
            "transports.t.refuse_private",
            "for NATS",
        ),
        (
            "transports.t = { kind = \"http\", url = \"https://h\" }\nhandlers.h = { kind = \"forward\", transport = \"t\", path = \"/a?b\" }",
            "handlers.h.path",
            "a query stands in the transport's url",
        ),
        (
            "transports.t = { kind = \"http\", url = \"https://h\" }\nhandlers.h = { kind = \"forward\", transport = \"t\", path = \"/../a\" }",
            "handlers.h.path",
            "another folder",
        ),
        (
            "transports.t = { kind = \"http\", url = \"https://h\" }\nhandlers.h = { kind = \"forward\", transport = \"t\", path = \"/{kind}\" }",
            "handlers.h.path",
            "{type}",
        ),
        (
            "transports.t = { kind = \"http\", url = \"https://h\" }\nhandlers.h = { kind = \"forward\", transport = \"t\", subject = \"x\" }",
            "handlers.h.subject",
            "webhook",
        ),
        (
            "transports.t = { kind = \"http\", url = \"https://h\" }\nhandlers.h = { kind = \"forward\", transport = \"t\", timeout = \"10s\" }",
            "handlers.h.timeout",
            "not longer than the 10s",
        ),
        (
            "transports.t = { kind = \"http\", url = \"https://h\", batch = 2 }\nhandlers.h = { kind = \"forward\", transport = \"t\" }",
            "handlers.h.format",
            "ids and types",
        ),
        (
            "transports.t = { kind = \"http\", url = \"https://h\", batch = 2 }\nhandlers.h = { kind = \"log\", dead_letter = { transport = \"t\" } }",
            "handlers.h.dead_letter.transport",
            "batch is 1",
        ),
        (
            "transports.n = { kind = \"nats\", url = \"h\" }\nhandlers.h = { kind = \"forward\", transport = \"n\", subject = \"s\", path = \"/x\" }",
            "handlers.h.path",
            "NATS",
        ),
        ("transports.t = { kind = \"memory\", url = \"x\" }", "transports.t.url", "take it out"),
        ("sources.s.stream = \"S\"", "sources.s.transport", "`http`"),
        ("sources.s.transport = \"http\"", "sources.s.transport", "[sources.http]"),
        ("sources.s = { transport = \"nats\" }", "sources.s.stream", "stream"),
        (
            "sources.s = { transport = \"nats\", stream = \"a.b\" }",
            "sources.s.stream",
            "JetStream name",
        ),
        (
            "sources.s = { transport = \"nats\", stream = \"S\", subject = \"a.>.b\" }",
            "sources.s.subject",
            "at the end",
        ),
        (
            "sources.s = { transport = \"nats\", stream = \"S\", queue = \"q\" }",
            "sources.s.queue",
            "for NATS",
        ),
        (
            "sources.s = { transport = \"nats\", stream = \"S\", ack_wait = \"1ms\" }",
            "sources.s.ack_wait",
            "1s",
        ),
        (
            "sources.s = { transport = \"nats\", stream = \"S\", batch = 9, max_ack_pending = 8 }",
            "sources.s.batch",
            "max_ack_pending",
        ),
        (
            "sources.s = { transport = \"nats\", stream = \"S\", create = {} }",
            "sources.s.create.subjects",
            "list",
        ),
        (
            "sources.s = { transport = \"nats\", stream = \"S\", create = { subjects = [\"a\", \"b.\"] } }",
            "sources.s.create.subjects[1]",
            "subject",
        ),
        (
            "sources.s = { transport = \"nats\", stream = \"S\", create = { subjects = [\"a\"], bind = [] } }",
            "sources.s.create.bind",
            "for NATS",
        ),
        (
            "sources.s = { transport = \"nats\", stream = \"S\", key = [\"lesson_id\"] }",
            "sources.s.key[0]",
            "JSON pointer",
        ),
        ("sources.s = { transport = \"rabbit\" }", "sources.s.queue", "name"),
        (
            "sources.s = { transport = \"rabbit\", queue = \"q\", prefetch = 0 }",
            "sources.s.prefetch",
            "from 1",
        ),
        (
            "sources.s = { transport = \"rabbit\", queue = \"q\", stream = \"S\" }",
            "sources.s.stream",
            "for RabbitMQ",
        ),
        (
            "sources.s = { transport = \"rabbit\", queue = \"q\", create.bind = [{ routing_key = \"x\" }] }",
            "sources.s.create.bind[0].exchange",
            "exchange",
        ),
        (
            "sources.a = { transport = \"nats\", stream = \"S\" }\nsources.b = { transport = \"nats\", stream = \"S\" }",
            "sources.b.consumer",
            "sources.a",
        ),
        (
            "sources.a = { transport = \"rabbit\", queue = \"q\" }\nsources.b = { transport = \"rabbit\", queue = \"q\" }",
            "sources.b.queue",
            "sources.a",
        ),
        (
            "sources.s = { enabled = false, transport = \"rabit\" }",
            "sources.s.transport",
            "`rabbit`",
        ),
        ("handlers.h.workers = 2", "handlers.h.kind", "`search`"),
        ("handlers.h = { kind = \"log\", workers = 0 }", "handlers.h.workers", "from 1"),
        ("handlers.h = { kind = \"log\", events = [] }", "handlers.h.events", "take it out"),
        ("handlers.h = { kind = \"log\", events = [\"a[\"] }", "handlers.h.events[0]", "a["),
        (
            "handlers.h = { kind = \"log\", documents = {} }",
            "handlers.h.documents",
            "for a log handler",
        ),
        (
            "handlers.h = { kind = \"log\", retry = { initial = \"5s\", max = \"1s\" } }",
            "handlers.h.retry.max",
            "at least as long",
        ),
        (
            "handlers.h = { kind = \"log\", retry = { multiplier = 0.5 } }",
            "handlers.h.retry.multiplier",
            "from 1",
        ),
        (
            "handlers.h = { kind = \"log\", retry = { jitter = nan } }",
            "handlers.h.retry.jitter",
            "from 0",
        ),
        (
            "handlers.h = { kind = \"log\", window.events = 0 }",
            "handlers.h.window.events",
            "from 1",
        ),
        ("handlers.h = { kind = \"log\", parked.total = 0 }", "handlers.h.parked.total", "from 1"),
        (
            "handlers.h = { kind = \"log\", dead_letter = { subject = \"x\" } }",
            "handlers.h.dead_letter.transport",
            "publish dead letters to",
        ),
        (
            "transports.n = { kind = \"nats\", url = \"nats://127.0.0.1\" }\n\
             handlers.h = { kind = \"log\", dead_letter = { transport = \"n\" } }",
            "handlers.h.dead_letter.subject",
            "name the subject",
        ),
        (
            "transports.n = { kind = \"nats\", url = \"nats://127.0.0.1\" }\n\
             handlers.h = { kind = \"log\", dead_letter = { transport = \"n\", subject = \"{x}\" } }",
            "handlers.h.dead_letter.subject",
            "{handler}",
        ),
        (
            "handlers.h = { kind = \"search\" }",
            "handlers.h.documents",
            "handlers.h.documents.LessonPublished",
        ),
        (
            "handlers.h = { kind = \"search\", documents.L = { text = { t = \"/t\" } } }",
            "handlers.h.documents.L.id",
            "/lesson_id",
        ),
        (
            "handlers.h = { kind = \"search\", documents.L = { id = \"/i\" } }",
            "handlers.h.documents.L",
            "`text`",
        ),
        (
            "handlers.h = { kind = \"search\", documents.L = { id = \"/i\", text = { t = \"t\" } } }",
            "handlers.h.documents.L.text.t",
            "starts with `/`",
        ),
        (
            "handlers.h = { kind = \"search\", documents.L = { id = \"/i\", text = { t = \"/t\" }, date = { t = \"/t\" } } }",
            "handlers.h.documents.L.date.t",
            "rename",
        ),
        (
            "handlers.h = { kind = \"search\", events = [\"Q*\"], documents.L = { id = \"/i\", text = { t = \"/t\" } } }",
            "handlers.h.events",
            "`L`",
        ),
        (
            "handlers.h = { kind = \"search\", writer_memory = \"1MiB\", documents.L = { id = \"/i\", text = { t = \"/t\" } } }",
            "handlers.h.writer_memory",
            "15MiB",
        ),
        ("handlers.h = { kind = \"forward\" }", "handlers.h.transport", "[transports]"),
        (
            "handlers.h = { kind = \"forward\", transport = \"http\" }",
            "handlers.h.transport",
            "come in",
        ),
        (
            "handlers.h = { kind = \"forward\", transport = \"rabit\" }",
            "handlers.h.transport",
            "did you mean `rabbit`?",
        ),
        (
            "handlers.h = { kind = \"forward\", transport = \"nats\" }",
            "handlers.h.subject",
            "mirror.{type}",
        ),
        (
            "handlers.h = { kind = \"forward\", transport = \"nats\", subject = \"a.*\" }",
            "handlers.h.subject",
            "wildcard",
        ),
        (
            "handlers.h = { kind = \"forward\", transport = \"nats\", subject = \"a.{typ}\" }",
            "handlers.h.subject",
            "there is {type}",
        ),
        (
            "handlers.h = { kind = \"forward\", transport = \"nats\", subject = \"a.{type\" }",
            "handlers.h.subject",
            "single brace",
        ),
        (
            "handlers.h = { kind = \"forward\", transport = \"nats\", subject = \"a\", exchange = \"e\" }",
            "handlers.h.exchange",
            "to NATS",
        ),
        (
            "handlers.h = { kind = \"forward\", transport = \"rabbit\" }",
            "handlers.h.exchange",
            "default exchange",
        ),
        (
            "handlers.h = { kind = \"forward\", transport = \"nats\", subject = \"a\", headers = { Nats-Rollup = \"all\" } }",
            "handlers.h.headers.Nats-Rollup",
            "order to the NATS server",
        ),
        (
            "handlers.h = { kind = \"forward\", transport = \"rabbit\", exchange = \"\", headers = { x = \"{tipe}\" } }",
            "handlers.h.headers.x",
            "there is {type}",
        ),
        (
            "transports.t = { kind = \"http\", url = \"https://h\" }\nsources.s = { transport = \"t\" }",
            "sources.s.transport",
            "sent to",
        ),
    ];
    for (text, key, hint) in table {
        // Bare keys go to the top of a file.
        let given = Given::file(&format!("{text}\n{}", super::BROKERS));
        let errors = given.errors();
        let [error] = errors.as_slice() else { panic!("{text}\n{errors:#?}") };
        let (origin, rest) = error.split_once(": ").unwrap();
        assert!(origin.starts_with("pulsebus.toml:"), "{error}");
        let rest = rest.strip_prefix(&format!("{key}: "));
        let rest = rest.unwrap_or_else(|| panic!("{error} is not about {key}"));
        assert!(rest.contains(hint), "{error} does not say {hint:?}");
    }
}

#[test]
fn what_is_not_toml_is_said_with_line_and_column_and_nothing_of_the_text() {
    let errors = Given::file("[http]\ntoken = hunter2\n").errors();
    assert!(errors[0].starts_with("pulsebus.toml:2:"), "{errors:?}");
    assert!(!errors.join("\n").contains("hunter2"), "{errors:?}");
}

#[test]
fn sources_and_handlers_can_be_switched_off_and_names_need_no_quotes() {
    let settings = with_brokers(
        r#"
        [sources.http]
        enabled = false
        [sources.lessons]
        transport = "nats"
        stream = "EDUPULSE"
        subject = "edupulse.lessons.>"
        ack_wait = "45s"
        create = { subjects = ["edupulse.>"], retention = "workqueue" }
        [sources.quizzes]
        transport = "rabbit"
        queue = "q"
        create = { type = "quorum", bind = [{ exchange = "e", routing_key = "quiz.#" }], arguments = { x-delivery-limit = 50 } }
        [handlers]
        "#,
    )
    .loaded()
    .settings;
    assert_eq!(settings.sources.keys().map(|n| &**n).collect::<Vec<_>>(), ["lessons", "quizzes"]);
    assert!(settings.handlers.is_empty(), "an empty section is no handlers");
    let lessons: crate::transport::nats::NatsSource =
        serde_json::from_value(settings.sources["lessons"].params.clone()).unwrap();
    assert_eq!(lessons.consumer, "pulsebus");
    assert_eq!(lessons.ack_wait, Some(Duration::from_secs(45)));
    assert_eq!(lessons.create.unwrap().retention.as_deref(), Some("workqueue"));
    let quizzes: crate::transport::amqp::AmqpSource =
        serde_json::from_value(settings.sources["quizzes"].params.clone()).unwrap();
    let create = quizzes.create.unwrap();
    assert_eq!(create.kind.as_deref(), Some("quorum"));
    assert_eq!(create.bind[0].routing_key, "quiz.#");
    assert_eq!(create.arguments["x-delivery-limit"], 50);
}

#[test]
fn without_order_a_dead_letter_holds_nobody_up() {
    let settings =
        Given::file("[handlers.l]\nkind = \"log\"\nordering = \"none\"").loaded().settings;
    assert_eq!(settings.handlers["l"].on_dead, OnDead::Continue);
    assert!(matches!(settings.handlers["l"].kind, HandlerKind::Log { .. }));
}

#[test]
fn the_login_of_a_nats_url_is_kept_and_not_shown() {
    for (url, shown) in [
        ("nats://u%40x:p%2fw@a:4222, nats://b:4222", "nats://u%40x:…@a:4222,nats://b:4222"),
        ("tls://tok@a", "tls://…@a"),
        ("a:4222,b", "nats://a:4222,nats://b"),
        ("u:p@a:4222", "nats://u:…@a:4222"),
    ] {
        let given = Given::file(&format!("transports.n = {{ kind = \"nats\", url = \"{url}\" }}"));
        let loaded = given.loaded();
        let TransportSettings::Nats(nats) = &loaded.settings.transports["n"] else { panic!() };
        assert_eq!(nats.url.read().unwrap(), url);
        assert!(loaded.show().contains(&format!("url = \"{shown}\"")), "{}", loaded.show());
    }
    // A password beside it takes the place of the one in it, or makes a user of a token.
    for url in ["nats://u:p@a", "nats://u@a"] {
        let text =
            format!("transports.n = {{ kind = \"nats\", url = \"{url}\", password = \"q\" }}");
        Given::file(&text).loaded();
    }
    let text = "transports.n = { kind = \"nats\", url = \"nats://t@a\", nkey = \"SUA\" }";
    assert!(Given::file(text).errors()[0].contains("several ways"));
}

#[test]
fn a_database_elsewhere_without_a_word_about_tls_is_doubted() {
    for (url, doubted) in [
        ("postgres://u:p@db.example/d", true),
        ("postgres://u:p@10.0.0.5/d?application_name=x", true),
        ("postgres://u:p@[2001:db8::1]/d", true),
        ("postgres:///d?host=10.0.0.5", true),
        ("postgres://u:p@db.example/d?sslmode=prefer", false),
        ("postgres://u:p@db.example/d?sslmode=disable", false),
        ("postgres://u:p@localhost/d", false),
        ("postgres://u:p@127.0.0.2/d", false),
        ("postgres://u:p@[::1]/d", false),
        ("postgres://u:p@%2Fvar%2Frun%2Fpostgresql/d", false),
        ("postgres:///d?host=/var/run/postgresql", false),
        ("sqlite:x.db", false),
    ] {
        let warnings = Given::file(&format!("store.url = \"{url}\"")).loaded().warnings;
        let said = warnings.iter().any(|w| w.key == "store.url" && w.problem.contains("sslmode"));
        assert_eq!(said, doubted, "{url}: {warnings:?}");
        assert_eq!(warnings.len(), usize::from(doubted), "{url}: {warnings:?}");
    }
    let verified = "store = { url = \"postgres://u:p@db.example/d\", tls = {} }";
    assert!(Given::file(verified).loaded().warnings.is_empty());
}

#[test]
fn events_are_kept_for_ever_unless_it_says_how_long() {
    let retain = |text: &str| Given::file(text).loaded().settings.retain;
    assert_eq!(retain(""), None);
    assert_eq!(retain("store.retain = { identities = false }"), None);
    let both = retain("store.retain = { age = \"30d\", size = \"10GiB\" }").unwrap();
    assert_eq!(both.age, Some(Duration::from_secs(30 * 24 * 3600)));
    assert_eq!((both.bytes, both.identities), (Some(10 << 30), true));
    let size = retain("store.retain = { size = 5000, identities = false }").unwrap();
    assert_eq!((size.age, size.bytes, size.identities), (None, Some(5_000), false));
}

const TRACES: &str = r#"
[telemetry.otlp]
endpoint = "https://otel.example:4318/v1/traces"
headers = "api-key=S3cret"
sample_ratio = 0.25
resource = { "deployment.environment.name" = "production" }
"#;

#[cfg(not(feature = "otlp"))]
#[test]
fn a_binary_that_cannot_export_traces_refuses_to_be_told_to() {
    let errors = Given::file(TRACES).errors();
    assert_eq!(errors.len(), 1, "{errors:?}");
    assert!(
        errors[0].contains("telemetry.otlp") && errors[0].contains("`--features otlp`"),
        "{errors:?}"
    );
}

#[cfg(feature = "otlp")]
#[test]
fn traces_go_where_they_are_told_to() {
    let loaded = Given::file(TRACES).loaded();
    let otlp = loaded.settings.otlp.as_ref().unwrap();
    assert_eq!(otlp.endpoint.as_str(), "https://otel.example:4318/v1/traces");
    assert_eq!((otlp.sample_ratio, otlp.queue, &*otlp.service_name), (0.25, 8_192, "pulsebus"));
    assert_eq!(otlp.resource["deployment.environment.name"], "production");
    let shown = loaded.show();
    assert!(shown.contains("headers = \"…\"") && !shown.contains("S3cret"), "{shown}");
    let again = Given::file(&shown.replace('…', "a=b")).loaded();
    assert_eq!(again.settings.otlp.unwrap().resource, otlp.resource, "{shown}");
    for (wrong, problem) in [
        ("", "missing"),
        ("endpoint = \"otel:4318\"", "not an http://"),
        ("endpoint = \"http://u:p@otel/v1/traces\"", "holds a login"),
        ("endpoint = \"http://otel/v1/traces\"\nheaders = \"S3cret\"", "name=value"),
        ("endpoint = \"http://otel/v1/traces\"\nsample_ratio = 1.5", "from 0 to 1"),
        ("endpoint = \"http://otel/v1/traces\"\nqueue = 0", "from 1"),
        ("endpoint = \"http://otel/v1/traces\"\nca_file = \"/nowhere\"", "/nowhere"),
        ("endpoint = \"http://otel/v1/traces\"\nservice_name = \" \"", "is empty"),
    ] {
        let errors = Given::file(&format!("[telemetry.otlp]\n{wrong}")).errors();
        assert!(errors.len() == 1 && errors[0].contains(problem), "{wrong}: {errors:?}");
    }
    let doubtful = Given::file("telemetry.otlp = { endpoint = \"http://otel:4318\" }").loaded();
    assert!(doubtful.warnings[0].to_string().contains("no path"), "{:?}", doubtful.warnings);
}
