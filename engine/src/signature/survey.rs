//! Looks through a whole disk for bytes that are not zero.
//!
//! A probe of the two ends misses data behind a wiped beginning. A survey therefore reads these ranges:
//!
//! ```text
//!  0        18 MiB       1 GiB                                            4 MiB before the end
//!  ├─ all ──┼─ each MiB ─┼─ where partitions, copies of superblocks ──────┼─ all ─┤
//!  │        │            │  and allocation groups can begin               │       │
//!  ├────────┴─ SAMPLES blocks, one at a random offset of each of as many equal parts ┤
//! ```
//! If the disk reports its holes (a sparse file), the survey skips the holes. If at most [`WHOLE`] bytes remain, the survey reads
//! all of these bytes, and its answer is exact. Otherwise the survey also reads the beginning and the end of each extent. The
//! number of reads is limited for disks of any size. A disk without holes takes about seven thousand reads, most of them of 4096
//! bytes. A file of many small extents takes up to about 20 thousand reads, and 33 thousand calls of lseek(2) to find its holes.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use rayon::prelude::*;

use super::{Content, Kind, ReadAt, Signature, examine, probe_view};
use crate::signature::view::View;
use crate::store::{BlockStore, read_unaligned};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// The number of bytes at the start of the disk that are read completely. They cover a LUKS2 header of the usual size, the bytes
/// behind it that formatting wipes, and a reserve.
const HEAD: u64 = 18 * MIB;
/// The number of bytes at the end of the disk that are read completely. They cover the backups of partition tables, RAID
/// superblocks and ZFS labels at the end of the disk. They also cover such backups, superblocks and labels at the end of the last
/// partition, if this partition ends on a boundary of 1 MiB.
const TAIL: u64 = 4 * MIB;
/// A disk with at most this many allocated bytes is read completely.
const WHOLE: u64 = 64 * MIB;
/// The maximum number of bytes that are read completely because the caller will overwrite them.
const OVERWRITTEN: u64 = 256 * MIB;
/// The number of blocks that are read all over the disk.
const SAMPLES: u64 = 4096;
/// Bytes of one sample.
const BLOCK: u64 = 4096;
/// The maximum number of a file's extents that are recorded. Everything after these extents is treated as one more extent.
const MAX_EXTENTS: usize = 1 << 14;
/// The maximum number of extents whose first and last blocks are read.
const MAX_EXTENT_ENDS: usize = 4096;
/// Bytes that one call reads.
const PIECE: u64 = MIB;
/// Threads that read at the same time. They help with a network disk, which answers each read only after a millisecond.
const READERS: usize = 8;
/// If there are more reads than this, several threads share the rest.
const WORTH_THREADS: usize = 64;

/// How a disk is surveyed.
#[derive(Clone, Copy, Debug, Default)]
pub struct Survey<'a> {
    /// Determines where each sample lies within its part of the disk. A random number ensures that no data can be hidden
    /// between the samples.
    pub seed: u64,
    /// The ranges that the caller would overwrite. They are read completely, up to 256 MiB in all.
    pub overwritten: &'a [Range<u64>],
}

/// Returns what the disk holds. The caller can then tell whether overwriting the disk would lose data. [`Content::Blank`] means
/// that a survey of the whole disk found nothing.
///
/// # Errors
/// The error of the disk if a read fails.
pub fn survey(disk: &dyn BlockStore, how: &Survey<'_>) -> io::Result<Content> {
    match examine(disk)? {
        Content::Blank => {}
        Content::Unknown { offset } => return name(disk, offset),
        content => return Ok(content),
    }
    match first_written(disk, 0..disk.len(), how)? {
        None => Ok(Content::Blank),
        Some(offset) => name(disk, offset),
    }
}

/// Returns the offset of a byte in `window` that is not zero, or `None` if a survey finds no such byte. `window` is surveyed as
/// if it were a disk of its own: `how.overwritten` and the returned offset count from its start.
///
/// # Errors
/// The error of the disk if a read fails.
pub fn first_written(disk: &dyn BlockStore, window: Range<u64>, how: &Survey<'_>) -> io::Result<Option<u64>> {
    let window = window.start..window.end.min(disk.len());
    let pieces = reads(disk, window.clone(), how)?;
    Ok(first_nonzero(disk, &pieces)?.map(|offset| offset - window.start))
}

