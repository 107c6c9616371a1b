//! Interprets errors of the SDK: whether the network failed, the service refused, or something else went wrong.

use std::error::Error;
use std::{io, iter};

use aws_sdk_s3::config::http::HttpResponse;
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};

use super::credentials::Kind;
use super::error::{At, AwsError, Service};
use super::retry::Course;

/// An error response of a service.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Answer {
    /// The HTTP status.
    pub(super) status: u16,
    /// The error's code, or the HTTP status if there is none, as in S3's responses to HEAD.
    pub(super) code: String,
    pub(super) message: String,
    /// The bucket's region, if S3 reports it.
    pub(super) bucket_region: Option<String>,
}

/// Returns the service's error response, or an error if there was no response.
pub(super) fn answer<E>(
    error: &SdkError<E, HttpResponse>,
    service: Service,
    endpoint: String,
) -> Result<Answer, AwsError>
where
    E: ProvideErrorMetadata + Error + 'static,
{
    let strange = |response: &HttpResponse| match is_cut(error, response) {
        true => Err(cut(service, endpoint.clone())),
        // The response does not follow the service's protocol. It is a page from a proxy or another program. It is not
        // quoted, because it may contain anything.
        false => Ok(with_response(None, Some(&format!("the answer is not in the format of {service}")), response)),
    };
    match error {
        // The SDK also returns this error for a successful response that it cannot parse.
        SdkError::ServiceError(success) if success.raw().status().is_success() => strange(success.raw()),
        SdkError::ServiceError(refusal) => {
            Ok(with_response(refusal.err().code(), refusal.err().message(), refusal.raw()))
        }
        SdkError::ResponseError(response) => strange(response.raw()),
        SdkError::ConstructionFailure(_) => {
            let why = format!("the request to {service} could not be made: {}", causes(error));
            Err(AwsError::Runtime(io::Error::other(why)))
        }
        _ if is_untrusted(error) => {
            let detail = causes(error);
            // If the clock is before the certificate's period or years after it, NTP will soon correct the clock.
            let passes = ["NotValidYet", "not valid yet", "Expired", "expired"].iter().any(|why| detail.contains(why));
            Err(AwsError::Untrusted { service, endpoint, detail, passes })
        }
        _ => Err(AwsError::unreachable(service, endpoint, causes(error))),
    }
}

/// Returns the error for a response that ended too early.
pub(super) fn cut(service: Service, endpoint: String) -> AwsError {
    AwsError::unreachable(service, endpoint, "its answer was cut off".to_owned())
}

