//! Counters of the clients and requests of an export.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// The counters of one export since its server started. They count a request when its reply is made.
#[derive(Debug, Default)]
pub struct Statistics {
    connections: AtomicU64,
    connections_total: AtomicU64,
    requests: AtomicU64,
    bytes_read: AtomicU64,
    bytes_written: AtomicU64,
    errors: AtomicU64,
    pauses: AtomicU64,
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
            requests: self.requests.load(Relaxed),
            bytes_read: self.bytes_read.load(Relaxed),
            bytes_written: self.bytes_written.load(Relaxed),
            errors: self.errors.load(Relaxed),
        }
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

    pub(crate) fn answered(&self) {
        self.requests.fetch_add(1, Relaxed);
    }

    pub(crate) fn read(&self, bytes: u64) {
        self.bytes_read.fetch_add(bytes, Relaxed);
    }

    pub(crate) fn written(&self, bytes: u64) {
        self.bytes_written.fetch_add(bytes, Relaxed);
    }

    /// Counts a request that was answered with an error.
    pub(crate) fn failed(&self) {
        self.errors.fetch_add(1, Relaxed);
    }
}

/// Counts a client in transmission. Dropping it ends the count.
pub(crate) struct Connected<'a>(&'a Statistics);

impl Drop for Connected<'_> {
    fn drop(&mut self) {
        self.0.connections.fetch_sub(1, Relaxed);
    }
}
