//! Where a volume's secret comes from.

mod aws;
mod file;
mod prompt;
mod token;

use engine::key::Passphrase;
use engine::luks::{self, Dump, LuksError};
use engine::store::BlockStore;
use uuid::Uuid;

use crate::config::{KeyConfig, SecretPlace};
use crate::provision;

pub use aws::{AwsKey, AwsKeyError, Context, MAX_CIPHERTEXT, Service, Stored};
pub use file::{FileKey, FileKeyError, MAX_KEY_FILE};
pub use prompt::{Prompt, PromptError};
pub use token::KmsToken;

/// Something that knows the secret that opens a volume's keyslot.
///
/// # Blocking contract
/// Calls block the thread, for as long as the source's configured time to retry. A boot is one thing after the other,
/// and a process that later forks into the background may have no thread left over: a source that needs a runtime or
/// threads starts them for the call and has ended them when it returns. It may be called from anywhere, from within
/// an async runtime as well.
pub trait KeySource: Send + Sync {
    /// What is read and where, for people: no secret in it.
    fn describe(&self) -> String;

    /// The secret.
    ///
    /// # Errors
    /// [`KeyError`], which says what was found and what to do, and nothing of the secret.
    fn passphrase(&self) -> Result<Passphrase, KeyError>;
}

/// Why there is no secret.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// From a file or standard input.
    #[error(transparent)]
    File(#[from] FileKeyError),
    /// From the terminal.
    #[error(transparent)]
    Prompt(#[from] PromptError),
    /// From S3 and KMS.
    #[error(transparent)]
    Aws(#[from] AwsKeyError),
    /// The system has no randomness.
    #[error("no random bytes from the system: {0}")]
    Random(getrandom::Error),
    /// The configuration keeps its secret elsewhere.
    #[error("the configured secret is in no token of a header")]
    NoToken,
}

/// Which secret of a volume is wanted.
#[derive(Clone, Debug)]
pub enum SecretRequest {
    /// The one that the configuration names.
    Configured,
    /// The one that the header's token holds.
    Unwrap {
        /// The token.
        token: KmsToken,
        /// The volume that has it.
        volume: Uuid,
    },
    /// A new one, with a token for a header that is about to be made.
    New {
        /// What the new volume will be called by.
        volume: Uuid,
    },
}

/// A volume's secret.
#[derive(Debug)]
pub struct Secret {
    /// What opens the keyslot.
    pub passphrase: Passphrase,
    /// Of a new one, the token that holds it, and the volume that it is for.
    pub token: Option<(KmsToken, Uuid)>,
}

/// Whether the secret is in the volume's own header, so that it cannot be had without.
pub fn is_in_header(config: &KeyConfig) -> bool {
    matches!(config, KeyConfig::Aws(aws) if aws.object == SecretPlace::Token)
}

/// Why a header does not hold the secret that the configuration says is there.
#[derive(Debug, thiserror::Error)]
pub enum NoTokenSecret {
    /// There is no such header.
    #[error(transparent)]
    Luks(#[from] LuksError),
    /// The token contradicts itself.
    #[error("the token `aws-kms` in its header cannot be used: {0}")]
    Unusable(String),
    /// There is no token.
    #[error("its header has no token `aws-kms`: see `object` under [key], where the secret may be in S3")]
    Missing,
}

/// What is to be asked for to open the volume whose header is on `header`.
///
/// # Errors
/// [`NoTokenSecret`], where the secret is in the header.
pub fn request_for(config: &KeyConfig, header: &dyn BlockStore) -> Result<SecretRequest, NoTokenSecret> {
    if !is_in_header(config) {
        return Ok(SecretRequest::Configured);
    }
    let Dump::Luks2(header) = luks::dump(header)? else { return Err(NoTokenSecret::Missing) };
    let token = KmsToken::find(&header).map_err(NoTokenSecret::Unusable)?.ok_or(NoTokenSecret::Missing)?;
    Ok(SecretRequest::Unwrap { token, volume: header.binary.uuid })
}

/// Gets or makes a secret. Blocks, as [`KeySource::passphrase`] does.
///
/// # Errors
/// [`KeyError`].
pub fn secret(config: &KeyConfig, request: &SecretRequest) -> Result<Secret, KeyError> {
    match (request, config) {
        (SecretRequest::Configured, _) => Ok(Secret { passphrase: source(config).passphrase()?, token: None }),
        (SecretRequest::Unwrap { token, volume }, KeyConfig::Aws(aws)) => {
            let passphrase = AwsKey::new(aws.clone()).unwrap_token(token, *volume)?;
            Ok(Secret { passphrase, token: None })
        }
        (SecretRequest::New { volume }, KeyConfig::Aws(aws)) => {
            let passphrase = provision::new_secret().map_err(KeyError::Random)?;
            let token = AwsKey::new(aws.clone()).wrap_token(&passphrase, *volume)?;
            Ok(Secret { passphrase, token: Some((token, *volume)) })
        }
        (_, KeyConfig::File(_)) => Err(KeyError::NoToken),
    }
}

/// The source that a configuration asks for. Nothing is read yet.
pub fn source(config: &KeyConfig) -> Box<dyn KeySource> {
    match config {
        KeyConfig::File(file) => Box::new(FileKey::new(file.clone())),
        KeyConfig::Aws(aws) => Box::new(AwsKey::new(aws.clone())),
    }
}
