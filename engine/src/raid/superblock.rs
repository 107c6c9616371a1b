//! The superblock of one member, as bytes and as a value.

use std::fmt;

use uuid::Uuid;
use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{SUPERBLOCK_LEN, SUPERBLOCK_OFFSET};
use crate::layout::ZoneLayout;
use crate::sector::LBA_UNIT;
use crate::text::printable;

/// `MD_SB_MAGIC`.
const MAGIC: u32 = 0xa92b_4efc;
/// Bytes before the roles.
const HEAD_LEN: usize = 256;
/// The roles that fit the area of a superblock.
const MAX_ROLES: usize = (SUPERBLOCK_LEN - HEAD_LEN) / 2;
/// `MD_FEATURE_RAID0_LAYOUT`: the field `layout` is valid.
const RAID0_LAYOUT: u32 = 4096;
/// Sectors of data that a member has at least (`super_1_load`).
const MIN_DATA: u64 = 10;
/// `resync_offset` of an array that needs no resync.
const IN_SYNC: u64 = u64::MAX;
/// `MD_DISK_ROLE_SPARE`.
const SPARE: u16 = 0xffff;
/// `MD_DISK_ROLE_FAULTY`.
const FAULTY: u16 = 0xfffe;
/// The seconds in `ctime` and `utime` take 40 bits. The rest is microseconds.
const SECONDS: u64 = (1 << 40) - 1;

/// What a member does in its array.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The member holds the chunks of this place in the array's order, counted from 0.
    Active(u16),
    /// The member holds no data.
    Spare,
    /// The member has failed.
    Faulty,
}

/// A member's superblock: what RAID 0 needs of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Superblock {
    /// The array's UUID, the same on all members.
    pub array: Uuid,
    /// The array's name, followed by zeros.
    pub name: Name,
    /// When the array was made, in seconds since 1970.
    pub created: u64,
    /// The number of members.
    pub members: u32,
    /// The chunk in bytes.
    pub chunk: u64,
    /// How the zones are laid out, if the superblock says so.
    pub layout: Option<ZoneLayout>,
    /// Bytes from the start of the member to its data.
    pub data_offset: u64,
    /// The length of the member's data in bytes.
    pub data_len: u64,
    /// The number by which the array knows the member, which is not its role.
    pub number: u32,
    /// The member's own UUID.
    pub device: Uuid,
    /// When the superblock was written, in seconds since 1970.
    pub updated: u64,
    /// Counts the changes of the array. Members with the same number are up to date.
    pub events: u64,
    /// The block size in bytes to which the array keeps, whatever its disks have. 0 if the superblock says nothing. (Linux 6.19
    /// writes it.)
    pub block_size: u32,
    /// What each member does, by [`Superblock::number`].
    pub roles: Vec<Role>,
}

/// The name of an array, as mdadm shows it: `HOST:NAME`. At most 32 bytes, of any kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Name([u8; 32]);

impl Name {
    /// Returns the name, or `None` if it has more than 32 bytes or contains a NUL.
    pub fn new(name: &str) -> Option<Self> {
        let mut bytes = [0; 32];
        bytes.get_mut(..name.len())?.copy_from_slice(name.as_bytes());
        (!name.contains('\0')).then_some(Self(bytes))
    }
}

/// Shows bytes that are no text, or that a terminal obeys, by their numbers.
impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let len = self.0.iter().position(|byte| *byte == 0).unwrap_or(self.0.len());
        f.write_str(&printable(&String::from_utf8_lossy(&self.0[..len])))
    }
}

/// Why bytes are not the superblock of a RAID 0 member.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SuperblockError {
    /// There is no superblock.
    #[error("there is no md superblock")]
    Absent,
    /// The superblock is damaged.
    #[error("the md superblock is damaged: {0}")]
    Damaged(&'static str),
    /// Another metadata version.
    #[error("the md superblock has version {0}, not 1")]
    Version(u32),
    /// Another RAID level.
    #[error("the md array has level {0}, not 0")]
    Level(i32),
    /// The array uses something that RAID 0 does not have, or that is newer than this program.
    #[error("the md array has features that are not supported here (feature map {0:#x})")]
    Features(u32),
    /// A field that was not used when this program was written is not zero. Linux refuses this, too.
    #[error("the md superblock uses fields that are not known here")]
    UnknownFields,
}

