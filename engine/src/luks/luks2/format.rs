//! Makes a new LUKS2 volume with cryptsetup's layout.

use std::num::NonZeroU32;

use base64ct::{Base64, Encoding};
use serde_json::{Map, Value, json};
use uuid::Uuid;
use zeroize::Zeroizing;

use super::Keyslot;
use super::header::{BINARY_LEN, BinaryHeader, Copy, SALT_LEN};
use super::layout::{Areas, Layout};
use super::metadata::{CIPHER, area_len};
use crate::key::{Passphrase, VolumeKey};
use crate::luks::format::{HeaderImage, PendingFormat, begin_format, segment_from};
use crate::luks::hash::HashAlgorithm;
use crate::luks::kdf::{self, KdfOptions};
use crate::luks::{Disks, LuksError, NewKey, Random, keyslot};
use crate::sector::{LBA_UNIT, SectorSize};
use crate::text::bytes;

/// The maximum length of a label in bytes, without the NUL at its end.
const MAX_LABEL: usize = 47;

/// The options of a new LUKS2 volume.
#[derive(Clone, Debug)]
pub struct Options {
    /// How the keyslot's key is derived from the passphrase, which sets the cost of guessing the passphrase.
    pub kdf: KdfOptions,
    /// The hash of the digest and of the anti-forensic splitter.
    pub hash: HashAlgorithm,
    /// The iterations of the digest, which set the cost of guessing the volume key. That key is random and cannot be guessed,
    /// so few iterations are enough.
    pub digest_iterations: NonZeroU32,
    /// The encryption unit.
    pub sector_size: SectorSize,
    /// A label of at most 47 bytes. Empty means none.
    pub label: String,
    /// A second label of at most 47 bytes. Empty means none.
    pub subsystem: String,
    /// The UUID of the volume.
    pub uuid: Uuid,
    /// The sizes and offsets of its parts.
    pub layout: Layout,
    /// The tokens, numbered from 0: JSON objects with a `type` and a list `keyslots`. The only keyslot is `"0"`.
    pub tokens: Vec<Value>,
}

/// Returns the default encryption unit of a new volume: 4096 bytes, which costs the least work per byte. If the length
/// of the disk (`disk_len` bytes) is not a multiple of 4096, the unit is 512 bytes, as in cryptsetup.
pub fn default_sector_size(disk_len: u64) -> SectorSize {
    if fits(SectorSize::B4096, disk_len) { SectorSize::B4096 } else { SectorSize::B512 }
}

/// Checks that the data on a disk of `disk_len` bytes is a whole number of sectors. cryptsetup refuses a volume whose data
/// ends within a sector.
///
/// # Errors
/// [`LuksError::Impossible`] if it is not.
pub fn check_sector_size(sector_size: SectorSize, disk_len: u64) -> Result<(), LuksError> {
    if fits(sector_size, disk_len) {
        return Ok(());
    }
    let rule = format!(
        "the data disk has {}, which is not a multiple of {sector_size} bytes, so cryptsetup would not open the volume; \
         use sectors of 512 bytes",
        bytes(disk_len)
    );
    Err(LuksError::impossible("sectors of", format!("{sector_size} bytes"), rule))
}

/// Returns where the data of a new volume begins.
///
/// # Errors
/// [`LuksError::TooSmall`] or [`LuksError::Impossible`].
pub(in crate::luks) fn data_offset(options: &Options, key_len: usize, disks: &Disks<'_>) -> Result<u64, LuksError> {
    Ok(options.layout.areas(area_len(key_len), disks)?.data)
}

/// Returns whether the data ends with a whole sector. The data begins at a multiple of 4096 bytes. The kernel counts the length
/// of a disk in units of 512 bytes.
fn fits(sector_size: SectorSize, disk_len: u64) -> bool {
    (disk_len / LBA_UNIT).is_multiple_of(sector_size.lba_step())
}

/// Begins to format `disks`. [`PendingFormat`] says what must follow. All data on the disks is lost: the caller must
/// have checked that they hold none.
///
/// # Errors
/// [`LuksError::TooSmall`], [`LuksError::Impossible`] or [`LuksError::OutOfMemory`]; the disk is then unchanged. Otherwise
/// the error of the disk or of `random`.
pub fn begin<'d>(
    disks: impl Into<Disks<'d>>,
    options: &Options,
    passphrase: &Passphrase,
    key: VolumeKey,
    random: Random<'_>,
) -> Result<PendingFormat, LuksError> {
    let disks = disks.into();
    for (option, text) in [("the label", &options.label), ("the subsystem", &options.subsystem)] {
        check_label(option, text)?;
    }
    check_sector_size(options.sector_size, disks.data().len())?;
    let areas = options.layout.areas(area_len(key.expose().len()), &disks)?;
    // This comes before the key derivation, which takes long.
    let segment = segment_from(&disks, areas.data, options.sector_size)?;
    let image = image(options, areas, Some(passphrase), &key, random)?;
    begin_format(disks, image, key, segment)
}

