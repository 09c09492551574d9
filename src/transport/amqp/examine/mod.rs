//! What `doctor` finds out about RabbitMQ, without leaving a trace.
//!
//! * `learn`: what a queue or an exchange is. AMQP has no question for that; the broker's refusals
//!   tell.
//! * `queue`: judgements of that, without the broker.
//! * `source`, `destination`: what is asked of the broker for one of them.
//!
//! Sources share a connection and destinations another: a broker short of memory or disk answers
//! nothing more on one that has published.

mod destination;
mod learn;
mod queue;
mod source;

use std::time::Duration;

use futures_util::{StreamExt as _, future::join_all};
use lapin::Event;
use tokio::{sync::watch, time::timeout};

use super::{
    connect::{Connector, Failure, Link, code},
    topology::Refusal,
};
use crate::{
    finding::{Finding, Findings},
    transport::Examination,
};

/// How long looking at one source or destination may take.
const PART: Duration = Duration::from_secs(10);

/// Looks at everything that is asked for.
pub(super) async fn examine(connector: &Connector, asked: Examination) -> Vec<Finding> {
    let mut found = Findings::about(asked.subject.clone());
    let link = match connect(&mut found, connector).await {
        Some(link) => link,
        None => return found.into_vec(),
    };
    let sources = join_all(asked.sources.iter().map(|source| async {
        let mut found = Findings::about(source.subject.clone());
        let looking = source::examine(&mut found, &link.connection, source, connector.timeout());
        let outcome = timeout(PART, looking).await.ok();
        ended(&mut found, outcome);
        found
    }));
    let (sources, destinations) = tokio::join!(sources, destinations(connector, &asked));
    link.close().await;
    let mut all = found.into_vec();
    all.extend(sources.into_iter().chain(destinations).flat_map(Findings::into_vec));
    all
}

async fn destinations(connector: &Connector, asked: &Examination) -> Vec<Findings> {
    if asked.destinations.is_empty() {
        return Vec::new();
    }
    let mut found = Findings::about(asked.subject.clone());
    let Some(link) = connect(&mut found, connector).await else { return vec![found] };
    let (say, blocked) = watch::channel(None);
    // One listener only: several would take each other's events.
    let mut events = Box::pin(link.connection.events_listener());
    let listening = async {
        while let Some(event) = events.next().await {
            if let Event::ConnectionBlocked(reason) = event {
                say.send_replace(Some(reason));
            }
        }
        std::future::pending::<()>().await;
    };
    let looking = join_all(asked.destinations.iter().map(|destination| {
        let (link, mut blocked) = (&link, blocked.clone());
        async move {
            let mut found = Findings::about(destination.subject.clone());
            let looking = destination::examine(
                &mut found,
                &link.connection,
                destination,
                &asked.sources,
                connector.timeout(),
            );
            let outcome = tokio::select! {
                outcome = timeout(PART, looking) => outcome.ok(),
                // Told once, for all.
                Ok(_) = blocked.wait_for(Option::is_some) => Some(Ok(())),
            };
            ended(&mut found, outcome);
            found
        }
    }));
    let mut all = tokio::select! {
        all = looking => all,
        () = listening => Vec::new(),
    };
    let reason = blocked.borrow().clone();
    match reason {
        None => {
            link.close().await;
        }
        Some(reason) => {
            link.cut();
            found.error(
                "amqp-blocked",
                format!("RabbitMQ blocks publishers: {reason}"),
                "nothing can be published until it has memory and disk again; handlers wait, and so \
                 do the publishers of your sources",
                "free disk or memory on the broker, or correct disk_free_limit and \
                 vm_memory_high_watermark; rabbitmqctl list_alarms",
            );
        }
    }
    all.push(found);
    all
}

async fn connect(found: &mut Findings, connector: &Connector) -> Option<Link> {
    let failure = match connector.connect("doctor").await {
        Ok(link) => return Some(link),
        Err(failure) => failure,
    };
    let reason = failure.text().to_owned();
    let why = "nothing is consumed or published until it can be; events wait at the publishers or \
               in the log";
    match (&failure, reason.contains("ACCESS_REFUSED")) {
        (Failure::Misconfigured(_), _) => found.error(
            "amqp-vhost",
            reason,
            why,
            "correct the virtual host at the end of `url`, create it (rabbitmqctl add_vhost), or let \
             the user into it (rabbitmqctl set_permissions)",
        ),
        (Failure::Unavailable(_), true) => found.error(
            "amqp-login",
            reason,
            why,
            "correct the login of this transport, or the user in RabbitMQ (rabbitmqctl \
             change_password); `guest` may come from the same machine only",
        ),
        (Failure::Unavailable(_), false) => found.error(
            "amqp-unreachable",
            reason,
            why,
            "start the broker, correct `url` or `tls` of this transport, or let the network through",
        ),
    }
    None
}

/// What is said of a look that did not come to its end; `None`: not in time.
fn ended(found: &mut Findings, outcome: Option<Result<(), Refusal>>) {
    let reason = match outcome {
        Some(Ok(())) => return,
        Some(Err(refusal)) => refusal.text,
        None => format!("no answer within {PART:?}"),
    };
    found.error(
        "amqp-unanswered",
        format!("RabbitMQ could not be asked: {reason}"),
        "what it would have said is not known; a daemon waits here too",
        "look at the broker's log, and run doctor again",
    );
}

/// Whether a refusal is for want of a permission.
fn is_denied(refusal: &Refusal) -> bool {
    refusal.code == Some(code::ACCESS_REFUSED)
}
