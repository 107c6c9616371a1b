//! The disks of a volume. Header and data lie on the same disk unless the header is detached.

use crate::store::BlockStore;

/// The disk of a volume's header and the disk of its data.
///
/// A single store holds both: `luks::read(&store, …)`. If the header is on another disk or in a file, use
/// [`Disks::detached`].
#[derive(Clone, Copy)]
pub struct Disks<'d> {
    header: &'d dyn BlockStore,
    data: Option<&'d dyn BlockStore>,
}

/// The facts about the data disk that are needed to check a header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DataDisk {
    /// The length of the disk in bytes.
    pub len: u64,
    /// Whether the header is on another disk. If it is, the data may begin at the first byte.
    pub is_detached: bool,
}

impl<'d> Disks<'d> {
    /// Returns the disks of a volume with a detached header.
    pub fn detached(header: &'d dyn BlockStore, data: &'d dyn BlockStore) -> Self {
        Self { header, data: Some(data) }
    }

    /// Returns the disk of the header and the keyslots.
    pub fn header(&self) -> &'d dyn BlockStore {
        self.header
    }

    /// Returns the disk of the data.
    pub fn data(&self) -> &'d dyn BlockStore {
        self.data.unwrap_or(self.header)
    }

    /// Returns whether the header is on a disk of its own.
    pub fn is_detached(&self) -> bool {
        self.data.is_some()
    }

    /// Returns the facts about the data disk.
    pub fn data_disk(&self) -> DataDisk {
        DataDisk { len: self.data().len(), is_detached: self.is_detached() }
    }
}

/// Header and data on one disk.
impl<'d> From<&'d (dyn BlockStore + 'd)> for Disks<'d> {
    fn from(store: &'d (dyn BlockStore + 'd)) -> Self {
        Self { header: store, data: None }
    }
}

/// Header and data on one disk.
impl<'d, S: BlockStore> From<&'d S> for Disks<'d> {
    fn from(store: &'d S) -> Self {
        Self { header: store, data: None }
    }
}
