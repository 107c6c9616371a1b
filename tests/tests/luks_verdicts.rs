//! nbdcrypt and cryptsetup agree on which headers open a volume: if one refuses a header, the other refuses it too.
//!
//! Each case is a LUKS2 header with a change and a corrected checksum, in both copies. Where the two programs differ, the
//! table says why.

use engine::key::{Passphrase, VolumeKey};
use engine::luks::{self, Limits};
use engine::sector::SectorSize;
use engine::store::MemoryStore;
use harness::luks::{PASSPHRASE, Workbench, begin_luks2, key, noise, quick_luks1, quick_luks2, sha256, try_run};
use serde_json::{Value, json};

const HEADER: usize = 16 << 10;
const BINARY: usize = 4096;
const DATA: usize = 2 << 20;
/// The offset of a second keyslot's material.
const SECOND_AREA: &str = "290816";

/// Makes a small LUKS2 volume with sectors of 512 bytes, which need no alignment.
fn disk() -> Vec<u8> {
    let mut options = quick_luks2();
    options.sector_size = SectorSize::B512;
    options.layout.keyslots_size = Some(1 << 20);
    options.layout.data_offset = Some(DATA as u64);
    let store = MemoryStore::zeroed(4 << 20);
    begin_luks2(&store, &options, key(VolumeKey::AES_256)).commit(&store).unwrap();
    store.snapshot()
}

fn json_of(disk: &[u8]) -> Value {
    let end = disk[BINARY..HEADER].iter().position(|byte| *byte == 0).unwrap();
    serde_json::from_slice(&disk[BINARY..BINARY + end]).unwrap()
}

/// Returns the disk with this text as the JSON of both copies, and with correct checksums.
fn with_text(mut disk: Vec<u8>, text: &[u8]) -> Vec<u8> {
    for copy in [0, HEADER] {
        disk[copy + BINARY..copy + HEADER].fill(0);
        disk[copy + BINARY..][..text.len()].copy_from_slice(text);
        seal(&mut disk[copy..copy + HEADER]);
    }
    disk
}

fn seal(header: &mut [u8]) {
    header[448..512].fill(0);
    let checksum = sha256(header);
    header[448..480].copy_from_slice(&checksum);
}

/// Opens the volume with nbdcrypt. Returns the error if it is refused.
fn ours(disk: &[u8]) -> Result<(), String> {
    let store = MemoryStore::from(disk.to_vec());
    let volume = luks::read(&store, &Limits::default()).map_err(|error| error.to_string())?;
    let opened = volume.unlock(&store, &Passphrase::new(PASSPHRASE.to_vec()));
    opened.map(drop).map_err(|error| error.to_string())
}

/// Opens the volume with cryptsetup. Returns the error if it is refused.
fn theirs(bench: &Workbench, disk: &[u8]) -> Result<(), String> {
    let path = bench.path("disk");
    std::fs::write(&path, disk).unwrap();
    let (key_file, path) = (bench.key_file(), path.to_str().unwrap().to_owned());
    let arguments = ["open", "--test-passphrase", "--key-file", key_file.to_str().unwrap(), path.as_str()];
    let output = try_run("cryptsetup", arguments);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    if output.status.success() { Ok(()) } else { Err(said) }
}

