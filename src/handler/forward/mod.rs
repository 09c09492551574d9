//! `forward`: publishes events to a transport: the bridge.
//!
//! As it is unless told otherwise: the body byte for byte, the headers as `carry` brings them
//! from one kind of transport to another; or in another [`ForwardFormat`]. The event's id is the
//! message's id (`Nats-Msg-Id`, `message_id`, `webhook-id`); where the message had another one of
//! its own, that is kept in the header `pulsebus-message-id`.
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

mod carry;

use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;

use super::{
    Batching, EventHandler, HandlerError, Outcome,
    pointer::{Pointer, scalar},
    template::{ParseTemplateError, Place, RenderError, Template},
};
use crate::{
    event::{
        self, EncodeError, Format, Headers, StoredEvent, TRACEPARENT, TRACESTATE, TraceContext,
        binary,
    },
    telemetry::{self, Kind, Span},
    transport::{Outbound, PublishError, Publisher},
};

pub use carry::{ID_HEADER, MESSAGE_ID_HEADER, SOURCE_HEADER, TYPE_HEADER, TYPED_HEADER};

/// What a forwarded message looks like.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum ForwardFormat {
    /// Body and headers as they were published.
    #[default]
    Verbatim,
    /// CloudEvents 1.0, structured mode: attributes and data in one JSON object.
    CloudeventsStructured,
    /// CloudEvents 1.0, binary mode: attributes in headers, the data as the body.
    CloudeventsBinary,
    /// `{"type": …, "data": …}` with id and source.
    Native,
}

impl ForwardFormat {
    /// The name in the configuration.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Verbatim => "verbatim",
            Self::CloudeventsStructured => "cloudevents-structured",
            Self::CloudeventsBinary => "cloudevents-binary",
            Self::Native => "native",
        }
    }

    const fn format(self) -> Option<Format> {
        match self {
            Self::Verbatim => None,
            Self::CloudeventsStructured => Some(Format::CloudeventsStructured),
            Self::CloudeventsBinary => Some(Format::CloudeventsBinary),
            Self::Native => Some(Format::Native),
        }
    }
}

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
    /// Further headers, by name; the values are [`Template`]s. Each takes the place of what
    /// the event has under that name. For AMQP also properties, as `:priority`.
    pub headers: Vec<(String, String)>,
    /// What the message looks like. Default: as the event was published.
    pub format: ForwardFormat,
    /// At most this many events are published in one go, each of another key. Default 256, and
    /// 1 for `http`, where a call costs a round trip for each: there several workers are what
    /// sends several at once.
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
            headers: Vec::new(),
            format: ForwardFormat::Verbatim,
            batch: if transport_kind == "http" { 1 } else { 256 },
        }
    }

    /// Finds what is wrong with the templates, for `pulsebus check`.
    ///
    /// # Errors
    /// What [`ForwardHandler::new`] would refuse.
    pub fn validate(&self) -> Result<(), ParseTemplateError> {
        self.templates().map(|_| ())
    }

    fn templates(&self) -> Result<Templates, ParseTemplateError> {
        let address = Template::parse(&self.address)?;
        address.check(self.place)?;
        let exchange = self.exchange.as_deref().map(Template::parse).transpose()?;
        if let Some(exchange) = &exchange {
            exchange.check(Place::Amqp)?;
        }
        let mut headers = Vec::with_capacity(self.headers.len());
        for (name, value) in &self.headers {
            if let Some(problem) = header_problem(name, self.place) {
                return Err(ParseTemplateError::Header { name: name.clone(), problem });
            }
            let template = Template::parse(value)?;
            template.check(self.place.of_headers())?;
            headers.push((name.as_str().into(), template));
        }
        Ok(Templates { address, exchange, headers })
    }
}

struct Templates {
    address: Template,
    exchange: Option<Template>,
    headers: Vec<(Box<str>, Template)>,
}

