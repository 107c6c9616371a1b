//! LUKS1 in both directions: the engine opens what cryptsetup makes, and cryptsetup opens what the engine makes.

use engine::key::VolumeKey;
use engine::luks::{self, HashAlgorithm, LuksError};
use harness::luks::{
    PASSPHRASE, UUID, Workbench, cryptsetup_key, format_luks1, key, open, run, store, try_run, unlock,
};

const MIB: u64 = 1 << 20;

/// Runs `cryptsetup luksFormat --type luks1` with few iterations.
fn cryptsetup_format(bench: &Workbench, disk: &str, extra: &[&str]) {
    let (key_file, disk) = (bench.key_file(), bench.path(disk));
    let (key_file, disk) = (key_file.to_str().unwrap(), disk.to_str().unwrap());
    let arguments = ["luksFormat", "-q", "--type", "luks1", "--pbkdf-force-iterations", "1000", "--key-file", key_file];
    run("cryptsetup", arguments.iter().chain(extra).chain(&[disk]));
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs cryptsetup: run `make test`")]
fn volumes_of_cryptsetup_open_with_the_same_key() {
    let bench = Workbench::new();
    for key_bits in [256, 512] {
        for hash in HashAlgorithm::ALL {
            let disk = bench.disk("disk", 16 * MIB);
            cryptsetup_format(&bench, "disk", &["--key-size", &key_bits.to_string(), "--hash", hash.name()]);
            let unlocked = unlock(&disk, PASSPHRASE).unwrap();
            assert_eq!(unlocked.key.bits(), key_bits);
            assert_eq!(unlocked.key.expose(), cryptsetup_key(&bench, disk.as_ref()), "{key_bits} bits, {hash}");
            assert_eq!(unlocked.segment.offset + unlocked.segment.len, 16 * MIB);
        }
    }
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs cryptsetup: run `make test`")]
fn cryptsetup_accepts_our_volumes() {
    let bench = Workbench::new();
    for key_len in [VolumeKey::AES_128, VolumeKey::AES_256] {
        for hash in HashAlgorithm::ALL {
            let disk = bench.disk("disk", 16 * MIB);
            format_luks1(&disk, hash, key(key_len));
            let (disk, key_file) = (disk.to_str().unwrap(), bench.key_file());
            run("cryptsetup", ["isLuks", "--type", "luks1", disk]);
            assert_eq!(run("cryptsetup", ["luksUUID", disk]).trim(), UUID);
            run("cryptsetup", ["open", "--test-passphrase", "--key-file", key_file.to_str().unwrap(), disk]);
            assert_eq!(cryptsetup_key(&bench, disk.as_ref()), key(key_len).expose(), "{key_len} bytes, {hash}");
            let dump = try_run("cryptsetup", ["luksDump", disk]);
            assert!(dump.status.success() && dump.stderr.is_empty(), "{dump:?}");
            assert_eq!(open(disk.as_ref()).len() % 512, 0);
        }
    }
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs cryptsetup: run `make test`")]
fn any_keyslot_opens_and_a_wrong_passphrase_does_not() {
    let bench = Workbench::new();
    let disk = bench.disk("disk", 16 * MIB);
    cryptsetup_format(&bench, "disk", &[]);
    std::fs::write(bench.path("other"), b"another").unwrap();
    let (key_file, other) = (bench.key_file(), bench.path("other"));
    let add = ["luksAddKey", "-q", "--pbkdf-force-iterations", "1000", "--key-slot", "6", "--key-file"];
    let places = [key_file.to_str().unwrap(), disk.to_str().unwrap(), other.to_str().unwrap()];
    run("cryptsetup", add.iter().chain(&places));
    assert_eq!(unlock(&disk, PASSPHRASE).unwrap().keyslot, 0);
    assert_eq!(unlock(&disk, b"another").unwrap().keyslot, 6);
    assert!(matches!(unlock(&disk, b"another "), Err(LuksError::WrongPassphrase)));
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs cryptsetup: run `make test`")]
fn dump_prints_the_lines_of_cryptsetup_and_the_encryption() {
    let bench = Workbench::new();
    for (key_bits, encryption) in [("256", "AES-128-XTS"), ("512", "AES-256-XTS")] {
        let disk = bench.disk("disk", 16 * MIB);
        cryptsetup_format(&bench, "disk", &["--key-size", key_bits]);
        let disk = disk.to_str().unwrap();
        let ours = luks::dump(store(disk.as_ref()).as_ref()).unwrap();
        assert_eq!(ours.encryption(), Some(encryption));
        let ours = ours.display(disk);
        let (own, shared): (Vec<&str>, Vec<&str>) = ours.lines().partition(|line| line.starts_with("Encryption:"));
        assert_eq!(own, [format!("Encryption:    \t{encryption}")]);
        assert_eq!(shared, run("cryptsetup", ["luksDump", disk]).lines().collect::<Vec<_>>());
    }
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs cryptsetup: run `make test`")]
fn an_unsupported_hash_is_named_and_shown() {
    let bench = Workbench::new();
    let disk = bench.disk("disk", 16 * MIB);
    cryptsetup_format(&bench, "disk", &["--hash", "md5-sha1"]);
    let error = unlock(&disk, PASSPHRASE).unwrap_err();
    assert!(matches!(error, LuksError::Unsupported(_)) && error.to_string().contains("hash md5-sha1"), "{error}");
    let dump = luks::dump(store(&disk).as_ref()).unwrap().display("it");
    assert!(dump.contains("Hash spec:     \tmd5-sha1\n"), "{dump}");
}
