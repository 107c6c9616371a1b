//! A header with its key material as one piece of bytes, as `cryptsetup luksHeaderBackup` writes it, and back.
//!
//! ```text
//!   Backup::read(file) ─┐
//!                       ├─► Backup ─► restore(disk)
//!   Backup::read(disk) ─┘      └────► bytes: a file for us and for cryptsetup
//! ```
//!
//! A restore orders its writes:
//!
//! ```text
//!   key material where the disk has none, and no header ─ flush ─ header ─ flush ─ the rest of the key material
//! ```
//!
//! Cut off before the header, all that opened still opens. Cut off after it, those keys of the backup open whose material
//! is on the disk already: it was the same there, or lies where no other key's was. There is a time in which neither opens
//! where a key of the backup has the place of another one on the disk; and where the backup's header is of another format
//! or size than the disk's, which only force allows, while the one is written over the other. So the caller first saves
//! [`Backup::replaced`], which undoes the restore.

use uuid::Uuid;

use super::{Dump, LuksError, Random, dump, keyslot, luks2};
use crate::sector::LBA_UNIT;
use crate::store::{BlockStore, MemoryStore, read_unaligned, write_unaligned};

/// No header is longer: two of 4 MiB, and the most key material that the specification of LUKS2 allows. A LUKS1 header names any
/// place for its key material, and would have all before it read into memory.
const MAX_LEN: u64 = 2 * (4 << 20) + luks2::MAX_KEYSLOTS_SIZE;
/// What key material is rounded up to at the end of a LUKS1 backup, in bytes: a page, with cryptsetup.
const LUKS1_ALIGNMENT: u64 = 4096;
/// `LBA_UNIT`, as an index.
const SECTOR: usize = 512;

/// A whole header with its key material. That is as secret as the disk's own: whoever knows a passphrase of that time has
/// the volume's key.
pub struct Backup {
    bytes: Vec<u8>,
    facts: Facts,
}

/// What must be the same on the disk and in the backup, and where what lies.
struct Facts {
    version: &'static str,
    uuid: Uuid,
    /// Bytes from the start of the data's disk to the data.
    data_offset: u64,
    key_bytes: Vec<u32>,
    sector_size: u32,
    /// Bytes of one copy of the header, and all copies.
    header: u64,
    copies: u64,
    len: u64,
    /// First byte and end of each key's material.
    material: Vec<(u64, u64)>,
}

impl Facts {
    fn of(dump: &Dump) -> Self {
        match dump {
            Dump::Luks1(header) => {
                // No truncation: a header's key is at most 256 bytes.
                let len = keyslot::material_len(header.key_bytes as usize) as u64;
                let start = |slot: &super::luks1::Keyslot| u64::from(slot.material_offset) * LBA_UNIT;
                let end = header.keyslots.iter().map(|slot| start(slot) + len).max().unwrap_or(0);
                // What is rounded up may reach into data that begins at no page: that is no header's.
                let most = if header.payload_offset == 0 { u64::MAX } else { header.payload_offset_bytes().max(end) };
                let used = header.keyslots.iter().filter(|slot| slot.enabled);
                Self {
                    version: "LUKS1",
                    uuid: header.uuid,
                    data_offset: header.payload_offset_bytes(),
                    key_bytes: vec![header.key_bytes],
                    sector_size: 512,
                    header: 2 * LBA_UNIT,
                    copies: 1,
                    len: end.next_multiple_of(LUKS1_ALIGNMENT).min(most),
                    material: used.map(|slot| (start(slot), start(slot) + len)).collect(),
                }
            }
            Dump::Luks2(header) => {
                let luks2::Header { binary, metadata } = header.as_ref();
                let mut key_bytes: Vec<u32> = metadata.keyslots.values().map(|slot| slot.key_size).collect();
                key_bytes.sort_unstable();
                key_bytes.dedup();
                let data = metadata.segments.values().next();
                let area = |slot: &luks2::Keyslot| (slot.area.offset, slot.area.offset + slot.area.size);
                Self {
                    version: "LUKS2",
                    uuid: binary.uuid,
                    data_offset: data.map_or(0, |segment| segment.offset),
                    key_bytes,
                    sector_size: data.map_or(512, |segment| segment.sector_size),
                    header: binary.header_size,
                    copies: 2,
                    len: 2 * binary.header_size + metadata.config.keyslots_size,
                    material: metadata.keyslots.values().map(area).collect(),
                }
            }
        }
    }

    /// Whether there is a key in the sector, or a copy of the header.
    fn is_occupied(&self, sector: usize) -> bool {
        let at = (sector * SECTOR) as u64;
        at < self.header * self.copies || self.material.iter().any(|(start, end)| (*start..*end).contains(&at))
    }

