//! The server process of a volume that is up, and its folder under /run.

pub mod boot;
pub mod control;
pub mod doctor;
pub mod late_disks;
pub mod metrics;
pub mod run_dir;
pub mod status;
pub mod system;
pub mod units;
