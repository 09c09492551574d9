//! A destination: is its exchange there and sound, and may this user publish to it?

use std::time::Duration;

use lapin::{
    BasicProperties, Connection,
    options::{BasicPublishOptions, QueueDeclareOptions},
    types::FieldTable,
};

use super::{
    super::{
        AmqpSource,
        connect::code,
        topology::{Refusal, short, step},
    },
    is_denied,
    learn::{self, ExchangeSettings, Known, unsendable},
};
use crate::{
    finding::Findings,
    transport::{ExaminedDestination, ExaminedSource},
};

/// How often a publish is tried whose refusal the driver did not tell.
const TRIES: usize = 3;

pub(super) async fn examine(
    found: &mut Findings,
    connection: &Connection,
    destination: &ExaminedDestination,
    sources: &[ExaminedSource],
    timeout: Duration,
) -> Result<(), Refusal> {
    let carries = destination.carries;
    let exchange = match &destination.exchange {
        None => String::new(),
        // Another one for each event: none to look at.
        Some(exchange) => match exchange.fixed() {
            Some(exchange) => exchange,
            None => return Ok(()),
        },
    };
    if exchange.is_empty() {
        if let Some(queue) = destination.address.fixed()
            && !queue_exists(connection, &queue, timeout).await?
        {
            found.error(
                "amqp-destination-queue",
                format!("{carries} go to queue `{queue}` by its name, and there is none"),
                "each comes back as unroutable: it is tried again, and then a dead letter",
                "declare the queue, correct `routing_key`, or name an exchange",
            );
        }
    } else if !learn::exchange_exists(connection, &exchange, timeout).await? {
        if is_created(&exchange, sources) {
            found.note(
                "amqp-exchange-missing",
                format!("exchange `{exchange}`, where {carries} go, does not exist yet"),
                "a source of this configuration creates it",
                "start the daemon",
            );
        } else {
            found.error(
                "amqp-exchange-missing",
                format!("exchange `{exchange}`, where {carries} go, does not exist"),
                "nothing is created to publish to: every publish fails",
                "declare it, durable, and bind a queue to it; or correct `exchange`",
            );
        }
        return Ok(());
    } else if let Known::Seen(settings) = learn::exchange(connection, &exchange, timeout).await? {
        judge(found, &exchange, &settings, carries);
    }
    // An internal one is refused whoever asks.
    if let Some(refusal) =
        publishing(connection, &exchange, &destination.address.with("pulsebus-doctor"), timeout)
            .await?
        && is_denied(&refusal)
        && !refusal.text.contains("internal")
    {
        let shown = if exchange.is_empty() { "amq.default" } else { &exchange };
        found.error(
            "amqp-publish-denied",
            format!("no permission to publish {carries} to exchange `{shown}`: {}", refusal.text),
            "every publish there fails, until it may",
            format!(
                "add `{shown}` to the user's `write` permission (rabbitmqctl set_permissions), and \
                 the routing keys to its topic permissions, if it has any"
            ),
        );
    }
    Ok(())
}

/// Whether a source of this configuration creates the exchange.
fn is_created(exchange: &str, sources: &[ExaminedSource]) -> bool {
    let creates = |source: AmqpSource| {
        let mut bindings = source.create.into_iter().flat_map(|create| create.bind);
        bindings.any(|binding| binding.exchange == exchange)
    };
    sources.iter().any(|asked| serde_json::from_value(asked.params.clone()).is_ok_and(creates))
}

fn judge(found: &mut Findings, name: &str, settings: &ExchangeSettings, carries: &str) {
    if settings.internal {
        found.error(
            "amqp-exchange-internal",
            format!("exchange `{name}`, where {carries} go, is internal"),
            "only other exchanges may publish to it: every publish fails",
            "publish to another exchange",
        );
    }
    if !settings.durable {
        found.warning(
            "amqp-exchange-transient",
            format!("exchange `{name}`, where {carries} go, is not durable"),
            "it is gone, with its bindings, when the broker restarts, and every publish fails then",
            "delete it and declare it anew, durable, with its bindings",
        );
    }
    if settings.auto_delete {
        found.warning(
            "amqp-exchange-auto-delete",
            format!("exchange `{name}`, where {carries} go, is deleted with its last binding"),
            "every publish fails from then on",
            "delete it and declare it anew without auto-delete, with its bindings",
        );
    }
    if let Some(alternate) = &settings.alternate {
        found.note(
            "amqp-alternate-exchange",
            format!("what exchange `{name}` cannot route goes to `{alternate}`"),
            "a routing key that no queue is bound for is confirmed all the same: a mistake in it \
             does not show as a dead letter",
            format!("see that somebody looks at what arrives at `{alternate}`"),
        );
    }
}

async fn queue_exists(
    connection: &Connection,
    queue: &str,
    timeout: Duration,
) -> Result<bool, Refusal> {
    let Ok(name) = short("queue", queue) else { return Ok(false) };
    let passive = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
    let channel = step(timeout, connection.create_channel()).await?;
    match step(timeout, channel.queue_declare(name, passive, FieldTable::default())).await {
        Ok(_) => Ok(true),
        Err(refusal) if refusal.code == Some(code::NOT_FOUND) => Ok(false),
        // It is there, and somebody else's.
        Err(Refusal { code: Some(code::ACCESS_REFUSED | code::RESOURCE_LOCKED), .. }) => Ok(true),
        Err(refusal) => Err(refusal),
    }
}

/// Publishes in a transaction that is rolled back: permissions are looked at when a message comes,
/// and it would be routed with the commit. Gives the broker's refusal.
async fn publishing(
    connection: &Connection,
    exchange: &str,
    key: &str,
    timeout: Duration,
) -> Result<Option<Refusal>, Refusal> {
    for _ in 0..TRIES {
        let channel = step(timeout, connection.create_channel()).await?;
        step(timeout, channel.tx_select()).await?;
        let (exchange, key) = (
            short("exchange", exchange).map_err(|failure| unsendable(&failure))?,
            short("routing key", key).map_err(|failure| unsendable(&failure))?,
        );
        let options = BasicPublishOptions::default();
        let sent = channel.basic_publish(exchange, key, options, b"", BasicProperties::default());
        let refusal = match step(timeout, sent).await {
            Ok(_) => match step(timeout, channel.tx_rollback()).await {
                Ok(()) => {
                    let _ = step(timeout, channel.close(200, "done".into())).await;
                    return Ok(None);
                }
                Err(refusal) => refusal,
            },
            Err(refusal) => refusal,
        };
        // Without a code the channel was closing already: the reason went to nobody.
        if refusal.code.is_some() {
            return Ok(Some(refusal));
        }
        if !connection.status().connected() {
            return Err(refusal);
        }
    }
    Ok(None)
}
