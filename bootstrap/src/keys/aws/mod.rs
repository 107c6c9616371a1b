//! A secret that KMS decrypts, from an object in S3 or a token in the header. No other module uses the AWS SDK.
//!
//! The rest of the program uses [`AwsKey`]. It starts a [`helper`], a separate process that talks to AWS ([`work`]) and
//! ends after its answer.

mod answer;
pub mod backoff;
mod clock;
mod credentials;
mod error;
mod helper;
mod http;
mod key_id;
mod kms;
mod probe;
mod profile;
mod region;
mod retry;
mod s3;
mod session;
mod work;

use std::time::Duration;

use engine::key::Passphrase;
use uuid::Uuid;

use super::token::{self, KmsToken};
use super::{KeyError, KeySource};
use crate::config::AwsKeyConfig;
pub use error::MAX_CIPHERTEXT;
pub use helper::{AwsKeyError, SUBCOMMAND, absolute_aws_files, answer};
use helper::{Made, Outcome, Task};
use kms::Ciphertext;
pub use probe::{About, Finding, Outlook};
pub(super) use region::partition;

/// An object in S3 or a token, and the KMS key that decrypts it.
#[derive(Clone, Debug)]
pub struct AwsKey {
    config: AwsKeyConfig,
}

/// The result of storing a secret in S3.
#[derive(Debug)]
pub struct Stored {
    /// The ARN of the KMS key that encrypts the secret.
    pub key_arn: String,
    /// Whether the object was read back and decrypted. Contains AWS's error otherwise. Such an error is possible because a user
    /// who may write a secret may lack the permission to read it.
    pub read_back: Result<(), AwsKeyError>,
}

impl AwsKey {
    /// Makes a source for this configuration. This does not ask AWS yet.
    pub fn new(config: AwsKeyConfig) -> Self {
        Self { config }
    }

    /// Encrypts a secret with KMS, puts the ciphertext into S3, and reads it back. Replaces an existing object only if `replace`
    /// is set. In that case, KMS decrypts the new ciphertext once before the object is replaced. Blocks, as
    /// [`KeySource::passphrase`] does.
    ///
    /// # Errors
    /// [`AwsKeyError`]. If the object was written nevertheless, the text says so.
    pub fn store(&self, secret: &Passphrase, replace: bool) -> Result<Stored, AwsKeyError> {
        stored(made(&self.config, Task::Store { replace }, Some(secret))?)
    }

    /// Asks KMS for the ciphertext of a new key of `len` bytes whose plaintext nobody sees, puts the ciphertext into S3, and
    /// reads it back. Otherwise this works as [`AwsKey::store`].
    ///
    /// # Errors
    /// [`AwsKeyError`]. If the object was written nevertheless, the text says so.
    pub fn store_new_key(&self, len: usize, replace: bool) -> Result<Stored, AwsKeyError> {
        stored(made(&self.config, Task::StoreNewKey { len, replace }, None)?)
    }

    /// Returns the secret in the first of these tokens that KMS decrypts. The tokens have their numbers. A token that does not
    /// belong to this volume is left out. Blocks, as [`KeySource::passphrase`] does.
    ///
    /// # Errors
    /// [`AwsKeyError::Token`], if all tokens belong to another volume or configuration. Any other [`AwsKeyError`], if AWS
    /// reports an error.
    pub fn unwrap_tokens(&self, tokens: &[(u32, KmsToken)], volume: Uuid) -> Result<Passphrase, AwsKeyError> {
        let (mut ciphertexts, mut refused) = (Vec::new(), Vec::new());
        for (id, token) in tokens {
            match token.check(volume, &self.config.encryption_context) {
                Ok(()) => ciphertexts.push(ciphertext(*id, token)),
                Err(why) => refused.push((*id, why)),
            }
        }
        if ciphertexts.is_empty() {
            return Err(AwsKeyError::Token(token::listed(refused)));
        }
        for (id, why) in refused {
            tracing::warn!("token {id} in the LUKS2 header is left out: {why}");
        }
        if let [ciphertext] = &mut ciphertexts[..] {
            // An error need not say which token it was.
            ciphertext.name.clear();
        }
        // The request names the configured keys and not the token's key, because anyone who can write to the disk can choose
        // the token's content. `check` has compared the context.
        let encryption_context = KmsToken::context_for(volume, &self.config.encryption_context);
        let config = AwsKeyConfig { encryption_context, ..self.config.clone() };
        secret(&config, Task::Decrypt(ciphertexts))
    }

