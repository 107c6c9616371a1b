//! Derives a keyslot's key from a passphrase: PBKDF2 (RFC 8018, section 5.2) with HMAC, and Argon2 (RFC 9106).

use std::num::NonZeroU32;
use std::time::Duration;

use argon2::{Algorithm, Argon2, Block, Params, Version};
use zeroize::{Zeroize, Zeroizing};

use crate::buffer::has_room;
use crate::key::Passphrase;

use super::LuksError;
use super::hash::{HashAlgorithm, with_hash};

/// The fewest iterations that cryptsetup uses for a keyslot or a digest.
pub const MIN_ITERATIONS: NonZeroU32 = NonZeroU32::new(1000).unwrap();

/// Returns `DK = PBKDF2-HMAC-hash(password, salt, iterations, len)`.
pub fn pbkdf2(
    hash: HashAlgorithm,
    password: &[u8],
    salt: &[u8],
    iterations: NonZeroU32,
    len: usize,
) -> Zeroizing<Vec<u8>> {
    let mut key = Zeroizing::new(vec![0; len]);
    with_hash!(hash, H, P => pbkdf2::pbkdf2::<P>(password, salt, iterations.get(), &mut key))
        .expect("HMAC takes keys of any length");
    key
}

/// Bytes of address space that a thread takes: its stack, and what the C library adds to it.
const THREAD_STACK: usize = 3 << 20;

/// The cost parameters of Argon2.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Argon2Cost {
    /// The number of passes over the memory.
    pub time: u32,
    /// The memory in KiB.
    pub memory: u32,
    /// The number of lanes. Each lane is computed by its own thread.
    pub lanes: u32,
}

/// Why [`argon2()`] returned no key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Argon2Error {
    /// The memory is not available, or no threads can be started.
    OutOfMemory,
    /// Argon2 does not allow a cost parameter or the length of the salt.
    Parameters,
}

/// Returns `Argon2i(id)(password, salt, cost, len)`, version 1.3. All threads that this function starts have ended when
/// it returns.
///
/// # Errors
/// [`Argon2Error`]. A lack of memory is found before any work is done.
pub fn argon2(
    is_id: bool,
    password: &[u8],
    salt: &[u8],
    cost: Argon2Cost,
    len: usize,
) -> Result<Zeroizing<Vec<u8>>, Argon2Error> {
    let algorithm = if is_id { Algorithm::Argon2id } else { Algorithm::Argon2i };
    let params = Params::new(cost.memory, cost.time, cost.lanes, Some(len)).map_err(|_| Argon2Error::Parameters)?;
    let mut memory: Vec<Block> = Vec::new();
    has_room(params.block_count().saturating_mul(1024)).map_err(|_| Argon2Error::OutOfMemory)?;
    memory.try_reserve_exact(params.block_count()).map_err(|_| Argon2Error::OutOfMemory)?;
    let mut key = Zeroizing::new(vec![0; len]);
    let compute = || {
        memory.resize(params.block_count(), Block::new());
        let result = Argon2::new(algorithm, Version::V0x13, params).hash_password_into_with_memory(
            password,
            salt,
            &mut key,
            &mut memory,
        );
        memory.zeroize();
        result.map_err(|_| Argon2Error::Parameters)
    };
    if cost.lanes == 1 {
        compute()?;
    } else {
        // The pool and its threads end here. A thread that was still running would make a later fork unsafe.
        let threads = usize::try_from(cost.lanes).unwrap_or(usize::MAX);
        has_room(threads.saturating_mul(THREAD_STACK)).map_err(|_| Argon2Error::OutOfMemory)?;
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
        pool.map_err(|_| Argon2Error::OutOfMemory)?.install(compute)?;
    }
    Ok(key)
}

/// How a keyslot's key is derived from a passphrase.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KdfOptions {
    /// PBKDF2, for a passphrase that cannot be guessed, such as one from a key source. See [`calibrate`].
    Pbkdf2 {
        /// The hash.
        hash: HashAlgorithm,
        /// The iterations.
        iterations: NonZeroU32,
    },
    /// Argon2id, for a passphrase that a person remembers. See [`calibrate_argon2id`].
    Argon2id(Argon2Cost),
    /// Argon2i, which cryptsetup used before version 2.4. Argon2id resists more attacks.
    Argon2i(Argon2Cost),
}

