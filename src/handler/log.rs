//! `log`: writes events to the daemon's log.

use async_trait::async_trait;
use tracing::Level;

use super::{EventHandler, Outcome};
use crate::event::StoredEvent;

/// Writes one line for each event: its position, id, type, key and source. The body is not
/// written: it may hold what does not belong in a log.
#[derive(Debug)]
pub struct LogHandler {
    name: String,
    level: Level,
}

impl LogHandler {
    /// A handler that writes at this level.
    #[must_use]
    pub fn new(name: impl Into<String>, level: Level) -> Self {
        Self { name: name.into(), level }
    }
}

#[async_trait]
impl EventHandler for LogHandler {
    fn name(&self) -> &str {
        &self.name
    }

    fn kind(&self) -> &'static str {
        "log"
    }

    fn has_side_effects(&self) -> bool {
        false
    }

    async fn handle(&self, event: &StoredEvent) -> Outcome {
        // A level is part of a line's static description, so there is a line for each.
        macro_rules! line {
            ($level:ident) => {
                tracing::event!(
                    Level::$level,
                    handler = &*self.name,
                    position = event.position.0,
                    id = event.id(),
                    r#type = event.kind(),
                    key = event.key(),
                    source = event.source(),
                    "event"
                )
            };
        }
        match self.level {
            Level::ERROR => line!(ERROR),
            Level::WARN => line!(WARN),
            Level::INFO => line!(INFO),
            Level::DEBUG => line!(DEBUG),
            Level::TRACE => line!(TRACE),
        }
        Outcome::Done
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io,
        sync::{Arc, Mutex},
    };

    use super::*;
    use crate::event::{Event, EventParts, Format, Headers, Origin, Position};

    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_line_says_which_event_at_the_level_asked_for() {
        let event = StoredEvent {
            position: Position(7),
            recorded_at: crate::event::now(),
            event: Event::from_parts(EventParts {
                id: "e7".into(),
                source: "/lms".into(),
                kind: "LessonPublished".into(),
                subject: None,
                time: None,
                key: "k\nforged line".into(),
                format: Format::Raw,
                headers: Headers::new(),
                origin: Origin::default(),
                body: bytes::Bytes::from_static(b"{\"password\":\"x\"}"),
            }),
        };
        for level in [Level::ERROR, Level::WARN, Level::INFO, Level::DEBUG, Level::TRACE] {
            let lines = Lines::default();
            let written = lines.clone();
            let subscriber = tracing_subscriber::fmt()
                .json()
                .with_max_level(Level::TRACE)
                .with_writer(move || lines.clone())
                .finish();
            let _guard = tracing::subscriber::set_default(subscriber);
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let outcome = runtime.block_on(LogHandler::new("audit", level).handle(&event));
            assert!(matches!(outcome, Outcome::Done));
            let bytes = written.0.lock().unwrap().clone();
            let line: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
            assert_eq!(line["level"], level.to_string());
            let fields = &line["fields"];
            assert_eq!(fields["handler"], "audit");
            assert_eq!(fields["position"], 7);
            assert_eq!(fields["id"], "e7");
            assert_eq!(fields["type"], "LessonPublished");
            assert_eq!(fields["key"], "k\nforged line");
            assert_eq!(fields["source"], "/lms");
            assert!(!String::from_utf8(bytes).unwrap().contains("password"));
        }
    }
}
