//! Webhooks and search indexes.

use std::{collections::BTreeSet, sync::Arc};

use tokio::task::JoinSet;

use super::{Finding, Report, Severity};
use crate::{
    config::{HandlerKind, Settings, TransportSettings},
    handler::search,
    transport::http,
};

pub(super) async fn examine(settings: &Settings) -> Report {
    // Receivers wait for no other one's timeout, and neither do indexes.
    let mut looks = JoinSet::new();
    let mut order = Vec::new();
    for name in sent_to(settings) {
        let Some(TransportSettings::Http(options)) = settings.transports.get(&name) else {
            continue;
        };
        let (subject, options) = (format!("transport:{name}"), options.clone());
        order.push(subject.clone());
        looks.spawn(async move {
            let findings = http::doctor::examine(&subject, &options).await;
            (subject, findings)
        });
    }
    for (name, handler) in &settings.handlers {
        let HandlerKind::Search(options) = &handler.kind else { continue };
        let (subject, options) = (format!("handler:{name}"), options.clone());
        order.push(subject.clone());
        looks.spawn_blocking(move || {
            let findings = search::doctor::examine(&subject, &options);
            (subject, findings)
        });
    }
    let mut found: Vec<(String, Vec<Finding>)> = Vec::new();
    while let Some(look) = looks.join_next().await {
        match look {
            Ok(look) => found.push(look),
            Err(error) => found.push((
                "system".to_owned(),
                vec![Finding::of(
                    Severity::Warning,
                    "system",
                    "machine-cut",
                    format!("looking at a target was cut short: {error}"),
                    "what is wrong with it was not found out",
                    "run doctor again; if it stays, it is a fault in pulsebus: report it",
                )],
            )),
        }
    }
    let place = |subject: &str| order.iter().position(|other| other == subject);
    found.sort_by_key(|(subject, _)| place(subject));
    let mut report = Report::default();
    for (subject, findings) in found {
        report.add(subject, findings);
    }
    report
}

/// The transports that a handler sends events or dead letters to.
fn sent_to(settings: &Settings) -> BTreeSet<Arc<str>> {
    let mut names = BTreeSet::new();
    for handler in settings.handlers.values() {
        if let HandlerKind::Forward(forward) = &handler.kind {
            names.insert(Arc::clone(&forward.transport));
        }
        names.extend(handler.dead_letter.as_ref().map(|to| Arc::clone(&to.transport)));
    }
    names
}
