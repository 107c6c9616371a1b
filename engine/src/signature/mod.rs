//! Detects what a disk already holds, so that formatting never overwrites existing data: filesystems, partition tables, LUKS,
//! RAID and LVM.
//!
//! This module knows the signatures that `blkid` and `wipefs` know. Most of them are plain bytes at a fixed offset
//! (`table`). Some need more checks (`boot_sector`, `filesystem`), and some lie at the end of the disk (`raid`). The
//! plaintext of a volume is probed in the same way, to find out which filesystem the volume holds.
//!
//! [`examine`] looks only at the two ends of a disk. Before a disk is overwritten, [`survey()`] looks through all of it.

mod boot_sector;
mod filesystem;
mod marker;
mod noise;
mod raid;
mod survey;
mod table;
mod untouched;
mod view;

use std::fmt;
use std::io;

use crate::store::ReadAt;
pub use marker::{has_marker, is_unfinished, put_marker};
pub use noise::{ends_read_as_noise, reads_as_noise};
pub use survey::{Survey, first_written, name, survey};
pub use table::LUKS_MAGIC;
pub use untouched::{UNTOUCHED_LEN, Untouched};
use view::View;

/// How many bytes at the start of a disk must be zero for [`examine`] to call it blank.
const BLANK: usize = 1 << 20;

/// A signature found on a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Signature {
    /// The name of the format. For a filesystem, this is the name that `mount -t` takes.
    pub name: &'static str,
    /// The kind of the format.
    pub kind: Kind,
    /// The offset in bytes from the start of the disk at which the signature was found.
    pub offset: u64,
}

/// The kinds of formats that are found on disks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// A filesystem.
    Filesystem,
    /// Swap space, or the image that hibernation wrote into it.
    Swap,
    /// A partition table or boot sector.
    PartitionTable,
    /// An encrypted volume.
    Encryption,
    /// A member of a RAID array.
    Raid,
    /// A member of a volume manager, a cache, or an object store.
    VolumeManager,
    /// A disk image in its own format, such as qcow2.
    DiskImage,
    /// A format that nbdcrypt began and did not finish. It holds no data.
    Unfinished,
}

impl fmt::Display for Signature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)?;
        f.write_str(match self.kind {
            Kind::Filesystem => " filesystem",
            Kind::Swap => " space",
            Kind::PartitionTable => "",
            Kind::Encryption => " volume",
            Kind::Raid => " member",
            Kind::VolumeManager => "",
            Kind::DiskImage => " disk image",
            Kind::Unfinished => "",
        })
    }
}

/// What a disk holds, and so whether formatting it would lose anything.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// Only zeros and no known signature: in the first mebibyte for [`examine`], on the whole disk for [`survey()`].
    Blank,
    /// Only a format that nbdcrypt began and did not finish. The disk may be formatted again.
    Unfinished,
    /// Data with known signatures.
    Known(Vec<Signature>),
    /// Data with known signatures that begins somewhere within the disk, as a partition does. The partition table may have been
    /// wiped.
    Within {
        /// The offset of the first byte of the data.
        start: u64,
        /// The signatures of the data.
        found: Vec<Signature>,
    },
    /// Data without a known signature.
    Unknown {
        /// The offset of a byte that is not zero.
        offset: u64,
    },
}

impl fmt::Display for Content {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Blank => f.write_str("nothing"),
            Self::Unfinished => f.write_str("an unfinished nbdcrypt format"),
            Self::Known(signatures) => list(f, signatures),
            Self::Within { start, found } => {
                list(f, found)?;
                write!(f, " beginning at byte {start} ({}), as a partition would", Size(*start))
            }
            Self::Unknown { offset } => {
                write!(f, "unknown data (byte {offset}, at {}, is not zero)", Size(*offset))
            }
        }
    }
}

fn list(f: &mut fmt::Formatter<'_>, signatures: &[Signature]) -> fmt::Result {
    // A LUKS2 volume has two headers.
    let has_first = signatures.iter().any(|signature| signature.name == "LUKS2");
    let told = signatures.iter().filter(|signature| !has_first || signature.name != table::LUKS2_SECOND);
    for (index, signature) in told.enumerate() {
        write!(f, "{}{signature}", if index == 0 { "" } else { ", " })?;
    }
    Ok(())
}

/// A number of bytes that is displayed in the largest fitting unit and rounded down to a tenth of it.
struct Size(u64);

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
        if self.0 < 1024 {
            return write!(f, "{} bytes", self.0);
        }
        let power = (self.0.ilog2() / 10).min(5);
        let unit = 1 << (10 * power);
        let (whole, tenth) = (self.0 / unit, u128::from(self.0 % unit) * 10 / u128::from(unit));
        let name = UNITS[power as usize - 1];
        if tenth == 0 { write!(f, "{whole} {name}") } else { write!(f, "{whole}.{tenth} {name}") }
    }
}

/// Returns every signature on the disk. A format with several signatures of the same name is returned once.
///
/// # Errors
/// The error of the disk if a read fails.
pub fn probe<D: ReadAt + ?Sized>(disk: &D) -> io::Result<Vec<Signature>> {
    let read = |data: &mut [u8], offset| disk.read_exactly(data, offset);
    probe_view(&View::new(disk.size(), &read)?)
}

/// Returns what the two ends of the disk hold. [`Content::Blank`] says nothing about the bytes between them: before
/// overwriting a disk, call [`survey()`].
///
/// # Errors
/// The error of the disk if a read fails.
pub fn examine<D: ReadAt + ?Sized>(disk: &D) -> io::Result<Content> {
    let read = |data: &mut [u8], offset| disk.read_exactly(data, offset);
    let view = View::new(disk.size(), &read)?;
    let found = probe_view(&view)?;
    match found.as_slice() {
        [Signature { kind: Kind::Unfinished, .. }] => return Ok(Content::Unfinished),
        [] => {}
        _ => return Ok(Content::Known(found)),
    }
    let head = &view.head()[..view.head().len().min(BLANK)];
    match head.iter().position(|byte| *byte != 0) {
        Some(offset) => Ok(Content::Unknown { offset: offset as u64 }),
        None => Ok(Content::Blank),
    }
}

fn probe_view(view: &View<'_>) -> io::Result<Vec<Signature>> {
    let mut found = Vec::new();
    if is_unfinished(view.head()) {
        found.push(Signature { name: "unfinished nbdcrypt format", kind: Kind::Unfinished, offset: 0 });
    }
    for part in [table::probe, raid::probe, filesystem::probe, boot_sector::probe] {
        for signature in part(view)? {
            if !found.iter().any(|known: &Signature| known.name == signature.name && known.kind == signature.kind) {
                found.push(signature);
            }
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests;
