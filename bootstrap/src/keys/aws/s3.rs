//! Reads and writes the object in S3.

use std::collections::BTreeMap;

use aws_sdk_s3::config::http::HttpResponse;
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_s3::primitives::ByteStream;
use aws_sdk_s3::types::{self, ChecksumAlgorithm, ChecksumMode};

use super::answer::{self, Answer, answer, causes, common};
use super::credentials::Kind;
use super::error::{At, AwsError, MAX_CIPHERTEXT, Service};
use super::retry::Patience;
use super::session::Session;
use crate::config::{S3Object, ServerSideEncryption, StoredAs};

/// Returns the object's bytes, 1 to [`MAX_CIPHERTEXT`].
pub(super) async fn get(session: &Session, patience: Patience, object: &S3Object) -> Result<Vec<u8>, AwsError> {
    where_it_is(session, patience, async |s3| {
        // S3 sends the checksum that it stores with the object. The SDK compares it with the bytes, unless a profile turns this
        // off and the request does not name it (S3 User Guide, "Checking object integrity").
        let request = s3.get_object().bucket(&object.bucket).key(&object.key).checksum_mode(ChecksumMode::Enabled);
        let sent = request.send().await;
        let found = sent.map_err(|error| failure(&error, session, object, "s3:GetObject"))?;
        let too_large = || AwsError::TooLarge { object: object.clone() };
        // If the announced length is too large, nothing is read.
        if found.content_length().and_then(|len| usize::try_from(len).ok()).is_some_and(|len| len > MAX_CIPHERTEXT) {
            return Err(too_large());
        }
        let mut body = found.body;
        let mut bytes = Vec::new();
        while let Some(piece) = body.next().await {
            let piece = piece.map_err(|error| broken(causes(&error), session.s3_endpoint(), object))?;
            if bytes.len() + piece.len() > MAX_CIPHERTEXT {
                return Err(too_large());
            }
            bytes.extend_from_slice(&piece);
        }
        if bytes.is_empty() {
            return Err(AwsError::Empty { object: object.clone() });
        }
        Ok(bytes)
    })
    .await
}

/// Returns the error for a body that could not be read completely.
fn broken(detail: String, endpoint: String, object: &S3Object) -> AwsError {
    // The SDK's error type is in a crate of its own, so this looks at its text.
    match detail.contains("checksum mismatch") {
        true => AwsError::Damaged { object: object.clone(), endpoint, detail },
        false => AwsError::unreachable(Service::S3, endpoint, detail),
    }
}

/// Writes the object. Unless `replace` is set, an existing object is kept, even if another program makes it meanwhile.
pub(super) async fn put(
    session: &Session,
    patience: Patience,
    object: &S3Object,
    stored_as: &StoredAs,
    bytes: &[u8],
    replace: bool,
) -> Result<(), AwsError> {
    if !replace {
        refuse_existing(session, patience, object).await?;
    }
    let put = where_it_is(session, patience, async |s3| {
        let mut request =
            s3.put_object().bucket(&object.bucket).key(&object.key).body(ByteStream::from(bytes.to_vec()));
        // S3 compares the checksum with the bytes that arrive, and stores it.
        request = request.checksum_algorithm(ChecksumAlgorithm::Crc32);
        request = match &stored_as.encryption {
            None => request,
            Some(kind) => {
                request.server_side_encryption(encryption(kind)).set_ssekms_key_id(kind.kms_key().map(str::to_owned))
            }
        };
        if !stored_as.tags.is_empty() {
            request = request.tagging(query(&stored_as.tags));
        }
        if !replace {
            // S3 User Guide, "How to prevent object overwrites with conditional writes".
            request = request.if_none_match("*");
        }
        let sent = request.send().await;
        sent.map(|_| ()).map_err(|error| failure(&error, session, object, PUT))
    })
    .await;
    match put {
        // The response to an earlier attempt of this call may have been lost after the write succeeded.
        Err(AwsError::Exists { .. }) if get(session, patience, object).await.is_ok_and(|found| found == bytes) => {
            Ok(())
        }
        result => result,
    }
}

const PUT: &str = "s3:PutObject";

fn encryption(kind: &ServerSideEncryption) -> types::ServerSideEncryption {
    match kind {
        ServerSideEncryption::Aes256 => types::ServerSideEncryption::Aes256,
        ServerSideEncryption::Kms(_) => types::ServerSideEncryption::AwsKms,
        ServerSideEncryption::KmsDsse(_) => types::ServerSideEncryption::AwsKmsDsse,
    }
}

