//! The JSON area: keyslots, digests, segments, tokens and configuration (LUKS2 specification, section 3).

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use super::field::Field;
use super::header::{BINARY_LEN, BinaryHeader};
use crate::luks::LuksError;
use crate::luks::hash::HashAlgorithm;
use crate::luks::keyslot::material_len;
use crate::sector::LBA_UNIT;

/// The maximum key length in bytes. Every cipher's key is shorter.
const MAX_KEY_LEN: u32 = 512;
/// The maximum length of a binary field in bytes. Every salt and digest is shorter.
const MAX_BYTES: usize = 1024;
/// The maximum size of all key material in bytes, from the specification.
pub(in crate::luks) const MAX_KEYSLOTS_SIZE: u64 = 128 << 20;
/// The length in bytes of every salt that cryptsetup writes. It reads no other length.
const SALT_LEN: usize = 32;
/// The length in bytes of a LUKS1 digest. A volume keeps its digest when it is converted to LUKS2.
const LUKS1_DIGEST_LEN: usize = 20;
/// The maximum number of objects of each kind, as in cryptsetup.
pub(super) const MAX_OBJECTS: u32 = 32;

/// The versions of online reencryption that cryptsetup knows.
const KNOWN_REENCRYPTIONS: [&str; 3] = ["online-reencrypt", "online-reencrypt-v2", "online-reencrypt-v3"];

/// The maximum nesting of objects and lists that cryptsetup reads (json-c's `JSON_TOKENER_DEFAULT_DEPTH`).
const MAX_DEPTH: usize = 32;

/// The contents of the JSON area. They satisfy the rules that cryptsetup checks when it reads a header.
///
/// All rules are checked while parsing, before one of the two copies of the header is chosen. nbdcrypt may still not
/// support the ciphers and hashes. A keyslot or a digest may still have damage that affects nothing else; its [`Fault`]
/// describes it. Nothing here is secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Metadata {
    /// The keyslots, which hold the volume key.
    pub keyslots: BTreeMap<u32, Keyslot>,
    /// The segments of the data.
    pub segments: BTreeMap<u32, DataSegment>,
    /// The digests, which confirm a key, and the keyslots and segments that belong to each.
    pub digests: BTreeMap<u32, Digest>,
    /// The tokens, which help to open the volume.
    pub tokens: BTreeMap<u32, Token>,
    /// Sizes, flags and requirements.
    pub config: Config,
    /// The whole document, including all members that nbdcrypt does not know.
    pub json: Value,
    /// Something in the text that JSON does not allow, so that `json` is incomplete. Such a header is never written back.
    pub oddity: Option<&'static str>,
}

/// Damage to one keyslot or digest. The rest of the header is valid.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The field's path, such as `keyslots.0.kdf.time`.
    pub field: String,
    /// The value of the field.
    pub found: String,
}

impl Fault {
    /// Returns the fault as an error about the header.
    pub(super) fn error(&self) -> LuksError {
        LuksError::corrupt(self.field.as_str(), self.found.as_str())
    }
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

/// When a keyslot is tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyslotPriority {
    /// The keyslot is tried only if it is named.
    Ignored,
    /// The keyslot is tried in its order.
    Normal,
    /// The keyslot is tried before all others.
    Preferred,
    /// The header has another value. As in cryptsetup, such a keyslot is tried only if it is named.
    Invalid,
}

impl KeyslotPriority {
    /// Returns the position in the order in which keyslots are tried.
    pub(super) fn rank(self) -> u8 {
        match self {
            Self::Preferred => 0,
            Self::Normal => 1,
            Self::Ignored | Self::Invalid => 2,
        }
    }

    /// Returns whether the keyslot is tried only if it is named.
    pub fn is_ignored(self) -> bool {
        matches!(self, Self::Ignored | Self::Invalid)
    }
}

/// The word that `cryptsetup luksDump` prints.
impl std::fmt::Display for KeyslotPriority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Ignored => "ignored",
            Self::Normal => "normal",
            Self::Preferred => "preferred",
            Self::Invalid => "invalid",
        })
    }
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

