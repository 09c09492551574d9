//! The JetStream API, as far as it is needed: requests and answers in JSON.
//!
//! Written against nats-server 2.9 and later; answers are read leniently, since newer servers
//! add fields and older ones leave some out.

use std::{sync::Arc, time::Duration};

use async_nats::{RequestErrorKind, client::Request};
use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use bytes::Bytes;
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::{Value, json};

use super::{
    NatsSource, NatsStreamCreate,
    connect::{Fault, Live, denied},
};
use crate::event::{HeaderValue, Headers};

const NO_MESSAGE: u16 = 10_037;
pub(super) const STREAM_NOT_FOUND: u16 = 10_059;
pub(super) const CONSUMER_NOT_FOUND: u16 = 10_014;

/// Requests to JetStream over one connection.
#[derive(Debug, Clone)]
pub(super) struct Api {
    pub(super) live: Live,
    prefix: Arc<str>,
    timeout: Duration,
}

#[derive(Debug, Deserialize)]
pub(super) struct StreamInfo {
    /// When it was made: what tells it from another of the same name.
    pub(super) created: String,
    pub(super) state: StreamState,
    pub(super) config: StreamConfig,
}

#[derive(Debug, Deserialize)]
pub(super) struct StreamState {
    #[serde(default)]
    pub(super) messages: u64,
    #[serde(default)]
    pub(super) first_seq: u64,
    #[serde(default)]
    pub(super) last_seq: u64,
}

#[derive(Debug, Deserialize)]
pub(super) struct StreamConfig {
    #[serde(default)]
    pub(super) retention: String,
    #[serde(default)]
    subjects: Vec<String>,
    #[serde(default)]
    storage: String,
    #[serde(default)]
    num_replicas: usize,
}

impl StreamConfig {
    /// The first setting that is not as `create` asks for; what it does not mention may be
    /// anything.
    pub(super) fn difference(&self, asked: &NatsStreamCreate) -> Option<String> {
        let covered = |wanted: &&String| {
            !self.subjects.iter().any(|has| has == *wanted || super::matches(has, wanted))
        };
        if let Some(wanted) = asked.subjects.iter().find(covered) {
            let has = self.subjects.join("`, `");
            return Some(format!("subjects are `{has}`, expected `{wanted}` among them"));
        }
        let differs = |field: &str, is: &str, wanted: &str| {
            (is != wanted).then(|| format!("{field} is `{is}`, expected `{wanted}`"))
        };
        let text = |field, is: &str, wanted: &Option<String>| {
            wanted.as_deref().and_then(|wanted| differs(field, is, wanted))
        };
        text("retention", &self.retention, &asked.retention)
            .or_else(|| text("storage", &self.storage, &asked.storage))
            .or_else(|| {
                let wanted = asked.replicas?;
                differs("replicas", &self.num_replicas.to_string(), &wanted.to_string())
            })
    }
}

#[derive(Debug, Deserialize)]
pub(super) struct ConsumerInfo {
    pub(super) config: ConsumerConfig,
    pub(super) delivered: SequencePair,
    pub(super) ack_floor: SequencePair,
    #[serde(default)]
    pub(super) num_ack_pending: u64,
    #[serde(default)]
    pub(super) num_pending: u64,
}

#[derive(Debug, Deserialize)]
pub(super) struct SequencePair {
    #[serde(default)]
    pub(super) consumer_seq: u64,
    #[serde(default)]
    pub(super) stream_seq: u64,
}

#[derive(Debug, Deserialize)]
pub(super) struct ConsumerConfig {
    #[serde(default)]
    pub(super) ack_policy: String,
    #[serde(default)]
    filter_subject: String,
    #[serde(default)]
    filter_subjects: Vec<String>,
    #[serde(default)]
    deliver_subject: String,
    #[serde(default)]
    headers_only: bool,
    #[serde(default)]
    deliver_policy: String,
    #[serde(default)]
    replay_policy: String,
    /// Nanoseconds.
    #[serde(default)]
    ack_wait: u64,
    #[serde(default)]
    pub(super) max_deliver: i64,
    #[serde(default)]
    pub(super) max_ack_pending: i64,
    #[serde(default)]
    pub(super) max_batch: usize,
    #[serde(default)]
    pub(super) max_bytes: usize,
    /// Nanoseconds.
    #[serde(default)]
    max_expires: u64,
}

