//! Logs and metrics: names of fields and series; the pulses of the loops.

mod logging;
mod metrics;
mod pulse;

pub use logging::{LogFormat, LogSettings, LoggingError, filter, init_logging};
pub use metrics::{HandlerLabels, Metrics, OutcomeLabels, SourceLabels};
pub use pulse::{INTERVAL, Pulse, Pulses, Stuck, Watch};
