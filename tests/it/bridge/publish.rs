//! Publishers that are not ours: events in every form, each confirmed before the next of its key
//! is published, through outages, and the ledger of what was confirmed.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use async_nats::{HeaderMap, jetstream};
use bytes::Bytes;
use futures_util::future::join_all;
use lapin::{
    BasicProperties, Channel, Confirmation, Connection, ConnectionProperties,
    options::{BasicPublishOptions, ConfirmSelectOptions},
    types::{AMQPValue, FieldTable},
};
use tokio::time::{sleep, timeout};

/// Keys of each publisher.
const KEYS: u64 = 500;

/// How long a confirm is waited for before the same is published again.
const CONFIRM: Duration = Duration::from_secs(5);

/// JSON that is valid, and odd: what parses and prints it again shows.
const ODD: [&str; 8] = [
    r#""plain""#,
    r#""\u00e9\/\ud83d\ude00 \"quoted\" \\ \b\f\n\r\t""#,
    "123456789012345678901234567890.000000000000000000001",
    "-0.0",
    r#"{"twice": 1, "twice": 2, "": null}"#,
    "[ \t1\n,\r\n 2 ,[ ] , { } ]",
    r#""žluťoučký kůň 你好 🎉""#,
    "1E+2",
];

/// The broker that an event is published to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Side {
    Nats,
    Rabbit,
}

/// An event of the run, made from its number alone.
#[derive(Debug)]
pub(super) struct Event {
    pub(super) side: Side,
    pub(super) id: String,
    pub(super) source: &'static str,
    pub(super) kind: String,
    pub(super) key: String,
    /// Its number within its key.
    pub(super) n: u64,
    pub(super) form: &'static str,
    pub(super) body: Bytes,
}

impl Event {
    pub(super) fn new(side: Side, number: u64) -> Self {
        let (letter, own, subject) = match side {
            Side::Nats => ("n", "/from-nats", "lessons"),
            Side::Rabbit => ("r", "/from-rabbit", "quizzes"),
        };
        let key = format!("{letter}-{}", number % KEYS);
        let (id, n) = (format!("{letter}-event-{number}"), number / KEYS);
        let odd = ODD[(number % 8) as usize];
        let data = format!("{{\"course\":\"{key}\", \"n\" : {n},\n\t\"odd\":{odd} }}");
        let kind = "LessonPublished";
        let (form, source, kind, body) = match number % 4 {
            // No id in the body, and a type that only the subject says.
            0 => ("raw", own, format!("{subject}.{key}"), data),
            1 => {
                let body = format!(r#"{{"type": "{kind}",  "id":"{id}","data":{data}}}"#);
                ("native", own, kind.to_owned(), body)
            }
            2 => {
                let body = format!(
                    "{{\"specversion\":\"1.0\",\"id\":\"{id}\",\"source\":\"/edupulse\",\n\
                     \t\"type\":\"{kind}\",\"data\" : {data} }}"
                );
                ("cloudevents-structured", "/edupulse", kind.to_owned(), body)
            }
            _ => ("cloudevents-binary", "/edupulse", kind.to_owned(), data),
        };
        Self { side, id, source, kind, key, n, form, body: body.into() }
    }

    fn address(&self) -> String {
        match self.side {
            Side::Nats => format!("lessons.{}", self.key),
            Side::Rabbit => format!("quizzes.{}", self.key),
        }
    }

    fn attributes(&self) -> Vec<(&'static str, &str)> {
        match self.form {
            "cloudevents-binary" => vec![
                ("specversion", "1.0"),
                ("id", &self.id),
                ("source", self.source),
                ("type", &self.kind),
                ("time", "2024-05-01T12:00:00.5Z"),
            ],
            _ => Vec::new(),
        }
    }

    fn content_type(&self) -> &'static str {
        match self.form {
            "cloudevents-structured" => "application/cloudevents+json",
            _ => "application/json",
        }
    }
}

/// How far the bridge is, so that publishers do not run away from it: faults are to meet events
/// that flow.
pub(super) struct Pace {
    /// Events that every handler has handled.
    pub(super) handled: AtomicU64,
    /// How many each publisher may be ahead of its share of these.
    pub(super) ahead: u64,
}

