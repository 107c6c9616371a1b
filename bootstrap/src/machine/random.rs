//! Randomness from the kernel.

use std::io;

/// Fills `bytes` with random bytes that nobody can guess (getrandom(2)).
///
/// # Errors
/// The error of getrandom(2), if the kernel has no such call and /dev/urandom cannot be read.
pub fn fill(bytes: &mut [u8]) -> io::Result<()> {
    getrandom::fill(bytes).map_err(io::Error::other)
}
