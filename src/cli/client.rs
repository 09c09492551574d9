//! The daemon's HTTP API, from the client's side.

use std::{error::Error as _, net::SocketAddr, path::PathBuf, time::Duration};

use anyhow::{Context as _, anyhow, bail};
use pulsebus::{
    config::Settings,
    secret::Secret,
    tls::{self, TlsOptions},
};
use reqwest::{
    Method, StatusCode,
    header::{AUTHORIZATION, CONTENT_TYPE, HeaderValue},
};
use serde::{Deserialize, de::DeserializeOwned};
use url::Url;

use super::{Failure, SettingsArgs};

/// Which daemon to talk to.
#[derive(Debug, clap::Args)]
pub(super) struct ClientArgs {
    /// Where the daemon is [default: as configured in http.listen]
    #[arg(long, value_name = "URL", env = "PULSEBUS_URL")]
    url: Option<Url>,
    /// A file that holds the daemon's token [default: as configured in http.token]
    #[arg(long, value_name = "FILE", env = "PULSEBUS_TOKEN_FILE")]
    token_file: Option<PathBuf>,
    /// The certificate of the authority that signed the daemon's, for https, where it is none of
    /// the system's
    #[arg(long, value_name = "FILE", env = "PULSEBUS_CA_FILE")]
    ca_file: Option<PathBuf>,
    /// A client certificate, where the daemon wants one (http.tls.client_ca_file)
    #[arg(long, value_name = "FILE", env = "PULSEBUS_CERT_FILE", requires = "key_file")]
    cert_file: Option<PathBuf>,
    /// Its private key
    #[arg(long, value_name = "FILE", env = "PULSEBUS_KEY_FILE", requires = "cert_file")]
    key_file: Option<PathBuf>,
    /// Prints JSON, one value a line
    #[arg(long)]
    pub(super) json: bool,
}

impl ClientArgs {
    /// A client for the daemon these arguments mean. The configuration is read only for what
    /// they do not say: someone who may not read the daemon's secrets can still name it.
    pub(super) fn client(&self, settings: &SettingsArgs) -> Result<Client, Failure> {
        let (url, mut token) = match &self.url {
            Some(url) => (url.clone(), None),
            None => {
                let loaded = settings.load().inspect_err(|_| {
                    super::output::complain(
                        "pulsebus: cannot tell from the configuration where the daemon is; --url \
                         and --token-file do without it",
                    );
                })?;
                if !loaded.settings.http.enabled {
                    return Err(Failure::Usage(
                        "the configured daemon has no HTTP server (http.enabled is false); name \
                         another with --url"
                            .to_owned(),
                    ));
                }
                (daemon_url(&loaded.settings)?, loaded.settings.http.token)
            }
        };
        if let Some(file) = &self.token_file {
            token = Some(Secret::File(file.clone()));
        }
        let tls = TlsOptions {
            ca_file: self.ca_file.clone(),
            cert_file: self.cert_file.clone(),
            key_file: self.key_file.clone(),
            first: false,
        };
        Client::new(url, token.as_ref(), &tls).map_err(Failure::from)
    }
}

/// The configured address, as a client dials it: a server that listens on every address is
/// reached at loopback.
fn daemon_url(settings: &Settings) -> anyhow::Result<Url> {
    let mut address: SocketAddr = settings.http.listen;
    if address.ip().is_unspecified() {
        address.set_ip(match address {
            SocketAddr::V4(_) => std::net::Ipv4Addr::LOCALHOST.into(),
            SocketAddr::V6(_) => std::net::Ipv6Addr::LOCALHOST.into(),
        });
    }
    let scheme = if settings.http.tls.is_some() { "https" } else { "http" };
    Url::parse(&format!("{scheme}://{address}")).context("http.listen gives no URL")
}

/// A daemon to talk to.
#[derive(Debug)]
pub(super) struct Client {
    http: reqwest::Client,
    base: Url,
    token: Option<HeaderValue>,
}

impl Client {
    /// For the daemon of this configuration.
    pub(super) fn of(settings: &Settings, tls: &TlsOptions) -> anyhow::Result<Self> {
        Self::new(daemon_url(settings)?, settings.http.token.as_ref(), tls)
    }

