//! The work behind `nbdcrypt provision`: a new secret, encrypted by KMS, into S3.

use engine::key::Passphrase;
use zeroize::Zeroizing;

use crate::config::{AwsKeyConfig, Config, KeyConfig, KeyFile, SecretPlace};
use crate::keys::{AwsKey, AwsKeyError};

/// Bytes of randomness in a secret: as many as AES-256 has, so that no keyslot's hashing has to make up for them.
const SECRET_BYTES: usize = 32;

/// What was made.
#[derive(Debug)]
pub struct Provisioned {
    /// The object, as `s3://bucket/key`.
    pub object: String,
    /// The ARN of the KMS key that it is encrypted under.
    pub key_arn: String,
    /// Whether it was read back and decrypted; else AWS's refusal to whoever provisions, who may not be allowed to read.
    pub read_back: Result<(), AwsKeyError>,
}

/// Why nothing was made, or nothing of use.
#[derive(Debug, thiserror::Error)]
pub enum ProvisionError {
    /// The configuration's secret is no object in S3.
    #[error(
        "`nbdcrypt provision` makes a secret in S3 (source = \"aws\"), but the configuration takes it from {file}; \
         to make a key file: (umask 077; head -c 32 /dev/urandom | base64 -w0 > FILE)"
    )]
    NotAws {
        /// Where the secret is expected.
        file: KeyFile,
    },
    /// The secret is kept in the header, which is made with it.
    #[error(
        "there is nothing to provision: with `object = \"token\"` the secret is in the volume's own header, and \
         `nbdcrypt up` makes it with the volume"
    )]
    InHeader,
    /// No key is named to encrypt under.
    #[error(
        "`kms-key` is missing under [key]: write the KMS key to encrypt under, or make one: aws kms create-key, then \
         aws kms create-alias --alias-name alias/NAME --target-key-id KEY-ID, and `kms-key = \"alias/NAME\"`"
    )]
    NoKmsKey,
    /// The system has no randomness.
    #[error("no random bytes from the system: {0}")]
    Random(getrandom::Error),
    /// What AWS said.
    #[error(transparent)]
    Aws(#[from] AwsKeyError),
}

/// Makes a secret that nobody has seen: random (for a plain volume, whose key it is, by KMS), encrypted by KMS with the configured encryption context, stored in S3,
/// read back, decrypted and compared. An object that exists is left as it is unless `replace` says otherwise. Blocks.
///
/// # Errors
/// [`ProvisionError`].
pub fn provision(config: &Config, replace: bool) -> Result<Provisioned, ProvisionError> {
    let aws = match &config.key {
        KeyConfig::Aws(AwsKeyConfig { kms_key: None, .. }) => return Err(ProvisionError::NoKmsKey),
        KeyConfig::Aws(aws) if aws.object == SecretPlace::Token => return Err(ProvisionError::InHeader),
        KeyConfig::Aws(aws) => aws,
        KeyConfig::File(file) => return Err(ProvisionError::NotAws { file: file.clone() }),
    };
    let aws_key = AwsKey::new(aws.clone());
    let stored = match aws.raw_key {
        Some(len) => aws_key.store_new_key(len, replace)?,
        None => aws_key.store(&new_secret().map_err(ProvisionError::Random)?, replace)?,
    };
    Ok(Provisioned { object: aws.object.to_string(), key_arn: stored.key_arn, read_back: stored.read_back })
}

/// 256 bits from the system, in hexadecimal: text without a newline, a NUL or anything that means something to a shell,
/// so that `$(aws kms decrypt … | base64 --decode)` holds it as it is.
///
/// # Errors
/// What the system said.
pub fn new_secret() -> Result<Passphrase, getrandom::Error> {
    let mut random = Zeroizing::new([0; SECRET_BYTES]);
    getrandom::fill(&mut *random)?;
    // Of full size at once: a vector that grows leaves copies behind.
    let mut text = Vec::with_capacity(2 * SECRET_BYTES);
    for byte in random.iter() {
        text.extend([hex_digit(byte >> 4), hex_digit(byte & 15)]);
    }
    Ok(Passphrase::new(text))
}

fn hex_digit(nibble: u8) -> u8 {
    if nibble < 10 { b'0' + nibble } else { b'a' + nibble - 10 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    #[test]
    fn a_secret_is_64_hexadecimal_digits_and_never_the_same() {
        let secrets: Vec<Passphrase> = (0..16).map(|_| new_secret().unwrap()).collect();
        for secret in &secrets {
            assert_eq!(secret.expose().len(), 64);
            assert!(secret.expose().iter().all(|c| c.is_ascii_digit() || (b'a'..=b'f').contains(c)));
        }
        assert!(secrets[1..].iter().all(|secret| secret.expose() != secrets[0].expose()));
        let digits: std::collections::BTreeSet<u8> = secrets.iter().flat_map(|s| s.expose().to_vec()).collect();
        assert_eq!(digits.len(), 16, "every digit occurs");
    }

    #[test]
    fn what_cannot_be_provisioned_says_what_to_do() {
        let parse = |key: &str| {
            let text = format!("[volume]\ndevices = [\"/x\"]\n[key]\n{key}\n");
            Config::parse(&text, Path::new("/etc/x.toml")).unwrap()
        };
        let file = provision(&parse("source = \"file\"\npath = \"/etc/x.key\""), false).unwrap_err().to_string();
        assert!(file.contains("/etc/x.key") && file.contains("/dev/urandom"), "{file}");
        let aws = provision(&parse("source = \"aws\"\nobject = \"s3://bucket/key\""), false).unwrap_err().to_string();
        assert!(aws.contains("kms-key") && aws.contains("create-alias"), "{aws}");
    }
}
