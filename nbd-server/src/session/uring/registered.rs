//! The table of buffers that are registered with the kernel. The kernel looks up and pins the memory of these buffers
//! only once, and not for each operation of direct I/O.
//!
//! A buffer carries its registration with it. When the buffer is dropped, its slot in the table can be used again: the
//! ring clears the slot at its next wait. Until then the kernel holds the pages, but nothing reads or writes them any
//! more.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

/// Slots of a ring's table. A connection has fewer buffers of 64 KiB than this.
pub(super) const SLOTS: u16 = 1024;

/// A buffer's slot in a ring's table. Dropping it marks the slot for clearing.
#[derive(Debug)]
pub(crate) struct Registration {
    slot: u16,
    left: Left,
}

/// Slots whose buffers were dropped, but which are not cleared yet.
type Left = Arc<Mutex<Vec<u16>>>;

impl Registration {
    pub(super) fn slot(&self) -> u16 {
        self.slot
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.left.lock().unwrap_or_else(PoisonError::into_inner).push(self.slot);
    }
}

/// The buffers that are registered with a ring.
pub(super) struct Table {
    /// The addresses of the memory in each slot.
    memory: Vec<Range<usize>>,
    free: Vec<u16>,
    left: Left,
    /// Set when the kernel refuses more memory, since too much would be locked (`RLIMIT_MEMLOCK`).
    is_full: bool,
}

impl Table {
    /// Returns an empty table with [`SLOTS`] slots.
    pub(super) fn new() -> Self {
        Self {
            memory: vec![0..0; SLOTS.into()],
            free: (0..SLOTS).rev().collect(),
            left: Left::default(),
            is_full: false,
        }
    }

    /// Returns whether the memory in the slot starts at the same address as `memory` and is at least as long.
    pub(super) fn holds(&self, slot: u16, memory: &Range<usize>) -> bool {
        self.memory[usize::from(slot)].start == memory.start && self.memory[usize::from(slot)].end >= memory.end
    }

    /// Registers memory with `fill` and returns its slot. Returns `None` if no slot is free or the kernel refuses.
    pub(super) fn add(
        &mut self,
        memory: Range<usize>,
        fill: impl FnOnce(u16) -> std::io::Result<()>,
    ) -> Option<Registration> {
        if self.is_full {
            return None;
        }
        let slot = self.free.pop()?;
        if fill(slot).is_err() {
            self.free.push(slot);
            self.is_full = true;
            return None;
        }
        self.memory[usize::from(slot)] = memory;
        Some(Registration { slot, left: Arc::clone(&self.left) })
    }

    /// Clears the slots of dropped buffers with `clear`. A slot that the kernel does not clear is never used again.
    pub(super) fn tidy(&mut self, mut clear: impl FnMut(u16) -> std::io::Result<()>) {
        let mut left = self.left.lock().unwrap_or_else(PoisonError::into_inner);
        for slot in left.drain(..) {
            self.memory[usize::from(slot)] = 0..0;
            if clear(slot).is_ok() {
                self.free.push(slot);
                self.is_full = false;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[test]
    fn a_slot_is_taken_until_the_table_is_tidied() {
        let mut table = Table::new();
        let mut taken: Vec<_> = (0..SLOTS).map(|_| table.add(4096..8192, |_| Ok(())).unwrap()).collect();
        assert!(table.add(4096..8192, |_| panic!("there is no slot")).is_none());
        let slot = taken.pop().unwrap().slot();
        assert!(table.add(4096..8192, |_| panic!("the slot is not cleared yet")).is_none());
        let mut cleared = Vec::new();
        table.tidy(|slot| {
            cleared.push(slot);
            Ok(())
        });
        assert_eq!(cleared, [slot]);
        assert!(!table.holds(slot, &(4096..8192)));
        let again = table.add(0..4096, |_| Ok(())).unwrap();
        assert!(again.slot() == slot && table.holds(slot, &(0..4096)) && table.holds(slot, &(0..512)));
        assert!(!table.holds(slot, &(0..8192)) && !table.holds(slot, &(512..4096)));
    }

    #[test]
    fn a_refused_buffer_is_tried_again_later() {
        let mut table = Table::new();
        let first = table.add(0..4096, |_| Ok(())).unwrap();
        assert!(table.add(0..4096, |_| Err(io::ErrorKind::OutOfMemory.into())).is_none());
        assert!(table.add(0..4096, |_| panic!("it was asked again")).is_none());
        drop(first);
        table.tidy(|_| Ok(()));
        assert!(table.add(0..4096, |_| Ok(())).is_some());
    }
}
