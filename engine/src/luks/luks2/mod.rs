//! LUKS2, after the on-disk format specification.
//!
//! Two copies of a header, each a binary part with a checksum and a JSON part, then key material, then the data, in
//! sectors of 512 to 4096 bytes whose IV counts 512-byte units.

mod dump;
mod field;
mod format;
mod header;
mod keys;
mod label;
mod layout;
mod metadata;
mod settings;
mod tokens;
mod update;

use std::num::NonZeroU32;

use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

pub use format::{KdfOptions, Options, begin};
pub use header::BinaryHeader;
pub use keys::{add_key, change_key, remove_key};
pub use label::Label;
pub use layout::Layout;
pub(super) use metadata::MAX_KEYSLOTS_SIZE;
pub use metadata::{AntiForensic, Area, Config, DataSegment, Digest, Kdf, Keyslot, Metadata, Token};
pub use settings::{FLAGS, Priority, Settings, change_settings, set_priority};
pub use tokens::{export_token, import_token, remove_token};
pub use update::{Repaired, repair};

use super::hash::HashAlgorithm;
use super::kdf::{self, Argon2Cost, Argon2Error};
use super::limits::{Budget, Work};
use super::{DataDisk, Disks, Limits, LuksError, Segment, UnlockedVolume, keyslot};
use crate::key::{Passphrase, VolumeKey};
use crate::sector::{Lba512, SectorSize};
use crate::store::{BlockStore, read_unaligned};

/// A header, with nothing secret in it. Its ciphers and hashes may be ones that nbdcrypt does not do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// The binary part.
    pub binary: BinaryHeader,
    /// The JSON part.
    pub metadata: Metadata,
}

/// A LUKS2 volume that nbdcrypt can open, given a passphrase.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Locked {
    header: Header,
    segment: Segment,
    key_len: usize,
    digest: ReadyDigest,
    /// In the order in which they are tried. Those that are ignored are not among them.
    keyslots: Vec<(u32, Result<Opening, Unusable>)>,
    /// The first that is tried only when it is named.
    ignored: Option<u32>,
}

/// A digest whose hash is known, and whose length and work are allowed.
#[derive(Clone, Debug, PartialEq, Eq)]
struct ReadyDigest {
    hash: HashAlgorithm,
    iterations: NonZeroU32,
    salt: Vec<u8>,
    digest: Vec<u8>,
}

/// What opens a keyslot, given a passphrase.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Opening {
    kdf: ReadyKdf,
    slot_key_len: usize,
    af_hash: HashAlgorithm,
    offset: u64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum ReadyKdf {
    Pbkdf2 { hash: HashAlgorithm, iterations: NonZeroU32, salt: Vec<u8> },
    Argon2 { is_id: bool, cost: Argon2Cost, salt: Vec<u8> },
}

/// A keyslot that is passed over, since it uses what nbdcrypt does not do, or costs more than is allowed; others may open.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Unusable {
    Unsupported { what: &'static str, found: String, supported: &'static str },
    TooExpensive { field: String, found: u32, limit: u32 },
    TooManyIterations { field: String, found: u32, limit: u32 },
    TooMuchWork { keyslot: usize },
}

impl Unusable {
    /// What stands in the keyslot's way, if that is the keyslot's alone.
    fn from_error(error: LuksError) -> Result<Self, LuksError> {
        match error {
            LuksError::Unsupported { what, found, supported } => Ok(Self::Unsupported { what, found, supported }),
            LuksError::TooExpensive { field, found, limit } => Ok(Self::TooExpensive { field, found, limit }),
            LuksError::TooManyIterations { field, found, limit } => Ok(Self::TooManyIterations { field, found, limit }),
            other => Err(other),
        }
    }

