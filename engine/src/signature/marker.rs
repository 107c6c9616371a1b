//! The marker of a format that was begun and not finished. It is written to the start of a disk, in place of a magic number that
//! other tools would recognize.

use std::io;

use crate::sector::LBA_UNIT;
use crate::store::{BlockStore, read_unaligned};

const MARKER: &[u8] = b"nbdcrypt: unfinished format\n";
/// An explanation for people, written after the marker.
const EXPLANATION: &[u8] = b"Formatting this disk was begun and never finished. It holds no data yet.\n";
/// [`LBA_UNIT`] as an index.
const SECTOR: usize = 512;

/// Returns whether a disk begins with the marker. `first_sector` holds at least the first 512 bytes of the disk.
pub fn is_unfinished(first_sector: &[u8]) -> bool {
    first_sector.starts_with(MARKER)
}

/// Returns whether `disk` begins with the marker.
///
/// # Errors
/// The error of the disk if the read fails.
pub fn has_marker(disk: &dyn BlockStore) -> io::Result<bool> {
    let mut first = [0; SECTOR];
    if disk.len() >= LBA_UNIT {
        read_unaligned(disk, &mut first, 0)?;
    }
    Ok(is_unfinished(&first))
}

/// Replaces the first 512 bytes of `head` by the marker and its explanation.
///
/// # Panics
/// If `head` is shorter.
pub fn put_marker(head: &mut [u8]) {
    let sector = &mut head[..SECTOR];
    sector.fill(0);
    sector[..MARKER.len()].copy_from_slice(MARKER);
    sector[MARKER.len()..][..EXPLANATION.len()].copy_from_slice(EXPLANATION);
}
