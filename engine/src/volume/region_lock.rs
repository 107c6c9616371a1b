//! Keeps a read-modify-write of a block apart from every other write to that block.

use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

/// Bytes of the volume that share one lock.
const REGION: u64 = 1 << 20;
/// Locks there are; regions are dealt out to them in turn.
const LOCKS: u64 = 64;

/// Writers of whole blocks share a region, since the disk keeps their blocks apart; a read-modify-write has it alone.
pub(super) struct RegionLock {
    locks: Vec<RwLock<()>>,
}

impl RegionLock {
    pub(super) fn new() -> Self {
        Self { locks: (0..LOCKS).map(|_| RwLock::new(())).collect() }
    }

    /// Keeps every read-modify-write out of the bytes from `start` up to `end` while the guards live.
    pub(super) fn share(&self, start: u64, end: u64) -> Vec<RwLockReadGuard<'_, ()>> {
        let (first, last) = (start / REGION, end.saturating_sub(1) / REGION);
        // In the order of the locks, not of the regions, so that two long writes never wait for each other in a circle.
        let wanted = |lock: u64| (lock + LOCKS - first % LOCKS) % LOCKS <= last - first;
        (0..LOCKS)
            .filter(|lock| wanted(*lock))
            .zip(std::iter::repeat(&self.locks))
            .map(|(lock, locks)| {
                locks[usize::try_from(lock).unwrap_or(0)].read().unwrap_or_else(PoisonError::into_inner)
            })
            .collect()
    }

    /// Keeps every other write out of the region of the byte at `offset` while the guard lives.
    pub(super) fn exclude(&self, offset: u64) -> RwLockWriteGuard<'_, ()> {
        let lock = usize::try_from(offset / REGION % LOCKS).unwrap_or(0);
        self.locks[lock].write().unwrap_or_else(PoisonError::into_inner)
    }
}
