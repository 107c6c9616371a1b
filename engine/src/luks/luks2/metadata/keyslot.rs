//! The keyslots: where the key material lies, and how a passphrase opens it.

use serde_json::{Number, Value, json};

use super::fault::{Fault, Faults};
use super::field::Field;
use super::kdf::Kdf;
use super::priority::KeyslotPriority;
use crate::luks::keyslot::{STRIPES, material_len};
use crate::luks::{LuksError, NewKey};

/// The maximum key length in bytes. Every cipher's key is shorter.
const MAX_KEY_LEN: u32 = 512;
/// The cipher of everything that nbdcrypt writes.
pub(in crate::luks::luks2) const CIPHER: &str = "aes-xts-plain64";
/// Keyslot areas begin and end on multiples of this number of bytes.
pub(in crate::luks::luks2) const AREA_ALIGNMENT: u64 = 4096;

/// Returns the length in bytes of the area that a keyslot for a key of `key_len` bytes takes.
pub(in crate::luks::luks2) fn area_len(key_len: usize) -> u64 {
    (material_len(key_len) as u64).next_multiple_of(AREA_ALIGNMENT)
}

/// A keyslot, which holds a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Keyslot {
    /// The type: `luks2`, or `reencrypt`.
    pub kind: String,
    /// The length in bytes of the key in the keyslot.
    pub key_size: u32,
    /// When the keyslot is tried.
    pub priority: KeyslotPriority,
    /// The place of the key material.
    pub area: Area,
    /// The additional members of a `luks2` keyslot.
    pub opening: Option<(Kdf, AntiForensic)>,
    /// Why the keyslot can never open.
    pub fault: Option<Fault>,
}

/// A part of the keyslots area.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Area {
    /// The type: `raw`, or a type that only reencryption uses.
    pub kind: String,
    /// The offset in bytes from the start of the disk.
    pub offset: u64,
    /// The length in bytes.
    pub size: u64,
    /// The cipher, such as `aes-xts-plain64`. Empty if there is none.
    pub encryption: String,
    /// The length in bytes of the key that encrypts the area.
    pub key_size: u32,
}

/// The parameters of the anti-forensic splitter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AntiForensic {
    /// The hash.
    pub hash: String,
    /// The number of stripes. cryptsetup ignores this number and reads 4000 stripes, and so does nbdcrypt.
    pub stripes: Number,
}

impl Keyslot {
    /// Returns a new keyslot for a key of `key_len` bytes, with its key material at `offset`.
    pub(in crate::luks::luks2) fn new(new: &NewKey<'_>, salt: &[u8], key_len: usize, offset: u64) -> Self {
        let key_size = u32::try_from(key_len).unwrap_or(u32::MAX);
        Self {
            kind: "luks2".to_owned(),
            key_size,
            priority: KeyslotPriority::Normal,
            area: Area {
                kind: "raw".to_owned(),
                offset,
                size: area_len(key_len),
                encryption: CIPHER.to_owned(),
                key_size,
            },
            opening: Some((
                Kdf::new(&new.kdf, salt),
                AntiForensic { hash: new.hash.name().to_owned(), stripes: STRIPES.into() },
            )),
            fault: None,
        }
    }

    /// Returns the JSON that [`Keyslot::parse`] reads. Normal priority has no member, as in cryptsetup.
    pub(in crate::luks::luks2) fn to_json(&self) -> Value {
        let Area { kind, offset, size, encryption, key_size } = &self.area;
        let mut slot = json!({ "type": self.kind, "key_size": self.key_size });
        if let Some((_, AntiForensic { hash, stripes })) = &self.opening {
            slot["af"] = json!({ "type": "luks1", "stripes": stripes, "hash": hash });
        }
        slot["area"] = json!({
            "type": kind,
            "offset": offset.to_string(),
            "size": size.to_string(),
            "encryption": encryption,
            "key_size": key_size,
        });
        if let Some((kdf, _)) = &self.opening {
            slot["kdf"] = kdf.to_json();
        }
        slot
    }

