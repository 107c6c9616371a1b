//! The parts of `nbdcrypt` that touch the machine: everything around the two computing cores.

pub mod attach;
