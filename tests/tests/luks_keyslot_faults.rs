//! Keyslots that cannot be tried. The other keyslots still open. An error about a named keyslot says nothing about
//! other keyslots.

use std::io;
use std::num::NonZeroU32;

use engine::key::{Passphrase, VolumeKey};
use engine::luks::{
    self, FormatOptions, HashAlgorithm, KeyslotFault, Limits, LockedVolume, LuksError, NewKey, Others, kdf,
};
use engine::sector::{Lba512, SectorSize};
use engine::store::{BlockStore, FaultyStore, MemoryStore, Operation};
use engine::xts::Xts;
use harness::luks::{PASSPHRASE, key, noise, quick_luks1, quick_luks2, quick_pbkdf2};

const SECOND: &[u8] = b"another passphrase";

/// Makes a volume of each format with two keyslots. Returns it with the offset of the first keyslot's key material.
fn volumes() -> Vec<(Vec<u8>, usize)> {
    let mut luks2 = quick_luks2();
    luks2.layout.keyslots_size = Some(1 << 20);
    let options = [FormatOptions::Luks1(quick_luks1(HashAlgorithm::Sha256)), FormatOptions::Luks2(Box::new(luks2))];
    let volume = |options: FormatOptions| {
        let store = MemoryStore::zeroed((2 << 20) + 65536);
        let first = Passphrase::new(PASSPHRASE.to_vec());
        options.begin(&store, &first, key(64), &mut noise(1)).unwrap().commit(&store).unwrap();
        let second = Passphrase::new(SECOND.to_vec());
        let hash = HashAlgorithm::Sha256;
        let new = NewKey { passphrase: &second, kdf: quick_pbkdf2(hash), hash };
        read(&store).add_key(&store, &Limits::default(), &key(64), &new, None, &mut noise(2)).unwrap();
        store.snapshot()
    };
    options.map(volume).into_iter().zip([4096, 32768]).collect()
}

fn read(store: &dyn BlockStore) -> LockedVolume {
    luks::read(store, &Limits::default()).unwrap()
}

fn unlock(store: &dyn BlockStore, passphrase: &[u8], keyslot: Option<usize>) -> Result<usize, LuksError> {
    let passphrase = Passphrase::new(passphrase.to_vec());
    let volume = read(store);
    volume.unlock_keyslot(store, keyslot, &passphrase).map(|unlocked| unlocked.keyslot)
}

/// Returns the keyslot that an error names, the sector that was overwritten (`None` if the keyslot cannot be read), and what is
/// known about the other keyslots.
fn fault_of(error: &LuksError) -> (usize, Option<u64>, Others) {
    match error {
        LuksError::Keyslot { keyslot, fault: KeyslotFault::Overwritten { sector }, others } => {
            (*keyslot, Some(*sector), *others)
        }
        LuksError::Keyslot { keyslot, fault: KeyslotFault::Unreadable(_), others } => (*keyslot, None, *others),
        other => panic!("{other}"),
    }
}

/// Returns a disk that cannot read the sectors of the first keyslot's key material.
fn unreadable(bytes: Vec<u8>, material: usize) -> FaultyStore<MemoryStore> {
    let bad = material as u64 + 1024;
    FaultyStore::new(MemoryStore::from(bytes), move |operation| match operation {
        Operation::Read(offset, len) if (offset..offset + len).contains(&bad) => Some(io::ErrorKind::Other),
        _ => None,
    })
}

