//! A generator of random numbers with a seed, so that each run of the simulation can be repeated.

use std::time::Duration;

/// The SplitMix64 generator (Steele, Lea and Flood, 2014). The numbers are well distributed but not secret.
#[derive(Clone, Debug)]
pub(super) struct Random(u64);

impl Random {
    /// Returns a generator. Equal seeds give equal numbers.
    pub(super) fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// Returns the next number.
    pub(super) fn number(&mut self) -> u32 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 32) as u32
    }

    /// Returns a time from zero to `longest`.
    pub(super) fn up_to(&mut self, longest: Duration) -> Duration {
        share(longest, self.number())
    }
}

/// Returns the part of `whole` that `random` chooses: nothing for 0, and all of it for the largest number.
pub(super) fn share(whole: Duration, random: u32) -> Duration {
    whole.mul_f64(f64::from(random) / f64::from(u32::MAX))
}