    fn new(base: Url, token: Option<&Secret>, tls: &TlsOptions) -> anyhow::Result<Self> {
        if !matches!(base.scheme(), "http" | "https") {
            bail!("--url {base} is not understood: write it as in http://127.0.0.1:8077");
        }
        let token = match token {
            None => None,
            Some(secret) => {
                let text = secret.read().context("failed to read the token")?;
                let mut value = HeaderValue::from_str(&format!("Bearer {}", text.trim()))
                    .map_err(|_| anyhow!("the token holds characters that cannot be sent"))?;
                value.set_sensitive(true);
                Some(value)
            }
        };
        let mut http = reqwest::Client::builder();
        if base.scheme() == "https" {
            http = http.tls_backend_preconfigured(tls::client_config(tls)?);
        }
        let http = http
            .connect_timeout(Duration::from_secs(5))
            .timeout(Duration::from_secs(60))
            // A token must not follow a redirect to somebody else.
            .redirect(reqwest::redirect::Policy::none())
            .user_agent(concat!("pulsebus/", env!("CARGO_PKG_VERSION")))
            .build()
            .context("failed to set up the HTTP client")?;
        Ok(Self { http, base, token })
    }

    /// Gets JSON.
    pub(super) async fn get<T: DeserializeOwned>(
        &self,
        path: &[&str],
        query: &[(&str, String)],
    ) -> Result<T, RequestError> {
        self.send(Method::GET, self.url(path, query), None).await
    }

    /// Gets whatever JSON is answered, with its status, whether that is a success or not.
    pub(super) async fn answer(
        &self,
        path: &[&str],
        query: &[(&str, String)],
    ) -> Result<(StatusCode, serde_json::Value), RequestError> {
        let (status, bytes) = self.exchange(Method::GET, self.url(path, query), None).await?;
        let value = serde_json::from_slice(&bytes).map_err(|error| self.strange(error))?;
        Ok((status, value))
    }

    /// Posts a body, gets JSON.
    pub(super) async fn post<T: DeserializeOwned>(
        &self,
        path: &[&str],
        content_type: &'static str,
        body: Vec<u8>,
    ) -> Result<T, RequestError> {
        self.send(Method::POST, self.url(path, &[]), Some((content_type, body))).await
    }

    /// Tells the daemon to do something, gets JSON.
    pub(super) async fn tell<T: DeserializeOwned>(
        &self,
        path: &[&str],
        query: &[(&str, String)],
        order: Option<&serde_json::Value>,
    ) -> Result<T, RequestError> {
        let body = order.map(|order| ("application/json", order.to_string().into_bytes()));
        self.send(Method::POST, self.url(path, query), body).await
    }

    fn url(&self, path: &[&str], query: &[(&str, String)]) -> Url {
        let mut url = self.base.clone();
        // Only URLs without a host have no path to extend, and those were refused.
        if let Ok(mut segments) = url.path_segments_mut() {
            segments.pop_if_empty().extend(path);
        }
        if !query.is_empty() {
            url.query_pairs_mut().extend_pairs(query);
        }
        url
    }

