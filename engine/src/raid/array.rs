//! An array: the superblocks of its members, put together.

use uuid::Uuid;

use super::superblock::{Role, Superblock, SuperblockError};
use super::{MAX_MEMBERS, SUPERBLOCK_LEN, SUPERBLOCK_OFFSET};
use crate::layout::{MemberSpace, Striped, StripedError, ZoneLayout};
use crate::sector::LBA_UNIT;
use crate::text::bytes;

/// Bytes from the start of a member of a new array to its data. mdadm uses at least as much.
const DATA_OFFSET: u64 = 1 << 20;

/// What was found on a disk that may be a member.
#[derive(Clone, Debug)]
pub struct Found {
    /// The disk's size in bytes.
    pub disk_len: u64,
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
        name: String,
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
    /// Some of the array's members are not among the disks.
    #[error("{} of the array's {of} members are missing (roles {})", roles.len(), list(roles))]
    Missing {
        /// The missing roles, counted from 0.
        roles: Vec<u16>,
        /// The number of members.
        of: u32,
    },
    /// The members do not form a stripe set.
    #[error(transparent)]
    Map(#[from] StripedError),
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
            | Self::TooSmall { disk, .. } => Some(*disk),
            Self::Missing { .. } | Self::Map(_) | Self::TooMany(_) => None,
        }
    }
}

/// An array all of whose members are there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Array {
    /// The array's UUID.
    pub uuid: Uuid,
    /// The array's name.
    pub name: String,
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
        let newest = superblocks.iter().map(|superblock| superblock.events).max().unwrap_or(0);
        let count = usize::try_from(first.members).unwrap_or(usize::MAX);
        // The roles that the superblock has room for limit the number of members.
        let mut disks: Vec<Option<usize>> = vec![None; count.min(first.roles.len())];
        for (disk, superblock) in superblocks.iter().enumerate() {
            agree(disk, first, superblock)?;
            // If a machine stops while mdadm writes the superblocks, one member is one event ahead (Linux, `super_1_validate`).
            if superblock.events.saturating_add(1) < newest {
                return Err(ArrayError::Stale { disk, events: superblock.events, newest });
            }
            let Role::Active(role) = superblock.role() else { return Err(ArrayError::Inactive { disk }) };
            let place = disks.get_mut(usize::from(role)).ok_or(ArrayError::Inactive { disk })?;
            if let Some(other) = place.replace(disk) {
                return Err(ArrayError::Duplicate { disk, other, role });
            }
            let needed = superblock.data_offset.saturating_add(superblock.data_len);
            let available = found[disk].disk_len;
            if needed > available {
                return Err(ArrayError::Truncated { disk, needed, available });
            }
        }
        let missing = (0..).zip(&disks).filter(|(_, disk)| disk.is_none()).map(|(role, _)| role).collect::<Vec<u16>>();
        if !missing.is_empty() || disks.len() < count {
            return Err(ArrayError::Missing { roles: missing, of: first.members });
        }
        let disks: Vec<usize> = disks.into_iter().flatten().collect();
        let space =
            |disk: &usize| MemberSpace { offset: superblocks[*disk].data_offset, len: superblocks[*disk].data_len };
        let spaces: Vec<_> = disks.iter().map(space).collect();
        let map = Striped::new(first.chunk, &spaces, first.layout)?;
        Ok(Self { uuid: first.array, name: first.name.clone(), map, disks })
    }
}

/// Checks that a superblock belongs to the same array as the first one, and says the same about it.
fn agree(disk: usize, first: &Superblock, superblock: &Superblock) -> Result<(), ArrayError> {
    if superblock.array != first.array {
        return Err(ArrayError::Foreign { disk, array: superblock.array, name: superblock.name.clone() });
    }
    let differs = [
        ("number of members", superblock.members != first.members),
        ("chunk size", superblock.chunk != first.chunk),
        ("zone layout", superblock.layout != first.layout),
    ];
    match differs.into_iter().find(|(_, differs)| *differs) {
        Some((what, _)) => Err(ArrayError::Disagreement { disk, what }),
        None => Ok(()),
    }
}

