//! `pulsebus doctor` against real brokers that are set up wrong, and against the settings of
//! docker-compose.yml.

mod amqp;
mod compose;
mod nats;

use std::path::PathBuf;

use serde_json::Value;

use crate::support::{daemon::pulsebus, process};

/// What doctor said.
struct Said {
    /// Its findings about brokers: other checks see the machine that the tests run on.
    findings: Vec<Value>,
    examined: Value,
    whole: String,
}

/// A configuration on disk, to be examined as often as one likes.
struct Patient(PathBuf);

impl Patient {
    fn new(config: &str) -> Self {
        let folder = process::folder("doctor");
        let text = format!(
            "data_dir = \"{}\"\n[http]\nenabled = false\n{config}",
            folder.join("data").display()
        );
        std::fs::write(folder.join("pulsebus.toml"), text).unwrap();
        Self(folder)
    }

    async fn examine(&self) -> Said {
        examine(&self.0.join("pulsebus.toml")).await
    }
}

async fn examine(config: &std::path::Path) -> Said {
    let output = pulsebus(|command| {
        command.arg("--config").arg(config).args(["doctor", "--json"]);
    })
    .await;
    let whole = String::from_utf8_lossy(&output.stdout).into_owned();
    let answer: Value = serde_json::from_str(&whole).unwrap_or_else(|error| {
        panic!("{error}: {whole}{}", String::from_utf8_lossy(&output.stderr))
    });
    let errors = answer["findings"].as_array().unwrap().iter().any(|f| f["severity"] == "error");
    assert_eq!(output.status.code(), Some(i32::from(errors)), "{whole}");
    let ours = |finding: &&Value| {
        let check = finding["check"].as_str().unwrap();
        ["nats-", "amqp-", "transport-"].iter().any(|prefix| check.starts_with(prefix))
    };
    let findings = answer["findings"].as_array().unwrap().iter().filter(ours).cloned().collect();
    Said { findings, examined: answer["examined"].clone(), whole }
}

impl Said {
    /// `severity check` of each finding about this, sorted.
    fn about(&self, subject: &str) -> Vec<String> {
        let found = self.findings.iter().filter(|finding| finding["subject"] == subject);
        let mut found: Vec<_> = found
            .map(|finding| {
                let text = |key: &str| finding[key].as_str().unwrap().to_owned();
                for key in ["what", "why", "mend"] {
                    assert!(!text(key).is_empty(), "{finding}");
                }
                format!("{} {}", text("severity"), text("check"))
            })
            .collect();
        found.sort();
        found
    }

    /// That exactly this was found; and that the subject was looked at.
    fn expect(&self, subject: &str, expected: &[&str]) {
        let examined = self.examined.as_array().unwrap();
        assert!(
            examined.iter().any(|s| s == subject),
            "{subject} was not examined: {}",
            self.whole
        );
        let mut expected: Vec<_> = expected.iter().map(|text| (*text).to_owned()).collect();
        expected.sort();
        assert_eq!(self.about(subject), expected, "{subject}: {:#?}", self.findings);
    }

    /// What it says of this check.
    fn text(&self, check: &str, key: &str) -> String {
        let finding = self.findings.iter().find(|finding| finding["check"] == check);
        let finding = finding.unwrap_or_else(|| panic!("no {check}: {}", self.whole));
        finding[key].as_str().unwrap().to_owned()
    }
}
