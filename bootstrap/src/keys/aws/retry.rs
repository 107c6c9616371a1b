//! Retries errors that may pass, up to a configured time.

use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};
use tracing::instrument::WithSubscriber;
use tracing::subscriber::NoSubscriber;

use super::backoff::{Backoff, Cause};
use super::error::AwsError;

/// How long to retry a refusal that may be due to a new role or policy. IAM is eventually consistent: changes take seconds
/// to take effect everywhere (IAM User Guide, "Changes that I make are not always immediately visible"). A refusal that
/// lasts longer is final.
const BRIEFLY: Duration = Duration::from_secs(15);

/// What to do about an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Course {
    /// The error is temporary: repeat the request for the configured time.
    Again,
    /// Renew the credentials, and repeat the request for the configured time.
    Renew,
    /// The error passes within seconds or not at all: repeat the request for [`BRIEFLY`].
    Briefly,
    /// The answer will always be the same: do not repeat the request.
    Final,
}

/// When to stop retrying. All requests of one call share the time.
#[derive(Clone, Copy, Debug)]
pub(super) struct Patience {
    started: Instant,
    retry_for: Duration,
    /// [`BRIEFLY`], except in tests.
    briefly: Duration,
}

impl Patience {
    /// Allows retries for `retry_for`, counted from now.
    pub(super) fn from_now(retry_for: Duration) -> Self {
        Self { started: Instant::now(), retry_for, briefly: BRIEFLY }
    }
}

/// Repeats `attempt` until it succeeds, fails permanently, or the time is over. An attempt that takes longer than `limit` fails
/// with `overdue`. The first attempt is always made. No attempt starts after the time is over.
pub(super) async fn retried<T>(
    patience: Patience,
    limit: Duration,
    overdue: impl Fn() -> AwsError,
    mut attempt: impl AsyncFnMut() -> Result<T, AwsError>,
) -> Result<T, AwsError> {
    let mut backoff = Backoff::new();
    let mut attempts = 0;
    let mut brief_until = None;
    loop {
        attempts += 1;
        // The SDK's own log is suppressed: it quotes answers, which contain secrets.
        let made = attempt().with_subscriber(NoSubscriber::default());
        let error = match timeout(limit, made).await.unwrap_or_else(|_| Err(overdue())) {
            Err(error) if error.course() != Course::Final => error,
            result => return result,
        };
        let after = patience.started.elapsed();
        let is_brief = error.course() == Course::Briefly;
        let until = match is_brief {
            true => patience.retry_for.min(*brief_until.get_or_insert(after.saturating_add(patience.briefly))),
            false => patience.retry_for,
        };
        // Without a random number, the pause has its full length.
        let Some(pause) = backoff.next(after, until, cause(&error), getrandom::u32().unwrap_or(u32::MAX)) else {
            return Err(AwsError::GaveUp { last: Box::new(error), attempts, after });
        };
        let why = if is_brief { ", since a new role, policy or key takes seconds to take effect" } else { "" };
        tracing::warn!("{error}; trying again in {:.1} s{why}", pause.as_secs_f64());
        sleep(pause).await;
    }
}

fn cause(error: &AwsError) -> Cause {
    match error {
        AwsError::Busy { .. } => Cause::Busy,
        _ => Cause::Other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::aws::error::{At, Service};

    const LIMIT: Duration = Duration::from_secs(10);

    fn unreachable() -> AwsError {
        let endpoint = "https://kms.example".to_owned();
        AwsError::unreachable(Service::Kms, endpoint, "no route".to_owned())
    }

    fn refused() -> AwsError {
        AwsError::NoRegion { transient: false }
    }

    /// Makes attempts with a limit of `patience_ms`. Attempt number `succeed_at` succeeds. Returns the number of attempts
    /// and the result.
    fn run(patience_ms: u64, succeed_at: u32, error: fn() -> AwsError) -> (u32, Result<(), AwsError>) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let mut made = 0;
        let result = runtime.block_on(async {
            let patience = Patience::from_now(Duration::from_millis(patience_ms));
            retried(patience, LIMIT, unreachable, async || {
                made += 1;
                if made < succeed_at { Err(error()) } else { Ok(()) }
            })
            .await
        });
        (made, result)
    }

    #[test]
    fn attempts_continue_until_one_succeeds() {
        let (made, result) = run(60_000, 3, unreachable);
        assert!(result.is_ok());
        assert_eq!(made, 3);
    }

    #[test]
    fn the_error_counts_the_attempts() {
        let (made, result) = run(300, u32::MAX, unreachable);
        // At least one attempt and one retry. On a busy machine there may be no time for more.
        assert!(made >= 2, "{made}");
        let text = result.unwrap_err().to_string();
        assert!(text.contains("https://kms.example") && text.contains("no route"), "{text}");
        assert!(text.contains(&format!("tried {made} times in ")), "{text}");
    }

    /// A service that throttles is left alone for at least half a second. So there is only the attempt at the very end of the
    /// time.
    #[test]
    fn a_busy_service_is_not_asked_again_at_once() {
        let busy = || AwsError::Busy {
            at: At { service: Service::Kms, region: "eu-central-1".to_owned() },
            code: "ThrottlingException".to_owned(),
            message: "Rate exceeded".to_owned(),
        };
        let (made, result) = run(400, u32::MAX, busy);
        assert!(made <= 2, "{made}");
        assert!(result.unwrap_err().to_string().contains("ThrottlingException"));
    }

    #[test]
    fn a_final_error_is_not_retried() {
        let (made, result) = run(60_000, u32::MAX, refused);
        assert!(matches!(result, Err(AwsError::NoRegion { .. })));
        assert_eq!(made, 1);
    }

    #[test]
    fn without_time_to_retry_there_is_one_attempt() {
        let (made, result) = run(0, u32::MAX, unreachable);
        assert!(matches!(result, Err(AwsError::GaveUp { attempts: 1, .. })));
        assert_eq!(made, 1);
    }

    #[test]
    fn an_attempt_that_hangs_ends_at_its_limit() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let result = runtime.block_on(async {
            let limit = Duration::from_millis(20);
            retried(Patience::from_now(Duration::from_millis(1)), limit, unreachable, async || {
                std::future::pending::<Result<(), AwsError>>().await
            })
            .await
        });
        assert!(matches!(result, Err(AwsError::GaveUp { attempts: 1, .. })));
    }

    #[test]
    fn a_brief_error_is_not_retried_for_the_whole_time() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let denied = || AwsError::Credentials {
            from: "the role".to_owned(),
            detail: "denied".to_owned(),
            course: Course::Briefly,
        };
        let mut made = 0;
        let result: Result<(), AwsError> = runtime.block_on(async {
            // One hour in all, some of which passed while the network was down.
            let patience =
                Patience { briefly: Duration::from_millis(300), ..Patience::from_now(Duration::from_secs(3600)) };
            retried(patience, LIMIT, unreachable, async || {
                made += 1;
                Err(if made < 3 { unreachable() } else { denied() })
            })
            .await
        });
        let text = result.unwrap_err().to_string();
        assert!(text.contains("denied") && text.contains(&format!("tried {made} times")), "{text}");
        assert!((4..10).contains(&made), "{made}");
    }
}
