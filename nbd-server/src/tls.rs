//! TLS for clients that ask for it by `NBD_OPT_STARTTLS`: certificates and keys from a directory in the layout that nbdkit
//! and qemu share, and TLS 1.2 or 1.3 by rustls. There are no pre-shared keys: rustls has none.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer};
use rustls::server::{NoServerSessionStorage, VerifierBuilderError, WebPkiClientVerifier};
use rustls::{RootCertStore, ServerConfig};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use zeroize::{Zeroize, Zeroizing};

use crate::proto::TlsPolicy;

/// The authorities whose clients may come, one or more certificates.
pub const CA_CERT: &str = "ca-cert.pem";
/// Certificates that were taken back: a list of each authority, if the file is there.
pub const CA_CRL: &str = "ca-crl.pem";
/// The server's certificate, and those between it and the authority.
pub const SERVER_CERT: &str = "server-cert.pem";
/// The server's private key (PKCS #8, PKCS #1 or SEC 1), not encrypted.
pub const SERVER_KEY: &str = "server-key.pem";

/// The most bytes that one of these files may have. A revocation list is the longest of them.
const MAX_FILE: u64 = 16 << 20;

/// Whether conversations are encrypted.
#[derive(Debug, Clone, Default)]
pub enum Tls {
    /// None is.
    #[default]
    Off,
    /// Those whose clients ask for it. Someone between client and server can keep them from it, unless they insist.
    Offered(Credentials),
    /// All; before it, a client is told of nothing.
    Required(Credentials),
}

/// What a server shows its clients, and what it wants to see of them. Clones are the same.
#[derive(Clone)]
pub struct Credentials {
    config: Arc<ServerConfig>,
}

impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Credentials").finish_non_exhaustive()
    }
}

/// Who may be a client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Clients {
    /// Whoever connects: TLS keeps others from listening, and shows clients that the server is the right one.
    Anyone,
    /// Who has a certificate by an authority of [`CA_CERT`] that is not in [`CA_CRL`].
    WithCertificate,
}

/// Why there are no credentials.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file is missing or cannot be read.
    #[error("{}: {source}; the directory holds {what}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What it is for.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// A file is too long to be what it should be.
    #[error("{} has more than {MAX_FILE} bytes; is it the right file?", .0.display())]
    TooLarge(PathBuf),
    /// The private key is not private.
    #[error("{} can be read or written by others (mode {mode:03o}), so the key in it may be known: make a new one, and chmod 600 it (640 for a group is accepted)", path.display())]
    NotPrivate {
        /// The key's file.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
    },
    /// There is nothing of use in a file.
    #[error("{} holds no {what} in PEM form{hint}", path.display())]
    Nothing {
        /// The file.
        path: PathBuf,
        /// What was looked for.
        what: &'static str,
        /// What may be the matter.
        hint: &'static str,
    },
    /// A file is damaged.
    #[error("{} cannot be understood: {why}; make it again, for example with certtool", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// Certificate and key do not make a server.
    #[error("{} and {SERVER_KEY} beside it cannot be used together: {source}", certificate.display())]
    Pair {
        /// The certificate's file.
        certificate: PathBuf,
        /// What is wrong.
        source: rustls::Error,
    },
}

impl Tls {
    /// What the handshake is to do about it.
    pub fn policy(&self) -> TlsPolicy {
        match self {
            Self::Off => TlsPolicy::Off,
            Self::Offered(_) => TlsPolicy::Offered,
            Self::Required(_) => TlsPolicy::Required,
        }
    }

    /// The TLS handshake, which begins with the next byte of the stream.
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
    /// Reads [`SERVER_CERT`] and [`SERVER_KEY`] in `directory`, and with [`Clients::WithCertificate`] also [`CA_CERT`] and,
    /// if it is there, [`CA_CRL`]. They are read once: who changes them starts the server again.
    ///
    /// A key file that others than its owner and group can read or write is refused. With a [`CA_CRL`], every authority on
    /// the way from a client's certificate to [`CA_CERT`] must have its list in it, and a list must not have expired.
    ///
    /// # Errors
    /// [`TlsError`], which names the file.
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
            .with_single_cert(chain, key)
            .map_err(pair)?;
        // A session is never resumed: connections are few and long, and each client's certificate is looked at.
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(Self { config: Arc::new(config) })
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

/// The lists in the file; none if there is no file.
fn revocation_lists(path: &Path) -> Result<Vec<CertificateRevocationListDer<'static>>, TlsError> {
    let text = match read(path, "the list of certificates that were taken back") {
        Err(TlsError::File { source, .. }) if source.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        text => text?,
    };
    let lists: Result<Vec<_>, pem::Error> = CertificateRevocationListDer::pem_slice_iter(&text).collect();
    let lists = lists.map_err(|error| malformed(path, error))?;
    if lists.is_empty() {
        // Nobody would be refused, though somebody was meant to be.
        return Err(TlsError::Nothing { path: path.to_owned(), what: "revocation list", hint: "" });
    }
    Ok(lists)
}

fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    let text = read_private(path, "the server's private key")?;
    let hint = if text.windows(9).any(|word| word == b"ENCRYPTED") {
        " that can be used: the key is encrypted (openssl pkey -in FILE -out server-key.pem takes that off)"
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

/// Reads a file that its owner, and at most a group, may read; wiped when dropped.
fn read_private(path: &Path, what: &'static str) -> Result<Zeroizing<Vec<u8>>, TlsError> {
    /// A key of 16384 bits has a tenth of it.
    const MAX_KEY: usize = 128 << 10;
    let (mut file, metadata) = open(path, what)?;
    let mode = metadata.mode() & 0o777;
    if mode & 0o027 != 0 {
        return Err(TlsError::NotPrivate { path: path.to_owned(), mode });
    }
    // Of its full length from the start: a vector that grows leaves copies behind.
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
