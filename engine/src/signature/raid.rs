//! Linux software RAID and ZFS, whose signatures lie at both ends of the disk.

use std::io;

use super::view::View;
use super::{Kind, Signature};

const MD_MAGIC: u32 = 0xa92b_4efc;

pub(super) fn probe(view: &View<'_>) -> io::Result<Vec<Signature>> {
    let mut found = md(view)?;
    found.extend(zfs(view)?);
    Ok(found)
}

/// Finds md superblocks. Version 0.90 is in the machine's own byte order, at the start of the last whole block of 64 KiB.
/// Version 1 is little-endian. Version 1.0 lies at least 8 KiB before the end, 1.1 at the start, and 1.2 at 4 KiB.
fn md(view: &View<'_>) -> io::Result<Vec<Signature>> {
    let mut found = Vec::new();
    let old = (view.len() & !0xffff).checked_sub(0x1_0000);
    if let Some(offset) = old
        && let Some(magic) = view.bytes::<4>(offset)?
        && (u32::from_le_bytes(magic) == MD_MAGIC || u32::from_be_bytes(magic) == MD_MAGIC)
    {
        found.push(Signature { name: "Linux md RAID (0.90)", kind: Kind::Raid, offset });
    }
    let last = (view.len() & !0xfff).checked_sub(0x2000);
    let places = [("Linux md RAID (1.0)", last), ("Linux md RAID (1.1)", Some(0)), ("Linux md RAID (1.2)", Some(4096))];
    for (name, offset) in places {
        let Some(offset) = offset else { continue };
        if let Some([m0, m1, m2, m3, version @ ..]) = view.bytes::<8>(offset)?
            && u32::from_le_bytes([m0, m1, m2, m3]) == MD_MAGIC
            && u32::from_le_bytes(version) == 1
        {
            found.push(Signature { name, kind: Kind::Raid, offset });
        }
    }
    Ok(found)
}

/// Finds ZFS labels: four of 256 KiB, two at each end. Each has a ring of uberblocks in its second half.
fn zfs(view: &View<'_>) -> io::Result<Option<Signature>> {
    const LABEL: u64 = 256 << 10;
    const UBERBLOCK: u64 = 0x00ba_b10c;
    let end = view.len() / LABEL * LABEL;
    let labels = [Some(0), Some(LABEL), end.checked_sub(2 * LABEL), end.checked_sub(LABEL)];
    for label in labels.into_iter().flatten() {
        for offset in (label + LABEL / 2..label + LABEL).step_by(1024) {
            if let Some(magic) = view.bytes::<8>(offset)?
                && (u64::from_le_bytes(magic) == UBERBLOCK || u64::from_be_bytes(magic) == UBERBLOCK)
            {
                return Ok(Some(Signature { name: "ZFS pool member", kind: Kind::VolumeManager, offset }));
            }
        }
    }
    Ok(None)
}
