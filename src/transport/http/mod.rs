//! HTTP: events in by the ingest endpoint, and out by webhooks.
//!
//! They are two transports. [`HttpTransport`] is the built-in way in: the API server posts into
//! it, and one source consumes it. [`WebhookTransport`] only publishes: each message is a
//! request, signed after [Standard Webhooks](https://www.standardwebhooks.com).

mod answer;
mod dial;
pub(crate) mod doctor;
mod headers;
mod ingress;
mod live;
mod request;
mod signature;
mod webhook;

pub use dial::{PrivateAddress, check_host};
pub use ingress::{HttpIngress, HttpTransport, IngressError};
pub use signature::{SecretError, check_secret};
pub use webhook::{WebhookOptions, WebhookTransport};
