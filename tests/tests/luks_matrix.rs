//! Every kind of LUKS volume in both directions: the engine opens what cryptsetup makes, and cryptsetup opens what the
//! engine makes. Both add keyslots. Each of the two removes and changes keys, imports tokens, and repairs headers on
//! volumes that the other made. The matrix covers each format, key derivation, sector size and key size, headers
//! attached and detached, and 1 to 8 keyslots. `kernel/dm_crypt` checks that the data is the same.

use std::num::NonZeroU32;
use std::path::PathBuf;

use engine::key::{Passphrase, VolumeKey};
use engine::luks::kdf::{Argon2Cost, KdfOptions};
use engine::luks::{self, Disks, FormatOptions, HashAlgorithm, Limits, LuksError, NewKey, UnlockedVolume};
use engine::sector::SectorSize;
use harness::luks::{PASSPHRASE, Workbench, key, noise, quick_luks1, quick_luks2, store};

const MIB: u64 = 1 << 20;
const KEYSLOTS: usize = 8;
const OTHER: &[u8] = b"another passphrase";
const TOKEN: &str = r#"{"type":"unknown","keyslots":["0","7"],"more":[1,{"deep":null}]}"#;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kdf {
    Pbkdf2(HashAlgorithm),
    Argon2i,
    Argon2id,
}

impl Kdf {
    /// Returns options with little work, and the hash for the rest of the keyslot.
    fn options(self) -> (KdfOptions, HashAlgorithm) {
        let cost = Argon2Cost { time: 4, memory: 256, lanes: 2 };
        match self {
            Self::Pbkdf2(hash) => (KdfOptions::Pbkdf2 { hash, iterations: NonZeroU32::new(1000).unwrap() }, hash),
            Self::Argon2i => (KdfOptions::Argon2i(cost), HashAlgorithm::Sha256),
            Self::Argon2id => (KdfOptions::Argon2id(cost), HashAlgorithm::Sha256),
        }
    }
}

/// One volume of the matrix.
#[derive(Clone, Copy, Debug)]
struct Cell {
    luks1: bool,
    kdf: Kdf,
    sector: SectorSize,
    key_len: usize,
    detached: bool,
}

/// Returns all volumes with this format and key derivation.
fn cells(luks1: bool, kdf: Kdf) -> Vec<Cell> {
    let sectors: &[SectorSize] = if luks1 { &[SectorSize::B512] } else { &[SectorSize::B512, SectorSize::B4096] };
    let mut cells = Vec::new();
    for &sector in sectors {
        for key_len in [VolumeKey::AES_256, VolumeKey::AES_128] {
            cells.extend([false, true].map(|detached| Cell { luks1, kdf, sector, key_len, detached }));
        }
    }
    cells
}

/// A disk for one volume, and its key files.
struct Stage {
    bench: Workbench,
    cell: Cell,
    disk: PathBuf,
    header: PathBuf,
}

impl Stage {
    fn new(cell: Cell) -> Self {
        let bench = Workbench::new();
        for slot in 1..KEYSLOTS {
            std::fs::write(bench.path(&format!("key{slot}")), passphrase(slot)).unwrap();
        }
        std::fs::write(bench.path("key0"), passphrase(0)).unwrap();
        std::fs::write(bench.path("other"), OTHER).unwrap();
        std::fs::write(bench.path("token"), TOKEN).unwrap();
        let disk = bench.disk("disk", 20 * MIB);
        let header = if cell.detached { bench.path("header") } else { disk.clone() };
        Self { bench, cell, disk, header }
    }

    /// Runs cryptsetup on the header. If it makes a keyslot, the key derivation is quick.
    fn cryptsetup(&self, arguments: &[&str]) -> String {
        self.bench.run("cryptsetup", arguments.iter().copied())
    }

