//! Encrypts and decrypts secrets with KMS.

use std::mem;

use aws_sdk_kms::primitives::Blob;
use aws_sdk_s3::config::http::HttpResponse;
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::answer::{self, Answer, answer, common};
use super::credentials::Kind;
use super::error::{At, AwsError, Context, Service};
use super::key_id::is_the_key;
use super::retry::Patience;
use super::session::{KmsKey, Session};
use crate::config::{AwsKeyConfig, SecretLocation};

/// A ciphertext of the secret.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Ciphertext {
    /// A name for errors, if there are several ciphertexts.
    pub(super) name: String,
    pub(super) bytes: Vec<u8>,
}

/// A way to get an answer: a KMS key, and the ciphertext that it should decrypt.
struct Way<'w> {
    key: &'w KmsKey,
    ciphertext: &'w [u8],
    name: String,
}

impl<'w> Way<'w> {
    /// Returns the way that makes a new ciphertext: under the first key.
    fn to_encrypt(session: &'w Session) -> Vec<Self> {
        let way = |key| Self { key, ciphertext: &[], name: String::new() };
        session.kms_keys().iter().take(1).map(way).collect()
    }

    /// Returns the ways to decrypt one of the ciphertexts: each ciphertext with each key.
    fn to_decrypt(session: &'w Session, ciphertexts: &'w [Ciphertext]) -> Vec<Self> {
        let keys = session.kms_keys();
        let way = |ciphertext: &'w Ciphertext, key: &'w KmsKey| {
            let with = key.name.as_deref().filter(|_| keys.len() > 1 || ciphertext.name.is_empty());
            let name = match (ciphertext.name.as_str(), with) {
                ("", Some(key)) => key.to_owned(),
                (name, Some(key)) => format!("{name} with {key}"),
                (name, None) => name.to_owned(),
            };
            Self { key, ciphertext: &ciphertext.bytes, name }
        };
        ciphertexts.iter().flat_map(|ciphertext| keys.iter().map(move |key| way(ciphertext, key))).collect()
    }
}

/// Returns the plaintext of the first ciphertext that a key decrypts, unchanged. The ciphertexts and the keys take turns, in
/// their order.
pub(super) async fn decrypt(
    session: &Session,
    patience: Patience,
    config: &AwsKeyConfig,
    ciphertexts: &[Ciphertext],
) -> Result<Zeroizing<Vec<u8>>, AwsError> {
    let ways = Way::to_decrypt(session, ciphertexts);
    let send = async |way: &Way<'_>| {
        let request = way.key.client.decrypt().ciphertext_blob(Blob::new(way.ciphertext));
        request.set_key_id(way.key.name.clone()).set_encryption_context(context(config)).send().await
    };
    // The copies of the answer in HTTP and TLS are freed without being wiped, and disappear when this process ends. KMS
    // does not encrypt an empty text, so an answer always contains a plaintext (KMS API Reference, `Encrypt`, `Plaintext`).
    ask(session, patience, config, "kms:Decrypt", &ways, send, |decrypted| {
        (decrypted.key_id, decrypted.plaintext.map(|plaintext| Zeroizing::new(plaintext.into_inner())))
    })
    .await
    .map(|(plaintext, _)| plaintext)
}

/// The error code of a dry run that would have succeeded (KMS API Reference, `Decrypt`, `DryRun`).
const DRY_RUN: &str = "DryRunOperationException";

/// Checks whether KMS would decrypt the ciphertext for this machine with this key, by a dry run: KMS answers without a
/// plaintext.
pub(super) async fn may_decrypt(
    session: &Session,
    patience: Patience,
    config: &AwsKeyConfig,
    key: &KmsKey,
    ciphertext: &[u8],
) -> Result<(), AwsError> {
    let send = async |way: &Way<'_>| {
        let request = way.key.client.decrypt().ciphertext_blob(Blob::new(way.ciphertext)).dry_run(true);
        request.set_key_id(way.key.name.clone()).set_encryption_context(context(config)).send().await
    };
    // A server without support for dry runs decrypts the ciphertext. The plaintext is not used, and disappears with this
    // process.
    let ways = [Way { key, ciphertext, name: String::new() }];
    would_succeed(ask(session, patience, config, "kms:Decrypt", &ways, send, |out| (out.key_id, Some(()))).await)
}

/// Checks whether KMS would encrypt a secret for this machine, by a dry run.
pub(super) async fn may_encrypt(session: &Session, patience: Patience, config: &AwsKeyConfig) -> Result<(), AwsError> {
    let send = async |way: &Way<'_>| {
        let request = way.key.client.encrypt().plaintext(Blob::new(*b"not a secret")).dry_run(true);
        request.set_key_id(way.key.name.clone()).set_encryption_context(context(config)).send().await
    };
    let ways = Way::to_encrypt(session);
    would_succeed(ask(session, patience, config, "kms:Encrypt", &ways, send, |out| (out.key_id, Some(()))).await)
}

