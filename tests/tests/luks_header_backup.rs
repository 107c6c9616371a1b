//! Header backups: the same file as cryptsetup's, restored by either, and a restore that is cut anywhere.

use std::os::unix::fs::PermissionsExt;

use engine::key::Passphrase;
use engine::luks::{self, Backup, HashAlgorithm, Limits, NewKey, luks1, luks2};
use engine::store::{BlockStore, MemoryStore};
use harness::luks::{PASSPHRASE, Workbench, key, noise, quick_luks1, quick_luks2, quick_pbkdf2, unlock};
use harness::recording::RecordingStore;

const QUICK: [&str; 4] = ["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"];
const NEW: &[u8] = b"another passphrase";

fn workbench(kind: &str, key_bits: &str) -> Workbench {
    let bench = Workbench::new();
    std::fs::write(bench.path("new"), NEW).unwrap();
    bench.disk("disk", 20 << 20);
    let format = ["luksFormat", "-q", "--type", kind, "--key-size", key_bits, "--key-file", "key", "disk"];
    bench.run("cryptsetup", format.into_iter().chain(QUICK));
    bench
}

/// The key is changed, and all that is behind the header is something.
fn change(bench: &Workbench) {
    let change = ["luksChangeKey", "-q", "--key-file", "key", "disk", "new"];
    bench.run("cryptsetup", change.into_iter().chain(QUICK));
    assert!(unlock(&bench.path("disk"), PASSPHRASE).is_err());
}

