//! An NBD server. The protocol is a pure core ([`proto`]): bytes in, requests out; replies in, bytes out. Sessions
//! ([`session`]) are thin shells that move the bytes between a socket, the core and a volume.

pub mod export;
pub mod proto;
pub mod server;
pub mod session;
mod shutdown;
pub mod statistics;
pub mod tls;

pub use export::{Export, Exports, ExportsError};
pub use server::{Listener, PlainSocket, Server, SessionKind, Settings};
pub use session::SessionError;
pub use shutdown::{Shutdown, Trigger, shutdown};
pub use tls::Tls;
