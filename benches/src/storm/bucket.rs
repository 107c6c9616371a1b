//! A service's quota as a token bucket. The simulation and the HTTP server for real clients use the same one.

use std::num::NonZeroU32;
use std::time::Duration;

/// Tokens are counted in billionths, so that a quota of tokens a second gives whole numbers for every nanosecond.
const TOKEN: u128 = 1_000_000_000;

/// A quota of requests a second. The bucket holds as many tokens as one second brings, because AWS counts the requests of
/// one-second intervals. A request that finds no token is throttled, and costs none.
#[derive(Clone, Debug)]
pub(super) struct TokenBucket {
    quota: u128,
    level: u128,
    /// The time of the last request, and before the first one, the time at which the bucket opens.
    at: Duration,
}

impl TokenBucket {
    /// Returns a full bucket that is closed until `opens`: earlier requests are throttled.
    pub(super) fn full(quota: NonZeroU32, opens: Duration) -> Self {
        let quota = u128::from(quota.get());
        Self { quota, level: quota * TOKEN, at: opens }
    }

    /// Decides about a request at the time `now`. Returns `true` if it is granted, and `false` if it is throttled. The times
    /// of the requests must not decrease.
    pub(super) fn take(&mut self, now: Duration) -> bool {
        let Some(passed) = now.checked_sub(self.at) else { return false };
        self.at = now;
        self.level = (self.level + passed.as_nanos() * self.quota).min(self.quota * TOKEN);
        let is_granted = self.level >= TOKEN;
        if is_granted {
            self.level -= TOKEN;
        }
        is_granted
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bucket(quota: u32, opens: u64) -> TokenBucket {
        TokenBucket::full(quota.try_into().unwrap(), Duration::from_millis(opens))
    }

    #[test]
    fn a_full_bucket_grants_one_second_at_once() {
        let mut bucket = bucket(10, 0);
        assert_eq!((0..100).filter(|_| bucket.take(Duration::ZERO)).count(), 10);
    }

    #[test]
    fn tokens_come_back_at_the_rate_of_the_quota() {
        let mut bucket = bucket(4, 0);
        while bucket.take(Duration::ZERO) {}
        let granted: Vec<_> = (1..=8).filter(|n| bucket.take(Duration::from_millis(n * 125))).collect();
        assert_eq!(granted, [2, 4, 6, 8]);
    }

    #[test]
    fn a_long_pause_brings_no_more_than_one_second() {
        let mut bucket = bucket(3, 0);
        assert_eq!((0..9).filter(|_| bucket.take(Duration::from_secs(3600))).count(), 3);
    }

    #[test]
    fn a_closed_bucket_throttles_until_it_opens() {
        let mut bucket = bucket(2, 1000);
        assert!(!bucket.take(Duration::ZERO));
        assert!(!bucket.take(Duration::from_millis(999)));
        let opened = Duration::from_millis(1000);
        assert_eq!([0; 3].map(|_| bucket.take(opened)), [true, true, false]);
    }
}
