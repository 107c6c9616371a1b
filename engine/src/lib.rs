//! The computing core of nbdcrypt: keys, AES-XTS, LUKS header bytes, and where each byte of a volume lies on its disk.
//!
//! This crate knows no socket, async runtime, clock, environment or source of randomness. Callers pass what it needs of
//! these as arguments. The crate's only input and output is the blocking [`store::BlockStore`].
//!
//! ```text
//!   Passphrase ─► luks (header bytes) ─► VolumeKey + Segment ─► Volume = layout + XTS ─► BlockStore
//! ```
//!
//! # Example
//! Formats a disk in memory as LUKS2, opens the volume, writes a sector and reads it:
//!
//! ```
//! use std::fs::File;
//! use std::io::Read;
//! use std::sync::Arc;
//!
//! use engine::key::{Passphrase, VolumeKey};
//! use engine::luks::{self, HashAlgorithm, Limits, kdf, luks2};
//! use engine::store::{BlockStore, MemoryStore};
//! use engine::volume::Volume;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let disk = Arc::new(MemoryStore::zeroed(20 << 20));
//! let passphrase = Passphrase::new(b"correct horse battery staple".to_vec());
//!
//! // The caller supplies random bytes.
//! let mut urandom = File::open("/dev/urandom")?;
//! let mut random = |bytes: &mut [u8]| urandom.read_exact(bytes);
//! let key = luks::new_volume_key(VolumeKey::AES_256, &mut random)?;
//! let mut uuid = [0; 16];
//! random(&mut uuid)?;
//!
//! // The fewest iterations are enough for a secret that cannot be guessed. For a passphrase that a person chose, use
//! // `kdf::calibrate_argon2id`.
//! let (hash, iterations) = (HashAlgorithm::Sha256, kdf::MIN_ITERATIONS);
//! let options = luks2::Options {
//!     kdf: kdf::KdfOptions::Pbkdf2 { hash, iterations },
//!     hash,
//!     digest_iterations: iterations,
//!     sector_size: luks2::default_sector_size(disk.len()),
//!     label: "example".to_owned(),
//!     subsystem: String::new(),
//!     uuid: uuid::Builder::from_random_bytes(uuid).into_uuid(),
//!     layout: luks2::Layout::default(),
//!     tokens: Vec::new(),
//! };
//! // The disk is a volume once the format is committed.
//! luks2::begin(&*disk, &options, &passphrase, key, &mut random)?.commit(&*disk)?;
//!
//! let opened = luks::read(&*disk, &Limits::default())?.unlock(&*disk, &passphrase)?;
//! let volume = Volume::encrypted(disk.clone(), opened.segment, &opened.key)?;
//! // `write` encrypts the buffer in place.
//! volume.write(0, &mut [7; 4096])?;
//! let mut sector = [0; 4096];
//! volume.read(0, &mut sector)?;
//! assert_eq!(sector, [7; 4096]);
//!
//! // The disk holds ciphertext.
//! disk.read_at(&mut sector, opened.segment.offset)?;
//! assert_ne!(sector, [7; 4096]);
//! # Ok(())
//! # }
//! ```

pub mod buffer;
pub mod key;
pub mod layout;
pub mod limits;
pub mod luks;
pub mod raid;
pub mod sector;
pub mod signature;
pub mod store;
pub mod text;
pub mod volume;
pub mod xts;
