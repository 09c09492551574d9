//! The daemon under systemd: what it tells it, and the files that systemd reads.

mod notify;
mod pulses;
