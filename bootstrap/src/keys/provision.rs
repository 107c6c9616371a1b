//! Does the work of `nbdcrypt provision`: makes a new secret, encrypts it with KMS, and stores it in S3.

use engine::key::Passphrase;
use zeroize::Zeroizing;

use crate::config::{Config, KeyConfig, KeyFile, SecretLocation};
use crate::keys::{AwsKey, AwsKeyError};

/// The number of random bytes in a secret: as many as in an AES-256 key, so that the secret needs no expensive key
/// derivation.
const SECRET_BYTES: usize = 32;

/// The result of [`provision`].
#[derive(Debug)]
pub struct Provisioned {
    /// The object, as `s3://bucket/key`.
    pub object: String,
    /// The ARN of the KMS key that encrypts the secret.
    pub key_arn: String,
    /// Whether the object was read back and decrypted. If not, this holds the error: for example, the user has no permission
    /// to read the object.
    pub read_back: Result<(), AwsKeyError>,
}

/// Why no usable secret was stored.
#[derive(Debug, thiserror::Error)]
pub enum ProvisionError {
    /// The configured secret is not an object in S3.
    #[error(
        "`nbdcrypt provision` makes a secret in S3 (source = \"aws\"), but the configuration takes it from {file}; \
         to make a key file: (umask 077; head -c 32 /dev/urandom | base64 -w0 > FILE)"
    )]
    NotAws {
        /// The configured key file.
        file: KeyFile,
    },
    /// The configured secret is in the header, and is made together with it.
    #[error(
        "there is nothing to provision: with `object = \"token\"` the secret is in the volume's own header, and \
         `nbdcrypt up` makes it with the volume"
    )]
    InHeader,
    /// The key is made at each start, and never stored.
    #[error(
        "there is nothing to provision: with source = \"ephemeral\" the key exists in memory only, and `nbdcrypt up` makes it with \
         the volume"
    )]
    Ephemeral,
    /// The configuration names no KMS key.
    #[error(
        "`kms-key` is missing under [key]: write the KMS key to encrypt with, or make one: aws kms create-key, then \
         aws kms create-alias --alias-name alias/NAME --target-key-id KEY-ID, and `kms-key = \"alias/NAME\"`"
    )]
    NoKmsKey,
    /// The operating system has no random bytes.
    #[error("the operating system has no random bytes: {0}")]
    Random(getrandom::Error),
    /// AWS reported an error.
    #[error(transparent)]
    Aws(#[from] AwsKeyError),
}

/// Makes a secret that nobody has seen, encrypts it with KMS under the configured encryption context, stores it in S3,
/// reads it back, decrypts it and compares it. The secret is random text, or, if it is the key of a plain volume, a key
/// that KMS makes. An existing object is replaced only if `replace` is set. Blocks.
///
/// # Errors
/// [`ProvisionError`], if the configuration does not describe a secret in S3, or AWS reports an error.
pub fn provision(config: &Config, replace: bool) -> Result<Provisioned, ProvisionError> {
    let aws = match &config.key {
        KeyConfig::Aws(aws) if aws.kms_keys.is_empty() => return Err(ProvisionError::NoKmsKey),
        KeyConfig::Aws(aws) if aws.object == SecretLocation::Token => return Err(ProvisionError::InHeader),
        KeyConfig::Aws(aws) => aws,
        KeyConfig::File(file) => return Err(ProvisionError::NotAws { file: file.clone() }),
        KeyConfig::Ephemeral => return Err(ProvisionError::Ephemeral),
    };
    let aws_key = AwsKey::new(aws.clone());
    let stored = match aws.raw_key {
        Some(len) => aws_key.store_new_key(len, replace)?,
        None => aws_key.store(&new_secret().map_err(ProvisionError::Random)?, replace)?,
    };
    Ok(Provisioned { object: aws.object.to_string(), key_arn: stored.key_arn, read_back: stored.read_back })
}

/// Returns 256 random bits in hexadecimal. This text has no newline, no NUL and no character with a meaning in a shell, so
/// that `$(aws kms decrypt … | base64 --decode)` yields it unchanged.
///
/// # Errors
/// The error of the operating system's source of randomness.
pub fn new_secret() -> Result<Passphrase, getrandom::Error> {
    let mut random = Zeroizing::new([0; SECRET_BYTES]);
    getrandom::fill(&mut *random)?;
    // The vector has its full capacity from the start. A vector that grows leaves copies behind.
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
    fn a_secret_has_64_hexadecimal_digits_and_never_repeats() {
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
    fn errors_of_provisioning_say_what_to_do() {
        let parse = |key: &str| {
            let text = format!("[volume]\ndevices = [\"/x\"]\n[key]\n{key}\n");
            Config::parse(&text, Path::new("/etc/x.toml")).unwrap()
        };
        let file = provision(&parse("source = \"file\"\npath = \"/etc/x.key\""), false).unwrap_err().to_string();
        assert!(file.contains("/etc/x.key") && file.contains("/dev/urandom"), "{file}");
        let aws = provision(&parse("source = \"aws\"\nobject = \"s3://bucket/key\""), false).unwrap_err().to_string();
        assert!(aws.contains("kms-key") && aws.contains("create-alias"), "{aws}");
        let text = "[volume]\ndevices = [\"/x\"]\nephemeral = true\n[key]\nsource = \"ephemeral\"\n";
        let ephemeral = Config::parse(text, Path::new("/etc/x.toml")).unwrap();
        let error = provision(&ephemeral, false).unwrap_err().to_string();
        assert!(error.contains("nothing to provision") && error.contains("memory only"), "{error}");
    }
}
