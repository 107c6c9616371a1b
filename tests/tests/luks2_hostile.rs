//! LUKS2 headers with false fields. Each is refused in bounded time with an error that names the field, and none causes a
//! panic. The checksums are correct, so that the code behind the checksum test is reached.

use std::sync::LazyLock;
use std::time::{Duration, Instant};

use engine::key::{Passphrase, VolumeKey};
use engine::luks::{self, Limits, LuksError, luks2};
use engine::store::MemoryStore;
use harness::luks::{PASSPHRASE, begin_luks2, key, quick_luks2};
use proptest::prelude::*;
use serde_json::{Value, json};

const HEADER: usize = 16 << 10;
const BINARY: usize = 4096;
const DISK: usize = (16 << 20) + 4096;

fn disk() -> Vec<u8> {
    static IMAGE: LazyLock<Vec<u8>> = LazyLock::new(|| {
        let store = MemoryStore::zeroed(DISK);
        begin_luks2(&store, &quick_luks2(), key(VolumeKey::AES_256)).commit(&store).unwrap();
        store.snapshot()
    });
    IMAGE.clone()
}

fn json_of(disk: &[u8]) -> Value {
    let area = &disk[BINARY..HEADER];
    let end = area.iter().position(|byte| *byte == 0).unwrap();
    serde_json::from_slice(&area[..end]).unwrap()
}

/// Returns a disk with this text as the JSON of the first header. The second header is erased.
fn with_text(text: &[u8]) -> Vec<u8> {
    let mut disk = disk();
    disk[HEADER..HEADER + 6].fill(0);
    disk[BINARY..HEADER].fill(0);
    disk[BINARY..BINARY + text.len()].copy_from_slice(text);
    seal(&mut disk);
    disk
}

/// Writes the correct checksum into the first header.
fn seal(disk: &mut [u8]) {
    disk[448..512].fill(0);
    let checksum = harness::luks::sha256(&disk[..HEADER]);
    disk[448..480].copy_from_slice(&checksum);
}

/// Returns a disk with one member of the JSON changed. `Value::Null` removes the member.
fn with(pointer: &str, value: Value) -> Vec<u8> {
    let mut json = json_of(&disk());
    let (parent, name) = pointer.rsplit_once('/').unwrap();
    let parent = json.pointer_mut(parent).unwrap().as_object_mut().unwrap();
    match value {
        Value::Null => parent.remove(name),
        value => parent.insert(name.to_owned(), value),
    };
    with_text(json.to_string().as_bytes())
}

fn open(disk: Vec<u8>) -> Result<luks::UnlockedVolume, LuksError> {
    let store = MemoryStore::from(disk);
    luks::read(&store, &Limits::default())?.unlock(&store, &Passphrase::new(PASSPHRASE.to_vec()))
}

