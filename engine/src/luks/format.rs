//! Formats a volume in two phases, so that an incomplete header is never mistaken for a volume.
//!
//! ```text
//!   sector 0     anything      marker                                        magic: a volume
//!   the rest     anything      key material, no old signatures   + mkfs      the same
//!                       begin_format ──────────────────► caller ──► commit
//! ```
//!
//! Between `begin_format` and `commit`, sector 0 holds nbdcrypt's marker. Neither nbdcrypt nor cryptsetup nor blkid takes this
//! marker for a volume. During this time the caller may use the volume and make its filesystem. So if a volume is found after a
//! crash, its filesystem is complete.
//!
//! If the header is detached, the marker and the magic are on the header's disk. On the data disk, only old signatures are
//! wiped. After a format is abandoned, the marker is at the first byte of the disk that still holds part of the volume.
//! With a detached header, this is the data disk.

use std::io;

use sha2::{Digest, Sha256};

use crate::buffer::AlignedBuffer;
use crate::key::VolumeKey;
use crate::layout::Segment;
use crate::luks::{Disks, LuksError};
use crate::sector::{LBA_UNIT, Lba512, SectorSize};
use crate::signature::{self, Survey, UNTOUCHED_LEN, Untouched, has_marker, put_marker};
use crate::store::{BlockStore, read_unaligned, write_unaligned, write_zeros};
use crate::xts::Xts;

/// [`LBA_UNIT`] as an index.
const SECTOR: usize = 512;
/// The number of bytes at the start of the disk that are written together. Later, only sector 0 of them is written once
/// more. LUKS keeps key material only after these bytes.
const HEAD: usize = 4096;
/// The number of bytes that are zeroed to wipe old signatures, once at the start of the data and once at the end of the
/// disk.
const WIPED: u64 = 1 << 20;
/// The offsets of the secondary header of a LUKS2 volume with the two largest metadata sizes.
const FAR_LUKS2_HEADERS: [u64; 2] = [2 << 20, 4 << 20];
/// Bytes from the start of the disk that [`abandon_unfinished`] zeroes: a header of the usual size and the start of the
/// data.
const ABANDONED: u64 = (16 << 20) + WIPED;

/// The complete header of a volume with its keyslots, from the first byte of the header's disk.
pub(super) struct HeaderImage {
    /// The bytes.
    pub(super) bytes: Vec<u8>,
    /// The offset of a secondary header, which makes the disk a volume just as the first header does.
    pub(super) secondary: Option<usize>,
}

/// A volume that can be written to but does not exist on the disk yet.
///
/// # Contract
/// - Everything that was written to the volume before [`PendingFormat::commit`] reaches stable storage before the
///   header does.
/// - If power is lost at any write before the commit ends, the disk carries the marker (see [`has_marker`]), or a complete
///   volume if the commit had written sector 0.
/// - Dropping this value leaves the marker in place, so the disk can be formatted again.
/// - If the marker is missing, another program has written to the disk. Then neither commit nor abandon writes anything. To
///   rule out a change between this check and the last write, the caller must hold a lock that others respect.
#[derive(Debug)]
#[must_use = "a format that is neither committed nor abandoned stays unfinished"]
pub struct PendingFormat {
    key: VolumeKey,
    segment: Segment,
    header_len: u64,
    head: HeldBack,
    secondary: Option<HeldBack>,
}

/// Bytes that are written last.
struct HeldBack {
    offset: u64,
    bytes: AlignedBuffer,
}

impl std::fmt::Debug for HeldBack {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} bytes at {}", self.bytes.len(), self.offset)
    }
}

/// Makes a disk with the marker blank again.
///
/// # Errors
/// `InvalidData` if the disk does not carry the marker; the disk is then unchanged. Otherwise the I/O error of the disk.
pub fn abandon_unfinished(store: &dyn BlockStore) -> io::Result<()> {
    if !has_marker(store)? {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "the disk carries no unfinished format"));
    }
    blank(store, ABANDONED)
}

