//! Plain mode: no header at all. Key and place are what the user says they are, as with `cryptsetup open --type plain
//! --cipher aes-xts-plain64`; nothing tells a wrong key from a right one.

use zeroize::Zeroizing;

use super::hash::HashAlgorithm;
use super::{LuksError, Segment};
use crate::key::{Passphrase, VolumeKey, VolumeKeyError};
use crate::sector::{LBA_UNIT, Lba512, SectorSize};

/// Where the data of a headerless volume lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Sectors of 512 bytes from the start of the disk to the data (cryptsetup's `--offset`).
    pub offset: u64,
    /// Sectors of 512 bytes of the data; `None` is all up to the end of the disk (cryptsetup's `--size`).
    pub size: Option<u64>,
    /// The IV of the first sector (cryptsetup's `--skip`).
    pub skip: Lba512,
    /// The encryption unit.
    pub sector_size: SectorSize,
}

/// The whole disk, in sectors of 512 bytes.
impl Default for Place {
    fn default() -> Self {
        Self { offset: 0, size: None, skip: Lba512(0), sector_size: SectorSize::B512 }
    }
}

/// How a passphrase becomes a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PassphraseHash {
    /// Its own bytes, with zeros behind them (cryptsetup's `--hash plain`).
    Plain,
    /// Hashed once; cryptsetup's default is ripemd160 before version 2.7, and sha256 since.
    Hash(HashAlgorithm),
}

impl PassphraseHash {
    /// The hash of cryptsetup's name for it.
    pub fn from_name(name: &str) -> Option<Self> {
        if name == "plain" { Some(Self::Plain) } else { HashAlgorithm::from_name(name).map(Self::Hash) }
    }
}

/// The key that a key file holds: its first `key_len` bytes, as they are.
///
/// # Errors
/// [`VolumeKeyError`] when there are fewer, or they are no XTS key.
pub fn key_from_file(bytes: &Passphrase, key_len: usize) -> Result<VolumeKey, VolumeKeyError> {
    let bytes = bytes.expose();
    VolumeKey::new(bytes[..key_len.min(bytes.len())].to_vec())
}

/// The key that a passphrase makes: `H(p) ‖ H("A" ‖ p) ‖ H("AA" ‖ p) ‖ …`, cut to `key_len` bytes.
///
/// # Errors
/// [`VolumeKeyError`] when that is no XTS key.
pub fn key_from_passphrase(
    hash: PassphraseHash,
    passphrase: &Passphrase,
    key_len: usize,
) -> Result<VolumeKey, VolumeKeyError> {
    let mut key = Zeroizing::new(vec![0; key_len]);
    match hash {
        PassphraseHash::Plain => key.iter_mut().zip(passphrase.expose()).for_each(|(to, from)| *to = *from),
        PassphraseHash::Hash(hash) => {
            for (round, piece) in key.chunks_mut(hash.output_len()).enumerate() {
                let prefix = [b'A'].repeat(round);
                hash.digest_into(&[&prefix, passphrase.expose()], piece);
            }
        }
    }
    VolumeKey::new(std::mem::take(&mut *key))
}

/// Where the data lies on a disk of `disk_len` bytes.
///
/// # Errors
/// [`LuksError::TooSmall`] when the disk ends before the data does, or has no whole sector for it;
/// [`LuksError::Impossible`] when the IV of the first sector is not one of a whole sector.
pub fn segment(place: &Place, disk_len: u64) -> Result<Segment, LuksError> {
    let sector = place.sector_size.bytes_u64();
    // dm-crypt: "Invalid iv_offset sector".
    if !place.skip.0.is_multiple_of(place.sector_size.lba_step()) {
        let rule = format!("with sectors of {sector} bytes it is a multiple of {}", place.sector_size.lba_step());
        return Err(LuksError::impossible("the skip", place.skip.0, rule));
    }
    let offset = place.offset.saturating_mul(LBA_UNIT);
    let available = disk_len.saturating_sub(offset) / sector * sector;
    let len = place.size.map_or(available, |size| size.saturating_mul(LBA_UNIT));
    if len > available || len == 0 {
        return Err(LuksError::TooSmall { needed: offset.saturating_add(len.max(sector)), available: disk_len });
    }
    // The IV counts up to 2⁶⁴, and dm-crypt goes on from 0, where other sectors have their own.
    if len / LBA_UNIT - 1 > u64::MAX - place.skip.0 {
        let rule = "the IVs of the last sectors would be beyond 2^64";
        return Err(LuksError::impossible("the skip", place.skip.0, rule));
    }
    Ok(Segment { offset, len, sector_size: place.sector_size, iv_start: place.skip })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_passphrase_is_hashed_as_often_as_the_key_is_long() {
        let passphrase = Passphrase::new(b"secret".to_vec());
        let hash = PassphraseHash::from_name("sha256").unwrap();
        let key = key_from_passphrase(hash, &passphrase, 64).unwrap();
        // sha256("secret"), sha256("Asecret")
        assert_eq!(key.expose()[..4], [0x2b, 0xb8, 0x0d, 0x53]);
        assert_eq!(key.expose()[32..36], [0x40, 0xa1, 0xe4, 0xd4]);
        let short = key_from_passphrase(PassphraseHash::Plain, &passphrase, 32).unwrap();
        assert_eq!(short.expose()[..8], *b"secret\0\0");
        assert_eq!(PassphraseHash::from_name("md5"), None);
    }

    #[test]
    fn a_key_file_gives_its_first_bytes() {
        let bytes = Passphrase::new((0..=255).collect());
        assert_eq!(key_from_file(&bytes, 64).unwrap().expose(), &bytes.expose()[..64]);
        let error = key_from_file(&Passphrase::new(vec![1; 10]), 64).unwrap_err();
        assert_eq!(error, VolumeKeyError::Length(10));
    }

    #[test]
    fn the_data_lies_between_offset_and_size() {
        let place = Place { offset: 8, skip: Lba512(80), sector_size: SectorSize::B4096, ..Place::default() };
        let whole = segment(&place, 65536 + 100).unwrap();
        assert_eq!((whole.offset, whole.len, whole.iv_start), (4096, 61440, Lba512(80)));
        let part = segment(&Place { size: Some(16), ..place }, 65536).unwrap();
        assert_eq!(part.len, 8192);
        assert!(matches!(segment(&Place { size: Some(1 << 20), ..place }, 65536), Err(LuksError::TooSmall { .. })));
        assert!(segment(&Place { offset: u64::MAX, ..place }, 65536).is_err());
        assert!(segment(&place, 4096).is_err());
        assert!(matches!(segment(&Place { skip: Lba512(7), ..place }, 65536), Err(LuksError::Impossible { .. })));
        let last = Place { offset: 0, skip: Lba512(u64::MAX - 127), ..place };
        assert_eq!(segment(&last, 65536).unwrap().len, 65536);
        assert!(matches!(segment(&last, 65536 + 4096), Err(LuksError::Impossible { .. })));
    }
}
