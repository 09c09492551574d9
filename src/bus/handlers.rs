//! A registered handler, running or not yet.

use std::{sync::Arc, time::Duration};

use tokio::{sync::watch, task::JoinHandle};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    dispatch::{self, HandlerOptions, HandlerState, HandlerStatus, Setup},
    handler::EventHandler,
    store::Log,
    telemetry::Metrics,
};

pub(super) struct Registered {
    name: Arc<str>,
    handler: Arc<dyn EventHandler>,
    options: HandlerOptions,
    status: Arc<HandlerStatus>,
    paused: watch::Sender<bool>,
    running: Option<Running>,
}

/// The task of a handler.
pub(super) struct Running {
    stop: CancellationToken,
    task: JoinHandle<()>,
    /// How long what it is doing may take to end.
    patience: Duration,
}

impl Registered {
    pub(super) fn new(
        name: Arc<str>,
        handler: Arc<dyn EventHandler>,
        options: HandlerOptions,
        paused: bool,
    ) -> Self {
        let status = HandlerStatus::new(Arc::clone(&name), handler.kind());
        let paused = watch::Sender::new(paused);
        Self { name, handler, options, status, paused, running: None }
    }

    pub(super) const fn status(&self) -> &Arc<HandlerStatus> {
        &self.status
    }

    pub(super) fn launch(
        &mut self,
        workers: usize,
        log: &Arc<Log>,
        metrics: &Metrics,
        tasks: &TaskTracker,
        stop: CancellationToken,
        abort: CancellationToken,
    ) {
        if self.running.is_some() {
            return;
        }
        let run = dispatch::run(Setup {
            name: Arc::clone(&self.name),
            handler: Arc::clone(&self.handler),
            options: self.options.clone(),
            workers,
            log: Arc::clone(log),
            status: Arc::clone(&self.status),
            metrics: metrics.clone(),
            paused: self.paused.subscribe(),
            stop: stop.clone(),
        });
        let task = tasks.spawn(async move {
            abort.run_until_cancelled(run).await;
        });
        let patience = self.options.timeout + Duration::from_secs(5);
        self.running = Some(Running { stop, task, patience });
    }

    /// Pauses or resumes it; kept also while it is not running, and by its successor.
    pub(super) fn set_paused(&self, paused: bool) {
        self.paused.send_replace(paused);
        if self.running.is_some() {
            // Said at once; the runner says more as soon as it has seen it.
            self.status.set_state(if paused {
                HandlerState::Paused
            } else {
                HandlerState::Running
            });
        }
    }

    pub(super) fn is_paused(&self) -> bool {
        *self.paused.borrow()
    }

    /// Its task, to be ended for a successor under the same name.
    pub(super) const fn take_running(&mut self) -> Option<Running> {
        self.running.take()
    }
}

impl Running {
    /// Ends it: what it does ends, within its timeout.
    pub(super) async fn stop(mut self) {
        self.stop.cancel();
        if tokio::time::timeout(self.patience, &mut self.task).await.is_err() {
            self.task.abort();
            // Aborted at its next await; its successor must not start before that.
            let _ = self.task.await;
        }
    }
}
