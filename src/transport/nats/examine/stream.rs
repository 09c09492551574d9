//! A stream, judged as where events come from and as where they go.

use std::time::Duration;

use super::{
    super::{NatsSource, matches},
    info::Stream,
};
use crate::finding::{Findings, Severity};

/// An outage of the daemon that must not cost events.
const OUTAGE: Duration = Duration::from_secs(24 * 60 * 60);

/// A publish that is tried again after a failure must still be known as a copy.
const RETRIES: Duration = Duration::from_secs(60);

/// What may be wrong with it wherever the events go.
fn keeps(found: &mut Findings, stream: &Stream, asked_for_memory: bool) {
    let config = &stream.config;
    let name = &config.name;
    if config.storage == "memory" {
        let severity = if asked_for_memory { Severity::Warning } else { Severity::Error };
        found.add(
            severity,
            "nats-stream-memory",
            format!("stream `{name}` is kept in memory"),
            "what it holds and has confirmed is gone when the server restarts",
            "make it anew with storage `file`: a stream's storage cannot be changed",
        );
    }
    if config.persist_mode == "async" {
        found.warning(
            "nats-stream-persist",
            format!("stream `{name}` has persist_mode `async`"),
            "it confirms messages that it has not written yet; a crash of the server loses them",
            "make it anew with persist_mode `default`",
        );
    }
    if let Some(cluster) = &stream.cluster
        && !cluster.name.is_empty()
    {
        if config.num_replicas <= 1 {
            found.warning(
                "nats-stream-replicas",
                format!("stream `{name}` has one replica, in cluster `{}`", cluster.name),
                "while its server is down nothing is taken or delivered, and with that server's \
                 disk its messages are lost",
                format!("nats stream edit {name} --replicas 3"),
            );
        }
        if cluster.leader.is_empty() {
            found.error(
                "nats-stream-leader",
                format!("stream `{name}` has no leader"),
                "it takes and delivers nothing until more of its replicas are up",
                "start the servers that are down",
            );
        }
        let behind = |replica: &&super::info::Replica| replica.offline || !replica.current;
        let behind: Vec<_> =
            cluster.replicas.iter().filter(behind).map(|replica| &*replica.name).collect();
        if !behind.is_empty() {
            found.warning(
                "nats-stream-replicas",
                format!("replicas of stream `{name}` are down or behind: {}", behind.join(", ")),
                "one more failure can stop the stream",
                "start those servers, or wait until they have caught up",
            );
        }
    }
}

