//! Chooses the default options of a new volume on this machine.

use std::io;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use engine::key::VolumeKey;
use engine::luks::kdf::{self, KdfOptions};
use engine::luks::{FormatOptions, HashAlgorithm, Random, luks1, luks2};
use engine::sector::SectorSize;
use uuid::Uuid;

use crate::machine::memory;
use crate::volume::VolumeType;

/// How long one guess at a passphrase should take on this machine. This is cryptsetup's default.
pub const UNLOCK_TIME: Duration = Duration::from_secs(2);
/// The maximum memory that Argon2 gets by default, in KiB (cryptsetup's `DEFAULT_LUKS2_MEMORY_KB`).
pub const ARGON2_MEMORY: u32 = 1 << 20;
/// The maximum number of Argon2's lanes (cryptsetup's `DEFAULT_LUKS2_PARALLEL_THREADS`).
const ARGON2_LANES: usize = 4;

/// The kind of secret that opens a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Strength {
    /// A person may have chosen the secret, so each guess must be expensive.
    Guessable,
    /// At least 256 random bits. Guessing them is as hard as guessing the volume key itself. An expensive key derivation
    /// adds nothing, so the cheapest is enough: PBKDF2 with [`kdf::MIN_ITERATIONS`].
    Random,
}

/// The number of bytes of a secret with 256 random bits. A shorter secret cannot have as many random bits.
const RANDOM_SECRET_LEN: usize = 32;

/// Checks that a secret of `len` bytes can be as strong as `strength` says.
///
/// # Errors
/// If `strength` says that the secret is random, but the secret is too short for that. The text says what to do.
pub fn check_strength(strength: Strength, len: usize) -> Result<()> {
    if strength == Strength::Guessable || len >= RANDOM_SECRET_LEN {
        return Ok(());
    }
    bail!(
        "`random = true` under [key] says that the secret has at least 256 random bits, but the secret has only {len} bytes, \
         and that many bits need {RANDOM_SECRET_LEN}. A new volume would get a key derivation with which such a secret is \
         guessed quickly. Leave `random` out if a person chose the secret; otherwise make a longer one: `head -c \
         {RANDOM_SECRET_LEN} /dev/urandom` for a key file, `nbdcrypt provision` for AWS"
    )
}

/// Returns the options of a new volume. If its secret can be guessed, one guess takes [`UNLOCK_TIME`].
///
/// # Errors
/// If there is too little memory for Argon2, or if `kind` is a plain volume, which has no header.
pub fn options(kind: VolumeType, sector_size: SectorSize, strength: Strength, uuid: Uuid) -> Result<FormatOptions> {
    Ok(match (kind, strength) {
        (VolumeType::Luks1, Strength::Guessable) => FormatOptions::Luks1(luks1_options(pbkdf2_for(UNLOCK_TIME), uuid)),
        (VolumeType::Luks1, Strength::Random) => FormatOptions::Luks1(luks1_options(kdf::MIN_ITERATIONS, uuid)),
        (VolumeType::Luks2, Strength::Guessable) => luks2_options(argon2id_for(UNLOCK_TIME)?, sector_size, uuid),
        (VolumeType::Luks2, Strength::Random) => {
            let (hash, iterations) = (HashAlgorithm::Sha256, kdf::MIN_ITERATIONS);
            luks2_options(KdfOptions::Pbkdf2 { hash, iterations }, sector_size, uuid)
        }
        (VolumeType::Plain, _) => bail!("a plain volume has no header"),
    })
}

/// Returns the encryption unit of a new LUKS2 volume whose data lies on a disk of `data_len` bytes: `wanted`, or else the
/// default.
///
/// # Errors
/// If `wanted` does not fit. The text says what to do.
pub fn sector_size(wanted: Option<SectorSize>, data_len: u64) -> Result<SectorSize> {
    let Some(wanted) = wanted else { return Ok(luks2::default_sector_size(data_len)) };
    luks2::check_sector_size(wanted, data_len)
        .context("choose sectors of 512 bytes, or leave the sector size out to use one that fits")?;
    Ok(wanted)
}

