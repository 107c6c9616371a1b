//! Every change of a header can be cut off at any write and any sector: the volume opens with what opened it before, or
//! with what shall.

use std::num::NonZeroU32;

use engine::key::{Passphrase, VolumeKey};
use engine::luks::{self, Disks, HashAlgorithm, Limits, LockedVolume, NewKey, luks1, luks2};
use engine::store::{BlockStore, MemoryStore};
use harness::luks::{PASSPHRASE, key, noise, quick_luks1, quick_luks2, quick_pbkdf2};
use harness::recording::RecordingStore;

const NEW: &[u8] = b"another passphrase";
const THIRD: &[u8] = b"a third one";

/// A volume of each format, each with its data behind the header and on another disk.
fn formats() -> [Vec<u8>; 4] {
    let passphrase = Passphrase::new(PASSPHRASE.to_vec());
    let luks1 = MemoryStore::zeroed(3 << 20);
    let options = quick_luks1(HashAlgorithm::Sha256);
    luks1::begin(&luks1, &options, &passphrase, key(64), &mut noise(3)).unwrap().commit(&luks1).unwrap();
    let luks2 = MemoryStore::zeroed(17 << 20);
    let mut options = quick_luks2();
    options.layout.keyslots_size = Some(1 << 20);
    luks2::begin(&luks2, &options, &passphrase, key(64), &mut noise(4)).unwrap().commit(&luks2).unwrap();
    let data = MemoryStore::zeroed(1 << 20);
    let luks1_header = MemoryStore::zeroed(3 << 20);
    let disks = || Disks::detached(&luks1_header, &data);
    let detached = luks1::begin(disks(), &quick_luks1(HashAlgorithm::Sha256), &passphrase, key(64), &mut noise(3));
    detached.unwrap().commit(disks()).unwrap();
    let luks2_header = MemoryStore::zeroed(3 << 20);
    let disks = || Disks::detached(&luks2_header, &data);
    luks2::begin(disks(), &options, &passphrase, key(64), &mut noise(4)).unwrap().commit(disks()).unwrap();
    // What lies behind the header is not looked at, and would cost time to copy.
    let cut = |store: MemoryStore, len: usize| store.snapshot()[..len].to_vec();
    let luks2_len = (2 << 20) + 65536;
    [cut(luks1, 3 << 20), cut(luks2, luks2_len), cut(luks1_header, 3 << 20), cut(luks2_header, luks2_len)]
}

/// A LUKS2 volume.
fn luks2_format() -> Vec<u8> {
    let [_, bytes, ..] = formats();
    bytes
}

fn new_key(passphrase: &Passphrase) -> NewKey<'_> {
    NewKey { passphrase, kdf: quick_pbkdf2(HashAlgorithm::Sha256), hash: HashAlgorithm::Sha256 }
}

fn volume(store: &dyn BlockStore) -> LockedVolume {
    luks::read_for_keys(store, &Limits::default()).unwrap()
}

fn opens(store: &dyn BlockStore, passphrase: &[u8]) -> bool {
    let unlocked = volume(store).unlock(store, &Passphrase::new(passphrase.to_vec()));
    unlocked.is_ok_and(|unlocked| unlocked.key.expose() == key(VolumeKey::AES_256).expose())
}

fn with_key(bytes: Vec<u8>, passphrase: &[u8], slot: Option<usize>) -> Vec<u8> {
    let store = MemoryStore::from(bytes);
    let passphrase = Passphrase::new(passphrase.to_vec());
    let (limits, mut random) = (Limits::default(), noise(5));
    volume(&store).add_key(&store, &limits, &key(64), &new_key(&passphrase), slot, &mut random).unwrap();
    store.snapshot()
}

/// Cuts `change` everywhere, and makes sure that one of `either` opens the volume; returns the disk at the end.
#[track_caller]
fn cut(before: Vec<u8>, alignment: usize, either: &[&[u8]], change: &dyn Fn(&dyn BlockStore)) -> Vec<u8> {
    let store = RecordingStore::new(before, alignment);
    change(&store);
    let mut random = noise(13);
    let mut choose = || {
        let mut byte = [0];
        random(&mut byte).unwrap();
        byte[0] & 1 == 1
    };
    let mut seen = 0;
    store.cut_everywhere(1, &mut choose, &mut |disk| {
        assert!(either.iter().any(|passphrase| opens(disk, passphrase)), "state {seen}");
        seen += 1;
    });
    assert!(seen > 30, "{seen} states");
    let mut end = vec![0; usize::try_from(store.len()).unwrap()];
    store.read_at(&mut end, 0).unwrap();
    end
}

