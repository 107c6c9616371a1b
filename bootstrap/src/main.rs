//! `nbdcrypt`: dm-crypt without dm-crypt.

fn main() {}
