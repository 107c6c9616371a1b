//! Disks that record what is written to them, so that a test can simulate a power cut at any moment.

use std::io;
use std::sync::{Arc, Mutex};

use engine::store::{BlockStore, MemoryStore};

use crate::luks::noise;

/// The number of bytes that a disk writes completely or not at all.
pub const SECTOR: usize = 512;

/// How many random subsets of the unflushed sectors are tried at each flush.
const MIXTURES: usize = 8;

/// A disk in memory, with a log of its writes and flushes.
pub struct RecordingStore {
    number: usize,
    now: MemoryStore,
    before: Vec<u8>,
    alignment: usize,
    log: Arc<Mutex<Vec<(usize, Event)>>>,
}

enum Event {
    Write { offset: usize, data: Vec<u8> },
    Flush,
}

/// The content of a disk after a power cut. It records which sectors are read.
pub struct CutDisk {
    disk: MemoryStore,
    read: Mutex<Vec<bool>>,
}

/// How many power cuts were simulated, and for how many of them the test's callback ran.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cuts {
    /// The number of moments at which the power was cut.
    pub moments: usize,
    /// How often the callback ran. After a write, it runs only if a sector that it had read in its last run has changed.
    pub looked_at: usize,
}

impl RecordingStore {
    /// Makes a disk that holds `bytes`. It accepts only whole blocks of `alignment` bytes.
    pub fn new(bytes: Vec<u8>, alignment: usize) -> Self {
        Self { number: 0, now: MemoryStore::from(bytes.clone()), before: bytes, alignment, log: Arc::default() }
    }

    /// Makes a second disk that loses power at the same moment: for example, one disk for the header and one for the data.
    pub fn beside(&self, bytes: Vec<u8>) -> Self {
        let log = Arc::clone(&self.log);
        Self { number: 1, now: MemoryStore::from(bytes.clone()), before: bytes, alignment: self.alignment, log }
    }

    /// Returns what the disk holds at the end.
    pub fn snapshot(&self) -> Vec<u8> {
        self.now.snapshot()
    }

    /// Shows `see` what the disk can hold after a power cut, for a cut at every sector of every write.
    ///
    /// Flushed data is always there. Any part of the data written since the last flush may be there. `see` is called after
    /// each written sector, in the order of the writes. Before each flush, it is also called with random subsets of the
    /// sectors that are not flushed. The findings of `see` must depend only on what it reads. So if a written sector
    /// changes no sector that `see` read last time, `see` is not called again.
    pub fn cut_everywhere(&self, see: &mut dyn FnMut(&CutDisk)) -> Cuts {
        cut(&[self], &mut |disks| see(&disks[0]))
    }

    /// Does what [`Self::cut_everywhere`] does, for this disk and `other`. Each disk is flushed independently.
    pub fn cut_both_everywhere(&self, other: &Self, see: &mut dyn FnMut(&CutDisk, &CutDisk)) -> Cuts {
        cut(&[self, other], &mut |disks| see(&disks[0], &disks[1]))
    }

    fn check(&self, offset: u64, len: usize) {
        let misaligned = !offset.is_multiple_of(self.alignment as u64) || !len.is_multiple_of(self.alignment);
        assert!(!misaligned, "an access of {len} bytes at {offset} on a disk with blocks of {} bytes", self.alignment);
    }
}

type Piece<'l> = (usize, &'l [u8]);

fn cut(stores: &[&RecordingStore], see: &mut dyn FnMut(&[CutDisk])) -> Cuts {
    let log = stores[0].log.lock().unwrap();
    let mut random = noise(13);
    let mut chosen = || {
        let mut byte = [0];
        random(&mut byte).unwrap();
        byte[0] & 1 == 1
    };
    let mut durable: Vec<Vec<u8>> = stores.iter().map(|store| store.before.clone()).collect();
    let mut volatile: Vec<Vec<Piece<'_>>> = vec![Vec::new(); stores.len()];
    let disks: Vec<CutDisk> = durable.iter().cloned().map(CutDisk::new).collect();
    let mut cuts = Cuts { moments: 1, looked_at: 1 };
    see(&disks);
    let end = (0..stores.len()).map(|number| (number, Event::Flush)).collect::<Vec<_>>();
    for (number, event) in log.iter().chain(&end) {
        match event {
            Event::Write { offset, data } => {
                for piece in sectors(*offset, data) {
                    volatile[*number].push(piece);
                    cuts.moments += 1;
                    if disks[*number].put(piece) {
                        disks.iter().for_each(CutDisk::forget);
                        cuts.looked_at += 1;
                        see(&disks);
                    }
                }
            }
            Event::Flush => {
                // First all writes to one disk and no writes to the other disks, then random subsets.
                for mixture in 0..stores.len() + MIXTURES {
                    let mixed = durable.iter().zip(&volatile).enumerate().map(|(number, (durable, volatile))| {
                        let mut mixed = durable.clone();
                        let pieces = volatile.iter();
                        pieces
                            .filter(|_| if mixture < stores.len() { mixture == number } else { chosen() })
                            .for_each(|piece| put(&mut mixed, *piece));
                        CutDisk::new(mixed)
                    });
                    see(&mixed.collect::<Vec<_>>());
                    cuts.moments += 1;
                    cuts.looked_at += 1;
                }
                volatile[*number].drain(..).for_each(|piece| put(&mut durable[*number], piece));
            }
        }
    }
    cuts
}

/// Splits a write at the disk's sector boundaries. The first and the last piece may be only part of a sector.
fn sectors(mut offset: usize, mut data: &[u8]) -> Vec<Piece<'_>> {
    let mut pieces = Vec::with_capacity(data.len() / SECTOR + 2);
    while !data.is_empty() {
        let (piece, rest) = data.split_at(data.len().min(SECTOR - offset % SECTOR));
        pieces.push((offset, piece));
        (offset, data) = (offset + piece.len(), rest);
    }
    pieces
}

