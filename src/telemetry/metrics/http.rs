//! The HTTP API.

use std::{sync::Arc, time::Duration};

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family},
    registry::{Registry, Unit},
};

use super::{Histograms, work};

/// A route of the API.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct RouteLabels {
    /// As it is written in the API's description, parameters by name; `other` for paths that are
    /// none.
    pub route: Arc<str>,
}

/// A route, and how requests to it ended.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct RequestLabels {
    /// See [`RouteLabels::route`].
    pub route: Arc<str>,
    /// `1xx` to `5xx`.
    pub status: &'static str,
}

/// The HTTP API.
#[derive(Debug, Clone)]
pub struct HttpMetrics {
    /// Requests answered.
    pub requests: Family<RequestLabels, Counter>,
    /// Until an answer began: one observation a request.
    pub seconds: Histograms<RouteLabels>,
}

impl Default for HttpMetrics {
    fn default() -> Self {
        Self { requests: Family::default(), seconds: Histograms::new_with_constructor(work) }
    }
}

impl HttpMetrics {
    pub(super) fn register(&self, registry: &mut Registry) {
        let r = registry.sub_registry_with_prefix("http");
        r.register("requests", "Requests answered by the HTTP API", self.requests.clone());
        r.register_with_unit(
            "request",
            "Time until the HTTP API begins its answer",
            Unit::Seconds,
            self.seconds.clone(),
        );
    }

    /// A request has been answered.
    pub(crate) fn answered(&self, route: &str, status: u16, took: Duration) {
        let route: Arc<str> = route.into();
        let class = match status {
            100..=199 => "1xx",
            200..=299 => "2xx",
            300..=399 => "3xx",
            400..=499 => "4xx",
            _ => "5xx",
        };
        let labels = RequestLabels { route: Arc::clone(&route), status: class };
        self.requests.get_or_create(&labels).inc();
        self.seconds.get_or_create(&RouteLabels { route }).observe(took.as_secs_f64());
    }
}
