//! A source: its queue, and what this user needs to consume from it.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use lapin::{
    Connection,
    options::{BasicConsumeOptions, BasicQosOptions, QueueDeclareOptions},
    types::{AMQPValue, FieldTable, ShortString},
};

use super::{
    super::{
        AmqpBinding, AmqpQueueCreate, AmqpSource,
        connect::code,
        topology::{Refusal, arguments, check, exchange_kind, short, step},
    },
    is_denied,
    learn::{self, Known, QueueSettings, text_of_value, unsendable},
    queue,
};
use crate::{finding::Findings, transport::ExaminedSource};

pub(super) async fn examine(
    found: &mut Findings,
    connection: &Connection,
    asked: &ExaminedSource,
    timeout: Duration,
) -> Result<(), Refusal> {
    let source = match readable(asked) {
        Ok(source) => source,
        Err(reason) => {
            found.error(
                "amqp-source",
                reason,
                "the source cannot be opened",
                "correct its settings; pulsebus check shows where they stand",
            );
            return Ok(());
        }
    };
    let Ok(name) = short("queue", &source.queue) else { return Ok(()) };
    let passive = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
    let channel = step(timeout, connection.create_channel()).await?;
    let looked = channel.queue_declare(name.clone(), passive, FieldTable::default());
    let state = match step(timeout, looked).await {
        Ok(state) => state,
        Err(refusal) => {
            return match refusal.code {
                Some(code::NOT_FOUND) => missing(found, connection, &source, timeout).await,
                Some(code::RESOURCE_LOCKED) => {
                    found.error(
                        "amqp-queue-exclusive",
                        format!("queue `{}` belongs to another connection alone", source.queue),
                        "nobody else can consume from it, and it is gone with that connection",
                        "declare it without `exclusive`, and durable",
                    );
                    Ok(())
                }
                Some(code::ACCESS_REFUSED) => {
                    denied(found, &refusal.text, "read", &source.queue);
                    Ok(())
                }
                _ => Err(refusal),
            };
        }
    };
    let settings = learn::queue(connection, &source.queue, timeout).await?;
    // One that is deleted with its last consumer is given none, not even one that is refused.
    let kept = !matches!(&settings, Known::Seen(settings) if settings.auto_delete);
    let single = match &settings {
        Known::Seen(settings) => {
            queue::judge(found, settings, &source, asked.competing);
            if let Some(create) = &source.create {
                differs(found, &source.queue, settings, create);
            }
            dead_letters(found, connection, &source.queue, settings, timeout).await?;
            settings.argument("x-single-active-consumer") == Some("true")
        }
        Known::Unseen if source.create.is_some() => {
            found.error(
                "amqp-denied",
                format!("no permission to declare queue `{}`", source.queue),
                "a source with `create` declares its queue at each start, and waits until it may",
                format!(
                    "add `{}` to the user's `configure` permission (rabbitmqctl set_permissions), \
                     or take `create` out",
                    source.queue
                ),
            );
            false
        }
        Known::Unseen => {
            found.note(
                "amqp-queue-unseen",
                format!("the settings of queue `{}` may not be seen", source.queue),
                "whether it is durable, expires or drops messages is not known: AMQP shows that only \
                 to users with a `configure` permission",
                "run doctor as a user who has it, or see rabbitmqctl list_queues name durable \
                 auto_delete arguments",
            );
            false
        }
        // Deleted since.
        Known::Missing => false,
    };
    queue::judge_use(
        found,
        &source.queue,
        state.message_count(),
        state.consumer_count(),
        asked.competing,
        single,
    );
    if kept {
        consuming(found, connection, name, timeout).await?;
    }
    for binding in source.create.iter().flat_map(|create| &create.bind) {
        bound(found, connection, &source.queue, binding, timeout).await?;
    }
    Ok(())
}

fn readable(asked: &ExaminedSource) -> Result<AmqpSource, String> {
    let source: AmqpSource =
        serde_json::from_value(asked.params.clone()).map_err(|error| error.to_string())?;
    check(&source).map_err(|failure| failure.text().to_owned())?;
    Ok(source)
}

fn denied(found: &mut Findings, said: &str, permission: &str, resource: &str) {
    found.error(
        "amqp-denied",
        format!("no `{permission}` permission: {said}"),
        "the daemon needs it to consume, and waits until it has it",
        format!(
            "add `{resource}` to the user's `{permission}` permission (rabbitmqctl set_permissions)"
        ),
    );
}