/// Returns whether a disk holds only the remains of an abandoned volume with a detached header. Such a disk carries the
/// marker, and a fingerprint which proves that nothing was written to the disk after the format was abandoned (see
/// [`Untouched`]).
///
/// # Errors
/// The I/O error of the disk.
pub fn is_abandoned(data: &dyn BlockStore) -> io::Result<bool> {
    let rest = HEAD as u64..data.len();
    if rest.end < rest.start + UNTOUCHED_LEN as u64 || !has_marker(data)? {
        return Ok(false);
    }
    let mut mark = [0; UNTOUCHED_LEN];
    read_unaligned(data, &mut mark, rest.start)?;
    Untouched::parse(&mark).map_or(Ok(false), |mark| mark.is_true(data, rest))
}

/// Returns an error if the marker is missing. Between the phases, anyone may write to the disk. If another program has made
/// a volume there, it must be neither overwritten nor blanked.
fn require_marker(store: &dyn BlockStore) -> Result<(), LuksError> {
    if has_marker(store)? { Ok(()) } else { Err(LuksError::Overwritten) }
}

impl PendingFormat {
    /// Returns the key that encrypts the data.
    pub fn key(&self) -> &VolumeKey {
        &self.key
    }

    /// Returns where the data lies.
    pub fn segment(&self) -> Segment {
        self.segment
    }

