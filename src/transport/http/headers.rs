//! Which of a message's headers a request carries.

use reqwest::header::{HeaderMap, HeaderName, HeaderValue};

use crate::{event::Headers, transport::hop};

/// Those an event is not the same without, where it is understood from its headers.
const NEEDED: [&str; 2] = ["ce-", "pulsebus-"];

/// The headers that go along: what has a text form and may be a header of a request. Properties
/// of AMQP stay behind.
///
/// # Errors
/// Where one of those cannot go along that the event would be another without.
pub(super) fn carried(headers: &Headers) -> Result<HeaderMap, String> {
    let mut carried = HeaderMap::new();
    for (name, value) in headers.iter() {
        let begins = |prefix: &&str| {
            name.get(..prefix.len()).is_some_and(|start| start.eq_ignore_ascii_case(prefix))
        };
        if hop::is_of_a_request(name) || name.starts_with(':') {
            continue;
        }
        let Some(text) = value.to_text() else { continue };
        let header = HeaderName::from_bytes(name.as_bytes()).ok().zip(
            // Bytes above 127 are allowed (RFC 9110, section 5.5, "obs-text").
            HeaderValue::from_bytes(text.as_bytes()).ok(),
        );
        // The map refuses more than 32,768 names; a receiver takes far fewer.
        let taken = header.is_some_and(|(name, value)| carried.try_append(name, value).is_ok());
        if !taken && NEEDED.iter().any(begins) {
            return Err(format!("header `{}` cannot be an HTTP header", name.escape_debug()));
        }
    }
    Ok(carried)
}

/// What the body is: the message's own word, else JSON.
pub(super) fn content_type(headers: &Headers) -> HeaderValue {
    headers
        .content_type()
        .and_then(|text| text.parse().ok())
        .unwrap_or(HeaderValue::from_static("application/json"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::HeaderValue as Value;

    #[test]
    fn C2_headers_go_along_but_for_what_belongs_to_the_request() {
        let mut from = Headers::new();
        from.push("Trace", "a");
        from.push("trace", "b");
        from.push("count", Value::Int32(7));
        from.push("umlaut", "ü");
        from.push("raw", Value::Bytes(vec![1]));
        from.push(":priority", Value::Uint8(1));
        from.push("a b", "no name");
        from.push("break", "a\r\nhost: b");
        for name in [
            "Host",
            "Content-Length",
            "transfer-encoding",
            "Connection",
            "AUTHORIZATION",
            "webhook-id",
            "Webhook-Signature",
            "Proxy-Authorization",
            "X-Forwarded-For",
            "X-HTTP-Method-Override",
            "content-type",
        ] {
            from.push(name, "x");
        }
        let carried = carried(&from).unwrap();
        let all = |name: &str| -> Vec<String> {
            let values = carried.get_all(name);
            values.iter().map(|v| String::from_utf8_lossy(v.as_bytes()).into_owned()).collect()
        };
        assert_eq!(all("trace"), ["a", "b"]);
        assert_eq!(all("count"), ["7"]);
        assert_eq!(all("umlaut"), ["ü"]);
        assert_eq!(carried.len(), 4);
    }

    #[test]
    fn P3_an_event_is_not_sent_without_what_it_is_understood_from() {
        for (name, value) in [("ce-type", "a\nb"), ("pulsebus-source", "\u{0}"), ("ce-ü", "x")] {
            let mut from = Headers::new();
            from.push(name, value);
            assert!(carried(&from).is_err(), "{name:?}");
        }
    }

    #[test]
    fn the_content_type_is_the_message_s_own() {
        let mut from = Headers::new();
        assert_eq!(content_type(&from), "application/json");
        from.push("Content-Type", "a\nb");
        assert_eq!(content_type(&from), "application/json");
        from.set("content-type", "application/cloudevents+json");
        assert_eq!(content_type(&from), "application/cloudevents+json");
        from.push(":content_type", "text/plain");
        assert_eq!(content_type(&from), "text/plain");
    }
}