#[test]
fn an_error_names_the_field_and_its_value() {
    open(with("/tokens/7", json!({ "type": "unknown", "keyslots": ["0"], "more": [1, 2.5, null] }))).unwrap();
    let argon2 = |memory: u64, time: u64, cpus: u64| json!({ "type": "argon2id", "memory": memory, "time": time, "cpus": cpus, "salt": "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=" });
    let cases = [
        ("/keyslots", Value::Null, "keyslots is missing"),
        ("/keyslots/x", json!({}), "keyslots.x is a name that is not a number"),
        ("/keyslots/0/key_size", json!(0), "keyslots.0.key_size is 0"),
        ("/keyslots/0/key_size", json!("64"), "keyslots.0.key_size is \"64\", not a number"),
        ("/keyslots/0/key_size", json!(48), "aes-xts-plain64 with a key of 384 bits"),
        ("/keyslots/0/af/stripes", json!("4000"), "keyslots.0.af.stripes is \"4000\", not a number"),
        ("/keyslots/0/af/hash", json!("md5"), "the hash md5"),
        ("/keyslots/0/area/offset", json!("16384"), "keyslots.0.area is 258048 bytes at 16384"),
        ("/keyslots/0/area/offset", json!("18446744073709551615"), "keyslots.0.area is 258048 bytes at 1844674"),
        ("/keyslots/0/area/offset", json!("+32768"), "keyslots.0.area.offset is \"+32768\", not a number in quotes"),
        ("/keyslots/0/area/size", json!("4096"), "keyslots.0.area.size is 4096, too small"),
        ("/keyslots/0/area/encryption", json!("serpent-xts-plain64"), "the cipher serpent-xts-plain64"),
        (
            "/keyslots/0/area/encryption",
            json!("aes\u{1b}[31m"),
            "keyslots.0.area.encryption is \"aes\\u001b[31m\", not a name",
        ),
        ("/segments/0/encryption", json!("aes\u{9b}31m"), "segments.0.encryption is \"aes\\u{9b}31m\", not a name"),
        ("/keyslots/\u{1b}[31m", json!({}), "keyslots.\\u{1b}[31m is a name that is not a number"),
        ("/config/requirements", json!({ "mandatory": ["\u{7}"] }), "config.requirements.mandatory is [\"\\u0007\"]"),
        ("/keyslots/0/kdf/iterations", json!(0), "keyslots.0.kdf.iterations is 0"),
        ("/keyslots/0/kdf/iterations", json!(u32::MAX), "4294967295 iterations in keyslots.0.kdf.iterations"),
        ("/keyslots/0/kdf/salt", json!("?"), "keyslots.0.kdf.salt is \"?\", not bytes in base64"),
        ("/keyslots/0/kdf", argon2(u64::from(u32::MAX), 4, 1), "keyslots.0.kdf.memory of 4294967295"),
        ("/keyslots/0/kdf", argon2(1024, 1_000_000, 1), "keyslots.0.kdf.time of 1000000, but the limit is 409600"),
        ("/keyslots/0/kdf", argon2(4 << 20, 101, 1), "keyslots.0.kdf.time of 101, but the limit is 100"),
        ("/keyslots/0/kdf", argon2(1024, 4, 5000), "keyslots.0.kdf.cpus of 5000"),
        ("/keyslots/0/kdf", argon2(0, 4, 1), "keyslots.0.kdf.memory is 0"),
        ("/keyslots/0/kdf", argon2(1, 4, 4), "keyslots.0.kdf is Argon2Cost"),
        ("/keyslots/0/kdf", json!({ "type": "scrypt" }), "the key derivation scrypt"),
        ("/digests/0/keyslots", json!(["5"]), "digests.0.keyslots is a list with 5, which does not exist"),
        ("/digests/00", json_of(&disk())["digests"]["0"].clone(), "digests.00 is a name that is not a number"),
        ("/keyslots/00", json_of(&disk())["keyslots"]["0"].clone(), "keyslots.00 is a name that is not a number"),
        ("/digests/0/segments", json!([]), "digests is without a digest for segment 0"),
        ("/digests/0/iterations", json!(u32::MAX), "digests.0.iterations"),
        ("/digests/0/type", json!("sha256"), "the digest sha256"),
        ("/digests/0/digest", json!("AA=="), "digests.0.digest is 1 bytes long, but a sha256 digest has 32"),
        ("/digests/0/digest", json!("A".repeat(44)), "digests.0.digest is 33 bytes"),
        ("/segments/0/type", json!("linear"), "the segment type linear"),
        ("/segments/0/sector_size", json!(8192), "segments.0.sector_size is 8192"),
        ("/segments/0/offset", json!("0"), "detached header"),
        ("/segments/0/offset", json!("32768"), "segments offset is 32768, before the end of the keyslots area"),
        ("/segments/0/offset", json!("16777300"), "segments.0.offset is 16777300"),
        ("/segments/0/offset", json!((1u64 << 62).to_string()), "needs at least 4611686018427392000"),
        ("/segments/0/iv_tweak", json!("7"), "segments.0.iv_tweak is 7"),
        ("/segments/0/size", json!("4095"), "segments.0.size is 4095, not whole sectors"),
        ("/segments/0/size", json!("8192"), "needs at least 16785408"),
        (
            "/segments/0/integrity",
            json!({ "type": "hmac(sha256)", "journal_encryption": "none", "journal_integrity": "none" }),
            "the integrity hmac(sha256)",
        ),
        ("/segments/1", json!({ "type": "linear", "offset": "0", "size": "dynamic" }), "segments.0.size is dynamic"),
        ("/keyslots/0/af/type", json!("luks2"), "keyslots.0.af.type is \"luks2\", not \"luks1\""),
        ("/keyslots/0/priority", json!(3), "set to be ignored"),
        (
            "/keyslots/1",
            json!({ "type": "reencrypt", "key_size": 1, "mode": "reencrypt", "direction": "forward", "area": { "type": "none", "offset": "290816", "size": "4096" } }),
            "keyslots.1 is for a reencryption",
        ),
        ("/digests/0/keyslots", json!([]), "keyslots.0 is in 0 digests"),
        ("/segments/0/encryption", json!(""), "segments.0.encryption is \"\", not a nonempty text"),
        ("/segments/0/offset", json!("512"), "segments offset is 512, before the end of the keyslots area"),
        ("/segments", json!({}), "digests.0.segments is a list with 0, which does not exist"),
        ("/config/keyslots_size", json!("16748544"), "before the end of the keyslots area at 16781312"),
        ("/config/json_size", json!("4096"), "config.json_size is 4096"),
        ("/config/keyslots_size", json!("1000000000000"), "config.keyslots_size is 1000000000000"),
        ("/config/requirements", json!({ "mandatory": ["online-reencrypt-v2"] }), "keyslots is without a keyslot for"),
        ("/config/requirements", json!({ "mandatory": ["online-reencrypt-v9"] }), "requirement online-reencrypt-v9"),
        ("/tokens/0", json!({ "type": "x", "keyslots": ["3"] }), "tokens.0.keyslots is a list with 3"),
    ];
    for (pointer, value, expected) in cases {
        let text = format!("{pointer} = {value}");
        let error = open(with(pointer, value)).unwrap_err().to_string();
        assert!(error.contains(expected), "{text}: {error}");
        assert!(!error.contains(char::is_control), "a terminal would interpret {error:?}");
    }
    // Any program may choose a token's type. It is printed with control characters escaped.
    let store = MemoryStore::from(with("/tokens/7", json!({ "type": "\u{1b}[31m", "keyslots": ["0"] })));
    let shown = luks::dump(&store).unwrap().display("disk");
    assert!(shown.contains("  7: \\u{1b}[31m\n") && !shown.contains('\u{1b}'), "{shown}");
    // The JSON that is printed has the same meaning, with control characters escaped too.
    let bench = harness::luks::Workbench::new();
    let token = json!({ "type": "\u{9b}31m", "keyslots": ["0"], "\u{7f}": "\u{85}" });
    std::fs::write(bench.path("disk"), with("/tokens/7", token.clone())).unwrap();
    for arguments in [
        &["token", "list", "--json", "disk"][..],
        &["token", "export", "--token-id", "7", "disk"],
        &["dump", "--json", "disk"],
    ] {
        let said = bench.nbdcrypt(arguments);
        assert!(said.contains("\\u009b31m"), "{said}");
        assert!(!said.contains(|letter: char| letter.is_control() && letter != '\n'), "{said:?}");
        serde_json::from_str::<Value>(&said).unwrap();
    }
    let exported = bench.nbdcrypt(&["token", "export", "--token-id", "7", "disk"]);
    assert_eq!(serde_json::from_str::<Value>(&exported).unwrap(), token);
}

