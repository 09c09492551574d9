//! pulsebus: durable, ordered, searchable, deliverable JSON events beside a message broker.

#![cfg_attr(test, allow(non_snake_case, reason = "a test's name begins with its promise"))]

pub mod event;
pub mod handler;
pub mod secret;
pub mod store;
pub mod transport;
