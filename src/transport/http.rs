//! HTTP: the ingest endpoint's way in.
