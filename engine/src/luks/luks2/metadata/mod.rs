//! The JSON area: keyslots, digests, segments, tokens and configuration (LUKS2 specification, section 3).

mod config;
mod digest;
mod fault;
mod field;
mod json;
mod kdf;
mod keyslot;
mod priority;
mod rules;
mod segment;
mod token;

use std::collections::BTreeMap;

use serde_json::Value;

pub use config::Config;
pub use digest::{Digest, Pbkdf2Digest};
pub use fault::Fault;
pub(super) use json::depth;
pub use kdf::Kdf;
pub(super) use keyslot::{AREA_ALIGNMENT, CIPHER, area_len};
pub use keyslot::{AntiForensic, Area, Keyslot};
pub use priority::KeyslotPriority;
pub use segment::DataSegment;
pub use token::Token;

use field::Field;
use json::as_json;

use super::header::BinaryHeader;
use crate::luks::LuksError;

/// The maximum size of all key material in bytes, from the specification.
pub(in crate::luks) const MAX_KEYSLOTS_SIZE: u64 = 128 << 20;
/// The maximum number of objects of each kind, as in cryptsetup.
pub(super) const MAX_OBJECTS: u32 = 32;

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
            keyslots: objects(&root, "keyslots", Keyslot::parse)?,
            segments: objects(&root, "segments", DataSegment::parse)?,
            digests: objects_named(&root, "digests", Digest::parse, &mut unnamed.digests)?,
            tokens: objects_named(&root, "tokens", Token::parse, &mut unnamed.tokens)?,
            config: Config::parse(&root.get("config"))?,
            json: json.clone(),
            oddity,
        };
        metadata.check(&root, header, &unnamed)?;
        Ok(metadata)
    }

    /// Returns the digest that confirms the key of a segment.
    pub(in crate::luks) fn digest_of_segment(&self, segment: u32) -> Option<(u32, &Digest)> {
        let mut digests = self.digests.iter().filter(|(_, digest)| digest.segments.contains(&segment));
        let first = digests.clone().next();
        digests.find(|(_, digest)| digest.pbkdf2.is_some()).or(first).map(|(id, digest)| (*id, digest))
    }

    /// Returns the number of the keyslot for a new key: `wanted`, or the first free keyslot.
    ///
    /// # Errors
    /// See [`keyslot::free`](crate::luks::keyslot::free).
    pub(in crate::luks) fn free_keyslot(&self, wanted: Option<usize>) -> Result<usize, LuksError> {
        crate::luks::keyslot::free(wanted, "LUKS2", MAX_OBJECTS as usize, |index| {
            let is_taken = self.keyslots.keys().any(|id| *id as usize == index);
            if is_taken { Err(LuksError::KeyslotInUse(index)) } else { Ok(()) }
        })
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
