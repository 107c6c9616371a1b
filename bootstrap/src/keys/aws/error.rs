//! The errors of AWS, with advice on what to do.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use engine::text::printable;

use super::http;
use super::region::partition;
use super::retry::Course;
use crate::config::{S3Object, SecretLocation};

/// The maximum length of a KMS ciphertext in bytes (KMS API Reference, `Decrypt`, `CiphertextBlob`: "Maximum length of 6144").
pub const MAX_CIPHERTEXT: usize = 6144;

/// Why a secret could not be fetched from AWS or stored in AWS. `object` and `bucket` name what was requested; `message` is
/// AWS's text.
#[derive(Debug, thiserror::Error)]
pub(super) enum AwsError {
    /// The thread or event loop for the call could not be made.
    #[error("could not start the runtime that talks to AWS: {0}")]
    Runtime(io::Error),
    /// Neither the configuration, the environment, the profile nor the instance names a region.
    #[error(
        "no AWS region is configured: write `region = \"...\"` under [key], set AWS_REGION, or give the profile a region"
    )]
    NoRegion {
        /// Whether the instance's metadata service may still name a region later.
        transient: bool,
    },
    /// No source has credentials.
    #[error(
        "no AWS credentials were found: {tried}. Give this instance a role (an instance profile), or set AWS_PROFILE or \
         AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    )]
    NoCredentials {
        /// The result of each source.
        tried: String,
        /// Whether the instance's metadata service may still provide credentials later.
        transient: bool,
    },
    /// A source of credentials is configured and failed: an expired SSO session, a role that cannot be assumed, a missing
    /// profile.
    #[error("{from} gives no AWS credentials: {detail}. It is configured, so no other source is tried")]
    Credentials {
        /// The source.
        from: String,
        /// What failed.
        detail: String,
        /// Whether to retry.
        course: Course,
    },
    /// A profile is missing, or the configuration files are inconsistent.
    #[error("{0}")]
    Profile(String),
    /// The configured certificate authorities cannot be read.
    #[error(
        "the certificate authorities in {} cannot be used: {why}; correct AWS_CA_BUNDLE, or `ca_bundle` in the profile",
        path.display()
    )]
    CaBundle {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// No connection, no name resolution, or no answer in time.
    #[error(
        "{service} at {endpoint} cannot be reached: {detail}; is the network up, and is this the right endpoint{}?",
        proxy.map(|variable| format!(", and does the proxy of {variable} let it pass")).unwrap_or_default()
    )]
    Unreachable {
        /// The service.
        service: Service,
        /// Scheme, host and port.
        endpoint: String,
        /// What failed.
        detail: String,
        /// The variable that names a proxy, if there is one.
        proxy: Option<&'static str>,
    },
    /// A server answered, but could not prove that it belongs to AWS.
    #[error(
        "{service} at {endpoint} cannot be trusted: {detail}; is this the right endpoint, does it speak TLS, is this \
         machine's clock right, are the distribution's ca-certificates installed? Name your own certificate \
         authority in AWS_CA_BUNDLE"
    )]
    Untrusted {
        /// The service.
        service: Service,
        /// Scheme, host and port.
        endpoint: String,
        /// The error of TLS.
        detail: String,
        /// Whether the error may go away without a change, because this machine's clock is not set yet.
        passes: bool,
    },
    /// The service throttles requests, or failed.
    #[error("{at} is busy or failing ({code}): {message}")]
    Busy {
        /// The service and region.
        at: At,
        /// The error's code or HTTP status.
        code: String,
        /// AWS's message.
        message: String,
    },
    /// The error lasted until the configured time was over.
    #[error("{last} (tried {attempts} times in {} s)", .after.as_secs())]
    GaveUp {
        /// The error of the last attempt.
        last: Box<Self>,
        /// The number of attempts.
        attempts: u32,
        /// The time from the first attempt to the end of the last one.
        after: Duration,
    },
    /// AWS does not accept the credentials, or no longer accepts them.
    #[error(
        "{at} refuses the credentials themselves ({code}): {message}; renew them, and check whether this machine's clock is \
         right"
    )]
    BadCredentials {
        /// The service and region.
        at: At,
        /// The error's code.
        code: String,
        /// AWS's message.
        message: String,
        /// Whether to retry, and whether with other credentials.
        course: Course,
    },
    /// There is no such bucket.
    #[error(
        "there is no bucket `{bucket}` in S3 (asked in {region}); check `object` under [key], or make one: aws s3 mb \
         s3://{bucket}"
    )]
    NoBucket {
        /// The name of the bucket.
        bucket: String,
        /// The region that was asked.
        region: String,
    },
    /// The bucket exists, but not the object.
    #[error(
        "there is no object {object} (asked in {region}); check `object` under [key], or make it: nbdcrypt provision CONFIG"
    )]
    NoObject {
        /// The object.
        object: S3Object,
        /// The region that was asked.
        region: String,
    },
    /// S3 does not allow the access.
    #[error(
        "S3 denies access to {object} (asked in {region}): {message}; the role or user needs {action} on \
         arn:{}:s3:::{}/{}{also}{}",
        partition(region), object.bucket, object.key,
        if *action == "s3:GetObject" {
            ". Without s3:ListBucket on the bucket, S3 answers the same for an object that does not exist"
        } else { "" }
    )]
    S3Denied {
        /// The object.
        object: S3Object,
        /// The IAM action that is missing.
        action: &'static str,
        /// Other actions that may be missing, as the end of a sentence. Like `region`, this is a `Box<str>` so that the error
        /// stays small.
        also: Box<str>,
        /// The region that was asked.
        region: Box<str>,
        /// AWS's message.
        message: String,
        /// Whether to retry.
        course: Course,
    },
    /// The bucket is in another region.
    #[error(
        "the bucket `{bucket}` is not in {asked} but in {}: write `s3-region = \"{}\"` under [key]",
        right.as_deref().unwrap_or("another region"),
        right.as_deref().unwrap_or("...")
    )]
    WrongRegion {
        /// The name of the bucket.
        bucket: String,
        /// The region that was asked.
        asked: String,
        /// The bucket's region, if S3 named it.
        right: Option<String>,
    },
    /// The bytes that arrived do not have the checksum that S3 stores with the object.
    #[error(
        "{object} was damaged on its way from S3 at {endpoint}: {detail}. If this happens again, compare the object with its \
         checksum: aws s3api get-object-attributes --bucket {} --key {} --object-attributes Checksum",
        object.bucket, object.key
    )]
    Damaged {
        /// The object.
        object: S3Object,
        /// Scheme, host and port.
        endpoint: String,
        /// The two checksums.
        detail: String,
    },
    /// The object has no bytes.
    #[error("{object} is empty, so it contains no ciphertext; was its upload interrupted?")]
    Empty {
        /// The object.
        object: S3Object,
    },
    /// The object has more bytes than any ciphertext of KMS.
    #[error("{object} is larger than {}, the maximum that KMS can decrypt. Check that it is the right object", engine::text::bytes(MAX_CIPHERTEXT as u64))]
    TooLarge {
        /// The object.
        object: S3Object,
    },
    /// KMS does not allow the access. KMS says the same about a key that does not exist.
    #[error(
        "KMS denies access: {message}; the role or user needs {action} on {key}, by its own policy and the key's. KMS \
         answers the same if the ciphertext was made under a key of another account or region (asked in {region}; \
         `kms-region` under [key] names another), or under another key than `kms-key`"
    )]
    KmsDenied {
        /// The IAM action that may be missing.
        action: &'static str,
        /// The key as it is configured, or a description of it.
        key: String,
        /// The region that was asked.
        region: String,
        /// AWS's message.
        message: String,
        /// Whether to retry.
        course: Course,
    },
    /// The key does not exist.
    #[error(
        "KMS has no key {key} in {region}: {message}; check `kms-key` and `kms-region` under [key], or make one: aws kms \
         create-key, then aws kms create-alias --alias-name alias/NAME --target-key-id KEY-ID"
    )]
    NoKey {
        /// The key as it is configured, or a description of it.
        key: String,
        /// The region that was asked.
        region: String,
        /// AWS's message.
        message: String,
    },
    /// The key is disabled.
    #[error("{key} is disabled in KMS: {message}; enable it: aws kms enable-key --key-id KEY-ID")]
    KeyDisabled {
        /// The key as it is configured, or a description of it.
        key: String,
        /// AWS's message.
        message: String,
    },
    /// The key is pending deletion or import, or its store is not connected.
    #[error(
        "{key} cannot be used in its present state: {message}; if it is pending deletion, cancel that: \
         aws kms cancel-key-deletion --key-id KEY-ID, then aws kms enable-key --key-id KEY-ID"
    )]
    KeyState {
        /// The key as it is configured, or a description of it.
        key: String,
        /// AWS's message.
        message: String,
    },
    /// The key is not for encrypting and decrypting.
    #[error("{key} is not a symmetric key for encrypting and decrypting: {message}; check `kms-key` under [key]")]
    KeyUsage {
        /// The key as it is configured, or a description of it.
        key: String,
        /// AWS's message.
        message: String,
    },
    /// The ciphertext was encrypted under another KMS key than `kms-key` names.
    #[error("{object} was encrypted under another key than {key}; check `kms-key` and `object` under [key]")]
    OtherKey {
        /// Where the ciphertext is stored.
        object: SecretLocation,
        /// The key as it is configured.
        key: String,
    },
    /// The answer of KMS does not name the configured key.
    #[error(
        "KMS in {region} answered for the key {}, and not for {key}: the answer is not used; check `kms-key` and \
         `kms-endpoint-url` under [key]",
        printable(answered)
    )]
    OtherKeyAnswered {
        /// The key as it is configured.
        key: String,
        /// The key that the answer names. May be empty.
        answered: String,
        /// The region that was asked.
        region: String,
    },
    /// Several ways to the secret were tried, and all failed.
    #[error("{} ways to the secret were tried, and none works: {}", tried.len(), listed(tried))]
    Each {
        /// The name of each way, and its error.
        tried: Vec<(String, Self)>,
    },
    /// The ciphertext is damaged, or was made with another encryption context. KMS does not say which of the two.
    #[error(
        "KMS cannot decrypt {object}: either it is not a ciphertext of KMS, or it is damaged or truncated, or it was \
         encrypted with another encryption context than the configured {context}; check `encryption-context` under [key]"
    )]
    Ciphertext {
        /// Where the ciphertext is stored.
        object: SecretLocation,
        /// The configured encryption context.
        context: Context,
    },
    /// The plaintext is empty.
    #[error("{object} contains an empty password (nothing, or only newlines)")]
    EmptySecret {
        /// Where the ciphertext is stored.
        object: SecretLocation,
    },
    /// Any other error response of a service.
    #[error("{at} refused ({code}): {message}")]
    Refused {
        /// The service and region.
        at: At,
        /// The error's code or HTTP status.
        code: String,
        /// AWS's message.
        message: String,
    },
    /// The token in the header is malformed, or belongs to another volume.
    #[error("the token in the LUKS2 header cannot be used: {0}")]
    Token(String),
    /// The object exists already and may not be replaced.
    #[error(
        "{object} exists; it is left as it is. It may unlock a volume: replace it (--replace) only if no \
         volume needs it any more"
    )]
    Exists {
        /// Bucket and key.
        object: S3Object,
    },
    /// The ciphertext that should replace the object cannot be decrypted.
    #[error(
        "{object} is left as it is: its replacement cannot be decrypted, and would lock the volume \
         (replacing it also requires kms:Decrypt with the key): {why}"
    )]
    NotReplaced {
        /// Bucket and key.
        object: S3Object,
        /// The error of KMS.
        why: Box<Self>,
    },
    /// The ciphertext that should replace the object decrypts to something else.
    #[error("{object} is left as it is: its replacement does not decrypt to the secret that was encrypted")]
    NotReplacedByAnother {
        /// Bucket and key.
        object: S3Object,
    },
    /// The object that was read back does not decrypt to the secret that was encrypted.
    #[error("{object} was written, but does not decrypt to what was encrypted; do not use it")]
    NotAsWritten {
        /// Bucket and key.
        object: S3Object,
    },
}

