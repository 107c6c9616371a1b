//! TLS for clients that ask for it with `NBD_OPT_STARTTLS`. Certificates and keys come from a directory in the layout
//! that nbdkit and qemu share. rustls provides TLS 1.2 and 1.3. There are no pre-shared keys, because rustls lacks
//! them.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer, UnixTime};
use rustls::server::{NoServerSessionStorage, VerifierBuilderError, WebPkiClientVerifier};
use rustls::{RootCertStore, ServerConfig};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use webpki::{EndEntityCert, KeyUsage};
use zeroize::{Zeroize, Zeroizing};

use crate::proto::TlsPolicy;

/// The authorities whose clients are accepted: one or more certificates.
pub const CA_CERT: &str = "ca-cert.pem";
/// The revocation lists of the authorities. The file is optional.
pub const CA_CRL: &str = "ca-crl.pem";
/// The server's certificate, followed by any intermediate certificates between it and the authority.
pub const SERVER_CERT: &str = "server-cert.pem";
/// The server's private key in PKCS #8, PKCS #1 or SEC 1 form, not encrypted.
pub const SERVER_KEY: &str = "server-key.pem";

/// The largest size of one of these files in bytes, other than the private key. Revocation lists are the longest.
const MAX_FILE: u64 = 16 << 20;

/// Whether connections are encrypted.
#[derive(Debug, Clone, Default)]
pub enum Tls {
    /// No connection is encrypted.
    #[default]
    Off,
    /// Connections are encrypted if the client asks for it. An attacker between client and server can prevent this,
    /// unless the client insists on TLS.
    Offered(Credentials),
    /// All connections are encrypted. Before TLS begins, the server tells a client nothing about its exports.
    Required(Credentials),
}

/// The server's certificate and key, and which client certificates it accepts. Clones are the same credentials.
#[derive(Clone)]
pub struct Credentials {
    config: Arc<ServerConfig>,
    /// The server's certificate and the intermediate certificates.
    chain: Arc<[CertificateDer<'static>]>,
    /// The file with the certificates.
    path: Arc<Path>,
}

/// A certificate in the server's file that is not valid at a given time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NotValid {
    /// The file that contains the certificate.
    pub path: PathBuf,
    /// The position of the certificate in the file, counted from 0. The first is the server's own.
    pub number: usize,
    /// Why the certificate is not valid.
    pub why: NotValidBecause,
}

/// Why a certificate is not valid.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NotValidBecause {
    /// The certificate expired this long ago.
    Expired(Duration),
    /// The certificate becomes valid after this time.
    NotYet(Duration),
}

impl std::fmt::Display for NotValid {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let path = self.path.display();
        match self.number {
            0 => write!(f, "the server's certificate {path} ")?,
            number => write!(f, "certificate {} in {path}, from an authority, ", number + 1)?,
        }
        match self.why {
            NotValidBecause::Expired(ago) => write!(f, "expired {} ago", rough(ago)),
            NotValidBecause::NotYet(left) => {
                write!(f, "is not valid yet, but becomes valid in {}; check this machine's clock", rough(left))
            }
        }
    }
}

/// Writes a duration for people, in one unit.
fn rough(time: Duration) -> String {
    let (count, unit) = match time.as_secs() {
        seconds @ ..120 => (seconds, "second"),
        seconds @ ..7200 => (seconds / 60, "minute"),
        seconds @ ..172_800 => (seconds / 3600, "hour"),
        seconds => (seconds / 86400, "day"),
    };
    format!("{count} {unit}{}", if count == 1 { "" } else { "s" })
}

impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Credentials").finish_non_exhaustive()
    }
}

/// Which clients are accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Clients {
    /// Anyone who connects. TLS still keeps others from listening, and lets clients check the server's certificate.
    Anyone,
    /// Anyone who has a certificate from an authority in [`CA_CERT`] that is not revoked in [`CA_CRL`].
    WithCertificate,
}

