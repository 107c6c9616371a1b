//! LUKS1 headers with false fields. Each is refused in bounded time with an error that names the field, and none causes a
//! panic.

use std::num::NonZeroU32;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use engine::key::{Passphrase, VolumeKey};
use engine::luks::{self, HashAlgorithm, KeyslotFault, Limits, LuksError, luks1};
use engine::signature::probe;
use engine::store::{BlockStore, MemoryStore};
use harness::luks::{PASSPHRASE, key, noise, quick_luks1};
use proptest::prelude::*;

/// Offsets of the header's fields (specification, section 3.1).
const CIPHER_MODE: usize = 40;
const HASH_SPEC: usize = 72;
const PAYLOAD_OFFSET: usize = 104;
const KEY_BYTES: usize = 108;
const DIGEST_ITERATIONS: usize = 164;
const KEYSLOTS: usize = 208;
const KEYSLOT_LEN: usize = 48;
const ITERATIONS: usize = 4;
const MATERIAL_OFFSET: usize = 40;
const STRIPES: usize = 44;

const DISK: usize = (2 << 20) + 4096;

fn disk() -> Vec<u8> {
    static DISK_IMAGE: LazyLock<Vec<u8>> = LazyLock::new(format);
    DISK_IMAGE.clone()
}

fn format() -> Vec<u8> {
    let store = MemoryStore::zeroed(DISK);
    let passphrase = Passphrase::new(PASSPHRASE.to_vec());
    let options = quick_luks1(HashAlgorithm::Sha256);
    let pending = luks1::begin(&store, &options, &passphrase, key(VolumeKey::AES_256), &mut noise(3)).unwrap();
    pending.commit(&store).unwrap();
    store.snapshot()
}

fn open(disk: Vec<u8>) -> Result<luks::UnlockedVolume, LuksError> {
    let store = MemoryStore::from(disk);
    luks::read(&store, &Limits::default())?.unlock(&store, &Passphrase::new(PASSPHRASE.to_vec()))
}

fn with(at: usize, bytes: &[u8]) -> Vec<u8> {
    let mut disk = disk();
    disk[at..at + bytes.len()].copy_from_slice(bytes);
    disk
}

fn slot(index: usize, field: usize) -> usize {
    KEYSLOTS + index * KEYSLOT_LEN + field
}

#[test]
fn an_error_names_the_field_and_its_value() {
    let be = u32::to_be_bytes;
    let cases: [(usize, &[u8], &str); 19] = [
        (0, b"LUKS\xba\xbf", "no LUKS header"),
        (6, &[0, 3], "LUKS version 3"),
        (8, &[0], "cipher-name is \"\""),
        (8, &[b'a'; 32], "cipher-name is \"aaaa"),
        (CIPHER_MODE, b"xts-\n", "cipher-mode is \"xts-\\nlain64\""),
        (HASH_SPEC, b"md5\0", "the hash md5"),
        (PAYLOAD_OFFSET, &be(1), "payload-offset is 1, within the header"),
        (PAYLOAD_OFFSET, &be(600), "key-material-offset of keyslot 1 is sector 512, so its 500 sectors reach into"),
        (PAYLOAD_OFFSET, &be(0), "detached header"),
        (PAYLOAD_OFFSET, &be(u32::MAX), "needs at least 2199023255552"),
        (KEY_BYTES, &be(0), "key-bytes is 0"),
        (KEY_BYTES, &be(u32::MAX), "key-bytes is 4294967295"),
        (KEY_BYTES, &be(48), "the cipher aes-xts-plain64 with a key of 384 bits"),
        (DIGEST_ITERATIONS, &be(0), "mk-digest-iter is 0"),
        (slot(0, 0), &be(1), "the state of keyslot 0 is damaged: 0x00000001"),
        (
            slot(0, ITERATIONS),
            &be(u32::MAX),
            "4294967295 iterations in iterations of keyslot 0, but the limit is 100000000",
        ),
        (slot(0, ITERATIONS), &be(0), "keyslot 0 is damaged: it has 0 iterations"),
        (slot(2, MATERIAL_OFFSET), &be(0), "key-material-offset of keyslot 2 is sector 0, within the header"),
        (slot(3, STRIPES), &be(u32::MAX), "stripes of keyslot 3 is 4294967295"),
    ];
    for (at, bytes, expected) in cases {
        let error = open(with(at, bytes)).unwrap_err().to_string();
        assert!(error.contains(expected), "byte {at} set to {bytes:?}: {error}");
    }
    let error = open(with(slot(5, MATERIAL_OFFSET), &be(900))).unwrap_err().to_string();
    assert!(error.contains("key-material-offset of keyslot 5 is sector 900, within keyslot 1"), "{error}");
}

