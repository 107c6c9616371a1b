//! An array: the superblocks of its members, put together.

use uuid::Uuid;

use super::superblock::{Name, Role, Superblock, SuperblockError};
use super::{MAX_MEMBERS, SUPERBLOCK_LEN, SUPERBLOCK_OFFSET};
use crate::layout::{MemberSpace, Striped, StripedError, ZoneLayout};
use crate::sector::LBA_UNIT;
use crate::text::bytes;

/// Bytes from the start of a member of a new array to its data. By default, mdadm uses at least as much.
pub(super) const DATA_OFFSET: u64 = 1 << 20;

/// What was found on a disk that may be a member.
#[derive(Clone, Debug)]
pub struct Found {
    /// The disk's size in bytes.
    pub disk_len: u64,
    /// The alignment in bytes of requests to the disk.
    pub alignment: u64,
    /// The disk's superblock.
    pub superblock: Result<Superblock, SuperblockError>,
}

/// Why disks do not form one array. Each disk is named by its place in the list that was given.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ArrayError {
    /// A disk is not a member of a RAID 0 array.
    #[error("{source}")]
    NotMember {
        /// The disk.
        disk: usize,
        /// What is wrong with its superblock.
        source: SuperblockError,
    },
    /// A disk belongs to another array than the first one.
    #[error("it belongs to the array {array} (\"{name}\"), and the first disk belongs to another array")]
    Foreign {
        /// The disk.
        disk: usize,
        /// The UUID of the disk's array.
        array: Uuid,
        /// The name of the disk's array.
        name: Name,
    },
    /// The superblocks of one array disagree.
    #[error("its superblock says something else about the array's {what} than the first disk's")]
    Disagreement {
        /// The disk.
        disk: usize,
        /// What they disagree about.
        what: &'static str,
    },
    /// A disk is a spare of the array, or marked as faulty.
    #[error("it is no active member of the array")]
    Inactive {
        /// The disk.
        disk: usize,
    },
    /// Two disks have the same role, such as a disk and its copy.
    #[error("it has the same role {role} in the array as another of the disks")]
    Duplicate {
        /// The second disk with this role.
        disk: usize,
        /// The first disk with this role.
        other: usize,
        /// The role, counted from 0.
        role: u16,
    },
    /// A disk's superblock is older than the others', so the disk was not part of the array when the array last changed.
    #[error("its superblock is older than the others' (event {events}, and the newest is {newest})")]
    Stale {
        /// The disk.
        disk: usize,
        /// The disk's event count.
        events: u64,
        /// The largest event count.
        newest: u64,
    },
    /// A disk is smaller than its superblock says.
    #[error("the array's data on it ends at byte {needed}, but the disk has only {}", bytes(*available))]
    Truncated {
        /// The disk.
        disk: usize,
        /// The byte after the last byte of data.
        needed: u64,
        /// The disk's size in bytes.
        available: u64,
    },
    /// A disk takes requests only in blocks that do not fit the array.
    #[error(
        "the array's data starts at byte {offset} and has chunks of {chunk} bytes, and the disk has blocks of {block} bytes"
    )]
    Unaligned {
        /// The disk.
        disk: usize,
        /// Where the data starts on the disk.
        offset: u64,
        /// The chunk in bytes.
        chunk: u64,
        /// The disk's block in bytes.
        block: u64,
    },
    /// Some of the array's members are not among the disks.
    #[error("only {there} of the array's {of} members are given (missing roles: {})", list(roles))]
    Missing {
        /// The missing roles, counted from 0, as far as the superblock has room for them.
        roles: Vec<u16>,
        /// The number of members that are there.
        there: usize,
        /// The number of members.
        of: u32,
    },
    /// The members do not form a stripe set.
    #[error(transparent)]
    Map(#[from] StripedError),
    /// The name of a new array is too long, or contains a NUL.
    #[error("the name of an array has at most 32 bytes, without NUL")]
    Name,
    /// More members than a new array can have.
    #[error("a new array has at most {MAX_MEMBERS} members, not {0}")]
    TooMany(usize),
    /// A disk of a new array is too small for the superblock and one chunk.
    #[error("it has {}, which is too small for an array with chunks of {}", bytes(*len), bytes(*chunk))]
    TooSmall {
        /// The disk.
        disk: usize,
        /// The disk's size in bytes.
        len: u64,
        /// The chunk in bytes.
        chunk: u64,
    },
}

