//! EduPulse's own events, as the platform's serde writes them.
use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// Milliseconds since 1970-01-01T00:00:00Z.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct UnixTimestamp(pub i64);

/// The platform's events.
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
        /// The score.
        score: f64,
        /// When.
        submitted_at: UnixTimestamp,
    },
}
