//! Publish a lesson to NATS JetStream from a service, confirmed.
//!
//! ```text
//! cargo run --example publish_nats
//! ```
//!
//! The stream must exist; `nats stream add EDUPULSE --subjects 'edupulse.>'` makes it, or
//! `create = { subjects = ["edupulse.>"] }` in pulsebus's source.

#![expect(clippy::print_stdout, reason = "an example shows what it does")]

use async_nats::{HeaderMap, jetstream};
use serde_json::json;
use uuid::Uuid;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let url = std::env::var("NATS_URL").unwrap_or_else(|_| "nats://127.0.0.1:4222".to_owned());
    let stream = jetstream::new(async_nats::connect(url).await?);
    let id = Uuid::now_v7().to_string();
    let event = json!({
        "id": id,
        "type": "LessonPublished",
        "data": {
            "lesson_id": Uuid::new_v4(),
            "title": "Photosynthesis for beginners",
            "author_id": Uuid::new_v4(),
            "published_at": 1_700_000_000_000_i64,
        },
    });
    let mut headers = HeaderMap::new();
    // The same id on a second try makes a copy recognisable.
    headers.insert("Nats-Msg-Id", id.as_str());
    let ack = stream
        .publish_with_headers("edupulse.lessons.published", headers, event.to_string().into())
        .await?
        // The publish counts only once the stream has confirmed it.
        .await?;
    println!("{id} is number {} in {}", ack.sequence, ack.stream);
    Ok(())
}