impl ArrayError {
    /// Returns the place in the list of the disk that the error is about. It is about all of them if this is `None`.
    pub fn disk(&self) -> Option<usize> {
        match self {
            Self::NotMember { disk, .. }
            | Self::Foreign { disk, .. }
            | Self::Disagreement { disk, .. }
            | Self::Inactive { disk }
            | Self::Duplicate { disk, .. }
            | Self::Stale { disk, .. }
            | Self::Truncated { disk, .. }
            | Self::Unaligned { disk, .. }
            | Self::TooSmall { disk, .. } => Some(*disk),
            Self::Missing { .. } | Self::Map(_) | Self::TooMany(_) | Self::Name => None,
        }
    }
}

/// An array all of whose members are there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Array {
    /// The array's UUID.
    pub uuid: Uuid,
    /// The array's name.
    pub name: Name,
    /// Where the array's bytes lie on its members. Its members are in the order of their roles.
    pub map: Striped,
    /// For each role, the place of its disk in the list that was given.
    pub disks: Vec<usize>,
}

impl Array {
    /// Puts disks together, in whatever order they are given.
    ///
    /// # Errors
    /// [`ArrayError`] says which disk does not fit, or what is missing.
    pub fn assemble(found: &[Found]) -> Result<Self, ArrayError> {
        let mut superblocks = Vec::with_capacity(found.len());
        for (disk, Found { superblock, .. }) in found.iter().enumerate() {
            let superblock = superblock.as_ref();
            superblocks.push(superblock.map_err(|error| ArrayError::NotMember { disk, source: error.clone() })?);
        }
        let Some(first) = superblocks.first() else { return Err(StripedError::NoMember.into()) };
        if let Some(disk) = superblocks.iter().position(|superblock| superblock.array != first.array) {
            let Superblock { array, name, .. } = superblocks[disk];
            return Err(ArrayError::Foreign { disk, array: *array, name: *name });
        }
        // The newest superblock is the one that says how the array is.
        let Some(newest) = superblocks.iter().max_by_key(|superblock| superblock.events) else {
            return Err(StripedError::NoMember.into());
        };
        let count = usize::try_from(newest.members).unwrap_or(usize::MAX);
        // The roles that the superblock has room for limit the number of members.
        let mut disks: Vec<Option<usize>> = vec![None; count.min(newest.roles.len())];
        for (disk, superblock) in superblocks.iter().enumerate() {
            // If a machine stops while mdadm writes the superblocks, one member is one event ahead (Linux, `super_1_validate`).
            if superblock.events.saturating_add(1) < newest.events {
                return Err(ArrayError::Stale { disk, events: superblock.events, newest: newest.events });
            }
            agree(disk, newest, superblock)?;
            let Role::Active(role) = superblock.role() else { return Err(ArrayError::Inactive { disk }) };
            let place = disks.get_mut(usize::from(role)).ok_or(ArrayError::Inactive { disk })?;
            if let Some(other) = place.replace(disk) {
                return Err(ArrayError::Duplicate { disk, other, role });
            }
            fits(disk, &found[disk], superblock)?;
        }
        let missing = (0..).zip(&disks).filter(|(_, disk)| disk.is_none()).map(|(role, _)| role).collect::<Vec<u16>>();
        if !missing.is_empty() || disks.len() < count {
            return Err(ArrayError::Missing { roles: missing, there: superblocks.len(), of: newest.members });
        }
        let disks: Vec<usize> = disks.into_iter().flatten().collect();
        let space =
            |disk: &usize| MemberSpace { offset: superblocks[*disk].data_offset, len: superblocks[*disk].data_len };
        let spaces: Vec<_> = disks.iter().map(space).collect();
        let map = Striped::new(newest.chunk, &spaces, newest.layout)?;
        Ok(Self { uuid: newest.array, name: newest.name, map, disks })
    }
}

