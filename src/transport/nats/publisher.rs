//! Pipelined publishes, each confirmed by the stream that took it.

use std::{
    collections::{HashSet, VecDeque},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use async_nats::{
    HeaderMap, HeaderName, HeaderValue, StatusCode, Subject, Subscriber, client::PublishErrorKind,
};
use async_trait::async_trait;
use futures_util::StreamExt as _;
use serde::Deserialize;
use tokio::{
    sync::RwLock,
    time::{sleep, timeout},
};

use super::{
    connect::{Link, Live, Refusals, denied},
    is_subject,
};
use crate::{
    event::Headers,
    transport::{Outbound, PublishError, Publisher},
};

/// Messages sent and not confirmed, at most, in one call: far below what a subscription buffers.
const WINDOW: usize = 4_000;

/// The same while the server refuses subjects. It says so once for each message, apart from the
/// answers, and of many at once the client drops some.
const WINDOW_OF_REFUSED: usize = 32;

/// How long nothing may be heard once a subject has been refused: then what was said of the rest
/// has been dropped.
const QUIET: Duration = Duration::from_secs(1);

const MESSAGE_ID: HeaderName = HeaderName::from_static("Nats-Msg-Id");

/// JetStream: the message is larger than the stream takes.
const MESSAGE_TOO_LARGE: u16 = 10_054;

/// JetStream: the stream could not store it.
const STORE_FAILED: u16 = 10_077;

pub(super) struct NatsPublisher {
    link: Arc<Link>,
    /// Whether it is closed; read-locked while a call is under way.
    closed: RwLock<bool>,
    /// The server refused a subject in the last call.
    refusing: AtomicBool,
    /// No answer could reach the last call.
    deaf: AtomicBool,
}

impl NatsPublisher {
    pub(super) fn new(link: Arc<Link>) -> Self {
        Self {
            link,
            closed: RwLock::new(false),
            refusing: AtomicBool::new(false),
            deaf: AtomicBool::new(false),
        }
    }
}

#[async_trait]
impl Publisher for NatsPublisher {
    async fn publish(&self, messages: Vec<Outbound>) -> Vec<Result<(), PublishError>> {
        let closed = self.closed.read().await;
        if *closed {
            return unavailable(messages.len(), "the publisher is closed");
        }
        let live = match self.link.live().await {
            Ok(live) => live,
            Err(fault) => {
                return unavailable(
                    messages.len(),
                    fault.into_state().reason().unwrap_or_default(),
                );
            }
        };
        let mut call = match Call::new(&live, messages.len()).await {
            Ok(call) => call,
            Err(reason) => return unavailable(messages.len(), &reason),
        };
        if self.deaf.load(Ordering::Relaxed)
            && let Ok(reason) = timeout(QUIET, live.down()).await
        {
            // It would be taken, and we would never know: copies without end.
            return unavailable(messages.len(), &reason);
        }
        call.careful = self.refusing.load(Ordering::Relaxed);
        let ended = tokio::select! {
            ended = call.run(messages, self.link.options.timeout) => ended,
            reason = live.down() => Err(End::Lost(reason)),
        };
        if matches!(ended, Err(End::Lost(_))) && !live.is_down() {
            // It looks alive and does not answer; the next call has another.
            self.link.discard(&live);
        }
        self.refusing.store(!call.refused.is_empty(), Ordering::Relaxed);
        self.deaf.store(live.is_deaf(), Ordering::Relaxed);
        drop(closed);
        call.results(ended.err())
    }

    async fn close(&self) {
        *self.closed.write().await = true;
        if let Some(live) = self.link.latest() {
            self.link.discard(&live);
        }
    }
}

fn unavailable(messages: usize, reason: &str) -> Vec<Result<(), PublishError>> {
    vec![Err(PublishError::Unavailable(reason.to_owned())); messages]
}

/// One call: an inbox of its own, whose last token tells which message an answer is for.
struct Call {
    live: Live,
    inbox: String,
    answers: Subscriber,
    refusals: Refusals,
    results: Vec<Option<Result<(), PublishError>>>,
    /// Where those that wait for an answer went.
    sent: Vec<Option<Subject>>,
    waiting: usize,
    /// What the server has refused in this call.
    refused: HashSet<String>,
    /// Few at a time: the server refuses some.
    careful: bool,
}

/// Why a call ended before every message had its answer.
enum End {
    /// The connection is not to be used again.
    Lost(String),
    /// The server's word on some messages was dropped. The next call is more careful.
    Unheard,
}

impl Call {
    async fn new(live: &Live, messages: usize) -> Result<Self, String> {
        let inbox = live.client.new_inbox();
        let answers = live
            .client
            .subscribe(format!("{inbox}.*"))
            .await
            .map_err(|_| "the connection to NATS was lost".to_owned())?;
        Ok(Self {
            live: live.clone(),
            inbox,
            answers,
            refusals: live.refusals(),
            results: vec![None; messages],
            sent: vec![None; messages],
            waiting: 0,
            refused: HashSet::new(),
            careful: false,
        })
    }

    /// Publishes and waits for the answers; the error says why the rest is not known.
    async fn run(&mut self, messages: Vec<Outbound>, patience: Duration) -> Result<(), End> {
        let mut messages: VecDeque<_> = messages.into_iter().enumerate().collect();
        while let Some((n, message)) = messages.pop_front() {
            match self.send(n, message).await {
                Ok(()) => self.waiting += 1,
                Err(Some(error)) => self.results[n] = Some(Err(error)),
                Err(None) => return Err(End::Lost("the connection to NATS was lost".to_owned())),
            }
            while self.waiting >= self.window() {
                self.answer(patience).await?;
            }
        }
        while self.waiting > 0 {
            self.answer(patience).await?;
        }
        Ok(())
    }

    fn window(&self) -> usize {
        if self.careful || !self.refused.is_empty() { WINDOW_OF_REFUSED } else { WINDOW }
    }

    /// The error is `None` where the connection is lost.
    async fn send(&mut self, n: usize, message: Outbound) -> Result<(), Option<PublishError>> {
        let (subject, headers, body) = prepare(message).map_err(PublishError::Refused)?;
        if self.refused.contains(subject.as_str()) {
            return Err(Some(PublishError::Failed(denied(&subject))));
        }
        let reply = format!("{}.{n}", self.inbox);
        let client = &self.live.client;
        let sent = client.publish_with_reply_and_headers(subject.clone(), reply, headers, body);
        sent.await.map_err(|error| match error.kind() {
            PublishErrorKind::MaxPayloadExceeded => Some(PublishError::Refused(format!(
                "larger, with its headers, than the server's max_payload of {} bytes",
                client.max_payload()
            ))),
            PublishErrorKind::InvalidSubject => {
                Some(PublishError::Refused("the subject is none".to_owned()))
            }
            PublishErrorKind::Send => None,
        })?;
        self.sent[n] = Some(subject);
        Ok(())
    }

    /// Waits for the next word of the server.
    async fn answer(&mut self, patience: Duration) -> Result<(), End> {
        let heard = !self.refused.is_empty();
        tokio::select! {
            biased;
            answer = self.answers.next() => match answer {
                Some(answer) => self.answered(&answer),
                None => return Err(End::Lost("the connection to NATS ended".to_owned())),
            },
            subject = self.refusals.next() => self.refuse(&subject),
            () = sleep(if heard { QUIET.min(patience) } else { patience }) => {
                return Err(if heard {
                    End::Unheard
                } else {
                    End::Lost(format!("no confirmation within {patience:?}"))
                });
            }
        }
        Ok(())
    }

    fn answered(&mut self, answer: &async_nats::Message) {
        let number = answer.subject.rsplit_once('.').and_then(|(_, n)| n.parse::<usize>().ok());
        if let Some(n) = number
            && let Some(Some(subject)) = self.sent.get(n)
            && self.results[n].is_none()
        {
            self.results[n] = Some(confirmation(answer, subject));
            self.waiting -= 1;
        }
    }

    /// Nothing will come for those that went to this subject.
    fn refuse(&mut self, subject: &str) {
        for (result, sent) in self.results.iter_mut().zip(&self.sent) {
            if result.is_none() && sent.as_ref().is_some_and(|sent| sent.as_str() == subject) {
                *result = Some(Err(PublishError::Failed(denied(subject))));
                self.waiting -= 1;
                self.refused.insert(subject.to_owned());
            }
        }
    }

    fn results(self, end: Option<End>) -> Vec<Result<(), PublishError>> {
        let rest = match end {
            Some(End::Lost(reason)) => reason,
            Some(End::Unheard) => "the server refuses subjects, and what it said of this one was \
                                   lost; trying again"
                .to_owned(),
            None => "no confirmation came".to_owned(),
        };
        self.results
            .into_iter()
            .map(|result| result.unwrap_or_else(|| Err(PublishError::Unavailable(rest.clone()))))
            .collect()
    }
}

/// What the answer to a publish says. A duplicate is in the stream already: success.
fn confirmation(answer: &async_nats::Message, subject: &str) -> Result<(), PublishError> {
    #[derive(Deserialize)]
    struct Confirmation {
        stream: Option<String>,
        error: Option<Refusal>,
    }
    #[derive(Deserialize)]
    struct Refusal {
        #[serde(default)]
        code: u16,
        #[serde(default)]
        err_code: u16,
        #[serde(default)]
        description: String,
    }
    if answer.status == Some(StatusCode::NO_RESPONDERS) {
        return Err(PublishError::Failed(format!(
            "no stream takes subject `{subject}`: create one that does, or correct the subject"
        )));
    }
    match serde_json::from_slice(&answer.payload) {
        Ok(Confirmation { error: Some(refusal), .. }) => {
            let reason = format!("the stream does not take it: {}", refusal.description);
            Err(match refusal {
                Refusal { err_code: MESSAGE_TOO_LARGE, .. } => PublishError::Refused(reason),
                // Full, and set to refuse what is new (`maximum messages exceeded`): others are not.
                Refusal { err_code: STORE_FAILED, .. }
                    if refusal.description.starts_with("maximum ") =>
                {
                    PublishError::Failed(reason)
                }
                Refusal { code: 503, .. } => PublishError::Unavailable(reason),
                _ => PublishError::Failed(reason),
            })
        }
        Ok(Confirmation { stream: Some(_), error: None }) => Ok(()),
        Ok(Confirmation { stream: None, error: None }) | Err(_) => Err(PublishError::Failed(
            format!("something that is no stream answers on subject `{subject}`"),
        )),
    }
}

fn prepare(message: Outbound) -> Result<(Subject, HeaderMap, bytes::Bytes), String> {
    if !is_subject(&message.address, false) {
        return Err(format!("`{}` is no subject to publish to", message.address));
    }
    let mut headers = carried(&message.headers)?;
    if !message.id.is_empty() {
        let id: HeaderValue = message
            .id
            .parse()
            .map_err(|_| "the event id has a line break and cannot be a header".to_owned())?;
        headers.insert(MESSAGE_ID, id);
    }
    Ok((Subject::from(String::from(message.address)), headers, message.body))
}

/// The headers that go along: what has a text form, without properties of AMQP (but the content
/// type) and without `Nats-…`, which would tell the server what to do.
fn carried(from: &Headers) -> Result<HeaderMap, String> {
    let mut headers = HeaderMap::new();
    for (name, value) in from.iter() {
        let reserved = name.get(..5).is_some_and(|start| start.eq_ignore_ascii_case("nats-"));
        let name = match name {
            ":content_type" if from.get("content-type").is_none() => "Content-Type",
            _ if reserved || name.starts_with(':') => continue,
            name => name,
        };
        let Some(value) = value.to_text() else { continue };
        if name.is_empty() {
            // The client would send it.
            return Err("a NATS header needs a name".to_owned());
        }
        let name: HeaderName =
            name.parse().map_err(|_| format!("`{name}` cannot be the name of a NATS header"))?;
        let value: HeaderValue =
            value.parse().map_err(|_| format!("the value of header `{name}` has a line break"))?;
        headers.append(name, value);
    }
    Ok(headers)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::HeaderValue as Value;

    #[test]
    fn C2_headers_go_along_but_for_what_would_command_the_server() {
        let mut from = Headers::new();
        from.push("Trace", "a");
        from.push("Trace", "b");
        from.push("count", Value::Int32(7));
        from.push("raw", Value::Bytes(vec![1]));
        from.push("nats-expected-stream", "X");
        from.push(":content_type", "application/json");
        from.push(":priority", Value::Uint8(1));
        let headers = carried(&from).unwrap();
        let all = |name: &str| -> Vec<String> {
            let values = headers.get_all(name);
            values.map(|value| value.as_str().to_owned()).collect()
        };
        assert_eq!(all("Trace"), ["a", "b"]);
        assert_eq!(all("count"), ["7"]);
        assert_eq!(all("Content-Type"), ["application/json"]);
        assert_eq!(headers.len(), 3);
    }

    #[test]
    fn P3_what_breaks_the_protocol_is_refused() {
        for (name, value) in [("a b", "x"), ("a:b", "x"), ("", "x"), ("a", "x\r\ny"), ("a", "\n")] {
            let mut from = Headers::new();
            from.push(name, value);
            assert!(carried(&from).is_err(), "{name:?} {value:?}");
        }
    }
}
