//! The way out: each message is a request, signed after Standard Webhooks.
//!
//! # What is sent
//!
//! A `POST` to the transport's URL with the message's address behind its path. The body is the
//! message's, byte for byte; with `batch`, the bodies of several messages as a JSON array.
//!
//! | header | |
//! |---|---|
//! | `webhook-id` | the event's id, the same over all attempts; of an array, made of those in it |
//! | `webhook-timestamp` | seconds since 1970, of this attempt |
//! | `webhook-signature` | `v1,` and the base64 of HMAC-SHA256 over `id.timestamp.body`; several with blanks between them while the secret is being changed |
//! | `content-type` | the message's own, else `application/json`; of an array `application/json`, or `application/cloudevents-batch+json` |
//! | `authorization` | `Bearer` and the token, or the login that stands in the URL |
//! | `user-agent` | `pulsebus/` and the version |
//!
//! The message's own headers go along where they can be HTTP headers, save in an array. An id
//! that holds anything but visible ASCII is percent-encoded in `webhook-id`, since receivers
//! read other bytes of a header each in their own way.
//!
//! # What comes of it
//!
//! What an answer means is a table at [`WebhookTransport`]. Redirects are not followed, and `https`
//! never becomes `http`. URL, secret, token and certificates are read again as their files
//! change, at most once a second.
//!
//! # No answer
//!
//! When a request gets no answer in time, or its connection ends before one, nobody knows
//! whether it arrived (P5). A receiver that hangs is down, which costs no event an attempt; but
//! one event that makes it hang must not hold up the others for ever. So it is
//! [`PublishError::Unavailable`], unless the publisher has had success with other messages since
//! this one was first left without an answer: then it is this one's fault,
//! [`PublishError::Failed`].
//!
//! A receiver that says when to try again is not sent to before that, whoever asks: a handler
//! with several workers may hear of it from one while another has success. Another URL ends the
//! wait.
//!
//! # Order
//!
//! The messages of a call are sent one after the other, and requests of one call wait for each
//! other's answers (P2): HTTP/1.1 has no pipelining worth the name, so P4 does not hold, save as
//! far as `batch` puts several into one request. Once a receiver is unavailable, the rest of the
//! call is not sent.

use std::{
    collections::VecDeque,
    error::Error,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use async_trait::async_trait;
use tokio::{sync::RwLock, time::timeout};
use url::Url;

use super::{
    answer,
    dial::PrivateAddress,
    live::{Live, NO_ADDRESS, Receiver, web_address},
    request::{Form, Request, groups, request},
};
use crate::{
    secret::Secret,
    tls::{self, TlsOptions},
    transport::{
        Consumer, Outbound, PublishError, Publisher, SourceSpec, Transport, TransportError,
    },
};

/// Messages without an answer that are remembered.
const MAX_SILENT: usize = 1_024;

/// How many messages of an array that failed fail on their own, one after the other, before the
/// rest of them is taken to fail too.
const ENOUGH: usize = 3;

/// Where a webhook goes, and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WebhookOptions {
    /// `https://host/path`; often a secret in itself. A login in it becomes Basic
    /// authentication.
    pub url: Secret,
    /// The signing secret, `whsec_…`, or several with blanks or line breaks between them while
    /// it is being changed ([`check_secret`](super::check_secret)). `None`: not signed.
    pub secret: Option<Secret>,
    /// What is presented as `Authorization: Bearer`. Default: nothing.
    pub token: Option<Secret>,
    /// Certificates. `None`: those of the system.
    pub tls: Option<TlsOptions>,
    /// How long a request may take, half of it to connect. Default 10 s.
    pub timeout: Duration,
    /// How many messages a request holds at most, as a JSON array; 1: each is a request of its
    /// own, and no array. Default 1.
    pub batch: usize,
    /// Whether only public addresses may be dialled: no loopback, private or link-local ones.
    /// Then proxies of the environment are not used. Default false.
    pub refuse_private: bool,
}

impl WebhookOptions {
    /// To this URL, with the defaults.
    #[must_use]
    pub const fn new(url: Secret) -> Self {
        Self {
            url,
            secret: None,
            token: None,
            tls: None,
            timeout: Duration::from_secs(10),
            batch: 1,
            refuse_private: false,
        }
    }
}

/// Publishes by HTTP, signed after Standard Webhooks. Nothing is consumed by it.
///
/// A message is a `POST` of its body to the URL with its address behind the path; its id is
/// `webhook-id`.
///
/// *Ordering*: the messages of a call are sent one after the other (P2); several at once are
/// several calls.
///
/// *Errors*:
///
/// | answer | outcome |
/// |---|---|
/// | 2xx | published |
/// | 400, 413, 414, 415, 422, 431 | [`Refused`](PublishError::Refused) |
/// | 429, 502, 503, 504 | [`Later`](PublishError::Later) where `Retry-After` says when, else [`Unavailable`](PublishError::Unavailable) |
/// | 410 | [`Later`](PublishError::Later), in an hour: a person has to decide |
/// | 3xx, which is not followed, and every other | [`Failed`](PublishError::Failed) |
/// | none | [`Unavailable`](PublishError::Unavailable); [`Failed`](PublishError::Failed) where the receiver has taken others since this message first got none |
#[derive(Debug)]
pub struct WebhookTransport {
    options: Arc<WebhookOptions>,
}

