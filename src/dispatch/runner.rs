//! The task that owns a handler's cursor, window and lanes.

use std::{
    cmp::Reverse,
    collections::BinaryHeap,
    panic::AssertUnwindSafe,
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::{FutureExt as _, future::BoxFuture};
use rustc_hash::{FxHashMap, FxHashSet};
use time::OffsetDateTime;
use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;

use super::{
    HandlerOptions, HandlerState, HandlerStatus, OnDead, Ordering,
    counters::Counters,
    filter::CachedFilter,
    lanes::{Item, LaneId, Lanes, lane_of},
    resume::{FLUSH_TIMEOUT, Resumed},
    window::Window,
    worker::{Pace, Report, Worker},
};
use crate::{
    event::{Position, StoredEvent},
    handler::{Batching, EventHandler, HandlerError, Outcome},
    retry::{Delays, RetryPolicy},
    store::{DeadLetter, Limit, Log, StoreError},
    telemetry::Metrics,
};

/// Positions a window spans at most, finished ones included. A finished position costs a byte,
/// so one event that fails for long holds up the cursor and not the others.
const MAX_SPAN: usize = 1_000_000;

/// Events a chunk holds at most, for handlers that take one at a time.
const MAX_CHUNK: usize = 256;

/// Dead letters held at most while the store does not take them.
const MAX_UNSAVED_DEAD: usize = 10_000;

/// How often the numbers of a handler are brought up to date.
const TELL_INTERVAL: Duration = Duration::from_millis(100);

/// Lanes parked behind dead letters at most; beyond, the handler takes nothing more.
const MAX_PARKED: usize = 100_000;

/// The longest a handler can ask to be left alone for.
const MAX_DELAY: Duration = Duration::from_secs(24 * 3_600);

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
    /// Whether a person has paused it.
    pub(crate) paused: watch::Receiver<bool>,
    pub(crate) stop: CancellationToken,
}

/// Runs a handler until `stop` is cancelled; then lets what runs end, checkpoints, and returns.
/// Dropped instead, it leaves its cursor where it was last saved.
///
/// Calls of the handler are isolated in its workers; a panic anywhere else of its code (`lane`,
/// `position`, `batching`) starts it again from its saved cursor.
pub(crate) async fn run(setup: Setup) {
    let mut delays = RetryPolicy::reconnect().start();
    loop {
        let (stop, start) = (setup.stop.clone(), setup.clone());
        let attempt = async {
            if let Some(mut runner) = stop.run_until_cancelled(Runner::start(start)).await {
                runner.work().await;
            }
        };
        if AssertUnwindSafe(attempt).catch_unwind().await.is_ok() {
            break;
        }
        let reason = "the handler's code panicked outside of a call; it is started again";
        setup.status.set_state(HandlerState::Failed(reason.to_owned()));
        let pause = tokio::time::sleep(delays.next_delay());
        if setup.stop.run_until_cancelled(pause).await.is_none() {
            break;
        }
    }
    setup.status.set_state(HandlerState::Stopped);
}

/// How often and why the head of a lane has failed.
struct Failing {
    attempts: u32,
    first_error: HandlerError,
    first_failed_at: OffsetDateTime,
}

/// A target that is down.
struct Outage {
    reason: HandlerError,
    delays: Delays,
    until: Instant,
    /// The worker that probes.
    probe: Option<usize>,
}

/// Reads or checkpoints that fail and are tried again.
struct Trouble {
    delays: Delays,
    until: Instant,
    reason: String,
}

impl Trouble {
    /// It failed, again perhaps: the next try comes later.
    fn again(slot: &mut Option<Self>, reason: String) {
        let trouble = slot.get_or_insert_with(|| Self {
            delays: RetryPolicy::reconnect().start(),
            until: Instant::now(),
            reason: String::new(),
        });
        trouble.reason = reason;
        trouble.until = Instant::now() + trouble.delays.next_delay();
    }
}

struct Runner {
    name: Arc<str>,
    handler: Arc<dyn EventHandler>,
    batching: Batching,
    options: HandlerOptions,
    log: Arc<Log>,
    head: watch::Receiver<Position>,
    status: Arc<HandlerStatus>,
    paused: watch::Receiver<bool>,
    stop: CancellationToken,

