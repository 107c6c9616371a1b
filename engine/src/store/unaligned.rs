//! Reads and writes of small pieces on a disk that accepts only whole blocks.

use std::io;
use std::ops::Range;

use super::BlockStore;
use crate::buffer::AlignedBuffer;

/// Fills `data` from the bytes at `offset`, aligned or not.
///
/// # Errors
/// The error of the disk if the read fails; `UnexpectedEof` if the range reaches past the end.
pub fn read_unaligned(store: &dyn BlockStore, data: &mut [u8], offset: u64) -> io::Result<()> {
    if is_aligned(store, data, offset) {
        return store.read_at(data, offset);
    }
    let (blocks, _, range) = blocks_around(store, data.len(), offset)?;
    data.copy_from_slice(&blocks[range]);
    Ok(())
}

/// Writes `data` at `offset`, aligned or not. Where the range covers a block only in part, the rest of the block is written
/// unchanged, so that a torn write leaves it unchanged.
///
/// # Errors
/// The error of the disk if it fails; `UnexpectedEof` if the range reaches past the end.
pub fn write_unaligned(store: &dyn BlockStore, data: &[u8], offset: u64) -> io::Result<()> {
    if is_aligned(store, data, offset) {
        return store.write_at(data, offset);
    }
    let (mut blocks, start, range) = blocks_around(store, data.len(), offset)?;
    blocks[range].copy_from_slice(data);
    store.write_at(&blocks, start)
}

fn is_aligned(store: &dyn BlockStore, data: &[u8], offset: u64) -> bool {
    (offset | data.len() as u64).is_multiple_of(store.alignment() as u64)
}

/// Reads the whole blocks that cover the `len` bytes from `offset`. Returns them, their offset on the disk, and the range of
/// the `len` bytes in them.
fn blocks_around(store: &dyn BlockStore, len: usize, offset: u64) -> io::Result<(AlignedBuffer, u64, Range<usize>)> {
    let alignment = store.alignment() as u64;
    let end = offset.checked_add(len as u64).filter(|end| *end <= store.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
    let start = offset - offset % alignment;
    let mut blocks = AlignedBuffer::try_zeroed(index(end.next_multiple_of(alignment) - start)?)?;
    store.read_at(&mut blocks, start)?;
    let skip = index(offset - start)?;
    Ok((blocks, start, skip..skip + len))
}

/// Writes zeros to the `len` bytes from `offset`. Both must be multiples of the disk's alignment.
///
/// # Errors
/// The error of the disk if a write fails.
pub fn write_zeros(store: &dyn BlockStore, offset: u64, len: u64) -> io::Result<()> {
    const CHUNK: u64 = 1 << 20;
    let zeros = AlignedBuffer::try_zeroed(index(len.min(CHUNK))?)?;
    let mut written = 0;
    while written < len {
        let piece = index((len - written).min(CHUNK))?;
        store.write_at(&zeros[..piece], offset + written)?;
        written += piece as u64;
    }
    Ok(())
}

fn index(len: u64) -> io::Result<usize> {
    usize::try_from(len).map_err(|_| io::ErrorKind::OutOfMemory.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::MemoryStore;

    /// A store in memory that refuses the requests that direct I/O refuses.
    struct Blocks(MemoryStore);

    impl BlockStore for Blocks {
        fn len(&self) -> u64 {
            self.0.len()
        }

        fn alignment(&self) -> usize {
            4096
        }

        fn read_at(&self, data: &mut [u8], offset: u64) -> io::Result<()> {
            assert!((offset | data.len() as u64).is_multiple_of(4096));
            self.0.read_at(data, offset)
        }

        fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
            assert!((offset | data.len() as u64).is_multiple_of(4096));
            self.0.write_at(data, offset)
        }

        fn flush(&self) -> io::Result<()> {
            Ok(())
        }

        fn discard(&self, _offset: u64, _len: u64) -> io::Result<()> {
            Err(io::ErrorKind::Unsupported.into())
        }
    }

    #[test]
    fn unaligned_pieces_are_read_and_written() {
        let bytes: Vec<u8> = (0..16384u32).map(|n| (n % 251).to_le_bytes()[0]).collect();
        let store = Blocks(MemoryStore::from(bytes.clone()));
        for (offset, len) in [(0usize, 0usize), (0, 1), (4095, 2), (4096, 4096), (1, 16383), (16383, 1)] {
            let mut data = vec![0; len];
            read_unaligned(&store, &mut data, offset as u64).unwrap();
            assert_eq!(data, bytes[offset..offset + len]);
        }
        let error = read_unaligned(&store, &mut [0; 2], 16383).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        assert!(read_unaligned(&store, &mut [0; 2], u64::MAX).is_err());
        write_unaligned(&store, &[0xee; 5], 4094).unwrap();
        assert_eq!(store.0.snapshot()[4094..4099], [0xee; 5]);
        assert_eq!(store.0.snapshot()[..4094], bytes[..4094]);
        assert_eq!(store.0.snapshot()[4099..], bytes[4099..]);
        assert!(write_unaligned(&store, &[0; 2], 16383).is_err());
        write_zeros(&store, 4096, 8192).unwrap();
        assert!(store.0.snapshot()[4096..12288].iter().all(|b| *b == 0));
    }
}
