//! KMS: a secret into a ciphertext, and back.

use std::mem;

use aws_sdk_kms::primitives::Blob;
use aws_sdk_s3::config::http::HttpResponse;
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};
use tracing::instrument::WithSubscriber;
use tracing::subscriber::NoSubscriber;
use zeroize::Zeroizing;

use super::answer::{Answer, answer, common};
use super::error::{AwsKeyError, Context, Service};
use super::retry::{Patience, retried};
use super::session::{ATTEMPT, Session};
use crate::config::{AwsKeyConfig, SecretPlace};

/// What KMS makes of the object's bytes, as it is.
pub(super) async fn decrypt(
    session: &Session,
    patience: Patience,
    config: &AwsKeyConfig,
    ciphertext: &[u8],
) -> Result<Zeroizing<Vec<u8>>, AwsKeyError> {
    let asked = Asked::new(config, session, "kms:Decrypt");
    retried(
        patience,
        ATTEMPT,
        || overdue(session),
        async || {
            let request = session
                .kms
                .decrypt()
                .ciphertext_blob(Blob::new(ciphertext))
                .set_key_id(config.kms_key.clone())
                .set_encryption_context(context(config));
            let decrypted = silent(request.send()).await.map_err(|error| failure(&error, session, &asked))?;
            // Moved, not copied. What HTTP and TLS held of the answer is out of reach, and freed without being wiped.
            Ok(Zeroizing::new(decrypted.plaintext.map(Blob::into_inner).unwrap_or_default()))
        },
    )
    .await
}

/// The ciphertext of a secret, and the ARN of the key that it was made under.
pub(super) async fn encrypt(
    session: &Session,
    patience: Patience,
    config: &AwsKeyConfig,
    secret: &[u8],
) -> Result<(Vec<u8>, String), AwsKeyError> {
    let asked = Asked::new(config, session, "kms:Encrypt");
    retried(
        patience,
        ATTEMPT,
        || overdue(session),
        async || {
            let request = session
                .kms
                .encrypt()
                .set_key_id(config.kms_key.clone())
                .set_encryption_context(context(config))
                // The SDK's copies of it are out of reach, and freed without being wiped.
                .plaintext(Blob::new(secret));
            let encrypted = silent(request.send()).await.map_err(|error| failure(&error, session, &asked))?;
            let key = encrypted.key_id.unwrap_or_else(|| asked.key.clone());
            Ok((encrypted.ciphertext_blob.map(Blob::into_inner).unwrap_or_default(), key))
        },
    )
    .await
}

/// The ciphertext of a new random key of `len` bytes, and the ARN of the key that it was made under.
pub(super) async fn new_key(
    session: &Session,
    patience: Patience,
    config: &AwsKeyConfig,
    len: usize,
) -> Result<(Vec<u8>, String), AwsKeyError> {
    let asked = Asked::new(config, session, "kms:GenerateDataKeyWithoutPlaintext");
    retried(
        patience,
        ATTEMPT,
        || overdue(session),
        async || {
            let request = session
                .kms
                .generate_data_key_without_plaintext()
                .set_key_id(config.kms_key.clone())
                .set_encryption_context(context(config))
                // A volume key has 64 bytes at most.
                .number_of_bytes(i32::try_from(len).unwrap_or(i32::MAX));
            let made = silent(request.send()).await.map_err(|error| failure(&error, session, &asked))?;
            let key = made.key_id.unwrap_or_else(|| asked.key.clone());
            Ok((made.ciphertext_blob.map(Blob::into_inner).unwrap_or_default(), key))
        },
    )
    .await
}

/// The password that a shell's `$(aws kms decrypt … | base64 --decode)` would have held: without the newlines at its end
/// (POSIX Shell Command Language, 2.6.3), and only those.
///
/// A shell drops NUL bytes too, wherever they are, and says so or not. They stay here: bytes with NUL were never a
/// password that went through a shell, but a key made for a program.
pub(super) fn without_newlines(mut plaintext: Zeroizing<Vec<u8>>) -> Vec<u8> {
    let len = plaintext.iter().rposition(|&byte| byte != b'\n').map_or(0, |last| last + 1);
    plaintext.truncate(len);
    mem::take(&mut *plaintext)
}

/// Runs a request without the SDK's logging: at the level TRACE it prints bodies, and with LOG_SENSITIVE_BODIES in the
/// environment those with secrets too.
async fn silent<T>(request: impl Future<Output = T>) -> T {
    request.with_subscriber(NoSubscriber::default()).await
}

