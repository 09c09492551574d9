//! Confirmed publishes, pipelined, on a connection of their own.
//!
//! One task owns the connection, the channel and the [`Window`]. It publishes in order and polls
//! all confirms itself: publishes from several tasks could swap their tags in the driver.
//!
//! The task is always in one of three places: waiting out a backoff (publishing fails at once),
//! connecting (publishing waits for the outcome), or serving.

use std::{future::Future, pin::Pin, sync::Arc, time::Duration};

use async_trait::async_trait;
use futures_util::{FutureExt as _, Stream, StreamExt as _, stream::FuturesUnordered};
use lapin::{
    Channel, Confirmation, Event,
    options::{BasicPublishOptions, ConfirmSelectOptions},
};
use tokio::{
    sync::{Mutex, mpsc, oneshot},
    task::JoinSet,
    time::Instant,
};

use super::{
    connect::{Backoff, Connector, Failure, Link, code, code_of, text_of},
    convert,
    topology::step,
    window::{Job, Window},
};
use crate::transport::{Outbound, PublishError, Publisher};

/// Calls that wait while the window is full.
const CALLS: usize = 64;

/// Longest delay between connection attempts.
const AWAY: Duration = Duration::from_secs(5);

pub(super) struct AmqpPublisher {
    jobs: mpsc::Sender<Job>,
    closing: tokio_util::sync::CancellationToken,
    /// The publishing task; dropped, the publisher takes it along.
    task: Mutex<JoinSet<()>>,
}

impl AmqpPublisher {
    pub(super) fn open(connector: Arc<Connector>) -> Self {
        let (jobs, received) = mpsc::channel(CALLS);
        let closing = tokio_util::sync::CancellationToken::new();
        let mut task = JoinSet::new();
        let publishing = Publishing {
            connector,
            jobs: received,
            closing: closing.clone(),
            backoff: Backoff::new(),
        };
        task.spawn(publishing.run());
        Self { jobs, closing, task: Mutex::new(task) }
    }
}

#[async_trait]
impl Publisher for AmqpPublisher {
    async fn publish(&self, messages: Vec<Outbound>) -> Vec<Result<(), PublishError>> {
        let count = messages.len();
        let (reply, replied) = oneshot::channel();
        if count == 0 {
            return Vec::new();
        }
        if self.jobs.send(Job { messages, reply }).await.is_ok()
            && let Ok(results) = replied.await
        {
            return results;
        }
        vec![Err(PublishError::Unavailable("the publisher is closed".to_owned())); count]
    }

    async fn close(&self) {
        self.closing.cancel();
        while self.task.lock().await.join_next().await.is_some() {}
    }
}

struct Publishing {
    connector: Arc<Connector>,
    jobs: mpsc::Receiver<Job>,
    closing: tokio_util::sync::CancellationToken,
    backoff: Backoff,
}

/// Why serving ended.
enum End {
    Closed,
    Lost(String),
}

impl Publishing {
    async fn run(mut self) {
        loop {
            let failure = match self.connector.connect("publisher").await {
                Ok(link) => match Serving::open(&self.connector, link).await {
                    Ok(mut serving) => {
                        let since = Instant::now();
                        let end = serving.run(&mut self.jobs, &self.closing).await;
                        serving.link.close().await;
                        match end {
                            End::Closed => return,
                            End::Lost(text) => {
                                if since.elapsed() > Duration::from_secs(10) {
                                    self.backoff.reset();
                                }
                                text
                            }
                        }
                    }
                    Err(failure) => failure.text().to_owned(),
                },
                Err(failure) => failure.text().to_owned(),
            };
            tracing::warn!(reason = failure, "cannot publish to RabbitMQ; trying again");
            if !self.wait(&failure).await {
                return;
            }
        }
    }

    /// Waits out a delay, answering calls meanwhile. Says whether to go on.
    async fn wait(&mut self, failure: &str) -> bool {
        let due = Instant::now() + self.backoff.delay(AWAY);
        let refuse = |job: Job| {
            let error = PublishError::Unavailable(failure.to_owned());
            let results = vec![Err(error); job.messages.len()];
            // The caller may have gone.
            let _ = job.reply.send(results);
        };
        // What waited for this attempt has its answer.
        while let Ok(job) = self.jobs.try_recv() {
            refuse(job);
        }
        loop {
            tokio::select! {
                () = self.closing.cancelled() => {
                    self.jobs.close();
                    while let Some(job) = self.jobs.recv().await {
                        refuse(job);
                    }
                    return false;
                }
                () = tokio::time::sleep_until(due) => return true,
                job = self.jobs.recv() => match job {
                    Some(job) => refuse(job),
                    None => return false,
                },
            }
        }
    }
}

