//! What the tests share.

pub mod kernel;
pub mod luks;
