//! `log`: writes events to the daemon's log.
