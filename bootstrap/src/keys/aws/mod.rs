//! The secret as an object in S3 that KMS decrypts. The AWS SDK is named here and in no other module.

mod answer;
mod error;
mod kms;
mod retry;
mod s3;
mod session;

use std::thread;

use engine::key::Passphrase;

use uuid::Uuid;

use super::token::KmsToken;
use super::{KeyError, KeySource};
use crate::config::{AwsKeyConfig, S3Object, SecretPlace};
pub use error::{AwsKeyError, Context, MAX_CIPHERTEXT, Service};
use retry::Patience;
use session::Session;

/// An object in S3, and the key in KMS that opens it.
#[derive(Clone, Debug)]
pub struct AwsKey {
    config: AwsKeyConfig,
}

/// A secret that was put into S3.
#[derive(Debug)]
pub struct Stored {
    /// The ARN of the KMS key that it is encrypted under.
    pub key_arn: String,
    /// Whether it was read back and decrypted. Who may write a secret may not always be allowed to read it: then this
    /// is AWS's refusal.
    pub read_back: Result<(), AwsKeyError>,
}

impl AwsKey {
    /// Nothing is asked yet.
    pub fn new(config: AwsKeyConfig) -> Self {
        Self { config }
    }

    /// Encrypts a secret by KMS, puts the ciphertext into S3, and reads it back. An object that exists is left alone
    /// unless `replace` says otherwise; then the ciphertext is decrypted once before it takes another one's place.
    /// Blocks, as [`KeySource::passphrase`] does.
    ///
    /// # Errors
    /// [`AwsKeyError`]. When the object was written nonetheless, it says so.
    pub fn store(&self, secret: &Passphrase, replace: bool) -> Result<Stored, AwsKeyError> {
        block_on(async || {
            let object = self.object()?;
            let patience = Patience::from_now(self.config.retry_for);
            let session = Session::open(&self.config, patience).await?;
            let (ciphertext, key_arn) = kms::encrypt(&session, patience, &self.config, secret.expose()).await?;
            let is_right = |found: &Passphrase| found.expose() == secret.expose();
            let read_back = self.put(&session, patience, object, &ciphertext, replace, is_right).await?;
            Ok(Stored { key_arn, read_back })
        })
    }

    /// Has KMS make a key of `len` bytes, whose plaintext nobody sees, puts its ciphertext into S3, and reads it back, as
    /// [`AwsKey::store`] does.
    ///
    /// # Errors
    /// [`AwsKeyError`].
    pub fn store_new_key(&self, len: usize, replace: bool) -> Result<Stored, AwsKeyError> {
        block_on(async || {
            let object = self.object()?;
            let patience = Patience::from_now(self.config.retry_for);
            let session = Session::open(&self.config, patience).await?;
            let (ciphertext, key_arn) = kms::new_key(&session, patience, &self.config, len).await?;
            let is_right = |found: &Passphrase| found.expose().len() == len;
            let read_back = self.put(&session, patience, object, &ciphertext, replace, is_right).await?;
            Ok(Stored { key_arn, read_back })
        })
    }

    /// Puts the ciphertext into S3 and reads it back. What may replace another is decrypted before, too: the old one is the
    /// last that opens the volume if this machine may encrypt under the key and not decrypt.
    async fn put(
        &self,
        session: &Session,
        patience: Patience,
        object: &S3Object,
        ciphertext: &[u8],
        replace: bool,
        is_right: impl Fn(&Passphrase) -> bool,
    ) -> Result<Result<(), AwsKeyError>, AwsKeyError> {
        if replace {
            match decrypt(session, patience, &self.config, ciphertext).await {
                Ok(found) if is_right(&found) => {}
                Ok(_) => return Err(AwsKeyError::NotReplacedByAnother { object: object.clone() }),
                Err(why) => return Err(AwsKeyError::NotReplaced { object: object.clone(), why: Box::new(why) }),
            }
        }
        s3::put(session, patience, object, ciphertext, replace).await?;
        match self.fetch(session, patience).await {
            Ok(found) if is_right(&found) => Ok(Ok(())),
            Ok(_) => Err(AwsKeyError::NotAsWritten { object: object.clone() }),
            Err(denied @ (AwsKeyError::S3Denied { .. } | AwsKeyError::KmsDenied { .. })) => Ok(Err(denied)),
            Err(error) => Err(error),
        }
    }

