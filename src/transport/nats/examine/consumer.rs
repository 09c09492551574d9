//! The durable consumer of a source, judged.

use std::time::Duration;

use super::{
    super::{BATCH, NatsSource},
    info::{Consumer, Stream},
    stream::shown,
};
use crate::finding::{Findings, Severity};

/// Less than this, and a hiccup of the daemon makes the server deliver everything again.
const SHORT: Duration = Duration::from_secs(5);

/// Pull requests that the server keeps: they overlap, and a second daemon may take over.
const REQUESTS: i64 = 8;

/// Messages waiting that somebody should know of.
const BACKLOG: u64 = 100_000;

pub(super) fn judge(
    found: &mut Findings,
    consumer: &Consumer,
    stream: &Stream,
    source: &NatsSource,
    competing: bool,
) {
    let config = &consumer.config;
    let name = format!("consumer `{}` of stream `{}`", source.consumer, source.stream);
    let refused = "the daemon refuses to use it, and consumes nothing";
    let anew = format!(
        "nats consumer rm {} {}; the daemon makes it anew and goes on where its log ends",
        source.stream, source.consumer
    );
    if config.ack_policy != "explicit" {
        found.error(
            "nats-ack-policy",
            format!("{name} has ack policy `{}`", config.ack_policy),
            "with it the server forgets messages that are not in the log yet; the daemon refuses \
             to use it",
            anew.clone(),
        );
    }
    if !config.deliver_subject.is_empty() {
        found.error(
            "nats-consumer-push",
            format!("{name} pushes to `{}`", config.deliver_subject),
            "pulsebus pulls, so that it gets no more than it can take; the daemon refuses to use it",
            anew.clone(),
        );
    }
    if config.durable_name.is_empty() {
        found.error(
            "nats-consumer-ephemeral",
            format!("{name} is not durable"),
            "it goes, with what it knows of acks, when nobody has pulled for a while",
            anew.clone(),
        );
    }
    let wanted: Vec<&str> = source.subject.as_deref().into_iter().collect();
    if config.filters() != wanted {
        let show = |filters: &[&str]| match filters {
            [] => "everything".to_owned(),
            some => format!("`{}`", some.join("`, `")),
        };
        found.error(
            "nats-filter-subject",
            format!(
                "{name} delivers {}; the source asks for {}",
                show(&config.filters()),
                show(&wanted)
            ),
            refused,
            format!("correct `subject` of the source, or {anew}"),
        );
    }
    if config.headers_only {
        found.error(
            "nats-headers-only",
            format!("{name} delivers headers without bodies"),
            "no event can be read; the daemon refuses to use it",
            anew.clone(),
        );
    }
    if matches!(&*config.deliver_policy, "last" | "last_per_subject") {
        found.error(
            "nats-deliver-policy",
            format!("{name} has deliver policy `{}`", config.deliver_policy),
            "it passes over messages that came before; the daemon refuses to use it",
            anew.clone(),
        );
    }
    if config.replay_policy == "original" {
        found.error(
            "nats-replay-policy",
            format!("{name} delivers as slowly as messages were published (replay `original`)"),
            "a backlog takes as long as it took to arise; the daemon refuses to use it",
            anew.clone(),
        );
    }
    ack_wait(found, consumer, source, &name);
    if config.max_deliver > 0 {
        found.add(
            if competing { Severity::Error } else { Severity::Warning },
            "nats-max-deliver",
            format!("{name} gives a message up after {} deliveries", config.max_deliver),
            if competing {
                "what is given up stays in the stream, and nobody gets it; the daemon refuses to \
                 use it"
            } else {
                "what is given up is not delivered any more; pulsebus reads it from the stream \
                 when it opens the source, until the stream has removed it"
            },
            format!("nats consumer edit {} {} --max-deliver=-1", source.stream, source.consumer),
        );
    }
    max_ack_pending(found, consumer, source, &name);
    if (1..REQUESTS).contains(&config.max_waiting) {
        found.warning(
            "nats-max-waiting",
            format!("{name} keeps {} pull requests (max_waiting)", config.max_waiting),
            "the daemon's requests overlap; one too many is refused, and the source reconnects",
            anew.clone(),
        );
    }
    if config.inactive_threshold > 0 {
        let gone = competing || stream.config.retention == "interest";
        found.add(
            if gone { Severity::Error } else { Severity::Warning },
            "nats-inactive-threshold",
            format!(
                "{name} is deleted when nobody has pulled for {}",
                shown(Duration::from_nanos(config.inactive_threshold))
            ),
            if gone {
                "with it goes which messages are acked, or, under interest retention, the messages \
                 themselves"
            } else {
                "the daemon makes it anew behind what its log has; other settings are lost"
            },
            anew.clone(),
        );
    }
    if config.mem_storage && stream.config.storage != "memory" {
        found.warning(
            "nats-consumer-memory",
            format!("{name} is kept in memory"),
            "after a restart of the server it is gone: whatever the log's own mark does not cover \
             is delivered again",
            anew.clone(),
        );
    }
    if config.num_replicas == 1 && stream.config.num_replicas > 1 {
        found.warning(
            "nats-consumer-replicas",
            format!("{name} has one replica, its stream {}", stream.config.num_replicas),
            "while that one server is down nothing is delivered",
            anew,
        );
    }
    if consumer.paused {
        found.error(
            "nats-consumer-paused",
            format!("{name} is paused"),
            "nothing is delivered until its time is up or it is resumed",
            format!("nats consumer resume {} {}", source.stream, source.consumer),
        );
    }
    if consumer.num_pending >= BACKLOG {
        found.note(
            "nats-backlog",
            format!("{} messages wait for {name}", consumer.num_pending),
            "the daemon is down, or slower than the publishers",
            "see whether it is running, and what /readyz says; a backlog after an outage goes by \
             itself",
        );
    }
}

