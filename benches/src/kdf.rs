//! `nbdcrypt-bench kdf`: compares opening a LUKS2 volume with cryptsetup. Both open the same header with the same
//! passphrase, in turns. Fails if nbdcrypt misses a bar, which is a target of this project. Needs cryptsetup, but not
//! the device mapper.

use std::fs::File;
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use engine::key::{Passphrase, VolumeKey};
use engine::luks::kdf::{Argon2Cost, KdfOptions};
use engine::luks::{self, FormatOptions, HashAlgorithm, Limits, kdf, luks2};
use engine::sector::SectorSize;
use engine::store::{Access, Caching, FileStore};

const PASSPHRASE: &[u8] = b"not a secret";

/// Compare opening a LUKS2 volume with cryptsetup.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// How many turns each program takes; its best turn counts.
    #[arg(long, default_value_t = 7)]
    rounds: usize,
    /// The directory in which the volumes are made.
    #[arg(long, default_value_os_t = std::env::temp_dir())]
    dir: PathBuf,
}

/// A key derivation and its bar: the largest allowed ratio of nbdcrypt's time to cryptsetup's.
struct Case {
    name: &'static str,
    kdf: KdfOptions,
    bar: f64,
}

/// Measures each key derivation and prints the table.
///
/// # Errors
/// Fails if a bar is missed, a volume cannot be made or opened, or cryptsetup cannot be run.
pub fn run(args: &Args) -> Result<()> {
    let argon2 = |time, memory, lanes| KdfOptions::Argon2id(Argon2Cost { time, memory, lanes });
    let million = NonZeroU32::MIN.saturating_add(999_999);
    let pbkdf2 = |hash| KdfOptions::Pbkdf2 { hash, iterations: million };
    let cases = [
        Case { name: "argon2id, 1 GiB, 4 lanes, 4 passes", kdf: argon2(4, 1 << 20, 4), bar: 1.3 },
        Case { name: "argon2id, 64 MiB, 1 lane, 4 passes", kdf: argon2(4, 64 << 10, 1), bar: 1.3 },
        Case { name: "pbkdf2-sha256, 1000000 iterations", kdf: pbkdf2(HashAlgorithm::Sha256), bar: 1.2 },
        Case { name: "pbkdf2-sha512, 1000000 iterations", kdf: pbkdf2(HashAlgorithm::Sha512), bar: 1.2 },
        Case { name: "pbkdf2-sha1, 1000000 iterations", kdf: pbkdf2(HashAlgorithm::Sha1), bar: 1.2 },
    ];
    println!("| key derivation | nbdcrypt | cryptsetup | ratio | at most |\n|---|---|---|---|---|");
    let mut missed = Vec::new();
    for case in &cases {
        let stage = Stage::new(&args.dir, &case.kdf)?;
        let (mut ours, mut theirs) = (Duration::MAX, Duration::MAX);
        for _ in 0..args.rounds {
            // The time to start cryptsetup and read the header does not belong to the key derivation.
            let start = timed(|| stage.cryptsetup(&["luksDump"]))?;
            theirs = theirs.min(timed(|| stage.open_with_cryptsetup())?.saturating_sub(start));
            ours = ours.min(timed(|| stage.open())?);
        }
        let ratio = ours.as_secs_f64() / theirs.as_secs_f64();
        println!(
            "| {} | {:.0} ms | {:.0} ms | {ratio:.2} | {} |",
            case.name,
            1e3 * ours.as_secs_f64(),
            1e3 * theirs.as_secs_f64(),
            case.bar
        );
        if ratio > case.bar {
            missed.push(case.name);
        }
    }
    ensure!(missed.is_empty(), "these key derivations are slower than their bars allow: {}", missed.join("; "));
    Ok(())
}

fn timed(work: impl FnOnce() -> Result<()>) -> Result<Duration> {
    let start = Instant::now();
    work()?;
    Ok(start.elapsed())
}

/// A volume and its key in files, which are removed on drop.
struct Stage {
    disk: PathBuf,
    key: PathBuf,
}

impl Stage {
    fn new(dir: &Path, kdf: &KdfOptions) -> Result<Self> {
        let name = |what| dir.join(format!("nbdcrypt-kdf-{}-{what}", std::process::id()));
        let stage = Self { disk: name("disk"), key: name("key") };
        std::fs::write(&stage.key, PASSPHRASE)?;
        File::create(&stage.disk)?.set_len(17 << 20)?;
        let options = FormatOptions::Luks2(Box::new(luks2::Options {
            kdf: *kdf,
            hash: HashAlgorithm::Sha256,
            digest_iterations: kdf::MIN_ITERATIONS,
            sector_size: SectorSize::B4096,
            label: String::new(),
            subsystem: String::new(),
            uuid: "00000000-0000-4000-8000-000000000000".parse()?,
            layout: luks2::Layout::default(),
            tokens: Vec::new(),
        }));
        let mut byte = 0u8;
        // A weak random source is enough, since this key protects no data.
        let mut random = |data: &mut [u8]| {
            data.fill_with(|| {
                byte = byte.wrapping_mul(73).wrapping_add(41);
                byte
            });
            Ok(())
        };
        let mut key: Vec<u8> = (0..).take(VolumeKey::AES_256).collect();
        key.rotate_left(7);
        let store = FileStore::open(&stage.disk, Access::ReadWrite, Caching::PageCache)?;
        let passphrase = Passphrase::new(PASSPHRASE.to_vec());
        options.begin(&store, &passphrase, VolumeKey::new(key)?, &mut random)?.commit(&store)?;
        Ok(stage)
    }

    fn open(&self) -> Result<()> {
        let store = FileStore::open(&self.disk, Access::ReadOnly, Caching::PageCache)?;
        luks::read(&store, &Limits::default())?.unlock(&store, &Passphrase::new(PASSPHRASE.to_vec()))?;
        Ok(())
    }

    fn open_with_cryptsetup(&self) -> Result<()> {
        self.cryptsetup(&[
            "open",
            "--test-passphrase",
            "--key-file",
            self.key.to_str().context("the directory's name is not UTF-8; choose another one with --dir")?,
        ])
    }

    fn cryptsetup(&self, arguments: &[&str]) -> Result<()> {
        let output =
            Command::new("cryptsetup").args(arguments).arg(&self.disk).output().context("cannot run cryptsetup")?;
        ensure!(output.status.success(), "cryptsetup failed: {}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        for path in [&self.disk, &self.key] {
            let _ = std::fs::remove_file(path);
        }
    }
}
