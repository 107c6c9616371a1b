//! The helpers that the tests share.

pub mod architecture;
pub mod http_double;
pub mod kernel;
pub mod luks;
pub mod moto;
pub mod nbd;
pub mod nbd_chunks;
pub mod nbdcrypt;
pub mod recording;
