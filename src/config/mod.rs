//! Configuration: read from file, environment and flags, checked, then plain [`Settings`].
//!
//! Three types: the raw configuration (what may be written; every key optional, unknown keys
//! refused), [`Settings`] (what holds; the bus is composed from them), and the running bus.
//!
//! Values come from, the later the stronger: the defaults; a TOML file (`--config`, else
//! `$PULSEBUS_CONFIG`, else [`DEFAULT_FILE`] where it exists); the environment, as
//! `PULSEBUS_` and the key with `__` between its parts (`PULSEBUS_HTTP__LISTEN`; a name with
//! `-` in it is written with `_`); flags.
//!
//! A secret is given in place, in a file by the key with `_file` behind it, or as a systemd
//! credential named like the key: `http.token`, `store.url`, `transports.NAME.password`. Files
//! are read again when the secret is needed. Relative paths are relative to the working
//! directory; those of `store.url` and of an index to `data_dir`.
//!
//! Everything that is wrong is reported together, each with the file and line, variable or flag
//! that said it, and no error repeats a value.

mod changes;
mod error;
mod load;
mod raw;
mod reference;
mod schema;
mod settings;
mod show;
mod text;
mod tree;
mod validate;

#[cfg(test)]
mod tests;

pub use crate::{
    dispatch::{OnDead, Ordering, Start},
    telemetry::{LogFormat, LogSettings},
};
pub use changes::Reload;
pub use error::{ConfigError, ConfigErrors};
pub use load::{DEFAULT_FILE, Flag, Inputs, Loaded, load};
pub use reference::reference;
pub use schema::schema;
pub use settings::{
    CheckpointSettings, DEFAULT_LISTEN, DeadLetterSettings, ForwardSettings, HandlerKind,
    HandlerSettings, HttpSettings, INGEST, Limits, LogLevel, ParkedSettings, RetainSettings,
    RetrySettings, Settings, SourceSettings, StoreSettings, TransportSettings, WindowSettings,
};
