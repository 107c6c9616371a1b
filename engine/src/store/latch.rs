//! Remembers that a flush has failed.
//!
//! # Why
//! Linux reports a failed write-back once for each open file (`errseq_t`, fsync(2)). It then marks the pages as clean and
//! may drop them. The next fsync(2) succeeds although earlier writes are lost. A caller that tries again is therefore told
//! that its data is durable, although the data is lost. PostgreSQL found this in 2018 ("fsyncgate"). qemu-nbd handles it as
//! this module does.
//!
//! So a store keeps the first failure while it is open: every later flush and every write that must be durable fails with
//! `EIO`, on every connection. Reopening the volume clears the latch, because reads then return what is on the disk.
//!
//! # Which stores
//! All stores need the latch, with and without the page cache:
//! - Without direct I/O, a write reaches only the page cache, and the case above applies.
//! - `O_DIRECT` does not always bypass the page cache. ext4 buffers files with `data=journal` and inline data, and encrypted
//!   files without inline encryption. btrfs buffers data with checksums (Linux 6.15 and later) and compressed data. f2fs
//!   buffers compressed data, OpenZFS before version 2.3 buffers everything, and FUSE buffers unless its server asks for direct
//!   I/O. XFS buffers a write of less than a filesystem block to a file that shares blocks (`cp --reflink`), and does not wait
//!   for the write-back. So a [`FileStore`](super::FileStore) on XFS only writes whole filesystem blocks directly. tmpfs has
//!   accepted `O_DIRECT` since Linux 6.6, but keeps its files in memory. overlayfs does what the filesystem below it does.
//! - A block device has a volatile cache of its own. If the command that empties this cache fails, the lost data is unknown,
//!   and no later command reports it.
//!
//! A transient failure that lost no data looks the same, so it sets the latch, too. This hardly matters, because the
//! filesystem above stops writing at the first failed flush anyway.
//!
//! # Who reports a failure
//! The kernel reports a failure only once for each open file. If several threads call fsync(2) at the same time, the thread
//! that gets the report must tell all others. [`FlushLatch::flush`] ensures this: one flush runs at a time, and callers
//! that arrive meanwhile share the next flush. A session that submits fsync through io_uring calls [`FlushLatch::check`]
//! first and passes the outcome to [`FlushLatch::record`]. The session may submit fsync only if writes bypass the page
//! cache ([`Medium::File::writes_through`](super::Medium)), because a failed flush is then reported to each caller that it
//! concerns.
//!
//! A failed write without `RWF_DSYNC` does not set the latch: its error tells the caller all that was lost. If a write with
//! `RWF_DSYNC` fails, either the write or its flush may have failed, so the caller writes and flushes again in two steps.
//!
//! # Which errors
//! - A failed flush always sets the latch. `EIO` is a lost write-back or a failed command to the disk. `ENOSPC` and
//!   `EDQUOT` are lost write-backs, too. fsync(2) returns them where the space for an earlier write is allocated only at
//!   fsync time: on NFS and on a thinly provisioned disk. ext4 returns `EROFS` after it has aborted its journal. Other
//!   errors do not say what was lost.
//! - If a failed `RWF_DSYNC` write succeeds without the flag, the flush may have failed.
//!   [`FlushLatch::record_durable_write`] then sets the latch for these errors: `EIO`, `EROFS`, and the errors that the
//!   block layer returns for a failed command (`ENODATA`, `EREMOTEIO`, `EILSEQ`, `ETIMEDOUT`, `ENOLINK`, `EBADE`, `ENXIO`,
//!   `ENODEV`). Only three errors do not set the latch: `ENOSPC`, `EDQUOT` and `EFBIG` (the limits of write(2) on the
//!   disk's space, the user's quota and the file's size). These three errors concern only this write. The flush cannot have
//!   returned them: the session sends such a write only if writes bypass the page cache, so there is no earlier write-back
//!   that can fail.

use std::io;
use std::sync::{Condvar, Mutex, MutexGuard, OnceLock, PoisonError};

