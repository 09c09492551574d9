//! What a receiver's answer means.
//!
//! | answer | outcome |
//! |---|---|
//! | 2xx | published |
//! | 400, 413, 414, 415, 422, 431 | refused: this event will never work |
//! | 429, 502, 503, 504 | unavailable, for as long as `Retry-After` says |
//! | 410 | unavailable, for an hour: the receiver does not want to be sent to any more |
//! | 3xx, and every other | failed: tried again, as the handler's `retry` says |

use std::time::{Duration, SystemTime};

use reqwest::{
    Response, StatusCode,
    header::{HeaderMap, LOCATION, RETRY_AFTER},
};
use tokio::time::{Instant, timeout_at};
use url::Url;

use super::live::Receiver;
use crate::transport::PublishError;

/// How much of a body is read so that its connection can be used again, and for how long.
const MAX_DRAINED: usize = 64 << 10;
const DRAIN: Duration = Duration::from_secs(1);

/// How much of a body is read for an error, and for how long.
const MAX_READ: usize = 8 << 10;
const READ: Duration = Duration::from_secs(3);

/// Characters of a body that an error shows.
const MAX_SHOWN: usize = 300;

/// How long a receiver is left alone that does not want to be sent to any more.
const GONE: Duration = Duration::from_secs(3_600);

/// The longest a receiver can ask to be left alone for.
const MAX_AFTER: Duration = Duration::from_secs(24 * 3_600);

/// What the answer says of the message.
pub(super) async fn outcome(mut answer: Response, from: &Receiver) -> Result<(), PublishError> {
    let status = answer.status();
    if status.is_success() {
        // The message is taken; what else the receiver says is only read out of the way.
        read(&mut answer, MAX_DRAINED, DRAIN).await;
        return Ok(());
    }
    let body = read(&mut answer, MAX_READ, READ).await;
    let mut reason = format!("{} answered {}", from.shown(), named(status));
    if let Some(moved) = moved(&answer, from) {
        reason.push_str(&format!(
            ", which is not followed: it moved to {moved}; set the transport's url to where it is"
        ));
    }
    let said = from.without_secrets(&String::from_utf8_lossy(&body));
    let said = one_line(&said);
    if !said.is_empty() {
        reason.push_str(": ");
        reason.push_str(&said);
    }
    Err(verdict(status, answer.headers(), reason, SystemTime::now()))
}

fn verdict(
    status: StatusCode,
    headers: &HeaderMap,
    reason: String,
    now: SystemTime,
) -> PublishError {
    match status.as_u16() {
        400 | 413 | 414 | 415 | 422 | 431 => PublishError::Refused(reason),
        429 | 502 | 503 | 504 => match retry_after(headers, now) {
            Some(after) => PublishError::Later { reason, after },
            None => PublishError::Unavailable(reason),
        },
        410 => PublishError::Later {
            reason: format!(
                "{reason} (the receiver does not want to be sent to any more: remove the handler, \
                 pause it, or change the url; it is asked again in an hour)"
            ),
            after: GONE,
        },
        _ => PublishError::Failed(reason),
    }
}

/// `Retry-After` (RFC 9110, section 10.2.3): seconds, or a date. `None` where it says nothing,
/// or now: then the backoff is our own.
fn retry_after(headers: &HeaderMap, now: SystemTime) -> Option<Duration> {
    let text = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    let after = if !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit()) {
        // More digits than a number holds is longer than the longest, too.
        text.parse().map_or(MAX_AFTER, Duration::from_secs)
    } else {
        httpdate::parse_http_date(text).ok()?.duration_since(now).ok()?
    };
    (after >= Duration::from_secs(1)).then_some(after.min(MAX_AFTER))
}

fn named(status: StatusCode) -> String {
    match status.canonical_reason() {
        Some(reason) => format!("{} {reason}", status.as_u16()),
        None => status.as_u16().to_string(),
    }
}

/// Where a redirect leads: no further than the host, because its path may be the secret that
/// ours is.
fn moved(answer: &Response, from: &Receiver) -> Option<String> {
    if !answer.status().is_redirection() {
        return None;
    }
    let location = answer.headers().get(LOCATION)?.to_str().ok()?;
    let location: Url = from.url().join(location).ok()?;
    let origin = location.origin();
    if !origin.is_tuple() {
        return Some(format!("a {} address", location.scheme()));
    }
    if origin == from.url().origin() {
        return Some("another path of the same host".to_owned());
    }
    Some(origin.ascii_serialization())
}