/// `mdp_superblock_1` without the roles, field by field.
#[derive(Clone, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Raw {
    magic: U32,
    major_version: U32,
    feature_map: U32,
    pad0: U32,
    set_uuid: [u8; 16],
    set_name: [u8; 32],
    ctime: U64,
    level: U32,
    layout: U32,
    /// The used size of a member. RAID 0 does not use it.
    size: U64,
    chunksize: U32,
    raid_disks: U32,
    /// The bitmap's offset, and the fields of a reshape.
    bitmap_and_reshape: [u8; 32],
    data_offset: U64,
    data_size: U64,
    super_offset: U64,
    recovery_offset: U64,
    dev_number: U32,
    cnt_corrected_read: U32,
    device_uuid: [u8; 16],
    devflags: u8,
    bblog_shift: u8,
    bblog_size: U16,
    bblog_offset: U32,
    utime: U64,
    events: U64,
    resync_offset: U64,
    sb_csum: U32,
    max_dev: U32,
    logical_block_size: U32,
    pad3: [u8; 28],
}

const _: () = assert!(size_of::<Raw>() == HEAD_LEN);

impl Superblock {
    /// Returns whether the bytes at [`SUPERBLOCK_OFFSET`] start with the magic number of an md superblock.
    pub fn is_present(bytes: &[u8]) -> bool {
        bytes.starts_with(&MAGIC.to_le_bytes())
    }

    /// Parses the [`SUPERBLOCK_LEN`] bytes at [`SUPERBLOCK_OFFSET`] of a member.
    ///
    /// # Errors
    /// [`SuperblockError`] says why they are not the superblock of a RAID 0 member.
    pub fn parse(bytes: &[u8]) -> Result<Self, SuperblockError> {
        use SuperblockError::Damaged;
        if !Self::is_present(bytes) {
            return Err(SuperblockError::Absent);
        }
        let (raw, rest) = Raw::ref_from_prefix(bytes).map_err(|_| Damaged("it is cut off"))?;
        if raw.major_version.get() != 1 {
            return Err(SuperblockError::Version(raw.major_version.get()));
        }
        let count = usize::try_from(raw.max_dev.get()).ok().filter(|count| *count <= MAX_ROLES);
        let count = count.ok_or(Damaged("it has too many roles"))?;
        let words = rest.get(..count * 2).ok_or(Damaged("it is cut off"))?;
        if checksum(raw, words) != raw.sb_csum.get() {
            return Err(Damaged("its checksum is wrong"));
        }
        if raw.super_offset.get() != SUPERBLOCK_OFFSET / LBA_UNIT {
            return Err(Damaged("it belongs to another place on the disk"));
        }
        if raw.level.get() != 0 {
            return Err(SuperblockError::Level(raw.level.get().cast_signed()));
        }
        let features = raw.feature_map.get();
        if features & !RAID0_LAYOUT != 0 {
            return Err(SuperblockError::Features(features));
        }
        if raw.pad0 != U32::ZERO || raw.pad3 != [0; 28] {
            return Err(SuperblockError::UnknownFields);
        }
        // Linux refuses another value only if the array has several zones.
        let layout = match (features & RAID0_LAYOUT != 0, raw.layout.get()) {
            (true, 1) => Some(ZoneLayout::Original),
            (true, 2) => Some(ZoneLayout::Alternate),
            _ => None,
        };
        let bytes_of = |sectors: u64| sectors.checked_mul(LBA_UNIT).ok_or(Damaged("a size is too large"));
        let data_offset = bytes_of(raw.data_offset.get())?;
        if data_offset < SUPERBLOCK_OFFSET + SUPERBLOCK_LEN as u64 {
            return Err(Damaged("the data overlaps the superblock"));
        }
        if raw.data_size.get() < MIN_DATA {
            return Err(Damaged("the data is too short"));
        }
        let (words, _) = <[U16]>::ref_from_prefix(words).map_err(|_| Damaged("it is cut off"))?;
        Ok(Self {
            array: Uuid::from_bytes(raw.set_uuid),
            name: Name(raw.set_name),
            created: raw.ctime.get() & SECONDS,
            members: raw.raid_disks.get(),
            chunk: bytes_of(raw.chunksize.get().into())?,
            layout,
            data_offset,
            data_len: bytes_of(raw.data_size.get())?,
            number: raw.dev_number.get(),
            device: Uuid::from_bytes(raw.device_uuid),
            updated: raw.utime.get() & SECONDS,
            events: raw.events.get(),
            block_size: raw.logical_block_size.get(),
            roles: words.iter().map(|word| role_from(word.get())).collect(),
        })
    }

