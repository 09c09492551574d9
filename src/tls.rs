//! TLS settings from files: one place reads certificates and keys, and says what a failed
//! handshake means.
//!
//! Files are read at each use, so a rotated one counts from the next connection on.

use std::{
    error::Error,
    path::{Path, PathBuf},
    sync::{Arc, LazyLock},
};

use rustls::{
    CertificateError, ClientConfig, RootCertStore, ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
    server::WebPkiClientVerifier,
};

/// TLS as a client.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TlsOptions {
    /// A private certificate authority (PEM), in addition to the system's roots.
    pub ca_file: Option<PathBuf>,
    /// A client certificate (PEM), with `key_file`.
    pub cert_file: Option<PathBuf>,
    /// Its private key (PEM).
    pub key_file: Option<PathBuf>,
    /// Handshake before the server speaks (NATS `tls_first`).
    pub first: bool,
}

/// TLS as a server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerTlsOptions {
    /// The certificate, and those between it and its authority (PEM).
    pub cert_file: PathBuf,
    /// Its private key (PEM).
    pub key_file: PathBuf,
    /// Clients must show a certificate that this authority has signed (PEM); `None`: none.
    pub client_ca_file: Option<PathBuf>,
}

/// Why there are no TLS settings.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read, or holds nothing of the kind.
    #[error("cannot read {what} from {}: {reason}", path.display())]
    File {
        /// What it should hold.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// A client certificate without its key, or a key without its certificate.
    #[error("a client certificate needs both cert_file and key_file")]
    Half,
    /// What clients' certificates would be checked with cannot be used.
    #[error("cannot check certificates of clients with {}: {reason}", path.display())]
    ClientAuthority {
        /// The file of the authority.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// Certificate and key do not belong together, or are of a kind that cannot be used.
    #[error("certificate and key do not fit: {0}")]
    Unfit(rustls::Error),
}

/// The system's certificate authorities; read once, since they change with the system and reading
/// them takes long.
static SYSTEM: LazyLock<RootCertStore> = LazyLock::new(|| {
    let found = rustls_native_certs::load_native_certs();
    for error in &found.errors {
        tracing::warn!(%error, "a certificate authority of the system cannot be read");
    }
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(found.certs);
    roots
});

/// What a client handshakes with.
///
/// # Errors
/// See [`TlsError`].
pub fn client_config(options: &TlsOptions) -> Result<ClientConfig, TlsError> {
    let mut roots = SYSTEM.clone();
    if let Some(path) = &options.ca_file {
        let what = "a certificate authority";
        for certificate in certificates(what, path)? {
            roots.add(certificate).map_err(|error| file(what, path, &error))?;
        }
    }
    let builder = ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(TlsError::Unfit)?
        .with_root_certificates(roots);
    match (&options.cert_file, &options.key_file) {
        (None, None) => Ok(builder.with_no_client_auth()),
        (Some(certificate), Some(key)) => builder
            .with_client_auth_cert(
                certificates("a client certificate", certificate)?,
                private_key(key)?,
            )
            .map_err(TlsError::Unfit),
        _ => Err(TlsError::Half),
    }
}

/// What a server of HTTP/1.1 handshakes with.
///
/// # Errors
/// See [`TlsError`].
pub fn server_config(options: &ServerTlsOptions) -> Result<ServerConfig, TlsError> {
    let builder = ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(TlsError::Unfit)?;
    let builder = match &options.client_ca_file {
        None => builder.with_no_client_auth(),
        Some(path) => {
            let what = "a certificate authority";
            let mut roots = RootCertStore::empty();
            for certificate in certificates(what, path)? {
                roots.add(certificate).map_err(|error| file(what, path, &error))?;
            }
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider())
                .build()
                .map_err(|error| TlsError::ClientAuthority {
                    path: path.clone(),
                    reason: error.to_string(),
                })?;
            builder.with_client_cert_verifier(verifier)
        }
    };
    let mut config = builder
        .with_single_cert(
            certificates("a certificate", &options.cert_file)?,
            private_key(&options.key_file)?,
        )
        .map_err(TlsError::Unfit)?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(config)
}

/// The one provider of cryptography there is.
#[must_use]
pub fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    static RING: LazyLock<Arc<rustls::crypto::CryptoProvider>> =
        LazyLock::new(|| Arc::new(rustls::crypto::ring::default_provider()));
    Arc::clone(&RING)
}

/// The certificates of a PEM file; at least one.
///
/// # Errors
/// Where the file cannot be read or holds none.
pub fn certificates(
    what: &'static str,
    path: &Path,
) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let found: Vec<_> = CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect)
        .map_err(|error| file(what, path, &error))?;
    if found.is_empty() {
        return Err(file(what, path, &"it holds no certificate in PEM form"));
    }
    Ok(found)
}