/// Why credentials could not be read.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file is missing or cannot be read.
    #[error("cannot read {}, which should hold {what}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the file is for.
        what: &'static str,
        /// Why the file could not be read.
        source: io::Error,
    },
    /// A file is larger than a file of its kind can be.
    #[error("{} is too large; the private key's file may have up to 128 KiB, each other file 16 MiB", .0.display())]
    TooLarge(PathBuf),
    /// Users other than the owner and the group have access to the private key, or the group can write it.
    #[error("{} is open to other users (mode {mode:03o}), so they may know the key in it; make a new key and `chmod 600` its file (640 is accepted, too)", path.display())]
    NotPrivate {
        /// The file with the key.
        path: PathBuf,
        /// The file's permissions.
        mode: u32,
    },
    /// A file does not contain what it must contain.
    #[error("{} contains no {what} in PEM form{hint}", path.display())]
    Nothing {
        /// The file.
        path: PathBuf,
        /// What is missing.
        what: &'static str,
        /// A possible cause and what to do about it, or nothing.
        hint: &'static str,
    },
    /// A file's contents cannot be parsed.
    #[error("{} cannot be parsed: {why}; make it again, for example with certtool", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Why the contents cannot be parsed.
        why: String,
    },
    /// The certificate and the key do not work together.
    #[error("{} and {SERVER_KEY} beside it cannot be used together: {source}", certificate.display())]
    Pair {
        /// The file with the certificate.
        certificate: PathBuf,
        /// Why they do not work together.
        source: rustls::Error,
    },
}

impl Tls {
    /// Returns the policy that the handshake follows.
    pub fn policy(&self) -> TlsPolicy {
        match self {
            Self::Off => TlsPolicy::Off,
            Self::Offered(_) => TlsPolicy::Offered,
            Self::Required(_) => TlsPolicy::Required,
        }
    }

    /// Does the TLS handshake. It begins with the next byte of the stream.
    pub(crate) async fn accept<S>(&self, stream: S) -> io::Result<TlsStream<S>>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        match self {
            Self::Offered(credentials) | Self::Required(credentials) => {
                TlsAcceptor::from(Arc::clone(&credentials.config)).accept(stream).await
            }
            Self::Off => Err(io::ErrorKind::Unsupported.into()),
        }
    }
}

impl Credentials {
    /// Reads [`SERVER_CERT`] and [`SERVER_KEY`] in `directory`. With [`Clients::WithCertificate`], also reads
    /// [`CA_CERT`] and, if it exists, [`CA_CRL`]. The files are read only once; after a change, the server must be
    /// restarted.
    ///
    /// A key file is refused if other users can access it, or if its group can write it. If there is a [`CA_CRL`], it
    /// must contain a list from every authority between a client's certificate and [`CA_CERT`], and no list may have
    /// expired.
    ///
    /// # Errors
    /// [`TlsError`] if a file is missing, unsuitable or damaged, or if certificate and key do not match. The error
    /// names the file.
    pub fn from_directory(directory: &Path, clients: Clients) -> Result<Self, TlsError> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let verifier = match clients {
            Clients::Anyone => WebPkiClientVerifier::no_client_auth(),
            Clients::WithCertificate => {
                let path = directory.join(CA_CERT);
                let mut roots = RootCertStore::empty();
                for certificate in certificates(&path, "the certificates of the clients' authorities")? {
                    roots.add(certificate).map_err(|error| malformed(&path, error))?;
                }
                WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
                    .with_crls(revocation_lists(&directory.join(CA_CRL))?)
                    .enforce_revocation_expiration()
                    .build()
                    .map_err(|error| match error {
                        VerifierBuilderError::InvalidCrl(_) => malformed(&directory.join(CA_CRL), error),
                        _ => malformed(&path, error),
                    })?
            }
        };
        let certificate = directory.join(SERVER_CERT);
        let chain = certificates(&certificate, "the server's certificate")?;
        let key = private_key(&directory.join(SERVER_KEY))?;
        let pair = |source| TlsError::Pair { certificate: certificate.clone(), source };
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13, &rustls::version::TLS12])
            .map_err(pair)?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain.clone(), key)
            .map_err(pair)?;
        // Sessions are never resumed: connections are few and long, and each client's certificate is checked.
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(Self { config: Arc::new(config), chain: chain.into(), path: certificate.into() })
    }

    /// Returns the server's certificates that are not valid at the time `now`. The server can still send them, but a
    /// client that checks them does not connect. Certificates that cannot be parsed are left out.
    pub fn not_valid_at(&self, now: SystemTime) -> Vec<NotValid> {
        let now = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let not_valid = |(number, certificate)| {
            Some(NotValid { path: self.path.to_path_buf(), number, why: why_not_valid(certificate, now)? })
        };
        self.chain.iter().enumerate().filter_map(not_valid).collect()
    }
}