/// Checks that a superblock says the same about the array as the newest one.
fn agree(disk: usize, newest: &Superblock, superblock: &Superblock) -> Result<(), ArrayError> {
    let differs = [
        ("number of members", superblock.members != newest.members),
        ("chunk size", superblock.chunk != newest.chunk),
        ("zone layout", superblock.layout != newest.layout),
    ];
    match differs.into_iter().find(|(_, differs)| *differs) {
        Some((what, _)) => Err(ArrayError::Disagreement { disk, what }),
        None => Ok(()),
    }
}

/// Checks that the disk has the data that its superblock names, and takes requests for it.
fn fits(disk: usize, found: &Found, superblock: &Superblock) -> Result<(), ArrayError> {
    let Superblock { data_offset: offset, data_len, chunk, .. } = *superblock;
    let needed = offset.saturating_add(data_len);
    let available = found.disk_len;
    if needed > available {
        return Err(ArrayError::Truncated { disk, needed, available });
    }
    let block = found.alignment.max(superblock.block_size.into());
    match block != 0 && (!offset.is_multiple_of(found.alignment) || !chunk.is_multiple_of(block)) {
        true => Err(ArrayError::Unaligned { disk, offset, chunk, block }),
        false => Ok(()),
    }
}

/// An array to be made.
#[derive(Clone, Debug)]
pub struct NewArray {
    /// The array's UUID.
    pub uuid: Uuid,
    /// The array's name, at most 32 bytes. mdadm's own names are `HOST:NAME`.
    pub name: String,
    /// The present time, in seconds since 1970.
    pub now: u64,
    /// The chunk in bytes: a power of two.
    pub chunk: u64,
    /// For each member, in the order of their roles, the disk's size in bytes and a UUID for the member.
    pub members: Vec<(u64, Uuid)>,
}

impl NewArray {
    /// Returns the superblock of each member.
    ///
    /// # Errors
    /// [`ArrayError::TooMany`], [`ArrayError::TooSmall`], [`ArrayError::Name`], or [`ArrayError::Map`] for a chunk that is not
    /// supported.
    pub fn superblocks(&self) -> Result<Vec<Superblock>, ArrayError> {
        let count = u16::try_from(self.members.len()).ok().filter(|count| usize::from(*count) <= MAX_MEMBERS);
        let count = count.ok_or(ArrayError::TooMany(self.members.len()))?;
        let name = Name::new(&self.name).ok_or(ArrayError::Name)?;
        let mut spaces = Vec::with_capacity(self.members.len());
        for (disk, (len, _)) in self.members.iter().enumerate() {
            let usable = len.saturating_sub(DATA_OFFSET);
            if usable < self.chunk.max(2 * Striped::MIN_CHUNK) {
                return Err(ArrayError::TooSmall { disk, len: *len, chunk: self.chunk });
            }
            spaces.push(MemberSpace { offset: DATA_OFFSET, len: usable - usable % LBA_UNIT });
        }
        let map = Striped::new(self.chunk, &spaces, Some(ZoneLayout::Original))?;
        // An array whose members have one size needs no layout, and kernels before 5.4 refuse one that has it.
        let layout = map.has_several_zones().then_some(ZoneLayout::Original);
        let roles: Vec<Role> = (0..count).map(Role::Active).collect();
        let superblocks = self.members.iter().zip(spaces).zip(0..).map(|(((_, device), space), number)| Superblock {
            array: self.uuid,
            name,
            created: self.now,
            members: count.into(),
            chunk: self.chunk,
            layout,
            data_offset: space.offset,
            data_len: space.len,
            number,
            device: *device,
            updated: self.now,
            events: 0,
            block_size: 0,
            roles: with_room(&roles),
        });
        Ok(superblocks.collect())
    }
}

