//! Repair of damaged LUKS1 headers: the result equals that of `cryptsetup repair` byte for byte, and a power cut at any
//! moment does no harm.

use engine::key::Passphrase;
use engine::luks::luks1::{self, Fix};
use engine::luks::{self, HashAlgorithm, Limits, LuksError, NewKey, Repair};
use engine::store::{BlockStore, MemoryStore};
use harness::luks::{PASSPHRASE, Workbench, key, noise, quick_luks1, quick_pbkdf2};
use harness::recording::RecordingStore;

const CIPHER_MODE: usize = 40;
const HASH: usize = 72;
const NEW: &[u8] = b"another passphrase";

/// Returns the offset of byte `field` of keyslot `number`.
fn keyslot(number: usize, field: usize) -> usize {
    208 + number * 48 + field
}

const ACTIVE: usize = 0;
const ITERATIONS: usize = 4;
const SALT: usize = 8;
const OFFSET: usize = 40;
const STRIPES: usize = 44;

/// Damage to a header, and what the repair reports: nothing if the header cannot be repaired.
struct Damage {
    name: &'static str,
    patches: Vec<(usize, Vec<u8>)>,
    said: &'static [&'static str],
}

impl Damage {
    fn new(name: &'static str, patches: &[(usize, &[u8])], said: &'static [&'static str]) -> Self {
        let patches = patches.iter().map(|(at, bytes)| (*at, bytes.to_vec())).collect();
        Self { name, patches, said }
    }

    fn apply(&self, bytes: &mut [u8]) {
        self.patches.iter().for_each(|(at, patch)| bytes[*at..][..patch.len()].copy_from_slice(patch));
    }
}

/// Returns what a partitioning tool writes to a disk's first sector: a disk number, one entry, the signature.
fn partition_table() -> Vec<(usize, Vec<u8>)> {
    let entry = [0x80, 0x20, 0x21, 0x00, 0x83, 0x8e, 0x0a, 0x14, 0x00, 0x08, 0x00, 0x00, 0x00, 0x38, 0x02, 0x00];
    let mut sector = [0; 512 - 440];
    sector[..4].copy_from_slice(&[0xe7, 0x1d, 0x5f, 0x90]);
    sector[6..22].copy_from_slice(&entry);
    sector[70..].copy_from_slice(&[0x55, 0xaa]);
    vec![(440, sector.to_vec())]
}

/// Returns kinds of damage to a volume whose keyslots 0 and 1 are in use. Both cryptsetup and nbdcrypt repair them.
fn damages() -> Vec<Damage> {
    vec![
        Damage {
            name: "a partition table",
            patches: partition_table(),
            said: &[
                "keyslot 4: the offset of the key material was 3877461904, and is now 2024",
                "keyslot 4: the number of stripes was 32800, and is now 4000",
                "keyslot 4: disabled, and its salt cleared",
                "keyslot 5: the offset of the key material was 0, and is now 2528",
                "keyslot 5: the number of stripes was 0, and is now 4000",
                "keyslot 5: disabled, and its salt cleared",
                "keyslot 6: the salt contained the signature of a partition table",
                "keyslot 6: disabled, and its salt cleared",
            ],
        },
        Damage::new(
            "an offset",
            &[(keyslot(3, OFFSET), &[0, 0, 0, 9])],
            &[
                "keyslot 3: the offset of the key material was 9, and is now 1520",
                "keyslot 3: disabled, and its salt cleared",
            ],
        ),
        Damage::new(
            "stripes, and the rest of a salt",
            &[(keyslot(7, STRIPES), &[0, 0, 0x0f, 0xa1]), (keyslot(7, SALT + 3), &[1, 2, 3])],
            &[
                "keyslot 7: the number of stripes was 4001, and is now 4000",
                "keyslot 7: disabled, and its salt cleared",
            ],
        ),
        Damage::new("a hash in capitals", &[(HASH, b"SHA256")], &["the hash was SHA256, and is now sha256"]),
        Damage::new("nothing", &[], &["the header is intact"]),
        Damage::new("a harmless change", &[(510, &[0x55, 0xaa])], &["the header is intact"]),
        Damage::new("the stripes of a key", &[(keyslot(1, STRIPES), &[0, 0, 0, 1])], &[]),
        Damage::new("the place of a key", &[(keyslot(1, OFFSET), &[0, 0, 0, 1])], &[]),
        Damage::new("a key of another size", &[(108, &[0, 0, 0, 63]), (keyslot(5, STRIPES), &[1])], &[]),
    ]
}

/// nbdcrypt repairs what cryptsetup repairs, to the same bytes. It refuses what cryptsetup does not repair.
#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs cryptsetup: run `make test`")]
fn repair_gives_the_same_bytes_as_cryptsetup_or_refuses() {
    let bench = Workbench::new();
    std::fs::write(bench.path("new"), NEW).unwrap();
    bench.disk("whole", 6 << 20);
    let quick = ["--pbkdf-force-iterations", "1000", "--key-file", "key", "whole"];
    let format = ["luksFormat", "-q", "--type", "luks1", "--key-size", "512", "--hash", "sha256"];
    bench.run("cryptsetup", format.into_iter().chain(quick));
    bench.run("cryptsetup", ["luksAddKey", "-q"].into_iter().chain(quick).chain(["new"]));
    let whole = std::fs::read(bench.path("whole")).unwrap();
    for damage in damages() {
        let name = damage.name;
        let mut broken = whole.clone();
        damage.apply(&mut broken);
        std::fs::write(bench.path("ours"), &broken).unwrap();
        std::fs::write(bench.path("theirs"), &broken).unwrap();
        let theirs = harness::luks::try_run(
            "cryptsetup",
            ["repair".as_ref(), "-q".as_ref(), "--type".as_ref(), "luks1".as_ref(), bench.path("theirs").as_os_str()],
        );
        assert_eq!(theirs.status.success(), !damage.said.is_empty(), "{name}: {}", harness::nbdcrypt::told(&theirs));
        if damage.said.is_empty() {
            let told = bench.refusal(&["header", "repair", "ours"]);
            assert!(told.contains("cannot be repaired") && told.contains("from a backup"), "{name}: {told}");
            assert!(std::fs::read(bench.path("ours")).unwrap() == broken, "{name}");
            continue;
        }
        let said = bench.nbdcrypt(&["header", "repair", "ours"]);
        let expected: String = damage.said.iter().map(|said| format!("ours: {said}\n")).collect();
        assert_eq!(said, expected, "{name}");
        let ours = std::fs::read(bench.path("ours")).unwrap();
        assert!(ours == std::fs::read(bench.path("theirs")).unwrap(), "{name}");
        bench.accepted_by_cryptsetup("ours");
        assert!(bench.cryptsetup_opens("ours", "0", "key") && bench.cryptsetup_opens("ours", "1", "new"), "{name}");
        assert_eq!(bench.nbdcrypt(&["header", "repair", "ours"]), "ours: the header is intact\n", "{name}");
    }
}

/// After the repair cryptsetup opens the keyslot.
#[test]
#[cfg_attr(not(feature = "interop"), ignore = "needs cryptsetup: run `make test`")]
fn a_keyslot_with_only_a_damaged_state_is_enabled_again() {
    let bench = Workbench::new();
    bench.disk("disk", 6 << 20);
    let format =
        ["luksFormat", "-q", "--type", "luks1", "--pbkdf-force-iterations", "1000", "--key-file", "key", "disk"];
    bench.run("cryptsetup", format);
    let mut broken = std::fs::read(bench.path("disk")).unwrap();
    broken[keyslot(0, ACTIVE)] ^= 0x40;
    std::fs::write(bench.path("disk"), &broken).unwrap();
    assert!(!bench.cryptsetup_opens("disk", "0", "key"));
    assert!(bench.nbdcrypt(&["dump", "disk"]).contains("Key Slot 0: DISABLED (damaged: its state is 0x40ac71f3)\n"));
    let told = bench.refusal(&["key", "test", "disk", "--key-file", "key"]);
    assert!(told.contains("the state of keyslot 0") && told.contains("nbdcrypt header repair"), "{told}");
    let said = bench.nbdcrypt(&["header", "repair", "disk"]);
    assert_eq!(
        said,
        "disk: keyslot 0: the state was 0x40ac71f3, and is now enabled, because the keyslot holds a key\n"
    );
    assert!(bench.cryptsetup_opens("disk", "0", "key"));
    bench.accepted_by_cryptsetup("disk");
}

/// Returns a volume with two keys, to which tests apply damage.
fn volume() -> Vec<u8> {
    let store = MemoryStore::zeroed((2 << 20) + 4096);
    let passphrase = Passphrase::new(PASSPHRASE.to_vec());
    let options = quick_luks1(HashAlgorithm::Sha256);
    luks1::begin(&store, &options, &passphrase, key(64), &mut noise(1)).unwrap().commit(&store).unwrap();
    let limits = Limits::default();
    let passphrase = Passphrase::new(NEW.to_vec());
    let kdf = quick_pbkdf2(HashAlgorithm::Sha256);
    let new = NewKey { passphrase: &passphrase, kdf, hash: HashAlgorithm::Sha256 };
    luks::read(&store, &limits).unwrap().add_key(&store, &limits, &key(64), &new, None, &mut noise(2)).unwrap();
    store.snapshot()
}

fn opens(store: &dyn BlockStore, passphrase: &[u8]) -> bool {
    luks::read(store, &Limits::default())
        .and_then(|volume| volume.unlock(store, &Passphrase::new(passphrase.to_vec())))
        .is_ok_and(|unlocked| unlocked.key.expose() == key(64).expose())
}

fn repair(bytes: &[u8]) -> Result<(Vec<u8>, Vec<Fix>), LuksError> {
    let store = MemoryStore::from(bytes.to_vec());
    match luks::repair(&store, &mut noise(3))? {
        Repair::Luks1(fixes) => Ok((store.snapshot(), fixes)),
        Repair::Luks2(_) => panic!("a LUKS1 volume"),
    }
}

#[test]
fn an_interrupted_repair_can_be_repeated() {
    for damage in damages().into_iter().filter(|damage| !damage.said.is_empty()) {
        let name = damage.name;
        let mut broken = volume();
        damage.apply(&mut broken);
        let store = RecordingStore::new(broken, 1);
        luks::repair(&store, &mut noise(3)).unwrap();
        let end = store.snapshot();
        assert!(opens(&MemoryStore::from(end.clone()), PASSPHRASE) && opens(&MemoryStore::from(end.clone()), NEW));
        store.cut_everywhere(&mut |disk| assert!(repair(&disk.snapshot()).unwrap().0 == end, "{name}"));
    }
}

#[test]
fn ecb_loses_its_iv_and_empty_keyslots_are_cleared() {
    let mut broken = volume();
    broken[CIPHER_MODE..CIPHER_MODE + 12].copy_from_slice(b"ecb-plain\0\0\0");
    let (repaired, fixes) = repair(&broken).unwrap();
    assert_eq!(fixes, [Fix::CipherMode { from: "ecb-plain".to_owned() }]);
    assert_eq!(repaired[CIPHER_MODE..CIPHER_MODE + 12], *b"ecb\0\0\0\0\0\0\0\0\0");

    // Without a salt, without iterations, or without key material there is no key.
    for (at, len) in [(keyslot(1, ITERATIONS), 4), (keyslot(1, SALT), 32), (512 * 512 + 1024, 512)] {
        let mut broken = volume();
        broken[keyslot(1, ACTIVE)] = 7;
        broken[at..at + len].fill(0);
        let (repaired, fixes) = repair(&broken).unwrap();
        assert_eq!(fixes, [Fix::Cleared { keyslot: 1 }], "{at}");
        assert!(opens(&MemoryStore::from(repaired.clone()), PASSPHRASE));
        assert!(repaired[keyslot(1, ITERATIONS)..keyslot(1, OFFSET)].iter().all(|byte| *byte == 0));
    }
}

#[test]
fn only_luks1_headers_are_repaired() {
    for (bytes, words) in [(vec![0; 4096], "no LUKS header"), (vec![0; 100], "no LUKS header")] {
        let told = repair(&bytes).unwrap_err().to_string();
        assert!(told.contains(words), "{told}");
    }
    // An old layout, for which the correct offsets of the keyslots are unknown.
    let mut old = volume();
    old[keyslot(0, OFFSET)..][..4].copy_from_slice(&[0, 0, 0, 2]);
    old[keyslot(1, OFFSET)..][..4].copy_from_slice(&[0, 0, 1, 0xf6]);
    old[keyslot(5, STRIPES)] = 1;
    let told = repair(&old).unwrap_err();
    assert!(matches!(&told, LuksError::BeyondRepair { field, .. } if field.contains("keyslot 0")), "{told}");
}
