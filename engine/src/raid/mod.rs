//! Linux md RAID 0, superblock 1.2: the array that `mdadm --create --level=0` makes.
//!
//! A member starts with 4096 unused bytes. Then comes the superblock ([`Superblock`]), which says to which array the member
//! belongs and which role it has there. The data starts at the data offset. [`Array`] puts the members together, or says why
//! that is not possible. [`StripedStore`] is the array's data as one disk. [`PendingArray`] makes an array.
//!
//! Source: Linux, include/uapi/linux/raid/md_p.h (`mdp_superblock_1`) and drivers/md/md.c (`super_1_load`).

mod array;
mod pending;
mod store;
mod superblock;

pub use array::{Array, ArrayError, Found, NewArray};
pub use pending::{PendingArray, PendingError, Together, look, remove_markers};
pub use store::{OpenError, StripedStore, read_member, write_member};
pub use superblock::{Name, Role, Superblock, SuperblockError};

/// Where the superblock lies on a member, in bytes.
pub const SUPERBLOCK_OFFSET: u64 = 4096;
/// The length of the area that a superblock can take, in bytes.
pub const SUPERBLOCK_LEN: usize = 4096;
/// mdadm's default chunk in bytes.
pub const DEFAULT_CHUNK: u64 = 512 << 10;
/// Members of a new array at most. mdadm makes room for as many roles.
pub const MAX_MEMBERS: usize = 128;
