//! The daemon under systemd: what it tells it, and the files that systemd reads.

mod files;
mod notify;
mod pulses;
