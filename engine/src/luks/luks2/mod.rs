//! LUKS2, as its on-disk format specification defines it.
//!
//! A volume begins with two copies of its header. Each copy has a binary part with a checksum and a JSON part. After them come
//! the key material and then the data. The data has sectors of 512 to 4096 bytes, and its IV counts 512-byte units.

mod dump;
mod ephemeral;
mod format;
mod header;
mod keys;
mod label;
mod layout;
mod metadata;
mod settings;
mod tokens;
mod update;

pub use ephemeral::{Ephemeral, is_ephemeral};
pub(super) use format::data_offset;
pub use format::{Options, begin, check_sector_size, default_sector_size};
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
use super::kdf::{Argon2Cost, KdfOptions};
use super::limits::Budget;
use super::opening::{KeyDigest, Keyslots, Lock, Opening, Order};
use super::{DataDisk, Disks, Limits, LuksError, UnlockedVolume, keyslot};
use crate::key::Passphrase;
use crate::layout::Segment;
use crate::sector::{LBA_UNIT, Lba512, SectorSize};
use crate::store::BlockStore;

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
    lock: Lock,
    /// The first keyslot that is tried only if it is named.
    ignored: Option<u32>,
    /// Keyslots that hold a key other than the volume key, each with the digest of that key.
    unbound: Vec<(u32, Opening, KeyDigest)>,
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
        keyslot::refuse_short_iv(&data.encryption, &locked.lock.segment)?;
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
        if header.is_ephemeral() {
            return Err(LuksError::Ephemeral);
        }
        let metadata = &header.metadata;
        if let Some(requirement) = metadata.config.requirements.first() {
            let supported = "it supports none; finish the reencryption first";
            return Err(LuksError::unsupported("requirement", requirement, supported));
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
        let digest = key_digest(digest_id, digest, limits)?;
        let mut budget = Budget::default();
        let openings = tried.into_iter().map(|(id, slot)| (id as usize, opening_of_data(id, slot, data, limits)));
        let order = Order::new(openings, &digest, limits, &mut budget);
        // Unbound keyslots do not open the volume. They are tried last, to tell the user that the passphrase belongs to
        // one of them.
        let unbound = metadata
            .keyslots
            .iter()
            .filter(|(id, slot)| !metadata.is_bound(**id) && is_tried(slot.priority))
            .filter_map(|(id, slot)| {
                let (digest_id, digest) = metadata.digests.iter().find(|(_, digest)| digest.keyslots.contains(id))?;
                let opening = opening_of(*id, slot, slot.key_size as usize, limits).ok()?;
                let digest = key_digest(*digest_id, digest, limits).ok()?;
                let is_affordable = budget.spend(opening.work(limits).and(digest.work(limits)));
                is_affordable.then_some((*id, opening, digest))
            })
            .collect();
        Ok(Self { lock: Lock { segment, key_len, digest, order, limits: *limits }, ignored, unbound, header })
    }

    /// Tries the passphrase on the keyslots: first on the preferred keyslots, then on the other keyslots. Both groups are
    /// tried in ascending order.
    ///
    /// # Errors
    /// - [`LuksError::WrongPassphrase`] or [`LuksError::WrongPassphraseBesideIgnored`] if the passphrase opens no keyslot.
    /// - [`LuksError::OpensUnbound`] if it opens only a keyslot that holds another key.
    /// - [`LuksError::Keyslot`], [`LuksError::Unsupported`], [`LuksError::TooExpensive`], [`LuksError::OutOfMemory`] and others if
    ///   it opens no keyslot and not all could be tried.
    pub fn unlock(&self, store: &dyn BlockStore, passphrase: &Passphrase) -> Result<UnlockedVolume, LuksError> {
        // A `Locked` has at least one keyslot.
        let all_ignored = LuksError::AllIgnored { keyslot: self.ignored.unwrap_or(0) as usize };
        let refusal = match self.try_in_order(store, passphrase, all_ignored) {
            unlocked @ (Ok(_) | Err(LuksError::Key(_))) => return unlocked,
            Err(refusal) => refusal,
        };
        if let Some(keyslot) = self.unbound_keyslot_of(store, passphrase) {
            return Err(LuksError::OpensUnbound(keyslot));
        }
        Err(match (refusal, self.ignored) {
            (LuksError::WrongPassphrase, Some(id)) => LuksError::WrongPassphraseBesideIgnored { ignored: id as usize },
            (refusal, _) => refusal,
        })
    }

    /// Returns the first unbound keyslot that the passphrase opens.
    fn unbound_keyslot_of(&self, store: &dyn BlockStore, passphrase: &Passphrase) -> Option<usize> {
        let opens = |(id, opening, digest): &&(u32, Opening, KeyDigest)| {
            opening.candidate(*id as usize, store, passphrase).is_ok_and(|(key, _)| digest.is_of(&key))
        };
        self.unbound.iter().find(opens).map(|(id, _, _)| *id as usize)
    }

    /// Returns the header.
    pub fn header(&self) -> &Header {
        &self.header
    }
}

