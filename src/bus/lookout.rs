//! Looks up what a scrape must not ask the store for: one bounded question at a time, now and
//! then, and only while the store answers.

use std::{
    sync::{Arc, Weak},
    time::Duration,
};

use tokio::time::{MissedTickBehavior, interval, timeout};
use tokio_util::sync::CancellationToken;

use super::{Inner, health::behind, lock};
use crate::{
    dispatch::{HandlerState, HandlerStatus},
    store::{Log, LogHealth},
};

/// How often the events behind the cursors are looked up, where they are not in memory.
const TICK: Duration = Duration::from_secs(1);

/// How many ticks lie between two looks at what other processes do with handlers.
const STANDBY: u64 = 3;

/// How many ticks lie between two counts of quarantine.
const QUARANTINE: u64 = 15;

/// How long an answer is waited for.
const PATIENCE: Duration = Duration::from_secs(5);

/// Looks until stopped, or the bus is gone.
pub(super) async fn run(bus: Weak<Inner>, stop: CancellationToken) {
    let looking = async {
        let mut ticks = interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        for tick in 0_u64.. {
            ticks.tick().await;
            let Some(inner) = bus.upgrade() else { return };
            let log = Arc::clone(&inner.log);
            if log.health() != LogHealth::Writing {
                continue;
            }
            let handlers: Vec<_> = lock(&inner.handlers)
                .values()
                .map(|handler| Arc::clone(handler.status()))
                .collect();
            let quarantine = inner.metrics.log.quarantine.clone();
            // Not kept alive while the store is asked.
            drop(inner);
            for status in handlers {
                look(&log, &status, tick).await;
            }
            if tick.is_multiple_of(QUARANTINE)
                && let Ok(Ok(entries)) = timeout(PATIENCE, log.store().quarantine_len()).await
            {
                quarantine.set(i64::try_from(entries).unwrap_or(i64::MAX));
            }
        }
    };
    stop.run_until_cancelled(looking).await;
}

async fn look(log: &Log, status: &HandlerStatus, tick: u64) {
    let seen = status.snapshot();
    if matches!(seen.state, HandlerState::Standby(_))
        && tick.is_multiple_of(STANDBY)
        && let Ok(Ok(Some(cursor))) = timeout(PATIENCE, log.store().cursor(&seen.name)).await
    {
        status.set_standby_position(cursor);
    }
    let next = behind(log, seen.position).filter(|next| log.recorded_lately(*next).is_none());
    let Some(next) = next else { return status.set_behind(None) };
    if status.behind().is_some_and(|(known, _)| known == next) {
        return;
    }
    if let Ok(Ok(found)) = timeout(PATIENCE, log.store().get(&[next], 0)).await {
        status.set_behind(found.first().map(|event| (next, event.recorded_at)));
    }
}
