use super::*;
use crate::store::MemoryStore;

const LEN: usize = 8 << 20;

fn disk(pieces: &[(usize, &[u8])]) -> MemoryStore {
    let mut bytes = vec![0; LEN];
    for (offset, piece) in pieces {
        bytes[*offset..offset + piece.len()].copy_from_slice(piece);
    }
    MemoryStore::from(bytes)
}

fn names(store: &MemoryStore) -> Vec<&'static str> {
    probe(store as &dyn BlockStore).unwrap().into_iter().map(|signature| signature.name).collect()
}

fn content(store: &MemoryStore) -> Content {
    examine(store as &dyn BlockStore).unwrap()
}

#[test]
fn zeros_are_blank_whatever_their_length() {
    for len in [0, 1, 511, 512, 4096, 65536, (1 << 20) + 1, LEN] {
        assert_eq!(content(&MemoryStore::zeroed(len)), Content::Blank, "{len}");
    }
}

#[test]
fn the_first_byte_of_unknown_data_is_named() {
    assert_eq!(content(&disk(&[(777_777, &[1])])), Content::Unknown { offset: 777_777 });
    assert_eq!(content(&disk(&[((1 << 20) - 1, &[1])])), Content::Unknown { offset: (1 << 20) - 1 });
    assert_eq!(content(&disk(&[(1 << 20, &[1])])), Content::Blank, "only the first megabyte counts");
}

#[test]
fn marks_at_the_end_and_beyond_the_first_megabyte_are_seen() {
    assert_eq!(names(&disk(&[(LEN - 512, b"EFI PART")])), ["GPT partition table (backup)"]);
    assert_eq!(names(&disk(&[(0x40_0000, b"SKUL\xba\xbe")])), ["LUKS2 (secondary header)"]);
    assert_eq!(names(&disk(&[(LEN - 8192, b"\xfc\x4e\x2b\xa9\x01\0\0\0")])), ["Linux md RAID (1.0)"]);
    assert_eq!(names(&disk(&[(LEN - 65536, b"\xfc\x4e\x2b\xa9\x00\0\0\0")])), ["Linux md RAID (0.90)"]);
    assert_eq!(names(&disk(&[(LEN - 1024, b"Intel Raid ISM Cfg Sig. 1.0")])), ["Intel Matrix RAID"]);
    assert_eq!(names(&disk(&[(LEN - 131_072, &0x00ba_b10c_u64.to_be_bytes())])), ["ZFS pool member"]);
}

#[test]
fn a_boot_sector_is_told_from_a_partition_table_and_from_fat() {
    let boots: (usize, &[u8]) = (510, &[0x55, 0xaa]);
    let linux = [0x80, 0, 0, 0, 0x83, 0, 0, 0, 0, 8, 0, 0, 0, 16, 0, 0];
    assert_eq!(names(&disk(&[boots])), ["boot sector"]);
    assert_eq!(names(&disk(&[boots, (446, &linux)])), ["DOS partition table"]);
    assert_eq!(names(&disk(&[boots, (54, b"FAT16   ")])), ["vfat"]);
    assert_eq!(names(&disk(&[boots, (3, b"NTFS    "), (446, &linux)])), ["ntfs"]);
    let nameless = [0xeb, 0x3c, 0x90, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 4, 1, 0, 2, 0, 2, 0, 16, 0xf8];
    assert_eq!(names(&disk(&[boots, (0, &nameless)])), ["vfat"]);
}

#[test]
fn an_unfinished_format_is_free_only_when_nothing_else_is_there() {
    let marker: (usize, &[u8]) = (0, b"nbdcrypt: unfinished format\n");
    assert_eq!(content(&disk(&[marker])), Content::Unfinished);
    // Somebody else has used the disk since, and left sector 0 alone, as md and btrfs do.
    let md: (usize, &[u8]) = (4096, b"\xfc\x4e\x2b\xa9\x01\0\0\0");
    assert!(matches!(content(&disk(&[marker, md])), Content::Known(found) if found.len() == 2));
}

#[test]
fn what_is_found_reads_as_a_sentence_goes_on() {
    let found = content(&disk(&[(0, b"LUKS\xba\xbe\x00\x02"), (0x4000, b"SKUL\xba\xbe"), (LEN - 512, b"EFI PART")]));
    assert_eq!(found.to_string(), "LUKS2 volume, LUKS2 (secondary header) volume, GPT partition table (backup)");
}

#[test]
fn noise_has_no_signature() {
    let mut state = 7u64;
    let bytes = (0..LEN)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            state.to_le_bytes()[7]
        })
        .collect::<Vec<u8>>();
    let store = MemoryStore::from(bytes);
    assert_eq!(names(&store), [""; 0]);
    assert_eq!(content(&store), Content::Unknown { offset: 0 });
}
