//! Judges whether a disk reads as noise: as the ciphertext of a volume whose header is gone.
//!
//! The judgement is statistical. It reads what a [survey](super::survey()) reads, in blocks of 4096 bytes. In each block, sectors
//! of 512 bytes that are all zero were never written, and do not count. The `n` other bytes must look as if each had been drawn
//! at random. Pearson's statistic says this, with `c[i]` for the number of bytes of the value `i`, and `e = n / 256`:
//!
//! ```text
//!   X = sum over i of (c[i] - e)² / e         100 <= X <= 640
//! ```
//! For random bytes, X is about 255 with a standard deviation of about 23. Text, tables, filesystem structures and program code
//! give thousands. A regular pattern, such as all 256 values in turn, gives nearly 0. One block outside the limits is enough: the
//! disk then does not read as noise.
//!
//! Random bytes fail with a probability below 2e-15 a block. Proof: let the counts be independent and Poisson with mean `e`. Their
//! sum is `n` with a probability of at least `1 / (sqrt(2 pi n) exp(1 / 12n))` (Stirling's formula), and given this sum, they are
//! distributed as the counts of random bytes are. So a probability under the Poisson counts, divided by this one, bounds the
//! probability that is sought. The former is bounded by Chernoff's inequality, for counts up to a limit that some count exceeds
//! with a probability below 5e-16. A test computes these bounds. A survey reads up to 30 thousand blocks, so it takes real noise
//! for something else with a probability below 1e-10.
//!
//! Data that another program compressed or encrypted reads as noise, too, unless the program wrote a signature or a block with
//! some structure. So this judgement is only for disks whose contents the user has declared expendable.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

use super::survey::{self, Survey};
use super::{Content, Signature, examine};
use crate::store::{BlockStore, read_unaligned};

/// Bytes that are judged together.
const BLOCK: usize = 4096;
/// Bytes that count only if one of them is not zero.
const SECTOR: usize = 512;
/// The least and the largest statistic of noise.
const LIMITS: std::ops::RangeInclusive<u64> = 100..=640;
/// Bytes at each end of the disk that [`ends_read_as_noise`] reads.
const END: u64 = 1 << 20;
/// Bytes that one call reads.
const PIECE: u64 = 1 << 20;

/// Returns whether a disk reads as noise, as far as a survey can tell, and has no signature. Part of the disk may never have been
/// written. A blank disk does not read as noise.
///
/// # Errors
/// The error of the disk if a read fails.
pub fn reads_as_noise(disk: &dyn BlockStore, how: &Survey<'_>) -> io::Result<bool> {
    if !may_be_noise(&examine(disk)?) {
        return Ok(false);
    }
    let reads = survey::reads(disk, 0..disk.len(), how)?;
    let (is_written, is_other) = (AtomicBool::new(false), AtomicBool::new(false));
    let results = survey::shared(&reads, |_, share| {
        let mut buffer = Vec::new();
        for range in share {
            if is_other.load(Ordering::Relaxed) {
                break;
            }
            match judge(disk, range, &mut buffer)? {
                Verdict::Zeros => {}
                Verdict::Noise => is_written.store(true, Ordering::Relaxed),
                Verdict::Other => is_other.store(true, Ordering::Relaxed),
            }
        }
        Ok(())
    });
    results.into_iter().collect::<io::Result<()>>()?;
    Ok(is_written.into_inner() && !is_other.into_inner())
}

/// Does what [`reads_as_noise`] does, but only for the first and the last MiB. A disk whose ends are blank passes.
///
/// # Errors
/// The error of the disk if a read fails.
pub fn ends_read_as_noise(disk: &dyn BlockStore) -> io::Result<bool> {
    let content = examine(disk)?;
    if !matches!(content, Content::Blank) && !may_be_noise(&content) {
        return Ok(false);
    }
    let len = disk.len();
    let mut buffer = Vec::new();
    for range in [0..len.min(END), len.saturating_sub(END) / BLOCK as u64 * BLOCK as u64..len] {
        let mut start = range.start;
        while start < range.end {
            let piece = start..range.end.min(start + PIECE);
            if judge(disk, &piece, &mut buffer)? == Verdict::Other {
                return Ok(false);
            }
            start = piece.end;
        }
    }
    Ok(true)
}

