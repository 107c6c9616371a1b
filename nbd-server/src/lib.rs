//! An NBD server. The protocol is a pure core (`proto`): bytes in, requests out; replies in, bytes out. Sessions
//! (`session`) are thin shells that move the bytes between a socket, the core and a volume.

pub mod export;
