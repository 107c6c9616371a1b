//! A disk that remembers what was written to it, so that a test can cut the power at any moment.

use std::io;
use std::sync::Mutex;

use engine::store::{BlockStore, MemoryStore};

/// Bytes that a disk writes whole or not at all.
pub const SECTOR: usize = 512;

/// A disk in memory, and everything that was done to it.
pub struct RecordingStore {
    now: MemoryStore,
    before: Vec<u8>,
    alignment: usize,
    log: Mutex<Vec<Event>>,
}

enum Event {
    Write { offset: usize, data: Vec<u8> },
    Flush,
}

impl RecordingStore {
    /// A disk that holds `bytes` and takes whole blocks of `alignment` bytes alone.
    pub fn new(bytes: Vec<u8>, alignment: usize) -> Self {
        Self { now: MemoryStore::from(bytes.clone()), before: bytes, alignment, log: Mutex::new(Vec::new()) }
    }

    /// Shows `see` what the disk can hold after a power cut, for cuts all along the way, and whether it is the end.
    ///
    /// What was flushed is there. Of what was written since, sector by sector, any part may be: shown are the sectors in
    /// their order, up to each that `stride` divides (1: every one), and for each flush a number of mixtures, drawn with
    /// `choose`.
    pub fn cut_everywhere(&self, stride: usize, choose: &mut dyn FnMut() -> bool, see: &mut dyn FnMut(&MemoryStore)) {
        let durable = MemoryStore::from(self.before.clone());
        let mut volatile: Vec<(usize, &[u8])> = Vec::new();
        let log = self.log.lock().unwrap();
        see(&durable);
        for event in log.iter().chain([&Event::Flush]) {
            match event {
                Event::Write { offset, data } => {
                    let sectors = data.chunks(SECTOR).enumerate();
                    volatile.extend(sectors.map(|(index, sector)| (offset + index * SECTOR, sector)));
                }
                Event::Flush => {
                    for _ in 0..8 {
                        let mixture = MemoryStore::from(durable.snapshot());
                        volatile.iter().filter(|_| choose()).for_each(|sector| put(&mixture, sector));
                        see(&mixture);
                    }
                    let last = volatile.len().saturating_sub(1);
                    for (index, sector) in volatile.drain(..).enumerate() {
                        put(&durable, &sector);
                        if index < 16 || index % stride == 0 || index == last {
                            see(&durable);
                        }
                    }
                }
            }
        }
    }

    fn check(&self, offset: u64, len: usize) {
        let misaligned = !offset.is_multiple_of(self.alignment as u64) || !len.is_multiple_of(self.alignment);
        assert!(!misaligned, "{len} bytes at {offset} on a disk with blocks of {}", self.alignment);
    }
}

fn put(disk: &MemoryStore, (offset, sector): &(usize, &[u8])) {
    disk.write_at(sector, *offset as u64).unwrap();
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
        self.log.lock().unwrap().push(event);
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        self.log.lock().unwrap().push(Event::Flush);
        Ok(())
    }

    fn discard(&self, _offset: u64, _len: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}
