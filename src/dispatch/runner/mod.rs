//! The task that owns a handler's cursor, window, lanes and rows.

mod beat;
mod outcomes;
mod progress;
mod reading;
mod redrive;
mod tell;

use std::{
    panic::AssertUnwindSafe,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use futures_util::FutureExt as _;
use rustc_hash::FxHashMap;
use time::OffsetDateTime;
use tokio::{
    sync::{Notify, mpsc, oneshot, watch},
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;

use self::{beat::Call, progress::Saving, redrive::Redriving};
use super::{
    BlockedKey, HandlerOptions, HandlerState, HandlerStatus, OnDead, Ordering,
    burial::Burial,
    counters::Counters,
    filter::CachedFilter,
    journal::Journal,
    lanes::{Entry, Item, LaneId, Lanes, Turn, lane_of},
    outage::{Outage, Trouble},
    resume::Resumed,
    window::Window,
    worker::{Report, Worker},
};
use crate::{
    event::{Position, StoredEvent},
    handler::{Batching, EventHandler, HandlerError},
    retry::RetryPolicy,
    store::{
        Log, StoreError,
        progress::{AuditEntry, Epoch, Standing, Unfinished},
    },
    telemetry::{self, ComponentLabels, LeaseMetrics, Metrics, Pulse},
};

/// Rows read at once when a handler starts.
const PAGE: usize = 10_000;

/// What a runner needs.
#[derive(Clone)]
pub(crate) struct Setup {
    pub(crate) name: Arc<str>,
    pub(crate) handler: Arc<dyn EventHandler>,
    pub(crate) options: HandlerOptions,
    pub(crate) workers: usize,
    pub(crate) log: Arc<Log>,
    pub(crate) status: Arc<HandlerStatus>,
    pub(crate) metrics: Metrics,
    /// Who claims handlers: this process.
    pub(crate) owner: Arc<str>,
    /// How long a claim holds without being renewed, where several processes share a store.
    pub(crate) lease: Duration,
    pub(crate) stop: CancellationToken,
}

/// What a runner can be told.
#[derive(Debug)]
pub(crate) enum Command {
    /// A person has paused it, or let it go on.
    Pause(bool),
    /// There may be something to redrive.
    Redrive,
    /// Which keys do not flow, the earliest first, up to so many?
    Blocked { most: usize, answer: oneshot::Sender<Vec<BlockedKey>> },
    /// The cursor is to be moved.
    Rewind { to: Position, audit: AuditEntry, done: oneshot::Sender<Result<Position, String>> },
}

/// How a runner ended.
enum End {
    /// It was stopped.
    Stopped,
    /// It begins anew with what the store says.
    Anew,
    /// Somebody else has the handler, in a store that only one process may use at a time.
    Displaced,
}

/// Runs a handler until `stop` is cancelled; then lets what runs end, checkpoints, and returns.
/// Dropped instead, it leaves its progress as it was last saved.
///
/// Calls of the handler are isolated in its workers; a panic anywhere else of its code (`lane`,
/// `position`, `batching`) starts it again from its saved progress.
pub(crate) async fn run(setup: Setup, mut commands: mpsc::UnboundedReceiver<Command>) {
    let mut delays = RetryPolicy::reconnect().start();
    // A rebuild (`NAME~rebuild`, bus/rebuild.rs) handles everything again.
    let replayed = if setup.name.ends_with("~rebuild") { u64::MAX } else { 0 };
    let replayed = Arc::new(AtomicU64::new(replayed));
    // Out here, so that a panic that is survived does not count as the end of the loop.
    let pulse = Arc::new(setup.log.pulses().start(format!("handler:{}", setup.name)));
    loop {
        let (stop, start) = (setup.stop.clone(), setup.clone());
        let replayed = Arc::clone(&replayed);
        let attempt = async {
            let mut starting = std::pin::pin!(Runner::start(start, replayed, Arc::clone(&pulse)));
            let mut paused = None;
            let mut runner = loop {
                tokio::select! {
                    runner = &mut starting => break runner,
                    () = stop.cancelled() => return End::Stopped,
                    Some(command) = commands.recv() => match command {
                        Command::Pause(told) => paused = Some((Instant::now(), told)),
                        Command::Rewind { done, .. } => {
                            let reason = "it has not started, or another process runs it";
                            let _ = done.send(Err(reason.to_owned()));
                        }
                        // Every runner looks when it starts.
                        // It has none in hand yet: whoever asks hears nothing.
                        Command::Redrive | Command::Blocked { .. } => {}
                    },
                }
            };
            // Unless the claim was made later, and knows more.
            if let Some((at, told)) = paused
                && at > runner.claimed_at
            {
                runner.paused = told;
                runner.paused_at = Some(at);
            }
            runner.work(&mut commands).await
        };
        match AssertUnwindSafe(attempt).catch_unwind().await {
            Ok(End::Stopped) => break,
            Ok(End::Anew) => continue,
            Ok(End::Displaced) => {
                let reason = "another pulsebus has opened the same store and runs it now: stop \
                              one of them, then restart the other";
                setup.status.set_state(HandlerState::Failed(reason.to_owned()));
                setup.metrics.lease.lost(&component(&setup.name));
                // Whoever tells it something learns that nobody listens.
                commands.close();
                while commands.try_recv().is_ok() {}
                pulse.waiting(setup.stop.cancelled()).await;
                break;
            }
            Err(_) => {}
        }
        let reason = "the handler's code panicked outside of a call; it is started again";
        setup.status.set_state(HandlerState::Failed(reason.to_owned()));
        let pause = pulse.waiting(tokio::time::sleep(delays.next_delay()));
        if setup.stop.run_until_cancelled(pause).await.is_none() {
            break;
        }
    }
    setup.metrics.lease.lost(&component(&setup.name));
    setup.status.set_state(HandlerState::Stopped);
}

/// The handler, as `/readyz` calls it.
fn component(name: &str) -> ComponentLabels {
    ComponentLabels { component: format!("handler:{name}").into() }
}

struct Runner {
    name: Arc<str>,
    handler: Arc<dyn EventHandler>,
    batching: Batching,
    options: HandlerOptions,
    log: Arc<Log>,
    head: watch::Receiver<Position>,
    status: Arc<HandlerStatus>,
    stop: CancellationToken,

    epoch: Epoch,
    /// When the claim was asked for.
    claimed_at: Instant,
    lease: Option<Lease>,
    paused: bool,
    /// When it was last told to pause, or to go on.
    paused_at: Option<Instant>,
    filter: CachedFilter,
    window: Window,
    lanes: Lanes,
    journal: Journal,
    /// Rows above the cursor: what they say counts when reading gets there.
    ahead: FxHashMap<Position, Unfinished>,
    outage: Option<Outage>,
    read_trouble: Option<Trouble>,
    save_trouble: Option<Trouble>,
    redriving: Redriving,
    /// What is read up to here was handled before its cursor was moved back. Kept for as long as
    /// the process lives.
    replayed: Arc<AtomicU64>,
    /// Tells the task that publishes dead letters, where there is one.
    buried: Option<Arc<Notify>>,
    rewind: Option<Rewind>,
    draining: bool,
    /// Somebody else has claimed the handler.
    fenced: bool,

    feeds: Vec<mpsc::Sender<Vec<Item>>>,
    idle: Vec<usize>,
    reports: mpsc::UnboundedReceiver<Report>,
    /// Ends the workers when the runner is dropped.
    workers: JoinSet<()>,
    chunk: usize,

    reading: Option<Call<Result<Vec<Arc<StoredEvent>>, StoreError>>>,
    loading: Option<Call<Loaded>>,
    saving: Option<Saving>,
    saved: Position,
    saved_at: Option<Instant>,
    told_at: Instant,
    told_state: &'static str,
    /// The numbers have been held back since `told_at`.
    untold: bool,
    counters: Counters,
    /// What each worker has, or begins with, and since when.
    calls: Vec<Option<(Position, Instant)>>,
    last_error: Option<(HandlerError, OffsetDateTime)>,
    /// Something has ended since that was told.
    progressed: bool,
    last_progress: Option<OffsetDateTime>,
    lease_metrics: LeaseMetrics,
    pulse: Arc<Pulse>,
    /// It has been said that something does not end.
    overdue: bool,
}

/// What was asked for by position, and what came.
type Loaded = (Vec<(Position, LaneId)>, Result<Vec<Arc<StoredEvent>>, StoreError>);

/// A claim that ends unless it is renewed.
struct Lease {
    length: Duration,
    /// Nothing is begun from then on.
    until: Instant,
    /// When it is to be renewed.
    next: Instant,
    renewing: Option<Call<(Instant, Result<bool, StoreError>)>>,
}

/// A cursor that is to be moved, once nothing runs.
struct Rewind {
    to: Position,
    audit: AuditEntry,
    done: oneshot::Sender<Result<Position, String>>,
}

impl Runner {
    /// Claims the handler and finds where it goes on, for as long as that takes.
    async fn start(setup: Setup, replayed: Arc<AtomicU64>, pulse: Arc<Pulse>) -> Self {
        let Setup { name, handler, options, workers, log, status, metrics, owner, lease, stop } =
            setup;
        let mut delays = RetryPolicy::reconnect().start();
        let mut elsewhere = false;
        metrics.lease.lost(&component(&name));
        let (asked, resumed) = loop {
            let asked = Instant::now();
            let finding = Resumed::find(&name, &*handler, &options, &log, &owner, lease);
            match pulse.within(beat::finding(&log), finding).await {
                Ok(found) => break (asked, found),
                Err(state) => {
                    elsewhere |= matches!(state, HandlerState::Standby(_));
                    status.set_state(state);
                }
            }
            pulse.waiting(tokio::time::sleep(delays.next_delay().min(lease / 5))).await;
        };
        let Resumed { epoch, cursor, paused } = resumed;
        status.set_position(cursor);
        metrics.lease.taken(&component(&name), epoch.0, elsewhere);
        let lease = log.store().is_shared().then(|| Lease {
            length: lease,
            until: asked + lease,
            next: asked + lease / 3,
            renewing: None,
        });
        let batching = handler.batching();
        let (report_to, reports) = mpsc::unbounded_channel();
        let mut tasks = JoinSet::new();
        let workers = options.workers.unwrap_or(workers).max(1);
        let feeds = (0..workers)
            .map(|number| {
                let (feed, chunks) = mpsc::channel(1);
                let worker = Worker {
                    number,
                    handler: Arc::clone(&handler),
                    batching,
                    timeout: options.timeout,
                    chunks,
                    reports: report_to.clone(),
                };
                tasks.spawn(worker.run());
                feed
            })
            .collect();
        let buried = options.dead_letter.as_ref().map(|destination| {
            let buried = Arc::new(Notify::new());
            let burial = Burial {
                name: Arc::clone(&name),
                log: Arc::clone(&log),
                destination: Arc::clone(destination),
                attempts: options.retry.attempts(),
                buried: Arc::clone(&buried),
            };
            tasks.spawn(burial.run());
            buried
        });
        let counters = Counters::new(&metrics, &name);
        let mut runner = Self {
            epoch,
            claimed_at: asked,
            lease,
            paused,
            paused_at: None,
            filter: CachedFilter::new(options.events.clone()),
            window: Window::new(cursor),
            head: log.watch_head(),
            lanes: Lanes::new(options.parked_per_key),
            journal: Journal::default(),
            ahead: FxHashMap::default(),
            outage: None,
            read_trouble: None,
            save_trouble: None,
            redriving: Redriving::begun(),
            replayed,
            buried,
            rewind: None,
            draining: false,
            fenced: false,
            feeds,
            idle: (0..workers).collect(),
            reports,
            workers: tasks,
            chunk: 16,
            reading: None,
            loading: None,
            saving: None,
            saved: cursor,
            saved_at: None,
            told_at: Instant::now(),
            told_state: "",
            untold: true,
            counters,
            calls: vec![None; workers],
            last_error: None,
            progressed: false,
            last_progress: None,
            lease_metrics: metrics.lease,
            pulse,
            overdue: false,
            name,
            handler,
            batching,
            options,
            log,
            status,
            stop,
        };
        runner.take_up_all().await;
        runner
    }

    /// Puts what has a row into the lanes: a page at a time, since there may be dead letters
    /// without end.
    async fn take_up_all(&mut self) {
        let (cursor, mut after, mut dead) = (self.window.cursor(), Position::START, 0);
        let mut delays = RetryPolicy::reconnect().start();
        loop {
            let store = self.log.store();
            let page = store.unfinished(&self.name, after, PAGE);
            let page = self.pulse.within(store.patience(), page).await;
            let page = match page {
                Ok(page) => page,
                Err(error) => {
                    self.status.set_state(HandlerState::Waiting(error.to_string()));
                    self.pulse.waiting(tokio::time::sleep(delays.next_delay())).await;
                    continue;
                }
            };
            let last = page.len() < PAGE;
            for row in page {
                after = row.position;
                dead += u64::from(matches!(row.standing, Standing::Dead { .. }));
                self.journal.found(&row);
                if row.position <= cursor {
                    self.take_up(&row);
                } else {
                    self.ahead.insert(row.position, row);
                }
            }
            if last {
                break;
            }
            // There may be more of them than a lease lasts.
            if let Some(lease) = &mut self.lease {
                let (asked, length) = (Instant::now(), lease.length);
                match self.log.store().renew(&self.name, self.epoch, length).await {
                    Ok(paused) => {
                        self.paused = paused;
                        lease.until = asked + length;
                        lease.next = asked + length / 3;
                    }
                    Err(StoreError::Fenced(_)) => {
                        self.fenced = true;
                        return;
                    }
                    // Whether it still holds is found out by the next renewal.
                    Err(_) => {}
                }
            }
        }
        self.status.set_dead(dead);
        self.status.set_settled(self.journal.settled(cursor));
    }

    /// Puts an event that has a row into its lane.
    fn take_up(&mut self, row: &Unfinished) {
        let lane = self.lane_of_row(row);
        let turn = match row.standing {
            Standing::Dead { .. } => {
                if self.parks(lane, &row.id) {
                    self.lanes.insert(lane, Entry::stub(row.position, Turn::Dead, row.attempts));
                }
                return;
            }
            _ if !self.filter.matches(&row.kind) => {
                self.counters.filtered.inc();
                return self.journal.finish(row.position);
            }
            Standing::Retrying { due_at } => {
                let wait = due_at - crate::event::now();
                let wait = wait.try_into().unwrap_or_default();
                Turn::At(Instant::now() + outcomes::MAX_DELAY.min(wait))
            }
            Standing::Parked => Turn::Now,
        };
        let mut entry = Entry::stub(row.position, turn, row.attempts);
        // Only a redrive leaves one to be tried that has not been tried yet.
        entry.track.replay = row.attempts == 0 && matches!(row.standing, Standing::Retrying { .. });
        self.lanes.insert(lane, entry);
    }

    fn lane_of_row(&self, row: &Unfinished) -> LaneId {
        match self.options.ordering {
            Ordering::Key => lane_of(&row.key),
            Ordering::None => row.position.0,
        }
    }

    /// Whether a dead letter keeps its lane's followers waiting. An event whose key is its own
    /// id has none.
    fn parks(&self, lane: LaneId, id: &str) -> bool {
        self.options.on_dead() == OnDead::Park
            && self.options.ordering == Ordering::Key
            && lane != lane_of(id)
    }

    async fn work(&mut self, commands: &mut mpsc::UnboundedReceiver<Command>) -> End {
        loop {
            let now = Instant::now();
            self.beat(now);
            self.lanes.wake(now);
            self.renew(now);
            self.read_ahead(now);
            self.load(now);
            self.redrive(now);
            self.feed(now);
            // What was ready may have something in front of it now that is to be read first.
            self.load(now);
            self.checkpoint(now);
            self.tell(now);
            let idle = self.lanes.running() == 0 && self.saving.is_none();
            if self.fenced {
                // What runs is cut off: whoever has the handler now does it again.
                self.status.set_state(HandlerState::Standby("it was claimed anew".to_owned()));
                self.lease_metrics.lost(&component(&self.name));
                self.workers.shutdown().await;
                return if self.lease.is_some() { End::Anew } else { End::Displaced };
            }
            if self.draining && idle {
                // Trouble has been said; the cursor stays and the events come again (G4).
                if !self.dirty() || self.save_trouble.is_some() {
                    self.workers.shutdown().await;
                    let store = self.log.store();
                    let release = store.release(&self.name, self.epoch);
                    let _ = self.pulse.within(store.patience(), release).await;
                    return End::Stopped;
                }
            }
            if idle && let Some(rewind) = self.rewind.take() {
                let patience = 2 * self.log.store().patience();
                let pulse = Arc::clone(&self.pulse);
                pulse.within(patience, self.rewound(rewind)).await;
                self.workers.shutdown().await;
                return End::Anew;
            }
            let wake = self.next_wake(now);
            tokio::select! {
                () = self.stop.cancelled(), if !self.draining => {
                    self.draining = true;
                    self.reading = None;
                    self.loading = None;
                    // One more try to save what is finished, whatever went wrong before.
                    self.save_trouble = None;
                }
                Some(report) = self.reports.recv() => {
                    self.take(report);
                    while let Ok(report) = self.reports.try_recv() {
                        self.take(report);
                    }
                }
                page = ready(&mut self.reading) => {
                    self.reading = None;
                    self.queue(page);
                }
                loaded = ready(&mut self.loading) => {
                    self.loading = None;
                    self.loaded(loaded);
                }
                saved = async { match &mut self.saving {
                    Some(saving) => (&mut saving.done).await,
                    None => std::future::pending().await,
                } } => self.checkpointed(saved),
                found = ready(&mut self.redriving.fetching) => {
                    self.redriving.fetching = None;
                    self.redriven(found);
                }
                renewed = async { match &mut self.lease {
                    Some(Lease { renewing: Some(renewing), .. }) => renewing.await,
                    _ => std::future::pending().await,
                } } => self.renewed(renewed),
                command = commands.recv(), if !self.draining => match command {
                    Some(command) => self.obey(command),
                    None => self.draining = true,
                },
                changed = self.head.changed(), if !self.draining => {
                    if changed.is_err() {
                        self.draining = true;
                    }
                }
                () = tokio::time::sleep_until(wake.into()) => {}
            }
        }
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Pause(paused) => {
                self.paused = paused;
                self.paused_at = Some(Instant::now());
            }
            Command::Redrive => self.redriving.look(),
            Command::Blocked { most, answer } => {
                let _ = answer.send(self.blocked(most));
            }
            Command::Rewind { to, audit, done } => {
                if self.rewind.is_some() {
                    let _ = done.send(Err("its cursor is being moved already".to_owned()));
                } else {
                    self.rewind = Some(Rewind { to, audit, done });
                }
            }
        }
    }

    /// Whether nothing is to be begun for now.
    fn rests(&self, now: Instant) -> bool {
        self.draining
            || self.paused
            || self.rewind.is_some()
            || self.lease.as_ref().is_some_and(|lease| lease.until <= now)
    }

    /// The next moment something is due. What was due by `now` has been seen to already, so
    /// only later moments count: nothing spins.
    fn next_wake(&self, now: Instant) -> Instant {
        // Its pulse goes on whatever it waits for.
        let beat = now + telemetry::INTERVAL;
        if self.draining {
            return beat;
        }
        let retry = self.lanes.next_due();
        let probe = self.outage.as_ref().filter(|o| o.probe.is_none()).map(|o| o.until);
        let read = self.read_trouble.as_ref().map(|t| t.until);
        let save = self.save_trouble.as_ref().map(|t| t.until);
        let checkpoint = (self.dirty() && self.saving.is_none())
            .then_some(self.saved_at)
            .flatten()
            .map(|at| at + self.options.checkpoint_interval);
        let tell = self.untold.then_some(self.told_at + tell::INTERVAL);
        let renew = self.lease.as_ref().map(|lease| lease.next);
        let redrive = self.redriving.next();
        [retry, probe, read, save, checkpoint, tell, renew, redrive]
            .into_iter()
            .flatten()
            .filter(|at| *at > now)
            .fold(beat, Instant::min)
    }

    /// Gives ready events to idle workers.
    fn feed(&mut self, now: Instant) {
        if self.rests(now) || self.fenced || self.journal.len() >= progress::MAX_UNSAVED {
            return;
        }
        let probe = match &self.outage {
            None => false,
            Some(outage) if outage.probe.is_none() && outage.until <= now => true,
            Some(_) => return,
        };
        while self.lanes.has_ready() {
            let Some(worker) = self.idle.pop() else { return };
            let (max, per_lane) = match self.batching {
                _ if probe => (1, 1),
                Batching::None => (self.chunk, self.chunk),
                Batching::DistinctKeys(n) => (n.max(1), 1),
                Batching::InOrder(n) => (n.max(1), n.max(1)),
            };
            let chunk = self.lanes.take(max, per_lane);
            if chunk.is_empty() {
                // What was ready has something unready in front of it now.
                self.idle.push(worker);
                continue;
            }
            if let (Some(call), Some(first)) = (self.calls.get_mut(worker), chunk.first()) {
                *call = Some((first.position(), now));
            }
            if let Some(feed) = self.feeds.get(worker) {
                // The worker is idle and lives as long as this runner, so its queue of one is
                // free.
                let _ = feed.try_send(chunk);
            }
            if probe {
                if let Some(outage) = &mut self.outage {
                    outage.probe = Some(worker);
                }
                return;
            }
        }
    }

    /// Moves the cursor by hand. Whether that worked or not, the runner then begins anew with
    /// what the store says: a failure may be an answer that got lost.
    async fn rewound(&mut self, rewind: Rewind) {
        let Rewind { to, audit, done } = rewind;
        let store = self.log.store();
        let moved = async {
            let head = store.head().await?;
            store.rewind(&self.name, self.epoch, to.min(head), Some(&audit)).await
        };
        let moved = moved.await.map_err(|error: StoreError| error.to_string());
        if let Ok(to) = moved {
            self.replayed.fetch_max(self.window.cursor().0, Relaxed);
            // Whoever has asked for it must not find it where it was.
            self.status.set_position(to);
            self.status.set_settled(to);
        }
        let _ = done.send(moved);
    }
}

/// Resolves with what the future in the slot does; never while the slot is empty.
async fn ready<T>(slot: &mut Option<Call<T>>) -> T {
    match slot {
        Some(future) => future.await,
        None => std::future::pending().await,
    }
}
