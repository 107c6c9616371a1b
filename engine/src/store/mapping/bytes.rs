//! Mapped bytes, as values that only the cipher can consume.

use std::marker::PhantomData;
use std::ops::Range;

use cipher::inout::InOutBuf;

use super::{Mapping, PAGE};
use crate::sector::{Lba512, SectorSize};
use crate::xts::Xts;

/// Ciphertext in memory that other processes may change at any time.
///
/// Such memory is not a `&[u8]`, whose bytes never change. The only thing that can be done with it is to decrypt it, once,
/// into memory that belongs to the caller:
///
/// ```
/// # use engine::{key::VolumeKey, sector::{Lba512, SectorSize}, store::{BlockStore, MemoryStore}, xts::Xts};
/// # let (store, cipher) = (MemoryStore::zeroed(4096), Xts::new(&VolumeKey::new((0..64).collect()).unwrap()));
/// let mut plaintext = [0; 4096];
/// store.show(0, 4096, &mut |at, bytes| {
///     let len = bytes.len();
///     bytes.decrypt_to(&cipher, SectorSize::B4096, Lba512(0), &mut plaintext[at..at + len]);
/// });
/// ```
///
/// No decision can depend on this memory, because no code can read it directly:
///
/// ```compile_fail,E0608
/// # use engine::store::MappedBytes;
/// fn is_zero(bytes: MappedBytes<'_>) -> bool {
///     bytes[0] == 0
/// }
/// ```
///
/// A value of this type cannot be kept after the call that received it, because the memory may then be gone:
///
/// ```compile_fail,E0521
/// # use engine::store::{BlockStore, MappedBytes};
/// fn keep<'m>(store: &dyn BlockStore, kept: &mut Vec<MappedBytes<'m>>) {
///     store.show(0, 4096, &mut |_, bytes| kept.push(bytes));
/// }
/// ```
///
/// Nor can other memory be declared to be mapped:
///
/// ```compile_fail,E0451
/// # use engine::store::MappedBytes;
/// let bytes = MappedBytes { start: std::ptr::null(), len: 4096, memory: std::marker::PhantomData };
/// ```
pub struct MappedBytes<'m> {
    start: *const u8,
    len: usize,
    memory: PhantomData<&'m Mapping>,
}

/// Room for ciphertext in memory that other processes may read and change at any time. Only the cipher can fill it, once.
/// As with [`MappedBytes`], no code can read it:
///
/// ```compile_fail,E0608
/// # use engine::store::MappedBytesMut;
/// fn clear(bytes: MappedBytesMut<'_>) {
///     bytes[0] = 0;
/// }
/// ```
pub struct MappedBytesMut<'m> {
    start: *mut u8,
    len: usize,
    memory: PhantomData<&'m Mapping>,
}

impl<'m> MappedBytes<'m> {
    /// Returns the bytes in the range of the mapping.
    ///
    /// # Safety
    /// The range lies within the mapping. For `'m`, no other thread of this process writes to the range through the mapping.
    pub(super) unsafe fn new(mapping: &'m Mapping, range: Range<usize>) -> Self {
        // SAFETY: the caller keeps the range within the mapping.
        let start = unsafe { mapping.base.add(range.start) }.as_ptr().cast_const();
        prefetch(start, range.len());
        Self { start, len: range.len(), memory: PhantomData }
    }

    /// Returns how many bytes there are.
    #[expect(clippy::len_without_is_empty, reason = "no piece is empty")]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Decrypts whole sectors, of which the first lies at `first`.
    ///
    /// # Panics
    /// Panics if `plaintext` does not have the length of these bytes, or if this length is not a whole number of sectors.
    pub fn decrypt_to(self, cipher: &Xts, sector_size: SectorSize, first: Lba512, plaintext: &mut [u8]) {
        assert_eq!(plaintext.len(), self.len, "the plaintext has another length than the ciphertext");
        // SAFETY: `self.len` bytes can be read at `start` (`new`) and written to `plaintext`. The two do not overlap, because
        // nothing lends the mapping out as a slice. If another process writes to the mapping, each load of the cipher gets
        // the old or the new bytes, whatever they are. The portable cipher makes a slice of each chunk, and loads each of its
        // bytes once, into a local buffer.
        let data = unsafe { InOutBuf::from_raw(self.start, plaintext.as_mut_ptr(), self.len) };
        cipher.decrypt_between(sector_size, first, data);
    }

    #[cfg(test)]
    pub(super) fn copy_to(self, target: &mut [u8]) {
        assert_eq!(target.len(), self.len);
        // SAFETY: as in `decrypt_to`. No other process knows the files of the tests.
        unsafe { self.start.copy_to_nonoverlapping(target.as_mut_ptr(), self.len) };
    }
}

impl<'m> MappedBytesMut<'m> {
    /// Returns the bytes in the range of the mapping, for writing.
    ///
    /// # Safety
    /// The range lies within the mapping, which is writable. For `'m`, no other thread of this process uses the range through
    /// the mapping.
    pub(super) unsafe fn new(mapping: &'m Mapping, range: Range<usize>) -> Self {
        // SAFETY: the caller keeps the range within the mapping.
        let start = unsafe { mapping.base.add(range.start) }.as_ptr();
        prefetch(start, range.len());
        Self { start, len: range.len(), memory: PhantomData }
    }

    /// Returns how many bytes there are.
    #[expect(clippy::len_without_is_empty, reason = "no piece is empty")]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Encrypts whole sectors, of which the first lies at `first`.
    ///
    /// # Panics
    /// Panics if `plaintext` does not have the length of these bytes, or if this length is not a whole number of sectors.
    pub fn encrypt_from(self, cipher: &Xts, sector_size: SectorSize, first: Lba512, plaintext: &[u8]) {
        assert_eq!(plaintext.len(), self.len, "the plaintext has another length than the ciphertext");
        // SAFETY: `self.len` bytes can be read from `plaintext` and written at `start` (`new`). The two do not overlap, because
        // nothing lends the mapping out as a slice. The cipher writes each byte and reads none of them back.
        let data = unsafe { InOutBuf::from_raw(plaintext.as_ptr(), self.start, self.len) };
        cipher.encrypt_between(sector_size, first, data);
    }

    #[cfg(test)]
    pub(super) fn copy_from(self, source: &[u8]) {
        assert_eq!(source.len(), self.len);
        // SAFETY: as in `encrypt_from`. No other process knows the files of the tests.
        unsafe { self.start.copy_from_nonoverlapping(source.as_ptr(), self.len) };
    }
}

/// Prefetches the first page of the bytes that the cipher is about to process, all of its cache lines at once. The lines
/// arrive at the same time, while the first tweak is encrypted, instead of one after the other. The cipher itself
/// prefetches the bytes after them.
fn prefetch(start: *const u8, len: usize) {
    #[cfg(target_arch = "x86_64")]
    for line in (0..len.min(PAGE)).step_by(64) {
        use core::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: every x86-64 CPU has this instruction, which is a hint and faults at no address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(start.wrapping_add(line).cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (start, len);
}
