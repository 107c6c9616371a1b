//! Counters of the clients and requests of an export.

pub mod latency;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use latency::Latency;

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Operation {
    /// A read.
    Read,
    /// A write.
    Write,
    /// A flush.
    Flush,
    /// A discard.
    Discard,
    /// A write of zeros.
    WriteZeroes,
    /// A read ahead.
    Cache,
    /// A query of the allocation.
    BlockStatus,
    /// A request that was refused before it was carried out: a write to a read-only export, a range past the end, or a request
    /// that breaks the rules of the protocol.
    Refused,
}

impl Operation {
    /// All operations, in the order of their numbers.
    pub const ALL: [Self; 8] = [
        Self::Read,
        Self::Write,
        Self::Flush,
        Self::Discard,
        Self::WriteZeroes,
        Self::Cache,
        Self::BlockStatus,
        Self::Refused,
    ];

    /// Returns the operation's name, which is one word.
    pub fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Flush => "flush",
            Self::Discard => "discard",
            Self::WriteZeroes => "write-zeroes",
            Self::Cache => "cache",
            Self::BlockStatus => "block-status",
            Self::Refused => "refused",
        }
    }
}

/// What is to blame for an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Blame {
    /// The disk, or a lack of memory or space.
    Disk,
    /// The client asked for something that is not possible.
    Client,
}

/// How often requests of one kind failed in one way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Failed {
    /// What the requests asked for.
    pub operation: Operation,
    /// The error that the client got, such as `EIO`.
    pub error: &'static str,
    /// What is to blame.
    pub blame: Blame,
    /// How often.
    pub count: u64,
}

/// The counters of one export since its server started. They count a request when its reply is made.
#[derive(Debug, Default)]
pub struct Statistics {
    connections: AtomicU64,
    connections_total: AtomicU64,
    answered: [AtomicU64; Operation::ALL.len()],
    bytes_read: AtomicU64,
    bytes_written: AtomicU64,
    pauses: AtomicU64,
    latency: Latency,
    failures: Mutex<Failures>,
}

#[derive(Debug, Default)]
struct Failures {
    counts: BTreeMap<(Operation, &'static str, Blame), u64>,
    last_of_disk: Option<Instant>,
}

/// The counters at one moment.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Snapshot {
    /// Clients in transmission now.
    pub connections: u64,
    /// Clients that ever were in transmission.
    pub connections_total: u64,
    /// Requests answered.
    pub requests: u64,
    /// Bytes that were read from the volume for clients.
    pub bytes_read: u64,
    /// Bytes that were received from clients and written to the volume.
    pub bytes_written: u64,
    /// Requests answered with an error, whether the client or the disk was at fault.
    pub errors: u64,
}

impl Statistics {
    /// Returns the counters as they are now.
    pub fn snapshot(&self) -> Snapshot {
        Snapshot {
            connections: self.connections.load(Relaxed),
            connections_total: self.connections_total.load(Relaxed),
            requests: self.answered().map(|(_, count)| count).sum(),
            bytes_read: self.bytes_read.load(Relaxed),
            bytes_written: self.bytes_written.load(Relaxed),
            errors: self.failures().counts.values().sum(),
        }
    }

    /// Returns how many requests of each kind were answered.
    pub fn answered(&self) -> impl Iterator<Item = (Operation, u64)> {
        Operation::ALL.into_iter().zip(self.answered.iter().map(|count| count.load(Relaxed)))
    }

    /// Returns how often requests failed, for each kind of failure that there was.
    pub fn failed(&self) -> Vec<Failed> {
        let failures = self.failures();
        failures
            .counts
            .iter()
            .map(|(&(operation, error, blame), &count)| Failed { operation, error, blame, count })
            .collect()
    }

    /// Returns when a request last failed because of the disk.
    pub fn last_failure_of_disk(&self) -> Option<Instant> {
        self.failures().last_of_disk
    }

    /// Returns how long the requests took.
    pub fn latency(&self) -> &Latency {
        &self.latency
    }

    /// Returns how often a session let requests gather while its client read replies.
    pub fn pauses(&self) -> u64 {
        self.pauses.load(Relaxed)
    }

    pub(crate) fn paused(&self) {
        self.pauses.fetch_add(1, Relaxed);
    }

    /// Counts a client until the guard is dropped.
    pub(crate) fn connected(&self) -> Connected<'_> {
        self.connections.fetch_add(1, Relaxed);
        self.connections_total.fetch_add(1, Relaxed);
        Connected(self)
    }

    /// Counts a request that was carried out. `len` is the number of bytes that were read or written.
    pub fn succeeded(&self, operation: Operation, len: u64) {
        self.count(operation);
        match operation {
            Operation::Read => self.bytes_read.fetch_add(len, Relaxed),
            Operation::Write => self.bytes_written.fetch_add(len, Relaxed),
            _ => return,
        };
    }

    /// Counts a request that was answered with an error at the time `now`. The client got `error`, such as `EIO`.
    pub fn has_failed(&self, operation: Operation, error: &'static str, blame: Blame, now: Instant) {
        self.count(operation);
        let mut failures = self.failures();
        *failures.counts.entry((operation, error, blame)).or_default() += 1;
        if blame == Blame::Disk {
            failures.last_of_disk = Some(now);
        }
    }

    fn count(&self, operation: Operation) {
        self.answered[operation as usize].fetch_add(1, Relaxed);
    }

    fn failures(&self) -> MutexGuard<'_, Failures> {
        self.failures.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Counts a client in transmission. Dropping it ends the count.
pub(crate) struct Connected<'a>(&'a Statistics);

impl Drop for Connected<'_> {
    fn drop(&mut self) {
        self.0.connections.fetch_sub(1, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_and_failures_are_counted_by_kind() {
        let statistics = Statistics::default();
        assert!(Operation::ALL.iter().enumerate().all(|(number, operation)| *operation as usize == number));
        statistics.succeeded(Operation::Read, 512);
        statistics.succeeded(Operation::Write, 4096);
        statistics.succeeded(Operation::WriteZeroes, 1 << 30);
        let now = Instant::now();
        statistics.has_failed(Operation::Write, "EPERM", Blame::Client, now);
        assert_eq!(statistics.last_failure_of_disk(), None);
        for _ in 0..3 {
            statistics.has_failed(Operation::Flush, "EIO", Blame::Disk, now);
        }
        assert_eq!(statistics.last_failure_of_disk(), Some(now));
        let failed = |operation, error, blame, count| Failed { operation, error, blame, count };
        let expected =
            [failed(Operation::Write, "EPERM", Blame::Client, 1), failed(Operation::Flush, "EIO", Blame::Disk, 3)];
        assert_eq!(statistics.failed(), expected);
        let answered: Vec<_> = statistics.answered().filter(|(_, count)| *count > 0).collect();
        let (read, write, flush) = ((Operation::Read, 1), (Operation::Write, 2), (Operation::Flush, 3));
        assert_eq!(answered, [read, write, flush, (Operation::WriteZeroes, 1)]);
        let snapshot = statistics.snapshot();
        assert_eq!((snapshot.requests, snapshot.errors), (7, 4));
        assert_eq!((snapshot.bytes_read, snapshot.bytes_written), (512, 4096));
    }
}