impl Pace {
    async fn allow(&self, published: u64) {
        while published > self.handled.load(Ordering::Relaxed) / 2 + self.ahead {
            sleep(Duration::from_millis(5)).await;
        }
    }
}

/// A client with one connection, made anew after each failure.
enum Client {
    Nats(jetstream::Context),
    Rabbit { channel: Channel, _connection: Connection },
}

impl Client {
    async fn open(side: Side, url: &str) -> Option<Self> {
        let opening = async {
            match side {
                Side::Nats => {
                    let client = async_nats::connect(url).await.ok()?;
                    let mut context = jetstream::new(client);
                    context.set_timeout(CONFIRM);
                    Some(Self::Nats(context))
                }
                Side::Rabbit => {
                    let properties = ConnectionProperties::default();
                    let connection = Connection::connect(url, properties).await.ok()?;
                    let channel = connection.create_channel().await.ok()?;
                    channel.confirm_select(ConfirmSelectOptions::default()).await.ok()?;
                    Some(Self::Rabbit { channel, _connection: connection })
                }
            }
        };
        timeout(CONFIRM, opening).await.ok()?
    }

    /// Publishes these together; says which were confirmed.
    async fn publish(&self, events: &[Event]) -> Vec<bool> {
        let mut confirms = Vec::with_capacity(events.len());
        match self {
            Self::Nats(context) => {
                for event in events {
                    let mut headers = HeaderMap::new();
                    headers.insert("Nats-Msg-Id", &*event.id);
                    headers.insert("Content-Type", event.content_type());
                    for (name, value) in event.attributes() {
                        headers.insert(format!("ce-{name}"), value);
                    }
                    let body = event.body.clone();
                    confirms
                        .push(context.publish_with_headers(event.address(), headers, body).await);
                }
                let all = confirms.into_iter().map(async |sent| match sent {
                    Ok(confirm) => confirm.await.is_ok(),
                    Err(_) => false,
                });
                join_all(all).await
            }
            Self::Rabbit { channel, .. } => {
                let mut confirms = Vec::with_capacity(events.len());
                for event in events {
                    let mut headers = FieldTable::default();
                    for (name, value) in event.attributes() {
                        let value = AMQPValue::LongString(value.into());
                        headers.insert(format!("cloudEvents:{name}").into(), value);
                    }
                    let properties = BasicProperties::default()
                        .with_message_id(event.id.as_str().into())
                        .with_content_type(event.content_type().into())
                        .with_delivery_mode(2)
                        .with_headers(headers);
                    let options = BasicPublishOptions { mandatory: true, ..Default::default() };
                    let address = event.address().into();
                    let sent = channel
                        .basic_publish("bridge".into(), address, options, &event.body, properties)
                        .await;
                    confirms.push(sent);
                }
                let all = confirms.into_iter().map(async |sent| match sent {
                    Ok(confirm) => {
                        matches!(timeout(CONFIRM, confirm).await, Ok(Ok(Confirmation::Ack(None))))
                    }
                    Err(_) => false,
                });
                join_all(all).await
            }
        }
    }
}

/// Publishes so many events; gives back those that the broker confirmed, which are all, by id.
pub(super) async fn publish(
    side: Side,
    url: String,
    count: u64,
    pace: Arc<Pace>,
) -> HashMap<String, Event> {
    let mut ledger = HashMap::new();
    let mut client = None;
    let mut number = 0;
    while number < count {
        // One of each key, so that any of them may be published again without the next of its
        // key being there already.
        let round = KEYS.min(count - number).min(pace.ahead);
        pace.allow(number + round).await;
        let mut left: Vec<_> = (number..number + round).map(|n| Event::new(side, n)).collect();
        number += round;
        while !left.is_empty() {
            if client.is_none() {
                client = Client::open(side, &url).await;
            }
            let Some(open) = &client else {
                sleep(Duration::from_millis(100)).await;
                continue;
            };
            let confirmed = open.publish(&left).await;
            if confirmed.contains(&false) {
                client = None;
            }
            let (kept, again) = left.into_iter().zip(confirmed).partition::<Vec<_>, _>(|(_, c)| *c);
            ledger.extend(kept.into_iter().map(|(event, _)| (event.id.clone(), event)));
            left = again.into_iter().map(|(event, _)| event).collect();
        }
    }
    ledger
}
