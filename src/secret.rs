//! Secrets: given in place or in a file, read when they are needed, never printed.

use std::{fmt, fs, io, path::PathBuf};

/// A password, token or key.
#[derive(Clone, PartialEq, Eq)]
pub enum Secret {
    /// Given in the configuration or an environment variable.
    Inline(String),
    /// In a file, read anew each time, so that a rotated file is picked up.
    File(PathBuf),
}

impl Secret {
    /// The secret itself; one trailing line break of a file is not part of it.
    ///
    /// # Errors
    /// Where the file cannot be read; the error names it.
    pub fn read(&self) -> io::Result<String> {
        match self {
            Self::Inline(secret) => Ok(secret.clone()),
            Self::File(path) => {
                let mut text = fs::read_to_string(path).map_err(|error| {
                    io::Error::new(error.kind(), format!("cannot read {}: {error}", path.display()))
                })?;
                if text.ends_with('\n') {
                    text.pop();
                    if text.ends_with('\r') {
                        text.pop();
                    }
                }
                Ok(text)
            }
        }
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Inline(_) => f.write_str("Inline(…)"),
            Self::File(path) => f.debug_tuple("File").field(path).finish(),
        }
    }
}
