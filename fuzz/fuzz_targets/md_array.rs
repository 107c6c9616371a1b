//! Reads arbitrary bytes as an md superblock, and puts members with arbitrary superblocks together. The superblock is refused or
//! parsed. What is written is read again. Where an array can be assembled, each of its bytes lies within a member.
#![no_main]

use engine::layout::ZoneLayout;
use engine::raid::{Array, Found, Name, Role, SUPERBLOCK_LEN, Superblock};
use uuid::Uuid;

/// Bytes of the input that make one member.
const MEMBER: usize = 24;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let mut repaired = bytes.to_vec();
    repair(&mut repaired);
    if let Ok(superblock) = Superblock::parse(&repaired) {
        let again = Superblock::parse(&superblock.to_bytes());
        assert_eq!(again, Ok(superblock));
    }
    let found: Vec<Found> =
        bytes.chunks_exact(MEMBER).take(16).enumerate().map(|(n, bytes)| member(n, bytes)).collect();
    let Ok(array) = Array::assemble(&found) else { return };
    for at in [0, array.map.len() / 3, array.map.len() - 1] {
        let piece = array.map.locate(at).expect("the byte lies before the end");
        let disk = &found[array.disks[piece.member]];
        assert!(piece.len > 0 && piece.offset + piece.len <= disk.disk_len);
    }
    assert_eq!(array.map.locate(array.map.len()), None);
    let (from, len) = (array.map.len() / 3, array.map.chunk() * 40);
    let pieces: u64 = array.map.pieces(from, len).map(|piece| piece.len).sum();
    let extents: u64 = array.map.extents(from, len).iter().map(|piece| piece.len).sum();
    assert_eq!(pieces, extents);
});

/// Sets the magic number and the checksum, which random bytes hardly ever have.
fn repair(bytes: &mut [u8]) {
    let Some(max_dev) = bytes.get(220..224).map(|word| u16::from_le_bytes([word[0], word[1]])) else { return };
    bytes[..4].copy_from_slice(&0xa92b_4efcu32.to_le_bytes());
    bytes[216..220].fill(0);
    let end = bytes.len().min(256 + 2 * usize::from(max_dev));
    let sum: u64 =
        bytes[..end].chunks(4).map(|word| word.iter().rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte))).sum();
    bytes[216..220].copy_from_slice(&(((sum & 0xffff_ffff) + (sum >> 32)) as u32).to_le_bytes());
}

/// Makes a disk with a superblock. Each field is one of few likely values, or taken from the input.
fn member(place: usize, bytes: &[u8]) -> Found {
    let word = |at: usize| u64::from(u16::from_le_bytes([bytes[at], bytes[at + 1]]));
    let superblock = Superblock {
        array: Uuid::from_u128(u128::from(bytes[0] / 250)),
        name: Name::new(&String::from_utf8_lossy(&bytes[20..24]).replace('\0', "")).unwrap_or_default(),
        created: word(1),
        members: u32::from(bytes[3] % 18),
        chunk: 512 << (bytes[4] % 24),
        layout: [None, Some(ZoneLayout::Original), Some(ZoneLayout::Alternate)][usize::from(bytes[5] % 3)],
        data_offset: 8192 + word(6) * 512,
        data_len: (word(8) << (bytes[10] % 48)) & !511,
        number: u32::from(bytes[11]),
        device: Uuid::from_u128(u128::from(bytes[12])),
        updated: word(13),
        events: u64::from(bytes[15] / 100),
        block_size: if bytes[14] == 7 { 4096 } else { 0 },
        roles: (0..u16::from(bytes[16]))
            .map(|n| if bytes[17] == 255 { Role::Spare } else { Role::Active(n) })
            .collect(),
    };
    let superblock =
        Superblock { number: if bytes[11] > 200 { superblock.number } else { place as u32 }, ..superblock };
    let written = superblock.to_bytes();
    assert_eq!(written.len(), SUPERBLOCK_LEN);
    let disk_len = (superblock.data_offset + superblock.data_len).saturating_add(word(18)).saturating_sub(9);
    Found { disk_len, alignment: 512 << (bytes[2] % 5), superblock: Superblock::parse(&written) }
}
