//! How much work a header may ask for.

use std::num::NonZeroU32;

use super::LuksError;
use super::hash::HashAlgorithm;

/// How much work a header may ask for. A header is untrusted, and one that asked for four billion iterations would keep a
/// boot waiting for hours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// The most PBKDF2 iterations of one keyslot or digest. The default, 100 million, is ten seconds and more on today's
    /// machines; cryptsetup's own choice, two seconds' worth, is a few million.
    pub iterations: NonZeroU32,
    /// The most memory that Argon2 may take, in KiB. The default, 4 GiB, is the most that cryptsetup ever makes.
    pub argon2_memory: u32,
    /// The most passes of Argon2 over the most memory; over less, so many more as take the same time. The default is 100;
    /// cryptsetup makes 4 over a GiB, and hundreds over the few MiB that `--pbkdf-memory` leaves it.
    pub argon2_time: u32,
    /// The most lanes of Argon2, each a thread. The default is 16; cryptsetup makes 4 at most.
    pub argon2_lanes: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            iterations: NonZeroU32::MIN.saturating_add(99_999_999),
            argon2_memory: 4 << 20,
            argon2_time: 100,
            argon2_lanes: 16,
        }
    }
}

impl Limits {
    /// The most passes of Argon2 over so much memory, in KiB.
    pub fn argon2_passes(&self, memory: u32) -> u32 {
        // Over less than this, it is not the memory that takes the time.
        const LEAST: u32 = 1 << 10;
        self.argon2_time.saturating_mul((self.argon2_memory / memory.max(LEAST)).max(1))
    }

    /// So many iterations, as `field` asks for them, if that is allowed.
    pub(super) fn iterations(&self, field: impl Fn() -> String, found: u32) -> Result<NonZeroU32, LuksError> {
        let iterations = NonZeroU32::new(found).ok_or_else(|| LuksError::corrupt(field(), "0"))?;
        if iterations > self.iterations {
            return Err(LuksError::TooManyIterations { field: field(), found, limit: self.iterations.get() });
        }
        Ok(iterations)
    }
}

/// The work of a try at one keyslot, as a share of the most that [`Limits`] let one derivation cost.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Work(f64);

impl Work {
    /// PBKDF2 computes so many iterations for each of the hash's outputs that the key is put together from.
    pub(super) fn of_pbkdf2(limits: &Limits, hash: HashAlgorithm, iterations: NonZeroU32, len: usize) -> Self {
        let outputs = u32::try_from(len.div_ceil(hash.output_len())).unwrap_or(u32::MAX);
        Self(f64::from(outputs) * f64::from(iterations.get()) / f64::from(limits.iterations.get()))
    }

    /// Argon2 goes over the memory so many times.
    pub(super) fn of_argon2(limits: &Limits, time: u32, memory: u32) -> Self {
        Self(f64::from(time) / f64::from(limits.argon2_passes(memory)))
    }

    pub(super) fn and(self, other: Self) -> Self {
        Self(self.0 + other.0)
    }
}

/// What all keyslots of a header may cost together: a volume has up to 32, and a wrong passphrase is tried on each.
///
/// That is four times what one derivation may. cryptsetup's own keyslots take two seconds each, and 32 of them less than
/// this at the default limits. Where one is tried, those before it cost less; so the first always is.
#[derive(Debug, Default)]
pub(super) struct Budget(f64);

impl Budget {
    const MOST: f64 = 4.0;

    /// Whether there is something left for another keyslot, whose work is taken from it.
    pub(super) fn spend(&mut self, work: Work) -> bool {
        let is_left = self.0 < Self::MOST;
        self.0 += work.0;
        is_left
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cryptsetup_makes_is_within_the_budget_and_the_dearest_keyslots_are_not() {
        let limits = Limits::default();
        let keyslots = |work: Work| {
            let mut budget = Budget::default();
            (0..32).filter(|_| budget.spend(work)).count()
        };
        let pbkdf2 = |iterations: u32, len| {
            Work::of_pbkdf2(&limits, HashAlgorithm::Sha256, NonZeroU32::new(iterations).unwrap(), len)
        };
        // Two seconds' worth on a fast machine, with the digest that comes after.
        assert_eq!(keyslots(pbkdf2(5_000_000, 64).and(pbkdf2(500_000, 32))), 32);
        assert_eq!(keyslots(Work::of_argon2(&limits, 8, 1 << 20)), 32);
        assert_eq!(keyslots(pbkdf2(100_000_000, 64)), 2);
        assert_eq!(keyslots(Work::of_argon2(&limits, 100, 4 << 20)), 4);
    }
}