    /// Returns the bytes of the superblock, for [`SUPERBLOCK_OFFSET`].
    ///
    /// The sizes are written in units of 512 bytes, so they must be multiples of it. There are at most 1920 roles.
    pub fn to_bytes(&self) -> [u8; SUPERBLOCK_LEN] {
        let mut bytes = [0; SUPERBLOCK_LEN];
        let roles = &self.roles[..self.roles.len().min(MAX_ROLES)];
        let words: Vec<U16> = roles.iter().map(|role| U16::new(word(*role))).collect();
        let mut raw = Raw {
            magic: U32::new(MAGIC),
            major_version: U32::new(1),
            feature_map: U32::new(if self.layout.is_some() { RAID0_LAYOUT } else { 0 }),
            pad0: U32::ZERO,
            set_uuid: self.array.into_bytes(),
            set_name: self.name.0,
            ctime: U64::new(self.created & SECONDS),
            level: U32::ZERO,
            layout: U32::new(match self.layout {
                None => 0,
                Some(ZoneLayout::Original) => 1,
                Some(ZoneLayout::Alternate) => 2,
            }),
            size: U64::ZERO,
            chunksize: U32::new(u32::try_from(self.chunk / LBA_UNIT).unwrap_or(u32::MAX)),
            raid_disks: U32::new(self.members),
            bitmap_and_reshape: [0; 32],
            data_offset: U64::new(self.data_offset / LBA_UNIT),
            data_size: U64::new(self.data_len / LBA_UNIT),
            super_offset: U64::new(SUPERBLOCK_OFFSET / LBA_UNIT),
            recovery_offset: U64::ZERO,
            dev_number: U32::new(self.number),
            cnt_corrected_read: U32::ZERO,
            device_uuid: self.device.into_bytes(),
            devflags: 0,
            bblog_shift: 0,
            bblog_size: U16::ZERO,
            bblog_offset: U32::ZERO,
            utime: U64::new(self.updated & SECONDS),
            events: U64::new(self.events),
            resync_offset: U64::new(IN_SYNC),
            sb_csum: U32::ZERO,
            max_dev: U32::new(u32::try_from(words.len()).unwrap_or(0)),
            logical_block_size: U32::new(self.block_size),
            pad3: [0; 28],
        };
        raw.sb_csum = U32::new(checksum(&raw, words.as_bytes()));
        bytes[..HEAD_LEN].copy_from_slice(raw.as_bytes());
        bytes[HEAD_LEN..][..words.as_bytes().len()].copy_from_slice(words.as_bytes());
        bytes
    }

    /// Returns what this member does in the array.
    pub fn role(&self) -> Role {
        let number = usize::try_from(self.number).ok();
        number.and_then(|number| self.roles.get(number)).copied().unwrap_or(Role::Spare)
    }
}

/// `calc_sb_1_csum`: the sum of all 32-bit words, with the carry added, where the checksum itself counts as 0.
fn checksum(raw: &Raw, roles: &[u8]) -> u32 {
    let mut raw = raw.clone();
    raw.sb_csum = U32::ZERO;
    let mut sum = 0u64;
    for word in raw.as_bytes().chunks(4).chain(roles.chunks(4)) {
        // An odd number of roles ends with half a word.
        let mut whole = [0; 4];
        whole[..word.len()].copy_from_slice(word);
        sum += u64::from(u32::from_le_bytes(whole));
    }
    // The upper half is the carry. This truncates as Linux does.
    let folded = (sum & 0xffff_ffff) + (sum >> 32);
    (folded & 0xffff_ffff) as u32
}

