//! The partition header (`phdr`): the first 592 bytes of a LUKS1 volume, big-endian (specification, section 3.1).

use std::str::FromStr;

use uuid::Uuid;
use zerocopy::byteorder::big_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::luks::LuksError;
use crate::luks::keyslot::{STRIPES, material_len};
use crate::sector::LBA_UNIT;

/// `LUKS_MAGIC`, which LUKS2 shares.
pub(super) const MAGIC: [u8; 6] = *b"LUKS\xba\xbe";
/// Bytes of the header.
pub(super) const HEADER_LEN: usize = 592;
/// `LUKS_NUMKEYS`.
pub const KEYSLOTS: usize = 8;
/// `LUKS_DIGESTSIZE`.
pub const DIGEST_LEN: usize = 20;
/// `LUKS_SALTSIZE`.
pub const SALT_LEN: usize = 32;

const VERSION: u16 = 1;
/// `LUKS_KEY_ENABLED`.
pub(super) const ENABLED: u32 = 0x00AC_71F3;
/// `LUKS_KEY_DISABLED`.
pub(super) const DISABLED: u32 = 0x0000_DEAD;
/// More than any cipher's; it bounds the key material to 1 MiB a slot.
const MAX_KEY_LEN: u32 = 256;

/// A header that keeps the specification's rules: its keyslots lie behind it, in front of the data, and apart. Its cipher
/// and hash may still be ones that nbdcrypt does not do. Nothing in it is secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// The cipher's name, such as `aes`.
    pub cipher_name: String,
    /// The cipher's mode, such as `xts-plain64`.
    pub cipher_mode: String,
    /// The hash of PBKDF2 and of the anti-forensic splitter.
    pub hash_spec: String,
    /// Where the data begins, in 512-byte sectors; 0 when it is on another disk.
    pub payload_offset: u32,
    /// Bytes of the volume key.
    pub key_bytes: u32,
    /// `PBKDF2(volume key, digest_salt, digest_iterations)`: how the right key is known.
    pub digest: [u8; DIGEST_LEN],
    /// The salt of the digest.
    pub digest_salt: [u8; SALT_LEN],
    /// The iterations of the digest.
    pub digest_iterations: u32,
    /// What the volume is called by.
    pub uuid: Uuid,
    /// The keyslots.
    pub keyslots: [Keyslot; KEYSLOTS],
}

/// One of the eight places for the volume key, each under a passphrase of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Keyslot {
    /// Whether a passphrase is set.
    pub enabled: bool,
    /// The iterations that make the slot's key from the passphrase; never 0 in a slot that is enabled.
    pub iterations: u32,
    /// The salt of the slot's key.
    pub salt: [u8; SALT_LEN],
    /// Where the key material begins, in 512-byte sectors.
    pub material_offset: u32,
    /// The stripes it was split into.
    pub stripes: u32,
}

/// The header, field by field.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct RawHeader {
    pub(super) magic: [u8; 6],
    pub(super) version: U16,
    pub(super) cipher_name: [u8; 32],
    pub(super) cipher_mode: [u8; 32],
    pub(super) hash_spec: [u8; 32],
    pub(super) payload_offset: U32,
    pub(super) key_bytes: U32,
    pub(super) mk_digest: [u8; DIGEST_LEN],
    pub(super) mk_digest_salt: [u8; SALT_LEN],
    pub(super) mk_digest_iter: U32,
    pub(super) uuid: [u8; 40],
    pub(super) key_slots: [RawKeyslot; KEYSLOTS],
}

/// One of its keyslots.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct RawKeyslot {
    pub(super) active: U32,
    pub(super) iterations: U32,
    pub(super) salt: [u8; SALT_LEN],
    pub(super) key_material_offset: U32,
    pub(super) stripes: U32,
}

const _: () = assert!(size_of::<RawHeader>() == HEADER_LEN);

impl Header {
    /// Reads the header from the first bytes of a disk.
    ///
    /// # Errors
    /// [`LuksError::NotLuks`], [`LuksError::Version`], or [`LuksError::Corrupt`] with the field's name.
    pub fn parse(bytes: &[u8]) -> Result<Self, LuksError> {
        let Some(magic_and_version) = bytes.first_chunk::<8>().filter(|start| start.starts_with(&MAGIC)) else {
            return Err(LuksError::NotLuks);
        };
        let version = u16::from_be_bytes([magic_and_version[6], magic_and_version[7]]);
        if version != VERSION {
            return Err(LuksError::Version(version));
        }
        let Ok((raw, _)) = RawHeader::ref_from_prefix(bytes) else {
            return Err(LuksError::corrupt("the header", format!("cut off after {} bytes", bytes.len())));
        };
        let mut keyslots = Vec::with_capacity(KEYSLOTS);
        for (index, slot) in raw.key_slots.iter().enumerate() {
            keyslots.push(Keyslot::parse(index, slot)?);
        }
        let Ok(keyslots) = <[Keyslot; KEYSLOTS]>::try_from(keyslots) else { unreachable!("one for each raw slot") };
        let header = Self {
            cipher_name: name("cipher-name", &raw.cipher_name)?,
            cipher_mode: name("cipher-mode", &raw.cipher_mode)?,
            hash_spec: name("hash-spec", &raw.hash_spec)?,
            payload_offset: raw.payload_offset.get(),
            key_bytes: raw.key_bytes.get(),
            digest: raw.mk_digest,
            digest_salt: raw.mk_digest_salt,
            digest_iterations: raw.mk_digest_iter.get(),
            uuid: uuid(&raw.uuid)?,
            keyslots,
        };
        if header.key_bytes == 0 || header.key_bytes > MAX_KEY_LEN {
            return Err(LuksError::corrupt("key-bytes", header.key_bytes.to_string()));
        }
        if header.digest_iterations == 0 {
            return Err(LuksError::corrupt("mk-digest-iter", "0"));
        }
        header.check_areas()?;
        Ok(header)
    }

