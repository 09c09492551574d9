//! Looks at a webhook's receiver for `doctor`. No event is sent: the one request is a `HEAD` of
//! the URL, which changes nothing (RFC 9110, section 9.2.1).

use std::{error::Error, sync::Arc, time::SystemTime};

use reqwest::{
    Method, Response, StatusCode,
    header::{AUTHORIZATION, DATE},
};
use time::OffsetDateTime;
use tokio::time::Duration;

use super::{
    check_host,
    dial::PrivateAddress,
    live::{Live, Receiver, web_address},
    webhook::WebhookOptions,
};
use crate::{
    finding::{Finding, Severity, is_local, skew},
    tls,
};

/// Everything that is wrong with the receiver, and how it is spoken to. `subject` is what
/// findings are about.
pub(crate) async fn examine(subject: &str, options: &WebhookOptions) -> Vec<Finding> {
    let about = About { subject };
    if let Some(finding) = about.private_host(options) {
        return vec![finding];
    }
    let receiver = match Live::new(Arc::new(options.clone())).receiver().await {
        Ok(receiver) => receiver,
        Err(reason) => {
            return vec![about.error(
                "webhook-settings",
                format!("the receiver cannot be used as configured: {reason}"),
                "nothing is sent to it: its handlers wait",
                "correct what the reason above names",
            )];
        }
    };
    let mut findings = about.settings(options, &receiver);
    let mut request =
        receiver.client.request(Method::HEAD, receiver.url().clone()).timeout(options.timeout);
    if let Some(bearer) = &receiver.bearer {
        request = request.header(AUTHORIZATION, bearer.clone());
    }
    let before = SystemTime::now();
    let answered = request.send().await;
    let after = SystemTime::now();
    match answered {
        Err(error) => findings.push(about.unanswered(&error, options, &receiver)),
        Ok(answer) => {
            findings.extend(about.answer(answer.status(), options, &receiver));
            let date = date(&answer);
            let second = Duration::from_secs(1);
            findings
                .extend(date.and_then(|at| skew(&receiver.shown(), at, (before, after), second)));
        }
    }
    findings
}

fn date(answer: &Response) -> Option<OffsetDateTime> {
    // What comes from a cache was said at another time.
    if answer.headers().contains_key("age") {
        return None;
    }
    let text = answer.headers().get(DATE)?.to_str().ok()?;
    Some(httpdate::parse_http_date(text).ok()?.into())
}

struct About<'a> {
    subject: &'a str,
}