    filter: CachedFilter,
    window: Window,
    lanes: Lanes,
    /// Bytes of the bodies of unfinished events.
    bytes: usize,
    failing: FxHashMap<LaneId, Failing>,
    due: BinaryHeap<Reverse<(Instant, LaneId)>>,
    /// Lanes parked behind a dead letter.
    parked: FxHashSet<LaneId>,
    /// Positions above the cursor that were dead letters when it started.
    buried: FxHashSet<Position>,
    /// Dead letters not in the store yet; the cursor is not saved before they are.
    dead: Vec<DeadLetter>,
    outage: Option<Outage>,
    read_trouble: Option<Trouble>,
    save_trouble: Option<Trouble>,
    draining: bool,

    feeds: Vec<mpsc::Sender<Vec<Item>>>,
    idle: Vec<usize>,
    reports: mpsc::UnboundedReceiver<Report>,
    /// Ends the workers when the runner is dropped.
    workers: JoinSet<()>,
    chunk: usize,

    reading: Option<BoxFuture<'static, Result<Vec<Arc<StoredEvent>>, StoreError>>>,
    saving: Option<Saving>,
    saved: Position,
    saved_at: Option<Instant>,
    told_at: Instant,
    told_state: &'static str,
    /// The numbers have been held back since `told_at`.
    untold: bool,
    counters: Counters,
}

struct Saving {
    cursor: Position,
    done: BoxFuture<'static, Result<(), (String, Vec<DeadLetter>)>>,
}

impl Runner {
    /// Finds the cursor, for as long as that takes.
    async fn start(setup: Setup) -> Self {
        let Setup { name, handler, options, workers, log, status, metrics, paused, stop } = setup;
        let mut delays = RetryPolicy::reconnect().start();
        let Resumed { cursor, letters } = loop {
            match Resumed::find(&name, &*handler, &options, &log).await {
                Ok(found) => break found,
                Err(state) => status.set_state(state),
            }
            tokio::time::sleep(delays.next_delay()).await;
        };
        status.set_position(cursor);
        status.set_saved(cursor);
        status.set_dead(letters.len() as u64);
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
        let mut lanes = Lanes::default();
        let mut parked = FxHashSet::default();
        if options.on_dead() == OnDead::Park && options.ordering == Ordering::Key {
            for letter in letters.iter().filter(|letter| letter.key != letter.id) {
                let lane = lane_of(&letter.key);
                if parked.insert(lane) {
                    lanes.hold(lane);
                }
            }
        }
        let above = letters.iter().map(|letter| letter.position).filter(|at| *at > cursor);
        let buried = above.collect();
        let counters = Counters::new(&metrics, &name);
        Self {
            filter: CachedFilter::new(options.events.clone()),
            window: Window::new(cursor),
            head: log.watch_head(),
            lanes,
            bytes: 0,
            failing: FxHashMap::default(),
            due: BinaryHeap::new(),
            parked,
            buried,
            dead: Vec::new(),
            outage: None,
            read_trouble: None,
            save_trouble: None,
            draining: false,
            feeds,
            idle: (0..workers).collect(),
            reports,
            workers: tasks,
            chunk: 16,
            reading: None,
            saving: None,
            saved: cursor,
            saved_at: None,
            told_at: Instant::now(),
            told_state: "",
            untold: true,
            counters,
            name,
            handler,
            batching,
            options,
            log,
            status,
            paused,
            stop,
        }
    }

