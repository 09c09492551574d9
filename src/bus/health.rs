//! How everything is: for `/readyz`, `/v1/sources` and `/v1/handlers`.

use std::sync::Arc;

use serde::Serialize;
use time::OffsetDateTime;

use super::{EventBus, Retention, lock, reasons};
use crate::{
    dispatch::{HandlerState, Snapshot},
    event::Position,
    store::{Log, LogHealth},
    telemetry::SourceLabels,
    transport::{SourceReport, SourceState},
};

/// A source at one moment.
#[derive(Debug, Clone, PartialEq)]
pub struct SourceSnapshot {
    /// Its configured name.
    pub name: Arc<str>,
    /// The kind of its transport.
    pub transport: &'static str,
    /// How it is.
    pub state: SourceState,
    /// Since when it is in that state.
    pub since: OffsetDateTime,
    /// Why it does not consume, and what to do.
    pub reason: Option<String>,
    /// Messages received since the start.
    pub received: u64,
    /// Of these, deliveries that the broker had made before.
    pub redelivered: u64,
    /// Of these, events added to the log.
    pub stored: u64,
    /// Of these, copies of events that were in the log already.
    pub duplicates: u64,
    /// Of these, messages put into quarantine.
    pub quarantined: u64,
    /// Messages taken and not settled.
    pub held: u64,
    /// Since when the oldest of them is held.
    pub held_since: Option<OffsetDateTime>,
    /// Messages that wait in the broker, as it said last; `None` where it does not say.
    pub pending: Option<u64>,
    /// How often it lost its broker, or was refused by it, since the start.
    pub reconnects: u64,
    /// What went wrong last, and when.
    pub last_error: Option<(Arc<str>, OffsetDateTime)>,
    /// When something was received last.
    pub last_received: Option<OffsetDateTime>,
    /// When the broker was last told what became of a delivery.
    pub last_settled: Option<OffsetDateTime>,
}

/// How ready a part of the bus is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Health {
    /// It works.
    Ready,
    /// It waits for something that comes back by itself; the rest works.
    Degraded,
    /// Events cannot come in, or a person has to do something.
    NotReady,
}

/// A part of the bus and how it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Component {
    /// `store`, `source:NAME`, `handler:NAME`, `retention`, or `config` where a reload left
    /// something to say.
    pub component: String,
    /// How ready it is.
    pub health: Health,
    /// Its state in a word.
    pub state: &'static str,
    /// Since when it is in that state.
    #[serde(with = "time::serde::rfc3339")]
    pub since: OffsetDateTime,
    /// Why, and what to do, where there is a reason.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

impl EventBus {
    /// Every source.
    #[must_use]
    pub fn sources(&self) -> Vec<SourceSnapshot> {
        let health = self.inner.log.health();
        let all: Vec<_> = lock(&self.inner.sources)
            .iter()
            .map(|(name, running)| (Arc::clone(name), running.transport, running.reporter.told()))
            .collect();
        all.into_iter().map(|(name, kind, told)| self.source(name, kind, told, &health)).collect()
    }

    fn source(
        &self,
        name: Arc<str>,
        transport: &'static str,
        told: SourceReport,
        health: &LogHealth,
    ) -> SourceSnapshot {
        let SourceReport { state, since, reconnects, last_error, pending, held_since } = told;
        let (state, since) = match (state, health) {
            // With the store away it asks for nothing, whatever its broker does.
            (SourceState::Consuming, LogHealth::Waiting(reason) | LogHealth::Failed(reason)) => {
                let reason = format!("the event store does not take events: {reason}");
                (SourceState::Paused(reason), self.inner.log.health_since())
            }
            (state, _) => (state, since),
        };
        let labels = SourceLabels { source: Arc::clone(&name) };
        let metrics = &self.inner.metrics.source;
        let held = metrics.held.get_or_create_owned(&labels).get();
        SourceSnapshot {
            reason: reasons::source(&state),
            transport,
            state,
            since,
            received: metrics.received.get_or_create_owned(&labels).get(),
            redelivered: metrics.redelivered.get_or_create_owned(&labels).get(),
            stored: metrics.stored.get_or_create_owned(&labels).get(),
            duplicates: metrics.duplicates.get_or_create_owned(&labels).get(),
            quarantined: metrics.quarantined.get_or_create_owned(&labels).get(),
            held: u64::try_from(held).unwrap_or(0),
            held_since,
            pending,
            reconnects,
            last_error,
            last_received: moment(metrics.last_received.get_or_create_owned(&labels).get()),
            last_settled: moment(metrics.last_settled.get_or_create_owned(&labels).get()),
            name,
        }
    }