/// Returns whether the body ended too early: the connection broke, or the body is only the start of a JSON object.
fn is_cut(error: &(dyn Error + 'static), response: &HttpResponse) -> bool {
    match response.body().bytes() {
        // The body is still a stream, so reading it failed.
        None => true,
        Some(body) => {
            let text = body.trim_ascii_start();
            is_io(error) || text.is_empty() || (text.starts_with(b"{") && !text.trim_ascii_end().ends_with(b"}"))
        }
    }
}

/// Returns what to do about an error response. The comments below give the reasons (S3 API Reference, "Error responses"; KMS
/// API Reference, "Common Errors" and the errors of Encrypt and Decrypt; STS API Reference, "Common Errors").
pub(super) fn course(answer: &Answer, credentials: Kind) -> Course {
    match answer.code.as_str() {
        // Too many requests at once, for example while a fleet boots.
        "SlowDown"
        | "ThrottlingException"
        | "Throttling"
        | "ThrottledException"
        | "RequestLimitExceeded"
        | "RequestThrottled"
        | "RequestThrottledException"
        | "TooManyRequestsException"
        | "BandwidthLimitExceeded"
        | "LimitExceededException"
        | "PriorRequestNotComplete" => Course::Again,
        // A failure on AWS's side.
        "InternalError"
        | "InternalFailure"
        | "InternalServerError"
        | "InternalServiceError"
        | "ServiceUnavailable"
        | "KMSInternalException"
        | "KMSInternal"
        | "KeyUnavailableException"
        | "KeyUnavailable"
        | "DependencyTimeoutException"
        | "DependencyTimeout"
        | "RequestTimeout"
        | "RequestTimeoutException"
        | "IDPCommunicationError" => Course::Again,
        // Another write to the same object is in progress.
        "ConditionalRequestConflict" | "OperationAborted" => Course::Again,
        // This machine's clock is wrong. The SDK now knows AWS's time, and signs the next request with it.
        "RequestTimeTooSkewed" | "RequestInTheFuture" => Course::Again,
        "InvalidSignatureException" | "SignatureDoesNotMatch" | "AuthFailure" if is_about_time(&answer.message) => {
            Course::Again
        }
        // The credentials were valid once. A role gets new credentials. A user may be renewing the credentials in the
        // environment, or may have forgotten to do so.
        "ExpiredToken" | "ExpiredTokenException" | "TokenRefreshRequired" | "RequestExpired" => match credentials {
            Kind::Renewable => Course::Renew,
            Kind::Fixed | Kind::LongTerm => Course::Briefly,
        },
        // New credentials of a role are not known everywhere at once. If a user's key is unknown, it is wrong.
        "InvalidClientTokenId"
        | "InvalidClientTokenIdException"
        | "UnrecognizedClientException"
        | "InvalidAccessKeyId"
        | "InvalidToken"
        | "InvalidIdentityToken"
        | "InvalidIdentityTokenException" => match credentials {
            Kind::Renewable => Course::Renew,
            Kind::Fixed => Course::Briefly,
            Kind::LongTerm => Course::Final,
        },
        // A role's new policies are not known everywhere at once. An explicit deny does not go away.
        "AccessDenied" | "AccessDeniedException" | "UnauthorizedAccess" => match credentials {
            _ if answer.message.contains("explicit deny") => Course::Final,
            Kind::Renewable | Kind::Fixed => Course::Briefly,
            Kind::LongTerm => Course::Final,
        },
        // These are the same errors without a code, as in S3's responses to HEAD.
        "HTTP status 403" if credentials != Kind::LongTerm => Course::Briefly,
        _ if answer.status >= 500 || matches!(answer.status, 408 | 429) => Course::Again,
        // All other errors are permanent: a disabled key, a missing object, a wrong encryption context.
        _ => Course::Final,
    }
}

/// Returns whether a signature was refused because of the clock: `Signature expired: 20260101T000000Z is now earlier than
/// ...`, `Signature not yet current: ...`.
fn is_about_time(message: &str) -> bool {
    let message = message.to_ascii_lowercase();
    ["signature expired", "not yet current", "request has expired", "clock"].iter().any(|word| message.contains(word))
}

/// Returns the error for a response whose meaning is the same for all services, or `None` if it depends on the service.
pub(super) fn common(at: At, answer: &Answer, credentials: Kind) -> Option<AwsError> {
    let Answer { code, message, .. } = answer;
    let (code, message) = (code.clone(), message.clone());
    match (course(answer, credentials), code.as_str()) {
        (_, "AccessDenied" | "AccessDeniedException" | "HTTP status 403") => None,
        (Course::Again, _) => Some(AwsError::Busy { at, code, message }),
        (course @ (Course::Renew | Course::Briefly), _) => Some(AwsError::BadCredentials { at, code, message, course }),
        (
            Course::Final,
            "InvalidAccessKeyId"
            | "SignatureDoesNotMatch"
            | "InvalidToken"
            | "UnrecognizedClientException"
            | "InvalidClientTokenId"
            | "InvalidSignatureException"
            | "IncompleteSignature"
            | "MissingAuthenticationToken"
            | "MissingAuthenticationTokenException"
            | "AuthFailure"
            | "OptInRequired"
            | "NotSignedUp",
        ) => Some(AwsError::BadCredentials { at, code, message, course: Course::Final }),
        (Course::Final, _) => None,
    }
}

fn with_response(code: Option<&str>, message: Option<&str>, response: &HttpResponse) -> Answer {
    let status = response.status().as_u16();
    Answer {
        status,
        code: code.map_or_else(|| format!("HTTP status {status}"), ToOwned::to_owned),
        message: message.unwrap_or("no message").to_owned(),
        bucket_region: response.headers().get("x-amz-bucket-region").map(ToOwned::to_owned),
    }
}

/// Returns the texts of an error and of its causes, without repetitions.
pub(super) fn causes(error: &(dyn Error + 'static)) -> String {
    chain(error).skip(1).fold(error.to_string(), |text, cause| {
        let said = cause.to_string();
        if text.contains(&said) { text } else { format!("{text}: {said}") }
    })
}

/// Returns whether the network failed: one of the causes is an I/O error or a timeout.
pub(super) fn is_io(error: &(dyn Error + 'static)) -> bool {
    chain(error).any(|cause| cause.is::<io::Error>() || cause.to_string().contains("timeout"))
}

/// Returns the error, its cause, the cause's cause, and so on.
pub(super) fn chain<'a>(error: &'a (dyn Error + 'static)) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    iter::successors(Some(error), |cause| (*cause).source())
}

/// Returns whether TLS failed for its own reasons, such as a certificate, and not because the connection broke. The SDK's
/// error type is private, so this looks at its text and at the I/O errors below it.
fn is_untrusted(error: &(dyn Error + 'static)) -> bool {
    let broken = chain(error).filter_map(|cause| cause.downcast_ref::<io::Error>()).any(|error| {
        use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, TimedOut, UnexpectedEof};
        matches!(error.kind(), BrokenPipe | ConnectionAborted | ConnectionReset | TimedOut | UnexpectedEof)
    });
    !broken && chain(error).any(|cause| cause.to_string().starts_with("TLS handshake failed"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SKEWED: &str = "Signature expired: 20260101T000000Z is now earlier than 20260101T001000Z";

    /// Each line has the status, code and message of a response, and what to do about it for each kind of credentials.
    #[test]
    fn every_answer_has_its_course() {
        use Course::{Again, Briefly, Final, Renew};
        let table: &[(u16, &str, &str, [Course; 3])] = &[
            (503, "SlowDown", "m", [Again; 3]),
            (500, "InternalError", "m", [Again; 3]),
            (400, "ThrottlingException", "m", [Again; 3]),
            (400, "KeyUnavailableException", "m", [Again; 3]),
            (500, "KMSInternalException", "m", [Again; 3]),
            (502, "HTTP status 502", "m", [Again; 3]),
            (429, "TooManyRequests", "m", [Again; 3]),
            (409, "ConditionalRequestConflict", "m", [Again; 3]),
            (403, "RequestTimeTooSkewed", "m", [Again; 3]),
            (400, "InvalidSignatureException", SKEWED, [Again; 3]),
            (400, "InvalidSignatureException", "Signature not yet current: x", [Again; 3]),
            (400, "InvalidSignatureException", "The signature does not match", [Final; 3]),
            (403, "SignatureDoesNotMatch", "m", [Final; 3]),
            (400, "ExpiredToken", "m", [Renew, Briefly, Briefly]),
            (400, "ExpiredTokenException", "m", [Renew, Briefly, Briefly]),
            (400, "RequestExpired", "m", [Renew, Briefly, Briefly]),
            (403, "InvalidClientTokenId", "m", [Renew, Briefly, Final]),
            (400, "UnrecognizedClientException", "m", [Renew, Briefly, Final]),
            (403, "InvalidAccessKeyId", "m", [Renew, Briefly, Final]),
            (403, "AccessDenied", "m", [Briefly, Briefly, Final]),
            (400, "AccessDeniedException", "no identity-based policy allows it", [Briefly, Briefly, Final]),
            (400, "AccessDeniedException", "with an explicit deny in a policy", [Final; 3]),
            (403, "HTTP status 403", "m", [Briefly, Briefly, Final]),
            (400, "InvalidCiphertextException", "", [Final; 3]),
            (400, "IncorrectKeyException", "m", [Final; 3]),
            (400, "DisabledException", "m", [Final; 3]),
            (400, "NotFoundException", "m", [Final; 3]),
            (404, "NoSuchKey", "m", [Final; 3]),
            (404, "NoSuchBucket", "m", [Final; 3]),
            (412, "PreconditionFailed", "m", [Final; 3]),
            (400, "ValidationException", "m", [Final; 3]),
        ];
        for (status, code, message, expected) in table {
            let answer = Answer {
                status: *status,
                code: (*code).to_owned(),
                message: (*message).to_owned(),
                bucket_region: None,
            };
            for (kind, expected) in [Kind::Renewable, Kind::Fixed, Kind::LongTerm].into_iter().zip(expected) {
                assert_eq!(course(&answer, kind), *expected, "{code} {message} with {kind:?}");
            }
        }
    }

    #[test]
    fn refused_credentials_are_reported_with_the_region() {
        let at = At { service: Service::Kms, region: "eu-west-1".to_owned() };
        for code in ["InvalidAccessKeyId", "ExpiredTokenException", "SignatureDoesNotMatch"] {
            let answer = Answer { status: 403, code: code.to_owned(), message: "m".to_owned(), bucket_region: None };
            let error = common(at.clone(), &answer, Kind::LongTerm).unwrap().to_string();
            assert!(error.contains("KMS in eu-west-1 refuses the credentials") && error.contains(code), "{error}");
        }
    }
}
