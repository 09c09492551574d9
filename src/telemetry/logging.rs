//! The daemon's own log.

use std::io::IsTerminal as _;

use tracing::{Level, Metadata};
use tracing_subscriber::{
    EnvFilter, Layer as _, Registry, filter::filter_fn, fmt, layer::SubscriberExt as _, reload,
    util::SubscriberInitExt as _,
};

/// The daemon's own log, on standard error.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogSettings {
    /// A level, or directives as in `info,pulsebus::dispatch=debug`. Default `info`.
    pub filter: String,
    /// How lines look.
    pub format: LogFormat,
}

/// How log lines look.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum LogFormat {
    /// Text on a terminal, JSON otherwise.
    #[default]
    Auto,
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// What the drivers say is heard only when it says more than the states we report ourselves;
/// lapin would print returned messages with their payload, and calls it an error when a queue
/// that we ask for is not there.
const DRIVERS: &[&str] = &[
    "lapin=off",
    "async_nats=off",
    "sqlx=warn",
    "tantivy=warn",
    "hyper=warn",
    "rustls=warn",
    "h2=warn",
];

/// At `trace` lapin writes the frames it sends, the one with the password among them. No filter
/// brings these lines back.
fn is_safe(metadata: &Metadata<'_>) -> bool {
    let target = metadata.target();
    *metadata.level() != Level::TRACE
        || !["lapin", "amq_protocol"].iter().any(|driver| target.starts_with(driver))
}

/// Why logging could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum LoggingError {
    /// The filter is not understood.
    #[error("log.filter: `{filter}` is no level and no list of target=level")]
    Filter {
        /// The filter.
        filter: String,
        /// What is wrong with it.
        source: tracing_subscriber::filter::ParseError,
    },
    /// The filter holds what is in no name of a level or target.
    #[error("log.filter: `{0}` has other characters than visible ASCII ones")]
    Characters(String),
    /// This process logs already.
    #[error("logging is set up already")]
    Twice,
    /// The log has ended.
    #[error("log.filter cannot be changed: {0}")]
    Gone(reload::Error),
}

/// The filter of the daemon's log while it runs.
#[derive(Debug, Clone)]
pub struct LogFilter(reload::Handle<EnvFilter, Registry>);

impl LogFilter {
    /// From now on this is written. Nothing changes where the filter is not understood.
    ///
    /// # Errors
    /// As [`filter`]; [`LoggingError::Gone`] where nothing logs any more.
    pub fn set(&self, text: &str) -> Result<(), LoggingError> {
        self.0.reload(filter(text)?).map_err(LoggingError::Gone)
    }
}

/// Parses a filter; directives in it win over those for the drivers.
///
/// # Errors
/// [`LoggingError::Filter`], [`LoggingError::Characters`].
pub fn filter(filter: &str) -> Result<EnvFilter, LoggingError> {
    // The parser panics at some of the others.
    if !filter.chars().all(|c| c.is_ascii_graphic() || c == ' ') {
        return Err(LoggingError::Characters(filter.escape_debug().to_string()));
    }
    let parse = |text: &str| {
        EnvFilter::builder()
            .parse(text)
            .map_err(|source| LoggingError::Filter { filter: filter.to_owned(), source })
    };
    // On its own first, so that the error is about what was written.
    parse(filter)?;
    let mut all = DRIVERS.join(",");
    if !filter.trim().is_empty() {
        all.push(',');
        all.push_str(filter);
    }
    parse(&all)
}

/// Sends `tracing` events to standard error: text on a terminal, one JSON object a line
/// otherwise, unless the settings say which. What is written can be changed with what is returned.
///
/// # Errors
/// Where the filter is not understood, or logging is set up already.
pub fn init_logging(settings: &LogSettings) -> Result<LogFilter, LoggingError> {
    let terminal = std::io::stderr().is_terminal();
    let json = match settings.format {
        LogFormat::Auto => !terminal,
        LogFormat::Text => false,
        LogFormat::Json => true,
    };
    let (filter, handle) = reload::Layer::new(filter(&settings.filter)?);
    let lines = fmt::layer().with_writer(std::io::stderr);
    let lines = if json {
        lines.json().flatten_event(true).with_current_span(true).with_span_list(false).boxed()
    } else {
        lines.with_ansi(terminal && std::env::var_os("NO_COLOR").is_none()).boxed()
    };
    tracing_subscriber::registry()
        // One filter for all, not one of the layer: with those, an event whose call site is
        // registered on two threads at once can be switched off for good.
        .with(filter)
        .with(filter_fn(is_safe))
        .with(lines)
        .try_init()
        .map_err(|_| LoggingError::Twice)?;
    Ok(LogFilter(handle))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn G8_a_filter_keeps_drivers_quiet_and_can_be_overruled() {
        assert!(filter("info").unwrap().to_string().contains("lapin=off"));
        assert!(filter("info,lapin=debug").unwrap().to_string().contains("lapin=debug"));
        let error = filter("pulsebus=loud").unwrap_err().to_string();
        assert!(error.contains("log.filter") && error.contains("pulsebus=loud"), "{error}");
        // The parser panics at this one.
        let error = filter("\t0¡=").unwrap_err().to_string();
        assert!(error.contains("visible ASCII"), "{error}");
    }
}
