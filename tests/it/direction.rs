//! No module imports against the direction of the architecture (ARCHITECTURE.md).
//!
//! The sources are read as text: comments and literals are taken out, then every path that
//! begins with `crate`, `pulsebus`, a driver or enough `super`s is looked up in the tables
//! below. Each line of them says why it may be.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

/// Which module may import which, and why. A line that nothing uses is refused as well.
const EDGES: &[(&str, &str, &str)] = &[
    ("store", "event", "what is stored"),
    ("store", "transport", "`Receipt` and `Mark`: what a commit says to whoever settles"),
    ("store", "retry", "how soon a store that is away is tried again"),
    ("store", "secret", "the database's URL holds a password"),
    ("store", "tls", "and it may want certificates"),
    ("store", "telemetry", "commits are counted"),
    ("store", "finding", "each judges its own database, for `doctor`"),
    ("transport", "event", "`Message`: what a delivery carries"),
    ("transport", "secret", "brokers want passwords"),
    ("transport", "tls", "and certificates"),
    ("transport", "finding", "each judges its own broker, for `doctor`"),
    ("handler", "event", "what is handled"),
    ("handler", "finding", "the search index judges itself, for `doctor`"),
    ("handler", "telemetry", "`forward` passes on which trace an event is in"),
    ("handler", "transport", "`forward` publishes: the publisher trait, no implementation"),
    ("ingest", "event", "the decoder"),
    ("ingest", "transport", "the consumer trait"),
    ("ingest", "store", "the log it appends to"),
    ("ingest", "retry", "how soon a consumer is opened again"),
    ("ingest", "telemetry", "messages are counted"),
    ("dispatch", "event", "what is dispatched"),
    ("dispatch", "handler", "the handler trait"),
    ("dispatch", "store", "the log it reads, cursors, dead letters"),
    ("dispatch", "retry", "when a failed event is tried again"),
    ("dispatch", "telemetry", "outcomes are counted"),
    ("telemetry", "event", "which trace an event is in"),
    ("telemetry", "secret", "a collector may want a key"),
    ("telemetry", "tls", "and a certificate"),
    ("telemetry", "retry", "how soon a collector that is away is tried again"),
    ("config", "telemetry", "the settings of the daemon's own log, and of traces"),
    ("config", "event", "formats, key expressions and decoder options are configured"),
    ("config", "transport", "the options of transports are configured"),
    ("config", "handler", "the options of handlers are configured"),
    ("config", "dispatch", "how handlers are run is configured"),
    ("config", "secret", "secrets are configured"),
    ("config", "tls", "so are certificates"),
    ("bus", "event", "what is emitted"),
    ("bus", "config", "`compose` turns settings into a bus"),
    ("bus", "ingest", "a bus runs sources"),
    ("bus", "dispatch", "a bus runs handlers"),
    ("bus", "handler", "the trait, and in `compose` the implementations"),
    ("bus", "store", "the trait, the log, and in `compose` the implementations"),
    ("bus", "transport", "the trait, and in `compose` the implementations"),
    ("bus", "retry", "a store that is away at start is waited for"),
    ("bus", "telemetry", "a bus owns its metrics"),
    ("api", "bus", "what it serves"),
    ("api", "dispatch", "how a handler is"),
    ("api", "event", "events are shown"),
    ("api", "handler", "the search handler answers queries"),
    ("api", "secret", "the token"),
    ("api", "tls", "its certificate"),
    ("api", "telemetry", "requests are counted, and the metrics written"),
    ("api", "store", "the log is read, and its errors become problems"),
    ("api", "transport", "posted events go through the http transport"),
    ("doctor", "finding", "what it says"),
    ("doctor", "config", "what it is to look at"),
    ("doctor", "bus", "`open_transport`"),
    ("doctor", "secret", "files of secrets: who can read them"),
    ("doctor", "tls", "and of keys"),
    ("doctor", "store", "each judges its own database"),
    ("doctor", "handler", "templates of destinations"),
    ("doctor", "transport", "each judges its own broker"),
    ("cli", "api", "`run` serves it"),
    ("cli", "doctor", "`doctor` prints what it finds"),
    ("cli", "bus", "`run` composes one; `publish --transport` opens a transport"),
    ("cli", "config", "every command reads it"),
    ("cli", "event", "`publish --transport` sends headers"),
    ("cli", "secret", "the token of the daemon it talks to"),
    ("cli", "tls", "whom it trusts to be that daemon"),
    ("cli", "telemetry", "`run` sets up the log"),
    ("cli", "transport", "`publish --transport` publishes through the trait"),
];

