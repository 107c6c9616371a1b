//! Payload buffers, used again.

use engine::buffer::AlignedBuffer;

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
}

impl Buffer {
    /// The memory it takes, in bytes.
    pub(crate) fn capacity(len: usize) -> usize {
        SMALLEST << class_of(len)
    }
}

/// The buffers of one connection that are not in use. How many are in use is bounded by the connection's budget; those
/// here and those in use together take at most twice that.
pub(super) struct Buffers {
    free: [Vec<AlignedBuffer>; CLASSES],
    kept: usize,
    limit: usize,
}

impl Buffers {
    /// Keeps up to `limit` bytes.
    pub(super) fn new(limit: usize) -> Self {
        Self { free: std::array::from_fn(|_| Vec::new()), kept: 0, limit }
    }

    /// A buffer of `len` bytes, whatever they are.
    pub(super) fn take(&mut self, len: usize) -> Buffer {
        let class = class_of(len);
        let mut bytes = match self.free[class].pop() {
            Some(bytes) => {
                self.kept -= SMALLEST << class;
                bytes
            }
            None => AlignedBuffer::zeroed(SMALLEST << class),
        };
        bytes.resize(len);
        Buffer { bytes, class }
    }

    /// Takes a buffer back.
    pub(super) fn give_back(&mut self, buffer: Buffer) {
        let size = SMALLEST << buffer.class;
        if self.kept + size <= self.limit {
            self.kept += size;
            self.free[buffer.class].push(buffer.bytes);
        }
    }

    /// Whether an idle connection holds more than it should.
    pub(super) fn is_large(&self) -> bool {
        self.kept > KEPT_IDLE
    }

    /// Lets go of the larger buffers, largest first, until little is left.
    pub(super) fn shrink(&mut self) {
        for class in (0..CLASSES).rev() {
            while self.is_large() && self.free[class].pop().is_some() {
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
}
