//! The bus in your own process: register, emit, see it stored and handled.
//!
//! ```text
//! cargo run --example embedded
//! ```

#![expect(clippy::print_stdout, reason = "an example shows what it does")]

use std::time::Duration;

use futures_util::TryStreamExt as _;
use pulsebus::{
    bus::EventBus,
    event::{DomainEvent, StoredEvent, UnixTimestamp},
    handler::{EventHandler, Outcome},
    store::sqlite::{SqliteOptions, SqliteStore},
};
use uuid::Uuid;

struct Announce;

#[async_trait::async_trait]
impl EventHandler for Announce {
    fn name(&self) -> &str {
        "announce"
    }

    async fn handle(&self, event: &StoredEvent) -> Outcome {
        println!("handled {} at position {}: {}", event.kind(), event.position, event.data());
        Outcome::Done
    }
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("events.db");
    let store = SqliteStore::open(SqliteOptions::new(path)).await?;
    let bus = EventBus::builder().store(store).build().await?;
    bus.register_handler(Announce).await?;
    bus.start_worker_pool(4);

    let lesson = DomainEvent::LessonPublished {
        lesson_id: Uuid::new_v4(),
        title: "Photosynthesis for beginners".to_owned(),
        author_id: Uuid::new_v4(),
        published_at: UnixTimestamp::now(),
    };
    // Resolves when it is committed: a crash from here on loses nothing.
    let emitted = bus.emit(lesson).await?;
    // Resolves when the handler has done it and its cursor is saved.
    bus.handled("announce", emitted.position).await?;

    let all: Vec<_> = bus.store().stream_all::<DomainEvent>().try_collect().await?;
    println!("the log holds {all:?}");
    bus.drain(Duration::from_secs(5)).await?;
    Ok(())
}
