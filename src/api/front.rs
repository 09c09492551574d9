//! The server while the bus is being composed, which may take as long as a store is away: whoever
//! asks learns that the process lives, and what it waits for.

use std::{
    io,
    sync::{Arc, OnceLock},
};

use axum::{
    Router,
    extract::{Request, State as Extract},
    response::{IntoResponse, Response},
};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tower::ServiceExt as _;

use super::{
    Api, ApiOptions, Problem, ServerTls,
    access::{self, Token},
    serve, status,
    tls::Tls,
};
use crate::{
    bus::{Composed, Starting},
    secret::Secret,
};

/// A server that is up before its bus is. Cheap to clone; clones are the same server.
#[derive(Clone)]
pub struct Front {
    inner: Arc<Inner>,
}

struct Inner {
    options: ApiOptions,
    token: Token,
    tls: Tls,
    starting: Starting,
    stop: CancellationToken,
    open: OnceLock<Router>,
}

impl Front {
    /// A server that says what `starting` waits for until it is [opened](Self::open).
    /// Cancelling `stop` drains it.
    #[must_use]
    pub fn new(options: ApiOptions, starting: Starting, stop: CancellationToken) -> Self {
        let (token, tls) = (Token::new(options.token.clone()), Tls::default());
        let open = OnceLock::new();
        Self { inner: Arc::new(Inner { options, token, tls, starting, stop, open }) }
    }

    /// Serves until drained, like [`Api::serve`].
    ///
    /// # Errors
    /// Where the listener fails for good, or certificate and key cannot be used.
    pub async fn serve(self, listener: TcpListener) -> io::Result<()> {
        let inner = Arc::clone(&self.inner);
        let tls = inner.options.tls.clone().map(ServerTls::open).transpose();
        inner.tls.set(tls.map_err(io::Error::other)?);
        let router = Router::new().fallback(pass).with_state(self);
        serve(listener, router, &inner.options, inner.tls.clone(), inner.stop.clone()).await
    }

    /// From now on this is what clients present, and what connections speak: the token counts from
    /// the next request on, TLS from the next connection on.
    pub fn admit(&self, token: Option<Secret>, tls: Option<ServerTls>) {
        self.inner.token.set(token);
        self.inner.tls.set(tls);
    }

    /// From now on requests are for this bus. The first one counts.
    pub fn open(&self, composed: Composed) {
        let Inner { options, token, stop, open, .. } = &*self.inner;
        let Composed { bus, ingress, searches, .. } = composed;
        let api = Api { bus, ingress, searches, options: options.clone() };
        let _ = open.set(api.router(token.clone(), stop.clone()));
    }
}

async fn pass(Extract(front): Extract<Front>, request: Request) -> Response {
    let Inner { token, starting, open, .. } = &*front.inner;
    if let Some(router) = open.get() {
        return match router.clone().oneshot(request).await {
            Ok(answer) => answer,
            Err(never) => match never {},
        };
    }
    let allowed = access::allowed(token, request.headers(), request.uri());
    let component = starting.component();
    match (request.uri().path(), allowed) {
        ("/healthz", _) => status::healthz().await.into_response(),
        ("/readyz", allowed) => status::readiness(vec![component], allowed.is_ok()).into_response(),
        (_, Err(refused)) => refused.into_response(),
        (_, Ok(())) => Problem::unavailable(match component.reason {
            Some(reason) => format!("pulsebus is starting, {}: {reason}", component.component),
            None => "pulsebus is starting; ask again later".to_owned(),
        })
        .into_response(),
    }
}

#[cfg(test)]
mod tests {
    use axum::{
        body::{Body, to_bytes},
        http::{StatusCode, header},
    };
    use serde_json::Value;

    use super::*;
    use crate::{bus::EventBus, secret::Secret};

    fn options(token: Option<&str>) -> ApiOptions {
        ApiOptions {
            listen: ([127, 0, 0, 1], 0).into(),
            token: token.map(|token| Secret::Inline(token.to_owned())),
            tls: None,
            max_body: 1 << 20,
            body_bytes: 1 << 20,
            timeout: std::time::Duration::from_secs(30),
            max_connections: 16,
        }
    }

    async fn ask(front: &Front, path: &str, host: &str, token: &str) -> (StatusCode, String) {
        let request = Request::builder()
            .uri(path)
            .header(header::HOST, host)
            .header(header::AUTHORIZATION, format!("Bearer {token}"))
            .body(Body::empty())
            .unwrap();
        let answer = pass(Extract(front.clone()), request).await;
        let status = answer.status();
        let body = to_bytes(answer.into_body(), 1 << 20).await.unwrap();
        (status, String::from_utf8(body.to_vec()).unwrap())
    }

    async fn composed() -> Composed {
        let bus = EventBus::builder().build().await.unwrap();
        Composed {
            bus,
            ingress: None,
            searches: Default::default(),
            transports: Default::default(),
        }
    }

    #[tokio::test]
    async fn G8_what_a_start_waits_for_is_said_until_the_bus_is_up() {
        let starting = Starting::default();
        let front = Front::new(options(None), starting.clone(), CancellationToken::new());
        starting.waits_for("store", "no route to the database".to_owned());
        let host = "localhost:8077";
        assert_eq!(ask(&front, "/healthz", host, "").await.0, StatusCode::OK);
        let (status, body) = ask(&front, "/readyz", host, "").await;
        assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
        let readiness: Value = serde_json::from_str(&body).unwrap();
        assert_eq!(readiness["ready"], false);
        assert_eq!(readiness["components"][0]["component"], "store");
        assert_eq!(readiness["components"][0]["reason"], "no route to the database");
        let (status, body) = ask(&front, "/v1/events", host, "").await;
        assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
        assert!(body.contains("no route to the database"), "{body}");
        assert_eq!(ask(&front, "/v1/events", "example.com", "").await.0, StatusCode::FORBIDDEN);

        front.open(composed().await);
        assert_eq!(ask(&front, "/healthz", host, "").await.0, StatusCode::OK);
        assert_eq!(ask(&front, "/readyz", host, "").await.0, StatusCode::OK);
        assert_eq!(ask(&front, "/v1/events", host, "").await.0, StatusCode::OK);
    }

    #[tokio::test]
    async fn reasons_are_for_those_who_may_ask() {
        let starting = Starting::default();
        starting.waits_for("store", "10.0.0.5 is away".to_owned());
        for (token, host, given, told) in [
            (None, "localhost", "", true),
            (None, "example.com", "", false),
            (Some("right"), "example.com", "right", true),
            (Some("right"), "localhost", "wrong", false),
        ] {
            let front = Front::new(options(token), starting.clone(), CancellationToken::new());
            let (status, body) = ask(&front, "/readyz", host, given).await;
            assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
            assert_eq!(body.contains("10.0.0.5"), told, "{host}: {body}");
            assert!(told || body == r#"{"ready":false}"#, "{body}");
            front.open(composed().await);
            let (status, body) = ask(&front, "/readyz", host, given).await;
            assert_eq!(status, StatusCode::OK);
            assert_eq!(body.contains("components"), told, "{host}: {body}");
        }
    }
}
