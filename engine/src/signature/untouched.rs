//! A mark at the start of a new volume's plaintext. It says that the disk still has the contents that it had before the volume
//! was made.
//!
//! A volume that is made over old data counts as blank, because nobody can read that data any more. But a survey cannot
//! tell old data from ciphertext. Therefore the mark contains a fingerprint of the ranges that a survey reads. While the
//! fingerprint matches, nothing was written to the volume. This is as certain as a survey of a blank disk. A program that
//! writes a filesystem or a partition table overwrites the mark.
//!
//! ```text
//!  0            64        72            104              4096
//!  ├─ MAGIC, 0 ─┼─ seed ──┼─ SHA-256 ───┼─ EXPLANATION, 0 ─┤
//! ```
//! The SHA-256 covers all reads in the order of their offsets: for each read, its offset (8 bytes, little-endian) and the
//! SHA-256 of its bytes.

use std::io;
use std::ops::Range;

use sha2::{Digest, Sha256};

use super::survey::{self, Survey};
use crate::store::{BlockStore, read_unaligned};

/// Bytes of the mark. This is a whole number of sectors for every sector size.
pub const UNTOUCHED_LEN: usize = 4096;

const MAGIC: &[u8] = b"nbdcrypt: new volume, nothing was written to it yet\n";
const EXPLANATION: &[u8] = b"What else this volume seems to hold was on the disk before and cannot be read.\n";
const SEED_AT: usize = 64;
const DIGEST_AT: usize = 72;
const TEXT_AT: usize = 104;

/// The mark of a volume to which nothing was written yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Untouched {
    seed: u64,
    digest: [u8; 32],
}

impl Untouched {
    /// Takes the fingerprint of `window`, the part of the disk that holds the volume's ciphertext.
    ///
    /// # Errors
    /// The error of the disk if a read fails.
    pub fn of(disk: &dyn BlockStore, window: Range<u64>, seed: u64) -> io::Result<Self> {
        let mut reads = survey::reads_of_a_disk_without_holes(&window, &Survey { seed, overwritten: &[] });
        for read in &mut reads {
            // The mark itself will be written at the start of the window.
            read.start = read.start.max(window.start + UNTOUCHED_LEN as u64);
        }
        reads.retain(|read| !read.is_empty());
        // Each read has its own digest, so the result does not depend on how the threads share the reads.
        let mut hash = Sha256::new();
        for digests in survey::shared(&reads, |_, share| digests_of(disk, share)) {
            for (read, digest) in digests? {
                hash.update(read.start.to_le_bytes());
                hash.update(digest);
            }
        }
        Ok(Self { seed, digest: hash.finalize().into() })
    }

    /// Returns the mark in the first bytes of a volume's plaintext, or `None` if there is no mark.
    pub fn parse(plaintext: &[u8; UNTOUCHED_LEN]) -> Option<Self> {
        if !plaintext.starts_with(MAGIC) {
            return None;
        }
        let seed = plaintext[SEED_AT..DIGEST_AT].try_into().ok().map(u64::from_le_bytes)?;
        let digest = plaintext[DIGEST_AT..TEXT_AT].try_into().ok()?;
        Some(Self { seed, digest })
    }

    /// Returns the mark as plaintext.
    pub fn to_bytes(self) -> [u8; UNTOUCHED_LEN] {
        let mut bytes = [0; UNTOUCHED_LEN];
        bytes[..MAGIC.len()].copy_from_slice(MAGIC);
        bytes[SEED_AT..DIGEST_AT].copy_from_slice(&self.seed.to_le_bytes());
        bytes[DIGEST_AT..TEXT_AT].copy_from_slice(&self.digest);
        bytes[TEXT_AT..TEXT_AT + EXPLANATION.len()].copy_from_slice(EXPLANATION);
        bytes
    }

    /// Returns whether the disk still has the contents that it had when the fingerprint was taken.
    ///
    /// # Errors
    /// The error of the disk if a read fails.
    pub fn is_true(self, disk: &dyn BlockStore, window: Range<u64>) -> io::Result<bool> {
        Ok(Self::of(disk, window, self.seed)? == self)
    }
}

/// Reads each of the ranges and returns its SHA-256.
fn digests_of(disk: &dyn BlockStore, reads: &[Range<u64>]) -> io::Result<Vec<(Range<u64>, [u8; 32])>> {
    let mut buffer = Vec::new();
    let digest = |read: &Range<u64>| {
        // This does not truncate, because a read is at most 1 MiB.
        buffer.resize(usize::try_from(read.end - read.start).unwrap_or(0), 0);
        read_unaligned(disk, &mut buffer, read.start)?;
        Ok((read.clone(), Sha256::digest(&buffer).into()))
    };
    reads.iter().map(digest).collect()
}