/// An array to be made.
#[derive(Clone, Debug)]
pub struct NewArray {
    /// The array's UUID.
    pub uuid: Uuid,
    /// The array's name. mdadm's own names are `HOST:NAME`, and at most 32 bytes long.
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
    /// [`ArrayError::TooMany`], [`ArrayError::TooSmall`], or [`ArrayError::Map`] for a chunk that is no power of two.
    pub fn superblocks(&self) -> Result<Vec<Superblock>, ArrayError> {
        let count = u16::try_from(self.members.len()).ok().filter(|count| usize::from(*count) <= MAX_MEMBERS);
        let count = count.ok_or(ArrayError::TooMany(self.members.len()))?;
        let mut spaces = Vec::with_capacity(self.members.len());
        for (disk, (len, _)) in self.members.iter().enumerate() {
            let usable = len.saturating_sub(DATA_OFFSET);
            if usable < self.chunk {
                return Err(ArrayError::TooSmall { disk, len: *len, chunk: self.chunk });
            }
            spaces.push(MemberSpace { offset: DATA_OFFSET, len: usable - usable % LBA_UNIT });
        }
        let map = Striped::new(self.chunk, &spaces, Some(ZoneLayout::Original))?;
        // As mdadm, so that older kernels open an array whose members have one size.
        let layout = map.has_several_zones().then_some(ZoneLayout::Original);
        let roles: Vec<Role> = (0..count).map(Role::Active).collect();
        let superblocks = self.members.iter().zip(spaces).zip(0..).map(|(((_, device), space), number)| Superblock {
            array: self.uuid,
            name: self.name.clone(),
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
        let of = |(superblock, size): (Superblock, &u64)| Found { disk_len: *size, superblock: Ok(superblock) };
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
        assert_eq!(refused(&found), ArrayError::Missing { roles: vec![1], of: 3 });
        assert_eq!(refused(&found).to_string(), "1 of the array's 3 members are missing (roles 1)");

        let mut found = disks(&sizes);
        found[1].superblock = Err(SuperblockError::Absent);
        assert_eq!(refused(&found), ArrayError::NotMember { disk: 1, source: SuperblockError::Absent });

        let mut found = disks(&sizes);
        change(&mut found[2], |superblock| superblock.array = Uuid::from_u128(78));
        let (disk, array) = (2, Uuid::from_u128(78));
        assert_eq!(refused(&found), ArrayError::Foreign { disk, array, name: "host:scratch".into() });

        let mut found = disks(&sizes);
        found.push(found[1].clone());
        assert_eq!(refused(&found), ArrayError::Duplicate { disk: 3, other: 1, role: 1 });

        let mut found = disks(&sizes);
        change(&mut found[0], |superblock| superblock.events = 5);
        assert_eq!(refused(&found), ArrayError::Stale { disk: 1, events: 0, newest: 5 });
        change(&mut found[1], |superblock| superblock.events = 4);
        change(&mut found[2], |superblock| superblock.events = 4);
        assert!(Array::assemble(&found).is_ok(), "one event ahead");

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
            assert_eq!(refused(&found), ArrayError::Disagreement { disk: 1, what });
        }
    }

    #[test]
    fn a_superblock_that_claims_many_members_takes_no_memory() {
        let mut found = disks(&[64 * MIB, 64 * MIB]);
        for found in &mut found {
            change(found, |superblock| superblock.members = u32::MAX);
        }
        let ArrayError::Missing { roles, of } = Array::assemble(&found).unwrap_err() else { panic!() };
        assert_eq!((roles.len(), of), (MAX_MEMBERS - 2, u32::MAX));
    }

    #[test]
    fn an_array_that_cannot_be_made_is_refused() {
        let refused = |new: NewArray| new.superblocks().unwrap_err();
        assert_eq!(refused(new(&[MIB; 129])), ArrayError::TooMany(129));
        let (len, chunk) = (MIB + 100, 64 << 10);
        assert_eq!(refused(new(&[64 * MIB, len])), ArrayError::TooSmall { disk: 1, len, chunk });
        let odd = NewArray { chunk: 96 << 10, ..new(&[64 * MIB; 2]) };
        assert_eq!(refused(odd), ArrayError::Map(StripedError::Chunk(96 << 10)));
    }
}
