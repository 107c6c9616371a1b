//! How long to wait before a request is repeated: exponential backoff with jitter. A pure calculation, without a clock and
//! without randomness of its own, so that `nbdcrypt-bench storm` simulates a fleet with it.

use std::time::Duration;

/// The first pause is between half of this and all of it. Each later pause is twice as long.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
/// The same after an answer of a service that is busy. At least the rest of the second is over before the next request: KMS's
/// quotas are for intervals of one second (KMS Developer Guide, "Request quotas"). docs/limits.md has the figures for a fleet.
const FIRST_BUSY_PAUSE: Duration = Duration::from_secs(1);
/// The longest pause. A boot should continue soon after the network is up.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// Why a request is repeated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// The service answered that it throttles requests, or that it failed.
    Busy,
    /// Anything else, such as a network that is not up yet.
    Other,
}

/// Calculates the pauses between attempts.
#[derive(Clone, Debug)]
pub struct Backoff {
    pause: Duration,
}

impl Backoff {
    /// Returns the calculation for a request that has not been repeated yet.
    pub fn new() -> Self {
        Self { pause: FIRST_PAUSE }
    }

    /// Returns the pause before the next attempt, or `None` if no time is left for one. `elapsed` is the time since the
    /// start of the first attempt. No attempt starts later than `until`, counted from the same start. `random` chooses a
    /// length between half the pause and the full pause. So machines that boot at the same time do not ask at the same time.
    pub fn next(&mut self, elapsed: Duration, until: Duration, cause: Cause, random: u32) -> Option<Duration> {
        let left = until.checked_sub(elapsed).filter(|left| !left.is_zero())?;
        let whole = match cause {
            Cause::Busy => self.pause.max(FIRST_BUSY_PAUSE),
            Cause::Other => self.pause,
        };
        self.pause = (whole * 2).min(LONGEST_PAUSE);
        // The last attempt starts at the very end of the time.
        Some(whole.mul_f64(0.5 + 0.5 * f64::from(random) / f64::from(u32::MAX)).min(left))
    }
}

impl Default for Backoff {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Returns the longest pauses after errors of these causes.
    fn longest(causes: &[Cause]) -> Vec<u128> {
        let mut backoff = Backoff::new();
        let until = Duration::from_secs(3600);
        causes.iter().map(|cause| backoff.next(Duration::ZERO, until, *cause, u32::MAX).unwrap().as_millis()).collect()
    }

    /// The network is asked again soon. A busy service is left alone for a second.
    #[test]
    fn a_busy_service_is_left_alone_for_longer() {
        use Cause::{Busy, Other};
        assert_eq!(longest(&[Other; 7]), [250, 500, 1000, 2000, 4000, 5000, 5000]);
        assert_eq!(longest(&[Busy; 5]), [1000, 2000, 4000, 5000, 5000]);
        assert_eq!(longest(&[Other, Busy, Other, Other]), [250, 1000, 2000, 4000]);
        assert_eq!(longest(&[Other, Other, Other, Other, Busy]), [250, 500, 1000, 2000, 4000]);
    }

    proptest! {
        #[test]
        fn pauses_double_with_jitter_and_stay_within_the_time(
            retry_for in 0u64..200_000,
            attempt in 0u64..3_000,
            is_busy: bool,
            randoms in proptest::collection::vec(any::<u32>(), 2000),
        ) {
            let retry_for = Duration::from_millis(retry_for);
            let mut backoff = Backoff::new();
            let mut now = Duration::from_millis(attempt);
            let (cause, mut whole) =
                if is_busy { (Cause::Busy, FIRST_BUSY_PAUSE) } else { (Cause::Other, FIRST_PAUSE) };
            for random in randoms {
                let Some(pause) = backoff.next(now, retry_for, cause, random) else {
                    prop_assert!(now >= retry_for);
                    break;
                };
                prop_assert!(now + pause <= retry_for, "a new attempt starts within the time");
                prop_assert!(pause <= whole && (pause * 2 >= whole || now + pause == retry_for));
                whole = (whole * 2).min(LONGEST_PAUSE);
                now += pause + Duration::from_millis(attempt);
            }
            prop_assert!(now >= retry_for, "2000 attempts are more than possible");
        }
    }
}
