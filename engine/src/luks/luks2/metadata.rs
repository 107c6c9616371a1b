//! The JSON area: keyslots, digests, segments, tokens and configuration (LUKS2 specification, section 3).

use std::collections::BTreeMap;

use serde_json::Value;

use super::field::Field;
use super::header::{BINARY_LEN, BinaryHeader};
use crate::luks::LuksError;
use crate::luks::keyslot::{STRIPES, material_len};
use crate::sector::LBA_UNIT;

/// More than any cipher's, in bytes.
const MAX_KEY_LEN: u32 = 512;
/// More than any salt or digest has, in bytes.
const MAX_BYTES: usize = 1024;
/// The most that the specification allows for all key material.
pub(in crate::luks) const MAX_KEYSLOTS_SIZE: u64 = 128 << 20;
/// Objects of a kind that cryptsetup allows.
pub(super) const MAX_OBJECTS: u32 = 32;

/// What the JSON says, where it keeps the specification's rules: areas lie behind the headers and apart, and what is
/// referred to is there. Its ciphers and hashes may still be ones that nbdcrypt does not do. Nothing in it is secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Metadata {
    /// Where the volume key is kept.
    pub keyslots: BTreeMap<u32, Keyslot>,
    /// Where the data is kept.
    pub segments: BTreeMap<u32, DataSegment>,
    /// How the right key is known, and what belongs to it.
    pub digests: BTreeMap<u32, Digest>,
    /// What else helps to open the volume.
    pub tokens: BTreeMap<u32, Token>,
    /// Sizes, flags and requirements.
    pub config: Config,
    /// The whole document, with all that is not known here.
    pub json: Value,
}

/// One place for the volume key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Keyslot {
    /// The type: `luks2`, or `reencrypt`.
    pub kind: String,
    /// Bytes of the key within.
    pub key_size: u32,
    /// 0: only when asked for; 1: normal; 2: tried first.
    pub priority: u32,
    /// Where the key material is.
    pub area: Area,
    /// What a `luks2` keyslot has beside that.
    pub opening: Option<(Kdf, AntiForensic)>,
}

/// A stretch of the keyslots area.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Area {
    /// The type: `raw`, or one that belongs to reencryption.
    pub kind: String,
    /// Bytes from the start of the disk.
    pub offset: u64,
    /// Its length in bytes.
    pub size: u64,
    /// The cipher, such as `aes-xts-plain64`; empty where there is none.
    pub encryption: String,
    /// Bytes of the key that encrypts it.
    pub key_size: u32,
}

/// The anti-forensic splitter's parameters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AntiForensic {
    /// The hash.
    pub hash: String,
    /// The stripes.
    pub stripes: u32,
}

/// How a passphrase becomes a keyslot's key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kdf {
    /// PBKDF2.
    Pbkdf2 {
        /// The hash.
        hash: String,
        /// The iterations.
        iterations: u32,
        /// The salt.
        salt: Vec<u8>,
    },
    /// Argon2i or Argon2id.
    Argon2 {
        /// Whether it is Argon2id.
        is_id: bool,
        /// Passes over the memory.
        time: u32,
        /// Memory in KiB.
        memory: u32,
        /// Lanes.
        cpus: u32,
        /// The salt.
        salt: Vec<u8>,
    },
    /// One that is not known here, by its name.
    Other(String),
}

/// Where data is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DataSegment {
    /// The type: `crypt`, or `linear` while the volume is being converted.
    pub kind: String,
    /// Bytes from the start of the disk.
    pub offset: u64,
    /// The length in bytes; `None` is all up to the end of the disk.
    pub size: Option<u64>,
    /// The IV of the first sector.
    pub iv_tweak: u64,
    /// The cipher, such as `aes-xts-plain64`.
    pub encryption: String,
    /// Bytes of a sector.
    pub sector_size: u32,
    /// The integrity that protects it, by its name.
    pub integrity: Option<String>,
    /// What marks it, such as `backup-previous`.
    pub flags: Vec<String>,
}

/// How the right key is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Digest {
    /// The type: `pbkdf2`.
    pub kind: String,
    /// The keyslots that hold the key.
    pub keyslots: Vec<u32>,
    /// The segments that the key encrypts.
    pub segments: Vec<u32>,
    /// The hash.
    pub hash: String,
    /// The iterations.
    pub iterations: u32,
    /// The salt.
    pub salt: Vec<u8>,
    /// `PBKDF2(volume key, salt, iterations)`.
    pub digest: Vec<u8>,
}

/// What else helps to open the volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Token {
    /// The type.
    pub kind: String,
    /// The keyslots that it opens.
    pub keyslots: Vec<u32>,
}

/// Sizes, flags and requirements.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Bytes of the JSON area.
    pub json_size: u64,
    /// Bytes of all key material.
    pub keyslots_size: u64,
    /// What to switch on when the volume is activated, such as `allow-discards`.
    pub flags: Vec<String>,
    /// What a program must know to touch the volume at all.
    pub requirements: Vec<String>,
}

