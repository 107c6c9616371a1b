//! How much work a header may ask for.

use std::num::NonZeroU32;

use super::LuksError;
use super::hash::HashAlgorithm;

/// How much work a header may ask for. Headers are untrusted: a header that asks for four billion iterations would delay a
/// boot for hours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// The maximum number of PBKDF2 iterations of one keyslot or digest. The default, 100 million, takes ten seconds or more on
    /// today's machines. cryptsetup chooses a number that takes two seconds: a few million.
    pub iterations: NonZeroU32,
    /// The maximum memory that Argon2 may take, in KiB. The default is 4 GiB; cryptsetup never chooses more.
    pub argon2_memory: u32,
    /// The maximum number of passes of Argon2 over [`Limits::argon2_memory`]. Over less memory, more passes are allowed, in
    /// proportion. The default is 100. cryptsetup chooses 4 passes over 1 GiB, or hundreds over a few MiB if `--pbkdf-memory`
    /// allows no more memory.
    pub argon2_time: u32,
    /// The maximum number of Argon2's lanes. Each lane is a thread. The default is 16; cryptsetup chooses at most 4.
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
    /// Returns the maximum number of passes of Argon2 over `memory` KiB.
    pub fn argon2_passes(&self, memory: u32) -> u32 {
        // Below this size, the time no longer depends on the memory.
        const LEAST: u32 = 1 << 10;
        self.argon2_time.saturating_mul((self.argon2_memory / memory.max(LEAST)).max(1))
    }

    /// Returns `found` iterations if the limit allows them. `field` names the field that asks for them.
    pub(super) fn iterations(&self, field: impl Fn() -> String, found: u32) -> Result<NonZeroU32, LuksError> {
        let iterations = NonZeroU32::new(found).ok_or_else(|| LuksError::corrupt(field(), "0"))?;
        if iterations > self.iterations {
            return Err(LuksError::TooManyIterations { field: field(), found, limit: self.iterations.get() });
        }
        Ok(iterations)
    }
}

/// The work of one attempt at a keyslot. A value of 1 is the maximum work that [`Limits`] allows for one key derivation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Work(f64);

impl Work {
    /// Returns the work of PBKDF2: `iterations` iterations for each hash output that is part of the key.
    pub(super) fn of_pbkdf2(limits: &Limits, hash: HashAlgorithm, iterations: NonZeroU32, len: usize) -> Self {
        let outputs = u32::try_from(len.div_ceil(hash.output_len())).unwrap_or(u32::MAX);
        Self(f64::from(outputs) * f64::from(iterations.get()) / f64::from(limits.iterations.get()))
    }

    /// Returns the work of Argon2: `time` passes over the memory.
    pub(super) fn of_argon2(limits: &Limits, time: u32, memory: u32) -> Self {
        Self(f64::from(time) / f64::from(limits.argon2_passes(memory)))
    }

    pub(super) fn and(self, other: Self) -> Self {
        Self(self.0 + other.0)
    }
}

/// What all keyslots of a header may cost together. A volume has up to 32 keyslots, and a wrong passphrase is tried on each.
///
/// The budget is four times what one derivation may cost. The keyslots that cryptsetup makes take two seconds each; at
/// the default limits, 32 of them fit. A keyslot is tried if the keyslots before it cost less than the budget, so the
/// first keyslot is always tried.
#[derive(Debug, Default)]
pub(super) struct Budget(f64);

impl Budget {
    const MOST: f64 = 4.0;

    /// Takes the work of a keyslot from the budget. Returns whether any of the budget was left before.
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
    fn the_budget_allows_cryptsetup_volumes_but_not_all_expensive_keyslots() {
        let limits = Limits::default();
        let keyslots = |work: Work| {
            let mut budget = Budget::default();
            (0..32).filter(|_| budget.spend(work)).count()
        };
        let pbkdf2 = |iterations: u32, len| {
            Work::of_pbkdf2(&limits, HashAlgorithm::Sha256, NonZeroU32::new(iterations).unwrap(), len)
        };
        // Two seconds of iterations on a fast machine, and the digest.
        assert_eq!(keyslots(pbkdf2(5_000_000, 64).and(pbkdf2(500_000, 32))), 32);
        assert_eq!(keyslots(Work::of_argon2(&limits, 8, 1 << 20)), 32);
        assert_eq!(keyslots(pbkdf2(100_000_000, 64)), 2);
        assert_eq!(keyslots(Work::of_argon2(&limits, 100, 4 << 20)), 4);
    }
}
