//! Pipelined publishes, each confirmed by the stream that took it.

use std::{collections::VecDeque, sync::Arc};

use async_nats::{
    Client, HeaderMap, HeaderName, HeaderValue, StatusCode, Subject, Subscriber,
    client::PublishErrorKind,
};
use async_trait::async_trait;
use futures_util::StreamExt as _;
use serde::Deserialize;
use tokio::{sync::RwLock, time::timeout};

use super::{connect::Link, is_subject};
use crate::{
    event::Headers,
    transport::{Outbound, PublishError, Publisher},
};

/// Messages sent and not confirmed, at most, in one call: far below what a subscription buffers.
const WINDOW: usize = 4_000;

const MESSAGE_ID: HeaderName = HeaderName::from_static("Nats-Msg-Id");

/// JetStream: the message is larger than the stream takes.
const MESSAGE_TOO_LARGE: u16 = 10_054;

pub(super) struct NatsPublisher {
    link: Arc<Link>,
    /// Whether it is closed; read-locked while a call is under way.
    closed: RwLock<bool>,
}

impl NatsPublisher {
    pub(super) fn new(link: Arc<Link>) -> Self {
        Self { link, closed: RwLock::new(false) }
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
        let mut call = match Call::new(live.client.clone(), messages.len()).await {
            Ok(call) => call,
            Err(reason) => return unavailable(messages.len(), &reason),
        };
        let ended = tokio::select! {
            ended = call.run(messages, self.link.options.timeout) => ended,
            reason = live.down() => Err(reason),
        };
        if ended.is_err() && !live.is_down() {
            // It looks alive and does not answer; the next call has another.
            self.link.discard(&live);
        }
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
    client: Client,
    inbox: String,
    answers: Subscriber,
    results: Vec<Option<Result<(), PublishError>>>,
    waiting: usize,
}

impl Call {
    async fn new(client: Client, messages: usize) -> Result<Self, String> {
        let inbox = client.new_inbox();
        let answers = client
            .subscribe(format!("{inbox}.*"))
            .await
            .map_err(|_| "the connection to NATS was lost".to_owned())?;
        Ok(Self { client, inbox, answers, results: vec![None; messages], waiting: 0 })
    }

    /// Publishes and waits for the answers; the error says why the rest is not known.
    async fn run(
        &mut self,
        messages: Vec<Outbound>,
        patience: std::time::Duration,
    ) -> Result<(), String> {
        let mut messages: VecDeque<_> = messages.into_iter().enumerate().collect();
        while let Some((n, message)) = messages.pop_front() {
            let sent = match prepare(message) {
                Ok((subject, headers, body)) => {
                    let reply = format!("{}.{n}", self.inbox);
                    self.client
                        .publish_with_reply_and_headers(subject, reply, headers, body)
                        .await
                        .map_err(|error| match error.kind() {
                            PublishErrorKind::MaxPayloadExceeded => {
                                Some(PublishError::Refused(format!(
                                    "larger than the server's max_payload of {} bytes",
                                    self.client.max_payload()
                                )))
                            }
                            PublishErrorKind::InvalidSubject => {
                                Some(PublishError::Refused("the subject is none".to_owned()))
                            }
                            PublishErrorKind::Send => None,
                        })
                }
                Err(reason) => Err(Some(PublishError::Refused(reason))),
            };
            match sent {
                Ok(()) => self.waiting += 1,
                Err(Some(error)) => self.results[n] = Some(Err(error)),
                Err(None) => return Err("the connection to NATS was lost".to_owned()),
            }
            while self.waiting >= WINDOW {
                self.answer(patience).await?;
            }
        }
        while self.waiting > 0 {
            self.answer(patience).await?;
        }
        Ok(())
    }

    async fn answer(&mut self, patience: std::time::Duration) -> Result<(), String> {
        let answer = timeout(patience, self.answers.next())
            .await
            .map_err(|_| format!("no confirmation within {patience:?}"))?
            .ok_or_else(|| "the connection to NATS ended".to_owned())?;
        let number = answer.subject.rsplit_once('.').and_then(|(_, n)| n.parse::<usize>().ok());
        if let Some(result) = number.and_then(|n| self.results.get_mut(n))
            && result.is_none()
        {
            *result = Some(confirmation(&answer));
            self.waiting -= 1;
        }
        Ok(())
    }

    fn results(self, rest: Option<String>) -> Vec<Result<(), PublishError>> {
        let rest = rest.unwrap_or_else(|| "no confirmation came".to_owned());
        self.results
            .into_iter()
            .map(|result| result.unwrap_or_else(|| Err(PublishError::Unavailable(rest.clone()))))
            .collect()
    }
}

/// What the answer to a publish says. A duplicate is in the stream already: success.
fn confirmation(answer: &async_nats::Message) -> Result<(), PublishError> {
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
        return Err(PublishError::Failed("no stream takes this subject".to_owned()));
    }
    match serde_json::from_slice(&answer.payload) {
        Ok(Confirmation { error: Some(refusal), .. }) => {
            let reason = format!("the stream does not take it: {}", refusal.description);
            Err(match refusal {
                Refusal { err_code: MESSAGE_TOO_LARGE, .. } => PublishError::Refused(reason),
                Refusal { code: 503, .. } => PublishError::Unavailable(reason),
                _ => PublishError::Failed(reason),
            })
        }
        Ok(Confirmation { stream: Some(_), error: None }) => Ok(()),
        Ok(Confirmation { stream: None, error: None }) | Err(_) => Err(PublishError::Failed(
            "something that is no stream answers on this subject".to_owned(),
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