/// Edges that close a circle and should go; everything else in [`EDGES`] must be free of them.
const AGAINST: &[(&str, &str)] = &[];

/// Where a driver may be named: paths below `src` that begin so.
const DRIVERS: &[(&str, &[&str], &str)] = &[
    ("async_nats", &["transport/nats"], "the NATS transport"),
    ("lapin", &["transport/amqp"], "the RabbitMQ transport"),
    (
        "sqlx",
        &["store/sqlite", "store/postgres", "store/progress/row.rs", "store/schema.rs"],
        "the two SQL stores, and what they share",
    ),
    ("tantivy", &["handler/search"], "the search index"),
    ("backoff", &["retry.rs"], "unmaintained, so it can be replaced in one place"),
    (
        "axum",
        &["api/", "cli/events/tests.rs", "cli/publish/tests.rs"],
        "the HTTP server, and those that tests make up",
    ),
    ("tower_http", &["api/"], "the HTTP server"),
    (
        "reqwest",
        &["transport/http", "cli/", "telemetry/otlp.rs"],
        "webhooks, commands that ask a daemon, and spans for a collector",
    ),
    ("prost", &["telemetry/otlp"], "the wire form of spans"),
    ("tracing_journald", &["telemetry/logging.rs"], "one of the forms of the log"),
    ("figment", &["config/"], "the layers of the configuration"),
    ("clap", &["cli/", "main.rs"], "the command line"),
    ("clap_complete", &["cli/"], "the command line"),
    ("anyhow", &["cli/", "main.rs"], "the library's errors are typed"),
    ("sd_notify", &["cli/"], "only a daemon has a supervisor"),
];

/// Implementations, which only those may name who put a bus together.
const ADAPTERS: &[&str] = &[
    "transport::amqp",
    "transport::http",
    "transport::memory",
    "transport::nats",
    "store::memory",
    "store::postgres",
    "store::sqlite",
    "handler::forward",
    "handler::log",
    "handler::search",
];

/// Who may name an implementation: paths below `src` that begin so, `*` for any adapter.
const NAMES_ADAPTERS: &[(&str, &str, &str)] = &[
    ("bus/compose.rs", "*", "from settings to a bus"),
    ("bus/reload.rs", "handler::search", "an index that is open cannot be opened twice"),
    ("bus/searches.rs", "handler::search", "what queries look at while handlers come and go"),
    ("config/", "*", "their options are part of the settings"),
    ("doctor/", "*", "it asks each of them what it finds"),
    ("bus/mod.rs", "store::memory", "the store of a bus that was given none"),
    ("api/", "transport::http", "what is posted goes in there"),
    ("api/", "handler::search", "queries are no part of the handler trait"),
];

#[test]
fn no_module_imports_against_the_direction() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    collect(&src, &mut files);
    assert!(files.len() > 60, "only {} files under {}", files.len(), src.display());
    let mut checker = Checker::of(&files.iter().map(|f| below(&src, f)).collect::<Vec<_>>());
    for file in &files {
        checker.check(&below(&src, file), &fs::read_to_string(file).unwrap());
    }
    for (from, to, _) in EDGES {
        if !checker.edges.contains_key(&((*from).to_owned(), (*to).to_owned())) {
            checker.faults.push(format!("nothing in {from} imports {to}: take it off EDGES"));
        }
    }
    assert!(checker.faults.is_empty(), "\n{}\n", checker.faults.join("\n"));
}

