//! A disk in memory, for tests, for benchmarks, and for exports that live only as long as their server.

use std::io;
use std::sync::RwLock;

use super::{BlockStore, Medium};

/// Bytes behind a lock. A flush does nothing, because there is no other storage to write to.
pub struct MemoryStore {
    len: u64,
    bytes: RwLock<Vec<u8>>,
}

impl MemoryStore {
    /// Returns a disk of `len` zero bytes.
    pub fn zeroed(len: usize) -> Self {
        Self::from(vec![0; len])
    }

    /// Returns a copy of the bytes that the disk holds now.
    pub fn snapshot(&self) -> Vec<u8> {
        self.bytes.read().unwrap_or_else(std::sync::PoisonError::into_inner).clone()
    }

    fn range(&self, offset: u64, len: usize) -> io::Result<std::ops::Range<usize>> {
        let start = usize::try_from(offset).ok();
        let end = start.and_then(|start| start.checked_add(len)).filter(|end| *end as u64 <= self.len);
        match (start, end) {
            (Some(start), Some(end)) => Ok(start..end),
            _ => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }
}

impl From<Vec<u8>> for MemoryStore {
    fn from(bytes: Vec<u8>) -> Self {
        Self { len: bytes.len() as u64, bytes: RwLock::new(bytes) }
    }
}

impl BlockStore for MemoryStore {
    fn medium(&self) -> Medium<'_> {
        Medium::Memory
    }

    fn len(&self) -> u64 {
        self.len
    }

    fn read_at(&self, data: &mut [u8], offset: u64) -> io::Result<()> {
        let range = self.range(offset, data.len())?;
        data.copy_from_slice(&self.bytes.read().unwrap_or_else(std::sync::PoisonError::into_inner)[range]);
        Ok(())
    }

    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        let range = self.range(offset, data.len())?;
        self.bytes.write().unwrap_or_else(std::sync::PoisonError::into_inner)[range].copy_from_slice(data);
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        let len = usize::try_from(len).map_err(|_| io::ErrorKind::UnexpectedEof)?;
        let range = self.range(offset, len)?;
        self.bytes.write().unwrap_or_else(std::sync::PoisonError::into_inner)[range].fill(0);
        Ok(())
    }
}
