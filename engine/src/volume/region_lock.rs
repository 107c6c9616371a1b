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

/// Regions in which nobody reads, modifies and writes.
pub(super) struct Shared<'a> {
    _one: Option<RwLockReadGuard<'a, ()>>,
    _more: Vec<RwLockReadGuard<'a, ()>>,
}

impl RegionLock {
    pub(super) fn new() -> Self {
        Self { locks: (0..LOCKS).map(|_| RwLock::new(())).collect() }
    }

    /// Keeps every read-modify-write out of the bytes from `start` up to `end` while the guards live.
    pub(super) fn share(&self, start: u64, end: u64) -> Shared<'_> {
        let (first, last) = (start / REGION, end.saturating_sub(1).max(start) / REGION);
        if first == last {
            // Most writes lie in one region, and for those nothing need be allocated.
            return Shared { _one: Some(self.read(first % LOCKS)), _more: Vec::new() };
        }
        // In the order of the locks, not of the regions, so that two long writes never wait for each other in a circle.
        let wanted = |lock: u64| (lock + LOCKS - first % LOCKS) % LOCKS <= last - first;
        Shared { _one: None, _more: (0..LOCKS).filter(|lock| wanted(*lock)).map(|lock| self.read(lock)).collect() }
    }

    fn read(&self, lock: u64) -> RwLockReadGuard<'_, ()> {
        self.locks[usize::try_from(lock).unwrap_or(0)].read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps every other write out of the region of the byte at `offset` while the guard lives.
    pub(super) fn exclude(&self, offset: u64) -> RwLockWriteGuard<'_, ()> {
        let lock = usize::try_from(offset / REGION % LOCKS).unwrap_or(0);
        self.locks[lock].write().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shared_range_keeps_out_whoever_wants_a_byte_of_it_alone_and_nobody_else() {
        let locks = RegionLock::new();
        let free = |offset: u64| locks.locks[usize::try_from(offset / REGION % LOCKS).unwrap()].try_write().is_ok();
        for (start, end, inside, outside) in [
            (0, 1, vec![0, REGION - 1], vec![REGION, 63 * REGION]),
            (REGION - 1, REGION + 1, vec![0, REGION], vec![2 * REGION]),
            (63 * REGION, 65 * REGION, vec![63 * REGION, 64 * REGION, 0], vec![REGION, 62 * REGION]),
            (5, 5, vec![], vec![REGION]),
            (0, 64 * REGION, (0..64).map(|region| region * REGION).collect(), vec![]),
            (3 * REGION, 1000 * REGION, (0..64).map(|region| region * REGION).collect(), vec![]),
        ] {
            let held = locks.share(start, end);
            assert!(inside.into_iter().all(|offset| !free(offset)), "{start} to {end}");
            assert!(outside.into_iter().all(free), "{start} to {end}");
            drop(held);
            assert!((0..64).all(|region| free(region * REGION)));
        }
    }
}
