//! A power cut at any write and any sector of a header change leaves a volume that opens with an old passphrase or with the
//! new one.

use engine::key::{Passphrase, VolumeKey};
use engine::luks::{self, Disks, FormatOptions, HashAlgorithm, Limits, LockedVolume, LuksError, NewKey, luks1, luks2};
use engine::store::{BlockStore, MemoryStore};
use harness::luks::{PASSPHRASE, key, noise, quick_luks1, quick_luks2, quick_pbkdf2, sha256};
use harness::recording::{RecordingStore, Scratch};
use serde_json::{Value, json};

const NEW: &[u8] = b"another passphrase";
const THIRD: &[u8] = b"a third one";

/// A disk with a header, and the length of a separate data disk if there is one.
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
    // If the header is not detached, the data begins after 2 MiB.
    let header = MemoryStore::zeroed(if is_detached { header_len } else { (2 << 20) + 65536 });
    let data = data();
    let disks = if is_detached { Disks::detached(&header, &data) } else { Disks::from(&header) };
    options.begin(disks, &passphrase, key(64), &mut noise(u64::from(version))).unwrap().commit(disks).unwrap();
    Disk { bytes: header.snapshot(), is_detached }
}

/// Makes the disk that holds the data of a detached header.
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

    /// Returns the block size. A detached header is a file; any other header is on a disk with large blocks.
    fn blocks(&self) -> usize {
        if self.is_detached { 1 } else { 4096 }
    }

    fn store(&self) -> MemoryStore {
        MemoryStore::from(self.bytes.clone())
    }

    /// Returns whether the passphrase opens the volume for a server.
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

    /// Cuts `change` everywhere and checks that one of the passphrases in `either` always opens the volume. Returns the
    /// disk at the end.
    #[track_caller]
    fn cut(&self, alignment: usize, either: &[&[u8]], change: &dyn Fn(&dyn BlockStore)) -> Self {
        self.cut_and(alignment, either, change, &|_| {})
    }

    /// Does the same as [`Disk::cut`], and also runs `look` on every state.
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
            // The passphrase that opened this state probably opens the next one too, so it is tried first.
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
fn the_old_key_always_opens_while_one_is_added() {
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
fn one_key_always_opens_while_one_is_changed() {
    for disk in formats() {
        let end = disk.cut(disk.blocks(), &[PASSPHRASE, NEW], &|store| {
            let passphrase = Passphrase::new(NEW.to_vec());
            let (limits, mut random) = (Limits::default(), noise(7));
            volume(store).change_key(store, &limits, &key(64), 0, &new_key(&passphrase), false, &mut random).unwrap();
        });
        assert!(!end.opens(PASSPHRASE) && end.opens(NEW));
    }
}

/// At the end the removed key's material is erased.
#[test]
fn the_other_key_always_opens_while_one_is_removed() {
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
                // Once the removed key no longer opens, the other key is the last one and cannot be removed.
                &|disk| {
                    if slot == 0 && !opens(disk, before.is_detached, goes) {
                        let disk = Scratch::on(disk);
                        let refused = volume(&disk).remove_key(&disk, kept, false, &mut noise(9));
                        assert!(matches!(refused, Err(LuksError::LastKeyslot(_))), "{refused:?}");
                    }
                },
            );
            assert!(end.opens(stays) && !end.opens(goes));
            // A header that still named the keyslot would find no key material in it.
            let header_len = if let LockedVolume::Luks1(_) = volume(&end.store()) { 4096 } else { 32768 };
            let mut spliced = end.clone();
            spliced.bytes[..header_len].copy_from_slice(&before.bytes[..header_len]);
            assert!(!spliced.opens(goes));
        }
    }
}

/// An older copy of the header, left by the interrupted update, must not name a key that is removed.
#[test]
fn an_update_after_an_interrupted_one_keeps_no_removed_key() {
    let disk = disk(2, false);
    // The update was cut off after the first copy: the first copy names two keys, the second copy one.
    let mut torn = disk.with_key(NEW, None);
    torn.bytes[16384..32768].copy_from_slice(&disk.bytes[16384..32768]);
    assert!(torn.opens(NEW));
    torn.cut(1, &[NEW], &|store| volume(store).remove_key(store, 0, false, &mut noise(9)).unwrap());
}

