//! Where a volume's secret comes from.

mod aws;
mod file;

use engine::key::Passphrase;

use crate::config::KeyConfig;

pub use aws::{AwsKey, AwsKeyError, Context, MAX_CIPHERTEXT, Service, Stored};
pub use file::{FileKey, FileKeyError, MAX_KEY_FILE};

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
    /// From S3 and KMS.
    #[error(transparent)]
    Aws(#[from] AwsKeyError),
}

/// The source that a configuration asks for. Nothing is read yet.
pub fn source(config: &KeyConfig) -> Box<dyn KeySource> {
    match config {
        KeyConfig::File(file) => Box::new(FileKey::new(file.clone())),
        KeyConfig::Aws(aws) => Box::new(AwsKey::new(aws.clone())),
    }
}
