//! Whether the long-lived loops get on: what the watchdog goes by.
//!
//! Each loop that nothing works without (the log's writer, each source, each handler's runner)
//! has a [`Pulse`] and beats it at every turn: an atomic increment, a turn and not an event.
//! Where it waits it goes on beating, once an [`INTERVAL`], for as long as what it waits for may
//! take: without end for a broker or a target ([`Pulse::waiting`]), for a bounded time for a
//! call that has a limit of its own ([`Pulse::within`]). So a pulse stands still when the
//! loop's task is not polled any more (its thread is blocked, the runtime is stuck), or when
//! something that has to end has not; and not when a broker, a target or the store is away.
//!
//! What it does not see: a loop that turns without doing anything of use.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use tokio::time::{Instant, sleep};

/// How often a loop beats at least.
pub const INTERVAL: Duration = Duration::from_secs(1);

/// The loops of a process. Clones are the same.
#[derive(Debug, Clone, Default)]
pub struct Pulses(Arc<Mutex<Loops>>);

#[derive(Debug, Default)]
struct Loops {
    /// How many there have been: a handler that is replaced comes again under the same name.
    count: u64,
    beating: BTreeMap<u64, (Arc<str>, Arc<AtomicU64>)>,
    /// Those that ended by a panic.
    lost: Vec<Arc<str>>,
}

impl Pulses {
    /// A pulse for a loop: `log`, `source:NAME`, `handler:NAME`. It is watched until it is
    /// dropped. Dropped by a panic, its loop counts as stuck from then on.
    #[must_use]
    pub fn start(&self, name: impl Into<Arc<str>>) -> Pulse {
        let turns = Arc::new(AtomicU64::default());
        let mut loops = self.lock();
        loops.count += 1;
        let number = loops.count;
        loops.beating.insert(number, (name.into(), Arc::clone(&turns)));
        Pulse { number, turns, pulses: self.clone() }
    }

    /// Watches them: a pulse that has stood still for `limit` is stuck.
    #[must_use]
    pub fn watch(&self, limit: Duration) -> Watch {
        let limit = limit.max(3 * INTERVAL);
        Watch { pulses: self.clone(), limit, looked: None, seen: BTreeMap::new() }
    }

    /// Nothing panics while holding it; if it did, the map would still be whole.
    fn lock(&self) -> std::sync::MutexGuard<'_, Loops> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The pulse of one loop.
#[derive(Debug)]
pub struct Pulse {
    number: u64,
    turns: Arc<AtomicU64>,
    pulses: Pulses,
}

impl Pulse {
    /// The loop has made a turn.
    pub fn beat(&self) {
        self.turns.fetch_add(1, Relaxed);
    }

    /// Beats for as long as it takes: for what comes when it comes, and for brokers and targets,
    /// which may be away.
    pub async fn waiting<T>(&self, wait: impl Future<Output = T>) -> T {
        self.beating(wait, None).await
    }

    /// Beats until it has ended, and for `patience` at most: for what has a limit of its own,
    /// which is shorter.
    pub async fn within<T>(&self, patience: Duration, work: impl Future<Output = T>) -> T {
        self.beating(work, Some(patience)).await
    }

    async fn beating<T>(&self, future: impl Future<Output = T>, patience: Option<Duration>) -> T {
        self.beat();
        let mut future = std::pin::pin!(future);
        let mut left = patience;
        loop {
            tokio::select! {
                biased;
                done = &mut future => return done,
                () = sleep(INTERVAL) => match &mut left {
                    None => self.beat(),
                    Some(left) if left.is_zero() => {}
                    Some(left) => {
                        *left = left.saturating_sub(INTERVAL);
                        self.beat();
                    }
                }
            }
        }
    }
}

impl Drop for Pulse {
    fn drop(&mut self) {
        let mut loops = self.pulses.lock();
        if let Some((name, _)) = loops.beating.remove(&self.number)
            && std::thread::panicking()
        {
            loops.lost.push(name);
        }
    }
}

/// A loop that does not get on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stuck {
    /// Its name.
    pub name: Arc<str>,
    /// For how long; `None` where it ended by a panic.
    pub since: Option<Duration>,
}