/// Returns the ranges of `window` that a survey reads, each at most 1 MiB long. The ranges that most often show what the disk holds
/// come first.
///
/// # Errors
/// The error of the disk if it cannot tell where its holes are.
pub(super) fn reads(disk: &dyn BlockStore, window: Range<u64>, how: &Survey<'_>) -> io::Result<Vec<Range<u64>>> {
    let kept = Extents::of(disk, &window)?;
    let mut reads = Vec::new();
    for range in regions(window.end.saturating_sub(window.start), how.overwritten) {
        reads.extend(kept.within(&(window.start + range.start..window.start + range.end)));
    }
    if kept.total() <= WHOLE {
        reads.clone_from(&kept.0);
    } else {
        reads.extend(kept.ends());
        reads.extend(kept.samples(how.seed));
    }
    Ok(reads.into_iter().flat_map(pieces).collect())
}

/// Returns what the non-zero byte at `offset` belongs to, if a nearby signature shows this.
///
/// # Errors
/// The error of the disk if a read fails.
pub fn name<D: ReadAt + ?Sized>(disk: &D, offset: u64) -> io::Result<Content> {
    // Partitions may begin at these offsets shortly before the byte.
    let floor = |unit: u64| offset / unit * unit;
    let starts =
        [floor(MIB), 63 * 512, 34 * 512, 40 * 512, 64 * 512, 64 << 10, 128 << 10, 512 << 10, floor(BLOCK), floor(512)];
    for start in starts.into_iter().filter(|start| *start > 0 && *start <= offset && offset - start < MIB) {
        let read = |data: &mut [u8], at: u64| disk.read_exactly(data, start + at);
        let mut found = probe_view(&View::new(disk.size() - start, &read)?)?;
        // Neither an unfinished format of nbdcrypt nor the last two bytes of a boot sector show that a partition begins
        // here.
        found.retain(|mark| mark.kind != Kind::Unfinished && mark.name != "boot sector");
        if !found.is_empty() {
            let found = found.into_iter().map(|mark| Signature { offset: mark.offset + start, ..mark }).collect();
            return Ok(Content::Within { start, found });
        }
    }
    Ok(Content::Unknown { offset })
}

/// Returns the ranges of `window` that a survey reads if the disk has no holes, in the order of their offsets.
pub(super) fn reads_of_a_disk_without_holes(window: &Range<u64>, how: &Survey<'_>) -> Vec<Range<u64>> {
    let all = Extents(vec![window.clone()]);
    let regions = regions(window.end - window.start, how.overwritten).into_iter();
    let regions = regions.map(|range| window.start + range.start..window.start + range.end);
    let mut reads: Vec<_> = regions.chain(all.samples(how.seed)).flat_map(pieces).collect();
    reads.sort_unstable_by_key(|read| (read.start, read.end));
    reads
}

/// Returns the ranges that a survey reads on every disk of `len` bytes. The ranges that most often show what the disk holds
/// come first.
fn regions(len: u64, overwritten: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut all = vec![0..HEAD, len.saturating_sub(TAIL)..len];
    let mut budget = OVERWRITTEN;
    for range in overwritten {
        let end = range.end.min(len).min(range.start.saturating_add(budget));
        budget -= end.saturating_sub(range.start);
        all.push(range.start..end);
    }
    // Partitioning programs align partitions to 1 MiB, and the first partitions begin early. Beyond the first GiB, a partition
    // often begins a MiB or two after a whole GiB, because the partitions before it have a round size.
    let near = (HEAD / MIB..GIB / MIB).map(|mib| mib * MIB);
    let far = (1..=64).flat_map(|gib| [0, 1, 2].map(|mib| gib * GIB + mib * MIB));
    for start in near.chain(far) {
        // Superblocks lie 0, 512, 1024, 4086 or 4096 bytes from the start. The superblock of btrfs lies at 64 KiB.
        all.extend([start..start + 2 * BLOCK, start + (64 << 10)..start + (64 << 10) + BLOCK]);
    }
    for start in [0, 63 * 512, MIB, 2 * MIB, 4 * MIB] {
        all.extend(superblock_copies(start).map(|offset| offset..offset + BLOCK));
        for end in [len, len / MIB * MIB, len.saturating_sub(33 * 512), len.saturating_sub(33 * 512) / MIB * MIB] {
            all.extend(xfs_groups(start, end).map(|offset| offset..offset + 2 * BLOCK));
        }
    }
    all.into_iter().map(|range| range.start..range.end.min(len)).filter(|range| !range.is_empty()).collect()
}

