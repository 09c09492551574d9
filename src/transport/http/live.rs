//! What a publisher works with at the moment: URL, keys and client, read anew as files change.

use std::{
    fs,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use reqwest::{
    Client,
    header::{HeaderMap, HeaderValue, USER_AGENT},
    redirect::Policy,
};
use tokio::sync::Mutex;
use url::Url;

use super::{
    dial::{PublicOnly, check_host},
    signature::Keys,
    webhook::WebhookOptions,
};
use crate::{
    secret::Secret,
    tls::{self, TlsOptions},
};

/// How long what was read from files is good for.
const FRESH: Duration = Duration::from_secs(1);

/// How long a connection that nothing goes through is kept.
const IDLE: Duration = Duration::from_secs(30);

/// Shorter parts of a URL are no secrets, and may be words of an answer.
const SECRET_PART: usize = 8;

/// The receiver, as configured at the moment.
pub(super) struct Receiver {
    url: Url,
    /// What signs, where requests are signed.
    pub(super) keys: Option<Keys>,
    /// The value of `authorization`, where there is a token.
    pub(super) bearer: Option<HeaderValue>,
    pub(super) client: Client,
    /// What must not be shown, longest first.
    secrets: Vec<String>,
}

impl Receiver {
    /// Where to, without fragment. May hold a login, path and query that are secret.
    pub(super) fn url(&self) -> &Url {
        &self.url
    }

    /// As errors call it: scheme, host and port.
    pub(super) fn shown(&self) -> String {
        self.url.origin().ascii_serialization()
    }

    /// A text of the receiver's, without what it may have repeated of the request.
    pub(super) fn without_secrets(&self, text: &str) -> String {
        let mut text = text.to_owned();
        for secret in &self.secrets {
            if text.contains(secret) {
                text = text.replace(secret, "…");
            }
        }
        text
    }
}

/// The files that TLS is made of, as they were: when each was written, and how long it is.
type Stamp = Vec<Option<(SystemTime, u64)>>;

/// Reads what is configured, and keeps it for a moment.
pub(super) struct Live {
    options: Arc<WebhookOptions>,
    kept: Mutex<Kept>,
}

#[derive(Default)]
struct Kept {
    receiver: Option<(Instant, Arc<Receiver>)>,
    client: Option<(Stamp, Client)>,
}

impl Live {
    pub(super) fn new(options: Arc<WebhookOptions>) -> Self {
        Self { options, kept: Mutex::default() }
    }

    /// The receiver, as the files say now.
    ///
    /// # Errors
    /// What cannot be read or used, in words that hold no secret.
    pub(super) async fn receiver(&self) -> Result<Arc<Receiver>, String> {
        let mut kept = self.kept.lock().await;
        if let Some((read, receiver)) = &kept.receiver
            && read.elapsed() < FRESH
        {
            return Ok(Arc::clone(receiver));
        }
        let client = self.client(&mut kept)?;
        let receiver = Arc::new(receiver(&self.options, client)?);
        kept.receiver = Some((Instant::now(), Arc::clone(&receiver)));
        Ok(receiver)
    }

    /// The client; another one once the files of its TLS have changed.
    fn client(&self, kept: &mut Kept) -> Result<Client, String> {
        let tls = self.options.tls.clone().unwrap_or_default();
        let stamp = stamp(&tls);
        if let Some((made_of, client)) = &kept.client
            && *made_of == stamp
        {
            return Ok(client.clone());
        }
        let client = client(&self.options, &tls)?;
        kept.client = Some((stamp, client.clone()));
        Ok(client)
    }
}

fn stamp(tls: &TlsOptions) -> Stamp {
    [&tls.ca_file, &tls.cert_file, &tls.key_file]
        .map(|file| {
            let metadata = fs::metadata(file.as_deref()?).ok()?;
            Some((metadata.modified().ok()?, metadata.len()))
        })
        .into()
}

fn client(options: &WebhookOptions, tls: &TlsOptions) -> Result<Client, String> {
    let tls = tls::client_config(tls).map_err(|error| error.to_string())?;
    let mut headers = HeaderMap::new();
    headers.insert(
        USER_AGENT,
        HeaderValue::from_static(concat!("pulsebus/", env!("CARGO_PKG_VERSION"))),
    );
    let mut builder = Client::builder()
        .tls_backend_preconfigured(tls)
        .default_headers(headers)
        .redirect(Policy::none())
        .referer(false)
        // A receiver that cannot be reached is told from one that does not answer.
        .connect_timeout(options.timeout / 2)
        .pool_idle_timeout(IDLE);
    if options.refuse_private {
        // A proxy would dial where this does not see it.
        builder = builder.no_proxy().dns_resolver(PublicOnly);
    }
    builder.build().map_err(|_| "the HTTP client cannot be made of these settings".to_owned())
}

/// The settings, read.
fn receiver(options: &WebhookOptions, client: Client) -> Result<Receiver, String> {
    let text = read("url", &options.url)?;
    let url = web_address(&text).ok_or(NO_ADDRESS)?;
    if options.refuse_private {
        check_host(&url)
            .map_err(|error| format!("{}: {error}", url.origin().ascii_serialization()))?;
    }
    let keys = match &options.secret {
        None => None,
        Some(secret) => Some(
            Keys::parse(&read("signing secret", secret)?)
                .map_err(|error| format!("the signing secret: {error}"))?,
        ),
    };
    let token = options.token.as_ref().map(|token| read("token", token)).transpose()?;
    let secrets = secrets(&url, token.as_deref());
    let bearer = token.as_deref().map(bearer).transpose()?;
    Ok(Receiver { url, keys, bearer, client, secrets })
}

/// What is said of a URL that is none.
pub(super) const NO_ADDRESS: &str =
    "the url is not a web address: write it as in https://crm.example/hooks";

fn read(what: &str, secret: &Secret) -> Result<String, String> {
    secret.read().map_err(|error| format!("the {what}: {error}"))
}

/// A URL that can be posted to.
pub(super) fn web_address(text: &str) -> Option<Url> {
    let mut url = Url::parse(text.trim()).ok()?;
    url.set_fragment(None);
    let fits = matches!(url.scheme(), "http" | "https") && url.host().is_some();
    fits.then_some(url)
}

/// A token as `authorization` (RFC 6750, section 2.1).
fn bearer(token: &str) -> Result<HeaderValue, String> {
    let mut value = HeaderValue::from_str(&format!("Bearer {}", token.trim())).map_err(|_| {
        "the token has a line break or another character that no header has; write it anew"
            .to_owned()
    })?;
    value.set_sensitive(true);
    Ok(value)
}

/// What a receiver may repeat and nobody else should read.
fn secrets(url: &Url, token: Option<&str>) -> Vec<String> {
    let path = Some(url.path().trim_end_matches('/')).filter(|path| path.len() > 1);
    let parts = url
        .path()
        .split('/')
        .chain(url.query().into_iter().flat_map(|query| query.split(['&', '=']).chain([query])));
    let login = [Some(url.username()), url.password(), token.map(str::trim)];
    let mut secrets: Vec<String> = parts
        .filter(|part| part.len() >= SECRET_PART)
        .chain(path)
        .chain(login.into_iter().flatten().filter(|text| !text.is_empty()))
        .map(str::to_owned)
        .collect();
    secrets.sort_by_key(|secret| std::cmp::Reverse(secret.len()));
    secrets.dedup();
    secrets
}

#[cfg(test)]
mod tests {
    use super::*;

    fn inline(text: &str) -> Secret {
        Secret::Inline(text.to_owned())
    }

    #[tokio::test]
    async fn what_a_receiver_repeats_of_the_request_is_not_shown() {
        let options = WebhookOptions {
            token: Some(inline("tok")),
            ..WebhookOptions::new(inline(
                "https://bus:hunter2@hooks.example/services/T0000SECRET?k=v&key=0123456789#x",
            ))
        };
        let receiver = Live::new(options.into()).receiver().await.unwrap();
        assert_eq!(receiver.shown(), "https://hooks.example");
        let said = receiver.without_secrets(
            "Cannot POST /services/T0000SECRET/more of bus:hunter2, T0000SECRET, tok; 0123456789",
        );
        assert_eq!(said, "Cannot POST …/more of …:…, …, …; …");
    }

    #[tokio::test]
    async fn P6_what_cannot_be_used_is_said_without_being_shown() {
        let folder = tempfile::tempdir().unwrap();
        let missing = Secret::File(folder.path().join("none"));
        let plain = || WebhookOptions::new(inline("https://hooks.example/x"));
        for (options, expected) in [
            (WebhookOptions::new(inline("hunter2://x/")), "not a web address"),
            (WebhookOptions::new(inline("hunter2")), "not a web address"),
            (WebhookOptions::new(missing.clone()), "the url: cannot read"),
            (WebhookOptions { secret: Some(missing.clone()), ..plain() }, "signing secret: cannot"),
            (WebhookOptions { secret: Some(inline("hunter2")), ..plain() }, "begin with whsec_"),
            (WebhookOptions { token: Some(missing), ..plain() }, "the token: cannot read"),
            (WebhookOptions { token: Some(inline("hunter2\nx")), ..plain() }, "line break"),
            (
                WebhookOptions {
                    refuse_private: true,
                    ..WebhookOptions::new(inline("http://hunter2@10.0.0.1/hunter2"))
                },
                "10.0.0.1 is private",
            ),
            (
                WebhookOptions {
                    tls: Some(TlsOptions {
                        ca_file: Some(folder.path().join("ca.pem")),
                        ..TlsOptions::default()
                    }),
                    ..plain()
                },
                "ca.pem",
            ),
        ] {
            let error = Live::new(options.into()).receiver().await.err().unwrap();
            assert!(error.contains(expected), "{error}");
            assert!(!error.contains("hunter2"), "{error}");
        }
    }
}
