//! What `/metrics` exports; `docs/metrics.md` says what each series means.
//!
//! Labels are names from the configuration, or words of closed vocabularies, so their number is
//! bounded. Counters are moved once a batch, never once an event, and histograms observe once a
//! batch as well. Gauges are set when somebody asks.

mod handler;
mod http;
mod log;
mod process;
mod source;
mod text;

use std::{fmt, sync::Arc, sync::atomic::AtomicU64};

use prometheus_client::{
    encoding::{EncodeLabelSet, text as openmetrics},
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram, info::Info},
    registry::Registry,
};

pub use self::{
    handler::{HandlerLabels, HandlerMetrics, HandlerStateLabels, OutcomeLabels, RedrivenLabels},
    http::{HttpMetrics, RequestLabels, RouteLabels},
    log::{ConnectionLabels, LogMetrics, ReadLabels},
    source::{SourceLabels, SourceMetrics, SourceStateLabels},
    text::TextFormat,
};

/// A number that goes up and down, and has a fraction.
pub type Float = Gauge<f64, AtomicU64>;

/// How long something may take that is done for a batch.
const WORK: [f64; 17] = [
    0.0001, 0.000_25, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5,
    5.0, 10.0, 30.0,
];

/// How old an event may be: from a few milliseconds to a day.
const AGE: [f64; 17] = [
    0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0, 300.0, 1800.0,
    7200.0, 86400.0,
];

fn work() -> Histogram {
    Histogram::new(WORK)
}

fn age() -> Histogram {
    Histogram::new(AGE)
}

type Histograms<L> = Family<L, Histogram, fn() -> Histogram>;

/// The part of the bus that a claim is for.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ComponentLabels {
    /// `source:NAME` or `handler:NAME`, as in `/readyz`.
    pub component: Arc<str>,
}

/// Claims: which part of the bus this process runs.
#[derive(Debug, Clone, Default)]
pub struct LeaseMetrics {
    /// Whether this process has it: 1 or 0.
    pub held: Family<ComponentLabels, Gauge>,
    /// The epoch of its last claim by this process.
    pub epoch: Family<ComponentLabels, Gauge<u64, AtomicU64>>,
    /// Claims taken that another process had when this one asked first.
    pub takeovers: Family<ComponentLabels, Counter>,
}

impl LeaseMetrics {
    fn register(&self, registry: &mut Registry) {
        let r = registry.sub_registry_with_prefix("lease");
        r.register("held", "Whether this process runs the component", self.held.clone());
        r.register(
            "epoch",
            "Number of the component's last claim by this process",
            self.epoch.clone(),
        );
        r.register(
            "takeovers",
            "Claims taken of components that another process ran before",
            self.takeovers.clone(),
        );
    }

    /// It is this process's now; `after` whether another had it when this one began to ask.
    pub(crate) fn taken(&self, component: &ComponentLabels, epoch: u64, after: bool) {
        self.held.get_or_create(component).set(1);
        self.epoch.get_or_create(component).set(epoch);
        self.takeovers.get_or_create(component).inc_by(u64::from(after));
    }

    /// It is not, or no longer.
    pub(crate) fn lost(&self, component: &ComponentLabels) {
        self.held.get_or_create(component).set(0);
    }
}

/// Every metric of a bus. Cheap to clone: clones share their values.
#[derive(Clone)]
pub struct Metrics {
    registry: Arc<Registry>,
    /// What comes in.
    pub source: SourceMetrics,
    /// The log and its store.
    pub log: LogMetrics,
    /// What becomes of it.
    pub handler: HandlerMetrics,
    /// Which parts this process runs.
    pub lease: LeaseMetrics,
    /// The HTTP API.
    pub http: HttpMetrics,
}

impl Default for Metrics {
    fn default() -> Self {
        let mut metrics = Self {
            registry: Arc::default(),
            source: SourceMetrics::default(),
            log: LogMetrics::default(),
            handler: HandlerMetrics::default(),
            lease: LeaseMetrics::default(),
            http: HttpMetrics::default(),
        };
        let mut registry = Registry::default();
        // Names that every exporter shares, and so without a prefix.
        process::register(&mut registry);
        let ours = registry.sub_registry_with_prefix("pulsebus");
        let build = vec![("version", env!("CARGO_PKG_VERSION"))];
        ours.register("build", "The version that runs", Info::new(build));
        metrics.source.register(ours);
        metrics.log.register(ours);
        metrics.handler.register(ours);
        metrics.lease.register(ours);
        metrics.http.register(ours);
        metrics.registry = Arc::new(registry);
        metrics
    }
}

impl Metrics {
    /// All of it, in this format.
    #[must_use]
    pub fn encode(&self, format: TextFormat) -> String {
        let mut text = String::new();
        if openmetrics::encode(&mut text, &self.registry).is_err() {
            // Writing to a String fails only if an encoder of ours does; half a page is worse
            // for a scraper than none.
            text.clear();
        }
        format.written(text)
    }
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Metrics").finish_non_exhaustive()
    }
}
