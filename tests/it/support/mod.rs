//! Private servers and broken networks.

pub(crate) mod daemon;
pub(crate) mod faulty;
pub(crate) mod nats;
pub(crate) mod picky;
pub(crate) mod pki;
pub(crate) mod postgres;
pub(crate) mod process;
pub(crate) mod proxy;
pub(crate) mod rabbit;
pub(crate) mod random;
pub(crate) mod receiver;

pub(crate) use self::process::free_port;

use std::time::Duration;

/// How long a test waits for something that must happen; far beyond what it takes.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// Waits until the condition yields a value; panics when it does not within [`PATIENCE`].
pub(crate) async fn wait_until<T>(what: &str, mut condition: impl AsyncFnMut() -> Option<T>) -> T {
    let deadline = tokio::time::Instant::now() + PATIENCE;
    loop {
        if let Some(value) = condition().await {
            return value;
        }
        assert!(tokio::time::Instant::now() < deadline, "not within {PATIENCE:?}: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