impl ConsumerConfig {
    pub(super) fn ack_wait(&self) -> Duration {
        if self.ack_wait == 0 { super::ACK_WAIT } else { Duration::from_nanos(self.ack_wait) }
    }

    pub(super) fn max_expires(&self) -> Option<Duration> {
        (self.max_expires > 0).then(|| Duration::from_nanos(self.max_expires))
    }

    /// The first setting that is not as asked for, or that would lose or hold back messages.
    pub(super) fn difference(&self, asked: &NatsSource, competing: bool) -> Option<String> {
        let differs = |field: &str, is: &dyn std::fmt::Display, wanted: &dyn std::fmt::Display| {
            Some(format!("{field} is `{is}`, expected `{wanted}`"))
        };
        let filter = asked.subject.as_deref().unwrap_or_default();
        if self.ack_policy != "explicit" {
            return differs("ack_policy", &self.ack_policy, &"explicit");
        }
        if !self.deliver_subject.is_empty() {
            return differs("deliver_subject", &self.deliver_subject, &"");
        }
        if !self.filter_subjects.is_empty() && self.filter_subjects != [filter] {
            return differs("filter_subjects", &self.filter_subjects.join(", "), &filter);
        }
        if self.filter_subjects.is_empty() && self.filter_subject != filter {
            return differs("filter_subject", &self.filter_subject, &filter);
        }
        if self.headers_only {
            return differs("headers_only", &true, &false);
        }
        // `new` and a start sequence or time are a beginning that somebody chose.
        if matches!(&*self.deliver_policy, "last" | "last_per_subject") {
            return differs("deliver_policy", &self.deliver_policy, &"all");
        }
        if self.replay_policy == "original" {
            return differs("replay_policy", &self.replay_policy, &"instant");
        }
        // A source of one daemon reads what was given up from the stream.
        if competing && self.max_deliver > 0 {
            return differs("max_deliver", &self.max_deliver, &"-1");
        }
        if let Some(ack_wait) = asked.ack_wait
            && ack_wait != self.ack_wait()
        {
            let show = |wait: Duration| humantime::format_duration(wait).to_string();
            return differs("ack_wait", &show(self.ack_wait()), &show(ack_wait));
        }
        if let Some(max) = asked.max_ack_pending
            && max != self.max_ack_pending
        {
            return differs("max_ack_pending", &self.max_ack_pending, &max);
        }
        None
    }
}

/// A message read from a stream by its sequence.
#[derive(Debug)]
pub(super) struct Stored {
    pub(super) sequence: u64,
    pub(super) subject: String,
    pub(super) headers: Headers,
    pub(super) body: Bytes,
}

#[derive(Deserialize)]
struct ApiError {
    #[serde(default)]
    err_code: u16,
    #[serde(default)]
    description: String,
}

/// JetStream's answer to a request.
#[derive(Debug)]
pub(super) enum Said<T> {
    Yes(T),
    No { code: u16, description: String },
}

enum Failure {
    Refused(ApiError),
    Fault(Fault),
}

impl Failure {
    fn into_fault(self, what: &str) -> Fault {
        match self {
            Self::Fault(fault) => fault,
            Self::Refused(error) if error.err_code == STREAM_NOT_FOUND => {
                Fault::Misconfigured("the stream does not exist".to_owned())
            }
            Self::Refused(error) => {
                Fault::Away(format!("JetStream refuses to {what}: {}", error.description))
            }
        }
    }
}

impl Api {
    pub(super) fn new(live: Live, domain: Option<&str>, timeout: Duration) -> Self {
        let prefix = match domain {
            Some(domain) => format!("$JS.{domain}.API").into(),
            None => "$JS.API".into(),
        };
        Self { live, prefix, timeout }
    }

    /// Where a pull consumer takes its requests.
    pub(super) fn pull_subject(&self, source: &NatsSource) -> String {
        format!("{}.CONSUMER.MSG.NEXT.{}.{}", self.prefix, source.stream, source.consumer)
    }

    pub(super) async fn stream(&self, name: &str) -> Result<Option<StreamInfo>, Fault> {
        let info = self.call(&format!("STREAM.INFO.{name}"), &Value::Null).await;
        found(info, STREAM_NOT_FOUND, "describe the stream")
    }