    /// Flushes everything that was written to the volume, then writes the header. Returns where the data lies. `disks` must be
    /// the disks on which the format was begun.
    ///
    /// # Errors
    /// [`LuksError::Overwritten`] if the marker is gone; the disk is then unchanged. Otherwise [`LuksError::Store`]; the disk
    /// then carries the marker or a complete volume, as far as a failing disk can be trusted.
    pub fn commit<'d>(&self, disks: impl Into<Disks<'d>>) -> Result<Segment, LuksError> {
        let disks = disks.into();
        require_marker(disks.header())?;
        if disks.is_detached() {
            disks.data().flush()?;
        }
        let store = disks.header();
        // Sector 0 decides whether there is a volume. Everything else is flushed before sector 0 is written.
        let head = &self.head.bytes;
        let mut marked = AlignedBuffer::zeroed(head.len());
        marked.copy_from_slice(head);
        put_marker(&mut marked);
        store.write_at(&marked, 0)?;
        store.flush()?;
        // If the disk's blocks are larger than a sector, the rest of the block is overwritten with the same bytes. So a torn
        // write is harmless.
        store.write_at(&head[..SECTOR.max(store.alignment())], 0)?;
        store.flush()?;
        if let Some(HeldBack { offset, bytes }) = &self.secondary {
            store.write_at(bytes, *offset)?;
            store.flush()?;
        }
        Ok(self.segment)
    }

    /// Makes the disk blank again, except for data whose erasure would take longer than a few seconds. `disks` must be the
    /// disks on which the format was begun.
    ///
    /// If the disk still holds something that the caller wrote, the marker stays on the disk, so that it can be
    /// formatted again. In this case, if the header is detached, the header becomes blank and the data disk gets the
    /// marker, so that [`is_abandoned`] recognises it. This requires that the data begins at the first byte of its
    /// disk.
    ///
    /// # Errors
    /// [`LuksError::Overwritten`] if the marker is gone; the disks are then unchanged. Otherwise [`LuksError::Store`].
    pub fn abandon<'d>(self, disks: impl Into<Disks<'d>>) -> Result<(), LuksError> {
        let disks = disks.into();
        require_marker(disks.header())?;
        let data = disks.data();
        write_zeros(data, self.segment.offset, WIPED.min(self.segment.len))?;
        data.flush()?;
        let header_len = if disks.is_detached() { self.header_len } else { self.header_len.max(ABANDONED) };
        blank_behind_head(disks.header(), header_len)?;
        if self.is_written(data)? && !self.gives_back(data)? {
            if !disks.is_detached() {
                return Ok(());
            }
            // The bytes before the data do not belong to the volume.
            if self.segment.offset == 0 {
                self.mark_abandoned(data)?;
            }
        }
        blank_head(disks.header())?;
        Ok(())
    }

    /// Marks a data disk so that [`is_abandoned`] recognises it. Its first MiB must be zero.
    fn mark_abandoned(&self, data: &dyn BlockStore) -> io::Result<()> {
        // The header contains random bytes, so its digest is a random number. The header itself is about to be erased.
        let random = Sha256::digest(&*self.head.bytes);
        let seed = random.iter().take(8).fold(0, |seed, byte| seed << 8 | u64::from(*byte));
        let rest = HEAD as u64..self.segment.len;
        if rest.end < rest.start + UNTOUCHED_LEN as u64 {
            return Ok(());
        }
        let untouched = Untouched::of(data, rest.clone(), seed)?;
        write_unaligned(data, &untouched.to_bytes(), rest.start)?;
        data.flush()?;
        let mut head = [0; HEAD];
        put_marker(&mut head);
        write_unaligned(data, &head, 0)?;
        data.flush()
    }

    /// Discards the data if the disk can do this quickly. Returns whether the data reads as zeros afterwards.
    fn gives_back(&self, data: &dyn BlockStore) -> io::Result<bool> {
        if !data.discards_quickly() {
            return Ok(false);
        }
        let given_back = data.discard(self.segment.offset, self.segment.len).and_then(|()| data.flush());
        Ok(given_back.is_ok() && !self.is_written(data)?)
    }

    /// Marks a volume that is made over old data as untouched (see [`Untouched`]), so that a filesystem may be made on it
    /// unattended. Does nothing if the data is blank. Must be called before anything is written to the volume. `seed` is a
    /// random number. `disks` must be the disks on which the format was begun.
    ///
    /// # Errors
    /// [`LuksError::Store`] if the disk fails.
    pub fn mark_untouched<'d>(&self, disks: impl Into<Disks<'d>>, seed: u64) -> Result<(), LuksError> {
        let data = disks.into().data();
        let Segment { offset, len, sector_size, iv_start } = self.segment;
        if len < UNTOUCHED_LEN as u64 || !self.is_written(data)? {
            return Ok(());
        }
        let mut bytes = Untouched::of(data, offset..offset + len, seed)?.to_bytes();
        Xts::new(&self.key).encrypt(sector_size, iv_start, &mut bytes);
        write_unaligned(data, &bytes, offset)?;
        Ok(())
    }

    /// Returns whether the data's range of the disk holds anything, as far as a survey can tell.
    fn is_written(&self, data: &dyn BlockStore) -> io::Result<bool> {
        let Segment { offset, len, .. } = self.segment;
        Ok(signature::first_written(data, offset..offset + len, &Survey::default())?.is_some())
    }
}

/// Returns where the data of a new volume lies: from `offset` to the end of its disk, in whole sectors and whole blocks.
///
/// # Errors
/// [`LuksError::TooSmall`] if there is no room for data.
pub(super) fn segment_from(disks: &Disks<'_>, offset: u64, sector_size: SectorSize) -> Result<Segment, LuksError> {
    let disk = disks.data();
    let unit = sector_size.bytes_u64().max(disk.alignment() as u64);
    match disk.len().saturating_sub(offset) / unit * unit {
        0 => Err(LuksError::TooSmall { needed: offset + unit, available: disk.len() }),
        len => Ok(Segment { offset, len, sector_size, iv_start: Lba512(0) }),
    }
}

