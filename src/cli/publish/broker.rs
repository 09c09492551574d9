//! Straight to a broker or webhook, through a configured transport.

use std::{process::ExitCode, sync::Arc};

use anyhow::{Context as _, anyhow};
use pulsebus::{
    bus::open_transport,
    config::TransportSettings,
    event::{HeaderValue, Headers},
    transport::{Outbound, PublishError, Publisher, Transport},
};
use serde::Deserialize;
use serde_json::json;
use uuid::Uuid;

use super::{
    FAILED, Failure, SettingsArgs, elements,
    input::{Input, Part},
};
use crate::cli::output;

/// Where messages go, as the command line says it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Destination<'a> {
    pub(super) subject: Option<&'a str>,
    pub(super) exchange: Option<&'a str>,
    pub(super) routing_key: Option<&'a str>,
    pub(super) path: Option<&'a str>,
}

pub(super) async fn publish(
    settings: &SettingsArgs,
    name: &str,
    destination: Destination<'_>,
    input: Input,
    json: bool,
) -> Result<ExitCode, Failure> {
    let settings = settings.load()?.settings;
    let Some(transport) = settings.transports.get(name) else {
        let known: Vec<&str> = settings.transports.keys().map(|name| &**name).collect();
        return Err(Failure::Usage(format!(
            "no transport is called `{name}`; the configuration has {}",
            if known.is_empty() { "none".to_owned() } else { known.join(", ") }
        )));
    };
    let template = template(transport.kind(), destination)?;
    let transport = open(name, transport)?;
    let publisher = transport
        .publisher()
        .await
        .with_context(|| format!("failed to open transport `{name}`"))?;
    let result = send(&*publisher, &template, input).await;
    publisher.close().await;
    let (confirmed, error) = result;
    if json {
        let error = error.as_ref().map(|error| format!("{error:#}"));
        output::print(&json!({ "confirmed": confirmed, "error": error }).to_string())?;
    } else {
        output::print(&format!("confirmed {confirmed}"))?;
    }
    match error {
        None => Ok(ExitCode::SUCCESS),
        Some(error) => {
            output::complain(&format!("pulsebus: {error:#}"));
            Ok(ExitCode::from(FAILED))
        }
    }
}

/// The transport that these settings mean.
fn open(name: &str, transport: &TransportSettings) -> Result<Arc<dyn Transport>, Failure> {
    if matches!(transport, TransportSettings::Memory) {
        return Err(Failure::Usage(
            "a memory transport lives within the daemon; publish over HTTP".to_owned(),
        ));
    }
    Ok(open_transport(&name.into(), transport).map_err(anyhow::Error::new)?)
}

/// A message to this place, without its content.
fn template(kind: &str, destination: Destination<'_>) -> Result<Outbound, Failure> {
    let Destination { subject, exchange, routing_key, path } = destination;
    let usage = |text: &str| Err(Failure::Usage(text.to_owned()));
    if path.is_some() && kind != "http" {
        return usage("--path is for a webhook; NATS has --subject, RabbitMQ --routing-key");
    }
    let (address, exchange, content_type) = match kind {
        "amqp" => {
            if subject.is_some() {
                return usage("--subject is for NATS; RabbitMQ has --exchange and --routing-key");
            }
            if routing_key.is_none() && exchange.is_none() {
                return usage(
                    "name where it goes: --exchange and --routing-key, or only --routing-key for \
                     a queue of that name",
                );
            }
            let content_type = (":content_type", HeaderValue::Short("application/json".to_owned()));
            (routing_key.unwrap_or_default(), Some(exchange.unwrap_or_default()), content_type)
        }
        "http" => {
            if subject.is_some() || exchange.is_some() || routing_key.is_some() {
                return usage("a webhook has --path, or nothing for the URL as it is");
            }
            let content_type = ("Content-Type", HeaderValue::from("application/json"));
            (path.unwrap_or_default(), None, content_type)
        }
        _ => {
            if exchange.is_some() || routing_key.is_some() {
                return usage("--exchange and --routing-key are for RabbitMQ; NATS has --subject");
            }
            let Some(subject) = subject else { return usage("name where it goes: --subject") };
            (subject, None, ("Content-Type", HeaderValue::from("application/json")))
        }
    };
    let mut headers = Headers::new();
    headers.push(content_type.0, content_type.1);
    Ok(Outbound {
        id: "".into(),
        address: address.into(),
        exchange: exchange.map(Arc::from),
        headers,
        body: bytes::Bytes::new(),
    })
}

/// Publishes in order and stops at the first message that is not confirmed: what comes behind
/// it must not overtake it. Says how many were confirmed.
async fn send(
    publisher: &dyn Publisher,
    template: &Outbound,
    mut input: Input,
) -> (u64, Option<anyhow::Error>) {
    let mut confirmed = 0;
    loop {
        let part = match input.next().await {
            Ok(Some(part)) => part,
            Ok(None) => return (confirmed, None),
            Err(error) => return (confirmed, Some(error)),
        };
        let messages = match messages(part, template) {
            Ok(messages) => messages,
            Err(error) => return (confirmed, Some(error)),
        };
        for result in publisher.publish(messages).await {
            match result {
                Ok(()) => confirmed += 1,
                Err(error) => {
                    return (confirmed, Some(explain(error, confirmed + 1)));
                }
            }
        }
    }
}

