//! A power cut at any write and any sector of a format leaves a blank disk, an unfinished format, or a complete volume with
//! all its data.

use std::cell::Cell;
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};

use bootstrap::volume::content::Look;
use bootstrap::volume::ephemeral::{Leftover, leftover};
use engine::key::{Passphrase, VolumeKey};
use engine::luks::{self, Disks, HashAlgorithm, Limits, LuksError, PendingFormat, luks1, luks2};
use engine::sector::SectorSize;
use engine::signature::{Content, Survey, UNTOUCHED_LEN, Untouched, examine, survey};
use engine::store::{BlockStore, FaultyStore, MemoryStore, Operation};
use engine::xts::Xts;
use harness::luks::{PASSPHRASE, key, noise, quick_luks1, quick_luks2};
use harness::recording::RecordingStore;

const ALIGNMENTS: [usize; 2] = [1, 4096];

#[derive(Clone, Copy, Debug)]
enum Format {
    Luks1,
    Luks2,
}

use Format::{Luks1, Luks2};

impl Format {
    /// Returns the length of a disk with 4 MiB of data.
    fn disk_len(self) -> usize {
        match self {
            Luks1 => (2 + 4) << 20,
            Luks2 => (16 + 4) << 20,
        }
    }

    /// Returns the length of a disk for only the header.
    fn header_len(self) -> usize {
        let len = match self {
            Luks1 => luks1::header_len(VolumeKey::AES_256),
            Luks2 => quick_luks2().layout.header_len(),
        };
        usize::try_from(len).unwrap()
    }

    fn begin<'d>(self, disks: impl Into<Disks<'d>>) -> Result<PendingFormat, LuksError> {
        let passphrase = Passphrase::new(PASSPHRASE.to_vec());
        let (key, random) = (key(VolumeKey::AES_256), &mut noise(3));
        match self {
            Luks1 => luks1::begin(disks, &quick_luks1(HashAlgorithm::Sha256), &passphrase, key, random),
            Luks2 => luks2::begin(disks, &quick_luks2(), &passphrase, key, random),
        }
    }
}

/// Writes what a filesystem would write before the volume is committed.
fn write_data(store: &dyn BlockStore, pending: &PendingFormat) {
    let mut data = vec![0xd5; 65536];
    let segment = pending.segment();
    Xts::new(pending.key()).encrypt(segment.sector_size, segment.iv_start, &mut data);
    store.write_at(&data, segment.offset).unwrap();
}

fn has_data(store: &dyn BlockStore, key: &VolumeKey, segment: engine::layout::Segment) -> bool {
    let mut data = vec![0; 65536];
    store.read_at(&mut data, segment.offset).unwrap();
    Xts::new(key).decrypt(segment.sector_size, segment.iv_start, &mut data);
    data.iter().all(|byte| *byte == 0xd5)
}

#[derive(Debug, PartialEq, Eq, Clone, Copy)]
enum State {
    Blank,
    Unfinished,
    Volume,
}

fn state<'d>(disks: impl Into<Disks<'d>>) -> State {
    let disks = disks.into();
    let disk = disks.header();
    match (luks::read(disks, &Limits::default()), examine(disk).unwrap()) {
        (Err(LuksError::NotLuks), Content::Blank) => State::Blank,
        (Err(LuksError::Unfinished), Content::Unfinished) => State::Unfinished,
        (Ok(volume), Content::Known(_)) => {
            let volume = volume.unlock(disk, &Passphrase::new(PASSPHRASE.to_vec())).unwrap();
            assert_eq!(volume.key.expose(), key(VolumeKey::AES_256).expose());
            assert!(has_data(disks.data(), &volume.key, volume.segment), "the volume has no filesystem");
            State::Volume
        }
        other => panic!("the disk is neither blank nor an unfinished format nor a volume: {other:?}"),
    }
}

/// Returns the states in the order of the cuts, without repetitions.
fn states(store: &RecordingStore) -> Vec<State> {
    let mut seen: Vec<State> = Vec::new();
    store.cut_everywhere(&mut |disk| note(&mut seen, state(disk)));
    seen
}

/// Returns the same states for a header's disk and a separate data disk.
fn detached_states(header: &RecordingStore, data: &RecordingStore) -> Vec<State> {
    let mut seen: Vec<State> = Vec::new();
    header.cut_both_everywhere(data, &mut |header, data| note(&mut seen, state(Disks::detached(header, data))));
    seen
}

fn note(seen: &mut Vec<State>, state: State) {
    if !seen.contains(&state) {
        seen.push(state);
    }
}