/// How a keyslot's key is derived from a passphrase.
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
        /// The number of passes over the memory.
        time: u32,
        /// The memory in KiB.
        memory: u32,
        /// The number of lanes.
        cpus: u32,
        /// The salt.
        salt: Vec<u8>,
    },
    /// A method that nbdcrypt does not know, by its name.
    Other(String),
}

/// A segment of the disk that holds data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DataSegment {
    /// The type: `crypt`, or `linear` while the volume is being converted.
    pub kind: String,
    /// The offset in bytes from the start of the disk.
    pub offset: u64,
    /// The length in bytes. `None` means up to the end of the disk.
    pub size: Option<u64>,
    /// The IV of the first sector.
    pub iv_tweak: u64,
    /// The cipher, such as `aes-xts-plain64`.
    pub encryption: String,
    /// The sector size in bytes.
    pub sector_size: u32,
    /// The name of the integrity algorithm, if there is one.
    pub integrity: Option<String>,
    /// Flags such as `backup-previous`.
    pub flags: Vec<String>,
}

/// A digest, which confirms that a key is correct.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Digest {
    /// The type, usually `pbkdf2`.
    pub kind: String,
    /// The keyslots that hold the key.
    pub keyslots: Vec<u32>,
    /// The segments that the key encrypts.
    pub segments: Vec<u32>,
    /// The additional members of a digest of the type `pbkdf2`, or why it can never confirm a key. `None` for other types.
    pub pbkdf2: Option<Result<Pbkdf2Digest, Fault>>,
}

/// The additional members of a digest of the type `pbkdf2`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pbkdf2Digest {
    /// The hash.
    pub hash: String,
    /// The iterations.
    pub iterations: u32,
    /// The salt.
    pub salt: Vec<u8>,
    /// `PBKDF2(volume key, salt, iterations)`.
    pub digest: Vec<u8>,
}

/// A token, which helps to open the volume.
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
    /// The length of the JSON area in bytes.
    pub json_size: u64,
    /// The length of all key material in bytes.
    pub keyslots_size: u64,
    /// Options for activating the volume, such as `allow-discards`.
    pub flags: Vec<String>,
    /// Features that a program must support before it may touch the volume.
    pub requirements: Vec<String>,
}

impl Metadata {
    /// Parses the JSON area that belongs to `header`.
    ///
    /// # Errors
    /// [`LuksError::Corrupt`] with the path of the field, such as `keyslots.0.kdf.time`.
    pub fn parse(header: &BinaryHeader, area: &[u8]) -> Result<Self, LuksError> {
        let text = area.split(|byte| *byte == 0).next().unwrap_or_default();
        if text.len() == area.len() || area[text.len()..].iter().any(|byte| *byte != 0) {
            return Err(LuksError::corrupt("the JSON area", "not a text followed by zeros only"));
        }
        // cryptsetup allows spaces after the object but not before it.
        if !text.starts_with(b"{") {
            return Err(LuksError::corrupt("the JSON area", "not a JSON object at its first byte"));
        }
        let (text, oddity) = as_json(text);
        let json: Value = serde_json::from_str(&text)
            .map_err(|error| LuksError::corrupt("the JSON area", format!("not JSON: {error}")))?;
        if depth(&json) > MAX_DEPTH {
            let found = format!("{} levels of nested objects and lists", depth(&json));
            return Err(LuksError::corrupt("the JSON area", found));
        }
        let root = Field::root(&json);
        let mut unnamed = Unnamed::default();
        let metadata = Self {
            keyslots: objects(&root, "keyslots", keyslot)?,
            segments: objects(&root, "segments", segment)?,
            digests: objects_named(&root, "digests", digest, &mut unnamed.digests)?,
            tokens: objects_named(&root, "tokens", token, &mut unnamed.tokens)?,
            config: config(&root.get("config"))?,
            json: json.clone(),
            oddity,
        };
        metadata.check_references(&root)?;
        metadata.check_unnamed(&unnamed)?;
        metadata.check_keyslots(&root)?;
        metadata.check_segments(&root)?;
        metadata.check_areas(&root, header)?;
        Ok(metadata)
    }