    pub(super) fn parse(field: &Field<'_>) -> Result<Self, LuksError> {
        let kind = field.get("type").name()?.to_owned();
        let key_size = field.get("key_size").integer()?;
        let priority = KeyslotPriority::parse(field.optional("priority"));
        let area_field = field.get("area");
        let area = Area::parse(&area_field)?;
        if kind == "reencrypt" {
            check_reencrypt_keyslot(field, key_size)?;
        }
        if kind != "luks2" {
            return Ok(Self { kind, key_size, priority, area, opening: None, fault: None });
        }
        let af = field.get("af");
        if af.get("type").name()? != "luks1" {
            return Err(af.get("type").corrupt(format!("\"{}\", not \"luks1\"", af.get("type").name()?)));
        }
        let hash = af.get("hash").name()?.to_owned();
        if area.kind != "raw" {
            return Err(area_field.get("type").corrupt(format!("\"{}\", not \"raw\"", area.kind)));
        }
        area_field.get("encryption").name()?;
        area_field.get("key_size").whole_number()?;
        let mut faults = Faults::default();
        let kdf = Kdf::parse(&field.get("kdf"), &mut faults)?;
        let stripes = af.get("stripes").whole_number()?.clone();
        if key_size == 0 || key_size > MAX_KEY_LEN {
            faults.add(&field.get("key_size"), key_size.to_string());
        } else if area.size < material_len(key_size as usize) as u64 {
            faults.add(&area_field.get("size"), format!("{}, too small for the key material", area.size));
        }
        if area.key_size == 0 || area.key_size > MAX_KEY_LEN {
            faults.add(&area_field.get("key_size"), area.key_size.to_string());
        }
        Ok(Self {
            kind,
            key_size,
            priority,
            area,
            opening: Some((kdf, AntiForensic { hash, stripes })),
            fault: faults.0,
        })
    }
}

/// Checks a keyslot for a reencryption. Such a keyslot holds no key, but the mode and direction of the reencryption.
fn check_reencrypt_keyslot(field: &Field<'_>, key_size: u32) -> Result<(), LuksError> {
    if key_size != 1 {
        return Err(field.get("key_size").corrupt(format!("{key_size}, not 1")));
    }
    for (name, words) in
        [("mode", &["reencrypt", "encrypt", "decrypt"][..]), ("direction", &["forward", "backward"][..])]
    {
        let word = field.get(name).name()?;
        if !words.contains(&word) {
            return Err(field.get(name).corrupt(format!("\"{word}\", not one of {}", words.join(", "))));
        }
    }
    Ok(())
}

impl Area {
    fn parse(field: &Field<'_>) -> Result<Self, LuksError> {
        let optional_text = |name| field.optional(name).map_or(Ok(""), |field| field.name());
        Ok(Self {
            kind: field.get("type").name()?.to_owned(),
            offset: field.get("offset").long()?,
            size: field.get("size").long()?,
            encryption: optional_text("encryption")?.to_owned(),
            key_size: field.optional("key_size").map_or(Ok(0), |field| field.integer())?,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU32;

    use super::*;
    use crate::key::Passphrase;
    use crate::luks::HashAlgorithm;
    use crate::luks::kdf::{Argon2Cost, KdfOptions};

    #[test]
    fn a_new_keyslot_reads_back_as_it_was_written() {
        let (passphrase, hash, iterations) = (Passphrase::new(Vec::new()), HashAlgorithm::Sha512, NonZeroU32::MIN);
        let cost = Argon2Cost { time: 4, memory: 1 << 20, lanes: 2 };
        for kdf in [
            KdfOptions::Pbkdf2 { hash: HashAlgorithm::Sha256, iterations },
            KdfOptions::Argon2id(cost),
            KdfOptions::Argon2i(cost),
        ] {
            let new = NewKey { passphrase: &passphrase, kdf, hash };
            let slot = Keyslot::new(&new, &[7; 32], 64, 0x8000);
            assert_eq!(Keyslot::parse(&Field::root(&slot.to_json())).unwrap(), slot);
        }
    }
}
