//! `nbdcrypt`: dm-crypt without dm-crypt.

// The binary is a thin shell around the library `bootstrap`.
use bootstrap as _;

fn main() {}
