//! The NBD protocol as values: bytes in, requests out; replies in, bytes out. No input or output happens here, nothing
//! waits, and nothing of this project is imported, so that a fuzzer drives it and any session can move its bytes.
//!
//! Names and sections are those of the protocol document,
//! <https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md>.
//!
//! ```text
//!   Handshake ── wants n bytes ──► handle(bytes) ──► bytes to send, and the next Handshake
//!       │
//!       └─► Negotiated ─► ExpectRequest ── header ──► Request, and what the stream holds next
//!                              ▲                         │
//!                              └── payload, received     └─► finish(outcome) ─► Reply ─► bytes to send
//!                                  where the session likes
//! ```
//!
//! A state says how many bytes it wants next and is consumed by the step that takes them: a session never reads past
//! what a state asked for, a failed state cannot be entered again, and a request is answered once, because
//! [`Request::finish`] consumes it.

pub mod handshake;
mod option;
mod reader;
mod referee;
pub mod reply;
pub mod request;
pub mod transcript;
pub mod transmission;
pub mod wire;

pub use handshake::{ExportInfo, Handshake, HandshakeError, Negotiated, TlsPolicy};
pub use reply::{Answer, ErrorCode, Extent, Headers, Reply};
pub use request::{Command, Range, Request};
pub use transmission::{ExpectPayload, ExpectRequest, ExpectSkipped, Received, TransmissionError};

/// The longest payload of one request or reply that is served, in bytes: 2²⁵, the least that the document ("Size
/// constraints") asks a server to take. It is advertised as the maximum payload size.
pub const MAX_PAYLOAD: u32 = 1 << 25;

/// Extents in one reply to `NBD_CMD_BLOCK_STATUS`, at most: they take 16 KiB. The client asks again for the rest.
pub const MAX_EXTENTS: usize = 1024;

/// A write longer than [`MAX_PAYLOAD`] is refused and its payload skipped, up to so many bytes; beyond, the client is
/// taken for hostile and cut off.
pub const MAX_SKIPPED: u32 = MAX_PAYLOAD * 2;
