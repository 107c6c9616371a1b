//! What the tests share.

pub mod http_double;
pub mod moto;
