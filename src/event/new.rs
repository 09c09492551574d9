//! Events made by a program.

use std::sync::{Arc, LazyLock};

use bytes::Bytes;
use serde::Serialize;
use serde_json::value::RawValue;
use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use uuid::Uuid;

use super::{
    DomainEvent, HeaderValue, Headers, Message, Origin,
    scan::{self, Scalar},
    to_micros,
};

/// An event to emit. It becomes a native message, `{"id": …, "type": …, "data": …}`.
///
/// The id is a UUIDv7 given here, once, so that emitting the same value again (after an error
/// that left the outcome open) is recognised as a copy (G2).
///
/// ```
/// use pulsebus::event::{Decoder, NewEvent};
///
/// let lesson = serde_json::json!({"lesson_id": 7, "title": "Fractions"});
/// let new = NewEvent::new("LessonPublished", &lesson)?.source("/lessons").key("7");
/// let event = Decoder::default().decode(new.into_message()).map_err(|e| e.reason)?;
/// assert_eq!((event.kind(), event.source(), event.key()), ("LessonPublished", "/lessons", "7"));
/// assert_eq!(event.data(), r#"{"lesson_id":7,"title":"Fractions"}"#);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
pub struct NewEvent {
    id: String,
    kind: String,
    source: Option<String>,
    subject: Option<String>,
    key: Option<String>,
    time: Option<OffsetDateTime>,
    headers: Headers,
    data: Box<RawValue>,
}

/// Why a value makes no event.
#[derive(Debug, thiserror::Error)]
pub enum NewEventError {
    /// The data cannot be written as JSON, or the text given for it is none.
    #[error("the data is no JSON")]
    Data(#[from] serde_json::Error),
    /// A typed event is not written as an adjacently tagged enum is.
    #[error(
        "the value is not written as {{\"type\": \"…\", \"data\": …}}: give it #[serde(tag = \"type\", content = \"data\")]"
    )]
    NotTagged,
    /// A number that JSON does not have.
    #[error("`{0}` is NaN or infinite, which JSON cannot say")]
    NotFinite(&'static str),
}

impl NewEvent {
    /// An event of this type and data, with a fresh UUIDv7 for its id.
    ///
    /// # Errors
    /// Where the data cannot be written as JSON, e.g. a map whose keys are no strings.
    pub fn new(
        kind: impl Into<String>,
        data: &(impl Serialize + ?Sized),
    ) -> Result<Self, NewEventError> {
        Ok(Self::with(kind.into(), serde_json::value::to_raw_value(data)?))
    }

    /// The same, of data that is JSON text already; it is kept byte for byte, but for
    /// whitespace around it.
    ///
    /// # Errors
    /// Where the bytes are no JSON.
    pub fn from_json(kind: impl Into<String>, data: &[u8]) -> Result<Self, NewEventError> {
        let data: &RawValue = serde_json::from_slice(data)?;
        Ok(Self::with(kind.into(), data.to_owned()))
    }

    /// An event of a value that serde writes as `{"type": …, "data": …}`, as it does an
    /// adjacently tagged enum such as [`DomainEvent`]. A variant without fields has the data
    /// `null`.
    ///
    /// # Errors
    /// Where it cannot be written as JSON, or not in that form.
    pub fn tagged(event: &impl Serialize) -> Result<Self, NewEventError> {
        let json = serde_json::to_string(event)?;
        let Some(Scalar::Text(kind)) = scan::member(&json, "type").map(Scalar::of) else {
            return Err(NewEventError::NotTagged);
        };
        Self::from_json(kind, scan::member(&json, "data").unwrap_or("null").as_bytes())
    }

    fn with(kind: String, data: Box<RawValue>) -> Self {
        Self {
            id: Uuid::now_v7().to_string(),
            kind,
            source: None,
            subject: None,
            key: None,
            time: None,
            headers: Headers::new(),
            data,
        }
    }

    /// Sets the id, with [`source`](Self::source) the event's identity.
    #[must_use]
    pub fn id(mut self, id: impl Into<String>) -> Self {
        self.id = id.into();
        self
    }

    /// Sets the CloudEvents `source`.
    #[must_use]
    pub fn source(mut self, source: impl Into<String>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// Sets the CloudEvents `subject`.
    #[must_use]
    pub fn subject(mut self, subject: impl Into<String>) -> Self {
        self.subject = Some(subject.into());
        self
    }

    /// Sets the ordering key (G5).
    #[must_use]
    pub fn key(mut self, key: impl Into<String>) -> Self {
        self.key = Some(key.into());
        self
    }

    /// Sets when it happened; kept in UTC, to the microsecond. Left out where its year in UTC
    /// is not one of 0 to 9999, which RFC 3339 cannot say.
    #[must_use]
    pub fn time(mut self, time: OffsetDateTime) -> Self {
        self.time = time.checked_to_offset(time::UtcOffset::UTC).map(to_micros);
        self
    }

    /// Adds a header.
    #[must_use]
    pub fn header(mut self, name: impl Into<Box<str>>, value: impl Into<HeaderValue>) -> Self {
        self.headers.push(name, value);
        self
    }

    /// The message, with the origin `emit`.
    #[must_use]
    pub fn into_message(self) -> Message {
        static EMIT: LazyLock<Arc<str>> = LazyLock::new(|| "emit".into());
        static MEMORY: LazyLock<Arc<str>> = LazyLock::new(|| "memory".into());
        let mut body = String::with_capacity(self.data.get().len() + 128);
        let time = self.time.and_then(|time| time.format(&Rfc3339).ok());
        for (name, value) in [
            ("{\"id\":", Some(&self.id)),
            (",\"type\":", Some(&self.kind)),
            (",\"source\":", self.source.as_ref()),
            (",\"subject\":", self.subject.as_ref()),
            (",\"time\":", time.as_ref()),
            (",\"key\":", self.key.as_ref()),
        ] {
            if let Some(value) = value {
                body.push_str(name);
                // Display of a JSON string is its JSON text.
                body.push_str(&serde_json::Value::from(value.as_str()).to_string());
            }
        }
        body.push_str(",\"data\":");
        body.push_str(self.data.get());
        body.push('}');
        Message {
            body: Bytes::from(body),
            headers: self.headers,
            origin: Origin {
                source: Arc::clone(&EMIT),
                transport: Arc::clone(&MEMORY),
                ..Origin::default()
            },
        }
    }
}

impl TryFrom<&DomainEvent> for NewEvent {
    type Error = NewEventError;

