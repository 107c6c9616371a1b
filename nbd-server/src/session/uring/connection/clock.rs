//! The time limits of a client: how long it may be idle, and how long it may go on after the shutdown.

use std::time::{Duration, Instant};

use crate::session::{DEAF, LAST_WORDS, QUIET};

pub(super) struct Clock {
    /// A client is disconnected if it neither sends nor takes a byte for this long and none of its requests is being
    /// carried out.
    idle: Option<Duration>,
    /// When the client last sent or took something, or last waited for the disk.
    moved: Instant,
    last_words: Option<LastWords>,
}

/// The time limits for the client after the shutdown.
struct LastWords {
    quiet: Instant,
    deaf: Instant,
    end: Instant,
}

/// A time limit that has passed.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Due {
    /// The client was idle for too long.
    Idle,
    /// After the shutdown, the client has sent nothing for [`QUIET`].
    Quiet,
    /// After the shutdown, the client has kept sending for [`DEAF`].
    Deaf,
    /// [`LAST_WORDS`] have passed since the shutdown.
    End,
}

impl Clock {
    pub(super) fn new(idle: Option<Duration>) -> Self {
        Self { idle, moved: Instant::now(), last_words: None }
    }

    /// Notes that the client took something, or that one of its requests was carried out.
    pub(super) fn has_moved(&mut self) {
        if self.idle.is_some() {
            self.moved = Instant::now();
        }
    }

    /// Notes that the client sent something.
    pub(super) fn has_received(&mut self) {
        self.has_moved();
        if let Some(last) = &mut self.last_words {
            last.quiet = Instant::now() + QUIET;
        }
    }

    /// Starts the client's time limits after the shutdown.
    pub(super) fn shut_down(&mut self) {
        if self.last_words.is_none() {
            let now = Instant::now();
            self.last_words = Some(LastWords { quiet: now + QUIET, deaf: now + DEAF, end: now + LAST_WORDS });
        }
    }

    pub(super) fn is_shutting_down(&self) -> bool {
        self.last_words.is_some()
    }

    /// Lets a client that is in the middle of a message continue until [`Due::End`].
    pub(super) fn wait_for_the_end(&mut self) {
        if let Some(last) = &mut self.last_words {
            last.quiet = last.end;
            last.deaf = last.end;
        }
    }

    /// Returns how long it takes until the next time limit passes. `has_ended` is set if nothing more is read from the
    /// client.
    pub(super) fn limit(&self, has_ended: bool) -> Option<Duration> {
        let until = |moment: Instant| Some(moment.saturating_duration_since(Instant::now()));
        match &self.last_words {
            Some(last) if has_ended => until(last.end),
            Some(last) => until(last.quiet.min(last.deaf)),
            None => self.idle.and_then(|idle| until(self.moved + idle)),
        }
    }

    /// Returns which time limit has passed, if any. A client whose request is being carried out is not idle.
    pub(super) fn due(&mut self, is_carrying_out: bool) -> Option<Due> {
        if self.idle.is_none() && self.last_words.is_none() {
            return None;
        }
        let now = Instant::now();
        if is_carrying_out {
            self.moved = now;
        } else if self.idle.is_some_and(|idle| now.duration_since(self.moved) >= idle) {
            return Some(Due::Idle);
        }
        let last = self.last_words.as_ref()?;
        if now >= last.end {
            Some(Due::End)
        } else if now >= last.deaf {
            Some(Due::Deaf)
        } else {
            (now >= last.quiet).then_some(Due::Quiet)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_is_idle_only_while_nothing_is_carried_out() {
        let mut clock = Clock::new(Some(Duration::ZERO));
        assert_eq!((clock.due(true), clock.due(false)), (None, Some(Due::Idle)));
        assert_eq!(clock.limit(false), Some(Duration::ZERO));
        let mut clock = Clock::new(Some(Duration::from_secs(600)));
        assert_eq!(clock.due(false), None);
    }

    #[test]
    fn without_limits_nothing_is_ever_due() {
        let mut clock = Clock::new(None);
        assert_eq!((clock.due(false), clock.limit(false)), (None, None));
    }

    #[test]
    fn after_the_shutdown_a_quiet_client_is_due_first() {
        let mut clock = Clock::new(None);
        clock.shut_down();
        assert!(clock.is_shutting_down());
        assert!(clock.limit(false).unwrap() <= QUIET && clock.limit(true).unwrap() > DEAF);
        let last = clock.last_words.as_mut().unwrap();
        last.quiet = Instant::now();
        assert_eq!(clock.due(false), Some(Due::Quiet));
        clock.has_received();
        assert_eq!(clock.due(false), None);
        let last = clock.last_words.as_mut().unwrap();
        last.deaf = Instant::now();
        assert_eq!(clock.due(false), Some(Due::Deaf));
        clock.wait_for_the_end();
        assert_eq!(clock.due(false), None);
        let last = clock.last_words.as_mut().unwrap();
        last.end = Instant::now();
        assert_eq!(clock.due(false), Some(Due::End));
    }
}
