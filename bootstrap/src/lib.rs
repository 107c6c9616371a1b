//! The parts of the binary `nbdcrypt`, in layers. Each layer uses only the layers below it:
//!
//! ```text
//!   cli, bench    the command line, and advice about errors
//!   service       the process that serves a volume
//!   steps         the boot as a list of steps
//!   keys          key sources
//!   config        the TOML file
//!   attach        the volume as a block device
//!   volume        what a new volume is, and what a disk contains
//!   machine       disks, mounts, programs, this process, randomness
//!   text          names and addresses, safe to print
//! ```

pub mod attach;
pub mod bench;
pub mod cli;
pub mod config;
pub mod keys;
pub mod machine;
pub mod service;
pub mod steps;
pub mod text;
pub mod volume;