/// The first failed flush of a store, and the flush that is running now.
#[derive(Debug, Default)]
pub struct FlushLatch {
    /// The name of the disk in the log.
    name: String,
    /// The error of the first failed flush.
    failure: OnceLock<String>,
    turns: Mutex<Turns>,
    ended: Condvar,
}

/// Flushes of one store take turns.
#[derive(Debug, Default)]
struct Turns {
    is_running: bool,
    /// The number of flushes that have ended.
    ended: u64,
    /// The number of callers that wait for a flush.
    waiting: usize,
}

/// The error after an earlier flush has failed.
#[derive(Debug, Clone, thiserror::Error)]
#[error(
    "an earlier flush failed ({0}), so data that was written before may be lost; nothing is reported as durable until the \
     volume is opened again"
)]
struct EarlierFailure(String);

impl FlushLatch {
    /// Returns a latch for the disk. The log calls the disk `name`.
    pub fn new(name: impl Into<String>) -> Self {
        Self { name: name.into(), ..Self::default() }
    }

    /// Checks that data may still be reported as durable.
    ///
    /// # Errors
    /// An error that clients see as `EIO`, if a flush has failed since the store was opened.
    pub fn check(&self) -> io::Result<()> {
        match self.failure.get() {
            None => Ok(()),
            Some(failure) => Err(io::Error::other(EarlierFailure(failure.clone()))),
        }
    }

    /// Returns the error of the first flush that failed, if one has failed.
    pub fn failure(&self) -> Option<&str> {
        self.failure.get().map(String::as_str)
    }

    /// Takes the outcome of a flush, remembers a failure, and returns what the caller may report. Logs the first failure.
    ///
    /// # Errors
    /// The failure itself, or the error of [`FlushLatch::check`] if another flush has failed.
    pub fn record(&self, outcome: io::Result<()>) -> io::Result<()> {
        let Err(error) = outcome else { return self.check() };
        if self.failure.set(error.to_string()).is_ok() {
            tracing::error!(
                "{}: a flush failed ({error}), so data that was written since the last flush may be lost. From now on, every \
                 flush fails until the volume is opened again. Check the disk, then stop and start the volume",
                self.name
            );
        }
        Err(error)
    }

    /// Takes the error of a write with `RWF_DSYNC` that succeeded when it was repeated without the flag. If the flush may have
    /// caused the error, treats it as a failed flush.
    ///
    /// # Errors
    /// As [`FlushLatch::record`].
    pub fn record_durable_write(&self, error: io::Error) -> io::Result<()> {
        match error.kind() {
            // ENOSPC, EDQUOT, EFBIG
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => self.check(),
            _ => self.record(Err(error)),
        }
    }

    /// Runs `sync`, or shares a flush that another thread begins after this call. Blocks until that flush has ended.
    ///
    /// # Errors
    /// As [`FlushLatch::record`].
    pub fn flush(&self, sync: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        self.check()?;
        let mut turns = self.turns();
        // A flush that is running may have begun before the caller's last write. The next flush begins after it.
        let needed = turns.ended + 1 + u64::from(turns.is_running);
        while turns.is_running {
            turns.waiting += 1;
            turns = self.ended.wait(turns).unwrap_or_else(PoisonError::into_inner);
            turns.waiting -= 1;
            if turns.ended >= needed {
                drop(turns);
                return self.check();
            }
        }
        turns.is_running = true;
        drop(turns);
        let mut running = Running { latch: self, is_known: false };
        let outcome = self.record(sync());
        running.is_known = true;
        outcome
    }

    fn turns(&self) -> MutexGuard<'_, Turns> {
        self.turns.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The turn of the thread that flushes. Dropping it ends the turn. If the flush has panicked, it is unknown what the
/// disk has stored, so the flush counts as failed.
struct Running<'a> {
    latch: &'a FlushLatch,
    /// Set once the outcome is recorded.
    is_known: bool,
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        if !self.is_known {
            let _ = self.latch.record(Err(io::Error::other("the flush panicked")));
        }
        let mut turns = self.latch.turns();
        turns.is_running = false;
        turns.ended += 1;
        drop(turns);
        self.latch.ended.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    fn eio() -> io::Result<()> {
        Err(io::Error::from_raw_os_error(libc::EIO))
    }

