//! The first sector, which ends in the same two bytes for FAT, for the DOS partition table, and for a boot loader that has
//! neither.

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

/// Recognises FAT by its name. Old FAT has no name, so it is recognised by a BIOS parameter block whose values are all
/// valid.
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

/// Returns whether this is a filesystem that another probe names. Its boot code could be mistaken for partitions.
fn has_file_system_in_boot_sector(sector: &Sector) -> bool {
    [&b"NTFS    "[..], b"EXFAT   ", b"-FVE-FS-"].contains(&&sector[3..11])
}

/// Returns whether each of the four entries is empty or valid, and at least one is not empty.
fn has_partitions(sector: &Sector) -> bool {
    let mut entries = sector[446..510].chunks(16);
    let is_empty = |entry: &[u8]| entry.iter().all(|byte| *byte == 0);
    let is_possible = |entry: &[u8]| (entry[0] & 0x7f) == 0 && entry[4] != 0 && entry[12..16] != [0; 4];
    entries.clone().any(is_possible) && entries.all(|entry| is_empty(entry) || is_possible(entry))
}

/// XORs all 16-bit words of a Sun label, including the checksum. The result is zero if the checksum is correct.
fn sun_checksum(sector: &Sector) -> u16 {
    sector.chunks(2).fold(0, |sum, word| sum ^ u16::from_be_bytes([word[0], word[1]]))
}