/// Why a message to this place cannot be given a header of this name.
fn header_problem(name: &str, place: Place) -> Option<&'static str> {
    const OURS: [&str; 5] =
        [ID_HEADER, SOURCE_HEADER, TYPE_HEADER, TYPED_HEADER, MESSAGE_ID_HEADER];
    let begins = |prefix: &str| {
        name.get(..prefix.len()).is_some_and(|start| start.eq_ignore_ascii_case(prefix))
    };
    if OURS.iter().any(|ours| ours.eq_ignore_ascii_case(name)) {
        return Some("is set by pulsebus itself");
    }
    match place {
        Place::NatsSubject if !carry::is_name(name, false) => {
            Some("is no header of NATS: visible ASCII characters other than a colon")
        }
        Place::NatsSubject if begins("nats-") => Some("is an order to the NATS server"),
        Place::UrlPath if !carry::is_name(name, true) => Some("is no HTTP header"),
        Place::UrlPath
            if begins("webhook-")
                || ["host", "connection", "content-length", "transfer-encoding"]
                    .iter()
                    .any(|own| own.eq_ignore_ascii_case(name)) =>
        {
            Some("is set for each request by pulsebus itself")
        }
        Place::UrlPath if name.eq_ignore_ascii_case("authorization") => {
            Some("is a secret: set `token` or `token_file` of the transport")
        }
        Place::Amqp if name.is_empty() || name.len() > 255 => {
            Some("is no header of AMQP: 1 to 255 bytes")
        }
        Place::Amqp if name.starts_with(':') && !carry::is_property(name) => Some(
            "is no property that can be set: there are :content_type, :content_encoding, \
             :priority, :correlation_id, :reply_to, :timestamp, :type, :app_id and :cluster_id",
        ),
        Place::Amqp if name.eq_ignore_ascii_case("content-type") => {
            Some("is a property in AMQP: write :content_type")
        }
        Place::Amqp if matches!(name, "CC" | "BCC") => {
            Some("would send the message elsewhere as well")
        }
        _ => None,
    }
}

/// Publishes each event to an address made of it.
///
/// *Ordering*: events of one key go out one after the other, each only after the one before is
/// confirmed; events of other keys go out with it in one pipelined batch.
pub struct ForwardHandler {
    name: String,
    publisher: Arc<dyn Publisher>,
    templates: Templates,
    /// Of an exchange that is the same for every event.
    fixed_exchange: Option<Arc<str>>,
    place: Place,
    format: ForwardFormat,
    batch: usize,
    source_in_body: Pointer,
}

