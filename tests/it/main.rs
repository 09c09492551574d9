//! Every test that needs more than one module: one binary, so that the drivers link once.

#![cfg_attr(
    test,
    allow(
        non_snake_case,
        unreachable_pub,
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        clippy::print_stderr,
        reason = "these are tests; their names begin with the promise they hold"
    )
)]

mod amqp;
mod backup;
mod bad_input;
mod bridge;
mod cli;
mod cli_redrive;
#[path = "../conformance/mod.rs"]
mod conformance;
#[path = "../corpus/mod.rs"]
mod corpus;
mod credentials;
mod direction;
mod dispatch;
mod doctor_brokers;
mod doctor_machine;
mod e2e;
mod failing;
mod failing_daemon;
mod failing_search;
mod fidelity;
mod http;
mod ingress;
mod interop;
mod memory;
mod metrics;
mod model;
mod nats;
mod publish_safety;
mod quiet_log;
mod readme;
mod rebuild;
mod redrive;
mod reload;
mod retain;
mod ship;
mod store;
mod stuck;
mod support;
mod systemd;
mod tls;
#[cfg(feature = "otlp")]
mod tracing;
mod turns;
mod webhook;
mod webhook_daemon;