    async fn fetch(&self, session: &Session, patience: Patience) -> Result<Passphrase, AwsKeyError> {
        let ciphertext = s3::get(session, patience, self.object()?).await?;
        decrypt(session, patience, &self.config, &ciphertext).await
    }

    fn object(&self) -> Result<&S3Object, AwsKeyError> {
        match &self.config.object {
            SecretPlace::Object(object) => Ok(object),
            SecretPlace::Token => Err(AwsKeyError::Token("no object in S3 is configured".to_owned())),
        }
    }

    /// The secret that a token holds, once it is known to be of this volume. Blocks, as [`KeySource::passphrase`] does.
    ///
    /// # Errors
    /// [`AwsKeyError`].
    pub fn unwrap_token(&self, token: &KmsToken, volume: Uuid) -> Result<Passphrase, AwsKeyError> {
        token.check(volume, &self.config.encryption_context).map_err(AwsKeyError::Token)?;
        // The key is the configured one: who may write to the disk chooses what is in the token.
        let config = AwsKeyConfig { encryption_context: token.encryption_context.clone(), ..self.config.clone() };
        block_on(async || {
            let patience = Patience::from_now(config.retry_for);
            let session = Session::open(&config, patience).await?;
            decrypt(&session, patience, &config, &token.ciphertext).await
        })
    }

    /// A token that holds `secret` for the volume, decrypted once to be sure that this machine can. Blocks, as
    /// [`KeySource::passphrase`] does.
    ///
    /// # Errors
    /// [`AwsKeyError`].
    pub fn wrap_token(&self, secret: &Passphrase, volume: Uuid) -> Result<KmsToken, AwsKeyError> {
        let encryption_context = KmsToken::context_for(volume, &self.config.encryption_context);
        let config = AwsKeyConfig { encryption_context, ..self.config.clone() };
        block_on(async || {
            let patience = Patience::from_now(config.retry_for);
            let session = Session::open(&config, patience).await?;
            let (ciphertext, key_arn) = kms::encrypt(&session, patience, &config, secret.expose()).await?;
            let back = decrypt(&session, patience, &config, &ciphertext).await?;
            if back.expose() != secret.expose() {
                return Err(AwsKeyError::Token("it does not decrypt to what was encrypted".to_owned()));
            }
            Ok(KmsToken { ciphertext, key_arn, encryption_context: config.encryption_context.clone() })
        })
    }
}

/// The password that KMS makes of a ciphertext.
async fn decrypt(
    session: &Session,
    patience: Patience,
    config: &AwsKeyConfig,
    ciphertext: &[u8],
) -> Result<Passphrase, AwsKeyError> {
    let mut plaintext = kms::decrypt(session, patience, config, ciphertext).await?;
    let password = Passphrase::new(match config.raw_key {
        // A key ends as it ends.
        Some(_) => std::mem::take(&mut *plaintext),
        None => kms::without_newlines(plaintext),
    });
    if password.expose().is_empty() {
        return Err(AwsKeyError::EmptySecret { object: config.object.clone() });
    }
    Ok(password)
}

impl KeySource for AwsKey {
    fn describe(&self) -> String {
        format!("the password in {}, decrypted by KMS", self.config.object)
    }

    fn passphrase(&self) -> Result<Passphrase, KeyError> {
        let fetched = block_on(async || {
            let patience = Patience::from_now(self.config.retry_for);
            let session = Session::open(&self.config, patience).await?;
            self.fetch(&session, patience).await
        });
        Ok(fetched?)
    }
}

/// Does the work on an event loop and a thread that live no longer than the call: see the blocking contract of
/// [`KeySource`].
fn block_on<T: Send>(work: impl AsyncFnOnce() -> Result<T, AwsKeyError> + Send) -> Result<T, AwsKeyError> {
    let run = || {
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(AwsKeyError::Runtime)?;
        runtime.block_on(work())
    };
    // A runtime cannot be entered from within another's thread, and the caller may be on one.
    thread::scope(|scope| {
        let thread = thread::Builder::new().name("aws".to_owned()).spawn_scoped(scope, run);
        match thread.map_err(AwsKeyError::Runtime)?.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}