/// The disk is blank, an unfinished format, or a complete volume.
#[test]
fn a_format_cut_anywhere_leaves_a_known_state() {
    for (format, alignment) in [Luks1, Luks2].into_iter().flat_map(|format| ALIGNMENTS.map(|blocks| (format, blocks))) {
        let store = RecordingStore::new(vec![0; format.disk_len()], alignment);
        let pending = format.begin(&store).unwrap();
        write_data(&store, &pending);
        pending.commit(&store).unwrap();
        let expected = [State::Blank, State::Unfinished, State::Volume];
        assert_eq!(states(&store), expected, "{format:?}, blocks of {alignment}");
    }
}

#[test]
fn a_detached_format_cut_anywhere_leaves_a_known_state() {
    for (format, alignment) in [Luks1, Luks2].into_iter().flat_map(|format| ALIGNMENTS.map(|blocks| (format, blocks))) {
        let header = RecordingStore::new(vec![0; format.header_len()], alignment);
        // The old content of the data disk does not matter, and is not taken for a volume.
        let data = header.beside(vec![0xa7; 6 << 20]);
        let disks = Disks::detached(&header, &data);
        let pending = format.begin(disks).unwrap();
        write_data(&data, &pending);
        pending.commit(disks).unwrap();
        let expected = [State::Blank, State::Unfinished, State::Volume];
        assert_eq!(detached_states(&header, &data), expected, "{format:?}, blocks of {alignment}");

        let header = RecordingStore::new(vec![0; format.header_len()], alignment);
        let data = header.beside(vec![0xa7; 6 << 20]);
        let disks = Disks::detached(&header, &data);
        format.begin(disks).unwrap().abandon(disks).unwrap();
        let expected = [State::Blank, State::Unfinished];
        assert_eq!(detached_states(&header, &data), expected, "{format:?}, blocks of {alignment}");
        assert_eq!(examine(&header as &dyn BlockStore).unwrap(), Content::Blank);
    }
}

#[test]
fn abandoning_a_format_leaves_a_blank_disk() {
    for (format, alignment) in [Luks1, Luks2].into_iter().flat_map(|format| ALIGNMENTS.map(|blocks| (format, blocks))) {
        let store = RecordingStore::new(vec![0; format.disk_len()], alignment);
        let pending = format.begin(&store).unwrap();
        write_data(&store, &pending);
        pending.abandon(&store).unwrap();
        assert_eq!(states(&store), [State::Blank, State::Unfinished], "{format:?}, blocks of {alignment}");
        assert_eq!(examine(&store as &dyn BlockStore).unwrap(), Content::Blank);
    }
}

#[test]
fn an_abandoned_format_stays_unfinished_until_its_data_is_erased() {
    for format in [Luks1, Luks2] {
        // The data lies beyond the range that is always zeroed. This disk does not support discard.
        let (len, far) = (24 << 20, 20 << 20);
        let store = RecordingStore::new(vec![0; len], 4096);
        let pending = format.begin(&store).unwrap();
        store.write_at(&[0xc5; 4096], far).unwrap();
        pending.abandon(&store).unwrap();
        assert_eq!(states(&store), [State::Blank, State::Unfinished], "{format:?}");
        assert_eq!(survey(&store, &Survey::default()).unwrap(), Content::Unfinished);
        assert_eq!(store.snapshot().iter().filter(|byte| **byte == 0xc5).count(), 4096, "key material is left");
        // This disk supports discard.
        let store = MemoryStore::zeroed(len);
        let pending = format.begin(&store).unwrap();
        store.write_at(&[0xc5; 4096], far).unwrap();
        pending.abandon(&store).unwrap();
        assert!(store.snapshot().iter().all(|byte| *byte == 0), "{format:?}: something is left on the disk");
    }
}

/// A disk on which each start makes a new ephemeral volume can be used by the next start, wherever this one is cut off.
#[test]
fn an_ephemeral_volume_can_be_made_after_every_cut() {
    let new = luks2::Ephemeral { sector_size: SectorSize::B4096, uuid: uuid::Uuid::from_u128(7) };
    let begin = |store: &dyn BlockStore, seed| new.begin(store, key(VolumeKey::AES_256), &mut noise(seed)).unwrap();
    for alignment in ALIGNMENTS {
        for (is_abandoned, is_ours) in [(false, true), (true, true), (false, false)] {
            let mut old = vec![0; 5 << 20];
            if is_ours {
                let disk = MemoryStore::from(old);
                let pending = begin(&disk, 4);
                write_data(&disk, &pending);
                pending.commit(&disk).unwrap();
                old = disk.snapshot();
            } else {
                noise(5)(&mut old).unwrap();
            }
            let store = RecordingStore::new(old, alignment);
            let pending = begin(&store, 6);
            write_data(&store, &pending);
            match is_abandoned {
                true => pending.abandon(&store).unwrap(),
                false => drop(pending.commit(&store).unwrap()),
            }
            let (mut unfinished, mut marks) = (0, 0);
            store.cut_everywhere(&mut |disk| {
                let content = examine(disk as &dyn BlockStore).unwrap();
                match leftover(disk, &content, Look::Ends).unwrap() {
                    Some(Leftover::Mark) => marks += 1,
                    Some(left) => assert!(left == Leftover::Noise && !is_ours, "{content}"),
                    None if content == Content::Unfinished => unfinished += 1,
                    None => assert_eq!(content, Content::Blank),
                }
            });
            assert!(unfinished > 0 && (marks > 0 || !is_ours), "{alignment}, {is_abandoned}, {is_ours}");
        }
    }
}