    #[test]
    fn after_a_failure_nothing_is_durable_any_more() {
        let latch = FlushLatch::new("disk");
        latch.flush(|| Ok(())).unwrap();
        latch.check().unwrap();
        assert_eq!(latch.flush(eio).unwrap_err().raw_os_error(), Some(libc::EIO));
        assert!(latch.check().is_err());
        assert!(latch.record(Ok(())).is_err(), "a flush that began before the failure must fail, too");
        let error = latch.flush(|| panic!("the disk must not be asked again")).unwrap_err();
        assert!(error.to_string().contains("until the volume is opened again"), "{error}");
    }

    #[test]
    fn a_durable_write_without_room_does_not_latch() {
        let latch = FlushLatch::new("disk");
        for errno in [libc::ENOSPC, libc::EDQUOT, libc::EFBIG] {
            latch.record_durable_write(io::Error::from_raw_os_error(errno)).unwrap();
        }
        latch.flush(|| Ok(())).unwrap();
        for errno in [libc::EIO, libc::EROFS, libc::ENODATA, libc::EREMOTEIO, libc::ETIMEDOUT, libc::ENXIO] {
            let latch = FlushLatch::new("disk");
            let error = latch.record_durable_write(io::Error::from_raw_os_error(errno)).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(errno));
            assert!(latch.check().is_err(), "{errno}");
        }
        // A flush that finds no room has lost an earlier write.
        latch.flush(|| Err(io::Error::from_raw_os_error(libc::ENOSPC))).unwrap_err();
        assert!(latch.check().is_err());
        // After that, every durable write fails, whatever its own error was.
        assert!(latch.record_durable_write(io::Error::from_raw_os_error(libc::ENOSPC)).is_err());
    }

    /// Lets one caller flush with `outcome` while four more callers arrive, whose own flush would succeed. Returns the results
    /// of all five, the result of the first caller first, and how often the flush of the four ran.
    fn five_at_once(outcome: fn() -> io::Result<()>) -> (Vec<bool>, usize) {
        let latch = &FlushLatch::default();
        let syncs = AtomicUsize::new(0);
        let gate = Barrier::new(2);
        let count = || {
            syncs.fetch_add(1, Ordering::SeqCst);
            Ok(())
        };
        let told = std::thread::scope(|scope| {
            let first = scope.spawn(|| {
                latch.flush(|| {
                    gate.wait();
                    gate.wait();
                    outcome()
                })
            });
            gate.wait();
            let others: Vec<_> = (0..4).map(|_| scope.spawn(move || latch.flush(count))).collect();
            while latch.turns().waiting < 4 {
                std::thread::yield_now();
            }
            gate.wait();
            std::iter::once(first).chain(others).map(|thread| thread.join().unwrap().is_ok()).collect()
        });
        (told, syncs.load(Ordering::SeqCst))
    }

    /// The kernel reports a failure to only one of several fsync(2) on one file, here to the first.
    #[test]
    fn a_failure_is_reported_to_all_waiting_callers() {
        assert_eq!(five_at_once(eio).0, [false; 5]);
    }

    #[test]
    fn a_flush_that_panics_counts_as_failed() {
        let latch = FlushLatch::new("disk");
        let gate = Barrier::new(2);
        std::thread::scope(|scope| {
            let first = scope.spawn(|| {
                latch.flush(|| {
                    gate.wait();
                    gate.wait();
                    panic!("on purpose")
                })
            });
            gate.wait();
            let second = scope.spawn(|| latch.flush(|| Ok(())));
            while latch.turns().waiting == 0 {
                std::thread::yield_now();
            }
            gate.wait();
            first.join().unwrap_err();
            second.join().unwrap().unwrap_err();
        });
        latch.flush(|| panic!("the disk must not be asked again")).unwrap_err();
    }

    #[test]
    fn waiting_callers_share_one_flush_after_the_running_one() {
        assert_eq!(five_at_once(|| Ok(())), (vec![true; 5], 1));
    }
}
