//! Header backups: the file is the same as cryptsetup's, either program restores the other's, and a power cut during a
//! restore does no harm.

use std::os::unix::fs::PermissionsExt;

use engine::key::Passphrase;
use engine::luks::{self, Backup, FormatOptions, HashAlgorithm, Limits, LuksError, NewKey, luks1, luks2};
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

/// Changes the key, and fills the space behind the header.
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
fn nbdcrypt_and_cryptsetup_make_and_restore_the_same_backups() {
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
        // cryptsetup can also restore the backup that nbdcrypt made of the header before the restore.
        bench.run("cryptsetup", ["luksHeaderRestore", "-q", "--header-backup-file", "theirs.before", "disk"]);
        assert!(unlock(&bench.path("disk"), NEW).is_ok() && unlock(&bench.path("disk"), PASSPHRASE).is_err());
        let len = read(&bench, "theirs.before").len();
        assert!(read(&bench, "disk")[..len] == changed[..len]);
        bench.run("cryptsetup", ["luksHeaderRestore", "-q", "--header-backup-file", "ours", "disk"]);
        assert!(read(&bench, "disk") == before, "{kind}, {key_bits}");

        // An existing backup is not overwritten.
        let told = bench.refusal(&["header", "restore", "disk", "theirs"]);
        assert!(told.contains("theirs.before") && told.contains("exists"), "{told}");
    }
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs cryptsetup: run `make test`")]
fn a_restore_keeps_data_in_the_keyslots_last_page() {
    let bench = workbench("luks1", "256");
    let disk = bench.path("disk");
    // An old cryptsetup may have made such a volume: the data begins where the last keyslot's material ends. That is 250
    // sectors after the material's start at sector 8 + 7 * 256. (Byte 104 of the header holds the data's offset.)
    let mut bytes = read(&bench, "disk");
    bytes[104..108].copy_from_slice(&(8 + 7 * 256 + 250_u32).to_be_bytes());
    std::fs::write(&disk, &bytes).unwrap();
    let segment = unlock(&disk, PASSPHRASE).unwrap().segment;
    assert_ne!(segment.offset % 4096, 0, "the data begins in the middle of a page");
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
    assert!(read(&bench, "disk")[end..] == changed[end..], "the data is unchanged");
    assert!(unlock(&disk, PASSPHRASE).is_ok());
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs cryptsetup: run `make test`")]
fn only_a_fitting_backup_of_the_same_volume_is_restored() {
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
        // A header with another UUID.
        bench.run("cryptsetup", ["luksUUID", "-q", "--uuid", "11111111-2222-4333-8444-555555555555", "disk"]);
        let other = read(&bench, "disk");
        let told = bench.refusal(&["header", "restore", "disk", "first"]);
        assert!(told.contains("UUID") && told.contains("--force"), "{told}");
        assert!(read(&bench, "disk") == other && !bench.path("first.before").exists());
        bench.nbdcrypt(&["header", "restore", "disk", "first", "--force"]);
        assert!(read(&bench, "disk") == first);
        std::fs::remove_file(bench.path("first.before")).unwrap();

        // A disk without a header.
        let mut gone = first.clone();
        gone[..1 << 20].fill(0);
        std::fs::write(bench.path("disk"), &gone).unwrap();
        let told = bench.refusal(&["header", "restore", "disk", "first"]);
        assert!(told.contains("no LUKS header") && told.contains("--force"), "{told}");
        bench.nbdcrypt(&["header", "restore", "disk", "first", "--force"]);
        assert!(read(&bench, "disk") == first);

        // A file that is not a backup, and a backup that was cut off.
        std::fs::write(bench.path("cut"), &read(&bench, "first")[..200_000]).unwrap();
        for (file, words) in [("key", "no LUKS header"), ("cut", "200000 bytes")] {
            let told = bench.refusal(&["header", "restore", "disk", file, "--force"]);
            assert!(told.contains(words), "{told}");
        }
    }
}