impl AwsError {
    /// Returns the error for a service that sent no response, or only a part of one.
    pub(super) fn unreachable(service: Service, endpoint: String, detail: String) -> Self {
        Self::Unreachable { service, endpoint, detail, proxy: http::proxy_variable() }
    }

    /// Returns the error for sources of credentials that did not answer in time.
    pub(super) fn overdue_credentials(limit: Duration) -> Self {
        let detail = format!("no answer within {} s", limit.as_secs());
        Self::Credentials { from: "the configured source".to_owned(), detail, course: Course::Again }
    }

    /// Returns whether and how the request is to be retried.
    pub(super) fn course(&self) -> Course {
        match self {
            Self::Unreachable { .. }
            | Self::Damaged { .. }
            | Self::Busy { .. }
            | Self::NoRegion { transient: true }
            | Self::NoCredentials { transient: true, .. }
            | Self::Untrusted { passes: true, .. } => Course::Again,
            Self::Credentials { course, .. }
            | Self::BadCredentials { course, .. }
            | Self::S3Denied { course, .. }
            | Self::KmsDenied { course, .. } => *course,
            _ => Course::Final,
        }
    }

    /// Returns whether the error concerns this machine: its credentials, region or certificates. Another service or key would
    /// then not help.
    pub(super) fn is_of_this_machine(&self) -> bool {
        matches!(
            self,
            Self::Runtime(_)
                | Self::NoRegion { .. }
                | Self::NoCredentials { .. }
                | Self::Credentials { .. }
                | Self::Profile(_)
                | Self::CaBundle { .. }
        )
    }