impl KdfOptions {
    /// Derives a key of `len` bytes for a keyslot.
    ///
    /// # Errors
    /// [`LuksError::OutOfMemory`], or [`LuksError::Impossible`] if Argon2 does not allow the cost.
    pub(super) fn derive(
        &self,
        keyslot: usize,
        passphrase: &Passphrase,
        salt: &[u8],
        len: usize,
    ) -> Result<Zeroizing<Vec<u8>>, LuksError> {
        let (is_id, cost) = match *self {
            Self::Pbkdf2 { hash, iterations } => return Ok(pbkdf2(hash, passphrase.expose(), salt, iterations, len)),
            Self::Argon2id(cost) => (true, cost),
            Self::Argon2i(cost) => (false, cost),
        };
        argon2(is_id, passphrase.expose(), salt, cost, len).map_err(|error| match error {
            Argon2Error::OutOfMemory => LuksError::OutOfMemory { keyslot, kib: cost.memory },
            Argon2Error::Parameters => {
                let rule = "Argon2 needs at least 1 pass, 1 lane and 8 KiB per lane";
                LuksError::impossible("the cost", format!("{cost:?}"), rule)
            }
        })
    }
}

/// Returns how many iterations of [`pbkdf2()`] for a key of `len` bytes take about `target` on this machine, but at least
/// [`MIN_ITERATIONS`]. `clock` returns the time since any fixed moment and must not go backwards.
///
/// Takes about a tenth of `target`, or a little more if `target` is very short.
pub fn calibrate(hash: HashAlgorithm, len: usize, target: Duration, clock: &mut dyn FnMut() -> Duration) -> NonZeroU32 {
    scale_to(target, &mut |iterations| {
        let start = clock();
        pbkdf2(hash, b"calibration", &[0; 32], iterations, len);
        clock().saturating_sub(start)
    })
}

/// Returns the cost at which Argon2id takes about `target` on this machine with `lanes` lanes. The memory is at most `max_memory`
/// KiB. If one derivation with this memory is too fast, the number of passes is increased. As in cryptsetup, there are at least 4
/// passes, and at least 32 MiB if `max_memory` allows it.
///
/// # Errors
/// [`Argon2Error`] if even the memory for the trial is not available (at most 64 MiB), or if `max_memory` is too little for
/// the lanes.
pub fn calibrate_argon2id(
    target: Duration,
    max_memory: u32,
    lanes: u32,
    clock: &mut dyn FnMut() -> Duration,
) -> Result<Argon2Cost, Argon2Error> {
    const MIN_TIME: u32 = 4;
    const MIN_MEMORY: u32 = 32 << 10;
    let mut trial = Argon2Cost { time: MIN_TIME, memory: max_memory.min(64 << 10), lanes };
    let took = loop {
        let start = clock();
        argon2(true, b"calibration", &[0; 32], trial, 64)?;
        let took = clock().saturating_sub(start);
        if took >= worth_measuring(target) || trial.time > u32::MAX / 2 {
            break took.as_nanos().max(1);
        }
        trial.time *= 2;
    };
    let affordable = |cost: u32| u32::try_from(u128::from(cost) * target.as_nanos() / took).unwrap_or(u32::MAX);
    // The work that fits into `target`, counted in passes over one KiB.
    let work = affordable(trial.time.saturating_mul(trial.memory));
    let memory = (work / MIN_TIME).clamp(MIN_MEMORY.min(max_memory), max_memory);
    Ok(Argon2Cost { time: (work / memory.max(1)).max(MIN_TIME), memory, lanes })
}

/// Returns the number of iterations that take `target`. `run` runs a given number of iterations and returns how long they
/// took. The number is doubled until the time is long enough to be measured well. The result is scaled from this last
/// trial.
fn scale_to(target: Duration, run: &mut dyn FnMut(NonZeroU32) -> Duration) -> NonZeroU32 {
    let mut trial = MIN_ITERATIONS;
    loop {
        let took = run(trial);
        if took >= worth_measuring(target) || trial.leading_zeros() == 0 {
            let scaled = u128::from(trial.get()) * target.as_nanos() / took.as_nanos().max(1);
            let scaled = u32::try_from(scaled).unwrap_or(u32::MAX);
            return NonZeroU32::new(scaled).unwrap_or(MIN_ITERATIONS).max(MIN_ITERATIONS);
        }
        trial = trial.saturating_mul(NonZeroU32::MIN.saturating_add(1));
    }
}

