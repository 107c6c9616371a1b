//! A new LUKS2 volume, laid out as cryptsetup lays it out.

use std::num::NonZeroU32;

use base64ct::{Base64, Encoding};
use serde_json::{Value, json};
use uuid::Uuid;

use super::header::{BINARY_LEN, BinaryHeader, Copy, SALT_LEN};
use crate::key::{Passphrase, VolumeKey};
use crate::luks::format::{HeaderImage, PendingFormat, begin_format};
use crate::luks::hash::HashAlgorithm;
use crate::luks::kdf::{self, Argon2Cost, Argon2Error};
use crate::luks::{LuksError, Random, Segment, keyslot};
use crate::sector::{Lba512, SectorSize};
use crate::store::BlockStore;

/// One copy of the header, JSON and all.
const HEADER_LEN: usize = 16 << 10;
/// Where the data begins.
const DATA_OFFSET: usize = 16 << 20;
/// Bytes of all key material.
const KEYSLOTS_LEN: usize = DATA_OFFSET - 2 * HEADER_LEN;
/// Keyslot areas begin and end on boundaries of so many bytes.
const AREA_ALIGNMENT: usize = 4096;
const SLOT_SALT_LEN: usize = 32;
const CIPHER: &str = "aes-xts-plain64";

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
    /// What the volume will be called by.
    pub uuid: Uuid,
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
}

/// Begins to format `store`: see [`PendingFormat`] for what must follow. Whatever is on the disk is lost; the caller has
/// made sure that nothing is.
///
/// # Errors
/// [`LuksError::TooSmall`] or [`LuksError::OutOfMemory`], with the disk untouched; else what the disk or the source of
/// randomness said.
pub fn begin(
    store: &dyn BlockStore,
    options: &Options,
    passphrase: &Passphrase,
    key: VolumeKey,
    random: Random<'_>,
) -> Result<PendingFormat, LuksError> {
    let image = image(options, passphrase, &key, random)?;
    let offset = DATA_OFFSET as u64;
    let unit = options.sector_size.bytes_u64().max(store.alignment() as u64);
    let len = store.len().saturating_sub(offset) / unit * unit;
    let segment = Segment { offset, len, sector_size: options.sector_size, iv_start: Lba512(0) };
    begin_format(store, image, key, segment)
}

/// All that stands before the data: both headers and one keyslot, with zeros where the others would be.
fn image(
    options: &Options,
    passphrase: &Passphrase,
    key: &VolumeKey,
    random: Random<'_>,
) -> Result<HeaderImage, LuksError> {
    if options.label.len() > 47 {
        return Err(LuksError::corrupt("label", format!("\"{}\", longer than 47 bytes", options.label)));
    }
    let key_len = key.expose().len();
    let mut slot_salt = [0; SLOT_SALT_LEN];
    let mut digest_salt = [0; SLOT_SALT_LEN];
    random(&mut slot_salt).map_err(LuksError::Random)?;
    random(&mut digest_salt).map_err(LuksError::Random)?;
    let slot_key = slot_key(&options.kdf, passphrase, &slot_salt, key_len)?;
    let material = keyslot::seal(options.hash, &slot_key, key.expose(), random).map_err(LuksError::Random)?;
    let digest_len = options.hash.output_len();
    let digest = kdf::pbkdf2(options.hash, key.expose(), &digest_salt, options.digest_iterations, digest_len);

    let json = json!({
        "keyslots": { "0": {
            "type": "luks2",
            "key_size": key_len,
            "af": { "type": "luks1", "stripes": keyslot::STRIPES, "hash": options.hash.name() },
            "area": {
                "type": "raw",
                "offset": (2 * HEADER_LEN).to_string(),
                "size": material.len().next_multiple_of(AREA_ALIGNMENT).to_string(),
                "encryption": CIPHER,
                "key_size": key_len,
            },
            "kdf": kdf_json(&options.kdf, &slot_salt),
        } },
        "tokens": {},
        "segments": { "0": {
            "type": "crypt",
            "offset": DATA_OFFSET.to_string(),
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
            "json_size": (HEADER_LEN - BINARY_LEN).to_string(),
            "keyslots_size": KEYSLOTS_LEN.to_string(),
        },
    })
    .to_string();
    let header = BinaryHeader {
        header_size: HEADER_LEN as u64,
        sequence_id: 1,
        label: options.label.clone(),
        subsystem: String::new(),
        checksum_algorithm: HashAlgorithm::Sha256,
        uuid: options.uuid,
    };
    let mut image = vec![0; DATA_OFFSET];
    for (offset, copy) in [(0, Copy::Primary), (HEADER_LEN, Copy::Secondary(HEADER_LEN as u64))] {
        let mut salt = [0; SALT_LEN];
        random(&mut salt).map_err(LuksError::Random)?;
        image[offset..offset + HEADER_LEN].copy_from_slice(&header.to_bytes(copy, salt, json.as_bytes()));
    }
    image[2 * HEADER_LEN..][..material.len()].copy_from_slice(&material);
    Ok(HeaderImage { bytes: image, secondary: Some(HEADER_LEN) })
}

fn slot_key(options: &KdfOptions, passphrase: &Passphrase, salt: &[u8], len: usize) -> Result<VolumeKey, LuksError> {
    let mut key = match *options {
        KdfOptions::Pbkdf2 { hash, iterations } => kdf::pbkdf2(hash, passphrase.expose(), salt, iterations, len),
        KdfOptions::Argon2id(cost) => {
            kdf::argon2(true, passphrase.expose(), salt, cost, len).map_err(|error| match error {
                Argon2Error::OutOfMemory => LuksError::OutOfMemory { keyslot: 0, kib: cost.memory },
                Argon2Error::Parameters => LuksError::corrupt("Argon2's cost", format!("{cost:?}, which it refuses")),
            })?
        }
    };
    Ok(VolumeKey::new(std::mem::take(&mut *key))?)
}

fn kdf_json(options: &KdfOptions, salt: &[u8]) -> Value {
    let salt = Base64::encode_string(salt);
    match options {
        KdfOptions::Pbkdf2 { hash, iterations } => {
            json!({ "type": "pbkdf2", "hash": hash.name(), "iterations": iterations.get(), "salt": salt })
        }
        KdfOptions::Argon2id(Argon2Cost { time, memory, lanes }) => {
            json!({ "type": "argon2id", "time": time, "memory": memory, "cpus": lanes, "salt": salt })
        }
    }
}
