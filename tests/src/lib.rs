//! What the tests share.

pub mod nbd;
