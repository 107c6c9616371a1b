//! Runs work and waits for it only until a deadline. An example is an examination of a disk that may not answer.

use std::io;
use std::sync::mpsc::{Receiver, channel};
use std::time::Instant;

/// Work that runs in its own thread.
#[derive(Debug)]
pub struct Pending<T>(Receiver<T>);

impl<T: Send + 'static> Pending<T> {
    /// Starts the work.
    ///
    /// # Errors
    /// The operating system's error, if the thread cannot be started.
    pub fn start(work: impl FnOnce() -> T + Send + 'static) -> io::Result<Self> {
        let (sender, result) = channel();
        // Sending fails if the caller no longer waits.
        std::thread::Builder::new().name("bounded".to_owned()).spawn(move || drop(sender.send(work())))?;
        Ok(Self(result))
    }

    /// Waits for the result until `deadline`. Returns `None` if it takes longer. The thread then goes on until the work
    /// or the process ends, so use this only in a process that ends soon.
    pub fn wait(&self, deadline: Instant) -> Option<T> {
        self.0.recv_timeout(deadline.saturating_duration_since(Instant::now())).ok()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn work_that_never_ends_is_not_waited_for() {
        let (_never, blocked) = channel::<()>();
        let pending = Pending::start(move || blocked.recv().is_ok()).unwrap();
        assert_eq!(pending.wait(Instant::now() + Duration::from_millis(1)), None);
        let quick = Pending::start(|| 7).unwrap();
        assert_eq!(quick.wait(Instant::now() + Duration::from_secs(60)), Some(7));
    }
}
