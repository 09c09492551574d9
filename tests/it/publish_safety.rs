//! What a broker does not take ends as the right outcome, with words that say what to do, and
//! costs its neighbours nothing (P3).

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use lapin::{
    Connection, ConnectionProperties, ExchangeKind,
    options::{ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions},
    types::{AMQPValue, FieldTable},
};
use pulsebus::{
    event::Headers,
    secret::Secret,
    transport::{
        Outbound, PublishError, Publisher, Transport as _,
        amqp::AmqpTransport,
        nats::{NatsOptions, NatsTransport},
    },
};
use tokio::time::{Instant, timeout};

use crate::{
    credentials::configured,
    support::{PATIENCE, nats::NatsServer, process, rabbit},
    tls::{amqp_options, nats},
};

fn message(id: usize, address: &str, exchange: Option<&str>, size: usize) -> Outbound {
    Outbound {
        id: format!("m-{id}").into(),
        address: address.into(),
        exchange: exchange.map(Arc::from),
        headers: Headers::new(),
        body: Bytes::from(vec![b'1'; size]),
    }
}

async fn publish(
    publisher: &dyn Publisher,
    messages: Vec<Outbound>,
) -> Vec<Result<(), PublishError>> {
    timeout(PATIENCE, publisher.publish(messages)).await.expect("within a bounded time")
}

/// Three users of one server: one that may do all, one that may not publish everywhere, one that
/// no answer can reach.
fn server() -> NatsServer {
    configured(
        &process::folder("permissions"),
        r#"
        max_payload: 4000
        authorization { users = [
            { user: all, password: pw }
            { user: some, password: pw, permissions: { publish: { deny: ["S.denied.>"] } } }
            { user: deaf, password: pw, permissions: { publish: ">", subscribe: ["elsewhere.>"] } }
        ] }
        "#,
    )
}

