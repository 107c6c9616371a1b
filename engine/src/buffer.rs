//! Memory that `O_DIRECT` takes: page-aligned, allocated once and reused.

use memmap2::MmapMut;
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

/// The alignment, in bytes, that every disk and filesystem accepts for direct I/O.
pub const DIRECT_ALIGNMENT: usize = 4096;

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, align(4096))]
struct Page([u8; DIRECT_ALIGNMENT]);

/// From so many bytes on, memory is taken from the kernel: it is not there before something is written to it, as a payload
/// that a client announced and never sends, and it is the kernel's again when the buffer is dropped.
const LARGE: usize = 64 << 10;

/// A zero-filled byte buffer that starts on a 4096-byte boundary.
pub struct AlignedBuffer {
    memory: Memory,
    len: usize,
}

enum Memory {
    Pages(Vec<Page>),
    Mapped(MmapMut),
}

impl AlignedBuffer {
    /// A buffer of `len` zero bytes.
    pub fn zeroed(len: usize) -> Self {
        let mapped = if len < LARGE { None } else { MmapMut::map_anon(len.next_multiple_of(DIRECT_ALIGNMENT)).ok() };
        let memory = mapped
            .map_or_else(|| Memory::Pages(vec![Page::new_zeroed(); len.div_ceil(DIRECT_ALIGNMENT)]), Memory::Mapped);
        Self { memory, len }
    }

    /// Sets the length; bytes beyond the old one are whatever was there before. Allocates only to grow past the largest
    /// length there was.
    pub fn resize(&mut self, len: usize) {
        if len > self.memory.bytes().len() {
            let mut larger = Self::zeroed(len);
            larger[..self.len].copy_from_slice(self);
            *self = larger;
        }
        self.len = len;
    }
}

impl Memory {
    fn bytes(&self) -> &[u8] {
        match self {
            Self::Pages(pages) => pages.as_bytes(),
            Self::Mapped(bytes) => bytes,
        }
    }
}

impl std::ops::Deref for AlignedBuffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.memory.bytes()[..self.len]
    }
}

impl std::ops::DerefMut for AlignedBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        let bytes = match &mut self.memory {
            Memory::Pages(pages) => pages.as_mut_bytes(),
            Memory::Mapped(bytes) => bytes,
        };
        &mut bytes[..self.len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_starts_on_a_page_and_keeps_its_length() {
        for len in [0, 1, 511, 4096, 4097, 1 << 20] {
            let buffer = AlignedBuffer::zeroed(len);
            assert_eq!(buffer.len(), len);
            assert_eq!(buffer.as_ptr() as usize % DIRECT_ALIGNMENT, 0);
            assert!(buffer.iter().all(|byte| *byte == 0));
        }
    }

    #[test]
    fn what_was_there_stays_when_a_buffer_grows() {
        let mut buffer = AlignedBuffer::zeroed(100);
        buffer.fill(7);
        for len in [5000, LARGE, 3 * LARGE, 10, LARGE] {
            buffer.resize(len);
            assert_eq!(buffer.len(), len);
            assert_eq!(buffer[..len.min(100)], [7; 100][..len.min(100)]);
        }
    }

    #[test]
    fn a_large_buffer_takes_no_memory_before_it_is_used() {
        let resident = || {
            let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
            statm.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
        };
        let before = resident();
        let mut buffer = AlignedBuffer::zeroed(1 << 30);
        buffer[1 << 29] = 1;
        assert!(resident() < before + (512 << 20));
    }
}