    /// The header as it stands on the disk.
    pub fn to_bytes(&self) -> [u8; HEADER_LEN] {
        let raw = RawHeader {
            magic: MAGIC,
            version: VERSION.into(),
            cipher_name: padded(&self.cipher_name),
            cipher_mode: padded(&self.cipher_mode),
            hash_spec: padded(&self.hash_spec),
            payload_offset: self.payload_offset.into(),
            key_bytes: self.key_bytes.into(),
            mk_digest: self.digest,
            mk_digest_salt: self.digest_salt,
            mk_digest_iter: self.digest_iterations.into(),
            uuid: padded(&self.uuid.hyphenated().to_string()),
            key_slots: self.keyslots.map(|slot| RawKeyslot {
                active: if slot.enabled { ENABLED } else { DISABLED }.into(),
                iterations: slot.iterations.into(),
                salt: slot.salt,
                key_material_offset: slot.material_offset.into(),
                stripes: slot.stripes.into(),
            }),
        };
        zerocopy::transmute!(raw)
    }

    /// The cipher with its mode, as dm-crypt calls it.
    pub fn cipher(&self) -> String {
        format!("{}-{}", self.cipher_name, self.cipher_mode)
    }

    /// Bytes from the start of the disk to the data.
    pub fn payload_offset_bytes(&self) -> u64 {
        u64::from(self.payload_offset) * LBA_UNIT
    }

    /// Key material lies behind the header, in front of the data, and on nothing else's.
    fn check_areas(&self) -> Result<(), LuksError> {
        let header_sectors = (HEADER_LEN as u64).div_ceil(LBA_UNIT);
        if self.payload_offset != 0 && u64::from(self.payload_offset) < header_sectors {
            return Err(LuksError::corrupt("payload-offset", format!("{}, within the header", self.payload_offset)));
        }
        // No truncation: key_bytes is at most MAX_KEY_LEN.
        let len = material_len(self.key_bytes as usize) as u64 / LBA_UNIT;
        let mut areas: Vec<(u64, usize)> =
            self.keyslots.iter().enumerate().map(|(index, slot)| (u64::from(slot.material_offset), index)).collect();
        areas.sort_unstable();
        let mut free_from = (header_sectors, "the header".to_owned());
        for (start, index) in areas {
            let field = || format!("key-material-offset of keyslot {index}");
            if start < free_from.0 {
                return Err(LuksError::corrupt(field(), format!("sector {start}, within {}", free_from.1)));
            }
            let end = start + len;
            if self.payload_offset != 0 && end > u64::from(self.payload_offset) {
                let found =
                    format!("sector {start}, so that its {len} sectors reach into the data at {}", self.payload_offset);
                return Err(LuksError::corrupt(field(), found));
            }
            free_from = (end, format!("keyslot {index}"));
        }
        Ok(())
    }
}

impl Keyslot {
    fn parse(index: usize, raw: &RawKeyslot) -> Result<Self, LuksError> {
        let field = |name: &str| format!("{name} of keyslot {index}");
        let enabled = match raw.active.get() {
            ENABLED => true,
            DISABLED => false,
            other => return Err(LuksError::corrupt(field("active"), format!("{other:#010x}"))),
        };
        if enabled && raw.iterations.get() == 0 {
            return Err(LuksError::corrupt(field("iterations"), "0"));
        }
        // Every writer uses this number; a header with another one is damaged, or hostile.
        if raw.stripes.get() as usize != STRIPES {
            return Err(LuksError::corrupt(field("stripes"), raw.stripes.get().to_string()));
        }
        Ok(Self {
            enabled,
            iterations: raw.iterations.get(),
            salt: raw.salt,
            material_offset: raw.key_material_offset.get(),
            stripes: raw.stripes.get(),
        })
    }
}

/// A name in a field that NUL bytes fill up.
fn name(field: &str, bytes: &[u8]) -> Result<String, LuksError> {
    let text = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
    if text.is_empty() || text.len() == bytes.len() || !text.iter().all(u8::is_ascii_graphic) {
        return Err(LuksError::corrupt(field, format!("\"{}\", which is no name", text.escape_ascii())));
    }
    Ok(text.iter().copied().map(char::from).collect())
}

fn uuid(bytes: &[u8]) -> Result<Uuid, LuksError> {
    let text = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
    let uuid = std::str::from_utf8(text).ok().and_then(|text| Uuid::from_str(text).ok());
    uuid.ok_or_else(|| LuksError::corrupt("uuid", format!("\"{}\"", text.escape_ascii())))
}

/// A text in a field of `N` bytes, with at least one NUL after it.
fn padded<const N: usize>(text: &str) -> [u8; N] {
    let mut field = [0; N];
    field.iter_mut().take(N - 1).zip(text.bytes()).for_each(|(to, from)| *to = from);
    field
}
