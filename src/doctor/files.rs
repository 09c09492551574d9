//! Folders that must be writable, and files that hold secrets.

use std::{
    fs,
    io::ErrorKind,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use rustix::fs::Access;

use super::{Finding, Severity, disk};
use crate::{
    config::{Settings, StoreSettings, TransportSettings},
    finding::SYSTEM,
    secret::Secret,
    tls::TlsOptions,
};

/// Looks at the data folder.
pub(super) fn data_dir(path: &Path) -> Vec<Finding> {
    let shown = path.display();
    let error = |what: String, why: &str, mend: String| {
        vec![Finding::of(Severity::Error, SYSTEM, "machine-data-dir", what, why, mend)]
    };
    let why = "the log, the search indexes and this daemon's name are kept there: it does not \
               start, or waits";
    let metadata = match fs::metadata(path) {
        Ok(metadata) => metadata,
        Err(missing) if missing.kind() == ErrorKind::NotFound => {
            // Made at the first start, where that is possible.
            let above = disk::existing(path).map(|(above, _)| above);
            return match above {
                Some(above) if !is_writable(&above) => error(
                    format!(
                        "data_dir {shown} does not exist and cannot be made: {} is not writable \
                         for this user",
                        above.display()
                    ),
                    why,
                    format!("make the folder {shown} and give it to the user pulsebus runs as"),
                ),
                _ => Vec::new(),
            };
        }
        Err(unreadable) => {
            return error(
                format!("data_dir {shown} cannot be looked at: {unreadable}"),
                why,
                "let the user pulsebus runs as into the folders above it".to_owned(),
            );
        }
    };
    if !metadata.is_dir() {
        return error(
            format!("data_dir {shown} is no folder"),
            why,
            "set data_dir to a folder".to_owned(),
        );
    }
    if !is_writable(path) {
        return error(
            format!(
                "data_dir {shown} is not writable for this user (owner {}, mode {:03o})",
                metadata.uid(),
                metadata.mode() & 0o777
            ),
            why,
            format!(
                "chown it to the user pulsebus runs as; if that is not the user doctor runs as \
                 now, run doctor as that one: sudo -u USER pulsebus doctor, not {}",
                user()
            ),
        );
    }
    if metadata.mode() & 0o002 != 0 {
        return vec![Finding::of(
            Severity::Warning,
            SYSTEM,
            "machine-data-dir",
            format!("data_dir {shown} is writable for everybody on this machine"),
            "anybody can replace the log and the indexes",
            format!("chmod o-w {shown}"),
        )];
    }
    Vec::new()
}

/// Whether this user may make files there.
pub(super) fn is_writable(path: &Path) -> bool {
    rustix::fs::access(path, Access::WRITE_OK | Access::EXEC_OK).is_ok()
}

/// Who runs this, by number.
pub(super) fn user() -> u32 {
    fs::metadata("/proc/self").map_or(u32::MAX, |process| process.uid())
}

/// Looks at every file that holds a secret.
pub(super) fn secrets(settings: &Settings) -> Vec<Finding> {
    let mut files = Vec::new();
    let mut add = |key: String, path: Option<&PathBuf>| {
        if let Some(path) = path {
            files.push((key, path.clone()));
        }
    };
    add("http.token".to_owned(), file(settings.http.token.as_ref()));
    let http_key = settings.http.tls.as_ref().map(|tls| &tls.key_file);
    add("http.tls.key_file".to_owned(), http_key);
    if let StoreSettings::Postgres { url, tls, .. } = &settings.store {
        add("store.url".to_owned(), file(Some(url)));
        add("store.tls.key_file".to_owned(), key_file(tls.as_ref()));
    }
    for (name, transport) in &settings.transports {
        let mut of = |member: &str, path: Option<&PathBuf>| {
            add(format!("transports.{name}.{member}"), path);
        };
        match transport {
            TransportSettings::Nats(nats) => {
                of("url", file(Some(&nats.url)));
                of("credentials_file", nats.credentials_file.as_ref());
                of("nkey", file(nats.nkey.as_ref()));
                of("token", file(nats.token.as_ref()));
                of("password", file(nats.password.as_ref()));
                of("tls.key_file", key_file(nats.tls.as_ref()));
            }
            TransportSettings::Amqp(amqp) => {
                of("url", file(Some(&amqp.url)));
                of("password", file(amqp.password.as_ref()));
                of("tls.key_file", key_file(amqp.tls.as_ref()));
            }
            TransportSettings::Http(http) => {
                of("url", file(Some(&http.url)));
                of("secret", file(http.secret.as_ref()));
                of("token", file(http.token.as_ref()));
                of("tls.key_file", key_file(http.tls.as_ref()));
            }
            TransportSettings::Memory => {}
        }
    }
    files.iter().filter_map(|(key, path)| secret(key, path)).collect()
}

const fn file(secret: Option<&Secret>) -> Option<&PathBuf> {
    match secret {
        Some(Secret::File(path)) => Some(path),
        _ => None,
    }
}

fn key_file(tls: Option<&TlsOptions>) -> Option<&PathBuf> {
    tls?.key_file.as_ref()
}

fn secret(key: &str, path: &Path) -> Option<Finding> {
    let shown = path.display();
    let unusable = |what: String, mend: String| {
        Some(Finding::of(
            Severity::Error,
            SYSTEM,
            "machine-secret",
            what,
            "whatever it is for is refused: the API, the database, a broker or a receiver",
            mend,
        ))
    };
    let content = match fs::read(path) {
        Ok(content) => content,
        Err(error) => {
            return unusable(
                format!("{key}: {shown} cannot be read: {error}"),
                format!("put the secret there, and let the user pulsebus runs as read it ({key})"),
            );
        }
    };
    if content.trim_ascii().is_empty() {
        return unusable(format!("{key}: {shown} is empty"), "put the secret into it".to_owned());
    }
    is_public(path).then(|| {
        Finding::of(
            Severity::Warning,
            SYSTEM,
            "machine-secret",
            format!("{key}: {shown} can be read by everybody on this machine"),
            "each user and each service here can use the secret",
            format!("chmod o= {shown}; the user pulsebus runs as must own it or be in its group"),
        )
    })
}

/// Whether everybody may read a file: it says so itself, and so does each folder on the way.
fn is_public(path: &Path) -> bool {
    let Ok(path) = fs::canonicalize(path) else { return false };
    let may = |path: &Path, bit: u32| {
        fs::metadata(path).is_ok_and(|metadata| metadata.permissions().mode() & bit != 0)
    };
    may(&path, 0o004) && path.ancestors().skip(1).all(|folder| may(folder, 0o001))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(path: &Path, mode: u32) {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn a_secret_is_public_only_where_everybody_gets_to_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("token");
        fs::write(&path, "s3cret").unwrap();
        set(folder.path(), 0o755);
        set(&path, 0o644);
        let finding = secret("http.token", &path).unwrap();
        assert_eq!((finding.severity, finding.check), (Severity::Warning, "machine-secret"));
        assert!(!format!("{finding:?}").contains("s3cret"));
        // What it says to do helps.
        set(&path, 0o640);
        assert_eq!(secret("http.token", &path), None);
        set(&path, 0o644);
        set(folder.path(), 0o750);
        assert_eq!(secret("http.token", &path), None, "nobody else gets into its folder");
    }

    #[test]
    fn a_secret_that_is_not_there_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("token");
        assert_eq!(secret("http.token", &path).unwrap().severity, Severity::Error);
        fs::write(&path, " \n").unwrap();
        assert!(secret("http.token", &path).unwrap().what.contains("empty"));
    }

    #[test]
    fn a_data_folder_is_judged_by_whether_it_can_be_used() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(data_dir(&folder.path().join("new/deep")), []);
        assert_eq!(data_dir(folder.path()), []);
        let file = folder.path().join("file");
        fs::write(&file, "").unwrap();
        assert!(data_dir(&file)[0].what.contains("no folder"));
        set(folder.path(), 0o777);
        assert_eq!(data_dir(folder.path())[0].severity, Severity::Warning);
    }
}