    fn quick(&self) -> Vec<&'static str> {
        let mut quick = match self.cell.kdf {
            Kdf::Pbkdf2(hash) => vec!["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", "--hash", hash.name()],
            Kdf::Argon2i => vec!["--pbkdf", "argon2i"],
            Kdf::Argon2id => vec!["--pbkdf", "argon2id"],
        };
        if !matches!(self.cell.kdf, Kdf::Pbkdf2(_)) {
            quick.extend(["--pbkdf-force-iterations", "4", "--pbkdf-memory", "256", "--pbkdf-parallel", "2"]);
        }
        quick
    }

    fn luks_format(&self) {
        let key_bits = (self.cell.key_len * 8).to_string();
        let sector = self.cell.sector.to_string();
        let mut all = vec!["luksFormat", "-q", "--key-file", "key0", "--key-size", &key_bits];
        all.extend(["--type", if self.cell.luks1 { "luks1" } else { "luks2" }]);
        all.extend(self.quick());
        if !self.cell.luks1 {
            all.extend(["--sector-size", &sector]);
        }
        if self.cell.detached {
            all.extend(["--header", "header"]);
        }
        all.push("disk");
        self.cryptsetup(&all);
    }

    /// Formats the volume as `nbdcrypt format` does.
    fn format(&self) {
        let Cell { luks1, kdf, sector, key_len, .. } = self.cell;
        let (kdf, hash) = kdf.options();
        let options = if luks1 {
            FormatOptions::Luks1(quick_luks1(hash))
        } else {
            let mut options = quick_luks2();
            (options.kdf, options.hash, options.sector_size) = (kdf, hash, sector);
            (options.label, options.subsystem) = ("a label".to_owned(), "a subsystem".to_owned());
            FormatOptions::Luks2(Box::new(options))
        };
        if self.cell.detached {
            self.bench.disk("header", options.header_len(key_len));
        }
        self.with_disks(|disks| {
            let pending = options.begin(disks, &Passphrase::new(passphrase(0)), key(key_len), &mut noise(5)).unwrap();
            pending.commit(disks).unwrap();
        });
    }

    fn with_disks<T>(&self, then: impl FnOnce(Disks<'_>) -> T) -> T {
        let (header, data) = (store(&self.header), store(&self.disk));
        if self.cell.detached {
            then(Disks::detached(header.as_ref(), data.as_ref()))
        } else {
            then(data.as_ref().into())
        }
    }

    /// Adds one keyslot: every second one with nbdcrypt, the others with cryptsetup.
    fn add_key(&self, slot: usize) {
        if slot % 2 == 1 {
            return self.add_key_of_ours(slot);
        }
        let new = format!("key{slot}");
        self.cryptsetup(
            &[&["luksAddKey", "-q", "--key-file", "key0"], &self.quick()[..], &[self.header_name(), &new]].concat(),
        );
    }

    /// Adds a keyslot as `nbdcrypt key add` does.
    fn add_key_of_ours(&self, slot: usize) {
        let (store, limits) = (store(&self.header), Limits::default());
        let volume = luks::read_for_keys(store.as_ref(), &limits).unwrap();
        let unlocked = volume.unlock(store.as_ref(), &Passphrase::new(passphrase(0))).unwrap();
        let (kdf, hash) = self.cell.kdf.options();
        let passphrase = Passphrase::new(passphrase(slot));
        let new = NewKey { passphrase: &passphrase, kdf, hash };
        let added = volume.add_key(store.as_ref(), &limits, &unlocked.key, &new, None, &mut noise(slot as u64));
        assert_eq!(added.unwrap(), slot, "{:?}", self.cell);
    }

    fn header_name(&self) -> &'static str {
        if self.cell.detached { "header" } else { "disk" }
    }

    fn unlock(&self, passphrase: Vec<u8>) -> Result<UnlockedVolume, LuksError> {
        self.with_disks(|disks| {
            luks::read(disks, &Limits::default())?.unlock(disks.header(), &Passphrase::new(passphrase))
        })
    }

    /// Checks that each of the first `slots` passphrases opens exactly its own keyslot, with nbdcrypt and with cryptsetup.
    fn assert_opens(&self, slots: usize, expected: &[u8]) {
        let Cell { sector, key_len, detached, luks1, .. } = self.cell;
        for slot in 0..slots {
            let unlocked = self.unlock(passphrase(slot)).unwrap_or_else(|error| panic!("{:?}: {error}", self.cell));
            assert_eq!(unlocked.keyslot, slot, "{:?}", self.cell);
            assert_eq!(unlocked.key.expose(), expected, "{:?}", self.cell);
            assert_eq!((unlocked.key.bits() / 8, unlocked.segment.sector_size), (key_len, sector));
            let offset = match (detached, luks1, key_len) {
                (true, ..) => 0,
                (false, true, VolumeKey::AES_256) => 2 * MIB,
                // Keyslots of 128 KiB: rounded up, this is 2 MiB too.
                (false, true, _) => 2 * MIB,
                (false, false, _) => 16 * MIB,
            };
            assert_eq!((unlocked.segment.offset, unlocked.segment.len), (offset, 20 * MIB - offset), "{:?}", self.cell);
        }
        let wrong = self.unlock(passphrase(slots)).unwrap_err();
        assert!(matches!(wrong, LuksError::WrongPassphrase), "{:?}: {wrong}", self.cell);
    }

    /// Damages the header as a faulty disk or partitioning tool might: an unused LUKS1 keyslot gets impossible values, or
    /// the first LUKS2 header is broken.
    fn damage(&self, unused: u64) {
        let place = if self.cell.luks1 { 208 + unused * 48 + 44 } else { 4096 + 100 };
        let disk = store(&self.header);
        disk.write_at(&[0xff; 3], place).unwrap();
        if self.cell.luks1 {
            let error = self.unlock(passphrase(0)).unwrap_err();
            assert!(matches!(error, LuksError::Corrupt { .. }), "{:?}: {error}", self.cell);
        }
    }

    /// Checks that keyslot 3 is cleared, keyslot 5 has another key, the token is there, and cryptsetup has no complaint.
    fn assert_managed(&self, expected: &[u8]) {
        self.bench.accepted_by_cryptsetup(self.header_name());
        for slot in 0..KEYSLOTS {
            let opens = !matches!(slot, 3 | 5);
            let unlocked = self.unlock(passphrase(slot));
            assert_eq!(
                unlocked.is_ok_and(|it| it.keyslot == slot && it.key.expose() == expected),
                opens,
                "{:?}",
                self.cell
            );
            let number = slot.to_string();
            let theirs = self.bench.cryptsetup_opens(self.header_name(), &number, &format!("key{slot}"));
            assert_eq!(theirs, opens, "{:?}, keyslot {slot}", self.cell);
        }
        let changed = self.unlock(OTHER.to_vec()).unwrap();
        assert_eq!(changed.key.expose(), expected);
        assert!(self.bench.cryptsetup_opens(self.header_name(), &changed.keyslot.to_string(), "other"));
        if !self.cell.luks1 {
            let token = self.cryptsetup(&["token", "export", "--token-id", "0", self.header_name()]);
            let json = |text: &str| serde_json::from_str::<serde_json::Value>(text).unwrap();
            assert_eq!(json(&token), json(TOKEN));
            let ours = self.bench.nbdcrypt(&["token", "export", "--token-id", "0", self.header_name()]);
            assert_eq!(json(&ours), json(TOKEN));
        }
    }

    fn cryptsetup_key(&self) -> Vec<u8> {
        harness::luks::cryptsetup_key_of(&self.bench, &self.header, "key0")
    }
}

