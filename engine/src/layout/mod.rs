//! Where a volume's bytes lie on its disk, and where a disk's bytes lie if the disk is an array.

mod segment;
mod striped;

pub use segment::Segment;
pub use striped::{MemberSpace, Piece, Striped, StripedError, ZoneLayout};