    fn error(&self) -> LuksError {
        match self.clone() {
            Self::Unsupported { what, found, supported } => LuksError::Unsupported { what, found, supported },
            Self::TooExpensive { field, found, limit } => LuksError::TooExpensive { field, found, limit },
            Self::TooManyIterations { field, found, limit } => LuksError::TooManyIterations { field, found, limit },
            Self::TooMuchWork { keyslot } => LuksError::TooMuchWork { keyslot },
        }
    }
}

/// Reads the newer of the headers that are whole, whatever ciphers it names: enough to show it.
///
/// # Errors
/// [`LuksError`] when there is none, or both are corrupt.
pub fn read_header(store: &dyn BlockStore) -> Result<Header, LuksError> {
    read_whole(store).map(|(header, _)| header)
}

/// The newer of the headers whose checksum is right and whose JSON is in order, and its JSON's area.
fn read_whole(store: &dyn BlockStore) -> Result<(Header, Vec<u8>), LuksError> {
    let mut refusal = LuksError::NotLuks;
    for (binary, area) in header::read(store)? {
        match Metadata::parse(&binary, &area) {
            Ok(metadata) => return Ok((Header { binary, metadata }, area)),
            // Told is what is wrong with the newer one.
            Err(error) if matches!(refusal, LuksError::NotLuks) => refusal = error,
            Err(_) => {}
        }
    }
    Err(refusal)
}

/// Reads the header of a volume that shall be opened.
///
/// # Errors
/// [`LuksError`] when there is none, or it is corrupt, or asks for what nbdcrypt does not do or for too much work.
pub fn read<'d>(disks: impl Into<Disks<'d>>, limits: &Limits) -> Result<Locked, LuksError> {
    let disks = disks.into();
    Locked::new(read_header(disks.header())?, disks.data_disk(), limits)
}

impl Locked {
    /// The volume that `header` describes, with its data on `disk`.
    ///
    /// # Errors
    /// [`LuksError`] when it asks for what nbdcrypt does not do or for too much work, or the disk is too small for it.
    pub fn new(header: Header, disk: DataDisk, limits: &Limits) -> Result<Self, LuksError> {
        let metadata = &header.metadata;
        if let Some(requirement) = metadata.config.requirements.first() {
            return Err(LuksError::Unsupported {
                what: "requirement",
                found: requirement.clone(),
                supported: "it knows none; a reencryption must be finished first",
            });
        }
        let (segment_id, data) = data_segment(metadata)?;
        let (digest_id, digest) = metadata
            .digests
            .iter()
            .find(|(_, digest)| digest.segments.contains(&segment_id))
            .ok_or_else(|| LuksError::corrupt("digests", format!("without one for segment {segment_id}")))?;
        let ignored = digest.keyslots.iter().copied().filter(|id| metadata.keyslots[id].priority == 0).min();
        let key_bytes =
            digest.keyslots.iter().filter_map(|id| metadata.keyslots.get(id)).map(|slot| slot.key_size).next();
        let Some(key_bytes) = key_bytes else {
            return Err(LuksError::NoKeyslot);
        };
        let key_len = keyslot::key_len(&data.encryption, key_bytes)?;
        let segment = place(&header, data, disk)?;
        let mut keyslots: Vec<(u32, &Keyslot)> = digest
            .keyslots
            .iter()
            .filter_map(|id| metadata.keyslots.get(id).map(|slot| (*id, slot)))
            .filter(|(_, slot)| slot.priority > 0)
            .collect();
        keyslots.sort_by_key(|(id, slot)| (std::cmp::Reverse(slot.priority), *id));
        let digest = ReadyDigest::new(*digest_id, digest, limits)?;
        let mut budget = Budget::default();
        let openings = keyslots.into_iter().map(|(id, slot)| match Opening::new(id, slot, key_bytes, limits) {
            Ok(opening) if budget.spend(opening.work(limits).and(digest.work(limits))) => Ok((id, Ok(opening))),
            Ok(_) => Ok((id, Err(Unusable::TooMuchWork { keyslot: id as usize }))),
            Err(error) => Ok((id, Err(Unusable::from_error(error)?))),
        });
        let keyslots = openings.collect::<Result<Vec<_>, LuksError>>()?;
        Ok(Self { segment, key_len, digest, keyslots, ignored, header })
    }

