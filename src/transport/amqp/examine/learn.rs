//! What a queue or an exchange is, learnt from refusals.
//!
//! Declaring what exists changes nothing: it succeeds where every setting is the same, and else
//! is refused with the first that differs and what it really is. So each refusal teaches one
//! setting, which the next attempt has. One argument in each attempt is of a value that the broker
//! does not create anything with: should the queue be deleted in between, it is not made again.

use std::{collections::BTreeMap, time::Duration};

use lapin::{
    Connection, ExchangeKind,
    options::{ExchangeDeclareOptions, QueueDeclareOptions},
    types::{AMQPValue, FieldTable},
};

use super::super::{
    connect::{Failure, code},
    topology::{Inequivalent, Refusal, short, step},
};

/// No queue is made with this argument of this value: it is no locator.
const QUEUE_GUARD: (&str, &str) = ("x-queue-leader-locator", "pulsebus-doctor");

/// Nor an exchange with this one as a number.
const EXCHANGE_GUARD: &str = "alternate-exchange";

/// More settings than there are.
const ATTEMPTS: usize = 40;

/// What is asked of one that may not be there.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Known<T> {
    /// There is none.
    Missing,
    /// This user may not look, for want of a `configure` permission.
    Unseen,
    Seen(T),
}

/// A queue's settings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct QueueSettings {
    pub(super) durable: bool,
    pub(super) auto_delete: bool,
    /// As text: `5`, `true`, `quorum`.
    pub(super) arguments: BTreeMap<String, String>,
}

impl QueueSettings {
    pub(super) fn argument(&self, name: &str) -> Option<&str> {
        self.arguments.get(name).map(String::as_str)
    }

    /// `classic`, `quorum`, `stream`.
    pub(super) fn kind(&self) -> &str {
        self.argument("x-queue-type").unwrap_or("classic")
    }
}

/// An exchange's settings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ExchangeSettings {
    pub(super) kind: String,
    pub(super) durable: bool,
    pub(super) auto_delete: bool,
    pub(super) internal: bool,
    pub(super) alternate: Option<String>,
}

/// The settings of a queue. Nothing is created.
pub(super) async fn queue(
    connection: &Connection,
    name: &str,
    timeout: Duration,
) -> Result<Known<QueueSettings>, Refusal> {
    let mut settings =
        QueueSettings { durable: true, auto_delete: false, arguments: BTreeMap::new() };
    let mut arguments = FieldTable::default();
    arguments.insert(QUEUE_GUARD.0.into(), AMQPValue::LongString(QUEUE_GUARD.1.into()));
    for _ in 0..ATTEMPTS {
        let options = QueueDeclareOptions {
            durable: settings.durable,
            auto_delete: settings.auto_delete,
            ..QueueDeclareOptions::default()
        };
        let channel = step(timeout, connection.create_channel()).await?;
        let name = short("queue", name).map_err(|failure| unsendable(&failure))?;
        let declared = channel.queue_declare(name, options, arguments.clone());
        let refusal = match step(timeout, declared).await {
            Ok(_) => {
                // The guard is not looked at: all the rest is as it is here.
                close(channel, timeout).await;
                return Ok(Known::Seen(settings));
            }
            Err(refusal) => refusal,
        };
        match refusal.code {
            Some(code::ACCESS_REFUSED) => return Ok(Known::Unseen),
            Some(code::NOT_FOUND) => return Ok(Known::Missing),
            Some(code::PRECONDITION_FAILED) => {}
            _ => return Err(refusal),
        }
        // Refused to create it.
        let Some(differs) = Inequivalent::parse(&refusal.text) else { return Ok(Known::Missing) };
        match (differs.argument, Said::parse(differs.said)) {
            (argument, _) if argument == QUEUE_GUARD.0 => return Ok(Known::Seen(settings)),
            ("durable", said) => settings.durable = said.is_true(),
            ("auto_delete", said) => settings.auto_delete = said.is_true(),
            (argument, said) => {
                let (name, text) = (argument.to_owned(), said.text.to_owned());
                let known = settings.arguments.insert(name, text).is_some();
                let Some(value) = said.value() else { return Ok(Known::Seen(settings)) };
                if known {
                    // It cannot be said again in the same way: this is as far as one can see.
                    return Ok(Known::Seen(settings));
                }
                arguments.insert(
                    short("argument", argument).map_err(|failure| unsendable(&failure))?,
                    value,
                );
            }
        }
    }
    Ok(Known::Seen(settings))
}