/// Returns where a filesystem that begins at `start` keeps the distant copies of its superblock. With blocks of 4096 bytes,
/// ext4 keeps them in group 1 and in the groups that are powers of 3, 5 and 7 (`sparse_super`). btrfs keeps them at 64 MiB and
/// 256 GiB.
fn superblock_copies(start: u64) -> impl Iterator<Item = u64> {
    const GROUP: u64 = 128 * MIB;
    let powers =
        |base: u64| (0..).map_while(move |power| base.checked_pow(power)).take_while(|group| *group <= 1 << 20);
    let ext4 = [3, 5, 7].into_iter().flat_map(powers).map(|group| group * GROUP);
    ext4.chain([64 * MIB, 256 * GIB]).map(move |offset| start + offset)
}

/// Returns the offsets of the allocation groups 1 to 3 of an xfs filesystem that lies between `start` and `end`.
/// mkfs.xfs makes four groups, each a quarter of the filesystem.
fn xfs_groups(start: u64, end: u64) -> impl Iterator<Item = u64> {
    let blocks = end.saturating_sub(start) / BLOCK;
    (1..4).map(move |group| start + group * blocks.div_ceil(4) * BLOCK)
}

/// The allocated extents of a disk, in the order of their offsets. Everything between them is a hole.
struct Extents(Vec<Range<u64>>);

impl Extents {
    fn of(disk: &dyn BlockStore, window: &Range<u64>) -> io::Result<Self> {
        let mut extents: Vec<Range<u64>> = Vec::new();
        let mut at = window.start;
        while at < window.end {
            if extents.len() == MAX_EXTENTS {
                extents.push(at..window.end);
                break;
            }
            let told = disk.allocation(at)?;
            let end = told.end.clamp(at + 1, window.end);
            if !told.is_hole {
                match extents.last_mut() {
                    Some(last) if last.end == at => last.end = end,
                    _ => extents.push(at..end),
                }
            }
            at = end;
        }
        Ok(Self(extents))
    }

    fn total(&self) -> u64 {
        self.0.iter().map(|extent| extent.end - extent.start).sum()
    }

    /// Returns the allocated parts of `range`.
    fn within(&self, range: &Range<u64>) -> impl Iterator<Item = Range<u64>> {
        let first = self.0.partition_point(|extent| extent.end <= range.start);
        let (start, end) = (range.start, range.end);
        let overlapping = self.0[first..].iter().take_while(move |extent| extent.start < end);
        overlapping.map(move |extent| extent.start.max(start)..extent.end.min(end))
    }

    /// Returns the first and the last block of each extent. If there are very many extents, uses an evenly spread selection of
    /// them.
    fn ends(&self) -> impl Iterator<Item = Range<u64>> {
        let step = self.0.len().div_ceil(MAX_EXTENT_ENDS).max(1);
        self.0.iter().step_by(step).flat_map(|extent| {
            let first = extent.start..extent.end.min(extent.start + BLOCK);
            let last = extent.end.saturating_sub(BLOCK).max(extent.start)..extent.end;
            [first, last]
        })
    }