    /// This is the backup's, `disk` the disk's.
    fn refuse_unless_same(&self, disk: &Self, force: bool) -> Result<(), LuksError> {
        let same = |what, backup: &dyn ToString, disk: &dyn ToString| {
            let (backup, disk) = (backup.to_string(), disk.to_string());
            if backup == disk { Ok(()) } else { Err(LuksError::BackupMismatch { what, backup, disk }) }
        };
        same("the data offset in bytes", &self.data_offset, &disk.data_offset)?;
        same("the sector size", &self.sector_size, &disk.sector_size)?;
        // A LUKS2 header without a keyslot says nothing of its key.
        if !self.key_bytes.is_empty() && !disk.key_bytes.is_empty() {
            let bits = |facts: &Self| facts.key_bytes.iter().map(|len| len * 8).max().unwrap_or(0);
            same("the key size in bits", &bits(self), &bits(disk))?;
        }
        let other = |what, backup: &dyn ToString, disk: &dyn ToString| match same(what, backup, disk) {
            Err(LuksError::BackupMismatch { what, backup, disk }) if !force => {
                Err(LuksError::BackupOfAnother { what, backup, disk: format!("{disk} on the disk") })
            }
            _ => Ok(()),
        };
        other("format", &self.version, &disk.version)?;
        other("UUID", &self.uuid, &disk.uuid)?;
        other("header size", &self.header, &disk.header)
    }
}

impl Backup {
    /// Reads a header with its key material from a disk, or from a backup's file.
    ///
    /// # Errors
    /// [`LuksError`] when there is no whole header, or the file ends before the key material does.
    pub fn read(store: &dyn BlockStore) -> Result<Self, LuksError> {
        let header = dump(store)?;
        let facts = Facts::of(&header);
        if facts.len > MAX_LEN {
            return Err(LuksError::corrupt("key-material-offset", format!("up to byte {} of the disk", facts.len)));
        }
        if facts.len > store.len() {
            return Err(LuksError::TooSmall { needed: facts.len, available: store.len() });
        }
        // No truncation: that is at most MAX_LEN.
        let mut bytes = vec![0; usize::try_from(facts.len).unwrap_or(0)];
        read_unaligned(store, &mut bytes, 0)?;
        Ok(Self { bytes, facts })
    }

    /// The backup's file.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// What a restore to `store` replaces, to be saved before.
    ///
    /// # Errors
    /// [`LuksError::TooSmall`], or what the disk said.
    pub fn replaced(&self, store: &dyn BlockStore) -> Result<Vec<u8>, LuksError> {
        // The disk's own header may reach further; then its whole backup undoes the restore and more.
        let own = dump(store).map_or(0, |header| Facts::of(&header).len.min(MAX_LEN));
        let len = self.facts.len.max(own.min(store.len()));
        if len > store.len() {
            return Err(LuksError::TooSmall { needed: len, available: store.len() });
        }
        let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
        read_unaligned(store, &mut bytes, 0)?;
        Ok(bytes)
    }

    /// Whether the backup is of the volume on `store`, or may at least be restored with `force`.
    ///
    /// # Errors
    /// [`LuksError::BackupMismatch`] when it would not fit its data; without `force` [`LuksError::BackupOfAnother`] when it
    /// is another volume's, or the disk has no header that it could be compared with.
    pub fn refuse_unless_fit(&self, store: &dyn BlockStore, force: bool) -> Result<(), LuksError> {
        if self.facts.len > store.len() {
            return Err(LuksError::TooSmall { needed: self.facts.len, available: store.len() });
        }
        match dump(store) {
            Ok(disk) => self.facts.refuse_unless_same(&Facts::of(&disk), force),
            Err(LuksError::Store(error)) => Err(error.into()),
            Err(_) if force => Ok(()),
            Err(error) => {
                let (backup, disk) = (self.facts.uuid.to_string(), error.to_string());
                Err(LuksError::BackupOfAnother { what: "UUID", backup, disk })
            }
        }
    }

    /// Writes the header and key material to `store`, in the order that the module tells. Whoever calls has the disk for
    /// itself, and has saved [`Backup::replaced`].
    ///
    /// # Errors
    /// As [`Backup::refuse_unless_fit`] has them, with the disk untouched; else what the disk or the source of randomness
    /// said.
    pub fn restore(&self, store: &dyn BlockStore, force: bool, random: Random<'_>) -> Result<(), LuksError> {
        self.refuse_unless_fit(store, force)?;
        let image = self.whole(random)?;
        let disk = dump(store).ok();
        if let Some(Dump::Luks2(_)) = &disk {
            // One copy is whole while the other is written.
            luks2::repair(store, random)?;
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

    /// The image with both headers whole, as they may not have been where it was taken.
    fn whole(&self, random: Random<'_>) -> Result<Vec<u8>, LuksError> {
        if self.facts.copies == 1 {
            return Ok(self.bytes.clone());
        }
        let image = MemoryStore::from(self.bytes.clone());
        luks2::repair(&image, random)?;
        Ok(image.snapshot())
    }
}
