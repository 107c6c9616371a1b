//! The object: read whole, or made.

use aws_sdk_s3::config::http::HttpResponse;
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_s3::primitives::ByteStream;

use super::answer::{Answer, answer, causes, common};
use super::error::{AwsKeyError, MAX_CIPHERTEXT, Service};
use super::retry::{Patience, retried};
use super::session::{ATTEMPT, Session};
use crate::config::S3Object;

/// The object's bytes: 1 to [`MAX_CIPHERTEXT`].
pub(super) async fn get(session: &Session, patience: Patience, object: &S3Object) -> Result<Vec<u8>, AwsKeyError> {
    retried(
        patience,
        ATTEMPT,
        || overdue(session),
        async || {
            let sent = session.s3.get_object().bucket(&object.bucket).key(&object.key).send().await;
            let found = sent.map_err(|error| failure(&error, session, object, "s3:GetObject"))?;
            let too_large = || AwsKeyError::TooLarge { object: object.clone() };
            // Said to be too large: not even begun.
            if found.content_length().and_then(|len| usize::try_from(len).ok()).is_some_and(|len| len > MAX_CIPHERTEXT)
            {
                return Err(too_large());
            }
            let mut body = found.body;
            let mut bytes = Vec::new();
            while let Some(piece) = body.next().await {
                let piece = piece.map_err(|error| AwsKeyError::Unreachable {
                    service: Service::S3,
                    endpoint: session.s3_endpoint.uri(),
                    detail: causes(&error),
                })?;
                if bytes.len() + piece.len() > MAX_CIPHERTEXT {
                    return Err(too_large());
                }
                bytes.extend_from_slice(&piece);
            }
            if bytes.is_empty() {
                return Err(AwsKeyError::Empty { object: object.clone() });
            }
            Ok(bytes)
        },
    )
    .await
}

/// Makes the object. Unless it may be replaced, one that exists is left as it is, also when it appears meanwhile.
pub(super) async fn put(
    session: &Session,
    patience: Patience,
    object: &S3Object,
    bytes: &[u8],
    replace: bool,
) -> Result<(), AwsKeyError> {
    if !replace {
        refuse_existing(session, patience, object).await?;
    }
    let put = retried(
        patience,
        ATTEMPT,
        || overdue(session),
        async || {
            let mut request =
                session.s3.put_object().bucket(&object.bucket).key(&object.key).body(ByteStream::from(bytes.to_vec()));
            if !replace {
                // S3 User Guide, "How to prevent object overwrites with conditional writes".
                request = request.if_none_match("*");
            }
            let sent = request.send().await;
            sent.map(|_| ()).map_err(|error| failure(&error, session, object, "s3:PutObject"))
        },
    )
    .await;
    match put {
        // An earlier attempt of ours may have got through while its answer got lost.
        Err(AwsKeyError::Exists { .. }) if get(session, patience, object).await.is_ok_and(|found| found == bytes) => {
            Ok(())
        }
        result => result,
    }
}

/// A look before writing: what answers in S3's place may not know conditional writes, and would overwrite.
async fn refuse_existing(session: &Session, patience: Patience, object: &S3Object) -> Result<(), AwsKeyError> {
    retried(
        patience,
        ATTEMPT,
        || overdue(session),
        async || {
            match session.s3.head_object().bucket(&object.bucket).key(&object.key).send().await {
                Ok(_) => Err(AwsKeyError::Exists { object: object.clone() }),
                Err(error) => match failure(&error, session, object, "s3:GetObject") {
                    // Not there, or not to be known: the condition of the write decides.
                    AwsKeyError::NoObject { .. } | AwsKeyError::S3Denied { .. } => Ok(()),
                    other => Err(other),
                },
            }
        },
    )
    .await
}

fn overdue(session: &Session) -> AwsKeyError {
    let detail = format!("no answer within {} s", ATTEMPT.as_secs());
    AwsKeyError::Unreachable { service: Service::S3, endpoint: session.s3_endpoint.uri(), detail }
}