/// Returns the passphrase of a keyslot.
fn passphrase(slot: usize) -> Vec<u8> {
    [PASSPHRASE, slot.to_string().as_bytes()].concat()
}

fn theirs(luks1: bool, kdf: Kdf) {
    for cell in cells(luks1, kdf) {
        let stage = Stage::new(cell);
        stage.luks_format();
        let expected = stage.cryptsetup_key();
        stage.assert_opens(1, &expected);
        for slot in 1..KEYSLOTS {
            stage.add_key(slot);
            stage.unlock(passphrase(slot)).unwrap();
        }
        stage.assert_opens(KEYSLOTS, &expected);
        let header = stage.header_name();
        stage.bench.nbdcrypt(&["key", "remove", header, "--key-slot", "3", "-d", "key0"]);
        stage.damage(3);
        stage.bench.nbdcrypt(&["header", "repair", header]);
        let change = ["key", "change", header, "--key-slot", "5", "--key-file", "key5", "--new-key-file", "other"];
        stage.bench.nbdcrypt(&[&change[..], &stage.quick()].concat());
        if !cell.luks1 {
            stage.bench.nbdcrypt(&["token", "import", header, "--json-file", "token"]);
        }
        stage.assert_managed(&expected);
    }
}

fn ours(luks1: bool, kdf: Kdf) {
    for cell in cells(luks1, kdf) {
        let stage = Stage::new(cell);
        stage.format();
        let header = stage.header_name();
        let said = stage.cryptsetup(&["luksDump", "--debug", header]);
        for complaint in ["ecover", "mismatch", "nvalid", "ailed", "arning", "WARNING"] {
            assert!(!said.contains(complaint), "{cell:?}, {complaint}: {said}");
        }
        let ours = stage.with_disks(|disks| luks::dump(disks.header()).unwrap().display(header));
        let own = |line: &&str| !line.trim_start().to_lowercase().starts_with("encryption:");
        let dumped = stage.cryptsetup(&["luksDump", header]);
        assert_eq!(ours.lines().filter(own).collect::<Vec<_>>(), dumped.lines().collect::<Vec<_>>(), "{cell:?}");
        assert_eq!(stage.cryptsetup_key(), key(cell.key_len).expose());
        for slot in 0..KEYSLOTS {
            if slot > 0 {
                stage.add_key(slot);
            }
            let name = format!("key{slot}");
            stage.cryptsetup(&["open", "--test-passphrase", "--key-file", &name, header]);
        }
        stage.assert_opens(KEYSLOTS, key(cell.key_len).expose());
        // cryptsetup repair finds nothing to do and changes nothing.
        let before = std::fs::read(&stage.header).unwrap();
        stage.cryptsetup(&["repair", "-q", header]);
        assert!(std::fs::read(&stage.header).unwrap() == before, "{cell:?}");
        stage.cryptsetup(&["luksKillSlot", "-q", "--key-file", "key0", header, "3"]);
        stage.damage(3);
        stage.cryptsetup(&["repair", "-q", header]);
        let change = ["luksChangeKey", "-q", "--key-slot", "5", "--key-file", "key5"];
        stage.cryptsetup(&[&change[..], &stage.quick(), &[header, "other"]].concat());
        if !cell.luks1 {
            stage.cryptsetup(&["token", "import", "--json-file", "token", header]);
        }
        stage.assert_managed(key(cell.key_len).expose());
    }
}

