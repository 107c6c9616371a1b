//! The sources of a volume's secret.

mod aws;
mod ephemeral;
mod file;
pub mod opening;
pub mod policy;
mod prompt;
pub mod provision;
pub mod rewrap;
mod token;
pub mod verify;

use engine::key::Passphrase;
use engine::luks::{self, Dump, LuksError};
use engine::store::BlockStore;
use uuid::Uuid;

use crate::config::{KeyConfig, KeyFile, SecretLocation};

pub use aws::{
    About, AwsKey, AwsKeyError, Finding, MAX_CIPHERTEXT, Outlook, SUBCOMMAND as AWS_HELPER, Stored, absolute_aws_files,
    answer as answer_as_aws_helper, backoff,
};
pub use ephemeral::EphemeralKey;
pub use file::{FileKey, FileKeyError, MAX_KEY_FILE};
pub use prompt::{Prompt, PromptError};
pub use token::KmsToken;

/// A source of the secret that opens a volume's keyslot.
///
/// # Blocking contract
/// A call blocks the thread, for up to the source's configured time for retries. A boot does one thing after the other.
/// A process that later moves into the background must not have any other threads. So a source that needs a runtime,
/// threads or a process starts them within the call and ends them before it returns. A call may come from anywhere,
/// also from inside an async runtime.
pub trait KeySource: Send + Sync {
    /// Describes the source for display, without any secret.
    fn describe(&self) -> String;

    /// Checks what can be checked without getting the secret. Blocks for a minute at most.
    ///
    /// # Errors
    /// [`KeyError`], if the secret could not be obtained.
    fn check(&self) -> Result<(), KeyError>;

    /// Gets the secret.
    ///
    /// # Errors
    /// [`KeyError`], which says what was found and what to do, and contains no part of the secret.
    fn passphrase(&self) -> Result<Passphrase, KeyError>;
}

/// Why the secret could not be obtained.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The secret comes from a file or standard input.
    #[error(transparent)]
    File(#[from] FileKeyError),
    /// The secret is typed at the terminal.
    #[error(transparent)]
    Prompt(#[from] PromptError),
    /// The secret comes from S3 and KMS.
    #[error(transparent)]
    Aws(#[from] AwsKeyError),
    /// The operating system has no random bytes.
    #[error("the operating system has no random bytes: {0}")]
    Random(getrandom::Error),
    /// A token was requested, but the secret is not in AWS.
    #[error("the configuration takes the secret from elsewhere, not from a token in the header")]
    NoToken,
}

/// Which secret of a volume is requested.
#[derive(Clone, Debug)]
pub enum SecretRequest {
    /// The secret that the configuration names.
    Configured,
    /// The secret in one of the header's tokens. They are tried in order.
    Unwrap {
        /// The tokens with their numbers. At least one.
        tokens: Vec<(u32, KmsToken)>,
        /// The UUID of the volume to which the tokens belong.
        volume: Uuid,
    },
    /// A new secret, with a token for a header that is about to be made.
    New {
        /// The UUID of the new volume.
        volume: Uuid,
    },
}

/// A volume's secret.
#[derive(Debug)]
pub struct Secret {
    /// The passphrase of the keyslot.
    pub passphrase: Passphrase,
    /// For a new secret: its token, and the UUID of its volume.
    pub token: Option<(KmsToken, Uuid)>,
}

/// Returns whether the secret is stored in the volume's own header.
pub fn is_in_header(config: &KeyConfig) -> bool {
    matches!(config, KeyConfig::Aws(aws) if aws.object == SecretLocation::Token)
}

/// Returns where the secret comes from, in one word: `s3+kms`, `token+kms`, `file`, `stdin` or `ephemeral`.
pub fn source_name(config: &KeyConfig) -> &'static str {
    match config {
        KeyConfig::Aws(_) if is_in_header(config) => "token+kms",
        KeyConfig::Aws(_) => "s3+kms",
        KeyConfig::File(KeyFile::Stdin) => "stdin",
        KeyConfig::File(KeyFile::Path(_)) => "file",
        KeyConfig::Ephemeral => "ephemeral",
    }
}

/// Why the secret cannot be found in the header, although the configuration says that it is there.
#[derive(Debug, thiserror::Error)]
pub enum NoTokenSecret {
    /// The disk has no readable LUKS header.
    #[error(transparent)]
    Luks(#[from] LuksError),
    /// The token is malformed.
    #[error("the token `aws-kms` in its header cannot be used: {0}")]
    Unusable(String),
    /// The header has no token of type `aws-kms`.
    #[error("its header has no token `aws-kms`: check `object` under [key]; the secret may be in S3")]
    Missing,
}

/// Returns which secret opens the volume whose header is on `header`.
///
/// # Errors
/// [`NoTokenSecret`], if the secret should be in the header, but the header is missing or has no usable token.
pub fn request_for(config: &KeyConfig, header: &dyn BlockStore) -> Result<SecretRequest, NoTokenSecret> {
    if !is_in_header(config) {
        return Ok(SecretRequest::Configured);
    }
    let Dump::Luks2(header) = luks::dump(header)? else { return Err(NoTokenSecret::Missing) };
    let tokens = KmsToken::usable(&header).map_err(NoTokenSecret::Unusable)?;
    if tokens.is_empty() {
        return Err(NoTokenSecret::Missing);
    }
    Ok(SecretRequest::Unwrap { tokens, volume: header.binary.uuid.parsed()? })
}

/// Gets or makes a secret. Blocks, as [`KeySource::passphrase`] does.
///
/// # Errors
/// [`KeyError`], if the source fails, or a token is requested although the secret is not in AWS.
pub fn secret(config: &KeyConfig, request: &SecretRequest) -> Result<Secret, KeyError> {
    match (request, config) {
        (SecretRequest::Configured, _) => Ok(Secret { passphrase: source(config).passphrase()?, token: None }),
        (SecretRequest::Unwrap { tokens, volume }, KeyConfig::Aws(aws)) => {
            let passphrase = AwsKey::new(aws.clone()).unwrap_tokens(tokens, *volume)?;
            Ok(Secret { passphrase, token: None })
        }
        (SecretRequest::New { volume }, KeyConfig::Aws(aws)) => {
            let passphrase = provision::new_secret().map_err(KeyError::Random)?;
            let token = AwsKey::new(aws.clone()).wrap_token(&passphrase, *volume)?;
            Ok(Secret { passphrase, token: Some((token, *volume)) })
        }
        (_, KeyConfig::File(_) | KeyConfig::Ephemeral) => Err(KeyError::NoToken),
    }
}

/// Returns the configured source. This does not read anything yet.
pub fn source(config: &KeyConfig) -> Box<dyn KeySource> {
    match config {
        KeyConfig::File(file) => Box::new(FileKey::from_config(file.clone())),
        KeyConfig::Aws(aws) => Box::new(AwsKey::new(aws.clone())),
        KeyConfig::Ephemeral => Box::new(EphemeralKey),
    }
}
