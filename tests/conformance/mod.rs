//! Conformance suites: each contract, clause by clause, against every implementation.

pub(crate) mod progress;
pub(crate) mod retain;
pub(crate) mod store;
pub(crate) mod transport;
