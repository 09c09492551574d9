//! Queues, exchanges and bindings: checked, and created only where that is configured.

use std::time::Duration;

use lapin::{
    Connection, ExchangeKind, Queue,
    options::{ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions},
    types::{AMQPValue, FieldTable},
};

use super::{
    AmqpBinding, AmqpQueueCreate, AmqpSource,
    connect::{Failure, code, code_of, text_of},
    convert,
};

/// A quorum queue gives no consumer more than this at a time, whatever it asks for.
pub(super) const QUORUM_PREFETCH: u16 = 2_000;

/// Refuses what cannot work, before anything is connected.
pub(super) fn check(source: &AmqpSource) -> Result<(), Failure> {
    let wrong = |text: String| Err(Failure::Misconfigured(text));
    if source.queue.is_empty() {
        return wrong("queue is empty".to_owned());
    }
    short("queue", &source.queue)?;
    if source.prefetch == Some(0) {
        return wrong("prefetch = 0 would be without bound; give 1 to 65535".to_owned());
    }
    let Some(create) = &source.create else { return Ok(()) };
    let kind = kind(create)?;
    if kind == "quorum" && source.prefetch.is_some_and(|prefetch| prefetch > QUORUM_PREFETCH) {
        return wrong(format!(
            "prefetch is above {QUORUM_PREFETCH}, which is the most a quorum queue delivers"
        ));
    }
    arguments(create)?;
    for binding in &create.bind {
        if binding.exchange.is_empty() {
            return wrong(
                "the default exchange takes no bindings: each queue is bound to it by its name"
                    .to_owned(),
            );
        }
        short("exchange", &binding.exchange)?;
        short("routing key", &binding.routing_key)?;
        exchange_kind(binding)?;
    }
    Ok(())
}

pub(super) fn short(what: &str, text: &str) -> Result<lapin::types::ShortString, Failure> {
    convert::short(what, text).map_err(Failure::Misconfigured)
}

fn kind(create: &AmqpQueueCreate) -> Result<&str, Failure> {
    let argument = create.arguments.get("x-queue-type").and_then(|value| value.as_str());
    match (create.kind.as_deref(), argument) {
        (Some(kind), Some(argument)) if kind != argument => Err(Failure::Misconfigured(format!(
            "type is `{kind}` and the argument x-queue-type `{argument}`; leave one out"
        ))),
        (Some(kind), _) | (None, Some(kind)) if !matches!(kind, "quorum" | "classic") => {
            Err(Failure::Misconfigured(format!(
                "unknown queue type `{kind}`: expected quorum or classic"
            )))
        }
        (Some(kind), _) | (None, Some(kind)) => Ok(kind),
        (None, None) => Ok("quorum"),
    }
}

pub(super) fn arguments(create: &AmqpQueueCreate) -> Result<FieldTable, Failure> {
    let mut table = FieldTable::default();
    for (name, value) in &create.arguments {
        let value = convert::argument(value)
            .map_err(|error| Failure::Misconfigured(format!("argument {name}: {error}")))?;
        table.insert(short("argument", name)?, value);
    }
    let kind = AMQPValue::LongString(kind(create)?.as_bytes().into());
    table.insert(short("argument", "x-queue-type")?, kind);
    Ok(table)
}

pub(super) fn exchange_kind(binding: &AmqpBinding) -> Result<ExchangeKind, Failure> {
    match binding.exchange_type.as_deref() {
        None | Some("topic") => Ok(ExchangeKind::Topic),
        Some("direct") => Ok(ExchangeKind::Direct),
        Some("fanout") => Ok(ExchangeKind::Fanout),
        Some("headers") => Ok(ExchangeKind::Headers),
        Some(other) => Err(Failure::Misconfigured(format!(
            "unknown exchange_type `{other}`: expected topic, direct, fanout or headers"
        ))),
    }
}

/// Makes sure that the queue is there; how many consume it already.
pub(super) async fn prepare(
    connection: &Connection,
    source: &AmqpSource,
    timeout: Duration,
) -> Result<u32, Failure> {
    let queue = match &source.create {
        None => declare_queue(connection, source, None, timeout).await?,
        Some(create) => {
            let queue = declare_queue(connection, source, Some(create), timeout).await?;
            for binding in &create.bind {
                bind(connection, source, binding, timeout).await?;
            }
            queue
        }
    };
    Ok(queue.consumer_count())
}

