//! Helpers that make LUKS volumes, and that run nbdcrypt, cryptsetup and other programs on them.

use std::io;
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;

use engine::key::{Passphrase, VolumeKey};
use engine::luks::kdf::KdfOptions;
use engine::luks::{self, HashAlgorithm, Limits, LuksError, PendingFormat, UnlockedVolume, luks1, luks2};
use engine::sector::SectorSize;
use engine::store::{Access, BlockStore, Caching, FileStore};
use engine::volume::Volume;
use tempfile::TempDir;

/// The passphrase of every volume that these helpers make.
pub const PASSPHRASE: &[u8] = b"ThisIs-a-SecretPassword";

/// A directory with a key file and room for disk images.
pub struct Workbench {
    dir: TempDir,
}

impl Default for Workbench {
    fn default() -> Self {
        Self::new()
    }
}

impl Workbench {
    /// Makes a new directory with a key file that holds [`PASSPHRASE`].
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("key"), PASSPHRASE).unwrap();
        Self { dir }
    }

    /// Returns a path in the directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Returns the path of the key file.
    pub fn key_file(&self) -> PathBuf {
        self.path("key")
    }

    /// Runs a program in the directory and returns its standard output. Fails the test if the program fails.
    pub fn run<'a>(&self, program: &str, arguments: impl IntoIterator<Item = &'a str>) -> String {
        printed(program, Command::new(program).args(arguments).current_dir(self.dir.path()))
    }

    /// Runs nbdcrypt in the directory and returns its standard output. Fails the test if nbdcrypt fails.
    pub fn nbdcrypt(&self, arguments: &[&str]) -> String {
        let output = self.try_nbdcrypt(arguments);
        assert!(output.status.success(), "{arguments:?}: {}", crate::nbdcrypt::told(&output));
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs nbdcrypt and returns its standard error. Fails the test unless nbdcrypt exits with code 1.
    pub fn refusal(&self, arguments: &[&str]) -> String {
        let output = self.try_nbdcrypt(arguments);
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {}", crate::nbdcrypt::told(&output));
        String::from_utf8(output.stderr).unwrap()
    }

    /// Runs nbdcrypt in the directory. It may fail.
    pub fn try_nbdcrypt(&self, arguments: &[&str]) -> Output {
        let name = crate::nbdcrypt::binary();
        output("nbdcrypt", Command::new(name).args(arguments).current_dir(self.dir.path()))
    }

    /// Returns whether cryptsetup opens a keyslot of `disk` with the key file.
    pub fn cryptsetup_opens(&self, disk: &str, keyslot: &str, key_file: &str) -> bool {
        let arguments = ["open", "--test-passphrase", "--key-slot", keyslot, "--key-file", key_file, disk];
        output("cryptsetup", Command::new("cryptsetup").args(arguments).current_dir(self.dir.path())).status.success()
    }

    /// Checks that cryptsetup has no complaint about the header of `disk`, and returns its dump.
    pub fn accepted_by_cryptsetup(&self, disk: &str) -> String {
        let dump = |options: &[&str]| {
            let arguments = [&["luksDump"], options, &[disk]].concat();
            output("cryptsetup", Command::new("cryptsetup").args(arguments).current_dir(self.dir.path()))
        };
        let debug = dump(&["--debug"]);
        let said = String::from_utf8_lossy(&debug.stdout);
        for complaint in ["ecover", "mismatch", "nvalid", "ailed", "arning", "WARNING"] {
            assert!(!said.contains(complaint), "{complaint}: {said}");
        }
        let plain = dump(&[]);
        assert!(plain.status.success() && plain.stderr.is_empty(), "{}", crate::nbdcrypt::told(&plain));
        String::from_utf8(plain.stdout).unwrap()
    }

    /// Makes a sparse file of `len` bytes and returns its path.
    pub fn disk(&self, name: &str, len: u64) -> PathBuf {
        let path = self.path(name);
        std::fs::File::create(&path).unwrap().set_len(len).unwrap();
        path
    }
}

/// Runs a program and returns its standard output. Fails the test if the program fails.
pub fn run<S: AsRef<std::ffi::OsStr>>(program: &str, arguments: impl IntoIterator<Item = S>) -> String {
    printed(program, Command::new(program).args(arguments))
}

/// Runs a program. Fails the test if the program is not installed.
pub fn try_run<S: AsRef<std::ffi::OsStr>>(program: &str, arguments: impl IntoIterator<Item = S>) -> Output {
    output(program, Command::new(program).args(arguments))
}

