//! Sources and destinations, through their transports.
//!
//! Each transport judges itself ([`Transport::examine`](crate::transport::Transport::examine)),
//! all at the same time; here is put together what it is to look at. Webhooks, and what is within
//! this process, are no brokers.

use std::{collections::BTreeMap, sync::Arc};

use futures_util::future::join_all;
use tokio::time::timeout;

use super::Report;
use crate::{
    bus::open_transport,
    config::{HandlerKind, Settings, TransportSettings},
    finding::Findings,
    handler::template::Template,
    transport::{Address, EXAMINATION, Examination, ExaminedDestination, ExaminedSource},
};

pub(super) async fn examine(settings: &Settings) -> Report {
    let asked = asked(settings);
    let examined = join_all(asked.iter().map(|(name, asked)| async {
        let mut found = Findings::about(asked.subject.clone());
        let Some(transport) = settings.transports.get(name) else { return found.into_vec() };
        match open_transport(name, transport) {
            Ok(transport) => match timeout(EXAMINATION, transport.examine(asked.clone())).await {
                Ok(findings) => return findings,
                Err(_) => found.error(
                    "transport-silent",
                    format!("it could not be examined within {EXAMINATION:?}"),
                    "what is wrong with it is not known",
                    "see whether the broker answers anybody, and run doctor again",
                ),
            },
            Err(error) => found.error(
                "transport-unusable",
                error.to_string(),
                "the daemon does not start with it",
                "correct its settings; pulsebus check shows where they stand",
            ),
        }
        found.into_vec()
    }))
    .await;

    let mut report = Report::default();
    for ((_, asked), findings) in asked.iter().zip(examined) {
        report.add(&*asked.subject, findings);
        for source in &asked.sources {
            report.add(&*source.subject, Vec::new());
        }
        for destination in &asked.destinations {
            report.add(&*destination.subject, Vec::new());
        }
    }
    report
}

/// What each broker is to look at, by the name of its transport.
fn asked(settings: &Settings) -> BTreeMap<Arc<str>, Examination> {
    let mut all: BTreeMap<Arc<str>, Examination> = BTreeMap::new();
    for (name, transport) in &settings.transports {
        let broker = match transport {
            TransportSettings::Nats(_) | TransportSettings::Amqp(_) => true,
            TransportSettings::Http(_) | TransportSettings::Memory => false,
        };
        if broker {
            let nothing = Examination {
                subject: format!("transport:{name}").into(),
                sources: Vec::new(),
                destinations: Vec::new(),
                max_event_bytes: settings.limits.max_event_bytes,
            };
            all.insert(Arc::clone(name), nothing);
        }
    }
    for (name, source) in &settings.sources {
        if let Some(asked) = all.get_mut(&source.transport) {
            asked.sources.push(ExaminedSource {
                subject: format!("source:{name}").into(),
                params: source.params.clone(),
                competing: source.competing,
            });
        }
    }
    for (name, handler) in &settings.handlers {
        let forward = match &handler.kind {
            HandlerKind::Forward(forward) => {
                Some(("events", &forward.transport, &forward.address, &forward.exchange))
            }
            HandlerKind::Search(_) | HandlerKind::Log { .. } => None,
        };
        let dead_letter = handler.dead_letter.as_ref();
        let dead_letter =
            dead_letter.map(|to| ("dead letters", &to.transport, &to.address, &to.exchange));
        for (carries, transport, address, exchange) in forward.into_iter().chain(dead_letter) {
            // Templates were parsed when the configuration was checked.
            if let Some(asked) = all.get_mut(transport)
                && let Some(address) = address_of(address, name)
            {
                asked.destinations.push(ExaminedDestination {
                    subject: format!("handler:{name}").into(),
                    carries,
                    address,
                    exchange: exchange.as_deref().and_then(|text| address_of(text, name)),
                });
            }
        }
    }
    all
}

fn address_of(template: &str, handler: &str) -> Option<Address> {
    Some(Address::new(Template::parse(template).ok()?.pieces(handler)))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    const DOC: &str = include_str!("../../docs/doctor.md");

    /// The files in which brokers are judged.
    const SOURCES: &[&str] = &[
        include_str!("brokers.rs"),
        include_str!("../transport/nats/examine/mod.rs"),
        include_str!("../transport/nats/examine/backlog.rs"),
        include_str!("../transport/nats/examine/consumer.rs"),
        include_str!("../transport/nats/examine/destination.rs"),
        include_str!("../transport/nats/examine/info.rs"),
        include_str!("../transport/nats/examine/source.rs"),
        include_str!("../transport/nats/examine/stream.rs"),
        include_str!("../transport/amqp/examine/mod.rs"),
        include_str!("../transport/amqp/examine/destination.rs"),
        include_str!("../transport/amqp/examine/queue.rs"),
        include_str!("../transport/amqp/examine/source.rs"),
    ];

    /// What stands between two of these, if it is the name of a check.
    fn checks(text: &str, quote: char) -> BTreeSet<&str> {
        let named = |word: &&str| {
            ["nats-", "amqp-", "transport-"].iter().any(|prefix| word.starts_with(prefix))
                && word.chars().all(|c| c.is_ascii_lowercase() || c == '-')
                && !word.ends_with('-')
        };
        text.split(quote).filter(named).collect()
    }

    #[test]
    fn the_docs_have_a_row_for_each_check() {
        let code: BTreeSet<_> = SOURCES.iter().flat_map(|source| checks(source, '"')).collect();
        let rows = DOC.lines().filter(|line| line.starts_with("| `"));
        let rows: Vec<_> = rows.filter_map(|row| row.split('`').nth(1)).collect();
        let docs: BTreeSet<_> =
            rows.iter().copied().filter(|name| !checks(name, '`').is_empty()).collect();
        assert!(code.len() > 60, "{}", code.len());
        assert_eq!(docs, code);
        assert_eq!(docs.len(), rows.iter().filter(|row| docs.contains(*row)).count(), "twice");
    }
}
