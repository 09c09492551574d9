//! No secret is ever printed.

use proptest::prelude::*;

use super::Given;
use crate::{
    config::{HttpSettings, Settings, StoreSettings, TransportSettings},
    secret::Secret,
};

const EVERYWHERE: &str = r#"
[store]
url = "postgres://bus:SECRET@db/events?sslpassword=SECRET"
[http]
token = "SECRET"
[transports.a]
kind = "nats"
url = "nats://bus:SECRET@a:4222,nats://b:4222"
[transports.b]
kind = "nats"
url = "nats://b"
token = "SECRET"
[transports.c]
kind = "nats"
url = "nats://c"
nkey = "SECRET"
[transports.d]
kind = "amqp"
url = "amqps://bus:SECRET@d/%2f?x=SECRET"
password = "SECRET"
[transports.e]
kind = "http"
url = "https://hooks.example/services/SECRET?k=SECRET"
secret = "whsec_TUZLUTlyOEdLWXFyVHdqVVBEOElMUFpJbzJMYUxhU3c="
token = "SECRET"
[transports.f]
kind = "http"
url = "https://bus:SECRET@hooks.example/"
"#;

/// Nine letters, digits and what is common in passwords and means nothing to a URL.
const SECRET: &str = "S3cr[a-z]{4}-[a-z]{4}";

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    #[test]
    fn a_secret_is_in_no_debug_and_no_show(secret in SECRET) {
        let loaded = Given::file(&EVERYWHERE.replace("SECRET", &secret)).loaded();
        let debug = format!("{loaded:?}");
        prop_assert!(!debug.contains(&secret), "{debug}");
        let shown = loaded.show();
        prop_assert!(!shown.contains(&secret), "{shown}");
        prop_assert!(shown.contains("bus:…@db"), "{shown}");
        prop_assert!(!debug.contains("TUZLUTly") && !shown.contains("TUZLUTly"), "{shown}");
    }

    /// Wherever a secret is misplaced, and whatever else is wrong there.
    #[test]
    fn a_secret_is_in_no_error(
        secret in SECRET,
        place in proptest::sample::select(vec![
            "http.tokn = \"SECRET\"",
            "http = \"SECRET\"",
            "http.token = [\"SECRET\"]",
            "http.token = \"SECRET SECRET\"",
            "http.token = SECRET",
            "http.token = \"SECRET",
            "http.enabled = \"SECRET\"",
            "http.max_body = \"SECRET\"",
            "http.timeout = \"SECRET\"",
            "http.max_connections = \"SECRET\"",
            "http.listen = \"SECRET\"",
            "log.format = \"SECRET\"",
            "store.url = \"SECRET\"",
            "store.url = \"postgres://u:SECRET@h\"",
            "transports.a = { kind = \"SECRET\" }",
            "transports.a = { kind = \"nats\", url = \"SECRET://h\" }",
            "transports.a = { kind = \"nats\", url = \"nats://u:SECRET@h\", token = \"SECRET\", nkey = \"SECRET\" }",
            "transports.a = { kind = \"amqp\", url = \"http://u:SECRET@h\" }",
            "transports.a = { kind = \"http\", url = \"SECRET\", secret = \"SECRET\" }",
            "transports.a = { kind = \"http\", url = \"http://u:SECRET@h/SECRET\", secret = \"whsec_SECRET\", token = \"SECRET\\nx\" }",
            "transports.a = { kind = \"memory\", password = \"SECRET\" }",
            "telemetry.otlp = { endpoint = \"http://u:SECRET@h/\", headers = \"SECRET\" }",
            "telemetry.otlp = { endpoint = \"http://h/?key=SECRET\" }",
            "transports.a = { kind = \"amqp\", url = \"amqp://h\", password = { x = \"SECRET\" } }",
        ]),
    ) {
        let given = Given::file(&place.replace("SECRET", &secret));
        let error = given.load().expect_err(place);
        let text = format!("{error} {error:?}");
        prop_assert!(!text.contains(&secret), "{text}");
    }
}