fn role_from(word: u16) -> Role {
    match word {
        SPARE => Role::Spare,
        FAULTY => Role::Faulty,
        // `MD_DISK_ROLE_JOURNAL`, and what is reserved above `MD_DISK_ROLE_MAX`.
        0xff00.. => Role::Spare,
        role => Role::Active(role),
    }
}

fn word(role: Role) -> u16 {
    match role {
        Role::Active(role) => role,
        Role::Spare => SPARE,
        Role::Faulty => FAULTY,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// `MD_FEATURE_BAD_BLOCKS`: the log of bad blocks has entries.
    const BAD_BLOCKS: u32 = 8;

    /// The superblock of the first of three members, as mdadm 4.2 made it (`mdadm --create --level=0 --raid-devices=3 --chunk=64`
    /// with members of 96, 64 and 80 MiB), without the zeros at its end.
    fn of_mdadm() -> Vec<u8> {
        let hex = "fc4e2ba9010000000010000000000000e4d682bf8e959e8d84294cf5b24f8b54766d2d756d6c3a300000000000000000\
                   00000000000000000000000000000000b9c20d6b00000000000000000100000000000000000000008000000003000000\
                   0000000000000000000000000000000000000000000000000000000000000000000800000000000000f8020000000000\
                   0800000000000000000000000000000000000000000000009 1a8859ef69b750275396fe3ab873bc40000080008000000\
                   b9c20d6b000000000000000000000000ffffffffffffffffbfaa58048000000000000000000000000000000000000000\
                   00000000000000000000000000000000";
        let digits: Vec<u8> = hex.bytes().filter(u8::is_ascii_hexdigit).collect();
        let mut bytes: Vec<u8> =
            digits.chunks(2).map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap()).collect();
        assert_eq!(bytes.len(), HEAD_LEN);
        bytes.extend([0, 0, 1, 0, 2, 0]);
        bytes.resize(HEAD_LEN + 256, 0xff);
        bytes.resize(SUPERBLOCK_LEN, 0);
        bytes
    }

    #[test]
    fn what_mdadm_wrote_is_read() {
        let superblock = Superblock::parse(&of_mdadm()).unwrap();
        assert_eq!(superblock.array.to_string(), "e4d682bf-8e95-9e8d-8429-4cf5b24f8b54");
        assert_eq!(
            (superblock.name.to_string(), superblock.members, superblock.chunk),
            ("vm-uml:0".to_owned(), 3, 64 << 10)
        );
        assert_eq!((superblock.data_offset, superblock.data_len), (1 << 20, 95 << 20));
        assert_eq!((superblock.layout, superblock.events), (Some(ZoneLayout::Original), 0));
        assert_eq!((superblock.role(), superblock.roles.len()), (Role::Active(0), 128));
        assert_eq!(superblock.roles[1..4], [Role::Active(1), Role::Active(2), Role::Spare]);
        // Only what RAID 0 does not use is lost: the place of the log of bad blocks.
        let again = superblock.to_bytes();
        assert_eq!(Superblock::parse(&again).unwrap(), superblock);
        let differing: Vec<usize> = (0..SUPERBLOCK_LEN).filter(|at| again[*at] != of_mdadm()[*at]).collect();
        assert!(differing.iter().all(|at| (184..192).contains(at) || (216..220).contains(at)), "{differing:?}");
    }

    /// Sets a field and makes the checksum right.
    fn with(at: usize, field: &[u8]) -> Vec<u8> {
        let mut bytes = of_mdadm();
        bytes[at..at + field.len()].copy_from_slice(field);
        let raw = Raw::read_from_bytes(&bytes[..HEAD_LEN]).unwrap();
        let roles = (raw.max_dev.get() as usize * 2).min(SUPERBLOCK_LEN - HEAD_LEN);
        let sum = checksum(&raw, &bytes[HEAD_LEN..][..roles]);
        bytes[216..220].copy_from_slice(&sum.to_le_bytes());
        bytes
    }

    #[test]
    fn what_is_not_raid_0_is_refused_by_name() {
        use SuperblockError::*;
        let refused = |bytes: &[u8]| Superblock::parse(bytes).unwrap_err();
        assert_eq!(refused(&[0; SUPERBLOCK_LEN]), Absent);
        assert_eq!(refused(&of_mdadm()[..100]), Damaged("it is cut off"));
        assert_eq!(refused(&of_mdadm()[..300]), Damaged("it is cut off"));
        assert_eq!(refused(&with(4, &[2])), Version(2));
        assert_eq!(refused(&with(220, &2000u32.to_le_bytes())), Damaged("it has too many roles"));
        assert_eq!(refused(&with(144, &[16])), Damaged("it belongs to another place on the disk"));
        assert_eq!(refused(&with(72, &5u32.to_le_bytes())), Level(5));
        assert_eq!(refused(&with(72, &u32::MAX.to_le_bytes())), Level(-1));
        for feature in [1, 2, 4, BAD_BLOCKS, 512, 1 << 20] {
            assert_eq!(refused(&with(8, &u32::to_le_bytes(feature))), Features(feature));
        }
        assert_eq!(refused(&with(136, &9u64.to_le_bytes())), Damaged("the data is too short"));
        assert_eq!(refused(&with(12, &[1])), UnknownFields);
        assert_eq!(refused(&with(228, &[1])), UnknownFields);
        assert_eq!(Superblock::parse(&with(225, &[16])).unwrap().block_size, 4096);
        assert_eq!(Superblock::parse(&with(76, &[3])).unwrap().layout, None);
        assert_eq!(Superblock::parse(&with(76, &[2])).unwrap().layout, Some(ZoneLayout::Alternate));
        assert_eq!(refused(&with(128, &8u64.to_le_bytes())), Damaged("the data overlaps the superblock"));
        assert_eq!(refused(&with(136, &u64::MAX.to_le_bytes())), Damaged("a size is too large"));
    }

    #[test]
    fn names_are_kept_and_shown_safely() {
        let superblock = Superblock::parse(&with(32, &[0x1b; 32])).unwrap();
        assert_eq!(superblock.name.to_string(), "\\u{1b}".repeat(32));
        assert_eq!(Superblock::parse(&superblock.to_bytes()).unwrap(), superblock);
        assert_eq!(Name::new(&"a".repeat(32)).unwrap().to_string(), "a".repeat(32));
        assert_eq!((Name::new(&"a".repeat(33)), Name::new("a\0b")), (None, None));
    }

    #[test]
    fn every_changed_bit_is_noticed() {
        let bytes = of_mdadm();
        for bit in 0..(HEAD_LEN + 256) * 8 {
            let mut changed = bytes.clone();
            changed[bit / 8] ^= 1 << (bit % 8);
            assert!(Superblock::parse(&changed).is_err(), "bit {bit}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(
            mut bytes in prop::collection::vec(any::<u8>(), 0..SUPERBLOCK_LEN),
            is_magic in prop::bool::weighted(0.9),
        ) {
            if is_magic && bytes.len() >= 4 {
                bytes[..4].copy_from_slice(&MAGIC.to_le_bytes());
            }
            let _ = Superblock::parse(&bytes);
        }

        #[test]
        fn what_is_written_is_read(
            ids: [u8; 32],
            name in "[a-z]{0,16}:[a-z0-9]{0,15}",
            times in (0..1u64 << 40, 0..1u64 << 40),
            members in 1u32..120,
            layout in prop::sample::select(vec![None, Some(ZoneLayout::Original), Some(ZoneLayout::Alternate)]),
            sizes in (3u32..20, 16u64..1 << 40, 10..1u64 << 40),
            number in 0u32..120,
            events: u64,
            odd in 0u16..2,
            block_size: u32,
        ) {
            let superblock = Superblock {
                array: Uuid::from_slice(&ids[..16]).unwrap(),
                name: Name::new(&name).unwrap(),
                created: times.0,
                members,
                chunk: 512 << sizes.0,
                layout,
                data_offset: sizes.1 * 512,
                data_len: sizes.2 * 512,
                number,
                device: Uuid::from_slice(&ids[16..]).unwrap(),
                updated: times.1,
                events,
                block_size,
                roles: (0..120 + odd).map(|n| if n % 7 == 6 { Role::Faulty } else { Role::Active(n) }).collect(),
            };
            prop_assert_eq!(Superblock::parse(&superblock.to_bytes()), Ok(superblock));
        }
    }
}
