//! Messages to the service manager, if one started this process (sd_notify(3)).

use std::sync::mpsc::{Receiver, RecvError, RecvTimeoutError, Sender, channel};
use std::time::Duration;

use crate::machine::process;

/// How much more time systemd gives after each message. A message is sent every [`EVERY`].
const EXTENSION: Duration = Duration::from_secs(30);
/// The pause between two messages.
const EVERY: Duration = Duration::from_secs(5);
/// For this long, the server keeps asking systemd to extend its time limits (`TimeoutStartSec=` and `TimeoutStopSec=`).
/// After that the limits apply, so that a shutdown of the machine ends.
pub(super) const OVERTIME: Duration = Duration::from_secs(15 * 60);

/// Reports that the volume goes down.
pub(super) fn stopping() {
    say("STOPPING=1");
}

/// Reports what the server is doing, for `systemctl status`.
pub(super) fn doing(what: &str) {
    say(&status(what));
}

/// Returns the line of a message that sets the status. Each line of a message sets one variable, and `systemctl status` shows
/// the text on a terminal.
fn status(what: &str) -> String {
    format!("STATUS={}", engine::text::printable(what))
}

/// Sends the service manager signs of life (`WatchdogSec=`) from the thread that calls [`Watchdog::wait`].
///
/// The main thread calls this function, because the main thread answers `down` and SIGTERM. If the main thread hangs, no more
/// signs are sent, and systemd ends this process. While the main thread waits for mkfs, mount, umount or sync, an [`Overtime`]
/// sends the signs. These programs wait for the disk, and a disk that hangs is no reason to end the server.
///
/// The threads that serve requests do not take part. A session that hangs in its own code cannot be told from one whose disk
/// hangs: a worker that holds a lock may wait for either, and a page of a volume in memory may have to come from a slow swap
/// disk. A server that is killed by mistake loses what the filesystem has not written, and systemd stops the filesystem's
/// users. So `status` and the log report requests that are not answered ([`super::stall`]), and a human decides.
#[derive(Debug)]
pub(super) struct Watchdog {
    every: Option<Duration>,
}

impl Watchdog {
    /// Returns the watchdog that the service manager asked for.
    pub(super) fn new() -> Self {
        Self { every: process::watchdog_limit().map(|limit| limit / 3) }
    }

    /// Waits for an event, and meanwhile sends signs of life.
    ///
    /// # Errors
    /// Fails if no event can come any more.
    pub(super) fn wait<T>(&self, happened: &Receiver<T>) -> Result<T, RecvError> {
        let Some(every) = self.every else { return happened.recv() };
        loop {
            say(ALIVE);
            match happened.recv_timeout(every) {
                Ok(event) => return Ok(event),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Err(RecvError),
            }
        }
    }
}

/// The message that is a sign of life.
const ALIVE: &str = "WATCHDOG=1";

/// Stands in for the main thread while that thread waits for a program. As long as this value lives, a separate thread asks
/// the service manager for more time and sends signs of life. mkfs, mount and umount may take long: umount writes out
/// everything that the kernel still holds.
#[derive(Debug)]
pub(super) struct Overtime {
    /// Dropped when no more time is needed.
    _end: Sender<()>,
}

impl Overtime {
    /// Starts to ask for more time, and continues for `limit`.
    pub(super) fn begin(limit: Duration) -> Self {
        let (end, ended) = channel();
        let watchdog = process::watchdog_limit();
        let every = watchdog.map_or(EVERY, |limit| EVERY.min(limit / 3));
        let speak = move || speak(&ended, every, limit, watchdog.is_some(), &mut say);
        if let Err(error) = std::thread::Builder::new().name("overtime".to_owned()).spawn(speak) {
            tracing::warn!("the service manager cannot be asked for more time: {error}");
        }
        Self { _end: end }
    }
}

/// Sends messages until the sender of `ended` is dropped. Asks for more time only until `limit`. Signs of life have no limit:
/// writing out a large filesystem may take hours, and if the server is killed meanwhile, the data that is not yet written is
/// lost.
fn speak(ended: &Receiver<()>, every: Duration, limit: Duration, has_watchdog: bool, say: &mut dyn FnMut(&str)) {
    let mut passed = Duration::ZERO;
    loop {
        if passed < limit {
            say(&format!("EXTEND_TIMEOUT_USEC={}", EXTENSION.as_micros()));
        }
        if has_watchdog {
            say(ALIVE);
        }
        if (passed >= limit && !has_watchdog) || ended.recv_timeout(every) != Err(RecvTimeoutError::Timeout) {
            return;
        }
        passed += every;
    }
}

fn say(message: &str) {
    if let Err(error) = process::notify_service_manager(message) {
        tracing::debug!("the service manager could not be notified: {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_in_a_status_cannot_forge_an_assignment() {
        assert_eq!(status("waiting: a\nMAINPID=1\u{1b}[2K"), "STATUS=waiting: a\\u{a}MAINPID=1\\u{1b}[2K");
    }

    #[test]
    fn more_time_is_asked_for_until_the_limit() {
        let (end, ended) = channel();
        let every = Duration::from_micros(1);
        let mut asked = 0;
        speak(&ended, every, every * 180, false, &mut |message| {
            assert_eq!(message, "EXTEND_TIMEOUT_USEC=30000000");
            asked += 1;
        });
        assert_eq!(asked, 180);
        drop(end);
        speak(&ended, Duration::from_secs(600), Duration::from_secs(900), false, &mut |_| asked += 1);
        assert_eq!(asked, 181);
    }

    #[test]
    fn signs_of_life_outlast_the_limit() {
        let (end, ended) = channel();
        let every = Duration::from_micros(1);
        let (mut end, mut said) = (Some(end), Vec::new());
        speak(&ended, every, every * 2, true, &mut |message| {
            said.push(message.split('=').next().unwrap_or_default().to_owned());
            if said.len() == 5 {
                end = None;
            }
        });
        let time = "EXTEND_TIMEOUT_USEC";
        assert_eq!(said, [time, "WATCHDOG", time, "WATCHDOG", "WATCHDOG"]);
    }
}
