//! A new LUKS1 volume, laid out as cryptsetup lays it out.

use std::num::NonZeroU32;

use uuid::Uuid;

use super::{DIGEST_LEN, Header, KEYSLOTS, Keyslot, SALT_LEN, digest_of};
use crate::key::{Passphrase, VolumeKey};
use crate::luks::format::{HeaderImage, PendingFormat, begin_format};
use crate::luks::hash::HashAlgorithm;
use crate::luks::{Disks, LuksError, Random, Segment, kdf, keyslot};
use crate::sector::{LBA_UNIT, Lba512, SectorSize};

/// Keyslots lie on boundaries of so many bytes (cryptsetup's `LUKS_ALIGN_KEYSLOTS`), the first right behind the header.
pub(super) const KEYSLOT_ALIGNMENT: usize = 4096;
/// The data begins on a boundary of so many bytes (cryptsetup's `DEFAULT_DISK_ALIGNMENT`).
const DATA_ALIGNMENT: usize = 1 << 20;
/// `LBA_UNIT`, as an index.
const SECTOR: usize = 512;

/// What a new LUKS1 volume shall be.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// The hash of PBKDF2 and of the anti-forensic splitter.
    pub hash: HashAlgorithm,
    /// What a guess at the passphrase shall cost; see [`kdf::calibrate`].
    pub keyslot_iterations: NonZeroU32,
    /// What a guess at the volume key itself shall cost. The key is random, so that there is nothing to guess, and few
    /// are enough.
    pub digest_iterations: NonZeroU32,
    /// What the volume will be called by.
    pub uuid: Uuid,
    /// Bytes from the start of the data's disk to the data, a multiple of 4096; `None` is where cryptsetup lays it.
    pub data_offset: Option<u64>,
}

/// Bytes of a header with its keyslots, for keys of `key_len` bytes: what a detached header needs.
pub fn header_len(key_len: usize) -> u64 {
    (KEYSLOT_ALIGNMENT + spacing(key_len) * KEYSLOTS) as u64
}

/// Bytes from one keyslot to the next.
pub(super) fn spacing(key_len: usize) -> usize {
    keyslot::material_len(key_len).next_multiple_of(KEYSLOT_ALIGNMENT)
}

/// Begins to format `disks`: see [`PendingFormat`] for what must follow. Whatever is on them is lost; the caller has made
/// sure that nothing is.
///
/// # Errors
/// [`LuksError::TooSmall`] or [`LuksError::Impossible`], with the disk untouched; else what the disk or the source of
/// randomness said.
pub fn begin<'d>(
    disks: impl Into<Disks<'d>>,
    options: &Options,
    passphrase: &Passphrase,
    key: VolumeKey,
    random: Random<'_>,
) -> Result<PendingFormat, LuksError> {
    let disks = disks.into();
    let offset = data_offset(options, key.expose().len(), disks.is_detached())?;
    let payload_offset = u32::try_from(offset / LBA_UNIT)
        .map_err(|_| LuksError::impossible("the data offset", offset, "LUKS1 counts its sectors in 32 bits"))?;
    let unit = LBA_UNIT.max(disks.data().alignment() as u64);
    let len = disks.data().len().saturating_sub(offset) / unit * unit;
    let segment = Segment { offset, len, sector_size: SectorSize::B512, iv_start: Lba512(0) };
    let image = image(options, payload_offset, passphrase, &key, random)?;
    begin_format(disks, image, key, segment)
}

/// Where the data begins: behind the keyslots, or at the start of a disk that has no header.
fn data_offset(options: &Options, key_len: usize, is_detached: bool) -> Result<u64, LuksError> {
    let header = header_len(key_len);
    match options.data_offset {
        None if is_detached => Ok(0),
        None => Ok(header.next_multiple_of(DATA_ALIGNMENT as u64)),
        Some(0) if is_detached => Ok(0),
        Some(offset) if offset >= header && offset.is_multiple_of(KEYSLOT_ALIGNMENT as u64) => Ok(offset),
        Some(offset) => {
            let rule = format!("it is a multiple of 4096, and at least {header}, the header's length");
            Err(LuksError::impossible("the data offset", offset, rule))
        }
    }
}

/// All that stands before the data: the header, one keyslot, and random bytes where the other seven would be.
fn image(
    options: &Options,
    payload_offset: u32,
    passphrase: &Passphrase,
    key: &VolumeKey,
    random: Random<'_>,
) -> Result<HeaderImage, LuksError> {
    let Options { hash, keyslot_iterations, digest_iterations, uuid, .. } = *options;
    let key_len = key.expose().len();
    let material_len = keyslot::material_len(key_len);
    let spacing = spacing(key_len);

    let mut slot_salt = [0; SALT_LEN];
    let mut digest_salt = [0; SALT_LEN];
    random(&mut slot_salt).map_err(LuksError::Random)?;
    random(&mut digest_salt).map_err(LuksError::Random)?;
    let mut slot_key = kdf::pbkdf2(hash, passphrase.expose(), &slot_salt, keyslot_iterations, key_len);
    let slot_key = VolumeKey::new(std::mem::take(&mut *slot_key))?;
    let material = keyslot::seal(hash, &slot_key, key.expose(), random).map_err(LuksError::Random)?;

    let mut image = vec![0; KEYSLOT_ALIGNMENT + spacing * KEYSLOTS];
    let mut offset = KEYSLOT_ALIGNMENT;
    let keyslots = std::array::from_fn(|index| {
        let slot = Keyslot {
            enabled: index == 0,
            iterations: if index == 0 { keyslot_iterations.get() } else { 0 },
            salt: if index == 0 { slot_salt } else { [0; SALT_LEN] },
            material_offset: number(offset / SECTOR),
            stripes: number(keyslot::STRIPES),
        };
        offset += spacing;
        slot
    });
    image[KEYSLOT_ALIGNMENT..][..material_len].copy_from_slice(&material);
    for slot in 1..KEYSLOTS {
        random(&mut image[KEYSLOT_ALIGNMENT + slot * spacing..][..material_len]).map_err(LuksError::Random)?;
    }
    let digest: [u8; DIGEST_LEN] = digest_of(hash, key.expose(), &digest_salt, digest_iterations);
    let header = Header {
        cipher_name: "aes".to_owned(),
        cipher_mode: "xts-plain64".to_owned(),
        hash_spec: hash.name().to_owned(),
        payload_offset,
        key_bytes: number(key_len),
        digest,
        digest_salt,
        digest_iterations: digest_iterations.get(),
        uuid,
        keyslots,
    };
    let header = header.to_bytes();
    image[..header.len()].copy_from_slice(&header);
    Ok(HeaderImage { bytes: image, secondary: None })
}

/// A number of the header's: all of them are of a few MiB.
fn number(n: usize) -> u32 {
    u32::try_from(n).unwrap_or_else(|_| unreachable!("a header is a few MiB long"))
}