impl fmt::Display for Stuck {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.since {
            Some(since) => write!(f, "{} has not got on for {} s", self.name, since.as_secs()),
            None => write!(f, "{} ended by a panic", self.name),
        }
    }
}

/// Looks at pulses from time to time.
#[derive(Debug)]
pub struct Watch {
    pulses: Pulses,
    limit: Duration,
    looked: Option<Instant>,
    /// By number: the turns counted last, and for how long there was no other.
    seen: BTreeMap<u64, (u64, Duration)>,
}

impl Watch {
    /// Those that do not get on. To be asked about once an [`INTERVAL`].
    ///
    /// Time in which nobody looked counts as two intervals at most: when the whole process slept
    /// (a suspended machine, SIGSTOP), its loops had no chance to beat.
    pub fn stuck(&mut self) -> Vec<Stuck> {
        let now = Instant::now();
        let passed = self.looked.replace(now).map_or(Duration::ZERO, |looked| now - looked);
        let passed = passed.min(2 * INTERVAL);
        let loops = self.pulses.lock();
        self.seen.retain(|number, _| loops.beating.contains_key(number));
        let mut stuck: Vec<Stuck> =
            loops.lost.iter().map(|name| Stuck { name: Arc::clone(name), since: None }).collect();
        for (number, (name, turns)) in &loops.beating {
            let turns = turns.load(Relaxed);
            let (counted, still) = self.seen.entry(*number).or_insert((turns, Duration::ZERO));
            if *counted == turns {
                *still += passed;
            } else {
                (*counted, *still) = (turns, Duration::ZERO);
            }
            if *still > self.limit {
                stuck.push(Stuck { name: Arc::clone(name), since: Some(*still) });
            }
        }
        stuck
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(10);

    /// Looks once a second for so long; the names of those stuck at the end.
    async fn look(watch: &mut Watch, seconds: u32) -> Vec<String> {
        let mut stuck = watch.stuck();
        for _ in 0..seconds {
            sleep(INTERVAL).await;
            stuck = watch.stuck();
        }
        stuck.iter().map(|stuck| stuck.name.to_string()).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn what_waits_gets_on_and_what_overruns_its_patience_is_stuck() {
        let (pulses, mut tasks) = (Pulses::default(), tokio::task::JoinSet::new());
        let (broker, store) = (pulses.start("source:a"), pulses.start("log"));
        tasks.spawn(async move { broker.waiting(std::future::pending::<()>()).await });
        tasks.spawn(async move {
            store.within(Duration::from_secs(60), std::future::pending::<()>()).await;
        });
        let mut watch = pulses.watch(LIMIT);
        assert!(look(&mut watch, 55).await.is_empty());
        assert_eq!(look(&mut watch, 30).await, ["log"]);
        assert!(watch.stuck()[0].to_string().starts_with("log has not got on for 2"));
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_beats_again_is_stuck_no_more_and_one_that_ended_is_not_missed() {
        let pulses = Pulses::default();
        let (pulse, other) = (pulses.start("log"), pulses.start("handler:h"));
        let mut watch = pulses.watch(LIMIT);
        assert!(look(&mut watch, 9).await.is_empty());
        assert_eq!(look(&mut watch, 3).await, ["log", "handler:h"]);
        pulse.beat();
        drop(other);
        assert!(look(&mut watch, 5).await.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_panicked_is_stuck_for_good() {
        let pulses = Pulses::default();
        let pulse = pulses.start("source:a");
        let mut tasks = tokio::task::JoinSet::new();
        tasks.spawn(async move {
            pulse.beat();
            panic!("on purpose");
        });
        assert!(tasks.join_next().await.is_some_and(|ended| ended.is_err()));
        let stuck = pulses.watch(LIMIT).stuck();
        assert_eq!(stuck, [Stuck { name: "source:a".into(), since: None }]);
        assert_eq!(stuck[0].to_string(), "source:a ended by a panic");
    }

    #[tokio::test(start_paused = true)]
    async fn a_process_that_slept_has_not_stood_still() {
        let pulses = Pulses::default();
        let _pulse = pulses.start("log");
        let mut watch = pulses.watch(LIMIT);
        assert!(watch.stuck().is_empty());
        sleep(Duration::from_secs(3_600)).await;
        assert!(watch.stuck().is_empty());
    }
}
