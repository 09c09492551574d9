//! Who may ask: a bearer token, or, without one, only this machine's own programs.

use std::{
    net::IpAddr,
    sync::{Arc, PoisonError, RwLock},
};

use axum::{
    extract::{Request, State as Extract},
    http::{HeaderMap, StatusCode, Uri, header},
    middleware::Next,
    response::Response,
};
use subtle::ConstantTimeEq as _;

use super::{Problem, State};
use crate::secret::Secret;

/// What clients present, for as long as no reload says otherwise. Clones are the same.
#[derive(Clone, Default)]
pub(super) struct Token(Arc<RwLock<Option<Secret>>>);

impl Token {
    pub(super) fn new(token: Option<Secret>) -> Self {
        Self(Arc::new(RwLock::new(token)))
    }

    /// Counts from the next request on.
    pub(super) fn set(&self, token: Option<Secret>) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = token;
    }

    fn get(&self) -> Option<Secret> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Lets a request through, or answers it.
pub(super) async fn check(
    Extract(state): Extract<Arc<State>>,
    request: Request,
    next: Next,
) -> Result<Response, Problem> {
    allowed(&state.token, request.headers(), request.uri())?;
    Ok(next.run(request).await)
}

/// Whether this request may be served, beyond how healthy the server is.
pub(super) fn allowed(token: &Token, headers: &HeaderMap, uri: &Uri) -> Result<(), Problem> {
    let Some(token) = token.get() else {
        return local(headers, uri.authority().map(|authority| authority.host()));
    };
    // Read anew, so that a rotated file counts from the next request on.
    let token = token.read().map_err(|error| {
        tracing::error!(%error, "the API token cannot be read");
        Problem::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "the daemon cannot read its token; its log says why",
        )
    })?;
    bearer(headers, token.trim())
}

fn bearer(headers: &HeaderMap, token: &str) -> Result<(), Problem> {
    let given = headers
        .get(header::AUTHORIZATION)
        .and_then(|value| value.to_str().ok())
        .and_then(|value| value.split_once(' '))
        .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"))
        .map(|(_, token)| token.trim());
    match given {
        Some(given)
            if !token.is_empty() && bool::from(given.as_bytes().ct_eq(token.as_bytes())) =>
        {
            Ok(())
        }
        Some(_) => Err(Problem::new(StatusCode::UNAUTHORIZED, "this is not the token")),
        None => Err(Problem::new(
            StatusCode::UNAUTHORIZED,
            "a token is needed: Authorization: Bearer TOKEN (the CLI: --token-file)",
        )),
    }
}

/// Without a token, a web page in somebody's browser must not get in: neither by a host name
/// that resolves to this machine (DNS rebinding) nor across origins.
fn local(headers: &HeaderMap, authority: Option<&str>) -> Result<(), Problem> {
    let host = authority
        .or_else(|| headers.get(header::HOST)?.to_str().ok().map(host_of))
        .unwrap_or_default();
    if !is_loopback(host) {
        return Err(Problem::new(
            StatusCode::FORBIDDEN,
            "without a token only requests to localhost are served; set http.token_file",
        ));
    }
    if let Some(origin) = headers.get(header::ORIGIN) {
        let same = origin
            .to_str()
            .ok()
            .and_then(|origin| origin.split_once("://"))
            .is_some_and(|(_, host)| is_loopback(host_of(host)));
        if !same {
            return Err(Problem::new(
                StatusCode::FORBIDDEN,
                "requests from another origin are not served without a token",
            ));
        }
    }
    Ok(())
}

fn host_of(authority: &str) -> &str {
    if authority.starts_with('[') {
        return authority.split_once(']').map_or(authority, |(host, _)| host);
    }
    authority.rsplit_once(':').map_or(authority, |(host, _)| host)
}

fn is_loopback(host: &str) -> bool {
    let host = host.trim_start_matches('[').trim_end_matches(']');
    host.eq_ignore_ascii_case("localhost")
        || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(header::HeaderName, &str)]) -> HeaderMap {
        pairs.iter().map(|(name, value)| (name.clone(), value.parse().unwrap())).collect()
    }

    #[test]
    fn without_a_token_only_this_machine_is_served() {
        for host in ["localhost", "localhost:8077", "127.0.0.1:8077", "[::1]:8077", "LocalHost:1"] {
            assert!(local(&headers(&[(header::HOST, host)]), None).is_ok(), "{host}");
        }
        for host in ["", "example.com", "localhost.example.com:8077", "10.0.0.1:8077"] {
            assert!(local(&headers(&[(header::HOST, host)]), None).is_err(), "{host}");
        }
        let from = |origin| {
            local(&headers(&[(header::HOST, "localhost:8077"), (header::ORIGIN, origin)]), None)
        };
        assert!(from("http://localhost:8077").is_ok());
        assert!(from("https://example.com").is_err());
        assert!(from("null").is_err());
    }

    #[test]
    fn the_token_must_match() {
        let with = |value| bearer(&headers(&[(header::AUTHORIZATION, value)]), "secret");
        assert!(with("Bearer secret").is_ok());
        assert!(with("bearer secret").is_ok());
        assert!(with("Bearer secre").is_err());
        assert!(with("Basic secret").is_err());
        assert!(bearer(&HeaderMap::new(), "secret").is_err());
        assert!(bearer(&headers(&[(header::AUTHORIZATION, "Bearer ")]), "").is_err());
    }
}