impl WebhookTransport {
    /// A transport to this receiver. Nothing is connected yet.
    ///
    /// # Errors
    /// [`TransportError::Misconfigured`] where what is given in place cannot be used: a URL that
    /// is none, a signing secret that is none. What is in files is read when it is needed.
    pub fn new(options: WebhookOptions) -> Result<Self, TransportError> {
        if let Secret::Inline(url) = &options.url
            && web_address(url).is_none()
        {
            return Err(TransportError::Misconfigured(NO_ADDRESS.to_owned()));
        }
        if let Some(Secret::Inline(secret)) = &options.secret {
            super::check_secret(secret).map_err(|error| {
                TransportError::Misconfigured(format!("the signing secret: {error}"))
            })?;
        }
        Ok(Self { options: Arc::new(options) })
    }
}

#[async_trait]
impl Transport for WebhookTransport {
    fn kind(&self) -> &'static str {
        "http"
    }

    async fn consumer(&self, _: SourceSpec) -> Result<Box<dyn Consumer>, TransportError> {
        Err(TransportError::Misconfigured(
            "a webhook can only be sent to; events come in by the ingest endpoint, the transport \
             `http`"
                .to_owned(),
        ))
    }

    async fn publisher(&self) -> Result<Box<dyn Publisher>, TransportError> {
        Ok(Box::new(WebhookPublisher {
            live: Live::new(Arc::clone(&self.options)),
            options: Arc::clone(&self.options),
            silence: Silence::default(),
            quiet: Mutex::default(),
            closed: RwLock::new(false),
        }))
    }
}

struct WebhookPublisher {
    options: Arc<WebhookOptions>,
    live: Live,
    silence: Silence,
    quiet: Mutex<Option<Quiet>>,
    /// Whether it is closed; read-locked while a call is under way.
    closed: RwLock<bool>,
}

type Answer = Result<(), PublishError>;

#[async_trait]
impl Publisher for WebhookPublisher {
    async fn publish(&self, messages: Vec<Outbound>) -> Vec<Answer> {
        let count = messages.len();
        let away = |reason| vec![Err(PublishError::Unavailable(reason)); count];
        let closed = self.closed.read().await;
        if *closed {
            return away("the publisher is closed".to_owned());
        }
        let receiver = match self.live.receiver().await {
            Ok(receiver) => receiver,
            Err(reason) => return away(reason),
        };
        if let Some(later) = self.quiet(receiver.url()) {
            return vec![Err(later); count];
        }
        let call = Call { publisher: self, receiver: &receiver };
        let mut answers = Vec::with_capacity(count);
        for (of_one_request, group) in groups(&messages, self.options.batch) {
            let answered = call.send_group(group, of_one_request).await;
            let down = answered.iter().find(|answer| is_away(answer)).cloned();
            answers.extend(answered);
            if let Some(down) = down {
                self.keep_quiet(receiver.url(), &down);
                // What comes behind must not overtake it, and would fare no better.
                answers.resize(count, down);
                break;
            }
        }
        answers
    }

    async fn close(&self) {
        *self.closed.write().await = true;
    }
}

/// A receiver that wants to be left alone.
struct Quiet {
    until: Instant,
    reason: String,
    url: Url,
}

impl WebhookPublisher {
    /// What is to be said in place of sending, while the receiver wants to be left alone.
    fn quiet(&self, url: &Url) -> Option<PublishError> {
        let mut quiet = self.quiet.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        if quiet.as_ref().is_some_and(|quiet| quiet.until <= now || quiet.url != *url) {
            *quiet = None;
        }
        quiet.as_ref().map(|quiet| PublishError::Later {
            reason: quiet.reason.clone(),
            after: quiet.until - now,
        })
    }

    fn keep_quiet(&self, url: &Url, answer: &Answer) {
        if let Err(PublishError::Later { reason, after }) = answer {
            let (until, reason) = (Instant::now() + *after, reason.clone());
            let mut quiet = self.quiet.lock().unwrap_or_else(PoisonError::into_inner);
            *quiet = Some(Quiet { until, reason, url: url.clone() });
        }
    }
}

const fn is_away(answer: &Answer) -> bool {
    matches!(answer, Err(PublishError::Unavailable(_) | PublishError::Later { .. }))
}

/// One call, with what it works with.
struct Call<'a> {
    publisher: &'a WebhookPublisher,
    receiver: &'a Receiver,
}

