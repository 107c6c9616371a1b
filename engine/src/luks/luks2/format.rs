//! A new LUKS2 volume, laid out as cryptsetup lays it out.

use std::num::NonZeroU32;

use base64ct::{Base64, Encoding};
use serde_json::{Map, Value, json};
use uuid::Uuid;

use super::header::{BINARY_LEN, BinaryHeader, Copy, SALT_LEN};
use super::layout::{Layout, Places};
use crate::key::{Passphrase, VolumeKey};
use crate::luks::format::{HeaderImage, PendingFormat, begin_format};
use crate::luks::hash::HashAlgorithm;
use crate::luks::kdf::{self, Argon2Cost, Argon2Error};
use crate::luks::{Disks, LuksError, Random, Segment, keyslot};
use crate::sector::{Lba512, SectorSize};

/// Keyslot areas begin and end on boundaries of so many bytes.
pub(super) const AREA_ALIGNMENT: usize = 4096;
pub(super) const SLOT_SALT_LEN: usize = 32;
pub(super) const CIPHER: &str = "aes-xts-plain64";
/// Bytes of a label, without the NUL behind it.
const MAX_LABEL: usize = 47;

/// What a new LUKS2 volume shall be.
#[derive(Clone, Debug)]
pub struct Options {
    /// How the passphrase becomes the keyslot's key: what a guess at the passphrase shall cost.
    pub kdf: KdfOptions,
    /// The hash of the digest and of the anti-forensic splitter.
    pub hash: HashAlgorithm,
    /// What a guess at the volume key itself shall cost. The key is random, so that there is nothing to guess, and few
    /// are enough.
    pub digest_iterations: NonZeroU32,
    /// The encryption unit.
    pub sector_size: SectorSize,
    /// A label of at most 47 bytes, or nothing.
    pub label: String,
    /// A second label of at most 47 bytes, or nothing.
    pub subsystem: String,
    /// What the volume will be called by.
    pub uuid: Uuid,
    /// What lies where.
    pub layout: Layout,
    /// Tokens, from 0 on: JSON objects with a `type` and with `keyslots`, of which there is the one called `"0"`.
    pub tokens: Vec<Value>,
}

/// How a passphrase becomes a keyslot's key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KdfOptions {
    /// PBKDF2: for a passphrase that cannot be guessed, as a key source makes them. See [`kdf::calibrate`].
    Pbkdf2 {
        /// The hash.
        hash: HashAlgorithm,
        /// The iterations.
        iterations: NonZeroU32,
    },
    /// Argon2id: for a passphrase that a person remembers. See [`kdf::calibrate_argon2id`].
    Argon2id(Argon2Cost),
    /// Argon2i: what cryptsetup before 2.4 made. Argon2id withstands more.
    Argon2i(Argon2Cost),
}

/// Begins to format `disks`: see [`PendingFormat`] for what must follow. Whatever is on them is lost; the caller has made
/// sure that nothing is.
///
/// # Errors
/// [`LuksError::TooSmall`], [`LuksError::Impossible`] or [`LuksError::OutOfMemory`], with the disk untouched; else what the
/// disk or the source of randomness said.
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
    let material = keyslot::material_len(key.expose().len()).next_multiple_of(AREA_ALIGNMENT);
    let places = options.layout.places(material as u64, &disks)?;
    let offset = places.data;
    let unit = options.sector_size.bytes_u64().max(disks.data().alignment() as u64);
    let len = disks.data().len().saturating_sub(offset) / unit * unit;
    let segment = Segment { offset, len, sector_size: options.sector_size, iv_start: Lba512(0) };
    if len == 0 {
        // Before the key derivation, which takes its time.
        return Err(LuksError::TooSmall { needed: offset + unit, available: disks.data().len() });
    }
    let image = image(options, places, passphrase, &key, random)?;
    begin_format(disks, image, key, segment)
}

/// Whether a text can be a label.
pub(super) fn check_label(option: &'static str, text: &str) -> Result<(), LuksError> {
    if text.len() > MAX_LABEL || text.contains(char::is_control) {
        let rule = format!("it is a text of at most {MAX_LABEL} bytes, without control characters");
        return Err(LuksError::impossible(option, format!("\"{}\"", text.escape_debug()), rule));
    }
    Ok(())
}

