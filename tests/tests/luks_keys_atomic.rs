//! Every change of a header can be cut off at any write and any sector: the volume opens with what opened it before, or
//! with what shall.

use std::num::NonZeroU32;

use engine::key::{Passphrase, VolumeKey};
use engine::luks::{self, Disks, FormatOptions, HashAlgorithm, Limits, LockedVolume, LuksError, NewKey, luks1, luks2};
use engine::store::{BlockStore, MemoryStore};
use harness::luks::{PASSPHRASE, key, noise, quick_luks1, quick_luks2, quick_pbkdf2};
use harness::recording::{RecordingStore, Scratch};

const NEW: &[u8] = b"another passphrase";
const THIRD: &[u8] = b"a third one";

/// A header's disk, and its data's where that is another one.
#[derive(Clone)]
struct Disk {
    bytes: Vec<u8>,
    is_detached: bool,
}

fn formats() -> Vec<Disk> {
    [(1, false), (1, true), (2, false), (2, true)].map(|(version, is_detached)| disk(version, is_detached)).into()
}

fn disk(version: u8, is_detached: bool) -> Disk {
    let mut luks2 = quick_luks2();
    luks2.layout.keyslots_size = Some(1 << 20);
    let options = match version {
        1 => FormatOptions::Luks1(quick_luks1(HashAlgorithm::Sha256)),
        _ => FormatOptions::Luks2(Box::new(luks2)),
    };
    let passphrase = Passphrase::new(PASSPHRASE.to_vec());
    let header_len = usize::try_from(options.header_len(64)).unwrap();
    // The data of one that is not detached begins after 2 MiB.
    let header = MemoryStore::zeroed(if is_detached { header_len } else { (2 << 20) + 65536 });
    let data = data();
    let disks = if is_detached { Disks::detached(&header, &data) } else { Disks::from(&header) };
    options.begin(disks, &passphrase, key(64), &mut noise(u64::from(version))).unwrap().commit(disks).unwrap();
    Disk { bytes: header.snapshot(), is_detached }
}

/// The disk that holds the data of a detached header.
fn data() -> MemoryStore {
    MemoryStore::zeroed(1 << 20)
}

fn new_key(passphrase: &Passphrase) -> NewKey<'_> {
    NewKey { passphrase, kdf: quick_pbkdf2(HashAlgorithm::Sha256), hash: HashAlgorithm::Sha256 }
}

fn volume(store: &dyn BlockStore) -> LockedVolume {
    luks::read_for_keys(store, &Limits::default()).unwrap()
}

impl Disk {
    fn with(&self, bytes: Vec<u8>) -> Self {
        Self { bytes, is_detached: self.is_detached }
    }

    /// Bytes that it takes at once: a file's, or a disk's of large blocks.
    fn blocks(&self) -> usize {
        if self.is_detached { 1 } else { 4096 }
    }

    fn store(&self) -> MemoryStore {
        MemoryStore::from(self.bytes.clone())
    }

    /// Whether the passphrase opens the volume, as whoever serves it would.
    fn opens(&self, passphrase: &[u8]) -> bool {
        opens(&self.store(), self.is_detached, passphrase)
    }

    fn with_key(&self, passphrase: &[u8], slot: Option<usize>) -> Self {
        let store = self.store();
        let passphrase = Passphrase::new(passphrase.to_vec());
        let (limits, mut random) = (Limits::default(), noise(5));
        volume(&store).add_key(&store, &limits, &key(64), &new_key(&passphrase), slot, &mut random).unwrap();
        self.with(store.snapshot())
    }

    /// Cuts `change` everywhere, and makes sure that one of `either` opens the volume; returns the disk at the end.
    #[track_caller]
    fn cut(&self, alignment: usize, either: &[&[u8]], change: &dyn Fn(&dyn BlockStore)) -> Self {
        self.cut_and(alignment, either, change, &|_| {})
    }

