//! `forward`: publishes events to a transport, byte for byte.
//!
//! The body goes out as it came in, with its headers; the event's id is the message's id
//! (`Nats-Msg-Id`, `message_id`, `webhook-id`). What belongs to the hop an event came by stays
//! behind: broker bookkeeping, routing, expiry, credentials.
//!
//! # An event that comes back
//!
//! In a two-way bridge a forwarded event is consumed again. It must be recognised as a copy: the
//! same `source` and `id`, of the same type and with the same data. What the message itself
//! does not say travels in headers that the [`Decoder`](crate::event::Decoder) knows:
//!
//! | format | id | source | type and data |
//! |---|---|---|---|
//! | structured | in the body | in the body | in the body |
//! | binary | `ce-id` | `ce-source` | `ce-type`, the body |
//! | native | the body's `id`, else the message id | the body's `source`, else `pulsebus-source` | in the body |
//! | raw | the body's `id`, else the message id | `pulsebus-source` | **`pulsebus-type`**, the body |
//!
//! A raw event's type came from the subject, routing key or header it arrived with, which the
//! other side does not have; a raw body may also look like another format, where the source it
//! came from pins `raw`. So `pulsebus-type` says both: *this message is raw, of this type*. It
//! is never passed on with an event that is not raw.
//!
//! Binary events keep their `ce-*` headers. Those that came by AMQP may be called
//! `cloudEvents:id` or `cloudEvents_id`, which AMQP alone allows; elsewhere they become `ce-id`.

use std::sync::Arc;

use async_trait::async_trait;
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use super::{
    Batching, EventHandler, HandlerError, Outcome,
    pointer::{Pointer, scalar},
    template::{ParseTemplateError, Place, RenderError, Template},
};
use crate::{
    event::{Format, HeaderValue, Headers, StoredEvent},
    transport::{Outbound, PublishError, Publisher},
};

/// The header that says an event's `source`, where the message itself does not.
pub const SOURCE_HEADER: &str = "pulsebus-source";
/// The header that says a message is raw, and of which type.
pub const TYPE_HEADER: &str = "pulsebus-type";

/// Where events go.
#[derive(Debug, Clone)]
pub struct ForwardOptions {
    /// NATS subject, AMQP routing key or URL path: a [`Template`].
    pub address: String,
    /// AMQP exchange: a [`Template`]; `None` where the transport has none.
    pub exchange: Option<String>,
    /// What the address is, which decides how values are escaped in it: [`Place::of`] the
    /// transport's kind. Default [`Place::Plain`].
    pub place: Place,
    /// At most this many events are published in one go, each of another key. Default 256.
    pub batch: usize,
}

impl ForwardOptions {
    /// To this address of a transport of this kind (`nats`, `amqp`, `http` …).
    #[must_use]
    pub fn new(transport_kind: &str, address: impl Into<String>) -> Self {
        Self {
            address: address.into(),
            exchange: None,
            place: Place::of(transport_kind),
            batch: 256,
        }
    }

    /// Finds what is wrong with the templates, for `pulsebus check`.
    ///
    /// # Errors
    /// What [`ForwardHandler::new`] would refuse.
    pub fn validate(&self) -> Result<(), ParseTemplateError> {
        self.templates().map(|_| ())
    }

    fn templates(&self) -> Result<(Template, Option<Template>), ParseTemplateError> {
        let address = Template::parse(&self.address)?;
        address.check(self.place)?;
        let exchange = self.exchange.as_deref().map(Template::parse).transpose()?;
        if let Some(exchange) = &exchange {
            exchange.check(Place::Amqp)?;
        }
        Ok((address, exchange))
    }
}

/// Publishes each event to an address made of it.
///
/// *Ordering*: events of one key go out one after the other, each only after the one before is
/// confirmed; events of other keys go out with it in one pipelined batch.
pub struct ForwardHandler {
    name: String,
    publisher: Arc<dyn Publisher>,
    address: Template,
    exchange: Option<Template>,
    /// Of an exchange that is the same for every event.
    fixed_exchange: Option<Arc<str>>,
    place: Place,
    batch: usize,
    source_in_body: Pointer,
}