#[test]
fn the_direction_has_no_circles() {
    for against in AGAINST {
        assert!(
            EDGES.iter().any(|(from, to, _)| (*from, *to) == *against),
            "{against:?} is gone from EDGES: take it off AGAINST"
        );
    }
    // Whatever imports nothing that is left can be taken away; a circle stays.
    let mut left: BTreeSet<(&str, &str)> =
        EDGES.iter().map(|(from, to, _)| (*from, *to)).filter(|e| !AGAINST.contains(e)).collect();
    loop {
        let importing: BTreeSet<&str> = left.iter().map(|(from, _)| *from).collect();
        let before = left.len();
        left.retain(|(_, to)| importing.contains(to));
        if left.len() == before {
            break;
        }
    }
    assert!(left.is_empty(), "these import each other in a circle: {left:?}");
}

#[test]
fn an_import_against_the_direction_is_found() {
    let files = ["event/mod.rs", "store/mod.rs", "bus/mod.rs", "dispatch/mod.rs", "ingest.rs"];
    let files: Vec<String> =
        files.iter().chain(&["transport/mod.rs", "handler/mod.rs"]).map(|&f| f.into()).collect();
    let faults = |path: &str, text: &str| {
        let mut checker = Checker::of(&files);
        checker.check(path, text);
        checker.faults
    };
    let bad = [
        ("event/mod.rs", "use crate::store::Log;", "event imports store"),
        ("event/decode.rs", "fn f() { let _ = crate::bus::EventBus::builder(); }", "imports bus"),
        ("handler/log.rs", "use crate::{\n event::{Position, Event},\n bus::EventBus,\n};", "bus"),
        ("store/log.rs", "use super::super::dispatch::Filter;", "store imports dispatch"),
        ("transport/mod.rs", "use super::ingest::run;", "transport imports ingest"),
        ("store/mod.rs", "/* a /* nested */ one */ use crate :: ingest;", "store imports ingest"),
        ("store/mod.rs", "const S: &str = \"\\\"\"; use crate::ingest::run;", "imports ingest"),
        ("store/mod.rs", "fn f<'a>(c: char) -> bool { c == '\"' } use crate::ingest;", "ingest"),
        ("store/mod.rs", "const S: &str = r#\"\"//\"#; use crate::r#ingest;", "imports ingest"),
        ("event/mod.rs", "use crate::*;", "crate::*"),
        ("event/mod.rs", "use crate as root;", "under another name"),
        ("event/mod.rs", "use pulsebus as root;", "under another name"),
        ("event/mod.rs", "use crate::{self as root};", "crate::self"),
        ("newcomer.rs", "use crate::event::Event;", "newcomer imports event"),
        ("ingest.rs", "use lapin::Channel;", "names lapin"),
        ("ingest.rs", "use {std::fmt, lapin as rabbit};", "names lapin"),
        ("ingest.rs", "extern crate sqlx;", "names sqlx"),
        ("dispatch/mod.rs", "type B = ::backoff::ExponentialBackoff;", "names backoff"),
        ("transport/nats/mod.rs", "fn f() -> lapin::Result<()> { todo!() }", "names lapin"),
        ("bus/mod.rs", "use crate::{store::{Log, sqlite::SqliteStore}};", "store::sqlite"),
        ("handler/forward.rs", "use crate::transport::nats::NatsTransport;", "transport::nats"),
    ];
    for (path, text, expected) in bad {
        let faults = faults(path, text).join("\n");
        assert!(faults.contains(expected), "{path}: {text}: {faults:?}");
    }
    let good = [
        ("event/mod.rs", "// use crate::store::Log;\n/// [`Log`](crate::store::Log)\nfn f() {}"),
        ("event/mod.rs", "const S: &str = \"use crate::store::Log; lapin::Channel\";"),
        ("event/mod.rs", "const S: &[u8] = br##\"crate::bus\"# lapin::\"##;"),
        ("event/mod.rs", "pub(crate) fn f(backoff: u8) -> u8 { backoff }"),
        ("store/log.rs", "use super::Batch; mod tests { use super::super::Batch; use super::*; }"),
        ("store/mod.rs", "use crate::{event::{self, Event}, transport::{Mark, Receipt}};"),
        ("store/sqlite.rs", "use sqlx::Row; use crate::store::sqlite::SqliteOptions;"),
        ("bus/compose.rs", "use crate::{store::memory::MemoryStore, transport::amqp::A};"),
        ("bus/mod.rs", "use crate::store::memory::MemoryStore;"),
        ("transport/amqp/mod.rs", "use lapin::Channel; use crate::transport::amqp::topology;"),
    ];
    for (path, text) in good {
        let faults = faults(path, text);
        assert!(faults.is_empty(), "{path}: {text}: {faults:?}");
    }
}

