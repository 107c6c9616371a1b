//! What a disk already holds: known filesystems, partition tables, LUKS, RAID and LVM, so that nothing is formatted over.
