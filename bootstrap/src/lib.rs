//! What the binary `nbdcrypt` is made of: the configuration, the key sources, and the boot in steps.

pub mod config;
pub mod keys;
pub mod provision;
