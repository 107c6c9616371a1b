//! Trying again while the network is down: exponential backoff with jitter, up to a configured time.

use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};

use super::error::AwsKeyError;

/// The first pause is between half of this and all of it; each later one is twice as long.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
/// Pauses grow no longer: when the network comes, a boot is not to wait.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// When to stop trying. One is shared by all requests of one call: the time is the whole call's.
#[derive(Clone, Copy, Debug)]
pub(super) struct Patience {
    started: Instant,
    retry_for: Duration,
}

impl Patience {
    /// From now on for so long.
    pub(super) fn from_now(retry_for: Duration) -> Self {
        Self { started: Instant::now(), retry_for }
    }
}

/// Makes attempts until one succeeds, fails for good, or the time is over. Each may take `limit` at most and becomes
/// what `overdue` says then; the first one is made however little time there is, and no new one once it is over.
pub(super) async fn retried<T>(
    patience: Patience,
    limit: Duration,
    overdue: impl Fn() -> AwsKeyError,
    mut attempt: impl AsyncFnMut() -> Result<T, AwsKeyError>,
) -> Result<T, AwsKeyError> {
    let mut backoff = Backoff::new(patience.retry_for);
    loop {
        let error = match timeout(limit, attempt()).await.unwrap_or_else(|_| Err(overdue())) {
            Err(error) if error.is_transient() => error,
            result => return result,
        };
        let after = patience.started.elapsed();
        // Without randomness, the whole pause.
        let Some(pause) = backoff.next(after, getrandom::u32().unwrap_or(u32::MAX)) else {
            return Err(AwsKeyError::GaveUp { last: Box::new(error), attempts: backoff.attempts, after });
        };
        tracing::warn!("{error}; trying again in {:.1} s", pause.as_secs_f64());
        sleep(pause).await;
    }
}

/// How long to wait between attempts.
struct Backoff {
    retry_for: Duration,
    pause: Duration,
    attempts: u32,
}

impl Backoff {
    fn new(retry_for: Duration) -> Self {
        Self { retry_for, pause: FIRST_PAUSE, attempts: 0 }
    }

    /// The pause after an attempt that ended `elapsed` after the first one's beginning, or `None` where it was the last.
    /// `random` picks from half the pause up to all of it, so that a fleet that boots at once does not ask at once.
    fn next(&mut self, elapsed: Duration, random: u32) -> Option<Duration> {
        self.attempts = self.attempts.saturating_add(1);
        let left = self.retry_for.checked_sub(elapsed).filter(|left| !left.is_zero())?;
        let pause = self.pause.mul_f64(0.5 + 0.5 * f64::from(random) / f64::from(u32::MAX));
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
        // The last attempt comes at the very end of the time.
        Some(pause.min(left))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::aws::error::Service;
    use proptest::prelude::*;

    const LIMIT: Duration = Duration::from_secs(10);

    fn unreachable() -> AwsKeyError {
        let endpoint = "https://kms.example".to_owned();
        AwsKeyError::Unreachable { service: Service::Kms, endpoint, detail: "no route".to_owned() }
    }

    fn refused() -> AwsKeyError {
        AwsKeyError::NoRegion { transient: false }
    }

    /// Makes up to `succeed_at` attempts with so much patience; their number, and what came of it.
    fn run(patience_ms: u64, succeed_at: u32, error: fn() -> AwsKeyError) -> (u32, Result<(), AwsKeyError>) {
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
    fn attempts_go_on_until_one_succeeds() {
        let (made, result) = run(60_000, 3, unreachable);
        assert!(result.is_ok());
        assert_eq!(made, 3);
    }

    #[test]
    fn attempts_end_with_the_time_and_tell_of_it() {
        let (made, result) = run(300, u32::MAX, unreachable);
        assert!((2..=4).contains(&made), "{made}");
        let text = result.unwrap_err().to_string();
        assert!(text.contains("https://kms.example") && text.contains("no route"), "{text}");
        assert!(text.contains(&format!("tried {made} times in 0 s")), "{text}");
    }

    #[test]
    fn what_is_refused_is_not_tried_again() {
        let (made, result) = run(60_000, u32::MAX, refused);
        assert!(matches!(result, Err(AwsKeyError::NoRegion { .. })));
        assert_eq!(made, 1);
    }

    #[test]
    fn no_time_to_retry_is_one_attempt() {
        let (made, result) = run(0, u32::MAX, unreachable);
        assert!(matches!(result, Err(AwsKeyError::GaveUp { attempts: 1, .. })));
        assert_eq!(made, 1);
    }

    #[test]
    fn an_attempt_that_hangs_is_over_at_its_limit() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let result = runtime.block_on(async {
            let limit = Duration::from_millis(20);
            retried(Patience::from_now(Duration::from_millis(1)), limit, unreachable, async || {
                std::future::pending::<Result<(), AwsKeyError>>().await
            })
            .await
        });
        assert!(matches!(result, Err(AwsKeyError::GaveUp { attempts: 1, .. })));
    }

    proptest! {
        #[test]
        fn pauses_double_with_jitter_and_never_leave_the_time(
            retry_for in 0u64..200_000,
            attempt in 0u64..3_000,
            randoms in proptest::collection::vec(any::<u32>(), 2000),
        ) {
            let retry_for = Duration::from_millis(retry_for);
            let mut backoff = Backoff::new(retry_for);
            let mut now = Duration::from_millis(attempt);
            let mut whole = FIRST_PAUSE;
            for random in randoms {
                let Some(pause) = backoff.next(now, random) else {
                    prop_assert!(now >= retry_for);
                    break;
                };
                prop_assert!(now + pause <= retry_for, "a new attempt begins within the time");
                prop_assert!(pause <= whole && (pause * 2 >= whole || now + pause == retry_for));
                whole = (whole * 2).min(LONGEST_PAUSE);
                now += pause + Duration::from_millis(attempt);
            }
            prop_assert!(now >= retry_for, "2000 attempts are more than there can be");
        }
    }
}
