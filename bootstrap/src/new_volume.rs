//! What a new volume is on this machine, where nobody asks for anything else.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use engine::key::VolumeKey;
use engine::luks::luks2::KdfOptions;
use engine::luks::{FormatOptions, HashAlgorithm, kdf, luks1, luks2};
use engine::sector::SectorSize;

use crate::config::VolumeType;
use crate::{memory, system};

/// What a guess at a passphrase shall cost on this machine: cryptsetup's own default.
pub const UNLOCK_TIME: Duration = Duration::from_secs(2);
/// The most memory that Argon2 is given unasked, in KiB (cryptsetup's `DEFAULT_LUKS2_MEMORY_KB`).
pub const ARGON2_MEMORY: u32 = 1 << 20;
/// The most lanes (cryptsetup's `DEFAULT_LUKS2_PARALLEL_THREADS`).
const ARGON2_LANES: usize = 4;

/// What kind of secret opens the volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Strength {
    /// Somebody may have thought it up: a guess at it must cost.
    Guessable,
    /// At least 256 random bits. Who could guess them could as well guess the volume's key itself, so that no key
    /// derivation adds to them, and the cheapest is enough: PBKDF2 with [`kdf::MIN_ITERATIONS`].
    Random,
}

/// A new volume of the kind: what opens it costs [`UNLOCK_TIME`] where it can be guessed.
///
/// # Errors
/// What the system said; that a plain volume has no header.
pub fn options(kind: VolumeType, sector_size: SectorSize, strength: Strength) -> Result<FormatOptions> {
    Ok(match (kind, strength) {
        (VolumeType::Luks1, Strength::Guessable) => FormatOptions::Luks1(luks1_options(pbkdf2_for(UNLOCK_TIME))?),
        (VolumeType::Luks1, Strength::Random) => FormatOptions::Luks1(luks1_options(kdf::MIN_ITERATIONS)?),
        (VolumeType::Luks2, Strength::Guessable) => luks2_options(argon2id_for(UNLOCK_TIME)?, sector_size)?,
        (VolumeType::Luks2, Strength::Random) => {
            let (hash, iterations) = (HashAlgorithm::Sha256, kdf::MIN_ITERATIONS);
            luks2_options(KdfOptions::Pbkdf2 { hash, iterations }, sector_size)?
        }
        (VolumeType::Plain, _) => bail!("a plain volume has no header"),
    })
}

/// A lane for each CPU, up to four.
pub fn argon2_lanes() -> u32 {
    let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZeroUsize::get);
    u32::try_from(cpus.min(ARGON2_LANES)).unwrap_or(1)
}

/// How many iterations of PBKDF2 with sha256 take so long.
fn pbkdf2_for(time: Duration) -> std::num::NonZeroU32 {
    let start = Instant::now();
    kdf::calibrate(HashAlgorithm::Sha256, VolumeKey::AES_256, time, &mut || start.elapsed())
}

/// Argon2id that takes so long, with no more memory than half of what there is.
fn argon2id_for(time: Duration) -> Result<KdfOptions> {
    let start = Instant::now();
    let memory = ARGON2_MEMORY.min(memory::argon2_ceiling_kib());
    match kdf::calibrate_argon2id(time, memory, argon2_lanes(), &mut || start.elapsed()) {
        Ok(cost) => Ok(KdfOptions::Argon2id(cost)),
        Err(_) => bail!("Argon2id needs 64 MiB of memory to be tried, which are not to be had; choose PBKDF2"),
    }
}

/// A LUKS1 volume whose passphrase is derived so many times, with everything else as usual.
///
/// # Errors
/// What the source of randomness said.
pub(crate) fn luks1_options(iterations: std::num::NonZeroU32) -> Result<luks1::Options> {
    Ok(luks1::Options {
        hash: HashAlgorithm::Sha256,
        keyslot_iterations: iterations,
        // There is nothing to guess in a random key.
        digest_iterations: kdf::MIN_ITERATIONS,
        uuid: new_uuid()?,
        data_offset: None,
    })
}

fn luks2_options(kdf: KdfOptions, sector_size: SectorSize) -> Result<FormatOptions> {
    Ok(FormatOptions::Luks2(Box::new(luks2::Options {
        kdf,
        hash: HashAlgorithm::Sha256,
        digest_iterations: kdf::MIN_ITERATIONS,
        sector_size,
        label: String::new(),
        subsystem: String::new(),
        uuid: new_uuid()?,
        layout: luks2::Layout::default(),
        tokens: Vec::new(),
    })))
}

/// A random UUID.
///
/// # Errors
/// What the system said.
pub fn new_uuid() -> Result<uuid::Uuid> {
    let mut bytes = [0; 16];
    system::random(&mut bytes)?;
    Ok(uuid::Builder::from_random_bytes(bytes).into_uuid())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_random_secret_costs_nothing_to_try_and_another_does() {
        let luks2 = |strength| match options(VolumeType::Luks2, SectorSize::B4096, strength).unwrap() {
            FormatOptions::Luks2(options) => options.kdf,
            other => panic!("{other:?}"),
        };
        let least = KdfOptions::Pbkdf2 { hash: HashAlgorithm::Sha256, iterations: kdf::MIN_ITERATIONS };
        assert_eq!(luks2(Strength::Random), least);
        let KdfOptions::Argon2id(cost) = luks2(Strength::Guessable) else { panic!("not Argon2id") };
        assert!(cost.time >= 4 && cost.memory >= 32 << 10 && cost.memory <= memory::argon2_ceiling_kib(), "{cost:?}");
        let iterations = |strength| match options(VolumeType::Luks1, SectorSize::B512, strength).unwrap() {
            FormatOptions::Luks1(options) => options.keyslot_iterations,
            other => panic!("{other:?}"),
        };
        assert!(iterations(Strength::Guessable) > iterations(Strength::Random));
        assert!(options(VolumeType::Plain, SectorSize::B512, Strength::Random).is_err());
    }
}