/// The data's key has changed since the backup. After a restore, all data would be noise.
#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs cryptsetup: run `make test`")]
fn a_backup_with_an_old_key_needs_force() {
    let bench = workbench("luks2", "512");
    bench.nbdcrypt(&["header", "backup", "disk", "before"]);
    let reencrypt = ["reencrypt", "-q", "--force-offline-reencrypt", "--key-file", "key", "disk"];
    bench.run("cryptsetup", reencrypt.into_iter().chain(QUICK));
    let disk = read(&bench, "disk");
    let told = bench.refusal(&["header", "restore", "disk", "before"]);
    for words in ["another volume key", "all data on the disk would be noise", "reencrypted", "--force"] {
        assert!(told.contains(words), "{told}");
    }
    assert!(read(&bench, "disk") == disk && !bench.path("before.before").exists());
    // A backup of the new key is restored without a question, even if the passphrases changed.
    bench.nbdcrypt(&["header", "backup", "disk", "after"]);
    change(&bench);
    bench.nbdcrypt(&["header", "restore", "disk", "after"]);
    assert!(read(&bench, "disk") == disk);
    // With --force the old header is restored, and the current one is saved first.
    bench.nbdcrypt(&["header", "restore", "disk", "before", "--force"]);
    assert!(read(&bench, "disk")[..1 << 20] != disk[..1 << 20]);
    bench.nbdcrypt(&["header", "restore", "disk", "before.before", "--force"]);
    assert!(read(&bench, "disk") == disk);

    // A reencryption is unfinished, on the disk or in the backup.
    let begin = ["reencrypt", "--init-only", "-q", "--force-offline-reencrypt", "--key-file", "key", "disk"];
    bench.run("cryptsetup", begin.into_iter().chain(QUICK));
    let pending = read(&bench, "disk");
    bench.run("cryptsetup", ["luksHeaderBackup", "--header-backup-file", "pending", "disk"]);
    let told = bench.refusal(&["header", "restore", "disk", "after"]);
    assert!(told.contains("the header on the disk says") && told.contains("online-reencrypt"), "{told}");
    assert!(told.contains("cryptsetup reencrypt --resume-only"), "{told}");
    assert!(read(&bench, "disk") == pending);
    std::fs::write(bench.path("disk"), &disk).unwrap();
    let told = bench.refusal(&["header", "restore", "disk", "pending"]);
    assert!(told.contains("the backup says") && told.contains("noise"), "{told}");
    assert!(read(&bench, "disk") == disk);
}

/// In LUKS1 and LUKS2, equal volume keys are recognised by the digest.
#[test]
fn a_backup_with_another_key_is_restored_only_by_force() {
    let key_of = |bytes: &[u8]| {
        // The header is as if the volume had been formatted again with the same UUID.
        let store = MemoryStore::zeroed(bytes.len());
        let passphrase = Passphrase::new(PASSPHRASE.to_vec());
        let (options, mut random) = (quick_luks1(HashAlgorithm::Sha256), noise(77));
        let mut other = quick_luks2();
        other.layout.keyslots_size = Some(1 << 20);
        other.layout.data_offset = Some(2 << 20);
        let format = if bytes[7] == 1 { FormatOptions::Luks1(options) } else { FormatOptions::Luks2(Box::new(other)) };
        let mut key = vec![0; 64];
        random(&mut key).unwrap();
        let key = engine::key::VolumeKey::new(key).unwrap();
        format.begin(&store, &passphrase, key, &mut random).unwrap().commit(&store).unwrap();
        store
    };
    for bytes in formats() {
        let mut bytes = bytes;
        bytes.resize(3 << 20, 0);
        let backup = Backup::read(&MemoryStore::from(bytes.clone())).unwrap();
        let disk = key_of(&bytes);
        let now = disk.snapshot();
        let error = backup.restore(&disk, false, &mut noise(1)).unwrap_err();
        let is_told = matches!(error, LuksError::BackupOfOtherKey { .. });
        assert!(is_told, "{error}");
        assert!(disk.snapshot() == now);
        backup.restore(&disk, true, &mut noise(1)).unwrap();
        assert!(opens(&disk, PASSPHRASE));
    }
}

/// If only the digest or only its salt differs, it is damaged. With another key, both would differ.
#[test]
fn a_damaged_digest_is_named_and_restored_only_with_force() {
    let [luks1, _] = formats();
    let backup = Backup::read(&MemoryStore::from(luks1.clone())).unwrap();
    for (at, words) in [(112, "its salt is the same in both"), (132, "the digest itself is the same in both")] {
        let mut bytes = luks1.clone();
        bytes[at] ^= 1;
        let disk = MemoryStore::from(bytes.clone());
        assert!(!opens(&disk, PASSPHRASE));
        let error = backup.restore(&disk, false, &mut noise(1)).unwrap_err().to_string();
        assert!(error.contains(words) && !error.contains("another volume key"), "{error}");
        assert!(disk.snapshot() == bytes);
        backup.restore(&disk, true, &mut noise(1)).unwrap();
        assert!(disk.snapshot() == luks1 && opens(&disk, PASSPHRASE));
    }
}

