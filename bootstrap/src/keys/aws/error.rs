//! What AWS can say no to, in words that say what to do.

use std::fmt;
use std::io;
use std::time::Duration;

use crate::config::{S3Object, SecretPlace};

/// The most bytes that KMS takes as a ciphertext (KMS API Reference, `Decrypt`, `CiphertextBlob`: "Maximum length of
/// 6144").
pub const MAX_CIPHERTEXT: usize = 6144;

/// Why there is no secret from AWS, or why none was put there. `object` and `bucket` name what was asked for,
/// `message` is what AWS said.
#[derive(Debug, thiserror::Error)]
pub enum AwsKeyError {
    /// No thread or no event loop could be made for the call.
    #[error("no runtime for talking to AWS: {0}")]
    Runtime(io::Error),
    /// Neither the configuration, nor the environment, nor the profile, nor the instance names a region.
    #[error(
        "no AWS region is configured: write `region = \"...\"` under [key], set AWS_REGION, or give the profile a region"
    )]
    NoRegion {
        /// Whether the instance's metadata service may yet tell.
        transient: bool,
    },
    /// The whole chain has no credentials. `tried` has a line for each link.
    #[error(
        "no AWS credentials were found{}; give this instance a role (an instance profile), or set AWS_PROFILE or \
         AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY. {tried}",
        profile.as_ref().map(|name| format!(", nor has a profile `{name}` any")).unwrap_or_default()
    )]
    NoCredentials {
        /// What the SDK's chain says of each source.
        tried: String,
        /// The profile that is asked for by name, if any.
        profile: Option<String>,
        /// Whether the instance's metadata service may yet have some.
        transient: bool,
    },
    /// A source of credentials is configured and failed: an expired SSO session, a role that may not be assumed, a
    /// profile that is not there.
    #[error("AWS credentials could not be had: {detail}{}", sso_hint(detail))]
    Credentials {
        /// What the SDK says, causes and all.
        detail: String,
        /// Whether the network is to blame.
        transient: bool,
    },
    /// No connection, no name resolution, or no answer in time.
    #[error("{service} at {endpoint} cannot be reached: {detail}; is the network up, and the endpoint the right one?")]
    Unreachable {
        /// Which service.
        service: Service,
        /// Scheme, host and port.
        endpoint: String,
        /// What the system said.
        detail: String,
    },
    /// Someone answered, but does not prove to be AWS.
    #[error(
        "{service} at {endpoint} cannot be trusted: {detail}; is the endpoint the right one, does it speak TLS, is this \
         machine's clock right, are the distribution's ca-certificates installed? A certificate authority of one's own \
         is named in SSL_CERT_FILE"
    )]
    Untrusted {
        /// Which service.
        service: Service,
        /// Scheme, host and port.
        endpoint: String,
        /// What TLS said.
        detail: String,
    },
    /// Throttled, or failing on AWS's side.
    #[error("{service} is busy or failing ({code}): {message}")]
    Busy {
        /// Which service.
        service: Service,
        /// The error's code or HTTP status.
        code: String,
        /// What AWS said.
        message: String,
    },
    /// Tried again until the configured time was over.
    #[error("{last} (tried {attempts} times in {} s)", .after.as_secs())]
    GaveUp {
        /// What the last attempt met.
        last: Box<Self>,
        /// How many there were.
        attempts: u32,
        /// From the first attempt to the last one's end.
        after: Duration,
    },
    /// AWS does not know the credentials, or no longer.
    #[error(
        "{service} refuses the credentials themselves ({code}): {message}; renew them, and see whether this machine's \
         clock is right"
    )]
    BadCredentials {
        /// Which service.
        service: Service,
        /// The error's code.
        code: String,
        /// What AWS said.
        message: String,
    },
    /// There is no such bucket.
    #[error("there is no bucket `{bucket}` in S3; see `object` under [key], or make one: aws s3 mb s3://{bucket}")]
    NoBucket {
        /// Its name.
        bucket: String,
    },
    /// The bucket is there, the object is not.
    #[error("there is no object {object}; see `object` under [key], or make it: nbdcrypt provision CONFIG")]
    NoObject {
        /// Bucket and key.
        object: S3Object,
    },
    /// S3 does not permit it.
    #[error(
        "S3 denies access to {object}: {message}; the role or user needs {action} on {arn}{}",
        if *action == "s3:GetObject" {
            ". Without s3:ListBucket on the bucket, S3 answers the same for an object that does not exist"
        } else { "" }
    )]
    S3Denied {
        /// Bucket and key.
        object: S3Object,
        /// The IAM action that is missing.
        action: &'static str,
        /// The resource it is missing on.
        arn: String,
        /// What AWS said.
        message: String,
    },
    /// The bucket lives elsewhere.
    #[error(
        "the bucket `{bucket}` is not in {asked} but in {}: write `region = \"{}\"` under [key]",
        right.as_deref().unwrap_or("another region"),
        right.as_deref().unwrap_or("...")
    )]
    WrongRegion {
        /// Its name.
        bucket: String,
        /// The region that was asked.
        asked: String,
        /// Where it is, if S3 told.
        right: Option<String>,
    },
    /// The object has no bytes.
    #[error("{object} is empty, so no ciphertext; was its upload interrupted?")]
    Empty {
        /// Bucket and key.
        object: S3Object,
    },
    /// The object has more bytes than any ciphertext of KMS.
    #[error("{object} is larger than {MAX_CIPHERTEXT} bytes, the most that KMS decrypts; is it the right object?")]
    TooLarge {
        /// Bucket and key.
        object: S3Object,
    },
    /// KMS does not permit it. KMS says the same of a key that is not there.
    #[error(
        "KMS denies access: {message}; the role or user needs {action} on {key}, by its own policy and the key's. KMS \
         answers the same where the ciphertext was made under a key of another account or region (asked was {region}), \
         or under another key than `kms-key`"
    )]
    KmsDenied {
        /// The IAM action that may be missing.
        action: &'static str,
        /// The key as it is configured, or a description of it.
        key: String,
        /// The region that was asked.
        region: String,
        /// What AWS said.
        message: String,
    },
    /// There is no such key.
    #[error(
        "KMS has no key {key} in {region}: {message}; see `kms-key` and `region` under [key], or make one: aws kms \
         create-key, then aws kms create-alias --alias-name alias/NAME --target-key-id KEY-ID"
    )]
    NoKey {
        /// The key as it is configured, or a description of it.
        key: String,
        /// The region that was asked.
        region: String,
        /// What AWS said.
        message: String,
    },
    /// The key is switched off.
    #[error("{key} is disabled in KMS: {message}; switch it on: aws kms enable-key --key-id KEY-ID")]
    KeyDisabled {
        /// The key as it is configured, or a description of it.
        key: String,
        /// What AWS said.
        message: String,
    },
    /// The key is pending deletion or import, or its store is not connected.
    #[error(
        "{key} cannot be used in the state it is in: {message}; where it is pending deletion, the way back is: \
         aws kms cancel-key-deletion --key-id KEY-ID, then aws kms enable-key --key-id KEY-ID"
    )]
    KeyState {
        /// The key as it is configured, or a description of it.
        key: String,
        /// What AWS said.
        message: String,
    },
    /// The key is none for encrypting and decrypting.
    #[error("{key} is no symmetric key for encrypting and decrypting: {message}; see `kms-key` under [key]")]
    KeyUsage {
        /// The key as it is configured, or a description of it.
        key: String,
        /// What AWS said.
        message: String,
    },
    /// `kms-key` names a key, and the ciphertext was made under another.
    #[error("{object} was encrypted under another key than {key}; see `kms-key` and `object` under [key]")]
    OtherKey {
        /// Where it is kept.
        object: SecretPlace,
        /// The key as it is configured.
        key: String,
    },
    /// KMS does not say which it is: a broken ciphertext, or another encryption context than it was made with.
    #[error(
        "KMS cannot decrypt {object}: either it is no ciphertext of KMS or a damaged or truncated one, or it was \
         encrypted with another encryption context than the configured {context}; see `encryption-context` under [key]"
    )]
    Ciphertext {
        /// Where it is kept.
        object: SecretPlace,
        /// The configured encryption context.
        context: Context,
    },
    /// KMS decrypted it, and nothing remained.
    #[error("{object} holds an empty password (nothing, or newlines only)")]
    EmptySecret {
        /// Where it is kept.
        object: SecretPlace,
    },
    /// Anything else that a service says no with.
    #[error("{service} refused ({code}): {message}")]
    Refused {
        /// Which service.
        service: Service,
        /// The error's code or HTTP status.
        code: String,
        /// What AWS said.
        message: String,
    },
    /// The token in the header is not for this volume, or not as it should be.
    #[error("the token in the LUKS2 header is not to be used: {0}")]
    Token(String),
    /// There is an object already, and it is not to be replaced.
    #[error(
        "{object} exists; it is left as it is. It may be what unlocks a volume: replace it (--replace) only when no \
         volume needs it any more"
    )]
    Exists {
        /// Bucket and key.
        object: S3Object,
    },
    /// What was to take the object's place cannot be decrypted.
    #[error(
        "{object} is left as it is, since what was encrypted to replace it cannot be decrypted, and would lock the volume \
         (to replace it takes kms:Decrypt with the key, too): {why}"
    )]
    NotReplaced {
        /// Bucket and key.
        object: S3Object,
        /// What KMS said.
        why: Box<Self>,
    },
    /// What was to take the object's place decrypts to something else.
    #[error("{object} is left as it is, since what was encrypted to replace it does not decrypt to the same again")]
    NotReplacedByAnother {
        /// Bucket and key.
        object: S3Object,
    },
    /// What was read back is not what was written.
    #[error("{object} was written, but does not decrypt to what was encrypted; do not use it")]
    NotAsWritten {
        /// Bucket and key.
        object: S3Object,
    },
}

impl AwsKeyError {
    /// Whether the same request may succeed later without anybody's doing.
    pub(super) fn is_transient(&self) -> bool {
        matches!(
            self,
            Self::Unreachable { .. }
                | Self::Busy { .. }
                | Self::NoRegion { transient: true }
                | Self::NoCredentials { transient: true, .. }
                | Self::Credentials { transient: true, .. }
        )
    }
}

/// Which of the two services.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Service {
    /// Simple Storage Service.
    S3,
    /// Key Management Service.
    Kms,
}

impl fmt::Display for Service {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::S3 => "S3",
            Self::Kms => "KMS",
        })
    }
}

/// An encryption context as a configuration writes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Context(pub std::collections::BTreeMap<String, String>);

impl fmt::Display for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_str("{} (none)");
        }
        let pairs: Vec<_> = self.0.iter().map(|(key, value)| format!("{key:?} = {value:?}")).collect();
        write!(f, "{{ {} }}", pairs.join(", "))
    }
}

fn sso_hint(detail: &str) -> &'static str {
    if detail.to_ascii_lowercase().contains("sso") { "; log in again: aws sso login" } else { "" }
}
