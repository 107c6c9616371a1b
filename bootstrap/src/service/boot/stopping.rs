//! Decides when to retry a stop while somebody still uses the volume.
//!
//! A filesystem that is in use cannot be unmounted. If the server gave up, the writes that the kernel still holds would be
//! lost. So the server tries again until nobody uses the filesystem. Nothing here waits. The caller reports each attempt to
//! [`Stopping`], which returns how long to wait before the next attempt, and whether the reason is new.

use std::time::{Duration, Instant};

/// The pause after the first attempt. It doubles up to [`LONGEST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(50);
/// The longest pause between two attempts.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// How often the filesystem is written out, so that little is lost if this process is killed.
const SYNC_EVERY: Duration = Duration::from_secs(10);

/// The state of a stop that has not succeeded yet.
#[derive(Debug)]
pub(super) struct Stopping {
    pause: Duration,
    told: Option<String>,
    synced: Option<Instant>,
}

impl Stopping {
    /// Returns the state before the first attempt.
    pub(super) fn new() -> Self {
        Self { pause: FIRST_PAUSE, told: None, synced: None }
    }

    /// Records that an attempt failed for the reason `why`. Returns `true` if the reason is new, so that each reason is
    /// logged only once and not with each attempt.
    pub(super) fn refused(&mut self, why: &str) -> bool {
        let news = self.told.as_deref() != Some(why);
        if news {
            self.told = Some(why.to_owned());
        }
        news
    }

    /// Returns how long to wait before the next attempt, unless something happens meanwhile.
    pub(super) fn pause(&mut self) -> Duration {
        let pause = self.pause;
        self.pause = (pause * 2).min(LONGEST_PAUSE);
        pause
    }

    /// Returns `true` if it is time to write out what the filesystem holds.
    pub(super) fn is_sync_due(&mut self, now: Instant) -> bool {
        let due = self.synced.is_none_or(|last| now.duration_since(last) >= SYNC_EVERY);
        if due {
            self.synced = Some(now);
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_a_second_and_never_end() {
        let mut stopping = Stopping::new();
        let pauses: Vec<_> = (0..100).map(|_| stopping.pause()).collect();
        assert_eq!(pauses[0], FIRST_PAUSE);
        assert!(pauses.is_sorted());
        assert_eq!(pauses[99], LONGEST_PAUSE);
    }

    #[test]
    fn a_reason_is_logged_once_until_it_changes() {
        let mut stopping = Stopping::new();
        let news = ["bash", "bash", "vim", "vim", "bash"].map(|why| stopping.refused(why));
        assert_eq!(news, [true, false, true, false, true]);
    }

    #[test]
    fn the_filesystem_is_synced_at_once_and_every_ten_seconds() {
        let start = Instant::now();
        let mut stopping = Stopping::new();
        let due = [0, 1, 9, 10, 11, 20].map(|second| stopping.is_sync_due(start + Duration::from_secs(second)));
        assert_eq!(due, [true, false, false, true, false, true]);
    }
}
