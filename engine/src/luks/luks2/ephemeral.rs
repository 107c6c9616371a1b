//! Ephemeral volumes: their key exists only in the memory of the process that serves them.
//!
//! The header of such a volume has a digest and a segment, and no keyslot. It is the mark by which the next start knows that
//! the data on the disk is lost for good, so that a new volume may be made there. A header that has lost its keyslots, as by
//! `cryptsetup luksErase`, does not count as this mark, because it lacks the subsystem [`SUBSYSTEM`].

use ::uuid::Uuid;

use super::format::{Options, begin_without_keyslot};
use super::header::{Copies, Copy, Found, read_copy};
use super::{Header, Layout};
use crate::key::VolumeKey;
use crate::luks::format::segment_from;
use crate::luks::kdf::{KdfOptions, MIN_ITERATIONS};
use crate::luks::{Disks, HashAlgorithm, LuksError, PendingFormat, Random};
use crate::sector::SectorSize;
use crate::store::BlockStore;

/// The subsystem in the header of an ephemeral volume. `cryptsetup luksDump` shows it.
const SUBSYSTEM: &str = "nbdcrypt ephemeral";

/// A new ephemeral volume.
#[derive(Clone, Copy, Debug)]
pub struct Ephemeral {
    /// The encryption unit.
    pub sector_size: SectorSize,
    /// The UUID of the volume.
    pub uuid: Uuid,
}

impl Ephemeral {
    /// Begins to format `disks`. [`PendingFormat`] says what must follow. All data on the disks is lost: the caller must have
    /// checked that they hold none. The key is needed until the volume is closed, and nothing can recover it.
    ///
    /// # Errors
    /// See [`super::begin`].
    pub fn begin<'d>(
        &self,
        disks: impl Into<Disks<'d>>,
        key: VolumeKey,
        random: Random<'_>,
    ) -> Result<PendingFormat, LuksError> {
        begin_without_keyslot(disks, &self.options(), key, random)
    }

    /// Fails if `disks` are too small for this volume. Reads and writes nothing.
    ///
    /// # Errors
    /// [`LuksError::TooSmall`].
    pub fn check_room<'d>(&self, disks: impl Into<Disks<'d>>) -> Result<(), LuksError> {
        let disks = disks.into();
        let offset = Self::layout().areas(0, &disks)?.data;
        segment_from(&disks, offset, self.sector_size).map(drop)
    }

    /// The smallest header: two copies, no key material. The data begins at 1 MiB.
    fn layout() -> Layout {
        Layout { keyslots_size: Some(0), ..Layout::default() }
    }

    fn options(&self) -> Options {
        let iterations = MIN_ITERATIONS;
        Options {
            // There is no keyslot.
            kdf: KdfOptions::Pbkdf2 { hash: HashAlgorithm::Sha256, iterations },
            hash: HashAlgorithm::Sha256,
            digest_iterations: iterations,
            sector_size: self.sector_size,
            label: String::new(),
            subsystem: SUBSYSTEM.to_owned(),
            uuid: self.uuid,
            layout: Self::layout(),
            tokens: Vec::new(),
        }
    }
}

impl Header {
    /// Returns whether this is the header of an ephemeral volume.
    pub fn is_ephemeral(&self) -> bool {
        self.metadata.keyslots.is_empty() && self.binary.subsystem.as_bytes() == SUBSYSTEM.as_bytes()
    }
}