    async fn work(&mut self) {
        loop {
            let now = Instant::now();
            self.resume_due(now);
            self.read_ahead(now);
            self.feed(now);
            self.checkpoint(now);
            self.tell(now);
            if self.draining && self.lanes.running() == 0 && self.saving.is_none() {
                // Trouble has been said; the cursor stays and the events come again (G4).
                if !self.dirty() || self.save_trouble.is_some() {
                    self.workers.shutdown().await;
                    return;
                }
            }
            let wake = self.next_wake(now);
            tokio::select! {
                () = self.stop.cancelled(), if !self.draining => {
                    self.draining = true;
                    self.reading = None;
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
                saved = async { match &mut self.saving {
                    Some(saving) => (&mut saving.done).await,
                    None => std::future::pending().await,
                } } => self.checkpointed(saved),
                changed = self.paused.changed(), if !self.draining => {
                    if changed.is_err() {
                        self.draining = true;
                    }
                }
                changed = self.head.changed(), if !self.draining => {
                    if changed.is_err() {
                        self.draining = true;
                    }
                }
                () = until(wake) => {}
            }
        }
    }

    /// The next moment something is due. What was due by `now` has been seen to already, so
    /// only later moments count: nothing spins.
    fn next_wake(&self, now: Instant) -> Option<Instant> {
        if self.draining {
            return None;
        }
        let retry = self.due.peek().map(|Reverse((at, _))| *at);
        let probe = self.outage.as_ref().filter(|o| o.probe.is_none()).map(|o| o.until);
        let read = self.read_trouble.as_ref().map(|t| t.until);
        let save = self.save_trouble.as_ref().map(|t| t.until);
        let checkpoint = (self.dirty() && self.saving.is_none())
            .then_some(self.saved_at)
            .flatten()
            .map(|at| at + self.options.checkpoint_interval);
        let tell = self.untold.then_some(self.told_at + TELL_INTERVAL);
        [retry, probe, read, save, checkpoint, tell]
            .into_iter()
            .flatten()
            .filter(|at| *at > now)
            .min()
    }

    /// Lets lanes go on whose retry is due.
    fn resume_due(&mut self, now: Instant) {
        while let Some(&Reverse((at, lane))) = self.due.peek() {
            if at > now {
                break;
            }
            self.due.pop();
            self.lanes.resume(lane);
        }
    }

    /// Starts to read the next page, where there is room and something to read.
    fn read_ahead(&mut self, now: Instant) {
        let full = self.lanes.unfinished() >= self.options.window
            || self.bytes >= self.options.window_bytes
            || self.window.span() >= MAX_SPAN;
        let waiting = self.read_trouble.as_ref().is_some_and(|t| t.until > now);
        if self.draining || *self.paused.borrow() || full || waiting || self.reading.is_some() {
            return;
        }
        let after = self.window.end();
        if after >= *self.head.borrow() {
            return;
        }
        let limit = Limit {
            events: (self.options.window - self.lanes.unfinished())
                .min(MAX_SPAN - self.window.span())
                .min(2_000),
            bytes: (self.options.window_bytes - self.bytes).min(8 << 20),
        };
        let log = Arc::clone(&self.log);
        self.reading = Some(Box::pin(async move { log.read(after, limit).await }));
    }

    /// Queues a page that was read.
    fn queue(&mut self, page: Result<Vec<Arc<StoredEvent>>, StoreError>) {
        let events = match page {
            Ok(events) => events,
            Err(error) => return self.cannot_read(format!("the log cannot be read: {error}")),
        };
        if events.is_empty() && self.window.end() < *self.head.borrow() {
            // Tried again with backoff, so that no store can make this spin.
            return self.cannot_read("the log gave nothing though there is more".to_owned());
        }
        let mut filtered = 0;
        for event in events {
            if event.position != self.window.end().next() {
                let reason = format!(
                    "the log is not contiguous: position {} came after {} (G3)",
                    event.position,
                    self.window.end()
                );
                return self.cannot_read(reason);
            }
            let wanted = self.filter.matches(event.kind()) && !self.buried.remove(&event.position);
            self.window.push(!wanted);
            if wanted {
                let lane = match self.options.ordering {
                    Ordering::Key => lane_of(&self.handler.lane(&event)),
                    Ordering::None => event.position.0,
                };
                self.bytes += event.body().len();
                self.lanes.push(Item { lane, event, alone: false });
            } else {
                filtered += 1;
            }
        }
        self.counters.filtered.inc_by(filtered);
        self.read_trouble = None;
        self.status.set_position(self.window.cursor());
    }

    /// Gives ready events to idle workers.
    fn feed(&mut self, now: Instant) {
        let stuck = self.dead.len() >= MAX_UNSAVED_DEAD || self.parked.len() >= MAX_PARKED;
        if self.draining || *self.paused.borrow() || stuck {
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

    /// Takes what a worker reports.
    fn take(&mut self, report: Report) {
        let Report { worker, results, unstarted, idle, pace, took } = report;
        if idle {
            self.idle.push(worker);
        }
        match pace {
            Pace::Instant => self.chunk = (self.chunk * 2).min(MAX_CHUNK),
            Pace::Slow => self.chunk = (self.chunk / 4).max(1),
        }
        if let Some(took) = took {
            self.counters.seconds.observe(took.as_secs_f64());
        }
        let probed = self.outage.as_ref().is_some_and(|o| o.probe == Some(worker)) && idle;
        if probed && let Some(outage) = &mut self.outage {
            outage.probe = None;
        }
        let mut again = Vec::new();
        let mut done = 0;
        let mut answered = false;
        let mut suspended = false;
        for (item, outcome) in results {
            match outcome {
                Outcome::Done => {
                    done += 1;
                    answered = true;
                    self.failing.remove(&item.lane);
                    self.finish(&item);
                }
                Outcome::Retry { error, after } => {
                    self.counters.retry.inc();
                    if let Some(item) = self.failed(item, &error, after) {
                        again.push(item);
                    }
                }
                Outcome::Reject { error } => {
                    answered = true;
                    self.counters.reject.inc();
                    self.bury(&item, &error);
                }
                Outcome::Unavailable { error, after } => {
                    self.counters.unavailable.inc();
                    if !suspended {
                        suspended = true;
                        self.suspend(error, after, probed);
                    }
                    again.push(item);
                }
            }
        }
        self.counters.done.inc_by(done);
        if answered && !suspended {
            self.outage = None;
        } else if probed && !suspended {
            // A panic, a timeout or a failure of this event says nothing of the target: probe
            // again, at the same pace.
            if let Some(outage) = &mut self.outage {
                outage.until = Instant::now() + outage.delays.next_delay();
            }
        }
        // Back to the front of their lanes, last one first, so that they keep their order.
        for item in again.into_iter().chain(unstarted).rev() {
            self.lanes.settle(item.lane, Some(item));
        }
        self.status.set_position(self.window.cursor());
    }

    fn finish(&mut self, item: &Item) {
        self.bytes -= item.event.body().len();
        self.window.finish(item.position());
        self.lanes.settle(item.lane, None);
    }

    /// A failed attempt: the event waits, with its lane, or is dead after the last one.
    fn failed(
        &mut self,
        item: Item,
        error: &HandlerError,
        after: Option<Duration>,
    ) -> Option<Item> {
        let failing = self.failing.entry(item.lane).or_insert_with(|| Failing {
            attempts: 0,
            first_error: error.clone(),
            first_failed_at: crate::event::now(),
        });
        failing.attempts += 1;
        let attempts = failing.attempts;
        if attempts >= self.options.retry.attempts() {
            self.bury(&item, error);
            return None;
        }
        let delay = after
            .map_or_else(|| self.options.retry.delay_after(attempts), |after| after.min(MAX_DELAY));
        tracing::debug!(
            handler = &*self.name,
            position = item.position().0,
            id = item.event.id(),
            key = item.event.key(),
            attempts,
            %error,
            ?delay,
            "attempt failed"
        );
        self.lanes.hold(item.lane);
        self.due.push(Reverse((Instant::now() + delay, item.lane)));
        Some(item)
    }

    /// The event will not work: a dead letter.
    fn bury(&mut self, item: &Item, error: &HandlerError) {
        let failing = self.failing.remove(&item.lane);
        let last_failed_at = crate::event::now();
        let event = &item.event;
        tracing::warn!(
            handler = &*self.name,
            position = event.position.0,
            id = event.id(),
            kind = event.kind(),
            key = event.key(),
            %error,
            "dead letter"
        );
        let (attempts, first_error, first_failed_at) = match failing {
            Some(f) => (f.attempts, f.first_error, f.first_failed_at),
            None => (1, error.clone(), last_failed_at),
        };
        let key = match self.options.ordering {
            Ordering::Key => self.handler.lane(event).into_owned(),
            Ordering::None => event.key().to_owned(),
        };
        self.dead.push(DeadLetter {
            number: 0,
            handler: Arc::clone(&self.name),
            position: event.position,
            id: event.id().into(),
            kind: event.kind().into(),
            key,
            attempts,
            first_error: first_error.to_string(),
            last_error: error.to_string(),
            first_failed_at,
            last_failed_at,
        });
        self.counters.dead.inc();
        self.status.add_dead(1);
        // An event whose key is its own id has no followers.
        let park = self.options.on_dead() == OnDead::Park
            && self.options.ordering == Ordering::Key
            && item.lane != lane_of(event.id());
        if park && self.parked.insert(item.lane) {
            self.lanes.hold(item.lane);
        }
        self.finish(item);
    }

    /// The target is down: nothing new is begun until a probe gets through. What was begun
    /// before comes back with the same news: one outage, one step of its backoff a probe.
    fn suspend(&mut self, reason: HandlerError, after: Option<Duration>, probed: bool) {
        let first = self.outage.is_none();
        let outage = self.outage.get_or_insert_with(|| Outage {
            reason: reason.clone(),
            delays: RetryPolicy::reconnect().start(),
            until: Instant::now(),
            probe: None,
        });
        outage.reason = reason;
        if first || probed {
            let delay =
                after.map_or_else(|| outage.delays.next_delay(), |after| after.min(MAX_DELAY));
            outage.until = Instant::now() + delay;
        }
    }

    fn dirty(&self) -> bool {
        self.window.cursor() > self.saved || !self.dead.is_empty()
    }

    /// Starts a checkpoint when one is due.
    fn checkpoint(&mut self, now: Instant) {
        if self.saving.is_some() || !self.dirty() {
            return;
        }
        let waiting = self.save_trouble.as_ref().is_some_and(|t| t.until > now);
        let due = self.draining
            || self.window.cursor().0 - self.saved.0 >= self.options.checkpoint_events
            || self.saved_at.is_none_or(|at| at + self.options.checkpoint_interval <= now);
        let not_yet = self.draining && (self.lanes.running() > 0 || self.save_trouble.is_some());
        if !due || waiting || not_yet {
            return;
        }
        let cursor = self.window.cursor();
        let dead = std::mem::take(&mut self.dead);
        let handler = Arc::clone(&self.handler);
        let log = Arc::clone(&self.log);
        let name = Arc::clone(&self.name);
        let done = Box::pin(async move {
            let steps = async {
                tokio::time::timeout(FLUSH_TIMEOUT, handler.flush(cursor))
                    .await
                    .map_err(|_| format!("flush took longer than {FLUSH_TIMEOUT:?}"))?
                    .map_err(|error| format!("flush failed: {error}"))?;
                let store = log.store();
                // Dead letters first: the cursor never passes one that is not there (G6).
                if !dead.is_empty() {
                    store.bury(&dead).await.map_err(|error| error.to_string())?;
                }
                store.save_cursors(&[(name, cursor)]).await.map_err(|error| error.to_string())
            };
            match AssertUnwindSafe(steps).catch_unwind().await {
                Ok(Ok(())) => Ok(()),
                Ok(Err(reason)) => Err((reason, dead)),
                Err(_) => Err(("flush panicked".to_owned(), dead)),
            }
        });
        self.saving = Some(Saving { cursor, done });
    }

    fn checkpointed(&mut self, result: Result<(), (String, Vec<DeadLetter>)>) {
        let Some(saving) = self.saving.take() else { return };
        self.saved_at = Some(Instant::now());
        match result {
            Ok(()) => {
                self.saved = saving.cursor;
                self.status.set_saved(saving.cursor);
                self.save_trouble = None;
            }
            Err((reason, mut dead)) => {
                dead.append(&mut self.dead);
                self.dead = dead;
                Trouble::again(&mut self.save_trouble, format!("the checkpoint failed: {reason}"));
            }
        }
    }

    fn cannot_read(&mut self, reason: String) {
        Trouble::again(&mut self.read_trouble, reason);
    }

    /// Says how it is: a change of state at once, the numbers otherwise not more often than
    /// [`TELL_INTERVAL`].
    fn tell(&mut self, now: Instant) {
        let unfinished = self.lanes.unfinished();
        let full = unfinished >= self.options.window
            || self.bytes >= self.options.window_bytes
            || self.window.span() >= MAX_SPAN;
        let state = if *self.paused.borrow() {
            HandlerState::Paused
        } else if let Some(outage) = &self.outage {
            HandlerState::Unavailable(outage.reason.to_string())
        } else if let Some(trouble) = self.save_trouble.as_ref().or(self.read_trouble.as_ref()) {
            HandlerState::Waiting(trouble.reason.clone())
        } else if self.parked.len() >= MAX_PARKED {
            HandlerState::Stalled(format!(
                "{} keys wait behind dead letters, more than can be kept in memory",
                self.parked.len()
            ))
        } else if full && self.lanes.running() == 0 && !self.lanes.has_ready() {
            HandlerState::Stalled(format!(
                "{unfinished} events wait behind {} that fail and {} dead letters; it reads on \
                 when some of them end",
                self.due.len(),
                self.parked.len()
            ))
        } else {
            HandlerState::Running
        };
        let changed = self.told_state != state.as_str();
        self.untold = !changed && now < self.told_at + TELL_INTERVAL;
        if !self.untold {
            self.told_at = now;
            self.told_state = state.as_str();
            let queued = |lane: &LaneId| self.lanes.queued_in(*lane);
            let retrying = self.due.len();
            let behind: usize = self.due.iter().map(|Reverse((_, lane))| queued(lane)).sum();
            let parked: usize = self.parked.iter().map(queued).sum();
            self.status.set_work(unfinished, retrying, behind.saturating_sub(retrying) + parked);
        }
        self.status.set_state(state);
    }
}

/// Resolves with what the future in the slot does; never while the slot is empty.
async fn ready<T>(slot: &mut Option<BoxFuture<'static, T>>) -> T {
    match slot {
        Some(future) => future.await,
        None => std::future::pending().await,
    }
}

async fn until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}
