//! The library behind `nbdcrypt-bench` and the criterion benches: every comparison of nbdcrypt with other software, and the
//! simulation of a fleet that boots.
//!
//! README.md in this crate's folder says how to measure, and what the figures mean.

pub mod chart;
pub mod cli;
pub mod kdf;
pub mod servers;
pub mod storm;
pub mod xts;
