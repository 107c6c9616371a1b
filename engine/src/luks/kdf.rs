//! From a passphrase to a keyslot's key: PBKDF2 (RFC 8018, section 5.2) with HMAC.

use std::num::NonZeroU32;
use std::time::Duration;

use zeroize::Zeroizing;

use super::hash::{HashAlgorithm, with_hash};

/// The fewest iterations that cryptsetup makes a keyslot or a digest with.
pub const MIN_ITERATIONS: NonZeroU32 = NonZeroU32::new(1000).unwrap();

/// `DK = PBKDF2-HMAC-hash(password, salt, iterations, len)`.
pub fn pbkdf2(
    hash: HashAlgorithm,
    password: &[u8],
    salt: &[u8],
    iterations: NonZeroU32,
    len: usize,
) -> Zeroizing<Vec<u8>> {
    let mut key = Zeroizing::new(vec![0; len]);
    with_hash!(hash, H => pbkdf2::pbkdf2_hmac::<H>(password, salt, iterations.get(), &mut key));
    key
}

/// How many iterations of [`pbkdf2`] for a key of `len` bytes take about `target` on this machine, and never fewer than
/// [`MIN_ITERATIONS`]. The `clock` tells the time since any fixed moment; it must not go backwards.
///
/// Takes about a tenth of `target`, or a little more than that where `target` is very short.
pub fn calibrate(hash: HashAlgorithm, len: usize, target: Duration, clock: &mut dyn FnMut() -> Duration) -> NonZeroU32 {
    scale_to(target, &mut |iterations| {
        let start = clock();
        pbkdf2(hash, b"calibration", &[0; 32], iterations, len);
        clock().saturating_sub(start)
    })
}

/// The number of iterations that take `target`, given what `run` says so many took: doubles the trial until it has
/// taken long enough to be measured well, and scales from there.
fn scale_to(target: Duration, run: &mut dyn FnMut(NonZeroU32) -> Duration) -> NonZeroU32 {
    let enough = (target / 20).clamp(Duration::from_millis(5), Duration::from_millis(250));
    let mut trial = MIN_ITERATIONS;
    loop {
        let took = run(trial);
        if took >= enough || trial.leading_zeros() == 0 {
            let scaled = u128::from(trial.get()) * target.as_nanos() / took.as_nanos().max(1);
            let scaled = u32::try_from(scaled).unwrap_or(u32::MAX);
            return NonZeroU32::new(scaled).unwrap_or(MIN_ITERATIONS).max(MIN_ITERATIONS);
        }
        trial = trial.saturating_mul(NonZeroU32::MIN.saturating_add(1));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pbkdf2_is_that_of_rfc_6070_and_rfc_7914() {
        let key = pbkdf2(HashAlgorithm::Sha1, b"password", b"salt", NonZeroU32::new(4096).unwrap(), 20);
        assert_eq!(key[..8], [0x4b, 0x00, 0x79, 0x01, 0xb7, 0x65, 0x48, 0x9a]);
        // RFC 7914, section 11.
        let key = pbkdf2(HashAlgorithm::Sha256, b"passwd", b"salt", NonZeroU32::MIN, 64);
        assert_eq!(key[..8], [0x55, 0xac, 0x04, 0x6e, 0x56, 0xe3, 0x08, 0x9f]);
        assert_eq!(key[60..], [0xd3, 0xa1, 0x97, 0x83]);
    }

    #[test]
    fn iterations_are_scaled_to_the_time_asked_for() {
        // A machine that does a million iterations a second.
        let mut run = |iterations: NonZeroU32| Duration::from_micros(u64::from(iterations.get()));
        assert_eq!(scale_to(Duration::from_secs(2), &mut run).get(), 2_000_000);
        assert_eq!(scale_to(Duration::ZERO, &mut run), MIN_ITERATIONS);
        // A clock that stands still, and one that crawls.
        assert_eq!(scale_to(Duration::from_secs(1), &mut |_| Duration::ZERO).get(), u32::MAX);
        assert_eq!(scale_to(Duration::from_secs(1), &mut |_| Duration::from_secs(3600)), MIN_ITERATIONS);
    }
}