fn ack_wait(found: &mut Findings, consumer: &Consumer, source: &NatsSource, name: &str) {
    let config = &consumer.config;
    let wait = Duration::from_nanos(config.backoff.first().copied().unwrap_or(config.ack_wait));
    let edit = |wait| {
        format!("nats consumer edit {} {} --wait {}", source.stream, source.consumer, shown(wait))
    };
    if let Some(asked) = source.ack_wait
        && asked != Duration::from_nanos(config.ack_wait)
    {
        found.error(
            "nats-ack-wait",
            format!(
                "{name} waits {} for an ack; the source asks for {}",
                shown(Duration::from_nanos(config.ack_wait)),
                shown(asked)
            ),
            "the daemon refuses to use it, and consumes nothing",
            format!("{}, or correct `ack_wait` of the source", edit(asked)),
        );
    } else if wait < SHORT {
        found.warning(
            "nats-ack-wait",
            format!("{name} waits {} for an ack", shown(wait)),
            "a pause of the daemon or the network that is longer has everything delivered again, \
             behind what is newer",
            edit(super::super::ACK_WAIT),
        );
    }
}

fn max_ack_pending(found: &mut Findings, consumer: &Consumer, source: &NatsSource, name: &str) {
    let has = consumer.config.max_ack_pending;
    let edit = |wanted: i64| {
        format!("nats consumer edit {} {} --max-pending={wanted}", source.stream, source.consumer)
    };
    if let Some(asked) = source.max_ack_pending
        && asked != has
    {
        found.error(
            "nats-max-ack-pending",
            format!("{name} has max_ack_pending {has}; the source asks for {asked}"),
            "the daemon refuses to use it, and consumes nothing",
            format!("{}, or correct `max_ack_pending` of the source", edit(asked)),
        );
        return;
    }
    let batch = i64::try_from(source.batch.unwrap_or(BATCH)).unwrap_or(i64::MAX);
    if has > 0 && has < batch {
        found.warning(
            "nats-max-ack-pending",
            format!("{name} has max_ack_pending {has}, less than a batch of {batch}"),
            "a batch is never full: the server stops until acks come, and every batch waits for \
             the last one's commit",
            format!(
                "{}, or lower `batch` of the source",
                edit(super::super::MAX_ACK_PENDING.max(batch))
            ),
        );
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn judged(more: &serde_json::Value, competing: bool) -> Vec<(&'static str, Severity)> {
        let mut info = json!({"name": "c", "config": {
            "durable_name": "c", "ack_policy": "explicit", "deliver_policy": "all",
            "replay_policy": "instant", "ack_wait": 30_000_000_000_u64, "max_deliver": -1,
            "max_ack_pending": 20_000, "max_waiting": 512, "filter_subject": "a.>",
        }});
        for (key, value) in more.as_object().unwrap() {
            match key.as_str() {
                "paused" | "num_pending" => info[key] = value.clone(),
                key => info["config"][key] = value.clone(),
            }
        }
        let consumer: Consumer = serde_json::from_value(info).unwrap();
        let stream: Stream =
            serde_json::from_value(json!({"config": {"name": "S", "num_replicas": 3}})).unwrap();
        let source: NatsSource =
            serde_json::from_value(json!({"stream": "S", "consumer": "c", "subject": "a.>"}))
                .unwrap();
        let mut found = Findings::about("source:x");
        judge(&mut found, &consumer, &stream, &source, competing);
        found.into_vec().into_iter().map(|finding| (finding.check, finding.severity)).collect()
    }

    #[test]
    fn the_consumer_that_pulsebus_makes_has_no_findings() {
        assert_eq!(judged(&json!({}), false), []);
        assert_eq!(judged(&json!({}), true), []);
    }

    #[test]
    fn what_would_lose_or_hold_up_is_found() {
        use Severity::{Error, Note, Warning};
        for (more, competing, wanted) in [
            (json!({"filter_subject": "", "filter_subjects": ["a.>"]}), false, None),
            (
                json!({"filter_subject": "", "filter_subjects": ["a.>", "b"]}),
                false,
                Some(("nats-filter-subject", Error)),
            ),
            (json!({"filter_subject": ""}), false, Some(("nats-filter-subject", Error))),
            (json!({"backoff": [1_000_000_000_u64]}), false, Some(("nats-ack-wait", Warning))),
            (json!({"max_deliver": 5}), false, Some(("nats-max-deliver", Warning))),
            (json!({"max_deliver": 5}), true, Some(("nats-max-deliver", Error))),
            (json!({"max_ack_pending": -1}), false, None),
            (json!({"max_waiting": 1}), false, Some(("nats-max-waiting", Warning))),
            (json!({"inactive_threshold": 1}), false, Some(("nats-inactive-threshold", Warning))),
            (json!({"inactive_threshold": 1}), true, Some(("nats-inactive-threshold", Error))),
            (json!({"num_replicas": 1}), false, Some(("nats-consumer-replicas", Warning))),
            (json!({"paused": true}), false, Some(("nats-consumer-paused", Error))),
            (json!({"num_pending": 100_000}), false, Some(("nats-backlog", Note))),
        ] {
            assert_eq!(judged(&more, competing), Vec::from_iter(wanted), "{more}");
        }
    }
}