impl Call<'_> {
    /// Sends a group as a request; one answer each. Where that is no success for reasons that
    /// may be those of one message, each is sent again on its own (P3).
    async fn send_group(&self, group: &[Outbound], form: Form) -> Vec<Answer> {
        let answer = self.send(group, form).await;
        let apart = match &answer {
            Err(Trouble { error: PublishError::Refused(_), .. }) => true,
            Err(Trouble { error: PublishError::Failed(_), answered }) => *answered,
            _ => false,
        };
        let answer = answer.map_err(|trouble| trouble.error);
        if group.len() == 1 || !apart {
            return vec![answer; group.len()];
        }
        let refused = matches!(answer, Err(PublishError::Refused(_)));
        let mut answers = Vec::with_capacity(group.len());
        let mut failed = 0;
        for message in group {
            let alone = self.send(std::slice::from_ref(message), form).await;
            let alone = alone.map_err(|trouble| trouble.error);
            let away = is_away(&alone);
            failed = if alone.is_ok() { 0 } else { failed + 1 };
            answers.push(alone.clone());
            if away {
                answers.resize(group.len(), alone);
                break;
            }
            if !refused && failed >= ENOUGH {
                answers.resize(group.len(), answer);
                break;
            }
        }
        answers
    }

    /// Sends messages of one address as one request.
    async fn send(&self, messages: &[Outbound], form: Form) -> Result<(), Trouble> {
        let request = request(self.receiver, messages, form)
            .map_err(|reason| Trouble::of_the_message(PublishError::Refused(reason)))?;
        let Request { id, url, headers, body } = request;
        let silence = &self.publisher.silence;
        let began = silence.successes();
        let receiver = self.receiver;
        let sending = receiver.client.post(url).headers(headers).body(body).send();
        let error = match timeout(self.publisher.options.timeout, sending).await {
            Ok(Ok(answer)) => {
                let outcome = answer::outcome(answer, receiver).await;
                silence.broken(&id, outcome.is_ok());
                return outcome.map_err(|error| Trouble { error, answered: true });
            }
            Ok(Err(error)) if error.is_builder() => {
                return Err(Trouble::of_the_message(PublishError::Refused(
                    "the message cannot be made into a request".to_owned(),
                )));
            }
            Ok(Err(error)) if error.is_connect() => {
                return Err(Trouble::unanswered(PublishError::Unavailable(unreachable(
                    receiver, &error,
                ))));
            }
            Ok(Err(error)) => format!(
                "the connection to {} ended before an answer came: {}",
                receiver.shown(),
                cause(&error)
            ),
            Err(_) => format!(
                "{} did not answer within {:?}",
                receiver.shown(),
                self.publisher.options.timeout
            ),
        };
        Err(Trouble::unanswered(if silence.is_its_fault(&id, began) {
            PublishError::Failed(format!("{error}, while it answers others"))
        } else {
            PublishError::Unavailable(error)
        }))
    }
}

/// Why a request was no success.
struct Trouble {
    error: PublishError,
    /// Whether it is known what became of it.
    answered: bool,
}

impl Trouble {
    const fn of_the_message(error: PublishError) -> Self {
        Self { error, answered: true }
    }

    const fn unanswered(error: PublishError) -> Self {
        Self { error, answered: false }
    }
}

/// Why a receiver cannot be reached.
fn unreachable(receiver: &Receiver, error: &reqwest::Error) -> String {
    format!("cannot connect to {}: {}", receiver.shown(), cause(error))
}

/// The innermost reason, which knows nothing of the URL.
fn cause(error: &reqwest::Error) -> String {
    if let Some(explained) = tls::explain(error) {
        return explained;
    }
    let mut inner: &(dyn Error + 'static) = error;
    while let Some(next) = inner.source() {
        inner = next;
        if let Some(private) = inner.downcast_ref::<PrivateAddress>() {
            return private.to_string();
        }
    }
    if inner.is::<reqwest::Error>() {
        // Its words would repeat the URL.
        return "no reason is known".to_owned();
    }
    inner.to_string()
}

/// Messages that got no answer, and what the publisher has got since: see "No answer" above.
#[derive(Debug, Default)]
struct Silence {
    successes: AtomicU64,
    /// By id, with the count of successes when it was sent first; the oldest in front.
    waiting: Mutex<VecDeque<(String, u64)>>,
}

impl Silence {
    fn successes(&self) -> u64 {
        self.successes.load(Ordering::Relaxed)
    }

    /// An answer came.
    fn broken(&self, id: &str, success: bool) {
        if success {
            self.successes.fetch_add(1, Ordering::Relaxed);
        }
        self.waiting().retain(|(waiting, _)| waiting != id);
    }

    /// No answer came to a message that was sent when there were so many successes: whether
    /// others have had success since it was first sent.
    fn is_its_fault(&self, id: &str, began: u64) -> bool {
        let mut waiting = self.waiting();
        let first = match waiting.iter().find(|(waiting, _)| waiting == id) {
            Some((_, first)) => *first,
            None => {
                if waiting.len() >= MAX_SILENT {
                    waiting.pop_front();
                }
                waiting.push_back((id.to_owned(), began));
                began
            }
        };
        self.successes() > first
    }

    fn waiting(&self) -> MutexGuard<'_, VecDeque<(String, u64)>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests;