fn put(disk: &mut [u8], (offset, piece): Piece<'_>) {
    disk[offset..offset + piece.len()].copy_from_slice(piece);
}

impl CutDisk {
    fn new(bytes: Vec<u8>) -> Self {
        let sectors = bytes.len().div_ceil(SECTOR);
        Self { disk: MemoryStore::from(bytes), read: Mutex::new(vec![false; sectors]) }
    }

    /// Writes a piece of a sector. Returns whether this changed a sector that was read.
    fn put(&self, (offset, piece): Piece<'_>) -> bool {
        let mut now = vec![0; piece.len()];
        self.disk.read_at(&mut now, offset as u64).unwrap();
        self.disk.write_at(piece, offset as u64).unwrap();
        now != piece && self.read.lock().unwrap()[offset / SECTOR]
    }

    fn forget(&self) {
        self.read.lock().unwrap().fill(false);
    }

    /// Returns a copy of what the disk holds. This counts as reading all of it.
    pub fn snapshot(&self) -> Vec<u8> {
        self.read.lock().unwrap().fill(true);
        self.disk.snapshot()
    }
}

impl BlockStore for CutDisk {
    fn len(&self) -> u64 {
        self.disk.len()
    }

    fn read_at(&self, data: &mut [u8], offset: u64) -> io::Result<()> {
        let start = usize::try_from(offset).unwrap();
        let end = (start + data.len()).div_ceil(SECTOR);
        self.disk.read_at(data, offset)?;
        self.read.lock().unwrap()[start / SECTOR..end].fill(true);
        Ok(())
    }

    fn write_at(&self, _data: &[u8], _offset: u64) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn discard(&self, _offset: u64, _len: u64) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }
}

impl BlockStore for RecordingStore {
    fn len(&self) -> u64 {
        self.now.len()
    }

    fn alignment(&self) -> usize {
        self.alignment
    }

    fn read_at(&self, data: &mut [u8], offset: u64) -> io::Result<()> {
        self.check(offset, data.len());
        self.now.read_at(data, offset)
    }

    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        self.check(offset, data.len());
        self.now.write_at(data, offset)?;
        let event = Event::Write { offset: usize::try_from(offset).unwrap(), data: data.to_vec() };
        self.log.lock().unwrap().push((self.number, event));
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        self.log.lock().unwrap().push((self.number, Event::Flush));
        Ok(())
    }

    fn discard(&self, _offset: u64, _len: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// A view of a disk that keeps all writes to itself. The disk beneath does not change.
pub struct Scratch<'d> {
    disk: &'d dyn BlockStore,
    written: Mutex<Vec<(u64, Vec<u8>)>>,
}

impl<'d> Scratch<'d> {
    /// Makes a view of `disk` that can be written to.
    pub fn on(disk: &'d dyn BlockStore) -> Self {
        Self { disk, written: Mutex::default() }
    }
}

impl BlockStore for Scratch<'_> {
    fn len(&self) -> u64 {
        self.disk.len()
    }

    fn read_at(&self, data: &mut [u8], offset: u64) -> io::Result<()> {
        self.disk.read_at(data, offset)?;
        let end = offset + data.len() as u64;
        for (at, bytes) in self.written.lock().unwrap().iter() {
            let (from, to) = (offset.max(*at), end.min(at + bytes.len() as u64));
            if from < to {
                let [in_data, in_bytes] = [offset, *at]
                    .map(|start| usize::try_from(from - start).unwrap()..usize::try_from(to - start).unwrap());
                data[in_data].copy_from_slice(&bytes[in_bytes]);
            }
        }
        Ok(())
    }

    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        self.written.lock().unwrap().push((offset, data.to_vec()));
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn discard(&self, _offset: u64, _len: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn byte(disk: &dyn BlockStore, at: usize) -> u8 {
        let mut byte = [0];
        disk.read_at(&mut byte, at as u64).unwrap();
        byte[0]
    }

    #[test]
    fn a_change_is_shown_exactly_if_its_sector_was_read() {
        let store = RecordingStore::new(vec![0; 64 * SECTOR], 1);
        store.write_at(&[1; 40 * SECTOR], 100).unwrap();
        store.flush().unwrap();
        for sector in 1..40 {
            let mut found = Vec::new();
            let cuts = store.cut_everywhere(&mut |disk| found.push(byte(disk, sector * SECTOR)));
            // The write begins and ends within a sector. At the end of the log, every write is flushed, so there is
            // nothing to mix.
            assert_eq!(cuts.moments, 1 + 41 + 2 * (1 + MIXTURES));
            assert_eq!(cuts.looked_at, 1 + 1 + 2 * (1 + MIXTURES));
            assert_eq!(found[..2], [0, 1]);
        }
        let cuts = store.cut_everywhere(&mut |disk| drop(disk.snapshot()));
        assert_eq!(cuts.moments, cuts.looked_at);
    }

    #[test]
    fn only_unflushed_writes_can_be_missing() {
        let first = RecordingStore::new(vec![0; SECTOR], 1);
        let second = first.beside(vec![0; SECTOR]);
        first.write_at(&[1], 0).unwrap();
        second.write_at(&[1], 0).unwrap();
        second.flush().unwrap();
        second.write_at(&[2], 0).unwrap();
        let mut seen = std::collections::BTreeSet::new();
        first.cut_both_everywhere(&second, &mut |first, second| {
            seen.insert((byte(first, 0), byte(second, 0)));
        });
        let all = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)];
        assert_eq!(seen.into_iter().collect::<Vec<_>>(), all);
    }
}
