//! Where a new volume's headers, key material and data lie, by cryptsetup's rules and defaults.

use super::header::HEADER_SIZES;
use super::metadata::MAX_KEYSLOTS_SIZE;
use crate::luks::{Disks, LuksError};
use crate::text::bytes;

/// The default offset of the data in bytes. Headers and key material lie before it (cryptsetup's `LUKS2_DEFAULT_HDR_SIZE`).
const DEFAULT_LEN: u64 = 16 << 20;
/// The data begins at a multiple of this number of bytes (cryptsetup's `DEFAULT_DISK_ALIGNMENT`).
const DATA_ALIGNMENT: u64 = 1 << 20;
/// Every size and offset is a multiple of this number of bytes.
const UNIT: u64 = 4096;

/// The sizes and offsets of a volume's parts. All of them are in bytes, and are multiples of 4096.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// The size of one copy of the header with its JSON: a power of two from 16 KiB to 4 MiB. There are two copies.
    pub metadata_size: u64,
    /// The size of all key material, at most 128 MiB. `None` means all of the space between the headers and the data, or up
    /// to 16 MiB if `data_offset` is not set.
    pub keyslots_size: Option<u64>,
    /// The offset of the data on its disk. `None` means the first MiB after the key material, which is usually at 16 MiB.
    /// If the header is detached, `None` means 0.
    pub data_offset: Option<u64>,
}

/// cryptsetup's defaults.
impl Default for Layout {
    fn default() -> Self {
        Self { metadata_size: HEADER_SIZES[0], keyslots_size: None, data_offset: None }
    }
}

impl Layout {
    /// Returns the length of headers and key material on a disk with enough room. A detached header needs this many bytes.
    pub fn header_len(&self) -> u64 {
        let headers = 2 * self.metadata_size;
        headers + self.keyslots_size.unwrap_or_else(|| self.usual_keyslots_size())
    }

    /// Returns the areas on `disks`, with room for at least one keyslot of `material` bytes.
    pub(super) fn areas(&self, material: u64, disks: &Disks<'_>) -> Result<Areas, LuksError> {
        let metadata = self.metadata_size;
        if !HEADER_SIZES.contains(&metadata) {
            let rule = "it must be 16K, 32K, 64K, 128K, 256K, 512K, 1M, 2M or 4M";
            return Err(LuksError::impossible("a metadata size of", bytes(metadata), rule));
        }
        let headers = 2 * metadata;
        let least = headers + material;
        let is_detached = disks.is_detached();
        if let Some(offset) = self.data_offset
            && !(offset == 0 && is_detached)
            && (offset < least || !offset.is_multiple_of(UNIT))
        {
            let rule =
                format!("it must be a multiple of {UNIT}, and at least {} for two headers and a keyslot", bytes(least));
            return Err(LuksError::impossible("the data offset", bytes(offset), rule));
        }
        let keyslots = match self.keyslots_size {
            Some(size) if !size.is_multiple_of(UNIT) || size < material || size > MAX_KEYSLOTS_SIZE => {
                let (least, most) = (bytes(material), bytes(MAX_KEYSLOTS_SIZE));
                let rule = format!("it must be a multiple of {UNIT}, from {least}, which is one keyslot, to {most}");
                return Err(LuksError::impossible("a keyslots size of", bytes(size), rule));
            }
            Some(size) => size,
            // As in cryptsetup, the key material gets only as much room as the header's disk has.
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
                let rule = format!("headers and keyslots end at {}", bytes(end));
                return Err(LuksError::impossible("the data offset", bytes(offset), rule));
            }
            Some(offset) => offset,
            None if is_detached => 0,
            None => end.next_multiple_of(DATA_ALIGNMENT),
        };
        Ok(Areas { metadata, keyslots, data })
    }

    fn usual_keyslots_size(&self) -> u64 {
        let end = self.data_offset.filter(|offset| *offset != 0).unwrap_or(DEFAULT_LEN);
        (end.saturating_sub(2 * self.metadata_size) / UNIT * UNIT).min(MAX_KEYSLOTS_SIZE)
    }
}

/// The areas of a volume's parts, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Areas {
    /// The length of one copy of the header. The second copy follows the first, and the key material follows the second.
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

    fn areas(layout: Layout) -> Result<(u64, u64, u64), String> {
        let store = MemoryStore::zeroed(40 << 20);
        let areas = layout.areas(MATERIAL, &Disks::from(&store)).map_err(|error| error.to_string())?;
        Ok((areas.metadata, areas.keyslots, areas.data))
    }

    #[test]
    fn areas_match_those_of_cryptsetup() {
        let usual = Layout::default();
        assert_eq!(areas(usual), Ok((16384, 16_744_448, 16 * MIB)));
        let [metadata, keyslots, data] = [4 * MIB, MIB, 4104 * 512];
        assert_eq!(areas(Layout { metadata_size: metadata, ..usual }), Ok((metadata, 8 * MIB, 16 * MIB)));
        let both = Layout { metadata_size: 65536, keyslots_size: Some(keyslots), ..usual };
        assert_eq!(areas(both), Ok((65536, keyslots, 2 * MIB)));
        assert_eq!(areas(Layout { data_offset: Some(data), ..usual }), Ok((16384, 2_068_480, data)));
    }

    #[test]
    fn an_impossible_layout_is_refused_with_the_rule() {
        let usual = Layout::default();
        for (layout, words) in [
            (Layout { metadata_size: 20000, ..usual }, "16K, 32K"),
            (Layout { keyslots_size: Some(100 << 10), ..usual }, "from 258048 bytes (252 KiB), which is one keyslot"),
            (Layout { keyslots_size: Some(MIB + 1), ..usual }, "multiple of 4096"),
            (Layout { keyslots_size: Some(129 * MIB), ..usual }, "to 134217728 bytes (128 MiB)"),
            (Layout { data_offset: Some(0), ..usual }, "at least 290816 bytes (284 KiB)"),
            (Layout { data_offset: Some(MIB + 512), ..usual }, "multiple of 4096"),
            (Layout { keyslots_size: Some(2 * MIB), data_offset: Some(MIB), ..usual }, "end at 2129920 bytes"),
            (
                Layout { keyslots_size: Some(64 * MIB), ..usual },
                "41943040 bytes (40 MiB), and the volume needs at least",
            ),
        ] {
            let error = areas(layout).unwrap_err();
            assert!(error.contains(words), "{layout:?}: {error}");
        }
    }

    #[test]
    fn a_detached_header_fits_into_the_room_on_its_disk() {
        let (small, data) = (MemoryStore::zeroed(600 << 10), MemoryStore::zeroed(8 << 20));
        let areas = Layout::default().areas(MATERIAL, &Disks::detached(&small, &data)).unwrap();
        assert_eq!((areas.keyslots, areas.data), (581_632, 0));
        let tiny = MemoryStore::zeroed(100 << 10);
        assert!(Layout::default().areas(MATERIAL, &Disks::detached(&tiny, &data)).is_err());
        assert_eq!(Layout::default().header_len(), data.len() * 2);
    }
}
