//! Keys, tokens and repair of LUKS2 volumes: `nbdcrypt` on volumes that cryptsetup formatted, and cryptsetup on volumes
//! that nbdcrypt formatted.

use harness::luks::{Workbench, cryptsetup_key_of, sha256, store, unlock};
use serde_json::Value;

/// Key derivations with as little work as cryptsetup allows.
const KDFS: [&[&str]; 5] = [
    &["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", "--hash", "sha1"],
    &["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", "--hash", "sha256"],
    &["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", "--hash", "sha512"],
    &["--pbkdf", "argon2i", "--pbkdf-force-iterations", "4", "--pbkdf-memory", "64", "--pbkdf-parallel", "1"],
    &["--pbkdf", "argon2id", "--pbkdf-force-iterations", "4", "--pbkdf-memory", "256", "--pbkdf-parallel", "2"],
];
const TOKEN: &str = r#"{"type":"aws-kms","keyslots":["0"],"unknown":{"kept":[1,{"two":null}],"three":"\"3\""}}"#;

/// Makes a disk, a key file for each of 8 keyslots, a key file `other` that opens none, and a token.
fn workbench() -> Workbench {
    let bench = Workbench::new();
    for slot in 0..8 {
        std::fs::write(bench.path(&format!("key{slot}")), format!("passphrase {slot}")).unwrap();
    }
    std::fs::write(bench.path("other"), "another").unwrap();
    std::fs::write(bench.path("token"), TOKEN).unwrap();
    bench.disk("disk", 18 << 20);
    bench
}

fn cryptsetup(bench: &Workbench, arguments: &[&str]) -> String {
    bench.run("cryptsetup", arguments.iter().copied())
}

fn add(bench: &Workbench, slot: usize, kdf: &[&str]) {
    let new = format!("key{slot}");
    let said = bench.nbdcrypt(&[&["key", "add", "disk", "--key-file", "key0", "--new-key-file", &new], kdf].concat());
    assert_eq!(said, format!("disk: key in keyslot {slot}\n"));
}