    /// Tries the passphrase on the keyslots, those that are preferred first, then in their order.
    ///
    /// # Errors
    /// [`LuksError::WrongPassphrase`] or [`LuksError::WrongPassphraseBesideIgnored`] when it opens none of them;
    /// [`LuksError::DamagedKeyslot`], [`LuksError::UnreadableKeyslot`], [`LuksError::Unsupported`], [`LuksError::TooExpensive`] or [`LuksError::OutOfMemory`] when it opens none, and not all could be tried.
    pub fn unlock(&self, store: &dyn BlockStore, passphrase: &Passphrase) -> Result<UnlockedVolume, LuksError> {
        // Without any keyslot there would be no `Locked`.
        let mut refusal = LuksError::AllIgnored { keyslot: self.ignored.unwrap_or(0) as usize };
        for (id, opening) in &self.keyslots {
            let keyslot = usize::try_from(*id).unwrap_or(usize::MAX);
            let refused = match opening {
                Ok(opening) => match self.try_keyslot(keyslot, opening, store, passphrase) {
                    Ok(key) => return Ok(UnlockedVolume { key, segment: self.segment, keyslot }),
                    Err(error @ LuksError::Key(_)) => return Err(error),
                    Err(error) => error,
                },
                Err(unusable) => unusable.error(),
            };
            // What kept a keyslot from being tried is told before what was tried in vain.
            if matches!(refusal, LuksError::AllIgnored { .. } | LuksError::WrongPassphrase) {
                refusal = refused;
            }
        }
        Err(match (refusal, self.ignored) {
            (LuksError::WrongPassphrase, Some(id)) => LuksError::WrongPassphraseBesideIgnored { ignored: id as usize },
            (refusal, _) => refusal,
        })
    }

    /// Tries the passphrase on one keyslot, even one that is ignored otherwise.
    ///
    /// # Errors
    /// [`LuksError::NoSuchKeyslot`], and as [`Locked::unlock`] has them.
    pub fn unlock_keyslot(
        &self,
        store: &dyn BlockStore,
        keyslot: usize,
        passphrase: &Passphrase,
        limits: &Limits,
    ) -> Result<UnlockedVolume, LuksError> {
        let id = u32::try_from(keyslot).unwrap_or(u32::MAX);
        let metadata = &self.header.metadata;
        let is_ours =
            metadata.digests.values().any(|digest| digest.keyslots.contains(&id) && !digest.segments.is_empty());
        let slot = metadata.keyslots.get(&id).filter(|_| is_ours).ok_or(LuksError::NoSuchKeyslot(keyslot))?;
        // No truncation: 32 or 64 bytes.
        let key_bytes = u32::try_from(self.key_len).unwrap_or(0);
        let opening = Opening::new(id, slot, key_bytes, limits)?;
        let key = self.try_keyslot(keyslot, &opening, store, passphrase)?;
        Ok(UnlockedVolume { key, segment: self.segment, keyslot })
    }

    /// The header.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Where the data lies.
    pub fn segment(&self) -> Segment {
        self.segment
    }

    /// The length of the volume key in bits, both halves counted.
    pub fn key_bits(&self) -> usize {
        self.key_len * 8
    }

