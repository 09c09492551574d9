//! `forward`: publishes events to a transport.

/// Where events go.
#[derive(Debug, Clone)]
pub struct ForwardOptions {
    /// NATS subject, AMQP routing key or URL path: a template.
    pub address: String,
    /// AMQP exchange.
    pub exchange: Option<String>,
}
