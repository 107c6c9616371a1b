//! Encrypts and decrypts secrets with KMS.

use std::mem;

use aws_sdk_kms::primitives::Blob;
use aws_sdk_s3::config::http::HttpResponse;
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};
use zeroize::Zeroizing;

use super::answer::{self, Answer, answer, common};
use super::credentials::Kind;
use super::error::{At, AwsError, Context, Service};
use super::retry::Patience;
use super::session::Session;
use crate::config::{AwsKeyConfig, SecretLocation};

/// Returns the plaintext of a ciphertext, unchanged.
pub(super) async fn decrypt(
    session: &Session,
    patience: Patience,
    config: &AwsKeyConfig,
    ciphertext: &[u8],
) -> Result<Zeroizing<Vec<u8>>, AwsError> {
    let request = session
        .kms
        .decrypt()
        .ciphertext_blob(Blob::new(ciphertext))
        .set_key_id(config.kms_key.clone())
        .set_encryption_context(context(config));
    let send = async || request.clone().send().await;
    // The copies of the answer in HTTP and TLS are freed without being wiped, and disappear when this process ends. KMS
    // does not encrypt an empty text, so an answer always contains a plaintext (KMS API Reference, `Encrypt`, `Plaintext`).
    ask(session, patience, config, "kms:Decrypt", send, |decrypted| {
        Some(Zeroizing::new(decrypted.plaintext?.into_inner()))
    })
    .await
}

/// The error code of a dry run that would have succeeded (KMS API Reference, `Decrypt`, `DryRun`).
const DRY_RUN: &str = "DryRunOperationException";

/// Checks whether KMS would decrypt the ciphertext for this machine, by a dry run: KMS answers without a plaintext.
pub(super) async fn may_decrypt(
    session: &Session,
    patience: Patience,
    config: &AwsKeyConfig,
    ciphertext: &[u8],
) -> Result<(), AwsError> {
    let request = session
        .kms
        .decrypt()
        .ciphertext_blob(Blob::new(ciphertext))
        .set_key_id(config.kms_key.clone())
        .set_encryption_context(context(config))
        .dry_run(true);
    let send = async || request.clone().send().await;
    // A server without support for dry runs decrypts the ciphertext. The plaintext is not used, and disappears with this
    // process.
    would_succeed(ask(session, patience, config, "kms:Decrypt", send, |_| Some(())).await)
}

/// Checks whether KMS would encrypt a secret for this machine, by a dry run.
pub(super) async fn may_encrypt(session: &Session, patience: Patience, config: &AwsKeyConfig) -> Result<(), AwsError> {
    let request = session
        .kms
        .encrypt()
        .plaintext(Blob::new(*b"not a secret"))
        .set_key_id(config.kms_key.clone())
        .set_encryption_context(context(config))
        .dry_run(true);
    let send = async || request.clone().send().await;
    would_succeed(ask(session, patience, config, "kms:Encrypt", send, |_| Some(())).await)
}

fn would_succeed(answer: Result<(), AwsError>) -> Result<(), AwsError> {
    match answer {
        Err(AwsError::Refused { code, .. }) if code == DRY_RUN => Ok(()),
        answer => answer,
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
    let send = async || {
        let request = session.kms.encrypt().plaintext(Blob::new(secret));
        request.set_key_id(config.kms_key.clone()).set_encryption_context(context(config)).send().await
    };
    ask(session, patience, config, "kms:Encrypt", send, |encrypted| {
        Some((encrypted.ciphertext_blob?.into_inner(), encrypted.key_id.unwrap_or_else(|| key(config))))
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
    let request = session
        .kms
        .generate_data_key_without_plaintext()
        .set_key_id(config.kms_key.clone())
        .set_encryption_context(context(config))
        // A volume key has at most 64 bytes.
        .number_of_bytes(i32::try_from(len).unwrap_or(i32::MAX));
    let send = async || request.clone().send().await;
    ask(session, patience, config, "kms:GenerateDataKeyWithoutPlaintext", send, |made| {
        Some((made.ciphertext_blob?.into_inner(), made.key_id.unwrap_or_else(|| key(config))))
    })
    .await
}

/// Sends a request to KMS, and repeats the request as long as that may help. Returns what `read` finds in the answer. `read`
/// returns `None` for an answer that is not complete.
async fn ask<O, E, T>(
    session: &Session,
    patience: Patience,
    config: &AwsKeyConfig,
    action: &'static str,
    send: impl AsyncFn() -> Result<O, SdkError<E, HttpResponse>>,
    read: impl Fn(O) -> Option<T>,
) -> Result<T, AwsError>
where
    E: ProvideErrorMetadata + std::error::Error + 'static,
{
    let asked = Asked::new(config, session, action);
    session
        .ask(patience, Service::Kms, async || {
            let answered = send().await.map_err(|error| failure(&error, session, &asked))?;
            read(answered).ok_or_else(|| answer::cut(Service::Kms, session.endpoint(Service::Kms)))
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
    fn new(config: &AwsKeyConfig, session: &Session, action: &'static str) -> Self {
        Self {
            object: config.object.clone(),
            configured_key: config.kms_key.clone(),
            key: key(config),
            context: Context(config.encryption_context.clone()),
            region: session.at(Service::Kms).region,
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

/// Returns the configured key, or else a description of it.
fn key(config: &AwsKeyConfig) -> String {
    config.kms_key.clone().unwrap_or_else(|| format!("the KMS key that {} was made under", config.object))
}

fn failure<E>(error: &SdkError<E, HttpResponse>, session: &Session, asked: &Asked) -> AwsError
where
    E: ProvideErrorMetadata + std::error::Error + 'static,
{
    match answer(error, Service::Kms, session.endpoint(Service::Kms)) {
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
