//! What belongs to a hop over HTTP rather than to the message: known to the publisher, which sets
//! or refuses these, and to `forward`, which must not lose what is called so elsewhere.

/// Whether a request has a header of this name for itself: what it says itself, what belongs to
/// one connection (RFC 9110, section 7.6.1), what tells a receiver to do something else than take
/// it, and what is [secret](is_secret).
pub(crate) fn is_of_a_request(name: &str) -> bool {
    const NAMES: [&str; 34] = [
        "accept",
        "accept-charset",
        "accept-encoding",
        "accept-language",
        "connection",
        "content-encoding",
        "content-length",
        "content-range",
        "content-type",
        "expect",
        "forwarded",
        "from",
        "host",
        "if-match",
        "if-modified-since",
        "if-none-match",
        "if-range",
        "if-unmodified-since",
        "keep-alive",
        "max-forwards",
        "origin",
        "range",
        "referer",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "user-agent",
        "via",
        "x-http-method",
        "x-http-method-override",
        "x-method-override",
        "x-real-ip",
        "http2-settings",
    ];
    const PREFIXES: [&str; 3] = ["webhook-", "x-forwarded-", "access-control-"];
    is_secret(name)
        || NAMES.iter().any(|known| name.eq_ignore_ascii_case(known))
        || PREFIXES.iter().any(|prefix| begins(name, prefix))
}

/// Whether a header of this name says who somebody is: it is passed on to nobody.
pub(crate) fn is_secret(name: &str) -> bool {
    const NAMES: [&str; 4] = ["authorization", "cookie", "cookie2", "set-cookie"];
    NAMES.iter().any(|known| name.eq_ignore_ascii_case(known)) || begins(name, "proxy-")
}

fn begins(name: &str, prefix: &str) -> bool {
    name.get(..prefix.len()).is_some_and(|start| start.eq_ignore_ascii_case(prefix))
}
