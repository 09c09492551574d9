//! What the server says, as far as it is judged. Read leniently: newer servers add fields, older
//! ones leave some out; what is not said is as the server has it by default.

use serde::Deserialize;

use crate::finding::{Findings, Severity};

/// Of `STREAM.INFO`.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct Stream {
    pub(super) config: StreamConfig,
    #[serde(default)]
    pub(super) state: StreamState,
    #[serde(default)]
    pub(super) cluster: Option<Cluster>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct StreamConfig {
    pub(super) name: String,
    pub(super) subjects: Vec<String>,
    pub(super) retention: String,
    pub(super) storage: String,
    pub(super) discard: String,
    pub(super) num_replicas: u64,
    pub(super) max_msgs: i64,
    pub(super) max_bytes: i64,
    /// Nanoseconds; 0: no limit.
    pub(super) max_age: u64,
    pub(super) max_msgs_per_subject: i64,
    pub(super) max_msg_size: i64,
    /// Nanoseconds.
    pub(super) duplicate_window: u64,
    pub(super) no_ack: bool,
    pub(super) sealed: bool,
    pub(super) allow_rollup_hdrs: bool,
    /// From 2.11 on.
    pub(super) allow_msg_ttl: bool,
    /// From 2.12 on: `async` confirms before it has written.
    pub(super) persist_mode: String,
    pub(super) mirror: Option<serde_json::Value>,
    pub(super) sources: Option<Vec<serde_json::Value>>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct StreamState {
    pub(super) messages: u64,
    pub(super) bytes: u64,
    pub(super) first_seq: u64,
    pub(super) last_seq: u64,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct Cluster {
    pub(super) name: String,
    pub(super) leader: String,
    pub(super) replicas: Vec<Replica>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct Replica {
    pub(super) name: String,
    pub(super) current: bool,
    pub(super) offline: bool,
}

/// Of `CONSUMER.INFO` and `CONSUMER.LIST`.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct Consumer {
    #[serde(default)]
    pub(super) name: String,
    pub(super) config: ConsumerConfig,
    #[serde(default)]
    pub(super) delivered: Sequences,
    #[serde(default)]
    pub(super) ack_floor: Sequences,
    #[serde(default)]
    pub(super) num_pending: u64,
    /// From 2.11 on.
    #[serde(default)]
    pub(super) paused: bool,
}

#[derive(Debug, Clone, Copy, Default, Deserialize)]
#[serde(default)]
pub(super) struct Sequences {
    pub(super) consumer_seq: u64,
    pub(super) stream_seq: u64,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct ConsumerConfig {
    pub(super) durable_name: String,
    pub(super) ack_policy: String,
    pub(super) deliver_subject: String,
    pub(super) deliver_policy: String,
    pub(super) replay_policy: String,
    pub(super) filter_subject: String,
    /// From 2.10 on.
    pub(super) filter_subjects: Vec<String>,
    pub(super) headers_only: bool,
    /// Nanoseconds.
    pub(super) ack_wait: u64,
    /// Nanoseconds; where there are any, the first takes the place of `ack_wait`.
    pub(super) backoff: Vec<u64>,
    pub(super) max_deliver: i64,
    pub(super) max_ack_pending: i64,
    pub(super) max_waiting: i64,
    /// Nanoseconds; 0: never.
    pub(super) inactive_threshold: u64,
    pub(super) mem_storage: bool,
    pub(super) num_replicas: u64,
}

impl ConsumerConfig {
    /// The subjects it delivers; none: all of its stream.
    pub(super) fn filters(&self) -> Vec<&str> {
        match (&*self.filter_subject, &self.filter_subjects[..]) {
            ("", several) => several.iter().map(String::as_str).collect(),
            (one, _) => vec![one],
        }
    }
}

/// Of `STREAM.NAMES`.
#[derive(Debug, Deserialize)]
pub(super) struct Names {
    /// `null` for none.
    pub(super) streams: Option<Vec<String>>,
}

/// Of `CONSUMER.LIST`.
#[derive(Debug, Deserialize)]
pub(super) struct Consumers {
    /// `null` for none.
    pub(super) consumers: Option<Vec<Consumer>>,
}

/// Of `STREAM.MSG.GET`.
#[derive(Debug, Deserialize)]
pub(super) struct Got {
    pub(super) message: GotMessage,
}

#[derive(Debug, Deserialize)]
pub(super) struct GotMessage {
    pub(super) seq: u64,
    #[serde(with = "time::serde::rfc3339")]
    pub(super) time: time::OffsetDateTime,
}

/// Of `INFO`.
#[derive(Debug, Deserialize)]
pub(super) struct Account {
    #[serde(default)]
    storage: u64,
    #[serde(default)]
    streams: i64,
    #[serde(default)]
    consumers: i64,
    limits: AccountLimits,
}

/// Zero and less: no limit.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct AccountLimits {
    max_storage: i64,
    max_streams: i64,
    max_consumers: i64,
}

impl Account {
    /// How near the account is to what it may use.
    pub(super) fn judge(&self, found: &mut Findings) {
        let limit = u64::try_from(self.limits.max_storage).unwrap_or(0);
        // In hundredths, without floats: both may be very large.
        let used = u128::from(self.storage) * 100 / u128::from(limit.max(1));
        if limit > 0 && used >= 80 {
            let severity = if used >= 95 { Severity::Error } else { Severity::Warning };
            found.add(
                severity,
                "nats-account-storage",
                format!("the account uses {} of {limit} bytes of file storage", self.storage),
                "at the limit JetStream refuses every publish to this account",
                "raise the account's max_file, or lower what its streams keep",
            );
        }
        let full = |has: i64, most: i64| most > 0 && has >= most;
        for (what, has, most) in [
            ("streams", self.streams, self.limits.max_streams),
            ("consumers", self.consumers, self.limits.max_consumers),
        ] {
            if full(has, most) {
                found.note(
                    "nats-account-count",
                    format!("the account has all {most} {what} that it may have"),
                    "one that is deleted can be made again; another cannot be made",
                    "raise the account's limit, or delete those that nobody uses",
                );
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn an_account_is_judged_by_how_full_it_is() {
        let judge = |used: u64| {
            let account: Account = serde_json::from_value(json!({
                "storage": used, "limits": {"max_storage": 1_000, "max_streams": -1},
            }))
            .unwrap();
            let mut found = Findings::about("x");
            account.judge(&mut found);
            found.into_vec().first().map(|finding| finding.severity)
        };
        assert_eq!(judge(799), None);
        assert_eq!(judge(800), Some(Severity::Warning));
        assert_eq!(judge(950), Some(Severity::Error));
    }
}