    fn try_keyslot(
        &self,
        keyslot: usize,
        opening: &Opening,
        store: &dyn BlockStore,
        passphrase: &Passphrase,
    ) -> Result<VolumeKey, LuksError> {
        let mut material = Zeroizing::new(vec![0; keyslot::material_len(self.key_len)]);
        read_unaligned(store, &mut material, opening.offset)
            .map_err(|source| LuksError::UnreadableKeyslot { keyslot, source })?;
        if let Some(sector) = keyslot::damaged_sector(&material) {
            let sector = opening.offset / SectorSize::B512.bytes_u64() + sector as u64;
            return Err(LuksError::DamagedKeyslot { keyslot, sector });
        }
        let slot_key = match &opening.kdf {
            ReadyKdf::Pbkdf2 { hash, iterations, salt } => {
                kdf::pbkdf2(*hash, passphrase.expose(), salt, *iterations, opening.slot_key_len)
            }
            ReadyKdf::Argon2 { is_id, cost, salt } => {
                kdf::argon2(*is_id, passphrase.expose(), salt, *cost, opening.slot_key_len).map_err(
                    |error| match error {
                        Argon2Error::OutOfMemory => LuksError::OutOfMemory { keyslot, kib: cost.memory },
                        Argon2Error::Parameters => LuksError::corrupt(
                            format!("keyslots.{keyslot}.kdf"),
                            format!("{cost:?}, which Argon2 refuses"),
                        ),
                    },
                )?
            }
        };
        let mut candidate = keyslot::unseal(opening.af_hash, slot_key, self.key_len, &mut material)?;
        if !self.digest.is_of(&candidate) {
            return Err(LuksError::WrongPassphrase);
        }
        Ok(VolumeKey::new(std::mem::take(&mut *candidate))?)
    }
}

impl ReadyDigest {
    /// Bytes of the shortest: those of LUKS1, which are kept where a volume is converted.
    const LEAST: usize = 20;

    fn new(id: u32, digest: &Digest, limits: &Limits) -> Result<Self, LuksError> {
        if digest.kind != "pbkdf2" {
            let supported = "it does pbkdf2";
            return Err(LuksError::Unsupported { what: "digest", found: digest.kind.clone(), supported });
        }
        let hash = hash(&digest.hash)?;
        // A shorter one would let wrong keys pass, and a longer one costs as often what the iterations say.
        if !(Self::LEAST..=hash.output_len()).contains(&digest.digest.len()) {
            let found =
                format!("{} bytes, and those of {} have {}", digest.digest.len(), digest.hash, hash.output_len());
            return Err(LuksError::corrupt(format!("digests.{id}.digest"), found));
        }
        Ok(Self {
            hash,
            iterations: limits.iterations(|| format!("digests.{id}.iterations"), digest.iterations)?,
            salt: digest.salt.clone(),
            digest: digest.digest.clone(),
        })
    }

    fn is_of(&self, key: &[u8]) -> bool {
        let computed = kdf::pbkdf2(self.hash, key, &self.salt, self.iterations, self.digest.len());
        bool::from(computed.ct_eq(&self.digest))
    }

    fn work(&self, limits: &Limits) -> Work {
        Work::of_pbkdf2(limits, self.hash, self.iterations, self.digest.len())
    }
}

impl Opening {
    fn work(&self, limits: &Limits) -> Work {
        match &self.kdf {
            ReadyKdf::Pbkdf2 { hash, iterations, .. } => Work::of_pbkdf2(limits, *hash, *iterations, self.slot_key_len),
            ReadyKdf::Argon2 { cost, .. } => Work::of_argon2(limits, cost.time, cost.memory),
        }
    }