/// Returns why a certificate is not valid at `now`, or `None` if it is valid or cannot be parsed.
fn why_not_valid(certificate: &CertificateDer<'_>, now: Duration) -> Option<NotValidBecause> {
    let certificate = EndEntityCert::try_from(certificate).ok()?;
    // webpki checks the validity period first. It then refuses the certificate in any case, since no authority is
    // trusted here.
    let time = UnixTime::since_unix_epoch(now);
    match certificate.verify_for_usage(&[], &[], &[], time, KeyUsage::server_auth(), None, None) {
        Err(webpki::Error::CertExpired { not_after, .. }) => {
            Some(NotValidBecause::Expired(now.saturating_sub(Duration::from_secs(not_after.as_secs()))))
        }
        Err(webpki::Error::CertNotValidYet { not_before, .. }) => {
            Some(NotValidBecause::NotYet(Duration::from_secs(not_before.as_secs()).saturating_sub(now)))
        }
        _ => None,
    }
}

fn certificates(path: &Path, what: &'static str) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let text = read(path, what)?;
    let certificates: Result<Vec<_>, pem::Error> = CertificateDer::pem_slice_iter(&text).collect();
    let certificates = certificates.map_err(|error| malformed(path, error))?;
    if certificates.is_empty() {
        return Err(TlsError::Nothing { path: path.to_owned(), what: "certificate", hint: "" });
    }
    Ok(certificates)
}

/// Returns the lists in the file, or none if there is no file.
fn revocation_lists(path: &Path) -> Result<Vec<CertificateRevocationListDer<'static>>, TlsError> {
    let text = match read(path, "the certificate revocation lists") {
        Err(TlsError::File { source, .. }) if source.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        text => text?,
    };
    let lists: Result<Vec<_>, pem::Error> = CertificateRevocationListDer::pem_slice_iter(&text).collect();
    let lists = lists.map_err(|error| malformed(path, error))?;
    if lists.is_empty() {
        // An empty list would revoke nothing, although the file exists to revoke something.
        return Err(TlsError::Nothing { path: path.to_owned(), what: "revocation list", hint: "" });
    }
    Ok(lists)
}

fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    let text = read_private(path, "the server's private key")?;
    let hint = if text.windows(9).any(|word| word == b"ENCRYPTED") {
        " that can be used, because the key is encrypted; `openssl pkey -in FILE -out server-key.pem` decrypts it"
    } else {
        ""
    };
    PrivateKeyDer::from_pem_slice(&text).map_err(|error| match error {
        pem::Error::NoItemsFound => TlsError::Nothing { path: path.to_owned(), what: "private key", hint },
        error => malformed(path, error),
    })
}

fn malformed(path: &Path, why: impl std::fmt::Display) -> TlsError {
    TlsError::Malformed { path: path.to_owned(), why: why.to_string() }
}

fn open(path: &Path, what: &'static str) -> Result<(File, std::fs::Metadata), TlsError> {
    let opened = File::open(path).and_then(|file| file.metadata().map(|metadata| (file, metadata)));
    opened.map_err(|source| TlsError::File { path: path.to_owned(), what, source })
}

fn read(path: &Path, what: &'static str) -> Result<Vec<u8>, TlsError> {
    let (file, _) = open(path, what)?;
    let mut text = Vec::new();
    let count = file.take(MAX_FILE + 1).read_to_end(&mut text);
    match count.map_err(|source| TlsError::File { path: path.to_owned(), what, source })? as u64 {
        0..=MAX_FILE => Ok(text),
        _ => Err(TlsError::TooLarge(path.to_owned())),
    }
}

/// Reads a file that only its owner, and at most its group, may access. The bytes are wiped when they are dropped.
fn read_private(path: &Path, what: &'static str) -> Result<Zeroizing<Vec<u8>>, TlsError> {
    /// A key of 16384 bits takes a tenth of this size.
    const MAX_KEY: usize = 128 << 10;
    let (mut file, metadata) = open(path, what)?;
    let mode = metadata.mode() & 0o777;
    if mode & 0o027 != 0 {
        return Err(TlsError::NotPrivate { path: path.to_owned(), mode });
    }
    // The vector has its full length from the start. A vector that grows leaves copies of the key behind.
    let mut text = Zeroizing::new(vec![0; MAX_KEY]);
    let mut filled = 0;
    loop {
        match file.read(&mut text[filled..]) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(source) => return Err(TlsError::File { path: path.to_owned(), what, source }),
        }
    }
    if filled == MAX_KEY {
        text.zeroize();
        return Err(TlsError::TooLarge(path.to_owned()));
    }
    text.truncate(filled);
    Ok(text)
}
