//! A registered handler, running or not yet.

use std::{sync::Arc, time::Duration};

use tokio::{sync::mpsc, task::JoinHandle};
use tokio_util::sync::CancellationToken;

use super::Inner;
use crate::{
    dispatch::{self, Command, HandlerOptions, HandlerStatus, Setup},
    handler::EventHandler,
};

pub(super) struct Registered {
    name: Arc<str>,
    handler: Arc<dyn EventHandler>,
    options: HandlerOptions,
    status: Arc<HandlerStatus>,
    running: Option<Running>,
}

/// The task of a handler.
pub(super) struct Running {
    commands: mpsc::UnboundedSender<Command>,
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
    ) -> Self {
        let status = HandlerStatus::new(Arc::clone(&name), handler.kind());
        Self::with_status(name, handler, options, status)
    }

    pub(super) const fn with_status(
        name: Arc<str>,
        handler: Arc<dyn EventHandler>,
        options: HandlerOptions,
        status: Arc<HandlerStatus>,
    ) -> Self {
        Self { name, handler, options, status, running: None }
    }

    pub(super) const fn options(&self) -> &HandlerOptions {
        &self.options
    }

    pub(super) const fn handler(&self) -> &Arc<dyn EventHandler> {
        &self.handler
    }

    pub(super) const fn status(&self) -> &Arc<HandlerStatus> {
        &self.status
    }

    pub(super) fn launch(&mut self, workers: usize, bus: &Inner) {
        if self.running.is_some() {
            return;
        }
        let (commands, inbox) = mpsc::unbounded_channel();
        let (stop, abort) = (bus.stop_handlers.child_token(), bus.abort.clone());
        let setup = Setup {
            name: Arc::clone(&self.name),
            handler: Arc::clone(&self.handler),
            options: self.options.clone(),
            workers,
            log: Arc::clone(&bus.log),
            status: Arc::clone(&self.status),
            metrics: bus.metrics.clone(),
            owner: Arc::clone(&bus.instance),
            lease: bus.lease,
            stop: stop.clone(),
        };
        let task = bus.handler_tasks.spawn(async move {
            abort.run_until_cancelled(dispatch::run(setup, inbox)).await;
        });
        let patience = self.options.timeout + Duration::from_secs(5);
        self.running = Some(Running { commands, stop, task, patience });
    }

    /// Tells its runner something; `false` where it has none.
    pub(super) fn tell(&self, command: Command) -> bool {
        self.running.as_ref().is_some_and(|running| running.commands.send(command).is_ok())
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
