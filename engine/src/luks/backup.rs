//! Reads a header with its key material into one byte string, as `cryptsetup luksHeaderBackup` writes it, and restores it.
//!
//! ```text
//!   Backup::read(file) ─┐
//!                       ├─► Backup ─► restore(disk)
//!   Backup::read(disk) ─┘      └────► bytes: a file for us and for cryptsetup
//! ```
//!
//! A restore writes in this order:
//!
//! ```text
//!   key material where the disk has no key material and no header ─ flush ─ header ─ flush ─ other key material
//! ```
//!
//! If it is interrupted before the header is written, every key of the disk still opens. If it is interrupted afterwards, a
//! key of the backup opens if its key material is already on the disk. It is there if the place of this key material on the
//! disk held the same key material before, or held no key material and no header. There are two cases in which, for some
//! time, neither the old nor the new keys open:
//!
//! - The key material of a key of the backup belongs where the disk holds the key material of another key.
//! - The backup's header has another format or size than the disk's, which only `force` allows. This lasts while one header is
//!   written over the other.
//!
//! So the caller first saves [`Backup::replaced`], which undoes the restore.

use super::luks2::RefusedCopy;
use super::{Dump, HeaderUuid, LuksError, Random, dump, keyslot, luks1, luks2};
use crate::sector::LBA_UNIT;
use crate::store::{BlockStore, MemoryStore, read_unaligned, write_unaligned};

/// The maximum length of a header in bytes: two copies of 4 MiB, and the maximum size of the key material in the LUKS2
/// specification. The limit matters for LUKS1: its header can place key material anywhere, and everything before it is read into
/// memory.
const MAX_LEN: u64 = 2 * (4 << 20) + luks2::MAX_KEYSLOTS_SIZE;
/// The end of a LUKS1 backup is rounded up to this number of bytes: a page, as in cryptsetup.
const LUKS1_ALIGNMENT: u64 = 4096;
/// [`LBA_UNIT`] as an index.
const SECTOR: usize = 512;

/// A whole header with its key material. It is as secret as the header on the disk: anyone who knows a passphrase from the time
/// of the backup can get the volume key.
pub struct Backup {
    bytes: Vec<u8>,
    facts: Facts,
    /// A copy of the header that nbdcrypt refuses, but that another program would use.
    refused: Option<RefusedCopy>,
}

/// What must be equal on the disk and in the backup, and where the parts of the header lie.
struct Facts {
    version: &'static str,
    uuid: HeaderUuid,
    /// The offset of the data on its disk in bytes.
    data_offset: u64,
    key_bytes: Vec<u32>,
    /// The digest of the volume key and its salt. Keys with different digests are different.
    digest: Option<(Vec<u8>, Vec<u8>)>,
    /// How the data is encrypted: the cipher, first IV and length of each part of the data.
    encryption: String,
    /// Features that a program must support before it may touch the volume, such as an unfinished reencryption.
    requirements: Vec<String>,
    sector_size: u32,
    /// The length of one copy of the header in bytes, the number of copies, and the total length in bytes.
    header: u64,
    copies: u64,
    len: u64,
    /// The start and end of each keyslot's key material, in bytes.
    material: Vec<(u64, u64)>,
}