/// The first private key of a PEM file.
///
/// # Errors
/// Where the file cannot be read or holds none.
pub fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    PrivateKeyDer::from_pem_file(path).map_err(|error| file("a private key", path, &error))
}

fn file(what: &'static str, path: &Path, reason: &impl ToString) -> TlsError {
    TlsError::File { what, path: path.to_owned(), reason: reason.to_string() }
}

/// What a failed connection means where TLS is the reason, in words for whoever set it up:
/// which certificate is refused by whom, and what to change. `None` where it is something else.
#[must_use]
pub fn explain(error: &(dyn Error + 'static)) -> Option<String> {
    explain_with(error, "tls.ca_file")
}

/// The same where the authority's certificate is not given as `tls.ca_file`, but by `ca`.
#[must_use]
pub fn explain_with(error: &(dyn Error + 'static), ca: &str) -> Option<String> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(error) = error.downcast_ref::<rustls::Error>() {
            return Some(words(error, ca));
        }
        // An `io::Error` hides what it was made of from `source`.
        if let Some(inner) = error.downcast_ref::<std::io::Error>().and_then(|e| e.get_ref())
            && let Some(found) = explain_with(inner, ca)
        {
            return Some(found);
        }
        next = error.source();
    }
    None
}

fn words(error: &rustls::Error, ca: &str) -> String {
    use rustls::{AlertDescription as Alert, Error as Tls};
    match error {
        Tls::InvalidCertificate(error) => match error {
            CertificateError::UnknownIssuer => format!(
                "the server's certificate is signed by an unknown authority; name its \
                 certificate as {ca}"
            ),
            CertificateError::BadSignature => format!(
                "the server's certificate is signed by another authority of the same name as \
                 the one in {ca}; was that made anew?"
            ),
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
                format!("the server's certificate is for another name than the url's host: {error}")
            }
            CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
                format!("the server's certificate has expired: {error}")
            }
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
                format!("the server's certificate is not valid yet: {error}")
            }
            error => format!("the server's certificate is refused: {error}"),
        },
        Tls::InvalidMessage(_) => "the server does not speak TLS on this port".to_owned(),
        Tls::AlertReceived(
            Alert::CertificateRequired
            | Alert::BadCertificate
            | Alert::UnknownCA
            | Alert::CertificateExpired
            | Alert::CertificateUnknown
            | Alert::AccessDenied,
        ) => {
            format!("the server refuses our client certificate, or wants one: {error}")
        }
        error => format!("the TLS handshake failed: {error}"),
    }
}

/// What it may mean that a server hangs up in the middle of a handshake, where that is what the
/// error says: one that refuses a client may close the connection before its reason is read.
#[must_use]
pub fn hung_up(error: &(dyn Error + 'static), options: &TlsOptions) -> Option<&'static str> {
    use std::io::ErrorKind;
    let mut next = Some(error);
    loop {
        let error = next?;
        if let Some(error) = error.downcast_ref::<std::io::Error>()
            && matches!(
                error.kind(),
                ErrorKind::ConnectionReset
                    | ErrorKind::ConnectionAborted
                    | ErrorKind::BrokenPipe
                    | ErrorKind::UnexpectedEof
            )
        {
            return Some(if options.cert_file.is_some() {
                "the server may refuse our client certificate; its log says why"
            } else {
                "the server may want a client certificate: set tls.cert_file and tls.key_file"
            });
        }
        // An `io::Error` hides what it was made of from `source`.
        if let Some(inner) = error.downcast_ref::<std::io::Error>().and_then(|e| e.get_ref())
            && let Some(found) = hung_up(inner, options)
        {
            return Some(found);
        }
        next = error.source();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_holds_nothing_of_the_kind_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ca.pem");
        let options = TlsOptions { ca_file: Some(path.clone()), ..TlsOptions::default() };
        let error = client_config(&options).unwrap_err().to_string();
        assert!(error.contains("ca.pem") && error.contains("authority"), "{error}");
        std::fs::write(&path, "nothing").unwrap();
        let error = client_config(&options).unwrap_err().to_string();
        assert!(error.contains("no certificate"), "{error}");
        let half = TlsOptions { cert_file: Some(path), ..TlsOptions::default() };
        assert!(matches!(client_config(&half), Err(TlsError::Half)));
    }

    #[test]
    fn the_reason_is_found_however_deep_it_is() {
        let refused = rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer);
        let inner = std::io::Error::new(std::io::ErrorKind::InvalidData, refused);
        let outer = std::io::Error::other(inner);
        assert!(explain(&outer).unwrap().contains("ca_file"));
        assert_eq!(explain(&std::io::Error::other("else")), None);
    }
}