#[test]
fn a_key_is_added_without_a_moment_in_which_the_old_one_does_not_open() {
    for bytes in formats() {
        // Keyslot 6 of LUKS1 lies across a sector boundary.
        for (alignment, slot) in [(1, None), (4096, None), (1, Some(6)), (512, Some(7))] {
            let end = cut(bytes.clone(), alignment, &[PASSPHRASE], &|store| {
                let passphrase = Passphrase::new(NEW.to_vec());
                let (limits, mut random) = (Limits::default(), noise(6));
                let added = volume(store).add_key(store, &limits, &key(64), &new_key(&passphrase), slot, &mut random);
                assert_eq!(added.unwrap(), slot.unwrap_or(1));
            });
            let end = MemoryStore::from(end);
            assert!(opens(&end, PASSPHRASE) && opens(&end, NEW));
        }
    }
}

#[test]
fn a_key_is_changed_without_a_moment_in_which_neither_opens() {
    for bytes in formats() {
        for alignment in [1, 4096] {
            let end = cut(bytes.clone(), alignment, &[PASSPHRASE, NEW], &|store| {
                let passphrase = Passphrase::new(NEW.to_vec());
                let (limits, mut random) = (Limits::default(), noise(7));
                volume(store).change_key(store, &limits, &key(64), 0, &new_key(&passphrase), &mut random).unwrap();
            });
            let end = MemoryStore::from(end);
            assert!(!opens(&end, PASSPHRASE) && opens(&end, NEW));
        }
    }
}

#[test]
fn a_key_is_removed_without_a_moment_in_which_the_other_does_not_open_and_its_material_is_gone() {
    for bytes in formats() {
        for (alignment, slot) in [(1, 0), (4096, 0), (1, 6), (512, 7)] {
            let other = if slot == 0 { (Some(3), NEW) } else { (Some(slot), NEW) };
            let before = with_key(bytes.clone(), other.1, other.0);
            let stays = if slot == 0 { NEW } else { PASSPHRASE };
            let end = cut(before.clone(), alignment, &[stays], &|store| {
                volume(store).remove_key(store, slot, false, &mut noise(8)).unwrap();
            });
            let end = MemoryStore::from(end);
            assert!(opens(&end, stays) && !opens(&end, if slot == 0 { PASSPHRASE } else { NEW }));
            // A header that still named the keyslot would find nothing in it.
            let after = end.snapshot();
            let header_len = if let LockedVolume::Luks1(_) = volume(&end) { 4096 } else { 32768 };
            let mut spliced = after;
            spliced[..header_len].copy_from_slice(&before[..header_len]);
            assert!(!opens(&MemoryStore::from(spliced), if slot == 0 { PASSPHRASE } else { NEW }));
        }
    }
}

#[test]
fn an_update_after_one_that_was_cut_off_cannot_fall_back_on_what_is_gone() {
    let bytes = luks2_format();
    // Cut off after the first copy: that names two keys, the second copy one.
    let added = with_key(bytes.clone(), NEW, None);
    let mut torn = added;
    torn[16384..32768].copy_from_slice(&bytes[16384..32768]);
    assert!(opens(&MemoryStore::from(torn.clone()), NEW));
    cut(torn, 1, &[NEW], &|store| volume(store).remove_key(store, 0, false, &mut noise(9)).unwrap());
}