fn would_succeed(answer: Result<((), String), AwsError>) -> Result<(), AwsError> {
    match answer {
        Err(AwsError::Refused { code, .. }) if code == DRY_RUN => Ok(()),
        answer => answer.map(|_| ()),
    }
}

/// Returns the ciphertext of a secret, and the ARN of the key that encrypted the secret.
pub(super) async fn encrypt(
    session: &Session,
    patience: Patience,
    config: &AwsKeyConfig,
    secret: &[u8],
) -> Result<(Vec<u8>, String), AwsError> {
    // The request is made again for each attempt, so that no copy of the secret is kept between attempts.
    let send = async |way: &Way<'_>| {
        let request = way.key.client.encrypt().plaintext(Blob::new(secret));
        request.set_key_id(way.key.name.clone()).set_encryption_context(context(config)).send().await
    };
    ask(session, patience, config, "kms:Encrypt", &Way::to_encrypt(session), send, |encrypted| {
        (encrypted.key_id, encrypted.ciphertext_blob.map(Blob::into_inner))
    })
    .await
}

/// Returns the ciphertext of a new random key of `len` bytes, and the ARN of the KMS key that encrypted this key.
pub(super) async fn new_key(
    session: &Session,
    patience: Patience,
    config: &AwsKeyConfig,
    len: usize,
) -> Result<(Vec<u8>, String), AwsError> {
    let send = async |way: &Way<'_>| {
        let request = way.key.client.generate_data_key_without_plaintext().set_key_id(way.key.name.clone());
        // A volume key has at most 64 bytes.
        let request = request.number_of_bytes(i32::try_from(len).unwrap_or(i32::MAX));
        request.set_encryption_context(context(config)).send().await
    };
    ask(session, patience, config, "kms:GenerateDataKeyWithoutPlaintext", &Way::to_encrypt(session), send, |made| {
        (made.key_id, made.ciphertext_blob.map(Blob::into_inner))
    })
    .await
}

