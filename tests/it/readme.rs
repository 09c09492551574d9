//! What the README shows is what is there.

use std::{fs, path::Path};

use pulsebus::config::{Inputs, load};

fn read(path: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap()
}

/// The blocks of a language, without their fences.
fn blocks<'a>(readme: &'a str, language: &str) -> Vec<&'a str> {
    readme
        .split("```")
        .skip(1)
        .step_by(2)
        .filter_map(|block| block.strip_prefix(language)?.strip_prefix('\n'))
        .collect()
}

#[test]
fn the_embedded_example_is_the_one_in_examples() {
    let (readme, example) = (read("README.md"), read("examples/embedded.rs"));
    let shown = blocks(&readme, "rust");
    assert_eq!(shown.len(), 1);
    assert!(example.ends_with(shown[0]), "README.md does not end like examples/embedded.rs");
    assert!(shown[0].starts_with("use ") && shown[0].contains("fn main()"), "{}", shown[0]);
}

#[test]
fn the_first_configuration_is_right() {
    let readme = read("README.md");
    let shown = blocks(&readme, "toml");
    assert_eq!(shown.len(), 1);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("first.toml");
    fs::write(&file, shown[0]).unwrap();
    let loaded = load(&Inputs { file: Some(file), ..Inputs::default() }).unwrap();
    let handlers: Vec<&str> = loaded.settings.handlers.keys().map(|name| &**name).collect();
    assert_eq!(handlers, ["search", "to-nats", "to-rabbit"]);
}

#[test]
fn what_to_try_is_what_the_daemon_prints() {
    let (readme, run) = (read("README.md"), read("src/cli/run.rs"));
    let text = run.split("r#\"").find(|text| text.contains("pulsebus is up")).unwrap();
    let text = text.split("\"#").next().unwrap();
    let printed = text.replace("{address}", "127.0.0.1:8077").replace("{{", "{").replace("}}", "}");
    assert!(printed.matches("curl -sS ").count() == 2, "{printed}");
    assert!(readme.contains(printed.trim()), "README.md does not show:\n{printed}");
}

/// The pages for people, by their paths.
fn pages() -> Vec<String> {
    let docs = fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs")).unwrap();
    let docs = docs.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let docs = docs.filter(|name| name.ends_with(".md")).map(|name| format!("docs/{name}"));
    ["README.md", "ARCHITECTURE.md", "CHANGELOG.md"]
        .map(str::to_owned)
        .into_iter()
        .chain(docs)
        .collect()
}

/// A page without its blocks of code, in which brackets mean other things.
fn prose(page: &str) -> String {
    page.split("```").step_by(2).collect()
}

/// The anchors of a page's headings, as GitHub makes them.
fn anchors(page: &str) -> Vec<String> {
    let headings = prose(page);
    let headings = headings.lines().filter_map(|line| {
        line.trim_start_matches('#').strip_prefix(' ').filter(|_| line.starts_with('#'))
    });
    headings
        .map(|heading| {
            let kept = heading.to_lowercase().replace(' ', "-");
            kept.chars().filter(|c| c.is_alphanumeric() || matches!(c, '-' | '_')).collect()
        })
        .collect()
}

#[test]
fn what_is_linked_is_there() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut links = 0;
    for document in pages() {
        let text = read(&document);
        let folder = Path::new(&document).parent().unwrap().to_owned();
        for link in prose(&text).split("](").skip(1) {
            let link = link.split(')').next().unwrap();
            if link.starts_with("http") {
                continue;
            }
            let (path, anchor) = link.split_once('#').unwrap_or((link, ""));
            let target =
                if path.is_empty() { root.join(&document) } else { root.join(&folder).join(path) };
            assert!(target.exists(), "{document} links {link}");
            if !anchor.is_empty() {
                let there = anchors(&fs::read_to_string(target).unwrap());
                assert!(
                    there.iter().any(|name| name == anchor),
                    "{document} links {link}: {there:?}"
                );
            }
            links += 1;
        }
    }
    assert!(links > 80, "only {links} links were looked at");
}

/// The anchors that the alert rules link.
#[test]
fn the_runbook_has_a_section_for_every_symptom() {
    let there = anchors(&read("docs/runbook.md"));
    for symptom in [
        "source-not-consuming",
        "store-unavailable",
        "handler-waiting",
        "handler-stalled",
        "handler-lag",
        "dead-letters",
        "quarantine",
        "commit-slow",
        "disk-or-memory",
        "down",
        "redeliveries",
        "reconnecting",
    ] {
        assert!(there.iter().any(|anchor| anchor == symptom), "{symptom}: {there:?}");
    }
    let rules = fs::read_to_string(
        Path::new(env!("CARGO_MANIFEST_DIR")).join("config/prometheus/alerts.yml"),
    );
    for line in rules.unwrap_or_default().lines() {
        if let Some((_, anchor)) = line.split_once("docs/runbook.md#") {
            assert!(there.iter().any(|name| name == anchor.trim()), "{line}");
        }
    }
}

#[test]
fn every_configuration_in_the_pages_is_right() {
    let mut tried = 0;
    for page in pages() {
        let text = read(&page);
        for block in blocks(&text, "toml") {
            let folder = tempfile::tempdir().unwrap();
            let file = folder.path().join("pulsebus.toml");
            fs::write(&file, block).unwrap();
            if let Err(errors) = load(&Inputs { file: Some(file), ..Inputs::default() }) {
                // Files that are there where the page is followed; nothing else may be wrong.
                for error in errors.to_string().lines().filter(|line| !line.trim().is_empty()) {
                    assert!(error.contains("cannot read /etc/"), "{page}: {error}\n{block}");
                }
            }
            tried += 1;
        }
    }
    assert!(tried >= 3, "only {tried} were looked at");
}

#[test]
fn the_tests_that_the_guarantees_name_are_there() {
    let page = read("docs/guarantees.md");
    let mut sources = String::new();
    let mut folders = vec!["tests".into(), "src".into()];
    while let Some(folder) = folders.pop() {
        let folder: std::path::PathBuf = folder;
        for entry in fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join(&folder)).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|end| end == "rs") {
                sources += &fs::read_to_string(path).unwrap();
            }
        }
    }
    let mut named = 0;
    for code in page.split('`').skip(1).step_by(2) {
        let is_test =
            code.starts_with(['G', 'C', 'S']) && code.contains('_') && !code.contains(' ');
        if is_test {
            named += 1;
            let (name, whole) = match code.strip_suffix('…') {
                Some(beginning) => (beginning, false),
                None => (code, true),
            };
            let is_there = sources.contains(&format!("fn {name}{}", if whole { "(" } else { "" }))
                || sources.contains(&format!("fn {name}{}", if whole { "<" } else { "" }));
            assert!(is_there, "docs/guarantees.md names {code}");
        }
    }
    assert!(named > 20, "only {named} were looked at");
}