/// Reads a body to its end, or as far as the bounds go.
async fn read(answer: &mut Response, bytes: usize, patience: Duration) -> Vec<u8> {
    let deadline = Instant::now() + patience;
    let mut body = Vec::new();
    while body.len() < bytes {
        match timeout_at(deadline, answer.chunk()).await {
            Ok(Ok(Some(chunk))) => {
                let room = chunk.len().min(bytes - body.len());
                body.extend_from_slice(&chunk[..room]);
            }
            _ => break,
        }
    }
    body
}

/// The beginning of a text, on one line, without what a terminal would obey.
fn one_line(text: &str) -> String {
    let mut line = String::new();
    let mut shown = 0;
    for word in text.split(|c: char| c.is_whitespace() || c.is_control()) {
        if word.is_empty() {
            continue;
        }
        if !line.is_empty() {
            line.push(' ');
            shown += 1;
        }
        for c in word.chars() {
            if shown >= MAX_SHOWN {
                line.push('…');
                return line;
            }
            // Marks that turn the direction of what follows.
            if !matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
            {
                line.push(c);
                shown += 1;
            }
        }
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(status: u16, retry_after: Option<&str>, now: SystemTime) -> PublishError {
        let mut headers = HeaderMap::new();
        if let Some(text) = retry_after {
            headers.insert(RETRY_AFTER, text.parse().unwrap());
        }
        verdict(StatusCode::from_u16(status).unwrap(), &headers, "why".to_owned(), now)
    }

    #[test]
    fn every_status_has_its_outcome() {
        let now = SystemTime::now();
        for status in [400, 413, 414, 415, 422, 431] {
            assert_eq!(said(status, None, now), PublishError::Refused("why".into()), "{status}");
        }
        for status in [429, 502, 503, 504] {
            let unavailable = PublishError::Unavailable("why".into());
            assert_eq!(said(status, None, now), unavailable, "{status}");
            let later = PublishError::Later { reason: "why".into(), after: Duration::from_secs(7) };
            assert_eq!(said(status, Some("7"), now), later, "{status}");
        }
        for status in [
            301, 302, 304, 307, 308, 401, 402, 403, 404, 405, 408, 409, 418, 425, 451, 500, 501,
            599,
        ] {
            assert_eq!(
                said(status, Some("7"), now),
                PublishError::Failed("why".into()),
                "{status}"
            );
        }
        let PublishError::Later { reason, after } = said(410, Some("1"), now) else { panic!() };
        assert_eq!(after, GONE);
        assert!(reason.contains("does not want") && reason.contains("url"), "{reason}");
    }

    #[test]
    fn retry_after_is_seconds_or_a_date() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000);
        let date = |seconds: i64| {
            let at = 1_700_000_000_u64.checked_add_signed(seconds).unwrap();
            httpdate::fmt_http_date(SystemTime::UNIX_EPOCH + Duration::from_secs(at))
        };
        let day = Some(86_400);
        for (text, seconds) in [
            ("1".to_owned(), Some(1)),
            (" 120 ".to_owned(), Some(120)),
            ("0".to_owned(), None),
            ("".to_owned(), None),
            ("-5".to_owned(), None),
            ("1.5".to_owned(), None),
            ("soon".to_owned(), None),
            ("86400".to_owned(), day),
            ("999999999".to_owned(), day),
            ("99999999999999999999999999".to_owned(), day),
            (date(90), Some(90)),
            (date(-90), None),
            (date(0), None),
            (date(1_000_000), day),
        ] {
            let after = match said(503, Some(&text), now) {
                PublishError::Later { after, .. } => Some(after.as_secs()),
                PublishError::Unavailable(_) => None,
                other => panic!("{other:?}"),
            };
            assert_eq!(after, seconds, "{text:?}");
        }
    }

    #[test]
    fn a_snippet_is_short_and_on_one_line() {
        assert_eq!(one_line(" a\r\n\tb\u{1b}[31m c\u{0}\u{202e}d "), "a b [31m c d");
        assert_eq!(one_line(""), "");
        let long = one_line(&"ä ".repeat(1_000));
        assert!(long.ends_with('…') && long.chars().count() <= MAX_SHOWN + 1, "{long}");
    }
}
