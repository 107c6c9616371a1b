//! Plain mode: a volume without a header. The user says which key it has and where its data lies, as with `cryptsetup
//! open --type plain --cipher aes-xts-plain64`. Nothing on the disk shows whether a key is correct.

use zeroize::Zeroizing;

use super::hash::HashAlgorithm;
use super::{LuksError, keyslot};
use crate::layout::Segment;

use crate::key::{VolumeKey, VolumeKeyError};
use crate::sector::{LBA_UNIT, Lba512, SectorSize};

/// The segment of the disk that holds the data of a volume without a header. Its size may be left open, as in a LUKS2 header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlainSegment {
    /// The start of the data on the disk, in sectors of 512 bytes (cryptsetup's `--offset`).
    pub offset: u64,
    /// The length of the data in sectors of 512 bytes. `None` means up to the end of the disk (cryptsetup's `--size`).
    pub size: Option<u64>,
    /// The IV of the first sector (cryptsetup's `--skip`).
    pub skip: Lba512,
    /// The encryption unit.
    pub sector_size: SectorSize,
}

/// The whole disk, with an encryption unit of 512 bytes.
impl Default for PlainSegment {
    fn default() -> Self {
        Self { offset: 0, size: None, skip: Lba512(0), sector_size: SectorSize::B512 }
    }
}

/// How a passphrase becomes a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PassphraseHash {
    /// The key is the passphrase, padded with zeros (cryptsetup's `--hash plain`).
    Plain,
    /// The key is a hash of the passphrase. cryptsetup's default is ripemd160 before version 2.7, and sha256 since then.
    Hash(HashAlgorithm),
}

impl PassphraseHash {
    /// Returns the hash that cryptsetup calls by this name.
    pub fn from_name(name: &str) -> Option<Self> {
        if name == "plain" { Some(Self::Plain) } else { HashAlgorithm::from_name(name).map(Self::Hash) }
    }
}

/// Returns the key in a key file, which is all of the file's bytes. The file must have exactly the length of the key. A
/// truncated key would decrypt the data to noise. A key that is shorter than requested would encrypt the data more
/// weakly.
///
/// # Errors
/// [`VolumeKeyError`] if there are not exactly `key_len` bytes, or if they are not an XTS key.
pub fn key_from_file(bytes: &[u8], key_len: usize) -> Result<VolumeKey, VolumeKeyError> {
    if bytes.len() != key_len {
        return Err(VolumeKeyError::OtherLength { found: bytes.len(), wanted: key_len });
    }
    VolumeKey::new(bytes.to_vec())
}

/// Returns the key derived from a passphrase: `H(p) ‖ H("A" ‖ p) ‖ H("AA" ‖ p) ‖ …`, truncated to `key_len` bytes.
///
/// # Errors
/// [`VolumeKeyError`] if the result is not an XTS key.
pub fn key_from_passphrase(
    hash: PassphraseHash,
    passphrase: &[u8],
    key_len: usize,
) -> Result<VolumeKey, VolumeKeyError> {
    let mut key = Zeroizing::new(vec![0; key_len]);
    match hash {
        PassphraseHash::Plain => key.iter_mut().zip(passphrase).for_each(|(to, from)| *to = *from),
        PassphraseHash::Hash(hash) => {
            for (round, piece) in key.chunks_mut(hash.output_len()).enumerate() {
                let prefix = [b'A'].repeat(round);
                hash.digest_into(&[&prefix, passphrase], piece);
            }
        }
    }
    VolumeKey::new(std::mem::take(&mut *key))
}

impl PlainSegment {
    /// Returns the segment with its size on a disk of `disk_len` bytes.
    ///
    /// # Errors
    /// [`LuksError::TooSmall`] if the disk ends before the data does, or has no room for one sector of data.
    /// [`LuksError::Impossible`] if the IV of the first sector is not a multiple of the encryption unit, or if the IVs of the
    /// last sectors would exceed 2⁶⁴.
    pub fn on_disk(&self, disk_len: u64) -> Result<Segment, LuksError> {
        let sector = self.sector_size.bytes_u64();
        // dm-crypt: "Invalid iv_offset sector".
        if !self.skip.0.is_multiple_of(self.sector_size.lba_step()) {
            let rule =
                format!("with sectors of {sector} bytes, it must be a multiple of {}", self.sector_size.lba_step());
            return Err(LuksError::impossible("the skip", self.skip.0, rule));
        }
        let offset = self.offset.saturating_mul(LBA_UNIT);
        let available = disk_len.saturating_sub(offset) / sector * sector;
        let len = self.size.map_or(available, |size| size.saturating_mul(LBA_UNIT));
        if len > available || len == 0 {
            return Err(LuksError::TooSmall { needed: offset.saturating_add(len.max(sector)), available: disk_len });
        }
        // At 2⁶⁴, dm-crypt wraps to 0, so those sectors would repeat the IVs of other sectors.
        if len / LBA_UNIT - 1 > u64::MAX - self.skip.0 {
            let rule = "the IVs of the last sectors would be beyond 2^64";
            return Err(LuksError::impossible("the skip", self.skip.0, rule));
        }
        Ok(Segment { offset, len, sector_size: self.sector_size, iv_start: self.skip })
    }
}

