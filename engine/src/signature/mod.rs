//! What a disk already holds: known filesystems, partition tables, LUKS, RAID and LVM, so that nothing is formatted over.
//!
//! Looked for are the marks that `blkid` and `wipefs` know: most of them plain bytes at a fixed place (`table`), some that
//! must be read with more care (`boot_sector`, `filesystem`), and some at the end of the disk (`raid`). The plaintext
//! of a volume is probed the same way, which tells the filesystem that it holds.

mod boot_sector;
mod filesystem;
mod raid;
mod table;
mod view;

use std::fmt;
use std::io;

use crate::store::{BlockStore, read_unaligned};
use view::View;

/// Bytes at the start of a disk that must be zero for it to count as blank.
const BLANK: usize = 1 << 20;

/// What an unfinished format begins with, in the place of a magic number that any tool knows.
pub const UNFINISHED_MARKER: &[u8] = b"nbdcrypt: unfinished format\n";

/// Anything that is read at any offset: a disk, or the plaintext of a volume.
pub trait ReadAt {
    /// The size in bytes.
    fn size(&self) -> u64;

    /// Fills `data` from any `offset`.
    ///
    /// # Errors
    /// What the disk said; `UnexpectedEof` past the end.
    fn read_exactly(&self, data: &mut [u8], offset: u64) -> io::Result<()>;
}

impl ReadAt for dyn BlockStore + '_ {
    fn size(&self) -> u64 {
        self.len()
    }

    fn read_exactly(&self, data: &mut [u8], offset: u64) -> io::Result<()> {
        read_unaligned(self, data, offset)
    }
}

/// A mark that something left on the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Signature {
    /// What left it. A filesystem has the name that `mount -t` takes.
    pub name: &'static str,
    /// What kind of thing that is.
    pub kind: Kind,
    /// The byte of the disk at which it was recognised.
    pub offset: u64,
}

/// Kinds of things that are found on disks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// A filesystem.
    Filesystem,
    /// Swap space, or what hibernation left there.
    Swap,
    /// A partition table or boot sector.
    PartitionTable,
    /// An encrypted volume.
    Encryption,
    /// A member of a RAID.
    Raid,
    /// A member of a volume manager, a cache, or an object store.
    VolumeManager,
    /// The image of a disk in a format of its own.
    DiskImage,
    /// A format that nbdcrypt began and did not finish. There is no data in it.
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

/// Whether anything would be lost by formatting a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// No known signature, and the first megabyte is zero.
    Blank,
    /// A format that nbdcrypt began and did not finish, and nothing else: it may be formatted again.
    Unfinished,
    /// What is known by its signatures.
    Known(Vec<Signature>),
    /// No known signature, but data: the first byte that is not zero.
    Unknown {
        /// The byte's offset.
        offset: u64,
    },
}

impl fmt::Display for Content {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Blank => f.write_str("nothing"),
            Self::Unfinished => f.write_str("an unfinished nbdcrypt format"),
            Self::Known(signatures) => {
                for (index, signature) in signatures.iter().enumerate() {
                    write!(f, "{}{signature}", if index == 0 { "" } else { ", " })?;
                }
                Ok(())
            }
            Self::Unknown { offset } => write!(f, "data that is not known (byte {offset} is not zero)"),
        }
    }
}

/// Whether a disk that begins with these bytes (at least the first sector) carries the marker of a format that was begun
/// and not finished.
pub fn is_unfinished(first_sector: &[u8]) -> bool {
    first_sector.starts_with(UNFINISHED_MARKER)
}

/// Every signature on the disk, each thing once.
///
/// # Errors
/// What the disk said.
pub fn probe<D: ReadAt + ?Sized>(disk: &D) -> io::Result<Vec<Signature>> {
    let read = |data: &mut [u8], offset| disk.read_exactly(data, offset);
    probe_view(&View::new(disk.size(), &read)?)
}

/// Whether anything would be lost by formatting the disk.
///
/// # Errors
/// What the disk said.
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
