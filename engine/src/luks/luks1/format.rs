//! Makes a new LUKS1 volume with cryptsetup's layout.

use std::num::NonZeroU32;

use uuid::Uuid;

use super::{DIGEST_LEN, Header, KEYSLOTS, Keyslot, KeyslotState, SALT_LEN};
use crate::key::{Passphrase, VolumeKey};
use crate::luks::format::{HeaderImage, PendingFormat, begin_format, segment_from};
use crate::luks::hash::HashAlgorithm;
use crate::luks::kdf::{self, KdfOptions};
use crate::luks::{Disks, LuksError, NewKey, Random, keyslot};
use crate::sector::{LBA_UNIT, SectorSize};
use crate::text::bytes;

/// Keyslots begin at multiples of this number of bytes (cryptsetup's `LUKS_ALIGN_KEYSLOTS`). The first one follows the header.
pub(super) const KEYSLOT_ALIGNMENT: usize = 4096;
/// The data begins at a multiple of this number of bytes (cryptsetup's `DEFAULT_DISK_ALIGNMENT`).
const DATA_ALIGNMENT: usize = 1 << 20;
/// [`LBA_UNIT`] as an index.
const SECTOR: usize = 512;

/// The options of a new LUKS1 volume.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// The hash of PBKDF2 and of the anti-forensic splitter.
    pub hash: HashAlgorithm,
    /// The iterations of the keyslot, which set the cost of guessing the passphrase. See [`kdf::calibrate`].
    pub keyslot_iterations: NonZeroU32,
    /// The iterations of the digest, which set the cost of guessing the volume key. That key is random and cannot be guessed,
    /// so few iterations are enough.
    pub digest_iterations: NonZeroU32,
    /// The UUID of the volume.
    pub uuid: Uuid,
    /// The offset of the data on its disk in bytes, a multiple of 4096. `None` means the offset that cryptsetup chooses.
    pub data_offset: Option<u64>,
}

/// Returns the length in bytes of a header with its keyslots, for keys of `key_len` bytes. A detached header needs this
/// many bytes.
pub fn header_len(key_len: usize) -> u64 {
    (KEYSLOT_ALIGNMENT + spacing(key_len) * KEYSLOTS) as u64
}

/// Returns the number of bytes from the start of one keyslot to the start of the next.
pub(super) fn spacing(key_len: usize) -> usize {
    keyslot::material_len(key_len).next_multiple_of(KEYSLOT_ALIGNMENT)
}

/// Begins to format `disks`. [`PendingFormat`] says what must follow. All data on the disks is lost: the caller must
/// have checked that they hold none.
///
/// # Errors
/// [`LuksError::TooSmall`] or [`LuksError::Impossible`]; the disk is then unchanged. Otherwise the error of the disk or of
/// `random`.
pub fn begin<'d>(
    disks: impl Into<Disks<'d>>,
    options: &Options,
    passphrase: &Passphrase,
    key: VolumeKey,
    random: Random<'_>,
) -> Result<PendingFormat, LuksError> {
    let disks = disks.into();
    let offset = data_offset(options, key.expose().len(), disks.is_detached())?;
    let payload_offset = u32::try_from(offset / LBA_UNIT).map_err(|_| {
        LuksError::impossible("the data offset", bytes(offset), "LUKS1 stores it as a 32-bit number of sectors")
    })?;
    let segment = segment_from(&disks, offset, SectorSize::B512)?;
    let image = image(options, payload_offset, passphrase, &key, random)?;
    begin_format(disks, image, key, segment)
}

/// Returns where the data begins: after the keyslots, or at the first byte of the disk if the header is detached.
pub(in crate::luks) fn data_offset(options: &Options, key_len: usize, is_detached: bool) -> Result<u64, LuksError> {
    let header = header_len(key_len);
    match options.data_offset {
        None if is_detached => Ok(0),
        None => Ok(header.next_multiple_of(DATA_ALIGNMENT as u64)),
        Some(0) if is_detached => Ok(0),
        Some(offset) if offset >= header && offset.is_multiple_of(KEYSLOT_ALIGNMENT as u64) => Ok(offset),
        Some(offset) => {
            let rule = format!(
                "it must be a multiple of 4096, and at least {}, which is the length of the header",
                bytes(header)
            );
            Err(LuksError::impossible("the data offset", bytes(offset), rule))
        }
    }
}

/// Returns everything before the data: the header, one keyslot, and random bytes for the other seven keyslots.
fn image(
    options: &Options,
    payload_offset: u32,
    passphrase: &Passphrase,
    key: &VolumeKey,
    random: Random<'_>,
) -> Result<HeaderImage, LuksError> {
    let Options { hash, keyslot_iterations, digest_iterations, uuid, .. } = *options;
    let key_len = key.expose().len();
    let spacing = spacing(key_len);

    let kdf = KdfOptions::Pbkdf2 { hash, iterations: keyslot_iterations };
    let (slot_salt, material) = NewKey { passphrase, kdf, hash }.seal(key, random)?;
    let mut digest_salt = [0; SALT_LEN];
    random(&mut digest_salt).map_err(LuksError::Random)?;
    let mut digest = [0; DIGEST_LEN];
    digest.copy_from_slice(&kdf::pbkdf2(hash, key.expose(), &digest_salt, digest_iterations, DIGEST_LEN));

    let mut image = vec![0; KEYSLOT_ALIGNMENT + spacing * KEYSLOTS];
    let mut offset = KEYSLOT_ALIGNMENT;
    let keyslots = std::array::from_fn(|index| {
        let slot = Keyslot {
            state: if index == 0 { KeyslotState::Enabled } else { KeyslotState::Disabled },
            iterations: if index == 0 { keyslot_iterations.get() } else { 0 },
            salt: if index == 0 { slot_salt } else { [0; SALT_LEN] },
            material_offset: number(offset / SECTOR),
            stripes: number(keyslot::STRIPES),
        };
        offset += spacing;
        slot
    });
    image[KEYSLOT_ALIGNMENT..][..material.len()].copy_from_slice(&material);
    for slot in 1..KEYSLOTS {
        random(&mut image[KEYSLOT_ALIGNMENT + slot * spacing..][..material.len()]).map_err(LuksError::Random)?;
    }
    let header = Header {
        cipher_name: "aes".to_owned(),
        cipher_mode: "xts-plain64".to_owned(),
        hash_spec: hash.name().to_owned(),
        payload_offset,
        key_bytes: number(key_len),
        digest,
        digest_salt,
        digest_iterations: digest_iterations.get(),
        uuid: uuid.into(),
        keyslots,
    };
    let header = header.to_bytes();
    image[..header.len()].copy_from_slice(&header);
    Ok(HeaderImage { bytes: image, secondary: None })
}

/// Converts a number for a header field. All of these numbers are small, because a header is a few MiB long.
fn number(n: usize) -> u32 {
    u32::try_from(n).unwrap_or_else(|_| unreachable!("a header is a few MiB long"))
}
