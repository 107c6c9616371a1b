//! LUKS2, as its on-disk format specification defines it.
//!
//! A volume begins with two copies of its header. Each copy has a binary part with a checksum and a JSON part. After them come
//! the key material and then the data. The data has sectors of 512 to 4096 bytes, and its IV counts 512-byte units.

mod dump;
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

pub(super) use format::data_offset;
pub use format::{KdfOptions, Options, begin, check_sector_size, default_sector_size};
pub use header::BinaryHeader;
pub use keys::{add_key, change_key, remove_key};
pub use label::Label;
pub use layout::Layout;
pub(super) use metadata::MAX_KEYSLOTS_SIZE;
pub use metadata::{
    AntiForensic, Area, Config, DataSegment, Digest, Fault, Kdf, Keyslot, KeyslotPriority, Metadata, Pbkdf2Digest,
    Token,
};
pub use settings::{FLAGS, Priority, Settings, change_settings, set_priority};
pub use tokens::{export_token, import_token, remove_token};
pub(super) use update::make_copies_equal;
pub use update::{BrokenCopy, HeaderCopy, RefusedCopy, Repaired, broken, overlooked, repair, repair_from};

use header::Copies;

use super::hash::HashAlgorithm;
use super::kdf::{self, Argon2Cost, Argon2Error};
use super::limits::{Budget, Work};
use super::{DataDisk, Disks, Limits, LuksError, UnlockedVolume, keyslot};
use crate::layout::Segment;

use crate::key::{Passphrase, VolumeKey};
use crate::sector::{LBA_UNIT, Lba512, SectorSize};
use crate::store::{BlockStore, read_unaligned};

/// A header, without secrets. nbdcrypt may not support its ciphers and hashes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// The binary part.
    pub binary: BinaryHeader,
    /// The JSON part.
    pub metadata: Metadata,
}

/// A LUKS2 volume that nbdcrypt can open with the right passphrase.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Locked {
    header: Header,
    segment: Segment,
    key_len: usize,
    digest: ReadyDigest,
    /// The keyslots in the order in which they are tried, without the ignored ones.
    keyslots: Vec<(u32, Result<Opening, Unusable>)>,
    /// The first keyslot that is tried only if it is named.
    ignored: Option<u32>,
    /// Keyslots that hold a key other than the volume key, each with the digest of that key.
    unbound: Vec<(u32, Opening, ReadyDigest)>,
}

/// A digest that nbdcrypt can check: its hash is supported, and its length and iterations are within the limits.
#[derive(Clone, Debug, PartialEq, Eq)]
struct ReadyDigest {
    hash: HashAlgorithm,
    iterations: NonZeroU32,
    salt: Vec<u8>,
    digest: Vec<u8>,
}

/// The parameters with which a passphrase opens a keyslot.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Opening {
    kdf: ReadyKdf,
    /// The length in bytes of the key in the keyslot.
    key_len: usize,
    /// The length in bytes of the key that encrypts the key material.
    slot_key_len: usize,
    af_hash: HashAlgorithm,
    offset: u64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum ReadyKdf {
    Pbkdf2 { hash: HashAlgorithm, iterations: NonZeroU32, salt: Vec<u8> },
    Argon2 { is_id: bool, cost: Argon2Cost, salt: Vec<u8> },
}

/// Why a keyslot is skipped: nbdcrypt does not support it, or it exceeds the limits. Other keyslots may still open.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Unusable {
    Unsupported { what: &'static str, found: String, supported: &'static str },
    TooExpensive { field: String, found: u32, limit: u32 },
    TooManyIterations { field: String, found: u32, limit: u32 },
    TooMuchWork { keyslot: usize },
    Damaged(Fault),
}

