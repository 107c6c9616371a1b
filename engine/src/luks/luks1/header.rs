//! The partition header (`phdr`): the first 592 bytes of a LUKS1 volume, big-endian (specification, section 3.1).

use zerocopy::byteorder::big_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::luks::keyslot::{self, STRIPES, material_len};
use crate::luks::{HeaderUuid, LuksError};
use crate::sector::LBA_UNIT;
use crate::signature::LUKS_MAGIC;

/// `LUKS_MAGIC`. LUKS2 uses the same magic for its first header.
pub(super) const MAGIC: [u8; 6] = LUKS_MAGIC;
/// The length of the header in bytes.
pub(super) const HEADER_LEN: usize = 592;
/// `LUKS_NUMKEYS`.
pub const KEYSLOTS: usize = 8;
/// `LUKS_DIGESTSIZE`.
pub const DIGEST_LEN: usize = 20;
/// `LUKS_SALTSIZE`.
pub const SALT_LEN: usize = keyslot::SALT_LEN;

const VERSION: u16 = 1;
/// `LUKS_KEY_ENABLED`.
pub(super) const ENABLED: u32 = 0x00AC_71F3;
/// `LUKS_KEY_DISABLED`.
pub(super) const DISABLED: u32 = 0x0000_DEAD;
/// The maximum key length in bytes. Every cipher's key is shorter. This limits the key material to 1 MiB per keyslot.
const MAX_KEY_LEN: u32 = 256;

/// A header that satisfies the specification: its keyslots lie after it, before the data, and do not overlap. nbdcrypt
/// may still not support its cipher or hash. A header contains no secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// The cipher's name, such as `aes`.
    pub cipher_name: String,
    /// The cipher's mode, such as `xts-plain64`.
    pub cipher_mode: String,
    /// The hash of PBKDF2 and of the anti-forensic splitter.
    pub hash_spec: String,
    /// The offset of the data in 512-byte sectors. 0 means that the data is on another disk.
    pub payload_offset: u32,
    /// The length of the volume key in bytes.
    pub key_bytes: u32,
    /// `PBKDF2(volume key, digest_salt, digest_iterations)`, which confirms that a key is correct.
    pub digest: [u8; DIGEST_LEN],
    /// The salt of the digest.
    pub digest_salt: [u8; SALT_LEN],
    /// The iterations of the digest.
    pub digest_iterations: u32,
    /// The UUID of the volume.
    pub uuid: HeaderUuid,
    /// The keyslots.
    pub keyslots: [Keyslot; KEYSLOTS],
}

/// Whether a keyslot holds the volume key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyslotState {
    /// `LUKS_KEY_ENABLED`: the keyslot is in use.
    Enabled,
    /// `LUKS_KEY_DISABLED`: the keyslot is free.
    Disabled,
    /// The field has another value. Like cryptsetup, nbdcrypt neither tries nor writes this keyslot, and uses the others.
    Undecided(u32),
}

impl KeyslotState {
    fn from_word(word: u32) -> Self {
        match word {
            ENABLED => Self::Enabled,
            DISABLED => Self::Disabled,
            other => Self::Undecided(other),
        }
    }

    fn word(self) -> u32 {
        match self {
            Self::Enabled => ENABLED,
            Self::Disabled => DISABLED,
            Self::Undecided(word) => word,
        }
    }
}

/// One of the eight keyslots. Each can hold the volume key under its own passphrase.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Keyslot {
    /// Whether the keyslot is in use.
    pub state: KeyslotState,
    /// The iterations with which the keyslot's key is derived from the passphrase. A keyslot with 0 iterations never opens.
    pub iterations: u32,
    /// The salt of the keyslot's key.
    pub salt: [u8; SALT_LEN],
    /// The offset of the key material in 512-byte sectors.
    pub material_offset: u32,
    /// The number of stripes that the key was split into.
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