/// The data disk itself is marked as abandoned, until something is written to it.
#[test]
fn the_data_disk_of_an_abandoned_format_is_recognised() {
    for (format, alignment) in [Luks1, Luks2].into_iter().flat_map(|format| ALIGNMENTS.map(|blocks| (format, blocks))) {
        let header = RecordingStore::new(vec![0; format.header_len()], alignment);
        // This disk does not support discard.
        let data = header.beside(vec![0; 8 << 20]);
        let disks = Disks::detached(&header, &data);
        let pending = format.begin(disks).unwrap();
        data.write_at(&[0xc5; 4096], 5 << 20).unwrap();
        pending.abandon(disks).unwrap();
        assert_eq!(detached_states(&header, &data), [State::Blank, State::Unfinished], "{format:?}");
        assert_eq!(survey(&header, &Survey::default()).unwrap(), Content::Blank);
        assert_eq!(survey(&data, &Survey::default()).unwrap(), Content::Unfinished);
        assert!(luks::is_abandoned(&data).unwrap(), "{format:?}, blocks of {alignment}");
        // Another program uses the disk and leaves its first block unchanged.
        data.write_at(&[0xc6; 4096], 6 << 20).unwrap();
        assert!(!luks::is_abandoned(&data).unwrap());
        // A complete volume has no such mark.
        let pending = format.begin(disks).unwrap();
        write_data(&data, &pending);
        pending.commit(disks).unwrap();
        assert!(!luks::is_abandoned(&data).unwrap());
    }
    // A disk on which an attached format was begun has no such mark.
    let store = MemoryStore::zeroed(Luks1.disk_len());
    drop(Luks1.begin(&store).unwrap());
    assert!(!luks::is_abandoned(&store).unwrap());
}

/// A block device on which a discard may take hours. No signal interrupts it.
struct SlowDisk(MemoryStore);

impl BlockStore for SlowDisk {
    fn len(&self) -> u64 {
        self.0.len()
    }

    fn read_at(&self, data: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.read_at(data, offset)
    }

    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        self.0.write_at(data, offset)
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn discard(&self, _offset: u64, _len: u64) -> io::Result<()> {
        panic!("a discard that takes hours")
    }

    fn discards_quickly(&self) -> bool {
        false
    }
}

#[test]
fn abandoning_a_format_discards_nothing_on_a_slow_disk() {
    for format in [Luks1, Luks2] {
        let (disk, header) = (SlowDisk(MemoryStore::zeroed(30 << 20)), MemoryStore::zeroed(format.header_len()));
        for disks in [Disks::from(&disk), Disks::detached(&header, &disk)] {
            let pending = format.begin(disks).unwrap();
            disk.write_at(&[0xc5; 4096], 20 << 20).unwrap();
            pending.abandon(disks).unwrap();
            assert_eq!(survey(&disk, &Survey::default()).unwrap(), Content::Unfinished);
        }
        assert_eq!(survey(&header, &Survey::default()).unwrap(), Content::Blank);
    }
}

#[test]
fn a_new_volume_is_untouched_until_data_is_written() {
    for (format, alignment) in [Luks1, Luks2].into_iter().flat_map(|format| ALIGNMENTS.map(|blocks| (format, blocks))) {
        let len = format.disk_len() + (80 << 20);
        let mut old = vec![0; len];
        noise(5)(&mut old).unwrap();
        let store = RecordingStore::new(old, alignment);
        let pending = format.begin(&store).unwrap();
        pending.mark_untouched(&store, 11).unwrap();
        let segment = pending.commit(&store).unwrap();
        let window = segment.offset..segment.offset + segment.len;
        let mark = || {
            let mut start = [0; UNTOUCHED_LEN];
            store.read_at(&mut start, segment.offset).unwrap();
            Xts::new(pending.key()).decrypt(segment.sector_size, segment.iv_start, &mut start);
            Untouched::parse(&start)
        };
        assert!(mark().unwrap().is_true(&store, window.clone()).unwrap(), "{format:?}");
        // A write anywhere in the first 18 MiB of the data is noticed.
        let mut block = vec![0; 4096];
        store.read_at(&mut block, segment.offset + (9 << 20)).unwrap();
        block[77] ^= 1;
        store.write_at(&block, segment.offset + (9 << 20)).unwrap();
        assert!(!mark().unwrap().is_true(&store, window.clone()).unwrap(), "{format:?}");
        store.write_at(&vec![0; 4096], segment.offset).unwrap();
        assert_eq!(mark(), None);
    }
    // A blank disk needs no mark.
    let store = MemoryStore::zeroed(Luks1.disk_len());
    let pending = Luks1.begin(&store).unwrap();
    pending.mark_untouched(&store, 11).unwrap();
    assert!(store.snapshot()[2 << 20..].iter().all(|byte| *byte == 0));
}

