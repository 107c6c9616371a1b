//! What the binary `nbdcrypt` is made of: the configuration, the key sources, the boot in steps, and everything else
//! that touches the machine around the two computing cores.

pub mod attach;
pub mod config;
pub mod keys;