#[test]
fn text_that_is_not_json_is_refused() {
    let deep = "[".repeat(10_000);
    let many =
        format!("{{\"keyslots\":{{{}}}}}", (0..500).map(|n| format!("\"{n}\":{{}}")).collect::<Vec<_>>().join(","));
    for text in ["", "{", "[]", "null", "\u{1}", deep.as_str(), many.as_str(), "{}x"] {
        assert!(matches!(open(with_text(text.as_bytes())), Err(LuksError::Corrupt { .. })), "{text:.40}");
    }
    let mut disk = with_text(json_of(&disk()).to_string().as_bytes());
    disk[HEADER - 1] = 1;
    seal(&mut disk);
    assert!(matches!(open(disk), Err(LuksError::Corrupt { .. })), "bytes behind the text");
}

#[test]
fn an_unsupported_keyslot_does_not_prevent_another_from_opening() {
    let slot = json_of(&disk())["keyslots"]["0"].clone();
    let mut json = json_of(&disk());
    let mut foreign = slot;
    foreign["kdf"] = json!({ "type": "scrypt" });
    foreign["area"]["offset"] = json!((32768 + 258_048).to_string());
    foreign["priority"] = json!(2);
    json["keyslots"]["1"] = foreign;
    json["digests"]["0"]["keyslots"] = json!(["0", "1"]);
    let disk = with_text(json.to_string().as_bytes());
    assert_eq!(open(disk.clone()).unwrap().keyslot, 0);
    let store = MemoryStore::from(disk);
    let volume = luks::read(&store, &Limits::default()).unwrap();
    let error = volume.unlock(&store, &Passphrase::new(b"wrong".to_vec())).unwrap_err();
    assert!(
        matches!(&error, LuksError::Unsupported(unsupported) if unsupported.what == "key derivation"),
        "the passphrase may be that of the unsupported keyslot: {error}"
    );
}