fn failure<E>(
    error: &SdkError<E, HttpResponse>,
    session: &Session,
    object: &S3Object,
    action: &'static str,
) -> AwsKeyError
where
    E: ProvideErrorMetadata + std::error::Error + 'static,
{
    match answer(error, Service::S3, session.s3_endpoint.uri()) {
        Ok(answer) => meaning(answer, &session.region, object, action),
        Err(error) => error,
    }
}

/// What S3's answer means (S3 API Reference, "Error responses", "List of error codes").
fn meaning(answer: Answer, region: &str, object: &S3Object, action: &'static str) -> AwsKeyError {
    if let Some(error) = common(Service::S3, &answer) {
        return error;
    }
    let Answer { status, code, message, bucket_region } = answer;
    let object = object.clone();
    let bucket = object.bucket.clone();
    let elsewhere = bucket_region.clone().filter(|right| right != region);
    match (code.as_str(), status) {
        ("NoSuchBucket", _) => AwsKeyError::NoBucket { bucket },
        ("PreconditionFailed", _) | (_, 412) => AwsKeyError::Exists { object },
        ("PermanentRedirect" | "TemporaryRedirect" | "AuthorizationHeaderMalformed", _)
        | ("IllegalLocationConstraintException" | "IncorrectEndpoint", _)
        | (_, 301 | 307) => AwsKeyError::WrongRegion {
            bucket,
            asked: region.to_owned(),
            right: elsewhere.or_else(|| expected_region(&message)),
        },
        // HEAD is answered without a body, so without a code: only the header tells a wrong region from a wrong signature.
        (_, 400 | 403) if elsewhere.is_some() => {
            AwsKeyError::WrongRegion { bucket, asked: region.to_owned(), right: elsewhere }
        }
        ("NoSuchKey" | "NotFound", _) | (_, 404) => AwsKeyError::NoObject { object },
        (_, 403) => {
            let arn = format!("arn:{}:s3:::{}/{}", partition(region), object.bucket, object.key);
            AwsKeyError::S3Denied { object, action, arn, message }
        }
        _ => AwsKeyError::Refused { service: Service::S3, code, message },
    }
}

/// `the region 'us-east-1' is wrong; expecting 'eu-west-1'`.
fn expected_region(message: &str) -> Option<String> {
    let rest = message.split_once("expecting '")?.1;
    Some(rest.split_once('\'')?.0.to_owned())
}

/// The first part of ARNs (AWS General Reference, "Amazon Resource Names").
fn partition(region: &str) -> &'static str {
    match region {
        _ if region.starts_with("cn-") => "aws-cn",
        _ if region.starts_with("us-gov-") => "aws-us-gov",
        _ => "aws",
    }
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
        let text = meaning(answer, "us-east-1", &object, "s3:GetObject").to_string();
        for word in expected {
            assert!(text.contains(word), "`{word}` in: {text}");
        }
    }

    #[test]
    fn every_answer_that_s3_documents_says_what_to_do() {
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
            &["is not in us-east-1 but in eu-west-1", "region = \"eu-west-1\""],
        );
        check(301, "HTTP status 301", "m", Some("eu-west-1"), &["region = \"eu-west-1\""]);
        check(400, "HTTP status 400", "m", Some("eu-west-1"), &["region = \"eu-west-1\""]);
        check(
            400,
            "AuthorizationHeaderMalformed",
            "The authorization header is malformed; the region 'us-east-1' is wrong; expecting 'eu-west-1'",
            None,
            &["region = \"eu-west-1\""],
        );
        check(307, "TemporaryRedirect", "m", None, &["in another region", "region = \"...\""]);
        check(412, "PreconditionFailed", "m", None, &["exists", "--replace"]);
        check(403, "InvalidObjectState", "archived", None, &["archived"]);
        check(400, "KeyTooLongError", "too long", None, &["S3 refused (KeyTooLongError): too long"]);
    }

    #[test]
    fn arns_name_the_partition_of_the_region() {
        assert_eq!(partition("eu-central-1"), "aws");
        assert_eq!(partition("cn-north-1"), "aws-cn");
        assert_eq!(partition("us-gov-west-1"), "aws-us-gov");
    }
}