    fn check_references(&self, root: &Field<'_>) -> Result<(), LuksError> {
        let exist = |field: Field<'_>, wanted: &[u32], exists: &dyn Fn(&u32) -> bool| {
            let missing = wanted.iter().find(|id| !exists(id));
            missing.map_or(Ok(()), |id| Err(field.corrupt(format!("a list with {id}, which does not exist"))))
        };
        for (id, digest) in &self.digests {
            let field = root.get("digests").get(&id.to_string());
            exist(field.get("keyslots"), &digest.keyslots, &|id| self.keyslots.contains_key(id))?;
            exist(field.get("segments"), &digest.segments, &|id| self.segments.contains_key(id))?;
        }
        for (id, token) in &self.tokens {
            let field = root.get("tokens").get(&id.to_string()).get("keyslots");
            exist(field, &token.keyslots, &|id| self.keyslots.contains_key(id))?;
        }
        Ok(())
    }

    /// Checks the [`Unnamed`] objects. They are allowed as long as the volume does not need them.
    fn check_unnamed(&self, unnamed: &Unnamed<'_>) -> Result<(), LuksError> {
        for (field, digest) in &unnamed.digests {
            if !digest.keyslots.is_empty() || !digest.segments.is_empty() {
                return Err(field.corrupt("a name that is not a number"));
            }
        }
        for (field, token) in &unnamed.tokens {
            if let Some(id) = token.keyslots.iter().find(|id| !self.keyslots.contains_key(id)) {
                return Err(field.get("keyslots").corrupt(format!("a list with {id}, which does not exist")));
            }
        }
        Ok(())
    }

    /// Returns the digest that confirms the key of a segment.
    pub(in crate::luks) fn digest_of_segment(&self, segment: u32) -> Option<(u32, &Digest)> {
        let mut digests = self.digests.iter().filter(|(_, digest)| digest.segments.contains(&segment));
        let first = digests.clone().next();
        digests.find(|(_, digest)| digest.pbkdf2.is_some()).or(first).map(|(id, digest)| (*id, digest))
    }

    /// Returns the first segment that holds data. While a volume is reencrypted, other segments hold data too.
    pub fn data_segment(&self) -> Option<(u32, &DataSegment)> {
        self.segments.iter().find(|(_, segment)| !segment.is_backup()).map(|(id, segment)| (*id, segment))
    }

    /// Returns whether the key in a keyslot is the key of the data. If it is not, the keyslot is unbound.
    pub fn is_bound(&self, keyslot: u32) -> bool {
        let digest = self.data_segment().and_then(|(segment, _)| self.digest_of_segment(segment));
        digest.is_some_and(|(_, digest)| digest.keyslots.contains(&keyslot))
    }

    /// Checks that each `luks2` keyslot belongs to exactly one digest, and that there is at most one keyslot for reencryption.
    /// Such a keyslot is allowed only together with the requirement for reencryption.
    fn check_keyslots(&self, root: &Field<'_>) -> Result<(), LuksError> {
        for (id, _) in self.keyslots.iter().filter(|(_, slot)| slot.kind == "luks2") {
            let digests = self.digests.values().filter(|digest| digest.keyslots.contains(id)).count();
            if digests != 1 {
                let found = format!("in {digests} digests, not in exactly one");
                return Err(root.get("keyslots").get(&id.to_string()).corrupt(found));
            }
        }
        self.check_reencryption(root)
    }

    /// Checks that an online reencryption has one requirement, one keyslot and two backup segments.
    fn check_reencryption(&self, root: &Field<'_>) -> Result<(), LuksError> {
        let requirements = root.get("config").get("requirements").get("mandatory");
        let mut wanted = self.config.requirements.iter().filter(|name| names_reencryption(name));
        let requirement = wanted.next();
        if let Some(another) = wanted.next() {
            return Err(requirements.corrupt(format!("a list with {another} beside another reencryption")));
        }
        let mut keyslots = self.keyslots.iter().filter(|(_, slot)| slot.kind == "reencrypt").map(|(id, _)| id);
        let keyslot = keyslots.next();
        if let Some(id) = if requirement.is_some() { keyslots.next() } else { keyslot } {
            let found = "for a reencryption that the requirements do not name, or not the only one for it";
            return Err(root.get("keyslots").get(&id.to_string()).corrupt(found));
        }
        // cryptsetup does not know what belongs to a later version.
        if !requirement.is_some_and(|name| KNOWN_REENCRYPTIONS.contains(&name.as_str())) {
            return Ok(());
        }
        if keyslot.is_none() {
            return Err(root.get("keyslots").corrupt("without a keyslot for the reencryption in the requirements"));
        }
        for flag in ["backup-previous", "backup-final"] {
            if !self.segments.values().any(|segment| segment.flags.iter().any(|it| it == flag)) {
                let found = format!("without a segment with the flag {flag}, which a reencryption needs");
                return Err(root.get("segments").corrupt(found));
            }
        }
        Ok(())
    }

    /// Checks that segments are numbered from 0 without a gap, and that backups come last. Also checks that the segments in
    /// use do not overlap, and that each encrypted segment has a digest.
    fn check_segments(&self, root: &Field<'_>) -> Result<(), LuksError> {
        let all = root.get("segments");
        if self.segments.is_empty() {
            return Err(all.corrupt("empty"));
        }
        let gap = self.segments.keys().zip(0..).find(|(id, expected)| *id != expected);
        if let Some((_, missing)) = gap {
            return Err(all.corrupt(format!("without segment {missing}, although there are higher numbers")));
        }
        let in_use = self.segments.values().take_while(|segment| !segment.is_backup()).count();
        if in_use == 0 {
            return Err(all.corrupt("without a segment that holds data"));
        }
        for (id, segment) in &self.segments {
            let field = all.get(&id.to_string());
            // No truncation: there are at most 32 segments.
            if *id as usize >= in_use && !segment.is_backup() {
                return Err(field.corrupt("in use, but follows a segment that is kept as a backup"));
            }
            if segment.kind != "crypt" {
                continue;
            }
            match self.digest_of_segment(*id) {
                None => {
                    return Err(LuksError::corrupt("digests", format!("without a digest for segment {id}")));
                }
                Some((_, Digest { pbkdf2: Some(Err(fault)), .. })) if !segment.is_backup() => return Err(fault.error()),
                Some(_) => {}
            }
        }
        let mut areas: Vec<(u64, Option<u64>, u32)> =
            self.segments.iter().take(in_use).map(|(id, segment)| (segment.offset, segment.size, *id)).collect();
        for (_, size, id) in &areas {
            if size.is_none() && *id as usize + 1 != in_use {
                return Err(all.get(&id.to_string()).get("size").corrupt("dynamic, but another segment follows"));
            }
        }
        areas.sort_unstable();
        for pair in areas.windows(2) {
            let [(offset, size, _), (next, _, id)] = pair else { continue };
            if size.and_then(|size| offset.checked_add(size)).is_none_or(|end| end > *next) {
                return Err(all.get(&id.to_string()).corrupt(format!("at {next}, within another segment")));
            }
        }
        Ok(())
    }

    /// Checks that key material lies after both headers, in the keyslots area and before the data, and that areas do not
    /// overlap.
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
        let data = self.segments.values().filter(|segment| !segment.is_backup()).map(|segment| segment.offset).min();
        // If the data begins at the first byte, it is on another disk. Otherwise the rule holds even for a detached header, as
        // in cryptsetup: if that header were restored to the data disk later, it would overwrite data.
        if let Some(offset) = data.filter(|offset| *offset != 0 && *offset < start + size) {
            let found = format!("{offset}, before the end of the keyslots area at {}", start + size);
            return Err(LuksError::corrupt("segments offset", found));
        }
        let mut areas: Vec<(u64, u64, u32)> =
            self.keyslots.iter().map(|(id, slot)| (slot.area.offset, slot.area.size, *id)).collect();
        areas.sort_unstable();
        let mut free_from = start;
        for (offset, len, id) in areas {
            let field = root.get("keyslots").get(&id.to_string()).get("area");
            let end = offset.checked_add(len).filter(|end| len > 0 && *end <= start + size);
            let Some(end) = end.filter(|_| offset >= free_from) else {
                let found =
                    format!("{len} bytes at {offset}, outside the keyslots area or within another keyslot's area");
                return Err(field.corrupt(found));
            };
            free_from = end;
        }
        Ok(())
    }
}

