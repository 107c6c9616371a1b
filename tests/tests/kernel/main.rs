//! Everything that takes a real kernel, under user-mode-linux. One program, so that its tests, which mostly wait for one
//! processor's worth of work each, run beside one another.

mod bench;
mod dm_crypt;
mod nbd;
mod up;
