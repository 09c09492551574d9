//! What a broker does not take ends as the right outcome, with words that say what to do, and
//! costs its neighbours nothing (P3).

use std::{sync::Arc, time::Duration};

use async_nats::jetstream::stream::{Config, DiscardPolicy};
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
        Outbound, PublishError, Publisher, Room, SourceState, Transport as _, TransportError,
        amqp::AmqpTransport,
        nats::{NatsOptions, NatsTransport},
    },
};
use tokio::time::{Instant, timeout};

use crate::{
    conformance::transport::{ack, until_state},
    credentials::configured,
    support::{PATIENCE, nats::NatsServer, process, rabbit},
    tls::{amqp_options, nats, nats_source},
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

/// Users of one server: one that may do all, and others that may not publish everywhere, ask
/// JetStream, pull, ack, or be answered.
fn server() -> NatsServer {
    configured(
        &process::folder("permissions"),
        r#"
        max_payload: 4000
        authorization { users = [
            { user: all, password: pw }
            { user: some, password: pw, permissions: { publish: { deny: ["S.denied.>"] } } }
            { user: mute, password: pw, permissions: { publish: ["S.>"] } }
            { user: idle, password: pw, permissions: {
                publish: { deny: ["$JS.API.CONSUMER.MSG.NEXT.>"] } } }
            { user: rude, password: pw, permissions: { publish: { deny: ["$JS.ACK.>"] } } }
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
        // So long that who waits for it in place of being told is found out.
        timeout: Duration::from_secs(60),
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

/// More refusals at once than the client passes on: what was not heard is unknown, soon, and the
/// next call is told of each.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn P3_very_many_nats_refusals_are_all_heard_by_the_second_call() {
    let server = server();
    nats(as_user(&server, "all")).await.unwrap();
    let transport = NatsTransport::new(as_user(&server, "some"));
    let publisher = transport.publisher().await.unwrap();
    let began = Instant::now();
    for round in 0..2 {
        let messages: Vec<_> = (0..4_000)
            .map(|n| {
                let place = if n % 2 == 0 { "denied" } else { "fine" };
                message(round * 4_000 + n, &format!("S.{place}.{n}"), None, 10)
            })
            .collect();
        for (n, result) in publish(&*publisher, messages).await.into_iter().enumerate() {
            match result {
                Ok(()) => assert_eq!(n % 2, 1),
                Err(PublishError::Failed(_)) => assert_eq!(n % 2, 0),
                Err(PublishError::Unavailable(_)) if round == 0 => {}
                other => panic!("{round} {n}: {other:?}"),
            }
        }
    }
    assert!(began.elapsed() < Duration::from_secs(45), "{:?}", began.elapsed());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn C9_what_a_nats_user_may_not_ask_for_is_said_at_once() {
    let server = server();
    nats(as_user(&server, "all")).await.unwrap();
    let began = Instant::now();
    let Err(error) = NatsTransport::new(as_user(&server, "mute")).consumer(nats_source("S")).await
    else {
        panic!("it was opened")
    };
    assert!(matches!(error, TransportError::Misconfigured(_)), "{error:?}");
    assert!(error.to_string().contains("permission to publish to `$JS.API.STREAM.INFO.S`"));
    for (user, subject) in [("idle", "$JS.API.CONSUMER.MSG.NEXT.S"), ("rude", "$JS.ACK.S")] {
        let publisher = NatsTransport::new(as_user(&server, "all")).publisher().await.unwrap();
        assert_eq!(publish(&*publisher, vec![message(0, "S.x", None, 10)]).await, [Ok(())]);
        let source = nats_source("S");
        let reporter = source.reporter.clone();
        let transport = NatsTransport::new(as_user(&server, user));
        let mut consumer = transport.consumer(source).await.unwrap();
        let told = until_state(
            &reporter,
            subject,
            |state| matches!(state, SourceState::Misconfigured(text) if text.contains(subject)),
        );
        let consuming = async {
            while let Some(deliveries) = consumer.next(Room { messages: 10, bytes: 1 << 20 }).await
            {
                ack(deliveries.settle, deliveries.messages.len()).await;
            }
        };
        tokio::select! {
            () = told => {}
            () = consuming => panic!("it ended"),
        }
    }
    assert!(began.elapsed() < Duration::from_secs(45), "{:?}", began.elapsed());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn P3_what_a_stream_does_not_take_fails_alone() {
    let server = NatsServer::start();
    let jetstream = server.jetstream().await;
    for (name, max_message_size, max_messages) in [("SHORT", 1_000, -1), ("FULL", -1, 2)] {
        jetstream
            .create_stream(Config {
                name: name.to_owned(),
                subjects: vec![format!("{name}.>")],
                max_message_size,
                max_messages,
                discard: DiscardPolicy::New,
                ..Config::default()
            })
            .await
            .unwrap();
    }
    let options = NatsOptions { url: Secret::Inline(server.url()), ..NatsOptions::default() };
    let publisher = NatsTransport::new(options).publisher().await.unwrap();
    let messages = vec![
        message(0, "FULL.x", None, 10),
        message(1, "SHORT.x", None, 2_000),
        message(2, "FULL.x", None, 10),
        message(3, "FULL.x", None, 10),
        message(4, "SHORT.x", None, 10),
    ];
    let results = publish(&*publisher, messages).await;
    let [Ok(()), Err(large), Ok(()), Err(full), Ok(())] = results.as_slice() else {
        panic!("{results:?}")
    };
    assert!(matches!(large, PublishError::Refused(text) if text.contains("size")), "{large:?}");
    assert!(matches!(full, PublishError::Failed(text) if text.contains("maximum")), "{full:?}");
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
    for (error, advice) in [(unroutable, "bind one"), (missing, "create the exchange")] {
        assert!(error.to_string().contains(advice), "{advice}: {error}");
    }
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
    for (exchange, kind, key) in [
        ("open", ExchangeKind::Fanout, ""),
        ("closed", ExchangeKind::Fanout, ""),
        ("topics", ExchangeKind::Topic, "#"),
    ] {
        let durable = ExchangeDeclareOptions { durable: true, ..Default::default() };
        channel
            .exchange_declare(exchange.into(), kind, durable, FieldTable::default())
            .await
            .unwrap();
        let bound = QueueBindOptions::default();
        channel
            .queue_bind("q".into(), exchange.into(), key.into(), bound, FieldTable::default())
            .await
            .unwrap();
    }
    let node = rabbit::shared().await;
    node.ctl(&["add_user", "narrow", "pw"]).await;
    node.ctl(&["set_permissions", "-p", &vhost.name, "narrow", "", "^(open|topics)$", ""]).await;
    node.ctl(&["set_topic_permissions", "-p", &vhost.name, "narrow", "topics", "^a$", ""]).await;
    let url = vhost.uri.replace("guest:guest", "narrow:pw");
    let transport = AmqpTransport::new(amqp_options(url.clone(), None)).unwrap();
    let publisher = transport.publisher().await.unwrap();
    let to = |id, exchange: &str, key: &str| message(id, key, Some(exchange), 10);
    let messages = vec![
        to(0, "open", "a"),
        to(1, "closed", "a"),
        to(2, "open", "a"),
        to(3, "topics", "a"),
        to(4, "topics", "b"),
        to(5, "", "q"),
        to(6, "open", "b"),
    ];
    let results = publish(&*publisher, messages).await;
    let [Ok(()), Err(closed), Ok(()), Ok(()), Err(topic), Err(default), Ok(())] =
        results.as_slice()
    else {
        panic!("{results:?}")
    };
    for (error, words) in [
        (closed, "exchange 'closed'"),
        (topic, "topic 'b' in exchange 'topics'"),
        (default, "exchange 'amq.default'"),
    ] {
        let PublishError::Failed(said) = error else { panic!("{error:?}") };
        assert!(said.contains(words) && said.contains("no permission"), "{said}");
    }
    publisher.close().await;

    // A virtual host that this user may not enter.
    let other = rabbit::vhost().await;
    let url = other.uri.replace("guest:guest", "narrow:pw");
    let transport = AmqpTransport::new(amqp_options(url, None)).unwrap();
    let publisher = transport.publisher().await.unwrap();
    let results = publish(&*publisher, vec![to(7, "open", "a")]).await;
    let [Err(PublishError::Unavailable(said))] = results.as_slice() else { panic!("{results:?}") };
    assert!(said.contains(&format!("virtual host `{}`", other.name)), "{said}");
}
