//! The disk of a connection, and which thread or ring carries out a command on it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use engine::store::{FlushLatch, Medium};
use engine::volume::Volume;

use crate::proto::Command;

/// If the disk is in memory, a worker carries out a discard or a write of zeros that is longer than this many bytes.
const LONG: u64 = 1 << 20;

pub(super) struct Disk<'a> {
    volume: &'a Volume,
    /// The disk's file, if the ring can access it.
    file: Option<File<'a>>,
    /// Set if the disk is in memory.
    resident: bool,
    /// Set if the end of the disk was checked since the last wait for the ring.
    end_is_checked: bool,
}

/// The disk's file, taken from [`Medium::File`].
#[derive(Clone, Copy)]
struct File<'a> {
    file: BorrowedFd<'a>,
    /// Set if the ring may write as well as read, because there is no page cache in between.
    direct: bool,
    /// Set if the ring may also make writes durable.
    writes_through: bool,
    latch: &'a FlushLatch,
}

/// Which thread or ring carries out a command.
pub(super) enum Lane<'a> {
    /// This thread, immediately.
    Here,
    /// The ring, which reads, writes or flushes this file.
    Ring(BorrowedFd<'a>),
    /// A worker thread, which may block.
    Worker,
}

impl File<'_> {
    /// Returns whether the ring may write, and with `durable` also whether it may make the write durable.
    fn takes_writes(&self, durable: bool) -> bool {
        if durable { self.writes_through } else { self.direct }
    }
}

impl<'a> Disk<'a> {
    pub(super) fn new(volume: &'a Volume) -> Self {
        let (file, resident) = match volume.store().medium() {
            Medium::Memory => (None, true),
            Medium::File { file, direct, writes_through, resident, latch } => {
                (Some(File { file: file.as_fd(), direct, writes_through, latch }), resident)
            }
            Medium::Other => (None, false),
        };
        Self { volume, file, resident, end_is_checked: false }
    }

    pub(super) fn volume(&self) -> &'a Volume {
        self.volume
    }

    /// Returns whether the ring reads and writes the disk without the page cache.
    pub(super) fn is_direct(&self) -> bool {
        self.file.is_some_and(|file| file.direct)
    }

    /// Returns which thread or ring carries out the command.
    pub(super) fn lane(&self, command: &Command) -> Lane<'a> {
        let is_whole = |offset, len| matches!(self.volume.disk_range(offset, len), Ok(Some(_)));
        match (*command, self.file) {
            (Command::Read(_) | Command::Write { .. } | Command::Flush | Command::Cache(_), _) if self.resident => {
                Lane::Here
            }
            (Command::Trim { range, .. } | Command::WriteZeroes { range, .. }, _)
                if self.resident && range.len <= LONG =>
            {
                Lane::Here
            }
            (Command::Read(range), Some(file)) if is_whole(range.offset, range.len) => Lane::Ring(file.file),
            (Command::Write { range, fua }, Some(file))
                if file.takes_writes(fua) && is_whole(range.offset, range.len) =>
            {
                Lane::Ring(file.file)
            }
            // Through the page cache, the kernel reports lost data to only one of several flushes. So the store makes
            // the flushes take turns (engine::store::FlushLatch).
            (Command::Flush, Some(file)) if file.takes_writes(true) && !self.volume.is_read_only() => {
                Lane::Ring(file.file)
            }
            _ => Lane::Worker,
        }
    }

    /// Returns whether the session encrypts a payload while it arrives. The session does not encrypt it if another
    /// thread will have the time to encrypt, or if the volume encrypts into mapped memory.
    pub(super) fn encrypts_arriving(&self, is_pipelined: bool) -> bool {
        !(self.resident && (is_pipelined || self.volume.encrypts_into_mapping()))
    }

    /// Checks whether the disk has been shortened. Checks only once for all requests that had arrived at the last wait
    /// for the ring.
    pub(super) fn check_end(&mut self) {
        if !std::mem::replace(&mut self.end_is_checked, true) {
            self.volume.check_end();
        }
    }

    /// Notes that the session has waited for the ring.
    pub(super) fn has_waited(&mut self) {
        self.end_is_checked = false;
    }

    /// Returns whether a write may still be reported as durable.
    pub(super) fn check_latch(&self) -> io::Result<()> {
        self.file.map_or(Ok(()), |file| file.latch.check())
    }

    /// Takes the outcome of a flush by the ring. Returns what may be reported.
    pub(super) fn record_flush(&self, outcome: io::Result<()>) -> io::Result<()> {
        // The ring flushes only if there is a file.
        self.file.map_or(Ok(()), |file| file.latch.record(outcome))
    }

    /// Makes every later flush of the store fail, because a flush has failed or its result is unknown.
    pub(super) fn distrust(&self, error: &io::Error) {
        let _ = self.record_flush(Err(io::Error::new(error.kind(), error.to_string())));
    }
}
