//! LUKS2 in both directions: the engine opens what cryptsetup makes, and cryptsetup opens what the engine makes.

use std::path::Path;

use engine::key::{Passphrase, VolumeKey};
use engine::luks::kdf::{Argon2Cost, KdfOptions};
use engine::luks::luks2::{self, Ephemeral};
use engine::luks::{self, HashAlgorithm, LuksError};
use engine::sector::SectorSize;
use harness::luks::{
    PASSPHRASE, UUID, Workbench, begin_luks2, cryptsetup_key, key, open, quick_luks2, quick_pbkdf2, run, store,
    try_run, unlock,
};

const MIB: u64 = 1 << 20;
const KDFS: [&[&str]; 5] = [
    &["--pbkdf", "pbkdf2", "--hash", "sha1"],
    &["--pbkdf", "pbkdf2", "--hash", "sha256"],
    &["--pbkdf", "pbkdf2", "--hash", "sha512"],
    &["--pbkdf", "argon2i", "--pbkdf-memory", "1024", "--pbkdf-parallel", "1"],
    &["--pbkdf", "argon2id", "--pbkdf-memory", "4096", "--pbkdf-parallel", "4"],
];

fn cryptsetup_format(bench: &Workbench, disk: &Path, extra: &[&str]) {
    let iterations = if extra.contains(&"pbkdf2") { "1000" } else { "4" };
    let (key_file, disk) = (bench.key_file(), disk.to_str().unwrap());
    let common = ["luksFormat", "-q", "--type", "luks2", "--pbkdf-force-iterations", iterations, "--key-file"];
    run("cryptsetup", common.iter().chain(&[key_file.to_str().unwrap()]).chain(extra).chain(&[disk]));
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs cryptsetup: run `make test`")]
fn volumes_of_cryptsetup_open_with_the_same_key() {
    let bench = Workbench::new();
    for kdf in KDFS {
        for (key_bits, sector) in [("512", "4096"), ("256", "512"), ("512", "1024")] {
            let disk = bench.disk("disk", 32 * MIB);
            let extra = [kdf, &["--key-size", key_bits, "--sector-size", sector]].concat();
            cryptsetup_format(&bench, &disk, &extra);
            let unlocked = unlock(&disk, PASSPHRASE).unwrap();
            assert_eq!(unlocked.key.expose(), cryptsetup_key(&bench, &disk), "{extra:?}");
            assert_eq!(unlocked.key.bits().to_string(), key_bits);
            assert_eq!(unlocked.segment.sector_size.to_string(), sector);
            assert_eq!((unlocked.segment.offset, unlocked.segment.len), (16 * MIB, 16 * MIB));
            let wrong = unlock(&disk, b"wrong").unwrap_err();
            assert!(matches!(wrong, LuksError::WrongPassphrase), "{wrong}");
        }
    }
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs cryptsetup: run `make test`")]
fn cryptsetup_accepts_our_volumes() {
    let bench = Workbench::new();
    let argon2 = KdfOptions::Argon2id(Argon2Cost { time: 4, memory: 4096, lanes: 4 });
    let kdfs = [argon2, quick_pbkdf2(HashAlgorithm::Sha1), quick_pbkdf2(HashAlgorithm::Sha512)];
    for kdf in kdfs {
        for (key_len, sector_size) in [(VolumeKey::AES_256, SectorSize::B4096), (VolumeKey::AES_128, SectorSize::B512)]
        {
            let disk = bench.disk("disk", 32 * MIB);
            let mut options = quick_luks2();
            (options.kdf, options.sector_size, options.label) = (kdf, sector_size, "a label".to_owned());
            begin_luks2(store(&disk).as_ref(), &options, key(key_len)).commit(store(&disk).as_ref()).unwrap();

            let (name, key_file) = (disk.to_str().unwrap(), bench.key_file());
            run("cryptsetup", ["isLuks", "--type", "luks2", name]);
            assert_eq!(run("cryptsetup", ["luksUUID", name]).trim(), UUID);
            run("cryptsetup", ["open", "--test-passphrase", "--key-file", key_file.to_str().unwrap(), name]);
            assert_eq!(cryptsetup_key(&bench, &disk), key(key_len).expose(), "{kdf:?}");
            let dump = try_run("cryptsetup", ["luksDump", "--debug", name]);
            let said = String::from_utf8_lossy(&dump.stdout).into_owned();
            for complaint in ["recover", "mismatch", "nvalid", "ailed"] {
                assert!(dump.status.success() && !said.contains(complaint), "{complaint}: {said}");
            }
            assert_eq!(open(&disk).len(), 16 * MIB);
        }
    }
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs cryptsetup: run `make test`")]
fn our_volumes_open_after_cryptsetup_changed_them() {
    let bench = Workbench::new();
    let disk = bench.disk("disk", 32 * MIB);
    begin_luks2(store(&disk).as_ref(), &quick_luks2(), key(64)).commit(store(&disk).as_ref()).unwrap();
    for name in ["second", "third"] {
        std::fs::write(bench.path(name), name).unwrap();
    }
    std::fs::write(bench.path("token"), r#"{"type":"aws-kms","keyslots":["0"],"what":{"we":["do not",{"know":1}]}}"#)
        .unwrap();
    let quick = ["-q", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"];
    let manage = |arguments: &[&str]| bench.run("cryptsetup", arguments.iter().copied());
    manage(&[&["luksAddKey"], &quick[..], &["--key-slot", "7", "--key-file", "key", "disk", "second"]].concat());
    manage(&[&["luksChangeKey"], &quick[..], &["--key-slot", "0", "--key-file", "key", "disk", "third"]].concat());
    manage(&["token", "import", "--json-file", "token", "disk"]);
    manage(&["config", "--priority", "prefer", "--key-slot", "7", "disk"]);
    manage(&["config", "--label", "a label", "--subsystem", "something", "disk"]);
    assert!(matches!(unlock(&disk, PASSPHRASE), Err(LuksError::WrongPassphrase)));
    assert_eq!(unlock(&disk, b"second").unwrap().keyslot, 7);
    assert_eq!(unlock(&disk, b"third").unwrap().key.expose(), key(64).expose());
    manage(&["luksKillSlot", "-q", "--key-file", "second", "disk", "0"]);
    assert!(matches!(unlock(&disk, b"third"), Err(LuksError::WrongPassphrase)));
    manage(&["luksErase", "-q", "disk"]);
    assert!(matches!(unlock(&disk, b"second"), Err(LuksError::NoKeyslot)));
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs cryptsetup: run `make test`")]
fn cryptsetup_shows_an_ephemeral_volume_without_keyslots() {
    let bench = Workbench::new();
    let disk = bench.disk("disk", 32 * MIB);
    let new = Ephemeral { sector_size: SectorSize::B4096, uuid: uuid::Uuid::from_u128(7) };
    let pending = new.begin(store(&disk).as_ref(), key(64), &mut harness::luks::noise(1)).unwrap();
    pending.commit(store(&disk).as_ref()).unwrap();
    let name = disk.to_str().unwrap();
    run("cryptsetup", ["isLuks", "--type", "luks2", name]);
    let dump = run("cryptsetup", ["luksDump", name]);
    let keyslots = dump.split("Keyslots:").nth(1).unwrap().split("Tokens:").next().unwrap();
    assert!(keyslots.trim().is_empty() && dump.contains("nbdcrypt ephemeral"), "{dump}");
    assert!(dump.contains("offset: 1048576 [bytes]") && dump.contains("0: pbkdf2"), "{dump}");
    let complaints = try_run("cryptsetup", ["luksDump", "--debug", name]);
    let said = String::from_utf8_lossy(&complaints.stdout).into_owned();
    assert!(!["recover", "mismatch", "nvalid", "ailed"].iter().any(|word| said.contains(word)), "{said}");
    // What cryptsetup does to it leaves the mark, and no header that lost its keyslots becomes one.
    run("cryptsetup", ["luksErase", "-q", name]);
    assert!(luks2::is_ephemeral(store(&disk).as_ref()).unwrap());
    begin_luks2(store(&disk).as_ref(), &quick_luks2(), key(64)).abandon(store(&disk).as_ref()).unwrap();
    cryptsetup_format(&bench, &disk, KDFS[1]);
    run("cryptsetup", ["luksErase", "-q", name]);
    assert!(!luks2::is_ephemeral(store(&disk).as_ref()).unwrap());
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs cryptsetup: run `make test`")]
fn dump_prints_the_lines_of_cryptsetup_and_the_encryption() {
    let bench = Workbench::new();
    let disk = bench.disk("disk", 32 * MIB);
    cryptsetup_format(&bench, &disk, KDFS[4]);
    std::fs::write(bench.path("second"), "second").unwrap();
    std::fs::write(bench.path("token"), r#"{"type":"aws-kms","keyslots":["0","1"]}"#).unwrap();
    let manage = |arguments: &[&str]| bench.run("cryptsetup", arguments.iter().copied());
    let add = ["luksAddKey", "-q", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", "--key-file", "key"];
    manage(&[&add[..], &["disk", "second"]].concat());
    manage(&["token", "import", "--json-file", "token", "disk"]);
    manage(&["token", "add", "--unbound", "--key-description", "a description", "disk"]);
    manage(&["config", "--priority", "ignore", "--key-slot", "1", "disk"]);
    manage(&["config", "--label", "a label", "--subsystem", "something", "disk"]);
    let ours = luks::dump(store(&disk).as_ref()).unwrap();
    assert_eq!(ours.encryption(), Some("AES-256-XTS"));
    let ours = ours.display("disk");
    let (own, shared): (Vec<&str>, Vec<&str>) = ours.lines().partition(|line| line.starts_with("\tencryption:"));
    assert_eq!(own, ["\tencryption: AES-256-XTS"]);
    assert_eq!(shared, manage(&["luksDump", "disk"]).lines().collect::<Vec<_>>());
    let ignored = unlock(&disk, b"second");
    assert!(
        matches!(ignored, Err(LuksError::WrongPassphraseBesideIgnored { ignored: 1 })),
        "an ignored keyslot is not tried"
    );
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs cryptsetup, mkfs.xfs: run `make test`")]
fn the_second_header_opens_unless_the_disk_was_reused() {
    let bench = Workbench::new();
    let disk = bench.disk("disk", 512 * MIB);
    cryptsetup_format(&bench, &disk, KDFS[1]);
    let expected = unlock(&disk, PASSPHRASE).unwrap();
    for (offset, what) in [(0u64, "magic"), (8, "hdr_size"), (4096 + 100, "JSON"), (450, "checksum")] {
        let before = std::fs::read(&disk).unwrap();
        store(&disk).write_at(&[0xff; 3], offset).unwrap();
        let found = unlock(&disk, PASSPHRASE).unwrap();
        assert_eq!(found.key.expose(), expected.key.expose(), "damaged {what}");
        store(&disk).write_at(&[0xff; 3], 16384 + offset).unwrap();
        let error = unlock(&disk, PASSPHRASE).unwrap_err();
        assert!(matches!(error, LuksError::Corrupt { .. } | LuksError::NotLuks), "{what}: {error}");
        store(&disk).write_at(&before[..32768], 0).unwrap();
    }
    // mkfs.xfs does not overwrite the second header.
    run("mkfs.xfs", ["-qf", disk.to_str().unwrap()]);
    assert!(matches!(unlock(&disk, PASSPHRASE), Err(LuksError::NotLuks)));
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs cryptsetup: run `make test`")]
fn unsupported_features_are_refused_by_name() {
    let bench = Workbench::new();
    let disk = bench.disk("disk", 64 * MIB);
    cryptsetup_format(&bench, &disk, KDFS[1]);
    let arguments = ["reencrypt", "-q", "--force-offline-reencrypt", "--init-only", "--key-file", "key", "disk"];
    let passphrase = Passphrase::new(PASSPHRASE.to_vec());
    let started =
        std::process::Command::new("cryptsetup").args(arguments).current_dir(bench.path(".")).output().unwrap();
    assert!(started.status.success(), "{started:?}");
    let store = store(&disk);
    let error = luks::read(store.as_ref(), &luks::Limits::default())
        .and_then(|volume| volume.unlock(store.as_ref(), &passphrase))
        .unwrap_err();
    assert!(error.to_string().contains("requirement") && error.to_string().contains("reencrypt"), "{error}");
}