/// Returns tags in the form of URL query parameters (S3 API Reference, `PutObject`, `x-amz-tagging`).
fn query(tags: &BTreeMap<String, String>) -> String {
    let encoded = |text: &str| {
        text.bytes().fold(String::new(), |mut encoded, byte| {
            match byte {
                b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => encoded.push(char::from(byte)),
                _ => encoded.push_str(&format!("%{byte:02X}")),
            }
            encoded
        })
    };
    tags.iter().map(|(name, value)| format!("{}={}", encoded(name), encoded(value))).collect::<Vec<_>>().join("&")
}

/// Returns what an action needs besides itself, as the end of a sentence.
fn also_needed(action: &str, stored_as: &StoredAs) -> String {
    let is_tagged = action == PUT && !stored_as.tags.is_empty();
    let tagging = is_tagged.then(|| "; for `tags`, also s3:PutObjectTagging".to_owned());
    let of_key = if action == PUT { "kms:GenerateDataKey" } else { "kms:Decrypt" };
    let key = stored_as.encryption.as_ref().and_then(ServerSideEncryption::kms_key);
    let sse = key.map(|key| format!("; for `sse-kms-key-id`, also {of_key} with {key}"));
    [tagging, sse].into_iter().flatten().collect()
}

/// Checks whether the object exists before it is written. An S3-compatible server may not support conditional writes, and
/// would overwrite.
async fn refuse_existing(session: &Session, patience: Patience, object: &S3Object) -> Result<(), AwsError> {
    where_it_is(session, patience, async |s3| {
        match s3.head_object().bucket(&object.bucket).key(&object.key).send().await {
            Ok(_) => Err(AwsError::Exists { object: object.clone() }),
            Err(error) => match failure(&error, session, object, "s3:GetObject") {
                // The object is missing, or its existence is not known: the conditional write decides.
                AwsError::NoObject { .. } | AwsError::S3Denied { .. } => Ok(()),
                other => Err(other),
            },
        }
    })
    .await
}

/// Makes attempts, as [`Session::ask_s3`] does. If S3 says that the bucket is in another region, asks there at once.
async fn where_it_is<T>(
    session: &Session,
    patience: Patience,
    mut attempt: impl AsyncFnMut(aws_sdk_s3::Client) -> Result<T, AwsError>,
) -> Result<T, AwsError> {
    session
        .ask_s3(patience, async || match attempt(session.s3()).await {
            Err(AwsError::WrongRegion { right: Some(region), .. }) if session.follow_bucket(&region) => {
                attempt(session.s3()).await
            }
            result => result,
        })
        .await
}