    /// As [`Disk::cut`], and looks at every state.
    #[track_caller]
    fn cut_and(
        &self,
        alignment: usize,
        either: &[&[u8]],
        change: &dyn Fn(&dyn BlockStore),
        look: &dyn Fn(&dyn BlockStore),
    ) -> Self {
        let store = RecordingStore::new(self.bytes.clone(), alignment);
        change(&store);
        let mut either = either.to_vec();
        let mut seen = 0;
        let cuts = store.cut_everywhere(&mut |disk| {
            let found = either.iter().position(|passphrase| opens(disk, self.is_detached, passphrase));
            // The next time it is likely to be the same.
            either.swap(0, found.unwrap_or_else(|| panic!("state {seen}")));
            look(disk);
            seen += 1;
        });
        assert!(cuts.moments > 50, "{cuts:?}");
        self.with(store.snapshot())
    }
}

fn opens(header: &dyn BlockStore, is_detached: bool, passphrase: &[u8]) -> bool {
    let data = data();
    let disks = if is_detached { Disks::detached(header, &data) } else { Disks::from(header) };
    let unlocked = luks::read(disks, &Limits::default())
        .and_then(|volume| volume.unlock(header, &Passphrase::new(passphrase.to_vec())));
    unlocked.is_ok_and(|unlocked| unlocked.key.expose() == key(VolumeKey::AES_256).expose())
}

#[test]
fn a_key_is_added_without_a_moment_in_which_the_old_one_does_not_open() {
    for disk in formats() {
        // Keyslot 6 of LUKS1 lies across a sector boundary.
        for (alignment, slot) in [(1, None), (4096, None), (1, Some(6)), (512, Some(7))] {
            let end = disk.cut(alignment, &[PASSPHRASE], &|store| {
                let passphrase = Passphrase::new(NEW.to_vec());
                let (limits, mut random) = (Limits::default(), noise(6));
                let added = volume(store).add_key(store, &limits, &key(64), &new_key(&passphrase), slot, &mut random);
                assert_eq!(added.unwrap(), slot.unwrap_or(1));
            });
            assert!(end.opens(PASSPHRASE) && end.opens(NEW));
        }
    }
}

#[test]
fn a_key_is_changed_without_a_moment_in_which_neither_opens() {
    for disk in formats() {
        let end = disk.cut(disk.blocks(), &[PASSPHRASE, NEW], &|store| {
            let passphrase = Passphrase::new(NEW.to_vec());
            let (limits, mut random) = (Limits::default(), noise(7));
            volume(store).change_key(store, &limits, &key(64), 0, &new_key(&passphrase), &mut random).unwrap();
        });
        assert!(!end.opens(PASSPHRASE) && end.opens(NEW));
    }
}

#[test]
fn a_key_is_removed_without_a_moment_in_which_the_other_does_not_open_and_its_material_is_gone() {
    for disk in formats() {
        for (alignment, slot) in [(disk.blocks(), 0), (1, 6), (512, 7)] {
            let other = if slot == 0 { (Some(3), NEW) } else { (Some(slot), NEW) };
            let before = disk.with_key(other.1, other.0);
            let stays = if slot == 0 { NEW } else { PASSPHRASE };
            let goes = if slot == 0 { PASSPHRASE } else { NEW };
            let kept =
                volume(&before.store()).unlock(&before.store(), &Passphrase::new(stays.to_vec())).unwrap().keyslot;
            let end = before.cut_and(
                alignment,
                &[stays],
                &|store| volume(store).remove_key(store, slot, false, &mut noise(8)).unwrap(),
                // Where the one that goes opens no more, the other is the last, and stays.
                &|disk| {
                    if slot == 0 && !opens(disk, before.is_detached, goes) {
                        let disk = Scratch::on(disk);
                        let refused = volume(&disk).remove_key(&disk, kept, false, &mut noise(9));
                        assert!(matches!(refused, Err(LuksError::LastKeyslot(_))), "{refused:?}");
                    }
                },
            );
            assert!(end.opens(stays) && !end.opens(goes));
            // A header that still named the keyslot would find nothing in it.
            let header_len = if let LockedVolume::Luks1(_) = volume(&end.store()) { 4096 } else { 32768 };
            let mut spliced = end.clone();
            spliced.bytes[..header_len].copy_from_slice(&before.bytes[..header_len]);
            assert!(!spliced.opens(goes));
        }
    }
}

