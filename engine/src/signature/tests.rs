use super::*;
use crate::store::{BlockStore, MemoryStore};

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
    assert_eq!(content(&disk(&[(1 << 20, &[1])])), Content::Blank, "only the two ends are examined");
}

#[test]
fn signatures_far_from_the_start_are_found() {
    assert_eq!(names(&disk(&[(LEN - 512, b"EFI PART")])), ["GPT partition table (backup)"]);
    assert_eq!(names(&disk(&[(0x40_0000, b"SKUL\xba\xbe")])), ["LUKS2 (secondary header)"]);
    assert_eq!(names(&disk(&[(LEN - 8192, b"\xfc\x4e\x2b\xa9\x01\0\0\0")])), ["Linux md RAID (1.0)"]);
    assert_eq!(names(&disk(&[(LEN - 65536, b"\xfc\x4e\x2b\xa9\x00\0\0\0")])), ["Linux md RAID (0.90)"]);
    assert_eq!(names(&disk(&[(LEN - 1024, b"Intel Raid ISM Cfg Sig. 1.0")])), ["Intel Matrix RAID"]);
    assert_eq!(names(&disk(&[(LEN - 131_072, &0x00ba_b10c_u64.to_be_bytes())])), ["ZFS pool member"]);
}

#[test]
fn boot_sectors_partition_tables_and_fat_are_told_apart() {
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
fn an_unfinished_format_is_free_only_without_other_signatures() {
    let marker: (usize, &[u8]) = (0, b"nbdcrypt: unfinished format\n");
    assert_eq!(content(&disk(&[marker])), Content::Unfinished);
    // Since then, another program has used the disk without writing to sector 0, as md and btrfs do.
    let md: (usize, &[u8]) = (4096, b"\xfc\x4e\x2b\xa9\x01\0\0\0");
    assert!(matches!(content(&disk(&[marker, md])), Content::Known(found) if found.len() == 2));
}

#[test]
fn several_signatures_are_displayed_as_a_list() {
    let found = content(&disk(&[(0, b"LUKS\xba\xbe\x00\x02"), (0x4000, b"SKUL\xba\xbe"), (LEN - 512, b"EFI PART")]));
    assert_eq!(found.to_string(), "LUKS2 volume, GPT partition table (backup)");
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

/// A disk of zeros with a few pieces of data. It reports its holes only if `tells_holes` is set, and counts the bytes
/// that are read.
struct Sparse {
    len: u64,
    pieces: Vec<(u64, Vec<u8>)>,
    /// Ranges of zeros that count as allocated.
    kept: Vec<std::ops::Range<u64>>,
    tells_holes: bool,
    read: std::sync::atomic::AtomicU64,
}

impl Sparse {
    fn new(len: u64, pieces: &[(u64, &[u8])]) -> Self {
        let pieces = pieces.iter().map(|(offset, bytes)| (*offset, bytes.to_vec())).collect();
        Self { len, pieces, kept: Vec::new(), tells_holes: false, read: std::sync::atomic::AtomicU64::new(0) }
    }

    fn surveyed(&self) -> Content {
        survey(self, &Survey { seed: 7, overwritten: &[] }).unwrap()
    }
}

impl BlockStore for Sparse {
    fn len(&self) -> u64 {
        self.len
    }

    fn read_at(&self, data: &mut [u8], offset: u64) -> io::Result<()> {
        data.fill(0);
        self.read.fetch_add(data.len() as u64, std::sync::atomic::Ordering::Relaxed);
        let end = offset + data.len() as u64;
        assert!(end <= self.len, "{} bytes at {offset} are read past the end", data.len());
        for (at, piece) in &self.pieces {
            let (from, to) = (offset.max(*at), end.min(at + piece.len() as u64));
            if from < to {
                let [here, there] = [from - offset, from - at].map(|index| usize::try_from(index).unwrap());
                let len = usize::try_from(to - from).unwrap();
                data[here..here + len].copy_from_slice(&piece[there..there + len]);
            }
        }
        Ok(())
    }

    fn write_at(&self, _data: &[u8], _offset: u64) -> io::Result<()> {
        unreachable!("a survey writes nothing")
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn discard(&self, _offset: u64, _len: u64) -> io::Result<()> {
        unreachable!("a survey discards nothing")
    }

    fn allocation(&self, offset: u64) -> io::Result<crate::store::Allocation> {
        use crate::store::Allocation;
        if !self.tells_holes {
            return Ok(Allocation { end: self.len, is_hole: false });
        }
        let pieces = self.pieces.iter().map(|(at, piece)| *at..at + piece.len() as u64);
        // Filesystems allocate whole blocks.
        let kept = pieces.map(|piece| piece.start / 4096 * 4096..piece.end.next_multiple_of(4096).min(self.len));
        let mut kept: Vec<_> = kept.chain(self.kept.iter().cloned()).collect();
        kept.sort_by_key(|range| range.start);
        Ok(match kept.iter().find(|range| range.end > offset) {
            Some(range) if range.start <= offset => Allocation { end: range.end, is_hole: false },
            Some(range) => Allocation { end: range.start, is_hole: true },
            None => Allocation { end: self.len, is_hole: true },
        })
    }
}

/// Returns the part of a superblock that identifies ext4 (kernel: fs/ext4/ext4.h): s_magic, has_journal, extents.
fn ext4() -> Vec<u8> {
    let mut bytes = vec![0; 2048];
    bytes[1024 + 0x38..1024 + 0x3a].copy_from_slice(&0xef53_u16.to_le_bytes());
    bytes[1024 + 0x5c] = 4;
    bytes[1024 + 0x60] = 0x40;
    bytes
}

const GIB: u64 = 1 << 30;

#[test]
fn a_filesystem_behind_a_wiped_beginning_is_named() {
    let ext4 = ext4();
    for start in [63 * 512, 34 * 512, 1 << 20, 2 << 20, 4 << 20, 17 << 20, 513 << 20, 1025 << 20, 8 * GIB + (1 << 20)] {
        for tells_holes in [false, true] {
            let disk = Sparse { tells_holes, ..Sparse::new(100 * GIB, &[(start, &ext4)]) };
            match disk.surveyed() {
                Content::Within { start: found, found: marks } => {
                    assert_eq!((found, marks[0].name, marks[0].offset), (start, "ext4", start + 1024 + 56));
                }
                other => panic!("{start}: {other:?}"),
            }
        }
    }
}

#[test]
fn distant_remains_of_a_lost_partition_are_found() {
    let len = 931 * GIB;
    let partition_end = (len - 33 * 512) / (1 << 20) * (1 << 20);
    let group = ((partition_end - (1 << 20)) / 4096).div_ceil(4) * 4096;
    let places = [
        // Superblocks of ext4 in groups 9 and 25, of btrfs at 256 GiB, and of xfs in the groups 1 and 3.
        (1 << 20) + 9 * (128 << 20),
        25 * (128 << 20),
        (1 << 20) + 256 * GIB,
        (1 << 20) + group,
        (1 << 20) + 3 * group,
        // md 1.0 and a ZFS label at the end of a partition.
        partition_end - 8192,
        partition_end - (256 << 10) + (128 << 10),
    ];
    for place in places {
        let disk = Sparse::new(len, &[(place, &[0x58; 64])]);
        assert_eq!(disk.surveyed(), Content::Unknown { offset: place }, "{place}");
    }
}

#[test]
fn a_half_empty_disk_is_not_blank() {
    let len = 400 << 20;
    let noise = vec![0xa5; len / 2];
    let half = (len / 2) as u64;
    for (start, tells_holes) in [(half, false), (half, true), (half / 2 + (20 << 20), false)] {
        let disk = Sparse { tells_holes, ..Sparse::new(len as u64, &[(start, &noise)]) };
        assert!(matches!(disk.surveyed(), Content::Unknown { offset } if offset >= start), "{start}");
    }
    // The data covers a two-thousandth of the disk. This is more than two sampled parts, and the survey reads one block
    // of each part.
    let disk = Sparse::new(100 * GIB, &[(77_777_777_777, &vec![1; 51 << 20])]);
    assert!(matches!(disk.surveyed(), Content::Unknown { .. }));
}

/// Several threads find data.
#[test]
fn the_answer_does_not_depend_on_which_thread_is_faster() {
    let disk = Sparse::new(400 << 20, &[(100 << 20, &vec![0xa5; 200 << 20])]);
    for _ in 0..20 {
        assert_eq!(disk.surveyed(), Content::Unknown { offset: 100 << 20 });
    }
}

#[test]
fn one_byte_anywhere_in_a_sparse_file_is_found() {
    let len = 100 * GIB + 4096;
    for place in [(1 << 20) + 1, 77_777_777, 50 * GIB + 12_345_678, len - 1] {
        let disk = Sparse { tells_holes: true, ..Sparse::new(len, &[(place, &[1])]) };
        assert_eq!(disk.surveyed(), Content::Unknown { offset: place });
        // Written zeros are all read if they are few, and sampled if they are many.
        let disk = Sparse { kept: vec![(20 << 20)..(60 << 20), 90 * GIB..99 * GIB], ..disk };
        assert_eq!(disk.surveyed(), Content::Unknown { offset: place });
    }
}

/// A disk whose reads return only after four were in flight at the same time.
struct Together {
    disk: Sparse,
    in_flight: std::sync::Mutex<(usize, usize)>,
    more: std::sync::Condvar,
}

impl BlockStore for Together {
    fn len(&self) -> u64 {
        self.disk.len()
    }

    fn read_at(&self, data: &mut [u8], offset: u64) -> io::Result<()> {
        let mut in_flight = self.in_flight.lock().unwrap();
        in_flight.0 += 1;
        in_flight.1 = in_flight.1.max(in_flight.0);
        self.more.notify_all();
        let wait = std::time::Duration::from_secs(20);
        let (mut in_flight, timeout) = self.more.wait_timeout_while(in_flight, wait, |it| it.1 < 4).unwrap();
        in_flight.0 -= 1;
        drop(in_flight);
        if timeout.timed_out() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        self.disk.read_at(data, offset)
    }

    fn write_at(&self, _data: &[u8], _offset: u64) -> io::Result<()> {
        unreachable!("a fingerprint writes nothing")
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn discard(&self, _offset: u64, _len: u64) -> io::Result<()> {
        unreachable!("a fingerprint discards nothing")
    }
}

/// A network disk answers each read only after a millisecond, and there are thousands of reads.
#[test]
fn a_fingerprint_is_read_by_several_threads_and_in_order() {
    let len = 10 * GIB;
    let sparse = || Sparse::new(len, &[(3 * GIB, &[0x77; 1 << 20])]);
    let alone = Untouched::of(&sparse(), 4096..len, 7).unwrap();
    let disk = Together { disk: sparse(), in_flight: std::sync::Mutex::default(), more: std::sync::Condvar::new() };
    assert_eq!(Untouched::of(&disk, 4096..len, 7).unwrap(), alone);
    assert!(!alone.is_true(&Sparse::new(len, &[]), 4096..len).unwrap());
    let how = Survey { seed: 7, overwritten: &[] };
    let reads = survey::reads_of_a_disk_without_holes(&(4096..len), &how);
    assert!(reads.is_sorted_by_key(|read| read.start) && reads.len() > 6000, "{}", reads.len());
}

#[test]
fn surveying_a_blank_disk_reads_a_bounded_amount() {
    for (len, most) in
        [(4096, 1 << 20), (60 << 20, 64 << 20), (GIB, 64 << 20), (100 * GIB, 64 << 20), (16 << 40, 64 << 20)]
    {
        let disk = Sparse::new(len, &[]);
        assert_eq!(disk.surveyed(), Content::Blank);
        let read = disk.read.load(std::sync::atomic::Ordering::Relaxed);
        assert!(read <= most, "{len}: {read} bytes were read");
    }
    let disk = Sparse { tells_holes: true, ..Sparse::new(16 << 40, &[]) };
    assert_eq!(disk.surveyed(), Content::Blank);
    assert!(disk.read.load(std::sync::atomic::Ordering::Relaxed) <= 4 << 20, "holes are not read");
}

#[test]
fn ranges_to_be_overwritten_are_read_completely() {
    let place = 100_000_001;
    let disk = Sparse::new(100 * GIB, &[(place, &[1])]);
    assert_eq!(disk.surveyed(), Content::Blank, "the test needs a byte that no sample meets");
    let overwritten = 0..136 << 20;
    let how = Survey { seed: 7, overwritten: std::slice::from_ref(&overwritten) };
    assert_eq!(survey(&disk, &how).unwrap(), Content::Unknown { offset: place });
}

#[test]
fn a_window_is_surveyed_as_a_disk_of_its_own() {
    let start = (16 << 20) + 512;
    let disk = Sparse::new(10 * GIB + 512, &[(0, &[1; 4096]), (10 * GIB, &[1; 512])]);
    let how = Survey::default();
    assert_eq!(first_written(&disk, start..10 * GIB, &how).unwrap(), None);
    assert_eq!(first_written(&disk, start..disk.len(), &how).unwrap(), Some(10 * GIB - start));
    let disk = Sparse::new(10 * GIB + 512, &[(start + (513 << 20) + 1080, &[1])]);
    assert_eq!(first_written(&disk, start..10 * GIB, &how).unwrap(), Some((513 << 20) + 1080));
}

#[test]
fn an_unfinished_format_is_free_whatever_it_left_behind() {
    let marker = b"nbdcrypt: unfinished format\n";
    let disk = Sparse::new(GIB, &[(0, marker), (1 << 20, &[0x77; 65536]), (100 << 20, &[0x77; 65536])]);
    assert_eq!(disk.surveyed(), Content::Unfinished);
}

#[test]
fn sizes_are_displayed_in_the_unit_that_fits() {
    for (bytes, text) in [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1024, "1 KiB"),
        (777_777, "759.5 KiB"),
        (1 << 20, "1 MiB"),
        (3 << 29, "1.5 GiB"),
        (u64::MAX, "16383.9 PiB"),
    ] {
        assert_eq!(Size(bytes).to_string(), text);
    }
}
