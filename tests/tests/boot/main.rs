//! `nbdcrypt up` and `down` on this machine's own kernel: FUSE, a loop device, mkfs and mount.

mod binds;
mod crash;
mod cuts;
mod disks;
mod ephemeral;
mod machine;
mod plan;
mod stop;
mod trust;
mod up_down;
mod watch;