/// Returns how long a trial must take to give a reliable estimate for `target`.
fn worth_measuring(target: Duration) -> Duration {
    (target / 20).clamp(Duration::from_millis(5), Duration::from_millis(250))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pbkdf2_matches_rfc_6070_and_rfc_7914() {
        let key = pbkdf2(HashAlgorithm::Sha1, b"password", b"salt", NonZeroU32::new(4096).unwrap(), 20);
        assert_eq!(key[..8], [0x4b, 0x00, 0x79, 0x01, 0xb7, 0x65, 0x48, 0x9a]);
        // RFC 7914, section 11.
        let key = pbkdf2(HashAlgorithm::Sha256, b"passwd", b"salt", NonZeroU32::MIN, 64);
        assert_eq!(key[..8], [0x55, 0xac, 0x04, 0x6e, 0x56, 0xe3, 0x08, 0x9f]);
        assert_eq!(key[60..], [0xd3, 0xa1, 0x97, 0x83]);
    }

    #[test]
    fn argon2_matches_the_reference_program() {
        // echo -n password | argon2 somesalt -i|-id -t 3 -k 64 -p 4 -l 16 -r
        let cost = Argon2Cost { time: 3, memory: 64, lanes: 4 };
        let key = argon2(false, b"password", b"somesalt", cost, 16).unwrap();
        assert_eq!(key[..8], [0x08, 0xe6, 0xb9, 0x7f, 0x72, 0x43, 0xd5, 0xd2]);
        let key = argon2(true, b"password", b"somesalt", cost, 16).unwrap();
        assert_eq!(key[..8], [0x77, 0x3c, 0xbd, 0xd5, 0x91, 0x64, 0x9d, 0xfd]);
        let threads = Argon2Cost { lanes: 0, ..cost };
        assert_eq!(argon2(true, b"password", b"somesalt", threads, 16), Err(Argon2Error::Parameters));
        assert!(argon2(true, b"password", b"x", Argon2Cost { lanes: 1, ..cost }, 16).is_err(), "a salt of one byte");
    }

    #[test]
    fn argon2_uses_more_memory_first_and_then_more_passes() {
        // Each trial takes a tenth of a second by this clock.
        let mut now = Duration::ZERO;
        let mut clock = || {
            now += Duration::from_millis(100);
            now
        };
        let mut cost =
            |millis, max_memory| calibrate_argon2id(Duration::from_millis(millis), max_memory, 1, &mut clock).unwrap();
        assert_eq!(cost(1000, 4 << 20), Argon2Cost { time: 4, memory: 640 << 10, lanes: 1 });
        assert_eq!(cost(1000, 64 << 10), Argon2Cost { time: 40, memory: 64 << 10, lanes: 1 });
        assert_eq!(cost(1, 4 << 20), Argon2Cost { time: 4, memory: 32 << 10, lanes: 1 });
        // The maximum is below cryptsetup's minimum of 32 MiB.
        assert_eq!(cost(1000, 1 << 10), Argon2Cost { time: 40, memory: 1 << 10, lanes: 1 });
        let too_little = calibrate_argon2id(Duration::from_secs(1), 31, 4, &mut || Duration::ZERO);
        assert_eq!(too_little, Err(Argon2Error::Parameters));
    }

    #[test]
    fn iterations_are_scaled_to_the_time_asked_for() {
        // A machine that computes a million iterations a second.
        let mut run = |iterations: NonZeroU32| Duration::from_micros(u64::from(iterations.get()));
        assert_eq!(scale_to(Duration::from_secs(2), &mut run).get(), 2_000_000);
        assert_eq!(scale_to(Duration::ZERO, &mut run), MIN_ITERATIONS);
        // A clock that does not advance, and a clock by which every trial takes an hour.
        assert_eq!(scale_to(Duration::from_secs(1), &mut |_| Duration::ZERO).get(), u32::MAX);
        assert_eq!(scale_to(Duration::from_secs(1), &mut |_| Duration::from_secs(3600)), MIN_ITERATIONS);
    }
}
