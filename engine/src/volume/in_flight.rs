//! Requests for callers that carry out the disk I/O themselves, such as the io_uring session, where a request completes
//! later.
//!
//! The volume says which bytes of the disk belong to a request. It encrypts before a write and decrypts after a read; the
//! caller moves the bytes in between. This works only for requests on whole blocks, which need at most one read or one write
//! each. All other requests go through [`Volume::read`] and [`Volume::write`].
//!
//! Only a [`Ciphertext`] can be written. Only a volume makes one, by encrypting a buffer for a range of its disk. The
//! range stays with the buffer.

use super::region_lock::Shared;
use super::{Volume, VolumeError};

/// The contiguous range of the disk that holds the bytes of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiskRange {
    /// The first byte, counted from the start of the disk. It is a multiple of the store's alignment.
    pub offset: u64,
    /// The length in bytes. It is a multiple of the store's alignment.
    pub len: u64,
}

/// A write that is in flight. Keep it until the disk has answered: while it lives, no read-modify-write touches the blocks of
/// the write.
#[must_use = "the write is protected only while this value lives"]
pub struct Writing {
    _regions: Shared,
}

/// A buffer that a volume has encrypted for a range of its disk. (The ciphertext of a plaintext volume is the plaintext.)
///
/// The contents cannot be changed any more, and they can be written only to that range:
///
/// ```
/// # use std::sync::Arc;
/// # use engine::{sector::SectorSize, store::MemoryStore, volume::Volume};
/// # let volume = Volume::plaintext(Arc::new(MemoryStore::zeroed(8192)), SectorSize::B512).unwrap();
/// let payload = vec![7; 512];
/// let payload = volume.encrypt(4096, payload).expect("the range is one block");
/// volume.write_encrypted(&payload).unwrap();
/// ```
///
/// A buffer that was not encrypted cannot be written this way:
///
/// ```compile_fail,E0308
/// # use std::sync::Arc;
/// # use engine::{sector::SectorSize, store::MemoryStore, volume::Volume};
/// # let volume = Volume::plaintext(Arc::new(MemoryStore::zeroed(8192)), SectorSize::B512).unwrap();
/// let payload = vec![7; 512];
/// volume.write_encrypted(&payload).unwrap();
/// ```
///
/// A buffer cannot be declared as encrypted either:
///
/// ```compile_fail,E0451
/// # use engine::volume::{Ciphertext, DiskRange};
/// let on_disk = DiskRange { offset: 4096, len: 512 };
/// let payload = Ciphertext { buffer: vec![7; 512], offset: 4096, on_disk };
/// ```
pub struct Ciphertext<B> {
    buffer: B,
    /// The offset in the volume.
    offset: u64,
    on_disk: DiskRange,
}

impl<B> Ciphertext<B> {
    /// Returns the range of the disk that the buffer is encrypted for.
    pub fn on_disk(&self) -> DiskRange {
        self.on_disk
    }

    /// Returns the buffer, for its metadata such as a registration.
    pub fn buffer(&self) -> &B {
        &self.buffer
    }

    /// Returns the buffer, which is then a buffer like any other.
    pub fn into_buffer(self) -> B {
        self.buffer
    }
}

impl<B: AsRef<[u8]>> Ciphertext<B> {
    /// Returns the encrypted bytes. They belong to the start of [`Ciphertext::on_disk`].
    pub fn bytes(&self) -> &[u8] {
        self.buffer.as_ref()
    }
}

/// A buffer that is encrypted step by step while the plaintext arrives. It becomes a [`Ciphertext`] once all of it is encrypted.
pub struct Encrypting<B> {
    buffer: B,
    /// The offset in the volume.
    offset: u64,
    on_disk: DiskRange,
    /// The number of bytes at the start of the buffer that are encrypted.
    encrypted: usize,
}

impl<B: AsMut<[u8]>> Encrypting<B> {
    /// Returns the buffer from byte `from` on, to be filled with plaintext. The part that is already encrypted is never
    /// returned.
    ///
    /// # Panics
    /// Panics if the buffer is encrypted beyond `from`, or ends before it.
    pub fn plaintext_from(&mut self, from: usize) -> &mut [u8] {
        assert!(from >= self.encrypted, "byte {from} is encrypted already");
        &mut self.buffer.as_mut()[from..]
    }
}

impl Volume {
    /// Returns where on the disk the bytes of the request lie, or `None` if the request does not cover whole blocks.
    ///
    /// # Errors
    /// [`VolumeError::OutOfRange`] if the request reaches past the end of the volume.
    pub fn disk_range(&self, offset: u64, len: u64) -> Result<Option<DiskRange>, VolumeError> {
        let disk_offset = self.locate(offset, len)?;
        Ok((self.is_aligned(offset, len) && len > 0).then_some(DiskRange { offset: disk_offset, len }))
    }

