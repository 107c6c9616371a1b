//! What the tests share.

pub mod kernel;
pub mod luks;
pub mod nbd;
pub mod nbdcrypt;
pub mod recording;
