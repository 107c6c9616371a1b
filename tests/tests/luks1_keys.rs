//! Key management of LUKS1 volumes: `nbdcrypt` on volumes that cryptsetup formatted, and cryptsetup on volumes that
//! nbdcrypt formatted.

use engine::luks::HashAlgorithm;
use harness::luks::{Workbench, cryptsetup_key, cryptsetup_key_of, unlock};

const QUICK: [&str; 2] = ["--pbkdf-force-iterations", "1000"];

/// Makes a disk, a key file for each keyslot, and a key file `other` that opens none.
fn workbench() -> Workbench {
    let bench = Workbench::new();
    for slot in 0..8 {
        std::fs::write(bench.path(&format!("key{slot}")), format!("passphrase {slot}")).unwrap();
    }
    std::fs::write(bench.path("other"), "another").unwrap();
    bench.disk("disk", 6 << 20);
    bench
}

fn cryptsetup(bench: &Workbench, arguments: &[&str]) -> String {
    bench.run("cryptsetup", arguments.iter().copied())
}

fn add(bench: &Workbench, slot: usize) {
    let new = format!("key{slot}");
    let said =
        bench.nbdcrypt(&[&["key", "add", "disk", "--key-file", "key0", "--new-key-file", &new], &QUICK[..]].concat());
    assert_eq!(said, format!("disk: key in keyslot {slot}\n"));
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs cryptsetup: run `make test`")]
fn keys_of_cryptsetup_volumes_with_512_bits_are_managed() {
    // One hash of each family. `luks1_cryptsetup` opens volumes with every hash, in both directions.
    use HashAlgorithm::{Blake2b512, Ripemd160, Sha3_256, Sha256, Whirlpool};
    manage(&[Sha256, Ripemd160, Whirlpool, Sha3_256, Blake2b512], "512");
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs cryptsetup: run `make test`")]
fn keys_of_cryptsetup_volumes_with_256_bits_are_managed() {
    manage(&[HashAlgorithm::Sha1, HashAlgorithm::Sha512], "256");
}

fn manage(hashes: &[HashAlgorithm], key_bits: &str) {
    for hash in hashes {
        let bench = workbench();
        let format = ["luksFormat", "-q", "--type", "luks1", "--hash", hash.name(), "--key-size", key_bits];
        cryptsetup(&bench, &[&format[..], &QUICK, &["--key-file", "key0", "disk"]].concat());
        let expected = cryptsetup_key_of(&bench, &bench.path("disk"), "key0");
        for slot in 1..8 {
            add(&bench, slot);
        }
        bench.accepted_by_cryptsetup("disk");
        for slot in [1, 6, 7] {
            assert!(bench.cryptsetup_opens("disk", &slot.to_string(), &format!("key{slot}")), "{hash}, keyslot {slot}");
        }
        let change = ["key", "change", "disk", "--new-key-file", "other", QUICK[0], QUICK[1], "--key-file"];
        assert!(bench.refusal(&[&change[..], &["key6"]].concat()).contains("no room"));
        assert_eq!(
            bench.nbdcrypt(&["key", "remove", "disk", "--key-slot", "3", "-d", "key0"]),
            "disk: keyslot 3 cleared\n"
        );
        assert_eq!(bench.nbdcrypt(&["key", "remove", "disk", "--key-file", "key4"]), "disk: keyslot 4 cleared\n");
        // LUKS1 has no space to replace a key in its own keyslot.
        assert_eq!(bench.nbdcrypt(&[&change[..], &["key6"]].concat()), "disk: new key in keyslot 3\n");
        let dump = bench.accepted_by_cryptsetup("disk");
        for (slot, used) in [(2, true), (3, true), (4, false), (5, true), (6, false), (7, true)] {
            let line = format!("Key Slot {slot}: {}", if used { "ENABLED" } else { "DISABLED" });
            assert!(dump.contains(&line), "{line}: {dump}");
        }
        for (slot, key_file) in [("3", "key3"), ("4", "key4"), ("6", "key6")] {
            assert!(!bench.cryptsetup_opens("disk", slot, key_file), "{hash}, {key_file}");
        }
        assert!(bench.cryptsetup_opens("disk", "3", "other"));
        assert_eq!(cryptsetup_key_of(&bench, &bench.path("disk"), "other"), expected);
        // cryptsetup can add a key to the keyslot that nbdcrypt cleared.
        cryptsetup(&bench, &[&["luksAddKey", "-q"], &QUICK[..], &["--key-file", "key0", "disk", "key6"]].concat());
        assert_eq!(unlock(&bench.path("disk"), b"passphrase 6").unwrap().keyslot, 4);
    }
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs cryptsetup: run `make test`")]
fn the_last_key_is_not_removed_without_force() {
    let bench = workbench();
    let format = ["luksFormat", "-q", "--type", "luks1", "--key-file", "key0", "disk"];
    cryptsetup(&bench, &[&format[..], &QUICK].concat());
    let before = std::fs::read(bench.path("disk")).unwrap();
    assert!(bench.refusal(&["key", "remove", "disk", "--key-slot", "0"]).contains("last key"));
    assert!(bench.refusal(&["key", "remove", "disk", "--key-file", "other"]).contains("passphrase"));
    let wrong = ["key", "add", "disk", "--key-file", "other", "--new-key-file", "key1"];
    assert!(bench.refusal(&wrong).contains("passphrase"));
    assert!(bench.refusal(&["token", "list", "disk"]).contains("LUKS1"));
    assert!(std::fs::read(bench.path("disk")).unwrap() == before);
    bench.nbdcrypt(&["key", "remove", "disk", "--key-slot", "0", "--force"]);
    assert!(!bench.accepted_by_cryptsetup("disk").contains("ENABLED"));
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs cryptsetup: run `make test`")]
fn cryptsetup_manages_the_keys_of_our_volumes() {
    for (hash, key_bits) in [("sha1", "256"), ("sha256", "512"), ("sha512", "256"), ("sha512", "512")] {
        let bench = workbench();
        let format =
            ["format", "disk", "--type", "luks1", "--key-file", "key0", "--hash", hash, "--key-size", key_bits];
        bench.nbdcrypt(&[&format[..], &QUICK].concat());
        add(&bench, 1);
        add(&bench, 2);
        let expected = cryptsetup_key_of(&bench, &bench.path("disk"), "key2");
        let quick = |arguments: &[&str]| cryptsetup(&bench, &[arguments, &["-q"], &QUICK[..]].concat());
        quick(&["luksAddKey", "--key-slot", "6", "--key-file", "key1", "disk", "key6"]);
        quick(&["luksChangeKey", "--key-slot", "2", "--key-file", "key2", "disk", "other"]);
        cryptsetup(&bench, &["luksKillSlot", "-q", "--key-file", "key6", "disk", "1"]);
        cryptsetup(&bench, &["luksRemoveKey", "-q", "disk", "key0"]);
        bench.accepted_by_cryptsetup("disk");
        for (passphrase, opens) in [("passphrase 0", false), ("passphrase 1", false), ("passphrase 2", false)]
            .into_iter()
            .chain([("passphrase 6", true), ("another", true)])
        {
            let unlocked = unlock(&bench.path("disk"), passphrase.as_bytes());
            assert_eq!(unlocked.is_ok_and(|it| it.key.expose() == expected), opens, "{hash}: {passphrase}");
        }
        let before = std::fs::read(bench.path("disk")).unwrap();
        cryptsetup(&bench, &["repair", "-q", "disk"]);
        assert!(std::fs::read(bench.path("disk")).unwrap() == before, "cryptsetup repair changes nothing");
        std::fs::copy(bench.path("key6"), bench.key_file()).unwrap();
        assert_eq!(cryptsetup_key(&bench, &bench.path("disk")), expected);
    }
}
