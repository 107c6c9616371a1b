//! How fast data is read and written: the difference between two samples of the counters.

use std::time::{Duration, Instant};

use crate::service::status::Throughput;

/// The pause between two samples.
pub(super) const EVERY: Duration = Duration::from_secs(10);

/// The bytes that were read and written until a moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Sample {
    pub(super) at: Instant,
    pub(super) read: u64,
    pub(super) written: u64,
}

/// The last two samples. So there is always one that is [`EVERY`] or older, once there are two.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Pace {
    older: Option<Sample>,
    newer: Option<Sample>,
}

impl Pace {
    /// Adds a sample.
    pub(super) fn add(&mut self, sample: Sample) {
        self.older = self.newer.replace(sample);
    }

    /// Returns how fast data was read and written from the older sample until `now`. Returns `None` if that is less than a
    /// second.
    pub(super) fn until(&self, now: Sample) -> Option<Throughput> {
        let then = self.older.or(self.newer)?;
        let passed = u64::try_from(now.at.saturating_duration_since(then.at).as_millis()).ok()?;
        let rate = |now: u64, then: u64| {
            let bytes = u128::from(now.saturating_sub(then)) * 1000 / u128::from(passed);
            u64::try_from(bytes).unwrap_or(u64::MAX)
        };
        (passed >= 1000).then(|| Throughput {
            read_per_second: rate(now.read, then.read),
            written_per_second: rate(now.written, then.written),
            seconds: passed / 1000,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_that_of_the_last_seconds() {
        let start = Instant::now();
        let sample = |seconds, read, written| Sample { at: start + Duration::from_secs(seconds), read, written };
        let rate = |pace: &Pace, now| {
            pace.until(now).map(|rate| (rate.read_per_second, rate.written_per_second, rate.seconds))
        };
        let mut pace = Pace::default();
        assert_eq!(rate(&pace, sample(9, 9, 9)), None);
        pace.add(sample(0, 0, 0));
        assert_eq!(rate(&pace, sample(0, 9, 9)), None, "too short a time");
        assert_eq!(rate(&pace, sample(4, 4000, 400)), Some((1000, 100, 4)));
        pace.add(sample(10, 100_000, 0));
        assert_eq!(rate(&pace, sample(15, 150_000, 0)), Some((10_000, 0, 15)));
        pace.add(sample(20, 100_000, 0));
        assert_eq!(rate(&pace, sample(25, 100_000, 0)), Some((0, 0, 15)));
    }
}