impl About<'_> {
    fn finding(
        &self,
        severity: Severity,
        check: &'static str,
        what: String,
        why: &str,
        mend: &str,
    ) -> Finding {
        Finding::of(severity, self.subject, check, what, why, mend)
    }

    fn error(&self, check: &'static str, what: String, why: &str, mend: &str) -> Finding {
        self.finding(Severity::Error, check, what, why, mend)
    }

    /// The URL's host is an address that may not be dialled.
    fn private_host(&self, options: &WebhookOptions) -> Option<Finding> {
        if !options.refuse_private {
            return None;
        }
        let url = web_address(&options.url.read().ok()?)?;
        let refused = check_host(&url).err()?;
        Some(self.private(&url.origin().ascii_serialization(), &refused))
    }

    fn private(&self, place: &str, refused: &PrivateAddress) -> Finding {
        self.error(
            "webhook-private",
            format!("{place} is not sent to: {refused}"),
            "nothing is sent to it: its handlers wait",
            "set the url to a public address, or refuse_private = false where this receiver is \
             meant",
        )
    }

    /// What is odd about how it is spoken to.
    fn settings(&self, options: &WebhookOptions, receiver: &Receiver) -> Vec<Finding> {
        let mut findings = Vec::new();
        let url = receiver.url();
        let local = url.host_str().is_some_and(is_local);
        if url.scheme() == "http" && !local {
            findings.push(self.finding(
                Severity::Warning,
                "webhook-plaintext",
                format!("{} is sent to without TLS", receiver.shown()),
                "whoever is in between reads and changes the events, and reads a token",
                "use https:// in the transport's url",
            ));
        }
        if options.secret.is_none() && !local {
            let proves = receiver.bearer.is_some() || !url.username().is_empty();
            findings.push(self.finding(
                if proves { Severity::Note } else { Severity::Warning },
                "webhook-unsigned",
                format!("what is sent to {} is not signed", receiver.shown()),
                "the receiver cannot tell an event of ours from one that somebody else sends, \
                 or sends again",
                "set the transport's secret_file to a file that holds whsec_ and the base64 of \
                 24 to 64 random bytes, and have the receiver check it",
            ));
        }
        findings
    }

    /// No answer at all.
    fn unanswered(
        &self,
        error: &reqwest::Error,
        options: &WebhookOptions,
        receiver: &Receiver,
    ) -> Finding {
        let place = receiver.shown();
        let why = "nothing arrives there: its handlers wait, and go on by themselves when it \
                   answers";
        let mut innermost: &(dyn Error + 'static) = error;
        while let Some(inner) = innermost.source() {
            if let Some(refused) = inner.downcast_ref::<PrivateAddress>() {
                return self.private(&place, refused);
            }
            innermost = inner;
        }
        let tls_options = options.tls.clone().unwrap_or_default();
        let hung_up = || {
            tls::hung_up(error, &tls_options)
                .filter(|_| receiver.url().scheme() == "https")
                .map(str::to_owned)
        };
        if let Some(reason) = tls::explain(error).or_else(hung_up) {
            return self.error(
                "webhook-tls",
                format!("no TLS with {place}: {reason}"),
                why,
                "have the receiver present a certificate that is valid for this host, or give \
                 its authority's as the transport's tls.ca_file",
            );
        }
        let reason = if error.is_timeout() {
            format!("no answer within {:?}", options.timeout)
        } else {
            receiver.without_secrets(&innermost.to_string())
        };
        self.error(
            "webhook-connect",
            format!("{place} does not answer: {reason}"),
            why,
            "start the receiver; check host and port of the transport's url, that its name \
             resolves here, and that no firewall or proxy is in between",
        )
    }

    /// What the answer tells. Many receivers know only `POST`, so most of them tell nothing.
    fn answer(
        &self,
        status: StatusCode,
        options: &WebhookOptions,
        receiver: &Receiver,
    ) -> Option<Finding> {
        let place = receiver.shown();
        let (severity, why, mend) = match status.as_u16() {
            300..=399 => (
                Severity::Warning,
                "a redirect is not followed: if a POST is answered so too, every event fails",
                "set the transport's url to where it leads",
            ),
            401 | 403 if options.secret.is_some() && receiver.bearer.is_none() => (
                Severity::Note,
                "a receiver that checks signatures may say so to a request without one",
                "look whether its handlers get on (pulsebus handlers list); if not, compare the \
                 secrets",
            ),
            401 | 403 => (
                Severity::Warning,
                "if a POST is answered so too, every event fails and becomes a dead letter",
                "give the receiver's token as token_file, its login in the url, or a client \
                 certificate as tls.cert_file",
            ),
            404 => (
                Severity::Note,
                "it may know only POST, or only the paths that handlers add; if a POST is \
                 answered so too, every event fails",
                "look whether its handlers get on; if not, correct the url or the handler's path",
            ),
            410 => (
                Severity::Warning,
                "the receiver does not want to be sent to any more: its handlers ask once an hour",
                "remove the handler, pause it, or change the url",
            ),
            // Not known for HEAD, and not implemented at all.
            501 => return None,
            500..=599 => (
                Severity::Warning,
                "if a POST is answered so too, events wait or fail",
                "mend the receiver; its log says why",
            ),
            _ => return None,
        };
        let what = format!("{place} answers {} to HEAD", status.as_u16());
        Some(self.finding(severity, "webhook-answer", what, why, mend))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::secret::Secret;

    async fn settings(url: &str, secret: bool, token: bool) -> Vec<(&'static str, Severity)> {
        let inline = |text: &str| Secret::Inline(text.to_owned());
        let options = WebhookOptions {
            secret: secret.then(|| inline("whsec_MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTIz")),
            token: token.then(|| inline("token")),
            ..WebhookOptions::new(inline(url))
        };
        let receiver = Live::new(Arc::new(options.clone())).receiver().await.unwrap();
        let about = About { subject: "transport:x" };
        let found = about.settings(&options, &receiver);
        found.into_iter().map(|finding| (finding.check, finding.severity)).collect()
    }

    #[tokio::test]
    async fn plaintext_and_unsigned_are_told_beyond_this_machine() {
        use Severity::{Note, Warning};
        assert_eq!(settings("http://127.0.0.1:1/x", false, false).await, []);
        assert_eq!(settings("https://crm.example/x", true, false).await, []);
        assert_eq!(
            settings("http://crm.example/x", false, false).await,
            [("webhook-plaintext", Warning), ("webhook-unsigned", Warning)]
        );
        let unsigned = [("webhook-unsigned", Note)];
        assert_eq!(settings("https://crm.example/x", false, true).await, unsigned);
        assert_eq!(settings("https://u:p@crm.example/x", false, false).await, unsigned);
    }
    /// `check` refuses these; in a file they may be what it became later.
    #[tokio::test]
    async fn what_cannot_be_used_is_told_and_not_dialled() {
        let url = Secret::Inline("http://127.0.0.1:1/".to_owned());
        let options = WebhookOptions { refuse_private: true, ..WebhookOptions::new(url) };
        let found = examine("transport:x", &options).await;
        assert_eq!((found.len(), found[0].check), (1, "webhook-private"));
        let options = WebhookOptions { refuse_private: false, ..options };
        assert_eq!(examine("transport:x", &options).await[0].check, "webhook-connect");
        let secret = Some(Secret::Inline("whsec_c2hvcnQ=".to_owned()));
        let found = examine("transport:x", &WebhookOptions { secret, ..options }).await;
        assert_eq!((found.len(), found[0].check), (1, "webhook-settings"));
    }
}