impl Metadata {
    /// Reads the JSON area that belongs to `header`.
    ///
    /// # Errors
    /// [`LuksError::Corrupt`] with the field's path, such as `keyslots.0.kdf.time`.
    pub fn parse(header: &BinaryHeader, area: &[u8]) -> Result<Self, LuksError> {
        let text = area.split(|byte| *byte == 0).next().unwrap_or_default();
        if text.len() == area.len() || area[text.len()..].iter().any(|byte| *byte != 0) {
            return Err(LuksError::corrupt("the JSON area", "not one text with zeros behind it"));
        }
        let json: Value = serde_json::from_slice(text)
            .map_err(|error| LuksError::corrupt("the JSON area", format!("not JSON: {error}")))?;
        let root = Field::root(&json);
        let metadata = Self {
            keyslots: objects(&root, "keyslots", keyslot)?,
            segments: objects(&root, "segments", segment)?,
            digests: objects(&root, "digests", digest)?,
            tokens: objects(&root, "tokens", token)?,
            config: config(&root.get("config"))?,
            json: json.clone(),
        };
        metadata.check_references(&root)?;
        metadata.check_areas(&root, header)?;
        Ok(metadata)
    }

    fn check_references(&self, root: &Field<'_>) -> Result<(), LuksError> {
        let exist = |field: Field<'_>, wanted: &[u32], exists: &dyn Fn(&u32) -> bool| {
            let missing = wanted.iter().find(|id| !exists(id));
            missing.map_or(Ok(()), |id| Err(field.corrupt(format!("a list with {id}, which is not there"))))
        };
        // One that is named a thousand times would be tried as often. (Of those that exist, there are few.)
        let once = |field: Field<'_>, ids: &[u32]| {
            let twice = (1..ids.len()).find(|at| ids[..*at].contains(&ids[*at]));
            twice.map_or(Ok(()), |at| Err(field.corrupt(format!("a list with {} twice", ids[at]))))
        };
        for (id, digest) in &self.digests {
            let field = root.get("digests").get(&id.to_string());
            exist(field.get("keyslots"), &digest.keyslots, &|id| self.keyslots.contains_key(id))?;
            exist(field.get("segments"), &digest.segments, &|id| self.segments.contains_key(id))?;
            once(field.get("keyslots"), &digest.keyslots)?;
            once(field.get("segments"), &digest.segments)?;
        }
        for (id, token) in &self.tokens {
            let field = root.get("tokens").get(&id.to_string()).get("keyslots");
            exist(field, &token.keyslots, &|id| self.keyslots.contains_key(id))?;
        }
        Ok(())
    }

    /// Key material lies behind both headers, within the keyslots area, and on nothing else's.
    fn check_areas(&self, root: &Field<'_>, header: &BinaryHeader) -> Result<(), LuksError> {
        let config = root.get("config");
        if self.config.json_size != header.header_size - BINARY_LEN as u64 {
            return Err(config.get("json_size").corrupt(self.config.json_size.to_string()));
        }
        let size = self.config.keyslots_size;
        if size > MAX_KEYSLOTS_SIZE || !size.is_multiple_of(4096) {
            return Err(config.get("keyslots_size").corrupt(size.to_string()));
        }
        let start = 2 * header.header_size;
        let mut areas: Vec<(u64, u64, u32)> =
            self.keyslots.iter().map(|(id, slot)| (slot.area.offset, slot.area.size, *id)).collect();
        areas.sort_unstable();
        let mut free_from = start;
        for (offset, len, id) in areas {
            let field = root.get("keyslots").get(&id.to_string()).get("area");
            let end = offset.checked_add(len).filter(|end| *end <= start + size);
            let Some(end) = end.filter(|_| offset >= free_from) else {
                let found = format!("{len} bytes at {offset}, outside of the keyslots area or in another's place");
                return Err(field.corrupt(found));
            };
            free_from = end;
        }
        Ok(())
    }
}