    /// Divides the allocated bytes into [`SAMPLES`] parts of equal length and returns one block of each.
    fn samples(&self, seed: u64) -> Vec<Range<u64>> {
        let stretch = self.total() / SAMPLES;
        let mut random = seed;
        let mut extents = self.0.iter();
        let (mut extent, mut before) = (extents.next(), 0);
        let mut samples = Vec::new();
        for sample in 0..SAMPLES {
            // The position of the sample among the allocated bytes, without the holes.
            let nth = sample * stretch + split_mix(&mut random) % stretch.max(1);
            while let Some(range) = extent.filter(|range| nth >= before + (range.end - range.start)) {
                before += range.end - range.start;
                extent = extents.next();
            }
            let Some(range) = extent else { break };
            let offset = (range.start + (nth - before)) / BLOCK * BLOCK;
            samples.push(offset.max(range.start)..(offset + BLOCK).min(range.end));
        }
        samples
    }
}

/// Returns the next number of the SplitMix64 generator (Steele, Lea and Flood, 2014). The numbers are well distributed but not
/// secret.
pub(super) fn split_mix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Cuts a range into pieces of at most [`PIECE`] bytes.
fn pieces(range: Range<u64>) -> impl Iterator<Item = Range<u64>> {
    let Range { start, end } = range;
    (0..(end.saturating_sub(start)).div_ceil(PIECE)).map(move |n| start + n * PIECE..end.min(start + (n + 1) * PIECE))
}

/// Returns the offset of the first non-zero byte in the first range that has such a byte. The answer does not depend on which
/// thread is faster.
fn first_nonzero(disk: &dyn BlockStore, ranges: &[Range<u64>]) -> io::Result<Option<u64>> {
    // The first ranges most often show what the disk holds. One thread reads them. Several threads share the rest.
    let (first, rest) = ranges.split_at(ranges.len().min(WORTH_THREADS));
    if let Some(offset) = first_nonzero_of_share(disk, first, || false)? {
        return Ok(Some(offset));
    }
    // The first share that found a byte. The shares after it need not read on, the shares before it must.
    let found_in = AtomicUsize::new(usize::MAX);
    let results = shared(rest, |share, ranges| {
        let found = first_nonzero_of_share(disk, ranges, || found_in.load(Ordering::Relaxed) < share);
        if matches!(found, Ok(Some(_))) {
            found_in.fetch_min(share, Ordering::Relaxed);
        }
        found
    });
    // If one thread found a byte, the survey returns it, even if another thread failed.
    let mut failed = None;
    for result in results {
        match result {
            Ok(Some(offset)) => return Ok(Some(offset)),
            Ok(None) => {}
            Err(error) => failed = Some(error),
        }
    }
    failed.map_or(Ok(None), Err)
}

fn first_nonzero_of_share(
    disk: &dyn BlockStore,
    ranges: &[Range<u64>],
    is_needless: impl Fn() -> bool,
) -> io::Result<Option<u64>> {
    let mut buffer = Vec::new();
    for range in ranges {
        if is_needless() {
            break;
        }
        if let Some(offset) = nonzero_in(disk, range, &mut buffer)? {
            return Ok(Some(offset));
        }
    }
    Ok(None)
}

/// Calls `read` on several threads, each with the number of a share of `reads` and the share. Returns the results in the order
/// of the shares.
pub(super) fn shared<T: Send>(reads: &[Range<u64>], read: impl Fn(usize, &[Range<u64>]) -> T + Sync) -> Vec<T> {
    let shares: Vec<_> = reads.chunks(reads.len().div_ceil(READERS).max(1)).enumerate().collect();
    // If the process may not start more threads, this thread reads everything.
    match rayon::ThreadPoolBuilder::new().num_threads(READERS.min(shares.len())).build() {
        Ok(pool) if !shares.is_empty() => {
            pool.install(|| shares.par_iter().map(|(number, share)| read(*number, share)).collect())
        }
        _ => shares.iter().map(|(number, share)| read(*number, share)).collect(),
    }
}

fn nonzero_in(disk: &dyn BlockStore, range: &Range<u64>, buffer: &mut Vec<u8>) -> io::Result<Option<u64>> {
    // This does not truncate, because a range is at most 1 MiB.
    buffer.resize(usize::try_from(range.end - range.start).unwrap_or(0), 0);
    read_unaligned(disk, buffer, range.start)?;
    Ok(buffer.iter().position(|byte| *byte != 0).map(|at| range.start + at as u64))
}