impl std::fmt::Debug for ForwardHandler {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ForwardHandler")
            .field("name", &self.name)
            .field("address", &self.address.to_string())
            .finish_non_exhaustive()
    }
}

impl ForwardHandler {
    /// A handler that publishes with this publisher. The publisher is closed by whoever opened
    /// it, after the handler has ended.
    ///
    /// # Errors
    /// Where a template is wrong, or can give nothing that fits its place.
    #[expect(clippy::needless_pass_by_value, reason = "the options are the handler's from now on")]
    pub fn new(
        name: impl Into<String>,
        publisher: Arc<dyn Publisher>,
        options: ForwardOptions,
    ) -> Result<Self, ParseTemplateError> {
        let (address, exchange) = options.templates()?;
        let fixed_exchange = exchange.as_ref().and_then(Template::fixed).map(Arc::from);
        Ok(Self {
            name: name.into(),
            publisher,
            address,
            exchange,
            fixed_exchange,
            place: options.place,
            batch: options.batch.max(1),
            source_in_body: Pointer::member("source"),
        })
    }

    /// Publishes what could be made into a message; one outcome each, in order.
    pub(super) async fn publish_all(
        &self,
        made: Vec<Result<Outbound, RenderError>>,
    ) -> Vec<Outcome> {
        let mut outcomes: Vec<Option<Outcome>> = Vec::with_capacity(made.len());
        let mut messages = Vec::with_capacity(made.len());
        for message in made {
            match message {
                Ok(message) => {
                    messages.push(message);
                    outcomes.push(None);
                }
                Err(error) => outcomes.push(Some(Outcome::reject(error))),
            }
        }
        let mut results = if messages.is_empty() {
            Vec::new().into_iter()
        } else {
            self.publisher.publish(messages).await.into_iter()
        };
        outcomes
            .into_iter()
            .map(|rejected| {
                rejected.unwrap_or_else(|| results.next().map_or_else(unanswered, outcome))
            })
            .collect()
    }

    pub(super) fn outbound(&self, event: &StoredEvent) -> Result<Outbound, RenderError> {
        let exchange = match (&self.fixed_exchange, &self.exchange) {
            (Some(exchange), _) => Some(Arc::clone(exchange)),
            (None, Some(template)) => Some(template.render(event, &self.name, Place::Amqp)?.into()),
            (None, None) => None,
        };
        Ok(Outbound {
            id: event.id().into(),
            address: self.address.render(event, &self.name, self.place)?.into(),
            exchange,
            headers: self.headers(event),
            body: event.body().clone(),
        })
    }

    fn headers(&self, event: &StoredEvent) -> Headers {
        let mut headers = Headers::new();
        for (name, value) in event.headers().iter() {
            if stays_behind(name, value) {
                continue;
            }
            match (self.place, attribute_of_amqp(name)) {
                (Place::NatsSubject | Place::UrlPath, Some(attribute)) => {
                    if let Some(text) = attribute_text(value) {
                        headers.push(format!("ce-{attribute}"), text);
                    }
                }
                _ => headers.push(name, value.clone()),
            }
        }
        if !self.says_its_source(event) {
            headers.push(SOURCE_HEADER, event.source());
        }
        if event.format() == Format::Raw {
            headers.push(TYPE_HEADER, event.kind());
        }
        headers
    }

    /// Whether the message itself names the event's source. Where it does, the header is left
    /// out: a source may be any text, and not every text can be a header.
    fn says_its_source(&self, event: &StoredEvent) -> bool {
        let said = match event.format() {
            Format::CloudeventsBinary => event
                .headers()
                .iter()
                .find(|(name, _)| {
                    name.eq_ignore_ascii_case("ce-source")
                        || attribute_of_amqp(name) == Some("source")
                })
                .and_then(|(_, value)| value.as_str().map(Into::into)),
            Format::CloudeventsStructured | Format::Native => {
                self.source_in_body.find(event.body_str()).and_then(scalar)
            }
            // What looks like a source in a raw body may have another meaning.
            Format::Raw => None,
        };
        said.as_deref() == Some(event.source())
    }
}

