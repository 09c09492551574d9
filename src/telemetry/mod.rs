//! Logs and metrics: names of fields and series.

mod logging;
mod metrics;

pub use logging::{LogFilter, LogFormat, LogSettings, LoggingError, filter, init_logging};
pub use metrics::{
    ComponentLabels, ConnectionLabels, Float, HandlerLabels, HandlerMetrics, HandlerStateLabels,
    HttpMetrics, LeaseMetrics, LogMetrics, Metrics, OutcomeLabels, ReadLabels, RedrivenLabels,
    RequestLabels, RouteLabels, SourceLabels, SourceMetrics, SourceStateLabels, TextFormat,
};
