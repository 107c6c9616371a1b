//! The tests that need a real kernel, which runs under user-mode-linux. They are one program, so that they run in
//! parallel. Each test mostly waits for its kernel, which uses one processor.

mod bench;
mod dm_crypt;
mod flush;
mod location;
mod md;
mod nbd;
mod stalls;
mod systemd;
mod up;
