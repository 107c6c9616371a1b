//! What the server is doing, for clients that ask while its main thread is busy.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nbd_server::statistics::Statistics;

use crate::attach::Remains;
use crate::service::control::Answer;
use crate::service::status::{Condition, Status};

/// What the main thread writes and the control thread reads.
#[derive(Clone, Debug)]
pub(super) struct Board(Arc<Mutex<Written>>);

#[derive(Debug)]
struct Written {
    /// The status of the volume if everything that was made still exists.
    status: Status,
    /// The device that was attached.
    attachment: Option<Remains>,
    /// The counters of the export to which the device is attached, if it is attached by NBD.
    statistics: Option<Arc<Statistics>>,
}

impl Board {
    /// Makes a board with this status. Nothing is attached yet.
    pub(super) fn new(status: Status) -> Self {
        Self(Arc::new(Mutex::new(Written { status, attachment: None, statistics: None })))
    }

    /// Sets what the server is doing from now on, and why it takes so long.
    pub(super) fn set(&self, condition: Condition, doing: Option<String>) {
        let mut written = self.lock();
        (written.status.condition, written.status.doing) = (condition, doing);
    }

    /// Changes the reported status of the volume.
    pub(super) fn change(
        &self,
        attachment: Option<Remains>,
        statistics: Option<Arc<Statistics>>,
        change: impl FnOnce(&mut Status),
    ) {
        let mut written = self.lock();
        (written.attachment, written.statistics) = (attachment, statistics);
        change(&mut written.status);
    }

    /// Returns the volume's status as it is now.
    ///
    /// # Errors
    /// Fails if /proc cannot be read.
    pub(super) fn status(&self) -> std::io::Result<Status> {
        let (status, attachment) = {
            let written = self.lock();
            let mut status = written.status.clone();
            status.requests = written.statistics.as_ref().map(|statistics| statistics.snapshot().into());
            (status, written.attachment.clone())
        };
        // By now the lock is released: the main thread must not wait while this thread reads /proc and /sys.
        status.seen(attachment.as_ref())
    }

    /// Returns the status as an answer.
    pub(super) fn answer(&self) -> Answer {
        match self.status() {
            Ok(status) => Answer::Status(Box::new(status)),
            Err(error) => Answer::Failed(format!("the server cannot see what is mounted: {error}")),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Written> {
        // Each change is complete when the lock is released, even by a panic.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::service::run_dir::State;

    #[test]
    fn requests_are_reported_while_a_device_counts_them() {
        let board = Board::new(State::default().status("scratch", Condition::ComingUp));
        let reported = || board.status().unwrap().requests.map(|requests| requests.answered);
        assert_eq!(reported(), None);
        board.change(None, Some(Arc::default()), |_| {});
        assert_eq!(reported(), Some(0));
        board.change(None, None, |_| {});
        assert_eq!(reported(), None);
    }
}