/// Returns the number of Argon2 lanes: one for each CPU, up to four.
pub fn argon2_lanes() -> u32 {
    let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZeroUsize::get);
    u32::try_from(cpus.min(ARGON2_LANES)).unwrap_or(1)
}

/// Returns how many iterations of PBKDF2 with SHA-256 take `time`.
fn pbkdf2_for(time: Duration) -> std::num::NonZeroU32 {
    let start = Instant::now();
    kdf::calibrate(HashAlgorithm::Sha256, VolumeKey::AES_256, time, &mut || start.elapsed())
}

/// Returns the cost of an Argon2id that takes `time` and at most half of the memory.
fn argon2id_for(time: Duration) -> Result<KdfOptions> {
    let start = Instant::now();
    let memory = ARGON2_MEMORY.min(memory::argon2_ceiling_kib());
    match kdf::calibrate_argon2id(time, memory, argon2_lanes(), &mut || start.elapsed()) {
        Ok(cost) => Ok(KdfOptions::Argon2id(cost)),
        Err(_) => bail!("Argon2id needs at least 64 MiB of memory, which are not available; choose PBKDF2"),
    }
}

/// Returns the options of a LUKS1 volume with this many PBKDF2 iterations for its keyslot, and defaults for everything
/// else.
pub(crate) fn luks1_options(iterations: std::num::NonZeroU32, uuid: Uuid) -> luks1::Options {
    luks1::Options {
        hash: HashAlgorithm::Sha256,
        keyslot_iterations: iterations,
        // A random key cannot be guessed, so the digest needs no expensive derivation.
        digest_iterations: kdf::MIN_ITERATIONS,
        uuid,
        data_offset: None,
    }
}

fn luks2_options(kdf: KdfOptions, sector_size: SectorSize, uuid: Uuid) -> FormatOptions {
    FormatOptions::Luks2(Box::new(luks2::Options {
        kdf,
        hash: HashAlgorithm::Sha256,
        digest_iterations: kdf::MIN_ITERATIONS,
        sector_size,
        label: String::new(),
        subsystem: String::new(),
        uuid,
        layout: luks2::Layout::default(),
        tokens: Vec::new(),
    }))
}

/// Returns a random UUID.
///
/// # Errors
/// The error of `random`.
pub fn new_uuid(random: Random<'_>) -> io::Result<Uuid> {
    let mut bytes = [0; 16];
    random(&mut bytes)?;
    Ok(uuid::Builder::from_random_bytes(bytes).into_uuid())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_random_secret_has_32_bytes() {
        assert!(check_strength(Strength::Guessable, 1).is_ok() && check_strength(Strength::Random, 32).is_ok());
        let refused = check_strength(Strength::Random, 31).unwrap_err().to_string();
        assert!(refused.contains("only 31 bytes") && refused.contains("Leave `random` out"), "{refused}");
    }

    #[test]
    fn only_guesses_at_guessable_secrets_are_expensive() {
        let luks2 = |strength| match options(VolumeType::Luks2, SectorSize::B4096, strength, Uuid::nil()).unwrap() {
            FormatOptions::Luks2(options) => options.kdf,
            other => panic!("{other:?}"),
        };
        let least = KdfOptions::Pbkdf2 { hash: HashAlgorithm::Sha256, iterations: kdf::MIN_ITERATIONS };
        assert_eq!(luks2(Strength::Random), least);
        let KdfOptions::Argon2id(cost) = luks2(Strength::Guessable) else { panic!("not Argon2id") };
        assert!(cost.time >= 4 && cost.memory >= 32 << 10 && cost.memory <= memory::argon2_ceiling_kib(), "{cost:?}");
        let iterations = |strength| match options(VolumeType::Luks1, SectorSize::B512, strength, Uuid::nil()).unwrap() {
            FormatOptions::Luks1(options) => options.keyslot_iterations,
            other => panic!("{other:?}"),
        };
        assert!(iterations(Strength::Guessable) > iterations(Strength::Random));
        assert!(options(VolumeType::Plain, SectorSize::B512, Strength::Random, Uuid::nil()).is_err());
    }
}