#[test]
fn the_work_limit_holds_for_all_keyslots_together() {
    let mut json = json_of(&disk());
    for id in 1..12 {
        let mut slot = json["keyslots"]["0"].clone();
        slot["area"]["offset"] = json!((32768 + id * 258_048).to_string());
        json["keyslots"][id.to_string()] = slot;
    }
    // The last keyslot holds the key. The keyslots before it hold noise.
    let offset = json["keyslots"]["0"]["area"]["offset"].clone();
    json["keyslots"]["0"]["area"]["offset"] = json["keyslots"]["11"]["area"]["offset"].clone();
    json["keyslots"]["11"]["area"]["offset"] = offset;
    json["digests"]["0"]["keyslots"] = (0..12).map(|id| id.to_string()).collect();
    let mut disk = with_text(json.to_string().as_bytes());
    harness::luks::noise(2)(&mut disk[32768 + 258_048..32768 + 12 * 258_048]).unwrap();
    // Each keyslot takes 1000 iterations twice, for 64 bytes of key, and 1000 for its digest.
    let open = |iterations: u32| {
        let limits = Limits { iterations: iterations.try_into().unwrap(), ..Limits::default() };
        let store = MemoryStore::from(disk.clone());
        let volume = luks::read(&store, &limits).unwrap();
        let passphrase = Passphrase::new(PASSPHRASE.to_vec());
        (volume.unlock(&store, &passphrase), volume.unlock_keyslot(&store, Some(11), &passphrase))
    };
    let (all, named) = open(1000);
    assert!(matches!(all, Err(LuksError::TooMuchWork { keyslot: 2 })), "{all:?}");
    assert_eq!(named.unwrap().keyslot, 11);
    assert_eq!(open(10_000).0.unwrap().keyslot, 11);
}

#[test]
fn ignored_keyslots_open_only_when_named() {
    let store = MemoryStore::from(with("/keyslots/0/priority", json!(0)));
    let volume = luks::read(&store, &Limits::default()).unwrap();
    let passphrase = Passphrase::new(PASSPHRASE.to_vec());
    let error = volume.unlock(&store, &passphrase).unwrap_err();
    assert!(matches!(error, LuksError::AllIgnored { keyslot: 0 }), "{error}");
    assert_eq!(volume.unlock_keyslot(&store, Some(0), &passphrase).unwrap().keyslot, 0);
}

/// Returns the disk with one member of the JSON of one copy changed, with a correct checksum and this sequence number.
fn with_copy(copy: usize, pointer: &str, value: &Value, sequence_id: u64) -> Vec<u8> {
    let mut disk = disk();
    let mut json = json_of(&disk);
    let (parent, name) = pointer.rsplit_once('/').unwrap();
    json.pointer_mut(parent).unwrap()[name] = value.clone();
    let text = json.to_string();
    let header = &mut disk[copy..copy + HEADER];
    header[BINARY..].fill(0);
    header[BINARY..BINARY + text.len()].copy_from_slice(text.as_bytes());
    header[16..24].copy_from_slice(&sequence_id.to_be_bytes());
    header[448..512].fill(0);
    let checksum = harness::luks::sha256(header);
    header[448..480].copy_from_slice(&checksum);
    disk
}

/// Runs every command that changes a header, and `header repair`, and returns the results.
fn change_the_header(store: &MemoryStore) -> Vec<(&'static str, Result<(), LuksError>)> {
    let (limits, passphrase) = (Limits::default(), Passphrase::new(b"new".to_vec()));
    let hash = engine::luks::HashAlgorithm::Sha256;
    let new = luks::NewKey { passphrase: &passphrase, kdf: harness::luks::quick_pbkdf2(hash), hash };
    let mut random = harness::luks::noise(1);
    let key = key(VolumeKey::AES_256);
    let token = br#"{"type":"x","keyslots":[]}"#;
    let settings = luks2::Settings { label: Some("new".to_owned()), ..luks2::Settings::default() };
    let volume = luks::read_for_keys(store, &limits).unwrap();
    vec![
        ("key add", volume.add_key(store, &limits, &key, &new, None, &mut random).map(drop)),
        ("key change", volume.change_key(store, &limits, &key, 0, &new, true, &mut random).map(drop)),
        ("key remove", volume.remove_key(store, 0, true, &mut random)),
        ("key priority", luks2::set_priority(store, 0, luks2::Priority::Prefer, &mut random)),
        ("token import", luks2::import_token(store, token, None, false, &mut random).map(drop)),
        ("token remove", luks2::remove_token(store, 0, &mut random)),
        ("header set", luks2::change_settings(store, &settings, &mut random)),
        ("header repair", luks::repair(store, &mut random).map(drop)),
    ]
}

