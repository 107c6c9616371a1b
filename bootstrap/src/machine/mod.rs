//! The machine that nbdcrypt runs on: its disks, mounts, programs, memory and processors, and this process itself.
//!
//! Nothing here knows about configurations, keys or LUKS volumes.

pub mod activation;
pub mod bare_folder;
pub mod bind_mount;
pub mod block_devices;
pub mod bounded;
pub mod cpu;
pub mod disk;
#[cfg(test)]
pub(crate) mod fake;
pub mod group;
pub mod holders;
pub mod memory;
pub mod modules;
pub mod mounts;
pub mod new_file;
pub mod packages;
pub mod pid_file;
pub mod private_folder;
pub mod process;
pub mod programs;
pub mod random;
pub mod root;
pub mod selection;
pub mod socket_file;
pub mod trust;
