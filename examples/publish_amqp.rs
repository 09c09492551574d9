//! Publish a quiz result to RabbitMQ from a service, confirmed and routed.
//!
//! ```text
//! cargo run --example publish_amqp
//! ```
//!
//! The exchange `edupulse` and a queue bound to it must exist;
//! `create = { bind = [{ exchange = "edupulse", routing_key = "quiz.#" }] }` in pulsebus's source
//! makes both.

#![expect(clippy::print_stdout, reason = "an example shows what it does")]

use lapin::{
    BasicProperties, Confirmation, Connection, ConnectionProperties,
    options::{BasicPublishOptions, ConfirmSelectOptions},
};
use serde_json::json;
use uuid::Uuid;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let url = std::env::var("AMQP_URL")
        .unwrap_or_else(|_| "amqp://guest:guest@127.0.0.1:5672/%2f".to_owned());
    let connection = Connection::connect(&url, ConnectionProperties::default()).await?;
    let channel = connection.create_channel().await?;
    channel.confirm_select(ConfirmSelectOptions::default()).await?;
    let id = Uuid::now_v7().to_string();
    let event = json!({
        "id": id,
        "type": "QuizSubmitted",
        "data": {
            "quiz_id": Uuid::new_v4(),
            "student_id": Uuid::new_v4(),
            "score": 8.5,
            "submitted_at": 1_700_000_000_000_i64,
        },
    });
    let properties = BasicProperties::default()
        .with_message_id(id.as_str().into())
        .with_content_type("application/json".into())
        .with_delivery_mode(2);
    let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
    let confirmation = channel
        .basic_publish(
            "edupulse".into(),
            "quiz.submitted".into(),
            options,
            event.to_string().as_bytes(),
            properties,
        )
        .await?
        .await?;
    // One publish at a time, so a returned message can only be this one.
    match confirmation {
        Confirmation::Ack(None) => println!("{id} is confirmed"),
        Confirmation::Ack(Some(_)) => anyhow::bail!("no queue is bound for quiz.submitted"),
        other => anyhow::bail!("RabbitMQ did not take it: {other:?}"),
    }
    connection.close(200, "done".into()).await?;
    Ok(())
}