#[test]
fn the_volume_opens_after_any_interrupted_header_change() {
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
fn impossible_changes_are_refused_and_write_nothing() {
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
        (deep.as_str(), "more than 30 levels deep"),
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
fn luks1_has_room_for_exactly_eight_keys() {
    let mut disk = disk(1, false);
    for number in 1..8 {
        disk = disk.with_key(format!("passphrase {number}").as_bytes(), None);
    }
    assert!((1..8).all(|number| disk.opens(format!("passphrase {number}").as_bytes())));
    let passphrase = Passphrase::new(THIRD.to_vec());
    let hash = HashAlgorithm::Sha256;
    let new = NewKey { passphrase: &passphrase, kdf: quick_pbkdf2(hash), hash };
    let ninth = luks1::add_key(&disk.store(), &Limits::default(), &key(64), &new, None, &mut noise(1));
    assert!(ninth.unwrap_err().to_string().contains("no room"));
}

/// Makes a LUKS2 volume with all 32 keyslots in use and with space for one more key's material. All keyslots but the first
/// are small and of an unknown type.
fn full_luks2() -> Disk {
    let mut disk = disk(2, false);
    let end = disk.bytes[4096..16384].iter().position(|byte| *byte == 0).unwrap();
    let mut json: Value = serde_json::from_slice(&disk.bytes[4096..4096 + end]).unwrap();
    for number in 1..32u64 {
        let area = json!({ "type": "x", "offset": (32768 + (1 << 20) - 4096 * number).to_string(), "size": "4096" });
        json["keyslots"][number.to_string()] = json!({ "type": "x", "key_size": 1, "area": area });
    }
    let text = json.to_string();
    for copy in [0, 16384] {
        let header = &mut disk.bytes[copy..copy + 16384];
        header[4096..4096 + text.len()].copy_from_slice(text.as_bytes());
        header[448..512].fill(0);
        let checksum = sha256(header);
        header[448..480].copy_from_slice(&checksum);
    }
    disk
}

fn full_luks1() -> Disk {
    let disk = disk(1, false);
    (1..8).fold(disk, |disk, number| disk.with_key(format!("passphrase {number}").as_bytes(), None))
}

fn change(store: &dyn BlockStore, slot: usize, in_place: bool) -> Result<usize, LuksError> {
    let passphrase = Passphrase::new(NEW.to_vec());
    volume(store).change_key(store, &Limits::default(), &key(64), slot, &new_key(&passphrase), in_place, &mut noise(3))
}

#[test]
fn a_key_is_changed_with_all_keyslots_in_use() {
    let disk = full_luks2();
    let changed = disk.cut(512, &[PASSPHRASE, NEW], &|store| {
        assert_eq!(change(store, 0, false).unwrap(), 0);
    });
    assert!(changed.opens(NEW) && !changed.opens(PASSPHRASE));
    assert!(changed.bytes[32768..32768 + 258_048].iter().all(|byte| *byte == 0), "the old key material is gone");
}

/// Without space for a second copy of the key, there is a moment at which neither passphrase opens the volume.
#[test]
fn a_key_is_changed_in_place_only_on_request() {
    // A LUKS2 volume whose keyslots area has space for two keys and holds two.
    let small = {
        let mut options = quick_luks2();
        options.layout.keyslots_size = Some(2 * 258_048);
        let store = MemoryStore::zeroed((2 << 20) + 65536);
        luks2::begin(&store, &options, &Passphrase::new(PASSPHRASE.to_vec()), key(64), &mut noise(2))
            .unwrap()
            .commit(&store)
            .unwrap();
        Disk { bytes: store.snapshot(), ..disk(2, false) }.with_key(b"passphrase 1", None)
    };
    for disk in [full_luks1(), small] {
        let store = disk.store();
        let told = change(&store, 0, false).unwrap_err().to_string();
        for words in ["no room for the new key", "neither passphrase"] {
            assert!(told.contains(words), "{told}");
        }
        assert!(store.snapshot() == disk.bytes);
        assert_eq!(change(&store, 0, true).unwrap(), 0);
        let changed = disk.with(store.snapshot());
        assert!(changed.opens(NEW) && !changed.opens(PASSPHRASE) && changed.opens(b"passphrase 1"));
    }
}