/// Sends a request to KMS in each of the ways, in turn, and repeats the requests as long as that may help. `read` returns the
/// `KeyId` of an answer, and what else the caller needs of it, or `None` for an answer that is not complete. Returns what
/// `read` found, and the `KeyId`.
///
/// An answer that names another key than the configured one is an error.
async fn ask<O, E, T>(
    session: &Session,
    patience: Patience,
    config: &AwsKeyConfig,
    action: &'static str,
    ways: &[Way<'_>],
    send: impl AsyncFn(&Way<'_>) -> Result<O, SdkError<E, HttpResponse>>,
    read: impl Fn(O) -> (Option<String>, Option<T>),
) -> Result<(T, String), AwsError>
where
    E: ProvideErrorMetadata + std::error::Error + 'static,
{
    let names: Vec<String> = ways.iter().map(|way| way.name.clone()).collect();
    let keys: Vec<&KmsKey> = ways.iter().map(|way| way.key).collect();
    session
        .ask_kms(patience, &keys, &names, async |number| {
            let way = &ways[number];
            let asked = Asked::new(config, session, way.key, action);
            let answered = send(way).await.map_err(|error| failure(&error, way.key, &asked))?;
            let (key_id, found) = read(answered);
            let found = found.ok_or_else(|| answer::cut(Service::Kms, way.key.endpoint()))?;
            let key_id = key_id.unwrap_or_default();
            match &way.key.name {
                Some(name) if !is_the_key(name, &key_id, &way.key.region) => Err(AwsError::OtherKeyAnswered {
                    key: name.clone(),
                    answered: key_id,
                    region: way.key.region.clone(),
                }),
                _ => Ok((found, key_id)),
            }
        })
        .await
}

/// Returns the password that a shell's `$(aws kms decrypt … | base64 --decode)` would yield: the plaintext without
/// newlines at its end (POSIX Shell Command Language, 2.6.3).
///
/// A shell also drops NUL bytes anywhere. They are kept here: a plaintext with NUL was never a password from a shell, but
/// a key made for a program.
pub(super) fn without_newlines(mut plaintext: Zeroizing<Vec<u8>>) -> Vec<u8> {
    let len = plaintext.iter().rposition(|&byte| byte != b'\n').map_or(0, |last| last + 1);
    plaintext.truncate(len);
    mem::take(&mut *plaintext)
}

/// What error texts need to know about a request.
struct Asked {
    object: SecretLocation,
    configured_key: Option<String>,
    key: String,
    context: Context,
    region: String,
    credentials: Kind,
    action: &'static str,
}

impl Asked {
    fn new(config: &AwsKeyConfig, session: &Session, key: &KmsKey, action: &'static str) -> Self {
        let of_object = || format!("the KMS key that {} was made under", config.object);
        Self {
            object: config.object.clone(),
            configured_key: key.name.clone(),
            key: key.name.clone().unwrap_or_else(of_object),
            context: Context(config.encryption_context.clone()),
            region: key.region.clone(),
            credentials: session.credentials_kind(),
            action,
        }
    }
}

/// Returns the encryption context, or `None` if it is empty: KMS refuses an empty map.
fn context(config: &AwsKeyConfig) -> Option<std::collections::HashMap<String, String>> {
    let pairs = &config.encryption_context;
    (!pairs.is_empty()).then(|| pairs.iter().map(|(key, value)| (key.clone(), value.clone())).collect())
}

fn failure<E>(error: &SdkError<E, HttpResponse>, key: &KmsKey, asked: &Asked) -> AwsError
where
    E: ProvideErrorMetadata + std::error::Error + 'static,
{
    match answer(error, Service::Kms, key.endpoint()) {
        Ok(answer) => meaning(answer, asked),
        Err(error) => error,
    }
}

/// Returns the error for a response of KMS (KMS API Reference, `Decrypt` and `Encrypt`, "Errors").
fn meaning(answer: Answer, asked: &Asked) -> AwsError {
    let Asked { object, key, context, region, credentials, action, .. } = asked;
    let at = At { service: Service::Kms, region: region.clone() };
    if let Some(error) = common(at.clone(), &answer, *credentials) {
        return error;
    }
    let course = answer::course(&answer, *credentials);
    let Answer { status, code, message, .. } = answer;
    let (object, key, region) = (object.clone(), key.clone(), region.clone());
    match (code.as_str(), &asked.configured_key) {
        ("AccessDeniedException" | "AccessDenied", _) => AwsError::KmsDenied { action, key, region, message, course },
        ("NotFoundException" | "InvalidArnException", _) => AwsError::NoKey { key, region, message },
        ("DisabledException", _) => AwsError::KeyDisabled { key, message },
        ("KMSInvalidStateException" | "KMSInvalidState", _) => AwsError::KeyState { key, message },
        ("InvalidKeyUsageException", _) => AwsError::KeyUsage { key, message },
        ("IncorrectKeyException", Some(_)) => AwsError::OtherKey { object, key },
        ("InvalidCiphertextException", _) => AwsError::Ciphertext { object, context: context.clone() },
        // This is not an error code of KMS. Something in front of KMS refused, such as a firewall or an endpoint's
        // policy.
        (_, _) if matches!(status, 401 | 403) => AwsError::KmsDenied { action, key, region, message, course },
        _ => AwsError::Refused { at, code, message },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::S3Object;

    #[track_caller]
    fn check(code: &str, message: &str, expected: &[&str]) {
        let answer = Answer { status: 400, code: code.to_owned(), message: message.to_owned(), bucket_region: None };
        let asked = Asked {
            object: S3Object::parse("s3://my-bucket/key").unwrap().into(),
            configured_key: Some("alias/mine".to_owned()),
            key: "alias/mine".to_owned(),
            context: Context([("volume".to_owned(), "scratch".to_owned())].into()),
            region: "us-east-1".to_owned(),
            credentials: Kind::LongTerm,
            action: "kms:Decrypt",
        };
        let text = meaning(answer, &asked).to_string();
        for word in expected {
            assert!(text.contains(word), "`{word}` in: {text}");
        }
    }

    #[test]
    fn every_documented_error_of_kms_says_what_to_do() {
        check("AccessDeniedException", "no", &["no;", "kms:Decrypt on alias/mine", "us-east-1"]);
        check("NotFoundException", "Alias x is not found.", &["no key alias/mine in us-east-1", "create-alias"]);
        check("DisabledException", "arn:x is disabled.", &["alias/mine is disabled", "arn:x", "enable-key"]);
        check("KMSInvalidStateException", "arn:x is pending deletion.", &["pending deletion", "cancel-key-deletion"]);
        check("InvalidKeyUsageException", "m", &["alias/mine is not a symmetric key"]);
        check("IncorrectKeyException", "m", &["s3://my-bucket/key", "another key than alias/mine"]);
        check(
            "InvalidCiphertextException",
            "",
            &["s3://my-bucket/key", "truncated", "{ \"volume\" = \"scratch\" }", "encryption-context"],
        );
        check("ValidationException", "too long", &["KMS in us-east-1 refused (ValidationException): too long"]);
    }

    #[test]
    fn only_newlines_at_the_end_are_removed() {
        for (plaintext, password) in [
            (&b"ThisIs-a-SecretPassword"[..], &b"ThisIs-a-SecretPassword"[..]),
            (b"pass\n", b"pass"),
            (b"pass\n\n\n", b"pass"),
            (b"\npa\nss\r\n", b"\npa\nss\r"),
            (b"pass \n", b"pass "),
            (b"pass\n\0", b"pass\n\0"),
            (b"\n\n", b""),
            (b"", b""),
        ] {
            assert_eq!(without_newlines(Zeroizing::new(plaintext.to_vec())), password);
        }
    }
}
