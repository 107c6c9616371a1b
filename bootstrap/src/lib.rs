//! What the binary `nbdcrypt` is made of: the configuration, the key sources, the boot in steps, and everything else
//! that touches the machine around the two computing cores.

pub mod attach;
pub mod boot;
pub mod cli;
pub mod config;
pub mod content;
pub mod control;
pub mod cpu;
pub mod disk;
pub mod keys;
pub mod memory;
pub mod mounts;
pub mod new_volume;
pub mod plain;
pub mod process;
pub mod programs;
pub mod provision;
pub mod rewrap;
pub mod run_dir;
pub mod status;
pub mod steps;
pub mod system;
