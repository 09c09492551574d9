//! Whether a stream's limits reach messages that its consumer has not acked yet.

use time::OffsetDateTime;

use super::info::{Consumer, GotMessage, Stream};
use crate::finding::{Findings, Severity};

/// `oldest`: the first message that is still to be consumed; `None` where there is none.
pub(super) fn judge(
    found: &mut Findings,
    stream: &Stream,
    consumer: &Consumer,
    oldest: Option<&GotMessage>,
    now: OffsetDateTime,
) {
    removed(found, stream, consumer);
    let Some(oldest) = oldest else { return };
    let (config, state) = (&stream.config, &stream.state);
    let name = &config.name;
    let mut near = |limit: &str, hundredths: u64| {
        if hundredths < 50 {
            return;
        }
        let severity = if hundredths < 90 { Severity::Warning } else { Severity::Error };
        let (why, mend) = if config.discard == "new" && limit != "max_age" {
            (
                "at the limit the stream refuses what is published",
                format!("start or hasten the daemon, or raise {limit} of the stream"),
            )
        } else {
            (
                "at the limit the stream removes the oldest messages, which are not in the log yet",
                format!("raise {limit} of the stream now, then start or hasten the daemon"),
            )
        };
        found.add(
            severity,
            "nats-stream-limits",
            format!(
                "what is still to be consumed takes {hundredths}% of {limit} of stream `{name}`"
            ),
            why,
            mend,
        );
    };
    if config.max_age > 0 {
        let age = u128::try_from((now - oldest.time).whole_nanoseconds()).unwrap_or(0);
        near("max_age", hundredths(age, u128::from(config.max_age)));
    }
    let behind = (state.last_seq + 1).saturating_sub(oldest.seq).min(state.messages);
    if let Ok(most @ 1..) = u128::try_from(config.max_msgs) {
        near("max_msgs", hundredths(u128::from(behind), most));
    }
    if let Ok(most @ 1..) = u128::try_from(config.max_bytes) {
        let share = u128::from(state.bytes) * u128::from(behind);
        near("max_bytes", hundredths(share / u128::from(state.messages.max(1)), most));
    }
}

/// Messages that went before they were acked. With a filter they may have been others' messages,
/// and elsewhere an ack itself removes.
fn removed(found: &mut Findings, stream: &Stream, consumer: &Consumer) {
    let limits = matches!(&*stream.config.retention, "" | "limits");
    if !limits || !consumer.config.filters().is_empty() || consumer.delivered.consumer_seq == 0 {
        return;
    }
    let (acked, first) = (consumer.ack_floor.stream_seq, stream.state.first_seq);
    if first > acked + 1 {
        found.error(
            "nats-events-removed",
            format!(
                "messages {} to {} of stream `{}` were removed before they were acked",
                acked + 1,
                first - 1,
                stream.config.name
            ),
            "by a limit of the stream, or by a person; those that the log does not have are lost",
            "have them published again where their publishers can; raise the limits, so that an \
             outage fits",
        );
    }
}

fn hundredths(part: u128, whole: u128) -> u64 {
    u64::try_from(part.saturating_mul(100) / whole.max(1)).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};
    use time::{Duration, macros::datetime};

    use super::*;

    const NOW: OffsetDateTime = datetime!(2026-01-02 00:00 UTC);

    fn judged(config: &Value, state: &Value, consumer: Value, oldest: Option<u64>) -> Vec<String> {
        let stream: Stream =
            serde_json::from_value(json!({"config": config, "state": state})).unwrap();
        let consumer: Consumer = serde_json::from_value(consumer).unwrap();
        let oldest = oldest.map(|seq| GotMessage { seq, time: NOW - Duration::hours(12) });
        let mut found = Findings::about("x");
        judge(&mut found, &stream, &consumer, oldest.as_ref(), NOW);
        let shown = |f: crate::finding::Finding| format!("{} {}", f.severity.as_str(), f.check);
        found.into_vec().into_iter().map(shown).collect()
    }

    #[test]
    fn a_limit_is_near_when_half_of_it_waits() {
        let state = json!({"messages": 100, "bytes": 1_000, "first_seq": 1, "last_seq": 100});
        let consumer = json!({"config": {"filter_subject": "a"}});
        let all = |config: &Value, oldest| judged(config, &state, consumer.clone(), Some(oldest));
        let hour = 3_600_000_000_000_u64;
        assert_eq!(all(&json!({"max_age": 25 * hour}), 1), [""; 0]);
        assert_eq!(all(&json!({"max_age": 24 * hour}), 1), ["warning nats-stream-limits"]);
        assert_eq!(all(&json!({"max_age": 13 * hour}), 1), ["error nats-stream-limits"]);
        assert_eq!(all(&json!({"max_msgs": 100, "max_bytes": 1_000}), 52), [""; 0]);
        assert_eq!(all(&json!({"max_msgs": 100}), 51), ["warning nats-stream-limits"]);
        assert_eq!(all(&json!({"max_bytes": 1_000}), 11), ["error nats-stream-limits"]);
        assert_eq!(all(&json!({"max_msgs": -1, "max_bytes": -1}), 1), [""; 0]);
        let nothing = judged(&json!({"max_msgs": 100}), &state, consumer.clone(), None);
        assert_eq!(nothing, [""; 0]);
    }

    #[test]
    fn what_went_unacked_is_told_where_that_is_sure() {
        let state = json!({"messages": 5, "first_seq": 96, "last_seq": 100});
        let consumer = |filter: &str, acked: u64| {
            json!({
                "config": {"filter_subject": filter},
                "delivered": {"consumer_seq": 3}, "ack_floor": {"stream_seq": acked},
            })
        };
        let all = |consumer| judged(&json!({}), &state, consumer, None);
        assert_eq!(all(consumer("", 94)), ["error nats-events-removed"]);
        assert_eq!(all(consumer("", 95)), [""; 0]);
        assert_eq!(all(consumer("a", 3)), [""; 0]);
    }
}