fn printed(program: &str, command: &mut Command) -> String {
    let output = output(program, command);
    assert!(output.status.success(), "{program}: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn output(program: &str, command: &mut Command) -> Output {
    command
        .env("LC_ALL", "C")
        .stdin(std::process::Stdio::null())
        .output()
        .unwrap_or_else(|error| panic!("{program} cannot be run: {error}"))
}

/// Opens the disk image as a store.
pub fn store(disk: &Path) -> Arc<dyn BlockStore> {
    Arc::new(FileStore::open(disk, Access::ReadWrite, Caching::PageCache).unwrap())
}

/// Opens the volume in `disk` with `passphrase`.
pub fn unlock(disk: &Path, passphrase: &[u8]) -> Result<UnlockedVolume, LuksError> {
    let store = store(disk);
    luks::read(store.as_ref(), &Limits::default())?.unlock(store.as_ref(), &Passphrase::new(passphrase.to_vec()))
}

/// Opens the volume in `disk` with [`PASSPHRASE`] and returns its plaintext.
pub fn open(disk: &Path) -> Volume {
    let UnlockedVolume { key, segment, .. } = unlock(disk, PASSPHRASE).unwrap();
    Volume::encrypted(store(disk), segment, &key).unwrap()
}

/// Makes a LUKS1 volume in `disk` with the key `key`.
pub fn format_luks1(disk: &Path, hash: HashAlgorithm, key: VolumeKey) {
    begin_luks1(disk, hash, key).commit(store(disk).as_ref()).unwrap();
}

/// Begins to make a LUKS1 volume in `disk` with the key `key`.
pub fn begin_luks1(disk: &Path, hash: HashAlgorithm, key: VolumeKey) -> PendingFormat {
    let passphrase = Passphrase::new(PASSPHRASE.to_vec());
    luks1::begin(store(disk).as_ref(), &quick_luks1(hash), &passphrase, key, &mut noise(1)).unwrap()
}

/// Begins to make a LUKS2 volume on `store` with the key `key`.
pub fn begin_luks2(store: &dyn BlockStore, options: &luks2::Options, key: VolumeKey) -> PendingFormat {
    luks2::begin(store, options, &Passphrase::new(PASSPHRASE.to_vec()), key, &mut noise(2)).unwrap()
}

/// Returns options for LUKS2 with as little work as cryptsetup allows.
pub fn quick_luks2() -> luks2::Options {
    luks2::Options {
        kdf: quick_pbkdf2(HashAlgorithm::Sha256),
        hash: HashAlgorithm::Sha256,
        digest_iterations: NonZeroU32::new(1000).unwrap(),
        sector_size: SectorSize::B4096,
        label: String::new(),
        subsystem: String::new(),
        uuid: UUID.parse().unwrap(),
        layout: luks2::Layout::default(),
        tokens: Vec::new(),
    }
}

/// Returns PBKDF2 with as few iterations as cryptsetup allows.
pub fn quick_pbkdf2(hash: HashAlgorithm) -> KdfOptions {
    KdfOptions::Pbkdf2 { hash, iterations: NonZeroU32::new(1000).unwrap() }
}

/// Returns the volume key, as cryptsetup reads it with the workbench's key file.
pub fn cryptsetup_key(bench: &Workbench, disk: &Path) -> Vec<u8> {
    cryptsetup_key_of(bench, disk, "key")
}

/// Returns the volume key, as cryptsetup reads it with the key file `key_file` of the workbench.
pub fn cryptsetup_key_of(bench: &Workbench, disk: &Path, key_file: &str) -> Vec<u8> {
    let out = bench.path("volume-key");
    let _ = std::fs::remove_file(&out);
    let arguments = ["luksDump", "-q", "--dump-volume-key", "--volume-key-file=volume-key", "--key-file", key_file];
    bench.run("cryptsetup", arguments.into_iter().chain([disk.to_str().unwrap()]));
    std::fs::read(out).unwrap()
}

/// The UUID of every volume that these helpers make.
pub const UUID: &str = "b0a5a5a5-0001-4002-8003-00000000c0de";

/// Returns options for LUKS1 with as few iterations as cryptsetup allows.
pub fn quick_luks1(hash: HashAlgorithm) -> luks1::Options {
    let iterations = NonZeroU32::new(1000).unwrap();
    luks1::Options {
        hash,
        keyslot_iterations: iterations,
        digest_iterations: iterations,
        uuid: UUID.parse().unwrap(),
        data_offset: None,
    }
}

/// Returns a generator of pseudorandom bytes (splitmix64). The same seed gives the same bytes.
pub fn noise(seed: u64) -> impl FnMut(&mut [u8]) -> io::Result<()> {
    let mut state = seed;
    move |data| {
        for piece in data.chunks_mut(8) {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut word = state;
            word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            piece.copy_from_slice(&(word ^ (word >> 31)).to_le_bytes()[..piece.len()]);
        }
        Ok(())
    }
}

/// Makes a key of `len` bytes. It is the same key every time.
pub fn key(len: usize) -> VolumeKey {
    let mut bytes = vec![0; len];
    noise(len as u64)(&mut bytes).unwrap();
    VolumeKey::new(bytes).unwrap()
}

/// Returns the SHA-256 of `bytes`, as the checksum of a header that a test has changed.
pub fn sha256(bytes: &[u8]) -> [u8; 32] {
    use sha2::Digest;
    sha2::Sha256::digest(bytes).into()
}