/// Holds files against the tables.
struct Checker {
    /// The top-level modules there are.
    modules: BTreeSet<String>,
    edges: BTreeMap<(String, String), String>,
    faults: Vec<String>,
}

impl Checker {
    fn of(files: &[String]) -> Self {
        let modules = files.iter().map(|file| top_level(file)).collect();
        Self { modules, edges: BTreeMap::new(), faults: Vec::new() }
    }

    fn check(&mut self, file: &str, text: &str) {
        let from = top_level(file);
        let tokens = tokens(text);
        let mut at = 0;
        while at < tokens.len() {
            let token = &*tokens[at];
            let next = tokens.get(at + 1).map_or("", |t| &**t);
            let before = at.checked_sub(1).map_or("", |i| &*tokens[i]);
            match token {
                "crate" | "pulsebus" if next == "as" => {
                    self.faults.push(format!("{file}: imports the crate under another name"));
                }
                "crate" | "pulsebus" if next == "::" => {
                    for path in paths(&tokens, at + 2) {
                        self.edge(file, &from, &path);
                    }
                }
                "super" if before != "::" => {
                    let mut end = at;
                    let mut supers = 0;
                    while tokens.get(end).is_some_and(|t| t == "super") {
                        supers += 1;
                        end += 2;
                    }
                    // An inline module needs one more; then the name is none of a module.
                    if supers >= depth(file) {
                        for path in paths(&tokens, end) {
                            if path.first().is_some_and(|first| self.modules.contains(first)) {
                                self.edge(file, &from, &path);
                            }
                        }
                    }
                }
                _ => {}
            }
            let leads =
                before != "::" || !at.checked_sub(2).is_some_and(|i| ends_a_segment(&tokens[i]));
            let imported = next == "::" || next == "as" || matches!(before, "use" | "crate");
            if leads && imported {
                self.driver(file, token);
            }
            at += 1;
        }
    }

    fn edge(&mut self, file: &str, from: &str, path: &[String]) {
        let to = path.first().map_or("", |first| &**first);
        if !self.modules.contains(to) {
            // Nothing but modules is at the root; a glob or `self` would hide what is imported.
            self.faults.push(format!("{file}: crate::{to} is no module"));
            return;
        }
        if to == from {
            return self.adapter(file, path);
        }
        let edge = (from.to_owned(), to.to_owned());
        if !EDGES.iter().any(|(from, to, _)| (*from, *to) == (&*edge.0, &*edge.1)) {
            self.faults.push(format!("{file}: {from} imports {to}, which EDGES does not allow"));
        }
        self.edges.entry(edge).or_insert_with(|| file.to_owned());
        self.adapter(file, path);
    }

    fn adapter(&mut self, file: &str, path: &[String]) {
        let Some(named) = path.get(..2).map(|two| two.join("::")) else { return };
        if !ADAPTERS.contains(&&*named) {
            return;
        }
        let own = file.starts_with(&named.replace("::", "/"));
        let may = |(who, what, _): &(&str, &str, &str)| {
            file.starts_with(who) && (*what == "*" || *what == named)
        };
        if !own && !NAMES_ADAPTERS.iter().any(may) {
            self.faults.push(format!("{file}: names the implementation {named}"));
        }
    }

    fn driver(&mut self, file: &str, name: &str) {
        let Some((name, homes, why)) = DRIVERS.iter().find(|(driver, ..)| *driver == name) else {
            return;
        };
        if !homes.iter().any(|home| file.starts_with(home)) {
            self.faults.push(format!("{file}: names {name}, which belongs to {homes:?}: {why}"));
        }
    }
}

/// The paths that go on at a token: one, or those of a group.
fn paths(tokens: &[String], at: usize) -> Vec<Vec<String>> {
    let mut found = Vec::new();
    let mut end = at;
    read_paths(tokens, &mut end, &mut Vec::new(), &mut found);
    found
}

