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
