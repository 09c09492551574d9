//! Logs, metrics and spans: names of fields and series, and where they go; the pulses of the
//! loops.

mod arrivals;
mod logging;
mod metrics;
#[cfg(feature = "otlp")]
mod otlp;
#[cfg(feature = "otlp")]
mod otlp_wire;
mod pulse;
mod settings;
mod spans;

pub(crate) use arrivals::Arrivals;
pub use logging::{LogFilter, LogFormat, LogSettings, LoggingError, filter, init_logging};
pub use metrics::{
    ComponentLabels, ConnectionLabels, Float, HandlerLabels, HandlerMetrics, HandlerStateLabels,
    HttpMetrics, LeaseMetrics, LogMetrics, Metrics, OutcomeLabels, ReadLabels, RedrivenLabels,
    RequestLabels, RouteLabels, SourceLabels, SourceMetrics, SourceStateLabels, TextFormat,
};
#[cfg(feature = "otlp")]
pub use otlp::{Exporter, OtlpError, export_spans};
pub use pulse::{INTERVAL, Pulse, Pulses, Stuck, Watch};
pub use settings::OtlpSettings;
pub use spans::trace_of;
pub(crate) use spans::{Kind, Span, are_exported, within, within_call};

#[cfg(feature = "otlp")]
pub(crate) use otlp::parse_headers;