/// On a large disk, a header may place its key material at a far offset. Reading everything before it would take a
/// terabyte of memory.
#[test]
fn an_absurdly_long_header_is_not_read_into_memory() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    let file = std::fs::File::create(&path).unwrap();
    let [mut luks1, _] = formats();
    // The last keyslot is not in use, and the data is on another disk.
    luks1[104..108].fill(0);
    luks1[208 + 7 * 48 + 40..][..4].copy_from_slice(&(u32::MAX - 4096).to_be_bytes());
    std::os::unix::fs::FileExt::write_all_at(&file, &luks1, 0).unwrap();
    file.set_len(3 << 40).unwrap();
    let disk = harness::luks::store(&path);
    assert!(luks::dump(disk.as_ref()).is_ok());
    let error = Backup::read(disk.as_ref()).err().unwrap().to_string();
    assert!(error.contains("key-material-offset is up to byte 2199"), "{error}");
    // If a backup replaces such a header, the part of the disk that is saved first has a bounded length, too.
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

/// Returns the disk after `change` has changed its keys.
fn after(bytes: &[u8], change: impl FnOnce(&MemoryStore, &luks::LockedVolume, &NewKey<'_>)) -> Vec<u8> {
    let store = MemoryStore::from(bytes.to_vec());
    let passphrase = Passphrase::new(NEW.to_vec());
    let (kdf, hash) = (quick_pbkdf2(HashAlgorithm::Sha256), HashAlgorithm::Sha256);
    let volume = luks::read_for_keys(&store, &Limits::default()).unwrap();
    change(&store, &volume, &NewKey { passphrase: &passphrase, kdf, hash });
    store.snapshot()
}

/// Restores `saved` on a disk that holds `now`, and checks every power cut with `is_good`.
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
fn a_key_always_opens_during_an_interrupted_restore() {
    let limits = Limits::default();
    for bytes in formats() {
        let two = after(&bytes, |store, volume, new| {
            volume.add_key(store, &limits, &key(64), new, None, &mut noise(5)).unwrap();
        });
        // A key is added or removed by the restore. The key that remains opens the volume at every cut.
        cut(&two, &bytes, &|disk| opens(disk, PASSPHRASE));
        cut(&bytes, &two, &|disk| opens(disk, PASSPHRASE));
        // A key was changed since the backup. The new key lies elsewhere, and at every cut either the old or the new
        // key opens the volume.
        let changed = after(&bytes, |store, volume, new| {
            volume.change_key(store, &limits, &key(64), 0, new, false, &mut noise(6)).unwrap();
        });
        assert!(!opens(&MemoryStore::from(changed.clone()), PASSPHRASE));
        cut(&bytes, &changed, &|disk| opens(disk, PASSPHRASE) || opens(disk, NEW));
        // A LUKS2 disk on which only one header is intact.
        if bytes[7] == 2 {
            for damaged in [5000, 16384 + 5000] {
                let mut torn = changed.clone();
                torn[damaged] ^= 1;
                cut(&bytes, &torn, &|disk| opens(disk, PASSPHRASE) || opens(disk, NEW));
            }
        }
    }
}

/// With force, headers of another size can be restored. The second copy of the larger headers then lies at the same
/// place as the keys of the smaller headers.
#[test]
fn a_restore_of_smaller_headers_always_leaves_a_header() {
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

/// The saved header may be the only one with an old key. Swapped arguments would write the present header over it.
#[test]
fn a_saved_header_is_not_taken_for_the_disk() {
    for kind in ["luks1", "luks2"] {
        let bench = Workbench::new();
        let format = ["format", "disk", "--type", kind, "--size", "20M", "--key-file", "key"];
        bench.nbdcrypt(&[&format[..], &QUICK].concat());
        bench.nbdcrypt(&["header", "backup", "disk", "backup"]);
        std::fs::set_permissions(bench.path("backup"), std::fs::Permissions::from_mode(0o600)).unwrap();
        std::fs::write(bench.path("new"), NEW).unwrap();
        let add = ["key", "add", "disk", "--key-file", "key", "--new-key-file", "new"];
        bench.nbdcrypt(&[&add[..], &QUICK].concat());
        let saved = read(&bench, "backup");
        let told = bench.refusal(&["header", "restore", "backup", "disk"]);
        assert!(told.contains("backup looks like a saved header") && told.contains("--force"), "{told}");
        assert!(read(&bench, "backup") == saved && !bench.path("disk.before").exists());
        // A file that is too long for a header.
        std::fs::write(bench.path("long"), &saved).unwrap();
        std::fs::File::options().write(true).open(bench.path("long")).unwrap().set_len(512 << 20).unwrap();
        let told = bench.refusal(&["header", "restore", "disk", "long"]);
        assert!(told.contains("long looks like a disk") && told.contains("--force"), "{told}");
        bench.nbdcrypt(&["header", "restore", "disk", "backup"]);
        bench.nbdcrypt(&["header", "restore", "--force", "backup", "disk"]);
        assert!(unlock(&bench.path("disk"), NEW).is_err());
    }
}
