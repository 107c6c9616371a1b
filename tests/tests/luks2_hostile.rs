//! LUKS2 headers that lie: each is refused with an error that names the field, in bounded time, and none makes anything
//! panic. The checksums are right, so that what is behind them is reached.

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

/// A disk with this text for its JSON, in the first header; the second one is gone.
fn with_text(text: &[u8]) -> Vec<u8> {
    let mut disk = disk();
    disk[HEADER..HEADER + 6].fill(0);
    disk[BINARY..HEADER].fill(0);
    disk[BINARY..BINARY + text.len()].copy_from_slice(text);
    seal(&mut disk);
    disk
}

/// Puts the right checksum on the first header.
fn seal(disk: &mut [u8]) {
    disk[448..512].fill(0);
    let checksum = harness::luks::sha256(&disk[..HEADER]);
    disk[448..480].copy_from_slice(&checksum);
}

/// A disk with one member of its JSON changed; `Value::Null` takes it out.
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
fn an_error_names_the_field_and_what_stands_there() {
    open(with("/tokens/7", json!({ "type": "unknown", "keyslots": ["0"], "more": [1, 2.5, null] }))).unwrap();
    let argon2 = |memory: u64, time: u64, cpus: u64| json!({ "type": "argon2id", "memory": memory, "time": time, "cpus": cpus, "salt": "AAAAAAAAAAAAAAAAAAAAAA==" });
    let cases = [
        ("/keyslots", Value::Null, "keyslots is missing"),
        ("/keyslots/x", json!({}), "keyslots.x is no number"),
        ("/keyslots/0/key_size", json!(0), "keyslots.0.key_size is 0"),
        ("/keyslots/0/key_size", json!("64"), "keyslots.0.key_size is \"64\", not a number"),
        ("/keyslots/0/key_size", json!(48), "aes-xts-plain64 with a key of 384 bits"),
        ("/keyslots/0/af/stripes", json!(4_000_000_000u32), "keyslots.0.af.stripes is 4000000000"),
        ("/keyslots/0/af/hash", json!("md5"), "the hash md5"),
        ("/keyslots/0/area/offset", json!("16384"), "keyslots.0.area is 258048 bytes at 16384"),
        ("/keyslots/0/area/offset", json!("18446744073709551615"), "keyslots.0.area is 258048 bytes at 1844674"),
        ("/keyslots/0/area/offset", json!("+32768"), "keyslots.0.area.offset is \"+32768\", not a number in quotes"),
        ("/keyslots/0/area/size", json!("4096"), "keyslots.0.area.size is 4096, too few"),
        ("/keyslots/0/area/encryption", json!("serpent-xts-plain64"), "the cipher serpent-xts-plain64"),
        (
            "/keyslots/0/area/encryption",
            json!("aes\u{1b}[31m"),
            "keyslots.0.area.encryption is \"aes\\u001b[31m\", not a name",
        ),
        ("/segments/0/encryption", json!("aes\u{9b}31m"), "segments.0.encryption is \"aes\\u{9b}31m\", not a name"),
        ("/keyslots/\u{1b}[31m", json!({}), "keyslots.\\u{1b}[31m is no number"),
        ("/config/requirements", json!({ "mandatory": ["\u{7}"] }), "config.requirements.mandatory is [\"\\u0007\"]"),
        ("/keyslots/0/kdf/iterations", json!(0), "keyslots.0.kdf.iterations is 0"),
        ("/keyslots/0/kdf/iterations", json!(u32::MAX), "4294967295 iterations in keyslots.0.kdf.iterations"),
        ("/keyslots/0/kdf/salt", json!("?"), "keyslots.0.kdf.salt is \"?\", not bytes in base64"),
        ("/keyslots/0/kdf", argon2(u64::from(u32::MAX), 4, 1), "keyslots.0.kdf.memory of 4294967295"),
        ("/keyslots/0/kdf", argon2(1024, 1_000_000, 1), "keyslots.0.kdf.time of 1000000, more than the 409600"),
        ("/keyslots/0/kdf", argon2(4 << 20, 101, 1), "keyslots.0.kdf.time of 101, more than the 100"),
        ("/keyslots/0/kdf", argon2(1024, 4, 5000), "keyslots.0.kdf.cpus of 5000"),
        ("/keyslots/0/kdf", argon2(0, 4, 1), "keyslots.0.kdf.memory is 0"),
        ("/keyslots/0/kdf", argon2(1, 4, 4), "keyslots.0.kdf is Argon2Cost"),
        ("/keyslots/0/kdf", json!({ "type": "scrypt" }), "the key derivation scrypt"),
        ("/digests/0/keyslots", json!(["5"]), "digests.0.keyslots is a list with 5, which is not there"),
        ("/digests/0/keyslots", json!(["0", "0"]), "digests.0.keyslots is a list with 0 twice"),
        ("/digests/0/segments", json!([]), "digests is without one for segment 0"),
        ("/digests/0/iterations", json!(u32::MAX), "digests.0.iterations"),
        ("/digests/0/type", json!("sha256"), "the digest sha256"),
        ("/digests/0/digest", json!("AA=="), "digests.0.digest is 1 bytes, and those of sha256 have 32"),
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
        ("/segments/0/integrity", json!({ "type": "hmac(sha256)" }), "the integrity hmac(sha256)"),
        ("/segments/1", json!({ "type": "linear", "offset": "0", "size": "dynamic" }), "number of data segments 2"),
        ("/config/json_size", json!("4096"), "config.json_size is 4096"),
        ("/config/keyslots_size", json!("1000000000000"), "config.keyslots_size is 1000000000000"),
        ("/config/requirements", json!({ "mandatory": ["online-reencrypt-v2"] }), "requirement online-reencrypt-v2"),
        ("/tokens/0", json!({ "type": "x", "keyslots": ["3"] }), "tokens.0.keyslots is a list with 3"),
    ];
    for (pointer, value, expected) in cases {
        let text = format!("{pointer} = {value}");
        let error = open(with(pointer, value)).unwrap_err().to_string();
        assert!(error.contains(expected), "{text}: {error}");
        assert!(!error.contains(char::is_control), "a terminal would obey {error:?}");
    }
    // A token's type is its maker's affair; it is shown so that a terminal does not obey it.
    let store = MemoryStore::from(with("/tokens/7", json!({ "type": "\u{1b}[31m", "keyslots": ["0"] })));
    let shown = luks::dump(&store).unwrap().display("disk");
    assert!(shown.contains("  7: \\u{1b}[31m\n") && !shown.contains('\u{1b}'), "{shown}");
    // As JSON it is the same JSON, and a terminal does not obey it either.
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
fn text_that_is_no_json_is_refused() {
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
fn a_keyslot_that_we_cannot_try_does_not_keep_another_from_opening() {
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
    assert!(matches!(error, LuksError::Unsupported { what: "key derivation", .. }), "it may be for that one: {error}");
}

#[test]
fn keyslots_together_ask_for_no_more_than_is_allowed() {
    let mut json = json_of(&disk());
    for id in 1..12 {
        let mut slot = json["keyslots"]["0"].clone();
        slot["area"]["offset"] = json!((32768 + id * 258_048).to_string());
        json["keyslots"][id.to_string()] = slot;
    }
    // The last one holds the key, and those before it noise.
    let offset = json["keyslots"]["0"]["area"]["offset"].clone();
    json["keyslots"]["0"]["area"]["offset"] = json["keyslots"]["11"]["area"]["offset"].clone();
    json["keyslots"]["11"]["area"]["offset"] = offset;
    json["digests"]["0"]["keyslots"] = (0..12).map(|id| id.to_string()).collect();
    let mut disk = with_text(json.to_string().as_bytes());
    harness::luks::noise(2)(&mut disk[32768 + 258_048..32768 + 12 * 258_048]).unwrap();
    // Each takes 1000 iterations twice, for 64 bytes of key, and 1000 for its digest.
    let open = |iterations: u32| {
        let limits = Limits { iterations: iterations.try_into().unwrap(), ..Limits::default() };
        let store = MemoryStore::from(disk.clone());
        let volume = luks::read(&store, &limits).unwrap();
        let passphrase = Passphrase::new(PASSPHRASE.to_vec());
        (volume.unlock(&store, &passphrase), volume.unlock_keyslot(&store, Some(11), &passphrase, &limits))
    };
    let (all, named) = open(1000);
    assert!(matches!(all, Err(LuksError::TooMuchWork { keyslot: 2 })), "{all:?}");
    assert_eq!(named.unwrap().keyslot, 11);
    assert_eq!(open(10_000).0.unwrap().keyslot, 11);
}

#[test]
fn keyslots_that_are_ignored_are_there_and_open_when_they_are_named() {
    let store = MemoryStore::from(with("/keyslots/0/priority", json!(0)));
    let volume = luks::read(&store, &Limits::default()).unwrap();
    let passphrase = Passphrase::new(PASSPHRASE.to_vec());
    let error = volume.unlock(&store, &passphrase).unwrap_err();
    assert!(matches!(error, LuksError::AllIgnored { keyslot: 0 }), "{error}");
    assert!(error.to_string().contains("nbdcrypt key priority --key-slot 0"), "{error}");
    assert_eq!(volume.unlock_keyslot(&store, Some(0), &passphrase, &Limits::default()).unwrap().keyslot, 0);
}

#[test]
fn a_newer_copy_that_we_do_not_understand_is_not_written_over() {
    let mut disk = disk();
    let mut json = json_of(&disk);
    json["keyslots"]["0"]["area"]["offset"] = json!(7);
    let text = json.to_string();
    disk[BINARY..HEADER].fill(0);
    disk[BINARY..BINARY + text.len()].copy_from_slice(text.as_bytes());
    disk[16..24].copy_from_slice(&1000u64.to_be_bytes());
    seal(&mut disk);
    assert_eq!(open(disk.clone()).unwrap().keyslot, 0, "the older one opens it");
    let store = MemoryStore::from(disk.clone());
    let error = luks2::set_priority(&store, 0, luks2::Priority::Prefer, &mut harness::luks::noise(1)).unwrap_err();
    assert!(error.to_string().contains("keyslots.0.area.offset is 7"), "{error}");
    assert!(store.snapshot() == disk);
    assert!(luks2::repair(&store, &mut harness::luks::noise(1)).unwrap().primary, "it was asked for");
}

#[test]
fn a_header_without_a_number_left_for_an_update_opens_and_is_not_changed() {
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
    fn any_mutation_of_a_header_ends_soon_and_without_a_panic(
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
        prop_assert!(started.elapsed() < Duration::from_secs(5));
    }
}
