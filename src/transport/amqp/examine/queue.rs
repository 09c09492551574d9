//! The queue of a source, judged by its settings.

use std::time::Duration;

use super::{
    super::{AmqpSource, consumer::PREFETCH, topology::QUORUM_PREFETCH},
    learn::QueueSettings,
};
use crate::finding::{Findings, Severity};

/// Messages waiting that somebody should know of.
const BACKLOG: u32 = 100_000;

/// A consumer may have to hold a message this long: while the store is away.
const HOLD: Duration = Duration::from_secs(5 * 60);

const REDECLARE: &str = "a queue's settings cannot be changed: declare one anew with others (move \
                         what waits with a shovel), or delete it while it is empty";

/// What is wrong with it for a source.
pub(super) fn judge(
    found: &mut Findings,
    queue: &QueueSettings,
    source: &AmqpSource,
    competing: bool,
) {
    let name = format!("queue `{}`", source.queue);
    if !queue.durable {
        found.error(
            "amqp-queue-transient",
            format!("{name} is not durable"),
            "it is gone, with what it holds, when the broker restarts",
            REDECLARE,
        );
    }
    if queue.auto_delete {
        found.error(
            "amqp-queue-auto-delete",
            format!("{name} is deleted with its last consumer (auto-delete)"),
            "when the daemon stops or loses its connection, what waits is lost",
            REDECLARE,
        );
    }
    kind(found, queue, source, &name);
    removes(found, queue, &name);
    if let Some(priorities) = queue.argument("x-max-priority") {
        found.warning(
            "amqp-queue-priority",
            format!("{name} has {priorities} priorities (x-max-priority)"),
            "messages of higher priority overtake: events of one key can be stored out of order",
            format!("give all messages of a key the same priority; else {REDECLARE}"),
        );
    }
    if competing && queue.argument("x-single-active-consumer") == Some("true") {
        found.warning(
            "amqp-single-active-consumer",
            format!("{name} delivers to one consumer at a time (x-single-active-consumer)"),
            "the source says `competing`, but all daemons except one get nothing",
            "take `competing` out: the queue already lets one daemon follow another, in order",
        );
    }
    if let Some(text) = queue.argument("x-consumer-timeout")
        && let Ok(millis) = text.parse()
        && Duration::from_millis(millis) < HOLD
    {
        found.warning(
            "amqp-consumer-timeout",
            format!("{name} gives a consumer {text} ms to ack (x-consumer-timeout)"),
            "while the store is away the daemon holds what it has; past that time the broker closes \
             its channel, and counts each message as delivered once more",
            REDECLARE,
        );
    }
}

fn kind(found: &mut Findings, queue: &QueueSettings, source: &AmqpSource, name: &str) {
    match queue.kind() {
        "stream" => found.error(
            "amqp-queue-stream",
            format!("{name} is a stream"),
            "a stream forgets by age and size, not by ack: after a pause the source would not go on \
             where it stopped",
            "consume from a quorum queue that is bound to the same exchange",
        ),
        "classic" if queue.durable => found.note(
            "amqp-queue-classic",
            format!("{name} is a classic queue"),
            "it lives on one node: while that is down nothing is taken or delivered, and with its \
             disk the messages are lost",
            "in a cluster, use a quorum queue; on a single node this makes little difference",
        ),
        "quorum" if source.prefetch.unwrap_or(PREFETCH) > QUORUM_PREFETCH => found.warning(
            "amqp-prefetch",
            format!(
                "prefetch is {}; a quorum queue delivers {QUORUM_PREFETCH} at most",
                source.prefetch.unwrap_or(PREFETCH)
            ),
            "the rest of it has no effect, or the broker refuses the consumer",
            format!("set prefetch = {QUORUM_PREFETCH} or less"),
        ),
        _ => {}
    }
}

