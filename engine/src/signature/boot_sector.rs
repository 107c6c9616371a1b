//! The first sector: FAT, the DOS partition table, and a boot loader alone, which all end in the same two bytes.

use std::io;

use super::view::View;
use super::{Kind, Signature};

type Sector = [u8; 512];

pub(super) fn probe(view: &View<'_>) -> io::Result<Vec<Signature>> {
    let Some(sector) = view.bytes::<512>(0)? else {
        return Ok(Vec::new());
    };
    let signature = |name, kind, offset| Some(Signature { name, kind, offset });
    let boots = sector[510..] == [0x55, 0xaa];
    let found = if let Some(offset) = fat(&sector) {
        signature("vfat", Kind::Filesystem, offset)
    } else if boots && has_file_system_in_boot_sector(&sector) {
        None
    } else if boots && has_partitions(&sector) {
        signature("DOS partition table", Kind::PartitionTable, 510)
    } else if boots {
        signature("boot sector", Kind::PartitionTable, 510)
    } else if sector[508..510] == [0xda, 0xbe] && sun_checksum(&sector) == 0 {
        signature("Sun disk label", Kind::PartitionTable, 508)
    } else {
        None
    };
    Ok(found.into_iter().collect())
}

/// FAT by its name, or by a BIOS parameter block in which every field is possible, as old ones have no name.
fn fat(sector: &Sector) -> Option<u64> {
    let named = [(82, b"FAT32   "), (54, b"FAT12   "), (54, b"FAT16   "), (54, b"FAT     ")];
    if let Some((at, _)) = named.iter().find(|(at, name)| sector[*at..].starts_with(*name)) {
        return Some(*at as u64);
    }
    let jumps = matches!(sector[..3], [0xeb, _, 0x90] | [0xe9, _, _]);
    let sector_bytes = u16::from_le_bytes([sector[11], sector[12]]);
    let possible = sector[510..] == [0x55, 0xaa]
        && jumps
        && (512..=4096).contains(&sector_bytes)
        && sector_bytes.is_power_of_two()
        && sector[13].is_power_of_two()
        && sector[14..16] != [0, 0]
        && (1..=2).contains(&sector[16])
        && (sector[21] == 0xf0 || sector[21] >= 0xf8);
    possible.then_some(0)
}

/// Filesystems that other probes name, whose boot code would be taken for partitions.
fn has_file_system_in_boot_sector(sector: &Sector) -> bool {
    [&b"NTFS    "[..], b"EXFAT   ", b"-FVE-FS-"].contains(&&sector[3..11])
}

/// Four entries, each empty or possible, and not all of them empty.
fn has_partitions(sector: &Sector) -> bool {
    let mut entries = sector[446..510].chunks(16);
    let is_empty = |entry: &[u8]| entry.iter().all(|byte| *byte == 0);
    let is_possible = |entry: &[u8]| (entry[0] & 0x7f) == 0 && entry[4] != 0 && entry[12..16] != [0; 4];
    entries.clone().any(is_possible) && entries.all(|entry| is_empty(entry) || is_possible(entry))
}

/// All 16-bit words of a Sun label, the checksum among them, cancel out.
fn sun_checksum(sector: &Sector) -> u16 {
    sector.chunks(2).fold(0, |sum, word| sum ^ u16::from_be_bytes([word[0], word[1]]))
}