/// Makes one test for each format, key derivation and direction, so that they run in parallel.
macro_rules! matrix {
    ($($luks1:literal $kdf:expr => $theirs:ident, $ours:ident;)*) => {$(
        #[test]
        #[cfg_attr(not(feature = "interop"), ignore = "needs cryptsetup: run `make test`")]
        fn $theirs() {
            theirs($luks1, $kdf);
        }

        #[test]
        #[cfg_attr(not(feature = "interop"), ignore = "needs cryptsetup: run `make test`")]
        fn $ours() {
            ours($luks1, $kdf);
        }
    )*};
}

matrix! {
    true Kdf::Pbkdf2(HashAlgorithm::Sha1) => luks1_with_sha1_of_cryptsetups, luks1_with_sha1_of_ours;
    true Kdf::Pbkdf2(HashAlgorithm::Sha256) => luks1_with_sha256_of_cryptsetups, luks1_with_sha256_of_ours;
    true Kdf::Pbkdf2(HashAlgorithm::Sha512) => luks1_with_sha512_of_cryptsetups, luks1_with_sha512_of_ours;
    false Kdf::Pbkdf2(HashAlgorithm::Sha1) => luks2_with_sha1_of_cryptsetups, luks2_with_sha1_of_ours;
    false Kdf::Pbkdf2(HashAlgorithm::Sha256) => luks2_with_sha256_of_cryptsetups, luks2_with_sha256_of_ours;
    false Kdf::Pbkdf2(HashAlgorithm::Sha512) => luks2_with_sha512_of_cryptsetups, luks2_with_sha512_of_ours;
    false Kdf::Argon2i => luks2_with_argon2i_of_cryptsetups, luks2_with_argon2i_of_ours;
    false Kdf::Argon2id => luks2_with_argon2id_of_cryptsetups, luks2_with_argon2id_of_ours;
}