impl Keyslots for Locked {
    fn lock(&self) -> &Lock {
        &self.lock
    }

    fn opening(&self, keyslot: usize) -> Result<Opening, LuksError> {
        let id = u32::try_from(keyslot).unwrap_or(u32::MAX);
        let metadata = &self.header.metadata;
        let slot = metadata.keyslots.get(&id).ok_or(LuksError::NoSuchKeyslot(keyslot))?;
        if !metadata.is_bound(id) {
            return Err(LuksError::UnboundKeyslot(keyslot));
        }
        let (_, data) = data_segment(metadata)?;
        opening_of_data(id, slot, data, &self.lock.limits)
    }
}

/// Returns a digest, after checking that nbdcrypt supports it.
fn key_digest(id: u32, digest: &Digest, limits: &Limits) -> Result<KeyDigest, LuksError> {
    let digest = match &digest.pbkdf2 {
        None => return Err(LuksError::unsupported("digest", &digest.kind, "it supports pbkdf2")),
        Some(Err(fault)) => return Err(fault.error()),
        Some(Ok(digest)) => digest,
    };
    Ok(KeyDigest {
        hash: HashAlgorithm::supported("hash", &digest.hash)?,
        iterations: limits.iterations(|| format!("digests.{id}.iterations"), digest.iterations)?,
        salt: digest.salt.clone(),
        digest: digest.digest.clone(),
    })
}

/// Returns the parameters of a keyslot that holds the key of `segment`.
fn opening_of_data(id: u32, slot: &Keyslot, segment: &DataSegment, limits: &Limits) -> Result<Opening, LuksError> {
    opening_of(id, slot, slot.key_len_for(segment)?, limits)
}

/// Returns the parameters of a keyslot that holds a key of `key_len` bytes, whatever the key is for.
fn opening_of(id: u32, slot: &Keyslot, key_len: usize, limits: &Limits) -> Result<Opening, LuksError> {
    if let Some(fault) = &slot.fault {
        return Err(fault.error());
    }
    let Some((kdf, af)) = &slot.opening else {
        return Err(LuksError::unsupported("keyslot type", &slot.kind, "it supports luks2"));
    };
    let path = |field: &str| format!("keyslots.{id}.kdf.{field}");
    let within = |field: &str, found: u32, limit: u32| {
        if found > limit { Err(LuksError::TooExpensive { field: path(field), found, limit }) } else { Ok(found) }
    };
    let (kdf, salt) = match kdf {
        Kdf::Pbkdf2 { hash, iterations, salt } => {
            let hash = HashAlgorithm::supported("hash", hash)?;
            let iterations = limits.iterations(|| path("iterations"), *iterations)?;
            (KdfOptions::Pbkdf2 { hash, iterations }, salt)
        }
        Kdf::Argon2 { is_id, time, memory, cpus, salt } => {
            let cost = Argon2Cost {
                time: within("time", *time, limits.argon2_passes(*memory))?,
                memory: within("memory", *memory, limits.argon2_memory)?,
                lanes: within("cpus", *cpus, limits.argon2_lanes)?,
            };
            (if *is_id { KdfOptions::Argon2id(cost) } else { KdfOptions::Argon2i(cost) }, salt)
        }
        Kdf::Other(name) => {
            return Err(LuksError::unsupported("key derivation", name, "it supports pbkdf2, argon2i and argon2id"));
        }
    };
    Ok(Opening {
        kdf,
        salt: salt.clone(),
        key_len,
        slot_key_len: keyslot::key_len(&slot.area.encryption, slot.area.key_size)?,
        af_hash: HashAlgorithm::supported("hash", &af.hash)?,
        // cryptsetup rounds the offset down to whole sectors.
        offset: slot.area.offset / LBA_UNIT * LBA_UNIT,
    })
}

impl Keyslot {
    /// Returns the length in bytes of the key for `segment` that the keyslot holds.
    fn key_len_for(&self, segment: &DataSegment) -> Result<usize, LuksError> {
        match &self.fault {
            Some(fault) => Err(fault.error()),
            None => keyslot::key_len(&segment.encryption, self.key_size),
        }
    }
}

/// Returns the length of the volume key, as stated by most of the keyslots.
fn key_len(data: &DataSegment, keyslots: &[(u32, &Keyslot)]) -> Result<usize, LuksError> {
    let lens: Vec<Result<usize, LuksError>> = keyslots.iter().map(|(_, slot)| slot.key_len_for(data)).collect();
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
        let supported = "it supports one; finish the reencryption first";
        return Err(LuksError::unsupported("number of data segments", (more + 1).to_string(), supported));
    }
    if segment.kind != "crypt" {
        return Err(LuksError::unsupported("segment type", &segment.kind, "it supports crypt"));
    }
    if let Some(integrity) = &segment.integrity {
        return Err(LuksError::unsupported("integrity", integrity, "it supports none"));
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
