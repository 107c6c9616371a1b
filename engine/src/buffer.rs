//! Memory that `O_DIRECT` takes: page-aligned, allocated once and reused.

use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

/// The alignment, in bytes, that every disk and filesystem accepts for direct I/O.
pub const DIRECT_ALIGNMENT: usize = 4096;

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, align(4096))]
struct Page([u8; DIRECT_ALIGNMENT]);

/// A zero-filled byte buffer that starts on a 4096-byte boundary.
pub struct AlignedBuffer {
    pages: Vec<Page>,
    len: usize,
}

impl AlignedBuffer {
    /// A buffer of `len` zero bytes.
    pub fn zeroed(len: usize) -> Self {
        let pages = vec![Page::new_zeroed(); len.div_ceil(DIRECT_ALIGNMENT)];
        Self { pages, len }
    }

    /// Sets the length; bytes beyond the old one are whatever was there before. Allocates only to grow past the largest
    /// length there was.
    pub fn resize(&mut self, len: usize) {
        let pages = len.div_ceil(DIRECT_ALIGNMENT);
        if pages > self.pages.len() {
            self.pages.resize(pages, Page::new_zeroed());
        }
        self.len = len;
    }
}

impl std::ops::Deref for AlignedBuffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.pages.as_bytes()[..self.len]
    }
}

impl std::ops::DerefMut for AlignedBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.pages.as_mut_bytes()[..self.len]
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
        }
    }
}