    /// Every handler.
    #[must_use]
    pub fn handlers(&self) -> Vec<Snapshot> {
        lock(&self.inner.handlers).values().map(|handler| handler.status().snapshot()).collect()
    }

    /// Why a handler does not go on, or what in it waits for a person or a time, and what to do;
    /// `None` where nothing does.
    #[must_use]
    pub fn reason(&self, handler: &Snapshot) -> Option<String> {
        reasons::handler(handler)
    }

    /// When the event behind a handler's cursor was recorded, which is the oldest that it has
    /// not passed; `None` where there is none, or it has not been looked up yet.
    #[must_use]
    pub fn oldest_unfinished(&self, handler: &Snapshot) -> Option<OffsetDateTime> {
        let log = &self.inner.log;
        let next = behind(log, handler.position)?;
        log.recorded_lately(next).or_else(|| {
            let status = self.status(&handler.name).ok()?;
            // At most as old as the last look-out: the cursor may have moved on since.
            status.behind().map(|(_, recorded_at)| recorded_at)
        })
    }

    /// The store, every source and every handler, and how ready each is; and what retention and a
    /// reload have to say.
    #[must_use]
    pub fn components(&self) -> Vec<Component> {
        let log = &self.inner.log;
        let (health, state, reason) = match log.health() {
            LogHealth::Writing => (Health::Ready, "writing", None),
            LogHealth::Waiting(reason) => {
                (Health::NotReady, "waiting", Some(reasons::store_away(&reason)))
            }
            LogHealth::Failed(reason) => {
                (Health::NotReady, "failed", Some(reasons::store_failed(&reason)))
            }
        };
        let since = log.health_since();
        let store = Component { component: "store".to_owned(), health, state, since, reason };
        let sources = self.sources().into_iter().map(|source| Component {
            component: format!("source:{}", source.name),
            health: match source.state {
                SourceState::Consuming | SourceState::Standby(_) => Health::Ready,
                SourceState::Recovering => Health::Degraded,
                SourceState::Starting
                | SourceState::Paused(_)
                | SourceState::Reconnecting(_)
                | SourceState::Misconfigured(_)
                | SourceState::Stopped => Health::NotReady,
            },
            state: source.state.as_str(),
            since: source.since,
            reason: source.reason,
        });
        let handlers = self.handlers().into_iter().map(|handler| Component {
            component: format!("handler:{}", handler.name),
            health: match handler.state {
                HandlerState::Running if handler.dead > 0 => Health::Degraded,
                HandlerState::Running | HandlerState::Standby(_) => Health::Ready,
                HandlerState::Paused | HandlerState::Unavailable(_) => Health::Degraded,
                HandlerState::Starting
                | HandlerState::Stalled(_)
                | HandlerState::Waiting(_)
                | HandlerState::Failed(_)
                | HandlerState::Stopped => Health::NotReady,
            },
            state: handler.state.as_str(),
            since: handler.since,
            reason: reasons::handler(&handler),
        });
        let rebuilds = self.rebuilds().into_iter().map(|rebuild| Component {
            component: format!("handler:{}", rebuild.name),
            // What serves is as ready as it was.
            health: Health::Degraded,
            state: rebuild.state.as_str(),
            since: rebuild.since,
            reason: Some(format!("rebuilding, at position {}", rebuild.position)),
        });
        let retention = self.retention().map(|retention| {
            let person = retention.trouble.is_some() || retention.needs_a_person();
            let reason = retention.reason();
            Component {
                component: "retention".to_owned(),
                // The log only grows meanwhile.
                health: if person { Health::Degraded } else { Health::Ready },
                state: if reason.is_some() { "held" } else { "removing" },
                since: retention.since,
                reason,
            }
        });
        let parts = std::iter::once(store).chain(sources).chain(handlers).chain(rebuilds);
        let config = lock(&self.inner.config).clone();
        parts.chain(retention).chain(config).collect()
    }

    /// How the removal of old events is; `None` where they are kept for ever.
    #[must_use]
    pub fn retention(&self) -> Option<Retention> {
        self.inner.retention.as_ref().map(|retention| lock(retention).clone())
    }
}

/// The position behind a cursor, where the log has one.
pub(super) fn behind(log: &Log, cursor: Position) -> Option<Position> {
    (cursor < log.head()).then(|| cursor.next())
}

/// A time as metrics have it; 0 stands for never.
fn moment(unix: f64) -> Option<OffsetDateTime> {
    let since = time::Duration::checked_seconds_f64(unix)?;
    let at = OffsetDateTime::UNIX_EPOCH.checked_add(since)?;
    (unix > 0.0).then(|| crate::event::to_micros(at))
}