/// The first phase: writes the marker, then the rest of `image`, then zeros where old signatures could be.
///
/// # Errors
/// [`LuksError::TooSmall`] if the header does not fit; the disk is then unchanged. Otherwise [`LuksError::Store`].
pub(super) fn begin_format(
    disks: Disks<'_>,
    image: HeaderImage,
    key: VolumeKey,
    segment: Segment,
) -> Result<PendingFormat, LuksError> {
    let HeaderImage { mut bytes, secondary } = image;
    let store = disks.header();
    let unit = SECTOR.max(store.alignment());
    let header_len = bytes.len() as u64;
    if header_len > store.len() {
        return Err(LuksError::TooSmall { needed: header_len, available: store.len() });
    }
    let held_len = HEAD.max(unit);
    if !(bytes.len() | secondary.unwrap_or(0)).is_multiple_of(held_len) {
        let text = format!("a header of {} bytes does not fit the disk's blocks of {unit} bytes", bytes.len());
        return Err(io::Error::new(io::ErrorKind::Unsupported, text).into());
    }
    let head = hold_back(&mut bytes, 0, held_len);
    let secondary = secondary.map(|offset| hold_back(&mut bytes, offset, held_len));
    let mut marked = AlignedBuffer::zeroed(held_len);
    put_marker(&mut marked);
    store.write_at(&marked, 0)?;
    store.flush()?;
    if let Some(HeldBack { offset, bytes }) = &secondary {
        // An earlier volume may have left its secondary header here. No cut may leave half of it beside the marker.
        write_zeros(store, *offset, bytes.len() as u64)?;
        store.flush()?;
    }
    store.write_at(&bytes[held_len..], held_len as u64)?;
    if !disks.is_detached() {
        let gap = segment.offset.saturating_sub(header_len);
        write_zeros(store, header_len, gap.min(WIPED))?;
    }
    store.flush()?;
    wipe_signatures(disks.data(), segment)?;
    disks.data().flush()?;
    Ok(PendingFormat { key, segment, header_len, head, secondary })
}

/// Takes `len` bytes out of the image and leaves zeros there.
fn hold_back(image: &mut [u8], offset: usize, len: usize) -> HeldBack {
    let place = &mut image[offset..offset + len];
    let mut bytes = AlignedBuffer::zeroed(len);
    bytes.copy_from_slice(place);
    place.fill(0);
    HeldBack { offset: offset as u64, bytes }
}

/// Zeroes the parts of the data's range where a filesystem, a partition table, RAID or LUKS may have left a signature.
fn wipe_signatures(store: &dyn BlockStore, segment: Segment) -> io::Result<()> {
    let end = segment.offset + segment.len;
    // Stops at the end of the data. All of these numbers are multiples of the disk's block size.
    let wipe = |from: u64, len: u64| write_zeros(store, from, len.min(end.saturating_sub(from)));
    wipe(segment.offset, WIPED)?;
    for far in FAR_LUKS2_HEADERS.into_iter().filter(|far| segment.offset + WIPED <= *far) {
        wipe(far, HEAD.max(store.alignment()) as u64)?;
    }
    let tail = segment.len.min(WIPED);
    wipe(end - tail, tail)
}

/// Zeroes the first `len` bytes from back to front, so that the marker is overwritten last.
fn blank(store: &dyn BlockStore, len: u64) -> io::Result<()> {
    blank_behind_head(store, len)?;
    blank_head(store)
}

/// Zeroes the bytes up to `len`, except the block that holds the marker.
fn blank_behind_head(store: &dyn BlockStore, len: u64) -> io::Result<()> {
    let head = head_len(store);
    write_zeros(store, head, len.min(store.len()).saturating_sub(head))?;
    store.flush()
}

fn blank_head(store: &dyn BlockStore) -> io::Result<()> {
    write_zeros(store, 0, head_len(store))?;
    store.flush()
}

/// Returns the length of the block that holds the marker.
fn head_len(store: &dyn BlockStore) -> u64 {
    let unit = LBA_UNIT.max(store.alignment() as u64);
    (HEAD as u64).max(unit).min(store.len())
}