impl Facts {
    fn of(dump: &Dump) -> Self {
        match dump {
            Dump::Luks1(header) => {
                // No truncation: a header's key is at most 256 bytes.
                let len = keyslot::material_len(header.key_bytes as usize) as u64;
                let start = |slot: &luks1::Keyslot| u64::from(slot.material_offset) * LBA_UNIT;
                let end = header.keyslots.iter().map(|slot| start(slot) + len).max().unwrap_or(0);
                // Rounding up must not include data, which may begin in the middle of a page.
                let most = if header.payload_offset == 0 { u64::MAX } else { header.payload_offset_bytes().max(end) };
                // A keyslot whose state is damaged may hold a key.
                let used = header.keyslots.iter().filter(|slot| slot.state != luks1::KeyslotState::Disabled);
                Self {
                    version: "LUKS1",
                    uuid: header.uuid.clone(),
                    data_offset: header.payload_offset_bytes(),
                    key_bytes: vec![header.key_bytes],
                    digest: Some((header.digest.to_vec(), header.digest_salt.to_vec())),
                    encryption: format!("{} from IV 0", header.cipher()),
                    requirements: Vec::new(),
                    sector_size: 512,
                    header: 2 * LBA_UNIT,
                    copies: 1,
                    len: end.next_multiple_of(LUKS1_ALIGNMENT).min(most),
                    material: used.map(|slot| (start(slot), start(slot) + len)).collect(),
                }
            }
            Dump::Luks2(header) => {
                let luks2::Header { binary, metadata } = header.as_ref();
                let bound = metadata.keyslots.iter().filter(|(id, _)| metadata.is_bound(**id));
                let mut key_bytes: Vec<u32> = bound.map(|(_, slot)| slot.key_size).collect();
                key_bytes.sort_unstable();
                key_bytes.dedup();
                let data = metadata.data_segment().map(|(_, segment)| segment);
                let digest = metadata.data_segment().and_then(|(id, _)| metadata.digest_of_segment(id));
                let digest = digest.and_then(|(_, digest)| digest.pbkdf2.as_ref()?.as_ref().ok());
                let parts = metadata.segments.values().filter(|segment| !segment.is_backup()).map(|segment| {
                    let len = segment.size.map_or(String::new(), |size| format!(", {size} bytes"));
                    format!("{} from IV {}{len}", segment.encryption, segment.iv_tweak)
                });
                let area = |slot: &luks2::Keyslot| (slot.area.offset, slot.area.offset + slot.area.size);
                Self {
                    version: "LUKS2",
                    uuid: binary.uuid.clone(),
                    data_offset: data.map_or(0, |segment| segment.offset),
                    key_bytes,
                    digest: digest.map(|digest| (digest.digest.clone(), digest.salt.clone())),
                    encryption: parts.collect::<Vec<_>>().join("; "),
                    requirements: metadata.config.requirements.clone(),
                    sector_size: data.map_or(512, |segment| segment.sector_size),
                    header: binary.header_size,
                    copies: 2,
                    len: 2 * binary.header_size + metadata.config.keyslots_size,
                    material: metadata.keyslots.values().map(area).collect(),
                }
            }
        }
    }

    /// Returns whether the sector holds key material or a copy of the header.
    fn is_occupied(&self, sector: usize) -> bool {
        let at = (sector * SECTOR) as u64;
        at < self.header * self.copies || self.material.iter().any(|(start, end)| (*start..*end).contains(&at))
    }

    /// Refuses a restore unless both headers have the same volume key. `self` is the backup, `disk` is the header on the disk.
    ///
    /// A digest is computed with a random salt. If only the digests or only the salts differ, both headers had the same key, and
    /// the field that differs is damaged in one of them.
    fn refuse_other_key(&self, disk: &Self) -> Result<(), LuksError> {
        let (Some((backup_digest, backup_salt)), Some((disk_digest, disk_salt))) = (&self.digest, &disk.digest) else {
            let header = if self.digest.is_none() { "the backup" } else { "the header on the disk" };
            return Err(LuksError::BackupNotComparable { header });
        };
        match (backup_digest == disk_digest, backup_salt == disk_salt) {
            (true, true) => Ok(()),
            (false, true) => Err(LuksError::BackupOfDamagedDigest { same: "its salt", differs: "the digest itself" }),
            (true, false) => Err(LuksError::BackupOfDamagedDigest { same: "the digest itself", differs: "its salt" }),
            (false, false) => {
                let (backup, disk) = (self.uuid.to_string(), disk.uuid.to_string());
                Err(LuksError::BackupOfOtherKey { backup, disk })
            }
        }
    }