#[test]
fn an_update_after_one_that_was_cut_off_cannot_fall_back_on_what_is_gone() {
    let disk = disk(2, false);
    // Cut off after the first copy: that names two keys, the second copy one.
    let mut torn = disk.with_key(NEW, None);
    torn.bytes[16384..32768].copy_from_slice(&disk.bytes[16384..32768]);
    assert!(torn.opens(NEW));
    torn.cut(1, &[NEW], &|store| volume(store).remove_key(store, 0, false, &mut noise(9)).unwrap());
}

#[test]
fn tokens_settings_and_repair_are_cut_anywhere_and_the_volume_opens() {
    let token = br#"{"type":"aws-kms","keyslots":["0"],"unknown":{"kept":[1,{"two":null}]}}"#;
    for is_detached in [false, true] {
        let end = disk(2, is_detached).cut(4096, &[PASSPHRASE], &|store| {
            assert_eq!(luks2::import_token(store, token, None, false, &mut noise(10)).unwrap(), 0);
            luks2::import_token(store, token, Some(5), false, &mut noise(10)).unwrap();
            luks2::remove_token(store, 0, &mut noise(10)).unwrap();
            let settings = luks2::Settings { label: Some("a label".to_owned()), ..luks2::Settings::default() };
            luks2::change_settings(store, &settings, &mut noise(10)).unwrap();
            luks2::set_priority(store, 0, luks2::Priority::Prefer, &mut noise(10)).unwrap();
        });
        let expected: serde_json::Value = serde_json::from_slice(token).unwrap();
        assert_eq!(luks2::export_token(&end.store(), 5).unwrap(), expected);
        for (damaged, primary) in [(4200, true), (16384 + 4200, false)] {
            let mut broken = end.clone();
            broken.bytes[damaged] ^= 1;
            let end = broken.cut(4096, &[PASSPHRASE], &|store| {
                let repaired = luks2::repair(store, &mut noise(11)).unwrap();
                assert_eq!((repaired.primary, repaired.secondary), (primary, !primary));
            });
            let repaired = luks2::repair(&end.store(), &mut noise(11)).unwrap();
            assert!(!repaired.primary && !repaired.secondary);
        }
    }
}

#[test]
fn what_cannot_be_is_refused_with_the_disk_untouched() {
    for disk in formats() {
        let store = disk.store();
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
        assert!(store.snapshot() == disk.bytes);
        locked.remove_key(&store, 0, true, &mut random).unwrap();
        assert!(!disk.with(store.snapshot()).opens(PASSPHRASE));
    }
    let disk = disk(2, false);
    let store = disk.store();
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
    assert!(store.snapshot() == disk.bytes);
}

#[test]
fn every_keyslot_of_luks1_can_be_used_and_a_ninth_cannot() {
    let mut disk = disk(1, false);
    for number in 1..8 {
        disk = disk.with_key(format!("passphrase {number}").as_bytes(), None);
    }
    assert!((1..8).all(|number| disk.opens(format!("passphrase {number}").as_bytes())));
    let iterations = NonZeroU32::new(1000).unwrap();
    let passphrase = Passphrase::new(THIRD.to_vec());
    let ninth =
        luks1::add_key(&disk.store(), &Limits::default(), &key(64), &passphrase, iterations, None, &mut noise(1));
    assert!(ninth.unwrap_err().to_string().contains("no room"));
}