type Confirm = Pin<Box<dyn Future<Output = (u64, lapin::Result<Confirmation>)> + Send>>;

/// A connection in use.
struct Serving {
    link: Link,
    channel: Arc<Channel>,
    events: Pin<Box<dyn Stream<Item = Event> + Send>>,
    confirms: FuturesUnordered<Confirm>,
    window: Window,
    /// The broker's reason for blocking publishers.
    blocked: Option<String>,
    timeout: Duration,
    /// When the broker last confirmed something, or was first asked to.
    progress: Instant,
}

impl Serving {
    async fn open(connector: &Connector, link: Link) -> Result<Self, Failure> {
        let timeout = connector.timeout();
        // One listener only: several would take each other's events.
        let events = Box::pin(link.connection.events_listener());
        let channel = open_channel(&link, timeout).await?;
        Ok(Self {
            link,
            channel,
            events,
            confirms: FuturesUnordered::new(),
            window: Window::default(),
            blocked: None,
            timeout,
            progress: Instant::now(),
        })
    }

    async fn run(
        &mut self,
        jobs: &mut mpsc::Receiver<Job>,
        closing: &tokio_util::sync::CancellationToken,
    ) -> End {
        let (mut open, mut told) = (true, false);
        loop {
            let sent = self.feed().await;
            self.window.resolve();
            if let Err(error) = sent
                && let Err(text) = self.channel_failed(&error).await
            {
                self.window.fail_all(|| PublishError::Unavailable(text.clone()));
                return End::Lost(text);
            }
            if !open && self.window.is_empty() {
                return End::Closed;
            }
            let error = tokio::select! {
                biased;
                event = self.events.next() => {
                    self.heard(event);
                    None
                }
                Some((sequence, result)) = self.confirms.next() => {
                    self.take_confirms(sequence, result)
                }
                job = jobs.recv(), if open && self.window.has_room() => {
                    match job {
                        Some(job) => self.accept(job),
                        None => open = false,
                    }
                    None
                }
                () = closing.cancelled(), if !told => {
                    told = true;
                    // What is in the channel already is still taken.
                    jobs.close();
                    None
                }
                () = tokio::time::sleep_until(self.progress + self.timeout),
                    if self.window.unconfirmed() > 0 && self.blocked.is_none() =>
                {
                    let text = format!("RabbitMQ confirmed nothing for {:?}", self.timeout);
                    self.window.fail_all(|| PublishError::Unavailable(text.clone()));
                    return End::Lost(text);
                }
            };
            if let Some(error) = error
                && let Err(text) = self.channel_failed(&error).await
            {
                self.window.fail_all(|| PublishError::Unavailable(text.clone()));
                return End::Lost(text);
            }
        }
    }

    fn accept(&mut self, job: Job) {
        match &self.blocked {
            Some(reason) => {
                let error = PublishError::Unavailable(blocked(reason));
                let results = vec![Err(error); job.messages.len()];
                // The caller may have gone.
                let _ = job.reply.send(results);
            }
            None => self.window.push(job),
        }
    }

    fn heard(&mut self, event: Option<Event>) {
        match event {
            Some(Event::ConnectionBlocked(reason)) => {
                tracing::warn!(reason, "RabbitMQ blocks publishers");
                // The driver holds back what it has not written yet and writes it later; the
                // connection stays, since a blocked broker does not notice that one has gone.
                self.window.fail_all(|| PublishError::Unavailable(blocked(&reason)));
                self.blocked = Some(reason);
            }
            Some(Event::ConnectionUnblocked) => {
                tracing::info!("RabbitMQ takes messages again");
                self.blocked = None;
                self.progress = Instant::now();
            }
            // Errors reach the confirms as well, which know whose they are.
            Some(_) | None => {}
        }
    }