    fn new(id: u32, slot: &Keyslot, key_bytes: u32, limits: &Limits) -> Result<Self, LuksError> {
        let Some((kdf, af)) = &slot.opening else {
            return Err(LuksError::Unsupported {
                what: "keyslot type",
                found: slot.kind.clone(),
                supported: "it does luks2",
            });
        };
        if slot.key_size != key_bytes {
            return Err(LuksError::corrupt(format!("keyslots.{id}.key_size"), slot.key_size.to_string()));
        }
        if slot.area.kind != "raw" {
            let found = slot.area.kind.clone();
            return Err(LuksError::Unsupported { what: "keyslot area", found, supported: "it does raw" });
        }
        let path = |field: &str| format!("keyslots.{id}.kdf.{field}");
        let within = |field: &str, found: u32, limit: u32| {
            if found > limit { Err(LuksError::TooExpensive { field: path(field), found, limit }) } else { Ok(found) }
        };
        let kdf = match kdf {
            Kdf::Pbkdf2 { hash: name, iterations, salt } => ReadyKdf::Pbkdf2 {
                hash: hash(name)?,
                iterations: limits.iterations(|| path("iterations"), *iterations)?,
                salt: salt.clone(),
            },
            Kdf::Argon2 { is_id, time, memory, cpus, salt } => {
                let cost = Argon2Cost {
                    time: within("time", *time, limits.argon2_passes(*memory))?,
                    memory: within("memory", *memory, limits.argon2_memory)?,
                    lanes: within("cpus", *cpus, limits.argon2_lanes)?,
                };
                ReadyKdf::Argon2 { is_id: *is_id, cost, salt: salt.clone() }
            }
            Kdf::Other(name) => {
                let supported = "it does pbkdf2, argon2i and argon2id";
                return Err(LuksError::Unsupported { what: "key derivation", found: name.clone(), supported });
            }
        };
        Ok(Self {
            kdf,
            slot_key_len: keyslot::key_len(&slot.area.encryption, slot.area.key_size)?,
            af_hash: hash(&af.hash)?,
            offset: slot.area.offset,
        })
    }
}

/// The one segment that is data, and not kept as a backup while the volume is converted.
fn data_segment(metadata: &Metadata) -> Result<(u32, &DataSegment), LuksError> {
    let is_backup = |segment: &DataSegment| segment.flags.iter().any(|flag| flag.starts_with("backup-"));
    let mut segments = metadata.segments.iter().filter(|(_, segment)| !is_backup(segment));
    let Some((id, segment)) = segments.next() else {
        return Err(LuksError::corrupt("segments", "without one that holds data"));
    };
    let more = segments.count();
    if more > 0 {
        let (found, supported) = ((more + 1).to_string(), "it does one; a reencryption must be finished first");
        return Err(LuksError::Unsupported { what: "number of data segments", found, supported });
    }
    if segment.kind != "crypt" {
        let found = segment.kind.clone();
        return Err(LuksError::Unsupported { what: "segment type", found, supported: "it does crypt" });
    }
    if let Some(integrity) = &segment.integrity {
        let (found, supported) = (integrity.clone(), "it does none");
        return Err(LuksError::Unsupported { what: "integrity", found, supported });
    }
    Ok((*id, segment))
}

fn place(header: &Header, data: &DataSegment, disk: DataDisk) -> Result<Segment, LuksError> {
    if data.offset == 0 && !disk.is_detached {
        return Err(LuksError::Detached);
    }
    let metadata_end = 2 * header.binary.header_size + header.metadata.config.keyslots_size;
    // Also where the header is detached, as cryptsetup has it: data in its place is data that a header may overwrite.
    if data.offset != 0 && data.offset < metadata_end {
        let found = format!("{}, before the end of the keyslots area at {metadata_end}", data.offset);
        return Err(LuksError::corrupt("segments offset", found));
    }
    let Some(sector_size) = SectorSize::from_bytes(u64::from(data.sector_size)) else {
        return Err(LuksError::corrupt("segments sector_size", data.sector_size.to_string()));
    };
    let sector = sector_size.bytes_u64();
    let available = disk.len.saturating_sub(data.offset) / sector * sector;
    let len = data.size.unwrap_or(available);
    if len > available || len == 0 {
        let needed = data.offset.saturating_add(len.max(sector));
        return Err(LuksError::TooSmall { needed, available: disk.len });
    }
    Ok(Segment { offset: data.offset, len, sector_size, iv_start: Lba512(data.iv_tweak) })
}

fn hash(name: &str) -> Result<HashAlgorithm, LuksError> {
    HashAlgorithm::from_name(name).ok_or_else(|| LuksError::Unsupported {
        what: "hash",
        found: name.to_owned(),
        supported: HashAlgorithm::SUPPORTED,
    })
}