/// There is no queue.
async fn missing(
    found: &mut Findings,
    connection: &Connection,
    source: &AmqpSource,
    timeout: Duration,
) -> Result<(), Refusal> {
    let name = &source.queue;
    let Some(create) = &source.create else {
        found.error(
            "amqp-queue-missing",
            format!("queue `{name}` does not exist, and the source has no `create`"),
            "nothing keeps what is published, and nothing is consumed",
            "declare it and bind it, correct `queue`, or give the source \
             create = { bind = [{ exchange = \"…\", routing_key = \"…\" }] }",
        );
        return Ok(());
    };
    found.note(
        "amqp-queue-missing",
        format!("queue `{name}` does not exist yet"),
        "what is published before it does is not kept",
        "start the daemon, which creates and binds it, before the publishers",
    );
    // Refused as a user who may not, or as a queue that cannot be; either way it is not made.
    if learn::queue(connection, name, timeout).await? == Known::Unseen {
        found.error(
            "amqp-denied",
            format!("no permission to declare queue `{name}`"),
            "the daemon is to create it, and waits until it may",
            format!(
                "add `{name}` to the user's `configure` permission (rabbitmqctl set_permissions)"
            ),
        );
    }
    for binding in &create.bind {
        exchange_of(found, connection, binding, timeout).await?;
    }
    Ok(())
}

/// What the queue is and `create` does not ask for, or the other way round.
fn differs(found: &mut Findings, name: &str, settings: &QueueSettings, create: &AmqpQueueCreate) {
    // Checked before.
    let Ok(arguments) = arguments(create) else { return };
    let mut asked: BTreeMap<String, String> = arguments
        .into_iter()
        .map(|(name, value)| (name.to_string(), text_of_value(value)))
        .collect();
    let mut has = settings.arguments.clone();
    has.entry("x-queue-type".to_owned()).or_insert_with(|| "classic".to_owned());
    // The broker does not compare what it does not know.
    asked.retain(|name, _| name.starts_with("x-") && has.contains_key(name) || is_compared(name));
    let names: BTreeSet<_> = asked.keys().chain(has.keys()).cloned().collect();
    let mut said: Vec<String> = Vec::new();
    for argument in names {
        let (is, wanted) = (has.get(&argument), asked.get(&argument));
        if is != wanted {
            let show = |value: Option<&String>| match value {
                Some(value) => format!("`{value}`"),
                None => "not set".to_owned(),
            };
            said.push(format!("{argument} is {}, expected {}", show(is), show(wanted)));
        }
    }
    if !settings.durable {
        said.push("durable is `false`, expected `true`".to_owned());
    }
    if settings.auto_delete {
        said.push("auto_delete is `true`, expected `false`".to_owned());
    }
    if !said.is_empty() {
        found.error(
            "amqp-queue-differs",
            format!("queue `{name}` exists and is not as `create` asks for: {}", said.join("; ")),
            "the broker refuses the declaration, and the daemon consumes nothing until they agree",
            "change one of the two, or take `create` out",
        );
    }
}

/// Arguments that every RabbitMQ compares.
fn is_compared(name: &str) -> bool {
    matches!(
        name,
        "x-queue-type"
            | "x-message-ttl"
            | "x-expires"
            | "x-max-length"
            | "x-max-length-bytes"
            | "x-overflow"
            | "x-dead-letter-exchange"
            | "x-dead-letter-routing-key"
            | "x-single-active-consumer"
            | "x-delivery-limit"
    )
}

/// Whether what the queue gives up has somewhere to go.
async fn dead_letters(
    found: &mut Findings,
    connection: &Connection,
    queue: &str,
    settings: &QueueSettings,
    timeout: Duration,
) -> Result<(), Refusal> {
    let Some(exchange) = settings.argument("x-dead-letter-exchange") else { return Ok(()) };
    if learn::exchange_exists(connection, exchange, timeout).await? {
        return Ok(());
    }
    found.error(
        "amqp-dead-letter-exchange",
        format!(
            "queue `{queue}` sends what it gives up to exchange `{exchange}`, which is missing"
        ),
        "what expires, overflows or was delivered too often is lost without a word",
        format!("declare exchange `{exchange}`, durable, and bind a queue to it"),
    );
    Ok(())
}

