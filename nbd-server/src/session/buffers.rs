//! Payload buffers and the pool that keeps them for reuse.

use std::io;
use std::ops::Range;
use std::sync::OnceLock;

use engine::buffer::AlignedBuffer;

use super::uring::Registration;

/// The size of the smallest buffers in bytes, which is a page.
const SMALLEST: usize = 4096;
/// The number of sizes. Each size is twice the previous size: 4 KiB to 32 MiB.
const CLASSES: usize = 14;
/// The maximum number of bytes that an idle connection keeps.
const KEPT_IDLE: usize = 1 << 20;

/// The memory of a payload.
pub(crate) struct Buffer {
    pub(crate) bytes: AlignedBuffer,
    class: usize,
    /// Set when the pool hands out this buffer a second time. The buffer is then likely to be used again, so
    /// registering it pays.
    pub(super) is_reused: bool,
    /// The buffer's registration with its ring, if it has one.
    pub(super) registration: OnceLock<Registration>,
}

impl Buffer {
    /// Returns how many bytes of memory a payload of `len` bytes takes.
    pub(crate) fn capacity(len: usize) -> usize {
        SMALLEST << class_of(len)
    }

    /// Returns the addresses of all of the buffer's memory, whatever the payload's length.
    pub(super) fn memory(&self) -> Range<usize> {
        let start = self.bytes.as_ptr().addr();
        start..start + (SMALLEST << self.class)
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl AsMut<[u8]> for Buffer {
    fn as_mut(&mut self) -> &mut [u8] {
        &mut self.bytes
    }
}

/// The pool of one connection. It keeps buffers that are not in use. The connection's budget limits the buffers in use.
/// The pool keeps no more buffers than the rest of that budget allows.
pub(super) struct Buffers {
    free: [Vec<Buffer>; CLASSES],
    kept: usize,
    in_use: usize,
    limit: usize,
}

impl Buffers {
    /// Makes a pool. Buffers in use and kept buffers together take at most `limit` bytes.
    pub(super) fn new(limit: usize) -> Self {
        Self { free: std::array::from_fn(|_| Vec::new()), kept: 0, in_use: 0, limit }
    }

    /// Returns a buffer of `len` bytes with arbitrary contents.
    ///
    /// # Errors
    /// `OutOfMemory` if there is no memory for a new buffer. The error names the limits.
    pub(super) fn take(&mut self, len: usize) -> io::Result<Buffer> {
        let class = class_of(len);
        let size = SMALLEST << class;
        let mut buffer = match self.free[class].pop() {
            Some(buffer) => {
                self.kept -= size;
                Buffer { is_reused: true, ..buffer }
            }
            None => {
                self.keep(self.limit.saturating_sub(self.in_use + size));
                let bytes = AlignedBuffer::try_mapped(size)?;
                Buffer { bytes, class, is_reused: false, registration: OnceLock::new() }
            }
        };
        self.in_use += size;
        buffer.bytes.resize(len);
        Ok(buffer)
    }

    /// Takes a buffer back. Keeps it if the limit allows, and frees it otherwise.
    pub(super) fn give_back(&mut self, buffer: Buffer) {
        let size = SMALLEST << buffer.class;
        self.in_use -= size;
        if self.in_use + self.kept + size <= self.limit {
            self.kept += size;
            self.free[buffer.class].push(buffer);
        }
    }

    /// Returns whether the pool keeps more than an idle connection should.
    pub(super) fn is_large(&self) -> bool {
        self.kept > KEPT_IDLE
    }

    /// Frees buffers until the pool keeps only what an idle connection should.
    pub(super) fn shrink(&mut self) {
        self.keep(KEPT_IDLE);
    }

    /// Frees buffers, the largest first, until at most `limit` bytes are kept.
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
    fn a_buffer_has_its_length_and_its_memory_is_reused() {
        let mut buffers = Buffers::new(1 << 20);
        for len in [0, 1, 4096, 4097, 65536, 1 << 20] {
            let buffer = buffers.take(len).unwrap();
            assert_eq!(buffer.bytes.len(), len);
            let address = buffer.bytes.as_ptr();
            buffers.give_back(buffer);
            let again = buffers.take(len).unwrap();
            assert_eq!(again.bytes.as_ptr(), address, "{len}");
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
    fn the_pool_keeps_its_limit_and_little_when_idle() {
        let mut buffers = Buffers::new(4 << 20);
        let taken: Vec<_> = (0..64).map(|_| buffers.take(1 << 20).unwrap()).collect();
        taken.into_iter().for_each(|buffer| buffers.give_back(buffer));
        assert_eq!(buffers.kept, 4 << 20);
        buffers.shrink();
        assert!(!buffers.is_large());
    }

    #[test]
    fn at_the_limit_a_buffer_is_reused() {
        let mut buffers = Buffers::new(4 << 20);
        let mut taken: Vec<_> = (0..4).map(|_| buffers.take(1 << 20).unwrap()).collect();
        for _ in 0..8 {
            buffers.give_back(taken.remove(0));
            assert_eq!(buffers.kept, 1 << 20);
            taken.push(buffers.take(1 << 20).unwrap());
            assert_eq!(buffers.kept, 0);
        }
    }

    #[test]
    fn used_and_kept_buffers_stay_within_the_limit() {
        let mut buffers = Buffers::new(4 << 20);
        for len in [4096, 1 << 20, 64 << 10, 4 << 20, 8192, 2 << 20] {
            let count = (4 << 20) / len;
            for _ in 0..2 {
                let mut taken = Vec::new();
                for number in 1..=count {
                    taken.push(buffers.take(len).unwrap());
                    assert_eq!(buffers.in_use, number * len);
                    assert!(buffers.in_use + buffers.kept <= 4 << 20, "{number} of {len}");
                }
                taken.into_iter().for_each(|buffer| buffers.give_back(buffer));
                assert_eq!((buffers.in_use, buffers.kept), (0, 4 << 20));
            }
        }
    }
}