    /// Refuses a restore that does not fit. `self` is the backup, `disk` is the header on the disk.
    fn refuse_unless_same(&self, disk: &Self, force: bool) -> Result<(), LuksError> {
        let same = |what, backup: &dyn ToString, disk: &dyn ToString| {
            let (backup, disk) = (backup.to_string(), disk.to_string());
            if backup == disk { Ok(()) } else { Err(LuksError::BackupMismatch { what, backup, disk }) }
        };
        same("the data offset in bytes", &self.data_offset, &disk.data_offset)?;
        same("the sector size", &self.sector_size, &disk.sector_size)?;
        // A LUKS2 header without keyslots does not tell the length of its key.
        if !self.key_bytes.is_empty() && !disk.key_bytes.is_empty() {
            let bits = |facts: &Self| facts.key_bytes.iter().map(|len| len * 8).max().unwrap_or(0);
            same("the key size in bits", &bits(self), &bits(disk))?;
        }
        for (header, facts) in [("the backup", self), ("the header on the disk", disk)] {
            if let Some(requirement) = facts.requirements.first().filter(|_| !force) {
                return Err(LuksError::BackupOfUnfinished { header, requirement: requirement.clone() });
            }
        }
        if !force {
            self.refuse_other_key(disk)?;
        }
        let other = |what, backup: &dyn ToString, disk: &dyn ToString| match same(what, backup, disk) {
            Err(LuksError::BackupMismatch { what, backup, disk }) if !force => {
                Err(LuksError::BackupOfAnother { what, backup, disk: format!("{disk} on the disk") })
            }
            _ => Ok(()),
        };
        other("format", &self.version, &disk.version)?;
        other("UUID", &self.uuid, &disk.uuid)?;
        other("header size", &self.header, &disk.header)?;
        other("encryption", &self.encryption, &disk.encryption)
    }
}

impl Backup {
    /// Reads a header with its key material from a disk or from a backup file.
    ///
    /// # Errors
    /// [`LuksError`] if there is no whole header, or if the file ends before the key material does.
    pub fn read(store: &dyn BlockStore) -> Result<Self, LuksError> {
        let header = dump(store)?;
        let facts = Facts::of(&header);
        if facts.len > MAX_LEN {
            return Err(LuksError::corrupt("key-material-offset", format!("up to byte {} of the disk", facts.len)));
        }
        if facts.len > store.len() {
            return Err(LuksError::TooSmall { needed: facts.len, available: store.len() });
        }
        // No truncation: the length is at most MAX_LEN.
        let mut bytes = vec![0; usize::try_from(facts.len).unwrap_or(0)];
        read_unaligned(store, &mut bytes, 0)?;
        Ok(Self { bytes, facts, refused: luks2::overlooked(store) })
    }

    /// Returns the offset in bytes of the volume's data on its disk, which is 0 if the header is detached.
    pub fn data_offset(&self) -> u64 {
        self.facts.data_offset
    }

    /// Returns the contents of the backup file.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Returns the bytes that a restore to `store` replaces. The caller saves them first.
    ///
    /// # Errors
    /// [`LuksError::TooSmall`] if the disk is too small for the backup, or [`LuksError::Store`].
    pub fn replaced(&self, store: &dyn BlockStore) -> Result<Vec<u8>, LuksError> {
        // The header on the disk may be longer than the header in the backup. Then all of it is returned, and restoring
        // these bytes undoes the restore, too.
        let own = dump(store).map_or(0, |header| Facts::of(&header).len.min(MAX_LEN));
        let len = self.facts.len.max(own.min(store.len()));
        if len > store.len() {
            return Err(LuksError::TooSmall { needed: len, available: store.len() });
        }
        let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
        read_unaligned(store, &mut bytes, 0)?;
        Ok(bytes)
    }

