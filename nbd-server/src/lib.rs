//! An NBD server. The protocol ([`proto`]) is a pure core: bytes in, requests out; replies in, bytes out. Sessions
//! ([`session`]) are thin shells that move bytes between a socket, the core and a volume.
//!
//! # Example
//! Serves a volume on a unix socket until it is told to stop. This volume is plaintext in memory; the first page of the crate
//! `engine` shows how to open an encrypted one.
//!
//! ```
//! use std::sync::Arc;
//!
//! use engine::sector::SectorSize;
//! use engine::store::MemoryStore;
//! use engine::volume::Volume;
//! use nbd_server::{Export, Exports, Server, Settings};
//! use tokio::io::AsyncReadExt;
//! use tokio::net::{UnixListener, UnixStream};
//!
//! # #[tokio::main]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let folder = tempfile::tempdir()?;
//! # let path = folder.path().join("disk.sock");
//! let volume = Volume::plaintext(Arc::new(MemoryStore::zeroed(1 << 20)), SectorSize::B4096)?;
//! let exports = Exports::new([Export::new("", Arc::new(volume))])?;
//! let server = Server::new(exports, Settings::default())?;
//!
//! let (trigger, shutdown) = nbd_server::shutdown();
//! let listener = UnixListener::bind(&path)?;
//! let serving = tokio::spawn(async move { server.run(listener, shutdown).await });
//!
//! // A client connects. The server speaks first.
//! let mut client = UnixStream::connect(&path).await?;
//! let mut greeting = [0; 16];
//! client.read_exact(&mut greeting).await?;
//! assert_eq!(&greeting, b"NBDMAGICIHAVEOPT");
//!
//! // The server answers the requests in flight, flushes its volumes, and ends.
//! trigger.stop();
//! serving.await??;
//! # Ok(())
//! # }
//! ```

pub mod export;
pub mod failures;
pub mod proto;
pub mod server;
pub mod session;
mod shutdown;
pub mod statistics;
pub mod threads;
pub mod tls;

pub use export::{Export, Exports, ExportsError};
pub use server::{Listener, Listeners, PlainSocket, Server, SessionKind, Settings};
pub use session::SessionError;
pub use session::link::{Fence, Link};
pub use shutdown::{Shutdown, Trigger, shutdown};
pub use tls::Tls;