/// What takes messages out of the queue that nobody has consumed.
fn removes(found: &mut Findings, queue: &QueueSettings, name: &str) {
    let dead_lettered = queue.argument("x-dead-letter-exchange");
    let (severity, what_then) = match dead_lettered {
        Some(exchange) => {
            (Severity::Warning, format!("go to exchange `{exchange}` in place of the log"))
        }
        None => (Severity::Error, "are lost".to_owned()),
    };
    if let Some(millis) = queue.argument("x-message-ttl") {
        found.add(
            severity,
            "amqp-queue-ttl",
            format!("messages in {name} expire after {millis} ms (x-message-ttl)"),
            format!("those that wait longer, as in an outage of the daemon, {what_then}"),
            REDECLARE,
        );
    }
    if let Some(millis) = queue.argument("x-expires") {
        found.error(
            "amqp-queue-expires",
            format!("{name} is deleted when it was not used for {millis} ms (x-expires)"),
            "an outage of the daemon that lasts longer loses all that waits, and all that comes \
             after",
            REDECLARE,
        );
    }
    let drops = match queue.argument("x-overflow") {
        Some("reject-publish") => false,
        Some("reject-publish-dlx" | "drop-head") | None => true,
        Some(_) => false,
    };
    let limits = ["x-max-length", "x-max-length-bytes"];
    for limit in limits {
        let Some(most) = queue.argument(limit) else { continue };
        if drops {
            found.add(
                severity,
                "amqp-queue-max-length",
                format!("{name} drops messages beyond {limit} = {most}"),
                format!("at that bound, as in an outage of the daemon, the oldest {what_then}"),
                format!(
                    "set x-overflow = \"reject-publish\", so that publishers are told; {REDECLARE}"
                ),
            );
        } else {
            found.note(
                "amqp-queue-max-length",
                format!("{name} refuses messages beyond {limit} = {most}"),
                "only publishers that use confirms, and try again, lose nothing then",
                "nothing, where all of them do",
            );
        }
    }
    if let Some(limit) = queue.argument("x-delivery-limit")
        && dead_lettered.is_none()
        && limit.parse::<i64>().is_ok_and(|limit| limit >= 0)
    {
        found.warning(
            "amqp-delivery-limit",
            format!("{name} gives a message up after {limit} deliveries (x-delivery-limit)"),
            "it has no dead-letter exchange, so a message that crashes or outages have used up is \
             lost",
            format!("give the queue x-dead-letter-exchange; {REDECLARE}"),
        );
    }
}

/// What waits, and who else takes from it.
pub(super) fn judge_use(
    found: &mut Findings,
    name: &str,
    messages: u32,
    consumers: u32,
    competing: bool,
    single_active: bool,
) {
    if consumers > 1 && !competing && !single_active {
        found.warning(
            "amqp-consumers",
            format!("queue `{name}` has {consumers} consumers, and the source is not `competing`"),
            "each takes a part of the messages: this log lacks the others' part, or order is lost",
            "stop the others (rabbitmqctl list_consumers), give them queues of their own, or set \
             competing = true",
        );
    }
    if messages >= BACKLOG {
        found.note(
            "amqp-backlog",
            format!("{messages} messages wait in queue `{name}`"),
            "the daemon is down, or slower than the publishers",
            "see whether it is running, and what /readyz says; a backlog after an outage goes by \
             itself",
        );
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn judged(arguments: &[(&str, &str)], competing: bool) -> Vec<(&'static str, Severity)> {
        let arguments = arguments.iter().map(|(name, value)| ((*name).into(), (*value).into()));
        let queue = QueueSettings {
            durable: true,
            auto_delete: false,
            arguments: arguments.chain([("x-queue-type".into(), "quorum".into())]).collect(),
        };
        let source: AmqpSource = serde_json::from_value(json!({"queue": "q"})).unwrap();
        let mut found = Findings::about("source:x");
        judge(&mut found, &queue, &source, competing);
        found.into_vec().into_iter().map(|finding| (finding.check, finding.severity)).collect()
    }

    #[test]
    fn arguments_are_judged_together() {
        use Severity::{Error, Note, Warning};
        let dead = ("x-dead-letter-exchange", "dead");
        for (arguments, wanted) in [
            (vec![], None),
            (vec![("x-message-ttl", "1000")], Some(("amqp-queue-ttl", Error))),
            (vec![("x-message-ttl", "1000"), dead], Some(("amqp-queue-ttl", Warning))),
            (vec![("x-max-length", "5")], Some(("amqp-queue-max-length", Error))),
            (
                vec![("x-max-length", "5"), ("x-overflow", "reject-publish")],
                Some(("amqp-queue-max-length", Note)),
            ),
            (vec![("x-delivery-limit", "5")], Some(("amqp-delivery-limit", Warning))),
            (vec![("x-delivery-limit", "5"), dead], None),
            (vec![("x-delivery-limit", "-1")], None),
            (vec![("x-consumer-timeout", "60000")], Some(("amqp-consumer-timeout", Warning))),
            (vec![("x-consumer-timeout", "3600000")], None),
            (vec![("x-single-active-consumer", "true")], None),
        ] {
            assert_eq!(judged(&arguments, false), Vec::from_iter(wanted), "{arguments:?}");
        }
        let single = judged(&[("x-single-active-consumer", "true")], true);
        assert_eq!(single, [("amqp-single-active-consumer", Warning)]);
    }

    #[test]
    fn others_on_the_queue_matter_where_one_is_expected() {
        let used = |consumers, competing, single| {
            let mut found = Findings::about("x");
            judge_use(&mut found, "q", 0, consumers, competing, single);
            found.into_vec().len()
        };
        // One may be a daemon of ours that is running.
        assert_eq!(used(1, false, false), 0);
        assert_eq!(used(2, false, false), 1);
        assert_eq!(used(2, true, false), 0);
        assert_eq!(used(2, false, true), 0);
    }
}