fn as_user(server: &NatsServer, user: &str) -> NatsOptions {
    NatsOptions {
        url: Secret::Inline(server.url()),
        user: Some(user.to_owned()),
        password: Some(Secret::Inline("pw".to_owned())),
        ..NatsOptions::default()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn P3_nats_subjects_without_permission_fail_alone_and_at_once() {
    let server = server();
    nats(as_user(&server, "all")).await.unwrap();
    let transport = NatsTransport::new(as_user(&server, "some"));
    let publisher = transport.publisher().await.unwrap();
    for round in 0..3 {
        let began = Instant::now();
        let messages: Vec<_> = (0..300)
            .map(|n| {
                let subject =
                    if n % 3 == 1 { format!("S.denied.{}", n % 7) } else { "S.fine".to_owned() };
                message(round * 1_000 + n, &subject, None, 10)
            })
            .collect();
        let mut results = publish(&*publisher, messages.clone()).await;
        // Of very many refusals at once some are lost; those are not known, and come again.
        for (message, result) in messages.iter().zip(&mut results) {
            while matches!(result, Err(PublishError::Unavailable(_))) {
                assert!(began.elapsed() < PATIENCE);
                *result = publish(&*publisher, vec![message.clone()]).await.remove(0);
            }
        }
        for (message, result) in messages.iter().zip(&results) {
            if message.address.starts_with("S.denied") {
                let Err(PublishError::Failed(said)) = result else { panic!("{result:?}") };
                assert!(said.contains("permission") && said.contains(&*message.address), "{said}");
            } else {
                assert_eq!(*result, Ok(()));
            }
        }
    }
    publisher.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn P6_a_nats_user_that_no_answer_can_reach_is_told_so() {
    let server = server();
    nats(as_user(&server, "all")).await.unwrap();
    let transport = NatsTransport::new(as_user(&server, "deaf"));
    let publisher = transport.publisher().await.unwrap();
    let results = publish(&*publisher, vec![message(1, "S.x", None, 10)]).await;
    let [Err(PublishError::Unavailable(said))] = results.as_slice() else { panic!("{results:?}") };
    assert!(said.contains("_INBOX.>"), "{said}");
    let error = nats(as_user(&server, "deaf")).await.unwrap_err().to_string();
    assert!(error.contains("_INBOX.>"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn P3_nats_takes_no_more_than_max_payload_headers_included() {
    let server = server();
    nats(as_user(&server, "all")).await.unwrap();
    let transport = NatsTransport::new(as_user(&server, "all"));
    let publisher = transport.publisher().await.unwrap();
    let mut headed = message(2, "S.x", None, 3_900);
    headed.headers.push("x-long", "v".repeat(200));
    let messages = vec![
        message(0, "S.x", None, 10),
        message(1, "S.x", None, 5_000),
        headed,
        message(3, "nobody.takes.this", None, 10),
        message(4, "S.x", None, 10),
    ];
    let results = publish(&*publisher, messages).await;
    let [Ok(()), Err(large), Err(headers), Err(nobody), Ok(())] = results.as_slice() else {
        panic!("{results:?}")
    };
    for error in [large, headers] {
        assert!(matches!(error, PublishError::Refused(_)), "{error:?}");
        assert!(error.to_string().contains("max_payload of 4000"), "{error}");
    }
    assert!(matches!(nobody, PublishError::Failed(_)), "{nobody:?}");
    assert!(nobody.to_string().contains("no stream takes subject `nobody.takes.this`"), "{nobody}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn P6_a_nats_server_that_stands_still_is_unavailable_within_the_timeout() {
    let server = server();
    nats(as_user(&server, "all")).await.unwrap();
    let options = NatsOptions { timeout: Duration::from_secs(1), ..as_user(&server, "all") };
    let publisher = NatsTransport::new(options).publisher().await.unwrap();
    assert_eq!(publish(&*publisher, vec![message(0, "S.x", None, 10)]).await, [Ok(())]);
    server.stop();
    let results = publish(&*publisher, vec![message(1, "S.x", None, 10)]).await;
    assert!(matches!(results[..], [Err(PublishError::Unavailable(_))]), "{results:?}");
    server.cont();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn P3_what_rabbitmq_does_not_take_fails_alone() {
    let vhost = rabbit::vhost().await;
    let connection =
        Connection::connect(&vhost.uri, ConnectionProperties::default()).await.unwrap();
    let channel = connection.create_channel().await.unwrap();
    let durable = QueueDeclareOptions { durable: true, ..Default::default() };
    let mut full = FieldTable::default();
    full.insert("x-max-length".into(), AMQPValue::LongInt(1));
    full.insert("x-overflow".into(), AMQPValue::LongString("reject-publish".into()));
    channel.queue_declare("full".into(), durable, full).await.unwrap();
    channel.queue_declare("open".into(), durable, FieldTable::default()).await.unwrap();

    let transport = AmqpTransport::new(amqp_options(vhost.uri.clone(), None)).unwrap();
    let publisher = transport.publisher().await.unwrap();
    let to = |id, queue: &str| message(id, queue, Some(""), 10);
    assert_eq!(publish(&*publisher, vec![to(0, "full")]).await, [Ok(())]);
    let messages = vec![
        to(1, "open"),
        to(2, "full"),
        to(3, "nowhere"),
        message(4, "open", Some("no-such-exchange"), 10),
        message(5, "open", Some(""), 5 << 20),
        to(6, "open"),
    ];
    let results = publish(&*publisher, messages).await;
    let [Ok(()), Err(nacked), Err(unroutable), Err(missing), Err(large), Ok(())] =
        results.as_slice()
    else {
        panic!("{results:?}")
    };
    for (error, word) in [(nacked, "nack"), (unroutable, "nowhere"), (missing, "no-such-exchange")]
    {
        assert!(matches!(error, PublishError::Failed(_)), "{error:?}");
        assert!(error.to_string().contains(word), "{word}: {error}");
    }
    assert!(matches!(large, PublishError::Refused(_)), "{large:?}");
    publisher.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn P3_a_rabbitmq_exchange_without_permission_fails_alone() {
    let vhost = rabbit::vhost().await;
    let connection =
        Connection::connect(&vhost.uri, ConnectionProperties::default()).await.unwrap();
    let channel = connection.create_channel().await.unwrap();
    let durable = QueueDeclareOptions { durable: true, ..Default::default() };
    channel.queue_declare("q".into(), durable, FieldTable::default()).await.unwrap();
    for exchange in ["open", "closed"] {
        let durable = ExchangeDeclareOptions { durable: true, ..Default::default() };
        let kind = ExchangeKind::Fanout;
        channel
            .exchange_declare(exchange.into(), kind, durable, FieldTable::default())
            .await
            .unwrap();
        let bound = QueueBindOptions::default();
        channel
            .queue_bind("q".into(), exchange.into(), "".into(), bound, FieldTable::default())
            .await
            .unwrap();
    }
    let node = rabbit::shared().await;
    node.ctl(&["add_user", "narrow", "pw"]).await;
    node.ctl(&["set_permissions", "-p", &vhost.name, "narrow", "", "^open$", ""]).await;
    let url = vhost.uri.replace("guest:guest", "narrow:pw");
    let transport = AmqpTransport::new(amqp_options(url, None)).unwrap();
    let publisher = transport.publisher().await.unwrap();
    let to = |id, exchange: &str| message(id, "k", Some(exchange), 10);
    let messages = vec![to(0, "open"), to(1, "closed"), to(2, "open")];
    let results = publish(&*publisher, messages).await;
    let [Ok(()), Err(denied), Ok(())] = results.as_slice() else { panic!("{results:?}") };
    assert!(matches!(denied, PublishError::Failed(_)), "{denied:?}");
    assert!(denied.to_string().contains("exchange 'closed'"), "{denied}");
    publisher.close().await;
}