fn read(bench: &Workbench, name: &str) -> Vec<u8> {
    std::fs::read(bench.path(name)).unwrap()
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs cryptsetup: run `make test`")]
fn a_backup_is_cryptsetup_s_and_each_restores_the_other_s() {
    for (kind, key_bits) in [("luks1", "512"), ("luks1", "256"), ("luks2", "512"), ("luks2", "256")] {
        let bench = workbench(kind, key_bits);
        let expected = unlock(&bench.path("disk"), PASSPHRASE).unwrap().key.expose().to_vec();
        bench.nbdcrypt(&["header", "backup", "disk", "ours"]);
        bench.run("cryptsetup", ["luksHeaderBackup", "--header-backup-file", "theirs", "disk"]);
        assert!(read(&bench, "ours") == read(&bench, "theirs"), "{kind}, {key_bits}");
        let mode = std::fs::metadata(bench.path("ours")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o400);
        let told = bench.refusal(&["header", "backup", "disk", "ours"]);
        assert!(told.contains("exists"), "{told}");
        let before = read(&bench, "disk");

        change(&bench);
        let changed = read(&bench, "disk");
        bench.nbdcrypt(&["header", "restore", "disk", "theirs"]);
        assert!(read(&bench, "disk") == before, "{kind}, {key_bits}");
        bench.accepted_by_cryptsetup("disk");
        assert_eq!(unlock(&bench.path("disk"), PASSPHRASE).unwrap().key.expose(), expected);
        // What was saved first undoes it, with cryptsetup as well.
        bench.run("cryptsetup", ["luksHeaderRestore", "-q", "--header-backup-file", "theirs.before", "disk"]);
        assert!(unlock(&bench.path("disk"), NEW).is_ok() && unlock(&bench.path("disk"), PASSPHRASE).is_err());
        let len = read(&bench, "theirs.before").len();
        assert!(read(&bench, "disk")[..len] == changed[..len]);
        bench.run("cryptsetup", ["luksHeaderRestore", "-q", "--header-backup-file", "ours", "disk"]);
        assert!(read(&bench, "disk") == before, "{kind}, {key_bits}");

        // What was saved before is not written over.
        let told = bench.refusal(&["header", "restore", "disk", "theirs"]);
        assert!(told.contains("theirs.before") && told.contains("exists"), "{told}");
    }
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs cryptsetup: run `make test`")]
fn a_restore_leaves_data_alone_that_begins_in_the_page_where_the_keyslots_end() {
    let bench = workbench("luks1", "256");
    let disk = bench.path("disk");
    // As an old cryptsetup may have made it: the data begins where the last keyslot's material ends, 250 sectors from where
    // it begins, which is sector 8 and seven times 256. (Byte 104 of the header is where the data begins.)
    let mut bytes = read(&bench, "disk");
    bytes[104..108].copy_from_slice(&(8 + 7 * 256 + 250_u32).to_be_bytes());
    std::fs::write(&disk, &bytes).unwrap();
    let segment = unlock(&disk, PASSPHRASE).unwrap().segment;
    assert_ne!(segment.offset % 4096, 0, "the data begins within a page");
    bench.nbdcrypt(&["header", "backup", "disk", "ours"]);
    bench.run("cryptsetup", ["luksHeaderBackup", "--header-backup-file", "theirs", "disk"]);
    let end = usize::try_from(segment.offset).unwrap();
    assert!(
        read(&bench, "ours").len() <= end
            && read(&bench, "ours")[..] == read(&bench, "theirs")[..read(&bench, "ours").len()]
    );

    let mut changed = read(&bench, "disk");
    noise(7)(&mut changed[end..]).unwrap();
    std::fs::write(&disk, &changed).unwrap();
    change(&bench);
    bench.nbdcrypt(&["header", "restore", "disk", "ours"]);
    assert!(read(&bench, "disk")[end..] == changed[end..], "the data is as it was");
    assert!(unlock(&disk, PASSPHRASE).is_ok());
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs cryptsetup: run `make test`")]
fn another_volume_s_backup_needs_force_and_one_that_does_not_fit_is_refused() {
    for kind in ["luks1", "luks2"] {
        let bench = workbench(kind, "512");
        bench.nbdcrypt(&["header", "backup", "disk", "first"]);
        let first = read(&bench, "disk");
        let format = |extra: &[&str]| {
            let format = ["luksFormat", "-q", "--type", kind, "--key-file", "key", "disk"];
            bench.run("cryptsetup", format.into_iter().chain(QUICK).chain(extra.iter().copied()));
            read(&bench, "disk")
        };
        for (extra, words) in
            [(&["--key-size", "256"][..], "key size"), (&["--key-size", "512", "--offset", "34816"], "data offset")]
        {
            let other = format(extra);
            let told = bench.refusal(&["header", "restore", "disk", "first", "--force"]);
            assert!(told.contains("does not fit") && told.contains(words), "{told}");
            assert!(read(&bench, "disk") == other);
        }
        if kind == "luks2" {
            format(&["--key-size", "512", "--sector-size", "4096"]);
            bench.nbdcrypt(&["header", "backup", "disk", "large"]);
            format(&["--key-size", "512", "--sector-size", "512"]);
            let told = bench.refusal(&["header", "restore", "disk", "large", "--force"]);
            assert!(told.contains("sector size"), "{told}");
        }
        std::fs::write(bench.path("disk"), &first).unwrap();
        // Another UUID.
        bench.run("cryptsetup", ["luksUUID", "-q", "--uuid", "11111111-2222-4333-8444-555555555555", "disk"]);
        let other = read(&bench, "disk");
        let told = bench.refusal(&["header", "restore", "disk", "first"]);
        assert!(told.contains("UUID") && told.contains("--force"), "{told}");
        assert!(read(&bench, "disk") == other && !bench.path("first.before").exists());
        bench.nbdcrypt(&["header", "restore", "disk", "first", "--force"]);
        assert!(read(&bench, "disk") == first);
        std::fs::remove_file(bench.path("first.before")).unwrap();

        // A header that is gone.
        let mut gone = first.clone();
        gone[..1 << 20].fill(0);
        std::fs::write(bench.path("disk"), &gone).unwrap();
        let told = bench.refusal(&["header", "restore", "disk", "first"]);
        assert!(told.contains("no LUKS header") && told.contains("--force"), "{told}");
        bench.nbdcrypt(&["header", "restore", "disk", "first", "--force"]);
        assert!(read(&bench, "disk") == first);

        // A file that is none, and one that was cut off.
        std::fs::write(bench.path("cut"), &read(&bench, "first")[..200_000]).unwrap();
        for (file, words) in [("key", "no LUKS header"), ("cut", "200000 bytes")] {
            let told = bench.refusal(&["header", "restore", "disk", file, "--force"]);
            assert!(told.contains(words), "{told}");
        }
    }
}

/// A header that names a far place for its key material, on a disk that reaches there, would have a terabyte read into memory.
#[test]
fn a_header_longer_than_any_is_not_read_into_memory() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    let file = std::fs::File::create(&path).unwrap();
    let [mut luks1, _] = formats();
    // The last keyslot is not in use; the data is on another disk.
    luks1[104..108].fill(0);
    luks1[208 + 7 * 48 + 40..][..4].copy_from_slice(&(u32::MAX - 4096).to_be_bytes());
    std::os::unix::fs::FileExt::write_all_at(&file, &luks1, 0).unwrap();
    file.set_len(3 << 40).unwrap();
    let disk = harness::luks::store(&path);
    assert!(luks::dump(disk.as_ref()).is_ok());
    let error = Backup::read(disk.as_ref()).err().unwrap().to_string();
    assert!(error.contains("key-material-offset is up to byte 2199"), "{error}");
    // As little of it is saved before another one takes its place.
    luks1[208 + 7 * 48 + 40..][..4].copy_from_slice(&3592u32.to_be_bytes());
    let backup = Backup::read(&MemoryStore::from(luks1)).unwrap();
    assert!(backup.replaced(disk.as_ref()).unwrap().len() <= 136 << 20);
}

fn formats() -> [Vec<u8>; 2] {
    let passphrase = Passphrase::new(PASSPHRASE.to_vec());
    let luks1 = MemoryStore::zeroed(3 << 20);
    let options = quick_luks1(HashAlgorithm::Sha256);
    luks1::begin(&luks1, &options, &passphrase, key(64), &mut noise(3)).unwrap().commit(&luks1).unwrap();
    let luks2 = MemoryStore::zeroed(17 << 20);
    let mut options = quick_luks2();
    options.layout.keyslots_size = Some(1 << 20);
    luks2::begin(&luks2, &options, &passphrase, key(64), &mut noise(4)).unwrap().commit(&luks2).unwrap();
    [luks1.snapshot(), luks2.snapshot()[..3 << 20].to_vec()]
}

fn opens(store: &dyn BlockStore, passphrase: &[u8]) -> bool {
    luks::read_for_keys(store, &Limits::default())
        .and_then(|volume| volume.unlock(store, &Passphrase::new(passphrase.to_vec())))
        .is_ok_and(|unlocked| unlocked.key.expose() == key(64).expose())
}

/// The disk after `change` of its keys.
fn after(bytes: &[u8], change: impl FnOnce(&MemoryStore, &luks::LockedVolume, &NewKey<'_>)) -> Vec<u8> {
    let store = MemoryStore::from(bytes.to_vec());
    let passphrase = Passphrase::new(NEW.to_vec());
    let (kdf, hash) = (quick_pbkdf2(HashAlgorithm::Sha256), HashAlgorithm::Sha256);
    let volume = luks::read_for_keys(&store, &Limits::default()).unwrap();
    change(&store, &volume, &NewKey { passphrase: &passphrase, kdf, hash });
    store.snapshot()
}

/// Cuts the restore of what `saved` has to a disk that holds `now`.
#[track_caller]
fn cut(saved: &[u8], now: &[u8], is_good: &dyn Fn(&dyn BlockStore) -> bool) {
    let backup = Backup::read(&MemoryStore::from(saved.to_vec())).unwrap();
    let store = RecordingStore::new(now.to_vec(), 1);
    backup.restore(&store, false, &mut noise(20)).unwrap();
    let mut seen = 0;
    let cuts = store.cut_everywhere(&mut |disk| {
        assert!(is_good(disk), "state {seen}");
        seen += 1;
    });
    assert!(cuts.moments > 500, "{cuts:?}");
    assert!(store.snapshot()[..backup.bytes().len()] == *backup.bytes());
}

#[test]
fn a_restore_is_cut_anywhere_and_a_key_that_stays_or_has_its_place_alone_opens() {
    let limits = Limits::default();
    for bytes in formats() {
        let two = after(&bytes, |store, volume, new| {
            volume.add_key(store, &limits, &key(64), new, None, &mut noise(5)).unwrap();
        });
        // A key comes back, or goes: the one that stays opens at every cut.
        cut(&two, &bytes, &|disk| opens(disk, PASSPHRASE));
        cut(&bytes, &two, &|disk| opens(disk, PASSPHRASE));
        // A key was changed since: its successor lies elsewhere, and one of the two opens at every cut.
        let changed = after(&bytes, |store, volume, new| {
            volume.change_key(store, &limits, &key(64), 0, new, &mut noise(6)).unwrap();
        });
        assert!(!opens(&MemoryStore::from(changed.clone()), PASSPHRASE));
        cut(&bytes, &changed, &|disk| opens(disk, PASSPHRASE) || opens(disk, NEW));
        // A LUKS2 disk of which one header only is whole.
        if bytes[7] == 2 {
            for damaged in [5000, 16384 + 5000] {
                let mut torn = changed.clone();
                torn[damaged] ^= 1;
                cut(&bytes, &torn, &|disk| opens(disk, PASSPHRASE) || opens(disk, NEW));
            }
        }
    }
}

/// What force allows: the larger headers' second copy lies where the smaller ones' keys do.
#[test]
fn while_smaller_headers_take_the_place_of_larger_ones_there_is_a_header() {
    let [_, saved] = formats();
    let disk = MemoryStore::zeroed(17 << 20);
    let mut options = quick_luks2();
    options.layout = luks2::Layout { metadata_size: 32 << 10, keyslots_size: Some(1 << 20), ..options.layout };
    let passphrase = Passphrase::new(NEW.to_vec());
    luks2::begin(&disk, &options, &passphrase, key(64), &mut noise(7)).unwrap().commit(&disk).unwrap();
    let store = RecordingStore::new(disk.snapshot()[..3 << 20].to_vec(), 1);
    let backup = Backup::read(&MemoryStore::from(saved)).unwrap();
    backup.restore(&store, true, &mut noise(8)).unwrap();
    let mut seen = 0;
    store.cut_everywhere(&mut |disk| {
        assert!(luks::dump(disk).is_ok(), "state {seen}");
        seen += 1;
    });
    assert!(opens(&MemoryStore::from(store.snapshot()), PASSPHRASE));
}
