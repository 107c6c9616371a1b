//! Ensures that no other write to a block takes place during a read-modify-write of the block.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// Bytes of the volume that share one lock.
const REGION: u64 = 1 << 20;
/// The number of locks: one for each bit of a word. Consecutive regions use the locks in turn.
const LOCKS: u64 = u64::BITS as u64;

/// Locks on the regions of a volume. Writers of whole blocks share a region, because they do not disturb each other. A
/// read-modify-write has a region to itself. A guard owns its share. So it can move, together with a write in flight,
/// to the thread that completes the write.
pub(super) struct RegionLock {
    locks: Vec<Lock>,
}

#[derive(Default)]
struct Lock {
    holders: Mutex<Holders>,
    left: Condvar,
}

#[derive(Default)]
struct Holders {
    sharing: u32,
    exclusive: bool,
    /// The number of threads that wait for exclusive use. While it is not zero, no new sharer is admitted; otherwise the wait
    /// might never end.
    waiting: u32,
}

impl Holders {
    fn admits(&self) -> bool {
        !self.exclusive && self.waiting == 0
    }
}

/// Regions that no read-modify-write may enter.
pub(super) struct Shared {
    regions: Arc<RegionLock>,
    /// One bit for each lock.
    held: u64,
}

/// A region that no one else may write to.
pub(super) struct Exclusive {
    regions: Arc<RegionLock>,
    lock: u64,
}

impl RegionLock {
    pub(super) fn new() -> Self {
        Self { locks: (0..LOCKS).map(|_| Lock::default()).collect() }
    }

    /// Keeps every read-modify-write out of the bytes from `start` up to `end` while the guard lives. Waits if necessary.
    pub(super) fn share(self: &Arc<Self>, start: u64, end: u64) -> Shared {
        let wanted = wanted(start, end);
        // The locks are taken in ascending order of their numbers, not in the order of the regions. So two long writes
        // never deadlock.
        for lock in bits(wanted) {
            let lock = self.lock(lock);
            let mut holders = lock.holders();
            while !holders.admits() {
                holders = lock.left.wait(holders).unwrap_or_else(PoisonError::into_inner);
            }
            holders.sharing += 1;
        }
        Shared { regions: Arc::clone(self), held: wanted }
    }

    /// Does what [`RegionLock::share`] does, but returns `None` instead of waiting.
    pub(super) fn try_share(self: &Arc<Self>, start: u64, end: u64) -> Option<Shared> {
        let mut shared = Shared { regions: Arc::clone(self), held: 0 };
        for number in bits(wanted(start, end)) {
            let mut holders = self.lock(number).holders();
            if !holders.admits() {
                return None;
            }
            holders.sharing += 1;
            drop(holders);
            shared.held |= 1 << number;
        }
        Some(shared)
    }

    /// Keeps every other write out of the region of the byte at `offset` while the guard lives. Waits if necessary.
    pub(super) fn exclude(self: &Arc<Self>, offset: u64) -> Exclusive {
        let number = offset / REGION % LOCKS;
        let lock = self.lock(number);
        let mut holders = lock.holders();
        holders.waiting += 1;
        while holders.exclusive || holders.sharing > 0 {
            holders = lock.left.wait(holders).unwrap_or_else(PoisonError::into_inner);
        }
        holders.waiting -= 1;
        holders.exclusive = true;
        Exclusive { regions: Arc::clone(self), lock: number }
    }

    fn lock(&self, number: u64) -> &Lock {
        &self.locks[usize::try_from(number).unwrap_or(0)]
    }
}

impl Lock {
    fn holders(&self) -> MutexGuard<'_, Holders> {
        self.holders.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        for number in bits(self.held) {
            let lock = self.regions.lock(number);
            let mut holders = lock.holders();
            holders.sharing -= 1;
            let waited_for = holders.sharing == 0 && holders.waiting > 0;
            drop(holders);
            if waited_for {
                lock.left.notify_all();
            }
        }
    }
}

impl Drop for Exclusive {
    fn drop(&mut self) {
        let lock = self.regions.lock(self.lock);
        lock.holders().exclusive = false;
        lock.left.notify_all();
    }
}

/// Returns the locks of the bytes from `start` up to `end`, one bit for each.
fn wanted(start: u64, end: u64) -> u64 {
    let (first, last) = (start / REGION, end.saturating_sub(1).max(start) / REGION);
    match last - first {
        0 => 1 << (first % LOCKS),
        more if more >= LOCKS - 1 => u64::MAX,
        more => ((1 << (more + 1)) - 1u64).rotate_left(u32::try_from(first % LOCKS).unwrap_or(0)),
    }
}

/// Returns the positions of the bits that are set, the lowest first.
fn bits(mut word: u64) -> impl Iterator<Item = u64> {
    std::iter::from_fn(move || {
        let place = (word != 0).then(|| u64::from(word.trailing_zeros()))?;
        word &= word - 1;
        Some(place)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shared_range_blocks_exclusive_use_of_its_bytes_only() {
        let locks = Arc::new(RegionLock::new());
        let free = |offset: u64| {
            let holders = locks.lock(offset / REGION % LOCKS).holders();
            !holders.exclusive && holders.sharing == 0
        };
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

    #[test]
    fn exclusive_use_waits_for_sharers_and_is_not_overtaken() {
        let locks = Arc::new(RegionLock::new());
        let shared = locks.share(0, 10);
        let alone = {
            let locks = Arc::clone(&locks);
            std::thread::spawn(move || drop(locks.exclude(5)))
        };
        while locks.lock(0).holders().waiting == 0 {
            std::thread::yield_now();
        }
        assert!(locks.try_share(0, 1).is_none(), "a sharer must not overtake a waiting exclusive user");
        assert!(locks.try_share(REGION, REGION + 1).is_some(), "other regions are free");
        drop(shared);
        alone.join().unwrap();
        assert!(locks.try_share(0, 2 * REGION).is_some());
    }

    #[test]
    fn a_share_that_fails_holds_nothing() {
        let locks = Arc::new(RegionLock::new());
        let held = locks.exclude(3 * REGION);
        assert!(locks.try_share(0, 10 * REGION).is_none());
        assert!(locks.locks.iter().all(|lock| lock.holders().sharing == 0));
        drop(held);
        assert!(locks.try_share(0, 10 * REGION).is_some());
    }
}