    /// Checks whether AWS would give the secret: gets credentials, reads the object in S3, and asks KMS for a dry run.
    /// Decrypts nothing, and repeats no request. `tokens` are the volume's tokens with their numbers, if the secret is in an
    /// existing header. Blocks for 16 seconds at most, and for 8 seconds more for each token and KMS key.
    ///
    /// # Errors
    /// [`AwsKeyError`], if the helper fails. A refusal by AWS is not an error, but one of the findings.
    pub fn probe(&self, tokens: &[(u32, KmsToken)]) -> Result<Vec<Finding>, AwsKeyError> {
        let mut config = self.config.clone();
        if let Some((_, token)) = tokens.first() {
            config.encryption_context = token.encryption_context.clone();
        }
        let ciphertexts = tokens.iter().map(|(id, token)| ciphertext(*id, token)).collect();
        match helper::ask(&config, Task::Probe { ciphertexts }, None)? {
            Outcome::Found(findings) => Ok(findings),
            Outcome::Secret(_) | Outcome::Made(_) => {
                Err(AwsKeyError::Answer("it is not a list of findings".to_owned()))
            }
        }
    }

    /// Returns a token that contains `secret` for the volume. The ciphertext is decrypted once, to check that this
    /// machine can decrypt it. Blocks, as [`KeySource::passphrase`] does.
    ///
    /// # Errors
    /// [`AwsKeyError`], if AWS reports an error, or the token does not decrypt to `secret`.
    pub fn wrap_token(&self, secret: &Passphrase, volume: Uuid) -> Result<KmsToken, AwsKeyError> {
        let encryption_context = KmsToken::context_for(volume, &self.config.encryption_context);
        let config = AwsKeyConfig { encryption_context, ..self.config.clone() };
        let Made { ciphertext, key_arn, .. } = made(&config, Task::Encrypt, Some(secret))?;
        Ok(KmsToken { ciphertext, key_arn, encryption_context: config.encryption_context })
    }
}

fn ciphertext(id: u32, token: &KmsToken) -> Ciphertext {
    Ciphertext { name: format!("token {id}"), bytes: token.ciphertext.clone() }
}

fn secret(config: &AwsKeyConfig, task: Task) -> Result<Passphrase, AwsKeyError> {
    match helper::ask(config, task, None)? {
        Outcome::Secret(secret) => Ok(secret),
        Outcome::Made(_) | Outcome::Found(_) => Err(AwsKeyError::Answer("it is not a secret".to_owned())),
    }
}

fn made(config: &AwsKeyConfig, task: Task, secret: Option<&Passphrase>) -> Result<Made, AwsKeyError> {
    match helper::ask(config, task, secret)? {
        Outcome::Made(made) => Ok(made),
        Outcome::Secret(_) | Outcome::Found(_) => {
            Err(AwsKeyError::Answer("it is something else, which was not requested".to_owned()))
        }
    }
}

fn stored(made: Made) -> Result<Stored, AwsKeyError> {
    let read_back = made.not_read_back.map_or(Ok(()), |why| Err(AwsKeyError::Said(why)));
    Ok(Stored { key_arn: made.key_arn, read_back })
}

impl KeySource for AwsKey {
    fn describe(&self) -> String {
        format!("the password in {}, decrypted by KMS", self.config.object)
    }

    fn check(&self) -> Result<(), KeyError> {
        // Only one attempt is made. A user who asks for a plan should not have to wait as long as at a boot.
        let config = AwsKeyConfig { retry_for: Duration::ZERO, ..self.config.clone() };
        Ok(made(&config, Task::FindCredentials, None).map(drop)?)
    }

    fn passphrase(&self) -> Result<Passphrase, KeyError> {
        Ok(secret(&self.config, Task::Fetch)?)
    }
}