#[test]
fn a_secret_is_in_no_debug_of_what_is_to_be_loaded() {
    let given = Given::nothing().variable("PULSEBUS_HTTP__TOKEN", "S3cret").flag(
        "--set",
        "http.token",
        "S3cret",
    );
    assert!(!format!("{:?}", given.inputs).contains("S3cret"));
}

fn token(settings: &Settings) -> String {
    let HttpSettings { token: Some(token), .. } = &settings.http else { panic!("no token") };
    token.read().unwrap()
}

#[test]
fn a_password_of_digits_stays_as_it_was_written() {
    for text in ["12345", "007", "1e3", "true", "0x10", "1_000"] {
        let given = Given::nothing().variable("PULSEBUS_HTTP__TOKEN", text);
        assert_eq!(token(&given.loaded().settings), text);
    }
    assert_eq!(token(&Given::file("http.token = 12345").loaded().settings), "12345");
}

#[test]
fn a_secret_file_is_read_anew_and_named_when_it_cannot_be() {
    let given = Given::nothing();
    let file = given.beside("token", "first\n");
    let given = given.variable("PULSEBUS_HTTP__TOKEN_FILE", &file.display().to_string());
    let settings = given.loaded().settings;
    assert_eq!(token(&settings), "first");
    std::fs::write(&file, "second\n").unwrap();
    assert_eq!(token(&settings), "second");
    std::fs::write(&file, "\n").unwrap();
    let errors = given.errors();
    assert_eq!(errors, ["PULSEBUS_HTTP__TOKEN_FILE: http.token_file: the file is empty"]);
    std::fs::remove_file(&file).unwrap();
    assert!(given.errors()[0].contains("token: "), "{:?}", given.errors());
}

#[test]
fn of_a_secret_and_its_file_the_later_layer_wins_and_twice_in_one_is_an_error() {
    let given = Given::file("http.token_file = \"/nonexistent\"")
        .variable("PULSEBUS_HTTP__TOKEN", "from-the-environment");
    assert_eq!(token(&given.loaded().settings), "from-the-environment");
    let given = Given::file("http.token = \"from-the-file\"");
    let file = given.beside("token", "from-its-own-file");
    let given = given.variable("PULSEBUS_HTTP__TOKEN_FILE", &file.display().to_string());
    assert_eq!(token(&given.loaded().settings), "from-its-own-file");
    let text = format!("http = {{ token = \"x\", token_file = \"{}\" }}", file.display());
    let errors = Given::file(&text).errors();
    assert_eq!(
        errors,
        ["pulsebus.toml:1: http.token: given beside `token_file`; keep one of them"]
    );
}

#[test]
fn credentials_of_systemd_are_taken_where_nothing_else_is_given() {
    let given = Given::file(
        "transports.r = { kind = \"amqp\", url = \"amqp://h\" }\n\
         transports.n = { kind = \"nats\", url = \"h\" }",
    );
    for (name, text) in [
        ("http.token", "tok"),
        ("store.url", "postgres://u:p@h/d"),
        ("transports.r.password", "pw"),
        ("transports.n.credentials", "creds"),
    ] {
        given.beside(name, text);
    }
    let dir = given.dir.as_ref().unwrap().path().display().to_string();
    let given = given.variable("CREDENTIALS_DIRECTORY", &dir);
    let loaded = given.loaded();
    let settings = &loaded.settings;
    assert_eq!(token(settings), "tok");
    let StoreSettings::Postgres { url, .. } = &settings.store else { panic!() };
    assert!(matches!(url, Secret::File(path) if path.ends_with("store.url")));
    let TransportSettings::Amqp(amqp) = &settings.transports["r"] else { panic!() };
    assert_eq!(amqp.password.as_ref().unwrap().read().unwrap(), "pw");
    let TransportSettings::Nats(nats) = &settings.transports["n"] else { panic!() };
    assert!(nats.credentials_file.as_ref().unwrap().ends_with("transports.n.credentials"));
    assert!(loaded.show().contains("# $CREDENTIALS_DIRECTORY"));

    let given = given.variable("PULSEBUS_HTTP__TOKEN", "given");
    assert_eq!(token(&given.loaded().settings), "given");
}

