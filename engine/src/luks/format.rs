//! Formatting in two phases, so that a half-made header is never mistaken for a volume.
//!
//! ```text
//!   sector 0     anything      marker                                        magic: a volume
//!   the rest     anything      key material, no old signatures   + mkfs      the same
//!                       begin_format ──────────────────► caller ──► commit
//! ```
//!
//! Between `begin` and `commit`, sector 0 holds a text of nbdcrypt's own in which neither nbdcrypt nor cryptsetup nor blkid
//! sees a volume. The caller may use the volume in that time, and make its filesystem: a volume that is found after a
//! crash has had its filesystem finished.
//!
//! Where the header is detached, the marker and the magic are on its disk; on the data's, old signatures are wiped.

use std::io;

use crate::buffer::AlignedBuffer;
use crate::key::VolumeKey;
use crate::luks::{Disks, LuksError, Segment};
use crate::sector::LBA_UNIT;
use crate::signature::{UNFINISHED_MARKER, is_unfinished};
use crate::store::{BlockStore, read_unaligned, write_zeros};

/// For people, behind the marker.
const EXPLANATION: &[u8] = b"Formatting this disk was begun and never finished. It holds no data yet.\n";

/// `LBA_UNIT`, as an index.
const SECTOR: usize = 512;
/// Bytes at the start of the disk that are written whole, or sector 0 of them alone. LUKS keeps key material behind them.
const HEAD: usize = 4096;
/// Bytes at the start of the data and at the end of the disk in which old signatures are wiped.
const WIPED: u64 = 1 << 20;
/// Where the secondary header of an old LUKS2 volume with metadata of the largest size is.
const FARTHEST_LUKS2_HEADER: u64 = 4 << 20;
/// Bytes from the start of the disk that [`abandon_unfinished`] makes blank: the header that is usual, and where its data
/// begins.
const ABANDONED: u64 = (16 << 20) + WIPED;

/// The header of a finished volume with its keyslots, from the first byte of its disk on.
pub(super) struct HeaderImage {
    /// The bytes.
    pub(super) bytes: Vec<u8>,
    /// Where a second header begins, which makes a volume just as the first one does.
    pub(super) secondary: Option<usize>,
}

/// A volume that can be written to and does not exist yet.
///
/// # Contract
/// - Everything written to it before [`PendingFormat::commit`] is on stable storage before the header is.
/// - Cut off at any write before the commit has ended, the disk carries the marker (see [`is_unfinished`]) or, once the
///   commit has written its last sector, a whole volume.
/// - Dropped, it leaves the marker in place: the disk can be formatted again.
/// - Where the marker is gone, somebody else has written to the disk, and neither commit nor abandonment writes anything. Who
///   keeps others away from looking to the last write holds their lock meanwhile.
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

/// Makes a disk that carries the marker blank again.
///
/// # Errors
/// `InvalidData` when it carries none, with the disk untouched; else what the disk said.
pub fn abandon_unfinished(store: &dyn BlockStore) -> io::Result<()> {
    if !has_marker(store)? {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "it carries no unfinished format"));
    }
    blank(store, ABANDONED)
}

fn has_marker(store: &dyn BlockStore) -> io::Result<bool> {
    let mut first = [0; SECTOR];
    if store.len() >= LBA_UNIT {
        read_unaligned(store, &mut first, 0)?;
    }
    Ok(is_unfinished(&first))
}

/// Between the phases the disk is everybody's: a volume that somebody else has made there is neither overwritten nor blanked.
fn require_marker(store: &dyn BlockStore) -> Result<(), LuksError> {
    if has_marker(store)? { Ok(()) } else { Err(LuksError::Overwritten) }
}

impl PendingFormat {
    /// What encrypts the data.
    pub fn key(&self) -> &VolumeKey {
        &self.key
    }

    /// Where the data lies.
    pub fn segment(&self) -> Segment {
        self.segment
    }