/// Refuses a volume with IVs of 32 bits (`aes-xts-plain`) if it has sectors with higher numbers. Below 2³², this cipher
/// equals `aes-xts-plain64`. With `large_sectors` the IV counts encryption units.
///
/// # Errors
/// [`LuksError::Unsupported`] if a sector number needs more than 32 bits.
pub fn refuse_short_iv(segment: &Segment, large_sectors: bool) -> Result<(), LuksError> {
    keyslot::refuse_iv_beyond_32_bits(segment, if large_sectors { segment.sector_size.lba_step() } else { 1 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_key_is_made_of_several_hashes() {
        let passphrase = b"secret";
        let hash = PassphraseHash::from_name("sha256").unwrap();
        let key = key_from_passphrase(hash, passphrase, 64).unwrap();
        // sha256("secret"), sha256("Asecret")
        assert_eq!(key.expose()[..4], [0x2b, 0xb8, 0x0d, 0x53]);
        assert_eq!(key.expose()[32..36], [0x40, 0xa1, 0xe4, 0xd4]);
        let short = key_from_passphrase(PassphraseHash::Plain, passphrase, 32).unwrap();
        assert_eq!(short.expose()[..8], *b"secret\0\0");
        assert_eq!(PassphraseHash::from_name("md5"), None);
    }

    #[test]
    fn a_key_file_must_have_exactly_the_key_length() {
        let bytes: Vec<u8> = (0..=255).collect();
        for len in [32, 64] {
            assert_eq!(key_from_file(&bytes[..len], len).unwrap().expose(), &bytes[..len]);
            for found in [0, 10, 32, 63, 64, 65].into_iter().filter(|found| *found != len) {
                let error = key_from_file(&bytes[..found], len).unwrap_err();
                assert_eq!(error, VolumeKeyError::OtherLength { found, wanted: len });
            }
        }
    }

    #[test]
    fn a_short_iv_works_up_to_its_last_number() {
        let data = PlainSegment { skip: Lba512((1 << 32) - 128), ..PlainSegment::default() };
        assert!(refuse_short_iv(&data.on_disk(65536).unwrap(), false).is_ok());
        let error = refuse_short_iv(&data.on_disk(65536 + 512).unwrap(), false).unwrap_err().to_string();
        assert!(error.contains("aes-xts-plain with sectors up to number 4294967296"), "{error}");
        // The same data has fewer sector numbers if they count larger units.
        let data = PlainSegment { skip: Lba512(1 << 32), sector_size: SectorSize::B4096, ..PlainSegment::default() };
        let large = data.on_disk(65536).unwrap();
        assert!(refuse_short_iv(&large, true).is_ok() && refuse_short_iv(&large, false).is_err());
    }

    #[test]
    fn the_data_lies_between_offset_and_size() {
        let data =
            PlainSegment { offset: 8, skip: Lba512(80), sector_size: SectorSize::B4096, ..PlainSegment::default() };
        let whole = data.on_disk(65536 + 100).unwrap();
        assert_eq!((whole.offset, whole.len, whole.iv_start), (4096, 61440, Lba512(80)));
        let part = PlainSegment { size: Some(16), ..data }.on_disk(65536).unwrap();
        assert_eq!(part.len, 8192);
        assert!(matches!(PlainSegment { size: Some(1 << 20), ..data }.on_disk(65536), Err(LuksError::TooSmall { .. })));
        assert!(PlainSegment { offset: u64::MAX, ..data }.on_disk(65536).is_err());
        assert!(data.on_disk(4096).is_err());
        assert!(matches!(PlainSegment { skip: Lba512(7), ..data }.on_disk(65536), Err(LuksError::Impossible { .. })));
        let last = PlainSegment { offset: 0, skip: Lba512(u64::MAX - 127), ..data };
        assert_eq!(last.on_disk(65536).unwrap().len, 65536);
        assert!(matches!(last.on_disk(65536 + 4096), Err(LuksError::Impossible { .. })));
    }
}
