//! The disks of a volume: its header's and its data's, which are one and the same unless the header is detached.

use crate::store::BlockStore;

/// Where a volume's header is, and where its data.
///
/// Any store is both: `luks::read(&store, …)`. A header on another disk or in a file of its own is [`Disks::detached`].
#[derive(Clone, Copy)]
pub struct Disks<'d> {
    header: &'d dyn BlockStore,
    data: Option<&'d dyn BlockStore>,
}

/// What is to be known of the disk that holds a volume's data, before a header says where on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DataDisk {
    /// Its length in bytes.
    pub len: u64,
    /// Whether the header is on another disk, so that data may begin at the first byte.
    pub is_detached: bool,
}

impl<'d> Disks<'d> {
    /// A header that stands apart from its data.
    pub fn detached(header: &'d dyn BlockStore, data: &'d dyn BlockStore) -> Self {
        Self { header, data: Some(data) }
    }

    /// The disk of the header and of the keyslots.
    pub fn header(&self) -> &'d dyn BlockStore {
        self.header
    }

    /// The disk of the data.
    pub fn data(&self) -> &'d dyn BlockStore {
        self.data.unwrap_or(self.header)
    }

    /// Whether they are two.
    pub fn is_detached(&self) -> bool {
        self.data.is_some()
    }

    /// What is to be known of the data's disk.
    pub fn data_disk(&self) -> DataDisk {
        DataDisk { len: self.data().len(), is_detached: self.is_detached() }
    }
}

/// Both on one disk.
impl<'d> From<&'d (dyn BlockStore + 'd)> for Disks<'d> {
    fn from(store: &'d (dyn BlockStore + 'd)) -> Self {
        Self { header: store, data: None }
    }
}

/// Both on one disk.
impl<'d, S: BlockStore> From<&'d S> for Disks<'d> {
    fn from(store: &'d S) -> Self {
        Self { header: store, data: None }
    }
}