fn objects<T>(
    root: &Field<'_>,
    name: &str,
    parse: fn(&Field<'_>) -> Result<T, LuksError>,
) -> Result<BTreeMap<u32, T>, LuksError> {
    let objects = root.get(name).numbered()?;
    if objects.len() > MAX_OBJECTS as usize {
        return Err(root.get(name).corrupt(format!("{} objects", objects.len())));
    }
    objects.into_iter().map(|(id, field)| Ok((id, parse(&field)?))).collect()
}

fn keyslot(field: &Field<'_>) -> Result<Keyslot, LuksError> {
    let kind = field.get("type").name()?.to_owned();
    let key_size = field.get("key_size").integer()?;
    let priority = field.optional("priority").map_or(Ok(1), |field| field.integer())?;
    if key_size == 0 || key_size > MAX_KEY_LEN {
        return Err(field.get("key_size").corrupt(key_size.to_string()));
    }
    let area_field = field.get("area");
    let area = area(&area_field)?;
    let opening = if kind == "luks2" {
        // Every writer uses this number; a header with another one is damaged, or hostile.
        let stripes = field.get("af").get("stripes").integer()?;
        if stripes as usize != STRIPES {
            return Err(field.get("af").get("stripes").corrupt(stripes.to_string()));
        }
        if area.size < material_len(key_size as usize) as u64 {
            return Err(area_field.get("size").corrupt(format!("{}, too few for the key material", area.size)));
        }
        if area.key_size == 0 || area.key_size > MAX_KEY_LEN {
            return Err(area_field.get("key_size").corrupt(area.key_size.to_string()));
        }
        let hash = field.get("af").get("hash").name()?.to_owned();
        Some((kdf(&field.get("kdf"))?, AntiForensic { hash, stripes }))
    } else {
        None
    };
    Ok(Keyslot { kind, key_size, priority, area, opening })
}

fn area(field: &Field<'_>) -> Result<Area, LuksError> {
    let optional_text = |name| field.optional(name).map_or(Ok(""), |field| field.name());
    Ok(Area {
        kind: field.get("type").name()?.to_owned(),
        offset: field.get("offset").long()?,
        size: field.get("size").long()?,
        encryption: optional_text("encryption")?.to_owned(),
        key_size: field.optional("key_size").map_or(Ok(0), |field| field.integer())?,
    })
}

fn kdf(field: &Field<'_>) -> Result<Kdf, LuksError> {
    let at_least_one = |name| {
        let number = field.get(name).integer()?;
        if number == 0 { Err(field.get(name).corrupt("0")) } else { Ok(number) }
    };
    let kind = field.get("type").name()?;
    Ok(match kind {
        "pbkdf2" => Kdf::Pbkdf2 {
            hash: field.get("hash").name()?.to_owned(),
            iterations: at_least_one("iterations")?,
            salt: field.get("salt").bytes(MAX_BYTES)?,
        },
        "argon2i" | "argon2id" => Kdf::Argon2 {
            is_id: kind == "argon2id",
            time: at_least_one("time")?,
            memory: at_least_one("memory")?,
            cpus: at_least_one("cpus")?,
            salt: field.get("salt").bytes(MAX_BYTES)?,
        },
        other => Kdf::Other(other.to_owned()),
    })
}

fn segment(field: &Field<'_>) -> Result<DataSegment, LuksError> {
    let size = field.get("size");
    let kind = field.get("type").name()?.to_owned();
    let is_crypt = kind == "crypt";
    let segment = DataSegment {
        offset: field.get("offset").long()?,
        size: if size.text()? == "dynamic" { None } else { Some(size.long()?) },
        iv_tweak: if is_crypt { field.get("iv_tweak").long()? } else { 0 },
        encryption: if is_crypt { field.get("encryption").name()?.to_owned() } else { String::new() },
        sector_size: if is_crypt { field.get("sector_size").integer()? } else { 512 },
        integrity: match field.optional("integrity") {
            None => None,
            Some(integrity) => Some(integrity.get("type").name()?.to_owned()),
        },
        flags: field.optional("flags").map_or(Ok(Vec::new()), |field| field.names())?,
        kind,
    };
    if !matches!(segment.sector_size, 512 | 1024 | 2048 | 4096) {
        return Err(field.get("sector_size").corrupt(segment.sector_size.to_string()));
    }
    if !segment.offset.is_multiple_of(LBA_UNIT) {
        return Err(field.get("offset").corrupt(segment.offset.to_string()));
    }
    // dm-crypt: "Invalid iv_offset sector".
    if !segment.iv_tweak.is_multiple_of(u64::from(segment.sector_size) / LBA_UNIT) {
        return Err(field.get("iv_tweak").corrupt(segment.iv_tweak.to_string()));
    }
    if segment.size.is_some_and(|size| size == 0 || !size.is_multiple_of(u64::from(segment.sector_size))) {
        return Err(size.corrupt(format!("{}, not whole sectors", size.text()?)));
    }
    Ok(segment)
}

fn digest(field: &Field<'_>) -> Result<Digest, LuksError> {
    let iterations = field.get("iterations").integer()?;
    if iterations == 0 {
        return Err(field.get("iterations").corrupt("0"));
    }
    Ok(Digest {
        kind: field.get("type").name()?.to_owned(),
        keyslots: field.get("keyslots").references()?,
        segments: field.get("segments").references()?,
        hash: field.get("hash").name()?.to_owned(),
        iterations,
        salt: field.get("salt").bytes(MAX_BYTES)?,
        digest: field.get("digest").bytes(MAX_BYTES)?,
    })
}

fn token(field: &Field<'_>) -> Result<Token, LuksError> {
    Ok(Token { kind: field.get("type").text()?.to_owned(), keyslots: field.get("keyslots").references()? })
}

fn config(field: &Field<'_>) -> Result<Config, LuksError> {
    let texts = |field: Option<Field<'_>>| field.map_or(Ok(Vec::new()), |field| field.names());
    let requirements = field.optional("requirements").and_then(|field| field.optional("mandatory"));
    Ok(Config {
        json_size: field.get("json_size").long()?,
        keyslots_size: field.get("keyslots_size").long()?,
        flags: texts(field.optional("flags"))?,
        requirements: texts(requirements)?,
    })
}