/// All that stands before the data: both headers and one keyslot, with zeros where the others would be.
fn image(
    options: &Options,
    places: Places,
    passphrase: &Passphrase,
    key: &VolumeKey,
    random: Random<'_>,
) -> Result<HeaderImage, LuksError> {
    let Places { metadata, keyslots, data } = places;
    // No truncation: all of them are of a few MiB.
    let [header_len, image_len] = [metadata, 2 * metadata + keyslots].map(|len| usize::try_from(len).unwrap_or(0));
    let key_len = key.expose().len();
    let mut slot_salt = [0; SLOT_SALT_LEN];
    let mut digest_salt = [0; SLOT_SALT_LEN];
    random(&mut slot_salt).map_err(LuksError::Random)?;
    random(&mut digest_salt).map_err(LuksError::Random)?;
    let slot_key = slot_key(&options.kdf, passphrase, &slot_salt, key_len)?;
    let material = keyslot::seal(options.hash, &slot_key, key.expose(), random).map_err(LuksError::Random)?;
    let digest_len = options.hash.output_len();
    let digest = kdf::pbkdf2(options.hash, key.expose(), &digest_salt, options.digest_iterations, digest_len);

    let tokens: Map<String, Value> =
        options.tokens.iter().enumerate().map(|(id, token)| (id.to_string(), token.clone())).collect();
    let json = json!({
        "keyslots": { "0": {
            "type": "luks2",
            "key_size": key_len,
            "af": { "type": "luks1", "stripes": keyslot::STRIPES, "hash": options.hash.name() },
            "area": {
                "type": "raw",
                "offset": (2 * metadata).to_string(),
                "size": material.len().next_multiple_of(AREA_ALIGNMENT).to_string(),
                "encryption": CIPHER,
                "key_size": key_len,
            },
            "kdf": kdf_json(&options.kdf, &slot_salt),
        } },
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
            "keyslots": ["0"],
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
        let rule = format!("the JSON area has {room} bytes: choose a larger metadata size");
        return Err(LuksError::impossible("tokens and metadata of", json.len(), rule));
    }
    let header = BinaryHeader {
        header_size: metadata,
        sequence_id: 1,
        label: options.label.as_str().into(),
        subsystem: options.subsystem.as_str().into(),
        checksum_algorithm: HashAlgorithm::Sha256,
        uuid: options.uuid,
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

pub(super) fn slot_key(
    options: &KdfOptions,
    passphrase: &Passphrase,
    salt: &[u8],
    len: usize,
) -> Result<VolumeKey, LuksError> {
    let mut key = match *options {
        KdfOptions::Pbkdf2 { hash, iterations } => kdf::pbkdf2(hash, passphrase.expose(), salt, iterations, len),
        KdfOptions::Argon2id(cost) | KdfOptions::Argon2i(cost) => {
            let is_id = matches!(options, KdfOptions::Argon2id(_));
            kdf::argon2(is_id, passphrase.expose(), salt, cost, len).map_err(|error| match error {
                Argon2Error::OutOfMemory => LuksError::OutOfMemory { keyslot: 0, kib: cost.memory },
                Argon2Error::Parameters => {
                    let rule = "Argon2 takes 1 pass and 1 lane at least, and 8 KiB a lane";
                    LuksError::impossible("the cost", format!("{cost:?}"), rule)
                }
            })?
        }
    };
    Ok(VolumeKey::new(std::mem::take(&mut *key))?)
}

pub(super) fn kdf_json(options: &KdfOptions, salt: &[u8]) -> Value {
    let salt = Base64::encode_string(salt);
    match options {
        KdfOptions::Pbkdf2 { hash, iterations } => {
            json!({ "type": "pbkdf2", "hash": hash.name(), "iterations": iterations.get(), "salt": salt })
        }
        KdfOptions::Argon2id(cost) | KdfOptions::Argon2i(cost) => {
            let kind = if matches!(options, KdfOptions::Argon2id(_)) { "argon2id" } else { "argon2i" };
            let Argon2Cost { time, memory, lanes } = cost;
            json!({ "type": kind, "time": time, "memory": memory, "cpus": lanes, "salt": salt })
        }
    }
}
