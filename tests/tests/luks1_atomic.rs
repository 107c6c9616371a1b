//! Formatting can be cut off at any write and any sector: what is found then is a blank disk, an unfinished format, or a
//! whole volume with all that was written to it.

use std::cell::Cell;
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};

use engine::key::{Passphrase, VolumeKey};
use engine::luks::{self, HashAlgorithm, Limits, LuksError, PendingFormat, luks1};
use engine::signature::{Content, examine};
use engine::store::{BlockStore, FaultyStore, MemoryStore, Operation};
use engine::xts::Xts;
use harness::luks::{PASSPHRASE, key, noise, quick_luks1};
use harness::recording::RecordingStore;

const LEN: usize = 6 << 20;
const ALIGNMENTS: [usize; 3] = [1, 512, 4096];

fn begin(store: &dyn BlockStore) -> Result<PendingFormat, LuksError> {
    let passphrase = Passphrase::new(PASSPHRASE.to_vec());
    luks1::begin(store, &quick_luks1(HashAlgorithm::Sha256), &passphrase, key(VolumeKey::AES_256), &mut noise(3))
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

fn state(disk: &MemoryStore) -> State {
    let disk: &dyn BlockStore = disk;
    match (luks::read(disk, &Limits::default()), examine(disk).unwrap()) {
        (Err(LuksError::NotLuks), Content::Blank) => State::Blank,
        (Err(LuksError::Unfinished), Content::Unfinished) => State::Unfinished,
        (Ok(volume), Content::Known(_)) => {
            let volume = volume.unlock(disk, &Passphrase::new(PASSPHRASE.to_vec())).unwrap();
            assert_eq!(volume.key.expose(), key(VolumeKey::AES_256).expose());
            assert!(has_data(disk, &volume.key, volume.segment), "a volume without its filesystem");
            State::Volume
        }
        other => panic!("neither blank nor unfinished nor a volume: {other:?}"),
    }
}

/// Every state in the order of the cuts, each written once in a row.
fn states(store: &RecordingStore) -> Vec<State> {
    let mut random = noise(11);
    let mut choose = || {
        let mut byte = [0];
        random(&mut byte).unwrap();
        byte[0] & 1 == 1
    };
    let mut seen: Vec<State> = Vec::new();
    store.cut_everywhere(257, &mut choose, &mut |disk| {
        let state = state(disk);
        if !seen.contains(&state) {
            seen.push(state);
        }
    });
    seen
}

#[test]
fn a_format_cut_anywhere_leaves_blank_or_unfinished_or_a_whole_volume() {
    for alignment in ALIGNMENTS {
        let store = RecordingStore::new(vec![0; LEN], alignment);
        let pending = begin(&store).unwrap();
        write_data(&store, &pending);
        pending.commit(&store).unwrap();
        assert_eq!(states(&store), [State::Blank, State::Unfinished, State::Volume], "blocks of {alignment}");
    }
}

#[test]
fn an_abandoned_format_leaves_a_blank_disk_and_never_anything_else() {
    for alignment in ALIGNMENTS {
        let store = RecordingStore::new(vec![0; LEN], alignment);
        let pending = begin(&store).unwrap();
        write_data(&store, &pending);
        pending.abandon(&store).unwrap();
        assert_eq!(states(&store), [State::Blank, State::Unfinished], "blocks of {alignment}");
        assert_eq!(examine(&store as &dyn BlockStore).unwrap(), Content::Blank);
    }
}

#[test]
fn an_unfinished_format_found_later_is_abandoned_or_begun_again() {
    let store = MemoryStore::zeroed(LEN);
    drop(begin(&store).unwrap());
    let pending = begin(&store).unwrap();
    write_data(&store, &pending);
    pending.commit(&store).unwrap();
    assert_eq!(state(&store), State::Volume);
    let error = luks::abandon_unfinished(&store).unwrap_err();
    assert_eq!((error.kind(), state(&store)), (io::ErrorKind::InvalidData, State::Volume));

    drop(begin(&store).unwrap());
    luks::abandon_unfinished(&store).unwrap();
    assert_eq!(state(&store), State::Blank);
    assert!(store.snapshot()[..3 << 20].iter().all(|byte| *byte == 0), "key material is left");
}

#[test]
fn old_signatures_are_gone_from_the_start_and_the_end_of_the_data() {
    let store = MemoryStore::from(vec![0x5a; LEN]);
    drop(begin(&store).unwrap());
    let disk = store.snapshot();
    assert!(disk[2 << 20..3 << 20].iter().all(|byte| *byte == 0));
    assert!(disk[LEN - (1 << 20)..].iter().all(|byte| *byte == 0));
    // The secondary header of a LUKS2 volume with much metadata.
    assert!(disk[4 << 20..(4 << 20) + 512].iter().all(|byte| *byte == 0));
    assert_eq!(disk[(3 << 20) + 1], 0x5a, "what cannot be a signature is not worth the time");
}

#[test]
fn a_disk_that_fails_at_any_operation_is_no_volume() {
    for failing in 0.. {
        let count = AtomicUsize::new(0);
        let store = FaultyStore::new(MemoryStore::zeroed(LEN), move |operation| {
            let counts = matches!(operation, Operation::Write(..) | Operation::Flush);
            (counts && count.fetch_add(1, Ordering::Relaxed) == failing).then_some(io::ErrorKind::StorageFull)
        });
        let done = Cell::new(false);
        let result = begin(&store).and_then(|pending| {
            write_data(store.inner(), &pending);
            done.set(true);
            pending.commit(&store)
        });
        match result {
            Ok(_) => {
                assert!(failing > 8, "{failing} operations cannot be all");
                return;
            }
            Err(LuksError::Store(error)) => assert_eq!(error.kind(), io::ErrorKind::StorageFull),
            Err(other) => panic!("{other}"),
        }
        // The very last flush comes after the header: it may be there.
        let state = state(store.inner());
        assert!(state != State::Volume || done.get(), "operation {failing}: {state:?}");
    }
}

#[test]
fn a_disk_with_no_room_for_data_is_refused_untouched() {
    let store = RecordingStore::new(vec![0; 2 << 20], 4096);
    let error = begin(&store).unwrap_err();
    assert!(matches!(error, LuksError::TooSmall { needed, available: 2_097_152 } if needed == 2_097_152 + 4096));
    assert_eq!(states(&store), [State::Blank]);
    let store = MemoryStore::zeroed((2 << 20) + 512);
    begin(&store).unwrap().commit(&store).unwrap();
}
