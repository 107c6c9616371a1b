//! Payload buffers, used again.

use std::ops::Range;

use engine::buffer::AlignedBuffer;

use super::uring::Registration;

/// The smallest buffer there is, in bytes: a page.
const SMALLEST: usize = 4096;
/// Sizes there are, each twice the one before: 4 KiB to 32 MiB.
const CLASSES: usize = 14;
/// Bytes that an idle connection keeps.
const KEPT_IDLE: usize = 1 << 20;

/// A payload and the memory it lies in.
pub(crate) struct Buffer {
    pub(crate) bytes: AlignedBuffer,
    class: usize,
    /// It is in use again, so that it will be once more.
    pub(super) is_reused: bool,
    /// Where its ring has it registered.
    pub(super) registration: Option<Registration>,
}

impl Buffer {
    /// The memory it takes, in bytes.
    pub(crate) fn capacity(len: usize) -> usize {
        SMALLEST << class_of(len)
    }

    /// The addresses of its memory, the whole of it, whatever the payload's length.
    pub(super) fn memory(&self) -> Range<usize> {
        let start = self.bytes.as_ptr().addr();
        start..start + (SMALLEST << self.class)
    }
}

/// The buffers of one connection that are not in use. How many are in use is bounded by the connection's budget; what is
/// kept here fits into what is left of it.
pub(super) struct Buffers {
    free: [Vec<Buffer>; CLASSES],
    kept: usize,
    in_use: usize,
    limit: usize,
}

impl Buffers {
    /// Keeps as much as is missing to `limit` bytes in use.
    pub(super) fn new(limit: usize) -> Self {
        Self { free: std::array::from_fn(|_| Vec::new()), kept: 0, in_use: 0, limit }
    }

    /// A buffer of `len` bytes, whatever they are.
    pub(super) fn take(&mut self, len: usize) -> Buffer {
        let class = class_of(len);
        let size = SMALLEST << class;
        self.in_use += size;
        let mut buffer = match self.free[class].pop() {
            Some(buffer) => {
                self.kept -= size;
                Buffer { is_reused: true, ..buffer }
            }
            None => {
                self.keep(self.limit.saturating_sub(self.in_use));
                Buffer { bytes: AlignedBuffer::zeroed(size), class, is_reused: false, registration: None }
            }
        };
        buffer.bytes.resize(len);
        buffer
    }

    /// Takes a buffer back.
    pub(super) fn give_back(&mut self, buffer: Buffer) {
        let size = SMALLEST << buffer.class;
        self.in_use -= size;
        if self.in_use + self.kept + size <= self.limit {
            self.kept += size;
            self.free[buffer.class].push(buffer);
        }
    }

    /// Whether an idle connection holds more than it should.
    pub(super) fn is_large(&self) -> bool {
        self.kept > KEPT_IDLE
    }

    /// Lets go of the larger buffers until little is left.
    pub(super) fn shrink(&mut self) {
        self.keep(KEPT_IDLE);
    }

    /// Lets go of buffers, largest first, until no more than so many bytes are left.
    fn keep(&mut self, limit: usize) {
        for class in (0..CLASSES).rev() {
            while self.kept > limit && self.free[class].pop().is_some() {
                self.kept -= SMALLEST << class;
            }
        }
    }
}

fn class_of(len: usize) -> usize {
    let pages = len.div_ceil(SMALLEST).next_power_of_two();
    (pages.trailing_zeros() as usize).min(CLASSES - 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::MAX_PAYLOAD;

    #[test]
    fn a_buffer_has_the_length_asked_for_and_its_memory_is_used_again() {
        let mut buffers = Buffers::new(1 << 20);
        for len in [0, 1, 4096, 4097, 65536, 1 << 20] {
            let buffer = buffers.take(len);
            assert_eq!(buffer.bytes.len(), len);
            let place = buffer.bytes.as_ptr();
            buffers.give_back(buffer);
            let again = buffers.take(len);
            assert_eq!(again.bytes.as_ptr(), place, "{len}");
        }
    }

    #[test]
    fn the_largest_payload_has_a_class() {
        let len = MAX_PAYLOAD as usize;
        assert_eq!(Buffer::capacity(len), len);
        assert_eq!(Buffer::capacity(1), SMALLEST);
        assert_eq!(Buffer::capacity(SMALLEST + 1), 2 * SMALLEST);
    }

    #[test]
    fn no_more_is_kept_than_the_limit_and_little_when_idle() {
        let mut buffers = Buffers::new(4 << 20);
        let taken: Vec<_> = (0..64).map(|_| buffers.take(1 << 20)).collect();
        taken.into_iter().for_each(|buffer| buffers.give_back(buffer));
        assert_eq!(buffers.kept, 4 << 20);
        buffers.shrink();
        assert!(!buffers.is_large());
    }

    #[test]
    fn as_long_as_the_sizes_stay_the_same_nothing_is_allocated_anew_at_the_limit() {
        let mut buffers = Buffers::new(4 << 20);
        let mut taken: Vec<_> = (0..4).map(|_| buffers.take(1 << 20)).collect();
        for _ in 0..8 {
            buffers.give_back(taken.remove(0));
            assert_eq!(buffers.kept, 1 << 20);
            taken.push(buffers.take(1 << 20));
            assert_eq!(buffers.kept, 0);
        }
    }

    #[test]
    fn what_is_in_use_and_what_is_kept_fit_into_the_limit_whatever_the_sizes() {
        let mut buffers = Buffers::new(4 << 20);
        for len in [4096, 1 << 20, 64 << 10, 4 << 20, 8192, 2 << 20] {
            let count = (4 << 20) / len;
            for _ in 0..2 {
                let mut taken = Vec::new();
                for number in 1..=count {
                    taken.push(buffers.take(len));
                    assert_eq!(buffers.in_use, number * len);
                    assert!(buffers.in_use + buffers.kept <= 4 << 20, "{number} of {len}");
                }
                taken.into_iter().for_each(|buffer| buffers.give_back(buffer));
                assert_eq!((buffers.in_use, buffers.kept), (0, 4 << 20));
            }
        }
    }
}