    pub(super) async fn create_stream(
        &self,
        name: &str,
        create: &NatsStreamCreate,
    ) -> Result<StreamInfo, Fault> {
        let config = json!({
            "name": name,
            "subjects": create.subjects,
            "retention": create.retention.as_deref().unwrap_or("limits"),
            "storage": create.storage.as_deref().unwrap_or("file"),
            "num_replicas": create.replicas.unwrap_or(1),
            "discard": "old",
        });
        self.call(&format!("STREAM.CREATE.{name}"), &config).await.map_err(
            |failure| match failure {
                Failure::Refused(error) => Fault::Misconfigured(format!(
                    "stream `{name}` cannot be created as configured: {}",
                    error.description
                )),
                Failure::Fault(fault) => fault,
            },
        )
    }

    pub(super) async fn consumer(
        &self,
        source: &NatsSource,
    ) -> Result<Option<ConsumerInfo>, Fault> {
        let subject = format!("CONSUMER.INFO.{}.{}", source.stream, source.consumer);
        let info = self.call(&subject, &Value::Null).await;
        found(info, CONSUMER_NOT_FOUND, "describe the consumer")
    }

    /// Makes the durable consumer, starting behind `after` or with all there is.
    pub(super) async fn create_consumer(
        &self,
        source: &NatsSource,
        after: Option<u64>,
    ) -> Result<ConsumerInfo, Fault> {
        let ack_wait = source.ack_wait.unwrap_or(super::ACK_WAIT);
        let mut config = json!({
            "durable_name": source.consumer,
            "ack_policy": "explicit",
            "ack_wait": u64::try_from(ack_wait.as_nanos()).unwrap_or(u64::MAX),
            "max_deliver": -1,
            "max_ack_pending": source.max_ack_pending.unwrap_or(super::MAX_ACK_PENDING),
            "replay_policy": "instant",
            "deliver_policy": "all",
        });
        if let Some(subject) = &source.subject {
            config["filter_subject"] = json!(subject);
        }
        if let Some(after) = after {
            config["deliver_policy"] = json!("by_start_sequence");
            config["opt_start_seq"] = json!(after + 1);
        }
        let subject = format!("CONSUMER.DURABLE.CREATE.{}.{}", source.stream, source.consumer);
        let request = json!({"stream_name": source.stream, "config": config});
        self.call(&subject, &request).await.map_err(|failure| match failure {
            Failure::Refused(error) => Fault::Misconfigured(format!(
                "consumer `{}` cannot be created: {}",
                source.consumer, error.description
            )),
            Failure::Fault(fault) => fault,
        })
    }

    /// The message of this sequence, or with `subject` the next one of that subject from there
    /// on; `None` where there is none.
    pub(super) async fn message(
        &self,
        stream: &str,
        sequence: u64,
        subject: Option<&str>,
    ) -> Result<Option<Stored>, Fault> {
        #[derive(Deserialize)]
        struct Answer {
            message: Raw,
        }
        #[derive(Deserialize)]
        struct Raw {
            subject: String,
            seq: u64,
            #[serde(default)]
            hdrs: String,
            #[serde(default)]
            data: String,
        }
        let request = match subject {
            Some(subject) => json!({"seq": sequence, "next_by_subj": subject}),
            None => json!({"seq": sequence}),
        };
        let answer = self.call(&format!("STREAM.MSG.GET.{stream}"), &request).await;
        let Some(Answer { message }) = found(answer, NO_MESSAGE, "read a message")? else {
            return Ok(None);
        };
        let decode = |text: String| {
            BASE64.decode(text).map_err(|error| {
                Fault::Away(format!("JetStream gave message {sequence} in no base64: {error}"))
            })
        };
        Ok(Some(Stored {
            sequence: message.seq,
            subject: message.subject,
            headers: parse_headers(&decode(message.hdrs)?),
            body: decode(message.data)?.into(),
        }))
    }

    /// Sends any request, and gives what was said to it.
    pub(super) async fn ask<T: DeserializeOwned>(
        &self,
        subject: &str,
        request: &Value,
    ) -> Result<Said<T>, Fault> {
        match self.call(subject, request).await {
            Ok(answer) => Ok(Said::Yes(answer)),
            Err(Failure::Refused(ApiError { err_code, description })) => {
                Ok(Said::No { code: err_code, description })
            }
            Err(Failure::Fault(fault)) => Err(fault),
        }
    }

    /// Where requests of this kind go.
    pub(super) fn subject(&self, request: &str) -> String {
        format!("{}.{request}", self.prefix)
    }