#[test]
fn tokens_settings_and_repair_are_cut_anywhere_and_the_volume_opens() {
    let bytes = luks2_format();
    let token = br#"{"type":"aws-kms","keyslots":["0"],"unknown":{"kept":[1,{"two":null}]}}"#;
    let end = cut(bytes, 4096, &[PASSPHRASE], &|store| {
        assert_eq!(luks2::import_token(store, token, None, false, &mut noise(10)).unwrap(), 0);
        luks2::import_token(store, token, Some(5), false, &mut noise(10)).unwrap();
        luks2::remove_token(store, 0, &mut noise(10)).unwrap();
        let settings = luks2::Settings { label: Some("a label".to_owned()), ..luks2::Settings::default() };
        luks2::change_settings(store, &settings, &mut noise(10)).unwrap();
        luks2::set_priority(store, 0, luks2::Priority::Prefer, &mut noise(10)).unwrap();
    });
    let store = MemoryStore::from(end.clone());
    assert_eq!(luks2::export_token(&store, 5).unwrap(), serde_json::from_slice::<serde_json::Value>(token).unwrap());
    for (damaged, primary) in [(4200, true), (16384 + 4200, false)] {
        let mut bytes = end.clone();
        bytes[damaged] ^= 1;
        let end = cut(bytes, 4096, &[PASSPHRASE], &|store| {
            let repaired = luks2::repair(store, &mut noise(11)).unwrap();
            assert_eq!((repaired.primary, repaired.secondary), (primary, !primary));
        });
        let repaired = luks2::repair(&MemoryStore::from(end), &mut noise(11)).unwrap();
        assert!(!repaired.primary && !repaired.secondary);
    }
}

#[test]
fn what_cannot_be_is_refused_with_the_disk_untouched() {
    for bytes in formats() {
        let store = MemoryStore::from(bytes.clone());
        let locked = volume(&store);
        let (limits, mut random) = (Limits::default(), noise(12));
        let passphrase = Passphrase::new(THIRD.to_vec());
        let told = [
            locked.remove_key(&store, 0, false, &mut random).unwrap_err(),
            locked.remove_key(&store, 1, false, &mut random).unwrap_err(),
            locked.add_key(&store, &limits, &key(64), &new_key(&passphrase), Some(0), &mut random).unwrap_err(),
            locked.add_key(&store, &limits, &key(64), &new_key(&passphrase), Some(99), &mut random).unwrap_err(),
            locked.add_key(&store, &limits, &key(32), &new_key(&passphrase), None, &mut random).unwrap_err(),
        ];
        let told: Vec<String> = told.iter().map(ToString::to_string).collect();
        for (told, words) in told.iter().zip(["last key", "no key in keyslot 1", "already", "99", "does not belong"]) {
            assert!(told.contains(words), "{told}");
        }
        assert!(store.snapshot() == bytes);
        locked.remove_key(&store, 0, true, &mut random).unwrap();
        assert!(!opens_at_all(&store));
    }
    let bytes = luks2_format();
    let store = MemoryStore::from(bytes.clone());
    let large = format!(r#"{{"type":"x","keyslots":[],"y":"{}"}}"#, "z".repeat(12000));
    let deep = format!(r#"{{"type":"x","keyslots":[],"y":{}1{}}}"#, "[".repeat(40), "]".repeat(40));
    for (token, words) in [
        (large.as_str(), "metadata would take"),
        (deep.as_str(), "30 deep"),
        (r#"{"type":"x","keyslots":["7"]}"#, "keyslot \"7\""),
        (r#"{"type":"luks2-x","keyslots":[]}"#, "reserved"),
        (r#"{"type":"x"}"#, "keyslots"),
        ("{", "not JSON"),
    ] {
        let error = luks2::import_token(&store, token.as_bytes(), None, false, &mut noise(1)).unwrap_err().to_string();
        assert!(error.contains(words), "{words}: {error}");
    }
    assert!(store.snapshot() == bytes);
}

fn opens_at_all(store: &dyn BlockStore) -> bool {
    luks::read_for_keys(store, &Limits::default())
        .and_then(|volume| volume.unlock(store, &Passphrase::new(PASSPHRASE.to_vec())))
        .is_ok()
}

#[test]
fn every_keyslot_of_luks1_can_be_used_and_a_ninth_cannot() {
    let [mut bytes, ..] = formats();
    for number in 1..8 {
        bytes = with_key(bytes, format!("passphrase {number}").as_bytes(), None);
    }
    let store = MemoryStore::from(bytes);
    assert!((1..8).all(|number| opens(&store, format!("passphrase {number}").as_bytes())));
    let iterations = NonZeroU32::new(1000).unwrap();
    let passphrase = Passphrase::new(THIRD.to_vec());
    let ninth = luks1::add_key(&store, &Limits::default(), &key(64), &passphrase, iterations, None, &mut noise(1));
    assert!(ninth.unwrap_err().to_string().contains("no room"));
}
