//! How messages become requests.

use std::{
    fmt::Write as _,
    time::{SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use reqwest::header::{AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderValue};
use sha2::{Digest as _, Sha256};
use url::Url;

use super::{
    headers::{carried, content_type},
    live::Receiver,
    signature::Keys,
};
use crate::transport::Outbound;

/// Bytes of an array at most; one message is always possible.
const MAX_ARRAY: usize = 1 << 20;

const STRUCTURED: &str = "application/cloudevents+json";
const BATCH: &str = "application/cloudevents-batch+json";

/// How the body of a request is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// The message's own.
    Plain,
    /// An array of the bodies of messages.
    Array,
}

/// The messages by request: those of one address that follow each other, as many as fit.
pub(super) fn groups(messages: &[Outbound], batch: usize) -> Vec<(Form, &[Outbound])> {
    if batch <= 1 {
        return messages.chunks(1).map(|message| (Form::Plain, message)).collect();
    }
    let mut groups = Vec::new();
    let mut rest = messages;
    while let Some(first) = rest.first() {
        let mut bytes = 0;
        let fit = rest.iter().take(batch).take_while(|message| {
            bytes += message.body.len() + 1;
            message.address == first.address && bytes <= MAX_ARRAY
        });
        let (group, behind) = rest.split_at(fit.count().max(1));
        groups.push((Form::Array, group));
        rest = behind;
    }
    groups
}

/// What is sent.
pub(super) struct Request {
    pub(super) id: String,
    pub(super) url: Url,
    pub(super) headers: HeaderMap,
    pub(super) body: Bytes,
}

/// Makes the request of messages of one address; the error says why it never can be.
pub(super) fn request(
    receiver: &Receiver,
    messages: &[Outbound],
    form: Form,
) -> Result<Request, String> {
    let first = messages.first().ok_or("there is nothing to send")?;
    let url = joined(receiver.url(), &first.address)?;
    let (id, mut headers, content_type, body) = match form {
        Form::Plain => (
            webhook_id(&first.id)?,
            carried(&first.headers)?,
            content_type(&first.headers),
            first.body.clone(),
        ),
        Form::Array => (
            batch_id(messages),
            HeaderMap::new(),
            HeaderValue::from_static(batch_type(messages)),
            array(messages),
        ),
    };
    headers.insert(CONTENT_TYPE, content_type);
    if let Some(bearer) = &receiver.bearer {
        headers.insert(AUTHORIZATION, bearer.clone());
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    sign(&mut headers, receiver.keys.as_ref(), &id, now, &body)?;
    Ok(Request { id, url, headers, body })
}

fn sign(
    headers: &mut HeaderMap,
    keys: Option<&Keys>,
    id: &str,
    timestamp: u64,
    body: &[u8],
) -> Result<(), String> {
    let value = |text: &str| {
        HeaderValue::from_str(text).map_err(|_| "the event id cannot be a header".to_owned())
    };
    headers.insert("webhook-id", value(id)?);
    headers.insert("webhook-timestamp", timestamp.into());
    if let Some(keys) = keys {
        headers.insert("webhook-signature", value(&keys.sign(id, timestamp, body))?);
    }
    Ok(())
}

/// An event id as a header that every receiver reads the same way.
fn webhook_id(id: &str) -> Result<String, String> {
    if id.is_empty() {
        return Err("a webhook needs an id, and the message has none".to_owned());
    }
    if id.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Ok(id.to_owned());
    }
    let mut encoded = String::with_capacity(id.len() * 3);
    for byte in id.bytes() {
        if byte.is_ascii_graphic() && byte != b'%' {
            encoded.push(char::from(byte));
        } else {
            // Writing to a string does not fail.
            let _ = write!(encoded, "%{byte:02X}");
        }
    }
    Ok(encoded)
}

/// The id of an array: the same for the same messages in the same order.
fn batch_id(messages: &[Outbound]) -> String {
    let mut hash = Sha256::new();
    for message in messages {
        hash.update((message.id.len() as u64).to_be_bytes());
        hash.update(message.id.as_bytes());
    }
    let mut id = "batch_".to_owned();
    for byte in hash.finalize().iter().take(16) {
        // Writing to a string does not fail.
        let _ = write!(id, "{byte:02x}");
    }
    id
}

/// The content type of an array: a batch of CloudEvents, where all of them are (CloudEvents
/// HTTP binding, section 3.3).
fn batch_type(messages: &[Outbound]) -> &'static str {
    let structured = |message: &Outbound| {
        message.headers.content_type().is_some_and(|text| {
            let kind = text.split(';').next().unwrap_or_default().trim();
            kind.eq_ignore_ascii_case(STRUCTURED)
        })
    };
    if messages.iter().all(structured) { BATCH } else { "application/json" }
}

/// The bodies, byte for byte, as the elements of a JSON array.
fn array(messages: &[Outbound]) -> Bytes {
    let bytes: usize = messages.iter().map(|message| message.body.len() + 1).sum();
    let mut array = Vec::with_capacity(bytes + 1);
    for message in messages {
        array.push(if array.is_empty() { b'[' } else { b',' });
        array.extend_from_slice(&message.body);
    }
    array.push(b']');
    array.into()
}

/// The URL with an address behind its path. Host, query and the path it has stay as they are.
fn joined(base: &Url, address: &str) -> Result<Url, String> {
    let mut url = base.clone();
    if address.is_empty() {
        return Ok(url);
    }
    if let Some(problem) = address_problem(address) {
        return Err(format!("`{}` is no path behind a URL: {problem}", address.escape_debug()));
    }
    let above = base.path().trim_end_matches('/');
    url.set_path(&format!("{above}/{}", address.trim_start_matches('/')));
    let kept = url.origin() == base.origin()
        && url.query() == base.query()
        && url.path().strip_prefix(above).is_some_and(|behind| behind.starts_with('/'));
    if kept { Ok(url) } else { Err("the address leads out of the URL".to_owned()) }
}

fn address_problem(address: &str) -> Option<&'static str> {
    if address.chars().any(|c| c.is_whitespace() || c.is_control()) {
        return Some("it has blanks or control characters");
    }
    if address.contains(['?', '#', '\\']) {
        return Some("it has a ?, # or \\");
    }
    // As URLs are read, `%2e` is a dot.
    let step = |segment: &str| {
        let plain = segment.to_ascii_lowercase().replace("%2e", ".");
        matches!(&*plain, "." | "..")
    };
    address.split('/').any(step).then_some("it has a step to another folder")
}

#[cfg(test)]
mod tests;