    /// Checks that the disk still holds the range, as far as the store knows. A caller that reads the disk itself calls this
    /// before it reads, and again if the read reached the end of the file.
    ///
    /// # Errors
    /// [`VolumeError::OutOfRange`] if the range reaches past the end of the volume, and [`VolumeError::Store`] if the disk was
    /// cut short.
    pub fn check_within(&self, offset: u64, len: u64) -> Result<(), VolumeError> {
        Ok(self.store.check_within(self.locate(offset, len)?, len)?)
    }

    /// Encrypts the buffer, in place, for a write at `offset`. Returns the buffer unchanged if it does not cover whole blocks, is
    /// empty or reaches past the end of the volume.
    ///
    /// # Errors
    /// The unchanged buffer, in the cases above.
    pub fn encrypt<B: AsMut<[u8]>>(&self, offset: u64, buffer: B) -> Result<Ciphertext<B>, B> {
        Ok(self.finish_encryption(self.begin_encryption(offset, buffer)?))
    }

    /// Begins to do in several steps what [`Volume::encrypt`] does at once. The caller then calls
    /// [`Volume::encrypt_arrived`] while the buffer fills, and [`Volume::finish_encryption`] at the end, all on this
    /// volume.
    ///
    /// # Errors
    /// As [`Volume::encrypt`].
    pub fn begin_encryption<B: AsMut<[u8]>>(&self, offset: u64, mut buffer: B) -> Result<Encrypting<B>, B> {
        match self.disk_range(offset, buffer.as_mut().len() as u64) {
            Ok(Some(on_disk)) => Ok(Encrypting { buffer, offset, on_disk, encrypted: 0 }),
            _ => Err(buffer),
        }
    }

    /// Encrypts the whole sectors in the first `filled` bytes, if they are not encrypted yet.
    pub fn encrypt_arrived<B: AsMut<[u8]>>(&self, encrypting: &mut Encrypting<B>, filled: usize) {
        let Encrypting { buffer, offset, encrypted, .. } = encrypting;
        let whole = filled - filled % self.sector_size().bytes();
        if whole > *encrypted {
            self.encrypt_sectors(*offset + *encrypted as u64, &mut buffer.as_mut()[*encrypted..whole]);
            *encrypted = whole;
        }
    }

    /// Encrypts the rest of the buffer.
    pub fn finish_encryption<B: AsMut<[u8]>>(&self, mut encrypting: Encrypting<B>) -> Ciphertext<B> {
        let len = encrypting.buffer.as_mut().len();
        self.encrypt_arrived(&mut encrypting, len);
        let Encrypting { buffer, offset, on_disk, .. } = encrypting;
        Ciphertext { buffer, offset, on_disk }
    }

    /// Returns whether [`Volume::write`] encrypts whole blocks directly into mapped memory. If so, encrypting a payload
    /// in advance only costs an additional copy.
    pub fn encrypts_into_mapping(&self) -> bool {
        self.is_encrypted() && self.store.is_mapped()
    }

    /// Protects the write of the ciphertext, which the caller is about to begin. Returns `None` if a read-modify-write of
    /// these blocks is running or waiting. The caller then uses [`Volume::write_encrypted`], which waits.
    ///
    /// The caller must have called [`Volume::check_end`] after it received the request.
    ///
    /// # Errors
    /// [`VolumeError::ReadOnly`], and [`VolumeError::Store`] if the disk was cut short.
    pub fn begin_write<B>(&self, ciphertext: &Ciphertext<B>) -> Result<Option<Writing>, VolumeError> {
        self.writable()?;
        let Ciphertext { offset, on_disk: DiskRange { offset: disk_offset, len }, .. } = *ciphertext;
        self.store.check_within(disk_offset, len)?;
        Ok(self.regions.try_share(offset, offset + len).map(|regions| Writing { _regions: regions }))
    }

    /// Writes the ciphertext to the range that it belongs to. Blocks until the disk has answered.
    ///
    /// # Errors
    /// [`VolumeError`] if the volume is read-only or the disk refuses the write. Each sector of the range then holds either old
    /// or new data, as after an error of the disk.
    pub fn write_encrypted<B: AsRef<[u8]>>(&self, ciphertext: &Ciphertext<B>) -> Result<(), VolumeError> {
        self.writable()?;
        let Ciphertext { offset, on_disk: DiskRange { offset: disk_offset, len }, .. } = *ciphertext;
        let _held = self.regions.share(offset, offset + len);
        Ok(self.store.write_at(ciphertext.bytes(), disk_offset)?)
    }
}
