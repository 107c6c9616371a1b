//! The keyslots: where the key material lies, and how a passphrase opens it.

use super::fault::{Fault, Faults};
use super::field::Field;
use super::kdf::Kdf;
use super::priority::KeyslotPriority;
use crate::luks::LuksError;
use crate::luks::keyslot::material_len;

/// The maximum key length in bytes. Every cipher's key is shorter.
const MAX_KEY_LEN: u32 = 512;

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
    /// The digits of the number of stripes. cryptsetup ignores this number and reads 4000 stripes, and so does nbdcrypt.
    pub stripes: String,
}

impl Keyslot {
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
        let stripes = af.get("stripes").whole_number()?;
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