#[test]
fn the_error_for_a_named_keyslot_is_about_that_keyslot() {
    for (mut bytes, material) in volumes() {
        bytes[material + 1024..material + 1536].fill(0);
        let sector = material as u64 / 512 + 2;
        let store = MemoryStore::from(bytes.clone());
        assert_eq!(unlock(&store, SECOND, None).unwrap(), 1);
        assert_eq!(unlock(&store, SECOND, Some(1)).unwrap(), 1);
        let error = unlock(&store, SECOND, Some(0)).unwrap_err();
        assert_eq!(fault_of(&error), (0, Some(sector), Others::Untried), "{error}");
        let said = error.to_string();
        assert!(said.contains("keyslot 0 is damaged") && said.contains("no other keyslot was tried"), "{said}");
        // The passphrase does open another keyslot.
        assert!(!said.contains("no other keyslot opens"), "{said}");
        let error = unlock(&store, b"wrong", None).unwrap_err();
        assert_eq!(fault_of(&error), (0, Some(sector), Others::DoNotOpen), "{error}");
        assert!(error.to_string().contains("no other keyslot opens"), "{error}");
        assert!(matches!(unlock(&store, b"wrong", Some(1)), Err(LuksError::WrongPassphraseFor(1))));
        assert!(matches!(unlock(&store, SECOND, Some(2)), Err(LuksError::NoSuchKeyslot(2))));
    }
}

#[test]
fn an_unreadable_keyslot_does_not_prevent_another_from_opening() {
    for (bytes, material) in volumes() {
        let store = unreadable(bytes, material);
        assert_eq!(unlock(&store, SECOND, None).unwrap(), 1);
        for passphrase in [PASSPHRASE, b"wrong"] {
            let error = unlock(&store, passphrase, None).unwrap_err();
            assert_eq!(fault_of(&error), (0, None, Others::DoNotOpen), "{error}");
            assert!(error.to_string().contains("keyslot 0 cannot be read"), "{error}");
        }
        let error = unlock(&store, PASSPHRASE, Some(0)).unwrap_err();
        assert!(error.to_string().contains("keyslot 0 cannot be read"), "{error}");
        assert_eq!(fault_of(&error), (0, None, Others::Untried), "{error}");
        // The second keyslot is the only one that can be read, so its key is kept.
        let remove = |keyslot, force| read(&store).remove_key(&store, keyslot, force, &mut noise(3));
        assert!(matches!(remove(1, false), Err(LuksError::LastKeyslot(1))));
        remove(0, false).unwrap();
        assert_eq!(unlock(&store, SECOND, None).unwrap(), 1);
    }
}

/// If a keyslot's key material has a sector of zeros, by chance or because of a hostile source of randomness, the keyslot
/// still opens.
#[test]
fn correct_key_material_opens_even_if_it_looks_damaged() {
    let mut luks2 = quick_luks2();
    luks2.layout.keyslots_size = Some(1 << 20);
    let options = [FormatOptions::Luks1(quick_luks1(HashAlgorithm::Sha256)), FormatOptions::Luks2(Box::new(luks2))];
    for (options, material) in options.into_iter().zip([4096, 32768]) {
        let store = MemoryStore::zeroed((2 << 20) + 65536);
        let passphrase = Passphrase::new(PASSPHRASE.to_vec());
        let (mut random, mut salt) = (noise(1), Vec::new());
        // The first random bytes are the keyslot's salt. The long run of bytes is for splitting the key.
        let mut random = |bytes: &mut [u8]| {
            random(bytes)?;
            if salt.is_empty() {
                salt = bytes.to_vec();
            }
            if bytes.len() == 64 * 3999 {
                let slot_key =
                    kdf::pbkdf2(HashAlgorithm::Sha256, PASSPHRASE, &salt, NonZeroU32::new(1000).unwrap(), 64);
                let zeros = &mut bytes[1024..1536];
                zeros.fill(0);
                Xts::new(&VolumeKey::new(slot_key.to_vec()).unwrap()).decrypt(SectorSize::B512, Lba512(2), zeros);
            }
            Ok(())
        };
        options.begin(&store, &passphrase, key(64), &mut random).unwrap().commit(&store).unwrap();
        assert!(store.snapshot()[material + 1024..material + 1536].iter().all(|byte| *byte == 0));
        assert_eq!(unlock(&store, PASSPHRASE, None).unwrap(), 0);
        assert_eq!(unlock(&store, PASSPHRASE, Some(0)).unwrap(), 0);
        // For a wrong passphrase, the keyslot is still reported as damaged.
        let error = unlock(&store, b"wrong", None).unwrap_err();
        assert!(matches!(fault_of(&error), (0, Some(_), Others::DoNotOpen)), "{error}");
    }
}