/// Returns whether a disk with this at its ends can be noise. In noise, two given bytes appear by chance once in 65536 times, and
/// two signatures are no longer than that: a boot sector's, and ext4's. The blocks around a real one are not noise.
fn may_be_noise(content: &Content) -> bool {
    let is_short =
        |mark: &Signature| mark.name == "boot sector" || (mark.offset == 1080 && mark.name.starts_with("ext"));
    match content {
        // The first MiB can be blank although the rest is not.
        Content::Blank | Content::Unknown { .. } => true,
        Content::Known(found) => found.iter().all(is_short),
        Content::Unfinished | Content::Within { .. } => false,
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Zeros,
    Noise,
    Other,
}

fn judge(disk: &dyn BlockStore, range: &Range<u64>, buffer: &mut Vec<u8>) -> io::Result<Verdict> {
    // This does not truncate, because a range is at most 1 MiB.
    buffer.resize(usize::try_from(range.end - range.start).unwrap_or(0), 0);
    read_unaligned(disk, buffer, range.start)?;
    let mut verdict = Verdict::Zeros;
    for block in buffer.chunks(BLOCK) {
        match judge_block(block) {
            Verdict::Zeros => {}
            Verdict::Noise => verdict = Verdict::Noise,
            Verdict::Other => return Ok(Verdict::Other),
        }
    }
    Ok(verdict)
}

/// Judges at most [`BLOCK`] bytes.
fn judge_block(block: &[u8]) -> Verdict {
    let mut counts = [0_u64; 256];
    let mut len = 0;
    for sector in block.chunks(SECTOR).filter(|sector| sector.iter().any(|byte| *byte != 0)) {
        if sector.len() < SECTOR {
            // Too few bytes to judge. No volume has data there.
            return Verdict::Other;
        }
        len += sector.len() as u64;
        sector.iter().for_each(|byte| counts[usize::from(*byte)] += 1);
    }
    if len == 0 {
        return Verdict::Zeros;
    }
    let expected = len / 256;
    let statistic = counts.iter().map(|count| count.abs_diff(expected).pow(2)).sum::<u64>() / expected;
    if LIMITS.contains(&statistic) { Verdict::Noise } else { Verdict::Other }
}

#[cfg(test)]
#[allow(clippy::cast_possible_truncation, clippy::cast_precision_loss, reason = "test data is small")]
mod tests {
    use super::*;
    use crate::signature::put_marker;
    use crate::store::MemoryStore;

    const LEN: usize = 20 << 20;

    /// Returns random bytes, as ciphertext has them.
    fn noise(len: usize, seed: u64) -> Vec<u8> {
        let mut state = seed;
        (0..len / 8).flat_map(|_| survey::split_mix(&mut state).to_le_bytes()).collect()
    }

    fn verdict(bytes: Vec<u8>) -> bool {
        reads_as_noise(&MemoryStore::from(bytes), &Survey::default()).unwrap()
    }

    #[test]
    fn ciphertext_reads_as_noise_wherever_it_was_written() {
        assert!(verdict(noise(LEN, 1)));
        for (offset, len) in
            [(0, 512), (512, 512), (3 << 20, 4096), (LEN - 512, 512), (8704, 11 << 20), (19 << 20, 1536)]
        {
            let mut disk = vec![0; LEN];
            disk[offset..offset + len].copy_from_slice(&noise(len, 2));
            assert!(verdict(disk), "{len} bytes at {offset}");
        }
    }

    #[test]
    fn anything_with_structure_does_not_read_as_noise() {
        assert!(!verdict(vec![0; LEN]), "blank");
        let text =
            |len: usize| b"To be, or not to be, that is the question. ".iter().copied().cycle().take(len).collect();
        let numbers = |len: usize| (0..len as u32 / 4).flat_map(u32::to_le_bytes).collect();
        let all_values = |len: usize| (0..len).map(|n| n as u8).collect();
        // Bytes below 128, and the digits of base64, which are as even as noise.
        let seven_bits = |len: usize| noise(len, 3).into_iter().map(|byte| byte & 127).collect();
        let base64 = |len: usize| noise(len, 4).into_iter().map(|byte| 43 + byte % 64).collect();
        let little = |len: usize| (0..len).map(|n| u8::from(n == 7)).collect();
        let kinds: [&dyn Fn(usize) -> Vec<u8>; 6] = [&text, &numbers, &all_values, &seven_bits, &base64, &little];
        for (kind, bytes) in kinds.iter().enumerate() {
            for offset in [0, 5 << 20, LEN - 4096] {
                let mut disk = noise(LEN, 5);
                disk[offset..offset + 4096].copy_from_slice(&bytes(4096));
                assert!(!verdict(disk), "kind {kind} at {offset}");
            }
        }
    }

    #[test]
    fn a_signature_is_never_noise() {
        for (offset, magic) in
            [(0, &b"LUKS\xba\xbe\0\x02"[..]), (0, b"XFSB"), (0x1_0040, b"_BHRfS_M"), (4096 - 10, b"SWAPSPACE2")]
        {
            let mut disk = noise(LEN, 6);
            disk[offset..offset + magic.len()].copy_from_slice(magic);
            assert!(!verdict(disk), "{magic:?}");
        }
        let mut unfinished = noise(LEN, 6);
        put_marker(&mut unfinished);
        assert!(!verdict(unfinished));
    }

    /// Ciphertext contains a magic number of two bytes by chance.
    #[test]
    fn two_bytes_in_noise_are_no_signature() {
        let mut disk = noise(LEN, 7);
        disk[510..512].copy_from_slice(&[0x55, 0xaa]);
        disk[1080..1082].copy_from_slice(&[0x53, 0xef]);
        assert!(matches!(examine(&MemoryStore::from(disk.clone()) as &dyn BlockStore).unwrap(), Content::Known(_)));
        assert!(verdict(disk.clone()));
        // A real superblock has zeros around its magic number.
        disk[1024..1080].fill(0);
        disk[1082..1200].fill(0);
        assert!(!verdict(disk));
    }

    #[test]
    fn the_ends_are_judged_in_the_same_way() {
        let ends = |bytes: &[u8]| ends_read_as_noise(&MemoryStore::from(bytes.to_vec())).unwrap();
        let mut disk = noise(LEN, 8);
        assert!(ends(&disk) && ends(&vec![0; LEN]));
        disk[9 << 20..10 << 20].fill(7);
        assert!(ends(&disk), "this is in the middle");
        disk[LEN - 512..].fill(7);
        assert!(!ends(&disk));
        assert!(!ends(&[7; 100]), "a small file");
    }

    /// The bound of the module's documentation, for blocks with 1 to 8 sectors that count.
    #[test]
    fn noise_fails_with_a_tiny_probability() {
        let (least, most) = (*LIMITS.start() as f64, *LIMITS.end() as f64 + 1.0);
        for sectors in 1..=8 {
            let expected = 2.0 * f64::from(sectors);
            let bytes = 256.0 * expected;
            let mut poisson = vec![(-expected).exp()];
            (1..400).for_each(|count| poisson.push(poisson[count - 1] * expected / count as f64));
            let by_sum = (2.0 * std::f64::consts::PI * bytes).sqrt() * (1.0 / (12.0 * bytes)).exp();
            let beyond = |limit: usize| 256.0 * poisson[limit + 1..].iter().sum::<f64>() * by_sum;
            let limit = (0..390).find(|limit| beyond(*limit) < 5e-16).unwrap();
            // The logarithm of the mean of exp(t (c - e)² / e).
            let tilted = |t: f64| {
                let terms =
                    (0..=limit).map(|count| poisson[count] * (t * (count as f64 - expected).powi(2) / expected).exp());
                256.0 * terms.sum::<f64>().ln()
            };
            let least_of = |bounds: &mut dyn Iterator<Item = f64>| bounds.fold(f64::MAX, f64::min).exp() * by_sum;
            let above = least_of(&mut (1..100).map(|n| f64::from(n) / 200.0).map(|t| tilted(t) - t * most));
            let below = least_of(&mut (1..300).map(|n| f64::from(n) / 50.0).map(|t| tilted(-t) + t * least));
            let all = beyond(limit) + above + below;
            assert!(all < 2e-15, "{sectors} sectors: {all:e}");
        }
    }
}