#[async_trait]
impl EventHandler for ForwardHandler {
    fn name(&self) -> &str {
        &self.name
    }

    fn kind(&self) -> &'static str {
        "forward"
    }

    async fn handle(&self, event: &StoredEvent) -> Outcome {
        match self.outbound(event) {
            Err(error) => Outcome::reject(error),
            Ok(outbound) => match self.publisher.publish(vec![outbound]).await.pop() {
                Some(result) => outcome(result),
                None => unanswered(),
            },
        }
    }

    /// At most one of each key: in a batch with two of one key, the second could be confirmed
    /// and the first not, and their order would be lost.
    fn batching(&self) -> Batching {
        Batching::DistinctKeys(self.batch)
    }

    async fn handle_batch(&self, events: &[Arc<StoredEvent>]) -> Vec<Outcome> {
        self.publish_all(events.iter().map(|event| self.outbound(event)).collect()).await
    }
}

fn outcome(result: Result<(), PublishError>) -> Outcome {
    match result {
        Ok(()) => Outcome::Done,
        Err(PublishError::Refused(why)) => Outcome::reject(HandlerError::new(why)),
        Err(PublishError::Failed(why)) => Outcome::retry(HandlerError::new(why)),
        Err(PublishError::Unavailable(why)) => Outcome::unavailable(HandlerError::new(why)),
        Err(PublishError::Later { reason, after }) => {
            Outcome::Unavailable { error: HandlerError::new(reason), after: Some(after) }
        }
    }
}

/// A publisher that returned fewer results than messages: it may have arrived (P5).
fn unanswered() -> Outcome {
    Outcome::unavailable(HandlerError::new("the publisher did not say what became of the message"))
}

/// What belongs to the hop an event came by, not to the event.
fn stays_behind(name: &str, value: &HeaderValue) -> bool {
    /// Set anew for the next hop, or about the connection that is over.
    const NAMES: [&str; 17] = [
        SOURCE_HEADER,
        TYPE_HEADER,
        ":message_id",
        ":user_id",
        ":expiration",
        "x-death",
        "x-delivery-count",
        "x-acquired-count",
        "x-received-from",
        "x-stream-offset",
        "authorization",
        "proxy-authorization",
        "cookie",
        "host",
        "connection",
        "content-length",
        "transfer-encoding",
    ];
    /// `Nats-Expected-…`, `Nats-Rollup`, `Nats-TTL` are orders to the server.
    const PREFIXES: [&str; 3] = ["nats-", "x-first-death-", "x-last-death-"];
    let begins = |prefix: &str| {
        name.get(..prefix.len()).is_some_and(|start| start.eq_ignore_ascii_case(prefix))
    };
    NAMES.iter().any(|known| name.eq_ignore_ascii_case(known))
        || PREFIXES.iter().any(|prefix| begins(prefix))
        // RabbitMQ routes a copy to each routing key in these.
        || (matches!(name, "CC" | "BCC") && matches!(value, HeaderValue::Array(_)))
}

/// The attribute that an AMQP header of the CloudEvents AMQP binding holds.
fn attribute_of_amqp(name: &str) -> Option<&str> {
    let (prefix, attribute) = name.split_at_checked("cloudEvents:".len())?;
    let bound =
        prefix.eq_ignore_ascii_case("cloudEvents:") || prefix.eq_ignore_ascii_case("cloudEvents_");
    (bound && !attribute.is_empty()).then_some(attribute)
}

/// An attribute as CloudEvents spells it in a text header.
fn attribute_text(value: &HeaderValue) -> Option<String> {
    match value {
        HeaderValue::Timestamp(seconds) => {
            let at = OffsetDateTime::from_unix_timestamp(i64::try_from(*seconds).ok()?).ok()?;
            at.format(&Rfc3339).ok()
        }
        other => other.to_text().map(std::borrow::Cow::into_owned),
    }
}

#[cfg(test)]
mod tests;