impl Unusable {
    /// Returns the reason to skip a keyslot, or the error itself if it concerns more than this keyslot.
    fn from_error(error: LuksError) -> Result<Self, LuksError> {
        match error {
            LuksError::Unsupported { what, found, supported } => Ok(Self::Unsupported { what, found, supported }),
            LuksError::TooExpensive { field, found, limit } => Ok(Self::TooExpensive { field, found, limit }),
            LuksError::TooManyIterations { field, found, limit } => Ok(Self::TooManyIterations { field, found, limit }),
            LuksError::Corrupt { field, found } => Ok(Self::Damaged(Fault { field, found })),
            other => Err(other),
        }
    }

    fn error(&self) -> LuksError {
        match self.clone() {
            Self::Unsupported { what, found, supported } => LuksError::Unsupported { what, found, supported },
            Self::TooExpensive { field, found, limit } => LuksError::TooExpensive { field, found, limit },
            Self::TooManyIterations { field, found, limit } => LuksError::TooManyIterations { field, found, limit },
            Self::TooMuchWork { keyslot } => LuksError::TooMuchWork { keyslot },
            Self::Damaged(fault) => fault.error(),
        }
    }
}

/// Reads both copies of the header and returns the newer valid copy. This is enough to show the header, so its ciphers may
/// be any, including ones that nbdcrypt does not support.
///
/// # Errors
/// [`LuksError`] if there is no header, or if both copies are corrupt.
pub fn read_header(store: &dyn BlockStore) -> Result<Header, LuksError> {
    // There is at least one whole copy.
    let mut whole = Copies::read(store).whole(store)?;
    Ok(whole.swap_remove(0).header)
}

/// Reads the header of a volume in order to open it.
///
/// Uses the newer copy of the header. If both copies are equally old but differ, and the first copy cannot belong to
/// this disk, tries the second copy.
///
/// # Errors
/// [`LuksError`] if there is no header, if it is corrupt, or if it asks for too much work or for something that nbdcrypt
/// does not support.
pub fn read<'d>(disks: impl Into<Disks<'d>>, limits: &Limits) -> Result<Locked, LuksError> {
    let disks = disks.into();
    let mut copies = Copies::read(disks.header()).whole(disks.header())?.into_iter().map(|whole| whole.header);
    let (first, second) = (copies.next().ok_or(LuksError::NotLuks)?, copies.next());
    let second = second.filter(|second| second.binary.sequence_id == first.binary.sequence_id && *second != first);
    let open = |header: Header| {
        let locked = Locked::new(header, disks.data_disk(), limits)?;
        let (_, data) = data_segment(&locked.header.metadata)?;
        keyslot::refuse_short_iv(&data.encryption, &locked.segment)?;
        Ok(locked)
    };
    match (open(first), second) {
        (Err(error @ (LuksError::Corrupt { .. } | LuksError::TooSmall { .. } | LuksError::Detached)), Some(second)) => {
            open(second).map_err(|_| error)
        }
        (locked, _) => locked,
    }
}

impl Locked {
    /// Returns the volume that `header` describes, with its data on `disk`.
    ///
    /// # Errors
    /// [`LuksError`] if the header asks for too much work or for something that nbdcrypt does not support, or if the disk is
    /// too small.
    pub fn new(header: Header, disk: DataDisk, limits: &Limits) -> Result<Self, LuksError> {
        Self::trying(header, disk, limits, &|priority| !priority.is_ignored())
    }

    /// Does what [`Locked::new`] does, but also tries the keyslots that are otherwise ignored. These keyslots come last.
    ///
    /// # Errors
    /// See [`Locked::new`].
    pub(super) fn trying_all(header: Header, disk: DataDisk, limits: &Limits) -> Result<Self, LuksError> {
        Self::trying(header, disk, limits, &|_| true)
    }

