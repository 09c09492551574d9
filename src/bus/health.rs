//! How everything is: for `/readyz`, `/v1/sources`, `/v1/handlers` and the gauges.

use std::sync::Arc;

use serde::Serialize;

use super::{EventBus, Retention, lock};
use crate::{
    dispatch::{HandlerState, Snapshot},
    store::LogHealth,
    telemetry::{HandlerLabels, SourceLabels},
    transport::SourceState,
};

/// A source at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceSnapshot {
    /// Its configured name.
    pub name: Arc<str>,
    /// The kind of its transport.
    pub transport: &'static str,
    /// How it is.
    pub state: SourceState,
    /// Messages received since the start.
    pub received: u64,
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
    /// Why, where there is a reason.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

impl EventBus {
    /// Every source.
    #[must_use]
    pub fn sources(&self) -> Vec<SourceSnapshot> {
        let health = self.inner.log.health();
        lock(&self.inner.sources)
            .iter()
            .map(|(name, running)| SourceSnapshot {
                name: Arc::clone(name),
                transport: running.transport,
                state: match (running.reporter.state(), &health) {
                    // With the store away it asks for nothing, whatever its broker does.
                    (
                        SourceState::Consuming,
                        LogHealth::Waiting(reason) | LogHealth::Failed(reason),
                    ) => SourceState::Paused(format!(
                        "the event store does not take events: {reason}"
                    )),
                    (state, _) => state,
                },
                received: self
                    .inner
                    .metrics
                    .received
                    .get_or_create_owned(&SourceLabels { source: Arc::clone(name) })
                    .get(),
            })
            .collect()
    }

    /// Every handler.
    #[must_use]
    pub fn handlers(&self) -> Vec<Snapshot> {
        lock(&self.inner.handlers).values().map(|handler| handler.status().snapshot()).collect()
    }

    /// The store, every source and every handler, and how ready each is; and what a reload left to
    /// say.
    #[must_use]
    pub fn components(&self) -> Vec<Component> {
        let (health, state, reason) = match self.inner.log.health() {
            LogHealth::Writing => (Health::Ready, "writing", None),
            LogHealth::Waiting(reason) => (Health::NotReady, "waiting", Some(reason.to_string())),
            LogHealth::Failed(reason) => (Health::NotReady, "failed", Some(reason.to_string())),
        };
        let store = Component { component: "store".to_owned(), health, state, reason };
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
            reason: source.state.reason().map(str::to_owned),
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
            reason: match handler.state.reason() {
                Some(reason) => Some(reason.to_owned()),
                None if handler.dead > 0 => Some(format!(
                    "{} dead letters wait for a person, and {} events behind them; see \
                     /v1/dead-letters",
                    handler.dead, handler.parked
                )),
                None => None,
            },
        });
        let rebuilds = self.rebuilds().into_iter().map(|rebuild| Component {
            component: format!("handler:{}", rebuild.name),
            // What serves is as ready as it was.
            health: Health::Degraded,
            state: rebuild.state.as_str(),
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

    /// Brings the gauges up to date and returns `/metrics`.
    #[must_use]
    pub fn metrics_text(&self) -> String {
        let metrics = &self.inner.metrics;
        for source in self.sources() {
            let labels = SourceLabels { source: source.name };
            let up = i64::from(source.state == SourceState::Consuming);
            metrics.source_up.get_or_create(&labels).set(up);
        }
        let head = self.inner.log.head();
        metrics.head.set(head.0);
        let signed = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
        for handler in self.handlers() {
            let labels = HandlerLabels { handler: handler.name };
            let up = i64::from(handler.state == HandlerState::Running);
            metrics.handler_up.get_or_create(&labels).set(up);
            let lag = signed(head.0.saturating_sub(handler.position.0));
            metrics.lag.get_or_create(&labels).set(lag);
            metrics.in_flight.get_or_create(&labels).set(signed(handler.in_flight));
            metrics.retrying.get_or_create(&labels).set(signed(handler.retrying));
            metrics.parked.get_or_create(&labels).set(signed(handler.parked));
        }
        metrics.encode()
    }
}
