//! How a passphrase becomes a keyslot's key: cryptsetup's own options.

use std::num::NonZeroU32;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use engine::key::VolumeKey;
use engine::luks::kdf::{self, Argon2Cost};
use engine::luks::luks2::KdfOptions;
use engine::luks::{HashAlgorithm, Limits};

use crate::config::LimitsConfig;
use crate::memory;
use crate::new_volume::{ARGON2_MEMORY, UNLOCK_TIME, argon2_lanes};

#[derive(Debug, clap::Args)]
pub(super) struct KdfArgs {
    /// The key derivation: LUKS2 has argon2id by default, LUKS1 has pbkdf2 only.
    #[arg(long, value_enum)]
    pbkdf: Option<Pbkdf>,
    /// The hash of PBKDF2, and of what else the keyslot hashes.
    #[arg(long, value_name = "HASH", default_value = "sha256", value_parser = hash)]
    pub(super) hash: HashAlgorithm,
    /// How long a guess at the passphrase shall take on this machine, in milliseconds.
    #[arg(short = 'i', long, value_name = "MS", default_value_t = milliseconds(UNLOCK_TIME))]
    iter_time: u64,
    /// The most memory that Argon2 takes, in KiB: 1 GiB by default, and never more than half of what the machine has.
    #[arg(long, value_name = "KIB", value_parser = clap::value_parser!(u32).range(32..=4 << 20))]
    pbkdf_memory: Option<u32>,
    /// The lanes of Argon2, each a thread; by default as many as there are CPUs, and at most 4.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=16))]
    pbkdf_parallel: Option<u32>,
    /// The iterations of PBKDF2 (at least 1000) or passes of Argon2 (at least 4), instead of measuring.
    #[arg(long, value_name = "N", conflicts_with = "iter_time")]
    pbkdf_force_iterations: Option<NonZeroU32>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Pbkdf {
    Argon2id,
    Argon2i,
    Pbkdf2,
}

impl KdfArgs {
    /// What was asked for, measured on this machine; `default` where no derivation was.
    ///
    /// # Errors
    /// What cannot be.
    pub(super) fn options(&self, default: Pbkdf) -> Result<KdfOptions> {
        let argon2: fn(Argon2Cost) -> KdfOptions = match self.pbkdf.unwrap_or(default) {
            Pbkdf::Pbkdf2 => {
                return self.pbkdf2(self.hash).map(|iterations| KdfOptions::Pbkdf2 { hash: self.hash, iterations });
            }
            Pbkdf::Argon2id => KdfOptions::Argon2id,
            Pbkdf::Argon2i => KdfOptions::Argon2i,
        };
        self.argon2().map(argon2)
    }

    /// The iterations of PBKDF2 with `hash`, for a format that has nothing else.
    ///
    /// # Errors
    /// Where Argon2 was asked for.
    pub(super) fn pbkdf2_iterations(&self, hash: HashAlgorithm) -> Result<NonZeroU32> {
        if self.pbkdf.is_some_and(|pbkdf| pbkdf != Pbkdf::Pbkdf2) {
            bail!("LUKS1 has no other key derivation than pbkdf2: leave --pbkdf out, or make a LUKS2 volume");
        }
        self.pbkdf2(hash)
    }

    fn pbkdf2(&self, hash: HashAlgorithm) -> Result<NonZeroU32> {
        if self.pbkdf_memory.or(self.pbkdf_parallel).is_some() {
            bail!("--pbkdf-memory and --pbkdf-parallel are Argon2's: PBKDF2 takes no memory and has one lane");
        }
        let iterations = self.pbkdf_force_iterations.unwrap_or_else(|| {
            let start = Instant::now();
            kdf::calibrate(hash, VolumeKey::AES_256, self.target(), &mut || start.elapsed())
        });
        // What is made here is opened here, with no limit raised.
        let (least, most) = (kdf::MIN_ITERATIONS, Limits::default().iterations);
        if !(least..=most).contains(&iterations) {
            bail!("PBKDF2 has {least} to {most} iterations, not {iterations}");
        }
        Ok(iterations)
    }

    fn argon2(&self) -> Result<Argon2Cost> {
        let ceiling = memory::argon2_ceiling_kib();
        let wanted = self.pbkdf_memory.unwrap_or(ARGON2_MEMORY);
        if self.pbkdf_memory.is_some() && wanted > ceiling {
            tracing::warn!("Argon2 gets {ceiling} KiB, half of the memory there is, and not {wanted}");
        }
        let memory = wanted.min(ceiling);
        let lanes = self.pbkdf_parallel.unwrap_or_else(argon2_lanes);
        if memory < 8 * lanes {
            bail!("Argon2 takes 8 KiB a lane at least: {lanes} lanes and {memory} KiB are too little memory");
        }
        let cost = match self.pbkdf_force_iterations {
            Some(passes) => Argon2Cost { time: passes.get(), memory, lanes },
            None => {
                let start = Instant::now();
                kdf::calibrate_argon2id(self.target(), memory, lanes, &mut || start.elapsed())
                    .map_err(|error| anyhow::anyhow!("{error:?}"))
                    .context("Argon2 could not be tried with 64 MiB of memory: choose `--pbkdf pbkdf2`")?
            }
        };
        // What is made here is opened here, with no limit raised.
        let (passes, most) = (cost.time, LimitsConfig::default().limits().argon2_passes(cost.memory));
        if !(4..=most).contains(&passes) {
            bail!("Argon2 makes 4 to {most} passes over {} KiB, not {passes}", cost.memory);
        }
        Ok(cost)
    }

    fn target(&self) -> Duration {
        Duration::from_millis(self.iter_time)
    }
}

fn hash(name: &str) -> Result<HashAlgorithm, String> {
    HashAlgorithm::from_name(name).ok_or_else(|| {
        let names: Vec<_> = HashAlgorithm::ALL.iter().map(|hash| hash.name()).collect();
        format!("the hashes are {}", names.join(", "))
    })
}

fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}
