//! The computing core of nbdcrypt: keys, AES-XTS, LUKS header bytes, and which byte of the volume lies on which byte
//! of which disk.
//!
//! Nothing here knows a socket, an async runtime, a clock, the environment or a source of randomness; what is needed
//! of those comes in by argument. The only input and output is the blocking [`store::BlockStore`].
//!
//! ```text
//!   Passphrase ─► luks (header bytes) ─► VolumeKey + Segment ─► Volume = layout + XTS ─► BlockStore
//! ```

pub mod buffer;
pub mod key;
pub mod layout;
pub mod luks;
pub mod sector;
pub mod signature;
pub mod store;
pub mod volume;
pub mod xts;
