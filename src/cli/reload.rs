//! SIGHUP: the configuration is read again, and taken over as far as it can be while running.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use pulsebus::{
    api::{Front, ServerTls},
    bus::{Prepared, Reloader},
    config::{Inputs, Loaded, load},
    telemetry::{self, LogFilter},
};
use sd_notify::NotifyState;
use tokio::signal::unix::Signal;

/// What a reload needs, for as long as the daemon runs.
pub(super) struct Reloads {
    /// What the configuration is read from: file and flags as at the start, and the environment
    /// of then.
    pub(super) inputs: Inputs,
    pub(super) filter: LogFilter,
    /// `None` without HTTP.
    pub(super) front: Option<Front>,
    pub(super) reloader: Reloader,
    pub(super) shared: Shared,
}

/// What the daemon's main loop and the reloads tell each other. Clones are the same.
#[derive(Clone, Default)]
pub(super) struct Shared {
    ready: Arc<AtomicBool>,
    shutdown_timeout: Arc<Mutex<Option<Duration>>>,
}

impl Shared {
    /// systemd has been told that the daemon is up, or not yet.
    pub(super) fn set_ready(&self, ready: bool) {
        self.ready.store(ready, Ordering::Relaxed);
    }

    /// How long a drain may take, where a reload has said.
    pub(super) fn shutdown_timeout(&self) -> Option<Duration> {
        *self.shutdown_timeout.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Something to take over, with the keys that have to wait.
struct Next {
    prepared: Prepared,
    tls: Option<ServerTls>,
    at_restart: Vec<String>,
    loaded: Box<Loaded>,
}

impl Reloads {
    /// Reloads at each signal, one after the other; signals that come during a reload are one
    /// more. Those that came before this began count too.
    pub(super) async fn run(mut self, mut signal: Signal) {
        while signal.recv().await.is_some() {
            tracing::info!(signal = "SIGHUP", "reading the configuration again");
            // Only somebody who was told that we are ready may be told that we are so again.
            let told = self.shared.ready.load(Ordering::Relaxed);
            if told {
                reloading();
            }
            self.reload().await;
            if told {
                say(&[NotifyState::Ready]);
            }
        }
    }

    async fn reload(&mut self) {
        match self.prepare().await {
            Ok(next) => self.take_over(next).await,
            Err(errors) => {
                for error in &errors {
                    tracing::error!("reload: {error}");
                }
                tracing::error!(
                    errors = errors.len(),
                    "the new configuration was refused; nothing has changed"
                );
                self.reloader.refused(&errors);
            }
        }
    }

    /// Everything that can fail. Nothing that runs is touched.
    async fn prepare(&self) -> Result<Next, Vec<String>> {
        let inputs = self.inputs.clone();
        // Files, which may lie on a disk that does not answer.
        let loaded = tokio::task::spawn_blocking(move || load(&inputs)).await;
        let mut loaded = match loaded {
            Ok(Ok(loaded)) => loaded,
            Ok(Err(errors)) => return Err(errors.iter().map(ToString::to_string).collect()),
            Err(error) => return Err(vec![format!("reading it was cut short: {error}")]),
        };
        let reload = self.reloader.settings().reload(loaded.settings.clone());
        loaded.settings = reload.settings;
        let settings = &loaded.settings;
        let mut errors = Vec::new();
        if let Err(error) = telemetry::filter(&settings.log.filter) {
            errors.push(error.to_string());
        }
        let tls = match settings.http.tls.clone().map(ServerTls::open).transpose() {
            Ok(tls) => tls,
            Err(error) => {
                errors.push(format!("http.tls: {error}"));
                None
            }
        };
        match self.reloader.prepare(settings.clone()).await {
            Ok(prepared) if errors.is_empty() => {
                let (at_restart, loaded) = (reload.at_restart, Box::new(loaded));
                Ok(Next { prepared, tls, at_restart, loaded })
            }
            Ok(_) => Err(errors),
            Err(more) => {
                errors.extend(more.iter().map(ToString::to_string));
                Err(errors)
            }
        }
    }

    async fn take_over(&mut self, next: Next) {
        let Next { prepared, tls, at_restart, loaded } = next;
        let Loaded { settings, warnings, .. } = *loaded;
        // First, so that the rest is written as it is asked for now. It was found good above.
        if let Err(error) = self.filter.set(&settings.log.filter) {
            tracing::error!("reload: {error}");
        }
        for warning in &warnings {
            tracing::warn!("{warning}");
        }
        if let Some(front) = &self.front {
            front.admit(settings.http.token.clone(), tls);
        }
        *self.shared.shutdown_timeout.lock().unwrap_or_else(PoisonError::into_inner) =
            Some(settings.shutdown_timeout);
        self.reloader.apply(prepared).await;
        self.reloader.taken(&at_restart);
        if !at_restart.is_empty() {
            tracing::warn!("takes effect at the next restart: {}", at_restart.join(", "));
        }
        tracing::info!("the new configuration is in use");
    }
}

/// Tells systemd that a reload has begun (sd_notify(3), `RELOADING=1`).
fn reloading() {
    match NotifyState::monotonic_usec_now() {
        Ok(now) => say(&[NotifyState::Reloading, now]),
        Err(error) => tracing::debug!(%error, "systemd cannot be told of the reload"),
    }
}

fn say(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::debug!(%error, "systemd cannot be told");
    }
}