fn failure<E>(error: &SdkError<E, HttpResponse>, session: &Session, object: &S3Object, action: &'static str) -> AwsError
where
    E: ProvideErrorMetadata + std::error::Error + 'static,
{
    match answer(error, Service::S3, session.s3_endpoint()) {
        Ok(answer) => {
            let mut error = meaning(answer, session.at_s3(), session.credentials_kind(), object, action);
            if let AwsError::S3Denied { also, .. } = &mut error {
                *also = also_needed(action, session.stored_as()).into();
            }
            error
        }
        Err(error) => error,
    }
}

/// Returns the error for a response of S3 (S3 API Reference, "Error responses", "List of error codes").
fn meaning(answer: Answer, at: At, credentials: Kind, object: &S3Object, action: &'static str) -> AwsError {
    let region = at.region.clone();
    let elsewhere = answer.bucket_region.clone().filter(|right| *right != region);
    // In the wrong region, even the credentials may be unknown.
    let is_elsewhere = elsewhere.is_some() && matches!(answer.status, 301 | 307 | 400 | 403);
    if let Some(error) = common(at.clone(), &answer, credentials).filter(|_| !is_elsewhere) {
        return error;
    }
    let course = answer::course(&answer, credentials);
    let Answer { status, code, message, .. } = answer;
    let object = object.clone();
    let bucket = object.bucket.clone();
    match (code.as_str(), status) {
        ("NoSuchBucket", _) => AwsError::NoBucket { bucket, region },
        ("PreconditionFailed", _) | (_, 412) => AwsError::Exists { object },
        ("PermanentRedirect" | "TemporaryRedirect" | "AuthorizationHeaderMalformed", _)
        | ("IllegalLocationConstraintException" | "IncorrectEndpoint", _)
        | (_, 301 | 307) => {
            AwsError::WrongRegion { bucket, asked: region, right: elsewhere.or_else(|| expected_region(&message)) }
        }
        // A response to HEAD has no body, so it has no code. Only the header distinguishes a wrong region from a wrong
        // signature.
        (_, 400 | 403) if elsewhere.is_some() => AwsError::WrongRegion { bucket, asked: region, right: elsewhere },
        ("NoSuchKey" | "NotFound", _) | (_, 404) => AwsError::NoObject { object, region },
        (_, 403) => AwsError::S3Denied { object, action, region: region.into(), message, course, also: "".into() },
        _ => AwsError::Refused { at, code, message },
    }
}

/// Extracts the region from `the region 'us-east-1' is wrong; expecting 'eu-west-1'`.
fn expected_region(message: &str) -> Option<String> {
    let rest = message.split_once("expecting '")?.1;
    Some(rest.split_once('\'')?.0.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(status: u16, code: &str, message: &str, bucket_region: Option<&str>, expected: &[&str]) {
        let answer = Answer {
            status,
            code: code.to_owned(),
            message: message.to_owned(),
            bucket_region: bucket_region.map(ToOwned::to_owned),
        };
        let object = S3Object::parse("s3://my-bucket/a/key").unwrap();
        let at = At { service: Service::S3, region: "us-east-1".to_owned() };
        let text = meaning(answer, at, Kind::LongTerm, &object, "s3:GetObject").to_string();
        for word in expected {
            assert!(text.contains(word), "`{word}` in: {text}");
        }
    }

    #[test]
    fn tags_are_encoded_as_a_query() {
        let tags = [("a b".to_owned(), "1+2=3".to_owned()), ("ä".to_owned(), String::new())].into();
        assert_eq!(query(&tags), "a%20b=1%2B2%3D3&%C3%A4=");
    }

    #[test]
    fn a_denied_write_names_all_its_actions() {
        assert_eq!(also_needed(PUT, &StoredAs::default()), "");
        let stored_as = StoredAs {
            encryption: Some(ServerSideEncryption::Kms(Some("arn:x".to_owned()))),
            tags: [("a".to_owned(), String::new())].into(),
        };
        let also = also_needed(PUT, &stored_as);
        assert!(also.contains("s3:PutObjectTagging") && also.contains("kms:GenerateDataKey with arn:x"), "{also}");
        assert_eq!(also_needed("s3:GetObject", &stored_as), "; for `sse-kms-key-id`, also kms:Decrypt with arn:x");
    }

    #[test]
    fn every_documented_error_of_s3_says_what_to_do() {
        check(404, "NoSuchBucket", "m", None, &["no bucket `my-bucket`", "aws s3 mb s3://my-bucket"]);
        check(404, "NoSuchKey", "m", None, &["no object s3://my-bucket/a/key", "nbdcrypt provision"]);
        check(404, "HTTP status 404", "m", None, &["no object s3://my-bucket/a/key"]);
        check(
            403,
            "AccessDenied",
            "Access Denied",
            Some("us-east-1"),
            &["Access Denied", "s3:GetObject on arn:aws:s3:::my-bucket/a/key", "s3:ListBucket"],
        );
        check(403, "AllAccessDisabled", "All access is off", None, &["All access is off"]);
        check(
            301,
            "PermanentRedirect",
            "m",
            Some("eu-west-1"),
            &["is not in us-east-1 but in eu-west-1", "s3-region = \"eu-west-1\""],
        );
        check(301, "HTTP status 301", "m", Some("eu-west-1"), &["s3-region = \"eu-west-1\""]);
        check(400, "HTTP status 400", "m", Some("eu-west-1"), &["s3-region = \"eu-west-1\""]);
        check(
            400,
            "AuthorizationHeaderMalformed",
            "The authorization header is malformed; the region 'us-east-1' is wrong; expecting 'eu-west-1'",
            None,
            &["s3-region = \"eu-west-1\""],
        );
        check(307, "TemporaryRedirect", "m", None, &["in another region", "s3-region = \"...\""]);
        check(412, "PreconditionFailed", "m", None, &["exists", "--replace"]);
        check(403, "InvalidObjectState", "archived", None, &["archived"]);
        check(400, "KeyTooLongError", "too long", None, &["S3 in us-east-1 refused (KeyTooLongError): too long"]);
    }
}