async fn declare_queue(
    connection: &Connection,
    source: &AmqpSource,
    create: Option<&AmqpQueueCreate>,
    timeout: Duration,
) -> Result<Queue, Failure> {
    let name = short("queue", &source.queue)?;
    let (options, arguments) = match create {
        None => {
            (QueueDeclareOptions { passive: true, ..Default::default() }, FieldTable::default())
        }
        Some(create) => {
            (QueueDeclareOptions { durable: true, ..Default::default() }, arguments(create)?)
        }
    };
    // Each on a channel of its own: the broker closes the channel of a failed one.
    let channel = step(timeout, connection.create_channel()).await?;
    let declared = step(timeout, channel.queue_declare(name, options, arguments)).await;
    let queue = declared.map_err(|failure| match failure.code {
        Some(code::NOT_FOUND) => Failure::Misconfigured(format!(
            "queue `{}` does not exist, and the source has no `create`: {}",
            source.queue, failure.text
        )),
        Some(code::PRECONDITION_FAILED) => {
            Failure::Misconfigured(differs(&format!("queue `{}`", source.queue), &failure.text))
        }
        Some(code::ACCESS_REFUSED | code::RESOURCE_LOCKED | code::NOT_ALLOWED) => {
            Failure::Misconfigured(format!(
                "may not use queue `{}`: {}",
                source.queue, failure.text
            ))
        }
        Some(code::NOT_IMPLEMENTED) => Failure::Misconfigured(failure.text),
        _ => Failure::Unavailable(failure.text),
    })?;
    close(channel, timeout).await;
    Ok(queue)
}

async fn bind(
    connection: &Connection,
    source: &AmqpSource,
    binding: &AmqpBinding,
    timeout: Duration,
) -> Result<(), Failure> {
    let exchange = short("exchange", &binding.exchange)?;
    let kind = exchange_kind(binding)?;
    let mut channel = step(timeout, connection.create_channel()).await?;
    let passive = ExchangeDeclareOptions { passive: true, ..Default::default() };
    let asked =
        channel.exchange_declare(exchange.clone(), kind.clone(), passive, FieldTable::default());
    match step(timeout, asked).await {
        Ok(()) if binding.exchange_type.is_some() => {
            // Passively, the broker does not look at the type.
            channel = check_type(connection, channel, binding, kind, timeout).await?;
        }
        Ok(()) => {}
        Err(failure) if failure.code == Some(code::NOT_FOUND) => {
            channel = step(timeout, connection.create_channel()).await?;
            let durable = ExchangeDeclareOptions { durable: true, ..Default::default() };
            let made =
                channel.exchange_declare(exchange.clone(), kind, durable, FieldTable::default());
            step(timeout, made).await.map_err(|failure| failure.about("exchange", binding))?;
        }
        Err(failure) => return Err(failure.about("exchange", binding)),
    }
    let bound = channel.queue_bind(
        short("queue", &source.queue)?,
        exchange,
        short("routing key", &binding.routing_key)?,
        QueueBindOptions::default(),
        FieldTable::default(),
    );
    step(timeout, bound).await.map_err(|failure| failure.about("binding to exchange", binding))?;
    close(channel, timeout).await;
    Ok(())
}

/// Whether an exchange that exists is of the type that is asked for: declaring it again changes
/// nothing. Its other settings are not ours. Gives back a channel that is open.
async fn check_type(
    connection: &Connection,
    channel: lapin::Channel,
    binding: &AmqpBinding,
    kind: ExchangeKind,
    timeout: Duration,
) -> Result<lapin::Channel, Failure> {
    let durable = ExchangeDeclareOptions { durable: true, ..Default::default() };
    let exchange = short("exchange", &binding.exchange)?;
    let asked = channel.exchange_declare(exchange, kind, durable, FieldTable::default());
    match step(timeout, asked).await {
        Ok(()) => Ok(channel),
        Err(Refusal { code: Some(code::PRECONDITION_FAILED), text })
            if Inequivalent::parse(&text).is_some_and(|found| found.argument == "type") =>
        {
            Err(Failure::Misconfigured(differs(&format!("exchange `{}`", binding.exchange), &text)))
        }
        // Another setting differs, which is looked at after the type; or looking is not allowed.
        Err(Refusal { code: Some(code::PRECONDITION_FAILED | code::ACCESS_REFUSED), .. }) => {
            Ok(step(timeout, connection.create_channel()).await?)
        }
        Err(failure) => Err(failure.about("exchange", binding)),
    }
}

/// What exists is not what `create` asks for: in words, and nothing is changed.
fn differs(what: &str, text: &str) -> String {
    match Inequivalent::parse(text) {
        Some(Inequivalent { argument, asked, current, .. }) => format!(
            "{what} exists and is not as `create` asks for: {argument} is {current}, expected \
             {asked}; change one of the two, or take `create` out"
        ),
        None => format!("{what} exists with other settings than `create` asks for: {text}"),
    }
}

