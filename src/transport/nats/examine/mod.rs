//! What `doctor` finds out about NATS, without leaving a trace.
//!
//! * `info`: what the server says about streams, consumers and the account.
//! * `stream`, `consumer`, `backlog`: judgements of that, without the server.
//! * `source`, `destination`: what is asked of the server for one of them.
//! * `permission`: what the server would not take from this user, found out by trying.
//!
//! One connection serves all; sources and destinations are looked at side by side.

mod backlog;
mod consumer;
mod destination;
mod info;
mod permission;
mod source;
mod stream;

use std::time::Duration;

use futures_util::future::join_all;
use serde_json::Value;
use tokio::time::timeout;

use super::{
    NatsOptions,
    api::{Api, Said},
    connect::{Fault, Link, Live, REFUSED},
};
use crate::{
    finding::{Finding, Findings},
    transport::Examination,
};

/// How long looking at one source or destination may take.
const PART: Duration = Duration::from_secs(10);

/// JetStream is not enabled for the account.
const NOT_FOR_ACCOUNT: u16 = 10_039;

/// Events reach JetStream clients of this version and later as pulsebus expects it.
const OLDEST: (u64, u64) = (2, 9);

/// Looks at everything that is asked for.
pub(super) async fn examine(options: &NatsOptions, asked: Examination) -> Vec<Finding> {
    let mut found = Findings::about(asked.subject.clone());
    let link = Link::new(options.clone(), "doctor");
    let live = match link.live().await {
        Ok(live) => live,
        Err(fault) => {
            unreachable(&mut found, fault);
            return found.into_vec();
        }
    };
    let api = Api::new(live.clone(), options.domain.as_deref(), options.timeout);
    server(&mut found, &live, &asked);
    if !account(&mut found, &api).await {
        return found.into_vec();
    }
    let largest = asked.max_event_bytes;
    let sources = join_all(asked.sources.iter().map(|source| async {
        let mut found = Findings::about(source.subject.clone());
        let looking = source::examine(&mut found, &api, source, largest);
        match timeout(PART, looking).await {
            Ok(Ok(())) => {}
            Ok(Err(fault)) => fault_of(&mut found, fault),
            Err(_) => silent(&mut found),
        }
        found
    }));
    let destinations = join_all(asked.destinations.iter().map(|destination| async {
        let mut found = Findings::about(destination.subject.clone());
        let looking = destination::examine(&mut found, &api, destination, &asked.sources, largest);
        match timeout(PART, looking).await {
            Ok(Ok(())) => {}
            Ok(Err(fault)) => fault_of(&mut found, fault),
            Err(_) => silent(&mut found),
        }
        found
    }));
    let (sources, destinations) = tokio::join!(sources, destinations);
    let mut all = found.into_vec();
    all.extend(sources.into_iter().chain(destinations).flat_map(Findings::into_vec));
    all
}

fn unreachable(found: &mut Findings, fault: Fault) {
    let (Fault::Away(reason) | Fault::Silent(reason) | Fault::Misconfigured(reason)) = fault;
    let why = "nothing is consumed or published until it can be; events wait at the publishers \
               or in the log";
    if reason.contains(REFUSED) {
        let mend = "correct the login of this transport, or the user in the server's \
                    configuration; files are read anew at each attempt";
        found.error("nats-login", reason, why, mend);
    } else {
        let mend = "start the server, correct `url` or `tls` of this transport, or let the network \
                    through";
        found.error("nats-unreachable", reason, why, mend);
    }
}

/// A request failed in a way that the checks do not know.
fn fault_of(found: &mut Findings, fault: Fault) {
    match fault {
        // The only reason of that kind that a request has.
        Fault::Misconfigured(reason) => denied(found, reason),
        Fault::Away(reason) | Fault::Silent(reason) => found.error(
            "nats-unanswered",
            format!("JetStream could not be asked: {reason}"),
            "what it would have said is not known; a daemon waits here too",
            "look at the server's log, and run doctor again",
        ),
    }
}

fn denied(found: &mut Findings, what: impl Into<String>) {
    found.error(
        "nats-denied",
        what,
        "the daemon needs it to consume, and waits until it may",
        "add the subject to the user's `publish` permissions in the server's configuration; what \
         a source needs is listed in docs/doctor.md",
    );
}

fn silent(found: &mut Findings) {
    fault_of(found, Fault::Silent(format!("no answer within {PART:?}")));
}

/// What the server says about itself.
fn server(found: &mut Findings, live: &Live, asked: &Examination) {
    let info = live.client.server_info();
    if let Some(version) = version(&info.version)
        && version < OLDEST
    {
        found.warning(
            "nats-version",
            format!("nats-server is {}", info.version),
            "pulsebus is written for 2.9 and later: older servers lack requests that it recovers \
             lost deliveries with",
            "upgrade nats-server",
        );
    }
    if !asked.destinations.is_empty() && info.max_payload < asked.max_event_bytes {
        found.warning(
            "nats-max-payload",
            format!(
                "the server's max_payload is {} bytes, limits.max_event_bytes {}",
                info.max_payload, asked.max_event_bytes
            ),
            "events in between are taken, and become dead letters when they are published here",
            "raise max_payload in the server's configuration, or lower limits.max_event_bytes",
        );
    }
    if info.lame_duck_mode {
        found.warning(
            "nats-lame-duck",
            "the server is in lame duck mode",
            "it is about to shut down and takes no new clients",
            "wait for its successor, or name another server in `url`",
        );
    }
}

/// The first two numbers of a version.
fn version(text: &str) -> Option<(u64, u64)> {
    let mut numbers = text.trim_start_matches('v').split(['.', '-']).map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

/// Whether there is a JetStream to ask further.
async fn account(found: &mut Findings, api: &Api) -> bool {
    let account = match api.ask::<info::Account>("INFO", &Value::Null).await {
        Ok(Said::Yes(account)) => account,
        Ok(Said::No { code: NOT_FOR_ACCOUNT, description }) => {
            no_jetstream(found, description);
            return false;
        }
        // An account that may not ask about itself is none of our business.
        Ok(Said::No { .. }) | Err(Fault::Misconfigured(_)) => return true,
        Err(Fault::Away(reason) | Fault::Silent(reason)) if api.live.is_deaf() => {
            found.error(
                "nats-inbox",
                reason,
                "no request has an answer: nothing can be consumed, and no publish is confirmed",
                "allow `_INBOX.>` in the user's `subscribe` permissions",
            );
            return false;
        }
        Err(Fault::Away(reason)) if !api.live.is_down() => {
            no_jetstream(found, reason);
            return false;
        }
        Err(fault) => {
            fault_of(found, fault);
            return false;
        }
    };
    info::Account::judge(&account, found);
    true
}

fn no_jetstream(found: &mut Findings, reason: String) {
    found.error(
        "nats-no-jetstream",
        reason,
        "only JetStream keeps messages until they are acked, and confirms that it took one",
        "enable `jetstream` in the server's configuration and for this account; behind a leaf \
         node, set `domain` of this transport",
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_compare_by_number() {
        assert!(version("2.10.1").unwrap() > OLDEST);
        assert!(version("2.8.4").unwrap() < OLDEST);
        assert_eq!(version("v2.9.0-beta.1"), Some(OLDEST));
        assert_eq!(version("unknown"), None);
    }
}
