//! Filesystems whose magic number is not enough to identify them: it is too short, or several filesystems share it.

use std::io;

use super::view::View;
use super::{Kind, Signature};

/// The offset of most superblocks.
const SUPERBLOCK: u64 = 1024;

pub(super) fn probe(view: &View<'_>) -> io::Result<Vec<Signature>> {
    let mut found = Vec::new();
    if let Some(superblock) = view.bytes::<256>(SUPERBLOCK)? {
        let names = [ext(&superblock), minix(&superblock), nilfs2(&superblock), hfs(&superblock)];
        let named = |(name, at)| Signature { name, kind: Kind::Filesystem, offset: SUPERBLOCK + at };
        found.extend(names.into_iter().flatten().map(named));
    }
    found.extend(nilfs2_backup(view)?);
    found.extend(udf(view)?);
    Ok(found)
}

type Named = Option<(&'static str, u64)>;

/// Recognises ext2, ext3 or ext4. Distinguishes them by the features that only ext3 or ext4 have.
fn ext(superblock: &[u8; 256]) -> Named {
    const MAGIC_AT: usize = 56;
    /// `has_journal`.
    const COMPAT_JOURNAL: u32 = 0x4;
    /// `journal_dev`: the device holds only the journal of a filesystem.
    const INCOMPAT_JOURNAL_DEVICE: u32 = 0x8;
    /// `filetype`, `needs_recovery`, `meta_bg`.
    const INCOMPAT_EXT3: u32 = 0x2 | 0x4 | 0x10;
    /// `sparse_super`, `large_file`, `btree_dir`.
    const RO_COMPAT_EXT3: u32 = 0x1 | 0x2 | 0x4;
    if le16(superblock, MAGIC_AT) != 0xef53 {
        return None;
    }
    let (compat, incompat, ro_compat) = (le32(superblock, 92), le32(superblock, 96), le32(superblock, 100));
    let name = if incompat & INCOMPAT_JOURNAL_DEVICE != 0 {
        "ext4 journal device"
    } else if incompat & !INCOMPAT_EXT3 != 0 || ro_compat & !RO_COMPAT_EXT3 != 0 {
        "ext4"
    } else if compat & COMPAT_JOURNAL != 0 {
        "ext3"
    } else {
        "ext2"
    };
    Some((name, MAGIC_AT as u64))
}

/// Recognises versions 1 and 2 with names of 14 or 30 bytes, and version 3, in either byte order.
fn minix(superblock: &[u8; 256]) -> Named {
    // A magic number of two bytes proves little, so the counts of inodes and of bitmap blocks must not be zero either.
    let old = [0x137f, 0x138f, 0x2468, 0x2478];
    let counts = |from: usize| superblock[from..from + 4].chunks(2).all(|n| n != [0, 0]);
    let old_magic = le16(superblock, 16);
    if (old.contains(&old_magic) || old.contains(&old_magic.swap_bytes())) && le16(superblock, 0) != 0 && counts(4) {
        return Some(("minix", 16));
    }
    let magic = le16(superblock, 24);
    let third = (magic == 0x4d5a || magic.swap_bytes() == 0x4d5a) && le32(superblock, 0) != 0 && counts(6);
    third.then_some(("minix", 24))
}

/// Recognises revision 2 with a superblock of a possible length.
fn nilfs2(superblock: &[u8; 256]) -> Named {
    let bytes = le16(superblock, 8);
    let is = le16(superblock, 6) == 0x3434 && le32(superblock, 0) == 2 && (16..=1024).contains(&bytes);
    is.then_some(("nilfs2", 6))
}

/// Finds the second superblock, in the last 4096 bytes that start on a multiple of 512.
fn nilfs2_backup(view: &View<'_>) -> io::Result<Option<Signature>> {
    let Some(offset) = (view.len() / 512).checked_sub(8).map(|sector| sector * 512) else { return Ok(None) };
    let named = view.bytes::<256>(offset)?.and_then(|superblock| nilfs2(&superblock));
    Ok(named.map(|(name, at)| Signature { name, kind: Kind::Filesystem, offset: offset + at }))
}

/// Recognises HFS+ by its version, and HFS by an allocation block size that is a whole number of sectors.
fn hfs(superblock: &[u8; 256]) -> Named {
    match &superblock[..4] {
        b"H+\x00\x04" | b"HX\x00\x05" => Some(("hfsplus", 0)),
        [b'B', b'D', ..] => {
            let block = u32::from_be_bytes([superblock[20], superblock[21], superblock[22], superblock[23]]);
            (block != 0 && block.is_multiple_of(512)).then_some(("hfs", 0))
        }
        _ => None,
    }
}

/// Finds an `NSR` descriptor in the volume recognition sequence (ECMA-167, part 2).
fn udf(view: &View<'_>) -> io::Result<Option<Signature>> {
    for block in [2048, 4096] {
        for offset in (0x8000..0x8000 + 16 * block).step_by(2048) {
            if view.has(b"NSR02\x01", offset + 1)? || view.has(b"NSR03\x01", offset + 1)? {
                return Ok(Some(Signature { name: "udf", kind: Kind::Filesystem, offset: offset + 1 }));
            }
        }
    }
    Ok(None)
}

fn le16(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn le32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}
