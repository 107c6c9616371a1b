//! Reads arbitrary bytes as an md superblock, and puts members with arbitrary superblocks together. The superblock is refused or
//! parsed. What is written is read again. Where an array can be assembled, each of its bytes lies within a member.
#![no_main]

use engine::layout::ZoneLayout;
use engine::raid::{Array, Found, Role, SUPERBLOCK_LEN, Superblock};
use uuid::Uuid;

/// Bytes of the input that make one member.
const MEMBER: usize = 24;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    if let Ok(superblock) = Superblock::parse(bytes) {
        let again = Superblock::parse(&superblock.to_bytes());
        assert_eq!(again.map(|again| again.roles), Ok(superblock.roles));
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

/// Makes a disk with a superblock. Each field is one of few likely values, or taken from the input.
fn member(place: usize, bytes: &[u8]) -> Found {
    let word = |at: usize| u64::from(u16::from_le_bytes([bytes[at], bytes[at + 1]]));
    let superblock = Superblock {
        array: Uuid::from_u128(u128::from(bytes[0] / 250)),
        name: String::from_utf8_lossy(&bytes[20..24]).into_owned(),
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
        roles: (0..u16::from(bytes[16]))
            .map(|n| if bytes[17] == 255 { Role::Spare } else { Role::Active(n) })
            .collect(),
    };
    let superblock =
        Superblock { number: if bytes[11] > 200 { superblock.number } else { place as u32 }, ..superblock };
    let written = superblock.to_bytes();
    assert_eq!(written.len(), SUPERBLOCK_LEN);
    let disk_len = (word(18) << 40).max(superblock.data_len.saturating_mul(2));
    Found { disk_len, superblock: Superblock::parse(&written) }
}
