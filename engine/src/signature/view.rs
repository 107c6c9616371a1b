//! A disk as the probes see it. Its two ends are read when the view is made, and the rest when a probe needs it.

use std::io;

/// Bytes read from each end. Nearly all signatures lie there.
const END: u64 = 1 << 20;

type Read<'a> = &'a dyn Fn(&mut [u8], u64) -> io::Result<()>;

pub(super) struct View<'a> {
    len: u64,
    read: Read<'a>,
    head: Vec<u8>,
    tail: Vec<u8>,
}

impl<'a> View<'a> {
    pub(super) fn new(len: u64, read: Read<'a>) -> io::Result<Self> {
        // This does not truncate, because END fits into every usize.
        let mut head = vec![0; usize::try_from(len.min(END)).unwrap_or(0)];
        read(&mut head, 0)?;
        let mut tail = vec![0; head.len()];
        let tail_start = len - tail.len() as u64;
        read(&mut tail, tail_start)?;
        Ok(Self { len, read, head, tail })
    }

    /// Returns the length of the disk in bytes.
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// Returns the first bytes of the disk.
    pub(super) fn head(&self) -> &[u8] {
        &self.head
    }

    /// Returns the `N` bytes at `offset`, or `None` if they reach past the end of the disk.
    pub(super) fn bytes<const N: usize>(&self, offset: u64) -> io::Result<Option<[u8; N]>> {
        let mut bytes = [0; N];
        Ok(self.fill(&mut bytes, offset)?.then_some(bytes))
    }

    /// Returns whether the bytes at `offset` are `magic`, which has at most 64 bytes.
    pub(super) fn has(&self, magic: &[u8], offset: u64) -> io::Result<bool> {
        let mut bytes = [0; 64];
        let bytes = &mut bytes[..magic.len()];
        Ok(self.fill(bytes, offset)? && bytes == magic)
    }

    fn fill(&self, data: &mut [u8], offset: u64) -> io::Result<bool> {
        let Some(end) = offset.checked_add(data.len() as u64).filter(|end| *end <= self.len) else {
            return Ok(false);
        };
        let tail_start = self.len - self.tail.len() as u64;
        let cached = if end <= self.head.len() as u64 {
            self.head.get(index(offset)..index(end))
        } else if offset >= tail_start {
            self.tail.get(index(offset - tail_start)..index(end - tail_start))
        } else {
            None
        };
        match cached {
            Some(bytes) => data.copy_from_slice(bytes),
            None => (self.read)(data, offset)?,
        }
        Ok(true)
    }
}

/// Converts an offset within one of the ends to an index.
fn index(offset: u64) -> usize {
    usize::try_from(offset).unwrap_or(usize::MAX)
}