/// The broker's words for that, taken apart:
/// `inequivalent arg 'x-queue-type' for queue 'q' in vhost '/': received the value 'quorum' of
/// type 'longstr' but current is none`.
pub(super) struct Inequivalent<'a> {
    pub(super) argument: &'a str,
    asked: String,
    current: String,
    /// What it is, in the broker's own words.
    pub(super) said: &'a str,
}

impl<'a> Inequivalent<'a> {
    pub(super) fn parse(text: &'a str) -> Option<Self> {
        let (_, rest) = text.split_once("inequivalent arg '")?;
        let (argument, rest) = rest.split_once('\'')?;
        // The last ones: a name may hold anything.
        let (rest, said) = rest.rsplit_once(" but current is ")?;
        let (_, asked) = rest.rsplit_once(": received ")?;
        Some(Self { argument, asked: value(asked), current: value(said), said })
    }
}

/// `the value 'classic' of type 'longstr'`, `'true'` or `none`.
fn value(said: &str) -> String {
    let said = said.strip_prefix("the value ").unwrap_or(said);
    let said = said.rsplit_once(" of type ").map_or(said, |(value, _)| value);
    match said.trim_matches('\'') {
        "none" => "not set".to_owned(),
        value => format!("`{value}`"),
    }
}

async fn close(channel: lapin::Channel, timeout: Duration) {
    // Left open it would only cost a channel until the connection closes.
    let _ = step(timeout, channel.close(200, "done".into())).await;
}

/// An answer that did not come, or was no.
pub(super) struct Refusal {
    pub(super) code: Option<u16>,
    pub(super) text: String,
}

impl Refusal {
    fn about(self, what: &str, binding: &AmqpBinding) -> Failure {
        let text = format!("{what} `{}`: {}", binding.exchange, self.text);
        if self.code.is_some_and(|code| code < 500 || code == code::NOT_ALLOWED) {
            Failure::Misconfigured(text)
        } else {
            Failure::Unavailable(text)
        }
    }
}

impl From<Refusal> for Failure {
    fn from(refusal: Refusal) -> Self {
        Self::Unavailable(refusal.text)
    }
}

/// One exchange with the broker, within a time.
pub(super) async fn step<T>(
    timeout: Duration,
    asked: impl Future<Output = lapin::Result<T>>,
) -> Result<T, Refusal> {
    match tokio::time::timeout(timeout, asked).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(error)) => Err(Refusal { code: code_of(&error), text: text_of(&error) }),
        Err(_) => {
            Err(Refusal { code: None, text: format!("RabbitMQ did not answer within {timeout:?}") })
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn refusal(params: serde_json::Value) -> String {
        let source: AmqpSource = serde_json::from_value(params).unwrap();
        check(&source).unwrap_err().text().to_owned()
    }

    #[test]
    fn what_differs_is_said_in_words() {
        let text = "PRECONDITION_FAILED - inequivalent arg 'x-queue-type' for queue 'a: received \
                    x' in vhost '/': received the value 'quorum' of type 'longstr' but current is \
                    the value 'classic' of type 'longstr'";
        let said = differs("queue `q`", text);
        assert!(said.contains("x-queue-type is `classic`, expected `quorum`"), "{said}");
        let text = "PRECONDITION_FAILED - inequivalent arg 'durable' for queue 'q' in vhost '/': \
                    received 'true' but current is 'false'";
        let said = differs("queue `q`", text);
        assert!(said.contains("durable is `false`, expected `true`"), "{said}");
        let text = "inequivalent arg 'x-max-length' for queue 'q' in vhost '/': received none but \
                    current is the value '5' of type 'signedint'";
        assert!(differs("queue `q`", text).contains("x-max-length is `5`, expected not set"));
        assert!(differs("queue `q`", "something new").ends_with("something new"));
    }

    #[test]
    fn what_cannot_work_is_refused_unconnected() {
        assert!(refusal(json!({"queue": ""})).contains("empty"));
        assert!(refusal(json!({"queue": "q", "prefetch": 0})).contains("prefetch"));
        assert!(refusal(json!({"queue": "q".repeat(256)})).contains("255"));
        let create = |create| json!({"queue": "q", "prefetch": 3000, "create": create});
        assert!(refusal(create(json!({}))).contains("2000"));
        assert!(refusal(create(json!({"type": "stream"}))).contains("`stream`"));
        assert!(
            refusal(create(json!({"type": "classic", "arguments": {"x-queue-type": "quorum"}})))
                .contains("leave one out")
        );
        let bind = |bind| create(json!({"type": "classic", "bind": [bind]}));
        assert!(refusal(bind(json!({"exchange": ""}))).contains("default exchange"));
        assert!(
            refusal(bind(json!({"exchange": "e", "exchange_type": "x"}))).contains("exchange_type")
        );
    }
}
