//! The daemon's own log.

use std::{io::IsTerminal as _, os::unix::fs::MetadataExt as _};

use tracing::{Level, Metadata};
use tracing_journald::{Priority, PriorityMappings};
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
    /// Text on a terminal, the journal's fields where standard error is the journal's, JSON
    /// otherwise.
    #[default]
    Auto,
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
    /// To systemd's journal, with its priorities, by its own socket: each field is one of the
    /// entry, `PULSEBUS_HANDLER` for `handler`.
    Journald,
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
    /// The journal was asked for, and is not there.
    #[error("log.format: the journal's socket cannot be opened; is this a machine with systemd?")]
    Journal(#[source] std::io::Error),
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

/// Whether standard error is the journal's stream: systemd says its device and inode in
/// `$JOURNAL_STREAM` (systemd.exec(5)), so that a redirection is noticed.
fn is_journal(stream: Option<&str>, stderr: Option<(u64, u64)>) -> bool {
    let said = stream.and_then(|stream| stream.split_once(':')).and_then(|(device, inode)| {
        Some((device.parse::<u64>().ok()?, inode.parse::<u64>().ok()?))
    });
    said.is_some() && said == stderr
}

/// Device and inode of standard error.
fn stderr_inode() -> Option<(u64, u64)> {
    let stderr = std::fs::metadata("/proc/self/fd/2").ok()?;
    Some((stderr.dev(), stderr.ino()))
}

/// The journal, with priorities of its own kind: `info` is 6, `debug` and `trace` are 7.
fn journal() -> std::io::Result<tracing_journald::Layer> {
    Ok(tracing_journald::layer()?
        .with_field_prefix(Some("PULSEBUS".to_owned()))
        .with_syslog_identifier("pulsebus".to_owned())
        .with_priority_mappings(PriorityMappings {
            error: Priority::Error,
            warn: Priority::Warning,
            info: Priority::Informational,
            debug: Priority::Debug,
            trace: Priority::Debug,
        }))
}

/// Sends `tracing` events to standard error: text on a terminal, one JSON object a line
/// otherwise, or to the journal where standard error is the journal's; unless the settings say
/// which. What is written can be changed with what is returned.
///
/// # Errors
/// Where the filter is not understood, the journal was asked for and is not there, or logging is
/// set up already.
pub fn init_logging(settings: &LogSettings) -> Result<LogFilter, LoggingError> {
    let terminal = std::io::stderr().is_terminal();
    let (filter, handle) = reload::Layer::new(filter(&settings.filter)?);
    let lines = fmt::layer().with_writer(std::io::stderr);
    let text = |lines: fmt::Layer<_, _, _, _>| {
        lines.with_ansi(terminal && std::env::var_os("NO_COLOR").is_none()).boxed()
    };
    let json = |lines: fmt::Layer<_, _, _, _>| {
        lines.json().flatten_event(true).with_current_span(true).with_span_list(false).boxed()
    };
    let stream = std::env::var("JOURNAL_STREAM").ok();
    let lines = match settings.format {
        LogFormat::Auto if terminal => text(lines),
        LogFormat::Auto if is_journal(stream.as_deref(), stderr_inode()) => match journal() {
            Ok(journal) => journal.boxed(),
            // Its stream takes lines as well.
            Err(_) => json(lines),
        },
        LogFormat::Auto | LogFormat::Json => json(lines),
        LogFormat::Text => text(lines),
        LogFormat::Journald => journal().map_err(LoggingError::Journal)?.boxed(),
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
    fn standard_error_is_the_journals_only_where_device_and_inode_say_so() {
        assert!(is_journal(Some("8:1234"), Some((8, 1234))));
        for stream in [None, Some("8:1235"), Some("9:1234"), Some("8"), Some("8:x"), Some("")] {
            assert!(!is_journal(stream, Some((8, 1234))), "{stream:?}");
        }
        assert!(!is_journal(Some("x"), None) && !is_journal(Some("8:1234"), None));
        // As systemd would say of this process.
        let (device, inode) = stderr_inode().unwrap();
        assert!(is_journal(Some(&format!("{device}:{inode}")), stderr_inode()));
    }

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