/// Returns the roles followed by spares, as many as mdadm makes room for.
fn with_room(roles: &[Role]) -> Vec<Role> {
    let mut all = roles.to_vec();
    all.resize(MAX_MEMBERS, Role::Spare);
    all
}

fn list(roles: &[u16]) -> String {
    roles.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

const _: () = assert!(DATA_OFFSET >= SUPERBLOCK_OFFSET + SUPERBLOCK_LEN as u64);

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn new(sizes: &[u64]) -> NewArray {
        let members = sizes.iter().zip(1..).map(|(size, n)| (*size, Uuid::from_u128(n))).collect();
        NewArray {
            uuid: Uuid::from_u128(77),
            name: "host:scratch".into(),
            now: 1_800_000_000,
            chunk: 64 << 10,
            members,
        }
    }

    /// Returns the array's disks.
    fn disks(sizes: &[u64]) -> Vec<Found> {
        let superblocks = new(sizes).superblocks().unwrap();
        let of = |(superblock, size): (Superblock, &u64)| Found {
            disk_len: *size,
            alignment: 512,
            superblock: Ok(superblock),
        };
        superblocks.into_iter().zip(sizes).map(of).collect()
    }

    fn change(found: &mut Found, change: impl FnOnce(&mut Superblock)) {
        change(found.superblock.as_mut().unwrap());
    }

    #[test]
    fn a_new_array_is_assembled_in_any_order() {
        let found = disks(&[64 * MIB, 64 * MIB + 100, 80 * MIB]);
        let array = Array::assemble(&found).unwrap();
        assert_eq!(array.disks, [0, 1, 2]);
        assert_eq!(array.map.len(), (63 + 63 + 79) * MIB);
        let reordered: Vec<Found> = [2, 0, 1].map(|disk| found[disk].clone()).to_vec();
        let again = Array::assemble(&reordered).unwrap();
        assert_eq!(again.disks, [1, 2, 0]);
        assert_eq!(again.map, array.map);
        // One size needs no layout.
        let same = disks(&[64 * MIB, 64 * MIB]);
        assert_eq!(same[0].superblock.as_ref().unwrap().layout, None);
        assert!(Array::assemble(&same).is_ok());
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let sizes = [64 * MIB, 64 * MIB, 80 * MIB];
        let refused = |found: &[Found]| Array::assemble(found).unwrap_err();
        assert_eq!(refused(&[]), ArrayError::Map(StripedError::NoMember));

        let mut found = disks(&sizes);
        found.remove(1);
        assert_eq!(refused(&found), ArrayError::Missing { roles: vec![1], there: 2, of: 3 });
        assert_eq!(refused(&found).to_string(), "only 2 of the array's 3 members are given (missing roles: 1)");

        let mut found = disks(&sizes);
        found[1].superblock = Err(SuperblockError::Absent);
        assert_eq!(refused(&found), ArrayError::NotMember { disk: 1, source: SuperblockError::Absent });

        let mut found = disks(&sizes);
        change(&mut found[2], |superblock| superblock.array = Uuid::from_u128(78));
        // The events of another array count nothing here.
        change(&mut found[2], |superblock| superblock.events = 7);
        let (disk, array) = (2, Uuid::from_u128(78));
        assert_eq!(refused(&found), ArrayError::Foreign { disk, array, name: Name::new("host:scratch").unwrap() });

        let mut found = disks(&sizes);
        found.push(found[1].clone());
        assert_eq!(refused(&found), ArrayError::Duplicate { disk: 3, other: 1, role: 1 });

        let mut found = disks(&sizes);
        change(&mut found[0], |superblock| superblock.events = 5);
        assert_eq!(refused(&found), ArrayError::Stale { disk: 1, events: 0, newest: 5 });
        change(&mut found[1], |superblock| superblock.events = 4);
        change(&mut found[2], |superblock| superblock.events = 4);
        assert!(Array::assemble(&found).is_ok(), "one event ahead");

        // A member of the array as it was before it had three members.
        let mut found = disks(&sizes);
        change(&mut found[0], |superblock| superblock.members = 2);
        change(&mut found[1], |superblock| superblock.events = 20);
        change(&mut found[2], |superblock| superblock.events = 20);
        assert_eq!(refused(&found), ArrayError::Stale { disk: 0, events: 0, newest: 20 });

        let mut found = disks(&sizes);
        found[1].alignment = 1 << 17;
        let (offset, chunk, block) = (MIB, 64 << 10, 1 << 17);
        assert_eq!(refused(&found), ArrayError::Unaligned { disk: 1, offset, chunk, block });
        found[1].alignment = 4096;
        change(&mut found[1], |superblock| superblock.data_offset = 2049 * 512);
        change(&mut found[1], |superblock| superblock.data_len -= 512);
        let (offset, block) = (2049 * 512, 4096);
        assert_eq!(refused(&found), ArrayError::Unaligned { disk: 1, offset, chunk, block });

        let mut found = disks(&sizes);
        change(&mut found[1], |superblock| superblock.roles[1] = Role::Faulty);
        assert_eq!(refused(&found), ArrayError::Inactive { disk: 1 });
        change(&mut found[1], |superblock| superblock.roles[1] = Role::Active(3));
        assert_eq!(refused(&found), ArrayError::Inactive { disk: 1 }, "a role beyond the number of members");

        let mut found = disks(&sizes);
        found[2].disk_len = 79 * MIB;
        assert_eq!(refused(&found), ArrayError::Truncated { disk: 2, needed: 80 * MIB, available: 79 * MIB });

        for (what, disagree) in [
            ("number of members", (|superblock| superblock.members = 4) as fn(&mut Superblock)),
            ("chunk size", |superblock| superblock.chunk = 4096),
            ("zone layout", |superblock| superblock.layout = None),
        ] {
            let mut found = disks(&sizes);
            change(&mut found[1], disagree);
            change(&mut found[2], |superblock| superblock.events = 1);
            change(&mut found[0], |superblock| superblock.events = 1);
            assert_eq!(refused(&found), ArrayError::Disagreement { disk: 1, what });
        }
    }

    #[test]
    fn a_superblock_that_claims_many_members_takes_no_memory() {
        let mut found = disks(&[64 * MIB, 64 * MIB]);
        for found in &mut found {
            change(found, |superblock| superblock.members = u32::MAX);
        }
        let ArrayError::Missing { roles, there, of } = Array::assemble(&found).unwrap_err() else { panic!() };
        assert_eq!((roles.len(), there, of), (MAX_MEMBERS - 2, 2, u32::MAX));
    }

    #[test]
    fn an_array_that_cannot_be_made_is_refused() {
        let refused = |new: NewArray| new.superblocks().unwrap_err();
        assert_eq!(refused(new(&[MIB; 129])), ArrayError::TooMany(129));
        let (len, chunk) = (MIB + 100, 64 << 10);
        assert_eq!(refused(new(&[64 * MIB, len])), ArrayError::TooSmall { disk: 1, len, chunk });
        let long = NewArray { name: "a".repeat(33), ..new(&[64 * MIB; 2]) };
        assert_eq!(refused(long), ArrayError::Name);
        let odd = NewArray { chunk: 96 << 10, ..new(&[64 * MIB; 2]) };
        assert_eq!(refused(odd), ArrayError::Map(StripedError::Chunk(96 << 10)));
    }
}