#[test]
fn an_unfinished_format_can_be_abandoned_or_begun_again() {
    for (first, second) in [(Luks1, Luks2), (Luks2, Luks1)] {
        let store = MemoryStore::zeroed(Luks2.disk_len());
        drop(first.begin(&store).unwrap());
        let pending = second.begin(&store).unwrap();
        write_data(&store, &pending);
        pending.commit(&store).unwrap();
        assert_eq!(state(&store), State::Volume);
        let error = luks::abandon_unfinished(&store).unwrap_err();
        assert_eq!((error.kind(), state(&store)), (io::ErrorKind::InvalidData, State::Volume));

        drop(first.begin(&store).unwrap());
        luks::abandon_unfinished(&store).unwrap();
        assert_eq!(state(&store), State::Blank);
        assert!(store.snapshot()[..17 << 20].iter().all(|byte| *byte == 0), "key material is left");
    }
}

#[test]
fn other_data_over_an_unfinished_format_is_kept() {
    for format in [Luks1, Luks2] {
        let store = MemoryStore::zeroed(format.disk_len());
        let pending = format.begin(&store).unwrap();
        store.write_at(&[0xa5; 512], 0).unwrap();
        let theirs = store.snapshot();
        assert!(matches!(pending.commit(&store), Err(LuksError::Overwritten)));
        assert!(matches!(pending.abandon(&store), Err(LuksError::Overwritten)));
        assert!(store.snapshot() == theirs, "{format:?}: something was written to the disk");
    }
}

#[test]
fn a_format_erases_old_signatures() {
    let len = Luks1.disk_len();
    let store = MemoryStore::from(vec![0x5a; len]);
    drop(Luks1.begin(&store).unwrap());
    let disk = store.snapshot();
    assert!(disk[2 << 20..3 << 20].iter().all(|byte| *byte == 0));
    assert!(disk[len - (1 << 20)..].iter().all(|byte| *byte == 0));
    // The second header of a LUKS2 volume with large metadata.
    assert!(disk[4 << 20..(4 << 20) + 512].iter().all(|byte| *byte == 0));
    assert_eq!(disk[(3 << 20) + 1], 0x5a, "only ranges that can hold a signature are erased");
}

#[test]
fn a_failed_format_never_leaves_a_volume_without_data() {
    for format in [Luks1, Luks2] {
        for failing in 0.. {
            let count = AtomicUsize::new(0);
            let store = FaultyStore::new(MemoryStore::zeroed(format.disk_len()), move |operation| {
                let counts = matches!(operation, Operation::Write(..) | Operation::Flush);
                (counts && count.fetch_add(1, Ordering::Relaxed) == failing).then_some(io::ErrorKind::StorageFull)
            });
            let committing = Cell::new(false);
            let result = format.begin(&store).and_then(|pending| {
                write_data(store.inner(), &pending);
                committing.set(true);
                pending.commit(&store)
            });
            match result {
                Ok(_) => {
                    assert!(failing > 8, "a format has more than {failing} operations");
                    break;
                }
                Err(LuksError::Store(error)) => assert_eq!(error.kind(), io::ErrorKind::StorageFull),
                Err(other) => panic!("{other}"),
            }
            // The commit can fail after the header was written. The data is there by then, as `state` checks.
            let state = state(store.inner());
            assert!(state != State::Volume || committing.get(), "{format:?}, operation {failing}: {state:?}");
        }
    }
}

#[test]
fn a_disk_too_small_for_data_is_refused_unchanged() {
    for (format, header) in [(Luks1, 2 << 20), (Luks2, 16 << 20)] {
        let store = RecordingStore::new(vec![0; header], 4096);
        let error = format.begin(&store).unwrap_err();
        assert!(matches!(error, LuksError::TooSmall { needed, .. } if needed == header as u64 + 4096), "{error}");
        assert_eq!(states(&store), [State::Blank]);
        let store = MemoryStore::zeroed(header + 4096);
        format.begin(&store).unwrap().commit(&store).unwrap();
        luks::read(&store, &Limits::default()).unwrap();
    }
}
