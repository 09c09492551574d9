//! Keys that do not flow, for a person who asks why.

use std::{sync::Arc, time::Instant};

use time::OffsetDateTime;

use super::lanes::{Blocked, Turn};
use crate::{event::Position, store::progress::Failure};

/// What a key waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cause {
    /// Its first event failed, and is due again then.
    Retrying {
        /// When.
        due_at: OffsetDateTime,
    },
    /// Its first event is a dead letter: a person decides.
    Dead,
}

/// A key that does not flow, and the event that keeps it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockedKey {
    /// The key, as far as the handler keeps it in order; `None` where only the store knows it.
    pub key: Option<Arc<str>>,
    /// The event's position.
    pub position: Position,
    /// How often it was tried.
    pub attempts: u32,
    /// What it waits for.
    pub cause: Cause,
    /// How it failed; `None` where only the store knows it.
    pub failure: Option<Failure>,
    /// How many events of its key wait behind it.
    pub followers: u64,
}

impl BlockedKey {
    pub(super) fn of(lane: Blocked, key: Option<Arc<str>>) -> Self {
        let Blocked { entry, followers } = lane;
        let cause = match entry.turn {
            Turn::Dead => Cause::Dead,
            Turn::At(at) => Cause::Retrying { due_at: to_utc(at) },
            Turn::Now => Cause::Retrying { due_at: crate::event::now() },
        };
        Self {
            key,
            position: entry.position,
            attempts: entry.track.attempts,
            cause,
            failure: entry.track.failure.map(|failure| *failure),
            followers,
        }
    }
}

/// A moment of this process's clock, as the log keeps time.
pub(super) fn to_utc(at: Instant) -> OffsetDateTime {
    let (now, utc) = (Instant::now(), crate::event::now());
    let moved = match at.checked_duration_since(now) {
        Some(later) => utc.checked_add(later.try_into().unwrap_or_default()),
        None => utc.checked_sub((now - at).try_into().unwrap_or_default()),
    };
    crate::event::to_micros(moved.unwrap_or(utc))
}