    /// Checks that the backup is of the volume on `store`, or at least may be restored with `force`.
    ///
    /// # Errors
    /// - [`LuksError::TooSmall`] or [`LuksError::BackupMismatch`] if the backup does not fit the disk or its data.
    ///
    /// Without `force`, also:
    ///
    /// - [`LuksError::BackupOfOtherKey`] or [`LuksError::BackupOfUnfinished`] if the data would be noise after the restore.
    /// - [`LuksError::BackupOfDamagedDigest`] or [`LuksError::BackupNotComparable`] if it is unknown whether the data
    ///   would be noise.
    /// - [`LuksError::BackupBesideRefused`] if a newer copy of a header would be lost.
    /// - [`LuksError::BackupOfAnother`] if the backup is of another volume or the disk has no header to compare it with.
    pub fn refuse_unless_fit(&self, store: &dyn BlockStore, force: bool) -> Result<(), LuksError> {
        if self.facts.len > store.len() {
            return Err(LuksError::TooSmall { needed: self.facts.len, available: store.len() });
        }
        if !force {
            let in_backup = self
                .refused
                .clone()
                .map(|refused| ("the backup", refused, "A restore would write only the older copy"));
            let on_disk = luks2::overlooked(store).map(|refused| {
                (
                    "the header on the disk",
                    refused,
                    "The backup can only be compared with the older copy, and a restore would overwrite both",
                )
            });
            if let Some((header, refused, why)) = in_backup.or(on_disk) {
                return Err(LuksError::BackupBesideRefused { header, refused: Box::new(refused), why });
            }
        }
        match dump(store) {
            Ok(disk) => self.facts.refuse_unless_same(&Facts::of(&disk), force),
            Err(LuksError::Store(error)) => Err(error.into()),
            Err(_) if force => Ok(()),
            Err(error) => {
                let backup = self.facts.uuid.to_string();
                let disk = format!("the header on the disk cannot be compared with it: {error}");
                Err(LuksError::BackupOfAnother { what: "UUID", backup, disk })
            }
        }
    }

    /// Writes the header and key material to `store`, in the order that the module documentation describes. The caller must
    /// have exclusive use of the disk, and must have saved [`Backup::replaced`].
    ///
    /// # Errors
    /// The errors of [`Backup::refuse_unless_fit`]; the disk is then unchanged. Otherwise the error of the disk or of `random`.
    pub fn restore(&self, store: &dyn BlockStore, force: bool, random: Random<'_>) -> Result<(), LuksError> {
        self.refuse_unless_fit(store, force)?;
        let image = self.whole(random)?;
        let disk = dump(store).ok();
        if let Some(Dump::Luks2(_)) = &disk {
            // One copy is whole while the other is written.
            luks2::make_copies_equal(store, random)?;
        }
        let disk = disk.as_ref().map(Facts::of);
        let mut now = vec![0; image.len()];
        read_unaligned(store, &mut now, 0)?;
        // No truncation: they are parts of the image.
        let header = usize::try_from(self.facts.header).unwrap_or(0) / SECTOR;
        let headers = header * usize::try_from(self.facts.copies).unwrap_or(1);
        let occupied = |sector: usize| disk.as_ref().is_some_and(|disk| disk.is_occupied(sector));
        let write = |from: usize, to: usize, chosen: &dyn Fn(usize) -> bool| -> Result<(), LuksError> {
            let differs = |sector: &usize| {
                let bytes = sector * SECTOR..(sector + 1) * SECTOR;
                chosen(*sector) && image[bytes.clone()] != now[bytes]
            };
            let mut next = from;
            while let Some(start) = (next..to).find(differs) {
                let end = (start..to).find(|sector| !differs(sector)).unwrap_or(to);
                write_unaligned(store, &image[start * SECTOR..end * SECTOR], (start * SECTOR) as u64)?;
                next = end;
            }
            store.flush()?;
            Ok(())
        };
        let all = image.len() / SECTOR;
        write(headers, all, &|sector| !occupied(sector))?;
        for copy in (0..headers).step_by(header.max(1)) {
            write(copy, copy + header, &|_| true)?;
        }
        write(headers, all, &occupied)
    }

    /// Returns the image with two whole headers. One of the two may have been broken on the disk when the backup was
    /// made.
    fn whole(&self, random: Random<'_>) -> Result<Vec<u8>, LuksError> {
        if self.facts.copies == 1 {
            return Ok(self.bytes.clone());
        }
        let image = MemoryStore::from(self.bytes.clone());
        luks2::make_copies_equal(&image, random)?;
        Ok(image.snapshot())
    }
}
