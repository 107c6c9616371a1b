//! The work behind `nbdcrypt key rewrap`: the secret that KMS keeps for a volume, encrypted anew, under another KMS key or
//! under the newest material of the same one. The keyslot, the secret and the volume key stay as they are.
//!
//! ```text
//!   KMS Decrypt (the configured key) ─► does it open the volume? ─► KMS Encrypt (the new key) ─► KMS Decrypt ─► token, or object
//! ```
//! Until the last step the old ciphertext is the one that counts.

use engine::luks::{self, LockedVolume, LuksError, luks2};
use engine::store::BlockStore;

use crate::config::{AwsKeyConfig, KeyConfig, KeyFile, LimitsConfig, SecretPlace};
use crate::disk::{DiskError, HeaderLock};
use crate::keys::{self, AwsKey, AwsKeyError, KeyError, NoTokenSecret};
use crate::system;

/// Where the new ciphertext is.
#[derive(Debug)]
pub struct Rewrapped {
    /// The token's number, or the object.
    pub place: Place,
    /// The ARN of the KMS key that it is encrypted under.
    pub key_arn: String,
    /// Why it could not be read back, if it was not: AWS's refusal to whoever rewraps.
    pub read_back: Result<(), AwsKeyError>,
}

/// Where a secret is kept, encrypted.
#[derive(Debug)]
pub enum Place {
    /// In the header.
    Token(u32),
    /// In S3.
    Object(String),
}

/// Why the old ciphertext is still the one that counts.
#[derive(Debug, thiserror::Error)]
pub enum RewrapError {
    /// No KMS has anything to do with it.
    #[error("there is nothing to rewrap: the configuration takes the secret from {0}, and not from AWS")]
    NotAws(KeyFile),
    /// No key is named to encrypt under.
    #[error("no KMS key is named: write `kms-key` under [key], or give --new-kms-key")]
    NoKmsKey,
    /// The configuration's volume has none.
    #[error("the configuration describes a plain volume, which has no header to try a secret on. {}", by_hand(.0))]
    Plain(SecretPlace),
    /// A wrong disk, or a plain volume whose key is hashed from a passphrase.
    #[error("it has no LUKS header to try the secret on: is it the volume's disk? If the volume is plain: {}", by_hand(.0))]
    NoHeader(SecretPlace),
    /// The secret could not be had, or not be encrypted.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// The header has no usable token.
    #[error(transparent)]
    Token(#[from] NoTokenSecret),
    /// The secret does not open the volume.
    #[error("the secret that KMS decrypted does not open the volume, and is left as it is: {0}")]
    Opens(#[source] LuksError),
    /// The header is not what it was when KMS was asked.
    #[error("its header was changed by somebody else meanwhile, and is left as it is: try again")]
    Changed,
    /// Somebody is at work on the header.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The header could not be read or changed.
    #[error(transparent)]
    Luks(#[from] LuksError),
}

/// What can be done for a volume without a header.
fn by_hand(object: &SecretPlace) -> String {
    format!(
        "KMS can encrypt {object} anew by itself: have `aws kms re-encrypt` (--destination-key-id, and the encryption \
         context for source and destination) make another ciphertext, store it under another name, and keep the old object \
         until `nbdcrypt up` has shown the filesystem with the new name as `object` and the new key as `kms-key` under [key]"
    )
}

impl From<AwsKeyError> for RewrapError {
    fn from(error: AwsKeyError) -> Self {
        Self::Key(error.into())
    }
}

/// Encrypts the secret of the volume on `header` anew: under `kms_key`, or the configured one. The header is changed under
/// `lock`. Blocks.
///
/// # Errors
/// [`RewrapError`].
pub fn rewrap(
    config: &KeyConfig,
    limits: LimitsConfig,
    header: &dyn BlockStore,
    lock: &dyn Fn() -> Result<HeaderLock, DiskError>,
    kms_key: Option<String>,
) -> Result<Rewrapped, RewrapError> {
    let aws = match config {
        KeyConfig::Aws(aws) => aws,
        KeyConfig::File(file) => return Err(RewrapError::NotAws(file.clone())),
    };
    if aws.raw_key.is_some() {
        return Err(RewrapError::Plain(aws.object.clone()));
    }
    let Some(kms_key) = kms_key.or_else(|| aws.kms_key.clone()) else { return Err(RewrapError::NoKmsKey) };
    let volume = luks::read_for_keys(header, &limits.limits()).map_err(|error| match (error, &aws.object) {
        (LuksError::NotLuks, object @ SecretPlace::Object(_)) => RewrapError::NoHeader(object.clone()),
        (error, _) => error.into(),
    })?;
    let secret = keys::secret(config, &keys::request_for(config, header)?)?.passphrase;
    volume.unlock(header, &secret).map_err(RewrapError::Opens)?;
    let anew = AwsKey::new(AwsKeyConfig { kms_key: Some(kms_key), ..aws.clone() });
    match (&aws.object, &volume) {
        (SecretPlace::Token, LockedVolume::Luks2(_)) => {
            let found = luks2::read_header(header)?;
            let id = keys::KmsToken::number(&found).ok_or(NoTokenSecret::Missing)?;
            let token = anew.wrap_token(&secret, found.binary.uuid)?;
            // AWS was not waited for under cryptsetup's lock.
            let _lock = lock()?;
            if luks2::read_header(header)? != found {
                return Err(RewrapError::Changed);
            }
            let json = token.in_place_of(&luks2::export_token(header, id)?);
            luks2::import_token(header, json.to_string().as_bytes(), Some(id), true, &mut system::random)?;
            Ok(Rewrapped { place: Place::Token(id), key_arn: token.key_arn, read_back: Ok(()) })
        }
        (SecretPlace::Token, LockedVolume::Luks1(_)) => Err(LuksError::Luks2Only("tokens").into()),
        (SecretPlace::Object(object), _) => {
            let stored = anew.store(&secret, true)?;
            let place = Place::Object(object.to_string());
            Ok(Rewrapped { place, key_arn: stored.key_arn, read_back: stored.read_back })
        }
    }
}
