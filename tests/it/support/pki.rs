//! Certificates made on the spot: an authority, and what it signs.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, date_time_ymd,
};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;

use super::process;

/// The names that the servers of the tests have.
const NAMES: [&str; 2] = ["127.0.0.1", "localhost"];

/// A certificate and its key, as files.
#[derive(Debug, Clone)]
pub(crate) struct Pair {
    pub(crate) cert: PathBuf,
    pub(crate) key: PathBuf,
}

impl Pair {
    /// Puts another pair in this one's place, as a renewal does.
    pub(crate) fn replace_with(&self, other: &Self) {
        for (from, to) in [(&other.key, &self.key), (&other.cert, &self.cert)] {
            let beside = to.with_extension("new");
            fs::copy(from, &beside).unwrap();
            fs::rename(&beside, to).unwrap();
        }
    }

    /// A copy under other names.
    pub(crate) fn copy(&self, folder: &Path) -> Self {
        let copy = Self { cert: folder.join("copy.pem"), key: folder.join("copy.key") };
        copy.replace_with(self);
        copy
    }
}

/// An authority of a test's own.
pub(crate) struct Pki {
    pub(crate) folder: PathBuf,
    pub(crate) ca: PathBuf,
    issuer: Issuer<'static, KeyPair>,
    count: AtomicUsize,
}

impl Pki {
    pub(crate) fn new() -> Self {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        Self::named(&format!("authority {}", COUNT.fetch_add(1, Ordering::Relaxed)))
    }

    /// Several may have one name.
    pub(crate) fn named(name: &str) -> Self {
        let folder = process::folder("pki");
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
        let key = KeyPair::generate().unwrap();
        let ca = folder.join("ca.pem");
        fs::write(&ca, params.self_signed(&key).unwrap().pem()).unwrap();
        Self { folder, ca, issuer: Issuer::new(params, key), count: AtomicUsize::new(0) }
    }

    /// For a server on this machine.
    pub(crate) fn server(&self) -> Pair {
        self.sign("server", &NAMES, ExtendedKeyUsagePurpose::ServerAuth, false)
    }

    /// For a server that has another name.
    pub(crate) fn elsewhere(&self) -> Pair {
        let names = ["broker.elsewhere.example"];
        self.sign("elsewhere", &names, ExtendedKeyUsagePurpose::ServerAuth, false)
    }

    /// For a server on this machine, until 2020.
    pub(crate) fn expired(&self) -> Pair {
        self.sign("expired", &NAMES, ExtendedKeyUsagePurpose::ServerAuth, true)
    }

    /// For a client of this common name.
    pub(crate) fn client(&self, name: &str) -> Pair {
        self.sign(name, &[], ExtendedKeyUsagePurpose::ClientAuth, false)
    }

    fn sign(
        &self,
        name: &str,
        names: &[&str],
        usage: ExtendedKeyUsagePurpose,
        expired: bool,
    ) -> Pair {
        let names: Vec<String> = names.iter().map(|&name| name.into()).collect();
        let mut params = CertificateParams::new(names).unwrap();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, name);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![usage];
        if expired {
            params.not_before = date_time_ymd(2019, 1, 1);
            params.not_after = date_time_ymd(2020, 1, 1);
        }
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        let n = self.count.fetch_add(1, Ordering::Relaxed);
        let pair = Pair {
            cert: self.folder.join(format!("{name}-{n}.pem")),
            key: self.folder.join(format!("{name}-{n}.key")),
        };
        fs::write(&pair.cert, certificate.pem()).unwrap();
        fs::write(&pair.key, key.serialize_pem()).unwrap();
        pair
    }
}

/// Ends TLS before a server that only speaks plaintext, from the first byte on.
#[expect(clippy::disallowed_methods, reason = "it ends with the test's runtime")]
pub(crate) async fn terminator(pair: &Pair, target: u16) -> u16 {
    let config = rustls::ServerConfig::builder_with_provider(pulsebus::tls::provider())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(
            pulsebus::tls::certificates("a certificate", &pair.cert).unwrap(),
            pulsebus::tls::private_key(&pair.key).unwrap(),
        )
        .unwrap();
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        loop {
            let (client, _) = listener.accept().await.unwrap();
            tokio::spawn(pass(acceptor.clone(), client, target));
        }
    });
    port
}

async fn pass(acceptor: TlsAcceptor, client: TcpStream, target: u16) -> io::Result<()> {
    let mut client = acceptor.accept(client).await?;
    let mut server = TcpStream::connect(("127.0.0.1", target)).await?;
    tokio::io::copy_bidirectional(&mut client, &mut server).await?;
    Ok(())
}
