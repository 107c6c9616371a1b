//! What the tests share.

pub mod luks;
pub mod nbdcrypt;
pub mod recording;