/// The stream of a source.
pub(super) fn of_source(
    found: &mut Findings,
    stream: &Stream,
    source: &NatsSource,
    max_event_bytes: usize,
) {
    let memory = source.create.as_ref().and_then(|create| create.storage.as_deref());
    keeps(found, stream, memory == Some("memory"));
    let config = &stream.config;
    let name = &config.name;
    if let Some(filter) = &source.subject {
        // A mirror has the subjects of its origin; sources add theirs.
        let all_known = config.mirror.is_none() && config.sources.is_none();
        if all_known && !config.subjects.iter().any(|has| overlap(has, filter)) {
            found.error(
                "nats-stream-subjects",
                format!(
                    "stream `{name}` takes `{}`, nothing of which is `{filter}`",
                    config.subjects.join("`, `")
                ),
                "this source never gets a message",
                "add the subject to the stream (nats stream edit --subjects), or correct `subject` \
                 of the source",
            );
        }
    }
    let age = Duration::from_nanos(config.max_age);
    if config.max_age > 0 && age < OUTAGE {
        found.warning(
            "nats-stream-age",
            format!("stream `{name}` removes messages after {}", shown(age)),
            "an outage of the daemon that lasts longer loses what was published in it",
            format!("nats stream edit {name} --max-age 7d, or what the longest outage may be"),
        );
    }
    if config.max_msgs_per_subject > 0 {
        let most = config.max_msgs_per_subject;
        let severity = if most == 1 { Severity::Error } else { Severity::Warning };
        found.add(
            severity,
            "nats-stream-per-subject",
            format!("stream `{name}` keeps {most} messages a subject (max_msgs_per_subject)"),
            "a later message of a subject removes an earlier one, also one that is not in the log \
             yet",
            format!("nats stream edit {name} --max-msgs-per-subject=-1"),
        );
    }
    if config.allow_msg_ttl {
        found.note(
            "nats-stream-ttl",
            format!("stream `{name}` lets publishers give messages a time to live (allow_msg_ttl)"),
            "such a message is removed when its time is up, in the log or not",
            "nothing, where no publisher of these subjects sets Nats-TTL",
        );
    }
    if config.allow_rollup_hdrs {
        found.note(
            "nats-stream-rollup",
            format!("stream `{name}` lets publishers roll up (allow_rollup_hdrs)"),
            "a message with Nats-Rollup removes all before it, in the log or not",
            "nothing, where no publisher of these subjects sets Nats-Rollup",
        );
    }
    if config.sealed {
        found.warning(
            "nats-stream-sealed",
            format!("stream `{name}` is sealed"),
            "it takes no message any more: nothing new comes through this source",
            "name another stream, or disable the source; sealing cannot be undone",
        );
    }
    if config.no_ack {
        found.warning(
            "nats-stream-no-ack",
            format!("stream `{name}` confirms no publish (no_ack)"),
            "its publishers cannot know what it took, and lose what it did not",
            format!("nats stream edit {name} --ack"),
        );
    }
    if config.sources.as_ref().is_some_and(|sources| !sources.is_empty()) {
        found.note(
            "nats-stream-sources",
            format!("stream `{name}` is put together from other streams"),
            "the order is that of arrival here: messages of one key must come by one of them",
            "nothing, where that is so",
        );
    }
    let largest = u64::try_from(config.max_msg_size).unwrap_or(0);
    if largest > max_event_bytes as u64 {
        found.warning(
            "nats-message-size",
            format!(
                "stream `{name}` takes messages of {largest} bytes (max_msg_size), pulsebus of \
                 {max_event_bytes} (limits.max_event_bytes)"
            ),
            "those in between end in quarantine",
            format!(
                "raise limits.max_event_bytes, or nats stream edit {name} \
                 --max-msg-size={max_event_bytes}"
            ),
        );
    }
}

/// A stream that takes what is published to a destination.
pub(super) fn of_destination(
    found: &mut Findings,
    stream: &Stream,
    carries: &str,
    max_event_bytes: usize,
) {
    keeps(found, stream, false);
    let config = &stream.config;
    let name = &config.name;
    if config.sealed {
        found.error(
            "nats-stream-sealed",
            format!("stream `{name}`, where {carries} go, is sealed"),
            "it refuses every publish",
            "publish to a subject of another stream; sealing cannot be undone",
        );
    }
    if config.no_ack {
        found.error(
            "nats-stream-no-ack",
            format!("stream `{name}`, where {carries} go, confirms no publish (no_ack)"),
            "a publish without a confirmation is tried again and again",
            format!("nats stream edit {name} --ack"),
        );
    }
    let window = Duration::from_nanos(config.duplicate_window);
    if config.duplicate_window > 0 && window < RETRIES {
        found.warning(
            "nats-duplicate-window",
            format!("stream `{name}`, where {carries} go, knows copies for {} only", shown(window)),
            "a publish whose confirmation was lost is published again; after that time the stream \
             keeps both",
            format!("nats stream edit {name} --dupe-window 2m"),
        );
    }
    let largest = u64::try_from(config.max_msg_size).unwrap_or(u64::MAX);
    if largest < max_event_bytes as u64 && config.max_msg_size > 0 {
        found.warning(
            "nats-message-size",
            format!(
                "stream `{name}`, where {carries} go, takes messages of {largest} bytes \
                 (max_msg_size), pulsebus of {max_event_bytes} (limits.max_event_bytes)"
            ),
            "those in between cannot be published there",
            format!("nats stream edit {name} --max-msg-size=-1, or lower limits.max_event_bytes"),
        );
    }
    if config.discard == "new" && config.retention == "limits" && fullness(stream) >= 80 {
        let severity = if fullness(stream) >= 100 { Severity::Error } else { Severity::Warning };
        found.add(
            severity,
            "nats-stream-full",
            format!(
                "stream `{name}`, where {carries} go, is {}% full and discards what is new",
                fullness(stream)
            ),
            "full, it refuses every publish until somebody removes messages",
            format!("nats stream edit {name} --discard old, or with larger limits"),
        );
    }
}

