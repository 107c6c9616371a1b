//! Where a new volume's headers, key material and data lie: by cryptsetup's rules and with its defaults.

use super::header::HEADER_SIZES;
use super::metadata::MAX_KEYSLOTS_SIZE;
use crate::luks::{Disks, LuksError};

/// Headers, key material and the data's beginning together, where nothing else is asked for (cryptsetup's
/// `LUKS2_DEFAULT_HDR_SIZE`).
const DEFAULT_LEN: u64 = 16 << 20;
/// The data begins on a boundary of so many bytes (cryptsetup's `DEFAULT_DISK_ALIGNMENT`).
const DATA_ALIGNMENT: u64 = 1 << 20;
/// What every size and offset is a multiple of, in bytes.
const UNIT: u64 = 4096;

/// What shall lie where. Sizes and offsets are bytes, and multiples of 4096.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// One copy of the header with its JSON, of which there are two: 16 KiB to 4 MiB, a power of two.
    pub metadata_size: u64,
    /// All key material, 128 MiB at most; `None` is as much as there is room for within the first 16 MiB, or before the
    /// data.
    pub keyslots_size: Option<u64>,
    /// From the start of the data's disk to the data; `None` is 16 MiB, or the end of the key material, or 0 where the
    /// header is detached.
    pub data_offset: Option<u64>,
}

/// cryptsetup's defaults.
impl Default for Layout {
    fn default() -> Self {
        Self { metadata_size: HEADER_SIZES[0], keyslots_size: None, data_offset: None }
    }
}

impl Layout {
    /// Bytes that headers and key material take, on a disk that has room for them: what a detached header needs.
    pub fn header_len(&self) -> u64 {
        let headers = 2 * self.metadata_size;
        headers + self.keyslots_size.unwrap_or_else(|| self.usual_keyslots_size())
    }

    /// The places on `disks`, with room for one keyslot of `material` bytes at least.
    pub(super) fn places(&self, material: u64, disks: &Disks<'_>) -> Result<Places, LuksError> {
        let metadata = self.metadata_size;
        if !HEADER_SIZES.contains(&metadata) {
            let rule = "it is 16K, 32K, 64K, 128K, 256K, 512K, 1M, 2M or 4M";
            return Err(LuksError::impossible("a metadata size of", metadata, rule));
        }
        let headers = 2 * metadata;
        let least = headers + material;
        let is_detached = disks.is_detached();
        if let Some(offset) = self.data_offset
            && !(offset == 0 && is_detached)
            && (offset < least || !offset.is_multiple_of(UNIT))
        {
            let rule = format!("it is a multiple of {UNIT}, and at least {least}: two headers and a keyslot");
            return Err(LuksError::impossible("the data offset", offset, rule));
        }
        let keyslots = match self.keyslots_size {
            Some(size) if !size.is_multiple_of(UNIT) || size < material || size > MAX_KEYSLOTS_SIZE => {
                let rule = format!("it is a multiple of {UNIT}, from {material}, one keyslot, to {MAX_KEYSLOTS_SIZE}");
                return Err(LuksError::impossible("a keyslots size of", size, rule));
            }
            Some(size) => size,
            // As cryptsetup does: what a header's disk has no room for is not asked for.
            None if is_detached => {
                let room = disks.header().len().saturating_sub(headers) / UNIT * UNIT;
                self.usual_keyslots_size().min(room)
            }
            None => self.usual_keyslots_size(),
        };
        let end = headers + keyslots;
        if disks.header().len() < end.max(least) {
            return Err(LuksError::TooSmall { needed: end.max(least), available: disks.header().len() });
        }
        let data = match self.data_offset {
            Some(offset) if offset != 0 && offset < end => {
                let rule = format!("headers and keyslots end at {end}");
                return Err(LuksError::impossible("the data offset", offset, rule));
            }
            Some(offset) => offset,
            None if is_detached => 0,
            None => end.next_multiple_of(DATA_ALIGNMENT),
        };
        Ok(Places { metadata, keyslots, data })
    }

    fn usual_keyslots_size(&self) -> u64 {
        let end = self.data_offset.filter(|offset| *offset != 0).unwrap_or(DEFAULT_LEN);
        (end.saturating_sub(2 * self.metadata_size) / UNIT * UNIT).min(MAX_KEYSLOTS_SIZE)
    }
}

/// What lies where, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Places {
    /// One copy of the header; the second follows at once, then the key material.
    pub(super) metadata: u64,
    pub(super) keyslots: u64,
    pub(super) data: u64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{BlockStore, MemoryStore};

    const MATERIAL: u64 = 258_048;
    const MIB: u64 = 1 << 20;

    fn places(layout: Layout) -> Result<(u64, u64, u64), String> {
        let store = MemoryStore::zeroed(40 << 20);
        let places = layout.places(MATERIAL, &Disks::from(&store)).map_err(|error| error.to_string())?;
        Ok((places.metadata, places.keyslots, places.data))
    }

    #[test]
    fn places_are_those_of_cryptsetup() {
        let usual = Layout::default();
        assert_eq!(places(usual), Ok((16384, 16_744_448, 16 * MIB)));
        let [metadata, keyslots, data] = [4 * MIB, MIB, 4104 * 512];
        assert_eq!(places(Layout { metadata_size: metadata, ..usual }), Ok((metadata, 8 * MIB, 16 * MIB)));
        let both = Layout { metadata_size: 65536, keyslots_size: Some(keyslots), ..usual };
        assert_eq!(places(both), Ok((65536, keyslots, 2 * MIB)));
        assert_eq!(places(Layout { data_offset: Some(data), ..usual }), Ok((16384, 2_068_480, data)));
    }

    #[test]
    fn what_cannot_lie_there_is_refused_with_the_rule() {
        let usual = Layout::default();
        for (layout, words) in [
            (Layout { metadata_size: 20000, ..usual }, "16K, 32K"),
            (Layout { keyslots_size: Some(100 << 10), ..usual }, "from 258048, one keyslot"),
            (Layout { keyslots_size: Some(MIB + 1), ..usual }, "multiple of 4096"),
            (Layout { keyslots_size: Some(129 * MIB), ..usual }, "to 134217728"),
            (Layout { data_offset: Some(0), ..usual }, "at least 290816"),
            (Layout { data_offset: Some(MIB + 512), ..usual }, "multiple of 4096"),
            (Layout { keyslots_size: Some(2 * MIB), data_offset: Some(MIB), ..usual }, "end at 2129920"),
            (Layout { keyslots_size: Some(64 * MIB), ..usual }, "41943040 bytes, and the volume needs at least"),
        ] {
            let error = places(layout).unwrap_err();
            assert!(error.contains(words), "{layout:?}: {error}");
        }
    }

    #[test]
    fn a_detached_header_takes_the_room_that_its_disk_has() {
        let (small, data) = (MemoryStore::zeroed(600 << 10), MemoryStore::zeroed(8 << 20));
        let places = Layout::default().places(MATERIAL, &Disks::detached(&small, &data)).unwrap();
        assert_eq!((places.keyslots, places.data), (581_632, 0));
        let tiny = MemoryStore::zeroed(100 << 10);
        assert!(Layout::default().places(MATERIAL, &Disks::detached(&tiny, &data)).is_err());
        assert_eq!(Layout::default().header_len(), data.len() * 2);
    }
}
