//! Logs and metrics: names of fields and series.

mod logging;
mod metrics;

pub use logging::{LogFilter, LogFormat, LogSettings, LoggingError, filter, init_logging};
pub use metrics::{HandlerLabels, Metrics, OutcomeLabels, SourceLabels};
