//! pulsebus: durable, ordered, searchable, deliverable JSON events beside a message broker.
//!
//! ```text
//! NATS JetStream ─┐                          ┌─▶ search   its own cursor
//! RabbitMQ ───────┼─▶ ingest ─▶ EVENT LOG ───┼─▶ forward  its own cursor
//! HTTP, emit() ───┘   append,   memory       └─▶ yours    its own cursor
//!                     commit,   SQLite
//!                     then ack  Postgres
//! ```
//!
//! The daemon, `pulsebus`, is this library with a configuration file, an HTTP server and a
//! command line. In a program of your own, [`bus::EventBus`] is where to begin.
//!
//! # A first example
//!
//! Register the search index, emit a lesson, wait until it is handled, find it, and read the
//! log back typed:
//!
//! ```
//! use std::{collections::BTreeMap, sync::Arc, time::Duration};
//!
//! use futures_util::TryStreamExt as _;
//! use pulsebus::{
//!     bus::EventBus,
//!     dispatch::HandlerOptions,
//!     event::{DomainEvent, UnixTimestamp},
//!     handler::search::{DocumentMapping, SearchHandler, SearchOptions, SearchQuery},
//!     store::sqlite::{SqliteOptions, SqliteStore},
//! };
//! use uuid::Uuid;
//!
//! # #[tokio::main]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let folder = tempfile::tempdir()?;
//! let store = SqliteStore::open(SqliteOptions::new(folder.path().join("events.db"))).await?;
//! let bus = EventBus::builder().store(store).build().await?;
//!
//! // Which events become documents, and of what: JSON pointers into the event's data.
//! let lesson = DocumentMapping {
//!     id: "/lesson_id".to_owned(),
//!     text: BTreeMap::from([("title".to_owned(), "/title".to_owned())]),
//!     ..DocumentMapping::default()
//! };
//! let search = Arc::new(SearchHandler::open(
//!     "search",
//!     SearchOptions {
//!         documents: BTreeMap::from([("LessonPublished".to_owned(), lesson)]),
//!         ..SearchOptions::new(folder.path().join("search"))
//!     },
//! )?);
//! bus.register_handler_with(Arc::clone(&search) as _, HandlerOptions::default()).await?;
//! bus.start_worker_pool(4);
//!
//! let published = DomainEvent::LessonPublished {
//!     lesson_id: Uuid::new_v4(),
//!     title: "Photosynthesis for beginners".to_owned(),
//!     author_id: Uuid::new_v4(),
//!     published_at: UnixTimestamp::now(),
//! };
//! // Resolves when it is committed: a crash from here on loses nothing.
//! let emitted = bus.emit(published.clone()).await?;
//! assert_eq!((emitted.position.0, emitted.duplicate), (1, false));
//!
//! // Resolves when the handler has done it, and would not do it again after a crash.
//! bus.handled("search", emitted.position).await?;
//! let found = search.search(&SearchQuery::new("photosynthesis")).await?;
//! assert_eq!(found.total, 1);
//! assert_eq!(found.hits[0].position, emitted.position);
//!
//! let log: Vec<_> = bus.store().stream_all::<DomainEvent>().try_collect().await?;
//! assert_eq!(log, [(emitted.position, published)]);
//!
//! bus.drain(Duration::from_secs(5)).await?;
//! # Ok(()) }
//! ```
//!
//! # The map
//!
//! | module | what it is | its contract |
//! |---|---|---|
//! | [`event`] | bytes in, [`event::Event`] out: CloudEvents attributes, identity, key | the body is never changed |
//! | [`transport`] | where messages come from and go to: NATS, RabbitMQ, HTTP, memory | C1-C11, P1-P6 |
//! | [`store`] | where the log is kept: SQLite, Postgres, memory; [`store::Log`], its one writer | S1-S15, D1-D8 |
//! | [`ingest`] | source to log: take, decode, append, commit, then settle | |
//! | [`handler`] | what is done with events: the trait, `search`, `forward`, `log` | H1-H6 |
//! | [`dispatch`] | log to handlers: window, lanes, retry, checkpoint | the states of a (handler, event) |
//! | [`bus`] | puts these together; starts, drains | |
//! | [`config`] | file, environment, flags; checked settings | |
//! | [`api`] | the HTTP server | |
//! | [`doctor`] | looks at live brokers, stores and targets | |
//! | [`telemetry`] | logs and metrics | |
//! | [`retry`], [`secret`], [`tls`] | how soon to try again; what must not be printed; certificates from files | |
//!
//! A contract is a numbered list at the trait. A test that holds an implementation to a clause
//! is named after it.
//!
//! # What always holds
//!
//! * A delivery is settled only after the log has committed it (G1).
//! * An event is in the log once for each `(source, id)` (G2), and positions are 1, 2, 3 …
//!   without a gap (G3).
//! * A cursor passes unfinished work only together with a row that says what it waits for (G6).
//! * Events of one key reach a handler one after the other, in log order (G5).
//! * Everything that is held is bounded; at the bound the one before it waits, and nothing is
//!   dropped (G7).
//! * Every task belongs to something that waits for it to end; none is detached.
//!
//! The promises G1 to G9 are in the README, the reasons in ARCHITECTURE.md.

#![cfg_attr(test, allow(non_snake_case, reason = "a test's name begins with its promise"))]

pub mod api;
pub mod bus;
pub mod config;
pub mod dispatch;
pub mod doctor;
pub mod event;
mod finding;
pub mod handler;
pub mod ingest;
pub mod retry;
pub mod secret;
pub mod store;
pub mod telemetry;
pub mod tls;
pub mod transport;

/// The code in docs/extending.md, compiled and run.
#[cfg(doctest)]
#[doc = include_str!("../docs/extending.md")]
mod extending {}