#[test]
fn a_limit_can_be_raised() {
    let store = MemoryStore::from(with(slot(0, ITERATIONS), &100_000_001u32.to_be_bytes()));
    let refused = luks::read(&store, &Limits::default()).unwrap_err();
    assert!(matches!(refused, LuksError::TooManyIterations { found: 100_000_001, limit: 100_000_000, .. }));
    luks::read(&store, &Limits { iterations: NonZeroU32::MAX, ..Limits::default() }).unwrap();
}

#[test]
fn overwritten_key_material_is_reported_as_damage() {
    let wrong = |disk: Vec<u8>| {
        let store = MemoryStore::from(disk);
        let volume = luks::read(&store, &Limits::default()).unwrap();
        volume.unlock(&store, &Passphrase::new(b"wrong".to_vec())).unwrap_err()
    };
    assert!(matches!(wrong(disk()), LuksError::WrongPassphrase));
    for overwritten in [4096, 4096 + 512 * 77, 4096 + 512 * 499] {
        let disk = with(overwritten, &[0; 512]);
        let sector = overwritten as u64 / 512;
        let is_damage = |error| match error {
            LuksError::Keyslot { keyslot: 0, fault: KeyslotFault::Overwritten { sector: at }, .. } => at == sector,
            _ => false,
        };
        assert!(is_damage(wrong(disk.clone())));
        assert!(is_damage(open(disk).unwrap_err()), "reported as damage, not as a wrong passphrase");
    }
    assert!(matches!(wrong(with(slot(0, 0), &0xdead_u32.to_be_bytes())), LuksError::NoKeyslot));
}

#[test]
fn a_header_without_its_disk_is_refused() {
    let disk = disk();
    for len in [0, 8, 511, 512, 592, 1023, 1024, 4096, 1 << 20, 2 << 20, (2 << 20) + 511] {
        let result = open(disk[..len].to_vec());
        assert!(matches!(result, Err(LuksError::NotLuks | LuksError::TooSmall { .. })), "{len}: {result:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn no_mutated_header_hangs_or_panics(
        changes in proptest::collection::vec((0usize..592, any::<[u8; 4]>()), 1..6),
        len in 0usize..=DISK,
    ) {
        let mut disk = disk();
        for (at, bytes) in &changes {
            disk[*at..at + 4].copy_from_slice(bytes);
        }
        // In half of the cases the disk is cut off.
        disk.truncate(if len % 2 == 0 { DISK } else { len });
        let store = MemoryStore::from(disk);
        let started = Instant::now();
        let limits = Limits { iterations: NonZeroU32::new(5000).unwrap(), ..Limits::default() };
        let passphrase = Passphrase::new(PASSPHRASE.to_vec());
        let _ = luks::read(&store, &limits).and_then(|volume| volume.unlock(&store, &passphrase));
        let _ = luks::dump(&store).map(|dump| dump.display("it"));
        probe(&store as &dyn BlockStore).unwrap();
        prop_assert!(started.elapsed() < Duration::from_secs(60));
    }

    #[test]
    fn a_header_is_written_as_it_was_read(bytes in proptest::collection::vec(any::<u8>(), 0..1024)) {
        if let Ok(header) = luks1::Header::parse(&bytes) {
            prop_assert_eq!(luks1::Header::parse(&header.to_bytes()).unwrap(), header);
        }
        let mut disk = disk();
        let header = luks1::Header::parse(&disk).unwrap();
        prop_assert_eq!(&header.to_bytes()[..], &disk[..592]);
        // The bytes follow a valid start of a header, so that more than the magic is parsed.
        disk[8..8 + bytes.len().min(584)].copy_from_slice(&bytes[..bytes.len().min(584)]);
        let _ = luks1::Header::parse(&disk);
    }
}