    async fn send<T: DeserializeOwned>(
        &self,
        method: Method,
        url: Url,
        body: Option<(&'static str, Vec<u8>)>,
    ) -> Result<T, RequestError> {
        let (status, bytes) = self.exchange(method, url.clone(), body).await?;
        if !status.is_success() {
            return Err(RequestError::Refused {
                status,
                problem: problem(&bytes),
                path: url.path().to_owned(),
            });
        }
        serde_json::from_slice(&bytes).map_err(|error| self.strange(error))
    }

    /// Status and body, whatever they are.
    async fn exchange(
        &self,
        method: Method,
        url: Url,
        body: Option<(&'static str, Vec<u8>)>,
    ) -> Result<(StatusCode, bytes::Bytes), RequestError> {
        let mut request = self.http.request(method, url);
        if let Some(token) = &self.token {
            request = request.header(AUTHORIZATION, token.clone());
        }
        if let Some((content_type, body)) = body {
            request = request.header(CONTENT_TYPE, content_type).body(body);
        }
        let away = |error: &reqwest::Error| {
            let base = self.base.to_string();
            match tls::explain_with(error, "--ca-file") {
                Some(reason) => RequestError::Tls { base, reason },
                None => {
                    let reached = !error.is_connect();
                    RequestError::Away { base, reason: innermost(error), reached }
                }
            }
        };
        let response = request.send().await.map_err(|error| away(&error))?;
        let status = response.status();
        let bytes = response.bytes().await.map_err(|error| away(&error))?;
        Ok((status, bytes))
    }

    /// The daemon's answer is not understood.
    pub(super) fn strange(&self, error: serde_json::Error) -> RequestError {
        RequestError::Strange { base: self.base.to_string(), error }
    }
}

/// Why the daemon did not answer as asked.
#[derive(Debug, thiserror::Error)]
pub(super) enum RequestError {
    /// It cannot be reached, or went away.
    #[error(
        "no answer from {base}: {reason}; is the daemon running? start it with `pulsebus run`, or \
         name another with --url"
    )]
    Away {
        /// The daemon's URL.
        base: String,
        /// Why.
        reason: String,
        /// Whether somebody took the connection.
        reached: bool,
    },
    /// It cannot be trusted, or does not trust us.
    #[error("no connection to {base}: {reason}")]
    Tls {
        /// The daemon's URL.
        base: String,
        /// Why.
        reason: String,
    },
    /// It says no.
    #[error("{}", refusal(*status, problem, path))]
    Refused {
        /// How.
        status: StatusCode,
        /// Why.
        problem: String,
        /// What was asked for.
        path: String,
    },
    /// What it says is not understood.
    #[error("{base} does not answer like pulsebus ({error}); check --url")]
    Strange {
        /// The daemon's URL.
        base: String,
        /// What is wrong with the answer.
        error: serde_json::Error,
    },
}

impl RequestError {
    /// Whether the same request may work later.
    pub(super) fn is_passing(&self) -> bool {
        match self {
            Self::Away { .. } => true,
            Self::Refused { status, .. } => {
                status.is_server_error() || *status == StatusCode::TOO_MANY_REQUESTS
            }
            Self::Tls { .. } | Self::Strange { .. } => false,
        }
    }
}

impl From<RequestError> for Failure {
    fn from(error: RequestError) -> Self {
        Self::Failed(error.into())
    }
}

fn refusal(status: StatusCode, problem: &str, path: &str) -> String {
    match status {
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
            format!(
                "the daemon refuses the token ({problem}); give the right one with --token-file"
            )
        }
        StatusCode::NOT_FOUND => format!("the daemon has no {path}: {problem}"),
        _ => format!("the daemon answered {status}: {problem}"),
    }
}

/// The text of an RFC 9457 problem, or the beginning of whatever was answered.
fn problem(body: &[u8]) -> String {
    #[derive(Deserialize)]
    struct Problem {
        title: Option<String>,
        detail: Option<String>,
    }
    let text = match serde_json::from_slice::<Problem>(body) {
        Ok(Problem { title: Some(title), detail: Some(detail) }) => format!("{title}: {detail}"),
        Ok(Problem { title: Some(text), .. } | Problem { detail: Some(text), .. }) => text,
        _ => String::from_utf8_lossy(body).trim().to_owned(),
    };
    let text = if text.is_empty() { "no reason given".to_owned() } else { text };
    super::output::harmless(&super::output::shortened(&text, 500))
}

/// The cause that says most, without the URL that reqwest puts around it.
fn innermost(error: &reqwest::Error) -> String {
    if error.is_timeout() {
        return "timed out".to_owned();
    }
    let mut cause = error.source();
    let mut text = error.to_string();
    while let Some(inner) = cause {
        text = inner.to_string();
        cause = inner.source();
    }
    // A TLS alert, read as an answer.
    if text.contains("invalid HTTP version") {
        text.push_str(" (is it https:// there?)");
    }
    text
}
