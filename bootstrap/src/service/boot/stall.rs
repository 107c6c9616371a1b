//! Requests that are not answered: how long the kernel has waited for the server without any reply.
//!
//! This is only reported. Seen from here, a disk that hangs and a session that hangs in its own code are alike: the kernel waits,
//! and no reply comes. A server whose disk hangs must live on, because the filesystem on the volume loses what it has not
//! written if its server ends. So the watchdog is not fed from here ([`super::manager::Watchdog`]), and a human decides.

use std::time::{Duration, Instant};

/// After this time without a reply, the volume counts as degraded.
const LONG: Duration = Duration::from_secs(60);

/// What is known about requests that are not answered.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Stall {
    /// The first of the samples since which requests wait and none was answered.
    since: Option<Instant>,
    answered: u64,
    reported: bool,
}

/// What changed with a sample.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Change {
    /// The requests have waited for a long time.
    Begun,
    /// Requests are answered again. They had waited for this time.
    Over(Duration),
}

impl Stall {
    /// Adds a sample: `waiting` requests are with the server, and it has answered `answered` requests so far.
    pub(super) fn add(&mut self, at: Instant, waiting: u64, answered: u64) -> Option<Change> {
        let goes_on = waiting > 0 && answered == self.answered;
        self.answered = answered;
        if goes_on {
            self.since.get_or_insert(at);
            let is_long = self.long(at).is_some();
            let was_reported = std::mem::replace(&mut self.reported, is_long);
            return (is_long && !was_reported).then_some(Change::Begun);
        }
        let lasted = self.since.take().map(|since| at.saturating_duration_since(since));
        lasted.filter(|_| std::mem::take(&mut self.reported)).map(Change::Over)
    }

    /// Returns how long requests have waited without a reply, if that is long.
    pub(super) fn long(&self, now: Instant) -> Option<Duration> {
        self.since.map(|since| now.saturating_duration_since(since)).filter(|passed| *passed >= LONG)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stall_is_a_minute_without_a_reply() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut stall = Stall::default();
        // An idle device, and a busy one.
        for second in (0..200).step_by(10) {
            assert_eq!(stall.add(at(second), 0, 7), None);
        }
        for second in (200..400).step_by(10) {
            assert_eq!(stall.add(at(second), 3, second), None);
        }
        assert_eq!(stall.long(at(9999)), None);
        // From now on, nothing is answered.
        for second in (400..460).step_by(10) {
            assert_eq!((stall.add(at(second), 1, 390), stall.long(at(second))), (None, None));
        }
        assert_eq!(stall.add(at(460), 2, 390), Some(Change::Begun));
        assert_eq!(stall.add(at(470), 2, 390), None, "it is reported once");
        assert_eq!(stall.long(at(475)), Some(Duration::from_secs(75)));
        assert_eq!(stall.add(at(480), 2, 391), Some(Change::Over(Duration::from_secs(80))));
        assert_eq!(stall.long(at(9999)), None);
        // A short one is not reported, neither its beginning nor its end.
        assert_eq!([stall.add(at(490), 1, 391), stall.add(at(500), 0, 392)], [None, None]);
    }
}