/// Whether this user may consume. The broker looks at the permission before the arguments, and
/// refuses a consumer whose priority is no number: nothing is delivered.
async fn consuming(
    found: &mut Findings,
    connection: &Connection,
    queue: ShortString,
    timeout: Duration,
) -> Result<(), Refusal> {
    let channel = step(timeout, connection.create_channel()).await?;
    // Should a broker take it all the same, it is one message, and comes back.
    step(timeout, channel.basic_qos(1, BasicQosOptions::default())).await?;
    let mut arguments = FieldTable::default();
    arguments.insert("x-priority".into(), AMQPValue::LongString("pulsebus-doctor".into()));
    let name = queue.to_string();
    let options = BasicConsumeOptions::default();
    let consuming = channel.basic_consume(queue, "".into(), options, arguments);
    match step(timeout, consuming).await.map(drop) {
        Ok(()) => {
            let _ = step(timeout, channel.close(200, "done".into())).await;
            Ok(())
        }
        Err(refusal) if refusal.code == Some(code::PRECONDITION_FAILED) => Ok(()),
        Err(refusal) if refusal.text.contains("exclusive") && is_denied(&refusal) => {
            found.error(
                "amqp-queue-exclusive",
                format!("queue `{name}` has a consumer that wants no other: {}", refusal.text),
                "this source gets nothing as long as that one is there",
                "stop that consumer (rabbitmqctl list_consumers)",
            );
            Ok(())
        }
        Err(refusal) if is_denied(&refusal) => {
            denied(found, &refusal.text, "read", &name);
            Ok(())
        }
        Err(refusal) => Err(refusal),
    }
}

/// The exchange of a binding that the daemon makes at each start, where it is there.
async fn exchange_of(
    found: &mut Findings,
    connection: &Connection,
    binding: &AmqpBinding,
    timeout: Duration,
) -> Result<bool, Refusal> {
    let name = &binding.exchange;
    if !learn::exchange_exists(connection, name, timeout).await? {
        found.note(
            "amqp-exchange-missing",
            format!("exchange `{name}` does not exist yet"),
            "what is published to it before it does is refused",
            "start the daemon, which creates it, before the publishers",
        );
        return Ok(false);
    }
    let (Some(asked), Ok(Known::Seen(settings))) =
        (&binding.exchange_type, learn::exchange(connection, name, timeout).await)
    else {
        return Ok(true);
    };
    if exchange_kind(binding).is_ok() && settings.kind != *asked {
        found.error(
            "amqp-exchange-type",
            format!("exchange `{name}` is of type `{}`, expected `{asked}`", settings.kind),
            "the daemon changes nothing that exists, and consumes nothing until they agree",
            "correct exchange_type, or delete the exchange and declare it anew",
        );
    }
    Ok(true)
}

/// Whether this user may bind. Taking away a binding that does not exist needs the same
/// permissions, and does nothing.
async fn bound(
    found: &mut Findings,
    connection: &Connection,
    queue: &str,
    binding: &AmqpBinding,
    timeout: Duration,
) -> Result<(), Refusal> {
    if !exchange_of(found, connection, binding, timeout).await? {
        return Ok(());
    }
    let channel = step(timeout, connection.create_channel()).await?;
    let unbinding = channel.queue_unbind(
        short("queue", queue).map_err(|failure| unsendable(&failure))?,
        short("exchange", &binding.exchange).map_err(|failure| unsendable(&failure))?,
        short("routing key", &format!("pulsebus-doctor.{}", uuid::Uuid::now_v7()))
            .map_err(|failure| unsendable(&failure))?,
        FieldTable::default(),
    );
    match step(timeout, unbinding).await {
        Ok(()) => Ok(()),
        Err(refusal) if is_denied(&refusal) => {
            found.error(
                "amqp-denied",
                format!(
                    "no permission to bind queue `{queue}` to exchange `{}`: {}",
                    binding.exchange, refusal.text
                ),
                "the daemon binds at each start, and waits until it may",
                format!(
                    "add `{queue}` to the user's `write` permission and `{}` to its `read` \
                     permission (rabbitmqctl set_permissions), or take `bind` out",
                    binding.exchange
                ),
            );
            Ok(())
        }
        // The exchange is gone again.
        Err(refusal) if refusal.code == Some(code::NOT_FOUND) => Ok(()),
        Err(refusal) => Err(refusal),
    }
}