/// Does what [`begin`] does, but the new volume has no keyslot. So its key exists only in memory, and is lost with the process.
///
/// # Errors
/// See [`begin`].
pub(super) fn begin_without_keyslot<'d>(
    disks: impl Into<Disks<'d>>,
    options: &Options,
    key: VolumeKey,
    random: Random<'_>,
) -> Result<PendingFormat, LuksError> {
    let disks = disks.into();
    check_sector_size(options.sector_size, disks.data().len())?;
    let areas = options.layout.areas(0, &disks)?;
    let segment = segment_from(&disks, areas.data, options.sector_size)?;
    let image = image(options, areas, None, &key, random)?;
    begin_format(disks, image, key, segment)
}

/// Checks that a text can be a label.
pub(super) fn check_label(option: &'static str, text: &str) -> Result<(), LuksError> {
    if text.len() > MAX_LABEL || text.contains(char::is_control) {
        let rule = format!("it must be a text of at most {MAX_LABEL} bytes, without control characters");
        return Err(LuksError::impossible(option, format!("\"{}\"", text.escape_debug()), rule));
    }
    Ok(())
}

/// Returns everything before the data: both headers and one keyslot, with zeros for the other keyslots. Without a passphrase,
/// there is no keyslot.
fn image(
    options: &Options,
    areas: Areas,
    passphrase: Option<&Passphrase>,
    key: &VolumeKey,
    random: Random<'_>,
) -> Result<HeaderImage, LuksError> {
    let Areas { metadata, keyslots, data } = areas;
    // No truncation: all of them are a few MiB at most.
    let [header_len, image_len] = [metadata, 2 * metadata + keyslots].map(|len| usize::try_from(len).unwrap_or(0));
    let key_len = key.expose().len();
    let mut slots = Map::new();
    let mut material = Zeroizing::new(Vec::new());
    if let Some(passphrase) = passphrase {
        let new = NewKey { passphrase, kdf: options.kdf, hash: options.hash };
        let (salt, sealed) = new.seal(key, random)?;
        slots.insert("0".to_owned(), Keyslot::new(&new, &salt, key_len, 2 * metadata).to_json());
        material = sealed;
    }
    let slot_ids: Vec<&String> = slots.keys().collect();
    let mut digest_salt = [0; keyslot::SALT_LEN];
    random(&mut digest_salt).map_err(LuksError::Random)?;
    let digest_len = options.hash.output_len();
    let digest = kdf::pbkdf2(options.hash, key.expose(), &digest_salt, options.digest_iterations, digest_len);

    let tokens: Map<String, Value> =
        options.tokens.iter().enumerate().map(|(id, token)| (id.to_string(), token.clone())).collect();
    let json = json!({
        "keyslots": slots,
        "tokens": tokens,
        "segments": { "0": {
            "type": "crypt",
            "offset": data.to_string(),
            "size": "dynamic",
            "iv_tweak": "0",
            "encryption": CIPHER,
            "sector_size": options.sector_size.bytes(),
        } },
        "digests": { "0": {
            "type": "pbkdf2",
            "keyslots": slot_ids,
            "segments": ["0"],
            "hash": options.hash.name(),
            "iterations": options.digest_iterations.get(),
            "salt": Base64::encode_string(&digest_salt),
            "digest": Base64::encode_string(&digest),
        } },
        "config": {
            "json_size": (metadata - BINARY_LEN as u64).to_string(),
            "keyslots_size": keyslots.to_string(),
        },
    })
    .to_string();
    let room = metadata - BINARY_LEN as u64;
    if json.len() as u64 >= room {
        let rule = format!("the JSON area has {room} bytes; choose a larger metadata size");
        return Err(LuksError::impossible("tokens and metadata of", format!("{} bytes", json.len()), rule));
    }
    let header = BinaryHeader {
        header_size: metadata,
        sequence_id: 1,
        label: options.label.as_str().into(),
        subsystem: options.subsystem.as_str().into(),
        checksum_algorithm: HashAlgorithm::Sha256,
        uuid: options.uuid.into(),
    };
    let mut image = vec![0; image_len];
    for (offset, copy) in [(0, Copy::Primary), (header_len, Copy::Secondary(metadata))] {
        let mut salt = [0; SALT_LEN];
        random(&mut salt).map_err(LuksError::Random)?;
        image[offset..offset + header_len].copy_from_slice(&header.to_bytes(copy, salt, json.as_bytes()));
    }
    image[2 * header_len..][..material.len()].copy_from_slice(&material);
    Ok(HeaderImage { bytes: image, secondary: Some(header_len) })
}