fn luks_format(bench: &Workbench, kdf: &[&str], key_bits: &str) {
    let format = ["luksFormat", "-q", "--type", "luks2", "--key-size", key_bits, "--key-file", "key0", "disk"];
    cryptsetup(bench, &[&format[..], kdf].concat());
}

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap()
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs cryptsetup: run `make test`")]
fn keys_of_cryptsetup_volumes_are_managed() {
    for (index, key_bits) in [(0, "512"), (1, "512"), (2, "256"), (3, "256"), (4, "512")] {
        let kdf = KDFS[index];
        let bench = workbench();
        luks_format(&bench, kdf, key_bits);
        let expected = cryptsetup_key_of(&bench, &bench.path("disk"), "key0");
        for slot in 1..8 {
            // The keyslots of a volume may have different key derivations.
            add(&bench, slot, KDFS[(index + slot) % KDFS.len()]);
        }
        bench.accepted_by_cryptsetup("disk");
        for slot in 0..8 {
            assert!(bench.cryptsetup_opens("disk", &slot.to_string(), &format!("key{slot}")), "{kdf:?}, {slot}");
        }
        cryptsetup(&bench, &["config", "--priority", "prefer", "--key-slot", "6", "disk"]);
        let change = ["key", "change", "disk", "--key-file", "key6", "--new-key-file", "other"];
        assert_eq!(bench.nbdcrypt(&[&change[..], kdf].concat()), "disk: new key in keyslot 6\n");
        let clear = ["key", "remove", "disk", "--key-slot", "3", "--key-file", "key0"];
        assert_eq!(bench.nbdcrypt(&clear), "disk: keyslot 3 cleared\n");
        assert_eq!(bench.nbdcrypt(&["key", "remove", "disk", "--key-file", "key4"]), "disk: keyslot 4 cleared\n");
        let dump = bench.accepted_by_cryptsetup("disk");
        for (slot, used) in [(2, true), (3, false), (4, false), (5, true), (6, true), (7, true), (8, false)] {
            assert_eq!(dump.contains(&format!("\n  {slot}: luks2\n")), used, "keyslot {slot}: {dump}");
        }
        assert!(dump.contains("Priority:   preferred"), "{dump}");
        for (slot, key_file) in [("3", "key3"), ("4", "key4"), ("6", "key6")] {
            assert!(!bench.cryptsetup_opens("disk", slot, key_file), "{kdf:?}, {key_file}");
        }
        assert!(bench.cryptsetup_opens("disk", "6", "other"));
        assert_eq!(cryptsetup_key_of(&bench, &bench.path("disk"), "other"), expected);
        // cryptsetup can use the space that nbdcrypt freed.
        cryptsetup(&bench, &[&["luksAddKey", "-q", "--key-file", "key0", "disk", "key3"], kdf].concat());
        assert_eq!(unlock(&bench.path("disk"), b"passphrase 3").unwrap().keyslot, 3);
    }
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs cryptsetup: run `make test`")]
fn the_last_key_is_not_removed_without_force() {
    let bench = workbench();
    luks_format(&bench, KDFS[1], "512");
    let before = std::fs::read(bench.path("disk")).unwrap();
    assert!(bench.refusal(&["key", "remove", "disk", "--key-slot", "0"]).contains("last key"));
    assert!(bench.refusal(&["key", "remove", "disk", "--key-file", "other"]).contains("passphrase"));
    let wrong = ["key", "add", "disk", "--key-file", "other", "--new-key-file", "key1"];
    assert!(bench.refusal(&[&wrong[..], KDFS[1]].concat()).contains("passphrase"));
    assert!(std::fs::read(bench.path("disk")).unwrap() == before);
    bench.nbdcrypt(&["key", "remove", "disk", "--key-slot", "0", "--force"]);
    assert!(!bench.accepted_by_cryptsetup("disk").contains(": luks2"));
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs cryptsetup: run `make test`")]
fn cryptsetup_manages_the_keys_of_our_volumes() {
    for (index, key_bits) in [(0, "512"), (1, "512"), (2, "256"), (3, "256"), (4, "512")] {
        let kdf = KDFS[index];
        let bench = workbench();
        bench.nbdcrypt(&[&["format", "disk", "--key-file", "key0", "--key-size", key_bits], kdf].concat());
        add(&bench, 1, kdf);
        add(&bench, 2, kdf);
        bench.nbdcrypt(&["token", "import", "disk", "--json-file", "token"]);
        let expected = cryptsetup_key_of(&bench, &bench.path("disk"), "key2");
        let quick = |arguments: &[&str]| cryptsetup(&bench, &[arguments, &["-q"], kdf].concat());
        quick(&["luksAddKey", "--key-slot", "6", "--key-file", "key1", "disk", "key6"]);
        quick(&["luksChangeKey", "--key-slot", "2", "--key-file", "key2", "disk", "other"]);
        cryptsetup(&bench, &["luksKillSlot", "-q", "--key-file", "key6", "disk", "1"]);
        cryptsetup(&bench, &["luksRemoveKey", "-q", "disk", "key0"]);
        std::fs::write(bench.path("token"), TOKEN.replace("\"0\"", "\"6\"")).unwrap();
        cryptsetup(&bench, &["token", "import", "--json-file", "token", "--token-id", "4", "disk"]);
        bench.accepted_by_cryptsetup("disk");
        for (passphrase, opens) in [("passphrase 0", false), ("passphrase 1", false), ("passphrase 2", false)]
            .into_iter()
            .chain([("passphrase 6", true), ("another", true)])
        {
            let unlocked = unlock(&bench.path("disk"), passphrase.as_bytes());
            assert_eq!(unlocked.is_ok_and(|it| it.key.expose() == expected), opens, "{kdf:?}: {passphrase}");
        }
        let before = std::fs::read(bench.path("disk")).unwrap();
        cryptsetup(&bench, &["repair", "-q", "disk"]);
        assert!(std::fs::read(bench.path("disk")).unwrap() == before, "cryptsetup repair changes nothing");
        // nbdcrypt can then add a key to the header that cryptsetup changed.
        add_beside(&bench, kdf);
    }
}

fn add_beside(bench: &Workbench, kdf: &[&str]) {
    let add = ["key", "add", "disk", "--key-file", "key6", "--new-key-file", "key7", "--key-slot", "31"];
    assert_eq!(bench.nbdcrypt(&[&add[..], kdf].concat()), "disk: key in keyslot 31\n");
    assert!(bench.cryptsetup_opens("disk", "31", "key7"));
}

/// A keyslot may hold a key that is not the volume's. If a user's passphrase opens only this keyslot, nbdcrypt says so.
#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs cryptsetup: run `make test`")]
fn an_unbound_keyslot_is_named_as_such_and_opens_nothing() {
    let bench = workbench();
    luks_format(&bench, KDFS[1], "512");
    // A key of another size, which is not a key for AES-XTS.
    let unbound = [
        "luksAddKey",
        "-q",
        "--unbound",
        "--key-size",
        "1024",
        "--key-slot",
        "3",
        "--key-file",
        "key0",
        "disk",
        "key3",
    ];
    cryptsetup(&bench, &[&unbound[..], KDFS[1]].concat());
    let listed = bench.nbdcrypt(&["key", "list", "disk"]);
    let lines: Vec<&str> = listed.lines().collect();
    assert!(lines.len() == 2 && !lines[0].contains("unbound") && lines[1].contains("unbound"), "{listed}");
    let listed = json(&bench.nbdcrypt(&["key", "list", "--json", "disk"]));
    assert_eq!((&listed[0]["unbound"], &listed[1]["unbound"]), (&Value::Bool(false), &Value::Bool(true)));
    let theirs = bench.accepted_by_cryptsetup("disk");
    let ours = bench.nbdcrypt(&["dump", "disk"]);
    assert!(theirs.contains("  3: luks2 (unbound)") && ours.contains("  3: luks2 (unbound)"), "{theirs}\n{ours}");
    assert!(ours.contains("  0: luks2\n"), "{ours}");
    assert_eq!(unlock(&bench.path("disk"), b"passphrase 0").unwrap().keyslot, 0);

    let before = std::fs::read(bench.path("disk")).unwrap();
    let quick = KDFS[1];
    for arguments in [
        &["key", "add", "disk", "--key-file", "key3", "--new-key-file", "key1"][..],
        &["key", "change", "disk", "--key-file", "key3", "--new-key-file", "key1"],
        &["serve", "--socket", "socket", "--key-file", "key3", "disk"],
    ] {
        let is_serve = arguments[0] == "serve";
        let told = bench.refusal(&[arguments, if is_serve { &[] } else { quick }].concat());
        assert!(told.contains("keyslot 3, which is unbound") && told.contains("not this volume's"), "{told}");
    }
    for arguments in [
        &["key", "change", "disk", "--key-slot", "3", "--key-file", "key3", "--new-key-file", "key1"][..],
        &["serve", "--socket", "socket", "--key-slot", "3", "--key-file", "key3", "disk"],
    ] {
        let told = bench.refusal(arguments);
        assert!(told.contains("keyslot 3 is unbound"), "{told}");
    }
    let told = bench.refusal(&["key", "add", "disk", "--key-file", "other", "--new-key-file", "key1"]);
    assert!(!told.contains("unbound"), "{told}");
    assert!(std::fs::read(bench.path("disk")).unwrap() == before);
    // Unbound keys do not prevent the restore of a backup.
    bench.nbdcrypt(&["header", "backup", "disk", "backup"]);
    bench.nbdcrypt(&["header", "restore", "disk", "backup"]);
    assert!(std::fs::read(bench.path("disk")).unwrap() == before);
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs cryptsetup: run `make test`")]
fn tokens_are_imported_and_exported_without_loss() {
    let bench = workbench();
    luks_format(&bench, KDFS[1], "512");
    assert_eq!(bench.nbdcrypt(&["token", "import", "disk", "--json-file", "token"]), "disk: token 0\n");
    assert_eq!(json(&cryptsetup(&bench, &["token", "export", "--token-id", "0", "disk"])), json(TOKEN));
    cryptsetup(&bench, &["token", "import", "--json-file", "token", "--token-id", "9", "disk"]);
    assert_eq!(json(&bench.nbdcrypt(&["token", "export", "disk", "--token-id", "9"])), json(TOKEN));
    let listed = json(&bench.nbdcrypt(&["token", "list", "disk", "--json"]));
    let of = |id: u32| serde_json::json!({ "token": id, "type": "aws-kms", "keyslots": [0] });
    assert_eq!(listed, Value::from(vec![of(0), of(9)]));
    assert!(bench.refusal(&["token", "import", "disk", "--json-file", "token", "--token-id", "9"]).contains('9'));
    cryptsetup(&bench, &["token", "remove", "--token-id", "0", "disk"]);
    bench.nbdcrypt(&["token", "remove", "disk", "--token-id", "9"]);
    assert_eq!(json(&bench.nbdcrypt(&["token", "list", "disk", "--json"])), Value::Array(Vec::new()));
    assert!(!bench.accepted_by_cryptsetup("disk").contains("aws-kms"));
    // Removing a keyslot removes it from the tokens that point to it.
    add(&bench, 1, KDFS[1]);
    bench.nbdcrypt(&["token", "import", "disk", "--json-file", "token"]);
    // If `up` opens the volume with a keyslot's token, the keyslot is removed only by force.
    let named = &["key", "remove", "disk", "--key-slot", "0", "--key-file", "key1"][..];
    for remove in [named, &["key", "remove", "disk", "--key-file", "key0"]] {
        let said = bench.refusal(remove);
        assert!(said.contains("token 0") && said.contains("--force"), "{said}");
    }
    bench.nbdcrypt(&[named, &["--force"]].concat());
    bench.accepted_by_cryptsetup("disk");
    let exported = json(&cryptsetup(&bench, &["token", "export", "--token-id", "0", "disk"]));
    assert_eq!(exported["keyslots"], Value::Array(Vec::new()));
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs cryptsetup: run `make test`")]
fn either_header_is_repaired_from_the_other() {
    let bench = workbench();
    let ours = ["format", "disk", "--key-file", "key0"];
    for is_ours in [false, true] {
        if is_ours {
            bench.disk("disk", 18 << 20);
            bench.nbdcrypt(&[&ours[..], KDFS[1]].concat());
        } else {
            luks_format(&bench, KDFS[1], "512");
        }
        add(&bench, 1, KDFS[2]);
        let disk = bench.path("disk");
        for (at, said) in
            [(4096 + 100, "primary"), (16384 + 4096 + 100, "secondary"), (0, "primary"), (16384, "secondary")]
        {
            store(&disk).write_at(&[0xff; 3], at).unwrap();
            let told = bench.nbdcrypt(&["header", "repair", "disk"]);
            assert!(told.contains(&format!("the {said} copy of the header was rewritten")), "{at}: {told}");
            bench.accepted_by_cryptsetup("disk");
            assert!(bench.cryptsetup_opens("disk", "1", "key1"));
            assert!(bench.nbdcrypt(&["header", "repair", "disk"]).contains("both copies of the header are intact"));

            store(&disk).write_at(&[0xff; 3], at).unwrap();
            cryptsetup(&bench, &["repair", "-q", "disk"]);
            assert!(
                bench.nbdcrypt(&["header", "repair", "disk"]).contains("both copies of the header are intact"),
                "{at}"
            );
            assert_eq!(unlock(&disk, b"passphrase 1").unwrap().keyslot, 1);
        }
    }
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs cryptsetup: run `make test`")]
fn a_possibly_valid_header_copy_is_replaced_only_on_request() {
    let bench = workbench();
    luks_format(&bench, KDFS[1], "512");
    let disk = bench.path("disk");
    let good = std::fs::read(&disk).unwrap();
    for (copy, said) in [(0usize, "primary"), (16384, "secondary")] {
        let mut bytes = good.clone();
        let header = &mut bytes[copy..copy + 16384];
        // The text is no longer a JSON object, and the checksum is correct again. The broken copy may also be the newer
        // one.
        header[4096] = b'[';
        header[16..24].copy_from_slice(&99u64.to_be_bytes());
        header[448..512].fill(0);
        let checksum = sha256(header);
        header[448..480].copy_from_slice(&checksum);
        std::fs::write(&disk, &bytes).unwrap();
        assert_eq!(unlock(&disk, b"passphrase 0").unwrap().keyslot, 0, "{said}");
        let told = bench.refusal(&["header", "repair", "disk"]);
        let from = if copy == 0 { "secondary" } else { "primary" };
        assert!(told.contains(&format!("nbdcrypt header repair --from {from}")), "{told}");
        assert!(std::fs::read(&disk).unwrap() == bytes);
        let told = bench.nbdcrypt(&["header", "repair", "--from", from, "disk"]);
        assert!(told.contains(&format!("the {said} copy of the header was rewritten")), "{told}");
        bench.accepted_by_cryptsetup("disk");
    }
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs cryptsetup: run `make test`")]
fn labels_flags_and_priorities_are_set_as_cryptsetup_sets_them() {
    let bench = workbench();
    luks_format(&bench, KDFS[1], "512");
    add(&bench, 1, KDFS[1]);
    let before = metadata(&bench);
    bench.nbdcrypt(&[
        "header",
        "set",
        "disk",
        "--label",
        "mine",
        "--subsystem",
        "db",
        "--flags",
        "allow-discards,no-journal",
    ]);
    bench.nbdcrypt(&["key", "priority", "disk", "--key-slot", "1", "prefer"]);
    bench.nbdcrypt(&["key", "priority", "disk", "--key-slot", "0", "ignore"]);
    let dump = bench.accepted_by_cryptsetup("disk");
    for line in ["Label:         \tmine", "Subsystem:     \tdb", "Flags:       \tallow-discards no-journal"] {
        assert!(dump.contains(line), "{line}: {dump}");
    }
    assert!(dump.contains("Priority:   preferred") && dump.contains("Priority:   ignored"), "{dump}");
    // The JSON is the same as cryptsetup's, character for character.
    let ours = metadata(&bench);
    cryptsetup(&bench, &["config", "--priority", "prefer", "--key-slot", "1", "disk"]);
    cryptsetup(&bench, &["config", "--priority", "ignore", "--key-slot", "0", "disk"]);
    assert_eq!(metadata(&bench), ours);
    assert!(unlock(&bench.path("disk"), b"passphrase 0").is_err(), "an ignored keyslot is not tried");
    assert!(bench.cryptsetup_opens("disk", "0", "key0"));

    for slot in ["0", "1"] {
        bench.nbdcrypt(&["key", "priority", "disk", "--key-slot", slot, "normal"]);
    }
    bench.nbdcrypt(&["header", "set", "disk", "--label", "", "--subsystem", "", "--flags", ""]);
    assert_eq!(metadata(&bench), before);
    assert!(bench.accepted_by_cryptsetup("disk").contains("(no label)"));
    let refused = |arguments: &[&str], why: &str| {
        let said = bench.refusal(arguments);
        assert!(said.contains(why), "{said}");
    };
    refused(&["header", "set", "disk", "--flags", "fast"], "allow-discards");
    refused(&["header", "set", "disk", "--label", &"x".repeat(48)], "47 bytes");
    refused(&["key", "priority", "disk", "--key-slot", "7", "prefer"], "keyslot 7");
    assert_eq!(metadata(&bench), before);
}

/// Returns the metadata's text in `disk`.
fn metadata(bench: &Workbench) -> String {
    let header = std::fs::read(bench.path("disk")).unwrap();
    let text = header[4096..16384].split(|byte| *byte == 0).next().unwrap();
    String::from_utf8(text.to_vec()).unwrap()
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs cryptsetup: run `make test`")]
fn a_label_that_is_not_utf_8_is_kept() {
    let bench = workbench();
    luks_format(&bench, KDFS[1], "512");
    let label = b"caf\xe9\ttab \x1b[31mred";
    let label_of = std::os::unix::ffi::OsStrExt::from_bytes;
    let both: [&std::ffi::OsStr; 4] = ["--label".as_ref(), label_of(label), "--subsystem".as_ref(), label_of(label)];
    let mut cryptsetup = std::process::Command::new("cryptsetup");
    assert!(cryptsetup.args(["config", "disk"]).args(both).current_dir(bench.path(".")).status().unwrap().success());
    let stands = || {
        let disk = std::fs::read(bench.path("disk")).unwrap();
        [0, 16384].into_iter().all(|at| {
            [24, 208].into_iter().all(|field| disk[at + field..][..label.len() + 1] == [&label[..], b"\0"].concat())
        })
    };
    assert!(stands());
    add(&bench, 1, KDFS[1]);
    assert!(stands());
    assert!(bench.cryptsetup_opens("disk", "1", "key1"));
    let shown = bench.nbdcrypt(&["dump", "disk"]);
    assert!(shown.contains("Label:         \tcaf\\xe9\\u{9}tab \\u{1b}[31mred\n"), "{shown}");
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs cryptsetup: run `make test`")]
fn unknown_metadata_is_written_back_unchanged() {
    let bench = workbench();
    luks_format(&bench, KDFS[1], "512");
    let before = metadata(&bench);
    // Keys that are not in alphabetical order, and numbers that 64 bits cannot hold.
    let token = r#"{"type":"x","keyslots":["0"],"z":1.50,"a":123456789012345678901234567890,"m":{"b":1e+2,"a":-0}}"#;
    std::fs::write(bench.path("token"), token).unwrap();
    bench.nbdcrypt(&["token", "import", "disk", "--json-file", "token"]);
    assert!(metadata(&bench).contains(token), "{}", metadata(&bench));
    add(&bench, 1, KDFS[1]);
    bench.nbdcrypt(&["key", "remove", "disk", "--key-slot", "1", "--key-file", "key0"]);
    assert_eq!(bench.nbdcrypt(&["token", "export", "disk", "--token-id", "0"]).trim_end(), token);
    bench.accepted_by_cryptsetup("disk");
    bench.nbdcrypt(&["token", "remove", "disk", "--token-id", "0"]);
    assert_eq!(metadata(&bench), before, "the metadata is as cryptsetup wrote it");
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs cryptsetup: run `make test`")]
fn a_passphrase_kept_by_kms_is_changed_only_by_force() {
    let bench = workbench();
    luks_format(&bench, KDFS[1], "512");
    bench.nbdcrypt(&["token", "import", "disk", "--json-file", "token"]);
    add(&bench, 1, KDFS[1]);
    let change = |old, new| {
        let kdf = ["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"];
        [&["key", "change", "disk", "--key-file", old, "--new-key-file", new][..], &kdf].concat()
    };
    let said = bench.refusal(&change("key0", "key2"));
    assert!(said.contains("keyslot 0") && said.contains("token 0") && said.contains("--force"), "{said}");
    assert!(unlock(&bench.path("disk"), b"passphrase 0").is_ok());
    let said = bench.refusal(&[&change("key0", "key2")[..], &["--key-slot", "1"]].concat());
    assert!(said.contains("does not open keyslot 1"), "{said}");
    bench.nbdcrypt(&change("key1", "key2"));
    bench.nbdcrypt(&[&change("key0", "key3")[..], &["--force"]].concat());
    for (passphrase, opens) in
        [("passphrase 0", false), ("passphrase 1", false), ("passphrase 2", true), ("passphrase 3", true)]
    {
        assert_eq!(unlock(&bench.path("disk"), passphrase.as_bytes()).is_ok(), opens, "{passphrase}");
    }
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs cryptsetup: run `make test`")]
fn only_cryptsetup_changes_the_header_of_a_served_volume() {
    let bench = workbench();
    luks_format(&bench, KDFS[1], "512");
    // The keyslot is ignored unless it is named.
    bench.nbdcrypt(&["key", "priority", "disk", "--key-slot", "0", "ignore"]);
    let said = bench.refusal(&["serve", "--key-file", "key0", "--socket", "socket", "disk"]);
    assert!(said.contains("is set to be ignored") && said.contains("--key-slot"), "{said}");
    let said = bench.refusal(&["serve", "--key-file", "key0", "--key-slot", "3", "--socket", "socket", "disk"]);
    assert!(said.contains("no key in keyslot 3"), "{said}");
    let mut server = std::process::Command::new(harness::nbdcrypt::binary())
        .args(["serve", "--key-file", "key0", "--key-slot", "0", "--socket", "socket", "disk"])
        .current_dir(bench.path("."))
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    // The server prints its address once it serves.
    let mut address = String::new();
    let mut stdout = std::io::BufReader::new(server.stdout.take().unwrap());
    std::io::BufRead::read_line(&mut stdout, &mut address).unwrap();
    assert!(address.starts_with("nbd+unix:"), "{address}");
    let said = bench.refusal(&["key", "add", "disk", "--key-file", "key0", "--new-key-file", "key1"]);
    assert!(said.contains("in use"), "{said}");
    bench.nbdcrypt(&["header", "backup", "disk", "saved"]);
    // cryptsetup would wait forever for the header's lock if the server held it.
    let patiently = |arguments: &[&str]| bench.run("timeout", ["20", "cryptsetup"].iter().chain(arguments).copied());
    patiently(&["config", "--priority", "normal", "--key-slot", "0", "disk"]);
    assert!(patiently(&["luksDump", "disk"]).contains("Keyslots:"));
    patiently(&[
        "luksAddKey",
        "-q",
        "--pbkdf-force-iterations",
        "1000",
        "--pbkdf",
        "pbkdf2",
        "--key-file",
        "key0",
        "disk",
        "key1",
    ]);
    server.kill().unwrap();
    server.wait().unwrap();
    assert!(unlock(&bench.path("disk"), b"passphrase 1").is_ok());
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs cryptsetup: run `make test`")]
fn a_header_locked_by_cryptsetup_is_not_changed() {
    let bench = workbench();
    luks_format(&bench, KDFS[1], "512");
    let label = ["header", "set", "disk", "--label", "mine"];
    let cryptsetups = std::fs::File::open(bench.path("disk")).unwrap();
    cryptsetups.lock_shared().unwrap();
    let before = metadata(&bench);
    let said = bench.refusal(&label);
    assert!(said.contains("cryptsetup or another nbdcrypt is at work on its header"), "{said}");
    assert_eq!(metadata(&bench), before);
    // Reading is possible, because cryptsetup only reads too.
    bench.nbdcrypt(&["header", "backup", "disk", "saved"]);
    cryptsetups.unlock().unwrap();
    cryptsetups.lock().unwrap();
    let said = bench.refusal(&["header", "backup", "disk", "saved while it changes"]);
    assert!(said.contains("cryptsetup or another nbdcrypt is at work on its header"), "{said}");
    assert!(!bench.path("saved while it changes").exists());
    // nbdcrypt waits for a change that takes only a short time.
    let unlocker = std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_secs(1));
        cryptsetups.unlock().unwrap();
    });
    bench.nbdcrypt(&label);
    unlocker.join().unwrap();
    assert!(bench.accepted_by_cryptsetup("disk").contains("Label:         \tmine"));
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs cryptsetup: run `make test`")]
fn keys_are_managed_with_a_configuration_file() {
    let bench = workbench();
    luks_format(&bench, KDFS[1], "512");
    let (disk, key) = (bench.path("disk"), bench.path("key0"));
    let config = format!("[volume]\ndevices = [{disk:?}]\n[key]\nsource = \"file\"\npath = {key:?}\n");
    std::fs::write(bench.path("scratch.toml"), &config).unwrap();
    let quick = ["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"];
    bench.nbdcrypt(
        &[&["key", "add", "disk", "--config", "scratch.toml", "--new-key-file", "key1"][..], &quick].concat(),
    );
    assert!(bench.cryptsetup_opens("disk", "1", "key1"));
    // `up` could not open the volume after this.
    let change = ["key", "change", "disk", "--config", "scratch.toml", "--new-key-file", "key2"];
    let said = bench.refusal(&[&change[..], &quick].concat());
    assert!(said.contains("nbdcrypt up") && said.contains("--force"), "{said}");
    bench.nbdcrypt(&[&change[..], &quick, &["--force"]].concat());
    assert!(bench.cryptsetup_opens("disk", "0", "key2") && !bench.cryptsetup_opens("disk", "0", "key0"));
    std::fs::write(bench.path("scratch.toml"), config.replace("key0", "key2")).unwrap();
    bench.nbdcrypt(&["key", "remove", "disk", "--config", "scratch.toml"]);
    assert!(!bench.cryptsetup_opens("disk", "0", "key2") && bench.cryptsetup_opens("disk", "1", "key1"));
    let low = config.replace("key0", "key1").replace("[key]", "max-kdf-iterations = 1000\n[key]");
    std::fs::write(bench.path("scratch.toml"), low.replace("= 1000", "= 999")).unwrap();
    let said = bench.refusal(&["key", "remove", "--force", "disk", "--config", "scratch.toml"]);
    assert!(said.contains("but the limit is 999"), "{said}");
}

/// While nbdcrypt waits for a passphrase or derives keys, cryptsetup may change the header. Its changes are not undone.
#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs cryptsetup: run `make test`")]
fn a_header_changed_while_a_passphrase_is_awaited_is_kept() {
    let bench = workbench();
    luks_format(&bench, KDFS[1], "512");
    for (arguments, given) in [
        (&["key", "add", "disk", "--key-file", "key0", "--new-key-file", "-"][..], "new"),
        (&["key", "change", "disk", "--key-file", "key0", "--new-key-file", "-"], "new"),
        (&["key", "remove", "--force", "disk", "--key-file", "-"], "passphrase 0"),
    ] {
        for label in [Some("changed"), None] {
            let before = std::fs::read(bench.path("disk")).unwrap();
            let mut child = std::process::Command::new(harness::nbdcrypt::binary())
                .args(arguments)
                .current_dir(bench.path("."))
                .stdin(std::process::Stdio::piped())
                .stderr(std::process::Stdio::piped())
                .spawn()
                .unwrap();
            // nbdcrypt has read the header and sleeps until it gets input.
            let mut asleep = 0;
            while asleep < 10 {
                std::thread::sleep(std::time::Duration::from_millis(20));
                let stat = std::fs::read_to_string(format!("/proc/{}/stat", child.id())).unwrap();
                asleep = if stat.contains(") S ") { asleep + 1 } else { 0 };
                assert!(child.try_wait().unwrap().is_none());
            }
            if let Some(label) = label {
                bench.run("timeout", ["20", "cryptsetup", "config", "--label", label, "disk"]);
            }
            std::io::Write::write_all(&mut child.stdin.take().unwrap(), given.as_bytes()).unwrap();
            let output = child.wait_with_output().unwrap();
            let said = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.success(), label.is_none(), "{arguments:?}: {said}");
            if let Some(label) = label {
                assert!(said.contains("another program changed the header"), "{said}");
                assert!(bench.accepted_by_cryptsetup("disk").contains(&format!("Label:         \t{label}")));
                assert!(unlock(&bench.path("disk"), b"passphrase 0").is_ok());
            }
            std::fs::write(bench.path("disk"), before).unwrap();
        }
    }
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs root and loop devices: run `make test`")]
fn cryptsetups_lock_of_a_block_device_is_respected() {
    let bench = workbench();
    luks_format(&bench, KDFS[1], "512");
    let device = bench.run("losetup", ["--find", "--show", "disk"]).trim().to_owned();
    let number = bench.run("lsblk", ["--noheadings", "--output", "MAJ:MIN", &device]).trim().to_owned();
    let label = ["header", "set", &device, "--label", "mine"];
    let outcome = std::panic::catch_unwind(|| {
        bench.nbdcrypt(&label);
        let lock = std::fs::File::open(format!("/run/cryptsetup/L_{number}")).unwrap();
        lock.lock().unwrap();
        let said = bench.refusal(&label);
        assert!(said.contains("is at work on its header") && said.contains(&number), "{said}");
        let said = bench.refusal(&["header", "backup", &device, "saved"]);
        assert!(said.contains("is at work on its header") && said.contains(&number), "{said}");
        lock.unlock().unwrap();
        lock.lock_shared().unwrap();
        bench.nbdcrypt(&["header", "backup", &device, "saved"]);
    });
    bench.run("losetup", ["--detach", &device]);
    outcome.unwrap();
    assert!(bench.accepted_by_cryptsetup("disk").contains("Label:         \tmine"));
}

/// As with `cryptsetup luksKillSlot`: a user who clears a keyslot by number must show a key that still opens the volume
/// afterwards.
#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs cryptsetup: run `make test`")]
fn a_keyslot_is_cleared_only_with_another_valid_key() {
    for kind in ["luks1", "luks2"] {
        let bench = workbench();
        let quick = ["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"];
        let format = ["luksFormat", "-q", "--type", kind, "--key-file", "key0", "disk"];
        cryptsetup(&bench, &[&format[..], &quick].concat());
        add(&bench, 1, &quick);
        add(&bench, 2, &quick);
        let clear = ["key", "remove", "disk", "--key-slot", "1"];
        let before = std::fs::read(bench.path("disk")).unwrap();
        for (arguments, words) in [
            (&[][..], &["--key-file", "--config", "--force"][..]),
            (&["--batch"], &["--key-file", "--config", "--force"]),
            (&["--key-file", "key1"], &["opens keyslot 1, which is to be removed, but no other keyslot", "key test"]),
            (&["--key-file", "other"], &["opens no other keyslot", "--force"]),
            (&["--key-file", "key7"], &["opens no other keyslot"]),
        ] {
            let said = bench.refusal(&[&clear[..], arguments].concat());
            assert!(words.iter().all(|word| said.contains(word)), "{kind}, {arguments:?}: {said}");
            assert!(std::fs::read(bench.path("disk")).unwrap() == before, "{kind}, {arguments:?}");
        }
        assert!(
            bench.refusal(&["key", "remove", "disk", "--key-slot", "5", "-d", "key0"]).contains("no key in keyslot 5")
        );
        bench.nbdcrypt(&[&clear[..], &["--key-file", "key2"]].concat());
        let key = bench.path("key0");
        let config = format!("[volume]\ndevices = [\"/none\"]\n[key]\nsource = \"file\"\npath = {key:?}\n");
        std::fs::write(bench.path("scratch.toml"), config).unwrap();
        bench.nbdcrypt(&["key", "remove", "disk", "--key-slot", "2", "--config", "scratch.toml"]);
        // nbdcrypt refuses to remove the last key before it asks for a passphrase, because no other key could be the
        // proof.
        assert!(bench.refusal(&["key", "remove", "disk", "--key-slot", "0"]).contains("last key"));
        assert!(bench.refusal(&["key", "remove", "disk", "--key-slot", "0", "-d", "key0"]).contains("last key"));
        assert!(bench.cryptsetup_opens("disk", "0", "key0"));
        bench.nbdcrypt(&["key", "remove", "disk", "--key-slot", "0", "--force"]);
        assert!(!bench.cryptsetup_opens("disk", "0", "key0"));
    }
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs cryptsetup: run `make test`")]
fn an_ignored_keyslot_is_proof_but_an_unbound_one_not() {
    let bench = workbench();
    luks_format(&bench, KDFS[1], "512");
    add(&bench, 1, KDFS[1]);
    let unbound = ["luksAddKey", "-q", "--unbound", "--key-size", "512", "--key-slot", "2", "disk", "key2"];
    cryptsetup(&bench, &[&unbound[..], KDFS[1]].concat());
    let said = bench.refusal(&["key", "remove", "disk", "--key-slot", "0", "--key-file", "key2"]);
    assert!(said.contains("opens only keyslot 2, which is unbound"), "{said}");
    assert!(bench.cryptsetup_opens("disk", "0", "key0"));
    bench.nbdcrypt(&["key", "priority", "disk", "--key-slot", "1", "ignore"]);
    let mut remove = std::process::Command::new(harness::nbdcrypt::binary());
    remove.args(["key", "remove", "disk", "--key-slot", "0", "--key-file", "key1"]).current_dir(bench.path("."));
    let output = remove.output().unwrap();
    let said = harness::nbdcrypt::told(&output);
    assert!(output.status.success() && said.contains("set to be ignored") && said.contains("key priority"), "{said}");
    assert!(bench.cryptsetup_opens("disk", "1", "key1"));
    // An unbound keyslot can also be removed after a proof. It does not count as the last key.
    bench.nbdcrypt(&["key", "remove", "disk", "--key-slot", "2", "--key-file", "key1"]);
    assert!(!bench.accepted_by_cryptsetup("disk").contains("unbound"));
}

#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs cryptsetup: run `make test`")]
fn key_test_says_which_keyslot_a_passphrase_opens() {
    let bench = workbench();
    luks_format(&bench, KDFS[1], "512");
    add(&bench, 1, KDFS[1]);
    add(&bench, 2, KDFS[1]);
    bench.nbdcrypt(&["key", "priority", "disk", "--key-slot", "2", "ignore"]);
    bench.nbdcrypt(&["header", "backup", "disk", "header"]);
    let before = std::fs::read(bench.path("disk")).unwrap();
    let test = |more: &[&str]| bench.nbdcrypt(&[&["key", "test"][..], more].concat());
    assert_eq!(test(&["disk", "--key-file", "key1"]), "disk: the passphrase opens keyslot 1\n");
    assert_eq!(test(&["disk", "-S", "0", "-d", "key0"]), "disk: the passphrase opens keyslot 0\n");
    assert!(test(&["disk", "-d", "key2"]).contains("keyslot 2, which is set to be ignored"));
    assert_eq!(test(&["/no/disk", "--header", "header", "-d", "key1"]), "header: the passphrase opens keyslot 1\n");
    let expected = serde_json::json!({ "device": "disk", "opens": true, "keyslot": 2, "ignored": true });
    assert_eq!(json(&test(&["disk", "-d", "key2", "--json"])), expected);
    let (disk, key) = (bench.path("disk"), bench.path("key1"));
    let config = format!("[volume]\ndevices = [{disk:?}]\n[key]\nsource = \"file\"\npath = {key:?}\n");
    std::fs::write(bench.path("scratch.toml"), config).unwrap();
    assert!(test(&["disk", "--config", "scratch.toml"]).contains("keyslot 1"));
    for (arguments, words) in [
        (&["disk", "-d", "other"][..], "passphrase"),
        (&["disk", "-S", "0", "-d", "key1"], "keyslot 0"),
        (&["disk", "-S", "9", "-d", "key1"], "no key in keyslot 9"),
        (&["disk"], "--key-file"),
        (&["token", "-d", "key0"], "no LUKS header"),
        (&["none", "-d", "key0"], "none does not exist"),
    ] {
        let said = bench.refusal(&[&["key", "test"][..], arguments].concat());
        assert!(said.contains(words), "{arguments:?}: {said}");
    }
    let mut wrong = std::process::Command::new(harness::nbdcrypt::binary());
    let output = wrong.args(["key", "test", "disk", "-d", "other", "--json"]).current_dir(bench.path(".")).output();
    let output = output.unwrap();
    assert_eq!(output.status.code(), Some(1));
    let expected = serde_json::json!({ "device": "disk", "opens": false, "keyslot": null });
    assert_eq!(serde_json::from_slice::<Value>(&output.stdout).unwrap(), expected);
    assert!(std::fs::read(bench.path("disk")).unwrap() == before);
}
