//! Formatting can be cut off at any write and any sector: what is found then is a blank disk, an unfinished format, or a
//! whole volume with all that was written to it.

use std::cell::Cell;
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};

use engine::key::{Passphrase, VolumeKey};
use engine::luks::{self, Disks, HashAlgorithm, Limits, LuksError, PendingFormat, luks1, luks2};
use engine::signature::{Content, examine};
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
    /// A disk on which the data has 4 MiB.
    fn disk_len(self) -> usize {
        match self {
            Luks1 => (2 + 4) << 20,
            Luks2 => (16 + 4) << 20,
        }
    }

    /// A disk for the header alone.
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

/// What a filesystem would write before the volume counts.
fn write_data(store: &dyn BlockStore, pending: &PendingFormat) {
    let mut data = vec![0xd5; 65536];
    let segment = pending.segment();
    Xts::new(pending.key()).encrypt(segment.sector_size, segment.iv_start, &mut data);
    store.write_at(&data, segment.offset).unwrap();
}

fn has_data(store: &dyn BlockStore, key: &VolumeKey, segment: luks::Segment) -> bool {
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
            assert!(has_data(disks.data(), &volume.key, volume.segment), "a volume without its filesystem");
            State::Volume
        }
        other => panic!("neither blank nor unfinished nor a volume: {other:?}"),
    }
}

/// Every state in the order of the cuts, each once.
fn states(store: &RecordingStore) -> Vec<State> {
    let mut seen: Vec<State> = Vec::new();
    store.cut_everywhere(&mut |disk| note(&mut seen, state(disk)));
    seen
}

/// The same for a header's disk and its data's.
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

#[test]
fn a_format_cut_anywhere_leaves_blank_or_unfinished_or_a_whole_volume() {
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
fn a_format_with_a_detached_header_is_cut_on_either_disk_and_leaves_the_same() {
    for (format, alignment) in [Luks1, Luks2].into_iter().flat_map(|format| ALIGNMENTS.map(|blocks| (format, blocks))) {
        let header = RecordingStore::new(vec![0; format.header_len()], alignment);
        // What the data's disk held before is nobody's concern, and no volume.
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
fn an_abandoned_format_leaves_a_blank_disk_and_never_anything_else() {
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
fn an_unfinished_format_found_later_is_abandoned_or_begun_again() {
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
fn what_somebody_else_wrote_over_an_unfinished_format_is_left_alone() {
    for format in [Luks1, Luks2] {
        let store = MemoryStore::zeroed(format.disk_len());
        let pending = format.begin(&store).unwrap();
        store.write_at(&[0xa5; 512], 0).unwrap();
        let theirs = store.snapshot();
        assert!(matches!(pending.commit(&store), Err(LuksError::Overwritten)));
        assert!(matches!(pending.abandon(&store), Err(LuksError::Overwritten)));
        assert!(store.snapshot() == theirs, "{format:?}: something was written");
    }
}

#[test]
fn old_signatures_are_gone_from_the_start_and_the_end_of_the_data() {
    let len = Luks1.disk_len();
    let store = MemoryStore::from(vec![0x5a; len]);
    drop(Luks1.begin(&store).unwrap());
    let disk = store.snapshot();
    assert!(disk[2 << 20..3 << 20].iter().all(|byte| *byte == 0));
    assert!(disk[len - (1 << 20)..].iter().all(|byte| *byte == 0));
    // The secondary header of a LUKS2 volume with much metadata.
    assert!(disk[4 << 20..(4 << 20) + 512].iter().all(|byte| *byte == 0));
    assert_eq!(disk[(3 << 20) + 1], 0x5a, "what cannot be a signature is not worth the time");
}

#[test]
fn a_disk_that_fails_at_any_operation_is_no_volume_before_its_data_is_there() {
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
                    assert!(failing > 8, "{failing} operations cannot be all");
                    break;
                }
                Err(LuksError::Store(error)) => assert_eq!(error.kind(), io::ErrorKind::StorageFull),
                Err(other) => panic!("{other}"),
            }
            // The commit can fail after the header was written: the data is there by then, which `state` makes sure of.
            let state = state(store.inner());
            assert!(state != State::Volume || committing.get(), "{format:?}, operation {failing}: {state:?}");
        }
    }
}

#[test]
fn a_disk_with_no_room_for_data_is_refused_untouched() {
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