/// How much of its limits a stream has used, in hundredths.
fn fullness(stream: &Stream) -> u64 {
    let (config, state) = (&stream.config, &stream.state);
    let part = |has: u64, most: i64| match u64::try_from(most) {
        Ok(most) if most > 0 => has.saturating_mul(100) / most,
        _ => 0,
    };
    part(state.messages, config.max_msgs).max(part(state.bytes, config.max_bytes))
}

pub(super) fn shown(span: Duration) -> String {
    humantime::format_duration(span).to_string()
}

/// Whether a subject can fall under both.
pub(super) fn overlap(one: &str, other: &str) -> bool {
    let (mut one, mut other) = (one.split('.'), other.split('.'));
    loop {
        match (one.next(), other.next()) {
            (None, None) | (Some(">"), Some(_)) | (Some(_), Some(">")) => return true,
            (Some(a), Some(b)) if a == b || a == "*" || b == "*" => {}
            _ => return false,
        }
    }
}

/// Whether one of these takes all that the subject, wildcards included, stands for.
pub(super) fn covered(subjects: &[String], subject: &str) -> bool {
    subjects.iter().any(|has| has == subject || matches(has, subject))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::finding::Finding;

    fn checks(findings: Findings) -> Vec<(&'static str, Severity)> {
        findings.into_vec().into_iter().map(|f: Finding| (f.check, f.severity)).collect()
    }

    fn judged(
        config: &serde_json::Value,
        cluster: &serde_json::Value,
    ) -> Vec<(&'static str, Severity)> {
        let stream: Stream =
            serde_json::from_value(json!({"config": config, "cluster": cluster})).unwrap();
        let source: NatsSource =
            serde_json::from_value(json!({"stream": "S", "consumer": "c", "subject": "a.b.>"}))
                .unwrap();
        let mut found = Findings::about("source:x");
        of_source(&mut found, &stream, &source, 1_000);
        checks(found)
    }

    #[test]
    fn a_sound_stream_has_no_findings() {
        let sound = json!({
            "name": "S", "subjects": ["a.>"], "retention": "limits", "storage": "file",
            "max_msgs": -1, "max_bytes": -1, "max_msg_size": -1, "max_msgs_per_subject": -1,
            "num_replicas": 3, "duplicate_window": 120_000_000_000_u64, "discard": "old",
        });
        let cluster = json!({"name": "c", "leader": "n1", "replicas": [
            {"name": "n2", "current": true}, {"name": "n3", "current": true},
        ]});
        assert_eq!(judged(&sound, &cluster), []);
    }

    #[test]
    fn a_cluster_that_cannot_take_a_failure_is_told() {
        let config = |replicas| json!({"name": "S", "subjects": ["a.>"], "num_replicas": replicas});
        let one = judged(&config(1), &json!({"name": "c", "leader": "n1"}));
        assert_eq!(one, [("nats-stream-replicas", Severity::Warning)]);
        let leaderless = judged(&config(3), &json!({"name": "c", "leader": "", "replicas": []}));
        assert_eq!(leaderless, [("nats-stream-leader", Severity::Error)]);
        let behind = json!({"name": "c", "leader": "n1", "replicas": [
            {"name": "n2", "current": false}, {"name": "n3", "current": true, "offline": true},
        ]});
        let behind = judged(&config(3), &behind);
        assert_eq!(behind, [("nats-stream-replicas", Severity::Warning)]);
    }

    #[test]
    fn what_newer_servers_say_is_understood() {
        let config = json!({
            "name": "S", "subjects": ["a.>"], "allow_msg_ttl": true, "persist_mode": "async",
        });
        let found = judged(&config, &json!(null));
        assert_eq!(
            found,
            [("nats-stream-persist", Severity::Warning), ("nats-stream-ttl", Severity::Note)]
        );
    }

    #[test]
    fn subjects_overlap_where_one_message_could_be_under_both() {
        for (one, other, wanted) in [
            ("a.>", "a.b.c", true),
            ("a.*", "*.b", true),
            ("a.*.c", "a.>", true),
            ("a.b", "a.b.c", false),
            ("a.>", "a", false),
            ("b.>", "a.>", false),
        ] {
            assert_eq!(overlap(one, other), wanted, "{one} {other}");
            assert_eq!(overlap(other, one), wanted, "{other} {one}");
        }
        assert!(covered(&["a.>".to_owned()], "a.*.b"));
        assert!(!covered(&["a.b".to_owned()], "a.*"));
    }
}