    fn trying(
        header: Header,
        disk: DataDisk,
        limits: &Limits,
        is_tried: &dyn Fn(KeyslotPriority) -> bool,
    ) -> Result<Self, LuksError> {
        let metadata = &header.metadata;
        if let Some(requirement) = metadata.config.requirements.first() {
            return Err(LuksError::Unsupported {
                what: "requirement",
                found: requirement.clone(),
                supported: "it supports none; finish the reencryption first",
            });
        }
        let (segment_id, data) = data_segment(metadata)?;
        let (digest_id, digest) = metadata
            .digest_of_segment(segment_id)
            .ok_or_else(|| LuksError::corrupt("digests", format!("without a digest for segment {segment_id}")))?;
        let bound: Vec<(u32, &Keyslot)> =
            digest.keyslots.iter().filter_map(|id| metadata.keyslots.get(id).map(|slot| (*id, slot))).collect();
        let ignored = bound.iter().filter(|(_, slot)| !is_tried(slot.priority)).map(|(id, _)| *id).min();
        let key_len = key_len(data, &bound)?;
        let segment = segment_of(data, disk)?;
        let mut tried: Vec<(u32, &Keyslot)> = bound.into_iter().filter(|(_, slot)| is_tried(slot.priority)).collect();
        tried.sort_by_key(|(id, slot)| (slot.priority.rank(), *id));
        let digest = ReadyDigest::new(digest_id, digest, limits)?;
        let mut budget = Budget::default();
        let openings = tried.into_iter().map(|(id, slot)| match Opening::of_data(id, slot, data, limits) {
            Ok(opening) if budget.spend(opening.work(limits).and(digest.work(limits))) => Ok((id, Ok(opening))),
            Ok(_) => Ok((id, Err(Unusable::TooMuchWork { keyslot: id as usize }))),
            Err(error) => Ok((id, Err(Unusable::from_error(error)?))),
        });
        let keyslots = openings.collect::<Result<Vec<_>, LuksError>>()?;
        // Unbound keyslots do not open the volume. They are tried last, to tell the user that the passphrase belongs to
        // one of them.
        let unbound = metadata
            .keyslots
            .iter()
            .filter(|(id, slot)| !metadata.is_bound(**id) && is_tried(slot.priority))
            .filter_map(|(id, slot)| {
                let (digest_id, digest) = metadata.digests.iter().find(|(_, digest)| digest.keyslots.contains(id))?;
                let opening = Opening::new(*id, slot, slot.key_size as usize, limits).ok()?;
                let digest = ReadyDigest::new(*digest_id, digest, limits).ok()?;
                let is_affordable = budget.spend(opening.work(limits).and(digest.work(limits)));
                is_affordable.then_some((*id, opening, digest))
            })
            .collect();
        Ok(Self { segment, key_len, digest, keyslots, ignored, unbound, header })
    }