/// One copy of the header has an error that only a detailed check finds, and the other copy is correct. The volume opens.
/// Nothing overwrites either copy.
#[test]
fn an_invalid_copy_is_neither_used_nor_overwritten() {
    let slot = |pointer: &str, value: Value| {
        let mut slot = json_of(&disk())["keyslots"]["0"].clone();
        *slot.pointer_mut(pointer).unwrap() = value;
        slot
    };
    let cases = [
        ("/config/keyslots_size", json!("16748544")),
        ("/config/keyslots_size", json!("33554432")),
        ("/segments/0/offset", json!("512")),
        ("/segments/0/encryption", json!("")),
        ("/segments/0/sector_size", json!(8192)),
        ("/segments/0/iv_tweak", json!("7")),
        ("/segments/0/type", json!("")),
        ("/segments/0/flags", json!(["backup-final"])),
        ("/segments/2", json_of(&disk())["segments"]["0"].clone()),
        ("/digests/0/digest", json!("AA==")),
        ("/digests/0/iterations", json!(0)),
        ("/digests/0/segments", json!([])),
        ("/digests/0/keyslots", json!([])),
        ("/keyslots/0", slot("/af/type", json!("luks2"))),
        ("/keyslots/0", slot("/area/offset", json!("16384"))),
        ("/keyslots/0", slot("/area/size", json!("0"))),
        ("/keyslots/1", slot("/area/offset", json!("290816"))),
        ("/tokens/0", json!({ "type": "x", "keyslots": ["7"] })),
    ];
    for (pointer, value) in cases {
        // The bad copy is older than the good copy, equally old, or newer.
        for (copy, sequence_id) in [(0, 1), (0, 1000), (HEADER, 1), (HEADER, 1000), (0, 0)] {
            let bytes = with_copy(copy, pointer, &value, sequence_id);
            let case = format!("{pointer} = {value} in the copy at {copy}, number {sequence_id}");
            assert_eq!(open(bytes.clone()).unwrap_or_else(|error| panic!("{case}: {error}")).keyslot, 0, "{case}");
            let store = MemoryStore::from(bytes.clone());
            for (change, result) in change_the_header(&store) {
                let error = result.expect_err(change);
                assert!(matches!(error, LuksError::CopyNotUnderstood(_)), "{case}, {change}: {error}");
                assert!(store.snapshot() == bytes, "{case}: {change} wrote to the disk");
            }
            // If the user names the good copy, it replaces the bad one. If the user names the bad copy, it is refused.
            let (good, bad) = match copy {
                0 => (luks2::HeaderCopy::Secondary, luks2::HeaderCopy::Primary),
                _ => (luks2::HeaderCopy::Primary, luks2::HeaderCopy::Secondary),
            };
            let mut random = harness::luks::noise(1);
            luks::repair_from(&store, bad, &mut random).unwrap_err();
            assert!(store.snapshot() == bytes, "{case}");
            luks::repair_from(&store, good, &mut random).unwrap();
            assert!(
                matches!(luks::repair(&store, &mut random), Ok(luks::Repair::Luks2(r)) if !r.primary && !r.secondary)
            );
            assert_eq!(open(store.snapshot()).unwrap().keyslot, 0, "{case}");
        }
    }
}