/// Returns whether a disk has the header of an ephemeral volume: one copy at least, and no copy of another header. The caller
/// must have checked that the disk holds nothing else.
///
/// # Errors
/// [`LuksError::Store`] if the disk fails.
pub fn is_ephemeral(store: &dyn BlockStore) -> Result<bool, LuksError> {
    let mut is_ephemeral = false;
    let Copies { primary, mut secondary } = Copies::read(store);
    if matches!(primary, Found::Broken(LuksError::Unfinished)) {
        // A new volume was begun here, and cut off at once. The other copy counts for nothing else than this.
        secondary = read_copy(store, Copy::Secondary(Ephemeral::layout().metadata_size));
    }
    for copy in [primary, secondary] {
        match copy {
            Found::Whole(whole) if whole.header.is_ephemeral() => is_ephemeral = true,
            Found::Whole(_) | Found::Refused { .. } => return Ok(false),
            Found::Broken(error @ LuksError::Store(_)) => return Err(error),
            Found::Broken(_) => {}
        }
    }
    Ok(is_ephemeral)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key::Passphrase;
    use crate::luks::{self, Dump, Limits};
    use crate::store::MemoryStore;

    const EPHEMERAL: Ephemeral = Ephemeral { sector_size: SectorSize::B4096, uuid: Uuid::from_u128(5) };

    fn random() -> impl FnMut(&mut [u8]) -> std::io::Result<()> {
        let mut next = 0_u8;
        move |bytes| {
            bytes.iter_mut().for_each(|byte| {
                next = next.wrapping_mul(5).wrapping_add(3);
                *byte = next;
            });
            Ok(())
        }
    }

    fn key() -> VolumeKey {
        VolumeKey::new((0..64).collect()).unwrap()
    }

    #[test]
    fn the_header_has_a_segment_and_a_digest_and_no_keyslot() {
        let disk = MemoryStore::zeroed(4 << 20);
        let pending = EPHEMERAL.begin(&disk, key(), &mut random()).unwrap();
        assert!(!is_ephemeral(&disk).unwrap(), "it is not complete");
        let segment = pending.commit(&disk).unwrap();
        assert_eq!((segment.offset, segment.len), (1 << 20, 3 << 20));
        assert!(is_ephemeral(&disk).unwrap());
        let Dump::Luks2(header) = luks::dump(&disk).unwrap() else { panic!() };
        let metadata = &header.metadata;
        assert_eq!((metadata.keyslots.len(), metadata.digests.len(), metadata.segments.len()), (0, 1, 1));
        let error = luks::read(&disk, &Limits::default()).unwrap_err();
        assert!(matches!(error, LuksError::Ephemeral), "{error}");
    }

    #[test]
    fn one_whole_copy_is_enough() {
        for lost in [0, 16 << 10] {
            let disk = MemoryStore::zeroed(4 << 20);
            let _ = EPHEMERAL.begin(&disk, key(), &mut random()).unwrap().commit(&disk).unwrap();
            disk.write_at(&[0; 4096], lost).unwrap();
            assert!(is_ephemeral(&disk).unwrap(), "{lost}");
            // A new volume was begun there, and cut off at once.
            let mut head = [0; 4096];
            crate::signature::put_marker(&mut head);
            disk.write_at(&head, 0).unwrap();
            assert_eq!(is_ephemeral(&disk).unwrap(), lost == 0);
        }
    }

    #[test]
    fn a_header_that_lost_its_keyslots_is_no_mark() {
        let disk = MemoryStore::zeroed(4 << 20);
        let options = Options { subsystem: String::new(), ..EPHEMERAL.options() };
        let _ = begin_without_keyslot(&disk, &options, key(), &mut random()).unwrap().commit(&disk).unwrap();
        assert!(!is_ephemeral(&disk).unwrap());
        assert!(matches!(luks::read(&disk, &Limits::default()), Err(LuksError::NoKeyslot)));
        // A volume with a keyslot is none either, whatever its subsystem.
        let options =
            Options { layout: Layout { data_offset: Some(1 << 20), ..Layout::default() }, ..EPHEMERAL.options() };
        let passphrase = Passphrase::new(b"secret".to_vec());
        let _ = super::super::begin(&disk, &options, &passphrase, key(), &mut random()).unwrap().commit(&disk).unwrap();
        assert!(!is_ephemeral(&disk).unwrap());
        assert!(!is_ephemeral(&MemoryStore::zeroed(4 << 20)).unwrap());
    }

    #[test]
    fn a_detached_header_takes_two_copies_only() {
        let (header, data) = (MemoryStore::zeroed(32 << 10), MemoryStore::zeroed(1 << 20));
        let disks = Disks::detached(&header, &data);
        EPHEMERAL.check_room(disks).unwrap();
        let segment = EPHEMERAL.begin(disks, key(), &mut random()).unwrap().commit(disks).unwrap();
        assert_eq!((segment.offset, segment.len), (0, 1 << 20));
        assert!(is_ephemeral(&header).unwrap() && !is_ephemeral(&data).unwrap());
        assert!(matches!(EPHEMERAL.check_room(&header), Err(LuksError::TooSmall { .. })));
    }
}