impl std::fmt::Debug for ForwardHandler {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ForwardHandler")
            .field("name", &self.name)
            .field("address", &self.templates.address.to_string())
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
        let templates = options.templates()?;
        let fixed_exchange = templates.exchange.as_ref().and_then(Template::fixed).map(Arc::from);
        Ok(Self {
            name: name.into(),
            publisher,
            templates,
            fixed_exchange,
            place: options.place,
            format: options.format,
            batch: options.batch.max(1),
            source_in_body: Pointer::member("source"),
        })
    }

    /// Publishes what could be made into a message; one outcome each, in order.
    pub(super) async fn publish_all(&self, made: Vec<Result<Outbound, MakeError>>) -> Vec<Outcome> {
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

    /// Makes the message of an event, and begins the span of its delivery: what the destination
    /// does with it goes on from there.
    fn traced(&self, event: &StoredEvent) -> (Result<Outbound, MakeError>, Span) {
        let (kind, system) = match self.place {
            Place::UrlPath | Place::HttpHeader => (Kind::Client, "http"),
            Place::NatsSubject | Place::NatsHeader => (Kind::Producer, "nats"),
            Place::Amqp => (Kind::Producer, "rabbitmq"),
            Place::Plain => (Kind::Producer, "memory"),
        };
        let mut span = telemetry::within_call(event, kind, || format!("publish {}", self.name));
        let mut made = self.outbound(event);
        if let (Ok(message), Some(context)) = (&mut made, span.context()) {
            let destination = message.exchange.as_deref().unwrap_or(&message.address);
            span.set("messaging.system", system);
            span.set("messaging.destination.name", destination);
            if system == "rabbitmq" {
                span.set("messaging.rabbitmq.destination.routing_key", &*message.address);
            }
            span.set("messaging.operation.name", "publish");
            span.set("messaging.operation.type", "send");
            span.set("messaging.message.id", &*message.id);
            span.set("messaging.message.body.size", message.body.len() as u64);
            span.set("pulsebus.handler", &*self.name);
            span.set("pulsebus.position", event.position.0);
            self.continued(event, context, &mut message.headers);
        }
        (made, span)
    }

    /// Puts the place in the trace into the headers, unless the configuration has one of its own
    /// there. An event that says nothing valid of a trace has no span, so what it says stays.
    fn continued(&self, event: &StoredEvent, context: TraceContext, headers: &mut Headers) {
        let own = |name: &str| {
            self.templates.headers.iter().any(|(given, _)| given.eq_ignore_ascii_case(name))
        };
        if own(TRACEPARENT) {
            return;
        }
        headers.set(TRACEPARENT, context.to_string());
        let goes_on =
            TraceContext::of(event).is_some_and(|own| own.trace_id() == context.trace_id());
        if !goes_on && !own(TRACESTATE) {
            *headers = headers
                .iter()
                .filter(|(name, _)| !name.eq_ignore_ascii_case(TRACESTATE))
                .map(|(name, value)| (name.into(), value.clone()))
                .collect();
        } else if goes_on
            && headers.get(TRACESTATE).is_none()
            && let Some(state) = event::tracestate(event)
        {
            // Of the CloudEvents extension, which says it where no header does.
            headers.push(TRACESTATE, state);
        }
    }

    pub(super) fn outbound(&self, event: &StoredEvent) -> Result<Outbound, MakeError> {
        let Templates { address, exchange, headers: set } = &self.templates;
        let exchange = match (&self.fixed_exchange, exchange) {
            (Some(exchange), _) => Some(Arc::clone(exchange)),
            (None, Some(template)) => Some(template.render(event, &self.name, Place::Amqp)?.into()),
            (None, None) => None,
        };
        let address = address.render(event, &self.name, self.place)?.into();
        let (mut headers, body) = match self.format.format() {
            Some(format) if !(format == event.format() && format == Format::CloudeventsBinary) => {
                self.encoded(event, format)?
            }
            _ => (self.headers(event), event.body().clone()),
        };
        for (name, template) in set {
            let text = template.render(event, &self.name, self.place.of_headers())?;
            headers.set(name, text);
        }
        Ok(Outbound { id: event.id().into(), address, exchange, headers, body })
    }

    /// Headers and body of the event in another format than it came in.
    fn encoded(&self, event: &StoredEvent, format: Format) -> Result<(Headers, Bytes), MakeError> {
        let encoded = event.encode(format)?;
        // Its attributes are in the body now, or set anew below; so is the content type.
        let mut headers: Headers = self
            .carried(event)
            .iter()
            .filter(|(name, _)| {
                binary::attribute_in(name).is_none()
                    && !matches!(*name, ":content_type")
                    && (self.place == Place::Amqp || !name.eq_ignore_ascii_case("content-type"))
            })
            .map(|(name, value)| (name.into(), value.clone()))
            .collect();
        let content_type = if self.place == Place::Amqp { ":content_type" } else { "Content-Type" };
        headers.push(content_type, encoded.content_type.into_owned());
        for (name, value) in encoded.attributes {
            if self.place == Place::Amqp {
                headers.push(format!("{}{name}", carry::AMQP_PREFIX), value);
            } else {
                headers.push(format!("ce-{name}"), binary::encode(&value).into_owned());
            }
        }
        Ok((headers, encoded.body))
    }

    /// The headers of the event as it came.
    fn headers(&self, event: &StoredEvent) -> Headers {
        let mut headers = self.carried(event);
        if !self.says_its_source(event) {
            headers.push(SOURCE_HEADER, self.ours(event.source()));
        }
        if event.format() == Format::Raw {
            headers.push(TYPE_HEADER, self.ours(event.kind()));
        }
        headers
    }

    /// A value of a header of ours, as this place takes it.
    fn ours(&self, value: &str) -> String {
        if self.is_text() { binary::encode(value).into_owned() } else { value.to_owned() }
    }

    fn is_text(&self) -> bool {
        matches!(self.place, Place::NatsSubject | Place::UrlPath)
    }

    fn carried(&self, event: &StoredEvent) -> Headers {
        // What a header of one's own takes the place of must not come along in another form.
        let given = |name: &str| {
            self.templates.headers.iter().any(|(given, _)| given.eq_ignore_ascii_case(name))
        };
        let kept: Headers;
        let own = event.headers();
        let own = if own.iter().any(|(name, _)| given(name)) {
            kept = own
                .iter()
                .filter(|(name, _)| !given(name))
                .map(|(name, value)| (name.into(), value.clone()))
                .collect();
            &kept
        } else {
            own
        };
        let mut headers = carry::carry(own, &event.origin().transport, self.place);
        // The message's own id cannot hold every event's.
        if self.is_text() && !carry::is_text(event.id(), self.place == Place::UrlPath) {
            headers.push(ID_HEADER, self.ours(event.id()));
        }
        // The message gets the event's id; where it had one of its own, that is kept.
        let own = ["nats-msg-id", ":message_id", "webhook-id"]
            .into_iter()
            .find_map(|name| event.headers().get_str(name));
        if let Some(own) = own.filter(|own| !own.is_empty() && *own != event.id())
            && headers.get(MESSAGE_ID_HEADER).is_none()
        {
            headers.push(MESSAGE_ID_HEADER, self.ours(own));
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
                    binary::attribute_in(name)
                        .is_some_and(|(name, _)| name.eq_ignore_ascii_case("source"))
                })
                // Whatever it says: it is where the event has its source from.
                .map(|_| event.source().into()),
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
        let (made, span) = self.traced(event);
        let outcome = match made {
            Err(error) => Outcome::reject(error),
            Ok(outbound) => match self.publisher.publish(vec![outbound]).await.pop() {
                Some(result) => outcome(result),
                None => unanswered(),
            },
        };
        ended(span, &outcome);
        outcome
    }

    /// At most one of each key: in a batch with two of one key, the second could be confirmed
    /// and the first not, and their order would be lost.
    fn batching(&self) -> Batching {
        Batching::DistinctKeys(self.batch)
    }

    async fn handle_batch(&self, events: &[Arc<StoredEvent>]) -> Vec<Outcome> {
        let mut spans = Vec::new();
        let mut made = Vec::with_capacity(events.len());
        for (at, event) in events.iter().enumerate() {
            let (message, span) = self.traced(event);
            made.push(message);
            if span.is_some() {
                spans.push((at, span));
            }
        }
        let outcomes = self.publish_all(made).await;
        for (at, span) in spans {
            if let Some(outcome) = outcomes.get(at) {
                ended(span, outcome);
            }
        }
        outcomes
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

/// A delivery has ended so.
fn ended(mut span: Span, outcome: &Outcome) {
    match outcome {
        Outcome::Done => {}
        Outcome::Retry { error, .. }
        | Outcome::Reject { error }
        | Outcome::Unavailable { error, .. } => span.fail(error.as_str()),
    }
    span.end();
}

/// A publisher that returned fewer results than messages: it may have arrived (P5).
fn unanswered() -> Outcome {
    Outcome::unavailable(HandlerError::new("the publisher did not say what became of the message"))
}

/// Why no message can be made of an event. None ever will be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum MakeError {
    /// A template has no text for it.
    #[error(transparent)]
    Render(#[from] RenderError),
    /// The format has no place for it.
    #[error(transparent)]
    Encode(#[from] EncodeError),
}

#[cfg(test)]
mod tests;