/// The volume opens with the older copy. Another program would use the newer one, which may have other keys.
#[test]
fn a_refused_newer_copy_gives_one_warning_and_prevents_changes() {
    for (copy, whole) in [(0, "secondary"), (HEADER, "primary")] {
        let bench = harness::luks::Workbench::new();
        std::fs::write(bench.path("wrong"), "wrong").unwrap();
        std::fs::write(bench.path("new"), "new").unwrap();
        std::fs::write(bench.path("token"), r#"{"type":"x","keyslots":[]}"#).unwrap();
        let config = "[volume]\ndevices = [\"disk\"]\n\n[key]\nsource = \"file\"\npath = \"wrong\"\n\n[filesystem]\ntype = \
                      \"ext4\"\nmountpoint = \"mnt\"\n";
        let config = ["disk", "wrong", "mnt"].iter().fold(config.to_owned(), |config, name| {
            config.replace(&format!("\"{name}\""), &format!("\"{}\"", bench.path(name).display()))
        });
        std::fs::write(bench.path("volume.toml"), config).unwrap();
        let bytes = with_copy(copy, "/segments/0/sector_size", &json!(8192), 1000);
        std::fs::write(bench.path("disk"), &bytes).unwrap();
        let looks: [(&[&str], bool); 7] = [
            (&["dump", "disk"], true),
            (&["dump", "--json", "disk"], true),
            (&["key", "list", "disk"], true),
            (&["key", "test", "disk", "--key-file", "key"], true),
            (&["header", "backup", "disk", "backup"], true),
            (&["serve", "disk", "--socket", "socket", "--key-file", "wrong"], false),
            (&["--run-dir", "run", "up", "volume.toml"], false),
        ];
        let warning = |arguments: &[&str], succeeds: bool| {
            let output = bench.try_nbdcrypt(arguments);
            assert_eq!(output.status.success(), succeeds, "{arguments:?}: {}", harness::nbdcrypt::told(&output));
            String::from_utf8(output.stderr).unwrap()
        };
        for (arguments, succeeds) in looks {
            let said = warning(arguments, succeeds);
            for words in [
                "(sequence number 1000)",
                "(sequence number 1)",
                "segments.0.sector_size is 8192",
                "the volume opens with it",
            ] {
                assert_eq!(said.matches(words).count(), 1, "{arguments:?}, {words}: {said}");
            }
            assert!(said.contains(&format!("`nbdcrypt header repair --from {whole} ")), "{arguments:?}: {said}");
            // The volume is opened with the older copy.
            assert!(succeeds || said.contains("no keyslot opens with this passphrase"), "{arguments:?}: {said}");
        }
        let changes: [&[&str]; 8] = [
            &["key", "add", "disk", "--key-file", "key", "--new-key-file", "new"],
            &["key", "change", "disk", "--key-file", "key", "--new-key-file", "new"],
            &["key", "remove", "disk", "--key-slot", "0", "--force"],
            &["key", "priority", "--key-slot", "0", "disk", "prefer"],
            &["token", "import", "disk", "--json-file", "token"],
            &["header", "set", "disk", "--label", "new"],
            &["header", "repair", "disk"],
            &["header", "restore", "disk", "backup"],
        ];
        for arguments in changes {
            let told = bench.refusal(arguments);
            assert!(told.contains("(sequence number 1000)"), "{arguments:?}: {told}");
            assert!(std::fs::read(bench.path("disk")).unwrap() == bytes, "{arguments:?} wrote to the disk");
        }
        let named = if copy == 0 { "primary" } else { "secondary" };
        bench.refusal(&["header", "repair", "disk", "--from", named]);
        assert!(std::fs::read(bench.path("disk")).unwrap() == bytes);

        bench.nbdcrypt(&["header", "repair", "disk", "--from", whole]);
        assert_eq!(warning(&["dump", "disk"], true), "");
        let quick = ["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"];
        bench.nbdcrypt(&[changes[0], &quick[..]].concat());
        assert_eq!(open(std::fs::read(bench.path("disk")).unwrap()).unwrap().keyslot, 0);
        // The backup holds both copies. A restore writes only the older one, so it needs --force.
        let told = bench.refusal(&["header", "restore", "disk", "backup"]);
        assert!(told.contains("the backup: the") && told.contains("--force"), "{told}");
        bench.nbdcrypt(&["header", "restore", "disk", "backup", "--force"]);
        assert_eq!(warning(&["dump", "disk"], true), "");
        assert_eq!(open(std::fs::read(bench.path("disk")).unwrap()).unwrap().keyslot, 0);

        // No program would use a refused copy that is older.
        let bytes = with_copy(copy, "/segments/0/sector_size", &json!(8192), 0);
        std::fs::write(bench.path("disk"), &bytes).unwrap();
        assert_eq!(warning(&["dump", "disk"], true), "");
    }
}

/// The volume opens with the other copy, so without a warning nobody would notice before that copy breaks, too.
#[test]
fn a_broken_copy_gives_one_warning_that_names_the_repair() {
    for (copy, broken, whole) in [(0, "primary", "secondary"), (HEADER, "secondary", "primary")] {
        let bench = harness::luks::Workbench::new();
        std::fs::write(bench.path("wrong"), "wrong").unwrap();
        std::fs::write(bench.path("new"), "new").unwrap();
        let mut bytes = disk();
        std::fs::write(bench.path("disk"), &bytes).unwrap();
        let warning = |arguments: &[&str], succeeds: bool| {
            let output = bench.try_nbdcrypt(arguments);
            assert_eq!(output.status.success(), succeeds, "{arguments:?}: {}", harness::nbdcrypt::told(&output));
            String::from_utf8(output.stderr).unwrap()
        };
        assert_eq!(warning(&["dump", "disk"], true), "");
        // A byte of the JSON area, which the checksum covers.
        bytes[copy + 8192] ^= 1;
        std::fs::write(bench.path("disk"), &bytes).unwrap();
        let problem =
            format!("the {broken} copy of the LUKS2 header is broken: csum is not the checksum of the header");
        let looks: [(&[&str], bool); 7] = [
            (&["dump", "disk"], true),
            (&["dump", "--json", "disk"], true),
            (&["key", "list", "disk"], true),
            (&["key", "test", "disk", "--key-file", "key"], true),
            (&["token", "list", "disk"], true),
            (&["header", "backup", "disk", "backup"], true),
            (&["serve", "disk", "--socket", "socket", "--key-file", "wrong"], false),
        ];
        for (arguments, succeeds) in looks {
            let said = warning(arguments, succeeds);
            assert_eq!(said.matches(&problem).count(), 1, "{arguments:?}: {said}");
            assert!(said.contains(&format!("The {whole} copy is used")), "{arguments:?}: {said}");
            assert!(said.contains("`nbdcrypt header repair disk` rewrites"), "{arguments:?}: {said}");
        }
        let quick = ["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"];
        let add = ["key", "add", "disk", "--key-file", "key", "--new-key-file", "new"];
        let said = warning(&[&add, &quick[..]].concat(), true);
        assert!(said.contains(&problem) && said.contains("change of the header rewrites"), "{said}");
        assert!(!said.contains("repair"), "{said}");
        // The change has repaired the copy.
        assert_eq!(warning(&["dump", "disk"], true), "");
        std::fs::write(bench.path("disk"), &bytes).unwrap();
        bench.nbdcrypt(&["header", "repair", "disk"]);
        assert_eq!(warning(&["dump", "disk"], true), "");
    }
}

/// The digest of the volume key may have a type that nbdcrypt does not support.
#[test]
fn an_incomparable_backup_is_restored_only_with_force() {
    let (usual, other) = (disk(), with("/digests/0/type", json!("other")));
    for (backup, on_disk, which) in
        [(&other, &other, "the backup"), (&other, &usual, "the backup"), (&usual, &other, "the header on the disk")]
    {
        let backup = luks::Backup::read(&MemoryStore::from(backup.clone())).unwrap();
        let store = MemoryStore::from(on_disk.clone());
        let error = backup.restore(&store, false, &mut harness::luks::noise(1)).unwrap_err();
        assert!(matches!(error, LuksError::BackupNotComparable { header } if header == which), "{error}");
        assert!(store.snapshot() == *on_disk);
        backup.restore(&store, true, &mut harness::luks::noise(1)).unwrap();
    }
}

/// Both copies are correct and of the same age but differ. cryptsetup reads the primary copy. nbdcrypt cannot know
/// which copy is correct.
#[test]
fn differing_copies_of_the_same_age_are_kept() {
    let token = json!({ "type": "x", "keyslots": [] });
    for copy in [0, HEADER] {
        let bytes = with_copy(copy, "/tokens/0", &token, 1);
        let store = MemoryStore::from(bytes.clone());
        assert_eq!(luks2::read_header(&store).unwrap().metadata.tokens.len(), usize::from(copy == 0));
        for (change, result) in change_the_header(&store) {
            let error = result.expect_err(change).to_string();
            assert!(error.contains("they differ"), "{change}: {error}");
            assert!(store.snapshot() == bytes, "{change} wrote to the disk");
        }
        luks::repair_from(&store, luks2::HeaderCopy::Secondary, &mut harness::luks::noise(1)).unwrap();
        assert_eq!(luks2::read_header(&store).unwrap().metadata.tokens.len(), usize::from(copy != 0));
        // An interrupted update: the newer copy counts, and replaces the older copy.
        let store = MemoryStore::from(with_copy(copy, "/tokens/0", &token, 2));
        luks::repair(&store, &mut harness::luks::noise(1)).unwrap();
        assert_eq!(luks2::read_header(&store).unwrap().metadata.tokens.len(), 1);
    }
    // The first copy does not fit the disk, but the second does. The volume opens with the second copy.
    let bytes = with_copy(0, "/segments/0/offset", &json!((1u64 << 40).to_string()), 1);
    assert_eq!(open(bytes).unwrap().keyslot, 0);
}

#[test]
fn a_header_with_the_last_sequence_number_only_opens() {
    let mut disk = with_text(json_of(&disk()).to_string().as_bytes());
    disk[16..24].copy_from_slice(&u64::MAX.to_be_bytes());
    seal(&mut disk);
    assert_eq!(open(disk.clone()).unwrap().keyslot, 0);
    let store = MemoryStore::from(disk);
    let error = luks2::remove_key(&store, 0, true, &mut harness::luks::noise(1)).unwrap_err();
    assert!(error.to_string().contains("seqid is 18446744073709551615"), "{error}");
    assert_eq!(open(store.snapshot()).unwrap().keyslot, 0);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn no_mutated_header_hangs_or_panics(
        changes in proptest::collection::vec((0usize..BINARY + 1200, any::<u8>()), 1..6),
        sealed in any::<bool>(),
    ) {
        let mut disk = disk();
        for (at, byte) in changes {
            disk[at] = byte;
        }
        if sealed {
            disk[HEADER..HEADER + 6].fill(0);
            seal(&mut disk);
        }
        let store = MemoryStore::from(disk);
        let started = Instant::now();
        let limits = Limits { iterations: 5000.try_into().unwrap(), argon2_memory: 1024, argon2_time: 4, argon2_lanes: 2 };
        let passphrase = Passphrase::new(PASSPHRASE.to_vec());
        let _ = luks::read(&store, &limits).and_then(|volume| volume.unlock(&store, &passphrase));
        let _ = luks2::read_header(&store).map(|header| header.to_string());
        prop_assert!(started.elapsed() < Duration::from_secs(60));
    }
}

/// A header that is nested too deeply opens, but is not changed. A change that is refused only at its end could already
/// have destroyed key material.
#[test]
fn a_header_nested_too_deeply_to_write_is_not_changed() {
    let nested = (0..28).fold(json!({}), |inner, _| json!([inner]));
    let store = MemoryStore::from(with("/tokens/0", json!({ "type": "x", "keyslots": [], "v": nested })));
    // The repair writes the header to both copies.
    luks::repair(&store, &mut harness::luks::noise(1)).unwrap();
    let before = store.snapshot();
    assert_eq!(open(before.clone()).unwrap().keyslot, 0);
    let volume = luks::read_for_keys(&store, &Limits::default()).unwrap();
    let error = volume.remove_key(&store, 0, true, &mut harness::luks::noise(1)).unwrap_err();
    assert!(matches!(error, LuksError::NotWritable(_)), "{error}");
    assert!(store.snapshot() == before);
}

/// cryptsetup (json-c) accepts these texts: the volume opens, and its header is not changed.
#[test]
fn text_that_only_cryptsetup_accepts_opens_and_is_kept() {
    let json = json_of(&disk()).to_string();
    let tokens: [&[u8]; 6] = [
        b"\"v\":NaN",
        b"\"v\":[-Infinity,Infinity , nan]",
        b"\"v\":\"B\xfcro\"",
        b"\"v\":\"\\\"\",\"w\":NaN",
        b"\"B\xfcro\":Infinity",
        b"\"v\":\"\xe2\x82\"",
    ];
    for token in tokens {
        let case = token.escape_ascii();
        let (front, back) = json.split_once("\"tokens\":{}").expect("the volume has no token");
        let text = [front.as_bytes(), br#""tokens":{"0":{"type":"x","keyslots":[],"#, token, b"}}", back.as_bytes()];
        let mut bytes = with_text(&text.concat());
        assert_eq!(open(bytes.clone()).unwrap_or_else(|error| panic!("{case}: {error}")).keyslot, 0);
        // A repair copies the text unchanged.
        let store = MemoryStore::from(bytes);
        luks::repair(&store, &mut harness::luks::noise(1)).unwrap();
        bytes = store.snapshot();
        assert_eq!(open(bytes.clone()).unwrap().keyslot, 0, "{case}");
        let error = luks2::remove_token(&store, 0, &mut harness::luks::noise(1)).unwrap_err();
        assert!(matches!(error, LuksError::NotWritable(_)), "{case}: {error}");
        assert!(matches!(luks2::export_token(&store, 0), Err(LuksError::NotWritable(_))), "{case}");
        assert!(store.snapshot() == bytes, "{case}");
    }
    // Within a JSON string these are ordinary letters, and the header can be changed as usual.
    let store = MemoryStore::from(with("/tokens/0", json!({ "type": "x", "keyslots": [], "v": "NaN, \\\" Infinity" })));
    luks2::remove_token(&store, 0, &mut harness::luks::noise(1)).unwrap();
    for field in ["key_size", "keyslots"] {
        let (front, back) = json.split_once(&format!("\"{field}\":")).unwrap();
        open(with_text(format!("{front}\"{field}\":NaN,{back}").as_bytes())).unwrap_err();
    }
}

#[test]
fn the_second_copy_does_not_overwrite_other_data() {
    let mut bytes = disk();
    bytes[..BINARY].fill(0);
    bytes[1024] = 1; // the version
    bytes[1028] = 100; // the last page
    bytes[BINARY - 10..BINARY].copy_from_slice(b"SWAPSPACE2");
    let store = MemoryStore::from(bytes.clone());
    let mut random = harness::luks::noise(1);
    assert!(matches!(luks::repair(&store, &mut random), Err(LuksError::NotLuks)));
    let error = luks::repair_from(&store, luks2::HeaderCopy::Secondary, &mut random).unwrap_err().to_string();
    assert!(error.contains("swap space"), "{error}");
    assert!(store.snapshot() == bytes);
    // Without the other owner's signature, the disk is the volume again.
    bytes[..BINARY].fill(0);
    let store = MemoryStore::from(bytes);
    luks::repair_from(&store, luks2::HeaderCopy::Secondary, &mut random).unwrap();
    assert_eq!(open(store.snapshot()).unwrap().keyslot, 0);
}
