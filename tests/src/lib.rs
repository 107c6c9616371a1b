//! What the tests share.

pub mod luks;