/// A keyslot of [`RawHeader`].
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
    /// Parses the header from the first bytes of a disk.
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
            uuid: HeaderUuid::from_field(&raw.uuid),
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

    /// Returns the bytes of the header as they are on the disk.
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
            uuid: self.uuid.to_field(),
            key_slots: self.keyslots.map(|slot| RawKeyslot {
                active: slot.state.word().into(),
                iterations: slot.iterations.into(),
                salt: slot.salt,
                key_material_offset: slot.material_offset.into(),
                stripes: slot.stripes.into(),
            }),
        };
        zerocopy::transmute!(raw)
    }

    /// Returns the keyslot with this number, if it is in use.
    ///
    /// # Errors
    /// [`LuksError::NoSuchKeyslot`], or [`LuksError::UndecidedKeyslot`] if its state is damaged.
    pub(super) fn enabled_keyslot(&self, index: usize) -> Result<&Keyslot, LuksError> {
        match self.keyslots.get(index).map(|slot| (slot, slot.state)) {
            Some((slot, KeyslotState::Enabled)) => Ok(slot),
            Some((_, KeyslotState::Undecided(state))) => Err(LuksError::UndecidedKeyslot { keyslot: index, state }),
            Some((_, KeyslotState::Disabled)) | None => Err(LuksError::NoSuchKeyslot(index)),
        }
    }

    /// Returns the number of the keyslot for a new key: `wanted`, or the first free keyslot.
    ///
    /// # Errors
    /// See [`keyslot::free`].
    pub(in crate::luks) fn free_keyslot(&self, wanted: Option<usize>) -> Result<usize, LuksError> {
        keyslot::free(wanted, "LUKS1", KEYSLOTS, |index| match self.keyslots[index].state {
            KeyslotState::Disabled => Ok(()),
            KeyslotState::Enabled => Err(LuksError::KeyslotInUse(index)),
            KeyslotState::Undecided(state) => Err(LuksError::UndecidedKeyslot { keyslot: index, state }),
        })
    }

    /// Returns the cipher and its mode, as dm-crypt spells them.
    pub fn cipher(&self) -> String {
        format!("{}-{}", self.cipher_name, self.cipher_mode)
    }

    /// Returns the offset of the data in bytes.
    pub fn payload_offset_bytes(&self) -> u64 {
        u64::from(self.payload_offset) * LBA_UNIT
    }

    /// Returns the first byte after all key material.
    pub(super) fn end_of_keyslots(&self) -> u64 {
        // No truncation: key_bytes is at most MAX_KEY_LEN.
        let len = material_len(self.key_bytes as usize) as u64;
        let last = self.keyslots.iter().map(|slot| slot.material_offset).max().unwrap_or(0);
        u64::from(last) * LBA_UNIT + len
    }

    /// Checks that key material lies after the header and before the data, and that no two areas overlap.
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
                let found = format!(
                    "sector {start}, so its {len} sectors reach into the data at sector {}",
                    self.payload_offset
                );
                return Err(LuksError::corrupt(field(), found));
            }
            free_from = (end, format!("keyslot {index}"));
        }
        Ok(())
    }
}

impl Keyslot {
    /// Returns whether the keyslot is in use.
    pub fn is_enabled(&self) -> bool {
        self.state == KeyslotState::Enabled
    }

    /// Returns the offset of the key material in bytes.
    pub(super) fn material_at(&self) -> u64 {
        u64::from(self.material_offset) * LBA_UNIT
    }

    fn parse(index: usize, raw: &RawKeyslot) -> Result<Self, LuksError> {
        let field = |name: &str| format!("{name} of keyslot {index}");
        // Every program writes this number. A header with another number is damaged or malicious.
        if raw.stripes.get() as usize != STRIPES {
            return Err(LuksError::corrupt(field("stripes"), raw.stripes.get().to_string()));
        }
        Ok(Self {
            state: KeyslotState::from_word(raw.active.get()),
            iterations: raw.iterations.get(),
            salt: raw.salt,
            material_offset: raw.key_material_offset.get(),
            stripes: raw.stripes.get(),
        })
    }
}

/// Reads a name that is padded with NULs.
fn name(field: &str, bytes: &[u8]) -> Result<String, LuksError> {
    let text = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
    if text.is_empty() || text.len() == bytes.len() || !text.iter().all(u8::is_ascii_graphic) {
        return Err(LuksError::corrupt(field, format!("\"{}\", which is not a name", text.escape_ascii())));
    }
    Ok(text.iter().copied().map(char::from).collect())
}

/// Returns a text in a field of `N` bytes, with at least one NUL after it.
fn padded<const N: usize>(text: &str) -> [u8; N] {
    let mut field = [0; N];
    field.iter_mut().take(N - 1).zip(text.bytes()).for_each(|(to, from)| *to = from);
    field
}
