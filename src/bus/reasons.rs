//! Why something waits, in words, and what a person can do about it.

use std::fmt::Write as _;

use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use crate::{
    dispatch::{HandlerState, Snapshot},
    transport::SourceState,
};

/// A call that takes this long is worth a word.
const LONG: time::Duration = time::Duration::seconds(10);

/// The store is away.
pub(super) fn store_away(reason: &str) -> String {
    format!(
        "{reason}; nothing is acknowledged, and it is tried again by itself: check the database, \
         its disk and its network"
    )
}

/// The store has failed for good.
pub(super) fn store_failed(reason: &str) -> String {
    format!("{reason}; this process ends: mend the store, or restore it, and start it again")
}

/// Why a source does not consume.
pub(super) fn source(state: &SourceState) -> Option<String> {
    Some(match state {
        SourceState::Consuming | SourceState::Stopped => return None,
        SourceState::Starting => {
            "it is being opened; if this lasts, its broker or the store does not answer".to_owned()
        }
        SourceState::Recovering => "it reads again what had been delivered and not committed; it \
                                    goes on by itself"
            .to_owned(),
        SourceState::Standby(reason) => reason.clone(),
        SourceState::Paused(reason) => {
            format!("{reason}; it goes on by itself when the store is back")
        }
        SourceState::Reconnecting(reason) => format!(
            "{reason}; it is tried again by itself: check that the broker runs and can be reached"
        ),
        SourceState::Misconfigured(reason) => {
            format!(
                "{reason}; it is tried again, but the configuration or the broker has to change"
            )
        }
    })
}

/// Why a handler does not go on, or what in it waits.
pub(super) fn handler(handler: &Snapshot) -> Option<String> {
    let name = &*handler.name;
    Some(match &handler.state {
        HandlerState::Stopped => return None,
        HandlerState::Running => return waiting(handler),
        HandlerState::Starting => {
            "its progress is being read; if this lasts, the store does not answer".to_owned()
        }
        HandlerState::Paused => {
            format!("a person has paused it; `pulsebus handlers resume {name}` lets it go on")
        }
        HandlerState::Standby(reason) | HandlerState::Failed(reason) => reason.clone(),
        HandlerState::Unavailable(reason) => format!(
            "its target is down: {reason}; no attempt is spent, and it is tried again by itself: \
             check the target"
        ),
        HandlerState::Stalled(reason) => match waiting(handler) {
            Some(more) => format!("{reason}; {more}"),
            None => reason.clone(),
        },
        HandlerState::Waiting(reason) => format!("{reason}; it is tried again by itself"),
    })
}

/// What waits in a handler that runs.
fn waiting(handler: &Snapshot) -> Option<String> {
    let Snapshot { name, dead, parked, retrying, .. } = handler;
    let mut text = String::new();
    let mut say = |clause: std::fmt::Arguments<'_>| {
        // Writing to a string does not fail.
        let _ = write!(text, "{}{clause}", if text.is_empty() { "" } else { "; " });
    };
    if *dead > 0 {
        say(format_args!(
            "{dead} dead letters wait for a person, and {parked} events behind them or behind a \
             failed one; see `pulsebus dead-letters list --handler {name}`"
        ));
    }
    if *retrying > 0 {
        say(format_args!("{retrying} keys wait for another attempt"));
        if *dead == 0 && *parked > 0 {
            say(format_args!("{parked} events wait behind them"));
        }
        if let Some(due) = handler.next_retry {
            say(format_args!("the next is due at {}", rfc3339(due)));
        }
        if let Some((error, _)) = &handler.last_error {
            say(format_args!("the last error: {error}"));
        }
    }
    if let Some((position, begun)) = handler.oldest_call {
        let lasts = OffsetDateTime::now_utc() - begun;
        if lasts >= LONG {
            say(format_args!(
                "the call for position {position} has been under way for {} s",
                lasts.whole_seconds()
            ));
        }
    }
    (!text.is_empty()).then_some(text)
}

fn rfc3339(at: OffsetDateTime) -> String {
    let seconds = at.replace_nanosecond(0).unwrap_or(at);
    seconds.format(&Rfc3339).unwrap_or_default()
}