/// Objects whose names consist of digits but are not a number in its usual form, such as `00`. No other object can refer to
/// them. cryptsetup checks them and then ignores them.
#[derive(Default)]
struct Unnamed<'a> {
    digests: Vec<(Field<'a>, Digest)>,
    tokens: Vec<(Field<'a>, Token)>,
}

/// Reads the objects of a section. Each name must be a number.
fn objects<T>(
    root: &Field<'_>,
    name: &str,
    parse: fn(&Field<'_>) -> Result<T, LuksError>,
) -> Result<BTreeMap<u32, T>, LuksError> {
    let mut unnamed = Vec::new();
    let objects = objects_named(root, name, parse, &mut unnamed)?;
    unnamed.first().map_or(Ok(objects), |(field, _)| Err(field.corrupt("a name that is not a number")))
}

/// Reads the objects of a section. An object whose name is not a number in its usual form goes into `unnamed`.
fn objects_named<'a, T>(
    root: &Field<'a>,
    name: &str,
    parse: fn(&Field<'_>) -> Result<T, LuksError>,
    unnamed: &mut Vec<(Field<'a>, T)>,
) -> Result<BTreeMap<u32, T>, LuksError> {
    let members = root.get(name).members()?;
    if members.len() > MAX_OBJECTS as usize {
        return Err(root.get(name).corrupt(format!("{} objects", members.len())));
    }
    let mut objects = BTreeMap::new();
    for (member, field) in members {
        if !member.bytes().all(|byte| byte.is_ascii_digit()) {
            return Err(field.corrupt("a name that is not a number"));
        }
        let object = parse(&field)?;
        // Only one spelling of a number counts. Otherwise "0" and "00" would both be keyslot 0.
        match member.parse().ok().filter(|id: &u32| id.to_string() == member) {
            Some(id) => drop(objects.insert(id, object)),
            None => unnamed.push((field, object)),
        }
    }
    Ok(objects)
}

fn keyslot(field: &Field<'_>) -> Result<Keyslot, LuksError> {
    let kind = field.get("type").name()?.to_owned();
    let key_size = field.get("key_size").integer()?;
    let priority = field.optional("priority").map_or(KeyslotPriority::Normal, |field| match field.as_number() {
        Some(0) => KeyslotPriority::Ignored,
        Some(1) => KeyslotPriority::Normal,
        Some(2) => KeyslotPriority::Preferred,
        _ => KeyslotPriority::Invalid,
    });
    let area_field = field.get("area");
    let area = area(&area_field)?;
    if kind == "reencrypt" {
        check_reencrypt_keyslot(field, key_size)?;
    }
    if kind != "luks2" {
        return Ok(Keyslot { kind, key_size, priority, area, opening: None, fault: None });
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
    let kdf = kdf(&field.get("kdf"), &mut faults)?;
    let stripes = af.get("stripes").whole_number()?;
    if key_size == 0 || key_size > MAX_KEY_LEN {
        faults.add(&field.get("key_size"), key_size.to_string());
    } else if area.size < material_len(key_size as usize) as u64 {
        faults.add(&area_field.get("size"), format!("{}, too small for the key material", area.size));
    }
    if area.key_size == 0 || area.key_size > MAX_KEY_LEN {
        faults.add(&area_field.get("key_size"), area.key_size.to_string());
    }
    Ok(Keyslot {
        kind,
        key_size,
        priority,
        area,
        opening: Some((kdf, AntiForensic { hash, stripes })),
        fault: faults.0,
    })
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

/// The first fault that makes a keyslot or digest unusable.
#[derive(Default)]
struct Faults(Option<Fault>);

impl Faults {
    fn add(&mut self, field: &Field<'_>, found: impl Into<String>) {
        self.0.get_or_insert_with(|| field.fault(found));
    }

    /// Reads a 32-bit number. A whole number that does not fit is a fault of this object. A value that is not a whole
    /// number makes the whole header invalid, because cryptsetup never writes such a value.
    fn integer(&mut self, field: &Field<'_>) -> Result<u32, LuksError> {
        let text = field.whole_number()?;
        Ok(field.integer().unwrap_or_else(|_| {
            self.add(field, format!("{text}, not a 32-bit number"));
            0
        }))
    }

    fn at_least_one(&mut self, field: &Field<'_>) -> Result<u32, LuksError> {
        let number = self.integer(field)?;
        if number == 0 {
            self.add(field, "0");
        }
        Ok(number)
    }

    /// Reads a salt: a text that is base64 of [`SALT_LEN`] bytes.
    fn salt(&mut self, field: &Field<'_>) -> Result<Vec<u8>, LuksError> {
        field.name()?;
        Ok(match field.bytes(MAX_BYTES) {
            Ok(salt) if salt.len() == SALT_LEN => salt,
            Ok(salt) => {
                self.add(field, format!("{} bytes long, not {SALT_LEN}", salt.len()));
                salt
            }
            Err(LuksError::Corrupt { found, .. }) => {
                self.add(field, found);
                Vec::new()
            }
            Err(error) => return Err(error),
        })
    }
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

fn kdf(field: &Field<'_>, faults: &mut Faults) -> Result<Kdf, LuksError> {
    let kind = field.get("type").name()?;
    Ok(match kind {
        "pbkdf2" => Kdf::Pbkdf2 {
            hash: field.get("hash").name()?.to_owned(),
            iterations: faults.at_least_one(&field.get("iterations"))?,
            salt: faults.salt(&field.get("salt"))?,
        },
        "argon2i" | "argon2id" => Kdf::Argon2 {
            is_id: kind == "argon2id",
            time: faults.at_least_one(&field.get("time"))?,
            memory: faults.at_least_one(&field.get("memory"))?,
            cpus: faults.at_least_one(&field.get("cpus"))?,
            salt: faults.salt(&field.get("salt"))?,
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
            Some(integrity) => {
                integrity.get("journal_encryption").name()?;
                integrity.get("journal_integrity").name()?;
                Some(integrity.get("type").name()?.to_owned())
            }
        },
        flags: field.optional("flags").map_or(Ok(Vec::new()), |field| field.texts())?,
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
    let kind = field.get("type").name()?.to_owned();
    Ok(Digest {
        keyslots: once(field.get("keyslots").references()?),
        segments: once(field.get("segments").references()?),
        pbkdf2: (kind == "pbkdf2").then(|| pbkdf2_digest(field)),
        kind,
    })
}

/// Returns the numbers in the same order, without repetitions. With repetitions, a keyslot that a digest lists a thousand
/// times would be tried a thousand times.
fn once(numbers: Vec<u32>) -> Vec<u32> {
    let mut seen = BTreeSet::new();
    numbers.into_iter().filter(|number| seen.insert(*number)).collect()
}

/// Reads the additional members of a digest of the type `pbkdf2`, or returns a fault. The rest of the header stays valid,
/// because cryptsetup checks these members only when it verifies a key.
fn pbkdf2_digest(field: &Field<'_>) -> Result<Pbkdf2Digest, Fault> {
    let read = || {
        let mut faults = Faults::default();
        let digest = Pbkdf2Digest {
            hash: field.get("hash").name()?.to_owned(),
            iterations: faults.at_least_one(&field.get("iterations"))?,
            salt: faults.salt(&field.get("salt"))?,
            digest: field.get("digest").bytes(MAX_BYTES)?,
        };
        // A shorter digest would let wrong keys pass. A longer digest would cost a multiple of the stated iterations.
        if let Some(hash) = HashAlgorithm::from_name(&digest.hash) {
            let (len, usual) = (digest.digest.len(), hash.output_len());
            if len != LUKS1_DIGEST_LEN && len != usual {
                faults.add(&field.get("digest"), format!("{len} bytes long, but a {} digest has {usual}", digest.hash));
            }
        }
        Ok((digest, faults.0))
    };
    match read() {
        Ok((digest, None)) => Ok(digest),
        Ok((_, Some(fault))) => Err(fault),
        Err(LuksError::Corrupt { field, found }) => Err(Fault { field, found }),
        Err(error) => Err(field.fault(error.to_string())),
    }
}

fn token(field: &Field<'_>) -> Result<Token, LuksError> {
    Ok(Token { kind: field.get("type").nonempty()?.to_owned(), keyslots: field.get("keyslots").references()? })
}

fn config(field: &Field<'_>) -> Result<Config, LuksError> {
    let requirements = match field.optional("requirements") {
        None => None,
        Some(requirements) => {
            requirements.object()?;
            requirements.optional("mandatory")
        }
    };
    Ok(Config {
        json_size: field.get("json_size").long()?,
        keyslots_size: field.get("keyslots_size").long()?,
        flags: field.optional("flags").map_or(Ok(Vec::new()), |field| field.texts())?,
        requirements: requirements.map_or(Ok(Vec::new()), |field| field.names())?,
    })
}

/// Returns whether a requirement is an online reencryption of any version, such as `online-reencrypt-v2`.
fn names_reencryption(requirement: &str) -> bool {
    let version = requirement.strip_prefix("online-reencrypt-v");
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    requirement == "online-reencrypt" || version.is_some_and(is_number)
}

impl DataSegment {
    /// Returns whether the segment is only a record of the layout before or after a reencryption.
    pub(in crate::luks) fn is_backup(&self) -> bool {
        self.flags.iter().any(|flag| flag.starts_with("backup-"))
    }
}

/// Returns the text as valid JSON. cryptsetup's parser (json-c) also reads some text that JSON does not allow. This
/// function replaces it: `NaN` and `Infinity` become `null`, and bytes that are not UTF-8 become U+FFFD. The second value
/// names what was replaced, if anything was.
fn as_json(text: &[u8]) -> (Cow<'_, str>, Option<&'static str>) {
    const WORDS: [&[u8]; 3] = [b"NaN", b"-Infinity", b"Infinity"];
    let mut bytes = Vec::new();
    let (mut at, mut copied, mut is_quoted) = (0, 0, false);
    while let Some(byte) = text.get(at) {
        let is_word = |word: &&&[u8]| text[at..].get(..word.len()).is_some_and(|it| it.eq_ignore_ascii_case(word));
        let word = WORDS.iter().find(is_word).filter(|_| !is_quoted);
        if let Some(word) = word {
            bytes.extend_from_slice(&text[copied..at]);
            bytes.extend_from_slice(b"null");
            at += word.len();
            copied = at;
            continue;
        }
        match byte {
            b'"' => is_quoted = !is_quoted,
            b'\\' if is_quoted => at += 1,
            _ => {}
        }
        at += 1;
    }
    if copied > 0 {
        bytes.extend_from_slice(&text[copied..]);
        let text = String::from_utf8_lossy(&bytes).into_owned();
        return (Cow::Owned(text), Some("NaN or Infinity instead of a number"));
    }
    let text = String::from_utf8_lossy(text);
    let oddity = matches!(text, Cow::Owned(_)).then_some("text that is not UTF-8");
    (text, oddity)
}

/// Returns how deeply objects and lists are nested.
pub(super) fn depth(value: &Value) -> usize {
    match value {
        Value::Array(values) => 1 + values.iter().map(depth).max().unwrap_or(0),
        Value::Object(values) => 1 + values.values().map(depth).max().unwrap_or(0),
        _ => 0,
    }
}