    /// Publishes what is next, in order, as far as the window goes.
    async fn feed(&mut self) -> lapin::Result<()> {
        while let Some((sequence, message)) = self.window.next_to_publish() {
            let prepared = prepare(message, self.link.connection.configuration().frame_max());
            let (exchange, key, properties, body) = match prepared {
                Ok(prepared) => prepared,
                Err(text) => {
                    self.window.refuse(sequence, PublishError::Refused(text));
                    continue;
                }
            };
            if self.window.unconfirmed() == 0 {
                self.progress = Instant::now();
            }
            self.window.published(sequence);
            let channel = Arc::clone(&self.channel);
            let mut confirm: Confirm = Box::pin(async move {
                let options = BasicPublishOptions { mandatory: true, ..Default::default() };
                let sent = channel.basic_publish(exchange, key, options, &body, properties).await;
                let confirmed = match sent {
                    Ok(confirm) => confirm.await,
                    Err(error) => Err(error),
                };
                (sequence, confirmed)
            });
            // The driver numbers and queues a publish when it is first polled; so this, and not
            // the set below, settles the order (P2).
            match std::future::poll_fn(|cx| std::task::Poll::Ready(confirm.poll_unpin(cx))).await {
                std::task::Poll::Pending => self.confirms.push(confirm),
                std::task::Poll::Ready((sequence, result)) => {
                    if let Some(error) = self.take_confirm(sequence, result) {
                        return Err(error);
                    }
                }
            }
        }
        Ok(())
    }

    /// Takes a confirm, and the others that are there.
    fn take_confirms(
        &mut self,
        sequence: u64,
        result: lapin::Result<Confirmation>,
    ) -> Option<lapin::Error> {
        let mut error = self.take_confirm(sequence, result);
        while let Some(Some((sequence, result))) = self.confirms.next().now_or_never() {
            let another = self.take_confirm(sequence, result);
            error = error.or(another);
        }
        error
    }

    fn take_confirm(
        &mut self,
        sequence: u64,
        result: lapin::Result<Confirmation>,
    ) -> Option<lapin::Error> {
        let returned = match result {
            Ok(Confirmation::Ack(returned)) => {
                self.window.confirmed(sequence);
                returned
            }
            Ok(Confirmation::Nack(returned)) => {
                let text = "RabbitMQ did not take the message (nack): the queue is full or has \
                            failed";
                self.window.refuse(sequence, PublishError::Failed(text.to_owned()));
                self.window.confirmed(sequence);
                returned
            }
            Ok(Confirmation::NotRequested) => {
                let text = "RabbitMQ was not asked to confirm";
                self.window.refuse(sequence, PublishError::Unavailable(text.to_owned()));
                self.window.confirmed(sequence);
                None
            }
            Err(error) => return Some(error),
        };
        self.progress = Instant::now();
        // Not the return of this message, but of any: the driver hands each to the next confirm.
        if let Some(returned) = returned {
            let id = returned.properties.message_id().as_ref().map_or("", |id| id.as_str());
            let (exchange, key) = (returned.exchange.as_str(), returned.routing_key.as_str());
            self.window.returned(id, exchange, key, || {
                PublishError::Failed(format!(
                    "unroutable: exchange `{exchange}` has no queue for routing key `{key}` ({}); bind \
                     one, or correct the routing key",
                    returned.reply_text
                ))
            });
        }
        None
    }

    /// Why the channel is closed, where this error does not say. A publish may find it closing
    /// before the messages on it are told why; those are told in a moment.
    async fn cause(&mut self, error: &lapin::Error) -> Option<lapin::Error> {
        if code_of(error).is_some() {
            return None;
        }
        let told = async {
            while let Some((sequence, result)) = self.confirms.next().await {
                let told = self.take_confirm(sequence, result);
                if told.as_ref().and_then(code_of).is_some() {
                    return told;
                }
            }
            None
        };
        tokio::time::timeout(LAST_WORDS, told).await.ok().flatten()
    }

