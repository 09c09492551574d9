//! `run`: the daemon.

use std::{io, net::SocketAddr, process::ExitCode, time::Duration};

use anyhow::Context as _;
use pulsebus::{
    api::{self, ApiOptions, Front},
    bus::{Component, ComposeError, Composed, DrainDeadline, EventBus, Health, Reloader, Starting},
    config::{Inputs, Loaded, Settings},
    telemetry::{self, LogFilter, Stuck, Watch},
};
use sd_notify::NotifyState;
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    task::{JoinError, JoinSet},
    time::{Instant, timeout, timeout_at},
};
use tokio_util::sync::CancellationToken;

use super::{
    BAD_CONFIG, DRAIN_DEADLINE, FAILED, output,
    reload::{Reloads, Shared},
};

/// Runs the daemon until it is told to stop. `inputs` are what was read, and are read again at
/// each reload.
pub(super) fn run(loaded: Loaded, inputs: Inputs) -> ExitCode {
    let Loaded { settings, file, warnings, .. } = loaded;
    let filter = match telemetry::init_logging(&settings.log) {
        Ok(filter) => filter,
        Err(error) => {
            output::complain(&format!("pulsebus: {error}"));
            return ExitCode::from(BAD_CONFIG);
        }
    };
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        config = file.as_deref().map(|file| file.display().to_string()),
        data_dir = %settings.data_dir.display(),
        sources = settings.sources.len(),
        handlers = settings.handlers.len(),
        "starting"
    );
    for warning in &warnings {
        tracing::warn!("{warning}");
    }
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            output::complain(&format!("pulsebus: failed to start: {error}"));
            return ExitCode::from(FAILED);
        }
    };
    let first_steps =
        file.is_none() && settings.http.token.is_none() && settings.http.tls.is_none();
    let code = match runtime.block_on(daemon(&settings, first_steps, inputs, filter)) {
        Ok(code) => code,
        Err(error) => {
            let misconfigured = error.downcast_ref().is_some_and(ComposeError::is_misconfigured);
            tracing::error!("{error:#}");
            output::complain(&format!("pulsebus: {error:#}"));
            ExitCode::from(if misconfigured { BAD_CONFIG } else { FAILED })
        }
    };
    // What a drain cut off may sit in a blocking thread; the process does not wait for it.
    runtime.shutdown_background();
    code
}

/// SIGTERM and SIGINT.
struct Signals {
    term: Signal,
    interrupt: Signal,
}

