//! Where spans go.

use std::{collections::BTreeMap, path::PathBuf, time::Duration};

use url::Url;

use crate::secret::Secret;

/// Where spans go: an OpenTelemetry collector, by OTLP over HTTP in protobuf.
#[derive(Debug, Clone, PartialEq)]
pub struct OtlpSettings {
    /// Where they are posted to, path and all.
    pub endpoint: Url,
    /// A private certificate authority (PEM), in addition to the system's.
    pub ca_file: Option<PathBuf>,
    /// Headers of each request: `name=value,…`, as in `OTEL_EXPORTER_OTLP_HEADERS`.
    pub headers: Option<Secret>,
    /// The share of traces that is sampled among those that begin here, 0 to 1. Default 1.
    pub sample_ratio: f64,
    /// How long a request may take. Default 10 s.
    pub timeout: Duration,
    /// Spans that may wait to be exported; further ones are dropped. Default 8,192.
    pub queue: usize,
    /// The resource's `service.name`. Default `pulsebus`.
    pub service_name: String,
    /// Further attributes of the resource.
    pub resource: BTreeMap<String, String>,
}