fn explain(error: PublishError, number: u64) -> anyhow::Error {
    let what_now = match &error {
        PublishError::Refused(_) => "it can never be published as it is",
        PublishError::Failed(_) => "check that something takes what is sent there",
        PublishError::Unavailable(_) | PublishError::Later { .. } => {
            "it may have arrived; publishing it again with the same id is safe"
        }
    };
    anyhow!(error).context(format!("message {number} was not confirmed; {what_now}"))
}

/// One message a line, or an element of an array; the bytes as they are written.
fn messages(part: Part, template: &Outbound) -> anyhow::Result<Vec<Outbound>> {
    let message = |body: &str| Outbound {
        id: id(body),
        body: bytes::Bytes::copy_from_slice(body.as_bytes()),
        ..template.clone()
    };
    Ok(match part {
        Part::Lines(lines) => lines.iter().map(|line| message(line)).collect(),
        Part::Document(text) => match elements(&text) {
            Ok(Some(elements)) => elements.iter().map(|element| message(element.get())).collect(),
            Ok(None) => vec![message(&text)],
            Err(Failure::Failed(error)) => return Err(error),
            Err(_) => return Err(anyhow!("failed to read the array of events")),
        },
    })
}

/// The id that stands in the event, so that publishing it again is recognised; else a new one.
fn id(body: &str) -> Box<str> {
    #[derive(Deserialize)]
    struct Identified {
        id: String,
    }
    match serde_json::from_str::<Identified>(body) {
        Ok(Identified { id }) if !id.is_empty() => id.into(),
        _ => Uuid::now_v7().to_string().into(),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    /// Confirms so many messages, then none.
    struct Broker {
        room: usize,
        taken: Mutex<Vec<Outbound>>,
    }

    #[async_trait::async_trait]
    impl Publisher for Broker {
        async fn publish(&self, messages: Vec<Outbound>) -> Vec<Result<(), PublishError>> {
            let mut taken = self.taken.lock().unwrap();
            messages
                .into_iter()
                .map(|message| {
                    if taken.len() == self.room {
                        return Err(PublishError::Failed("no route".to_owned()));
                    }
                    taken.push(message);
                    Ok(())
                })
                .collect()
        }

        async fn close(&self) {}
    }

    const NATS: Destination<'_> =
        Destination { subject: Some("a.b"), exchange: None, routing_key: None, path: None };

    async fn published(text: &str, room: usize) -> (u64, Option<String>, Vec<Outbound>) {
        let broker = Broker { room, taken: Mutex::default() };
        let template = template("nats", NATS).unwrap();
        let (confirmed, error) = send(&broker, &template, Input::text(text.to_owned())).await;
        (confirmed, error.map(|e| format!("{e:#}")), broker.taken.into_inner().unwrap())
    }

    #[tokio::test]
    async fn lines_and_elements_are_messages_byte_for_byte_with_their_own_ids() {
        for text in [
            "{\"id\": \"a\",  \"x\":1e400}\n{\"y\" : 2}",
            "[{\"id\": \"a\",  \"x\":1e400},\n{\"y\" : 2}]",
        ] {
            let (confirmed, error, taken) = published(text, 9).await;
            assert_eq!((confirmed, error), (2, None));
            assert_eq!(taken[0].body, "{\"id\": \"a\",  \"x\":1e400}");
            assert_eq!(taken[1].body, "{\"y\" : 2}");
            assert_eq!(&*taken[0].id, "a");
            assert!(taken[1].id.parse::<Uuid>().is_ok());
            assert_eq!(&*taken[0].address, "a.b");
            assert_eq!(taken[0].headers.content_type(), Some("application/json"));
        }
    }

    #[tokio::test]
    async fn only_what_is_confirmed_counts() {
        let (confirmed, error, _) = published("{}\n{}\n{}", 2).await;
        assert_eq!(confirmed, 2);
        let error = error.unwrap();
        assert!(error.contains("message 3") && error.contains("no route"), "{error}");
    }

    #[test]
    fn a_destination_fits_its_broker() {
        let none = Destination { subject: None, exchange: None, routing_key: None, path: None };
        assert!(template("nats", none).is_err());
        assert!(template("amqp", none).is_err());
        assert!(template("amqp", NATS).is_err());
        let queue = Destination { routing_key: Some("q"), ..none };
        assert!(template("nats", queue).is_err());
        let queue = template("amqp", queue).unwrap();
        assert_eq!((&*queue.address, queue.exchange.as_deref()), ("q", Some("")));
        assert_eq!(queue.headers.content_type(), Some("application/json"));
        assert_eq!(&*template("http", none).unwrap().address, "");
        let path = Destination { path: Some("/x"), ..none };
        assert_eq!(&*template("http", path).unwrap().address, "/x");
        assert!(template("http", NATS).is_err() && template("nats", path).is_err());
    }
}