    async fn call<T: DeserializeOwned>(
        &self,
        subject: &str,
        request: &Value,
    ) -> Result<T, Failure> {
        #[derive(Deserialize)]
        struct Refusal {
            error: Option<ApiError>,
        }
        let away = |reason: String| Failure::Fault(Fault::Away(reason));
        let payload = match request {
            Value::Null => Bytes::new(),
            request => Bytes::from(request.to_string()),
        };
        let subject = self.subject(subject);
        let request = Request::new().payload(payload).timeout(Some(self.timeout));
        let mut refusals = self.live.refusals();
        let answer = tokio::select! {
            answer = self.live.client.send_request(subject.clone(), request) => answer,
            () = refusals.of(&subject) => {
                return Err(Failure::Fault(Fault::Misconfigured(denied(&subject))));
            }
            // Also where its answers may not come to us.
            reason = self.live.down() => return Err(away(reason)),
        };
        let answer = answer.map_err(|error| {
            Failure::Fault(match error.kind() {
                RequestErrorKind::TimedOut => {
                    Fault::Silent(format!("JetStream did not answer within {:?}", self.timeout))
                }
                RequestErrorKind::NoResponders => Fault::Away(
                    "JetStream is not available (not enabled for this account, or starting)"
                        .to_owned(),
                ),
                _ => Fault::Away("the connection to NATS was lost".to_owned()),
            })
        })?;
        let unreadable = |error: serde_json::Error| {
            away(format!("JetStream gave an unreadable answer: {error}"))
        };
        match serde_json::from_slice(&answer.payload) {
            Ok(answer) => Ok(answer),
            Err(error) => match serde_json::from_slice(&answer.payload).map_err(unreadable)? {
                Refusal { error: Some(refusal) } => Err(Failure::Refused(refusal)),
                Refusal { error: None } => Err(unreadable(error)),
            },
        }
    }
}

fn found<T>(answer: Result<T, Failure>, not_found: u16, what: &str) -> Result<Option<T>, Fault> {
    match answer {
        Ok(value) => Ok(Some(value)),
        Err(Failure::Refused(error)) if error.err_code == not_found => Ok(None),
        Err(failure) => Err(failure.into_fault(what)),
    }
}

/// Headers as they stand in the stream. What cannot be read as such is kept whole, as bytes.
fn parse_headers(block: &[u8]) -> Headers {
    let mut headers: Vec<(Box<str>, Vec<u8>)> = Vec::new();
    let mut whole = true;
    for line in block.split(|byte| *byte == b'\n').skip(1) {
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        if line.is_empty() {
            continue;
        }
        if line[0].is_ascii_whitespace()
            && let Some((_, value)) = headers.last_mut()
        {
            value.extend_from_slice(line);
            continue;
        }
        let colon = line.iter().position(|byte| *byte == b':');
        match colon.and_then(|at| Some((std::str::from_utf8(&line[..at]).ok()?, at))) {
            Some((name, at)) => headers.push((name.into(), line[at + 1..].to_vec())),
            None => whole = false,
        }
    }
    let mut headers: Headers = headers
        .into_iter()
        .map(|(name, value)| {
            let value = match String::from_utf8(value) {
                Ok(text) => HeaderValue::Text(text.trim().to_owned()),
                Err(error) => HeaderValue::Binary(error.into_bytes()),
            };
            (name, value)
        })
        .collect();
    if !whole {
        headers.push(":unreadable", HeaderValue::Binary(block.to_vec()));
    }
    headers
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn C2_headers_repeat_and_keep_their_case() {
        let headers = parse_headers(b"NATS/1.0\r\nA-b: x \r\na-B:y\r\nA-b: long\r\n er\r\n\r\n");
        let all: Vec<_> = headers.iter().map(|(n, v)| (n, v.as_str().unwrap())).collect();
        assert_eq!(all, [("A-b", "x"), ("a-B", "y"), ("A-b", "long er")]);
    }

    #[test]
    fn C2_headers_that_are_none_are_kept_as_bytes() {
        let block = b"NATS/1.0\r\nno colon\r\nok: \xff\r\n\r\n";
        let headers = parse_headers(block);
        assert_eq!(headers.get(":unreadable"), Some(&HeaderValue::Binary(block.to_vec())));
        assert_eq!(headers.get("ok"), Some(&HeaderValue::Binary(b" \xff".to_vec())));
    }
}
