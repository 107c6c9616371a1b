//! cryptsetup's options for key derivation: how a passphrase becomes a keyslot's key.

use std::num::NonZeroU32;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use engine::key::VolumeKey;
use engine::luks::kdf::{self, Argon2Cost, KdfOptions};
use engine::luks::{HashAlgorithm, Limits};
use engine::text::human;

use crate::config::LimitsConfig;
use crate::machine::memory;
use crate::volume::new_volume::{ARGON2_MEMORY, UNLOCK_TIME, argon2_lanes};

const HEADING: &str = "Key derivation";

#[derive(Debug, clap::Args)]
pub(super) struct KdfArgs {
    /// The key derivation. LUKS2 uses argon2id by default. LUKS1 has only pbkdf2.
    #[arg(help_heading = HEADING, long, value_enum, ignore_case = true)]
    pbkdf: Option<Pbkdf>,
    /// The hash of PBKDF2 and of the keyslot's anti-forensic splitter.
    #[arg(help_heading = HEADING, long, value_name = "HASH", default_value = "sha256", value_parser = hash)]
    pub(super) hash: HashAlgorithm,
    /// How long one attempt at the passphrase takes on this machine, in milliseconds.
    #[arg(help_heading = HEADING, short = 'i', long, value_name = "MS", default_value_t = milliseconds(UNLOCK_TIME))]
    iter_time: u64,
    /// The maximum memory that Argon2 uses, in KiB. It is never more than half of the machine's memory. [default: 1048576,
    /// which is 1 GiB]
    #[arg(help_heading = HEADING, long, value_name = "KIB", value_parser = clap::value_parser!(u32).range(32..=4 << 20))]
    pbkdf_memory: Option<u32>,
    /// The number of Argon2's lanes, each of which is a thread. [default: the number of CPUs, but at most 4]
    #[arg(help_heading = HEADING, long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=16))]
    pbkdf_parallel: Option<u32>,
    /// The iterations of PBKDF2 (at least 1000) or the passes of Argon2 (at least 4), instead of measuring.
    #[arg(help_heading = HEADING, long, value_name = "N", conflicts_with = "iter_time")]
    pbkdf_force_iterations: Option<NonZeroU32>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Pbkdf {
    Argon2id,
    Argon2i,
    Pbkdf2,
}

impl KdfArgs {
    /// Returns the key derivation that the options ask for, measured on this machine. Uses `default` if the options name
    /// none.
    ///
    /// # Errors
    /// Fails if the options contradict each other or exceed a limit.
    pub(super) fn options(&self, default: Pbkdf) -> Result<KdfOptions> {
        let argon2: fn(Argon2Cost) -> KdfOptions = match self.pbkdf.unwrap_or(default) {
            Pbkdf::Pbkdf2 => {
                return self.pbkdf2(self.hash).map(|iterations| KdfOptions::Pbkdf2 { hash: self.hash, iterations });
            }
            Pbkdf::Argon2id => KdfOptions::Argon2id,
            Pbkdf::Argon2i => KdfOptions::Argon2i,
        };
        let start = Instant::now();
        self.argon2(&mut || start.elapsed()).map(argon2)
    }

    /// Returns the iterations of PBKDF2 with `hash`, for a format that has no other key derivation.
    ///
    /// # Errors
    /// Fails if the options ask for Argon2, or for iterations beyond the limits.
    pub(super) fn pbkdf2_iterations(&self, hash: HashAlgorithm) -> Result<NonZeroU32> {
        if self.pbkdf.is_some_and(|pbkdf| pbkdf != Pbkdf::Pbkdf2) {
            bail!("LUKS1 has no key derivation other than pbkdf2: leave --pbkdf out, or make a LUKS2 volume");
        }
        self.pbkdf2(hash)
    }

    fn pbkdf2(&self, hash: HashAlgorithm) -> Result<NonZeroU32> {
        if self.pbkdf_memory.or(self.pbkdf_parallel).is_some() {
            bail!("--pbkdf-memory and --pbkdf-parallel are for Argon2 only: leave them out with pbkdf2");
        }
        let iterations = self.pbkdf_force_iterations.unwrap_or_else(|| {
            let start = Instant::now();
            kdf::calibrate(hash, VolumeKey::AES_256, self.target(), &mut || start.elapsed())
        });
        // The volume must open later without raised limits.
        let (least, most) = (kdf::MIN_ITERATIONS, Limits::default().iterations);
        if !(least..=most).contains(&iterations) {
            bail!("PBKDF2 needs {least} to {most} iterations, not {iterations}");
        }
        Ok(iterations)
    }

    /// Returns the cost of Argon2 that takes the wanted time. `clock` returns the time since any fixed moment.
    fn argon2(&self, clock: &mut dyn FnMut() -> Duration) -> Result<Argon2Cost> {
        let ceiling = memory::argon2_ceiling_kib();
        let wanted = self.pbkdf_memory.unwrap_or(ARGON2_MEMORY);
        if self.pbkdf_memory.is_some() && wanted > ceiling {
            let limit = memory::limit();
            tracing::warn!(
                "Argon2 gets {} of memory instead of {}: it never gets more than half of the available memory, and {}",
                human(u64::from(ceiling) << 10),
                human(u64::from(wanted) << 10),
                limit.source.says(limit.kib)
            );
        }
        let memory = wanted.min(ceiling);
        let lanes = self.pbkdf_parallel.unwrap_or_else(argon2_lanes);
        if memory < 8 * lanes {
            bail!("Argon2 needs at least 8 KiB for each lane: {memory} KiB of memory are too little for {lanes} lanes");
        }
        let cost = match self.pbkdf_force_iterations {
            Some(passes) => Argon2Cost { time: passes.get(), memory, lanes },
            None => kdf::calibrate_argon2id(self.target(), memory, lanes, clock)
                .map_err(|error| anyhow::anyhow!("{error:?}"))
                .context("Argon2 could not be measured with 64 MiB of memory: choose `--pbkdf pbkdf2`")?,
        };
        // The volume must open later without raised limits.
        let (passes, most) =
            (cost.time, LimitsConfig::default().limits(memory::limit_kib()).argon2_passes(cost.memory));
        if !(4..=most).contains(&passes) {
            let memory = human(u64::from(cost.memory) << 10);
            bail!("Argon2 needs 4 to {most} passes over {memory} of memory, not {passes}");
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

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Typed {
        #[command(flatten)]
        kdf: KdfArgs,
    }

    #[test]
    fn argon2_makes_as_many_passes_as_the_time_allows() {
        let typed = ["format", "--pbkdf-memory", "512", "--pbkdf-parallel", "1", "--iter-time", "500"];
        let args = Typed::try_parse_from(typed).unwrap().kdf;
        // With this clock, each trial takes 50 milliseconds. A trial makes 4 passes, so ten times as many fit.
        let mut now = Duration::ZERO;
        let cost = args.argon2(&mut || {
            now += Duration::from_millis(50);
            now
        });
        assert_eq!(cost.unwrap(), Argon2Cost { time: 40, memory: 512, lanes: 1 });
    }
}
