//! Which buffers the kernel has looked up and pinned once for all, so that direct I/O need not do so with each operation.
//!
//! A buffer carries its registration wherever it goes, and wherever it ends its place in the table is free again: the ring
//! empties it when it next waits. Until then the kernel holds the pages, which nothing reads or fills any more.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

/// Places in a ring's table: more than a connection's buffers of 64 KiB.
pub(super) const PLACES: u16 = 1024;

/// A buffer's place in a ring's table.
#[derive(Debug)]
pub(crate) struct Registration {
    place: u16,
    left: Left,
}

/// Places whose buffers have ended.
type Left = Arc<Mutex<Vec<u16>>>;

impl Registration {
    pub(super) fn place(&self) -> u16 {
        self.place
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.left.lock().unwrap_or_else(PoisonError::into_inner).push(self.place);
    }
}

/// What is registered with a ring.
pub(super) struct Table {
    /// The addresses of the memory in each place.
    memory: Vec<Range<usize>>,
    free: Vec<u16>,
    left: Left,
    /// The kernel took no more: too much memory would be locked (`RLIMIT_MEMLOCK`).
    is_full: bool,
}

impl Table {
    /// An empty table of [`PLACES`].
    pub(super) fn new() -> Self {
        Self {
            memory: vec![0..0; PLACES.into()],
            free: (0..PLACES).rev().collect(),
            left: Left::default(),
            is_full: false,
        }
    }

    /// Whether it is exactly the memory in `place` that starts at the address, as far as that many bytes.
    pub(super) fn holds(&self, place: u16, memory: &Range<usize>) -> bool {
        self.memory[usize::from(place)].start == memory.start && self.memory[usize::from(place)].end >= memory.end
    }

    /// Registers memory, where there is a place, by `fill`.
    pub(super) fn add(
        &mut self,
        memory: Range<usize>,
        fill: impl FnOnce(u16) -> std::io::Result<()>,
    ) -> Option<Registration> {
        if self.is_full {
            return None;
        }
        let place = self.free.pop()?;
        if fill(place).is_err() {
            self.free.push(place);
            self.is_full = true;
            return None;
        }
        self.memory[usize::from(place)] = memory;
        Some(Registration { place, left: Arc::clone(&self.left) })
    }

    /// Empties by `clear` the places whose buffers have ended. One that the kernel will not empty is not used again.
    pub(super) fn tidy(&mut self, mut clear: impl FnMut(u16) -> std::io::Result<()>) {
        let mut left = self.left.lock().unwrap_or_else(PoisonError::into_inner);
        for place in left.drain(..) {
            self.memory[usize::from(place)] = 0..0;
            if clear(place).is_ok() {
                self.free.push(place);
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
    fn a_place_is_taken_until_its_registration_ends_and_the_table_is_tidied() {
        let mut table = Table::new();
        let mut taken: Vec<_> = (0..PLACES).map(|_| table.add(4096..8192, |_| Ok(())).unwrap()).collect();
        assert!(table.add(4096..8192, |_| panic!("there is no place")).is_none());
        let place = taken.pop().unwrap().place();
        assert!(table.add(4096..8192, |_| panic!("it is not empty")).is_none());
        let mut cleared = Vec::new();
        table.tidy(|place| {
            cleared.push(place);
            Ok(())
        });
        assert_eq!(cleared, [place]);
        assert!(!table.holds(place, &(4096..8192)));
        let again = table.add(0..4096, |_| Ok(())).unwrap();
        assert!(again.place() == place && table.holds(place, &(0..4096)) && table.holds(place, &(0..512)));
        assert!(!table.holds(place, &(0..8192)) && !table.holds(place, &(512..4096)));
    }

    #[test]
    fn a_kernel_that_takes_no_more_is_asked_again_when_something_has_ended() {
        let mut table = Table::new();
        let first = table.add(0..4096, |_| Ok(())).unwrap();
        assert!(table.add(0..4096, |_| Err(io::ErrorKind::OutOfMemory.into())).is_none());
        assert!(table.add(0..4096, |_| panic!("it was asked again")).is_none());
        drop(first);
        table.tidy(|_| Ok(()));
        assert!(table.add(0..4096, |_| Ok(())).is_some());
    }
}