    /// Makes it a volume, after all that was written to it, and returns where its data lies. The disks are those that it was
    /// begun on.
    ///
    /// # Errors
    /// [`LuksError::Overwritten`], with the disk untouched; else what the disk said. It then carries the marker or a whole
    /// volume, as far as it can be trusted at all.
    pub fn commit<'d>(&self, disks: impl Into<Disks<'d>>) -> Result<Segment, LuksError> {
        let disks = disks.into();
        require_marker(disks.header())?;
        if disks.is_detached() {
            disks.data().flush()?;
        }
        let store = disks.header();
        // All but sector 0, and what the caller wrote, are flushed before sector 0, which alone decides.
        let head = &self.head.bytes;
        let mut marked = AlignedBuffer::zeroed(head.len());
        marked.copy_from_slice(head);
        put_marker(&mut marked);
        store.write_at(&marked, 0)?;
        store.flush()?;
        // A disk of larger blocks writes the same bytes over the rest of the block: torn, they are right all the same.
        store.write_at(&head[..SECTOR.max(store.alignment())], 0)?;
        store.flush()?;
        if let Some(HeldBack { offset, bytes }) = &self.secondary {
            store.write_at(bytes, *offset)?;
            store.flush()?;
        }
        Ok(self.segment)
    }

    /// Makes the disk blank again. The disks are those that it was begun on.
    ///
    /// # Errors
    /// [`LuksError::Overwritten`], with the disks untouched; else what the disk said.
    pub fn abandon<'d>(self, disks: impl Into<Disks<'d>>) -> Result<(), LuksError> {
        let disks = disks.into();
        require_marker(disks.header())?;
        let data = disks.data();
        write_zeros(data, self.segment.offset, WIPED.min(self.segment.len))?;
        data.flush()?;
        blank(disks.header(), if disks.is_detached() { self.header_len } else { self.header_len.max(ABANDONED) })?;
        Ok(())
    }
}

/// The first phase: the marker, then everything else that `image` has, then zeros where old signatures could be.
///
/// # Errors
/// [`LuksError::TooSmall`], with the disk untouched; else what the disk said.
pub(super) fn begin_format(
    disks: Disks<'_>,
    image: HeaderImage,
    key: VolumeKey,
    segment: Segment,
) -> Result<PendingFormat, LuksError> {
    let HeaderImage { mut bytes, secondary } = image;
    let store = disks.header();
    let unit = SECTOR.max(store.alignment());
    if segment.len == 0 {
        let sector = segment.sector_size.bytes_u64().max(disks.data().alignment() as u64);
        return Err(LuksError::TooSmall { needed: segment.offset + sector, available: disks.data().len() });
    }
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

/// Takes `len` bytes out of the image and leaves zeros in their place.
fn hold_back(image: &mut [u8], offset: usize, len: usize) -> HeldBack {
    let place = &mut image[offset..offset + len];
    let mut bytes = AlignedBuffer::zeroed(len);
    bytes.copy_from_slice(place);
    place.fill(0);
    HeldBack { offset: offset as u64, bytes }
}

/// Zeros where a filesystem, a partition table, RAID or LUKS could have left something behind in the data's room.
fn wipe_signatures(store: &dyn BlockStore, segment: Segment) -> io::Result<()> {
    let end = segment.offset + segment.len;
    // No further than the data reaches; all of these are multiples of the disk's blocks.
    let wipe = |from: u64, len: u64| write_zeros(store, from, len.min(end.saturating_sub(from)));
    wipe(segment.offset, WIPED)?;
    if segment.offset + WIPED <= FARTHEST_LUKS2_HEADER {
        wipe(FARTHEST_LUKS2_HEADER, HEAD.max(store.alignment()) as u64)?;
    }
    let tail = segment.len.min(WIPED);
    wipe(end - tail, tail)
}

/// From the back to the front, so that the marker is there as long as anything else is.
fn blank(store: &dyn BlockStore, len: u64) -> io::Result<()> {
    let unit = LBA_UNIT.max(store.alignment() as u64);
    let head = (HEAD as u64).max(unit).min(store.len());
    let end = len.min(store.len());
    write_zeros(store, head, end.saturating_sub(head))?;
    store.flush()?;
    write_zeros(store, 0, head)?;
    store.flush()
}

fn put_marker(head: &mut [u8]) {
    let sector = &mut head[..SECTOR];
    sector.fill(0);
    sector[..UNFINISHED_MARKER.len()].copy_from_slice(UNFINISHED_MARKER);
    sector[UNFINISHED_MARKER.len()..][..EXPLANATION.len()].copy_from_slice(EXPLANATION);
}