impl Signals {
    fn new() -> io::Result<Self> {
        Ok(Self {
            term: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.term.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}

async fn daemon(
    settings: &Settings,
    first_steps: bool,
    inputs: Inputs,
    filter: LogFilter,
) -> anyhow::Result<ExitCode> {
    // Before anything takes long: one that comes meanwhile is kept, and would end us otherwise.
    let hangup = signal(SignalKind::hangup()).context("failed to listen for signals")?;
    let mut signals = Signals::new().context("failed to listen for signals")?;
    let mut notifier = Notifier::new();
    let stop = CancellationToken::new();
    let starting = Starting::default();
    let mut tasks = JoinSet::new();
    #[cfg(feature = "otlp")]
    let exporter = settings.otlp.as_ref().map(telemetry::export_spans).transpose()?;
    let mut front = None;
    if settings.http.enabled {
        // Before anything is consumed: a second daemon ends here.
        let listener = api::listen(settings.http.listen).await?;
        let address = listener.local_addr().context("failed to read the address")?;
        tracing::info!(%address, tls = settings.http.tls.is_some(), "HTTP is up");
        let server = Front::new(api_options(settings), starting.clone(), stop.clone());
        front = Some((server.clone(), address));
        tasks.spawn(server.serve(listener));
    }
    let composing = starting.compose(settings);
    tokio::pin!(composing);
    let composed = loop {
        tokio::select! {
            composed = &mut composing => break composed?,
            name = signals.next() => {
                tracing::info!(signal = name, "stopped before it was up");
                return Ok(ExitCode::SUCCESS);
            }
            Some(ended) = tasks.join_next() => return Ok(server_ended(&ended)),
            () = notifier.tick(|| vec![starting.component()]) => {}
        }
    };
    let bus = composed.bus.clone();
    let shared = Shared::default();
    let mut reloads = JoinSet::new();
    let reload = Reloads {
        inputs,
        filter,
        front: front.as_ref().map(|(server, _)| server.clone()),
        reloader: Reloader::new(&composed, settings.clone()),
        shared: shared.clone(),
    };
    notifier.watch(&bus);
    open(front, composed, first_steps)?;
    tracing::info!("the bus is up");
    reloads.spawn(reload.run(hangup));
    let code = loop {
        tokio::select! {
            name = signals.next() => {
                tracing::info!(signal = name, "draining; a second signal ends at once");
                break None;
            }
            reason = bus.failed() => {
                tracing::error!(%reason, "ending: the event store can no longer be trusted");
                break Some(ExitCode::from(FAILED));
            }
            Some(ended) = tasks.join_next() => break Some(server_ended(&ended)),
            Some(ended) = reloads.join_next() => {
                tracing::error!("reloads have ended, SIGHUP does nothing any more: {ended:?}");
            }
            () = notifier.tick(|| bus.components()) => shared.set_ready(notifier.ready),
        }
    };
    // A reload that is under way is left where it is; a signal for another is not heard.
    reloads.abort_all();
    let shutdown_timeout = shared.shutdown_timeout().unwrap_or(settings.shutdown_timeout);
    notifier.say(&[NotifyState::Stopping, NotifyState::Status("draining")]);
    stop.cancel();
    let drained = tokio::select! {
        drained = drain(&bus, &mut tasks, shutdown_timeout) => drained,
        name = signals.next() => {
            tracing::warn!(signal = name, "ended at once; what was cut off comes again");
            return Ok(ExitCode::from(DRAIN_DEADLINE));
        }
    };
    #[cfg(feature = "otlp")]
    if let Some(exporter) = exporter {
        exporter.close(TO_EXPORT).await;
    }
    Ok(match (drained, code) {
        (_, Some(code)) => code,
        (Ok(()), None) => {
            tracing::info!("drained");
            ExitCode::SUCCESS
        }
        (Err(deadline), None) => {
            tracing::warn!("{deadline}");
            ExitCode::from(DRAIN_DEADLINE)
        }
    })
}

/// Requests are for the bus from now on.
fn open(
    front: Option<(Front, SocketAddr)>,
    composed: Composed,
    first_steps: bool,
) -> anyhow::Result<()> {
    let Some((server, address)) = front else { return Ok(()) };
    server.open(composed);
    if first_steps {
        output::print(&what_to_try(&address.to_string()))?;
    }
    Ok(())
}

fn server_ended(ended: &Result<io::Result<()>, JoinError>) -> ExitCode {
    tracing::error!("the HTTP server ended: {ended:?}");
    ExitCode::from(FAILED)
}

/// What is kept of the time to stop for closing the store, and for writing the last answers.
const TO_CLOSE: Duration = Duration::from_secs(3);

/// How long the last spans may take on their way, after the drain.
#[cfg(feature = "otlp")]
const TO_EXPORT: Duration = Duration::from_secs(1);

/// Drains within `limit`, all in all.
async fn drain(
    bus: &EventBus,
    tasks: &mut JoinSet<io::Result<()>>,
    limit: Duration,
) -> Result<(), DrainDeadline> {
    let deadline = Instant::now() + limit;
    let to_close = TO_CLOSE.min(limit / 4);
    let drained = timeout_at(deadline, bus.drain(limit - to_close)).await;
    // Answers that were waiting for a commit have theirs now.
    let _ = timeout_at(deadline, timeout(Duration::from_secs(1), tasks.join_next())).await;
    match drained {
        Ok(Ok(())) => Ok(()),
        Ok(Err(_)) | Err(_) => Err(DrainDeadline(limit)),
    }
}

fn api_options(settings: &Settings) -> ApiOptions {
    let http = &settings.http;
    ApiOptions {
        listen: http.listen,
        token: http.token.clone(),
        tls: http.tls.clone(),
        max_body: http.max_body,
        body_bytes: settings.limits.ingest_bytes,
        timeout: http.timeout,
        max_connections: http.max_connections,
    }
}

/// What a newcomer can do with a daemon that nobody configured.
fn what_to_try(address: &str) -> String {
    format!(
        r#"
pulsebus is up, with its built-in configuration. Try, in another terminal:

  curl -sS http://{address}/v1/events -H 'content-type: application/json' -d '{{"id":"lesson-1","type":"LessonPublished","data":{{"lesson_id":"7d2f","title":"Photosynthesis for beginners","author_id":"a1","published_at":1767225600000}}}}'
  curl -sS 'http://{address}/v1/search/search?q=photosynthesis'

Then: `pulsebus events tail`, `pulsebus handlers list`, `pulsebus config show`. Ctrl-C drains.
"#
    )
}

/// How long a loop may stand still where systemd has no watchdog: then it is only said.
const STUCK: Duration = Duration::from_secs(30);

/// What systemd is told: readiness once sources and cursors are up, a status line, and that
/// everything gets on: the main loop and the runtime, by telling it at all, and each loop whose
/// pulse is watched (see [`Pulse`](telemetry::Pulse)).
struct Notifier {
    ready: bool,
    status: String,
    /// How long a loop may stand still: as long as systemd waits for a word.
    limit: Duration,
    watch: Option<Watch>,
    /// The names of those that stand still.
    stuck: Vec<String>,
    interval: tokio::time::Interval,
}

impl Notifier {
    fn new() -> Self {
        let limit = sd_notify::watchdog_enabled().unwrap_or(STUCK);
        let period = (limit / 3).min(telemetry::INTERVAL);
        let mut interval = tokio::time::interval(period.max(Duration::from_millis(10)));
        interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        Self {
            ready: false,
            status: String::new(),
            limit,
            watch: None,
            stuck: Vec::new(),
            interval,
        }
    }

    /// Watches the loops of this bus from now on.
    fn watch(&mut self, bus: &EventBus) {
        self.watch = Some(bus.log().pulses().watch(self.limit));
    }

    /// Says how these are, once an interval.
    ///
    /// *Cancel safe*: what has not been said is said at the next tick.
    async fn tick(&mut self, components: impl FnOnce() -> Vec<Component>) {
        self.interval.tick().await;
        let components = components();
        let stuck = self.watch.as_mut().map(Watch::stuck).unwrap_or_default();
        // As `/readyz` has it: what is degraded works.
        let up = components.iter().all(|component| component.health != Health::NotReady);
        let waiting: Vec<String> = components
            .into_iter()
            .filter(|component| component.health != Health::Ready)
            .map(|component| match component.reason {
                Some(reason) => format!("{} {}: {reason}", component.component, component.state),
                None => format!("{} {}", component.component, component.state),
            })
            .collect();
        if up && !self.ready {
            self.ready = true;
            tracing::info!("ready");
            self.say(&[NotifyState::Ready]);
        }
        if !self.ready && stuck.is_empty() {
            // Store and brokers may be away for longer than systemd waits for a start.
            self.say(&[NotifyState::ExtendTimeoutUsec(30_000_000)]);
        }
        self.compare(&stuck);
        let status = if !self.stuck.is_empty() {
            format!("stuck: {}", self.stuck.join(", "))
        } else if waiting.is_empty() {
            "consuming".to_owned()
        } else {
            format!("waiting for {}", waiting.join("; "))
        };
        if status != self.status {
            self.say(&[NotifyState::Status(&status)]);
            self.status = status;
        }
        if self.stuck.is_empty() {
            self.say(&[NotifyState::Watchdog]);
        }
    }

    /// Says once what stands still, and once that nothing does any more.
    fn compare(&mut self, stuck: &[Stuck]) {
        let names: Vec<String> = stuck.iter().map(|stuck| stuck.name.to_string()).collect();
        if names == self.stuck {
            return;
        }
        if names.is_empty() {
            tracing::info!("everything gets on again");
        }
        for stuck in stuck.iter().filter(|stuck| !self.stuck.iter().any(|s| **s == *stuck.name)) {
            tracing::error!("{stuck}: a fault in pulsebus or below it; the watchdog is not fed");
        }
        self.stuck = names;
    }

    fn say(&self, states: &[NotifyState<'_>]) {
        if let Err(error) = sd_notify::notify(states) {
            tracing::debug!(%error, "systemd cannot be told");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn component(health: Health) -> Vec<Component> {
        let component = "source:x".to_owned();
        let since = time::OffsetDateTime::UNIX_EPOCH;
        vec![Component { component, health, state: "recovering", since, reason: None }]
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_degraded_counts_as_ready() {
        let mut notifier = Notifier::new();
        notifier.tick(|| vec![Starting::default().component()]).await;
        assert!(!notifier.ready);
        assert_eq!(notifier.status, "waiting for bus starting");
        notifier.tick(|| component(Health::Degraded)).await;
        assert!(notifier.ready);
        notifier.tick(|| component(Health::Ready)).await;
        assert_eq!(notifier.status, "consuming");
    }

    #[tokio::test(start_paused = true)]
    async fn G8_a_drain_keeps_its_deadline_whatever_has_not_ended() {
        let bus = EventBus::builder().build().await.unwrap();
        let mut tasks = JoinSet::new();
        tasks.spawn(std::future::pending());
        let (started, limit) = (Instant::now(), Duration::from_millis(500));
        drain(&bus, &mut tasks, limit).await.unwrap();
        assert!(started.elapsed() <= limit + Duration::from_millis(5), "{:?}", started.elapsed());
    }
}
