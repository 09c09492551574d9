//! A handler of your own: what to answer when, and what pulsebus does with the answer.
//!
//! ```text
//! cargo run --example custom_handler
//! ```

#![expect(clippy::print_stdout, reason = "an example shows what it does")]

use std::{
    collections::HashMap,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU32, Ordering::Relaxed},
    },
    time::Duration,
};

use pulsebus::{
    bus::EventBus,
    dispatch::{Filter, HandlerOptions},
    event::{DomainEvent, NewEvent, StoredEvent, UnixTimestamp},
    handler::{EventHandler, Outcome},
    retry::RetryPolicy,
};
use uuid::Uuid;

/// Keeps each learner's best score. A real one would keep it in a database, keyed by the
/// event's id, since an event can come twice after a crash.
#[derive(Default)]
struct BestScores {
    scores: Mutex<HashMap<Uuid, f64>>,
    calls: AtomicU32,
}

#[async_trait::async_trait]
impl EventHandler for BestScores {
    fn name(&self) -> &str {
        "best-scores"
    }

    async fn handle(&self, event: &StoredEvent) -> Outcome {
        // As if the database had a hiccup: tried again with backoff, only this key waits.
        if self.calls.fetch_add(1, Relaxed) == 0 {
            return Outcome::retry("the database had a hiccup");
        }
        let DomainEvent::QuizSubmitted { student_id, score, .. } = (match event.decode() {
            Ok(event) => event,
            // No number of attempts will mend this event: a dead letter, for a person.
            Err(error) => return Outcome::reject(error),
        }) else {
            return Outcome::Done;
        };
        let mut scores = self.scores.lock().unwrap_or_else(PoisonError::into_inner);
        let best = scores.entry(student_id).or_insert(score);
        *best = best.max(score);
        println!("{student_id} has {best} after {} at {}", event.id(), event.position);
        Outcome::Done
    }
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let bus = EventBus::builder().build().await?;
    let options = HandlerOptions {
        events: Filter::new(&["Quiz*"])?,
        workers: Some(8),
        retry: RetryPolicy::new(5, Duration::from_millis(50), Duration::from_secs(10), 2.0, 0.2)?,
        ..HandlerOptions::default()
    };
    bus.register_handler_with(std::sync::Arc::new(BestScores::default()), options).await?;
    bus.start_worker_pool(4);

    let learner = Uuid::new_v4();
    let mut last = None;
    for score in [3.5, 9.0, 7.25] {
        let event = DomainEvent::QuizSubmitted {
            quiz_id: Uuid::new_v4(),
            student_id: learner,
            score,
            submitted_at: UnixTimestamp::now(),
        };
        // One learner's events stay in order, also through the retry.
        let event = NewEvent::try_from(event)?.key(learner.to_string());
        last = Some(bus.emit(event).await?.position);
    }
    if let Some(last) = last {
        bus.handled("best-scores", last).await?;
    }
    bus.drain(Duration::from_secs(5)).await?;
    Ok(())
}