    /// # Errors
    /// Where a score is NaN or infinite: serde would write `null`, which nobody can read back.
    fn try_from(event: &DomainEvent) -> Result<Self, NewEventError> {
        match event {
            DomainEvent::QuizSubmitted { score, .. } if !score.is_finite() => {
                Err(NewEventError::NotFinite("score"))
            }
            DomainEvent::QuizSubmitted { .. } | DomainEvent::LessonPublished { .. } => {
                Self::tagged(event)
            }
        }
    }
}

impl TryFrom<DomainEvent> for NewEvent {
    type Error = NewEventError;

    fn try_from(event: DomainEvent) -> Result<Self, NewEventError> {
        Self::try_from(&event)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use time::macros::datetime;

    use super::*;
    use crate::event::{Decoder, Event, Format, UnixTimestamp};

    fn decoded(new: NewEvent) -> Event {
        Decoder::default().decode(new.into_message()).unwrap()
    }

    #[test]
    fn everything_said_arrives() {
        let at = datetime!(2024-05-06 07:08:09.123456789 +02:00);
        let event = decoded(
            NewEvent::new("T\"\\é", &[1, 2])
                .unwrap()
                .id("i")
                .source("/s")
                .subject("about")
                .key("k")
                .time(at)
                .header("traceparent", "00-1"),
        );
        assert_eq!(event.format(), Format::Native);
        assert_eq!((event.id(), event.source(), event.kind()), ("i", "/s", "T\"\\é"));
        assert_eq!((event.subject(), event.key()), (Some("about"), "k"));
        assert_eq!(event.time(), Some(datetime!(2024-05-06 05:08:09.123456 UTC)));
        assert_eq!(event.attribute("traceparent").as_deref(), Some("00-1"));
        assert_eq!(event.data(), "[1,2]");
        assert_eq!(&*event.origin().source, "emit");
    }

    #[test]
    fn G2_the_same_value_emitted_again_is_a_copy() {
        let new = NewEvent::new("T", "x").unwrap();
        let first = decoded(new.clone());
        assert_eq!(first.id(), decoded(new).id());
        assert_ne!(first.id(), decoded(NewEvent::new("T", "x").unwrap()).id());
    }

    #[test]
    fn a_time_that_cannot_be_said_is_left_out() {
        let new = NewEvent::new("T", "x").unwrap();
        let late = datetime!(9999-12-31 23:59:59 -01:00);
        assert_eq!(decoded(new.clone().time(late)).time(), None);
        assert_eq!(decoded(new.time(datetime!(-0044-03-15 12:00 UTC))).time(), None);
    }

    #[test]
    fn domain_events_keep_their_type_and_data() {
        let event = DomainEvent::QuizSubmitted {
            quiz_id: Uuid::from_u128(1),
            student_id: Uuid::from_u128(2),
            score: 99.5,
            submitted_at: UnixTimestamp(1),
        };
        let stored = decoded(NewEvent::try_from(&event).unwrap());
        assert_eq!(stored.kind(), "QuizSubmitted");
        assert_eq!(stored.decode::<DomainEvent>().unwrap(), event);

        let DomainEvent::QuizSubmitted { quiz_id, student_id, submitted_at, .. } = event else {
            panic!()
        };
        let score = f64::NAN;
        let event = DomainEvent::QuizSubmitted { quiz_id, student_id, score, submitted_at };
        assert!(matches!(NewEvent::try_from(event), Err(NewEventError::NotFinite("score"))));
    }

    #[test]
    fn a_variant_without_fields_has_null_for_data() {
        #[derive(Serialize)]
        #[serde(tag = "type", content = "data")]
        enum Mine {
            Ping,
        }
        let event = decoded(NewEvent::tagged(&Mine::Ping).unwrap());
        assert_eq!((event.kind(), event.data()), ("Ping", "null"));
        assert!(matches!(NewEvent::tagged(&1), Err(NewEventError::NotTagged)));
    }

    #[test]
    fn data_that_is_no_json_is_refused() {
        assert!(matches!(NewEvent::from_json("T", b"{"), Err(NewEventError::Data(_))));
        assert!(matches!(NewEvent::from_json("T", b"\"\xff\""), Err(NewEventError::Data(_))));
        assert!(matches!(NewEvent::from_json("T", b"1 2"), Err(NewEventError::Data(_))));
    }

    proptest! {
        #[test]
        fn any_text_arrives(kind in "[^\\x00-\\x1f\\x7f]{1,20}", id in "[^\\x00-\\x1f\\x7f]{1,20}") {
            let event = decoded(NewEvent::from_json(kind.clone(), b"{\"a\" : 1e400}").unwrap().id(id.clone()));
            prop_assert_eq!((event.kind(), event.id()), (&*kind, &*id));
            prop_assert_eq!(event.data(), "{\"a\" : 1e400}");
        }
    }
}