    /// Returns the error without the count of attempts.
    pub(super) fn without_attempts(self) -> Self {
        match self {
            Self::GaveUp { last, .. } => *last,
            error => error,
        }
    }

    /// Returns whether AWS denied the access.
    pub(super) fn is_denial(&self) -> bool {
        match self {
            Self::GaveUp { last, .. } => last.is_denial(),
            Self::Each { tried } => tried.iter().all(|(_, error)| error.is_denial()),
            error => matches!(error, Self::S3Denied { .. } | Self::KmsDenied { .. }),
        }
    }
}

/// Returns the errors of several ways, each with its number and name.
fn listed(tried: &[(String, AwsError)]) -> String {
    let line = |(number, (name, error)): (usize, &(String, AwsError))| format!("({}) {name}: {error}", number + 1);
    tried.iter().enumerate().map(line).collect::<Vec<_>>().join("; ")
}

/// A service of AWS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Service {
    /// Simple Storage Service.
    S3,
    /// Key Management Service.
    Kms,
    /// Security Token Service, which provides the credentials of a role.
    Sts,
}

impl fmt::Display for Service {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::S3 => "S3",
            Self::Kms => "KMS",
            Self::Sts => "STS",
        })
    }
}

/// A service in a region.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct At {
    pub(super) service: Service,
    pub(super) region: String,
}

impl fmt::Display for At {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} in {}", self.service, self.region)
    }
}

/// An encryption context, displayed as in a configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Context(pub(super) std::collections::BTreeMap<String, String>);

impl fmt::Display for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_str("{} (none)");
        }
        let pairs: Vec<_> = self.0.iter().map(|(key, value)| format!("{key:?} = {value:?}")).collect();
        write!(f, "{{ {} }}", pairs.join(", "))
    }
}
