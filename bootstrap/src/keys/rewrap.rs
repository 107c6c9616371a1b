//! Does the work of `nbdcrypt key rewrap`: encrypts a volume's secret again, under another KMS key or under the newest
//! material of the same one. The keyslot, the secret and the volume key stay the same.
//! ```text
//!   KMS Decrypt (the configured key) ─► does it open the volume? ─► KMS Encrypt (the new key) ─► KMS Decrypt ─► token, or object
//! ```
//! Until the last step, the old ciphertext stays in place.

use engine::luks::{self, LockedVolume, LuksError, luks2};
use engine::store::BlockStore;

use crate::config::{AwsKeyConfig, KeyConfig, LimitsConfig, SecretLocation};
use crate::keys::{self, AwsKey, AwsKeyError, KeyError, KmsToken, NoTokenSecret};
use crate::machine::disk::{DiskError, HeaderLock};
use crate::machine::{memory, random};

/// The result of [`rewrap`].
#[derive(Debug)]
pub struct Rewrapped {
    /// The token's number, or the object.
    pub location: Location,
    /// The ARN of the KMS key that encrypts the secret.
    pub key_arn: String,
    /// Whether the object was read back. If not, this holds the error: for example, the user has no permission to read the
    /// object.
    pub read_back: Result<(), AwsKeyError>,
}

/// Where the new ciphertext is stored.
#[derive(Debug)]
pub enum Location {
    /// The token with this number in the header.
    Token(u32),
    /// An object in S3.
    Object(String),
}

/// Why the old ciphertext is still in place.
#[derive(Debug, thiserror::Error)]
pub enum RewrapError {
    /// The configured secret is in a file or in memory, so it has no ciphertext.
    #[error("there is nothing to rewrap: the configuration takes the secret from {0}, not from AWS")]
    NotAws(String),
    /// Neither the configuration nor the caller names a KMS key.
    #[error("no KMS key is named: write `kms-key` under [key], or give --new-kms-key")]
    NoKmsKey,
    /// The configured volume is plain, so it has no header.
    #[error("the configuration describes a plain volume, which has no header to try a secret on. To rewrap its secret, {}", by_hand(.0))]
    Plain(SecretLocation),
    /// The disk has no LUKS header. It is the wrong disk, or holds a plain volume whose key is hashed from a
    /// passphrase.
    #[error("there is no LUKS header to try the secret on. Check that this is the volume's disk. If the volume is plain, {}", by_hand(.0))]
    NoHeader(SecretLocation),
    /// The secret could not be obtained or encrypted.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// The header has no usable token.
    #[error(transparent)]
    Token(#[from] NoTokenSecret),
    /// The secret does not open the volume.
    #[error("the secret that KMS decrypted does not open the volume, so it was not changed: {0}")]
    Opens(#[source] LuksError),
    /// The header has changed since KMS was asked.
    #[error("another program changed the header at the same time. Nothing was changed; try again")]
    Changed,
    /// The header cannot be locked.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The header could not be read or changed.
    #[error(transparent)]
    Luks(#[from] LuksError),
}

/// Returns advice for a volume without a header.
fn by_hand(object: &SecretLocation) -> String {
    format!(
        "make a new ciphertext of {object} with `aws kms re-encrypt` (give --destination-key-id, and the encryption context of \
         source and destination), and store it under another name. Then write that name as `object` and the new key as \
         `kms-key` under [key]. Keep the old object until `nbdcrypt up` has mounted the filesystem with the new one"
    )
}

impl From<AwsKeyError> for RewrapError {
    fn from(error: AwsKeyError) -> Self {
        Self::Key(error.into())
    }
}

/// Encrypts the secret of the volume on `header` again, under `kms_key` or else the first configured key. The header is changed
/// under `lock`. Blocks.
///
/// # Errors
/// [`RewrapError`], if the secret cannot be obtained, does not open the volume, or cannot be stored. The old ciphertext is
/// then still in place.
pub fn rewrap(
    config: &KeyConfig,
    limits: LimitsConfig,
    header: &dyn BlockStore,
    lock: &dyn Fn() -> Result<HeaderLock, DiskError>,
    kms_key: Option<String>,
) -> Result<Rewrapped, RewrapError> {
    let aws = match config {
        KeyConfig::Aws(aws) => aws,
        KeyConfig::File(file) => return Err(RewrapError::NotAws(file.to_string())),
        KeyConfig::Ephemeral => return Err(RewrapError::NotAws("memory".to_owned())),
    };
    if aws.raw_key.is_some() {
        return Err(RewrapError::Plain(aws.object.clone()));
    }
    let kms_keys = kms_key.map_or_else(|| aws.kms_keys.clone(), |key| vec![key]);
    if kms_keys.is_empty() {
        return Err(RewrapError::NoKmsKey);
    }
    let volume = luks::read_for_keys(header, &limits.limits(memory::limit_kib())).map_err(|error| {
        match (error, &aws.object) {
            (LuksError::NotLuks, object @ SecretLocation::Object(_)) => RewrapError::NoHeader(object.clone()),
            (error, _) => error.into(),
        }
    })?;
    let secret = keys::secret(config, &keys::request_for(config, header)?)?.passphrase;
    let keyslot = volume.unlock(header, &secret).map_err(RewrapError::Opens)?.keyslot;
    let anew = AwsKey::new(AwsKeyConfig { kms_keys, ..aws.clone() });
    match (&aws.object, &volume) {
        (SecretLocation::Token, LockedVolume::Luks2(_)) => {
            let found = luks2::read_header(header)?;
            // If there are several tokens, the secret may be of any of them.
            let id = KmsToken::of_keyslot(&found, keyslot).or_else(|| KmsToken::number(&found));
            let id = id.ok_or(NoTokenSecret::Missing)?;
            let token = anew.wrap_token(&secret, found.binary.uuid.parsed()?)?;
            // The lock is taken only now, so that cryptsetup does not have to wait for AWS.
            let _lock = lock()?;
            if luks2::read_header(header)? != found {
                return Err(RewrapError::Changed);
            }
            let json = token.in_place_of(&luks2::export_token(header, id)?);
            luks2::import_token(header, json.to_string().as_bytes(), Some(id), true, &mut random::fill)?;
            Ok(Rewrapped { location: Location::Token(id), key_arn: token.key_arn, read_back: Ok(()) })
        }
        (SecretLocation::Token, LockedVolume::Luks1(_)) => Err(LuksError::Luks2Only("tokens").into()),
        (SecretLocation::Object(object), _) => {
            let stored = anew.store(&secret, true)?;
            let location = Location::Object(object.to_string());
            Ok(Rewrapped { location, key_arn: stored.key_arn, read_back: stored.read_back })
        }
    }
}