    /// Tries the passphrase on the keyslots: first on the preferred keyslots, then on the other keyslots. Both groups are
    /// tried in ascending order.
    ///
    /// # Errors
    /// - [`LuksError::WrongPassphrase`] or [`LuksError::WrongPassphraseBesideIgnored`] if the passphrase opens no keyslot.
    /// - [`LuksError::OpensUnbound`] if it opens only a keyslot that holds another key.
    /// - [`LuksError::DamagedKeyslot`], [`LuksError::UnreadableKeyslot`], [`LuksError::Unsupported`],
    ///   [`LuksError::TooExpensive`] or [`LuksError::OutOfMemory`] if it opens no keyslot and not all could be tried.
    pub fn unlock(&self, store: &dyn BlockStore, passphrase: &Passphrase) -> Result<UnlockedVolume, LuksError> {
        // A `Locked` has at least one keyslot.
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
            // If one keyslot could not be tried, that error is returned instead of `WrongPassphrase`.
            if matches!(refusal, LuksError::AllIgnored { .. } | LuksError::WrongPassphrase) {
                refusal = refused;
            }
        }
        if let Some(keyslot) = self.unbound_keyslot_of(store, passphrase) {
            return Err(LuksError::OpensUnbound(keyslot));
        }
        Err(match (refusal, self.ignored) {
            (LuksError::WrongPassphrase, Some(id)) => LuksError::WrongPassphraseBesideIgnored { ignored: id as usize },
            (refusal, _) => refusal,
        })
    }

    /// Tries the passphrase on one keyslot, even if it is otherwise ignored.
    ///
    /// # Errors
    /// [`LuksError::NoSuchKeyslot`], and the errors of [`Locked::unlock`].
    pub fn unlock_keyslot(
        &self,
        store: &dyn BlockStore,
        keyslot: usize,
        passphrase: &Passphrase,
        limits: &Limits,
    ) -> Result<UnlockedVolume, LuksError> {
        let id = u32::try_from(keyslot).unwrap_or(u32::MAX);
        let metadata = &self.header.metadata;
        let slot = metadata.keyslots.get(&id).ok_or(LuksError::NoSuchKeyslot(keyslot))?;
        if !metadata.is_bound(id) {
            return Err(LuksError::UnboundKeyslot(keyslot));
        }
        let (_, data) = data_segment(metadata)?;
        let opening = Opening::of_data(id, slot, data, limits)?;
        let key = self.try_keyslot(keyslot, &opening, store, passphrase)?;
        Ok(UnlockedVolume { key, segment: self.segment, keyslot })
    }

    /// Returns the first unbound keyslot that the passphrase opens.
    fn unbound_keyslot_of(&self, store: &dyn BlockStore, passphrase: &Passphrase) -> Option<usize> {
        let opens = |(id, opening, digest): &&(u32, Opening, ReadyDigest)| {
            opening.candidate(*id as usize, store, passphrase).is_ok_and(|(key, _)| digest.is_of(&key))
        };
        self.unbound.iter().find(opens).map(|(id, _, _)| *id as usize)
    }

    /// Returns the header.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Returns where the data lies.
    pub fn segment(&self) -> Segment {
        self.segment
    }

    /// Returns the length of the volume key in bits, with both halves counted.
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
        let (mut key, damaged) = opening.candidate(keyslot, store, passphrase)?;
        if self.digest.is_of(&key) {
            return Ok(VolumeKey::new(std::mem::take(&mut *key))?);
        }
        // This comes after the attempt, because key material that looks damaged may still be correct.
        Err(match damaged {
            Some(sector) => LuksError::DamagedKeyslot { keyslot, sector },
            None => LuksError::WrongPassphrase,
        })
    }
}

