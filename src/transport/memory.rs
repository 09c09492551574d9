//! The reference transport: everything in this process, for tests and embedding.
