//! The HTTP server: ingest, the log, how everything is (DESIGN section 10).
//!
//! Errors are `application/problem+json` (RFC 9457). What a client can make the server hold is
//! bounded: connections, request bodies, time.

mod access;
mod dead_letters;
mod events;
mod front;
mod handlers;
mod ingest;
mod listener;
mod openapi;
mod problem;
mod quarantine;
mod redrives;
mod search;
mod status;
mod stream;
mod tls;
mod view;

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use axum::{
    Router, middleware,
    routing::{get, post},
};
use tokio::{net::TcpListener, sync::Semaphore};
use tokio_util::sync::CancellationToken;
use tower_http::catch_panic::CatchPanicLayer;

use self::{access::Token, listener::Limited, tls::Tls};
use crate::{
    bus::{EventBus, Searches},
    secret::Secret,
    tls::ServerTlsOptions,
    transport::http::HttpIngress,
};

pub use front::Front;
pub use problem::Problem;
pub use tls::ServerTls;

/// Bounds and access of the server.
#[derive(Debug, Clone)]
pub struct ApiOptions {
    /// Address and port.
    pub listen: SocketAddr,
    /// What clients present as `Authorization: Bearer`; `None`: nothing, and then only requests
    /// addressed to this machine by name are served.
    pub token: Option<Secret>,
    /// Certificate and key for HTTPS; `None`: plain HTTP. Renewed files count from the next
    /// connection on.
    pub tls: Option<ServerTlsOptions>,
    /// Largest request body, in bytes.
    pub max_body: usize,
    /// Bodies read and not answered yet, in bytes over all requests; more wait.
    pub body_bytes: usize,
    /// How long a body may wait for its turn, may take to arrive, and a commit to happen: each.
    pub timeout: Duration,
    /// Connections at most; more wait to be accepted.
    pub max_connections: usize,
}

impl ApiOptions {
    fn body_permits(&self) -> usize {
        self.body_bytes.clamp(1, Semaphore::MAX_PERMITS)
    }

    /// How long a connection may be silent, or a request take until its answer begins: longer
    /// than the three timeouts of a request together, and than an event stream is silent.
    fn patience(&self) -> Duration {
        self.timeout.saturating_mul(4).max(Duration::from_secs(60))
    }
}

/// What the server shows.
pub struct Api {
    /// The bus.
    pub bus: EventBus,
    /// Where posted events go; `None`: nowhere.
    pub ingress: Option<HttpIngress>,
    /// The search indexes by handler name.
    pub searches: Searches,
    /// Bounds and access.
    pub options: ApiOptions,
}

struct State {
    api: Api,
    token: Token,
    /// Event streams at once.
    streams: Arc<Semaphore>,
    /// What bodies being read, or read and not answered, may hold.
    bodies: Arc<Semaphore>,
    /// Ends event streams when the server drains.
    stop: CancellationToken,
}

type Shared = axum::extract::State<Arc<State>>;

/// Event streams at once, at most.
const MAX_STREAMS: usize = 64;

/// Why the server could not be started.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {listen}; is another pulsebus running? Change http.listen")]
pub struct ListenError {
    listen: SocketAddr,
    source: io::Error,
}

/// Takes the port.
///
/// # Errors
/// Where it is taken, or the address is not this machine's.
pub async fn listen(listen: SocketAddr) -> Result<TcpListener, ListenError> {
    TcpListener::bind(listen).await.map_err(|source| ListenError { listen, source })
}

impl Api {
    /// Serves until drained. Cancelling `stop` drains: nothing more is accepted, event streams
    /// end, and what was begun is answered.
    ///
    /// # Errors
    /// Where the listener fails for good, or certificate and key cannot be used.
    pub async fn serve(self, listener: TcpListener, stop: CancellationToken) -> io::Result<()> {
        let options = self.options.clone();
        let tls = Tls::default();
        tls.set(options.tls.clone().map(ServerTls::open).transpose().map_err(io::Error::other)?);
        let token = Token::new(options.token.clone());
        serve(listener, self.router(token, stop.clone()), &options, tls, stop).await
    }

    fn router(self, token: Token, stop: CancellationToken) -> Router {
        let streams = Arc::new(Semaphore::new(MAX_STREAMS));
        let bodies = Arc::new(Semaphore::new(self.options.body_permits()));
        let state = Arc::new(State { api: self, token, streams, bodies, stop });
        let guarded = Router::new()
            .route("/v1/events", post(ingest::append).get(events::list))
            .route("/v1/events/stream", get(stream::stream))
            .route("/v1/events/{position}", get(events::one))
            .route("/v1/sources", get(status::sources))
            .route("/v1/handlers", get(handlers::list))
            .route("/v1/handlers/{name}", get(handlers::one))
            .route("/v1/handlers/{name}/pause", post(handlers::pause))
            .route("/v1/handlers/{name}/resume", post(handlers::resume))
            .route("/v1/handlers/{name}/rewind", post(handlers::rewind))
            .route("/v1/handlers/{name}/forget", post(handlers::forget))
            .route("/v1/handlers/{name}/rebuild", post(handlers::rebuild))
            .route("/v1/handlers/{name}/rebuild/cancel", post(handlers::cancel_rebuild))
            .route("/v1/dead-letters", get(dead_letters::list))
            .route("/v1/dead-letters/retry", post(dead_letters::retry))
            .route("/v1/dead-letters/discard", post(dead_letters::discard))
            .route("/v1/dead-letters/{handler}/{position}", get(dead_letters::one))
            .route("/v1/redrives", get(redrives::list))
            .route("/v1/redrives/{number}", get(redrives::one))
            .route("/v1/redrives/{number}/cancel", post(redrives::cancel))
            .route("/v1/audit", get(redrives::audit))
            .route("/v1/quarantine", get(quarantine::list))
            .route("/v1/quarantine/retry", post(quarantine::retry))
            .route("/v1/quarantine/discard", post(quarantine::discard))
            .route("/v1/quarantine/{number}", get(quarantine::one))
            .route("/v1/search/{handler}", get(search::search))
            .route("/metrics", get(status::metrics))
            .route("/openapi.json", get(openapi::document))
            .layer(middleware::from_fn_with_state(Arc::clone(&state), access::check));
        Router::new()
            .merge(guarded)
            .route("/healthz", get(status::healthz))
            .route("/readyz", get(status::readyz))
            .fallback(problem::not_found)
            .method_not_allowed_fallback(problem::method_not_allowed)
            .layer(CatchPanicLayer::custom(problem::panicked))
            .layer(middleware::from_fn_with_state(Arc::clone(&state), status::count))
            .with_state(state)
    }
}

async fn serve(
    listener: TcpListener,
    router: Router,
    options: &ApiOptions,
    tls: Tls,
    stop: CancellationToken,
) -> io::Result<()> {
    let listener = Limited::new(listener, options.max_connections, options.patience(), tls);
    axum::serve(listener, router)
        .with_graceful_shutdown(async move { stop.cancelled().await })
        .await
}