    /// The channel is closed. Finds whose fault it was, and publishes the others again on a new
    /// channel: they may have arrived, and their ids tell (P5).
    ///
    /// `Err` where the connection has to be made anew.
    async fn channel_failed(&mut self, error: &lapin::Error) -> Result<(), String> {
        let cause = self.cause(error).await;
        let error = cause.as_ref().unwrap_or(error);
        let text = text_of(error);
        self.confirms.clear();
        let code = code_of(error);
        let only = self.window.unconfirmed() == 1;
        let guilty = match code {
            Some(refused @ (code::NOT_FOUND | code::ACCESS_REFUSED)) => self.window.blame(
                |message| names(&text, message),
                || PublishError::Failed(advice(refused, &text)),
            ),
            Some(code::PRECONDITION_FAILED | code::CONTENT_TOO_LARGE) => {
                // `message size 134217729 is larger than configured max size 134217728`
                self.window.blame(
                    |message| only || has_number(&text, message.body.len()),
                    || PublishError::Refused(text.clone()),
                )
            }
            // A frame that the broker cannot read ends the connection, and says no more.
            Some(501..=505) if only => {
                self.window.blame(|_| true, || PublishError::Refused(text.clone()))
            }
            _ => false,
        };
        if !guilty || !error.is_amqp_soft_error() || !self.link.connection.status().connected() {
            return Err(text);
        }
        self.channel =
            open_channel(&self.link, self.timeout).await.map_err(|f| f.text().to_owned())?;
        self.window.publish_again();
        self.progress = Instant::now();
        Ok(())
    }
}

/// How long the broker's own words are waited for when the driver says only that a channel is
/// closing.
const LAST_WORDS: Duration = Duration::from_secs(1);

async fn open_channel(link: &Link, timeout: Duration) -> Result<Arc<Channel>, Failure> {
    let channel = step(timeout, link.connection.create_channel()).await?;
    step(timeout, channel.confirm_select(ConfirmSelectOptions::default())).await?;
    Ok(Arc::new(channel))
}

fn blocked(reason: &str) -> String {
    format!("broker blocks publishers: {reason}")
}

/// Whether the broker's text speaks of where this message goes: `no exchange 'e' in vhost '/'`,
/// `access to topic 'a.b' in exchange 'e' in vhost '/' refused for user 'u'`.
fn names(text: &str, message: &Outbound) -> bool {
    let exchange = match message.exchange.as_deref().unwrap_or("") {
        // So the default one is called where permissions are.
        "" if text.contains("exchange 'amq.default'") => "amq.default",
        exchange => exchange,
    };
    text.contains(&format!("exchange '{exchange}'"))
        && (!text.contains("topic '") || text.contains(&format!("topic '{}'", message.address)))
}

/// What the broker says, with what to do about it.
fn advice(code: u16, text: &str) -> String {
    let advice = match code {
        code::NOT_FOUND => {
            "create the exchange, or correct its name; nothing is created to publish to"
        }
        _ if text.contains("internal exchange") => "publish to another exchange",
        _ => "no permission: let RabbitMQ allow this user to write there",
    };
    format!("{text}; {advice}")
}

fn has_number(text: &str, number: usize) -> bool {
    let number = number.to_string();
    text.split(|c: char| !c.is_ascii_digit()).any(|digits| digits == number)
}

type Prepared =
    (lapin::types::ShortString, lapin::types::ShortString, lapin::BasicProperties, bytes::Bytes);

fn prepare(message: &Outbound, frame_max: u32) -> Result<Prepared, String> {
    let exchange = convert::short("exchange", message.exchange.as_deref().unwrap_or(""))?;
    let key = convert::short("routing key", &message.address)?;
    let properties = convert::properties_out(message)?;
    let size = convert::wire_size(&properties);
    if size > usize::try_from(frame_max).unwrap_or(usize::MAX) {
        return Err(format!(
            "the headers take up to {size} bytes; this connection's frame_max is {frame_max}"
        ));
    }
    Ok((exchange, key, properties, message.body.clone()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_brokers_text_tells_whose_fault_it_was() {
        let message = |exchange: &str, key: &str| Outbound {
            id: "1".into(),
            address: key.into(),
            exchange: Some(exchange.into()),
            headers: crate::event::Headers::new(),
            body: bytes::Bytes::new(),
        };
        let text = "NOT_FOUND - no exchange 'e' in vhost '/'";
        assert!(names(text, &message("e", "a")));
        assert!(!names(text, &message("ee", "a")));
        let text = "access to topic 'a.b' in exchange 'e' in vhost '/' refused for user 'u'";
        assert!(names(text, &message("e", "a.b")));
        assert!(!names(text, &message("e", "a")));
        let text = "access to exchange 'amq.default' in vhost '/' refused for user 'u'";
        assert!(names(text, &message("", "a")));
        assert!(!names(text, &message("e", "a")));
        assert!(has_number("message size 12 is larger than 10", 12));
        assert!(!has_number("message size 12 is larger than 10", 2));
    }
}