impl ReadyDigest {
    fn new(id: u32, digest: &Digest, limits: &Limits) -> Result<Self, LuksError> {
        let digest = match &digest.pbkdf2 {
            None => {
                let supported = "it supports pbkdf2";
                return Err(LuksError::Unsupported { what: "digest", found: digest.kind.clone(), supported });
            }
            Some(Err(fault)) => return Err(fault.error()),
            Some(Ok(digest)) => digest,
        };
        Ok(Self {
            hash: hash(&digest.hash)?,
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

    /// Returns the parameters of a keyslot that holds the key of `segment`.
    fn of_data(id: u32, slot: &Keyslot, segment: &DataSegment, limits: &Limits) -> Result<Self, LuksError> {
        if let Some(fault) = &slot.fault {
            return Err(fault.error());
        }
        Self::new(id, slot, keyslot::key_len(&segment.encryption, slot.key_size)?, limits)
    }

    /// Returns the parameters of a keyslot that holds a key of `key_len` bytes, whatever the key is for.
    fn new(id: u32, slot: &Keyslot, key_len: usize, limits: &Limits) -> Result<Self, LuksError> {
        if let Some(fault) = &slot.fault {
            return Err(fault.error());
        }
        let Some((kdf, af)) = &slot.opening else {
            return Err(LuksError::Unsupported {
                what: "keyslot type",
                found: slot.kind.clone(),
                supported: "it supports luks2",
            });
        };
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
                let supported = "it supports pbkdf2, argon2i and argon2id";
                return Err(LuksError::Unsupported { what: "key derivation", found: name.clone(), supported });
            }
        };
        Ok(Self {
            kdf,
            key_len,
            slot_key_len: keyslot::key_len(&slot.area.encryption, slot.area.key_size)?,
            af_hash: hash(&af.hash)?,
            // cryptsetup rounds the offset down to whole sectors.
            offset: slot.area.offset / LBA_UNIT * LBA_UNIT,
        })
    }

    /// Returns the key that results from decrypting the keyslot with the passphrase. With a wrong passphrase, this is
    /// noise. Also returns the first sector of the disk that does not look like key material.
    fn candidate(
        &self,
        keyslot: usize,
        store: &dyn BlockStore,
        passphrase: &Passphrase,
    ) -> Result<(Zeroizing<Vec<u8>>, Option<u64>), LuksError> {
        let mut material = Zeroizing::new(vec![0; keyslot::material_len(self.key_len)]);
        read_unaligned(store, &mut material, self.offset)
            .map_err(|source| LuksError::UnreadableKeyslot { keyslot, source })?;
        let damaged = keyslot::damaged_sector(&material).map(|sector| self.offset / LBA_UNIT + sector as u64);
        let slot_key = match &self.kdf {
            ReadyKdf::Pbkdf2 { hash, iterations, salt } => {
                kdf::pbkdf2(*hash, passphrase.expose(), salt, *iterations, self.slot_key_len)
            }
            ReadyKdf::Argon2 { is_id, cost, salt } => {
                kdf::argon2(*is_id, passphrase.expose(), salt, *cost, self.slot_key_len).map_err(
                    |error| match error {
                        Argon2Error::OutOfMemory => LuksError::OutOfMemory { keyslot, kib: cost.memory },
                        Argon2Error::Parameters => LuksError::corrupt(
                            format!("keyslots.{keyslot}.kdf"),
                            format!("{cost:?}, which Argon2 does not allow"),
                        ),
                    },
                )?
            }
        };
        let key = keyslot::unseal(self.af_hash, slot_key, self.key_len, &mut material)?;
        Ok((key, damaged))
    }
}

/// Returns the length of the volume key, as stated by most of the keyslots.
fn key_len(data: &DataSegment, keyslots: &[(u32, &Keyslot)]) -> Result<usize, LuksError> {
    let lens: Vec<Result<usize, LuksError>> = keyslots
        .iter()
        .map(|(_, slot)| match &slot.fault {
            Some(fault) => Err(fault.error()),
            None => keyslot::key_len(&data.encryption, slot.key_size),
        })
        .collect();
    let count = |len: usize| lens.iter().filter(|other| matches!(other, Ok(other) if *other == len)).count();
    let most = lens.iter().filter_map(|len| len.as_ref().ok()).copied().max_by_key(|len| count(*len));
    match most {
        Some(len) => Ok(len),
        None => lens.into_iter().next().unwrap_or(Err(LuksError::NoKeyslot)),
    }
}

/// Returns the only segment that holds data. Segments that are kept as backups during a conversion do not count.
fn data_segment(metadata: &Metadata) -> Result<(u32, &DataSegment), LuksError> {
    let mut segments = metadata.segments.iter().filter(|(_, segment)| !segment.is_backup());
    let Some((id, segment)) = segments.next() else {
        return Err(LuksError::corrupt("segments", "without a segment that holds data"));
    };
    let more = segments.count();
    if more > 0 {
        let (found, supported) = ((more + 1).to_string(), "it supports one; finish the reencryption first");
        return Err(LuksError::Unsupported { what: "number of data segments", found, supported });
    }
    if segment.kind != "crypt" {
        let found = segment.kind.clone();
        return Err(LuksError::Unsupported { what: "segment type", found, supported: "it supports crypt" });
    }
    if let Some(integrity) = &segment.integrity {
        let (found, supported) = (integrity.clone(), "it supports none");
        return Err(LuksError::Unsupported { what: "integrity", found, supported });
    }
    Ok((*id, segment))
}

/// Returns where the data lies on `disk`.
fn segment_of(data: &DataSegment, disk: DataDisk) -> Result<Segment, LuksError> {
    if data.offset == 0 && !disk.is_detached {
        return Err(LuksError::Detached);
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
