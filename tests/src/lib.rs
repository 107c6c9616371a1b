//! What the tests share.

pub mod luks;
pub mod recording;