/// What an error text has to name.
struct Asked {
    object: SecretPlace,
    configured_key: Option<String>,
    key: String,
    context: Context,
    region: String,
    action: &'static str,
}

impl Asked {
    fn new(config: &AwsKeyConfig, session: &Session, action: &'static str) -> Self {
        Self {
            object: config.object.clone(),
            configured_key: config.kms_key.clone(),
            key: config.kms_key.clone().unwrap_or_else(|| format!("the KMS key that {} was made under", config.object)),
            context: Context(config.encryption_context.clone()),
            region: session.region.clone(),
            action,
        }
    }
}

/// `None` where it is empty: KMS takes no empty map for none.
fn context(config: &AwsKeyConfig) -> Option<std::collections::HashMap<String, String>> {
    let pairs = &config.encryption_context;
    (!pairs.is_empty()).then(|| pairs.iter().map(|(key, value)| (key.clone(), value.clone())).collect())
}

fn overdue(session: &Session) -> AwsKeyError {
    let detail = format!("no answer within {} s", ATTEMPT.as_secs());
    AwsKeyError::Unreachable { service: Service::Kms, endpoint: session.kms_endpoint.uri(), detail }
}

fn failure<E>(error: &SdkError<E, HttpResponse>, session: &Session, asked: &Asked) -> AwsKeyError
where
    E: ProvideErrorMetadata + std::error::Error + 'static,
{
    match answer(error, Service::Kms, session.kms_endpoint.uri()) {
        Ok(answer) => meaning(answer, asked),
        Err(error) => error,
    }
}

/// What KMS's answer means (KMS API Reference, `Decrypt` and `Encrypt`, "Errors").
fn meaning(answer: Answer, asked: &Asked) -> AwsKeyError {
    if let Some(error) = common(Service::Kms, &answer) {
        return error;
    }
    let Answer { status, code, message, .. } = answer;
    let Asked { object, key, context, region, action, .. } = asked;
    let (object, key, region) = (object.clone(), key.clone(), region.clone());
    match (code.as_str(), &asked.configured_key) {
        ("AccessDeniedException" | "AccessDenied", _) => AwsKeyError::KmsDenied { action, key, region, message },
        ("NotFoundException" | "InvalidArnException", _) => AwsKeyError::NoKey { key, region, message },
        ("DisabledException", _) => AwsKeyError::KeyDisabled { key, message },
        ("KMSInvalidStateException" | "KMSInvalidState", _) => AwsKeyError::KeyState { key, message },
        ("InvalidKeyUsageException", _) => AwsKeyError::KeyUsage { key, message },
        ("IncorrectKeyException", Some(_)) => AwsKeyError::OtherKey { object, key },
        ("InvalidCiphertextException", _) => AwsKeyError::Ciphertext { object, context: context.clone() },
        // In no words of KMS's: something before it, as a firewall or an endpoint's policy.
        (_, _) if matches!(status, 401 | 403) => AwsKeyError::KmsDenied { action, key, region, message },
        _ => AwsKeyError::Refused { service: Service::Kms, code, message },
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
            action: "kms:Decrypt",
        };
        let text = meaning(answer, &asked).to_string();
        for word in expected {
            assert!(text.contains(word), "`{word}` in: {text}");
        }
    }

    #[test]
    fn every_answer_that_kms_documents_says_what_to_do() {
        check("AccessDeniedException", "no", &["no;", "kms:Decrypt on alias/mine", "us-east-1"]);
        check("NotFoundException", "Alias x is not found.", &["no key alias/mine in us-east-1", "create-alias"]);
        check("DisabledException", "arn:x is disabled.", &["alias/mine is disabled", "arn:x", "enable-key"]);
        check("KMSInvalidStateException", "arn:x is pending deletion.", &["pending deletion", "cancel-key-deletion"]);
        check("InvalidKeyUsageException", "m", &["alias/mine is no symmetric key"]);
        check("IncorrectKeyException", "m", &["s3://my-bucket/key", "another key than alias/mine"]);
        check(
            "InvalidCiphertextException",
            "",
            &["s3://my-bucket/key", "truncated", "{ \"volume\" = \"scratch\" }", "encryption-context"],
        );
        check("ValidationException", "too long", &["KMS refused (ValidationException): too long"]);
    }

    #[test]
    fn the_newlines_at_the_end_go_and_nothing_else() {
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
