//! Does the helper's tasks.

use engine::key::Passphrase;

use super::error::AwsError;
use super::helper::{Made, Outcome, Task};
use super::kms::Ciphertext;
use super::retry::Patience;
use super::session::Session;
use super::{kms, probe, s3};
use crate::config::{AwsKeyConfig, S3Object, SecretLocation};

/// Does the task. `secret` is the secret to encrypt, or empty. Blocks.
///
/// # Errors
/// [`AwsError`], if AWS cannot be reached or reports an error.
pub(super) fn run(config: &AwsKeyConfig, task: Task, secret: &Passphrase) -> Result<Outcome, AwsError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(AwsError::Runtime)?;
    runtime.block_on(async {
        // Ctrl-C reaches both processes. The parent decides what to do about it, and this process ends with the parent.
        let _interrupts = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::interrupt());
        let patience = Patience::from_now(config.retry_for);
        let work = async || {
            let session = Session::open(config, patience).await?;
            Ok::<_, AwsError>(Work { config, session, patience })
        };
        match task {
            Task::FindCredentials => work().await.map(|_| Outcome::Made(Made::default())),
            Task::Fetch => work().await?.fetch().await.map(Outcome::Secret),
            Task::Probe { ciphertexts } => Ok(Outcome::Found(probe::findings(config, ciphertexts).await)),
            Task::Decrypt(ciphertexts) => work().await?.decrypt(&ciphertexts).await.map(Outcome::Secret),
            Task::Encrypt => work().await?.encrypt(secret).await.map(Outcome::Made),
            Task::Store { replace } => work().await?.store(secret, replace).await.map(Outcome::Made),
            Task::StoreNewKey { len, replace } => work().await?.store_new_key(len, replace).await.map(Outcome::Made),
        }
    })
}

struct Work<'w> {
    config: &'w AwsKeyConfig,
    session: Session,
    patience: Patience,
}

impl Work<'_> {
    async fn fetch(&self) -> Result<Passphrase, AwsError> {
        let ciphertext = s3::get(&self.session, self.patience, self.object()?).await?;
        self.decrypt_one(ciphertext).await
    }

    async fn decrypt_one(&self, ciphertext: Vec<u8>) -> Result<Passphrase, AwsError> {
        self.decrypt(&[Ciphertext { name: String::new(), bytes: ciphertext }]).await
    }

    /// Decrypts one of the ciphertexts with KMS and returns the password.
    async fn decrypt(&self, ciphertexts: &[Ciphertext]) -> Result<Passphrase, AwsError> {
        let mut plaintext = kms::decrypt(&self.session, self.patience, self.config, ciphertexts).await?;
        let password = Passphrase::new(match self.config.raw_key {
            // Newlines at the end of a key belong to it.
            Some(_) => std::mem::take(&mut *plaintext),
            None => kms::without_newlines(plaintext),
        });
        if password.expose().is_empty() {
            return Err(AwsError::EmptySecret { object: self.config.object.clone() });
        }
        Ok(password)
    }

    async fn encrypt(&self, secret: &Passphrase) -> Result<Made, AwsError> {
        let (ciphertext, key_arn) = kms::encrypt(&self.session, self.patience, self.config, secret.expose()).await?;
        let back = self.decrypt_one(ciphertext.clone()).await?;
        if back.expose() != secret.expose() {
            return Err(AwsError::Token("it does not decrypt to what was encrypted".to_owned()));
        }
        Ok(Made { ciphertext, key_arn, not_read_back: None })
    }

    async fn store(&self, secret: &Passphrase, replace: bool) -> Result<Made, AwsError> {
        let object = self.object()?;
        let (ciphertext, key_arn) = kms::encrypt(&self.session, self.patience, self.config, secret.expose()).await?;
        self.put(object, ciphertext, key_arn, replace, |found| found.expose() == secret.expose()).await
    }

    async fn store_new_key(&self, len: usize, replace: bool) -> Result<Made, AwsError> {
        let object = self.object()?;
        let (ciphertext, key_arn) = kms::new_key(&self.session, self.patience, self.config, len).await?;
        self.put(object, ciphertext, key_arn, replace, |found| found.expose().len() == len).await
    }

    /// Puts the ciphertext into S3 and reads it back. If the object may replace another one, the new ciphertext is
    /// first decrypted. A machine that may encrypt but not decrypt could otherwise replace the last ciphertext that
    /// opens the volume.
    async fn put(
        &self,
        object: &S3Object,
        ciphertext: Vec<u8>,
        key_arn: String,
        replace: bool,
        is_right: impl Fn(&Passphrase) -> bool,
    ) -> Result<Made, AwsError> {
        if replace {
            match self.decrypt_one(ciphertext.clone()).await {
                Ok(found) if is_right(&found) => {}
                Ok(_) => return Err(AwsError::NotReplacedByAnother { object: object.clone() }),
                Err(why) => return Err(AwsError::NotReplaced { object: object.clone(), why: Box::new(why) }),
            }
        }
        s3::put(&self.session, self.patience, object, &self.config.stored_as, &ciphertext, replace).await?;
        let not_read_back = match self.fetch().await {
            Ok(found) if is_right(&found) => None,
            Ok(_) => return Err(AwsError::NotAsWritten { object: object.clone() }),
            Err(error) if error.is_denial() => Some(error.to_string()),
            Err(error) => return Err(error),
        };
        Ok(Made { ciphertext, key_arn, not_read_back })
    }

    fn object(&self) -> Result<&S3Object, AwsError> {
        match &self.config.object {
            SecretLocation::Object(object) => Ok(object),
            SecretLocation::Token => Err(AwsError::Token("no object in S3 is configured".to_owned())),
        }
    }
}