fn read_paths(
    tokens: &[String],
    at: &mut usize,
    prefix: &mut Vec<String>,
    found: &mut Vec<Vec<String>>,
) {
    let length = prefix.len();
    while let Some(token) = tokens.get(*at) {
        *at += 1;
        if token == "{" {
            while tokens.get(*at).is_some_and(|t| t != "}") {
                let start = *at;
                read_paths(tokens, at, prefix, found);
                while tokens.get(*at).is_some_and(|t| t != "," && t != "}") {
                    *at += 1;
                }
                if tokens.get(*at).is_some_and(|t| t == ",") || *at == start {
                    *at += 1;
                }
            }
            *at += 1;
            prefix.truncate(length);
            return;
        }
        prefix.push(token.clone());
        if tokens.get(*at).is_none_or(|t| t != "::") {
            break;
        }
        *at += 1;
    }
    found.push(prefix.clone());
    prefix.truncate(length);
}

/// Names, `::` and single signs; comments and literals are left out.
fn tokens(text: &str) -> Vec<String> {
    let chars: Vec<char> = text.chars().collect();
    let mut tokens = Vec::new();
    let mut at = 0;
    let is = |at: usize, c: char| chars.get(at) == Some(&c);
    while let Some(&c) = chars.get(at) {
        if c.is_alphabetic() || c == '_' {
            let start = at;
            while chars.get(at).is_some_and(|c| c.is_alphanumeric() || *c == '_') {
                at += 1;
            }
            let name: String = chars[start..at].iter().collect();
            let hashes = chars[at..].iter().take_while(|c| **c == '#').count();
            if matches!(&*name, "r" | "br" | "cr") && is(at + hashes, '"') {
                at = raw_end(&chars, at + hashes + 1, hashes);
            } else if name == "r" && hashes == 1 {
                at += 1; // `r#name`: the name follows
            } else if !(matches!(&*name, "b" | "c") && (is(at, '"') || is(at, '\''))) {
                tokens.push(name);
            }
        } else if c == '/' && is(at + 1, '/') {
            while chars.get(at).is_some_and(|c| *c != '\n') {
                at += 1;
            }
        } else if c == '/' && is(at + 1, '*') {
            let mut depth = 0;
            while at < chars.len() {
                let step = match (is(at, '/'), is(at, '*'), is(at + 1, '*'), is(at + 1, '/')) {
                    (true, _, true, _) => 1,
                    (_, true, _, true) => -1,
                    _ => 0,
                };
                depth += step;
                at += if step == 0 { 1 } else { 2 };
                if depth == 0 {
                    break;
                }
            }
        } else if c == '"' {
            at = quoted_end(&chars, at + 1, '"');
        } else if c == '\'' && (is(at + 1, '\\') || is(at + 2, '\'')) {
            at = quoted_end(&chars, at + 1, '\'');
        } else if c == ':' && is(at + 1, ':') {
            tokens.push("::".to_owned());
            at += 2;
        } else {
            if !c.is_whitespace() {
                tokens.push(c.to_string());
            }
            at += 1;
        }
    }
    tokens
}

fn quoted_end(chars: &[char], mut at: usize, quote: char) -> usize {
    while let Some(&c) = chars.get(at) {
        at += if c == '\\' { 2 } else { 1 };
        if c == quote {
            break;
        }
    }
    at
}

fn raw_end(chars: &[char], mut at: usize, hashes: usize) -> usize {
    while let Some(&c) = chars.get(at) {
        at += 1;
        if c == '"' && chars[at..].iter().take_while(|c| **c == '#').count() >= hashes {
            return at + hashes;
        }
    }
    at
}

fn ends_a_segment(token: &str) -> bool {
    token.starts_with(|c: char| c.is_alphabetic() || c == '_' || c == '>')
}

/// `store` for `store/sqlite.rs`, `ingest` for `ingest.rs`.
fn top_level(file: &str) -> String {
    file.split('/').next().unwrap().trim_end_matches(".rs").to_owned()
}

/// How many `super`s lead from a file's module to the root of the crate.
fn depth(file: &str) -> usize {
    let parts = file.split('/').count();
    if file.ends_with("/mod.rs") { parts - 1 } else { parts }
}

fn below(src: &Path, file: &Path) -> String {
    file.strip_prefix(src).unwrap().to_str().unwrap().replace('\\', "/")
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect(&path, files);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
}
