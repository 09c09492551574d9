//! EduPulse's own events, as the platform's serde writes them.

use serde::{Deserialize, Serialize};
use time::{Duration, OffsetDateTime};
use uuid::Uuid;

/// Milliseconds since 1970-01-01T00:00:00Z; negative before. As JSON: the bare integer.
///
/// ```
/// use pulsebus::event::UnixTimestamp;
/// use time::OffsetDateTime;
///
/// let at = UnixTimestamp(1_700_000_000_123);
/// assert_eq!(serde_json::to_string(&at)?, "1700000000123");
/// assert_eq!(OffsetDateTime::try_from(at)?.millisecond(), 123);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct UnixTimestamp(pub i64);

impl UnixTimestamp {
    /// The current time.
    #[must_use]
    pub fn now() -> Self {
        OffsetDateTime::now_utc().into()
    }
}

impl From<OffsetDateTime> for UnixTimestamp {
    /// Rounds down to the millisecond.
    fn from(at: OffsetDateTime) -> Self {
        // Both parts count from the second below, also before 1970.
        Self(at.unix_timestamp() * 1000 + i64::from(at.millisecond()))
    }
}

impl TryFrom<UnixTimestamp> for OffsetDateTime {
    type Error = time::error::ComponentRange;

    /// # Errors
    /// Beyond the years -9999 to 9999.
    fn try_from(at: UnixTimestamp) -> Result<Self, Self::Error> {
        let second = Self::from_unix_timestamp(at.0.div_euclid(1000))?;
        Ok(second + Duration::milliseconds(at.0.rem_euclid(1000)))
    }
}

/// The platform's events: `{"type": "LessonPublished", "data": {…}}`.
///
/// ```
/// use pulsebus::event::{DomainEvent, UnixTimestamp};
///
/// let json = r#"{"type":"LessonPublished","data":{
///     "lesson_id": "018f3c1e-0000-7000-8000-000000000001",
///     "title": "Fractions",
///     "author_id": "018f3c1e-0000-7000-8000-000000000002",
///     "published_at": 1700000000000}}"#;
/// let event: DomainEvent = serde_json::from_str(json)?;
/// let DomainEvent::LessonPublished { title, published_at, .. } = &event else { unreachable!() };
/// assert_eq!((title.as_str(), *published_at), ("Fractions", UnixTimestamp(1_700_000_000_000)));
/// assert!(serde_json::to_string(&event)?.starts_with(r#"{"type":"LessonPublished","data":{"#));
/// # Ok::<(), serde_json::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", content = "data")]
pub enum DomainEvent {
    /// A lesson went live.
    LessonPublished {
        /// The lesson.
        lesson_id: Uuid,
        /// Its title.
        title: String,
        /// Who wrote it.
        author_id: Uuid,
        /// When.
        published_at: UnixTimestamp,
    },
    /// A learner handed in a quiz.
    QuizSubmitted {
        /// The quiz.
        quiz_id: Uuid,
        /// The learner.
        student_id: Uuid,
        /// The score. JSON has no NaN and no infinity.
        score: f64,
        /// When.
        submitted_at: UnixTimestamp,
    },
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_timestamp_survives_the_way_there_and_back(
            millis in -62_135_596_800_000_i64..253_402_300_800_000,
        ) {
            let at = OffsetDateTime::try_from(UnixTimestamp(millis)).unwrap();
            prop_assert_eq!(UnixTimestamp::from(at), UnixTimestamp(millis));
        }

        #[test]
        fn no_integer_panics(millis: i64) {
            let _ = OffsetDateTime::try_from(UnixTimestamp(millis)).map(UnixTimestamp::from);
        }
    }

    #[test]
    fn a_timestamp_is_rounded_down_also_before_1970() {
        let at = OffsetDateTime::UNIX_EPOCH - Duration::microseconds(1500);
        assert_eq!(UnixTimestamp::from(at), UnixTimestamp(-2));
    }

    #[test]
    fn the_json_is_the_platforms() {
        let event = DomainEvent::QuizSubmitted {
            quiz_id: Uuid::from_u128(1),
            student_id: Uuid::from_u128(2),
            score: 0.5,
            submitted_at: UnixTimestamp(-3),
        };
        let json = r#"{"type":"QuizSubmitted","data":{"quiz_id":"00000000-0000-0000-0000-000000000001","student_id":"00000000-0000-0000-0000-000000000002","score":0.5,"submitted_at":-3}}"#;
        assert_eq!(serde_json::to_string(&event).unwrap(), json);
        assert_eq!(serde_json::from_str::<DomainEvent>(json).unwrap(), event);
    }
}
