//! From what the SDK reports to what it means: network, service, or neither.

use std::error::Error;
use std::{io, iter};

use aws_sdk_s3::config::http::HttpResponse;
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};

use super::error::{AwsKeyError, Service};

/// A service's "no".
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Answer {
    /// The HTTP status.
    pub(super) status: u16,
    /// The error's code; the status where the answer has none, as S3's to HEAD has none.
    pub(super) code: String,
    pub(super) message: String,
    /// Where S3 says a bucket is.
    pub(super) bucket_region: Option<String>,
}

/// Either the service's answer, or what went wrong before there was one.
pub(super) fn answer<E>(
    error: &SdkError<E, HttpResponse>,
    service: Service,
    endpoint: String,
) -> Result<Answer, AwsKeyError>
where
    E: ProvideErrorMetadata + Error + 'static,
{
    match error {
        SdkError::ServiceError(refusal) => {
            Ok(with_response(refusal.err().code(), refusal.err().message(), refusal.raw()))
        }
        // Not the protocol: a proxy's page, or another program's.
        SdkError::ResponseError(strange) => {
            Ok(with_response(None, Some(&format!("the answer makes no sense: {}", causes(error))), strange.raw()))
        }
        SdkError::ConstructionFailure(_) => {
            Err(AwsKeyError::Refused { service, code: "the request cannot be made".to_owned(), message: causes(error) })
        }
        _ if is_untrusted(error) => Err(AwsKeyError::Untrusted { service, endpoint, detail: causes(error) }),
        _ => Err(AwsKeyError::Unreachable { service, endpoint, detail: causes(error) }),
    }
}

/// What both services say in the same way; `None` leaves the answer to the one that was asked.
pub(super) fn common(service: Service, answer: &Answer) -> Option<AwsKeyError> {
    let Answer { status, code, message, .. } = answer;
    let (code, message) = (code.clone(), message.clone());
    match code.as_str() {
        // S3 API Reference, "Error responses"; KMS API Reference, "Common Errors" and those of Encrypt and Decrypt.
        "SlowDown" | "RequestTimeout" | "InternalError" | "ServiceUnavailable" | "ThrottlingException" | "Throttling"
        | "RequestLimitExceeded" | "LimitExceededException" | "KMSInternalException" | "KMSInternal"
        | "KeyUnavailableException" | "DependencyTimeoutException" | "DependencyTimeout" | "InternalFailure"
        | "ConditionalRequestConflict" | "OperationAborted"
        // The SDK has seen AWS's clock now, and signs the next request by it.
        | "RequestTimeTooSkewed" | "RequestExpired" => Some(AwsKeyError::Busy { service, code, message }),
        "InvalidAccessKeyId" | "SignatureDoesNotMatch" | "InvalidToken" | "ExpiredToken" | "TokenRefreshRequired"
        | "UnrecognizedClientException" | "InvalidClientTokenId" | "ExpiredTokenException"
        | "InvalidSignatureException" | "IncompleteSignature" | "MissingAuthenticationToken"
        | "MissingAuthenticationTokenException" | "AuthFailure" | "OptInRequired" | "NotSignedUp" => {
            Some(AwsKeyError::BadCredentials { service, code, message })
        }
        _ if *status >= 500 || *status == 429 => Some(AwsKeyError::Busy { service, code, message }),
        _ => None,
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

/// An error and what caused it, each said once.
pub(super) fn causes(error: &(dyn Error + 'static)) -> String {
    chain(error).skip(1).fold(error.to_string(), |text, cause| {
        let said = cause.to_string();
        if text.contains(&said) { text } else { format!("{text}: {said}") }
    })
}

/// Whether the network is to blame: something in the chain of causes is an I/O error, or a timeout.
pub(super) fn is_io(error: &(dyn Error + 'static)) -> bool {
    chain(error).any(|cause| cause.is::<io::Error>() || cause.to_string().contains("timeout"))
}

/// The error, its cause, the cause's cause, and so on.
fn chain<'a>(error: &'a (dyn Error + 'static)) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    iter::successors(Some(error), |cause| (*cause).source())
}

/// Whether TLS failed for reasons of its own, such as a certificate, and not because the connection broke meanwhile. The
/// SDK knows, but keeps the type to itself: what can be seen of it is its text, and the I/O errors beneath.
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

    fn coded(status: u16, code: &str) -> Answer {
        Answer { status, code: code.to_owned(), message: "m".to_owned(), bucket_region: None }
    }

    #[test]
    fn a_busy_service_is_asked_again_and_a_refusing_one_is_not() {
        for (status, code) in [
            (503, "SlowDown"),
            (500, "InternalError"),
            (400, "ThrottlingException"),
            (400, "KeyUnavailableException"),
            (500, "KMSInternalException"),
            (502, "HTTP status 502"),
            (429, "TooManyRequests"),
            (403, "RequestTimeTooSkewed"),
        ] {
            assert!(common(Service::Kms, &coded(status, code)).unwrap().is_transient(), "{code}");
        }
        for (status, code) in [(403, "InvalidAccessKeyId"), (400, "ExpiredTokenException")] {
            let error = common(Service::S3, &coded(status, code)).unwrap();
            assert!(!error.is_transient() && error.to_string().contains("credentials"), "{error}");
        }
        for (status, code) in [(403, "AccessDenied"), (404, "NoSuchKey"), (400, "DisabledException")] {
            assert_eq!(common(Service::S3, &coded(status, code)).map(|error| error.to_string()), None);
        }
    }
}
