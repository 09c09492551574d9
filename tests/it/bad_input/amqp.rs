//! Through RabbitMQ.

use lapin::{
    BasicProperties, Channel, Confirmation, Connection, ConnectionProperties,
    options::{BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions},
    types::{AMQPValue, FieldTable, ShortString},
};

use super::{Expected, Marked, audit_sqlite, cases, neighbour, only_odd_headers};
use crate::support::{daemon::Daemon, rabbit::RabbitNode, wait_until};

const QUEUE: &str = "bad";

/// What fits into the one frame of 128 KiB that a message's properties travel in.
const HEADERS: usize = 6_000;

/// A client that is not ours, and confirms what it publishes.
struct Client {
    channel: Channel,
    _connection: Connection,
}

impl Client {
    async fn connect(uri: &str) -> Self {
        let connection = Connection::connect(uri, ConnectionProperties::default()).await.unwrap();
        let channel = connection.create_channel().await.unwrap();
        channel.confirm_select(ConfirmSelectOptions::default()).await.unwrap();
        Self { channel, _connection: connection }
    }

    async fn publish(&self, properties: BasicProperties, body: &[u8]) {
        let confirmed = self
            .channel
            .basic_publish(
                "".into(),
                QUEUE.into(),
                BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() },
                body,
                properties,
            )
            .await
            .unwrap()
            .await
            .unwrap();
        assert_eq!(confirmed, Confirmation::Ack(None));
    }
}

/// The case's headers as a table, its content type as the property; `Err` where the client
/// refuses one. A table has each name once: of a repeated one the first counts.
fn properties(marked: &Marked) -> Result<BasicProperties, String> {
    let mut properties = BasicProperties::default();
    let mut table = FieldTable::default();
    for (name, value) in marked.headers() {
        if name.eq_ignore_ascii_case("content-type") {
            let value = ShortString::try_new(value).map_err(|_| format!("{value:?}"))?;
            properties = properties.with_content_type(value);
            continue;
        }
        let name = ShortString::try_new(name).map_err(|_| format!("{name:?}"))?;
        if !table.contains_key(name.as_str()) {
            table.insert(name, AMQPValue::LongString(value.as_bytes().into()));
        }
    }
    Ok(properties.with_headers(table).with_delivery_mode(2))
}

async fn publish_all(client: &Client, cases: &[Marked]) -> Vec<String> {
    let mut refused = Vec::new();
    client.publish(BasicProperties::default(), &neighbour(0)).await;
    for (n, marked) in cases.iter().enumerate() {
        match properties(marked) {
            Ok(properties) => client.publish(properties, &marked.case.body).await,
            Err(_) => refused.push(marked.mark.clone()),
        }
        client.publish(BasicProperties::default(), &neighbour(n + 1)).await;
    }
    refused
}

/// Waits until the queue is empty and nothing in it waits for an ack.
async fn consumed(node: &RabbitNode) {
    wait_until("all is acked", async || {
        let queues = node.ctl(&["list_queues", "name", "messages", "--silent"]).await;
        let mut columns = queues.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
        columns.any(|columns| columns == [QUEUE, "0"]).then_some(())
    })
    .await;
}

async fn corpus_through(store: &str, audit: impl AsyncFnOnce(&Daemon, &Expected)) {
    let node = RabbitNode::start().await;
    // As RabbitMQ comes: this node is configured to take less.
    let set = "application:set_env(rabbit, max_message_size, 134217728).";
    assert_eq!(node.ctl(&["eval", set]).await.trim(), "ok");
    let client = Client::connect(&node.uri()).await;
    let durable = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
    client.channel.queue_declare(QUEUE.into(), durable, FieldTable::default()).await.unwrap();
    let daemon = Daemon::start(&format!(
        r#"
        {store}
        [transports.rabbit]
        kind = "amqp"
        url = "{}"
        [sources.bad]
        transport = "rabbit"
        queue = "{QUEUE}"
        [handlers.log]
        kind = "log"
        level = "debug"
        "#,
        node.uri()
    ))
    .await;

    let mut cases = cases();
    let neighbours = cases.len() + 1;
    for marked in &mut cases {
        marked.case.headers.truncate(HEADERS);
    }
    let refused = publish_all(&client, &cases).await;
    consumed(&node).await;
    let head = daemon.head().await;
    only_odd_headers(&cases, &refused);
    let refused_names: Vec<_> = cases
        .iter()
        .filter(|marked| refused.contains(&marked.mark))
        .map(|marked| marked.case.name)
        .collect();
    assert_eq!(refused_names, ["a header name of 300 bytes"]);
    cases.retain(|marked| !refused.contains(&marked.mark));

    publish_all(&client, &cases).await;
    consumed(&node).await;
    assert_eq!(daemon.head().await, head, "the same again adds no event");
    let sources = daemon.json("/v1/sources").await.unwrap();
    let source = sources["sources"].as_array().unwrap().iter().find(|s| s["name"] == "bad");
    let source = source.unwrap();
    assert_eq!(source["state"], "consuming", "{sources}");
    // Nothing came twice by itself.
    let published = neighbours + cases.len() + refused.len() + 2 * cases.len() + 1 - refused.len();
    assert_eq!(source["received"].as_u64().unwrap(), published as u64);
    daemon.ready().await;

    assert!(daemon.terminate().await.success(), "{}", daemon.log());
    assert!(!daemon.log().contains("panicked"), "{}", daemon.log());
    audit(&daemon, &Expected { cases, neighbours, quarantined: 2 }).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn G6_bad_input_through_rabbitmq_ends_somewhere_and_harms_nobody() {
    corpus_through("", async |daemon, expected| audit_sqlite(daemon, expected).await).await;
}
