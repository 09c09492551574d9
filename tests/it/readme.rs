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
    assert_eq!(handlers, ["search", "to-nats"]);
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

#[test]
fn what_is_linked_is_there() {
    for document in ["README.md", "ARCHITECTURE.md", "CHANGELOG.md"] {
        for link in read(document).split("](").skip(1) {
            let target = link.split([')', '#']).next().unwrap();
            if !target.is_empty() && !target.starts_with("http") {
                let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(target);
                assert!(path.exists(), "{document} links {target}");
            }
        }
    }
}