/// Which programs should open a case's header.
enum Expected {
    Both,
    Neither,
    /// Only nbdcrypt refuses, for this reason.
    OnlyTheirs(&'static str),
}

/// In this case cryptsetup 2.6.1 (and 2.8) returns success before it has compared anything (`PBKDF2_digest_verify`).
const UNVERIFIED: &str = "cryptsetup accepts any key, even with a wrong passphrase";

/// cryptsetup creates at most 8 digests and 32 segments.
const BOUNDED: &str = "no program creates so many, and the work to check a header is bounded";

/// With `--test-passphrase` cryptsetup only opens the keyslot. Activation would fail, because dm-crypt refuses the volume.
const NO_DM_CRYPT: &str = "cryptsetup refuses it when it activates the volume";

use Expected::{Both, Neither, OnlyTheirs};

/// Returns the JSON with these members changed. `null` removes a member.
fn changed(changes: &[(&str, Value)]) -> Vec<u8> {
    let mut json = json_of(&disk());
    for (pointer, value) in changes {
        let (parent, name) = pointer.rsplit_once('/').unwrap();
        let parent = json.pointer_mut(parent).unwrap().as_object_mut().unwrap();
        match value {
            Value::Null => parent.remove(name),
            value => parent.insert(name.to_owned(), value.clone()),
        };
    }
    json.to_string().into_bytes()
}

fn nested(depth: usize) -> Value {
    (0..depth).fold(json!([]), |inner, _| json!([inner]))
}

/// Rules for headers, mostly from cryptsetup's sources.
#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs cryptsetup: run `make test`")]
fn both_agree_on_changed_headers() {
    let base = json_of(&disk());
    let slot = base["keyslots"]["0"].clone();
    let digest = base["digests"]["0"].clone();
    let segment = base["segments"]["0"].clone();
    let text = base.to_string();
    let with = |object: &Value, changes: &[(&str, Value)]| {
        let mut object = object.clone();
        for (pointer, value) in changes {
            *object.pointer_mut(pointer).unwrap_or(&mut Value::Null) = value.clone();
            if !pointer[1..].contains('/') {
                object[&pointer[1..]] = value.clone();
            }
        }
        object
    };
    let second = |changes: &[(&str, Value)]| {
        let mut slot = with(&slot, &[("/area/offset", json!(SECOND_AREA))]);
        for (pointer, value) in changes {
            *slot.pointer_mut(pointer).unwrap() = value.clone();
        }
        slot
    };
    let backup = with(&segment, &[("/flags", json!(["backup-previous"]))]);
    let first_mib = with(&segment, &[("/size", json!("1048576"))]);
    let second_mib = with(&segment, &[("/offset", json!("3145728"))]);
    let in_both = json!(["0", "1"]);
    let other_digest =
        |keyslots: Value, segments: Value| with(&digest, &[("/keyslots", keyslots), ("/segments", segments)]);
    let unknown = |segments: Value| json!({ "type": "other", "keyslots": [], "segments": segments });
    let reencrypt = json!({ "type": "reencrypt", "mode": "reencrypt", "direction": "forward", "key_size": 1,
        "area": { "type": "none", "offset": SECOND_AREA, "size": "4096" } });
    let foreign =
        json!({ "type": "foo", "key_size": 1, "area": { "type": "x", "offset": SECOND_AREA, "size": "4096" } });
    let token = |keyslots: Value| json!({ "type": "x", "keyslots": keyslots });
    let online = json!({ "mandatory": ["online-reencrypt-v2"] });
    let salt = slot["kdf"]["salt"].clone();
    let argon2 = |time: u32, memory: u32, cpus: u32| json!({ "type": "argon2id", "time": time, "memory": memory, "cpus": cpus, "salt": salt });
    let mut digests = base["digests"].as_object().unwrap().clone();
    (1..33).for_each(|id| drop(digests.insert(id.to_string(), other_digest(json!([]), json!([])))));
    let all: Vec<String> = (0..34).map(|id| id.to_string()).collect();
    let segments: serde_json::Map<String, Value> =
        all.iter().map(|id| (id.clone(), if id == "0" { segment.clone() } else { backup.clone() })).collect();
    let backups = vec![("/segments", Value::Object(segments)), ("/digests/0/segments", json!(all))];
    let deep = |depth: usize| json!({ "type": "x", "keyslots": [], "deep": nested(depth) });

    let texts: Vec<(&str, Vec<u8>, Expected)> = vec![
        ("unchanged", text.clone().into_bytes(), Both),
        ("a space before the JSON", format!(" {text}").into_bytes(), Neither),
        ("a newline after the JSON", format!("{text}\n").into_bytes(), Both),
        ("bytes after the JSON", format!("{text}x").into_bytes(), Neither),
        ("a list", format!("[{text}]").into_bytes(), Neither),
        ("a comment", text.replacen('{', "{/**/", 1).into_bytes(), OnlyTheirs("json-c reads more than JSON")),
    ];
    type Case<'a> = (&'a str, Vec<(&'a str, Value)>, Expected);
    let cases: Vec<Case<'_>> = vec![
        // The document.
        ("31 levels", vec![("/tokens/0", deep(28))], Both),
        ("33 levels", vec![("/tokens/0", deep(30))], Neither),
        ("an unknown section", vec![("/extra", json!({ "a": 1 }))], Both),
        ("no tokens", vec![("/tokens", Value::Null)], Neither),
        ("no digests", vec![("/digests", Value::Null)], Neither),
        ("no segments", vec![("/segments", Value::Null)], Neither),
        ("no keyslots", vec![("/keyslots", Value::Null)], Neither),
        ("no config", vec![("/config", Value::Null)], Neither),
        // Tokens.
        ("a token without a type", vec![("/tokens/0", json!({ "type": "", "keyslots": [] }))], Neither),
        ("a token's keyslot 00", vec![("/tokens/0", token(json!(["00"])))], Neither),
        ("a token's keyslot +0", vec![("/tokens/0", token(json!(["+0"])))], Neither),
        ("a token's keyslot twice", vec![("/tokens/0", token(json!(["0", "0"])))], Both),
        ("a token's missing keyslot", vec![("/tokens/0", token(json!(["3"])))], Neither),
        ("a token 00", vec![("/tokens/00", token(json!([])))], Both),
        ("a token without a name", vec![("/tokens/", token(json!([])))], Both),
        ("a token 00 for a missing keyslot", vec![("/tokens/00", token(json!(["3"])))], Neither),
        ("a token x", vec![("/tokens/x", token(json!([])))], Neither),
        ("a token's keyslots that are no list", vec![("/tokens/0", token(json!("0")))], Neither),
        // Keyslots.
        ("priority 0", vec![("/keyslots/0/priority", json!(0))], Neither),
        ("priority 2", vec![("/keyslots/0/priority", json!(2))], Both),
        ("priority 3", vec![("/keyslots/0/priority", json!(3))], Neither),
        ("priority -1", vec![("/keyslots/0/priority", json!(-1))], Neither),
        ("priority in quotes", vec![("/keyslots/0/priority", json!("2"))], Both),
        ("a fraction as a priority", vec![("/keyslots/0/priority", json!(1.5))], Both),
        ("priority x", vec![("/keyslots/0/priority", json!("x"))], Neither),
        ("another splitter", vec![("/keyslots/0/af/type", json!("luks2"))], Neither),
        ("no splitter's hash", vec![("/keyslots/0/af/hash", json!(""))], Neither),
        ("stripes in quotes", vec![("/keyslots/0/af/stripes", json!("4000"))], Neither),
        // cryptsetup ignores the number.
        ("no stripes", vec![("/keyslots/0/af/stripes", json!(0))], Both),
        ("1 stripe", vec![("/keyslots/0/af/stripes", json!(1))], Both),
        ("4001 stripes", vec![("/keyslots/0/af/stripes", json!(4001))], Both),
        ("-1 stripes", vec![("/keyslots/0/af/stripes", json!(-1))], Both),
        ("stripes beyond 32 bits", vec![("/keyslots/0/af/stripes", json!(1u64 << 40))], Both),
        ("a fraction for stripes", vec![("/keyslots/0/af/stripes", json!(0.5))], Neither),
        ("another area", vec![("/keyslots/0/area/type", json!("x"))], Neither),
        ("an area without a cipher", vec![("/keyslots/0/area/encryption", json!(""))], Neither),
        ("an area with a short IV", vec![("/keyslots/0/area/encryption", json!("aes-xts-plain"))], Both),
        ("an area without a key size", vec![("/keyslots/0/area/key_size", Value::Null)], Neither),
        ("an area that does not begin at a sector", vec![("/keyslots/0/area/offset", json!("32769"))], Both),
        ("an area within the header", vec![("/keyslots/0/area/offset", json!("16384"))], Neither),
        ("an empty area", vec![("/keyslots/0/area/size", json!("0"))], Neither),
        ("an area that reaches too far", vec![("/keyslots/0/area/size", json!("1048577"))], Neither),
        (
            "an area that is too small",
            vec![("/keyslots/0/area/size", json!("4096"))],
            OnlyTheirs("the key material would be read from another keyslot's area"),
        ),
        ("no key size", vec![("/keyslots/0/key_size", json!("64"))], Neither),
        ("a negative key size", vec![("/keyslots/0/key_size", json!(-1))], Neither),
        ("no iterations", vec![("/keyslots/0/kdf/iterations", Value::Null)], Neither),
        ("zero iterations", vec![("/keyslots/0/kdf/iterations", json!(0))], Neither),
        ("a short salt", vec![("/keyslots/0/kdf/salt", json!("AAAAAAAAAAAAAAAAAAAAAA=="))], Neither),
        ("a keyslot 40", vec![("/keyslots", json!({ "40": slot })), ("/digests/0/keyslots", json!(["40"]))], Both),
        ("a keyslot 00", vec![("/keyslots", json!({ "00": slot })), ("/digests/0/keyslots", json!(["00"]))], Neither),
        (
            "a keyslot without a name",
            vec![("/keyslots/", second(&[]))],
            OnlyTheirs("no program creates it, and nothing can refer to it"),
        ),
        ("a key of half the size", vec![("/keyslots/0/key_size", json!(32))], Neither),
        ("a key size of 0", vec![("/keyslots/0/key_size", json!(0))], Neither),
        ("a key size beyond 32 bits", vec![("/keyslots/0/key_size", json!(1u64 << 32))], Neither),
        ("a key size of 4 GiB", vec![("/keyslots/0/key_size", json!(u32::MAX))], Neither),
        ("an area with another key size", vec![("/keyslots/0/area/key_size", json!(32))], Neither),
        ("no salt", vec![("/keyslots/0/kdf/salt", Value::Null)], Neither),
        ("a salt that is not base64", vec![("/keyslots/0/kdf/salt", json!("?"))], Neither),
        ("a key derivation without time", vec![("/keyslots/0/kdf", argon2(0, 64, 1))], Neither),
        ("a key derivation without memory", vec![("/keyslots/0/kdf", argon2(4, 0, 1))], Neither),
        ("a key derivation without lanes", vec![("/keyslots/0/kdf", argon2(4, 64, 0))], Neither),
        ("a key derivation with more lanes than memory", vec![("/keyslots/0/kdf", argon2(4, 8, 4))], Neither),
        (
            "a second keyslot with another number of stripes",
            vec![
                ("/keyslots/1", with(&second(&[]), &[("/af/stripes", json!(3))])),
                ("/digests/0/keyslots", in_both.clone()),
            ],
            Both,
        ),
        (
            "a second keyslot with 0 iterations",
            vec![
                ("/keyslots/1", with(&second(&[]), &[("/kdf/iterations", json!(0))])),
                ("/digests/0/keyslots", in_both.clone()),
            ],
            Both,
        ),
        ("an additional member of the key derivation", vec![("/keyslots/0/kdf/more", json!(1))], Both),
        ("no key derivation", vec![("/keyslots/0/kdf", Value::Null)], Neither),
        ("a keyslot in no digest", vec![("/digests/0/keyslots", json!([]))], Neither),
        ("a second keyslot in no digest", vec![("/keyslots/1", second(&[]))], Neither),
        ("a keyslot in two digests", vec![("/digests/1", other_digest(json!(["0"]), json!([])))], Neither),
        ("a second keyslot", vec![("/keyslots/1", second(&[])), ("/digests/0/keyslots", in_both.clone())], Both),
        (
            "a second keyslot in the same place",
            vec![("/keyslots/1", slot.clone()), ("/digests/0/keyslots", in_both.clone())],
            Neither,
        ),
        (
            "a second keyslot with a key of another size",
            vec![("/keyslots/1", second(&[("/key_size", json!(32))])), ("/digests/0/keyslots", json!(["1", "0"]))],
            Both,
        ),
        ("a keyslot of a foreign type", vec![("/keyslots/1", foreign)], Both),
        ("a foreign keyslot without an area", vec![("/keyslots/1", json!({ "type": "foo", "key_size": 1 }))], Neither),
        ("a keyslot for a reencryption that is not required", vec![("/keyslots/1", reencrypt.clone())], Neither),
        ("a reencryption without a keyslot", vec![("/config/requirements", online.clone())], Neither),
        (
            "a reencryption without backup segments",
            vec![("/keyslots/1", reencrypt.clone()), ("/config/requirements", online)],
            Neither,
        ),
        // Digests.
        ("a digest's keyslot without quotes", vec![("/digests/0/keyslots", json!([0]))], Neither),
        ("no digest for the data", vec![("/digests/0/segments", json!([]))], Neither),
        ("the same keyslot twice in a digest", vec![("/digests/0/keyslots", json!(["0", "0"]))], Both),
        ("a digest without segments", vec![("/digests/1", other_digest(json!([]), json!([])))], Both),
        ("an unknown digest without segments", vec![("/digests/1", unknown(json!([])))], Both),
        (
            "an empty digest without segments",
            vec![("/digests/1", json!({ "type": "pbkdf2", "keyslots": [], "segments": [] }))],
            Both,
        ),
        ("an unknown digest for the data", vec![("/digests/0/type", json!("sha256"))], Neither),
        (
            "a digest with a short salt",
            vec![("/digests/0/salt", json!("AAAAAAAAAAAAAAAAAAAAAA=="))],
            OnlyTheirs(UNVERIFIED),
        ),
        ("a digest that is too short", vec![("/digests/0/digest", json!("AA=="))], OnlyTheirs(UNVERIFIED)),
        ("a digest's missing segment", vec![("/digests/0/segments", json!(["0", "5"]))], Neither),
        ("the same segment twice in a digest", vec![("/digests/0/segments", json!(["0", "0"]))], Both),
        ("a digest's segment 00", vec![("/digests/0/segments", json!(["00"]))], Neither),
        (
            "a digest of a number beyond 32 bits",
            vec![("/digests/99999999999", other_digest(json!([]), json!([])))],
            Both,
        ),
        ("a digest 00", vec![("/digests/00", other_digest(json!([]), json!([])))], Both),
        ("a digest x", vec![("/digests/x", other_digest(json!([]), json!([])))], Neither),
        ("33 digests", vec![("/digests", Value::Object(digests))], OnlyTheirs(BOUNDED)),
        ("a digest with zero iterations", vec![("/digests/0/iterations", json!(0))], Neither),
        ("a digest without a hash", vec![("/digests/0/hash", Value::Null)], Neither),
        ("a digest with a hash in capitals", vec![("/digests/0/hash", json!("SHA256"))], Both),
        // Segments.
        ("a segment without a cipher", vec![("/segments/0/encryption", json!(""))], Neither),
        ("an offset within the header", vec![("/segments/0/offset", json!("512"))], Neither),
        ("an offset that is not at a sector", vec![("/segments/0/offset", json!("2097153"))], Neither),
        ("a negative IV", vec![("/segments/0/iv_tweak", json!("-1"))], Neither),
        ("no IV", vec![("/segments/0/iv_tweak", Value::Null)], Neither),
        ("an empty size", vec![("/segments/0/size", json!("0"))], Neither),
        ("no sector size", vec![("/segments/0/sector_size", json!(0))], Neither),
        ("flags that are not a list", vec![("/segments/0/flags", json!("x"))], Neither),
        ("only a backup", vec![("/segments/0/flags", json!(["backup-x"]))], Neither),
        ("integrity without a type", vec![("/segments/0/integrity", json!({}))], Neither),
        ("no segment", vec![("/segments", json!({}))], Neither),
        ("no segment 0", vec![("/segments", json!({ "1": segment })), ("/digests/0/segments", json!(["1"]))], Neither),
        ("a backup segment", vec![("/segments/1", backup.clone()), ("/digests/0/segments", in_both.clone())], Both),
        ("a backup segment without a digest", vec![("/segments/1", backup.clone())], Neither),
        (
            "a gap before the backup segment",
            vec![("/segments/2", backup.clone()), ("/digests/0/segments", json!(["0", "2"]))],
            Neither,
        ),
        (
            "a backup segment in front",
            vec![("/segments", json!({ "0": backup, "1": segment })), ("/digests/0/segments", in_both.clone())],
            Neither,
        ),
        (
            "two segments that overlap",
            vec![
                ("/segments", json!({ "0": with(&first_mib, &[("/size", json!("1049088"))]), "1": second_mib })),
                ("/digests/0/segments", in_both.clone()),
            ],
            Neither,
        ),
        (
            "two segments without an end",
            vec![("/segments", json!({ "0": segment, "1": second_mib })), ("/digests/0/segments", in_both.clone())],
            Neither,
        ),
        (
            "two segments",
            vec![("/segments", json!({ "0": first_mib, "1": second_mib })), ("/digests/0/segments", in_both)],
            OnlyTheirs("two segments are a reencryption, which must be finished first"),
        ),
        ("a segment of an unknown type", vec![("/segments/0/type", json!("x"))], OnlyTheirs(NO_DM_CRYPT)),
        ("a sector size of 513", vec![("/segments/0/sector_size", json!(513))], Neither),
        ("a sector size of 8192", vec![("/segments/0/sector_size", json!(8192))], OnlyTheirs(NO_DM_CRYPT)),
        ("a sector size of 1536", vec![("/segments/0/sector_size", json!(1536))], OnlyTheirs(NO_DM_CRYPT)),
        ("an offset beyond the disk", vec![("/segments/0/offset", json!("1099511627776"))], OnlyTheirs(NO_DM_CRYPT)),
        ("an offset beyond 64 bits", vec![("/segments/0/offset", json!("18446744073709551616"))], Neither),
        ("a size beyond the disk", vec![("/segments/0/size", json!("1099511627776"))], OnlyTheirs(NO_DM_CRYPT)),
        ("a size in half sectors", vec![("/segments/0/size", json!("4352"))], Neither),
        ("a size that overflows", vec![("/segments/0/size", json!("18446744073709551104"))], OnlyTheirs(NO_DM_CRYPT)),
        ("an unknown flag of a segment", vec![("/segments/0/flags", json!(["x\u{7}"]))], Both),
        (
            "integrity",
            vec![(
                "/segments/0/integrity",
                json!({ "type": "hmac(sha256)", "journal_encryption": "none", "journal_integrity": "none" }),
            )],
            OnlyTheirs("nbdcrypt does no integrity"),
        ),
        (
            "no segments but a 00",
            vec![("/segments", json!({ "00": segment })), ("/digests/0/segments", json!(["00"]))],
            Neither,
        ),
        ("33 backup segments", backups, OnlyTheirs(BOUNDED)),
        // Configuration.
        ("an unknown flag", vec![("/config/flags", json!(["x", "y\u{7}"]))], Both),
        ("flags that are no texts", vec![("/config/flags", json!([1]))], Neither),
        ("requirements that are no texts", vec![("/config/requirements", json!({ "mandatory": [1] }))], Neither),
        (
            "two reencryptions",
            vec![("/config/requirements", json!({ "mandatory": ["online-reencrypt", "online-reencrypt-v2"] }))],
            Neither,
        ),
        ("requirements of an unknown kind", vec![("/config/requirements", json!({ "optional": ["x"] }))], Both),
        ("a number for the size of the keyslots area", vec![("/config/keyslots_size", json!(1 << 20))], Neither),
        ("another size of the JSON area", vec![("/config/json_size", json!("28672"))], Neither),
        ("no size of the JSON area", vec![("/config/json_size", json!(""))], Neither),
        ("no keyslots area", vec![("/config/keyslots_size", json!("0"))], Neither),
        ("a keyslots area that reaches the data", vec![("/config/keyslots_size", json!("2064384"))], Both),
        ("a keyslots area that reaches into the data", vec![("/config/keyslots_size", json!("2068480"))], Neither),
        ("an uneven keyslots area", vec![("/config/keyslots_size", json!("1048577"))], Neither),
        ("flags that are not a list", vec![("/config/flags", json!("x"))], Neither),
        ("requirements that are a list", vec![("/config/requirements", json!([]))], Neither),
        ("no requirement", vec![("/config/requirements", json!({ "mandatory": [] }))], Both),
        (
            "an unknown requirement",
            vec![("/config/requirements", json!({ "mandatory": ["x"] }))],
            OnlyTheirs(NO_DM_CRYPT),
        ),
    ];
    let all = cases.into_iter().map(|(name, changes, expected)| (name, changed(&changes), expected));
    let bench = Workbench::new();
    let mut wrong = Vec::new();
    for (name, text, expected) in texts.into_iter().chain(all) {
        let disk = with_text(disk(), &text);
        let (ours, theirs) = (ours(&disk), theirs(&bench, &disk));
        let (is_right, why) = match expected {
            Both => (ours.is_ok() && theirs.is_ok(), "both should open it"),
            Neither => (ours.is_err() && theirs.is_err(), "neither should open it"),
            OnlyTheirs(why) => (ours.is_err() && theirs.is_ok(), why),
        };
        if !is_right {
            wrong.push(format!("{name} ({why}): ours {ours:?}, cryptsetup's {theirs:?}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Nothing depends on these fields of the binary header.
#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs cryptsetup: run `make test`")]
fn a_volume_with_a_damaged_uuid_or_label_opens() {
    let bench = Workbench::new();
    for (at, bytes) in [
        (168, b"Z".to_vec()),
        (168, vec![0; 40]),
        (168, vec![b'a'; 40]),
        (170, vec![7]),
        (170, vec![0xff]),
        (24, vec![b'x'; 48]),
    ] {
        let mut disk = disk();
        for copy in [0, HEADER] {
            disk[copy + at..][..bytes.len()].copy_from_slice(&bytes);
            seal(&mut disk[copy..copy + HEADER]);
        }
        assert_eq!((ours(&disk), theirs(&bench, &disk)), (Ok(()), Ok(())), "{bytes:?} at {at}");
        // Adding a key does not change the damaged field.
        std::fs::write(bench.path("new"), "new").unwrap();
        let quick = ["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"];
        let add = ["key", "add", "disk", "--key-file", "key", "--new-key-file", "new"];
        bench.nbdcrypt(&[&add[..], &quick[..]].concat());
        let after = std::fs::read(bench.path("disk")).unwrap();
        let end = at + bytes.len().min(39);
        assert!(after[at..end] == disk[at..end], "{bytes:?} at {at}");
        assert!(bench.cryptsetup_opens("disk", "1", "new"), "{bytes:?} at {at}");
        let shown = bench.nbdcrypt(&["dump", "disk"]);
        assert!(!shown.contains('\u{7}'), "{shown:?}");
    }
    // The same in LUKS1.
    let store = MemoryStore::zeroed(3 << 20);
    let options = quick_luks1(engine::luks::HashAlgorithm::Sha256);
    let passphrase = Passphrase::new(PASSPHRASE.to_vec());
    luks::luks1::begin(&store, &options, &passphrase, key(64), &mut noise(1)).unwrap().commit(&store).unwrap();
    let mut disk = store.snapshot();
    disk[168] = b'Z';
    assert_eq!((ours(&disk), theirs(&bench, &disk)), (Ok(()), Ok(())));
    assert!(bench.nbdcrypt(&["dump", "disk"]).contains("UUID:          \tZ"));
}

/// A disk that ends before its header or its data ends.
#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs cryptsetup: run `make test`")]
fn both_refuse_a_truncated_file() {
    let bench = Workbench::new();
    let store = MemoryStore::zeroed(3 << 20);
    let options = quick_luks1(engine::luks::HashAlgorithm::Sha256);
    let passphrase = Passphrase::new(PASSPHRASE.to_vec());
    luks::luks1::begin(&store, &options, &passphrase, key(64), &mut noise(1)).unwrap().commit(&store).unwrap();
    let luks1 = store.snapshot();
    // The file ends within the key material. Only the first keyslot is in use.
    for cut in [luks1[..1 << 20].to_vec(), disk()[..1 << 20].to_vec()] {
        assert!(ours(&cut).is_err() && theirs(&bench, &cut).is_err());
        for arguments in [
            &["dump", "disk"][..],
            &["key", "list", "disk"],
            &["key", "add", "disk", "--key-file", "key", "--new-key-file", "key"],
            &["header", "backup", "disk", "backup"],
        ] {
            let told = bench.refusal(arguments);
            assert!(told.contains("1048576 bytes"), "{arguments:?}: {told}");
        }
        assert!(std::fs::read(bench.path("disk")).unwrap() == cut);
    }
    // The file ends after the key material, but before the data.
    let cut = luks1[..2_080_768].to_vec();
    let told = ours(&cut).unwrap_err();
    assert!(told.contains("2080768 bytes"), "{told}");
}

/// One keyslot of a LUKS1 header cannot be tried, and another one opens.
#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs cryptsetup: run `make test`")]
fn a_damaged_luks1_keyslot_keeps_no_other_from_opening() {
    let bench = Workbench::new();
    std::fs::write(bench.path("new"), "new").unwrap();
    let store = MemoryStore::zeroed(3 << 20);
    let options = quick_luks1(engine::luks::HashAlgorithm::Sha256);
    let passphrase = Passphrase::new(PASSPHRASE.to_vec());
    luks::luks1::begin(&store, &options, &passphrase, key(64), &mut noise(1)).unwrap().commit(&store).unwrap();
    std::fs::write(bench.path("disk"), store.snapshot()).unwrap();
    let add = ["key", "add", "disk", "--key-file", "key", "--new-key-file"];
    let quick = ["--pbkdf-force-iterations", "1000"];
    bench.nbdcrypt(&[&add[..], &["new"], &quick[..]].concat());
    let whole = std::fs::read(bench.path("disk")).unwrap();
    // The keyslot's state, and its iterations.
    let cases: [(usize, usize, u32); 7] =
        [(0, 0, 0), (0, 0, 0x40ac_71f3), (0, 0, 0xdead_0000), (1, 0, 1), (1, 4, 0), (1, 4, u32::MAX), (1, 0, u32::MAX)];
    for (slot, field, value) in cases {
        let mut disk = whole.clone();
        disk[208 + 48 * slot + field..][..4].copy_from_slice(&value.to_be_bytes());
        std::fs::write(bench.path("disk"), &disk).unwrap();
        let (good, file, other) = if slot == 0 { ("1", "new", "key") } else { ("0", "key", "new") };
        let case = format!("keyslot {slot}, field {field}: {value:#010x}");
        let opened = bench.nbdcrypt(&["key", "test", "disk", "--key-file", file]);
        assert!(opened.contains(&format!("opens keyslot {good}")), "{case}: {opened}");
        assert!(bench.cryptsetup_opens("disk", good, file), "{case}");
        let told = bench.refusal(&["key", "test", "disk", "--key-file", other]);
        assert!(told.contains(&format!("keyslot {slot}")), "{case}: {told}");
        // cryptsetup would compute four billion iterations.
        assert!(value == u32::MAX || !bench.cryptsetup_opens("disk", &slot.to_string(), other), "{case}");
        assert!(bench.nbdcrypt(&["dump", "disk"]).contains("Key Slot 7: DISABLED"), "{case}");
        if field == 0 {
            // The damaged keyslot is not written.
            let named = slot.to_string();
            for arguments in [
                &["key", "add", "disk", "--key-file", file, "--new-key-file", other, "--key-slot", &named][..],
                &["key", "remove", "disk", "--key-slot", &named, "--force"],
            ] {
                let told = bench.refusal(arguments);
                assert!(told.contains(&format!("{value:#010x}")), "{case}, {arguments:?}: {told}");
                assert!(std::fs::read(bench.path("disk")).unwrap() == disk, "{case}");
            }
            let add = ["key", "add", "disk", "--key-file", file, "--new-key-file", other];
            let said = bench.nbdcrypt(&[&add[..], &quick[..]].concat());
            assert!(said.contains("keyslot 2"), "{case}: {said}");
            assert!(bench.cryptsetup_opens("disk", "2", other), "{case}");
            let after = std::fs::read(bench.path("disk")).unwrap();
            assert_eq!(after[208 + 48 * slot..][..48], disk[208 + 48 * slot..][..48], "{case}");
        }
    }
}

/// `aes-xts-plain` has an IV of 32 bits. Up to 2 TiB it is the same as `aes-xts-plain64`; beyond that the data would be
/// noise.
#[test]
fn a_32_bit_iv_opens_only_up_to_2_tib() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    let file = std::fs::File::create(&path).unwrap();
    file.set_len(3 << 20).unwrap();
    harness::luks::format_luks1(&path, engine::luks::HashAlgorithm::Sha256, key(64));
    // The cipher mode field of LUKS1, up to its first NUL.
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, b"xts-plain\0\0", 40).unwrap();
    let payload = 2 << 20;
    file.set_len(payload + (2 << 40)).unwrap();
    assert_eq!(harness::luks::unlock(&path, PASSPHRASE).unwrap().segment.len, 2 << 40);
    file.set_len(payload + (2 << 40) + 512).unwrap();
    let told = harness::luks::unlock(&path, PASSPHRASE).unwrap_err().to_string();
    assert!(told.contains("aes-xts-plain with sectors up to number 4294967296") && told.contains("2 TiB"), "{told}");
    // The keys can still be managed, because they do not depend on the data.
    let store = harness::luks::store(&path);
    luks::read_for_keys(store.as_ref(), &Limits::default()).unwrap();

    // LUKS2 has a field for the IV's first value.
    let sectors = (disk().len() - DATA) as u64 / 512;
    for (first, opens) in [(0, true), ((1 << 32) - sectors, true), ((1 << 32) - sectors + 1, false), (1 << 40, false)] {
        let changes =
            [("/segments/0/encryption", json!("aes-xts-plain")), ("/segments/0/iv_tweak", json!(first.to_string()))];
        let opened = ours(&with_text(disk(), &changed(&changes)));
        assert_eq!(opened.is_ok(), opens, "from {first}: {opened:?}");
    }
}

/// Random changes: both programs open the volume, or neither does.
#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs cryptsetup: run `make test`")]
fn both_agree_on_random_changes_of_the_json() {
    /// Fields for which the programs differ on purpose, or only when cryptsetup activates the volume. See the table above.
    const DIFFERENT: [&str; 11] = [
        "/keyslots/0/area/size",
        "/segments/0/iv_tweak",
        "/segments/0/sector_size",
        "/segments/0/size",
        "/segments/0/type",
        "/segments/0/offset",
        "/segments/0/encryption",
        "/digests/0/digest",
        "/digests/0/salt",
        "/digests/0/hash",
        "/config/json_size",
    ];
    let values = [
        json!(""),
        json!("x"),
        json!("0"),
        json!("1"),
        json!("4096"),
        json!("32768"),
        json!("2097152"),
        json!("2097664"),
        json!("aes-xts-plain"),
        json!(-1),
        json!(0),
        json!(1),
        json!(2),
        json!(64),
        json!(512),
        json!(1000),
        json!(true),
        json!([]),
        json!(["0"]),
        json!(["1"]),
        json!({}),
        json!("dynamic"),
        json!("sha1"),
        json!("00"),
        json!(" 0"),
    ];
    let base = disk();
    let json = json_of(&base);
    let mut pointers = Vec::new();
    collect(&json, String::new(), &mut pointers);
    let bench = Workbench::new();
    let mut random = noise(14);
    let mut pick = |len: usize| {
        let mut bytes = [0; 8];
        random(&mut bytes).unwrap();
        usize::try_from(u64::from_le_bytes(bytes) % len as u64).unwrap()
    };
    let mut wrong = Vec::new();
    for _ in 0..80 {
        let pointer = &pointers[pick(pointers.len())];
        let value = &values[pick(values.len())];
        // cryptsetup takes -1 as four billion iterations.
        if DIFFERENT.contains(&pointer.as_str()) || (pointer.ends_with("iterations") && *value == json!(-1)) {
            continue;
        }
        let mut json = json.clone();
        *json.pointer_mut(pointer).unwrap() = value.clone();
        let disk = with_text(base.clone(), json.to_string().as_bytes());
        let (ours, theirs) = (ours(&disk), theirs(&bench, &disk));
        if ours.is_ok() != theirs.is_ok() {
            wrong.push(format!("{pointer} = {value}: ours {ours:?}, cryptsetup's {theirs:?}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

fn collect(value: &Value, path: String, into: &mut Vec<String>) {
    if let Value::Object(members) = value {
        members.iter().for_each(|(name, member)| collect(member, format!("{path}/{name}"), into));
    }
    if !path.is_empty() {
        into.push(path);
    }
}