/// In place, in a file of its own, as a credential: each secret, wherever it stands.
#[test]
fn every_secret_can_stand_in_each_of_its_places() {
    let secrets = [
        ("http", "token", ""),
        ("store", "url", ""),
        ("transports.t", "url", "kind = \"nats\""),
        ("transports.t", "token", "kind = \"nats\"\nurl = \"h\""),
        ("transports.t", "nkey", "kind = \"nats\"\nurl = \"h\""),
        ("transports.t", "password", "kind = \"nats\"\nurl = \"h\"\nuser = \"u\""),
        ("transports.t", "url", "kind = \"amqp\""),
        ("transports.t", "password", "kind = \"amqp\"\nurl = \"amqp://u@h\""),
        ("transports.t", "url", "kind = \"http\""),
        ("transports.t", "secret", "kind = \"http\"\nurl = \"https://h/p\""),
        ("transports.t", "token", "kind = \"http\"\nurl = \"https://h/p\""),
    ];
    for (table, key, rest) in secrets {
        let secret = match (table, key) {
            ("store", _) => "postgres://u:S3cr3t@127.0.0.1/d",
            (_, "url") if rest.contains("nats") => "nats://u:S3cr3t@h",
            (_, "url") if rest.contains("amqp") => "amqp://u:S3cr3t@h",
            (_, "url") => "https://h/S3cr3t",
            (_, "secret") => "whsec_UzNjcjN0UzNjcjN0UzNjcjN0UzNjcjN0",
            _ => "S3cr3t",
        };
        let inline = Given::file(&format!("[{table}]\n{rest}\n{key} = \"{secret}\""));
        let beside = Given::nothing();
        let path = beside.beside("a-secret", &format!("{secret}\n"));
        let file = Given::file(&format!("[{table}]\n{rest}\n{key}_file = \"{}\"", path.display()));
        let credential = Given::file(&format!("[{table}]\n{rest}"));
        credential.beside(&format!("{table}.{key}"), secret);
        let dir = credential.dir.as_ref().unwrap().path().display().to_string();
        let credential = credential.variable("CREDENTIALS_DIRECTORY", &dir);
        for (place, given) in [("inline", inline), ("file", file), ("credential", credential)] {
            let loaded = given.loaded();
            let held = match (table, key, loaded.settings.transports.get("t")) {
                ("http", ..) => loaded.settings.http.token.clone(),
                ("store", ..) => match &loaded.settings.store {
                    StoreSettings::Postgres { url, .. } => Some(url.clone()),
                    other => panic!("{other:?}"),
                },
                (_, "url", Some(TransportSettings::Nats(nats))) => Some(nats.url.clone()),
                (_, "token", Some(TransportSettings::Nats(nats))) => nats.token.clone(),
                (_, "nkey", Some(TransportSettings::Nats(nats))) => nats.nkey.clone(),
                (_, "password", Some(TransportSettings::Nats(nats))) => nats.password.clone(),
                (_, "url", Some(TransportSettings::Amqp(amqp))) => Some(amqp.url.clone()),
                (_, "password", Some(TransportSettings::Amqp(amqp))) => amqp.password.clone(),
                (_, "url", Some(TransportSettings::Http(hook))) => Some(hook.url.clone()),
                (_, "secret", Some(TransportSettings::Http(hook))) => hook.secret.clone(),
                (_, "token", Some(TransportSettings::Http(hook))) => hook.token.clone(),
                other => panic!("{other:?}"),
            };
            let held = held.unwrap_or_else(|| panic!("{table}.{key} {place}: not taken"));
            assert_eq!(held.read().unwrap(), secret, "{table}.{key} {place}");
            assert_eq!(matches!(held, Secret::File(_)), place != "inline", "{table}.{key} {place}");
            assert!(!loaded.show().contains("S3cr3t"), "{}", loaded.show());
        }
    }
}