/// The settings of an exchange. Nothing is created.
pub(super) async fn exchange(
    connection: &Connection,
    name: &str,
    timeout: Duration,
) -> Result<Known<ExchangeSettings>, Refusal> {
    let mut settings = ExchangeSettings {
        kind: "topic".to_owned(),
        durable: true,
        auto_delete: false,
        internal: false,
        alternate: None,
    };
    let mut arguments = FieldTable::default();
    arguments.insert(EXCHANGE_GUARD.into(), AMQPValue::LongInt(1));
    for _ in 0..ATTEMPTS {
        let options = ExchangeDeclareOptions {
            durable: settings.durable,
            auto_delete: settings.auto_delete,
            internal: settings.internal,
            ..ExchangeDeclareOptions::default()
        };
        let channel = step(timeout, connection.create_channel()).await?;
        let name = short("exchange", name).map_err(|failure| unsendable(&failure))?;
        let kind = ExchangeKind::Custom(settings.kind.clone());
        let declared = channel.exchange_declare(name, kind, options, arguments.clone());
        let refusal = match step(timeout, declared).await {
            Ok(()) => {
                close(channel, timeout).await;
                return Ok(Known::Seen(settings));
            }
            Err(refusal) => refusal,
        };
        match refusal.code {
            Some(code::ACCESS_REFUSED) => return Ok(Known::Unseen),
            Some(code::NOT_FOUND) => return Ok(Known::Missing),
            Some(code::PRECONDITION_FAILED) => {}
            _ => return Err(refusal),
        }
        let Some(differs) = Inequivalent::parse(&refusal.text) else { return Ok(Known::Missing) };
        let said = Said::parse(differs.said);
        match differs.argument {
            "type" => settings.kind = said.text.to_owned(),
            "durable" => settings.durable = said.is_true(),
            "auto_delete" => settings.auto_delete = said.is_true(),
            "internal" => settings.internal = said.is_true(),
            _ => {
                settings.alternate = (said.text != "none").then(|| said.text.to_owned());
                return Ok(Known::Seen(settings));
            }
        }
    }
    Ok(Known::Seen(settings))
}

/// Whether an exchange is there.
pub(super) async fn exchange_exists(
    connection: &Connection,
    exchange: &str,
    timeout: Duration,
) -> Result<bool, Refusal> {
    // The default one always is.
    if exchange.is_empty() {
        return Ok(true);
    }
    let Ok(name) = short("exchange", exchange) else { return Ok(false) };
    let passive = ExchangeDeclareOptions { passive: true, ..ExchangeDeclareOptions::default() };
    let channel = step(timeout, connection.create_channel()).await?;
    let kind = ExchangeKind::Topic;
    match step(timeout, channel.exchange_declare(name, kind, passive, FieldTable::default())).await
    {
        Ok(()) => Ok(true),
        Err(refusal) if refusal.code == Some(code::NOT_FOUND) => Ok(false),
        // One that may not be seen is there.
        Err(refusal) if refusal.code == Some(code::ACCESS_REFUSED) => Ok(true),
        Err(refusal) => Err(refusal),
    }
}

/// An argument's value as the broker shows it.
pub(super) fn text_of_value(value: &AMQPValue) -> String {
    match value {
        AMQPValue::LongString(text) => String::from_utf8_lossy(text.as_bytes()).into_owned(),
        AMQPValue::Boolean(value) => value.to_string(),
        AMQPValue::ShortShortInt(value) => value.to_string(),
        AMQPValue::ShortInt(value) => value.to_string(),
        AMQPValue::LongInt(value) => value.to_string(),
        AMQPValue::LongLongInt(value) => value.to_string(),
        other => format!("{other:?}"),
    }
}

async fn close(channel: lapin::Channel, timeout: Duration) {
    // Left open it would only cost a channel until the connection closes.
    let _ = step(timeout, channel.close(200, "done".into())).await;
}

/// A name that is too long for AMQP.
pub(super) fn unsendable(failure: &Failure) -> Refusal {
    Refusal { code: None, text: failure.text().to_owned() }
}

/// The broker's words for a value: `the value '5' of type 'signedint'`, `'true'`, `none`.
#[derive(Debug, PartialEq, Eq)]
struct Said<'a> {
    text: &'a str,
    /// Empty where none is said.
    kind: &'a str,
}

impl<'a> Said<'a> {
    fn parse(said: &'a str) -> Self {
        let said = said.strip_prefix("the value ").unwrap_or(said);
        let (text, kind) = said.rsplit_once(" of type ").unwrap_or((said, ""));
        let bare = |text: &'a str| {
            let inner = text.strip_prefix('\'').and_then(|text| text.strip_suffix('\''));
            inner.unwrap_or(text)
        };
        Self { text: bare(text), kind: bare(kind) }
    }

    fn is_true(&self) -> bool {
        self.text == "true"
    }

    /// The same, to be said to the broker; `None` for what is no plain value.
    fn value(&self) -> Option<AMQPValue> {
        Some(match self.kind {
            "longstr" => AMQPValue::LongString(self.text.as_bytes().into()),
            "bool" => AMQPValue::Boolean(self.is_true()),
            // Whole numbers are compared as such, whatever their width.
            "byte" | "short" | "signedint" | "long" | "unsignedbyte" | "unsignedshort"
            | "unsignedint" => AMQPValue::LongLongInt(self.text.parse().ok()?),
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_brokers_words_become_a_value_again() {
        let value = |said: &str| Said::parse(said).value();
        assert_eq!(value("the value '5' of type 'byte'"), Some(AMQPValue::LongLongInt(5)));
        assert_eq!(value("the value 'true' of type 'bool'"), Some(AMQPValue::Boolean(true)));
        let name = Some(AMQPValue::LongString("it's of type 'x'".into()));
        assert_eq!(value("the value 'it's of type 'x'' of type 'longstr'"), name);
        assert_eq!(value("none"), None);
        assert!(Said::parse("'true'").is_true());
        assert!(!Said::parse("'false'").is_true());
    }
}
