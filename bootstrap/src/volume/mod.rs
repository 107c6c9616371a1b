//! Volumes before they are open: options of new volumes, plain and ephemeral volumes, arrays of several disks, and what a disk or an
//! open volume contains.

pub mod array;
pub mod candidate;
pub mod content;
pub mod data_disks;
pub mod ephemeral;
pub mod new_volume;
pub mod plain;
mod volume_type;

pub use volume_type::VolumeType;
